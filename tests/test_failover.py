"""Redis that fails over: URLs of Sentinels and of clusters. What faults do to pages, bench/chaos.py plays."""

from __future__ import annotations

import contextlib
import re
import socket
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


def own(folder: Path, name: str) -> Path:
    """A folder in that folder."""
    (folder / name).mkdir()
    return folder / name


def ask(node: RedisProcess, *words: str | int) -> object:
    answer: object = node.client.execute_command(*words)  # type: ignore[no-untyped-call]
    return answer


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
        self.address = f"127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        own = ("--port", str(self.port), "--bind", kit.LOOPBACK, "--dir", str(self.folder))
        return [kit.needs("redis-server"), str(self.config), "--sentinel", *own]

    def url_for(self, name: str = "mymaster", others: str = "") -> str:
        login, own = (password.replace(" ", "%20") for password in (MASTER_PASSWORD, SENTINEL_PASSWORD))
        return f"redis+sentinel://:{login}@{self.address}{others}/{name}/0?sentinel_password={own}"


@pytest.fixture
def masters(tmp_path: Path) -> Iterator[list[RedisProcess]]:
    """Two; the first is the one that the Sentinel names."""
    login = ("--requirepass", MASTER_PASSWORD)
    processes = [RedisProcess(own(tmp_path, n), *login, password=MASTER_PASSWORD) for n in ("first", "second")]
    yield processes
    for process in processes:
        process.kill()


@pytest.fixture
def sentinel(tmp_path: Path, masters: list[RedisProcess]) -> Iterator[SentinelProcess]:
    process = SentinelProcess(tmp_path, masters[0])
    yield process
    process.kill()


@both_ways
def test_sentinels_lead_to_the_master_and_print_no_login(sentinel: SentinelProcess, start: Start, channel: str) -> None:
    url = sentinel.url_for()
    server = start(redis="", REDIS_URL=url)

    with server.opened(channel) as stream:
        server.publish("over HTTP", channel)
        ssepush.publish("from Python", channel=channel, redis_url=url)
        done = kit.run("publish", channel, "from the shell", REDIS_URL=url)

        assert stream.data(3) == ["over HTTP", "from Python", "from the shell"]
    assert done.returncode == 0, done.stderr
    assert server.get("/healthz").status == 200
    address = f"redis+sentinel://{sentinel.address}/mymaster/0"
    assert server.said(f"from {address}\n")
    assert server.said(f"publish with: REDIS_URL={address} ssepush publish sse hello ")
    assert not any(server.said(password) for password in ("of the", "of%20the"))


@both_ways
@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "late"])
def test_when_sentinels_name_another_master_streams_go_there_and_are_told_what_it_lacks(
    is_late: bool, sentinel: SentinelProcess, masters: list[RedisProcess], start: Start, channel: str
) -> None:
    server = start("--retry", "50", redis="", REDIS_URL=sentinel.url_for())
    server.publish("at the first", channel)
    page = kit.Page(server.port, channel)
    wait_for(lambda: page.last_event_id, "it has been told a position")
    if is_late:  # the second has published already, before and after what the page got from the first
        second = f"redis://:{MASTER_PASSWORD.replace(' ', '%20')}@127.0.0.1:{masters[1].port}"
        ssepush.publish("that the page would skip", channel=channel, redis_url=second)
        server.publish("at the first, which is not the master any more", channel)
        wait_for(lambda: page.data()[-1:] == ["at the first, which is not the master any more"], "it gets that")
        page.events.clear()
        ssepush.publish("after that", channel=channel, redis_url=second)

    ask(sentinel, "SENTINEL", "REMOVE", "mymaster")
    ask(sentinel, "SENTINEL", "MONITOR", "mymaster", "127.0.0.1", masters[1].port, 1)

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


SILENT = {"none": [], "one of the majority": [1], "the one that has not heard": [0]}


@pytest.mark.parametrize("silent", SILENT.values(), ids=SILENT)
def test_the_master_is_whom_most_sentinels_name_of_those_that_answer(
    silent: list[int], tmp_path: Path, masters: list[RedisProcess], channel: str
) -> None:
    # The one that is asked first has not heard that the second master has taken over.
    named = {"a": masters[0], "b": masters[1], "c": masters[1]}
    sentinels = [SentinelProcess(own(tmp_path, name), master) for name, master in named.items()]
    url = sentinels[0].url_for(others=f",{sentinels[1].address},{sentinels[2].address}")
    is_a_draw = silent == [1]

    with contextlib.ExitStack() as stack:
        for number in silent:
            stack.enter_context(kit.stopped(sentinels[number].process))
        ssepush.publish("hello", channel=channel, redis_url=url)

    has_it = [bool(master.client.exists(ssepush.HISTORY_KEY + channel)) for master in masters]
    assert sum(has_it) == 1
    assert has_it[1] or is_a_draw


FORKS = """
import os, signal, sys, threading
import ssepush

channel, url = sys.argv[1:]

def publish(data):
    ssepush.publish(data, channel=channel, redis_url=url)

def publish_on():
    while True:
        publish("parent")

for _ in range(5):  # all of which look for the master
    threading.Thread(target=publish_on, daemon=True).start()
for _ in range(3):
    child = os.fork()
    if not child:
        signal.alarm(10)
        publish("child")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
publish("last")
os._exit(0)
"""


def test_forks_beside_a_hanging_sentinel_publish(sentinel: SentinelProcess, start: Start, channel: str) -> None:
    server = start(redis="", REDIS_URL=sentinel.url_for())
    with server.opened(channel) as stream, socket.create_server((kit.LOOPBACK, 0)) as hangs:
        url = sentinel.url_for(others=f",{kit.LOOPBACK}:{hangs.getsockname()[1]}")
        command = [sys.executable, "-W", "ignore", "-c", FORKS, channel, url]
        done = subprocess.run(command, cwd=kit.HERE, capture_output=True, text=True, timeout=kit.DEADLINE_S)

        assert (done.returncode, done.stderr) == (0, "")
        published = stream.until("last")
    assert published.count("child") == 3
    assert "parent" in published


# ── Clusters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def node(folder: Path, first_slot: int, last_slot: int) -> RedisProcess:
    """One that has met nobody yet."""
    process = RedisProcess(folder, "--cluster-enabled", "yes", "--cluster-port", str(kit.free_port()))
    ask(process, "CLUSTER", "ADDSLOTSRANGE", first_slot, last_slot)
    return process


def wait_until_whole(node: RedisProcess, known: int) -> None:
    """Until the cluster serves all slots, and it knows so many nodes."""
    told = ("cluster_state:ok", f"cluster_known_nodes:{known}")
    wait_for(lambda: all(text in str(ask(node, "CLUSTER", "INFO")) for text in told), "the cluster is whole")


@both_ways
def test_a_cluster_is_served_by_the_node_of_our_keys(tmp_path: Path, start: Start, channel: str) -> None:
    first = node(own(tmp_path, "first"), 0, OUR_SLOT - 1)
    second = node(own(tmp_path, "second"), OUR_SLOT, 16383)  # the keys of ssepush belong to this one
    bus_port = second.options[-1]
    ask(first, "CLUSTER", "MEET", "127.0.0.1", second.port, bus_port)
    for each in (first, second):
        wait_until_whole(each, 2)
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


def test_a_node_alone_that_does_not_know_its_address_is_where_it_was_asked(tmp_path: Path, channel: str) -> None:
    alone = node(tmp_path, 0, 16383)
    wait_until_whole(alone, 1)

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
def test_a_wrong_redis_url_is_refused_with_the_right_form_and_no_part_of_its_password(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIS_URL", url)

    with pytest.raises(SystemExit, match="2"):
        ssepush.main(["publish", "sse", "hello"])

    output, line = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(r"ssepush: the Redis URL is wrong[^\n]+\n", line)
    assert "secret" not in re.sub("(parameter|redis-py,) secret", "", line)  # a parameter's name one has to be told
    assert "123" not in line
    if url.startswith("redis+"):
        assert "redis+sentinel://HOST:26379,HOST:26379/NAME/0 or redis+cluster://HOST,HOST" in line
        assert "as %2F %3A" in line
