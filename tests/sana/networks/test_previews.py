"""The linear map against pictures it was not fitted to, and TAESANA against the networks of its family."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sana.checkpoints.files import CheckpointError
from sana.checkpoints.tiny_decoder import load_tiny_decoder
from sana.networks.previews import fit_preview
from sana.networks.tiny_decoder import TinyDecoder
from tests.sana.measures import relative_error
from tests.sana.twins import randomise

TOLERANCE = 1e-5


def test_linear_map_finds_a_linear_autoencoder() -> None:
    """Twelve of 32 channels hold the mean colours of the quarters of a cell, mixed; the others hold nothing."""
    mixture = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))

    def encode(image: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", F.pixel_unshuffle(F.avg_pool2d(image, 16), 2), mixture)

    preview = fit_preview(encode)
    image = F.interpolate(torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(2)) - 0.5, scale_factor=16)
    shown = preview(encode(image))
    assert shown.shape == (2, 3, 8, 12)
    assert float((F.avg_pool2d(shown, 2) - image[..., ::16, ::16]).abs().max()) < 0.02
    assert float(preview(1e3 * encode(image)).abs().max()) == 1


def published(widths: tuple[int, ...], channels: int) -> nn.Sequential:
    """The layers of the published file in their order; blocks by diffusers, whose names of tensors differ."""
    network = AutoencoderTiny(
        latent_channels=channels,
        decoder_block_out_channels=widths,
        num_decoder_blocks=(3,) * (len(widths) - 1) + (1,),
        encoder_block_out_channels=widths,
        num_encoder_blocks=(1,) * len(widths),
    )
    return randomise(network.decoder, seed=3)


def test_equals_diffusers() -> None:
    """A decoder of the family with one width and 8x8 px for each cell, which is all that diffusers builds. Latents reach beyond
    the clamp, and pictures beyond [-1, 1]."""
    theirs = published((64,) * 4, 4)
    ours = TinyDecoder(4, (64,) * 4)
    moved = {}
    for name, tensor in theirs.layers.state_dict().items():
        number, _, rest = name.partition(".")
        moved[f"{int(number) + 1}.{rest}"] = tensor  # before them ours clamps
    ours.load_state_dict(moved, strict=True)
    latent = 4 * torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        wanted = theirs(latent)
        for scale in (1.0, float(wanted.abs().median())):  # most pixels are clamped, and few are
            last = ours[-1].requires_grad_(False)
            last.weight /= scale
            last.bias /= scale
            theirs.layers[-1].load_state_dict(last.state_dict())
            wanted = theirs(latent)
            assert relative_error(ours(latent), wanted.clamp(-1, 1)) <= TOLERANCE
    assert wanted.shape == (2, 3, 24, 40) and float(wanted.abs().max()) > 1 > float(wanted.abs().min())


def test_published_sizes() -> None:
    """Names and shapes as in taesana_decoder.pth, and 32x32 px for each cell."""
    network = TinyDecoder(device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    convolutions = {1: (256, 32), 7: (128, 256), 12: (64, 128), 17: (64, 64), 22: (64, 64), 27: (64, 64), 29: (3, 64)}
    assert {name: shapes[f"{name}.weight"] for name in convolutions} == {
        name: (*sides, 3, 3) for name, sides in convolutions.items()
    }
    assert {name for name in shapes if name.count(".") == 1 and name.endswith("bias")} == {"1.bias", "29.bias"}
    blocks = {3: 256, 4: 256, 5: 256, 8: 128, 9: 128, 10: 128} | dict.fromkeys(
        (13, 14, 15, 18, 19, 20, 23, 24, 25, 28), 64
    )
    for number, width in blocks.items():
        for layer in (0, 2, 4):
            assert shapes[f"{number}.conv.{layer}.weight"] == (width, width, 3, 3)
            assert shapes[f"{number}.conv.{layer}.bias"] == (width,)
    assert len(shapes) == 2 * 2 + 5 + 16 * 6
    assert sum(tensor.numel() for tensor in network.parameters()) == 8_301_763
    assert network(torch.zeros(1, 32, 2, 3, device="meta")).shape == (1, 3, 64, 96)


@pytest.fixture(scope="module")
def decoder() -> TinyDecoder:
    return randomise(TinyDecoder(), seed=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file(tmp_path: Path, decoder: TinyDecoder, suffix: str) -> None:
    path = tmp_path / f"taesana_decoder{suffix}"
    (torch.save if suffix == ".pth" else save_file)(decoder.state_dict(), path)
    loaded = load_tiny_decoder(path, torch.float32, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), decoder.parameters(), strict=True))


def test_wrong_files(tmp_path: Path, decoder: TinyDecoder) -> None:
    path = tmp_path / "taesana_decoder.pth"
    tensors = decoder.state_dict()
    for found, sentence in (
        (TinyDecoder(4, (64,) * 4).state_dict(), "is a small autoencoder for another model, and previews of SANA take"),
        (
            {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)},
            "is a Flux model, and previews of SANA take taesana_decoder",
        ),
        ({n: t for n, t in tensors.items() if n != "29.bias"}, "lacks 1 of 105 tensors, first 29.bias"),
        ({**tensors, "30.weight": torch.zeros(1)}, "has 1 tensor that does not belong to it, first 30.weight"),
    ):
        torch.save(found, path)
        with pytest.raises(CheckpointError, match="taesana_decoder.pth " + sentence):
            load_tiny_decoder(path, torch.float32, "cpu")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="taesana_decoder.pth"):
        load_tiny_decoder(path, torch.float32, "cpu")
