import ld_eventsource
import ld_eventsource.config

show = print
client = ld_eventsource.SSEClient(
    "http://127.0.0.1:5000/stream?channel=sse",
    error_strategy=ld_eventsource.config.ErrorStrategy.always_continue(),
    retry_delay_strategy=ld_eventsource.config.RetryDelayStrategy.default(max_delay=5),
)
for event in client.events:
    if event.event == "message":
        show(event.data)
