"""What an attacker found, beside the floods of test_load.py: each row once cost somebody else something."""

from __future__ import annotations

from pathlib import Path

import pytest

import ssepush
from tests.kit import RedisProcess, Start, connections, request

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


BUSY = [  # what a subscriber is sent by a Redis that runs a script for too long: it may not even skip an answer
    b"-BUSY Redis is busy\r\n",
    b"%7\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$6\r\n7.0.15\r\n$5\r\nproto\r\n:3\r\n$2\r\nid\r\n:4\r\n"
    b"$4\r\nmode\r\n$10\r\nstandalone\r\n$4\r\nrole\r\n$6\r\nmaster\r\n$7\r\nmodules\r\n*0\r\n",
    b"-BUSY Redis is busy\r\n",
    b"+OK\r\n",
    b"-EXECABORT Transaction discarded\r\n",
]


@pytest.mark.parametrize("size", [1, 1024])
def test_the_answers_of_a_busy_redis_are_all_read(size: int) -> None:
    """Unread, they kept a question open, and 20 of these kept all streams from opening until five seconds later."""
    inbox, sent = ssepush.Inbox(), b"".join(BUSY)
    replies = [reply for at in range(0, len(sent), size) for reply in inbox.feed(sent[at : at + size], 1024)]

    assert [reply.text for reply in replies] == [BUSY[0], BUSY[2], BUSY[4]]


@pytest.mark.parametrize("expiry", [10**400, 1e300], ids=["a whole number", "a fraction"])
def test_a_token_may_be_valid_for_any_time(start: Start, channel: str, expiry: float) -> None:
    jwt = pytest.importorskip("jwt")
    server = start(SSEPUSH_SECRET=SECRET)
    name = f"private-{channel}"
    token = jwt.encode({"channels": [name], "exp": expiry}, SECRET, "HS256")

    with server.stream(name, query=f"token={token}") as page:
        server.publish("for you", name)
        assert page.next().data == "for you"


NO_MORE_THREADS = """
from concurrent.futures import ThreadPoolExecutor
add_thread, calls = ThreadPoolExecutor._adjust_thread_count, []
def limited(self):
    calls.append(self)
    if len(calls) > 1:
        raise RuntimeError("can't start new thread")
    add_thread(self)
ThreadPoolExecutor._adjust_thread_count = limited
"""


def test_a_system_that_allows_no_more_threads_does_not_keep_the_server_from_accepting(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_MORE_THREADS)
    server = start(PYTHONPATH=str(tmp_path))

    with connections(server.port, 20, request(b"GET /healthz HTTP/1.1", b"Connection: close")) as socks:
        answers = [sock.recv(12) for sock in socks]

    assert answers == [b"HTTP/1.1 200"] * 20
    assert server.get("/healthz").status == 200
