"""deploy/check.py, asked about proxies that have one fault each, and about good ones."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest

from tests.kit import DEPLOY, HERE, RedisProcess, ServerProcess, environment_with, free_port, needs_test_extra
from tests.proxies import PROXIES, Change, Proxy, open_folder

pytestmark = needs_test_extra
CHECK = str(DEPLOY / "check.py")
TOKEN = "a token of the tests"
WAIT_S = 12
ORIGIN = "https://www.example.org"


class Case(NamedTuple):
    """A proxy, its fault, and what is to be said of it."""

    proxy: str
    changes: Sequence[Change] = ()
    says: Sequence[str] = ()  # what each line holds that tells of a fault
    server: str = "usual"
    names: str = "IP:127.0.0.1,DNS:localhost"
    days: int = 90
    options: Sequence[str] = ("--origin", ORIGIN)
    is_trusted: bool = True
    scheme: str = "https"
    host: str = "127.0.0.1"


NGINX_LOCATION = "location = /stream {"
HAPROXY_FRONTEND = "option forwardfor"
APACHE_HOST = "ProxyPreserveHost On"
NGINX_LIST = "(publish|notifications|metrics|healthz)"
HAPROXY_DENIES = "http-request deny if { path /publish /notifications /metrics /healthz }"
HAPROXY_PLAIN = ("bind :443 ssl crt", "bind :443 #")
NGINX_OPEN = [
    ("publish|", ""),
    ("proxy_set_header X-Forwarded-For $remote_addr;", ""),
    (NGINX_LOCATION, f"{NGINX_LOCATION} proxy_set_header Host localhost;"),
]
AND_TOKEN = ("--origin", ORIGIN, "--token", TOKEN)

GOOD = {
    "nginx": Case("nginx"),
    "haproxy": Case("haproxy"),
    "Apache": Case("Apache"),
    "Caddy": Case("Caddy"),
    "lighttpd": Case("lighttpd"),
    "nginx, with a token": Case("nginx", [("publish|", "")], server="token", options=AND_TOKEN),
    "haproxy, with a token": Case("haproxy", [("path /publish ", "path ")], server="token", options=AND_TOKEN),
    "nginx that compresses": Case(
        "nginx", [(NGINX_LOCATION, f"gzip on; gzip_types *; gzip_proxied any; {NGINX_LOCATION}")]
    ),
    "Apache that compresses": Case("Apache", [(APACHE_HOST, f"{APACHE_HOST}\nSetOutputFilter DEFLATE")]),
}

FAULTS = {
    "nginx buffers": Case(
        "nginx",
        [(NGINX_LOCATION, f"{NGINX_LOCATION} proxy_ignore_headers X-Accel-Buffering;")],
        ["proxy_buffering off"],
    ),
    "lighttpd buffers": Case("lighttpd", [("server.stream-response-body = 2", "")], ["stream-response-body"]),
    "Varnish compresses": Case(
        "Varnish",
        [("beresp.do_stream = true;", "beresp.do_gzip = true;")],
        ["http: everyone", "uncompressed"],
        scheme="http",
    ),
    "nginx's read timeout": Case(
        "nginx", [("proxy_read_timeout 60s", "proxy_read_timeout 2s")], ["of silence"], server="slow"
    ),
    "haproxy's read timeout": Case(
        "haproxy", [("timeout server 60s", "timeout server 2s")], ["of silence"], server="slow"
    ),
    "Apache's read timeout": Case("Apache", [("ProxyTimeout 60", "ProxyTimeout 2")], ["of silence"], server="slow"),
    "nginx drops Last-Event-ID": Case(
        "nginx",
        [("proxy_read_timeout", 'proxy_set_header Last-Event-ID "";\n proxy_read_timeout')],
        ["Last-Event-ID does not reach"],
    ),
    "haproxy drops Last-Event-ID": Case(
        "haproxy",
        [(HAPROXY_FRONTEND, f"{HAPROXY_FRONTEND}\n http-request del-header Last-Event-ID")],
        ["Last-Event-ID does not reach"],
    ),
    "Apache drops Last-Event-ID": Case(
        "Apache",
        [(APACHE_HOST, f"{APACHE_HOST}\nRequestHeader unset Last-Event-ID")],
        ["Last-Event-ID does not reach"],
    ),
    "nginx hides the origin": Case(
        "nginx",
        [(NGINX_LOCATION, f"{NGINX_LOCATION} proxy_hide_header Access-Control-Allow-Origin;")],
        ["Access-Control-Allow-Origin is nothing"],
    ),
    "nginx adds the origin": Case(
        "nginx",
        [(NGINX_LOCATION, f"{NGINX_LOCATION} add_header Access-Control-Allow-Origin *;")],
        ["comes twice"],
    ),
    "haproxy says another origin": Case(
        "haproxy",
        [
            (
                HAPROXY_FRONTEND,
                f"{HAPROXY_FRONTEND}\n http-response set-header Access-Control-Allow-Origin https://a.example",
            )
        ],
        ["is https://a.example"],
    ),
    "Apache adds the origin": Case(
        "Apache",
        [(APACHE_HOST, f"{APACHE_HOST}\nHeader add Access-Control-Allow-Origin *")],
        ["comes twice"],
    ),
    "ssepush allows another origin": Case("nginx", says=[f"--allow-origin {ORIGIN}"], server="other origin"),
    "ssepush allows another host": Case("haproxy", says=["--allow-host 127.0.0.1"], server="other host"),
    "nginx passes another host": Case(
        "nginx",
        [("proxy_set_header Host $http_host", "proxy_set_header Host ssepush.internal")],
        ["asks ssepush for Host ssepush.internal"],
    ),
    "Apache passes another host": Case(
        "Apache", [(APACHE_HOST, "")], ["asks ssepush for Host 127.0.0.1"], server="other host", host="localhost"
    ),
    "nginx speaks HTTP/1.1 alone": Case("nginx", [("ssl http2", "ssl")], ["HTTP/1.1 only"]),
    "haproxy speaks HTTP/1.1 alone": Case("haproxy", [("alpn h2,http/1.1", "alpn http/1.1")], ["HTTP/1.1 only"]),
    "Apache speaks HTTP/1.1 alone": Case(
        "Apache", [("Protocols h2 http/1.1", "Protocols http/1.1")], ["HTTP/1.1 only"]
    ),
    "metrics are open": Case("nginx", [(NGINX_LIST, "(publish|notifications|healthz)")], ["read /metrics"]),
    "healthz is open": Case("haproxy", [("/metrics /healthz", "/metrics")], ["read /healthz"]),
    "metrics are open at haproxy": Case("haproxy", [("/metrics /healthz", "/healthz")], ["read /metrics"]),
    "healthz is open at nginx": Case("nginx", [(NGINX_LIST, "(publish|notifications|metrics)")], ["read /healthz"]),
    "metrics are open at Apache": Case("Apache", [("metrics|", "")], ["read /metrics"]),
    "whoever claims to be local may publish": Case(
        "nginx",
        [("publish|", ""), ("proxy_set_header X-Forwarded-For $remote_addr;", "")],
        ["strangers may publish"],
    ),
    "whoever claims to ask for localhost may publish": Case(
        "nginx",
        NGINX_OPEN,
        ["publish if they claim to ask for localhost"],
        names="IP:0.0.0.0",
        host="0.0.0.0",
    ),
    "whoever claims to ask for 127.0.0.1 may publish": Case(
        "nginx",
        [*NGINX_OPEN, ("location / {", "if ($host = localhost) { return 403; }\nlocation / {")],
        ["publish if they claim to ask for 127.0.0.1"],
        names="IP:0.0.0.0",
        host="0.0.0.0",
    ),
    "the certificate is for another name": Case("nginx", says=["refuse the certificate"], names="DNS:other.example"),
    "nobody knows the certificate": Case("haproxy", says=["refuse the certificate"], is_trusted=False),
    "the certificate expires": Case("Apache", says=["expires in"], days=3),
    "the clock is wrong": Case(
        "haproxy",
        [(HAPROXY_FRONTEND, f'{HAPROXY_FRONTEND}\n http-response set-header Date "Sat, 01 Jan 2022 00:00:00 GMT"')],
        ["s apart"],
    ),
    "haproxy waits for more": Case(
        "haproxy",
        [("path /publish ", "path "), ("option http-no-delay", ""), HAPROXY_PLAIN],
        ["http: everyone", "http-no-delay"],
        server="token",
        options=AND_TOKEN,
        scheme="http",
    ),
    "the token is another": Case(
        "nginx", [("publish|", "")], ["token is refused"], server="token", options=("--token", "not this one")
    ),
    "a 502 while ssepush is away": Case(
        "nginx", [("error_page 502 503 504 = @away;", "")], ["answers 502"], server="away"
    ),
    "a 503 while ssepush is away": Case(
        "haproxy", [("http-after-response set-status 200 if away", "")], ["answers 503"], server="away"
    ),
    "ssepush is away": Case("nginx", says=["ssepush is away"], server="away"),
}


@pytest.fixture
def servers(redis_process: RedisProcess) -> Iterator[dict[str, int]]:
    """The ports of the servers behind the proxies."""
    started = {
        "usual": ServerProcess(redis_process, "--heartbeat", "1"),
        "slow": ServerProcess(redis_process, "--heartbeat", "4"),
        "token": ServerProcess(redis_process, "--heartbeat", "1", SSEPUSH_PUBLISH_TOKEN=TOKEN),
        "other origin": ServerProcess(redis_process, "--heartbeat", "1", "--allow-origin", "https://a.example"),
        "other host": ServerProcess(
            redis_process, "--heartbeat", "1", "--host", "0.0.0.0", "--allow-host", "events.example.org"
        ),
    }
    ports = {name: server.port for name, server in started.items()}
    yield {**ports, "away": free_port()}
    for server in started.values():
        server.end()


Reports = dict[str, tuple[int, str]]  # by case: the exit status, and what was printed


def checking(proxy: Proxy, case: Case) -> subprocess.Popen[str]:
    """check.py, asked about a proxy."""
    trusted = {"SSL_CERT_FILE": str(proxy.certificate)} if case.is_trusted else {}
    url = f"{case.scheme}://{case.host}:{proxy.port}"
    # A channel of its own, or what is published for one case would break the silence of another.
    options = [*case.options, "--wait", str(WAIT_S), "--channel", f"sse:check-{proxy.port}"]
    command = [sys.executable, CHECK, url, *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment_with(**trusted),
    )


def reports_on(cases: dict[str, Case], servers: dict[str, int]) -> Reports:
    """What check.py says of each case, with its exit status; all are asked about side by side."""
    with contextlib.ExitStack() as stack:
        proxies = {}
        for name, case in cases.items():
            folder = stack.enter_context(open_folder())
            kind, upstream = PROXIES[case.proxy], servers[case.server]
            proxy = kind(folder, upstream, case.changes, case.names, case.days)
            stack.callback(proxy.end)
            proxies[name] = proxy
        for proxy in proxies.values():
            proxy.wait()
        asked = {name: checking(proxies[name], case) for name, case in cases.items()}
        reports = {}
        for name, process in asked.items():
            said, _ = process.communicate(timeout=60)
            reports[name] = (process.returncode, said)
        return reports


def faults_in(said: str) -> list[str]:
    """The lines that tell of one."""
    return [line for line in said.splitlines() if line.startswith("WRONG")]


def test_good_proxies_come_out_clean(servers: dict[str, int]) -> None:
    reports = reports_on(GOOD, servers)

    for name, (status, said) in reports.items():
        assert faults_in(said) == [], name
        assert status == 0
        assert "a silent stream stays open" in said
        assert ("an event takes" in said) == ("--token" in GOOD[name].options)


def is_right(case: Case, status: int, said: str) -> bool:
    """Whether a fault was named, with its mend, and no other."""
    faults = faults_in(said)
    if status != 1 or len(faults) != len(case.says):
        return False
    pairs = zip(case.says, faults, strict=True)
    return all(part in line and ". Mend: " in line for part, line in pairs)


def test_each_fault_is_named_with_its_mend_and_no_other(servers: dict[str, int]) -> None:
    reports = reports_on(FAULTS, servers)

    mistaken = [
        f"{name}: {status}\n{said}"
        for name, (status, said) in reports.items()
        if not is_right(FAULTS[name], status, said)
    ]
    assert not mistaken, "\n".join(mistaken)


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One run of check.py, to its end."""
    command = [sys.executable, CHECK, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["events.example.org"],
        ["ftp://events.example.org"],
        ["https://events.example.org", "--origin", "www.example.org"],
        ["https://events.example.org", "--wait", "0"],
        ["https://events.example.org", "--nonsense"],
    ],
    ids=["no URL", "no scheme", "not HTTP", "no origin", "no time", "unknown option"],
)
def test_what_cannot_be_understood_ends_with_status_2(arguments: list[str]) -> None:
    done = run_check(*arguments)

    assert done.returncode == 2
    assert "usage" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_where_nobody_is_has_a_fault() -> None:
    url = f"https://127.0.0.1:{free_port()}"

    done = run_check(url)

    assert done.returncode == 1
    assert "Connection refused" in done.stdout
    assert done.stderr == ""


def shape(report: str) -> list[str]:
    """A report without what differs each time."""
    return [re.sub("[0-9.]+ (days|s)", r"N \1", line) for line in report.splitlines()]


def test_the_docs_show_what_it_really_says(servers: dict[str, int]) -> None:
    text = (HERE / "docs" / "operations.md").read_text()
    shown = re.search(r"^```\n(ok    the certificate.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert shown
    name = "nginx drops Last-Event-ID"

    reports = reports_on({name: FAULTS[name]}, servers)

    _, said = reports[name]
    assert shape(shown[1]) == shape(said)
