"""A long answer, streamed word by word to every device that has it open. Reload it, or stop it.

    .venv/bin/pip install flask
    SSEPUSH_HISTORY=5000 .venv/bin/python ssepush.py &
    SSEPUSH_HISTORY=5000 .venv/bin/python examples/llm_stream.py

Open http://127.0.0.1:8001/, ask, and reload the page before the answer is complete. Then open its URL in a second
browser, and stop the answer there: it stops in both.

Each answer has a channel of its own, and a page reads it from the earliest word that is kept. So the history has to
hold a whole answer: 5,000 words here, instead of the usual 1,000 events. It is kept for a day. If you need an answer
for longer, put it into a database.

The worker does not know who reads its answer. It makes the answer once for all pages, and continues even when all are
closed. To stop it, a page sends a request to the application, since the stream goes only one way.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator

import werkzeug
from flask import Flask, redirect, render_template_string, request

import ssepush

STREAM_URL = os.environ.get("STREAM_URL", "http://127.0.0.1:5000/stream")
WORDS_PER_S = float(os.environ.get("WORDS_PER_S", "20"))
ATTEMPTS = 10

app = Flask(__name__)
stops: dict[str, threading.Event] = {}  # for answers in progress; a worker in another process would ask Redis instead


def words_of_answer(question: str) -> Iterator[str]:
    """Stands in for a language model: put yours here."""
    for number in range(1, 301):
        time.sleep(1 / WORDS_PER_S)
        end = ".\n\n" if number % 25 == 0 else " "
        yield f"word {number} about {question}{end}"


def publish(channel: str, key: str, data: str, type: str) -> None:
    """Publish exactly once: with the same key, a retry cannot duplicate a word, even if Redis's answer was lost."""
    for attempt in range(ATTEMPTS):
        try:
            ssepush.publish(data, type, channel, key=key)
            return
        except ssepush.RedisAway:
            time.sleep(2**attempt / 10)
    raise ConnectionError(f"Redis is away: {channel} ends at {key}")


def answer(name: str, question: str) -> None:
    """The worker. It could also be another program on another machine, such as a Celery task."""
    channel = f"answer-{name}"
    end = "complete"
    for number, words in enumerate(words_of_answer(question)):
        if stops[name].is_set():
            end = "stopped"
            break
        publish(channel, str(number), words, "words")
    publish(channel, "done", end, "done")
    del stops[name]


@app.get("/")
def ask() -> str:
    return render_template_string(ASK)


@app.post("/answers")
def start() -> werkzeug.Response:
    name = secrets.token_urlsafe(16)  # anyone who knows it can read the answer
    question = request.form["question"]
    stops[name] = threading.Event()
    worker = threading.Thread(target=answer, args=(name, question), daemon=True)
    worker.start()
    return redirect(f"/answers/{name}")


@app.post("/answers/<name>/stop")
def stop(name: str) -> tuple[str, int]:
    if name in stops:  # otherwise it has ended already
        stops[name].set()
    return "", 204


@app.get("/answers/<name>")
def page(name: str) -> str:
    return render_template_string(PAGE, channel=f"answer-{name}", stream_url=STREAM_URL)


ASK = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Ask</title>
<form method="post" action="/answers"><input name="question" value="everything"> <button>Ask</button></form>
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>The answer</title>
<p id="answer" style="white-space: pre-wrap"></p>
<p id="state">is being made …</p>
<button id="stop">Stop</button>
<script>
  const button = document.getElementById("stop");
  button.addEventListener("click", () => fetch(`${location.pathname}/stop`, { method: "POST" }));

  // At first from the earliest word that is kept; after an interruption, from the last word received.
  const listen = (lastEventId, heartbeatS = 15) => {
    const query = new URLSearchParams({ channel: {{ channel | tojson }}, lastEventId });
    const source = new EventSource(`{{ stream_url }}?${query}`);
    const again = (pauseMs) => {
      clearTimeout(watch);
      source.close();
      setTimeout(listen, pauseMs, lastEventId, heartbeatS);
    };
    let watch = setTimeout(again, 2500 * heartbeatS, 0); // silent for two and a half heartbeats: it is dead
    const on = (type, act) => source.addEventListener(type, (event) => {
      clearTimeout(watch);
      act(event);
      if (source.readyState !== EventSource.CLOSED) watch = setTimeout(again, 2500 * heartbeatS, 0);
    });

    on("stream-position", (event) => { // at the start, and at each heartbeat
      if (event.data) heartbeatS = JSON.parse(event.data).heartbeat;
    });
    on("words", (event) => {
      lastEventId = event.lastEventId;
      document.getElementById("answer").append(event.data);
    });
    on("done", (event) => {
      source.close();
      button.remove();
      document.getElementById("state").textContent = event.data; // complete, or stopped
    });
    on("stream-reset", () => location.reload()); // words are missing: read the answer again from the start

    // Usually the browser reconnects by itself, but not after a proxy's 502, and Firefox not if another origin is down.
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) again(1000 + 4000 * Math.random());
    };
  };
  listen("earliest");
</script>
"""

if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "8001")), threaded=True)
