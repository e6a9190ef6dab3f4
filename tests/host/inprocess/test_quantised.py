"""Quantised text encoders: what they give is what the numbers give that the host unpacks. And files that it cannot unpack."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfy.sd import CLIP
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.host.inprocess.small import DEMO, EQUAL, PROMPT, Small, difference, load
from tests.host.inprocess.test_quantised_models import GROUP, ROUNDING, as_bytes, settings
from tests.host.inprocess.test_saving import saved
from tests.sana.measures import relative_error
from tests.sana.quantisers import QUANTISERS, quantised

FP8 = "float8_e4m3fn"
FORMATS = sorted(QUANT_ALGOS)
LAYER = "transformer_blocks.0.attn1.to_q"
CHANGED = 1e-2

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def original() -> Tensors:
    """The demo's Gemma-2."""
    return load_file(DEMO / "text_encoder" / "model.safetensors")


def quantise(original: Tensors, form: str) -> dict[str, QuantizedTensor]:
    """The matrices of the layers in a format of the host, by the names of their layers."""
    layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
    more = {"convrot_groupsize": GROUP} if form == "convrot_w4a4" else {}
    return {
        name.removesuffix(".weight"): QuantizedTensor.from_float(tensor, layout, scale="recalculate", **more)
        for name, tensor in original.items()
        if tensor.ndim == 2 and "layers." in name
    }


def pack(original: Tensors, matrices: dict[str, QuantizedTensor]) -> Tensors:
    """The matrices as a file holds them: packed, with their scales beside them."""
    packed = {}
    for path, matrix in matrices.items():
        packed |= matrix.state_dict(f"{path}.weight")
    return {**original, **packed}


def in_host_format(original: Tensors, form: str) -> Tensors:
    """As the host stores it: with bytes beside each matrix that say its format."""
    matrices = quantise(original, form)
    return {**pack(original, matrices), **{f"{path}.comfy_quant": as_bytes(settings(form)) for path in matrices}}


@contextmanager
def encoder(small: Small, folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Iterator[CLIP]:
    """The CLIP of a folder that is gone afterwards, so that `auto` finds it in no other test."""
    folder.mkdir()
    try:
        for source in (DEMO / "text_encoder" / "config.json", DEMO / "tokenizer" / "tokenizer.json"):
            shutil.copy(source, folder)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors", metadata)
        yield small.host.call("SanaTextEncoderLoader", text_encoder=folder.name, dtype="auto")[0]
    finally:
        shutil.rmtree(folder)


def encode(small: Small, name: str, tensors: Tensors, metadata: dict[str, str] | None = None) -> Tensor:
    """The text of an encoder."""
    with encoder(small, small.host.base / "models" / "text_encoders" / name, tensors, metadata) as clip:
        return replace(small, clip=clip).encode(PROMPT)[0][0]


@pytest.fixture(scope="module")
def expected(small: Small, original: Tensors) -> Callable[[str], Tensor]:
    """The text of the unpacked numbers, by format."""
    known: dict[str, Tensor] = {}

    def text(form: str) -> Tensor:
        if form not in known:
            unpacked = {f"{path}.weight": matrix.dequantize() for path, matrix in quantise(original, form).items()}
            known[form] = encode(small, f"{form}-unpacked", {**original, **unpacked})
        return known[form]

    return text


@pytest.mark.parametrize("form", FORMATS)
def test_quantised_text_encoder_is_that_of_the_unpacked_numbers(
    small: Small, original: Tensors, expected: Callable[[str], Tensor], form: str
) -> None:
    text = encode(small, form, in_host_format(original, form))
    if form in ROUNDING:
        assert relative_error(text, expected(form)) <= ROUNDING[form]
    else:
        assert difference(text, expected(form)) <= EQUAL
    assert difference(text, small.positive[0][0]) > CHANGED


@pytest.mark.parametrize("form", FORMATS)
def test_quantised_text_encoder_is_saved_and_loaded_to_the_bit(small: Small, original: Tensors, form: str) -> None:
    """Alone and in a whole checkpoint."""
    folder = small.host.base / "models" / "text_encoders" / f"{form}-kept"
    with encoder(small, folder, in_host_format(original, form)) as clip:
        text = replace(small, clip=clip).encode(PROMPT)[0][0]
        alone = saved(small, "CLIPSave", "text_encoders", clip=clip)
        whole = saved(small, "CheckpointSave", "checkpoints", model=small.model, clip=clip, vae=small.vae)
    (again,) = small.host.call("SanaTextEncoderLoader", text_encoder=alone.name, dtype="auto")
    for other in (again, load(small.host, whole.name)[1]):
        assert torch.equal(replace(small, clip=other).encode(PROMPT)[0][0], text)
    alone.unlink(), whole.unlink()


def test_embedding_in_a_format_of_the_host(small: Small, original: Tensors) -> None:
    """Rows are unpacked as they are looked up, which the host does in 8 bits alone."""
    embedding = original["embed_tokens.weight"]
    for form in (FP8, "nvfp4", "mxfp8"):
        matrix = QuantizedTensor.from_float(embedding, QUANT_ALGOS[form]["comfy_tensor_layout"], scale="recalculate")
        told = {"embed_tokens.comfy_quant": as_bytes({"format": form})}
        tensors = {**original, **matrix.state_dict("embed_tokens.weight"), **told}
        if form == FP8:
            unpacked = encode(small, "embedding-unpacked", {**original, "embed_tokens.weight": matrix.dequantize()})
            assert difference(encode(small, "embedding", tensors), unpacked) <= EQUAL
            tensors["embed_tokens.weight_scale"] = torch.ones(3)
        with pytest.raises(
            ValueError, match=rf"^embedding has for embed_tokens weight \(.*, which make no {form} matrix of "
        ):
            encode(small, "embedding", tensors)


def test_formats_of_a_text_encoder_in_the_header(
    small: Small, original: Tensors, expected: Callable[[str], Tensor]
) -> None:
    matrices = quantise(original, FP8)
    layers = json.dumps({"format_version": "1.0", "layers": {path: {"format": FP8} for path in matrices}})
    text = encode(small, "header", pack(original, matrices), {"_quantization_metadata": layers})
    assert difference(text, expected(FP8)) <= EQUAL


@pytest.mark.parametrize(
    ("mark", "prefix"),
    [("", "model."), ("text_encoders.gemma2_2b.transformer.", "text_encoders.gemma2_2b.transformer.model.")],
    ids=["file", "checkpoint"],
)
def test_scaled_text_encoder_for_older_hosts(
    small: Small, original: Tensors, expected: Callable[[str], Tensor], mark: str, prefix: str
) -> None:
    packed = pack(original, quantise(original, FP8))
    tensors = {prefix + key.replace(".weight_scale", ".scale_weight"): tensor for key, tensor in packed.items()}
    tensors[f"{mark}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    assert difference(encode(small, f"older-{mark}", tensors), expected(FP8)) <= EQUAL


def test_quantised_text_encoder_is_checked(small: Small, original: Tensors) -> None:
    tensors = in_host_format(original, FP8)
    del tensors["layers.1.self_attn.o_proj.weight"]
    message = rf"^incomplete lacks 1 of {len(original)} tensors, first layers.1.self_attn.o_proj.weight; "
    with pytest.raises(ValueError, match=message):
        encode(small, "incomplete", tensors)


def test_scales_of_an_unknown_format(small: Small, original: Tensors) -> None:
    """The host would compute with the packed numbers as they are."""
    layer = "layers.0.mlp.down_proj"
    numbers = torch.ones(original[f"{layer}.weight"].shape, dtype=torch.int8)
    message = rf"^scales has the scale {layer}.weight_scale, and nothing in it says in which format; "
    with pytest.raises(ValueError, match=message):
        encode(small, "scales", {**original, f"{layer}.weight": numbers, f"{layer}.weight_scale": torch.ones(())})
    path = small.path.with_name("scales.safetensors")
    with safe_open(small.path, framework="pt") as file:
        save_file({**load_file(small.path), f"{LAYER}.weight_scale": torch.ones(())}, path, file.metadata())
    with pytest.raises(ValueError, match=rf"^{path.name} has the scale {LAYER}.weight_scale, and nothing in it says "):
        load(small.host, path.name)


def test_bitsandbytes_in_a_loader_of_the_host(small: Small) -> None:
    """Which reads its own formats alone, and leaves the rest to ours."""
    path = small.path.with_name("nf4.safetensors")
    with safe_open(small.path, framework="pt") as file:
        tensors, _ = quantised(load_file(small.path), QUANTISERS["bitsandbytes nf4"], [f"{LAYER}.weight"])
        save_file(tensors, path, file.metadata())
    message = (
        f"^the checkpoint is quantised by bitsandbytes, with {LAYER}.weight.absmax beside its weights; load it with Load SANA, "
        "which unpacks it$"
    )
    with pytest.raises(ValueError, match=message):
        small.host.call("UNETLoader", unet_name=path.name, weight_dtype="default")
    assert load(small.host, path.name)[0] is not None
    path.unlink()
