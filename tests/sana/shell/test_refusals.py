"""One line for everything that cannot be, before anything is computed."""

import os
import re
from pathlib import Path

import pytest
import torch

from sana.__main__ import main
from tests.sana.shell.commands import Shell


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--height", 100), "height 100 is not a multiple of 32 px from 32 to 16384; use 96"),
        (("--height", 0), "height 0 is not a multiple of 32 px from 32 to 16384; use 32"),
        (("--height", 1000000), "height 1000000 is not a multiple of 32 px from 32 to 16384; use 16384"),
        (("--width", -32), "width -32 is not a multiple of 32 px from 32 to 16384; use 32"),
        (("--steps", 0), "steps is 0; at least 1 is needed"),
        (("--guidance-scale", "nan"), "guidance_scale is nan; it must be a finite number, such as 4.5"),
        (("--pag-scale", "inf"), "pag_scale is inf; it must be a finite number, such as 4.5"),
        (
            ("--guidance-interval", 0.8, 0.2),
            "guidance acts from 0.8 to 0.2; these must be two rising numbers within 0 and 1",
        ),
        (("--flow-shift", -1), "flow_shift is -1.0; it must be a positive number, such as 3.0"),
        (("--batch-size", 0), "--batch-size is 0; at least 1 is needed"),
        (("--prompts", "prompts.txt"), "give either a prompt or --prompts FILE"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_values_that_cannot_be_are_refused(shell: Shell, arguments: tuple[object, ...], message: str) -> None:
    assert shell.fail("a cat", *arguments) == message


def test_no_prompt_at_all_is_refused(shell: Shell) -> None:
    assert shell.fail() == "give either a prompt or --prompts FILE"


@pytest.mark.parametrize("strength", [0, 1.5, "nan"])
def test_a_strength_outside_0_to_1_is_refused(shell: Shell, photo: Path, strength: object) -> None:
    expected = f"strength is {float(strength)}; it must be above 0 and at most 1"
    assert shell.fail("a cat", "--image", photo, "--strength", strength) == expected


def test_a_mask_without_a_picture_is_refused(shell: Shell, photo: Path) -> None:
    assert shell.fail("a cat", "--mask", photo) == "a mask needs the image that it is a mask of; give both"


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused(shell: Shell, seed: int) -> None:
    assert "seed" in shell.fail("a cat", "--seed", seed)


@pytest.mark.parametrize("name", ["out.jpg", "out", "out.png.txt"])
def test_an_output_that_is_no_png_is_refused(shell: Shell, name: str) -> None:
    out = shell.folder / name
    expected = f"--out is {out}; give the name of a PNG file, such as {out.with_suffix('.png')}"
    assert shell.fail("a cat", "--out", out) == expected


@pytest.mark.parametrize("name", ["folder.png", "missing/out.png", "photo.png/out.png"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(
    shell: Shell, photo: Path, name: str
) -> None:
    (shell.folder / "folder.png").mkdir()
    out = shell.folder / name
    expected = f"--out {out} cannot be written; give a file in a folder that exists and is yours to write"
    assert shell.fail("a cat", "--out", out, "--model", "missing") == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_refused(shell: Shell) -> None:
    locked = shell.folder / "locked"
    locked.mkdir(0o500)
    assert "cannot be written" in shell.fail("a cat", "--out", locked / "out.png")


@pytest.mark.parametrize("option", ["--image", "--mask"])
@pytest.mark.parametrize("content", [b"not a picture", b"", None], ids=["text", "empty", "missing"])
def test_a_file_that_is_no_picture_is_named(shell: Shell, photo: Path, option: str, content: bytes | None) -> None:
    path = shell.folder / "input.png"
    if content is not None:
        path.write_bytes(content)
    message = shell.fail("a cat", "--image", photo, option, path)
    assert str(path) in message
    assert content is None or message == f"{path} is not a picture; give a PNG or JPEG file"


def test_a_truncated_picture_is_named(shell: Shell, photo: Path) -> None:
    photo.write_bytes(photo.read_bytes()[:-60])
    assert str(photo) in shell.fail("a cat", "--image", photo)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n  \n", "holds no prompt; write one on each line"), (b"\xff\xfe\x00c", "UTF-8"), (None, "")],
    ids=["blank", "binary", "missing"],
)
def test_a_file_without_prompts_is_named(shell: Shell, content: bytes | None, message: str) -> None:
    path = shell.folder / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    found = shell.fail("--prompts", path)
    assert str(path) in found
    assert message in found


def test_a_model_that_does_not_exist_is_named(shell: Shell) -> None:
    path = shell.folder / "missing"
    expected = f"{path} does not exist; give a checkpoint file or a folder of a diffusers model"
    assert shell.fail("a cat", "--model", path) == expected


def test_a_device_that_is_not_there_is_one_line(shell: Shell) -> None:
    present = torch.cuda.device_count()
    assert "cuda" in shell.fail("a cat", "--device", f"cuda:{present}").lower()


@pytest.mark.parametrize("name", ["xpu", "xpu:1", "mtia", "hpu", "maia", "vulkan", "meta", "cuda:-1", "toaster"])
def test_a_device_that_nothing_can_be_computed_on_is_named(shell: Shell, name: str) -> None:
    """Each in its own way: not built in, without its Python module, without operators, without numbers, unknown."""
    message = shell.fail("a cat", "--device", name, "--model", "missing")
    assert re.fullmatch(rf"device {name} cannot be used \(.+\); give another, such as cpu", message)


def test_a_model_of_another_kind_is_named(shell: Shell, model: Path) -> None:
    expected = "vae is a DC-AE, the autoencoder of SANA; give a SANA transformer, such as "
    assert shell.fail("a cat", "--model", model / "vae").startswith(expected)


@pytest.mark.parametrize("arguments", [(), ("paint",), ("generate", "a", "--height", "tall"), ("info",)])
def test_a_command_that_cannot_be_parsed_shows_its_usage(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m sana")
