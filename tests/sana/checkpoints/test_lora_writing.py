"""LoRAs in diffusers' layout, read by diffusers, and models with LoRAs merged into them."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline as DiffusersPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana import CheckpointError, load_transformer
from sana.checkpoints.lora import read_merges
from sana.checkpoints.writing import convert
from tests.sana.adapted import adapted, merged, save_as_peft
from tests.sana.measures import relative_error
from tests.sana.models import GEMMA
from tests.sana.twins import diffusers_transformer, randomise, tiny_config

CONFIG = tiny_config("sana-0.6b-1024px")
QUERY = "transformer_blocks.0.attn1.to_q"
INVERTED = "transformer_blocks.1.ff.conv_inverted"
TARGETS = ["attn1.to_q", "attn2.to_k", "conv_inverted", "conv_point", "patch_embed.proj", "proj_out"]
KINDS = {
    "LoRA": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "LoRA of several ranks": LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"to_k": 2}, alpha_pattern={"to_q": 3}, target_modules=TARGETS
    ),
    "rsLoRA": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    "DoRA": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "LoHa": LoHaConfig(r=3, alpha=6, target_modules=TARGETS),
    "LoKr": LoKrConfig(r=64, alpha=6, target_modules=TARGETS),
    "LoKr of products": LoKrConfig(r=1, alpha=6, decompose_both=True, decompose_factor=8, target_modules=TARGETS),
}
EXACT = 1e-5  # relative


def by_diffusers(path: Path) -> dict[str, Tensor]:
    """Weights of diffusers' transformer with a LoRA that its own loader has read, merged by PEFT."""
    torch.manual_seed(0)  # as `adapted` does
    network = randomise(diffusers_transformer(CONFIG))
    state, metadata = DiffusersPipeline.lora_state_dict(path, return_lora_metadata=True)
    DiffusersPipeline.load_lora_into_transformer(state, network, adapter_name="a", metadata=metadata)
    return {f"{name}.weight": weight for name, weight in merged(network).items()}


def by_us(path: Path, before: dict[str, Tensor]) -> dict[str, Tensor]:
    merges, _ = read_merges([(path, 1.0)], CONFIG, GEMMA)
    return {name: merge(before[name]) for name, merge in merges.items()}


def header(path: Path) -> dict[str, object]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_merges_what_was_converted_as_peft_merged_the_source(tmp_path: Path, kind: str) -> None:
    config: PeftConfig = KINDS[kind]
    network, before = adapted(CONFIG, config)
    source, target = save_as_peft(network, tmp_path / "source"), tmp_path / "style.safetensors"
    said = convert(source, target)
    assert said.startswith(f"{target}: a LoRA in diffusers' layout, of rank ")
    expected = {f"{name}.weight": weight for name, weight in merged(network).items()}
    found, ours = by_diffusers(target), by_us(target, before)
    assert found.keys() == expected.keys() == ours.keys() and len(found) == 4 * CONFIG.depth + 2
    for name, weight in expected.items():
        assert relative_error(found[name], weight) < EXACT, name
        assert relative_error(ours[name], weight) < EXACT, name
        assert relative_error(before[name], weight) > 0.01, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_stay_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    """From kohya's names, with alpha among the tensors, one layer of another rank."""
    tensors, alphas = {}, {QUERY: (4, 2.0), "transformer_blocks.2.attn1.to_q": (4, 2.0), INVERTED: (6, 12.0)}
    for path, (rank, alpha) in alphas.items():
        rows, kernel = (480, (1, 1)) if path == INVERTED else (96, ())
        flat = "lora_unet_" + path.replace(".", "_")
        tensors |= {
            f"{flat}.lora_down.weight": torch.randn(rank, 96, *kernel, dtype=dtype),
            f"{flat}.lora_up.weight": torch.randn(rows, rank, *kernel, dtype=dtype),
            f"{flat}.alpha": torch.tensor(alpha),
        }
    source, target = save(tensors, tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    assert convert(source, target) == f"{target}: a LoRA in diffusers' layout, of rank 4 to 6 on 3 layers"
    written = load_file(target)
    assert {*written} == {f"transformer.{path}.lora_{part}.weight" for path in alphas for part in "AB"}
    for path in alphas:
        flat = "lora_unet_" + path.replace(".", "_")
        assert torch.equal(written[f"transformer.{path}.lora_A.weight"], tensors[f"{flat}.lora_down.weight"])
        assert torch.equal(written[f"transformer.{path}.lora_B.weight"], tensors[f"{flat}.lora_up.weight"])
    assert header(target) == {
        "transformer.r": 4,
        "transformer.lora_alpha": 2.0,
        "transformer.rank_pattern": {INVERTED: 6},
        "transformer.alpha_pattern": {INVERTED: 12.0},
        "transformer.target_modules": sorted(alphas),
        "transformer.use_dora": False,
    }
    halved = tmp_path / "c.safetensors"
    convert(target, halved, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(halved).values()} == {torch.float16}
    again = tmp_path / "d.safetensors"
    convert(target, again)
    assert header(again) == header(target) and {*load_file(again)} == {*written}
    assert all(torch.equal(tensor, written[name]) for name, tensor in load_file(again).items())


def test_a_layer_for_queries_keys_and_values_becomes_three(tmp_path: Path) -> None:
    down, up = torch.randn(2, 96), torch.randn(288, 2)
    layer = "base_model.model.blocks.1.attn.qkv"
    source = save({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, tmp_path / "a.safetensors")
    convert(source, target := tmp_path / "b.safetensors")
    found = by_diffusers(target)
    torch.manual_seed(0)
    before = dict(randomise(diffusers_transformer(CONFIG)).state_dict())
    for name, part in zip(("to_q", "to_k", "to_v"), (up @ down).split(96), strict=True):
        name = f"transformer_blocks.1.attn1.{name}.weight"
        torch.testing.assert_close(found[name], before[name] + part, rtol=1e-5, atol=1e-5)


def test_official_names_for_time_follow_the_variant(tmp_path: Path) -> None:
    tensors = {
        "t_embedder.mlp.0.lora_A.weight": torch.ones(1, 256),
        "t_embedder.mlp.0.lora_B.weight": torch.ones(96, 1),
    }
    source, target = save(tensors, tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    for variant, inner in ((None, "emb."), ("sana-sprint-0.6b-1024px", "")):
        convert(source, target, variant=variant)
        assert f"transformer.time_embed.{inner}timestep_embedder.linear_1.lora_A.weight" in load_file(target)


def test_a_difference_and_a_core_become_factors(tmp_path: Path) -> None:
    difference, core = torch.randn(96, 96), torch.randn(2, 2, 1, 1)
    down, up = torch.randn(2, 96, 1, 1), torch.randn(480, 2, 1, 1)
    names = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": core}
    flat = "lora_unet_" + INVERTED.replace(".", "_")
    tensors = {f"transformer.{QUERY}.diff": difference, **{f"{flat}.{end}": part for end, part in names.items()}}
    convert(save(tensors, tmp_path / "a.safetensors"), target := tmp_path / "b.safetensors")
    torch.manual_seed(0)
    before, found = dict(randomise(diffusers_transformer(CONFIG)).state_dict()), by_diffusers(target)
    changes = {QUERY: difference, INVERTED: up.flatten(1) @ core.flatten(1) @ down.flatten(1)}
    for path, change in changes.items():
        weight = before[f"{path}.weight"]
        torch.testing.assert_close(found[f"{path}.weight"], weight + change.view(weight.shape), rtol=1e-4, atol=1e-4)


def test_layers_of_the_text_encoder_are_named_as_such(tmp_path: Path) -> None:
    flat = "lora_te1_layers_0_self_attn_q_proj"
    tensors = {
        f"{flat}.lora_down.weight": torch.randn(2, 64),
        f"{flat}.lora_up.weight": torch.randn(64, 2),
        f"{flat}.alpha": torch.tensor(1.0),
    }
    source = save(tensors, tmp_path / "a.safetensors")
    convert(source, target := tmp_path / "b.safetensors")
    assert {*load_file(target)} == {f"text_encoder.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"}
    weight = torch.randn(64, 64)
    (first,), (second,) = (read_merges([(path, 1.0)], CONFIG, GEMMA)[1].values() for path in (source, target))
    assert torch.equal(first(weight), second(weight))


def pair(layer: str) -> dict[str, Tensor]:
    return {f"{layer}.lora_A.weight": torch.ones(2, 96), f"{layer}.lora_B.weight": torch.ones(96, 2)}


MERGE = "merge it into its model, with sana convert MODEL TARGET --lora"
REFUSED = {
    "a replacement": (
        {f"{QUERY}.set_weight": torch.ones(96, 96)},
        f"a.safetensors replaces {QUERY}.weight, for which a LoRA of diffusers has no form; {MERGE}",
    ),
    "a bias": (
        {**pair(INVERTED), f"{INVERTED}.diff_b": torch.ones(480)},
        f"a.safetensors changes {INVERTED}.bias, for which a LoRA of diffusers has no form; {MERGE}",
    ),
    "a depthwise convolution": (
        {"transformer_blocks.0.ff.conv_depth.diff": torch.ones(480, 1, 3, 3)},
        "a.safetensors changes transformer_blocks.0.ff.conv_depth.weight, for which a LoRA of diffusers has no form; "
        f"{MERGE}",
    ),
    "a table": (
        {"scale_shift_table.diff": torch.ones(2, 96)},
        f"a.safetensors changes scale_shift_table, for which a LoRA of diffusers has no form; {MERGE}",
    ),
    "lengths of columns": (
        {**pair(QUERY), f"{QUERY}.dora_scale": torch.ones(1, 96)},
        f"a.safetensors is a DoRA with lengths of columns, which diffusers does not know; {MERGE}",
    ),
    "a DoRA of some layers": (
        {**pair(QUERY), f"{QUERY}.dora_scale": torch.ones(96, 1), **pair("transformer_blocks.1.attn1.to_q")},
        f"a.safetensors is a DoRA on some of its layers only, which diffusers does not know; {MERGE}",
    ),
    "a layer of another model": (
        {**pair(QUERY), **pair("down_blocks.0")},
        "1 of the 2 layers of a.safetensors fit the model; the rest has no effect, so it is not converted",
    ),
    "another model": (
        pair("lora_unet_down_blocks_0_attn"),
        "nothing of a.safetensors fits: its names are those of a Stable Diffusion model, first "
        "lora_unet_down_blocks_0_attn.lora_A.weight; use a LoRA made for this model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_diffusers_has_no_form_for_is_named_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    tensors, message = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        convert(save(tensors, tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert str(caught.value) == message
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# Merged models


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_merged_model_has_the_weights_that_peft_merges(tmp_path: Path, dtype: torch.dtype | None) -> None:
    network, before = adapted(CONFIG, KINDS["LoRA"])
    lora = save_as_peft(network, tmp_path / "lora")
    (tmp_path / "config.json").write_text('{"num_cross_attention_heads": 2}')
    source, target = save(before, tmp_path / "sana.safetensors"), tmp_path / "merged" / "sana.safetensors"
    target.parent.mkdir()
    assert convert(source, target, dtype=dtype, loras=[(lora, 1.0)]) == f"{target}: custom, {len(before)} tensors"
    expected = {**before, **{f"{name}.weight": weight for name, weight in merged(network).items()}}
    written = load_file(target)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == (dtype or torch.float32) and written[name].shape == tensor.shape
        assert relative_error(written[name], tensor) < (EXACT if dtype is None else 5e-3)
    unmerged = load_transformer(source).state_dict()
    convert(source, target, loras=[(lora, 0.0)])
    assert all(torch.equal(tensor, unmerged[name]) for name, tensor in load_transformer(target).state_dict().items())
    both = load_file(source)
    convert(source, target, loras=[(lora, 1.0), (lora, -1.0)])
    for name, tensor in load_file(target).items():
        torch.testing.assert_close(tensor, both[name], rtol=0, atol=1e-5)


def test_what_no_lora_can_be_merged_into_is_refused(tmp_path: Path) -> None:
    lora = save(pair(QUERY), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="^a.safetensors is a LoRA; a LoRA is merged into a SANA transformer$"):
        convert(lora, tmp_path / "b.safetensors", loras=[(lora, 1.0)])
    (tmp_path / "config.json").write_text('{"num_cross_attention_heads": 2}')
    source = save(dict(diffusers_transformer(CONFIG).state_dict()), tmp_path / "sana.safetensors")
    wide = save(
        {f"{QUERY}.lora_A.weight": torch.ones(2, 96), f"{QUERY}.lora_B.weight": torch.ones(99, 2)}, tmp_path / "w.sft"
    )
    with pytest.raises(CheckpointError, match="^w.sft was made for another model: it changes 99 x 96 numbers"):
        convert(source, tmp_path / "b.safetensors", loras=[(wide, 1.0)])
    assert not (tmp_path / "b.safetensors").exists()
