"""In a browser: the article's page, Chromium's own EventSource, and pages of other sites."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests import kit
from tests.browser import Site
from tests.kit import ServerProcess, Start, wait_for
from tests.messages import AS_PUBLISHED, NEW_ANSWERS, NO_EVENT_OBJECTS, POISON, as_read
from tests.test_page import MESSAGE, PLACEHOLDER, SHOWN_ANSWER, OpenPage

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver


@pytest.mark.parametrize("where", ["served", "opened from disk"])
def test_redis_cli_publish_alone_changes_the_articles_page(where: str, server: ServerProcess, tab: WebDriver) -> None:
    wait_for(lambda: server.redis.subscribers("sse") == 0, "the last test's streams are gone")
    page = OpenPage(tab, server, "sse")
    others = [server.stream(), server.stream("other", "sse")]
    if where == "served":
        page.open()
    else:
        page.open_from_disk(f"http://localhost:{server.port}")
        page.until(page.state, "open")
    assert page.text("data") == PLACEHOLDER

    command = [kit.needs("redis-cli", "valkey-cli"), "-p", str(server.redis.port), "publish", "sse", MESSAGE]
    printed = subprocess.run(command, check=True, capture_output=True).stdout
    assert int(printed) == server.subscribers_for(3)
    page.reads("data", SHOWN_ANSWER)
    assert [stream.next().json for stream in others] == [NEW_ANSWERS] * 2

    page.run("showAnswer('', '')")
    page.click("#publish .main")
    if where == "served":
        page.mentions("answer", f"Published to {server.subscribers_for(3)} receiver")
        page.reads("data", SHOWN_ANSWER)
    else:
        page.mentions("answer", "refused")
        server.get("/notifications")
        page.reads("data", SHOWN_ANSWER)


LISTEN = """
    const [channel, types, done] = arguments;
    window.events = [];
    const source = new EventSource("/stream?channel=" + encodeURIComponent(channel));
    source.addEventListener("stream-position", () => done());
    for (const type of types) source.addEventListener(type, (event) => events.push([event.type, event.data]));
"""


def test_chromium_reads_whatever_is_published_exactly_and_in_order(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    tab.get(f"{server.url}/healthz")
    values = {f"type-{number}": value for number, value in enumerate(AS_PUBLISHED.values())}
    tab.execute_async_script(LISTEN, channel, ["message", *values])

    for type, value in values.items():
        server.redis.publish_event(channel, data=value, type=type)
    for message in (*NO_EVENT_OBJECTS.values(), *(message for message, _ in POISON.values())):
        server.redis.publish(channel, message)
    many = kit.numbers(0, 10_000)
    server.redis.publish_all(channel, many)

    published = [[type, as_read(value)] for type, value in values.items()]
    published += [["message", data.decode()] for data in NO_EVENT_OBJECTS.values()]
    published += [["message", data] for data in many]
    wait_for(lambda: tab.execute_script("return events.length") >= len(published), "all events")
    assert tab.execute_script("return events") == published


PUBLISH_FROM_ELSEWHERE = """
    const [url, channel, done] = arguments;
    const event = JSON.stringify({data: "from elsewhere", channel});
    const json = {method: "POST", headers: {"Content-Type": "application/json"}, body: event};
    const loaded = (made, tag, members) => Object.assign(document.createElement(tag), {onload: made, ...members});
    const tries = [
      fetch(url + "/publish", json), fetch(url + "/publish", {...json, mode: "no-cors"}),
      fetch(url + "/publish", {method: "POST", mode: "no-cors", body: event}),
      fetch(url + "/notifications", {mode: "no-cors"}),
      new Promise((made) => loaded(made, "img", {onerror: made, src: url + "/notifications"})),
      new Promise((made) => {
        const frame = loaded(made, "iframe", {name: "frame"}), form = document.createElement("form");
        Object.assign(form, {method: "post", enctype: "text/plain", action: url + "/publish", target: "frame"});
        const members = {name: '{"data": "from elsewhere", "a": "', value: '"}'};
        form.append(Object.assign(document.createElement("input"), members));
        document.body.append(frame, form);
        form.submit();
      }),
      Promise.resolve(navigator.sendBeacon(url + "/publish", new Blob([event], {type: "text/plain"}))),
    ];
    Promise.allSettled(tries).then(() => fetch(url + `/stream?channel=${channel}`)).then((r) => done(r.status));
"""


@pytest.mark.parametrize("is_allowed", [False, True], ids=["by default", "allowed"])
def test_a_page_of_another_site_can_read_but_publish_only_if_it_is_allowed_to(
    is_allowed: bool, start: Start, tab: WebDriver, channel: str
) -> None:
    with Site({"/": lambda: "another site"}) as site:
        server = start("--allow-origin", site.url) if is_allowed else start()
        stream = server.opened(channel)
        tab.get(site.url)

        status = tab.execute_async_script(PUBLISH_FROM_ELSEWHERE, f"http://localhost:{server.port}", channel)

    assert status == 200
    server.redis.publish(channel, "the last one")
    expected = ["from elsewhere", "the last one"] if is_allowed else ["the last one"]
    assert stream.data(len(expected)) == expected
