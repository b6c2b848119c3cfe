"""In a browser: the article's page, Chromium's own EventSource, and attacks by what is published and by other pages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

import ssepush
from tests.browser import state_of, text_of
from tests.kit import HERE, RedisProcess, ServerProcess, Start, both_ways, wait_for
from tests.messages import AS_PUBLISHED, NEW_ANSWERS, NO_EVENT_OBJECTS, POISON, publish_all

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver


def listen(
    tab: WebDriver,
    server: ServerProcess,
    channel: str,
    types: Sequence[str] = ("message",),
) -> None:
    """Open an EventSource on a page of the server, and keep what it dispatches in `events`."""
    script = """
        const [channel, types, done] = arguments;
        window.events = [];
        window.opened = 0;
        window.source = new EventSource("/stream?channel=" + encodeURIComponent(channel));
        source.addEventListener("open", () => { opened += 1; done(); });
        for (const type of types) source.addEventListener(type, (event) => {
          if (event instanceof MessageEvent) events.push([event.type, event.data, event.lastEventId]);
        });
    """
    tab.get(f"{server.url}/healthz")
    tab.execute_async_script(script, channel, list(types))


def heard(
    tab: WebDriver,
    number: int,
) -> list[list[str]]:
    """The first events, as many, as Chromium dispatched them: `[[type, data, lastEventId], …]`."""

    def enough() -> bool:
        return bool(tab.execute_script("return events.length >= arguments[0]", number))

    wait_for(enough, f"{number} events in Chromium")
    return [list(map(str, event)) for event in tab.execute_script("return events")]


MESSAGE = json.dumps({"data": NEW_ANSWERS, "type": "new_answers"})


CHANGED = "which programming is the best? : Absolutely, PHP"


@pytest.mark.parametrize("where", ["served", "opened from disk"])
def test_redis_cli_publish_alone_changes_the_page_and_prints_the_number_of_open_streams(
    where: str, server: ServerProcess, tab: WebDriver
) -> None:
    wait_for(lambda: server.redis.subscribers("sse") == 0, "the last test's streams are gone")
    from_disk = f"{(HERE / 'index.html').as_uri()}?server=http://localhost:{server.port}"
    others = [
        server.stream(),
        server.stream("other", "sse"),
    ]
    tab.get(f"{server.url}/" if where == "served" else from_disk)
    assert text_of(tab, "data") == "received pushed data"
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    printed = server.redis.cli_publish("sse", MESSAGE)

    assert printed == server.subscribers_for(3)
    wait_for(lambda: text_of(tab, "data") == CHANGED, "the page changed")
    assert [stream.next().json for stream in others] == [NEW_ANSWERS] * 2


def test_notifications_changes_the_page(server: ServerProcess, tab: WebDriver) -> None:
    tab.get(f"{server.url}/")
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    server.get("/notifications")

    wait_for(lambda: text_of(tab, "data") == CHANGED, "the page changed")


def test_the_page_can_be_loaded_again_after_it_has_remembered_its_channel(server: ServerProcess) -> None:
    assert server.get("/?channel=a&types=b").body == server.get("/").body


def test_the_page_shows_named_events_each_in_its_own_place(server: ServerProcess, tab: WebDriver) -> None:
    tab.get(f"{server.url}/")
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    server.redis.publish("sse", '{"data": "which one?", "type": "new_question"}')
    server.redis.publish("sse", '{"data": "<b>this one</b>", "type": "new_answer"}')

    wait_for(lambda: "<b>this one</b>" in text_of(tab, "log"), "the log shows it, as text")
    assert "which one?" in text_of(tab, "log")
    assert text_of(tab, "data") == "received pushed data"


def test_the_page_publishes(server: ServerProcess, tab: WebDriver) -> None:
    wait_for(lambda: server.redis.subscribers("sse") == 0, "the last test's streams are gone")
    stream = server.stream()
    tab.get(f"{server.url}/")
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    tab.execute_script("document.getElementById('publish').requestSubmit()")

    assert stream.next().json == NEW_ANSWERS
    wait_for(lambda: text_of(tab, "data") == CHANGED, "the page changed")
    receivers = server.subscribers_for(2)
    wait_for(lambda: f"Published to {receivers} receiver" in text_of(tab, "answer"), "the page says so")


def test_the_page_opened_from_disk_says_that_publishing_is_refused(server: ServerProcess, tab: WebDriver) -> None:
    tab.get(f"{(HERE / 'index.html').as_uri()}?server=http://localhost:{server.port}")
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    tab.execute_script("document.getElementById('publish').requestSubmit()")

    wait_for(lambda: "refused" in text_of(tab, "answer"), "the page says why")
    assert text_of(tab, "data") == "received pushed data"


def test_server_closed_closes_the_page_for_good(
    start: Start,
    tab: WebDriver,
    channel: str,
) -> None:
    server = start("--retry", "100", "--heartbeat", "0.2")
    tab.get(f"{server.url}/")
    wait_for(lambda: state_of(tab) == "open", "the page is open")

    server.redis.publish("sse", '{"data": "bye", "type": "server_closed"}')

    wait_for(lambda: state_of(tab) == "closed", "the page is closed")
    wait_for(lambda: server.redis.subscribers("sse") == 0, "its subscriber is gone")
    other = server.stream(f"{channel}-2")
    other.wait(lambda: len(other.positions) >= 5, "many times the reconnection time went by")
    assert server.metric("streams_opened_total") == 2
    assert state_of(tab) == "closed"


def test_chromium_reads_data_exactly_as_published(
    server: ServerProcess,
    tab: WebDriver,
    channel: str,
) -> None:
    listen(
        tab,
        server,
        channel,
        [*(f"type-{at}" for at in range(len(AS_PUBLISHED))), "end"],
    )
    wait_for(lambda: server.redis.subscribers(channel), "Chromium is subscribed")

    published = publish_all(server.redis, channel)

    received = heard(tab, len(published))
    assert [event[:2] for event in received] == published


def test_chromium_hears_any_other_message_and_no_poison(
    server: ServerProcess,
    tab: WebDriver,
    channel: str,
) -> None:
    listen(tab, server, channel)
    wait_for(lambda: server.redis.subscribers(channel), "Chromium is subscribed")

    for message in (*NO_EVENT_OBJECTS.values(), *(message for message, _ in POISON.values()), b"good"):
        server.redis.publish(channel, message)

    received = heard(tab, len(NO_EVENT_OBJECTS) + 1)
    assert [data for _, data, _ in received] == [*(data.decode() for data in NO_EVENT_OBJECTS.values()), "good"]


def test_chromium_gets_ten_thousand_messages_of_one_burst_in_order_and_complete(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    listen(tab, server, channel)
    wait_for(lambda: server.redis.subscribers(channel), "Chromium is subscribed")

    with server.redis.client.pipeline(transaction=False) as pipeline:
        for number in range(10_000):
            pipeline.publish(channel, f'{{"data": {number}}}')
        pipeline.execute()

    assert [data for _, data, _ in heard(tab, 10_000)] == [str(number) for number in range(10_000)]


@both_ways
def test_chromium_comes_back_by_itself_after_redis_was_killed_and_started_again(
    own_redis: RedisProcess, start: Start, tab: WebDriver, channel: str
) -> None:
    server = start("--retry", "100", redis=own_redis)
    listen(tab, server, channel)
    first = server.publish("first", channel)
    assert heard(tab, 1) == [["message", "first", first["id"]]]

    own_redis.kill()
    wait_for(lambda: server.refused("redis-away") >= 3, "Chromium tries again")
    own_redis.start()
    missed = ssepush.publish(
        "while away",
        None,
        channel,
        redis_url=own_redis.url,
    )
    wait_for(lambda: own_redis.subscribers(channel), "Chromium is subscribed again")
    second = server.publish("second", channel)

    assert heard(tab, 3) == [
        ["message", "first", first["id"]],
        ["message", "while away", missed.id],
        ["message", "second", second["id"]],
    ]


@both_ways
def test_chromium_comes_back_after_a_restart_and_gets_what_it_missed(
    start: Start, tab: WebDriver, channel: str
) -> None:
    server = start("--retry", "100")
    listen(tab, server, channel)
    ids: list[str | None] = [server.publish_id("before", channel)]
    heard(tab, 1)
    assert server.terminate() == 0

    ids += [ssepush.publish(f"missed {n}", None, channel, redis_url=server.redis.url).id for n in range(3)]
    again = start("--retry", "100", port=server.port)
    wait_for(lambda: server.redis.subscribers(channel), "Chromium is subscribed again")
    ids.append(again.publish("after", channel)["id"])

    texts = ["before", "missed 0", "missed 1", "missed 2", "after"]
    assert heard(tab, 5) == [["message", text, id_] for text, id_ in zip(texts, ids, strict=True)]


# ── Attacks ──────────────────────────────────────────────────────────────────────────────────────────────────────────


MARKUP = "<img/src=x/onerror=window.__pwned=1><script>window.__pwned=1</script>"


@pytest.fixture
def leaving(chromium: Any) -> Iterator[Any]:
    """Chromium, which closes its stream afterwards: it keeps those of pages that one might go back to."""
    yield chromium
    chromium.execute_script("document.getElementById('close')?.click()")


class ChromiumPage:
    """The page in Chromium."""

    def __init__(
        self,
        driver: Any,
        server: ServerProcess,
        channel: str = "sse",
        types: str = "",
    ) -> None:
        self.driver = driver
        driver.get(f"{server.url}/")
        assert driver.title == "ssepush", driver.page_source
        self.type("types", types)
        self.type("channel", channel)

    def type(self, id: str, text: str) -> None:
        """Have this text in an input."""
        script = "const [id, text] = arguments, input = document.getElementById(id); input.value = text;"
        self.run(script + "input.dispatchEvent(new Event('change'))", id, text)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, id: str) -> str:
        """What a person reads there."""
        return str(self.run("return document.getElementById(arguments[0]).textContent", id))

    def wait(self, id: str, text: str) -> None:
        wait_for(lambda: text in self.text(id), f"{text!r} in #{id}, which holds {self.text(id)[:500]!r}")

    def is_open(self) -> None:
        wait_for(lambda: self.run("return document.getElementById('state').dataset.state") == "open", "it listens")

    def is_clean(self) -> bool:
        """Nothing that was shown became an element or ran."""
        script = (
            "return [typeof window.__pwned,"
            " document.querySelectorAll('img:not(#logo), body script:not(:last-of-type), b').length]"
        )
        return bool(self.run(script) == ["undefined", 0])


SHOWN: dict[str, tuple[bytes, str, str]] = {
    "data": (json.dumps({"data": MARKUP, "type": "new_answers"}).encode(), "log", MARKUP),
    "the question": (
        json.dumps({"data": {"question": MARKUP, "value": f"<b>{MARKUP}"}, "type": "new_answers"}).encode(),
        "data",
        f"{MARKUP} : <b>{MARKUP}",
    ),
    "data that is not JSON": (MARKUP.encode(), "log", MARKUP),
    "type": (json.dumps({"data": "x", "type": MARKUP}).encode(), "log", MARKUP),
    "id": (json.dumps({"data": "x", "id": MARKUP}).encode(), "log", MARKUP),
    "lines that look like fields": (
        json.dumps({"data": f"a\n\nevent: {MARKUP}\ndata: b"}).encode(),
        "log",
        f"event: {MARKUP}",
    ),
    "the reason of a reset": (
        json.dumps({"data": {"reason": MARKUP}, "type": "stream-reset"}).encode(),
        "reset",
        MARKUP,
    ),
    "the last word": (json.dumps({"data": MARKUP, "type": "server_closed"}).encode(), "detail", MARKUP),
}


@pytest.mark.parametrize("shown", SHOWN)
def test_whatever_is_published_the_page_shows_text(
    leaving: Any, server: ServerProcess, channel: str, shown: str
) -> None:
    message, id, text = SHOWN[shown]
    page = ChromiumPage(leaving, server, channel, MARKUP)
    page.is_open()

    assert server.redis.publish(channel, message) == 1

    page.wait(id, text)
    assert page.is_clean()


def test_a_channel_full_of_markup_shows_as_text(leaving: Any, server: ServerProcess) -> None:
    page = ChromiumPage(leaving, server, MARKUP)
    page.is_open()

    server.publish("x", MARKUP)

    page.wait("log", "x")
    assert page.run("return document.getElementById('channel').value") == MARKUP
    assert page.is_clean()


def test_error_messages_show_as_text(
    leaving: Any,
    server: ServerProcess,
    channel: str,
) -> None:
    page = ChromiumPage(leaving, server, f"private-{MARKUP}")
    page.wait("state", f"private-{MARKUP}")

    page.type("publish-channel", MARKUP * 3)
    page.run("document.getElementById('publish').requestSubmit()")

    page.wait("answer", "channel must")
    assert page.run("return document.getElementById('answer').dataset.kind") == "error"
    assert page.is_clean()


def test_the_page_runs_no_script_but_its_own_and_cannot_be_framed(leaving: Any, server: ServerProcess) -> None:
    headers = server.get("/").headers
    page = ChromiumPage(leaving, server)
    page.is_open()

    page.run(
        "window.violations = [];"
        "addEventListener('securitypolicyviolation', (event) => violations.push(event.effectiveDirective));"
        "const script = document.createElement('script'); script.textContent = 'window.__pwned = 1';"
        "document.body.append(script); document.body.insertAdjacentHTML('beforeend',"
        " '<img src=/healthz onerror=window.__pwned=2><div style=color:red><iframe src=/></iframe>');"
        "fetch('http://127.0.0.1:1/').catch(() => {});"
    )
    wanted = {"script-src-elem", "script-src-attr", "img-src", "style-src-attr", "connect-src", "frame-src"}
    wait_for(lambda: wanted <= set(page.run("return window.violations")), "all of it is refused")

    assert page.run("return typeof window.__pwned") == "undefined"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "form-action 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_page_of_another_site_can_read_but_not_publish(
    leaving: Any, server: ServerProcess, start: Start, channel: str
) -> None:
    foreign = start()
    url = f"http://localhost:{server.port}"
    with server.stream(channel, "sse") as stream:
        leaving.get(f"{foreign.url}/healthz")

        done = leaving.execute_async_script(
            """const [url, channel, done] = arguments;
            const event = JSON.stringify({data: "attack", channel});
            const json = {method: "POST", headers: {"Content-Type": "application/json"}, body: event};
            const tries = [
              fetch(url + "/publish", json), fetch(url + "/publish", {...json, mode: "no-cors"}),
              fetch(url + "/publish", {method: "POST", mode: "no-cors", body: event}),
              fetch(url + "/notifications"), fetch(url + "/notifications", {mode: "no-cors"}),
              new Promise((made) => {
                const image = new Image(); image.onerror = image.onload = made; image.src = url + "/notifications";
              }),
              new Promise((made) => {
                const frame = document.createElement("iframe"); frame.name = "frame"; document.body.append(frame);
                const form = document.createElement("form");
                Object.assign(form, {method: "post", enctype: "text/plain", action: url + "/publish", target: "frame"});
                const input = document.createElement("input");
                Object.assign(input, {name: '{"data": "attack", "a": "', value: '"}'});
                form.append(input); document.body.append(form);
                frame.onload = made; form.submit();
              }),
              Promise.resolve(navigator.sendBeacon(url + "/publish", new Blob([event], {type: "text/plain"}))),
            ];
            Promise.allSettled(tries).then(() => fetch(url + `/stream?channel=${channel}`)).then((r) => done(r.status));
            """,
            url,
            channel,
        )
        server.redis.publish(channel, "sentinel")

        assert done == 200
        assert stream.next().data == "sentinel"
