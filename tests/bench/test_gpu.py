"""What bench/gpu.sh runs on a GPU, here with small networks on a CPU: the commands of the script itself, one after another."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import captured, precision, small
from bench.precision import Check, checked
from bench.training import KINDS

ROOT = Path(__file__).parents[2]
LIMIT = 480  # seconds in all
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$(dirname "$0")/commands"
case "$*" in *$FAILING*) exit 3 ;; esac
"""

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("bash", "timeout"))), reason="bench/gpu.sh needs both")


def script(folder: Path, *arguments: str, failing: str = "nothing fails") -> tuple[subprocess.CompletedProcess, list]:
    """Run the script with a Python that only notes what it is told. The run, and the arguments of each command."""
    (python := folder / "python").write_text(PYTHON)
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "FAILING": failing, "PATH": "/usr/bin:/bin"}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--out", str(folder / "out"), *arguments]
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    notes = folder / "commands"
    return run, notes.read_text().splitlines() if notes.exists() else []


def test_every_part_has_a_limit_and_a_failed_one_costs_no_other(tmp_path: Path) -> None:
    run, commands = script(tmp_path, failing="bench.memory")
    limits = [int(line.split()[-2]) for line in run.stdout.splitlines() if "at most" in line]
    assert len(limits) == len(commands) >= 5 and sum(limits) <= LIMIT
    modules = [command.split()[1] for command in commands[:6]]
    assert modules == ["bench.precision", "bench", "bench.captured", "bench", "bench.memory", "bench.training"]
    assert run.returncode == 1 and run.stdout.splitlines()[-1] == "failed or stopped: memory"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--large"], "option --large is unknown; use --small or --out FOLDER"),
        (
            ["speeds"],
            "part speeds is unknown; use one of precision speed captured compiled memory training host-demo host-low host",
        ),
        (["--out"], "--out needs a folder"),
    ],
)
def test_what_the_script_does_not_know_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    run, commands = script(tmp_path, *arguments)
    assert (run.returncode, run.stderr.strip(), commands) == (2, message, [])


def test_chosen_parts_alone_run(tmp_path: Path) -> None:
    run, commands = script(tmp_path, "training", "speed")
    assert [command.split()[1] for command in commands] == ["bench", "bench.training"] and run.returncode == 0


@pytest.mark.parametrize("name", ["precision", "speed", "captured", "compiled", "memory", "training"])
def test_each_part_runs_with_small_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    noted = tmp_path / "arguments"
    (python := tmp_path / "python").write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {noted}\n')
    python.chmod(0o755)
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--small", "--out", str(tmp_path), name]
    subprocess.run(command, env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"}, check=True, capture_output=True)
    flag, module, *arguments = noted.read_text().splitlines()
    assert (flag, module) == ("-m", "bench.small")
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with torch.random.fork_rng():
        assert not small.main()
    result = json.loads((tmp_path / f"gpu-{name}.json").read_text())
    rows = result["phases" if name == "memory" else "rows"]
    if name == "precision":
        forms = {row["format"].split()[0] for row in rows}
        assert forms == {"float32", "float16", "bfloat16", "bfloat16,", "fp8", "nvfp4"}
        assert {row["what"].split()[0] for row in rows} == {"sums", "transformer,", "encode,", "decode,", "Gemma-2-2b,"}
        assert all(row["error"] < row["bound"] for row in rows)
        assert all(row["error"] > 1e-4 for row in rows if row["format"] != "float32")
    elif name == "speed":
        assert not result["left_out"] and len({row["case"] for row in rows}) == 7
        assert not any("compiled" in row["candidate"] for row in rows)
    elif name == "captured":
        assert not result["failed"] and len({row["case"] for row in rows}) == 6
        assert [row["candidate"] for row in rows] == ["ours", "ours, graphs"] * 6
    elif name == "compiled":
        assert len({row["case"] for row in rows if "ours, compiled" in row["candidate"]}) == 4
    elif name == "memory":
        assert len(rows) == 3 and all(phase["measured"] is not None for phase in rows)
    else:
        assert [row["trained"] for row in rows] == [*KINDS] and all(row["steps_per_second"] > 0 for row in rows)


def test_graphs_need_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.captured"])
    assert captured.main() == 2
    message = "Left out: graphs are recorded on a GPU by CUDA or ROCm, and PyTorch finds none here.\n"
    assert capsys.readouterr() == ("", message)


def test_what_is_too_far_off_or_cannot_be_computed_fails() -> None:
    check = Check("a sum", "float32", 0.1, lambda: (torch.tensor([1.0, 0.05]), torch.tensor([1.0, 0.0])))
    assert checked(check)["failed"] == "" and checked(check)["error"] == pytest.approx(0.05)
    far = checked(replace(check, bound=0.04))
    assert far["failed"] == "differs by 5.0e-02 from the CPU in float32"
    broken = checked(replace(check, run=lambda: (torch.full((2,), torch.nan), torch.ones(2))))
    assert broken["failed"] == "differs by nan from the CPU in float32" and broken["error"] is None

    def impossible() -> precision.Outcome:
        raise RuntimeError("no kernel for this\nat line 3")

    assert checked(replace(check, run=impossible))["failed"] == "no kernel for this"
