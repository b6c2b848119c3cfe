"""What deploy/ holds beside the proxies: systemd, Redis's rights, containers, alerts, the dashboard; and upgrading."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import redis
import yaml

import ssepush
from tests.kit import (
    DEADLINE_S,
    DEPLOY,
    HERE,
    LOOPBACK,
    EventStream,
    RedisProcess,
    ServerProcess,
    Start,
    both_ways,
    environment_with,
    free_port,
    needs_test_extra,
    program,
    ssepush_command,
    wait_for,
)
from tests.machine import Machine

pytestmark = needs_test_extra
TESTS = HERE / "tests"


def get(port: int, path: str) -> tuple[int, str]:
    """The status and the body; 0 if nobody is there."""
    url = f"http://{LOOPBACK}:{port}{path}"
    try:
        response = urllib.request.urlopen(url, timeout=DEADLINE_S)
    except urllib.error.HTTPError as error:
        response = error
    except OSError:
        return 0, ""
    with response:
        body = response.read().decode()
        return response.status, body


def status_of(port: int, path: str) -> int:
    status, _ = get(port, path)
    return status


def deployed(name: str) -> str:
    """The text of a file of deploy/."""
    return (DEPLOY / name).read_text()


def docs(page: str) -> str:
    """The text of a page of the docs."""
    return (HERE / "docs" / page).read_text()


def run_program(
    *command: str | Path,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """One run of a program, to its end, in the project's folder and with the python3 of the tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        cwd=HERE,
        env=environment_with(PATH=path),
    )


def said_by(*command: str | Path, stdin: str = "") -> str:
    """What a program that ends well prints."""
    done = run_program(*command, stdin=stdin)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Started:
    """The server as something deployed starts it, with a line that says where it is."""

    def __init__(self, command: list[str], redis: RedisProcess) -> None:
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=environment_with(REDIS_URL=redis.url),
        )

    def first_line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def ended(self) -> int:
        """End it; its status."""
        self.process.terminate()
        return self.process.wait(DEADLINE_S)


# ── systemd ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that is there."""
    started = tmp_path / "ssepush"
    command = shlex.join(ssepush_command())
    started.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    started.chmod(0o755)
    text = deployed("ssepush@.service")
    unit = tmp_path / "ssepush@.service"
    unit.write_text(text.replace("/opt/ssepush/bin/ssepush ", f"{started} "))
    return unit


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    analyze = program("systemd-analyze")

    done = run_program(analyze, "verify", unit)

    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_systemd_finds_the_unit_hardened(unit: Path) -> None:
    analyze = program("systemd-analyze")
    instance = unit.with_name("ssepush@1.service")
    instance.write_text(unit.read_text())
    options = ["--offline=true", "--threshold=20", "--no-pager"]

    done = run_program(analyze, "security", *options, instance)

    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def command_of(
    unit: Path,
    instance: int,
    port: int,
    admin: int,
) -> list[str]:
    """What systemd would run for an instance, but for the ports."""
    text = unit.read_text()
    command = re.search("^ExecStart=(.*)$", text, re.MULTILINE)
    assert command
    line = command[1]
    for old, new in {
        "$SSEPUSH_OPTIONS": "",
        "900%i": str(admin),
        "--port 5000": f"--port {port}",
    }.items():
        line = line.replace(old, new)
    assert "%" not in line, instance
    return shlex.split(line)


def shown_at(admin: int, sample: str) -> int:
    """A sample of /metrics that a server shows at its port for admins: `shown_at(9001, "streams")`."""
    _, text = get(admin, "/metrics")
    (number,) = re.findall(f"^ssepush_{sample} ([0-9]+)$", text, re.MULTILINE)
    return int(number)


MAX_CLIENTS = 10_000  # of a Redis of which nothing else is said


def test_two_instances_of_the_unit_share_a_port_and_each_shows_its_own_metrics(
    unit: Path,
    redis_process: RedisProcess,
    channel: str,
) -> None:
    port = free_port()
    admins = [free_port(), free_port()]
    instances = []
    for number, admin in enumerate(admins, 1):
        command = command_of(unit, number, port, admin)
        instances.append(Started(command, redis_process))
    try:
        for instance in instances:
            assert f":{port}/" in instance.first_line()
        streams = [EventStream(port, f"/stream?channel={channel}") for _ in range(12)]
        ssepush.publish("hi", channel=channel, redis_url=redis_process.url)
        for stream in streams:
            assert stream.next().data == "hi"

        shown = [shown_at(admin, "streams") for admin in admins]
        places = [shown_at(admin, "max_streams") for admin in admins]
        public_metrics = status_of(port, "/metrics")
        public_health = status_of(port, "/healthz")
    finally:
        statuses = [instance.ended() for instance in instances]

    assert sum(shown) == 12
    # Each is a connection to Redis, and half of these are left to the application.
    assert 0 < sum(places) <= MAX_CLIENTS / 2
    assert public_metrics == 404
    assert public_health == 404
    assert statuses == [0, 0]


def test_the_admins_address_says_that_a_server_drains_as_long_as_it_does(start: Start, channel: str) -> None:
    admin = free_port()
    server = start("--shared", "--admin", f"{LOOPBACK}:{admin}")
    streams = [server.opened(channel) for _ in range(100)]  # of which one ends each hundredth of a second
    ready = status_of(admin, "/healthz")

    server.signal(signal.SIGTERM)
    wait_for(lambda: status_of(admin, "/healthz") == 503, "it is not ready any more")
    status, body = get(admin, "/healthz")
    left = shown_at(admin, "streams")
    ended = server.process.poll()

    assert ready == 200
    assert status == 503
    assert json.loads(body)["state"] == "draining"
    assert 0 < left <= len(streams)
    assert ended is None
    assert server.terminate() == 0
    assert status_of(admin, "/healthz") == 0


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """One with the unit, which a systemd of its own starts."""
    machine = Machine(tmp_path)
    yield machine
    machine.end()


UNITS = ("ssepush@1", "ssepush@2")


def test_systemd_starts_the_unit_as_it_is_in_its_sandbox_and_again_when_it_was_killed(machine: Machine) -> None:
    """The unit's own file, on its own ports, with all that it asks for; the program is not where pip puts it.

    Of the sandbox, what the kernel shows of a process is looked at: its user, its rights, its filter. That the other
    options are known, and how much they close, systemd-analyze says. How many files may be open is the machine's limit.
    """

    def is_healthy(number: int) -> bool:
        ask = machine.run("curl", "--silent", "--fail", f"http://127.0.0.1:900{number}/healthz")
        return ask.returncode == 0

    def max_streams(number: int) -> int:
        text = machine.said_by("curl", "--silent", f"http://127.0.0.1:900{number}/metrics")
        (places,) = re.findall("^ssepush_max_streams ([0-9]+)$", text, re.MULTILINE)
        return int(places)

    machine.said_by("systemctl", "start", "redis-server", *UNITS)
    wait_for(lambda: is_healthy(1), "the first answers")
    wait_for(lambda: is_healthy(2), "so does the second")
    first = machine.shown(UNITS[0], "MainPID")
    status = machine.said_by("cat", f"/proc/{first}/status")
    places = [max_streams(1), max_streams(2)]
    public = machine.said_by("curl", "--silent", "--head", "http://127.0.0.1:5000/")
    machine.said_by("systemctl", "kill", "--signal=KILL", UNITS[0])
    wait_for(lambda: machine.shown(UNITS[0], "NRestarts") == "1", "the first is started again")
    wait_for(lambda: is_healthy(1), "and answers")
    machine.said_by("systemctl", "stop", *UNITS)
    results = [machine.shown(unit, "Result") for unit in UNITS]

    assert re.search(rf"^Uid:\s+{machine.user}\s", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
    assert public.startswith("HTTP/1.1 200 ")
    assert 0 < sum(places) <= MAX_CLIENTS / 2
    assert results == ["success", "success"]


# ── Redis's rights ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def restricted_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that knows the deployed user."""
    users = tmp_path / "users.acl"
    users.write_text(deployed("redis.acl"))
    process = RedisProcess(tmp_path, "--aclfile", str(users))
    yield process
    process.kill()


def test_the_docs_show_the_rights_that_are_deployed_and_no_others() -> None:
    rights = deployed("redis.acl").strip()

    shown = re.findall(r"^user ssepush .*$", docs("security.md"), re.MULTILINE)

    assert shown == [rights]


PREFIX = "pages:"  # of deploy/


@pytest.mark.parametrize("name", ["ssepush@.service", "compose.yml", "Containerfile", "redis.acl"])
def test_everything_that_is_deployed_has_the_same_prefix(name: str) -> None:
    set_there = re.findall(r"SSEPUSH_PREFIX(?:=|: \")(\w+:)|&(\S+)\*", deployed(name))

    assert {"".join(found) for found in set_there} == {PREFIX}


CELERY_CHANNEL = "/0.celeryev/task.sent"

CHANNEL_NAMED = {
    "in a URL": r"[?&]channel=([^&\s\"'`)]+)",
    "in a program, or in JSON": r'\bchannel"?\s*(?:=|:|=>)\s*f?"([^"]+)"',
    "in a command": r"\b(?:redis-cli|ssepush|ssepush\.py)(?: -u \S+)? (?:publish|sign) ([a-z][\w:-]*)",
    "in PHP": r'->publish\("([^"]+)"',
    "with a token": r'"(private-[^"]+)"',
    "in the log": r"\bopen: \S+ on ([^,\s]+)",
    "in a warning": r"\bmessage on channel (\S+): ",
}
PLACEHOLDER = "NAME"


def channels_of_the_docs() -> dict[str, set[str]]:
    """The channels that somebody may try who reads README.md, docs/ or examples/, by how they are named there."""
    found: dict[str, set[str]] = {way: set() for way in CHANNEL_NAMED}
    for file in [
        HERE / "README.md",
        *(HERE / "docs").rglob("*.md"),
        *(HERE / "examples").glob("*.*"),
    ]:
        text = re.sub(r"\{[^{}]*\}", "x", file.read_text())  # as if a program had filled it in
        for way, pattern in CHANNEL_NAMED.items():
            found[way].update(re.findall(pattern, text))
    found["in a URL"].discard(PLACEHOLDER)
    return found


def test_the_deployed_user_may_read_the_channels_of_the_docs_behind_the_prefix_and_no_others(
    restricted_redis: RedisProcess,
) -> None:
    url = restricted_redis.url_of("ssepush", "CHANGE-ME")
    user = redis.Redis.from_url(url, protocol=2)
    pubsub: Any = user.pubsub()  # type: ignore[no-untyped-call]

    def is_refused(channel: str) -> bool:
        pubsub.subscribe(channel)
        try:
            confirmation = pubsub.get_message(timeout=DEADLINE_S)
        except redis.exceptions.NoPermissionError:
            return True
        assert confirmation["type"] == "subscribe"
        return False

    named = channels_of_the_docs()
    with contextlib.closing(user), contextlib.closing(pubsub):
        channels = set.union(*named.values())
        refused = {channel for channel in channels if is_refused(channel)}
        refused_behind_it = {channel for channel in channels if is_refused(PREFIX + channel)}

    assert all(named.values()), named
    assert {channel for channel in channels if not channel.startswith(PREFIX)} <= refused
    assert CELERY_CHANNEL in refused
    assert refused_behind_it == set()


def task_is_sent(url: str) -> None:
    """An application sends a task to its workers, with an argument that is nobody else's business."""
    from celery import Celery

    app = Celery("shop", broker=url)
    app.conf.task_send_sent_event = True
    app.conf.broker_connection_retry_on_startup = False
    app.send_task("shop.charge", args=["4111 1111 1111 1111"])
    app.close()


def test_strangers_read_the_arguments_of_celerys_tasks_on_a_shared_redis_without_rights(
    start: Start,
    own_redis: RedisProcess,
) -> None:
    server = start(redis=own_redis)
    stranger = server.opened(CELERY_CHANNEL)

    task_is_sent(own_redis.url)

    message = json.loads(stranger.next().data)
    body = base64.b64decode(message["body"])
    assert b"4111 1111 1111 1111" in body


def test_with_the_deployed_rights_strangers_read_nothing_of_celery(
    start: Start,
    restricted_redis: RedisProcess,
) -> None:
    url = restricted_redis.url_of("ssepush", "CHANGE-ME")
    server = start("--prefix", PREFIX, redis=url)
    stranger = server.opened(CELERY_CHANNEL)
    reader = server.opened("sse")

    task_is_sent(restricted_redis.url)
    server.publish("for all to see")
    server.publish("the prefix, and this name", CELERY_CHANNEL)

    assert stranger.next().data == "the prefix, and this name"
    assert reader.next().data == "for all to see"


def test_without_the_prefix_the_deployed_user_lets_strangers_read_nothing(
    start: Start,
    restricted_redis: RedisProcess,
) -> None:
    server = start(redis=restricted_redis.url_of("ssepush", "CHANGE-ME"))

    stranger = server.stream(CELERY_CHANNEL)

    assert stranger.until_end() == []


# ── Containers: there is no registry of images here, so their steps are run without one ─────────────────────────────
#
# Run: RUN, each in order, in an empty folder in place of the image's root, with this machine's Python in place of the
# image's; ENTRYPOINT and HEALTHCHECK, as commands of this machine. Read only: FROM, WORKDIR, COPY (the test copies the
# files), USER, EXPOSE, the times of HEALTHCHECK; and compose.yml, but for the options, which the server's parser takes.


def values_of(name: str) -> list[str]:
    """What stands behind an instruction of the Containerfile, each time that it is there."""
    found = []
    for line in deployed("Containerfile").splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == name:
            found.append(rest)
    return found


def copied() -> list[str]:
    """The files that are copied into the image."""
    sources_and_target = values_of("COPY")[0].split()
    return sources_and_target[:-1]


def test_the_image_has_two_stages_is_not_run_by_root_and_copies_what_is_there() -> None:
    """Read, not run: FROM, COPY and USER."""
    base = "docker.io/library/python:3.13-slim"
    _, second_copy = values_of("COPY")

    assert values_of("FROM") == [f"{base} AS build", base]
    assert values_of("USER") == ["65534:65534"]
    for name in copied():
        assert (HERE / name).exists()
    assert second_copy == "--from=build /opt/ssepush /opt/ssepush"


def test_the_steps_of_the_build_install_this_version_with_its_page(tmp_path: Path) -> None:
    """Run: each RUN, by this machine's Python and user. Not run: COPY, in whose place the test copies the files."""
    source = tmp_path / "src"
    source.mkdir()
    installed = tmp_path / "opt" / "ssepush"
    for name in copied():
        shutil.copy(HERE / name, source)

    for step in values_of("RUN"):
        command = step.replace("/opt/ssepush", str(installed))
        subprocess.run(
            command.split(),
            check=True,
            cwd=source,
            capture_output=True,
            timeout=120,
        )
    version = said_by(installed / "bin" / "ssepush", "--version")
    measure = "import ssepush; print(len(ssepush.page_and_policy()[0]))"
    page_bytes = said_by(installed / "bin" / "python3", "-I", "-c", measure)

    page = HERE / "index.html"
    assert version == f"ssepush {ssepush.__version__}\n"
    assert int(page_bytes) == page.stat().st_size


def test_what_the_image_starts_is_healthy_by_its_own_check_and_shows_metrics_inside_alone(
    redis_process: RedisProcess,
) -> None:
    """Run: ENTRYPOINT and HEALTHCHECK's command, with programs, ports and the user of this machine. Not run: USER."""
    port = free_port()
    admin = free_port()
    program_words = [json.dumps(word) for word in ssepush_command()]
    here = {
        '"/opt/ssepush/bin/ssepush"': ", ".join(program_words),
        "/opt/ssepush/bin/python3": sys.executable,
        '"5000"': f'"{port}"',
        ":9000": f":{admin}",
        "0.0.0.0": LOOPBACK,
    }

    def command_in(text: str) -> list[str]:
        """The command, with programs and ports of this machine."""
        for old, new in here.items():
            text = text.replace(old, new)
        return [str(word) for word in json.loads(text)]

    (health,) = values_of("HEALTHCHECK")
    (entry,) = values_of("ENTRYPOINT")
    _, _, check = health.partition("CMD ")
    server = Started(command_in(entry), redis_process)
    try:
        assert f":{port}/" in server.first_line()
        healthy = run_program(*command_in(check))
        _, metrics_inside = get(admin, "/metrics")
        outside = status_of(port, "/metrics")
    finally:
        ended = server.ended()
    unhealthy = run_program(*command_in(check))

    assert healthy.returncode == 0
    assert "ssepush_streams 0" in metrics_inside
    assert outside == 404
    assert ended == 0
    assert unhealthy.returncode == 1


def test_compose_starts_the_image_beside_a_redis_that_keeps_what_it_has() -> None:
    compose = yaml.safe_load(deployed("compose.yml"))
    services = compose["services"]
    ours = services["ssepush"]
    redis = services["redis"]

    assert ours["build"] == {
        "context": "..",
        "dockerfile": "deploy/Containerfile",
    }
    assert redis["command"] == ["redis-server", "--appendonly", "yes"]
    assert ours["environment"]["REDIS_URL"] == "redis://redis:6379/0"
    assert ours["ports"] == ["127.0.0.1:5000:5000"]
    assert "ports" not in redis
    # The server's own parser takes the options.
    parser = ssepush.command_line()
    options = parser.parse_args(ours["command"])
    assert options.allow_host == ["events.example.org"]


# ── Alerts and the dashboard ─────────────────────────────────────────────────────────────────────────────────────────


def queries() -> list[str]:
    """The dashboard's, with its variables filled in."""
    dashboard = json.loads(deployed("grafana.json"))
    found = []
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            query = query.replace("$__rate_interval", "5m")
            query = query.replace("$instance", ".*")
            found.append(query)
    return found


def alerts() -> str:
    """The conditions of all alerts."""
    groups = yaml.safe_load(deployed("alerts.yml"))["groups"]
    rules = groups[0]["rules"]
    return " ".join(rule["expr"] for rule in rules)


def promtool(*arguments: str | Path, stdin: str = "") -> str:
    """What it prints when it finds nothing wrong."""
    return said_by(program("promtool"), *arguments, stdin=stdin)


def test_prometheus_takes_the_alerts() -> None:
    said = promtool("check", "rules", DEPLOY / "alerts.yml")

    assert "11 rules found" in said


def test_each_alert_fires_alone_when_it_should_and_none_for_a_quiet_server() -> None:
    promtool("test", "rules", TESTS / "alerts_test.yml")


def exported_by(server: ServerProcess, channel: str) -> set[str]:
    """The names of the server's samples, once it has seen of everything something."""
    stream = server.opened(channel)
    server.publish("hi", channel)
    stream.next()
    server.stream(channel).until_end()  # it is full
    server.redis.publish(channel, b"\xff")
    wait_for(lambda: server.dropped("message is not UTF-8"), "a message was dropped")
    stream.close()
    wait_for(lambda: server.closed("gone") == 1, "the stream is closed")
    with server.stream(channel, Last_Event_ID="none of ours") as reset:
        reset.wait(lambda: reset.events, "the reset")
        _, text = get(server.port, "/metrics")
    return set(re.findall("^(ssepush_[a-z0-9_]+)", text, re.MULTILINE))


class Prometheus:
    """A real one, with the deployed configuration and alerts, and a server in place of the docs' own."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        configuration = yaml.safe_load(deployed("prometheus.yml"))
        configuration["global"] = {
            "scrape_interval": "300ms",
            "scrape_timeout": "300ms",
            "evaluation_interval": "300ms",
        }
        for job in configuration["scrape_configs"]:
            job["static_configs"] = [{"targets": [f"{LOOPBACK}:{server.port}"]}]
        shutil.copy(DEPLOY / "alerts.yml", folder)
        file = folder / "prometheus.yml"
        file.write_text(json.dumps(configuration))
        promtool("check", "config", file)
        self.port = free_port()
        self.log = (folder / "prometheus.log").open("wb")
        command = [
            program("prometheus"),
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={LOOPBACK}:{self.port}",
        ]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def asked(self, path: str, **query: str) -> Any:
        """What its API answers."""
        _, body = get(self.port, f"/api/v1/{path}?{urlencode(query)}")
        answer = json.loads(body)
        assert answer["status"] == "success", body
        return answer["data"]

    def wait_for_data(self, query: str) -> None:
        """Until a query gives something: a rate does after two scrapes."""
        wait_for(lambda: self.asked("query", query=query)["result"], query)

    def is_ready(self) -> bool:
        return status_of(self.port, "/-/ready") == 200

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE_S)
        self.log.close()


@pytest.fixture
def prometheus(
    start: Start,
    channel: str,
    tmp_path: Path,
) -> Iterator[Prometheus]:
    """One that scrapes a server which has seen of everything something."""
    server = start("--max-streams", "1")
    exported_by(server, channel)
    prometheus = Prometheus(tmp_path, server)
    yield prometheus
    prometheus.end()


def test_a_real_prometheus_has_data_for_each_panel_a_first_alert_and_an_address_for_each_probe(
    prometheus: Prometheus,
) -> None:
    wait_for(prometheus.is_ready, "Prometheus is ready")

    for query in queries():
        prometheus.wait_for_data(query)
    prometheus.wait_for_data('ALERTS{alertname="SsepushDropsMessages"}')

    targets = prometheus.asked("targets")["activeTargets"]
    (probe,) = [target for target in targets if target["scrapePool"] == "ssepush-healthz"]
    (metrics,) = [target for target in targets if target["scrapePool"] == "ssepush"]
    instance = metrics["labels"]["instance"]
    asked_for = quote(f"http://{instance}/healthz", safe="")
    assert probe["scrapeUrl"] == f"http://127.0.0.1:9115/probe?module=http_2xx&target={asked_for}"
    assert probe["labels"]["instance"] == instance


def test_alerts_and_dashboard_ask_for_what_the_server_exports(start: Start, channel: str) -> None:
    server = start("--max-streams", "1")
    exported = exported_by(server, channel)
    asked = " ".join([*queries(), alerts()])

    names = set(re.findall(r"\bssepush_[a-z0-9_]+", asked))

    assert names <= exported
    assert names


def test_what_an_alert_waits_for_is_counted_from_0_so_that_the_first_is_an_increase(start: Start) -> None:
    _, text = get(start().port, "/metrics")
    waited_for = re.findall(r'(ssepush_\w+){(\w+)=~?"([^"]+)"}', alerts())

    assert waited_for
    for name, label, values in waited_for:
        for value in values.split("|"):
            assert f'{name}{{{label}="{value}"}} 0\n' in text


def test_prometheus_finds_nothing_wrong_with_the_metrics(start: Start, channel: str) -> None:
    server = start()
    with server.opened(channel) as stream:
        server.publish("hi", channel)
        stream.next()
        _, text = get(server.port, "/metrics")

    done = run_program(program("promtool"), "check", "metrics", stdin=text)

    complaints = done.stderr.splitlines()
    assert [line for line in complaints if "no help text" not in line] == []


# ── Upgrading ────────────────────────────────────────────────────────────────────────────────────────────────────────


OF_1_X = "1764000000000-1764000000000000"  # an id, as pages have it that come from there


def kept_by_1_x(redis: RedisProcess, channel: str) -> dict[str, bytes | None]:
    """The keys that 1.x leaves behind, each as Redis dumps it."""
    keys = ("ssepush:counter", f"ssepush:history:{channel}")
    return {key: redis.client.dump(key) for key in keys}


@both_ways
def test_a_page_that_1_x_has_served_is_reset_once_and_then_gets_everything(
    start: Start,
    own_redis: RedisProcess,
    channel: str,
) -> None:
    own_redis.client.hset("ssepush:counter", "newest", OF_1_X)
    own_redis.client.xadd(f"ssepush:history:{channel}", {"previous": "", "message": "of 1.x"}, OF_1_X)
    before = kept_by_1_x(own_redis, channel)
    server = start(redis=own_redis)

    with server.stream(channel, Last_Event_ID=OF_1_X) as stream:
        reset = stream.next()
        server.publish("one", channel)
        came = stream.data(1)
    server.publish("two", channel)
    with server.stream(channel, Last_Event_ID=reset.id) as stream:
        server.publish("three", channel)
        came += stream.data(3)
    with server.stream(channel, query="lastEventId=earliest") as stream:
        came += stream.data(3)

    assert (reset.type, reset.json) == ("stream-reset", {"reason": "unknown-id"})
    assert came == ["one"] + ["one", "two", "three"] * 2
    assert kept_by_1_x(own_redis, channel) == before


# ── What the docs show ───────────────────────────────────────────────────────────────────────────────────────────────


def blocks(page: str, language: str) -> list[str]:
    """The code that a page of the docs shows."""
    block = rf"^```{language}\n(.*?)^```$"
    return re.findall(block, docs(page), re.MULTILINE | re.DOTALL)


def the_block(
    page: str,
    holds: str,
    language: str = "sh",
) -> str:
    """The one of them that holds this."""
    found = blocks(page, language)
    (block,) = [block for block in found if holds in block]
    return block


def test_the_jobs_of_the_alerts_are_in_the_deployed_configuration() -> None:
    configured = {job["job_name"] for job in yaml.safe_load(deployed("prometheus.yml"))["scrape_configs"]}

    asked = set(re.findall('job="([^"]+)"', alerts()))

    assert asked == configured


def test_the_server_takes_the_options_that_the_docs_give_to_systemd() -> None:
    shown = the_block("operations.md", "SSEPUSH_OPTIONS")
    (given,) = re.findall("^SSEPUSH_OPTIONS=(.*)$", shown, re.MULTILINE)

    parser = ssepush.command_line()
    options = parser.parse_args(given.split())

    assert options.allow_host == ["events.example.org"]
    assert options.allow_origin == ["https://www.example.org"]
    unit = deployed("ssepush@.service")
    assert "EnvironmentFile=-/etc/ssepush.env" in unit


def test_a_password_is_encoded_as_the_docs_say(start: Start, tmp_path: Path) -> None:
    password = "a/b@c#d?e%f"
    encode = the_block("operations.md", "quote")
    guarded = RedisProcess(tmp_path)
    guarded.client.acl_setuser(
        "guest",
        enabled=True,
        passwords=[f"+{password}"],
        keys=["*"],
        channels=["*"],
        categories=["+@all"],
    )

    encoded = said_by("sh", "-c", encode, stdin=password)
    url = guarded.url_of("guest", encoded.strip())
    reached = ssepush.publish("hi", redis_url=url)
    guarded.kill()

    assert reached == 0


def test_a_token_is_made_as_the_docs_say(start: Start) -> None:
    command = the_block("security.md", "sign private-7")
    said = said_by("sh", "-c", f"{command}\necho $SSEPUSH_SECRET")
    token, secret = said.split()
    server = start(SSEPUSH_SECRET=secret)

    with server.stream("private-7", query=f"token={token}") as stream:
        assert stream.status == 200
    with server.stream("private-8", query=f"token={token}") as stream:
        assert stream.status == 403


def test_the_docs_warn_of_the_channel_on_which_celery_tells_all() -> None:
    warning = the_block("security.md", "celeryev")

    assert f"channel={CELERY_CHANNEL}" in warning


def test_the_docs_build_the_image_as_the_containerfile_says() -> None:
    shown = the_block("operations.md", "podman build")

    said = re.findall("^# +(podman .*)$", deployed("Containerfile"), re.MULTILINE)

    assert said == shown.splitlines()


def shapes(log: str) -> set[str]:
    """The lines of a log without their time and numbers, but for those that are none of the log."""
    found = set()
    for line in log.splitlines():
        shape = re.sub(r"^\S+ \S+ |[0-9.,]+", "", line)
        if shape.startswith(("INFO", "WARNING")):
            found.add(shape)
    return found


def test_what_the_docs_say_of_the_log_is_what_it_says(start: Start) -> None:
    server = start()
    stream = server.opened("orders", "sse")
    server.redis.publish("sse", b"\xff")
    wait_for(lambda: server.said("dropped"), "what was dropped is in the log")
    stream.close()
    wait_for(lambda: server.said("closed after"), "so is the end of the stream")

    shown = the_block("operations.md", "stream 1 open", language="")

    assert shapes(shown) <= shapes(server.output)
