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

from tests.kit import (
    DEADLINE_S,
    HERE,
    LOOPBACK,
    Parser,
    Received,
    RedisProcess,
    free_port,
    listens,
    program,
    wait_for,
)

TUTORIAL = HERE / "docs" / "tutorial"
STAGES = sorted(TUTORIAL.glob("stage*.py"))
PAGES = sorted(TUTORIAL.glob("[1-9]-*.md"))
STAGE_NAMES = [stage.stem for stage in STAGES]
PAGE_NAMES = [page.stem for page in PAGES]
MAX_LINES = 120

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
START = re.compile(r"((?:[A-Z_]+=\S+ )*)python3 docs/tutorial/(stage\w+\.py)\n")
ONLY_READS = re.compile(r"(redis-cli pubsub .*\n|curl -s \S+/threads\n)+")
TIME = re.compile(r"(sleep |--max-time |PAUSE_S=)([0-9.]+)")
PORT = re.compile(r"\b(50\d\d)\)\n\Z")  # the last word of a stage's program, in its call of serve or start


# ── Stages as processes, and tabs that are open ──────────────────────────────────────────────────────────────────────


class Stage:
    """A stage as a process, on a free port."""

    def __init__(
        self,
        name: str,
        redis: RedisProcess,
        log: Path,
        variables: dict[str, str],
    ) -> None:
        self.port = free_port()
        self.log = log
        path = str(TUTORIAL / name)
        command = [sys.executable, path, str(self.port)]
        environment = os.environ | {"REDIS_URL": redis.url} | variables
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=environment,
            )
        wait_for(lambda: self.times_said("stop with"), f"{name} has started")

    def times_said(self, text: str) -> int:
        """How often it has printed this."""
        output = self.log.read_text()
        assert self.process.poll() is None, output
        return output.count(text)

    def stop(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(DEADLINE_S)
        output = self.log.read_text()
        assert status == 0
        assert output.endswith("stopped\n")


class StartStage:
    """Starts stages with one Redis, and stops them all."""

    def __init__(self, redis: RedisProcess, folder: Path) -> None:
        self.redis = redis
        self.folder = folder
        self.stages: list[Stage] = []

    def __call__(self, name: str, **variables: str) -> Stage:
        number = len(self.stages)
        log = self.folder / f"{number}.log"
        stage = Stage(name, self.redis, log, variables)
        self.stages.append(stage)
        return stage

    def stop_all(self) -> None:
        for stage in self.stages:
            stage.stop()


@pytest.fixture
def start(redis_process: RedisProcess, tmp_path: Path) -> Iterator[StartStage]:
    """Starts stages for one test."""
    start = StartStage(redis_process, tmp_path)
    yield start
    start.stop_all()


@pytest.fixture(scope="module")
def stage_6(redis_process: RedisProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One for the tests that leave it in peace."""
    folder = tmp_path_factory.mktemp("stage6")
    start = StartStage(redis_process, folder)
    yield start("stage6_strangers.py")
    start.stop_all()


class Tab:
    """A browser's tab with an open stream. (The stages speak HTTP/1.0: the stream ends with the connection.)"""

    def __init__(
        self,
        port: int,
        path: str = "/stream",
        last_event_id: str = "",
    ) -> None:
        self.parser = Parser()
        self.body = b""
        headers = {}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        self.connection = http.client.HTTPConnection(LOOPBACK, port, timeout=DEADLINE_S)
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
        came = self.parser.events
        return [event for event in came if event.type != "stream-position"]

    def data(self, number: int) -> list[str]:
        """The data of all events, which are as many at least."""
        self.wait(lambda: len(self.events) >= number)
        return [event.data for event in self.events]


# ── The pages, command by command ────────────────────────────────────────────────────────────────────────────────────


class Block(NamedTuple):
    """A block of code in a page, and what the page says that it prints."""

    where: str
    language: str
    text: str
    printed: str


def blocks_of(page: Path) -> list[Block]:
    """All of a page, without those that only say what others print."""
    text = page.read_text()
    found = list(BLOCK.finditer(text))
    blocks = []
    for block, following in itertools.zip_longest(found, found[1:]):
        language, code = block.groups()
        before = text[: block.start()]
        line = before.count("\n") + 1
        printed = ""
        if following and following[1] == "text":
            printed = following[2]
        if language != "text":
            where = f"{page.name}, line {line}"
            blocks.append(Block(where, language, code, printed))
    return blocks


class Reader:
    """Someone who reads a page and types what it says, with a Redis of their own.

    slowness: by what the times in a page are multiplied, as on a machine where all takes longer.
    """

    def __init__(self, folder: Path, slowness: int) -> None:
        self.folder = folder
        self.slowness = slowness
        self.redis = RedisProcess(folder)
        self.stage: Stage | None = None  # the one that runs
        self.page_port = ""  # the port that the page calls it by
        programs = self.programs()
        path = os.environ["PATH"]
        self.environment = os.environ | {"PATH": f"{programs}:{path}"}

    def programs(self) -> Path:
        """Where redis-cli knows our Redis, and prints `(integer) 1` as it does in a terminal, rather than `1`."""
        folder = self.folder / "bin"
        folder.mkdir()
        script = folder / "redis-cli"
        real = program("redis-cli")
        script.write_text(f'#!/bin/sh\nexec {real} --no-raw -p {self.redis.port} "$@"\n')
        script.chmod(0o755)
        return folder

    def end(self) -> None:
        """Stop what runs."""
        try:
            self.stop()
        finally:
            self.redis.kill()

    def read(self, page: Path) -> None:
        """Do all that the page says."""
        for block in blocks_of(page):
            if block.language == "sh":
                self.do(block)

    def do(self, block: Block) -> None:
        commands = TIME.sub(self.slowed, block.text)
        start = START.fullmatch(commands)
        if ONLY_READS.fullmatch(commands):
            wait_for(
                lambda: is_like(self.run(commands), block.printed),
                f"{block.where}: as the page says",
            )
            return
        is_mixed = "&\n" in commands
        if start:
            variables, name = start.groups()
            output = self.start(variables, name)
        else:
            output = self.run(commands)
        is_told = block.printed or not start
        if is_told:
            assert is_like(output, block.printed, is_mixed), f"{block.where}: printed\n{output}"

    def slowed(self, time: re.Match[str]) -> str:
        what, seconds = time.groups()
        slow_s = float(seconds) * self.slowness
        return f"{what}{slow_s:g}"

    def start(self, variables: str, name: str) -> str:
        """Start a stage, after the one before it has been stopped; what it prints."""
        self.stop()
        source = (TUTORIAL / name).read_text()
        port = PORT.search(source)
        assert port, f"{name} does not end with its port"
        self.page_port = port[1]
        environment = {}
        for variable in variables.split():
            key, _, value = variable.partition("=")
            environment[key] = value
        log = self.folder / f"{name}.log"
        self.stage = Stage(name, self.redis, log, environment)
        output = log.read_text()
        own_port = str(self.stage.port)
        return output.replace(own_port, self.page_port)

    def stop(self) -> None:
        if self.stage:
            self.stage.stop()
        self.stage = None

    def run(self, commands: str) -> str:
        """What the commands print, as in a terminal."""
        if self.stage:
            in_page = f":{self.page_port}/"
            here = f":{self.stage.port}/"
            commands = commands.replace(in_page, here)
        done = subprocess.run(
            ["bash", "-c", commands],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * DEADLINE_S,
        )
        return done.stdout


def is_like(
    output: str,
    expected: str,
    is_mixed: bool = False,
) -> bool:
    """Whether a page's text describes the output; is_mixed: that of several commands at once, in no order."""
    lines = output.rstrip("\n").split("\n")
    patterns = []
    for line in expected.rstrip("\n").split("\n"):
        pattern = re.escape(line)
        patterns.append(pattern.replace("…", ".+"))
    if is_mixed:
        patterns = [pattern for pattern in patterns if pattern]
        lines = in_order_of(patterns, lines)
    if len(lines) != len(patterns):
        return False
    return all(map(re.fullmatch, patterns, lines))


def in_order_of(
    patterns: list[str],
    lines: list[str],
) -> list[str]:
    """The lines that are not empty, each in the place of the first pattern that it fits; the others after them."""
    rest = [line for line in lines if line]
    ordered = []
    for pattern in patterns:
        fitting = [line for line in rest if re.fullmatch(pattern, line)]
        if fitting:
            line = fitting[0]
            ordered.append(line)
            rest.remove(line)
    return ordered + rest


def read(page: Path, folder: Path) -> None:
    """Do all that a page says, and if that fails, once more, more slowly."""
    for slowness in (1, 4):
        own = folder / f"{page.stem}-{slowness}"
        own.mkdir()
        reader = Reader(own, slowness)
        try:
            reader.read(page)
            return
        except AssertionError:
            if slowness > 1:
                raise
        finally:
            reader.end()


def test_each_command_in_a_page_prints_what_the_page_says(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as readers:  # most of the time they wait
        reading = [readers.submit(read, page, tmp_path) for page in PAGES]

    for each in reading:
        each.result()


FITTING = {
    "the same": ("a\nb\n", "a\nb\n"),
    "a part that differs": ("id: 12-0\n", "id: …-0\n"),
    "nothing, as it should be": ("", ""),
}
FITTING_IF_MIXED = {
    "another order": ("b\na\n", "a\nb\n"),
    "a pattern that fits two lines": ("12-0\nid: 12-0\n", "…-0\nid: …-0\n"),
    "nothing, as it should be": ("\n", ""),
}
UNFIT = {
    "another order": ("b\na\n", "a\nb\n"),
    "doubled": ("a\na\n", "a\n"),
    "nothing": ("", "a\n"),
    "more than nothing": ("a\n", ""),
}


@pytest.mark.parametrize(("output", "expected"), FITTING.values(), ids=FITTING)
def test_output_as_expected_fits(output: str, expected: str) -> None:
    assert is_like(output, expected)


@pytest.mark.parametrize(("output", "expected"), FITTING_IF_MIXED.values(), ids=FITTING_IF_MIXED)
def test_output_of_commands_at_once_fits_in_any_order(output: str, expected: str) -> None:
    assert is_like(output, expected, is_mixed=True)


@pytest.mark.parametrize(("output", "expected"), UNFIT.values(), ids=UNFIT)
def test_other_output_does_not_fit(output: str, expected: str) -> None:
    assert not is_like(output, expected)


# ── What no command shows ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_browser_gets_no_event_from_the_frames_of_the_article_and_each_digit_from_stage_1(start: StartStage) -> None:
    stage = start("stage1_digits.py")

    with Tab(stage.port, "/stream?article") as tab:
        tab.wait(lambda: b"data: 3\n" in tab.body)
        assert tab.events == []
    with Tab(stage.port) as tab:
        assert tab.data(2) == ["1", "2"]


def test_a_browser_that_comes_back_again_and_again_gets_each_event_of_stage_5_once(start: StartStage) -> None:
    stage = start("stage5_resume.py", PAUSE_S="0.01")
    numbers = [str(number) for number in range(100)]
    publishing = threading.Thread(
        target=publish_all,
        args=(stage.port, numbers),
    )
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
        body = f'{{"data": {number}}}'
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.request("POST", "/publish", body)
            response = connection.getresponse()
            assert response.status == 200


def test_stage_6_tells_each_browser_another_time_to_come_back(stage_6: Stage) -> None:
    times = set()

    for _ in range(8):
        with Tab(stage_6.port) as tab:
            tab.position()
            times.add(tab.parser.retry_ms)

    assert len(times) > 4
    assert all(time and 2000 <= time <= 4000 for time in times)


BAD_MESSAGES = {
    "no JSON": b"hello",
    "no UTF-8": b"\xff",
    "no object": b"42",
    "no data": b"{}",
    "nested too deeply": b"[" * 50_000,
    "half a character": b'{"data": 1, "type": "\\ud800"}',
    "a line break in the type": b'{"data": 1, "type": "a\\rb"}',
    "an id that is not ours": b'{"data": 1, "id": "7"}',
    "an id of another kind": b'{"data": 1, "id": [1]}',
}


@pytest.mark.parametrize("message", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_bad_message_ends_no_stream_of_stage_6(
    stage_6: Stage,
    redis_process: RedisProcess,
    message: bytes,
) -> None:
    dropped_before = stage_6.times_said("dropped a message: ")

    with Tab(stage_6.port) as tab:
        tab.position()
        redis_process.publish("sse", message)
        redis_process.publish("sse", '{"data": "the next"}')

        assert tab.data(1) == ['"the next"']
    assert stage_6.times_said("dropped a message: ") == dropped_before + 1


# ── The files ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", STAGES, ids=STAGE_NAMES)
def test_a_stage_is_short_and_stands_on_the_standard_library_and_redis(stage: Path) -> None:
    allowed = {*sys.stdlib_module_names, *STAGE_NAMES, "redis"}
    source = stage.read_text()
    lines = source.count("\n")

    assert imported_by(source) <= allowed
    assert lines <= MAX_LINES


def imported_by(source: str) -> set[str]:
    """The modules that a program imports, without what is inside them."""
    modules = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(str(node.module))
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_code_that_a_page_quotes_stands_in_its_stage(page: Path) -> None:
    programs = [*STAGES, TUTORIAL / "page.html"]
    sources = [without_indentation(path.read_text()) for path in programs]

    for block in blocks_of(page):
        if block.language in ("python", "js"):
            quoted = without_indentation(block.text)
            assert any(quoted in source for source in sources), block


def without_indentation(text: str) -> str:
    return re.sub("^ +", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_a_page_ends_with_sections_that_ssepush_has(page: Path) -> None:
    source = (HERE / "ssepush.py").read_text()
    banners = "\n".join(re.findall("^# ── .*", source, re.MULTILINE))
    _, _, table = page.read_text().partition("\n## In ssepush.py\n")
    header, *named = re.findall(r"^\| (\w[^|]*) \|", table, re.MULTILINE)
    missing = [name for name in named if f"# ── {name}" not in banners]

    assert header == "section"
    assert named
    assert missing == []


def test_each_link_between_the_pages_leads_to_a_file() -> None:
    for page in TUTORIAL.glob("*.md"):
        text = page.read_text()
        targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        for target in targets:
            path = TUTORIAL / target
            assert path.exists(), page.name


# ── Inside ───────────────────────────────────────────────────────────────────────────────────────────────────────────

INSIDE = HERE / "docs" / "inside.md"
OTHER_NAMES = {"mypy", "pytest", "test_ssepush.py"}


def test_names_that_inside_mentions_are_those_of_ssepush() -> None:
    source = (HERE / "ssepush.py").read_text()
    words = set(re.findall(r"\w+", source))
    text = INSIDE.read_text()
    mentioned = set(re.findall(r"`(\w+(?:\.\w+)?)`", text))
    for name in mentioned - OTHER_NAMES:
        assert words.issuperset(name.split(".")), name


def without_lines(diff: str, mark: str) -> str:
    """The text of a diff on one side: without the lines that it marks as the other's."""
    kept = []
    for line in diff.splitlines(keepends=True):
        if not line.startswith(mark):
            kept.append(line[1:])
    return "".join(kept)


def changed_by_inside() -> str:
    """ssepush.py with the changes that the page makes to add a route and an option."""
    source = (HERE / "ssepush.py").read_text()
    for block in blocks_of(INSIDE):
        if block.language == "diff":
            before = without_lines(block.text, "+")
            after = without_lines(block.text, "-")
            assert source.count(before) == 1, block.where
            source = source.replace(before, after)
    return source


def test_a_route_and_an_option_are_added_as_inside_says(redis_process: RedisProcess, tmp_path: Path) -> None:
    program = tmp_path / "ssepush.py"
    program.write_text(changed_by_inside())
    page = tmp_path / "index.html"
    page.write_bytes((HERE / "index.html").read_bytes())
    port = free_port()
    command = [
        sys.executable,
        str(program),
        f"--port={port}",
        f"--redis-url={redis_process.url}",
        "--max-channels=1",
    ]

    with subprocess.Popen(command) as process:
        try:
            wait_for(lambda: listens(port), "it listens")
            time_answer = answer_to(port, "/time")
            too_many = answer_to(port, "/stream?channel=a&channel=b")
        finally:
            process.terminate()

    assert time_answer.startswith('{"state": "ok", "time": ')
    assert too_many == '{"state": "error", "error": "a stream follows at most 1 channels"}\n'


def answer_to(port: int, path: str) -> str:
    """The body of the answer."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.read().decode()
