"""The command: which cases it chooses, and what it writes when one fails."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench.cases import Case
from bench.race import Call, Floor


def adding(error: float) -> Case:
    """Of which one result is this far from the other; infinity: it cannot be computed."""

    def build(dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Call]:
        if error == math.inf:
            raise torch.OutOfMemoryError("out of memory")
        return {"ours": lambda: torch.ones(8), "reference": lambda: torch.ones(8) + error}

    return Case(f"off by {error}", 0, 1.0, 1.0, build)


@pytest.mark.parametrize("compiled", [False, True])
def test_every_case_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """Also the one after an unequal case."""
    told = []

    def build(name: str) -> Case:
        case = adding(0.5 if name == "second" else 0.0)
        return replace(case, name=name, build=lambda *options: told.append(name) or case.build(*options))

    monkeypatch.setattr(sys, "argv", ["bench", "--repeats=1", f"--out={tmp_path / 'speed.json'}"])
    if compiled:
        sys.argv.append("--compiled")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "all_cases", lambda steps: [build(name) for name in ("first", "second", "third")])
    monkeypatch.setattr(command.Floor, "measure", lambda dtype, device: Floor(1e9, 1e9))
    monkeypatch.setattr(torch.compiler, "reset", lambda: told.append("reset"))
    assert command.main() == 1
    expected = ["reset", "first", "reset", "second", "reset", "third"]
    assert told == (expected if compiled else expected[1::2])


def test_failed_case_is_named_and_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results" / "speed.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--repeats", "1", "--out", str(out)])
    monkeypatch.setattr(command, "all_cases", lambda steps: [adding(error) for error in (0.0, 0.5, math.inf, 1e-6)])
    monkeypatch.setattr(command.Floor, "measure", lambda dtype, device: Floor(1e9, 1e9))
    assert command.main() == 1
    written = json.loads(out.read_text())
    assert {row["case"] for row in written["rows"]} == {"off by 0.0", "off by 1e-06"}
    unequal, uncomputed = written["failed"]
    assert unequal.startswith("off by 0.5: reference differs by") and uncomputed == "off by inf: out of memory"


def test_what_was_measured_is_written_before_the_next_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--repeats", "1", "--out", str(out)])
    last = replace(adding(0.0), name="last", build=lambda *options: sys.exit("killed"))
    monkeypatch.setattr(command, "all_cases", lambda steps: [adding(0.0), last])
    monkeypatch.setattr(command.Floor, "measure", lambda dtype, device: Floor(1e9, 1e9))
    with pytest.raises(SystemExit):
        command.main()
    assert {row["case"] for row in json.loads(out.read_text())["rows"]} == {"off by 0.0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only=decode"],
            "--only measures a part of the table in docs/speed.md; give --out, the file to write it to",
        ),
        (["--only=("], "'(' is no regular expression: "),
        (["--repeats=0"], "0 is below 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit, match="^2$"):
        command.parse()
    assert message in capsys.readouterr().err


def test_no_case_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "nothing", "--out", str(out := tmp_path / "speed.json")])
    monkeypatch.setattr(command.Floor, "measure", lambda dtype, device: Floor(1e9, 1e9))
    assert command.main() == 2
    assert not out.exists()


@pytest.mark.parametrize(("slowness", "expected"), [(0.5, 6), (1.0, 5), (2.0, 3)])
def test_time_taken_beyond_the_estimate_leaves_fewer_cases(
    monkeypatch: pytest.MonkeyPatch, slowness: float, expected: int
) -> None:
    """Cases of an estimated 2, 4, 6, ... seconds."""
    clock = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    cases = [replace(adding(0.0), flops=flops, weights=0.0) for flops in (5.0, 3.0, 1.0, 6.0, 2.0, 4.0)]
    chosen = []
    for case in command.choose(cases, Floor(9.0, 1.0), 31.0, 1e9, torch.float32, 3, False):
        clock[0] += slowness * 2 * case.flops
        chosen.append(case.flops)
    assert chosen == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0][:expected]
