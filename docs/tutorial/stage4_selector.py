"""Stage 4: one thread feeds all streams, with the help of a selector. One connection to Redis is enough for them.

    python3 docs/tutorial/stage4_selector.py [PORT]

    browser ──GET /stream──▶ Handler (a thread, until the head of the answer is sent) ──socket──▶ run
    Redis ──message──▶ listen (one thread) ──message──▶ run (one thread) ──frame──▶ all browsers
    beat (one thread) ──heartbeat──▶ run

Requests and settings are those of stage 3.
"""

from queue import SimpleQueue
from selectors import EVENT_READ, DefaultSelector
from socket import socket, socketpair
from threading import Thread
from time import sleep

import stage3_closed_tabs
from stage1_digits import serve
from stage2_redis import REDIS, frame_of
from stage3_closed_tabs import HEARTBEAT, HEARTBEAT_S, has_left


class Relay:
    """Feeds all streams. Only the thread in `run` touches them, so nothing needs a lock."""

    def __init__(self):
        self.streams = set()  # the sockets of all browsers that have a stream open
        self.tasks = SimpleQueue()
        self.bell, self.button = socketpair()  # a byte into the button, and the bell can be read
        self.selector = DefaultSelector()
        self.selector.register(self.bell, EVENT_READ)
        self.pubsub = REDIS.pubsub(ignore_subscribe_messages=True)
        self.pubsub.subscribe("sse")
        self.pubsub.get_message(timeout=None)  # waits for Redis's word that it is done

    def call(self, action, *arguments):
        """Let the thread in `run` do this. For all other threads."""
        self.tasks.put([action, arguments])
        self.button.send(b"!")

    def listen(self):
        """Pass on what Redis says: one subscriber for all streams. A thread of its own."""
        for message in self.pubsub.listen():
            self.call(self.take_message, message["data"])

    def beat(self):
        """A heartbeat for all streams, again and again. A thread of its own."""
        while True:
            sleep(HEARTBEAT_S)
            self.call(self.send_all, HEARTBEAT)

    def run(self):
        """1. Sleep until something happens. 2. Who has left? 3. Do what others asked for."""
        while True:
            for key, _ in self.selector.select():
                sock = key.fileobj
                if sock is self.bell:
                    self.bell.recv(4096)
                elif has_left(sock):
                    self.remove(sock)
            while not self.tasks.empty():
                action, arguments = self.tasks.get()
                action(*arguments)

    def add(self, stream):
        stream.setblocking(False)
        self.streams.add(stream)
        self.selector.register(stream, EVENT_READ)

    def remove(self, stream):
        self.streams.remove(stream)
        self.selector.unregister(stream)
        stream.close()

    def take_message(self, message):
        frame = frame_of(message)
        self.send_all(frame)

    def send_all(self, frame):
        for stream in list(self.streams):
            self.send(stream, frame)

    def send(self, stream, frame):
        """Send without waiting. A browser that reads too slowly is cut; it comes back by itself."""
        try:
            sent = stream.send(frame)
        except OSError:  # it has left, or the kernel has no more room for what it does not read
            sent = 0
        if sent < len(frame):
            self.remove(stream)


class Handler(stage3_closed_tabs.Handler):
    def stream(self):
        """Hand the socket over, and end. The server would close it now: so it is taken out of the server's hands."""
        relay = self.relay
        descriptor = self.connection.detach()
        stream = socket(fileno=descriptor)
        relay.call(relay.add, stream)


def start(handler, relay, port):
    """Start the relay's three threads, and answer requests."""
    handler.relay = relay
    for function in [relay.run, relay.listen, relay.beat]:
        thread = Thread(target=function, daemon=True)
        thread.start()
    serve(handler, port)


if __name__ == "__main__":
    start(Handler, Relay(), 5004)
