"""Files that `convert --quantize` writes, in every host that knows their format: they draw nearly what the original draws."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor, nn

from sana.checkpoints.quantising import PACKED_FORMATS, quantise
from sana.checkpoints.writing import convert
from tests.host.inprocess.small import DEMO, PROMPT, Small, load

SIDE, CFG, SAMPLING_STEPS = 256, 2.0, 4  # as the demo was made for: far from it, small errors grow large
# Relative errors of each format: about half and twice of what was measured, so that nothing else is drawn either. Products of
# int8 are computed in it, which costs more than its weights do.
LATENT = {"fp8": (0.02, 0.08), "int8": (0.005, 0.08), "mxfp8": (0.02, 0.09), "nvfp4": (0.07, 0.3)}
WEIGHTS = {"fp8": (0.02, 0.035), "int8": (0.002, 0.01), "mxfp8": (0.02, 0.035), "nvfp4": (0.05, 0.13)}
TEXT = {"fp8": (0.005, 0.03), "int8": (0.002, 0.015), "mxfp8": (0.008, 0.035), "nvfp4": (0.015, 0.065)}
FORMS = [form for form, row in PACKED_FORMATS.items() if row.name in QUANT_ALGOS]

Draw = Callable[[Path], tuple[Tensor, set[str]]]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def packed(module: nn.Module) -> set[str]:
    """Names of the layers that the host holds packed."""
    found = (name for name, weight in module.named_parameters() if isinstance(weight.data, QuantizedTensor))
    return {name.removesuffix(".weight") for name in found}


@pytest.fixture(scope="module")
def draw(small: Small) -> Draw:
    """The latent that a transformer draws, and its packed layers. Its file is gone afterwards."""

    def latent(path: Path) -> tuple[Tensor, set[str]]:
        place = small.host.base / "models" / "diffusion_models" / f"quantising-{path.name}"
        shutil.copy(path, place)
        try:
            model, *_ = load(small.host, place.name)
            empty = small.empty(height=SIDE, width=SIDE)
            drawn = small.sample(model=model, latent=empty, cfg=CFG, steps=SAMPLING_STEPS)
            return drawn, packed(model.model.diffusion_model)
        finally:
            place.unlink()

    return latent


@pytest.fixture(scope="module")
def original(draw: Draw, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    convert(DEMO, path := tmp_path_factory.mktemp("original") / "demo.safetensors")
    latent, layers = draw(path)
    assert not layers
    return latent


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_transformer_draws_nearly_the_same(draw: Draw, original: Tensor, tmp_path: Path, form: str) -> None:
    quantise(DEMO, path := tmp_path / f"{form}.safetensors", form)
    latent, layers = draw(path)
    least, most = LATENT[form]
    assert least < relative(latent, original) < most
    assert len(layers) == 8 * 10 and all(name.startswith("transformer_blocks.") for name in layers)
    assert {"transformer_blocks.7.ff.conv_inverted", "transformer_blocks.0.ff.conv_point"} <= layers


@pytest.mark.parametrize("form", FORMS)
def test_packed_ends_are_taken_too(draw: Draw, original: Tensor, tmp_path: Path, form: str) -> None:
    quantise(DEMO, path := tmp_path / f"{form}-all.safetensors", form, ends=True)
    latent, layers = draw(path)
    least, most = LATENT[form]
    assert least < relative(latent, original) < most
    assert {"patch_embed.proj", "proj_out", "time_embed.linear", "caption_projection.linear_1"} <= layers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ends", [False, True])
def test_a_quantised_text_encoder_reads_nearly_the_same(small: Small, form: str, ends: bool) -> None:
    """One file, with the tokenizer in it. A packed embedding is looked up in fp8 and int8."""
    path = small.host.base / "models" / "text_encoders" / f"quantising-{form}-{ends}.safetensors"
    try:
        quantise(DEMO / "text_encoder", path, form, ends=ends)
        (clip,) = small.host.call("SanaTextEncoderLoader", text_encoder=path.name, dtype="auto")
        layers = packed(clip.cond_stage_model)
        text = replace(small, clip=clip).encode(PROMPT)[0][0]
    finally:
        path.unlink(missing_ok=True)
    least, most = TEXT[form]
    assert least < relative(text, small.positive[0][0]) < most
    assert len(layers) == 3 * 7 + (ends and form in ("fp8", "int8"))


@pytest.mark.parametrize("form", FORMS)
def test_matrices_that_no_block_divides_are_padded(small: Small, form: str) -> None:
    """240 columns in blocks of 32: the host gives back a matrix of the size that was packed."""
    path = small.path.with_name(f"quantising-{form}.safetensors")
    original = small.pipeline.transformer.transformer_blocks[1].ff.conv_point.weight
    try:
        quantise(small.path, path, form)
        model, *_ = load(small.host, path.name)
        found = model.model.diffusion_model.transformer_blocks[1].ff.conv_point.weight.dequantize()
    finally:
        path.unlink(missing_ok=True)
    assert found.shape == original.shape == (96, 240)
    least, most = WEIGHTS[form]
    assert least < relative(found, original) < most
