"""Publishing from programs: the examples that the docs show, as they are, flask-sse, and ssepush.publish() itself."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ssepush
from tests import kit
from tests.test_docs import names_in, shown


class Place:
    """Where a program publishes: a server, a Redis that it may use besides, and a folder of its own."""

    def __init__(self, server: kit.ServerProcess, redis: kit.RedisProcess, folder: Path) -> None:
        self.server = server
        self.redis = redis
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []
        self.environment = kit.environment_with(
            REDIS_URL=server.redis.url,
            SSEPUSH=server.url,
            CELERY_BROKER_URL=redis.url,
            PYTHONPATH=f"{kit.HERE}:{folder}",
            PATH=f"{folder}:{os.environ['PATH']}",
        )
        command = folder / "ssepush"  # as pip makes it
        command.write_text(f'#!/bin/sh\nexec {shlex.join(kit.ssepush_command())} "$@"\n')
        command.chmod(0o755)

    def run(self, *command: str) -> str:
        """What a program that ends well prints."""
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=kit.DEADLINE_S, env=self.environment, cwd=self.folder
        )
        assert done.returncode == 0, done
        return done.stdout

    def start(self, *command: str) -> None:
        """A program that runs until the end of the test."""
        self.started.append(subprocess.Popen(command, env=self.environment, cwd=self.folder))

    def end(self) -> None:
        for process in self.started:
            process.terminate()
            process.wait(kit.DEADLINE_S)


@pytest.fixture
def place(
    server: kit.ServerProcess, own_redis: kit.RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    monkeypatch.setenv("REDIS_URL", server.redis.url)  # as a deployed app's is
    place = Place(server, own_redis, tmp_path)
    yield place
    place.end()


# ── One table: each framework and language ───────────────────────────────────────────────────────────────────────────


def flask(place: Place) -> None:
    pytest.importorskip("flask")
    app = names_in(shown("from flask import", "ssepush.publish("))["app"]
    answer = app.test_client().post("/orders", json={"item": "tea"})
    assert answer.json == {"state": "ok", "pages": 1}


DJANGO = """
import pathlib, sys, types
import django
from django.conf import settings
database = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
settings.configure(DATABASES={"default": database}, USE_TZ=True)
django.setup()

from django.db import connection, models, transaction
class Order(models.Model):
    item = models.TextField()
    class Meta:
        app_label = "shop"

shop = sys.modules["shop"] = types.ModuleType("shop")
shop.__path__ = ["."]
sys.modules["shop.models"] = sys.modules["__main__"]
import shop.signals
with connection.schema_editor() as editor:
    editor.create_model(Order)
try:
    with transaction.atomic():
        Order.objects.create(item="taken back")
        raise ValueError
except ValueError:
    pass
with transaction.atomic():
    order = Order.objects.create(item="tea")
    order.save()
"""


def django(place: Place) -> None:
    pytest.importorskip("django")
    (place.folder / "signals.py").write_text(shown("transaction.on_commit"))
    place.run(sys.executable, "-c", DJANGO)


def celery(place: Place) -> None:
    pytest.importorskip("celery")
    (place.folder / "reports.py").write_text(shown("from celery import"))
    options = ["-A", "reports", "worker", "--concurrency", "2", "--loglevel", "warning"]
    place.start(sys.executable, "-m", "celery", *options)
    place.run(sys.executable, "-c", "import reports; reports.make_report.delay(3)")


def script(place: Place) -> None:
    """And is told when Redis is away."""
    command = [sys.executable, "-c", shown("except ssepush.RedisAway", "sys.exit")]
    nowhere = {**place.environment, "REDIS_URL": f"redis://127.0.0.1:{kit.free_port()}/0"}
    away = subprocess.run(command, capture_output=True, text=True, timeout=kit.DEADLINE_S, env=nowhere)
    assert away.returncode == 1
    assert re.fullmatch(r"nobody was told: [^\n]+\n", away.stderr)
    assert re.fullmatch("event [0-9]{16} reached 1 subscribers\n", place.run(*command))


def shell(place: Place) -> None:
    for name in ("redis-cli", "curl"):
        kit.program(name)
    printed = place.run("sh", "-ec", shown("ssepush publish ops", "redis-cli", "curl"))
    assert '"receivers": 1' in printed.splitlines()[-1]


def php(place: Place) -> None:
    connect = f'$redis = new Redis(); $redis->connect("127.0.0.1", {place.server.redis.port});'
    example = shown("file_get_contents(", "$redis->publish").replace("127.0.0.1:5000", f"127.0.0.1:{place.server.port}")
    place.run(kit.program("php"), "-r", connect + example)


def flask_sse(place: Place) -> None:
    """Its own publish(), in a real application."""
    sse = pytest.importorskip("flask_sse").sse
    app = pytest.importorskip("flask").Flask("app")
    app.config["REDIS_URL"] = place.server.redis.url
    app.register_blueprint(sse, url_prefix="/stream")
    with app.app_context():
        sse.publish({"a": "Hello!"}, type="greeting", channel="flask-sse")
        sse.publish("plain", channel="flask-sse")
        sse.publish("一\n二", type="new_answers", channel="flask-sse")
        sse.publish([1, None, "é"], type="t", id="seven", retry=4321, channel="flask-sse")


ITEM = ("order_placed", '{"item": "tea"}')
IN_PYTHON = [("greeting", '{"a": "Hello!"}'), ("message", "plain"), ("new_answers", "一\n二"), ("t", '[1, null, "é"]')]
IN_SHELL = [("backup", "by redis-cli"), ("backup", "by ssepush"), ("disk", ""), ("disk", ""), ("message", "by curl")]
PUBLISHERS: dict[Callable[[Place], None], tuple[str, list[tuple[str, str]]]] = {
    flask: ("orders", [ITEM]),
    django: ("orders", [("order_placed", '{"order": 1}'), ("order_changed", '{"order": 1}')]),
    celery: ("reports", [("progress", f'{{"done": {done}, "of": 3}}') for done in (1, 2, 3)]),
    script: ("ops", [("backup", "backup is done")]),
    shell: ("ops", IN_SHELL),
    php: ("orders", [ITEM, ITEM]),
    flask_sse: ("flask-sse", IN_PYTHON),
}


@kit.one_way
@pytest.mark.parametrize("publisher", PUBLISHERS)
def test_a_program_publishes_as_the_docs_say(publisher: Callable[[Place], None], place: Place) -> None:
    channel, expected = PUBLISHERS[publisher]
    stream = place.server.stream(channel)

    publisher(place)

    events = stream.take(len(expected))
    for event, (type_, data) in zip(events, expected, strict=True):
        assert (event.type, event.data) == (type_, data or event.data)
    if publisher is flask_sse:
        assert (events[-1].id, stream.parser.retry_ms) == ("seven", 4321)


# ── Threads, forks, and a Redis that was restarted ───────────────────────────────────────────────────────────────────

FORKS_WHILE_ALL_CONNECTIONS_ARE_IN_USE = """
import os, sys, threading
import redis
import ssepush

def files():
    return len(os.listdir("/proc/self/fd"))

def begin(data):
    threads = [threading.Thread(target=ssepush.publish, args=(data,), kwargs={"channel": "forked"}) for _ in range(40)]
    for thread in threads:
        thread.start()
    return threads

def end(threads):
    for thread in threads:
        thread.join()

ssepush.publish("first", channel="forked")
redis.Redis.from_url(os.environ["REDIS_URL"]).client_pause(1000)
idle = files()
parents = begin("parent")
while files() < idle + 31:  # with the one that is there already, as many as there may be
    pass
child = os.fork()
if not child:
    end(begin("child"))
    os._exit(0)
_, status = os.waitpid(child, 0)
end(parents)
end(begin("after"))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_process_that_is_forked_has_connections_of_its_own(
    own_redis: kit.RedisProcess, start: kit.Start, tmp_path: Path
) -> None:
    place = Place(start(redis=own_redis), own_redis, tmp_path)
    with place.server.opened("forked") as stream:
        place.run(sys.executable, "-c", FORKS_WHILE_ALL_CONNECTIONS_ARE_IN_USE)

        events = stream.take(121)

    assert len({event.id for event in events}) == 121
    assert sorted(event.data for event in events) == sorted(["first", *["parent", "child", "after"] * 40])


def test_more_threads_than_pooled_connections_can_publish_at_once(server: kit.ServerProcess, channel: str) -> None:
    stream = server.stream(channel)

    def publish(thread: int) -> list[ssepush.Published]:
        return [ssepush.publish([thread, number], channel=channel, redis_url=server.redis.url) for number in range(10)]

    with ThreadPoolExecutor(40) as pool:
        published = [event for events in pool.map(publish, range(40)) for event in events]
    events = stream.take(400)

    assert {event.id for event in events} == {event.id for event in published}
    assert set(published) == {1}
    of_threads: dict[Any, list[Any]] = {}
    for event in events:
        thread, number = event.json
        of_threads.setdefault(thread, []).append(number)
    assert of_threads == {thread: list(range(10)) for thread in range(40)}


def test_publish_works_again_after_redis_was_restarted(own_redis: kit.RedisProcess) -> None:
    ssepush.publish("before", redis_url=own_redis.url)

    own_redis.kill()
    with pytest.raises(ssepush.RedisAway):
        ssepush.publish("between", redis_url=own_redis.url)
    own_redis.start()

    assert ssepush.publish("after", redis_url=own_redis.url) == 0
