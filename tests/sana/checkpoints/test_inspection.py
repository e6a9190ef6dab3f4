"""What a file is, in five lines, and its conversion to one that says so itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana import CheckpointError, load_autoencoder, load_transformer
from sana.checkpoints.autoencoder import autoencoder_tensors, detect_autoencoder
from sana.checkpoints.files import read_tensors
from sana.checkpoints.header import header_tensor
from sana.checkpoints.inspection import describe_file
from sana.checkpoints.names import HEADER_TENSOR
from sana.checkpoints.transformer import identify_transformer, transformer_tensors
from sana.checkpoints.writing import convert
from sana.config import TransformerIdentity
from tests.sana.dialects import early_diffusers_transformer, official_transformer, original_autoencoder, padded
from tests.sana.released import released
from tests.sana.twins import (
    STRUCTURES,
    as_linear,
    diffusers_autoencoder,
    diffusers_transformer,
    randomise,
    tiny_autoencoder_config,
    tiny_config,
)

Tensors = dict[str, Tensor]
HEADS = '{"num_cross_attention_heads": 2}'  # what a config.json beside so small a network has to say


def write_empty(path: Path, tensors: Tensors) -> Path:
    """A safetensors file of the full size of tensors on meta, in bfloat16, which takes no room on the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return path


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# Info


def test_five_lines_on_a_released_transformer(tmp_path: Path) -> None:
    tensors = released("transformers", "official", "Sprint_0.6B").tensors
    assert describe_file(write_empty(tmp_path / "sana.safetensors", tensors)).splitlines() == [
        "sana.safetensors: a SANA transformer",
        "556 tensors, 595,373,217 numbers in bfloat16, 1.19 GB",
        "sana-sprint-0.6b-1024px, as Efficient-Large-Model/Sana_Sprint_0.6B_1024px: "
        "28 blocks of width 1152, query and key norms, a guidance embedding",
        "made for 1024 px (from its position buffer), no flow shift (Sprint), guidance 4.5",
        "compute in bfloat16 or float32; needs a DC-AE f32c32 and Gemma-2-2b-it",
    ]


def test_a_padded_mix_ffn_is_told(tmp_path: Path) -> None:
    tensors = released("transformers", "diffusers", "Sana_1600M_1024px").tensors
    told = {}
    for form in (tensors, padded(tensors, 5632)):
        lines = describe_file(write_empty(tmp_path / "sana.safetensors", form)).splitlines()
        told[len(told)] = lines[2:]
    assert told[0][0] == "sana-1.6b-1024px, as Efficient-Large-Model/Sana_1600M_1024px_BF16: 20 blocks of width 2240"
    assert told[1] == [f"{told[0][0]}, a Mix-FFN padded to 5632", *told[0][1:]]


def test_five_lines_on_a_released_autoencoder(tmp_path: Path) -> None:
    tensors = released("autoencoders", "original", "dc-ae-lite-f32c32-sana-1.1").tensors
    path = write_empty(tmp_path / "dc-ae.safetensors", tensors)
    assert describe_file(path).splitlines() == [
        "dc-ae.safetensors: a DC-AE, the autoencoder of SANA",
        "275 tensors, 421,181,228 numbers in bfloat16, 0.84 GB",
        "dc-ae-lite-f32c32-sana-1.1: 32 px per latent cell, 32 channels",
        "decoder widths 128-256-512-512-1024-1024, blocks 0-3-5-4-4-4",
        "latents times 0.41407 for the transformer; compute in bfloat16 or float32",
    ]


@pytest.mark.parametrize(
    ("variant", "sample_size", "traits", "shift"),
    [
        ("sana-0.6b-1024px", 24, "", "flow shift 3"),
        ("sana-1.6b-4096px", 128, ", a position table", "flow shift 3"),
        ("sana-1.5-1.6b-1024px", 32, ", query and key norms", "flow shift 3"),
        (
            "sana-sprint-0.6b-1024px",
            32,
            ", query and key norms, a guidance embedding",
            "no flow shift (Sprint)",
        ),
    ],
)
def test_five_lines_on_a_network_that_was_never_released(
    tmp_path: Path, variant: str, sample_size: int, traits: str, shift: str
) -> None:
    config = tiny_config(variant)
    save_file(diffusers_transformer(config).half().state_dict(), tmp_path / "mine.safetensors")
    beside = {"num_cross_attention_heads": 2, "sample_size": sample_size}
    beside["interpolation_scale"] = config.position_interpolation if config.position_base else None
    (tmp_path / "config.json").write_text(json.dumps(beside))
    lines = describe_file(tmp_path / "mine.safetensors").splitlines()
    assert lines[0] == "mine.safetensors: a SANA transformer" and "numbers in float16, 0.00 GB" in lines[1]
    assert lines[2:] == [
        f"custom: 3 blocks of width 96{traits}",
        f"made for {sample_size * 32} px (from config.json), {shift}, guidance 4.5",
        f"compute in float16 or float32; needs a DC-AE f32c32 and a text encoder of width {config.text_width}",
    ]


def test_lines_on_other_files_say_what_they_are(tmp_path: Path) -> None:
    save_file({"a.lora_A.weight": torch.ones(2, 3)}, path := tmp_path / "style.safetensors")
    assert describe_file(path).splitlines() == [
        "style.safetensors: a LoRA",
        "1 tensors, 6 numbers in float32, 0.00 GB",
        "it is of no use to SANA by itself",
    ]
    save_file({"lycoris_transformer_blocks_0_attn1_to_q.oft_blocks": torch.ones(2, 2, 2)}, path)
    assert describe_file(path).splitlines()[2] == "use it with a LoRA loader in ComfyUI"
    save_file({"transformer_blocks.0.ff.inverted_conv.qweight": torch.ones(2)}, path)
    assert describe_file(path).splitlines()[2] == "use Efficient-Large-Model/Sana_1600M_1024px_BF16 instead"
    save_file({"layers.0.post_feedforward_layernorm.weight": torch.ones(2)}, path)
    assert describe_file(path).splitlines()[2] == "give its path as the text encoder"
    save_file(
        {"controlnet_blocks.0.weight": torch.ones(2), "transformer_blocks.0.ff.conv_inverted.weight": torch.ones(2)},
        path,
    )
    assert describe_file(path).splitlines()[0] == "style.safetensors: a ControlNet for SANA"
    assert (
        describe_file(path).splitlines()[2]
        == "use it with a SANA transformer: --control in the shell, the node Load SANA ControlNet in ComfyUI"
    )


# Conversion


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", STRUCTURES)
def test_a_converted_transformer_has_the_same_bits_and_knows_itself(
    tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    """Official, with settings in buffers and in a configuration beside it, to one file with both in its header."""
    config = tiny_config(variant)
    diffusers = {name: t.to(dtype) for name, t in randomise(diffusers_transformer(config)).state_dict().items()}
    source, target = tmp_path / "source" / "sana.pth", tmp_path / "sana.safetensors"
    source.parent.mkdir()
    torch.save({"state_dict": official_transformer(diffusers, (config.position_base or 32) ** 2)}, source)
    (source.parent / "config.json").write_text(HEADS)
    assert convert(source, target) == f"{target}: custom, {len(diffusers)} tensors"
    written = read_tensors(target)
    assert written.tensors.keys() == diffusers.keys()  # in diffusers' names and shapes
    for name, tensor in diffusers.items():
        assert written.tensors[name].dtype == dtype and torch.equal(written.tensors[name], tensor), name
    before, after = identify_transformer(read_tensors(source)), identify_transformer(written)
    assert after.config == before.config == config
    assert (after.base_size, after.flow_shift, after.dtype) == (before.base_size, before.flow_shift, before.dtype)
    assert after.origin == "its header" and header_of(target)["format"] == "pt"
    assert_same_bits(load_transformer(target, None).state_dict(), load_transformer(source, None).state_dict())


def test_a_transformer_that_comfyui_saved_is_converted_to_the_shapes_of_diffusers(tmp_path: Path) -> None:
    """Its names have a prefix, its 1x1 convolutions are matrices, and one more tensor tells what these cannot."""
    config = tiny_config("sana-1.6b-4096px")
    diffusers = randomise(diffusers_transformer(config)).state_dict()
    identity = TransformerIdentity(config, "custom", 4096, 6.0, "bfloat16", "its header")
    saved = {**as_linear(diffusers), HEADER_TENSOR: header_tensor(identity)}
    source, target = tmp_path / "saved.safetensors", tmp_path / "sana.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in saved.items()}, source)
    convert(source, target)
    assert_same_bits(load_file(target), diffusers)
    assert identify_transformer(read_tensors(target)) == identity
    assert_same_bits(load_transformer(source).state_dict(), load_transformer(target).state_dict())


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_converting_again_changes_nothing(tmp_path: Path) -> None:
    tensors = diffusers_transformer(tiny_config("sana-1.6b-4096px")).state_dict()
    save_file(early_diffusers_transformer(tensors), tmp_path / "first.safetensors")
    (tmp_path / "config.json").write_text(
        '{"num_cross_attention_heads": 2, "sample_size": 128, "interpolation_scale": 2}'
    )
    target = tmp_path / "alone" / "second.safetensors"
    target.parent.mkdir()
    convert(tmp_path / "first.safetensors", target)
    once, header = load_file(target), header_of(target)
    for again in (target.with_stem("third"), target):  # the last onto itself
        convert(target, again)
        assert_same_bits(load_file(again), once)
        assert header_of(again) == header
    identity = identify_transformer(read_tensors(target))
    assert (identity.base_size, identity.config.position_base, identity.config.position_interpolation) == (
        4096,
        128,
        2.0,
    )
    assert "made for 4096 px" in describe_file(target)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (None, r"lacks 1 of \d+ tensors, first proj_out.bias; the download may be incomplete"),
        (
            "sana-1.6b-4096px",
            r"has 3 blocks of width 96 and is no sana-1.6b-4096px; give the variant that it is, or none",
        ),
    ],
)
def test_what_lacks_tensors_or_is_another_variant_is_not_converted(
    tmp_path: Path, variant: str | None, message: str
) -> None:
    tensors = dict(diffusers_transformer(tiny_config("sana-0.6b-1024px")).state_dict())
    if variant is None:
        del tensors["proj_out.bias"]
    save_file(tensors, source := tmp_path / "sana.safetensors")
    (tmp_path / "config.json").write_text(HEADS)
    with pytest.raises(CheckpointError, match=f"^sana.safetensors {message}$"):
        convert(source, tmp_path / "out.safetensors", variant=variant)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "sana.safetensors"]


@pytest.mark.parametrize("family", ["dc-ae-f32c32-sana-1.1", "dc-ae-f64c128-in-1.0"])
def test_a_converted_autoencoder_has_the_same_bits_and_its_latent_scale(tmp_path: Path, family: str) -> None:
    config = tiny_autoencoder_config(family, depth=1)
    diffusers = dict(randomise(diffusers_autoencoder(config)).state_dict())
    source, target = tmp_path / "source" / "ae.safetensors", tmp_path / "ae.safetensors"
    source.parent.mkdir()
    save_file({name: t.contiguous() for name, t in original_autoencoder(diffusers, config).items()}, source)
    (source.parent / "config.json").write_text('{"scaling_factor": 0.75}')
    assert convert(source, target) == f"{target}: custom, {len(diffusers)} tensors"
    written = read_tensors(target)
    assert_same_bits(written.tensors, diffusers)
    assert detect_autoencoder(autoencoder_tensors(written), written).latent_scale == 0.75
    assert load_autoencoder(target).config == load_autoencoder(source).config


def test_a_dtype_is_that_of_the_numbers(tmp_path: Path) -> None:
    tensors = randomise(diffusers_transformer(tiny_config("sana-0.6b-1024px"))).state_dict()
    save_file(tensors, source := tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(HEADS)
    convert(source, target := tmp_path / "b.safetensors", dtype=torch.bfloat16)
    for name, tensor in transformer_tensors(read_tensors(target)).items():
        assert torch.equal(tensor.flatten(), tensors[name].bfloat16().flatten())
    assert identify_transformer(read_tensors(target)).config == tiny_config("sana-0.6b-1024px")


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_converted_fp8_file_loads(tmp_path: Path, stored: torch.dtype) -> None:
    tensors = randomise(diffusers_transformer(tiny_config("sana-0.6b-1024px"))).state_dict()
    save_file({name: tensor.to(stored) for name, tensor in tensors.items()}, source := tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(HEADS)
    convert(source, target := tmp_path / "b.safetensors", dtype=torch.bfloat16)
    for name, tensor in load_transformer(target, None).state_dict().items():
        assert torch.equal(tensor.flatten(), tensors[name].to(stored).bfloat16().flatten())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("proj_out.weight", torch.ones(32, 96, dtype=torch.int8), "holds int8 tensors, first proj_out.weight, which"),
        (
            "proj_out._shift",
            torch.ones(2),
            "is quantised, with proj_out._shift beside its weights, in a way that is not",
        ),
    ],
)
def test_what_is_quantised_is_not_converted(
    tmp_path: Path, name: str, tensor: Tensor, message: str, dtype: torch.dtype | None
) -> None:
    tensors = diffusers_transformer(tiny_config("sana-0.6b-1024px")).state_dict()
    save_file({**tensors, name: tensor}, source := tmp_path / "sana.safetensors")
    (tmp_path / "config.json").write_text(HEADS)
    with pytest.raises(CheckpointError, match=f"^sana.safetensors {message}"):
        convert(source, tmp_path / "out.safetensors", dtype=dtype)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_folder_in_shards_becomes_one_file(tmp_path: Path) -> None:
    network = randomise(diffusers_transformer(tiny_config("sana-0.6b-1024px")))
    network.save_pretrained(tmp_path / "model" / "transformer", max_shard_size="500KB")
    convert(tmp_path / "model", target := tmp_path / "sana.safetensors")
    assert_same_bits(read_tensors(target).tensors, network.state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "model.diffusion_model."])
def test_a_controlnet_is_not_lost_in_conversion(tmp_path: Path, prefix: str) -> None:
    tensors = official_transformer(dict(diffusers_transformer(tiny_config("sana-0.6b-1024px")).state_dict()))
    tensors["controlnet.0.after_proj.weight"] = torch.ones(96, 96)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, source := tmp_path / "control.safetensors")
    (tmp_path / "config.json").write_text(HEADS)
    assert describe_file(source).splitlines()[2] == "custom: 3 blocks of width 96, a ControlNet of 1 blocks"
    message = "^control.safetensors holds a ControlNet too, which would be lost; use the file as it is$"
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
