"""sse-starlette with redis.asyncio, the obvious way: a PubSub per stream."""

import os
from collections.abc import AsyncIterator

import redis.asyncio
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

# Without the raised limit redis-py's pool would refuse the 101st stream.
CONNECTIONS = redis.asyncio.ConnectionPool.from_url(os.environ["REDIS_URL"], max_connections=20_000)


async def events() -> AsyncIterator[dict[str, str]]:
    async with redis.asyncio.Redis(connection_pool=CONNECTIONS).pubsub() as pubsub:
        await pubsub.subscribe("sse")
        async for message in pubsub.listen():
            if message["type"] == "message":
                yield {"data": message["data"].decode()}


async def stream(request: Request) -> EventSourceResponse:
    return EventSourceResponse(events())


app = Starlette(routes=[Route("/stream", stream)])
