"""Quantised transformers, in every format that the host knows: drawn, saved, loaded again and given a LoRA, or refused."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import comfy.k_diffusion.sampling
import comfy.samplers
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import save_file
from torch import Tensor

from bench.weights import randomise
from sana.checkpoints.header import transformer_header
from sana.checkpoints.names import POINTWISE, with_convolutions
from sana.config import VARIANTS, TransformerIdentity
from sana.networks.transformer import SanaTransformer
from tests.host.inprocess.small import STEPS, TEXT_WIDTH, VARIANT, Small, load
from tests.host.inprocess.test_saving import saved
from tests.sana.dialects import official_transformer
from tests.sana.measures import relative_error

Tensors = dict[str, Tensor]
FORMATS = sorted(QUANT_ALGOS)
HEADER = "_quantization_metadata"
WIDTH, HEADS, FF = 576, 8, 320  # with a width that tells the heads, and sizes that every format packs
ODD_WIDTH, ODD_FF = 96, 250  # sizes that formats of blocks round up
GROUP = 64  # numbers that ConvRot rotates together; its default fits no size of SANA
# The relative error of a latent. In some formats the host rounds what comes into a product too, to 8 or 4 bits.
ROUNDING = {"int8_tensorwise": 0.05, "convrot_w4a4": 0.4}

# On a GPU the host computes with quantised layers in 16 bits, and packs a LoRA by random numbers that the stand-in lacks.
exact = pytest.mark.cpu


@cache
def network(width: int = WIDTH, ff_width: int = FF) -> SanaTransformer:
    row = VARIANTS[VARIANT].transformer
    heads = HEADS if width == WIDTH else 2
    config = replace(row, hidden_size=width, depth=2, cross_heads=heads, text_width=TEXT_WIDTH, ff_width=ff_width)
    return randomise(SanaTransformer(config), 3)


def own_header(model: SanaTransformer) -> dict[str, str]:
    """For widths that do not tell the heads."""
    row = VARIANTS[VARIANT]
    identity = TransformerIdentity(model.config, VARIANT, row.base_size, row.flow_shift, row.dtype, "its header")
    return transformer_header(identity)


def packable(name: str, tensor: Tensor, form: str, points: bool) -> bool:
    matrix = name.endswith(".weight") and tensor.ndim == 2 and (points or not name.endswith(POINTWISE))
    return matrix and (form != "convrot_w4a4" or tensor.shape[1] % GROUP == 0)


def quantise(state: Tensors, form: str, points: bool = True) -> dict[str, QuantizedTensor]:
    """The matrices in a format of the host. points: the 1x1 convolutions too."""
    layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
    more = {"convrot_groupsize": GROUP} if form == "convrot_w4a4" else {}
    return {
        name: QuantizedTensor.from_float(tensor, layout, scale="recalculate", **more)
        for name, tensor in state.items()
        if packable(name, tensor, form, points)
    }


def settings(form: str) -> dict[str, object]:
    return {"format": form, **({"convrot_groupsize": GROUP} if form == "convrot_w4a4" else {})}


def as_bytes(told: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)


def packed(state: Tensors, form: str, points: bool = True) -> Tensors:
    """A file of the host: what is not quantised in diffusers' shapes, and beside each packed matrix its format."""
    found = with_convolutions(state)
    for name, matrix in quantise(state, form, points).items():
        found |= matrix.state_dict(name)
        found[name.removesuffix("weight") + "comfy_quant"] = as_bytes(settings(form))
    return found


def unpacked(state: Tensors, form: str, points: bool = True) -> Tensors:
    return {**state, **{name: matrix.dequantize() for name, matrix in quantise(state, form, points).items()}}


def write(small: Small, name: str, tensors: Tensors, header: dict[str, str] | None = None) -> Path:
    path = small.host.base / "models" / "diffusion_models" / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, header)
    return path


def draw(small: Small, path: Path, dtype: str = "fp32") -> Tensor:
    return small.ksampler(model=load(small.host, path.name, dtype)[0])


def expected(small: Small, model: SanaTransformer, weights: Tensors) -> Tensor:
    """The latent of `sana` with these weights."""
    twin = SanaTransformer(model.config, device="meta")
    twin.load_state_dict(weights, assign=True)
    return latent_of(small, twin.requires_grad_(False))


def latent_of(small: Small, transformer: SanaTransformer) -> Tensor:
    """What the KSampler of `draw` should give."""
    sampling = small.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
    euler = comfy.k_diffusion.sampling.sample_euler
    return small.reference(euler, sigmas, small.empty(), transformer=transformer)


@exact
@pytest.mark.parametrize("points", [False, True], ids=["linear", "with 1x1 convolutions"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_draws_what_its_numbers_say(small: Small, form: str, points: bool) -> None:
    """From a file without a header of ours: all sizes are read from packed tensors."""
    state = dict(network().state_dict())
    path = write(small, f"{form}-{points}", packed(state, form, points))
    model = load(small.host, path.name)[0]
    assert asdict(model.model.identity.config) == asdict(network().config)
    layers, matrices = model.model.diffusion_model, quantise(state, form, points)
    assert len(matrices) > 10 and ("transformer_blocks.1.ff.conv_point.weight" in matrices) == points
    for name, matrix in matrices.items():
        weight = layers.get_parameter(name)
        assert isinstance(weight, QuantizedTensor) and torch.equal(weight.dequantize(), matrix.dequantize()), name
    latent = small.ksampler(model=model)
    assert relative_error(latent, expected(small, network(), unpacked(state, form, points))) <= ROUNDING.get(form, 1e-5)
    assert relative_error(latent, expected(small, network(), state)) > 1e-3
    path.unlink()


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_saved_and_loaded_to_the_bit(small: Small, form: str) -> None:
    """By our loader and by the host's two, the file itself and what Save Checkpoint and Save Model write."""
    path = write(small, f"{form}-saved", packed(dict(network().state_dict()), form))
    model = load(small.host, path.name, "auto")[0]
    latent = small.ksampler(model=model)
    (core,) = small.host.call("UNETLoader", unet_name=path.name, weight_dtype="default")
    whole = saved(small, "CheckpointSave", "checkpoints", model=model, clip=small.clip, vae=small.vae)
    alone = saved(small, "ModelSave", "diffusion_models", model=model)
    again = [
        core,
        load(small.host, whole.name, "auto")[0],
        small.host.call("CheckpointLoaderSimple", ckpt_name=whole.name)[0],
        load(small.host, alone.name, "auto")[0],
    ]
    for other in again:
        assert torch.equal(small.ksampler(model=other), latent)
        assert other.model.identity.config == model.model.identity.config
    for file in (path, whole, alone):
        file.unlink()


@exact
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "convrot_w4a4"])  # which packs no such size
def test_sizes_that_blocks_round_up(small: Small, form: str) -> None:
    odd = network(ODD_WIDTH, ODD_FF)
    state = dict(odd.state_dict())
    path = write(small, f"{form}-odd", packed(state, form), own_header(odd))
    error = relative_error(draw(small, path), expected(small, odd, unpacked(state, form)))
    assert error <= ROUNDING.get(form, 1e-5)
    path.unlink()


@pytest.mark.parametrize("form", FORMATS)
def test_formats_in_the_header(small: Small, form: str) -> None:
    """As tools of others write them, one of which halves matrices of a dtype that others do not."""
    tensors = packed(dict(network().state_dict()), form)
    layers = {key.removesuffix(".comfy_quant"): settings(form) for key in tensors if key.endswith(".comfy_quant")}
    path = write(small, f"{form}-beside", tensors)
    bare = {key: tensor for key, tensor in tensors.items() if not key.endswith(".comfy_quant")}
    header = {HEADER: json.dumps({"format_version": "1.0", "layers": layers})}
    other = write(small, f"{form}-header", bare, header)
    latent = draw(small, path)
    assert torch.equal(draw(small, other), latent)
    (core,) = small.host.call("UNETLoader", unet_name=other.name, weight_dtype="default")
    assert torch.equal(small.ksampler(model=core), latent)
    path.unlink(), other.unlink()


@exact
@pytest.mark.parametrize("form", FORMATS)
def test_lora_on_a_quantised_model(small: Small, form: str) -> None:
    """The host packs the sum again, so a LoRA is as strong as on the unpacked numbers, up to that rounding."""
    torch.manual_seed(0)
    state = dict(network().state_dict())
    numbers, lora = unpacked(state, form), {}
    for layer in ("transformer_blocks.0.attn1.to_v", "transformer_blocks.1.ff.conv_point", "proj_out"):
        rows, columns = state[f"{layer}.weight"].shape
        down, up = torch.randn(4, columns) / columns**0.5, torch.randn(rows, 4)
        lora |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
        numbers[f"{layer}.weight"] = numbers[f"{layer}.weight"] + up @ down
    file = small.host.base / "models" / "loras" / f"{form}.safetensors"
    save_file(lora, file)
    path = write(small, f"{form}-lora", packed(state, form))
    model = load(small.host, path.name)[0]
    (patched,) = small.host.call("LoraLoaderModelOnly", model=model, lora_name=file.name, strength_model=1.0)
    target = expected(small, network(), numbers)
    error, without = (relative_error(small.ksampler(model=part), target) for part in (patched, model))
    assert error < (0.75 if form == "convrot_w4a4" else 0.5) * without
    file.unlink(), path.unlink()


FUSED = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v")}


@exact
@pytest.mark.parametrize("form", FORMATS)
def test_scales_go_with_their_rows(small: Small, form: str) -> None:
    """Official files hold q, k and v in one matrix. Scales of blocks lie in tiles of 128 rows, which no part of it fills."""
    assert WIDTH % 128
    state = dict(network().state_dict())
    official = official_transformer(with_convolutions(state))
    layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
    more = {"int8_tensorwise": {"per_channel": True}, "convrot_w4a4": {"convrot_groupsize": GROUP}}.get(form, {})
    for name in [name for name in official if name.endswith(tuple(f"{part}.weight" for part in FUSED))]:
        _, index, layer = name.removesuffix(".weight").split(".", 2)
        whole = QuantizedTensor.from_float(official[name], layout, scale="recalculate", **more)
        official |= whole.state_dict(name)
        official[name.removesuffix("weight") + "comfy_quant"] = as_bytes(settings(form))
        names = [f"transformer_blocks.{index}.{part}.weight" for part in FUSED[layer]]
        state |= dict(zip(names, whole.dequantize().chunk(len(names)), strict=True))
    path = write(small, "rows", official)
    model = load(small.host, path.name)[0]
    for name in (f"transformer_blocks.1.{part}.weight" for parts in FUSED.values() for part in parts):
        assert torch.equal(model.model.diffusion_model.get_parameter(name).dequantize(), state[name]), name
    assert relative_error(small.ksampler(model=model), expected(small, network(), state)) <= ROUNDING.get(form, 1e-5)
    path.unlink()


def test_plain_fp8_of_matrices_and_convolutions(small: Small) -> None:
    """Without scales, in two and in four dimensions, beside the rest in float16: as somebody has published SANA-1.5."""
    state = dict(network().state_dict())
    file = {name: tensor.half() for name, tensor in with_convolutions(state).items()}
    matrices = [name for name in state if name.endswith(".weight") and state[name].ndim == 2 and ".emb." not in name]
    file |= {name: file[name].to(torch.float8_e4m3fn) for name in matrices}
    assert {file[name].ndim for name in matrices} == {2, 4}
    path = write(small, "plain-fp8", file)
    numbers = {name: tensor.flatten(1).float() if name in matrices else tensor.float() for name, tensor in file.items()}
    numbers = {name: tensor.view(state[name].shape) for name, tensor in numbers.items()}
    assert relative_error(draw(small, path), expected(small, network(), numbers)) <= 1e-5
    path.unlink()


@exact
def test_what_the_host_may_read_beside_a_matrix(small: Small) -> None:
    """A scale of what comes in, where the host knows it in the format, and kernels to prefer, which change nothing."""
    state = dict(network().state_dict())
    tensors = packed(state, "nvfp4")
    layer = "transformer_blocks.1.attn1.to_q"
    tensors["transformer_blocks.0.attn1.comfy_attention.config"] = as_bytes([{"attention": "comfy_kitchen_int8"}])
    path = write(small, "kernels", tensors)
    assert relative_error(draw(small, path), expected(small, network(), unpacked(state, "nvfp4"))) <= 1e-5
    path.unlink()
    smoothing = torch.linspace(0.5, 2.0, WIDTH)
    path = write(small, "smooth", {**tensors, f"{layer}.pre_quant_scale": smoothing})
    if "pre_quant_scale" in QUANT_ALGOS["nvfp4"]["parameters"]:
        numbers = unpacked(state, "nvfp4")
        numbers[f"{layer}.weight"] = numbers[f"{layer}.weight"] * smoothing
        assert relative_error(draw(small, path), expected(small, network(), numbers)) <= 1e-5
    else:  # it would be left out
        message = (
            rf"^smooth.safetensors has {layer}.pre_quant_scale, which this ComfyUI does not read in the format nvfp4; "
        )
        with pytest.raises(ValueError, match=message):
            load(small.host, path.name)
    path.unlink()


LAYER = "transformer_blocks.0.attn1.to_k"
BAD: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "half the columns": (
        "nvfp4",
        lambda t: {f"{LAYER}.weight": t[f"{LAYER}.weight"][:, :144]},
        rf"has for {LAYER} weight (576, 144) in uint8, weight_scale (640, 36) in float8_e4m3fn, weight_scale_2 () in float32, "
        "which make no nvfp4 matrix of 576 x 576 numbers; it is damaged or another model",
    ),
    "half the rows": (
        "float8_e4m3fn",
        lambda t: {f"{LAYER}.weight": t[f"{LAYER}.weight"][:288]},
        f"has for {LAYER} weight (288, 576) in float8_e4m3fn, weight_scale () in float32, which make no float8_e4m3fn matrix ",
    ),
    "twice the columns": (
        "float8_e4m3fn",
        lambda t: {f"{LAYER}.weight": torch.zeros(576, 1152, dtype=torch.float8_e4m3fn)},
        f"has for {LAYER} weight (576, 1152) in float8_e4m3fn, weight_scale () in float32, which make no float8_e4m3fn matrix ",
    ),
    "scales of another size": (
        "mxfp8",
        lambda t: {f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"][:128]},
        f"has for {LAYER} weight (576, 576) in float8_e4m3fn, weight_scale (128, 20) in float8_e8m0fnu, which make no mxfp8 ",
    ),
    "scales of another dtype beside those of others": (
        "mxfp8",
        lambda t: {f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"].float()},
        f"has for {LAYER} weight (576, 576) in float8_e4m3fn, weight_scale (640, 20) in float32, which make no mxfp8 matrix of "
        "576 x 576 numbers; it is",
    ),
    "no scale": (
        "float8_e4m3fn",
        lambda t: {f"{LAYER}.weight_scale": None},
        f"lacks the scale of {LAYER}; the download may be incomplete",
    ),
    "one scale of two": (
        "nvfp4",
        lambda t: {f"{LAYER}.weight_scale_2": None},
        f"has for {LAYER} weight (576, 288) in uint8, weight_scale (640, 36) in float8_e4m3fn, which make no nvfp4 matrix of ",
    ),
    "a scale that is not finite": (
        "nvfp4",
        lambda t: {f"{LAYER}.weight_scale_2": torch.tensor(float("nan"))},
        f"has numbers in {LAYER}.weight_scale_2 that are not finite; it is damaged",
    ),
    "a block scale that is not finite": (
        "mxfp8",
        lambda t: {f"{LAYER}.weight_scale": torch.full((640, 20), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)},
        f"has numbers in {LAYER}.weight_scale that are not finite; it is damaged",
    ),
    "an unknown format": (
        "nvfp4",
        lambda t: {f"{LAYER}.comfy_quant": as_bytes({"format": "int2_of_tomorrow"})},
        f"has {LAYER} in the format int2_of_tomorrow, and this ComfyUI knows float8_e4m3fn, float8_e5m2, nvfp4, mxfp8",
    ),
    "a format that is no JSON": (
        "nvfp4",
        lambda t: {f"{LAYER}.comfy_quant": torch.zeros(9, dtype=torch.uint8)},
        f"has {LAYER} in the format None, and this ComfyUI knows float8_e4m3fn, ",
    ),
    "statistics of another tool": (
        "nvfp4",
        lambda t: {f"{LAYER}.weight.absmax": torch.ones(9)},
        f"has {LAYER}.weight.absmax, which this ComfyUI does not read in the format nvfp4; update ComfyUI, or use a file with",
    ),
    "a format of a norm": (
        "nvfp4",
        lambda t: {"caption_norm.comfy_quant": as_bytes({"format": "nvfp4"})},
        "has a format for caption_norm, which has no matrix; it is another model",
    ),
    "a format of no layer": (
        "nvfp4",
        lambda t: {"transformer_blocks.0.attn3.comfy_quant": as_bytes({"format": "nvfp4"})},
        "has a format for transformer_blocks.0.attn3, which has no matrix; it is another model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_packed_weights_are_refused_in_one_sentence(small: Small, case: str) -> None:
    form, change, message = BAD[case]
    tensors = packed(dict(network().state_dict()), form)
    changed = {key: tensor for key, tensor in {**tensors, **change(tensors)}.items() if tensor is not None}
    path = write(small, "bad", changed)
    with pytest.raises(ValueError) as caught:
        load(small.host, path.name)
    assert str(caught.value).startswith(f"bad.safetensors {message}") and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="^the checkpoint "):
        small.host.call("UNETLoader", unet_name=path.name, weight_dtype="default")
    path.unlink()


@pytest.mark.parametrize("where", ["header", "older hosts"])
def test_two_formats_for_a_layer(small: Small, where: str) -> None:
    tensors = packed(dict(network().state_dict()), "nvfp4")
    header = None
    if where == "header":
        header = {HEADER: json.dumps({"format_version": "1.0", "layers": {LAYER: {"format": "float8_e5m2"}}})}
        told = "nvfp4 and float8_e5m2"
    else:
        tensors |= {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), f"{LAYER}.scale_weight": torch.ones(())}
        told = "nvfp4 and float8_e4m3fn"
    path = write(small, "two", tensors, header)
    with pytest.raises(
        ValueError, match=f"^two.safetensors tells two formats for the layer {LAYER}, {told}; use a file"
    ):
        load(small.host, path.name)
    path.unlink()
