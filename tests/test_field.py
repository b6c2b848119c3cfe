"""What people in the field ran into, with the clients, proxies and libraries of their own."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import json
import os
import re
import subprocess
import sys
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
def test_with_a_prefix_pages_read_nothing_else_of_this_redis(start: Start, channel: str) -> None:
    server = start(SSEPUSH_PREFIX="shop:", SSEPUSH_SECRET=SECRET)
    redis, url = server.redis, server.redis.url

    with server.opened(channel) as page:
        ssepush.publish("another prefix", channel=channel, redis_url=url, prefix="else:")
        redis.publish(channel, "another program")
        ssepush.publish("python", channel=channel, redis_url=url, prefix="shop:")
        of_shell = kit.run("--prefix", "shop:", "publish", channel, "shell", REDIS_URL=url)
        server.publish("http", channel)
        redis.publish(f"shop:{channel}", "redis")

        assert page.data(4) == ["python", "shell", "http", "redis"]
    assert of_shell.stdout == "1\n"
    with server.stream(channel, query="lastEventId=earliest") as back:
        assert back.data(3) == ["python", "shell", "http"]


@pytest.mark.parametrize("prefix", ["shop:", "private-"])
def test_privacy_is_judged_by_the_name_that_pages_use(start: Start, channel: str, prefix: str) -> None:
    server = start("--prefix", prefix, SSEPUSH_SECRET=SECRET)

    assert server.get(f"/stream?channel=private-{channel}").status == 403
    assert server.get(f"/stream?channel={channel}", "HEAD").status == 200


@pytest.mark.parametrize("prefix", ["a\nb", "x" * 201, "__keyspace@0__:", "_"])
def test_a_prefix_that_cannot_be_one_is_refused(prefix: str) -> None:
    assert re.search("prefix must", kit.the_line(kit.run("--prefix", prefix), 2))


WARNS = {"": 0, "--host 0.0.0.0": 1, "--allow-host a.example": 1, "--allow-host a.example --prefix shop:": 0}


@pytest.mark.parametrize("options", WARNS)
def test_a_server_for_others_says_once_that_pages_can_read_everything(start: Start, options: str) -> None:
    server = start(*options.split())

    server.terminate()

    assert server.output.count("pages can read every channel of this Redis") == WARNS[options]


def test_event_is_another_name_for_type(server: ServerProcess, channel: str) -> None:
    with server.opened(channel) as page:
        server.redis.publish_event(channel, event="OrderPlaced", data={"n": 1}, socket=None)  # as Laravel does
        server.publish(2, channel, event="OrderPaid")
        server.redis.publish_event(channel, data=3, type="wins", event="loses")

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
    signed = subprocess.check_output([*command, SIGNERS[library], name, SECRET], cwd=tmp_path, timeout=kit.DEADLINE_S)

    assert server.get(f"/stream?channel={name}&token={signed.decode().strip()}", "HEAD").status == 200


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


MAY_READ = {"": True, "--allow-origin https://a.example": True, "--allow-origin https://b.example": False}


@pytest.mark.parametrize("options", MAY_READ)
def test_a_preflight_allows_whatever_a_page_asks_for_that_may_read(start: Start, options: str) -> None:
    server = start(*options.split())
    asked = "traceparent, baggage, sentry-trace, x-requested-with, x-csrf-token, pragma"
    wanted = {"Access_Control_Request_Method": "GET", "Access_Control_Request_Headers": asked}

    answer = server.get("/stream", "OPTIONS", Origin="https://a.example", **wanted)

    may_read = "Access-Control-Allow-Origin" in answer.headers  # without it, a browser looks no further
    assert may_read == MAY_READ[options]
    assert answer.headers["Access-Control-Allow-Headers"] == asked


CHUNKED = b"Transfer-Encoding: chunked"
CHUNKED_BODIES = {
    "one chunk": b"%x\r\n%b\r\n0\r\n\r\n",
    "a length in capitals, with zeros": b"0000%X\r\n%b\r\n0\r\n\r\n",
    "an extension": b'%x;name="a value"\r\n%b\r\n0;last\r\n\r\n',
    "spaces before an extension": b"%x ;name\r\n%b\r\n00\r\n\r\n",
}


@kit.one_way
@pytest.mark.parametrize("name", CHUNKED_BODIES)
def test_a_body_in_chunks_is_taken_and_then_the_next_request(server: ServerProcess, channel: str, name: str) -> None:
    body = json.dumps({"channel": channel, "data": "in chunks"}).encode()
    first = kit.post(CHUNKED, body=CHUNKED_BODIES[name] % (len(body), body))
    health = request(b"GET /healthz HTTP/1.1", b"Connection: close")

    with server.opened(channel) as page:
        answers = kit.answers_in(kit.exchange(server.port, first + health))

        assert [answer.status for answer in answers] == [200, 200]
        assert page.next().data == "in chunks"


def test_a_body_in_many_chunks_counts_as_a_whole(start: Start) -> None:
    server = start("--max-event", "100")
    body = b'{"data": "%b"}' % (b"x" * 100)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"

    [answer] = kit.answers_in(kit.exchange(server.port, kit.post(CHUNKED, body=chunks)))

    assert answer.status == 413


def test_a_byte_order_mark_does_not_count(server: ServerProcess, channel: str) -> None:
    mark = "\ufeff"
    with server.opened(channel) as page:
        posted = server.post((mark + json.dumps({"channel": channel, "data": "posted"})).encode())
        server.redis.publish(channel, mark + '{"data": "published", "type": "greet"}')
        server.redis.publish(channel, mark + "text")

        assert posted.status == 200
        assert page.next()[:2] == ("posted", "message")
        assert page.next()[:2] == ("published", "greet")
        assert page.next()[:2] == (mark + "text", "message")


# ── A dead connection that nobody notices ────────────────────────────────────────────────────────────────────────────


class IdleProxy(kit.RedisProxy):
    """Cuts whom Redis sends nothing for a second, as haproxy does after 50 by default."""

    def changed(self, received: bytes, is_from_redis: bool, link: kit.Link) -> bytes:
        link.theirs.settimeout(1.0)
        return received


@both_ways
def test_a_silent_subscriber_is_not_cut_by_a_proxy(start: Start, redis_process: RedisProcess, channel: str) -> None:
    with IdleProxy(redis_process) as proxy:
        server = start("--heartbeat", "0.4", redis=proxy.url)
        with server.opened(channel) as page:
            page.wait(lambda: len(page.positions) >= 5, "heartbeats come for longer than a second")
            redis_process.publish(channel, "still here")

            assert page.next().data == "still here"
        assert server.closed("redis-lost") == 0


@both_ways
def test_a_redis_that_says_nothing_is_soon_lost(start: Start, redis_process: RedisProcess, channel: str) -> None:
    with kit.WithholdingProxy(redis_process) as proxy:
        server = start("--heartbeat", "0.4", "--history", "0", redis=proxy.url)
        page = server.stream(channel)

        assert page.until_end(5.0) == []
        assert page.positions
        assert server.closed("redis-lost") == 1


# ── Programs that publish ────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass
class Point:
    x: int
    y: object


TAKEN: list[tuple[Any, str]] = [
    (datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC), '"2026-01-02T03:04:05+00:00"'),
    (datetime.date(2026, 1, 2), '"2026-01-02"'),
    (datetime.time(3, 4), '"03:04:00"'),
    (decimal.Decimal("1.50"), '"1.50"'),
    (uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
    (Point(1, Point(2, decimal.Decimal(3))), '{"x": 1, "y": {"x": 2, "y": "3"}}'),
]


def test_what_json_does_not_know_is_taken_as_an_application_expects(server: ServerProcess, channel: str) -> None:
    with server.opened(channel) as page:
        for value, text in TAKEN:
            ssepush.publish([value], channel=channel, redis_url=server.redis.url)

            assert page.next().data == f"[{text}]"


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
ids = eventlet.GreenPool(50).imap(publish, numbers)
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
    "without resource, as on Windows": f"""
import sys
sys.modules["resource"] = None
{PUBLISH_MANY}
publish(1)
""",
}


def run_script(script: str, channel: str, redis: RedisProcess, warnings: str, **environment: str) -> None:
    """Run it as a program that publishes; it has to end well, and without a word."""
    command = [sys.executable, "-W", warnings, "-c", script, channel, redis.url]
    environment = kit.environment_with(**environment)
    done = subprocess.run(
        command, cwd=kit.HERE, env=environment, capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("worker", WORKERS)
def test_each_kind_of_worker_publishes(redis_process: RedisProcess, channel: str, worker: str) -> None:
    if worker in ("eventlet", "gevent"):
        pytest.importorskip(worker, reason=NEEDS_EXTRA)

    run_script(WORKERS[worker], channel, redis_process, "ignore")


def test_the_oldest_redis_py_works_too(tmp_path: Path, redis_process: RedisProcess, start: Start, channel: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, "redis==5.0.0"], check=True, timeout=120)
    path = f"{tmp_path}{os.pathsep}{kit.HERE}"
    server = start(PYTHONPATH=path)

    with server.opened(channel) as page:
        run_script(f"{PUBLISH_MANY}\nassert publish(7)", channel, redis_process, "error", PYTHONPATH=path)

        assert page.next().data == "7"


def test_both_spellings_of_what_tls_wants_are_taken_and_a_wrong_parameter_of_the_url_is_named() -> None:
    for text, wanted in {"CERT_NONE": "none", "none": "none", "CERT_REQUIRED": "required"}.items():
        _, options, _ = ssepush.options_of(f"rediss://127.0.0.1:6380/0?ssl_cert_reqs={text}")
        assert options["ssl_cert_reqs"] == wanted

    for name, text in {"ssl_cert_reqs": "perhaps", "socket_timeout": "soon", "nonsense": "1"}.items():
        with pytest.raises(ValueError, match=name):
            ssepush.publish(1, redis_url=f"rediss://127.0.0.1:1/0?{name}={text}")
