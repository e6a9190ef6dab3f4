"""Networks out of files: every layout SANA is passed around in, and what is refused and how."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sana import CheckpointError, load_autoencoder, load_transformer
from sana.checkpoints.autoencoder import autoencoder_tensors, detect_autoencoder
from sana.checkpoints.files import TensorFile, read_tensors
from sana.checkpoints.filling import check_tensors
from sana.checkpoints.kinds import describe
from sana.checkpoints.names import with_convolutions
from sana.checkpoints.transformer import build_transformer, find_transformer
from sana.config import AutoencoderConfig
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.transformer import SanaTransformer
from tests.sana.dialects import early_diffusers_transformer, official_transformer, original_autoencoder, padded
from tests.sana.measures import mapped_bytes, peak_bytes, relative_error
from tests.sana.twins import (
    FAMILIES,
    STRUCTURES,
    TEXT_WIDTH,
    as_linear,
    autoencoder_pair,
    diffusers_autoencoder,
    diffusers_transformer,
    randomise,
    tiny_autoencoder_config,
    tiny_config,
)

Tensors = dict[str, Tensor]
HEADS = {"num_cross_attention_heads": 2}  # what a config.json beside so small a network has to say
FILE = Path("model.safetensors")
ADVICE = "give a SANA transformer, such as Efficient-Large-Model/Sana_1600M_1024px_BF16"
VAE_ADVICE = "give a DC-AE, such as dc-ae-f32c32-sana-1.1 from mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"


def write(folder: Path, tensors: Tensors, name: str = "model.safetensors", config: object = HEADS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / name
    save_file({key: t.contiguous() for key, t in tensors.items()}, path) if name.endswith("rs") else torch.save(
        tensors, path
    )
    return path


def assert_loads(path: Path, diffusers: Tensors) -> None:
    """As a transformer, to the bit."""
    found, expected = load_transformer(path).state_dict(), as_linear(diffusers)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


# Layouts


@pytest.mark.parametrize(
    "other", ["svdq-int4_r32-sana1.6b", "diffusion_pytorch_model.int4", "diffusion_pytorch_model_int4"]
)
def test_an_int4_file_beside_the_shards_is_left_alone(tmp_path: Path, diffusers: Tensors, other: str) -> None:
    """As in the official BF16 folder, which also holds a copy in bfloat16."""
    names = sorted(diffusers)
    for index in (0, 1):
        shard = {name: diffusers[name] for name in names[index::2]}
        write(tmp_path, shard, f"diffusion_pytorch_model-0000{index + 1}-of-00002.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in diffusers.items()}
    write(tmp_path, half, "diffusion_pytorch_model.bf16.safetensors")
    int4 = {"transformer_blocks.0.ff.inverted_conv.qweight": torch.zeros(8, 8, dtype=torch.int8)}
    alone = write(tmp_path, int4, f"{other}.safetensors")
    assert_loads(tmp_path, diffusers)
    message = f"{alone.name} is a SANA transformer quantised by SVDQuant, which only nunchaku reads; {ADVICE}"
    assert refusal(lambda: load_transformer(alone)) == message


def test_a_padded_mix_ffn_gives_the_same_velocity(tmp_path: Path, diffusers: Tensors) -> None:
    inputs = torch.randn(2, 32, 3, 5), torch.tensor([999.0, 20.0]), torch.randn(2, 7, TEXT_WIDTH)
    plain = load_transformer(write(tmp_path / "plain", diffusers))
    wider = load_transformer(write(tmp_path / "wider", padded(diffusers, 256)))
    assert (plain.config.ff_width, wider.config.ff_width) == (240, 256)
    with torch.no_grad():
        assert relative_error(wider(*inputs), plain(*inputs)) <= 1e-6


@pytest.mark.parametrize("variant", STRUCTURES)
def test_what_diffusers_saves_gives_the_same_velocity(tmp_path: Path, variant: str) -> None:
    """Also after it was written in the official layout and read again."""
    theirs = randomise(diffusers_transformer(config := tiny_config(variant)))
    theirs.save_pretrained(tmp_path / "transformer")
    official = official_transformer(dict(theirs.state_dict()), positions=(config.position_base or 32) ** 2)
    write(tmp_path / "official", {"state_dict": official}, "model.pth")
    x, text = torch.randn(2, 32, 3, 5), torch.randn(2, 7, TEXT_WIDTH)
    time = torch.rand(2) if config.continuous_time else torch.tensor([999.0, 20.0])
    guidance = torch.rand(2) if config.guidance_embed else None
    expected = theirs(x, text, time, guidance=guidance).sample
    for path in (tmp_path, tmp_path / "transformer", tmp_path / "official" / "model.pth"):
        network = load_transformer(path)
        assert network.config == config
        assert relative_error(network(x, time, text, None, guidance), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_diffusers_saves_gives_the_same_picture(tmp_path: Path, family: str) -> None:
    ours, theirs = autoencoder_pair(config := tiny_autoencoder_config(family, depth=1))
    theirs.save_pretrained(tmp_path / "vae")
    write(tmp_path / "original", original_autoencoder(dict(theirs.state_dict()), config), config={})
    ae_latent = torch.randn(1, config.latent_channels, 1, 2)
    expected = ours.decode(ae_latent)
    for path in (tmp_path, tmp_path / "vae", tmp_path / "original" / "model.safetensors"):
        network = load_autoencoder(path)
        assert (network.config.encoder, network.config.decoder) == (config.encoder, config.decoder)
        torch.testing.assert_close(network.decode(ae_latent), expected, rtol=0, atol=0)
    assert load_autoencoder(tmp_path).config == config  # with the latent scale of its config.json


def test_a_sharded_folder(tmp_path: Path, diffusers: Tensors) -> None:
    theirs = diffusers_transformer(tiny_config("sana-0.6b-1024px"))
    theirs.load_state_dict(diffusers)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="500KB")
    shards = sorted((tmp_path / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    assert_loads(tmp_path, diffusers)
    message = f"{shards[1].name} is one of {len(shards)} shards; give the folder that holds all of them"
    assert refusal(lambda: load_transformer(shards[1])) == message
    shards[1].unlink()
    message = f"{tmp_path / 'transformer'} holds {len(shards) - 1} of {len(shards)} shards; download the missing ones"
    assert refusal(lambda: load_transformer(tmp_path)) == message


def one_trainer(tensors: Tensors) -> Tensors:
    """A single file in diffusers' names."""
    return tensors


def simple_tuner(tensors: Tensors) -> Tensors:
    """The names of diffusers before its SANA classes were merged."""
    return early_diffusers_transformer(tensors)


def unmarked(tensors: Tensors) -> Tensors:
    """Without the buffers and the tensors that only training needs."""
    dropped = ("pos_embed", "y_embedder.y_embedding")
    return {name: tensor for name, tensor in official_transformer(tensors).items() if name not in dropped}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "net."])
@pytest.mark.parametrize("layout", [one_trainer, simple_tuner, official_transformer, unmarked])
def test_a_single_file_in_any_layout(
    tmp_path: Path, diffusers: Tensors, layout: Callable[[Tensors], Tensors], prefix: str
) -> None:
    tensors = {prefix + name: tensor for name, tensor in layout(diffusers).items()}
    assert_loads(write(tmp_path, tensors), diffusers)


@pytest.mark.parametrize("wrapper", ["state_dict", "state_dict_ema", "model"])
def test_an_official_pytorch_file(tmp_path: Path, diffusers: Tensors, wrapper: str) -> None:
    content = {wrapper: official_transformer(diffusers), "epoch": 1, "optimizer": {"state": {}}}
    assert_loads(write(tmp_path, content, "Sana.pth"), diffusers)


def test_a_checkpoint_with_all_three_networks(tmp_path: Path, diffusers: Tensors) -> None:
    config = tiny_autoencoder_config("dc-ae-f32c32-sana-1.1", depth=1)
    autoencoder = dict(randomise(diffusers_autoencoder(config)).state_dict())
    tensors = {"model.diffusion_model." + name: tensor for name, tensor in official_transformer(diffusers).items()}
    tensors |= {"vae." + name: tensor for name, tensor in original_autoencoder(autoencoder, config).items()}
    tensors["text_encoders.gemma2_2b.transformer.model.norm.weight"] = torch.ones(2304)
    path = write(tmp_path, tensors)
    assert_loads(path, diffusers)
    network = load_autoencoder(path)
    assert network.config.decoder == config.decoder
    assert torch.equal(network.state_dict()["decoder.conv_in.weight"], autoencoder["decoder.conv_in.weight"])


def test_loading_takes_one_copy_at_most(tmp_path: Path, diffusers: Tensors) -> None:
    """In another dtype, of the weights alone; in the file's, none."""
    path = write(tmp_path, {name: tensor.half() for name, tensor in official_transformer(diffusers).items()})
    weights = sum(tensor.numel() for tensor in diffusers.values())
    found = find_transformer(read_tensors(path))
    _, peak = peak_bytes(lambda: build_transformer(found))
    assert 4 * weights <= peak < 1.02 * 4 * weights
    network = load_transformer(path, dtype=None)
    assert network.dtype == torch.float16
    assert mapped_bytes(network.parameters(), path) == 2 * weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_weights(tmp_path: Path, diffusers: Tensors, dtype: torch.dtype) -> None:
    path = write(tmp_path, {name: tensor.bfloat16() for name, tensor in diffusers.items()})
    network = load_transformer(path, dtype=dtype)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert load_transformer(path, dtype=None).dtype == torch.bfloat16


# Wrong files


def names(*keys: str) -> Tensors:
    return {key: torch.ones(2, 2) for key in keys}


OTHERS = {
    "a LoRA": (
        "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight",
    ),
    "a LoRA ": ("lora_transformer_transformer_blocks_0_attn1_to_q.lora_down.weight",),
    "a Stable Diffusion model": (
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.decoder.up.0.block.0.conv1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1.weight",
    ),
    "a Stable Diffusion 3 model": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",),
    "a Flux model": ("double_blocks.0.img_attn.qkv.weight",),
    "a part of ACE-Step, which makes music": (
        "lyric_embs.weight",
        "transformer_blocks.0.ff.inverted_conv.conv.weight",
    ),
    "a part of ACE-Step, which makes music ": (
        "dcae.encoder.down_blocks.1.0.conv1.weight",
        "vocoder.backbone.channel_layers.0.0.bias",
    ),
    "a SANA transformer quantised by SVDQuant, which only nunchaku reads": (
        "patch_embed.proj.weight",
        "transformer_blocks.0.attn.qkv_proj.lora_down",
        "transformer_blocks.0.attn.qkv_proj.qweight",
        "transformer_blocks.0.ff.inverted_conv.qweight",
        "transformer_blocks.0.ff.inverted_conv.wscales",
    ),
    "a model quantised by quanto": (
        "patch_embed.proj.weight",
        "transformer_blocks.0.ff.conv_inverted.weight",
        "transformer_blocks.0.attn1.to_q.weight._data",
        "transformer_blocks.0.attn1.to_q.weight._scale",
    ),
    "a SANA transformer with an adapter of PEFT that is not merged": (
        "transformer_blocks.0.attn1.to_q.base_layer.weight",
        "transformer_blocks.0.attn1.to_q.lora_A.default.weight",
        "transformer_blocks.0.ff.conv_inverted.weight",
    ),
    "SANA-Video, which makes videos and runs in diffusers": (
        "patch_embedding.weight",
        "transformer_blocks.0.ff.conv_inverted.weight",
        "transformer_blocks.0.ff.conv_temp.weight",
    ),
    "SANA-Video, which makes videos and runs in diffusers ": (
        "module.blocks.0.mlp.inverted_conv.conv.weight",
        "module.blocks.0.mlp.t_conv.weight",
    ),
    "the VAE of another model": ("decoder.up.0.block.0.conv1.weight", "encoder.conv_in.weight"),
    "the VAE of another model ": ("decoder.up_blocks.0.resnets.0.conv1.weight",),
    "a diffusion transformer of another family, such as PixArt": (
        "blocks.0.attn.qkv.weight",
        "y_embedder.y_proj.fc1.weight",
    ),
    "the text encoder of another model": ("text_model.encoder.layers.0.layer_norm1.weight",),
    "the text encoder of another model ": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "a Gemma text encoder": ("model.layers.0.post_feedforward_layernorm.weight",),
    "an adapter of the kind OFT, BOFT or GLoRA, which ComfyUI reads and the shell does not": (
        "lycoris_transformer_blocks_0_attn1_to_q.alpha",
        "lycoris_transformer_blocks_0_attn1_to_q.oft_blocks",
    ),
    "an adapter of the kind OFT, BOFT or GLoRA, which ComfyUI reads and the shell does not ": (
        "lycoris_transformer_blocks_0_attn1_to_q.a1.weight",
        "lycoris_transformer_blocks_0_attn1_to_q.b1.weight",
    ),
    "a ControlNet for another model": (
        "controlnet_blocks.0.weight",
        "transformer_blocks.0.ff.net.0.proj.weight",
    ),
    "a ControlNet for SANA": ("controlnet_blocks.0.weight", "transformer_blocks.0.ff.conv_inverted.weight"),
    "a file of unknown kind (its first tensor is mystery)": ("mystery",),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_named(tmp_path: Path, kind: str) -> None:
    path, kind = write(tmp_path, names(*OTHERS[kind])), kind.strip()
    assert refusal(lambda: load_transformer(path)) == f"{path.name} is {kind}; {ADVICE}"
    assert refusal(lambda: load_autoencoder(path)) == f"{path.name} is {kind}; {VAE_ADVICE}"


def test_parts_of_sana_in_the_place_of_each_other_are_named(tmp_path: Path, diffusers: Tensors) -> None:
    autoencoder = diffusers_autoencoder(tiny_autoencoder_config("dc-ae-f32c32-sana-1.1", depth=1)).state_dict()
    path = write(tmp_path, autoencoder, "ae.safetensors")
    assert refusal(lambda: load_transformer(path)) == f"{path.name} is a DC-AE, the autoencoder of SANA; {ADVICE}"
    official = official_transformer(diffusers)
    linear = {name.replace("_conv.conv", "_conv.linear"): part for name, part in official.items()}
    for tensors in (diffusers, official, linear):
        path = write(tmp_path, tensors, "sana.safetensors")
        assert refusal(partial(load_autoencoder, path)) == f"sana.safetensors is a SANA transformer; {VAE_ADVICE}"


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {})
    assert refusal(lambda: load_transformer(path)) == f"model.safetensors is empty; {ADVICE}"
    assert describe({}) == "empty"


def without(*fragments: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not any(fragment in n for fragment in fragments)}


def with_tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.zeros(shape, dtype=dtype)}


def in_dtype(dtype: torch.dtype, fragment: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t.to(dtype) if fragment in name else t for name, t in tensors.items()}


UNUSABLE = "which this package cannot compute with; use a float32, float16 or bfloat16 file"
CONVERTED = ", which `python -m sana convert --dtype bfloat16` makes of it"
BROKEN = {
    "one missing": (
        without("caption_norm.weight"),
        " lacks 1 of 73 tensors, first caption_norm.weight; the download may be incomplete",
    ),
    "a block missing": (
        without("transformer_blocks.1."),
        " lacks 19 of 73 tensors, first transformer_blocks.1.attn1.to_k.weight; the download may be incomplete",
    ),
    "the first missing": (without("patch_embed"), " lacks patch_embed.proj.weight; the download may be incomplete"),
    "extra": (
        with_tensor("transformer_blocks.0.attn3.to_q.weight", 4, 4),
        " has 1 tensor that does not belong to it, first transformer_blocks.0.attn3.to_q.weight; it is another model",
    ),
    "another shape": (
        with_tensor("transformer_blocks.2.attn2.to_k.weight", 96, 95),
        ": tensor transformer_blocks.2.attn2.to_k.weight has shape (96, 95) instead of (96, 96); "
        "it is another model or was made for another size",
    ),
    "no matrix": (
        with_tensor("patch_embed.proj.weight", 96),
        ": tensor patch_embed.proj.weight has shape (96,) and is no matrix; it is another model",
    ),
    "scales of another quantiser": (
        with_tensor("transformer_blocks.0.attn1.to_q._scale"),
        " is quantised, with transformer_blocks.0.attn1.to_q._scale beside its weights, in a way that is not read here; "
        "take a file that is not",
    ),
    "int8": (
        in_dtype(torch.int8, "transformer_blocks.0.attn2.to_q.weight"),
        f" holds int8 tensors, first transformer_blocks.0.attn2.to_q.weight, {UNUSABLE}",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_transformer_is_named(tmp_path: Path, diffusers: Tensors, case: str) -> None:
    change, message = BROKEN[case]
    path = write(tmp_path, dict(sorted(change(diffusers).items())))
    assert refusal(lambda: load_transformer(path)) == path.name + message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("decoder.norm_out.bias"),
            " lacks 1 of 113 tensors, first decoder.norm_out.bias; the download may be incomplete",
        ),
        (without("decoder.conv_in."), " lacks decoder.conv_in.weight; the download may be incomplete"),
        (without("decoder."), " lacks tensors of decoder.up_blocks; the download may be incomplete"),
        (without("encoder.down_blocks.3."), " lacks tensors of encoder.down_blocks; the download may be incomplete"),
        (
            with_tensor("quant_conv.weight", 4, 4, 1, 1),
            " has 1 tensor that does not belong to it, first quant_conv.weight; it is another model",
        ),
        (
            with_tensor("decoder.norm_out.bias", 4),
            ": tensor decoder.norm_out.bias has shape (4,) instead of (64,); "
            "it is another model or was made for another size",
        ),
        (
            in_dtype(torch.float8_e5m2, "decoder.conv_in.weight"),
            f" holds float8_e5m2 tensors, first decoder.conv_in.weight, {UNUSABLE}{CONVERTED}",
        ),
        (
            in_dtype(torch.int8, "decoder.conv_in.weight"),
            f" holds int8 tensors, first decoder.conv_in.weight, {UNUSABLE}",
        ),
    ],
)
def test_a_broken_autoencoder_is_named(tmp_path: Path, change: Callable[[Tensors], Tensors], message: str) -> None:
    config = tiny_autoencoder_config("dc-ae-lite-f32c32-sana-1.1", depth=1)
    path = write(tmp_path, change(dict(diffusers_autoencoder(config).state_dict())), config={})
    assert refusal(lambda: load_autoencoder(path)) == path.name + message


def load_on_meta(tensors: Tensors) -> None:
    file = TensorFile(FILE, tensors, config=HEADS)
    build_transformer(find_transformer(file), None, "meta")


def check_autoencoder(tensors: Tensors) -> None:
    file = TensorFile(FILE, tensors)
    found = autoencoder_tensors(file)
    check_tensors(expected_tensors(detect_autoencoder(found, file)), found, FILE.name)


@cache
def expected_tensors(config: AutoencoderConfig) -> Tensors:
    return DCAutoencoder(config, device="meta").state_dict()


@pytest.mark.parametrize("layout", [with_convolutions, official_transformer, early_diffusers_transformer])
def test_every_tensor_of_a_transformer_is_needed_in_its_shape(layout: Callable[[Tensors], Tensors]) -> None:
    """Whichever is missing or changed, it is a CheckpointError and not another."""
    config = tiny_config("sana-sprint-0.6b-1024px", depth=1)
    tensors = layout(dict(SanaTransformer(config, device="meta").state_dict()))
    load_on_meta(tensors)
    dropped = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
    for name in tensors.keys() - {*dropped}:
        assert_refused(load_on_meta, tensors, name)


@pytest.mark.parametrize("family", ["dc-ae-f32c32-sana-1.1", "dc-ae-f32c32-in-1.0", "dc-ae-f32c128-1.5"])
def test_every_tensor_of_an_autoencoder_is_needed_in_its_shape(family: str) -> None:
    config = tiny_autoencoder_config(family, depth=1)
    tensors = dict(DCAutoencoder(config, device="meta").state_dict())
    for written in (tensors, original_autoencoder(tensors, config)):
        check_autoencoder(written)
        for name in written:
            assert_refused(check_autoencoder, written, name)


def assert_refused(load: Callable[[Tensors], None], tensors: Tensors, name: str) -> None:
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    for changed in (missing, {**tensors, name: torch.empty(3, 5, 7, device="meta")}):
        message = refusal(lambda changed=changed: load(changed))
        assert message.startswith(FILE.name) and "\n" not in message


def test_a_file_is_left_as_it_was(tmp_path: Path, diffusers: Tensors) -> None:
    path = write(tmp_path, diffusers)
    before = path.read_bytes()
    network = load_transformer(path, dtype=None)
    for parameter in network.parameters():
        parameter.zero_()
    assert path.read_bytes() == before
    assert read_tensors(path).tensors.keys() == diffusers.keys()
