"""What others read in pyproject.toml."""

import re
from typing import Any

import pytest

from tools.environment import read_project


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return read_project()


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
    assert {*extras} == {"demo", "training", "bench", "test", "test-host"}
    pins = {requirement for extra in extras.values() for requirement in extra}
    assert len(pins) == len({pin.split("==")[0] for pin in pins})
    assert all("==" in pin for pin in pins)
