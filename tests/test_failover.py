"""Redis that fails over: URLs of Sentinels and of clusters. What faults do to pages, bench/chaos.py plays."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssepush
from tests import kit
from tests.kit import RedisProcess, Start, both_ways, wait_for

OUR_SLOT = 13907
MASTER_PASSWORD = "of the master"
SENTINEL_PASSWORD = "of the Sentinel"


# ── Sentinels ────────────────────────────────────────────────────────────────────────────────────────────────────────


class SentinelProcess(RedisProcess):
    """One Sentinel, which knows a master called mymaster, and takes orders about who that is."""

    def __init__(self, folder: Path, master: RedisProcess) -> None:
        self.config = folder / "sentinel.conf"
        self.config.write_text(
            f'requirepass "{SENTINEL_PASSWORD}"\n'
            f"sentinel monitor mymaster 127.0.0.1 {master.port} 1\n"
            f'sentinel auth-pass mymaster "{MASTER_PASSWORD}"\n'
        )
        super().__init__(folder, password=SENTINEL_PASSWORD)

    def command(self) -> list[str]:
        own = ("--port", str(self.port), "--bind", kit.LOOPBACK, "--dir", str(self.folder))
        return [kit.needs("redis-server"), str(self.config), "--sentinel", *own]

    def names(self, master: RedisProcess) -> None:
        """Have it say that this is the master now."""
        ask(self, "SENTINEL", "REMOVE", "mymaster")
        ask(self, "SENTINEL", "MONITOR", "mymaster", "127.0.0.1", master.port, 1)

    def url_for(self, name: str = "mymaster") -> str:
        login = MASTER_PASSWORD.replace(" ", "%20")
        own = SENTINEL_PASSWORD.replace(" ", "%20")
        return f"redis+sentinel://:{login}@127.0.0.1:{self.port}/{name}/0?sentinel_password={own}"


@pytest.fixture
def masters(tmp_path: Path) -> Iterator[list[RedisProcess]]:
    """Two; the first is the one that the Sentinel names."""
    login = ("--requirepass", MASTER_PASSWORD)
    processes = [RedisProcess(own(tmp_path, n), *login, password=MASTER_PASSWORD) for n in ("first", "second")]
    yield processes
    for process in processes:
        process.kill()


def own(folder: Path, name: str) -> Path:
    """A folder in that folder."""
    (folder / name).mkdir()
    return folder / name


@pytest.fixture
def sentinel(tmp_path: Path, masters: list[RedisProcess]) -> Iterator[SentinelProcess]:
    process = SentinelProcess(tmp_path, masters[0])
    yield process
    process.kill()


@both_ways
def test_sentinels_lead_to_the_master_with_logins_of_their_own_which_are_not_printed(
    sentinel: SentinelProcess, start: Start, channel: str
) -> None:
    url = sentinel.url_for()
    server = start(redis="", REDIS_URL=url)

    with server.opened(channel) as stream:
        server.publish("over HTTP", channel)
        ssepush.publish("from Python", channel=channel, redis_url=url)
        done = kit.run("publish", channel, "from the shell", REDIS_URL=url)

        assert stream.data(3) == ["over HTTP", "from Python", "from the shell"]
    assert done.returncode == 0, done.stderr
    assert server.get("/healthz").status == 200
    address = f"redis+sentinel://127.0.0.1:{sentinel.port}/mymaster/0"
    assert server.said(f"from {address}\n")
    assert server.said(f"publish with: REDIS_URL={address} ssepush publish sse hello ")
    assert not any(server.said(password) for password in ("of the", "of%20the"))


@both_ways
def test_when_sentinels_name_another_master_streams_go_there_and_are_told_what_it_lacks(
    sentinel: SentinelProcess, masters: list[RedisProcess], start: Start, channel: str
) -> None:
    server = start("--retry", "50", redis="", REDIS_URL=sentinel.url_for())
    server.publish("at the first", channel)
    page = kit.Page(server.port, channel)
    wait_for(lambda: page.last_event_id, "it has been told a position")

    sentinel.names(masters[1])

    wait_for(lambda: [event.type for event in page.events] == ["stream-reset"], "it is told")
    assert [master.subscribers(channel) for master in masters] == [0, 1]
    server.publish("at the second", channel)
    page.wait_for("at the second")


def test_a_master_that_no_sentinel_knows_is_named_and_nothing_is_published(sentinel: SentinelProcess) -> None:
    done = kit.run("publish", "sse", "hello", REDIS_URL=sentinel.url_for("yourmaster"))

    line = kit.the_line(done, 1)
    assert line.startswith("ssepush: it was not published: no host in the Redis URL knows a master yourmaster")
    assert "REDIS_URL" in line
    with pytest.raises(ssepush.RedisAway, match="no host in the Redis URL knows a master mymaster"):
        ssepush.publish("hello", redis_url=f"redis+sentinel://127.0.0.1:{kit.free_port()}/mymaster")


@pytest.fixture
def three_sentinels(tmp_path: Path, masters: list[RedisProcess]) -> Iterator[list[SentinelProcess]]:
    """The first one, which is asked first, has not heard that the second master has taken over."""
    named = {"a": masters[0], "b": masters[1], "c": masters[1]}
    sentinels = [SentinelProcess(own(tmp_path, name), master) for name, master in named.items()]
    yield sentinels
    for sentinel in sentinels:
        sentinel.kill()


SILENT = {"none": [], "one of the majority": [1], "the one that has not heard": [0]}


@pytest.mark.parametrize("silent", SILENT.values(), ids=SILENT)
def test_the_master_is_whom_most_sentinels_name_of_those_that_answer(
    silent: list[int], three_sentinels: list[SentinelProcess], masters: list[RedisProcess], channel: str
) -> None:
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in three_sentinels)
    url = three_sentinels[0].url_for().replace(f"127.0.0.1:{three_sentinels[0].port}", hosts)
    is_a_draw = silent == [1]

    with contextlib.ExitStack() as stack:
        for number in silent:
            stack.enter_context(kit.stopped(three_sentinels[number].process))
        ssepush.publish("hello", channel=channel, redis_url=url)

    has_it = [bool(master.client.exists(ssepush.HISTORY_KEY + channel)) for master in masters]
    assert sum(has_it) == 1
    assert has_it[1] or is_a_draw


FORKS = """
import os, signal, socket, sys, threading
import ssepush

channel, url = sys.argv[1:]
hangs = socket.create_server(("127.0.0.1", 0))
url = url.format(hangs=f"127.0.0.1:{hangs.getsockname()[1]}")
is_enough = threading.Event()

def publish(data):
    ssepush.publish(data, channel=channel, redis_url=url)

def publish_on():
    while not is_enough.wait(0.05):
        publish("parent")

thread = threading.Thread(target=publish_on)
thread.start()
for _ in range(2):  # from the second time on, the master is known
    asked, _ = hangs.accept()
    asked.recv(1)
child = os.fork()
if not child:
    signal.alarm(10)
    publish("child")
    os._exit(0)
_, status = os.waitpid(child, 0)
is_enough.set()
thread.join()
publish("parent, later")
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_process_that_is_forked_while_a_sentinel_hangs_publishes_as_its_parent_does(
    sentinel: SentinelProcess, start: Start, channel: str
) -> None:
    server = start(redis="", REDIS_URL=sentinel.url_for())
    own = f"127.0.0.1:{sentinel.port}"
    url = sentinel.url_for().replace(own, f"{own},{{hangs}}")
    with server.opened(channel) as stream:
        done = subprocess.run(
            [sys.executable, "-c", FORKS, channel, url],
            cwd=kit.HERE,
            capture_output=True,
            text=True,
            timeout=kit.DEADLINE_S,
        )

        assert done.returncode == 0, done.stderr
        stream.wait(lambda: stream.untaken[-1:] and stream.untaken[-1].data == "parent, later", "the last event")
    published = [event.data for event in stream.untaken]
    assert published.count("child") == 1
    assert set(published) == {"parent", "child", "parent, later"}


# ── Clusters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[RedisProcess]]:
    """Two nodes; the keys of ssepush belong to the second."""
    nodes = [node(own(tmp_path, name)) for name in ("first", "second")]
    join(*nodes)
    yield nodes
    for each in nodes:
        each.kill()


def node(folder: Path) -> RedisProcess:
    """One that has met nobody yet."""
    return RedisProcess(folder, "--cluster-enabled", "yes", "--cluster-port", str(kit.free_port()))


def join(first: RedisProcess, second: RedisProcess) -> None:
    """Make a cluster of these two."""
    ask(first, "CLUSTER", "ADDSLOTSRANGE", 0, OUR_SLOT - 1)
    ask(second, "CLUSTER", "ADDSLOTSRANGE", OUR_SLOT, 16383)
    bus_port_of_second = second.options[-1]
    ask(first, "CLUSTER", "MEET", "127.0.0.1", second.port, bus_port_of_second)
    for each in (first, second):
        wait_for(functools.partial(is_whole, each), "the cluster is whole")


def is_whole(node: RedisProcess) -> bool:
    info = str(ask(node, "CLUSTER", "INFO"))
    return "cluster_state:ok" in info and "cluster_known_nodes:2" in info


def ask(node: RedisProcess, *words: str | int) -> object:
    answer: object = node.client.execute_command(*words)  # type: ignore[no-untyped-call]
    return answer


@both_ways
def test_a_cluster_is_served_by_the_node_of_our_keys_and_a_publish_at_any_node_arrives(
    cluster: list[RedisProcess], start: Start, channel: str
) -> None:
    first, second = cluster
    server = start(redis="", REDIS_URL=f"redis+cluster://127.0.0.1:{first.port}")

    with server.opened(channel) as stream:
        server.publish("through ssepush", channel)
        first.publish(channel, "plain, at the first")
        assert stream.data(2) == ["through ssepush", "plain, at the first"]
        second.publish(channel, "plain, at the second")
        assert stream.next().data == "plain, at the second"

    assert second.client.exists("ssepush2:{0}:counter")
    assert first.client.keys("*") == []
    with server.stream(channel, query="lastEventId=earliest") as stream:
        assert stream.next().data == "through ssepush"


def test_a_node_that_has_met_nobody_and_does_not_know_its_own_address_is_where_it_was_asked(
    tmp_path: Path, channel: str
) -> None:
    alone = node(tmp_path)
    ask(alone, "CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    wait_for(lambda: "cluster_state:ok" in str(ask(alone, "CLUSTER", "INFO")), "it serves all slots")

    assert ssepush.publish("hello", channel=channel, redis_url=f"redis+cluster://127.0.0.1:{alone.port}") == 0


# ── URLs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

WRONG = """
    redis://:se/cr%et@127.0.0.1:6379/0  redis://:se#cr%et@127.0.0.1:6379/0  redis://:12?3secret@127.0.0.1:6379/0
    redis://user:12345/secret@127.0.0.1:6379/0  redis://:[secret@127.0.0.1:6379/0  redis://:secret@127.0.0.1:port/0
    redis://:secret@127.0.0.1:6379/secret  redis://:secret@127.0.0.1:6379/0?secret=1
    redis://:secret@127.0.0.1:6379/0?db=secret  redis:/:secret@127.0.0.1:6379/0  http://:secret@127.0.0.1:6379/0
    :secret@127.0.0.1:6379/0  redis://:secret@127.0.0.1:99999/0  redis://127.0.0.1:6379/0#secret
    rediss://:secret@127.0.0.1:6379/0?ssl_cert_reqs=secret
    redis+sentinel://secret:26379  redis+sentinel://secret:26379/  redis+sentinel://host:26379/mymaster/secret
    redis+sentinel://host:secret,other/mymaster  redis+sentinel://:secret@host,:secret@other/mymaster
    redis+sentinel://:sec/secret@host/mymaster  redis+sentinel://user:12/secret@host
    redis+sentinel://host/mymaster?sentinel_password=12@secret  redis+sentinel://host/mymaster/0?nothing=secret
    redis+sentinels://secret/mymaster
    redis+cluster://secret:6379/1  redis+cluster://secret:6379/mymaster  redis+cluster://user:12?secret@host
"""


@pytest.mark.parametrize("url", WRONG.split())
def test_a_wrong_redis_url_is_refused_with_the_right_form_and_no_part_of_its_password(url: str) -> None:
    line = kit.the_line(kit.run("publish", "sse", "hello", REDIS_URL=url), 2)

    assert "the Redis URL is wrong" in line
    assert "secret" not in re.sub("(parameter|redis-py,) secret", "", line)  # a parameter's name one has to be told
    assert "123" not in line
    if url.startswith("redis+"):
        assert "redis+sentinel://HOST:26379,HOST:26379/NAME/0 or redis+cluster://HOST,HOST" in line
        assert "as %2F %3A" in line
