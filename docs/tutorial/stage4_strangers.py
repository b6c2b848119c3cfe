"""Stage 4: stage 3 with someone at the door.

    python3 docs/tutorial/stage4_strangers.py [PORT]

POST /publish wants a body that is called application/json; the other requests are those of stage 3.
REQUEST_S in the environment: for how many seconds a request may stall.
"""

import json
import os
import re
from random import randint

import stage2_redis
import stage3_closed_tabs
from stage1_digits import serve
from stage2_redis import frame_of

REQUEST_S = float(os.environ.get("REQUEST_S", "10"))
HOSTS = ["127.0.0.1", "localhost"]  # what browsers call this server


class HTTPError(Exception):
    """A request is refused, with this status, for this reason."""


def event_of(message):
    """As in stage 2. ValueError, RecursionError: the message cannot become an event."""
    members = json.loads(message)
    if not isinstance(members, dict) or "data" not in members:
        raise ValueError('it must be a JSON object with a member "data"')
    event = stage2_redis.event_of(message)
    for text in (event.type, event.id):
        if not isinstance(text, str | None) or re.search("[\r\n\0]", text or ""):
            raise ValueError("type and id must be text without a line break")
    return event


def frame_unless_bad(message):
    """The frame of a message, or b"" if it cannot become an event."""
    try:
        return frame_of(event_of(message))
    except (ValueError, RecursionError) as error:
        print(f"dropped a message: {error}", flush=True)
        return b""


def retry_line():
    """The start of each stream: how many ms to wait before reconnecting. Different for each browser."""
    return f"retry: {randint(2000, 4000)}\n\n".encode()


class Handler(stage3_closed_tabs.Handler):
    """As in stage 3, but each request is checked first."""

    timeout = REQUEST_S

    def do_GET(self):
        self.unless_refused(super().do_GET)

    def do_POST(self):
        self.unless_refused(super().do_POST)

    def unless_refused(self, answer):
        try:
            self.check_host()
            answer()
        except HTTPError as error:
            status, why = error.args
            self.start("text/plain", status)
            self.wfile.write(f"{why}\n".encode())

    def check_host(self):
        """A foreign domain can be made to point here. Only this field reveals that."""
        name = self.headers.get("Host", "").split(":")[0]
        if name not in HOSTS:
            raise HTTPError(403, f"this server is not called {name}")

    def check_publisher(self):
        """Browsers say which origin a request comes from, and ask first before they send JSON to another origin."""
        own = f"http://{self.headers['Host']}"
        origin = self.headers.get("Origin", own)
        if origin != own:
            raise HTTPError(403, f"pages of {origin} may not publish here")
        if self.headers.get_content_type() != "application/json":
            raise HTTPError(415, "Content-Type must be application/json")

    def read_message(self):
        self.check_publisher()
        if not re.fullmatch("[0-9]{1,5}", self.headers.get("Content-Length", "")):
            raise HTTPError(413, "Content-Length must be a number up to 99999")
        try:
            message = super().read_message()
            frame_of(event_of(message))  # also a ValueError if it contains a lone surrogate
        except TimeoutError:
            raise HTTPError(408, f"nothing came for {REQUEST_S} s") from None
        except (ValueError, RecursionError) as error:
            raise HTTPError(400, f"this cannot become an event: {error}") from None
        return message

    def start(self, content_type, status=200):
        super().start(content_type, status)
        if content_type == "text/event-stream":
            self.connection.settimeout(None)  # an open stream may be silent for as long as it likes
            self.wfile.write(retry_line())

    def frame(self, message):
        return frame_unless_bad(message)


if __name__ == "__main__":
    serve(Handler, 5004)
