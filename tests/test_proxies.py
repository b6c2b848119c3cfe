"""Each recipe of deploy/ with the real proxy, a server behind it that comes and goes, browsers in front; and check.py.

deploy/check.py is asked about proxies that have one fault each, and about good ones.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import re
import signal
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import pytest

import ssepush
from tests import kit
from tests.browser import Browser, QuietHandler, Site, chrome, firefox
from tests.proxies import Change, Proxy, proxies_before
from tests.test_docs import shown

pytestmark = kit.needs_test_extra
SECRET = "a secret of the tests that is long enough"
TOKEN = "a token of the tests"
ORIGIN = "https://www.example.org"
HEARTBEAT_S = 1


class Deployment:
    """A server with every proxy before it. It can be away, and comes back where it was."""

    def __init__(self, redis: kit.RedisProcess, port: int) -> None:
        self.redis = redis
        self.port = port
        self.start()

    def start(self) -> None:
        options = (f"--heartbeat={HEARTBEAT_S}", "--retry=300", "--drain=0.5")
        self.server = kit.ServerProcess(self.redis, *options, port=self.port, SSEPUSH_SECRET=SECRET)

    @contextlib.contextmanager
    def away(self, number: signal.Signals = signal.SIGTERM) -> Iterator[None]:
        """Ended by a signal, and back at the end."""
        self.server.signal(number)
        self.server.process.wait(kit.DEADLINE_S)
        try:
            yield
        finally:
            self.start()


@pytest.fixture(scope="module")
def proxies() -> Iterator[dict[str, Proxy]]:
    """All of them, before a port."""
    with proxies_before(kit.free_port()) as proxies:
        yield proxies


@pytest.fixture
def deployment(redis_process: kit.RedisProcess, proxies: dict[str, Proxy]) -> Iterator[Deployment]:
    """A server at that port, once all pass on what is for it: some leave it alone for a moment after it was away."""
    deployment = Deployment(redis_process, proxies["nginx"].upstream)
    for proxy in proxies.values():
        kit.wait_for(lambda: ask(proxy, "GET", "/")[0] == 200, f"{proxy.recipe} passes it on")  # noqa: B023
    yield deployment
    deployment.server.end()


def connection_to(proxy: Proxy) -> http.client.HTTPConnection:
    """A connection over HTTP/1.1, which checks the certificate where there is one."""
    if proxy.scheme == "http":
        return http.client.HTTPConnection(kit.LOOPBACK, proxy.port, timeout=kit.DEADLINE_S)
    trusting = ssl.create_default_context(cafile=proxy.certificate)
    return http.client.HTTPSConnection(kit.LOOPBACK, proxy.port, timeout=kit.DEADLINE_S, context=trusting)


def ask(
    proxy: Proxy, method: str, path: str, body: str | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """The status, the header and the body that come."""
    with contextlib.closing(connection_to(proxy)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def status_of_publish(proxy: Proxy, **headers: str) -> int:
    return ask(proxy, "POST", "/publish", '{"data": 1}', **kit.JSON, **headers)[0]


class ProxiedStream:
    """A stream as it comes out of a proxy."""

    def __init__(self, proxy: Proxy, channel: str) -> None:
        self.connection = connection_to(proxy)
        self.connection.request("GET", f"/stream?channel={channel}")
        self.response = self.connection.getresponse()
        assert self.response.status == 200
        self.parser = kit.Parser()

    def read_until(self, condition: Callable[[kit.Parser], object]) -> None:
        while not condition(self.parser):
            chunk = self.response.read1(65536)
            assert chunk, "the stream ended"
            self.parser.feed(chunk)

    def close(self) -> None:
        self.response.close()
        self.connection.close()


# ── Streams behind each proxy ────────────────────────────────────────────────────────────────────────────────────────


def test_events_pass_each_proxy_at_once(deployment: Deployment, proxies: dict[str, Proxy], channel: str) -> None:
    slow: dict[str, float] = {}

    for name, proxy in proxies.items():
        stream = ProxiedStream(proxy, channel)
        stream.read_until(lambda parser: parser.retry_ms)
        delays = []
        for number in range(7):
            data = f"{name} {number}"
            deployment.server.publish(data, channel)
            published = time.monotonic()
            stream.read_until(lambda parser: parser.events[-1:] and parser.events[-1].data == data)  # noqa: B023
            delays.append(time.monotonic() - published)
        stream.close()
        if statistics.median(delays) > 0.1:
            slow[name] = statistics.median(delays)

    assert slow == {}


# After how many heartbeats each notices that a page was closed, as the docs say.
NOTICES_AFTER = {"nginx": 0, "Caddy": 0, "lighttpd": 1, "haproxy": 2, "Apache": 2, "Varnish": 3}


def beats(parser: kit.Parser) -> int:
    """How many heartbeats have come; the first position is that of the beginning."""
    return sum(event.type == "stream-position" for event in parser.events) - 1


def test_a_closed_page_is_noticed_behind_each_proxy_within_its_number_of_heartbeats(
    deployment: Deployment, proxies: dict[str, Proxy], channel: str
) -> None:
    """Counted by the heartbeats of another stream, each of which comes halfway between two of theirs."""
    channels = {name: f"{channel}-{name}" for name in proxies}
    streams = [ProxiedStream(proxy, channels[name]) for name, proxy in proxies.items()]
    time.sleep(HEARTBEAT_S / 2)
    witness = deployment.server.opened(channel)
    for stream in streams:
        stream.read_until(lambda parser: beats(parser) == 2)  # they come one by one
    for name in channels.values():
        assert deployment.redis.subscribers(name) == 1
    witness.wait(lambda: beats(witness.parser) >= 1, "the one between them")

    before = beats(witness.parser)
    for stream in streams:
        stream.close()
    late = []
    for number in range(4):
        witness.wait(lambda: beats(witness.parser) > before + number, "a heartbeat")  # noqa: B023
        due = [name for name, most in NOTICES_AFTER.items() if most == number]
        late += [name for name in due if deployment.redis.subscribers(channels[name])]
    witness.close()

    assert late == []


def test_what_is_not_for_strangers_is_closed_at_each_proxy(proxies: dict[str, Proxy]) -> None:
    for name, proxy in proxies.items():
        for path in ("/notifications", "/metrics", "/healthz"):
            assert ask(proxy, "GET", path)[0] == 403, name
        assert status_of_publish(proxy) == 403, name


def test_each_proxy_adds_a_header_by_which_a_request_is_known_not_to_be_of_this_machine(
    deployment: Deployment, proxies: dict[str, Proxy]
) -> None:
    seen: dict[str, Any] = {}

    class Recorder(QuietHandler):
        def do_GET(self) -> None:
            seen[self.path] = self.headers
            self.answer(200)

    def passes_on(proxy: Proxy) -> bool:
        return ask(proxy, "GET", f"/{proxy.recipe}")[0] == 200

    with deployment.away(), http.server.ThreadingHTTPServer((kit.LOOPBACK, deployment.port), Recorder) as recorder:
        threading.Thread(target=recorder.serve_forever, daemon=True).start()
        for proxy in proxies.values():  # some leave a server alone for a moment after it was away
            kit.wait_for(lambda: passes_on(proxy), f"{proxy.recipe} passes it on")  # noqa: B023
        recorder.shutdown()

    for proxy in proxies.values():
        headers = seen[f"/{proxy.recipe}"]
        assert headers["X-Forwarded-For"] == "127.0.0.1"
        assert headers["Host"] == f"127.0.0.1:{proxy.port}"


def test_while_ssepush_is_away_each_proxy_tells_streams_and_nothing_else_to_come_back(
    deployment: Deployment, proxies: dict[str, Proxy]
) -> None:
    with deployment.away():
        answers = {name: ask(proxy, "GET", "/stream?channel=a", Origin=ORIGIN) for name, proxy in proxies.items()}
        others = {name: ask(proxy, "GET", "/")[0] for name, proxy in proxies.items()}

    for name, (status, fields, body) in answers.items():
        assert (status, body) == (200, b"retry: 2000\n\n"), name
        assert fields.get_all("Content-Type") == ["text/event-stream"]
        assert fields.get_all("Cache-Control") == ["no-store"]
        # lighttpd cannot say whose page asked, and browsers take "*" for no page that sends credentials.
        is_named = name != "lighttpd"
        assert fields.get_all("Access-Control-Allow-Origin") == ([ORIGIN] if is_named else ["*"])
        assert fields.get_all("Access-Control-Allow-Credentials") == (["true"] if is_named else None)
        assert others[name] in (502, 503)


def test_no_log_of_a_proxy_shows_a_token(deployment: Deployment, proxies: dict[str, Proxy]) -> None:
    token = ssepush.sign("private-log", ttl=60, secret=SECRET)
    path = f"/stream?channel=private-log&token={quote(token)}"

    for proxy in proxies.values():
        assert ask(proxy, "HEAD", path)[0] == 200
    with deployment.away():
        for proxy in proxies.values():
            ask(proxy, "GET", path)
    for name in ("nginx", "Apache"):
        kit.wait_for(lambda: proxies[name].logs().count("/stream") >= 2, f"{name} has logged both")  # noqa: B023

    for name, proxy in proxies.items():
        assert token not in proxy.logs(), name


def test_whose_page_may_publish_through_nginx_is_known_by_its_origin(start: kit.Start) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    server = start(SSEPUSH_PUBLISH_TOKEN=TOKEN)
    with proxies_before(server.port, "nginx", changes=[("publish|", "")]) as before:
        proxy = before["nginx"]

        assert status_of_publish(proxy, **bearer, Origin=proxy.url) == 200
        assert status_of_publish(proxy, **bearer, Origin=f"https://{kit.LOOPBACK}") == 403
        assert status_of_publish(proxy, **bearer, Origin="https://evil.example") == 403
        assert status_of_publish(proxy, Origin=proxy.url) == 401


# ── In browsers ──────────────────────────────────────────────────────────────────────────────────────────────────────

PAGE = """<!doctype html><meta charset="utf-8"><title>streams</title><script>
window.seen = {};
for (const url of new URLSearchParams(location.search).getAll("stream")) {
  const source = new EventSource(url);
  seen[url] = [];
  source.onmessage = (event) => seen[url].push(event.data);
  source.addEventListener("stream-reset", () => seen[url].push("reset"));
}
</script>"""


def test_a_server_that_is_away_for_a_moment_or_for_long_loses_no_event_in_any_browser_behind_any_proxy(
    deployment: Deployment,
    proxies: dict[str, Proxy],
    channel: str,
    tmp_path: Path,
) -> None:
    """And over HTTP/2 a page may have more than the six streams of HTTP/1.1: there are eight behind nginx."""
    streams = {(name, 1): f"{proxy.url}/stream?channel={channel}" for name, proxy in proxies.items()}
    streams |= {("nginx", number): f"{streams['nginx', 1]}&n={number}" for number in range(2, 9)}
    published: list[str] = []

    def publish(number: int) -> None:
        for _ in range(number):
            published.append(f"event {len(published)}")
            ssepush.publish(published[-1], channel=channel, redis_url=deployment.redis.url)

    with Site({"/": lambda: PAGE}) as page, contextlib.ExitStack() as stack:
        browsers: dict[str, Browser] = {
            "Chromium": stack.enter_context(chrome(tmp_path / "chromium", trusts_all=True)),
            "Firefox": stack.enter_context(firefox(tmp_path, trusts_all=True)),
        }
        for browser in browsers.values():
            browser.get(f"{page.url}/?{urlencode([('stream', url) for url in streams.values()])}")
        deployment.redis.wait_for_subscribers(channel, 2 * len(streams))

        def seen() -> dict[tuple[str, tuple[str, int]], list[str]]:
            """What has come, by browser and stream."""
            data = {name: browser.execute_script("return seen") for name, browser in browsers.items()}
            return {(name, stream): data[name][url] for name in browsers for stream, url in streams.items()}

        def wait_for_all(seconds: float) -> None:
            """As long at most: what is missing is shown at the end."""
            with contextlib.suppress(AssertionError):
                kit.wait_for(lambda: all(len(data) >= len(published) for data in seen().values()), "all", seconds)

        publish(3)
        wait_for_all(kit.DEADLINE_S)
        for away_s, how in [(1.5, signal.SIGKILL), (10.0, signal.SIGTERM)]:
            with deployment.away(how):
                publish(5)
                time.sleep(away_s)
                publish(5)
            wait_for_all(12)
            publish(3)
            wait_for_all(5)

        assert seen() == dict.fromkeys(seen(), published)


# ── check.py ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CHECK = str(kit.DEPLOY / "check.py")
WAIT_S = 12
SERVERS = {
    "usual": ("--heartbeat", "1"),
    "slow": ("--heartbeat", "4"),
    "token": ("--heartbeat", "1"),
    "other origin": ("--heartbeat", "1", "--allow-origin", "https://a.example"),
    "other host": ("--heartbeat", "1", "--host", "0.0.0.0", "--allow-host", "events.example.org"),
}
TOKENS = {"token": TOKEN}


class Case(NamedTuple):
    """A proxy, its fault, and what is to be said of it."""

    proxy: str
    changes: Sequence[Change] = ()
    says: str = ""  # of each fault in turn, between bars
    server: str = "usual"
    names: str = "IP:127.0.0.1,IP:0.0.0.0,DNS:localhost"
    days: int = 90
    token: str = ""
    is_trusted: bool = True
    scheme: str = "https"
    host: str = "127.0.0.1"


def swap(old: str, new: str = "") -> list[Change]:
    return [(old, new)]


def adding(mark: str) -> Callable[[str], list[Change]]:
    """What adds a directive behind this line of a recipe."""
    return lambda directive: swap(mark, f"{mark}\n {directive}")


nginx = adding("location = /stream {")
haproxy = adding("option forwardfor")
apache = adding("ProxyPreserveHost On")
ALLOW = "Access-Control-Allow-Origin"
GZIP = nginx("gzip on; gzip_types *; gzip_proxied any; gzip_min_length 0;")
OLD_HTTP = swap('proxy_http_version 1.1;\n    proxy_set_header Connection "";')
PUBLISH = swap("publish|")
HAPROXY_PUBLISH = swap("path /publish ", "path ")
NO_HEADER = swap("proxy_set_header X-Forwarded-For $remote_addr;")
FORGED = [*PUBLISH, *NO_HEADER, *nginx("proxy_set_header Host localhost;")]
NO_LOCALHOST = swap("location / {", "if ($host = localhost) { return 403; }\nlocation / {")

CASES: dict[str, Case] = {
    "nginx": Case("nginx"),
    "haproxy": Case("haproxy"),
    "Apache": Case("Apache"),
    "Caddy": Case("Caddy"),
    "lighttpd": Case("lighttpd"),
    "nginx, with a token": Case("nginx", PUBLISH, server="token"),
    "haproxy, with a token": Case("haproxy", HAPROXY_PUBLISH, server="token"),
    "nginx that compresses": Case("nginx", [*GZIP, *PUBLISH], server="token"),
    "nginx that compresses over HTTP/1.0": Case("nginx", [*OLD_HTTP, *GZIP, *PUBLISH], server="token"),
    "Apache that compresses": Case("Apache", apache("SetOutputFilter DEFLATE")),
    "heartbeats within the read timeout": Case("nginx", swap("proxy_read_timeout 60s", "proxy_read_timeout 2s")),
    "nginx buffers": Case("nginx", nginx("proxy_ignore_headers X-Accel-Buffering;"), "proxy_buffering off"),
    "lighttpd buffers": Case("lighttpd", swap("server.stream-response-body = 2"), "stream-response-body"),
    "Varnish compresses": Case(
        "Varnish", swap("do_stream = true;", "do_gzip = true;"), "http: everyone|uncompressed", scheme="http"
    ),
    "nginx's read timeout": Case("nginx", swap("read_timeout 60s", "read_timeout 2s"), "of silence", "slow"),
    "haproxy's read timeout": Case("haproxy", swap("server 60s", "server 2s"), "of silence", "slow"),
    "nginx drops Last-Event-ID": Case(
        "nginx", swap("proxy_read_timeout", 'proxy_set_header Last-Event-ID "";\n proxy_read_timeout'), "Last-Event-ID"
    ),
    "nginx hides the origin": Case("nginx", nginx(f"proxy_hide_header {ALLOW};"), "is nothing"),
    "nginx adds the origin": Case("nginx", nginx(f"add_header {ALLOW} *;"), "comes twice"),
    "haproxy says another origin": Case(
        "haproxy", haproxy(f"http-response set-header {ALLOW} https://a.example"), "is https://a.example"
    ),
    "ssepush allows another origin": Case("nginx", (), f"--allow-origin {ORIGIN}", "other origin"),
    "ssepush allows another host": Case("haproxy", (), "--allow-host 127.0.0.1", "other host"),
    "nginx passes another host": Case("nginx", swap("$http_host", "ssepush.internal"), "for Host ssepush.internal"),
    "Apache passes another host": Case(
        "Apache", swap("ProxyPreserveHost On"), "for Host 127.0.0.1", "other host", host="localhost"
    ),
    "nginx speaks HTTP/1.1 alone": Case("nginx", swap("ssl http2", "ssl"), "HTTP/1.1 only"),
    "metrics are open at nginx": Case("nginx", swap("metrics|"), "read /metrics"),
    "healthz is open at haproxy": Case("haproxy", swap("/metrics /healthz", "/metrics"), "read /healthz"),
    "whoever claims to be local may publish": Case("nginx", [*PUBLISH, *NO_HEADER], "strangers may publish"),
    "whoever claims to ask for localhost may publish": Case("nginx", FORGED, "ask for localhost", host="0.0.0.0"),
    "whoever claims to ask for 127.0.0.1 may publish": Case(
        "nginx", [*FORGED, *NO_LOCALHOST], "ask for 127.0.0.1", host="0.0.0.0"
    ),
    "the certificate is for another name": Case("nginx", (), "refuse the certificate", names="DNS:other.example"),
    "nobody knows the certificate": Case("haproxy", (), "refuse the certificate", is_trusted=False),
    "the certificate expires": Case("Apache", (), "expires in", days=3),
    "the clock is wrong": Case(
        "haproxy", haproxy('http-response set-header Date "Sat, 01 Jan 2022 00:00:00 GMT"'), "s apart"
    ),
    "haproxy waits for more": Case(
        "haproxy",
        [*HAPROXY_PUBLISH, ("option http-no-delay", ""), ("bind :443 ssl crt", "bind :443 #")],
        "http: everyone|http-no-delay",
        scheme="http",
        server="token",
    ),
    "the token is another": Case("nginx", PUBLISH, "token is refused", "token", token="not this one"),
    "a 502 while ssepush is away": Case("nginx", swap("error_page 502 503 504 = @away;"), "answers 502", "away"),
    "a 503 while ssepush is away": Case(
        "haproxy", swap("http-after-response set-status 200 if away"), "answers 503", "away"
    ),
    "ssepush is away": Case("nginx", (), "ssepush is away", "away"),
}


def checking(proxy: Proxy, case: Case) -> subprocess.Popen[str]:
    """check.py, asked about a proxy."""
    trusted = {"SSL_CERT_FILE": str(proxy.certificate)} if case.is_trusted else {}
    # A channel of its own, or what is published for one case would break the silence of another.
    options = ["--origin", ORIGIN, "--wait", str(WAIT_S), "--channel", f"sse:check-{proxy.port}"]
    token = ["--token", case.token or TOKEN] if case.server == "token" else []
    command = [sys.executable, CHECK, f"{case.scheme}://{case.host}:{proxy.port}", *options, *token]
    environment = kit.environment_with(**trusted)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.fixture
def reports(start: kit.Start) -> dict[str, tuple[int, str]]:
    """The exit status of check.py, and what it says, in each case; all are asked about side by side."""
    ports = {
        name: start(*options, SSEPUSH_PUBLISH_TOKEN=TOKENS.get(name, "")).port for name, options in SERVERS.items()
    }
    ports["away"] = kit.free_port()
    with contextlib.ExitStack() as stack:
        before: dict[str, Proxy] = {}
        for name, case in CASES.items():
            proxy = Proxy(case.proxy, ports[case.server], case.changes, case.names, case.days)
            before[name] = stack.enter_context(proxy)
        for name, proxy in before.items():
            kit.wait_for(proxy.is_up, f"the proxy listens: {name}")
        asked = {name: checking(before[name], case) for name, case in CASES.items()}
        said = {name: process.communicate(timeout=60)[0] for name, process in asked.items()}
        return {name: (process.returncode, said[name]) for name, process in asked.items()}


def shape(report: str) -> list[str]:
    """A report without what differs each time."""
    return [re.sub("[0-9.]+ (days|s)", r"N \1", line) for line in report.splitlines()]


def test_each_fault_is_named_with_its_fix_and_no_other(reports: Mapping[str, tuple[int, str]]) -> None:
    mistaken = []

    for name, (status, said) in reports.items():
        case = CASES[name]
        faults = [line for line in said.splitlines() if line.startswith("WRONG")]
        says = case.says.split("|") if case.says else []
        is_right = status == bool(says) and len(faults) == len(says)
        is_right = is_right and all(part in line and ". Fix: " in line for part, line in zip(says, faults, strict=True))
        if not says:
            is_right = is_right and "a silent stream stays open" in said
            is_right = is_right and ("an event takes" in said) == (case.server == "token")
        if not is_right:
            mistaken.append(f"{name}: {status}\n{said}")

    assert not mistaken, "\n".join(mistaken)
    assert shape(shown("WRONG Last-Event-ID")) == shape(reports["nginx drops Last-Event-ID"][1])


HOST = "https://events.example.org"
WRONG_ARGUMENTS = ("", "events.example.org", "ftp://events.example.org", "--nonsense", "--wait 0", "--origin www.a.org")


@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS)
def test_what_cannot_be_understood_ends_with_status_2(wrong: str) -> None:
    url = [HOST] if wrong.startswith("--") else []

    done = subprocess.run([sys.executable, CHECK, *url, *wrong.split()], capture_output=True, text=True)

    assert done.returncode == 2
    assert "usage" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_where_nobody_is_has_a_fault() -> None:
    done = subprocess.run(
        [sys.executable, CHECK, f"https://{kit.LOOPBACK}:{kit.free_port()}"], capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (1, "")
    assert "Connection refused" in done.stdout
