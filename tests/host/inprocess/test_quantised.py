"""Text encoders with quantised matrices: they encode as the numbers do that the host unpacks."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.host.inprocess.small import DEMO, EQUAL, PROMPT, Small, difference

FP8 = "float8_e4m3fn"
FORMATS = (FP8, "nvfp4", "mxfp8")  # of the host, in every version
CHANGED = 1e-2

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def original() -> Tensors:
    """The demo's Gemma-2."""
    return load_file(DEMO / "text_encoder" / "model.safetensors")


def quantise(original: Tensors, form: str) -> dict[str, QuantizedTensor]:
    """The matrices of the layers in a format of the host, by the names of their layers."""
    layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
    return {
        name.removesuffix(".weight"): QuantizedTensor.from_float(tensor, layout, scale="recalculate")
        for name, tensor in original.items()
        if tensor.ndim == 2 and "layers." in name
    }


def pack(original: Tensors, matrices: dict[str, QuantizedTensor]) -> Tensors:
    """The matrices as a file holds them: packed, with their scales beside them."""
    packed = {}
    for path, matrix in matrices.items():
        packed |= matrix.state_dict(f"{path}.weight")
    return {**original, **packed}


def told(form: str) -> Tensor:
    """Bytes that say a format."""
    return torch.frombuffer(bytearray(json.dumps({"format": form}).encode()), dtype=torch.uint8)


def write_encoder(small: Small, name: str, tensors: Tensors, metadata: dict[str, str] | None = None) -> str:
    """A folder among the text encoders."""
    folder = small.host.base / "models" / "text_encoders" / name
    folder.mkdir()
    for source in (DEMO / "text_encoder" / "config.json", DEMO / "tokenizer" / "tokenizer.json"):
        shutil.copy(source, folder)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    return name


def encode(small: Small, name: str) -> Tensor:
    """The text of an encoder."""
    (clip,) = small.host.call("SanaTextEncoderLoader", text_encoder=name, dtype="auto")
    return replace(small, clip=clip).encode(PROMPT)[0][0]


@pytest.mark.parametrize("form", FORMATS)
def test_quantised_text_encoder_is_that_of_the_unpacked_numbers(small: Small, original: Tensors, form: str) -> None:
    matrices = quantise(original, form)
    unpacked = {f"{path}.weight": matrix.dequantize() for path, matrix in matrices.items()}
    expected = encode(small, write_encoder(small, f"{form}-unpacked", {**original, **unpacked}))
    formats = {f"{path}.comfy_quant": told(form) for path in matrices}
    text = encode(small, write_encoder(small, form, {**pack(original, matrices), **formats}))
    assert difference(text, expected) <= EQUAL
    assert difference(text, small.positive[0][0]) > CHANGED
