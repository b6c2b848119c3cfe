"""Stage 4: one thread feeds all streams, with the help of a selector. One connection to Redis is enough for them.

python3 docs/tutorial/stage4_selector.py [PORT]

browser ──GET /stream──▶ Handler (a thread, until the head of the answer is sent) ──socket──▶ Relay
Redis ──message──▶ listen (one thread) ──message──▶ Relay (one thread) ──frame──▶ all browsers
"""

from queue import SimpleQueue
from selectors import EVENT_READ, DefaultSelector
from socket import socket, socketpair
from threading import Thread
from time import monotonic

import stage3_closed_tabs
from stage1_digits import serve
from stage2_redis import frame_of, messages
from stage3_closed_tabs import HEARTBEAT, HEARTBEAT_S, has_left


class Stream:
    """One browser's open connection."""

    def __init__(self, browser):
        self.browser = browser


class Relay(Thread):
    """Feeds all streams. Only this thread touches them, so nothing needs a lock."""

    def __init__(self):
        super().__init__(daemon=True)
        self.streams = set()
        self.tasks = SimpleQueue()
        self.bell, self.button = socketpair()  # a byte into the button, and the bell can be read
        self.selector = DefaultSelector()
        self.selector.register(self.bell, EVENT_READ)

    def call(self, action, *arguments):
        """Let the relay's thread do this. For all other threads."""
        self.tasks.put((action, arguments))
        self.button.send(b"!")

    def run(self):
        """1. Sleep until something happens. 2. Who has left? 3. Do what others asked for. 4. Heartbeat."""
        beat_at = monotonic() + HEARTBEAT_S
        while True:
            wait_s = beat_at - monotonic()
            for key, _ in self.selector.select(wait_s):
                if key.fileobj is self.bell:
                    self.bell.recv(4096)
                elif has_left(key.fileobj):
                    self.remove(key.data)
            while not self.tasks.empty():
                action, arguments = self.tasks.get()
                action(*arguments)
            if monotonic() > beat_at:
                self.send_all(HEARTBEAT)
                beat_at = monotonic() + HEARTBEAT_S

    def add(self, stream):
        browser = stream.browser
        browser.setblocking(False)
        self.selector.register(browser, EVENT_READ, stream)
        self.streams.add(stream)

    def remove(self, stream):
        self.streams.remove(stream)
        self.selector.unregister(stream.browser)
        stream.browser.close()

    def take_message(self, message):
        frame = frame_of(message)
        self.send_all(frame)

    def send_all(self, frame):
        for stream in list(self.streams):
            self.send(stream, frame)

    def send(self, stream, frame):
        """Send without waiting. A browser that reads too slowly is cut; it comes back by itself."""
        try:
            sent = stream.browser.send(frame)
        except OSError:  # it has left, or the kernel has no more room for what it does not read
            sent = 0
        if sent < len(frame):
            self.remove(stream)


def listen(relay):
    """Pass on what Redis says: one subscriber for all streams."""
    for message in messages():
        relay.call(relay.take_message, message)


class Handler(stage3_closed_tabs.Handler):
    def stream(self):
        """Hand the socket over, and end."""
        relay = self.relay
        browser = self.take_socket()
        stream = Stream(browser)
        relay.call(relay.add, stream)

    def take_socket(self):
        """The browser's connection, out of the hands of the server, which would close it after the request."""
        descriptor = self.connection.detach()
        return socket(fileno=descriptor)


def start(handler, relay, port):
    """Start the two threads, and answer requests."""
    handler.relay = relay
    relay.start()
    listener = Thread(target=listen, args=[relay], daemon=True)
    listener.start()
    serve(handler, port)


if __name__ == "__main__":
    start(Handler, Relay(), 5004)
