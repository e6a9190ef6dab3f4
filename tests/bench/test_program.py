"""The time of the program itself: all candidates are the same step, they take turns, and the table shows what was measured."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import program
from bench.program import CONFIG, PLAIN, REFERENCE, SHELL, candidates, measured
from bench.tables import KINDS

ROWS = {"seconds": 0.01, "least": 0.009, "ratio": 1.5, "spread": 0.02}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_candidates_are_one_step(dtype: torch.dtype) -> None:
    calls = candidates(dtype, replace(CONFIG, depth=2), lambda step: lambda: step.network.velocity(*given(step)))
    rows = measured(calls, 2, program.TOLERANCE[dtype])
    assert [row["candidate"] for row in rows] == [REFERENCE, SHELL, PLAIN, program.HOST]
    assert all(0 < row["least"] <= row["seconds"] for row in rows) and rows[0]["ratio"] == 1


@torch.no_grad()
def given(step: program.Step) -> tuple:
    """What a host has to work out of the step by itself."""
    modulation = step.network.modulation(torch.full((1,), 1000 * program.SIGMA))
    return step.x, modulation, step.network.text_context(step.text)


def test_candidates_take_turns_and_are_compared_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([4.0, 2.0, 9.0, 3.0, 8.0, 8.0])
    order = []
    monkeypatch.setattr(program, "seconds", lambda call: (call(), next(taken))[1])
    calls = {name: lambda name=name: order.append(name) or torch.ones(2) for name in ("a", "b")}
    first, second = measured(calls, 3, 1e-6)
    assert order[-6:] == ["a", "b"] * 3
    assert (first["seconds"], first["least"]) == (8, 4) and (second["seconds"], second["least"]) == (3, 2)
    assert (second["ratio"], second["spread"]) == (2, pytest.approx(0.5))  # of 2, 3 and 1
    with pytest.raises(ArithmeticError, match="b differs by 1.0e[+]00 from a, more than 1e-06"):
        measured({"a": lambda: torch.ones(2), "b": lambda: torch.zeros(2)}, 1, 1e-6)


def test_the_command_writes_what_the_table_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, threads = tmp_path / "program.json", torch.get_num_threads()
    monkeypatch.setattr(program, "candidates", lambda dtype, *others: {"a": lambda: torch.ones(2)})
    monkeypatch.setattr(sys, "argv", ["bench.program", "--repeats", "1", "--out", str(out)])
    program.main()
    torch.set_num_threads(threads)
    assert "python -m tests.host.steps program measures it, after python3 tests" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [(row["dtype"], row["candidate"]) for row in result["rows"]] == [("float32", "a"), ("bfloat16", "a")]
    result["rows"] = [{"dtype": dtype, "candidate": "here", **ROWS} for dtype in ("float32", "bfloat16")]
    lines = list(KINDS["program"]({**result, "diffusers": "1"}))
    assert lines[-1] == "| here | 10.0 ms | 1.50 x | 10.0 ms | 1.50 x |" and "within 2%" in lines[1]
