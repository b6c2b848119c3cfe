"""What people in the field ran into, with the clients, proxies and libraries of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import decimal
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

import ssepush
from tests import kit
from tests.kit import RedisProcess, ServerProcess, Start, both_ways, request

SECRET = "a secret of the tests"
NEEDS_EXTRA = "comes with the test extra"

# ── Who can read what ────────────────────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_with_a_prefix_pages_read_nothing_else_of_this_redis(
    start: Start, redis_process: RedisProcess, channel: str
) -> None:
    server = start(SSEPUSH_PREFIX="shop:", SSEPUSH_SECRET=SECRET)
    url = redis_process.url

    with server.opened(channel) as page:
        ssepush.publish("another prefix", channel=channel, redis_url=url, prefix="else:")
        redis_process.publish(channel, "another program")
        ssepush.publish("python", channel=channel, redis_url=url, prefix="shop:")
        of_shell = kit.run("--prefix", "shop:", "publish", channel, "shell", REDIS_URL=url)
        server.publish("http", channel)
        redis_process.publish(f"shop:{channel}", "redis")

        assert page.data(4) == ["python", "shell", "http", "redis"]
    assert of_shell.stdout == "1\n"
    private = server.get(f"/stream?channel=private-{channel}")
    assert private.status == 403
    with server.stream(channel, query="lastEventId=earliest") as back:
        assert back.data(3) == ["python", "shell", "http"]


def test_privacy_is_judged_by_the_name_that_pages_use(start: Start, channel: str) -> None:
    server = start("--prefix", "private-", SSEPUSH_SECRET=SECRET)

    assert server.get(f"/stream?channel=private-{channel}").status == 403
    with server.opened(channel) as page:
        server.publish("open to all", channel)
        assert page.next().data == "open to all"


@pytest.mark.parametrize("prefix", ["a\nb", "x" * 201, "__keyspace@0__:"])
def test_a_prefix_that_cannot_be_one_is_refused(prefix: str) -> None:
    assert re.search("prefix must be|begin with __", kit.the_line(kit.run("--prefix", prefix), 2))


WITHOUT_PREFIX = "pages can read every channel of this Redis"


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ([], False),
        (["--host", "0.0.0.0"], True),
        (["--allow-host", "events.example.org"], True),
        (["--allow-host", "events.example.org", "--prefix", "shop:"], False),
    ],
)
def test_a_server_for_others_says_once_that_pages_can_read_everything(
    start: Start, options: list[str], warns: bool
) -> None:
    server = start(*options)

    server.terminate()

    assert server.output.count(WITHOUT_PREFIX) == warns


def laravels(channel: str) -> bytes:
    """What Laravel's broadcaster publishes."""
    return json.dumps({"event": "OrderPlaced", "data": {"n": 1}, "socket": None}).encode()


def test_event_is_another_name_for_type(server: ServerProcess, channel: str) -> None:
    with server.opened(channel) as page:
        server.redis.publish(channel, laravels(channel).decode())
        server.publish(2, channel, event="OrderPaid")
        server.redis.publish(channel, '{"data": 3, "type": "wins", "event": "loses"}')

        assert [event.type for event in page.take(3)] == ["OrderPlaced", "OrderPaid", "wins"]


SIGNERS = {
    "PyJWT": "import jwt, sys; print(jwt.encode({'channels': [sys.argv[1]], 'exp': 4e9}, sys.argv[2], 'HS256'))",
    "jsonwebtoken": """
        const [channel, secret] = process.argv.slice(-2);
        console.log(require("jsonwebtoken").sign({channels: [channel]}, secret, {expiresIn: "1h"}));
    """,
}


@pytest.mark.parametrize("library", SIGNERS)
def test_other_libraries_sign_tokens(start: Start, channel: str, library: str, tmp_path: Path) -> None:
    server = start(SSEPUSH_SECRET=SECRET)
    name = f"private-{channel}"
    if library == "PyJWT":
        pytest.importorskip("jwt", reason=NEEDS_EXTRA)
        command = [sys.executable, "-c"]
    else:
        kit.npm_install(tmp_path, "jsonwebtoken@9")
        command = [kit.needs("node"), "-e"]
    done = subprocess.run(
        [*command, SIGNERS[library], name, SECRET],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=kit.DEADLINE_S,
    )

    with server.stream(name, query=f"token={done.stdout.strip()}") as page:
        server.publish("for you", name)
        assert page.next().data == "for you"


# ── What libraries, proxies and browsers send ────────────────────────────────────────────────────────────────────────


def test_cookies_in_several_lines_are_one_list(start: Start, channel: str) -> None:
    server = start(SSEPUSH_SECRET=SECRET)
    name = f"private-{channel}"
    token = ssepush.sign(name, secret=SECRET)
    cookies = [b"Cookie: a=1", f"Cookie: ssepush-token={token}".encode(), b"Cookie: b=2"]

    [answer] = kit.answers_in(
        kit.exchange(server.port, request(f"HEAD /stream?channel={name} HTTP/1.1".encode(), *cookies))
    )

    assert answer.status == 200


@pytest.mark.parametrize(
    ("options", "allowed"),
    [([], True), (["--allow-origin", "https://a.example"], True), (["--allow-origin", "https://b.example"], False)],
)
def test_a_preflight_allows_whatever_a_page_asks_for_that_may_read(
    start: Start, options: list[str], allowed: bool
) -> None:
    server = start(*options)
    asked = "traceparent, baggage, sentry-trace, x-requested-with, x-csrf-token, pragma"

    answer = server.get(
        "/stream",
        "OPTIONS",
        Origin="https://a.example",
        Access_Control_Request_Method="GET",
        Access_Control_Request_Headers=asked,
    )

    may_read = "Access-Control-Allow-Origin" in answer.headers  # without it, a browser looks no further
    assert may_read == allowed
    assert answer.headers["Access-Control-Allow-Headers"] == asked


CHUNKED_BODIES = {
    "one chunk": b"%x\r\n%b\r\n0\r\n\r\n",
    "a length in capitals, with zeros": b"0000%X\r\n%b\r\n0\r\n\r\n",
    "an extension": b'%x;name="a value"\r\n%b\r\n0;last\r\n\r\n',
    "spaces before an extension": b"%x ;name\r\n%b\r\n00\r\n\r\n",
}


@kit.one_way
@pytest.mark.parametrize("name", CHUNKED_BODIES)
def test_a_body_in_chunks_is_taken_and_the_next_request_is_read_after_it(
    server: ServerProcess, channel: str, name: str
) -> None:
    body = json.dumps({"channel": channel, "data": "in chunks"}).encode()
    wire = CHUNKED_BODIES[name] % (len(body), body)

    with server.opened(channel) as page:
        first = kit.post(b"Transfer-Encoding: chunked", body=wire)
        health = request(b"GET /healthz HTTP/1.1", b"Connection: close")
        answers = kit.answers_in(kit.exchange(server.port, first + health))

        assert [answer.status for answer in answers] == [200, 200]
        assert page.next().data == "in chunks"


def test_a_body_in_many_chunks_counts_as_a_whole(start: Start, channel: str) -> None:
    server = start("--max-event", "100")
    body = json.dumps({"channel": channel, "data": "x" * 100}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"

    [answer] = kit.answers_in(kit.exchange(server.port, kit.post(b"Transfer-Encoding: chunked", body=chunks)))

    assert answer.status == 413


def test_a_byte_order_mark_does_not_count(server: ServerProcess, channel: str) -> None:
    mark = "\ufeff"
    body = json.dumps({"channel": channel, "data": "posted"})

    with server.opened(channel) as page:
        posted = server.post((mark + body).encode())
        server.redis.publish(channel, mark + '{"data": "published", "type": "greet"}')
        server.redis.publish(channel, mark + "text")

        assert posted.status == 200
        assert [event[:2] for event in page.take(3)] == [
            ("posted", "message"),
            ("published", "greet"),
            (mark + "text", "message"),
        ]


# ── A dead connection that nobody notices ────────────────────────────────────────────────────────────────────────────


class IdleProxy(kit.WithholdingProxy):
    """Stands before Redis, and cuts whoever is silent for idle_s seconds, as haproxy does after 50 by default.

    While is_mute is set, subscribers get nothing through it.
    """

    def __init__(self, redis_process: RedisProcess, idle_s: float) -> None:
        self.idle_s = idle_s
        self.is_mute = threading.Event()
        super().__init__(redis_process)

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        is_to_subscriber = False
        source.settimeout(self.idle_s)
        with source, sink, contextlib.suppress(OSError):
            while received := source.recv(65536):
                is_to_subscriber = is_to_subscriber or b"\r\nsubscribe\r\n" in received
                if not (is_to_subscriber and self.is_mute.is_set()):
                    sink.sendall(received)
            sink.shutdown(socket.SHUT_RDWR)


@both_ways
def test_a_silent_subscriber_outlives_a_proxy_that_cuts_who_is_silent(
    start: Start, redis_process: RedisProcess, channel: str
) -> None:
    with IdleProxy(redis_process, idle_s=1.0) as proxy:
        server = start("--heartbeat", "0.4", redis=proxy.url)
        with server.opened(channel) as page:
            page.wait(lambda: len(page.positions) >= 8, "eight heartbeats come")
            redis_process.publish(channel, "still here")

            assert page.next().data == "still here"
        assert server.closed("redis-lost") == 0


@both_ways
def test_a_redis_that_says_nothing_any_more_is_lost_within_a_few_heartbeats(
    start: Start, redis_process: RedisProcess, channel: str
) -> None:
    proxy = IdleProxy(redis_process, idle_s=60.0)
    with proxy:
        server = start("--heartbeat", "0.4", "--history", "0", redis=proxy.url)
        page = server.stream(channel)
        page.wait(lambda: page.positions, "it is open")

        proxy.is_mute.set()

        assert page.until_end(5.0) == []
        assert server.closed("redis-lost") == 1


# ── Programs that publish ────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass
class Point:
    x: int
    y: object


TAKEN: dict[str, tuple[Any, str]] = {
    "a datetime": (datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC), '"2026-01-02T03:04:05+00:00"'),
    "a date": (datetime.date(2026, 1, 2), '"2026-01-02"'),
    "a time": (datetime.time(3, 4), '"03:04:00"'),
    "a decimal": (decimal.Decimal("1.50"), '"1.50"'),
    "a UUID": (uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
    "a dataclass": (Point(1, Point(2, decimal.Decimal(3))), '{"x": 1, "y": {"x": 2, "y": "3"}}'),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_json_does_not_know_is_taken_as_an_application_expects(
    redis_process: RedisProcess, channel: str, name: str
) -> None:
    value, text = TAKEN[name]

    ssepush.publish([value], channel=channel, redis_url=redis_process.url)

    event = ssepush.event_of(ssepush.message_of([value]))
    assert event.data == f"[{text}]"


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", Point, 1j])
def test_what_has_no_form_in_json_is_named(value: object) -> None:
    with pytest.raises(TypeError, match=type(value).__name__):
        ssepush.publish(value, redis_url="redis://127.0.0.1:1/0")


def test_what_flask_sse_makes_of_nan_reaches_no_page(server: ServerProcess, channel: str) -> None:
    with server.opened(channel) as page:
        server.redis.publish(channel, json.dumps({"data": {"n": float("nan")}, "type": "greet"}))
        server.redis.publish(channel, "next")

        assert page.next().data == "next"


PUBLISH_MANY = """
import sys, ssepush
numbers = range(200)
def publish(number):
    return ssepush.publish(number, channel=sys.argv[1], redis_url=sys.argv[2]).id
"""
WORKERS = {
    "eventlet": f"""
import eventlet
eventlet.monkey_patch()
{PUBLISH_MANY}
ids = list(eventlet.GreenPool(50).imap(publish, numbers))
assert len(set(ids)) == 200
""",
    "gevent": f"""
from gevent import monkey
monkey.patch_all()
from gevent.pool import Pool
{PUBLISH_MANY}
ids = Pool(50).map(publish, numbers)
assert len(set(ids)) == 200
""",
    "prefork": f"""
import multiprocessing
{PUBLISH_MANY}
publish(-1)  # with a connection that the children must not use
with multiprocessing.get_context("fork").Pool(8) as pool:
    ids = pool.map(publish, numbers)
assert len(set(ids)) == 200
""",
    "fork with threads at work": f"""
import os, threading
{PUBLISH_MANY}
def work():
    while True:
        publish(-1)
for _ in range(20):
    threading.Thread(target=work, daemon=True).start()
for number in range(40):
    child = os.fork()
    if not child:
        publish(number)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
""",
    "without resource": f"""
import sys
sys.modules["resource"] = None  # as on Windows
{PUBLISH_MANY}
publish(1)
""",
}


@pytest.mark.parametrize("worker", WORKERS)
def test_each_kind_of_worker_publishes(redis_process: RedisProcess, channel: str, worker: str) -> None:
    if worker in ("eventlet", "gevent"):
        pytest.importorskip(worker, reason=NEEDS_EXTRA)

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WORKERS[worker], channel, redis_process.url],
        cwd=kit.HERE,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_whoever_comes_first_to_sentinels_at_once_is_all_answered(redis_process: RedisProcess, channel: str) -> None:
    """Here the second had been told that nobody knows a master, while the first was still asking."""
    answers: list[str] = []
    masters = ssepush.Masters([], "mymaster")
    address = ("127.0.0.1", redis_process.port)

    def ask() -> ssepush.Address:
        time.sleep(0.1)
        return address

    masters._ask = ask  # type: ignore[method-assign]
    threads = [threading.Thread(target=lambda: answers.append(str(masters.find()))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == [str(address)] * 5


REDIS_PYS = ["5.0.0", "6.4.0", "7.1.0"]  # and the newest, with which all other tests run


@pytest.fixture(scope="module", params=REDIS_PYS)
def redis_py(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this version in it."""
    folder = tmp_path_factory.mktemp("redis-py")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, f"redis=={request.param}"], check=True, timeout=120)
    return folder


def test_older_versions_of_redis_py_publish_and_serve(
    redis_py: Path, redis_process: RedisProcess, start: Start, channel: str
) -> None:
    path = f"{redis_py}{os.pathsep}{kit.HERE}"
    server = start(PYTHONPATH=path)
    script = f"{PUBLISH_MANY}\nassert publish(7)"

    with server.opened(channel) as page:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script, channel, redis_process.url],
            env=kit.environment_with(PYTHONPATH=path),
            capture_output=True,
            text=True,
            timeout=kit.DEADLINE_S,
            check=False,
        )

        assert (done.returncode, done.stderr) == (0, "")
        assert page.next().data == "7"


@pytest.mark.parametrize(
    "query",
    ["ssl_cert_reqs=CERT_NONE", "ssl_cert_reqs=none", "ssl_cert_reqs=CERT_REQUIRED"],
)
def test_both_spellings_of_what_tls_wants_are_taken(query: str) -> None:
    _, options, _ = ssepush.options_of(f"rediss://127.0.0.1:6380/0?{query}")

    assert options["ssl_cert_reqs"] in ("none", "required")


@pytest.mark.parametrize("query", ["ssl_cert_reqs=perhaps", "socket_timeout=soon", "nonsense=1"])
def test_a_wrong_parameter_of_the_url_is_named(query: str) -> None:
    name, _, _ = query.partition("=")

    with pytest.raises(ValueError, match=name):
        ssepush.publish(1, redis_url=f"rediss://127.0.0.1:1/0?{query}")
