"""The examples, each run as its reader would run it, in real browsers."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import kit
from tests.browser import Browser, Firefox, Site

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

EXAMPLES = kit.HERE / "examples"
ITEMS = "return [...document.querySelectorAll('li')].map((item) => item.textContent)"
SECOND_HEARTBEATS = ("--heartbeat", "0.4")  # a stream is dead after one second


def example_for(url: str, name: str, channel: str) -> str:
    """An example's text, with this server and channel instead of those that it names."""
    text = (EXAMPLES / name).read_text()
    documented = "http://127.0.0.1:5000/stream?channel=sse"
    assert documented in text
    return text.replace(documented, f"{url}/stream?channel={channel}")


def items(browser: Browser) -> list[str]:
    """What stands in the page's list."""
    return list(browser.execute_script(ITEMS))


def content(browser: Browser, selector: str) -> str:
    """What stands in an element of the page."""
    return str(browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))


def wait_for_content(browser: Browser, selector: str, text: str) -> None:
    """Until this stands there."""
    kit.wait_for(lambda: content(browser, selector) == text, f"{selector} says {text}")


@contextlib.contextmanager
def running_app(name: str, folder: Path, port: int, **environment: str) -> Iterator[str]:
    """An application of the examples, as its first lines say how to start it; its URL."""
    variables = kit.environment_with(PYTHONPATH=str(kit.HERE), PORT=str(port), **environment)
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, EXAMPLES / name], env=variables, stdout=output, stderr=output)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        return kit.listens(port)

    try:
        kit.wait_for(ready, f"{name} takes connections")
        yield f"http://{kit.LOOPBACK}:{port}"
    finally:
        process.kill()
        process.wait()


class Tab:
    """A tab of Chromium or Firefox, which comes to the front when it is asked something."""

    def __init__(self, browser: Any, url: str = "") -> None:
        """url: what a new tab shows; "" is for the one that is in front."""
        self.browser = browser
        self.is_firefox = isinstance(browser, Firefox)
        self.driver = browser.marionette if self.is_firefox else browser
        if url and self.is_firefox:
            self.handle = self.driver.open(type="tab", focus=True)["handle"]
        elif url:
            self.driver.switch_to.new_window("tab")
            self.handle = self.driver.current_window_handle
        else:
            self.handle = self.driver.current_window_handle
        if url:
            self.come_to_front()
            browser.get(url)

    def come_to_front(self) -> None:
        switch_to = self.driver.switch_to_window if self.is_firefox else self.driver.switch_to.window
        switch_to(self.handle)

    def run(self, script: str, *arguments: Any) -> Any:
        self.come_to_front()
        return self.browser.execute_script(script, *arguments)

    def close(self) -> None:
        """With the cookies of its page's host."""
        self.come_to_front()
        self.driver.delete_all_cookies()
        self.driver.close()


@contextlib.contextmanager
def tabs_of(browser: Any) -> Iterator[list[Tab]]:
    """For the tabs that a test opens: those that are left in the list are closed."""
    first = Tab(browser)
    tabs: list[Tab] = []
    yield tabs
    for tab in tabs:
        tab.close()
    first.come_to_front()


# ── minimal.html ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_minimal_page_opened_from_disk_shows_what_comes_and_what_it_missed(
    browser: Any, start: kit.Start, redis_process: kit.RedisProcess, channel: str, tmp_path: Path
) -> None:
    server = start("--retry", "100")
    page = tmp_path / "minimal.html"
    page.write_text(example_for(server.url, "minimal.html", channel))
    browser.get(page.as_uri())
    wait_for_content(browser, "p", "open")

    server.publish("<b>plain</b>", channel)
    server.publish({"value": "PHP"}, channel, type="new_answers")
    kit.wait_for(lambda: items(browser) == ["PHP", "<b>plain</b>"], "both are shown, the newest first")

    server.kill()
    wait_for_content(browser, "p", "waiting …")
    start().publish("missed", channel)
    back = start("--retry", "100", port=server.port)
    kit.wait_for(lambda: items(browser)[:1] == ["missed"], "what was missed is shown")

    back.publish("", channel, type="stream-reset")
    kit.wait_for(lambda: browser.execute_script(ITEMS) == [], "the page was loaded anew")  # Firefox: None meanwhile
    wait_for_content(browser, "p", "open")

    back.publish("", channel, type="server_closed")
    wait_for_content(browser, "p", "closed")
    redis_process.wait_for_subscribers(channel, 0)


@pytest.mark.parametrize("example", ["minimal.html", "one-stream-for-all-tabs.html"])
def test_a_stream_that_went_dead_without_a_word_is_opened_anew_and_nothing_is_missed(
    example: str, browser: Any, start: kit.Start, channel: str, tmp_path: Path
) -> None:
    server, other = start(*SECOND_HEARTBEATS), start(*SECOND_HEARTBEATS)
    page = tmp_path / example
    page.write_text(example_for(server.url, example, channel))
    browser.get(page.as_uri())
    kit.wait_for(lambda: server.streams() == 1, "the page listens")
    server.publish("before", channel)
    kit.wait_for(lambda: items(browser) == ["before"], "the first one")

    with kit.stopped(server.process):
        other.publish("missed", channel)
        clock = other.stream(channel)
        clock.wait(lambda: len(clock.positions) >= 5, "two seconds of heartbeats")

    kit.wait_for(lambda: sorted(items(browser)) == ["before", "missed"], "what was missed")
    assert server.metric("streams_opened_total") > 1
    server.publish("after", channel)
    kit.wait_for(lambda: sorted(items(browser)) == ["after", "before", "missed"], "what came later")


# ── one-stream-for-all-tabs.html ─────────────────────────────────────────────────────────────────────────────────────

TABS = 8
EVENTS = 1000
CLOSED_LEADERS = 6
TAKEOVER_MS = 1000
MARK_ARRIVALS = """
  const mark = (item) => { item.dataset.at = Date.now(); };
  const observer = new MutationObserver((records) => records.forEach((record) => record.addedNodes.forEach(mark)));
  observer.observe(document.getElementById("events"), { childList: true });
"""
LEADS = "return document.getElementById('role').textContent === 'holds the stream'"
ARRIVALS = """
  const items = document.querySelectorAll("#events li");
  return Array.from(items, (item) => [item.textContent, Number(item.dataset.at ?? 0)]);
"""


def arrivals(tab: Tab) -> dict[str, float]:
    """The events in a tab, in order, and when each came (Unix time, ms; 0: before that was noted)."""
    found = tab.run(ARRIVALS)
    assert len({text for text, _ in found}) == len(found)
    return dict(found)


def test_eight_tabs_share_one_stream_and_each_gets_each_event_once_in_order_while_leaders_are_closed(
    chromium: WebDriver, start: kit.Start, redis_process: kit.RedisProcess, channel: str
) -> None:
    server = start("--history", str(EVENTS))
    page = example_for(server.url, "one-stream-for-all-tabs.html", channel)
    with Site({"/": lambda: page}) as site, tabs_of(chromium) as tabs:

        def open_tab() -> Tab:
            tabs.append(Tab(chromium, site.url))
            tabs[-1].run(MARK_ARRIVALS)
            return tabs[-1]

        for _ in range(TABS):
            open_tab()
        kit.wait_for(lambda: server.streams() == 1, "the leader's stream is open")
        publisher = kit.Publisher(server.port, "event", channel, pause=0.008)

        joined: Tab | None = None
        left: list[list[str]] = []
        for moment in sorted(random.sample(range(EVENTS // 10, EVENTS), CLOSED_LEADERS)):
            kit.wait_for(lambda: len(publisher.acknowledged) >= moment, f"{moment} events")  # noqa: B023
            (leader,) = kit.wait_for(lambda: [tab for tab in tabs if tab.run(LEADS)], "a tab leads")
            redis_process.wait_for_subscribers(channel, 1)
            left.append(list(arrivals(leader)))
            leader.close()
            tabs.remove(leader)
            tabs[0].come_to_front()
            if len(left) == CLOSED_LEADERS // 2:
                redis_process.wait_for_subscribers(channel, 1)  # the next one has taken over
                joined = open_tab()
        kit.wait_for(lambda: len(publisher.acknowledged) >= EVENTS, "all events")
        publisher.stop()

        published_at = {text: place_us / 1000 for place_us, _, text in publisher.acknowledged}
        texts = list(published_at)
        for tab in tabs:
            kit.wait_for(lambda: texts[-1] in arrivals(tab), "the tab has the last event")  # noqa: B023
            came = arrivals(tab)
            assert list(came) == (texts[-len(came) :] if tab is joined else texts)
            assert all(at - published_at[text] < TAKEOVER_MS for text, at in came.items())
        for shown in left:
            first = texts.index(shown[0])
            assert shown == texts[first : first + len(shown)]
        assert server.metric("streams_opened_total") == CLOSED_LEADERS + 1
        assert redis_process.subscribers(channel) == 1
    assert not publisher.unsure


# ── llm_stream.py ────────────────────────────────────────────────────────────────────────────────────────────────────


def words(browser: Browser) -> list[int]:
    """The numbers of the words that the page shows."""
    return [int(number) for number in re.findall(r"word (\d+) about rivers", content(browser, "#answer"))]


def wait_for_words(browser: Browser, number: int) -> None:
    kit.wait_for(lambda: len(words(browser)) >= number, f"{number} words of the answer")


def test_an_answer_is_whole_on_two_devices_though_it_was_reloaded_and_the_server_killed_in_the_middle(
    tab: WebDriver, second_browser: Firefox, start: kit.Start, tmp_path: Path
) -> None:
    server = start("--retry", "100", SSEPUSH_HISTORY="5000")
    environment = {"STREAM_URL": f"{server.url}/stream", "REDIS_URL": server.redis.url, "SSEPUSH_HISTORY": "5000"}
    with running_app("llm_stream.py", tmp_path, kit.free_port(), WORDS_PER_S="75", **environment) as url:
        tab.get(url)
        question = tab.find_element("name", "question")
        question.clear()
        question.send_keys("rivers\n")
        wait_for_words(tab, 20)

        tab.refresh()
        wait_for_words(tab, 50)
        second_browser.get(tab.current_url)
        wait_for_words(second_browser, 100)
        server.kill()
        assert content(tab, "#state") == content(second_browser, "#state") == "is being made …"
        start("--retry", "100", port=server.port, SSEPUSH_HISTORY="5000")

        wait_for_content(tab, "#state", "complete")
        wait_for_content(second_browser, "#state", "complete")
        assert words(tab) == list(range(1, 301))
        assert content(tab, "#answer") == content(second_browser, "#answer")
        tab.refresh()
        wait_for_content(tab, "#state", "complete")
        assert words(tab) == list(range(1, 301))
