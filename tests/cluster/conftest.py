"""A Ray of two cores that the tests share, since to start one takes many times as long as to join it."""

import sys
from collections.abc import Iterator

import pytest

from tests.cluster.nodes import answers, free_port, node, wait_until


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Its address."""
    if sys.platform != "linux":
        pytest.skip("Ray has clusters on Linux alone")
    port = free_port()
    with node("--head", "--num-cpus=2", f"--port={port}", "--include-dashboard=false"):
        wait_until(lambda: answers(port))
        yield f"127.0.0.1:{port}"
