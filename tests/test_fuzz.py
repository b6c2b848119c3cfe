"""Any input at all, as Hypothesis thinks of it: messages, published values, requests and queries, whole and spoiled."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import pytest

import ssepush
from tests import kit
from tests.kit import ServerProcess, both_ways, wait_for
from tests.messages import as_read

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install '.[test]'")

from hypothesis import example, given, settings
from hypothesis import strategies as st

STATUSES = {200, 204, 400, 401, 403, 404, 405, 411, 413, 415, 431}
TEXT = st.text(st.characters(exclude_categories=()) | st.sampled_from("\r\n\0\u2028\u0085\ud800:\ufeff "), max_size=40)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
OBJECTS = st.dictionaries(st.sampled_from(["data", "type", "event", "id", "retry", "other"]), VALUES).map(json.dumps)
MORE: dict[str, st.SearchStrategy[Any]] = {"type": TEXT, "retry": st.integers(0)}
MESSAGES = st.binary(max_size=200) | (TEXT | OBJECTS).map(lambda text: text.encode(errors="surrogatepass"))
TOKENS = rb"""\r\n \r \n \0 \x20 : ; \r\n\r\n \n\n data:x\n\n id:x\n \xff \xed\xa0\x80 -1 5_0 NaN 1e999 { } [ ] " \\
\\ud800 \\r\\n "id" "type" %0d%0a %00 %ff & ? # GET POST HTTP/1.0 HTTP/2.0 Content-Length:\x205\r\n channel= token=
Transfer-Encoding:\x20chunked\r\n Host:\x20evil.example\r\n Connection:\x20close\r\n Origin:\x20null\r\n lastEventId="""
TOKEN = st.sampled_from([token.decode("unicode_escape").encode("latin-1") for token in TOKENS.split()])


@st.composite
def spoiled(draw: st.DrawFn, *seeds: bytes) -> bytes:
    """One of these with up to four changes."""
    text = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        at, size = draw(st.integers(0, len(text))), draw(st.integers(0, 20))
        text = text[:at] + draw(TOKEN | st.binary(max_size=8)) + text[at + size :]
    return text


def parsed(message: bytes) -> kit.Parser:
    parser = kit.Parser()
    parser.feed(ssepush.frame_of(ssepush.event_of(message)))
    return parser


@given(st.fixed_dictionaries({"data": TEXT}, optional={**MORE, "id": TEXT}))
@example({"data": "a\r\n\r\nevent: forged\rid: 7\ndata"})
@example({"data": "x", "type": "a\rdata: forged", "id": "1\n\ndata: forged"})
@settings(max_examples=300, deadline=None)
def test_a_message_is_dispatched_exactly_or_refused_and_no_field_is_forged(members: dict[str, Any]) -> None:
    type, id = members.get("type", ""), members.get("id", "")
    is_long = len(id.encode(errors="surrogatepass")) > ssepush.MAX_ID_BYTES
    is_forging = is_long or "\0" in id or re.search("[\r\n]", type + id)

    try:
        read = parsed(json.dumps(members).encode())
    except ValueError:
        assert is_forging or re.search("[\ud800-\udfff]", members["data"] + type + id)
        return

    assert not is_forging
    assert read.events == [kit.Received(as_read(members["data"]), type or "message", id)]
    assert (read.retry_ms, read.comments) == (members.get("retry"), [])


@both_ways
@given(messages=st.lists(MESSAGES, max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_bytes_on_a_channel_become_one_event_or_none(server: ServerProcess, messages: list[bytes]) -> None:
    expected = []
    for message in messages:
        with contextlib.suppress(ValueError):
            expected += parsed(message).events

    with server.opened("fuzz") as stream:
        server.redis.publish_all("fuzz", [*messages, b"the end"])
        came = stream.take(len(expected) + 1)

    assert [event[:2] for event in came] == [*(event[:2] for event in expected), ("the end", "message")]


@both_ways
@given(members=st.fixed_dictionaries({"data": VALUES}, optional=MORE))
@settings(deadline=None)
def test_what_is_published_comes_out_whole_or_is_refused(server: ServerProcess, members: dict[str, Any]) -> None:
    data, type = members["data"], members.get("type", "")
    with server.opened("fuzz") as stream:
        answer = server.post({**members, "channel": "fuzz"})
        if answer.status != 200:
            assert answer.status == 400
            assert re.search("[\r\n\ud800-\udfff]", type + json.dumps(data, ensure_ascii=False))
            return
        event = stream.next()

    assert (event.type, event.id) == (type or "message", answer.json["id"])
    assert event.data == as_read(data) if isinstance(data, str) else event.json == data


HEAD = b" HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /publish" + HEAD + b"Content-Type: application/json\r\n"
REQUESTS = spoiled(
    b"GET /metrics" + HEAD + b"Connection: keep-alive\r\nAccept: */*\r\nSec-Fetch-Site: none\r\n\r\n",
    b"GET /stream?channel=fuzz&channel=%C3%A9&last=5&lastEventId=@&token=x.y.z" + HEAD + b"Last-Event-ID: @\r\n\r\n",
    b"OPTIONS /publish" + HEAD + b"Origin: https://a.example\r\nAccess-Control-Request-Headers: x\r\n\r\n",
    POST + b'Expect: 100-continue\r\nContent-Length: 30\r\n\r\n{"data": "x", "channel": "aa"}',
    POST + b'Transfer-Encoding: chunked\r\n\r\nB\r\n{"data": 1}\r\n0\r\n\r\n',
)


@kit.one_way
@given(requests=st.lists(REQUESTS, min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_requests_are_answered_or_refused_and_leave_nothing(server: ServerProcess, requests: list[bytes]) -> None:
    sent = b"".join(requests).replace(b"@", server.publish_id("ours", "fuzz").encode())

    came = kit.exchange(server.port, sent).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    answers = kit.answers_in(came.replace(b"Access-Control-Allow-Headers: \r\n", b""))

    for answer in answers:
        assert answer.status in STATUSES
        assert answer.status < 400 or answer.error
        if answer.headers.get("Content-Type", "").startswith("text/event-stream"):
            kit.Parser().feed(answer.body)  # which takes no field that nobody sent
    wait_for(lambda: server.connections() == 0, "no connection is left")
    assert server.descriptors() < kit.POOL + 20
    assert not server.said("Traceback")
