"""Guidance against its formulas, written out with whole forward passes of a tiny transformer."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sana.networks.layers import LinearAttention
from sana.networks.transformer import SanaTransformer
from sana.sampling.guidance import (
    GUIDANCE_EMBED_SCALE,
    Condition,
    Guidance,
    MaskConvention,
    Velocity,
    guided_denoiser,
    inpainting_denoiser,
    scm_denoiser,
)
from sana.sampling.schedule import flow_sigmas
from tests.sana.models import SPRINT, TEXT_WIDTH, transformer

SIGMA = torch.tensor(0.6)
ROUNDING = {"rtol": 0, "atol": 2e-5}  # float32, velocities of size 1 times a guidance scale


@pytest.fixture(scope="module")
def network() -> SanaTransformer:
    return transformer()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def condition(lengths: list[int], seed: int) -> Condition:
    """Texts of the given lengths, followed by padding that is not zero."""
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    return Condition(drawn(len(lengths), 12, TEXT_WIDTH, seed=seed), mask)


X = drawn(2, 32, 2, 3)
COND, UNCOND = condition([5, 9], 1), condition([1, 1], 2)


def counted(network: SanaTransformer) -> tuple[Velocity, list[int]]:
    """The velocity of a network, and the batch sizes it was asked for."""
    batches: list[int] = []

    def velocity(x: Tensor, *arguments: object, **options: object) -> Tensor:
        batches.append(len(x))
        return network.velocity(x, *arguments, **options)

    return velocity, batches


def forward(network: SanaTransformer, text: Tensor, text_mask: Tensor, sigma: Tensor = SIGMA) -> Tensor:
    return network(X, (1000 * sigma).expand(2), text, text_mask)


def test_scale_one_needs_no_negative_and_one_evaluation(network: SanaTransformer) -> None:
    velocity, batches = counted(network)
    denoised = guided_denoiser(network, COND, None, Guidance(1.0), velocity=velocity)(X, SIGMA)
    torch.testing.assert_close(denoised, X - SIGMA * forward(network, *COND), **ROUNDING)
    assert batches == [2]


@pytest.mark.parametrize("scale", [0.0, 2.5, 4.5, -1.0])
@pytest.mark.parametrize("convention", ["nvlabs", "diffusers"])
def test_the_unconditional_half_has_the_mask_of_its_convention(
    network: SanaTransformer, convention: MaskConvention, scale: float
) -> None:
    velocity, batches = counted(network)
    denoised = guided_denoiser(network, COND, UNCOND, Guidance(scale, mask_convention=convention), velocity=velocity)(
        X, SIGMA
    )
    mask = COND.text_mask if convention == "nvlabs" else UNCOND.text_mask
    v_uncond, v_cond = forward(network, UNCOND.text, mask), forward(network, *COND)
    expected = X - SIGMA * (v_uncond + scale * (v_cond - v_uncond))
    torch.testing.assert_close(denoised, expected, **ROUNDING)
    assert batches == [4]


def test_the_two_conventions_differ(network: SanaTransformer) -> None:
    denoised = [
        guided_denoiser(network, COND, UNCOND, Guidance(mask_convention=convention))(X, SIGMA)
        for convention in ("nvlabs", "diffusers")
    ]
    assert (denoised[0] - denoised[1]).abs().mean() > 0.05


def test_nvlabs_cuts_a_long_negative_to_the_length_of_the_prompt(network: SanaTransformer) -> None:
    long = condition([12, 12], 3)
    changed = Condition(long.text.clone(), long.text_mask)
    changed.text[0, 5:] = 7.0
    changed.text[1, 9:] = 7.0
    found = [guided_denoiser(network, COND, uncond, Guidance())(X, SIGMA) for uncond in (long, changed)]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("interval", "sigma", "acts"),
    [
        ((0.25, 0.75), 0.5, True),
        ((0.25, 0.75), 0.25, False),
        ((0.25, 0.75), 0.75, False),
        ((0.25, 0.75), 0.9, False),
        ((0.25, 0.75), 0.1, False),
        ((0.0, 1.0), 0.999, True),
        ((0.0, 1.0), 0.001, True),
    ],
)
def test_guidance_acts_strictly_inside_its_interval(
    network: SanaTransformer, interval: tuple[float, float], sigma: float, acts: bool
) -> None:
    velocity, batches = counted(network)
    guidance = Guidance(4.5, interval, perturbed_scale=2.0, perturbed_blocks=frozenset({1}))
    denoised = guided_denoiser(network, COND, UNCOND, guidance, velocity=velocity)(X, torch.tensor(sigma))
    assert batches == ([4, 2] if acts else [2])
    plain = X - sigma * forward(network, *COND, torch.tensor(sigma))
    assert acts or torch.allclose(denoised, plain, **ROUNDING)


def test_guidance_acts_everywhere_unless_told_otherwise(network: SanaTransformer) -> None:
    """Flow-Euler starts at pure noise, sigma = 1, and both references guide that step."""
    velocity, batches = counted(network)
    guided_denoiser(network, COND, UNCOND, Guidance(), velocity=velocity)(X, torch.tensor(1.0))
    assert batches == [4]


def perturbed(network: SanaTransformer, blocks: set[int]) -> SanaTransformer:
    """A copy of a network with identity attention in some blocks: every token keeps its own value."""

    def keep_value(layer: LinearAttention) -> Callable[[Tensor], Tensor]:
        return lambda x: layer.to_out[0](layer.to_v(x))

    network = copy.deepcopy(network)
    for block in blocks:
        layer = network.transformer_blocks[block].attn1
        layer.forward = keep_value(layer)
    return network


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("blocks", [{0}, {1}, {0, 2}])
def test_perturbed_attention_adds_the_difference_to_identity_attention(
    network: SanaTransformer, blocks: set[int], scale: float
) -> None:
    guidance = Guidance(scale, perturbed_scale=3.0, perturbed_blocks=frozenset(blocks))
    denoised = guided_denoiser(network, COND, None if scale == 1 else UNCOND, guidance)(X, SIGMA)
    v_cond, v_uncond = forward(network, *COND), forward(network, UNCOND.text, COND.text_mask)
    away = v_cond - forward(perturbed(network, blocks), *COND)
    assert away.abs().mean() > 0.05
    expected = X - SIGMA * (v_uncond + scale * (v_cond - v_uncond) + 3.0 * away)
    torch.testing.assert_close(denoised, expected, **ROUNDING)


def test_modulation_computed_for_a_whole_schedule_is_that_of_each_step(network: SanaTransformer) -> None:
    sigmas = flow_sigmas(20, 3.0)
    at_once = guided_denoiser(network, COND, UNCOND, Guidance(), sigmas=sigmas)
    one_by_one = guided_denoiser(network, COND, UNCOND, Guidance())
    for sigma in [*sigmas[:-1], SIGMA]:  # the last one is not in the schedule
        torch.testing.assert_close(at_once(X, sigma), one_by_one(X, sigma), **ROUNDING)


def test_bfloat16_weights_take_and_give_float32(network: SanaTransformer) -> None:
    exact = guided_denoiser(network, COND, UNCOND, Guidance(2.0))(X, SIGMA)
    rounded = guided_denoiser(copy.deepcopy(network).bfloat16(), COND, UNCOND, Guidance(2.0))(X, SIGMA)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.05  # 8 bits of mantissa, three blocks, twice the difference


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("angle", [1.5708, 1.3, 0.4])
def test_scm_denoiser_is_the_trigonometric_form_of_the_flow(angle: float, guidance_scale: float) -> None:
    """NVlabs/Sana diffusion/model/nets/sana_multi_scale.py, SanaMSCM: written out, in float64."""
    network = transformer(SPRINT)
    x = 0.5 * X
    a = math.sin(angle) / (math.sin(angle) + math.cos(angle))
    norm = math.sqrt(a**2 + (1 - a) ** 2)
    flow_x = x / 0.5 * norm
    guidance_embed = torch.full((2,), 0.1 * guidance_scale)
    v = network(flow_x, torch.full((2,), a), *COND, guidance_embed)
    f = ((1 - 2 * a) * flow_x + (1 - 2 * a + 2 * a**2) * v) / norm
    denoised = 0.5 * scm_denoiser(network, COND, guidance_scale)(flow_x, torch.tensor(a))
    torch.testing.assert_close(denoised, math.cos(angle) * x - math.sin(angle) * 0.5 * f, **ROUNDING)
    assert GUIDANCE_EMBED_SCALE == 0.1


def test_inpainting_keeps_what_is_outside_the_mask_exactly(network: SanaTransformer) -> None:
    clean, noise = drawn(2, 32, 2, 3, seed=5), drawn(2, 32, 2, 3, seed=6)
    mask = torch.zeros(2, 1, 2, 3)
    mask[..., 1:] = 1
    asked: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(x)
        return 2 * x

    denoised = inpainting_denoiser(denoise, clean, noise, mask)(X, SIGMA)
    torch.testing.assert_close(asked[0][..., :1], (0.4 * clean + 0.6 * noise)[..., :1])
    assert torch.equal(asked[0][..., 1:], X[..., 1:])
    assert torch.equal(denoised[..., :1], clean[..., :1])
    assert torch.equal(denoised[..., 1:], 2 * X[..., 1:])


def test_a_grey_mask_mixes() -> None:
    clean, noise = torch.zeros_like(X), drawn(2, 32, 2, 3, seed=6)
    denoised = inpainting_denoiser(lambda x, sigma: torch.ones_like(x), clean, noise, torch.full((2, 1, 2, 3), 0.25))
    torch.testing.assert_close(denoised(X, SIGMA), torch.full_like(X, 0.25))


@pytest.mark.parametrize("name", ["guidance_scale", "pag_scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_scale_must_be_a_number(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be a finite number, such as 4.5$"):
        Guidance(value) if name == "guidance_scale" else Guidance(perturbed_scale=value)


@pytest.mark.parametrize(
    "interval", [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0), (0.0, math.nan)]
)
def test_an_interval_must_rise_within_0_and_1(interval: tuple[float, float]) -> None:
    with pytest.raises(
        ValueError, match=r"^guidance acts from .* to .*; these must be two rising numbers within 0 and 1$"
    ):
        Guidance(interval=interval)


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(ValueError, match="^mask_convention is 'official'; use 'nvlabs' or 'diffusers'$"):
        Guidance(mask_convention="official")


def test_a_missing_negative_is_named(network: SanaTransformer) -> None:
    message = "^guidance needs a negative prompt, which may be empty; or set guidance_scale to 1$"
    with pytest.raises(ValueError, match=message):
        guided_denoiser(network, COND, None, Guidance())


@pytest.mark.parametrize("blocks", [{3}, {0, 8}, {-1}])
def test_an_unknown_block_is_named(network: SanaTransformer, blocks: set[int]) -> None:
    wrong = min(blocks - {0, 1, 2})
    with pytest.raises(ValueError, match=f"^block {wrong} does not exist; the transformer has blocks 0 to 2$"):
        guided_denoiser(network, COND, UNCOND, Guidance(perturbed_scale=1.0, perturbed_blocks=frozenset(blocks)))
