"""Strangers: who comes through a proxy, whose token expires; and what they are answered."""

from __future__ import annotations

import contextlib

import pytest

import ssepush
from tests.kit import (
    JSON,
    EventStream,
    RedisProcess,
    ServerProcess,
    Start,
    answers_in,
    both_ways,
    connect,
    exchange,
    one_way,
    post,
    request,
    stopped,
    wait_for,
)
from tests.proxies import Change, proxies_before
from tests.test_proxies import connection_to

# ── Through a proxy that adds no header ──────────────────────────────────────────────────────────────────────────────

# Each recipe without the header that it adds, and open where it is closed to strangers.
BARE: dict[str, list[Change]] = {
    "nginx": [
        ("proxy_set_header X-Forwarded-For $remote_addr;", ""),
        ("(publish|notifications|metrics|healthz)", "(metrics|healthz)"),
    ],
    "haproxy": [
        ("option forwardfor", ""),
        ("/publish /notifications ", ""),
    ],
}


@pytest.mark.parametrize("name", BARE)
def test_with_allow_host_nobody_publishes_without_a_token_through_a_proxy_that_adds_no_header(
    start: Start,
    name: str,
) -> None:
    server = start("--allow-host", "events.example.org")
    with (
        proxies_before(server.port, name, changes=BARE[name]) as proxies,
        contextlib.closing(connection_to(proxies[name])) as connection,
    ):
        headers = {**JSON, "Host": "localhost"}
        connection.request("POST", "/publish", '{"data": "forged"}', headers)
        response = connection.getresponse()
        body = response.read()

    assert response.status == 403
    assert b"SSEPUSH_PUBLISH_TOKEN" in body  # so it was not the proxy that refused


SIGNS = [
    "Forwarded",
    "Via",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Port",
    "X-Forwarded-Proto",
    "X-Real-IP",
]


@one_way
@pytest.mark.parametrize("sign", SIGNS)
def test_a_request_with_a_sign_of_a_proxy_publishes_nothing_without_a_token(server: ServerProcess, sign: str) -> None:
    answer = server.post({"data": "forged"}, **{sign: "1"})

    assert answer.status == 403


# ── What is answered ─────────────────────────────────────────────────────────────────────────────────────────────────

ANSWERS = {
    "published": (200, "POST", "/publish", '{"data": 1}'),
    "the position": (200, "GET", "/position", None),
    "healthy": (200, "GET", "/healthz", None),
    "the article's event": (200, "GET", "/notifications", None),
    "malformed": (400, "POST", "/publish", "no JSON"),
    "a parameter": (400, "GET", "/position?a=b", None),
    "private": (403, "GET", "/stream?channel=private-x", None),
    "nothing there": (404, "GET", "/nothing", None),
    "the method": (405, "GET", "/publish", None),
}


@one_way
@pytest.mark.parametrize("name", ANSWERS)
def test_every_json_answer_is_one_line_with_its_end(server: ServerProcess, name: str) -> None:
    status, method, path, body = ANSWERS[name]

    answer = server.get(path, method, body, **JSON)

    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json["state"] in ("ok", "error")
    assert answer.body.count(b"\n") == 1
    assert answer.body.endswith(b"}\n")


FORM = (b"Content-Type: application/x-www-form-urlencoded", b"Content-Length: 3")
WITHOUT_LENGTH = (b"Content-Type: application/json", b"Transfer-Encoding: chunked")
NOT_TO_BE_STORED = {
    "200": request(b"GET /position HTTP/1.1"),
    "200 metrics": request(b"GET /metrics HTTP/1.1"),
    "200 published": post(b"Content-Length: 11", body=b'{"data": 1}'),
    "204": request(b"OPTIONS /publish HTTP/1.1"),
    "400": request(b"GET / HTTP/3"),
    "400 two lengths": request(b"POST /publish HTTP/1.1", b"Content-Length: 1", b"Content-Length: 2"),
    "400 a parameter": request(b"GET /stream?last=x HTTP/1.1"),
    "403": request(b"GET /stream?channel=private-x HTTP/1.1"),
    "403 a host": request(b"GET / HTTP/1.1", host=b"Host: evil.example\r\n"),
    "404": request(b"GET /nothing HTTP/1.1"),
    "405": request(b"POST / HTTP/1.1", b"Content-Length: 0"),
    "411": request(b"POST /publish HTTP/1.1", *WITHOUT_LENGTH),
    "413": post(b"Content-Length: 99999999", body=b""),
    "415": request(b"POST /publish HTTP/1.1", *FORM, body=b"a=b"),
    "431": request(b"GET / HTTP/1.1", b"X: " + b"x" * 20_000),
}


@one_way
@pytest.mark.parametrize("name", NOT_TO_BE_STORED)
def test_nobody_may_store_an_answer_but_the_page(server: ServerProcess, name: str) -> None:
    [answer] = answers_in(exchange(server.port, NOT_TO_BE_STORED[name]))

    assert answer.status == int(name.split()[0])
    assert answer.headers["Cache-Control"] == "no-store"


# ── A token that expires early ───────────────────────────────────────────────────────────────────────────────────────

SECRET = "a secret of these tests"


@both_ways
def test_a_token_that_expires_while_its_stream_waits_for_redis_ends_it(
    own_redis: RedisProcess,
    start: Start,
    channel: str,
) -> None:
    server = start("--heartbeat", "0.4", redis=own_redis, SSEPUSH_SECRET=SECRET)
    private = f"private-{channel}"
    server.opened(channel).close()  # a shared subscriber is connected from now on
    wait_for(lambda: server.streams() == 0, "it is closed")

    with stopped(own_redis.process):
        token = ssepush.sign(private, ttl=2, secret=SECRET)
        query = f"channel={private}&token={token}"
        line = f"GET /stream?{query} HTTP/1.1"
        received = exchange_whole(server, line)

    assert b"HTTP/1.1 200 " in received
    assert b": the token has expired\nretry: " in received
    assert server.refused("expired") == 1
    assert server.streams() == 0
    own_redis.wait_for_subscribers(private, 0)
    with EventStream(server.port, f"/stream?{query}") as again:
        [expired] = again.until_end()
        assert expired.type == "token-expired"


def exchange_whole(server: ServerProcess, line: str) -> bytes:
    """All that a browser gets for a request, which keeps its own side of the connection open."""
    with connect(server.port) as sock:
        sock.sendall(request(line.encode()))
        received = b""
        while chunk := sock.recv(65536):
            received += chunk
        return received
