"""Boots the host that SANA_TEST_HOST names before any module here is imported: they can `import comfy` at the top.

With SANA_TEST_DEVICE=second the host computes on a stand-in for a GPU, and the tests marked `cpu` are left out. Tests marked
`newest` run inside the newest host alone, without that stand-in: what they read does not come from the host.
"""

import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from tests.host import second_device
from tests.host.boot import ON_CPU, ON_SECOND_DEVICE, Host, boot
from tests.host.hosts import HOSTS, NEWEST

VERSION = os.environ.get("SANA_TEST_HOST", "")
if VERSION not in HOSTS:
    raise pytest.UsageError(f"set SANA_TEST_HOST to one of {', '.join(HOSTS)} to run tests inside that version")
SECOND = os.environ.get("SANA_TEST_DEVICE") == "second"
torch.set_num_threads(1)  # the networks are so small that threads wait for one another longer than they compute
FOLDER = tempfile.TemporaryDirectory(prefix="sana-host-")
if SECOND:
    import tests.host.card  # noqa: F401 - before the device is there, or diffusers would look for its kernels

    second_device.install()
HOST = boot(VERSION, Path(FOLDER.name), *(ON_SECOND_DEVICE if SECOND else ON_CPU))

if SECOND:  # exact, to be compared
    import comfy.model_management as management

    management.LORA_COMPUTE_DTYPES[management.get_torch_device()] = torch.float32

from tests.host.inprocess.small import Small, load_small  # noqa: E402 - it imports the host

collect_ignore = [] if SECOND else ["test_multigpu.py", "test_second_device.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marks = {"cpu"} if SECOND else set()
    marks |= {"newest"} if SECOND or VERSION != NEWEST else set()
    left_out = [item for item in items if marks & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


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
