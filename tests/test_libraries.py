"""Other people's clients, as docs/clients.md says to use them: the code there is run, and its table is checked."""

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
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.engines import Browser, QuietHandler, firefox, webkit
from tests.kit import (
    DEADLINE_S,
    HAS_TEST_EXTRA,
    HERE,
    LOOPBACK,
    RedisProcess,
    ServerProcess,
    Start,
    environment_with,
    free_port,
    listens,
    npm_install,
    program,
    wait_for,
)

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

# ── What docs/clients.md says ────────────────────────────────────────────────────────────────────────────────────────

DOCS = HERE / "docs" / "clients.md"
DOCUMENTED_URL = "http://127.0.0.1:5000/stream"
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
    text = DOCS.read_text()
    code_of = {}
    for section in text.split("\n### ")[1:]:
        block = re.search(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        assert block, section
        code_of[section.partition("\n")[0]] = (block[1], block[2])
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    clients = []
    for name, place, *verdict in rows[2:]:
        language, code = code_of[name]
        clients.append(Documented(name, place, Verdict(*verdict), language, code))
    return clients


# ── Clients, running ─────────────────────────────────────────────────────────────────────────────────────────────────


class Running(Protocol):
    """A client that has been started."""

    def heard(self) -> list[str]:
        """The data of the events that it has shown."""


class Process:
    """A client in a process of its own, which prints what it hears."""

    def __init__(self, command: list[str], folder: Path, log: Path) -> None:
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment_with(),
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._heard: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._heard.append(json.loads(line))

    def heard(self) -> list[str]:
        return list(self._heard)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


class Frame:
    """A client in a page, which is one of the frames of a page that collects what they hear."""

    def __init__(self, browser: Browser, name: str) -> None:
        self._browser = browser
        self._name = name

    def heard(self) -> list[str]:
        return list(self._browser.execute_script("return window.heard[arguments[0]] ?? []", self._name))


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


# What is published for clients that take markup, or commands.
MARKUP = {"htmx-ext-sse", "htmx 4"}
COMMANDS = {"Datastar"}


def message_for(name: str, text: str) -> dict[str, str]:
    """The event by which a client shows this text."""
    if name in MARKUP:
        return {"data": f"<li>{text}</li>"}
    if name in COMMANDS:
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
        self.channel_of: dict[Documented, str] = {}
        for number, row in enumerate(self.rows):
            self.channel_of[row] = f"client-{number}"
        self.running: dict[Documented, Running] = {}

    def start(self, browsers: dict[str, Browser]) -> None:
        """Start them all."""
        for row in self.rows:
            if row.place not in browsers:
                self.running[row] = self._process(row)
        for place, browser in browsers.items():
            rows = [row for row in self.rows if row.place == place]
            self._open_page(browser, place, rows)

    def _open_page(self, browser: Browser, place: str, rows: list[Documented]) -> None:
        """One page, with a frame for each client that runs in this browser."""
        page = COLLECTS
        for row in rows:
            name = self.write_frame(row)
            page += f'<iframe src="/{name}"></iframe>\n'
            self.running[row] = Frame(browser, row.name)
        (self._folder / f"{place}.html").write_text(page)
        browser.get(f"{self._site}/{place}.html")

    def _code(self, row: Documented) -> str:
        """Its code, with this server and its channel instead of those in the docs."""
        code = row.code.replace(DOCUMENTED_URL, f"{self._server_url}/stream")
        assert "/stream?channel=sse" in code
        return code.replace("/stream?channel=sse", f"/stream?channel={self.channel_of[row]}")

    def _process(self, row: Documented) -> Process:
        if row.language == "python":
            interpreter, suffix, shows = sys.executable, ".py", PYTHON_SHOWS
        else:
            interpreter, suffix, shows = program("node"), ".mjs", NODE_SHOWS
        name = self.channel_of[row]
        path = self._folder / f"{name}{suffix}"
        path.write_text(shows + self._code(row))
        log = self._folder / f"{name}.log"
        process = Process([interpreter, str(path)], self._folder, log)
        self._stack.callback(process.end)
        return process

    def write_frame(self, row: Documented, script: str = "") -> str:
        """Its page, with one more script before its code; the name of the file."""
        name = f"{self.channel_of[row]}.html"
        shows = PAGE_SHOWS.replace("NAME", json.dumps(row.name))
        before = f"<script>{script}</script>\n"
        (self._folder / name).write_text(shows + before + self._code(row))
        return name

    def publish(self, server: ServerProcess, text: str) -> None:
        """Publish it to each client."""
        for row, channel in self.channel_of.items():
            server.publish(channel=channel, **message_for(row.name, text))

    def who_lack(self, text: str) -> set[Documented]:
        """Those that have not heard it."""
        lacking = set()
        for row, client in self.running.items():
            if text not in client.heard():
                lacking.add(row)
        return lacking

    def who_are_away(self, redis: RedisProcess) -> set[str]:
        """Those that have no stream open."""
        away = set()
        for row, channel in self.channel_of.items():
            if redis.subscribers(channel) != 1:
                away.add(row.name)
        return away

    def end(self) -> None:
        self._stack.close()


# ── What stands around them ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all the packages of the npm registry that are run here."""
    if not HAS_TEST_EXTRA:
        pytest.skip("needs the test extra: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("npm")
    command = [program("npm"), "install", "--no-audit", "--no-fund", "--prefix", str(folder), *NPM_PACKAGES]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert installed.returncode == 0, installed.stderr
    return folder


@contextlib.contextmanager
def site_before(server_port: int, folder: Path) -> Iterator[str]:
    """An nginx that serves this folder, and passes /stream on as deploy/nginx.conf does; its origin."""
    port = free_port()
    user = "user root;" if os.getuid() == 0 else ""
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "\n".join(f"{name}_temp_path {folder}/{name}_temp;" for name in names)
    (folder / "nginx.conf").write_text(f"""
        {user} daemon off; worker_processes 1; pid {folder}/nginx.pid;
        events {{ worker_connections 256; }}
        http {{
            types {{ text/html html; text/javascript js; }}
            access_log off;
            {paths}
            server {{
                listen {LOOPBACK}:{port};
                location / {{ root {folder}; try_files $uri $uri.js =404; }}
                location = /stream {{
                    proxy_pass http://{LOOPBACK}:{server_port};
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
        }}""")
    log = folder / "nginx.log"
    command = [program("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(log)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:

            def ready() -> bool:
                assert process.poll() is None, log.read_text()
                return listens(port)

            wait_for(ready, "nginx listens")
            yield f"http://{LOOPBACK}:{port}"
        finally:
            process.terminate()


@contextlib.contextmanager
def answering_502(port: int) -> Iterator[set[str]]:
    """In place of the server: a proxy whose server is away; the channels of the streams that were asked for."""
    asked: set[str] = set()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            asked.update(query.get("channel", ()))
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


# ── The tests ────────────────────────────────────────────────────────────────────────────────────────────────────────

EXACT = "  two spaces,\n\n two lines \n"
AWAY_S = 1.5  # longer than the time after which most come back for the first time


def settled(condition: Callable[[], Any], seconds: float = DEADLINE_S) -> None:
    """Wait until the condition holds, or the time is over: the table says what has to be."""
    with contextlib.suppress(AssertionError):
        wait_for(condition, "", seconds)


def verdict_on(client: Running) -> Verdict:
    """What the table in the docs should say of a client that has been through all of it."""
    heard = client.heard()
    print(heard)
    expected = ["first", "live", "second"]
    return Verdict(
        nothing_lost=yes_if([text for text in heard if text in expected] == expected),
        after_502=yes_if(heard.count("third") == 1),
        exact_data=yes_if(heard.count(EXACT) == 1),
    )


def yes_if(condition: bool) -> str:
    return "yes" if condition else "no"


def test_each_client_does_what_the_table_in_the_docs_says(
    browsers: dict[str, Browser],
    npm_folder: Path,
    own_redis: RedisProcess,
) -> None:
    port = free_port()

    def back(origin: str) -> ServerProcess:
        options = ["--retry", "300", "--allow-origin", "*", "--allow-origin", origin]
        return ServerProcess(own_redis, *options, port=port)

    with site_before(port, npm_folder) as site, contextlib.ExitStack() as stack:
        server = back(site)
        clients = Clients(server, npm_folder, site)
        stack.callback(clients.end)
        clients.start(browsers)
        survivors = {row for row in clients.rows if row.verdict.after_502 == "yes"}
        elsewhere = stack.enter_context(contextlib.closing(Elsewhere(own_redis)))

        settled(lambda: not clients.who_are_away(own_redis))
        assert clients.who_are_away(own_redis) == set()
        server.kill()
        elsewhere.publish(clients, "first")
        time.sleep(AWAY_S)
        server = back(site)
        settled(lambda: not clients.who_lack("first"))

        clients.publish(server, EXACT)
        clients.publish(server, "live")
        settled(lambda: not clients.who_lack("live"))

        server.end()
        elsewhere.publish(clients, "second")
        time.sleep(AWAY_S)
        server = back(site)
        settled(lambda: not clients.who_lack("second"))

        server.end()
        with answering_502(port) as asked:
            settled(lambda: asked >= set(clients.channel_of.values()))
            elsewhere.publish(clients, "third")
        server = back(site)
        settled(lambda: not clients.who_lack("third") & survivors)

        found = {(row.name, row.place): verdict_on(client) for row, client in clients.running.items()}
        server.kill()
    assert found == {(row.name, row.place): row.verdict for row in clients.rows}


STOPS = """
  addEventListener("unhandledrejection", ({ reason }) => { document.title = reason.message; });
"""


def test_fetch_event_source_stops_when_it_is_refused(
    chromium: WebDriver,
    tmp_path: Path,
    own_redis: RedisProcess,
    start: Start,
) -> None:
    """By the code of the docs; left to itself, it would try again."""
    server = start(redis=own_redis)
    [package] = [package for package in NPM_PACKAGES if "fetch-event-source" in package]
    folder = npm_install(tmp_path, package)
    with site_before(server.port, folder) as site:
        clients = Clients(server, folder, site)
        [row] = [row for row in clients.rows if row.name in package]
        clients.channel_of[row] = "private-7"
        name = clients.write_frame(row, STOPS)
        chromium.get(f"{site}/{name}")
        wait_for(lambda: chromium.title == "a token is missing", "it has stopped")

    assert server.refused("forbidden") == 1


class Elsewhere:
    """Another server on the same Redis, which publishes while the first one is away."""

    def __init__(self, redis: RedisProcess) -> None:
        self._server = ServerProcess(redis)

    def publish(self, clients: Clients, text: str) -> None:
        clients.publish(self._server, text)

    def close(self) -> None:
        self._server.end()
