"""What whoever runs the server sees: metrics and logs."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable

import pytest

import ssepush
from tests import kit
from tests.kit import EventStream, RedisProcess, ServerProcess, Start, both_ways, wait_for

SECRET = "a secret of the tests that is long enough"


@both_ways
def test_metrics_count_what_was_done_and_say_which_version_runs_since_when(start: Start, channel: str) -> None:
    started_after = time.time()
    server = start()
    started_before = time.time()
    streams = [server.opened(channel) for _ in range(3)]
    readers = server.subscribers_for(3)  # Redis connections
    before = sum(len(stream.body) for stream in streams)

    first = server.publish({"n": 1}, channel)
    server.publish({"n": 2}, channel, type="greet")
    server.redis.publish(channel, b'{"data": "x", "type": "a\\nb"}')
    server.redis.publish(channel, b"\xff")
    refused = server.post('{"data": 1, "channel": ""}', Host="localhost")
    forbidden = server.get("/stream?channel=private-x")
    server.publish("end", channel)
    for stream in streams:
        stream.take(3)

    wait_for(lambda: server.metric("messages_received_total") == 3 * readers, "what the streams have got is counted")
    wait_for(lambda: server.dropped("message is not UTF-8") == readers, "so is what was dropped")
    assert (refused.status, forbidden.status) == (400, 403)
    expected = {
        f'build_info{{version="{ssepush.__version__}"}}': 1,
        'streams_refused_total{reason="forbidden"}': 1,
        "streams": 3,
        "subscribers": readers,
        "backlog_bytes": 0,
        "streams_opened_total": 3,
        "events_sent_total": 9,
        "events_replayed_total": 0,
        "sent_bytes_total": sum(len(stream.body) for stream in streams) - before,
        "messages_received_total": 3 * readers,
        'messages_dropped_total{reason="type must not hold a line break"}': readers,
        'messages_dropped_total{reason="message is not UTF-8"}': readers,
        'publishes_total{status="ok"}': 3,
        'publishes_total{status="refused"}': 1,
        "delivery_delay_seconds_count": 9,
    }
    assert {name: server.metric(name) for name in expected} == expected
    assert 0 <= server.metric("delivery_delay_seconds_sum") < 9 * kit.DEADLINE_S
    assert started_after <= server.metric("start_time_seconds") <= started_before

    server.opened(channel, Last_Event_ID=first["id"]).take(2)
    wait_for(lambda: server.metric("events_replayed_total"), "what was replayed is counted, apart from live events")
    assert server.metric("events_replayed_total") == 2
    assert server.metric("events_sent_total") == 9
    assert_prometheus_can_read(server)


def assert_prometheus_can_read(server: ServerProcess) -> None:
    """Its own parser takes what it is told: each metric has a name of ours, and a type."""
    parser = pytest.importorskip("prometheus_client.parser")
    answer = server.get("/metrics")
    text = answer.body.decode()
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    counters = re.findall("^# TYPE (.*) counter$", text, re.MULTILINE)

    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert all(name.startswith("ssepush_") for name in families)
    assert {family.type for family in families.values()} <= {"counter", "gauge", "histogram", "summary"}
    assert families["ssepush_streams"].type == "gauge"
    assert counters
    assert all(name.endswith("_total") for name in counters)


@both_ways
def test_an_event_that_arrives_during_the_replay_is_counted_once(start: Start, channel: str) -> None:
    server = start("--max-backlog", str(2**22))
    names = [f"{channel}-{number}" for number in range(4)]
    first = server.publish_id("first", channel)
    for name in names * 9:
        server.publish("x" * 100_000, name)
    stream = server.stream(channel, *names, Last_Event_ID=first)  # and does not read

    server.publish("live", channel)
    wait_for(lambda: server.metric("messages_received_total"), "the event has arrived")
    assert stream.take(37)[-1].data == "live"
    server.publish("last", channel)
    assert stream.next().data == "last"

    wait_for(lambda: server.metric("messages_received_total") == 2, "what the stream has got is counted")
    assert server.metric("events_sent_total") + server.metric("events_replayed_total") == 38


def test_the_delivery_delay_is_that_of_each_event_with_an_id_of_ours(start: Start, channel: str) -> None:
    server = start()
    stream = server.opened(channel)
    with kit.stopped(server.process):
        for data in ("late", "later"):
            ssepush.publish(data, channel=channel, redis_url=server.redis.url)
        published_at = time.monotonic()
        server.redis.publish(channel, "of unknown age")
        wait_for(lambda: time.monotonic() > published_at + 0.3, "the events are 0.3 s old")

    assert stream.data(3) == ["late", "later", "of unknown age"]
    wait_for(lambda: server.metric("messages_received_total") == 3, "all three are counted")
    assert 0.58 <= server.metric("delivery_delay_seconds_sum") < kit.DEADLINE_S
    assert server.metric("delivery_delay_seconds_count") == 2


def test_the_backlog_is_what_a_slow_stream_has_not_taken(start: Start, channel: str) -> None:
    server = start("--max-backlog", str(2**26))
    stream = server.stream(channel)
    wait_for(lambda: not server.metric("backlog_bytes"), "its first bytes are counted as taken")

    published = 0
    while not (waiting := server.metric("backlog_bytes")):
        server.publish("x" * 500_000, channel)
        published += 1
        assert published < 60
    stream.take(published)

    assert 0 < waiting <= published * 500_100
    wait_for(lambda: not server.metric("backlog_bytes"), "the backlog is gone")


def until_cut(server: ServerProcess, stream: EventStream) -> None:
    """Publish until it is too far behind."""
    for _ in range(60):
        server.publish("x" * 500_000, "private-log")
        if server.closed("slow"):
            return


def skip_one(server: ServerProcess, stream: EventStream) -> None:
    """Publish an event before which there was one that nobody has got."""
    place = kit.place_of(stream.last_event_id)
    server.redis.publish_event("private-log", data="x", id=str(place + 2), previous=str(place + 1))
    assert stream.until_end()[-1].json == {"reason": "missed"}
    assert stream.parser.comments == ["events were missed"]


ENDINGS: dict[str, Callable[[ServerProcess, EventStream], object]] = {
    "gone": lambda server, stream: stream.close(),
    "slow": until_cut,
    "missed": skip_one,
    "redis-lost": lambda server, stream: server.redis.client.client_kill_filter(_type="pubsub"),
    "expired": lambda server, stream: stream.until_end(),
}


@both_ways
@pytest.mark.parametrize("reason", ENDINGS)
def test_why_a_stream_ended_is_counted_and_logged(start: Start, own_redis: RedisProcess, reason: str) -> None:
    server = start("--heartbeat", "0.5", SSEPUSH_SECRET=SECRET, redis=own_redis)
    channel = "private-log"
    token = ssepush.sign(channel, ttl=2 if reason == "expired" else 60, secret=SECRET)
    stream = server.stream(channel, "other", query=f"token={token}")
    server.publish("hi", channel)
    stream.next()

    ENDINGS[reason](server, stream)

    wait_for(lambda: server.streams() == 0, "the stream has ended")
    wait_for(lambda: server.said(" closed after "), "its end is logged")
    assert server.closed(reason) == 1
    opened, closed = (line for line in server.output.splitlines() if re.search("stream [0-9]+ (for|closed)", line))
    assert re.search(r"INFO stream 1 for 127\.0\.0\.1: private-log, other$", opened)
    assert re.search(rf"INFO stream 1 closed after [0-9.]+ s: {reason}$", closed)
    assert token not in server.output


def test_a_publish_with_redis_away_is_counted_as_such(start: Start, own_redis: RedisProcess) -> None:
    server = start(redis=own_redis)
    own_redis.kill()

    assert server.post({"data": 1}).status == 503

    assert server.metric('publishes_total{status="redis-away"}') == 1
    own_redis.start()


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_log_level_decides_whether_streams_are_logged(start: Start, channel: str, level: str) -> None:
    server = start("--log-level", level, "--heartbeat", "0.1")
    stream = server.stream(channel)
    server.redis.publish(channel, b"\xff")
    wait_for(lambda: server.dropped("message is not UTF-8"), "the message was dropped")
    beats = len(stream.positions)
    stream.wait(lambda: len(stream.positions) > beats + 1, "what is logged now and then has been logged")
    stream.close()
    wait_for(lambda: server.streams() == 0, "the stream is closed")

    server.terminate()

    assert server.said("stream 1 for") == server.said("stream 1 closed") == (level in ("debug", "info"))
    assert server.said("WARNING dropped") == (level != "error")


def test_logs_go_to_standard_error_alone(redis_process: RedisProcess) -> None:
    port = kit.free_port()
    command = kit.ssepush_command("--port", str(port), "--redis-url", redis_process.url)
    with kit.running(*command, stderr=subprocess.PIPE, env=kit.environment_with()) as process:
        assert process.stdout
        assert f":{port}/".encode() in process.stdout.readline()
        EventStream(port).close()
        assert process.stderr
        for said in (b"at most", b"stream 1 for", b"stream 1 closed after "):
            assert said in process.stderr.readline()

        process.terminate()

        out, _ = process.communicate(timeout=kit.DEADLINE_S)
        assert b"stream" not in out
