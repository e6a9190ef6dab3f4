"""What is kept where a command stops halfway."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError

import sana
from sana.__main__ import INTERRUPTED
from sana.checkpoints import writing
from tests.sana.mishaps import kill_while, write_half
from tests.sana.shell.commands import Shell, error_line, record

ROOT = Path(sana.__file__).parents[1]


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
    outcome = shell.generate("a dog", "--overwrite")
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
    monkeypatch.setattr(writing, "save_file", save_half)
    outcome = shell.run("convert", model / "vae", target)
    assert outcome.code == (1 if isinstance(error, Exception) else INTERRUPTED)
    assert [path.name for path in shell.folder.iterdir()] == ["out.safetensors"]
    assert target.read_bytes() == before


@pytest.mark.parametrize("command", ["generate", "convert"])
def test_a_command_removes_what_a_killed_one_was_writing(shell: Shell, model: Path, command: str) -> None:
    kill_while(lambda: write_half(shell.folder / "out.png"))
    assert len(list(shell.folder.iterdir())) == 1
    if command == "generate":
        (path,) = shell.draw("a cat")
    else:
        assert shell.run("convert", model / "vae", path := shell.folder / "out.safetensors").code == 0
    assert list(shell.folder.iterdir()) == [path]
