"""Networks quantised by the libraries that people quantise with, as tensors in the names that each of them writes."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CompressedTensorsConfig, Gemma2Model

from tests.sana.models import gemma

Tensors = dict[str, Tensor]


class Quantised(NamedTuple):
    """A matrix as a library packs it, and as the same library unpacks it."""

    stored: Tensors  # by what stands behind the name of its layer
    unpacked: Tensor  # float32


Quantiser = Callable[[Tensor], Quantised]


def by_kitchen(layout: str, form: str, told: dict[str, object] | None = None, **options: object) -> Quantiser:
    """By comfy-kitchen, ComfyUI's own. form: what ComfyUI calls the format; told: what it writes beside that."""

    def quantise(weight: Tensor) -> Quantised:
        import comfy_kitchen.tensor

        packing = getattr(comfy_kitchen.tensor, layout)
        data, params = packing.quantize(weight, **options)
        rows, columns = weight.shape
        stored = {f"weight{suffix}": t.contiguous() for suffix, t in packing.state_dict_tensors(data, params).items()}
        mark = json.dumps({"format": form, **(told or {})}).encode()
        stored["comfy_quant"] = torch.frombuffer(bytearray(mark), dtype=torch.uint8)
        return Quantised(stored, packing.dequantize(data, params)[:rows, :columns])

    return quantise


def by_bitsandbytes_4(kind: str, double: bool = False, storage: torch.dtype = torch.uint8) -> Quantiser:
    """By the layer of bitsandbytes that transformers and diffusers put into a network."""

    def quantise(weight: Tensor) -> Quantised:
        import bitsandbytes
        from bitsandbytes.functional import dequantize_4bit

        packed = bitsandbytes.nn.Params4bit(
            weight.clone(), False, quant_type=kind, compress_statistics=double, quant_storage=storage
        )
        layer = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type=kind)
        layer.weight = packed.to("cpu")
        layer.weight.module = layer
        stored, state = _saved(layer), layer.weight.quant_state
        # By blocks, since version 0.50.2 takes wrong scales on a CPU where a block reaches across rows.
        state.shape = torch.Size([weight.numel() // state.blocksize, state.blocksize])
        return Quantised(stored, dequantize_4bit(layer.weight.data, state).view(weight.shape).float())

    return quantise


def by_bitsandbytes_8(weight: Tensor) -> Quantised:
    import bitsandbytes
    from bitsandbytes.functional import int8_vectorwise_dequant

    layer = bitsandbytes.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return Quantised(_saved(layer), int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB))


def _saved(layer: nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


QUANTISERS: dict[str, Quantiser] = {
    "fp8": by_kitchen("TensorCoreFP8Layout", "float8_e4m3fn"),
    "mxfp8": by_kitchen("TensorCoreMXFP8Layout", "mxfp8"),
    "nvfp4": by_kitchen("TensorCoreNVFP4Layout", "nvfp4"),
    "int8": by_kitchen("TensorWiseINT8Layout", "int8_tensorwise"),
    "int8 by rows": by_kitchen("TensorWiseINT8Layout", "int8_tensorwise", per_channel=True),
    "int8 rotated": by_kitchen(
        "TensorWiseINT8Layout",
        "int8_tensorwise",
        {"convrot": True, "convrot_groupsize": 16},
        per_channel=True,
        convrot=True,
        convrot_groupsize=16,
    ),
    "int4 rotated": by_kitchen(
        "TensorCoreConvRotW4A4Layout", "convrot_w4a4", {"convrot_groupsize": 64}, convrot_groupsize=64
    ),
    "bitsandbytes int8": by_bitsandbytes_8,
    "bitsandbytes nf4": by_bitsandbytes_4("nf4"),
    "bitsandbytes fp4": by_bitsandbytes_4("fp4"),
    "bitsandbytes nf4 twice": by_bitsandbytes_4("nf4", double=True),
    "bitsandbytes nf4 in bfloat16": by_bitsandbytes_4("nf4", storage=torch.bfloat16),
}


def quantised(tensors: Tensors, quantise: Quantiser, names: Iterable[str]) -> tuple[Tensors, Tensors]:
    """The tensors with the matrices of these names quantised, and the same unpacked again by the library."""
    stored, unpacked = dict(tensors), dict(tensors)
    for name in names:
        found = quantise(stored.pop(name).flatten(1).float())
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in found.stored.items()}
        unpacked[name] = found.unpacked.reshape(tensors[name].shape)
    return stored, unpacked


def compressed_gemma(folder: Path, strategy: str) -> Gemma2Model:
    """Write a Gemma in FP8 as compressed-tensors does, and give what transformers reads with it, unpacked.

    strategy: "tensor" or "channel", for which there is a scale.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config

    args = {"num_bits": 8, "type": "float", "symmetric": True}
    scheme = {"targets": ["Linear"], "weights": QuantizationArgs(**args, strategy=strategy)}
    if strategy == "tensor":
        scheme["input_activations"] = QuantizationArgs(**args, strategy="tensor")
    model = gemma()
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, quantization_status="frozen")
    )
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            largest = layer.weight.abs().amax() if strategy == "tensor" else layer.weight.abs().amax(1, keepdim=True)
            layer.weight_scale.data.copy_(largest / torch.finfo(torch.float8_e4m3fn).max)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="float-quantized")
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return Gemma2Model.from_pretrained(folder, quantization_config=CompressedTensorsConfig(run_compressed=False))
