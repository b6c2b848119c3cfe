"""The guide's answers that need another program around them: each is run as its reader would run it."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ssepush
from tests import kit
from tests.browser import Firefox, Site
from tests.kit import EventStream, RedisProcess, ServerProcess, Start, wait_for
from tests.test_examples import EXAMPLES, content, running_app, wait_for_content, wait_for_words, words

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

GUIDE = (kit.HERE / "docs" / "guide.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECRET = "a secret of more than sixteen bytes"


def block(heading: str, language: str) -> str:
    """The first block in this language below a heading of the guide."""
    below = GUIDE[GUIDE.index(f"# {heading}\n") :]
    return next(found[2] for found in BLOCK.finditer(below) if found[1] == language)


@pytest.fixture
def own_server(start: Start, own_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> ServerProcess:
    """A server that nobody else uses: examples may use the channels that they name."""
    monkeypatch.setenv("REDIS_URL", own_redis.url)
    monkeypatch.setenv("SSEPUSH_SECRET", SECRET)
    return start("--retry", "100", redis=own_redis, SSEPUSH_SECRET=SECRET)


# ── Commands, in a fresh clone ───────────────────────────────────────────────────────────────────────────────────────


def test_no_command_of_the_guide_needs_what_a_fresh_clone_does_not_have() -> None:
    for language, text in BLOCK.findall(GUIDE):
        if language == "sh" and text != block("From the shell", "sh"):  # which has its own path
            assert re.findall(r"(?<![\w/.])(?:python3?|pip|ssepush)\b(?!\.)", text) == []


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what README's first command makes: .venv/bin with python and ssepush."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    commands = {"python": shlex.quote(sys.executable), "ssepush": shlex.join(kit.ssepush_command())}
    for name, command in commands.items():
        wrapper = folder / name
        wrapper.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        wrapper.chmod(0o755)
    (tmp_path / "ssepush.py").symlink_to(kit.HERE / "ssepush.py")
    return tmp_path


def test_the_commands_of_the_shell_publish_in_a_fresh_clone(own_server: ServerProcess, clone: Path) -> None:
    for name in ("redis-cli", "curl"):
        kit.needs(name)
    stream = own_server.opened("ops")
    (path,) = re.findall('`(export PATH="\\$PWD.*)`', GUIDE)
    commands = f"{path}\n{block('From the shell', 'sh')}"
    commands = commands.replace("redis://127.0.0.1:6379", own_server.redis.url)
    commands = commands.replace("http://127.0.0.1:5000", own_server.url)

    subprocess.run(["sh", "-ec", commands], cwd=clone, check=True, timeout=kit.DEADLINE_S, stdout=subprocess.DEVNULL)

    assert stream.take(2)[1].data == "by ssepush"
    wait_for(lambda: "by curl" in stream.next().data, "the last event")


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────

KEEP_WHAT_IS_SHOWN = "window.shown = []; window.show = (data) => shown.push(data);"
HEARTBEAT_S = 0.4


class DeafProxy(kit.RedisProxy):
    """Before the server. From `go_deaf` on it passes nothing on, and keeps what is open; new connections work."""

    deaf: tuple[kit.Link, ...] = ()

    def go_deaf(self) -> None:
        self.deaf = tuple(self._links.values())

    def changed(self, received: bytes, is_from_redis: bool, link: kit.Link) -> bytes:
        return b"" if link in self.deaf else received


def listen(tab: WebDriver, site: Site, port: int) -> None:
    """Run the guide's page."""
    script = block("When does a browser give up?", "js").replace("`/stream", f"`http://{kit.LOOPBACK}:{port}/stream")
    tab.get(site.url)
    tab.execute_script(KEEP_WHAT_IS_SHOWN + script)


def test_the_guides_page_notices_a_dead_stream_and_misses_nothing(
    start: Start, own_redis: RedisProcess, tab: WebDriver
) -> None:
    server = start("--heartbeat", str(HEARTBEAT_S), redis=own_redis)
    with Site({"/": lambda: ""}) as site, DeafProxy(server) as proxy:
        listen(tab, site, proxy.port)
        own_redis.wait_for_subscribers("orders", 1)
        server.publish({"item": "seen"}, "orders", type="order_placed")
        wait_for(lambda: tab.execute_script("return shown.length") == 1, "the page listens")

        proxy.go_deaf()
        server.publish({"item": "missed"}, "orders", type="order_placed")

        wait_for(lambda: tab.execute_script("return shown.length") == 2, "the page is back")
        assert tab.execute_script("return shown") == [{"item": "seen"}, {"item": "missed"}]


def test_the_guides_page_keeps_a_stream_on_which_there_are_only_heartbeats(
    start: Start, own_redis: RedisProcess, tab: WebDriver
) -> None:
    server = start("--heartbeat", str(HEARTBEAT_S), redis=own_redis)
    with Site({"/": lambda: ""}) as site:
        listen(tab, site, server.port)
        own_redis.wait_for_subscribers("orders", 1)

        time.sleep(4 * HEARTBEAT_S)

        server.publish({"item": "tea"}, "orders", type="order_placed")
        wait_for(lambda: tab.execute_script("return shown.length"), "the page has it")
    assert server.metric("streams_opened_total") == 1


# ── Private channels ─────────────────────────────────────────────────────────────────────────────────────────────────


def opens(server: ServerProcess, token: str) -> bool:
    """Whether a token opens channel private-7."""
    with EventStream(server.port, f"/stream?channel=private-7&token={token}") as stream:
        return stream.status == 200 and stream.position() is not None


def printed(*command: str, cwd: Path | None = None) -> str:
    environment = kit.environment_with(SSEPUSH_SECRET=SECRET)
    done = subprocess.run(command, check=True, capture_output=True, timeout=60, env=environment, cwd=cwd)
    return done.stdout.decode().strip()


def test_a_token_that_php_has_signed_opens_its_channel(own_server: ServerProcess) -> None:
    function = block("How do I sign a token in another language?", "php")

    token = printed(kit.needs("php"), "-r", f'{function} echo sign_token(["private-7"], 600);')

    assert opens(own_server, token)


def test_a_token_that_jsonwebtoken_has_signed_opens_its_channel(own_server: ServerProcess, tmp_path: Path) -> None:
    folder = kit.npm_install(tmp_path, "jsonwebtoken@9.0.2")
    (expression,) = re.findall(r"`(jwt\.sign\(.*\))`", GUIDE)

    token = printed(
        kit.needs("node"), "-e", f'const jwt = require("jsonwebtoken"); console.log({expression})', cwd=folder
    )

    assert opens(own_server, token)


DJANGO_SHOP = """
import json
import sys

import django
import ssepush
from django.conf import settings
from django.http import HttpResponse
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="x" * 50,
    ROOT_URLCONF=__name__,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"],
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "shop.middleware.set_token",
    ],
    USE_TZ=True,
)
urlpatterns = [path("", lambda request: HttpResponse("ok"))]
django.setup()

from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import transaction
from django.test import Client

call_command("migrate", verbosity=0)
order = User.objects.create(pk=7, username="seven")
client = Client()


def cookie():
    found = client.get("/").cookies.get("ssepush-token")
    return found and [found.value, bool(found["httponly"]), bool(found["secure"])]


before = cookie()
client.force_login(order)
during = cookie()
client.logout()
client.cookies["ssepush-token"] = during[0]
after = cookie()
try:
    with transaction.atomic():
        COMMIT
        raise ValueError("taken back")
except ValueError:
    pass
with transaction.atomic():
    COMMIT
    ssepush.publish("before the commit", channel="orders")
ssepush.publish("after the commit", channel="orders")
print(json.dumps([before, during, after]))
"""


def test_djangos_middleware_gives_the_token_to_whoever_has_logged_in_and_takes_it_back(
    own_server: ServerProcess, tmp_path: Path
) -> None:
    pytest.importorskip("django")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "middleware.py").write_text(block("How does Django set the cookie?", "python"))
    commit = block("From Django", "python").strip()
    stream = own_server.stream("orders")
    paths = f"{kit.HERE}:{tmp_path}"
    environment = kit.environment_with(PYTHONPATH=paths, SSEPUSH_SECRET=SECRET, REDIS_URL=own_server.redis.url)

    script = DJANGO_SHOP.replace("COMMIT", commit)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    before, during, after = json.loads(done.stdout)
    token, is_http_only, is_secure = during
    assert before is None
    assert is_http_only
    assert is_secure
    assert opens(own_server, token)
    assert after[0] == ""
    first, second, third = stream.take(3)
    assert [first.data, third.data] == ["before the commit", "after the commit"]
    assert (second.type, second.json) == ("order_placed", {"order": 7})


# ── Sharing a Redis ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_with_a_prefix_pages_follow_the_name_without_it(start: Start, own_redis: RedisProcess) -> None:
    serve, publish = block("How do I share a Redis with other programs?", "sh").splitlines()
    prefix = serve.partition(" ")[0].removeprefix("SSEPUSH_PREFIX=")
    server = start(redis=own_redis, SSEPUSH_PREFIX=prefix)
    stream = server.stream("orders")

    command = publish.replace("redis-cli", f"{kit.needs('redis-cli')} -p {own_redis.port}")
    reached = subprocess.run(shlex.split(command), check=True, capture_output=True, timeout=kit.DEADLINE_S)

    assert reached.stdout.strip() == b"1"
    assert stream.next().data == "hello"


# As Laravel's RedisBroadcaster does it: its own prefix, and a script that publishes.
LARAVEL = """
$redis = new Redis();
$redis->connect("127.0.0.1", PORT);
$redis->setOption(Redis::OPT_PREFIX, "shop_");
$message = json_encode(["event" => "OrderPlaced", "data" => ["order" => 7], "socket" => null]);
$script = "for i = 2, #ARGV do redis.call('publish', ARGV[i], ARGV[1]) end";
$redis->eval($script, [$message, "shop_private-user.7"], 0);
$redis->publish("private-user.7", "by the facade");
"""


def test_what_laravel_broadcasts_is_private_and_has_its_name(start: Start, own_redis: RedisProcess) -> None:
    text = GUIDE[GUIDE.index("### From Laravel") :]
    assert {"REDIS_PREFIX=shop_", "--prefix shop_", "private-user.7"} <= set(re.findall("`([^`]+)`", text))
    server = start("--prefix", "shop_", redis=own_redis, SSEPUSH_SECRET=SECRET)
    token = ssepush.sign("private-user.7", secret=SECRET)
    refused = server.get("/stream?channel=private-user.7")
    stream = server.stream("private-user.7", query=f"token={token}")

    printed(kit.needs("php"), "-r", LARAVEL.replace("PORT", str(own_redis.port)))

    assert refused.status == 403
    first, second = stream.take(2)
    assert (first.type, first.json) == ("OrderPlaced", {"order": 7})
    assert second.data == "by the facade"


# ── Publishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_view_publishes_and_knows_whom_it_reached(own_server: ServerProcess) -> None:
    stream = own_server.stream("orders")
    names: dict[str, Any] = {"ssepush": ssepush}

    exec(block("How do I publish from Flask?", "python"), names)

    assert names["reached"] == 1
    assert stream.next().json == {"item": "tea"}


def test_a_coroutine_that_publishes_leaves_the_event_loop_running_while_redis_hangs(own_server: ServerProcess) -> None:
    names: dict[str, Any] = {"asyncio": asyncio, "ssepush": ssepush}
    exec(block("From a coroutine", "python"), names)
    pause_ms = 500
    ssepush.publish("first", channel="orders")  # so that its connection is there
    stream = own_server.stream("orders")

    async def publish_while_redis_hangs() -> int:
        own_server.redis.client.client_pause(pause_ms)
        publishing = asyncio.create_task(names["place_order"]("tea"))
        ticks = 0
        while not publishing.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert publishing.result() == 1
        return ticks

    assert asyncio.run(publish_while_redis_hangs()) >= 20
    assert stream.next().json == {"item": "tea"}


# ── Celery ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Untyped(ast.NodeTransformer):
    """Takes away annotations and docstrings: the guide's lines do without."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        if ast.get_docstring(node):
            del node.body[0]
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node


def test_the_guide_shows_how_the_celery_example_tells_the_page() -> None:
    (shown,) = ast.parse(block("From Celery", "python")).body
    program = ast.parse((EXAMPLES / "celery_app.py").read_text())

    assert ast.unparse(shown) in [ast.unparse(Untyped().visit(statement)) for statement in program.body]


@pytest.fixture
def reports(own_server: ServerProcess, tmp_path: Path) -> Iterator[str]:
    """The example with a worker; its address."""
    pytest.importorskip("celery")
    environment = {
        "STREAM_URL": f"{own_server.url}/stream",
        "REDIS_URL": own_server.redis.url,
        "ROW_S": "0.05",
    }
    worker = [sys.executable, "-m", "celery", "-A", "celery_app:celery", "worker"]
    assert " ".join(worker[2:]) in (EXAMPLES / "celery_app.py").read_text()
    options = ("--concurrency", "2", "--loglevel", "warning")
    paths = f"{kit.HERE}:{EXAMPLES}"
    variables = kit.environment_with(PYTHONPATH=paths, PYTHONDONTWRITEBYTECODE="1", **environment)
    with (
        kit.running(*worker, *options, stderr=subprocess.STDOUT, env=variables, cwd=tmp_path) as process,
        running_app("celery_app.py", tmp_path, kit.free_port(), **environment) as url,
    ):
        yield url
        process.terminate()
        process.wait(kit.DEADLINE_S)


def test_a_page_hears_how_far_its_task_is_and_how_it_has_ended(
    reports: str, own_server: ServerProcess, tab: WebDriver, second_browser: Firefox
) -> None:
    tab.get(reports)
    tab.find_element("id", "start").click()
    wait_for_content(tab, "#state", "SUCCESS: 5 rows, and 20 % each")
    task = tab.current_url.partition("#")[2]
    with own_server.stream(f"answer-{task}", query="lastEventId=earliest") as stream:
        told = [(event.type, event.json) for event in stream.take(6)]
    assert told[:5] == [("progress", {"done": done, "of": 5}) for done in range(1, 6)]
    assert told[5] == ("ended", {"state": "SUCCESS", "result": "5 rows, and 20 % each"})

    second_browser.get(tab.current_url)  # long after it has ended
    wait_for_content(second_browser, "#state", "SUCCESS: 5 rows, and 20 % each")

    tab.find_element("id", "fail").click()
    wait_for_content(tab, "#state", "FAILURE: integer division or modulo by zero")


# ── An LLM's answer ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_that_one_device_stops_is_stopped_on_all(
    own_server: ServerProcess, tab: WebDriver, second_browser: Firefox, tmp_path: Path
) -> None:
    environment = {"STREAM_URL": f"{own_server.url}/stream", "REDIS_URL": own_server.redis.url, "WORDS_PER_S": "20"}
    with running_app("llm_stream.py", tmp_path, kit.free_port(), **environment) as url:
        tab.get(url)
        question = tab.find_element("name", "question")
        question.clear()
        question.send_keys("rivers\n")
        wait_for_words(tab, 5)
        second_browser.get(tab.current_url)
        wait_for_words(second_browser, 10)

        second_browser.execute_script("document.getElementById('stop').click()")

        wait_for_content(tab, "#state", "stopped")
        wait_for_content(second_browser, "#state", "stopped")
        said = words(tab)
        assert said == list(range(1, len(said) + 1))
        assert len(said) < 300
        assert content(tab, "#answer") == content(second_browser, "#answer")
        assert tab.find_elements("id", "stop") == []
        tab.refresh()
        wait_for_content(tab, "#state", "stopped")
        assert words(tab) == said


# ── Examples ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_guide_says_of_each_example_what_it_shows() -> None:
    table = GUIDE[GUIDE.index("# Is there a complete program to start from?") :]

    names = re.findall(r"^\| \[`(.*)`\]\(\.\./examples/\1\) \|", table, re.MULTILINE)

    assert sorted(names) == sorted(path.name for path in EXAMPLES.iterdir() if path.is_file())
