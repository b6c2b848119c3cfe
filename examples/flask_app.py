"""Private events for logged-in users: Flask decides who may listen, ssepush pushes.

    .venv/bin/pip install flask
    export SSEPUSH_SECRET=$(openssl rand -hex 32)
    .venv/bin/python ssepush.py --allow-origin http://127.0.0.1:8000 &
    .venv/bin/python examples/flask_app.py

Open http://127.0.0.1:8000/ in two browsers, log in as two people, and write to one another.

Each logged-in user gets a token for their own channel, in a cookie that no script can read. Each response of the
application renews it. When the token of a stream expires, the stream ends. The page then opens a new stream with the
new token, from where the old one ended: nothing is lost, and nothing comes twice. After logging out, a user gets no new
token, so their stream ends after TOKEN_TTL_S at the latest.
"""

from __future__ import annotations

import os
import secrets
import sys

import werkzeug
from flask import Flask, Response, redirect, render_template_string, request, session

import ssepush

TOKEN_TTL_S = int(os.environ.get("TOKEN_TTL_S", "300"))
STREAM_URL = os.environ.get("STREAM_URL", "http://127.0.0.1:5000/stream")

app = Flask(__name__)
app.secret_key = os.environ.get("FLASK_SECRET_KEY") or secrets.token_hex(32)  # signs the session cookie
app.config.update(SESSION_COOKIE_SAMESITE="Lax")


def channel_of(user: str) -> str:
    """The channel that nobody else may read."""
    return f"private-{user}"


@app.get("/")
def page() -> str:
    if "user" not in session:
        return render_template_string(LOGIN)
    user = session["user"]
    channel = channel_of(user)
    return render_template_string(PAGE, user=user, channel=channel, stream_url=STREAM_URL)


@app.post("/login")
def login() -> werkzeug.Response:
    session["user"] = request.form["user"]  # your own would also ask for a password
    return redirect("/")


@app.post("/logout")
def logout() -> werkzeug.Response:
    session.clear()
    return redirect("/")


@app.post("/notes")
def write() -> tuple[str, int]:
    text = request.form["text"]
    note = f"{session['user']}: {text}"
    channel = channel_of(request.form["to"])
    ssepush.publish(note, type="note", channel=channel)
    return "", 204


@app.post("/renew")
def renew() -> tuple[str, int]:
    """For a page whose token has expired. The new one is in the response's cookie, as in any response."""
    if "user" not in session:
        return "log in again", 401
    return "", 204


@app.after_request
def renew_token(answer: Response) -> Response:
    """Set a new token with each response, or delete it after logout."""
    if "user" not in session:
        answer.delete_cookie("ssepush-token")
        return answer
    token = ssepush.sign(channel_of(session["user"]), ttl=TOKEN_TTL_S)
    # HttpOnly: a script injected into the page cannot steal the token. Lax: requests from other sites do not carry it.
    # Cookies do not depend on the port, so ssepush gets it, too.
    answer.set_cookie(
        "ssepush-token",
        token,
        max_age=86400,  # longer than the token's life: ssepush answers an expired one with `token-expired`
        httponly=True,
        samesite="Lax",
        secure=request.is_secure,
    )
    return answer


LOGIN = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Log in</title>
<form method="post" action="/login"><label>Your name <input name="user" required></label> <button>Log in</button></form>
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ user }}'s notes</title>
<form method="post" action="/logout">{{ user }} <button>Log out</button></form>
<form id="write"><input name="to" placeholder="to" required> <input name="text" placeholder="text" required>
<button>Send</button></form>
<ol id="notes"></ol>
<script>
  const listen = (lastEventId, heartbeatS = 15) => {
    const query = new URLSearchParams({ channel: {{ channel | tojson }}, lastEventId });
    const source = new EventSource(`{{ stream_url }}?${query}`, { withCredentials: true }); // with the cookie
    const again = (pauseMs) => {
      clearTimeout(watch);
      source.close();
      setTimeout(listen, pauseMs, lastEventId, heartbeatS);
    };
    let watch = setTimeout(again, 2500 * heartbeatS, 0); // silent for two and a half heartbeats: it is dead
    const on = (type, act) => source.addEventListener(type, (event) => {
      lastEventId = event.lastEventId || lastEventId;
      act(event);
      clearTimeout(watch);
      watch = setTimeout(again, 2500 * heartbeatS, 0);
    });

    on("stream-position", (event) => { // at the start, and at each heartbeat
      if (event.data) heartbeatS = JSON.parse(event.data).heartbeat;
    });
    on("note", (event) => {
      const line = document.createElement("li");
      line.textContent = event.data;
      document.getElementById("notes").append(line);
    });

    // The last event of a stream whose token has expired. The next stream has to continue from its id.
    on("token-expired", async () => {
      const answer = await fetch("/renew", { method: "POST" }); // if it fails, the event comes again
      if (!answer.ok) return location.assign("/"); // logged out: show the login page
      if (source.readyState !== EventSource.CLOSED) again(0); // otherwise it was renewed already
    });

    // Something may be missing that ssepush cannot replay: reload the page's state.
    on("stream-reset", () => location.reload());

    // Usually the browser reconnects by itself, but not after a proxy's 502, and Firefox not if another origin is down.
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) again(1000 + 4000 * Math.random());
    };
  };
  listen("");

  document.getElementById("write").addEventListener("submit", (event) => {
    event.preventDefault();
    fetch("/notes", { method: "POST", body: new FormData(event.target) });
    event.target.reset();
  });
</script>
"""

if __name__ == "__main__":
    if not os.environ.get("SSEPUSH_SECRET"):
        sys.exit("SSEPUSH_SECRET is not set: it must be the one that ssepush was started with")
    app.run(port=int(os.environ.get("PORT", "8000")), threaded=True)
