"""The programs of bench/: whether they work, and whether chaos would find what it looks for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kit import HERE, WAYS, needs

sys.path.insert(0, str(HERE / "bench"))

from chaos import FAILURES, Event, Page, Seen, judge

import bench


def printed_by(name: str, *options: str) -> str:
    """What a program of the bench prints, which finds nothing wrong."""
    command = [sys.executable, str(HERE / "bench" / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PLAYED = [f"{name} {' '.join(way)}" for name in ("kept", "forgetful", "small", "slow") for way in WAYS.values()]
FAILOVERS = ["haproxy-switchover", "haproxy-stopped", "sentinel-killed", "cluster-killed"]
NEEDED = ("unshare", "ip", "haproxy", "redis-sentinel", "redis-cli")
CASES = ["open 5", "post 16"]


def play(scenario: str) -> None:
    """A short run in which no page may lose, double or reorder an event, or be reset without need."""
    streams = "--streams=8" if scenario == "replays" else "--streams=20"
    printed = printed_by("chaos.py", *scenario.split(), streams, "--seconds=5", "--down-after=2", "--seed=3")

    figures = {name: int(value) for name, value in re.findall(r"^(.+?) +(\d+)$", printed, re.MULTILINE)}
    assert min(figures[name] for name in ("events acknowledged", "events dispatched", "streams opened again")) > 0
    assert {figures[name] for name in FAILURES} == {0}


ALONE = [pytest.param(name, marks=pytest.mark.alone) for name in ("replays", "strangers")]


@pytest.mark.parametrize("scenario", [*PLAYED, *ALONE])
def test_whatever_dies_or_attacks_no_page_suffers(scenario: str) -> None:
    play(scenario)


def test_however_redis_fails_over_no_page_suffers() -> None:
    for program in NEEDED:
        needs(program)
    with ThreadPoolExecutor() as threads:
        assert list(threads.map(play, FAILOVERS)) == [None] * len(FAILOVERS)


def page_of(*seen: str) -> Page:
    """A page that has dispatched these events, one each second from 1.5 s on; "!" is a reset."""
    page = Page(["a"])
    page.opened_s = 0.5
    for number, data in enumerate(seen):
        page.seen.append(Seen(data, "stream-reset" if data == "!" else "message", 1.5 + number))
    return page


def judged(*pages: Page, forgettings: tuple[float, ...] = ()) -> set[str]:
    """Three events went out, one each second, one may have, and one did not, as their publishers know."""
    events = [Event(f"{number}", "a", number, number + 0.1) for number in (1, 2, 3)]
    events += [Event("maybe", "a", 2.5, fate="unanswered"), Event("no", "a", 3.5, fate="refused")]
    figures = judge(pages, events, forgettings)
    return {f"{number} {name}" for name, number in figures.items() if number}


JUDGED = [
    ("1 2 3", set()),
    ("1 3", {"1 lost", "1 unannounced gaps"}),
    ("3", {"2 lost", "1 unannounced gaps"}),
    *(("1 2 2 3", {"1 doubled"}), ("2 1 3", {"1 reordered"}), ("1 2 3 no", {"1 refused but sent"})),
    ("1 ! 3", {"1 resets"}),
    ("1 3 !", {"1 lost", "1 unannounced gaps", "1 resets", "1 resets without need"}),
    ("! 1 2 3", {"1 resets", "1 resets without need"}),
]


@pytest.mark.parametrize(("seen", "expected"), JUDGED)
def test_the_judgement_finds(seen: str, expected: set[str]) -> None:
    assert judged(page_of(*seen.split())) == expected


def test_an_event_without_an_answer_must_reach_all_pages_or_none() -> None:
    has_it, lacks_it = page_of("1", "2", "maybe", "3"), page_of("1", "2", "3")
    assert judged(has_it, has_it) == judged(lacks_it, lacks_it) == set()
    assert judged(has_it, lacks_it) == {"1 lost", "1 unannounced gaps"}


def test_a_reset_is_due_when_redis_may_have_forgotten_something_since_the_one_before() -> None:
    page = page_of("1", "!", "2", "3", "!")
    assert judged(page) == {"2 resets", "2 resets without need"}
    assert judged(page, forgettings=(2.0,)) == {"2 resets", "1 resets without need"}
    assert judged(page, forgettings=(2.0, 3.0)) == {"2 resets"}
    assert judged(page, forgettings=(2.0, 2.2)) == {"2 resets"}  # at 2.2 the first one was on its way
    page.seen[1] = page.seen[1]._replace(asked_s=2.3)
    assert judged(page, forgettings=(2.0, 2.2)) == {"2 resets", "1 resets without need"}


def test_a_short_run_measures_each_case_beside_1_1() -> None:
    needs("gcc", "cc")
    few = "--peers=ssepush-shared,1.1-shared,floor --streams=10 --rounds=1 --seconds=0.1"
    printed = printed_by("bench.py", *few.split())
    for case in ("deliver 10 1x64", "deliver 10 10x64", "open 10", "idle 10", "return 10", "busy 10", "large 10"):
        assert f"\n\n{case} (1 rounds)\n" in printed
    assert re.search(r"^ +ssepush --shared( +[\d,.]+)+$", printed, re.MULTILINE)


def test_results_are_one_line_per_case_and_the_documentation_shows_them() -> None:
    stored, page = bench.RESULTS.read_text(), bench.PERFORMANCE.read_text()
    summary = json.loads(stored)
    assert bench.as_json(summary) == stored
    assert stored.count("\n") == len(summary["cases"]) + 4
    assert bench.with_tables(page, summary) == page


def test_a_case_that_was_measured_again_replaces_its_line_and_a_ratio_is_taken_within_a_round() -> None:
    measured = [(1, 150.0, 100.0), (2, 30.0, 20.0), (3, 500.0, 100.0)]
    old = bench.summary_of([bench.Sample(1, "ssepush", case, {"x": 7.0}) for case in CASES], {"date": ""})
    samples = [bench.Sample(round_, "ssepush", "post 16", {"x": ours}) for round_, ours, _ in measured]
    samples += [bench.Sample(round_, "1.1", "post 16", {"x": release}) for round_, _, release in measured]
    both = bench.merged(old, bench.summary_of(samples, {"date": ""}))

    assert [case["case"] for case in both["cases"]] == CASES
    assert both["cases"][1]["to_1.1"] == {"ssepush": 1.5}
    assert bench.figure(both, "ssepush", "post 16", "x") == 150
