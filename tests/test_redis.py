"""Redis as it is deployed: over TLS, over a Unix socket, and with a user who may do only what ssepush needs."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import ssepush
from tests import kit
from tests.kit import RedisProcess, Start, both_ways, wait_for

SECRET = "a secret of the tests"

# ── Over TLS, and over a Unix socket ──────────────────────────────────────────────────────────────────────────────────


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
@pytest.mark.parametrize("over", ["encrypted_redis", "redis_process"], ids=["TLS", "a Unix socket"])
def test_all_comes_whole_over(request: pytest.FixtureRequest, start: Start, channel: str, over: str) -> None:
    process = request.getfixturevalue(over)
    url = getattr(process, "tls_url", f"unix://{process.socket_path}")
    server = start(redis=url)
    larger_than_a_record = [*(letter * 200_000 for letter in "abcd"), "é" * 100_000]
    first = server.publish_id("first", channel)

    with server.opened(channel) as stream:
        server.publish("by HTTP", channel)
        assert kit.run("publish", channel, "by command", REDIS_URL=url).stdout == "1\n"
        ssepush.publish("by Python", channel=channel, redis_url=url)
        for data in larger_than_a_record:
            process.publish_event(channel, data=data)
        process.publish_all(channel, kit.numbers(0, 2000))
        assert stream.data(3) == ["by HTTP", "by command", "by Python"]
        came = stream.data(5)
        assert came == larger_than_a_record, [len(data) for data in came]
        assert stream.data(2000) == kit.numbers(0, 2000)
    with server.stream(channel, Last_Event_ID=first) as stream:
        assert stream.data(3) == ["by HTTP", "by command", "by Python"]
    assert server.said(url.partition("?")[0])
    assert server.get("/healthz").status == 200


@pytest.mark.parametrize("query", ["", "?ssl_ca_certs=/no/such/file.pem"], ids=["unknown authority", "missing file"])
def test_a_certificate_that_cannot_be_checked_is_a_reason_to_stop(encrypted_redis: EncryptedRedis, query: str) -> None:
    url = encrypted_redis.tls_url.partition("?")[0] + query

    assert "not published" in kit.the_line(kit.run("publish", "sse", "hi", "--redis-url", url), 1)
    assert query or "certificate verify failed" in kit.the_line(kit.run("--port", "0", REDIS_URL=url), 2)


# ── With as few rights as possible ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def restricted_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that knows the deployed user."""
    process = RedisProcess(tmp_path, "--aclfile", str(shutil.copy(kit.DEPLOY / "redis.acl", tmp_path)))
    yield process
    process.kill()


@both_ways
def test_the_deployed_redis_user_may_do_everything_that_is_needed(start: Start, restricted_redis: RedisProcess) -> None:
    url = restricted_redis.url_of("ssepush", "CHANGE-ME")
    settings: dict[str, Any] = {"SSEPUSH_SECRET": SECRET, "SSEPUSH_PREFIX": "pages:"}
    server = start("--history", "2", "--heartbeat", "0.5", redis=url, **settings)
    token = ssepush.sign("private-a", ttl=60, secret=SECRET)
    query = f"channel=sse&channel=sse:news&channel=private-a&token={token}"

    stream = server.stream(query=query)
    first = server.publish_id("by HTTP", "sse:news")
    kit.run("publish", "private-a", "by command", REDIS_URL=url, **settings)
    ssepush.publish("by Python", redis_url=url, history=2, prefix="pages:")
    resumed = server.stream(query=query, Last_Event_ID=first)

    assert stream.data(3) == ["by HTTP", "by command", "by Python"]
    assert resumed.data(2) == ["by command", "by Python"]
    for number in range(3):
        server.publish(number)
    trimmed = server.stream(query=query, Last_Event_ID=first)
    assert trimmed.next().type == "stream-reset"
    assert server.get("/healthz").status == 200
    for left in (stream, resumed, trimmed):
        left.close()
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
def test_a_channel_that_redis_refuses_is_named_and_harms_no_other(start: Start, restricted_redis: RedisProcess) -> None:
    server = start(redis=restricted_redis.url_of("ssepush", "CHANGE-ME"))
    allowed = server.stream("pages:sse")
    told = [server.post({"data": 1, "channel": "other"}).error]

    for names in (["other"], ["pages:sse", "other"], ["other", "pages:sse"]):
        refused = server.stream(*names)
        assert refused.status == 200
        assert refused.until_end() == []
        assert refused.says_why()
        assert refused.comes_back_after()
        told += refused.parser.comments
    server.publish("hi", "pages:sse")

    assert allowed.next().data == "hi"
    assert server.streams() == 1
    for line in told:
        assert "permission" in line
        assert "deploy/redis.acl" in line
        assert re.search("channel .*other", line)
        assert "script" not in line
    assert server.metric('publishes_total{status="redis-refused"}') == 1
    assert server.refused("redis-refused") == 3
    wait_for(lambda: server.said("NOPERM") or server.said("permission"), "why is logged")
    wait_for(lambda: restricted_redis.subscribers("pages:sse") == 1, "what was subscribed in vain is given up")


# ── After a restart, and with a replica ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def snapshot_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that keeps nothing but the snapshots that it is asked for."""
    process = RedisProcess(tmp_path, "--repl-diskless-sync-delay", "0")
    yield process
    process.kill()


@pytest.fixture
def replica(snapshot_redis: RedisProcess, tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that may become the replica of that one."""
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


def test_ids_rise_however_often_redis_is_emptied(snapshot_redis: RedisProcess, start: Start, channel: str) -> None:
    server = start(redis=snapshot_redis)
    resets = Counter[str]()
    pubsub: Any = snapshot_redis.client.pubsub()  # type: ignore[no-untyped-call]
    with contextlib.closing(pubsub):
        pubsub.subscribe(channel)
        publishers = [kit.Publisher(server.port, "load", channel) for _ in range(3)]
        for _ in range(100):
            told = server.publish_id("mine", channel)
            snapshot_redis.client.flushall()
            with server.stream(channel, Last_Event_ID=told) as stream:
                resets[stream.next().data] += 1
        for publisher in publishers:
            publisher.stop()
        messages = iter(functools.partial(pubsub.get_message, timeout=0.5), None)
        ids = [json.loads(message["data"])["id"] for message in messages if message["type"] == "message"]

    assert len(ids) > 100
    assert ids == sorted(set(ids))  # as text they are in order, too
    assert resets == {'{"reason": "data-lost"}': 100}


@both_ways
@pytest.mark.parametrize("since", [[], [""], ["-other"]], ids=["nothing", "on its own channel", "on another"])
@pytest.mark.parametrize("loss", ["a lagging replica was promoted", "it came back from a snapshot"])
def test_a_page_is_reset_once_when_redis_has_lost_something(
    snapshot_redis: RedisProcess, replica: RedisProcess, start: Start, channel: str, loss: str, since: list[str]
) -> None:
    master = server = start("--retry", "1", redis=snapshot_redis)
    kept = master.publish_id("kept", channel)
    if "snapshot" in loss:
        snapshot_redis.client.save()
    else:
        follow(replica, snapshot_redis)
        replica.client.replicaof(kit.LOOPBACK, str(kit.free_port()))  # where nobody is
    forgotten = master.publish_id("forgotten", channel)
    if "snapshot" in loss:
        snapshot_redis.kill()
        snapshot_redis.start()
    else:
        replica.client.replicaof("NO", "ONE")
        server = start("--retry", "1", redis=replica)
    for end in since:
        server.publish("since", f"{channel}{end}")

    streams = [server.stream(channel, Last_Event_ID=told) for told in (kept, forgotten)]
    for stream in streams:
        reset = stream.next()
        assert (reset.type, reset.json) == ("stream-reset", {"reason": "data-lost"})
    server.publish("later", channel)
    for stream in streams:
        assert stream.next().data == "later"
        with server.stream(channel, Last_Event_ID=stream.last_event_id) as again:
            server.publish("last", f"{channel}-other")
            server.publish("last", channel)
            assert again.next().data == "last"
