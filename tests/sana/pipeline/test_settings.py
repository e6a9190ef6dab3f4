"""Settings that cannot be."""

import pytest

from sana.pipeline import SanaPipeline
from sana.plan import Settings
from tests.sana.models import PROMPTS
from tests.sana.pipeline.drawing import SIZE, half_mask, picture


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


def test_without_a_text_encoder_nothing_is_written_or_encoded(loaded: SanaPipeline) -> None:
    """But what was encoded elsewhere is drawn."""
    pipeline = SanaPipeline(loaded.transformer, loaded.autoencoder, None, loaded.identity)
    plan = pipeline.plan(PROMPTS[0], Settings(steps=1, **SIZE))
    for use in (
        lambda: pipeline(PROMPTS[0], **SIZE),
        lambda: pipeline.enhance("a cat"),
        lambda: list(pipeline.sample(PROMPTS[0], Settings(**SIZE))),
        lambda: list(pipeline.draw([plan])),
        lambda: pipeline.prepare([plan]),
        lambda: list(pipeline.follow(plan)),
    ):
        with pytest.raises(ValueError) as caught:
            use()
        assert str(caught.value) == (
            "this pipeline has no text encoder; make it with one, or encode the texts elsewhere and give them to follow()"
        )
    (expected,), (found,) = loaded.follow(plan), pipeline.follow(plan, loaded.prepare([plan])[0])
    assert found.next_x.equal(expected.next_x)
