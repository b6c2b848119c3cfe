"""Tokens that expire while pages listen, in a browser: nothing is lost, nothing is doubled, and logout is final."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import ssepush
from tests import kit
from tests.browser import Firefox, Site
from tests.kit import RedisProcess, ServerProcess, Start, wait_for
from tests.test_examples import ITEMS, Tab, items, running_app, tabs_of

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

SECRET = "only the application and ssepush know this"
TTL_S = 3
RENEWALS = 5  # of each page
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


class Deployment(NamedTuple):
    """The server, the Flask application of the examples before it, and a site with two pages of the tests' own."""

    server: ServerProcess
    app: str
    site: str
    channel: str

    @property
    def user(self) -> str:
        return self.channel.removeprefix("private-")

    def log_in(self, tab: WebDriver) -> None:
        """As a person does; then the page listens."""
        tab.get(self.app)
        tab.find_element("name", "user").send_keys(f"{self.user}\n")
        wait_for(lambda: "notes" in tab.title, "logged in")
        wait_for(lambda: self.server.streams() == 1, "the page listens")

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
            yield Deployment(server, app, site.url, private)


@pytest.fixture
def tabs(tab: WebDriver) -> Iterator[list[Tab]]:
    """For the tabs that a test opens in Chromium, which afterwards has forgotten who was logged in."""
    with tabs_of(tab) as opened:
        yield opened
    tab.delete_all_cookies()


def test_nothing_is_lost_or_doubled_through_several_renewals_in_chromium_and_in_firefox(
    deployment: Deployment, tab: WebDriver, tabs: list[Tab], second_browser: Firefox, redis_process: RedisProcess
) -> None:
    deployment.log_in(tab)
    tab.get(f"{deployment.site}/token")  # a page that does not listen
    slept = f"token={deployment.token(ttl=-60)}&position={deployment.server.publish_id('seen', deployment.channel)}"
    deployment.publish("missed")
    with tabs_of(second_browser) as tabs_of_firefox:
        tabs_of_firefox.append(Tab(second_browser, deployment.app))
        tabs_of_firefox[0].run(LOG_IN, deployment.user)
        urls = {
            "cookie, renewed by the page": deployment.app,
            "cookie, a page that does nothing": f"{deployment.site}/cookie",
            "token in the URL, expired while the page slept": f"{deployment.site}/url?{slept}",
        }
        listening = {}
        for name, url in urls.items():
            listening[name] = Tab(tab, url)
            listening[f"{name}, in Firefox"] = Tab(second_browser, url)
        tabs += [page for page in listening.values() if page.browser is tab]
        tabs_of_firefox += [page for page in listening.values() if page.browser is second_browser]
        used = [page for name, page in listening.items() if "renewed" in name]
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

        for name, page in listening.items():
            wait_for(lambda: page.run(ITEMS)[-1:] == published[-1:], f"the last note: {name}")  # noqa: B023
            missed = ["missed"] if "slept" in name else []
            assert page.run(ITEMS) == missed + published, name
        assert deployment.server.refused("expired") == 2


FAIL_ONCE = """
  const { fetch } = window;
  window.fetch = () => {
    window.fetch = fetch;
    document.title += ", failed once";
    return Promise.reject(new TypeError("the network is away"));
  };
"""


def test_notes_reach_only_whom_they_are_for_even_if_a_renewal_fails_and_nobody_who_has_logged_out(
    deployment: Deployment, tab: WebDriver, tabs: list[Tab]
) -> None:
    deployment.log_in(tab)
    listening = Tab(tab)
    cookie = tab.get_cookie("ssepush-token")
    assert cookie is not None
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Lax")
    assert "ssepush-token" not in tab.execute_script("return document.cookie")

    me = deployment.user
    for to, text in (("somebody else", "not for me"), (me, "<i>for me</i>")):
        tab.execute_script("document.querySelector('[name=to]').value = arguments[0]", to)
        tab.find_element("name", "text").send_keys(f"{text}\n")
    wait_for(lambda: items(tab) == [f"{me}: <i>for me</i>"], "my note, as text")

    tab.execute_script(FAIL_ONCE)
    wait_for(lambda: "failed once" in tab.title, "the token has expired, and was not renewed")
    deployment.publish("missed")
    wait_for(lambda: items(tab)[1:] == ["missed"], "what was missed, once the browser has come back")

    tabs.append(Tab(tab, deployment.app))
    wait_for(lambda: deployment.server.streams() == 2, "the other page listens, too")
    tab.find_element("xpath", "//button[text()='Log out']").click()
    logged_out = time.monotonic()

    listening.come_to_front()
    assert "notes" in tab.title
    wait_for(lambda: tab.title == "Log in", "the page that listened asks who is there")
    assert time.monotonic() - logged_out < TTL_S + 2
    assert deployment.server.streams() == 0
    assert tab.get_cookie("ssepush-token") is None
