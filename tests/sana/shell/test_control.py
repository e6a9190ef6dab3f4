"""generate with a ControlNet: the pictures, their records, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from sana.networks.controlnet import SanaControlNet
from tests.sana.models import TRANSFORMER
from tests.sana.shell.commands import Outcome, Shell, pixels, record
from tests.sana.twins import randomise

ALL_THERE = Outcome(0, "Every picture exists already.\n", "")


def write_control(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    config = replace(TRANSFORMER, control_blocks=2, **changes)
    save_file(randomise(SanaControlNet(config), seed=1).state_dict(), folder / "control.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_cross_attention_heads": config.cross_heads}))
    return folder / "control.safetensors"


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return write_control(tmp_path / "control")


def test_a_controlnet_changes_the_picture(shell: Shell, control: Path, photo: Path) -> None:
    size = ("--height", 64, "--width", 96, "--steps", 2)
    plain = pixels(shell.draw("a cat", *size)[0])
    given = ("a cat", "--control", control, "--control-image", photo, "--steps", 2, "--overwrite")
    (path,) = shell.draw(*given)
    assert Image.open(path).size == (96, 64)  # the photo's
    assert record(path)["control_image"] == "given" and "control_scale" not in record(path)
    drawn = {plain, pixels(path)}
    for more in (("--control-scale", 0.5), ("--control-from", 0.5), ("--control-to", 0.5)):
        (path,) = shell.draw(*given, *more)
        assert record(path)[more[0].strip("-").replace("-", "_")] == 0.5
        drawn.add(pixels(path))
    assert len(drawn) == 5
    assert pixels(shell.draw(*given, "--control-scale", 0)[0]) == plain


def test_a_changed_control_draws_what_is_new(shell: Shell, control: Path, photo: Path) -> None:
    given = ("a cat", "--control", control, "--control-image", photo, "--height", 64, "--width", 96, "--resume")
    shell.draw("a cat", "--height", 64, "--width", 96)

    def drawn(*more: object) -> str:
        (path,) = shell.draw(*given, *more)
        assert shell.generate(*given, *more) == ALL_THERE
        return path.name

    assert drawn() == "out-0001.png"
    assert drawn("--control-scale", 0.5) == "out-0002.png"
    assert drawn("--control-to", 0.5) == "out-0003.png"
    Image.new("RGB", (96, 64), "red").save(photo)
    assert drawn() == "out-0004.png"
    tensors = load_file(control)
    save_file({**tensors, "input_block.bias": tensors["input_block.bias"] + 1}, control)
    assert drawn() == "out-0005.png"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--control", "{control}"), "a ControlNet needs the picture that it follows; give a control_image as well"),
        (
            ("--control-image", "{photo}"),
            "a control_image needs the ControlNet that follows it; give a control file as well",
        ),
        (("--control-scale", "0.5"), "control_scale without a control_image has no effect; give both"),
        (
            ("--control-from", "0.5", "--control-to", "0.8"),
            "control_from and control_to without a control_image has no effect; give both",
        ),
        (("{both}", "--control-scale", "nan"), "control_scale is nan; it must be a finite number, such as 1"),
        (
            ("{both}", "--control-from", "0.5", "--control-to", "0.5"),
            "control acts from 0.5 to 0.5; these must be two rising numbers within 0 and 1",
        ),
        (
            ("{both}", "--control-to", "1.5"),
            "control acts from 0.0 to 1.5; these must be two rising numbers within 0 and 1",
        ),
        (("--control", "{photo}", "--control-image", "{photo}"), "photo.png is not a readable"),
        (("--control", "{model}", "--control-image", "{photo}"), "is a SANA transformer; give a ControlNet for SANA"),
        (("--control", "missing", "--control-image", "{photo}"), "missing does not exist"),
        (("--control", "{control}", "--control-image", "missing.png"), "missing.png"),
        (("--control", "{wide}", "--control-image", "{photo}"), "this ControlNet is 192 wide and the SANA model 96; "),
    ],
)
def test_what_cannot_be_is_refused(
    shell: Shell, control: Path, photo: Path, model: Path, options: tuple[str, ...], message: str
) -> None:
    wide = write_control(shell.folder / "wide", hidden_size=192, cross_heads=4, ff_width=480)
    words = []
    for option in options:
        both = ("--control", str(control), "--control-image", str(photo))
        filled = option.format(both="", control=control, photo=photo, model=model / "transformer", wide=wide)
        words += both if option == "{both}" else [filled]
    assert message in shell.fail("a cat", *words)
