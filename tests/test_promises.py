"""The promises where they were once seen to break: forgetful Redis, foreign ids, strangers; and what pages need."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ssepush
from tests import kit
from tests.kit import RedisProcess, ServerProcess, Start, both_ways, wait_for

SECRET = "a secret of these tests"


def assert_reset(stream: kit.EventStream, reason: str) -> None:
    """What comes next is a reset for this reason."""
    event = stream.next()
    assert event.type == "stream-reset"
    assert event.json["reason"] == reason


def stat(process: RedisProcess, name: str) -> int:
    """A number that Redis knows of itself."""
    stats = process.client.info("stats")
    return int(stats[name])


# ── A Redis that forgot ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def snapshot_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that keeps nothing but the snapshots that it is asked for."""
    process = RedisProcess(tmp_path)
    yield process
    process.kill()


@both_ways
@pytest.mark.parametrize("position", ["kept", "forgotten"])
@pytest.mark.parametrize("since", [None, "", "-other"], ids=["nothing since", "there since", "elsewhere since"])
def test_a_page_is_reset_when_redis_came_back_from_a_snapshot_and_then_sent_nothing_twice(
    snapshot_redis: RedisProcess, start: Start, channel: str, position: str, since: str | None
) -> None:
    server = start("--retry", "1", redis=snapshot_redis)
    told = {"kept": server.publish_id("kept", channel)}
    snapshot_redis.client.save()
    told["forgotten"] = server.publish_id("forgotten", channel)
    snapshot_redis.kill()
    snapshot_redis.start()
    if since is not None:
        server.publish("since", f"{channel}{since}")

    with server.stream(channel, Last_Event_ID=told[position]) as stream:
        assert_reset(stream, "data-lost")
        server.publish("later", channel)
        assert stream.next().data == "later"
    with server.stream(channel, Last_Event_ID=stream.last_event_id) as stream:
        server.publish("last", channel)
        assert stream.next().data == "last"


@both_ways
def test_live_events_go_on_when_redis_lost_its_data_and_its_clock_went_back(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=own_redis)
    server.publish("before", channel)
    in_a_minute_s = int(time.time()) + 60
    own_redis.client.hset(ssepush.COUNTER_KEY, "newest", f"{in_a_minute_s}000000")
    with server.opened(channel) as stream:
        own_redis.client.flushall()

        for data in kit.numbers(0, 5):
            published = server.publish(data, channel)
            assert published["receivers"] == 1

        assert stream.data(5) == kit.numbers(0, 5)


# ── Ids that somebody else sends ─────────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_a_message_that_a_program_forwards_to_another_channel_is_an_event_there_too(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    other = f"{channel}-other"
    server = start()
    pubsub: Any = redis_process.client.pubsub()  # type: ignore[no-untyped-call]
    with contextlib.closing(pubsub), server.opened(channel, other) as stream:
        pubsub.subscribe(channel)
        confirmation = pubsub.get_message(timeout=kit.DEADLINE_S)
        assert confirmation["type"] == "subscribe"
        original = server.publish_id("hello", channel)
        message = pubsub.get_message(timeout=kit.DEADLINE_S)

        redis_process.publish(other, message["data"])
        server.publish("last", other)

        first, forwarded, last = stream.take(3)
    assert first.id == forwarded.id == original
    assert forwarded.data == "hello"
    assert last.data == "last"


@both_ways
def test_a_plain_publish_with_an_old_id_reaches_a_stream_that_just_resumed(start: Start, channel: str) -> None:
    server = start()
    old = server.publish_id("first", channel)
    server.publish("second", channel)
    with server.stream(channel, Last_Event_ID=old) as stream:
        assert stream.data(1) == ["second"]
        server.redis.publish_event(channel, data="plain", id=old)

        assert stream.next().data == "plain"


def test_what_readers_could_not_take_is_refused_however_much_its_publisher_can() -> None:
    limit = sys.getrecursionlimit()
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    sys.setrecursionlimit(50_000)
    try:
        with pytest.raises(ValueError, match="nested too deeply"):
            ssepush.message_of(deep)
    finally:
        sys.setrecursionlimit(limit)


def test_streams_leave_half_of_redis_connections_to_others(tmp_path: Path, start: Start, channel: str) -> None:
    process = RedisProcess(tmp_path, "--maxclients", "60")
    try:
        server = start(redis=process)
        streams = [server.opened(channel) for _ in range(30)]
        refused = server.stream(channel)

        assert refused.until_end() == []
        assert refused.parser.comments == ["this server is full"]
        assert process.client.ping()
        wait_for(lambda: server.said("at most 30 streams"), "how many there may be is logged")
        for stream in streams:
            stream.close()
    finally:
        process.kill()


def test_one_ping_a_second_serves_all_who_ask_for_health(own_redis: RedisProcess, start: Start) -> None:
    server = start(redis=own_redis)
    before = stat(own_redis, "total_connections_received")
    began = time.monotonic()

    for _ in range(300):
        assert server.get("/healthz").status == 200

    passed_s = time.monotonic() - began
    after = stat(own_redis, "total_connections_received")
    assert after - before <= passed_s + 4


def test_a_password_on_the_command_line_is_warned_of(redis_process: RedisProcess) -> None:
    url = redis_process.url.replace("redis://", "redis://default:nonsense@")

    done = kit.run("publish", "sse", "hi", "--redis-url", url)

    assert "warning" in done.stderr
    assert "REDIS_URL" in done.stderr
    assert "nonsense" not in done.stderr


def test_http_1_0_is_not_told_to_continue(server: ServerProcess) -> None:
    fields = (b"Content-Type: application/json", b"Expect: 100-continue", b"Content-Length: 11")
    sent = kit.request(b"POST /publish HTTP/1.0", *fields, body=b'{"data": 1}')

    assert kit.exchange(server.port, sent).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("arguments", ["--port 0", "sign private-x"])
def test_a_secret_that_can_be_guessed_is_refused_with_how_to_make_one(
    arguments: str, redis_process: RedisProcess
) -> None:
    refused = kit.run(*arguments.split(), REDIS_URL=redis_process.url, SSEPUSH_SECRET="12345")

    assert "secrets.token_urlsafe" in kit.the_line(refused, 2)


def test_a_stream_of_many_channels_is_a_short_line_of_the_log(start: Start, channel: str) -> None:
    server = start()
    long = "x" * 150
    channels = [f"{channel}-{long}-{number}" for number in range(20)]
    with server.opened(*channels):
        wait_for(lambda: server.said("open: "), "its opening is logged")

        [line] = [line for line in server.output.splitlines() if "open: " in line]
    assert len(line) < 1000  # of 20 names with 170 bytes each


@both_ways
def test_a_channel_that_redis_does_not_allow_is_named_with_the_file_of_what_is_needed(
    own_redis: RedisProcess, start: Start
) -> None:
    own_redis.client.acl_setuser(
        "pusher", enabled=True, passwords=["+pw"], keys=["ssepush2:*"], channels=["mine"], categories=["+@all"]
    )
    url = own_redis.url_of("pusher", "pw")
    server = start(redis=url)
    refused = server.post({"data": 1, "channel": "theirs"})
    stream = server.stream("theirs")

    assert refused.status == 503
    assert stream.until_end() == []
    for told in (refused.error, stream.parser.comments[0]):
        assert "deploy/redis.acl" in told
        assert "channel theirs" in told
        assert "script" not in told
    assert server.metric('publishes_total{status="redis-refused"}') == 1
    assert server.refused("redis-refused") == 1


def test_a_replay_of_many_channels_reads_from_redis_what_it_sends_and_little_more(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    names = [f"{channel}-{number}" for number in range(20)]
    server = start(redis=own_redis)
    position = server.publish_id("first", names[0])
    for name in names:
        for data in kit.numbers(0, 10):
            server.publish(f"{data} {'x' * 15_000}", name)
    before = stat(own_redis, "total_net_output_bytes")

    with server.stream(*names, Last_Event_ID=position) as stream:
        events = stream.take(200)

    after = stat(own_redis, "total_net_output_bytes")
    sent = sum(len(event.data) for event in events)
    assert kit.first_words(events) == kit.numbers(0, 10) * 20
    assert after - before < 1.5 * sent


# ── What a page needs ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def keeper(start: Start) -> ServerProcess:
    """A server with private channels."""
    return start("--heartbeat", "0.4", SSEPUSH_SECRET=SECRET)


def token(*channels: str, ttl: int = 60) -> str:
    return ssepush.sign(*channels, ttl=ttl, secret=SECRET)


@both_ways
def test_the_last_event_of_a_stream_whose_token_expires_holds_its_position(start: Start, channel: str) -> None:
    server = start("--heartbeat", "0.4", SSEPUSH_SECRET=SECRET)
    name = f"private-{channel}"
    brief = f"token={token(name, ttl=2)}"
    with server.stream(name, query=brief) as stream:
        published = server.publish_id("hello", name)

        hello, expired = stream.until_end()

    assert hello.data == "hello"
    assert expired.type == "token-expired"
    assert expired.id == published
    server.publish("meanwhile", name)
    renewed = f"token={token(name)}"
    with server.stream(name, query=f"{renewed}&lastEventId={expired.id}") as stream:
        assert stream.next().data == "meanwhile"


@both_ways
def test_a_stream_with_a_genuine_token_that_has_expired_is_told_so_and_redis_is_asked_for_nothing(
    own_redis: RedisProcess, start: Start, channel: str
) -> None:
    server = start(redis=own_redis, SSEPUSH_SECRET=SECRET)
    name = f"private-{channel}"
    late = f"token={token(name, ttl=-5)}"
    told = server.publish_id("hello", name)
    connected = stat(own_redis, "total_connections_received")

    for position in (f"lastEventId={told}", "lastEventId=earliest", "last=1"):
        stream = server.stream(name, query=f"{late}&{position}")
        [expired] = stream.until_end()
        assert stream.status == 200
        assert expired.type == "token-expired"
        assert expired.id == (told if told in position else "")
        assert stream.comes_back_after(30_000)

    assert stat(own_redis, "total_connections_received") == connected
    assert "cmdstat_subscribe" not in own_redis.client.info("commandstats")


@both_ways
def test_a_browser_that_reads_slowly_is_told_that_its_token_has_expired_and_gets_the_rest_with_another(
    start: Start, channel: str
) -> None:
    server = start(SSEPUSH_SECRET=SECRET)
    name = f"private-{channel}"
    published = [f"{number} {'x' * 50_000}" for number in range(18)]
    with server.stream(name, query=f"token={token(name, ttl=2)}") as stream:
        stream.position()
        for data in published:
            server.publish(data, name)
        assert server.metric("backlog_bytes") > 0
        wait_for(lambda: server.closed("expired"), "the token has expired")

        *received, expired = stream.until_end()

    taken = [event.data for event in received]
    assert taken == published[: len(taken)]
    assert len(taken) < len(published)
    assert expired.type == "token-expired"
    assert expired.id == received[-1].id
    with server.stream(name, query=f"token={token(name)}&lastEventId={expired.id}") as stream:
        rest = published[len(taken) :]
        assert stream.data(len(rest)) == rest


def test_a_token_opens_the_up_to_twenty_channels_that_it_names_and_no_other(
    keeper: ServerProcess, channel: str
) -> None:
    *twenty, another = [f"private-{channel}-{number}" for number in range(21)]
    opens = f"token={token(*twenty)}"

    with keeper.stream(*twenty, query=opens) as stream:
        keeper.publish("for you", twenty[-1])
        assert stream.next().data == "for you"
    assert keeper.get(f"/stream?channel={another}&{opens}").status == 403
    for wrong in ([], [*twenty, another]):
        with pytest.raises(ValueError, match="1 to 20 channels"):
            token(*wrong)
    assert "1 to 20 channels" in kit.the_line(kit.run("sign", *twenty, another, SSEPUSH_SECRET=SECRET), 2)
    assert "CHANNEL" in kit.the_line(kit.run("sign", SSEPUSH_SECRET=SECRET), 2)


OTHER_AND_TOKEN = {  # headers of a request, each of which holds the right token
    "Authorization": {"Authorization": "Bearer {token} {other}"},
    "Authorization, as the last of several": {"Authorization": "Bearer {other} {other} {token}"},
    "a cookie": {"Cookie": "theme=dark; ssepush-token={token}"},
    "a cookie of several": {"Cookie": "ssepush-token={other} {token}; theme=dark"},
    "a cookie of several, in quotes": {"Cookie": 'ssepush-token="{other} {token}"'},
    "a cookie of several, encoded": {"Cookie": "ssepush-token={other}%20{token}"},
    "the second of two cookies": {"Cookie": "ssepush-token={other}; ssepush-token={token}"},
    "a cookie of a page of ours": {"Cookie": "ssepush-token={token}", "Origin": "http://127.0.0.1:{port}"},
    "a cookie of a named origin": {"Cookie": "ssepush-token={token}", "Origin": "https://app.example"},
}


@pytest.mark.parametrize("headers", OTHER_AND_TOKEN.values(), ids=OTHER_AND_TOKEN)
def test_a_token_may_come_in(headers: dict[str, str], start: Start, channel: str) -> None:
    server = start("--allow-origin", "https://app.example", SSEPUSH_SECRET=SECRET)
    private = f"private-{channel}"
    known = {"token": token(private), "other": token("private-other"), "port": server.port}

    with server.stream(private, **{field: text.format_map(known) for field, text in headers.items()}) as stream:
        server.publish("for you", private)

        assert stream.next().data == "for you"


@pytest.mark.parametrize("allowed", ["", "*", "null"])
def test_a_cookie_does_not_count_for_pages_of_an_origin_that_is_not_named(
    allowed: str, start: Start, channel: str
) -> None:
    options = ("--allow-origin", allowed) if allowed else ()
    server = start(*options, SSEPUSH_SECRET=SECRET)
    private = f"private-{channel}"
    path = f"/stream?channel={private}"
    cookie = f"ssepush-token={token(private)}"

    for origin in ("https://evil.example", "null", "http://localhost:1"):
        answer = server.get(path, "HEAD", Cookie=cookie, Origin=origin)
        assert answer.status == 403, origin
    assert server.get(path, "HEAD", Cookie=cookie).status == 200


APP = "https://app.example"
ASKED = """
    200 HEAD /stream, 400 GET /stream?last=x, 403 GET /stream?channel=private-x, 200 GET /position, 200 GET /,
    200 GET /healthz, 200 GET /metrics, 200 GET /notifications, 200 HEAD /numbers, 405 GET /publish,
    415 POST /publish, 204 OPTIONS /publish, 404 GET /nothing
"""


def test_each_answer_to_a_named_origin_says_that_credentials_may_come_along_and_no_other_does(start: Start) -> None:
    server = start("--allow-origin", APP, "--allow-origin", "*")
    paths = set()

    for asked in ASKED.split(","):
        status, method, path = asked.split()
        paths.add(path.partition("?")[0])
        named = server.get(path, method, Origin=APP)
        other = server.get(path, method, Origin="https://evil.example")
        assert named.status == int(status), asked
        assert named.headers["Access-Control-Allow-Origin"] == APP, asked
        assert named.headers["Access-Control-Allow-Credentials"] == "true", asked
        assert named.headers["Vary"] == "Origin", asked
        assert "Access-Control-Allow-Credentials" not in other.headers, asked
    assert ssepush.Handler.routes.keys() <= paths


KEPT = {"lastEventId=earliest": "0 1 2 3 4 5", "last=1": "4 5", "last=2": "2 3 4 5", "last=100": "0 1 2 3 4 5"}


@both_ways
def test_earliest_is_all_that_is_kept_and_last_the_newest_of_each_channel_then_live(start: Start, channel: str) -> None:
    other = f"{channel}-other"
    server = start()
    for even in (0, 2, 4):
        server.publish(str(even), channel)
        server.publish(str(even + 1), other)

    for query, expected in KEPT.items():
        data = expected.split()
        with server.stream(channel, other, query=query) as stream:
            assert stream.data(len(data)) == data
            assert stream.position()
            server.publish(query, f"{channel}-nobody")
    with server.stream(channel, query="last=1") as stream:
        server.publish("live", channel)
        assert stream.data(2) == ["4", "live"]


POSITIONS = {  # what a stream asks for after three events, an id in the header first: what it begins with
    "|lastEventId={one}&lastEventId={two}": "three",
    "|lastEventId={two}&lastEventId={one}": "two three",
    "|lastEventId=earliest&lastEventId={two}": "three",
    "|lastEventId={two}&lastEventId=earliest": "one two three",
    "|last=1&lastEventId={one}": "two three",
    "|lastEventId={one}&last=1": "two three",
    "|last=1&lastEventId=earliest": "one two three",
    "{two}|lastEventId=earliest": "three",
    "{two}|last=5": "three",
    "{two}|last=5&lastEventId={one}": "three",
}


@kit.one_way
@pytest.mark.parametrize("asked", POSITIONS)
def test_a_header_wins_over_the_query_whose_last_id_counts_and_last_where_there_is_none(
    asked: str, server: ServerProcess, channel: str
) -> None:
    ids = {data: server.publish_id(data, channel) for data in ("one", "two", "three")}
    header, query = asked.format_map(ids).split("|")

    with server.stream(channel, query=query, **({"Last_Event_ID": header} if header else {})) as stream:
        server.publish("live", channel)

        assert stream.until("live") == POSITIONS[asked].split()


SMALL = 20
WANTED = {"lastEventId=earliest": SMALL, f"last={SMALL}": SMALL, "last=5": 5}


@both_ways
@pytest.mark.parametrize("query", WANTED)
def test_a_stream_begins_with_exactly_what_is_kept_at_that_moment_however_fast_it_is_replaced(
    query: str, start: Start, channel: str
) -> None:
    server = start("--history", str(SMALL))
    publisher = kit.Publisher(server.port, "event", channel)
    acknowledged = publisher.acknowledged
    wait_for(lambda: len(acknowledged) > SMALL, "more events than are kept")
    opened = []
    for _ in range(20):
        at_least = len(acknowledged)
        stream = server.opened(channel, query=query)
        opened.append((at_least, stream))
    publisher.stop()
    server.publish("end", channel)

    places = [place for place, _, _ in acknowledged]
    published = [data for _, _, data in acknowledged]
    for at_least, stream in opened:
        with stream:
            received = stream.until("end")
        first = published.index(received[0])
        assert received == published[first:]
        position = next(filter(None, stream.positions))
        from_history = places.index(kit.place_of(position)) + 1 - first
        assert from_history >= WANTED[query]
        assert first >= at_least - WANTED[query]
        if "earliest" in query:
            assert from_history == SMALL


@pytest.mark.parametrize(
    "query", ["last=0", "last=-1", "last=x", "last=", "last=100001", "channels=a", "last_event_id=1"]
)
def test_a_wrong_parameter_of_stream_is_named(server: ServerProcess, query: str) -> None:
    answer = server.get(f"/stream?{query}")

    name = query.partition("=")[0]
    assert answer.status == 400
    assert ("last must be" if name == "last" else repr(name)) in answer.error


def test_parameters_that_stream_does_not_know_are_somebody_elses(server: ServerProcess, channel: str) -> None:
    with server.stream(channel, query="datastar=%7B%7D&_=1764000000") as stream:
        server.publish("hello", channel)

        assert stream.next().data == "hello"


@both_ways
def test_a_page_that_was_rendered_with_the_position_gets_all_that_came_since(start: Start, channel: str) -> None:
    server = start()
    server.publish("before", channel)
    other = f"{channel}-other"
    rendered = ssepush.position(server.redis.url)
    answer = server.get("/position")
    server.publish("since", other)

    assert answer.json == {"state": "ok", "id": rendered}
    with server.stream(channel, other, query=f"lastEventId={rendered}") as stream:
        assert stream.next().data == "since"


def test_the_same_key_is_published_once(server: ServerProcess, channel: str) -> None:
    key = "order 7"
    with server.opened(channel) as stream:
        first = server.publish("hello", channel, key=key)
        again = server.publish("hello", channel, key=key)
        elsewhere = server.publish("hello", f"{channel}-other", key=key)
        from_python = ssepush.publish("hello", channel=channel, key=key, redis_url=server.redis.url)
        server.publish("last", channel)

        assert stream.data(2) == ["hello", "last"]
    assert "duplicate" not in first
    assert again == {"state": "ok", "receivers": 0, "id": first["id"], "duplicate": True}
    assert elsewhere["id"] != first["id"]
    assert (from_python.id, from_python.duplicate) == (first["id"], True)


@pytest.mark.parametrize("key", ["", "x" * 201, "a\nb", 7, {}], ids=repr)
def test_a_key_that_cannot_be_is_refused_by_name(server: ServerProcess, key: object) -> None:
    answer = server.post({"data": 1, "key": key})

    assert answer.status == 400
    assert answer.error.startswith("key must be")
    if isinstance(key, str):
        refused = kit.run("publish", "sse", "hello", "--key", key, REDIS_URL=server.redis.url)
        assert "key must be" in kit.the_line(refused, 2)


def test_without_a_history_a_key_is_refused_since_nothing_would_remember_it(
    redis_process: RedisProcess, start: Start, channel: str
) -> None:
    server = start("--history", "0")

    over_http = server.post({"data": 1, "channel": channel, "key": "k"})
    by_command = kit.run("publish", channel, "1", "--key", "k", REDIS_URL=redis_process.url, SSEPUSH_HISTORY="0")

    assert over_http.status == 400
    assert "key needs a history" in over_http.error
    assert "key needs a history" in kit.the_line(by_command, 2)
    with pytest.raises(ValueError, match="key needs a history"):
        ssepush.publish(1, channel=channel, key="k", redis_url=redis_process.url, history=0)


def test_a_key_is_forgotten_when_the_historys_time_is_over(redis_process: RedisProcess, channel: str) -> None:
    publish = functools.partial(
        ssepush.publish, "hello", channel=channel, key="order 7", redis_url=redis_process.url, history_ttl=1
    )
    remembered = f"{ssepush.PUBLISHED_KEY}{channel}\0order 7"

    first = publish()
    wait_for(lambda: not redis_process.client.exists(remembered), "the key is forgotten")
    again = publish()

    assert not again.duplicate
    assert str(again.id) > str(first.id)


class HangingUp(kit.RedisProxy):
    """Hangs up instead of passing on the answer to the next script, once it is told to."""

    is_due = False

    def changed(self, received: bytes, is_from_redis: bool, link: kit.Link) -> bytes:
        if self.is_due and is_from_redis and b"EVAL" in link.asked:
            self.is_due = False
            raise ConnectionError
        return received


@kit.one_way
def test_an_event_whose_answer_was_lost_goes_out_once_if_it_is_published_again_with_its_key(
    server: ServerProcess, start: Start, channel: str
) -> None:
    with HangingUp(server.redis) as proxy, server.opened(channel) as stream:
        behind = start(redis=proxy.url)
        from_python = functools.partial(ssepush.publish, "hello", channel=channel, key="1", redis_url=proxy.url)
        over_http = {"data": "hello", "channel": channel, "key": "2"}
        by_command = functools.partial(kit.run, "publish", channel, "hello", "--key", "3", REDIS_URL=proxy.url)

        proxy.is_due = True
        with pytest.raises(ssepush.Unanswered):
            from_python()
        assert from_python().duplicate
        proxy.is_due = True
        unsure, again = behind.post(over_http), behind.post(over_http)
        assert (unsure.status, again.status) == (503, 200)
        assert "may or may not" in unsure.error
        assert again.json["duplicate"]
        proxy.is_due = True
        assert "may or may not" in kit.the_line(by_command(), 1)
        assert by_command().stdout == "0\n"

        server.publish("last", channel)
        assert stream.data(4) == ["hello"] * 3 + ["last"]


def test_the_first_block_of_a_stream_holds_its_position_and_the_reconnection_time(
    server: ServerProcess, channel: str
) -> None:
    with server.opened(channel) as stream:
        block, _, _ = stream.body.partition(b"\n\n")

    assert re.fullmatch(rb"retry: [0-9]+\nevent: stream-position\nid: [0-9]{16}\ndata: {\"heartbeat\": 15.0}", block)


FROM_ENVIRONMENT: dict[str, Any] = {"SSEPUSH_HISTORY": "2", "SSEPUSH_HISTORY_TTL": "50"}


def four_over_http(redis: RedisProcess, start: Start) -> None:
    server = start(redis=redis, **FROM_ENVIRONMENT)
    for data in kit.numbers(0, 4):
        server.publish(data)


def four_notifications(redis: RedisProcess, start: Start) -> None:
    server = start(redis=redis, **FROM_ENVIRONMENT)
    for _ in range(4):
        assert server.get("/notifications").status == 200


def four_by_command(redis: RedisProcess, start: Start) -> None:
    done = kit.run("publish", "sse", "-", stdin="0\n1\n2\n3\n", REDIS_URL=redis.url, **FROM_ENVIRONMENT)
    assert done.returncode == 0, done


def four_from_python(redis: RedisProcess, start: Start) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FROM_ENVIRONMENT.items():
            patch.setenv(name, value)
        for data in kit.numbers(0, 4):
            ssepush.publish(data, redis_url=redis.url)


@pytest.mark.parametrize("publish_four", [four_over_http, four_notifications, four_by_command, four_from_python])
def test_how_much_is_kept_and_for_how_long_comes_from_the_environment(
    publish_four: Callable[[RedisProcess, Start], None], own_redis: RedisProcess, start: Start
) -> None:
    publish_four(own_redis, start)

    history = f"{ssepush.HISTORY_KEY}sse"
    assert own_redis.client.xlen(history) == 2
    assert 30 < own_redis.client.ttl(history) <= 50


WRONG_SETTINGS = {"SSEPUSH_HISTORY": ["many", "-1", "100001"], "SSEPUSH_HISTORY_TTL": ["long", "0", "1.5", "31536001"]}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_a_setting_of_the_history_that_cannot_be_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in WRONG_SETTINGS[name]:
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"{name} must be"):
            ssepush.publish("hello")
    setting: dict[str, Any] = {name: value}
    server = kit.run("--port", "0", **setting)
    command = kit.run("publish", "sse", "hello", **setting)

    assert f"{name} must be" in kit.the_line(server, 2)
    assert f"{name} must be" in kit.the_line(command, 2)


# ── For whoever runs it ──────────────────────────────────────────────────────────────────────────────────────────────


def test_with_admin_metrics_and_health_are_there_and_nowhere_else_and_of_one_process(
    start: Start, redis_process: RedisProcess
) -> None:
    port = kit.free_port()
    admin = f"{kit.LOOPBACK}:{port}"
    server = start("--admin", admin)

    refused = kit.run("--port", "0", "--admin", admin, REDIS_URL=redis_process.url)

    assert admin in kit.the_line(refused, 2).removeprefix("ssepush: cannot listen on")
    for path in ("/metrics", "/healthz", "/nowhere"):
        assert server.get(path).status == 404
    assert b"ssepush_max_streams" in kit.exchange(port, kit.request(b"GET /metrics HTTP/1.1"))
    for path, status in {"/healthz": b"200", "/stream": b"404"}.items():
        answer = kit.exchange(port, kit.request(f"GET {path} HTTP/1.1".encode()))
        assert answer.startswith(b"HTTP/1.1 %b " % status)


@pytest.mark.parametrize("as_url", [False, True], ids=["its path", "its URL"])
def test_admin_takes_an_address_and_a_redis_keeps_its_unix_socket(own_redis: RedisProcess, as_url: bool) -> None:
    path = str(own_redis.socket_path)
    url = f"unix://{path}"

    refused = kit.run("--port", "0", "--admin", url if as_url else path, REDIS_URL=url)

    assert "--admin: must be HOST:PORT" in kit.the_line(refused, 2)
    assert ssepush.publish("still there", redis_url=url) == 0
