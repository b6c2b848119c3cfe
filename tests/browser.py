"""Chromium, Firefox and WebKit, for the tests that need a browser, and sites for them to open."""

from __future__ import annotations

import contextlib
import http.server
import importlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import pytest

from tests.kit import DEADLINE_S, LOOPBACK, TEST_EXTRA, free_port, needs, start_process

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver


Browser: TypeAlias = "WebDriver | Firefox"


class Firefox:
    """Firefox, asked in the same way as Chromium, by the protocol that it speaks itself: Debian has no geckodriver."""

    def __init__(self, marionette: Any) -> None:
        self.marionette = marionette

    def get(self, url: str) -> None:
        self.marionette.navigate(url)

    def execute_script(self, script: str, *arguments: Any) -> Any:
        return self.marionette.execute_script(script, script_args=arguments, sandbox=None)


@contextlib.contextmanager
def firefox(folder: Path, trusts_all: bool = False) -> Iterator[Firefox]:
    """A Firefox of its own, with an empty profile."""
    driver = pytest.importorskip("marionette_driver.marionette", reason=TEST_EXTRA)
    marionette = driver.Marionette(
        host=LOOPBACK,
        port=free_port(),
        bin=needs("firefox-esr", "firefox"),
        headless=True,
        gecko_log=str(folder / "firefox.log"),
        workspace=str(folder),
    )
    try:
        marionette.start_session({"acceptInsecureCerts": trusts_all})
        yield Firefox(marionette)
    finally:
        marionette.cleanup()


@contextlib.contextmanager
def webkit(folder: Path) -> Iterator[WebDriver]:
    """Debian's WebKitGTK, in the smallest browser that there is around it, on a display that nobody sees."""
    webdriver = importlib.import_module("selenium.webdriver")
    services = importlib.import_module("selenium.webdriver.webkitgtk.service")
    webdriver_program = needs("WebKitWebDriver")
    browsers = sorted(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"))
    assert browsers, "the package webkit2gtk-driver is missing"
    command = [needs("Xvfb"), "-displayfd", "1", "-nolisten", "tcp"]
    display = start_process(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert display.stdout
    number = display.stdout.readline().decode().strip()
    assert number, "Xvfb did not start"
    options = webdriver.WebKitGTKOptions()
    options.binary_location = str(browsers[-1])
    options.add_argument("--automation")
    environment = {**os.environ, "DISPLAY": f":{number}", "HOME": str(folder)}
    driver = webdriver.WebKitGTK(options=options, service=services.Service(webdriver_program, env=environment))
    try:
        driver.set_script_timeout(DEADLINE_S)
        yield driver
    finally:
        driver.quit()
        display.terminate()


@contextlib.contextmanager
def chrome(profile: Path, trusts_all: bool = False) -> Iterator[WebDriver]:
    """A Chromium with an empty profile; trusts_all: it takes self-signed certificates."""
    webdriver = pytest.importorskip("selenium.webdriver", reason=TEST_EXTRA)
    options = webdriver.ChromeOptions()
    options.binary_location = needs("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    options.accept_insecure_certs = trusts_all
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.add_argument("--disable-background-networking")
    options.add_argument("--disable-features=BackForwardCache")  # it would keep the streams of pages that were left
    options.add_argument("--disable-dev-shm-usage")  # a container's is 64 MB
    driver = webdriver.Chrome(options, webdriver.ChromeService(needs("chromedriver")))
    try:
        driver.set_script_timeout(DEADLINE_S)
        driver.set_page_load_timeout(DEADLINE_S)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """One Chromium for all tests."""
    with chrome(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def tab(chromium: WebDriver) -> Iterator[WebDriver]:
    """The same, left on an empty page."""
    yield chromium
    chromium.get("about:blank")


@pytest.fixture(scope="session")
def second_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    """One Firefox for all tests."""
    with firefox(tmp_path_factory.mktemp("firefox")) as browser:
        yield browser


@pytest.fixture(params=["tab", "second_browser"], ids=["Chromium", "Firefox"])
def browser(request: pytest.FixtureRequest) -> Any:
    """Each browser by turns."""
    return request.getfixturevalue(request.param)


def text_of(tab: WebDriver, id_: str) -> str:
    """What stands in an element."""
    return str(tab.execute_script("return document.getElementById(arguments[0]).textContent", id_))


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Answers requests, and logs nothing."""

    def answer(self, status: int, page: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page.encode())))
        self.end_headers()
        self.wfile.write(page.encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nobody reads it."""


class Site:
    """A web site of the tests' own, on a free port: what it answers for each path."""

    def __init__(self, pages: Mapping[str, Callable[[], str]]) -> None:
        """pages: each is called anew for each request."""

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                page = pages.get(self.path.partition("?")[0])
                self.answer(200 if page else 404, page() if page else "")

        self._server = http.server.ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
