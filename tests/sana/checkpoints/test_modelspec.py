"""Every file of weights that this package writes says what it is, in the keys by which other programs list models.

That of a training of a LoRA: tests/training/test_lora.py.
"""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open

from sana.checkpoints.quantising import quantise
from sana.checkpoints.writing import convert, write_transformer
from sana.config import TransformerIdentity
from tests.sana.adapted import adapted, save_as_peft
from tests.sana.models import TRANSFORMER, transformer, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def spec(path: Path) -> dict[str, str]:
    """The keys of modelspec in a file."""
    with safe_open(path, "pt") as file:
        told = file.metadata()
    return {key.removeprefix("modelspec."): value for key, value in told.items() if key.startswith("modelspec.")}


def expected(architecture: str, title: str, **more: str) -> dict[str, str]:
    """As in resources/sd_model_spec/sana.json and sana-lora.json of OneTrainer, which have the first three."""
    own = {"sai_model_spec": "1.0.0", "implementation": "https://github.com/NVlabs/Sana"}
    return {**own, "architecture": architecture, "title": title, **more}


def test_every_part_of_a_pipeline(model: Path) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    assert spec(model / "transformer" / weights) == expected("sana", "custom", resolution="64x64")
    assert spec(model / "vae" / weights) == expected("sana/vae", "custom")
    assert spec(model / "text_encoder" / "model.safetensors") == expected("sana/text-encoder", "Gemma-2")


def test_what_convert_writes(model: Path, tmp_path: Path) -> None:
    """The title is that of the model, or of the LoRA's file."""
    network, _ = adapted(TRANSFORMER, LoraConfig(r=2, target_modules=["attn1.to_q"]))
    lora = save_as_peft(network, tmp_path / "style")
    for source, wanted in (
        (model, expected("sana", "custom", resolution="64x64")),
        (model / "vae", expected("sana/vae", "custom")),
        (lora, expected("sana/lora", lora.stem)),
    ):
        convert(source, target := tmp_path / f"{source.name}.converted.safetensors")
        assert spec(target) == wanted
    identity = TransformerIdentity(TRANSFORMER, "sana-1.6b-512px", 512, 3.0, "float32", "a test")
    write_transformer(tmp_path / "transformer", transformer(), identity, torch.float16)
    found = spec(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found == expected("sana", "sana-1.6b-512px", resolution="512x512")


def test_what_quantising_writes(model: Path, tmp_path: Path) -> None:
    for source, wanted in (
        (model, expected("sana", "custom", resolution="64x64")),
        (model / "text_encoder", expected("sana/text-encoder", "Gemma-2")),
    ):
        quantise(source, target := tmp_path / f"{source.name}.safetensors", "fp8")
        assert spec(target) == wanted
