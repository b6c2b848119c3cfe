import time

import requests
import requests_sse

show = print
URL = "http://127.0.0.1:5000/stream?channel=sse"

position = ""
while True:
    try:
        with requests_sse.EventSource(URL, timeout=45, latest_event_id=position) as source:
            for event in source:
                position = event.last_event_id
                if event.type == "message":
                    show(event.data)
    except requests.RequestException:
        pass
    time.sleep(1)
