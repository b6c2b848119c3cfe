"""Any input at all: what fuzzing and Hypothesis think of."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

import ssepush
from tests.kit import HERE, Parser, Received, ServerProcess, answers_in, both_ways, exchange, one_way
from tests.messages import one_line_end

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install '.[test]'")

from hypothesis import assume, example, given, settings
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
    assert "no traceback, no hang, no connection or descriptor left" in run.stdout


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
    event = ssepush.event_of(message)
    return ssepush.frame_of(event)


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
        frame = framed(ssepush.message_of(data, type, retry))
    except ValueError:
        text = json.dumps([data, type], ensure_ascii=False)
        assert has_line_break(type) or has_surrogate(text)
        return

    read = parsed(frame)

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


HEADS = st.from_regex(r"[A-Z]+ /\S* HTTP/1\.1\r\nHost: a.b(\r\n.*)*")


@one_way
@given(head=BYTES | HEADS.map(encoded))
@settings(max_examples=300, deadline=None)
def test_any_head_is_answered_as_its_sender_deserves_or_by_closing(server: ServerProcess, head: bytes) -> None:
    assume(not head.startswith(b"HEAD "))  # the answer would have no body, as it should

    answers = answers_in(exchange(server.port, head + b"\r\n\r\n"))

    for answer in answers:
        assert answer.status < 500
        if answer.status >= 400:
            assert answer.error
