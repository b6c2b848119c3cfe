"""The examples, each run as its reader would run it, in real browsers."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import kit
from tests.browser import Browser, Firefox, Site

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

EXAMPLES = kit.HERE / "examples"


def example_for(server: kit.ServerProcess, name: str, channel: str) -> str:
    """An example's text, with this server and channel instead of those that it names."""
    text = (EXAMPLES / name).read_text()
    documented = "http://127.0.0.1:5000/stream?channel=sse"
    assert documented in text
    return text.replace(documented, f"{server.url}/stream?channel={channel}")


def items(browser: Browser) -> list[str]:
    """What stands in the page's list."""
    return list(browser.execute_script("return [...document.querySelectorAll('li')].map((item) => item.textContent)"))


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


# ── minimal.html ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_minimal_page_opened_from_disk_shows_what_comes_and_what_it_missed(
    browser: Any,
    start: kit.Start,
    redis_process: kit.RedisProcess,
    channel: str,
    tmp_path: Path,
) -> None:
    server = start("--retry", "100")
    page = tmp_path / "minimal.html"
    page.write_text(example_for(server, "minimal.html", channel))
    assert len(page.read_text().splitlines()) <= 31
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
    kit.wait_for(lambda: items(browser) == [], "the page was loaded anew")
    wait_for_content(browser, "p", "open")

    back.publish("", channel, type="server_closed")
    wait_for_content(browser, "p", "closed")
    redis_process.wait_for_subscribers(channel, 0)


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


class Tabs:
    """The tabs of one browser that all show the same page."""

    def __init__(self, driver: WebDriver, url: str) -> None:
        self._driver = driver
        self._url = url
        self.handles: list[str] = []

    def open(self) -> str:
        """One more; its handle."""
        self._driver.switch_to.new_window("tab")
        self._driver.get(self._url)
        self._driver.execute_script(MARK_ARRIVALS)
        self.handles.append(str(self._driver.current_window_handle))
        return self.handles[-1]

    def in_tab(self, handle: str, script: str) -> Any:
        """What a script answers there."""
        self._driver.switch_to.window(handle)
        return self._driver.execute_script(script)

    def leader(self) -> str:
        """The handle of the one tab that holds the stream."""
        found = kit.wait_for(lambda: [handle for handle in self.handles if self.in_tab(handle, LEADS)], "a tab leads")
        assert len(found) == 1
        return str(found[0])

    def arrivals(self, handle: str) -> dict[str, float]:
        """The events in a tab, in order, and when each came (Unix time, ms; 0: before that was noted)."""
        arrivals = self.in_tab(handle, ARRIVALS)
        assert len({text for text, _ in arrivals}) == len(arrivals)
        return dict(arrivals)

    def close(self, handle: str) -> None:
        self._driver.switch_to.window(handle)
        self._driver.close()
        self.handles.remove(handle)
        self._driver.switch_to.window(self.handles[0])


@pytest.fixture
def tabs_of(chromium: WebDriver) -> Iterator[Callable[[str], Tabs]]:
    """Opens tabs in Chromium; at the end the one is left that was there before."""
    first = chromium.current_window_handle
    yield lambda url: Tabs(chromium, url)
    for handle in chromium.window_handles:
        if handle != first:
            chromium.switch_to.window(handle)
            chromium.close()
    chromium.switch_to.window(first)


@pytest.mark.alone
def test_eight_tabs_share_one_stream_and_each_gets_each_event_once_in_order_while_leaders_are_closed(
    tabs_of: Callable[[str], Tabs], start: kit.Start, redis_process: kit.RedisProcess, channel: str
) -> None:
    server = start("--history", str(EVENTS))
    page = example_for(server, "one-stream-for-all-tabs.html", channel)
    with Site({"/": lambda: page}) as site:
        tabs = tabs_of(site.url)
        for _ in range(TABS):
            tabs.open()
        kit.wait_for(lambda: server.streams() == 1, "the leader's stream is open")
        publisher = kit.Publisher(server.port, "event", channel, pause=0.008)

        joined = ""
        left: list[list[str]] = []
        for moment in sorted(random.sample(range(EVENTS // 10, EVENTS), CLOSED_LEADERS)):
            kit.wait_for(lambda: len(publisher.acknowledged) >= moment, f"{moment} events")  # noqa: B023
            leader = tabs.leader()
            redis_process.wait_for_subscribers(channel, 1)
            left.append(list(tabs.arrivals(leader)))
            tabs.close(leader)
            if len(left) == CLOSED_LEADERS // 2:
                redis_process.wait_for_subscribers(channel, 1)  # the next one has taken over
                joined = tabs.open()
        kit.wait_for(lambda: len(publisher.acknowledged) >= EVENTS, "all events")
        publisher.stop()

        published_at = {text: place_us / 1000 for place_us, _, text in publisher.acknowledged}
        texts = list(published_at)
        for handle in tabs.handles:
            kit.wait_for(lambda: texts[-1] in tabs.arrivals(handle), "the tab has the last event")  # noqa: B023
            arrivals = tabs.arrivals(handle)
            assert list(arrivals) == (texts[-len(arrivals) :] if handle == joined else texts)
            assert all(at - published_at[text] < TAKEOVER_MS for text, at in arrivals.items())
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
