"""Clients that others wrote: docs/clients.md is run as it is, and its table checked; and readers of every message."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.engines import Browser, QuietHandler, firefox, webkit
from tests.kit import (
    DEADLINE_S,
    HERE,
    LOOPBACK,
    Parser,
    RedisProcess,
    ServerProcess,
    Start,
    environment_with,
    free_port,
    listens,
    needs_test_extra,
    program,
    running,
    wait_for,
)
from tests.messages import AS_PUBLISHED, publish_all

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

NPM_PACKAGES = (
    "@microsoft/fetch-event-source@2.0.1",
    "@starfederation/datastar@0.21.4",
    "event-source-polyfill@1.0.31",
    "eventsource@4.1.1",
    "eventsource-client@1.2.0",
    "htmx-ext-sse@2.2.4",
    "htmx.org@2.0.11",
    "htmx4@npm:htmx.org@4.0.1",
    "launchdarkly-eventsource@2.2.0",
    "reconnecting-eventsource@1.6.5",
)


@pytest.fixture(scope="session")
def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all the packages of the npm registry that are run here."""
    folder = tmp_path_factory.mktemp("npm")
    command = [program("npm"), "install", "--no-audit", "--no-fund", "--prefix", str(folder), *NPM_PACKAGES]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert installed.returncode == 0, installed.stderr
    return folder


# ── What docs/clients.md says ────────────────────────────────────────────────────────────────────────────────────────

DOCUMENTED_URL = "http://127.0.0.1:5000/stream"


class Verdict(NamedTuple):
    """What became of the events of one client."""

    nothing_lost: str
    after_502: str
    exact_data: str


class Documented(NamedTuple):
    """A client as docs/clients.md has it."""

    name: str
    place: str  # where it is run
    verdict: Verdict
    language: str
    code: str


def documented() -> list[Documented]:
    """The rows of the table, each with the code below the heading of its name."""
    text = (HERE / "docs" / "clients.md").read_text()
    code_of = {}
    for section in re.split("^#+ ", text, flags=re.MULTILINE):
        block = re.search(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        if block:
            code_of[section.partition("\n")[0]] = (block[1], block[2])
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (yes|no) \| (yes|no) \| (yes|no) \|$", text, re.MULTILINE)
    return [Documented(name, place, Verdict(*verdict), *code_of[name]) for name, place, *verdict in rows]


# ── Clients, running ─────────────────────────────────────────────────────────────────────────────────────────────────

Heard = Callable[[], list[str]]  # the data of the events that a client has shown

PYTHON_SHOWS = "import json\n\n\ndef show(data):\n    print(json.dumps(data), flush=True)\n\n\n"
NODE_SHOWS = "const show = (data) => console.log(JSON.stringify(data));\n"
PAGE_SHOWS = """<!doctype html>
<meta charset="utf-8">
<script type="importmap">{"imports": {
  "@microsoft/fetch-event-source": "/node_modules/@microsoft/fetch-event-source/lib/esm/index.js",
  "~/engine": "/node_modules/@starfederation/datastar/dist/engine/index.js",
  "~/": "/node_modules/@starfederation/datastar/dist/",
  "reconnecting-eventsource": "/node_modules/reconnecting-eventsource/build/esm/reconnecting-eventsource.js"
}}</script>
<script>
  const tell = (message) => parent.postMessage({ name: NAME, ...message }, "*");
  const show = (data) => tell({ data });
  tell({}); // a page that is loaded again starts from nothing
  new MutationObserver((records) => {
    const added = records.flatMap((record) => Array.from(record.addedNodes));
    added.filter((node) => node.nodeName === "LI").forEach((item) => show(item.textContent));
  }).observe(document, { childList: true, subtree: true });
</script>
<body>
"""
COLLECTS = """<!doctype html>
<meta charset="utf-8">
<script>
  window.heard = {};
  addEventListener("message", ({ data: message }) => {
    if (message.data === undefined) heard[message.name] = [];
    else heard[message.name].push(message.data);
  });
</script>
"""


def message_for(name: str, text: str) -> dict[str, str]:
    """The event by which a client shows this text: some take markup, or commands."""
    if name in ("htmx-ext-sse", "htmx 4"):
        return {"data": f"<li>{text}</li>"}
    if name == "Datastar":
        lines = ["selector #list", "mergeMode append", f"fragments <li>{text}</li>"]
        return {"type": "datastar-merge-fragments", "data": "\n".join(lines)}
    return {"data": text}


class Clients:
    """All clients of docs/clients.md, each with a channel of its own."""

    def __init__(self, server: ServerProcess, folder: Path, site: str) -> None:
        """folder: with node_modules, and what of it is at the site."""
        self._server_url = server.url
        self._folder = folder
        self._site = site
        self._stack = contextlib.ExitStack()
        self.rows = documented()
        self.channel_of = {row: f"client-{number}" for number, row in enumerate(self.rows)}
        self.heard: dict[Documented, Heard] = {}

    def start(self, browsers: dict[str, Browser]) -> None:
        """Start them all."""
        for row in self.rows:
            if row.place not in browsers:
                self.heard[row] = self._started(row)
        for place, browser in browsers.items():
            self._open_page(browser, place, [row for row in self.rows if row.place == place])

    def _open_page(self, browser: Browser, place: str, rows: list[Documented]) -> None:
        """One page, with a frame for each client that runs in this browser."""

        def heard_by(name: str) -> Heard:
            return lambda: list(browser.execute_script("return window.heard[arguments[0]] ?? []", name))

        page = COLLECTS
        for row in rows:
            page += f'<iframe src="/{self.write_frame(row)}"></iframe>\n'
            self.heard[row] = heard_by(row.name)
        (self._folder / f"{place}.html").write_text(page)
        browser.get(f"{self._site}/{place}.html")

    def _code(self, row: Documented) -> str:
        """Its code, with this server and its channel instead of those in the docs."""
        code = row.code.replace(DOCUMENTED_URL, f"{self._server_url}/stream")
        assert "/stream?channel=sse" in code
        return code.replace("/stream?channel=sse", f"/stream?channel={self.channel_of[row]}")

    def _started(self, row: Documented) -> Heard:
        """A process of its own, which prints what it hears."""
        is_python = row.language == "python"
        path = self._folder / f"{self.channel_of[row]}{'.py' if is_python else '.mjs'}"
        path.write_text((PYTHON_SHOWS if is_python else NODE_SHOWS) + self._code(row))
        command = [sys.executable if is_python else program("node"), str(path)]
        log = self._stack.enter_context(path.with_suffix(".log").open("wb"))
        started = running(*command, cwd=self._folder, env=environment_with(), stderr=log)
        process = self._stack.enter_context(started)
        heard: list[str] = []

        def read() -> None:
            assert process.stdout
            for line in process.stdout:
                heard.append(json.loads(line))

        threading.Thread(target=read, daemon=True).start()
        return lambda: list(heard)

    def write_frame(self, row: Documented, script: str = "") -> str:
        """Its page, with one more script before its code; the name of the file."""
        name = f"{self.channel_of[row]}.html"
        shows = PAGE_SHOWS.replace("NAME", json.dumps(row.name))
        (self._folder / name).write_text(f"{shows}<script>{script}</script>\n{self._code(row)}")
        return name

    def publish(self, server: ServerProcess, text: str) -> None:
        """Publish it to each client."""
        for row, channel in self.channel_of.items():
            server.publish(channel=channel, **message_for(row.name, text))

    def who_lack(self, text: str) -> set[Documented]:
        """Those that have not heard it."""
        return {row for row, heard in self.heard.items() if text not in heard()}

    def who_are_away(self, redis: RedisProcess) -> set[str]:
        """Those that have no stream open."""
        return {row.name for row, channel in self.channel_of.items() if redis.subscribers(channel) != 1}

    def end(self) -> None:
        self._stack.close()


# ── What stands around them ──────────────────────────────────────────────────────────────────────────────────────────

SITE = """
{user} daemon off; worker_processes 1; pid {folder}/nginx.pid;
events {{ worker_connections 256; }}
http {{
    types {{ text/html html; text/javascript js; }}
    access_log off;
    {paths}
    server {{
        listen {listen};
        location / {{ root {folder}; try_files $uri $uri.js =404; }}
        location = /stream {{
            proxy_pass http://{upstream};
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            error_page 502 503 504 = @away;
        }}
        location @away {{
            default_type text/event-stream;
            return 200 "retry: 300\\n\\n";
        }}
    }}
}}
"""


@contextlib.contextmanager
def site_before(server_port: int, folder: Path) -> Iterator[str]:
    """An nginx that serves this folder, and passes /stream on as deploy/nginx.conf does; its origin."""
    port = free_port()
    user = "user root;" if os.getuid() == 0 else ""
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "\n".join(f"{name}_temp_path {folder}/{name}_temp;" for name in names)
    listen, upstream = f"{LOOPBACK}:{port}", f"{LOOPBACK}:{server_port}"
    configuration, log = folder / "nginx.conf", folder / "nginx.log"
    configuration.write_text(SITE.format(user=user, folder=folder, paths=paths, listen=listen, upstream=upstream))
    command = [program("nginx"), "-p", str(folder), "-c", str(configuration), "-e", str(log)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: process.poll() is not None or listens(port), "nginx listens")
            assert process.poll() is None, log.read_text()
            yield f"http://{listen}"
        finally:
            process.terminate()


@contextlib.contextmanager
def answering_502(port: int) -> Iterator[set[str]]:
    """In place of the server: a proxy whose server is away; the channels of the streams that were asked for."""
    asked: set[str] = set()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            asked.update(parse_qs(urlsplit(self.path).query).get("channel", ()))
            self.answer(502)

        do_OPTIONS = do_GET

    with http.server.ThreadingHTTPServer((LOOPBACK, port), Handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield asked
        proxy.shutdown()


@pytest.fixture(scope="module")
def browsers(tmp_path_factory: pytest.TempPathFactory, chromium: WebDriver) -> Iterator[dict[str, Browser]]:
    """All three, started at the same time."""
    folder = tmp_path_factory.mktemp("browsers")
    with firefox(folder) as second, webkit(folder) as third:
        yield {"Chromium": chromium, "Firefox": second, "WebKit": third}


# ── The table of docs/clients.md ─────────────────────────────────────────────────────────────────────────────────────

EXACT = "  two spaces,\n\n two lines \n"
AWAY_S = 1.5  # longer than the time after which most come back for the first time


def settled(condition: Callable[[], Any]) -> None:
    """Wait until the condition holds, or the time is over: the table says what has to be."""
    with contextlib.suppress(AssertionError):
        wait_for(condition, "")


def verdict_on(heard: list[str]) -> Verdict:
    """What the table in the docs should say of a client that has been through all of it."""
    print(heard)
    expected = ["first", "live", "second"]
    nothing_lost = [text for text in heard if text in expected] == expected
    once = [nothing_lost, heard.count("third") == 1, heard.count(EXACT) == 1]
    return Verdict(*("yes" if is_so else "no" for is_so in once))


@needs_test_extra
def test_each_client_does_what_the_table_in_the_docs_says(
    browsers: dict[str, Browser], npm_folder: Path, own_redis: RedisProcess, start: Start
) -> None:
    port = free_port()
    elsewhere = start(redis=own_redis)  # publishes while the other one is away

    def back(origin: str) -> ServerProcess:
        options = ["--retry", "300", "--allow-origin", "*", "--allow-origin", origin]
        return ServerProcess(own_redis, *options, port=port)

    with site_before(port, npm_folder) as site, contextlib.ExitStack() as stack:
        server = back(site)
        stack.callback(lambda: server.kill())
        clients = Clients(server, npm_folder, site)
        stack.callback(clients.end)
        clients.start(browsers)
        survivors = {row for row in clients.rows if row.verdict.after_502 == "yes"}

        settled(lambda: not clients.who_are_away(own_redis))
        assert clients.who_are_away(own_redis) == set()
        server.kill()
        clients.publish(elsewhere, "first")
        time.sleep(AWAY_S)
        server = back(site)
        settled(lambda: not clients.who_lack("first"))

        clients.publish(server, EXACT)
        clients.publish(server, "live")
        settled(lambda: not clients.who_lack("live"))

        server.end()
        clients.publish(elsewhere, "second")
        time.sleep(AWAY_S)
        server = back(site)
        settled(lambda: not clients.who_lack("second"))

        server.end()
        with answering_502(port) as asked:
            settled(lambda: asked >= set(clients.channel_of.values()))
            clients.publish(elsewhere, "third")
        server = back(site)
        settled(lambda: not clients.who_lack("third") & survivors)

        found = {(row.name, row.place): verdict_on(heard()) for row, heard in clients.heard.items()}
    assert found == {(row.name, row.place): row.verdict for row in clients.rows}


@needs_test_extra
def test_fetch_event_source_stops_when_it_is_refused(
    chromium: WebDriver, npm_folder: Path, own_redis: RedisProcess, start: Start
) -> None:
    """By the code of the docs; left to itself, it would try again."""
    server = start(redis=own_redis)
    note = 'addEventListener("unhandledrejection", ({ reason }) => { document.title = reason.message; });'
    with site_before(server.port, npm_folder) as site:
        clients = Clients(server, npm_folder, site)
        (row,) = [row for row in clients.rows if "fetch-event-source" in row.name]
        clients.channel_of[row] = "private-7"
        chromium.get(f"{site}/{clients.write_frame(row, note)}")
        wait_for(lambda: chromium.title == "a token is missing", "it has stopped")

    assert server.refused("forbidden") == 1


# ── Every message, in readers of events of all types; and curl ───────────────────────────────────────────────────────

READERS = {
    "httpx-sse": """
import httpx, httpx_sse, json, sys
events = []
with httpx.Client(timeout=20) as client, httpx_sse.connect_sse(client, "GET", sys.argv[1]) as source:
    for event in source.iter_sse():
        events.append([event.event, event.data])
        if event.event == "end":
            break
print(json.dumps(events))
""",
    "sseclient-py": """
import json, requests, sseclient, sys
events = []
response = requests.get(sys.argv[1], stream=True, timeout=20)
# requests' own iterators wait until a chunk of theirs is full
for event in sseclient.SSEClient(iter(lambda: response.raw.read1(65536), b"")).events():
    events.append([event.event, event.data])
    if event.event == "end":
        break
print(json.dumps(events))
""",
    "eventsource": """
import { EventSource } from "eventsource";
const [url, types] = process.argv.slice(-2), source = new EventSource(url), events = [];
for (const type of [...types.split(","), "end"]) {
  source.addEventListener(type, (event) => events.push([event.type, event.data]));
}
source.addEventListener("end", () => { source.close(); console.log(JSON.stringify(events)); });
""",
}


@needs_test_extra
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_gets_data_exactly_as_published(
    reader: str, server: ServerProcess, channel: str, request: pytest.FixtureRequest
) -> None:
    folder, interpreter = HERE, [sys.executable, "-c"]
    if "import {" in READERS[reader]:
        folder = request.getfixturevalue("npm_folder")
        interpreter = [program("node"), "--input-type=module", "-e"]
    types = ",".join(f"type-{number}" for number in range(len(AS_PUBLISHED)))
    arguments = [READERS[reader], f"{server.url}/stream?channel={channel}", types]
    with running(*interpreter, *arguments, cwd=folder) as process:
        server.redis.wait_for_subscribers(channel, 1)

        published = publish_all(server.redis, channel)

        received = json.loads(process.communicate(timeout=DEADLINE_S)[0])
    # httpx-sse makes events of type message of blocks without data, and the position is ssepush's own.
    assert [event for event in received if event[0] not in ("message", "stream-position")] == published


def test_curl_shows_each_event_as_it_comes(server: ServerProcess, channel: str) -> None:
    with running(program("curl"), "-sN", f"{server.url}/stream?channel={channel}") as curl:
        assert curl.stdout
        parser = Parser()
        while not parser.retry_ms:
            parser.feed(curl.stdout.readline())

        for number in range(3):
            server.redis.publish_event(channel, data=f"第 {number}", type="greet")
            while not parser.events or parser.events[-1].data != f"第 {number}":
                parser.feed(curl.stdout.readline())

    assert [event.data for event in parser.events if event.type == "greet"] == ["第 0", "第 1", "第 2"]


@pytest.mark.parametrize("size", [100, 900_000])
def test_curl_publishes_small_and_large_bodies(size: int, server: ServerProcess, channel: str, tmp_path: Path) -> None:
    stream = server.stream(channel)
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"data": "x" * size, "channel": channel}))
    command = [program("curl"), "-s", f"{server.url}/publish", "-H", "Content-Type: application/json"]
    command += ["-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary", f"@{body}"]

    answer = json.loads(subprocess.check_output(command, timeout=DEADLINE_S))

    assert (answer["state"], answer["receivers"]) == ("ok", 1)
    assert stream.next().data == "x" * size
