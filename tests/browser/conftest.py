"""Pages in both of the ways in which the user interface draws nodes: on its canvas, and as elements (Vue)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser

from tests.browser import newest
from tests.browser.frontend import Frontend, open_page
from tests.host.hosts import NEWEST
from tests.host.server import Servers


@pytest.fixture(params=[((), False), (newest.FLAGS, True)], ids=["host-canvas", "newest-vue"])
def page(browser: Browser, servers: Servers, request: pytest.FixtureRequest) -> Iterator[Frontend]:
    """A fresh page, with each user interface in the way in which `opened` has not got it."""
    with chosen_page(browser, servers, *request.param) as frontend:
        yield frontend


@pytest.fixture(scope="module", params=[((), True), (newest.FLAGS, False)], ids=["host-vue", "newest-canvas"])
def opened(browser: Browser, servers: Servers, request: pytest.FixtureRequest) -> Iterator[Frontend]:
    """An open page for all tests of a module, with each user interface in one of the ways: opening one takes seconds."""
    with chosen_page(browser, servers, *request.param) as frontend:
        frontend.open()
        yield frontend


@contextmanager
def chosen_page(browser: Browser, servers: Servers, flags: Sequence[str], vue: bool) -> Iterator[Frontend]:
    """A page of a server with these flags, whose nodes are elements or on the canvas."""
    with open_page(browser, servers(NEWEST, *flags)) as frontend:
        frontend.choose(Comfy_VueNodes_Enabled=vue)
        yield frontend
