"""The tutorial: each command of its pages prints what the page says, and each stage mends the fault of the one before.

The pages are read as a reader reads them. A block of `sh` that starts a stage runs beside the rest of the page; any
other is run by bash. A block of `text` that follows is what it prints, `…` being different each time.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import kit
from tests.kit import wait_for

TUTORIAL = kit.HERE / "docs" / "tutorial"
TEXTS = {path.stem: path.read_text() for path in TUTORIAL.glob("*.md")}
PROGRAMS = {path.name: path.read_text() for path in TUTORIAL.glob("stage*.py")}
INSIDE = (kit.HERE / "docs" / "inside.md").read_text()
SSEPUSH = (kit.HERE / "ssepush.py").read_text()
STAGES = {  # page: its program, and how many lines that may have
    "1-digits": ("stage1_digits.py", 65),
    "2-redis": ("stage2_redis.py", 80),
    "3-closed-tabs": ("stage3_closed_tabs.py", 70),
    "4-strangers": ("stage4_strangers.py", 115),
    "5-selector": ("stage5_selector.py", 170),
    "6-resume": ("stage6_resume.py", 165),
}
SAFE = [name for name, _ in list(STAGES.values())[3:]]
OWN_NAMES = {"PAUSE_S", "MAX_STREAMS", "take", "hand_over", "start", "QUESTION_LUA"}  # not in ssepush.py
BLOCK = re.compile(r"^```(?!text)(\w*)\n(.*?)^```$(?:\s+^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
START = re.compile(r"((?:[A-Z_]+=\S+ )*)python3 docs/tutorial/(stage\w+\.py)\n")
ONLY_READS = re.compile(r"(redis-cli pubsub .*\n|curl -s \S+/threads\n)+")
TIME = re.compile(r"(sleep |--max-time |PAUSE_S=)([0-9.]+)")
PORT = re.compile(r"\b(50\d\d)\)\n\Z")  # the last word of a stage's program, in its call of serve or start
INDENTATION = re.compile("^ +", re.MULTILINE)
DEFINED = re.compile(r"^ *(?:class |def _?|(?=[A-Z_]{3,}\b.* = ))(\w+)", re.MULTILINE)  # constants, too


# ── The pages, command by command ────────────────────────────────────────────────────────────────────────────────────


class Reader(ExitStack):
    """Starts stages, and types what a page says, with a Redis of its own. slowness: by what times are multiplied."""

    def __init__(self, folder: Path, slowness: int = 1) -> None:
        super().__init__()
        self.slowness = slowness
        self.log = folder / "stage.log"
        self.stage: subprocess.Popen[bytes] | None = None  # the one that runs
        self.page_port, self.port = "", 0  # what the page calls it by, and its real one
        redis_cli = kit.needs("redis-cli")
        self.redis = kit.RedisProcess(folder)
        self.callback(self.redis.kill)
        self.callback(self.stop)
        # redis-cli knows our Redis, and prints `(integer) 1` as it does in a terminal, rather than `1`.
        script = folder / "redis-cli"
        script.write_text(f'#!/bin/sh\nexec {redis_cli} --no-raw -p {self.redis.port} "$@"\n')
        script.chmod(0o755)
        self.environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "REDIS_URL": self.redis.url}

    def start(self, name: str, variables: str = "") -> str:
        """Start a stage on a free port, after the one before it has been stopped; what it prints."""
        self.stop()
        (self.page_port,) = PORT.findall(PROGRAMS[name])
        self.port = kit.free_port()
        command = [sys.executable, str(TUTORIAL / name), str(self.port)]
        environment = self.environment | dict(variable.split("=") for variable in variables.split())
        with self.log.open("wb") as log:
            self.stage = kit.start_process(*command, stdout=log, stderr=log, env=environment)
        printed: str = wait_for(self.log.read_text, f"{name} has started")
        return printed.replace(str(self.port), self.page_port)

    def stop(self) -> None:
        """Ctrl-C."""
        if self.stage:
            stage, self.stage = self.stage, None
            stage.send_signal(signal.SIGINT)
            assert stage.wait(kit.DEADLINE_S) == 0
            assert self.log.read_text().endswith("stopped\n")

    def type(self, commands: str, printed: str) -> None:
        """Type what a block says. AssertionError: it prints something else."""
        commands = TIME.sub(lambda time: f"{time[1]}{float(time[2]) * self.slowness:g}", commands)
        if ONLY_READS.fullmatch(commands):
            wait_for(lambda: is_like(self.run(commands), printed), commands)
        elif start := START.fullmatch(commands):
            output = self.start(start[2], start[1])
            assert not printed or is_like(output, printed), f"{commands} printed\n{output}"
        else:
            output = self.run(commands)
            assert is_like(output, printed, is_mixed="&\n" in commands), f"{commands} printed\n{output}"

    def run(self, commands: str) -> str:
        """What the commands print, as in a terminal."""
        bash = ["bash", "-c", "exec 2>&1\n" + commands.replace(f":{self.page_port}/", f":{self.port}/")]
        return subprocess.run(bash, env=self.environment, stdout=subprocess.PIPE, text=True, timeout=40).stdout

    def post(self, body: bytes) -> bytes:
        """The answer to a publish."""
        return kit.exchange(self.port, kit.post(b"Content-Length: %d" % len(body), body=body))

    def publish(self, *numbers: int, channel: str = "sse") -> None:
        for number in numbers:
            answer = self.post(b'{"data": %d, "channel": "%b"}' % (number, channel.encode()))
            assert answer.startswith(b"HTTP/1.1 200 ")


def is_like(output: str, expected: str, is_mixed: bool = False) -> bool:
    """Whether a page's text describes the output; is_mixed: that of several commands at once, in no order."""
    lines = output.rstrip("\n").split("\n")
    patterns = [re.escape(line).replace("…", ".+") for line in expected.rstrip("\n").split("\n")]
    if is_mixed:
        lines, patterns = list(filter(None, lines)), list(filter(None, patterns))
    for pattern in patterns:
        fitting = [line for line in (lines if is_mixed else lines[:1]) if re.fullmatch(pattern, line)]
        if not fitting:
            return False
        lines.remove(fitting[0])
    return not lines


def does_as_it_says(page: str, folder: Path, slowness: int = 1) -> bool:
    """Do all that a page says, and if that fails, once more, more slowly. AssertionError: it fails again."""
    own = folder / f"{page}-{slowness}"
    own.mkdir()
    try:
        with Reader(own, slowness) as reader:
            for language, commands, printed in BLOCK.findall(TEXTS[page]):
                if language == "sh":
                    reader.type(commands, printed)
    except AssertionError:
        if slowness > 1:
            raise
        return does_as_it_says(page, folder, slowness=4)
    return True


def test_each_command_in_a_page_prints_what_the_page_says(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as readers:  # most of the time they wait
        assert all(readers.map(lambda page: does_as_it_says(page, tmp_path), STAGES))


OUTPUTS = {  # what was printed, what the page says, whether in any order, whether that fits
    "the same": ("a\nb\n", "a\nb\n", False, True),
    "a part that differs": ("id: 12-0\n", "id: …-0\n", False, True),
    "nothing, as it should be": ("", "", False, True),
    "mixed: another order": ("b\na\n", "a\nb\n", True, True),
    "mixed: a pattern that fits two lines": ("12-0\nid: 12-0\n", "…-0\nid: …-0\n", True, True),
    "mixed: nothing, as it should be": ("\n", "", True, True),
    "another order": ("b\na\n", "a\nb\n", False, False),
    "doubled": ("a\na\n", "a\n", False, False),
    "nothing": ("", "a\n", False, False),
    "more than nothing": ("a\n", "", False, False),
}


@pytest.mark.parametrize(("output", "expected", "is_mixed", "fits"), OUTPUTS.values(), ids=OUTPUTS)
def test_output_fits_if_the_page_describes_it(output: str, expected: str, is_mixed: bool, fits: bool) -> None:
    assert is_like(output, expected, is_mixed) == fits


# ── What no command shows ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with Reader(tmp_path) as reader:
        yield reader


def test_a_browser_gets_no_event_from_the_frames_of_the_article_and_each_digit_from_stage_1(reader: Reader) -> None:
    reader.start("stage1_digits.py")

    with kit.EventStream(reader.port, "/stream?article") as tab:
        tab.wait(lambda: b"data: 3\n" in tab.body, "three digits")
        assert tab.events == []
    with kit.EventStream(reader.port) as tab:
        assert tab.data(2) == ["1", "2"]


def test_a_browser_gets_each_event_of_stage_6_once_or_a_reset_until_redis_is_gone(reader: Reader) -> None:
    reader.start("stage6_resume.py", "PAUSE_S=0.01")
    received: list[kit.Received] = []
    with kit.EventStream(reader.port, "/stream?channel=a&channel=b") as tab:
        first = position = tab.position()  # before the first event of all

    with ThreadPoolExecutor() as publishers:
        publishing = publishers.map(lambda channel: reader.publish(*range(80), channel=channel), "ab")
        while len(received) < 160:
            with kit.EventStream(reader.port, "/stream?channel=a&channel=b", last_event_id=position) as tab:
                tab.take(1)
                received += tab.events
                position = tab.last_event_id
    assert list(publishing) == [None, None]
    reader.publish(*range(80, 101), channel="a")  # one more than is kept

    assert [event.id for event in received] == sorted({event.id for event in received})
    assert sorted(event.data for event in received) == sorted(2 * list(map(str, range(80))))
    with kit.EventStream(reader.port, f"/stream?channel=b&channel=a&lastEventId={first}") as tab:
        assert tab.next() == kit.Received('{"reason": "trimmed"}', "stream-reset", tab.last_event_id)
        reader.redis.kill()
        assert tab.until_end() == []


BAD_MESSAGES = {
    "no JSON": b"hello",
    "no UTF-8": b"\xff",
    "no object": b"42",
    "no data": b"{}",
    "nested too deeply": b"[" * 99_000,  # which comes in pieces
    "half a character": b'{"data": 1, "type": "\\ud800"}',
    "a line break in the type": b'{"data": 1, "type": "a\\rb"}',
    "a line break in the id": b'{"data": 1, "id": "7\\n"}',
    "an id of another kind": b'{"data": 1, "id": [1]}',
}


@pytest.mark.parametrize("name", SAFE)
def test_bad_messages_end_no_stream_and_each_browser_comes_back_at_another_time(reader: Reader, name: str) -> None:
    times = set()
    reader.start(name)

    for what, message in BAD_MESSAGES.items():
        with kit.EventStream(reader.port) as tab:
            tab.wait(lambda: tab.positions, "the stream is open")
            reader.redis.wait_for_subscribers("sse", 1)
            assert reader.post(message).startswith(b"HTTP/1.1 400 "), what
            reader.redis.publish("sse", message)
            reader.redis.publish("sse", '{"data": "the next"}')
            assert tab.data(1) == ["the next"], what
            times.add(tab.parser.retry_ms)
        reader.redis.wait_for_subscribers("sse", 0)

    assert reader.log.read_text().count("dropped a message: ") == len(BAD_MESSAGES)
    assert len(times) > 4
    assert all(time and 2000 <= time <= 4000 for time in times)


# ── The files, and inside.md ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", STAGES)
def test_a_page_quotes_its_stage_and_ends_with_sections_that_ssepush_has(page: str) -> None:
    code = INDENTATION.sub("", PROGRAMS[STAGES[page][0]] + (TUTORIAL / "page.html").read_text())
    _, _, table = TEXTS[page].partition("\n## In ssepush.py\n")
    header, first, *others = re.findall(r"^\| (\w[^|]*) \|", table, re.MULTILINE)

    for language, quoted, _ in BLOCK.findall(TEXTS[page]):
        assert language not in ("python", "js") or INDENTATION.sub("", quoted) in code
    assert header == "section"
    assert all(f"\n# ── {section}" in SSEPUSH for section in (first, *others))


def test_each_link_between_the_pages_leads_to_a_file() -> None:
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (TUTORIAL / target).exists(), page


def test_stages_are_short_and_stand_on_the_standard_library_and_redis_and_the_last_name_things_as_ssepush() -> None:
    allowed = {*sys.stdlib_module_names, "redis", *(name.removesuffix(".py") for name in PROGRAMS)}
    most_lines = {"stage6_wrong_order.py": 20, **dict(STAGES.values())}
    defined = DEFINED.findall(PROGRAMS["stage5_selector.py"] + PROGRAMS["stage6_resume.py"])

    assert TEXTS.keys() == {"README", *STAGES}
    assert PROGRAMS.keys() == most_lines.keys()
    for name, program in PROGRAMS.items():
        assert program.count("\n") <= most_lines[name], name
        assert allowed.issuperset(re.findall(r"^ *(?:import|from) (\w+)", program, re.MULTILINE)), name
    assert set(defined) - set(DEFINED.findall(SSEPUSH)) == OWN_NAMES


def test_names_that_inside_mentions_are_those_of_ssepush() -> None:
    words = set(re.findall(r"\w+", SSEPUSH))
    mentioned = set(re.findall(r"`(\w+(?:\.\w+)?)`", INSIDE))
    for name in mentioned - {"mypy", "pytest", "test_ssepush.py"}:
        assert words.issuperset(name.split(".")), name


def test_a_route_and_an_option_are_added_as_inside_says(redis_process: kit.RedisProcess, tmp_path: Path) -> None:
    source = SSEPUSH
    for language, diff, _ in BLOCK.findall(INSIDE):
        if language == "diff":
            before = re.sub(r"^(\+.*\n|.)", "", diff, flags=re.MULTILINE)
            assert source.count(before) == 1, diff
            source = source.replace(before, re.sub("^(-.*\n|.)", "", diff, flags=re.MULTILINE))
    (tmp_path / "ssepush.py").write_text(source)
    (tmp_path / "index.html").write_bytes((kit.HERE / "index.html").read_bytes())
    port = kit.free_port()
    options = [f"--port={port}", f"--redis-url={redis_process.url}", "--max-channels=1"]

    with kit.running(sys.executable, str(tmp_path / "ssepush.py"), *options):
        wait_for(lambda: kit.listens(port), "it listens")
        time = kit.exchange(port, kit.request(b"GET /time HTTP/1.1"))
        too_many = kit.exchange(port, kit.request(b"GET /stream?channel=a&channel=b HTTP/1.1"))

    assert b'\r\n\r\n{"state": "ok", "time": ' in time
    assert too_many.endswith(b'\r\n\r\n{"state": "error", "error": "a stream follows at most 1 channels"}\n')
