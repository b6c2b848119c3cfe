"""Redis as it is deployed: over TLS, over a Unix socket, and with a user who may do only what ssepush needs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import ssepush
from tests.kit import (
    DEPLOY,
    LOOPBACK,
    Page,
    RedisProcess,
    ServerProcess,
    Start,
    both_ways,
    certificate,
    free_port,
    program,
    run,
    the_line,
    wait_for,
)

# ── Over TLS ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class EncryptedRedis(RedisProcess):
    """A Redis that also listens with TLS. Debian's can; the embedded Valkey is built without."""

    def start(self) -> None:
        self.pem, key = certificate(self.folder)
        self.tls_port = free_port()
        self.tls_url = f"rediss://127.0.0.1:{self.tls_port}/0?ssl_ca_certs={self.pem}"
        arguments = [
            program("redis-server"),
            "--port",
            str(self.port),
            "--tls-port",
        ]
        arguments += [
            str(self.tls_port),
            "--tls-cert-file",
            str(self.pem),
            "--tls-key-file",
            str(key),
        ]
        arguments += [
            "--tls-auth-clients",
            "no",
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.folder),
            "--save",
            "",
        ]
        self.log = (self.folder / "redis.log").open("ab")
        self.process = subprocess.Popen(
            [*arguments, *self.options],
            stdout=self.log,
            stderr=self.log,
        )
        wait_for(self.answers, "Redis answers")


@pytest.fixture(scope="module")
def encrypted_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncryptedRedis]:
    process = EncryptedRedis(tmp_path_factory.mktemp("encrypted"))
    yield process
    process.kill()


@pytest.fixture(
    scope="module",
    params=[(), ("--shared",)],
    ids=["subscriber each", "shared"],
)
def server_over_tls(request: pytest.FixtureRequest, encrypted_redis: EncryptedRedis) -> Iterator[ServerProcess]:
    """A server that knows its Redis by rediss:// alone."""
    process = ServerProcess(encrypted_redis.tls_url, *request.param)
    yield process
    assert process.terminate() == 0
    assert "Traceback" not in process.output, process.output


def test_events_come_over_tls(
    server_over_tls: ServerProcess,
    encrypted_redis: EncryptedRedis,
    channel: str,
) -> None:
    stream = server_over_tls.stream(channel)

    server_over_tls.publish("by HTTP", channel)
    run("publish", channel, "by command", REDIS_URL=encrypted_redis.tls_url)
    ssepush.publish("by Python", channel=channel, redis_url=encrypted_redis.tls_url)

    assert stream.data(3) == ["by HTTP", "by command", "by Python"]
    assert server_over_tls.said(f"rediss://127.0.0.1:{encrypted_redis.tls_port}/0")
    assert server_over_tls.get("/healthz").status == 200


def test_messages_larger_than_a_tls_record_come_whole(
    server_over_tls: ServerProcess, encrypted_redis: EncryptedRedis, channel: str
) -> None:
    stream = server_over_tls.stream(channel)
    large = [
        *(letter * 200_000 for letter in "abcd"),
        "é" * 100_000,
    ]

    for data in large:
        encrypted_redis.publish(channel, json.dumps({"data": data}, ensure_ascii=False))

    came = stream.data(5)
    assert came == large, [len(data) for data in came]


def test_a_burst_comes_over_tls_in_order(
    server_over_tls: ServerProcess, encrypted_redis: EncryptedRedis, channel: str
) -> None:
    streams = [server_over_tls.stream(channel) for _ in range(3)]
    with encrypted_redis.client.pipeline(transaction=False) as pipeline:
        for number in range(2000):
            pipeline.publish(channel, str(number))

        pipeline.execute()

    for stream in streams:
        assert stream.data(2000) == [str(number) for number in range(2000)]


def test_a_stream_resumes_over_tls(
    server_over_tls: ServerProcess, encrypted_redis: EncryptedRedis, channel: str
) -> None:
    first = server_over_tls.publish("one", channel)
    server_over_tls.publish("x" * 100_000, channel)

    stream = server_over_tls.stream(channel, Last_Event_ID=first["id"])

    assert stream.next().data == "x" * 100_000


UNTRUSTED = {"unknown authority": "", "missing file": "?ssl_ca_certs=/no/such/file.pem"}


@pytest.mark.parametrize(
    "query",
    UNTRUSTED.values(),
    ids=UNTRUSTED,
)
def test_nothing_is_published_to_a_redis_whose_certificate_cannot_be_checked(
    encrypted_redis: EncryptedRedis, query: str
) -> None:
    url = f"rediss://127.0.0.1:{encrypted_redis.tls_port}/0{query}"

    assert "not published" in the_line(run("publish", "sse", "hi", "--redis-url", url), 1)


def test_a_redis_whose_certificate_cannot_be_checked_is_a_reason_not_to_start(encrypted_redis: EncryptedRedis) -> None:
    done = run("--port", "0", REDIS_URL=f"rediss://127.0.0.1:{encrypted_redis.tls_port}/0")

    assert "certificate verify failed" in the_line(done, 2)


# ── Over a Unix socket ───────────────────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_redis_is_reached_over_a_unix_socket(
    start: Start,
    redis_process: RedisProcess,
    channel: str,
) -> None:
    url = f"unix://{redis_process.socket_path}"
    server = start(redis=url)
    first = server.publish("one", channel)
    stream = server.stream(channel, Last_Event_ID=first["id"])

    ssepush.publish("x" * 200_000, channel=channel, redis_url=url)
    done = run("publish", channel, "three", REDIS_URL=url)

    assert stream.data(2) == ["x" * 200_000, "three"]
    assert done.stdout == "1\n"
    assert server.said(f"unix://{redis_process.socket_path}")
    assert server.get("/healthz").status == 200


# ── With as few rights as possible ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def restricted_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that knows the deployed user."""
    users = tmp_path / "users.acl"
    users.write_text((DEPLOY / "redis.acl").read_text())
    process = RedisProcess(tmp_path, "--aclfile", str(users))
    yield process
    process.kill()


@both_ways
def test_the_deployed_redis_user_may_do_everything_that_is_needed(
    start: Start,
    restricted_redis: RedisProcess,
    monkeypatch: pytest.MonkeyPatch,
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
    run("publish", "private-a", "by command", REDIS_URL=url, SSEPUSH_PREFIX="pages:")
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


FORBIDDEN = [
    "KEYS *",
    "GET other",
    "GET ssepush:counter",
    "DEL ssepush2:x",
    "FLUSHALL",
    "CONFIG GET *",
    "CLIENT LIST",
    "SUBSCRIBE other",
    "PSUBSCRIBE *",
    "HSET other a b",
    "XADD other * a b",
    "XREVRANGE other + -",
    "ZADD other 1 a",
    "PUBLISH other hi",
    "ACL LIST",
]


@pytest.mark.parametrize("command", FORBIDDEN)
def test_the_deployed_redis_user_may_do_nothing_else(restricted_redis: RedisProcess, command: str) -> None:
    client = redis.Redis(
        port=restricted_redis.port,
        username="ssepush",
        password="CHANGE-ME",
        protocol=2,
    )

    with contextlib.closing(client), pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command.split())  # type: ignore[no-untyped-call]


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
        assert len([comment for comment in refused.parser.comments if comment]) == 1
        assert refused.parser.retry_ms
    server.publish("hi", "pages:sse")

    assert allowed.next().data == "hi"
    assert server.streams() == 1
    wait_for(lambda: server.said("NOPERM") or server.said("permission"), "why is logged")
    wait_for(lambda: restricted_redis.subscribers("pages:sse") == 1, "what was subscribed in vain is given up")


@both_ways
def test_a_stream_that_redis_refuses_is_told_why(start: Start, restricted_redis: RedisProcess) -> None:
    server = start(redis=restricted_redis.url_of("ssepush", "CHANGE-ME"))

    refused = server.stream("other")
    refused.until_end()

    assert any("permission" in comment for comment in refused.parser.comments), refused.parser.comments


def test_publishing_to_a_channel_that_the_redis_user_may_not_use_is_an_error_that_says_so(
    start: Start, restricted_redis: RedisProcess
) -> None:
    server = start(redis=restricted_redis.url_of("ssepush", "CHANGE-ME"))

    answer = server.post('{"channel": "other", "data": 1}')

    assert answer.status == 503
    assert "permission" in answer.error


@both_ways
def test_streams_whose_replay_redis_does_not_answer_are_told_to_come_back(
    own_redis: RedisProcess,
    start: Start,
    channel: str,
) -> None:
    server = start(redis=own_redis)
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


@both_ways
def test_the_first_page_that_comes_back_to_a_redis_that_forgot_is_sent_nothing_twice(
    tmp_path: Path, start: Start, channel: str
) -> None:
    forgetful = RedisProcess(tmp_path)
    server = start(redis=forgetful)
    kept = server.publish_id("kept", channel)
    forgetful.client.save()
    forgetful.kill()
    forgetful.start()

    with contextlib.closing(server.stream(channel, Last_Event_ID=kept)) as stream:
        assert stream.next().type == "stream-reset"
        server.publish("later", channel)
        assert stream.next().data == "later"
    with contextlib.closing(server.stream(channel, Last_Event_ID=stream.last_event_id)) as stream:
        server.publish("last", channel)
        assert stream.next().data == "last"
    forgetful.kill()


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
    replica.client.replicaof(LOOPBACK, str(master.port))
    wait_for(lambda: replica.client.info("replication")["master_link_status"] == "up", "it follows")
    wait_for(lambda: master.client.wait(1, 100) == 1, "it has everything")


@both_ways
def test_nobody_is_reset_because_redis_has_got_its_first_replica(
    snapshot_redis: RedisProcess,
    replica: RedisProcess,
    start: Start,
    channel: str,
) -> None:
    server = start("--retry", "1", redis=snapshot_redis)
    page = Page(server.port, channel)
    wait_for(lambda: page.last_event_id, "the page has a position")
    server.publish("before", channel)

    follow(replica, snapshot_redis)
    for data in ("after", "last"):
        server.publish(data, channel)

    page.wait_for("last")
    assert page.data() == ["before", "after", "last"]


def test_ids_rise_over_all_and_pages_are_told_of_the_loss_however_often_redis_is_emptied_under_load(
    snapshot_redis: RedisProcess,
    start: Start,
    channel: str,
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


def assert_reset(server: ServerProcess, channel: str, *told: str) -> None:
    """Pages that were told these ids are reset when they come back, and then get what is published."""
    streams = [server.stream(channel, Last_Event_ID=id) for id in told]
    for stream in streams:
        reset = stream.next()
        assert reset.type == "stream-reset"
        assert reset.json == {"reason": "data-lost"}
    server.publish("last", channel)
    for stream in streams:
        assert stream.next().data == "last"
        stream.close()


SINCE = {  # what has been published when the page comes back
    "nothing": [],
    "on its own channel": [""],
    "on another": ["-other"],
}


@both_ways
@pytest.mark.parametrize("since", SINCE)
def test_a_page_is_reset_when_a_lagging_replica_was_promoted_whatever_was_published_since(
    snapshot_redis: RedisProcess,
    replica: RedisProcess,
    start: Start,
    channel: str,
    since: str,
) -> None:
    master = start(redis=snapshot_redis)
    before = master.publish_id("known to both", channel)
    follow(replica, snapshot_redis)
    nobody = str(free_port())
    replica.client.replicaof(LOOPBACK, nobody)
    after = master.publish_id("the replica never had it", channel)
    replica.client.replicaof("NO", "ONE")

    promoted = start("--retry", "1", redis=replica)
    for end in SINCE[since]:
        promoted.publish("since", f"{channel}{end}")

    assert_reset(promoted, channel, before, after)


def test_a_type_that_is_nested_deeper_than_anybody_can_read_is_refused(server: ServerProcess) -> None:
    nested = "[" * 982 + "]" * 982

    answer = server.post(f'{{"data": 1, "type": {nested}}}')

    assert answer.status == 400
    assert "nested" in answer.error
