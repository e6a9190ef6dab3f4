"""A library that breaks down inside a node gives an error, and what the host itself raises passes."""

from collections.abc import Callable

import comfy.model_management
import pytest

from tests.host.boot import Host

Breaks = Callable[[BaseException], BaseException]
pytestmark = pytest.mark.newest


class PanicException(BaseException):
    """As of a library in Rust."""


@pytest.fixture
def breaks(host: Host, monkeypatch: pytest.MonkeyPatch) -> Breaks:
    """Have Load DC-AE raise something, and return what comes out of it."""

    def call(raised: BaseException) -> BaseException:
        def part_path(*_: object) -> None:
            raise raised

        monkeypatch.setattr(host.pack("nodes.loaders"), "part_path", part_path)
        with pytest.raises(BaseException) as caught:
            host.call("DCAELoader", vae="any", dtype="auto")
        return caught.value

    return call


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (PanicException("called `unwrap` on `None`\nat line 3"), "called `unwrap` on `None`"),
        (SystemExit(3), "3"),
        (GeneratorExit(), ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_exception_becomes_one(breaks: Breaks, raised: BaseException, reason: str) -> None:
    found = breaks(raised)
    assert type(found) is RuntimeError and found.__cause__ is raised
    cause = f"{type(raised).__name__}: {reason}" if reason else type(raised).__name__
    assert str(found) == f"a library broke down ({cause}); a file may be damaged: download it again"


@pytest.mark.parametrize(
    "raised",
    [ValueError("so"), MemoryError(), KeyboardInterrupt(), comfy.model_management.InterruptProcessingException()],
    ids=lambda value: type(value).__name__,
)
def test_errors_and_interrupts_pass(breaks: Breaks, raised: BaseException) -> None:
    assert breaks(raised) is raised


def test_every_node_of_ours_is_so(host: Host) -> None:
    breakdown = host.pack("nodes.host.breakdown")
    contained = breakdown.contained(type("Other", (host.pack("nodes").NODES[0],), {})).execute.__func__.__code__
    for node in host.pack("nodes").NODES:
        assert host.nodes[node.GET_SCHEMA().node_id] is node
        assert node.execute.__func__.__code__ is contained
