"""Measures ssepush, its release 1.1 and its peers side by side, in turn, in one run: `python bench/bench.py`.

Each step starts a Redis of its own and one server (servers.py), lets load generators (load.c, compiled on the spot)
open streams and publish, and ends them all:

    load generator ── streams ──▶ server ── SUBSCRIBE ──▶ Redis ◀── PUBLISH ── load generator

Rounds interleave the servers (A B C, A B C), because machines have moods, and every ratio is taken within a round; what
is printed is the median over rounds. A peer that is not installed is left out, and the table says so. The Python peers
are looked for in the environment of the Python that runs this (`pip install -r bench/requirements.txt`), the others on
PATH; 1.1 comes from git. Mercure and Centrifugo are no peers: no package of PyPI, npm or Debian holds their servers.
All is on loopback, and ends by itself.

    python bench/bench.py --save                                  everything; replaces results.json and results.svg
    python bench/bench.py --only open --rounds 2 --seconds 0.5    one case, in a minute; --save replaces its line
    python bench/bench.py --only deliver --streams 500 --peers ssepush,1.1

| case | what is measured |
| --- | --- |
| deliver | deliveries with so many streams open, one message at a time, and ten outstanding |
| open | opening 5,000 streams |
| idle | CPU time of 5,000 idle streams, in the first round |
| return | 9,000 pages return at once after a restart, and have missed events; meanwhile 100 watch another channel |
| busy | latency of 100 events/s on 1,000 streams: quiet; beside 100 opened/s and 500 posts/s, here or elsewhere |
| large | 18,000 streams: memory, how their heartbeats delay the events of 100 others, CPU per delivery against 500 |
| post | POST /publish over kept-alive connections |

A delivery is one message received on one stream. CPU is user and system time from /proc, summed over a server's
processes, and Redis's. Memory is what a server's processes hold with the streams open, less what they held before, per
stream. Latency is from just before a message is published to when a stream has read it. Every single sample is kept in
results.raw.jsonl beside this file, which git ignores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import report
from report import Sample
from servers import (
    CHANNEL,
    DETAIL_STREAMS,
    HERE,
    PEERS,
    POST_CONNECTIONS,
    QUICK_PEERS,
    Peer,
    Place,
    Process,
    Redis,
    StepError,
    compiled,
    cpu_s,
    free_port,
    redis_program,
    rss_bytes,
    running_redis,
    running_server,
)

RAW = HERE / "results.raw.jsonl"
OUTSTANDING = (1, 10)
SMALL_BYTES, LARGE_BYTES = 64, 4096
WARM_UP_S = 0.3
IDLE_FACTOR = 30  # idle streams are watched for so many times --seconds
WATCHED = "watched"
WATCHERS = 100
WATCHED_PER_S = 50
MISSED_MESSAGES = 20  # by each page that returns
BUSY_PER_S, OPENED_PER_S, POSTED_PER_S = 100, 100, 500
HEARTBEAT_S = 4  # of the case "large": some of them fit into a short measurement
HEARTBEAT = ("--heartbeat", str(HEARTBEAT_S))
RETURN_LIMIT_S = 150

Values = dict[str, float]


@dataclass(frozen=True)
class Step:
    """One server, started once, and what is measured on it."""

    round: int
    case: str
    peer: Peer
    streams: int

    def __str__(self) -> str:
        what = report.case_text(f"{self.case} {self.streams} 1x64")
        return f"round {self.round}: {self.peer.label}; {what}"

    def sample(self, values: Values, messages: str = "") -> Sample:
        case = f"{self.case} {self.streams} {messages}".strip()
        return Sample(self.round, self.peer.name, case, values)


# ---- The load generator -----------------------------------------------------------------------


class Load:
    """A load generator, which ends with the `with` block; it also ends by itself when it takes too long."""

    def __init__(self, program: Path, folder: Path, *arguments: object) -> None:
        command = [str(program), *map(str, arguments)]
        self._log = folder / f"load-{time.monotonic_ns()}.log"
        self._errors = self._log.open("w")
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exception: object) -> None:
        self._popen.kill()
        self._popen.communicate()
        self._errors.close()

    def answer(self) -> Values:
        """The next line."""
        line = self._popen.stdout.readline() if self._popen.stdout else ""
        if not line:
            said = self._log.read_text().strip()
            raise StepError(said[-200:] or "the load generator gave up")
        values: Values = json.loads(line)
        return values

    def tell(self, command: str) -> None:
        if self._popen.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.write(f"{command}\n")
                self._popen.stdin.flush()

    def obey(self, command: str) -> Values:
        self.tell(command)
        return self.answer()


def latency_ms(measured: Values, prefix: str = "") -> Values:
    values = {}
    for name in ("p50", "p99", "p999", "max"):
        values[f"{prefix}{name}_ms"] = measured[f"latency_{name}_us"] / 1000
    return values


def lost_in(measured: Values) -> float:
    return measured["missing"] + measured["publish_errors"]


# ---- One server, and the tools to measure it --------------------------------------------------


@dataclass
class CpuClock:
    """CPU seconds of the servers, and of Redis where it takes part, since the last look."""

    servers: list[Process]
    redis: Process | None

    def __post_init__(self) -> None:
        self._seen = (0.0, 0.0)
        self.lap()

    def lap(self) -> tuple[float, float]:
        server_s = sum(map(cpu_s, self.servers))
        redis_s = cpu_s(self.redis) if self.redis else 0.0
        server_before_s, redis_before_s = self._seen
        self._seen = (server_s, redis_s)
        return server_s - server_before_s, redis_s - redis_before_s


class Stage:
    """The server of a step, while it runs, and its Redis."""

    def __init__(
        self,
        step: Step,
        place: Place,
        servers: list[Process],
        seconds: float,
    ) -> None:
        self.step = step
        self.place = place
        self.servers = servers
        self.seconds = seconds
        redis = place.redis.process
        takes_part = step.peer.publisher == "redis"
        self.clock = CpuClock(servers, redis if takes_part else None)
        self.program = compiled("load.c", place.folder.parent)
        self._server_bytes = self._rss_bytes()
        self._redis_bytes = rss_bytes(redis)

    def _rss_bytes(self) -> int:
        return sum(map(rss_bytes, self.servers))

    def load(self, mode: str, *arguments: object) -> Load:
        place = self.place
        return Load(self.program, place.folder, mode, place.port, *arguments)

    def streams(self, count: int, channel: str = "") -> Load:
        """A load generator that opens streams of the channel, and publishes there; "": of the one and only."""
        peer = self.step.peer
        path = peer.stream_path
        if channel:
            path = f"{path}?channel={channel}"
        publisher = peer.publisher_argument(self.place, channel or CHANNEL)
        return self.load("streams", path, count, publisher)

    def watchers(self) -> Load:
        return self.streams(WATCHERS, WATCHED)

    def opening(self, load: Load) -> Values:
        """What it cost to open the streams of a load generator."""
        self.clock.lap()
        opened = load.answer()
        server_cpu_s, redis_cpu_s = self.clock.lap()
        number = opened["reached"]
        if number == 0:
            raise StepError(f"no stream opened, {opened['refused']:.0f} refused")
        server_bytes = self._rss_bytes() - self._server_bytes
        redis_bytes = rss_bytes(self.place.redis.process) - self._redis_bytes
        return {
            "not_opened": opened["streams"] - number,
            "opened_per_s": number / opened["open_s"],
            "kb_per_stream": server_bytes / number / 1024,
            "redis_kb_per_stream": redis_bytes / number / 1024,
            "open_cpu_us": (server_cpu_s + redis_cpu_s) / number * 1e6,
        }

    def run(self, load: Load, outstanding: int, payload_bytes: int) -> Values:
        """Deliveries, as fast as they are taken."""
        self.clock.lap()
        measured = load.obey(f"run {outstanding} {payload_bytes} {self.seconds}")
        server_cpu_s, redis_cpu_s = self.clock.lap()
        deliveries = measured["deliveries"]
        if not deliveries:
            raise StepError("nothing was delivered")
        return {
            "deliveries_per_s": deliveries / measured["elapsed_s"],
            "server_cpu_us": server_cpu_s / deliveries * 1e6,
            "redis_cpu_us": redis_cpu_s / deliveries * 1e6,
            "cpu_us": (server_cpu_s + redis_cpu_s) / deliveries * 1e6,
            "load_busy": measured["load_cpu_s"] / measured["elapsed_s"],
            "lost": lost_in(measured),
            **latency_ms(measured),
        }


# ---- The cases --------------------------------------------------------------------------------


def deliver(stage: Stage) -> Iterator[Sample]:
    step = stage.step
    with stage.streams(step.streams) as load:
        memory = stage.opening(load)["kb_per_stream"]
        load.obey(f"run 1 {SMALL_BYTES} {WARM_UP_S}")
        sizes = [SMALL_BYTES]
        if step.streams == DETAIL_STREAMS:
            sizes.append(LARGE_BYTES)
        for payload_bytes in sizes:
            for outstanding in OUTSTANDING:
                values = stage.run(load, outstanding, payload_bytes)
                values["kb_per_stream"] = memory
                yield step.sample(values, f"{outstanding}x{payload_bytes}")


def open_streams(stage: Stage) -> Iterator[Sample]:
    with stage.streams(stage.step.streams) as load:
        yield stage.step.sample(stage.opening(load))


def idle(stage: Stage) -> Iterator[Sample]:
    with stage.streams(stage.step.streams) as load:
        stage.opening(load)
        stage.clock.lap()
        values = load.obey(f"idle {IDLE_FACTOR * stage.seconds}")
        values["server_cpu_s"], values["redis_cpu_s"] = stage.clock.lap()
        yield stage.step.sample(values)


def posted(port: int, text: str) -> str:
    """The id of an event that is published over HTTP, on the channel that streams have by default."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        body = json.dumps({"data": text})
        connection.request("POST", "/publish", body, headers)
        answer = json.loads(connection.getresponse().read())
    if answer["state"] != "ok":
        raise StepError(f"POST /publish: {answer}")
    return str(answer["id"])


def prepared(peer: Peer, place: Place) -> str:
    """Publish what pages will have missed; the id before it. The server that did so has ended afterwards."""
    with running_server(peer, place):
        before = posted(place.port, "seen by all pages")
        for number in range(1, MISSED_MESSAGES + 1):
            posted(place.port, f"missed #{number:010}")
    return before


def come_back(stage: Stage, last_event_id: str) -> Iterator[Sample]:
    """Measured by two load generators: one for the pages that return, and one for the watchers."""
    number = stage.step.streams
    with stage.watchers() as watchers:
        watchers.answer()
        watchers.tell(f"pace {WATCHED_PER_S} {SMALL_BYTES} {RETURN_LIMIT_S}")
        time.sleep(WARM_UP_S)
        stage.clock.lap()
        with stage.load("return", "/stream", number, last_event_id, MISSED_MESSAGES) as pages:
            returned = pages.answer()
            cpu_used_s = sum(stage.clock.lap())
            watchers.tell("stop")
            watched = watchers.answer()
    if returned["back"] < number:
        raise StepError(f"only {returned['back']:.0f} came back")
    values = {
        "back_s": returned["back_s"],
        "half_back_s": returned["latency_p50_us"] / 1e6,
        "again": returned["again"],
        "wrong_replays": returned["uneven_streams"],
        "open_cpu_us": cpu_used_s / number * 1e6,
        "lost": lost_in(watched),
        **latency_ms(watched),
    }
    yield stage.step.sample(values)


def busy(stage: Stage) -> Iterator[Sample]:
    """The same events without other work, beside it, and while another process does it: the machine's own share."""
    step, place = stage.step, stage.place
    with stage.streams(step.streams) as load:
        stage.opening(load)
        load.obey(f"pace {BUSY_PER_S} {SMALL_BYTES} {WARM_UP_S}")
        quiet = paced(stage, load)
        values = {"lost": lost_in(quiet), **latency_ms(quiet, "quiet_")}
        if step.peer.is_ssepush:
            elsewhere = dataclasses.replace(place, port=free_port())
            with running_server(step.peer, elsewhere) as servers:
                other = Stage(step, elsewhere, servers, stage.seconds)
                values |= latency_ms(beside(other, stage, load), "elsewhere_")
            measured = beside(stage, stage, load)
            values |= latency_ms(measured, "busy_")
            values["lost"] += lost_in(measured)
            for name in ("open_p99_ms", "not_opened", "posts_per_s"):
                values[name] = measured[name]
    yield step.sample(values)


def paced(stage: Stage, load: Load) -> Values:
    return load.obey(f"pace {BUSY_PER_S} {SMALL_BYTES} {2 * stage.seconds}")


def beside(other: Stage, stage: Stage, load: Load) -> Values:
    """Paced events of a stage, while streams are opened and events published over HTTP at the other's server."""
    others_s = 2 * (stage.seconds + WARM_UP_S)
    path = "/stream?channel=newcomers"
    with (
        other.load("newcomers", path, OPENED_PER_S, others_s) as newcomers,
        other.load("post", "/publish", POST_CONNECTIONS, POSTED_PER_S, others_s) as posters,
    ):
        time.sleep(WARM_UP_S)
        measured = paced(stage, load)
        opened = newcomers.answer()
        answered = posters.answer()
    measured["open_p99_ms"] = opened["latency_p99_us"] / 1000
    measured["not_opened"] = opened["streams"] - opened["opened"]
    measured["posts_per_s"] = answered["requests"] / answered["elapsed_s"]
    return measured


def large(stage: Stage) -> Iterator[Sample]:
    with stage.streams(DETAIL_STREAMS) as few:
        few.answer()
        few.obey(f"run 1 {SMALL_BYTES} {WARM_UP_S}")
        few_cpu_us = stage.run(few, 1, SMALL_BYTES)["cpu_us"]
    with stage.streams(stage.step.streams) as load:
        values = stage.opening(load)
        pace_s = 2.5 * HEARTBEAT_S
        with stage.watchers() as watchers:
            watchers.answer()
            watched = watchers.obey(f"pace {BUSY_PER_S} {SMALL_BYTES} {pace_s}")
        ran = stage.run(load, 1, SMALL_BYTES)
    values |= latency_ms(watched)
    values["cpu_us"] = ran["cpu_us"]
    values["few_cpu_us"] = few_cpu_us
    values["lost"] = ran["lost"] + lost_in(watched)
    yield stage.step.sample(values)


def post(stage: Stage) -> Iterator[Sample]:
    connections = stage.step.streams
    for duration_s in (WARM_UP_S, stage.seconds):
        stage.clock.lap()
        with stage.load("post", "/publish", connections, 0, duration_s) as load:
            measured = load.answer()
        cpu_used_s = sum(stage.clock.lap())
    requests = measured["requests"]
    if not requests:
        raise StepError(f"no POST succeeded, {measured['failed']:.0f} failed")
    values = {
        "requests_per_s": requests / measured["elapsed_s"],
        "cpu_us": cpu_used_s / requests * 1e6,
        "failed": measured["failed"],
        **latency_ms(measured),
    }
    yield stage.step.sample(values)


Measure = Callable[[Stage], Iterator[Sample]]


@dataclass(frozen=True)
class Case:
    measure: Measure | None  # None: come_back, which needs more
    streams: tuple[int, ...]
    options: tuple[str, ...] = ()  # of ssepush
    first_round_only: bool = False


CASES = {
    "deliver": Case(deliver, report.DELIVER_STREAMS),
    "open": Case(open_streams, (5000,)),
    "idle": Case(idle, (5000,), first_round_only=True),
    "return": Case(None, (9000,)),
    "busy": Case(busy, (1000,)),
    "large": Case(large, (18_000,), options=HEARTBEAT),
    "post": Case(post, (POST_CONNECTIONS,)),
}


def run_step(step: Step, seconds: float, folder: Path) -> Iterator[Sample]:
    case = CASES[step.case]
    with contextlib.ExitStack() as stack:
        own_folder = Path(tempfile.mkdtemp(dir=folder))
        stack.callback(shutil.rmtree, own_folder, ignore_errors=True)
        redis: Redis = stack.enter_context(running_redis(own_folder))
        place = Place(free_port(), step.streams, redis, own_folder)
        last_event_id = prepared(step.peer, place) if case.measure is None else ""
        running = running_server(step.peer, place, *case.options)
        servers = stack.enter_context(running)
        stage = Stage(step, place, servers, seconds)
        if case.measure is None:
            yield from come_back(stage, last_event_id)
        else:
            yield from case.measure(stage)


# ---- The run ----------------------------------------------------------------------------------


def planned(peers: list[Peer], options: argparse.Namespace) -> list[Step]:
    """All steps in order: whole rounds, and within a round the servers in turn for each case."""
    steps = []
    for round_ in range(1, options.rounds + 1):
        for name in options.only:
            case = CASES[name]
            if case.first_round_only and round_ > 1:
                continue
            for streams in options.streams or case.streams:
                for peer in peers:
                    step = Step(round_, name, peer, streams)
                    if is_wanted(step):
                        steps.append(step)
    return steps


def is_wanted(step: Step) -> bool:
    peer = step.peer
    if step.case not in peer.cases or step.streams > peer.max_streams:
        return False
    if step.case != "deliver":
        return True
    if peer.only_streams and step.streams not in peer.only_streams:
        return False
    takes_minutes = peer.is_slow and step.streams > DETAIL_STREAMS
    return step.round == 1 or not takes_minutes


def run(steps: list[Step], seconds: float, folder: Path) -> Iterator[Sample]:
    """What each step measured; a step that failed says so, and gives nothing."""
    began_s = time.monotonic()
    for number, step in enumerate(steps):
        spent_s = time.monotonic() - began_s
        print(f"[{number:3}/{len(steps)}] {spent_s:5.0f} s  {step}", file=sys.stderr, flush=True)
        try:
            yield from run_step(step, seconds, folder)
        except (StepError, OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"FAILED: {step}: {error}", file=sys.stderr, flush=True)


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()


def machine() -> dict[str, str | int]:
    command = [redis_program() or "false", "--version"]
    redis = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 0,
        "kernel": platform.release(),
        "python": f"{platform.python_version()} ({platform.python_compiler()})",
        "redis": redis.stdout.strip(),
        "load_average": f"{os.getloadavg()[0]:.1f}",
        "date": time.strftime("%Y-%m-%d"),
    }


def raise_open_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def names_of(kind: str, known: list[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of the known names, separated by commas."""

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no such {kind}: {name}; there are {', '.join(known)}")
        return chosen

    return names


def counts(text: str) -> list[int]:
    """An argparse type: numbers of streams, separated by commas."""
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return numbers


def parse_options() -> argparse.Namespace:
    cases = list(CASES)
    peers = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(description="Measures ssepush and its peers side by side.")
    option = parser.add_argument
    option(
        "--only",
        metavar="CASE,…",
        type=names_of("case", cases),
        default=cases,
        help=", ".join(cases),
    )
    option(
        "--peers",
        metavar="NAME,…",
        type=names_of("server", peers),
        default=peers,
        help=", ".join(peers),
    )
    option("--streams", metavar="N,…", type=counts, help="instead of each case's own")
    option("--rounds", type=int, default=5, help="(5)")
    option("--seconds", type=float, default=2.0, help="per measurement (2)")
    option("--save", action="store_true", help="put the figures into results.json and results.svg")
    option(
        "--quick",
        action="store_true",
        help=f"deliveries of {', '.join(QUICK_PEERS)} with 100 streams, one round: 15 s",
    )
    options = parser.parse_args()
    if options.quick:
        options.only, options.peers = ["deliver"], list(QUICK_PEERS)
        options.streams, options.rounds = [100], 1
    if options.save and (options.peers != peers or options.streams):
        parser.error("--save is for whole cases: without --peers, --streams and --quick")
    if options.rounds < 1 or not 0 < options.seconds <= 60:
        parser.error("--rounds must be at least 1, and --seconds more than 0 and at most 60")
    return options


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    """End once, in order: what else comes must not disturb the ending of the processes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def measured_samples(steps: list[Step], seconds: float) -> tuple[list[Sample], bool]:
    """All samples, which are also kept in results.raw.jsonl; and whether the run came to its end."""
    samples = []
    with tempfile.TemporaryDirectory(prefix="ssepush-bench-") as folder, RAW.open("w") as raw:
        try:
            for sample in run(steps, seconds, Path(folder)):
                samples.append(sample)
                raw.write(f"{json.dumps(vars(sample))}\n")
                raw.flush()
        except KeyboardInterrupt:
            print("\ninterrupted: what was measured so far", file=sys.stderr)
            return samples, False
    return samples, True


def save(summary: report.Summary) -> None:
    if report.RESULTS.exists():
        stored = report.from_json(report.RESULTS.read_text())
        summary = report.merged(stored, summary)
    report.RESULTS.write_text(report.as_json(summary))
    report.CHART.write_text(report.chart(summary))


def main() -> int:
    options = parse_options()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    for program in ("cc", redis_program() or "redis-server"):
        if not shutil.which(program):
            print(f"bench.py needs {program}", file=sys.stderr)
            return 2
    raise_open_file_limit()
    description = machine()
    present, missing = [], {}
    for peer in PEERS:
        if peer.name in options.peers:
            why = peer.missing()
            if why:
                missing[peer.name] = why
            else:
                present.append(peer)
    steps = planned(present, options)
    samples, is_whole = measured_samples(steps, options.seconds)
    summary = report.summary_of(samples, description)
    summary.not_run = missing
    print(report.text(summary))
    if options.save and samples and is_whole:
        save(summary)
    return 0 if samples and is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
