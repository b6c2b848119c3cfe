"""The tutorial: each command of its pages prints what the page says, and each stage mends the fault of the one before.

The pages are read as a reader reads them. A block of `sh` that starts a stage runs beside the rest of the page; any
other is run by bash. A block of `text` that follows is what it prints, `…` being different each time.
"""

from __future__ import annotations

import ast
import contextlib
import http.client
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kit import DEADLINE_S, HERE, LOOPBACK, Parser, Received, RedisProcess, free_port, program, wait_for

TUTORIAL = HERE / "docs" / "tutorial"
STAGES = sorted(TUTORIAL.glob("stage*.py"))
PAGES = sorted(TUTORIAL.glob("[1-9]-*.md"))
MAX_LINES = 120

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
START = re.compile(r"((?:[A-Z_]+=\S+ )*)python3 docs/tutorial/(stage\w+\.py)\n")
ONLY_READS = re.compile(r"(redis-cli pubsub .*\n|curl -s \S+/threads\n)+")
TIME = re.compile(r"(sleep |--max-time |PAUSE_S=)([0-9.]+)")
DEFAULT_PORT = re.compile(r"\b(50\d\d)\)\n\Z")
"""The number that each stage ends with, in its call of serve or start."""


class Block(NamedTuple):
    """A block of code in a page."""

    line: int
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(text.count("\n", 0, found.start()) + 1, *found.groups()) for found in BLOCK.finditer(text)]


class Stage:
    """A stage as a process."""

    def __init__(self, name: str, redis: RedisProcess, log: Path, environment: dict[str, str], port: int = 0) -> None:
        self.port = port or free_port()
        self.log = log
        command = [sys.executable, str(TUTORIAL / name), str(self.port)]
        variables = {**os.environ, "REDIS_URL": redis.url, **environment}
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
        wait_for(lambda: self.times_said("stop with"), f"{name} has started")

    def times_said(self, text: str) -> int:
        """How often it has printed this."""
        output = self.log.read_text()
        assert self.process.poll() is None, output
        return output.count(text)

    def stop(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(DEADLINE_S) == 0
        assert self.log.read_text().endswith("stopped\n")


class Tab:
    """A browser's tab with an open stream. (The stages speak HTTP/1.0: the stream ends with the connection.)"""

    def __init__(self, port: int, path: str = "/stream", last_event_id: str = "") -> None:
        self.parser = Parser()
        self.body = b""
        self.taken = 0
        self.connection = http.client.HTTPConnection(LOOPBACK, port, timeout=DEADLINE_S)
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        self.connection.request("GET", path, headers=headers)
        self.response = self.connection.getresponse()
        assert self.response.status == 200
        assert self.response.headers["Content-Type"] == "text/event-stream"

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *exception: object) -> None:
        self.response.close()
        self.connection.close()

    def read(self) -> None:
        """What comes next."""
        received = self.response.read1(65536)
        assert received, f"ended after {self.body!r}"
        self.body += received
        self.parser.feed(received)

    def wait(self, condition: Callable[[], Any]) -> None:
        """Read until the condition holds; heartbeats alone do not prolong it."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"so far: {self.body!r}"
            self.read()

    def position(self) -> str:
        """The id that the browser comes back with, as soon as it has been told one."""
        self.wait(lambda: self.parser.last_event_id)
        return self.parser.last_event_id

    @property
    def events(self) -> list[Received]:
        """Those that came, without what only tells the position."""
        return [event for event in self.parser.events if event.type != "stream-position"]

    def data(self, number: int) -> list[str]:
        """The data of the first events."""
        self.wait(lambda: len(self.events) >= number)
        return [event.data for event in self.events]


@pytest.fixture
def start(redis_process: RedisProcess, tmp_path: Path) -> Iterator[StartStage]:
    """Starts stages on free ports, and stops them."""
    start = StartStage(redis_process, tmp_path)
    yield start
    start.stop_all()


@pytest.fixture(scope="module")
def stage_6(redis_process: RedisProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One for the tests that leave it in peace."""
    log = tmp_path_factory.mktemp("stage6") / "log"
    stage = Stage("stage6_strangers.py", redis_process, log, {})
    yield stage
    stage.stop()


class StartStage:
    def __init__(self, redis: RedisProcess, folder: Path) -> None:
        self.redis = redis
        self.folder = folder
        self.stages: list[Stage] = []

    def __call__(self, name: str, **environment: str) -> Stage:
        log = self.folder / f"{len(self.stages)}.log"
        stage = Stage(name, self.redis, log, environment)
        self.stages.append(stage)
        return stage

    def stop_all(self) -> None:
        for stage in self.stages:
            stage.stop()


# ── The pages, command by command ────────────────────────────────────────────────────────────────────────────────────


class Reader:
    """Someone who reads a page and types what it says, with a Redis of their own.

    slowness: by what the times in a page are multiplied, as on a machine where all takes longer.
    """

    def __init__(self, page: Path, folder: Path, slowness: int) -> None:
        self.page = page
        self.folder = folder
        self.slowness = slowness
        self.redis = RedisProcess(folder)
        self.stage: Stage | None = None  # the one that runs
        self.page_port = ""  # the port that the page calls it by
        programs = folder / "bin"
        programs.mkdir()
        redis_cli = programs / "redis-cli"
        # In a terminal, which this is not, redis-cli prints `(integer) 1` rather than `1` by itself.
        redis_cli.write_text(f'#!/bin/sh\nexec {program("redis-cli")} --no-raw -p {self.redis.port} "$@"\n')
        redis_cli.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}

    def read(self) -> None:
        """Do all that the page says."""
        blocks = blocks_of(self.page)
        try:
            for block, following in itertools.pairwise([*blocks, Block(0, "", "")]):
                if block.language == "sh":
                    expected = following.text if following.language == "text" else ""
                    slower = TIME.sub(self.slowed, block.text)
                    self.do(block._replace(text=slower), expected)
        finally:
            self.stop()
            self.redis.kill()

    def slowed(self, time: re.Match[str]) -> str:
        return f"{time[1]}{float(time[2]) * self.slowness:g}"

    def do(self, block: Block, expected: str) -> None:
        where = f"{self.page.name}, line {block.line}"
        start = START.fullmatch(block.text)
        if start:
            output = self.start(*start.groups())
            assert not expected or is_like(output, expected), f"{where}: printed\n{output}"
        elif ONLY_READS.fullmatch(block.text):
            wait_for(lambda: is_like(self.run(block.text), expected), f"{where}: as the page says")
        else:
            output = self.run(block.text)
            is_mixed = "&\n" in block.text
            assert is_like(output, expected, is_mixed), f"{where}: printed\n{output}"

    def start(self, variables: str, name: str) -> str:
        """Start a stage, after the one before it has been stopped; what it prints."""
        self.stop()
        source = (TUTORIAL / name).read_text()
        found = DEFAULT_PORT.search(source)
        assert found, f"{name} does not end with its port"
        self.page_port = found[1]
        environment = dict(each.split("=") for each in variables.split())
        log = self.folder / f"{name}.log"
        self.stage = Stage(name, self.redis, log, environment)
        return log.read_text().replace(str(self.stage.port), self.page_port)

    def stop(self) -> None:
        if self.stage:
            self.stage.stop()
        self.stage = None

    def run(self, commands: str) -> str:
        """What the commands print, as in a terminal."""
        if self.stage:
            commands = commands.replace(f":{self.page_port}/", f":{self.stage.port}/")
        done = subprocess.run(
            ["bash", "-c", commands],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * DEADLINE_S,
        )
        return done.stdout


def is_like(output: str, expected: str, is_mixed: bool = False) -> bool:
    """Whether a page's text describes the output; is_mixed: that of several commands at once, in no order."""
    lines = output.rstrip("\n").split("\n")
    patterns = [re.escape(line).replace("…", ".+") for line in expected.rstrip("\n").split("\n")]
    if is_mixed:
        lines = list(filter(None, lines))
        patterns = list(filter(None, patterns))
        lines = in_order_of(patterns, lines)
    return len(lines) == len(patterns) and all(map(re.fullmatch, patterns, lines))


def in_order_of(patterns: list[str], lines: list[str]) -> list[str]:
    """The lines, each in the place of the first pattern that it fits and no other line has taken; the rest after."""
    rest = list(lines)
    ordered = []
    for pattern in patterns:
        for line in rest:
            if re.fullmatch(pattern, line):
                ordered.append(line)
                rest.remove(line)
                break
    return ordered + rest


def read(page: Path, folder: Path) -> None:
    """Do all that a page says, and if that fails, once more, more slowly."""
    for slowness in (1, 4):
        own = folder / f"{page.stem}-{slowness}"
        own.mkdir()
        try:
            Reader(page, own, slowness).read()
            return
        except AssertionError:
            if slowness > 1:
                raise


def test_each_command_in_a_page_prints_what_the_page_says(tmp_path: Path) -> None:
    with ThreadPoolExecutor(len(PAGES)) as readers:  # most of the time they wait
        reading = [readers.submit(read, page, tmp_path) for page in PAGES]

    for each in reading:
        each.result()


@pytest.mark.parametrize(
    ("output", "expected", "is_mixed", "fits"),
    [
        pytest.param("a\nb\n", "a\nb\n", False, True, id="the same"),
        pytest.param("b\na\n", "a\nb\n", False, False, id="another order"),
        pytest.param("b\na\n", "a\nb\n", True, True, id="another order, of commands at once"),
        pytest.param("id: 12-0\n", "id: …-0\n", False, True, id="a part that differs"),
        pytest.param("12-0\nid: 12-0\n", "…-0\nid: …-0\n", True, True, id="a pattern that fits two lines"),
        pytest.param("a\na\n", "a\n", True, False, id="doubled"),
        pytest.param("", "a\n", True, False, id="nothing"),
        pytest.param("a\n", "", False, False, id="more than nothing"),
        pytest.param("", "", False, True, id="nothing, as it should be"),
    ],
)
def test_output_is_compared_line_by_line(output: str, expected: str, is_mixed: bool, fits: bool) -> None:
    assert is_like(output, expected, is_mixed) == fits


# ── What no command shows ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_browser_gets_no_event_from_the_frames_of_the_article_and_each_digit_from_stage_1(start: StartStage) -> None:
    stage = start("stage1_digits.py")

    with Tab(stage.port, "/stream?article") as tab:
        tab.wait(lambda: b"data: 3\n" in tab.body)
        assert tab.events == []
    with Tab(stage.port) as tab:
        assert tab.data(7) == ["1", "2", "3", "4", "5", "6", "1"]


def test_a_browser_that_comes_back_again_and_again_gets_each_event_of_stage_5_once(start: StartStage) -> None:
    stage = start("stage5_resume.py", PAUSE_S="0.01")
    numbers = [str(number) for number in range(100)]
    publishing = threading.Thread(target=publish_all, args=(stage.port, numbers))
    received: list[str] = []

    publish_all(stage.port, ["-1"])  # before the first event of all, there is no position to come back to
    with Tab(stage.port) as tab:
        position = tab.position()
    publishing.start()
    while len(received) < len(numbers):
        with Tab(stage.port, last_event_id=position) as tab:
            received += tab.data(1)
            position = tab.parser.last_event_id
    publishing.join()

    assert received == numbers


def publish_all(port: int, numbers: list[str]) -> None:
    for number in numbers:
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.request("POST", "/publish", f'{{"data": {number}}}')
            assert connection.getresponse().status == 200


def test_stage_6_tells_each_browser_another_time_to_come_back(stage_6: Stage) -> None:
    times = set()

    for _ in range(8):
        with Tab(stage_6.port) as tab:
            tab.position()
            times.add(tab.parser.retry_ms)

    assert len(times) > 4
    assert all(time and 2000 <= time <= 4000 for time in times)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"hello", id="no JSON"),
        pytest.param(b"\xff", id="no UTF-8"),
        pytest.param(b"42", id="no object"),
        pytest.param(b"{}", id="no data"),
        pytest.param(b'{"data": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", id="nested too deeply"),
        pytest.param(b'{"data": 1, "type": "\\ud800"}', id="half a character"),
        pytest.param(b'{"data": 1, "type": "a\\rb"}', id="a line break in the type"),
        pytest.param(b'{"data": 1, "id": "7"}', id="an id that is not ours"),
        pytest.param(b'{"data": 1, "id": [1]}', id="an id of another kind"),
    ],
)
def test_a_bad_message_ends_no_stream_of_stage_6(stage_6: Stage, redis_process: RedisProcess, message: bytes) -> None:
    dropped_before = stage_6.times_said("dropped a message: ")

    with Tab(stage_6.port) as tab:
        tab.position()
        redis_process.publish("sse", message)
        redis_process.publish("sse", '{"data": "the next"}')

        assert tab.data(1) == ['"the next"']
    assert stage_6.times_said("dropped a message: ") == dropped_before + 1


# ── The files ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.stem)
def test_a_stage_is_short_and_stands_on_the_standard_library_and_redis(stage: Path) -> None:
    source = stage.read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])

    stages = {each.stem for each in STAGES}
    assert imported <= sys.stdlib_module_names | stages | {"redis"}
    assert source.count("\n") <= MAX_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_that_a_page_quotes_stands_in_its_stage(page: Path) -> None:
    stages = "".join(path.read_text() for path in [*STAGES, TUTORIAL / "page.html"])
    lines_there = [line.strip() for line in stages.splitlines()]

    for block in blocks_of(page):
        if block.language in ("python", "js"):
            quoted = [line.strip() for line in block.text.splitlines()]
            places = range(len(lines_there))
            assert any(lines_there[place : place + len(quoted)] == quoted for place in places), block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_ends_with_sections_that_ssepush_has(page: Path) -> None:
    banners = re.findall(r"^# ── (.+?) ──", (HERE / "ssepush.py").read_text(), re.MULTILINE)
    sections = {banner.partition(":")[0] for banner in banners}
    table = page.read_text().partition("\n## In ssepush.py\n")[2]
    named = re.findall(r"^\| (\w[^|]*) \|", table, re.MULTILINE)

    assert named[0] == "section"
    assert len(named) > 1
    assert set(named[1:]) <= sections


def test_each_link_between_the_pages_leads_to_a_file() -> None:
    for page in [TUTORIAL / "README.md", *PAGES]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (TUTORIAL / target).exists(), f"{page.name}: {target}"
