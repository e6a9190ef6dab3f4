"""LoRAs of every trainer through the host's own loaders, and its own trainer on our model."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace

import comfy.lora
import comfy.utils
import peft
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from diffusers import SanaPipeline
from diffusers.training_utils import _collate_lora_metadata
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sana
from sana.training.adapters import (
    PRODUCTS,
    AdapterConfig,
    add_adapter,
    add_text_adapter,
    lora_header,
    lora_tensors,
)
from tests.host.inprocess.small import (
    DEMO,
    EQUAL,
    OTHER_PROMPT,
    PROMPT,
    Small,
    difference,
    load,
    picture,
    pipeline_latent,
)
from tests.sana.adapted import TRAINERS
from tests.sana.twins import diffusers_transformer

RANK, ALPHA, STRENGTH = 2, 4.0, 0.5
CONVOLUTIONS = (  # 1x1, in files
    "patch_embed.proj",
    "transformer_blocks.1.ff.conv_inverted",
    "transformer_blocks.2.ff.conv_point",
)
LAYERS = (
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.attn2.to_k",
    "transformer_blocks.1.attn1.to_out.0",
    *CONVOLUTIONS,
)
CHANGED = 1e-2
PART = "gemma2_2b.transformer.model.layers.0.self_attn.v_proj"
# What the host and OneTrainer call it.
TEXT_LAYERS = (f"text_encoders.{PART}", "text_encoder.layers.0.self_attn.v_proj", "lora_te1_layers_0_self_attn_v_proj")


def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A small and a large matrix, shaped as those of a 1x1 convolution."""
    down, up = torch.randn(RANK, weight.shape[1], 1, 1), torch.randn(weight.shape[0], RANK, 1, 1)
    return down / weight.shape[1] ** 0.5, up / RANK**0.5


def dora(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The lengths that DoRA gives the rows of the changed weight (arXiv 2402.09353, equation 5)."""
    down, up = factors(weight)
    scale = weight.norm(dim=1, keepdim=True) * torch.linspace(0.5, 1.5, len(weight))[:, None]
    changed = weight + up.flatten(1) @ down.flatten(1)
    changed = changed * scale / changed.norm(dim=1, keepdim=True)
    return {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale[..., None, None]}, changed


def difference_of(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    change = torch.randn_like(weight) / 10
    return {"diff": change[..., None, None]}, weight + change


def replacement(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    changed = torch.randn_like(weight) / 10
    return {"set_weight": changed[..., None, None]}, changed


def lokr(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    left, right = torch.randn(2, 2) / 4, torch.randn(weight.shape[0] // 2, weight.shape[1] // 2, 1, 1) / 8
    return {"lokr_w1": left, "lokr_w2": right}, weight + torch.kron(left, right.flatten(1))


def tucker(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A LoCon with a third factor between the two, which stays a convolution."""
    down, up = factors(weight)
    core = torch.randn(RANK, RANK, 1, 1)
    changed = weight + up.flatten(1) @ core.flatten(1) @ down.flatten(1)
    return {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": core}, changed


# What files hold for one convolution, and what becomes of its weight.
CHANGES = {"DoRA": dora, "difference": difference_of, "replacement": replacement, "LoKr": lokr, "Tucker": tucker}


@pytest.fixture(scope="module")
def weights(small: Small) -> dict[str, Tensor]:
    """The model's tensors as its file has them."""
    return load_file(small.path)


@pytest.fixture(scope="module")
def matrices(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A small and a large matrix for each layer, shaped as its weight is in the file."""
    torch.manual_seed(0)
    found = {}
    for path in LAYERS:
        out, inside, *kernel = weights[f"{path}.weight"].shape
        down, up = torch.randn(RANK, inside, *kernel), torch.randn(out, RANK, *kernel)
        found[path] = (down / inside**0.5, up / RANK**0.5)
    return found


def write_lora(small: Small, name: str, tensors: dict[str, Tensor]) -> str:
    folder = small.host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return f"{name}.safetensors"


def merged(small: Small, weights: dict[str, Tensor], changes: dict[str, Tensor], name: str) -> ModelPatcher:
    """A model whose file has the changes in its weights."""
    tensors = {**weights, **{f"{path}.weight": weights[f"{path}.weight"] + change for path, change in changes.items()}}
    path = small.host.base / "models" / "diffusion_models" / f"{name}.safetensors"
    with safe_open(small.path, framework="pt") as file:
        save_file(tensors, path, file.metadata())
    return load(small.host, path.name)[0]


@pytest.fixture(scope="module")
def expected(
    small: Small, weights: dict[str, Tensor], matrices: dict[str, tuple[Tensor, Tensor]]
) -> Callable[[float], Tensor]:
    """The latent of the merged weights, by strength times scale."""
    known: dict[float, Tensor] = {}

    def sample(scale: float) -> Tensor:
        if scale not in known:
            changes = {
                path: scale * (up.flatten(1) @ down.flatten(1)).view(weights[f"{path}.weight"].shape)
                for path, (down, up) in matrices.items()
            }
            known[scale] = small.sample(model=merged(small, weights, changes, f"merged-{scale}"))
        return known[scale]

    return sample


@pytest.mark.parametrize("trainer", TRAINERS)
def test_lora_acts_as_the_merged_weights(
    small: Small,
    matrices: dict[str, tuple[Tensor, Tensor]],
    expected: Callable[[float], Tensor],
    trainer: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """People could not load LoRAs of SANA (NVlabs/Sana issue 145)."""
    tensors, has_alpha = {}, False
    for path, (down, up) in matrices.items():
        down_name, up_name, alpha = TRAINERS[trainer](path)
        tensors |= {down_name: down, up_name: up}
        if alpha:
            tensors[alpha], has_alpha = torch.tensor(ALPHA), True
    name = write_lora(small, trainer, tensors)
    with caplog.at_level(logging.WARNING):
        (model,) = small.host.call("LoraLoaderModelOnly", model=small.model, lora_name=name, strength_model=STRENGTH)
        inputs = {"model": small.model, "clip": small.clip, "lora_name": name}
        both, clip = small.host.call("LoraLoader", **inputs, strength_model=STRENGTH, strength_clip=1.0)
    assert not [record for record in caplog.records if "not loaded" in record.getMessage()]
    latent = small.sample(model=model)
    assert difference(latent, expected(STRENGTH * (ALPHA / RANK if has_alpha else 1))) <= EQUAL
    assert difference(latent, small.sample()) > CHANGED
    assert torch.equal(small.sample(model=both), latent)
    assert torch.equal(clip.encode_from_tokens(clip.tokenize("a")), small.clip.encode_from_tokens(clip.tokenize("a")))


def test_lora_without_changing_weights(
    small: Small, matrices: dict[str, tuple[Tensor, Tensor]], expected: Callable[[float], Tensor]
) -> None:
    """The host's bypass loader, which runs a LoRA beside the layers."""
    tensors = {}
    for path, (down, up) in matrices.items():
        down_name, up_name, _ = TRAINERS["diffusers"](path)
        tensors |= {down_name: down, up_name: up}
    name = write_lora(small, "bypass", tensors)
    (model,) = small.host.call("LoraLoaderBypassModelOnly", model=small.model, lora_name=name, strength_model=STRENGTH)
    assert difference(small.sample(model=model), expected(STRENGTH)) <= EQUAL


def test_lora_as_a_hook(small: Small, weights: dict[str, Tensor]) -> None:
    """A hook belongs to a condition, and the host patches the weights for it while it samples."""
    tensors, changes = {}, {}
    torch.manual_seed(3)
    for path in CONVOLUTIONS:
        weight = weights[f"{path}.weight"]
        found, expected = CHANGES["DoRA"](weight.flatten(1))
        tensors |= {f"lora_unet_{path.replace('.', '_')}.{part}": tensor for part, tensor in found.items()}
        changes[path] = expected.view(weight.shape) - weight
    name = write_lora(small, "hook", tensors)
    (hooks,) = small.host.call("CreateHookLoraModelOnly", lora_name=name, strength_model=1.0)
    conditions = {"positive_NEW": small.positive, "negative_NEW": small.negative}
    positive, negative = small.host.call(
        "PairConditioningSetProperties", **conditions, strength=1.0, set_cond_area="default", hooks=hooks
    )
    latent = small.ksampler(positive=positive, negative=negative)
    assert difference(latent, small.ksampler(model=merged(small, weights, changes, "merged-hook"))) <= EQUAL
    assert difference(latent, small.ksampler()) > CHANGED


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("path", CONVOLUTIONS)
def test_every_change_of_a_convolution(
    small: Small, weights: dict[str, Tensor], path: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    weight = weights[f"{path}.weight"].flatten(1)
    torch.manual_seed(2)
    tensors, expected = CHANGES[kind](weight)
    flat = "lora_unet_" + path.replace(".", "_")
    name = write_lora(small, "change", {f"{flat}.{part}": tensor for part, tensor in tensors.items()})
    (model,) = small.host.call("LoraLoaderModelOnly", model=small.model, lora_name=name, strength_model=1.0)
    key = f"diffusion_model.{path}.weight"
    with caplog.at_level(logging.WARNING):
        found = comfy.lora.calculate_weight(model.patches[key], weight.clone(), key)
    assert difference(found, expected) <= 1e-5 and difference(found, weight) > CHANGED
    assert not caplog.messages


def test_lokr_of_lycoris(small: Small, weights: dict[str, Tensor]) -> None:
    path = LAYERS[0]
    torch.manual_seed(1)
    left, right = torch.randn(2, 2) / 4, torch.randn(48, 48) / 8
    flat = "lycoris_" + path.replace(".", "_")
    name = write_lora(small, "lokr", {f"{flat}.lokr_w1": left, f"{flat}.lokr_w2": right})
    (model,) = small.host.call("LoraLoaderModelOnly", model=small.model, lora_name=name, strength_model=1.0)
    changed = merged(small, weights, {path: torch.kron(left, right)}, "merged-lokr")
    assert difference(small.sample(model=model), small.sample(model=changed)) <= EQUAL


@pytest.mark.parametrize(
    "shapes",
    [
        {"oft_blocks": (4, 24, 24)},
        {"oft_blocks": (2, 4, 24, 24)},
        {"a1.weight": (96, 2), "a2.weight": (2, 96), "b1.weight": (96, 2), "b2.weight": (2, 96)},
    ],
    ids=["OFT", "BOFT", "GLoRA"],
)
def test_kinds_that_the_host_alone_computes(small: Small, shapes: dict[str, tuple[int, ...]]) -> None:
    torch.manual_seed(1)
    layer = "lycoris_" + LAYERS[0].replace(".", "_")
    tensors = {f"{layer}.{part}": torch.randn(shape) / 4 for part, shape in shapes.items()}
    name = write_lora(small, "other-kind", {**tensors, f"{layer}.alpha": torch.tensor(2.0)})
    (model,) = small.host.call("LoraLoaderModelOnly", model=small.model, lora_name=name, strength_model=1.0)
    assert {*model.patches} == {f"diffusion_model.{LAYERS[0]}.weight"}
    assert difference(small.sample(model=model), small.sample()) > CHANGED


@pytest.mark.parametrize("node", ["LoraLoader", "LoraLoaderBypass"])
@pytest.mark.parametrize("layer", TEXT_LAYERS)
def test_lora_of_the_text_encoder(small: Small, node: str, layer: str) -> None:
    """Also with the instruction, whose keys and values are kept from one prompt to the next."""
    weight = small.clip.cond_stage_model.state_dict()[f"{PART}.weight"]
    torch.manual_seed(0)
    down, up = torch.randn(RANK, weight.shape[1]) / 4, torch.randn(weight.shape[0], RANK) / 4
    names = (f"{layer}.lora_down.weight", f"{layer}.lora_up.weight")
    name = write_lora(small, "text", dict(zip(names, (down, up), strict=True)))
    before = small.encode("a red circle")[0][0]
    inputs = {"model": small.model, "clip": small.clip, "lora_name": name}
    _, clip = small.host.call(node, **inputs, strength_model=1.0, strength_clip=1.0)
    ours = replace(small, clip=clip).encode("a red circle")[0][0]
    encoder = sana.load_text_encoder(DEMO)
    layer = encoder.model.layers[0].self_attn.v_proj
    layer.weight.data = layer.weight + up @ down
    theirs, _ = encoder(["a red circle"])
    assert difference(ours, theirs) <= EQUAL
    assert difference(ours, before) > CHANGED
    assert torch.equal(small.encode("a red circle")[0][0], before)


@pytest.mark.parametrize("kind", ["LoRA", *CHANGES])
def test_the_standalone_pipeline_draws_the_same_with_a_lora(
    small: Small, weights: dict[str, Tensor], matrices: dict[str, tuple[Tensor, Tensor]], kind: str
) -> None:
    """One file for the transformer and the text encoder, at a strength below 1."""
    torch.manual_seed(4)
    tensors = {}
    for path in CONVOLUTIONS:
        down, up = matrices[path]
        found = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}
        found = found if kind == "LoRA" else CHANGES[kind](weights[f"{path}.weight"].flatten(1))[0]
        tensors |= {f"lora_unet_{path.replace('.', '_')}.{part}": tensor for part, tensor in found.items()}
    text = "lora_te1_layers_0_self_attn_v_proj"
    rows, columns = small.clip.cond_stage_model.state_dict()[f"{PART}.weight"].shape
    tensors |= {f"{text}.lora_down.weight": torch.randn(RANK, columns) / 4}
    tensors |= {f"{text}.lora_up.weight": torch.randn(rows, RANK) / 4}
    name = write_lora(small, "both", tensors)
    inputs = {"model": small.model, "clip": small.clip, "lora_name": name}
    model, clip = small.host.call("LoraLoader", **inputs, strength_model=STRENGTH, strength_clip=STRENGTH)
    latent = replace(small, model=model, clip=clip).sample()
    loras = [(small.host.base / "models" / "loras" / name, STRENGTH)]
    pipeline = sana.SanaPipeline.load(small.path, autoencoder=DEMO, text_encoder=DEMO, loras=loras)
    found = pipeline_latent(pipeline, PROMPT, negative=OTHER_PROMPT)
    assert difference(found, latent) <= EQUAL
    assert difference(found, pipeline_latent(small.pipeline, PROMPT, negative=OTHER_PROMPT)) > CHANGED


@pytest.mark.cpu
def test_lora_that_the_host_trains_loads_again(small: Small) -> None:
    (lora, losses, steps) = train(small)
    assert steps == 2 and len(losses["loss"]) == 2 and all(torch.tensor(losses["loss"]).isfinite())
    assert any(bool(tensor.any()) for name, tensor in lora.items() if "lora_up" in name)
    small.host.call("SaveLoRA", lora=lora, prefix="loras/trained", steps=steps)
    (saved,) = (small.host.base / "output" / "loras").glob("trained_*")
    name = write_lora(small, "trained", load_file(saved))
    (model,) = small.host.call("LoraLoaderModelOnly", model=small.model, lora_name=name, strength_model=1.0)
    layers = {key.rsplit(".lora_up", 1)[0] for key in lora if ".lora_up" in key}
    assert len(layers) > 20 and len([key for key in model.patches if key.endswith(".weight")]) >= len(layers)
    assert 0 < difference(small.sample(model=model), small.sample()) < float("inf")


def train(small: Small) -> tuple[dict[str, Tensor], dict[str, list[float]], int]:
    """Two steps of the host's trainer, which takes every input as a list; those not named are its defaults."""
    node = small.host.nodes["TrainLoraNode"]
    given = {
        name: entry[1]["default"] for name, entry in node.INPUT_TYPES()["required"].items() if "default" in entry[1]
    }
    given |= {
        "model": small.model,
        "latents": {"samples": small.vae.encode(picture())},
        "steps": 2,
        "rank": RANK,
    }
    given |= {"training_dtype": "fp32", "lora_dtype": "fp32", "learning_rate": 0.01, "existing_lora": "[None]"}
    inputs = {name: [value] for name, value in given.items()} | {"positive": [small.positive]}
    return small.host.call("TrainLoraNode", **inputs)


ADAPTERS = {
    "diffusers": ({"r": 4, "lora_alpha": 16}, {}),
    "single layers": ({"r": 4, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {"to_k": 2}}, {}),
    "DoRA": ({"r": 4, "lora_alpha": 8, "use_dora": True}, {}),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("beside", [False, True], ids=["header", "adapter_config.json"])
def test_an_adapter_of_peft_acts_as_peft_merges_it(
    small: Small, weights: dict[str, Tensor], adapter: str, beside: bool
) -> None:
    """Rank and alpha are told outside the tensors, in the header by diffusers and in a file beside them by PEFT."""
    torch.manual_seed(0)
    network = diffusers_transformer(small.model.model.identity.config)
    network.load_state_dict(weights)
    network.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_k", "conv_point"], **ADAPTERS[adapter][0]))
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).abs() / 4 if "magnitude" in name else parameter
            parameter.data = torch.randn_like(parameter) / 10 if "lora_B" in name else parameter
    tensors = peft.utils.get_peft_model_state_dict(network)
    folder = small.host.base / "models" / "loras" / f"{adapter}-{beside}"
    if beside:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {f"base_model.model.{key}": part for key, part in tensors.items()}, folder / "adapter_model.safetensors"
        )
        network.peft_config["default"].save_pretrained(folder)
    else:
        more = _collate_lora_metadata({"transformer": network})
        SanaPipeline.save_lora_weights(folder, transformer_lora_layers=tensors, **more)
    (file,) = folder.glob("*.safetensors")
    name = f"{folder.name}/{file.name}"
    (model,) = small.host.call("LoraLoaderModelOnly", model=small.model, lora_name=name, strength_model=1.0)
    layers = {path: layer for path, layer in network.named_modules() if hasattr(layer, "base_layer")}
    assert len(layers) >= 10
    for path, layer in layers.items():
        key = f"diffusion_model.{path}.weight"
        found = comfy.lora.calculate_weight(model.patches[key], weights[f"{path}.weight"].flatten(1).clone(), key)
        layer.merge()
        expected = layer.base_layer.weight.flatten(1)
        assert difference(found, expected) <= 1e-5, path
        assert difference(found, weights[f"{path}.weight"].flatten(1)) > CHANGED


def test_official_names_of_nvlabs_training(small: Small, weights: dict[str, Tensor]) -> None:
    """One adapter for queries, keys and values, which are three layers here."""
    down, up = torch.randn(RANK, 96) / 10, torch.randn(3 * 96, RANK)
    layer = "base_model.model.blocks.1.attn.qkv"
    name = write_lora(small, "official", {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})
    (model,) = small.host.call("LoraLoaderModelOnly", model=small.model, lora_name=name, strength_model=1.0)
    parts = zip(("to_q", "to_k", "to_v"), (up @ down).split(96), strict=True)
    changes = {f"transformer_blocks.1.attn1.{part}": change for part, change in parts}
    assert difference(small.sample(model=model), small.sample(model=merged(small, weights, changes, "qkv"))) <= EQUAL


def test_a_lora_of_which_nothing_fits_is_refused(small: Small) -> None:
    tensors = {"lora_unet_down_blocks_0_attn.lora_down.weight": torch.ones(2, 4)}
    name = write_lora(small, "other", tensors)
    inputs = {"model": small.model, "clip": small.clip, "lora_name": name}
    message = (
        "nothing of this LoRA fits SANA: its names are those of a Stable Diffusion model, first "
        "lora_unet_down_blocks_0_attn.lora_down.weight; use a LoRA made for this SANA model"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        small.host.call("LoraLoader", **inputs, strength_model=1.0, strength_clip=1.0)


def test_a_lora_for_another_width_is_refused(small: Small) -> None:
    layer = f"transformer.{LAYERS[0]}"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 1152), f"{layer}.lora_B.weight": torch.ones(1152, 2)}
    name = write_lora(small, "wide", tensors)
    message = f"it changes 1152 rows of diffusion_model.{LAYERS[0]}.weight, which has 96 in this model"
    with pytest.raises(ValueError, match=re.escape(message)):
        small.host.call("LoraLoaderModelOnly", model=small.model, lora_name=name, strength_model=1.0)


def test_a_lora_of_which_a_part_fits_says_how_much(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    fitting, other = f"transformer.{LAYERS[0]}", "transformer.transformer_blocks.40.attn1.to_q"
    tensors = {
        f"{layer}.{part}.weight": torch.ones(96, 96) for layer in (fitting, other) for part in ("lora_A", "lora_B")
    }
    name = write_lora(small, "part", tensors)
    with caplog.at_level(logging.WARNING):
        small.host.call("LoraLoaderModelOnly", model=small.model, lora_name=name, strength_model=1.0)
    assert "1 of the 2 layers of this LoRA fit the model; the rest has no effect" in caplog.messages


def test_a_dora_beside_the_layers_is_refused(small: Small, weights: dict[str, Tensor]) -> None:
    """It once acted as a plain LoRA there, which has no weight whose rows could be scaled."""
    tensors, _ = CHANGES["DoRA"](weights[f"{CONVOLUTIONS[1]}.weight"].flatten(1))
    flat = "lora_unet_" + CONVOLUTIONS[1].replace(".", "_")
    name = write_lora(small, "dora", {f"{flat}.{part}": tensor for part, tensor in tensors.items()})
    (model,) = small.host.call("LoraLoaderBypassModelOnly", model=small.model, lora_name=name, strength_model=1.0)
    with pytest.raises(ValueError, match="is a DoRA, which cannot run beside the layers; use Load LoRA without bypass"):
        small.sample(model=model)


def test_files_with_other_things_than_tensors_are_read_as_without_the_pack(small: Small) -> None:
    folder = small.host.base / "models" / "loras" / "odd"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({0: torch.ones(1), 1: torch.ones(2)}, folder / "numbers.pt")
    assert {*comfy.utils.load_torch_file(str(folder / "numbers.pt"))} == {0, 1}
    layer = f"transformer.{LAYERS[0]}"
    lora = {f"{layer}.lora_A.weight": torch.ones(2, 96), f"{layer}.lora_B.weight": torch.ones(96, 2), "epoch": 3}
    torch.save({**lora, f"{layer}.alpha": 8.0}, folder / "adapter.pt")
    (model,) = small.host.call("LoraLoaderModelOnly", model=small.model, lora_name="odd/adapter.pt", strength_model=1.0)
    key = f"diffusion_model.{LAYERS[0]}.weight"
    found = comfy.lora.calculate_weight(model.patches[key], torch.zeros(96, 96), key)
    assert torch.equal(found, torch.full((96, 96), 8.0))


def test_a_lora_hook_of_which_nothing_fits_says_so(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    name = write_lora(small, "other", {"lora_unet_down_blocks_0_attn.lora_down.weight": torch.ones(2, 4)})
    (hooks,) = small.host.call("CreateHookLoraModelOnly", lora_name=name, strength_model=1.0)
    inputs = {"positive_NEW": small.positive, "negative_NEW": small.negative, "strength": 1.0}
    positive, negative = small.host.call(
        "PairConditioningSetProperties", **inputs, set_cond_area="default", hooks=hooks
    )
    with caplog.at_level(logging.WARNING):
        small.ksampler(positive=positive, negative=negative)
    assert "nothing of this LoRA fits SANA: its names are those of a Stable Diffusion model" in caplog.messages


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr"])
def test_a_lora_of_our_own_training_draws_as_in_the_pipeline(small: Small, kind: str) -> None:
    """On all kinds of layers; its strength is known from the header, and from the tensors where a loader passes these alone."""
    network = sana.load_transformer(small.path)
    config = AdapterConfig("lora" if kind == "rslora" else kind, RANK, ALPHA, rslora=kind == "rslora", targets="all")
    weights = add_adapter(network, config)
    torch.manual_seed(6)
    for weight in weights.values():
        weight.data += torch.rand_like(weight) / 10
    name = f"ours-{kind}.safetensors"
    path = small.host.base / "models" / "loras" / name
    path.parent.mkdir(exist_ok=True)
    tensors = lora_tensors(weights, config)
    save_file(tensors, path, lora_header(weights, config, {}))
    (model,) = small.host.call("LoraLoaderModelOnly", model=small.model, lora_name=name, strength_model=1.0)
    latent = small.sample(model=model)
    pipeline = sana.SanaPipeline.load(small.path, autoencoder=DEMO, text_encoder=DEMO, loras=[(path, 1.0)])
    assert difference(pipeline_latent(pipeline, PROMPT, negative=OTHER_PROMPT), latent) <= EQUAL
    assert difference(small.sample(), latent) > CHANGED
    trained = sana.SanaPipeline(network, pipeline.autoencoder, pipeline.text_encoder, pipeline.identity)
    assert difference(pipeline_latent(trained, PROMPT, negative=OTHER_PROMPT), latent) <= EQUAL
    keys = comfy.lora.model_lora_keys_unet(small.model.model, {})
    bare = comfy.lora.load_lora({key: tensor.clone() for key, tensor in tensors.items()}, keys)
    assert {*bare} == {key for key in model.patches if key.endswith(".weight")}
    if kind in PRODUCTS:
        return
    strength = config.strength * config.rank
    assert [*{change.weights[2] for change in bare.values()}] == [pytest.approx(strength)]


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_a_lora_of_our_own_training_in_the_text_encoder_draws_as_in_the_pipeline(small: Small, kind: str) -> None:
    """Core Load LoRA has a strength for each of the two networks; at 0 its part changes nothing."""
    network, encoder = sana.load_transformer(small.path), sana.load_text_encoder(DEMO)
    config = AdapterConfig(kind, RANK, ALPHA)
    weights = add_adapter(network, config)
    weights.update(add_text_adapter(encoder.model, config))
    torch.manual_seed(6)
    for weight in weights.values():
        weight.data += torch.rand_like(weight) / 10
    name = f"ours-texts-{kind}.safetensors"
    path = small.host.base / "models" / "loras" / name
    path.parent.mkdir(exist_ok=True)
    save_file(lora_tensors(weights, config), path, lora_header(weights, config, {}))
    inputs = {"model": small.model, "clip": small.clip, "lora_name": name, "strength_model": 1.0}
    latents = []
    for strength in (0.0, 1.0):
        model, clip = small.host.call("LoraLoader", **inputs, strength_clip=strength)
        changed = replace(small, model=model, clip=clip)
        latents.append(changed.sample(positive=changed.encode(PROMPT), negative=changed.encode(OTHER_PROMPT, "none")))
    pipeline = sana.SanaPipeline.load(small.path, autoencoder=DEMO, text_encoder=DEMO, loras=[(path, 1.0)])
    assert difference(pipeline_latent(pipeline, PROMPT, negative=OTHER_PROMPT), latents[1]) <= EQUAL
    trained = sana.SanaPipeline(network, pipeline.autoencoder, encoder, pipeline.identity)
    assert difference(pipeline_latent(trained, PROMPT, negative=OTHER_PROMPT), latents[1]) <= EQUAL
    plain = sana.SanaPipeline(network, pipeline.autoencoder, sana.load_text_encoder(DEMO), pipeline.identity)
    assert difference(pipeline_latent(plain, PROMPT, negative=OTHER_PROMPT), latents[0]) <= EQUAL
    assert difference(*latents) > CHANGED
