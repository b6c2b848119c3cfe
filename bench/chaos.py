"""Chaos: whether every page gets every event once and in order while Redis, ssepush and connections die at random.

    python bench/chaos.py                                  200 streams, 270 events/s, 25 s of each scenario
    python bench/chaos.py --shared --seed 7                with one Redis subscriber, and with chosen faults
    python bench/chaos.py --streams 30 --per-s 150 --seconds 3 forgetful

| scenario | Redis | when a reset is due |
| --- | --- | --- |
| kept | an append-only file; a history that is never trimmed | never |
| forgetful | snapshots alone; and a replica that lags, and is promoted when its master dies | Redis has forgotten |
| small | an append-only file; a history of 10 events | what a page missed was trimmed |
| slow | the same, of 30, and somebody deletes histories and the counter | what a page missed is gone |

In "slow", pages read 2 KB at a time into a buffer of 4 KB and pause for 1 to 6 s, one event in twenty has 150 KB, and a
stream may have 64 KB unsent. In each, two processes of ssepush serve the same channels, pages move between them and
follow one to three channels.

Pages behave as browsers do: they come back after the time that they were told, with their last event ID, and drop what
was cut within an event; every other one ignores an id without data, as Firefox and WebKit do. Publishers never publish
anything twice: an event is acknowledged (each page must get it), refused ("did not go out": no page may get it) or
unanswered (all of its channel's pages get it, or none). How that is judged says pages.py.

It prints its figures, and ends with status 1 unless lost, doubled, reordered, unannounced gaps and resets without need
are all 0. In "slow" the last is not looked at: nobody knows which pages would have needed what was deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import redis
from pages import FAILURES, Page, Pages, Publishers, judge

import ssepush
from tests.kit import RedisProcess, ServerProcess, free_port, wait_for

CHANNELS = ("chaos-a", "chaos-b", "chaos-c")
FOLLOWED = (  # what pages follow, by turns
    ("chaos-a",),
    ("chaos-b",),
    ("chaos-c",),
    ("chaos-a", "chaos-b"),
    CHANNELS,
)
SERVERS = 2
SERVER_OPTIONS = ("--retry", "200", "--heartbeat", "2", "--log-level", "error")
UNTRIMMED = 100_000
SCENARIOS = {  # and the history of each
    "kept": UNTRIMMED,
    "forgetful": UNTRIMMED,
    "small": 10,
    "slow": 30,
}
LARGE_BYTES = 150_000
SETTLE_S = 30.0  # at the end, for all pages to come back,
LAST_S = 3.0  # and to get the last events
UNREACHABLE_PORT = 1


# ── Redis ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class KeepingRedis(RedisProcess):
    """It keeps every write, also when it is killed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "--appendonly", "yes", "--appendfsync", "always")


class ForgetfulRedis(RedisProcess):
    """It keeps what stood in its last snapshot."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(folder, "--repl-diskless-sync-delay", "0")

    def save(self) -> None:
        self.client.save()

    def follow(self, master: RedisProcess) -> None:
        """Be its replica, up to date."""
        self.client.replicaof("127.0.0.1", master.port)
        wait_for(self.is_linked, "the replica follows")

    def is_linked(self) -> bool:
        replication = self.client.info("replication")
        return replication.get("master_link_status") == "up"

    def lag(self) -> None:
        """Stay a replica, and hear nothing any more."""
        self.client.replicaof("127.0.0.1", UNREACHABLE_PORT)

    def promote(self, port: int) -> None:
        """Be the master, where the old one was."""
        self.client.replicaof("NO", "ONE")
        self.client.config_set("port", port)
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self.client = redis.Redis(port=port, socket_timeout=20)
        wait_for(self.answers, "the promoted replica answers")


# ── Faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class World:
    """Redis, the servers, and what may happen to them."""

    def __init__(
        self,
        folder: Path,
        scenario: str,
        shared: bool,
        rng: random.Random,
    ) -> None:
        self.folder = folder
        self.rng = rng
        self.is_forgetful = scenario == "forgetful"
        self.is_slow = scenario == "slow"
        kind = ForgetfulRedis if self.is_forgetful else KeepingRedis
        self.redis: ForgetfulRedis | KeepingRedis = kind(folder)
        self.replicas = 0
        self.forgettings: list[float] = []  # moments at which Redis may have forgotten something
        self.faults: Counter[str] = Counter()
        history = str(SCENARIOS[scenario])
        self.options = ["--history", history, *SERVER_OPTIONS]
        if shared:
            self.options.append("--shared")
        if self.is_slow:
            self.options += ["--max-backlog", "65536"]
        self.ports: list[int] = []
        self.servers: list[ServerProcess] = []

    def start_servers(self) -> None:
        for _ in range(SERVERS):
            port = free_port()
            self.ports.append(port)
            self.servers.append(self.started(port))

    def wait(self, least_s: float, most_s: float) -> None:
        time.sleep(self.rng.uniform(least_s, most_s))

    def started(self, port: int) -> ServerProcess:
        return ServerProcess(self.redis.url, *self.options, port=port)

    def kill_redis(self) -> None:
        self.redis.kill()
        if self.is_forgetful:
            self.forgettings.append(time.monotonic())
        self.wait(0.0, 1.0)
        self.redis.start()

    def kill_redis_after_a_snapshot(self) -> None:
        assert isinstance(self.redis, ForgetfulRedis)
        self.redis.save()
        self.wait(0.1, 0.5)
        self.kill_redis()

    def promote_a_replica_that_lags(self) -> None:
        self.replicas += 1
        replica = ForgetfulRedis(self.folder / f"replica-{self.replicas}")
        replica.follow(self.redis)
        self.wait(0.0, 0.5)
        replica.lag()
        self.wait(0.1, 0.5)
        self.redis.kill()
        self.forgettings.append(time.monotonic())
        replica.promote(self.redis.port)
        self.redis = replica

    def stop_redis(self) -> None:
        self.redis.signal(signal.SIGSTOP)
        if self.rng.random() < 0.7:
            self.wait(0.2, 1.0)
        else:
            self.wait(5.2, 5.7)  # publishers give up after 5 s
        self.redis.signal(signal.SIGCONT)

    def delete_a_history(self) -> None:
        self.forgettings.append(time.monotonic())
        self.redis.client.delete(ssepush.HISTORY_KEY + self.rng.choice(CHANNELS))

    def delete_the_counter(self) -> None:
        self.forgettings.append(time.monotonic())
        self.redis.client.delete(ssepush.COUNTER_KEY, ssepush.NEWEST_KEY)

    def kill_subscribers(self) -> None:
        self.redis.client.client_kill_filter(_type="pubsub")

    def kill_server(self) -> None:
        server = self.rng.choice(self.servers)
        self.servers.remove(server)
        server.kill()
        self.wait(0.0, 0.5)
        self.servers.append(self.started(server.port))

    def torment(self, pages: Pages, seconds: float) -> None:
        """One fault after the other, all kinds in each round, until the time is over."""

        def cut_streams() -> None:
            number = len(pages.pages) // 3
            for page in self.rng.sample(pages.pages, number):
                page.cut = True

        kinds: dict[str, Callable[[], None]] = {
            "ssepush killed and restarted": self.kill_server,
            "streams cut within an event": cut_streams,
            "subscribers killed": self.kill_subscribers,
        }
        if self.is_forgetful:
            kinds["Redis killed after a snapshot"] = self.kill_redis_after_a_snapshot
            kinds["lagging replica promoted"] = self.promote_a_replica_that_lags
        else:
            kinds["Redis killed and restarted"] = self.kill_redis
            kinds["Redis stopped"] = self.stop_redis
        if self.is_slow:
            kinds["history deleted"] = self.delete_a_history
            kinds["counter deleted"] = self.delete_the_counter
        limit_s = time.monotonic() + seconds
        round_: list[str] = []
        while time.monotonic() < limit_s:
            if not round_:
                round_ = list(kinds)
                self.rng.shuffle(round_)
            name = round_.pop()
            kinds[name]()
            self.faults[name] += 1
            self.wait(0.1, 0.6)

    def end(self) -> None:
        for server in self.servers:
            server.kill()
        self.redis.kill()


# ── A scenario ───────────────────────────────────────────────────────────────────────────────────────────────────────


def new_pages(number: int, are_slow: bool) -> list[Page]:
    """Of each kind as many."""
    pages: list[Page] = []
    while len(pages) < number:
        for channels in FOLLOWED:
            pages.append(Page(channels, True, are_slow))
            pages.append(Page(channels, False, are_slow))
    return pages[:number]


def settle(pages: Pages, publishers: Publishers) -> None:
    """Until every page has the last events; those that never get them are seen by the judgement."""
    limit_s = time.monotonic() + SETTLE_S
    while time.monotonic() < limit_s:
        lasts = publishers.publish_last(SETTLE_S)
        have_seen = functools.partial(pages.have_seen, lasts)
        with contextlib.suppress(AssertionError):  # a page was reset instead: others come after them
            wait_for(have_seen, "every page has the last events", LAST_S)
            return


Played = tuple[Counter[str], list[str]]


def play(scenario: str, options: argparse.Namespace) -> Played:
    """The figures, and what pages were sent that no browser would take."""
    rngs = []  # threads must not share one
    for number in range(3):
        rngs.append(random.Random(f"{options.seed} {number}"))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        world = World(Path(folder), scenario, options.shared, rngs[0])
        stack.callback(world.end)
        world.start_servers()
        pages = Pages(new_pages(options.streams, world.is_slow), world.ports, rngs[1])
        stack.callback(pages.stop)
        wait_for(pages.all_open, "every page is open")
        publishers = Publishers(
            world.ports,
            world.redis.url,
            CHANNELS,
            options.per_s,
            SCENARIOS[scenario],
            rngs[2],
            LARGE_BYTES if world.is_slow else 0,
        )
        world.torment(pages, options.seconds)
        publishers.stop()
        for page in pages.pages:
            page.is_slow = False
        settle(pages, publishers)
    outcome = publishers.outcome
    figures = world.faults
    figures["events acknowledged"] = len(outcome.acknowledged)
    figures["events refused"] = len(outcome.refused)
    figures["events unanswered"] = len(outcome.unanswered)
    for page in pages.pages:
        figures["events dispatched"] += len(page.seen)
        figures["streams opened again"] += page.streams - 1
    judged = judge(pages.pages, outcome, world.forgettings)
    figures.update(judged)
    return figures, pages.errors


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether every page gets every event once, in order, whatever dies.")
    option = parser.add_argument
    option("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)} (all)")
    option("--streams", type=int, default=200, help="(200)")
    option("--per-s", type=float, default=270.0, help="events published a second (270)")
    option("--seconds", type=float, default=25.0, help="of faults in each scenario (25)")
    option("--seed", type=int, help="of the faults; else any")
    option("--shared", action="store_true", help="one Redis subscriber for all streams of a process")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.randrange(1_000_000)
    for name in options.scenarios:
        if name not in SCENARIOS:
            parser.error(f"no such scenario: {name}")
    print(f"seed {options.seed}", flush=True)
    failed = 0
    for scenario in options.scenarios or SCENARIOS:
        figures, errors = play(scenario, options)
        print(f"\n{scenario}: {options.streams} streams of {SERVERS} servers")
        for name, value in figures.items():
            print(f"{name:45} {value}")
        for error in errors[:10]:
            print(error)
        failed += len(errors)
        for name in FAILURES:
            failed += figures[name]
        if scenario != "slow":  # where it is not known which pages missed what was deleted
            failed += figures["resets without need"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
