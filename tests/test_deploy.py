"""What deploy/ holds beside the proxies: systemd, Redis's rights, containers, alerts, the dashboard; and upgrading."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import redis
import yaml

import ssepush
from tests.kit import (
    DEADLINE_S,
    DEPLOY,
    HERE,
    EventStream,
    Page,
    Publisher,
    RedisProcess,
    ServerProcess,
    Start,
    assert_whole,
    both_ways,
    environment_with,
    free_port,
    needs_test_extra,
    program,
    ssepush_command,
    wait_for,
)

pytestmark = needs_test_extra
RELEASES = Path(__file__).parent / "releases"


def get(url: str) -> tuple[int, str]:
    """The status and the body; 0 if nobody is there."""
    try:
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def run_program(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
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


# ── systemd ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that is there."""
    started = tmp_path / "ssepush"
    started.write_text(f'#!/bin/sh\nexec {shlex.join(ssepush_command())} "$@"\n')
    started.chmod(0o755)
    text = (DEPLOY / "ssepush@.service").read_text()
    unit = tmp_path / "ssepush@.service"
    unit.write_text(text.replace("/opt/ssepush/bin/ssepush ", f"{started} "))
    return unit


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    done = run_program(program("systemd-analyze"), "verify", str(unit))

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_systemd_finds_the_unit_hardened(unit: Path) -> None:
    instance = unit.with_name("ssepush@1.service")
    instance.write_text(unit.read_text())
    analyze = [program("systemd-analyze"), "security", "--offline=true", "--threshold=20", "--no-pager"]

    done = run_program(*analyze, str(instance))

    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def command_of(unit: Path, instance: int, port: int, admin: int) -> list[str]:
    """What systemd would run for an instance, but for the ports."""
    command = re.search("^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    assert command
    text = command[1].replace("$SSEPUSH_OPTIONS", "").replace("900%i", str(admin))
    assert "%" not in text, instance
    return shlex.split(text.replace("--port 5000", f"--port {port}"))


def test_two_instances_of_the_unit_share_a_port_and_each_shows_its_own_metrics(
    unit: Path, redis_process: RedisProcess, channel: str
) -> None:
    port = free_port()
    admins = [free_port(), free_port()]
    instances = []
    for number, admin in enumerate(admins, 1):
        command = command_of(unit, number, port, admin)
        environment = environment_with(REDIS_URL=redis_process.url)
        instances.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    try:
        for instance in instances:
            assert instance.stdout
            assert f":{port}/" in instance.stdout.readline()
        streams = [EventStream(port, f"/stream?channel={channel}") for _ in range(12)]
        ssepush.publish("hi", channel=channel, redis_url=redis_process.url)
        assert [stream.next().data for stream in streams] == ["hi"] * 12

        shown = [get(f"http://127.0.0.1:{admin}/metrics")[1] for admin in admins]
        public = [get(f"http://127.0.0.1:{port}{path}")[0] for path in ("/metrics", "/healthz")]
    finally:
        for instance in instances:
            instance.terminate()

    open_streams = [re.findall("^ssepush_streams ([0-9]+)$", text, re.MULTILINE) for text in shown]
    assert sum(int(number) for (number,) in open_streams) == 12
    assert public == [404, 404]
    assert [instance.wait(DEADLINE_S) for instance in instances] == [0, 0]


# ── Redis's rights ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def restricted_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that knows the deployed user."""
    users = tmp_path / "users.acl"
    users.write_text((DEPLOY / "redis.acl").read_text())
    process = RedisProcess(tmp_path, "--aclfile", str(users))
    yield process
    process.kill()


def test_the_channels_of_the_docs_are_those_that_the_deployed_user_may_read(restricted_redis: RedisProcess) -> None:
    rules = (DEPLOY / "redis.acl").read_text().strip()
    for page in ("operations.md", "security.md"):
        named = re.findall(r"^user ssepush .*$", (HERE / "docs" / page).read_text(), re.MULTILINE)
        assert set(named) <= {rules}
    user = redis.Redis.from_url(restricted_redis.url_of("ssepush", "CHANGE-ME"), protocol=2)

    with contextlib.closing(user), contextlib.closing(user.pubsub()) as pubsub:  # type: ignore[no-untyped-call]
        pubsub.subscribe("sse", "sse:news", "private-orders")
        confirmed = [pubsub.get_message(timeout=DEADLINE_S)["type"] for _ in range(3)]
        pubsub.subscribe("orders")

        with pytest.raises(redis.exceptions.NoPermissionError):
            pubsub.get_message(timeout=DEADLINE_S)

    assert confirmed == ["subscribe"] * 3


CELERY_CHANNEL = "/0.celeryev/task.sent"


def task_is_sent(url: str) -> None:
    """An application sends a task to its workers, with an argument that is nobody else's business."""
    from celery import Celery

    app = Celery("shop", broker=url)
    app.conf.task_send_sent_event = True
    app.conf.broker_connection_retry_on_startup = False
    app.send_task("shop.charge", args=["4111 1111 1111 1111"])
    app.close()


def test_strangers_read_the_arguments_of_celerys_tasks_on_a_shared_redis_without_rights(
    start: Start, own_redis: RedisProcess
) -> None:
    server = start(redis=own_redis)
    stranger = server.opened(CELERY_CHANNEL)

    task_is_sent(own_redis.url)

    message = json.loads(stranger.next().data)
    body = base64.b64decode(message["body"]).decode()
    assert "4111 1111 1111 1111" in body


def test_with_the_deployed_rights_strangers_read_nothing_of_celery(
    start: Start, restricted_redis: RedisProcess
) -> None:
    server = start(redis=restricted_redis.url_of("ssepush", "CHANGE-ME"))
    stranger = server.stream(CELERY_CHANNEL)
    reader = server.opened("sse")

    task_is_sent(restricted_redis.url)
    server.publish("for all to see")

    assert stranger.until_end() == []
    assert reader.next().data == "for all to see"


# ── Containers: there is no registry of images here, so their steps are run without one ─────────────────────────────


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's, as `("RUN", "…")`."""
    found = []
    for line in (DEPLOY / "Containerfile").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if name.isupper():
            found.append((name, rest))
    return found


def values_of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_the_image_has_two_stages_is_not_run_by_root_and_copies_what_is_there() -> None:
    base = "docker.io/library/python:3.13-slim"
    assert values_of("FROM") == [f"{base} AS build", base]
    assert values_of("USER") == ["65534:65534"]
    first, second = values_of("COPY")
    assert all((HERE / name).exists() for name in first.split()[:-1])
    assert second == "--from=build /opt/ssepush /opt/ssepush"


def test_the_steps_of_the_build_install_this_version_with_its_page(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()

    def here(text: str) -> str:
        return text.replace("/opt/ssepush", f"{tmp_path}/opt/ssepush")

    copied = values_of("COPY")[0].split()[:-1]
    for name in copied:
        shutil.copy(HERE / name, source)
    for step in values_of("RUN"):
        command = here(step).split()
        subprocess.run(command, check=True, cwd=source, capture_output=True, timeout=120)
    version = run_program(here("/opt/ssepush/bin/ssepush"), "--version")
    measure = "import ssepush; print(len(ssepush.page_and_policy()[0]))"
    page = run_program(here("/opt/ssepush/bin/python3"), "-I", "-c", measure)

    assert version.stdout == f"ssepush {ssepush.__version__}\n"
    assert int(page.stdout) == (HERE / "index.html").stat().st_size


def test_what_the_image_starts_is_healthy_by_its_own_check_and_shows_metrics_inside_alone(
    redis_process: RedisProcess,
) -> None:
    port, admin = free_port(), free_port()
    changes = {
        '"/opt/ssepush/bin/ssepush"': ", ".join(map(json.dumps, ssepush_command())),
        "/opt/ssepush/bin/python3": sys.executable,
        '"5000"': f'"{port}"',
        ":9000": f":{admin}",
        "0.0.0.0": "127.0.0.1",
    }

    def here(words: str) -> list[str]:
        for old, new in changes.items():
            words = words.replace(old, new)
        return [str(word) for word in json.loads(words)]

    health = here(values_of("HEALTHCHECK")[0].partition("CMD ")[2])
    command = here(values_of("ENTRYPOINT")[0])
    environment = environment_with(REDIS_URL=redis_process.url)
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        assert f":{port}/" in server.stdout.readline()
        healthy = run_program(*health).returncode
        _, inside = get(f"http://127.0.0.1:{admin}/metrics")
        outside, _ = get(f"http://127.0.0.1:{port}/metrics")
    finally:
        server.terminate()
    ended = server.wait(DEADLINE_S)
    unhealthy = run_program(*health).returncode

    assert healthy == 0
    assert "ssepush_streams 0" in inside
    assert outside == 404
    assert ended == 0
    assert unhealthy == 1


def test_compose_starts_the_image_beside_a_redis_that_keeps_what_it_has() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    services = compose["services"]
    ours = services["ssepush"]

    assert ours["build"] == {"context": "..", "dockerfile": "deploy/Containerfile"}
    assert services["redis"]["command"] == ["redis-server", "--appendonly", "yes"]
    assert ours["environment"]["REDIS_URL"] == "redis://redis:6379/0"
    assert ours["ports"] == ["127.0.0.1:5000:5000"]
    assert "ports" not in services["redis"]
    # The server's own parser takes the options.
    options = ssepush.command_line().parse_args(ours["command"])
    assert options.allow_host == ["events.example.org"]


# ── Alerts and the dashboard ─────────────────────────────────────────────────────────────────────────────────────────

# The server is about to export these. Whoever adds one takes it from here.


def queries() -> list[str]:
    """The dashboard's, with its variables filled in."""
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [query.replace("$__rate_interval", "5m").replace("$instance", ".*") for query in found]


def test_prometheus_takes_the_alerts() -> None:
    done = run_program(program("promtool"), "check", "rules", str(DEPLOY / "alerts.yml"))

    assert done.returncode == 0, done.stderr
    assert "12 rules found" in done.stdout


def test_each_alert_fires_when_it_should_and_none_for_a_quiet_server() -> None:
    done = run_program(program("promtool"), "test", "rules", str(Path(__file__).parent / "alerts_test.yml"))

    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_each_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:query:{number}", "expr": query} for number, query in enumerate(queries())]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))

    done = run_program(program("promtool"), "check", "rules", str(file))

    assert done.returncode == 0, done.stderr
    assert f"{len(rules)} rules found" in done.stdout


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
        text = server.get("/metrics").body.decode()
    return set(re.findall("^(ssepush_[a-z0-9_]+)", text, re.MULTILINE))


def test_alerts_and_dashboard_ask_for_what_the_server_exports(start: Start, channel: str) -> None:
    exported = exported_by(start("--max-streams", "1"), channel)
    alerts = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    rules = alerts["groups"][0]["rules"]
    asked = " ".join([*queries(), *(rule["expr"] for rule in rules)])
    names = set(re.findall(r"\bssepush_[a-z0-9_]+", asked))

    assert names <= exported
    assert names


def test_prometheus_finds_nothing_wrong_with_the_metrics(start: Start, channel: str) -> None:
    server = start()
    with server.opened(channel) as stream:
        server.publish("hi", channel)
        stream.next()
        text = server.get("/metrics").body.decode()

    done = run_program(program("promtool"), "check", "metrics", stdin=text)

    complaints = [line for line in done.stderr.splitlines() if "no help text" not in line]
    assert complaints == []


# ── Upgrading ────────────────────────────────────────────────────────────────────────────────────────────────────────


class WanderingPage(Page):
    """A page that comes back at another server each time, as behind a proxy."""

    def __init__(self, ports: Sequence[int], *channels: str) -> None:
        self.ports = itertools.cycle(ports)
        super().__init__(next(self.ports), *channels, leave_after=self._move_on)

    def _move_on(self) -> int:
        self.port = next(self.ports)
        return random.randint(1, 30)

    def _read(self, stream: EventStream, number: int) -> None:
        """A stream that ends before it has said an id leaves the page where it was, as in a browser."""
        before = self.last_event_id
        super()._read(stream, number)
        self.last_event_id = self.last_event_id or before


@pytest.fixture
def last_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServerProcess]:
    """Starts a server of the last release."""
    old = tmp_path / "ssepush.py"
    shutil.copy(RELEASES / "ssepush-1.0.0.py", old)
    shutil.copy(HERE / "index.html", tmp_path)

    def start(*options: str, redis: RedisProcess) -> ServerProcess:
        with monkeypatch.context() as patched:
            patched.setattr("tests.kit.ssepush_command", lambda *more: [sys.executable, str(old), *more])
            return ServerProcess(redis, *options)

    return start


@both_ways
def test_pages_that_move_between_the_last_release_and_this_one_miss_nothing_and_get_nothing_twice(
    start: Start,
    last_release: Callable[..., ServerProcess],
    own_redis: RedisProcess,
    way: tuple[str, ...],
    channel: str,
) -> None:
    history = ("--history", "10000")
    old = last_release(*way, *history, redis=own_redis)
    new = start(*history, redis=own_redis)
    assert old.said("ssepush 1.0.0 serves")
    channels = [f"{channel}-a", f"{channel}-b"]
    ports = [old.port, new.port]

    def publish(data: str) -> None:
        ssepush.publish(data, channel=channels[0], redis_url=own_redis.url, history=10000)

    pages = [WanderingPage(order, *channels) for order in ([old.port, new.port], [new.port, old.port]) * 3]
    wait_for(lambda: all(page.streams for page in pages), "all pages are open")
    # Whoever has no position yet has nothing to come back with.
    publish("last")
    wait_for(lambda: all(page.events for page in pages), "all pages have a position")

    publishers = [Publisher(port, f"by {port}", *channels, pause=0.004) for port in ports]
    wait_for(lambda: min(page.streams for page in pages) > 12, "each page has moved a dozen times")
    for publisher in publishers:
        publisher.stop()
    publish("last")
    for page in pages:
        page.wait_for("last")
    old.end()

    for page in pages:
        assert not [event for event in page.events if event.type == "stream-reset"]
        assert_whole(page, publishers)


# ── What the docs show ───────────────────────────────────────────────────────────────────────────────────────────────


def blocks(page: str, language: str) -> list[str]:
    """The code that a page of the docs shows."""
    text = (HERE / "docs" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def the_block(page: str, holds: str, language: str = "sh") -> str:
    """The one of them that holds this."""
    (block,) = [block for block in blocks(page, language) if holds in block]
    return block


def settings_of(text: str) -> list[str]:
    """A configuration without comments, indentation and empty lines."""
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def test_the_docs_show_what_the_deployed_nginx_has() -> None:
    (shown,) = blocks("operations.md", "nginx")
    deployed = settings_of((DEPLOY / "nginx.conf").read_text())
    start = deployed.index("proxy_http_version 1.1;")

    assert deployed[start:-1] == settings_of(shown)


def test_prometheus_takes_the_configuration_that_the_docs_show(tmp_path: Path) -> None:
    (shown,) = blocks("operations.md", "yaml")
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    (tmp_path / "prometheus.yml").write_text(shown)

    done = run_program(program("promtool"), "check", "config", str(tmp_path / "prometheus.yml"))

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_server_takes_the_options_that_the_docs_give_to_systemd() -> None:
    shown = the_block("operations.md", "SSEPUSH_OPTIONS")
    (given,) = re.findall("^SSEPUSH_OPTIONS=(.*)$", shown, re.MULTILINE)

    options = ssepush.command_line().parse_args(given.split())

    assert options.allow_host == ["events.example.org"]
    assert options.allow_origin == ["https://www.example.org"]
    assert "EnvironmentFile=-/etc/ssepush.env" in (DEPLOY / "ssepush@.service").read_text()


def test_a_password_is_encoded_as_the_docs_say(start: Start, tmp_path: Path) -> None:
    password = "a/b@c#d?e%f"
    encoded = run_program("sh", "-c", the_block("operations.md", "quote"), stdin=password).stdout.strip()
    guarded = RedisProcess(tmp_path)
    guarded.client.execute_command("ACL", "SETUSER", "guest", "on", f">{password}", "allkeys", "allchannels", "+@all")  # type: ignore[no-untyped-call]

    reached = ssepush.publish("hi", redis_url=guarded.url_of("guest", encoded))
    guarded.kill()

    assert reached == 0


def test_a_token_is_made_as_the_docs_say(start: Start) -> None:
    command = the_block("security.md", "sign private-7")
    token, secret = run_program("sh", "-c", f"{command}\necho $SSEPUSH_SECRET").stdout.split()
    server = start(SSEPUSH_SECRET=secret)

    with server.stream("private-7", query=f"token={token}") as stream:
        assert stream.status == 200
    with server.stream("private-8", query=f"token={token}") as stream:
        assert stream.status == 403


def test_the_docs_warn_of_the_channel_on_which_celery_tells_all() -> None:
    assert f"channel={CELERY_CHANNEL}" in the_block("security.md", "celeryev")


def test_the_docs_build_the_image_as_the_containerfile_says() -> None:
    shown = the_block("operations.md", "podman build").splitlines()

    said = (DEPLOY / "Containerfile").read_text()
    assert re.findall("^# +(podman .*)$", said, re.MULTILINE) == shown


def test_what_the_docs_say_of_the_log_is_what_it_says(start: Start) -> None:
    server = start()
    stream = server.opened("orders", "sse")
    server.redis.publish("sse", b"\xff")
    wait_for(lambda: server.said("dropped"), "what was dropped is in the log")
    stream.close()
    wait_for(lambda: server.said("closed:"), "so is the end of the stream")
    shown = the_block("operations.md", "stream 1 open", "")

    def shape(text: str) -> set[str]:
        lines = [re.sub(r"^\S+ \S+ |[0-9.,]+", "", line) for line in text.splitlines()]
        return {line for line in lines if line.startswith(("INFO", "WARNING"))}

    assert shape(shown) <= shape(server.output)
