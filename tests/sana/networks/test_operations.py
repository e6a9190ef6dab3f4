"""Layers made without a host, against those of PyTorch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.launches import counting
from sana.networks import onednn
from sana.networks.operations import Operations, addmm_relu, rectified

INPUTS, OUTPUTS = 48, 80


@pytest.fixture
def layer() -> Operations.Linear:
    torch.manual_seed(0)
    return Operations.Linear(INPUTS, OUTPUTS)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What oneDNN was given, which is asked for the smallest products, too."""
    monkeypatch.setattr(onednn, "LEAST_WORK", 0)
    found, function = [], onednn.ONEDNN_LINEAR
    monkeypatch.setattr(onednn, "ONEDNN_LINEAR", lambda x, *others: found.append(x) or function(x, *others))
    return found


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 70, INPUTS),
        torch.randn(INPUTS),
        torch.randn(0, 7, INPUTS),
        torch.randn(70, 2, INPUTS).transpose(0, 1),
        torch.randn(2, 140, 2 * INPUTS)[:, ::2, ::2],
        torch.randn(1, 1, INPUTS).expand(2, 70, INPUTS),
        torch.randn(2, 5, 3, INPUTS),
    ],
    ids=["plain", "one", "none", "transposed", "every other", "expanded", "with an axis more"],
)
@torch.no_grad()
def test_linear_is_that_of_pytorch(layer: Operations.Linear, taken: list[Tensor], x: Tensor) -> None:
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=2e-6)
    layer.bias = None
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=0, atol=2e-6)
    assert len(taken) == 2


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.randn(INPUTS, OUTPUTS).T, torch.randn(OUTPUTS)),
        (torch.randn(2 * OUTPUTS, INPUTS)[::2], torch.randn(2 * OUTPUTS)[OUTPUTS:]),
        (torch.randn(OUTPUTS, INPUTS), torch.randn(2 * OUTPUTS)[::2]),
        (torch.randn(OUTPUTS, INPUTS), torch.randn(1).expand(OUTPUTS)),
    ],
    ids=["transposed", "parts of others", "a bias with gaps", "an expanded bias"],
)
@torch.no_grad()
def test_weights_may_be_views(layer: Operations.Linear, weight: Tensor, bias: Tensor) -> None:
    x = torch.randn(2, 70, INPUTS)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias), rtol=0, atol=2e-5)


@torch.no_grad()
def test_linear_in_bfloat16_with_a_bias_is_that_of_pytorch(layer: Operations.Linear, taken: list[Tensor]) -> None:
    layer.to(torch.bfloat16)
    x = torch.randn(2, 70, INPUTS, dtype=torch.bfloat16)
    expected = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(layer(x).float(), expected, rtol=2**-8, atol=1e-3)
    assert len(taken) == onednn.ONEDNN_HAS_BFLOAT16
    layer.bias = None
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert len(taken) == onednn.ONEDNN_HAS_BFLOAT16


@torch.no_grad()
def test_small_products_are_left_to_pytorch(
    layer: Operations.Linear, taken: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "LEAST_WORK", 6 * INPUTS * OUTPUTS)
    for rows, count in ((5, 0), (6, 1)):
        x = torch.randn(rows, INPUTS)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=2e-6)
        assert len(taken) == count


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@torch.no_grad()
def test_other_types_are_left_to_pytorch(layer: Operations.Linear, taken: list[Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(3, INPUTS, dtype=dtype)
    assert torch.equal(layer.to(dtype)(x), F.linear(x, layer.weight, layer.bias))
    assert not taken


@torch.no_grad()
def test_what_does_not_fit_is_named_by_pytorch(layer: Operations.Linear) -> None:
    for x, message in (
        (torch.randn(3, INPUTS).double(), "dtype"),
        (torch.randn(3, INPUTS - 1), "3x47 and 48x80"),
        (torch.tensor(1.0), "1D"),
        (torch.randn(3, INPUTS, device="meta"), "meta"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer(x)


def autocast(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def tangent(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]


WATCHERS = {
    "compiler": lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True)(x),
    "tracer": lambda layer, x: torch.jit.trace(layer, x, check_trace=False)(x),
    "autocast": autocast,
    "tangents": tangent,
    "gradients": torch.enable_grad()(lambda layer, x: torch.autograd.grad(layer(x).sum(), layer.weight)[0]),
}


@pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS)
@torch.no_grad()
def test_whoever_watches_sees_the_linear_of_pytorch(
    layer: Operations.Linear, taken: list[Tensor], watch: Callable[[nn.Linear, Tensor], Tensor]
) -> None:
    plain, x = nn.Linear(INPUTS, OUTPUTS), torch.randn(3, INPUTS)
    plain.load_state_dict(layer.state_dict())
    found, expected = watch(layer, x), watch(plain, x)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert not taken


@torch.no_grad()
def test_without_onednn_linear_is_that_of_pytorch(layer: Operations.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "ONEDNN_LINEAR", None)
    x = torch.randn(3, INPUTS)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rms_norm_keeps_the_dtype_of_what_comes_in(dtype: torch.dtype) -> None:
    """As in training with autocast, where weights are float32: PyTorch's own warns there, and gives float32."""
    norm = Operations.RMSNorm(INPUTS, eps=1e-5)
    norm.weight.copy_(torch.randn(INPUTS))
    x = torch.randn(3, INPUTS, dtype=dtype)
    expected = F.rms_norm(x.float(), (INPUTS,), norm.weight, 1e-5)
    found = norm(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_product_is_rectified_by_its_own_kernel(
    taken: list[Tensor], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU by oneDNN; the kernel of a GPU is counted on meta, and its numbers are those of PyTorch's on a CPU."""
    torch.manual_seed(0)
    layer, x = Operations.Linear(INPUTS, OUTPUTS, bias=bias), torch.randn(2, 7, INPUTS)
    expected = layer(x).relu()
    taken.clear()
    torch.testing.assert_close(rectified(layer, x), expected, rtol=0, atol=2e-6)
    assert len(taken) == 1
    torch.testing.assert_close(addmm_relu(x, layer.weight, layer.bias), expected, rtol=0, atol=2e-6)
    with counting() as counted:
        found = rectified(layer.to("meta"), x.to("meta"))
    assert counted.kernels["_addmm_activation"] == 1 and found.shape == expected.shape
    assert rectified(layer, x.to("meta", torch.bfloat16)) is None
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert rectified(layer, x.to("meta")) is None


@torch.no_grad()
@pytest.mark.usefixtures("taken")
def test_a_layer_that_does_more_than_its_product_is_not_passed_over(layer: Operations.Linear) -> None:
    x = torch.randn(2, 7, INPUTS)
    for watch in (
        lambda: layer.register_forward_hook(lambda *given: None),
        lambda: layer.register_forward_pre_hook(lambda *given: None),
        lambda: nn.modules.module.register_module_forward_hook(lambda *given: None),
        lambda: nn.modules.module.register_module_forward_pre_hook(lambda *given: None),
    ):
        handle = watch()
        assert rectified(layer, x) is None
        handle.remove()
        assert rectified(layer, x) is not None
    assert rectified(nn.Linear(INPUTS, OUTPUTS), x) is None
    assert rectified(layer, x.double()) is None
    layer.forward = lambda x: x
    assert rectified(layer, x) is None
