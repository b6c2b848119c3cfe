"""What cannot be seen from outside: the parts of ssepush.py, each by itself. They change when its inside does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import pytest

import ssepush
from tests.kit import DEADLINE_S, dispatched, resp_array, wait_for

# ── Ids ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_positions_are_in_the_order_of_their_ids_and_empty_for_foreign_ones() -> None:
    times, numbers = (1764000000000, 1764000000001, 9999999999999), (1000000000000000, 1000000000000001, 2**53 - 1)

    positions = [ssepush.position_of(f"{ms}-{seq}") for ms in times for seq in numbers]

    assert positions == sorted(set(positions))
    assert positions[0]
    ours = "1764000000000-1000000000000000"
    for foreign in (None, "", "7", "1-2-3", "a" + ours[1:], "１" + ours[1:], ours + "\n", ours + "0", "0" + ours):
        assert ssepush.position_of(foreign) == ""


# ── What Redis sends ─────────────────────────────────────────────────────────────────────────────────────────────────


REPLIES = b"".join(
    [
        b"*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n",
        resp_array(b"message", b"a", b"one\r\n$3\r\n*2\r\n"),
        resp_array(b"message", b"a", b""),
        resp_array(b"message", b"b", '{"data": "二", "id": "1764000000000-1000000000000000"}'.encode()),
        resp_array(b"message", b"b", b"\xff"),
        resp_array(b"message", b"a", b"three"),
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


# ── The relay ────────────────────────────────────────────────────────────────────────────────────────────────────────


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

    def subscribe(
        self,
        *channels: bytes,
    ) -> tuple[ssepush.Stream, SimpleQueue[str]]:
        """A new stream, not live yet, and where its answer comes."""
        stream = ssepush.Stream(1, "127.0.0.1", channels, chunked=False)
        self.relay.call(
            self.relay.subscribe,
            stream,
            self.subscriber,
        )
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
        between.relay.call(
            between.relay.go_live,
            stream,
            ours,
            "",
        )

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
        between.relay.call(
            between.relay.go_live,
            stream,
            ours,
            "",
        )

        browser.settimeout(DEADLINE_S)
        assert browser.recv(100) == b"data: 3\n\n"


# ── The head of a request ────────────────────────────────────────────────────────────────────────────────────────────


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
