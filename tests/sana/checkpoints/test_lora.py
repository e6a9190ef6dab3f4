"""LoRA files merged into the weights of networks, against PEFT in diffusers' and transformers' networks."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sana import CheckpointError, load_transformer
from sana.checkpoints.files import read_tensors
from sana.checkpoints.inspection import describe_file
from sana.checkpoints.lora import lora_files, read_lora, read_merges
from sana.checkpoints.lora_writing import lora_in_diffusers_layout
from sana.checkpoints.text_encoder import build_text_encoder, find_text_encoder
from sana.checkpoints.transformer import FoundTransformer, build_transformer
from sana.config import TransformerIdentity
from sana.networks.transformer import SanaTransformer
from tests.sana.adapted import TRAINERS, adapted, dotted, merged, save_as_diffusers, save_as_peft
from tests.sana.dialects import official_transformer
from tests.sana.measures import relative_error
from tests.sana.models import GEMMA, gemma, write_model
from tests.sana.twins import TEXT_WIDTH, as_linear, diffusers_transformer, randomise, tiny_config

CONFIG = tiny_config("sana-0.6b-1024px")
SPRINT = tiny_config("sana-sprint-0.6b-1024px")
QUERY = "transformer_blocks.0.attn1.to_q"
INVERTED = "transformer_blocks.1.ff.conv_inverted"
DEPTHWISE = "transformer_blocks.2.ff.conv_depth"
MATRICES = ["attn1.to_q", "attn2.to_k", "to_out.0", "time_embed.linear", "caption_projection.linear_1", "proj_out"]
CONVOLUTIONS = ["conv_inverted", "conv_point", "patch_embed.proj"]
TARGETS = [*MATRICES, *CONVOLUTIONS]
KINDS = {
    "LoRA": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rsLoRA": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    "DoRA": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "LoHa": LoHaConfig(r=3, alpha=6, target_modules=[*TARGETS, "conv_depth"]),
    "LoHa with cores": LoHaConfig(r=3, alpha=6, use_effective_conv2d=True, target_modules=[*TARGETS, "conv_depth"]),
    "LoKr": LoKrConfig(r=64, alpha=6, target_modules=[*TARGETS, "conv_depth"]),
    "LoKr of products": LoKrConfig(
        r=2, alpha=6, decompose_both=True, decompose_factor=8, target_modules=[*TARGETS, "conv_depth"]
    ),
    "LoKr with cores": LoKrConfig(
        r=2, alpha=6, use_effective_conv2d=True, decompose_factor=4, target_modules=[*TARGETS, "conv_depth"]
    ),
}
EXACT = 1e-5  # relative, of outputs and weights


def merged_network(before: dict[str, Tensor], *loras: tuple[Path, float], config: object = CONFIG) -> SanaTransformer:
    """Ours, of diffusers' weights and LoRA files."""
    identity = TransformerIdentity(config, "custom", 1024, 3.0, "float32", "the test")
    merges, _ = read_merges(loras, config, None)
    return build_transformer(FoundTransformer(identity, as_linear(before), "the model"), merges=merges)


def output(network: nn.Module) -> Tensor:
    """The velocity of either network at a fixed input."""
    torch.manual_seed(1)
    x, text, timestep = torch.randn(2, 32, 4, 3), torch.randn(2, 7, TEXT_WIDTH), torch.tensor([999.0, 250.0])
    with torch.no_grad():
        if isinstance(network, SanaTransformer):
            return network(x, timestep, text)
        return network(x, text, timestep).sample


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


# Against PEFT


@pytest.mark.parametrize(
    ("kind", "writer"),
    [(kind, save_as_peft) for kind in KINDS]
    + [(kind, save_as_diffusers) for kind in KINDS if isinstance(KINDS[kind], LoraConfig)],
)
def test_a_network_with_a_lora_gives_what_peft_gives(tmp_path: Path, kind: str, writer: object) -> None:
    network, before = adapted(CONFIG, KINDS[kind])
    ours = merged_network(before, (writer(network, tmp_path), 1.0))
    assert relative_error(output(ours), output(network)) < EXACT
    assert relative_error(output(ours), output(merged_network(before))) > 0.01
    weights = ours.state_dict()
    expected = {f"{name}.weight": weight for name, weight in merged(network).items()}
    assert len(expected) >= 6 * CONFIG.depth
    for name, weight in expected.items():
        assert relative_error(weights[name], as_linear({name: weight})[name]) < EXACT, name
    for name in weights.keys() - expected.keys():
        assert torch.equal(weights[name], as_linear(before)[name]), name


@pytest.mark.parametrize("strength", [0.5, -0.7, 2.0])
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr of products", "DoRA"])
def test_strength_is_a_share_of_the_change(tmp_path: Path, kind: str, strength: float) -> None:
    """Of DoRA too, as ComfyUI has it: what PEFT scales there is inside of the lengths."""
    network, before = adapted(CONFIG, KINDS[kind])
    weights = merged_network(before, (save_as_peft(network, tmp_path), strength)).state_dict()
    for layer, whole in merged(network).items():
        weight = before[f"{layer}.weight"]
        expected = as_linear({layer: torch.lerp(weight, whole, strength)})[layer]
        assert relative_error(weights[f"{layer}.weight"], expected) < EXACT, layer


def test_strength_is_that_of_peft(tmp_path: Path) -> None:
    network, before = adapted(CONFIG, KINDS["LoRA"])
    path = save_as_diffusers(network, tmp_path)
    network.set_adapters("default", 0.4)
    assert relative_error(output(merged_network(before, (path, 0.4))), output(network)) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_a_strength_of_0_changes_no_bit(tmp_path: Path, kind: str) -> None:
    network, before = adapted(CONFIG, KINDS[kind])
    found = merged_network(before, (save_as_peft(network, tmp_path), 0.0)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in as_linear(before).items())


def test_loras_add_up_in_their_order(tmp_path: Path) -> None:
    """Of one file twice, the strengths; DoRA last, whose lengths are of the weight with what came before it."""
    network, before = adapted(CONFIG, KINDS["LoRA"])
    lora = save_as_diffusers(network, tmp_path)
    whole, twice = merged_network(before, (lora, 1.0)), merged_network(before, (lora, 0.4), (lora, 0.6))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    rows = {f"{QUERY}.dora_scale": torch.full((96, 1), 2.0)}
    zero = {f"{QUERY}.lora_down.weight": torch.zeros(1, 96), f"{QUERY}.lora_up.weight": torch.zeros(96, 1)}
    dora = save({**rows, **zero}, tmp_path / "dora.safetensors")
    found = merged_network(before, (lora, 1.0), (dora, 1.0)).state_dict()[f"{QUERY}.weight"]
    torch.testing.assert_close(found.norm(dim=1), torch.full((96,), 2.0))
    after = merged_network(before, (dora, 1.0), (lora, 1.0)).state_dict()[f"{QUERY}.weight"]
    assert (after.norm(dim=1) - 2).abs().max() > 0.1


def test_weights_in_16_bits_are_merged_in_32(tmp_path: Path) -> None:
    """Rounded once, when all is added: many small changes in bfloat16 would be lost."""
    network, before = adapted(CONFIG, KINDS["LoRA"])
    path = save_as_diffusers(network, tmp_path)
    half = {name: tensor.bfloat16() for name, tensor in before.items()}
    merges, _ = read_merges([(path, 1e-3)] * 50, CONFIG, None)
    identity = TransformerIdentity(CONFIG, "custom", 1024, 3.0, "bfloat16", "the test")
    found = FoundTransformer(identity, as_linear(half), "the model")
    exact = build_transformer(found, torch.float32, merges=merges).state_dict()
    for dtype in (torch.bfloat16, None):
        ours = build_transformer(found, dtype, merges=merges).state_dict()
        assert all(tensor.dtype == torch.bfloat16 for tensor in ours.values())
        assert all(torch.equal(ours[name], tensor.bfloat16()) for name, tensor in exact.items())
    assert not torch.equal(exact[f"{QUERY}.weight"].bfloat16(), half[f"{QUERY}.weight"])


# Dialects


DIALECTS = {**TRAINERS, "bare": dotted("", "lora_A", "lora_B")}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_changes_the_same_weights(tmp_path: Path, dialect: str) -> None:
    """alpha 4 of rank 2 in the dialects that have one, and 1x1 convolutions as files have them."""
    before = dict(randomise(diffusers_transformer(CONFIG)).state_dict())
    paths = [QUERY, INVERTED, "patch_embed.proj", "transformer_blocks.2.attn1.to_out.0"]
    torch.manual_seed(0)
    tensors, expected = {}, dict(as_linear(before))
    for path in paths:
        rows, columns, *kernel = before[f"{path}.weight"].shape
        down, up = torch.randn(2, columns, *kernel), torch.randn(rows, 2, *kernel)
        down_name, up_name, alpha = DIALECTS[dialect](path)
        tensors |= {down_name: down, up_name: up, **({alpha: torch.tensor(4.0)} if alpha else {})}
        expected[f"{path}.weight"] = expected[f"{path}.weight"] + (2 if alpha else 1) * up.flatten(1) @ down.flatten(1)
    found = merged_network(before, (save(tensors, tmp_path / "a.safetensors"), 1.0)).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def test_official_names_change_what_is_cut_from_their_layers(tmp_path: Path) -> None:
    theirs = official_transformer(dict(randomise(diffusers_transformer(CONFIG)).state_dict()))
    down, up = torch.randn(2, 96), torch.randn(3 * 96, 2)
    layer = "blocks.1.attn.qkv"
    names = (f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight")
    lora = save(dict(zip(names, (down, up), strict=True)), tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text('{"num_cross_attention_heads": 2}')
    source, changed = tmp_path / "a.pth", tmp_path / "b.pth"
    torch.save(theirs, source)
    torch.save({**theirs, f"{layer}.weight": theirs[f"{layer}.weight"] + up @ down}, changed)
    merges, _ = read_merges([(lora, 1.0)], CONFIG, None)
    assert len(merges) == 3
    expected, before = load_transformer(changed).state_dict(), load_transformer(source).state_dict()
    for name, merge in merges.items():
        torch.testing.assert_close(merge(before[name]), expected[name], rtol=1e-5, atol=1e-5)
        assert not torch.equal(before[name], expected[name])


def test_official_names_for_time_are_those_of_the_model(tmp_path: Path) -> None:
    tensors = {
        "t_embedder.mlp.0.lora_A.weight": torch.ones(1, 256),
        "t_embedder.mlp.0.lora_B.weight": torch.ones(96, 1),
    }
    path = save(tensors, tmp_path / "a.safetensors")
    assert [*read_merges([(path, 1.0)], CONFIG, None)[0]] == ["time_embed.emb.timestep_embedder.linear_1.weight"]
    assert [*read_merges([(path, 1.0)], SPRINT, None)[0]] == ["time_embed.timestep_embedder.linear_1.weight"]


# Kinds that PEFT does not write


def test_differences_replacements_and_biases(tmp_path: Path) -> None:
    before = dict(randomise(diffusers_transformer(CONFIG)).state_dict())
    linear = as_linear(before)
    difference, bias = torch.randn(480, 96, 1, 1), torch.randn(480)
    new, table = torch.randn(96, 96), torch.randn(6, 96)
    tensors = {
        f"lora_unet_{INVERTED.replace('.', '_')}.diff": difference,
        f"lora_unet_{INVERTED.replace('.', '_')}.diff_b": bias,
        f"transformer.{QUERY}.set_weight": new,
        "diffusion_model.transformer_blocks.1.scale_shift_table.diff": table,
    }
    path = save(tensors, tmp_path / "a.safetensors")
    found = merged_network(before, (path, 0.5)).state_dict()
    expected = {
        f"{INVERTED}.weight": linear[f"{INVERTED}.weight"] + difference.flatten(1) / 2,
        f"{INVERTED}.bias": linear[f"{INVERTED}.bias"] + bias / 2,
        f"{QUERY}.weight": new,  # of a replacement there is no share
        "transformer_blocks.1.scale_shift_table": linear["transformer_blocks.1.scale_shift_table"] + table / 2,
    }
    for name, tensor in {**linear, **expected}.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    unchanged = merged_network(before, (path, 0.0)).state_dict()
    assert all(torch.equal(unchanged[name], tensor) for name, tensor in linear.items())


@pytest.mark.parametrize("path", [INVERTED, DEPTHWISE])
def test_a_locon_with_a_core(tmp_path: Path, path: str) -> None:
    """A third factor between the two, which is a convolution of the size of the weight's (LyCORIS, locon.py)."""
    before = dict(randomise(diffusers_transformer(CONFIG)).state_dict())
    weight = before[f"{path}.weight"]
    rows, columns, *kernel = weight.shape
    down, up, core = torch.randn(3, columns, 1, 1), torch.randn(rows, 3, 1, 1), torch.randn(3, 3, *kernel)
    ends = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": core, "alpha": torch.tensor(1.5)}
    lora = save({f"lycoris_{path.replace('.', '_')}.{end}": part for end, part in ends.items()}, tmp_path / "a.sft")
    # The three convolutions in a row, of an image with a single dot, are the kernel turned around.
    dot = torch.eye(columns).view(columns, columns, 1, 1)
    dot = nn.functional.pad(dot, (kernel[0] - 1,) * 4)
    image = nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(dot, down), core), up)
    expected = weight + 0.5 * image.flip(-1, -2).transpose(0, 1)
    found = merged_network(before, (lora, 1.0)).state_dict()[f"{path}.weight"]
    torch.testing.assert_close(found.view(weight.shape), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", [QUERY, INVERTED])
def test_a_dora_with_lengths_of_columns(tmp_path: Path, path: str) -> None:
    """LyCORIS with wd_on_output off: one length for each input."""
    before = dict(randomise(diffusers_transformer(CONFIG)).state_dict())
    weight = before[f"{path}.weight"]
    rows, columns, *kernel = weight.shape
    lengths = torch.linspace(1, 2, columns)
    ends = {
        "lora_down.weight": torch.randn(2, columns, *kernel),
        "lora_up.weight": torch.randn(rows, 2, *kernel),
        "dora_scale": lengths.view(1, columns, *kernel),
    }
    lora = save({f"lycoris_{path.replace('.', '_')}.{end}": part for end, part in ends.items()}, tmp_path / "a.sft")
    found = merged_network(before, (lora, 1.0)).state_dict()[f"{path}.weight"]
    torch.testing.assert_close(found.norm(dim=0), lengths)
    plain = weight.flatten(1) + ends["lora_up.weight"].flatten(1) @ ends["lora_down.weight"].flatten(1)
    torch.testing.assert_close(found / found.norm(dim=0), plain / plain.norm(dim=0), rtol=1e-4, atol=1e-5)


# The text encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sana"))


TEXT_TARGETS = ["q_proj", "v_proj", "down_proj"]
TEXT_PREFIXES = (
    *("text_encoder.", "base_model.model.", "base_model.model.model.", ""),
    *("text_encoders.gemma2_2b.transformer.model.", "text_encoders.transformer.model."),
)


@pytest.mark.parametrize("prefix", [*TEXT_PREFIXES, "lora_te1_", "lora_te_model_"])
def test_a_lora_of_the_text_encoder_gives_what_peft_gives(tmp_path: Path, model: Path, prefix: str) -> None:
    network = gemma()
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=TEXT_TARGETS), network)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data, std=0.2)
    tensors = get_peft_model_state_dict(network)
    if prefix.endswith("_"):
        tensors = {
            name.removesuffix(".weight").replace(".lora_A", "\0down").replace(".lora_B", "\0up"): part
            for name, part in tensors.items()
        }
        tensors = {name.replace(".", "_").replace("\0", ".lora_") + ".weight": part for name, part in tensors.items()}
    lora = save({prefix + name: part for name, part in tensors.items()}, tmp_path / "a.safetensors")
    found = find_text_encoder(read_tensors(model, "text_encoder"))
    transformer, merges = read_merges([(lora, 1.0)], CONFIG, found.config)
    assert not transformer and len(merges) == 3 * GEMMA.num_hidden_layers
    ids = torch.tensor([[2, 5, 17, 300, 9]])
    ours, plain = (build_text_encoder(found, merges=given).model(ids)[0] for given in (merges, {}))
    with torch.no_grad():
        theirs = network(ids)[0]
    assert relative_error(ours, theirs) < EXACT
    assert relative_error(plain, theirs) > 0.01


def test_one_file_may_be_for_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {}
    for layer, width in ((f"lora_unet_{QUERY.replace('.', '_')}", 96), ("lora_te1_layers_0_self_attn_q_proj", 64)):
        tensors |= {f"{layer}.lora_down.weight": torch.ones(1, width), f"{layer}.lora_up.weight": torch.ones(width, 1)}
    path = save(tensors, tmp_path / "both.safetensors")
    with caplog.at_level(logging.WARNING):
        first, second = read_merges([(path, 1.0)], CONFIG, GEMMA)
    assert ([*first], [*second], caplog.messages) == (
        [f"{QUERY}.weight"],
        ["layers.0.self_attn.q_proj.weight"],
        [],
    )
    with caplog.at_level(logging.WARNING):
        assert read_merges([(path, 1.0)], CONFIG, None)[1] == {}
        assert [len(part) for part in read_merges([(path, 1.0)], None, GEMMA)] == [0, 1]
    assert caplog.messages == ["1 of the 2 layers of both.safetensors fit the model; the rest has no effect"] * 2


# What is refused


def pair(layer: str, rows: int = 96, columns: int = 96) -> dict[str, Tensor]:
    return {f"{layer}.lora_A.weight": torch.ones(2, columns), f"{layer}.lora_B.weight": torch.ones(rows, 2)}


def test_a_file_of_which_a_part_fits_says_how_much(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {**pair(f"transformer.{QUERY}"), **pair("transformer.transformer_blocks.40.attn1.to_q")}
    with caplog.at_level(logging.WARNING):
        merges, _ = read_merges([(save(tensors, tmp_path / "a.safetensors"), 1.0)], CONFIG, GEMMA)
    assert [*merges] == [f"{QUERY}.weight"]
    assert caplog.messages == ["1 of the 2 layers of a.safetensors fit the model; the rest has no effect"]


REFUSED = {
    "another family": (
        pair("lora_unet_down_blocks_0_attn"),
        "nothing of a.safetensors fits: its names are those of a Stable Diffusion model, first "
        "lora_unet_down_blocks_0_attn.lora_A.weight; use a LoRA made for this model",
    ),
    "another width": (
        pair(f"transformer.{QUERY}", 1152, 1152),
        f"a.safetensors was made for another model: it changes 1152 x 1152 numbers of {QUERY}.weight, which has 96 x 96 "
        "here; use a LoRA made for this model",
    ),
    "another number of inputs": (
        pair(f"transformer.{QUERY}", 96, 64),
        f"a.safetensors was made for another model: it changes 96 x 64 numbers of {QUERY}.weight, which has 96 x 96 "
        "here; use a LoRA made for this model",
    ),
    "a missing factor": (
        {f"{QUERY}.lora_up.weight": torch.ones(96, 2)},
        f"a.safetensors lacks {QUERY}.lora_down.weight; the download may be incomplete",
    ),
    "the other missing factor": (
        {f"{QUERY}.lora_A.weight": torch.ones(2, 96)},
        f"a.safetensors lacks {QUERY}.lora_B.weight; the download may be incomplete",
    ),
    "a missing factor of LoHa": (
        {f"{QUERY}.hada_w1_a": torch.ones(96, 2), f"{QUERY}.hada_w1_b": torch.ones(2, 96)},
        f"a.safetensors lacks {QUERY}.hada_w2_a; the download may be incomplete",
    ),
    "a missing factor of LoKr": (
        {f"{QUERY}.lokr_w1": torch.ones(2, 2), f"{QUERY}.lokr_w2_b": torch.ones(2, 48)},
        f"a.safetensors lacks {QUERY}.lokr_w2_a; the download may be incomplete",
    ),
    "factors of different ranks": (
        {f"{QUERY}.lora_A.weight": torch.ones(2, 96), f"{QUERY}.lora_B.weight": torch.ones(96, 3)},
        f"a.safetensors is damaged at {QUERY}: its factors of shapes (96, 3) and (2, 96) do not fit each other; "
        "download it again",
    ),
    "a core of another rank": (
        {
            **pair(QUERY),
            f"{QUERY}.lora_down.weight": torch.ones(2, 96),
            f"{QUERY}.lora_mid.weight": torch.ones(3, 3, 1, 1),
        },
        f"a.safetensors is damaged at {QUERY}: its factors of shapes (96, 2) and (2, 96) and (3, 3, 1, 1) do not fit "
        "each other; download it again",
    ),
    "products of different shapes": (
        {
            **{f"{QUERY}.hada_w{k}_a": torch.ones(96, 2) for k in (1, 2)},
            **{f"{QUERY}.hada_w{k}_b": torch.ones(2, 96 // k) for k in (1, 2)},
        },
        f"a.safetensors is damaged at {QUERY}: its two products, (96, 96) and (96, 48), are of different shapes; "
        "download it again",
    ),
    "a number that is none": (
        {**pair(QUERY), f"{QUERY}.lora_B.weight": torch.full((96, 2), torch.nan)},
        f"a.safetensors holds numbers at {QUERY} that are not finite; it is damaged, or its training failed",
    ),
    "an alpha that is none": (
        {**pair(QUERY), f"{QUERY}.alpha": torch.tensor(torch.inf)},
        f"a.safetensors holds numbers at {QUERY} that are not finite; it is damaged, or its training failed",
    ),
    "a rank of 0": (
        {f"{QUERY}.lora_A.weight": torch.ones(0, 96), f"{QUERY}.lora_B.weight": torch.ones(96, 0)},
        f"a.safetensors is damaged at {QUERY}: its factors of shapes (96, 0) and (0, 96) do not fit each other; "
        "download it again",
    ),
    "a row for a factor": (
        {**pair(QUERY), f"{QUERY}.lora_A.weight": torch.ones(96)},
        f"a.safetensors is damaged at {QUERY}: its lora_A.weight has shape (96,); download it again",
    ),
    "a number for a factor": (
        {**pair(QUERY), f"{QUERY}.lora_A.weight": torch.ones(())},
        f"a.safetensors is damaged at {QUERY}: its lora_A.weight has shape (); download it again",
    ),
    "a row for a core": (
        {**pair(QUERY), f"{QUERY}.lora_mid.weight": torch.ones(2)},
        f"a.safetensors is damaged at {QUERY}: its lora_mid.weight has shape (2,); download it again",
    ),
    "a number for a difference": (
        {f"{QUERY}.diff": torch.ones(())},
        f"a.safetensors is damaged at {QUERY}: its diff has shape (); download it again",
    ),
    "no alpha": (
        {**pair(QUERY), f"{QUERY}.alpha": torch.ones(0)},
        f"a.safetensors is damaged at {QUERY}: its alpha has shape (0,); download it again",
    ),
    "lengths that are none": (
        {**pair(QUERY), f"{QUERY}.dora_scale": torch.full((96, 1), torch.nan)},
        f"a.safetensors holds numbers at {QUERY} that are not finite; it is damaged, or its training failed",
    ),
    "lengths of no axis": (
        {**pair(QUERY), f"{QUERY}.dora_scale": torch.ones(5, 1)},
        f"a.safetensors is damaged at {QUERY}: its 5 lengths are of no axis of (96, 96); download it again",
    ),
    "a bias that is not there": (
        {f"{QUERY}.diff_b": torch.ones(96)},
        f"a.safetensors changes {QUERY}.bias, which this model does not have; use a LoRA made for this model",
    ),
    "no LoRA": (
        {"proj_out.weight": torch.ones(2)},
        "a.safetensors is a file of unknown kind (its first tensor is proj_out.weight); give a LoRA",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named_in_a_sentence(tmp_path: Path, case: str) -> None:
    tensors, message = REFUSED[case]
    save(tensors, path := tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_merges([(path, 1.0)], CONFIG, GEMMA)
    assert str(caught.value) == message


@pytest.mark.parametrize("case", [name for name, (_, message) in REFUSED.items() if f"at {QUERY}" in message])
@pytest.mark.parametrize("read", [describe_file, lora_in_diffusers_layout])
def test_what_is_damaged_is_named_by_every_reader(tmp_path: Path, case: str, read: Callable[[Path], object]) -> None:
    tensors, message = REFUSED[case]
    save(tensors, path := tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(caught.value) == message


def test_a_lora_in_float8_is_read(tmp_path: Path) -> None:
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in pair(QUERY).items()}
    merges, _ = read_merges([(save(small, tmp_path / "a.safetensors"), 1.0)], CONFIG, GEMMA)
    assert [*merges] == [f"{QUERY}.weight"]


@pytest.mark.parametrize("read", [read_lora, lora_files])
def test_a_pipe_is_no_lora(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(pipe := tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read(pipe)
    message = "a.safetensors cannot be opened (it is a pipe, a socket or a device); give the file of a LoRA"
    assert str(caught.value) == message


def test_a_small_file_that_unfolds_is_refused(tmp_path: Path) -> None:
    """A Kronecker product of two columns is as long as both multiplied."""
    parts = {f"{QUERY}.lokr_w{k}": torch.ones(30000, 1) for k in (1, 2)}
    with pytest.raises(CheckpointError) as caught:
        lora_in_diffusers_layout(save(parts, tmp_path / "a.safetensors"))
    assert str(caught.value) == (
        f"a.safetensors unfolds to 900000000 x 1 numbers at {QUERY}.weight, and no layer of SANA has so many; use the "
        "original file"
    )


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_is_a_finite_number(tmp_path: Path, strength: float) -> None:
    path = save(pair(QUERY), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"the strength of .*a.safetensors is {strength}; it must be a finite number"):
        read_merges([(path, strength)], CONFIG, None)


@pytest.mark.parametrize(
    "given",
    ["a.safetensors", ("a.safetensors",), ("a.safetensors", None), ("a.safetensors", "x"), (None, 1.0), ("a", 1.0, 2)],
)
def test_what_is_no_pair_of_a_file_and_a_strength(given: object) -> None:
    with pytest.raises(ValueError) as caught:
        read_merges([given], CONFIG, None)
    assert str(caught.value) == (
        f"a LoRA is given as {given!r}; give its file and a strength, such as ('style.safetensors', 1.0)"
    )


@pytest.mark.parametrize("read", [read_lora, lora_files])
def test_a_lora_that_is_not_there(tmp_path: Path, read: object) -> None:
    with pytest.raises(FileNotFoundError, match="style.safetensors does not exist; give the file of a LoRA"):
        read(tmp_path / "style.safetensors")


# Files and folders


def test_the_folder_that_peft_writes_is_a_lora(tmp_path: Path) -> None:
    network, before = adapted(CONFIG, KINDS["LoRA"])
    path = save_as_peft(network, tmp_path / "style")
    assert read_lora(path.parent).name == "style"
    alone, folder = (merged_network(before, (place, 1.0)).state_dict() for place in (path, path.parent))
    assert all(torch.equal(folder[name], tensor) for name, tensor in alone.items())
    assert {file.name for file in lora_files(path)} == {"adapter_model.safetensors", "adapter_config.json"}
    assert {*lora_files(path)} == {*lora_files(path.parent)}
    other = save(load_file(path), tmp_path / "style" / "other.safetensors")
    assert lora_files(other) == [other]


def test_without_a_lora_nothing_is_made_of_weights() -> None:
    assert read_merges([], replace(CONFIG, depth=1), GEMMA) == ({}, {})
