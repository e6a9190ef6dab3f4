"""LoRA files of every trainer: the layers they name, and how strong PEFT says they are. The right value is PEFT's own merge."""

import json
import math
import time
from pathlib import Path

import peft
import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoHaConfig, LoKrConfig, LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana.checkpoints import adapters
from sana.checkpoints.names import to_transformer_names
from tests.sana.adapted import adapted, merged, save_as_diffusers, save_as_peft
from tests.sana.dialects import official_transformer
from tests.sana.twins import diffusers_transformer, randomise, tiny_config

CONFIG = tiny_config("sana-0.6b-1024px")
FIRST, SECOND = "transformer_blocks.0.attn1.to_q", "transformer_blocks.2.attn2.to_k"
TARGETS = ["attn1.to_q", "attn2.to_k", "attn1.to_out.0"]
# What PEFT may be told of the strength of an adapter.
STRENGTHS = {
    "alpha above the rank": {"r": 4, "lora_alpha": 16},
    "alpha below it": {"r": 8, "lora_alpha": 2},
    "rsLoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "single layers": {
        "r": 4,
        "lora_alpha": 16,
        "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"transformer_blocks.0.attn1.to_q": 3},
    },
    "single layers by pattern": {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"transformer_blocks\.[02]\..*": 1}},
    "rsLoRA of single layers": {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"attn1.to_q": 9}},
}


def prepared(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        settings = adapters.read_settings(file.metadata(), path)
    return adapters.prepare(load_file(path), settings)


def changed(lora: dict[str, Tensor], layer: str, weight: Tensor) -> Tensor:
    """A weight with what a file with strengths as tensors does to it, by the formulas of the papers."""
    part = {
        name.removeprefix(f"{layer}."): tensor.double() for name, tensor in lora.items() if name.startswith(f"{layer}.")
    }
    weight, alpha = weight.double(), part.get("alpha")
    if "lokr_w1" in part or "lokr_w1_a" in part:
        ranks = [len(part[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in part]
        left, right = (
            part[f"lokr_w{k}"] if f"lokr_w{k}" in part else part[f"lokr_w{k}_a"] @ part[f"lokr_w{k}_b"] for k in (1, 2)
        )
        return weight + (alpha / ranks[-1] if ranks else 1.0) * torch.kron(left, right)
    if "hada_w1_a" in part:
        rank = len(part["hada_w1_b"])
        product = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
        return weight + alpha / rank * product
    down, up = part["lora_A.weight"], part["lora_B.weight"]
    result = weight + (1.0 if alpha is None else alpha / len(down)) * up @ down
    if "dora_scale" in part:
        result = result * part["dora_scale"] / result.norm(dim=1, keepdim=True)
    return result


def assert_merged(lora: dict[str, Tensor], prefix: str, before: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(expected) == 3 * CONFIG.depth
    for layer, weight in expected.items():
        torch.testing.assert_close(
            changed(lora, prefix + layer, before[f"{layer}.weight"]).float(), weight, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("save", [save_as_diffusers, save_as_peft])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_strength_is_what_peft_says(tmp_path: Path, strength: str, save: object) -> None:
    network, before = adapted(CONFIG, LoraConfig(target_modules=TARGETS, **STRENGTHS[strength]))
    lora = prepared(save(network, tmp_path))
    prefix = "transformer." if save is save_as_diffusers else "base_model.model."
    assert_merged(lora, prefix, before, merged(network))


def test_a_header_tells_what_the_issue_of_alpha_was_about(tmp_path: Path) -> None:
    """Rank 4 and alpha 16 once made a quarter of the strength."""
    network, _ = adapted(CONFIG, LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS))
    path = save_as_diffusers(network, tmp_path)
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    assert (told["transformer.r"], told["transformer.lora_alpha"]) == (4, 16)
    assert adapters.strength_of(told, f"transformer.{FIRST}") == 4
    assert prepared(path)[f"transformer.{FIRST}.alpha"] == 16


def test_dora_of_peft(tmp_path: Path) -> None:
    network, before = adapted(CONFIG, LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=TARGETS))
    lora = prepared(save_as_peft(network, tmp_path))
    assert not any("magnitude" in name for name in lora)
    assert_merged(lora, "base_model.model.", before, merged(network))


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=4, alpha=12, target_modules=TARGETS),
        LoKrConfig(r=64, alpha=32, target_modules=TARGETS),  # so large that both factors are whole
        LoKrConfig(r=3, alpha=12, target_modules=TARGETS),  # the larger one is a product
        LoKrConfig(r=4, alpha=12, decompose_both=True, decompose_factor=16, target_modules=TARGETS),  # the other one
        LoKrConfig(r=2, alpha=12, decompose_both=True, decompose_factor=16, target_modules=TARGETS),
    ],
    ids=["LoHa", "LoKr", "LoKr with one product", "LoKr with the other product", "LoKr of products"],
)
def test_products_of_peft(tmp_path: Path, config: peft.PeftConfig) -> None:
    network, before = adapted(CONFIG, config)
    assert_merged(prepared(save_as_peft(network, tmp_path)), "base_model.model.", before, merged(network))


def test_alpha_among_the_tensors_counts_more_than_what_is_told() -> None:
    lora = {f"transformer.{FIRST}.lora_A.weight": torch.ones(4, 96), f"transformer.{FIRST}.alpha": torch.tensor(2.0)}
    found = adapters.prepare(lora, {"transformer.r": 4, "transformer.lora_alpha": 16})
    assert found[f"transformer.{FIRST}.alpha"] == 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 0, "lora_alpha": 16},
        {"r": 4},
        {"r": "four", "lora_alpha": 16},
        {"r": 4, "lora_alpha": math.nan},
        {"r": 4, "lora_alpha": [16]},
        {"r": 4, "lora_alpha": True},
    ],
)
def test_settings_that_tell_no_strength(settings: dict[str, object]) -> None:
    assert adapters.strength_of(settings, FIRST) is None


def test_patterns_that_are_none_or_take_for_ever_are_left_out() -> None:
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 1, "(a+)+$": 2, "to_q": 12}}
    assert adapters.strength_of(settings, FIRST) == 3
    assert adapters.strength_of(settings, "a" * 40 + "!") == 2


@pytest.mark.parametrize(
    ("pattern", "followed"),
    [
        (r"transformer_blocks\.\d+\.attn1\.to_(q|k|v|out)", True),
        (r".*blocks.*attn1.to_q", True),
        (".*" * 12 + "x", False),
        (".?" * 40 + "x", False),
        ("(.|.)" * 40 + "x", False),
        ("a{0,9}" * 40 + "x", False),
    ],
)
def test_a_pattern_of_many_repeats_or_choices_is_left_out(
    caplog: pytest.LogCaptureFixture, pattern: str, followed: bool
) -> None:
    """Each multiplies the ways in which it may be tried; the last four would take longer than anybody waits."""
    settings = {"r": 4, "lora_alpha": 16, "alpha_pattern": {pattern: 2}}
    assert adapters.strength_of(settings, FIRST) == (0.5 if followed else 4)
    assert bool(caplog.messages) != followed


def test_a_factor_without_axes_has_no_rank() -> None:
    lora = {f"{FIRST}.lora_A.weight": torch.tensor(1.0), f"{FIRST}.lora_B.weight": torch.ones(4, 2)}
    assert f"{FIRST}.alpha" not in adapters.prepare(lora, {"r": 2, "lora_alpha": 4})
    lora[f"{FIRST}.lora_A.weight"] = torch.ones(2, 4)
    assert adapters.prepare(lora, {"r": 2, "lora_alpha": 4})[f"{FIRST}.alpha"] == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_whole_factor_in_few_bits_is_scaled_exactly(dtype: torch.dtype) -> None:
    factor = f"{FIRST}.lokr_w1"
    lora = {factor: torch.tensor([[1.0, 1.125]]).to(dtype), f"{FIRST}.lokr_w2": torch.ones(2, 2)}
    scaled = adapters.prepare(lora, {"r": 2, "lora_alpha": 2.02})[factor]
    torch.testing.assert_close(scaled.float(), torch.tensor([[1.01, 1.13625]]))


@pytest.mark.parametrize(
    "pattern", [".*" * 12 + "!", "a?" * 4, "x" * 201, "a{99999999999}", "(" * 90 + ")" * 90, "[", "(?<=a*)b"]
)
def test_a_pattern_that_takes_long_or_is_none_gives_way_to_the_next(pattern: str) -> None:
    settings = {"r": 4, "lora_alpha": 16, "alpha_pattern": {pattern: 1, "to_q": 8}}
    assert adapters.strength_of(settings, "transformer_blocks.0.attn1.to_q") == 2


def test_more_patterns_than_layers_take_no_time() -> None:
    settings = {"r": 4, "lora_alpha": 16, "alpha_pattern": {f"x{i}": 1 for i in range(100_000)}}
    start = time.process_time()
    assert {adapters.strength_of(settings, f"transformer_blocks.{i}.attn1.to_q") for i in range(60)} == {4}
    assert adapters.strength_of(settings, "a." * 200) == 4
    assert time.process_time() - start < 5


def test_numbers_may_be_told_as_text() -> None:
    assert adapters.strength_of({"transformer.r": "4", "transformer.lora_alpha": "16"}, f"transformer.{FIRST}") == 4


def test_a_pattern_with_an_optional_group_is_followed_and_one_with_a_repeated_group_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"r": 4, "lora_alpha": 16, "alpha_pattern": {r"(transformer_blocks\.\d+\.)?attn1\.to_q": 2}}
    assert adapters.strength_of(settings, FIRST) == 0.5 and not caplog.messages
    assert adapters.strength_of({"r": 4, "lora_alpha": 16, "alpha_pattern": {"(a|b)+c": 2}}, FIRST) == 4
    assert caplog.messages == ["The pattern '(a|b)+c' of a LoRA may take for ever to match, and is left out."]


@pytest.mark.parametrize("header", ["{}", "null", "[1]", "not json"])
def test_a_header_that_tells_nothing_leaves_it_to_the_file_beside(tmp_path: Path, header: str) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    path = tmp_path / "adapter_model.safetensors"
    assert adapters.read_settings({LORA_ADAPTER_METADATA_KEY: header}, path)["lora_alpha"] == 8
    (link := tmp_path / "loras").mkdir()
    path.touch()
    (link / "linked.safetensors").symlink_to(path)
    assert adapters.read_settings(None, link / "linked.safetensors")["lora_alpha"] == 8


def test_a_broken_configuration_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    assert adapters.read_settings(None, tmp_path / "adapter_model.safetensors") == {}
    assert caplog.messages[0].startswith("The strength of adapter_model.safetensors is not known")


@pytest.mark.parametrize("end", ["", ".weight", ".default.weight", ".my_style.weight"])
def test_magnitudes_are_scales_of_rows_whatever_the_adapter_is_called(end: str) -> None:
    found = adapters.prepare({f"transformer.{FIRST}.lora_magnitude_vector{end}": torch.arange(3.0)}, {})
    assert {name: part.tolist() for name, part in found.items()} == {
        f"transformer.{FIRST}.dora_scale": [[0.0], [1.0], [2.0]]
    }


@pytest.mark.parametrize(
    "name",
    [
        "module.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "_orig_mod.transformer_blocks.0._orig_mod.attn1.to_q.lora_A.weight",
        "transformer_blocks.0.attn1.to_q.lora_A.my_style.weight",
        "transformer_blocks.0.attn1.to_q.lora_A.default.weight",
    ],
)
def test_names_are_without_what_training_code_leaves_in_them(name: str) -> None:
    assert [*adapters.prepare({name: torch.ones(2, 2)}, {})] == ["transformer_blocks.0.attn1.to_q.lora_A.weight"]


def test_a_scale_for_columns_and_a_core_belong_to_every_part_of_a_fused_layer() -> None:
    lora = {
        "blocks.0.attn.qkv.dora_scale": torch.ones(1, 96),
        "blocks.0.attn.qkv.lora_mid.weight": torch.ones(2, 2, 1, 1),
    }
    found = adapters.prepare(lora, {})
    for part in ("to_q", "to_k", "to_v"):
        assert found[f"transformer_blocks.0.attn1.{part}.dora_scale"].shape == (1, 96)
        assert found[f"transformer_blocks.0.attn1.{part}.lora_mid.weight"].shape == (2, 2, 1, 1)


def test_a_configuration_among_other_loras_is_for_the_adapter_it_was_written_with(tmp_path: Path) -> None:
    network, _ = adapted(CONFIG, LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS))
    renamed = save_as_peft(network, tmp_path, "style.safetensors")
    assert adapters.read_settings(None, renamed)["lora_alpha"] == 16
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    assert adapters.read_settings(None, renamed) == {}
    renamed.rename(own := tmp_path / "adapter_model.safetensors")
    assert adapters.read_settings(None, own)["lora_alpha"] == 16


# Names


def official_layers() -> list[str]:
    network = diffusers_transformer(CONFIG)
    names = official_transformer(dict(randomise(network).state_dict()))
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight") and "norm" not in name]


@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer.", "diffusion_model.", "module.", ""])
def test_official_names_change_the_weights_that_are_cut_from_theirs(prefix: str) -> None:
    """One adapter of NVlabs' own training for queries, keys and values, which are three layers here."""
    torch.manual_seed(0)
    theirs = official_transformer(dict(randomise(diffusers_transformer(CONFIG)).state_dict()))
    layers = [layer for layer in official_layers() if theirs[f"{layer}.weight"].shape[1:] and "depth" not in layer]
    lora, official = {}, dict(theirs)
    for layer in layers:
        weight = theirs[f"{layer}.weight"]
        down, up = torch.randn(4, weight[0].numel()), torch.randn(len(weight), 4)
        lora |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
        official[f"{layer}.weight"] = weight + 2 * (up @ down).view(weight.shape)
    found = adapters.prepare(lora, {"r": 4, "lora_alpha": 8})
    before, after = to_transformer_names(theirs), to_transformer_names(official)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert len(layers) == 7 * CONFIG.depth + 7 and len(moved) > len(layers)
    assert adapters.layers_of(found) == {name.removesuffix(".weight") for name in moved}
    for name in moved:
        torch.testing.assert_close(
            changed(found, name.removesuffix(".weight"), before[name]).float(), after[name], rtol=1e-4, atol=1e-4
        )


def test_sprint_has_names_of_its_own_for_time() -> None:
    lora = {"t_embedder.mlp.0.lora_A.weight": torch.ones(1, 2), "cfg_embedder.mlp.2.lora_A.weight": torch.ones(1, 2)}
    assert [*adapters.prepare(lora, {}, sprint=True)] == [
        "time_embed.timestep_embedder.linear_1.lora_A.weight",
        "time_embed.guidance_embedder.linear_2.lora_A.weight",
    ]


def test_official_names_with_underscores() -> None:
    lora = {"lora_unet_blocks_11_cross_attn_kv_linear.lora_up.weight": torch.arange(8.0).view(4, 2)}
    found = adapters.prepare(lora, {})
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "transformer_blocks.11.attn2.to_k.lora_up.weight": [[0, 1], [2, 3]],
        "transformer_blocks.11.attn2.to_v.lora_up.weight": [[4, 5], [6, 7]],
    }


def test_a_kronecker_product_for_a_fused_layer_keeps_its_name() -> None:
    """It has no rows of its own for queries, so it is left for the loader to name as what does not fit."""
    lora = {"blocks.0.attn.qkv.lokr_w1": torch.ones(2, 2)}
    assert adapters.prepare(lora, {}).keys() == lora.keys()


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("lora_unet_single_blocks_0_linear1.lora_up.weight", "a Flux model"),
        ("lora_unet_down_blocks_0_attentions_0.lora_up.weight", "a Stable Diffusion model"),
        ("transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight", "a Stable Diffusion 3 model"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", "the text encoder of another model"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "a model of another family"),
        ("something", "a model of unknown kind"),
        *(
            (f"{layer}.lora_A.weight", "SANA's text encoder, which Load LoRA (Model and CLIP) takes")
            for layer in (
                "base_model.model.layers.0.self_attn.v_proj",
                "text_encoder.layers.0.self_attn.v_proj",
                "lora_te1_layers_0_mlp_up_proj",
            )
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.v_proj.lora_A.weight",
            "the text encoder of another model",
        ),
        ("text_encoder.encoder.layers.0.self_attn.v_proj.lora_A.weight", "a model of another family"),
        *(
            (f"{layer}.lora_A.weight", "a transformer with other blocks")
            for layer in (
                "transformer.transformer_blocks.40.attn1.to_q",
                "lora_unet_transformer_blocks_40_ff_conv_point",
            )
        ),
        ("lora_unet_down_blocks_0_transformer_blocks_0_attn1_to_q.lora_down.weight", "a Stable Diffusion model"),
        ("blocks.0.attn.qkv.lokr_w1", "several layers of SANA in one, as a product that cannot be cut apart"),
    ],
)
def test_whose_names_these_are(name: str, model: str) -> None:
    assert adapters.describe_lora([name]) == model


def test_matrices_of_convolutions() -> None:
    lora = {
        "a.lora_A.weight": torch.ones(2, 3, 1, 1),
        "a.lora_mid.weight": torch.ones(2, 2, 1, 1),
        "b.lora_A.weight": torch.ones(2, 3, 1, 1),
        "a.diff": torch.ones(4, 3, 3, 3),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in adapters.with_matrices(lora, ("a",)).items()}
    assert shapes == {
        "a.lora_A.weight": (2, 3),
        "a.lora_mid.weight": (2, 2, 1, 1),
        "b.lora_A.weight": (2, 3, 1, 1),
        "a.diff": (4, 3, 3, 3),
    }


def test_every_dialect_names_a_layer() -> None:
    names = [*adapters.layer_names(FIRST)]
    assert len({*names}) == len(names) == 8
    assert f"transformer.base_model.model.{FIRST}" in names and "lora_unet_" + FIRST.replace(".", "_") in names
    text = [*adapters.text_layer_names("layers.3.mlp.up_proj")]
    assert {"base_model.model.layers.3.mlp.up_proj", "layers.3.mlp.up_proj", "lora_te1_model_layers_3_mlp_up_proj"} < {
        *text
    }
    assert {"text_encoder.layers.3.mlp.up_proj", "lora_te1_layers_3_mlp_up_proj"} < {*text}


def test_an_alpha_under_another_name_of_its_layer_counts() -> None:
    """Our own files: diffusers refuses names without "lora". One that belongs to no other layer stays where it is."""
    layer, flat = "transformer.transformer_blocks.0.attn1.to_q", "lora_unet_transformer_blocks_0_attn1_to_q"
    factors = {f"{layer}.lora_A.weight": torch.ones(2, 3), f"{layer}.lora_B.weight": torch.ones(3, 2)}
    other = {"lora_unet_transformer_blocks_1_attn1_to_q.alpha": torch.tensor(5.0)}
    found = adapters.prepare({**factors, f"{flat}.alpha": torch.tensor(7.0), **other}, {"r": 2, "lora_alpha": 1})
    assert {*found} == {*factors, f"{layer}.alpha", *other} and float(found[f"{layer}.alpha"]) == 7
