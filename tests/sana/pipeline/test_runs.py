"""What a caller can rely on: batches, seeds, steps, records, and runs that end early."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from sana.pipeline import SanaPipeline
from sana.plan import Settings
from sana.sampling.solvers import SamplingError, Step
from tests.sana.models import PROMPTS
from tests.sana.pipeline.drawing import HEIGHT, SIZE, STARTS, WIDTH, count_evaluations, picture, sample


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
    assert pipeline.plan("", settings).step_count == len(list(pipeline.sample("", settings))) == count


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 2), ({"steps": 4}, 4), ({"image": picture(), "strength": 1.0}, 2), ({"image": picture()}, 1)],
)
def test_step_count_of_sprint(sprint: SanaPipeline, options: dict[str, object], count: int) -> None:
    settings = Settings(**SIZE, **options)
    assert sprint.plan("", settings).step_count == len(list(sprint.sample("", settings))) == count


def test_a_record_draws_the_same_picture_again(pipeline: SanaPipeline) -> None:
    settings = Settings(
        negative="blurry", steps=3, seed=9, guidance_scale=2.0, pag_scale=1.5, pag_blocks=[1], flow_shift=4.0, **SIZE
    )
    record = pipeline.plan("a cat", settings).record()
    again = recorded(record)
    assert record["prompt"] == "a cat"
    assert record["model"] == "custom"
    assert torch.equal(latent_of(pipeline.sample("a cat", again)), latent_of(pipeline.sample("a cat", settings)))


def test_the_record_of_picture_k_draws_it_alone(pipeline: SanaPipeline) -> None:
    prompts = [*PROMPTS[:2]]
    plan = pipeline.plan(prompts, Settings(steps=2, seed=9, reference="diffusers", **SIZE))
    batch = latent_of(pipeline.follow(plan))
    for k, prompt in enumerate(prompts):
        record = plan.record(k)
        assert (record["prompt"], record["seed"]) == (prompt, 9 + k)
        alone = latent_of(pipeline.sample(record["prompt"], recorded(record)))
        torch.testing.assert_close(batch[k : k + 1], alone, rtol=0, atol=1e-4)


def test_a_record_of_sprint_from_a_picture_draws_it_again(sprint: SanaPipeline) -> None:
    """Its steps are those of the whole schedule, of which a picture needs a part."""
    settings = Settings(image=picture(), **SIZE)
    record = sprint.plan("a cat", settings).record()
    assert (record["image"], record["steps"]) == ("given", 2)
    again = recorded({**record, "image": picture()})
    assert torch.equal(latent_of(sprint.sample("a cat", again)), latent_of(sprint.sample("a cat", settings)))


def recorded(record: dict[str, object]) -> Settings:
    names = {field.name for field in fields(Settings)}
    return Settings(**{name: value for name, value in record.items() if name in names})


def test_guidance_is_that_of_the_model_unless_given(pipeline: SanaPipeline) -> None:
    parts = (pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder)
    other = SanaPipeline(*parts, replace(pipeline.identity, guidance_scale=3.0))
    drawn = latent_of(other.sample("a cat", Settings(steps=2, **SIZE)))
    assert torch.equal(drawn, latent_of(pipeline.sample("a cat", Settings(steps=2, guidance_scale=3.0, **SIZE))))
    assert not torch.equal(drawn, latent_of(pipeline.sample("a cat", Settings(steps=2, **SIZE))))
    assert [each.plan("", Settings()).record()["guidance_scale"] for each in (pipeline, other)] == [4.5, 3.0]


def latent_of(steps: Iterator[Step]) -> Tensor:
    *_, last = steps
    return last.next_x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broken_numbers_stop_sampling_and_name_the_likely_cause(folder: Path, dtype: torch.dtype) -> None:
    pipeline = SanaPipeline.load(folder, dtype=dtype)
    pipeline.transformer.proj_out.bias[0] = float("nan")
    with pytest.raises(SamplingError, match="^step 1 gave numbers that are not finite") as caught:
        pipeline(PROMPTS[0], steps=2, **SIZE)
    _, advice = str(caught.value).split(";")
    assert ("float32" in advice) == (dtype != torch.float32)
    if dtype == torch.float32:  # in which it can only be the weights
        assert advice == " a LoRA, a ControlNet or the checkpoint is damaged: try without the first two"


@pytest.mark.parametrize(("part", "options"), [("encoder", {"image": picture(), "strength": 0.5}), ("decoder", {})])
def test_broken_numbers_of_the_autoencoder_are_no_black_picture(
    folder: Path, part: str, options: dict[str, object]
) -> None:
    pipeline = SanaPipeline.load(folder)
    getattr(pipeline.autoencoder, part).conv_out.bias[0] = float("nan")
    with pytest.raises(
        ValueError, match="^the autoencoder gave numbers that are not finite, computing in torch.float32;"
    ):
        pipeline(PROMPTS[0], steps=2, **SIZE, **options)


def test_compiled_transformer_is_one_graph_for_all_prompts_seeds_and_steps(pipeline: SanaPipeline) -> None:
    graphs = CompileCounter()
    torch._dynamo.reset()
    pipeline.velocity = torch.compile(pipeline.transformer.velocity, backend=graphs, fullgraph=True)
    for prompt, settings in (("a circle", {"steps": 2}), ("a very large blue star", {"steps": 3, "seed": 1})):
        pipeline(prompt, **SIZE, **settings)
        assert graphs.frame_count == 1
    pipeline("a circle", height=96, width=128, steps=1)
    assert graphs.frame_count == 2
