"""The layers against plain formulas in float64, and at the limits of float16."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.networks import onednn
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.autoencoder_layers import ChannelNorm
from sana.networks.block import Block
from sana.networks.layers import (
    FEW_SAMPLES,
    FP16_MAX,
    Build,
    CrossAttention,
    LinearAttention,
    MixFFN,
    SinusoidEmbedding,
    scaled_dot_product,
)
from sana.networks.transformer import SanaTransformer
from tests.sana.measures import relative_error
from tests.sana.twins import FAMILIES, STRUCTURES, randomise, tiny_autoencoder_config, tiny_config

WIDTH = 96  # three heads of linear attention
DOUBLE = Build(dtype=torch.float64)


def quadratic_attention(layer: LinearAttention, x: Tensor) -> Tensor:
    """Equation 1 of arXiv 2410.10629 before its sums are rearranged: every token looks at every other, O(N^2)."""
    q, k = layer.norm_q(layer.to_q(x)).relu(), layer.norm_k(layer.to_k(x)).relu()
    q, k, v = (part.unflatten(-1, (-1, 32)) for part in (q, k, layer.to_v(x)))
    similarity = torch.einsum("bihd,bjhd->bhij", q, k)
    weights = similarity / similarity.sum(dim=-1, keepdim=True)
    return layer.to_out[0](torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 256), (2, 1), (2, 2), (2, 17), (FEW_SAMPLES + 1, 17)])
def test_linear_attention_is_the_quadratic_formula(batch: int, tokens: int, qk_norm: bool, gradients: bool) -> None:
    layer, x = randomise(LinearAttention(WIDTH, qk_norm, DOUBLE)), torch.randn(batch, tokens, WIDTH).double()
    before = x.clone()
    with torch.set_grad_enabled(gradients):
        assert relative_error(layer(x), quadratic_attention(layer, x)) < 1e-13
    assert torch.equal(x, before)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_linear_attention_is_the_same_in_float32_watched_or_not(qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, products and their ReLU are one kernel where there are no norms between."""
    monkeypatch.setattr(onednn, "LEAST_WORK", 0)
    layer, x = randomise(LinearAttention(WIDTH, qk_norm, Build(dtype=torch.float32))), torch.randn(2, 17, WIDTH)
    expected, seen = quadratic_attention(layer.double(), x.double()), []
    layer.float()
    assert relative_error(layer(x), expected) < 1e-6
    layer.to_k.register_forward_hook(lambda layer, given, made: seen.append(made.clone()))
    assert relative_error(layer(x), expected) < 1e-6
    assert bool((seen[0] < 0).any())


@pytest.mark.parametrize("gradients", [False, True])
def test_a_token_whose_query_and_keys_have_nothing_in_common_becomes_zero(gradients: bool) -> None:
    """Its denominator is zero."""
    layer, x = randomise(LinearAttention(WIDTH, False, DOUBLE)), torch.randn(2, 3, WIDTH).double()
    layer.to_q.weight.zero_()
    with torch.set_grad_enabled(gradients):
        assert torch.equal(layer(x), layer.to_out[0](torch.zeros_like(x)))


@torch.no_grad()
def test_states_of_parts_add_up() -> None:
    layer, x = randomise(LinearAttention(WIDTH, False, DOUBLE)), torch.randn(2, 30, WIDTH).double()
    state = sum(layer.state(part) for part in x.split(7, dim=1))
    parts = [layer.attend(part, state) for part in x.split(4, dim=1)]
    torch.testing.assert_close(state, layer.state(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), rtol=1e-12, atol=1e-12)


def test_identity_attention_is_value_and_projection() -> None:
    layer, x = randomise(LinearAttention(WIDTH, True, DOUBLE)), torch.randn(2, 5, WIDTH).double()
    torch.testing.assert_close(layer.identity(x), layer.to_out[0](layer.to_v(x)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("attention", [LinearAttention.forward, LinearAttention.identity])
def test_projection_is_clamped_in_every_precision(
    attention: Callable[[LinearAttention, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Weights that bring the projection to a million, as those of checkpoints trained in float16 do."""
    layer, x = randomise(LinearAttention(WIDTH, False, Build(dtype=torch.float32))), torch.randn(1, 9, WIDTH)
    layer.to_v.weight *= 30
    layer.to_out[0].weight *= 1e4
    free = layer.to_out[0](layer.to_v(x)) if attention is LinearAttention.identity else quadratic_attention(layer, x)
    out = attention(layer.to(dtype), x.to(dtype)).float()
    over = free.abs() > 1.1 * FP16_MAX
    assert over.any() and not over.all()
    largest = torch.tensor(FP16_MAX).to(dtype).item()  # bfloat16 rounds it to 65536
    torch.testing.assert_close(out[over], free[over].sign() * largest, rtol=0, atol=0)
    torch.testing.assert_close(
        out[~over], free[~over].clamp(-largest, largest), rtol=0, atol=6000
    )  # sums of 1e6, 1/256 each


@pytest.mark.parametrize("gradients", [False, True])
def test_a_network_with_norms_of_queries_and_keys_is_clamped_in_float16_alone(gradients: bool) -> None:
    """It was trained in bfloat16."""
    layer, x = randomise(LinearAttention(WIDTH, True, Build(dtype=torch.float32))), torch.randn(1, 9, WIDTH)
    layer.to_v.weight *= 30
    layer.to_out[0].weight *= 1e4
    with torch.set_grad_enabled(gradients):
        free = layer.to_out[0](layer.to_v(x))
        assert free.abs().max() > FP16_MAX and torch.equal(layer.identity(x), free)
        assert layer.half().identity(x.half()).abs().max() == FP16_MAX


def test_sums_over_tokens_do_not_overflow_in_float16() -> None:
    """4096 tokens whose keys and values are all about 30: their sums reach a million."""
    layer, x = randomise(LinearAttention(WIDTH, False, Build(dtype=torch.float16))), torch.ones(1, 4096, WIDTH).half()
    for linear in (layer.to_q, layer.to_k, layer.to_v):
        linear.weight.uniform_(0.2, 0.4)
    assert layer.state(x).max() > FP16_MAX
    expected = quadratic_attention(layer.double(), x[:, :1].double()).expand(1, 4096, WIDTH)  # all tokens are the same
    assert relative_error(layer.half()(x), expected) < 2e-3  # the rounding of float16


def test_cross_attention_ignores_masked_tokens() -> None:
    layer = randomise(CrossAttention(WIDTH, 2, True, DOUBLE))
    x, text = torch.randn(2, 5, WIDTH).double(), torch.randn(2, 7, WIDTH).double()
    mask = torch.tensor([True, False, True, True, False, False, True])

    def attend(text: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask[None, None, None]
        return layer(x, *layer.keys_values(text), mask, scaled_dot_product)

    expected = attend(text[:, mask], None)
    text[:, ~mask] = 1e3
    torch.testing.assert_close(attend(text, mask), expected, rtol=1e-12, atol=1e-12)


def test_query_and_key_norms_have_the_eps_of_nvlabs() -> None:
    """1e-5 in self-attention, 1e-6 in cross-attention (diffusers: 1e-5 in both), which small activations show."""
    block = randomise(Block(tiny_config("sana-1.5-1.6b-1024px"), DOUBLE))
    x = 1e-3 * torch.randn(1, 5, WIDTH).double()
    for attention, eps in ((block.attn1, 1e-5), (block.attn2, 1e-6)):
        for norm in (attention.norm_q, attention.norm_k):
            torch.testing.assert_close(norm(x), rms_norm(x, norm.weight, eps), rtol=1e-12, atol=0)


def test_cross_attention_is_the_formula() -> None:
    layer = randomise(CrossAttention(WIDTH, 2, True, DOUBLE))
    x, text = 1e-3 * torch.randn(1, 5, WIDTH).double(), 1e-3 * torch.randn(1, 7, WIDTH).double()
    q = rms_norm(layer.to_q(x), layer.norm_q.weight, 1e-6).unflatten(-1, (2, 48))
    k = rms_norm(layer.to_k(text), layer.norm_k.weight, 1e-6).unflatten(-1, (2, 48))
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(48)).softmax(dim=-1)
    out = torch.einsum("bhij,bjhd->bihd", weights, layer.to_v(text).unflatten(-1, (2, 48))).flatten(2)
    result = layer(x, *layer.keys_values(text), None, scaled_dot_product)
    torch.testing.assert_close(result, layer.to_out[0](out), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(4, 5), (1, 6), (6, 1), (1, 1)])
def test_mix_ffn_is_three_convolutions(rows: int, columns: int) -> None:
    layer, x = randomise(MixFFN(WIDTH, 240, DOUBLE)), torch.randn(2, rows * columns, WIDTH).double()
    image = x.transpose(1, 2).unflatten(-1, (rows, columns))
    wide = F.silu(F.conv2d(image, layer.conv_inverted.weight[..., None, None], layer.conv_inverted.bias))
    wide = F.conv2d(wide, layer.conv_depth.weight, layer.conv_depth.bias, padding=1, groups=480)
    narrow = wide[:, :240] * F.silu(wide[:, 240:])
    expected = F.conv2d(narrow, layer.conv_point.weight[..., None, None]).flatten(2).transpose(1, 2)
    with torch.no_grad():  # the activation is then applied in place, but never to the input
        kept = x.clone()
        torch.testing.assert_close(layer(x, columns), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x, kept, rtol=0, atol=0)


def test_mix_ffn_gives_the_rows_asked_for() -> None:
    layer, x = randomise(MixFFN(WIDTH, 240, DOUBLE)), torch.randn(2, 30, WIDTH).double()
    torch.testing.assert_close(layer(x, 5, slice(2, 4)), layer(x, 5)[:, 10:20], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinusoids_are_float32_in_every_precision(dtype: torch.dtype) -> None:
    """bfloat16 cannot hold 999, so the sines of a time must not be computed in it."""
    layer = SinusoidEmbedding(WIDTH, Build(dtype=dtype))
    layer.linear_1, layer.linear_2 = nn.Identity(), nn.Identity()
    times = torch.tensor([0.0, 0.25, 777.0, 999.0])
    angles = times.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    expected = F.silu(torch.cat([angles.cos(), angles.sin()], dim=1))
    # An argument of 999 in float32 is right to 6e-5.
    torch.testing.assert_close(
        layer(times, dtype).double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=2e-4
    )


class Counted:
    """Layers of `torch.nn` under other names, which tell who made them."""

    class Linear(nn.Linear):
        pass

    class Conv2d(nn.Conv2d):
        pass

    class RMSNorm(nn.RMSNorm):
        pass


@pytest.mark.parametrize("variant", STRUCTURES)
def test_every_layer_of_the_transformer_comes_from_operations(variant: str) -> None:
    network = SanaTransformer(tiny_config(variant), operations=Counted, device="meta", dtype=torch.bfloat16)
    assert_made_by_operations(network, {"scale_shift_table"}, ())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_autoencoder_comes_from_operations(family: str) -> None:
    """Batch norms and norms over channels, which no host has operations for, are the exceptions."""
    network = DCAutoencoder(tiny_autoencoder_config(family), operations=Counted, device="meta", dtype=torch.bfloat16)
    assert_made_by_operations(network, set(), (ChannelNorm, nn.BatchNorm2d))


def assert_made_by_operations(network: nn.Module, own_parameters: set[str], exceptions: tuple[type, ...]) -> None:
    made = (Counted.Linear, Counted.Conv2d, Counted.RMSNorm)
    for name, module in network.named_modules():
        parameters = {key for key, _ in module.named_parameters(recurse=False)}
        assert isinstance(module, made + exceptions) or parameters <= own_parameters, name
    assert {(p.dtype, p.device.type) for p in network.parameters()} == {(torch.bfloat16, "meta")}
