"""Tokens that expire while pages listen, in a browser: nothing is lost, nothing is doubled, and logout is final."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import ssepush
from tests import kit
from tests.browser import Browser, Firefox, Site
from tests.kit import RedisProcess, ServerProcess, Start, wait_for
from tests.test_examples import items, running_app

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

SECRET = "only the application and ssepush know this"
TTL_S = 3
RENEWALS = 10  # of each page
EVENTS_PER_S = 20
LOG_IN = """
  const request = new XMLHttpRequest();
  request.open("POST", "/login", false);
  request.send(new URLSearchParams({ user: arguments[0] }));
"""
RENEW = "fetch('/renew', { method: 'POST' })"  # whatever the user does in the application

# What all pages of the tests' own do with what comes.
SHOW = """<!doctype html><ol></ol><script>
  const show = (source) => {
    const add = (text) => {
      document.querySelector("ol").append(Object.assign(document.createElement("li"), { textContent: text }));
    };
    source.addEventListener("note", (event) => add(event.data));
    source.addEventListener("stream-reset", (event) => add(`reset: ${event.data}`));
  };
"""

# A page whose token is part of the URL; /token gives a new one to whoever has logged in.
TOKEN_IN_URL = """
  const listen = (token, lastEventId) => {
    const query = new URLSearchParams({ channel: "CHANNEL", token, lastEventId });
    const source = new EventSource(`STREAM?${query}`);
    show(source);
    source.addEventListener("token-expired", async (event) => {
      source.close();
      const answer = await fetch("/token");
      listen(await answer.text(), event.lastEventId);
    });
  };
  const asked = new URLSearchParams(location.search);
  listen(asked.get("token"), asked.get("position") ?? "");
</script>"""

# A page that does nothing about tokens: the browser comes back by itself, with the cookie as it is then.
NOTHING_BUT_COOKIE = """
  show(new EventSource("STREAM?channel=CHANNEL", { withCredentials: true }));
</script>"""


class Deployment:
    """The server, the Flask application of the examples before it, and a site with two pages of the tests' own."""

    def __init__(self, server: ServerProcess, app: str, site: Site, channel: str) -> None:
        self.server = server
        self.app = app
        self.site = site
        self.channel = channel
        self.user = channel.removeprefix("private-")

    def log_in(self, tab: WebDriver) -> None:
        tab.get(self.app)
        tab.find_element("name", "user").send_keys(f"{self.user}\n")
        wait_for(lambda: "notes" in tab.title, "logged in")

    def pages(self) -> dict[str, str]:
        """The URLs of the three pages; whoever opens the first two has to be logged in."""
        return {
            "cookie, renewed by the page": self.app,
            "cookie, a page that does nothing": f"{self.site.url}/cookie",
            "token in the URL": f"{self.site.url}/url?token={self.token()}",
        }

    def token(self, ttl: int = TTL_S) -> str:
        return ssepush.sign(self.channel, ttl=ttl, secret=SECRET)

    def publish(self, text: str) -> None:
        self.server.publish(text, self.channel, type="note")


@pytest.fixture
def deployment(start: Start, channel: str, tmp_path: Path) -> Iterator[Deployment]:
    """Everything that a page with tokens needs, on origins of its own."""
    private = f"private-{channel}"

    def page(text: str) -> str:  # asked for after the server has started
        return (SHOW + text).replace("STREAM", f"{server.url}/stream").replace("CHANNEL", private)

    pages = {
        "/token": lambda: ssepush.sign(private, ttl=TTL_S, secret=SECRET),
        "/url": lambda: page(TOKEN_IN_URL),
        "/cookie": lambda: page(NOTHING_BUT_COOKIE),
    }
    port = kit.free_port()
    with Site(pages) as site:
        origins = ["--allow-origin", f"http://{kit.LOOPBACK}:{port}", "--allow-origin", site.url]
        server = start("--retry", "400", *origins, SSEPUSH_SECRET=SECRET)
        environment = {
            "STREAM_URL": f"{server.url}/stream",
            "REDIS_URL": server.redis.url,
            "SSEPUSH_SECRET": SECRET,
            "TOKEN_TTL_S": str(TTL_S),
        }
        with running_app("flask_app.py", tmp_path, port, **environment) as app:
            yield Deployment(server, app, site, private)


@pytest.fixture
def tabs(tab: WebDriver) -> Iterator[Any]:
    """Opens pages, each in a tab of its own; answers the tab's handle."""
    first = tab.current_window_handle

    def open_page(url: str) -> str:
        tab.switch_to.new_window("tab")
        tab.get(url)
        return tab.current_window_handle

    yield open_page
    for handle in tab.window_handles:
        tab.switch_to.window(handle)
        if handle != first:
            tab.close()
    tab.switch_to.window(first)
    tab.delete_all_cookies()


@pytest.fixture
def tabs_of_firefox(second_browser: Firefox) -> Iterator[Any]:
    """The same in Firefox; the tabs are closed with the cookies of their pages' hosts."""
    marionette = second_browser.marionette
    first = marionette.current_window_handle
    opened = []

    def open_page(url: str) -> str:
        opened.append(marionette.open(type="tab", focus=True)["handle"])
        marionette.switch_to_window(opened[-1])
        second_browser.get(url)
        return str(opened[-1])

    yield open_page
    for handle in opened:
        marionette.switch_to_window(handle)
        marionette.delete_all_cookies()
        marionette.close()
    marionette.switch_to_window(first)


class Listening(NamedTuple):
    """A page that is open in a tab."""

    name: str
    browser: Browser
    come_to_front: Callable[[], None]

    def run(self, script: str) -> None:
        self.come_to_front()
        self.browser.execute_script(script)

    def items(self) -> list[str]:
        self.come_to_front()
        return items(self.browser)

    def wait_for_last(self, text: str) -> None:
        wait_for(lambda: self.items()[-1:] == [text], f"the last note: {self.name}")


@pytest.fixture
def listening(
    deployment: Deployment, tab: WebDriver, tabs: Any, second_browser: Firefox, tabs_of_firefox: Any
) -> list[Listening]:
    """All three pages in Chromium, and all three in Firefox."""
    deployment.log_in(tab)
    tabs_of_firefox(deployment.app)
    second_browser.execute_script(LOG_IN, deployment.user)
    found = []
    for name, url in deployment.pages().items():
        found.append(Listening(name, tab, functools.partial(tab.switch_to.window, tabs(url))))
    for name, url in deployment.pages().items():
        switch = functools.partial(second_browser.marionette.switch_to_window, tabs_of_firefox(url))
        found.append(Listening(f"{name}, in Firefox", second_browser, switch))
    return found


def test_nothing_is_lost_or_doubled_through_ten_renewals_in_chromium_and_in_firefox(
    deployment: Deployment, listening: list[Listening], redis_process: RedisProcess
) -> None:
    used = [page for page in listening if page.name.startswith("cookie, renewed by the page")]
    redis_process.wait_for_subscribers(deployment.channel, len(listening))
    renewals = RENEWALS * len(listening)
    events = EVENTS_PER_S * TTL_S * RENEWALS

    published: list[str] = []
    begun = time.monotonic()
    while len(published) < events or deployment.server.closed("expired") < renewals:
        assert len(published) < 2 * events, "the tokens do not expire, or are not renewed"
        if len(published) % EVENTS_PER_S == 0:
            for page in used:
                page.run(RENEW)
        published.append(f"note {len(published)}")
        deployment.publish(published[-1])
        next_at = begun + len(published) / EVENTS_PER_S
        time.sleep(max(0.0, next_at - time.monotonic()))

    for page in listening:
        page.wait_for_last(published[-1])
        assert page.items() == published, page.name


def test_a_page_that_slept_until_its_token_had_expired_renews_it_and_gets_what_it_missed(
    deployment: Deployment, tabs: Any, tab: WebDriver
) -> None:
    position = deployment.server.publish_id("before", deployment.channel)
    deployment.publish("missed")

    tabs(f"{deployment.site.url}/url?token={deployment.token(ttl=-60)}&position={position}")
    wait_for(lambda: items(tab) == ["missed"], "what was missed")
    deployment.publish("live")
    wait_for(lambda: items(tab) == ["missed", "live"], "what is live")

    assert deployment.server.refused("expired") == 1


FAIL_ONCE = """
  const { fetch } = window;
  window.fetch = () => {
    window.fetch = fetch;
    document.title += ", failed once";
    return Promise.reject(new TypeError("the network is away"));
  };
"""


def test_a_page_whose_renewal_fails_renews_when_the_browser_has_come_back(
    deployment: Deployment, tab: WebDriver
) -> None:
    deployment.log_in(tab)
    wait_for(lambda: deployment.server.streams() == 1, "the page listens")
    tab.execute_script(FAIL_ONCE)

    wait_for(lambda: "failed once" in tab.title, "the token has expired, and was not renewed")
    deployment.publish("missed")
    wait_for(lambda: items(tab) == ["missed"], "what was missed")
    deployment.publish("live")
    wait_for(lambda: items(tab) == ["missed", "live"], "what is live")


def test_whoever_has_logged_out_hears_nothing_more_once_the_token_has_expired(
    deployment: Deployment, tab: WebDriver, tabs: Any
) -> None:
    deployment.log_in(tab)
    listening = tab.current_window_handle
    wait_for(lambda: deployment.server.streams() == 1, "the page listens")
    tabs(deployment.app)
    wait_for(lambda: deployment.server.streams() == 2, "the other page listens, too")

    tab.find_element("xpath", "//button[text()='Log out']").click()
    logged_out = time.monotonic()

    tab.switch_to.window(listening)
    assert "notes" in tab.title
    wait_for(lambda: tab.title == "Log in", "the page that listened asks who is there")
    assert time.monotonic() - logged_out < TTL_S + 2
    assert deployment.server.streams() == 0
    assert tab.get_cookie("ssepush-token") is None


def test_no_script_can_read_the_token_and_notes_reach_the_one_to_whom_they_are_written_and_nobody_else(
    deployment: Deployment, tab: WebDriver, tabs: Any
) -> None:
    tabs(deployment.app)
    deployment.log_in(tab)
    cookie = tab.get_cookie("ssepush-token")
    assert cookie is not None
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Lax")
    assert "ssepush-token" not in tab.execute_script("return document.cookie")
    me = deployment.user
    wait_for(lambda: deployment.server.streams() == 1, "the page listens")

    for to, text in (("somebody else", "not for me"), (me, "<i>for me</i>")):
        tab.execute_script("document.querySelector('[name=to]').value = arguments[0]", to)
        tab.find_element("name", "text").send_keys(f"{text}\n")

    wait_for(lambda: items(tab) == [f"{me}: <i>for me</i>"], "my note, as text")
