"""Whole pipelines against those of diffusers on the same weights and the same noise, and what a caller can rely on."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
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
from PIL import Image
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import Gemma2Model

from sana.autoencoder import DCAutoencoder
from sana.files import CheckpointError
from sana.pipeline import SamplingError, SanaPipeline, Settings
from sana.prompt import DIFFUSERS_INSTRUCTION, INSTRUCTION
from sana.schedule import flow_sigmas, partial_sigmas
from sana.solvers import Step
from sana.transformer import SanaTransformer
from tests.sana.models import PROMPTS, SPRINT, reference_text, reference_tokenizer, write_model
from tests.sana.networks import tiny_autoencoder_config, tiny_config

HEIGHT, WIDTH = 64, 96
SIZE = {"height": HEIGHT, "width": WIDTH}
EQUAL = 1e-4  # of pixels in [0, 1]; measured: 5e-6
DIFFERENT = 0.01  # mean over the pixels; what another prompt, block or scale changes at least


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def sprint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sprint"), SPRINT)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> SanaPipeline:
    return SanaPipeline.load(folder)


@pytest.fixture(scope="module")
def loaded_sprint(sprint_folder: Path) -> SanaPipeline:
    return SanaPipeline.load(sprint_folder)


def same_parts(pipeline: SanaPipeline) -> SanaPipeline:
    """Another pipeline of the same networks, whose attributes a test may change."""
    return SanaPipeline(pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder, pipeline.identity)


@pytest.fixture
def pipeline(loaded: SanaPipeline) -> SanaPipeline:
    return same_parts(loaded)


@pytest.fixture
def sprint(loaded_sprint: SanaPipeline) -> SanaPipeline:
    return same_parts(loaded_sprint)


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


def sample(pipeline: SanaPipeline, prompt: str | list[str], batch_size: int = 1, **options: object) -> Tensor:
    """The latent that sampling ends at."""
    *_, last = pipeline.sample(prompt, Settings(**{**SIZE, **options}), batch_size=batch_size)
    return last.next_x


@torch.no_grad()
def images(pipeline: SanaPipeline, prompts: list[str], **options: object) -> Tensor:
    """Images in [0, 1] before they are rounded to 8 bits."""
    latent = sample(pipeline, prompts, **options) / pipeline.autoencoder.config.latent_scale
    return pipeline.autoencoder.decode(latent).add(1).div(2).clamp(0, 1)


def drawn(*seeds: int) -> Tensor:
    """The noise of pictures with these seeds."""
    shape = (1, 32, HEIGHT // 32, WIDTH // 32)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def picture(seed: int = 0) -> Image.Image:
    """Smooth coloured noise."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def half_mask() -> Image.Image:
    """White, to be painted anew, in the right two thirds: two of three columns of the latent."""
    mask = Image.new("L", (WIDTH, HEIGHT), 0)
    mask.paste(255, (32, 0, WIDTH, HEIGHT))
    return mask


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


STARTS = {
    "noise": {},
    "picture": {"image": picture(), "strength": 0.6},
    "mask": {"image": picture(), "mask": half_mask()},
}


@pytest.mark.parametrize("start", STARTS)
def test_picture_k_of_a_batch_is_that_of_seed_plus_k_alone(pipeline: SanaPipeline, start: str) -> None:
    options = {"steps": 4, **STARTS[start]}
    batch = sample(pipeline, PROMPTS[0], batch_size=3, seed=7, **options)
    for k in range(3):
        alone = sample(pipeline, PROMPTS[0], seed=7 + k, **options)
        torch.testing.assert_close(batch[k : k + 1], alone, rtol=0, atol=1e-4)  # float32 sums in another order
    assert (batch[0] - batch[1]).abs().mean() > 0.1


@pytest.mark.parametrize("start", ["noise", "picture"])
def test_picture_k_of_a_sprint_batch_is_that_of_seed_plus_k_alone(sprint: SanaPipeline, start: str) -> None:
    options = {"steps": 4, **STARTS[start]}
    batch = sample(sprint, PROMPTS[0], batch_size=3, seed=7, **options)
    for k in range(3):
        alone = sample(sprint, PROMPTS[0], seed=7 + k, **options)
        torch.testing.assert_close(batch[k : k + 1], alone, rtol=0, atol=1e-4)
    assert (batch[0] - batch[1]).abs().mean() > 0.1


@pytest.mark.parametrize("reference", ["nvlabs", "diffusers"])
def test_several_prompts_are_drawn_as_each_alone(pipeline: SanaPipeline, reference: str) -> None:
    prompts = [*PROMPTS, ""]
    options = {"steps": 4, "negative": "blurry, distorted", "reference": reference}
    batch = sample(pipeline, prompts, seed=7, **options)
    for k, prompt in enumerate(prompts):
        alone = sample(pipeline, prompt, seed=7 + k, **options)
        torch.testing.assert_close(batch[k : k + 1], alone, rtol=0, atol=1e-4)


def test_a_seed_means_the_same_picture(pipeline: SanaPipeline) -> None:
    pictures = [pipeline(PROMPTS[0], steps=2, seed=seed, **SIZE)[0].tobytes() for seed in (0, 0, 1, -1, 2**31)]
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 4


def test_the_call_returns_pictures_of_the_size_asked_for(pipeline: SanaPipeline) -> None:
    found = pipeline(PROMPTS[0], batch_size=2, steps=2, **SIZE)
    assert [(picture.mode, picture.size) for picture in found] == [("RGB", (WIDTH, HEIGHT))] * 2
    assert [picture.size for picture in pipeline([*PROMPTS], steps=1)] == [(64, 64)] * len(PROMPTS)  # its base size


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_a_picture_to_start_from_is_put_at_the_noise_level_of_the_strength(
    pipeline: SanaPipeline, strength: float
) -> None:
    options = {"image": picture(), "strength": strength, "steps": 6, **SIZE}
    first, *_, last = pipeline.sample(PROMPTS[0], Settings(**options))
    clean = encoded(pipeline, picture())
    sigmas = partial_sigmas(6, pipeline.identity.flow_shift, strength)
    assert last.index == 5
    torch.testing.assert_close(first.x, (1 - sigmas[0]) * clean + sigmas[0] * drawn(0), rtol=0, atol=1e-4)
    if strength == 1:
        assert sigmas[0] == flow_sigmas(6, pipeline.identity.flow_shift)[0] > 0.999


def test_less_strength_keeps_more_of_the_picture(pipeline: SanaPipeline) -> None:
    clean = encoded(pipeline, picture())
    changes = [
        float((sample(pipeline, "", image=picture(), strength=strength, steps=6) - clean).norm())
        for strength in (0.05, 0.3, 0.6, 1.0)
    ]
    assert changes == sorted(changes)
    assert changes[0] < 0.5 * changes[-1]


@torch.no_grad()
def encoded(pipeline: SanaPipeline, picture: Image.Image) -> Tensor:
    image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    return pipeline.autoencoder.encode(image) * pipeline.autoencoder.config.latent_scale


@pytest.mark.parametrize("solver", ["flow_dpm", "flow_euler"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_keeps_the_latent_outside_the_mask(pipeline: SanaPipeline, strength: float, solver: str) -> None:
    options = {"image": picture(), "mask": half_mask(), "strength": strength, "steps": 5, "solver": solver}
    latent = sample(pipeline, PROMPTS[0], batch_size=2, **options)
    clean = encoded(pipeline, picture()).expand_as(latent)
    torch.testing.assert_close(latent[..., :1], clean[..., :1], rtol=0, atol=1e-5)
    assert (latent - clean)[..., 1:].abs().mean() > 0.5
    other = sample(pipeline, PROMPTS[1], batch_size=2, **options)
    assert (latent - other)[..., 1:].abs().mean() > 0.1


def test_a_picture_suggests_its_own_size_and_is_cut_to_the_one_asked_for(pipeline: SanaPipeline) -> None:
    wide = picture().resize((120, 65))
    assert pipeline.size(Settings(image=wide)) == (64, 96)
    assert pipeline.size(Settings(image=wide, height=32)) == (32, 96)
    assert pipeline.size(Settings(image=picture().resize((5, 5)))) == (32, 32)
    grey = wide.convert("LA")
    assert pipeline("", image=grey, mask=half_mask(), steps=1)[0].size == (96, 64)


def test_a_photo_far_larger_than_the_model_suggests_a_size_of_the_model(pipeline: SanaPipeline) -> None:
    assert pipeline.size(Settings(image=Image.new("RGB", (4000, 3000)))) == (64, 64)
    assert pipeline.size(Settings(image=Image.new("RGB", (1000, 4000)))) == (128, 32)


def test_a_picture_without_a_mask_is_kept_in_part(pipeline: SanaPipeline) -> None:
    half = sample(pipeline, "", image=picture(), strength=0.5, steps=4)
    assert torch.equal(sample(pipeline, "", image=picture(), steps=4), half)
    whole = sample(pipeline, "", image=picture(), mask=half_mask(), strength=1.0, steps=4)
    assert torch.equal(sample(pipeline, "", image=picture(), mask=half_mask(), steps=4), whole)


def test_sprint_says_when_it_keeps_nothing_of_a_picture(sprint: SanaPipeline, caplog: pytest.LogCaptureFixture) -> None:
    sample(sprint, "", image=picture())
    assert not caplog.messages
    sample(sprint, "", image=picture(), strength=0.6)
    assert [message for message in caplog.messages if "nothing of the image is kept" in message]


def test_a_thin_stroke_of_a_mask_is_painted(pipeline: SanaPipeline) -> None:
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (0, 20, WIDTH, 22))  # between the pixels that a bilinear sample would read
    clean = encoded(pipeline, picture())
    latent = sample(pipeline, PROMPTS[0], image=picture(), mask=mask, steps=3)
    assert (latent - clean)[:, :, 0].abs().mean() > 0.5
    torch.testing.assert_close(latent[:, :, 1], clean[:, :, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["noise", "picture"])
def test_too_little_memory_is_refused_before_sampling(pipeline: SanaPipeline, start: str) -> None:
    evaluations = count_evaluations(pipeline)
    with pytest.raises(ValueError, match=r"^max_bytes 1000 is too little for this size; it takes at least \d+$"):
        pipeline(PROMPTS[0], max_bytes=1000, **SIZE, **STARTS[start])
    assert not evaluations


SCARCE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


class SmallCard:
    """Half of an autoencoder, which raises an error instead of taking more than `enough` bytes."""

    def __init__(self, run: Callable[[Tensor, int | None], Tensor], error: RuntimeError) -> None:
        self.run, self.error, self.enough = run, error, 2**23

    def __call__(self, x: Tensor, max_bytes: int | None = None) -> Tensor:
        if max_bytes is None or max_bytes > self.enough:
            raise self.error
        return self.run(x, max_bytes)


@pytest.mark.parametrize("error", SCARCE, ids=str)
def test_decoding_goes_on_within_less_memory_after_running_out(
    pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: RuntimeError
) -> None:
    latent = sample(pipeline, PROMPTS[0], steps=1)
    expected = np.asarray(pipeline.pictures(latent)[0], np.int16)
    card = SmallCard(pipeline.autoencoder.decode, error)
    monkeypatch.setattr(pipeline.autoencoder, "decode", card)
    assert np.abs(np.asarray(pipeline.pictures(latent)[0], np.int16) - expected).max() <= 1
    assert len(caplog.messages) == 1 and "Out of memory in the autoencoder; going on" in caplog.messages[0]
    card.enough = 0
    with pytest.raises(type(error)) as caught:
        pipeline.pictures(latent)
    assert caught.value is error


@pytest.mark.parametrize("error", SCARCE, ids=str)
def test_encoding_goes_on_within_less_memory_after_running_out(
    pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: RuntimeError
) -> None:
    options = {"image": picture(), "strength": 0.5, "steps": 1}
    expected = sample(pipeline, PROMPTS[0], **options)
    monkeypatch.setattr(pipeline.autoencoder, "encode", SmallCard(pipeline.autoencoder.encode, error))
    torch.testing.assert_close(sample(pipeline, PROMPTS[0], **options), expected, rtol=0, atol=1e-4)
    assert len(caplog.messages) == 1 and "Out of memory in the autoencoder; going on" in caplog.messages[0]


def test_another_error_of_the_autoencoder_is_not_tried_again(
    pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error = RuntimeError("an illegal memory access was encountered")
    monkeypatch.setattr(pipeline.autoencoder, "decode", SmallCard(pipeline.autoencoder.decode, error))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pipeline.pictures(drawn(0))
    assert not caplog.messages


def test_a_caller_can_stop_early_and_decode_what_is_there(pipeline: SanaPipeline) -> None:
    evaluations = count_evaluations(pipeline)
    for step in pipeline.sample(PROMPTS[0], Settings(steps=20, **SIZE), batch_size=2):
        if step.index == 2:
            break
    assert len(evaluations) == 3
    assert [picture.size for picture in pipeline.pictures(step.denoised)] == [(WIDTH, HEIGHT)] * 2


def test_leaving_the_loop_cancels_and_the_next_call_starts_anew(pipeline: SanaPipeline) -> None:
    settings = Settings(steps=4, **SIZE)
    expected = [step.next_x for step in pipeline.sample(PROMPTS[0], settings)]
    evaluations = count_evaluations(pipeline)
    steps = pipeline.sample(PROMPTS[0], settings)
    next(steps)
    steps.close()
    assert len(evaluations) == 1
    found = [step.next_x for step in pipeline.sample(PROMPTS[0], settings)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def count_evaluations(pipeline: SanaPipeline) -> list[int]:
    """The batch size of every evaluation of the transformer from now on."""
    evaluations: list[int] = []

    def velocity(x: Tensor, *arguments: object, **options: object) -> Tensor:
        evaluations.append(len(x))
        return pipeline.transformer.velocity(x, *arguments, **options)

    pipeline.velocity = velocity
    return evaluations


def test_sampling_leaves_the_gradient_mode_of_the_caller_alone(pipeline: SanaPipeline) -> None:
    for step in pipeline.sample(PROMPTS[0], Settings(steps=2, **SIZE)):
        assert torch.is_grad_enabled()
        assert not step.next_x.requires_grad


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 20),
        ({"steps": 7}, 7),
        ({"steps": 7, "solver": "flow_euler"}, 7),
        ({"steps": 7, "image": picture(), "strength": 0.3}, 7),
    ],
)
def test_step_count_is_that_of_sampling(pipeline: SanaPipeline, options: dict[str, object], count: int) -> None:
    settings = Settings(**SIZE, **options)
    assert pipeline.step_count(settings) == len(list(pipeline.sample("", settings))) == count


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 2), ({"steps": 4}, 4), ({"image": picture(), "strength": 1.0}, 2), ({"image": picture()}, 1)],
)
def test_step_count_of_sprint(sprint: SanaPipeline, options: dict[str, object], count: int) -> None:
    settings = Settings(**SIZE, **options)
    assert sprint.step_count(settings) == len(list(sprint.sample("", settings))) == count


def test_a_record_draws_the_same_picture_again(pipeline: SanaPipeline) -> None:
    settings = Settings(
        negative="blurry", steps=3, seed=9, guidance_scale=2.0, pag_scale=1.5, pag_blocks=[1], flow_shift=4.0, **SIZE
    )
    record = pipeline.record("a cat", settings)
    names = {field.name for field in fields(Settings)}
    again = Settings(**{name: value for name, value in record.items() if name in names})
    assert record["prompt"] == "a cat"
    assert record["model"] == "custom"
    assert torch.equal(latent_of(pipeline.sample("a cat", again)), latent_of(pipeline.sample("a cat", settings)))


def test_guidance_is_that_of_the_model_unless_given(pipeline: SanaPipeline) -> None:
    parts = (pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder)
    other = SanaPipeline(*parts, replace(pipeline.identity, guidance_scale=3.0))
    drawn = latent_of(other.sample("a cat", Settings(steps=2, **SIZE)))
    assert torch.equal(drawn, latent_of(pipeline.sample("a cat", Settings(steps=2, guidance_scale=3.0, **SIZE))))
    assert not torch.equal(drawn, latent_of(pipeline.sample("a cat", Settings(steps=2, **SIZE))))
    assert [each.record("", Settings())["guidance_scale"] for each in (pipeline, other)] == [4.5, 3.0]


def latent_of(steps: Iterator[Step]) -> Tensor:
    *_, last = steps
    return last.next_x


def test_the_size_of_a_batch_must_be_one_at_least(pipeline: SanaPipeline) -> None:
    for prompt, batch_size in ((PROMPTS[0], 0), ([], 1)):
        with pytest.raises(ValueError, match="at least one"):
            pipeline(prompt, batch_size=batch_size, **SIZE)


WRONG = (
    ({"solver": "ddim"}, "solver 'ddim' is unknown; use one of flow_dpm, flow_euler"),
    ({"mask": half_mask()}, "a mask needs the image that it is a mask of; give both"),
    ({"height": 100}, "height 100 is not a multiple of 32 px from 32 to 16384; use 96"),
    ({"width": 0}, "width 0 is not a multiple of 32 px from 32 to 16384; use 32"),
    ({"width": 10**6}, "width 1000000 is not a multiple of 32 px from 32 to 16384; use 16384"),
    ({"steps": 0}, "steps is 0; at least 1 is needed"),
    ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a finite number, such as 4.5"),
    ({"reference": "official"}, "reference is 'official'; use 'nvlabs' or 'diffusers'"),
    ({"image": picture(), "strength": 0.0}, "strength is 0.0; it must be above 0 and at most 1"),
    ({"image": picture(), "strength": 1.5}, "strength is 1.5; it must be above 0 and at most 1"),
)
WRONG_FOR_FLOW = (
    ({"pag_scale": float("inf")}, "pag_scale is inf; it must be a finite number, such as 4.5"),
    ({"pag_scale": 1.0, "pag_blocks": [3]}, "block 3 does not exist; the transformer has blocks 0 to 2"),
    (
        {"guidance_interval": (0.9, 0.1)},
        "guidance acts from 0.9 to 0.1; these must be two rising numbers within 0 and 1",
    ),
    ({"flow_shift": 0.0}, "flow_shift is 0.0; it must be a positive number, such as 3.0"),
)
SPRINT_LACKS = "Sprint models do not take {}; leave that out, or use another SANA model"
WRONG_FOR_SPRINT = (
    ({"negative": "blurry"}, SPRINT_LACKS.format("negative")),
    ({"image": picture(), "mask": half_mask()}, SPRINT_LACKS.format("mask")),
    ({"pag_scale": 2.0, "pag_blocks": [1]}, SPRINT_LACKS.format("pag_scale and pag_blocks")),
    ({"guidance_interval": (0.1, 0.9)}, SPRINT_LACKS.format("guidance_interval")),
    ({"solver": "flow_euler"}, SPRINT_LACKS.format("solver")),
    ({"flow_shift": 4.0}, SPRINT_LACKS.format("flow_shift")),
)


def refuse(pipeline: SanaPipeline, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        pipeline(PROMPTS[0], **{**SIZE, **options})
    assert str(caught.value) == message


@pytest.mark.parametrize(("options", "message"), [*WRONG, *WRONG_FOR_FLOW])
def test_settings_that_cannot_be_are_refused(pipeline: SanaPipeline, options: dict[str, object], message: str) -> None:
    refuse(pipeline, options, message)


@pytest.mark.parametrize(("options", "message"), [*WRONG, *WRONG_FOR_SPRINT])
def test_settings_that_cannot_be_are_refused_by_sprint(
    sprint: SanaPipeline, options: dict[str, object], message: str
) -> None:
    refuse(sprint, options, message)


def test_a_strength_without_a_picture_is_refused() -> None:
    """Part of a schedule from pure noise draws a broken picture."""
    with pytest.raises(ValueError, match="strength.* image"):
        Settings(strength=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broken_numbers_stop_sampling_and_name_the_likely_cause(folder: Path, dtype: torch.dtype) -> None:
    pipeline = SanaPipeline.load(folder, dtype=dtype)
    pipeline.transformer.proj_out.bias[0] = float("nan")
    with pytest.raises(SamplingError, match="^step 1 gave numbers that are not finite") as caught:
        pipeline(PROMPTS[0], steps=2, **SIZE)
    _, advice = str(caught.value).split(";")
    assert ("float32" in advice) == (dtype != torch.float32)  # in float32 it can only be the weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_text_encoder_and_the_autoencoder_never_compute_in_float16(folder: Path, dtype: torch.dtype) -> None:
    pipeline = SanaPipeline.load(folder, dtype=dtype)
    assert pipeline.transformer.dtype == dtype
    assert pipeline.text_encoder.dtype != torch.float16
    assert pipeline.autoencoder.decoder.conv_in.weight.dtype != torch.float16


def test_bfloat16_draws_nearly_the_same_picture(folder: Path, pipeline: SanaPipeline) -> None:
    rounded = SanaPipeline.load(folder, dtype=torch.bfloat16)
    latents = [sample(each, PROMPTS[0], steps=8, guidance_scale=2.0) for each in (rounded, pipeline)]
    assert latents[0].dtype == torch.float32  # solvers do not round
    assert (latents[0] - latents[1]).norm() / latents[1].norm() < 0.15
    assert rounded(PROMPTS[0], steps=1, **SIZE)[0].size == (WIDTH, HEIGHT)


def test_parts_can_be_loaded_from_separate_files(folder: Path, pipeline: SanaPipeline) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    separate = SanaPipeline.load(
        folder / "transformer" / weights,
        autoencoder=folder / "vae" / weights,
        text_encoder=folder / "text_encoder" / "model.safetensors",
    )
    assert separate.identity == pipeline.identity
    assert torch.equal(sample(separate, PROMPTS[0], steps=2), sample(pipeline, PROMPTS[0], steps=2))


def test_a_transformer_file_alone_asks_for_the_rest(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for place in (path, path.parent):
        with pytest.raises(
            CheckpointError, match=" is the transformer alone; give autoencoder and text_encoder as well$"
        ):
            SanaPipeline.load(place)
    with pytest.raises(CheckpointError, match=f"^{path.name} is the transformer alone; give text_encoder as well$"):
        SanaPipeline.load(path, autoencoder=folder)


@pytest.mark.parametrize(
    ("family", "channels", "kind"), [("dc-ae-f64c128-in-1.0", 128, "f64c128"), ("dc-ae-f32c128-1.5", 128, "f32c128")]
)
def test_an_autoencoder_of_other_latents_is_refused(
    pipeline: SanaPipeline, family: str, channels: int, kind: str
) -> None:
    config = replace(tiny_autoencoder_config(family, depth=1), latent_channels=channels)
    message = (
        f"the autoencoder is a DC-AE {kind}, and the transformer takes latents of an f32c32; give one of these, such as "
        "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    )
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        SanaPipeline(
            pipeline.transformer, DCAutoencoder(config, device="meta"), pipeline.text_encoder, pipeline.identity
        )


def test_a_text_encoder_of_another_width_is_refused(pipeline: SanaPipeline) -> None:
    transformer = SanaTransformer(tiny_config("sana-0.6b-1024px"), device="meta")
    message = (
        r"the text encoder is a Gemma-2 of width \d+, and the transformer takes texts of width 40; for a released model give "
        "Efficient-Large-Model/gemma-2-2b-it"
    )
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        SanaPipeline(transformer, pipeline.autoencoder, pipeline.text_encoder, pipeline.identity)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist; give a checkpoint file or a folder"):
        SanaPipeline.load(tmp_path / "missing")


def test_compiled_transformer_is_one_graph_for_all_prompts_seeds_and_steps(pipeline: SanaPipeline) -> None:
    graphs = CompileCounter()
    torch._dynamo.reset()
    pipeline.velocity = torch.compile(pipeline.transformer.velocity, backend=graphs, fullgraph=True)
    for prompt, settings in (("a circle", {"steps": 2}), ("a very large blue star", {"steps": 3, "seed": 1})):
        pipeline(prompt, **SIZE, **settings)
        assert graphs.frame_count == 1
    pipeline("a circle", height=96, width=128, steps=1)
    assert graphs.frame_count == 2
