"""Chaos: whether every page gets every event once and in order while Redis, ssepush and connections die at random.

    python bench/chaos.py                                  200 streams, 20,000 events, about a minute and a half
    python bench/chaos.py --shared --seed 7                the same with one Redis subscriber, and with chosen faults
    python bench/chaos.py --streams 30 --events 1200 --seconds 8 --latency-seconds 0

Pages behave as browsers do: they come back after the time that they were told, with their last event ID, and drop what
was cut within an event. Publishers never publish anything twice: an event is acknowledged (each page must get it),
refused ("did not go out": no page may get it) or unanswered (all of its channel's pages get it, or none).
At first, p99 latency of pages that read is measured, without and with others that do not.

It prints its figures, and ends with status 1 unless lost, doubled, reordered and unannounced gaps are all 0.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import itertools
import json
import random
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import ssepush
from tests.kit import RedisProcess, ServerProcess, free_port, wait_for

CHANNELS = ("chaos-a", "chaos-b", "chaos-c")
FOLLOWED = (*((channel,) for channel in CHANNELS), CHANNELS[:2], CHANNELS)  # what pages follow, by turns
HISTORY = 100_000  # nothing may be trimmed: no reset is due
LAST = "last"
SETTLE_S = 60.0


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Block(NamedTuple):
    """What stands between two blank lines of an event stream."""

    data: str | None
    type: str | None
    id: str | None
    retry_ms: int | None
    position: str


@functools.lru_cache(maxsize=16_384)
def block_of(text: bytes) -> Block:
    """Parse it, once for all pages. Our own frames: lines end at LF. ValueError: not what ssepush sends."""
    data: list[str] = []
    fields: dict[str, str] = {}
    for line in text.decode().split("\n"):
        name, _, value = line.partition(": ")
        if name == "data":
            data.append(value)
        elif name in ("event", "id", "retry"):
            fields[name] = value
        elif not line.startswith(":"):
            raise ValueError(f"a field that no server should send: {line!r}")
    retry_ms = int(fields["retry"]) if "retry" in fields else None
    event_id, whole = fields.get("id"), "\n".join(data) if data else None
    return Block(whole, fields.get("event"), event_id, retry_ms, ssepush.position_of(event_id))


class Page:
    """A browser's EventSource: what it has seen, and the connection of the moment."""

    def __init__(self, channels: tuple[str, ...]) -> None:
        self.channels = channels
        self.seen: list[Block] = []
        self.last_event_id = ""
        self.retry_ms = 200
        self.streams = 0
        self.cut = False  # at the next bytes, somewhere within them
        self.sock: socket.socket | None = None
        self.head: bytes | None = b""  # None: it has been read
        self.rest = b""

    def request(self, port: int) -> bytes:
        query = "&".join(f"channel={channel}" for channel in self.channels)
        position = f"Last-Event-ID: {self.last_event_id}\r\n" if self.last_event_id else ""
        return f"GET /stream?{query} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n{position}\r\n".encode()

    def feed(self, chunk: bytes) -> list[Block]:
        """Dispatch whole events, which are also answered."""
        if self.head is not None:
            self.head += chunk
            head, end, chunk = self.head.partition(b"\r\n\r\n")
            if not end:
                return []
            if not head.startswith(b"HTTP/1.1 200 "):
                raise ValueError(f"an answer after which no browser would come back: {head[:200]!r}")
            self.head = None
        *whole, self.rest = (self.rest + chunk).split(b"\n\n")
        dispatched = []
        for block in map(block_of, whole):
            self.retry_ms = block.retry_ms if block.retry_ms is not None else self.retry_ms
            self.last_event_id = block.id if block.id is not None else self.last_event_id
            if block.data is not None:
                dispatched.append(block)
        self.seen += dispatched
        return dispatched

    def drop(self) -> None:
        """The connection is gone, and the event that was not whole."""
        if self.sock:
            self.sock.close()
        self.sock, self.head, self.rest, self.cut = None, b"", b"", False


class Pages(threading.Thread):
    """All pages, in one thread."""

    def __init__(self, pages: Sequence[Page], port: int, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.pages, self.port, self.rng = pages, port, rng
        self.due = dict.fromkeys(pages, 0.0)  # when those without a connection try again
        self.selector = selectors.DefaultSelector()
        self.ended = threading.Event()
        self.errors: list[str] = []
        self.latencies_s: list[float] | None = None  # gathered while it is a list
        self.start()

    def run(self) -> None:
        while not self.ended.is_set():
            now = time.monotonic()
            for page in [page for page, moment in self.due.items() if moment <= now]:
                del self.due[page]
                self._connect(page)
            for key, mask in self.selector.select(0.01):
                try:
                    (self._write if mask & selectors.EVENT_WRITE else self._read)(key.data)
                except (OSError, ValueError) as error:
                    self._lose(key.data, error)
        for page in self.pages:
            page.drop()

    def _connect(self, page: Page) -> None:
        page.sock = socket.socket()
        page.sock.setblocking(False)
        page.sock.connect_ex(("127.0.0.1", self.port))
        self.selector.register(page.sock, selectors.EVENT_WRITE, page)

    def _write(self, page: Page) -> None:
        assert page.sock
        page.sock.sendall(page.request(self.port))  # raises here if it was refused
        self.selector.modify(page.sock, selectors.EVENT_READ, page)

    def _read(self, page: Page) -> None:
        assert page.sock
        chunk = page.sock.recv(256 * 1024)
        if not chunk:
            raise ConnectionError
        if page.cut:
            page.feed(chunk[: self.rng.randrange(len(chunk))])
            raise ConnectionError
        new = page.head is not None
        blocks = page.feed(chunk)
        page.streams += new and page.head is None
        if self.latencies_s is not None:
            now = time.time()
            self.latencies_s += [now - float(block.data.split(maxsplit=2)[1]) for block in blocks if block.data]

    def _lose(self, page: Page, error: Exception) -> None:
        if isinstance(error, ValueError):
            self.errors.append(str(error))
        if page.sock:
            self.selector.unregister(page.sock)
        page.drop()
        self.due[page] = time.monotonic() + page.retry_ms / 1000

    def stop(self) -> None:
        self.ended.set()
        self.join()


# ── Publishers ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Outcome(NamedTuple):
    """What is known of each event that was published, by its data."""

    acknowledged: dict[str, tuple[str, str]]  # position, channel
    refused: set[str]
    unanswered: dict[str, str]  # channel


class Refused(Exception):
    """The publisher was told that the event did not go out."""


class Publishers:
    """Some over HTTP, each on a connection that it keeps, some with `ssepush.publish`; at a given pace together."""

    def __init__(self, port: int, redis_url: str, events: int, seconds: float, rng: random.Random) -> None:
        self.port, self.redis_url, self.events, self.rng = port, redis_url, events, rng
        self.outcome = Outcome({}, set(), {})
        self.numbers = itertools.count()
        self.began, self.pause_s = time.monotonic(), seconds / events
        self.threads = [threading.Thread(target=self._run, args=(self._over_http(),), daemon=True) for _ in range(4)]
        self.threads += [threading.Thread(target=self._run, args=(self.from_python,), daemon=True) for _ in range(2)]
        for thread in self.threads:
            thread.start()

    @property
    def done(self) -> bool:
        return not any(thread.is_alive() for thread in self.threads)

    def _run(self, publish: Callable[[str, str], str]) -> None:
        while len(self.outcome.acknowledged) < self.events:
            number = next(self.numbers)
            time.sleep(max(0.0, self.began + number * self.pause_s - time.monotonic()))
            self.publish(publish, f"{number}", self.rng.choice(CHANNELS))

    def publish(self, publish: Callable[[str, str], str], data: str, channel: str) -> bool:
        """Whether it was acknowledged. Never twice the same."""
        try:
            event_id = publish(data, channel)
        except (Refused, ConnectionRefusedError):
            self.outcome.refused.add(data)
        except (OSError, http.client.HTTPException, ssepush.RedisAway):
            self.outcome.unanswered[data] = channel
        else:
            self.outcome.acknowledged[data] = (ssepush.position_of(event_id), channel)
            return True
        time.sleep(0.02)
        return False

    def from_python(self, data: str, channel: str) -> str:
        try:
            event_id = ssepush.publish(data, channel=channel, redis_url=self.redis_url, history=HISTORY).id
        except ssepush.Unanswered:
            raise
        except ssepush.RedisAway as error:
            raise Refused from error
        assert event_id
        return event_id

    def _over_http(self) -> Callable[[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

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
            raise Refused if "did not go out" in answer["error"] else ConnectionError(answer["error"])

        return publish


# ── Faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class World:
    """Redis, the server, and what may happen to them."""

    def __init__(self, folder: Path, shared: bool, rng: random.Random) -> None:
        self.rng, self.port = rng, free_port()
        self.redis = RedisProcess(folder, "--appendonly", "yes", "--appendfsync", "always")
        options = ["--history", str(HISTORY), "--retry", "200", "--heartbeat", "2", "--log-level", "error"]
        self.options = [*options, "--shared"] if shared else options
        self.faults: Counter[str] = Counter()
        self.server = self.started()

    def started(self) -> ServerProcess:
        return ServerProcess(self.redis.url, *self.options, port=self.port)

    def kill_redis(self, pages: Pages) -> None:
        self.redis.kill()
        time.sleep(self.rng.uniform(0.0, 1.0))
        self.redis.start()

    def stop_redis(self, pages: Pages) -> None:
        self.redis.signal(signal.SIGSTOP)
        time.sleep(self.rng.choice([self.rng.uniform(0.2, 2.0), 5.5]))  # 5 s: publishers give up
        self.redis.signal(signal.SIGCONT)

    def kill_subscribers(self, pages: Pages) -> None:
        self.redis.client.client_kill_filter(_type="pubsub")

    def kill_server(self, pages: Pages) -> None:
        self.server.kill()
        time.sleep(self.rng.uniform(0.0, 0.5))
        self.server = self.started()

    def cut_streams(self, pages: Pages) -> None:
        for page in self.rng.sample(pages.pages, max(1, len(pages.pages) // 3)):
            page.cut = True

    def torment(self, pages: Pages, publishers: Publishers) -> None:
        """One fault after the other, all kinds in each round, until everything is published."""
        kinds: dict[str, Callable[[Pages], None]] = {
            "Redis killed and restarted": self.kill_redis,
            "Redis stopped": self.stop_redis,
            "subscribers killed": self.kill_subscribers,
            "ssepush killed and restarted": self.kill_server,
            "streams cut within an event": self.cut_streams,
        }
        while not publishers.done:
            for name in self.rng.sample(list(kinds), len(kinds)):
                time.sleep(self.rng.uniform(0.1, 1.5))
                if not publishers.done:
                    kinds[name](pages)
                    self.faults[name] += 1

    def end(self) -> None:
        self.server.terminate()
        self.redis.signal(signal.SIGCONT)
        self.redis.kill()


# ── Judgement ────────────────────────────────────────────────────────────────────────────────────────────────────────


def spans_of_resets(page: Page) -> Iterator[tuple[str, str]]:
    """The positions between which the page was told that something may be missing."""
    before = ""
    for block in page.seen:
        if block.type == "stream-reset":
            yield before, block.position
        before = block.position


def judge(pages: Sequence[Page], outcome: Outcome) -> dict[str, int]:
    """Compare what each page has seen with what it should have."""
    places = dict(outcome.acknowledged)
    for block in itertools.chain.from_iterable(page.seen for page in pages):
        if block.data in outcome.unanswered:  # it went out: then all must have it
            places[block.data] = (block.position, outcome.unanswered[block.data])
    figures = Counter(dict.fromkeys(("lost", "doubled", "reordered", "unannounced gaps", "refused but sent"), 0))
    for page in pages:
        events = [block for block in page.seen if block.type != "stream-reset"]
        datas = [str(block.data) for block in events]
        got, resets = set(datas), list(spans_of_resets(page))
        figures["doubled"] += len(datas) - len(got)
        figures["reordered"] += sum(b.position < a.position for a, b in itertools.pairwise(events))
        figures["refused but sent"] += len(got & outcome.refused)
        figures["announced resets"] += len(resets)
        in_gap = False
        for position, data in sorted((place[0], data) for data, place in places.items() if place[1] in page.channels):
            missing = data not in got and not any(a < position <= b for a, b in resets)
            figures["lost"] += missing
            figures["unannounced gaps"] += missing and not in_gap
            in_gap = missing
    return figures


def settle(pages: Pages, publishers: Publishers) -> None:
    """Publish one last event per channel, and wait until each page has it; those that never do are seen by `judge`."""
    lasts = {}
    for channel in CHANNELS:
        data = (f"{LAST} {channel} {number}" for number in itertools.count())
        lasts[channel] = next(d for d in data if publishers.publish(publishers.from_python, d, channel))
    with contextlib.suppress(AssertionError):
        wait_for(
            lambda: all({lasts[c] for c in page.channels} <= {b.data for b in page.seen[-20:]} for page in pages.pages),
            "every page has the last events",
            SETTLE_S,
        )


# ── Latency ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Laggards(threading.Thread):
    """Streams that read nothing, and streams that read 1 byte/s; long after they should have been cut, new ones."""

    AGE_S = 8

    def __init__(self, port: int, channel: str, number: int) -> None:
        super().__init__(daemon=True)
        self.port, self.channel = port, channel
        self.ended = threading.Event()
        self.socks = [self._open() for _ in range(number)]
        self.start()

    def run(self) -> None:
        second = 0
        while not self.ended.wait(1.0):
            second += 1
            for index, sock in enumerate(self.socks):
                if second % self.AGE_S == 0:
                    sock.close()
                    self.socks[index] = self._open()
                elif index % 2:
                    with contextlib.suppress(OSError):
                        sock.recv(1)
        for sock in self.socks:
            sock.close()

    def _open(self) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", self.port))
        sock.sendall(f"GET /stream?channel={self.channel} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n\r\n".encode())
        sock.setblocking(False)
        return sock


def p99_ms(pages: Pages, redis_url: str, channel: str, seconds: float) -> float:
    """From just before an event of 4 KB is published to when a page has read it, 50 times a second."""
    gathered: list[float] = []
    pages.latencies_s = gathered
    began = time.monotonic()
    for number in range(round(50 * seconds)):
        time.sleep(max(0.0, began + number / 50 - time.monotonic()))
        ssepush.publish(f"{number} {time.time()} {'x' * 4000}", channel=channel, redis_url=redis_url, history=HISTORY)
    time.sleep(0.5)
    pages.latencies_s = None
    return 1000 * sorted(gathered)[int(0.99 * len(gathered))]


def measure_latency(world: World, number: int, seconds: float) -> dict[str, Any]:
    """p99 of pages that read, without and with others that do not."""
    channel = "latency"
    pages = Pages([Page((channel,)) for _ in range(number)], world.port, world.rng)
    wait_for(lambda: all(page.last_event_id for page in pages.pages), "every page is open")
    p99_ms(pages, world.redis.url, channel, 1.0)  # warm
    without = p99_ms(pages, world.redis.url, channel, seconds)
    laggards = Laggards(world.port, channel, number // 2)
    p99_ms(pages, world.redis.url, channel, 2.0)  # until they are stalled
    with_them = p99_ms(pages, world.redis.url, channel, seconds)
    cut = sum(world.server.metric(f'streams_closed_total{{reason="{reason}"}}') for reason in ("slow", "gone"))
    laggards.ended.set()
    laggards.join()
    pages.stop()
    return {
        "p99 latency, ms": f"{without:.1f}",
        f"p99 latency beside {number // 2} stalled streams, ms": f"{with_them:.1f}",
        "stalled streams cut by then": round(cut),
    }


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether every page gets every event once, in order, whatever dies.")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--events", type=int, default=20_000, help="acknowledged ones")
    parser.add_argument("--seconds", type=float, default=75.0, help="in which they are published, faults permitting")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the faults")
    parser.add_argument("--latency-seconds", type=float, default=8.0, help="of each latency measurement; 0: none")
    parser.add_argument("--shared", action="store_true", help="one Redis subscriber for all streams")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    rngs = [random.Random(options.seed + number) for number in range(3)]  # threads must not share one
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), options.shared, rngs[0])
        figures: dict[str, Any] = {}
        if options.latency_seconds:
            figures |= measure_latency(world, options.streams // 2, options.latency_seconds)
        pages = Pages([Page(FOLLOWED[n % len(FOLLOWED)]) for n in range(options.streams)], world.port, rngs[1])
        wait_for(lambda: all(page.last_event_id for page in pages.pages), "every page is open")
        publishers = Publishers(world.port, world.redis.url, options.events, options.seconds, rngs[2])
        world.torment(pages, publishers)
        settle(pages, publishers)
        pages.stop()
        world.end()
    outcome = publishers.outcome
    judged = judge(pages.pages, outcome)
    figures |= {"streams": options.streams, "events acknowledged": len(outcome.acknowledged)}
    figures |= {"events refused": len(outcome.refused), "events unanswered": len(outcome.unanswered)}
    figures |= {"events delivered": sum(len(page.seen) for page in pages.pages)}
    figures |= {"reconnects": sum(page.streams - 1 for page in pages.pages), **world.faults, **judged}
    for name, value in figures.items():
        print(f"{name:45} {value}")
    for error in pages.errors[:10]:
        print(error)
    wanted = ("lost", "doubled", "reordered", "unannounced gaps", "refused but sent")
    return 0 if not any(judged[name] for name in wanted) and not pages.errors else 1


if __name__ == "__main__":
    sys.exit(main())
