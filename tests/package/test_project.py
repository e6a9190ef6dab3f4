"""What pyproject.toml, the workflows of GitHub and pre-commit must agree on."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.environment import read_project

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return read_project()


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_registry_finds_what_it_requires(project: dict[str, Any]) -> None:
    home = "https://github.com/comfyui-sana/ComfyUI-Sana"
    assert {name: url.startswith(home) for name, url in project["urls"].items()} == dict.fromkeys(
        ("Repository", "Documentation", "Issues", "Changelog"), True
    )
    assert project["urls"]["Repository"] == home
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])


def test_dependencies_are_of_the_form_that_the_picture_command_compares(project: dict[str, Any]) -> None:
    for requirement in project["dependencies"]:
        assert re.fullmatch(r"[A-Za-z]+(>=\d+\.\d+(\.\d+)?)?", requirement)


def test_extras_agree_on_versions(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    beside_a_host = {"gguf", "quantize"}  # installed into an environment that is not ours to pin
    pinned = {"demo", "training", "optimizers", "captions", "cluster", "bench", "test", "test-host"}
    assert {*extras} == {*pinned, *beside_a_host}
    assert all(">=" in requirement for name in beside_a_host for requirement in extras[name])
    pins = {requirement for name, extra in extras.items() if name not in beside_a_host for requirement in extra}
    assert len(pins) == len({pin.split("==")[0] for pin in pins})
    assert all("==" in pin for pin in pins)


def test_pre_commit_has_the_same_ruff(project: dict[str, Any]) -> None:
    (repository,) = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert f"ruff=={repository['rev'].removeprefix('v')}" in project["optional-dependencies"]["test"]


def test_workflow_runs_every_stage_that_is_not_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests")
    stages = importlib.import_module("stages")
    jobs = read_yaml(WORKFLOWS / "tests.yml")["jobs"]
    assert jobs["whole"]["strategy"]["matrix"]["stage"] == [stage.name for stage in stages.SLOW]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {"python tests --quick", "python tests --stage ${{ matrix.stage }}"} <= {*commands}


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.yml")), ids=lambda path: path.stem)
def test_actions_of_others_are_pinned(path: Path) -> None:
    """To a commit: a tag may be moved."""
    for job in read_yaml(path)["jobs"].values():
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
