"""What large replays cost those who publish meanwhile, and how long a script holds up Redis.

    python bench/replays.py                           8 pages that each missed 20 channels of 100 events of 50 KB
    python bench/replays.py --event-bytes 100         many small events: most work for each byte

Publishing is measured twice, at the same pace: while nothing else happens, and while the pages are sent what they
missed. Redis and the server are its own, and on this machine alone. Redis's slow log tells the longest script, by the
clock: on a busy machine that holds the time in which Redis had to wait for a processor, too. `script ms, CPU` does not.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ssepush
from tests.kit import RedisProcess, ServerProcess, query_of

CHANNELS = [f"replays-{number}" for number in range(20)]
EVENTS = 100  # on each channel, as many as are kept
PAUSE_S = 0.002  # between two publishes
QUIET_S = 5.0
MOST_S = 60.0  # for all replays

# A page in a process of its own: reads until it has had so many bytes, or the stream ends.
READER = """
import socket, sys
port, path, last_event_id, length = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
sock = socket.create_connection(("127.0.0.1", port), 60)
sock.sendall(f"GET {path} HTTP/1.0\\r\\nHost: localhost\\r\\nLast-Event-ID: {last_event_id}\\r\\n\\r\\n".encode())
while length > 0:
    received = len(sock.recv(262144))
    if not received:
        sys.exit("the stream ended")
    length -= received
"""


def publish_ms(redis: RedisProcess, until: Callable[[], bool]) -> list[float]:
    """How long each publish takes until that holds, from the fastest to the slowest."""
    taken = []
    while not until():
        began = time.perf_counter()
        ssepush.publish("hello", channel="replays", redis_url=redis.url)
        taken_s = time.perf_counter() - began
        taken.append(1000 * taken_s)
        time.sleep(PAUSE_S)
    return sorted(taken)


def percentile(taken: Sequence[float], percent: int) -> float:
    at = len(taken) * percent // 100
    return taken[at]


def fill(redis: RedisProcess, event_bytes: int) -> str:
    """One channel after the other; the id from before."""
    first = ssepush.publish("first", channel=CHANNELS[0], redis_url=redis.url)
    for channel in CHANNELS:
        for _ in range(EVENTS):
            ssepush.publish("x" * event_bytes, channel=channel, redis_url=redis.url)
    assert first.id
    return first.id


@contextlib.contextmanager
def readers(port: int, number: int, last_event_id: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many pages that come back with this id, each in a process."""
    length = EVENTS * len(CHANNELS) * options.event_bytes
    path = f"/stream?{query_of(*CHANNELS)}"
    command = [sys.executable, "-c", READER]
    command += [str(port), path, last_event_id, str(length)]
    processes = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def cpu_ms(redis: RedisProcess) -> float:
    """The CPU time that Redis has used."""
    used = redis.client.info("cpu")
    return 1000 * float(used["used_cpu_user"] + used["used_cpu_sys"])


def script_cpu_ms(redis: RedisProcess, last_event_id: str) -> float:
    """The CPU time of one script that reads a page, its answer included: the mean of a hundred."""
    history = ssepush.Redis(redis.url, EVENTS, 86400)
    channels = [channel.encode() for channel in CHANNELS]
    missed = ssepush.missed_since(last_event_id, channels)
    before = cpu_ms(redis)
    for _ in range(100):
        history._read(missed)
    return (cpu_ms(redis) - before) / 100


def measure(redis: RedisProcess, server: ServerProcess) -> None:
    last_event_id = fill(redis, options.event_bytes)
    quiet_ends_at = time.monotonic() + QUIET_S
    quiet = publish_ms(redis, lambda: time.monotonic() > quiet_ends_at)
    print(f"{'script ms, CPU':40} {script_cpu_ms(redis, last_event_id):.2f}")
    redis.client.config_set("slowlog-log-slower-than", 1000)
    redis.client.config_set("slowlog-max-len", 100_000)
    redis.client.slowlog_reset()
    began = time.monotonic()
    with readers(server.port, options.pages, last_event_id) as processes:

        def are_done() -> bool:
            if time.monotonic() > began + MOST_S:
                return True
            return all(process.poll() is not None for process in processes)

        busy = publish_ms(redis, are_done)
        done = [process for process in processes if process.poll() == 0]
    took_s = time.monotonic() - began
    scripts_ms = [entry["duration"] / 1000 for entry in redis.client.slowlog_get(100_000)]
    over_5_ms = [each for each in scripts_ms if each > 5]
    longest_ms = max(scripts_ms, default=0.0)
    ratio = percentile(busy, 99) / percentile(quiet, 99)
    print(f"{'replays done':40} {len(done)} of {options.pages} in {took_s:.1f} s")
    for name, taken in (("quiet", quiet), ("with replays", busy)):
        what = f"publish ms, {name}: p50, p99"
        p50 = percentile(taken, 50)
        p99 = percentile(taken, 99)
        print(f"{what:40} {p50:.2f} {p99:.2f} ({len(taken)})")
    print(f"{'p99, with replays to quiet':40} {ratio:.1f}")
    print(f"{'slow log ms: longest, number over 5':40} {longest_ms:.1f} {len(over_5_ms)}")


parser = argparse.ArgumentParser(description="What large replays cost those who publish meanwhile.")
parser.add_argument("--pages", type=int, default=8, help="that come back at once (8)")
parser.add_argument("--event-bytes", type=int, default=50_000, help="(50000)")
options = parser.parse_args()
with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    redis_process = RedisProcess(Path(folder))
    stack.callback(redis_process.kill)
    server_process = ServerProcess(redis_process)
    stack.callback(server_process.terminate)
    measure(redis_process, server_process)
