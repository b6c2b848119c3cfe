"""What large replays cost those who publish meanwhile, and how long one holds up Redis.

    python bench/replays.py                                  8 pages that each missed 20 channels of 20 events of 50 KB
    python bench/replays.py --event-bytes 100 --events 1000  many small events: most work for each byte
    python bench/replays.py --event-bytes 1000000 --events 1 the largest that are kept
    python bench/replays.py --quick                          a little of it, judged by its bytes alone

Publishing is measured twice, at the same pace: while nothing else happens, and while the pages are sent what they
missed. Each page has missed something else, so that nothing is read for two. Redis and the server are its own, and on
this machine alone. Redis's slow log tells the longest transaction, by the clock: on a busy machine that holds the time
in which Redis had to wait for a processor, too. `replay ms, CPU` does not.

It ends with status 1 if a page was not sent everything, if Redis sent more than 1.5 times what the pages were sent, if
a replay took Redis more than 25 ms, by the clock or of a processor, or if publishing's p99 was more than doubled. Of
events of less than 1,000 bytes, most of what Redis sends are ids: with them the first limit is not looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
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
PAUSE_S = 0.002  # between two publishes
QUIET_S = 5.0
MOST_S = 60.0  # for all replays
MOST_READ = 1.5  # times what is sent
MOST_REPLAY_MS = 25.0
MOST_P99 = 2.0  # times that of quiet moments
SMALL_BYTES = 1000

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


def fill(redis: RedisProcess) -> list[str]:
    """One channel after the other; the ids in order, of which the first is from before."""
    first = ssepush.publish("first", channel=CHANNELS[0], redis_url=redis.url)
    ids = [str(first.id)]
    for channel in CHANNELS:
        for _ in range(options.events):
            data = "x" * options.event_bytes
            event = ssepush.publish(data, channel=channel, redis_url=redis.url)
            ids.append(str(event.id))
    return ids


def sent_bytes(page: int) -> int:
    """How much a page is sent: each has missed one event less than the one before."""
    events = int(options.events) * len(CHANNELS) - page
    return events * int(options.event_bytes)


@contextlib.contextmanager
def readers(port: int, ids: Sequence[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """All pages, each in a process, come back."""
    path = f"/stream?{query_of(*CHANNELS)}"
    processes = []
    for page in range(options.pages):
        command = [sys.executable, "-c", READER]
        command += [str(port), path]
        command += [ids[page], str(sent_bytes(page))]
        process = subprocess.Popen(command)
        processes.append(process)
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


def replay_cpu_ms(redis: RedisProcess, last_event_id: str) -> float:
    """Redis's CPU time for what one page missed, its answer included: the mean of a hundred."""
    channels = [channel.encode() for channel in CHANNELS]
    history = ssepush.Redis(redis.url, "", options.events, 86400, ssepush.MAX_EVENT_BYTES)
    question = history.question(channels, ssepush.Since(last_event_id))
    with socket.create_connection(("127.0.0.1", redis.port)) as sock:
        before = cpu_ms(redis)
        for _ in range(100):
            sock.sendall(question)
            answer = b""
            while not answer.endswith(ssepush.END):
                answer = answer[-len(ssepush.END) :] + sock.recv(2**20)
        return (cpu_ms(redis) - before) / 100


def read_bytes(redis: RedisProcess) -> int:
    """How much Redis has sent to everybody."""
    stats = redis.client.info("stats")
    return int(stats["total_net_output_bytes"])


def measure(redis: RedisProcess, server: ServerProcess) -> list[str]:
    """Print the figures; those that are beyond their limits."""
    ids = fill(redis)
    quiet_ends_at = time.monotonic() + (0.5 if options.quick else QUIET_S)
    quiet = publish_ms(redis, lambda: time.monotonic() > quiet_ends_at)
    replay_ms = replay_cpu_ms(redis, ids[0])
    print(f"{'replay ms, CPU':40} {replay_ms:.2f}")
    redis.client.config_set("slowlog-log-slower-than", 1000)
    redis.client.config_set("slowlog-max-len", 100_000)
    redis.client.slowlog_reset()
    before = read_bytes(redis)
    began = time.monotonic()
    with readers(server.port, ids) as processes:

        def are_done() -> bool:
            if time.monotonic() > began + MOST_S:
                return True
            return all(process.poll() is not None for process in processes)

        busy = publish_ms(redis, are_done)
        done = [process for process in processes if process.poll() == 0]
    took_s = time.monotonic() - began
    sent = sum(map(sent_bytes, range(options.pages)))
    read = (read_bytes(redis) - before) / sent
    slow_ms = [entry["duration"] / 1000 for entry in redis.client.slowlog_get(100_000)]
    over = [each for each in slow_ms if each > MOST_REPLAY_MS]
    longest_ms = max(slow_ms, default=0.0)
    slower = percentile(busy, 99) / percentile(quiet, 99)
    print(f"{'replays done':40} {len(done)} of {options.pages} in {took_s:.1f} s")
    print(f"{'read from Redis, to sent':40} {read:.2f}")
    for name, taken in (("quiet", quiet), ("with replays", busy)):
        what = f"publish ms, {name}: p50, p99"
        p50 = percentile(taken, 50)
        p99 = percentile(taken, 99)
        print(f"{what:40} {p50:.2f} {p99:.2f} ({len(taken)})")
    print(f"{'p99, with replays to quiet':40} {slower:.1f}")
    print(f"{'slow log ms: longest, number over 25':40} {longest_ms:.1f} {len(over)}")
    is_large = options.event_bytes >= SMALL_BYTES
    limits = {
        "a page was not sent everything": len(done) < options.pages,
        "too much was read from Redis": is_large and read > MOST_READ,
    }
    if not options.quick:
        limits |= {
            "a replay took too long by the clock": len(over) > 0,
            "a replay took too much of a processor": replay_ms > MOST_REPLAY_MS,
            "publishing took too long": slower > MOST_P99,
        }
    return [what for what in limits if limits[what]]


parser = argparse.ArgumentParser(description="What large replays cost those who publish meanwhile.")
parser.add_argument("--pages", type=int, default=8, help="that come back at once (8)")
parser.add_argument("--events", type=int, default=20, help="on each channel (20)")
parser.add_argument("--event-bytes", type=int, default=50_000, help="(50000)")
parser.add_argument("--quick", action="store_true", help="2 events on each channel, and no limits of time")
options = parser.parse_args()
if options.quick:
    options.events = 2
with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    redis_process = RedisProcess(Path(folder))
    stack.callback(redis_process.kill)
    server_process = ServerProcess(redis_process, "--max-backlog", str(2**25))
    stack.callback(server_process.terminate)
    beyond = measure(redis_process, server_process)
for line in beyond:
    print(line)
sys.exit(1 if beyond else 0)
