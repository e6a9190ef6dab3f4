"""Pages in both of the ways in which the user interface draws nodes: on its canvas, and as elements (Vue)."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.browser import newest
from tests.browser.frontend import Frontend, open_page
from tests.host.hosts import NEWEST
from tests.host.server import Servers


@pytest.fixture(params=[((), False), (newest.FLAGS, True)], ids=["host-canvas", "newest-vue"])
def page(browser: Browser, servers: Servers, request: pytest.FixtureRequest) -> Iterator[Frontend]:
    """A fresh page, with each user interface in the way in which `opened` has not got it."""
    flags, vue = request.param
    with open_page(browser, servers(NEWEST, *flags)) as frontend:
        frontend.choose(Comfy_VueNodes_Enabled=vue)
        yield frontend


@pytest.fixture(scope="module", params=[((), True), (newest.FLAGS, False)], ids=["host-vue", "newest-canvas"])
def opened(browser: Browser, servers: Servers, request: pytest.FixtureRequest) -> Iterator[Frontend]:
    """An open page for all tests of a module, with each user interface in one of the ways: opening one takes seconds."""
    flags, vue = request.param
    with open_page(browser, servers(NEWEST, *flags)) as frontend:
        frontend.choose(Comfy_VueNodes_Enabled=vue)
        frontend.open()
        yield frontend
