"""Clients that others wrote: curl, Python's and npm's readers of event streams, and flask-sse as the publisher."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.kit import (
    DEADLINE_S,
    HAS_TEST_EXTRA,
    Parser,
    Received,
    ServerProcess,
    needs_test_extra,
    program,
    running,
    wait_for,
)
from tests.messages import AS_PUBLISHED, publish_all


def test_curl_shows_each_event_as_it_comes(server: ServerProcess, channel: str) -> None:
    with running(program("curl"), "-sN", f"{server.url}/stream?channel={channel}") as curl:
        assert curl.stdout
        parser = Parser()
        while not parser.retry_ms:
            parser.feed(curl.stdout.readline())

        for number in range(3):
            server.redis.publish(channel, json.dumps({"data": f"第 {number}", "type": "greet"}))
            while len(parser.events) <= number:
                parser.feed(curl.stdout.readline())

    assert [event[:2] for event in parser.events] == [(f"第 {number}", "greet") for number in range(3)]


@pytest.mark.parametrize("size", [100, 900_000])
def test_curl_publishes_small_and_large_bodies(
    size: int,
    server: ServerProcess,
    channel: str,
    tmp_path: Path,
) -> None:
    stream = server.stream(channel)
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"data": "x" * size, "channel": channel}))
    command = [program("curl"), "-s", f"{server.url}/publish", "-H", "Content-Type: application/json"]
    command += ["-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary", f"@{body}"]

    answer = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S).stdout)

    assert (answer["state"], answer["receivers"]) == ("ok", 1)
    assert stream.next().data == "x" * size


@needs_test_extra
def test_httpx_sse_reads_data_exactly_as_published(server: ServerProcess, channel: str) -> None:
    import httpx
    import httpx_sse

    url = f"{server.url}/stream?channel={channel}"
    with httpx.Client(timeout=DEADLINE_S) as client, httpx_sse.connect_sse(client, "GET", url) as source:
        published = publish_all(server.redis, channel)

        events = source.iter_sse()
        received = [next(event for event in events if event.event != "message") for _ in published]

    assert [[event.event, event.data] for event in received] == published


@needs_test_extra
def test_sseclient_py_reads_data_exactly_as_published(server: ServerProcess, channel: str) -> None:
    import requests
    import sseclient

    url = f"{server.url}/stream?channel={channel}"
    with requests.get(url, stream=True, timeout=DEADLINE_S) as response:
        # requests' own iterators wait until a chunk of theirs is full
        source = sseclient.SSEClient(iter(lambda: response.raw.read1(65536), b""))
        published = publish_all(server.redis, channel)

        received = []
        for event in source.events():
            received.append([event.event, event.data])
            if event.event == "end":
                break

    assert received == published


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with npm's eventsource in it."""
    if not HAS_TEST_EXTRA:
        pytest.skip("needs the test extra: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("node")
    command = [
        program("npm"),
        "install",
        "--no-audit",
        "--no-fund",
        "--prefix",
        str(folder),
        "eventsource@3",
    ]
    installed = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert installed.returncode == 0, installed.stderr
    return folder


NODE_CLIENT = """
const {EventSource} = require("eventsource");
const source = new EventSource(process.argv[1]), events = [];
for (let at = 0; at < process.argv[2]; at += 1) {
  source.addEventListener("type-" + at, (event) => events.push([event.type, event.data]));
}
source.addEventListener("end", (event) => {
  events.push([event.type, event.data]);
  source.close();
  console.log(JSON.stringify(events));
});
"""


def test_npms_eventsource_reads_data_exactly_as_published(
    server: ServerProcess, channel: str, node_modules: Path
) -> None:
    url = f"{server.url}/stream?channel={channel}"
    with running(program("node"), "-e", NODE_CLIENT, url, str(len(AS_PUBLISHED)), cwd=node_modules) as node:
        wait_for(lambda: server.streams() and server.redis.subscribers(channel), "node is subscribed")

        published = publish_all(server.redis, channel)

        received = json.loads(node.communicate(timeout=DEADLINE_S)[0])
    assert received == published


FLASK_SSE_PUBLISHES: dict[str, tuple[dict[str, Any], Received]] = {
    "an object with a type": ({"data": {"a": "Hello!"}, "type": "greeting"}, Received('{"a": "Hello!"}', "greeting")),
    "text": ({"data": "plain"}, Received("plain")),
    "Chinese lines": ({"data": "一\n二", "type": "new_answers"}, Received("一\n二", "new_answers")),
    "a list": ({"data": [1, None, "é"]}, Received('[1, null, "é"]')),
    "id and retry": ({"data": 7, "type": "t", "id": "seven", "retry": 4321}, Received("7", "t", "seven")),
}


@needs_test_extra
def test_flask_sse_publishes_from_a_real_flask_app_to_a_stream_of_ours(server: ServerProcess, channel: str) -> None:
    import flask
    from flask_sse import sse
    from werkzeug.serving import make_server

    app = flask.Flask("app")
    app.config["REDIS_URL"] = server.redis.url
    app.register_blueprint(sse, url_prefix="/stream")

    @app.get("/publish/<name>")
    def publish(name: str) -> str:
        sse.publish(**FLASK_SSE_PUBLISHES[name][0], channel=channel)
        return "Message sent!"

    stream = server.stream(channel)
    with make_server("127.0.0.1", 0, app, threaded=True) as flask_server:
        thread = threading.Thread(target=flask_server.serve_forever, daemon=True)
        thread.start()
        for name in FLASK_SSE_PUBLISHES:
            connection = http.client.HTTPConnection(
                "127.0.0.1",
                flask_server.port,
                timeout=DEADLINE_S,
            )
            connection.request("GET", f"/publish/{name.replace(' ', '%20')}")
            assert connection.getresponse().read() == b"Message sent!"
            connection.close()
        flask_server.shutdown()

    expected = [event for _, event in FLASK_SSE_PUBLISHES.values()]
    received = stream.take(len(expected))
    assert [event[:2] for event in received] == [event[:2] for event in expected]
    assert received[-1] == expected[-1]
    assert stream.parser.retry_ms == 4321
