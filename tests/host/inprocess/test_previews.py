"""Previews while a picture is drawn: by TAESANA if the person chose TAESD and has its file, else by the linear map."""

import logging
from collections.abc import Iterator
from pathlib import Path

import comfy.latent_formats
import comfy.model_management as management
import folder_paths
import latent_preview
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod
from comfy.model_patcher import ModelPatcher
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sana.config import LATENT_SCALE
from sana.networks.tiny_decoder import TinyDecoder
from tests.host.inprocess.small import Small
from tests.sana.models import tiny_decoder

CPU = torch.device("cpu")
LATENT = 2 * torch.randn(2, 32, 2, 3, generator=torch.Generator().manual_seed(0))  # 64 x 96 px


@pytest.fixture
def taesd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.TAESD)


@pytest.fixture
def path(small: Small) -> Iterator[Path]:
    found = Path(folder_paths.get_folder_paths("vae_approx")[0]) / "taesana_decoder.safetensors"
    found.parent.mkdir(exist_ok=True)
    yield found
    found.unlink(missing_ok=True)


@pytest.fixture
def decoder(path: Path) -> TinyDecoder:
    network = tiny_decoder()
    save_file(network.state_dict(), path)
    return network


def shown(small: Small, latent: Tensor = LATENT) -> Image.Image | None:
    """What the host would show of a latent of a step."""
    previewer = latent_preview.get_previewer(CPU, small.model.model.latent_format)
    found = previewer.decode_latent_to_preview_image("JPEG", latent)
    return found and found[1]


def linear(small: Small, latent: Tensor = LATENT) -> Image.Image:
    colours = small.model.model.latent_format.latent_rgb_factors_reshape(latent)[0]
    return latent_preview.preview_to_image(colours.movedim(0, -1))


def equal(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


def test_taesana_if_chosen_and_there(small: Small, taesd: None, decoder: TinyDecoder) -> None:
    with torch.no_grad():
        expected = latent_preview.preview_to_image(decoder(LATENT[:1])[0].movedim(0, -1))
    assert expected.size == (96, 64) and len(set(expected.tobytes())) > 100
    assert equal(shown(small), expected)
    assert not equal(shown(small, LATENT.flip(0)), expected)


def test_linear_if_not_chosen(small: Small, decoder: TinyDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (LatentPreviewMethod.Auto, LatentPreviewMethod.Latent2RGB):
        monkeypatch.setattr(latent_preview.args, "preview_method", method)
        assert equal(shown(small), linear(small))
    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.NoPreviews)
    assert latent_preview.get_previewer(CPU, small.model.model.latent_format) is None


def test_linear_without_the_file(small: Small, taesd: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert equal(shown(small), linear(small))
    assert "models/vae_approx holds no taesana_decoder, so previews of SANA are linear ones; put" in caplog.text


def test_linear_for_a_wrong_file(small: Small, taesd: None, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No run ends for its previews; the log has one sentence."""
    for content, sentence in (
        (TinyDecoder(4, (64,) * 4).state_dict(), "is a small autoencoder for another model"),
        (None, "taesana_decoder.safetensors"),
    ):
        caplog.clear()
        if content is None:
            path.write_bytes(b"broken")
        else:
            save_file(content, path)
        assert equal(shown(small), linear(small))
        (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert message.startswith("previews of SANA are linear ones: ") and sentence in message


def test_large_latents_stay_linear(
    small: Small, taesd: None, decoder: TinyDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    preview = small.host.pack("nodes.host.preview")
    assert preview.MOST_CELLS == (2048 // 32) ** 2
    monkeypatch.setattr(preview, "MOST_CELLS", 5)
    assert equal(shown(small), linear(small))
    monkeypatch.setattr(preview, "MOST_CELLS", 6)
    assert shown(small).size == (96, 64)


def test_models_of_core_loaders_have_taesana_too(
    small: Small, taesd: None, decoder: TinyDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They know no autoencoder, so there is no linear map: a large latent has no preview."""
    (model,) = small.host.call("UNETLoader", unet_name=small.path.name, weight_dtype="default")
    previewer = latent_preview.get_previewer(CPU, model.model.latent_format)
    assert previewer.decode_latent_to_preview_image("JPEG", LATENT)[1].size == (96, 64)
    monkeypatch.setattr(small.host.pack("nodes.host.preview"), "MOST_CELLS", 5)
    assert previewer.decode_latent_to_preview_image("JPEG", LATENT) is None


def test_other_models_have_the_hosts(small: Small, taesd: None, decoder: TinyDecoder) -> None:
    previewer = latent_preview.get_previewer(CPU, comfy.latent_formats.SD15())
    assert type(previewer) is latent_preview.Latent2RGBPreviewer


def shown_by_node(small: Small, latent: Tensor, model: ModelPatcher | None = None) -> Tensor:
    node = small.host.nodes["SanaPreviewLatent"]
    assert node.OUTPUT_NODE
    return node.execute(samples={"samples": latent / LATENT_SCALE}, model=model or small.model).result[0]


def test_node_shows_the_whole_batch(small: Small, decoder: TinyDecoder) -> None:
    """By TAESANA whatever the host's preview method is; on a GPU in float16."""
    found = shown_by_node(small, LATENT)
    with torch.no_grad():
        expected = (decoder(LATENT).movedim(1, -1) + 1) / 2
    tolerance = 5e-3 if management.should_use_fp16(management.get_torch_device()) else 1e-5
    assert found.shape == (2, 64, 96, 3) and float((found - expected).abs().max()) < tolerance
    assert float(found.std()) > 0.05


def test_node_without_the_file(small: Small) -> None:
    found = shown_by_node(small, LATENT)
    expected = small.model.model.latent_format.latent_rgb_factors_reshape(LATENT)
    assert found.shape == (2, 8, 12, 3)
    assert float((found - (expected.movedim(1, -1) + 1) / 2).abs().max()) < 1e-5


def test_node_shows_its_pictures(small: Small) -> None:
    """And hands them on."""
    result = small.host.nodes["SanaPreviewLatent"].execute(samples={"samples": LATENT}, model=small.model)
    assert result.result[0].shape == (2, 8, 12, 3) and len(result.ui.as_dict()["images"]) == 2


def test_node_refuses(small: Small, path: Path) -> None:
    with pytest.raises(ValueError, match="this latent has 4 channels, and SANA takes 32"):
        shown_by_node(small, LATENT[:, :4])
    (model,) = small.host.call("UNETLoader", unet_name=small.path.name, weight_dtype="default")
    with pytest.raises(
        ValueError, match="came without an autoencoder, and models/vae_approx holds no taesana_decoder; connect"
    ):
        shown_by_node(small, LATENT, model)
