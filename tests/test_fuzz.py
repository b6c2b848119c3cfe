"""Any input at all: what fuzzing and Hypothesis think of."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

import ssepush
from tests.kit import HERE, Parser, Received, both_ways, resp_array
from tests.messages import one_line_end

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install '.[test]'")

from hypothesis import example, given, settings
from hypothesis import strategies as st


@both_ways
def test_two_thousand_mutants_of_each_kind_do_no_harm(way: tuple[str, ...]) -> None:
    kinds = [*way, "publish", "messages"] if way else []
    program = HERE / "bench" / "fuzz.py"

    run = subprocess.run(
        [sys.executable, program, "--cases=2000", *kinds],
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    assert "no traceback, no hang, no thread or descriptor left" in run.stdout


# ── What Hypothesis thinks of ────────────────────────────────────────────────────────────────────────────────────────


def encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, max_size=4)
    objects = st.dictionaries(TEXT, inner, max_size=4)
    return lists | objects


DIFFICULT = st.sampled_from("\r\n\0\u2028\u0085\ud800:\ufeff ")
ANY_CHARACTER = st.characters(exclude_categories=())
TEXT = st.text(ANY_CHARACTER | DIFFICULT, max_size=40)
MAYBE_TEXT = st.none() | TEXT
MAYBE_RETRY = st.none() | st.integers(0)

FRACTIONS = st.floats(allow_nan=False, allow_infinity=False)
NUMBERS = st.integers() | FRACTIONS
CONSTANTS = st.none() | st.booleans()
LEAVES = CONSTANTS | NUMBERS | TEXT
VALUES = st.recursive(LEAVES, containers, max_leaves=8)

MEMBERS = st.sampled_from(
    [
        "data",
        "type",
        "id",
        "retry",
        "other",
    ]
)
OBJECTS = st.dictionaries(MEMBERS, VALUES)
JSON_OBJECTS = OBJECTS.map(json.dumps).map(encoded)
BYTES = st.binary(max_size=200) | TEXT.map(encoded)


def framed(message: bytes) -> bytes:
    """What a stream is sent of a message. ValueError: nothing."""
    return ssepush.framed(message, b"channel", b"").frame


def parsed(frame: bytes) -> Parser:
    parser = Parser()
    parser.feed(frame)
    return parser


def has_line_break(text: str | None) -> bool:
    return bool(re.search("[\r\n]", text or ""))


def has_surrogate(text: str | None) -> bool:
    return bool(re.search("[\ud800-\udfff]", text or ""))


def is_no_id(id: str | None) -> bool:
    """Whether an id cannot be sent, or is longer than a browser may send back."""
    if not id:
        return False
    size = len(encoded(id))
    is_too_long = size > ssepush.MAX_ID_BYTES
    return is_too_long or has_line_break(id) or "\0" in id


@given(TEXT, MAYBE_TEXT, MAYBE_TEXT, MAYBE_RETRY)
@example("x", "a\ndata: forged", None, None)
@example("x", "a\rdata: forged", None, None)
@example("x", None, "1\n\ndata: forged", None)
@example("x", None, "1\rdata: forged", None)
@example("x", None, "1\0", None)
@example("a\r\n\r\nevent: forged\rid: 7\ndata", None, None, None)
@settings(max_examples=300, deadline=None)
def test_a_message_is_dispatched_exactly_or_refused_and_no_field_is_forged(
    data: str,
    type: str | None,
    id: str | None,
    retry: int | None,
) -> None:
    members: dict[str, Any] = {"data": data}
    if type is not None:
        members["type"] = type
    if id is not None:
        members["id"] = id
    if retry is not None:
        members["retry"] = retry
    message = json.dumps(members)
    is_half_character = any(map(has_surrogate, (data, type, id)))
    is_forging = has_line_break(type) or is_no_id(id)

    try:
        frame = framed(message.encode())
    except ValueError:
        assert is_forging or is_half_character
        return

    assert not is_forging
    assert not is_half_character
    read = parsed(frame)
    event = Received(
        data=one_line_end(data),
        type=type or "message",
        id=id or "",
    )
    assert read.events == [event]
    assert read.retry_ms == retry
    assert read.comments == []


@given(VALUES, MAYBE_TEXT, MAYBE_RETRY)
def test_what_is_published_comes_out_as_that_event_or_is_refused(
    data: Any,
    type: str | None,
    retry: int | None,
) -> None:
    try:
        message = ssepush.message_of(data, type, retry)
    except ValueError:
        text = json.dumps([data, type], ensure_ascii=False)
        assert has_line_break(type) or has_surrogate(text)
        return

    read = parsed(framed(message))

    [event] = read.events
    assert event.type == (type or "message")
    if isinstance(data, str):
        assert event.data == one_line_end(data)
    else:
        assert event.json == data


@given(BYTES | JSON_OBJECTS)
@settings(max_examples=300, deadline=None)
def test_any_bytes_on_a_channel_become_one_event_or_none(message: bytes) -> None:
    try:
        frame = framed(message)
    except ValueError:
        return

    read = parsed(frame)
    assert len(read.events) == 1


CHANNELS = st.sampled_from([b"a", b"b"])
SHORT = st.binary(max_size=40)
MESSAGES = st.builds(resp_array, st.just(b"message"), CHANNELS, SHORT)
REPLIES = st.lists(MESSAGES, max_size=8).map(b"".join)


@given(REPLIES, st.data())
def test_a_read_that_is_cut_anywhere_parses_to_the_same(
    replies: bytes,
    draw: st.DataObject,
) -> None:
    places = st.integers(0, len(replies))
    cut = draw.draw(places)
    whole = ssepush.parse(replies, b"", 1000)

    first = ssepush.parse(replies[:cut], b"", 1000)
    unread = first.rest + replies[cut:]
    rest = ssepush.parse(unread, b"", 1000)

    assert events_in(first) + events_in(rest) == events_in(whole)
    assert first.dropped + rest.dropped == whole.dropped
    assert not whole.rest


def events_in(read: ssepush.Read) -> list[tuple[bytes, ssepush.Framed]]:
    """The events that were read, each with its channel."""
    found = []
    for part in read.parts:
        if isinstance(part, ssepush.Batch):
            for event in part.events:
                found.append((part.channel, event))
    return found


HEADS = st.from_regex(r"[A-Z]+ /\S* HTTP/1\.1\r\nHost: a.b(\r\n.*)*")
LATIN_1 = st.characters(max_codepoint=255)
LATIN_1_TEXT = st.text(LATIN_1, max_size=60)


@given(LATIN_1_TEXT | HEADS)
@settings(max_examples=300, deadline=None)
def test_any_head_is_a_request_or_an_error_of_its_sender(head: str) -> None:
    try:
        request = ssepush.request_of(head)
    except ssepush.HTTPError:
        return

    parts = [request.path]
    for name, value in request.headers.items():
        parts += [name, value]
    for part in parts:
        assert not re.search("[\r\n\0]", part)
