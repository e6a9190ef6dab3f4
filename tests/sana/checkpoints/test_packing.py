"""Quantised files: read without the library that wrote them, they give its numbers, and stay packed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sana import CheckpointError, SanaPipeline, load_text_encoder, load_transformer
from sana.checkpoints.files import TensorFile, read_tensors
from sana.checkpoints.inspection import describe_file
from sana.checkpoints.packing import with_packed
from sana.checkpoints.text_encoder import gemma_json
from sana.checkpoints.transformer import find_transformer
from sana.checkpoints.writing import convert
from sana.networks.packed import PackedWeight
from sana.networks.packed_layers import PackedConv2d, PackedEmbedding, PackedLinear
from sana.plan import Settings
from sana.training.finetune import FinetuneConfig, finetune
from tests.sana.dialects import official_transformer
from tests.sana.measures import mapped_bytes, relative_error
from tests.sana.models import GEMMA, PROMPTS, gemma, tokenizer_json, write_model
from tests.sana.quantisers import QUANTISERS, Tensors, compressed_gemma, quantised
from tests.sana.shell.commands import Shell
from tests.sana.twins import TEXT_WIDTH

HEADS = {"num_cross_attention_heads": 2}
FILE = Path("model.safetensors")
Q, POINT = "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.conv_point"
# Of a twin. Their widths are multiples of 16, which some formats pad.
MATRICES = [
    f"transformer_blocks.{i}.{name}.weight"
    for i in range(3)
    for name in ("attn1.to_q", "attn1.to_v", "attn1.to_out.0", "attn2.to_k", "ff.conv_inverted", "ff.conv_point")
] + ["time_embed.linear.weight", "proj_out.weight", "patch_embed.proj.weight"]
FORMS = [form for form in QUANTISERS if form != "int4 rotated"]  # which takes multiples of 64 alone


def write(folder: Path, tensors: Tensors, config: object = HEADS, **header: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path := folder / FILE, header)
    return path


def velocity(path: Path, **options: object) -> Tensor:
    torch.manual_seed(1)
    x, text = torch.randn(2, 32, 3, 5), torch.randn(2, 7, TEXT_WIDTH)
    with torch.no_grad():
        return load_transformer(path, **options)(x, torch.tensor([999.0, 20.0]), text)


def refusal(tensors: Tensors, config: object = HEADS, **header: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_transformer(TensorFile(FILE, tensors, header, config))
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_transformer_computes_what_the_library_unpacks(tmp_path: Path, diffusers: Tensors, form: str) -> None:
    stored, unpacked = quantised(diffusers, QUANTISERS[form], MATRICES)
    path = write(tmp_path / "packed", stored)
    network = load_transformer(path)
    packed = [name for name, layer in network.named_modules() if isinstance(layer, PackedLinear)]
    assert sorted(packed) == sorted(name.removesuffix(".weight") for name in MATRICES)
    for name in MATRICES:
        assert relative_error(unpacked[name], diffusers[name]) < 0.15
        layer = network.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(layer.weight(), unpacked[name].flatten(1), rtol=1e-6, atol=1e-7)
    expected = velocity(write(tmp_path / "unpacked", unpacked))
    assert relative_error(velocity(path), expected) < 1e-5
    assert relative_error(velocity(path, dtype=torch.bfloat16), expected) < 0.1


@pytest.mark.parametrize("form", ["fp8", "mxfp8", "nvfp4", "int8 by rows"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_parts_of_a_matrix_are_cut_with_what_belongs_to_them(
    tmp_path: Path, diffusers: Tensors, form: str, prefix: str
) -> None:
    """Official files hold q, k and v as one."""
    official = official_transformer(diffusers)
    names = [name for name in official if name.endswith((".qkv.weight", ".kv_linear.weight"))]
    stored, unpacked = quantised(official, QUANTISERS[form], names)
    path = write(tmp_path / "packed", {prefix + name: tensor for name, tensor in stored.items()})
    assert isinstance(load_transformer(path).transformer_blocks[2].attn1.to_v, PackedLinear)
    assert relative_error(velocity(path), velocity(write(tmp_path / "unpacked", unpacked))) < 1e-5


def test_blocks_that_reach_across_rows_are_unpacked_where_they_must_be_cut(tmp_path: Path, diffusers: Tensors) -> None:
    """Of 64 numbers, in rows of 96."""
    official = official_transformer(diffusers)
    stored, unpacked = quantised(official, QUANTISERS["bitsandbytes nf4"], ["blocks.0.attn.qkv.weight"])
    path = write(tmp_path / "packed", stored)
    assert not isinstance(load_transformer(path).transformer_blocks[0].attn1.to_k, PackedLinear)
    assert relative_error(velocity(path), velocity(write(tmp_path / "unpacked", unpacked))) < 1e-5


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_a_header_tells_the_formats_of_layers(tmp_path: Path, diffusers: Tensors, form: str, prefix: str) -> None:
    stored, unpacked = quantised(diffusers, QUANTISERS[form], MATRICES)
    layers = {
        prefix + name.removesuffix(".comfy_quant"): json.loads(bytes(tensor.tolist()))
        for name, tensor in stored.items()
        if name.endswith(".comfy_quant")
    }
    stored = {prefix + name: tensor for name, tensor in stored.items() if not name.endswith(".comfy_quant")}
    entry = json.dumps({"format_version": "1.0", "layers": layers})
    path = write(tmp_path / "packed", stored, _quantization_metadata=entry)
    assert relative_error(velocity(path), velocity(write(tmp_path / "unpacked", unpacked))) < 1e-5


@pytest.mark.parametrize("header", ["{", "[]", '{"layers": 3}', '{"layers": {"proj_out": 3}}'])
def test_a_header_without_formats_is_named(diffusers: Tensors, header: str) -> None:
    message = "model.safetensors has no JSON of layers in _quantization_metadata; download it again"
    assert refusal(diffusers, _quantization_metadata=header) == message


def old_fp8(tensors: Tensors, prefix: str = "") -> Tensors:
    """As older hosts store it: one mark for all, and scales of other names."""
    names = [name for name in tensors if name.endswith("to_q.weight")]
    scales = {name.replace("weight", "scale_weight"): torch.tensor([0.25 + i]) for i, name in enumerate(names)}
    inputs = {name.replace("weight", "scale_input"): torch.ones(1) for name in names}
    mark = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    stored = {**tensors, **{name: tensors[name].to(torch.float8_e4m3fn) for name in names}, **scales, **inputs, **mark}
    return {prefix + name: tensor for name, tensor in stored.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_of_older_hosts(tmp_path: Path, diffusers: Tensors, prefix: str) -> None:
    names = [name for name in diffusers if name.endswith("to_q.weight")]
    fp8 = {name: diffusers[name].to(torch.float8_e4m3fn).float() * (0.25 + i) for i, name in enumerate(names)}
    path = write(tmp_path / "packed", old_fp8(diffusers, prefix))
    assert isinstance(load_transformer(path).transformer_blocks[1].attn2.to_q, PackedLinear)
    assert relative_error(velocity(path), velocity(write(tmp_path / "unpacked", {**diffusers, **fp8}))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("everything", [True, False])
def test_a_plain_cast_to_fp8(tmp_path: Path, diffusers: Tensors, dtype: torch.dtype, everything: bool) -> None:
    """Scripts cast every tensor, or those with two or four axes, and leave the rest in float16."""
    cast = {n: t.to(dtype if everything or t.ndim in (2, 4) else torch.float16) for n, t in diffusers.items()}
    path = write(tmp_path / "packed", cast)
    network = load_transformer(path)
    block = network.transformer_blocks[0]
    kinds = [type(layer) for layer in (block.ff.conv_depth, block.ff.conv_point, block.attn1.to_q)]
    assert kinds == [PackedConv2d, PackedLinear, PackedLinear]
    assert block.scale_shift_table.dtype == block.attn2.to_q.bias.dtype == torch.float32
    expected = velocity(write(tmp_path / "unpacked", {name: tensor.float() for name, tensor in cast.items()}))
    assert relative_error(velocity(path), expected) < 1e-5
    assert load_transformer(path, None).dtype == (torch.bfloat16 if everything else torch.float16)
    assert relative_error(velocity(path, dtype=None), expected) < 0.1


def test_a_file_of_four_bits_beside_the_shards_is_passed_over(tmp_path: Path, diffusers: Tensors) -> None:
    """As the official BF16 folder has one."""
    write(tmp_path / "transformer", diffusers)
    (tmp_path / "transformer" / FILE).rename(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    stored, _ = quantised(diffusers, QUANTISERS["bitsandbytes nf4"], MATRICES)
    save_file(stored, tmp_path / "transformer" / "diffusion_pytorch_model.int4.safetensors")
    assert not [layer for layer in load_transformer(tmp_path).modules() if isinstance(layer, PackedWeight)]


def test_smoothed_columns_are_in_the_weight(diffusers: Tensors) -> None:
    """What ModelOpt multiplies inputs by, in nvfp4."""
    stored, unpacked = quantised(diffusers, QUANTISERS["nvfp4"], [f"{Q}.weight"])
    stored[f"{Q}.pre_quant_scale"] = factors = torch.rand(96) + 0.5
    weight = with_packed(TensorFile(FILE, stored)).tensors[f"{Q}.weight"]
    torch.testing.assert_close(weight(), unpacked[f"{Q}.weight"] * factors)
    torch.testing.assert_close(weight.rows(torch.tensor([3])), weight()[3:4])


@pytest.mark.parametrize(
    ("form", "columns"),
    [(form, 192 if "bitsandbytes" in form else 208) for form in FORMS] + [("bitsandbytes nf4", 96)],
)
def test_a_matrix_is_unpacked_whole_and_by_rows(form: str, columns: int) -> None:
    """40 rows, which 3 do not divide. Some formats pad 40 x 208; in the last case blocks reach across rows."""
    matrix = torch.randn(40, columns)
    packed, _ = quantised({f"{Q}.weight": matrix}, QUANTISERS[form], [f"{Q}.weight"])
    weight = with_packed(TensorFile(FILE, packed)).tensors[f"{Q}.weight"].cut_to(matrix.shape)
    for most in (1, 3 * weight.packed_shape[1], 2**24):
        assert torch.equal(weight.numbers(torch.float32, most), weight())
    assert torch.equal(weight.numbers(torch.bfloat16), weight(torch.bfloat16))
    weight.changes.append(nn.Threshold(0.0, 7.0))
    assert torch.equal(weight.numbers(torch.float32, 1), weight()) and bool((weight() == 7.0).any())


# Memory


def test_packed_weights_stay_in_the_file_or_leave_it_as_other_tensors_do(tmp_path: Path, diffusers: Tensors) -> None:
    """Without a dtype all are mapped, and what was computed while reading is small; with one nothing is."""
    stored, _ = quantised(diffusers, QUANTISERS["bitsandbytes nf4"], MATRICES)
    path = write(tmp_path, stored)
    network = load_transformer(path, None)
    held = [*network.parameters(), *network.buffers()]
    packed = [layer for layer in network.modules() if isinstance(layer, PackedWeight)]
    numbers = sum(weight.numel() for weight in packed)
    assert sum(part.nbytes for weight in packed for part in weight.parameters()) <= numbers * (0.5 + 4 / 64) + 64 * len(
        packed
    )
    assert mapped_bytes(held, path) >= 0.95 * sum(tensor.nbytes for tensor in held)
    copied = load_transformer(path, torch.bfloat16)
    assert mapped_bytes([*copied.parameters(), *copied.buffers()], path) == 0
    assert sum(tensor.nbytes for tensor in copied.parameters()) <= sum(tensor.nbytes for tensor in held)


# Text encoders


def write_gemma(folder: Path, tensors: Tensors, **more: object) -> Path:
    write(folder, tensors, {**gemma_json(GEMMA), **more})
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return folder


def encode(folder: Path, **options: object) -> Tensor:
    with torch.no_grad():
        return load_text_encoder(folder, **options)([PROMPTS[0]], None)[0]


@pytest.mark.parametrize("form", QUANTISERS)
def test_a_text_encoder_computes_what_the_library_unpacks(tmp_path: Path, form: str) -> None:
    plain = dict(gemma().state_dict())
    names = [name for name in plain if name.endswith("_proj.weight") or name == "embed_tokens.weight"]
    stored, unpacked = quantised(plain, QUANTISERS[form], names)
    folder = write_gemma(tmp_path / "packed", stored)
    model = load_text_encoder(folder).model
    assert isinstance(model.embed_tokens, PackedEmbedding)
    assert isinstance(model.layers[2].mlp.down_proj, PackedLinear)
    assert relative_error(encode(folder), encode(write_gemma(tmp_path / "unpacked", unpacked))) < 1e-5
    assert encode(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_text_encoder(folder, None).model.embed_tokens(torch.tensor([[1]])).dtype == torch.float32


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_gemma_in_fp8_by_compressed_tensors(tmp_path: Path, strategy: str) -> None:
    """As transformers reads it with the library, on the same folder."""
    theirs = compressed_gemma(tmp_path, strategy)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    encoder = load_text_encoder(tmp_path)
    for i, layer in enumerate(theirs.layers):
        assert torch.equal(encoder.model.layers[i].mlp.up_proj.weight(), layer.mlp.up_proj.weight)
    ids = torch.tensor([encoder.tokenizer.encode(PROMPTS[0])])
    with torch.no_grad():
        assert relative_error(encoder.model(ids)[0], theirs(ids).last_hidden_state) < 1e-5


# Info, conversion, pictures


def test_info_counts_what_is_quantised(tmp_path: Path, diffusers: Tensors) -> None:
    stored, _ = quantised(diffusers, QUANTISERS["bitsandbytes nf4"], MATRICES[:-1])
    stored, _ = quantised(stored, QUANTISERS["nvfp4"], MATRICES[-1:])
    lines = describe_file(write(tmp_path, stored)).splitlines()
    assert lines[2] == f"quantised matrices: 1 in nvfp4, {len(MATRICES) - 1} in bitsandbytes nf4"
    assert lines[3] == "custom: 3 blocks of width 96"
    assert not [line for line in describe_file(write(tmp_path, diffusers)).splitlines() if "quantised" in line]


def test_info_counts_what_is_quantised_of_a_text_encoder(tmp_path: Path) -> None:
    plain = dict(gemma().state_dict())
    names = [name for name in plain if name.endswith("_proj.weight")]
    stored, _ = quantised(plain, QUANTISERS["nvfp4"], names)
    told = [f"quantised matrices: {len(names)} in nvfp4", "give its path as the text encoder"]
    assert describe_file(write_gemma(tmp_path / "packed", stored)).splitlines()[2:] == told
    assert describe_file(write_gemma(tmp_path / "plain", plain)).splitlines()[2:] == told[1:]


@pytest.mark.parametrize("form", ["fp8", "nvfp4", "bitsandbytes nf4 twice"])
def test_a_quantised_file_is_converted_to_its_numbers(tmp_path: Path, diffusers: Tensors, form: str) -> None:
    stored, unpacked = quantised(diffusers, QUANTISERS[form], MATRICES)
    source, target = write(tmp_path / "packed", stored), tmp_path / "out.safetensors"
    convert(source, target, dtype=torch.bfloat16)
    written = read_tensors(target).tensors
    assert written.keys() == diffusers.keys()
    for name, tensor in unpacked.items():
        assert torch.equal(written[name], tensor.bfloat16()), name
    with pytest.raises(
        CheckpointError, match=r"^model.safetensors has weights in .*; unpack them by --dtype bfloat16$"
    ):
        convert(source, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_a_plain_cast_is_converted_as_it_is(tmp_path: Path, diffusers: Tensors) -> None:
    cast = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in diffusers.items()}
    convert(write(tmp_path, cast), target := tmp_path / "out.safetensors")
    for name, tensor in read_tensors(target).tensors.items():
        matrix = name.endswith(".weight") and tensor.ndim > 1
        assert tensor.dtype == (torch.float8_e4m3fn if matrix else torch.bfloat16)
        assert torch.equal(tensor.float(), cast[name].float())


@pytest.fixture(scope="module")
def quantised_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline folder with its transformer in nf4 and its text encoder in 8 bits, and the same unpacked."""
    folders = []
    for name in ("packed", "unpacked"):
        folders.append(write_model(tmp_path_factory.mktemp(name)))
    for part, form, file in (
        ("transformer", "bitsandbytes nf4", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "bitsandbytes int8", "model.safetensors"),
    ):
        tensors = read_tensors(folders[0] / part).tensors
        names = [n for n, t in tensors.items() if n.endswith(("to_q.weight", "_proj.weight")) and t.ndim == 2]
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        for folder, content in zip(folders, quantised(tensors, QUANTISERS[form], names), strict=True):
            save_file(content, folder / part / file, read_tensors(folder / part).metadata)
    return folders[0], folders[1]


def test_pictures_of_a_quantised_model_are_those_of_its_numbers(quantised_model: tuple[Path, Path]) -> None:
    latents = []
    for folder in quantised_model:
        *_, last = SanaPipeline.load(folder).sample("a red circle", Settings(height=64, width=64, steps=2))
        latents.append(last.next_x)
    assert relative_error(latents[0], latents[1]) < 1e-4


def test_the_shell_draws_with_a_quantised_model_and_resumes(
    quantised_model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(quantised_model[0], tmp_path, capsys)
    assert len(shell.draw("a red circle", "--height", 64, "--width", 64)) == 1
    again = shell.generate("a red circle", "--height", 64, "--width", 64, "--resume")
    assert (again.code, again.out) == (0, "Every picture exists already.\n")
    assert "quantised matrices: 6 in bitsandbytes nf4" in shell.run("info", quantised_model[0]).out


def test_a_quantised_transformer_is_not_fine_tuned(quantised_model: tuple[Path, Path], tmp_path: Path) -> None:
    message = "is quantised, and here every weight is trained; unpack it by `python -m sana convert --dtype bfloat16`$"
    with pytest.raises(ValueError, match=message):
        finetune(tmp_path / "out", tmp_path, FinetuneConfig(steps=1), model=quantised_model[0])


# Bad input


def change(part: str, made: Callable[[Tensor], Tensor | None]) -> Callable[[Tensors], Tensors]:
    """One tensor beside to_q made into another, or left out."""

    def changed(stored: Tensors) -> Tensors:
        name = f"{Q}.{part}"
        rest = {key: tensor for key, tensor in stored.items() if key != name}
        new = made(stored.get(name, torch.zeros(0)))
        return rest if new is None else {**rest, name: new}

    return changed


def remark(**told: object) -> Callable[[Tensors], Tensors]:
    return change("comfy_quant", lambda old: torch.tensor([*json.dumps(told).encode()], dtype=torch.uint8))


def restate(**told: object) -> Callable[[Tensors], Tensors]:
    def restated(old: Tensor) -> Tensor:
        state = json.loads(bytes(old.tolist()))
        return torch.tensor([*json.dumps({**state, **told}).encode()], dtype=torch.uint8)

    return change(STATE, restated)


def nothing(old: Tensor) -> None:
    return None


def not_finite(old: Tensor) -> Tensor:
    return torch.full_like(old, torch.nan)


LAYER = f"has the quantised layer {Q} "
ORIGINAL = "; take the original file"
STATE = "weight.quant_state.bitsandbytes__nf4"
BROKEN = {
    "no scale": ("fp8", change("weight_scale", nothing), f"{LAYER}without its weight_scale{ORIGINAL}"),
    "scale not finite": ("fp8", change("weight_scale", not_finite), f"{LAYER}with a weight_scale that is not finite{ORIGINAL}"),
    "scale in integers": (
        "fp8",
        change("weight_scale", lambda old: old.int()),
        f"{LAYER}with a weight_scale in int32, which no such format has{ORIGINAL}",
    ),
    "scales in 8 bits": (
        "int8 by rows",
        change("weight_scale", lambda old: old.to(torch.float8_e4m3fn)),
        f"{LAYER}with a weight_scale in float8_e4m3fn, which no such format has{ORIGINAL}",
    ),
    "scale under two names": (
        "fp8",
        change("scale_weight", lambda old: torch.ones(())),
        f"has {Q}.scale_weight and {Q}.weight_scale, two scales in the place of one{ORIGINAL}",
    ),
    "scales of other rows": (
        "int8 by rows",
        change("weight_scale", lambda old: old[:95]),
        f"{LAYER}with a weight_scale of shape (95, 1) beside a weight of (96, 96){ORIGINAL}",
    ),
    "numbers of another format": (
        "fp8",
        change("weight", lambda old: old.float()),
        f"{LAYER}with weight_scale, comfy_quant beside numbers in float32, which no format has{ORIGINAL}",
    ),
    "no weight": (
        "fp8",
        change("weight", nothing),
        f"has weight_scale, comfy_quant of {Q}, and not its weight; the download may be incomplete",
    ),
    "unknown format": (
        "fp8",
        remark(format="int3"),
        f"has the layer {Q} in the format 'int3', which is not read here; load it in ComfyUI, or take one of float8_e4m3fn, "
        "float8_e5m2, nvfp4, mxfp8, int8_tensorwise, convrot_w4a4",
    ),
    "no format": (
        "fp8",
        change("comfy_quant", lambda old: torch.zeros(27, dtype=torch.uint8)),
        f"has the layer {Q} in the format None, which is not read here; load it in ComfyUI, or take one of float8_e4m3fn, "
        "float8_e5m2, nvfp4, mxfp8, int8_tensorwise, convrot_w4a4",
    ),
    "scales of too few blocks": (
        "mxfp8",
        change("weight_scale", lambda old: old[:64]),
        f"{LAYER}with a weight_scale of shape (64, 4) beside a weight of (96, 96){ORIGINAL}",
    ),
    "exponent of no number": (
        "mxfp8",
        change("weight_scale", lambda old: torch.full_like(old.view(torch.uint8), 255)),
        f"{LAYER}with a weight_scale that is not finite{ORIGINAL}",
    ),
    "scales of blocks in float32": (
        "nvfp4",
        change("weight_scale", lambda old: old.float()),
        f"{LAYER}with a weight_scale in float32, which no such format has{ORIGINAL}",
    ),
    "scale of a block not finite": (
        "nvfp4",
        change("weight_scale", lambda old: torch.full_like(old.view(torch.uint8), 0x7F).view(old.dtype)),
        f"{LAYER}with a weight_scale that is not finite{ORIGINAL}",
    ),
    "no second scale": ("nvfp4", change("weight_scale_2", nothing), f"{LAYER}without its weight_scale_2{ORIGINAL}"),
    "smoothed columns of another width": (
        "nvfp4",
        change("pre_quant_scale", lambda old: torch.ones(48)),
        f"{LAYER}with a pre_quant_scale of shape (48,) beside a weight of (96, 48){ORIGINAL}",
    ),
    "rotation that cannot be": (
        "int8 rotated",
        remark(format="int8_tensorwise", convrot=True, convrot_groupsize=64),
        f"{LAYER}of 96 columns rotated in groups of 64, which cannot be{ORIGINAL}",
    ),
    "rotation by no power of 4": (
        "int8 rotated",
        remark(format="int8_tensorwise", convrot=True, convrot_groupsize=32),
        f"{LAYER}of 96 columns rotated in groups of 32, which cannot be{ORIGINAL}",
    ),
    "two formats": (
        "bitsandbytes int8",
        remark(format="float8_e4m3fn"),
        f"{LAYER}in two formats at once, with SCB and comfy_quant and weight_format{ORIGINAL}",
    ),
    "both of bitsandbytes": (
        "bitsandbytes int8",
        change("weight.absmax", lambda old: torch.ones(144)),
        f"{LAYER}in two formats at once, with SCB and weight.absmax and weight_format{ORIGINAL}",
    ),
    "order of a GPU": (
        "bitsandbytes int8",
        change("weight_format", lambda old: torch.tensor(2, dtype=torch.uint8)),
        f"{LAYER}in an order of its own (weight_format); save it again with bitsandbytes 0.38 or newer{ORIGINAL}",
    ),
    "no blocks": (
        "bitsandbytes nf4",
        change(STATE, nothing),
        f"{LAYER}without its {STATE}{ORIGINAL}",
    ),
    "blocks that are no JSON": (
        "bitsandbytes nf4",
        change(STATE, lambda old: old[1:]),
        f"{LAYER}with a {STATE} that does not tell its shape and blocks{ORIGINAL}",
    ),
    "too few bytes": (
        "bitsandbytes nf4",
        change("weight", lambda old: old[:-1]),
        f"{LAYER}of shape (96, 96) in 4607 bytes{ORIGINAL}",
    ),
    "too few blocks": (
        "bitsandbytes nf4",
        change("weight.absmax", lambda old: old[:-1]),
        f"{LAYER}with a weight.absmax of shape (143,) beside a weight of (4608, 1){ORIGINAL}",
    ),
    "block not finite": (
        "bitsandbytes nf4",
        change("weight.absmax", not_finite),
        f"{LAYER}with a weight.absmax that is not finite{ORIGINAL}",
    ),
    "list of other numbers": (
        "bitsandbytes nf4 twice",
        change("weight.nested_quant_map", lambda old: old[:16]),
        f"{LAYER}with a weight.nested_quant_map of shape (16,) beside a weight of (4608, 1){ORIGINAL}",
    ),
    "format that is no text": (
        "fp8",
        remark(format=["fp8"]),
        f"has the layer {Q} in the format ['fp8'], which is not read here; load it in ComfyUI, or take one of float8_e4m3fn, "
        "float8_e5m2, nvfp4, mxfp8, int8_tensorwise, convrot_w4a4",
    ),
    "format of a long name": (
        "fp8",
        remark(format="x" * 1000),
        f"has the layer {Q} in the format '{'x' * 49}, which is not read here; load it in ComfyUI, or take one of float8_e4m3fn, "
        "float8_e5m2, nvfp4, mxfp8, int8_tensorwise, convrot_w4a4",
    ),
    **{
        f"{form} of a row": (
            form,
            change("weight", lambda old: old[0]),
            f"{LAYER}of shape ({columns},), which is no matrix{ORIGINAL}",
        )
        for form, columns in (("fp8", 96), ("int8 by rows", 96), ("bitsandbytes int8", 96), ("mxfp8", 96), ("nvfp4", 48))
    },
    "nvfp4 of a convolution": (
        "nvfp4",
        change("weight", lambda old: old[..., None, None]),
        f"{LAYER}of shape (96, 48, 1, 1), which is no matrix{ORIGINAL}",
    ),
    **{
        f"blocks of {told}": (
            "bitsandbytes nf4 twice",
            restate(**told),
            f"{LAYER}with a {STATE} that does not tell its shape and blocks{ORIGINAL}",
        )
        for told in (
            {"shape": [2**40, 2**40]},
            {"shape": [2**21, 1]},
            {"shape": [96 * 96]},
            {"shape": [1] * 5},
            {"blocksize": 2**70},
            {"blocksize": 63},
            {"nested_blocksize": 0},
            {"nested_blocksize": 2**21},
            {"nested_offset": 10**400},
        )
    },
    "no largest numbers of the largest": (
        "bitsandbytes nf4 twice",
        change("weight.nested_absmax", nothing),
        f"{LAYER}without its weight.nested_absmax{ORIGINAL}",
    ),
    "places without a list": (
        "bitsandbytes nf4 twice",
        lambda stored: change("weight.nested_absmax", nothing)(change("weight.nested_quant_map", nothing)(stored)),
        f"{LAYER}with a weight.absmax in uint8, which no such format has{ORIGINAL}",
    ),
    "one number": (
        "bitsandbytes nf4 in bfloat16",
        change("weight", lambda old: old.flatten()[0]),
        f"{LAYER}of shape (96, 96) in 2 bytes{ORIGINAL}",
    ),
    "places in no list": (
        "bitsandbytes nf4 twice",
        change("weight.absmax", lambda old: old.int() + 256),
        f"{LAYER}with a weight.absmax in int32, which no such format has{ORIGINAL}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_quantised_layer_is_named(diffusers: Tensors, case: str) -> None:
    form, change, message = BROKEN[case]
    stored, _ = quantised(diffusers, QUANTISERS[form], [f"{Q}.weight"])
    assert refusal(change(stored)) == f"model.safetensors {message}"


def test_scales_that_nothing_explains_are_named(diffusers: Tensors) -> None:
    stored = {**diffusers, f"{Q}.weight": torch.ones(96, 96, dtype=torch.int8), f"{Q}.weight_scale": torch.ones(1)}
    message = f"model.safetensors {LAYER}with weight_scale beside it, and nothing says in which format{ORIGINAL}"
    assert refusal(stored) == message
    quantiser = {"quantization_config": {"quant_method": "compressed-tensors"}}
    found = find_transformer(TensorFile(FILE, stored, config={**HEADS, **quantiser}))
    assert torch.equal(found.tensors[f"{Q}.weight"](), torch.ones(96, 96))


def test_a_packed_weight_of_another_size_is_named(tmp_path: Path, diffusers: Tensors) -> None:
    other = {**diffusers, f"{Q}.weight": torch.randn(96, 64)}
    stored, _ = quantised(other, QUANTISERS["nvfp4"], [f"{Q}.weight"])
    with pytest.raises(CheckpointError) as caught:
        load_transformer(write(tmp_path, stored))
    assert str(caught.value) == (
        f"model.safetensors: tensor {Q}.weight has shape (96, 64) instead of (96, 96); it is another model or was made for "
        "another size"
    )
