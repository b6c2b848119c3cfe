import asyncio
from datetime import timedelta

import aiohttp
from aiohttp_sse_client.client import EventSource

show = print
URL = "http://127.0.0.1:5000/stream?channel=sse"
SILENCE = aiohttp.ClientTimeout(total=None, sock_read=45)  # without this, every stream ends after 300 s
PAUSE = timedelta(seconds=1)  # without this, the client waits 10 s before it reconnects
LINE_BYTES = 1 << 20  # without this, an event of more than 128 KiB ends the loop with a ValueError


async def listen():
    headers = {}
    while True:
        try:
            async with EventSource(
                URL, headers=headers, timeout=SILENCE, reconnection_time=PAUSE, read_bufsize=LINE_BYTES
            ) as source:
                async for event in source:
                    headers["Last-Event-Id"] = event.last_event_id  # the client's own spelling, or it adds another
                    if event.type is None:
                        show(event.data)
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            pass
        await asyncio.sleep(1)


asyncio.run(listen())
