"""Boots the host that SANA_TEST_HOST names before any module here is imported: they can `import comfy` at the top."""

import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from tests.host.boot import Host, boot
from tests.host.hosts import HOSTS

VERSION = os.environ.get("SANA_TEST_HOST", "")
if VERSION not in HOSTS:
    raise pytest.UsageError(f"set SANA_TEST_HOST to one of {', '.join(HOSTS)} to run tests inside that version")
FOLDER = tempfile.TemporaryDirectory(prefix="sana-host-")
HOST = boot(VERSION, Path(FOLDER.name))

from tests.host.inprocess.small import Small, load_small  # noqa: E402 - it imports the host


@pytest.fixture(scope="session")
def host() -> Host:
    """The booted host."""
    return HOST


@pytest.fixture(scope="session", autouse=True)
def inference_mode() -> Iterator[None]:
    """As the host runs nodes. A test that trains leaves it: `with torch.inference_mode(False)`."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def small(host: Host) -> Small:
    """A small random model with the text encoder and the autoencoder of the demo, loaded by our node."""
    return load_small(host)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the warnings of the start, such as why the pack could not be imported, to the report of a failed test."""
    report = yield
    if report.failed:
        report.sections.append((f"start of ComfyUI {VERSION}", HOST.log))
    return report
