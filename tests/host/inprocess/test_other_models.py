"""Models of other families are what they are without the pack: what it adds to the host acts on SANA alone."""

import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType

import comfy.k_diffusion.sampling
import comfy.lora
import comfy.model_base
import comfy.model_detection
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import comfy.utils
import pytest
import torch

from bench.weights import randomise
from tests.host.boot import Host
from tests.host.inprocess.small import EQUAL, Small, difference

# What the pack puts into the modules of the host, and nothing else.
ADDED = {
    "comfy.model_detection.detect_unet_config",
    "comfy.lora.load_lora",
    "comfy.lora.model_lora_keys_clip",
    "comfy.lora.model_lora_keys_unet",
    "comfy.samplers.CFGGuider.sample",
    "comfy.utils.load_torch_file",
    "comfy.k_diffusion.sampling.sample_flow_dpm",
    "comfy.sd.load_diffusion_model_state_dict",
    "comfy.sd.load_state_dict_guess_config",
    "execution.validate_prompt",
    "latent_preview.get_previewer",
}
# The first version makes music. Its blocks have names of SANA's.
ACE_STEP = {
    "audio_model": "ace",
    "attention_head_dim": 128,
    "in_channels": 8,
    "inner_dim": 2560,
    "max_height": 16,
    "max_position": 32768,
    "max_width": 32768,
    "mlp_ratio": 2.5,
    "num_attention_heads": 20,
    "num_layers": 24,
    "out_channels": 8,
    "patch_size": [16, 1],
    "rope_theta": 1000000.0,
    "speaker_embedding_dim": 512,
    "text_embedding_dim": 768,
    "ssl_encoder_depths": [8, 8],
    "ssl_names": ["mert", "m-hubert"],
    "ssl_latent_dims": [1024, 768],
    "lyric_encoder_vocab_size": 6693,
    "lyric_hidden_size": 1024,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
PREFIX = "model.diffusion_model."


def functions(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Everything callable in a module and in its classes, by its name in the host."""
    for name, value in vars(module).items():
        yield f"{module.__name__}.{name}", value
        if isinstance(value, type) and value.__module__ == module.__name__:
            for method, inner in vars(value).items():
                yield f"{module.__name__}.{name}.{method}", inner


def test_pack_replaces_nothing_else_in_the_host(host: Host, small: Small) -> None:
    """With older nodes for SANA loading SANA replaced the sampling of all models until a restart."""
    small.sample()
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in ("comfy", "nodes", "execution", "latent_preview")
    ]
    home = str(host.base / "custom_nodes")
    found = {
        name
        for module in modules
        for name, value in functions(module)
        if isinstance(value, FunctionType) and value.__code__.co_filename.startswith(home)
    }
    assert found == ADDED
    assert comfy.samplers.SAMPLER_NAMES.count("flow_dpm") == comfy.samplers.KSAMPLER_NAMES.count("flow_dpm") == 1
    ours = [
        model for model in comfy.supported_models.models if model.__module__.startswith(host.pack("nodes").__name__)
    ]
    assert len(ours) == 1


def test_registering_twice_changes_nothing(host: Host) -> None:
    before = (
        comfy.model_detection.detect_unet_config,
        comfy.lora.load_lora,
        comfy.lora.model_lora_keys_clip,
        comfy.lora.model_lora_keys_unet,
        comfy.utils.load_torch_file,
        len(comfy.supported_models.models),
    )
    host.pack("nodes.host.register").register()
    after = (
        comfy.model_detection.detect_unet_config,
        comfy.lora.load_lora,
        comfy.lora.model_lora_keys_clip,
        comfy.lora.model_lora_keys_unet,
        comfy.utils.load_torch_file,
        len(comfy.supported_models.models),
    )
    assert before == after and comfy.samplers.KSAMPLER_NAMES.count("flow_dpm") == 1


def other_model(family: str) -> comfy.model_base.BaseModel:
    """A model of another family on meta: real names and shapes, without memory."""
    models = comfy.supported_models
    if family == "Flux":
        config = models.Flux(dict(FLUX))
    elif family == "ACE-Step":
        config = models.ACEStep(dict(ACE_STEP))
    else:
        row = {"SD1.5": models.SD15, "SDXL": models.SDXL}[family]
        config = row({**unet_settings(family)})
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, PREFIX, device=torch.device("meta"))


def unet_settings(family: str) -> dict[str, object]:
    common = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_heads": -1,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_attention": False,
    }
    if family == "SD1.5":
        depths = {"transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3}
        more = {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "context_dim": 768, "adm_in_channels": None}
        return {
            **common,
            **depths,
            **more,
            "num_heads": 8,
            "use_linear_in_transformer": False,
            "transformer_depth_middle": 1,
        }
    depths = {"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
    more = {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "context_dim": 2048, "adm_in_channels": 2816}
    head = {"num_head_channels": 64, "num_classes": "sequential", "use_linear_in_transformer": True}
    return {**common, **depths, **more, **head, "transformer_depth_middle": 10}


@pytest.fixture(scope="module", params=["SD1.5", "SDXL", "Flux", "ACE-Step"])
def model(request: pytest.FixtureRequest) -> comfy.model_base.BaseModel:
    return other_model(request.param)


def test_detection_is_the_hosts(model: comfy.model_base.BaseModel, without_pack: Callable[[], None]) -> None:
    tensors = {PREFIX + name: tensor for name, tensor in model.diffusion_model.state_dict().items()}

    def detect() -> tuple[object, ...]:
        found = comfy.model_detection.model_config_from_unet(tensors, PREFIX)
        return type(found), found.unet_config, comfy.model_detection.unet_prefix_from_state_dict(tensors)

    ours = detect()
    assert ours[0] is type(model.model_config)
    without_pack()
    assert detect() == ours


def test_lora_keys_are_the_hosts(model: comfy.model_base.BaseModel, without_pack: Callable[[], None]) -> None:
    ours = comfy.lora.model_lora_keys_unet(model, {})
    assert len(ours) > 50
    without_pack()
    assert comfy.lora.model_lora_keys_unet(model, {}) == ours


def test_lora_files_are_the_hosts(model: comfy.model_base.BaseModel, without_pack: Callable[[], None]) -> None:
    """Also what is for 1x1 convolutions, which are matrices in SANA alone."""
    keys = comfy.lora.model_lora_keys_unet(model, {})
    lora = {f"{name}.diff": torch.ones(2, 2, 1, 1) for name in keys}
    ours = comfy.lora.load_lora(lora, keys)
    without_pack()
    theirs = comfy.lora.load_lora(lora, keys)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    assert all(ours[name][1][0] is theirs[name][1][0] for name in theirs)


@pytest.fixture
def without_pack(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes what the pack has added out of the host, until the test ends."""

    def remove() -> None:
        for module, name in (
            (comfy.model_detection, "detect_unet_config"),
            (comfy.lora, "load_lora"),
            (comfy.lora, "model_lora_keys_clip"),
            (comfy.utils, "load_torch_file"),
            (comfy.lora, "model_lora_keys_unet"),
        ):
            monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
        host_models = [row for row in comfy.supported_models.models if row.__module__.startswith("comfy.")]
        monkeypatch.setattr(comfy.supported_models, "models", host_models)

    return remove


@pytest.mark.parametrize("channels", [4, 16, 32], ids=["SD1.5", "Flux", "Flux 2"])
def test_autoencoder_is_the_hosts(host: Host, channels: int) -> None:
    """The small autoencoders that the host has for previews, with the latents of three families."""
    small = randomise(comfy.taesd.taesd.TAESD(latent_channels=channels), seed=0)
    vae = comfy.sd.VAE(sd=small.state_dict())
    assert type(vae) is comfy.sd.VAE and vae.latent_channels == channels and vae.downscale_ratio == 8
    assert type(vae.first_stage_model).__module__ == "comfy.taesd.taesd"
    latent = torch.zeros(1, channels, 4, 4)
    assert difference(vae.decode(latent), vae.process_output(small.decode(latent)).movedim(1, -1)) <= EQUAL


def test_other_files_are_not_taken_for_ours(host: Host) -> None:
    """PixArt has nearly our names."""
    names = ("blocks.0.attn.qkv.weight", "t_block.1.weight", "y_embedder.y_embedding", "adaln_single.linear.weight")
    assert not host.pack("sana.checkpoints.names").is_transformer(dict.fromkeys(names))
