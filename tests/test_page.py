"""The page, as a person uses it."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tests import kit
from tests.browser import Firefox, QuietHandler, text_of
from tests.kit import EventStream, RedisProcess, ServerProcess, Start, wait_for

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

PAGE = kit.HERE / "index.html"
ANSWER = {"question": "which programming is the best?", "value": "Absolutely, PHP", "who": "allen"}
MESSAGE = json.dumps({"data": ANSWER, "type": "new_answers"})
SHOWN_ANSWER = "which programming is the best? : Absolutely, PHP"
PLACEHOLDER = "received pushed data"
NO_SERVER = "?server= must be the origin of a server"
GAVE_UP = "the browser gave up, so this page opens a new stream"
COUNTS_TWICE = "This page counts twice: its wire is a second stream."
ADDED = "no listener for this type: added"
SECOND_HEARTBEATS = ("--heartbeat", "0.4")  # a stream is dead after one second
WAYS_TO_COPY = ["redis", "curl", "python", "js"]


# ── What the tests of the page stand on ──────────────────────────────────────────────────────────────────────────────

SET = """
    const [id, value] = arguments, field = document.getElementById(id);
    field.value = value;
    for (const type of ["input", "change"]) field.dispatchEvent(new Event(type, {bubbles: true}));
"""
ROWS = """
    return [...document.querySelectorAll("#log li")].filter((row) => row.checkVisibility())
      .map((row) => ["type", "data", "id", "taught"].map((name) => row.querySelector("." + name)?.textContent ?? ""));
"""
WIRE = "return [...document.querySelectorAll('#wire pre')].map((block) => block.textContent);"
OPEN_FOLDS = "for (const fold of document.querySelectorAll('.folds details')) fold.open = true;"
RECORD_STATES = """
    const state = document.getElementById("state");
    window.states = [];
    new MutationObserver(() => states.push([state.dataset.state, state.textContent]))
      .observe(state, {childList: true, characterData: true, subtree: true});
"""
# What became an element, or ran, of what was shown as text.
STRANGE = """
    const elements = "img:not(#logo), b, i, body script:not(:last-of-type)";
    return [typeof window.__pwned, document.querySelectorAll(elements).length].join();
"""


class OpenPage:
    """The page in a browser, with its server and a channel of its own."""

    def __init__(self, tab: Any, server: ServerProcess, channel: str) -> None:
        self.tab = tab
        self.server = server
        self.channel = channel

    def open(self, types: str = "", channel: str = "", wire: bool = False, url: str = "") -> None:
        """Have it listen to its channel, or another one; it publishes to the same."""
        self.tab.get(f"{url or self.server.url}/?channel={quote(channel or self.channel)}&types={quote(types)}")
        self.until(self.state, "open")
        if wire:
            self.click("#show-wire")
            self.until(self.streams, 2)
            wait_for(self.wire, "the wire is read")

    def open_from_disk(self, server_parameter: str) -> None:
        """With `?server=` as given; it listens to its channel."""
        self.tab.get(f"{PAGE.as_uri()}?channel={self.channel}&server={quote(server_parameter, safe='')}")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.tab.execute_script(script, *arguments)

    def text(self, id_: str) -> str:
        return text_of(self.tab, id_)

    def state(self) -> str:
        """The page's connection: connecting, open, waiting or closed."""
        return str(self.tab.execute_script("return document.getElementById('state').dataset.state"))

    def enter(self, id_: str, value: str) -> None:
        """Have this value in a field."""
        self.run(SET, id_, value)

    def value(self, id_: str) -> Any:
        return self.run("return document.getElementById(arguments[0]).value", id_)

    def click(self, *selectors: str) -> None:
        """Click one after the other as a person does: what is covered or invisible cannot be clicked."""
        for selector in selectors:
            self.tab.find_element("css selector", selector).click()

    def click_publish(self) -> None:
        self.click("#publish .main")

    def attribute(self, id_: str, name: str) -> Any:
        return self.tab.find_element("id", id_).get_attribute(name)

    def is_shown(self, id_: str) -> bool:
        return bool(self.run("return document.getElementById(arguments[0]).checkVisibility()", id_))

    def shown_rows(self) -> list[list[str]]:
        """The list's visible rows, the oldest first: type, data, id, and what is said of a type that was added."""
        return [list(map(str, row)) for row in reversed(self.run(ROWS))]

    def rows(self) -> list[str]:
        """Their data."""
        return [data for _, data, *_ in self.shown_rows()]

    def wire(self) -> list[str]:
        """The blocks of the wire, the oldest first, each up to its blank line."""
        return [str(block) for block in reversed(self.run(WIRE))]

    def line(self, how: str) -> str:
        """The line to copy for this way of publishing or listening."""
        self.enter("how", how)
        return self.text("line")

    def publish(self, data: Any, **members: Any) -> str:
        """Publish by the server on its channel; the event's id."""
        return str(self.server.publish(data, self.channel, **members)["id"])

    def send(self, type_: str, data: Any) -> None:
        """A plain PUBLISH on its channel."""
        assert self.server.redis.publish_event(self.channel, data=data, type=type_)

    def listener(self) -> EventStream:
        """Another stream of its channel."""
        return self.server.opened(self.channel)

    def streams(self) -> int:
        """How many streams of its channel are open, its own included."""
        return self.server.redis.subscribers(self.channel)

    def until(self, read: Callable[[], Any], wanted: Any) -> None:
        """Wait for what is read to be this."""
        wait_for(lambda: read() == wanted, f"{wanted!r}")

    def reads(self, id_: str, text: str) -> None:
        """Wait for this to be all that stands there."""
        self.until(lambda: self.text(id_), text)

    def mentions(self, id_: str, part: str) -> None:
        """Wait for this to stand there, maybe with more."""
        wait_for(lambda: part in self.text(id_), f"{part!r} in #{id_}, which holds {self.text(id_)[:500]!r}")

    def shows(self, id_: str) -> None:
        wait_for(lambda: self.is_shown(id_), f"#{id_} is shown")


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
        self.prefer()


@pytest.fixture
def look(chromium: WebDriver) -> Iterator[Look]:
    """Gives the page a look until the test is over."""
    look = Look(chromium)
    yield look
    look.end()


def test_the_page_is_one_script_and_one_style_of_at_most_1000_lines_and_loads_nothing() -> None:
    page = PAGE.read_text()
    lines = page.splitlines()

    assert re.findall("<(?:script|style)[^>]*>", page) == ["<style>", "<script>"]
    assert not re.findall(r" (?:src|style|on[a-z]+)=[\"']", page)
    assert not re.findall(r" href=[\"'](?!data:)", page)
    assert not re.findall("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval", page)
    assert len(lines) <= 1000
    assert max(map(len, lines)) <= 120
    beginning = "\n".join(lines[lines.index("<script>") :][:20])
    for needed in ("new EventSource(", '"new_answers"', '"server_closed"', "source.close()", '"data"'):
        assert needed in beginning


# ── Its stream ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_says_in_words_and_by_its_icon_whether_it_is_open_and_one_button_changes_that(page: OpenPage) -> None:
    page.open()
    assert page.text("close") == "Close"
    assert page.attribute("state", "aria-live") == "polite"
    open_icon = page.attribute("icon", "href")
    assert page.attribute("logo", "src") == open_icon

    page.click("#close")
    page.until(page.streams, 0)
    assert (page.text("state"), page.text("detail"), page.text("close")) == ("Closed", "You closed it.", "Connect")
    closed_icon = page.attribute("icon", "href")
    assert page.attribute("logo", "src") == closed_icon != open_icon
    assert page.run("return document.getElementById('logo').naturalWidth") > 0

    page.run(RECORD_STATES)
    page.click("#close")
    wait_for(lambda: page.run("return states.length >= 2"), "two states")
    assert page.run("return states") == [["connecting", "Connecting"], ["open", "Open"]]
    assert page.text("detail") == f"Listening at {page.server.url}/stream?channel={page.channel}"
    assert page.text("close") == "Close"


@pytest.mark.parametrize("wire", [False, True], ids=["EventSource alone", "with the wire"])
def test_a_page_and_its_wire_say_that_they_reconnect_and_go_on_after_a_restart(
    wire: bool, page: OpenPage, start: Start
) -> None:
    page.server = start("--retry", "200")
    page.open("seen", wire=wire)
    page.publish("before", type="seen")
    page.until(page.rows, ["before"])

    page.server.kill()
    page.until(page.state, "waiting")
    assert "reconnecting" in page.text("state")
    assert re.match("Next try in about|Trying now", page.text("detail"))
    if wire:
        page.mentions("wire", "The stream ")
    page.server = start("--retry", "200", port=page.server.port)
    page.publish("after", type="seen")

    page.until(page.rows, ["before", "after"])
    assert page.text("state") == "Open"
    if wire:
        page.mentions("wire", "data: after")
        assert "".join(page.wire()).count("data: before\n") == 1


class BadGateway(QuietHandler):
    """A proxy that serves the page, and has nobody behind it to serve the stream."""

    def do_GET(self) -> None:
        if self.path.startswith("/stream"):
            self.answer(502)
        else:
            self.answer(200, PAGE.read_text())


def test_a_page_that_is_refused_says_why_but_comes_back_by_itself_after_a_proxys_502(
    page: OpenPage, start: Start
) -> None:
    page.tab.get(f"{page.server.url}/?channel=private-room")
    page.mentions("state", "Refused: 403, ")
    assert "private-room" in page.text("state")
    assert page.state() == "closed"
    assert "then connect" in page.text("detail")

    page.open_from_disk(start("--allow-origin", "https://other.example").url)
    page.reads("state", "Refused: the server does not let a page from here see its answer")
    assert page.state() == "closed"

    with http.server.ThreadingHTTPServer((kit.LOOPBACK, 0), BadGateway) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        page.tab.get(f"http://{kit.LOOPBACK}:{proxy.server_port}/?channel={page.channel}")
        page.reads("state", f"No connection yet: {GAVE_UP}")
        proxy.shutdown()
    page.server = start(port=proxy.server_port)
    page.until(page.state, "open")
    page.publish("after")
    page.until(page.rows, ["after"])


class DeafProxy:
    """Passes everything on, until its connections go dead: they stay open, and nothing comes any more."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._dead = threading.Event()
        self._listener = socket.create_server((kit.LOOPBACK, 0))
        self.url = f"http://{kit.LOOPBACK}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def kill_connections(self) -> None:
        """Those that are open now; newer ones work."""
        self._dead.set()
        self._dead = threading.Event()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the server has ended
            while True:
                near, far = self._listener.accept()[0], kit.connect(self._behind)
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(*ends, self._dead), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, dead: threading.Event) -> None:
        source.settimeout(None)
        with contextlib.suppress(OSError):
            while received := source.recv(65536):
                if not dead.is_set():
                    sink.sendall(received)
            if not dead.is_set():
                sink.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("wire", [False, True], ids=["EventSource alone", "with the wire"])
def test_heartbeats_keep_a_silent_page_open_and_a_dead_stream_is_noticed_and_goes_on_where_it_stopped(
    wire: bool, page: OpenPage, start: Start
) -> None:
    page.server = start(*SECOND_HEARTBEATS)
    proxy = DeafProxy(page.server.port)
    page.open(wire=wire, url=proxy.url)
    page.publish("before")
    page.until(page.rows, ["before"])
    page.run(RECORD_STATES)
    other = page.listener()
    other.wait(lambda: len(other.positions) >= 6, "two seconds of heartbeats")
    assert page.run("return states") == []
    if wire:
        page.run("stopWire()")
        page.until(page.streams, 2)  # EventSource and the other one
        page.until(page.streams, 3)

    proxy.kill_connections()
    page.publish("lost on the way")

    page.until(page.rows, ["before", "lost on the way"])
    why = "Connection lost: nothing came for 1 s, so this page opens a new stream"
    assert ["waiting", why] in page.run("return states")
    page.until(page.state, "open")
    page.publish("after")
    page.until(page.rows, ["before", "lost on the way", "after"])


def test_a_stream_reset_is_announced_with_its_reason(page: OpenPage, own_redis: RedisProcess, start: Start) -> None:
    page.server = start("--retry", "200", redis=own_redis)
    page.open()
    page.publish("seen")
    page.until(page.rows, ["seen"])
    assert not page.is_shown("reset")

    page.server.kill()
    own_redis.client.flushall()
    start("--retry", "200", port=page.server.port, redis=own_redis)

    page.shows("reset")
    wait_for(lambda: len(page.rows()) == 2, "the reset is a row, too")
    assert f": {json.loads(page.rows()[1])['reason']}. " in page.text("reset")
    assert "may be missing" in page.text("reset")
    assert page.attribute("reset", "role") == "status"


def test_an_expired_token_closes_the_page_which_goes_on_where_it_stopped_once_connected_again(page: OpenPage) -> None:
    page.open()
    page.publish("", type="token-expired")
    page.until(page.state, "closed")
    assert page.text("state") == "Token expired"
    assert page.is_shown("token")
    assert "new token" in page.text("detail")

    page.until(page.streams, 0)
    page.publish("while away")
    page.click("#close")

    wait_for(lambda: page.rows()[-1:] == ["while away"], "what was missed")
    page.until(page.state, "open")
    assert page.run("return streamUrl(true)") == f"{page.server.url}/stream?channel={page.channel}"


def test_a_page_may_begin_with_what_is_kept(page: OpenPage) -> None:
    page.open()
    for option in ("last=10", "lastEventId=earliest", ""):
        page.enter("begin", option)
        query = f"{option}&channel={page.channel}".lstrip("&")
        assert page.run("return streamUrl(true)") == f"{page.server.url}/stream?{query}"
    page.until(page.state, "open")


# ── Other windows, phones, and a page from disk ──────────────────────────────────────────────────────────────────────


def test_a_second_window_opens_beside_the_page_and_listens_to_the_same(page: OpenPage) -> None:
    page.open()
    first = page.tab.current_window_handle

    page.click("#second")

    page.until(page.streams, 2)
    page.send("message", "for both")
    for handle in sorted(page.tab.window_handles, key=first.__eq__):  # the first one last
        page.tab.switch_to.window(handle)
        page.until(page.rows, ["for both"])
        if handle != first:
            page.tab.close()


def test_a_phone_is_told_an_address_that_it_can_reach_or_how_to_make_one(
    page: OpenPage, look: Look, start: Start
) -> None:
    look.size(1280)
    page.open()
    page.click("#show-phone")
    assert page.text("address") == "python ssepush.py --host 0.0.0.0"
    assert f"A phone cannot reach {kit.LOOPBACK}:{page.server.port}." in page.text("phone-note")

    page.server = start("--host", "0.0.0.0")
    url = f"http://{socket.gethostname()}:{page.server.port}"
    page.open("a,b", url=url)
    page.click("#show-phone")
    assert page.text("address") == f"{url}/?channel={page.channel}&types=a%2Cb"
    assert page.run("return getComputedStyle(document.getElementById('address')).fontSize") == "22px"


def test_a_page_from_disk_says_which_server_it_tries_and_how_to_start_one_and_finds_it(
    page: OpenPage, start: Start
) -> None:
    page.tab.get(PAGE.as_uri())
    assert page.text("tried") == "http://localhost:5000/"
    assert page.text("start-line") == "python ssepush.py"
    port = kit.free_port()
    page.open_from_disk(f"http://localhost:{port}")

    page.shows("start")
    assert page.text("tried") == f"http://localhost:{port}/"
    assert page.text("start-line") == f"python ssepush.py --port {port}"
    page.click("#start button")
    wait_for(lambda: re.search("Copied|Selected", page.text("start")), "the page says that it copied")

    page.server = start(port=port)
    page.until(page.state, "open")
    assert not page.is_shown("start")
    page.server.redis.publish(page.channel, MESSAGE)
    page.reads("data", SHOWN_ANSWER)
    assert f"http://localhost:{port}/publish" in page.line("curl")


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
LEFT_EDGES = """
    return ["question", "value"].map((name) => document.querySelector("#data ." + name).getBoundingClientRect().x);
"""


def test_the_answer_stands_where_visibly_none_was_and_question_and_answer_beside_it(page: OpenPage) -> None:
    page.open()
    assert (page.text("data"), page.run(BORDER)) == (PLACEHOLDER, "dashed")
    assert page.is_shown("data-note")
    assert page.text("data-note") == "That only holds the place: no new_answers event has come yet."
    page.send("new_answers", "no JSON")
    page.mentions("data-note", "only in the list")
    assert page.text("data") == PLACEHOLDER
    page.publish(ANSWER, type="new_answers")
    page.reads("data", SHOWN_ANSWER)
    assert not page.is_shown("data-note")
    assert page.run(BORDER) == "none"

    assert not page.is_shown("named-question")
    assert not page.is_shown("named-answer")
    page.send("new_question", "which one?")
    page.send("new_answer", "<i>this</i>")
    page.shows("named-answer")
    assert (page.text("last-question"), page.text("last-answer")) == ("which one?", "<i>this</i>")
    assert page.run(STRANGE) == "undefined,0"

    page.publish({"question": "ما هي أفضل لغة؟", "value": "right to left"}, type="new_answers")
    page.mentions("data", "right to left")
    question, value = page.run(LEFT_EDGES)
    assert question > value


# ── Its list, and the wire ───────────────────────────────────────────────────────────────────────────────────────────


def test_with_the_wire_open_the_page_lists_every_event_and_learns_its_type(page: OpenPage) -> None:
    page.open(wire=True)
    assert "Every event" in page.text("heard")

    first = page.publish({"n": 1}, type="order_changed")
    page.reads("last-id", first)
    page.until(page.rows, ['{"n": 1}'])
    second = page.publish({"n": 2}, type="order_changed")
    page.send("error", "a type that EventSource has, too")

    page.reads("count", "3")
    assert page.shown_rows() == [
        ["order_changed", '{"n": 1}', first, ADDED],
        ["order_changed", '{"n": 2}', second, ""],
        ["error", "a type that EventSource has, too", "no ID of its own", ADDED],
    ]
    assert page.state() == "open"
    page.click("#show-wire")
    page.until(page.streams, 1)
    page.send("order_changed", "heard without the wire")
    wait_for(lambda: page.rows()[-1] == "heard without the wire", "EventSource hears the type")


def test_with_the_wire_open_a_burst_of_known_and_unknown_types_is_listed_once_and_in_order(page: OpenPage) -> None:
    page.open("known", wire=True)
    types = ["known", "unknown", "message", "other", "unknown", "new_question"]
    published = [[types[n % 6], "the same" if n % 5 == 0 else f"number {n}"] for n in range(300)]

    page.server.redis.publish_all(page.channel, [json.dumps({"type": type, "data": data}) for type, data in published])

    page.reads("count", "300")
    assert [row[:2] for row in page.shown_rows()] == published
    assert [row[0] for row in page.shown_rows() if row[3]] == ["unknown", "other"]

    many = [json.dumps({"type": f"type {n}", "data": n}) for n in range(150)]
    page.server.redis.publish_all(page.channel, many)
    page.reads("count", "450")  # though the page listens for seven types of its own, one that was asked for, and:
    assert page.run("return listened.length") == 8 + 100


def test_with_the_wire_closed_the_page_says_that_it_lists_not_all_and_hears_what_it_publishes_itself(
    page: OpenPage,
) -> None:
    page.open()
    assert page.text("heard") == "Only types that this page listens for. Open the wire to see all."
    page.send("passes unseen", 1)

    page.enter("publish-type", "report_done")
    page.click_publish()

    page.until(page.rows, [json.dumps(ANSWER)])
    assert page.shown_rows()[0][0] == "report_done"


def test_the_list_can_be_paused_filtered_and_cleared_and_counts_on(page: OpenPage) -> None:
    page.open("greeting")
    page.send("message", "plain 1")
    page.until(page.rows, ["plain 1"])

    page.click("#pause")
    page.send("greeting", "hello 1")
    page.send("message", "plain 2")
    page.reads("count", "3")
    assert page.rows() == ["plain 1"]
    assert (page.text("meanwhile"), page.text("pause")) == (", 2 since you paused", "Resume")
    page.click("#pause")
    page.until(page.rows, ["plain 1", "hello 1", "plain 2"])
    assert (page.text("meanwhile"), page.text("pause"), page.text("count")) == ("", "Pause", "3")

    page.click("#filter option[value=greeting]")
    assert page.rows() == ["hello 1"]
    page.send("message", "plain 3")
    page.send("greeting", "hello 2")
    page.until(page.rows, ["hello 1", "hello 2"])
    page.click("#filter option[value='']")
    assert page.rows() == ["plain 1", "hello 1", "plain 2", "plain 3", "hello 2"]

    page.send("stream-reset", '{"reason": "told"}')
    page.reads("count", "6")
    page.click("#clear")
    page.reads("count", "0")
    assert page.rows() == []
    assert page.is_shown("nothing")
    assert not page.is_shown("reset")
    page.send("message", "anew")
    page.until(page.rows, ["anew"])
    assert page.text("count") == "1"
    assert not page.is_shown("nothing")


def test_a_burst_of_1200_events_is_counted_whole_logged_up_to_the_cap_and_can_be_paused_meanwhile(
    page: OpenPage,
) -> None:
    page.open()

    page.server.redis.publish_all(page.channel, kit.numbers(0, 1200))
    page.click("#pause")
    assert page.text("pause") == "Resume"
    page.click("#pause")

    page.reads("count", "1200")
    page.until(page.rows, kit.numbers(700, 1200))


HIDE = """
    Object.defineProperty(document, "hidden", {value: arguments[0], configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
"""


def test_the_last_id_is_shown_and_the_title_of_a_hidden_tab_counts_but_a_position_is_no_event(page: OpenPage) -> None:
    page.open()
    page.run(HIDE, True)
    for data in ("first", "second"):
        id_ = page.publish(data)
        page.reads("last-id", id_)
        page.mentions("log", id_)
    wait_for(lambda: page.tab.title == "(2) ssepush", "the title counts two")
    page.run(HIDE, False)
    assert page.tab.title == "ssepush"

    page.reads("last-id", page.publish("", type="stream-position"))
    page.send("message", "an event")

    page.until(page.rows, ["first", "second", "an event"])
    assert page.text("count") == "3"
    assert page.shown_rows()[-1][2] == "no ID of its own"


def test_the_wire_shows_the_bytes_as_they_came(page: OpenPage, start: Start) -> None:
    page.server = start("--heartbeat", "0.3")
    page.open("greeting", wire=True)
    assert page.wire()[0].startswith("retry: ")

    id_ = page.publish("two\nlines <b>", type="greeting")

    event = wait_for(lambda: [block for block in page.wire() if "data: two" in block], "the event")[0]
    fields = ["event: greeting", f"id: {id_}", "data: two", "data: lines <b>", "", ""]
    assert sorted(event.split("\n")) == sorted(fields)
    heartbeat = f"event: stream-position\nid: {id_}\ndata: \n\n"
    wait_for(lambda: page.wire()[-1] == heartbeat, "a heartbeat")
    assert page.rows() == ["two\nlines <b>"]
    assert page.run(STRANGE) == "undefined,0"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_wire_is_open_at_first_on_wide_screens_and_read_only_while_it_is_shown_and_says_so(
    width: int, page: OpenPage, look: Look
) -> None:
    look.size(width)
    page.open()
    if width == 390:
        assert not page.is_shown("wire-side")
        assert (page.streams(), page.text("counted")) == (1, "")
        page.click("#show-wire")

    page.until(page.streams, 2)
    assert "second stream (fetch) while shown" in page.text("wire-side")
    assert page.attribute("show-wire", "aria-pressed") == "true"
    assert page.text("counted") == COUNTS_TWICE
    page.click_publish()
    page.mentions("answer", "Published to 2 receivers, ID ")
    assert page.text("answer").endswith(f". {COUNTS_TWICE}")

    page.click("#close")
    page.until(page.streams, 0)
    page.click("#close")
    page.until(page.streams, 2)
    page.click("#show-wire")
    page.until(page.streams, 1)
    assert not page.is_shown("wire-side")
    assert (page.state(), page.text("counted")) == ("open", "")


# ── Publishing, and lines to copy ────────────────────────────────────────────────────────────────────────────────────


def test_the_form_holds_the_articles_event_publishes_on_enter_and_says_whom_it_reached(page: OpenPage) -> None:
    from selenium.webdriver.common.keys import Keys

    stream = page.listener()
    page.open()
    assert page.text("kind") == "sent as JSON"
    page.click_publish()
    event = stream.next()
    assert (event.type, event.json) == ("new_answers", ANSWER)
    page.reads("data", SHOWN_ANSWER)
    page.reads("answer", f"Published to 2 receivers, ID {event.id}")

    page.enter("publish-data", "{no JSON}")
    assert page.text("kind") == "sent as text: it is not JSON"
    page.enter("publish-channel", f"{page.channel}-empty")
    page.click_publish()
    page.mentions("answer", f"Published, but nobody is listening to {page.channel}-empty, ID ")

    page.enter("publish-channel", page.channel)
    page.enter("publish-data", "")
    data = page.tab.find_element("id", "publish-data")
    height = data.size["height"]
    data.send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    assert data.size["height"] > height
    data.send_keys(Keys.ENTER)
    assert stream.next().data == "one\ntwo"


def test_what_is_published_goes_to_the_channel_that_one_listens_to_until_told_otherwise(page: OpenPage) -> None:
    page.open()
    assert page.value("publish-channel") == page.channel

    page.enter("channel", f"{page.channel}-2, {page.channel}-3")
    assert page.value("publish-channel") == f"{page.channel}-2"

    page.enter("publish-channel", "elsewhere")
    assert page.text("elsewhere") == "This page is not listening to elsewhere."
    page.enter("channel", page.channel)
    assert page.value("publish-channel") == "elsewhere"
    assert page.text("try") == f"redis-cli publish {page.channel} '{MESSAGE}'"

    page.enter("publish-channel", "")
    assert page.value("publish-channel") == page.channel
    assert page.text("elsewhere") == ""


WRONG = {
    "retry": ("publish-retry", "x", "milliseconds"),
    "token": ("publish-token", "two words", "without spaces"),
    "channel": ("publish-channel", "", "Name a channel"),
}


@pytest.mark.parametrize(("id_", "wrong", "words"), WRONG.values(), ids=list(WRONG))
def test_publishing_with_a_wrong_field_says_what_is_wrong_and_sends_nothing(
    id_: str, wrong: str, words: str, page: OpenPage
) -> None:
    stream = page.listener()
    page.open()
    right = page.value(id_)
    page.run("document.getElementById(arguments[0]).value = arguments[1]", id_, wrong)

    page.click_publish()

    assert re.match(f"Not sent. .*{words}", page.text("answer"))
    assert page.run("return document.activeElement.matches(':invalid')")
    assert page.run("return document.activeElement.id") == id_
    assert page.is_shown(id_)
    assert page.line("redis") == page.text("answer").replace("Not sent. ", "# ")
    page.enter(id_, right)
    page.enter("publish-data", "right")
    page.click_publish()
    assert stream.next().data == "right"


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


def meaning(event: kit.Received) -> tuple[str, Any]:
    """Type and data; JSON objects and arrays mean the same however they are spaced."""
    return event.type, event.json if event.data.startswith(("{", "[")) else event.data


def run_line(line: str, redis_process: RedisProcess) -> subprocess.CompletedProcess[str]:
    """Run a line to copy as somebody would who has this Redis."""
    command = line.replace("redis-cli ", f"redis-cli -p {redis_process.port} ", 1)
    command = command.replace("python ssepush.py", f"{sys.executable} ssepush.py", 1)
    environment = {**os.environ, "REDIS_URL": redis_process.url}
    arguments = [kit.needs("bash"), "-c", command]
    return subprocess.run(
        arguments, cwd=kit.HERE, env=environment, capture_output=True, text=True, timeout=kit.DEADLINE_S
    )


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
        page.mentions("answer", "Published to ")
        by_form = stream.next()

        command = page.line(how)
        ran = run_line(command, page.server.redis)

        if ran.returncode or meaning(by_line := stream.next()) != meaning(by_form):
            wrong[name] = f"{command}: {ran.stderr or by_line} instead of {by_form}"
    assert not wrong
    assert stream.parser.retry_ms == 4321


def test_one_of_the_lines_to_copy_is_shown_and_the_javascript_hears_what_the_form_publishes(page: OpenPage) -> None:
    page.open()
    assert not page.is_shown("line")
    page.click("#lines summary")
    assert page.is_shown("line")
    assert [page.line(how).split()[0] for how in WAYS_TO_COPY] == ["redis-cli", "curl", "python", "const"]
    page.click("#lines button")
    wait_for(lambda: re.search("Copied|Selected", page.text("lines")), "the page says that it copied")

    page.enter("publish-type", "it's </script>")
    page.enter("publish-data", '{"a": "b"}')
    page.run("window.heard = []; console.log = (value) => heard.push(value);")
    page.run(page.line("js").replace("const source", "window.copied"))
    wait_for(lambda: page.run("return copied.readyState === EventSource.OPEN"), "the copied code is open")

    page.click_publish()

    wait_for(lambda: page.run("return heard.length > 0"), "the copied code heard it")
    assert page.run("return heard") == [{"a": "b"}]
    page.run("copied.close()")


# ── For everybody ────────────────────────────────────────────────────────────────────────────────────────────────────

NAME = "((at) => at.id || at.getAttribute('aria-label') || at.textContent.trim())"
FOCUSABLE = f"""
    return [...document.querySelectorAll("a[href], input, textarea, select, button, summary, [tabindex='0']")]
      .filter((at) => at.checkVisibility() && at.tabIndex >= 0).map({NAME});
"""


def test_the_page_works_by_keyboard_alone(page: OpenPage) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    stream = page.listener()
    page.open()
    page.run(OPEN_FOLDS)
    page.publish("a long one " * 100)
    assert stream.next()
    wait_for(page.rows, "a row that can be opened")
    reachable: list[str] = page.run(FOCUSABLE)

    reached: list[str] = []
    for _ in reachable:
        ActionChains(page.tab, duration=0).send_keys(Keys.TAB).perform()
        reached.append(page.run(f"return {NAME}(document.activeElement)"))
        if reached[-1] == "Publish":
            ActionChains(page.tab, duration=0).send_keys(Keys.ENTER).perform()
            assert stream.next().json == ANSWER
            page.mentions("answer", "Published to ")

    assert "Publish" in reached
    assert reached == reachable


# Of each element: where it begins and ends, from the top of the window.
PLACES = """
    return [...arguments].map((selector) => {
      const {top, bottom} = document.querySelector(selector).getBoundingClientRect();
      return [Math.round(top), Math.round(bottom)];
    });
"""


def test_all_that_matters_is_on_a_desktops_first_screen_and_first_on_a_phone(page: OpenPage, look: Look) -> None:
    look.size(1280, 900)
    page.open()
    page.publish(ANSWER, type="new_answers")
    page.server.redis.publish_all(page.channel, kit.numbers(0, 600))
    page.reads("count", "601")

    for _ in ("the wire beside the log", "the log alone"):
        state, answer, log, line = page.run(PLACES, "#state", "#data", ".scroll", "#publish .line")
        edges = [0, *state, *answer, *log, *line, 900]
        assert edges == sorted(edges)
        assert log[1] - log[0] > 300
        assert page.run("return document.documentElement.scrollHeight") == 900
        page.click("#show-wire")

    look.size(390, 844)
    tops = [top for top, _ in page.run(PLACES, "#state", "#data", "#log li", "#publish", "#settings")]
    assert tops == sorted(tops)
    assert tops[2] < 500


ANIMATION = "return getComputedStyle(document.querySelector(arguments[0])).animationName"
NEWEST_EDGE = "return getComputedStyle(document.querySelector('#log li')).borderLeftColor"


@pytest.mark.parametrize(("motion", "animation"), [("no-preference", "mark"), ("reduce", "none")])
def test_a_new_event_moves_unless_less_motion_is_wished_for(
    motion: str, animation: str, look: Look, page: OpenPage
) -> None:
    look.prefer(reduced_motion=motion)
    page.open()
    page.publish(ANSWER, type="new_answers")
    wait_for(page.rows, "the row")

    assert [page.run(ANIMATION, selector) for selector in ("#log li", "#data .value")] == [animation] * 2
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
    wait_for(lambda: len(page.rows()) == 9 and len(page.wire()) >= 9, "all rows and blocks")
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
AXE = """
    const done = arguments[0];
    axe.run(document).then(({passes, violations}) => done(passes.length < 20 ? ["did not run"]
    : violations.map(({id, nodes}) => [id, nodes.map((node) => node.html.slice(0, 99) + " " + node.failureSummary)])));
"""


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of npm's axe-core."""
    folder = kit.npm_install(tmp_path_factory.mktemp("axe"), "axe-core@4")
    return (folder / "node_modules/axe-core/axe.min.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_that_keeps_anybody_out_and_at_360_pixels_nothing_needs_scrolling_sideways(
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
    if width == 360:
        assert page.run(OVERFLOW) == [0, 360, []]
        page.enter("publish-data", "unbroken" * 40)
        assert page.run(OVERFLOW) == [0, 360, []]
    page.enter("publish-retry", "")
    page.click_publish()
    page.mentions("answer", "Published to ")
    judge()
    page.run("document.getElementById('phone').showPopover()")
    judge()
    page.run("document.getElementById('phone').hidePopover()")
    page.click("#close")
    judge()
    page.open_from_disk(f"http://localhost:{kit.free_port()}")
    page.shows("start")
    judge()

    assert violations == []


def test_normal_use_leaves_no_error_in_the_browsers_console(page: OpenPage, look: Look) -> None:
    look.size(1280)
    page.tab.get_log("browser")  # what others left
    page.open("greeting")
    page.until(page.streams, 2)
    for type_ in ("greeting", "new_answers", "new_answer", "unknown"):
        page.send(type_, "no object")
    page.click_publish()
    page.mentions("answer", "Published to ")
    page.reads("count", "5")
    page.click("#pause", "#pause", "#clear", "#show-wire", "#show-wire", "#close", "#close")
    page.click("#lines summary", "#lines button", "#show-phone")
    page.until(page.state, "open")

    assert page.tab.get_log("browser") == []


# ── In Firefox ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def firefox_page(second_browser: Firefox, page_server: ServerProcess, channel: str) -> Iterator[OpenPage]:
    """The page in Firefox, not yet open. Firefox's windows are wide."""
    yield OpenPage(second_browser, page_server, channel)
    second_browser.get("about:blank")


def test_in_firefox_the_page_listens_publishes_shows_the_wire_and_learns_types(firefox_page: OpenPage) -> None:
    page = firefox_page
    page.open()
    assert page.text("data") == PLACEHOLDER
    page.until(page.streams, 2)

    page.run("document.getElementById('publish').requestSubmit()")

    page.reads("data", SHOWN_ANSWER)
    page.mentions("answer", "Published to ")
    page.mentions("wire", "event: new_answers\n")
    page.publish("learned", type="order_changed")
    page.publish("heard", type="order_changed")
    page.until(page.rows, [json.dumps(ANSWER), "learned", "heard"])
    assert [row[3] for row in page.shown_rows()] == ["", ADDED, ""]
    page.publish("bye", type="server_closed")
    page.until(page.state, "closed")
    page.until(page.streams, 0)


def test_in_firefox_a_page_from_disk_finds_a_server_that_starts_later_and_comes_back_to_it_and_misses_nothing(
    firefox_page: OpenPage, start: Start
) -> None:
    page, publisher, port = firefox_page, firefox_page.server, kit.free_port()
    page.open_from_disk(f"http://{kit.LOOPBACK}:{port}")
    page.mentions("state", f"No connection yet: {GAVE_UP}")
    assert page.text("start-line") == f"python ssepush.py --port {port}"
    page.run("document.getElementById('close').click()")  # can be closed while it waits, and opened
    assert (page.text("state"), page.text("detail")) == ("Closed", "You closed it.")
    page.run("document.getElementById('close').click()")
    page.mentions("state", f"No connection yet: {GAVE_UP}")

    page.server = start("--retry", "100", port=port)
    page.until(page.state, "open")
    page.until(page.streams, 2)
    page.publish("seen")
    page.until(page.rows, ["seen"])

    page.server.kill()
    page.mentions("state", f"Connection lost: {GAVE_UP}")
    assert re.match("Next try in about [1-5] s, lost", page.text("detail"))
    publisher.publish("missed", page.channel)
    page.server = start("--retry", "100", port=port)
    page.until(page.rows, ["seen", "missed"])
    page.reads("state", "Open")
    page.publish("after")
    page.until(page.rows, ["seen", "missed", "after"])
