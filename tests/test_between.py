"""What is on its way between Redis and ssepush, held up there by a proxy."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import ssepush
from tests.kit import (
    DEADLINE_S,
    HERE,
    RedisProcess,
    Start,
    WithholdingProxy,
    both_ways,
    close_with_reset,
    numbers,
    wait_for,
)


class HoldingProxy(WithholdingProxy):
    """Stands before Redis. What Redis sends to subscribers waits here while `is_open` is not set."""

    def __init__(self, redis_process: RedisProcess) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        super().__init__(redis_process)

    def _pass_on(
        self,
        source: socket.socket,
        sink: socket.socket,
    ) -> None:
        is_to_subscriber = False
        with source, sink, contextlib.suppress(OSError):
            while received := source.recv(65536):
                if is_to_subscriber:
                    self.is_open.wait(DEADLINE_S)
                if b"\r\nsubscribe\r\n" in received:  # Redis's confirmation
                    is_to_subscriber = True
                sink.sendall(received)


def test_what_a_shared_subscriber_has_yet_to_read_is_not_sent_again_to_a_page_that_has_seen_it(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    elsewhere = start(redis=redis_process)
    proxy = HoldingProxy(redis_process)
    with proxy, ThreadPoolExecutor() as threads:
        server = start("--shared", redis=proxy.url)
        stays = server.opened(channel)
        leaves = elsewhere.opened(channel)
        proxy.is_open.clear()
        for number in range(0, 20, 2):
            redis_process.publish(channel, str(number))  # no id of ours: a page's position tells nothing about it
            ssepush.publish(
                str(number + 1),
                channel=channel,
                redis_url=redis_process.url,
            )
        assert leaves.data(20) == numbers(0, 20)

        coming_back = threads.submit(
            server.stream,
            channel,
            Last_Event_ID=leaves.last_event_id,
        )
        wait_for(lambda: server.streams() == 2, "it is coming back")
        proxy.is_open.set()
        elsewhere.publish("last", channel)

        assert coming_back.result().next().data == "last"
        assert stays.data(21) == [*numbers(0, 20), "last"]


class CuttingProxy(WithholdingProxy):
    """Stands before Redis. Whoever reads a history has the connection closed instead of an answer."""

    def _pass_on(
        self,
        source: socket.socket,
        sink: socket.socket,
    ) -> None:
        with source, sink, contextlib.suppress(OSError):
            while received := source.recv(65536):
                if b"'XRANGE'" in received:  # in the script
                    close_with_reset(source)
                sink.sendall(received)


@both_ways
def test_a_page_whose_history_redis_did_not_answer_is_told_to_come_back(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    with CuttingProxy(redis_process) as proxy:
        server = start(redis=proxy.url)
        missed = server.publish_id("missed", channel)

        with server.stream(channel, Last_Event_ID=missed) as stream:
            assert stream.until_end() == []

        assert stream.says_why(), stream.parser.comments
        assert stream.comes_back_after()
        assert server.refused("redis-away") == 1
        assert server.streams() == 0


FORKS = """
import contextlib, os, sys
import ssepush

channel, url = sys.argv[1:]
connections = ssepush.redis_at(url, 100, 86400, ssepush.MAX_EVENT_BYTES).connections

def publish(data):
    ssepush.publish(data, channel=channel, redis_url=url)

def hold_all_but(number, stack):
    for _ in range(connections.MOST - number):
        stack.enter_context(connections._one())

publish("parent")
with contextlib.ExitStack() as in_use:
    hold_all_but(0, in_use)
    child = os.fork()
    if not child:
        with contextlib.ExitStack() as in_use_too:
            hold_all_but(1, in_use_too)
            publish("child")
        os._exit(0)
    _, status = os.waitpid(child, 0)
publish("parent again")
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_process_that_is_forked_while_all_connections_are_in_use_has_as_many_of_its_own(
    redis_process: RedisProcess,
    start: Start,
    channel: str,
) -> None:
    server = start()
    with server.opened(channel) as stream:
        done = subprocess.run(
            [sys.executable, "-c", FORKS, channel, redis_process.url],
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

        assert done.returncode == 0, done.stderr
        assert stream.data(3) == ["parent", "child", "parent again"]
