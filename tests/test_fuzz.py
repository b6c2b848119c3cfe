"""Any input at all: what fuzzing and Hypothesis think of."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from typing import Any

import pytest

import ssepush
from tests.kit import HERE, Parser, Received

# ── Fuzzing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [[], ["--shared", "publish", "messages"]],
    ids=["subscriber each", "shared"],
)
def test_two_thousand_mutants_of_each_kind_do_no_harm(options: list[str]) -> None:
    command = [
        sys.executable,
        str(HERE / "bench" / "fuzz.py"),
        "--cases",
        "2000",
        *options,
    ]

    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
    )

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

    @given(
        TEXT,
        st.none() | TEXT,
        st.none() | TEXT,
        st.none() | st.integers(0),
    )
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

    @given(
        VALUES,
        st.none() | TEXT,
        st.none() | st.integers(0),
    )
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
        assert event.data == one_line_end(data) if isinstance(data, str) else event.json == data

    @given(st.binary(max_size=200) | TEXT.map(lambda text: text.encode(errors="surrogatepass")))
    def test_any_bytes_on_a_channel_become_one_event_or_none(message: bytes) -> None:
        try:
            _, frame = ssepush.framed(message)
        except ValueError:
            return

        assert len(events_in(frame)) == 1

    @given(
        st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.binary(max_size=40)), max_size=8),
        st.data(),
    )
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

        values = [
            request.path,
            *request.headers,
            *request.headers.values(),
        ]
        assert not any(re.search("[\r\n\0]", value) for value in values)

else:

    def test_any_input_at_all() -> None:
        pytest.skip("needs hypothesis: pip install '.[test]'")
