"""What the tests stand on: missing programs, and processes that nobody has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import HERE

SUITE = """
import pathlib, sys
import pytest
from tests.kit import needs, start_process

PIDS = pathlib.Path(__file__).with_name("pids")

def start():
    process = start_process(sys.executable, "-c", "import time; time.sleep(600)")
    with PIDS.open("a") as pids:
        pids.write(f"{process.pid}\\n")

@pytest.fixture(scope="session")
def half_way():
    start()
    needs("no-such-program")

@pytest.fixture
def never_ended():
    start()

def test_whose_fixture_fails(half_way): pass
def test_that_needs_it_too(): needs("no-such-program", "nor-this")
def test_that_starts_one(): start()
def test_whose_fixture_ends_nothing(never_ended): pass
"""


@pytest.mark.parametrize("ci", ["", "true"], ids=["at home", "with CI=true"])
def test_a_missing_program_is_told_in_one_line_or_is_a_failure_and_no_process_is_left(tmp_path: Path, ci: str) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.fixtures", "-p", "no:cacheprovider", str(suite)]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "CI": ci}
    environment.pop("PYTEST_XDIST_WORKER", None)

    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)

    told = "needs no-such-program: apt-get install no-such-program"
    assert ("1 failed, 2 passed, 1 error" if ci else f"2 skipped: {told}") in done.stdout, done.stdout
    assert told in done.stdout
    assert done.returncode == (1 if ci else 0)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
