"""Pipelines from folders and from separate parts, in every format."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana.checkpoints.files import CheckpointError
from sana.loading import MODELS, default_dtypes
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.transformer import SanaTransformer
from sana.pipeline import SanaPipeline
from tests.sana.measures import mapped_bytes
from tests.sana.models import PROMPTS
from tests.sana.pipeline.drawing import HEIGHT, SIZE, WIDTH, sample
from tests.sana.twins import tiny_autoencoder_config, tiny_config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_text_encoder_and_the_autoencoder_never_compute_in_float16(folder: Path, dtype: torch.dtype) -> None:
    pipeline = SanaPipeline.load(folder, dtype=dtype)
    assert pipeline.transformer.dtype == dtype
    assert pipeline.text_encoder.dtype != torch.float16
    assert pipeline.autoencoder.decoder.conv_in.weight.dtype != torch.float16


@pytest.mark.parametrize(
    ("released", "capability", "expected"),
    [
        ("bfloat16", (9, 0), ("bfloat16", "bfloat16")),
        ("float16", (8, 0), ("float16", "bfloat16")),
        ("bfloat16", (7, 5), ("float32", "float32")),
        ("float16", (7, 5), ("float16", "float32")),
    ],
)
def test_gpus_without_bfloat16_compute_in_float32_instead(
    monkeypatch: pytest.MonkeyPatch, released: str, capability: tuple[int, int], expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_dtypes(released, torch.device("cuda")) == tuple(getattr(torch, name) for name in expected)
    assert default_dtypes(released, torch.device("cpu")) == (torch.float32, torch.float32)


def test_bfloat16_draws_nearly_the_same_picture(folder: Path, pipeline: SanaPipeline) -> None:
    rounded = SanaPipeline.load(folder, dtype=torch.bfloat16)
    latents = [sample(each, PROMPTS[0], steps=8, guidance_scale=2.0) for each in (rounded, pipeline)]
    assert latents[0].dtype == torch.float32  # solvers do not round
    assert (latents[0] - latents[1]).norm() / latents[1].norm() < 0.15
    assert rounded(PROMPTS[0], steps=1, **SIZE)[0].size == (WIDTH, HEIGHT)


def test_parts_can_be_loaded_from_separate_files(folder: Path, pipeline: SanaPipeline) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    separate = SanaPipeline.load(
        folder / "transformer" / weights,
        autoencoder=folder / "vae" / weights,
        text_encoder=folder / "text_encoder" / "model.safetensors",
    )
    assert separate.identity == pipeline.identity
    assert torch.equal(sample(separate, PROMPTS[0], steps=2), sample(pipeline, PROMPTS[0], steps=2))


def test_a_transformer_file_alone_asks_for_the_rest(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for place in (path, path.parent):
        with pytest.raises(
            CheckpointError, match=" is the transformer alone; give an autoencoder and a text encoder as well$"
        ):
            SanaPipeline.load(place)
    with pytest.raises(CheckpointError, match=f"^{path} is the transformer alone; give a text encoder as well$"):
        SanaPipeline.load(path, autoencoder=folder)


def test_parts_of_the_demo_are_given_by_its_name() -> None:
    whole = SanaPipeline.load("demo")
    parts = SanaPipeline.load(MODELS["demo"] / "transformer", autoencoder="demo", text_encoder="demo")
    drawn, expected = (sample(each, PROMPTS[0], steps=1) for each in (parts, whole))
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize(
    ("family", "channels", "kind"), [("dc-ae-f64c128-in-1.0", 128, "f64c128"), ("dc-ae-f32c128-1.5", 128, "f32c128")]
)
def test_an_autoencoder_of_other_latents_is_refused(
    pipeline: SanaPipeline, family: str, channels: int, kind: str
) -> None:
    config = replace(tiny_autoencoder_config(family, depth=1), latent_channels=channels)
    message = (
        f"the autoencoder is a DC-AE {kind}, and the transformer takes latents of an f32c32; give one of these, such as "
        "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    )
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        SanaPipeline(
            pipeline.transformer, DCAutoencoder(config, device="meta"), pipeline.text_encoder, pipeline.identity
        )


def test_a_text_encoder_of_another_width_is_refused(pipeline: SanaPipeline) -> None:
    transformer = SanaTransformer(tiny_config("sana-0.6b-1024px"), device="meta")
    message = (
        r"the text encoder is a Gemma-2 of width \d+, and the transformer takes texts of width 40; for a released model give "
        "Efficient-Large-Model/gemma-2-2b-it"
    )
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        SanaPipeline(transformer, pipeline.autoencoder, pipeline.text_encoder, pipeline.identity)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist; give a checkpoint file or a folder"):
        SanaPipeline.load(tmp_path / "missing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_stays_in_its_file(tmp_path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Files in the dtype that is computed with were left mapped, and ended the process if they shrank."""
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    files = [*copied.rglob("*.safetensors")]
    for path in files:
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    pipeline = SanaPipeline.load(copied, dtype=dtype)
    for network in (pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder):
        assert {parameter.dtype for parameter in network.parameters()} == {dtype}
        assert sum(mapped_bytes(network.parameters(), path) for path in files) == 0
    assert len(files) == 3


SHRINK = """
import pathlib, shutil, sys
import sana
from sana.loading import MODELS
folder = pathlib.Path(sys.argv[1])
shutil.copytree(MODELS["demo"], folder)
pipeline = sana.SanaPipeline.load(folder)
for path in folder.rglob("*.safetensors"):
    path.open("r+b").truncate(0)
print(pipeline("a red circle", steps=1, height=64, width=64)[0].size)
"""


def test_files_may_shrink_once_they_are_loaded(tmp_path: Path) -> None:
    run = [sys.executable, "-c", SHRINK, str(tmp_path / "demo")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "(64, 64)"), done.stderr
