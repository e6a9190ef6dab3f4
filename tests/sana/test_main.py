"""The shell: what it writes, what it keeps, and one line for everything that cannot be."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open

import sana
from sana import inspection
from sana.__main__ import INTERRUPTED, main
from tests.sana.models import SPRINT, write_model

ROOT = Path(sana.__file__).parents[1]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs commands in a folder of their own, in this process."""

    def __init__(self, model: Path, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.model = model
        self.folder = folder
        self.capture = capture

    def run(self, *arguments: object) -> Outcome:
        self.capture.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *self.capture.readouterr())

    def generate(self, *arguments: object) -> Outcome:
        """With an output, a model and one step, unless told otherwise: the last of equal options counts."""
        defaults = ("--out", self.folder / "out.png", "--model", self.model, "--steps", 1)
        return self.run("generate", *defaults, *arguments)

    def draw(self, *arguments: object) -> list[Path]:
        """The pictures that were written."""
        outcome = self.generate(*arguments)
        assert outcome.code == 0, outcome.err
        return [Path(line) for line in outcome.out.splitlines()]

    def fail(self, *arguments: object) -> str:
        """The message of a command that must end with one line on the error, and leave nothing."""
        before = sorted(self.folder.rglob("*"))
        outcome = self.generate(*arguments)
        assert outcome.code == 1
        assert sorted(self.folder.rglob("*")) == before
        return error_line(outcome)


def error_line(outcome: Outcome) -> str:
    *progress, line = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert all("step" in line or not line.strip() for line in progress)  # nothing else but the progress bar
    return line.removeprefix("error: ")


def record(path: Path) -> dict[str, object]:
    with Image.open(path) as picture:
        picture.load()
        return json.loads(picture.text["sana"])


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def sprint_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sprint"), SPRINT)


@pytest.fixture
def shell(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(model, tmp_path, capsys)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(path)
    return path


def test_a_picture_carries_what_it_was_drawn_with(shell: Shell) -> None:
    options = ("--height", 64, "--width", 96, "--seed", 7, "--negative", "模糊", "--guidance-scale", 2.5)
    (path,) = shell.draw("a 🐱 «猫»", *options, "--steps", 2)
    assert Image.open(path).size == (96, 64)
    assert record(path) == {
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
        drawn.add(pixels(shell.draw(*changed)[0]))
    assert len(drawn) == 10
    assert pixels(shell.draw("a cat", "--seed", 7)[0]) in drawn


def test_flow_shift_and_guidance_interval_are_settings_too(shell: Shell) -> None:
    found = {
        pixels(shell.draw("a cat", *options, "--steps", 3)[0])
        for options in ((), ("--flow-shift", 5), ("--guidance-interval", 0.2, 0.7))
    }
    assert len(found) == 3


def test_a_batch_is_numbered_and_each_picture_has_its_own_seed(shell: Shell) -> None:
    paths = shell.draw("a cat", "--batch-size", 3, "--seed", 7)
    assert [path.name for path in paths] == ["out-0001.png", "out-0002.png", "out-0003.png"]
    assert [record(path)["seed"] for path in paths] == [7, 8, 9]
    (alone,) = shell.draw("a cat", "--seed", 9)
    assert pixels(alone) == pixels(paths[2])


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


def test_resume_fills_the_gaps_with_the_right_seeds(shell: Shell) -> None:
    prompts = shell.folder / "prompts.txt"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    arguments = ("--prompts", prompts, "--batch-size", 3, "--seed", 7, "--resume")
    paths = shell.draw(*arguments)
    drawn = [path.read_bytes() for path in paths]
    kept = [path.stat().st_mtime_ns for path in paths]
    for gone in (1, 3, 4, 5):
        paths[gone].unlink()
    assert shell.draw(*arguments) == [paths[i] for i in (1, 3, 4, 5)]
    assert [path.read_bytes() for path in paths] == drawn
    assert [paths[i].stat().st_mtime_ns for i in (0, 2)] == [kept[i] for i in (0, 2)]

    outcome = shell.generate(*arguments)
    assert outcome == Outcome(0, "Every picture exists already.\n", "")


def test_without_resume_pictures_are_drawn_again(shell: Shell) -> None:
    (path,) = shell.draw("a cat")
    assert shell.draw("a dog") == [path]
    assert record(path)["prompt"] == "a dog"


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
    assert record(path) == {
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
    (kept,) = shell.draw("a cat", "--image", photo, "--mask", shell.folder / "mask.png")
    (other,) = shell.draw("a dog", "--image", photo, "--mask", shell.folder / "mask.png")
    assert pixels(kept) == pixels(other) != drawn  # nothing is painted anew


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


def test_a_model_of_another_kind_is_named(shell: Shell, model: Path) -> None:
    expected = "vae is a DC-AE, the autoencoder of SANA; give a SANA transformer"
    assert shell.fail("a cat", "--model", model / "vae") == expected


def test_pictures_finished_before_an_error_are_kept(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = shell.folder / "prompts.txt"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    fail_to_save(monkeypatch, OSError(28, "No space left on device"), after=1)
    outcome = shell.generate("--prompts", prompts)
    assert outcome.code == 1
    assert "No space left on device" in error_line(outcome)
    assert sorted(path.name for path in shell.folder.iterdir()) == ["out-0001.png", "prompts.txt"]
    assert record(shell.folder / "out-0001.png")["prompt"] == "a cat"


@pytest.mark.parametrize("exists", [False, True])
def test_a_picture_interrupted_while_it_is_written_leaves_what_was_there(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    if exists:
        (path,) = shell.draw("a cat")
        before = path.read_bytes()
    fail_to_save(monkeypatch, KeyboardInterrupt(), after=0)
    outcome = shell.generate("a dog")
    assert outcome.code == INTERRUPTED
    assert [path.read_bytes() for path in shell.folder.iterdir()] == ([before] if exists else [])


def fail_to_save(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    """The disk takes so many pictures, and half of the next one."""
    save, count = Image.Image.save, 0

    def save_some(picture: Image.Image, path: Path, format: str, pnginfo: PngInfo) -> None:
        nonlocal count
        save(picture, path, format=format, pnginfo=pnginfo)
        count += 1
        if count > after:
            path.write_bytes(path.read_bytes()[:100])
            raise error

    monkeypatch.setattr(Image.Image, "save", save_some)


def test_ctrl_c_keeps_finished_pictures_and_exits_with_130(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n" + "a dog\n" * 1000, encoding="utf-8")  # far more than can be drawn in between
    arguments = ["--prompts", prompts, "--model", model, "--steps", "20", "--out", tmp_path / "out.png"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "sana", "generate", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells let background jobs ignore it
    )
    first = process.stdout.readline().strip()
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "Stopped; finished pictures are kept."
    assert "Traceback" not in err
    written = {path.name for path in tmp_path.iterdir()} - {"prompts.txt"}
    reported = {Path(path).name for path in [first, *rest.splitlines()]}
    assert Path(first).name == "out-0001.png"
    assert reported <= written and len(written - reported) <= 1  # the last one may be written and not yet reported
    assert all(record(tmp_path / name)["steps"] == 20 for name in written)


@pytest.mark.parametrize(
    ("part", "first", "second"),
    [
        ("transformer", "transformer: a SANA transformer", "3 blocks of width 96"),
        ("vae", "vae: a DC-AE, the autoencoder of SANA", "32 px per latent cell, 32 channels"),
    ],
)
def test_info_says_what_a_file_is_in_five_lines(shell: Shell, model: Path, part: str, first: str, second: str) -> None:
    outcome = shell.run("info", model / part)
    lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err, len(lines)) == (0, "", 5)
    assert lines[0] == first
    assert second in lines[2]
    assert "float16" in lines[1]


def test_info_on_a_pipeline_is_about_its_transformer(shell: Shell, model: Path) -> None:
    assert shell.run("info", model) == shell.run("info", model / "transformer")


def test_info_on_a_text_encoder_says_where_it_belongs(shell: Shell, model: Path) -> None:
    lines = shell.run("info", model / "text_encoder").out.splitlines()
    assert lines[0] == "text_encoder: a Gemma text encoder"
    assert lines[-1] == "give its path as the text encoder"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"text", "a.safetensors is not a readable safetensors file"),
        ("a.pth", b"text", "a.pth is not a readable PyTorch file; the download may be incomplete"),
        ("a.txt", b"text", "a.txt is not a readable safetensors file"),
    ],
)
def test_info_on_anything_else_is_one_line(shell: Shell, name: str, content: bytes, message: str) -> None:
    (shell.folder / name).write_bytes(content)
    outcome = shell.run("info", shell.folder / name)
    assert outcome.code == 1
    assert error_line(outcome).startswith(message)


def test_a_converted_model_draws_the_same_picture(shell: Shell, model: Path) -> None:
    paths = {part: shell.folder / f"{part}.safetensors" for part in ("transformer", "vae")}
    for part, path in paths.items():
        outcome = shell.run("convert", model / part, path)
        assert (outcome.code, outcome.err) == (0, "")
        assert str(path) in outcome.out
    (expected,) = shell.draw("a cat", "--seed", 5, "--steps", 2)
    drawn = pixels(expected)
    separate = ("--model", paths["transformer"], "--autoencoder", paths["vae"], "--text-encoder", model)
    assert shell.draw("a cat", "--seed", 5, "--steps", 2, *separate) == [expected]
    assert pixels(expected) == drawn


def test_convert_can_change_the_dtype(shell: Shell, model: Path) -> None:
    target = shell.folder / "small.safetensors"
    assert shell.run("convert", model / "vae", target, "--dtype", "bfloat16").code == 0
    with safe_open(target, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("vae", "out.bin", "does not end in .safetensors; give the name of the file to write"),
        ("vae", "missing/out.safetensors", "out.safetensors"),
        ("vae", "folder.safetensors", "folder.safetensors"),
        ("text_encoder", "out.safetensors", "is a Gemma text encoder; give a SANA transformer or a DC-AE"),
        ("missing", "out.safetensors", "does not exist"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    shell: Shell, model: Path, source: str, target: str, message: str
) -> None:
    (shell.folder / "folder.safetensors").mkdir()
    outcome = shell.run("convert", model / source, shell.folder / target)
    assert outcome.code == 1
    assert message in error_line(outcome)
    assert [path.name for path in shell.folder.iterdir()] == ["folder.safetensors"]


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), KeyboardInterrupt()], ids=type)
def test_a_conversion_that_stops_leaves_what_was_there(
    shell: Shell, model: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def save_half(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise error

    target = shell.folder / "out.safetensors"
    assert shell.run("convert", model / "vae", target).code == 0
    before = target.read_bytes()
    monkeypatch.setattr(inspection, "save_file", save_half)
    outcome = shell.run("convert", model / "vae", target)
    assert outcome.code == (1 if isinstance(error, Exception) else INTERRUPTED)
    assert [path.name for path in shell.folder.iterdir()] == ["out.safetensors"]
    assert target.read_bytes() == before


@pytest.mark.parametrize("arguments", [(), ("paint",), ("generate", "a", "--height", "tall"), ("info",)])
def test_a_command_that_cannot_be_parsed_shows_its_usage(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m sana")
