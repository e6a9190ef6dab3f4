"""The autoencoder against diffusers' AutoencoderDC, and its rearrangements against the plain operations."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sana.config import AUTOENCODERS, StageConfig
from sana.networks import autoencoder_layers
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.autoencoder_layers import ChannelNorm, MultiscaleLinearAttention, Up
from sana.networks.layers import Build
from sana.networks.resampling import (
    add_averaged,
    add_shuffled,
    nearest_phases,
    phase_weights,
    pixel_shuffle,
    pixel_unshuffle,
    place_phases,
)
from tests.sana.measures import relative_error
from tests.sana.twins import FAMILIES, autoencoder_pair, randomise, tiny_autoencoder_config

TOLERANCE = 1e-5  # relative L2 in float32: sums in another order. Measured: 2e-6
SIZES = ((1, 1, 1), (2, 1, 3), (3, 2, 1), (1, 7, 5))  # batch, rows, columns of latents; at most 32 cells, and more
CHANNELS_LAST = torch.channels_last


def random_image(ae_latent: Tensor, downsample: int) -> Tensor:
    batch, _, rows, columns = ae_latent.shape
    return torch.rand(batch, 3, rows * downsample, columns * downsample) * 2 - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_diffusers(family: str, size: tuple[int, int, int]) -> None:
    """diffusers computes the attention of up to 32 positions by the quadratic formula."""
    ours, theirs = autoencoder_pair(config := tiny_autoencoder_config(family))
    ae_latent = torch.randn(size[0], config.latent_channels, *size[1:])
    image = random_image(ae_latent, config.downsample)
    decoded, encoded = ours.decode(ae_latent), ours.encode(image)
    assert relative_error(decoded, theirs.decode(ae_latent).sample) < TOLERANCE
    assert relative_error(encoded, theirs.encode(image).latent) < TOLERANCE
    assert decoded.shape == image.shape and encoded.shape == ae_latent.shape
    assert decoded.is_contiguous() and encoded.is_contiguous()


@pytest.mark.parametrize("family", FAMILIES)
def test_error_of_bfloat16_is_its_rounding(family: str) -> None:
    """To the float32 result of the same rounded weights and inputs, over both directions and two sizes.

    Norms are applied in bfloat16 here and in float32 in diffusers: measured 1.0 to 1.4 times its error.
    """
    ours, theirs = autoencoder_pair(config := tiny_autoencoder_config(family))
    ours.bfloat16(), theirs.bfloat16()
    truth = copy.deepcopy(ours).float()
    errors, their_errors = 0.0, 0.0
    for size in ((2, 1, 3), (1, 4, 4)):
        ae_latent = torch.randn(size[0], config.latent_channels, *size[1:]).bfloat16()
        image = random_image(ae_latent, config.downsample).bfloat16()
        decoded, encoded = truth.decode(ae_latent.float()), truth.encode(image.float())
        errors += relative_error(ours.decode(ae_latent), decoded) + relative_error(ours.encode(image), encoded)
        their_errors += relative_error(theirs.decode(ae_latent).sample, decoded)
        their_errors += relative_error(theirs.encode(image).latent, encoded)
    assert errors < 1.5 * their_errors
    assert errors / 4 < 0.02


@torch.no_grad()
def test_decoding_compiles_to_one_graph() -> None:
    ours, _ = autoencoder_pair(config := tiny_autoencoder_config("dc-ae-f32c32-sana-1.1"))
    ae_latent = torch.randn(1, config.latent_channels, 1, 2)
    torch._dynamo.reset()
    found = torch.compile(ours.decode, backend="eager", fullgraph=True)(ae_latent)
    assert relative_error(found, ours.decode(ae_latent)) < TOLERANCE


def test_result_has_the_dtype_of_the_input() -> None:
    ours, _ = autoencoder_pair(tiny_autoencoder_config("dc-ae-f32c32-sana-1.1"))
    ae_latent = torch.randn(1, 32, 2, 2)
    image = ours.decode(ae_latent)
    for dtype in (torch.bfloat16, torch.float64):
        found = copy.deepcopy(ours).to(dtype).decode(ae_latent)
        assert found.dtype == torch.float32 and relative_error(found, image) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_input_is_not_changed(family: str) -> None:
    """Whatever its memory layout, and also without gradients, when activations are applied in place."""
    ours, _ = autoencoder_pair(config := tiny_autoencoder_config(family, depth=1))
    ae_latent = torch.randn(1, 32, 1, 2)
    image = random_image(ae_latent, config.downsample)
    with torch.no_grad():
        for call, x in ((ours.decode, ae_latent), (ours.encode, image)):
            for layout in (torch.contiguous_format, CHANNELS_LAST):
                given = x.clone(memory_format=layout)
                call(given)
                torch.testing.assert_close(given, x, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_diffusers(family: str) -> None:
    """For the best of five inputs: rounding may take a number over the kink of a ReLU, and the gradient with it."""
    ours, theirs = autoencoder_pair(config := tiny_autoencoder_config(family, depth=1))

    def error(decode_only: bool) -> float:
        ae_latent = torch.randn(1, 32, 1, 2)
        x = (ae_latent if decode_only else random_image(ae_latent, config.downsample)).requires_grad_()
        found = ours.decode(x if decode_only else ours.encode(x))
        expected = theirs.decode(x if decode_only else theirs.encode(x).latent).sample
        weights = torch.randn_like(found)
        (gradient,) = torch.autograd.grad((expected * weights).sum(), x)
        return relative_error(torch.autograd.grad((found * weights).sum(), x)[0], gradient)

    for decode_only in (True, False):
        assert min(error(decode_only) for _ in range(5)) < 1e-4


def test_parameter_counts() -> None:
    """Those of the released files: mit-han-lab model cards, and the modules built from their configurations."""
    counts = {
        "dc-ae-f32c32-sana-1.1": (153_027_104, 159_223_171),
        "dc-ae-lite-f32c32-sana-1.1": (153_027_104, 268_154_124),
        "dc-ae-f32c32-in-1.0": (123_172_384, 200_184_076),
        "dc-ae-f64c128-mix-1.0": (264_550_528, 412_345_612),
    }
    for name, expected in counts.items():
        network = DCAutoencoder(AUTOENCODERS[name], device="meta")
        assert tuple(sum(p.numel() for p in m.parameters()) for m in (network.encoder, network.decoder)) == expected


# Parts


@pytest.mark.parametrize("scales", [(), (5,)])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 8)])
def test_attention_is_the_quadratic_formula(size: tuple[int, int], scales: tuple[int, ...]) -> None:
    """Each head is 96 consecutive channels, 32 each of query, key and value, over all scales."""
    stage = StageConfig(64, 1, attention=True, scales=scales)
    layer, x = randomise(MultiscaleLinearAttention(stage, Build())), torch.randn(2, 64, *size)
    pixels = x.permute(0, 2, 3, 1)
    fused = torch.cat([layer.to_q(pixels), layer.to_k(pixels), layer.to_v(pixels)], dim=-1).permute(0, 3, 1, 2)
    planes = torch.cat([fused, *(scale(fused) for scale in layer.to_qkv_multiscale)], dim=1)
    q, k, v = planes.flatten(2).unflatten(1, (-1, 3, 32)).unbind(2)  # each (B, heads, 32, N)
    similarity = torch.einsum("bhdi,bhdj->bhij", q.relu(), k.relu())
    out = torch.einsum("bhij,bhdj->bhdi", similarity / (similarity.sum(-1, keepdim=True) + 1e-15), v)
    out = layer.to_out(out.flatten(1, 2).unflatten(-1, size).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert relative_error(layer(x), x + layer.norm_out(out)) < 1e-6  # float32


@torch.no_grad()
def test_attention_of_bfloat16_may_stay_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose products add up in float32, and so do sums over parts of a picture."""
    stage = StageConfig(64, 1, attention=True, scales=(5,))
    layer, x = randomise(MultiscaleLinearAttention(stage, Build(dtype=torch.bfloat16))), torch.randn(2, 64, 9, 8)
    layer.norm_out = torch.nn.Identity()
    layer.norm_out.forward = lambda out, x: out
    found, expected = [], copy.deepcopy(layer).float()(x)
    for precise in (autoencoder_layers._precise, lambda part: part):
        monkeypatch.setattr(autoencoder_layers, "_precise", precise)
        found.append(relative_error(layer(x.bfloat16()), expected))
        assert layer.state(layer.project(x.bfloat16())[0]).dtype == torch.float32
    assert found[0] < 2e-2 and found[0] != found[1] < 2e-2


def test_states_of_parts_add_up() -> None:
    qkv = torch.randn(2, 8, 5, 4, 96)
    parts = MultiscaleLinearAttention.state(qkv[:, :3]) + MultiscaleLinearAttention.state(qkv[:, 3:])
    torch.testing.assert_close(parts, MultiscaleLinearAttention.state(qkv), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_channel_norm_is_the_formula(scale: float) -> None:
    norm = randomise(ChannelNorm(64, Build()))
    x, residual = scale * torch.randn(2, 64, 3, 4), torch.randn(2, 64, 3, 4)
    weight, bias = norm.weight[:, None, None].double(), norm.bias[:, None, None].double()
    expected = x.double() / (x.double().square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(x, residual).double(), expected + residual.double(), rtol=1e-5, atol=1e-5)
    kept = residual.clone()
    torch.testing.assert_close(norm.by_kernel(x, None).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.by_kernel(x, residual).double(), expected + residual.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_nearest_conv_is_interpolate_and_conv(size: tuple[int, int], bias: bool) -> None:
    x, weight = torch.randn(2, 6, *size).double(), torch.randn(5, 6, 3, 3).double()
    shift = torch.randn(5).double() if bias else None
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, shift, padding=1)
    torch.testing.assert_close(place_phases(nearest_phases(x, weight, shift)), expected, rtol=1e-12, atol=1e-12)


def test_phase_weights_share_the_kernel_out() -> None:
    """Of a kernel's rows (columns), the first phase sees 1 and 2 + 3 at its two inputs, the second 1 + 2 and 3."""
    weight = torch.arange(9.0).view(1, 1, 3, 3)
    rows = (((0,), (1, 2)), ((0, 1), (2,)))
    expected = [[[[weight[0, 0, p][:, q].sum() for q in rows[x]] for p in rows[y]]] for y in (0, 1) for x in (0, 1)]
    torch.testing.assert_close(phase_weights(weight), torch.tensor(expected), rtol=0, atol=0)


@pytest.mark.parametrize("outputs", [8, 4, 2])
@pytest.mark.parametrize("gradients", [False, True])
def test_phases_are_placed_upon_a_shortcut(outputs: int, gradients: bool) -> None:
    x, phases = torch.randn(2, 8, 3, 5), torch.randn(2, 4 * outputs, 4, 6)
    kept, shortcut = x.clone(), F.pixel_shuffle(x.repeat_interleave(4 * outputs // 8, dim=1), 2)
    with torch.set_grad_enabled(gradients):
        result = place_phases(phases, x)
    assert torch.equal(result, place_phases(phases) + shortcut) and torch.equal(x, kept)
    assert result.is_contiguous(memory_format=CHANNELS_LAST)


def test_nearest_layer_keeps_the_name_of_its_weights() -> None:
    up = randomise(Up(64, 32, True, Build()))
    assert {name: tuple(p.shape) for name, p in up.named_parameters()} == {
        "conv.weight": (32, 64, 3, 3),
        "conv.bias": (32,),
    }
    assert isinstance(up.conv, torch.nn.Conv2d)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_pixel_shuffles_are_those_of_torch(layout: torch.memory_format) -> None:
    x = torch.randn(2, 8, 6, 4).to(memory_format=layout)
    torch.testing.assert_close(pixel_shuffle(x), F.pixel_shuffle(x, 2), rtol=0, atol=0)
    torch.testing.assert_close(pixel_unshuffle(x), F.pixel_unshuffle(x, 2), rtol=0, atol=0)
    assert pixel_shuffle(x).is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("outputs", [8, 4, 2])
def test_add_shuffled_is_the_plain_formula(outputs: int) -> None:
    x, out = torch.randn(2, 8, 3, 5), torch.randn(2, outputs, 6, 10).to(memory_format=CHANNELS_LAST)
    kept = x.clone()
    expected = out + F.pixel_shuffle(x.repeat_interleave(4 * outputs // 8, dim=1), 2)
    result = add_shuffled(out, x)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    assert result is out


@pytest.mark.parametrize("outputs", [4, 8, 16, 32])
def test_add_averaged_is_the_plain_formula(outputs: int) -> None:
    x, out = torch.randn(2, 8, 6, 4), torch.randn(2, outputs, 3, 2).to(memory_format=CHANNELS_LAST)
    kept = x.clone()
    groups = F.pixel_unshuffle(x, 2).unflatten(1, (outputs, -1))
    expected = out + groups.mean(dim=2)
    result = add_averaged(out, x)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, kept) and result is out


# Bad input


@pytest.fixture(scope="module")
def network() -> DCAutoencoder:
    return DCAutoencoder(tiny_autoencoder_config("dc-ae-f32c32-sana-1.1"), device="meta")


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 4, 64, 64), (1, 64, 64, 3), (1, 3, 1, 64, 64)])
def test_wrong_image_shape_is_refused(network: DCAutoencoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"an image batch has shape \(B, 3, height, width\), not \(") as error:
        network.encode(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("max_bytes", [None, 2**30])
@pytest.mark.parametrize("size", [(33, 64), (64, 31), (0, 32), (32, 0), (1, 1)])
def test_indivisible_image_is_refused(network: DCAutoencoder, size: tuple[int, int], max_bytes: int | None) -> None:
    message = f"image of {size[0]}x{size[1]} px: both sides must be positive multiples of 32; crop or resize it"
    with pytest.raises(ValueError, match=message):
        network.encode(torch.zeros(1, 3, *size), max_bytes)


@pytest.mark.parametrize("max_bytes", [None, 2**30])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 16, 8, 8), (32, 8, 8), (1, 32, 0, 8), (1, 32, 1, 8, 8)])
def test_latent_of_another_model_is_refused(
    network: DCAutoencoder, shape: tuple[int, ...], max_bytes: int | None
) -> None:
    with pytest.raises(ValueError, match=r"a latent of this autoencoder has shape \(B, 32, H, W\), not \(") as error:
        network.decode(torch.zeros(shape), max_bytes)
    assert str(shape) in str(error.value)
