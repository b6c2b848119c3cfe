"""What an attacker found, beside the floods of test_load.py: each row once cost somebody else something."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import ssepush
from tests.kit import EventStream, RedisProcess, Start, both_ways, wait_for

SECRET = "a secret of the tests, long enough"


def test_an_event_that_many_pages_wait_for_counts_once(start: Start, channel: str) -> None:
    """400 MB seem to be unsent, and in memory there is one."""
    server = start("--shared")
    pages = [server.opened(channel) for _ in range(400)]

    server.publish("x" * 1_000_000, channel)

    for page in pages:
        assert len(page.next().data) == 1_000_000
        page.close()
    assert server.closed("slow") == 0


FILL_LUA = """
local newest = redis.call('HGET', KEYS[1], 'newest') + 0
for i = 1, 20000 do
  local previous = redis.call('ZSCORE', KEYS[2], ARGV[1]) or '0'
  local id = string.format('%.0f', newest + i)
  redis.call('XADD', KEYS[3], id .. '-0', 'previous', string.format('%.0f', previous), 'frame', 'data: x\\n\\n')
  redis.call('ZADD', KEYS[2], id, ARGV[1])
  redis.call('HSET', KEYS[1], 'newest', id)
end
"""


def test_nobody_can_ask_for_more_than_redis_holds_for_a_connection(start: Start, own_redis: RedisProcess) -> None:
    server = start("--shared", "--history", "100000", redis=own_redis)
    stays = server.opened("stays")
    names = [f"c{number}" for number in range(18)]
    keys = [ssepush.COUNTER_KEY, ssepush.NEWEST_KEY, ssepush.HISTORY_KEY]
    for name in names:
        server.publish("", name)
        own_redis.client.eval(FILL_LUA, 3, *keys[:2], keys[2] + name, name)

    query = "&".join(f"channel={name}" for name in names)
    with server.stream(query=f"{query}&lastEventId=earliest") as asks:
        asks.wait(lambda: len(asks.untaken) >= 1000, "a thousand events")

    server.publish("still here", "stays")
    assert stays.next().data == "still here"
    assert server.closed("redis-lost") == 0


@both_ways
def test_streams_open_as_soon_as_a_busy_redis_is_well_again(start: Start, tmp_path: Path, channel: str) -> None:
    redis = RedisProcess(tmp_path, "--busy-reply-threshold", "100")
    server = start("--heartbeat", "1", redis=redis)
    script = "local e = redis.call('TIME')[1] + ARGV[1] while redis.call('TIME')[1] + 0 < e + 0 do end"
    worker = threading.Thread(target=lambda: redis.client.eval(script, 0, "2"))
    worker.start()
    refused: list[EventStream] = []

    def is_busy() -> Any:
        refused.append(server.stream(channel))
        refused[-1].until_end()
        return "BUSY" in str(refused[-1].parser.comments)

    wait_for(is_busy, "Redis is busy")
    worker.join()
    began = time.monotonic()
    server.opened(channel)

    assert time.monotonic() - began < 3  # not after the five seconds that Redis has to answer


@pytest.mark.parametrize("expiry", [10**400, 1e300], ids=["a whole number", "a fraction"])
def test_a_token_may_be_valid_for_any_time(start: Start, channel: str, expiry: float) -> None:
    jwt = pytest.importorskip("jwt")
    server = start(SSEPUSH_SECRET=SECRET)
    name = f"private-{channel}"
    token = jwt.encode({"channels": [name], "exp": expiry}, SECRET, "HS256")

    with server.stream(name, query=f"token={token}") as page:
        server.publish("for you", name)
        assert page.next().data == "for you"
