"""Strangers: who comes through a proxy, whose token expires; and what they are answered."""

from __future__ import annotations

import contextlib

import pytest

import ssepush
from tests import kit
from tests.proxies import Change, proxies_before
from tests.test_proxies import connection_to

# Each recipe without the header that it adds, and open where it is closed to strangers.
NO_HEADER = ("proxy_set_header X-Forwarded-For $remote_addr;", ""), ("option forwardfor", "")
OPENED = ("(publish|notifications|metrics|healthz)", "(metrics|healthz)"), ("/publish /notifications ", "")
BARE: dict[str, list[Change]] = {"nginx": [NO_HEADER[0], OPENED[0]], "haproxy": [NO_HEADER[1], OPENED[1]]}


@pytest.mark.parametrize("name", BARE)
def test_with_allow_host_nobody_publishes_without_a_token_through_a_bare_proxy(start: kit.Start, name: str) -> None:
    server = start("--allow-host", "events.example.org")
    with (
        proxies_before(server.port, name, changes=BARE[name]) as proxies,
        contextlib.closing(connection_to(proxies[name])) as connection,
    ):
        connection.request("POST", "/publish", '{"data": "forged"}', {**kit.JSON, "Host": "localhost"})
        response = connection.getresponse()
        body = response.read()

    assert response.status == 403
    assert b"SSEPUSH_PUBLISH_TOKEN" in body  # so it was not the proxy that refused


READ = ("position", "healthz", "metrics", "notifications")
FORM = (b"Content-Type: application/x-www-form-urlencoded", b"Content-Length: 3")
ANSWERS = {
    **{f"200 {path}": kit.request(f"GET /{path} HTTP/1.1".encode()) for path in READ},
    "200 published": kit.post(b"Content-Length: 11", body=b'{"data": 1}'),
    "204": kit.request(b"OPTIONS /publish HTTP/1.1", b"Access-Control-Request-Headers: x"),
    "400 a version": kit.request(b"GET / HTTP/3"),
    "400 two lengths": kit.request(b"POST /publish HTTP/1.1", b"Content-Length: 1", b"Content-Length: 2"),
    "400 a parameter": kit.request(b"GET /stream?last=x HTTP/1.1"),
    "400 no JSON": kit.post(b"Content-Length: 7", body=b"no JSON"),
    "403 private": kit.request(b"GET /stream?channel=private-x HTTP/1.1"),
    "403 a host": kit.request(b"GET / HTTP/1.1", host=b"Host: evil.example\r\n"),
    "404": kit.request(b"GET /nothing HTTP/1.1"),
    "405": kit.request(b"POST / HTTP/1.1", b"Content-Length: 0"),
    "405 to read": kit.request(b"GET /publish HTTP/1.1"),
    "411": kit.request(b"POST /publish HTTP/1.1", b"Content-Type: application/json"),
    "413": kit.post(b"Content-Length: 99999999", body=b""),
    "415": kit.request(b"POST /publish HTTP/1.1", *FORM, body=b"a=b"),
    "431": kit.request(b"GET / HTTP/1.1", b"X: " + b"x" * 20_000),
}


@kit.one_way
@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_but_the_page_is_a_line_of_json_that_nobody_may_store(
    server: kit.ServerProcess, name: str
) -> None:
    [answer] = kit.answers_in(kit.exchange(server.port, ANSWERS[name]))

    assert answer.status == int(name.split()[0])
    assert answer.headers["Cache-Control"] == "no-store"
    if name not in ("204", "200 metrics"):
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.json["state"] == ("ok" if answer.status == 200 else "error")
        assert answer.body.count(b"\n") == 1
        assert answer.body.endswith(b"}\n")


SECRET = "a secret of these tests"


@kit.both_ways
def test_a_token_that_expires_while_its_stream_waits_for_redis_ends_it(
    own_redis: kit.RedisProcess, start: kit.Start, channel: str
) -> None:
    server = start("--heartbeat", "2", redis=own_redis, SSEPUSH_SECRET=SECRET)
    private = f"private-{channel}"
    server.opened(channel).close()  # a shared subscriber is connected from now on
    kit.wait_for(lambda: server.streams() == 0, "it is closed")

    with kit.stopped(own_redis.process):
        token = ssepush.sign(private, ttl=2, secret=SECRET)
        query = f"channel={private}&token={token}"
        received = exchange_whole(server, f"GET /stream?{query} HTTP/1.1")

    assert b"HTTP/1.1 200 " in received
    assert b": the token has expired\nretry: " in received
    assert server.refused("expired") == 1
    assert server.streams() == 0
    own_redis.wait_for_subscribers(private, 0)
    with kit.EventStream(server.port, f"/stream?{query}") as again:
        [expired] = again.until_end()
        assert expired.type == "token-expired"


def exchange_whole(server: kit.ServerProcess, line: str) -> bytes:
    """All that a browser gets for a request, which keeps its own side of the connection open."""
    with kit.connect(server.port) as sock:
        sock.sendall(kit.request(line.encode()))
        received = b""
        while chunk := sock.recv(65536):
            received += chunk
        return received
