"""Fuzz ssepush: mutated requests, publish bodies, channel messages and stream queries against a real server and Redis.

    python bench/fuzz.py                       100,000 cases of each kind
    python bench/fuzz.py --cases 1000 --seed 7 publish

Each answer must be well-formed HTTP with a status that the interface names. Whatever is published, a strict parser must
get exactly that event, or nothing where it cannot be sent; never a field that was not sent. Nothing may hang, write a
traceback, or leave a connection or descriptor behind. The seed is printed: the same one makes the same cases again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.kit import (
    POOL,
    EventStream,
    Parser,
    Received,
    RedisProcess,
    ServerProcess,
    connect,
    place_of,
    wait_for,
)

BATCH = 64  # cases that are under way at once
STATUSES = {
    200,
    204,
    400,
    401,
    403,
    404,
    405,
    411,
    413,
    415,
    431,
}
CHANNEL = "fuzz"

# ── Mutation ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TOKENS = [
    # between lines and words
    b"\r\n",
    b"\r",
    b"\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b": ",
    b",",
    b";",
    b"\r\n\r\n",
    b"\n\n",
    # what is no UTF-8, and what some take for a line end or a digit
    b"\xff",
    b"\xc3\xa9",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"\xc2\x85",
    b"\x0b",
    b"\x0c",
    b"\x1b[2J",
    b"-1",
    b"+5",
    b"5_0",
    b"0",
    b"9" * 30,
    # fields and versions of HTTP
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Host: evil.example\r\n",
    b"Connection: close\r\n",
    b"Expect: 100-continue\r\n",
    b"Origin: null\r\n",
    b"HTTP/1.0",
    b"HTTP/0.9",
    b"HTTP/2.0",
    # requests and their URLs
    b"GET",
    b"POST",
    b"OPTIONS",
    b"/stream",
    b"/publish",
    b"/",
    b"http://evil.example/",
    b"%0d%0a",
    b"%00",
    b"%ff",
    b"%",
    b"&",
    b"?",
    b"#",
    # event streams
    b"data:",
    b"data: x\n\n",
    b"event: x\n",
    b"id: x\n",
    b"retry: 1\n",
    # JSON
    b"\\u0000",
    b"\\ud800",
    b"\\n",
    b"\\r\\n",
    b"\\",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"true",
    b"NaN",
    b"1e999",
    b"-0",
    b"1.5",
    b'"data"',
    b'"type"',
    b'"id"',
    b'"retry"',
    b'"channel"',
    b"[" * 40,
    b"a" * 300,
    # parameters of a stream
    b"channel=",
    b"private-",
    b"lastEventId=",
    b"token=",
]


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """The seed with up to six changes, or unchanged."""
    text = bytearray(seed)
    changes = rng.choice((0, 1, 1, 2, 3, 6))
    for _ in range(changes):
        at = rng.randint(0, len(text))
        size = rng.randint(0, 20)
        to = min(at + size, len(text))
        match rng.randrange(6):
            case 0:
                text[at:at] = rng.choice(TOKENS)
            case 1:
                text[at:to] = rng.choice(TOKENS)
            case 2:
                del text[at:to]
            case 3:
                times = rng.randint(1, 3)
                text[at:at] = text[at:to] * times
            case 4:
                byte = rng.randrange(256)
                text.insert(at, byte)
            case _ if at < len(text):
                text[at] ^= 1 << rng.randrange(8)
    return bytes(text)


def mutants(
    seeds: list[bytes],
    rng: random.Random,
    number: int,
) -> list[bytes]:
    """So many of any of the seeds."""
    return [mutated(rng.choice(seeds), rng) for _ in range(number)]


REQUESTS = [
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:5000\r\nConnection: keep-alive\r\nAccept: */*\r\n\r\n",
    b"GET /nowhere?a=b HTTP/1.0\r\nHost: [::1]\r\nOrigin: http://localhost\r\n\r\n",
    b"GET /stream?channel=a&channel=b&lastEventId=1-1234567890123 HTTP/1.1\r\nHost: localhost\r\n"
    b"Last-Event-ID: x\r\n\r\n",
    b"GET /notifications HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: none\r\nReferer: http://localhost/\r\n\r\n",
    b"OPTIONS /publish HTTP/1.1\r\nHost: localhost\r\nOrigin: https://a.example\r\n"
    b"Access-Control-Request-Method: POST\r\n\r\n",
    b"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n"
    b'{"data": 1}',
    b"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    b'Content-Length: 30\r\n\r\n{"data": "x", "channel": "aa"}',
    b"POST /publish HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
]
BODIES = [
    b'{"channel": "fuzz", "data": "hello\\nworld", "type": "greet", "retry": 1000}',
    b'{"data": {"a": [1, 2.5, null, "x"]}, "channel": "fuzz"}',
    b'{"channel": "fuzz", "data": "\\r\\n\\u2028data: forged\\n\\nevent: forged", "type": ""}',
    '{"type": "Überraschung", "channel": "fuzz", "data": "çà 🎉"}'.encode(),
    b'{"channel": "fuzz", "data": ""}',
    b'{"channel": "fuzz", "data": 12345678901234567890, "type": "n", "retry": 0}',
]
MESSAGES = [
    *BODIES,
    b"hello",
    b"data: forged\n\nevent: forged\nid: 7\n\n",
    b'{"data": {"question": "which?", "answers": {"state": "ok"}}, "type": "new_answers"}',
    b'{"data": "x", "type": "t", "id": "17", "retry": 2500}',
    b'{"data": "x", "id": 5}',
    b"\xff\xfe",
    b"42",
    b"",
    b"[1, 2]",
]
QUERIES = [
    b"channel=fuzz-history&lastEventId=1764000000000-1234567890123",
    b"channel=fuzz-history&channel=b&channel=%C3%A9",
    b"channel=private-x&token=1764000000.8YkZ",
    b"lastEventId=0-0",
    b"channel=fuzz-history",
    b"",
]

# ── What must come back ──────────────────────────────────────────────────────────────────────────────────────────────


def exchanges(
    port: int,
    cases: list[bytes],
) -> Iterator[tuple[bytes, bytes]]:
    """Send each case on a connection of its own, all at once, and yield what came back until the server closed."""
    with contextlib.ExitStack() as stack:
        socks = []
        for case in cases:
            sock = stack.enter_context(connect(port))
            socks.append(sock)
            with contextlib.suppress(OSError):
                sock.sendall(case)
                sock.shutdown(socket.SHUT_WR)
        for case, sock in zip(cases, socks, strict=True):
            received = b""
            try:
                while chunk := sock.recv(65536):
                    received += chunk
            except ConnectionError:
                received = b""  # reset with bytes on the way: nothing to judge
            yield case, received


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def answers_in(received: bytes) -> Iterator[Answer]:
    """Yield each response that these bytes are; they must be nothing else."""
    while received:
        head, blank, received = received.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("ascii").split("\r\n")
        status = re.fullmatch("HTTP/1.1 ([1-5][0-9][0-9]) [A-Za-z -]+", status_line)
        assert blank, head
        assert status, head
        if status[1] == "100":
            continue
        assert int(status[1]) in STATUSES, head
        headers = {}
        for line in lines:
            field = re.fullmatch("([A-Za-z-]+): ([ -~]+)", line)
            assert field, head
            assert field[1] not in headers, head
            headers[field[1]] = field[2]
        assert not headers.keys() & {"Set-Cookie", "Location"}, head
        if "Transfer-Encoding" in headers:
            assert "Content-Length" not in headers, head
            received = unchunked(received)
        length = int(headers.get("Content-Length", len(received)))
        assert length <= len(received), head
        body = received[:length]
        received = received[length:]
        yield Answer(int(status[1]), headers, body)


def unchunked(received: bytes) -> bytes:
    """The body that came in chunks, to the last one or to where the connection was closed."""
    body = b""
    while found := re.match(rb"([0-9a-f]+)\r\n", received):
        size = int(found[1], 16)
        start = found.end()
        assert received[start + size : start + size + 2] == b"\r\n", received
        end = start + size
        body += received[start:end]
        received = received[end + 2 :]
        assert size or not received, received
    assert not received, received
    return body


def checked(received: bytes) -> list[Answer]:
    """Each response, checked by what it claims to be."""
    answers = list(answers_in(received))
    for answer in answers:
        kind = answer.headers.get("Content-Type", "")
        if answer.status >= 400:
            assert json.loads(answer.body)["state"] == "error", answer
        elif kind.startswith("text/event-stream"):
            Parser().feed(answer.body)
    return answers


def lines(text: str) -> str:
    """The data as it comes out of an event stream, where each of the three line ends is one."""
    return re.sub("\r\n|\r", "\n", text)


def event_of(message: bytes) -> Received | None:
    """The event that a message on the channel stands for, None if it cannot be sent; without ssepush's own code."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        text = message.decode()
    except UnicodeDecodeError:
        return None
    try:
        members = json.loads(text, parse_constant=refuse)
        if not (isinstance(members, dict) and "data" in members):
            return Received(lines(text))
        data = members["data"]
        if not isinstance(data, str):
            data = json.dumps(data, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return Received(lines(text))
    kind = members.get("type")
    number = members.get("id")
    retry = members.get("retry")
    is_sendable = is_type(kind) and is_id(number) and is_retry(retry)
    has_half_character = re.search("[\ud800-\udfff]", f"{data}{kind}{number}")
    if not is_sendable or has_half_character:
        return None
    id = "" if number is None else str(number)
    return Received(lines(data), kind or "message", id)


def is_type(kind: object) -> bool:
    if kind is None:
        return True
    return isinstance(kind, str) and not re.search("[\r\n]", kind)


def is_id(number: object) -> bool:
    if number is None:
        return True
    if type(number) not in (str, int):
        return False
    text = str(number)
    size = len(text.encode(errors="surrogatepass"))
    return size <= 128 and not re.search("[\r\n\0]", text)


def is_retry(retry: object) -> bool:
    if retry is None:
        return True
    return type(retry) is int and retry >= 0


# ── The four targets ─────────────────────────────────────────────────────────────────────────────────────────────────


def fuzz_requests(
    server: ServerProcess,
    store: RedisProcess,
    rng: random.Random,
    cases: int,
) -> Counter[str]:
    """Raw bytes at the socket: one to three requests after one another."""
    seen: Counter[str] = Counter()
    for _ in range(0, cases, BATCH):
        sent = []
        for _ in range(BATCH):
            number = rng.choice((1, 1, 2, 3))
            requests = mutants(REQUESTS, rng, number)
            sent.append(b"".join(requests))
        for case, received in exchanges(server.port, sent):
            with telling(case):
                for answer in checked(received):
                    seen[str(answer.status)] += 1
    return seen


def fuzz_publish(
    server: ServerProcess,
    store: RedisProcess,
    rng: random.Random,
    cases: int,
) -> Counter[str]:
    """Bodies of POST /publish, and what a stream gets of them."""
    seen: Counter[str] = Counter()
    stream = EventStream(server.port, f"/stream?channel={CHANNEL}")
    head = b"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for _ in range(0, cases, BATCH):
        bodies = mutants(BODIES, rng, BATCH)
        sent = [head % len(body) + body for body in bodies]
        expected = {}
        for case, received in exchanges(server.port, sent):
            with telling(case):
                [answer] = checked(received)
                seen[str(answer.status)] += 1
                if answer.status != 200:
                    continue
                _, _, body = case.partition(b"\r\n\r\n")
                members = json.loads(body)
                if members.get("channel") == CHANNEL:
                    event = event_of(json.dumps(members).encode())
                    number = json.loads(answer.body)["id"]
                    assert event
                    expected[number] = event._replace(id=number)
        events = stream.take(len(expected))
        came = {event.id: event for event in events}
        assert came == expected, (events, expected)
    stream.close()
    return seen


def fuzz_messages(
    server: ServerProcess,
    store: RedisProcess,
    rng: random.Random,
    cases: int,
) -> Counter[str]:
    """Messages on a Redis channel, and what a stream gets of them."""
    seen: Counter[str] = Counter()
    stream = EventStream(server.port, f"/stream?channel={CHANNEL}")
    stream.wait(lambda: stream.parser.last_event_id, "the position of a new stream")
    last_id = stream.parser.last_event_id
    for batch in range(0, cases, 4 * BATCH):
        messages = mutants(MESSAGES, rng, 4 * BATCH)
        messages.append(b"sentinel %d" % batch)
        pipe = store.client.pipeline(transaction=False)
        for message in messages:
            pipe.publish(CHANNEL, message)
        pipe.execute()
        for message in messages:
            with telling(message):
                event = event_of(message)
                seen["event" if event else "dropped"] += 1
                if event:
                    last_id = event.id or last_id
                    assert stream.next() == event._replace(id=last_id)
    stream.close()
    return seen


STREAM_REQUEST = b"GET /stream?%b HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: %b\r\n\r\n"


def fuzz_queries(
    server: ServerProcess,
    store: RedisProcess,
    rng: random.Random,
    cases: int,
) -> Counter[str]:
    """Query strings and Last-Event-ID of a stream, and the history that it replays."""
    seen: Counter[str] = Counter()
    ids = []
    ours = set()
    for number in range(30):
        id = server.publish_id(number, "fuzz-history")
        ids.append(id.encode())
        ours.add(Received(str(number), "message", id))
    ids += [b"", b"0-0", b"1764000000000-1234567890123"]
    ids.append(b"%b-%b" % (b"9" * 14, b"9" * 16))
    for _ in range(0, cases, BATCH):
        sent = []
        for _ in range(BATCH):
            [query] = mutants(QUERIES, rng, 1)
            [last] = mutants(ids, rng, 1)
            sendable_query = re.sub(rb"[^!-~]", b"+", query)
            sendable_last = re.sub(rb"[^\t -~\x80-\xff]", b"", last)
            sent.append(STREAM_REQUEST % (sendable_query, sendable_last))
        for case, received in exchanges(server.port, sent):
            with telling(case):
                for answer in checked(received):
                    seen[str(answer.status)] += 1
                    seen["replayed"] += replayed(answer, ours)
    return seen


def replayed(answer: Answer, ours: set[Received]) -> int:
    """How many events a stream was sent, all of them ours or resets; it may also be told where it is."""
    if answer.status != 200:
        return 0
    parser = Parser()
    parser.feed(answer.body)
    number = 0
    for event in parser.events:
        if event.type == "stream-position":
            assert event.data == "", event
            assert place_of(event.id), event
        else:
            assert event.type == "stream-reset" or event in ours, event
            number += 1
    return number


@contextlib.contextmanager
def telling(case: bytes) -> Iterator[None]:
    """Name the case, should something be wrong with it."""
    try:
        yield
    except BaseException:
        print(f"the case was {case!r}", file=sys.stderr)
        raise


Target = Callable[..., Counter[str]]
TARGETS: dict[str, Target] = {
    "requests": fuzz_requests,
    "publish": fuzz_publish,
    "messages": fuzz_messages,
    "queries": fuzz_queries,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fuzz a server of our own.")
    names = ", ".join(TARGETS)
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help=f"{names} (all of them)",
    )
    parser.add_argument(
        "--cases",
        type=int,
        default=100_000,
        help="of each target (100000)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.getrandbits(32),
    )
    parser.add_argument(
        "--shared",
        action="store_true",
        help="one Redis subscriber for all streams",
    )
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        store = RedisProcess(Path(folder))
        way = ["--shared"] if options.shared else []
        server = ServerProcess(store.url, "--log-level", "error", *way)
        try:
            run(server, store, options)
        finally:
            server.terminate()
            store.kill()


def run(
    server: ServerProcess,
    store: RedisProcess,
    options: argparse.Namespace,
) -> None:
    """Fuzz each target, and see that nothing is left of it."""
    server.get("/healthz")
    descriptors = server.descriptors() + POOL + 1  # those to Redis, and with --shared its subscriber
    for name in options.targets or TARGETS:
        store.client.flushall()  # or the history of one would be replayed in another
        began = time.monotonic()
        rng = random.Random(f"{options.seed} {name}")
        seen = TARGETS[name](server, store, rng, options.cases)
        seconds = time.monotonic() - began
        counts = dict(sorted(seen.items()))
        print(f"{name}: {options.cases} cases in {seconds:.1f} s: {counts}", flush=True)
        wait_for(lambda: server.connections() == 0, "no connection is left")
        wait_for(lambda: server.descriptors() <= descriptors, "no descriptor is left")
        assert "Traceback" not in server.output, server.output
        assert server.process.poll() is None
    print("no traceback, no hang, no connection or descriptor left")


if __name__ == "__main__":
    main()
