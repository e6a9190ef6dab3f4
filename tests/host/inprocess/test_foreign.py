"""Models quantised by bitsandbytes, compressed-tensors and llama.cpp: the graph makes of a file what the shell makes of it."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.sd import CLIP
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana import SanaPipeline, load_text_encoder, load_transformer
from sana.checkpoints.names import with_convolutions
from sana.checkpoints.writing import transformer_json
from sana.networks.packed import PackedWeight
from tests.host.inprocess.small import DEMO, EQUAL, PROMPT, Small, difference, limit, load
from tests.host.inprocess.test_quantised_models import latent_of, network, packed, write
from tests.host.inprocess.test_saving import same_bits, saved, weights
from tests.sana.gguf_writer import write_gguf
from tests.sana.measures import relative_error
from tests.sana.models import gemma, tokenizer_json
from tests.sana.quantisers import QUANTISERS, compressed_gemma, quantised

Tensors = dict[str, Tensor]
FORMS = [form for form in QUANTISERS if form.startswith("bitsandbytes")]
ENDS = (*(f".{name}.weight" for name in ("to_q", "to_k", "to_v", "linear_1", "linear")), "_proj.weight")
BF16 = 0.04  # relative error of a text by weights in bfloat16, with which some devices compute as well
LAYER, STATE = "transformer_blocks.0.attn1.to_q", "weight.quant_state.bitsandbytes__nf4"


def pack(tensors: Tensors, form: str, dtype: torch.dtype) -> Tensors:
    """As bitsandbytes packs linear layers, the rest in this dtype."""
    names = [name for name in tensors if name.endswith(ENDS)]
    stored, _ = quantised({name: tensor.to(dtype) for name, tensor in tensors.items()}, QUANTISERS[form], names)
    return {name: tensor.contiguous() for name, tensor in stored.items()}


@pytest.fixture
def folder(small: Small) -> Iterator[Path]:
    """A pipeline folder among those of the host, without a transformer. It is gone afterwards."""
    found = small.host.base / "models" / "diffusers" / "foreign"
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(DEMO / part, found / part)
    (found / "model_index.json").write_text("{}")
    yield found
    shutil.rmtree(found)


def write_transformer(folder: Path, form: str, dtype: torch.dtype = torch.float32) -> Path:
    """A transformer in nf4 or the like in a pipeline folder, the rest of it in this dtype."""
    config = {"_class_name": "SanaTransformer2DModel", **transformer_json(network().config, 1024)}
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(pack(with_convolutions(network().state_dict()), form, dtype), path)
    return path


def write_text_encoder(folder: Path, form: str, dtype: torch.dtype = torch.float32) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    save_file(pack(load_file(path), form, dtype), path)


def encode(small: Small, clip: CLIP) -> Tensor:
    return replace(small, clip=clip).encode(PROMPT, "none")[0][0]


def of_shell(path: Path) -> Tensor:
    """The text as `sana` encodes it, in float32."""
    return load_text_encoder(path)([PROMPT], None)[0]


def text_encoder(small: Small, name: str, dtype: str = "auto") -> CLIP:
    return small.host.call("SanaTextEncoderLoader", text_encoder=name, dtype=dtype)[0]


def ids(clip: CLIP) -> list[int]:
    """The tokens of the prompt, the first of which begins every text."""
    return clip.cond_stage_model.encoder.tokenizer.encode(PROMPT)


def counted(small: Small, loader: str, **inputs: str) -> int:
    """What the user interface is told of the prompt."""
    question = {"loader": loader, "text": PROMPT, "instruction": "none", **inputs}
    return small.host.pack("nodes.answers").tokens(question)["used"]


def dtypes(clip: CLIP) -> set[torch.dtype]:
    return {tensor.dtype for tensor in clip.cond_stage_model.encoder.model.state_dict().values()}


# bitsandbytes


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_of_bitsandbytes_draws_what_the_shell_draws(small: Small, folder: Path, form: str) -> None:
    write_transformer(folder, form), write_text_encoder(folder, form)
    model, clip, _ = load(small.host, folder.name)
    twin = load_transformer(folder)
    packed = [name for name, layer in twin.named_modules() if isinstance(layer, PackedWeight)]
    assert len(packed) == 2 * 6 + 3
    for name in packed:
        assert torch.equal(weights(model)[name], twin.get_submodule(name)()), name
    latent = small.ksampler(model=model)
    assert difference(latent, latent_of(small, twin)) <= EQUAL
    assert relative_error(latent, latent_of(small, network())) > 1e-3
    encoder = load_text_encoder(folder).model
    layers = {name: layer for name, layer in encoder.named_modules() if isinstance(layer, PackedWeight)}
    assert len(layers) == 7 * encoder.config.num_hidden_layers
    for name, weight in clip.cond_stage_model.encoder.model.state_dict().items():
        assert torch.equal(weight, layers[name](torch.bfloat16)) if name in layers else weight.dtype == torch.float32
    assert relative_error(encode(small, clip), of_shell(folder)) < BF16
    assert counted(small, "SanaCheckpointLoader", model=folder.name, text_encoder="auto") == len(ids(clip)) - 1


@pytest.mark.parametrize(
    ("others", "dtype", "given"),
    [
        (torch.float16, None, torch.float16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float8_e4m3fn, torch.float16),  # to which the host casts all of them
    ],
)
def test_numbers_are_unpacked_into_16_bits(
    small: Small,
    folder: Path,
    others: torch.dtype,
    dtype: torch.dtype | None,
    given: torch.dtype,
    caplog: pytest.LogCaptureFixture,
) -> None:
    foreign, files = small.host.pack("nodes.host.foreign"), small.host.pack("sana.checkpoints.files")
    write_transformer(folder, "bitsandbytes nf4", others)
    file = foreign.in_host_formats(files.read_tensors(folder, "transformer"))
    with caplog.at_level(logging.INFO):
        tensors = foreign.unpacked(file.tensors, dtype, "it")
    found = {name: tensor for name, tensor in tensors.items() if name.endswith(ENDS)}
    assert {tensor.dtype for tensor in found.values()} == {given}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in found} == {others}
    size = sum(tensor.nbytes for tensor in found.values()) / 1e9
    assert caplog.messages == [
        "it has quantised matrices, 15 in bitsandbytes nf4, which ComfyUI does not compute with; unpacked into "
        f"{str(given).removeprefix('torch.')} they take {size:.2f} GB"
    ]


def test_a_file_that_is_not_quantised_is_left_alone(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    foreign, files = small.host.pack("nodes.host.foreign"), small.host.pack("sana.checkpoints.files")
    file = files.read_tensors(small.path)
    with caplog.at_level(logging.INFO):
        found = foreign.unpacked(foreign.in_host_formats(file).tensors, torch.float16, "it")
    assert found.keys() == file.tensors.keys() and not caplog.messages
    assert all(found[name] is tensor for name, tensor in file.tensors.items())


def test_a_lora_is_as_strong_as_in_the_shell(small: Small, folder: Path) -> None:
    """On the transformer, also where the device keeps none of its weights, and on the text encoder."""
    torch.manual_seed(0)
    write_transformer(folder, "bitsandbytes nf4"), write_text_encoder(folder, "bitsandbytes int8")
    model, clip, _ = load(small.host, folder.name)
    lora = {}
    names = [
        f"transformer.{LAYER}",
        "transformer.transformer_blocks.1.attn2.to_v",
        "text_encoder.layers.1.mlp.down_proj",
    ]
    for name in names:
        part = load_transformer(folder) if name.startswith("transformer.") else load_text_encoder(folder).model
        rows, columns = part.get_submodule(name.split(".", 1)[1]).weight.shape
        lora[f"{name}.lora_A.weight"] = torch.randn(4, columns) / columns**0.5
        lora[f"{name}.lora_B.weight"] = torch.randn(rows, 4)
    file = small.host.base / "models" / "loras" / "foreign.safetensors"
    save_file(lora, file)
    inputs = {"model": model, "clip": clip, "lora_name": file.name, "strength_model": 0.75, "strength_clip": 0.75}
    patched, encoder = small.host.call("LoraLoader", **inputs)
    pipeline = SanaPipeline.load(folder, loras=[(file, 0.75)])
    expected = latent_of(small, pipeline.transformer)
    for found in (patched, limit(patched, 0)):
        assert difference(small.ksampler(model=found), expected) <= EQUAL
    assert relative_error(small.ksampler(model=model), expected) > 0.01
    text = pipeline.text_encoder([PROMPT], None)[0]
    assert relative_error(encode(small, encoder), text) < BF16 < relative_error(encode(small, clip), text)
    file.unlink()


@pytest.mark.parametrize("form", ["bitsandbytes nf4", "bitsandbytes int8"])
def test_what_is_saved_of_it_loads_here_and_in_the_shell(small: Small, folder: Path, form: str) -> None:
    write_transformer(folder, form, torch.float16), write_text_encoder(folder, form)
    model, clip, _ = load(small.host, folder.name, "auto")
    whole = saved(small, "CheckpointSave", "checkpoints", model=model, clip=clip, vae=small.vae)
    again, text, _ = load(small.host, whole.name, "auto")
    assert same_bits(weights(again), weights(model)) and again.model.identity == model.model.identity
    latent = small.ksampler(model=model)
    assert torch.equal(small.ksampler(model=again), latent)
    assert torch.equal(encode(small, text), encode(small, clip))
    assert relative_error(latent_of(small, load_transformer(whole)), latent) < 0.01
    written = load_text_encoder(whole, None).model.state_dict()
    assert same_bits(written, clip.cond_stage_model.encoder.model.state_dict())
    whole.unlink()


BROKEN = {
    "a scale that is not finite": (
        "bitsandbytes int8",
        {f"{LAYER}.SCB": torch.full((576,), torch.nan)},
        f"transformer has the quantised layer {LAYER} with a SCB that is not finite; take the original file",
    ),
    "nothing that tells the blocks": (
        "bitsandbytes nf4",
        {f"{LAYER}.{STATE}": torch.zeros(64, dtype=torch.uint8)},
        f"transformer has the quantised layer {LAYER} with a {STATE} that does not tell its shape and blocks; take the",
    ),
    "a list of numbers alone": (
        "bitsandbytes nf4",
        {f"{LAYER}.{STATE}": None, f"{LAYER}.weight.absmax": None},
        f"transformer has the quantised layer {LAYER} with weight.quant_map beside it, and nothing says in which format; ",
    ),
    "no weight": (
        "bitsandbytes int8",
        {f"{LAYER}.weight": None},
        f"transformer has SCB, weight_format of {LAYER}, and not its weight; the download may be incomplete",
    ),
    "a matrix of another width": (
        "bitsandbytes int8",
        {f"{LAYER}.weight": torch.zeros(576, 500, dtype=torch.int8)},
        f"transformer: tensor {LAYER}.weight has shape (576, 500) instead of (576, 576); it is another model or was made",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_matrices_are_named_in_one_sentence(small: Small, folder: Path, case: str) -> None:
    form, change, message = BROKEN[case]
    path = write_transformer(folder, form)
    tensors = {name: tensor for name, tensor in {**load_file(path), **change}.items() if tensor is not None}
    save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        load(small.host, folder.name)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# compressed-tensors


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_gemma_in_fp8_by_compressed_tensors(small: Small, strategy: str, told: bool) -> None:
    """One scale for a matrix is a format of the host; one for each row is not. told: whether config.json says who packed it."""
    place = small.host.base / "models" / "text_encoders" / f"fp8-{strategy}"
    with torch.inference_mode(False):
        compressed_gemma(place, strategy)
    config = json.loads((place / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    if not told:
        del config["quantization_config"]
        (place / "config.json").write_text(json.dumps(config))
    (place / "tokenizer.json").write_bytes(tokenizer_json())
    clip, expected = text_encoder(small, place.name, "fp32"), of_shell(place)
    layer = clip.cond_stage_model.encoder.model.layers[1].mlp.up_proj
    assert isinstance(layer.weight, QuantizedTensor) == (strategy == "tensor")
    assert torch.equal(
        layer.weight.dequantize() if strategy == "tensor" else layer.weight,
        load_text_encoder(place).model.layers[1].mlp.up_proj.weight(),
    )
    assert relative_error(encode(small, clip), expected) < 1e-5
    auto = text_encoder(small, place.name)
    assert relative_error(encode(small, auto), expected) < BF16
    path = saved(small, "CLIPSave", "text_encoders", clip=auto)
    assert torch.equal(encode(small, text_encoder(small, path.name)), encode(small, auto))
    assert relative_error(encode(small, text_encoder(small, path.name, "fp32")), of_shell(path)) < 1e-5
    path.unlink(), shutil.rmtree(place)


def test_float8_with_scales_alone(small: Small) -> None:
    """Beside them nothing says in which format; the dtype does."""
    tensors = packed(dict(network().state_dict()), "float8_e4m3fn")
    path = write(small, "marked", tensors)
    model = load(small.host, path.name)[0]
    bare = write(small, "bare", {key: part for key, part in tensors.items() if not key.endswith(".comfy_quant")})
    found = load(small.host, bare.name)[0]
    ours, theirs = (each.model.diffusion_model.get_parameter(f"{LAYER}.weight") for each in (found, model))
    assert isinstance(ours, QuantizedTensor) and torch.equal(ours.dequantize(), theirs.dequantize())
    assert torch.equal(small.ksampler(model=found), small.ksampler(model=model))
    path.unlink(), bare.unlink()


# GGUF


@pytest.fixture
def gguf(small: Small) -> Iterator[Callable[..., Path]]:
    """Writes a Gemma as GGUF among the text encoders of the host."""
    found = []

    def write(name: str, kind: Kind = Kind.Q8_0) -> Path:
        found.append(small.host.base / "models" / "text_encoders" / name)
        found[-1].parent.mkdir(exist_ok=True)
        return write_gguf(found[-1], dict(gemma().state_dict()), lambda name: kind)

    yield write
    for path in found:
        path.unlink()


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.F16], ids=lambda kind: kind.name)
def test_gemma_in_gguf_encodes_as_in_the_shell(small: Small, gguf: Callable[..., Path], kind: Kind) -> None:
    path = gguf("gemma.gguf", kind)
    expected = of_shell(path)
    clip = text_encoder(small, path.name, "fp32")
    assert dtypes(clip) == {torch.float32}
    assert relative_error(encode(small, clip), expected) < 1e-5
    auto = text_encoder(small, path.name)
    assert dtypes(auto) == {torch.float32, torch.float16 if kind == Kind.F16 else torch.bfloat16}
    assert relative_error(encode(small, auto), expected) < BF16
    assert counted(small, "SanaTextEncoderLoader", text_encoder=path.name) == len(ids(clip)) - 1
    written = saved(small, "CLIPSave", "text_encoders", clip=auto)
    assert torch.equal(encode(small, text_encoder(small, written.name)), encode(small, auto))
    written.unlink()


def test_gguf_files_are_text_encoders_alone(small: Small, gguf: Callable[..., Path]) -> None:
    """In folders of folders too, behind all others, and not where an autoencoder is chosen."""
    path = gguf("a.gguf"), gguf("deep/b.gguf")
    other = small.host.base / "models" / "vae" / "c.gguf"
    shutil.copy(path[0], other)
    files = small.host.pack("nodes.model_files")
    assert files.part_names("text_encoders")[-2:] == ["a.gguf", "deep/b.gguf"]
    assert "c.gguf" not in files.part_names("vae")
    assert relative_error(encode(small, text_encoder(small, "deep/b.gguf", "fp32")), of_shell(path[0])) < 1e-5
    other.unlink()


def test_auto_takes_a_gguf_where_nothing_else_is(
    small: Small, gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says of one that does not fit the model why not."""
    files = small.host.pack("nodes.model_files")
    monkeypatch.setattr(files, "_folders", lambda folder: {})
    monkeypatch.setattr(files, "_files", lambda folder: [])
    path, load_clip = gguf("gemma.gguf"), small.host.pack("nodes.host.clip").load_clip

    def find(width: int) -> Path:
        transformer = replace(small.model.model.identity.config, text_width=width)
        load = partial(load_clip, transformer=transformer)
        return files.load_part(files.TEXT_ENCODER, Path("model.safetensors"), files.AUTO, load)[0]

    assert find(64) == path
    with pytest.raises(
        ValueError, match=r" fits \(gemma.gguf is a Gemma-2 of width 64, and the transformer takes .* 192\); "
    ):
        find(192)


def test_a_gguf_without_the_package(small: Small, gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf("gemma.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError) as caught:
        text_encoder(small, path.name)
    assert str(caught.value) == (
        "gemma.gguf is GGUF, which needs the package gguf; install it by `pip install gguf`, or take a safetensors file"
    )
