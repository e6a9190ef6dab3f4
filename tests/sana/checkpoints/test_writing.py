"""What this package writes, opened by diffusers as it is. Whole pipelines: tests/sana/pipeline and tests/demo."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from sana.checkpoints.writing import autoencoder_json, convert, transformer_json, write_transformer
from sana.config import VARIANTS, TransformerIdentity
from sana.saving import write_json
from tests.sana.dialects import official_transformer, original_autoencoder
from tests.sana.twins import (
    FAMILIES,
    STRUCTURES,
    autoencoder_pair,
    tiny_autoencoder_config,
    tiny_config,
    transformer_pair,
)

Tensors = dict[str, Tensor]


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("variant", STRUCTURES)
@pytest.mark.parametrize("guidance_scale", [4.5, 2.0])
def test_diffusers_opens_a_folder_of_a_transformer(tmp_path: Path, variant: str, guidance_scale: float) -> None:
    """As fine-tuning writes it. A guidance of its own is one more key in the configuration."""
    config = tiny_config(variant)
    ours, theirs = transformer_pair(config)
    base_size = VARIANTS[variant].base_size
    identity = TransformerIdentity(config, "custom", base_size, 3.0, "float32", "a test", guidance_scale)
    write_transformer(tmp_path / "transformer", ours, identity, torch.float32)
    found = SanaTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert_same(dict(found.state_dict()), dict(theirs.state_dict()))
    latent, text = torch.randn(1, 32, 4, 6), torch.randn(1, 5, config.text_width)
    guidance = {"guidance": torch.tensor([0.45])} if config.guidance_embed else {}
    with torch.no_grad():
        results = [net(latent, text, torch.tensor([500.0]), **guidance).sample for net in (found, theirs)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", STRUCTURES)
def test_diffusers_opens_a_converted_transformer(tmp_path: Path, variant: str) -> None:
    config = tiny_config(variant)
    _, theirs = transformer_pair(config)
    torch.save(official_transformer(dict(theirs.state_dict())), source := tmp_path / "official.pth")
    write_json(tmp_path / "config.json", transformer_json(config, 1024))
    (tmp_path / "new").mkdir()
    convert(source, target := tmp_path / "new" / "model.safetensors")
    described = {"_class_name": "SanaTransformer2DModel", **transformer_json(config, 1024)}
    write_json(tmp_path / "new" / "config.json", described)
    found = SanaTransformer2DModel.from_single_file(str(target), config=str(tmp_path / "new"))
    assert_same(dict(found.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_opens_a_converted_autoencoder(tmp_path: Path, family: str) -> None:
    config = tiny_autoencoder_config(family)
    _, theirs = autoencoder_pair(config)
    original = original_autoencoder(dict(theirs.state_dict()), config)
    save_file({name: part.contiguous() for name, part in original.items()}, source := tmp_path / "original.safetensors")
    (tmp_path / "new").mkdir()
    convert(source, target := tmp_path / "new" / "model.safetensors")
    write_json(tmp_path / "new" / "config.json", {"_class_name": "AutoencoderDC", **autoencoder_json(config)})
    found = AutoencoderDC.from_single_file(str(target), config=str(tmp_path / "new"))
    assert_same(dict(found.state_dict()), dict(theirs.state_dict()))
