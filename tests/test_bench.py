"""The bench's own tools: what chaos finds of a server as it is, and whether it would find what it looks for."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.kit import HERE, WAYS

sys.path.insert(0, str(HERE / "bench"))

import report
from pages import (
    Block,
    Event,
    Outcome,
    Page,
    Seen,
    judge,
)

# ── Chaos ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_succeeds(name: str, *options: str) -> str:
    """Run a program of the bench, which finds nothing wrong; what it prints."""
    path = HERE / "bench" / name
    done = subprocess.run(
        [sys.executable, str(path), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SCENARIOS = {  # and what happens first in each with the seed of the test
    "kept": "Redis stopped",
    "forgetful": "lagging replica promoted",
    "small": "Redis stopped",
}


def figure(printed: str, name: str) -> int:
    """A number that a program of the bench has printed after its name."""
    found = re.search(rf"^{name} +(\d+)$", printed, re.MULTILINE)
    assert found, printed
    return int(found[1])


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_whatever_dies_no_page_loses_doubles_or_reorders_an_event_or_is_reset_without_need(
    scenario: str,
    options: Sequence[str],
) -> None:
    printed = assert_succeeds(
        "chaos.py",
        scenario,
        "--streams=30",
        "--per-s=150",
        "--seconds=3",
        "--seed=3",
        *options,
    )

    assert figure(printed, SCENARIOS[scenario]) > 0
    assert figure(printed, "Redis killed .*") > 0


# ── Failover ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("haproxy", "switchover"),
        ("haproxy", "stopped"),  # the old master comes back where it was
        ("sentinel", "killed"),
        ("cluster", "killed"),
    ],
)
def test_a_failover_leaves_no_gap_that_is_not_told(kind: str, fault: str) -> None:
    assert_succeeds(
        "failover.py",
        f"--redis={kind}",
        f"--fault={fault}",
        "--streams=10",
        "--seconds=3",
        "--down-after=2",
        "--mode=default",
    )


# ── Replays ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_large_replays_read_from_redis_what_they_send_and_little_more() -> None:
    assert_succeeds("replays.py", "--quick", "--pages=4")


# ── The judgement ────────────────────────────────────────────────────────────────────────────────────────────────────

ANSWER_S = 0.1  # how long each publisher waits for its answer


def published(data: str, asked_s: float) -> Event:
    """An event on channel a, which the publisher was told had gone out."""
    return Event(data, "a", asked_s, asked_s + ANSWER_S)


def outcome() -> Outcome:
    """Three events went out, and one did not, as their publishers know."""
    return Outcome(
        acknowledged={
            "1": published("1", 1.0),
            "2": published("2", 2.0),
            "3": published("3", 3.0),
        },
        refused={"no"},
    )


def page_of(*seen: str) -> Page:
    """A page that has dispatched these events, one each second from 1.5 s on; "!" is a reset."""
    page = Page(("a",), heeds_bare_id=True)
    page.opened_s = 0.5
    for number, data in enumerate(seen):
        kind = "stream-reset" if data == "!" else None
        block = Block(data, kind, id=None, retry_ms=None)
        dispatched = Seen(block, 1.5 + number)
        page.seen.append(dispatched)
    return page


NOTHING: set[str] = set()
JUDGEMENTS = {
    "all of them, in order": ("1 2 3", NOTHING),
    "one is missing": ("1 3", {"1 lost", "1 unannounced gaps"}),
    "two beside each other are missing": ("3", {"2 lost", "1 unannounced gaps"}),
    "one came twice": ("1 2 2 3", {"1 doubled"}),
    "two came in the wrong order": ("2 1 3", {"1 reordered"}),
    "one that the publisher was told had not gone out": ("1 2 3 no", {"1 refused but sent"}),
    "a reset tells of what is missing": ("1 ! 3", {"1 resets"}),
    "too late": ("1 3 !", {"1 lost", "1 unannounced gaps", "1 resets", "1 resets without need"}),
    "a reset, and nothing is missing": ("! 1 2 3", {"1 resets", "1 resets without need"}),
}


@pytest.mark.parametrize("case", JUDGEMENTS)
def test_the_judgement_finds(case: str) -> None:
    seen, expected = JUDGEMENTS[case]
    page = page_of(*seen.split())

    figures = judge([page], outcome())

    found = {f"{number} {name}" for name, number in figures.items() if number}
    assert found == expected


def test_an_event_without_an_answer_must_reach_all_pages_or_none() -> None:
    has_it = page_of("1", "2", "maybe", "3")
    lacks_it = page_of("1", "2", "3")
    unanswered = Event("maybe", "a", asked_s=2.5)

    def lost(*pages: Page) -> int:
        unsure = outcome()
        unsure.unanswered["maybe"] = unanswered
        return judge(pages, unsure)["lost"]

    assert lost(has_it, has_it) == 0
    assert lost(lacks_it, lacks_it) == 0
    assert lost(has_it, lacks_it) == 1


def test_a_reset_is_due_when_redis_may_have_forgotten_something_since_the_one_before() -> None:
    page = page_of("1", "!", "2", "3", "!")

    def without_need(*forgettings: float) -> int:
        figures = judge([page], outcome(), forgettings)
        return figures["resets without need"]

    assert without_need() == 2
    assert without_need(2.0) == 1
    assert without_need(2.0, 3.0) == 0


# ── Measurements ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_results_are_one_line_per_case_and_read_back_as_they_were_written() -> None:
    stored = report.RESULTS.read_text()

    summary = report.from_json(stored)

    assert report.as_json(summary) == stored
    for line in summary.cases:
        assert f'{{"case": "{line.case}"' in stored
    lines = stored.splitlines()
    lines_of_values = len(summary.cases) + len(summary.bars)
    other_lines = 6  # the machine, what was not run, and where the cases and the bars begin and end
    assert len(lines) == lines_of_values + other_lines


def sample(
    case: str,
    value: float,
    round_: int = 1,
    peer: str = "ssepush",
) -> report.Sample:
    """What was measured once: the first figure of its kind."""
    kind = report.kind_of(case)
    metric = report.COLUMNS[kind][0]
    return report.Sample(round_, peer, case, {metric: value})


def test_a_case_that_was_measured_again_replaces_its_line_and_no_other() -> None:
    machine: dict[str, str | int] = {"date": "2026-01-01"}
    kept = sample("open 5000", 7.0)
    outdated = sample("post 16", 100.0)
    again = sample("post 16", 200.0)
    old = report.summary_of([outdated, kept], machine)
    new = report.summary_of([again], machine)

    both = report.merged(old, new)

    cases = [line.case for line in both.cases]
    assert cases == ["open 5000", "post 16"]
    assert both.figure("ssepush", "post 16", "requests_per_s") == 200
    assert both.figure("ssepush", "open 5000", "opened_per_s") == 7


def test_a_ratio_is_taken_within_a_round() -> None:
    samples = [
        sample("post 16", 150.0, 1, "ssepush"),
        sample("post 16", 100.0, 1, "1.1"),
        sample("post 16", 30.0, 2, "ssepush"),
        sample("post 16", 20.0, 2, "1.1"),
        sample("post 16", 500.0, 3, "ssepush"),
        sample("post 16", 100.0, 3, "1.1"),
    ]
    bar = report.Bar(
        peer="ssepush",
        case="post 16",
        metric="requests_per_s",
        sign=">=",
        bound=1.3,
        against="1.1",
    )

    line = bar.line(samples)

    assert line
    assert line.measured == 1.5
    assert line.lowest == 1.5
    assert line.highest == 5
    assert line.is_met
