"""Errors of ours: an event that this program fails at, which no event ever should be, costs no page an event."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssepush
from tests import kit
from tests.kit import Page, RedisProcess, ServerProcess, both_ways, wait_for

FAILS = f"""
import sys
sys.path.insert(0, {str(kit.HERE)!r})
import ssepush

left = 3

def failing(function):
    def fails(*arguments):
        global left
        if left and "fault" in repr(arguments):
            left -= 1
            raise MemoryError
        return function(*arguments)
    return fails

ssepush.event_of = failing(ssepush.event_of)
ssepush.replay = failing(ssepush.replay)
ssepush.main(sys.argv[2:])
"""
EVENTS = [*kit.numbers(0, 5), "fault", *kit.numbers(5, 10), "last"]
PAGES = 6  # some of which the fault hits


@pytest.fixture
def failing_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_process: RedisProcess, way: tuple[str, ...]
) -> Iterator[ServerProcess]:
    """A server that runs out of memory, so it seems, the first three times that it reads a certain event."""
    python, program = tmp_path / "python", tmp_path / "failing.py"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    python.chmod(0o755)
    program.write_text(FAILS)
    monkeypatch.setattr(sys, "executable", str(python))
    server = ServerProcess(redis_process, "--retry", "1", *way)
    yield server
    server.terminate()


@both_ways
@pytest.mark.parametrize("returning", [False, True], ids=["pages that are open", "pages that come back"])
def test_an_error_of_ours_is_logged_and_costs_no_page_an_event(
    returning: bool, failing_server: ServerProcess, channel: str
) -> None:
    server = failing_server
    told = server.publish_id("before", channel) if returning else ""
    pages = [] if returning else [Page(server.port, channel) for _ in range(PAGES)]
    wait_for(lambda: all(page.last_event_id for page in pages), "all pages have a position")
    for data in EVENTS:
        ssepush.publish(data, channel=channel, redis_url=server.redis.url)
    pages = pages or [Page(server.port, channel, told=told) for _ in range(PAGES)]

    for page in pages:
        page.wait_for("last")
        assert page.data() == EVENTS
    wait_for(lambda: server.said("MemoryError"), "the error is logged")
    assert sum(page.streams for page in pages) > PAGES
    wait_for(lambda: server.streams() == 0, "all pages have left")
    assert server.metric("backlog_bytes") == 0
