"""Chromium and Firefox, for the tests that need a browser: fixtures, and what they look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.engines import Firefox, firefox
from tests.kit import DEADLINE_S, TEST_EXTRA, needs

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver


def chrome(profile: Path, trusts_all: bool = False) -> WebDriver:
    """A Chromium with an empty profile."""
    webdriver = pytest.importorskip("selenium.webdriver", reason=TEST_EXTRA)
    options = webdriver.ChromeOptions()
    options.binary_location = needs("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    options.accept_insecure_certs = trusts_all
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.add_argument("--disable-background-networking")
    options.add_argument("--disable-features=BackForwardCache")  # it would keep the streams of pages that were left
    options.add_argument("--disable-dev-shm-usage")  # a container's is 64 MB
    driver: WebDriver = webdriver.Chrome(options, webdriver.ChromeService(needs("chromedriver")))
    driver.set_script_timeout(DEADLINE_S)
    driver.set_page_load_timeout(DEADLINE_S)
    return driver


@pytest.fixture
def trusting_chromium(tmp_path: Path) -> Iterator[WebDriver]:
    """A Chromium that takes self-signed certificates."""
    driver = chrome(tmp_path / "user", trusts_all=True)
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """One Chromium for all tests."""
    driver = chrome(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def tab(chromium: WebDriver) -> Iterator[WebDriver]:
    """The same, left on an empty page."""
    yield chromium
    chromium.get("about:blank")


@pytest.fixture(scope="session")
def second_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    """One Firefox for all tests, with an empty profile."""
    pytest.importorskip("marionette_driver", reason=TEST_EXTRA)
    folder = tmp_path_factory.mktemp("firefox")
    with firefox(folder) as browser:
        yield browser


@pytest.fixture(params=["tab", "second_browser"], ids=["Chromium", "Firefox"])
def browser(request: pytest.FixtureRequest) -> Any:
    """Each browser by turns."""
    return request.getfixturevalue(request.param)


def text_of(tab: WebDriver, id_: str) -> str:
    """What stands in an element."""
    return str(tab.execute_script("return document.getElementById(arguments[0]).textContent", id_))


def state_of(tab: WebDriver) -> str:
    """The page's connection: connecting, open, waiting or closed."""
    return str(tab.execute_script("return document.getElementById('state').dataset.state"))
