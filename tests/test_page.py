"""The page, as a person uses it."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tests.browser import state_of, text_of
from tests.engines import Firefox, QuietHandler
from tests.kit import (
    DEADLINE_S,
    HERE,
    LOOPBACK,
    EventStream,
    Received,
    RedisProcess,
    ServerProcess,
    Start,
    connect,
    free_port,
    npm_install,
    program,
    wait_for,
)

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

PAGE = HERE / "index.html"
ANSWER = {"question": "which programming is the best?", "value": "Absolutely, PHP", "who": "allen"}
MESSAGE = json.dumps({"data": ANSWER, "type": "new_answers"})
SHOWN_ANSWER = "which programming is the best? : Absolutely, PHP"
PLACEHOLDER = "received pushed data"
NO_SERVER = "?server= must be the origin of a server"
GAVE_UP = "the browser gave up, so this page opens a new stream"
COUNTS_TWICE = "This page counts twice: its wire is a second stream."
ADDED = "no listener for this type: added"


# ── What the tests of the page stand on ──────────────────────────────────────────────────────────────────────────────

SET = """
    const [id, value] = arguments, field = document.getElementById(id);
    field.value = value;
    for (const type of ["input", "change"]) field.dispatchEvent(new Event(type, {bubbles: true}));
"""
NAME = "(at) => at.id || at.getAttribute('aria-label') || at.textContent.trim()"
FOCUSED = f"return ({NAME})(document.activeElement)"
FOCUSABLE = f"""
    return [...document.querySelectorAll("a[href], input, textarea, select, button, summary, [tabindex='0']")]
      .filter((at) => at.checkVisibility() && at.tabIndex >= 0).map({NAME});
"""
ROWS = """
    return [...document.querySelectorAll("#log li")].filter((row) => row.checkVisibility())
      .map((row) => ["type", "data", "id", "taught"].map((name) => row.querySelector("." + name)?.textContent ?? ""));
"""
WIRE = "return [...document.querySelectorAll('#wire pre')].map((block) => block.textContent);"
OPEN_FOLDS = "for (const fold of document.querySelectorAll('.folds details')) fold.open = true;"
# How many elements came of what was shown as text.
STRANGE_ELEMENTS = "return [typeof window.__pwned, document.querySelectorAll('img:not(#logo), b, i').length];"


class OpenPage:
    """The page in a browser, with its server and a channel of its own."""

    def __init__(self, tab: Any, server: ServerProcess, channel: str) -> None:
        self.tab = tab
        self.server = server
        self.channel = channel

    def open(self, types: str = "", channel: str = "") -> None:
        """Have it listen to its channel, or another one; it publishes to the same."""
        self.tab.get(f"{self.server.url}/?channel={quote(channel or self.channel)}&types={quote(types)}")
        self.wait_for_state("open")

    def open_from_disk(self, server_parameter: str) -> None:
        """With `?server=` as given; it listens to its channel."""
        self.tab.get(f"{PAGE.as_uri()}?channel={self.channel}&server={quote(server_parameter, safe='')}")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.tab.execute_script(script, *arguments)

    def text(self, id_: str) -> str:
        return text_of(self.tab, id_)

    def state(self) -> str:
        return state_of(self.tab)

    def value(self, id_: str) -> str:
        """What stands in a field."""
        return str(self.run("return document.getElementById(arguments[0]).value", id_))

    def enter(self, id_: str, value: str) -> None:
        """Have this value in a field."""
        self.run(SET, id_, value)

    def click(self, selector: str) -> None:
        """Click as a person does: what is covered or invisible cannot be clicked."""
        self.tab.find_element("css selector", selector).click()

    def click_publish(self) -> None:
        self.click("#publish .main")

    def attribute(self, id_: str, name: str) -> str | None:
        value: str | None = self.tab.find_element("id", id_).get_attribute(name)
        return value

    def is_shown(self, id_: str) -> bool:
        return bool(self.run("return document.getElementById(arguments[0]).checkVisibility()", id_))

    def whole_rows(self) -> list[list[str]]:
        """The log's visible rows, the newest first: type, data, id, and what is said of a type that was added."""
        return [list(map(str, row)) for row in self.run(ROWS)]

    def rows(self) -> list[str]:
        """Their data."""
        return [data for _, data, *_ in self.whole_rows()]

    def wire(self) -> list[str]:
        """The blocks of the wire, the newest first, each up to its blank line."""
        return [str(block) for block in self.run(WIRE)]

    def line(self, how: str) -> str:
        """The line to copy for this way of publishing or listening."""
        self.enter("how", how)
        return self.text("line")

    def send(self, type_: str, data: Any, streams: int = 1) -> None:
        """A plain PUBLISH on its channel."""
        assert self.server.redis.publish_event(self.channel, data=data, type=type_) == streams

    def publish(self, data: Any, **members: Any) -> str:
        """Publish by the server on its channel; the event's id."""
        return str(self.server.publish(data, self.channel, **members)["id"])

    def listener(self) -> EventStream:
        """Another stream of its channel."""
        return self.server.opened(self.channel)

    def streams(self) -> int:
        """How many streams of its channel are open, its own included."""
        return self.server.redis.subscribers(self.channel)

    def wait_for_streams(self, number: int) -> None:
        wait_for(lambda: self.streams() == number, f"{number} streams")

    def show_wire(self) -> None:
        self.click("#show-wire")
        self.wait_for_streams(2)
        wait_for(self.wire, "the wire is read")

    def wait_for_rows(self, *data: str) -> None:
        """Until the log's visible rows are these."""
        wait_for(lambda: self.rows() == list(data), f"rows {data}")

    def wait_for_text(self, id_: str, text: str) -> None:
        """Until this is all that stands there."""
        wait_for(lambda: self.text(id_) == text, f"{text!r} in #{id_}")

    def wait_for_part(self, id_: str, text: str) -> None:
        """Until this stands there, maybe with more."""
        wait_for(lambda: text in self.text(id_), f"{text!r} in #{id_}, which holds {self.text(id_)[:500]!r}")

    def wait_for_wire(self, text: str) -> None:
        """Until these bytes have come over the wire."""
        wait_for(lambda: text in "".join(self.wire()), text)

    def wait_for_shown(self, id_: str) -> None:
        wait_for(lambda: self.is_shown(id_), f"#{id_} is shown")

    def wait_for_state(self, state: str) -> None:
        wait_for(lambda: self.state() == state, f"the page is {state}")

    def wait_for_published(self) -> None:
        self.wait_for_part("answer", "Published to ")


@pytest.fixture(scope="session")
def page_server(redis_process: RedisProcess) -> Iterator[ServerProcess]:
    """One server: the page does not depend on how it subscribes."""
    server = ServerProcess(redis_process)
    yield server
    server.end()


@pytest.fixture
def page(tab: WebDriver, page_server: ServerProcess, channel: str) -> OpenPage:
    """The page in Chromium, not yet open."""
    return OpenPage(tab, page_server, channel)


class Look:
    """How the page is shown: size of the window, color scheme, motion."""

    def __init__(self, tab: WebDriver) -> None:
        self.tab = tab

    def size(self, width: int, height: int = 800) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.tab.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, **features: str) -> None:
        """As a user's settings would: `prefer(color_scheme="dark")`."""
        wanted = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})

    def end(self) -> None:
        self.tab.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture
def look(chromium: WebDriver) -> Iterator[Look]:
    """Gives the page a look until the test is over."""
    look = Look(chromium)
    yield look
    look.end()


# ── The file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_is_one_script_and_one_style_of_at_most_1000_lines_and_loads_nothing() -> None:
    page = PAGE.read_text()

    assert re.findall("<(?:script|style)[^>]*>", page) == ["<style>", "<script>"]
    assert not re.findall(r" (?:src|style|on[a-z]+)=[\"']", page)
    assert not re.findall(r" href=[\"'](?!data:)", page)
    assert not re.findall("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval", page)
    lines = page.splitlines()
    assert len(lines) <= 1000
    assert max(map(len, lines)) <= 120


def test_the_script_begins_with_what_a_page_of_ones_own_needs() -> None:
    page = PAGE.read_text()
    beginning = page[page.index("<script>") :].splitlines()[:20]

    for wanted in ("new EventSource(", '"new_answers"', '"server_closed"', "source.close()", '"data"'):
        assert any(wanted in line for line in beginning), wanted


# ── Its stream ───────────────────────────────────────────────────────────────────────────────────────────────────────

RECORD_STATES = """
    const state = document.getElementById("state");
    window.states = [];
    new MutationObserver(() => states.push([state.dataset.state, state.textContent]))
      .observe(state, {childList: true, characterData: true, subtree: true});
"""


def test_the_page_says_in_words_that_it_connects_and_that_it_is_open(page: OpenPage) -> None:
    page.open()
    page.click("#close")
    page.run(RECORD_STATES)

    page.click("#close")

    wait_for(lambda: page.run("return states.length >= 2"), "two states")
    assert page.run("return states") == [["connecting", "Connecting"], ["open", "Open"]]
    assert page.text("detail") == f"Listening at {page.server.url}/stream?channel={page.channel}"
    assert page.attribute("state", "aria-live") == "polite"


def test_the_page_says_that_it_is_reconnecting_and_is_open_again_when_the_server_is_back(
    page: OpenPage, start: Start
) -> None:
    page.server = start("--retry", "200")
    page.open()

    page.server.kill()
    page.wait_for_state("waiting")

    assert "reconnecting" in page.text("state")
    assert re.match("Next try in about|Trying now", page.text("detail"))
    page.server = start("--retry", "200", port=page.server.port)
    page.wait_for_state("open")
    assert page.text("state") == "Open"
    page.publish("after")
    page.wait_for_rows("after")


def test_a_page_that_is_refused_says_why(page: OpenPage) -> None:
    page.tab.get(f"{page.server.url}/?channel=private-room")

    page.wait_for_part("state", "Refused: 403, ")
    assert "private-room" in page.text("state")
    assert page.state() == "closed"
    assert "then connect" in page.text("detail")


def test_a_page_that_may_not_see_the_answer_says_so(page: OpenPage, start: Start) -> None:
    server = start("--allow-origin", "https://other.example")

    page.open_from_disk(server.url)

    page.wait_for_text("state", "Refused: the server does not let a page from here see its answer")
    assert page.state() == "closed"


class BadGateway(QuietHandler):
    """A proxy that serves the page, and has nobody behind it to serve the stream."""

    def do_GET(self) -> None:
        if self.path.startswith("/stream"):
            self.answer(502)
        else:
            self.answer(200, PAGE.read_text())


def test_a_page_comes_back_by_itself_after_a_proxys_502(page: OpenPage, start: Start) -> None:
    with http.server.ThreadingHTTPServer((LOOPBACK, 0), BadGateway) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        port = proxy.server_port
        page.tab.get(f"http://{LOOPBACK}:{port}/?channel={page.channel}")
        page.wait_for_text("state", f"No connection yet: {GAVE_UP}")
        proxy.shutdown()

    page.server = start(port=port)

    page.wait_for_state("open")
    page.publish("after")
    page.wait_for_rows("after")


class DeafProxy:
    """Passes everything on, until its connections go dead: they stay open, and nothing comes any more."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._alive = threading.Event()
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://{LOOPBACK}:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def kill_connections(self) -> None:
        """Those that are open now; newer ones work."""
        self._alive.set()
        self._alive = threading.Event()

    def _accept(self) -> None:
        while True:
            near, far = self._listener.accept()[0], connect(self._behind)
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(*ends, self._alive), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, dead: threading.Event) -> None:
        source.settimeout(None)
        while received := source.recv(65536):
            if not dead.is_set():
                sink.sendall(received)
        if not dead.is_set():
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("wire", [False, True], ids=["EventSource alone", "with the wire"])
def test_a_page_notices_a_dead_stream_and_goes_on_where_it_stopped(wire: bool, page: OpenPage, start: Start) -> None:
    server = start("--heartbeat", "0.4")
    proxy = DeafProxy(server.port)
    page.tab.get(f"{proxy.url}/?channel={page.channel}")
    page.server = server
    page.wait_for_state("open")
    if wire:
        page.show_wire()
    page.publish("before")
    page.wait_for_rows("before")
    page.run(RECORD_STATES)

    proxy.kill_connections()
    page.publish("lost on the way")

    page.wait_for_rows("lost on the way", "before")
    why = "nothing came for 1 s, so this page opens a new stream"
    assert ["waiting", f"Connection lost: {why}"] in page.run("return states")
    page.wait_for_state("open")
    page.publish("after")
    page.wait_for_rows("after", "lost on the way", "before")


def test_heartbeats_keep_a_silent_page_open(page: OpenPage, start: Start) -> None:
    page.server = start("--heartbeat", "0.4")
    page.open()
    page.show_wire()
    page.run(RECORD_STATES)

    wait_for(lambda: len(page.wire()) >= 8, "heartbeats")

    assert page.run("return states") == []
    assert page.server.metric("streams_opened_total") == 2


def test_one_button_closes_the_stream_and_opens_it_again(page: OpenPage) -> None:
    page.open()
    assert page.text("close") == "Close"

    page.click("#close")

    page.wait_for_streams(0)
    assert page.text("state") == "Closed"
    assert page.text("close") == "Connect"
    page.click("#close")
    page.wait_for_state("open")
    assert page.text("close") == "Close"


def test_a_stream_reset_is_announced_with_its_reason(page: OpenPage, own_redis: RedisProcess, start: Start) -> None:
    page.server = start("--retry", "200", redis=own_redis)
    page.open()
    page.publish("seen")
    page.wait_for_rows("seen")
    assert not page.is_shown("reset")

    page.server.kill()
    own_redis.client.flushall()
    start("--retry", "200", port=page.server.port, redis=own_redis)

    page.wait_for_shown("reset")
    wait_for(lambda: len(page.rows()) == 2, "the reset is a row, too")
    reason = json.loads(page.rows()[0])["reason"]
    assert f": {reason}. " in page.text("reset")
    assert "may be missing" in page.text("reset")
    assert page.attribute("reset", "role") == "status"


def test_an_expired_token_closes_the_page_which_goes_on_where_it_stopped_once_connected_again(page: OpenPage) -> None:
    page.open()
    page.publish("", type="token-expired")
    page.wait_for_state("closed")
    assert page.text("state") == "Token expired"
    assert page.is_shown("token")
    assert "new token" in page.text("detail")

    page.wait_for_streams(0)
    page.publish("while away")
    page.click("#close")

    wait_for(lambda: page.rows()[:1] == ["while away"], "what was missed")
    page.wait_for_state("open")
    assert page.run("return streamUrl(true)") == f"{page.server.url}/stream?channel={page.channel}"


HIDE = """
    Object.defineProperty(document, "hidden", {value: arguments[0], configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
"""


def test_the_title_of_a_hidden_tab_counts_what_came(page: OpenPage) -> None:
    page.open()

    page.run(HIDE, True)
    page.publish("one")
    page.publish("two")
    wait_for(lambda: page.tab.title == "(2) ssepush", "the title counts two")

    page.run(HIDE, False)
    assert page.tab.title == "ssepush"


def test_a_streams_position_is_shown_and_is_no_event_even_without_data(page: OpenPage) -> None:
    page.open()
    id_ = page.publish("", type="stream-position")
    page.wait_for_text("last-id", id_)

    page.send("message", "an event")

    page.wait_for_rows("an event")
    assert page.text("count") == "1"
    assert "no ID of its own" in page.text("log")


def test_a_page_may_begin_with_what_is_kept(page: OpenPage) -> None:
    page.open()
    urls = []

    for option in ("last=10", "lastEventId=earliest", ""):
        page.enter("begin", option)
        urls.append(page.run("return streamUrl(true)").removeprefix(f"{page.server.url}/stream?"))

    channel = f"channel={page.channel}"
    assert urls == [f"last=10&{channel}", f"lastEventId=earliest&{channel}", channel]
    page.wait_for_state("open")


def test_an_icon_and_the_logo_show_the_state(page: OpenPage) -> None:
    page.open()
    looks = []
    for _ in ("open", "closed"):
        looks.append([page.attribute("icon", "href"), page.attribute("logo", "src")])
        page.click("#close")

    (open_icon, open_logo), (closed_icon, closed_logo) = looks
    assert open_icon == open_logo != closed_icon == closed_logo
    assert str(open_icon).startswith("data:image/svg+xml,")
    assert page.run("return document.getElementById('logo').naturalWidth") > 0


def test_a_second_window_opens_beside_the_page_and_listens_to_the_same(page: OpenPage) -> None:
    page.open()
    first = page.tab.current_window_handle

    page.click("#second")

    page.wait_for_streams(2)
    second = next(handle for handle in page.tab.window_handles if handle != first)
    page.tab.switch_to.window(second)
    page.send("message", "for both", streams=2)
    page.wait_for_rows("for both")
    page.tab.close()
    page.tab.switch_to.window(first)
    page.wait_for_rows("for both")


def test_a_phone_is_told_an_address_that_it_can_reach_or_how_to_make_one(
    page: OpenPage, look: Look, start: Start
) -> None:
    look.size(1280)
    page.open()
    page.click("#show-phone")
    assert page.text("address") == "python ssepush.py --host 0.0.0.0"
    assert f"A phone cannot reach {LOOPBACK}:{page.server.port}." in page.text("phone-note")

    page.server = start("--host", "0.0.0.0")
    own_address = socket.gethostname()
    page.tab.get(f"http://{own_address}:{page.server.port}/?channel={page.channel}")
    page.wait_for_state("open")
    page.click("#show-phone")
    assert page.text("address") == f"http://{own_address}:{page.server.port}/?channel={page.channel}"
    assert page.run("return getComputedStyle(document.getElementById('address')).fontSize") == "22px"


# ── From disk ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_page_from_disk_listens_to_the_server_that_it_is_told(page: OpenPage) -> None:
    page.open_from_disk(f"http://localhost:{page.server.port}")
    page.wait_for_state("open")
    assert not page.is_shown("start")

    page.server.redis.publish(page.channel, MESSAGE)

    page.wait_for_text("data", SHOWN_ANSWER)
    assert f"http://localhost:{page.server.port}/publish" in page.line("curl")


def test_a_page_from_disk_without_a_server_says_what_it_tries_and_how_to_start_one(
    page: OpenPage, start: Start
) -> None:
    port = free_port()
    page.open_from_disk(f"http://localhost:{port}")

    page.wait_for_shown("start")
    assert page.text("tried") == f"http://localhost:{port}/"
    command = page.text("start-line")
    assert command == f"python ssepush.py --port {port}"
    page.click("#start button")
    wait_for(lambda: re.search("Copied|Selected", page.text("start")), "the page says that it copied")

    page.server = start(port=port)
    page.wait_for_state("open")
    assert not page.is_shown("start")
    page.tab.get(PAGE.as_uri())
    assert page.text("start-line") == "python ssepush.py"
    assert page.text("tried") == "http://localhost:5000/"


NO_SERVERS = {
    "a command": "http://x;id;/",
    "another command": "http://x/$(id)",
    "a script": "javascript:alert(1)",
    "a file": "file:///etc/passwd",
    "a name": "localhost",
    "a path": "http://localhost:5000/else",
    "a password": "http://user:password@localhost",
    "a port beyond all": "http://localhost:99999",
    "nothing": "",
}


@pytest.mark.parametrize("server_parameter", NO_SERVERS.values(), ids=list(NO_SERVERS))
def test_a_page_from_disk_refuses_a_server_that_is_no_origin(server_parameter: str, page: OpenPage) -> None:
    page.open_from_disk(server_parameter)

    assert page.state() == "closed"
    assert NO_SERVER in page.text("state")
    for how in WAYS_TO_COPY:
        assert page.line(how).startswith(f"{'//' if how == 'js' else '#'} {NO_SERVER}")
    page.click_publish()
    assert NO_SERVER in page.text("answer")


# ── Its answer ───────────────────────────────────────────────────────────────────────────────────────────────────────

BORDER = "return getComputedStyle(document.getElementById('data')).borderStyle"


def test_what_stands_in_the_place_of_the_answer_is_visibly_no_answer(page: OpenPage) -> None:
    page.open()
    assert page.text("data") == PLACEHOLDER
    assert page.is_shown("data-note")
    assert page.text("data-note") == "That only holds the place: no new_answers event has come yet."
    assert page.run(BORDER) == "dashed"

    page.publish(ANSWER, type="new_answers")

    page.wait_for_text("data", SHOWN_ANSWER)
    assert not page.is_shown("data-note")
    assert page.run(BORDER) == "none"


def test_question_and_answer_appear_once_they_have_come(page: OpenPage) -> None:
    page.open()
    assert not page.is_shown("named-question")
    assert not page.is_shown("named-answer")

    page.send("new_question", "which one?")
    page.send("new_answer", "<i>this</i>")

    page.wait_for_shown("named-answer")
    assert page.text("last-question") == "which one?"
    assert page.text("last-answer") == "<i>this</i>"
    assert page.run(STRANGE_ELEMENTS) == ["undefined", 0]


def test_new_answers_without_a_question_are_said_to_be_in_the_log(page: OpenPage) -> None:
    page.open()
    page.send("new_answers", "no JSON")
    page.wait_for_part("data-note", "only in the list")
    assert page.is_shown("data-note")
    assert page.text("data") == PLACEHOLDER

    page.publish(ANSWER, type="new_answers")

    page.wait_for_text("data", SHOWN_ANSWER)
    assert not page.is_shown("data-note")


def test_a_right_to_left_question_stands_right_of_its_value(page: OpenPage) -> None:
    page.open()
    answer = {"question": "ما هي أفضل لغة؟", "value": "PHP"}
    page.publish(answer, type="new_answers")
    page.wait_for_part("data", answer["value"])

    question, value = page.run(
        "return ['question', 'value'].map((name) => document.querySelector('#data .' + name).getBoundingClientRect().x)"
    )

    assert question > value


# ── Its list ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_with_the_wire_open_the_page_lists_every_event_and_learns_its_type(page: OpenPage) -> None:
    page.open()
    page.show_wire()
    assert "Every event" in page.text("heard")

    first = page.publish({"n": 1}, type="order_changed")
    page.wait_for_rows('{"n": 1}')
    page.wait_for_text("last-id", first)
    second = page.publish({"n": 2}, type="order_changed")
    page.send("error", "a type that EventSource has, too", streams=2)

    page.wait_for_rows("a type that EventSource has, too", '{"n": 2}', '{"n": 1}')
    assert page.whole_rows() == [
        ["error", "a type that EventSource has, too", "no ID of its own", ADDED],
        ["order_changed", '{"n": 2}', second, ""],
        ["order_changed", '{"n": 1}', first, ADDED],
    ]
    assert page.state() == "open"
    page.click("#show-wire")
    page.wait_for_streams(1)
    page.send("order_changed", "EventSource hears it")
    wait_for(lambda: page.rows()[:1] == ["EventSource hears it"], "it is heard without the wire")


def test_with_the_wire_open_a_burst_of_known_and_unknown_types_is_listed_once_and_in_order(page: OpenPage) -> None:
    page.open("known")
    page.show_wire()

    types = ["known", "unknown", "message", "other", "unknown", "new_question"]
    published = [[types[n % 6], "the same" if n % 5 == 0 else f"number {n}"] for n in range(300)]
    messages = [json.dumps({"data": data, "type": type_}) for type_, data in published]
    page.server.redis.publish_all(page.channel, messages)
    page.publish("last")

    page.wait_for_text("count", "301")
    wait_for(lambda: page.rows()[:1] == ["last"], "the last one")
    assert [row[:2] for row in page.whole_rows()[:0:-1]] == published
    taught = [(type_, said) for type_, _, _, said in page.whole_rows()[::-1] if said]
    assert taught == [("unknown", ADDED), ("other", ADDED)]


def test_more_types_than_a_page_listens_for_are_listed_all_the_same(page: OpenPage) -> None:
    page.open()
    page.show_wire()

    messages = [json.dumps({"data": n, "type": f"type {n}"}) for n in range(150)]
    page.server.redis.publish_all(page.channel, messages)

    page.wait_for_text("count", "150")
    wait_for(lambda: page.rows()[:1] == ["149"], "all are listed")
    assert page.run("return listened.length") == 107  # seven of its own, and a hundred


def test_with_the_wire_closed_the_page_says_that_it_lists_not_all_and_hears_what_it_publishes_itself(
    page: OpenPage,
) -> None:
    page.open()
    assert page.text("heard") == "Only types that this page listens for. Open the wire to see all."
    page.send("passes_unseen", 1)

    page.enter("publish-type", "report_done")
    page.click_publish()

    page.wait_for_rows(json.dumps(ANSWER))
    assert page.whole_rows()[0][0] == "report_done"


def test_a_paused_page_counts_on_and_shows_what_came_meanwhile_when_resumed(page: OpenPage) -> None:
    page.open()
    page.send("message", "before")
    page.wait_for_rows("before")

    page.click("#pause")
    page.send("message", "during 1")
    page.send("message", "during 2")
    page.wait_for_text("count", "3")
    assert page.rows() == ["before"]
    assert page.text("meanwhile") == ", 2 since you paused"
    assert page.text("pause") == "Resume"

    page.click("#pause")
    page.wait_for_rows("during 2", "during 1", "before")
    assert page.text("meanwhile") == ""
    assert page.text("pause") == "Pause"
    assert page.text("count") == "3"


def test_clear_empties_the_log_and_starts_the_count_anew(page: OpenPage) -> None:
    page.open()
    page.send("message", "a")
    page.send("stream-reset", '{"reason": "told"}')
    page.wait_for_text("count", "2")

    page.click("#clear")
    page.wait_for_text("count", "0")
    assert page.rows() == []
    assert page.is_shown("nothing")
    assert not page.is_shown("reset")

    page.send("message", "b")
    page.wait_for_rows("b")
    assert page.text("count") == "1"
    assert not page.is_shown("nothing")


def test_an_empty_log_says_what_to_try_from_a_terminal(page: OpenPage) -> None:
    page.open()
    page.enter("publish-channel", "elsewhere")

    assert page.text("try") == f"redis-cli publish {page.channel} '{MESSAGE}'"


def test_the_log_shows_events_of_the_chosen_type_only(page: OpenPage) -> None:
    page.open("greeting")
    page.send("greeting", "hello 1")
    page.send("message", "plain 1")
    page.wait_for_rows("plain 1", "hello 1")

    page.click("#filter option[value=greeting]")
    assert page.rows() == ["hello 1"]
    page.send("message", "plain 2")
    page.send("greeting", "hello 2")
    page.wait_for_rows("hello 2", "hello 1")
    assert page.text("count") == "4"

    page.click("#filter option[value='']")
    assert page.rows() == ["hello 2", "plain 2", "plain 1", "hello 1"]


def test_a_burst_of_1200_events_is_counted_whole_logged_up_to_the_cap_and_can_be_paused_meanwhile(
    page: OpenPage,
) -> None:
    page.open()

    page.server.redis.publish_all(page.channel, [f'{{"data": "number {n}"}}' for n in range(1200)])
    page.click("#pause")
    assert page.text("pause") == "Resume"
    page.click("#pause")

    page.wait_for_text("count", "1200")
    wait_for(lambda: page.rows()[:1] == ["number 1199"], "the last one")
    assert page.rows() == [f"number {number}" for number in range(1199, 699, -1)]


def test_the_page_shows_the_id_of_the_last_event(page: OpenPage) -> None:
    page.open()

    for data in ("first", "second"):
        id_ = page.publish(data)
        page.wait_for_text("last-id", id_)
        page.wait_for_part("log", id_)


# ── The wire ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_wire_shows_the_bytes_as_they_came(page: OpenPage, start: Start) -> None:
    page.server = start("--heartbeat", "0.3")
    page.open("greeting")
    page.show_wire()

    id_ = page.publish("two\nlines <b>", type="greeting")

    page.wait_for_wire("data: two\ndata: lines <b>\n")
    wait_for(lambda: "event: stream-position\n" in page.wire()[0], "a heartbeat")
    event = next(block for block in page.wire() if "data: two" in block)
    fields = ["event: greeting", f"id: {id_}", "data: two", "data: lines <b>", "", ""]
    assert sorted(event.split("\n")) == sorted(fields)
    page.wait_for_wire("retry: ")
    assert page.rows() == ["two\nlines <b>"]
    assert page.run(STRANGE_ELEMENTS) == ["undefined", 0]


def test_the_wire_is_read_only_while_it_is_shown_and_says_so(page: OpenPage) -> None:
    page.open()
    assert page.streams() == 1
    assert not page.is_shown("wire-side")
    assert page.text("counted") == ""

    page.show_wire()
    assert "second stream (fetch) while shown" in page.text("wire-side")
    assert page.attribute("show-wire", "aria-pressed") == "true"
    assert page.text("counted") == COUNTS_TWICE
    page.click_publish()
    page.wait_for_part("answer", "Published to 2 receivers, ID ")
    assert page.text("answer").endswith(f". {COUNTS_TWICE}")

    page.click("#show-wire")
    page.wait_for_streams(1)
    assert not page.is_shown("wire-side")
    assert page.state() == "open"
    assert page.text("counted") == ""


@pytest.mark.parametrize("width", [1280, 390])
def test_the_wire_is_open_at_first_on_wide_screens(width: int, page: OpenPage, look: Look) -> None:
    look.size(width)
    page.open()

    is_wide = width == 1280
    page.wait_for_streams(2 if is_wide else 1)
    assert page.is_shown("wire-side") == is_wide


def test_the_wire_goes_on_with_the_stream_after_a_restart(page: OpenPage, start: Start) -> None:
    page.server = start("--retry", "200")
    page.open()
    page.show_wire()
    page.publish("before", type="unknown")
    page.wait_for_wire("data: before\n")

    page.server.kill()
    page.wait_for_state("waiting")
    page.wait_for_part("wire", "The stream ")
    page.server = start("--retry", "200", port=page.server.port)
    page.publish("after", type="unknown")

    page.wait_for_wire("data: after\n")
    assert "".join(page.wire()).count("data: before\n") == 1
    page.wait_for_rows("after", "before")


def test_closing_the_stream_closes_the_wire(page: OpenPage) -> None:
    page.open()
    page.show_wire()

    page.click("#close")

    page.wait_for_streams(0)
    page.click("#close")
    page.wait_for_streams(2)


# ── Publishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_form_holds_the_articles_event(page: OpenPage) -> None:
    stream = page.listener()
    page.open()

    page.click_publish()

    event = stream.next()
    assert event.type == "new_answers"
    assert event.json == ANSWER
    page.wait_for_text("data", SHOWN_ANSWER)
    page.wait_for_published()
    assert page.text("answer") == f"Published to 2 receivers, ID {event.id}"


def test_what_is_published_goes_to_the_channel_that_one_listens_to_until_told_otherwise(page: OpenPage) -> None:
    page.open()
    assert page.value("publish-channel") == page.channel

    page.enter("channel", f"{page.channel}-2, {page.channel}-3")
    assert page.value("publish-channel") == f"{page.channel}-2"

    page.enter("publish-channel", "elsewhere")
    assert page.text("elsewhere") == "This page is not listening to elsewhere."
    page.enter("channel", page.channel)
    assert page.value("publish-channel") == "elsewhere"

    page.enter("publish-channel", "")
    assert page.value("publish-channel") == page.channel
    assert page.text("elsewhere") == ""


def test_the_page_says_when_nobody_listens(page: OpenPage) -> None:
    page.open()
    page.enter("publish-channel", f"{page.channel}-empty")

    page.click_publish()

    page.wait_for_part("answer", f"Published, but nobody is listening to {page.channel}-empty, ID ")


def test_enter_publishes_and_shift_enter_starts_a_new_line(page: OpenPage) -> None:
    from selenium.webdriver.common.keys import Keys

    stream = page.listener()
    page.open()
    page.enter("publish-data", "")
    data = page.tab.find_element("id", "publish-data")
    height = data.size["height"]

    data.send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    assert data.size["height"] > height
    data.send_keys(Keys.ENTER)

    assert stream.next().data == "one\ntwo"


WRONG = {
    "retry": ("publish-retry", "x", "milliseconds"),
    "token": ("publish-token", "two words", "without spaces"),
    "channel": ("publish-channel", "", "Name a channel"),
}


@pytest.mark.parametrize(("id_", "value", "words"), WRONG.values(), ids=list(WRONG))
def test_publishing_with_a_wrong_field_says_what_is_wrong_and_sends_nothing(
    id_: str, value: str, words: str, page: OpenPage
) -> None:
    stream = page.listener()
    page.open()
    page.enter("publish-data", "wrong")
    page.run("document.getElementById(arguments[0]).value = arguments[1]", id_, value)

    page.click_publish()

    assert re.match(f"Not sent. .*{words}", page.text("answer"))
    assert page.run(f"return document.getElementById('{id_}').matches(':invalid')")
    assert page.run(FOCUSED) == id_
    assert page.is_shown(id_)
    assert page.line("redis") == page.text("answer").replace("Not sent. ", "# ")
    page.run("document.getElementById(arguments[0]).value = ''", "publish-retry")
    page.run("document.getElementById(arguments[0]).value = ''", "publish-token")
    page.enter("publish-channel", page.channel)
    page.enter("publish-data", "right")
    page.click_publish()
    assert stream.next().data == "right"


def test_the_page_says_how_data_is_sent(page: OpenPage) -> None:
    page.open()
    assert page.text("kind") == "sent as JSON"

    page.enter("publish-data", "{no JSON}")

    assert page.text("kind") == "sent as text: it is not JSON"


# ── Lines to copy ────────────────────────────────────────────────────────────────────────────────────────────────────

WAYS_TO_COPY = ["redis", "curl", "python", "js"]
FORMS: dict[str, tuple[str, str]] = {
    "an object": ("new_answers", '{"it\'s": "$HOME `id` \\"quoted\\" \\\\", "n": 12345678901234567890}'),
    "an object of lines": ("lines", '{\n  "a": [1,\n  null]\n}'),
    "text of lines": ("", 'it\'s a line\n\n$(id) \\n and "another" 一'),
    "a hyphen": ("-t", "-"),
    "what looks like an option": ("--type", "--help"),
    "nothing": ("", ""),
    "spaces": ("a b", "  "),
    "a string of JSON": ("", '"quoted"'),
    "text that is JSON for Python only": ("", "NaN"),
}


def meaning(event: Received) -> tuple[str, Any]:
    """Type and data; JSON objects and arrays mean the same however they are spaced."""
    return event.type, event.json if event.data.startswith(("{", "[")) else event.data


def run_line(line: str, redis_process: RedisProcess) -> subprocess.CompletedProcess[str]:
    """Run a line to copy as somebody would who has this Redis."""
    command = line.replace("redis-cli ", f"redis-cli -p {redis_process.port} ", 1)
    command = command.replace("python ssepush.py", f"{sys.executable} ssepush.py", 1)
    environment = {**os.environ, "REDIS_URL": redis_process.url}
    arguments = [program("bash"), "-c", command]
    return subprocess.run(arguments, cwd=HERE, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)


@pytest.mark.parametrize("how", ["redis", "curl", "python"])
def test_the_lines_to_copy_publish_what_the_form_publishes(how: str, page: OpenPage) -> None:
    stream = page.listener()
    page.open(channel=f"{page.channel}-quiet")
    page.enter("publish-channel", page.channel)
    page.enter("publish-retry", "4321")
    wrong = {}
    for name, (type_, data) in FORMS.items():
        page.enter("publish-type", type_)
        page.enter("publish-data", data)
        page.run("document.getElementById('answer').textContent = ''")
        page.click_publish()
        page.wait_for_published()
        by_form = stream.next()

        command = page.line(how)
        ran = run_line(command, page.server.redis)

        if ran.returncode:
            wrong[name] = f"{command}: {ran.stderr}"
            continue
        by_line = stream.next()
        if meaning(by_line) != meaning(by_form):
            wrong[name] = f"{command}: {by_line} instead of {by_form}"
    assert not wrong
    assert stream.parser.retry_ms == 4321


def test_the_javascript_to_copy_hears_what_the_form_publishes(page: OpenPage) -> None:
    page.open()
    page.enter("publish-type", "it's </script>")
    page.enter("publish-data", '{"a": "b"}')
    page.run("window.heard = []; console.log = (value) => heard.push(value);")
    page.run(page.line("js").replace("const source", "window.copied"))
    wait_for(lambda: page.run("return copied.readyState === EventSource.OPEN"), "the copied code is open")

    page.click_publish()

    wait_for(lambda: page.run("return heard.length > 0"), "the copied code heard it")
    assert page.run("return heard") == [{"a": "b"}]
    page.run("copied.close()")


def test_one_of_the_lines_to_copy_is_shown_and_copied(page: OpenPage) -> None:
    page.open()
    assert not page.is_shown("line")
    page.click("#lines summary")
    assert page.is_shown("line")
    beginnings = [page.line(how).split()[0] for how in WAYS_TO_COPY]
    assert beginnings == ["redis-cli", "curl", "python", "const"]

    page.click("#lines button")

    wait_for(lambda: re.search("Copied|Selected", page.text("lines")), "the page says that it copied")


# ── For everybody ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_works_by_keyboard_alone(page: OpenPage) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key: str) -> None:
        ActionChains(page.tab, duration=0).send_keys(key).perform()

    stream = page.listener()
    page.open()
    page.run(OPEN_FOLDS)
    page.publish("a long one " * 100)
    assert stream.next()
    wait_for(page.rows, "a row that can be opened")
    reachable: list[str] = page.run(FOCUSABLE)

    reached: list[str] = []
    for _ in reachable:
        press(Keys.TAB)
        reached.append(page.run(FOCUSED))
        if reached[-1] == "Publish":
            press(Keys.ENTER)
            assert stream.next().json == ANSWER
            page.wait_for_published()
            assert page.run(FOCUSED) == "Publish"

    assert "Publish" in reached
    assert reached == reachable


# Of each element: where it begins and ends, from the top of the window.
PLACES = """
    return [...arguments].map((selector) => {
      const {top, bottom} = document.querySelector(selector).getBoundingClientRect();
      return [Math.round(top), Math.round(bottom)];
    });
"""


def test_all_that_matters_is_on_a_desktops_first_screen(page: OpenPage, look: Look) -> None:
    look.size(1280, 900)
    page.open()
    page.server.redis.publish_all(page.channel, [f'{{"data": "number {n}"}}' for n in range(600)])
    page.wait_for_text("count", "600")

    for _ in ("the wire beside the log", "the log alone"):
        state, answer, log, line = page.run(PLACES, "#state", "#data", ".scroll", "#publish .line")
        edges = [*state, *answer, *log, *line]
        assert edges == sorted(edges)
        assert edges[0] >= 0
        assert edges[-1] <= 900
        assert log[1] - log[0] > 300
        assert page.run("return document.documentElement.scrollHeight") == 900
        page.click("#show-wire")


def test_on_a_phone_state_answer_and_log_come_first(page: OpenPage, look: Look) -> None:
    look.size(390, 844)
    page.open()
    page.publish(ANSWER, type="new_answers")
    page.wait_for_text("data", SHOWN_ANSWER)
    wait_for(page.rows, "the row")

    places = page.run(PLACES, "#state", "#data", "#log li", "#publish", "#settings")
    tops = [top for top, _ in places]

    assert tops == sorted(tops)
    assert tops[2] < 500


ANIMATIONS = """
    return ["#log li", "#data .value"].map((selector) =>
      getComputedStyle(document.querySelector(selector)).animationName);
"""
NEWEST_EDGE = "return getComputedStyle(document.querySelector('#log li')).borderLeftColor"


@pytest.mark.parametrize(("motion", "animation"), [("no-preference", "mark"), ("reduce", "none")])
def test_a_new_event_moves_unless_less_motion_is_wished_for(
    motion: str, animation: str, look: Look, page: OpenPage
) -> None:
    look.prefer(reduced_motion=motion)
    page.open()

    page.publish(ANSWER, type="new_answers")

    wait_for(page.rows, "the row")
    assert page.run(ANIMATIONS) == [animation, animation]
    assert page.run(NEWEST_EDGE) != "rgba(0, 0, 0, 0)"  # it is marked without motion, too


def fill(page: OpenPage) -> None:
    """Everything that the page can show at once, and long: events, the wire, a reset, a problem, an answer."""
    page.open("long" * 40)
    if not page.is_shown("wire-side"):
        page.click("#show-wire")
    wait_for(lambda: page.streams() == 2 and page.wire(), "the wire is read")
    for data in ("short", "", "unbroken" * 30, "clipped" * 200, {"question": "q" * 200, "value": "v" * 200}):
        page.publish(data, type="new_answers")
    page.publish("unbroken" * 30, type="new_question")
    page.publish("typed", type="long" * 40)
    page.publish("not listened for", type="unknown" * 30)
    page.publish({"reason": "unbroken" * 30}, type="stream-reset")
    wait_for(lambda: len(page.rows()) == 9, "all rows")
    wait_for(lambda: len(page.wire()) >= 9, "all blocks")
    page.enter("publish-retry", "x")
    page.click_publish()
    page.run(OPEN_FOLDS)
    page.run("document.querySelector('#log details').open = true")
    assert page.is_shown("reset")
    assert page.is_shown("answer")


OVERFLOW = """
    const width = document.documentElement.clientWidth;
    return [document.documentElement.scrollWidth - width, width,
      [...document.querySelectorAll("body *")].filter((at) => at.checkVisibility()
        && at.getBoundingClientRect().right > width).map((at) => at.outerHTML.slice(0, 80))];
"""


def test_at_360_pixels_nothing_needs_scrolling_sideways(page: OpenPage, look: Look) -> None:
    look.size(360)
    fill(page)

    assert page.run(OVERFLOW) == [0, 360, []]
    page.enter("publish-retry", "")
    page.enter("publish-data", "unbroken" * 40)
    assert page.run(OVERFLOW) == [0, 360, []]


AXE = """
    const done = arguments[0];
    axe.run(document).then(({passes, violations}) => done(passes.length < 20 ? ["did not run"]
    : violations.map(({id, nodes}) => [id, nodes.map((node) => node.html.slice(0, 99) + " " + node.failureSummary)])));
"""


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of npm's axe-core."""
    folder = npm_install(tmp_path_factory.mktemp("axe"), "axe-core@4")
    return Path(folder, "node_modules", "axe-core", "axe.min.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_that_keeps_anybody_out(
    width: int, scheme: str, look: Look, axe: str, page: OpenPage
) -> None:
    look.size(width)
    look.prefer(color_scheme=scheme, reduced_motion="reduce")  # or it judges colors that are still changing
    violations: list[Any] = []

    def judge() -> None:
        page.run(axe)
        violations.extend(page.tab.execute_async_script(AXE))

    page.open()
    assert page.run("return matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    judge()
    fill(page)
    judge()
    page.enter("publish-retry", "")
    page.click_publish()
    page.wait_for_published()
    judge()
    page.run("document.getElementById('phone').showPopover()")
    judge()
    page.run("document.getElementById('phone').hidePopover()")
    page.click("#close")
    judge()
    page.open_from_disk(f"http://localhost:{free_port()}")
    page.wait_for_shown("start")
    judge()

    assert violations == []


def console_log(tab: WebDriver) -> list[str]:
    """The warnings and errors in the browser's console since it was last asked."""
    entries: list[dict[str, Any]] = tab.get_log("browser")  # type: ignore[no-untyped-call]
    return [str(entry["message"]) for entry in entries]


def test_normal_use_leaves_no_error_in_the_browsers_console(page: OpenPage, look: Look) -> None:
    look.size(1280)
    console_log(page.tab)  # what others left
    page.open("greeting")
    page.wait_for_streams(2)
    page.send("greeting", "hello", streams=2)
    page.send("new_answers", "no object", streams=2)
    page.send("new_answer", "an answer", streams=2)
    page.send("unknown", "an answer", streams=2)
    page.click_publish()
    page.wait_for_published()
    page.wait_for_text("count", "5")
    clicks = "#pause, #pause, #clear, #show-wire, #show-wire, #close, #close, #lines summary, #lines button, #show-phone"
    for selector in clicks.split(", "):
        page.click(selector)
    page.wait_for_state("open")

    assert console_log(page.tab) == []


# ── In Firefox ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def firefox_page(second_browser: Firefox, page_server: ServerProcess, channel: str) -> Iterator[OpenPage]:
    """The page in Firefox, not yet open."""
    yield OpenPage(second_browser, page_server, channel)
    second_browser.get("about:blank")


def test_in_firefox_the_page_listens_publishes_and_shows_the_wire(firefox_page: OpenPage) -> None:
    page = firefox_page
    page.open()
    assert page.text("data") == PLACEHOLDER
    if not page.is_shown("wire-side"):
        page.run("document.getElementById('show-wire').click()")
    page.wait_for_streams(2)

    page.run("document.getElementById('publish').requestSubmit()")

    page.wait_for_text("data", SHOWN_ANSWER)
    page.wait_for_published()
    page.wait_for_part("wire", "event: new_answers\n")
    page.publish("learned", type="order_changed")
    page.publish("heard", type="order_changed")
    page.wait_for_rows("heard", "learned", json.dumps(ANSWER))
    assert [row[3] for row in page.whole_rows()] == ["", ADDED, ""]
    page.publish("bye", type="server_closed")
    page.wait_for_state("closed")
    page.wait_for_streams(0)


def test_in_firefox_a_page_from_disk_comes_back_to_a_restarted_server_and_misses_nothing(
    firefox_page: OpenPage, start: Start
) -> None:
    page, publisher = firefox_page, firefox_page.server
    page.server = start("--retry", "100")
    page.open_from_disk(page.server.url)
    page.wait_for_state("open")
    page.publish("seen")
    page.wait_for_rows("seen")

    page.server.kill()
    page.wait_for_part("state", GAVE_UP)
    assert re.match("Next try in about [1-5] s, lost", page.text("detail"))
    publisher.publish("missed", page.channel)
    page.server = start("--retry", "100", port=page.server.port)

    page.wait_for_rows("missed", "seen")
    page.wait_for_text("state", "Open")
    page.publish("after")
    page.wait_for_rows("after", "missed", "seen")


def test_in_firefox_a_page_from_disk_finds_a_server_that_is_started_later_and_can_be_closed_while_it_waits(
    firefox_page: OpenPage, start: Start
) -> None:
    port = free_port()
    page = firefox_page
    page.open_from_disk(f"http://{LOOPBACK}:{port}")
    page.wait_for_part("state", f"No connection yet: {GAVE_UP}")
    assert page.text("start-line") == f"python ssepush.py --port {port}"

    page.run("document.getElementById('close').click()")
    assert page.text("state") == "Closed"
    assert page.text("detail") == "You closed it."
    page.run("document.getElementById('close').click()")
    page.wait_for_part("state", f"No connection yet: {GAVE_UP}")
    start(port=port)

    page.wait_for_state("open")
    page.wait_for_streams(2 if page.is_shown("wire-side") else 1)
