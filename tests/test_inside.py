"""What cannot be seen from outside: the parts of ssepush.py, each by itself. They change when its inside does."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import pytest

import ssepush
from tests.kit import (
    DEADLINE_S,
    HERE,
    EventStream,
    Page,
    Received,
    RedisProcess,
    ServerProcess,
    both_ways,
    connect,
    dispatched,
    numbers,
    query_of,
    request,
    resp_array,
    stopped,
    wait_for,
)

# ── Ids and marks ────────────────────────────────────────────────────────────────────────────────────────────────────

KEY = b"k" * 40
OLDER = "1764000000000-1764000000000000"
OURS = "1764000000001-1764000000000001"


def test_positions_are_in_the_order_of_their_ids_and_empty_for_foreign_ones() -> None:
    ids = [
        "1764000000000-1000000000000000",
        "1764000000000-1000000000000001",
        "1764000000000-9007199254740991",
        "1764000000001-1000000000000000",
        "1764000000001-1000000000000001",
        "1764000000001-9007199254740991",
        "9999999999999-1000000000000000",
        "9999999999999-1000000000000001",
        "9999999999999-9007199254740991",
    ]
    foreign = [
        None,
        "",
        "7",
        "1-2-3",
        "a764000000001-1764000000000001",
        "１764000000001-1764000000000001",
        "1764000000001-1764000000000001\n",
        "1764000000001-17640000000000010",
        "01764000000001-1764000000000001",
    ]

    positions = [ssepush.position_of(id) for id in ids]
    none = [ssepush.position_of(id) for id in foreign]

    assert positions == sorted(set(positions))
    assert positions[0]
    assert set(none) == {""}


UNMARKED = f'{{"data": "hi", "id": "{OURS}"}}'.encode()


def message(channel: bytes, key: bytes = KEY) -> bytes:
    """What a script of ours publishes."""
    mark = ssepush.mark_of(key, OURS, OLDER, channel)
    text = f'{{"data": "hi", "id": "{OURS}", "previous": "{OLDER}", "mark": "{mark}"}}'
    return text.encode()


def test_an_id_counts_with_its_mark() -> None:
    framed = ssepush.framed(message(b"c"), b"c", KEY)

    assert framed.position == OURS
    assert framed.previous == OLDER
    assert dispatched(framed.frame).id == OURS


def with_another_previous(message: bytes) -> bytes:
    older = OLDER.encode()
    assert older in message
    return message.replace(older, OURS.encode())


FORGED = {
    "without a mark": UNMARKED,
    "of another channel": message(b"other"),
    "of another key": message(b"c", key=b"x" * 40),
    "with another previous": with_another_previous(message(b"c")),
    "a mark that is no text": f'{{"data": "hi", "id": "{OURS}", "mark": 7}}'.encode(),
}


@pytest.mark.parametrize("name", FORGED)
def test_an_id_of_our_form_without_its_mark_is_not_sent_and_the_event_is(name: str) -> None:
    framed = ssepush.framed(FORGED[name], b"c", KEY)

    assert framed.position == ""
    assert dispatched(framed.frame) == Received("hi", "message", "")


def test_an_id_of_a_counter_that_knows_no_marks_counts_as_it_is() -> None:
    framed = ssepush.framed(UNMARKED, b"c", b"")

    assert framed.position == OURS


# ── What Redis sends ─────────────────────────────────────────────────────────────────────────────────────────────────

COUNTER = b"*2\r\n$30\r\n%b\r\n$40\r\n%b\r\n" % (OLDER.encode(), KEY)
REPLIES = [
    COUNTER,
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


class Parsed:
    """What a subscriber has got of the bytes that it has read."""

    def __init__(self) -> None:
        self.events: list[tuple[bytes, ssepush.Framed]] = []  # each with its channel
        self.answers: list[ssepush.Answer] = []
        self.dropped: list[tuple[bytes, str]] = []

    def add(self, read: ssepush.Read) -> None:
        self.dropped += read.dropped
        for part in read.parts:
            if isinstance(part, ssepush.Answer):
                self.answers.append(part)
            else:
                self.add_events(part)

    def add_events(self, batch: ssepush.Batch) -> None:
        frames = [event.frame for event in batch.events]
        assert batch.plain == b"".join(frames)
        for event in batch.events:
            self.events.append((batch.channel, event))

    def described(self) -> list[tuple[bytes, str, str]]:
        """The channel, the position and the data of each event."""
        found = []
        for channel, event in self.events:
            data = dispatched(event.frame).data
            found.append((channel, event.position, data))
        return found


def parsed(chunks: Sequence[bytes]) -> Parsed:
    """What a subscriber gets of the bytes when it reads them in these chunks."""
    result = Parsed()
    rest = b""
    still_to_come = sum(map(len, chunks))
    for chunk in chunks:
        still_to_come -= len(chunk)
        read = ssepush.parse(rest + chunk, KEY, 1000)
        rest = read.rest
        assert read.to_come <= still_to_come
        assert bool(read.to_come) == bool(rest)
        result.add(read)
    assert rest == b""
    return result


def in_chunks(replies: bytes, size: int) -> list[bytes]:
    starts = range(0, len(replies), size)
    return [replies[start : start + size] for start in starts]


def test_replies_of_redis_are_events_answers_and_what_is_dropped() -> None:
    whole = parsed([b"".join(REPLIES)])

    assert whole.described() == [
        (b"a", "", "one\n$3\n*2\n"),
        (b"a", "", ""),
        (b"b", OURS, "hi"),
        (b"a", "", "three"),
    ]
    assert whole.dropped == [(b"b", "message is not UTF-8")]
    counters = [answer.counter for answer in whole.answers]
    assert counters == [
        (OLDER, KEY),
        None,
        None,
        ("", b""),
        None,
    ]
    assert "NOPERM" in whole.answers[2].error


def test_replies_of_redis_are_the_same_however_they_are_cut_into_reads() -> None:
    replies = b"".join(REPLIES)
    cuts = range(1, len(replies))
    whole = parsed([replies])

    in_two = [parsed([replies[:cut], replies[cut:]]) for cut in cuts]
    by_byte = parsed(in_chunks(replies, 1))
    by_seven = parsed(in_chunks(replies, 7))

    for cut in [*in_two, by_byte, by_seven]:
        assert cut.events == whole.events
        assert cut.answers == whole.answers
        assert cut.dropped == whole.dropped


def batch(*events: tuple[str, str]) -> ssepush.Batch:
    """Events of the channel c with these positions, each with the one before it."""
    framed = [ssepush.Framed(b"data: x\n\n", *event) for event in events]
    return ssepush.batch_of(b"c", framed)


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
        self.relay = ssepush.Relay(settings, self._read_missed, self._end)
        self.redis, ours = pair()
        self.subscriber = ssepush.Subscriber(ours, ssepush.COUNTER_KEY)
        self._thread = threading.Thread(target=self.relay.run)

    def _read_missed(
        self,
        missed: ssepush.Missed,
        chunked: bool,
        streams: list[ssepush.Stream],
    ) -> None:
        self.missed.put(streams)

    def _end(self) -> None:
        self.ended.put(None)

    def __enter__(self) -> RelayBetween:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.relay.call(self.relay.drain)
        self._thread.join(DEADLINE_S)
        self.redis.close()

    def open(self, missed: ssepush.Missed | None = None) -> tuple[ssepush.Stream, socket.socket]:
        """A new stream of channel c, and its browser."""
        browser, ours = pair()
        stream = ssepush.Stream(
            1,
            "127.0.0.1",
            (b"c",),
            chunked=False,
            sock=ours,
            opening=b"HEAD\n",
            missed=missed,
        )
        self.relay.call(self.relay.open, stream, self.subscriber)
        return stream, browser

    def is_asked(self) -> None:
        """Wait until Redis has been asked for the counter, and to subscribe to the channel."""
        wanted = ssepush.command("HMGET", ssepush.COUNTER_KEY, "newest", "key")
        wanted += ssepush.command("SUBSCRIBE", b"c")
        assert self.redis.recv(len(wanted), socket.MSG_WAITALL) == wanted

    def answer(self) -> None:
        """Answer that."""
        self.redis.sendall(COUNTER)
        self.redis.sendall(SUBSCRIBED)

    def publish(self, message: bytes) -> None:
        """What Redis sends when somebody publishes it."""
        self.redis.sendall(resp_array(b"message", b"c", message))

    def replay(self, page: bytes, streams: list[ssepush.Stream]) -> None:
        """Give these streams what they missed, up to the newest."""
        events = ssepush.HistoryPage(page, 1, OURS)
        self.relay.call(self.relay.take_page, events, streams)


SUBSCRIBED = b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n"
MISSED = ssepush.missed_since(OLDER, [b"c"])


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection: the test's, and that of the relay, which never waits for it."""
    theirs, ours = socket.socketpair()
    theirs.settimeout(DEADLINE_S)
    ours.setblocking(False)
    return theirs, ours


def wait_until_held(stream: ssepush.Stream, number: int) -> None:
    """Wait until a stream keeps so many events until it has got what it missed."""

    def held() -> int:
        batches = stream.held or ()
        return sum(len(batch.events) for batch in batches)

    wait_for(lambda: held() == number, f"{number} events are held")


def read_until(sock: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        chunk = sock.recv(4096)
        assert chunk, received
        received += chunk
    return received


def test_a_stream_is_told_its_position_and_then_what_came_after_it() -> None:
    with RelayBetween() as between:
        _, browser = between.open()
        with browser:
            between.is_asked()
            between.answer()
            between.publish(b"hello")

            received = read_until(browser, b"hello\n\n")

    position = OLDER.encode()
    assert received.startswith(b"HEAD\nevent: stream-position\nid: %b\n" % position)


def test_what_a_shared_subscriber_reads_before_the_counter_is_covered_by_the_position_of_a_new_stream() -> None:
    with RelayBetween() as between:
        between.subscriber.is_shared = True
        _, browser = between.open()
        with browser:
            between.redis.sendall(SUBSCRIBED)
            between.publish(b"too early")
            between.redis.sendall(COUNTER)
            between.publish(b"hello")

            received = read_until(browser, b"hello\n\n")

    assert b"too early" not in received


def test_an_event_that_is_missing_between_a_replay_and_what_came_meanwhile_ends_the_stream() -> None:
    with RelayBetween() as between:
        stream, browser = between.open(MISSED)
        with browser:
            between.is_asked()
            between.answer()
            [streams] = [between.missed.get(timeout=DEADLINE_S)]
            position, lost, newest = (f"1764000000000-{number:016d}" for number in (5, 6, 7))
            mark = ssepush.mark_of(KEY, newest, lost, b"c")
            members = {"data": "later", "id": newest, "previous": lost, "mark": mark}
            between.publish(json.dumps(members).encode())
            wait_until_held(stream, 1)
            page = ssepush.HistoryPage(b"data: missed\n\n", 1, position)
            between.relay.call(between.relay.take_page, page, streams)

            received = read_until(browser, b"retry: ")

    assert b"events were missed" in received
    assert b"later" not in received


def test_a_redis_that_answers_what_was_not_asked_is_left_and_the_stream_told_to_come_back() -> None:
    with RelayBetween() as between:
        _, browser = between.open()
        with browser:
            between.is_asked()
            between.answer()
            read_until(browser, b"data: \n\n")

            between.redis.sendall(SUBSCRIBED)

            told = read_until(browser, b"\n\n")
            assert b": Redis is away\nretry: " in told
            between.ended.get(timeout=DEADLINE_S)
            assert between.redis.recv(1) == b""


def test_streams_that_miss_the_same_are_read_once_and_others_apart() -> None:
    with RelayBetween() as between:
        first, browser = between.open(MISSED)
        with browser:
            between.is_asked()
            second, other_browser = between.open(MISSED)
            with other_browser:
                between.is_asked()
                between.answer()
                between.answer()
                streams = between.missed.get(timeout=DEADLINE_S)
                if len(streams) == 1:  # the answers came in two wake-ups
                    streams += between.missed.get(timeout=DEADLINE_S)
                assert set(streams) == {first, second}
                assert between.missed.empty()

                between.replay(b"data: missed\n\n", streams)

                for each in (browser, other_browser):
                    received = read_until(each, b"missed\n\n")
                    assert received == b"HEAD\ndata: missed\n\n"
                wait_for(lambda: between.relay.counts["replay_bytes"] == 0, "the page is taken")


def test_a_stream_that_resumed_is_not_sent_again_what_the_replay_had() -> None:
    with RelayBetween() as between:
        stream, browser = between.open(MISSED)
        with browser:
            between.is_asked()
            between.answer()
            streams = between.missed.get(timeout=DEADLINE_S)
            assert streams == [stream]
            between.publish(message(b"c"))
            between.publish(b"plain")
            wait_until_held(stream, 2)

            between.replay(b"data: replayed\n\n", streams)

            received = read_until(browser, b"plain\n\n")
            assert received == b"HEAD\ndata: replayed\n\ndata: plain\n\n"


def test_all_that_was_held_during_a_replay_is_sent_after_it_in_order() -> None:
    with RelayBetween() as between:
        stream, browser = between.open(MISSED)
        with browser:
            between.is_asked()
            between.answer()
            streams = between.missed.get(timeout=DEADLINE_S)
            for number in (1, 2, 3):
                between.publish(b"%d" % number)
                wait_until_held(stream, number)

            between.replay(b"data: 0\n\n", streams)

            received = read_until(browser, b"data: 3\n\n")
            assert received == b"HEAD\ndata: 0\n\ndata: 1\n\ndata: 2\n\ndata: 3\n\n"


# ── A whole server of which a part is changed ────────────────────────────────────────────────────────────────────────


StartChanged = Callable[[str], ServerProcess]


@pytest.fixture
def start_changed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    redis_process: RedisProcess,
    way: tuple[str, ...],
) -> Iterator[StartChanged]:
    """Starts a server in which these lines were run first. Its errors are wanted: the test looks at them."""
    python = tmp_path / "python"
    program = tmp_path / "changed.py"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    python.chmod(0o755)

    def started(change: str) -> ServerProcess:
        lines = [
            "import sys",
            f"sys.path.insert(0, {str(HERE)!r})",
            "import ssepush",
            change,
            "ssepush.main(sys.argv[2:])",
        ]
        program.write_text("\n".join(lines))
        monkeypatch.setattr(sys, "executable", str(python))
        server = ServerProcess(redis_process, "--retry", "1", *way)
        stack.callback(server.terminate)
        return server

    with contextlib.ExitStack() as stack:
        yield started


FAULT = """
left = 3
holder, name, place, text = {fault}
without_fault = getattr(holder, name)

def with_fault(*arguments):
    global left
    if left and text in str(arguments[place]):
        left -= 1
        raise MemoryError
    return without_fault(*arguments)

setattr(holder, name, with_fault)
"""
FAULTS_OF_LIVE_EVENTS = {
    "being parsed": "ssepush, 'framed', 0, 'fault'",
    "being sent": "ssepush.Relay, '_deliver', 1, 'fault'",
}
FAULTS_OF_REPLAYS = {
    "being taken": "ssepush.Relay, 'count', 1, 'events_replayed_total'",
    "being sent": "ssepush.Relay, '_send', 2, 'fault'",
}
EVENTS = [
    *numbers(0, 5),
    "fault",
    *numbers(5, 10),
    "last",
]
PAGES = 6  # some of which the fault hits


def streams_of(pages: Sequence[Page]) -> int:
    """How many streams they have opened, all together."""
    return sum(page.streams for page in pages)


@both_ways
@pytest.mark.parametrize("fault", FAULTS_OF_LIVE_EVENTS)
def test_an_error_of_ours_before_a_live_event_is_sent_costs_no_page_an_event(
    start_changed: StartChanged,
    channel: str,
    fault: str,
) -> None:
    change = FAULT.format(fault=FAULTS_OF_LIVE_EVENTS[fault])
    server = start_changed(change)
    pages = [Page(server.port, channel) for _ in range(PAGES)]
    wait_for(lambda: all(page.last_event_id for page in pages), "all pages have a position")

    for data in EVENTS:
        server.publish(data, channel)

    for page in pages:
        page.wait_for("last")
        assert page.data() == EVENTS
    assert server.said("MemoryError")
    assert streams_of(pages) > PAGES


class ReturningPage(Page):
    """A page that was here before, and was told this id then."""

    def __init__(self, port: int, channel: str, told: str) -> None:
        self.told = told
        super().__init__(port, channel)

    def start(self) -> None:
        self.last_event_id = self.told
        super().start()

    def _read(self, stream: EventStream, number: int) -> None:
        before = self.last_event_id
        super()._read(stream, number)
        self.last_event_id = self.last_event_id or before  # a stream that was told no id leaves it as it was


@both_ways
@pytest.mark.parametrize("fault", FAULTS_OF_REPLAYS)
def test_an_error_of_ours_in_a_replay_costs_no_page_an_event(
    start_changed: StartChanged,
    channel: str,
    fault: str,
) -> None:
    change = FAULT.format(fault=FAULTS_OF_REPLAYS[fault])
    server = start_changed(change)
    told = server.publish_id("before", channel)
    first, *others, last = EVENTS
    for data in (first, *others):
        server.publish(data, channel)

    pages = [ReturningPage(server.port, channel, told) for _ in range(PAGES)]
    wait_for(lambda: server.streams() == PAGES, "all pages are here")
    wait_for(lambda: server.said("MemoryError"), "the error")
    server.publish(last, channel)

    for page in pages:
        page.wait_for("last")
        assert page.data() == EVENTS
    wait_for(lambda: server.streams() == 0, "all pages have left")
    assert server.metric("replay_bytes") == 0
    assert server.metric("backlog_bytes") == 0


def test_a_connection_that_is_silent_for_too_long_is_closed_before_and_after_a_request(
    start_changed: StartChanged,
) -> None:
    server = start_changed("ssepush.HEAD_S = 0.3")
    with connect(server.port) as never_asked, connect(server.port) as has_asked:
        has_asked.sendall(request(b"GET /healthz HTTP/1.1"))
        answer = has_asked.recv(4096)

        assert answer.startswith(b"HTTP/1.1 200 ")
        assert never_asked.recv(1) == has_asked.recv(1) == b""
    wait_for(lambda: server.connections() == 0, "both are closed")


NO_ROOM = """
class NoRoom(ssepush.DefaultSelector):
    def register(self, sock, events, data=None):
        if isinstance(data, tuple) and isinstance(data[0], str):  # a browser's address: a silent connection
            raise OSError("no room in the selector")
        return super().register(sock, events, data)

ssepush.DefaultSelector = NoRoom
"""


def test_a_silent_connection_that_the_selector_has_no_room_for_is_closed_and_the_next_is_accepted(
    start_changed: StartChanged,
) -> None:
    server = start_changed(NO_ROOM + "ssepush.HEAD_S = 0.3")

    for _ in range(2):
        with connect(server.port) as silent:
            assert silent.recv(1) == b""


MOST = 2 * 2**20  # bytes of replays in all, in the test
REPLAYS = 200


def reads_nothing(server: ServerProcess, channel: str, last_event_id: str) -> socket.socket:
    """A browser that comes back and takes no more than its kernel, which takes little."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    line = f"GET /stream?channel={channel} HTTP/1.1"
    field = f"Last-Event-ID: {last_event_id}"
    sent = request(line.encode(), field.encode())
    sock.sendall(sent)
    return sock


@both_ways
def test_replays_that_nobody_takes_stay_within_a_bound_of_memory_all_together(
    start_changed: StartChanged,
    redis_process: RedisProcess,
    channel: str,
) -> None:
    server = start_changed(f"ssepush.REPLAY_BYTES = {MOST}")
    ids = []
    for number in range(REPLAYS + 20):
        event = ssepush.publish(
            f"{number} {'x' * 10_000}",
            channel=channel,
            redis_url=redis_process.url,
            history=1000,
        )
        ids.append(str(event.id))
    with server.opened(channel):
        before = server.resident_bytes()
    replay_bytes = []

    def are_settled() -> bool:
        replay_bytes.append(server.metric("replay_bytes"))
        opened = server.metric("streams_opened_total")
        return opened + server.refused("busy") == REPLAYS + 1

    with contextlib.ExitStack() as stack:
        with stopped(redis_process.process):
            for last_event_id in ids[:REPLAYS]:
                sock = reads_nothing(server, channel, last_event_id)
                stack.enter_context(sock)
            wait_for(lambda: server.streams() == REPLAYS, "all wait for Redis")
        wait_for(are_settled, "each has a page, or has been told to come back")
        memory = server.resident_bytes() - before

    assert max(replay_bytes) <= MOST + 2 * ssepush.REPLAY_PAGE_BYTES
    assert memory < 20 * 2**20
    assert server.refused("busy") > REPLAYS / 2
    wait_for(lambda: server.metric("replay_bytes") == 0, "nothing is left")


SMALL_BUFFER = """
import socket
whole_socket_of = ssepush.socket_of

def socket_of(connection):
    sock = whole_socket_of(connection)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return sock

ssepush.socket_of = socket_of
"""
EARLY, LATE = 5, 60  # streams of 20 channels with long names: more than the kernel takes while Redis does not read


def channels_of(stream: int) -> list[str]:
    long = "x" * 180
    return [f"{stream}-{number}-{long}" for number in range(20)]


def asks_for(server: ServerProcess, channels: Sequence[str]) -> socket.socket:
    """A browser that has asked for a stream of these."""
    sock = connect(server.port)
    line = f"GET /stream?{query_of(*channels)} HTTP/1.1"
    sock.sendall(request(line.encode()))
    return sock


@pytest.mark.parametrize("way", [("--shared",)])
def test_commands_of_which_redis_takes_a_part_at_a_time_cut_nobody(start_changed: StartChanged) -> None:
    server = start_changed(SMALL_BUFFER)
    redis = server.redis
    early = [server.opened(*channels_of(number)) for number in range(EARLY)]

    with contextlib.ExitStack() as stack:
        with stopped(redis.process):
            late = []
            for number in range(EARLY, LATE):
                sock = asks_for(server, channels_of(number))
                late.append(stack.enter_context(sock))
            wait_for(lambda: server.streams() == LATE, "all wait for Redis")
        for sock in late:
            assert read_until(sock, b"data: \n\n").startswith(b"HTTP/1.1 200 ")
        for number in range(LATE):
            last = channels_of(number)[-1]
            assert redis.publish(last, "hello") == 1
        for sock in late:
            assert b"data: hello\n\n" in read_until(sock, b"hello\n\n")
        for stream in early:
            assert stream.next().data == "hello"
            stream.close()
    assert server.closed("redis-lost") == server.refused("redis-away") == 0


LARGE_HEARTBEAT = """
ssepush.HEARTBEAT = b":" + b"x" * 2_000_000 + b"\\n\\n"
sys.argv += ["--heartbeat", "1"]
"""


@both_ways
def test_a_heartbeat_that_the_kernel_takes_in_parts_leaves_the_stream_whole(
    start_changed: StartChanged,
    channel: str,
) -> None:
    server = start_changed(LARGE_HEARTBEAT)
    with server.opened(channel) as stream:
        wait_for(lambda: server.metric("backlog_bytes") > 1_000_000, "a part of the heartbeat waits")
        for data in numbers(0, 5):
            server.publish(data, channel)

        assert stream.data(5) == numbers(0, 5)

    heartbeat, *_ = stream.parser.comments
    assert heartbeat == "x" * 2_000_000
