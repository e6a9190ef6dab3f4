"""Whole pictures where parts take turns on a device, on a stand-in for a GPU: to the bit those of a device with room for all."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sana
from sana.pipeline import SanaPipeline
from sana.plan import Plan, Settings
from tests.sana.models import write_model
from tests.sana.pipeline.drawing import SIZE
from tests.sana.shell.test_control import write_control

ROOT = Path(sana.__file__).parents[1]
CAT, DOG = ["step of a cat"] * 2, ["step of a dog"] * 2
DRAWN = [*CAT, "pictures of a cat", *DOG, "pictures of a dog"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What became of the cases of turns.py: a process of 10 s, most of them for imports and for the stand-in's arithmetic."""
    control = write_control(tmp_path_factory.mktemp("controls") / "control")
    model = write_model(tmp_path_factory.mktemp("sana"), talking=True)
    command = [sys.executable, "-m", "tests.sana.pipeline.turns", model, control]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_where_all_fits_nothing_moves_and_the_embedding_alone_stays_away(found: dict[str, dict[str, object]]) -> None:
    never, auto = found["text, never"], found["text, auto"]
    assert auto["events"] == never["events"] == DRAWN
    assert auto["pixels"] == never["pixels"]
    assert (never["embedding"], auto["embedding"]) == ("npu", "cpu")
    assert (never["prefixes"], auto["prefixes"], found["text, small"]["prefixes"]) == (1, 1, 0)
    assert never["peak"] - auto["peak"] == 4 * 600 * 64  # the embedding of the small text encoder in float32


def test_prompts_come_first_and_pictures_last_in_as_few_moves_as_can_be(found: dict[str, dict[str, object]]) -> None:
    small = found["text, small"]
    assert small["error"] == ""
    assert small["events"] == [
        "text encoder comes",
        "text encoder leaves",
        "transformer comes",
        *CAT,
        *DOG,
        "transformer leaves",
        "decoder comes",
        "pictures of a cat",
        "pictures of a dog",
    ]
    assert small["pixels"] == found["text, never"]["pixels"]
    assert small["peak"] <= found["text needs"] < found["text, never"]["peak"]
    assert found["text, small, never"]["error"].startswith("OutOfMemoryError")


def test_the_text_encoder_comes_to_write_and_its_embedding_gives_the_logits_from_where_it_is(
    found: dict[str, dict[str, object]],
) -> None:
    (text,) = found["writing, never"]["events"]
    assert len(text) > 5
    assert found["writing, small"]["events"] == ["text encoder comes", text]


def test_who_decodes_every_step_gets_the_same_pictures(found: dict[str, dict[str, object]]) -> None:
    watched = found["text, small, watched"]
    assert watched["error"] == ""
    assert watched["pixels"] == found["text, never"]["pixels"]
    assert (
        watched["events"][-9:]
        == [
            "step of a dog",
            "transformer leaves",
            "decoder comes",
            "decoder leaves",
            "transformer comes",
            "step of a dog",
            "transformer leaves",
            "decoder comes",
            "pictures of a cat",
        ]
        or watched["events"]
    )


def test_pictures_are_encoded_between_prompts_and_sampling(found: dict[str, dict[str, object]]) -> None:
    small = found["pictures, small"]
    assert small["error"] == ""
    assert small["events"] == [
        "text encoder comes",
        "text encoder leaves",
        "encoder comes",
        "encoder leaves",
        "transformer comes",
        "ControlNet comes",
        *CAT,
        *DOG,
        "transformer leaves",
        "ControlNet leaves",
        "decoder comes",
        "pictures of a cat",
        "pictures of a dog",
    ]
    assert small["pixels"] == found["pictures, never"]["pixels"] != found["text, never"]["pixels"]


def test_a_device_too_small_for_a_part_is_refused_before_anything_is_computed(
    found: dict[str, dict[str, object]],
) -> None:
    refused = found["text, too small"]
    assert refused["events"] == []
    assert refused["error"] == (
        "ValueError: decoding takes 0.01 GiB on npu, even alone, and 0.01 GiB are free there; use files quantised to 8 bits, "
        "a smaller size or batch, or the device cpu"
    )


@pytest.mark.parametrize("together", [False, True], ids=["decoder waits", "decoder has room beside the transformer"])
def test_a_list_without_end_is_drawn_some_plans_at_a_time(
    pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """So that a million prompts hold the texts of a few. Of the last one alone nothing is encoded ahead."""
    prompts = ["a", "b", "c", "d", "e"]
    events: list[str] = []
    encode, decode = pipeline.text_encoder.forward, pipeline.pictures

    def note(event: str, call: Callable[..., object]) -> Callable[..., object]:
        return lambda *inputs: events.append(event) or call(*inputs)

    def plans() -> Iterator[Plan]:
        for prompt in prompts:
            events.append(prompt)
            yield pipeline.plan(prompt, Settings(steps=1, guidance_scale=1.0, **SIZE))

    expected = [pipeline(prompt, steps=1, guidance_scale=1.0, **SIZE)[0].tobytes() for prompt in prompts]
    monkeypatch.setattr("sana.pipeline.PLANS_AHEAD", 2)
    monkeypatch.setattr(pipeline, "_has_room", lambda plan, *phases: together and bool(phases))
    monkeypatch.setattr(pipeline.text_encoder, "forward", note("text", encode))
    monkeypatch.setattr(pipeline, "pictures", note("picture", decode))
    drawn = pipeline.draw(plans(), lambda plan, step: events.append("step"))
    assert [pictures[0].tobytes() for _, pictures in drawn] == expected
    steps = ["step", "picture", "step", "picture"] if together else ["step", "step", "picture", "picture"]
    pair = ["text", "text", *steps]
    assert events == ["a", "b", *pair, "c", "d", *pair, "e", "text", "step", "picture"]
