"""In a browser: the article's page, Chromium's own EventSource, and attacks by what is published and by other pages."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ssepush
from tests import kit
from tests.kit import RedisProcess, ServerProcess, Start, both_ways, wait_for
from tests.messages import AS_PUBLISHED, NEW_ANSWERS, NO_EVENT_OBJECTS, POISON, as_read
from tests.test_examples import example_for, items, wait_for_content
from tests.test_page import MESSAGE, PLACEHOLDER, SECOND_HEARTBEATS, SHOWN_ANSWER, STRANGE, DeafProxy, OpenPage

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

# ── The article's page, however the server subscribes ────────────────────────────────────────────────────────────────


@pytest.fixture
def article(server: ServerProcess, tab: WebDriver) -> OpenPage:
    """The page, which listens to the article's channel."""
    wait_for(lambda: server.redis.subscribers("sse") == 0, "the last test's streams are gone")
    page = OpenPage(tab, server, "sse")
    page.open()
    return page


@pytest.mark.parametrize("where", ["served", "opened from disk"])
def test_redis_cli_publish_alone_changes_the_page_and_prints_the_number_of_open_streams(
    where: str, article: OpenPage
) -> None:
    server = article.server
    others = [server.stream(), server.stream("other", "sse")]
    if where == "opened from disk":
        article.open_from_disk(f"http://localhost:{server.port}")
        article.until(article.state, "open")
    assert article.text("data") == PLACEHOLDER

    command = [kit.needs("redis-cli", "valkey-cli"), "-p", str(server.redis.port), "publish", "sse", MESSAGE]
    printed = subprocess.run(command, check=True, capture_output=True).stdout
    assert int(printed) == server.subscribers_for(3)

    article.reads("data", SHOWN_ANSWER)
    assert [stream.next().json for stream in others] == [NEW_ANSWERS] * 2


def test_notifications_changes_the_page_which_can_be_loaded_again_with_the_channel_it_remembers(
    article: OpenPage,
) -> None:
    article.server.get("/notifications")

    article.reads("data", SHOWN_ANSWER)
    assert article.server.get("/?channel=a&types=b").body == article.server.get("/").body


def test_the_page_publishes_but_from_disk_it_is_refused_and_says_so(article: OpenPage) -> None:
    stream = article.server.stream()
    article.click_publish()
    assert stream.next().json == NEW_ANSWERS
    article.reads("data", SHOWN_ANSWER)
    article.mentions("answer", f"Published to {article.server.subscribers_for(2)} receiver")

    article.open_from_disk(f"http://localhost:{article.server.port}")
    article.until(article.state, "open")
    article.click_publish()
    article.mentions("answer", "refused")
    assert article.text("data") == PLACEHOLDER


def test_server_closed_closes_the_page_for_good(start: Start, tab: WebDriver, channel: str) -> None:
    page = OpenPage(tab, start("--retry", "100", "--heartbeat", "0.2"), channel)
    page.open()

    page.send("server_closed", "bye")

    page.until(page.state, "closed")
    page.until(page.streams, 0)
    other = page.server.stream(f"{channel}-2")
    other.wait(lambda: len(other.positions) >= 5, "many times the reconnection time went by")
    assert page.server.metric("streams_opened_total") == 2
    assert page.state() == "closed"


# ── Pages that notice a dead stream ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("example", ["minimal.html", "one-stream-for-all-tabs.html"])
def test_the_examples_open_a_dead_stream_anew_and_miss_nothing(
    example: str, browser: Any, start: Start, channel: str, tmp_path: Path
) -> None:
    server = start(*SECOND_HEARTBEATS)
    proxy = DeafProxy(server.port)
    page = tmp_path / example
    page.write_text(example_for(server, example, channel).replace(server.url, proxy.url))
    browser.get(page.as_uri())
    wait_for(lambda: server.streams() == 1, "the page listens")
    server.publish("before", channel)
    wait_for(lambda: items(browser) == ["before"], "the first one")

    proxy.kill_connections()
    server.publish("lost on the way", channel)

    wait_for(lambda: sorted(items(browser)) == ["before", "lost on the way"], "what was lost")
    server.publish("after", channel)
    wait_for(lambda: sorted(items(browser)) == ["after", "before", "lost on the way"], "what came later")
    if example == "minimal.html":
        server.publish("", channel, type="server_closed")
        wait_for_content(browser, "p", "closed")


# ── Chromium's own EventSource ───────────────────────────────────────────────────────────────────────────────────────

LISTEN = """
    const [channel, types, done] = arguments;
    window.events = [];
    window.source = new EventSource("/stream?channel=" + encodeURIComponent(channel));
    source.addEventListener("open", () => done());
    for (const type of types) source.addEventListener(type, (event) => {
      if (event instanceof MessageEvent) events.push([event.type, event.data, event.lastEventId]);
    });
"""
Heard = Callable[[int], list[list[str]]]


def listen(tab: WebDriver, server: ServerProcess, channel: str, types: Sequence[str] = ("message",)) -> Heard:
    """Have an EventSource on a page of the server; answers what it dispatched: so many `[type, data, lastEventId]`."""
    tab.get(f"{server.url}/healthz")
    tab.execute_async_script(LISTEN, channel, list(types))
    wait_for(lambda: server.redis.subscribers(channel), "Chromium is subscribed")

    def heard(number: int) -> list[list[str]]:
        wait_for(lambda: tab.execute_script("return events.length") >= number, f"{number} events in Chromium")
        return [list(map(str, event)) for event in tab.execute_script("return events")]

    return heard


def test_chromium_reads_data_exactly_as_published(server: ServerProcess, tab: WebDriver, channel: str) -> None:
    published = {f"type-{number}": value for number, value in enumerate(AS_PUBLISHED.values())}
    heard = listen(tab, server, channel, list(published))

    for type, value in published.items():
        server.redis.publish_event(channel, data=value, type=type)

    assert [event[:2] for event in heard(len(published))] == [[type, as_read(data)] for type, data in published.items()]


def test_chromium_hears_any_other_message_and_no_poison(server: ServerProcess, tab: WebDriver, channel: str) -> None:
    heard = listen(tab, server, channel)

    for message in (*NO_EVENT_OBJECTS.values(), *(message for message, _ in POISON.values()), b"good"):
        server.redis.publish(channel, message)

    received = [data for _, data, _ in heard(len(NO_EVENT_OBJECTS) + 1)]
    assert received == [*(data.decode() for data in NO_EVENT_OBJECTS.values()), "good"]


def test_chromium_gets_ten_thousand_messages_of_one_burst_in_order_and_complete(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    heard = listen(tab, server, channel)

    with server.redis.client.pipeline(transaction=False) as pipeline:
        for number in range(10_000):
            pipeline.publish(channel, f'{{"data": {number}}}')
        pipeline.execute()

    assert [data for _, data, _ in heard(10_000)] == [str(number) for number in range(10_000)]


@both_ways
@pytest.mark.parametrize("away", ["Redis", "the server"])
def test_chromium_comes_back_by_itself_and_gets_what_it_missed_while_one_was_away(
    away: str, own_redis: RedisProcess, start: Start, tab: WebDriver, channel: str
) -> None:
    server = start("--retry", "100", redis=own_redis)
    heard = listen(tab, server, channel)
    published = [["message", "first", server.publish_id("first", channel)]]
    assert heard(1) == published

    if away == "Redis":
        own_redis.kill()
        wait_for(lambda: server.refused("redis-away") >= 3, "Chromium tries again")
        own_redis.start()
    else:
        assert server.terminate() == 0
    for text in ("missed 1", "missed 2"):
        missed = ssepush.publish(text, None, channel, redis_url=own_redis.url)
        published.append(["message", text, str(missed.id)])
    if away == "the server":
        server = start("--retry", "100", port=server.port, redis=own_redis)
    wait_for(lambda: own_redis.subscribers(channel), "Chromium is subscribed again")
    published.append(["message", "after", server.publish_id("after", channel)])

    assert heard(4) == published


# ── Attacks ──────────────────────────────────────────────────────────────────────────────────────────────────────────

MARKUP = "<img/src=x/onerror=window.__pwned=1><script>window.__pwned=1</script>"
CLEAN = "undefined,0"


@pytest.fixture
def attacked(chromium: Any, server: ServerProcess, channel: str) -> Iterator[OpenPage]:
    """The page, which closes its stream afterwards: Chromium keeps those of pages that one might go back to."""
    yield OpenPage(chromium, server, channel)
    chromium.execute_script("document.getElementById('close')?.click()")


SHOWN: dict[str, tuple[Any, str, str]] = {
    "data": ({"data": MARKUP, "type": "new_answers"}, "log", MARKUP),
    "the question": (
        {"data": {"question": MARKUP, "value": f"<b>{MARKUP}"}, "type": "new_answers"},
        "data",
        f"{MARKUP} : <b>{MARKUP}",
    ),
    "data that is not JSON": (MARKUP, "log", MARKUP),
    "type": ({"data": "x", "type": MARKUP}, "log", MARKUP),
    "type that the wire teaches": ({"data": "x", "type": f"{MARKUP}2"}, "filter", f"{MARKUP}2"),
    "id": ({"data": "x", "id": MARKUP}, "log", MARKUP),
    "lines that look like fields": ({"data": f"a\n\nevent: {MARKUP}\ndata: b"}, "log", f"event: {MARKUP}"),
    "the reason of a reset": ({"data": {"reason": MARKUP}, "type": "stream-reset"}, "reset", MARKUP),
    "the last word": ({"data": MARKUP, "type": "server_closed"}, "detail", MARKUP),
}


@pytest.mark.parametrize(("message", "id_", "text"), SHOWN.values(), ids=list(SHOWN))
def test_whatever_is_published_the_page_shows_text(message: Any, id_: str, text: str, attacked: OpenPage) -> None:
    attacked.open(MARKUP)
    attacked.click("#show-wire")
    wait_for(attacked.wire, "the wire is read")

    attacked.server.redis.publish(attacked.channel, message if isinstance(message, str) else json.dumps(message))

    attacked.mentions(id_, text)
    assert attacked.run(STRANGE) == CLEAN


def test_channels_and_error_messages_show_as_text(attacked: OpenPage) -> None:
    attacked.open(channel=MARKUP)
    attacked.server.publish("x", MARKUP)
    attacked.until(attacked.rows, ["x"])
    assert attacked.value("channel") == MARKUP
    assert attacked.run(STRANGE) == CLEAN

    attacked.enter("channel", f"private-{MARKUP}")
    attacked.mentions("state", f"private-{MARKUP}")
    attacked.enter("publish-channel", MARKUP * 3)
    attacked.click_publish()
    attacked.mentions("answer", "channel must")
    assert attacked.attribute("answer", "data-kind") == "error"
    assert attacked.run(STRANGE) == CLEAN


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


def test_the_page_runs_no_script_but_its_own_and_cannot_be_framed(attacked: OpenPage) -> None:
    headers = attacked.server.get("/").headers
    attacked.open()

    attacked.run(BREAK_THE_POLICY)

    wanted = {"script-src-elem", "script-src-attr", "img-src", "style-src-attr", "connect-src", "frame-src"}
    wait_for(lambda: wanted <= set(attacked.run("return window.violations")), "all of it is refused")
    assert attacked.run("return typeof window.__pwned") == "undefined"
    for directive in ("frame-ancestors 'none'", "form-action 'none'"):
        assert directive in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


PUBLISH_FROM_ELSEWHERE = """
    const [url, channel, done] = arguments;
    const event = JSON.stringify({data: "attack", channel});
    const json = {method: "POST", headers: {"Content-Type": "application/json"}, body: event};
    const loaded = (made, tag, members) => Object.assign(document.createElement(tag), {onload: made, ...members});
    const tries = [
      fetch(url + "/publish", json), fetch(url + "/publish", {...json, mode: "no-cors"}),
      fetch(url + "/publish", {method: "POST", mode: "no-cors", body: event}),
      fetch(url + "/notifications"), fetch(url + "/notifications", {mode: "no-cors"}),
      new Promise((made) => loaded(made, "img", {onerror: made, src: url + "/notifications"})),
      new Promise((made) => {
        const frame = loaded(made, "iframe", {name: "frame"}), form = document.createElement("form");
        Object.assign(form, {method: "post", enctype: "text/plain", action: url + "/publish", target: "frame"});
        const members = {name: '{"data": "attack", "a": "', value: '"}'};
        form.append(Object.assign(document.createElement("input"), members));
        document.body.append(frame, form);
        form.submit();
      }),
      Promise.resolve(navigator.sendBeacon(url + "/publish", new Blob([event], {type: "text/plain"}))),
    ];
    Promise.allSettled(tries).then(() => fetch(url + `/stream?channel=${channel}`)).then((r) => done(r.status));
"""


def test_a_page_of_another_site_can_read_but_not_publish(attacked: OpenPage, start: Start) -> None:
    server, channel = attacked.server, attacked.channel
    with server.stream(channel, "sse") as stream:
        attacked.tab.get(f"{start().url}/healthz")

        status = attacked.tab.execute_async_script(PUBLISH_FROM_ELSEWHERE, f"http://localhost:{server.port}", channel)

        assert status == 200
        server.redis.publish(channel, "sentinel")
        assert stream.next().data == "sentinel"
