"""Environments are made, updated, repaired and left alone, with real installations of a tiny package."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import environment


def make_wheel(folder: Path, name: str) -> str:
    """Writes a package with one empty module and returns the requirement that installs it."""
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return f"{name} @ {wheel.as_uri()}"


def imports(python: Path, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project in a folder with a space; its dependency is the package `first`, its extra `more` is `second`."""
    root = tmp_path / "a project"
    root.mkdir()
    first, second = make_wheel(tmp_path, "first"), make_wheel(tmp_path, "second")
    toml = f'[project]\ndependencies = ["{first}"]\n[project.optional-dependencies]\nmore = ["{second}"]\nnone = []\n'
    (root / "pyproject.toml").write_text(toml)
    monkeypatch.setattr(environment, "ROOT", root)
    return root


def test_second_call_installs_nothing_and_a_new_requirement_is_added(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[Path] = []
    python = environment.prepare("demo", ["none"], finish=finished.append)
    assert python.is_relative_to(project / ".venv" / "demo") and finished == [python]
    assert imports(python, "first") and not imports(python, "second")
    with monkeypatch.context() as patch:
        patch.setattr(environment, "OLDEST_PIP", (999, 0))
        assert environment.prepare("demo", ["none"], finish=finished.append) == python
        with pytest.raises(environment.SetupError, match=r"pip .* is too old: update it to 999.0 or newer"):
            environment.prepare("demo", ["more"])
    assert environment.prepare("demo", ["more"]) == python
    assert imports(python, "second") and len(finished) == 1


def test_interrupted_installation_is_made_anew(project: Path) -> None:
    missing = (project / "missing-1.0-py3-none-any.whl").as_uri()
    with pytest.raises(environment.SetupError, match="pip did not finish; the lines above say why"):
        environment.prepare("demo", ["none"], more=[f"missing @ {missing}"])
    remains = project / ".venv" / "demo" / "half-installed"
    remains.touch()
    python = environment.prepare("demo", ["none"])
    assert imports(python, "first") and not remains.exists()


def test_what_is_there_beside_the_requirements_stays(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the quick run of the tests and the whole one take turns in one environment without an installation."""
    python = environment.prepare("tests", ["more"])
    monkeypatch.setattr(environment, "pip", None)
    assert environment.prepare("tests", ["none"]) == environment.prepare("tests", ["more"]) == python
    assert imports(python, "second")


def test_constraints_hold_and_another_version_is_installed_anew(project: Path, tmp_path: Path) -> None:
    versions = tmp_path / "versions of all.txt"
    versions.write_text("# none is needed\nthird==1.0\n")
    python = environment.prepare("tests", ["none"], constraints=versions)
    assert not imports(python, "third")
    versions.write_text("first==2.0\n")
    with pytest.raises(environment.SetupError, match="pip did not finish"):
        environment.prepare("tests", ["none"], constraints=versions)


def test_an_installation_is_announced_and_nothing_else_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment.prepare("demo", ["none"], notice="It is large.")
    folder = project / ".venv" / "demo"
    assert capsys.readouterr().err.startswith(
        f"It is large.\nInstalling 1 requirements and what they need in {folder} (once) ...\n"
    )
    environment.prepare("demo", ["none"], notice="It is large.")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("installed", "requirement"),
    [
        ("2.13.0", "torch"),
        ("2.13.0+cpu", "torch>=2.5"),
        ("2.5.0", "torch>=2.5"),
        ("3.0", "torch>=2.5"),
    ],
)
def test_requirement_is_met(installed: str, requirement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"torch": installed}.__getitem__)
    assert environment.missing([requirement]) == []


def test_older_and_absent_packages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    old = "torch>=2.5"
    monkeypatch.setattr(importlib.metadata, "version", {"torch": "2.4.1+cu121"}.__getitem__)
    assert environment.missing([old]) == [old]
    monkeypatch.undo()
    assert environment.missing(["pytest", "no-such-package", "pytest>=999"]) == ["no-such-package", "pytest>=999"]


def test_groups_come_before_dependencies(project: Path) -> None:
    names = [requirement.split()[0] for requirement in environment.read_requirements(["more"])]
    assert names == ["second", "first"]


def test_old_python_is_refused() -> None:
    with pytest.raises(environment.SetupError, match=r"Python 3\.\d+ is too old: use Python 99\.0 or newer"):
        environment.check_python((99, 0))


def test_python_without_pip_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(environment.SetupError, match="has no pip: install it"):
        environment.prepare("demo", ["none"])


def test_exit_code_folder_and_variables_pass_through(tmp_path: Path) -> None:
    code = "import os, sys; sys.exit(int(os.environ['ANSWER']) + os.path.samefile('.', sys.argv[1]))"
    command = [sys.executable, "-c", code, tmp_path]
    assert environment.run(command, folder=tmp_path, variables={"ANSWER": "41"}) == 42


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_signal_is_reported_as_shells_do() -> None:
    assert environment.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 128 + 9
