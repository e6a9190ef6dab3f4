"""Captions and their scores by workers of a real Ray."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from sana.training.__main__ import main
from tests.training.drawn import draw_pictures
from tests.training.tiny_models import write_clip


def scores(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*_clip_score.json")}


def test_scores_are_those_of_one_process(
    tmp_path: Path, cluster: str, without_ray: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture that is broken is told of, and the others are scored. A list of captions is of several pictures."""
    clip = write_clip(tmp_path / "clip")
    one, many = tmp_path / "one", tmp_path / "many"
    command = ["captions", "score", "--clip", str(clip), "--data"]
    for folder in (one, many):
        draw_pictures(folder, 6)
        listed = [
            {"picture": path.name, "text": "a drawing", "name": "mine"} for path in sorted(folder.glob("*.png"))[1:3]
        ]
        (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, listed)))
    assert main([*command, str(one)]) == 0
    broken = sorted(many.glob("*.png"))[0]
    content = broken.read_bytes()
    broken.write_bytes(content[:-60])
    capsys.readouterr()
    try:
        assert main([*command, str(many), "--workers", "2", "--cluster", cluster]) == 1
    finally:
        ray.shutdown()
    found = capsys.readouterr()
    assert found.out == "7 scores written.\n" and str(broken) in found.err
    broken.write_bytes(content)
    without_ray()
    assert main([*command, str(many), "--workers", "1"]) == 0
    assert capsys.readouterr().out == "1 scores written.\n"
    assert scores(many).keys() == scores(one).keys() and len(scores(one)) == 8
