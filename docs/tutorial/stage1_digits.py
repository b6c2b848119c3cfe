"""Stage 1: the digits 1 to 6, over and over, two each second.

    python3 docs/tutorial/stage1_digits.py [PORT]

GET /stream is the event stream, GET / a page that shows it.
GET /stream?article makes the article's mistake.
"""

import itertools
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")


class Handler(BaseHTTPRequestHandler):
    """One request. Each runs in a thread of its own, so it may go on for ever."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.startswith("/stream"):
            self.answer_stream()
        else:
            self.start("text/html; charset=utf-8")
            self.wfile.write(PAGE.read_bytes())

    def start(self, content_type, status=200):
        """Send the head of the answer. It gives no length: the body lasts as long as the connection."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Connection", "close")
        self.end_headers()

    def answer_stream(self):
        """The whole of server push: an answer that does not end."""
        self.start("text/event-stream")
        event_end = "\n" if self.path == "/stream?article" else "\n\n"
        for digit in itertools.cycle("123456"):
            event = f"data: {digit}{event_end}"
            self.wfile.write(event.encode())
            time.sleep(0.5)


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # how many connections may wait to be accepted; the default is 5


def serve(handler, port):
    """Answer requests until Ctrl-C. A word after the file's name is the port."""
    if len(sys.argv) > 1:
        port = int(sys.argv[1])
    server = Server(("127.0.0.1", port), handler)
    print(f"open http://127.0.0.1:{server.server_port}/    stop with: Ctrl-C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    serve(Handler, 5001)
