"""Settings resolved for a model, without the model."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor

from sana.config import VARIANTS, TransformerIdentity
from sana.plan import Plan, Settings, make_plan
from sana.sampling.schedule import angle_sigmas, flow_euler_sigmas, flow_sigmas, partial_sigmas, scm_angles
from sana.text.prompt import DIFFUSERS_INSTRUCTION, INSTRUCTION

IMAGE = Image.new("RGB", (1000, 700))
FLOW_SHIFT, GUIDANCE_SCALE = 2.5, 3.5


def plan(*prompts: str, variant: str = "sana-1.6b-1024px", **options: object) -> Plan:
    row = VARIANTS[variant]
    shift = FLOW_SHIFT if row.flow_shift else None
    identity = TransformerIdentity(row.transformer, variant, row.base_size, shift, row.dtype, "a test", GUIDANCE_SCALE)
    return make_plan(prompts or ("A Cat",), Settings(**options), identity, 32)


def test_what_is_not_given_is_that_of_the_model() -> None:
    found = plan("A Cat", "a dog", seed=7)
    assert (found.prompts, found.texts) == (("A Cat", "a dog"),) * 2
    assert (found.seeds, found.size, found.steps, found.step_count) == ((7, 8), (1024, 1024), 20, 20)
    assert torch.equal(found.sigmas, flow_sigmas(20, FLOW_SHIFT))
    assert (found.instruction, found.negative) == (INSTRUCTION, "")
    guidance = found.guidance
    assert (guidance.scale, guidance.interval, guidance.perturbed_scale) == (GUIDANCE_SCALE, (0.0, 1.0), 0.0)
    assert guidance.perturbed_blocks == {VARIANTS["sana-1.6b-1024px"].transformer.perturbed_block}


def test_what_is_given_counts() -> None:
    options = {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.9), "pag_scale": 1.5, "pag_blocks": [0, 3]}
    found = plan(height=512, width=768, steps=7, flow_shift=4.0, negative="Blurry", instruction=None, **options)
    assert (found.size, found.steps, found.instruction, found.negative) == ((512, 768), 7, None, "Blurry")
    assert torch.equal(found.sigmas, flow_sigmas(7, 4.0))
    assert (found.guidance.scale, found.guidance.interval) == (2.0, (0.1, 0.9))
    assert (found.guidance.perturbed_scale, found.guidance.perturbed_blocks) == (1.5, {0, 3})
    assert plan(guidance_scale=0.0).guidance.scale == 0  # which is a number, and not nothing


def test_diffusers_has_lower_case_and_an_instruction_of_its_own() -> None:
    found = plan("A Cat", reference="diffusers", negative="Blurry")
    assert (found.prompts, found.texts, found.negative) == (("A Cat",), ("a cat",), "blurry")
    assert (found.instruction, found.guidance.mask_convention) == (DIFFUSERS_INSTRUCTION, "diffusers")
    for given in (None, "draw this: "):
        assert plan(reference="diffusers", instruction=given).instruction == given


def test_without_guidance_no_negative_prompt_is_encoded() -> None:
    assert plan(guidance_scale=1.0, negative="blurry").negative is None
    assert plan(variant="sana-sprint-1.6b-1024px").negative is None


@pytest.mark.parametrize(("solver", "grid"), [("flow_dpm", flow_sigmas), ("flow_euler", flow_euler_sigmas)])
def test_a_whole_schedule_is_that_of_the_solver_and_a_part_is_the_same_for_all(
    solver: str, grid: Callable[[int, float], Tensor]
) -> None:
    assert torch.equal(plan(solver=solver, steps=6).sigmas, grid(6, FLOW_SHIFT))
    assert torch.equal(plan(solver=solver, steps=6, image=IMAGE, strength=1.0).sigmas, grid(6, FLOW_SHIFT))
    part = plan(solver=solver, steps=6, image=IMAGE, strength=0.3)
    assert torch.equal(part.sigmas, partial_sigmas(6, FLOW_SHIFT, 0.3))
    assert (part.steps, part.step_count) == (6, 6)


@pytest.mark.parametrize(
    ("options", "skipped"),
    [({}, 0), ({"steps": 4}, 0), ({"image": IMAGE}, 1), ({"steps": 4, "image": IMAGE, "strength": 0.3}, 2)],
)
def test_the_schedule_of_sprint_is_one_of_angles_of_which_an_image_skips_the_first(
    options: dict[str, object], skipped: int
) -> None:
    found = plan(variant="sana-sprint-1.6b-1024px", **options)
    assert found.steps == options.get("steps", 2)
    assert torch.equal(found.sigmas, angle_sigmas(scm_angles(found.steps))[skipped:])


def test_a_record_says_what_was_asked_for_and_what_it_came_to() -> None:
    found = plan("A Cat", "a dog", seed=7, image=IMAGE, pag_scale=1.0, max_bytes=10**9, reference="diffusers")
    assert found.record(1) == {
        "prompt": "a dog",
        "seed": 8,
        "model": "sana-1.6b-1024px",
        "steps": 20,
        "pag_scale": 1.0,
        "reference": "diffusers",
        "image": "given",
        "guidance_scale": GUIDANCE_SCALE,
        "height": 672,
        "width": 992,
    }
    assert found.record()["prompt"] == "A Cat"
