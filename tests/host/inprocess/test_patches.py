"""Nodes of the host that change a MODEL, on ours: guidance, caching, schedules, merging and compiling."""

import logging
import math
from types import SimpleNamespace

import comfy.samplers
import pytest
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from sana.sampling.schedule import flow_sigmas
from tests.host.inprocess.small import (
    EQUAL,
    OTHER_PROMPT,
    PROMPT,
    SEED,
    VARIANT,
    Small,
    difference,
    load,
    pipeline_latent,
    write_variant,
)

CHANGED = 1e-2


def test_core_perturbed_attention_guidance(small: Small) -> None:
    """On SANA people found this node without effect (NVlabs/Sana issue 176)."""
    (core,) = small.host.call("PerturbedAttentionGuidance", model=small.model, scale=2.0)
    (ours,) = small.host.call("SanaPerturbedAttention", model=small.model, pag_scale=2.0, pag_block=-1)
    theirs = pipeline_latent(small.pipeline, PROMPT, negative=OTHER_PROMPT, pag_scale=2.0)
    for model in (core, ours):
        assert difference(small.sample(model=model), theirs) <= EQUAL
        assert difference(small.ksampler(model=model), small.ksampler()) > CHANGED
    assert difference(small.ksampler(model=core), small.ksampler(model=ours)) <= EQUAL


def test_shift_of_other_families_nodes(small: Small) -> None:
    """They count time in other units than SANA, which is asked for its own."""
    for node, inputs in (
        ("ModelSamplingAuraFlow", {"shift": 5.0}),
        ("ModelSamplingFlux", {"max_shift": math.log(5), "base_shift": math.log(5), "width": 1024, "height": 1024}),
    ):
        (theirs,) = small.host.call("ModelSamplingSD3", model=small.model, shift=5.0)
        (model,) = small.host.call(node, model=small.model, **inputs)
        sigmas = flow_sigmas(4, 5.0)
        latents = [sample_sigmas(small, each, sigmas) for each in (theirs, model)]
        assert difference(*latents) <= EQUAL


def sample_sigmas(small: Small, model: object, sigmas: Tensor) -> Tensor:
    """The latents of SamplerCustom without guidance."""
    (sampler,) = small.host.call("KSamplerSelect", sampler_name="euler")
    inputs = {"positive": small.positive, "negative": small.negative, "latent_image": small.empty(), "cfg": 1.0}
    noise = {"add_noise": True, "noise_seed": SEED}
    return small.host.call("SamplerCustom", model=model, sampler=sampler, sigmas=sigmas, **inputs, **noise)[0][
        "samples"
    ]


def test_core_skip_layer_guidance(small: Small) -> None:
    common = {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0}
    (model,) = small.host.call("SkipLayerGuidanceDiT", model=small.model, scale=2.0, rescaling_scale=0.0, **common)
    (simple,) = small.host.call("SkipLayerGuidanceDiTSimple", model=small.model, **common)
    guided = small.ksampler(model=model, steps=1)
    plain = small.ksampler(steps=1)
    assert difference(guided, plain) > CHANGED
    assert difference(small.ksampler(model=simple, steps=1), plain) > CHANGED
    (off,) = small.host.call("SkipLayerGuidanceDiT", model=small.model, scale=0.0, rescaling_scale=0.0, **common)
    assert torch.equal(small.ksampler(model=off, steps=1), plain)


def test_a_node_around_a_block_keeps_what_it_gave_it(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that keep what a block has changed subtract the one from the other, also where it works in bands of rows."""
    changes: list[float] = []

    def around(arguments: dict[str, Tensor], extra: dict[str, object]) -> dict[str, Tensor]:
        out = extra["original_block"](arguments)
        changes.append(difference(out["img"], arguments["img"]))
        return out

    expected = small.ksampler(steps=1)
    monkeypatch.setattr(small.host.pack("nodes.host.model"), "WORKING_BYTES", 1)
    model = small.model.clone()
    model.set_model_patch_replace(around, "dit", "double_block", 1)
    assert difference(small.ksampler(model=model, steps=1), expected) <= EQUAL
    assert min(changes) > CHANGED


def test_core_easy_cache(small: Small) -> None:
    common = {"start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    (never,) = small.host.call("EasyCache", model=small.model, reuse_threshold=0.0, **common)
    assert torch.equal(small.ksampler(model=never, steps=8), small.ksampler(steps=8))
    usual = {"start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    (often,) = small.host.call("EasyCache", model=small.model, reuse_threshold=1.0, **usual)
    embedded: list[int] = []
    handle = often.model.diffusion_model.patch_embed.proj.register_forward_pre_hook(
        lambda module, arguments: embedded.append(len(arguments[0]))
    )
    latent = small.ksampler(model=often, steps=12, latent_image=small.empty(2))
    handle.remove()
    assert 1 <= len(embedded) < 12
    whole = small.ksampler(steps=12, latent_image=small.empty(2))
    assert (latent - whole).abs().mean() < 0.25 * whole.std()  # measured: 0.11, and 1.4 where the cache wrote into x


def test_core_lazy_cache_and_guidance_nodes(small: Small) -> None:
    common = {"start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    (lazy,) = small.host.call("LazyCache", model=small.model, reuse_threshold=0.2, **common)
    (rescaled,) = small.host.call("RescaleCFG", model=small.model, multiplier=0.7)
    for model in (lazy, rescaled):
        assert bool(small.ksampler(model=model, steps=5).isfinite().all())


def test_core_renorm_cfg(small: Small) -> None:
    """Without a limit of the norm it is the usual guidance; with one of half the prompt's, another."""
    (usual,) = small.host.call("RenormCFG", model=small.model, cfg_trunc=100.0, renorm_cfg=0.0)
    (limited,) = small.host.call("RenormCFG", model=small.model, cfg_trunc=100.0, renorm_cfg=0.5)
    assert difference(small.ksampler(model=usual), small.ksampler()) <= EQUAL
    assert difference(small.ksampler(model=limited), small.ksampler()) > CHANGED


def test_core_model_sampling_sets_the_flow_shift(small: Small) -> None:
    (model,) = small.host.call("ModelSamplingSD3", model=small.model, shift=1.5)
    inputs = {"steps": 4, "denoise": 1.0, "flow_shift": 0.0}
    assert torch.equal(small.host.call("FlowDPMScheduler", model=model, **inputs)[0], flow_sigmas(4, 1.5))
    assert difference(small.sample(model=model), small.sample(flow_shift=1.5)) <= EQUAL
    assert difference(small.sample(model=model), small.sample()) > CHANGED
    assert difference(small.ksampler(model=model), small.ksampler()) > CHANGED


def test_core_model_merge(small: Small) -> None:
    """ModelMergeSimple: the ratio is the share of the first model, in the tables beside the layers as well."""
    path = write_variant(small.host, VARIANT, seed=1)
    first, second = load_file(small.path), load_file(path)
    with safe_open(small.path, framework="pt") as opened:
        mixed = {name: 0.25 * first[name] + 0.75 * second[name] for name in first}
        save_file(mixed, path.with_name("mixed.safetensors"), opened.metadata())
    (merged,) = small.host.call(
        "ModelMergeSimple", model1=small.model, model2=load(small.host, path.name)[0], ratio=0.25
    )
    latent = small.ksampler(model=merged)
    assert difference(latent, small.ksampler(model=load(small.host, "mixed.safetensors")[0])) <= EQUAL
    assert difference(latent, small.ksampler()) > CHANGED
    assert torch.equal(small.ksampler(model=merged), latent)


def test_core_normalized_attention_guidance(small: Small) -> None:
    """It acts on what self-attention gives, as in the host's own blocks. The formula is that of its paper (arXiv 2505.21179)."""
    scale, alpha, tau = 5.0, 0.5, 1.5

    def guide(layer: object, arguments: tuple, out: Tensor) -> Tensor:
        uncond, cond = out.chunk(2)
        guided = scale * cond - (scale - 1) * uncond
        ratio = guided.abs().sum(-1, keepdim=True) / cond.abs().sum(-1, keepdim=True)
        return torch.cat([uncond, alpha * guided * ratio.clamp(max=tau) / ratio + (1 - alpha) * cond])

    transformer = small.pipeline.transformer
    hooks = [block.attn1.register_forward_hook(guide) for block in transformer.transformer_blocks]
    sigmas = comfy.samplers.calculate_sigmas(small.model.get_model_object("model_sampling"), "simple", 2)
    theirs = small.reference(sample_euler, sigmas, small.empty(), transformer=transformer)
    for hook in hooks:
        hook.remove()
    (model,) = small.host.call("NAGuidance", model=small.model, nag_scale=scale, nag_alpha=alpha, nag_tau=tau)
    ours = small.ksampler(model=model, steps=2, scheduler="simple")
    assert difference(ours, theirs) <= EQUAL
    assert difference(ours, small.ksampler(steps=2)) > CHANGED
    (off,) = small.host.call("NAGuidance", model=small.model, nag_scale=scale, nag_alpha=0.0, nag_tau=tau)
    assert difference(small.ksampler(model=off, steps=2), small.ksampler(steps=2)) <= EQUAL


def test_normalized_attention_guidance_in_bands(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets all tokens at once, as the host's own blocks give them, also where a block works in bands of rows."""
    seen: list[tuple[int, ...]] = []

    def behind(out: Tensor, options: dict[str, object]) -> Tensor:
        seen.append((options["block_index"], *out.shape[:2]))
        return out

    expected = small.ksampler(steps=1)
    monkeypatch.setattr(small.host.pack("nodes.host.model"), "WORKING_BYTES", 1)
    model = small.model.clone()
    model.set_model_attn1_output_patch(behind)
    assert difference(small.ksampler(model=model, steps=1), expected) <= EQUAL
    assert seen == [(i, 2, 3 * 4) for i in range(model.model.identity.config.depth)]


UNCALLED = {
    "TomePatchModel": ({"ratio": 0.5}, "attn1_patch, attn1_output_patch"),
    "HyperTile": (
        {"tile_size": 256, "swap_size": 2, "max_depth": 0, "scale_depth": False},
        "attn1_patch, attn1_output_patch",
    ),
    "PatchModelAddDownscale": (
        {
            "block_number": 3,
            "downscale_factor": 2.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
            "downscale_after_skip": True,
            "downscale_method": "bicubic",
            "upscale_method": "bicubic",
        },
        "input_block_patch_after_skip, output_block_patch",
    ),
    "ScaleROPE": (
        {"scale_x": 2.0, "shift_x": 0.0, "scale_y": 2.0, "shift_y": 0.0, "scale_t": 1.0, "shift_t": 0.0},
        "rope_options",
    ),
    "SkipLayerGuidanceDiT": (
        {
            "double_layers": "1, 9",
            "single_layers": "7",
            "scale": 2.0,
            "rescaling_scale": 0.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
        },
        "dit double_block 9, dit single_block 7",
    ),
}


class Adapter:
    """A patch as many packs write it."""

    def __call__(self, *arguments: object, **named: object) -> None:
        raise AssertionError("called")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of our pack; the host has its own."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.endswith("nodes.host.patches")
    ]


@pytest.mark.parametrize("node", UNCALLED)
def test_what_a_node_sets_without_effect_is_told_once_a_run(
    small: Small, caplog: pytest.LogCaptureFixture, node: str
) -> None:
    inputs, places = UNCALLED[node]
    (model,) = small.host.call(node, model=small.model, **inputs)
    message = f"{node} sets {places}, which SANA's blocks never call: that has no effect"
    for count in (1, 2):
        latent = small.ksampler(model=model)
        assert warnings_of(caplog) == [message] * count
    if node != "SkipLayerGuidanceDiT":
        assert torch.equal(latent, small.ksampler())


def test_patches_of_other_packs_without_effect_are_told(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    """Replacements with their place; objects by their class."""
    model = small.model.clone()
    model.set_model_attn2_replace(Adapter(), "input", 4)
    model.set_model_attn1_replace(Adapter(), "block", 99)
    model.set_model_double_block_patch(Adapter())
    model.set_model_attn2_output_patch(SimpleNamespace(inner=Adapter()))
    latent = small.ksampler(model=model)
    end = "which SANA's blocks never call: that has no effect"
    assert warnings_of(caplog) == [
        f"Adapter sets double_block, attn2 input 4, attn1 block 99, {end}",
        f"SimpleNamespace sets attn2_output_patch, {end}",
    ]
    assert torch.equal(latent, small.ksampler())


def test_nodes_with_an_effect_are_not_told(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    guidance = {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}
    (model,) = small.host.call("NAGuidance", model=small.model, **guidance)
    (model,) = small.host.call("PerturbedAttentionGuidance", model=model, scale=2.0)
    layers = {"double_layers": "0, 2", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0}
    (model,) = small.host.call("SkipLayerGuidanceDiT", model=model, scale=2.0, rescaling_scale=0.0, **layers)
    small.ksampler(model=model)
    assert not warnings_of(caplog)


@pytest.mark.cpu
def test_compiled_model(small: Small) -> None:
    """TorchCompileModel with the compiler that keeps the operators as they are; the graph is still captured."""
    one_block = load(small.host, write_variant(small.host, VARIANT, depth=1).name)[0]
    (model,) = small.host.call("TorchCompileModel", model=one_block, backend="eager")
    assert difference(small.ksampler(model=model, steps=2), small.ksampler(model=one_block, steps=2)) <= EQUAL


@pytest.mark.cpu
def test_compiled_model_is_one_graph_for_all_prompts(small: Small) -> None:
    """With the attention that the host takes on a GPU: the one it takes on a CPU reads the machine's memory in between."""
    one_block = load(small.host, write_variant(small.host, VARIANT, depth=1).name)[0]
    model, graphs = one_block.clone(), CompileCounter()

    def attention(function: object, *arguments: object, **named: object) -> Tensor:
        return attention_pytorch(*arguments, **named)

    model.model_options["transformer_options"]["optimized_attention_override"] = attention
    set_torch_compile_wrapper(model=model, backend=graphs, fullgraph=True)
    torch._dynamo.reset()
    for steps, prompt in ((2, "a red circle"), (3, "a large blue star left of a small ring"), (2, "a ring")):
        small.ksampler(model=model, steps=steps, positive=small.encode(prompt))
        assert graphs.frame_count == 1
    small.ksampler(model=model, steps=2, latent_image=small.empty(1, 160, 160))
    assert graphs.frame_count == 2


def test_attention_is_the_hosts_and_can_be_replaced(small: Small) -> None:
    """What packs such as SageAttention set: a function in the place of the softmax attention."""
    seen: list[tuple[int, ...]] = []

    def override(function: object, q: Tensor, *arguments: object, **named: object) -> Tensor:
        seen.append(tuple(q.shape))
        return function(q, *arguments, **named)

    model = small.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(small.ksampler(model=model, steps=1), small.ksampler(steps=1))
    assert len(seen) == model.model.identity.config.depth


@pytest.mark.parametrize("sampler_name", ["uni_pc", "heun"])
def test_other_samplers_of_the_host_run(small: Small, sampler_name: str) -> None:
    assert bool(small.ksampler(sampler_name=sampler_name).isfinite().all())


@pytest.mark.cpu
@pytest.mark.parametrize("sampler_name", ["euler_ancestral", "res_multistep", "lcm"])
def test_samplers_that_add_noise_run(small: Small, sampler_name: str) -> None:
    assert bool(small.ksampler(sampler_name=sampler_name).isfinite().all())
