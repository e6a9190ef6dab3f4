"""Pictures against those of diffusers' pipelines, with the same weights and the same noise."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPAGPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from diffusers import SanaPipeline as DiffusersPipeline
from peft import LoraConfig
from torch import Tensor
from transformers import Gemma2Model

from sana.pipeline import SanaPipeline
from sana.text.prompt import DIFFUSERS_INSTRUCTION, INSTRUCTION
from tests.sana.adapted import adapted, save_as_diffusers
from tests.sana.models import PROMPTS, TRANSFORMER, reference_text, reference_tokenizer
from tests.sana.pipeline.drawing import SIZE, drawn, picture, sample

EQUAL = 1e-4  # of pixels in [0, 1]; measured: 5e-6
DIFFERENT = 0.01  # mean over the pixels; what another prompt, block or scale changes at least


@pytest.fixture(scope="module")
def parts(folder: Path) -> dict[str, object]:
    return diffusers_parts(folder)


@pytest.fixture(scope="module")
def sprint_parts(sprint_folder: Path) -> dict[str, object]:
    return {**diffusers_parts(sprint_folder), "scheduler": SCMScheduler()}


def diffusers_parts(folder: Path) -> dict[str, object]:
    """The networks of a folder as diffusers and transformers read them."""
    gemma = Gemma2Model.from_pretrained(folder / "text_encoder", dtype=torch.float32, attn_implementation="eager")
    return {
        "tokenizer": reference_tokenizer(folder / "tokenizer"),
        "text_encoder": gemma,
        "vae": AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        "transformer": SanaTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
        "scheduler": DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler"),
    }


def expected_images(pipeline: DiffusionPipeline, prompts: list[str] | None, steps: int, **options: object) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        prompts, num_inference_steps=steps, use_resolution_binning=False, output_type="pt", **SIZE, **options
    )
    return found.images


@torch.no_grad()
def images(pipeline: SanaPipeline, prompts: list[str], **options: object) -> Tensor:
    """Images in [0, 1] before they are rounded to 8 bits."""
    latent = sample(pipeline, prompts, **options) / pipeline.autoencoder.config.latent_scale
    return pipeline.autoencoder.decode(latent).add(1).div(2).clamp(0, 1)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("steps", [4, 20])
def test_pictures_are_those_of_diffusers(
    pipeline: SanaPipeline, parts: dict[str, object], steps: int, guidance_scale: float
) -> None:
    prompts = [PROMPTS[0], PROMPTS[3]]
    expected = expected_images(
        DiffusersPipeline(**parts),
        prompts,
        steps,
        guidance_scale=guidance_scale,
        negative_prompt=["Blurry"] * 2,
        latents=drawn(5, 6),
    )
    options = {"steps": steps, "guidance_scale": guidance_scale, "seed": 5, "reference": "diffusers"}
    found = images(pipeline, prompts, negative="Blurry", **options)
    assert difference(found, expected) < EQUAL
    for prompt in (PROMPTS[1], PROMPTS[2]):
        assert (images(pipeline, [prompt] * 2, negative="Blurry", **options) - found).abs().mean() > DIFFERENT
    other = (images(pipeline, prompts, negative="Sharp", **options) - found).abs().mean()
    assert other > DIFFERENT if guidance_scale > 1 else other == 0


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_pictures_with_a_lora_are_those_of_diffusers(
    folder: Path, parts: dict[str, object], tmp_path: Path, strength: float
) -> None:
    """The file is as diffusers' training writes it, with rank and alpha in its header."""
    network, _ = adapted(TRANSFORMER, LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v", "conv_point"]))
    lora = save_as_diffusers(network, tmp_path)
    theirs = DiffusersPipeline(
        **{**parts, "transformer": SanaTransformer2DModel.from_pretrained(folder / "transformer")}
    )
    theirs.load_lora_weights(tmp_path, adapter_name="style")
    theirs.set_adapters("style", strength)
    expected = expected_images(theirs, [PROMPTS[0]], 4, negative_prompt=[""], latents=drawn(5))
    options = {"steps": 4, "seed": 5, "reference": "diffusers"}
    found = images(SanaPipeline.load(folder, loras=[(lora, strength)]), [PROMPTS[0]], **options)
    assert difference(found, expected) < EQUAL
    assert (images(SanaPipeline.load(folder), [PROMPTS[0]], **options) - found).abs().mean() > DIFFERENT


def test_pictures_by_the_rules_of_nvlabs_are_those_of_diffusers_given_their_text(
    pipeline: SanaPipeline, parts: dict[str, object]
) -> None:
    prompts = [PROMPTS[0], PROMPTS[3]]
    text, text_mask = reference_text(parts["text_encoder"], parts["tokenizer"], prompts, INSTRUCTION)
    negative, _ = reference_text(parts["text_encoder"], parts["tokenizer"], ["Blurry"] * 2, None)
    expected = expected_images(
        DiffusersPipeline(**parts),
        None,
        20,
        prompt_embeds=text,
        prompt_attention_mask=text_mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=text_mask,
        negative_prompt=None,
        latents=drawn(5, 6),
    )
    assert difference(images(pipeline, prompts, negative="Blurry", seed=5), expected) < EQUAL


class WholeTimesteps(FlowMatchEulerDiscreteScheduler):
    """diffusers leaves it to the scheduler to truncate timesteps, which this one does not; NVlabs' network does."""

    def set_timesteps(self, *arguments: object, **options: object) -> None:
        super().set_timesteps(*arguments, **options)
        self.timesteps = self.timesteps.floor()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_pictures_by_flow_euler_are_those_of_diffusers(
    pipeline: SanaPipeline, parts: dict[str, object], guidance_scale: float
) -> None:
    scheduler = WholeTimesteps(shift=pipeline.identity.flow_shift)
    expected = expected_images(
        DiffusersPipeline(**{**parts, "scheduler": scheduler}),
        [PROMPTS[0]],
        8,
        guidance_scale=guidance_scale,
        latents=drawn(5),
    )
    options = {"steps": 8, "guidance_scale": guidance_scale, "seed": 5, "solver": "flow_euler"}
    found = images(pipeline, [PROMPTS[0]], reference="diffusers", **options)
    assert difference(found, expected) < EQUAL


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("blocks", [[1], [0, 2]])
def test_pictures_with_perturbed_attention_are_those_of_diffusers(
    pipeline: SanaPipeline, parts: dict[str, object], blocks: list[int], guidance_scale: float
) -> None:
    network = {
        "transformer": SanaTransformer2DModel.from_config(parts["transformer"].config)
    }  # its layers are replaced
    network["transformer"].load_state_dict(parts["transformer"].state_dict())
    layers = [f"transformer_blocks.{block}" for block in blocks]
    expected = expected_images(
        SanaPAGPipeline(**{**parts, **network}, pag_applied_layers=layers),
        [PROMPTS[0]],
        8,
        guidance_scale=guidance_scale,
        pag_scale=2.0,
        latents=drawn(5),
    )
    options = {"steps": 8, "guidance_scale": guidance_scale, "pag_scale": 2.0, "seed": 5, "reference": "diffusers"}
    found = images(pipeline, [PROMPTS[0]], pag_blocks=blocks, **options)
    assert difference(found, expected) < EQUAL
    assert (images(pipeline, [PROMPTS[0]], pag_blocks=[], **options) - found).abs().mean() > DIFFERENT


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_pictures_of_sprint_are_those_of_diffusers(
    sprint: SanaPipeline, sprint_parts: dict[str, object], steps: int
) -> None:
    prompts = [PROMPTS[0].lower(), PROMPTS[2]]
    options = {"intermediate_timesteps": 1.3 if steps == 2 else None, "guidance_scale": 4.0}
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = expected_images(SanaSprintPipeline(**sprint_parts), prompts, steps, generator=generators, **options)
    settings = {"steps": steps, "seed": 5, "instruction": DIFFUSERS_INSTRUCTION}
    found = images(sprint, prompts, guidance_scale=4.0, **settings)
    assert difference(found, expected) < EQUAL
    assert (images(sprint, [PROMPTS[1]] * 2, guidance_scale=4.0, **settings) - found).abs().mean() > DIFFERENT
    assert (images(sprint, prompts, guidance_scale=40.0, **settings) - found).abs().mean() > DIFFERENT


def test_sprint_follows_the_reference_that_is_asked_for(sprint: SanaPipeline, sprint_parts: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(5)
    expected = expected_images(SanaSprintPipeline(**sprint_parts), [PROMPTS[0]], 2, generator=generator)
    found = images(sprint, [PROMPTS[0]], seed=5, reference="diffusers")
    assert difference(found, expected) < EQUAL


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.4), (2, 0.6), (2, 1.0), (4, 0.5), (4, 0.3)])
def test_pictures_of_sprint_from_a_picture_are_those_of_diffusers(
    sprint: SanaPipeline, sprint_parts: dict[str, object], steps: int, strength: float
) -> None:
    expected = expected_images(
        SanaSprintImg2ImgPipeline(**sprint_parts),
        [PROMPTS[2]],
        steps,
        image=picture(),
        strength=strength,
        intermediate_timesteps=1.3 if steps == 2 else None,
        generator=torch.Generator().manual_seed(5),
    )
    options = {"steps": steps, "strength": strength, "seed": 5, "instruction": DIFFUSERS_INSTRUCTION}
    found = images(sprint, [PROMPTS[2]], image=picture(), **options)
    assert difference(found, expected) < EQUAL
    if steps * strength <= steps - 1:  # else it starts at pure noise
        assert (images(sprint, [PROMPTS[2]], image=picture(1), **options) - found).abs().mean() > DIFFERENT


def test_the_two_references_draw_different_pictures(pipeline: SanaPipeline) -> None:
    found = [sample(pipeline, PROMPTS[0], reference=reference) for reference in ("nvlabs", "diffusers")]
    assert (found[0] - found[1]).abs().mean() > 0.1
