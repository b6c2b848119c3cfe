import time

import httpx
import httpx_sse

show = print
URL = "http://127.0.0.1:5000/stream?channel=sse"
SILENCE = httpx.Timeout(5, read=45)  # three heartbeats; without this, a stream ends after 5 s of silence

position = ""
while True:
    try:
        with (
            httpx.Client(timeout=SILENCE) as client,
            httpx_sse.connect_sse(client, "GET", URL, headers={"Last-Event-ID": position}) as source,
        ):
            for event in source.iter_sse():
                position = event.id or position
                if event.event == "message" and event.data:  # a block without data comes as an empty message
                    show(event.data)
    except httpx.HTTPError:
        pass
    time.sleep(1)
