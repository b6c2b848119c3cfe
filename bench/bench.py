"""Measures ssepush and its peers side by side, in turn, in one run: `python bench/bench.py`.

Each step starts a Redis of its own and one server (servers.py), lets the load generator (load.c, compiled on the spot)
open streams and publish, and ends them all:

    load generator ── streams ──▶ server ── SUBSCRIBE ──▶ Redis ◀── PUBLISH ── load generator

Rounds interleave the servers (A B C, A B C), because machines have moods, and every ratio is taken within a round; what
is printed is the median over rounds. A peer that is not installed is left out, and the table says so. The Python peers
are looked for in the environment of the Python that runs this (`pip install -r bench/requirements.txt`), the others on
PATH. All is on loopback, and ends by itself. Results: results.json and results.svg beside this file (report.py), and
results.json.tmp while it runs.

What is counted: a delivery is one message received on one stream. CPU is user and system time from /proc, summed over a
server's processes, and Redis's. Memory is what a server's processes hold with the streams open, less what they held
before, per stream.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import report
from report import Sample
from servers import (
    DETAIL_STREAMS,
    HERE,
    PEERS,
    POST_CONNECTIONS,
    QUICK_PEERS,
    Peer,
    Place,
    Process,
    StepError,
    compiled,
    cpu_s,
    free_port,
    redis_program,
    rss_bytes,
    running_redis,
    running_server,
)

STREAM_COUNTS = (100, 500, 2000, 9000)
OUTSTANDING = (1, 10)
SMALL_BYTES, LARGE_BYTES = 64, 4096
OPEN_STREAMS = 5000
IDLE_S = 60.0
WARM_UP_S = 0.3

Values = dict[str, float]


@dataclass(frozen=True)
class Step:
    """One server, started once, and what is measured on it."""

    round: int
    case: str  # "stream", "open" (and idle) or "post"
    peer: Peer
    streams: int

    def __str__(self) -> str:
        what = f"POST on {POST_CONNECTIONS} connections" if self.case == "post" else ""
        what = what or f"{'opening ' * (self.case == 'open')}{self.streams:,} streams"
        return f"round {self.round}: {self.peer.label}, {what}"


# ---- The load generator -----------------------------------------------------------------------


class Load:
    """The load generator with its streams open; ends with the `with` block."""

    def __init__(self, program: Path, peer: Peer, place: Place) -> None:
        command = [str(program), "streams", str(place.port), peer.stream_path, str(place.streams)]
        self._errors = (place.folder / "load.log").open("w+")
        self._popen = subprocess.Popen(
            [*command, peer.publisher_argument(place)],
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
        """The next line; load.c ends by itself when it takes too long."""
        line = self._popen.stdout.readline() if self._popen.stdout else ""
        if not line:
            self._errors.seek(0)
            raise StepError(self._errors.read().strip()[-200:] or "the load generator gave up")
        values: Values = json.loads(line)
        return values

    def obey(self, command: str) -> Values:
        if self._popen.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.write(command + "\n")
                self._popen.stdin.flush()
        return self.answer()


# ---- Steps ------------------------------------------------------------------------------------


@dataclass
class CpuClock:
    """CPU seconds of the servers, and of Redis where it takes part, since the last look."""

    servers: list[Process]
    redis: Process | None

    def __post_init__(self) -> None:
        self._seen = (0.0, 0.0)
        self.lap()

    def lap(self) -> tuple[float, float]:
        now = (sum(map(cpu_s, self.servers)), cpu_s(self.redis) if self.redis else 0.0)
        before, self._seen = self._seen, now
        return now[0] - before[0], now[1] - before[1]


def run_step(step: Step, options: argparse.Namespace, folder: Path) -> Iterator[Sample]:
    with contextlib.ExitStack() as stack:
        own_folder = Path(tempfile.mkdtemp(dir=folder))
        stack.callback(shutil.rmtree, own_folder, ignore_errors=True)
        redis = stack.enter_context(running_redis(own_folder))
        place = Place(free_port(), step.streams, redis, own_folder)
        servers = stack.enter_context(running_server(step.peer, place))
        clock = CpuClock(servers, redis.process if step.peer.publisher == "redis" else None)
        program = compiled("load.c", folder)
        if step.case == "post":
            yield post(step, place, program, clock, options.seconds)
            return
        server_bytes, redis_bytes = sum(map(rss_bytes, servers)), rss_bytes(redis.process)
        load = stack.enter_context(Load(program, step.peer, place))
        opened = load.answer()
        server_cpu_s, redis_cpu_s = clock.lap()
        if opened["reached"] == 0:
            raise StepError(f"no stream opened, {opened['refused']:.0f} refused")
        opened |= {
            "not_opened": step.streams - opened["reached"],
            "opened_per_s": opened["reached"] / opened["open_s"],
            "rss_per_stream_bytes": (sum(map(rss_bytes, servers)) - server_bytes) / opened["reached"],
            "redis_rss_per_stream_bytes": (rss_bytes(redis.process) - redis_bytes) / opened["reached"],
            "open_cpu_us": (server_cpu_s + redis_cpu_s) / opened["reached"] * 1e6,
        }
        yield Sample(step.round, step.peer.name, "open", step.streams, values=opened)
        if step.case == "stream":
            yield from deliver(step, load, clock, options.seconds)
        elif step.round == 1 and options.idle_seconds:
            yield idle(step, load, clock, options.idle_seconds)


def deliver(step: Step, load: Load, clock: CpuClock, seconds: float) -> Iterator[Sample]:
    load.obey(f"run 1 {SMALL_BYTES} {WARM_UP_S}")
    sizes = (SMALL_BYTES, LARGE_BYTES) if step.streams == DETAIL_STREAMS else (SMALL_BYTES,)
    for payload_bytes in sizes:
        for outstanding in OUTSTANDING:
            clock.lap()
            values = load.obey(f"run {outstanding} {payload_bytes} {seconds}")
            server_cpu_s, redis_cpu_s = clock.lap()
            if not values["deliveries"]:
                raise StepError("nothing was delivered")
            per_delivery = 1e6 / values["deliveries"]
            values |= {
                "deliveries_per_s": values["deliveries"] / values["elapsed_s"],
                "server_cpu_us": server_cpu_s * per_delivery,
                "redis_cpu_us": redis_cpu_s * per_delivery,
                "cpu_us": (server_cpu_s + redis_cpu_s) * per_delivery,
                "load_busy": values["load_cpu_s"] / values["elapsed_s"],
            }
            key = (step.round, step.peer.name, "deliver", step.streams, outstanding, payload_bytes)
            yield Sample(*key, values)


def idle(step: Step, load: Load, clock: CpuClock, seconds: float) -> Sample:
    clock.lap()
    values = load.obey(f"idle {seconds}")
    values["server_cpu_s"], values["redis_cpu_s"] = clock.lap()
    return Sample(step.round, step.peer.name, "idle", step.streams, values=values)


def post(step: Step, place: Place, program: Path, clock: CpuClock, seconds: float) -> Sample:
    command = [str(program), "post", str(place.port), "/publish", str(POST_CONNECTIONS)]
    for duration_s in (WARM_UP_S, seconds):
        clock.lap()
        result = subprocess.run(
            [*command, str(duration_s)],
            capture_output=True,
            text=True,
            timeout=duration_s + 60,
            check=False,
        )
        cpu_used_s = sum(clock.lap())
    if result.returncode:
        raise StepError(result.stderr.strip()[-200:] or "the load generator gave up")
    values: Values = json.loads(result.stdout)
    if not values["requests"]:
        raise StepError(f"no POST succeeded, {values['failed']:.0f} failed")
    values["requests_per_s"] = values["requests"] / values["elapsed_s"]
    values["cpu_us"] = cpu_used_s / values["requests"] * 1e6
    return Sample(step.round, step.peer.name, "post", POST_CONNECTIONS, values=values)


# ---- The run ----------------------------------------------------------------------------------


def planned(peers: list[Peer], options: argparse.Namespace) -> list[Step]:
    """All steps in order: whole rounds, and within a round the servers in turn for each case."""
    steps = []
    for round_ in range(1, options.rounds + 1):
        for streams in options.streams if "stream" in options.cases else ():
            for peer in peers:
                allowed = not peer.only_streams or streams in peer.only_streams
                skipped = round_ > 1 and peer.is_slow and streams > DETAIL_STREAMS
                if allowed and not skipped and streams <= peer.max_streams:
                    steps.append(Step(round_, "stream", peer, streams))
        for case, streams in (("open", OPEN_STREAMS), ("post", 0)):
            for peer in peers if case in options.cases else ():
                if case in peer.cases:
                    steps.append(Step(round_, case, peer, streams))
    return steps


class Progress:
    """One line, rewritten in place on a terminal."""

    def __init__(self, count: int) -> None:
        self._count, self._done, self._start_s = count, 0, time.monotonic()
        self._in_place = sys.stderr.isatty()

    def show(self, text: str) -> None:
        spent_s = time.monotonic() - self._start_s
        left_s = spent_s / self._done * (self._count - self._done) if self._done else 0
        left = f"{left_s // 60:.0f}:{left_s % 60:02.0f} left" if self._done else "starting"
        line = f"[{self._done:3}/{self._count}] {left:>11}  {text}"
        if self._in_place:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:{width}}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def done(self) -> None:
        self._done += 1

    def end(self) -> None:
        if self._in_place:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def run(steps: list[Step], options: argparse.Namespace, folder: Path) -> Iterator[Sample]:
    """What each step measured; a step that failed gives one sample that says why."""
    progress = Progress(len(steps))
    for step in steps:
        progress.show(str(step))
        try:
            yield from run_step(step, options, folder)
        except (StepError, OSError, ValueError, subprocess.SubprocessError) as error:
            yield Sample(step.round, step.peer.name, "failed", step.streams, note=f"{step}: {error}")
        progress.done()
    progress.end()


def machine() -> dict[str, str | int]:
    cpu_model = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu_model = line.partition(":")[2].strip()
                break
    redis = subprocess.run([redis_program() or "false", "--version"], capture_output=True, text=True)
    return {
        "cpu": cpu_model,
        "cores": os.cpu_count() or 0,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "redis": redis.stdout.strip(),
        "load_average": f"{os.getloadavg()[0]:.1f}",
        "date": time.strftime("%Y-%m-%d"),
    }


def raise_open_file_limit() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def parse_options() -> argparse.Namespace:
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(description="Measures ssepush and its peers side by side.")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{', '.join(QUICK_PEERS)} only, 100 streams, one round: under a minute",
    )
    parser.add_argument("--only", metavar="NAME,...", help=", ".join(names))
    parser.add_argument("--streams", metavar="N,...", help=f"default {STREAM_COUNTS}")
    parser.add_argument("--rounds", type=int, metavar="N", help="default 5")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="per measurement")
    parser.add_argument("--idle-seconds", type=float, default=IDLE_S, metavar="S", help="0: not")
    parser.add_argument("--cases", metavar="CASE,...", help="of stream, open, post")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        help="for results.json and results.svg; default beside this file, with --quick nowhere",
    )
    options = parser.parse_args()
    quick = options.quick
    options.only = options.only.split(",") if options.only else QUICK_PEERS if quick else names
    options.streams = [int(n) for n in options.streams.split(",")] if options.streams else STREAM_COUNTS
    if quick:
        options.streams = (100,)
        options.idle_seconds = 0
    elif not options.output:
        options.output = HERE
    options.rounds = options.rounds or (1 if quick else 5)
    options.cases = (options.cases or ("stream" if quick else "stream,open,post")).split(",")
    if unknown := set(options.only) - set(names):
        parser.error(f"--only: no such server: {', '.join(sorted(unknown))}")
    if unknown := set(options.cases) - {"stream", "open", "post"}:
        parser.error(f"--cases: no such case: {', '.join(sorted(unknown))}")
    if min(options.streams) < 1 or options.rounds < 1 or not 0 < options.seconds <= 60:
        parser.error("out of range")
    return options


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    """End once, in order: what else comes must not disturb the ending of the processes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    options = parse_options()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    for program in ("cc", redis_program() or "redis-server"):
        if not shutil.which(program):
            print(f"bench.py needs {program}", file=sys.stderr)
            return 2
    file_limit = raise_open_file_limit()
    chosen = [peer for peer in PEERS if peer.name in options.only]
    missing = {peer.name: why for peer in chosen if (why := peer.missing())}
    steps = planned([peer for peer in chosen if peer.name not in missing], options)
    results = report.Results(machine(), {"seconds": options.seconds}, missing, [])
    results.settings |= {"rounds": options.rounds, "open_file_limit": file_limit}
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="ssepush-bench-") as folder:
        try:
            for sample in run(steps, options, Path(folder)):
                results.samples.append(sample)
                if options.output:
                    unfinished = options.output / "results.json.tmp"
                    unfinished.write_text(report.as_json(results))
        except KeyboardInterrupt:
            interrupted = True
            print("\ninterrupted: what was measured so far", file=sys.stderr)
    print(report.text(results))
    if options.output and results.samples and not interrupted:
        (options.output / "results.json.tmp").replace(options.output / "results.json")
        (options.output / "results.svg").write_text(report.chart(results))
    return 1 if interrupted or not results.samples else 0


if __name__ == "__main__":
    sys.exit(main())
