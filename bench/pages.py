"""Pages and publishers as chaos.py and failover.py need them, and the judgement of what each page has seen.

The judgement trusts nothing that ssepush says of itself, ids least of all. It knows when each event was published, from
just before the publisher asked to when it had its answer, and when each page dispatched it. So of two events of which
the one was acknowledged before the other was asked for, every page must see the one first; an event that a page has
not seen must be told by a reset, which comes after the event was asked for and before the page has seen a later one.
"""

from __future__ import annotations

import bisect
import functools
import http.client
import itertools
import json
import math
import random
import selectors
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import ssepush

RESET = "stream-reset"
POSITION = "stream-position"  # sets the last event ID, and is nothing that anybody published
LOOK_S = 0.01  # how often pages look who is to come back
PUBLISH_S = 20.0
PUBLISHERS_EACH = 3  # over HTTP, and from Python
FAILURES = ("lost", "doubled", "reordered", "unannounced gaps", "refused but sent")


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Block(NamedTuple):
    """What stands between two blank lines of an event stream."""

    data: str | None
    type: str | None
    id: str | None
    retry_ms: int | None


@functools.lru_cache(maxsize=16_384)
def block_of(text: bytes) -> Block:
    """Parse it, once for all pages. Our own frames: lines end at LF. ValueError: not what ssepush sends."""
    data: list[str] = []
    fields: dict[str, str] = {}
    for line in text.decode().split("\n"):
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name in ("event", "id", "retry"):
            fields[name] = value
        elif name:
            raise ValueError(f"a field that no server should send: {line!r}")
    retry = fields.get("retry")
    return Block(
        data="\n".join(data) if data else None,
        type=fields.get("event"),
        id=fields.get("id"),
        retry_ms=int(retry) if retry else None,
    )


class Seen(NamedTuple):
    """An event that a page has dispatched, and when."""

    block: Block
    at_s: float


class Page:
    """A browser's EventSource: what it has seen, and the connection of the moment."""

    def __init__(self, channels: tuple[str, ...], heeds_bare_id: bool, is_slow: bool = False) -> None:
        self.channels = channels
        self.is_slow = is_slow
        self.heeds_bare_id = heeds_bare_id  # as Chromium does, and neither Firefox nor WebKit
        self.seen: list[Seen] = []
        self.last_event_id = ""
        self.retry_ms = 200
        self.streams = 0
        self.opened_s = math.inf  # when it had been told something for the first time
        self.back_s = math.inf  # when it had been told something for the first time on this connection
        self.cut = False  # at the next bytes, somewhere within them
        self.sock: socket.socket | None = None
        self.head: bytes | None = b""  # None: it has been read
        self.rest = b""

    def request(self, port: int) -> bytes:
        query = "&".join(f"channel={channel}" for channel in self.channels)
        lines = [f"GET /stream?{query} HTTP/1.0", f"Host: 127.0.0.1:{port}"]
        if self.last_event_id:
            lines.append(f"Last-Event-ID: {self.last_event_id}")
        head = "\r\n".join(lines)
        return f"{head}\r\n\r\n".encode()

    def feed(self, chunk: bytes) -> None:
        """Dispatch what is whole. ValueError: no browser would go on."""
        if self.head is not None:
            self.head += chunk
            head, end, chunk = self.head.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 200 "):
                raise ValueError(f"an answer after which no browser comes back: {head[:200]!r}")
            self.head = None
            self.streams += 1
        received = self.rest + chunk
        *whole, self.rest = received.split(b"\n\n")
        for text in whole:
            self._take(block_of(text))

    def _take(self, block: Block) -> None:
        now_s = time.monotonic()
        if block.retry_ms is not None:
            self.retry_ms = block.retry_ms
        if block.id is not None:
            self.opened_s = min(self.opened_s, now_s)
            self.back_s = min(self.back_s, now_s)
            if self.heeds_bare_id or block.data is not None:
                self.last_event_id = block.id
        if block.data is not None and block.type != POSITION:
            what, _, _ = block.data.partition(PADDING)
            self.seen.append(Seen(block._replace(data=what), now_s))

    def drop(self) -> None:
        """The connection is gone, and the event that was not whole."""
        if self.sock:
            self.sock.close()
        self.sock = None
        self.head = b""
        self.rest = b""
        self.cut = False
        self.back_s = math.inf


class Pages(threading.Thread):
    """All pages, in one thread. Each connects to any of the servers."""

    def __init__(self, pages: Sequence[Page], ports: Sequence[int], rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.pages = pages
        self.ports = ports
        self.rng = rng
        self.due = dict.fromkeys(pages, 0.0)  # when those without a connection try again
        self.paused: dict[Page, float] = {}  # until when those that are slow read nothing
        self.selector = selectors.DefaultSelector()
        self.ended = threading.Event()
        self.errors: list[str] = []
        self.start()

    def run(self) -> None:
        while not self.ended.is_set():
            self._connect_due()
            self._go_on()
            for key, mask in self.selector.select(LOOK_S):
                act = self._write if mask & selectors.EVENT_WRITE else self._read
                try:
                    act(key.data)
                except (OSError, ValueError) as error:
                    self._lose(key.data, error)
        for page in self.pages:
            page.drop()
        self.selector.close()

    def _connect_due(self) -> None:
        now_s = time.monotonic()
        for page, due_s in list(self.due.items()):
            if due_s > now_s:
                continue
            del self.due[page]
            port = self.rng.choice(self.ports)
            page.sock = socket.socket()
            if page.is_slow:
                page.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            page.sock.setblocking(False)
            page.sock.connect_ex(("127.0.0.1", port))
            self.selector.register(page.sock, selectors.EVENT_WRITE, page)

    def _go_on(self) -> None:
        now_s = time.monotonic()
        for page, due_s in list(self.paused.items()):
            if due_s < now_s or not page.is_slow:
                del self.paused[page]
                assert page.sock
                self.selector.register(page.sock, selectors.EVENT_READ, page)

    def _write(self, page: Page) -> None:
        assert page.sock
        _, port = page.sock.getpeername()  # raises here if it was refused
        page.sock.sendall(page.request(port))
        self.selector.modify(page.sock, selectors.EVENT_READ, page)

    def _read(self, page: Page) -> None:
        assert page.sock
        chunk = page.sock.recv(2048 if page.is_slow else 256 * 1024)
        if not chunk:
            raise ConnectionError
        if page.cut:
            length = self.rng.randrange(len(chunk))
            page.feed(chunk[:length])
            raise ConnectionError
        page.feed(chunk)
        if page.is_slow and self.rng.random() < 0.05:
            self.selector.unregister(page.sock)
            self.paused[page] = time.monotonic() + self.rng.uniform(1, 6)

    def _lose(self, page: Page, error: Exception) -> None:
        if isinstance(error, ValueError):
            self.errors.append(str(error))
        if page.sock:
            self.selector.unregister(page.sock)
        page.drop()
        self.due[page] = time.monotonic() + page.retry_ms / 1000

    def all_open(self) -> bool:
        return all(page.opened_s < math.inf for page in self.pages)

    def have_seen(self, lasts: dict[str, str]) -> bool:
        """Whether each page has dispatched the last event of each of its channels."""
        for page in self.pages:
            recent = {seen.block.data for seen in page.seen[-50:]}
            for channel in page.channels:
                if lasts[channel] not in recent:
                    return False
        return True

    def stop(self) -> None:
        self.ended.set()
        self.join()


# ── Publishers ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Event:
    """What is known of an event that somebody tried to publish; its data is unique."""

    data: str
    channel: str
    asked_s: float
    told_s: float = math.inf  # when it was acknowledged
    id: str = ""


@dataclass
class Outcome:
    """All events, by their data."""

    acknowledged: dict[str, Event] = field(default_factory=dict)
    unanswered: dict[str, Event] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)


class Refused(Exception):
    """The publisher was told that the event did not go out."""


PADDING = "|"  # what stands before it in the data is unique, and all that is remembered
Publish = Callable[[str, str], str]  # data and channel; the id


class Publishers:
    """Some over HTTP, each on a connection that it keeps, some with `ssepush.publish`; at a given pace together."""

    def __init__(
        self,
        ports: Sequence[int],
        redis_url: str,
        channels: Sequence[str],
        per_s: float,
        history: int,
        rng: random.Random,
        large_bytes: int = 0,
    ) -> None:
        """large_bytes: of one event in twenty, if not 0."""
        self.large_bytes = large_bytes
        self.ports = ports
        self.redis_url = redis_url
        self.channels = channels
        self.pause_s = 1 / per_s
        self.history = history
        self.rng = rng
        self.outcome = Outcome()
        self.numbers = itertools.count()
        self.began_s = time.monotonic()
        self.ended = threading.Event()
        self.threads: list[threading.Thread] = []
        for _ in range(PUBLISHERS_EACH):
            self._start(self.over_http())
            self._start(self.from_python)

    def _start(self, publish: Publish) -> None:
        thread = threading.Thread(target=self._run, args=(publish,), daemon=True)
        self.threads.append(thread)
        thread.start()

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def _run(self, publish: Publish) -> None:
        while not self.ended.is_set():
            number = next(self.numbers)
            due_s = self.began_s + number * self.pause_s
            early_s = due_s - time.monotonic()
            self.ended.wait(max(0.0, early_s))
            channel = self.rng.choice(self.channels)
            if not self.publish(publish, f"{number}", channel):
                self.ended.wait(0.02)

    def publish(self, publish: Publish, data: str, channel: str) -> bool:
        """Whether it was acknowledged. Never twice the same."""
        event = Event(data, channel, time.monotonic())
        try:
            is_large = self.large_bytes and self.rng.random() < 0.05
            padding = PADDING + "x" * self.large_bytes if is_large else ""
            event.id = publish(data + padding, channel)
        except (Refused, ConnectionRefusedError):
            self.outcome.refused.add(data)
            return False
        except (OSError, http.client.HTTPException, ssepush.RedisAway):
            self.outcome.unanswered[data] = event
            return False
        event.told_s = time.monotonic()
        self.outcome.acknowledged[data] = event
        return True

    def publish_last(self, seconds: float) -> dict[str, str]:
        """One more event on each channel, tried until it is acknowledged; its data, by channel."""
        limit_s = time.monotonic() + seconds
        lasts = {}
        for channel in self.channels:
            while True:
                data = f"last {channel} {next(self.numbers)}"
                if self.publish(self.from_python, data, channel):
                    lasts[channel] = data
                    break
                assert time.monotonic() < limit_s, "nothing could be published any more"
                time.sleep(0.1)
        return lasts

    def from_python(self, data: str, channel: str) -> str:
        try:
            published = ssepush.publish(
                data,
                channel=channel,
                redis_url=self.redis_url,
                history=self.history,
            )
        except ssepush.Unanswered:
            raise
        except ssepush.RedisAway as error:
            raise Refused from error
        assert published.id
        return published.id

    def over_http(self) -> Publish:
        port = self.rng.choice(self.ports)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PUBLISH_S)

        def publish(data: str, channel: str) -> str:
            body = json.dumps({"data": data, "channel": channel})
            try:
                if connection.sock is None:
                    connection.connect()
                connection.request("POST", "/publish", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException):
                connection.close()
                raise
            if response.status == 200:
                return str(answer["id"])
            if "did not go out" in answer["error"]:
                raise Refused
            raise ConnectionError(answer["error"])

        return publish


# ── Judgement ────────────────────────────────────────────────────────────────────────────────────────────────────────


def sent_events(pages: Iterable[Page], outcome: Outcome) -> dict[str, Event]:
    """What all pages of the channel must have: what was acknowledged, and what went out without an answer."""
    sent = dict(outcome.acknowledged)
    for page in pages:
        for seen in page.seen:
            data = seen.block.data or ""
            if data in outcome.unanswered:
                sent[data] = outcome.unanswered[data]
    return sent


def judge(
    pages: Sequence[Page],
    outcome: Outcome,
    forgettings: Sequence[float] = (),
) -> Counter[str]:
    """Compare what each page has seen with what it should have. forgettings: when Redis may have forgotten events."""
    figures: Counter[str] = Counter()
    sent = sent_events(pages, outcome)
    by_time = sorted(sent.values(), key=lambda event: event.asked_s)
    for page in pages:
        wanted = [event for event in by_time if event.channel in page.channels]
        of_page = PageJudge(page, outcome, sent, forgettings).figures(wanted)
        figures.update(of_page)
    return figures


class PageJudge:
    """What one page has seen, and whether it should have."""

    def __init__(
        self,
        page: Page,
        outcome: Outcome,
        sent: dict[str, Event],
        forgettings: Sequence[float],
    ) -> None:
        self.page = page
        self.outcome = outcome
        self.sent = sent
        self.forgettings = forgettings
        self.resets_s: list[float] = []  # when each reset came,
        self.newest_s: list[float] = []  # and when the newest event that the page had seen by then was asked for
        self.needed: set[int] = set()  # numbers of the resets that told of something missing
        self.times: Counter[str] = Counter()  # that each event was seen
        self.reordered = 0
        self._look()

    def _look(self) -> None:
        newest_s = -math.inf
        for seen in self.page.seen:
            if seen.block.type == RESET:
                self.resets_s.append(seen.at_s)
                self.newest_s.append(newest_s)
                continue
            self.times[seen.block.data or ""] += 1
            event = self.sent.get(seen.block.data or "")
            if event:
                self.reordered += event.told_s < newest_s
                newest_s = max(newest_s, event.asked_s)

    def figures(self, wanted: Sequence[Event]) -> Counter[str]:
        figures = Counter(dict.fromkeys(FAILURES, 0))
        is_in_gap = False
        for event in wanted:
            is_missing = event.data not in self.times
            is_lost = is_missing and not self._is_told(event)
            figures["lost"] += is_lost
            if is_lost and not is_in_gap:
                figures["unannounced gaps"] += 1
            is_in_gap = is_lost
        for data, number in self.times.items():
            figures["doubled"] += number - 1
            figures["refused but sent"] += data in self.outcome.refused
        figures["reordered"] = self.reordered
        figures["resets"] = len(self.resets_s)
        figures["resets without need"] = len(self.resets_s) - self._due_resets()
        return figures

    def _is_told(self, event: Event) -> bool:
        """Whether the first reset after the event was asked for came before the page had seen a later event."""
        number = bisect.bisect(self.resets_s, event.asked_s)
        if number == len(self.resets_s):
            return False
        if self.newest_s[number] > event.told_s:
            return False
        self.needed.add(number)
        return True

    def _due_resets(self) -> int:
        """How many told of something missing, or came when Redis may have forgotten something since the one before."""
        due = 0
        before_s = self.page.opened_s
        for number, reset_s in enumerate(self.resets_s):
            is_due = number in self.needed
            for moment_s in self.forgettings:
                if before_s < moment_s < reset_s:
                    is_due = True
            due += is_due
            before_s = reset_s
        return due
