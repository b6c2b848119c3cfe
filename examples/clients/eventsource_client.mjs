import { createEventSource } from "eventsource-client";

const show = console.log;
createEventSource({
  url: "http://127.0.0.1:5000/stream?channel=sse",
  onMessage({ event, data }) {
    if (event === undefined) show(data);
  },
});
