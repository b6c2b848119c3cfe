"""flask-sse as its documentation shows it, and a route that publishes through it."""

import os

from flask import Flask, request
from flask_sse import sse

app = Flask(__name__)
app.config["REDIS_URL"] = os.environ["REDIS_URL"]
app.register_blueprint(sse, url_prefix="/stream")


def publish() -> dict[str, str]:
    message = request.get_json()
    sse.publish(message["data"], channel=message["channel"])
    return {"state": "ok"}


app.add_url_rule("/publish", view_func=publish, methods=["POST"])
