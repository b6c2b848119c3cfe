"""The obvious server: a thread per stream, each with its own redis-py PubSub and a blocking loop."""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import redis

REDIS_URL, PORT = sys.argv[1], int(sys.argv[2])


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


class Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if self.path != "/stream":
            return
        with redis.Redis.from_url(REDIS_URL) as connection, connection.pubsub() as pubsub:
            pubsub.subscribe("sse")
            try:
                for message in pubsub.listen():
                    if message["type"] == "message":
                        self.wfile.write(b"data: " + message["data"] + b"\n\n")
            except OSError:
                pass  # the browser left

    def log_message(self, format: str, *args: object) -> None:
        pass


Server(("127.0.0.1", PORT), Handler).serve_forever()
