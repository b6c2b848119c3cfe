"""Stage 6: strangers. Stage 5 with someone at the door: nothing inside had to change.

    python3 docs/tutorial/stage6_strangers.py [PORT]

POST /publish wants a body that is called application/json; the other requests are those of stage 5.
In the environment: MAX_STREAMS that may be open, and REQUEST_S, for how many seconds a request may stall.
"""

import json
import os
import re
from random import randint

import stage4_selector
import stage5_resume
from stage2_redis import frame_of

MAX_STREAMS = int(os.environ.get("MAX_STREAMS", "1000"))
REQUEST_S = float(os.environ.get("REQUEST_S", "10"))
HOSTS = ["127.0.0.1", "localhost"]  # what browsers call this server


class Refused(Exception):
    """A request that will not be done. Its arguments: the HTTP status, and one line that says why."""


def check(message):
    """ValueError: this message cannot become an event, and why."""
    try:
        members = json.loads(message)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(members, dict) or "data" not in members:
        raise ValueError('it must be a JSON object with a member "data"')
    event_type = str(members.get("type"))
    if "\n" in event_type or "\r" in event_type:
        raise ValueError("a line break in the type would forge another field")
    event_id = str(members.get("id", "0-0"))
    if not stage5_resume.EVENT_ID.fullmatch(event_id):
        raise ValueError("its id is not one of ours")
    frame_of(message)  # a ValueError, too, if there is half a character in it


class Relay(stage5_resume.Relay):
    """As in stage 5, but there is a limit, and a message that cannot become an event harms nobody."""

    def add(self, stream):
        if len(self.streams) < MAX_STREAMS:
            super().add(stream)
        else:
            stream.close()

    def take_message(self, message):
        try:
            check(message)
        except ValueError as error:
            print(f"dropped a message: {error}", flush=True)
        else:
            super().take_message(message)


class Handler(stage5_resume.Handler):
    """As in stage 5, but each request is looked at first."""

    timeout = REQUEST_S

    def do_GET(self):
        self.unless_refused(super().do_GET)

    def do_POST(self):
        self.unless_refused(super().do_POST)

    def unless_refused(self, answer):
        try:
            self.check_host()
            answer()
        except Refused as refused:
            status, why = refused.args
            self.send_response(status)
            self.end_headers()
            self.wfile.write(f"{why}\n".encode())

    def check_host(self):
        """A foreign domain can be made to point here. Then only this field tells."""
        name = self.headers.get("Host", "").split(":")[0]
        if name not in HOSTS:
            raise Refused(403, f"this server is not called {name}")

    def stream(self):
        """Tell the browser when to come back after the end: each at another time."""
        retry_ms = randint(2000, 4000)
        self.wfile.write(f"retry: {retry_ms}\n\n".encode())
        super().stream()

    def read_message(self):
        self.check_sender()
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,5}", length):
            raise Refused(413, "Content-Length must be a number up to 99999")
        try:
            message = super().read_message()
            check(message)
        except TimeoutError:
            raise Refused(408, f"nothing came for {REQUEST_S} s") from None
        except ValueError as error:
            raise Refused(400, f"this cannot become an event: {error}") from None
        return message

    def check_sender(self):
        """Browsers say which page's script sends a request, and ask first if it is to look like this one."""
        own = f"http://{self.headers['Host']}"
        origin = self.headers.get("Origin", own)
        if origin != own:
            raise Refused(403, f"pages of {origin} may not publish here")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json")


if __name__ == "__main__":
    stage4_selector.start(Handler, Relay(), 5006)
