#!/usr/bin/env python3
"""Checks the way from a browser to ssepush, as a stranger sees it, and says how to fix what is wrong.

    python3 check.py https://events.example.org --origin https://www.example.org

Run it from another machine than the server's. It needs only Python. It prints a line for each check, and for each fault
what to change. Exit status: 0 nothing is wrong, 1 something is wrong, 2 the arguments are wrong.

It publishes nothing unless you give a token, and then only on the channel of --channel. For a private certificate
authority, set SSL_CERT_FILE to its file.
"""

from __future__ import annotations

import argparse
import contextlib
import email.utils
import http.client
import json
import os
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

ANSWER_S = 5.0  # to wait for an answer, or for the first bytes of a stream
PROMPT_S = 0.1  # how long an event may take after the publisher got its answer; Nagle's algorithm adds 0.2
EXPIRY_DAYS = 14
CLOCK_S = 30.0
HEARTBEATS = 3
MAX_BODY_BYTES = 65536

READ_TIMEOUT = (
    "make the proxy's read timeout longer than --heartbeat, twice as long for safety"
    " (nginx: proxy_read_timeout; haproxy: timeout server; Apache: ProxyTimeout)"
)
BUFFERING = (
    "let the proxy pass on data at once (nginx: proxy_buffering off, or do not ignore X-Accel-Buffering; lighttpd:"
    " server.stream-response-body = 2; Apache: flushpackets=on), and leave event streams uncompressed"
)
AWAY = (
    'answer 200, Content-Type: text/event-stream and "retry: 2000" in place of 502, 503 and 504 for /stream'
    " (nginx: error_page 502 503 504 = @away), and start ssepush"
)


class Fault(Exception):
    """What is wrong, and how to fix it. Checks that depend on it are skipped."""

    def __init__(self, wrong: str, fix: str) -> None:
        super().__init__(f"{wrong}. Fix: {fix}")


class NoStream(Fault):
    """There is no event stream, so there is nothing to check on it."""


Headers = Mapping[str, str]
NO_HEADERS: Headers = {}
JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    """An answer, or only its head. Field names are in lower case."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes = b""

    def values(self, name: str) -> list[str]:
        """The values of a header field, one for each time that it came."""
        return [value for field, value in self.fields if field == name]

    def value(self, name: str) -> str:
        """The same as one text; "" if the field did not come."""
        return ", ".join(self.values(name))

    def is_event_stream(self) -> bool:
        """Whether a browser would read it as one."""
        kind, _, _ = self.value("content-type").partition(";")
        return self.status == 200 and kind.strip() == "text/event-stream"

    def error(self) -> str:
        """What ssepush says is wrong; "" if this is not an error from ssepush."""
        try:
            members = json.loads(self.body)
        except ValueError:
            return ""
        if not isinstance(members, dict):
            return ""
        return str(members.get("error", ""))


def head_of(response: http.client.HTTPResponse) -> Answer:
    """The answer without its body."""
    fields = [(name.lower(), value) for name, value in response.getheaders()]
    return Answer(response.status, fields)


def whole(response: http.client.HTTPResponse) -> Answer:
    """The answer with enough of its body to say what is wrong."""
    body = response.read(MAX_BODY_BYTES)
    return head_of(response)._replace(body=body)


class Site:
    """The deployed address."""

    def __init__(self, url: str) -> None:
        """ValueError: this is not the URL of a site."""
        parts = urlsplit(url)
        is_web = parts.scheme in ("http", "https") and parts.hostname
        if not is_web or parts.query or parts.fragment:
            raise ValueError(f"URL must be like https://events.example.org, not {url!r}")
        self.secure = parts.scheme == "https"
        self.name = str(parts.hostname)
        self.port = parts.port or (443 if self.secure else 80)
        self.host = parts.netloc.rpartition("@")[2]
        self.path = parts.path.rstrip("/")
        self.context = ssl.create_default_context()

    def trust_anyone(self) -> None:
        """Accept any certificate, to check the rest after a faulty certificate was reported."""
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE

    def connect(self) -> http.client.HTTPConnection:
        """A connection like that of a browser without HTTP/2."""
        address = (self.name, self.port)
        connection = http.client.HTTPConnection(*address, timeout=ANSWER_S)
        if self.secure:
            connection = http.client.HTTPSConnection(*address, timeout=ANSWER_S, context=self.context)
        connection.connect()
        return connection

    def ask(
        self,
        method: str,
        path: str,
        headers: Headers = NO_HEADERS,
        body: str | None = None,
    ) -> Answer:
        """One request with a whole answer."""
        named = {"Host": self.host, **headers}
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, self.path + path, body, named)
            return whole(connection.getresponse())

    def publish(self, channel: str, data: str, token: str) -> Answer:
        """Publish an event through the site."""
        body = json.dumps({"channel": channel, "data": data})
        headers = {**JSON, "Authorization": f"Bearer {token}"}
        return self.ask("POST", "/publish", headers, body)


def stream_path(channel: str) -> str:
    return f"/stream?channel={quote(channel)}"


class Stream:
    """An event stream, read as it arrives. Close it after use."""

    def __init__(self, site: Site, channel: str, headers: Headers = NO_HEADERS) -> None:
        """NoStream: the answer is not an event stream."""
        as_browser = {"Host": site.host, "Accept": "text/event-stream", "Accept-Encoding": "gzip"}
        self.text = ""
        self.ended = False
        self.inflate = zlib.decompressobj(wbits=31).decompress
        self.connection = site.connect()
        self.sock = self.connection.sock
        try:
            self.connection.request("GET", site.path + stream_path(channel), headers={**as_browser, **headers})
            self.response = self.connection.getresponse()
            self.head = head_of(self.response)
            if not self.head.is_event_stream():
                raise not_a_stream(whole(self.response), site)
        except TimeoutError:
            self.connection.close()
            raise NoStream(f"no byte of a stream came within {ANSWER_S:.0f} s", BUFFERING) from None
        except BaseException:
            self.connection.close()
            raise

    def read_until(self, enough: Callable[[str], bool], seconds: float) -> bool:
        """Read until `enough` is true of the text so far. False: the stream ended, or the time is up."""
        deadline = time.monotonic() + seconds
        while not enough(self.text):
            left = deadline - time.monotonic()
            if self.ended or left <= 0:
                return False
            self.sock.settimeout(left)
            try:
                self._read()
            except TimeoutError:
                return False
        return True

    def _read(self) -> None:
        """Wait for the next bytes. TimeoutError: none came."""
        try:
            part = self.response.read1(MAX_BODY_BYTES)
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException):  # cut off
            part = b""
        self.ended = not part
        if self.head.value("content-encoding") == "gzip":
            part = self.inflate(part)
        self.text += part.decode(errors="replace")

    def close(self) -> None:
        """Leave, as a closed page does."""
        self.response.close()
        self.connection.close()


def has(part: str) -> Callable[[str], bool]:
    """Whether the stream contains this so far."""
    return lambda text: part in text


def has_heartbeats(number: int) -> Callable[[str], bool]:
    """Whether this many heartbeats have come, after the position at the start of the stream."""
    position = re.compile("^event: stream-position$", re.MULTILINE)
    return lambda text: len(position.findall(text)) > number


def nothing(text: str) -> bool:
    """Never enough: for reading until the end."""
    return False


def not_a_stream(answer: Answer, site: Site) -> NoStream:
    """Why the answer to GET /stream was not an event stream."""
    error = answer.error()
    refused = re.fullmatch(r"Host (\S+) is not allowed.*", error)
    if refused and refused[1] == site.name.lower():
        return NoStream(f"ssepush refuses Host {site.name}", f"start it with --allow-host {site.name}")
    if refused:
        fix = "forward Host unchanged (nginx: proxy_set_header Host $http_host; Apache: ProxyPreserveHost On)"
        return NoStream(f"the proxy asks ssepush for Host {refused[1]} instead of {site.host}", fix)
    if answer.status in (502, 503, 504):
        return NoStream(
            f"the proxy answers {answer.status} for /stream, which ends a browser's EventSource for good", AWAY
        )
    if error:
        return NoStream(f"ssepush refuses /stream with {answer.status}: {error}", "do what the message says")
    return NoStream(f"/stream answers {answer.status} without an event stream", "forward /stream to ssepush")


class Check(NamedTuple):
    """The command line's arguments."""

    site: Site
    channel: str
    origin: str
    token: str
    wait_s: float


# Each check yields what is right, and raises a Fault, or yields it if the check can go on.
Findings = Iterator[str | Fault]
Found = list[str | Fault]


def check_tls(check: Check) -> Findings:
    """The certificate, and HTTP/2."""
    site = check.site
    six = "a browser opens at most six streams to a host, for all its tabs together"
    if not site.secure:
        raise Fault(f"http: everyone on the way can read, and {six}", "use TLS and HTTP/2 at the proxy")
    browser = ssl.create_default_context()
    browser.set_alpn_protocols(["h2", "http/1.1"])
    try:
        certificate, protocol = shake_hands(site, browser)
    except ssl.SSLCertVerificationError as error:
        site.trust_anyone()
        yield Fault(f"browsers refuse the certificate: {error.verify_message}", f"get a certificate for {site.name}")
        browser.check_hostname = False
        browser.verify_mode = ssl.CERT_NONE
        certificate, protocol = shake_hands(site, browser)
    if certificate:
        left_s = ssl.cert_time_to_seconds(certificate) - time.time()
        days = left_s / 86400
        if days < EXPIRY_DAYS:
            yield Fault(f"the certificate expires in {days:.0f} days", "renew it, and see why that is not automatic")
        else:
            yield f"the certificate is good for {days:.0f} days"
    if protocol == "h2":
        yield "HTTP/2 is spoken"
    else:
        yield Fault(f"HTTP/1.1 only: {six}", "HTTP/2 (nginx: listen … http2; haproxy: alpn h2; Apache: Protocols h2)")


def shake_hands(site: Site, context: ssl.SSLContext) -> tuple[str, str]:
    """When the certificate expires ("" if it was not verified), and the protocol that was chosen."""
    address = (site.name, site.port)
    with (
        socket.create_connection(address, ANSWER_S) as plain,
        context.wrap_socket(plain, server_hostname=site.name) as sock,
    ):
        certificate = sock.getpeercert() or {}
        expiry = str(certificate.get("notAfter", ""))
        return expiry, sock.selected_alpn_protocol() or ""


def check_opening(check: Check) -> Findings:
    """A stream opens, and its first bytes come at once."""
    stream = Stream(check.site, check.channel)
    with contextlib.closing(stream):
        begun = stream.read_until(has("\n\n"), ANSWER_S)
        if not begun and not stream.ended:
            raise Fault(f"the first bytes of a stream are held back for more than {ANSWER_S:.0f} s", BUFFERING)
        stream.read_until(nothing, 0.2)
        if stream.ended and "retry:" in stream.text:
            why = re.search("^: (.+)$", stream.text, re.MULTILINE)
            said = why[1] if why else "the proxy tells pages to come back: ssepush is away"
            raise Fault(f"streams end at once ({said})", "see ssepush's log")
        if stream.ended:
            raise Fault("streams end at once", READ_TIMEOUT)
    yield "a stream opens, and its first bytes come at once"


def check_silence(check: Check) -> Findings:
    """A silent stream stays open, and its heartbeats come one by one."""
    opened = time.monotonic()
    came_at = [opened]
    with contextlib.closing(Stream(check.site, check.channel)) as stream:
        for number in range(1, HEARTBEATS + 1):
            left = opened + check.wait_s - time.monotonic()
            if not stream.read_until(has_heartbeats(number), left):
                break
            came_at.append(time.monotonic())
        silence_s = time.monotonic() - came_at[-1]
    missing = HEARTBEATS + 1 - len(came_at)
    if missing and stream.ended:
        raise Fault(f"the proxy closed the stream after {silence_s:.1f} s of silence", READ_TIMEOUT)
    if missing:
        wrong = f"{missing} of {HEARTBEATS} heartbeats did not come within {check.wait_s:.0f} s"
        fix = f"if --heartbeat is longer than a third of that, use a longer --wait; otherwise {BUFFERING}"
        raise Fault(wrong, fix)
    spread_s = came_at[-1] - came_at[1]
    if spread_s < 0.05:
        raise Fault("heartbeats arrive in bursts, so events are held back", BUFFERING)
    yield f"a silent stream stays open, with a heartbeat every {spread_s / (HEARTBEATS - 1):.1f} s"


def check_delivery(check: Check) -> Findings:
    """Published events reach the page at once."""
    if not check.token:
        return
    delays = []
    with contextlib.closing(Stream(check.site, check.channel)) as stream:
        stream.read_until(has("\n\n"), ANSWER_S)
        for number in range(5):
            mark = f"check {time.time_ns()} {number}"
            answer = check.site.publish(check.channel, mark, check.token)
            published = time.monotonic()
            if answer.status == 401:
                fix = "use the value of SSEPUSH_PUBLISH_TOKEN in the server's environment"
                raise Fault("the token is refused", fix)
            if answer.status != 200:
                yield f"/publish is closed here ({answer.status}), so how long an event takes was not measured"
                return
            if not stream.read_until(has(mark), ANSWER_S):
                raise Fault(f"a published event did not come within {ANSWER_S:.0f} s", BUFFERING)
            delays.append(time.monotonic() - published)
            time.sleep(0.05)  # the next event, if sent at once, would push this one through
    delay_s = statistics.median(delays)
    delay = f"{1000 * delay_s:.0f} ms"
    if delay_s > PROMPT_S:
        fix = "turn off delayed sending (haproxy: option http-no-delay; others: TCP_NODELAY)"
        raise Fault(f"events are delayed by {delay}", fix)
    yield f"an event takes {delay}"


def check_return(check: Check) -> Findings:
    """Last-Event-ID reaches ssepush, which answers an unknown id with a reset."""
    headers = {"Last-Event-ID": "check"}
    with contextlib.closing(Stream(check.site, check.channel, headers)) as stream:
        if not stream.read_until(has("event: stream-reset\n"), ANSWER_S):
            fix = "forward the header Last-Event-ID: without it, pages that reconnect miss the events in between"
            raise Fault("Last-Event-ID does not reach ssepush", fix)
    yield "Last-Event-ID reaches ssepush"


def check_origin(check: Check) -> Findings:
    """Pages of this origin may read."""
    if not check.origin:
        return
    origin = check.origin
    answer = check.site.ask("HEAD", stream_path(check.channel), {"Origin": origin})
    allowed = answer.values("access-control-allow-origin")
    if answer.status == 403:
        raise Fault(f"pages of {origin} may not read", f"start ssepush with --allow-origin {origin}")
    if len(allowed) > 1:
        raise Fault("Access-Control-Allow-Origin comes twice", "leave it to ssepush: the proxy must not add one")
    if allowed not in (["*"], [origin]):
        said = allowed[0] if allowed else "nothing"
        fix = f"start ssepush with --allow-origin {origin}, and do not change Access-Control-Allow-Origin at the proxy"
        raise Fault(f"Access-Control-Allow-Origin is {said}, so pages of {origin} may not read", fix)
    yield f"pages of {origin} may read"


def closing(path: str) -> str:
    """How to close a path to strangers."""
    return f"close it at the proxy (nginx: location = {path} {{ return 403; }})"


def check_strangers(check: Check) -> Findings:
    """Paths that are not for strangers are closed to them."""
    signs = {"/metrics": b"ssepush_", "/healthz": b'"state"'}
    for path, sign in signs.items():
        answer = check.site.ask("GET", path)
        if answer.status != 404 and sign in answer.body:
            yield Fault(f"strangers may read {path}", f"{closing(path)}, or start ssepush with --admin")
        else:
            yield f"{path} is closed to strangers"
    yield publishing_by_strangers(check)


def publishing_by_strangers(check: Check) -> str | Fault:
    """Whether they may publish. This publishes nothing: the body lacks its data, which ssepush checks last."""
    site = check.site
    body = json.dumps({"channel": check.channel})
    for host in (site.host, "localhost", "127.0.0.1"):
        answer = site.ask("POST", "/publish", {**JSON, "Host": host}, body)
        if answer.status == 400 and answer.error():
            forged = "" if host == site.host else f" if they claim to ask for {host}"
            fix = f"set SSEPUSH_PUBLISH_TOKEN, let the proxy add X-Forwarded-For, and {closing('/publish')}"
            return Fault(f"strangers may publish{forged}", fix)
    return "/publish is closed to strangers"


def check_clock(check: Check) -> Findings:
    """The server's clock and ours agree."""
    answer = check.site.ask("HEAD", "/")
    date = answer.value("date")
    if not date:
        return
    theirs = email.utils.parsedate_to_datetime(date).timestamp()
    apart_s = abs(theirs - time.time())
    if apart_s > CLOCK_S:
        fix = "use NTP on both: tokens expire by the server's clock"
        raise Fault(f"the server's clock and this one are {apart_s:.0f} s apart", fix)
    yield "the clocks agree"


STREAM_CHECKS = (check_silence, check_return)
OTHER_CHECKS = (check_strangers, check_clock)


def findings_of(ask: Callable[[Check], Findings], check: Check) -> Found:
    """All that one check finds."""
    found: Found = []
    try:
        for finding in ask(check):
            found.append(finding)  # keeps those before a fault
    except Fault as fault:
        found.append(fault)
    except (OSError, http.client.HTTPException) as error:
        found.append(Fault(f"{ask.__name__.replace('_', ' ')}: no answer ({error})", "check that the proxy runs"))
    return found


def report(findings: Found) -> int:
    """Print them, and return how many are faults."""
    for finding in findings:
        label = "WRONG" if isinstance(finding, Fault) else "ok   "
        print(label, finding, flush=True)
    return sum(isinstance(finding, Fault) for finding in findings)


def check_of(arguments: list[str]) -> Check:
    """Parse the command line. SystemExit 2: it is wrong."""
    parser = argparse.ArgumentParser(description="Check the way from a browser to a deployed ssepush.")
    parser.add_argument("url", metavar="URL", help="its address, such as https://events.example.org")
    parser.add_argument("--origin", default="", help="the origin of your pages, such as https://www.example.org")
    parser.add_argument(
        "--token",
        default=os.environ.get("SSEPUSH_PUBLISH_TOKEN", ""),
        help="publish with it, and measure how long an event takes (SSEPUSH_PUBLISH_TOKEN)",
    )
    parser.add_argument("--channel", default="sse:check", help="an unused, public channel (sse:check)")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait for three heartbeats (60)")
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
        faults += report(findings_of(check_delivery, check))  # before other checks need silence on the same channel
        checks = [*STREAM_CHECKS, *checks]
    with ThreadPoolExecutor(len(checks)) as pool:
        for findings in pool.map(lambda ask: findings_of(ask, check), checks):
            faults += report(findings)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
