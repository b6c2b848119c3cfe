"""What honest requests notice of strangers: a flood of connections that say nothing, and two that keep a thread each.

    python bench/strangers.py                          900 connections a second for 5 s
    python bench/strangers.py --per-s 300 --seconds 20

It prints how many requests were answered, one after the other, how long they took, and how many were not answered
within two seconds: of these there must be none, or it ends with status 1. The times are for information.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.kit import RedisProcess, ServerProcess, allow_files
from tests.test_load import KEEP_THREADS, MOST_OF_A_FLOOD, flood, is_answered


def measure(server: ServerProcess, name: str) -> int:
    """Print a line; how many requests were not answered."""
    taken = []
    failed = 0
    keep = KEEP_THREADS.get(name)
    ends_at = time.monotonic() + options.seconds
    with flood(server.port, options.per_s):
        while time.monotonic() < ends_at:
            with contextlib.ExitStack() as stack:
                if keep:  # again and again, since those that wait for long are ended to make room
                    stack.enter_context(keep(server.port))
                    stack.enter_context(keep(server.port))
                for _ in range(20):
                    began = time.perf_counter()
                    failed += not is_answered(server.port)
                    taken_s = time.perf_counter() - began
                    taken.append(1000 * taken_s)
    taken.sort()
    p50 = taken[len(taken) // 2]
    p99 = taken[len(taken) * 99 // 100]
    asked = len(taken)
    print(f"{name:20} {asked:6} {failed:12} {p50:8.1f} {p99:8.1f}", flush=True)
    return failed


parser = argparse.ArgumentParser(description="What honest requests notice of strangers.")
parser.add_argument("--per-s", type=int, default=900, help="new connections that say nothing (900)")
parser.add_argument("--seconds", type=float, default=5.0, help="of each flood (5)")
options = parser.parse_args()
allow_files(MOST_OF_A_FLOOD + 1000)
unanswered = 0
print(f"{'beside two that':20} {'asked':>6} {'not answered':>12} {'p50 ms':>8} {'p99 ms':>8}")
for kept in ("are not there", *KEEP_THREADS):
    with contextlib.ExitStack() as started:
        folder = started.enter_context(tempfile.TemporaryDirectory())
        redis_process = RedisProcess(Path(folder))
        started.callback(redis_process.kill)
        server_process = ServerProcess(redis_process)
        started.callback(server_process.terminate)
        unanswered += measure(server_process, kept)
sys.exit(1 if unanswered else 0)
