"""flask-sse as its documentation shows it, and a route that publishes through it."""

import os

from flask import Flask, request
from flask_sse import sse

app = Flask(__name__)
app.config["REDIS_URL"] = os.environ["REDIS_URL"]
app.register_blueprint(sse, url_prefix="/stream")


@app.post("/publish")
def publish() -> dict[str, str]:
    sse.publish(request.json["data"], channel=request.json["channel"])
    return {"state": "ok"}
