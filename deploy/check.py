#!/usr/bin/env python3
"""Checks the way from a browser to ssepush, as a stranger sees it, and says how to mend what is wrong with it.

    python3 check.py https://events.example.org --origin https://www.example.org

Run it from another machine than the server's, with nothing but Python. It prints a line for each check, and for each
fault what to change. Exit status: 0 nothing is wrong, 1 something is, 2 it could not be asked for that way.

Nothing is published unless a token is given, and then only on the channel of --channel. With a private certificate
authority, name its file in the environment as SSL_CERT_FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import email.utils
import http.client
import json
import re
import socket
import ssl
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import quote, urlsplit

ANSWER_S = 5.0  # for an answer, or the first bytes of a stream
PROMPT_S = 0.1  # what an event may take from the publisher's answer to the page; Nagle's algorithm adds 0.2
EXPIRY_DAYS = 14
CLOCK_S = 30.0  # tokens expire by the server's clock
HEARTBEATS = 3

READ_TIMEOUT = (
    "make the proxy's read timeout longer than --heartbeat, twice as long for safety"
    " (nginx: proxy_read_timeout; haproxy: timeout server; Apache: ProxyTimeout)"
)
BUFFERING = (
    "let the proxy pass on what it has at once (nginx: proxy_buffering off, or heed X-Accel-Buffering; lighttpd:"
    " server.stream-response-body = 2; Apache: flushpackets=on), and leave event streams uncompressed"
)
AWAY = (
    'answer 200, Content-Type: text/event-stream and "retry: 2000" in place of 502, 503 and 504 for /stream'
    " (nginx: error_page 502 503 504 = @away), and start ssepush"
)


class Fault(Exception):
    """What is wrong, and its mend. The checks that it would spoil are left out."""

    def __init__(self, wrong: str, mend: str) -> None:
        super().__init__(f"{wrong}. Mend: {mend}")


class NoStream(Fault):
    """What should be an event stream is none, so there is nothing to check on it."""


class Answer(NamedTuple):
    """A whole answer. Field names are in lower case; a field that came twice has both values."""

    status: int
    fields: Mapping[str, list[str]]
    body: bytes

    def error(self) -> str:
        """What ssepush says is wrong; "" if this is no error of ssepush's."""
        with contextlib.suppress(ValueError):
            members = json.loads(self.body)
            if isinstance(members, dict):
                return str(members.get("error", ""))
        return ""


def fields_of(response: http.client.HTTPResponse) -> dict[str, list[str]]:
    """The response's header fields."""
    fields: dict[str, list[str]] = {}
    for name, value in response.getheaders():
        fields.setdefault(name.lower(), []).append(value)
    return fields


class Site:
    """The deployed address."""

    def __init__(self, url: str) -> None:
        """ValueError: it is no URL of a site."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"URL must be like https://events.example.org, not {url!r}")
        self.secure = parts.scheme == "https"
        self.name = parts.hostname
        self.port = parts.port or (443 if self.secure else 80)
        self.host = parts.netloc.rpartition("@")[2]
        self.path = parts.path.rstrip("/")
        self.context = ssl.create_default_context()

    def trust_anyone(self) -> None:
        """So that the rest can be checked where the certificate is at fault, which is said by then."""
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE

    def connect(self) -> http.client.HTTPConnection:
        """A connection as a browser without HTTP/2 makes it."""
        connection: http.client.HTTPConnection
        if self.secure:
            connection = http.client.HTTPSConnection(self.name, self.port, timeout=ANSWER_S, context=self.context)
        else:
            connection = http.client.HTTPConnection(self.name, self.port, timeout=ANSWER_S)
        connection.connect()
        return connection

    def ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, body: str | None = None) -> Answer:
        """One request with a whole answer."""
        with contextlib.closing(self.connect()) as connection:
            named = {"Host": self.host, **(headers or {})}
            connection.request(method, self.path + path, body, named)
            response = connection.getresponse()
            return Answer(response.status, fields_of(response), response.read(65536))

    def publish(self, channel: str, data: str, token: str) -> Answer:
        """Publish an event through the site."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        return self.ask("POST", "/publish", headers, json.dumps({"channel": channel, "data": data}))


class Stream:
    """An event stream, read as it comes; close it."""

    def __init__(self, site: Site, channel: str, headers: Mapping[str, str] | None = None) -> None:
        """Fault: what is there is no event stream."""
        self.connection = site.connect()
        self.sock = self.connection.sock
        named = {"Host": site.host, "Accept": "text/event-stream", "Accept-Encoding": "gzip", **(headers or {})}
        self.connection.request("GET", f"{site.path}/stream?channel={quote(channel)}", headers=named)
        self.text = ""
        self.ended = False
        try:
            self.response = self.connection.getresponse()
        except TimeoutError:
            self.connection.close()
            raise NoStream(f"nothing came of a stream within {ANSWER_S:.0f} s", BUFFERING) from None
        self.fields = fields_of(self.response)
        encoding = "".join(self.fields.get("content-encoding", []))
        self.compressed = encoding == "gzip"
        self.inflate = zlib.decompressobj(wbits=31).decompress
        if self.response.status != 200 or not self._is_event_stream():
            answer = Answer(self.response.status, self.fields, self.response.read(65536))
            self.close()
            raise not_a_stream(answer, site)

    def _is_event_stream(self) -> bool:
        kind = "".join(self.fields.get("content-type", []))
        return kind.partition(";")[0].strip().lower() == "text/event-stream"

    def read_until(self, enough: Callable[[str], object], seconds: float) -> bool:
        """Whether what came so far was enough, before the stream ended and within this time."""
        deadline = time.monotonic() + seconds
        while not enough(self.text):
            left = deadline - time.monotonic()
            if self.ended or left <= 0:
                return False
            self.sock.settimeout(left)
            try:
                part = self.response.read1(65536)
            except TimeoutError:
                return False
            except (OSError, http.client.HTTPException):
                part = b""
            self.ended = not part
            if self.compressed:
                part = self.inflate(part)
            self.text += part.decode(errors="replace")
        return True

    def close(self) -> None:
        """Leave, as a closed page does."""
        self.response.close()
        self.connection.close()


def has(part: str) -> Callable[[str], bool]:
    """Whether this has come of a stream."""
    return lambda text: part in text


def has_heartbeats(number: int) -> Callable[[str], bool]:
    """Whether as many heartbeats have come of a stream."""
    return lambda text: len(re.findall("^:$", text, re.MULTILINE)) >= number


def not_a_stream(answer: Answer, site: Site) -> NoStream:
    """Why GET /stream was answered otherwise."""
    error = answer.error()
    refused = re.fullmatch(r"Host (\S+) is not allowed.*", error)
    if refused and refused[1] == site.name.lower():
        return NoStream(f"ssepush refuses Host {site.name}", f"start it with --allow-host {site.name}")
    if refused:
        mend = "pass Host on as it is (nginx: proxy_set_header Host $http_host; Apache: ProxyPreserveHost On)"
        return NoStream(f"the proxy asks ssepush for Host {refused[1]} in place of {site.host}", mend)
    if answer.status in (502, 503, 504):
        return NoStream(
            f"the proxy answers {answer.status} for /stream, which ends a browser's EventSource for good", AWAY
        )
    if error:
        return NoStream(f"/stream is refused with {answer.status}: {error}", "what the message says")
    return NoStream(f"/stream is answered with {answer.status}, and is no event stream", "pass /stream on to ssepush")


class Check(NamedTuple):
    """What is asked for on the command line."""

    site: Site
    channel: str
    origin: str
    token: str
    wait_s: float


# Each check yields what was found right, and raises Fault, or yields it where there may be others.
Findings = Iterator[str | Fault]


def check_tls(check: Check) -> Findings:
    """The certificate, and HTTP/2."""
    site = check.site
    six = "a browser opens at most six streams to a host, all its tabs together"
    if not site.secure:
        raise Fault(f"http: everyone on the way can read, and {six}", "TLS and HTTP/2 at the proxy")
    browser = ssl.create_default_context()
    browser.set_alpn_protocols(["h2", "http/1.1"])
    try:
        certificate, protocol = shake_hands(site, browser)
    except ssl.SSLCertVerificationError as error:
        site.trust_anyone()
        yield Fault(f"browsers refuse the certificate: {error.verify_message}", f"a certificate for {site.name}")
        browser.check_hostname = False
        browser.verify_mode = ssl.CERT_NONE
        certificate, protocol = shake_hands(site, browser)
    if certificate:
        days = (ssl.cert_time_to_seconds(certificate) - time.time()) / 86400
        if days < EXPIRY_DAYS:
            yield Fault(f"the certificate expires in {days:.0f} days", "renew it, and see why that is not automatic")
        else:
            yield f"the certificate is good for {days:.0f} days"
    if protocol == "h2":
        yield "HTTP/2 is spoken"
    else:
        yield Fault(f"HTTP/1.1 only: {six}", "HTTP/2 (nginx: listen … http2; haproxy: alpn h2; Apache: Protocols h2)")


def shake_hands(site: Site, context: ssl.SSLContext) -> tuple[str, str | None]:
    """Until when the certificate is good, "" if it was not verified; and the protocol that is spoken."""
    with (
        socket.create_connection((site.name, site.port), timeout=ANSWER_S) as plain,
        context.wrap_socket(plain, server_hostname=site.name) as sock,
    ):
        certificate = sock.getpeercert() or {}
        return str(certificate.get("notAfter", "")), sock.selected_alpn_protocol()


def check_opening(check: Check) -> Findings:
    """A stream opens, and its first bytes come at once."""
    stream = Stream(check.site, check.channel)
    with contextlib.closing(stream):
        begun = stream.read_until(has("\n\n"), ANSWER_S)
        if not begun and not stream.ended:
            raise Fault(f"the first bytes of a stream are held back for more than {ANSWER_S:.0f} s", BUFFERING)
        stream.read_until(lambda _: False, 0.2)
        if stream.ended and "retry:" in stream.text:
            why = re.search("^: (.+)$", stream.text, re.MULTILINE)
            said = why[1] if why else "the proxy tells pages to come back: ssepush is away"
            raise Fault(f"streams end at once ({said})", "see ssepush's log")
        if stream.ended:
            raise Fault("streams end at once", READ_TIMEOUT)
    yield "a stream opens, and its first bytes come at once"


def check_silence(check: Check) -> Findings:
    """A silent stream stays open, and its heartbeats come one by one."""
    stream = Stream(check.site, check.channel)
    with contextlib.closing(stream):
        opened = time.monotonic()
        came_at: list[float] = []
        for number in range(1, HEARTBEATS + 1):
            left = check.wait_s - (time.monotonic() - opened)
            before = time.monotonic()
            if not stream.read_until(has_heartbeats(number), left):
                break
            came_at.append(time.monotonic())
        now = time.monotonic()
        if len(came_at) == HEARTBEATS and came_at[-1] - came_at[0] < 0.05:
            raise Fault("heartbeats come in lumps, so events are held back", BUFFERING)
        if len(came_at) == HEARTBEATS:
            beat_s = (came_at[-1] - came_at[0]) / (HEARTBEATS - 1)
            yield f"a silent stream stays open, with a heartbeat every {beat_s:.1f} s"
        elif stream.ended:
            raise Fault(f"the stream was ended after {now - before:.1f} s of silence", READ_TIMEOUT)
        else:
            wrong = f"{len(came_at)} of {HEARTBEATS} heartbeats came within {now - opened:.0f} s"
            raise Fault(wrong, f"if --heartbeat is longer than a third of that, --wait longer; otherwise {BUFFERING}")


def check_delivery(check: Check) -> Findings:
    """Published events reach the page at once."""
    if not check.token:
        return
    delays = []
    stream = Stream(check.site, check.channel)
    with contextlib.closing(stream):
        stream.read_until(has("\n\n"), ANSWER_S)
        for number in range(5):
            mark = f"check {time.time_ns()} {number}"
            answer = check.site.publish(check.channel, mark, check.token)
            if answer.status == 401:
                raise Fault("the token is refused", "give the one in SSEPUSH_PUBLISH_TOKEN of the server's environment")
            if answer.status != 200:
                yield f"not measured, for /publish is closed here ({answer.status}): how long an event takes"
                return
            published = time.monotonic()
            if not stream.read_until(has(mark), ANSWER_S):
                raise Fault(f"a published event did not come within {ANSWER_S:.0f} s", BUFFERING)
            delays.append(time.monotonic() - published)
            time.sleep(0.05)  # an event that follows at once would push the one before it
    delay_s = statistics.median(delays)
    if delay_s > PROMPT_S:
        mend = "send at once (haproxy: option http-no-delay; others: TCP_NODELAY)"
        raise Fault(f"events are held back for {1000 * delay_s:.0f} ms", mend)
    yield f"an event takes {1000 * delay_s:.0f} ms"


def check_return(check: Check) -> Findings:
    """Last-Event-ID reaches ssepush: an id that is none of its own is answered with a reset."""
    stream = Stream(check.site, check.channel, {"Last-Event-ID": "check"})
    with contextlib.closing(stream):
        if not stream.read_until(has("event: stream-reset\n"), ANSWER_S):
            mend = (
                "pass the header Last-Event-ID on: without it, pages that come back miss what was published meanwhile"
            )
            raise Fault("Last-Event-ID does not reach ssepush", mend)
    yield "Last-Event-ID reaches ssepush"


def check_origin(check: Check) -> Findings:
    """Pages of the origin may read."""
    if not check.origin:
        return
    origin = check.origin
    answer = check.site.ask("HEAD", f"/stream?channel={quote(check.channel)}", {"Origin": origin})
    allowed = answer.fields.get("access-control-allow-origin", [])
    if answer.status == 403:
        raise Fault(f"pages of {origin} may not read", f"start ssepush with --allow-origin {origin}")
    if len(allowed) > 1:
        raise Fault("Access-Control-Allow-Origin comes twice", "leave it to ssepush: the proxy must add none")
    if allowed not in (["*"], [origin]):
        said = allowed[0] if allowed else "nothing"
        mend = f"start ssepush with --allow-origin {origin}, and leave Access-Control-Allow-Origin to it at the proxy"
        raise Fault(f"Access-Control-Allow-Origin is {said}, so pages of {origin} may not read", mend)
    yield f"pages of {origin} may read"


def check_strangers(check: Check) -> Findings:
    """What is not for strangers is closed. Asks for nothing that would publish: the body lacks its data."""
    site = check.site
    closed = "close it at the proxy (nginx: location = {} { return 403; })"
    for path, sign in (("/metrics", b"ssepush_"), ("/healthz", b'"state"')):
        answer = site.ask("GET", path)
        if sign in answer.body:
            yield Fault(f"strangers may read {path}", closed.replace("{}", path, 1) + ", or start ssepush with --admin")
        else:
            yield f"{path} is closed to strangers"
    for host in (site.host, "localhost", "127.0.0.1"):
        headers = {"Host": host, "Content-Type": "application/json"}
        answer = site.ask("POST", "/publish", headers, json.dumps({"channel": check.channel}))
        if answer.status in (200, 400) and answer.body.startswith(b"{"):
            forged = "" if host == site.host else f", as {host}, which they need only claim to be"
            mend = "set SSEPUSH_PUBLISH_TOKEN, let the proxy add X-Forwarded-For, and " + closed.replace(
                "{}", "/publish", 1
            )
            yield Fault(f"strangers may publish{forged}", mend)
            return
    yield "/publish is closed to strangers"


def check_clock(check: Check) -> Findings:
    """The server's clock and ours agree."""
    answer = check.site.ask("HEAD", "/")
    date = "".join(answer.fields.get("date", []))
    if not date:
        return
    ahead_s = email.utils.parsedate_to_datetime(date).timestamp() - time.time()
    if abs(ahead_s) > CLOCK_S:
        raise Fault(
            f"the server's clock and this one are {abs(ahead_s):.0f} s apart", "NTP on both: tokens have an expiry"
        )
    yield "the clocks agree"


STREAM_CHECKS = (check_silence, check_return)
OTHER_CHECKS = (check_strangers, check_clock)


def findings_of(ask: Callable[[Check], Findings], check: Check) -> list[str | Fault]:
    """All that one check finds."""
    found: list[str | Fault] = []
    try:
        for finding in ask(check):
            found.append(finding)  # those before a fault count
    except Fault as fault:
        found.append(fault)
    except (OSError, http.client.HTTPException) as error:
        found.append(Fault(f"{ask.__name__.replace('_', ' ')}: no answer ({error})", "see whether the proxy runs"))
    return found


def report(findings: list[str | Fault]) -> int:
    """Print them; how many are faults."""
    for finding in findings:
        label = "WRONG" if isinstance(finding, Fault) else "ok   "
        print(label, finding, flush=True)
    return sum(isinstance(finding, Fault) for finding in findings)


def check_of(arguments: list[str]) -> Check:
    """What the command line asks for. SystemExit 2: it cannot be understood."""
    parser = argparse.ArgumentParser(description="Check the way from a browser to a deployed ssepush.")
    parser.add_argument("url", metavar="URL", help="where it is, such as https://events.example.org")
    parser.add_argument("--origin", default="", help="of pages that are to read, such as https://www.example.org")
    parser.add_argument("--token", default="", help="SSEPUSH_PUBLISH_TOKEN: publish, and see how long an event takes")
    parser.add_argument("--channel", default="sse:check", help="a silent channel that may be read (sse:check)")
    parser.add_argument("--wait", type=float, default=60.0, help="s to wait for three heartbeats (60)")
    options = parser.parse_args(arguments)
    if options.origin and not re.fullmatch("[a-z][a-z0-9+.-]*://[^/]+", options.origin):
        parser.error(f"--origin must be like https://www.example.org, not {options.origin!r}")
    if not 0 < options.wait <= 3600:
        parser.error("--wait must be from 0 to 3600 s")
    try:
        site = Site(options.url)
    except ValueError as error:
        parser.error(str(error))
    return Check(site, options.channel, options.origin, options.token, options.wait)


def main(arguments: list[str]) -> int:
    """The exit status."""
    check = check_of(arguments)
    faults = report(findings_of(check_tls, check))
    opening = findings_of(check_opening, check)
    faults += report(opening)
    checks = [*OTHER_CHECKS]
    if not any(isinstance(finding, NoStream) for finding in opening):
        checks.insert(0, check_origin)
    if not any(isinstance(finding, Fault) for finding in opening):
        faults += report(findings_of(check_delivery, check))  # before another looks for silence on the same channel
        checks = [*STREAM_CHECKS, *checks]
    with ThreadPoolExecutor(len(checks)) as pool:
        for findings in pool.map(lambda ask: findings_of(ask, check), checks):
            faults += report(findings)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
