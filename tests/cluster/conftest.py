"""A Ray of two cores that the tests share, since to start one takes many times as long as to join it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

from sana.cluster import running
from tests.cluster.nodes import answers, free_port, node, wait_until
from tests.cluster.stand_ins import draw_here


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Its address."""
    if sys.platform != "linux":
        pytest.skip("Ray has clusters on Linux alone")
    port = free_port()
    with node("--head", "--num-cpus=2", f"--port={port}", "--include-dashboard=false"):
        wait_until(lambda: answers(port))
        yield f"127.0.0.1:{port}"


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, what commands give to workers is done in this process, which is many times as fast."""

    def begin() -> None:
        monkeypatch.setattr(running, "connected", lambda workers: nullcontext())
        monkeypatch.setattr(running, "draw_rows", draw_here)

    return begin


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As each worker has, since sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
