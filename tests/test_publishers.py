"""Publishing from programs: the examples that the docs show, as they are, flask-sse, and ssepush.publish() itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ssepush
from tests import kit
from tests.test_docs import shown


def run(redis: kit.RedisProcess, *command: str) -> None:
    """A program to its end, which has to be a good one."""
    variables = kit.environment_with(REDIS_URL=redis.url, PYTHONPATH=str(kit.HERE))
    done = subprocess.run(command, capture_output=True, text=True, timeout=kit.DEADLINE_S, env=variables)
    assert (done.returncode, done.stderr) == (0, ""), done


def php(server: kit.ServerProcess) -> None:
    connect = f'$redis = new Redis(); $redis->connect("127.0.0.1", {server.redis.port});'
    example = shown("file_get_contents(", "$redis->publish").replace("http://127.0.0.1:5000", server.url)
    run(server.redis, kit.needs("php"), "-r", connect + example)


def flask_sse(server: kit.ServerProcess) -> None:
    """Its own publish(), in a real application."""
    sse = pytest.importorskip("flask_sse").sse
    app = pytest.importorskip("flask").Flask("app")
    app.config["REDIS_URL"] = server.redis.url
    app.register_blueprint(sse, url_prefix="/stream")
    with app.app_context():
        sse.publish({"a": "Hello!"}, type="greeting", channel="flask-sse")
        sse.publish("plain", channel="flask-sse")
        sse.publish("一\n二", type="new_answers", channel="flask-sse")
        sse.publish([1, None, "é"], type="t", id="seven", retry=4321, channel="flask-sse")


ITEM = ("order_placed", '{"item": "tea"}')
IN_PYTHON = [("greeting", '{"a": "Hello!"}'), ("message", "plain"), ("new_answers", "一\n二"), ("t", '[1, null, "é"]')]
PUBLISHERS: dict[Callable[[kit.ServerProcess], None], tuple[str, list[tuple[str, str]]]] = {
    php: ("orders", [ITEM, ITEM]),
    flask_sse: ("flask-sse", IN_PYTHON),
}


@kit.one_way
@pytest.mark.parametrize("publisher", PUBLISHERS)
def test_a_program_publishes(publisher: Callable[[kit.ServerProcess], None], server: kit.ServerProcess) -> None:
    channel, expected = PUBLISHERS[publisher]
    stream = server.stream(channel)

    publisher(server)

    events = stream.take(len(expected))
    assert [(event.type, event.data) for event in events] == expected
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


def test_a_process_that_is_forked_has_connections_of_its_own(own_redis: kit.RedisProcess, start: kit.Start) -> None:
    with start(redis=own_redis).opened("forked") as stream:
        run(own_redis, sys.executable, "-c", FORKS_WHILE_ALL_CONNECTIONS_ARE_IN_USE)

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


@pytest.mark.parametrize("pool", ["prefork", "eventlet", "gevent", "threads"])
def test_tasks_publish_in_each_kind_of_celery_worker(
    start: kit.Start, redis_process: kit.RedisProcess, tmp_path: Path, pool: str
) -> None:
    """More than one event each: eventlet takes `select.poll` away, which only a second use of a connection misses."""
    for package in ("celery", pool) if pool in ("eventlet", "gevent") else ("celery",):
        pytest.importorskip(package)
    server = start()
    variables = kit.environment_with(
        PYTHONPATH=f"{kit.HERE}:{kit.HERE / 'examples'}", REDIS_URL=redis_process.url, ROW_S="0.01"
    )
    worker = [sys.executable, "-m", "celery", "-A", "celery_app:celery", "worker", "--pool", pool, "--concurrency", "2"]
    asks = [sys.executable, "-c", "import celery_app; print(celery_app.make_report.delay(5).id)"]

    with kit.running(*worker, stderr=subprocess.DEVNULL, env=variables, cwd=tmp_path):
        task = subprocess.run(asks, env=variables, capture_output=True, text=True, check=True).stdout.strip()
        with server.stream(f"answer-{task}", query="lastEventId=earliest") as page:
            assert [event.type for event in page.take(6)] == ["progress"] * 5 + ["ended"]
