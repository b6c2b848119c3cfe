"""The documentation: its code runs as it stands, its names and tables are the code's, its links lead somewhere.

Nothing depends on where something stands or how it is worded: code is found by what it does, tables by what they list.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import json
import re
import shlex
import subprocess
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ssepush
from tests import kit
from tests.browser import Browser, Site, text_of

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

DOCS = kit.HERE / "docs"
EXAMPLES = kit.HERE / "examples"
README = kit.HERE / "README.md"
CHANGES = kit.HERE / "CHANGELOG.md"
TRANSLATIONS = sorted(DOCS.glob("README.*.md"))
PAGES = [README, *(page for page in sorted(DOCS.glob("*.md")) if page not in TRANSLATIONS)]
ALL_PAGES = [*PAGES, CHANGES, *TRANSLATIONS, *sorted(DOCS.glob("*/*.md"))]
MOST_LINES_OF_README = 120
MOST_LINES = 1800
SOURCE = (kit.HERE / "ssepush.py").read_text()


# ── Reading the documentation ────────────────────────────────────────────────────────────────────────────────────────

HEADING = re.compile(r"^#+ (.*)\n", re.MULTILINE)
BLOCK = re.compile(r"^( *)```([a-z]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^\|.*\|\n\| ?---.*\n((?:\|.*\|\n)*)", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks_of(*pages: Path) -> list[tuple[str, str]]:
    """The languages and the texts of the code that these pages show."""
    found = []
    for page in pages:
        for _, language, text in BLOCK.findall(page.read_text()):
            found.append((language, textwrap.dedent(text)))
    return found


def shown(*marks: str, pages: Iterable[Path] = PAGES) -> str:
    """The first piece of code on our pages that holds all of this."""
    for _, text in blocks_of(*pages):
        if all(mark in text for mark in marks):
            return text
    raise AssertionError(f"no page shows code with {marks}")


def shown_line(*marks: str) -> str:
    """The first line of it that does."""
    return next(line for line in shown(*marks).splitlines() if all(mark in line for mark in marks))


def codes(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def tables() -> list[list[list[str]]]:
    """The tables of our pages: the cells of each row, without the head."""
    found = []
    for page in PAGES:
        for table in TABLE.findall(f"{page.read_text()}\n"):
            lines = table.replace(r"\|", "/").splitlines()
            found.append([[cell.strip() for cell in line.strip("|").split("|")] for line in lines])
    return found


def named_in(cell: str) -> list[str]:
    """The names in a cell: `/stream` of `GET /stream`, `sign` of `sign(*channels)`; or its words, as in `411, 413`."""
    names = [re.sub(r"^[A-Z]+ (?=/)|[({?].*", "", code) for code in codes(cell)]
    return names or cell.split(", ")


def links_of(page: Path) -> list[str]:
    """Where it leads within the project."""
    text = BLOCK.sub("", page.read_text())
    return [link for link in LINK.findall(text) if "://" not in link]


def target_of(page: Path, link: str) -> Path:
    """The file that a link of this page means."""
    path = link.partition("#")[0]
    return (page.parent / path).resolve() if path else page


# ── All pages ────────────────────────────────────────────────────────────────────────────────────────────────────────


def anchors_of(page: Path) -> set[str]:
    """Those of its headings, as GitHub names them."""
    headings = HEADING.findall(page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=[str(page.relative_to(kit.HERE)) for page in ALL_PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    def is_broken(link: str) -> bool:
        target, anchor = target_of(page, link), link.partition("#")[2]
        return not target.exists() or bool(anchor and anchor not in anchors_of(target))

    assert [link for link in links_of(page) if is_broken(link)] == []


def test_readme_leads_to_every_page_and_every_example() -> None:
    reached: set[Path] = set()
    waiting = [README]

    while waiting:
        target = waiting.pop()
        if target not in reached:
            reached.add(target)
            waiting += [target_of(target, link) for link in links_of(target)] if target.suffix == ".md" else []

    examples = {path for path in EXAMPLES.iterdir() if path.is_file()}
    assert reached >= {*ALL_PAGES, *examples}


def test_readme_is_short_sets_up_with_two_commands_and_names_the_version_of_the_code() -> None:
    lines = README.read_text().splitlines()

    assert sum(line.startswith("python3 -m venv .venv") for line in lines) == 2
    assert len(lines) <= MOST_LINES_OF_README
    assert sum(len(page.read_text().splitlines()) for page in PAGES) <= MOST_LINES
    for page in (README, *TRANSLATIONS, CHANGES):
        versions = re.findall(r"^(?:ssepush|##) (\d\S+)", page.read_text(), re.MULTILINE)
        assert versions[0] == ssepush.__version__


@pytest.mark.parametrize("page", TRANSLATIONS, ids=[page.stem for page in TRANSLATIONS])
def test_a_translation_of_readme_has_the_same_code_figures_and_links(page: Path) -> None:
    def code_and_figures(page: Path) -> list[Any]:
        code = [re.sub("(^| +)(//|# ).*", "", text, flags=re.MULTILINE) for _, text in blocks_of(page)]
        rows = re.findall(r"^\|[^|]*\|(.*)", page.read_text(), re.MULTILINE)
        return [code, [re.findall(r"\d[\d,.]*", row) for row in rows]]

    def targets(page: Path) -> set[Path]:
        return {target_of(page, link) for link in links_of(page)} - {README, *TRANSLATIONS}

    assert code_and_figures(page) == code_and_figures(README)
    assert targets(page) == targets(README)


# ── Names and tables ─────────────────────────────────────────────────────────────────────────────────────────────────

PROSE = "\n".join(page.read_text() for page in PAGES)
COMMAND = re.compile(r"^(?!podman build).*?(?:[ /(]|^)ssepush(?:\.py)? ([^|&)\n]+)|^SSEPUSH_OPTIONS=(.*)", re.MULTILINE)


def test_every_option_that_is_named_is_one_and_every_command_can_be_understood() -> None:
    pages = [page for page in PAGES if page.stem != "inside"]  # which adds one, as the tutorial's tests do
    named = [code.split()[0] for page in pages for code in codes(BLOCK.sub("", page.read_text())) if code[:2] == "--"]
    helps = [kit.run(*command, "--help").stdout for command in ((), ("publish",), ("sign",))]
    others = [file.read_text() for file in (kit.DEPLOY / "check.py", *(kit.HERE / "bench").glob("*.py"))]

    assert set(named) <= set(re.findall("--[a-z][a-z-]+", " ".join([*helps, *others])))
    for language, text in blocks_of(*pages):
        for command, options in COMMAND.findall(text) if language == "sh" else ():
            ssepush.command_line().parse_args(shlex.split(command or options, comments=True))


@kit.one_way
def test_every_variable_and_every_metric_that_is_named_is_one(server: kit.ServerProcess) -> None:
    known = kit.run("--help").stdout + (kit.DEPLOY / "ssepush@.service").read_text()
    known += server.get("/metrics").body.decode() + "ssepush_messages_dropped_total"  # comes with the first of its kind

    for name in (r"\bSSEPUSH_[A-Z_]*[A-Z]\b", r"\bssepush_[a-z_]*[a-z]\b(?!\.)"):
        assert set(re.findall(name, PROSE)) <= set(re.findall(name, known))


def test_every_function_and_class_that_is_named_is_there_and_takes_what_is_said() -> None:
    called = re.findall(r"\bssepush\.(\w+)\(|\bssepush\.([A-Z]\w+)", PROSE)
    signatures = [code for table in tables() for row in table for code in codes(row[0]) if re.match(r"\w+\(.+=", code)]

    for name in {function or class_ for function, class_ in called}:
        assert hasattr(ssepush, name), name
    for code in signatures:
        name = code.partition("(")[0]
        assert code.replace("1048576", "MAX_EVENT_BYTES").replace('"', "'") == definition_of(name)


def definition_of(name: str) -> str:
    """The head of a function without annotations: `position(redis_url=None)`."""
    (function,) = ast.parse(inspect.getsource(getattr(ssepush, name))).body
    assert isinstance(function, ast.FunctionDef)
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"{name}({ast.unparse(function.args)})"


def paths(server: kit.ServerProcess) -> set[str]:
    """Those at which there is something."""
    return {path for path in re.findall('"(/[a-z]*)"', SOURCE) if server.get(path, "OPTIONS").status != 404}


def parameters(server: kit.ServerProcess) -> set[str]:
    """Those of /stream: a near miss is told them."""
    refused = server.get("/stream?channels=a")
    assert refused.status == 400
    return set(refused.error.removesuffix("?").partition("did you mean one of ")[2].split(", "))


def members(server: kit.ServerProcess) -> set[str]:
    """Those that /publish takes, but for another name of one of them."""
    maybe = {"data", "channel", "type", "retry", "key", "id", "previous"}
    return {name for name in maybe if b"unknown" not in server.post({"data": 1, "channel": "members", name: []}).body}


def statuses(server: kit.ServerProcess) -> set[str]:
    return set(re.findall(r"HTTPError\((\d+)", SOURCE))


def events(server: kit.ServerProcess) -> set[str]:
    """The types of those that come from ssepush itself."""
    return set(re.findall(r'"((?:stream|token)-(?:position|reset|expired))"', SOURCE))


def reasons(metric: str) -> Callable[[kit.ServerProcess], set[str]]:
    """The reasons that a counter distinguishes."""
    return lambda server: set(re.findall(f'ssepush_{metric}{{reason="(.*)"}}', server.get("/metrics").body.decode()))


LISTED: dict[str, Callable[[kit.ServerProcess], set[str]]] = {
    "requests": paths,
    "parameters of /stream": parameters,
    "members of /publish": members,
    "statuses": statuses,
    "events of ssepush itself": events,
    "why streams are reset": reasons("streams_reset_total"),
    "why streams end": reasons("streams_closed_total"),
    "exit statuses": lambda server: {"0", "1", "2", "130"},
}


@kit.one_way
@pytest.mark.parametrize("what", LISTED)
def test_what_there_is_is_listed_and_nothing_else_beside_it(what: str, server: kit.ServerProcess) -> None:
    there_is = LISTED[what](server)
    listings = [{name for row in table for name in named_in(row[0])} for table in tables()]

    best = max(listings, key=lambda listed: len(listed & there_is) / len(listed | there_is))

    assert best == there_is


ON_THE_WIRE = [
    (codes(row[0])[0], codes(row[1]))
    for table in tables()
    for row in table
    if len(row) == 2 and codes(row[0]) and codes(row[1])[-1:] and codes(row[1])[-1].startswith("data: ")
]


@kit.one_way
@pytest.mark.parametrize(("message", "wire"), ON_THE_WIRE, ids=str)
def test_a_message_goes_over_the_wire_as_is_said(
    message: str, wire: list[str], server: kit.ServerProcess, channel: str
) -> None:
    stream = server.opened(channel)
    before = len(stream.body)

    server.redis.publish(channel, message)

    stream.next()
    assert stream.body[before:].decode().splitlines() == [*wire, ""]


# ── Code that is shown: on the command line, and in Python ───────────────────────────────────────────────────────────


def test_all_code_that_is_shown_can_be_read_by_its_language(tmp_path: Path) -> None:
    """Shell, Python, JSON, and JavaScript, also in pages: whatever else is not run."""
    node = kit.needs("node")
    script = tmp_path / "script.mjs"

    for language, text in blocks_of(*PAGES):
        if language == "python":
            compile(text, "example", "exec")
        elif language == "json":
            json.loads(text)
        elif language == "sh":
            subprocess.run(["sh", "-nc", text], check=True)
        elif language in ("js", "html"):
            scripts = [text] if language == "js" else re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
            for code in scripts:
                script.write_text(f"async function example() {{\n{re.sub('^import .*$', '', code, flags=re.M)}\n}}")
                subprocess.run([node, "--check", script], check=True)


def names_in(python: str) -> dict[str, Any]:
    """The names that an example defines."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(python, "example", "exec"), names)
    return names


@pytest.fixture
def own_server(start: kit.Start, own_redis: kit.RedisProcess, monkeypatch: pytest.MonkeyPatch) -> kit.ServerProcess:
    """A server that nobody else uses, so that examples may use the channels that they name."""
    monkeypatch.setenv("REDIS_URL", own_redis.url)
    return start("--retry", "500", redis=own_redis)


def here(text: str, server: kit.ServerProcess) -> str:
    """An example, with the addresses and programs that it has in the test."""
    ssepush_here = shlex.join(kit.ssepush_command())
    text = text.replace("http://127.0.0.1:5000", server.url).replace("$SSEPUSH/", f"{server.url}/")
    text = text.replace("redis-cli ", f"redis-cli -p {server.redis.port} ")
    text = text.replace(".venv/bin/python ssepush.py", ssepush_here)
    return re.sub("^ssepush ", f"{ssepush_here} ", text)


def shell(line: str, server: kit.ServerProcess) -> str:
    """What a shell prints that runs this line of an example."""
    for name in ("redis-cli", "curl"):
        kit.needs(name)
    command = ["sh", "-ec", here(line, server)]
    environment = kit.environment_with(REDIS_URL=server.redis.url)
    done = subprocess.run(command, capture_output=True, text=True, timeout=kit.DEADLINE_S, env=environment, check=False)
    assert done.returncode == 0, done
    return done.stdout


@contextlib.contextmanager
def reading(line: str, server: kit.ServerProcess, **environment: str) -> Iterator[Iterable[bytes]]:
    """The lines that a shell prints while it runs this line of an example, which does not end by itself."""
    for name in ("redis-cli", "curl"):
        kit.needs(name)
    with kit.running("sh", "-c", f"exec {here(line, server)}", env=kit.environment_with(**environment)) as process:
        assert process.stdout
        yield process.stdout


def until(lines: Iterable[bytes], text: bytes) -> list[bytes]:
    """The lines before the one that holds this text."""
    return list(itertools.takewhile(lambda line: text not in line, lines))


def wait_until_open(server: kit.ServerProcess) -> None:
    """Until Redis has confirmed a page's first stream: whatever is published from then on is for it."""
    kit.wait_for(lambda: server.metric("streams_opened_total"), "the page's stream is open")


def test_the_server_prints_what_is_shown(own_server: kit.ServerProcess) -> None:
    printed = shown(" serves http").replace(" (embedded: its data is lost when ssepush stops)", "")

    printed = printed.replace("http://127.0.0.1:5000", own_server.url)
    printed = printed.replace("redis://127.0.0.1:6379/0", own_server.redis.url)
    printed = printed.replace("redis-cli", f"redis-cli -u {own_server.redis.url}")

    assert printed in own_server.output


def test_the_lines_of_the_article_do_what_is_said(own_server: kit.ServerProcess) -> None:
    lines = shown("redis-cli subscribe sse", "/notifications", "redis-cli publish sse")
    (notify,) = re.findall(r"^curl .*/notifications.*$", lines, re.MULTILINE)
    (subscribe,) = re.findall(r"^redis-cli subscribe .*$", lines, re.MULTILINE)
    (publish,) = re.findall(r"^redis-cli publish .*$", lines, re.MULTILINE)
    stream = own_server.opened()

    notified = json.loads(shell(notify, own_server))
    with reading(subscribe, own_server) as seen:
        kit.wait_for(lambda: own_server.redis.subscribers("sse") == 2, "redis-cli has subscribed")
        reached = shell(publish, own_server).strip()
        assert b"message\n" in until(seen, b'{"data"')

    assert notified == {"state": "ok"}
    assert f"(integer) {reached}" in lines
    for event in stream.take(2):
        assert event.type == "new_answers"
        assert event.json["value"] == "Absolutely, PHP"


def test_readmes_lines_publish(own_server: kit.ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    stream = own_server.opened()

    names_in(shown("ssepush.publish(", pages=[README]))

    event = stream.next()
    assert event.id
    assert event.json == {"question": "tea or coffee?", "value": "tea"}
    assert capsys.readouterr().out.startswith("1 ")


def test_a_key_makes_publishing_again_safe(own_server: kit.ServerProcess) -> None:
    stream = own_server.opened("orders")
    names = names_in(shown("def publish_surely"))
    by_command, by_curl = shown_line("publish orders", "--key"), shown_line("curl", '"key"')
    sent = {"order": 7, "state": "sent"}

    again = names["publish_surely"](sent, key="order-7-sent")
    printed = [shell(by_command, own_server), shell(f"{by_command} 2>&1", own_server)]
    answer = json.loads(shell(by_curl, own_server))
    own_server.publish("last", "orders")

    assert (again, again.duplicate, again.id) == (0, True, names["event"].id)
    assert printed == ["1\n", f"0\nssepush: published before, as {answer['id']}\n"]
    assert "`ssepush: published before, as ID`" in PROSE
    assert (answer["receivers"], answer["duplicate"]) == (0, True)
    events = stream.take(3)
    assert [event.id for event in events[:2]] == [again.id, answer["id"]]
    assert [event.json["state"] for event in events[:2]] == ["sent", "paid"]
    assert events[2].data == "last"


def test_a_private_channel_opens_as_is_shown(start: kit.Start, own_redis: kit.RedisProcess) -> None:
    lines = shown("export SSEPUSH_SECRET", "sign private-7", "curl -N")
    (export,) = re.findall("^export .*$", lines, re.MULTILINE)
    (listen,) = re.findall("^curl -N .*$", lines, re.MULTILINE)
    kit.needs("openssl")
    secret = subprocess.check_output(["sh", "-ec", f'{export}; printf %s "$SSEPUSH_SECRET"'], text=True)
    server = start(redis=own_redis, SSEPUSH_SECRET=secret)

    with reading(listen, server, SSEPUSH_SECRET=secret) as seen:
        wait_until_open(server)
        server.publish("for your eyes only", "private-7")

        assert b"event: stream-position\n" in until(seen, b"eyes")


# ── Code that is shown: in browsers ──────────────────────────────────────────────────────────────────────────────────


def run_script(tab: Browser, address: str, script: str) -> None:
    """Run JavaScript in a page of this address, where `show(…)` keeps what it is given, and each stream is known."""
    tab.get(address)
    tab.execute_script("""
      window.told = [];
      window.sources = [];
      window.show = (one) => told.push(one);
      window.EventSource = class extends EventSource {
        constructor(...args) { super(...args); sources.push(this); }
      };
    """)
    tab.execute_script(script)


def told(tab: Browser) -> list[Any]:
    """What `show` was given."""
    return list(tab.execute_script("return told"))


def has_closed_one(tab: Browser) -> bool:
    """Whether a stream of the page is closed for good."""
    return bool(tab.execute_script("return sources.some((source) => source.readyState === EventSource.CLOSED)"))


def test_readmes_page_shows_what_is_published_and_loads_anew_when_it_is_reset(
    own_server: kit.ServerProcess, tab: WebDriver, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(here(shown("<!doctype html>", 'id="data"', pages=[README]), own_server))
    tab.get(page.as_uri())
    wait_until_open(own_server)

    own_server.publish({"question": "tea?", "value": "yes"}, type="new_answers")
    kit.wait_for(lambda: text_of(tab, "data") == "tea? : yes", "the page shows it")
    own_server.publish("", type="stream-reset")

    kit.wait_for(lambda: text_of(tab, "data") == "received pushed data", "the page was loaded anew")


def test_a_script_hears_the_events_of_all_its_channels_until_it_is_sent_away(
    own_server: kit.ServerProcess, tab: WebDriver
) -> None:
    listen = shown("channel=orders&channel=news")
    leave = shown_line('source.addEventListener("server_closed"', "close()")
    run_script(tab, f"{own_server.url}/healthz", f"{listen}\n{leave}")
    wait_until_open(own_server)

    own_server.publish({"item": "tea"}, "orders", type="order_placed")
    own_server.publish({"item": "unheard of"}, "orders", type="other")
    own_server.redis.publish("news", "plain")
    kit.wait_for(lambda: "plain" in told(tab), "the last event is shown")
    shell(shown_line("redis-cli publish sse", "server_closed").replace("publish sse", "publish news"), own_server)

    kit.wait_for(lambda: has_closed_one(tab), "the page has left")
    assert told(tab) == [{"item": "tea"}, "plain"]


def test_a_page_that_is_rendered_with_its_position_misses_nothing(
    own_server: kit.ServerProcess, tab: WebDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flask")
    code = shown("ssepush.position()", "Flask").replace("/stream?", f"{own_server.url}/stream?")
    client = names_in(code)["app"].test_client()
    page = tmp_path / "orders.html"

    page.write_text(client.get("/orders").text)
    own_server.publish({"number": 1, "state": "eaten"}, "orders", type="order_changed")
    tab.get(page.as_uri())
    kit.wait_for(lambda: text_of(tab, "order-1") == "eaten", "the page has what came before its stream")
    monkeypatch.setenv("SSEPUSH_HISTORY", "0")
    without = client.get("/orders").text

    assert text_of(tab, "order-2") == "sent"
    assert 'lastEventId="' in without


TOKEN_S = 2
SECRET = "a secret of more than sixteen bytes"


FROM = {'{ lastEventId: "earliest" }': ["one", "two", "three"], "{ last: 2 }": ["two", "three"]}


@pytest.mark.parametrize("begin", FROM)
def test_a_token_in_the_url_that_is_renewed_loses_nothing_also_where_the_first_has_expired(
    begin: str, own_redis: kit.RedisProcess, start: kit.Start, tab: WebDriver
) -> None:
    server = start("--retry", "500", redis=own_redis, SSEPUSH_SECRET=SECRET)
    published = ["one", "two", "three"]
    for data in published:
        server.publish(data, "private-7")

    def token() -> str:
        """Takes until another event has been published, for which the page has no stream; but for the first."""
        if server.closed("expired"):
            published.append(f"gap {len(published)}")
            server.publish(published[-1], "private-7")
        return ssepush.sign("private-7", ttl=TOKEN_S, secret=SECRET)

    listen = shown("function listen(token", "token-expired").replace("/stream?", f"{server.url}/stream?")
    expired = ssepush.sign("private-7", ttl=-60, secret=SECRET)
    with Site({"/": lambda: "", "/token": token}) as site:
        run_script(tab, site.url, f'{listen}; listen("{expired}", {begin})')
        kit.wait_for(lambda: server.closed("expired") >= 3, "three tokens have expired")
        # Both go on: at each expiry another event is published.
        kit.wait_for(lambda: told(tab) == [*FROM[begin], *published[3:]], "the page has what came meanwhile, once")
    assert server.refused("expired") == 1
