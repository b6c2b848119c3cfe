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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

import ssepush
from tests import kit
from tests.browser import QuietHandler, text_of
from tests.kit import RedisProcess, ServerProcess, Start, wait_for
from tests.test_examples import SECOND_HEARTBEATS

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

PAGE = kit.HERE / "index.html"
ANSWER = {"question": "which programming is the best?", "value": "Absolutely, PHP", "who": "allen"}
MESSAGE = json.dumps({"data": ANSWER, "type": "new_answers"})
SHOWN_ANSWER = "which programming is the best? : Absolutely, PHP"
PLACEHOLDER = "received pushed data"
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
# An event that is being listed moves what stands below it: a click would land beside it.
STAND_STILL = """
    const [selector, done] = arguments, element = document.querySelector(selector);
    const look = (top) => requestAnimationFrame(() => {
      const now = element.getBoundingClientRect().top;
      if (now === top) done(); else look(now);
    });
    look(null);
"""
OPEN_FOLDS = "for (const fold of document.querySelectorAll('details')) fold.open = true;"
RECORD_STATES = """
    const state = document.getElementById("state");
    window.states = [];
    new MutationObserver(() => states.push(state.dataset.state))
      .observe(state, {childList: true, characterData: true, subtree: true});
"""
# What became an element, or ran, of what was shown as text.
STRANGE = """
    const elements = "img:not(#logo), b, i, body script:not(:last-of-type)";
    return [typeof window.__pwned, document.querySelectorAll(elements).length].join();
"""
CLEAN = "undefined,0"


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
        if wire and not self.is_shown("wire-side"):
            self.press("show-wire")
        if wire:
            wait_for(self.wire, "the wire is read")

    def open_from_disk(self, server_url: str) -> None:
        self.tab.get(f"{PAGE.as_uri()}?channel={self.channel}&server={quote(server_url, safe='')}")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.tab.execute_script(script, *arguments)

    def press(self, id_: str) -> None:
        """By script, since our Firefox has no other way."""
        self.run("document.getElementById(arguments[0]).click()", id_)

    def click(self, *selectors: str) -> None:
        """As a person does, one after the other: what is covered, invisible or still moving cannot be clicked."""
        for selector in selectors:
            self.tab.execute_async_script(STAND_STILL, selector)
            self.tab.find_element("css selector", selector).click()

    def enter(self, id_: str, value: str) -> None:
        """Have this value in a field."""
        self.run(SET, id_, value)

    def of(self, id_: str, name: str) -> Any:
        """A property of an element: `of("publish-channel", "value")`."""
        return self.run("return document.getElementById(arguments[0])[arguments[1]]", id_, name)

    def text(self, id_: str) -> str:
        return text_of(self.tab, id_)

    def state(self) -> str:
        """The page's connection: connecting, open, waiting or closed."""
        return str(self.of("state", "dataset")["state"])

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
        """By the server on its channel; the event's id."""
        return str(self.server.publish(data, self.channel, **members)["id"])

    def send(self, type_: str, data: Any) -> None:
        """A plain PUBLISH on its channel."""
        assert self.server.redis.publish_event(self.channel, data=data, type=type_)

    def streams(self) -> int:
        """How many streams of its channel are open, its own included."""
        return self.server.redis.subscribers(self.channel)

    def until(self, read: Callable[[], Any], wanted: Any) -> None:
        """Wait for what is read to be this."""
        wait_for(lambda: read() == wanted, lambda: f"{wanted!r}, but {read()!r}")

    def reads(self, id_: str, text: str) -> None:
        """Wait for this to be all that stands there."""
        self.until(lambda: self.text(id_), text)

    def mentions(self, id_: str, part: str) -> None:
        """Wait for this to stand there, maybe with more."""
        wait_for(lambda: part in self.text(id_), lambda: f"{part!r} in #{id_}, but {self.text(id_)[:500]!r}")


@pytest.fixture(scope="session")
def page_server(redis_process: RedisProcess) -> Iterator[ServerProcess]:
    """One server: the page does not depend on how it subscribes."""
    server = ServerProcess(redis_process)
    yield server
    server.end()


@pytest.fixture
def page(tab: WebDriver, page_server: ServerProcess, channel: str) -> Iterator[OpenPage]:
    """The page in Chromium, not yet open; its script may not fail."""
    page = OpenPage(tab, page_server, channel)
    page.tab.get_log("browser")  # what others left
    yield page
    assert [entry for entry in page.tab.get_log("browser") if "Uncaught" in entry["message"]] == []


@pytest.fixture
def page_in_each(browser: Any, page_server: ServerProcess, channel: str) -> Iterator[OpenPage]:
    """The page in each browser by turns, not yet open."""
    yield OpenPage(browser, page_server, channel)
    browser.get("about:blank")


Look = Callable[..., None]


@pytest.fixture
def look(chromium: WebDriver) -> Iterator[Look]:
    """Gives Chromium a size and a user's preferences until the test is over: `look(1280, color_scheme="dark")`."""

    def look(width: int, height: int = 800, **preferences: str) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        features = [{"name": f"prefers-{name.replace('_', '-')}", "value": preferences[name]} for name in preferences]
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    yield look
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_page_is_one_script_and_one_style_and_loads_nothing() -> None:
    page = PAGE.read_text()

    assert re.findall("<(?:script|style)[^>]*>", page) == ["<style>", "<script>"]
    assert not re.findall(r" (?:src|style|on[a-z]+)=[\"']", page)
    assert not re.findall(r" href=[\"'](?!data:)", page)
    assert not re.findall("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval", page)


# ── Its stream ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_says_whether_it_is_open_and_one_button_changes_that(page: OpenPage, start: Start) -> None:
    page.open()
    icon_when_open = page.of("icon", "href")
    assert page.of("state", "ariaLive") == "polite"
    assert page.of("logo", "naturalWidth") > 0
    page.publish("kept")
    page.until(page.rows, ["kept"])

    page.click("#close")
    page.until(page.streams, 0)
    assert (page.state(), page.text("close")) == ("closed", "Connect")
    assert page.of("icon", "href") != icon_when_open

    page.run(RECORD_STATES)
    page.click("#close")
    page.until(lambda: page.run("return states"), ["connecting", "open"])
    assert (page.text("close"), page.of("icon", "href")) == ("Close", icon_when_open)
    assert f"{page.server.url}/stream?channel={page.channel}" in page.text("detail")

    page.enter("begin", "last=10")
    page.until(page.rows, ["kept"] * 2)
    page.enter("begin", "lastEventId=earliest")
    page.until(page.rows, ["kept"] * 3)

    first = page.tab.current_window_handle
    page.click("#second")
    page.until(page.streams, 2)
    page.send("message", "for both")
    for handle in sorted(page.tab.window_handles, key=first.__eq__):  # the first one last
        page.tab.switch_to.window(handle)
        wait_for(lambda: page.rows()[-1:] == ["for both"], "both windows show it")
        if handle != first:
            page.tab.close()

    assert page.tab.get_log("browser") == []

    page.server = start("--host", "0.0.0.0")
    url = f"http://{socket.gethostname()}:{page.server.port}"
    page.open("a,b", url=url)
    page.press("show-phone")
    assert page.text("address") == f"{url}/?channel={page.channel}&types=a%2Cb"


def test_in_each_browser_the_page_listens_publishes_shows_the_wire_and_learns_types(page_in_each: OpenPage) -> None:
    page = page_in_each
    page.open(wire=True)
    page.until(page.streams, 2)
    assert page.text("data") == PLACEHOLDER
    assert page.wire()[0].startswith("retry: ")

    page.run("document.getElementById('publish').requestSubmit()")
    page.reads("data", SHOWN_ANSWER)
    assert page.run(ANIMATION) == "mark"
    page.mentions("answer", "Published to 2 receivers, ID ")
    first = page.publish("two\nlines <b>", type="order_changed")
    second = page.publish("heard", type="order_changed")
    page.send("error", "a type that EventSource has, too")
    page.reads("count", "4")
    assert [[type_, data, id_, bool(added)] for type_, data, id_, added in page.shown_rows()[1:]] == [
        ["order_changed", "two\nlines <b>", first, True],
        ["order_changed", "heard", second, False],
        ["error", "a type that EventSource has, too", "no ID of its own", True],
    ]
    fields = ["event: order_changed", f"id: {first}", "data: two", "data: lines <b>", "", ""]
    assert [block for block in page.wire() if sorted(block.split("\n")) == sorted(fields)]
    assert page.run(STRANGE) == CLEAN
    page.reads("last-id", page.publish("", type="stream-position"))

    page.press("show-wire")
    page.until(page.streams, 1)
    page.send("passes unseen", 1)
    page.send("order_changed", "without the wire")
    wait_for(lambda: page.rows()[-1] == "without the wire", "EventSource hears the type that was learnt")
    assert page.text("count") == "5"
    page.publish("bye", type="server_closed")
    page.until(page.state, "closed")
    page.until(page.streams, 0)


@pytest.mark.parametrize("wire", [False, True], ids=["EventSource alone", "with the wire"])
def test_whatever_ends_its_stream_the_page_says_so_comes_back_and_misses_nothing_or_says_that_it_may(
    wire: bool, page: OpenPage, own_redis: RedisProcess, start: Start
) -> None:
    options = ("--retry", "200", *SECOND_HEARTBEATS)
    page.server, other = start(*options, redis=own_redis), start(*options, redis=own_redis)
    page.open("seen", wire=wire)
    page.publish("first", type="seen")
    page.until(page.rows, ["first"])
    page.run(RECORD_STATES)
    clock = other.stream(f"{page.channel}-2")
    clock.wait(lambda: len(clock.positions) >= 6, "two seconds of heartbeats")
    assert page.run("return states") == []

    with kit.stopped(page.server.process):
        other.publish("while it hung", page.channel)
        page.until(page.state, "waiting")
        page.mentions("state", "nothing came for 1 s")
    page.until(page.rows, ["first", "while it hung"])
    page.until(page.state, "open")

    own_redis.kill()
    page.until(page.state, "waiting")
    own_redis.start()
    ssepush.publish("while Redis was away", None, page.channel, redis_url=own_redis.url)
    page.until(page.rows, ["first", "while it hung", "while Redis was away"])

    page.server.kill()
    page.until(page.state, "waiting")
    page.mentions("detail", " s, lost ")
    other.publish("while it was away", page.channel)
    page.server = start(*options, port=page.server.port, redis=own_redis)
    page.until(page.rows, ["first", "while it hung", "while Redis was away", "while it was away"])
    page.until(page.state, "open")
    assert not page.is_shown("reset")
    if wire:
        page.mentions("wire", "data: while it was away")
        assert "".join(page.wire()).count("data: first\n") == 1

    page.server.kill()
    own_redis.client.flushall()
    page.server = start(*options, port=page.server.port, redis=own_redis)
    wait_for(lambda: page.is_shown("reset"), "the reset")
    assert page.of("reset", "role") == "status"
    wait_for(lambda: len(page.rows()) == 5, "the reset is a row, too")
    assert json.loads(page.rows()[-1])["reason"] in page.text("reset")


def test_a_page_without_a_token_or_with_one_that_expired_says_so_and_goes_on_with_a_new_one(
    page: OpenPage, start: Start
) -> None:
    secret = "only the tests know this"
    page.channel = f"private-{page.channel}"
    page.server = start("--retry", "100", "--heartbeat", "0.2", SSEPUSH_SECRET=secret)
    page.tab.get(f"{page.server.url}/?channel={page.channel}")
    page.mentions("state", "Refused: 403, ")
    assert page.channel in page.text("state")
    assert page.state() == "closed"

    page.enter("token", ssepush.sign(page.channel, ttl=2, secret=secret))
    page.until(page.state, "open")
    assert "token" not in page.text("detail") + page.run("return location.href")
    page.publish("seen")
    page.until(page.rows, ["seen"])

    page.reads("state", "Token expired")
    assert page.state() == "closed"
    assert page.is_shown("token")
    page.publish("while away")
    page.enter("token", ssepush.sign(page.channel, secret=secret))
    wait_for(lambda: page.rows()[-1:] == ["while away"], "what was missed")
    page.until(page.state, "open")

    opened = page.server.metric("streams_opened_total")
    page.send("server_closed", "bye")
    page.until(page.state, "closed")
    page.until(page.streams, 0)
    clock = page.server.stream(f"{page.channel[8:]}-2")
    clock.wait(lambda: len(clock.positions) >= 5, "many times the reconnection time went by")
    assert page.server.metric("streams_opened_total") == opened + 1


NO_SERVER = "?server= must be the origin of a server"
NO_SERVERS = """
    http://x;id;/ http://x/$(id) javascript:alert(1) file:///etc/passwd http://user:password@localhost
    localhost http://localhost:5000/else http://localhost:99999
"""
WAYS_TO_COPY = ["redis", "curl", "python", "js"]


class BadGateway(QuietHandler):
    """A proxy that serves the page, and has nobody behind it to serve the stream."""

    def do_GET(self) -> None:
        if self.path.startswith("/stream"):
            self.answer(502)
        else:
            self.answer(200, PAGE.read_text())


def test_a_page_that_cannot_listen_says_why_and_comes_back_by_itself_after_a_proxys_502(
    page: OpenPage, start: Start
) -> None:
    page.open_from_disk(start("--allow-origin", "https://other.example").url)
    page.mentions("state", "the server does not let pages of this origin read its answer")
    assert page.state() == "closed"

    for url in ("", *NO_SERVERS.split()):
        page.open_from_disk(url)
        assert page.state() == "closed"
        assert NO_SERVER in page.text("state")
        for how in WAYS_TO_COPY:
            assert page.line(how).startswith(("# " if how != "js" else "// ") + NO_SERVER)
        page.click("#publish .main")
        assert NO_SERVER in page.text("answer")

    with http.server.ThreadingHTTPServer((kit.LOOPBACK, 0), BadGateway) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        page.tab.get(f"http://{kit.LOOPBACK}:{proxy.server_port}/?channel={page.channel}")
        page.until(page.state, "waiting")
        proxy.shutdown()
    page.server = start(port=proxy.server_port)
    page.until(page.state, "open")
    page.publish("after")
    page.until(page.rows, ["after"])


def test_in_each_browser_a_page_from_disk_finds_a_server_that_starts_later_and_comes_back_to_it(
    page_in_each: OpenPage, start: Start
) -> None:
    page, publisher, port = page_in_each, page_in_each.server, kit.free_port()
    page.open_from_disk(f"http://{kit.LOOPBACK}:{port}")
    wait_for(lambda: page.is_shown("start"), "the page says how to start a server")
    assert page.text("tried") == f"http://{kit.LOOPBACK}:{port}/"
    assert page.text("start-line") == f"python ssepush.py --port {port}"
    page.press("close")
    assert page.state() == "closed"
    page.press("close")
    page.until(page.state, "waiting")

    page.server = start("--retry", "100", port=port)
    page.until(page.state, "open")
    assert not page.is_shown("start")
    page.publish("seen")
    page.until(page.rows, ["seen"])

    page.server.kill()
    page.until(page.state, "waiting")
    publisher.publish("missed", page.channel)
    page.server = start("--retry", "100", port=port)
    page.until(page.rows, ["seen", "missed"])


# ── What it shows ────────────────────────────────────────────────────────────────────────────────────────────────────

MARKUP = "<img/src=x/onerror=window.__pwned=1><script>window.__pwned=1</script>"
# What is published, where it is shown, and how.
SHOWN: list[tuple[dict[str, Any], str, str]] = [
    ({"data": {"question": MARKUP, "value": f"<b>{MARKUP}"}, "type": "new_answers"}, "data", f"{MARKUP} : <b>{MARKUP}"),
    ({"data": MARKUP, "type": "new_answers"}, "log", MARKUP),
    ({"data": MARKUP, "type": "new_question"}, "named-question", MARKUP),
    ({"data": MARKUP, "type": "new_answer"}, "named-answer", MARKUP),
    ({"data": "x", "type": f"{MARKUP}2"}, "filter", f"{MARKUP}2"),
    ({"data": "x", "id": f"{MARKUP}3"}, "log", f"{MARKUP}3"),
    ({"data": f"a\n\nevent: {MARKUP}4\ndata: b"}, "log", f"event: {MARKUP}4"),
    ({"data": {"reason": MARKUP}, "type": "stream-reset"}, "reset", MARKUP),
    ({"data": MARKUP, "type": "server_closed"}, "detail", MARKUP),
]


def test_whatever_is_published_asked_for_or_refused_the_page_shows_text(page: OpenPage) -> None:
    page.open(MARKUP, wire=True)
    page.send("new_answers", "no JSON")
    page.mentions("data-note", "only in the list")
    assert page.text("data") == PLACEHOLDER
    for message, id_, text in SHOWN:
        page.server.redis.publish(page.channel, json.dumps(message))
        page.mentions(id_, text)
    assert page.run(STRANGE) == CLEAN

    page.open(channel=MARKUP)
    assert page.of("channel", "value") == MARKUP
    page.server.redis.publish(MARKUP, MARKUP)
    page.until(page.rows, [MARKUP])
    page.enter("channel", f"private-{MARKUP}")
    page.mentions("state", f"private-{MARKUP}")
    page.enter("publish-channel", MARKUP * 3)
    page.click("#publish .main")
    page.mentions("answer", "channel must")
    assert page.run(STRANGE) == CLEAN


BREAK_THE_POLICY = """
    window.violations = [];
    addEventListener('securitypolicyviolation', (event) => violations.push(event.effectiveDirective));
    const script = document.createElement('script');
    script.textContent = 'window.__pwned = 1';
    document.body.append(script);
    document.body.insertAdjacentHTML('beforeend',
      '<img src=/healthz onerror=window.__pwned=2><div style=color:red><iframe src=/></iframe>');
    fetch('http://127.0.0.1:1/').catch(() => {});
"""


def test_the_page_runs_no_script_but_its_own_and_cannot_be_framed(page: OpenPage) -> None:
    page.open()
    page.run(BREAK_THE_POLICY)

    wanted = {"script-src-elem", "script-src-attr", "img-src", "style-src-attr", "connect-src", "frame-src"}
    wait_for(lambda: wanted <= set(page.run("return window.violations")), "all of it is refused")
    assert page.run("return typeof window.__pwned") == "undefined"
    headers = page.server.get("/").headers
    for directive in ("frame-ancestors 'none'", "form-action 'none'"):
        assert directive in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_burst_is_listed_whole_in_order_and_once_and_a_longer_one_counted_whole(page: OpenPage) -> None:
    page.open("known", wire=True)
    types = ["known", "unknown", "message", "other", "unknown", "new_question"]
    published = [[types[n % 6], "the same" if n % 5 == 0 else f"number {n}"] for n in range(300)]
    page.server.redis.publish_all(
        page.channel, [json.dumps({"type": type_, "data": data}) for type_, data in published]
    )
    page.reads("count", "300")
    assert [row[:2] for row in page.shown_rows()] == published
    assert [row[0] for row in page.shown_rows() if row[3]] == ["unknown", "other"]

    many = [json.dumps({"type": f"type {n}", "data": n}) for n in range(150)]
    page.server.redis.publish_all(page.channel, many)
    page.reads("count", "450")  # though the page listens for seven types of its own, one that was asked for, and:
    assert page.run("return listened.length") == 8 + 100

    page.open()
    page.server.redis.publish_all(page.channel, kit.numbers(0, 1200))
    page.reads("count", "1200")
    page.until(page.rows, kit.numbers(700, 1200))


def test_the_list_can_be_paused_filtered_and_cleared_and_counts_on(page: OpenPage) -> None:
    page.open("greeting")
    page.click("#pause")
    page.send("message", "plain 1")
    page.send("greeting", "hello 1")
    page.reads("count", "2")
    assert (page.rows(), page.text("pause")) == ([], "Resume")
    assert "2" in page.text("meanwhile")
    page.click("#pause")
    page.until(page.rows, ["plain 1", "hello 1"])
    assert (page.text("meanwhile"), page.text("pause"), page.text("count")) == ("", "Pause", "2")

    page.enter("filter", "greeting")
    assert page.rows() == ["hello 1"]
    page.send("message", "plain 2")
    page.send("greeting", "hello 2")
    page.until(page.rows, ["hello 1", "hello 2"])
    page.enter("filter", "")
    assert page.rows() == ["plain 1", "hello 1", "plain 2", "hello 2"]

    page.send("stream-reset", '{"reason": "told"}')
    page.reads("count", "5")
    page.click("#clear")
    page.reads("count", "0")
    assert page.rows() == []
    assert not page.is_shown("reset")
    page.send("message", "anew")
    page.until(page.rows, ["anew"])


# ── Publishing, and lines to copy ────────────────────────────────────────────────────────────────────────────────────

WRONG = [
    ("publish-retry", "x", "milliseconds"),
    ("publish-token", "two words", "without spaces"),
    ("publish-channel", "", "Name a channel"),
]


def test_the_form_publishes_on_enter_where_one_listens_until_told_otherwise_and_says_what_is_wrong(
    page: OpenPage,
) -> None:
    from selenium.webdriver.common.keys import Keys

    stream = page.server.opened(page.channel)
    page.open()
    page.enter("publish-type", "report_done")
    page.click("#publish .main")
    event = stream.next()
    assert (event.type, event.json) == ("report_done", ANSWER)
    page.reads("answer", f"Published to 2 receivers, ID {event.id}")
    page.until(page.rows, [json.dumps(ANSWER)])  # the page hears what it publishes, though it was not asked for

    page.enter("publish-data", "{no JSON}")
    assert "not JSON" in page.text("kind")
    page.enter("publish-data", "")
    data = page.tab.find_element("id", "publish-data")
    data.send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two", Keys.ENTER)
    assert stream.next().data == "one\ntwo"

    for id_, wrong, words in WRONG:
        right = page.of(id_, "value")
        page.run("document.getElementById(arguments[0]).value = arguments[1]", id_, wrong)
        page.click("#publish .main")
        assert re.match(f"Not sent. .*{words}", page.text("answer"))
        assert page.run("return document.activeElement.matches(':invalid') && document.activeElement.id") == id_
        assert page.is_shown(id_)
        assert page.line("redis") == page.text("answer").replace("Not sent. ", "# ")
        page.enter(id_, right)
    page.enter("publish-data", "right")
    page.click("#publish .main")
    assert stream.next().data == "right"  # and nothing before it

    page.enter("channel", f"{page.channel}-2, {page.channel}-3")
    assert page.of("publish-channel", "value") == f"{page.channel}-2"
    page.enter("publish-channel", f"{page.channel}-4")
    assert f"not listening to {page.channel}-4" in page.text("elsewhere")
    page.enter("channel", page.channel)
    assert page.of("publish-channel", "value") == f"{page.channel}-4"
    page.click("#publish .main")
    page.mentions("answer", f"Published, but nobody is listening to {page.channel}-4, ID ")
    page.enter("publish-channel", "")
    assert page.of("publish-channel", "value") == page.channel


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


def run_line(line: str, redis_process: RedisProcess) -> str:
    """Run a line to copy as somebody would who has this Redis; what it says of errors."""
    command = line.replace("redis-cli ", f"redis-cli -p {redis_process.port} ", 1)
    command = command.replace("python ssepush.py", f"{sys.executable} ssepush.py", 1)
    environment = {**os.environ, "REDIS_URL": redis_process.url}
    arguments = [kit.needs("bash"), "-c", command]
    ran = subprocess.run(
        arguments, cwd=kit.HERE, env=environment, capture_output=True, text=True, timeout=kit.DEADLINE_S
    )
    return ran.stderr if ran.returncode else ""


def test_the_lines_to_copy_publish_what_the_form_publishes_and_hear_it(page: OpenPage) -> None:
    stream = page.server.opened(page.channel)
    page.open(channel=f"{page.channel}-quiet")
    page.enter("publish-channel", page.channel)
    page.enter("publish-retry", "4321")
    wrong = {}
    for name, (type_, data) in FORMS.items():
        page.enter("publish-type", type_)
        page.enter("publish-data", data)
        page.click("#publish .main")
        by_form = stream.next()
        for how in ("redis", "curl", "python"):
            command = page.line(how)
            error = run_line(command, page.server.redis)
            if error or meaning(by_line := stream.next()) != meaning(by_form):
                wrong[name, how] = f"{command}: {error or by_line} instead of {by_form}"
    assert not wrong
    assert stream.parser.retry_ms == 4321

    page.click("#lines summary", "#lines button")
    wait_for(lambda: re.search("Copied|Selected", page.text("lines")), "the page says that it copied")
    page.enter("publish-type", "it's </script>")
    page.enter("publish-data", '{"a": "b"}')
    page.run("window.heard = []; console.log = (value) => heard.push(value);")
    page.run(page.line("js") + "window.copied = source;")
    wait_for(lambda: page.run("return copied.readyState === EventSource.OPEN"), "the copied code is open")
    page.click("#publish .main")
    page.until(lambda: page.run("return heard"), [{"a": "b"}])
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

    page.open()
    page.publish("a long one " * 100)
    wait_for(page.rows, "a row that can be opened")
    page.run(OPEN_FOLDS)
    reachable: list[str] = page.run(FOCUSABLE)

    reached: list[str] = []
    for _ in reachable:
        ActionChains(page.tab, duration=0).send_keys(Keys.TAB).perform()
        reached.append(page.run(f"return {NAME}(document.activeElement)"))
        if reached[-1] == "Publish":
            ActionChains(page.tab, duration=0).send_keys(Keys.ENTER).perform()
            page.reads("data", SHOWN_ANSWER)

    assert "Publish" in reached
    assert reached == reachable


# Where each of these begins and ends, from the top of the window.
PLACES = """
    return ["#state", "#data", ".scroll", "#publish .line"].flatMap((selector) => {
      const {top, bottom} = document.querySelector(selector).getBoundingClientRect();
      return [Math.round(top), Math.round(bottom)];
    });
"""
ANIMATION = "return getComputedStyle(document.querySelector('#data .value')).animationName"


def fill(page: OpenPage) -> None:
    """Everything that the page can show at once, and long: events, the wire, a reset, a problem, an answer."""
    page.open("long" * 40, wire=True)
    for data in ("short", "", "unbroken" * 30, "clipped" * 200, {"question": "q" * 200, "value": "v" * 200}):
        page.publish(data, type="new_answers")
    page.publish("unbroken" * 30, type="new_question")
    page.publish("typed", type="long" * 40)
    page.publish("not listened for", type="unknown" * 30)
    page.publish({"reason": "unbroken" * 30}, type="stream-reset")
    wait_for(lambda: len(page.rows()) == 9 and len(page.wire()) >= 9, "all rows and blocks")
    page.enter("publish-retry", "x")
    page.click("#publish .main")
    page.enter("publish-data", "unbroken" * 40)
    page.run(OPEN_FOLDS)


OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
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
def test_axe_finds_nothing_that_keeps_anybody_out_and_all_that_matters_is_on_the_first_screen(
    width: int, scheme: str, look: Look, axe: str, page: OpenPage
) -> None:
    look(width, color_scheme=scheme, reduced_motion="reduce")  # or it judges colors that are still changing

    def judge() -> None:
        page.run(axe)
        assert page.tab.execute_async_script(AXE) == []

    page.open()
    assert page.run("return matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    assert page.is_shown("wire-side") is (width == 1280)
    page.publish(ANSWER, type="new_answers")
    page.server.redis.publish_all(page.channel, kit.numbers(0, 600))
    page.reads("count", "601")
    if width == 1280:
        places = [0, *page.run(PLACES), 800]
        assert places == sorted(places)
    assert page.run(ANIMATION) == "none"
    judge()
    fill(page)
    judge()
    assert page.run(OVERFLOW) == 0
    page.enter("publish-retry", "")
    page.click("#publish .main")
    page.mentions("answer", "Published to ")
    judge()
    page.press("show-phone")
    assert page.text("address") == "python ssepush.py --host 0.0.0.0"
    judge()
    page.run("document.getElementById('phone').hidePopover()")
    page.click("#close")
    judge()
    page.open_from_disk(f"http://localhost:{kit.free_port()}")
    wait_for(lambda: page.is_shown("start"), "how to start a server")
    judge()
