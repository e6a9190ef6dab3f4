"""Models, checkpoints and parts that the host saves, loaded again: every bit the same."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file, save_file
from torch import Tensor

import sana
from sana.checkpoints.files import read_tensors
from sana.checkpoints.names import with_convolutions
from sana.checkpoints.transformer import identify_transformer
from sana.checkpoints.writing import convert
from tests.host.inprocess.small import (
    EQUAL,
    PROMPT,
    Small,
    difference,
    limit,
    load,
    picture,
    write_variant,
)

VARIANTS = ("sana-1.6b-4096px", "sana-1.5-1.6b-1024px", "sana-sprint-0.6b-1024px")


def saved(small: Small, node: str, folder: str, **inputs: object) -> Path:
    """Calls a saving node and moves what it wrote into the folder of models where its loader looks."""
    outputs = small.host.base / "output" / folder
    before = set(outputs.glob("*")) if outputs.exists() else set()
    small.host.call(node, **inputs, filename_prefix=f"{folder}/saved")
    (path,) = set(outputs.glob("*")) - before
    target = (
        small.host.base
        / "models"
        / folder
        / f"{node}-{len(list((small.host.base / 'models' / folder).iterdir()))}.safetensors"
    )
    return path.rename(target)


def weights(model: ModelPatcher) -> dict[str, Tensor]:
    return dict(model.model.diffusion_model.state_dict())


def layer_dtypes(model: ModelPatcher) -> set[torch.dtype]:
    """Of everything but the tables beside the layers, which the host does not cast."""
    return {tensor.dtype for name, tensor in weights(model).items() if not name.endswith("scale_shift_table")}


def same_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and torch.equal(ours[name].cpu().view(torch.uint8), theirs[name].cpu().view(torch.uint8))
        for name in ours
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_saved_model_is_the_same_to_the_bit(small: Small, dtype: str) -> None:
    model = load(small.host, small.path.name, dtype)[0]
    path = saved(small, "ModelSave", "diffusion_models", model=model)
    again = load(small.host, path.name, dtype)[0]
    assert same_bits(weights(again), weights(model))
    assert again.model.identity == model.model.identity
    assert torch.equal(small.ksampler(model=again), small.ksampler(model=model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_model_tells_what_its_tensors_cannot(small: Small, variant: str) -> None:
    """The flow shift, the size it was made for, and its heads, which another file tells in its header."""
    model = load(small.host, write_variant(small.host, variant).name)[0]
    path = saved(small, "ModelSave", "diffusion_models", model=model)
    identity = load(small.host, path.name)[0].model.identity
    assert identity == model.model.identity and identity.variant == variant
    assert asdict(identify_transformer(read_tensors(path))) == asdict(identity)


def test_saved_model_converts_to_what_diffusers_reads(small: Small, tmp_path: Path) -> None:
    """Its matrices become convolutions with four axes, as in the file that the model was made from."""
    path = saved(small, "ModelSave", "diffusion_models", model=small.model)
    convert(path, target := tmp_path / "converted.safetensors")
    assert same_bits(load_file(target), load_file(small.path))


def test_a_file_saved_with_convolutions_loads(small: Small) -> None:
    path = saved(small, "ModelSave", "diffusion_models", model=small.model)
    with_axes = with_convolutions(load_file(path))
    assert with_axes["model.diffusion_model.patch_embed.proj.weight"].shape[2:] == (1, 1)
    save_file(with_axes, other := path.with_stem("with-convolutions"))
    again = load(small.host, other.name)[0]
    assert same_bits(weights(again), weights(small.model)) and again.model.identity == small.model.model.identity
    assert same_bits(sana.load_transformer(other, None).state_dict(), sana.load_transformer(path, None).state_dict())


def test_fp8_weights_sample_nearly_the_same_latent(small: Small) -> None:
    model = load(small.host, small.path.name, "fp8")[0]
    assert layer_dtypes(model) == {torch.float8_e4m3fn}
    exact, rounded = small.sample(), small.sample(model=model)
    assert 0 < float((exact - rounded).std() / exact.std()) < 0.2


def test_saved_checkpoint_holds_all_three_parts(small: Small) -> None:
    parts = {"model": small.model, "clip": small.clip, "vae": small.vae}
    path = saved(small, "CheckpointSave", "checkpoints", **parts)
    model, clip, vae = load(small.host, path.name, text_encoder="auto", vae="auto")
    assert same_bits(weights(model), weights(small.model))
    assert same_bits(dict(clip.cond_stage_model.state_dict()), dict(small.clip.cond_stage_model.state_dict()))
    assert same_bits(vae.get_sd(), small.vae.get_sd())
    again = Small(small.host, path, model, clip, vae)
    assert torch.equal(again.encode(PROMPT)[0][0], small.positive[0][0])
    assert torch.equal(again.sample(), small.sample())
    assert torch.equal(vae.encode(picture()), small.vae.encode(picture()))
    # `auto` has taken the parts of the file, not those in the other folders.
    assert clip.patcher.cached_patcher_init[1][0] == vae.patcher.cached_patcher_init[1][0] == path


def test_saved_checkpoint_is_read_without_the_host(small: Small) -> None:
    parts = {"model": small.model, "clip": small.clip, "vae": small.vae}
    path = saved(small, "CheckpointSave", "checkpoints", **parts)
    pipeline = sana.SanaPipeline.load(path, autoencoder=path, text_encoder=path)
    assert same_bits(pipeline.transformer.state_dict(), small.pipeline.transformer.state_dict())
    text, mask = pipeline.text_encoder([PROMPT])
    assert difference(text, small.positive[0][0]) <= EQUAL and bool(mask.any())


def test_core_loaders_take_saved_models(small: Small) -> None:
    """The host's own loaders give a MODEL; text encoder and VAE come from our loaders."""
    path = saved(small, "ModelSave", "diffusion_models", model=small.model)
    (model,) = small.host.call("UNETLoader", unet_name=path.name, weight_dtype="default")
    assert same_bits(weights(model), weights(small.model))
    assert model.model.identity == small.model.model.identity
    parts = {"model": small.model, "clip": small.clip, "vae": small.vae}
    path = saved(small, "CheckpointSave", "checkpoints", **parts)
    model, clip, vae = small.host.call("CheckpointLoaderSimple", ckpt_name=path.name)
    assert same_bits(weights(model), weights(small.model)) and clip is None
    with pytest.raises(RuntimeError, match="your checkpoint does not contain a valid VAE"):
        vae.decode(torch.zeros(1, 32, 2, 2))
    (fp8,) = small.host.call("UNETLoader", unet_name=small.path.name, weight_dtype="fp8_e4m3fn")
    assert layer_dtypes(fp8) == {torch.float8_e4m3fn}


def test_model_of_a_core_loader_samples_as_ours(small: Small) -> None:
    (model,) = small.host.call("UNETLoader", unet_name=small.path.name, weight_dtype="default")
    assert torch.equal(small.sample(model=model), small.sample())
    assert torch.equal(small.ksampler(model=model), small.ksampler())


def test_saved_parts_load_again(small: Small) -> None:
    vae_path = saved(small, "VAESave", "vae", vae=small.vae)
    (vae,) = small.host.call("DCAELoader", vae=vae_path.name, dtype="auto")
    assert same_bits(vae.get_sd(), small.vae.get_sd())
    clip_path = saved(small, "CLIPSave", "text_encoders", clip=small.clip)
    (clip,) = small.host.call("SanaTextEncoderLoader", text_encoder=clip_path.name, dtype="auto")
    assert torch.equal(Small(small.host, small.path, small.model, clip, vae).encode(PROMPT)[0][0], small.positive[0][0])


def test_patched_model_is_saved_with_its_patches(small: Small) -> None:
    """ModelMergeSimple, then ModelSave: what was sampled is what is in the file, also where little memory left it outside."""
    other = load(small.host, write_variant(small.host, "sana-1.6b-1024px", seed=1).name)[0]
    (merged,) = small.host.call("ModelMergeSimple", model1=small.model, model2=other, ratio=0.5)
    whole = saved(small, "ModelSave", "diffusion_models", model=merged)
    assert torch.equal(small.ksampler(model=load(small.host, whole.name)[0]), small.ksampler(model=merged))
    comfy.model_management.unload_all_models()
    limited = limit(merged, 0)
    partly = saved(small, "ModelSave", "diffusion_models", model=limited)
    comfy.model_management.unload_all_models()  # while both copies are there: the host takes a model without them for lost
    assert same_bits(load_file(partly), load_file(whole))
