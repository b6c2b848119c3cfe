"""Redis as it is deployed: over TLS, over a Unix socket, and with a user who may do only what ssepush needs."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import ssepush
from tests import kit
from tests.kit import RedisProcess, Start, both_ways, wait_for

# ── Over TLS ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class EncryptedRedis(RedisProcess):
    """A Redis that also listens with TLS. Debian's can; the embedded Valkey is built without."""

    def command(self) -> list[str]:
        pem, key = kit.certificate(self.folder)
        port = str(kit.free_port())
        self.tls_url = f"rediss://{kit.LOOPBACK}:{port}/0?ssl_ca_certs={pem}"
        files = ("--tls-cert-file", str(pem), "--tls-key-file", str(key))
        _, *own = super().command()
        return [kit.needs("redis-server"), *own, "--tls-port", port, *files, "--tls-auth-clients", "no"]


@pytest.fixture(scope="module")
def encrypted_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncryptedRedis]:
    process = EncryptedRedis(tmp_path_factory.mktemp("encrypted"))
    yield process
    process.kill()


@both_ways
def test_over_tls_all_comes_whole_and_in_order_live_and_after_a_return(
    encrypted_redis: EncryptedRedis, start: Start, channel: str
) -> None:
    url = encrypted_redis.tls_url
    server = start(redis=url)
    larger_than_a_record = [*(letter * 200_000 for letter in "abcd"), "é" * 100_000]
    first = server.publish_id("first", channel)

    with server.opened(channel) as stream:
        server.publish("by HTTP", channel)
        kit.run("publish", channel, "by command", REDIS_URL=url)
        ssepush.publish("by Python", channel=channel, redis_url=url)
        assert stream.data(3) == ["by HTTP", "by command", "by Python"]
        for data in larger_than_a_record:
            encrypted_redis.publish_event(channel, data=data)
        came = stream.data(5)
        assert came == larger_than_a_record, [len(data) for data in came]
        encrypted_redis.publish_all(channel, kit.numbers(0, 2000))
        assert stream.data(2000) == kit.numbers(0, 2000)
    with server.stream(channel, Last_Event_ID=first) as stream:
        assert stream.data(3) == ["by HTTP", "by command", "by Python"]
    assert server.said(url.partition("?")[0])
    assert server.get("/healthz").status == 200


@pytest.mark.parametrize("query", ["", "?ssl_ca_certs=/no/such/file.pem"], ids=["unknown authority", "missing file"])
def test_a_redis_whose_certificate_cannot_be_checked_gets_nothing_and_is_a_reason_not_to_start(
    encrypted_redis: EncryptedRedis, query: str
) -> None:
    url = encrypted_redis.tls_url.partition("?")[0] + query

    assert "not published" in kit.the_line(kit.run("publish", "sse", "hi", "--redis-url", url), 1)
    assert query or "certificate verify failed" in kit.the_line(kit.run("--port", "0", REDIS_URL=url), 2)


# ── Over a Unix socket ───────────────────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_redis_is_reached_over_a_unix_socket(start: Start, redis_process: RedisProcess, channel: str) -> None:
    url = f"unix://{redis_process.socket_path}"
    server = start(redis=url)
    first = server.publish("one", channel)
    stream = server.stream(channel, Last_Event_ID=first["id"])

    ssepush.publish("x" * 200_000, channel=channel, redis_url=url)
    done = kit.run("publish", channel, "three", REDIS_URL=url)

    assert stream.data(2) == ["x" * 200_000, "three"]
    assert done.stdout == "1\n"
    assert server.said(f"unix://{redis_process.socket_path}")
    assert server.get("/healthz").status == 200


# ── With as few rights as possible ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def restricted_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that knows the deployed user."""
    users = tmp_path / "users.acl"
    users.write_text((kit.DEPLOY / "redis.acl").read_text())
    process = RedisProcess(tmp_path, "--aclfile", str(users))
    yield process
    process.kill()


@both_ways
def test_the_deployed_redis_user_may_do_everything_that_is_needed(
    start: Start, restricted_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = restricted_redis.url.replace("://", "://ssepush:CHANGE-ME@")
    monkeypatch.setenv("SSEPUSH_PREFIX", "pages:")
    server = start(
        "--history",
        "2",
        "--heartbeat",
        "0.5",
        redis=url,
        SSEPUSH_SECRET="a secret of the tests",
        SSEPUSH_PREFIX="pages:",
    )
    token = ssepush.sign("private-a", ttl=60, secret="a secret of the tests")
    query = f"channel=sse&channel=sse:news&channel=private-a&token={token}"

    stream = server.stream(query=query)
    first = server.publish("by HTTP", "sse:news")
    kit.run("publish", "private-a", "by command", REDIS_URL=url, SSEPUSH_PREFIX="pages:")
    ssepush.publish("by Python", redis_url=url, history=2)
    resumed = server.stream(query=query, Last_Event_ID=first["id"])

    assert stream.data(3) == ["by HTTP", "by command", "by Python"]
    assert resumed.data(2) == ["by command", "by Python"]
    for number in range(3):
        server.publish(number)
    trimmed = server.stream(query=query, Last_Event_ID=first["id"])
    assert trimmed.next().type == "stream-reset"
    assert server.get("/healthz").status == 200
    for left in (stream, resumed, trimmed):
        left.close()
    wait_for(lambda: server.streams() == 0, "the streams are closed")
    wait_for(lambda: restricted_redis.subscribers("pages:sse:news") == 0, "Redis is unsubscribed")
    assert not restricted_redis.client.acl_log()


FORBIDDEN = """
    KEYS *, GET other, GET ssepush:counter, DEL ssepush2:x, FLUSHALL, CONFIG GET *, CLIENT LIST, SUBSCRIBE other,
    PSUBSCRIBE *, HSET other a b, XADD other * a b, XREVRANGE other + -, ZADD other 1 a, PUBLISH other hi, ACL LIST
"""


def test_the_deployed_redis_user_may_do_nothing_else(restricted_redis: RedisProcess) -> None:
    user = redis.Redis(port=restricted_redis.port, username="ssepush", password="CHANGE-ME", protocol=2)

    with contextlib.closing(user):
        for command in FORBIDDEN.split(","):
            with pytest.raises(redis.exceptions.NoPermissionError):
                user.execute_command(*command.split())  # type: ignore[no-untyped-call]


@both_ways
def test_a_channel_that_the_redis_user_may_not_read_ends_the_stream_and_no_other(
    start: Start, restricted_redis: RedisProcess
) -> None:
    server = start(redis=restricted_redis.url_of("ssepush", "CHANGE-ME"))
    allowed = server.stream("pages:sse")

    for query in ("channel=other", "channel=pages:sse&channel=other", "channel=other&channel=pages:sse"):
        refused = server.stream(query=query)
        assert refused.status == 200
        assert refused.until_end() == []
        assert "permission" in " ".join(refused.parser.comments)
        assert refused.says_why()
        assert refused.comes_back_after()
    server.publish("hi", "pages:sse")

    assert allowed.next().data == "hi"
    assert server.streams() == 1
    wait_for(lambda: server.said("NOPERM") or server.said("permission"), "why is logged")
    wait_for(lambda: restricted_redis.subscribers("pages:sse") == 1, "what was subscribed in vain is given up")


@both_ways
def test_streams_whose_replay_redis_does_not_answer_are_told_to_come_back(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--heartbeat", "1", redis=own_redis)
    missed = server.publish_id("missed", channel)
    own_redis.client.client_pause(20_000)  # connections are taken, and nothing is answered

    headers = {"Last_Event_ID": missed}
    streams = [server.stream(channel, **headers), server.stream(f"{channel}-other", **headers)]

    for stream in streams:
        assert stream.until_end() == []
        assert stream.says_why()
        assert stream.comes_back_after()
    assert server.refused("redis-away") == 2
    assert server.streams() == 0


# ── After a restart ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def snapshot_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that keeps nothing but the snapshots that it is asked for."""
    process = RedisProcess(tmp_path, "--repl-diskless-sync-delay", "0")
    yield process
    process.kill()


@pytest.fixture
def replica(snapshot_redis: RedisProcess, tmp_path: Path) -> Iterator[RedisProcess]:
    """A replica of that Redis, once it is asked for."""
    folder = tmp_path / "replica"
    folder.mkdir()
    process = RedisProcess(folder)
    yield process
    process.kill()


def follow(replica: RedisProcess, master: RedisProcess) -> None:
    """Be its replica, and have all that it has."""
    replica.client.replicaof(kit.LOOPBACK, str(master.port))
    wait_for(lambda: replica.client.info("replication")["master_link_status"] == "up", "it follows")
    wait_for(lambda: master.client.wait(1, 100) == 1, "it has everything")


def test_a_replica_refuses_to_publish(snapshot_redis: RedisProcess, replica: RedisProcess, channel: str) -> None:
    follow(replica, snapshot_redis)

    with pytest.raises(ssepush.RedisRefused, match="replica"):
        ssepush.publish("hi", channel=channel, redis_url=replica.url)


@both_ways
def test_nobody_is_reset_because_redis_has_got_its_first_replica(
    snapshot_redis: RedisProcess, replica: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--retry", "1", redis=snapshot_redis)
    page = kit.Page(server.port, channel)
    wait_for(lambda: page.last_event_id, "the page has a position")
    server.publish("before", channel)

    follow(replica, snapshot_redis)
    for data in ("after", "last"):
        server.publish(data, channel)

    page.wait_for("last")
    assert page.data() == ["before", "after", "last"]


def test_ids_rise_over_all_and_pages_are_told_of_the_loss_however_often_redis_is_emptied_under_load(
    snapshot_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=snapshot_redis)
    is_enough = threading.Event()

    def publish() -> None:
        while not is_enough.is_set():
            ssepush.publish("load", channel=channel, redis_url=snapshot_redis.url)

    publishers = [threading.Thread(target=publish) for _ in range(3)]
    resets = Counter[str]()
    ids = []
    pubsub: Any = snapshot_redis.client.pubsub()  # type: ignore[no-untyped-call]
    with contextlib.closing(pubsub):
        pubsub.subscribe(channel)
        for publisher in publishers:
            publisher.start()
        for _ in range(100):
            told = server.publish_id("mine", channel)
            snapshot_redis.client.flushall()
            with server.stream(channel, Last_Event_ID=told) as stream:
                resets[stream.next().data] += 1
        is_enough.set()
        for publisher in publishers:
            publisher.join()
        while message := pubsub.get_message(timeout=0.5):
            if message["type"] == "message":
                ids.append(json.loads(message["data"])["id"])

    assert len(ids) > 100
    assert ids == sorted(set(ids))  # as text they are in order, too
    assert resets == {'{"reason": "data-lost"}': 100}


@both_ways
@pytest.mark.parametrize("since", [[], [""], ["-other"]], ids=["nothing", "on its own channel", "on another"])
def test_a_page_is_reset_when_a_lagging_replica_was_promoted_whatever_was_published_since(
    snapshot_redis: RedisProcess, replica: RedisProcess, start: Start, channel: str, since: list[str]
) -> None:
    master = start(redis=snapshot_redis)
    before = master.publish_id("known to both", channel)
    follow(replica, snapshot_redis)
    nobody = str(kit.free_port())
    replica.client.replicaof(kit.LOOPBACK, nobody)
    after = master.publish_id("the replica never had it", channel)
    replica.client.replicaof("NO", "ONE")

    promoted = start("--retry", "1", redis=replica)
    for end in since:
        promoted.publish("since", f"{channel}{end}")

    streams = [promoted.stream(channel, Last_Event_ID=told) for told in (before, after)]
    for stream in streams:
        reset = stream.next()
        assert (reset.type, reset.json) == ("stream-reset", {"reason": "data-lost"})
    promoted.publish("last", channel)
    for stream in streams:
        assert stream.next().data == "last"


def test_a_type_that_is_nested_deeper_than_anybody_can_read_is_refused(server: kit.ServerProcess) -> None:
    nested = "[" * 982 + "]" * 982

    answer = server.post(f'{{"data": 1, "type": {nested}}}')

    assert answer.status == 400
    assert "nested" in answer.error
