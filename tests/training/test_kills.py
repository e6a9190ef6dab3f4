"""What a training loses by kills: nothing."""

import os
import subprocess
import sys
from pathlib import Path

import sana
from tests.training.drawn import draw_pictures

ROOT = Path(sana.__file__).parents[1]


def test_a_training_that_is_killed_at_any_point_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """State, log, sheets and result are the same to the bit, nothing else is left, and one training at a time has a folder."""
    draw_pictures(tmp_path / "pictures", 2)
    command = [sys.executable, "-m", "tests.training.kills", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
