"""Any input at all: what fuzzing and Hypothesis think of."""

from __future__ import annotations

import contextlib
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
    fuzz = [sys.executable, str(HERE / "bench" / "fuzz.py")]

    run = subprocess.run(
        [*fuzz, "--cases", "2000", *kinds],
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    assert "no traceback, no hang, no thread or descriptor left" in run.stdout


# ── What Hypothesis thinks of ────────────────────────────────────────────────────────────────────────────────────────

DIFFICULT = st.sampled_from("\r\n\0\u2028\u0085\ud800:\ufeff ")
ANY_CHARACTER = st.characters(exclude_categories=())
TEXT = st.text(ANY_CHARACTER | DIFFICULT, max_size=40)
MAYBE_TEXT = st.none() | TEXT
FRACTIONS = st.floats(allow_nan=False, allow_infinity=False)
NUMBERS = st.integers() | FRACTIONS
LEAVES = st.none() | st.booleans() | NUMBERS | TEXT


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)


VALUES = st.recursive(LEAVES, containers, max_leaves=8)
MEMBERS = st.sampled_from(["data", "type", "id", "retry", "other"])


def encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


OBJECTS = st.dictionaries(MEMBERS, VALUES).map(json.dumps).map(encoded)
BYTES = st.binary(max_size=200) | TEXT.map(encoded)


def parsed(frame: bytes) -> Parser:
    parser = Parser()
    parser.feed(frame)
    return parser


def has_line_break(text: str | None) -> bool:
    return bool(re.search("[\r\n]", text or ""))


def has_surrogate(*texts: str | None) -> bool:
    return any(re.search("[\ud800-\udfff]", text or "") for text in texts)


def is_no_id(id: str | None) -> bool:
    """Whether an id cannot be sent, or is longer than a browser may send back."""
    if not id:
        return False
    if len(encoded(id)) > ssepush.MAX_ID_BYTES:
        return True
    return has_line_break(id) or "\0" in id


MAYBE_RETRY = st.none() | st.integers(0)


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
    members = {
        "data": data,
        "type": type,
        "id": id,
        "retry": retry,
    }
    given = {name: member for name, member in members.items() if member is not None}
    is_forging = has_line_break(type) or is_no_id(id)
    is_unsendable = is_forging or has_surrogate(data, type, id)

    try:
        frame = ssepush.framed(json.dumps(given).encode(), b"channel", b"").frame
    except ValueError:
        assert is_unsendable
        return

    assert not is_unsendable
    read = parsed(frame)
    event = Received(one_line_end(data), type or "message", id or "")
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

    frame, _, _ = ssepush.framed(message, b"channel", b"")
    [event] = parsed(frame).events

    assert event.type == (type or "message")
    if isinstance(data, str):
        assert event.data == one_line_end(data)
    else:
        assert event.json == data


@given(BYTES | OBJECTS)
@settings(max_examples=300, deadline=None)
def test_any_bytes_on_a_channel_become_one_event_or_none(message: bytes) -> None:
    with contextlib.suppress(ValueError):
        frame, _, _ = ssepush.framed(message, b"channel", b"")

        assert len(parsed(frame).events) == 1


CHANNELS = st.sampled_from([b"a", b"b"])
MESSAGE = st.tuples(CHANNELS, st.binary(max_size=40))
MESSAGES = st.lists(MESSAGE, max_size=8)


@given(MESSAGES, st.data())
def test_a_read_that_is_cut_anywhere_parses_to_the_same(
    messages: list[tuple[bytes, bytes]],
    draw: st.DataObject,
) -> None:
    replies = [resp_array(b"message", name, message) for name, message in messages]
    chunk = b"".join(replies)
    cut = draw.draw(st.integers(0, len(chunk)))
    whole = ssepush.parse(chunk, b"", 1000)

    first = ssepush.parse(chunk[:cut], b"", 1000)
    rest = ssepush.parse(first.rest + chunk[cut:], b"", 1000)

    assert events_in(first) + events_in(rest) == events_in(whole)
    assert first.dropped + rest.dropped == whole.dropped
    assert not whole.rest


def events_in(read: ssepush.Read) -> list[Any]:
    events = []
    for part in read.parts:
        if isinstance(part, ssepush.Batch):
            events += [(part.channel, event) for event in part.events]
    return events


HEADS = st.from_regex(r"[A-Z]+ /\S* HTTP/1\.1\r\nHost: a.b(\r\n.*)*")


LATIN_1 = st.text(st.characters(max_codepoint=255), max_size=60)


@given(LATIN_1 | HEADS)
@settings(max_examples=300, deadline=None)
def test_any_head_is_a_request_or_an_error_of_its_sender(head: str) -> None:
    try:
        request = ssepush.request_of(head)
    except ssepush.HTTPError:
        return

    for value in [request.path, *request.headers, *request.headers.values()]:
        assert not re.search("[\r\n\0]", value)
