"""What the loaders find and read: the demo, files, folders, every dialect, every dtype, and what the lists show."""

import ast
import json
import logging
import re
import shutil
import sys
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sana.config import VARIANTS
from tests.host.base_directory import PACK
from tests.host.boot import Host
from tests.host.hosts import host_folder
from tests.host.inprocess.small import (
    AUTOENCODER,
    DEMO,
    EQUAL,
    TEXT_ENCODER,
    VARIANT,
    Small,
    difference,
    load,
    write_variant,
)
from tests.sana.dialects import official_transformer
from tests.sana.measures import mapped_bytes

PARTS = {"text_encoder": "auto", "vae": "auto"}


def inputs_of(host: Host, node_id: str) -> dict[str, tuple[object, dict[str, object]]]:
    """Every input of a node with its type and its options, as the frontend gets them."""
    found = host.nodes[node_id].INPUT_TYPES()
    return {**found["required"], **found.get("optional", {})}


def test_lists_show_the_demo_files_and_folders(small: Small) -> None:
    folder = small.host.base / "models" / "diffusers" / "a pipeline"
    shutil.copytree(DEMO, folder)
    inputs = inputs_of(small.host, "SanaCheckpointLoader")
    models = inputs["model"][1]["options"]
    assert models[0] == "demo" and {"a pipeline", small.path.name} <= set(models)
    assert {"auto", TEXT_ENCODER} <= set(inputs["text_encoder"][1]["options"])
    assert {"auto", AUTOENCODER} <= set(inputs["vae"][1]["options"])
    assert load(small.host, "a pipeline", "auto")[0].model.identity.config.depth == 8


def test_auto_finds_the_parts_and_says_which(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _, clip, vae = load(small.host, small.path.name)
        load(small.host, "demo")
    own = f"{VARIANT}, made for 1024 px; text encoder {TEXT_ENCODER} and autoencoder {AUTOENCODER}"
    demo = "custom, made for 256 px and cfg 2; its own text encoder and its own autoencoder"
    assert [message for message in caplog.messages if "made for" in message] == [own, demo]
    assert clip.patcher.cached_patcher_init[1][0].name == TEXT_ENCODER
    assert vae.patcher.cached_patcher_init[1][0].name == AUTOENCODER


def test_official_checkpoint_gives_the_same_model(small: Small) -> None:
    """With other nodes 7 of 54 tensors of a file in other names were read, and the rest stayed noise."""
    folder = small.host.base / "models" / "checkpoints"
    row = VARIANTS[VARIANT]
    torch.save({"state_dict": official_transformer(load_file(small.path))}, folder / "official.pth")
    (folder / "config.json").write_text('{"num_cross_attention_heads": 2}', encoding="utf-8")
    model = load(small.host, "official.pth")[0]
    (folder / "config.json").unlink()
    ours = small.model.model.diffusion_model.state_dict()
    theirs = model.model.diffusion_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)
    assert model.model.identity.flow_shift == row.flow_shift
    assert torch.equal(small.sample(model=model), small.sample())


def test_prefixed_checkpoint_gives_the_same_model(small: Small) -> None:
    with safe_open(small.path, framework="pt") as opened:
        metadata = opened.metadata()
    for prefix in ("model.diffusion_model.", "transformer."):
        tensors = {prefix + name: tensor for name, tensor in load_file(small.path).items()}
        path = small.path.with_name("prefixed.safetensors")
        save_file(tensors, path, metadata)
        assert torch.equal(small.sample(model=load(small.host, path.name)[0]), small.sample())


@pytest.mark.newest
def test_chosen_variant_must_fit(small: Small) -> None:
    """The choice is for models that tensors do not tell apart. This one has other sizes than the released."""
    with pytest.raises(ValueError, match=rf"^{small.path.name} has 3 blocks of width 96 and is no sana-1.6b-4096px; "):
        load(small.host, small.path.name, variant="sana-1.6b-4096px")


@pytest.mark.parametrize("variant", [VARIANT, "sana-1.6b-1024px-fp16"])  # the dtypes of all are in test_published.py
def test_auto_dtype_is_that_of_the_release(small: Small, variant: str) -> None:
    """Models that need bfloat16 overflow in float16, and people got black pictures."""
    config = load(small.host, write_variant(small.host, variant, depth=1).name, "auto")[0].model.model_config
    assert config.supported_inference_dtypes[0] == getattr(torch, VARIANTS[variant].dtype)
    if VARIANTS[variant].dtype == "bfloat16":
        assert torch.float16 not in config.supported_inference_dtypes


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16", "fp32", "fp8"])
def test_every_dtype_loads(small: Small, dtype: str) -> None:
    assert bool(small.sample(model=load(small.host, small.path.name, dtype)[0]).isfinite().all())


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp32"])
def test_every_dtype_of_the_parts_loads(small: Small, dtype: str) -> None:
    """In older nodes for SANA "auto" was an error for the text encoder, and no dtype for the autoencoder."""
    (clip,) = small.host.call("SanaTextEncoderLoader", text_encoder=TEXT_ENCODER, dtype=dtype)
    (vae,) = small.host.call("DCAELoader", vae=AUTOENCODER, dtype=dtype)
    assert isinstance(vae.vae_dtype, torch.dtype) and vae.vae_dtype != torch.float16
    assert clip.patcher.load_device == comfy.model_management.text_encoder_device()
    text = clip.encode_from_tokens(clip.tokenize("a red circle"))
    assert bool(text.isfinite().all()) and bool(vae.decode(torch.zeros(1, 32, 2, 2)).isfinite().all())


def test_autoencoder_is_never_in_float16(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with --fp16-vae, for which the host asks no VAE what it can do."""
    monkeypatch.setattr(comfy.model_management.args, "fp16_vae", True)
    (vae,) = small.host.call("DCAELoader", vae=AUTOENCODER, dtype="auto")
    assert vae.vae_dtype in (torch.bfloat16, torch.float32)


def test_no_folder_is_added_to_those_of_the_host(host: Host) -> None:
    """Other nodes made folders `Sana` and `sana`, and people did not know where a file belongs."""
    assert not [name for name in folder_paths.folder_names_and_paths if "sana" in name.lower()]


@pytest.mark.cpu  # the tests of the second device import diffusers themselves
def test_only_packages_of_the_host_are_needed(host: Host) -> None:
    """Other nodes imported packages that nobody had installed, and did not load."""
    requirements = (host_folder(host.version) / "requirements.txt").read_text(encoding="utf-8")
    required = {re.split(r"[^A-Za-z0-9_-]", line)[0].lower() for line in requirements.splitlines()}
    given = (
        required
        | {"PIL"}
        | {"comfy_kitchen", "gguf"}  # asked for only by what needs them, with a sentence where they are missing
        | {"comfy", "comfy_api", "execution", "folder_paths", "latent_preview", "nodes", "server"}
        | sys.stdlib_module_names
    )
    pack = host.base / "custom_nodes" / PACK
    # No graph reaches them, but for training, by a node that asks for what it needs.
    programs = {pack / "sana" / name for name in ("training", "demo", "cluster")}
    sources = [*pack.glob("nodes/**/*.py"), *pack.glob("sana/**/*.py")]
    sources = [source for source in sources if not programs & {*source.parents}]
    assert len(sources) > 30 and {module for source in sources for module in imports(source)} - given == set()


def imports(source: Path) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for part in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(part, ast.Import):
            names |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom) and part.level == 0:
            names.add(part.module)
    return {name.split(".")[0] for name in names}


def test_every_node_is_there(host: Host) -> None:
    """What it is called and what its tooltips say, tests/host/test_help.py asks a server."""
    ours = [node.define_schema().node_id for node in host.pack("nodes").NODES]
    assert len(ours) >= 15 and set(ours) <= host.nodes.keys()


def test_steps_and_sizes_of_the_inputs(host: Host) -> None:
    """Elsewhere sizes came in steps of 8 and were cut to 32 without a word."""
    for name in ("width", "height"):
        options = inputs_of(host, "EmptySanaLatentImage")[name][1]
        assert (options["min"], options["step"]) == (32, 32)
    sampler = inputs_of(host, "FlowDPMSampler")
    assert [sampler[name][1]["default"] for name in ("steps", "cfg", "flow_shift", "denoise")] == [20, 4.5, 0.0, 1.0]
    assert all(
        host.nodes[node.define_schema().node_id].CATEGORY.startswith("SANA") for node in host.pack("nodes").NODES
    )


@pytest.mark.cpu  # elsewhere the host computes quantised models in bfloat16
def test_quantised_layers_that_the_header_names(small: Small) -> None:
    """The host's own format: scales beside the weights, and the layers in the metadata of the file."""
    folder, layer = small.path.parent, "transformer_blocks.0.attn1.to_v"
    tensors = load_file(small.path)
    with safe_open(small.path, framework="pt") as opened:
        metadata = opened.metadata()
    scale = tensors[f"{layer}.weight"].abs().max() / 448
    quantised = (tensors[f"{layer}.weight"] / scale).to(torch.float8_e4m3fn)
    save_file({**tensors, f"{layer}.weight": quantised.float() * scale}, folder / "plain.safetensors", metadata)
    packed = {**tensors, f"{layer}.weight": quantised, f"{layer}.weight_scale": scale}
    entry = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"}}}
    header = {**metadata, "_quantization_metadata": json.dumps(entry)}
    save_file(packed, folder / "packed.safetensors", header)
    plain, scaled = (small.sample(model=load(small.host, f"{name}.safetensors")[0]) for name in ("plain", "packed"))
    assert difference(scaled, plain) <= EQUAL


@pytest.mark.cpu
def test_no_weight_stays_in_its_file(small: Small) -> None:
    """A file that shrinks while it is mapped ends the server. The text encoder's were left there."""
    model, clip, vae = load(small.host, "demo")
    networks = (model.model, clip.cond_stage_model, vae.first_stage_model)
    files = [path.resolve() for path in model.cached_patcher_init[1][0].rglob("*.safetensors")]
    assert len(files) == 3
    for network in networks:
        assert sum(mapped_bytes(network.parameters(), path) for path in files) == 0
    encoder = {parameter.dtype for parameter in clip.cond_stage_model.parameters()}
    assert encoder == {torch.float32}  # as in its file
