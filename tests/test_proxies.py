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
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import pytest

import ssepush
from tests.kit import (
    DEADLINE_S,
    JSON,
    LOOPBACK,
    Parser,
    RedisProcess,
    ServerProcess,
    Start,
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

    def __init__(
        self,
        redis: RedisProcess,
        proxies: Mapping[str, Proxy],
        server: ServerProcess,
    ) -> None:
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
            port = self.server.port
            self.server = start_server(self.redis, port)


def start_server(redis: RedisProcess, port: int) -> ServerProcess:
    return ServerProcess(
        redis,
        f"--heartbeat={HEARTBEAT_S}",
        "--retry=300",
        "--drain=0.5",
        port=port,
        SSEPUSH_SECRET=SECRET,
    )


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
        return http.client.HTTPConnection(
            LOOPBACK,
            proxy.port,
            timeout=DEADLINE_S,
        )
    return http.client.HTTPSConnection(
        LOOPBACK,
        proxy.port,
        timeout=DEADLINE_S,
        context=proxy.trusting(),
    )


def status_of(
    proxy: Proxy,
    method: str,
    path: str,
    body: str | None = None,
    **headers: str,
) -> int:
    """The status of one request."""
    with contextlib.closing(connection_to(proxy)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        response.read()
        return response.status


def status_of_publish(proxy: Proxy, **headers: str) -> int:
    """The same, of a publish."""
    return status_of(proxy, "POST", "/publish", '{"data": 1}', **JSON, **headers)


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

    def read_event(self, data: str) -> None:
        """Until an event with this data has come."""
        self.read_until(lambda parser: parser.events and parser.events[-1].data == data)

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def test_events_pass_each_proxy_at_once(deployment: Deployment, channel: str) -> None:
    slow: dict[str, float] = {}

    for name, proxy in deployment.proxies.items():
        stream = ProxiedStream(proxy, f"/stream?channel={channel}")
        stream.read_until(lambda parser: parser.retry_ms)
        delays = []
        for number in range(7):
            data = f"{name} {number}"
            deployment.server.publish(data, channel)
            published = time.monotonic()
            stream.read_event(data)
            came = time.monotonic()
            delays.append(came - published)
        stream.close()
        delay_s = statistics.median(delays)
        if delay_s > 0.1:
            slow[name] = delay_s

    assert slow == {}


# After how many heartbeats each notices that a page was closed, as the docs say.
NOTICES_AFTER = {
    "nginx": 0,
    "Caddy": 0,
    "lighttpd": 1,
    "haproxy": 2,
    "Apache": 2,
    "Varnish": 3,
}


def test_a_closed_page_is_noticed_behind_each_proxy_within_its_number_of_heartbeats(
    deployment: Deployment,
    channel: str,
) -> None:
    """Counted by the heartbeats of another stream, each of which comes halfway between two of theirs."""
    channels = {name: f"{channel}-{name}" for name in deployment.proxies}
    streams = []
    for name, proxy in deployment.proxies.items():
        stream = ProxiedStream(proxy, f"/stream?channel={channels[name]}")
        streams.append(stream)
    time.sleep(HEARTBEAT_S / 2)
    witness = deployment.server.opened(channel)
    beats = witness.parser.comments
    for stream in streams:
        # Every heartbeat comes, one by one.
        stream.read_until(lambda parser: len(parser.comments) == 2)
    for name in channels.values():
        assert deployment.redis.subscribers(name) == 1
    witness.wait(lambda: beats, "the one between them")

    def heartbeat_after(number: int) -> None:
        witness.wait(lambda: len(beats) > number, "a heartbeat")

    before = len(beats)
    for stream in streams:
        stream.close()
    late = []
    for number in range(4):
        heartbeat_after(before + number)
        for name, most in NOTICES_AFTER.items():
            if most == number and deployment.redis.subscribers(channels[name]):
                late.append(name)
    witness.close()

    assert late == []


@pytest.mark.parametrize("name", PROXIES)
def test_what_is_not_for_strangers_is_closed_at_each_proxy(deployment: Deployment, name: str) -> None:
    proxy = deployment.proxies[name]

    assert status_of(proxy, "GET", "/notifications") == 403
    assert status_of(proxy, "GET", "/metrics") == 403
    assert status_of(proxy, "GET", "/healthz") == 403
    assert status_of_publish(proxy) == 403


class Recorder:
    """Stands in the server's place, and keeps the heads of the requests that come."""

    def __init__(self, port: int) -> None:
        self.heads: list[str] = []
        self._listener = socket.create_server((LOOPBACK, port))
        thread = threading.Thread(target=self._accept, daemon=True)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with sock:
                    self._answer(sock)

    def _answer(self, sock: socket.socket) -> None:
        head = b""
        with sock.makefile("rb") as lines:
            for line in iter(lines.readline, b"\r\n"):
                head += line
        self.heads.append(head.decode("latin-1"))
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
        (head,) = [head for head in recorder.heads if f"/{proxy.recipe} " in head]
        head = head.lower()
        assert "x-forwarded-for: 127.0.0.1" in head
        assert f"host: 127.0.0.1:{proxy.port}" in head


ORIGIN = "https://www.example.org"


class StreamAnswer(NamedTuple):
    """What a page gets that asks for a stream."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def field(self, name: str) -> list[str]:
        """What a header field says, each time that it is there."""
        return self.headers.get_all(name, [])


def stream_answer(proxy: Proxy) -> StreamAnswer:
    with contextlib.closing(connection_to(proxy)) as connection:
        connection.request("GET", "/stream?channel=a", headers={"Origin": ORIGIN})
        response = connection.getresponse()
        body = response.read()
        return StreamAnswer(response.status, response.headers, body)


def test_while_ssepush_is_away_each_proxy_tells_pages_to_come_back(deployment: Deployment) -> None:
    with deployment.away():
        answers = {name: stream_answer(proxy) for name, proxy in deployment.proxies.items()}

    for name, answer in answers.items():
        assert answer.status == 200
        assert answer.body == b"retry: 2000\n\n"
        assert answer.field("Content-Type") == ["text/event-stream"]
        assert answer.field("Cache-Control") == ["no-store"]
        # lighttpd cannot say whose page asked, and browsers take "*" for no page that sends credentials.
        is_named = name != "lighttpd"
        assert answer.field("Access-Control-Allow-Origin") == ([ORIGIN] if is_named else ["*"])
        assert answer.field("Access-Control-Allow-Credentials") == (["true"] if is_named else [])


def test_only_streams_are_answered_for_while_ssepush_is_away(deployment: Deployment) -> None:
    with deployment.away():
        for proxy in deployment.proxies.values():
            assert status_of(proxy, "GET", "/") in (502, 503), proxy.recipe


def test_no_log_of_a_proxy_shows_a_token(deployment: Deployment) -> None:
    token = ssepush.sign("private-log", ttl=60, secret=SECRET)
    path = f"/stream?channel=private-log&token={quote(token)}"
    proxies = deployment.proxies.values()

    for proxy in proxies:
        assert status_of(proxy, "HEAD", path) == 200
    with deployment.away():
        for proxy in proxies:
            status_of(proxy, "GET", path)
    wait_until_logged(deployment.proxies["nginx"])
    wait_until_logged(deployment.proxies["Apache"])

    for proxy in proxies:
        assert token not in proxy.logs(), proxy.recipe


def wait_until_logged(proxy: Proxy) -> None:
    def requests() -> int:
        return proxy.logs().count("/stream")

    wait_for(lambda: requests() >= 2, f"{proxy.recipe} has logged both requests")


@contextlib.contextmanager
def nginx_for_publishers(server: ServerProcess) -> Iterator[Proxy]:
    """nginx before a server, where strangers reach /publish: the server's own rules count."""
    closed = "(publish|notifications|metrics|healthz)"
    opened = (closed, "(metrics|healthz)")
    with proxies_before(server.port, "nginx", changes=[opened]) as proxies:
        yield proxies["nginx"]


def test_a_page_behind_nginx_is_of_the_same_origin_as_what_it_publishes_to(start: Start) -> None:
    token = "a token of the tests"
    bearer = {"Authorization": f"Bearer {token}"}
    server = start(SSEPUSH_PUBLISH_TOKEN=token)
    with nginx_for_publishers(server) as proxy:
        own = f"https://{LOOPBACK}:{proxy.port}"
        other_port = f"https://{LOOPBACK}"
        stranger = "https://evil.example"

        from_own = status_of_publish(proxy, **bearer, Origin=own)
        from_other_port = status_of_publish(proxy, **bearer, Origin=other_port)
        from_stranger = status_of_publish(proxy, **bearer, Origin=stranger)
        without_token = status_of_publish(proxy, Origin=own)

    assert from_own == 200
    assert from_other_port == 403
    assert from_stranger == 403
    assert without_token == 401


def test_who_claims_to_be_local_may_not_publish_through_nginx_without_a_token(start: Start) -> None:
    server = start()
    with nginx_for_publishers(server) as proxy:
        status = status_of_publish(proxy, Host="localhost")

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
    server = http.server.ThreadingHTTPServer((LOOPBACK, 0), PageHandler)
    port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{port}/"
    finally:
        server.shutdown()
        server.server_close()


CONTENT = "return document.body.textContent"
ReadPage = Callable[[], str]
OpenPage = Callable[[str], ReadPage]


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[OpenPage]:
    """Opens a page in a Chromium that takes self-signed certificates; answers with what reads its text."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument(f"--user-data-dir={folder}/chromium")
    options.accept_insecure_certs = True
    options.binary_location = program("chromium")
    service = webdriver.ChromeService(program("chromedriver"))
    driver = webdriver.Chrome(options, service)

    def opened(url: str) -> ReadPage:
        driver.get(url)
        return lambda: str(driver.execute_script(CONTENT))

    try:
        yield opened
    finally:
        driver.quit()


@contextlib.contextmanager
def firefox(folder: Path) -> Iterator[OpenPage]:
    """The same for Firefox."""
    from marionette_driver.marionette import Marionette

    profile = folder / "firefox"
    profile.mkdir()
    port = free_port()
    (profile / "user.js").write_text(f'user_pref("marionette.port", {port});\n')
    driver = Marionette(
        bin=program("firefox-esr", "firefox"),
        host=LOOPBACK,
        port=port,
        headless=True,
        profile=str(profile),
        app_args=["--remote-allow-system-access"],
        gecko_log=str(folder / "firefox.log"),
    )
    driver.start_session({"acceptInsecureCerts": True})

    def opened(url: str) -> ReadPage:
        driver.navigate(url)
        return lambda: str(driver.execute_script(CONTENT))

    try:
        yield opened
    finally:
        driver.quit(in_app=False)


def seen_by(page: ReadPage) -> dict[str, Any]:
    """What a page says of its streams, by their URL."""
    text = page()
    return dict(json.loads(text or "{}"))


def test_a_server_that_is_away_for_a_moment_or_for_long_loses_no_event_in_any_browser_behind_any_proxy(
    deployment: Deployment,
    channel: str,
    tmp_path: Path,
) -> None:
    names = {f"{proxy.url}/stream?channel={channel}": name for name, proxy in deployment.proxies.items()}
    published: list[str] = []

    def publish(number: int) -> None:
        for _ in range(number):
            data = f"event {len(published)}"
            ssepush.publish(
                data,
                channel=channel,
                redis_url=deployment.redis.url,
            )
            published.append(data)

    def all_have_all() -> bool:
        streams = [*seen_by(in_chromium).values(), *seen_by(in_firefox).values()]
        if len(streams) < 2 * len(names):
            return False
        return all(len(stream["data"]) >= len(published) for stream in streams)

    def wait_for_all(seconds: float) -> None:
        """As long at most: what is missing is shown at the end."""
        with contextlib.suppress(AssertionError):
            wait_for(all_have_all, "all pages have all", seconds)

    with (
        page_server() as page,
        chromium(tmp_path) as open_in_chromium,
        firefox(tmp_path) as open_in_firefox,
    ):
        query = urlencode([("stream", url) for url in names])
        in_chromium = open_in_chromium(f"{page}?{query}")
        in_firefox = open_in_firefox(f"{page}?{query}")
        deployment.redis.wait_for_subscribers(channel, 2 * len(names))
        publish(3)
        wait_for(all_have_all, "all pages have what was published first")

        for away_s, how in [
            (1.5, signal.SIGKILL),
            (10.0, signal.SIGTERM),
        ]:
            with deployment.away(how):
                publish(5)
                time.sleep(away_s)
                publish(5)
            wait_for_all(12)
            publish(3)
            wait_for_all(5)
        at_the_end = {
            "Chromium": seen_by(in_chromium),
            "Firefox": seen_by(in_firefox),
        }

    wrong = {}
    for browser, streams in at_the_end.items():
        assert len(streams) == len(names)
        for url, stream in streams.items():
            if stream["data"] != published:
                wrong[browser, names[url]] = stream
    assert wrong == {}


def test_without_the_way_back_a_proxys_502_ends_eventsource_for_good(
    deployment: Deployment,
    channel: str,
    tmp_path: Path,
) -> None:
    without = ("error_page 502 503 504 = @away;", "")
    port = deployment.server.port
    with (
        proxies_before(port, "nginx", changes=[without]) as proxies,
        page_server() as page,
        chromium(tmp_path) as opened,
    ):
        proxy = proxies["nginx"]
        url = f"{proxy.url}/stream?channel={channel}"
        query = urlencode({"stream": url})
        in_chromium = opened(f"{page}?{query}")
        deployment.redis.wait_for_subscribers(channel, 1)

        with deployment.away():
            wait_for(lambda: seen_by(in_chromium)[url]["closed"], "the page has given up")
