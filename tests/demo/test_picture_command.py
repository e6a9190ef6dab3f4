"""The picture command uses the Python at hand if that can draw, and says what it is going to download if not."""

import importlib.metadata
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ROOT / "sana" / "demo"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of the command, whose installations are refused."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    functions = SimpleNamespace(**runpy.run_path(str(COMMAND / "__main__.py")))
    monkeypatch.setattr(functions.environment, "prepare", None)
    return functions


def test_draws_in_the_python_at_hand(tmp_path: Path) -> None:
    """Also beside files that are named like modules it needs."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    if sys.version_info >= (3, 11):  # older ones look into the current folder first
        (folder / "torch.py").write_text("raise RuntimeError")
    options = ["--steps", "1", "--height", "64", "--width", "64", "--out", "my picture.png"]
    result = subprocess.run(
        [sys.executable, COMMAND, "a red circle", *options], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0 and "Installing" not in result.stderr, result.stderr
    assert Image.open(folder / "my picture.png").size == (64, 64)


def test_the_python_at_hand_keeps_its_modules(command: SimpleNamespace) -> None:
    assert command.choose_python() == (Path(sys.executable), [str(ROOT), "elsewhere"])


@pytest.mark.parametrize("torch", ["2.4.1", None])
def test_environment_is_made_if_a_package_is_old_or_absent(
    torch: str | None, command: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, calls = importlib.metadata.version, []

    def installed(name: str) -> str:
        if name == "torch" and torch is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return torch if name == "torch" else version(name)

    def prepare(name: str, extras: list[str], *, notice: str) -> Path:
        calls.append((name, extras, notice))
        return Path("its python")

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(command.environment, "prepare", prepare)
    assert command.choose_python() == (Path("its python"), [str(ROOT)])
    (name, extras, notice) = calls.pop()
    assert (name, extras, calls) == ("demo", ["demo"], [])
    assert notice.startswith(f"{sys.executable} lacks torch>=2.5.\nUp to about 2.8 GB are downloaded, 4.6 GB on disk:")


def test_help_needs_no_package() -> None:
    bare = [sys.executable, "-S", COMMAND]
    result = subprocess.run([*bare, "-h"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert result.returncode == 0
    assert result.stdout.startswith('Usage: python3 sana/demo "a red circle left of a blue square" [options of')
