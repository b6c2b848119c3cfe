import { EventSource } from "launchdarkly-eventsource";

const show = console.log;
const source = new EventSource("http://127.0.0.1:5000/stream?channel=sse", { readTimeoutMillis: 45_000 });
source.addEventListener("message", (event) => show(event.data));
source.addEventListener("error", () => {}); // without this, an error ends the process
