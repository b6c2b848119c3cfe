"""Stage 2: what is published on the Redis channel "sse" appears in every open page. The obvious loop.

    python3 docs/tutorial/stage2_redis.py [PORT]

POST /publish with {"data": …} publishes; the other requests are those of stage 1.
REDIS_URL in the environment says where Redis is, if it is not on this machine.
"""

import json
import os
import re
from typing import NamedTuple

import redis
import stage1_digits

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
REDIS = redis.Redis.from_url(REDIS_URL)


class Event(NamedTuple):
    """What a browser gets. None: the field is not sent."""

    data: str
    type: str | None = None
    id: str | None = None  # not used before stage 6


def event_of(message):
    """The event in a message: b'{"data": [1, 2], "type": "greet"}' gives Event("[1, 2]", "greet")."""
    members = json.loads(message)
    data = members["data"]
    if not isinstance(data, str):
        data = json.dumps(data)
    return Event(data, members.get("type"), members.get("id"))


def frame_of(event):
    r"""The event as it goes over the wire: Event("hi", "greet") gives b"event: greet\ndata: hi\n\n"."""
    lines = []
    if event.type:
        lines.append(f"event: {event.type}")
    if event.id:
        lines.append(f"id: {event.id}")
    for line in re.split("\r\n|\r|\n", event.data):
        lines.append(f"data: {line}")
    return "\n".join([*lines, "\n"]).encode()


class Handler(stage1_digits.Handler):
    """As in stage 1, with another stream, and a way to publish."""

    def answer_stream(self):
        """The obvious loop: wait for a message, write it to the browser, wait for the next."""
        self.start("text/event-stream")
        pubsub = REDIS.pubsub(ignore_subscribe_messages=True)
        pubsub.subscribe("sse")
        for message in pubsub.listen():
            event = event_of(message["data"])
            self.wfile.write(frame_of(event))

    def do_POST(self):
        message = self.read_message()
        answer = self.publish(message)
        self.start("text/plain")
        self.wfile.write(f"{answer}\n".encode())

    def read_message(self):
        length = int(self.headers["Content-Length"])
        members = json.loads(self.rfile.read(length))
        return json.dumps(members)

    def publish(self, message):
        """Redis answers with the number of subscribers that it gave the message to."""
        return REDIS.publish("sse", message)


if __name__ == "__main__":
    stage1_digits.serve(Handler, 5002)
