"""Show the progress of a Celery task on a page, and its result.

    .venv/bin/pip install flask 'celery[redis]'
    .venv/bin/python ssepush.py &
    cd examples
    ../.venv/bin/celery -A celery_app:celery worker &
    ../.venv/bin/python celery_app.py

Open http://127.0.0.1:8002/, and ask for a report. If you reload the page, it still shows how the report ends.

Each task has a channel of its own, named after its id, which nobody can guess. The page reads that channel from its
earliest event, so it does not matter whether the task or the page is faster.
"""

# mypy: disable-error-code=untyped-decorator

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery, signals, states
from flask import Flask, render_template_string

import ssepush

STREAM_URL = os.environ.get("STREAM_URL", "http://127.0.0.1:5000/stream")
ROW_S = float(os.environ.get("ROW_S", "0.5"))

celery = Celery("celery_app", broker=os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"))
app = Flask(__name__)


@celery.task(bind=True)
def make_report(self: Any, rows: int) -> str:
    for done in range(1, rows + 1):
        time.sleep(ROW_S)  # your work
        ssepush.publish({"done": done, "of": rows}, type="progress", channel=f"answer-{self.request.id}")
    return f"{rows} rows, and {100 // rows} % each"


@signals.task_postrun.connect
def tell_the_page(task_id: str, state: str, retval: Any, **kwargs: Any) -> None:
    """Publish that a task has ended, with its result or the reason why it failed. The key makes this happen once."""
    if state in states.READY_STATES:  # not if it will be retried
        result = retval if state == states.SUCCESS else str(retval)
        ssepush.publish({"state": state, "result": result}, type="ended", channel=f"answer-{task_id}", key=task_id)


@app.get("/")
def page() -> str:
    return render_template_string(PAGE, stream_url=STREAM_URL)


@app.post("/reports/<int:rows>")
def start(rows: int) -> dict[str, str]:
    return {"task": make_report.delay(rows).id}


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>A report</title>
<button id="start" value="5">A report</button> <button id="fail" value="0">One that fails</button>
<p id="state"></p>
<script>
  const say = (text) => { document.getElementById("state").textContent = text; };

  const listen = (task) => {
    const source = new EventSource(`{{ stream_url }}?channel=answer-${task}&lastEventId=earliest`);
    source.addEventListener("progress", (event) => {
      const { done, of } = JSON.parse(event.data);
      say(`row ${done} of ${of}`);
    });
    source.addEventListener("ended", (event) => {
      source.close();
      const { state, result } = JSON.parse(event.data);
      say(`${state}: ${result}`);
    });
    source.onerror = () => { // usually the browser reconnects by itself
      if (source.readyState === EventSource.CLOSED) setTimeout(listen, 1000 + 4000 * Math.random(), task);
    };
  };

  const begin = async (event) => {
    say("waiting for a worker …");
    const answer = await fetch(`/reports/${event.target.value}`, { method: "POST" });
    const { task } = await answer.json();
    location.hash = task; // for when the page is reloaded
    listen(task);
  };
  document.querySelectorAll("button").forEach((button) => button.addEventListener("click", begin));
  if (location.hash) listen(location.hash.slice(1));
</script>
"""

if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "8002")), threaded=True)
