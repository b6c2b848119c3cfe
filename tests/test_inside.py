"""What cannot be seen from outside: the parts of ssepush.py, each by itself. They change when its inside does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any

import pytest

import ssepush
from tests.kit import DEADLINE_S, dispatched, resp_array, wait_for

# ── Ids and marks ────────────────────────────────────────────────────────────────────────────────────────────────────

KEY = b"k" * 40
OLDER = "1764000000000-1764000000000000"
OURS = "1764000000001-1764000000000001"


def test_positions_are_in_the_order_of_their_ids_and_empty_for_foreign_ones() -> None:
    times = (1764000000000, 1764000000001, 9999999999999)
    numbers = (1000000000000000, 1000000000000001, 2**53 - 1)

    positions = [ssepush.position_of(f"{ms}-{seq}") for ms in times for seq in numbers]

    assert positions == sorted(set(positions))
    assert positions[0]
    for foreign in (None, "", "7", "1-2-3", "a" + OURS[1:], "１" + OURS[1:], OURS + "\n", OURS + "0", "0" + OURS):
        assert ssepush.position_of(foreign) == ""


def message(channel: bytes, event_id: str = OURS, previous: str = OLDER, mark_key: bytes = KEY) -> bytes:
    """What a script of ours publishes."""
    mark = ssepush.mark_of(mark_key, event_id, previous, channel)
    return f'{{"data": "hi", "id": "{event_id}", "previous": "{previous}", "mark": "{mark}"}}'.encode()


def test_an_id_counts_with_its_mark() -> None:
    framed = ssepush.framed(message(b"c"), b"c", KEY)

    assert (framed.position, framed.previous) == (OURS, OLDER)
    assert dispatched(framed.frame).id == OURS


FORGED = {
    "without a mark": f'{{"data": "hi", "id": "{OURS}"}}'.encode(),
    "of another channel": message(b"other"),
    "of another key": message(b"c", mark_key=b"x" * 40),
    "with another previous": message(b"c").replace(OLDER.encode(), OURS.encode()),
    "a mark that is no text": f'{{"data": "hi", "id": "{OURS}", "mark": 7}}'.encode(),
}


@pytest.mark.parametrize("name", FORGED)
def test_an_id_of_our_form_without_its_mark_is_not_sent_and_the_event_is(name: str) -> None:
    framed = ssepush.framed(FORGED[name], b"c", KEY)

    assert framed.position == ""
    assert dispatched(framed.frame) == ("hi", "message", "")


def test_an_id_of_a_counter_that_knows_no_marks_counts_as_it_is() -> None:
    framed = ssepush.framed(f'{{"data": "hi", "id": "{OURS}"}}'.encode(), b"c", b"")

    assert framed.position == OURS


# ── What Redis sends ─────────────────────────────────────────────────────────────────────────────────────────────────

REPLIES = b"".join(
    [
        b"*2\r\n$30\r\n" + OLDER.encode() + b"\r\n$40\r\n" + KEY + b"\r\n",
        b"*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n",
        resp_array(b"message", b"a", b"one\r\n$3\r\n*2\r\n"),
        resp_array(b"message", b"a", b""),
        resp_array(b"message", b"b", message(b"b")),
        resp_array(b"message", b"b", b"\xff"),
        resp_array(b"message", b"a", b"three"),
        b"-NOPERM not this channel\r\n",
        b"*2\r\n$-1\r\n$-1\r\n",
        b">3\r\n$11\r\nunsubscribe\r\n$1\r\na\r\n:0\r\n",
    ]
)


def parsed(chunks: Sequence[bytes]) -> tuple[list[Any], list[ssepush.Answer], list[Any]]:
    """Events, answers, and what was dropped, when a subscriber reads the bytes in these chunks."""
    events: list[Any] = []
    answers: list[ssepush.Answer] = []
    drops: list[Any] = []
    rest, missing = b"", 0
    for number, chunk in enumerate(chunks, 1):
        rest += chunk
        read = ssepush.parse(rest, KEY, 1000)
        still_to_come = sum(map(len, chunks[number:]))
        assert read.missing <= still_to_come
        assert bool(read.missing) == bool(read.rest)
        rest, missing = read.rest, read.missing
        for part in read.parts:
            if isinstance(part, ssepush.Answer):
                answers.append(part)
                continue
            assert part.plain == b"".join(event.frame for event in part.events)
            events += [(part.channel, event.position, event.frame) for event in part.events]
        drops += read.dropped
    assert (rest, missing) == (b"", 0)
    return events, answers, drops


def test_replies_of_redis_are_the_same_however_they_are_cut_into_reads() -> None:
    events, answers, drops = whole = parsed([REPLIES])

    assert [event[:2] for event in events] == [(b"a", ""), (b"a", ""), (b"b", OURS), (b"a", "")]
    assert [dispatched(frame).data for _, _, frame in events] == ["one\n$3\n*2\n", "", "hi", "three"]
    assert drops == [(b"b", "message is not UTF-8")]
    assert [answer.counter for answer in answers] == [(OLDER, KEY), None, None, ("", b""), None]
    assert "NOPERM" in answers[2].error
    for cut in range(1, len(REPLIES)):
        assert parsed([REPLIES[:cut], REPLIES[cut:]]) == whole
    assert parsed([REPLIES[at : at + 1] for at in range(len(REPLIES))]) == whole
    assert parsed([REPLIES[at : at + 7] for at in range(0, len(REPLIES), 7)]) == whole


def batch(*events: tuple[str, str]) -> ssepush.Batch:
    """Events of the channel c with these positions, each with the one before it."""
    return ssepush.batch_of(b"c", [ssepush.Framed(b"data: x\n\n", *event) for event in events])


def test_a_subscriber_notices_an_event_that_is_missing_between_reads_and_within_one() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        subscriber = ssepush.Subscriber(ours, ssepush.COUNTER_KEY)

        assert subscriber.follows(batch(("2", "1")))
        assert subscriber.follows(batch(("3", "2"), ("5", "3")))
        assert subscriber.follows(batch(("3", "2")))  # once more: nothing is missing
        assert not subscriber.follows(batch(("9", "7")))
        assert not subscriber.follows(batch(("6", "5"), ("9", "7")))


# ── The relay ────────────────────────────────────────────────────────────────────────────────────────────────────────


class RelayBetween:
    """A relay of its own between a Redis and browsers that the test plays itself, over socket pairs."""

    def __init__(self) -> None:
        self.ended: SimpleQueue[None] = SimpleQueue()
        self.missed: SimpleQueue[list[ssepush.Stream]] = SimpleQueue()
        settings = ssepush.Settings(drain=0.1)
        self.relay = ssepush.Relay(
            settings, lambda missed, chunked, streams: self.missed.put(streams), lambda: self.ended.put(None)
        )
        self.redis, ours = socket.socketpair()
        self.redis.settimeout(DEADLINE_S)
        ours.setblocking(False)
        self.subscriber = ssepush.Subscriber(ours, ssepush.COUNTER_KEY)
        self._thread = threading.Thread(target=self.relay.run)

    def __enter__(self) -> RelayBetween:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.relay.call(self.relay.drain)
        self._thread.join(DEADLINE_S)
        self.redis.close()

    def open(self, *channels: bytes, missed: ssepush.Missed | None = None) -> tuple[ssepush.Stream, socket.socket]:
        """A new stream, and its browser."""
        browser, ours = socket.socketpair()
        browser.settimeout(DEADLINE_S)
        ours.setblocking(False)
        stream = ssepush.Stream(1, "127.0.0.1", channels, chunked=False, sock=ours, opening=b"HEAD\n", missed=missed)
        self.relay.call(self.relay.open, stream, self.subscriber)
        return stream, browser

    def is_asked(self, *channels: bytes) -> None:
        """Wait until Redis has been asked for the counter, and to subscribe to these."""
        wanted = ssepush.command("HMGET", ssepush.COUNTER_KEY, "newest", "key")
        wanted += b"".join(ssepush.command("SUBSCRIBE", channel) for channel in channels)
        assert self.redis.recv(len(wanted), socket.MSG_WAITALL) == wanted

    def answer(self, *channels: bytes) -> None:
        """Answer that."""
        self.redis.sendall(b"*2\r\n$30\r\n" + OLDER.encode() + b"\r\n$40\r\n" + KEY + b"\r\n")
        for channel in channels:
            self.redis.sendall(b"*3\r\n$9\r\nsubscribe\r\n$1\r\n%b\r\n:1\r\n" % channel)


def wait_until_held(stream: ssepush.Stream, number: int) -> None:
    wait_for(lambda: len(stream.held or ()) == number, f"{number} reads are held")


def read_until(sock: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        chunk = sock.recv(4096)
        assert chunk, received
        received += chunk
    return received


def test_a_stream_is_told_its_position_when_redis_has_confirmed_and_what_came_before_is_not_for_it() -> None:
    with RelayBetween() as between:
        _, browser = between.open(b"c")
        with browser:
            between.is_asked(b"c")
            between.redis.sendall(resp_array(b"message", b"c", b"too early"))
            between.answer(b"c")
            between.redis.sendall(resp_array(b"message", b"c", b"hello"))

            received = read_until(browser, b"hello\n\n")

    assert received.startswith(b"HEAD\nevent: stream-position\nid: " + OLDER.encode() + b"\n")
    assert b"too early" not in received


def test_a_redis_that_answers_what_was_not_asked_is_left_and_the_stream_told_to_come_back() -> None:
    with RelayBetween() as between:
        _, browser = between.open(b"c")
        with browser:
            between.is_asked(b"c")
            between.answer(b"c")
            read_until(browser, b"data: \n\n")

            between.redis.sendall(b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n")

            assert b": Redis is away\nretry: " in read_until(browser, b"\n\n")
            between.ended.get(timeout=DEADLINE_S)
            assert between.redis.recv(1) == b""


def test_streams_that_miss_the_same_are_read_once_and_others_apart() -> None:
    missed = ssepush.missed_since(OLDER, [b"c"])
    with RelayBetween() as between:
        first, browser = between.open(b"c", missed=missed)
        with browser:
            between.is_asked(b"c")
            second, other_browser = between.open(b"c", missed=missed)
            with other_browser:
                between.is_asked(b"c")
                between.answer(b"c")
                between.answer(b"c")
                streams = between.missed.get(timeout=DEADLINE_S)
                if len(streams) == 1:  # the answers came in two wake-ups
                    streams += between.missed.get(timeout=DEADLINE_S)

                assert set(streams) == {first, second}
                with pytest.raises(Empty):
                    between.missed.get(block=False)
                page = ssepush.Page(b"data: missed\n\n", 1, OURS)
                between.relay.call(between.relay.take_page, page, streams)
                for each in (browser, other_browser):
                    assert read_until(each, b"missed\n\n") == b"HEAD\ndata: missed\n\n"
                wait_for(lambda: between.relay.replay_bytes == 0, "the page is taken")


def test_a_stream_that_resumed_is_not_sent_again_what_the_replay_had() -> None:
    with RelayBetween() as between:
        _, browser = between.open(b"c", missed=ssepush.missed_since(OLDER, [b"c"]))
        with browser:
            between.is_asked(b"c")
            between.answer(b"c")
            streams = between.missed.get(timeout=DEADLINE_S)
            between.redis.sendall(resp_array(b"message", b"c", message(b"c")))
            between.redis.sendall(resp_array(b"message", b"c", b"plain"))
            page = ssepush.Page(b"data: replayed\n\n", 1, OURS)
            wait_for(lambda: streams[0].held and sum(len(held.events) for held in streams[0].held) == 2, "it is held")

            between.relay.call(between.relay.take_page, page, streams)

            assert read_until(browser, b"plain\n\n") == b"HEAD\ndata: replayed\n\ndata: plain\n\n"


def test_an_error_of_ours_while_events_are_passed_on_ends_the_streams_that_they_were_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with RelayBetween() as between:
        _, browser = between.open(b"c")
        with browser:
            between.is_asked(b"c")
            between.answer(b"c")
            read_until(browser, b"data: \n\n")
            monkeypatch.setattr(between.relay, "_count_sent", lambda *_: (_ for _ in ()).throw(MemoryError()))

            between.redis.sendall(resp_array(b"message", b"c", b"hello"))

            assert b"retry: " in read_until(browser, b"retry: ")
            between.ended.get(timeout=DEADLINE_S)


def test_all_that_was_held_during_a_replay_is_sent_after_it_in_order() -> None:
    with RelayBetween() as between:
        stream, browser = between.open(b"c", missed=ssepush.missed_since(OLDER, [b"c"]))
        with browser:
            between.is_asked(b"c")
            between.answer(b"c")
            streams = between.missed.get(timeout=DEADLINE_S)
            for number in range(1, 4):
                between.redis.sendall(resp_array(b"message", b"c", b"%d" % number))
                wait_until_held(stream, number)

            between.relay.call(between.relay.take_page, ssepush.Page(b"data: 0\n\n", 1, OURS), streams)

            assert read_until(browser, b"data: 3\n\n") == b"HEAD\n" + b"".join(b"data: %d\n\n" % n for n in range(4))
