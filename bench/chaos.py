"""Chaos: whether every page gets every event once and in order, whatever dies, hangs, moves or attacks meanwhile.

    python bench/chaos.py                                      the first six scenarios, some three minutes
    python bench/chaos.py kept slow --shared --seed 7          two of them, with one Redis subscriber and chosen faults
    python bench/chaos.py sentinel cluster-killed              Sentinel with all seven faults, and a cluster with one

| scenario | what happens | when a reset is due |
| --- | --- | --- |
| kept | Redis, ssepush and streams are killed, stopped, cut; an append-only file keeps all | never |
| forgetful | snapshots alone; a replica that lags is promoted; history and counter are deleted | Redis has forgotten |
| small | as kept, with a history of 10 events | what a page missed was trimmed |
| slow | the same, of 30; history and counter are deleted; one event in twenty has 150 KB; pages read 2 KB at a time | |
| | into a buffer of 4 KB, and pause for 1 to 6 s; a stream may have 64 KB unsent | what it missed is gone |
| strangers | 900 connections a second that say nothing; then 300 streams a second that leave at once | never |
| replays | eight pages return at once, and have missed 20 channels with 20 events of 50 KB each | never |
| sentinel | a master, two replicas, three Sentinels; and one of seven faults | Redis may have forgotten |
| haproxy | the same behind one name: haproxy follows whoever says that it is the master | the same |
| cluster | three masters, each with a replica | the same |

| fault | what happens to the master (of a cluster: to the one that holds ssepush's keys) |
| --- | --- |
| killed, stopped | kill -9, SIGSTOP; it goes on when another has taken over |
| gone, partition | its network ends for good; it reaches ssepush and no other node, until another has taken over |
| switchover | planned: SENTINEL FAILOVER, CLUSTER FAILOVER |
| resync, other | nothing: a replica has to be synchronised in full; another node is killed, and started again |

Pages behave as browsers do: they come back after the time that they were told, with their last event ID, and drop what
was cut within an event; every other one ignores an id without data, as Firefox and WebKit do. As ssepush's own page
does, they give up a stream that falls silent. Two processes of ssepush serve them. Publishers never
publish anything twice: an event is acknowledged (each page must get it), refused ("did not go out": no page may get it)
or unanswered (all of its channel's pages get it, or none). What each page should have seen: see `judge`.

It ends with status 1 unless all that FAILURES names is 0. For failovers each Redis has a network namespace of its own:
they need Linux, unshare, ip, redis-sentinel and haproxy. Masters refuse to write alone, except those of the cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import functools
import http.client
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

sys.path.insert(0, str(Path(__file__).parent.parent))

import ssepush
from tests.kit import Parser, RedisProcess, ServerProcess, connect, exchange, free_port, wait_for

RESET = "stream-reset"
POSITION = "stream-position"  # sets the last event ID, and is nothing that anybody published
HEARTBEAT_S = 2.0
SILENT_S = 10.0  # five heartbeats: while Redis is stopped, who asks it hears nothing for more than 5 s
PUBLISH_S = 20.0
PUBLISHERS_EACH = 3  # over HTTP, and from Python
PADDING = "|"  # what stands before it in the data is unique, and all that is remembered
SERVERS = 2
UNTRIMMED = 100_000
SETTLE_S = 30.0  # at the end, for all pages to come back,
LAST_S = 3.0  # and to get the last events
ANSWERED_S = 2.0  # within which strangers must leave room for an honest request,
BACK_S = 5.0  # and for a page that comes back
FAILURES = (
    *("lost", "doubled", "reordered", "unannounced gaps", "refused but sent", "resets without need"),
    *("streams found silent", "answers that no browser takes", "over limits"),
)
Figures = Counter[str]
Faults = dict[str, Callable[[], object]]


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=16_384)
def block_of(text: bytes) -> Parser:
    """What stands between two blank lines, read once for all pages. AssertionError: what no server should send."""
    parser = Parser()
    parser.feed(text + b"\n\n")
    return parser


class Seen(NamedTuple):
    """An event that a page has dispatched: when, and when it had asked for the stream on which it came."""

    data: str
    type: str
    at_s: float
    asked_s: float = 0.0


class Page:
    """A browser's EventSource: what it has seen, and the stream of the moment."""

    def __init__(self, channels: Sequence[str], heeds_bare_id: bool = True, is_slow: bool = False) -> None:
        self.channels = channels
        self.heeds_bare_id = heeds_bare_id  # as Chromium does, and neither Firefox nor WebKit
        self.is_slow = self.was_slow = is_slow
        self.seen: list[Seen] = []
        self.last_event_id = ""
        self.retry_ms = 200
        self.streams = 0
        self.is_away = False  # it does not come back for now
        self.cut = False  # at the next bytes, somewhere within them
        self.opened_s = math.inf  # when it had been told something for the first time
        self.asked_s = 0.0  # for the stream of the moment
        self.lost_s = math.inf  # since when it has been without one, and the longest time
        self.longest_s = 0.0

    def request(self) -> bytes:
        self.asked_s = time.monotonic()
        self.head: bytes | None = b""  # None: it has been read
        self.rest = b""
        fields = [f"Last-Event-ID: {self.last_event_id}"] if self.last_event_id else []
        return get(path_of(self.channels), "1.0", *fields)

    def feed(self, chunk: bytes) -> None:
        """Dispatch what is whole. AssertionError: no browser would go on."""
        if self.head is not None:
            self.head += chunk
            head, end, chunk = self.head.partition(b"\r\n\r\n")
            if not end:
                return
            assert head.startswith(b"HTTP/1.1 200 "), f"an answer after which no browser comes back: {head[:200]!r}"
            self.head = None
            self.streams += 1
        *whole, self.rest = (self.rest + chunk).split(b"\n\n")
        for text in whole:
            self._take(block_of(text))

    def _take(self, block: Parser) -> None:
        now_s = time.monotonic()
        self.retry_ms = self.retry_ms if block.retry_ms is None else block.retry_ms
        if block.last_event_id:
            self.opened_s = min(self.opened_s, now_s)
            self.longest_s = max(self.longest_s, now_s - self.lost_s)
            self.lost_s = math.inf
            if self.heeds_bare_id or block.events:
                self.last_event_id = block.last_event_id
        for event in block.events:
            if event.type != POSITION:
                what, _, _ = event.data.partition(PADDING)
                self.seen.append(Seen(what, event.type, now_s, self.asked_s))


class Pages(threading.Thread):
    """All pages, in one thread. Each connects to any of the servers."""

    def __init__(self, pages: Sequence[Page], ports: Sequence[int], rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.pages, self.ports, self.rng = pages, ports, rng
        self.cut_each_s = 0.0  # the share of the pages that are cut each second
        self.is_ended = False
        self.errors: list[str] = []
        self.silent = 0
        self.start()

    def run(self) -> None:
        asyncio.run(self._live())

    async def _live(self) -> None:
        lives = [asyncio.create_task(self._live_one(page)) for page in self.pages]
        for tenths in itertools.count(1):
            await asyncio.sleep(0.1)
            if self.is_ended:
                break
            if tenths % 10 == 0:
                self.cut(self.cut_each_s)
        for life in lives:
            life.cancel()

    async def _live_one(self, page: Page) -> None:
        while True:
            try:
                with socket.socket() as sock:
                    await self._read(page, sock)
            except TimeoutError:
                self.silent += 1
            except OSError:
                pass
            except (AssertionError, ValueError) as error:
                self.errors.append(str(error))
            page.cut = False
            page.lost_s = min(page.lost_s, time.monotonic())
            await asyncio.sleep(page.retry_ms / 1000)
            while page.is_away:
                await asyncio.sleep(0.01)

    async def _read(self, page: Page, sock: socket.socket) -> None:
        """A stream, to its end."""
        if page.is_slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", self.rng.choice(self.ports)))
        await loop.sock_sendall(sock, page.request())
        while True:
            async with asyncio.timeout(SILENT_S):
                chunk = await loop.sock_recv(sock, 2048 if page.is_slow else 256 * 1024)
            if page.cut or not chunk:
                page.feed(chunk[: int(self.rng.random() * len(chunk))])
                return
            page.feed(chunk)
            if page.is_slow and self.rng.random() < 0.05:
                await asyncio.sleep(self.rng.uniform(1, 6))

    def cut(self, share: float) -> None:
        for page in self.rng.sample(self.pages, math.ceil(share * len(self.pages))):
            page.cut = True

    def stop(self) -> None:
        self.is_ended = True
        self.join()


def path_of(channels: Iterable[str]) -> str:
    return "/stream?" + "&".join(f"channel={channel}" for channel in channels)


def get(path: str, version: str = "1.0", *fields: str) -> bytes:
    """A request; over HTTP/1.0 the body of an answer has no structure of its own."""
    return "\r\n".join([f"GET {path} HTTP/{version}", "Host: localhost", *fields, "", ""]).encode()


@dataclass
class Event:
    """What is known of an event that somebody tried to publish; its data is unique."""

    data: str
    channel: str
    asked_s: float
    told_s: float = math.inf  # when it was acknowledged
    fate: str = "acknowledged"  # or "refused", "unanswered"


Publish = Callable[[str, str], None]  # of data on a channel


class Publishers:
    """Some over HTTP, each on a connection that it keeps, some with `ssepush.publish`; at a given pace together."""

    def __init__(self, world: World, ports: Sequence[int], per_s: float, rng: random.Random) -> None:
        self.world, self.ports, self.rng, self.pause_s = world, ports, rng, 1 / per_s
        self.events: list[Event] = []
        self.numbers = itertools.count()
        self.began_s = time.monotonic()
        self.ended = threading.Event()
        publishes = [self.from_python] * PUBLISHERS_EACH + [self.over_http() for _ in range(PUBLISHERS_EACH)]
        self.threads = [threading.Thread(target=self._run, args=(publish,), daemon=True) for publish in publishes]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def _run(self, publish: Publish) -> None:
        while not self.ended.is_set():
            number = next(self.numbers)
            due_s = self.began_s + number * self.pause_s
            self.ended.wait(max(0.0, due_s - time.monotonic()))
            large_bytes = self.world.large_bytes if self.rng.random() < 0.05 else 0
            if not self.publish(publish, f"{number}", self.rng.choice(self.world.channels), large_bytes):
                self.ended.wait(0.02)

    def publish(self, publish: Publish, data: str, channel: str, more_bytes: int = 0) -> bool:
        """Whether it was acknowledged. Never twice the same."""
        event = Event(data, channel, time.monotonic())
        try:
            publish(data + PADDING + "x" * more_bytes, channel)
            event.told_s = time.monotonic()
        except (OSError, http.client.HTTPException, ssepush.RedisAway) as error:
            did_not_go_out = isinstance(error, (ConnectionRefusedError, ssepush.RedisAway))
            event.fate = "refused" if did_not_go_out and not isinstance(error, ssepush.Unanswered) else "unanswered"
        self.events.append(event)
        return event.fate == "acknowledged"

    def publish_last(self, channel: str) -> str:
        """One more event on the channel, tried until it is acknowledged; its data."""
        limit_s = time.monotonic() + SETTLE_S
        while not self.publish(self.from_python, data := f"last {channel} {next(self.numbers)}", channel):
            assert time.monotonic() < limit_s, "nothing could be published any more"
            time.sleep(0.1)
        return data

    def from_python(self, data: str, channel: str) -> None:
        ssepush.publish(data, channel=channel, redis_url=self.world.url(), history=self.world.history)

    def over_http(self) -> Publish:
        connection = http.client.HTTPConnection("127.0.0.1", self.rng.choice(self.ports), timeout=PUBLISH_S)

        def publish(data: str, channel: str) -> None:
            body = json.dumps({"data": data, "channel": channel})
            try:
                connection.request("POST", "/publish", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException):
                connection.close()
                raise
            if response.status != 200:
                raise (ssepush.RedisAway if "did not go out" in answer["error"] else ConnectionError)(answer["error"])

        return publish


def judge(pages: Sequence[Page], events: Iterable[Event], forgettings: Sequence[float] = ()) -> Figures:
    """Compare what each page has seen with what it should have. forgettings: when Redis may have forgotten events.

    This trusts nothing that ssepush says of itself, ids least of all. It knows when each event was published, from just
    before the publisher asked to when it had its answer, and when each page dispatched it. So of two events of which
    one was acknowledged before the other was asked for, every page must see the one first; an event that a page has not
    seen must be told by a reset, which comes after the event was asked for and before the page has seen a later one.
    """
    came = {seen.data for page in pages for seen in page.seen}
    known = {event.data: event for event in events}
    refused = {data for data, event in known.items() if event.fate == "refused"}
    sent = {data: event for data, event in known.items() if event.fate == "acknowledged" or data in came - refused}
    figures = Counter(dict.fromkeys(FAILURES, 0))
    for page in pages:
        figures.update(judge_page(page, sent, forgettings))
        figures["refused but sent"] += sum(seen.data in refused for seen in page.seen)
    return figures


def judge_page(page: Page, sent: dict[str, Event], forgettings: Sequence[float]) -> Figures:
    """The same for one page. sent: what all pages of its channel should have."""
    resets: list[Seen] = []
    newest_s: list[float] = []  # when the newest event that the page had seen before each reset was asked for
    times: Counter[str] = Counter()  # that each event was seen
    due: set[int] = set()  # numbers of the resets that told of something missing or forgotten
    figures: Figures = Counter()

    def first_after(moment_s: float) -> int:
        return bisect.bisect(resets, moment_s, key=lambda reset: reset.at_s)

    def credit(began_s: float, ended_s: float, earlier: Collection[int] = ()) -> None:
        """Resets are due for what happened then: the first that the page has seen since.

        One from before it may have been on its way, if the page reads slowly, or if it was due for something earlier:
        then each counts up to the first on a stream that the page had asked for since.
        """
        for number in range(first_after(max(began_s, page.opened_s)), len(resets)):
            due.add(number)
            may_be_older = page.was_slow or number in earlier
            if not may_be_older or resets[number].asked_s > ended_s:
                return

    last_s = -math.inf
    for seen in page.seen:
        if seen.type == RESET:
            resets.append(seen)
            newest_s.append(last_s)
            continue
        times[seen.data] += 1
        if seen.data in sent:
            figures["reordered"] += sent[seen.data].told_s < last_s
            last_s = max(last_s, sent[seen.data].asked_s)
    for moment_s in forgettings:
        credit(moment_s, moment_s, earlier=set(due))
    is_in_gap = False
    for event in sorted(sent.values(), key=lambda event: event.asked_s):
        if event.channel not in page.channels:
            continue
        number = first_after(event.asked_s)
        is_told = number < len(resets) and newest_s[number] <= event.told_s
        is_lost = event.data not in times and not is_told
        if event.data not in times and is_told:
            credit(event.asked_s, event.told_s)
        figures["lost"] += is_lost
        figures["unannounced gaps"] += is_lost and not is_in_gap
        is_in_gap = is_lost
    doubled = sum(times.values()) - len(times)
    return figures + Counter({"doubled": doubled, "resets": len(resets), "resets without need": len(resets) - len(due)})


# ── Worlds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class World:
    """Redis, the servers, and what happens to them and their pages. What has been started ends with the stack."""

    streams, seconds, per_s = 200, 25.0, 270.0  # unless the command line says more
    channels: Sequence[str] = ("chaos-a", "chaos-b", "chaos-c")
    followed: Sequence[Sequence[str]] = (channels[:1], channels[1:2], channels[2:], channels[:2], channels)  # by turns
    history = UNTRIMMED
    large_bytes = 0  # of one event in twenty, if not 0
    is_slow = False
    redis_options: Sequence[str] = ("--appendonly", "yes", "--appendfsync", "always")
    server_options: Sequence[str] = ()

    def __init__(self, folder: Path, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self.folder, self.options, self.stack = folder, options, stack
        self.seconds = options.seconds or self.seconds
        self.rng = random.Random(f"{options.seed} faults")
        self.forgettings: list[float] = []  # moments at which Redis may have forgotten something
        self.figures: Figures = Counter()
        self.servers: list[ServerProcess] = []
        self.start_redis()

    def start_redis(self) -> None:
        self.redis = self.new_redis(self.folder)

    def new_redis(self, folder: Path) -> RedisProcess:
        folder.mkdir(exist_ok=True)
        process = RedisProcess(folder, *self.redis_options)
        self.stack.callback(process.kill)
        return process

    def url(self) -> str:
        return self.redis.url

    def start_server(self, port: int) -> None:
        options = f"--history {self.history} --retry 200 --heartbeat {HEARTBEAT_S} --log-level error"
        shared = ["--shared"] if self.options.shared else []
        server = ServerProcess(self.url(), *options.split(), *self.server_options, *shared, port=port)
        self.servers.append(server)
        self.stack.callback(server.kill)

    def new_pages(self) -> list[Page]:
        """Of each kind as many."""
        kinds = itertools.cycle(itertools.product(self.followed, (True, False)))
        number = self.options.streams or self.streams
        return [Page(channels, heeds, self.is_slow) for channels, heeds in itertools.islice(kinds, number)]

    def wait(self, least_s: float, most_s: float) -> None:
        time.sleep(self.rng.uniform(least_s, most_s))

    def forget(self) -> None:
        self.forgettings.append(time.monotonic())

    def torment(self, pages: Pages, publishers: Publishers) -> None:
        raise NotImplementedError

    def look_back(self, pages: Pages, publishers: Publishers) -> None:
        """Add figures, when all is over."""

    def limit(self, what: str, value: float, most: float) -> None:
        """Note a figure that has a limit."""
        self.figures[f"{what} (at most {most:g})"] = math.ceil(value)
        self.figures["over limits"] += value > most


class Kept(World):
    """One fault after the other, all kinds in each round. Redis keeps every write, also when it is killed."""

    def faults(self, pages: Pages) -> Faults:
        return {
            "ssepush killed and restarted": self.kill_server,
            "streams cut within an event": functools.partial(pages.cut, 1 / 3),
            "subscribers killed": lambda: self.redis.client.client_kill_filter(_type="pubsub"),
            "Redis killed and restarted": self.kill_redis,
            "Redis stopped": self.stop_redis,
        }

    def torment(self, pages: Pages, publishers: Publishers) -> None:
        faults = self.faults(pages)
        limit_s = time.monotonic() + self.seconds
        round_: list[str] = []
        while time.monotonic() < limit_s:
            round_ = round_ or self.rng.sample(list(faults), len(faults))
            name = round_.pop()
            faults[name]()
            self.figures[name] += 1
            self.wait(0.1, 0.6)

    def kill_server(self) -> None:
        server = self.servers.pop(self.rng.randrange(SERVERS))
        server.kill()
        self.wait(0.0, 0.5)
        self.start_server(server.port)

    def kill_redis(self) -> None:
        self.redis.kill()
        self.wait(0.0, 1.0)
        self.redis.start()

    def stop_redis(self) -> None:
        least_s, most_s = (0.2, 1.0) if self.rng.random() < 0.7 else (5.2, 5.7)  # publishers give up after 5 s
        self.redis.signal(signal.SIGSTOP)
        self.wait(least_s, most_s)
        self.redis.signal(signal.SIGCONT)

    def deletions(self) -> Faults:
        return {
            "history deleted": lambda: self.delete(ssepush.HISTORY_KEY + self.rng.choice(self.channels)),
            "counter deleted": lambda: self.delete(ssepush.COUNTER_KEY, ssepush.NEWEST_KEY),
        }

    def delete(self, *keys: str) -> None:
        self.forget()
        self.redis.client.delete(*keys)


class Forgetful(Kept):
    """Redis keeps what stood in its last snapshot."""

    redis_options = ("--repl-diskless-sync-delay", "0")

    def faults(self, pages: Pages) -> Faults:
        faults = super().faults(pages) | self.deletions() | {"lagging replica promoted": self.promote}
        del faults["Redis stopped"]
        return faults

    def kill_redis(self) -> None:
        self.redis.client.save()
        self.wait(0.1, 0.5)
        self.forget()
        super().kill_redis()

    def promote(self) -> None:
        """A replica that lags takes the place of its master, on its port."""
        replica, port = self.new_redis(self.folder / f"replica-{len(self.forgettings)}"), self.redis.port
        client = replica.client
        client.replicaof("127.0.0.1", port)
        wait_for(lambda: client.info("replication").get("master_link_status") == "up", "the replica follows")
        self.wait(0.0, 0.5)
        client.replicaof("127.0.0.1", 1)  # where nobody is: it hears nothing any more
        self.wait(0.1, 0.5)
        self.redis.kill()
        self.forget()
        client.replicaof("NO", "ONE")
        client.config_set("port", port)
        replica.port, replica.url = port, self.redis.url
        replica.client = redis.Redis(port=port, socket_timeout=20)
        wait_for(replica.answers, "the promoted replica answers")
        self.redis = replica


class Small(Kept):
    history = 10


class Slow(Kept):
    history = 30
    large_bytes = 150_000
    is_slow = True
    server_options = ("--max-backlog", "65536")

    def faults(self, pages: Pages) -> Faults:
        return super().faults(pages) | self.deletions()


class Strangers(World):
    """Whether honest requests are answered, and pages come back, beside strangers. Two of these keep a thread each."""

    streams, seconds, per_s = 50, 10.0, 100.0
    most = 5000  # connections at a time
    filled = 50  # events on each channel that those who leave ask for

    def torment(self, pages: Pages, publishers: Publishers) -> None:
        pages.cut_each_s = 0.1
        channels = [f"strangers-{number}" for number in range(ssepush.MAX_CHANNELS)]
        for channel in channels * self.filled:
            ssepush.publish("x" * 1000, channel=channel, redis_url=self.url(), history=self.history)
        asked = get(f"{path_of(channels)}&last={self.filled}")
        for name, come in {"say nothing": (900, b"", math.inf), "leave at once": (300, asked, 0.15)}.items():
            ended = threading.Event()
            thread = threading.Thread(target=self.come, args=(publishers.ports, *come, ended), daemon=True)
            thread.start()
            answered_ms = self.ask(publishers.ports)
            ended.set()
            thread.join()
            self.figures[f"beside those that {name}: answers"] = len(answered_ms)
            self.limit(f"beside those that {name}: ms, longest", max(answered_ms), 1000 * ANSWERED_S)

    def come(self, ports: Sequence[int], per_s: float, sent: bytes, stay_s: float, ended: threading.Event) -> None:
        """New connections at this pace, which send this, and stay so long."""
        came: list[tuple[float, socket.socket]] = []
        began_s, number = time.monotonic(), 0
        with contextlib.ExitStack() as stack:
            while not ended.wait(0.005):
                now_s = time.monotonic()
                while number < per_s * (now_s - began_s) and len(came) < self.most:
                    number += 1
                    with contextlib.suppress(OSError):
                        sock = stack.enter_context(connect(ports[number % len(ports)], ANSWERED_S))
                        sock.sendall(sent)
                        came.append((now_s + stay_s, sock))
                while came and came[0][0] < now_s:
                    came.pop(0)[1].close()

    def ask(self, ports: Sequence[int]) -> list[float]:
        """One request after the other, for half of the time; the ms until each was answered, or twice the limit."""
        taken_ms: list[float] = []
        ends_s = time.monotonic() + self.seconds / 2
        for port in itertools.cycle(ports):
            with contextlib.ExitStack() as stack:
                for keeps_a_thread in (get("/numbers"), get("/", "1.1") * 200):  # one counts, one takes no answer
                    sock = stack.enter_context(connect(port, ANSWERED_S))
                    with contextlib.suppress(OSError):
                        sock.sendall(keeps_a_thread)
                for _ in range(20):
                    began_s = time.monotonic()
                    answer = b""
                    with contextlib.suppress(OSError):
                        answer = exchange(port, get("/position"), ANSWERED_S)
                    is_answered = answer.startswith(b"HTTP/1.1 200 ")
                    taken_ms.append(1000 * (time.monotonic() - began_s) if is_answered else 2000 * ANSWERED_S)
            if time.monotonic() > ends_s:
                break
        return taken_ms

    def look_back(self, pages: Pages, publishers: Publishers) -> None:
        longest_s = max(page.longest_s for page in pages.pages)
        self.limit("ms until a page was back, longest", 1000 * longest_s, 1000 * BACK_S)


class Replays(World):
    """What large replays cost Redis. Each page has missed something else."""

    streams, seconds, per_s = 8, 5.0, 10.0
    channels = tuple(f"replays-{number}" for number in range(ssepush.MAX_CHANNELS))
    followed = (channels,)
    events, event_bytes = 20, 50_000  # on each channel
    server_options = ("--max-backlog", str(2**25))
    most_read_percent = 150.0  # of the bytes that pages are sent
    most_command_ms, most_cpu_ms = 25.0, 50.0  # of Redis, by its slow log, and for all that a page missed

    def torment(self, pages: Pages, publishers: Publishers) -> None:
        for page in pages.pages:  # one goes after the other
            page.cut = page.is_away = True
            publishers.publish(publishers.from_python, f"goes {id(page)}", self.channels[0])
            wait_for(lambda page=page: page.lost_s < math.inf, "the page is gone")  # type: ignore[misc]
        for number, channel in enumerate([*self.channels] * self.events):
            publishers.publish(publishers.from_python, f"missed {number}", channel, self.event_bytes)
        missed = len(self.channels) * self.events
        self.redis.client.config_set("slowlog-log-slower-than", 1000)
        self.redis.client.slowlog_reset()
        began_s, sent_bytes = time.monotonic(), missed * self.event_bytes * len(pages.pages)
        read, cpu_s = self.read_bytes(), self.cpu_s()
        for page in pages.pages:
            page.is_away = False
        wait_for(lambda: all(len(page.seen) > missed for page in pages.pages), "all are back", 60)
        self.figures["ms until all pages were back"] = round(1000 * (time.monotonic() - began_s))
        self.limit("percent read from Redis", 100 * (self.read_bytes() - read) / sent_bytes, self.most_read_percent)
        self.limit("Redis's ms for a page, CPU", 1000 * (self.cpu_s() - cpu_s) / len(pages.pages), self.most_cpu_ms)
        busy_ms = [1000 * (event.told_s - event.asked_s) for event in publishers.events if event.asked_s > began_s]
        self.figures["ms to publish meanwhile, longest"] = round(max(busy_ms, default=0.0))
        slow_ms = [entry["duration"] / 1000 for entry in self.redis.client.slowlog_get(1000)]
        most_ms = self.most_command_ms if self.seconds >= 5 else math.inf  # by the clock: the machine may be busy
        self.limit("Redis's ms for a command, longest", max(slow_ms, default=0.0), most_ms)

    def read_bytes(self) -> int:
        return int(self.redis.client.info("stats")["total_net_output_bytes"])

    def cpu_s(self) -> float:
        used = self.redis.client.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])


# ── Failover ─────────────────────────────────────────────────────────────────────────────────────────────────────────

INSIDE = "SSEPUSH_CHAOS_INSIDE"  # in the environment of the program that runs in namespaces of its own
NETWORK = "10.99.0"
REDIS_PORT, SENTINEL_PORT = 6379, 26379
AWAY = (RedisError, OSError)


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def client_of(address: str, port: int) -> redis.Redis:
    """It tries once, and waits for half a second."""
    waits: dict[str, Any] = {"socket_timeout": 0.5, "socket_connect_timeout": 0.5, "retry": Retry(NoBackoff(), 0)}
    return redis.Redis(address, port, decode_responses=True, **waits)


def replication_of(client: redis.Redis) -> dict[str, Any]:
    """What it says of its role; nothing if it does not answer."""
    with contextlib.suppress(*AWAY):
        said: dict[str, Any] = client.info("replication")
        return said
    return {}


class Machine:
    """A network namespace with one Redis, and perhaps a Sentinel."""

    def __init__(self, number: int, folder: Path, lines: Sequence[str]) -> None:
        """lines: of Redis's configuration."""
        self.name, self.address, self.port = f"machine{number}", f"{NETWORK}.{number + 10}", f"port{number}"
        self.folder = folder / self.name
        self.folder.mkdir()
        self.processes: list[subprocess.Popen[bytes]] = []
        ip(f"netns add {self.name}")
        ip(f"link add {self.port} type veth peer name eth0 netns {self.name}")
        ip(f"link set {self.port} master bridge up")
        ip(f"-n {self.name} link set lo up")
        ip(f"-n {self.name} address add {self.address}/24 dev eth0")
        ip(f"-n {self.name} link set eth0 up")
        self.client = client_of(self.address, REDIS_PORT)
        own = ("appendonly yes", "repl-backlog-size 16kb", "repl-diskless-sync-delay 0")
        self.configure("redis.conf", f"port {REDIS_PORT}", 'save ""', *own, *lines)
        self.start_redis()

    def configure(self, name: str, *lines: str) -> None:
        """In a file, so that Sentinels and Redis itself can put into it whom it follows."""
        (self.folder / name).write_text("\n".join([f"bind {self.address}", "protected-mode no", *lines, ""]))

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """In the machine's network; it ends with the machine."""
        with (self.folder / f"{command[0]}.log").open("ab") as log:
            inside = ["ip", "netns", "exec", self.name, *command]
            self.processes.append(subprocess.Popen(inside, cwd=self.folder, stdout=log, stderr=log))
        return self.processes[-1]

    def start_redis(self) -> None:
        self.redis = self.start("redis-server", "redis.conf")
        wait_for(lambda: replication_of(self.client), f"Redis of {self.name} answers")

    def is_master(self) -> bool:
        return replication_of(self.client).get("role") == "master"

    def is_linked(self) -> bool:
        """Whether it is a replica, and up to date."""
        return replication_of(self.client).get("master_link_status") == "up"

    def holds_keys(self) -> bool:
        """Whether it is the master of ssepush's keys."""
        with contextlib.suppress(*AWAY):
            return self.is_master() and bool(self.client.keys("*ssepush*"))
        return False

    def kill_redis(self) -> None:
        self.redis.kill()
        self.redis.wait()

    def route(self, what: str, others: Sequence[Machine]) -> None:
        """Add or delete black holes in which all ends that goes to these."""
        for other in others:
            ip(f"-n {self.name} route {what} blackhole {other.address}/32")

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.client.close()
        ip(f"link delete {self.port}")
        ip(f"netns delete {self.name}")


class Replicated(World):
    """A master, two replicas, and a Sentinel beside each."""

    streams, seconds, per_s = 50, 8.0, 100.0
    channels = ("failover-a", "failover-b")
    followed = (channels[:1], channels)
    count = 3
    least_replicas = 1  # without which a master writes nothing
    moving = ("killed", "stopped", "gone", "partition", "switchover")
    harmless = ("resync", "other")  # of them no page need be told

    def __init__(self, fault: str, *arguments: Any) -> None:
        self.fault = fault
        self.machines: list[Machine] = []
        super().__init__(*arguments)

    def redis_lines(self) -> list[str]:
        """A master whose replicas say nothing stops writing well before it is taken for dead."""
        max_lag_s = max(1, int(self.options.down_after) - 1)
        lines = ["repl-ping-replica-period 1", f"min-replicas-max-lag {max_lag_s}"]
        return [*lines, f"min-replicas-to-write {self.least_replicas}"]

    def start_redis(self) -> None:
        for number in range(self.count):
            self.machines.append(Machine(number, self.folder, self.redis_lines()))
            self.stack.callback(self.machines[-1].end)
        self.connect_nodes()

    def connect_nodes(self) -> None:
        master, *replicas = self.machines
        for replica in replicas:
            replica.client.replicaof(master.address, REDIS_PORT)
            wait_for(replica.is_linked, "the replica follows")
            replica.client.config_rewrite()
        for machine in self.machines:
            machine.configure(
                "sentinel.conf",
                f"port {SENTINEL_PORT}",
                f"sentinel monitor mymaster {master.address} {REDIS_PORT} 2",
                f"sentinel down-after-milliseconds mymaster {1000 * self.options.down_after:.0f}",
                "sentinel failover-timeout mymaster 10000",
            )
            machine.start("redis-sentinel", "sentinel.conf")
        wait_for(lambda: all(map(self._sees_all, self.machines)), "the Sentinels see all")

    def sentinel(self, machine: Machine) -> redis.Redis:
        return client_of(machine.address, SENTINEL_PORT)

    def _sees_all(self, machine: Machine) -> bool:
        with contextlib.suppress(*AWAY), self.sentinel(machine) as sentinel:
            seen = sentinel.sentinel_master("mymaster")
            return (seen["num-slaves"], seen["num-other-sentinels"]) == (2, 2)
        return False

    def url(self) -> str:
        sentinels = [f"{machine.address}:{SENTINEL_PORT}" for machine in self.machines]
        return f"redis+sentinel://{','.join(sentinels)}/mymaster/0"

    def named_master(self) -> Machine | None:
        """Whom most of the Sentinels take for it."""
        named: Counter[str] = Counter()
        for machine in self.machines:
            with contextlib.suppress(*AWAY), self.sentinel(machine) as sentinel:
                named[sentinel.sentinel_get_master_addr_by_name("mymaster")[0]] += 1
        return next((machine for machine in self.machines if named[machine.address] >= 2), None)

    def replica_of(self, master: Machine) -> Machine:
        return next(machine for machine in self.machines if machine is not master)

    def bystander(self, master: Machine) -> Machine:
        """Another node, whose loss moves nothing."""
        return self.replica_of(master)

    def switch_over(self, master: Machine) -> None:
        with self.sentinel(master) as sentinel:
            sentinel.sentinel_failover("mymaster")

    def has_moved_from(self, machine: Machine) -> bool:
        master = self.named_master()
        return master is not None and master is not machine and master.is_master()

    def torment(self, pages: Pages, publishers: Publishers) -> None:
        pages.cut_each_s = 0.1
        time.sleep(self.seconds / 4)
        self.began_s = time.monotonic()
        if self.fault not in self.harmless:
            self.forget()
        master = wait_for(self.named_master, "there is a master")
        heal = self.harm(master)
        if self.fault in self.moving:
            wait_for(lambda: self.has_moved_from(master), "another node is the master", 60)
        time.sleep(self.seconds / 2)
        heal()
        time.sleep(self.seconds)

    def harm(self, master: Machine) -> Callable[[], object]:
        """Do what the fault is called; what heals it."""
        others = [machine for machine in self.machines if machine is not master]
        match self.fault:
            case "killed":
                master.kill_redis()
                return master.start_redis
            case "stopped":
                master.redis.send_signal(signal.SIGSTOP)
                return functools.partial(master.redis.send_signal, signal.SIGCONT)
            case "gone":
                ip(f"-n {master.name} link set eth0 down")
            case "partition":
                master.route("add", others)
                return functools.partial(master.route, "delete", others)
            case "switchover":
                self.switch_over(master)
            case "resync":
                self.resynchronise(master, self.replica_of(master))
            case "other":
                bystander = self.bystander(master)
                bystander.kill_redis()
                return bystander.start_redis
        return lambda: None

    def resynchronise(self, master: Machine, replica: Machine) -> None:
        """More is written than the master keeps for a replica that comes back."""
        before = master.client.info("stats")["sync_full"]
        replica.redis.send_signal(signal.SIGSTOP)
        master.client.client_kill_filter(_type="replica")
        tag, brace, _ = str(master.client.keys("*ssepush*")[0]).partition("}")
        key = f"{tag}{brace}:failover" if brace else "failover"  # which the master of ssepush's keys holds, too
        master.client.config_set("min-replicas-to-write", 0)
        for _ in range(100):  # more than the backlog of 16 KB that each master keeps
            master.client.set(key, "x" * 1000, ex=60)
        master.client.config_set("min-replicas-to-write", self.least_replicas)
        replica.redis.send_signal(signal.SIGCONT)
        wait_for(lambda: master.client.info("stats")["sync_full"] > before, "the replica is synchronised in full")

    def look_back(self, pages: Pages, publishers: Publishers) -> None:
        """When the longest silence ended in which nothing was acknowledged, and all pages had an event from then."""
        known = {event.data: event for event in publishers.events if event.fate == "acknowledged"}
        told_s = sorted(event.told_s for event in known.values() if event.told_s > self.began_s)
        silences = [(after_s - before_s, after_s) for before_s, after_s in itertools.pairwise([self.began_s, *told_s])]
        again_s = max(silence for silence in [(1.0, self.began_s), *silences])[1]
        back_s = again_s
        for page in pages.pages:
            came_s = [seen.at_s for seen in page.seen if seen.data in known and known[seen.data].asked_s >= again_s]
            back_s = max([back_s, *came_s[:1]])
        self.figures["ms until something could be published"] = round(1000 * (again_s - self.began_s))
        self.figures["ms until all pages had an event again"] = round(1000 * (back_s - self.began_s))


class BehindProxy(Replicated):
    """The same, and haproxy, which sends everybody to the node that says that it is the master."""

    def connect_nodes(self) -> None:
        super().connect_nodes()
        self.port = free_port()
        lines = [
            *("defaults", "  mode tcp", "  timeout connect 1s", "  timeout client 1h", "  timeout server 1h"),
            *("listen redis", f"  bind 127.0.0.1:{self.port}"),
            *("  option tcp-check", r"  tcp-check send info\ replication\r\n", "  tcp-check expect string role:master"),
            "  default-server check inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions",
            *(f"  server {machine.name} {machine.address}:{REDIS_PORT}" for machine in self.machines),
        ]
        config = self.folder / "haproxy.cfg"
        config.write_text("\n".join([*lines, ""]))
        proxy = subprocess.Popen([program("haproxy"), "-db", "-q", "-f", str(config)])
        self.stack.callback(proxy.wait)
        self.stack.callback(proxy.kill)
        wait_for(self._leads_to_the_master, "haproxy has found the master")

    def _leads_to_the_master(self) -> bool:
        """At first haproxy takes every node for one, and sends connections to each in turn."""
        clients = [client_of("127.0.0.1", self.port) for _ in self.machines]
        roles = {replication_of(client).get("role") for client in clients}
        for client in clients:
            client.close()
        return roles == {"master"}

    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


class Clustered(Replicated):
    """Three masters, each with a replica. Whose only replica is lost for good would never write again if it minded."""

    count = 6
    least_replicas = 0

    def redis_lines(self) -> list[str]:
        timeout = f"cluster-node-timeout {1000 * self.options.down_after:.0f}"
        return [*super().redis_lines(), "cluster-enabled yes", timeout]

    def connect_nodes(self) -> None:
        nodes = [f"{machine.address}:{REDIS_PORT}" for machine in self.machines]
        command = [program("redis-cli"), "--cluster", "create", *nodes, "--cluster-replicas", "1", "--cluster-yes"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        wait_for(self._is_whole, "the cluster is whole")

    def _is_whole(self) -> bool:
        are_ok = all(machine.client.cluster("info")["cluster_state"] == "ok" for machine in self.machines)
        masters = sum(machine.is_master() for machine in self.machines)
        return are_ok and masters == 3 and sum(machine.is_linked() for machine in self.machines) == 3

    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"{machine.address}:{REDIS_PORT}" for machine in self.machines[:3])

    def named_master(self) -> Machine | None:
        return next((machine for machine in self.machines if machine.holds_keys()), None)

    def replica_of(self, master: Machine) -> Machine:
        hosts = {replication_of(machine.client).get("master_host"): machine for machine in self.machines}
        return hosts[master.address]

    def bystander(self, master: Machine) -> Machine:
        return next(machine for machine in self.machines if machine is not master and machine.is_master())

    def switch_over(self, master: Machine) -> None:
        self.replica_of(master).client.cluster("failover")

    def has_moved_from(self, machine: Machine) -> bool:
        """An old master that cannot be asked, or does not know yet, still has the keys."""
        return any(other.holds_keys() for other in self.machines if other is not machine)


# ── Scenarios and command line ───────────────────────────────────────────────────────────────────────────────────────

ON_ONE_MACHINE: dict[str, Callable[..., World]] = {
    name.__name__.lower(): name for name in (Kept, Forgetful, Small, Slow, Strangers, Replays)
}
WITH_FAILOVER: dict[str, Callable[..., World]] = {
    f"{kind}-{fault}": functools.partial(world, fault)
    for kind, world in {"sentinel": Replicated, "haproxy": BehindProxy, "cluster": Clustered}.items()
    for fault in (*Replicated.moving, *Replicated.harmless)
}
SCENARIOS = ON_ONE_MACHINE | WITH_FAILOVER


def settle(pages: Pages, publishers: Publishers) -> None:
    """Until every page has the last events; those that never get them are seen by the judgement."""
    limit_s = time.monotonic() + SETTLE_S
    while time.monotonic() < limit_s:
        lasts = {channel: publishers.publish_last(channel) for channel in publishers.world.channels}
        expected = {page: {lasts[channel] for channel in page.channels} for page in pages.pages}

        def have_lasts(expected: dict[Page, set[str]] = expected) -> bool:
            return all(expected[page] <= {seen.data for seen in page.seen[-50:]} for page in expected)

        with contextlib.suppress(AssertionError):  # a page was reset instead: others come after them
            wait_for(have_lasts, "every page has the last events", LAST_S)
            return


def play(name: str, options: argparse.Namespace) -> Figures:
    rngs = [random.Random(f"{options.seed} {number}") for number in range(2)]  # threads must not share one
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        world = SCENARIOS[name](Path(folder), options, stack)
        ports = [free_port() for _ in range(SERVERS)]
        for port in ports:
            world.start_server(port)
        pages = Pages(world.new_pages(), ports, rngs[0])
        stack.callback(pages.stop)
        wait_for(lambda: all(page.opened_s < math.inf for page in pages.pages), "every page is open")
        publishers = Publishers(world, ports, options.per_s or world.per_s, rngs[1])
        world.torment(pages, publishers)
        publishers.stop()
        pages.cut_each_s = 0.0
        for page in pages.pages:
            page.is_slow = False
        settle(pages, publishers)
        world.look_back(pages, publishers)
    figures = world.figures
    figures.update(f"events {event.fate}" for event in publishers.events)
    figures["events dispatched"] = sum(len(page.seen) for page in pages.pages)
    figures["streams opened again"] = sum(page.streams - 1 for page in pages.pages)
    figures["streams found silent"] = pages.silent
    figures["answers that no browser takes"] = len(pages.errors)
    figures.update(judge(pages.pages, publishers.events, world.forgettings))
    print(*(f"{what:50} {value}" for what, value in figures.items()), *pages.errors[:10], sep="\n", flush=True)
    return figures


def chosen(names: Sequence[str]) -> list[str]:
    """The scenarios that are called so, or begin so: "sentinel" is all of sentinel-killed, sentinel-stopped, …"""
    found = {word: [name for name in SCENARIOS if f"{name}-".startswith(f"{word}-")] for word in names}
    unknown = [word for word in names if not found[word]]
    if unknown:
        raise SystemExit(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    return list(itertools.chain(*found.values())) or list(ON_ONE_MACHINE)


def program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not found:
        raise SystemExit(f"chaos.py needs {name} for failovers")
    return found


def run_inside() -> int:
    """Run this program again in namespaces of its own; whatever it starts ends with it."""
    for name in ("redis-server", "redis-sentinel", "redis-cli", "haproxy", "ip"):
        program(name)
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = [program("unshare"), "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *as_root]
    environment = {**os.environ, INSIDE: "1"}
    return subprocess.run([*command, sys.executable, *sys.argv], env=environment, check=False).returncode


def make_network() -> None:
    """A bridge to which machines are attached. In a network namespace of this program's own."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    ip("link set lo up")
    ip("link add bridge type bridge")
    ip(f"address add {NETWORK}.1/24 dev bridge")
    ip("link set bridge up")


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether every page gets every event once, in order, whatever dies.")
    option = parser.add_argument
    option("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; sentinel: all of its seven")
    option("--streams", type=int, help="(200; 50 of strangers and failovers; 8 of replays)")
    option("--per-s", type=float, help="events published a second (270; 100; 10)")
    option("--seconds", type=float, help="of faults in each scenario (25; 10; 5), or of events after a failover (8)")
    option("--seed", type=int, default=random.randrange(1_000_000), help="of the faults; else any")
    option("--shared", action="store_true", help="one Redis subscriber for all streams of a process")
    option("--down-after", type=float, default=3.0, help="s until a master is taken for dead (3)")
    options = parser.parse_args()
    names = chosen(options.scenarios)
    if not ON_ONE_MACHINE.keys() >= set(names):
        if INSIDE not in os.environ:
            return run_inside()
        make_network()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"seed {options.seed}", flush=True)
    failed = 0
    for name in names:
        print(f"\n{name}{' --shared' if options.shared else ''}", flush=True)
        try:
            figures = play(name, options)
            failed += sum(figures[what] for what in FAILURES)
        except (AssertionError, subprocess.SubprocessError) as error:
            print(f"FAILED: {error}", flush=True)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
