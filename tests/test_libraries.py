"""Clients that others wrote: docs/clients.md is run as it is, and its table checked; and readers of every message."""

from __future__ import annotations

import contextlib
import http.server
import json
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

from tests import kit
from tests.browser import Browser, QuietHandler, firefox, webkit
from tests.messages import AS_PUBLISHED, as_read
from tests.proxies import proxies_before

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
    return kit.npm_install(tmp_path_factory.mktemp("npm"), *NPM_PACKAGES)


# ── What docs/clients.md says ────────────────────────────────────────────────────────────────────────────────────────

DOCUMENTED_URL = "http://127.0.0.1:5000/stream"


Verdict = tuple[str, ...]  # "yes" or "no": nothing was lost; not after a 502 either; data is exact


class Documented(NamedTuple):
    """A client as docs/clients.md has it."""

    name: str
    place: str  # where it is run
    verdict: Verdict
    suffix: str
    code: str


ROW = re.compile(r"^\| \[(.+)\]\(\.\./(\S+)\) \| (\S+) \| (yes|no) \| (yes|no) \| (yes|no) \|", re.MULTILINE)


def documented() -> list[Documented]:
    """The rows of the table, each with the program that it leads to, but for what that does with the data."""
    clients = []
    for name, path, place, *verdict in ROW.findall((kit.HERE / "docs" / "clients.md").read_text()):
        file = kit.HERE / path
        code = re.sub(r"^ *(?:const )?show = .*\n", "", file.read_text(), count=1, flags=re.MULTILINE)
        clients.append(Documented(name, place, tuple(verdict), file.suffix, code))
    return clients


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


EXACT = ["  two spaces,\n\n two lines \n", "x" * 1_000_000]  # about as large as a server passes by default
ALL = [*EXACT, *(as_read(value) for value in AS_PUBLISHED.values() if value != "")]  # which some do not show


def exact_for(row: Documented) -> list[str]:
    """What should arrive exactly as it is published: all kinds of data where no page, and no driver, stands between."""
    return ALL if row.place in ("Node.js", "Python") else EXACT


class Clients:
    """All clients of docs/clients.md, each with a channel of its own."""

    def __init__(self, server: kit.ServerProcess, folder: Path, site: str) -> None:
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
        is_python = row.suffix == ".py"
        path = self._folder / f"{self.channel_of[row]}{row.suffix}"
        path.write_text((PYTHON_SHOWS if is_python else NODE_SHOWS) + self._code(row))
        command = [sys.executable if is_python else kit.needs("node"), str(path)]
        log = self._stack.enter_context(path.with_suffix(".log").open("wb"))
        started = kit.running(*command, cwd=self._folder, env=kit.environment_with(), stderr=log)
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

    def publish(self, server: kit.ServerProcess, text: str, *to: Documented) -> None:
        """Publish it to these clients, or to all."""
        for row in to or self.rows:
            server.publish(channel=self.channel_of[row], **message_for(row.name, text))

    def who_lack(self, text: str) -> set[Documented]:
        """Those that have not heard it."""
        return {row for row, heard in self.heard.items() if text not in heard()}

    def who_are_away(self, redis: kit.RedisProcess) -> set[str]:
        """Those that have no stream open."""
        return {row.name for row, channel in self.channel_of.items() if redis.subscribers(channel) != 1}

    def end(self) -> None:
        self._stack.close()


# ── What stands around them ──────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def site_before(server_port: int, folder: Path) -> Iterator[str]:
    """The deployed nginx, but over HTTP, and with this folder as the rest of the site; its origin."""
    rest = f"types {{ text/html html; text/javascript js; }} root {folder}; try_files $uri $uri.js =404;"
    changes = [
        ("443 ssl http2;", "443;"),
        ("location / {\n        proxy_pass http://ssepush;", f"location / {{ {rest}"),
        ("retry: 2000", "retry: 300"),
    ]
    with proxies_before(server_port, "nginx", changes=changes) as proxies:
        yield f"http://{kit.LOOPBACK}:{proxies['nginx'].port}"


@contextlib.contextmanager
def answering_502(port: int) -> Iterator[set[str]]:
    """In place of the server: a proxy whose server is away; the channels of the streams that were asked for."""
    asked: set[str] = set()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            asked.update(parse_qs(urlsplit(self.path).query).get("channel", ()))
            self.answer(502)

        do_OPTIONS = do_GET

    with http.server.ThreadingHTTPServer((kit.LOOPBACK, port), Handler) as proxy:
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

AWAY_S = 1.5  # longer than the time after which most come back for the first time


def settled(condition: Callable[[], Any]) -> None:
    """Wait until the condition holds, or the time is over: the table says what has to be."""
    with contextlib.suppress(AssertionError):
        kit.wait_for(condition, "")


def verdict_on(row: Documented, heard: list[str]) -> Verdict:
    """What the table in the docs should say of a client that has been through all of it."""
    print(row.name, [text[:80] for text in heard])
    asked = [["first", "live", "second"], ["third"], exact_for(row)]
    got = [[text for text in heard if text in expected] for expected in asked]
    return tuple("yes" if texts == expected else "no" for texts, expected in zip(got, asked, strict=True))


@kit.needs_test_extra
def test_each_client_does_what_the_table_in_the_docs_says(
    browsers: dict[str, Browser], npm_folder: Path, own_redis: kit.RedisProcess, start: kit.Start
) -> None:
    port = kit.free_port()
    elsewhere = start(redis=own_redis)  # publishes while the other one is away

    def back(origin: str) -> kit.ServerProcess:
        options = ["--retry", "300", "--allow-origin", "*", "--allow-origin", origin]
        return kit.ServerProcess(own_redis, *options, port=port)

    with site_before(port, npm_folder) as site, contextlib.ExitStack() as stack:
        server = back(site)
        stack.callback(lambda: server.kill())
        clients = Clients(server, npm_folder, site)
        stack.callback(clients.end)
        clients.start(browsers)
        survivors = {row for row in clients.rows if row.verdict[1] == "yes"}

        settled(lambda: not clients.who_are_away(own_redis))
        assert clients.who_are_away(own_redis) == set()
        server.kill()
        clients.publish(elsewhere, "first")
        time.sleep(AWAY_S)
        server = back(site)
        settled(lambda: not clients.who_lack("first"))

        for row in clients.rows:
            for text in exact_for(row):
                clients.publish(server, text, row)
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

        found = {(row.name, row.place): verdict_on(row, heard()) for row, heard in clients.heard.items()}
    assert found == {(row.name, row.place): row.verdict for row in clients.rows}


@kit.needs_test_extra
def test_fetch_event_source_stops_when_it_is_refused(
    chromium: WebDriver, npm_folder: Path, own_redis: kit.RedisProcess, start: kit.Start
) -> None:
    """By the code of the docs; left to itself, it would try again."""
    server = start(redis=own_redis)
    note = 'addEventListener("unhandledrejection", ({ reason }) => { document.title = reason.message; });'
    with site_before(server.port, npm_folder) as site:
        clients = Clients(server, npm_folder, site)
        (row,) = [row for row in clients.rows if "fetch-event-source" in row.name]
        clients.channel_of[row] = "private-7"
        chromium.get(f"{site}/{clients.write_frame(row, note)}")
        kit.wait_for(lambda: chromium.title == "a token is missing", "it has stopped")

    assert server.refused("forbidden") == 1


# ── curl ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [100, 900_000])
def test_curl_publishes_small_and_large_bodies(
    size: int, server: kit.ServerProcess, channel: str, tmp_path: Path
) -> None:
    stream = server.stream(channel)
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"data": "x" * size, "channel": channel}))
    command = [kit.needs("curl"), "-s", f"{server.url}/publish", "-H", "Content-Type: application/json"]
    command += ["-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary", f"@{body}"]

    answer = json.loads(subprocess.check_output(command, timeout=kit.DEADLINE_S))

    assert (answer["state"], answer["receivers"]) == ("ok", 1)
    assert stream.next().data == "x" * size
