"""What generate writes."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from sana.__main__ import parser, read_settings
from sana.pipeline import SanaPipeline
from sana.plan import Settings
from tests.sana.shell.commands import Shell, pixels, record


def drawn_with(path: Path) -> dict[str, object]:
    """The record, without the fingerprint of the files, which is one in any case."""
    found = record(path)
    assert re.fullmatch("[0-9a-f]{16}", found.pop("files"))
    return found


def test_a_picture_carries_what_it_was_drawn_with(shell: Shell) -> None:
    options = ("--height", 64, "--width", 96, "--seed", 7, "--negative", "模糊", "--guidance-scale", 2.5)
    (path,) = shell.draw("a 🐱 «猫»", *options, "--steps", 2)
    assert Image.open(path).size == (96, 64)
    assert drawn_with(path) == {
        "prompt": "a 🐱 «猫»",
        "seed": 7,
        "model": "custom",
        "steps": 2,
        "negative": "模糊",
        "height": 64,
        "width": 96,
        "guidance_scale": 2.5,
    }


def test_a_picture_shows_its_prompt_seed_and_settings(shell: Shell) -> None:
    (path,) = shell.draw("a cat", "--seed", 7)
    drawn = {pixels(path)}
    for changed in (
        ("a dog", "--seed", 7),
        ("a cat", "--seed", 8),
        ("a cat", "--seed", 7, "--negative", "blurry"),
        ("a cat", "--seed", 7, "--guidance-scale", "1"),
        ("a cat", "--seed", 7, "--instruction", ""),
        ("a cat", "--seed", 7, "--reference", "diffusers"),
        ("a cat", "--seed", 7, "--pag-scale", "3"),
        ("a cat", "--seed", 7, "--solver", "flow_euler"),
        ("", "--seed", 7),
    ):
        drawn.add(pixels(shell.draw(*changed, "--overwrite")[0]))
    assert len(drawn) == 10
    assert pixels(shell.draw("a cat", "--seed", 7, "--overwrite")[0]) in drawn


def test_flow_shift_and_guidance_interval_are_settings_too(shell: Shell) -> None:
    found = {
        pixels(shell.draw("a cat", *options, "--steps", 3, "--overwrite")[0])
        for options in ((), ("--flow-shift", 5), ("--guidance-interval", 0.2, 0.7))
    }
    assert len(found) == 3


def test_a_batch_is_numbered_and_each_picture_has_its_own_seed(shell: Shell) -> None:
    paths = shell.draw("a cat", "--batch-size", 3, "--seed", 7)
    assert [path.name for path in paths] == ["out-0001.png", "out-0002.png", "out-0003.png"]
    assert [record(path)["seed"] for path in paths] == [7, 8, 9]
    (alone,) = shell.draw("a cat", "--seed", 9)
    assert pixels(alone) == pixels(paths[2])


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_lines_of_a_file_end_at_line_feeds_only(shell: Shell, ending: str) -> None:
    """Not at what Unicode and Python call line ends besides, which copied texts have in them."""
    lines = [f"a cat{mark}on a mat" for mark in "\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"]
    prompts = shell.folder / "prompts.txt"
    prompts.write_bytes(ending.join(lines).encode())
    assert [record(path)["prompt"] for path in shell.draw("--prompts", prompts)] == lines


def test_every_line_of_a_file_is_drawn(shell: Shell) -> None:
    prompts = shell.folder / "prompts.txt"
    prompts.write_text("\ufeffa cat\n\n  一只猫  \r\n", encoding="utf-8")
    paths = shell.draw("--prompts", prompts, "--batch-size", 2, "--seed", 7)
    found = [(path.name, record(path)["prompt"], record(path)["seed"]) for path in paths]
    assert found == [
        ("out-0001.png", "a cat", 7),
        ("out-0002.png", "a cat", 8),
        ("out-0003.png", "一只猫", 7),
        ("out-0004.png", "一只猫", 8),
    ]


def test_an_empty_prompt_is_drawn(shell: Shell) -> None:
    (path,) = shell.draw("")
    assert record(path)["prompt"] == ""


def test_a_prompt_of_100_000_characters_is_cut_and_says_so(shell: Shell, caplog: pytest.LogCaptureFixture) -> None:
    prompt = "a red circle " * 7700
    (path,) = shell.draw(prompt)
    assert record(path)["prompt"] == prompt
    (message,) = caplog.messages
    assert message.startswith("The prompt is too long by ")


def test_a_picture_and_a_mask_to_start_from(shell: Shell, photo: Path) -> None:
    Image.new("L", (96, 64), 0).save(shell.folder / "mask.png")
    (path,) = shell.draw("a cat", "--image", photo, "--strength", 0.5, "--steps", 2)
    assert Image.open(path).size == (96, 64)
    assert drawn_with(path) == {
        "prompt": "a cat",
        "seed": 0,
        "model": "custom",
        "steps": 2,
        "strength": 0.5,
        "image": "given",
        "guidance_scale": 4.5,
        "height": 64,
        "width": 96,
    }
    drawn = pixels(path)
    start = ("--image", photo, "--mask", shell.folder / "mask.png", "--overwrite")
    (kept,) = map(pixels, shell.draw("a cat", *start))
    (other,) = map(pixels, shell.draw("a dog", *start))
    assert kept == other != drawn  # nothing is painted anew


def test_sprint_is_drawn_in_two_steps(shell: Shell, sprint_model: Path) -> None:
    outcome = shell.run("generate", "a cat", "--model", sprint_model, "--out", shell.folder / "out.png")
    assert outcome.code == 0
    assert record(shell.folder / "out.png")["steps"] == 2


def test_progress_shows_every_step(shell: Shell) -> None:
    outcome = shell.generate("a cat", "--steps", 3)
    assert "a cat: 100%" in outcome.err
    assert "3/3" in outcome.err


def test_progress_is_that_of_all_prompts(shell: Shell) -> None:
    prompts = shell.folder / "prompts.txt"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    outcome = shell.generate("--prompts", prompts, "--steps", 3)
    assert "a cat:  50%" in outcome.err
    assert "a dog: 100%" in outcome.err


def test_every_setting_is_an_option_of_its_name(photo: Path) -> None:
    """But for the blocks of perturbed attention, which are for those who know the network."""
    command = "generate x --negative a --height 64 --width 96 --steps 3 --seed 5 --guidance-scale 2 --max-bytes 9"
    more = "--pag-scale 1 --guidance-interval 0.1 0.9 --reference diffusers --solver flow_euler --flow-shift 4"
    pictures = ["--strength", "0.7", "--image", str(photo), "--mask", str(photo), "--instruction", ""]
    control = ["--control-image", str(photo), *"--control-scale 0.5 --control-from 0.1 --control-to 0.9".split()]
    settings = read_settings(parser().parse_args([*command.split(), *more.split(), *pictures, *control]))
    assert {field.name for field in fields(Settings)} - {*settings.changed} == {"pag_blocks"}
    assert settings.guidance_interval == (0.1, 0.9) and settings.instruction is None
    assert (settings.control_scale, settings.control_from, settings.control_to) == (0.5, 0.1, 0.9)
    assert read_settings(parser().parse_args(["generate", "x"])) == Settings()


@pytest.mark.parametrize(("arguments", "expected"), [((), "auto"), (("--offload", "never"), "never")])
def test_offload_is_auto_unless_told_otherwise(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], expected: str
) -> None:
    load, told = SanaPipeline.load, []

    def note(*parts: object, **options: object) -> SanaPipeline:
        told.append(options["offload"])
        return load(*parts, **options)

    monkeypatch.setattr(SanaPipeline, "load", note)
    shell.draw("a cat", *arguments)
    assert told == [expected]
