"""Each recipe of deploy/ with the real proxy, a server behind it that comes and goes, and browsers in front."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

import ssepush
from tests.kit import (
    DEADLINE_S,
    JSON,
    Parser,
    RedisProcess,
    ServerProcess,
    free_port,
    needs_test_extra,
    program,
    wait_for,
)
from tests.proxies import PROXIES, Proxy, proxies_before

pytestmark = needs_test_extra
SECRET = "a secret of the tests that is long enough"
HEARTBEAT_S = 1


class Deployment:
    """A server with every proxy before it. It can be away, and comes back where it was."""

    def __init__(self, redis: RedisProcess, proxies: Mapping[str, Proxy], server: ServerProcess) -> None:
        self.redis = redis
        self.proxies = proxies
        self.server = server

    @contextlib.contextmanager
    def away(self, number: signal.Signals = signal.SIGTERM) -> Iterator[None]:
        """Ended by a signal, and back at the end."""
        self.server.signal(number)
        self.server.process.wait(DEADLINE_S)
        try:
            yield
        finally:
            self.server = start_server(self.redis, self.server.port)


def start_server(redis: RedisProcess, port: int) -> ServerProcess:
    options = ("--heartbeat", str(HEARTBEAT_S), "--retry", "300", "--drain", "0.5")
    return ServerProcess(redis, *options, port=port, SSEPUSH_SECRET=SECRET)


@pytest.fixture(scope="module")
def deployment(redis_process: RedisProcess) -> Iterator[Deployment]:
    server = start_server(redis_process, free_port())
    with proxies_before(server.port) as proxies:
        deployed = Deployment(redis_process, proxies, server)
        yield deployed
        deployed.server.end()


def connection_to(proxy: Proxy) -> http.client.HTTPConnection:
    """A connection over HTTP/1.1, which checks the certificate where there is one."""
    if proxy.scheme == "http":
        return http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=DEADLINE_S)
    return http.client.HTTPSConnection("127.0.0.1", proxy.port, timeout=DEADLINE_S, context=proxy.trusting())


def status_of(proxy: Proxy, method: str, path: str, body: str | None = None, **headers: str) -> int:
    """The status of one request."""
    with contextlib.closing(connection_to(proxy)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        response.read()
        return response.status


def has(data: str) -> Callable[[Parser], bool]:
    """Whether an event with this data has come."""
    return lambda parser: data in [event.data for event in parser.events]


class ProxiedStream:
    """A stream as it comes out of a proxy."""

    def __init__(self, proxy: Proxy, path: str) -> None:
        self.connection = connection_to(proxy)
        self.connection.request("GET", path)
        self.response = self.connection.getresponse()
        assert self.response.status == 200
        self.parser = Parser()

    def read_until(self, condition: Callable[[Parser], object]) -> None:
        while not condition(self.parser):
            chunk = self.response.read1(65536)
            assert chunk, "the stream ended"
            self.parser.feed(chunk)

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def test_events_pass_each_proxy_at_once(deployment: Deployment, channel: str) -> None:
    delays: dict[str, float] = {}

    for name, proxy in deployment.proxies.items():
        stream = ProxiedStream(proxy, f"/stream?channel={channel}")
        stream.read_until(lambda parser: parser.retry_ms)
        measured = []
        for number in range(7):
            deployment.server.publish(f"{name} {number}", channel)
            published = time.monotonic()
            stream.read_until(has(f"{name} {number}"))
            measured.append(time.monotonic() - published)
        stream.close()
        delays[name] = statistics.median(measured)

    assert [name for name, delay_s in delays.items() if delay_s > 0.1] == [], delays


def test_a_closed_page_is_noticed_behind_every_proxy_within_three_heartbeats(
    deployment: Deployment, channel: str
) -> None:
    streams = [ProxiedStream(proxy, f"/stream?channel={channel}") for proxy in deployment.proxies.values()]
    for stream in streams:
        # Every heartbeat comes, one by one.
        stream.read_until(lambda parser: len(parser.comments) == 2)
    assert deployment.redis.subscribers(channel) == len(streams)

    for stream in streams:
        stream.close()

    wait_for(lambda: deployment.redis.subscribers(channel) == 0, "all streams are closed", 4 * HEARTBEAT_S)


def test_what_is_not_for_strangers_is_closed_at_each_proxy(deployment: Deployment) -> None:
    statuses: dict[str, list[int]] = {}

    for name, proxy in deployment.proxies.items():
        got = [status_of(proxy, "GET", path) for path in ("/notifications", "/metrics", "/healthz")]
        published = status_of(proxy, "POST", "/publish", '{"data": 1}', **JSON)
        statuses[name] = [*got, published]

    assert statuses == {name: [403, 403, 403, 403] for name in PROXIES}


class Recorder:
    """Stands in the server's place, and keeps the heads of the requests that come."""

    def __init__(self, port: int) -> None:
        self.heads: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with sock, sock.makefile("rb") as lines:
                    self.heads.append("".join(line.decode("latin-1") for line in iter(lines.readline, b"\r\n")))
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def passes_on(proxy: Proxy) -> Callable[[], bool]:
    """Asks whether a request for the proxy's own name gets through."""
    return lambda: status_of(proxy, "GET", f"/{proxy.recipe}") == 200


def test_each_proxy_adds_a_header_by_which_a_request_is_known_not_to_be_of_this_machine(
    deployment: Deployment,
) -> None:
    with deployment.away():
        recorder = Recorder(deployment.server.port)
        for proxy in deployment.proxies.values():
            # Some leave a server alone for a moment after it was away.
            wait_for(passes_on(proxy), f"{proxy.recipe} passes it on")
        recorder.close()

    for proxy in deployment.proxies.values():
        (head,) = [head.lower() for head in recorder.heads if f"/{proxy.recipe} " in head]
        assert "x-forwarded-for: 127.0.0.1" in head
        assert f"host: 127.0.0.1:{proxy.port}" in head


def test_while_ssepush_is_away_each_proxy_tells_pages_to_come_back(deployment: Deployment) -> None:
    answers = {}

    with deployment.away():
        for name, proxy in deployment.proxies.items():
            with contextlib.closing(connection_to(proxy)) as connection:
                connection.request("GET", "/stream?channel=a", headers={"Origin": "https://www.example.org"})
                response = connection.getresponse()
                fields = [(field.lower(), text) for field, text in response.getheaders()]
                answers[name] = (response.status, fields, response.read())

    for status, fields, body in answers.values():
        named = dict(fields)
        assert (status, body) == (200, b"retry: 2000\n\n")
        assert named["content-type"] == "text/event-stream"
        assert named["cache-control"] == "no-store"
        assert [text for field, text in fields if field == "access-control-allow-origin"] in (
            ["https://www.example.org"],
            ["*"],
        )


def test_only_streams_are_answered_for_while_ssepush_is_away(deployment: Deployment) -> None:
    with deployment.away():
        statuses = [status_of(proxy, "GET", "/") for proxy in deployment.proxies.values()]

    assert all(status in (502, 503) for status in statuses), statuses


def test_no_log_of_a_proxy_shows_a_token(deployment: Deployment) -> None:
    token = ssepush.sign("private-log", ttl=60, secret=SECRET)
    path = f"/stream?channel=private-log&token={quote(token)}"
    ours = deployment.proxies.values()

    for proxy in ours:
        assert status_of(proxy, "HEAD", path) == 200
    with deployment.away():
        for proxy in ours:
            status_of(proxy, "GET", path)
    nginx, apache = deployment.proxies["nginx"], deployment.proxies["Apache"]
    wait_for(lambda: nginx.logs().count("/stream") >= 2, "nginx has logged both requests")
    wait_for(lambda: apache.logs().count("/stream") >= 2, "Apache has logged both requests")

    assert [name for name, proxy in deployment.proxies.items() if token in proxy.logs()] == []


def test_a_page_behind_nginx_is_of_the_same_origin_as_what_it_publishes_to(redis_process: RedisProcess) -> None:
    server = ServerProcess(redis_process, SSEPUSH_PUBLISH_TOKEN="a token of the tests")
    open_to_publishers = [("(publish|notifications|metrics|healthz)", "(metrics|healthz)")]
    with proxies_before(server.port, "nginx", changes=open_to_publishers) as proxies:
        proxy = proxies["nginx"]
        own = f"https://127.0.0.1:{proxy.port}"
        token = {"Authorization": "Bearer a token of the tests"}

        statuses = [
            status_of(proxy, "POST", "/publish", '{"data": 1}', **JSON, **token, Origin=origin)
            for origin in (own, "https://127.0.0.1", "https://evil.example")
        ]
        without_token = status_of(proxy, "POST", "/publish", '{"data": 1}', **JSON, Origin=own)
    server.end()

    assert statuses == [200, 403, 403]
    assert without_token == 401


def test_who_claims_to_be_local_may_not_publish_through_nginx_without_a_token(redis_process: RedisProcess) -> None:
    server = ServerProcess(redis_process)
    open_to_publishers = [("(publish|notifications|metrics|healthz)", "(metrics|healthz)")]
    with proxies_before(server.port, "nginx", changes=open_to_publishers) as proxies:
        status = status_of(proxies["nginx"], "POST", "/publish", '{"data": 1}', **JSON, Host="localhost")
    server.end()

    assert status == 403


# ── In browsers ──────────────────────────────────────────────────────────────────────────────────────────────────────

PAGE = b"""<!doctype html><meta charset="utf-8"><title>streams</title><body><script>
const seen = {};
for (const url of new URLSearchParams(location.search).getAll("stream")) {
  const source = new EventSource(url);
  const mine = seen[url] = {opened: 0, closed: false, data: []};
  const note = () => { document.body.textContent = JSON.stringify(seen); };
  source.onopen = () => { mine.opened += 1; note(); };
  source.onerror = () => { mine.closed = source.readyState === EventSource.CLOSED; note(); };
  source.onmessage = (event) => { mine.data.push(event.data); note(); };
  source.addEventListener("stream-reset", () => { mine.data.push("reset"); note(); });
}
</script>"""


class PageHandler(http.server.BaseHTTPRequestHandler):
    """Serves PAGE, from an origin that is none of the proxies'."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *values: Any) -> None:
        pass


@contextlib.contextmanager
def page_server() -> Iterator[str]:
    """Where the page is."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PageHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Callable[[str], Callable[[], str]]]:
    """Opens a page in a Chromium that takes self-signed certificates; answers with what reads its text."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={folder}/chromium"):
        options.add_argument(argument)
    options.accept_insecure_certs = True
    options.binary_location = program("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(program("chromedriver")))

    def opened(url: str) -> Callable[[], str]:
        driver.get(url)
        return lambda: str(driver.execute_script("return document.body.textContent"))

    try:
        yield opened
    finally:
        driver.quit()


@contextlib.contextmanager
def firefox(folder: Path) -> Iterator[Callable[[str], Callable[[], str]]]:
    """The same for Firefox."""
    from marionette_driver.marionette import Marionette

    profile = folder / "firefox"
    profile.mkdir()
    port = free_port()
    (profile / "user.js").write_text(f'user_pref("marionette.port", {port});\n')
    driver = Marionette(
        bin=program("firefox-esr", "firefox"),
        host="127.0.0.1",
        port=port,
        headless=True,
        profile=str(profile),
        app_args=["--remote-allow-system-access"],
        gecko_log=str(folder / "firefox.log"),
    )
    driver.start_session({"acceptInsecureCerts": True})

    def opened(url: str) -> Callable[[], str]:
        driver.navigate(url)
        return lambda: str(driver.execute_script("return document.body.textContent"))

    try:
        yield opened
    finally:
        driver.quit(in_app=False)


def test_a_server_that_is_away_for_a_moment_or_for_long_loses_no_event_in_any_browser_behind_any_proxy(
    deployment: Deployment, channel: str, tmp_path: Path
) -> None:
    urls = {f"{proxy.url}/stream?channel={channel}": name for name, proxy in deployment.proxies.items()}
    published: list[str] = []

    def publish(number: int) -> None:
        for _ in range(number):
            data = f"event {len(published)}"
            ssepush.publish(data, channel=channel, redis_url=deployment.redis.url)
            published.append(data)

    with page_server() as page, chromium(tmp_path) as in_chromium, firefox(tmp_path) as in_firefox:
        opened = f"{page}?{urlencode([('stream', url) for url in urls])}"
        pages = {"Chromium": in_chromium(opened), "Firefox": in_firefox(opened)}

        def seen(text: str) -> dict[str, Any]:
            return {urls[url]: state for url, state in json.loads(text or "{}").items()}

        def states() -> dict[str, dict[str, Any]]:
            return {browser: seen(text()) for browser, text in pages.items()}

        def all_have_all() -> bool:
            streams = [stream for streams in states().values() for stream in streams.values()]
            return len(streams) == 2 * len(urls) and all(len(stream["data"]) >= len(published) for stream in streams)

        streams = 2 * len(urls)
        wait_for(lambda: deployment.redis.subscribers(channel) == streams, "all streams are open")
        publish(3)
        wait_for(all_have_all, "all pages have what was published first")
        for seconds, how in ((1.5, signal.SIGKILL), (10.0, signal.SIGTERM)):
            with deployment.away(how):
                publish(5)
                time.sleep(seconds)  # as long as it is to be away
                publish(5)
            with contextlib.suppress(AssertionError):  # what is missing is shown below
                wait_for(all_have_all, "all pages have what was published meanwhile", 12)
            publish(3)
            with contextlib.suppress(AssertionError):
                wait_for(all_have_all, "all pages have what was published last", 5)
        at_the_end = states()

    wrong = {
        (browser, name): stream
        for browser, streams_of in at_the_end.items()
        for name, stream in streams_of.items()
        if stream["data"] != published
    }
    assert wrong == {}
    assert [len(streams_of) for streams_of in at_the_end.values()] == [len(urls)] * 2


def test_without_the_way_back_a_proxys_502_ends_eventsource_for_good(
    deployment: Deployment, channel: str, tmp_path: Path
) -> None:
    without = [("error_page 502 503 504 = @away;", "")]
    port = deployment.server.port
    with (
        proxies_before(port, "nginx", changes=without) as proxies,
        page_server() as page,
        chromium(tmp_path) as opened,
    ):
        url = f"{proxies['nginx'].url}/stream?channel={channel}"
        text = opened(f"{page}?{urlencode({'stream': url})}")
        wait_for(lambda: deployment.redis.subscribers(channel) == 1, "the stream is open")

        with deployment.away():
            wait_for(lambda: json.loads(text())[url]["closed"], "the page has given up")
