"""The transformer against diffusers' SanaTransformer2DModel, and its parts against the whole."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from sana.config import VARIANTS, TransformerConfig
from sana.networks.block import Block, block_modulation
from sana.networks.layers import Build
from sana.networks.transformer import Modulation, SanaTransformer, compact_text, position_table
from tests.sana.measures import peak_bytes, relative_error
from tests.sana.twins import (
    STRUCTURES,
    as_linear,
    diffusers_transformer,
    randomise,
    tiny_config,
    transformer_pair,
)

TOLERANCE = 1e-5  # relative L2 in float32: sums in another order. Measured: 2e-6 with query and key norms, else 5e-7
SIZES = ((1, 1, 1), (1, 4, 4), (2, 3, 5), (3, 1, 7), (2, 7, 1))  # batch, rows, columns


class Inputs:
    """Random arguments of a transformer."""

    def __init__(self, config: TransformerConfig, batch: int = 2, rows: int = 3, columns: int = 5, tokens: int = 8):
        self.x = torch.randn(batch, config.channels, rows, columns)
        self.text = torch.randn(batch, tokens, config.text_width)
        self.mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1))
        self.timestep = torch.rand(batch) if config.continuous_time else torch.randint(0, 1000, (batch,)).float()
        self.guidance_embed = torch.rand(batch) if config.guidance_embed else None

    def to_ours(self, network: SanaTransformer, max_bytes: int = 2**30) -> Tensor:
        return network(self.x, self.timestep, self.text, self.mask, self.guidance_embed, max_bytes=max_bytes)

    def to_theirs(self, network: SanaTransformer2DModel) -> Tensor:
        mask = None if self.mask is None else self.mask.float()
        return network(
            self.x, self.text, self.timestep, guidance=self.guidance_embed, encoder_attention_mask=mask
        ).sample


def velocity(network: SanaTransformer, inputs: Inputs, max_bytes: int = 2**30, **more: object) -> Tensor:
    """By the parts of `forward`, without gradients."""
    with torch.no_grad():
        modulation = network.modulation(inputs.timestep, inputs.guidance_embed)
        context = network.text_context(inputs.text, inputs.mask)
        return network.velocity(inputs.x, modulation, context, max_bytes=max_bytes, **more)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", STRUCTURES)
def test_equals_diffusers(variant: str, size: tuple[int, int, int]) -> None:
    config = tiny_config(variant)
    ours, theirs = transformer_pair(config)
    inputs = Inputs(config, *size)
    expected = inputs.to_theirs(theirs)
    assert relative_error(inputs.to_ours(ours), expected) < TOLERANCE
    assert relative_error(velocity(ours, inputs), expected) < TOLERANCE


@pytest.mark.parametrize("length", range(1, 11))
def test_equals_diffusers_at_every_length_of_text(length: int) -> None:
    """The second text of the batch is always seven tokens long."""
    ours, theirs = transformer_pair(config := tiny_config("sana-0.6b-1024px"))
    inputs = Inputs(config, tokens=10)
    inputs.mask = torch.arange(10) < torch.tensor([[length], [7]])
    assert relative_error(inputs.to_ours(ours), inputs.to_theirs(theirs)) < TOLERANCE


@pytest.mark.parametrize(
    "mask",
    [
        [[0, 1, 0, 1, 1], [1, 0, 0, 1, 0]],  # tokens that count are anywhere, three and two of them
        [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]],  # as many in both
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0]],  # none: an additive mask lifts all scores alike, so all count
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    ],
)
def test_equals_diffusers_with_any_mask(mask: list[list[int]]) -> None:
    ours, theirs = transformer_pair(config := tiny_config("sana-1.5-1.6b-1024px"))
    inputs = Inputs(config, tokens=5)
    inputs.mask = torch.tensor(mask).bool()
    # Scores of a text that counts nowhere are 10000 less in diffusers, which rounds them to 1e-3.
    tolerance = 1e-3 if not inputs.mask.any(dim=1).all() else TOLERANCE
    assert relative_error(inputs.to_ours(ours), inputs.to_theirs(theirs)) < tolerance


def test_a_text_that_counts_nowhere_counts_everywhere() -> None:
    ours, _ = transformer_pair(config := tiny_config("sana-0.6b-1024px"))
    inputs = Inputs(config)
    inputs.mask = torch.zeros_like(inputs.mask)
    nowhere = inputs.to_ours(ours)
    inputs.mask = None
    torch.testing.assert_close(inputs.to_ours(ours), nowhere, rtol=0, atol=0)


def test_masked_tokens_are_not_computed() -> None:
    text = torch.arange(2 * 6 * 1.0).view(2, 6, 1)
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]).bool()
    kept, kept_mask = compact_text(text, mask)
    assert kept.shape == (2, 3, 1) and kept_mask.tolist() == [[[[True, True, True]]], [[[True, False, False]]]]
    assert kept[0].flatten().tolist() == [1, 3, 4] and kept[1, 0] == 11
    assert compact_text(text, torch.eye(2, 6).bool())[1] is None  # one token each: nothing to mask
    assert compact_text(text, None) == (text, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_timestep_is_floored(dtype: torch.dtype) -> None:
    ours, theirs = transformer_pair(config := tiny_config("sana-0.6b-1024px"))
    inputs = Inputs(config)
    inputs.timestep = torch.tensor([777, 0])
    expected = inputs.to_theirs(theirs)
    inputs.timestep = torch.tensor([777.9, 0.999]).to(dtype)
    assert relative_error(inputs.to_ours(ours), expected) < TOLERANCE


def test_time_of_sprint_is_not_floored() -> None:
    ours, _ = transformer_pair(config := tiny_config("sana-sprint-0.6b-1024px"))
    inputs = Inputs(config)
    inputs.timestep = torch.tensor([0.2, 0.7])
    first = inputs.to_ours(ours)
    inputs.timestep = torch.tensor([0.3, 0.7])
    error = (inputs.to_ours(ours) - first).flatten(1).norm(dim=1)
    assert error[0] > 0.1 and error[1] < 1e-4


def test_sprint_teacher_has_continuous_time_without_guidance() -> None:
    config = replace(tiny_config("sana-1.5-1.6b-1024px"), continuous_time=True)
    ours, theirs = transformer_pair(config)
    inputs = Inputs(config)
    assert relative_error(inputs.to_ours(ours), inputs.to_theirs(theirs)) < TOLERANCE


@torch.no_grad()
def test_positions_are_in_the_dtype_of_the_tokens() -> None:
    """Which is another than that of the latent under autocast, as in training; where they are given, too."""
    ours = randomise(SanaTransformer(tiny_config("sana-1.6b-2048px")))
    x = torch.randn(1, ours.config.channels, 2, 3)
    exact = ours.embed(x)
    with torch.autocast("cpu", torch.bfloat16):
        for positions in (None, ours.positions(x)):
            found = ours.embed(x, positions)
            assert found.dtype == torch.bfloat16 and relative_error(found, exact) < 1e-2


@pytest.mark.parametrize("size", [(64, 64), (3, 5), (5, 3), (1, 7), (40, 24)])
@pytest.mark.parametrize("variant", ["sana-1.6b-2048px", "sana-1.6b-4096px"])
def test_position_table_is_stretched_to_the_size(variant: str, size: tuple[int, int]) -> None:
    """Columns in the first half of the channels, rows in the second, whatever was computed before."""
    config = tiny_config(variant)
    rows, columns = size
    table = position_table(rows, columns, config).view(rows, columns, 2, 2, 24).double()
    omega = 10000 ** (-torch.arange(24).double() / 24)
    for axis, (count, half) in enumerate(((rows, 1), (columns, 0))):
        position = torch.arange(count) * config.position_base / count / config.position_interpolation
        angles = position.double()[:, None] * omega
        waves = torch.stack([angles.sin(), angles.cos()], dim=1)
        expected = waves[:, None] if axis == 0 else waves[None]
        expected = expected.expand(rows, columns, 2, 24)
        torch.testing.assert_close(table[:, :, half], expected, rtol=0, atol=2e-5)  # coordinates up to 128 in float32


@pytest.mark.parametrize("variant", STRUCTURES)
def test_gradients_equal_those_of_diffusers(variant: str) -> None:
    config = tiny_config(variant, depth=2)
    ours, theirs = transformer_pair(config)
    inputs = Inputs(config)
    ours.requires_grad_(True), theirs.requires_grad_(True)
    inputs.x.requires_grad_(True), inputs.text.requires_grad_(True)
    weights = torch.randn_like(inputs.x)

    def gradients(out: Tensor, network: nn.Module) -> dict[str, Tensor]:
        named = {"x": inputs.x, "text": inputs.text, **dict(network.named_parameters())}
        return dict(zip(named, torch.autograd.grad((out * weights).sum(), list(named.values())), strict=True))

    expected = as_linear(gradients(inputs.to_theirs(theirs), theirs))
    found = gradients(inputs.to_ours(ours, max_bytes=1), ours)  # bands are for use without gradients
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Without norms, a bias of keys lifts all scores alike and has no influence.
        without_influence = name.endswith("attn2.to_k.bias") and not config.qk_norm
        if without_influence:
            assert found[name].norm() < 1e-3 and gradient.norm() < 1e-3
        else:
            assert relative_error(found[name], gradient) < 1e-4, name


@pytest.mark.parametrize("variant", STRUCTURES)
def test_error_of_bfloat16_is_not_above_that_of_diffusers(variant: str) -> None:
    """To the float32 result of the same rounded weights and inputs."""
    config = tiny_config(variant, depth=6)
    ours, theirs = transformer_pair(config)
    ours.bfloat16(), theirs.bfloat16()
    inputs = Inputs(config, 2, 16, 16)
    inputs.x, inputs.text = inputs.x.bfloat16(), inputs.text.bfloat16()
    truth = copy.deepcopy(ours).float()
    expected = truth(inputs.x.float(), inputs.timestep, inputs.text.float(), inputs.mask, inputs.guidance_embed)
    error = relative_error(inputs.to_ours(ours), expected)
    assert error < 1.2 * relative_error(inputs.to_theirs(theirs), expected)
    assert error < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_result_has_the_dtype_of_the_latent(dtype: torch.dtype) -> None:
    ours, _ = transformer_pair(config := tiny_config("sana-0.6b-1024px"))
    inputs = Inputs(config)
    expected = inputs.to_ours(ours)
    result = inputs.to_ours(ours.to(dtype))
    assert result.dtype == torch.float32 and relative_error(result, expected) < 0.03


# Bands


@pytest.mark.parametrize("variant", ["sana-0.6b-1024px", "sana-1.6b-4096px", "sana-sprint-0.6b-1024px"])
@pytest.mark.parametrize("size", [(1, 16, 16), (2, 24, 8), (1, 33, 5), (2, 1, 9)])
def test_bands_give_the_same(variant: str, size: tuple[int, int, int]) -> None:
    config = tiny_config(variant)
    ours, _ = transformer_pair(config)
    inputs = Inputs(config, *size)
    whole = velocity(ours, inputs)
    kept = inputs.x.clone()
    for divisor in (1, 2, 3, 4, 10**9):  # down to one row at a time
        max_bytes = bytes_of_all_rows(ours, inputs.x) // divisor
        assert relative_error(velocity(ours, inputs, max_bytes - 1), whole) < 1e-6
    assert ours.band_rows(inputs.x.shape, 4, 1) == 1
    torch.testing.assert_close(inputs.x, kept, rtol=0, atol=0)


def bytes_of_all_rows(network: SanaTransformer, x: Tensor) -> int:
    """The least max_bytes at which nothing is split."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if network.band_rows(x.shape, x.element_size(), middle) is None else (middle, high)
    return high


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["sana-0.6b-1024px", "sana-1.6b-4096px"])
def test_bands_keep_within_the_bound(variant: str, dtype: torch.dtype) -> None:
    """Measured, wherever bands of more than one row can keep within it."""
    config = tiny_config(variant, depth=2)
    ours, _ = transformer_pair(config)
    inputs = Inputs(config, 1, 64, 32)
    inputs.x, inputs.text = inputs.x.to(dtype), inputs.text.to(dtype)
    ours.to(dtype)
    for divisor in (1, 1.01, 2, 3, 4):
        max_bytes = int(bytes_of_all_rows(ours, inputs.x) / divisor)
        assert divisor == 1 or ours.band_rows(inputs.x.shape, inputs.x.element_size(), max_bytes) > 1
        _, peak = peak_bytes(lambda max_bytes=max_bytes: velocity(ours, inputs, max_bytes))
        assert peak <= max_bytes, (divisor, peak / max_bytes)


def test_bands_lose_no_precision_in_bfloat16() -> None:
    """128 rows, as in a 4096 px image. States of rows added up in bfloat16, whose steps are 1/256, would drift."""
    block = randomise(Block(tiny_config("sana-0.6b-1024px"), Build(dtype=torch.bfloat16)))
    truth = copy.deepcopy(block).double()
    x = torch.randn(1, 128 * 16, 96).bfloat16()
    modulation = torch.zeros(1, 6, 96).bfloat16()
    modulation[:, 0] = 1  # shift: activations have a mean
    modulation[:, 2] = 10  # gate: the attention dominates
    text = torch.zeros(1, 2, 1, 48).bfloat16(), torch.zeros(1, 2, 1, 48).bfloat16()
    rows, exact = (block_modulation([each], modulation.to(each.scale_shift_table))[0] for each in (block, truth))
    expected = truth(x.double(), 16, exact, (text[0].double(), text[1].double()), None)
    whole = block(x, 16, rows, text, None)
    with torch.no_grad():
        block.forward_banded(banded := x.clone(), 16, rows, text, None, band=1)
    assert relative_error(banded, expected) < 1.2 * relative_error(whole, expected)


# Hooks


@pytest.mark.parametrize("max_bytes", [1, 2**30])
def test_identity_blocks_attend_to_themselves(max_bytes: int) -> None:
    """As a network whose self-attention in these blocks is value and projection alone."""
    config = tiny_config("sana-1.5-1.6b-1024px")
    ours, _ = transformer_pair(config)
    inputs = Inputs(config)
    perturbed = copy.deepcopy(ours)
    for i in (0, 2):
        perturbed.transformer_blocks[i].attn1.forward = perturbed.transformer_blocks[i].attn1.identity
    expected = perturbed(inputs.x, inputs.timestep, inputs.text, inputs.mask)
    found = velocity(ours, inputs, max_bytes, identity_blocks=frozenset({0, 2}))
    assert relative_error(found, expected) < 1e-6
    assert relative_error(found, velocity(ours, inputs)) > 0.01


@pytest.mark.parametrize("max_bytes", [1, 2**30])
def test_control_sees_the_first_block_and_corrects_the_first_ones(max_bytes: int) -> None:
    config = tiny_config("sana-0.6b-1024px", depth=4)
    ours, _ = transformer_pair(config)
    inputs = Inputs(config)
    corrections = [torch.randn(2, 15, 96) for _ in range(2)]
    seen: list[Tensor] = []

    def control(tokens: Tensor) -> list[Tensor]:
        seen.append(tokens.clone())
        return corrections

    found = velocity(ours, inputs, max_bytes, control=control)
    with torch.no_grad():
        modulation = ours.modulation(inputs.timestep)
        context = ours.text_context(inputs.text, inputs.mask)
        tokens = ours.embed(inputs.x)
        for i, block in enumerate(ours.transformer_blocks):
            tokens = block(tokens, 5, modulation.blocks[i], context.keys_values[i], context.mask)
            if i == 0:
                assert relative_error(seen[0], tokens) < 1e-6
            tokens = tokens + corrections[i] if i < 2 else tokens
        expected = ours.unembed(tokens, modulation, inputs.x.shape)
    assert len(seen) == 1 and relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("max_bytes", [1, 2**30])
def test_what_steps_in_is_asked_for_every_block(max_bytes: int) -> None:
    """As an argument or in a subclass, which may call the block or leave it out: here the second one."""
    config = tiny_config("sana-1.5-1.6b-1024px")
    ours, _ = transformer_pair(config)
    inputs = Inputs(config)
    asked: list[int] = []

    def step_in(i: int, tokens: Tensor, *arguments: object) -> Tensor:
        asked.append(i)
        return tokens if i == 1 else SanaTransformer.run_block(ours, i, tokens, *arguments)

    with torch.no_grad():
        modulation, context = ours.modulation(inputs.timestep), ours.text_context(inputs.text, inputs.mask)
        tokens = ours.embed(inputs.x)
        for i, block in enumerate(ours.transformer_blocks):
            text = context.keys_values[i]
            tokens = tokens if i == 1 else block(tokens, 5, modulation.blocks[i], text, context.mask)
        expected = ours.unembed(tokens, modulation, inputs.x.shape)
    assert relative_error(velocity(ours, inputs, max_bytes, run_block=step_in), expected) < 1e-6
    ours.run_block = step_in
    assert relative_error(velocity(ours, inputs, max_bytes), expected) < 1e-6
    assert asked == [*range(config.depth)] * 2


@pytest.mark.parametrize("max_bytes", [1, 2**30])
@pytest.mark.parametrize("variant", ["sana-0.6b-1024px", "sana-sprint-0.6b-1024px"])
def test_one_modulation_serves_all_samples(variant: str, max_bytes: int) -> None:
    """As the same one for each, in whose place a layer norm applies it."""
    ours, _ = transformer_pair(config := tiny_config(variant))
    inputs = Inputs(config)
    embed = inputs.guidance_embed
    with torch.no_grad():
        context = ours.text_context(inputs.text, inputs.mask)
        one = ours.modulation(inputs.timestep[:1], None if embed is None else embed[:1])
        each = Modulation(*(part.repeat_interleave(len(inputs.x), part.dim() - 3) for part in one))
        found, expected = (ours.velocity(inputs.x, given, context, max_bytes=max_bytes) for given in (one, each))
    assert len(one.time) == 1 and len(each.time) == 2 and relative_error(found, expected) < 1e-6


def test_a_correction_may_be_missing() -> None:
    """ControlNets of the host correct some blocks and not others."""
    ours, _ = transformer_pair(config := tiny_config("sana-0.6b-1024px"))
    inputs = Inputs(config)
    correction = torch.randn(2, 15, 96)
    found = velocity(ours, inputs, control=lambda tokens: [None, correction])
    expected = velocity(ours, inputs, control=lambda tokens: [torch.zeros_like(tokens), correction])
    assert relative_error(found, expected) < 1e-6 and relative_error(found, velocity(ours, inputs)) > 0.01


# Extremes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_overflowing_projection_is_clamped(dtype: torch.dtype) -> None:
    """diffusers clamps in float16 only; there both are the same, and finite."""
    config = tiny_config("sana-0.6b-512px", depth=2)
    ours, theirs = transformer_pair(config)
    for block in theirs.transformer_blocks:  # the weights are shared
        block.attn1.to_v.weight *= 100
        block.attn1.to_out[0].weight *= 1e4
        block.scale_shift_table[2] *= 1e-3  # the gate, so that the sum of float16 does not overflow afterwards
    inputs = Inputs(config)
    inputs.timestep[:] = 500
    with torch.no_grad():
        ours.time_embed.linear.weight *= 1e-3
        ours.time_embed.linear.bias *= 1e-3
        free = inputs.to_theirs(theirs)
        clamped = inputs.to_ours(ours)
        theirs.half(), ours.to(dtype)
        inputs.x, inputs.text = inputs.x.half(), inputs.text.half()
        expected = inputs.to_theirs(theirs)
        found = inputs.to_ours(ours)
    assert expected.isfinite().all() and found.isfinite().all()
    assert relative_error(clamped, free) > 0.01  # the clamp acts in float32, where nothing overflows
    assert relative_error(found, expected) < 0.02


@pytest.mark.parametrize("variant", ["sana-0.6b-1024px", "sana-sprint-0.6b-1024px"])
def test_guidance_embed_must_fit(variant: str) -> None:
    ours, _ = transformer_pair(config := tiny_config(variant))
    inputs = Inputs(config)
    inputs.guidance_embed = None if config.guidance_embed else torch.ones(2)
    expected = "needs a guidance_embed" if config.guidance_embed else "takes no guidance_embed"
    with pytest.raises(ValueError, match=f"this SANA transformer {expected}; only Sprint checkpoints have"):
        inputs.to_ours(ours)


def test_full_size_equals_diffusers() -> None:
    """SANA 0.6B: 28 blocks of width 1152, 592 million random numbers."""
    config = VARIANTS["sana-0.6b-1024px"].transformer
    with torch.device("meta"):
        theirs = diffusers_transformer(config)
    theirs = theirs.to_empty(device="cpu").eval().requires_grad_(False)
    numbers = torch.randn(2**22)
    for name, parameter in theirs.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "table" not in name else 0.2
        count = parameter.numel()
        parameter.copy_(numbers.repeat(-(-count // len(numbers)))[:count].view_as(parameter) * scale)
    ours = SanaTransformer(config, device="meta")
    ours.load_state_dict(as_linear(theirs.state_dict()), strict=True, assign=True)
    inputs = Inputs(config, 1, 4, 4)
    assert sum(p.numel() for p in ours.parameters()) == 591_747_872
    assert relative_error(inputs.to_ours(ours), inputs.to_theirs(theirs)) < TOLERANCE


def test_whole_transformer_compiles() -> None:
    """With the text in it, whose length is marked as varying only outside of what is compiled."""
    ours, _ = transformer_pair(config := tiny_config("sana-0.6b-1024px"))
    inputs = Inputs(config)
    torch._dynamo.reset()
    assert relative_error(inputs.to_ours(torch.compile(ours, backend="eager")), inputs.to_ours(ours)) < 1e-6
