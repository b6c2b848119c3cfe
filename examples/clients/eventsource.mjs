import { EventSource } from "eventsource";

const show = console.log;
const source = new EventSource("http://127.0.0.1:5000/stream?channel=sse");
source.addEventListener("message", (event) => show(event.data));
