"""The page, as a person uses it."""

from __future__ import annotations

import http.server
import json
import os
import re
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
    HAS_TEST_EXTRA,
    HERE,
    LOOPBACK,
    EventStream,
    Received,
    RedisProcess,
    ServerProcess,
    Start,
    free_port,
    program,
    wait_for,
)

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

PAGE = HERE / "index.html"
ANSWER = {"question": "which programming is the best?", "value": "Absolutely, PHP", "who": "allen"}
MESSAGE = json.dumps({"data": ANSWER, "type": "new_answers"})
SHOWN_ANSWER = "which programming is the best? : Absolutely, PHP"
NO_SERVER = "?server= must be the origin of a server"
GAVE_UP = "the browser gave up, so this page opens a new stream"


# ── What the tests of the page stand on ──────────────────────────────────────────────────────────────────────────────


SET = """
    const [id, value] = arguments, field = document.getElementById(id);
    field.value = value;
    for (const type of ["input", "change"]) field.dispatchEvent(new Event(type, {bubbles: true}));
"""


RECORD_STATES = """
    const state = document.getElementById("state");
    window.states = [];
    new MutationObserver(() => states.push([state.dataset.state, state.textContent]))
      .observe(state, {childList: true, characterData: true, subtree: true});
"""


FOCUSED = """
    const at = document.activeElement;
    return at.id || at.getAttribute("aria-label") || at.textContent.trim();
"""


FOCUSABLE = """
    return [...document.querySelectorAll("a[href], input, textarea, select, button, summary, [tabindex='0']")]
      .filter((at) => at.checkVisibility() && at.tabIndex >= 0)
      .map((at) => at.id || at.getAttribute("aria-label") || at.textContent.trim());
"""


ROWS = """
    return [...document.querySelectorAll("#log li")].filter((row) => row.checkVisibility())
      .map((row) => row.querySelector(".data").textContent);
"""


WIRE = "return [...document.querySelectorAll('#wire pre')].map((block) => block.textContent);"


OPEN_FOLDS = "for (const fold of document.querySelectorAll('.folds details')) fold.open = true;"


# Of each element: where it begins and ends, from the top of the window.
PLACES = """
    return [...arguments].map((selector) => {
      const {top, bottom} = document.querySelector(selector).getBoundingClientRect();
      return [Math.round(top), Math.round(bottom)];
    });
"""


OVERFLOW = """
    const width = document.documentElement.clientWidth;
    return [document.documentElement.scrollWidth - width, width,
      [...document.querySelectorAll("body *")].filter((at) => at.checkVisibility()
        && at.getBoundingClientRect().right > width).map((at) => at.outerHTML.slice(0, 80))];
"""


# How many elements came of what was shown as text.
STRANGE_ELEMENTS = "return [typeof window.__pwned, document.querySelectorAll('img, b, i').length];"


AXE = """
    const done = arguments[0];
    axe.run(document).then(({passes, violations}) => done(passes.length < 20 ? ["did not run"]
    : violations.map(({id, nodes}) => [id, nodes.map((node) => node.html.slice(0, 99) + " " + node.failureSummary)])));
"""


class OpenPage:
    """The page in a browser, with its server and a channel of its own."""

    def __init__(
        self,
        tab: Any,
        server: ServerProcess,
        channel: str,
    ) -> None:
        self.tab = tab
        self.server = server
        self.channel = channel

    def open(self, types: str = "", channel: str = "") -> None:
        """Have it listen to its channel, or another one; it publishes to the same."""
        self.tab.get(f"{self.server.url}/?channel={channel or self.channel}&types={types}")
        self.wait_for_state("open")

    def open_from_disk(self, server_parameter: str) -> None:
        """With `?server=` as given; it listens to its channel."""
        server = quote(server_parameter, safe="")
        self.tab.get(f"{PAGE.as_uri()}?channel={self.channel}&server={server}")

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
        element = self.tab.find_element("id", id_)
        value: str | None = element.get_attribute(name)
        return value

    def is_shown(self, id_: str) -> bool:
        element = self.tab.find_element("id", id_)
        return bool(element.is_displayed())

    def rows(self) -> list[str]:
        """The data of the log's visible rows, the newest first."""
        return [str(data) for data in self.run(ROWS)]

    def wire(self) -> list[str]:
        """The blocks of the wire, the newest first, each up to its blank line."""
        return [str(block) for block in self.run(WIRE)]

    def send(self, type_: str, data: Any) -> None:
        """A plain PUBLISH on its channel."""
        event = {"data": data, "type": type_}
        message = json.dumps(event)
        reached = self.server.redis.publish(self.channel, message)
        assert reached == 1

    def send_many(self, number: int) -> None:
        """Events in one burst: number 0, number 1, …"""
        messages = [f'{{"data": "number {n}"}}' for n in range(number)]
        self.server.redis.publish_all(self.channel, messages)

    def publish(self, data: Any, **members: Any) -> str:
        """Publish by the server on its channel; the event's id."""
        answer = self.server.publish(data, self.channel, **members)
        return str(answer["id"])

    def listener(self) -> EventStream:
        """Another stream of its channel."""
        return self.server.opened(self.channel)

    def streams(self) -> int:
        """How many streams of its channel are open, its own included."""
        return self.server.redis.subscribers(self.channel)

    def show_wire(self) -> None:
        self.click("#show-wire")
        wait_for(lambda: self.streams() == 2, "the second request is subscribed")

    def wait_for_rows(self, *data: str) -> None:
        """Until the log's visible rows are these."""
        wait_for(lambda: self.rows() == list(data), f"rows {data}")

    def wait_for_text(self, id_: str, text: str) -> None:
        """Until this is all that stands there."""
        wait_for(lambda: self.text(id_) == text, f"{text!r} in #{id_}")

    def wait_for_part(self, id_: str, text: str) -> None:
        """Until this stands there, maybe with more."""
        wait_for(lambda: text in self.text(id_), f"{text!r} in #{id_}")

    def wait_for_wire(self, text: str) -> None:
        """Until these bytes have come over the wire."""
        wait_for(lambda: text in "".join(self.wire()), text)

    def wait_for_first_row(self, data: str) -> None:
        wait_for(lambda: self.rows()[:1] == [data], data)

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
def page(
    tab: WebDriver,
    page_server: ServerProcess,
    channel: str,
) -> OpenPage:
    """The page in Chromium, not yet open."""
    return OpenPage(tab, page_server, channel)


# ── The file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_is_one_script_and_one_style_and_loads_nothing() -> None:
    page = PAGE.read_text()

    tags = re.findall("<(?:script|style)[^>]*>", page)
    assert tags == ["<style>", "<script>"]
    assert not re.findall(r" (?:src|style|on[a-z]+)=[\"']", page)
    assert not re.findall(r" href=[\"'](?!data:)", page)
    assert not re.findall("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval", page)


def test_the_script_begins_with_what_a_page_of_ones_own_needs() -> None:
    page = PAGE.read_text()
    start = page.index("<script>")
    beginning = page[start:].splitlines()[:20]

    for wanted in ("new EventSource(", '"new_answers"', '"server_closed"', "source.close()", '"data"'):
        assert any(wanted in line for line in beginning), wanted


# ── Its stream ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_says_in_words_that_it_connects_and_that_it_is_open(page: OpenPage) -> None:
    page.open()
    page.run(RECORD_STATES)

    page.click("#connect")

    wait_for(lambda: page.run("return states.length >= 2"), "two states")
    connecting, opened = page.run("return states")
    assert connecting == ["connecting", "Connecting"]
    assert opened == ["open", "Open"]
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


def test_one_button_closes_the_stream_and_opens_it_again(page: OpenPage) -> None:
    page.open()
    assert page.text("close") == "Close"

    page.click("#close")

    wait_for(lambda: page.streams() == 0, "the stream is closed")
    assert page.text("state") == "Closed"
    assert page.text("close") == "Connect"
    page.click("#close")
    page.wait_for_state("open")
    assert page.text("close") == "Close"


def test_a_stream_reset_is_announced_with_its_reason(
    page: OpenPage,
    own_redis: RedisProcess,
    start: Start,
) -> None:
    page.server = start("--retry", "200", redis=own_redis)
    page.open()
    page.publish("seen")
    page.wait_for_rows("seen")
    assert not page.is_shown("reset")

    page.server.kill()
    own_redis.client.flushall()
    start("--retry", "200", port=page.server.port, redis=own_redis)

    wait_for(lambda: page.is_shown("reset"), "the reset is shown")
    wait_for(lambda: len(page.rows()) == 2, "the reset is a row, too")
    reset, *_ = page.rows()
    reason = json.loads(reset)["reason"]
    assert reason
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

    wait_for(lambda: page.streams() == 0, "the stream is closed")
    page.publish("while away")
    page.click("#close")

    page.wait_for_first_row("while away")
    page.wait_for_state("open")
    assert page.run("return wantedUrl()") == f"{page.server.url}/stream?channel={page.channel}"


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


def test_a_streams_position_is_shown_and_is_no_event(page: OpenPage) -> None:
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
        urls.append(page.run("return wantedUrl()"))

    stream = f"{page.server.url}/stream?"
    assert urls == [
        f"{stream}last=10&channel={page.channel}",
        f"{stream}lastEventId=earliest&channel={page.channel}",
        f"{stream}channel={page.channel}",
    ]
    page.wait_for_state("open")


def test_an_icon_and_the_logo_show_the_state(page: OpenPage) -> None:
    look = """
        const wave = document.querySelector("#logo .wave");
        wave.style.transition = "none";
        return [document.getElementById("icon").href, getComputedStyle(wave).opacity];
    """
    page.open()
    open_icon, open_opacity = page.run(look)

    page.click("#close")
    closed_icon, closed_opacity = page.run(look)

    assert open_icon.startswith("data:image/svg+xml,")
    assert closed_icon.startswith("data:image/svg+xml,")
    assert open_icon != closed_icon
    assert (open_opacity, closed_opacity) == ("1", "0")


# ── From disk ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_page_from_disk_listens_to_the_server_that_it_is_told(page: OpenPage) -> None:
    page.open_from_disk(f"http://localhost:{page.server.port}")
    page.wait_for_state("open")

    page.server.redis.publish(page.channel, MESSAGE)

    page.wait_for_text("data", SHOWN_ANSWER)
    assert f"http://localhost:{page.server.port}/publish" in page.text("line-curl")


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
    for line in ("redis", "curl", "python"):
        assert page.text(f"line-{line}").startswith(f"# {NO_SERVER}")
    assert page.text("line-js").startswith(f"// {NO_SERVER}")
    page.click_publish()
    assert NO_SERVER in page.text("answer")


# ── Its answer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_question_and_answer_appear_once_they_have_come(page: OpenPage) -> None:
    page.open()
    assert not page.is_shown("named-question")
    assert not page.is_shown("named-answer")

    page.send("new_question", "which one?")
    page.send("new_answer", "<i>this</i>")

    wait_for(lambda: page.is_shown("named-answer"), "the answer is shown")
    assert page.text("last-question") == "which one?"
    assert page.text("last-answer") == "<i>this</i>"
    assert page.run(STRANGE_ELEMENTS) == ["undefined", 0]


def test_new_answers_without_a_question_are_said_to_be_in_the_log(page: OpenPage) -> None:
    page.open()
    page.send("new_answers", "no JSON")
    wait_for(lambda: page.is_shown("data-note"), "the page says so")
    assert page.text("data") == "received pushed data"

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


# ── Its log ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    cap = page.run("return LOG_ROWS")
    assert cap == 500

    page.send_many(1200)
    page.click("#pause")
    assert page.text("pause") == "Resume"
    page.click("#pause")

    page.wait_for_text("count", "1200")
    page.wait_for_first_row("number 1199")
    newest = range(1199, 1199 - cap, -1)
    assert page.rows() == [f"number {number}" for number in newest]


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
    wait_for(lambda: ":\n\n" in page.wire(), "a heartbeat")
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

    page.show_wire()
    assert "second stream (fetch) while shown" in page.text("wire-side")
    assert page.attribute("show-wire", "aria-pressed") == "true"

    page.click("#show-wire")
    wait_for(lambda: page.streams() == 1, "the second request is over")
    assert not page.is_shown("wire-side")
    assert page.state() == "open"


def test_the_wire_goes_on_with_the_stream_after_a_restart(page: OpenPage, start: Start) -> None:
    page.server = start("--retry", "200")
    page.open()
    page.show_wire()
    page.publish("before")
    page.wait_for_wire("data: before\n")

    page.server.kill()
    page.wait_for_state("waiting")
    page.wait_for_part("wire", "The stream ")
    page.server = start("--retry", "200", port=page.server.port)
    page.publish("after")

    page.wait_for_wire("data: after\n")
    bytes_shown = "".join(page.wire())
    assert bytes_shown.count("data: before\n") == 1


def test_closing_the_stream_closes_the_wire(page: OpenPage) -> None:
    page.open()
    page.show_wire()

    page.click("#close")

    wait_for(lambda: page.streams() == 0, "nobody is left")
    page.click("#close")
    wait_for(lambda: page.streams() == 2, "both are back")


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

    words = f"Published, but nobody is listening to {page.channel}-empty, ID "
    page.wait_for_part("answer", words)


def test_enter_publishes_and_shift_enter_starts_a_new_line(page: OpenPage) -> None:
    from selenium.webdriver.common.keys import Keys

    stream = page.listener()
    page.open()
    page.enter("publish-data", "")
    data = page.tab.find_element("id", "publish-data")
    height = data.size["height"]

    new_line = [Keys.SHIFT, Keys.ENTER, Keys.NULL]
    data.send_keys("one", *new_line, "two")
    assert data.size["height"] > height
    data.send_keys(Keys.ENTER)

    assert stream.next().data == "one\ntwo"


def test_publishing_with_a_wrong_retry_says_what_is_wrong_and_sends_nothing(page: OpenPage) -> None:
    stream = page.listener()
    page.open()
    page.enter("publish-data", "wrong")
    page.enter("publish-retry", "x")
    assert not page.is_shown("publish-retry")

    page.click_publish()

    problem = page.text("publish-retry-problem")
    assert "milliseconds" in problem
    assert page.text("answer") == f"Not sent. {problem}"
    assert page.attribute("publish-retry", "aria-invalid") == "true"
    assert page.run(FOCUSED) == "publish-retry"
    assert page.is_shown("publish-retry")
    assert page.text("line-redis") == f"# {problem}"
    page.enter("publish-retry", "3000")
    page.enter("publish-data", "right")
    page.click_publish()
    assert stream.next().data == "right"
    assert page.text("publish-retry-problem") == ""
    assert page.attribute("publish-retry", "aria-invalid") == "false"


def test_the_page_says_how_data_is_sent(page: OpenPage) -> None:
    page.open()
    assert page.text("kind") == "sent as JSON"

    page.enter("publish-data", "{no JSON}")

    assert page.text("kind") == "sent as text: it is not JSON"


# ── Lines to copy ────────────────────────────────────────────────────────────────────────────────────────────────────

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
    is_json = event.data.startswith(("{", "["))
    return event.type, event.json if is_json else event.data


def run_line(line: str, redis_process: RedisProcess) -> subprocess.CompletedProcess[str]:
    """Run a line to copy as somebody would who has this Redis."""
    command = line.replace("redis-cli ", f"redis-cli -p {redis_process.port} ", 1)
    command = command.replace("python ssepush.py", f"{sys.executable} ssepush.py", 1)
    environment = {**os.environ, "REDIS_URL": redis_process.url}
    return subprocess.run(
        [program("bash"), "-c", command],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.parametrize("line", ["redis", "curl", "python"])
def test_the_lines_to_copy_publish_what_the_form_publishes(line: str, page: OpenPage) -> None:
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

        command = page.text(f"line-{line}")
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
    copied = page.text("line-js").replace("const source", "window.copied")
    page.run(copied)
    wait_for(lambda: page.run("return copied.readyState === EventSource.OPEN"), "the copied code is open")

    page.click_publish()

    wait_for(lambda: page.run("return heard.length > 0"), "the copied code heard it")
    assert page.run("return heard") == [{"a": "b"}]
    page.run("copied.close()")


LINES_TO_COPY = ["redis", "curl", "python", "js"]


def lines_shown(page: OpenPage) -> list[str]:
    """Which of the lines to copy can be seen."""
    return [name for name in LINES_TO_COPY if page.is_shown(f"line-{name}")]


def test_the_lines_to_copy_are_tabs_of_one_block(page: OpenPage) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open()
    assert not page.is_shown("line-redis")
    page.click("#more-lines summary")
    assert lines_shown(page) == ["redis"]

    tab = page.tab.find_element("id", "tab-redis")
    tab.send_keys(Keys.ARROW_LEFT)

    assert page.run(FOCUSED) == "tab-js"
    assert page.is_shown("line-js")
    assert page.attribute("tab-js", "aria-selected") == "true"
    page.click("#tab-curl")
    assert lines_shown(page) == ["curl"]
    page.click("#copy")
    wait_for(lambda: page.text("copied"), "the page says that it copied")


# ── For everybody ────────────────────────────────────────────────────────────────────────────────────────────────────


def press(page: OpenPage, key: str) -> None:
    """Press a key, wherever the focus is."""
    from selenium.webdriver.common.action_chains import ActionChains

    keyboard = ActionChains(page.tab, duration=0)
    keyboard.send_keys(key).perform()


def test_the_page_works_by_keyboard_alone(page: OpenPage) -> None:
    from selenium.webdriver.common.keys import Keys

    stream = page.listener()
    page.open()
    page.run(OPEN_FOLDS)
    page.publish("a long one " * 100)
    assert stream.next()
    wait_for(lambda: page.rows(), "a row that can be opened")
    reachable: list[str] = page.run(FOCUSABLE)

    reached: list[str] = []
    for _ in reachable:
        press(page, Keys.TAB)
        reached.append(page.run(FOCUSED))
        if reached[-1] == "Publish":
            press(page, Keys.ENTER)
            assert stream.next().json == ANSWER
            page.wait_for_published()
            assert page.run(FOCUSED) == "Publish"

    assert "Publish" in reached
    assert reached == reachable


class Look:
    """How the page is shown: size of the window, color scheme, motion."""

    def __init__(self, tab: WebDriver) -> None:
        self.tab = tab

    def size(self, width: int, height: int = 800) -> None:
        metrics = {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1,
            "mobile": width < 600,
        }
        self.tab.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, **features: str) -> None:
        """As a user's settings would: `prefer(color_scheme="dark")`."""
        wanted = []
        for name, value in features.items():
            feature = name.replace("_", "-")
            wanted.append({"name": f"prefers-{feature}", "value": value})
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


ON_THE_FIRST_SCREEN = ["#state", "#data", ".scroll", "#publish .line"]


def test_all_that_matters_is_on_a_desktops_first_screen(page: OpenPage, look: Look) -> None:
    look.size(1280, 900)
    page.open()
    page.send_many(600)
    page.wait_for_text("count", "600")

    for _ in ("the log alone", "the wire beside it"):
        state, answer, log, line = page.run(PLACES, *ON_THE_FIRST_SCREEN)
        edges = [*state, *answer, *log, *line]
        assert edges == sorted(edges)
        assert edges[0] >= 0
        assert edges[-1] <= 900
        log_top, log_bottom = log
        assert log_bottom - log_top > 300
        assert page.run("return document.documentElement.scrollHeight") == 900
        page.click("#show-wire")


def test_on_a_phone_state_answer_and_log_come_first(page: OpenPage, look: Look) -> None:
    look.size(390, 844)
    page.open()
    page.publish(ANSWER, type="new_answers")
    page.wait_for_text("data", SHOWN_ANSWER)
    wait_for(lambda: page.rows(), "the row")

    order = ["#state", "#data", "#log li", "#publish", "#settings"]
    places = page.run(PLACES, *order)
    tops = [top for top, _ in places]

    assert tops == sorted(tops)
    first_row = tops[2]
    assert first_row < 500


ANIMATIONS = """
    return ["#log li", "#data .value"].map((selector) =>
      getComputedStyle(document.querySelector(selector)).animationName);
"""
NEWEST_EDGE = "return getComputedStyle(document.querySelector('#log li')).borderLeftColor"
MOTIONS = {
    "no-preference": ["arrive", "mark"],
    "reduce": ["none", "none"],
}


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_new_event_moves_unless_less_motion_is_wished_for(
    motion: str,
    look: Look,
    page: OpenPage,
) -> None:
    look.prefer(reduced_motion=motion)
    page.open()

    page.publish(ANSWER, type="new_answers")

    wait_for(page.rows, "the row")
    assert page.run(ANIMATIONS) == MOTIONS[motion]
    transparent = "rgba(0, 0, 0, 0)"
    assert page.run(NEWEST_EDGE) != transparent  # it is marked without motion, too


def fill(page: OpenPage) -> None:
    """Everything that the page can show at once, and long: events, the wire, a reset, a problem, an answer."""
    page.open("long" * 40)
    page.click("#show-wire")
    wait_for(lambda: page.streams() == 2, "the wire is read")
    page.publish("short", type="new_answers")
    page.publish("", type="new_answers")
    page.publish("unbroken" * 30, type="new_answers")
    page.publish("clipped" * 200, type="new_answers")
    long_answer = {"question": "q" * 200, "value": "v" * 200}
    page.publish(long_answer, type="new_answers")
    page.publish("unbroken" * 30, type="new_question")
    page.publish("typed", type="long" * 40)
    page.publish({"reason": "unbroken" * 30}, type="stream-reset")
    wait_for(lambda: len(page.rows()) == 8, "all rows")
    wait_for(lambda: len(page.wire()) >= 8, "all blocks")
    page.enter("publish-retry", "x")
    page.click_publish()
    page.run(OPEN_FOLDS)
    page.run("document.querySelector('#log details').open = true")
    assert page.is_shown("reset")
    assert page.is_shown("answer")


def test_at_360_pixels_nothing_needs_scrolling_sideways(page: OpenPage, look: Look) -> None:
    look.size(360)
    fill(page)

    assert page.run(OVERFLOW) == [0, 360, []]
    page.enter("publish-retry", "")
    page.enter("publish-data", "unbroken" * 40)
    assert page.run(OVERFLOW) == [0, 360, []]


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of npm's axe-core."""
    if not HAS_TEST_EXTRA:
        pytest.skip("needs the test extra: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("axe")
    installed = subprocess.run(
        [
            program("npm"),
            "install",
            "axe-core@4",
            "--no-audit",
            "--no-fund",
            f"--prefix={folder}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert installed.returncode == 0, installed.stderr
    return Path(folder, "node_modules", "axe-core", "axe.min.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_that_keeps_anybody_out(
    width: int,
    scheme: str,
    look: Look,
    axe: str,
    page: OpenPage,
) -> None:
    look.size(width)
    look.prefer(color_scheme=scheme, reduced_motion="reduce")  # or it judges colors that are still changing
    page.open()
    assert page.run("return matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    page.run(axe)
    violations: list[Any] = page.tab.execute_async_script(AXE)

    fill(page)
    page.run(axe)
    violations += page.tab.execute_async_script(AXE)
    page.enter("publish-retry", "")
    page.click_publish()
    page.wait_for_published()
    violations += page.tab.execute_async_script(AXE)
    page.click("#close")
    violations += page.tab.execute_async_script(AXE)

    assert violations == []


def console_log(tab: WebDriver) -> list[str]:
    """The warnings and errors in the browser's console since it was last asked."""
    entries: list[dict[str, Any]] = tab.get_log("browser")  # type: ignore[no-untyped-call]
    return [str(entry["message"]) for entry in entries]


def test_normal_use_leaves_no_error_in_the_browsers_console(page: OpenPage) -> None:
    console_log(page.tab)  # what others left
    page.open("greeting")
    page.send("greeting", "hello")
    page.send("new_answers", "no object")
    page.send("new_answer", "an answer")
    page.click_publish()
    page.wait_for_published()
    page.wait_for_text("count", "4")
    for selector in (
        *("#pause", "#pause", "#clear"),
        *("#show-wire", "#show-wire"),
        *("#close", "#close", "#connect"),
        "#more-lines summary",
        *[f"#tab-{name}" for name in LINES_TO_COPY],
        "#copy",
    ):
        page.click(selector)
    page.wait_for_state("open")

    messages = console_log(page.tab)
    assert messages == []


# ── In Firefox ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def firefox_page(
    second_browser: Firefox,
    page_server: ServerProcess,
    channel: str,
) -> Iterator[OpenPage]:
    """The page in Firefox, not yet open."""
    yield OpenPage(second_browser, page_server, channel)
    second_browser.get("about:blank")


def test_in_firefox_the_page_listens_publishes_and_shows_the_wire(firefox_page: OpenPage) -> None:
    page = firefox_page
    page.open()
    assert page.text("data") == "received pushed data"
    page.run("document.getElementById('show-wire').click()")
    wait_for(lambda: page.streams() == 2, "the second request is subscribed")

    page.run("document.getElementById('publish').requestSubmit()")

    page.wait_for_text("data", SHOWN_ANSWER)
    page.wait_for_published()
    page.wait_for_part("wire", "event: new_answers\n")
    page.publish("bye", type="server_closed")
    page.wait_for_state("closed")
    wait_for(lambda: page.streams() == 0, "both streams are closed")


def test_in_firefox_a_page_from_disk_comes_back_to_a_restarted_server_and_misses_nothing(
    firefox_page: OpenPage,
    start: Start,
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
    page.wait_for_first_row("after")


def test_in_firefox_a_page_from_disk_finds_a_server_that_is_started_later(
    firefox_page: OpenPage,
    start: Start,
) -> None:
    port = free_port()
    page = firefox_page
    page.open_from_disk(f"http://{LOOPBACK}:{port}")
    page.wait_for_part("state", f"No connection yet: {GAVE_UP}")

    start(port=port)

    page.wait_for_state("open")


def test_in_firefox_a_page_that_waits_to_come_back_can_be_closed_and_opened(
    firefox_page: OpenPage,
    start: Start,
) -> None:
    port = free_port()
    page = firefox_page
    page.open_from_disk(f"http://{LOOPBACK}:{port}")
    page.wait_for_part("state", GAVE_UP)

    page.run("document.getElementById('close').click()")
    assert page.text("state") == "Closed"
    assert page.text("detail") == "You closed it."

    start(port=port)
    page.run("document.getElementById('close').click()")
    page.wait_for_state("open")
    assert page.streams() == 1
