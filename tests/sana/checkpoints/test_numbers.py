"""Numbers that ask for a giant, or for nothing that a network is: one sentence, before anything is built."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sana.checkpoints.autoencoder import detect_autoencoder, load_autoencoder
from sana.checkpoints.controlnet import load_controlnet
from sana.checkpoints.files import CheckpointError, TensorFile
from sana.checkpoints.header import transformer_header
from sana.checkpoints.inspection import describe_file
from sana.checkpoints.numbers import LARGEST, MOST_PARTS, check_transformer, count_parts, number, whole
from sana.checkpoints.text_encoder import gemma_config, gemma_json, load_text_encoder
from sana.checkpoints.transformer import identify_transformer, load_transformer
from sana.config import AUTOENCODERS, VARIANTS, GemmaConfig, TransformerConfig, TransformerIdentity
from tests.sana.released import released
from tests.sana.twins import diffusers_autoencoder, diffusers_transformer, tiny_autoencoder_config, tiny_config

Tensors = dict[str, Tensor]
FILE = Path("model.safetensors")
HEADS = {"num_cross_attention_heads": 2}
GIANTS = ("30000000", "99999999999", "9" * 5000, str(MOST_PARTS), "-1", "1_0", "٣", "x", "")
# What JSON may hold in the place of a size, and in the place of a number.
NO_SIZES = (0, -1, 2**63, 10**400, True, False, "8", 2.0, 1e999, float("nan"), [1], {})
NO_NUMBERS = (0, -1, -0.5, 1e999, -1e999, float("nan"), 10**400, True, "1.5", [1], {})


@pytest.fixture(scope="module")
def transformer() -> Tensors:
    return dict(diffusers_transformer(tiny_config("sana-0.6b-1024px")).state_dict())


@pytest.fixture(scope="module")
def autoencoder() -> Tensors:
    return dict(diffusers_autoencoder(tiny_autoencoder_config("dc-ae-f32c32-sana-1.1", depth=1)).state_dict())


def refusal(call: object, *arguments: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


# Numbers


def test_a_size_is_a_whole_number_within_bounds() -> None:
    for value in (1, 20, LARGEST):
        assert whole({"a": value}, "a", "it") == value
    assert whole({}, "a", "it") is whole({"a": None}, "a", "it") is None
    assert whole({"a": 5}, "a", "it", 5) == 5
    for value in (*NO_SIZES, LARGEST + 1):
        assert refusal(whole, {"a": value}, "a", "it").startswith("it has a ")
    assert refusal(whole, {"a": 6}, "a", "it", 5) == "it has a 6, which no network has; take the original file"
    assert (
        refusal(whole, {"a": 10**400}, "a", "it")
        == f"it has a 1{'0' * 49}..., which no network has; take the original file"
    )


def test_a_number_is_finite_and_above_zero() -> None:
    for value in (1, 0.41407, 1e-8, 1000):
        assert number({"a": value}, "a", "it") == value and type(number({"a": value}, "a", "it")) is float
    assert number({}, "a", "it") is number({"a": None}, "a", "it") is None
    for value in NO_NUMBERS:
        assert refusal(number, {"a": value}, "a", "it").endswith(", which no network has; take the original file")


def test_parts_are_counted_from_zero() -> None:
    assert count_parts([], "blocks", "it") == 0
    assert count_parts(["blocks", "other.5.x", "myblocks.7.x"], "blocks", "it") == 0
    assert count_parts([f"blocks.{i}.x" for i in range(3)], "blocks", "it") == 3
    assert count_parts([f"blocks.{MOST_PARTS - 1}.x"], "blocks", "it") == MOST_PARTS
    for wrong in GIANTS:
        message = f"it has blocks.{wrong[:30]}, and no model goes beyond blocks.255; it is another model"
        assert refusal(count_parts, ["blocks.0.x", f"blocks.{wrong}.x"], "blocks", "it") == message


@pytest.mark.parametrize("name", VARIANTS)
def test_every_release_is_within_the_bounds(name: str) -> None:
    check_transformer(VARIANTS[name].transformer, name)


@pytest.mark.parametrize(
    "change",
    [
        *({"depth": 0}, {"depth": MOST_PARTS + 1}, {"hidden_size": 0}, {"hidden_size": 2**63}, {"ff_width": -1}),
        *({"control_blocks": -1}, {"control_blocks": MOST_PARTS + 1}, {"hidden_size": 33}, {"text_width": LARGEST + 1}),
        *({"position_base": 0}, {"position_interpolation": 0.0}, {"position_interpolation": float("inf")}),
    ],
    ids=str,
)
def test_a_transformer_that_cannot_be(change: dict[str, object]) -> None:
    refusal(check_transformer, TransformerConfig(**change), "it")


# Blocks and stages in every kind of file


@pytest.mark.parametrize("giant", GIANTS[:3], ids=len)
def test_no_number_of_a_block_asks_for_a_giant(
    tmp_path: Path, transformer: Tensors, autoencoder: Tensors, giant: str
) -> None:
    one = torch.ones(1)
    for tensors, name, load in (
        (transformer, f"transformer_blocks.{giant}.scale_shift_table", load_transformer),
        (autoencoder, f"encoder.down_blocks.{giant}.0.conv1.weight", load_autoencoder),
        (autoencoder, f"decoder.up_blocks.{giant}.0.conv1.weight", load_autoencoder),
        (
            {**transformer, "controlnet_blocks.0.weight": one},
            f"transformer_blocks.{giant}.scale_shift_table",
            load_controlnet,
        ),
    ):
        save_file({**tensors, name: one.clone()}, path := tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(HEADS))
        root = name.split(f".{giant}")[0]
        assert refusal(load, path).startswith(
            f"model.safetensors has {root}.{giant[:30]}, and no model goes beyond {root}."
        )
        if load is not load_controlnet:
            refusal(describe_file, path)


def test_the_header_of_207_bytes(tmp_path: Path) -> None:
    names = ("encoder.down_blocks.30000000.0.conv1.weight", "encoder.down_blocks.1.0.conv1.weight")
    save_file({name: torch.ones(1) for name in names}, path := tmp_path / "a.safetensors")
    assert refusal(load_autoencoder, path) == (
        "a.safetensors has encoder.down_blocks.30000000, and no model goes beyond encoder.down_blocks.15; it is another model"
    )


def test_a_thousand_control_blocks(tmp_path: Path, transformer: Tensors) -> None:
    many = {f"controlnet_blocks.{i}.weight": torch.ones(1) for i in range(1000)}
    save_file({**transformer, **many}, path := tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HEADS))
    assert (
        refusal(load_controlnet, path)
        == "a.safetensors has control_blocks 1000, which no network has; take the original file"
    )


def test_an_axis_without_numbers_tells_no_size(transformer: Tensors, autoencoder: Tensors) -> None:
    """It takes no room in a file, so the other axis may be of any length."""
    wide = {**transformer, "patch_embed.proj.weight": torch.ones(0, 2**40, device="meta")}
    assert "hidden_size 0" in refusal(identify_transformer, TensorFile(FILE, wide, config=HEADS))
    wide = {**transformer, "patch_embed.proj.weight": torch.ones(2**40, 0, device="meta")}
    refusal(identify_transformer, TensorFile(FILE, wide, config=HEADS))
    name = "encoder.down_blocks.2.0.conv1.weight"
    for shape in ((2**40, 0, 3, 3), (0, 2**40, 3, 3)):
        wide = {**autoencoder, name: torch.ones(shape, device="meta")}
        assert refusal(detect_autoencoder, wide, TensorFile(FILE, wide)).endswith("it is another model")


def test_an_encoder_needs_a_decoder_of_its_depth(autoencoder: Tensors) -> None:
    shallow = {name: tensor for name, tensor in autoencoder.items() if not name.startswith("decoder.up_blocks.5.")}
    message = "model.safetensors has 6 stages that encode and 5 that decode; it is another model"
    assert refusal(detect_autoencoder, shallow, TensorFile(FILE, shallow)) == message


# Configurations


@pytest.mark.parametrize("value", NO_SIZES, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("key", ["sample_size", "num_cross_attention_heads"])
def test_sizes_beside_a_transformer(transformer: Tensors, key: str, value: object) -> None:
    file = TensorFile(FILE, transformer, config={**HEADS, key: value})
    assert refusal(identify_transformer, file).startswith(f"the config.json of model.safetensors has {key} ")


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("key", ["interpolation_scale", "guidance_scale"])
def test_numbers_beside_a_transformer(transformer: Tensors, key: str, value: object) -> None:
    file = TensorFile(FILE, transformer, config={**HEADS, "sample_size": 32, key: value})
    assert refusal(identify_transformer, file).startswith(f"the config.json of model.safetensors has {key} ")


def test_heads_that_do_not_divide_the_width(transformer: Tensors) -> None:
    file = TensorFile(FILE, transformer, config={"num_cross_attention_heads": 7})
    message = "model.safetensors has width 96, which 7 heads do not divide; take the original file"
    assert refusal(identify_transformer, file) == message


@pytest.mark.parametrize("key", ["flow_shift", "shift"])
def test_numbers_of_a_scheduler(tmp_path: Path, transformer: Tensors, key: str) -> None:
    for name in ("scheduler", "transformer"):
        (tmp_path / name).mkdir()
    file = TensorFile(tmp_path / "transformer", transformer, config=HEADS)
    for value in NO_NUMBERS:
        (path := tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({key: value}))
        assert refusal(identify_transformer, file).startswith(f"{path} has {key} ")
    path.write_text(json.dumps({key: 2.5}))
    assert identify_transformer(file).flow_shift == 2.5


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:20])
def test_the_scale_of_latents(autoencoder: Tensors, value: object) -> None:
    """A scale of infinity drew grey, and one below zero a negative, without a word."""
    message = refusal(detect_autoencoder, autoencoder, TensorFile(FILE, autoencoder, config={"scaling_factor": value}))
    assert message.startswith("the config.json of model.safetensors has scaling_factor ")
    header = {"sana": json.dumps({"latent_scale": value})}
    if type(value) in (int, float):
        message = refusal(detect_autoencoder, autoencoder, TensorFile(FILE, autoencoder, header))
        assert message.startswith("the header of model.safetensors has latent_scale ")


@pytest.mark.parametrize(
    "change",
    [
        *({"depth": 10**9}, {"depth": 0}, {"hidden_size": 2**63}, {"hidden_size": -96}, {"cross_heads": 0}),
        *({"cross_heads": 7}, {"position_base": -1}, {"control_blocks": 10**9}, {"position_interpolation": 1e999}),
        *(
            {"base_size": 0},
            {"base_size": 2**63},
            {"flow_shift": -1},
            {"flow_shift": 1e999},
            {"guidance_scale": float("nan")},
        ),
    ],
    ids=str,
)
def test_numbers_in_our_own_header(transformer: Tensors, change: dict[str, object]) -> None:
    identity = TransformerIdentity(tiny_config("sana-0.6b-1024px"), "custom", 1024, 3.0, "float16", "its header")
    told = json.loads(transformer_header(identity)["sana"])
    assert identify_transformer(TensorFile(FILE, transformer, {"sana": json.dumps(told)})) == identity
    place = told if change.keys() <= told.keys() else told["config"]
    place.update(change)
    assert "model.safetensors has " in refusal(
        identify_transformer, TensorFile(FILE, transformer, {"sana": json.dumps(told)})
    )


def test_a_truth_in_our_header_is_no_size(transformer: Tensors) -> None:
    identity = TransformerIdentity(tiny_config("sana-0.6b-1024px"), "custom", 1024, 3.0, "float16", "its header")
    told = json.loads(transformer_header(identity)["sana"])
    told["config"]["depth"] = True
    found = identify_transformer(TensorFile(FILE, transformer, {"sana": json.dumps(told)}, HEADS))
    assert found.origin != "its header" and found.config.depth == 3


# Gemma


def gemma(layers: int = 2, **config: object) -> TensorFile:
    names = ["norm.weight", *(f"layers.{i}.post_feedforward_layernorm.weight" for i in range(layers))]
    told = {**gemma_json(GemmaConfig(num_hidden_layers=layers)), **config}
    return TensorFile(FILE, {name: torch.ones(2304) for name in names}, config=told)


def test_an_honest_gemma() -> None:
    file = gemma(26)
    assert gemma_config(file.tensors, file) == GemmaConfig()


@pytest.mark.parametrize("value", [*NO_SIZES, LARGEST + 1], ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"])
def test_sizes_of_a_gemma(key: str, value: object) -> None:
    file = gemma(**{key: value})
    message = refusal(gemma_config, file.tensors, file)
    assert message.startswith(f"model.safetensors has {key} ") and message.endswith("take its original config.json")


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize(
    "key",
    ["rms_norm_eps", "rope_theta", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"],
)
def test_numbers_of_a_gemma(key: str, value: object) -> None:
    file = gemma(**{key: value})
    assert refusal(gemma_config, file.tensors, file).startswith(f"model.safetensors has {key} ")


def test_layers_and_heads_of_a_gemma_fit_each_other() -> None:
    file = gemma(num_hidden_layers=10**6)
    message = "model.safetensors has 2 layers, and its configuration tells of 1000000; take its original config.json"
    assert refusal(gemma_config, file.tensors, file) == message
    for change in ({"num_key_value_heads": 3}, {"head_dim": 255}):
        file = gemma(**change)
        assert refusal(gemma_config, file.tensors, file).endswith("which no Gemma-2 has; take its original config.json")
    file = gemma()
    file.tensors["layers.99999999999.mlp.up_proj.weight"] = torch.ones(1)
    assert "has layers.99999999999, and no model goes beyond layers.255" in refusal(gemma_config, file.tensors, file)


@pytest.mark.parametrize("norm", [None, torch.tensor(1.0), torch.ones(2, 2)])
def test_a_gemma_without_its_last_norm(tmp_path: Path, norm: Tensor | None) -> None:
    tensors = {**gemma().tensors, "norm.weight": norm}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, path := tmp_path / "gemma.safetensors")
    message = "gemma.safetensors lacks norm.weight, or it is no row; the download may be incomplete"
    assert refusal(load_text_encoder, path) == message


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_released_autoencoder_is_within_the_bounds(name: str) -> None:
    config = AUTOENCODERS[name]
    assert max(stage.depth for stage in (*config.encoder, *config.decoder)) <= MOST_PARTS
    if name in ("dc-ae-f32c32-sana-1.1", "dc-ae-f32c32-in-1.0"):
        tensors = released("autoencoders", "diffusers", name).tensors
        assert detect_autoencoder(tensors, TensorFile(FILE, tensors)).encoder == config.encoder
