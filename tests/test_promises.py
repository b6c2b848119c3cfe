"""The promises where they were once seen to break: foreign ids, strangers, tokens, keys; and what pages need."""

from __future__ import annotations

import functools
import itertools
import sys
import time
from typing import Any

import pytest

import ssepush
from tests import kit
from tests.kit import RedisProcess, ServerProcess, Start, both_ways, wait_for

SECRET = "a secret of these tests"
APP = "https://app.example"


def token(*channels: str, ttl: int = 60) -> str:
    return ssepush.sign(*channels, ttl=ttl, secret=SECRET)


def stat(process: RedisProcess, name: str) -> int:
    """A number that Redis knows of itself."""
    stats = process.client.info("stats")
    return int(stats[name])


# ── Redis, and ids that somebody else sends ──────────────────────────────────────────────────────────────────────────


@both_ways
def test_live_events_survive_a_loss_and_a_clock_set_back(own_redis: RedisProcess, start: Start, channel: str) -> None:
    server = start(redis=own_redis)
    server.publish("before", channel)
    in_a_minute_s = int(time.time()) + 60
    own_redis.client.hset(ssepush.COUNTER_KEY, "newest", f"{in_a_minute_s}000000")
    with server.opened(channel) as stream:
        own_redis.client.flushall()

        for data in kit.numbers(0, 5):
            assert server.publish(data, channel)["receivers"] == 1

        assert stream.data(5) == kit.numbers(0, 5)


@both_ways
def test_a_stranger_s_id_that_looks_like_ours_does_not_move_the_page(start: Start, channel: str) -> None:
    other = f"{channel}-other"
    server = start()
    old, new = (server.publish_id(data, channel) for data in ("first", "second"))
    with server.stream(channel, other, Last_Event_ID=old) as stream:
        assert stream.data(1) == ["second"]
        server.redis.publish_event(channel, data="plain", id=old)
        server.redis.publish_event(other, data="forwarded", id=new, previous=old)
        server.publish("last", other)

        plain, forwarded, last = stream.take(3)
    assert (plain.data, plain.id) == ("plain", new)
    assert (forwarded.data, forwarded.id) == ("forwarded", new)
    assert last.data == "last"


def test_what_readers_could_not_take_is_refused_however_much_its_publisher_can(server: ServerProcess) -> None:
    deep: list[Any] = functools.reduce(lambda inner, _: [inner], range(2000), [])
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        with pytest.raises(ValueError, match="nested too deeply"):
            ssepush.message_of(deep)
    finally:
        sys.setrecursionlimit(limit)

    answer = server.post(f'{{"data": 1, "type": {"[" * 982}{"]" * 982}}}')
    assert answer.status == 400
    assert "nested" in answer.error


def test_streams_leave_half_of_redis_connections_to_others(own_redis: RedisProcess, start: Start, channel: str) -> None:
    own_redis.client.config_set("maxclients", "60")
    server = start(redis=own_redis)
    streams = [server.opened(channel) for _ in range(30)]

    refused = server.stream(channel)

    assert refused.until_end() == []
    assert refused.parser.comments == ["this server is full"]
    assert own_redis.client.ping()
    wait_for(lambda: server.said("at most 30 streams"), "how many there may be is logged")
    for stream in streams:
        stream.close()


def test_one_ping_a_second_serves_all_who_ask_for_health(own_redis: RedisProcess, start: Start) -> None:
    server = start(redis=own_redis)
    before = stat(own_redis, "total_connections_received")
    began = time.monotonic()

    for _ in range(300):
        assert server.get("/healthz").status == 200

    passed_s = time.monotonic() - began
    assert stat(own_redis, "total_connections_received") - before <= passed_s + 4


def test_a_replay_reads_from_redis_what_it_sends(own_redis: RedisProcess, start: Start, channel: str) -> None:
    names = [f"{channel}-{number}" for number in range(20)]
    server = start(redis=own_redis)
    position = server.publish_id("first", names[0])
    for name, data in itertools.product(names, kit.numbers(0, 10)):
        server.publish(f"{data} {'x' * 15_000}", name)
    before = stat(own_redis, "total_net_output_bytes")

    with server.stream(*names, Last_Event_ID=position) as stream:
        events = stream.take(200)

    sent = sum(len(event.data) for event in events)
    assert kit.first_words(events) == kit.numbers(0, 10) * 20
    assert stat(own_redis, "total_net_output_bytes") - before < 1.5 * sent


def test_http_1_0_is_not_told_to_continue(server: ServerProcess) -> None:
    fields = (b"Content-Type: application/json", b"Expect: 100-continue", b"Content-Length: 11")
    sent = kit.request(b"POST /publish HTTP/1.0", *fields, body=b'{"data": 1}')

    assert kit.exchange(server.port, sent).startswith(b"HTTP/1.1 200 ")


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@both_ways
@pytest.mark.parametrize("number", [1, 18], ids=["has got everything", "reads slowly"])
def test_who_is_cut_by_an_expiry_gets_the_rest_with_another_token(start: Start, channel: str, number: int) -> None:
    server = start(SSEPUSH_SECRET=SECRET)
    name = f"private-{channel}"
    published = [f"{data} {'x' * 50_000}" for data in range(number)]
    with server.stream(name, query=f"token={token(name, ttl=2)}") as stream:
        stream.position()
        for data in published:
            server.publish(data, name)
        assert number == 1 or server.metric("backlog_bytes") > 0
        wait_for(lambda: server.closed("expired"), "the token has expired")

        *received, expired = stream.until_end()

    taken = [event.data for event in received]
    assert taken == published[: len(taken)]
    assert number == 1 or len(taken) < number
    assert (expired.type, expired.id) == ("token-expired", received[-1].id)
    server.publish("meanwhile", name)
    with server.stream(name, query=f"token={token(name)}&lastEventId={expired.id}") as stream:
        rest = [*published[len(taken) :], "meanwhile"]
        assert stream.data(len(rest)) == rest


@both_ways
def test_a_token_that_has_expired_asks_nothing_of_redis(own_redis: RedisProcess, start: Start, channel: str) -> None:
    server = start(redis=own_redis, SSEPUSH_SECRET=SECRET)
    name = f"private-{channel}"
    told = server.publish_id("hello", name)
    connected = stat(own_redis, "total_connections_received")

    for position in (f"lastEventId={told}", "lastEventId=earliest", "last=1"):
        stream = server.stream(name, query=f"token={token(name, ttl=-5)}&{position}")
        [expired] = stream.until_end()
        assert stream.status == 200
        assert expired.type == "token-expired"
        assert expired.id == (told if told in position else "")
        assert stream.comes_back_after(30_000)

    assert stat(own_redis, "total_connections_received") == connected
    assert "cmdstat_subscribe" not in own_redis.client.info("commandstats")


def test_a_token_opens_the_up_to_twenty_channels_that_it_names_and_no_other(start: Start, channel: str) -> None:
    server = start(SSEPUSH_SECRET=SECRET)
    *twenty, another = [f"private-{channel}-{number}" for number in range(21)]
    opens = f"token={token(*twenty)}"

    with server.stream(*twenty, query=opens) as stream:
        server.publish("for you", twenty[-1])
        assert stream.next().data == "for you"
    assert server.get(f"/stream?channel={another}&{opens}").status == 403
    for wrong in ([], [*twenty, another]):
        with pytest.raises(ValueError, match="1 to 20 channels"):
            token(*wrong)


WITH_TOKEN = [  # {0} is the right token, {1} another
    {"Authorization": "Bearer {0} {1}"},
    {"Authorization": "Bearer {1} {1} {0}"},
    {"Cookie": "theme=dark; ssepush-token={0}"},
    {"Cookie": "ssepush-token={1} {0}; theme=dark"},
    {"Cookie": 'ssepush-token="{1} {0}"'},
    {"Cookie": "ssepush-token={1}%20{0}"},
    {"Cookie": "ssepush-token={1}; ssepush-token={0}"},
    {"Cookie": "ssepush-token={0}", "Origin": "http://127.0.0.1:{2}"},
]


@pytest.mark.parametrize("allowed", ["", "*", "null", APP])
def test_a_token_comes_in_a_header_or_in_a_cookie_of_no_foreign_page(allowed: str, start: Start, channel: str) -> None:
    options = ("--allow-origin", allowed) if allowed else ()
    server = start(*options, SSEPUSH_SECRET=SECRET)
    path = f"/stream?channel=private-{channel}"
    known = (token(f"private-{channel}"), token("private-other"), server.port)

    for headers in WITH_TOKEN:
        right = {field: text.format(*known) for field, text in headers.items()}
        assert server.get(path, "HEAD", **right).status == 200, headers
    for origin in ("https://evil.example", "null", "http://localhost:1", APP):
        answer = server.get(path, "HEAD", Cookie=f"ssepush-token={known[0]}", Origin=origin)
        assert answer.status == (200 if origin == allowed == APP else 403), origin


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


# ── From where a stream begins ───────────────────────────────────────────────────────────────────────────────────────

BEGINS = {  # what is asked for after events 0 to 5, by turns on two channels; an id in the header first: what comes
    "|lastEventId=earliest": "0 1 2 3 4 5",
    "|last=1": "4 5",
    "|last=2": "2 3 4 5",
    "|last=100": "0 1 2 3 4 5",
    "|lastEventId={4}&lastEventId=earliest": "0 1 2 3 4 5",
    "|last=1&lastEventId=earliest": "0 1 2 3 4 5",
    "|lastEventId={2}&last=1": "3 4 5",
    "{4}|lastEventId=earliest": "5",
    "{4}|last=5&lastEventId={1}": "5",
}


@both_ways
def test_earliest_is_all_that_is_kept_and_last_the_newest_of_each_channel_then_live(start: Start, channel: str) -> None:
    names = [channel, f"{channel}-other"]
    server = start()
    ids = [server.publish_id(data, name) for data, name in zip(kit.numbers(0, 6), names * 3, strict=True)]

    for asked, expected in BEGINS.items():
        header, query = asked.format(*ids).split("|")
        headers = {"Last_Event_ID": header} if header else {}
        with server.stream(*names, query=query, **headers) as stream:
            assert stream.position()
            server.redis.publish(channel, "live")
            assert stream.until("live") == expected.split(), asked


SMALL = 20
WANTED = {"lastEventId=earliest": SMALL, f"last={SMALL}": SMALL, "last=5": 5}


@both_ways
@pytest.mark.parametrize("query", WANTED)
def test_a_stream_begins_with_exactly_what_is_kept_at_that_moment(query: str, start: Start, channel: str) -> None:
    server = start("--history", str(SMALL))
    publisher = kit.Publisher(server.port, "event", channel)
    acknowledged = publisher.acknowledged
    wait_for(lambda: len(acknowledged) > SMALL, "more events than are kept")
    opened = [(len(acknowledged), server.opened(channel, query=query)) for _ in range(20)]
    publisher.stop()
    server.publish("end", channel)

    places, _, published = zip(*acknowledged, strict=True)
    for at_least, stream in opened:
        with stream:
            received = stream.until("end")
        first = published.index(received[0])
        assert received == [*published[first:]]
        position = next(filter(None, stream.positions))
        from_history = places.index(kit.place_of(position)) + 1 - first
        assert from_history >= WANTED[query]
        assert first >= at_least - WANTED[query]
        assert from_history == SMALL or "last=" in query


def test_a_wrong_parameter_of_stream_is_named_and_a_foreign_one_ignored(server: ServerProcess, channel: str) -> None:
    for wrong in ("last=0", "last=-1", "last=x", "last=", "last=100001", "channels=a", "last_event_id=1"):
        answer = server.get(f"/stream?{wrong}")
        name = wrong.partition("=")[0]
        assert answer.status == 400
        assert ("last must be" if name == "last" else repr(name)) in answer.error

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


# ── Keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def test_a_key_that_cannot_be_or_that_nothing_would_remember_is_refused(server: ServerProcess, start: Start) -> None:
    wrong: list[object] = ["", "x" * 201, "a\nb", 7, {}]
    for key in wrong:
        answer = server.post({"data": 1, "key": key})
        assert answer.status == 400
        assert answer.error.startswith("key must be")

    answer = start("--history", "0").post({"data": 1, "key": "k"})
    assert answer.status == 400
    assert "key needs a history" in answer.error
    with pytest.raises(ValueError, match="key needs a history"):
        ssepush.publish(1, key="k", redis_url=server.redis.url, history=0)


def test_a_key_is_forgotten_when_the_historys_time_is_over(redis_process: RedisProcess, channel: str) -> None:
    def publish() -> ssepush.Published:
        return ssepush.publish("hello", channel=channel, key="a", redis_url=redis_process.url, history_ttl=1)

    first = publish()
    wait_for(lambda: not redis_process.client.exists(f"{ssepush.PUBLISHED_KEY}{channel}\0a"), "it is forgotten")
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
def test_an_unanswered_event_goes_out_once_with_a_key(server: ServerProcess, start: Start, channel: str) -> None:
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


# ── For whoever runs it ──────────────────────────────────────────────────────────────────────────────────────────────


def test_variables_say_what_is_kept(own_redis: RedisProcess, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"SSEPUSH_HISTORY": "2", "SSEPUSH_HISTORY_TTL": "50"}
    server = start(redis=own_redis, **settings)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    for number in range(4):
        server.publish(number, "http")
        assert server.get("/notifications").status == 200
        ssepush.publish(number, channel="python", redis_url=own_redis.url)
    assert kit.run("publish", "shell", "-", stdin="0\n1\n2\n3\n", REDIS_URL=own_redis.url, **settings).returncode == 0

    for name in ("http", "sse", "python", "shell"):
        assert own_redis.client.xlen(ssepush.HISTORY_KEY + name) == 2
        assert 30 < own_redis.client.ttl(ssepush.HISTORY_KEY + name) <= 50


WRONG_SETTINGS = {"SSEPUSH_HISTORY": ["many", "-1", "100001"], "SSEPUSH_HISTORY_TTL": ["long", "0", "1.5", "31536001"]}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_a_setting_of_the_history_that_cannot_be_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in WRONG_SETTINGS[name]:
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"{name} must be"):
            ssepush.publish("hello")


REFUSED: dict[str, tuple[list[str], dict[str, Any], str]] = {  # arguments, variables, and what the one line says
    "a secret that can be guessed": (["--port", "0"], {"SSEPUSH_SECRET": "12345"}, "secrets.token_urlsafe"),
    "the same, to sign": (["sign", "private-x"], {"SSEPUSH_SECRET": "12345"}, "secrets.token_urlsafe"),
    "a token of no channel": (["sign"], {"SSEPUSH_SECRET": SECRET}, "CHANNEL"),
    "a token of 21": (["sign", *["private-x"] * 21], {"SSEPUSH_SECRET": SECRET}, "1 to 20 channels"),
    "an empty key": (["publish", "sse", "hello", "--key", ""], {}, "key must be"),
    "a key of 201 letters": (["publish", "sse", "hello", "--key", "x" * 201], {}, "key must be"),
    "a key of two lines": (["publish", "sse", "hello", "--key", "a\nb"], {}, "key must be"),
    "a key, no history": (["publish", "sse", "1", "--key", "k"], {"SSEPUSH_HISTORY": "0"}, "key needs a history"),
    "too much of a history": (["--port", "0"], {"SSEPUSH_HISTORY": "100001"}, "SSEPUSH_HISTORY must be"),
    "the same, to publish": (["publish", "sse", "1"], {"SSEPUSH_HISTORY": "100001"}, "SSEPUSH_HISTORY must be"),
    "kept too long": (["--port", "0"], {"SSEPUSH_HISTORY_TTL": "31536001"}, "SSEPUSH_HISTORY_TTL must be"),
    "the same, published": (["publish", "sse", "1"], {"SSEPUSH_HISTORY_TTL": "31536001"}, "SSEPUSH_HISTORY_TTL must"),
}


@pytest.mark.parametrize(("arguments", "environment", "told"), REFUSED.values(), ids=REFUSED)
def test_the_command_line_refuses(
    arguments: list[str], environment: dict[str, Any], told: str, redis_process: RedisProcess
) -> None:
    assert told in kit.the_line(kit.run(*arguments, REDIS_URL=redis_process.url, **environment), 2)


def test_a_password_on_the_command_line_is_warned_of(redis_process: RedisProcess) -> None:
    done = kit.run("publish", "sse", "hi", "--redis-url", redis_process.url_of("default", "nonsense"))

    assert "warning" in done.stderr
    assert "REDIS_URL" in done.stderr
    assert "nonsense" not in done.stderr


def test_a_stream_of_many_channels_is_a_short_line_of_the_log(start: Start, channel: str) -> None:
    server = start()
    with server.opened(*[f"{channel}-{'x' * 150}-{number}" for number in range(20)]):
        wait_for(lambda: server.said(" for 127"), "its opening is logged")

        [line] = [line for line in server.output.splitlines() if " for 127" in line]
    assert len(line) < 1000  # of 20 names with 170 bytes each


def test_with_admin_metrics_and_health_are_there_and_nowhere_else(start: Start, redis_process: RedisProcess) -> None:
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


def test_admin_takes_an_address_and_a_redis_keeps_its_unix_socket(own_redis: RedisProcess) -> None:
    url = f"unix://{own_redis.socket_path}"
    for wrong in (url, str(own_redis.socket_path)):
        refused = kit.run("--port", "0", "--admin", wrong, REDIS_URL=url)

        assert "--admin: must be HOST:PORT" in kit.the_line(refused, 2)
        assert ssepush.publish("still there", redis_url=url) == 0
