"""The package is built, installed and used, without the network, from folders with a space in their names."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "sana" / "demo" / "checkpoint"


def run(*command: str | Path, folder: Path) -> str:
    """The output of a command that sees neither the checkout nor the network's packages."""
    variables = {
        **os.environ,
        "PYTHONPATH": "",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }  # "0": no isolation
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a package")


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    """The source distribution of a copy of this tree: building leaves files in its folder."""
    tree = folder / "the tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "output", "*.egg-info"))
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, folder=tree)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(folder: Path, source: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, source, folder=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def programs(folder: Path, wheel: Path) -> Path:
    """The folder of the programs of an environment that has the wheel, and sees the packages of this one."""
    home = folder / "an environment"
    venv.create(home)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    Path(paths["purelib"], "packages of the tests.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    run(sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--no-deps", wheel, folder=folder)
    return scripts


def test_wheel_holds_the_library_and_the_demo_model_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {path for path in (ROOT / "sana").rglob("*.py") if "demo" not in path.parent.parts}
    files = {*modules, ROOT / "sana" / "py.typed", *(path for path in DEMO.rglob("*") if path.is_file())}
    assert {name for name in names if ".dist-info/" not in name} == {
        path.relative_to(ROOT).as_posix() for path in files
    }


def test_source_distribution_holds_what_the_wheel_is_made_of(source: Path) -> None:
    tops = {name.split("/")[1] for name in tarfile.open(source).getnames() if "/" in name}
    made = {"PKG-INFO", "setup.cfg", "comfyui_sana.egg-info"}
    assert tops - made == {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "sana"}


def test_command_draws_and_describes(programs: Path, tmp_path: Path) -> None:
    here = tmp_path / "another folder"
    here.mkdir()
    sizes = ("--height", "64", "--width", "64", "--steps", "2")
    run(programs / "sana", "generate", "two blue stars", *sizes, "--out", "my picture.png", folder=here)
    assert Image.open(here / "my picture.png").size == (64, 64)
    assert run(programs / "sana", "info", "demo", folder=here).startswith("transformer: a SANA transformer\n")
    assert run(programs / "sana", "--help", folder=here).startswith("usage: sana [-h]")
    assert run(programs / "python", "-m", "sana", "--help", folder=here).startswith("usage: python -m sana [-h]")


def test_library_is_imported_from_anywhere(programs: Path, tmp_path: Path) -> None:
    """And tells the version of the project."""
    code = "import sana; print(sana.__file__); from sana.options import version; print(version())"
    place, version = run(programs / "python", "-c", code, folder=tmp_path).splitlines()
    assert Path(place).is_relative_to(programs.parent)
    assert f'\nversion = "{version}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
