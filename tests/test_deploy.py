"""What deploy/ holds beside the proxies: systemd, rights, containers, alerts; several processes, and upgrading."""

from __future__ import annotations

import base64
import contextlib
import http.client
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

import ssepush
from tests import kit
from tests.machine import USER, Machine
from tests.test_docs import PROSE, shown, shown_line

pytestmark = kit.needs_test_extra


def get(port: int, path: str) -> tuple[int, str]:
    """The status and the body; 0 if nobody is there."""
    try:
        response = urllib.request.urlopen(f"http://{kit.LOOPBACK}:{port}{path}", timeout=kit.DEADLINE_S)
    except urllib.error.HTTPError as error:
        response = error
    except OSError:
        return 0, ""
    with response:
        return response.status, response.read().decode()


def deployed(name: str) -> str:
    """The text of a file of deploy/."""
    return (kit.DEPLOY / name).read_text()


def run_program(*command: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """One run of a program, to its end, in the project's folder and with the python3 of the tests."""
    environment = kit.environment_with(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=kit.DEADLINE_S, cwd=kit.HERE, env=environment
    )


def said_by(*command: str | Path, stdin: str = "") -> str:
    """What a program that ends well prints."""
    done = run_program(*command, stdin=stdin)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sample(admin: int, name: str) -> int:
    """One of /metrics, at a server's port for admins: `sample(9001, "streams")`."""
    (number,) = re.findall(f"^ssepush_{name} ([0-9]+)$", get(admin, "/metrics")[1], re.MULTILINE)
    return int(number)


# ── Several processes on a port ──────────────────────────────────────────────────────────────────────────────────────


def test_an_event_published_at_any_of_several_processes_reaches_the_streams_of_all(
    start: kit.Start, channel: str
) -> None:
    port = kit.free_port()
    processes = [start("--reuse-port", port=port) for _ in range(3)]
    streams: list[kit.EventStream] = []
    at_processes, expected = 0, list[str]()

    while not all(process.said(" for 127") for process in processes):  # the kernel has given one to each
        streams.append(processes[0].opened(channel))
    while at_processes < 3:  # each counts its own publishes: the first one of each is told by its 1
        connection = http.client.HTTPConnection(kit.LOOPBACK, port, timeout=kit.DEADLINE_S)
        with contextlib.closing(connection):
            connection.request("POST", "/publish", json.dumps({"channel": channel, "data": len(expected)}), kit.JSON)
            answer = json.loads(connection.getresponse().read())
            connection.request("GET", "/metrics")
            at_processes += b'publishes_total{status="ok"} 1\n' in connection.getresponse().read()
        assert answer["receivers"] == len(streams)
        expected.append(str(len(expected)))
        assert len(expected) < 200

    came = [stream.take(len(expected)) for stream in streams]
    assert all(events == came[0] for events in came)
    assert [event.data for event in came[0]] == expected


@kit.both_ways
def test_a_rolling_restart_of_two_processes_on_one_port_loses_nothing(
    own_redis: kit.RedisProcess, start: kit.Start, channel: str
) -> None:
    names, port = [f"{channel}-{letter}" for letter in "ab"], kit.free_port()
    options = ("--reuse-port", "--history", "100000", "--retry", "300", "--drain", "2")
    server = start(*options, port=port, redis=own_redis)
    pages = [kit.Page(port, *names[: 1 + number % 2]) for number in range(40)]
    kit.wait_for(lambda: all(page.last_event_id for page in pages), "all pages have a position")
    publishers = [kit.Publisher(port, str(number), *names, pause=0.002) for number in range(2)]

    for _ in range(2):
        streams = {page: page.streams for page in pages}
        before, server = server, start(*options, port=port, redis=own_redis)
        assert before.terminate() == 0
        kit.wait_for(lambda: all(page.streams > had for page, had in streams.items()), "all pages came back")  # noqa: B023
    kit.wait_for(lambda: sum(len(publisher.acknowledged) for publisher in publishers) > 200, "enough was published")
    for publisher in publishers:
        publisher.stop()
    for name in reversed(names):
        kit.wait_for(lambda: server.post({"data": "last", "channel": name}).status == 200, "the last event")  # noqa: B023
    for page in pages:
        page.wait_for("last")

    assert sum(len(publisher.unsure) for publisher in publishers) < 10
    for page in pages:
        kit.assert_whole(page, publishers)
        assert not any(event.type == "stream-reset" for event in page.events)


def test_the_admins_address_says_that_a_server_drains_as_long_as_it_does(start: kit.Start, channel: str) -> None:
    admin = kit.free_port()
    server = start("--shared", "--admin", f"{kit.LOOPBACK}:{admin}")
    streams = [server.opened(channel) for _ in range(100)]  # of which one ends each hundredth of a second
    ready, _ = get(admin, "/healthz")

    server.signal(signal.SIGTERM)
    kit.wait_for(lambda: get(admin, "/healthz")[0] == 503, "it is not ready any more")
    status, body = get(admin, "/healthz")
    left = sample(admin, "streams")
    ended = server.process.poll()

    assert (ready, status, json.loads(body)["state"]) == (200, 503, "draining")
    assert 0 < left <= len(streams)
    assert ended is None
    assert server.terminate() == 0
    assert get(admin, "/healthz") == (0, "")


# ── systemd ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that is there."""
    command = tmp_path / "ssepush"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(kit.ssepush_command())} "$@"\n')
    command.chmod(0o755)
    unit = tmp_path / "ssepush@.service"
    unit.write_text(deployed("ssepush@.service").replace("/opt/ssepush/bin/ssepush ", f"{command} "))
    return unit


def test_systemd_finds_nothing_wrong_with_the_unit_and_finds_it_hardened(unit: Path) -> None:
    analyze = kit.needs("systemd-analyze")
    instance = unit.with_name("ssepush@1.service")
    instance.write_text(unit.read_text())

    verified = run_program(analyze, "verify", unit)
    secure = run_program(analyze, "security", "--offline=true", "--threshold=20", "--no-pager", instance)

    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    assert secure.returncode == 0, secure.stdout[-200:] + secure.stderr


MAX_CLIENTS = 10_000  # of a Redis of which nothing else is said


def test_systemd_starts_the_unit_as_it_is_in_its_sandbox_and_again_when_it_was_killed(machine: Machine) -> None:
    """The unit's own file, on its own ports, with all that it asks for; the program is not where pip puts it.

    Of the sandbox, what the kernel shows of a process is looked at: its user, its rights, its filter. That the other
    options are known, and how much they close, systemd-analyze says. How many files may be open is the machine's limit.
    """
    units = ("ssepush@1", "ssepush@2")

    def wait_until_healthy(number: int) -> None:
        ask = ("curl", "--silent", "--fail", f"http://127.0.0.1:900{number}/healthz")
        kit.wait_for(lambda: machine.run(*ask).returncode == 0, f"instance {number} answers")

    machine.said_by("systemctl", "start", "redis-server", *units)
    wait_until_healthy(1)
    wait_until_healthy(2)
    metrics = "".join(machine.said_by("curl", "--silent", f"http://127.0.0.1:900{number}/metrics") for number in (1, 2))
    status = machine.said_by("cat", f"/proc/{machine.shown(units[0], 'MainPID')}/status")
    public = machine.said_by("curl", "--silent", "--head", "http://127.0.0.1:5000/")
    machine.said_by("systemctl", "kill", "--signal=KILL", units[0])
    kit.wait_for(lambda: machine.shown(units[0], "NRestarts") == "1", "the first is started again")
    wait_until_healthy(1)
    machine.said_by("systemctl", "stop", *units)

    for line in (rf"Uid:\s+{USER}\s", r"CapBnd:\s+0+$", r"NoNewPrivs:\s+1$", r"Seccomp:\s+2$"):
        assert re.search(f"^{line}", status, re.MULTILINE), line
    assert public.startswith("HTTP/1.1 200 ")
    # Each stream is a connection to Redis, and half of these are left to the application.
    assert 0 < sum(map(int, re.findall("^ssepush_max_streams ([0-9]+)$", metrics, re.MULTILINE))) <= MAX_CLIENTS / 2
    assert [machine.shown(unit, "Result") for unit in units] == ["success", "success"]


# ── Redis's rights ───────────────────────────────────────────────────────────────────────────────────────────────────


PREFIX = "pages:"  # of deploy/


def test_everything_that_is_deployed_has_the_same_prefix_and_the_docs_show_the_same_rights() -> None:
    rights = deployed("redis.acl").strip()
    files = [deployed(name) for name in ("ssepush@.service", "compose.yml", "Containerfile", "redis.acl")]

    prefixes = [set(re.findall(r"(?:SSEPUSH_PREFIX(?:=|: \")|&)([\w:]+)", text)) for text in files]

    assert prefixes == [{PREFIX}] * len(files)
    assert set(re.findall("^user ssepush .*$", PROSE, re.MULTILINE)) == {rights}


CELERY_CHANNEL = "/0.celeryev/task.sent"


def test_strangers_read_celerys_tasks_on_a_shared_redis_and_with_the_deployed_rights_and_prefix_nothing(
    start: kit.Start, own_redis: kit.RedisProcess, tmp_path: Path
) -> None:
    celery = pytest.importorskip("celery")
    users = tmp_path / "restricted" / "users.acl"
    users.parent.mkdir()
    users.write_text(deployed("redis.acl"))
    restricted = kit.RedisProcess(users.parent, "--aclfile", str(users))
    url = restricted.url_of("ssepush", "CHANGE-ME")
    stranger = start(redis=own_redis).opened(CELERY_CHANNEL)
    behind_prefix = start("--prefix", PREFIX, redis=url)
    nothing = behind_prefix.opened(CELERY_CHANNEL)
    refused = start(redis=url).stream(CELERY_CHANNEL)

    for broker in (own_redis, restricted):
        app = celery.Celery("shop", broker=broker.url)
        app.conf.update(task_send_sent_event=True, broker_connection_retry_on_startup=False)
        app.send_task("shop.charge", args=["4111 1111 1111 1111"])
        app.close()
    behind_prefix.publish("the prefix, and this name", CELERY_CHANNEL)

    message = json.loads(stranger.next().data)
    assert b"4111 1111 1111 1111" in base64.b64decode(message["body"])
    assert nothing.next().data == "the prefix, and this name"
    assert refused.until_end() == []
    restricted.kill()


# ── Containers: there is no registry of images here, so their steps are run without one ─────────────────────────────
#
# Run: RUN, each in order, in an empty folder in place of the image's root, with this machine's Python in place of the
# image's; ENTRYPOINT and HEALTHCHECK, as commands of this machine. Read only: FROM, WORKDIR, COPY (the test copies the
# files), USER, EXPOSE, the times of HEALTHCHECK; and compose.yml, but for the options, which the server's parser takes.


def values_of(name: str) -> list[str]:
    """What stands behind an instruction of the Containerfile, each time that it is there."""
    return re.findall(f"^{name} (.*)$", deployed("Containerfile"), re.MULTILINE)


def test_the_image_has_this_version_for_nobody_in_particular_healthy_by_its_own_check_with_metrics_inside_alone(
    redis_process: kit.RedisProcess, tmp_path: Path
) -> None:
    source, installed = tmp_path / "src", str(tmp_path / "opt")
    source.mkdir()
    port, admin = kit.free_port(), kit.free_port()

    def command_in(text: str) -> list[str]:
        """The command, with paths and ports of this machine."""
        for old, new in {"/opt/ssepush": installed, '"5000"': f'"{port}"', ":9000": f":{admin}"}.items():
            text = text.replace(old, new)
        return [str(word) for word in json.loads(text.replace("0.0.0.0", kit.LOOPBACK))]

    first_copy, second_copy = values_of("COPY")
    for name in first_copy.split()[:-1]:
        shutil.copy(kit.HERE / name, source)
    for step in values_of("RUN"):
        command = step.replace("/opt/ssepush", installed).split()
        subprocess.run(command, check=True, cwd=source, capture_output=True, timeout=120)
    check = command_in(values_of("HEALTHCHECK")[0].partition("CMD ")[2])
    entry = command_in(values_of("ENTRYPOINT")[0])
    with kit.running(*entry, env=kit.environment_with(REDIS_URL=redis_process.url)) as process:
        kit.wait_for(lambda: get(port, "/")[1] == (kit.HERE / "index.html").read_text(), "it serves the page")
        assert run_program(*check).returncode == 0
        assert "ssepush_streams 0" in get(admin, "/metrics")[1]
        assert get(port, "/metrics")[0] == 404
        process.terminate()
        assert process.wait(kit.DEADLINE_S) == 0

    assert run_program(*check).returncode == 1
    assert said_by(entry[0], "--version") == f"ssepush {ssepush.__version__}\n"
    base = "docker.io/library/python:3.13-slim"
    assert values_of("FROM") == [f"{base} AS build", base]
    assert second_copy == "--from=build /opt/ssepush /opt/ssepush"
    assert values_of("USER") == ["65534:65534"]


def test_compose_starts_the_image_beside_a_redis_that_keeps_what_it_has() -> None:
    services = yaml.safe_load(deployed("compose.yml"))["services"]
    ours, beside = services["ssepush"], services["redis"]

    assert ours["build"] == {"context": "..", "dockerfile": "deploy/Containerfile"}
    assert ssepush.command_line().parse_args(ours["command"]).allow_host == ["events.example.org"]
    assert (ours["environment"]["REDIS_URL"], ours["ports"]) == ("redis://redis:6379/0", ["127.0.0.1:5000:5000"])
    assert beside["command"] == ["redis-server", "--appendonly", "yes"]
    assert "ports" not in beside


# ── Alerts and the dashboard ─────────────────────────────────────────────────────────────────────────────────────────


def queries() -> list[str]:
    """The dashboard's, with its variables filled in."""
    panels = json.loads(deployed("grafana.json"))["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    return [query.replace("$__rate_interval", "5m").replace("$instance", ".*") for query in expressions]


def alerts() -> str:
    """The conditions of all alerts."""
    return " ".join(rule["expr"] for rule in yaml.safe_load(deployed("alerts.yml"))["groups"][0]["rules"])


def promtool(*arguments: str | Path, stdin: str = "") -> str:
    """What it prints when it finds nothing wrong."""
    return said_by(kit.needs("promtool"), *arguments, stdin=stdin)


def test_each_alert_fires_alone_when_it_should_and_none_for_a_quiet_server() -> None:
    assert "11 rules found" in promtool("check", "rules", kit.DEPLOY / "alerts.yml")
    promtool("test", "rules", kit.HERE / "tests" / "alerts_test.yml")


@pytest.fixture
def experienced(start: kit.Start, channel: str) -> kit.ServerProcess:
    """A server that has seen of everything something."""
    server = start("--max-streams", "1")
    stream = server.opened(channel)
    server.publish("hi", channel)
    stream.next()
    server.stream(channel).until_end()  # it is full
    server.redis.publish(channel, b"\xff")
    kit.wait_for(lambda: server.dropped("message is not UTF-8"), "a message was dropped")
    stream.close()
    kit.wait_for(lambda: server.streams() == 0, "the stream is closed")
    with server.stream(channel, Last_Event_ID="none of ours") as reset:
        reset.wait(lambda: reset.events, "the reset")
    return server


@contextlib.contextmanager
def prometheus(folder: Path, configuration: dict[str, Any], scraped: int) -> Iterator[Callable[[str], Any]]:
    """Asks the API of a real one, with the deployed alerts, that scrapes a port in place of those configured."""
    configuration["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "300ms")
    for job in configuration["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"{kit.LOOPBACK}:{scraped}"]}]
    shutil.copy(kit.DEPLOY / "alerts.yml", folder)
    file, port = folder / "prometheus.yml", kit.free_port()
    file.write_text(json.dumps(configuration))
    promtool("check", "config", file)

    def asked(path: str) -> Any:
        answer = json.loads(get(port, f"/api/v1/{path}")[1])
        assert answer["status"] == "success", answer
        return answer["data"]

    options = (f"--config.file={file}", f"--storage.tsdb.path={folder}", f"--web.listen-address={kit.LOOPBACK}:{port}")
    with kit.running(kit.needs("prometheus"), *options, stderr=subprocess.DEVNULL):
        kit.wait_for(lambda: get(port, "/-/ready")[0] == 200, "Prometheus is ready")
        yield asked


def test_a_real_prometheus_has_data_for_each_panel_a_first_alert_and_an_address_for_each_probe(
    experienced: kit.ServerProcess, tmp_path: Path
) -> None:
    configuration = yaml.safe_load(deployed("prometheus.yml"))
    jobs = {job["job_name"] for job in configuration["scrape_configs"]}

    with prometheus(tmp_path, configuration, experienced.port) as asked:
        for query in [*queries(), 'ALERTS{alertname="SsepushDropsMessages"}']:
            kit.wait_for(lambda: asked(f"query?query={quote(query)}")["result"], query)  # noqa: B023
        targets = {target["scrapePool"]: target for target in asked("targets")["activeTargets"]}

    probe, instance = targets["ssepush-healthz"], targets["ssepush"]["labels"]["instance"]
    asked_for = quote(f"http://{instance}/healthz", safe="")
    assert probe["scrapeUrl"] == f"http://127.0.0.1:9115/probe?module=http_2xx&target={asked_for}"
    assert probe["labels"]["instance"] == instance
    assert set(re.findall('job="([^"]+)"', alerts())) == jobs


def test_alerts_ask_for_what_is_exported_from_the_start_so_that_the_first_is_an_increase(
    start: kit.Start, experienced: kit.ServerProcess
) -> None:
    fresh, later = (get(server.port, "/metrics")[1] for server in (start(), experienced))
    names = set(re.findall(r"\bssepush_[a-z0-9_]+", " ".join([*queries(), alerts()])))
    waited_for = re.findall(r'(ssepush_\w+){(\w+)=~?"([^"]+)"}', alerts())

    assert names
    assert names <= set(re.findall("^(ssepush_[a-z0-9_]+)", later, re.MULTILINE))
    assert waited_for
    for name, label, values in waited_for:
        for value in values.split("|"):
            assert f'{name}{{{label}="{value}"}} 0\n' in fresh
    assert run_program(kit.needs("promtool"), "check", "metrics", stdin=later).stderr == ""


# ── Upgrading ────────────────────────────────────────────────────────────────────────────────────────────────────────

OF_1_X = "1764000000000-1764000000000000"  # an id, as pages have it that come from there


@kit.both_ways
def test_a_page_that_1_x_has_served_is_reset_once_and_the_keys_of_1_x_are_left_alone(
    start: kit.Start, own_redis: kit.RedisProcess, channel: str
) -> None:
    keys = ("ssepush:counter", f"ssepush:history:{channel}")
    own_redis.client.hset(keys[0], "newest", OF_1_X)
    own_redis.client.xadd(keys[1], {"previous": "", "message": "of 1.x"}, OF_1_X)
    before = [own_redis.client.dump(key) for key in keys]
    server = start(redis=own_redis)

    with server.stream(channel, Last_Event_ID=OF_1_X) as stream:
        reset = stream.next()
        server.publish("one", channel)
        assert stream.next().data == "one"
    with server.stream(channel, Last_Event_ID=reset.id) as stream:
        server.publish("two", channel)
        assert stream.data(2) == ["one", "two"]

    assert (reset.type, reset.json) == ("stream-reset", {"reason": "unknown-id"})
    assert [own_redis.client.dump(key) for key in keys] == before


# ── What the docs show of it ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_docs_build_the_image_as_it_says() -> None:
    assert re.findall("^# +(podman .*)$", deployed("Containerfile"), re.MULTILINE) == shown("podman build").splitlines()


def test_a_password_is_encoded_as_the_docs_say(own_redis: kit.RedisProcess) -> None:
    password = "a/b@c#d?e%f"
    rights: Any = {"keys": ["*"], "channels": ["*"], "categories": ["+@all"]}
    own_redis.client.acl_setuser("guest", enabled=True, passwords=[f"+{password}"], **rights)

    encoded = said_by("sh", "-c", shown_line("import quote"), stdin=password).strip()

    assert ssepush.publish("hi", redis_url=own_redis.url_of("guest", encoded)) == 0
