"""Floods, leaks and chaos: whatever is thrown at a server, it goes on, and keeps nothing of it."""

from __future__ import annotations

import contextlib
import random
import re
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import ssepush
from tests import kit
from tests.kit import RedisProcess, ServerProcess, Start, both_ways, request, wait_for

IDLE_THREADS = 7  # main, accept, relay, watch, log, and two that are free for the next requests
MOST_WAITING = 1000  # connections that are not streams; each has a thread, which is then kept for the next one

# ── Slow and gone ────────────────────────────────────────────────────────────────────────────────────────────────────


HEARTBEAT_S = 0.5
STALL_S = 2 * HEARTBEAT_S
CLIENT = """
import socket, sys, time
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
sock.sendall(f"GET /stream?channel={sys.argv[3]} HTTP/1.1\\r\\nHost: {sys.argv[1]}\\r\\n\\r\\n".encode())
print(sock.recv(1), flush=True)
while True:
    time.sleep(1.0)
    sock.recv(int(sys.argv[4]))
"""


class Bad:
    """A stream that does not read as it should; what it has opened ends with the test."""

    def __init__(self, server: ServerProcess, channel: str, stack: contextlib.ExitStack) -> None:
        self.server, self.channel, self.stack = server, channel, stack

    def reads(self, size: int, host: str = kit.LOOPBACK, wrapper: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """A process that reads so many bytes a second."""
        arguments = (host, str(self.server.port), self.channel, str(size))
        process = self.stack.enter_context(kit.running(*wrapper, sys.executable, "-c", CLIENT, *arguments))
        assert process.stdout
        assert process.stdout.readline() == b"b'H'\n"
        wait_for(lambda: self.server.streams() == 4, "the fourth stream")
        return process

    def is_stopped(self) -> None:
        self.stack.enter_context(kit.stopped(self.reads(65536)))

    def vanishes(self) -> None:
        number = random.SystemRandom().randrange(2**14)
        namespace, outside, inside = (f"ssepush{number}{end}" for end in "nab")
        network = f"10.231.{number // 64}"
        ours, theirs = (f"{network}.{number % 64 * 4 + host}" for host in (1, 2))

        def ip(command: str) -> None:
            subprocess.run([kit.needs("ip"), *command.split()], check=True, capture_output=True)

        try:
            ip(f"netns add {namespace}")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs root and network namespaces: {error}")
        self.stack.callback(ip, f"netns del {namespace}")
        ip(f"link add {outside} type veth peer name {inside} netns {namespace}")
        ip(f"addr add {ours}/30 dev {outside}")
        ip(f"link set {outside} up")
        ip(f"-n {namespace} addr add {theirs}/30 dev {inside}")
        ip(f"-n {namespace} link set {inside} up")
        self.stack.callback(ip, f"link del {outside}")  # a namespace takes its links down later, if left to itself
        self.reads(65536, ours, ["ip", "netns", "exec", namespace])
        ip(f"-n {namespace} route add blackhole {ours}/32")  # whatever it sends is dropped


BADS: dict[str, tuple[Callable[[Bad], object], int, float]] = {  # events of 20 KB, within how many seconds it ends
    "reads nothing": (lambda bad: bad.reads(0), 30, STALL_S),
    "reads 1 byte/s": (lambda bad: bad.reads(1), 30, STALL_S),
    "is stopped": (Bad.is_stopped, 30, STALL_S),
    "vanishes": (Bad.vanishes, 30, STALL_S),
    "vanishes while nothing is published": (Bad.vanishes, 0, HEARTBEAT_S + STALL_S),
}


@both_ways
@pytest.mark.parametrize("case", BADS)
def test_who_stalls_or_is_gone_is_cut_in_time(own_redis: RedisProcess, start: Start, channel: str, case: str) -> None:
    bad, number, bound_s = BADS[case]
    server = start("--host", "0.0.0.0", "--heartbeat", str(HEARTBEAT_S), redis=own_redis)
    pages = [kit.Page(server.port, channel) for _ in range(3)]
    wait_for(lambda: all(page.last_event_id for page in pages), "all pages have a position")

    with contextlib.ExitStack() as stack:
        bad(Bad(server, channel, stack))
        for event in range(number):
            ssepush.publish(f"{event} {'x' * 20_000}", channel=channel, redis_url=own_redis.url)
        wait_for(lambda: server.streams() == 3, "the bad stream is gone", seconds=bound_s + 1.5)
    ssepush.publish("last", channel=channel, redis_url=own_redis.url)
    for page in pages:
        page.wait_for("last")

        assert kit.first_words(page.events) == [*kit.numbers(0, number), "last"]
        assert page.streams == 1


def unread(server: ServerProcess, channel: str, position: str = "") -> socket.socket:
    """A browser that has asked for a stream, from that position, and reads nothing; its kernel takes little."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((kit.LOOPBACK, server.port))
    begin = f"&lastEventId={position}" if position else ""
    sock.sendall(request(f"GET /stream?channel={channel}{begin} HTTP/1.1".encode()))
    return sock


# ── Many ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_a_thousand_streams_get_every_message_without_a_thread(start: Start, channel: str, many_files: None) -> None:
    server = start()

    streams = [server.stream(channel) for _ in range(1000)]

    wait_for(lambda: server.threads() <= IDLE_THREADS, "no thread stays with a stream")
    for number in range(20):
        assert server.redis.publish(channel, f'{{"data": {number}}}') == server.subscribers_for(1000)
    for stream in streams:
        assert stream.data(20) == kit.numbers(0, 20)
    assert server.threads() <= IDLE_THREADS
    assert server.streams() == 1000
    for stream in streams:
        stream.close()
    wait_for(lambda: server.redis.subscribers(channel) == 0, "all subscribers are gone")


# ── Leaks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fill_pool(server: ServerProcess, redis: RedisProcess) -> None:
    """Make the server open all the connections that its pool may have, by asking for more while Redis is stopped."""
    wait_for(lambda: server.connections() == 0, "all is closed")
    idle = server.descriptors()
    pooled = len(redis.client.client_list()) - 1  # without the tests' own
    publishers = [threading.Thread(target=server.publish, args=("", "pool")) for _ in range(40)]
    with kit.stopped(redis.process):
        for publisher in publishers:
            publisher.start()
        in_use = idle + 40 + kit.POOL - pooled
        wait_for(lambda: server.descriptors() >= in_use, "all its connections to Redis are in use")
    for publisher in publishers:
        publisher.join()


def mixed_wave(server: ServerProcess, channel: str) -> None:
    """Streams of every kind, to their end."""
    streams = [server.opened(channel, f"{channel}-{number % 7}") for number in range(80)]
    for number in range(100):
        server.publish(f"{number} {'x' * 500}", channel)
    streams[0].take(100)
    position = streams[0].parser.last_event_id
    for stream in streams[:20]:
        stream.close()
    for stream in streams[20:40]:
        kit.close_with_reset(stream.sock)
    for stream in streams[40:50]:
        stream.sock.shutdown(socket.SHUT_WR)
    streams += [server.opened(channel, Last_Event_ID=event_id) for event_id in (position, "foreign") * 10]
    for path in ("/nothing", "/stream?channel=", "/healthz", "/", "/metrics") * 4:
        server.get(path)
    for sent in (b"GET /str", b"\r\n\r\n", b"POST /publish HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"):
        with kit.connect(server.port) as sock:
            sock.sendall(sent)
    for number in range(130):  # more than the kernel takes for those who do not read
        server.publish(f"{number} {'x' * 12_000}", channel)
    wait_for(lambda: server.streams() < 20, "the stalled streams are cut")
    for stream in streams[40:]:
        stream.close()


@both_ways
def test_after_each_of_two_mixed_loads_everything_is_given_back(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--heartbeat", "0.5", "--history", "50", redis=own_redis)
    server.opened(channel).close()
    wait_for(lambda: server.closed("gone"), "the stream is closed")
    fill_pool(server, own_redis)

    def held() -> dict[str, float]:
        streams = server.streams()
        wait_for(lambda: server.connections() == 0, "all is closed")
        clients = len(own_redis.client.client_list())
        return {"streams": streams, "descriptors": server.descriptors(), "Redis clients": clients}

    baseline, resident = held(), []
    for _ in range(2):
        for _ in range(3):  # so that caches and the allocator have what they need
            mixed_wave(server, channel)
        wait_for(lambda: held() == baseline, f"back to {baseline}")
        resident.append(server.kernel.memory_info().rss)

    assert resident[1] <= 1.05 * resident[0]
    assert server.threads() <= IDLE_THREADS + 50  # 40 were busy at once, when the pool was filled


ALIKE = 40  # streams: more than a server keeps connections to Redis, so that one left behind by each shows


@contextlib.contextmanager
def browsers_that_are(state: str, server: ServerProcess, channel: str) -> Iterator[list[socket.socket]]:
    """Browsers, all of whose streams are in one state.

    opening: Redis does not answer the subscription. resuming: the browser does not take what it missed.
    behind: it does not take live events. live: it has taken all, also what it missed.
    """
    with contextlib.ExitStack() as stack:
        position = ""
        if state == "opening":
            server.opened(channel).close()  # a shared subscriber is connected from now on
            wait_for(lambda: server.streams() == 0, "it is closed")
            stack.enter_context(kit.stopped(server.redis.process))
        if state in ("resuming", "live"):
            position = server.publish_id("first", channel)
            for _ in range(10):
                server.publish("x" * (100_000 if state == "resuming" else 500), channel)
        opened = server.metric("streams_opened_total")
        if state == "live":
            browsers = [server.opened(channel, Last_Event_ID=position).sock for _ in range(ALIKE)]
        else:
            browsers = [unread(server, channel, position) for _ in range(ALIKE)]
        if state == "opening":
            wait_for(lambda: server.streams() == ALIKE, "all are opening")
        else:
            wait_for(lambda: server.metric("streams_opened_total") == opened + ALIKE, "all are open")
        for _ in range(10 if state == "behind" else 0):
            server.redis.publish(channel, "x" * 50_000)
        if state in ("resuming", "behind"):
            wait_for(lambda: server.metric("backlog_bytes") > ALIKE * 100_000, "all are behind")
        yield browsers


in_each_state = pytest.mark.parametrize("state", ["opening", "resuming", "behind", "live"])


LEAVE = [socket.socket.close, kit.close_with_reset, lambda sock: sock.shutdown(socket.SHUT_WR)]
ENDS: list[Callable[[socket.socket], object] | None] = [*LEAVE * 3, None]  # None: Redis dies


@both_ways
@in_each_state
def test_streams_that_end_leave_nothing_behind(own_redis: RedisProcess, start: Start, channel: str, state: str) -> None:
    # A browser that takes nothing is given up after two heartbeats, also when Redis is gone.
    server = start("--max-streams", str(ALIKE), "--heartbeat", "1", redis=own_redis)
    server.get("/healthz")
    idle, resident = server.descriptors(), []

    for end in ENDS:
        with browsers_that_are(state, server, channel) as browsers:  # the places of those before are free
            if end:
                for sock in browsers:
                    end(sock)
            else:
                own_redis.kill()
                own_redis.start()
            wait_for(lambda: server.streams() == 0, "all streams are gone")
        for sock in browsers:
            sock.close()
        subscribers = server.subscribers_for(ALIKE) if server.is_shared else 0
        wait_for(lambda: server.metric("subscribers") <= subscribers, "their subscribers are gone")  # noqa: B023
        wait_for(lambda: server.descriptors() <= idle + kit.POOL, "their descriptors are gone")
        wait_for(lambda: len(own_redis.client.client_list()) <= kit.POOL + 2, "nor a connection to Redis")
        assert server.threads() <= IDLE_THREADS + ALIKE
        assert server.metric("backlog_bytes") == 0
        resident.append(server.kernel.memory_info().rss)

    most = 0.05 * resident[0]
    if state in ("resuming", "behind"):  # the allocator may keep what one round needs; all ten need 200 MB and more
        most = 2 * ALIKE * 1_000_000
    assert min(resident[-4:]) <= max(resident[:3]) + most


@both_ways
@pytest.mark.parametrize("leave", LEAVE, ids=["closed", "reset", "half-closed"])
def test_who_leaves_while_much_waits_for_them_is_noticed_at_once(
    start: Start, channel: str, leave: Callable[[socket.socket], object]
) -> None:
    server = start("--heartbeat", "60")  # who takes nothing is given up only after two

    with browsers_that_are("behind", server, channel) as browsers:
        for sock in browsers:
            leave(sock)
        wait_for(lambda: server.closed("gone") == ALIKE, "all are noticed")
    for sock in browsers:
        sock.close()


@both_ways
@in_each_state
def test_a_drain_ends_streams_in_any_state(own_redis: RedisProcess, start: Start, channel: str, state: str) -> None:
    server = start("--drain", "1", redis=own_redis)

    with browsers_that_are(state, server, channel) as browsers:
        assert server.terminate() == 0

        ends = re.findall(r"stream \d+ (?:closed|refused) after [0-9.]+ s: drain", server.output)
        assert len(ends) == ALIKE
    wait_for(lambda: len(own_redis.client.client_list()) == 1, "Redis has no client but ours")
    for sock in browsers:
        sock.close()


def test_large_events_do_not_stay_in_memory(start: Start, channel: str) -> None:
    server = start()
    with server.opened(channel) as stream:
        before = server.kernel.memory_info().rss

        for number in range(150):
            ssepush.publish(f"{number} {'x' * 900_000}", channel=channel, redis_url=server.redis.url, history=1)
            assert stream.next().data.startswith(f"{number} ")

        assert server.kernel.memory_info().rss - before < 80_000_000


# ── Floods ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side has closed the connection without a word."""
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


class Baseline:
    """A server's threads and descriptors before an attack, while one stream is open; and whether it still works."""

    def __init__(self, server: ServerProcess, channel: str) -> None:
        self.server = server
        self.channel = channel
        self.stream = server.stream(channel)
        self.publish("before")
        wait_for(lambda: server.threads() <= IDLE_THREADS, "only its own threads run")
        self.threads = server.threads()
        self.descriptors = server.descriptors()

    def publish(self, data: str, seconds: float = 5.0) -> None:
        """Publish over HTTP, and receive it on the stream."""
        deadline = time.monotonic() + seconds
        self.server.publish(data, self.channel)
        assert self.stream.next(seconds).data == data
        assert time.monotonic() < deadline

    def newcomer(self, seconds: float = 5.0) -> None:
        """Open another stream, which gets an event too."""
        deadline = time.monotonic() + seconds
        with self.server.stream(self.channel) as stream:
            self.publish("newcomer", seconds)
            assert stream.next(seconds).data == "newcomer"
        assert time.monotonic() < deadline

    def end(self, seconds: float = kit.DEADLINE_S) -> None:
        """The attack is over: nothing of it is left, and the stream was never interrupted."""
        server, most = self.server, self.descriptors + kit.POOL  # connections to Redis are kept
        wait_for(lambda: server.connections() == 1, "all connections but the stream's are closed", seconds)
        wait_for(lambda: server.descriptors() <= most, f"descriptors are back to {most}", seconds)
        assert server.threads() <= self.threads + MOST_WAITING
        self.publish("after")
        assert self.server.streams() == 1
        self.stream.close()


def cpu_s(server: ServerProcess) -> float:
    """The CPU time that it has used."""
    used = server.kernel.cpu_times()
    return float(used.user + used.system)


HEAD, BODY = b"GET /stream?channel=", kit.post(b"Content-Length: 1000", body=b"{")
FEW_FILES = "--max-streams 20"  # for a server that may have few
POSITION = request(b"GET /position HTTP/1.1")
PIPELINE = request(b"GET / HTTP/1.1") * 200
CHANNELS = [b"&".join(b"channel=%d-%d" % (number, n) for n in range(20)) for number in range(300)]
FLOODS: dict[str, tuple[dict[bytes, int], bytes, str]] = {
    # how many connections begin with these bytes; what each sends every second from then on; the server's options
    "say nothing": ({b"": 5000}, b"", ""),
    "send slowly": ({HEAD: 1000, BODY: 200}, b"a", ""),
    "break off": ({b"GET /str": 100, b"\r\n\r\n": 100, request(b"GET /nothing HTTP/1.1"): 100}, b"", ""),
    "count": ({request(b"GET /numbers HTTP/1.1"): MOST_WAITING + 100}, b"", ""),
    "take no answer": ({PIPELINE: 200}, b"", FEW_FILES),
    "ask for 6,000 channels": ({request(b"GET /stream?%b HTTP/1.1" % query): 1 for query in CHANNELS}, b"", "--shared"),
}


@contextlib.contextmanager
def meanwhile(act: Callable[[], object], pause_s: float) -> Iterator[None]:
    """A thread does it again and again."""
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(pause_s):
            act()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that are started from now on may have 400 open files, a hundred of them for pending connections."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -n 400 && exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.mark.alone
@pytest.mark.parametrize("flood", FLOODS)
def test_more_connections_than_may_wait_hold_no_more_than_their_places_and_the_oldest_go_when_they(
    flood: str, request: pytest.FixtureRequest, start: Start, channel: str, many_files: None
) -> None:
    begin, trickle, options = FLOODS[flood]
    if options == FEW_FILES:
        request.getfixturevalue("few_files")
    server = start(*options.split())
    most = 105 if options == FEW_FILES else MOST_WAITING + 2
    baseline = Baseline(server, channel)

    with contextlib.ExitStack() as stack:
        socks: list[socket.socket] = []
        for sent, many in begin.items():
            socks += stack.enter_context(kit.connections(server.port, many, sent))

        def send_more() -> None:
            for sock in socks if trickle else []:
                with contextlib.suppress(OSError):
                    sock.send(trickle)

        stack.enter_context(meanwhile(send_more, 1.0))
        late = stack.enter_context(kit.connect(server.port))
        baseline.newcomer()
        late.sendall(POSITION)
        assert late.recv(12) == b"HTTP/1.1 200"  # though it has been silent
        if "channels" in flood:
            wait_for(lambda: server.streams() == 301, "all of them are open")
        else:
            wait_for(lambda: server.connections() <= most, "the oldest have made room")
        baseline.publish("meanwhile")
        assert flood not in ("say nothing", "send slowly") or is_closed(socks[0])
        assert server.threads() <= IDLE_THREADS + MOST_WAITING

    baseline.end()


MOST_OF_A_FLOOD = 5000  # as many as this process may have files


@contextlib.contextmanager
def flood(port: int, per_s: int) -> Iterator[list[socket.socket]]:
    """So many new connections a second, which say nothing; those that have come so far."""
    began = time.monotonic()
    came: list[socket.socket] = []

    def come() -> None:
        while len(came) < min(per_s * (time.monotonic() - began), MOST_OF_A_FLOOD):
            came.append(kit.connect(port))

    with meanwhile(come, 0.005):
        yield came
    for sock in came:
        sock.close()


@pytest.mark.alone
def test_a_stream_that_is_read_slowly_is_not_cut_by_a_flood_of_those_who_say_nothing(
    own_redis: RedisProcess, start: Start, channel: str, few_files: None, many_files: None
) -> None:
    server = start("--max-streams", "20", redis=own_redis)
    position = server.publish_id("first", channel)
    for number in range(50):
        server.publish(f"{number} {'x' * 20_000}", channel)
    reader = server.stream(channel, Last_Event_ID=position)
    reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_000)

    with reader, flood(server.port, 400) as idle:
        while len(idle) < 1000:
            time.sleep(0.1)
            if len(reader.events) < 50:
                reader.read()  # 300 KB in a second
        events = reader.take(50)

    assert kit.first_words(events) == kit.numbers(0, 50)


@pytest.mark.alone
def test_without_a_free_descriptor_the_accept_loop_does_not_spin(start: Start, channel: str) -> None:
    server = start("--heartbeat", "0.5")
    baseline = Baseline(server, channel)
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (baseline.descriptors, limits[1]))
    positions, used = len(baseline.stream.positions), cpu_s(server)

    with kit.connections(server.port, 20):
        baseline.stream.wait(lambda: len(baseline.stream.positions) >= positions + 4, "the stream goes on for 2 s")

        assert cpu_s(server) - used < 0.5
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)
        baseline.publish("meanwhile")

    baseline.end()


@pytest.mark.alone
@both_ways
@pytest.mark.parametrize("number", [1, 100])
def test_a_redis_that_hangs_holds_up_nobody_else(own_redis: RedisProcess, start: Start, number: int) -> None:
    own_redis.client.config_set("requirepass", "secret")  # so that each new connection waits for an answer
    server = start(redis=own_redis.url_of("default", "secret"))
    assert server.get("/healthz").status == 200
    descriptors = server.descriptors()
    streams = kit.connections(server.port, number, request(b"GET /stream HTTP/1.1"))
    healths = kit.connections(server.port, 3 * number, request(b"GET /healthz HTTP/1.1", b"Connection: close"))

    with kit.stopped(own_redis.process), streams as waiting:
        for path in ("/metrics", "/"):
            began = time.monotonic()
            assert server.get(path).status == 200
            assert time.monotonic() < began + 1.0
        answered, _, _ = select.select(waiting, [], [], 0)
        assert len(answered) <= 1  # the first, by which it was found out that Redis hangs
        with healths:
            wait_for(lambda: server.get("/metrics").status == 200, "the others are served", 2.0)
            wait_for(lambda: server.connections() == 0, "they have been told that Redis is away")

    wait_for(lambda: server.get("/healthz").status == 200, "Redis is back")
    wait_for(lambda: server.descriptors() <= descriptors + kit.POOL, "nothing is left")


PIPELINES = """
import contextlib, socket, sys
port, number = map(int, sys.argv[1:])
requests = b"HEAD / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n" * 100
socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(number)]
print("all are there", flush=True)
while True:
    for sock in socks:
        for act, given in ((sock.send, requests), (sock.recv, 65536)):
            with contextlib.suppress(OSError):
                act(given, socket.MSG_DONTWAIT)
"""


@pytest.mark.alone
@both_ways
def test_pages_open_beside_nine_hundred_who_send_requests(start: Start, channel: str, many_files: None) -> None:
    server = start()
    command = [sys.executable, "-c", PIPELINES, str(server.port), "900"]

    with kit.running(*command) as pipelines:
        assert pipelines.stdout
        assert pipelines.stdout.readline() == b"all are there\n"
        for number in range(5):
            began = time.monotonic()
            with server.opened(channel) as stream:
                ssepush.publish(number, channel=channel, redis_url=server.redis.url)
                assert stream.next().data == str(number)
            assert time.monotonic() < began + 5.0


ALL_UNSENT = 256 * 2**20  # bytes: what streams may have unsent all together
MISSED = 1_040_000  # bytes of one event, which is kept
IN_KERNEL = 240_000  # bytes that it takes, at most, for a browser that reads nothing


@pytest.mark.alone
@both_ways
@pytest.mark.parametrize("size", [1, MISSED], ids=["little", "as much as they"])
def test_a_page_comes_back_beside_those_that_do_not_take_what_they_missed_having_missed(
    own_redis: RedisProcess, start: Start, channel: str, many_files: None, size: int
) -> None:
    number = ALL_UNSENT // (MISSED - IN_KERNEL) + 5
    slow, own = f"{channel}-slow", f"{channel}-own"
    server = start(redis=own_redis)
    positions = [server.publish_id("elsewhere", channel) for _ in range(number)]  # so nobody has missed the same
    server.publish("x" * MISSED, slow)
    server.publish("y" * size, own)

    def are_answered() -> bool:
        return server.metric("streams_opened_total") + server.refused("busy") == number

    with contextlib.ExitStack() as stack:
        for position in positions:
            stack.enter_context(unread(server, slow, position))
        wait_for(are_answered, "all have been answered")
        page = kit.Page(server.port, own, told=positions[-1])
        wait_for(lambda: page.events, "it gets what it missed")
        server.publish("last", own)
        page.wait_for("last")

    assert page.data() == ["y" * size, "last"]
    assert page.streams == 1
