"""In production: several processes on a port, systemd, nginx."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver.chrome.webdriver import WebDriver

import ssepush
from tests.kit import (
    DEADLINE_S,
    DEPLOY,
    EventStream,
    Page,
    Publisher,
    RedisProcess,
    ServerProcess,
    Start,
    assert_whole,
    both_ways,
    certificate,
    free_port,
    program,
    ssepush_command,
    wait_for,
)

# ── Several processes on a port ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def three(start: Start, redis_process: RedisProcess) -> list[ServerProcess]:
    """Three processes on one port around one Redis."""
    port = free_port()
    return [start("--reuse-port", "--retry", "10", port=port) for _ in range(3)]


def streams_at_all(
    processes: list[ServerProcess],
    query: str,
) -> list[EventStream]:
    """As many streams as it takes until the kernel has given one to each process."""
    streams: list[EventStream] = []

    def all_have_one() -> bool:
        streams.append(processes[0].stream(query=query))
        return all(process.said(" open: ") for process in processes)

    wait_for(all_have_one, "each process has a stream")
    return streams


def test_an_event_published_at_any_process_reaches_the_streams_of_all(three: list[ServerProcess], channel: str) -> None:
    streams = streams_at_all(three, f"channel={channel}")
    at_processes, expected = 0, list[str]()

    while at_processes < 3:  # each counts its own publishes: the first one of each is told by its 1
        connection = http.client.HTTPConnection(
            "127.0.0.1",
            three[0].port,
            timeout=DEADLINE_S,
        )
        with contextlib.closing(connection):
            body = json.dumps({"channel": channel, "data": len(expected)})
            connection.request("POST", "/publish", body, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            connection.request("GET", "/metrics")
            at_processes += b'publishes_total{status="ok"} 1\n' in connection.getresponse().read()
        assert answer["receivers"] == len(streams)
        expected.append(str(len(expected)))
        assert len(expected) < 200

    ids: list[str] = []
    for stream in streams:
        events = stream.take(len(expected))
        ids = ids or [event.id for event in events]
        assert [event.data for event in events] == expected
        assert [event.id for event in events] == ids


def test_streams_of_a_process_that_ends_go_on_at_the_others(
    three: list[ServerProcess], redis_process: RedisProcess, channel: str
) -> None:
    streams = streams_at_all(three, f"channel={channel}")
    ssepush.publish("one", channel=channel, redis_url=redis_process.url)
    for stream in streams:
        stream.next()

    three[0].terminate()
    ssepush.publish("two", channel=channel, redis_url=redis_process.url)

    for stream in streams:
        try:
            assert stream.next().data == "two"
        except AssertionError:
            assert stream.ended
            again = three[1].stream(channel, Last_Event_ID=stream.last_event_id)
            assert again.next().data == "two"
    assert sum(stream.ended for stream in streams) == len(
        re.findall(r" closed after [0-9.]+ s: drain\n", three[0].output)
    )


@both_ways
def test_a_rolling_restart_of_two_processes_on_one_port_loses_nothing(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    names, port = [f"{channel}-{letter}" for letter in "ab"], free_port()
    options = ("--reuse-port", "--history", "100000", "--retry", "300", "--drain", "2")
    servers = [start(*options, port=port, redis=own_redis)]
    pages = [Page(port, *names[: 1 + number % 2]) for number in range(40)]
    wait_for(lambda: all(page.last_event_id for page in pages), "all pages have a position")
    publishers = [Publisher(port, str(number), *names, pause=0.002) for number in range(2)]

    for _ in range(2):
        before = [page.streams for page in pages]
        servers.append(start(*options, port=port, redis=own_redis))
        servers[-2].signal(signal.SIGTERM)
        assert servers[-2].process.wait(DEADLINE_S) == 0
        wait_for(lambda: all(page.streams > n for page, n in zip(pages, before, strict=True)), "all pages came back")  # noqa: B023
    wait_for(lambda: sum(len(publisher.acknowledged) for publisher in publishers) > 200, "enough was published")
    for publisher in publishers:
        publisher.stop()
    for name in reversed(names):
        wait_for(lambda: servers[-1].post({"data": "last", "channel": name}).status == 200, "the last event")  # noqa: B023
    for page in pages:
        page.wait_for("last")

    assert sum(len(publisher.unsure) for publisher in publishers) < 10
    for page in pages:
        assert_whole(page, publishers)
        assert not any(event.type == "stream-reset" for event in page.events)


# ── systemd ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that is there."""
    program = tmp_path / "ssepush"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(ssepush_command())} "$@"\n')
    program.chmod(0o755)
    unit = tmp_path / "ssepush@.service"
    unit.write_text((DEPLOY / "ssepush@.service").read_text().replace("/opt/ssepush/bin/ssepush ", f"{program} "))
    return unit


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    analyze = program("systemd-analyze")

    done = subprocess.run(
        [analyze, "verify", str(unit)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_systemd_finds_the_unit_hardened(unit: Path) -> None:
    analyze = [program("systemd-analyze"), "security", "--offline=true", "--threshold=20", "--no-pager"]
    instance = unit.with_name("ssepush@1.service")
    instance.write_text(unit.read_text())

    done = subprocess.run(
        [*analyze, str(instance)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )

    assert done.returncode == 0, done.stdout[-200:] + done.stderr


# ── nginx ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Nginx:
    """An nginx of the test's own; http: what is inside http { }."""

    def __init__(
        self,
        folder: Path,
        port: int,
        http: str,
    ) -> None:
        temporary = "".join(f"{name}_temp_path {folder}/{name};\n" for name in self.BUFFERS)
        user = "user root;\n" if os.getuid() == 0 else ""
        (folder / "nginx.conf").write_text(
            f"{user}daemon off;\nworker_processes 1;\npid {folder}/nginx.pid;\nevents {{ worker_connections 256; }}\n"
            f"http {{\naccess_log off;\n{temporary}{http}\n}}\n"
        )
        self.folder, self.log = folder, folder / "error.log"
        command = [
            program("nginx"),
            "-p",
            str(folder),
            "-c",
            f"{folder}/nginx.conf",
            "-e",
            str(self.log),
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.port = port
        wait_for(self.listens, "nginx listens")

    BUFFERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")

    def listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection(
                "127.0.0.1",
                self.port,
                timeout=DEADLINE_S,
            )
            with contextlib.closing(connection):
                connection.connect()
                return True
        return False

    def trusting(self) -> ssl.SSLContext:
        """What takes its certificate."""
        return ssl.create_default_context(cafile=self.folder / "certificate.pem")

    def terminate(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE_S)


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[..., Nginx]]:
    """Starts an nginx in front of a server: `nginx(server.port, "gzip on;")`."""
    started: list[Nginx] = []

    def start_one(upstream: int, directives: str = "") -> Nginx:
        port = free_port()
        location = f"location / {{ proxy_pass http://127.0.0.1:{upstream}; }}"
        listen = f"listen 127.0.0.1:{port};"
        started.append(Nginx(tmp_path, port, f"server {{ {listen}\n{directives}\n{location} }}"))
        return started[-1]

    yield start_one
    for process in started:
        process.terminate()


NGINX = {
    "default buffering": ("", ""),
    "gzip": ("gzip on; gzip_types text/event-stream; gzip_proxied any; gzip_min_length 0;", "gzip"),
    "gzip, HTTP/1.1 to the server": (
        'gzip on; gzip_types *; gzip_proxied any; proxy_http_version 1.1; proxy_set_header Connection "";',
        "gzip",
    ),
}


@pytest.mark.parametrize(
    ("directives", "encoding"),
    NGINX.values(),
    ids=NGINX,
)
def test_events_pass_nginx_at_once(
    start: Start,
    nginx: Callable[..., Nginx],
    redis_process: RedisProcess,
    channel: str,
    directives: str,
    encoding: str,
) -> None:
    server = start("--heartbeat", "3600")  # nothing else pushes what is held back
    proxy = nginx(server.port, directives)
    stream = EventStream(proxy.port, f"/stream?channel={channel}", Accept_Encoding=encoding)

    for number in range(20):
        server.publish(number, channel)

        assert stream.next().data == str(number)

    assert stream.is_compressed == bool(encoding)
    stream.close()
    wait_for(lambda: server.streams() == 0, "nginx has let go of the stream")


def test_heartbeats_keep_a_silent_stream_open_beyond_the_read_timeout_of_nginx(
    start: Start, nginx: Callable[..., Nginx], redis_process: RedisProcess, channel: str
) -> None:
    server = start("--heartbeat", "0.5")
    opened = time.monotonic()
    stream = EventStream(nginx(server.port, "proxy_read_timeout 2s;").port, f"/stream?channel={channel}")

    stream.wait(lambda: len(stream.parser.comments) >= 9, "heartbeats come")
    server.publish("still here", channel)

    assert stream.next().data == "still here"
    assert time.monotonic() - opened > 4
    assert server.streams() == 1


def test_nginx_ends_a_stream_that_is_silent_for_longer_than_its_read_timeout(
    start: Start, nginx: Callable[..., Nginx], redis_process: RedisProcess, channel: str
) -> None:
    server = start("--heartbeat", "3600")
    stream = EventStream(nginx(server.port, "proxy_read_timeout 1s;").port, f"/stream?channel={channel}")

    assert stream.until_end() == []
    assert not stream.is_whole
    wait_for(lambda: server.closed("gone") == 1, "the server has noticed")


@pytest.fixture
def https(tmp_path: Path) -> Iterator[Callable[[int], Nginx]]:
    """Starts nginx with the deployed configuration: TLS and HTTP/2."""
    started: list[Nginx] = []

    def start_one(upstream: int) -> Nginx:
        pem, key = certificate(tmp_path)
        port = free_port()
        deployed = (DEPLOY / "nginx.conf").read_text()
        for name, ours in (
            ("127.0.0.1:5000", f"127.0.0.1:{upstream}"),
            ("listen 443", f"listen 127.0.0.1:{port}"),
            ("events.example.org;", "localhost;"),
            ("/etc/ssl/certs/events.example.org.pem", str(pem)),
            ("/etc/ssl/private/events.example.org.key", str(key)),
            ("/var/log/nginx/ssepush.log", f"{tmp_path}/access.log"),
        ):
            assert deployed.count(name) == 1, name
            deployed = deployed.replace(name, ours)
        started.append(Nginx(tmp_path, port, deployed))
        return started[-1]

    yield start_one
    for process in started:
        process.terminate()


OPEN_TEN = """
const [channel, done] = arguments;
window.got = Array(10).fill(null);
const sources = window.got.map(() => new EventSource("/stream?channel=" + channel));
sources.forEach((source, index) => { source.onmessage = event => { window.got[index] = event.data; }; });
let open = 0;
for (const source of sources) source.onopen = () => { if (++open === 10) done(open); };
"""


def test_ten_streams_of_one_browser_are_open_at_once_over_http_2(
    start: Start,
    https: Callable[[int], Nginx],
    trusting_chromium: WebDriver,
    redis_process: RedisProcess,
    channel: str,
) -> None:
    server = start()
    proxy = https(server.port)
    trusting_chromium.get(f"https://localhost:{proxy.port}/")
    protocol = trusting_chromium.execute_script("return performance.getEntriesByType('navigation')[0].nextHopProtocol")

    assert trusting_chromium.execute_async_script(OPEN_TEN, channel) == 10
    ours = redis_process.subscribers(channel)
    server.publish("to all", channel)
    wait_for(
        lambda: trusting_chromium.execute_script("return window.got.every(data => data === 'to all')"),
        "all ten have it",
    )

    assert protocol == "h2"
    assert ours == 10


def test_the_log_of_nginx_shows_no_tokens(
    start: Start, https: Callable[[int], Nginx], redis_process: RedisProcess, tmp_path: Path
) -> None:
    server = start(SSEPUSH_SECRET="a secret of the tests")
    token = ssepush.sign("private-log", ttl=60, secret="a secret of the tests")
    proxy = https(server.port)
    connection = http.client.HTTPSConnection(
        "localhost",
        proxy.port,
        timeout=DEADLINE_S,
        context=proxy.trusting(),
    )

    connection.request("HEAD", f"/stream?channel=private-log&token={token}")
    status = connection.getresponse().status
    connection.close()

    assert status == 200
    wait_for(lambda: "/stream" in (tmp_path / "access.log").read_text(), "the request is in the log")
    assert token not in (tmp_path / "access.log").read_text()
