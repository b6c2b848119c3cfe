"""The bench's own tools: what chaos finds of a server as it is, and whether it would find what it looks for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.kit import HERE, WAYS

sys.path.insert(0, str(HERE / "bench"))

import report
from pages import Block, Event, Outcome, Page, Seen, judge

# ── Chaos ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_bench(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "bench" / name), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("options", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("scenario", ["kept", "forgetful", "small"])
def test_whatever_dies_no_page_loses_doubles_or_reorders_an_event(scenario: str, options: Sequence[str]) -> None:
    size = ("--streams", "30", "--per-s", "150", "--seconds", "3", "--seed", "1")

    chaos = run_bench("chaos.py", scenario, *size, *options)

    assert chaos.returncode == 0, chaos.stdout + chaos.stderr


# ── Failover ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "fault"), [("haproxy", "switchover"), ("haproxy", "killed")])
def test_a_failover_leaves_no_gap_that_is_not_told(kind: str, fault: str) -> None:
    size = ("--streams", "10", "--seconds", "3", "--down-after", "2", "--mode", "default")

    failover = run_bench("failover.py", "--redis", kind, "--fault", fault, *size)

    assert failover.returncode == 0, failover.stdout + failover.stderr


# ── The judgement ────────────────────────────────────────────────────────────────────────────────────────────────────

ACKNOWLEDGED = {
    "1": Event("1", "a", asked_s=1.0, told_s=1.1),
    "2": Event("2", "a", asked_s=2.0, told_s=2.1),
    "3": Event("3", "a", asked_s=3.0, told_s=3.1),
}
UNANSWERED = {"maybe": Event("maybe", "a", asked_s=2.5)}


def page_of(*seen: str, channel: str = "a") -> Page:
    """A page that has dispatched these events, one each second from 1.5 s on; "!" is a reset."""
    page = Page((channel,), heeds_bare_id=True)
    page.opened_s = 0.5
    for number, data in enumerate(seen):
        kind = "stream-reset" if data == "!" else None
        block = Block(data, kind, id=None, retry_ms=None)
        page.seen.append(Seen(block, 1.5 + number))
    return page


@pytest.mark.parametrize(
    ("seen", "found"),
    [
        pytest.param("1 2 3", {}, id="all of them, in order"),
        pytest.param("1 3", {"lost": 1, "unannounced gaps": 1}, id="one is missing"),
        pytest.param("3", {"lost": 2, "unannounced gaps": 1}, id="two beside each other are missing"),
        pytest.param("1 2 2 3", {"doubled": 1}, id="one came twice"),
        pytest.param("2 1 3", {"reordered": 1}, id="two came in the wrong order"),
        pytest.param("1 2 3 no", {"refused but sent": 1}, id="one that the publisher was told had not gone out"),
        pytest.param("1 ! 3", {"resets": 1}, id="a reset tells of what is missing"),
        pytest.param("1 3 !", {"lost": 1, "unannounced gaps": 1, "resets": 1, "resets without need": 1}, id="too late"),
        pytest.param("! 1 2 3", {"resets": 1, "resets without need": 1}, id="a reset, and nothing is missing"),
    ],
)
def test_the_judgement_finds(seen: str, found: dict[str, int]) -> None:
    outcome = Outcome(acknowledged=dict(ACKNOWLEDGED), refused={"no"})

    figures = judge([page_of(*seen.split())], outcome)

    assert {name: number for name, number in figures.items() if number} == found


def test_an_event_without_an_answer_must_reach_all_pages_or_none() -> None:
    outcome = Outcome(acknowledged=dict(ACKNOWLEDGED), unanswered=dict(UNANSWERED))
    has_it = page_of("1", "2", "maybe", "3")
    lacks_it = page_of("1", "2", "3")

    assert judge([has_it, has_it], outcome)["lost"] == 0
    assert judge([lacks_it, lacks_it], outcome)["lost"] == 0
    assert judge([has_it, lacks_it], outcome)["lost"] == 1


def test_a_reset_is_due_when_redis_may_have_forgotten_something_since_the_one_before() -> None:
    outcome = Outcome(acknowledged=dict(ACKNOWLEDGED))
    page = page_of("1", "!", "2", "3", "!")

    assert judge([page], outcome)["resets without need"] == 2
    assert judge([page], outcome, forgettings=[2.0])["resets without need"] == 1
    assert judge([page], outcome, forgettings=[2.0, 3.0])["resets without need"] == 0


# ── Measurements ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_results_are_one_line_per_case_and_read_back_as_they_were_written(tmp_path: Path) -> None:
    stored = report.RESULTS.read_text()

    summary = report.from_json(stored)

    assert report.as_json(summary) == stored
    assert all(f'{{"case": "{line.case}"' in stored for line in summary.cases)
    assert len(stored.splitlines()) == len(summary.cases) + len(summary.bars) + 6


def test_a_case_that_was_measured_again_replaces_its_line_and_no_other() -> None:
    machine: dict[str, str | int] = {"date": "2026-01-01"}
    old = report.summary_of([sample("post 16", 100.0), sample("open 5000", 7.0)], machine)
    new = report.summary_of([sample("post 16", 200.0)], machine)

    both = report.merged(old, new)

    assert [line.case for line in both.cases] == ["open 5000", "post 16"]
    assert both.figure("ssepush", "post 16", "requests_per_s") == 200
    assert both.figure("ssepush", "open 5000", "opened_per_s") == 7


def sample(case: str, value: float) -> report.Sample:
    metric = report.COLUMNS[report.kind_of(case)][0]
    return report.Sample(1, "ssepush", case, {metric: value})


def test_a_ratio_is_taken_within_a_round() -> None:
    bar = report.Bar("ssepush", "post 16", "requests_per_s", ">=", 1.3, "1.0")
    samples = []
    for round_, own, other in ((1, 150.0, 100.0), (2, 30.0, 20.0), (3, 500.0, 100.0)):
        samples.append(report.Sample(round_, "ssepush", "post 16", {"requests_per_s": own}))
        samples.append(report.Sample(round_, "1.0", "post 16", {"requests_per_s": other}))

    line = bar.line(samples)

    assert line
    assert (line.measured, line.lowest, line.highest) == (1.5, 1.5, 5)
    assert line.is_met
