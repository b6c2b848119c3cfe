"""Strangers: who may only PUBLISH, who comes through a proxy, whose token expires; and what they are answered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import redis

import ssepush
from tests.kit import (
    JSON,
    EventStream,
    RedisProcess,
    ServerProcess,
    Start,
    both_ways,
    connect,
    numbers,
    one_way,
    request,
    stopped,
    wait_for,
)
from tests.proxies import Change, proxies_before
from tests.test_proxies import connection_to

# ── Who can only PUBLISH ─────────────────────────────────────────────────────────────────────────────────────────────

FORGER_ACL = "-@all +publish +ping &news"
OTHER = "other"  # a channel that is not the forger's


@pytest.fixture
def forger(own_redis: RedisProcess) -> Iterator[redis.Redis]:
    """Somebody whose ACL is exactly that."""
    line = f"ACL SETUSER forger on >secret {FORGER_ACL}"
    own_redis.client.execute_command(*line.split())  # type: ignore[no-untyped-call]
    client = redis.Redis(
        port=own_redis.port,
        username="forger",
        password="secret",
        protocol=2,
    )
    with contextlib.closing(client):
        assert client.ping()
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.publish(OTHER, "not mine")
        yield client


def ahead_of(event_id: str) -> str:
    """An id of our form, 3 s and 10 sequences later."""
    milliseconds, sequence = map(int, event_id.split("-"))
    return f"{milliseconds + 3000}-{sequence + 10:016d}"


def forged(event_id: str, previous: str) -> list[str]:
    """Messages that claim this id: bare, and with all that a message of ours has."""
    bare = f'{{"data": "forged", "id": "{event_id}"}}'
    mark = ssepush.mark_of(b"", event_id, previous, b"news")
    members = f'"id": "{event_id}", "previous": "{previous}", "mark": "{mark}"'
    return [bare, f'{{"data": "forged", {members}}}']


@both_ways
@pytest.mark.parametrize("claims", ["the future", "the past"])
def test_who_may_only_publish_on_one_channel_neither_hides_nor_doubles_events_of_another(
    own_redis: RedisProcess,
    forger: redis.Redis,
    start: Start,
    claims: str,
) -> None:
    server = start(redis=own_redis)
    first = server.publish_id("first", OTHER)
    server.publish("second", OTHER)
    claimed = ahead_of(first) if claims == "the future" else first
    messages = forged(claimed, previous=first)

    with server.opened("news", OTHER) as stays, server.opened("news", OTHER) as leaves:
        for message in messages:
            assert forger.publish("news", message) == server.subscribers_for(2)
        seen_by_both = [leaves.data(2), stays.data(2)]
        for data in numbers(0, 30):
            server.publish(data, OTHER)
        genuine = stays.data(30)
    with server.stream("news", OTHER, Last_Event_ID=leaves.last_event_id) as is_back:
        server.publish("last", OTHER)
        resumed = is_back.data(31)

    assert seen_by_both == [["forged"] * 2] * 2
    assert genuine == numbers(0, 30)
    assert resumed == [*numbers(0, 30), "last"]


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
