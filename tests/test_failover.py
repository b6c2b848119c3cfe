"""Redis that fails over: URLs of Sentinels and of clusters. What faults do to pages, bench/failover.py plays."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssepush
from tests.kit import (
    Page,
    RedisProcess,
    Start,
    both_ways,
    free_port,
    program,
    run,
    the_line,
    wait_for,
)

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
        return [
            program("redis-server"),
            str(self.config),
            "--sentinel",
            *("--port", str(self.port)),
            *("--bind", "127.0.0.1"),
            *("--dir", str(self.folder)),
        ]

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
    processes = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        processes.append(RedisProcess(folder, "--requirepass", MASTER_PASSWORD, password=MASTER_PASSWORD))
    yield processes
    for process in processes:
        process.kill()


@pytest.fixture
def sentinel(tmp_path: Path, masters: list[RedisProcess]) -> Iterator[SentinelProcess]:
    process = SentinelProcess(tmp_path, masters[0])
    yield process
    process.kill()


@both_ways
def test_sentinels_lead_to_the_master_with_logins_of_their_own(
    sentinel: SentinelProcess,
    start: Start,
    channel: str,
) -> None:
    url = sentinel.url_for()
    server = start(redis="", REDIS_URL=url)

    with server.opened(channel) as stream:
        server.publish("over HTTP", channel)
        ssepush.publish("from Python", channel=channel, redis_url=url)
        done = run("publish", channel, "from the shell", REDIS_URL=url)

        assert stream.data(3) == ["over HTTP", "from Python", "from the shell"]
    assert done.returncode == 0, done.stderr
    assert server.get("/healthz").status == 200


def test_what_is_printed_names_the_sentinels_and_where_to_publish_but_no_password(
    sentinel: SentinelProcess,
    masters: list[RedisProcess],
    start: Start,
) -> None:
    server = start(redis="", REDIS_URL=sentinel.url_for())

    printed = server.output

    assert f"from redis+sentinel://127.0.0.1:{sentinel.port}/mymaster/0\n" in printed
    assert f"REDISCLI_AUTH=… redis-cli -h 127.0.0.1 -p {masters[0].port} publish sse" in printed
    for password in ("of the", "of%20the"):
        assert password not in printed


@both_ways
def test_when_sentinels_name_another_master_streams_go_there_and_are_told_what_it_lacks(
    sentinel: SentinelProcess,
    masters: list[RedisProcess],
    start: Start,
    channel: str,
) -> None:
    server = start("--retry", "50", redis="", REDIS_URL=sentinel.url_for())
    server.publish("at the first", channel)
    page = Page(server.port, channel)
    wait_for(lambda: page.last_event_id, "it has been told a position")

    sentinel.names(masters[1])

    wait_for(lambda: [event.type for event in page.events] == ["stream-reset"], "it is told")
    assert [master.subscribers(channel) for master in masters] == [0, 1]
    server.publish("at the second", channel)
    page.wait_for("at the second")


def test_a_master_that_no_sentinel_knows_is_named_and_nothing_is_published(
    sentinel: SentinelProcess,
    channel: str,
) -> None:
    done = run("publish", channel, "hello", REDIS_URL=sentinel.url_for("yourmaster"))

    address = f"redis+sentinel://127.0.0.1:{sentinel.port}/yourmaster/0"
    line = the_line(done, 1)
    assert line.startswith(f"ssepush: it was not published: none of {address} knows a master; ")
    assert "REDIS_URL" in line


# ── Clusters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[RedisProcess]]:
    """Two nodes; the keys of ssepush belong to the second."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for name in ("first", "second"):
            folder = tmp_path / name
            folder.mkdir()
            bus_port = str(free_port())
            node = RedisProcess(folder, "--cluster-enabled", "yes", "--cluster-port", bus_port)
            stack.callback(node.kill)
            nodes.append(node)
        join(*nodes)
        yield nodes


def join(first: RedisProcess, second: RedisProcess) -> None:
    """Make a cluster of these two."""
    ask(first, "CLUSTER", "ADDSLOTSRANGE", 0, OUR_SLOT - 1)
    ask(second, "CLUSTER", "ADDSLOTSRANGE", OUR_SLOT, 16383)
    bus_port_of_second = second.options[-1]
    ask(first, "CLUSTER", "MEET", "127.0.0.1", second.port, bus_port_of_second)
    for node in (first, second):
        wait_for(functools.partial(is_whole, node), "the cluster is whole")


def is_whole(node: RedisProcess) -> bool:
    info = str(ask(node, "CLUSTER", "INFO"))
    return "cluster_state:ok" in info and "cluster_known_nodes:2" in info


def ask(node: RedisProcess, *words: str | int) -> object:
    answer: object = node.client.execute_command(*words)  # type: ignore[no-untyped-call]
    return answer


@both_ways
def test_a_cluster_is_served_by_the_node_of_our_keys_and_a_publish_at_any_node_arrives(
    cluster: list[RedisProcess],
    start: Start,
    channel: str,
) -> None:
    first, second = cluster
    server = start(redis="", REDIS_URL=f"redis+cluster://127.0.0.1:{first.port}")

    with server.opened(channel) as stream:
        server.publish("through ssepush", channel)
        first.publish(channel, "plain, at the first")
        assert stream.data(2) == ["through ssepush", "plain, at the first"]
        second.publish(channel, "plain, at the second")
        assert stream.next().data == "plain, at the second"

    assert second.client.exists("ssepush:{0}:counter")
    assert first.client.keys("*") == []
    with server.stream(channel, query="lastEventId=earliest") as stream:
        assert stream.next().data == "through ssepush"


# ── URLs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

FORM = (
    "the Redis URL is wrong: it is redis+sentinel://HOST:26379,HOST:26379/NAME/0, with the master's name as Sentinels"
    " know it; or redis+cluster://HOST,HOST, without a database"
)
NOT_A_PORT = "the port must be a number"
IN_A_PASSWORD = "in a password are %2F"
WRONG = {
    "redis+sentinel://host:26379": FORM,
    "redis+sentinel://host:26379/": FORM,
    "redis+cluster://host:6379/1": FORM,
    "redis+cluster://host:6379/mymaster": FORM,
    "redis+sentinel://host:26379/mymaster/one": "after the host comes the number of a database",
    "redis+sentinel://host:x,other/mymaster": NOT_A_PORT,
    "redis+sentinel://:secret@host,:secret@other/mymaster": FORM,
    "redis+sentinel://:sec/ret@host/mymaster": IN_A_PASSWORD,
    "redis+sentinel://user:12/secret@host": IN_A_PASSWORD,  # which could be a host, a port and a master's name
    "redis+cluster://user:12?secret@host": IN_A_PASSWORD,
    "redis+sentinel://host/mymaster?sentinel_password=12@secret": IN_A_PASSWORD,
    "redis+sentinel://host/mymaster/0?nothing=1": "parameter nothing is not one that redis-py takes",
    "redis+sentinels://host/mymaster": "must begin with",
}


@pytest.mark.parametrize("url", WRONG)
def test_a_wrong_url_of_sentinels_or_a_cluster_is_refused_with_what_is_wrong(url: str) -> None:
    with pytest.raises(ValueError, match="the Redis URL is wrong") as refused:
        ssepush.Connections(url)

    assert WRONG[url] in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "nodes"),
    [
        ("redis+sentinel://a,b:1,c/m", ["redis://a:26379/0", "redis://b:1/0", "redis://c:26379/0"]),
        ("rediss+sentinel://u:p@a/m/3", ["rediss://a:26379/0"]),
        ("redis+cluster://a,b:7000", ["redis://a:6379/0", "redis://b:7000/0"]),
    ],
)
def test_nodes_have_the_usual_ports(url: str, nodes: list[str]) -> None:
    masters = ssepush.Connections(url).masters

    assert masters
    assert [node.address for node in masters._nodes] == nodes


def test_whom_most_name_is_the_master_and_who_is_silent_is_asked_last(tmp_path: Path) -> None:
    connections = ssepush.Connections("redis+sentinel://a,b,c/m")
    masters = connections.masters
    assert masters
    a, b, c = masters._nodes
    named = {id(b): ("stale", 1), id(c): ("new", 2)}

    def named_by(node: ssepush.Connections) -> tuple[str, int]:
        if id(node) not in named:
            raise ssepush.RedisAway("silent")
        return named[id(node)]

    masters._named_by = named_by  # type: ignore[method-assign]
    assert masters.find() in named.values()
    assert masters._nodes == [b, c, a]

    named[id(a)] = ("new", 2)
    masters.forget()
    assert masters.find() == ("new", 2)

    named.clear()
    masters.forget()
    assert masters.find() == ("new", 2)  # scripts refuse to run there if it is none any more


@pytest.mark.parametrize("unknown", [None, b""])
def test_a_node_of_a_cluster_that_does_not_know_its_own_address_is_where_it_was_asked(unknown: bytes | None) -> None:
    masters = ssepush.Connections("redis+cluster://a.example").masters
    assert masters
    [node] = masters._nodes

    def call(*words: str | bytes | int) -> object:
        return [[0, 16383, [unknown, 7000, b"its id"]]]

    node.call = call  # type: ignore[method-assign]

    assert masters.find() == ("a.example", 7000)


def test_without_anybody_who_answers_it_is_away() -> None:
    port = free_port()

    with pytest.raises(ssepush.RedisAway, match=f"none of redis.sentinel://127.0.0.1:{port}/m knows a master"):
        ssepush.publish("x", redis_url=f"redis+sentinel://127.0.0.1:{port}/m")
