"""Measures ssepush, its release 1.1 and its peers side by side, in turn, in one run.

    python bench/bench.py --save                                  everything; replaces results.json and what shows it
    python bench/bench.py --only open --rounds 2 --seconds 0.5    one case, in a minute; --save replaces its line
    python bench/bench.py --only deliver --streams 500 --peers ssepush,1.1

Each step starts a Redis and one server, lets load generators (load.c, compiled on the spot) open streams and publish,
and ends them all. Rounds interleave the servers (A B C, A B C), because machines have moods, and every ratio is taken
within a round; what is printed is the median over rounds. A peer that is not installed is left out. The Python peers
are looked for in the environment of the Python that runs this (`pip install -r bench/requirements.txt`), the others on
PATH; 1.1 comes from git. No package of PyPI, npm or Debian holds the servers of Mercure and Centrifugo.

| case | what is measured |
| --- | --- |
| deliver | deliveries with so many streams open, one message at a time, and ten outstanding |
| open, idle | opening 5,000 streams; CPU time of 5,000 idle streams, in the first round |
| return | 9,000 pages return at once after a restart, and have missed events; meanwhile 100 watch another channel |
| busy | latency of 100 events/s on 1,000 streams: quiet; beside 100 opened/s and 500 posts/s, here or elsewhere |
| large | 18,000 streams: memory, how their heartbeats delay the events of 100 others, CPU per delivery against 500 |
| post | POST /publish over kept-alive connections |

A delivery is one message received on one stream. CPU is that of a server's processes, and Redis's. Memory is what a
server's processes hold with the streams open, less what they held before, per stream. Latency is from just before a
message is published to when a stream has read it. results.json has a line for each case, with a list of figures for
each server. --save draws results.png and writes the tables of docs/performance.md from it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import platform
import pwd
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from string import Template
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped, unused-ignore]

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.kit import RedisProcess, exchange, free_port, listens, redis_binary

HERE = Path(__file__).resolve().parent
RESULTS, CHART, PERFORMANCE = HERE / "results.json", HERE / "results.png", HERE.parent / "docs" / "performance.md"
RELEASE = "79e30d1"  # the commit of 1.1, which is run beside the file as it is
DETAIL_STREAMS = 500  # where large messages, the Unix socket and two processes are measured
MAX_STREAMS = 20_000
POST_CONNECTIONS = 16
WARM_UP_S = 0.3
SMALL_BYTES, LARGE_BYTES = 64, 4096
MISSED_MESSAGES = 20  # by each page that returns
HEARTBEAT_S = 4  # of the case "large": some of them fit into a short measurement
LATENCIES = ("p50_ms", "p99_ms", "p999_ms", "max_ms")
Values = dict[str, float]
Command = list[str]


class StepError(Exception):
    """One measurement failed; the run goes on."""


@contextlib.contextmanager
def running(command: Command, folder: Path, is_ready: Callable[[str], bool], redis_url: str) -> Iterator[Any]:
    """A program until the `with` block ends; then it and its children are gone. is_ready is told what it has printed.

    It has a session of its own: Ctrl-C is for this program, which then ends the others.
    """
    log = folder / f"{time.monotonic_ns()}.log"
    environment = os.environ | {"REDIS_URL": redis_url, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with log.open("wb") as output:
        how: dict[str, Any] = {"stdout": output, "stderr": output, "cwd": folder, "env": environment}
        process = psutil.Popen(command, start_new_session=True, **how)
    try:
        limit_s = time.monotonic() + 20
        while not is_ready(log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > limit_s:
                raise StepError(f"{command[0]} did not start: {log.read_text(errors='replace')[-200:]}")
            time.sleep(0.02)
        yield process
    finally:
        family = family_of([process])
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=4)
        for each in alive:
            each.kill()


def family_of(processes: Iterable[Any]) -> list[Any]:
    """These that still run, and their descendants."""
    return [each for process in processes if process.is_running() for each in (process, *process.children(True))]


def cpu_s(processes: Iterable[Any]) -> float:
    times = [each.cpu_times() for each in family_of(processes)]
    return float(sum(each.user + each.system for each in times))


def rss_bytes(processes: Iterable[Any]) -> int:
    return sum(each.memory_info().rss for each in family_of(processes))


def found(program: str) -> str:
    """Its path, "" if it is not installed."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""


class BenchRedis(RedisProcess):
    """Redis if it is installed, else the tests' own Valkey; with room for all streams."""

    def command(self) -> Command:
        return [found("redis-server") or redis_binary(), *super().command()[1:], "--maxclients", str(MAX_STREAMS)]


# ── Servers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Place(NamedTuple):
    """Where a server runs in a step, and what for."""

    port: int
    streams: int
    redis: RedisProcess
    folder: Path
    tools: Path  # where the load generator and 1.1 are

    def values(self) -> dict[str, object]:
        """What stands in curly brackets in a peer's command, and after a dollar sign in the files of peers/."""
        values = {**self._asdict(), "python": sys.executable, "here": HERE, "own": HERE.parent, "nginx": found("nginx")}
        values |= {"url": self.redis.url, "unix_url": f"unix://{self.redis.socket_path}?db=0"}
        values |= {"load_module": nchan_module(), "user": pwd.getpwuid(os.geteuid()).pw_name}
        values |= {"redis_port": self.redis.port, "threads": self.streams + 2 * POST_CONNECTIONS}
        for name in ("nginx.conf", "webdis.json"):
            filled_in = Template((HERE / "peers" / name).read_text()).substitute(values)
            (self.folder / name).write_text(filled_in)
        return values


def released(name: str) -> bytes:
    """A file of 1.1; nothing in a shallow clone, or a copy without git."""
    return subprocess.run(["git", "-C", HERE, "show", f"{RELEASE}:{name}"], capture_output=True, check=False).stdout


@functools.cache
def nchan_module() -> str | None:
    """The line that loads it, "" if it is built in, None if there is none."""
    built = subprocess.run([found("nginx") or "false", "-V"], capture_output=True, text=True, check=False).stderr
    modules = re.search(r"--modules-path=(\S+)", built)
    path = Path(modules[1] if modules else "") / "ngx_nchan_module.so"
    return f"load_module {path};" if path.exists() else "" if "nchan" in built else None


class Peer(NamedTuple):
    """A server to measure."""

    name: str
    label: str
    command: str
    cases: str = "deliver"
    needs: str = "redis"  # programs and Python packages
    processes: int = 1
    path: str = "/stream"
    publisher: str = "redis"
    most_streams: int = MAX_STREAMS
    is_detail: bool = False  # measured with DETAIL_STREAMS only
    is_slow: bool = False  # takes minutes with thousands of streams: those in the first round only

    @property
    def is_ssepush(self) -> bool:
        return self.name.startswith(("ssepush", "1.1"))

    def missing(self) -> str:
        """What would have to be installed, or ""."""
        for name in self.needs.split():
            if not found(name) and importlib.util.find_spec(name) is None:
                return f"no {name}"
        if self.name == "nchan" and nchan_module() is None:
            return "no nchan in nginx"
        return f"no commit {RELEASE} in git" if self.name.startswith("1.1") and not released("ssepush.py") else ""

    @contextlib.contextmanager
    def running(self, place: Place, *options: str) -> Iterator[list[Any]]:
        """Its processes; options are for ssepush, beyond those that make the peer."""

        def is_ready(said: str) -> bool:
            if self.is_ssepush:
                return f"http://127.0.0.1:{place.port}/" in said  # another one may answer on its port
            is_floor = self.publisher == "raw"
            return listens(place.port) and (is_floor or bool(exchange(place.port, b"GET / HTTP/1.0\r\n\r\n")))

        values = place.values()
        command = [*(word.format(**values) for word in self.command.split()), *options]
        with contextlib.ExitStack() as stack:
            started = (running(command, place.folder, is_ready, place.redis.url) for _ in range(self.processes))
            yield [stack.enter_context(each) for each in started]


STREAMING, OWN_CASES = "deliver open idle", "deliver open idle return busy post"
OWN, OLD = ("{python} " + f"{{{folder}}}/ssepush.py --port {{port}} --redis-url " for folder in ("own", "tools"))
GUNICORN = (
    "{python} -m gunicorn flask_sse_app:app --chdir {here}/peers --workers 1 --worker-connections 20000 --backlog 4096 "
    "--timeout 0 --graceful-timeout 1 --no-control-socket --worker-tmp-dir {folder} --bind 127.0.0.1:{port} "
)
UVICORN = (
    "{python} -m uvicorn sse_starlette_app:app --app-dir {here}/peers --port {port} --backlog 4096 --loop uvloop "
    "--no-access-log --timeout-graceful-shutdown 1"
)
GEVENT, GTHREAD = GUNICORN + "--worker-class gevent", GUNICORN + "--worker-class gthread --threads {threads}"
NGINX = "{nginx} -c {folder}/nginx.conf -p {folder}"
TWO: dict[str, Any] = {"processes": 2, "is_detail": True}
THREADED: dict[str, Any] = {"most_streams": 2000, "is_slow": True}
STARLETTE, FLASK = "starlette sse_starlette uvicorn uvloop", "flask flask_sse gunicorn"
PEERS = (
    Peer("ssepush", "ssepush", OWN + "{url}", OWN_CASES),
    Peer("1.1", "ssepush 1.1", OLD + "{url}", OWN_CASES),
    Peer("ssepush-shared", "ssepush --shared", OWN + "{url} --shared", f"{OWN_CASES} large"),
    Peer("1.1-shared", "ssepush 1.1 --shared", OLD + "{url} --shared", OWN_CASES),
    Peer("ssepush-unix", "ssepush, Redis over a Unix socket", OWN + "{unix_url}", is_detail=True),
    Peer("ssepush-2", "ssepush, 2 processes", OWN + "{url} --reuse-port", **TWO),
    Peer("ssepush-shared-2", "ssepush --shared, 2 processes", OWN + "{url} --shared --reuse-port", **TWO),
    Peer("nchan", "nchan in nginx", NGINX, f"{STREAMING} busy", "nginx", publisher="nchan"),
    Peer("webdis", "webdis", "webdis {folder}/webdis.json", STREAMING, "webdis", path="/SUBSCRIBE/sse"),
    Peer("sse-starlette", "sse-starlette, uvicorn, uvloop", UVICORN, STREAMING, STARLETTE, is_slow=True),
    Peer("flask-sse-gevent", "flask-sse, gunicorn gevent", GEVENT, needs=f"{FLASK} gevent", is_slow=True),
    Peer("flask-sse-gthread", "flask-sse, gunicorn gthread", GTHREAD, "deliver post", FLASK, **THREADED),
    Peer("floor", "the kernel's floor: send() in C", "{tools}/load floor {port}", needs="cc", publisher="raw"),
)
LABELS = {peer.name: peer.label for peer in PEERS}
RELEASED = {"ssepush": "1.1", "ssepush-shared": "1.1-shared"}  # to which the ratio is told
QUICK_PEERS = ["ssepush", "ssepush-shared", "flask-sse-gthread"]


class Load(contextlib.ExitStack):
    """A load generator, which ends with the `with` block; it also ends by itself when it takes too long."""

    def __init__(self, program: Path, *arguments: object) -> None:
        super().__init__()
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._popen = subprocess.Popen([str(program), *map(str, arguments)], text=True, start_new_session=True, **pipes)
        self.callback(self._popen.communicate)
        self.callback(self._popen.kill)

    def answer(self) -> Values:
        """The next line."""
        assert self._popen.stdout
        line = self._popen.stdout.readline()
        if not line.startswith("{"):
            raise StepError(line.strip() or "the load generator gave up")
        values: Values = json.loads(line)
        return values | {"lost": values["missing"] + values["failed"]}

    def tell(self, command: str) -> None:
        assert self._popen.stdin
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(f"{command}\n")
            self._popen.stdin.flush()

    def obey(self, command: str) -> Values:
        self.tell(command)
        return self.answer()


class Askers:
    """Threads that ask at a pace together, or (0) as fast as they can; each on a connection of its own."""

    def __init__(self, port: int, request: bytes, end: bytes, per_s: float, seconds: float, opens: bool) -> None:
        """end: of an answer's head, or of its body. opens: a new connection for each request, which then stays open."""
        self.port, self.request, self.end, self.seconds, self.opens = port, request, end, seconds, opens
        self.ends_s = time.monotonic() + seconds
        self.pause_s = POST_CONNECTIONS / per_s if per_s else 0.0
        self.taken_ms: list[float] = []
        self.failed = 0
        self.socks: list[socket.socket] = []
        self.threads = [threading.Thread(target=self._ask) for _ in range(POST_CONNECTIONS)]
        for thread in self.threads:
            thread.start()

    def _ask(self) -> None:
        sock = None
        while time.monotonic() < self.ends_s:
            began_s = time.monotonic()
            received = b""
            with contextlib.suppress(OSError):
                if sock is None or self.opens:
                    sock = socket.create_connection(("127.0.0.1", self.port), 10)
                    self.socks.append(sock)
                sock.sendall(self.request)
                while self.end not in received and (chunk := sock.recv(4096)):
                    received += chunk
            if not received.startswith(b"HTTP/1.1 200 "):
                self.failed += 1
                return
            self.taken_ms.append(1000 * (time.monotonic() - began_s))
            time.sleep(max(0.0, began_s + self.pause_s - time.monotonic()))

    def answer(self) -> Values:
        for thread in self.threads:
            thread.join()
        for sock in self.socks:
            sock.close()
        if len(self.taken_ms) < 2:
            raise StepError(f"nothing was answered, {self.failed} failed")
        permille = quantiles(self.taken_ms, n=1000, method="inclusive")
        latencies = dict(zip(LATENCIES, (permille[499], permille[989], permille[998], max(self.taken_ms)), strict=True))
        return {"requests_per_s": len(self.taken_ms) / self.seconds, **latencies, "failed": self.failed}


def post_request(port: int, channel: str, data: str) -> bytes:
    body = json.dumps({"channel": channel, "data": data})
    head = f"POST /publish HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def posters(port: int, per_s: float, seconds: float) -> Askers:
    return Askers(port, post_request(port, "posted", "x" * SMALL_BYTES), b"}\n", per_s, seconds, False)


def newcomers(port: int, per_s: float, seconds: float) -> Askers:
    request = f"GET /stream?channel=newcomers HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
    return Askers(port, request.encode(), b"\r\n\r\n", per_s, seconds, True)


class Step(NamedTuple):
    """One server, started once, and what is measured on it."""

    round: int
    case: str
    peer: Peer
    streams: int


class Sample(NamedTuple):
    """What one server did in one round of one case."""

    round: int
    peer: str
    case: str  # "open 5000", "deliver 500 10x64" (streams, messages outstanding, their bytes)
    values: Values  # with units in their names


class Stage:
    """The server of a step, while it runs, and its Redis."""

    def __init__(self, step: Step, place: Place, servers: list[Any], seconds: float) -> None:
        self.step, self.place, self.servers, self.seconds = step, place, servers, seconds
        self.redis = [psutil.Process(place.redis.process.pid)] if step.peer.publisher == "redis" else []
        self._clock = (0.0, 0.0)
        self.cpu_since()
        self._bytes = rss_bytes(servers)

    def cpu_since(self) -> tuple[float, float]:
        """CPU seconds of the servers, and of Redis where it takes part, since the last call."""
        before, self._clock = self._clock, (cpu_s(self.servers), cpu_s(self.redis))
        return self._clock[0] - before[0], self._clock[1] - before[1]

    def sample(self, values: Values, messages: str = "") -> Sample:
        case = f"{self.step.case} {self.step.streams} {messages}".strip()
        return Sample(self.step.round, self.step.peer.name, case, values)

    def load(self, mode: str, *arguments: object) -> Load:
        return Load(self.place.tools / "load", mode, self.place.port, *arguments)

    def streams(self, count: int, channel: str = "") -> Load:
        """A load generator that opens streams of the channel, and publishes there; "": of the one and only."""
        peer, place = self.step.peer, self.place
        path = f"{peer.path}?channel={channel}" if channel else peer.path
        to_redis = f"redis:{place.redis.port}:{channel or 'sse'}"
        publisher = to_redis if peer.publisher == "redis" else f"{peer.publisher}:{place.port}:/publish"
        return self.load("streams", path, count, publisher)

    def opening(self, load: Load) -> Values:
        """What it cost to open the streams of a load generator."""
        self.cpu_since()
        opened = load.answer()
        used_s, number = sum(self.cpu_since()), opened["reached"]
        if number == 0:
            raise StepError(f"no stream opened, {opened['closed']:.0f} refused")
        values = {"opened_per_s": number / opened["elapsed_s"], "not_opened": opened["streams"] - number}
        memory = {"kb_per_stream": (rss_bytes(self.servers) - self._bytes) / number / 1024}
        return values | {"open_cpu_us": used_s / number * 1e6} | memory

    def run(self, load: Load, outstanding: int, payload_bytes: int) -> Values:
        """Deliveries, as fast as they are taken."""
        self.cpu_since()
        measured = load.obey(f"run {outstanding} {payload_bytes} {self.seconds}")
        server_s, redis_s = self.cpu_since()
        number = measured["deliveries"]
        if not number:
            raise StepError("nothing was delivered")
        values = {"deliveries_per_s": number / measured["elapsed_s"], **of(measured, *LATENCIES)}
        values |= {"cpu_us": (server_s + redis_s) / number * 1e6, "server_cpu_us": server_s / number * 1e6}
        return values | {"load_busy": measured["load_cpu_s"] / measured["elapsed_s"], "lost": measured["lost"]}

    def paced(self, load: Load) -> Values:
        return load.obey(f"pace 100 {SMALL_BYTES} {2 * self.seconds}")


def of(measured: Values, *names: str, prefix: str = "") -> Values:
    return {prefix + name: measured[name] for name in names}


def deliver(stage: Stage) -> Iterator[Sample]:
    with stage.streams(stage.step.streams) as load:
        memory = of(stage.opening(load), "kb_per_stream")
        load.obey(f"run 1 {SMALL_BYTES} {WARM_UP_S}")
        for payload_bytes in [SMALL_BYTES, LARGE_BYTES][: 2 if stage.step.streams == DETAIL_STREAMS else 1]:
            for outstanding in (1, 10):
                values = stage.run(load, outstanding, payload_bytes)
                yield stage.sample(values | memory, f"{outstanding}x{payload_bytes}")


def open_streams(stage: Stage) -> Iterator[Sample]:
    with stage.streams(stage.step.streams) as load:
        yield stage.sample(stage.opening(load))


def idle(stage: Stage) -> Iterator[Sample]:
    """Nobody reads meanwhile: a few heartbeats fit into every buffer."""
    with stage.streams(stage.step.streams) as load:
        stage.opening(load)
        stage.cpu_since()
        idle_s = 30 * stage.seconds
        time.sleep(idle_s)
        server_s, redis_s = stage.cpu_since()
        yield stage.sample({"server_cpu_s": server_s, "redis_cpu_s": redis_s, "idle_s": idle_s})


def posted(port: int, text: str) -> str:
    """The id of an event that is published over HTTP, on the channel that streams have by default."""
    _, _, body = exchange(port, post_request(port, "sse", text)).partition(b"\r\n\r\n")
    return str(json.loads(body)["id"])


def come_back(stage: Stage) -> Iterator[Sample]:
    """Another server publishes, and ends; of this one, which has seen nothing of it, pages want what they missed."""
    number, peer = stage.step.streams, stage.step.peer
    elsewhere = stage.place._replace(port=free_port())
    with peer.running(elsewhere):
        before = posted(elsewhere.port, "seen by all pages")
        for missed in range(1, MISSED_MESSAGES + 1):
            posted(elsewhere.port, f"missed #{missed:010}")
    with stage.streams(100, "watched") as watchers:
        watchers.answer()
        watchers.tell(f"pace 50 {SMALL_BYTES} 150")
        time.sleep(WARM_UP_S)
        stage.cpu_since()
        with stage.load("return", "/stream", number, before, MISSED_MESSAGES) as pages:
            returned = pages.answer()
            used_s = sum(stage.cpu_since())
            watchers.tell("stop")
            watched = watchers.answer()
    if returned["reached"] < number:
        raise StepError(f"only {returned['reached']:.0f} came back")
    values = {"back_s": returned["elapsed_s"], "half_back_s": returned["p50_ms"] / 1000, **of(watched, *LATENCIES)}
    values |= {"open_cpu_us": used_s / number * 1e6, "wrong_replays": returned["uneven"], "again": returned["again"]}
    yield stage.sample(values | of(watched, "lost"))


def busy(stage: Stage) -> Iterator[Sample]:
    """The same events without other work, beside it, and while another process does it: the machine's own share."""
    peer = stage.step.peer
    with stage.streams(stage.step.streams) as load:
        stage.opening(load)
        load.obey(f"pace 100 {SMALL_BYTES} {WARM_UP_S}")
        quiet = stage.paced(load)
        values = of(quiet, *LATENCIES, prefix="quiet_") | of(quiet, "lost")
        if peer.is_ssepush:
            elsewhere = stage.place._replace(port=free_port())
            with peer.running(elsewhere) as servers:
                other = beside(Stage(stage.step, elsewhere, servers, stage.seconds), stage, load)
            here = beside(stage, stage, load)
            values |= of(other, *LATENCIES, prefix="elsewhere_") | of(here, *LATENCIES, prefix="busy_")
            values |= of(here, "open_p99_ms", "not_opened", "requests_per_s") | {"lost": quiet["lost"] + here["lost"]}
    yield stage.sample(values)


def beside(other: Stage, stage: Stage, load: Load) -> Values:
    """Paced events of a stage, while 100 streams/s are opened and 500 events/s published at the other's server."""
    others_s = 2 * (stage.seconds + WARM_UP_S)
    others = [start(other.place.port, per_s, others_s) for start, per_s in ((newcomers, 100), (posters, 500))]
    time.sleep(WARM_UP_S)
    measured = stage.paced(load)
    opened, answered = (each.answer() for each in others)
    measured |= {"open_p99_ms": opened["p99_ms"], "not_opened": opened["failed"]}
    return measured | of(answered, "requests_per_s")


def large(stage: Stage) -> Iterator[Sample]:
    with stage.streams(DETAIL_STREAMS) as few:
        few.answer()
        few.obey(f"run 1 {SMALL_BYTES} {WARM_UP_S}")
        few_cpu_us = stage.run(few, 1, SMALL_BYTES)["cpu_us"]
    with stage.streams(stage.step.streams) as load:
        opened = stage.opening(load)
        with stage.streams(100, "watched") as watchers:
            watchers.answer()
            watched = watchers.obey(f"pace 100 {SMALL_BYTES} {2.5 * HEARTBEAT_S}")
        ran = stage.run(load, 1, SMALL_BYTES)
    values = of(opened, "kb_per_stream", "not_opened") | of(watched, *LATENCIES) | of(ran, "cpu_us")
    yield stage.sample(values | {"few_cpu_us": few_cpu_us, "lost": ran["lost"] + watched["lost"]})


def post(stage: Stage) -> Iterator[Sample]:
    posters(stage.place.port, 0, WARM_UP_S).answer()
    stage.cpu_since()
    values = posters(stage.place.port, 0, stage.seconds).answer()
    requests = values["requests_per_s"] * stage.seconds
    yield stage.sample(values | {"cpu_us": sum(stage.cpu_since()) / requests * 1e6})


CASES: dict[str, tuple[Callable[[Stage], Iterator[Sample]], tuple[int, ...]]] = {
    "deliver": (deliver, (100, DETAIL_STREAMS, 2000, 9000)),
    "open": (open_streams, (5000,)),
    "idle": (idle, (5000,)),
    "return": (come_back, (9000,)),
    "busy": (busy, (1000,)),
    "large": (large, (18_000,)),
    "post": (post, (POST_CONNECTIONS,)),
}


def planned(peers: list[Peer], options: argparse.Namespace) -> Iterator[Step]:
    """All steps in order: whole rounds, and within a round the servers in turn for each case."""
    for round_, case in itertools.product(range(1, options.rounds + 1), options.only):
        for streams, peer in itertools.product(options.streams or CASES[case][1], peers):
            is_slow = case == "idle" or (case == "deliver" and peer.is_slow and streams > DETAIL_STREAMS)
            is_apt = case in peer.cases.split() and (streams == DETAIL_STREAMS or not peer.is_detail)
            if is_apt and streams <= peer.most_streams and (round_ == 1 or not is_slow):
                yield Step(round_, case, peer, streams)


def run_step(step: Step, seconds: float, tools: Path) -> Iterator[Sample]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        redis = BenchRedis(folder)
        stack.callback(redis.kill)
        place = Place(free_port(), step.streams, redis, folder, tools)
        options = ("--heartbeat", f"{HEARTBEAT_S}") if step.case == "large" else ()
        servers = stack.enter_context(step.peer.running(place, *options))
        measure, _ = CASES[step.case]
        yield from measure(Stage(step, place, servers, seconds))


def run(steps: list[Step], seconds: float) -> Iterator[Sample]:
    """What each step measured; a step that failed says so, and gives nothing."""
    with tempfile.TemporaryDirectory() as folder:
        tools = Path(folder)
        subprocess.run(["cc", "-O2", "-o", tools / "load", HERE / "load.c"], check=True, timeout=60)
        for name in ("ssepush.py", "index.html"):
            (tools / name).write_bytes(released(name))
        for number, step in enumerate(steps):
            what = f"round {step.round}: {step.peer.label}; {step.case} {step.streams}"
            print(f"[{number:3}/{len(steps)}] {what}", file=sys.stderr, flush=True)
            try:
                yield from run_step(step, seconds, tools)
            except (StepError, AssertionError, OSError, ValueError, psutil.Error) as error:
                print(f"FAILED: {what}: {error}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    redis = subprocess.run([found("redis-server") or redis_binary(), "--version"], capture_output=True, text=True)
    python = f"{platform.python_version()} ({platform.python_compiler()})"
    here = {
        "cpu": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "kernel": platform.release(),
    }
    load_average, date = f"{psutil.getloadavg()[0]:.1f}", time.strftime("%Y-%m-%d")
    return {**here, "python": python, "redis": redis.stdout.strip(), "load_average": load_average, "date": date}


# ── Results ──────────────────────────────────────────────────────────────────────────────────────────────────────────

Summary = dict[str, Any]  # as in results.json: machine, not_run, cases; of each case its columns, and figures by peer


def summary_of(samples: Sequence[Sample], description: dict[str, Any]) -> Summary:
    """Medians over rounds, and of ssepush's first column its ratio to 1.1's in the same round."""
    cases = []
    for name in dict.fromkeys(sample.case for sample in samples):
        by_peer = {peer: {each.round: each.values for each in samples if each[1:3] == (peer, name)} for peer in LABELS}
        columns = max((list(each.values) for each in samples if each.case == name), key=len)
        rounds = max(each.round for each in samples if each.case == name)
        case = {"case": name, "rounds": rounds, "date": description["date"], "columns": columns, "to_1.1": {}}
        for peer, values in by_peer.items():
            if values:
                case[peer] = [middle(each.get(column) for each in values.values()) for column in columns]
            to = by_peer.get(RELEASED.get(peer, ""), {})
            first, both = columns[0], [each for each in values if each in to and to[each][columns[0]]]
            ratio = middle(values[each][first] / to[each][first] for each in both)
            case["to_1.1"] |= {peer: ratio} if ratio else {}
        cases.append(case)
    return {"machine": description, "not_run": {}, "cases": cases}


def middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{median(known):.4g}") if known else None


def merged(old: Summary, new: Summary) -> Summary:
    """The new lines in place of the old ones of the same cases."""
    cases = {case["case"]: case for case in [*old["cases"], *new["cases"]]}
    return {**new, "cases": list(cases.values())}


def as_json(summary: Summary) -> str:
    """One line per case, so that a diff shows what changed."""
    values = (summary["machine"], summary["not_run"], *summary["cases"])
    machine_, not_run, *cases = (json.dumps(value, ensure_ascii=False) for value in values)
    lines = ",\n".join(cases)
    return f'{{"machine": {machine_},\n"not_run": {not_run},\n"cases": [\n{lines}\n]}}\n'


def figure(summary: Summary, peer: str, name: str, column: str) -> float | None:
    for case in summary["cases"]:
        if case["case"] == name and peer in case and column in case["columns"]:
            return case[peer][case["columns"].index(column)]  # type: ignore[no-any-return]
    return None


def shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def text(summary: Summary) -> str:
    parts = [", ".join(f"{name} {value}" for name, value in summary["machine"].items())]
    for case in summary["cases"]:
        rows = [["", *(column.replace("_per_s", "/s").replace("_", " ") for column in case["columns"]), "to 1.1"]]
        for peer in LABELS:
            if peer in case:
                rows.append([LABELS[peer], *map(shown, case[peer]), shown(case["to_1.1"].get(peer))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        parts.append("\n".join([f"{case['case']} ({case['rounds']} rounds)", *lines]))
    parts += [f"{LABELS[peer]}: not run ({why})" for peer, why in summary["not_run"].items()]
    return "\n\n".join(parts)


ONE, TEN, MANY = (f"deliver {which}" for which in ("500 1x64", "500 10x64", "9000 1x64"))
DELIVERIES = {
    "one at a time: deliveries/s": (ONE, "deliveries_per_s"),
    "p99 ms": (ONE, "p99_ms"),
    "CPU µs": (ONE, "cpu_us"),
    "10 outstanding: deliveries/s": (TEN, "deliveries_per_s"),
    "10: CPU µs": (TEN, "cpu_us"),
    "KB per stream": (ONE, "kb_per_stream"),
}
OTHERS = {
    "opening 5,000 streams: opened/s": ("open 5000", "opened_per_s"),
    "9,000 pages back after a restart: s": ("return 9000", "back_s"),
    "others' p99 meanwhile: ms": ("return 9000", "p99_ms"),
    "1,000 streams, 100 events/s: p99 ms": ("busy 1000", "quiet_p99_ms"),
    "beside 100 opened/s and 500 posts/s: p99 ms": ("busy 1000", "busy_p99_ms"),
    "those at another process: p99 ms": ("busy 1000", "elsewhere_p99_ms"),
    "18,000 streams: KB each": ("large 18000", "kb_per_stream"),
    "heartbeats to 18,000: the longest that an event waits, ms": ("large 18000", "max_ms"),
    "5,000 open streams: KB each": ("open 5000", "kb_per_stream"),
    "5,000 idle streams: watched for s": ("idle 5000", "idle_s"),
    "meanwhile: the server's CPU s": ("idle 5000", "server_cpu_s"),
    "9,000 streams, one at a time: deliveries/s": (MANY, "deliveries_per_s"),
    "the same: CPU µs per delivery": (MANY, "cpu_us"),
    "POST /publish: requests/s": ("post 16", "requests_per_s"),
}
OTHER_PEERS = [peer.name for peer in PEERS if peer.cases != "deliver"]


def by_deliveries(summary: Summary) -> list[str]:
    """The servers, the fastest first."""
    rates = {peer: figure(summary, peer, ONE, "deliveries_per_s") or 0.0 for peer in LABELS}
    return sorted(filter(rates.get, rates), key=lambda peer: -rates[peer])


def with_tables(page: str, summary: Summary) -> str:
    """The page, with a table after each comment that names one: `<!-- bench.py: deliveries -->`."""
    bold = {peer: f"**{LABELS[peer]}**" if peer.startswith("ssepush") else LABELS[peer] for peer in LABELS}
    peers = by_deliveries(summary)
    deliveries = [[bold[peer], *(shown(figure(summary, peer, *of)) for of in DELIVERIES.values())] for peer in peers]
    columns = [peer for peer in OTHER_PEERS if any(peer in case for case in summary["cases"])]
    others = [[name, *(shown(figure(summary, peer, *of)) for peer in columns)] for name, of in OTHERS.items()]
    heads = {"deliveries": ["", *DELIVERIES], "others": ["", *(bold[peer] for peer in columns)]}
    for (name, head), rows in zip(heads.items(), (deliveries, others), strict=True):
        before, mark, after = page.partition(f"<!-- bench.py: {name} -->\n\n")
        lines = [f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows)]
        page = before + mark + "".join(lines) + re.sub(r"\A(\|.*\n)*", "", after)
    return page


def draw(summary: Summary) -> None:
    """Three panels of horizontal bars, a row per server."""
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    peers = [peer for peer in reversed(by_deliveries(summary)) if not peer.endswith("-2")]
    panels = ["one at a time: deliveries/s", "10 outstanding: deliveries/s", "CPU µs"]
    size = (12, 0.4 * len(peers) + 1)
    drawing, axes = pyplot.subplots(1, len(panels), sharey=True, figsize=size, layout="constrained")
    drawing.suptitle(f"{DETAIL_STREAMS} open streams, {SMALL_BYTES}-byte messages")
    for axis, panel in zip(axes, panels, strict=True):
        values = [figure(summary, peer, *DELIVERIES[panel]) or 0.0 for peer in peers]
        colours = ["#0969da" if peer.startswith("ssepush") else "#8c959f" for peer in peers]
        bars = axis.barh([LABELS[peer] for peer in peers], values, color=colours)
        axis.bar_label(bars, [shown(value) for value in values], padding=3)
        axis.set(title=panel, xticks=[])
        axis.margins(x=0.3)
        axis.spines[:].set_visible(False)
    drawing.savefig(CHART)


def save(summary: Summary) -> None:
    summary = merged(json.loads(RESULTS.read_text()), summary)
    RESULTS.write_text(as_json(summary))
    PERFORMANCE.write_text(with_tables(PERFORMANCE.read_text(), summary))
    draw(summary)


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_options() -> argparse.Namespace:
    cases, peers = list(CASES), list(LABELS)
    words: Callable[[str], list[str]] = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(description="Measures ssepush and its peers side by side.")
    option = parser.add_argument
    option("--only", metavar="CASE,…", type=words, default=cases, help=", ".join(cases))
    option("--peers", metavar="NAME,…", type=words, default=peers, help=", ".join(peers))
    option(
        "--streams",
        metavar="N,…",
        type=lambda text: [int(word) for word in text.split(",")],
        help="not each case's own",
    )
    option("--rounds", type=int, default=5, help="(5)")
    option("--seconds", type=float, default=2.0, help="per measurement (2)")
    option("--save", action="store_true", help="put the figures into results.json, results.png and performance.md")
    option("--quick", action="store_true", help=f"deliveries of {', '.join(QUICK_PEERS)} with 100 streams: 15 s")
    options = parser.parse_args()
    if options.quick:
        options.only, options.peers, options.streams, options.rounds = ["deliver"], QUICK_PEERS, [100], 1
    unknown = {*options.only, *options.peers} - {*cases, *peers}
    if unknown:
        parser.error(f"no such case or server: {', '.join(unknown)}")
    if options.save and (options.peers != peers or options.streams):
        parser.error("--save is for whole cases: without --peers, --streams and --quick")
    return options


def main() -> int:
    options = parse_options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    description = machine()
    missing = {peer.name: peer.missing() for peer in PEERS if peer.name in options.peers}
    steps = list(planned([peer for peer in PEERS if missing.get(peer.name) == ""], options))
    samples: list[Sample] = []
    is_whole = False
    with contextlib.suppress(KeyboardInterrupt):
        samples += run(steps, options.seconds)
        is_whole = True
    summary = summary_of(samples, description)
    summary["not_run"] = {peer: why for peer, why in missing.items() if why}
    print(text(summary))
    if options.save and samples and is_whole:
        save(summary)
    return 0 if samples and is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
