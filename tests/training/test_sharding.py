"""Training whose weights lie in parts in several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sana
from sana.training.__main__ import main

ROOT = Path(sana.__file__).parents[1]


def test_weights_in_parts_learn_what_whole_ones_learn(tmp_path: Path) -> None:
    """By real processes: losses, results, saved states, resuming, and the command of the shell."""
    command = [sys.executable, "-m", "tests.training.sharded", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


def test_one_process_has_nobody_to_share_with(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "--data", str(pictures), "--out", str(tmp_path / "out"), "--shard"]) == 1
    assert capsys.readouterr().err == (
        "error: shard is for several processes, and this is one; start them by accelerate launch --num_processes, "
        "or leave it out\n"
    )
    assert not (tmp_path / "out").exists()


def test_other_optimizers_keep_their_weights_whole(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--data", str(pictures), "--out", str(tmp_path / "out"), "--shard"]
    assert main([*command, "--optimizer", "adamw8bit"]) == 1
    assert capsys.readouterr().err == (
        "error: shard is possible with adamw alone, and optimizer is adamw8bit; leave one of them out\n"
    )
