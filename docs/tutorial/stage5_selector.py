"""Stage 5: one thread, with the help of a selector, feeds all streams.

    python3 docs/tutorial/stage5_selector.py [PORT]

    browser ──GET /stream──▶ Handler (a thread, until the head of the answer is sent) ──Stream──▶ Relay
    Redis ──message──▶ Subscriber ──▶ Relay (one thread) ──frame──▶ Stream ──▶ browser

Requests and settings are those of stage 4. MAX_STREAMS in the environment: how many may be open.
"""

import os
import re
from dataclasses import dataclass
from queue import SimpleQueue
from selectors import EVENT_READ, DefaultSelector
from socket import socket, socketpair
from threading import Thread
from time import monotonic

import stage4_strangers
from stage1_digits import serve
from stage2_redis import REDIS
from stage3_closed_tabs import HEARTBEAT, HEARTBEAT_S, has_left
from stage4_strangers import frame_unless_bad

MAX_STREAMS = int(os.environ.get("MAX_STREAMS", "1000"))
# A message is b">3\r\n$7\r\nmessage\r\n$3\r\nsse\r\n$2\r\nhi\r\n", an answer b"$2\r\nhi\r\n". The heads, without "hi":
REPLY = re.compile(rb"(?:>3\r\n\$\d+\r\n(\w+)\r\n\$\d+\r\n[^\r]*\r\n)?(?::\d+|\$(\d+))\r\n")


class Inbox:
    """What a subscriber has received, cut into replies. Bytes in, replies out: it reads no socket."""

    rest = b""  # the beginning of a reply

    def feed(self, received):
        """The replies that are now complete, each with its kind: b"message", b"subscribe", or None for an answer."""
        self.rest += received
        replies = []
        while head := REPLY.match(self.rest):
            kind, length = head.groups()
            end = head.end()
            if length:
                end += int(length) + 2
            if end > len(self.rest):
                break
            replies.append((kind, self.rest[head.end() : end - 2]))
            self.rest = self.rest[end:]
        if not received or self.rest.startswith(b"-"):
            raise ConnectionError("Redis has ended the connection, or refuses")
        return replies


class Subscriber:
    """A Redis connection in subscribed state. Each stream has its own, so Redis counts streams."""

    def __init__(self):
        options = REDIS.connection_pool.connection_kwargs | {"protocol": 3}
        self.connection = REDIS.connection_pool.connection_class(**options)
        self.connection.connect()  # redis-py connects, logs in, and sends; we read
        self.sock = self.connection._sock
        self.inbox = Inbox()

    def send(self, *command):
        self.connection.send_command(*command)


@dataclass(eq=False)
class Stream:
    """One browser's connection, and the subscriber that feeds it."""

    sock: socket
    subscriber: Subscriber


class Relay:
    """Owns all streams. Only the thread in `run` touches them, so nothing needs a lock."""

    def __init__(self):
        self.streams = set()
        self.calls = SimpleQueue()
        self.waker, woken = socketpair()  # a byte written to the one wakes a thread that waits for the other
        self.selector = DefaultSelector()
        self.selector.register(woken, EVENT_READ, (woken.recv, 4096))

    def call(self, function, *arguments):
        """Let the relay's thread call this. Any thread."""
        self.calls.put((function, *arguments))
        self.waker.send(b"\0")

    def run(self):
        """1. Sleep until something happens. 2. Handle it. 3. At intervals, send heartbeats."""
        beat_at = monotonic() + HEARTBEAT_S
        while True:
            for key, _ in self.selector.select(beat_at - monotonic()):
                self.calls.put(key.data)
            while not self.calls.empty():
                function, *arguments = self.calls.get()
                function(*arguments)
            if monotonic() >= beat_at:
                beat_at = monotonic() + HEARTBEAT_S
                for stream in tuple(self.streams):
                    self.send(stream, HEARTBEAT)

    def open(self, stream):
        self.streams.add(stream)
        stream.sock.setblocking(False)
        self.selector.register(stream.sock, EVENT_READ, (self.on_browser, stream))
        self.selector.register(stream.subscriber.sock, EVENT_READ, (self.on_redis, stream))
        if len(self.streams) > MAX_STREAMS:
            self.end(stream)

    def on_browser(self, stream):
        if has_left(stream.sock):
            self.end(stream)

    def on_redis(self, stream):
        """If Redis is lost, the page reconnects by itself."""
        subscriber = stream.subscriber
        try:
            received = subscriber.sock.recv(65536)
            for kind, text in subscriber.inbox.feed(received):
                self.take(stream, kind, text)
        except OSError:
            self.end(stream)

    def take(self, stream, kind, text):
        if kind == b"message":
            self.send(stream, frame_unless_bad(text))

    def send(self, stream, frame):
        """Send without waiting. A browser that reads too slowly is cut; it reconnects by itself."""
        try:
            sent = stream.sock.send(frame)
        except OSError:  # it has left, or it reads too slowly and the kernel's buffer is full
            sent = 0
        if sent < len(frame):
            self.end(stream)

    def end(self, stream):
        if stream in self.streams:
            self.streams.remove(stream)
            for sock in (stream.sock, stream.subscriber.sock):
                self.selector.unregister(sock)
                sock.close()


class Handler(stage4_strangers.Handler):
    def answer_stream(self):
        self.start("text/event-stream")
        self.wfile.write(HEARTBEAT)
        subscriber = Subscriber()
        subscriber.send("SUBSCRIBE", "sse")
        self.hand_over(Stream, subscriber)

    def hand_over(self, stream_class, *arguments):
        """Hand the socket over, and end. The server would close it now, so detach it first."""
        sock = socket(fileno=self.connection.detach())
        stream = stream_class(sock, *arguments)
        self.relay.call(self.relay.open, stream)


def start(handler, relay, port):
    handler.relay = relay
    Thread(target=relay.run, daemon=True).start()
    serve(handler, port)


if __name__ == "__main__":
    start(Handler, Relay(), 5005)
