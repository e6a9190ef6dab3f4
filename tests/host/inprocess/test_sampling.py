"""Every way to sample, against `sana` on the same weights: the same latents from KSampler, our nodes and the pipeline."""

import logging
from dataclasses import replace

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from PIL import Image
from torch import Tensor

import sana
from sana.config import LATENT_SCALE, VARIANTS
from sana.sampling.noise import noise_source
from sana.sampling.schedule import angle_sigmas, flow_sigmas, scm_angles
from sana.sampling.solvers import SOLVERS, flow_euler
from sana.text.prompt import DIFFUSERS_INSTRUCTION
from tests.host.boot import Host
from tests.host.inprocess.small import (
    EQUAL,
    HEIGHT,
    OTHER_PROMPT,
    PROMPT,
    SEED,
    STEPS,
    WIDTH,
    Small,
    difference,
    load,
    load_pipeline,
    picture,
    pipeline_latent,
    write_variant,
)

CHANGED = 1e-2  # what a setting that acts changes at least
SPRINT = "sana-sprint-0.6b-1024px"


def as_file(image: Tensor) -> Image.Image:
    return Image.fromarray((image[0] * 255).round().byte().numpy())


@pytest.mark.parametrize(
    ("node", "options"),
    [
        ({}, {}),
        ({"cfg": 1.0}, {"guidance_scale": 1.0}),
        ({"flow_shift": 1.5, "steps": 5}, {"flow_shift": 1.5, "steps": 5}),
        ({"guidance_from": 0.2, "guidance_to": 0.9}, {"guidance_interval": (0.2, 0.9)}),
        ({"pag_scale": 2.0}, {"pag_scale": 2.0}),
        ({"pag_scale": 2.0, "pag_block": 1, "guidance_to": 0.9}, {"pag_scale": 2.0, "pag_blocks": (1,)}),
    ],
    ids=["plain", "no guidance", "flow shift", "interval", "perturbed", "perturbed in a block, within an interval"],
)
def test_flow_dpm_sampler_gives_the_latent_of_the_pipeline(
    small: Small, node: dict[str, object], options: dict[str, object]
) -> None:
    if "guidance_to" in node:
        options = {"guidance_interval": (node.get("guidance_from", 0.0), node["guidance_to"]), **options}
    theirs = pipeline_latent(small.pipeline, PROMPT, negative=OTHER_PROMPT, **options)
    assert difference(small.sample(**node), theirs) <= EQUAL


def test_pictures_of_a_batch_are_those_of_the_pipeline_and_of_their_own_seeds(small: Small) -> None:
    """With older nodes for SANA a batch cut the prompt to the length of the negative prompt."""
    latents = small.sample(latent=small.empty(3))
    assert difference(latents, pipeline_latent(small.pipeline, PROMPT, 3, negative=OTHER_PROMPT)) <= EQUAL
    assert difference(latents[2:], small.sample(seed=SEED + 2)) <= EQUAL


def test_seeds_of_a_batch_begin_again_at_0(small: Small) -> None:
    last = small.sample(seed=2**64 - 1, latent=small.empty(2))[1:]
    assert difference(last, small.sample(seed=0)) <= EQUAL


def test_picture_taken_out_of_a_batch_keeps_its_seed(small: Small, sprint: object) -> None:
    """LatentFromBatch and RebatchLatents say which pictures of the batch theirs are."""
    batch = small.empty(3)
    (third,) = small.host.call("LatentFromBatch", samples=batch, batch_index=2, length=1)
    assert difference(small.sample(latent=third), small.sample(latent=batch)[2:]) <= EQUAL
    found = sprint_latents(small.host, sprint, small, latent=third)
    assert difference(found, sprint_latents(small.host, sprint, small, latent=batch)[2:]) <= EQUAL


def test_mask_convention_of_diffusers(small: Small) -> None:
    """People compare with diffusers, whose unconditional branch has its own mask; all other tests follow NVlabs."""
    positive = small.encode(PROMPT, "custom", DIFFUSERS_INSTRUCTION)
    ours = small.sample(positive=positive, mask_convention="diffusers")
    theirs = pipeline_latent(small.pipeline, PROMPT, negative=OTHER_PROMPT, reference="diffusers")
    assert difference(ours, theirs) <= EQUAL
    assert difference(ours, small.sample(positive=positive)) > EQUAL  # the convention of NVlabs is another one


@pytest.mark.parametrize(
    ("sampler_name", "batch_size", "cfg", "denoise"),
    [
        ("euler", 1, 4.5, 1.0),
        ("euler", 4, 4.5, 1.0),
        ("euler", 2, 1.0, 0.6),
        ("dpmpp_2m", 1, 1.0, 1.0),
        ("dpmpp_2m", 3, 4.5, 0.6),
        ("flow_dpm", 1, 4.5, 1.0),
        ("flow_dpm", 2, 1.0, 1.0),
        ("flow_dpm", 4, 4.5, 0.5),
    ],
)
def test_ksampler_gives_what_its_sampler_gives_with_our_network(
    small: Small, sampler_name: str, batch_size: int, cfg: float, denoise: float
) -> None:
    latent = small.empty(batch_size)
    if denoise < 1:
        latent["samples"] = small.vae.encode(picture()).repeat(batch_size, 1, 1, 1)
    model_sampling = small.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, "simple", int(STEPS / denoise))[-STEPS - 1 :]
    sampler = getattr(comfy.k_diffusion.sampling, f"sample_{sampler_name}")
    theirs = small.reference(sampler, sigmas, latent, cfg=cfg)
    ours = small.ksampler(latent_image=latent, sampler_name=sampler_name, cfg=cfg, denoise=denoise)
    assert difference(ours, theirs) <= EQUAL


def test_more_steps_than_levels(small: Small) -> None:
    """12 steps at a denoise of 0.01 are the last of 1200, which are more than the host has levels: some repeat."""
    latent = {"samples": small.vae.encode(picture())}
    settings = {"latent_image": latent, "steps": 12, "denoise": 0.01}
    euler = small.ksampler(**settings)
    ours = small.ksampler(**settings, sampler_name="flow_dpm")
    assert difference(ours, euler) < 0.1 < difference(ours, latent["samples"])  # measured: 0.02 and 0.7


def test_flow_dpm_is_in_the_list_of_ksampler(host: Host) -> None:
    (samplers,) = host.nodes["KSampler"].INPUT_TYPES()["required"]["sampler_name"][:1]
    assert samplers.count("flow_dpm") == 1 and "euler" in samplers


def test_every_solver_is_in_the_list_of_ksampler_once(host: Host) -> None:
    """Under our name, or under the host's if it has the solver already, which then takes the same steps."""
    in_core = host.pack("nodes.host.sampler").IN_CORE
    (samplers,) = host.nodes["KSampler"].INPUT_TYPES()["required"]["sampler_name"][:1]
    assert all(samplers.count(in_core.get(name, name)) == 1 for name in SOLVERS)
    assert not {*in_core} & {*samplers}
    assert in_core == {"flow_euler": "euler"}
    x, sigmas = torch.randn(1, 32, 3, 4, generator=torch.Generator().manual_seed(0)), flow_sigmas(5, 3.0)
    theirs = comfy.k_diffusion.sampling.sample_euler(lambda x, sigma: torch.sin(3 * x) * sigma, x, sigmas, disable=True)
    assert difference(flow_euler(lambda x, sigma: torch.sin(3 * x) * sigma, x, sigmas), theirs) <= EQUAL


def test_sampler_custom_advanced_with_our_parts(small: Small) -> None:
    host, latent = small.host, small.empty()
    (sigmas,) = host.call("FlowDPMScheduler", model=small.model, steps=STEPS, denoise=1.0, flow_shift=0.0)
    (solver,) = host.call("FlowDPMSolver")
    prompts = {"positive": small.positive, "negative": small.negative}
    (guider,) = host.call("SanaGuider", model=small.model, **prompts, cfg=4.5, guidance_from=0.0, guidance_to=1.0)
    (noise,) = host.call("RandomNoise", noise_seed=SEED)
    output, denoised = host.call(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=solver, sigmas=sigmas, latent_image=latent
    )
    assert torch.equal(sigmas, flow_sigmas(STEPS, small.pipeline.identity.flow_shift))
    theirs = small.reference(comfy.k_diffusion.sampling.sample_flow_dpm, sigmas, latent)
    assert difference(output["samples"], theirs) <= EQUAL
    # The schedule ends at 0, where the last estimate is the result.
    assert difference(denoised["samples"], theirs) <= EQUAL


def test_core_guider_and_sampler_select_take_our_model(small: Small) -> None:
    """Without our nodes: CFGGuider, KSamplerSelect and BasicScheduler."""
    host = small.host
    (sigmas,) = host.call("BasicScheduler", model=small.model, scheduler="simple", steps=STEPS, denoise=1.0)
    (sampler,) = host.call("KSamplerSelect", sampler_name="flow_dpm")
    (guider,) = host.call("CFGGuider", model=small.model, positive=small.positive, negative=small.negative, cfg=4.5)
    (noise,) = host.call("RandomNoise", noise_seed=SEED)
    inputs = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": small.empty()}
    output = host.call("SamplerCustomAdvanced", **inputs)[0]["samples"]
    assert difference(output, small.ksampler(sampler_name="flow_dpm")) <= EQUAL


def test_image_to_image_gives_the_latent_of_the_pipeline(small: Small) -> None:
    image = picture()
    (latent,) = small.host.call("VAEEncode", pixels=image, vae=small.vae)
    ours = small.sample(latent=latent, denoise=0.6)
    options = {"negative": OTHER_PROMPT, "image": as_file(image), "strength": 0.6}
    assert difference(ours, pipeline_latent(small.pipeline, PROMPT, **options)) <= EQUAL
    assert difference(ours, latent["samples"]) > CHANGED


def test_inpainting_gives_the_latent_of_the_pipeline_and_keeps_the_rest(small: Small) -> None:
    image, mask = picture(), torch.zeros(1, HEIGHT, WIDTH)
    mask[:, :, : WIDTH // 2] = 1
    (latent,) = small.host.call("VAEEncode", pixels=image, vae=small.vae)
    (masked,) = small.host.call("SetLatentNoiseMask", samples=latent, mask=mask)
    ours = small.sample(latent=masked)
    options = {
        "negative": OTHER_PROMPT,
        "image": as_file(image),
        "mask": as_file(mask[..., None].expand(-1, -1, -1, 3)),
    }
    assert difference(ours, pipeline_latent(small.pipeline, PROMPT, **options)) <= EQUAL
    assert difference(ours[..., 2:], latent["samples"][..., 2:]) <= EQUAL
    for changed in (ours, small.ksampler(latent_image=masked, denoise=0.7)):
        assert difference(changed[..., 2:], latent["samples"][..., 2:]) <= EQUAL
        assert difference(changed[..., :2], latent["samples"][..., :2]) > CHANGED


# Sides of a picture and of a mask for it in px, what is white of the mask, and the cells that it touches.
MASKS = {
    "248 px, which the VAE cuts": ((248, 128), (248, 128), (slice(38, 42), slice(0, 128)), (slice(0, 1), slice(0, 4))),
    "what the VAE cuts off": ((248, 128), (248, 128), (slice(0, 12), slice(0, 128)), (slice(0, 0), slice(0, 0))),
    "the last row that is left": ((248, 128), (248, 128), (slice(235, 236), slice(0, 1)), (slice(6, 7), slice(0, 1))),
    "cut on both sides": ((100, 150), (100, 150), (slice(34, 35), slice(43, 44)), (slice(1, 2), slice(1, 2))),
    "a stroke of a pixel between middles": (
        (96, 128),
        (96, 128),
        (slice(31, 33), slice(0, 1)),
        (slice(0, 2), slice(0, 1)),
    ),
    "half the size": ((96, 128), (48, 64), (slice(16, 17), slice(63, 64)), (slice(1, 2), slice(3, 4))),
    "a pixel a cell": ((96, 128), (3, 4), (slice(2, 3), slice(1, 2)), (slice(2, 3), slice(1, 2))),
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("sampler", ["sample", "ksampler", "custom"])
def test_a_mask_paints_the_cells_that_it_touches_and_no_other(small: Small, case: str, sampler: str) -> None:
    """By our sampler, by KSampler and by SamplerCustomAdvanced."""
    size, mask_size, white, cells = MASKS[case]
    mask = torch.zeros(1, *mask_size)
    mask[:, white[0], white[1]] = 1
    (latent,) = small.host.call("VAEEncode", pixels=picture(*size), vae=small.vae)
    (masked,) = small.host.call("SetLatentNoiseMask", samples=latent, mask=mask)
    if sampler == "custom":
        (noise,) = small.host.call("RandomNoise", noise_seed=SEED)
        (guider,) = small.host.call("BasicGuider", model=small.model, conditioning=small.positive)
        (solver,) = small.host.call("FlowDPMSolver")
        sigmas = torch.tensor([0.9, 0.5, 0.0])
        inputs = {"noise": noise, "guider": guider, "sampler": solver, "sigmas": sigmas, "latent_image": masked}
        found = small.host.call("SamplerCustomAdvanced", **inputs)[0]["samples"]
    else:
        changes = {"latent": masked} if sampler == "sample" else {"latent_image": masked}
        found = getattr(small, sampler)(**changes)
    painted = (found - latent["samples"]).abs().amax(dim=(0, 1)) > EQUAL
    expected = torch.zeros_like(painted)
    expected[cells] = True
    assert torch.equal(painted, expected)


def test_a_mask_smaller_than_a_cell_is_followed(small: Small) -> None:
    """As by the pipeline. The pixels in the middle of the cells, which the host would look at, are not in it."""
    image, mask = picture(), torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 2:8, 34:40] = 1
    (latent,) = small.host.call("VAEEncode", pixels=image, vae=small.vae)
    (masked,) = small.host.call("SetLatentNoiseMask", samples=latent, mask=mask)
    ours = small.sample(latent=masked)
    drawn = as_file(mask[..., None].expand(-1, -1, -1, 3))
    options = {"negative": OTHER_PROMPT, "image": as_file(image), "mask": drawn}
    assert difference(ours, pipeline_latent(small.pipeline, PROMPT, **options)) <= EQUAL
    changed = (ours - latent["samples"]).abs().amax(dim=(0, 1)) > CHANGED
    assert changed.nonzero().tolist() == [[0, 1]]


def test_vae_encode_for_inpaint_and_sampling(small: Small) -> None:
    """With older nodes for SANA tiled encoding and encoding for inpainting crashed."""
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, : HEIGHT // 3] = 1
    (latent,) = small.host.call("VAEEncodeForInpaint", pixels=picture(), vae=small.vae, mask=mask, grow_mask_by=0)
    grey = torch.where(mask[..., None] > 0, torch.tensor(0.5), picture())
    assert difference(latent["samples"], small.vae.encode(grey)) <= EQUAL
    ours = small.sample(latent=latent)
    assert difference(ours[:, :, 1:], latent["samples"][:, :, 1:]) <= EQUAL
    assert difference(ours[:, :, :1], latent["samples"][:, :, :1]) > CHANGED


def sprint_latents(host: Host, model: object, small: Small, batch_size: int = 1, **changes: object) -> Tensor:
    options = {"steps": 2, "max_angle": 1.5708, "intermediate_angle": 1.3, "paper_angles": False}
    (sigmas,) = host.call("SCMScheduler", **options)
    inputs = {"positive": small.positive, "latent": small.empty(batch_size), "sigmas": sigmas, **changes}
    return host.call("SCMSampler", model=model, seed=SEED, guidance=4.5, **inputs)[0]["samples"]


@pytest.fixture(scope="module")
def sprint(small: Small) -> object:
    return load(small.host, write_variant(small.host, SPRINT).name)[0]


def test_sprint_gives_the_latents_of_the_pipeline_in_a_batch(small: Small, sprint: object) -> None:
    """With older nodes for SANA Sprint crashed for a batch of two."""
    pipeline = load_pipeline(write_variant(small.host, SPRINT))
    latents = sprint_latents(small.host, sprint, small, 2)
    assert difference(latents, pipeline_latent(pipeline, PROMPT, 2, steps=2)) <= EQUAL
    assert difference(latents[:1], sprint_latents(small.host, sprint, small)) <= EQUAL


def test_sana_goes_on_from_a_draft_of_sprint(small: Small, sprint: object) -> None:
    """Its latent is clean and has the scale of every SANA: SANA puts the noise of the draft's own seed on it."""
    (chosen,) = small.host.call(
        "LatentFromBatch", samples={"samples": sprint_latents(small.host, sprint, small, 3)}, batch_index=1, length=1
    )
    drafts = pipeline_latent(load_pipeline(write_variant(small.host, SPRINT)), PROMPT, 3, steps=2)
    assert difference(chosen["samples"], drafts[1:2]) <= EQUAL
    draft = drafts[1:2] * LATENT_SCALE
    options = {"negative": OTHER_PROMPT, "image": as_file(picture()), "strength": 0.5}
    settings = sana.Settings(height=HEIGHT, width=WIDTH, seed=SEED + 1, steps=STEPS, **options)
    plan = small.pipeline.plan(PROMPT, settings)
    (inputs,) = small.pipeline.prepare([plan])
    first, *_, last = small.pipeline.follow(plan, inputs._replace(image=draft))
    noise = noise_source(draft.shape[1:], [SEED + 1])()
    assert difference(first.x, torch.lerp(draft, noise, float(plan.sigmas[0]))) <= EQUAL
    finished = small.sample(latent=chosen, denoise=0.5)
    assert difference(finished, last.next_x / LATENT_SCALE) <= EQUAL
    assert difference(finished, chosen["samples"]) > CHANGED


@pytest.mark.parametrize("max_angle", [1.5458, 1.3])
def test_sprint_starts_from_noise_at_every_angle(small: Small, sprint: object, max_angle: float) -> None:
    pipeline = load_pipeline(write_variant(small.host, SPRINT))
    sigmas = angle_sigmas(scm_angles(2, max_angle=max_angle, intermediate_angle=1.0))
    settings = sana.Settings(height=HEIGHT, width=WIDTH, seed=SEED, steps=2)
    *_, last = pipeline.follow(replace(pipeline.plan(PROMPT, settings), sigmas=sigmas))
    assert difference(sprint_latents(small.host, sprint, small, sigmas=sigmas), last.next_x / LATENT_SCALE) <= EQUAL


@pytest.mark.newest
@pytest.mark.parametrize(("max_angle", "masked", "said"), [(1.5708, False, 1), (1.3, False, 0), (1.5708, True, 0)])
def test_sprint_says_when_it_keeps_nothing_of_a_picture(
    small: Small, sprint: object, caplog: pytest.LogCaptureFixture, max_angle: float, masked: bool, said: int
) -> None:
    latent = {"samples": small.vae.encode(picture())}
    if masked:
        latent["noise_mask"] = torch.ones(1, HEIGHT, WIDTH)
    angle = torch.tensor([max_angle, 0.0])
    with caplog.at_level(logging.INFO):
        sprint_latents(small.host, sprint, small, latent=latent, sigmas=angle.sin() / (angle.sin() + angle.cos()))
    assert sum("Nothing of the picture is kept" in message for message in caplog.messages) == said


def test_sprint_in_core_nodes_takes_its_own_time_and_no_second_guidance(small: Small, sprint: object) -> None:
    (shifted,) = small.host.call("ModelSamplingSD3", model=sprint, shift=1.0)
    ours = small.ksampler(model=sprint, cfg=1.0, steps=2)
    assert difference(small.ksampler(model=shifted, cfg=1.0, steps=2), ours) <= EQUAL
    with pytest.raises(ValueError, match=r"^SANA-Sprint takes its guidance as an input, .*: set cfg to 1, not 4.5, or"):
        small.ksampler(model=sprint)


def test_model_is_not_copied_for_the_convention_it_has(small: Small) -> None:
    """For a copy the host would load the checkpoint again in every run with LoRA hooks."""
    follow = small.host.pack("nodes.host.sampler").with_mask_convention
    assert follow(small.model, "nvlabs") is small.model
    other = follow(small.model, "diffusers")
    assert other is not small.model and follow(other, "diffusers") is other


def test_sprint_schedule_suits_other_samplers(small: Small, sprint: object) -> None:
    """Noise levels are at most 1, and the angle that the node begins with is above pi / 2, by 4e-6."""
    angles = {"steps": 2, "max_angle": 1.5708, "intermediate_angle": 1.3, "paper_angles": False}
    (sigmas,) = small.host.call("SCMScheduler", **angles)
    assert float(sigmas.max()) == 1
    (sampler,) = small.host.call("KSamplerSelect", sampler_name="flow_dpm")
    inputs = {"positive": small.positive, "negative": small.negative, "latent_image": small.empty(), "cfg": 1.0}
    more = {"sampler": sampler, "sigmas": sigmas, "add_noise": True, "noise_seed": SEED}
    assert bool(small.host.call("SamplerCustom", model=sprint, **inputs, **more)[0]["samples"].isfinite().all())


def test_no_steps_leave_a_latent_as_it_is(small: Small, sprint: object) -> None:
    (sigmas,) = small.host.call("BasicScheduler", model=sprint, scheduler="simple", steps=2, denoise=0.0)
    latent = small.empty()
    assert torch.equal(sprint_latents(small.host, sprint, small, latent=latent, sigmas=sigmas), latent["samples"])


def test_sprint_follows_its_sigmas(small: Small, sprint: object) -> None:
    """The Sprint sampler of older nodes ran its own schedule, whatever it was given."""
    seen: list[float] = []
    network = sprint.model.diffusion_model
    handle = network.register_forward_pre_hook(lambda module, arguments: seen.append(float(arguments[1][0])))
    latent = {"samples": small.vae.encode(picture())}
    sprint_latents(small.host, sprint, small, latent=latent, sigmas=torch.tensor([0.3, 0.1, 0.0]))
    handle.remove()
    assert seen == pytest.approx([0.3, 0.1])


def test_previews_get_the_denoised_latent(small: Small) -> None:
    """People saw previews of the raw prediction, which looked like noise. The last estimate is the result."""
    seen: list[Tensor] = []
    sigmas = flow_sigmas(STEPS, 3.0)
    model = small.host.pack("nodes.host.sampler")
    guider = model.SanaGuidance(small.model)
    guider.set_conds(small.positive, small.negative)
    noise = comfy.sample.prepare_noise(small.empty()["samples"], SEED)
    out = guider.sample(
        noise,
        small.empty()["samples"],
        model.flow_dpm_sampler(),
        sigmas,
        callback=lambda step, denoised, x, total: seen.append(denoised),
        disable_pbar=True,
        seed=SEED,
    )
    assert len(seen) == STEPS
    assert difference(seen[-1] / LATENT_SCALE, out) <= EQUAL


@pytest.mark.parametrize("variant", ["sana-1.5-1.6b-1024px", "sana-1.6b-2048px", "sana-1.6b-4096px"])
def test_every_structure_gives_the_latents_of_our_network(small: Small, variant: str) -> None:
    """With older nodes for SANA SANA-1.5 ran without the norms of its cross-attention."""
    path = write_variant(small.host, variant)
    model = load(small.host, path.name)[0]
    (sigmas,) = small.host.call("FlowDPMScheduler", model=model, steps=STEPS, denoise=1.0, flow_shift=0.0)
    assert torch.equal(sigmas, flow_sigmas(STEPS, VARIANTS[variant].flow_shift))
    ours = small.sample(model=model)
    assert difference(ours, pipeline_latent(load_pipeline(path), PROMPT, negative=OTHER_PROMPT)) <= EQUAL


def test_demo_gives_the_latent_of_the_pipeline(small: Small) -> None:
    model, clip, vae = load(small.host, "demo", "auto")
    own = replace(small, model=model, clip=clip, vae=vae)
    theirs = pipeline_latent(sana.SanaPipeline.load("demo"), PROMPT, negative=OTHER_PROMPT)
    assert difference(own.sample(cfg=2.0), theirs) <= EQUAL


def test_interrupt_stops_sampling_and_the_next_run_is_right(small: Small) -> None:
    before = small.sample()
    handle = small.model.model.diffusion_model.register_forward_pre_hook(
        lambda module, arguments: comfy.model_management.interrupt_current_processing()
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        small.sample(steps=50)
    handle.remove()
    assert torch.equal(small.sample(), before)
