"""Fixtures of all tests: one Redis and one server for those that leave them in peace, and own ones for the others.

Where pytest-xdist runs several tests at once, those that are marked `alone` still have the machine to themselves.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import itertools
import os
import resource
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit import WAYS, RedisProcess, ServerProcess, Start, ending_processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that need the machine to themselves come last, when nothing else is left to do."""
    items.sort(key=is_alone)


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each program that is missing: how many tests were skipped without it, and how to get it."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = collections.Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("what was skipped")
    for reason, number in sorted(reasons.items()):
        terminalreporter.line(f"{number} skipped: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with its_turn(is_alone(item)), ending_processes():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Generator[None, object, object]:
    """A fixture that fails half way leaves no process behind."""
    with ending_processes(keep=True):
        return (yield)


def pytest_configure() -> None:
    """Whoever ends the run by a signal ends its processes, too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def its_turn(alone: bool) -> Iterator[None]:
    """Among the processes of a run: wait until all others are between two tests if alone, else only for such a one.

    Two files that are there anyway serve as locks. The gate is held while waiting, so that nobody who comes later goes
    before somebody who waits to be alone.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    folder = Path(__file__).parent
    with (folder / "__init__.py").open() as gate, (folder / "fixtures.py").open() as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """One Redis for the tests that leave it in peace."""
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield process
    process.kill()


@pytest.fixture(scope="session", params=WAYS.values(), ids=list(WAYS))
def server(request: pytest.FixtureRequest, redis_process: RedisProcess) -> Iterator[ServerProcess]:
    """One server, in both ways, for the tests that leave it in peace."""
    process = ServerProcess(redis_process, *request.param)
    yield process
    process.end()
    assert process.process.returncode == 0


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis of one test's own, to do harm to; it keeps an append-only file."""
    process = RedisProcess(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    yield process
    process.kill()


@pytest.fixture(params=WAYS.values(), ids=list(WAYS))
def way(request: pytest.FixtureRequest) -> Any:
    """How the servers of the test subscribe; see both_ways."""
    return request.param


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts servers of one test's own: `start("--history", "5")`; they end with it, without a traceback."""
    way = request.getfixturevalue("way") if "way" in request.fixturenames else ()
    started: list[ServerProcess] = []

    def start(*options: str, redis: RedisProcess | str | None = None, **more: Any) -> ServerProcess:
        chosen = request.getfixturevalue("redis_process") if redis is None else redis
        started.append(ServerProcess(chosen, *way, *options, **more))
        return started[-1]

    yield start
    for server in started:
        server.end()


_numbers = itertools.count(1)


@pytest.fixture
def channel() -> str:
    """A channel of the test's own: pub/sub knows no database numbers."""
    return f"test-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def many_files() -> None:
    """Let the tests themselves open as many connections as a flood needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 6000), hard))
    except ValueError:
        pytest.skip("needs 6,000 open files")
