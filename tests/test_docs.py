"""The documentation: its examples run as they stand, its tables say what the server does, its links lead somewhere."""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import json
import re
import shlex
import signal
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import ssepush
from tests.browser import text_of
from tests.engines import Browser, Firefox, Site
from tests.kit import (
    DEADLINE_S,
    HERE,
    LOOPBACK,
    EventStream,
    RedisProcess,
    ServerProcess,
    Start,
    environment_with,
    free_port,
    program,
    run,
    running,
    ssepush_command,
    wait_for,
)

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

DOCS = HERE / "docs"
README = HERE / "README.md"
CHINESE = DOCS / "README.zh.md"
CHANGES = HERE / "CHANGELOG.md"
GUIDE = DOCS / "guide.md"
CLIENTS = DOCS / "clients.md"
REFERENCE = DOCS / "reference.md"
PROMISES = DOCS / "promises.md"
PAGES = [README, CHANGES, *sorted(DOCS.glob("**/*.md"))]
SOURCE = (HERE / "ssepush.py").read_text()


# ── Reading the documentation ────────────────────────────────────────────────────────────────────────────────────────

HEADING = re.compile(r"^#+ (.*)\n", re.MULTILINE)
BLOCK = re.compile(r"^ *```([a-z]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^\|.*\|\n\| ---.*\n((?:\|.*\|\n)*)", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def section(page: Path, heading: str) -> str:
    """What stands between this heading and the next."""
    text = page.read_text()
    start = text.index(f"# {heading}\n")
    start = text.index("\n", start)
    blocks = list(BLOCK.finditer(text))
    for following in HEADING.finditer(text, start):
        end = following.start()
        is_comment = any(end in range(*block.span()) for block in blocks)
        if not is_comment:
            return text[start:end]
    return text[start:]


def examples(text: str, language: str) -> list[str]:
    """The blocks in this language."""
    found = []
    for block in BLOCK.finditer(text):
        if block[1] == language:
            found.append(block[2])
    return found


def example(page: Path, heading: str, language: str) -> str:
    """The only such block below a heading."""
    text = section(page, heading)
    (found,) = examples(text, language)
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of its tables, without their heads."""
    found = []
    for table in TABLE.finditer(f"{text}\n"):
        for line in table[1].splitlines():
            cells = line.strip("|").split("|")
            found.append([cell.strip() for cell in cells])
    return found


def codes(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def first_codes(page: Path, heading: str) -> set[str]:
    """What stands in backticks in the first column of the tables below a heading."""
    found: set[str] = set()
    for row in rows(section(page, heading)):
        found.update(codes(row[0]))
    return found


def links(page: Path) -> list[str]:
    """Where it leads within the project."""
    text = BLOCK.sub("", page.read_text())
    return [link for link in LINK.findall(text) if "://" not in link]


def targets_of(page: Path) -> set[Path]:
    """The files of the project that it leads to."""
    return {target_of(page, link) for link in links(page)}


def target_of(page: Path, link: str) -> Path:
    """The file that a link of this page means."""
    path = link.partition("#")[0]
    if not path:
        return page
    target = page.parent / path
    return target.resolve()


# ── Running examples ─────────────────────────────────────────────────────────────────────────────────────────────────


def names_in(python: str) -> dict[str, Any]:
    """The names that an example defines."""
    names: dict[str, Any] = {"__name__": "example"}
    code = compile(python, "example", "exec")
    exec(code, names)
    return names


@pytest.fixture
def own_server(
    start: Start,
    own_redis: RedisProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> ServerProcess:
    """A server that nobody else uses, so that examples may use the channels that they name."""
    monkeypatch.setenv("REDIS_URL", own_redis.url)
    return start("--retry", "500", redis=own_redis)


def here(text: str, server: ServerProcess) -> str:
    """An example, with the addresses and programs that it has in the test."""
    ssepush_here = shlex.join(ssepush_command())
    replacements = {
        "http://127.0.0.1:5000": server.url,
        "$SSEPUSH": server.url,
        "redis-cli ": f"redis-cli -p {server.redis.port} ",
        ".venv/bin/python ssepush.py": ssepush_here,
    }
    for shown, meant in replacements.items():
        text = text.replace(shown, meant)
    return re.sub("^ssepush ", f"{ssepush_here} ", text)


def shell(line: str, server: ServerProcess) -> str:
    """What a shell prints that runs this line of an example."""
    for name in ("redis-cli", "curl"):
        program(name)
    done = subprocess.run(
        ["sh", "-ec", here(line, server)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=environment_with(REDIS_URL=server.redis.url),
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout


@contextlib.contextmanager
def reading(
    line: str,
    server: ServerProcess,
    **environment: str,
) -> Iterator[Iterable[bytes]]:
    """The lines that a shell prints while it runs this line of an example, which does not end by itself."""
    command = f"exec {here(line, server)}"
    variables = environment_with(**environment)
    with running("sh", "-c", command, env=variables) as process:
        assert process.stdout
        yield process.stdout


def until(lines: Iterable[bytes], text: bytes) -> list[bytes]:
    """The lines before the one that holds this text."""
    before = itertools.takewhile(lambda line: text not in line, lines)
    return list(before)


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """A Flask application on a port of its own; its address."""
    serving = pytest.importorskip("werkzeug.serving")
    web = serving.make_server(
        LOOPBACK,
        0,
        app,
        threaded=True,
    )
    thread = threading.Thread(
        target=web.serve_forever,
        daemon=True,
    )
    thread.start()
    yield f"http://{LOOPBACK}:{web.server_port}"
    web.shutdown()
    thread.join(DEADLINE_S)


def run_script(tab: Browser, address: str, script: str) -> None:
    """Run JavaScript in a page of this address, where `show(…)` keeps what it is given."""
    tab.get(address)
    tab.execute_script("window.shown = []; window.show = (one) => shown.push(one);")
    tab.execute_script(f"{script}; if (typeof source === 'object') window.source = source;")


def shown(tab: Browser) -> list[Any]:
    """What it was given."""
    return list(tab.execute_script("return shown"))


def wait_until_closed(tab: WebDriver) -> None:
    """Wait until the page's stream is closed for good."""

    def is_closed() -> bool:
        return bool(tab.execute_script("return source.readyState === EventSource.CLOSED"))

    wait_for(is_closed, "the browser has given up its stream")


def wait_until_open(server: ServerProcess) -> None:
    """Wait until Redis has confirmed a page's first stream: whatever is published from then on is for it."""
    wait_for(lambda: server.metric("streams_opened_total"), "the page's stream is open")


class Ticker(threading.Thread):
    """Publishes the numbers from 0 on a channel, twenty a second, until it is stopped."""

    def __init__(self, server: ServerProcess, channel: str) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.channel = channel
        self.published: list[str] = []
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        for number in itertools.count():
            if self.done.wait(0.05):
                return
            data = str(number)
            self.server.publish(data, self.channel)
            self.published.append(data)

    def stop(self) -> list[str]:
        """What was published."""
        self.done.set()
        self.join(DEADLINE_S)
        return self.published


# ── README ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_readme_has_at_most_150_lines_and_two_commands_that_set_up() -> None:
    lines = README.read_text().splitlines()

    commands = [line for line in lines if line.startswith("python3 -m venv .venv")]
    assert len(commands) == 2
    assert len(lines) <= 150


def test_readme_shows_what_the_server_prints(own_server: ServerProcess) -> None:
    text = section(README, "Try it")
    as_shown = examples(text, "")[0]

    as_shown = as_shown.replace(" (embedded: its data ends with it)", "")
    as_shown = as_shown.replace("http://127.0.0.1:5000", own_server.url)
    as_shown = as_shown.replace("redis://127.0.0.1:6379/0", own_server.redis.url)
    as_shown = as_shown.replace("redis-cli", f"redis-cli -u {own_server.redis.url}")

    assert as_shown in own_server.output


def test_the_four_lines_of_the_article_do_what_readme_says(own_server: ServerProcess) -> None:
    stream = own_server.opened()
    text = section(README, "Try it")
    block = examples(text, "sh")[-1]
    notify, subscribe, publish, answer = block.splitlines()

    notified = json.loads(shell(notify, own_server))
    with reading(subscribe, own_server) as seen:
        wait_for(lambda: own_server.redis.subscribers("sse") == 2, "redis-cli has subscribed")
        reached = shell(publish, own_server).strip()
        assert b"message\n" in until(seen, b'{"data"')

    assert notified == {"state": "ok"}
    assert f"(integer) {reached}" in answer
    for event in stream.take(2):
        assert event.type == "new_answers"
        assert event.json["value"] == "Absolutely, PHP"


def test_readmes_page_shows_what_is_published_and_loads_anew_when_it_is_reset(
    own_server: ServerProcess,
    tab: WebDriver,
    tmp_path: Path,
) -> None:
    page = tmp_path / "page.html"
    text = example(README, "A page of your own", "html")
    page.write_text(here(text, own_server))
    tab.get(page.as_uri())
    wait_until_open(own_server)

    own_server.publish({"question": "tea?", "value": "yes"}, type="new_answers")
    wait_for(lambda: text_of(tab, "data") == "tea? : yes", "the page shows it")
    own_server.publish("", type="stream-reset")

    wait_for(lambda: text_of(tab, "data") == "received pushed data", "the page was loaded anew")


def test_readmes_three_lines_publish(
    own_server: ServerProcess,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = own_server.opened()

    names_in(example(README, "Publishing from your program", "python"))

    event = stream.next()
    assert event.id
    assert event.json == {"question": "tea or coffee?", "value": "tea"}
    printed = capsys.readouterr().out
    assert printed.startswith("1 pages have it")


def test_readme_and_the_changes_name_the_version_of_the_code() -> None:
    for page in (README, CHINESE, CHANGES):
        text = page.read_text()
        versions = re.findall(r"^(?:ssepush|##) (\d\S+)", text, re.MULTILINE)
        assert versions[0] == ssepush.__version__


def code_of(page: Path) -> list[str]:
    """Its blocks, without comments."""
    comment = re.compile("(^| +)(//|# ).*", re.MULTILINE)
    found = []
    for block in BLOCK.finditer(page.read_text()):
        code = comment.sub("", block[2])
        found.append(code)
    return found


def figures_of(page: Path) -> list[list[str]]:
    """The numbers in its tables, row by row."""
    found = []
    for row in rows(page.read_text()):
        figures = " ".join(row[1:])
        found.append(re.findall(r"\d[\d,.]*", figures))
    return found


def test_the_chinese_readme_has_the_same_code_figures_and_links() -> None:
    assert code_of(CHINESE) == code_of(README)
    assert figures_of(CHINESE) == figures_of(README)
    readmes = {README, CHINESE}
    chinese_targets = targets_of(CHINESE)
    assert chinese_targets - readmes == targets_of(README) - readmes


# ── Guide: pages ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_guides_script_hears_the_events_of_all_its_channels(
    own_server: ServerProcess,
    tab: WebDriver,
) -> None:
    script = example(GUIDE, "How does a page listen?", "js")
    run_script(tab, f"{own_server.url}/healthz", script)
    wait_until_open(own_server)

    own_server.publish({"item": "tea"}, "orders", type="order_placed")
    own_server.publish({"item": "unheard of"}, "orders", type="other")
    own_server.redis.publish("news", "plain")

    wait_for(lambda: "plain" in shown(tab), "the last event is shown")
    assert shown(tab) == [{"item": "tea"}, "plain"]


def test_the_guide_names_the_clients_that_need_nothing() -> None:
    text = section(GUIDE, "How does a page listen?")
    prose = " ".join(text.split())
    sentence = re.search("while ([^:]*) need none:", prose)
    assert sentence

    need_nothing = set()
    for client in CLIENTS.read_text().split("\n### ")[1:]:
        name, _, description = client.partition("\n")
        if "needs nothing" in description.lower():
            need_nothing.add(name)

    assert set(re.split(", | and ", sentence[1])) == need_nothing


KEEP_SOURCES = """
    window.sources = [];
    window.EventSource = class extends EventSource {
      constructor(url) {
        super(url);
        sources.push(this);
      }
    };
"""


ANY_CLOSED = "return sources.some((source) => source.readyState === EventSource.CLOSED)"


def test_the_guides_page_of_another_origin_comes_back_in_firefox_and_misses_nothing(
    second_browser: Firefox,
    start: Start,
    own_redis: RedisProcess,
) -> None:
    script = example(GUIDE, "When does a browser give up?", "js")
    publisher = start(redis=own_redis)
    server = start("--retry", "100", redis=own_redis)
    script = script.replace("`/stream", f"`{server.url}/stream")
    with Site({"/": lambda: ""}) as site:
        run_script(second_browser, site.url, KEEP_SOURCES + script)
        wait_until_open(server)
        server.publish({"item": "seen"}, "orders", type="order_placed")
        wait_for(lambda: shown(second_browser), "the page listens")

        server.kill()
        wait_for(lambda: second_browser.execute_script(ANY_CLOSED), "Firefox has given up")
        publisher.publish({"item": "missed"}, "orders", type="order_placed")
        start("--retry", "100", redis=own_redis, port=server.port)

        wait_for(lambda: len(shown(second_browser)) == 2, "the page is back")
        assert shown(second_browser) == [{"item": "seen"}, {"item": "missed"}]


def test_the_guide_names_the_events_that_come_from_ssepush() -> None:
    made = re.findall(r'notice\("((?:stream|token)-[a-z]+)"', SOURCE)

    documented = first_codes(GUIDE, "Which events come from ssepush itself?")
    assert documented == set(made)


def orders_page(server: ServerProcess) -> str:
    """The page that the guide's application renders at this moment."""
    pytest.importorskip("flask")
    text = example(GUIDE, "How do I render a page without a gap?", "python")
    text = text.replace("/stream?", f"{server.url}/stream?")
    app = names_in(text)["app"]
    return str(app.test_client().get("/orders").text)


def test_a_page_that_was_rendered_with_its_position_misses_nothing(
    own_server: ServerProcess,
    tab: WebDriver,
    tmp_path: Path,
) -> None:
    page = tmp_path / "orders.html"

    page.write_text(orders_page(own_server))
    change = {"number": 1, "state": "eaten"}
    own_server.publish(change, "orders", type="order_changed")
    tab.get(page.as_uri())

    wait_for(lambda: text_of(tab, "order-1") == "eaten", "the page has what came before its stream")
    assert text_of(tab, "order-2") == "sent"


def test_a_page_that_was_rendered_without_a_history_hears_what_is_live(
    start: Start,
    own_redis: RedisProcess,
    tab: WebDriver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REDIS_URL", own_redis.url)
    monkeypatch.setenv("SSEPUSH_HISTORY", "0")
    server = start(redis=own_redis, SSEPUSH_HISTORY="0")
    rendered = orders_page(server)
    page = tmp_path / "orders.html"
    page.write_text(rendered)
    tab.get(page.as_uri())
    wait_until_open(server)

    change = {"number": 1, "state": "eaten"}
    server.publish(change, "orders", type="order_changed")

    assert 'lastEventId="' in rendered
    wait_for(lambda: text_of(tab, "order-1") == "eaten", "the page has the event")
    assert server.metric('streams_reset_total{reason="unknown-id"}') == 0


EVERYTHING = [str(number) for number in range(15)]


@pytest.mark.parametrize(
    ("row", "begins_with"),
    [
        (0, []),
        (1, EVERYTHING[-10:]),
        (2, EVERYTHING),
        (3, EVERYTHING[3:]),
    ],
    ids=["new", "last", "earliest", "since an id"],
)
def test_a_stream_begins_with_what_its_url_asks_for(
    row: int,
    begins_with: list[str],
    own_server: ServerProcess,
) -> None:
    table = rows(section(GUIDE, "How does a page get what came before?"))
    (url,) = codes(table[row][0])
    ids = [own_server.publish_id(data, "chat") for data in EVERYTHING]

    path = url.replace("ID", ids[2])
    stream = EventStream(own_server.port, path)
    stream.position()
    own_server.publish("live", "chat")

    expected = [*begins_with, "live"]
    assert stream.data(len(expected)) == expected


def test_server_closed_sends_the_page_away_for_good(
    own_server: ServerProcess,
    tab: WebDriver,
) -> None:
    heading = "How do I send pages away?"
    listen = example(GUIDE, heading, "js")
    script = f'const source = new EventSource("/stream"); {listen}'
    run_script(tab, f"{own_server.url}/healthz", script)
    wait_until_open(own_server)

    shell(example(GUIDE, heading, "sh"), own_server)

    wait_until_closed(tab)


# ── Guide: private channels ──────────────────────────────────────────────────────────────────────────────────────────

TOKEN_S = 2
SECRET = "a secret of more than sixteen bytes"


def test_the_guides_three_lines_open_a_private_channel(
    start: Start,
    own_redis: RedisProcess,
) -> None:
    lines = example(GUIDE, "How do I keep a channel private?", "sh").splitlines()
    export, serve, listen = lines
    assert serve == ".venv/bin/python ssepush.py &"
    script = f'{export}; printf %s "$SSEPUSH_SECRET"'
    done = subprocess.run(
        ["sh", "-ec", script],
        check=True,
        capture_output=True,
    )
    secret = done.stdout.decode()
    server = start(redis=own_redis, SSEPUSH_SECRET=secret)

    with reading(listen, server, SSEPUSH_SECRET=secret) as seen:
        wait_until_open(server)
        server.publish("for your eyes only", "private-7")
        before_it = until(seen, b"eyes")

    assert b"event: stream-position\n" in before_it


def request(tab: WebDriver, path: str, method: str = "GET") -> None:
    """Have the page ask its own server for something, to the end."""
    script = """
        const [path, method, done] = arguments;
        fetch(path, { method }).then((answer) => done(answer.status));
    """
    assert tab.execute_async_script(script, path, method) == 200


class LoggedIn(NamedTuple):
    """A page of the guide's Flask application, and the server that it listens to."""

    server: ServerProcess
    restart: Callable[[], ServerProcess]


@pytest.fixture
def logged_in(
    own_redis: RedisProcess,
    start: Start,
    tab: WebDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[LoggedIn]:
    """Cookies know no ports: here the application and the server have the same host, as behind a proxy."""
    pytest.importorskip("flask")
    monkeypatch.setenv("SSEPUSH_SECRET", SECRET)
    heading = "How is a token in a cookie renewed?"
    text = example(GUIDE, heading, "python")
    text = text.replace("TOKEN_S = 300", f"TOKEN_S = {TOKEN_S}")
    app = names_in(text)["app"]
    port = free_port()

    with served(app) as origin:

        def restart() -> ServerProcess:
            return start(
                *("--retry", "500"),
                *("--allow-origin", origin),
                redis=own_redis,
                port=port,
                SSEPUSH_SECRET=SECRET,
            )

        server = restart()
        url = f'"{server.url}/stream?channel=private-7", {{ withCredentials: true }}'
        listen = example(GUIDE, heading, "js")
        listen = listen.replace('"/stream?channel=private-7"', url)
        tab.get(f"{origin}/still-here")
        request(tab, "/login", "POST")
        run_script(tab, f"{origin}/still-here", f"{listen}; source.onmessage = (event) => show(event.data);")
        wait_until_open(server)
        yield LoggedIn(server, restart)


def test_a_cookie_that_is_renewed_loses_nothing(logged_in: LoggedIn, tab: WebDriver) -> None:
    server = logged_in.server
    ticker = Ticker(server, "private-7")

    wait_for(lambda: server.closed("expired") >= 3, "three tokens have expired")

    published = ticker.stop()
    wait_for(lambda: published[-1] in shown(tab), "the page has the last event")
    assert shown(tab) == published


def test_a_page_that_was_away_for_longer_than_its_token_lasts_goes_on_trying(
    logged_in: LoggedIn,
    tab: WebDriver,
) -> None:
    server = logged_in.server
    server.terminate()
    expires_at = time.time() + TOKEN_S
    wait_for(lambda: time.time() > expires_at + 1, "its token has expired")
    again = logged_in.restart()

    wait_for(lambda: again.refused("expired") == 1, "the page has come back")
    assert tab.execute_script("return source.readyState === EventSource.CONNECTING")
    assert again.refused("forbidden") == 0


def test_who_logs_out_listens_on_until_the_token_expires_and_no_longer(
    logged_in: LoggedIn,
    tab: WebDriver,
) -> None:
    server = logged_in.server

    request(tab, "/logout", "POST")
    logged_out_at = time.monotonic()
    wait_for(lambda: server.streams() == 0, "the stream has ended")
    listened_on_s = time.monotonic() - logged_out_at

    assert listened_on_s < TOKEN_S + 2
    wait_until_closed(tab)


def test_a_token_in_the_url_that_is_renewed_loses_nothing(
    own_redis: RedisProcess,
    start: Start,
    tab: WebDriver,
) -> None:
    flask = pytest.importorskip("flask")
    server = start(
        *("--retry", "500"),
        redis=own_redis,
        SSEPUSH_SECRET=SECRET,
    )
    ticker = Ticker(server, "private-7")

    def token() -> str:
        """Takes until another event has been published, for which the page has no stream."""
        number = len(ticker.published)
        wait_for(lambda: len(ticker.published) > number, "another event")
        return ssepush.sign("private-7", ttl=TOKEN_S, secret=SECRET)

    app = flask.Flask("tokens")
    app.add_url_rule("/token", view_func=token)
    listen = example(GUIDE, "How is a token in the URL renewed?", "js")
    listen = listen.replace("/stream?", f"{server.url}/stream?")

    with served(app) as origin:
        run_script(tab, f"{origin}/token", f'{listen}; listen("{token()}")')
        wait_for(lambda: server.closed("expired") >= 3, "three tokens have expired")
        published = ticker.stop()
        wait_for(lambda: published[-1] in shown(tab), "the page has the last event")

        first = published.index(shown(tab)[0])
        assert shown(tab) == published[first:]


FROM = {
    '{ lastEventId: "earliest" }': ["one", "two", "three"],
    "{ last: 2 }": ["two", "three"],
}


@pytest.mark.parametrize("begin", FROM)
def test_a_page_that_is_opened_with_an_expired_token_renews_it_and_gets_what_it_asked_for(
    begin: str,
    own_redis: RedisProcess,
    start: Start,
    tab: WebDriver,
) -> None:
    server = start(redis=own_redis, SSEPUSH_SECRET=SECRET)
    for data in ("one", "two", "three"):
        server.publish(data, "private-7")
    expired = ssepush.sign("private-7", ttl=-60, secret=SECRET)
    renewed = ssepush.sign("private-7", secret=SECRET)
    listen = example(GUIDE, "How is a token in the URL renewed?", "js")
    listen = listen.replace("/stream?", f"{server.url}/stream?")

    with Site({"/": lambda: "", "/token": lambda: renewed}) as site:
        run_script(tab, site.url, f'{listen}; listen("{expired}", {begin})')
        wait_until_open(server)
        server.publish("live", "private-7")
        wait_for(lambda: shown(tab)[-1:] == ["live"], "the page has what is live")

        assert shown(tab) == [*FROM[begin], "live"]
    assert server.refused("expired") == 1


# ── Guide: history and publishing ────────────────────────────────────────────────────────────────────────────────────


def test_the_histories_size_is_set_in_the_environment(
    own_server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for line in example(GUIDE, "How large must the history be?", "sh").splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        monkeypatch.setenv(name, value)

    for number in range(1005):
        ssepush.publish(number, channel="many")

    stream = own_server.stream("many", query="lastEventId=earliest")
    assert stream.next().data == "5"


def test_a_key_makes_publishing_again_safe(own_server: ServerProcess) -> None:
    stream = own_server.opened("orders")
    heading = "How do I publish again safely?"
    names = names_in(example(GUIDE, heading, "python"))
    by_command, by_curl = example(GUIDE, heading, "sh").splitlines()

    sent_data = {"order": 7, "state": "sent"}
    again = names["publish_surely"](sent_data, key="order-7-sent")
    printed = shell(by_command, own_server)
    printed_again = shell(f"{by_command} 2>&1", own_server)
    answer = json.loads(shell(by_curl, own_server))

    assert again == 0
    assert again.duplicate
    assert again.id == names["event"].id
    assert printed == "1\n"
    prose = BLOCK.sub("", section(GUIDE, heading))
    (said,) = re.findall("`(ssepush: .* ID)`", prose)
    assert printed_again.splitlines() == ["0", said.replace("ID", answer["id"])]
    assert answer["receivers"] == 0
    assert answer["duplicate"]
    own_server.publish("last", "orders")
    sent, paid, last = stream.take(3)
    assert sent.json == sent_data
    assert sent.id == again.id
    assert paid.json["state"] == "paid"
    assert paid.id == answer["id"]
    assert last.data == "last"


# ── Guide: examples ──────────────────────────────────────────────────────────────────────────────────────────────────


def is_excerpt(shown: str, path: Path) -> bool:
    """Whether these lines stand in the file one after the other, perhaps further to the right."""
    lines = path.read_text().splitlines(keepends=True)
    length = len(shown.splitlines())
    for first in range(len(lines)):
        passage = "".join(lines[first : first + length])
        if textwrap.dedent(passage) == shown:
            return True
    return False


def test_the_guide_shows_the_minimal_page_whole_and_of_each_other_example_an_excerpt() -> None:
    text = section(GUIDE, "Is there a whole program to start from?")
    names = re.findall(r"\(\.\./examples/(.*)\)", text)
    blocks = [block[2] for block in BLOCK.finditer(text)]

    folder = HERE / "examples"
    assert set(names) == {path.name for path in folder.iterdir() if path.is_file()}
    assert blocks[0] == (folder / "minimal.html").read_text()
    for name, block in zip(names, blocks, strict=True):
        assert is_excerpt(block, folder / name), name


# ── Reference ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_reference_has_every_request() -> None:
    paths = set()
    for request in first_codes(REFERENCE, "Requests"):
        _, path = request.split()
        paths.add(path)

    assert paths == ssepush.Handler.routes.keys()


def test_the_reference_has_every_parameter_of_stream(server: ServerProcess) -> None:
    documented = first_codes(REFERENCE, "Parameters of /stream")

    refused = server.get("/stream?channels=a")

    _, _, taken = refused.error.removesuffix(" meant?").partition("is one of ")
    assert documented == set(taken.split(", "))


def test_what_the_reference_calls_a_near_miss_is_refused_by_name(server: ServerProcess) -> None:
    text = section(REFERENCE, "Parameters of /stream")
    _, _, near_misses = text.partition("near misses")

    for name in codes(near_misses):
        answer = server.get(f"/stream?{name}=1")
        assert answer.status == 400
        assert repr(name) in answer.error


def test_the_reference_has_every_member_of_publish(server: ServerProcess) -> None:
    members = {
        "data": "x",
        "channel": "members",
        "type": "greet",
        "retry": 5000,
        "key": f"{server.port}",
    }

    taken = server.post(members)
    refused = server.post({**members, "other": 1})

    assert first_codes(REFERENCE, "Members of /publish") == members.keys()
    assert taken.status == 200
    assert refused.error == "unknown member 'other'"


def test_the_reference_has_every_status() -> None:
    documented = []
    for row in rows(section(REFERENCE, "Answers")):
        documented += row[0].split(", ")

    in_code = re.findall(r"HTTPError\((\d+)", SOURCE)
    assert documented == sorted(set(in_code))


@pytest.mark.parametrize(
    ("message", "wire"),
    rows(section(REFERENCE, "Messages")),
    ids=["object", "all members", "text", "number"],
)
def test_a_message_goes_over_the_wire_as_the_reference_says(
    message: str,
    wire: str,
    server: ServerProcess,
    channel: str,
) -> None:
    stream = server.opened(channel)
    before = len(stream.body)

    server.redis.publish(channel, codes(message)[0])

    stream.next()
    lines = stream.body[before:].decode().splitlines()
    assert lines == [*codes(wire), ""]


def test_help_has_every_default_and_the_reference_names_no_option_that_is_not_there() -> None:
    settings = ssepush.Settings()
    taken: set[str] = set()
    for action in ssepush.command_line()._actions:
        default = getattr(settings, action.dest, None)
        taken.update(action.option_strings)
        if type(default) in (int, float) and default:
            mib = f"{default // 2**20:g} MiB"
            assert f"({default:g})" in str(action.help) or f"({mib})" in str(action.help), action.dest

    documented = set(re.findall(r"`(--[a-z-]+)`", section(REFERENCE, "Options")))

    assert documented
    assert documented <= taken


def test_the_reference_has_every_variable_of_the_environment() -> None:
    name = "SSEPUSH_[A-Z_]*[A-Z]|REDIS_URL"

    documented = re.findall(name, section(REFERENCE, "Options"))
    in_code = re.findall(f'"({name})"', SOURCE)
    of_settings = {f"SSEPUSH_{setting.upper()}" for setting in ssepush.ENVIRONMENT}
    assert set(documented) == {*in_code, *of_settings}


def test_every_metric_has_its_help_and_the_reference_names_none_that_is_not_there(own_server: ServerProcess) -> None:
    documented = set(re.findall(r"`(\w+_(?:total|seconds|bytes)|subscribers)`", section(REFERENCE, "Metrics")))
    stream = own_server.opened()
    own_server.publish("sent and counted")
    own_server.redis.publish("sse", b"\xff")
    stream.next()
    own_server.stream(query="lastEventId=foreign").next()
    own_server.get("/stream?channel=private-7")
    stream.close()
    wait_for(lambda: own_server.closed("gone"), "the stream is gone")

    text = own_server.get("/metrics").body.decode()

    types = re.findall(r"^# TYPE ssepush_(\w+) \w+$", text, re.MULTILINE)
    helped = re.findall(r"^# HELP ssepush_(\w+) \S.*$", text, re.MULTILINE)
    assert helped == types
    assert documented
    assert documented <= set(types)


def test_the_reference_says_why_streams_end() -> None:
    documented = first_codes(REFERENCE, "Why streams end")

    assert documented == ssepush.REASONS.keys()


def interrupted_publish(redis: RedisProcess) -> int:
    """The status of `publish` that is ended by Ctrl-C while it waits for the next line."""
    process = subprocess.Popen(
        ssepush_command("publish", "a", "-"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment_with(REDIS_URL=redis.url),
    )
    with process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"one line\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"0\n"
        process.send_signal(signal.SIGINT)
        return process.wait(DEADLINE_S)


def test_the_statuses_are_those_of_the_reference(own_redis: RedisProcess) -> None:
    nowhere = f"redis://{LOOPBACK}:{free_port()}/0"

    command = ("publish", "a", "b")

    published = run(*command, REDIS_URL=own_redis.url)
    away = run(*command, REDIS_URL=nowhere)
    wrong = run(*command, "--history", "many")

    statuses = [
        published.returncode,
        away.returncode,
        wrong.returncode,
        interrupted_publish(own_redis),
    ]
    text = section(REFERENCE, "Commands and exit statuses")
    documented = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert documented == [str(status) for status in statuses]


def definition_of(name: str) -> str:
    """The head of a function without annotations: `position(redis_url=None)`."""
    source = inspect.getsource(getattr(ssepush, name))
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"{name}({ast.unparse(function.args)})"


def test_the_reference_has_the_functions_and_classes_as_they_are() -> None:
    for row in rows(section(REFERENCE, "Python")):
        (code,) = codes(row[0])
        name, parenthesis, _ = code.partition("(")
        if parenthesis:
            documented = code.replace("1048576", "MAX_EVENT_BYTES")
            documented = documented.replace('"', "'")
            assert documented == definition_of(name)
        else:
            assert inspect.isclass(getattr(ssepush, name))


# ── Promises and changes ─────────────────────────────────────────────────────────────────────────────────────────────


Provoke = Callable[[Start, RedisProcess], EventStream]


def reason_of(provoke: Provoke) -> str:
    """The reason that a function provokes, which has its name."""
    return provoke.__name__.replace("_", "-")


def trimmed(start: Start, redis: RedisProcess) -> EventStream:
    server = start("--history", "1", redis=redis)
    first = server.publish_id("one")
    server.publish("two")
    server.publish("three")
    return server.stream(query=f"lastEventId={first}")


def expired(start: Start, redis: RedisProcess) -> EventStream:
    server = start("--history-ttl", "1", redis=redis)
    first = server.publish_id("one")
    server.publish("two")
    wait_for(lambda: not redis.client.exists(f"{ssepush.HISTORY_KEY}sse"), "the history has expired")
    return server.stream(query=f"lastEventId={first}")


def data_lost(start: Start, redis: RedisProcess) -> EventStream:
    server = start(redis=redis)
    first = server.publish_id("one")
    redis.client.flushall()
    return server.stream(query=f"lastEventId={first}")


def unknown_id(start: Start, redis: RedisProcess) -> EventStream:
    return start(redis=redis).stream(query="lastEventId=foreign")


def history_off(start: Start, redis: RedisProcess) -> EventStream:
    server = start("--history", "0", redis=redis)
    return server.stream(query="lastEventId=1795542364019268")


def too_large(start: Start, redis: RedisProcess) -> EventStream:
    server = start(redis=redis)
    stream = server.opened()
    redis.publish("sse", "x" * 2**21)
    return stream


def too_much(start: Start, redis: RedisProcess) -> EventStream:
    server = start("--max-backlog", str(2**20), redis=redis)
    first = server.publish_id("one")
    for name in ("sse", "sse:news") * 10:
        server.publish("x" * 90_000, name)
    return server.stream("sse", "sse:news", query=f"lastEventId={first}")


def missed(start: Start, redis: RedisProcess) -> EventStream:
    server = start(redis=redis)
    stream = server.opened()
    lost = int(stream.last_event_id) + 1
    redis.publish_event("sse", data="what came after it", id=str(lost + 1), previous=str(lost))
    return stream


PROVOKED = [trimmed, expired, data_lost, unknown_id, history_off, too_large, too_much, missed]


@pytest.mark.parametrize("provoke", PROVOKED)
def test_a_stream_is_reset_for_each_reason_that_is_promised(
    provoke: Provoke,
    start: Start,
    own_redis: RedisProcess,
) -> None:
    stream = provoke(start, own_redis)

    event = stream.next()
    assert event.type == "stream-reset"
    assert event.json == {"reason": reason_of(provoke)}


def test_the_promises_have_every_reason_for_a_reset() -> None:
    documented = first_codes(PROMISES, "When is a stream reset?")

    provoked = map(reason_of, PROVOKED)
    assert documented == set(provoked)


# ── All pages ────────────────────────────────────────────────────────────────────────────────────────────────────────


def anchors(page: Path) -> set[str]:
    """Those of its headings, as GitHub names them."""
    found = set()
    for heading in HEADING.findall(page.read_text()):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(words.replace(" ", "-"))
    return found


PAGE_NAMES = [str(page.relative_to(HERE)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []

    for link in links(page):
        target = target_of(page, link)
        anchor = link.partition("#")[2]
        if not target.exists():
            broken.append(link)
            continue
        if anchor and anchor not in anchors(target):
            broken.append(link)

    assert broken == []


def test_every_page_is_reached_from_readme() -> None:
    reached: set[Path] = set()
    waiting = [README]

    while waiting:
        page = waiting.pop()
        is_page = page in PAGES
        if is_page and page not in reached:
            reached.add(page)
            waiting.extend(targets_of(page))

    assert reached == set(PAGES)
