"""Failover: what pages notice when Redis's master dies, hangs, is cut off or moves; with real processes.

    python bench/failover.py                                          all of it, some 20 minutes
    python bench/failover.py --redis haproxy --fault partition        some of it
    python bench/failover.py --fault killed --streams 20 --seconds 4 --down-after 1

| Redis | URL | what runs |
| --- | --- | --- |
| sentinel | redis+sentinel://… | a master, two replicas, three Sentinels |
| haproxy | redis://… | the same behind one name: haproxy follows whoever says that it is the master |
| cluster | redis+cluster://… | three masters, each with a replica |

| fault | what happens to the master (of a cluster: to the one that holds ssepush's keys) |
| --- | --- |
| killed | kill -9; started again when another has taken over |
| stopped | SIGSTOP; it goes on when another has taken over |
| gone | its machine's network ends for good |
| partition | it reaches no other node, but ssepush reaches it; healed when another has taken over |
| switchover | planned: SENTINEL FAILOVER, CLUSTER FAILOVER |
| resync | nothing: a replica is cut off for so long that it has to be synchronised in full |
| other | nothing: another node is killed, and started again |

Each Redis has a machine of its own, a network namespace, so this needs Linux and `unshare`; everything runs in
namespaces that end with this program. Pages and publishers are those of chaos.py, and pages are cut at random, so that
they come and go; how they are judged says pages.py. The masters have an append-only file, and refuse to write alone
(`min-replicas-to-write 1`), unless --alone; those of the cluster, with one replica each, always write.

It prints a row for each run: seconds from the fault until something could be published and until the last page had an
event again; acknowledged events that some page lost without a word, and in how many gaps; doubled; reordered; sent
although refused; resets, and how many of them without need. It ends with status 1 unless all but the resets are 0.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis
from pages import FAILURES, Page, Pages, Publishers, judge
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from tests.kit import ServerProcess, free_port, wait_for

INSIDE = "SSEPUSH_FAILOVER_INSIDE"  # in the environment of the program that runs in namespaces of its own
CHANNELS = ("failover-a", "failover-b")
PER_S = 100.0
SERVERS = 2
UNTRIMMED = 100_000  # the history's size: nothing may be trimmed, so no reset is due for that
SERVER_OPTIONS = (
    *("--history", str(UNTRIMMED)),
    *("--retry", "300"),
    *("--heartbeat", "2"),
    *("--log-level", "error"),
)
NETWORK = "10.99.0"
REDIS_PORT, SENTINEL_PORT = 6379, 26379
RESYNC_WRITES = 100  # of 1 KB, more than the backlog of 16 KB that each master keeps
LONGEST_S = 60.0
SETTLE_S = 30.0


# ── Machines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def make_network() -> None:
    """A bridge to which machines are attached. In a network namespace of this program's own."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "bridge", "type", "bridge")
    ip("address", "add", f"{NETWORK}.1/24", "dev", "bridge")
    ip("link", "set", "bridge", "up")


class Machine:
    """A network namespace with one Redis, and perhaps a Sentinel."""

    def __init__(self, number: int, folder: Path, options: str) -> None:
        """options: lines of Redis's configuration."""
        self.name = f"machine{number}"
        self.address = f"{NETWORK}.{number + 10}"
        self.folder = folder / self.name
        self.options = options
        self.processes: list[subprocess.Popen[bytes]] = []
        self.folder.mkdir()
        self.port = f"port{number}"  # of the bridge
        ip("netns", "add", self.name)
        ip("link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.port, "master", "bridge", "up")
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.name, "link", "set", "eth0", "up")
        self.client = client_of(self.address, REDIS_PORT)
        self.config = self.folder / "redis.conf"
        self.write_config()
        self.start_redis()

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """In the machine's network; it ends with the machine."""
        log = self.folder / f"{Path(command[0]).name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=self.folder,
                stdout=output,
                stderr=output,
            )
        self.processes.append(process)
        return process

    def write_config(self) -> None:
        """In a file, so that Sentinels and Redis itself can put into it whom it follows."""
        self.config.write_text(
            f"bind {self.address}\n"
            f"port {REDIS_PORT}\n"
            "protected-mode no\n"
            'save ""\n'
            "appendonly yes\n"
            "repl-backlog-size 16kb\n"
            "repl-diskless-sync-delay 0\n"
            f"{self.options}"
        )

    def start_redis(self) -> None:
        self.redis = self.start("redis-server", str(self.config))
        wait_for(self.answers, f"Redis of {self.name} answers")

    def answers(self) -> bool:
        return self.role() != ""

    def role(self) -> str:
        return role_of(self.client)

    def is_linked(self) -> bool:
        """Whether it is a replica, and up to date."""
        try:
            return self.client.info("replication").get("master_link_status") == "up"
        except (RedisError, OSError):
            return False

    def kill_redis(self) -> None:
        self.redis.kill()
        self.redis.wait()

    def cut_off_from(self, others: Sequence[Machine]) -> None:
        for other in others:
            ip("-n", self.name, "route", "add", "blackhole", f"{other.address}/32")

    def join(self, others: Sequence[Machine]) -> None:
        for other in others:
            ip("-n", self.name, "route", "delete", "blackhole", f"{other.address}/32")

    def go(self) -> None:
        ip("-n", self.name, "link", "set", "eth0", "down")

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.client.close()
        ip("link", "delete", self.port)
        ip("netns", "delete", self.name)


def client_of(address: str, port: int) -> redis.Redis:
    """It tries once, and waits for half a second."""
    return redis.Redis(
        address,
        port,
        socket_timeout=0.5,
        socket_connect_timeout=0.5,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )


def role_of(client: redis.Redis) -> str:
    """Or "" if it does not answer."""
    try:
        return str(client.info("replication")["role"])
    except (RedisError, OSError):
        return ""


# ── Redis with replicas ──────────────────────────────────────────────────────────────────────────────────────────────


class Replicated:
    """A master, two replicas, and a Sentinel beside each."""

    count = 3
    wanted_replicas = 1  # without which a master writes nothing

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.down_after_ms = round(1000 * options.down_after)
        self.least_replicas = 0 if options.alone else self.wanted_replicas
        self.options = self._options()
        self.machines: list[Machine] = []
        for number in range(self.count):
            self.machines.append(Machine(number, folder, self.options))
        self.connect_nodes()

    def _options(self) -> str:
        """A master whose replicas say nothing stops writing well before it is taken for dead."""
        max_lag_s = max(1, self.down_after_ms // 1000 - 1)
        return (
            "repl-ping-replica-period 1\n"
            f"min-replicas-to-write {self.least_replicas}\n"
            f"min-replicas-max-lag {max_lag_s}\n"
        )

    def connect_nodes(self) -> None:
        master, *replicas = self.machines
        for replica in replicas:
            replica.client.replicaof(master.address, REDIS_PORT)
        for replica in replicas:
            wait_for(replica.is_linked, "the replica follows")
            replica.client.config_rewrite()
        for machine in self.machines:
            self._start_sentinel(machine, master)
        for machine in self.machines:
            wait_for(functools.partial(self._sees_all, machine), "the Sentinel sees all")

    def _start_sentinel(self, machine: Machine, master: Machine) -> None:
        config = machine.folder / "sentinel.conf"
        config.write_text(
            f"bind {machine.address}\n"
            f"port {SENTINEL_PORT}\n"
            "protected-mode no\n"
            f"sentinel monitor mymaster {master.address} {REDIS_PORT} 2\n"
            f"sentinel down-after-milliseconds mymaster {self.down_after_ms}\n"
            "sentinel failover-timeout mymaster 10000\n"
        )
        machine.start("redis-sentinel", str(config))

    def _sentinel(self, machine: Machine) -> redis.Redis:
        return client_of(machine.address, SENTINEL_PORT)

    def _sees_all(self, machine: Machine) -> bool:
        with contextlib.suppress(RedisError, OSError), self._sentinel(machine) as sentinel:
            seen = sentinel.sentinel_master("mymaster")
            return (seen["num-slaves"], seen["num-other-sentinels"]) == (2, 2)
        return False

    def url(self) -> str:
        sentinels = [f"{machine.address}:{SENTINEL_PORT}" for machine in self.machines]
        return f"redis+sentinel://{','.join(sentinels)}/mymaster/0"

    def master(self) -> Machine:
        """Whom most of the Sentinels take for it."""
        return wait_for(self._named_master, "there is a master")  # type: ignore[no-any-return]

    def _named_master(self) -> Machine | None:
        named: Counter[str] = Counter()
        for machine in self.machines:
            with contextlib.suppress(RedisError, OSError), self._sentinel(machine) as sentinel:
                address, _ = sentinel.sentinel_get_master_addr_by_name("mymaster")
                named[address] += 1
        for machine in self.machines:
            if named[machine.address] >= 2:
                return machine
        return None

    def replica(self) -> Machine:
        master = self.master()
        return next(machine for machine in self.machines if machine is not master)

    def bystander(self) -> Machine:
        """Another node, whose loss moves nothing."""
        return self.replica()

    def key_beside_ssepush_s(self, master: Machine) -> str:
        """A key that the master of ssepush's keys holds, too."""
        own = str(master.client.keys("*ssepush*")[0])
        tag, brace, _ = own.partition("}")
        return f"{tag}{brace}:failover" if brace else "failover"

    def switch_over(self) -> None:
        with self._sentinel(self.master()) as sentinel:
            sentinel.sentinel_failover("mymaster")

    def has_moved_from(self, machine: Machine) -> bool:
        master = self._named_master()
        return master is not None and master is not machine and master.role() == "master"

    def end(self) -> None:
        for machine in self.machines:
            machine.end()


class BehindProxy(Replicated):
    """The same, and haproxy, which sends everybody to the node that says that it is the master."""

    def connect_nodes(self) -> None:
        super().connect_nodes()
        self.port = free_port()
        config = self.folder / "haproxy.cfg"
        lines = [
            "defaults",
            "  mode tcp",
            "  timeout connect 1s",
            "  timeout client 1h",
            "  timeout server 1h",
            "listen redis",
            f"  bind 127.0.0.1:{self.port}",
            "  option tcp-check",
            r"  tcp-check send info\ replication\r\n",
            "  tcp-check expect string role:master",
            "  default-server check inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions",
        ]
        for machine in self.machines:
            lines.append(f"  server {machine.name} {machine.address}:{REDIS_PORT}")
        config.write_text("\n".join([*lines, ""]))
        self.proxy = subprocess.Popen(
            [program("haproxy"), "-db", "-f", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._leads_to_the_master, "haproxy has found the master")

    def _leads_to_the_master(self) -> bool:
        """At first haproxy takes every node for one, and sends connections to each in turn."""
        for _ in self.machines:
            with client_of("127.0.0.1", self.port) as client:
                if role_of(client) != "master":
                    return False
        return True

    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def end(self) -> None:
        self.proxy.kill()
        self.proxy.wait()
        super().end()


class Clustered(Replicated):
    """Three masters, each with a replica."""

    count = 6
    wanted_replicas = 0  # whose only replica is lost for good would never write again

    def _options(self) -> str:
        return f"{super()._options()}cluster-enabled yes\ncluster-node-timeout {self.down_after_ms}\n"

    def connect_nodes(self) -> None:
        nodes = [f"{machine.address}:{REDIS_PORT}" for machine in self.machines]
        command = [program("redis-cli"), "--cluster", "create", *nodes]
        command += ["--cluster-replicas", "1", "--cluster-yes"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        wait_for(self._is_whole, "the cluster is whole")

    def _is_whole(self) -> bool:
        kinds: Counter[str] = Counter()
        for machine in self.machines:
            state = machine.client.cluster("info")["cluster_state"]
            if state != "ok":
                return False
            if machine.role() == "master":
                kinds["masters"] += 1
            if machine.is_linked():
                kinds["replicas"] += 1
        return kinds == {"masters": 3, "replicas": 3}

    def url(self) -> str:
        nodes = [f"{machine.address}:{REDIS_PORT}" for machine in self.machines[:3]]
        return f"redis+cluster://{','.join(nodes)}"

    def _named_master(self) -> Machine | None:
        """The master that holds ssepush's keys."""
        for machine in self.machines:
            with contextlib.suppress(RedisError, OSError):
                if holds_keys(machine):
                    return machine
        return None

    def replica(self) -> Machine:
        master = self.master()
        for machine in self.machines:
            with contextlib.suppress(RedisError, OSError):
                if machine.client.info("replication").get("master_host") == master.address:
                    return machine
        raise AssertionError(f"{master.name} has no replica")

    def bystander(self) -> Machine:
        master = self.master()
        for machine in self.machines:
            if machine is not master and machine.role() == "master":
                return machine
        raise AssertionError("there is no other master")

    def switch_over(self) -> None:
        self.replica().client.cluster("failover")

    def has_moved_from(self, machine: Machine) -> bool:
        """An old master that cannot be asked, or does not know yet, still has the keys."""
        for other in self.machines:
            with contextlib.suppress(RedisError, OSError):
                if other is not machine and holds_keys(other):
                    return True
        return False


def holds_keys(machine: Machine) -> bool:
    """Whether it is the master of ssepush's keys."""
    return machine.role() == "master" and bool(machine.client.keys("*ssepush*"))


KINDS = {"sentinel": Replicated, "haproxy": BehindProxy, "cluster": Clustered}


def program(name: str) -> str:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") or name


# ── Faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────

Fault = Callable[[Replicated], Iterator[None]]  # what happens before the yield, and what after it


def killed(world: Replicated) -> Iterator[None]:
    master = world.master()
    master.kill_redis()
    wait_for(lambda: world.has_moved_from(master), "another node is the master", LONGEST_S)
    yield
    master.start_redis()


def stopped(world: Replicated) -> Iterator[None]:
    master = world.master()
    master.redis.send_signal(signal.SIGSTOP)
    wait_for(lambda: world.has_moved_from(master), "another node is the master", LONGEST_S)
    yield
    master.redis.send_signal(signal.SIGCONT)


def gone(world: Replicated) -> Iterator[None]:
    master = world.master()
    master.go()
    wait_for(lambda: world.has_moved_from(master), "another node is the master", LONGEST_S)
    yield


def partition(world: Replicated) -> Iterator[None]:
    master = world.master()
    others = [machine for machine in world.machines if machine is not master]
    master.cut_off_from(others)
    wait_for(lambda: world.has_moved_from(master), "another node is the master", LONGEST_S)
    yield
    master.join(others)


def switchover(world: Replicated) -> Iterator[None]:
    master = world.master()
    world.switch_over()
    wait_for(lambda: world.has_moved_from(master), "another node is the master", LONGEST_S)
    yield


def resync(world: Replicated) -> Iterator[None]:
    """More is written than the master keeps for a replica that comes back."""
    master, replica = world.master(), world.replica()
    before = master.client.info("stats")["sync_full"]
    replica.redis.send_signal(signal.SIGSTOP)
    master.client.client_kill_filter(_type="replica")
    key = world.key_beside_ssepush_s(master)
    master.client.config_set("min-replicas-to-write", 0)
    for _ in range(RESYNC_WRITES):
        master.client.set(key, "x" * 1000, ex=60)
    master.client.config_set("min-replicas-to-write", world.least_replicas)
    replica.redis.send_signal(signal.SIGCONT)
    wait_for(
        lambda: master.client.info("stats")["sync_full"] > before,
        "the replica is synchronised in full",
    )
    yield


def other(world: Replicated) -> Iterator[None]:
    bystander = world.bystander()
    bystander.kill_redis()
    yield
    bystander.start_redis()


FAULTS: dict[str, Fault] = {
    "killed": killed,
    "stopped": stopped,
    "gone": gone,
    "partition": partition,
    "switchover": switchover,
    "resync": resync,
    "other": other,
}
HARMLESS = ("resync", "other")  # of them no page need be told


# ── A run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    """What one fault did."""

    run: str
    publishing_s: float
    streams_s: float
    figures: Counter[str]

    def __str__(self) -> str:
        cells = [f"{self.run:34}"]
        cells += [f"{self.publishing_s:8.1f}", f"{self.streams_s:8.1f}"]
        for name in COLUMNS:
            cells.append(f"{self.figures[name]:{len(name) + 2}}")
        return "".join(cells)


COLUMNS = ("acknowledged", *FAILURES, "resets", "resets without need")
HEAD = f"{'':34} publish streams  {'  '.join(COLUMNS)}"


class Cutter(threading.Thread):
    """Cuts a tenth of the pages each second: they come and go."""

    def __init__(self, pages: Pages, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.pages = pages
        self.rng = rng
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        number = max(1, len(self.pages.pages) // 10)
        while not self.ended.wait(1.0):
            for page in self.rng.sample(self.pages.pages, number):
                page.cut = True


def play(
    kind: str,
    fault: str,
    mode: Sequence[str],
    options: argparse.Namespace,
    folder: Path,
) -> Row:
    with contextlib.ExitStack() as stack:
        world = KINDS[kind](folder, options)
        stack.callback(world.end)
        ports = []
        for _ in range(SERVERS):
            server = ServerProcess(world.url(), *SERVER_OPTIONS, *mode)
            stack.callback(server.kill)
            ports.append(server.port)
        opened = []
        for number in range(options.streams):
            channels = CHANNELS[: 1 + number % 2]
            opened.append(Page(channels, heeds_bare_id=number % 4 < 2))
        pages = Pages(opened, ports, random.Random(1))
        stack.callback(pages.stop)
        wait_for(pages.all_open, "every page is open")
        publishers = Publishers(
            ports,
            world.url(),
            CHANNELS,
            PER_S,
            UNTRIMMED,
            random.Random(2),
        )
        cutter = Cutter(pages, random.Random(3))
        time.sleep(options.seconds / 4)
        began_s = time.monotonic()
        for _ in FAULTS[fault](world):
            time.sleep(options.seconds / 2)
        time.sleep(options.seconds)
        cutter.ended.set()
        publishers.stop()
        lasts = publishers.publish_last(SETTLE_S)
        with contextlib.suppress(AssertionError):  # those that never get them are seen by the judgement
            wait_for(lambda: pages.have_seen(lasts), "every page has the last events", SETTLE_S)
    forgettings = [] if fault in HARMLESS else [began_s]
    figures = judge(pages.pages, publishers.outcome, forgettings)
    figures["acknowledged"] = len(publishers.outcome.acknowledged)
    published_s = publishing_again_s(publishers, began_s)
    back_s = streams_back_s(pages, publishers, published_s)
    run = " ".join([f"{kind}, {fault}", *mode])
    return Row(run, published_s - began_s, back_s - began_s, figures)


def publishing_again_s(publishers: Publishers, began_s: float) -> float:
    """When the longest silence ended in which nothing was acknowledged, if it was longer than a second."""
    moments = [began_s]
    for event in publishers.outcome.acknowledged.values():
        if event.told_s > began_s:
            moments.append(event.told_s)
    longest_s = 1.0
    again_s = began_s
    for before_s, moment_s in itertools.pairwise(sorted(moments)):
        if moment_s - before_s > longest_s:
            longest_s = moment_s - before_s
            again_s = moment_s
    return again_s


def streams_back_s(pages: Pages, publishers: Publishers, published_s: float) -> float:
    """When the last page had dispatched an event that was asked for since then."""
    back_s = published_s
    for page in pages.pages:
        for seen in page.seen:
            event = publishers.outcome.acknowledged.get(seen.block.data or "")
            if event and event.asked_s >= published_s:
                back_s = max(back_s, seen.at_s)
                break
    return back_s


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


def run_inside() -> int:
    """Run this program again in namespaces of its own; whatever it starts ends with it."""
    command = ["unshare", "--net", "--mount", "--pid"]
    command += ["--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    environment = {**os.environ, INSIDE: "1"}
    command += [sys.executable, *sys.argv]
    done = subprocess.run(command, env=environment, check=False)
    return done.returncode


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What pages notice when Redis's master dies, hangs, or moves.")
    option = parser.add_argument
    option("--redis", action="append", choices=KINDS, help="repeatable (all)")
    option("--fault", action="append", choices=FAULTS, help="repeatable (all)")
    option("--mode", choices=["default", "shared"], help="one way of subscribing (both)")
    option("--streams", type=int, default=50, help="(50)")
    option("--seconds", type=float, default=8.0, help="of events after the fault's end (8)")
    option("--down-after", type=float, default=3.0, help="s until a master is taken for dead (3)")
    option("--alone", action="store_true", help="masters write also without a replica")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    for name in ("redis-server", "redis-sentinel", "redis-cli", "haproxy", "ip", "unshare"):
        if not Path(program(name)).is_absolute():
            print(f"failover.py needs {name}", file=sys.stderr)
            return 2
    if INSIDE not in os.environ:
        return run_inside()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    make_network()
    modes = {"default": (), "shared": ("--shared",)}
    print(HEAD, flush=True)
    failed = 0
    for kind in options.redis or KINDS:
        for fault in options.fault or FAULTS:
            for mode in [options.mode] if options.mode else modes:
                failed += failures(kind, fault, modes[mode], options)
    return 1 if failed else 0


def failures(kind: str, fault: str, mode: Sequence[str], options: argparse.Namespace) -> int:
    """Print the row of one run; the number of what should be 0 in it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            row = play(kind, fault, mode, options, Path(folder))
    except AssertionError as error:
        why = str(error).strip().splitlines()
        print(f"{kind}, {fault}: {why[-1] if why else 'failed'}", flush=True)
        return 1
    print(row, flush=True)
    return sum(row.figures[name] for name in FAILURES)


if __name__ == "__main__":
    sys.exit(main())
