"""Firefox and WebKit, to be asked in the same way as Chromium; and sites for them to open."""

from __future__ import annotations

import contextlib
import http.server
import importlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tests.kit import DEADLINE_S, LOOPBACK, free_port, needs, start_process


class Browser(Protocol):
    """What the tests ask of any browser."""

    def get(self, url: str) -> None: ...

    def execute_script(self, script: str, *arguments: Any) -> Any: ...


class Firefox:
    """Firefox, by the protocol that it speaks itself: Debian has no geckodriver."""

    def __init__(self, marionette: Any) -> None:
        self._marionette = marionette

    def get(self, url: str) -> None:
        self._marionette.navigate(url)

    def execute_script(self, script: str, *arguments: Any) -> Any:
        return self._marionette.execute_script(script, script_args=arguments, sandbox=None)

    def current_tab(self) -> str:
        """Its handle."""
        return str(self._marionette.current_window_handle)

    def open_tab(self) -> str:
        """One more, in front of the others; its handle."""
        opened = self._marionette.open(type="tab", focus=True)
        self.switch_to(opened["handle"])
        return self.current_tab()

    def switch_to(self, handle: str) -> None:
        self._marionette.switch_to_window(handle)

    def close_tab(self) -> None:
        """The one that is in front, with the cookies of its page's host."""
        self._marionette.delete_all_cookies()
        self._marionette.close()


@contextlib.contextmanager
def firefox(folder: Path) -> Iterator[Firefox]:
    """A Firefox of its own, with an empty profile."""
    driver = importlib.import_module("marionette_driver.marionette")
    marionette = driver.Marionette(
        host=LOOPBACK,
        port=free_port(),
        bin=needs("firefox-esr", "firefox"),
        headless=True,
        gecko_log=str(folder / "firefox.log"),
        workspace=str(folder),
    )
    try:
        marionette.start_session()
        yield Firefox(marionette)
    finally:
        marionette.cleanup()


@contextlib.contextmanager
def virtual_display() -> Iterator[str]:
    """The name of an X display that nobody sees: `":1"`. WebKit has no headless mode."""
    command = [needs("Xvfb"), "-displayfd", "1", "-nolisten", "tcp"]
    with start_process(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as display:
        assert display.stdout
        try:
            number = display.stdout.readline().decode().strip()
            assert number, "Xvfb did not start"
            yield f":{number}"
        finally:
            display.terminate()


@contextlib.contextmanager
def webkit(folder: Path) -> Iterator[Browser]:
    """Debian's WebKitGTK, in the smallest browser that there is around it."""
    webdriver = importlib.import_module("selenium.webdriver")
    services = importlib.import_module("selenium.webdriver.webkitgtk.service")
    webdriver_program = needs("WebKitWebDriver")
    browsers = sorted(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"))
    assert browsers, "the package webkit2gtk-driver is missing"
    options = webdriver.WebKitGTKOptions()
    options.binary_location = str(browsers[-1])
    options.add_argument("--automation")
    with virtual_display() as display:
        environment = {**os.environ, "DISPLAY": display, "HOME": str(folder)}
        service = services.Service(webdriver_program, env=environment)
        driver = webdriver.WebKitGTK(options=options, service=service)
        try:
            driver.set_script_timeout(DEADLINE_S)
            yield driver
        finally:
            driver.quit()


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Answers requests, and logs nothing."""

    def answer(self, status: int, page: str = "") -> None:
        body = page.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nobody reads it."""


class Site:
    """A web site of the tests' own, on a free port: what it answers for each path."""

    def __init__(self, pages: Mapping[str, Callable[[], str]]) -> None:
        """pages: each is called anew for each request."""

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path in pages:
                    self.answer(200, pages[path]())
                else:
                    self.answer(404)

        self._server = http.server.ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self._server.server_port}"

    def __enter__(self) -> Site:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
