"""Commands of `python -m sana` in this process, and what they leave."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from sana.__main__ import main


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
