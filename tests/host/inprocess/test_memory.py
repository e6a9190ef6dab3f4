"""What the host does with little memory: parts of a model left outside, weights made late, and models let go."""

import functools
import gc
import weakref

import comfy.memory_management
import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from tests.host.inprocess.small import EQUAL, VARIANT, Small, difference, limit, load, picture, write_variant

VARIANTS = (VARIANT, "sana-1.5-1.6b-1024px", "sana-1.6b-4096px", "sana-0.6b-512px")


def test_every_matrix_is_in_a_layer_of_the_host(small: Small) -> None:
    """In older nodes for SANA none is, so that low memory, fp8 and offloading do nothing."""
    for model in (small.model.model, small.vae.first_stage_model, small.clip.cond_stage_model):
        outside = [
            f"{name}.{key}"
            for name, part in model.named_modules()
            if not hasattr(part, "comfy_cast_weights")
            for key, parameter in part.named_parameters(recurse=False)
            if parameter.ndim > 1
        ]
        assert all(name.endswith("scale_shift_table") for name in outside)  # which are small


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_partly_loaded_model_gives_the_same_latent(small: Small, share: float, dtype: str) -> None:
    model = load(small.host, small.path.name, dtype)[0]
    check_partly_loaded(small, model, share)


def test_partly_loaded_model_is_patched_as_its_weights_come(small: Small) -> None:
    other = load(small.host, write_variant(small.host, VARIANT, seed=1).name)[0]
    (merged,) = small.host.call("ModelMergeSimple", model1=small.model, model2=other, ratio=0.5)
    for share in (0.0, 0.5):
        check_partly_loaded(small, merged, share)


def check_partly_loaded(small: Small, model: ModelPatcher, share: float) -> None:
    """The same latent when a share of the model may stay on the device."""
    whole = small.ksampler(model=model)
    comfy.model_management.unload_all_models()
    limited = limit(model, int(share * model.model_size()))
    latent = small.ksampler(model=limited)
    assert limited.model.model_lowvram and limited.loaded_size() < 0.75 * limited.model_size()
    comfy.model_management.unload_all_models()
    assert difference(latent, whole) <= EQUAL


def test_partly_loaded_autoencoder_and_text_encoder(small: Small) -> None:
    picture_before, text_before = small.vae.encode(picture()), small.encode("a red circle")[0][0]
    comfy.model_management.unload_all_models()
    vae, clip = load(small.host, small.path.name)[2], load(small.host, small.path.name)[1]
    vae.patcher = limit(vae.patcher, 0)
    clip.patcher = limit(clip.patcher, 0)
    assert difference(vae.encode(picture()), picture_before) <= EQUAL
    assert (
        difference(Small(small.host, small.path, small.model, clip, vae).encode("a red circle")[0][0], text_before)
        <= EQUAL
    )
    assert vae.first_stage_model.model_lowvram and clip.cond_stage_model.model_lowvram


def test_weights_that_are_made_when_they_are_loaded(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under the host's DynamicVRAM: layers have no weights before the checkpoint is read. Once on Windows only."""
    monkeypatch.setattr(comfy.model_management, "WINDOWS", True)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    made: list[object] = []
    module = small.host.pack("nodes.host.model")
    build = module.SanaModel.__init__

    @functools.wraps(build)
    def watched(self: object, *arguments: object, **named: object) -> None:
        build(self, *arguments, **named)
        made.append(self.diffusion_model.proj_out.weight)

    monkeypatch.setattr(module.SanaModel, "__init__", watched)
    model, clip, vae = load(small.host, small.path.name)
    assert made == [None]
    lazy = Small(small.host, small.path, model, clip, vae)
    assert torch.equal(lazy.encode("a red circle")[0][0], small.encode("a red circle")[0][0])
    assert torch.equal(lazy.sample(), small.sample())
    assert torch.equal(vae.encode(picture()), small.vae.encode(picture()))


def test_parts_are_never_all_needed_at_once(small: Small) -> None:
    """Each works while the others are unloaded."""
    prompts = {"positive": small.positive, "negative": small.negative}
    latent = small.empty()["samples"]
    for part, run in (
        (small.clip.patcher, lambda: small.encode("a")),
        (small.model, lambda: small.ksampler(**prompts)),
        (small.vae.patcher, lambda: small.vae.decode(latent)),
    ):
        comfy.model_management.unload_all_models()
        run()
        assert [loaded.model for loaded in comfy.model_management.current_loaded_models] == [part]


def test_models_that_are_no_longer_used_are_let_go(small: Small) -> None:
    """Four loads of different variants in a row, sampled and decoded: nothing of the first three is left."""
    alive: list[weakref.ref] = []
    for variant in VARIANTS:
        model, clip, vae = load(small.host, write_variant(small.host, variant).name)
        own = Small(small.host, small.path, model, clip, vae)
        vae.decode(own.sample())
        alive += [weakref.ref(part) for part in (model.model, clip.cond_stage_model, vae.first_stage_model)]
        del model, clip, vae, own
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    assert not [part for part in alive if part() is not None]


def test_nothing_of_a_run_outlives_it(small: Small) -> None:
    """Keys and values of the texts are kept for one run."""
    run = small.host.pack("nodes.host.run")
    seen: list[weakref.ref] = []
    make = run.SamplingRun.__init__

    def watched(self: object, conds: object) -> None:
        make(self, conds)
        seen.append(weakref.ref(self))

    run.SamplingRun.__init__ = watched
    small.ksampler()
    small.sample()
    run.SamplingRun.__init__ = make
    gc.collect()
    assert len(seen) == 2 and all(part() is None for part in seen)
