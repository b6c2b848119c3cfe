"""Stage 2: what is published on the Redis channel "sse" appears in every open page. The obvious loop.

    python3 docs/tutorial/stage2_redis.py [PORT]

POST /publish with {"data": …} publishes; the other requests are those of stage 1.
REDIS_URL in the environment says where Redis is, if it is not on this machine.
"""

import json
import os

import redis
import stage1_digits

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
REDIS = redis.Redis.from_url(REDIS_URL)


def frame_of(message):
    r"""The bytes of an event: b'{"data": [1, 2], "type": "greet"}' gives b'event: greet\ndata: [1, 2]\n\n'."""
    members = json.loads(message)
    data = json.dumps(members["data"])  # JSON holds no line break, so one data: line will do
    frame = f"data: {data}\n\n"
    if "type" in members:
        frame = f"event: {members['type']}\n{frame}"
    if "id" in members:  # nobody sends any before stage 5
        frame = f"id: {members['id']}\n{frame}"
    return frame.encode()


class Handler(stage1_digits.Handler):
    """As in stage 1, with another stream, and a way to publish."""

    def stream(self):
        """The obvious loop: wait for a message, write it to the browser, wait for the next."""
        pubsub = REDIS.pubsub(ignore_subscribe_messages=True)
        pubsub.subscribe("sse")
        for message in pubsub.listen():
            frame = frame_of(message["data"])
            self.wfile.write(frame)

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
        """Redis answers how many subscribers it gave the message to."""
        return REDIS.publish("sse", message)


if __name__ == "__main__":
    stage1_digits.serve(Handler, 5002)
