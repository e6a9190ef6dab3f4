"""Fixtures shared by the tests that need a running host: servers and a browser, started when the first test asks for them.

What they need is in the environment of `python3 tests` only, so it is imported late.
"""

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.browser import newest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser.frontend import Frontend
    from tests.host.server import Server, Servers


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Servers]":
    """Call it for a server of any version and flags: servers("0.24.1", "--cache-none")."""
    from tests.host.server import Servers

    servers = Servers(tmp_path_factory.mktemp("hosts"))
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def server(servers: "Servers") -> "Server":
    """A server of the newest tested host."""
    return servers()


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """Without a Chromium the tests fail: a browser test that was skipped says nothing."""
    from tests.browser.frontend import launch

    with launch() as browser:
        yield browser


@pytest.fixture(params=[(), newest.FLAGS], ids=["frontend-of-host", f"frontend-{newest.VERSION}"])
def frontend(browser: "Browser", servers: "Servers", request: pytest.FixtureRequest) -> "Iterator[Frontend]":
    """A fresh page of the newest host, with the user interface that it brings and with the newest one."""
    from tests.browser.frontend import open_page
    from tests.host.hosts import NEWEST

    with open_page(browser, servers(NEWEST, *request.param)) as frontend:
        yield frontend


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds what the servers logged and the page complained about to the report of a test that used them and failed."""
    report = yield
    used = getattr(item, "funcargs", {})
    if report.failed and "servers" in used:
        report.sections += used["servers"].logs()
    for name in {"frontend", "opened"} & used.keys():
        if report.failed:
            report.sections.append(("messages of the page", used[name].report()))
    return report
