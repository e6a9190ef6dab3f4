"""Names of tensors: every released checkpoint loads, and all dialects lead to the same names and the same numbers."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sana.checkpoints.autoencoder import autoencoder_tensors, detect_autoencoder
from sana.checkpoints.files import TensorFile
from sana.checkpoints.filling import fill
from sana.checkpoints.names import (
    OFFICIAL_MARK,
    dialect_prefix,
    is_autoencoder,
    is_transformer,
    to_autoencoder_names,
    to_control_names,
    to_transformer_names,
    with_convolutions,
)
from sana.checkpoints.transformer import build_transformer, find_transformer
from sana.config import AUTOENCODERS, VARIANTS
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.controlnet import SanaControlNet
from tests.sana.dialects import early_diffusers_transformer, official_transformer, original_autoencoder
from tests.sana.quantisers import QUANTISERS
from tests.sana.released import names, released
from tests.sana.twins import (
    FAMILIES,
    STRUCTURES,
    as_linear,
    diffusers_autoencoder,
    diffusers_transformer,
    randomise,
    tiny_autoencoder_config,
    tiny_config,
)

Tensors = dict[str, Tensor]

# Released names of transformers and what they are here.
TRANSFORMERS = {
    "Sana_600M_512px": "sana-0.6b-512px",
    "Sana_600M_1024px": "sana-0.6b-1024px",
    "Sana_1600M_512px": "sana-1.6b-512px",
    "Sana_1600M_1024px": "sana-1.6b-1024px",
    "Sana_1600M_2Kpx": "sana-1.6b-2048px",
    "Sana_1600M_4Kpx": "sana-1.6b-4096px",
    "SANA1.5_1.6B": "sana-1.5-1.6b-1024px",
    "SANA1.5_4.8B": "sana-1.5-4.8b-1024px",
    "Sprint_0.6B": "sana-sprint-0.6b-1024px",
    "Sprint_1.6B": "sana-sprint-1.6b-1024px",
    "ControlNet_600M": "sana-0.6b-1024px-controlnet-hed",
    "ControlNet_1600M": "sana-1.6b-1024px-controlnet-hed",
}
CONTROLNETS = ("ControlNet_600M", "ControlNet_1600M")
TRAINING_ONLY = ("logvar_linear.weight", "logvar_linear.bias")
BUFFERS = ("pos_embed", "y_embedder.y_embedding")
OFFICIAL = [("official", name) for name in TRANSFORMERS]
FOLDERS = [("diffusers", name) for name in names("transformers", "diffusers") if name not in CONTROLNETS]
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "net.")


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def size(tensors: Tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def assert_same(found: Tensors, expected: Tensors) -> None:
    """The same names, and the same bits under each."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# Every released file


def test_the_lists_hold_every_released_network() -> None:
    assert names("transformers", "official") == list(TRANSFORMERS)
    assert set(names("transformers", "diffusers")) < set(TRANSFORMERS)
    assert names("autoencoders", "original") == names("autoencoders", "diffusers")
    assert {*names("autoencoders", "original")} < set(AUTOENCODERS)


@pytest.mark.parametrize(("dialect", "name"), [*OFFICIAL, *FOLDERS])
def test_a_released_transformer_loads(dialect: str, name: str) -> None:
    tensors, config, parameters = released("transformers", dialect, name)
    file = TensorFile(Path("released.safetensors"), tensors, config=config)
    found = find_transformer(file)
    identity = found.identity
    row = VARIANTS[TRANSFORMERS[name]]
    assert (identity.variant, identity.config) == (TRANSFORMERS[name], row.transformer)
    assert (identity.base_size, identity.flow_shift) == (row.base_size, row.flow_shift)
    network = build_transformer(found, None, "meta")
    trained = {key: tensor for key, tensor in tensors.items() if key not in BUFFERS}
    assert size(trained) == parameters
    used = {key: t for key, t in trained.items() if not key.startswith("controlnet.") and key not in TRAINING_ONLY}
    assert size(network.state_dict()) == size(used)


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_released_controlnet_loads(name: str) -> None:
    """Both dialects hold the copied blocks; diffusers' folder repeats the embeddings of the transformer."""
    config = VARIANTS[TRANSFORMERS[name]].transformer
    for dialect in ("official", "diffusers"):
        tensors = to_control_names(released("transformers", dialect, name).tensors)
        network = fill(SanaControlNet(config, device="meta"), tensors, "released.safetensors", None, "meta")
        assert size(network.state_dict()) == released("transformers", "diffusers", name).parameters


@pytest.mark.parametrize("dialect", ["original", "diffusers"])
@pytest.mark.parametrize("name", names("autoencoders", "original"))
def test_a_released_autoencoder_loads(dialect: str, name: str) -> None:
    file = TensorFile(Path("released.safetensors"), released("autoencoders", dialect, name).tensors)
    tensors = autoencoder_tensors(file)
    config = detect_autoencoder(tensors, file)
    # Files of the same structure differ in the latent scale, which is not in the tensors.
    assert replace(config, latent_scale=1.0) == replace(AUTOENCODERS[name], latent_scale=1.0)
    if "sana" in name:
        assert config.latent_scale == AUTOENCODERS[name].latent_scale
    network = fill(DCAutoencoder(config, device="meta"), tensors, "released.safetensors", None, "meta")
    assert size(dict(network.named_parameters())) == released("autoencoders", "original", name).parameters


# The two dialects of the same release


@pytest.mark.parametrize("name", [name for _, name in FOLDERS])
def test_official_and_diffusers_transformers_are_the_same(name: str) -> None:
    official = released("transformers", "official", name).tensors
    diffusers = released("transformers", "diffusers", name).tensors
    assert shapes(with_convolutions(to_transformer_names(official))) == shapes(diffusers)
    again = official_transformer(diffusers, positions=official["pos_embed"].shape[1])
    assert shapes(again) == shapes(official)


@pytest.mark.parametrize("name", names("autoencoders", "original"))
def test_original_and_diffusers_autoencoders_are_the_same(name: str) -> None:
    original = released("autoencoders", "original", name).tensors
    diffusers = released("autoencoders", "diffusers", name).tensors
    assert shapes(to_autoencoder_names(original)) == shapes(diffusers)
    assert shapes(original_autoencoder(diffusers, AUTOENCODERS[name])) == shapes(original)


# Numbers


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", STRUCTURES)
def test_every_dialect_of_a_transformer_leads_to_the_same_numbers(variant: str, prefix: str) -> None:
    diffusers = dict(randomise(diffusers_transformer(tiny_config(variant))).state_dict())
    expected = as_linear(diffusers)
    for written in (diffusers, official_transformer(diffusers), early_diffusers_transformer(diffusers), expected):
        assert_same(to_transformer_names(among_others(written, prefix)), expected)
    assert_same(with_convolutions(expected), diffusers)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_dialect_of_an_autoencoder_leads_to_the_same_numbers(family: str, prefix: str) -> None:
    config = tiny_autoencoder_config(family)
    diffusers = dict(randomise(diffusers_autoencoder(config)).state_dict())
    for written in (diffusers, original_autoencoder(diffusers, config)):
        assert_same(to_autoencoder_names(among_others(written, prefix)), diffusers)


@pytest.mark.parametrize("variant", STRUCTURES)
def test_official_names_of_linear_layers(variant: str) -> None:
    """Some training code has Linear layers for the 1x1 convolutions."""
    diffusers = as_linear(dict(randomise(diffusers_transformer(tiny_config(variant))).state_dict()))
    official = official_transformer(diffusers)
    written = {re.sub(r"(inverted|point)_conv\.conv", r"\1_conv.linear", name): part for name, part in official.items()}
    assert written.keys() != official.keys() and is_transformer(written)
    assert_same(to_transformer_names(written), diffusers)


def among_others(tensors: Tensors, prefix: str) -> Tensors:
    """With a prefix, as part of a file that holds other networks as well."""
    others = {"text_encoders.gemma2_2b.transformer.model.norm.weight": torch.ones(1)} if prefix else {}
    return others | {prefix + name: tensor for name, tensor in tensors.items()}


def test_a_file_may_hold_a_transformer_and_an_autoencoder() -> None:
    config = tiny_autoencoder_config("dc-ae-f32c32-sana-1.1", depth=1)
    transformer = dict(diffusers_transformer(tiny_config("sana-0.6b-1024px")).state_dict())
    autoencoder = dict(diffusers_autoencoder(config).state_dict())
    both = {"vae." + name: tensor for name, tensor in original_autoencoder(autoencoder, config).items()}
    both |= {"model.diffusion_model." + name: tensor for name, tensor in official_transformer(transformer).items()}
    assert is_transformer(both) and is_autoencoder(both)
    assert_same(to_transformer_names(both), as_linear(transformer))
    assert to_autoencoder_names(both).keys() == autoencoder.keys()


# Single names


@pytest.mark.parametrize("name", ["blocks.0.attn.rope.freqs", "mystery.weight"])
def test_an_unknown_name_is_kept_for_the_strict_load_to_report(name: str) -> None:
    official = official_transformer(dict(diffusers_transformer(tiny_config("sana-0.6b-1024px")).state_dict()))
    extra = to_transformer_names({**official, name: torch.ones(1)}).keys() - to_transformer_names(official).keys()
    assert extra == {name.replace("blocks.", "transformer_blocks.")}


@pytest.mark.parametrize("width", [96, 128, 160])
def test_scales_of_blocks_go_with_the_rows_of_a_part(width: int) -> None:
    """They lie in tiles of 128 rows, which are laid out anew: as those of the part alone, which no other part changes."""
    torch.manual_seed(0)
    parts = [torch.randn(width, 96) * 10**i for i in range(3)]
    stored = QUANTISERS["mxfp8"](torch.cat(parts)).stored
    official = {OFFICIAL_MARK: torch.zeros(1), **{f"blocks.0.attn.qkv.{key}": part for key, part in stored.items()}}
    found = to_transformer_names(official)
    for letter, part in zip("qkv", parts, strict=True):
        for key, expected in QUANTISERS["mxfp8"](part).stored.items():
            ours = found[f"transformer_blocks.0.attn1.to_{letter}.{key}"]
            assert ours.dtype == expected.dtype and torch.equal(ours.view(torch.uint8), expected.view(torch.uint8)), key


@pytest.mark.parametrize(
    ("weight", "scale", "rows"),
    [((384, 32), (130, 3), [44, 43, 43]), ((384, 32), (130, 4), [44, 43, 43]), ((), (128, 4), [0, 0, 0])],
)
def test_scales_that_are_no_tiles_of_a_matrix_are_left_for_their_reader(
    weight: tuple[int, ...], scale: tuple[int, ...], rows: list[int]
) -> None:
    weight, scale = (torch.zeros(shape, dtype=torch.uint8) for shape in (weight, scale))
    official = {
        OFFICIAL_MARK: torch.zeros(1),
        "blocks.0.attn.qkv.weight": weight,
        "blocks.0.attn.qkv.weight_scale": scale,
    }
    found = to_transformer_names(official)
    assert [len(found[f"transformer_blocks.0.attn1.to_{part}.weight_scale"]) for part in "qkv"] == rows


def test_the_scale_of_a_quantised_tensor_goes_with_every_part_of_it() -> None:
    official = official_transformer(dict(diffusers_transformer(tiny_config("sana-0.6b-1024px")).state_dict()))
    official["blocks.0.attn.qkv.scale_weight"] = scale = torch.tensor(0.5)
    found = to_transformer_names(official)
    assert all(found[f"transformer_blocks.0.attn1.to_{part}.scale_weight"] is scale for part in "qkv")


def test_parts_of_a_tensor_share_its_memory() -> None:
    official = official_transformer(dict(diffusers_transformer(tiny_config("sana-0.6b-1024px")).state_dict()))
    ours = to_transformer_names(official)
    fused = official["blocks.1.attn.qkv.weight"].untyped_storage().data_ptr()
    parts = [ours[f"transformer_blocks.1.attn1.to_{part}.weight"] for part in "qkv"]
    assert {part.untyped_storage().data_ptr() for part in parts} == {fused}


def test_a_prefix_ends_with_a_dot() -> None:
    assert dialect_prefix({"a.b.weight": 0}, "b.weight") == "a."
    assert dialect_prefix({"b.weight": 0}, "b.weight") == ""
    assert dialect_prefix({"ab.weight": 0, "b.weight.c": 0}, "b.weight") is None
