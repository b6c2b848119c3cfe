"""Stage 3: a closed tab is noticed, and a silent stream shows that it is alive. Still a thread for each.

    python3 docs/tutorial/stage3_closed_tabs.py [PORT]

GET /threads says how many threads this process has; the other requests are those of stage 2.
HEARTBEAT_S in the environment: after how many silent seconds a stream gets a heartbeat.
"""

import json
import os
import socket
import threading
from time import monotonic

import stage2_redis
from stage1_digits import serve
from stage2_redis import REDIS, Event, event_of, frame_of

HEARTBEAT_S = float(os.environ.get("HEARTBEAT_S", "15"))
HEARTBEAT = frame_of(Event(json.dumps({"heartbeat": HEARTBEAT_S}), "stream-position"))
LOOK_S = 0.5  # how long a stream waits for Redis before it checks on its browser


def has_left(browser):
    """Whether the browser has closed its connection: then reading gives b"", the end of file."""
    try:
        received = browser.recv(4096, socket.MSG_DONTWAIT)
        return received == b""
    except BlockingIOError:  # nothing to read: the browser is there, and listens
        return False
    except OSError:  # the connection is broken
        return True


class Handler(stage2_redis.Handler):
    """As in stage 2, with another stream, and one more request."""

    def do_GET(self):
        if self.path == "/threads":
            self.start("text/plain")
            self.wfile.write(f"{threading.active_count()}\n".encode())
        else:
            super().do_GET()

    def answer_stream(self):
        """Wait for a message, but never for long: has the browser left? Is a heartbeat due?"""
        self.start("text/event-stream")
        beat_at = 0.0  # the first at once
        with REDIS.pubsub(ignore_subscribe_messages=True) as pubsub:  # closed at the end, whatever happens
            pubsub.subscribe("sse")
            while not has_left(self.connection):
                message = pubsub.get_message(timeout=LOOK_S)
                if message:
                    frame = self.frame(message["data"])
                elif monotonic() > beat_at:
                    frame = HEARTBEAT
                else:
                    continue
                self.wfile.write(frame)
                beat_at = monotonic() + HEARTBEAT_S

    def frame(self, message):
        return frame_of(event_of(message))


if __name__ == "__main__":
    serve(Handler, 5003)
