"""What is on its way between Redis and ssepush, held up there by a proxy."""

from __future__ import annotations

import re
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
            ssepush.publish(str(number + 1), channel=channel, redis_url=redis_process.url)
        assert leaves.data(20) == kit.numbers(0, 20)

        coming_back = threads.submit(server.stream, channel, Last_Event_ID=leaves.last_event_id)
        wait_for(lambda: server.streams() == 2, "it is coming back")
        proxy.is_open.set()
        elsewhere.publish("last", channel)

        assert coming_back.result().next().data == "last"
        assert stays.data(21) == [*kit.numbers(0, 20), "last"]


class CuttingProxy(kit.RedisProxy):
    """Whoever reads a history has the connection closed instead of an answer."""

    def changed(self, received: bytes, is_from_redis: bool, link: kit.Link) -> bytes:
        if b"XREVRANGE" in received and not is_from_redis:
            raise ConnectionError
        return received


@both_ways
def test_a_page_whose_history_redis_did_not_answer_is_told_to_come_back(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    with CuttingProxy(redis_process) as proxy:
        server = start(redis=proxy.url)
        missed = str(ssepush.publish("missed", channel=channel, redis_url=redis_process.url).id)

        with server.stream(channel, Last_Event_ID=missed) as stream:
            assert stream.until_end() == []

        assert stream.says_why(), stream.parser.comments
        assert stream.comes_back_after()
        assert server.refused("redis-away") == 1
        assert server.streams() == 0


DATA = ["one", "", "*2\r\n$3\r\n", "é" * 300, "last"]


@both_ways
@pytest.mark.parametrize("size", [1, 7, 64])
def test_what_comes_from_redis_in_pieces_is_whole_live_and_after_a_return(
    redis_process: RedisProcess, start: Start, channel: str, size: int
) -> None:
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


class SwallowingProxy(kit.RedisProxy):
    """Messages in which it says "swallowed" do not arrive."""

    SWALLOWED = re.compile(rb"[*>]3\r\n\$7\r\nmessage\r\n\$\d+\r\n[^\r]*\r\n\$\d+\r\n[^\r]*swallowed[^\r]*\r\n")

    def changed(self, received: bytes, is_from_redis: bool, link: kit.Link) -> bytes:
        return self.SWALLOWED.sub(b"", received)


@both_ways
@pytest.mark.parametrize("follows", [True, False], ids=["an event follows there", "none follows"])
def test_a_hole_on_one_channel_is_told_to_the_streams_that_follow_it_and_the_others_go_on(
    redis_process: RedisProcess, start: Start, channel: str, follows: bool
) -> None:
    holed, whole = f"{channel}-holed", f"{channel}-whole"

    def publish(data: str, name: str) -> str:
        return str(ssepush.publish(data, channel=name, redis_url=redis_process.url).id)

    with SwallowingProxy(redis_process) as proxy:
        server = start("--heartbeat", "1", redis=proxy.url)
        with server.opened(holed, whole) as told, server.opened(whole) as other:
            publish("swallowed", holed)
            newest = publish("on the other channel", whole)
            if follows:
                publish("after the hole", holed)
            *before, reset = told.until_end()
            publish("still here", whole)
            went_on = other.data(2)
        with server.stream(holed, whole, Last_Event_ID=reset.id) as back:
            publish("last", holed)
            since = back.until("last")

    assert [event.data for event in before] == ["on the other channel"]
    assert (reset.type, reset.json) == ("stream-reset", {"reason": "missed"})
    assert reset.id >= newest
    assert told.parser.comments[-1] == "events were missed"
    assert told.comes_back_after()
    assert went_on == ["on the other channel", "still here"]
    assert set(since) <= {"after the hole", "still here"}
    assert server.closed("missed") == 1
