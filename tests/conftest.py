"""The tests beside the promises: their fixtures; and the whole suite is run by several processes."""

from __future__ import annotations

import os

import pytest

MAX_WORKERS = 8


def pytest_configure(config: pytest.Config) -> None:
    for name in ("tests.fixtures", "tests.browser", "tests.machine"):
        config.pluginmanager.import_plugin(name)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """As if one had said `-n 4 --dist worksteal`, where pytest-xdist is installed; `-n 0` runs one test at a time.

    Most tests wait most of the time: there may be two processes more than processors.
    """
    option = config.option
    is_whole_suite = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    is_worker = hasattr(config, "workerinput")
    is_watched = option.usepdb or option.collectonly
    has_xdist = config.pluginmanager.hasplugin("xdist")
    if is_whole_suite and has_xdist and not is_worker and not is_watched and option.numprocesses is None:
        option.numprocesses = min((os.cpu_count() or 1) + 2, MAX_WORKERS)
        option.dist = "worksteal"
