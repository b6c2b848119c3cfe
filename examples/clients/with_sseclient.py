import time

import requests
import sseclient

show = print
URL = "http://127.0.0.1:5000/stream?channel=sse"

position = ""
while True:
    try:
        with requests.get(URL, headers={"Last-Event-ID": position}, stream=True, timeout=45) as response:
            response.raise_for_status()
            for event in sseclient.SSEClient(response).events():
                position = event.id or position
                if event.event == "message":
                    show(event.data)
    except requests.RequestException:
        pass
    time.sleep(1)
