"""The page, as a person uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import state_of, text_of
from tests.kit import DEADLINE_S, HAS_TEST_EXTRA, HERE, Received, RedisProcess, ServerProcess, Start, program, wait_for

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver


# ── What the tests of the page stand on ──────────────────────────────────────────────────────────────────────────────


# The page does not depend on how the server subscribes.
one_way = pytest.mark.parametrize(
    "server",
    [()],
    ids=["subscriber each"],
    indirect=True,
)


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
      .filter((at) => at.checkVisibility())
      .map((at) => at.id || at.getAttribute("aria-label") || at.textContent.trim());
"""


ROWS = """
    return [...document.querySelectorAll("#log li")].filter((row) => row.checkVisibility())
      .map((row) => row.querySelector(".data").textContent);
"""


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


def open_page(
    tab: WebDriver,
    server: ServerProcess,
    channel: str,
    types: str = "",
) -> None:
    """The page, listening to a channel that it also publishes to."""
    tab.get(f"{server.url}/?channel={channel}&types={types}")
    wait_for(lambda: state_of(tab) == "open", "the page is open")
    enter(tab, "publish-channel", channel)


def enter(
    tab: WebDriver,
    id_: str,
    value: str,
) -> None:
    """Have this value in a field."""
    tab.execute_script(SET, id_, value)


def click(tab: WebDriver, selector: str) -> None:
    """Click as a person does: what is covered or invisible cannot be clicked."""
    tab.find_element("css selector", selector).click()


def rows(tab: WebDriver) -> list[str]:
    """The data of the log's visible rows, the newest first."""
    return [str(data) for data in tab.execute_script(ROWS)]


def publish(
    redis_process: RedisProcess,
    channel: str,
    *events: tuple[str, str],
) -> None:
    """Each as type and data, by a plain PUBLISH."""
    for type_, data in events:
        assert redis_process.publish(channel, json.dumps({"data": data, "type": type_})) == 1


def wait_for_text(
    tab: WebDriver,
    id_: str,
    text: str,
) -> None:
    """Until this is all that stands there."""
    wait_for(lambda: text_of(tab, id_) == text, f"{text!r} in #{id_}")


# ── Its stream ───────────────────────────────────────────────────────────────────────────────────────────────────────


@one_way
def test_the_page_says_in_words_that_it_connects_and_that_it_is_open(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    open_page(tab, server, channel)
    tab.execute_script(RECORD_STATES)

    click(tab, "#connect")

    wait_for(lambda: tab.execute_script("return states.length >= 2"), "two states")
    url = f"{server.url}/stream?channel={channel}"
    assert tab.execute_script("return states") == [["connecting", f"connecting to {url}"], ["open", "open"]]
    assert text_of(tab, "detail") == f"Listening at {url}"
    assert tab.find_element("id", "state").get_attribute("aria-live") == "polite"


def test_the_page_says_that_it_is_reconnecting_and_is_open_again_when_the_server_is_back(
    start: Start, tab: WebDriver, channel: str
) -> None:
    server = start("--retry", "200")
    open_page(tab, server, channel)

    server.kill()
    wait_for(lambda: state_of(tab) == "waiting", "the page noticed")

    assert "reconnecting" in text_of(tab, "state")
    assert "reconnecting" in text_of(tab, "detail")
    again = start("--retry", "200", port=server.port)
    wait_for(lambda: state_of(tab) == "open", "the page is open again")
    assert text_of(tab, "state") == "open"
    again.publish("after", channel)
    wait_for(lambda: rows(tab) == ["after"], "the page hears again")


def test_a_stream_reset_is_announced_with_its_reason(
    own_redis: RedisProcess, start: Start, tab: WebDriver, channel: str
) -> None:
    server = start("--retry", "200", redis=own_redis)
    open_page(tab, server, channel)
    server.publish("seen", channel)
    wait_for(lambda: rows(tab) == ["seen"], "the page got it")
    assert not tab.find_element("id", "reset").is_displayed()

    server.kill()
    own_redis.client.flushall()
    start("--retry", "200", port=server.port, redis=own_redis)

    wait_for(lambda: tab.find_element("id", "reset").is_displayed(), "the reset is shown")
    reset, *_ = rows(tab)
    reason = json.loads(reset)["reason"]
    assert reason
    assert f": {reason}. " in text_of(tab, "reset")
    assert "missed" in text_of(tab, "reset")
    assert tab.find_element("id", "reset").get_attribute("role") == "status"


# ── Its log ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@one_way
def test_a_paused_page_counts_on_and_shows_what_came_meanwhile_when_resumed(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    open_page(tab, server, channel)
    publish(server.redis, channel, ("message", "before"))
    wait_for(lambda: rows(tab) == ["before"], "it is shown")

    click(tab, "#pause")
    publish(
        server.redis,
        channel,
        ("message", "during 1"),
        ("message", "during 2"),
    )
    wait_for_text(tab, "count", "3")
    assert rows(tab) == ["before"]
    assert text_of(tab, "meanwhile") == ", 2 since the pause"
    assert text_of(tab, "pause") == "Resume"

    click(tab, "#pause")
    wait_for(lambda: rows(tab) == ["during 2", "during 1", "before"], "all are shown")
    assert (text_of(tab, "meanwhile"), text_of(tab, "pause"), text_of(tab, "count")) == ("", "Pause", "3")


@one_way
def test_clear_empties_the_log_and_starts_the_count_anew(
    server: ServerProcess,
    tab: WebDriver,
    channel: str,
) -> None:
    open_page(tab, server, channel)
    publish(
        server.redis,
        channel,
        ("message", "a"),
        ("stream-reset", '{"reason": "told"}'),
    )
    wait_for_text(tab, "count", "2")

    click(tab, "#clear")
    wait_for_text(tab, "count", "0")
    assert rows(tab) == []
    assert tab.find_element("id", "nothing").is_displayed()
    assert not tab.find_element("id", "reset").is_displayed()

    publish(server.redis, channel, ("message", "b"))
    wait_for(lambda: rows(tab) == ["b"], "the log goes on")
    assert text_of(tab, "count") == "1"
    assert not tab.find_element("id", "nothing").is_displayed()


@one_way
def test_the_log_shows_events_of_the_chosen_type_only(
    server: ServerProcess,
    tab: WebDriver,
    channel: str,
) -> None:
    open_page(tab, server, channel, "greeting")
    publish(
        server.redis,
        channel,
        ("greeting", "hello 1"),
        ("message", "plain 1"),
    )
    wait_for(lambda: rows(tab) == ["plain 1", "hello 1"], "both are shown")

    click(tab, "#filter option[value=greeting]")
    assert rows(tab) == ["hello 1"]
    publish(
        server.redis,
        channel,
        ("message", "plain 2"),
        ("greeting", "hello 2"),
    )
    wait_for(lambda: rows(tab) == ["hello 2", "hello 1"], "the new one of the type is shown")
    assert text_of(tab, "count") == "4"

    click(tab, "#filter option[value='']")
    assert rows(tab) == ["hello 2", "plain 2", "plain 1", "hello 1"]


@one_way
def test_a_burst_of_1200_events_is_counted_whole_logged_up_to_the_cap_and_can_be_paused_meanwhile(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    open_page(tab, server, channel)
    cap = tab.execute_script("return LOG_ROWS")

    with server.redis.client.pipeline(transaction=False) as pipeline:
        for number in range(1200):
            pipeline.publish(channel, f'{{"data": "number {number}"}}')
        pipeline.execute()
    click(tab, "#pause")
    assert text_of(tab, "pause") == "Resume"
    click(tab, "#pause")

    wait_for_text(tab, "count", "1200")
    wait_for(lambda: rows(tab)[:1] == ["number 1199"], "what came during the pause is shown")
    assert rows(tab) == [f"number {number}" for number in range(1199, 1199 - cap, -1)]


@one_way
def test_the_page_shows_the_id_of_the_last_event(
    server: ServerProcess,
    tab: WebDriver,
    channel: str,
) -> None:
    open_page(tab, server, channel)
    assert text_of(tab, "last-id") == "none yet"

    for data in ("first", "second"):
        id_ = server.publish_id(data, channel)
        wait_for_text(tab, "last-id", id_)
        assert id_ in text_of(tab, "log")


# ── Publishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@one_way
def test_publishing_with_a_wrong_retry_says_what_is_wrong_and_sends_nothing(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    stream = server.stream(channel)
    open_page(tab, server, channel)
    enter(tab, "publish-data", "wrong")
    enter(tab, "publish-retry", "x")

    click(tab, "#publish button")

    problem = text_of(tab, "publish-retry-problem")
    assert "milliseconds" in problem
    assert text_of(tab, "answer") == f"Not sent. {problem}"
    assert tab.find_element("id", "publish-retry").get_attribute("aria-invalid") == "true"
    assert tab.execute_script(FOCUSED) == "publish-retry"
    assert text_of(tab, "line-redis") == f"# {problem}"
    enter(tab, "publish-retry", "3000")
    enter(tab, "publish-data", "right")
    click(tab, "#publish button")
    assert stream.next().data == "right"
    assert text_of(tab, "publish-retry-problem") == ""
    assert tab.find_element("id", "publish-retry").get_attribute("aria-invalid") == "false"


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
    return event.type, event.json if event.data.startswith(("{", "[")) else event.data


@one_way
@pytest.mark.parametrize("line", ["redis", "curl", "python"])
def test_the_lines_to_copy_publish_what_the_form_publishes(
    line: str, server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    stream = server.stream(channel)
    open_page(tab, server, channel + "-quiet")  # or a new row in the log might move the button just when it is clicked
    enter(tab, "publish-channel", channel)
    environment = {**os.environ, "REDIS_URL": server.redis.url}
    enter(tab, "publish-retry", "4321")
    wrong = {}
    for name, (type_, data) in FORMS.items():
        enter(tab, "publish-type", type_)
        enter(tab, "publish-data", data)
        tab.execute_script("document.getElementById('answer').textContent = ''")
        click(tab, "#publish button")
        wait_for(lambda: text_of(tab, "answer") not in ("", "publishing …"), "the page has its answer")
        assert text_of(tab, "answer").startswith("published")
        by_form = stream.next()

        command = text_of(tab, f"line-{line}").replace("redis-cli ", f"redis-cli -p {server.redis.port} ", 1)
        command = command.replace("python ssepush.py", f"{sys.executable} ssepush.py", 1)
        ran = subprocess.run(
            [program("bash"), "-c", command], cwd=HERE, env=environment, capture_output=True, timeout=DEADLINE_S
        )
        if ran.returncode:
            wrong[name] = (command, ran.stderr.decode())
        elif meaning(by_line := stream.next()) != meaning(by_form):
            wrong[name] = (command, f"{by_line} instead of {by_form}")
    assert not wrong
    assert stream.parser.retry_ms == 4321


@one_way
def test_the_javascript_to_copy_hears_what_the_form_publishes(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    open_page(tab, server, channel)
    enter(tab, "publish-type", "it's </script>")
    enter(tab, "publish-data", '{"a": "b"}')
    tab.execute_script("window.heard = []; console.log = (value) => heard.push(value);")
    tab.execute_script(text_of(tab, "line-js").replace("const source", "window.copied") + "; copied.onopen = () => {}")
    wait_for(lambda: tab.execute_script("return copied.readyState === EventSource.OPEN"), "the copied code is open")

    click(tab, "#publish button")

    wait_for(lambda: tab.execute_script("return heard.length > 0"), "the copied code heard it")
    assert tab.execute_script("return heard") == [{"a": "b"}]
    tab.execute_script("copied.close()")


# ── For everybody ────────────────────────────────────────────────────────────────────────────────────────────────────


@one_way
def test_the_page_works_by_keyboard_alone(
    server: ServerProcess,
    tab: WebDriver,
    channel: str,
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    stream = server.stream(channel)
    open_page(tab, server, channel)
    server.publish("a long one " * 100, channel)
    assert stream.next()
    wait_for(lambda: rows(tab), "a row that can be opened")
    reachable = [str(name) for name in tab.execute_script(FOCUSABLE)]

    reached: list[str] = []
    for _ in reachable:
        ActionChains(tab, duration=0).send_keys(Keys.TAB).perform()
        reached.append(str(tab.execute_script(FOCUSED)))
        if reached[-1] == "Publish":
            ActionChains(tab, duration=0).send_keys(Keys.ENTER).perform()
            assert stream.next().json["who"] == "allen"
            wait_for(lambda: text_of(tab, "answer").startswith("published to "), "the page says so")
            assert tab.execute_script(FOCUSED) == "Publish"

    assert "Publish" in reached
    assert reached == reachable


@pytest.fixture
def looks(chromium: WebDriver) -> Iterator[Callable[[int, str], None]]:
    """Gives the page a width and a color scheme, until the test is over."""

    def look(width: int, scheme: str) -> None:
        metrics = {
            "width": width,
            "height": 800,
            "deviceScaleFactor": 1,
            "mobile": width < 600,
        }
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    yield look
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def fill(
    tab: WebDriver,
    server: ServerProcess,
    channel: str,
) -> None:
    """Everything that the page can show at once, and long: events, a reset, a problem, an answer."""
    open_page(tab, server, channel, "long" * 40)
    for data in ("short", "", "unbroken" * 30, "clipped" * 200, {"question": "q" * 200, "value": "v" * 200}):
        server.publish(data, channel, type="new_answers")
    server.publish("unbroken" * 30, channel, type="new_question")
    server.publish("typed", channel, type="long" * 40)
    server.publish(
        {"reason": "unbroken" * 30},
        channel,
        type="stream-reset",
    )
    wait_for(lambda: len(rows(tab)) == 8, "all rows")
    enter(tab, "publish-retry", "x")
    click(tab, "#publish button")
    tab.execute_script("document.querySelector('#log details').open = true")
    assert tab.find_element("id", "reset").is_displayed()
    assert tab.find_element("id", "answer").is_displayed()


@one_way
def test_at_360_pixels_nothing_needs_scrolling_sideways(
    server: ServerProcess, tab: WebDriver, channel: str, looks: Callable[[int, str], None]
) -> None:
    looks(360, "light")
    fill(tab, server, channel)

    assert tab.execute_script(OVERFLOW) == [0, 360, []]
    enter(tab, "publish-retry", "")
    enter(tab, "publish-data", "unbroken" * 40)
    assert tab.execute_script(OVERFLOW) == [0, 360, []]


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of npm's axe-core."""
    if not HAS_TEST_EXTRA:
        pytest.skip("needs the test extra: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("axe")
    command = [
        program("npm"),
        "install",
        "--no-audit",
        "--no-fund",
        "--prefix",
        str(folder),
        "axe-core@4",
    ]
    installed = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert installed.returncode == 0, installed.stderr
    return Path(folder, "node_modules", "axe-core", "axe.min.js").read_text()


@one_way
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_that_keeps_anybody_out(
    width: int,
    scheme: str,
    server: ServerProcess,
    tab: WebDriver,
    channel: str,
    looks: Callable[[int, str], None],
    axe: str,
) -> None:
    looks(width, scheme)
    fill(tab, server, channel)
    assert tab.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    tab.execute_script(axe)

    violations: list[Any] = tab.execute_async_script(AXE)
    enter(tab, "publish-retry", "")
    click(tab, "#publish button")
    wait_for(lambda: text_of(tab, "answer").startswith("published to "), "the page says so in green")
    violations += tab.execute_async_script(AXE)

    assert violations == []


LINES_TO_COPY = ["redis", "curl", "python", "js"]


def console_log(tab: WebDriver) -> list[str]:
    """The warnings and errors in the browser's console since it was last asked."""
    entries: list[dict[str, Any]] = tab.get_log("browser")  # type: ignore[no-untyped-call]
    return [str(entry["message"]) for entry in entries]


@one_way
def test_normal_use_leaves_no_error_in_the_browsers_console(
    server: ServerProcess, tab: WebDriver, channel: str
) -> None:
    console_log(tab)  # what others left
    open_page(tab, server, channel, "greeting")
    publish(
        server.redis,
        channel,
        ("greeting", "hello"),
        ("new_answers", "no object"),
        ("new_answer", "an answer"),
    )
    click(tab, "#publish button")
    wait_for(lambda: text_of(tab, "answer").startswith("published to "), "the page says so")
    wait_for_text(tab, "count", "4")
    for selector in (
        "#pause",
        "#pause",
        "#clear",
        "#close",
        "#connect",
        *[f"[data-copies=line-{n}]" for n in LINES_TO_COPY],
    ):
        click(tab, selector)
    wait_for(lambda: state_of(tab) == "open", "the page is open again")

    messages = console_log(tab)
    assert messages == []
