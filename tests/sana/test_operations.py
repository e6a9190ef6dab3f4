"""Layers made without a host, against those of PyTorch."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sana import operations
from sana.operations import Operations


def linear(bias: bool = True) -> Operations.Linear:
    torch.manual_seed(0)
    return Operations.Linear(48, 80, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 70, 48),
        torch.randn(48),
        torch.randn(0, 7, 48),
        torch.randn(70, 2, 48).transpose(0, 1),
        torch.randn(2, 140, 96)[:, ::2, ::2],
        torch.randn(1, 1, 48).expand(2, 70, 48),
        torch.randn(2, 5, 3, 48),
    ],
    ids=["plain", "one", "none", "transposed", "every other", "expanded", "with an axis more"],
)
@torch.no_grad()
def test_linear_is_that_of_pytorch(x: Tensor, bias: bool) -> None:
    layer = linear(bias)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=2e-6)


def test_float32_on_a_cpu_goes_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else does: it knows no gradients, and what does not fit is PyTorch's to name."""
    taken = []
    onednn = operations.ONEDNN_LINEAR
    monkeypatch.setattr(operations, "ONEDNN_LINEAR", lambda x, *others: taken.append(x) or onednn(x, *others))
    x, layer = torch.randn(3, 48), linear()
    with torch.no_grad():
        layer(x)
        assert len(taken) == 1
        layer.bfloat16()(x.bfloat16())
        layer.double()(x.double())
        linear().to("meta")(x.to("meta"))
        with pytest.raises(RuntimeError, match="dtype"):
            linear()(x.double())
        with pytest.raises(RuntimeError, match="3x47 and 48x80"):
            linear()(x[:, 1:])
    linear()(x).sum().backward()
    assert len(taken) == 1


@torch.no_grad()
def test_linear_can_be_compiled() -> None:
    layer, x = linear(), torch.randn(3, 48)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=2e-6)


@torch.no_grad()
def test_without_onednn_linear_is_that_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "ONEDNN_LINEAR", None)
    layer, x = linear(), torch.randn(3, 48)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
