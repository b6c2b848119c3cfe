"""A long answer, word by word as it is made, on every device that has it open: reloading loses nothing.

    .venv/bin/pip install flask
    SSEPUSH_HISTORY=5000 .venv/bin/python ssepush.py &
    SSEPUSH_HISTORY=5000 .venv/bin/python examples/llm_stream.py

Open http://127.0.0.1:8001/, ask, and reload the page in the middle; open its address in another browser, too.

Each answer has a channel of its own, and a page reads it from the earliest word that is kept. So the history has to
hold a whole answer: 5,000 words here, instead of the usual 100 events. It is kept for a day; what has to last longer
belongs in a database.
Whoever makes the answer does not know who reads it: it goes on when all pages are closed, and is made once for all.
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


def words_of_answer(question: str) -> Iterator[str]:
    """What a language model would say, at its pace: put yours here."""
    for number in range(1, 301):
        time.sleep(1 / WORDS_PER_S)
        end = ".\n\n" if number % 25 == 0 else " "
        yield f"word {number} about {question}{end}"


def publish(channel: str, key: str, data: str, type: str) -> None:
    """Publish exactly once: with the same key, trying again cannot double a word whose answer was lost."""
    for attempt in range(ATTEMPTS):
        try:
            ssepush.publish(data, type, channel, key=key)
            return
        except ssepush.RedisAway:
            time.sleep(2**attempt / 10)
    raise ConnectionError(f"Redis is away: {channel} ends at {key}")


def answer(channel: str, question: str) -> None:
    """The worker. It could as well be another program on another machine: a Celery task, say."""
    for number, words in enumerate(words_of_answer(question)):
        publish(channel, str(number), words, "words")
    publish(channel, "done", "", "done")


@app.get("/")
def ask() -> str:
    return render_template_string(ASK)


@app.post("/answers")
def start() -> werkzeug.Response:
    name = secrets.token_urlsafe(16)  # who knows it may read the answer
    question = request.form["question"]
    worker = threading.Thread(target=answer, args=(f"answer-{name}", question), daemon=True)
    worker.start()
    return redirect(f"/answers/{name}")


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
<script>
  // At first from the earliest word that is kept; after an interruption from the last one that came.
  const listen = (lastEventId) => {
    const query = new URLSearchParams({ channel: {{ channel | tojson }}, lastEventId });
    const source = new EventSource(`{{ stream_url }}?${query}`);

    source.addEventListener("words", (event) => {
      lastEventId = event.lastEventId;
      document.getElementById("answer").append(event.data);
    });
    source.addEventListener("done", () => {
      source.close();
      document.getElementById("state").textContent = "complete";
    });
    source.addEventListener("stream-reset", () => location.reload()); // words are missing: read it again from the start

    // Mostly the browser comes back by itself. Not after a proxy's 502, nor Firefox to another origin that is away.
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) setTimeout(listen, 1000 + 4000 * Math.random(), lastEventId);
    };
  };
  listen("earliest");
</script>
"""

if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "8001")), threaded=True)
