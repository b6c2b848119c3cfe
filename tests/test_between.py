"""What is on its way between Redis and ssepush, held up there by a proxy."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import ssepush
from tests import kit
from tests.kit import RedisProcess, Start, both_ways, wait_for
from tests.messages import as_read


class HoldingProxy(kit.RedisProxy):
    """What Redis sends to subscribers waits here while `is_open` is not set."""

    def __init__(self, redis_process: RedisProcess) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        super().__init__(redis_process)

    def changed(self, received: bytes, is_from_redis: bool, link: kit.Link) -> bytes:
        if link.is_subscribed and is_from_redis:
            self.is_open.wait(kit.DEADLINE_S)
        return received


def test_what_a_page_has_seen_is_not_sent_to_it_again(redis_process: RedisProcess, start: Start, channel: str) -> None:
    elsewhere = start(redis=redis_process)
    proxy = HoldingProxy(redis_process)
    with proxy, ThreadPoolExecutor() as threads:
        server = start("--shared", redis=proxy.url)
        stays = server.opened(channel)
        leaves = elsewhere.opened(channel)
        proxy.is_open.clear()
        for number in range(0, 20, 2):
            redis_process.publish(channel, str(number))  # no id of ours: a page's position tells nothing about it
            ssepush.publish(str(number + 1), channel=channel, redis_url=redis_process.url)
        assert leaves.data(20) == kit.numbers(0, 20)

        coming_back = threads.submit(server.stream, channel, Last_Event_ID=leaves.last_event_id)
        wait_for(lambda: server.streams() == 2, "it is coming back")
        proxy.is_open.set()
        elsewhere.publish("last", channel)

        assert coming_back.result().next().data == "last"
        assert stays.data(21) == [*kit.numbers(0, 20), "last"]


class CuttingProxy(kit.RedisProxy):
    """Whoever reads a history has the connection closed instead of an answer; or nothing comes from then on."""

    hangs = is_asked = False

    def changed(self, received: bytes, is_from_redis: bool, link: kit.Link) -> bytes:
        self.is_asked |= b"XREVRANGE" in received and not is_from_redis
        if self.is_asked and not self.hangs:
            raise ConnectionError
        return b"" if self.is_asked else received


@both_ways
@pytest.mark.parametrize("hangs", [False, True], ids=["hangs up", "hangs"])
def test_who_gets_no_history_comes_back(redis_process: RedisProcess, start: Start, channel: str, hangs: bool) -> None:
    with CuttingProxy(redis_process) as proxy:
        proxy.hangs = hangs
        server = start("--heartbeat", "0.5", redis=proxy.url)
        missed = server.publish_id("missed", channel)
        streams = [server.stream(name, Last_Event_ID=missed) for name in (channel, f"{channel}-other")]

        for stream in streams:
            assert stream.until_end() == []
            assert stream.says_why(), stream.parser.comments
            assert stream.comes_back_after()
        assert server.refused("redis-away") == 2
        assert server.streams() == 0


DATA = ["one", "", "*2\r\n$3\r\n", "é" * 300, "last"]


@both_ways
@pytest.mark.parametrize("size", [1, 7, 64])
def test_pieces_from_redis_become_whole(redis_process: RedisProcess, start: Start, channel: str, size: int) -> None:
    with kit.RedisProxy(redis_process) as proxy:
        proxy.size = size
        server = start(redis=proxy.url)
        first = str(ssepush.publish("first", channel=channel, redis_url=redis_process.url).id)
        with server.opened(channel, f"{channel}-other") as live:
            redis_process.publish(channel, b"\xff")
            for data in DATA:
                ssepush.publish(data, channel=channel, redis_url=redis_process.url)
            came = live.data(len(DATA))
        with server.stream(channel, f"{channel}-other", Last_Event_ID=first) as back:
            missed = back.data(len(DATA))
        dropped = server.dropped("message is not UTF-8")

    assert came == missed == [as_read(data) for data in DATA]
    assert dropped == 1
