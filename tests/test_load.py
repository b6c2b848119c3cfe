"""Floods, leaks and chaos: whatever is thrown at a server, it goes on, and keeps nothing of it."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import ssepush
from tests.kit import (
    DEADLINE_S,
    HERE,
    IDLE_THREADS,
    Baseline,
    EventStream,
    RedisProcess,
    ServerProcess,
    Start,
    both_ways,
    connections,
    is_closed,
    post,
    request,
    stopped,
    wait_for,
)

# ── Leaks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fill_pool(server: ServerProcess, redis: RedisProcess) -> None:
    """Make the server open all the connections that its pool may have, by asking for more while Redis is stopped."""
    idle = server.descriptors()
    publishers = [threading.Thread(target=server.publish, args=("", "pool")) for _ in range(40)]
    with stopped(redis.process):
        for publisher in publishers:
            publisher.start()
        wait_for(lambda: server.descriptors() >= idle + 40 + 31, "all its connections to Redis are in use")
    for publisher in publishers:
        publisher.join()


def mixed_load(server: ServerProcess, channel: str) -> None:
    """Streams of every kind, to their end; three waves, so that caches and the allocator have what they need."""
    for _ in range(3):
        mixed_wave(server, channel)


def mixed_wave(server: ServerProcess, channel: str) -> None:
    streams = [server.opened(channel, f"{channel}-{number % 7}") for number in range(80)]
    for number in range(100):
        server.publish(f"{number} {'x' * 500}", channel)
    streams[0].take(100)
    position = streams[0].parser.last_event_id
    for stream in streams[:20]:
        stream.close()
    for stream in streams[20:40]:
        stream.reset()
    for stream in streams[40:50]:
        stream.sock.shutdown(socket.SHUT_WR)
    streams += [server.opened(channel, Last_Event_ID=event_id) for event_id in (position, "foreign") * 10]
    for path in ("/nothing", "/stream?channel=", "/healthz", "/", "/metrics") * 4:
        server.get(path)
    for sent in (b"GET /str", b"\r\n\r\n", b"POST /publish HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
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
    server = start("--heartbeat", "1", "--history", "50", redis=own_redis)
    server.opened(channel).close()
    wait_for(lambda: server.closed("gone"), "the stream is closed")
    wait_for(lambda: server.threads() == IDLE_THREADS, "all is quiet")
    fill_pool(server, own_redis)

    def held() -> dict[str, float]:
        streams = server.streams()
        wait_for(lambda: server.threads() == IDLE_THREADS, "no thread is left")
        return {
            "streams": streams,
            "descriptors": server.descriptors(),
            "Redis clients": len(own_redis.client.client_list()),
        }

    baseline, resident = held(), []
    for _ in range(2):
        mixed_load(server, channel)
        wait_for(lambda: held() == baseline, f"back to {baseline}")
        resident.append(server.resident_bytes())

    assert resident[1] <= 1.05 * resident[0]


def test_large_events_do_not_stay_in_memory(start: Start, channel: str) -> None:
    server = start()
    with server.opened(channel) as stream:
        before = server.resident_bytes()

        for number in range(150):
            ssepush.publish(
                f"{number} {'x' * 900_000}",
                channel=channel,
                redis_url=server.redis.url,
                history=1,
            )
            assert stream.next().data.startswith(f"{number} ")

        assert server.resident_bytes() - before < 80_000_000


# ── All of it at once ────────────────────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_a_short_chaos_run_loses_doubles_and_reorders_nothing(way: tuple[str, ...]) -> None:
    options = [
        "--streams",
        "30",
        "--events",
        "800",
        "--seconds",
        "5",
        "--latency-seconds",
        "0",
        "--seed",
        "1",
        *way,
    ]
    command = [
        sys.executable,
        str(HERE / "bench" / "chaos.py"),
        *options,
    ]

    chaos = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert chaos.returncode == 0, chaos.stdout + chaos.stderr
    figures = dict(re.findall(r"^(lost|doubled|reordered|unannounced gaps) +(\d+)$", chaos.stdout, re.MULTILINE))
    assert figures == dict.fromkeys(("lost", "doubled", "reordered", "unannounced gaps"), "0")


# ── Floods ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.alone
def test_five_thousand_silent_connections_disturb_nobody(
    start: Start,
    channel: str,
    many_files: None,
) -> None:
    server = start()
    baseline = Baseline(server, channel)

    with connections(server.port, 5000) as silent:
        baseline.publish("meanwhile")
        baseline.newcomer()
        wait_for(
            lambda: server.descriptors() < baseline.descriptors + 1100,
            "the oldest are ended",
            5.0,
        )
        assert is_closed(silent[0])

    baseline.end()


@pytest.mark.alone
def test_five_hundred_slow_senders_disturb_nobody_and_end_on_time(
    start: Start,
    channel: str,
    many_files: None,
) -> None:
    server = start()
    baseline = Baseline(server, channel)
    ended = threading.Event()

    def trickle(socks: list[socket.socket]) -> None:
        while not ended.wait(1.0):
            for sock in socks:
                with contextlib.suppress(OSError):
                    sock.send(b"a")

    heads = connections(server.port, 450, b"GET /stream?channel=")
    bodies = connections(
        server.port,
        50,
        post(b"Content-Length: 1000", body=b"{"),
    )
    with heads as slow_heads, bodies as slow_bodies:
        sender = threading.Thread(target=trickle, args=([*slow_heads, *slow_bodies],))
        sender.start()
        try:
            wait_for(lambda: server.threads() >= 500, "all of them hold a thread")
            baseline.publish("meanwhile")
            baseline.newcomer()
            wait_for(
                lambda: all(map(is_closed, slow_heads)),
                "slow heads are ended",
                ssepush.HEAD_S + 5,
            )
        finally:
            ended.set()
            sender.join()

    baseline.end()


@pytest.fixture
def few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that are started from now on may have 400 open files, a hundred of them for pending connections."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -n 400 && exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.mark.alone
def test_out_of_descriptors_the_server_neither_spins_nor_stops(
    start: Start, channel: str, few_files: None, many_files: None
) -> None:
    server = start("--max-streams", "20")
    baseline = Baseline(server, channel)
    began, used = time.monotonic(), server.cpu_s()

    with connections(server.port, 1000):
        baseline.publish("meanwhile")
        baseline.newcomer()
        wait_for(lambda: time.monotonic() > began + 3, "the flood lasts")
        assert server.cpu_s() - used < 0.5 * (time.monotonic() - began)

    baseline.end()


@pytest.mark.alone
def test_without_a_free_descriptor_the_accept_loop_does_not_spin(start: Start, channel: str) -> None:
    server = start("--heartbeat", "0.5")
    baseline = Baseline(server, channel)
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(
        server.process.pid,
        resource.RLIMIT_NOFILE,
        (baseline.descriptors, limits[1]),
    )
    comments, used = len(baseline.stream.parser.comments), server.cpu_s()

    with connections(server.port, 20):
        baseline.stream.wait(lambda: len(baseline.stream.parser.comments) >= comments + 4, "the stream goes on for 2 s")

        assert server.cpu_s() - used < 0.5
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)
        baseline.publish("meanwhile")

    baseline.end()


@pytest.mark.alone
def test_connections_that_take_no_answer_are_ended(
    start: Start,
    channel: str,
    many_files: None,
) -> None:
    server = start()
    baseline = Baseline(server, channel)

    with connections(server.port, 300, request(b"GET / HTTP/1.1") * 200):
        wait_for(lambda: server.threads() >= 290, "all of them hold a thread")
        baseline.publish("meanwhile")
        baseline.newcomer()

    baseline.end()


@pytest.mark.alone
def test_connections_that_take_no_answer_make_room_for_others(
    start: Start, channel: str, few_files: None, many_files: None
) -> None:
    server = start("--max-streams", "20")
    baseline = Baseline(server, channel)

    with connections(server.port, 200, request(b"GET / HTTP/1.1") * 200):
        wait_for(lambda: server.threads() >= 90, "as many as may wait hold a thread")
        baseline.newcomer()  # who comes after all of them
        wait_for(lambda: server.threads() <= 110, "the others are ended")
        baseline.publish("meanwhile")

    baseline.end()


@pytest.mark.alone
def test_a_stopped_redis_does_not_let_requests_pile_up(own_redis: RedisProcess, start: Start) -> None:
    server = start(redis=own_redis)
    assert server.get("/healthz").status == 200
    wait_for(lambda: server.threads() <= 3, "only its own threads run")
    threads, descriptors = server.threads(), server.descriptors()
    own_redis.signal(signal.SIGSTOP)

    with (
        connections(server.port, 300, request(b"GET /healthz HTTP/1.1")),
        connections(server.port, 100, request(b"GET /stream HTTP/1.1")),
    ):
        wait_for(lambda: server.threads() > threads + 100, "they wait for Redis")
        wait_for(
            lambda: server.get("/metrics").status == 200,
            "the others are served",
            2.0,
        )
        wait_for(lambda: server.threads() <= threads + 1, "they have been told that Redis is away")
    own_redis.signal(signal.SIGCONT)

    wait_for(lambda: server.get("/healthz").status == 200, "Redis is back")
    wait_for(lambda: server.threads() <= threads and server.descriptors() <= descriptors + 32, "nothing is left")


def test_all_places_for_numbers_taken_leave_the_rest_alone(start: Start, channel: str) -> None:
    server = start()
    baseline = Baseline(server, channel)
    counting = [EventStream(server.port, "/numbers") for _ in range(ssepush.MAX_NUMBERS)]

    refused = EventStream(server.port, "/numbers")
    assert (refused.status, refused.until_end()) == (200, [])
    assert refused.parser.retry_ms
    baseline.publish("meanwhile")
    for stream in counting:
        stream.reset()

    baseline.end()


@pytest.mark.alone
def test_a_burst_of_channels_does_not_hold_up_the_others(
    start: Start,
    channel: str,
    many_files: None,
) -> None:
    server = start("--shared")
    baseline = Baseline(server, channel)
    queries = [b"&".join(b"channel=%d-%d" % (number, n) for n in range(20)) for number in range(300)]

    with contextlib.ExitStack() as stack:
        for query in queries:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), DEADLINE_S))
            sock.sendall(request(b"GET /stream?" + query + b" HTTP/1.1"))
        baseline.publish("meanwhile")
        wait_for(lambda: server.streams() == 301, "all of them are open")
    baseline.publish("meanwhile")

    baseline.end()
