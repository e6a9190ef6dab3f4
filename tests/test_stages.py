"""What `python3 tests` runs and fetches for which arguments."""

import importlib
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
STYLE = ["ruff-check", "ruff-format"]
INSIDE = ["inside-second-device", "inside-0.30.0", "inside-0.26.0", "inside-0.24.1"]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tests")
    return importlib.import_module("stages")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Says what a run with these arguments fetches and which groups it installs, without doing so."""

    def fetch(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "path", [*sys.path])
        command = runpy.run_path(str(ROOT / "tests" / "__main__.py"))
        found: list[str] = []
        monkeypatch.setattr(command["downloads"], "fetch_hosts", lambda: found.append("hosts"))
        monkeypatch.setattr(command["downloads"], "host_requirements", list)
        monkeypatch.setattr(command["downloads"], "fetch_chromium", lambda: found.append("chromium"))
        monkeypatch.setattr(command["downloads"], "fetch_frontend", lambda: found.append("frontend"))
        monkeypatch.setattr(command["downloads"], "fetch_converters", lambda: found.append("converters"))
        monkeypatch.setattr(command["downloads"], "fetch_newest_packages", lambda: found.append("newest"))
        monkeypatch.setattr(command["environment"], "prepare", lambda name, groups, **more: found.extend(groups))
        command["prepare"](command["parse"](arguments))
        return found

    return fetch


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([], [*STYLE, "outside", "servers", *INSIDE]),
        (["tests"], [*STYLE, "outside", "servers", *INSIDE]),
        (["tests/sana/sampling", "tests/test_layering.py::test_every_room_is_known"], [*STYLE, "outside"]),
        (["tests/host/test_server.py"], [*STYLE, "servers"]),
        (["tests/browser"], [*STYLE, "servers"]),
        (["tests/host/inprocess/test_lora.py"], [*STYLE, *INSIDE]),
        (["tests/training", "tests/workflows"], [*STYLE, "outside", "servers"]),
    ],
)
def test_paths_choose_the_stages_that_have_them(paths: list[str], names: list[str], stages: ModuleType) -> None:
    chosen = stages.choose(list(stages.STAGES), ["-k", "name", *paths])
    assert [stage.name for stage in chosen] == names
    for stage in chosen:
        assert stage.runs_tests == (stage.name not in STYLE) == ("name" in stage.arguments)
    given = [path for path in paths if path != "tests"]
    assert not given or sorted({a for stage in chosen for a in stage.arguments if a.startswith("tests/")}) == sorted(
        given
    )


def test_every_test_runs_in_one_stage(stages: ModuleType) -> None:
    """A second device and another host run what the first host does."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        label = path.relative_to(ROOT).as_posix()
        names = {stage.name for stage in stages.choose(list(stages.STAGES), [label])} - {*STYLE, *INSIDE[1:]}
        assert len(names) == 1, label
    outside = stages.STAGES["outside"].arguments
    assert {argument for argument in outside if "ignore" in argument} == {f"--ignore={name}" for name in stages.SERVERS}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--quick"], ["test"]),
        (["tests/sana/sampling"], ["test"]),
        (["--stage", "outside", "--stage", "ruff-check"], ["test"]),
        (["--stage", "inside-0.24.1"], ["hosts", "test", "test-host"]),
        (["tests/host/inprocess"], ["hosts", "test", "test-host"]),
        (["tests/workflows"], ["chromium", "frontend", "converters", "hosts", "test", "test-host"]),
        ([], ["chromium", "frontend", "converters", "hosts", "test", "test-host"]),
        (["--stage", "newest-inside-0.30.0"], ["hosts", "newest", "test", "test-host"]),
        (["--newest"], ["chromium", "frontend", "converters", "hosts", "newest", "test", "test-host"]),
    ],
)
def test_only_what_is_needed_is_fetched(
    arguments: list[str], expected: list[str], fetched: Callable[..., list[str]]
) -> None:
    assert fetched(*arguments) == expected


def test_the_newest_packages_are_tried_only_if_asked_for_and_fail_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    command = runpy.run_path(str(ROOT / "tests" / "__main__.py"))
    names = ["newest-servers", "newest-inside-0.30.0"]
    assert not any(stage.newest_packages for stage in command["parse"]([]))
    stages = command["parse"](["--quick", "--newest"])
    assert [stage.name for stage in stages] == [*STYLE, "outside", *names]
    assert [stage.name for stage in command["parse"](["--newest", "tests/workflows"])] == [*STYLE, "servers", names[0]]
    for stage in stages[3:]:
        assert stage.newest_packages and stage.variables["PYTHONPATH"] == stage.variables["SANA_TEST_NEWEST"]
    good = dict.fromkeys([stage.name for stage in stages], 0)
    assert command["summarise"](stages, good) == 0 and "newest packages" not in capsys.readouterr().err
    assert command["summarise"](stages, good | {names[1]: 1}) == 0
    assert f"failed: {names[1]}. This fails no run." in capsys.readouterr().err
    assert command["summarise"](stages, good | {names[1]: 1, "outside": 4}) == 4
    assert "Failed: outside." in capsys.readouterr().err


def test_unknown_stage_is_refused_with_the_names_of_all() -> None:
    """Before anything is installed."""
    command = [sys.executable, "-S", ROOT / "tests", "--stage", "insight"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "invalid choice: 'insight'" in result.stderr and "inside-second-device" in result.stderr
