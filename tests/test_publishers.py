"""Publishing from programs: the examples that docs/guide.md shows, as they are, and ssepush.publish()."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import ssepush
from tests.kit import (
    DEADLINE_S,
    HERE,
    RedisProcess,
    ServerProcess,
    Start,
    environment_with,
    free_port,
    program,
    running,
    ssepush_command,
)

# The guide shows these, as they are.
FLASK_EXAMPLE = """\
import ssepush
from flask import Flask, request

app = Flask(__name__)


@app.post("/orders")
def place_order():
    reached = ssepush.publish({"item": request.json["item"]}, type="order_placed", channel="orders")
    return {"state": "ok", "pages": reached}
"""


DJANGO_EXAMPLE = """\
import ssepush
from django.db import transaction
from django.db.models.signals import post_save
from django.dispatch import receiver

from .models import Order


@receiver(post_save, sender=Order)
def order_saved(sender, instance, created, **kwargs):
    type = "order_placed" if created else "order_changed"
    transaction.on_commit(lambda: ssepush.publish({"order": instance.pk}, type=type, channel="orders"))
"""


CELERY_EXAMPLE = """\
import ssepush
from celery import Celery

app = Celery("reports")


@app.task
def make_report(rows):
    for done in range(1, rows + 1):
        ssepush.publish({"done": done, "of": rows}, type="progress", channel="reports")
    return rows
"""


SCRIPT_EXAMPLE = """\
import sys
import ssepush

try:
    event = ssepush.publish("backup is done", type="backup", channel="ops")
except ssepush.RedisAway as error:
    sys.exit(f"nobody was told: {error}")
print(f"event {event.id} reached {event} subscribers")
"""


SHELL_EXAMPLE = """\
redis-cli -u "$REDIS_URL" publish ops '{"data": "by redis-cli", "type": "backup"}'
ssepush publish ops "by ssepush" --type backup
df -h / | ssepush publish ops - --type disk
curl -sS "$SSEPUSH/publish" -H 'Content-Type: application/json' -d '{"channel": "ops", "data": "by curl"}'
"""


PHP_EXAMPLE = """\
file_get_contents("http://127.0.0.1:5000/publish", false, stream_context_create(["http" => [
    "method" => "POST",
    "header" => "Content-Type: application/json\\r\\nAuthorization: Bearer " . getenv("SSEPUSH_PUBLISH_TOKEN"),
    "content" => json_encode(["channel" => "orders", "type" => "order_placed", "data" => ["item" => "tea"]]),
]]));

$redis->publish("orders", json_encode(["type" => "order_placed", "data" => ["item" => "tea"]]));
"""


def names_in(example: str) -> dict[str, Any]:
    """The names that an example defines."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, "example", "exec"), names)
    return names


@pytest.fixture
def redis_url(redis_process: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Redis of the tests, named in the environment as a deployed app's is."""
    monkeypatch.setenv("REDIS_URL", redis_process.url)
    return redis_process.url


@pytest.mark.usefixtures("redis_url")
def test_a_flask_view_publishes(server: ServerProcess) -> None:
    pytest.importorskip("flask")
    stream = server.stream("orders")
    app = names_in(FLASK_EXAMPLE)["app"]

    answer = app.test_client().post("/orders", json={"item": "tea"})

    event = stream.next()
    assert answer.json == {"state": "ok", "pages": 1}
    assert (event.type, event.json) == ("order_placed", {"item": "tea"})


DJANGO_APP = {
    "__init__.py": "",
    "apps.py": """
from django.apps import AppConfig


class ShopConfig(AppConfig):
    name = "shop"

    def ready(self):
        import shop.signals
""",
    "models.py": """
from django.db import models


class Order(models.Model):
    item = models.TextField()
""",
    "signals.py": DJANGO_EXAMPLE,
    "run.py": """
import django
from django.conf import settings

database = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
settings.configure(INSTALLED_APPS=["shop.apps.ShopConfig"], DATABASES={"default": database}, USE_TZ=True)
django.setup()

from django.db import connection, transaction
from shop.models import Order

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
""",
}


def test_a_django_app_publishes_what_was_committed(
    server: ServerProcess,
    redis_url: str,
    tmp_path: Path,
) -> None:
    pytest.importorskip("django")
    stream = server.stream("orders")
    (tmp_path / "shop").mkdir()
    for name, text in DJANGO_APP.items():
        (tmp_path / "shop" / name).write_text(text)
    environment = environment_with(REDIS_URL=redis_url, PYTHONPATH=f"{HERE}:{tmp_path}")

    subprocess.run(
        [sys.executable, "-m", "shop.run"],
        check=True,
        timeout=DEADLINE_S,
        env=environment,
    )

    events = stream.take(2)
    assert [event.type for event in events] == ["order_placed", "order_changed"]
    assert events[0].data == events[1].data == '{"order": 1}'


def test_a_celery_task_publishes(
    server: ServerProcess, own_redis: RedisProcess, redis_url: str, tmp_path: Path
) -> None:
    pytest.importorskip("celery")
    stream = server.stream("reports")
    (tmp_path / "reports.py").write_text(CELERY_EXAMPLE)
    paths = f"{HERE}:{tmp_path}"
    environment = environment_with(
        REDIS_URL=redis_url,
        CELERY_BROKER_URL=own_redis.url,
        PYTHONPATH=paths,
    )
    options: dict[str, Any] = {
        "cwd": tmp_path,
        "env": environment,
    }

    worker = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "reports",
        "worker",
        "--concurrency",
        "2",
        "--loglevel",
        "warning",
    ]
    with running(*worker, stderr=subprocess.STDOUT, **options) as process:
        delay = "import reports; reports.make_report.delay(3)"
        subprocess.run(
            [sys.executable, "-c", delay],
            check=True,
            timeout=DEADLINE_S,
            **options,
        )
        events = stream.take(3)
        process.terminate()
        process.wait(DEADLINE_S)

    assert [event.json for event in events] == [{"done": done, "of": 3} for done in (1, 2, 3)]


def test_forked_workers_publish(server: ServerProcess, redis_url: str) -> None:
    stream = server.stream("forked")
    program = """
import os
import ssepush


def publish(number):
    for done in range(number):
        ssepush.publish(done, channel="forked")


publish(1)  # the connection that the workers must not share
workers = []
for _ in range(4):
    worker = os.fork()
    if not worker:
        publish(50)
        os._exit(0)
    workers.append(worker)
publish(50)
assert not any(os.waitpid(worker, 0)[1] for worker in workers)
"""
    environment = environment_with(REDIS_URL=redis_url, PYTHONPATH=str(HERE))

    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        timeout=DEADLINE_S,
        env=environment,
    )

    events = stream.take(251)
    assert len({event.id for event in events}) == 251
    assert sorted(int(event.data) for event in events) == sorted([0, *list(range(50)) * 5])


IN_USE = """
import os, sys, threading
import redis
import ssepush

channel, url = sys.argv[1:]

def publish(data):
    ssepush.publish(data, channel=channel, redis_url=url)

def files():
    return len(os.listdir("/proc/self/fd"))

def begin(data):
    threads = [threading.Thread(target=publish, args=(data,)) for _ in range(40)]
    for thread in threads:
        thread.start()
    return threads

def end(threads):
    for thread in threads:
        thread.join()

publish("first")
redis.Redis.from_url(url).client_pause(1000)
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
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_process_that_is_forked_while_all_connections_are_in_use_has_as_many_of_its_own(
    own_redis: RedisProcess,
    start: Start,
    channel: str,
) -> None:
    server = start(redis=own_redis)
    with server.opened(channel) as stream:
        done = subprocess.run(
            [sys.executable, "-c", IN_USE, channel, own_redis.url],
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

        assert done.returncode == 0, done.stderr
        assert sorted(stream.data(81)) == ["child"] * 40 + ["first"] + ["parent"] * 40


def test_php_publishes_over_http_and_redis(server: ServerProcess) -> None:
    stream = server.stream("orders")
    connect = f'$redis = new Redis(); $redis->connect("127.0.0.1", {server.redis.port});'
    example = PHP_EXAMPLE.replace("127.0.0.1:5000", f"127.0.0.1:{server.port}")

    done = subprocess.run(
        [program("php"), "-r", connect + example],
        capture_output=True,
        timeout=DEADLINE_S,
    )

    assert (done.returncode, done.stderr) == (0, b""), done
    over_http, over_redis = stream.take(2)
    assert over_http[:2] == over_redis[:2] == ('{"item": "tea"}', "order_placed")
    assert over_http.id


def test_a_script_publishes(server: ServerProcess, redis_url: str) -> None:
    stream = server.stream("ops")
    environment = environment_with(REDIS_URL=redis_url, PYTHONPATH=str(HERE))

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT_EXAMPLE], capture_output=True, text=True, timeout=DEADLINE_S, env=environment
    )

    event = stream.next()
    assert (event.data, event.type) == ("backup is done", "backup")
    assert done.stdout == f"event {event.id} reached 1 subscribers\n", done


def test_a_script_is_told_that_redis_is_away() -> None:
    environment = environment_with(REDIS_URL=f"redis://127.0.0.1:{free_port()}/0", PYTHONPATH=str(HERE))

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT_EXAMPLE], capture_output=True, text=True, timeout=DEADLINE_S, env=environment
    )

    assert done.returncode == 1
    assert re.fullmatch(r"nobody was told: [^\n]+\n", done.stderr)


def test_a_shell_publishes_in_every_way(
    server: ServerProcess,
    redis_url: str,
    tmp_path: Path,
) -> None:
    for name in ("redis-cli", "curl"):
        program(name)
    stream = server.stream("ops")
    script = tmp_path / "ssepush"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(ssepush_command())} "$@"\n')
    script.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = environment_with(
        REDIS_URL=redis_url,
        SSEPUSH=server.url,
        PATH=path,
    )

    done = subprocess.run(
        ["sh", "-ec", SHELL_EXAMPLE], capture_output=True, text=True, timeout=DEADLINE_S, env=environment
    )

    assert done.returncode == 0, done
    events = stream.take(5)
    assert [event.data for event in events[:2]] == ["by redis-cli", "by ssepush"]
    assert [event.type for event in events] == ["backup", "backup", "disk", "disk", "message"]
    assert events[2].data.startswith("Filesystem")
    assert events[4].data == "by curl"
    assert json.loads(done.stdout.splitlines()[-1])["receivers"] == 1


EXAMPLES = {
    "Flask": FLASK_EXAMPLE,
    "Django": DJANGO_EXAMPLE,
    "Celery": CELERY_EXAMPLE,
    "script": SCRIPT_EXAMPLE,
    "shell": SHELL_EXAMPLE,
    "PHP": PHP_EXAMPLE,
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_guide_shows_the_example_that_ran(example: str) -> None:
    assert EXAMPLES[example] in (HERE / "docs" / "guide.md").read_text()


def test_more_threads_than_pooled_connections_can_publish_at_once(server: ServerProcess, redis_url: str) -> None:
    name = f"threads-{server.port}"
    stream = server.stream(name)
    published: list[ssepush.Published] = []

    def publish(thread: int) -> None:
        for number in range(10):
            published.append(ssepush.publish([thread, number], channel=name, redis_url=redis_url))

    threads = [threading.Thread(target=publish, args=(thread,)) for thread in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)

    events = stream.take(400)
    assert {event.id for event in events} == {event.id for event in published}
    assert set(published) == {1}
    for number in range(40):
        of_thread = [event.json[1] for event in events if event.json[0] == number]
        assert of_thread == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"data": object()}, TypeError),
        ({"data": float("nan")}, ValueError),
        ({"data": "\ud800"}, ValueError),
        ({"data": "x", "type": "a\nb"}, ValueError),
        ({"data": "x", "channel": ""}, ValueError),
        ({"data": "x", "retry": -1}, ValueError),
    ],
    ids=["no JSON", "not a number", "lone surrogate", "newline in type", "empty channel", "negative retry"],
)
def test_publish_raises_what_says_whose_fault_it_is(
    redis_url: str, arguments: Mapping[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        ssepush.publish(**arguments, redis_url=redis_url)


def test_publish_works_again_after_redis_was_restarted(own_redis: RedisProcess) -> None:
    ssepush.publish("before", redis_url=own_redis.url)

    own_redis.kill()
    with pytest.raises(ssepush.RedisAway):
        ssepush.publish("between", redis_url=own_redis.url)
    own_redis.start()

    assert ssepush.publish("after", redis_url=own_redis.url) == 0
