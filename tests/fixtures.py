"""Fixtures of all tests: one Redis and one server for those that leave them in peace, and own ones for the others."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit import WAYS, RedisProcess, ServerProcess, Start, allow_files


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
    assert process.terminate() == 0
    assert "Traceback" not in process.output, process.output


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis of one test's own, to do harm to; it keeps an append-only file."""
    process = RedisProcess(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    yield process
    process.signal(signal.SIGCONT)
    process.kill()


@pytest.fixture(params=WAYS.values(), ids=list(WAYS))
def way(request: pytest.FixtureRequest) -> Any:
    """How the servers of the test subscribe; see both_ways."""
    return request.param


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts servers with options of the test's own, and ends them after it without a traceback."""

    def common_redis() -> RedisProcess:
        process = request.getfixturevalue("redis_process")
        assert isinstance(process, RedisProcess)
        return process

    is_run_in_both_ways = "way" in request.fixturenames
    start = Start(common_redis, request.getfixturevalue("way") if is_run_in_both_ways else ())
    yield start
    start.end()


_numbers = itertools.count(1)


@pytest.fixture
def channel() -> str:
    """A channel of the test's own: pub/sub knows no database numbers."""
    return f"test-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def many_files() -> None:
    """Let the tests themselves open as many connections as a flood needs."""
    if allow_files(6000) < 6000:
        pytest.skip("needs 6,000 open files")
