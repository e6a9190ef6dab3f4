"""Scores of captions, by a CLIP model of transformers with random weights."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPModel, CLIPProcessor

from sana.training.__main__ import main
from sana.training.captions import read_captions
from sana.training.pictures import picture_files
from sana.training.pretrained import load_part
from sana.training.scoring import TOGETHER, Scorer, score_captions
from tests.training.drawn import draw_pictures
from tests.training.tiny_models import write_clip, write_llava


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    draw_pictures(folder, TOGETHER + 2)
    (folder / "2_VILA.json").write_text(json.dumps({"2": {"VILA": "a very long caption " * 40}}))
    return folder


def test_scores_are_those_of_transformers(clip: Path, pictures: Path) -> None:
    """By the model's own logits, which are the cosines times exp(logit_scale)."""
    paths = picture_files(pictures)
    assert score_captions(pictures, paths, Scorer(clip)) == len(paths) + 1
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    for path, captions in zip(paths, read_captions(pictures, paths), strict=True):
        inputs = processor(
            text=[caption.text for caption in captions],
            images=Image.open(path).convert("RGB"),
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        with torch.no_grad():
            expected = 100 * model(**inputs).logits_per_image[0] / model.logit_scale.exp()
        found = torch.tensor([caption.score for caption in captions])
        assert torch.allclose(found, expected, atol=2e-4)
        assert expected.min() > 1


def test_no_score_is_below_zero(clip: Path, pictures: Path) -> None:
    scorer = Scorer(clip)
    scorer.model.visual_projection.weight.data.neg_()
    assert scorer([pictures / "1.png"], [["a red circle"]])[0].tolist() == [0]


@pytest.mark.parametrize("command", [["score", "--clip"], ["write", "--model"]], ids=lambda command: command[0])
def test_a_device_that_cannot_be_used_is_refused_before_a_model_is_loaded(
    pictures: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert main(["captions", *command, "nowhere", "--data", str(pictures), "--device=meta"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: device meta cannot be used (") and error.endswith("); give another, such as cpu\n")


def test_the_shell_goes_on_where_it_was(clip: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["captions", "score", "--data", str(pictures), "--clip", str(clip)]
    assert main(command) == 0 and capsys.readouterr().out == f"{TOGETHER + 3} scores written.\n"
    before = (pictures / "1_prompt_clip_score.json").stat().st_mtime_ns
    (pictures / "2.txt").write_text("another caption")
    (pictures / "4_prompt_clip_score.json").unlink()
    shutil.copy(pictures / "1.png", pictures / "6.png")
    assert main(command) == 0 and capsys.readouterr().out == "3 scores written.\n"
    assert (pictures / "1_prompt_clip_score.json").stat().st_mtime_ns == before
    assert main(command) == 0 and capsys.readouterr().out == "0 scores written.\n"


def test_what_is_no_model_and_what_is_not_here(tmp_path: Path, clip: Path, pictures: Path) -> None:
    with pytest.raises(ValueError, match="give the folder of a model that transformers can load"):
        Scorer(pictures)
    with pytest.raises(ValueError, match="nobody/clip cannot be loaded .*give the folder of a model, or --download"):
        Scorer("nobody/clip")
    with pytest.raises(ValueError, match="llava lacks .* tensors of a CLIPModel, first .*; give such a model"):
        Scorer(write_llava(tmp_path / "llava"))
    shutil.copytree(clip, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="broken cannot be loaded"):
        Scorer(tmp_path / "broken")
    shutil.copytree(clip, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match="mute lacks the files of its tokenizer, such as tokenizer.json; give"):
        Scorer(tmp_path / "mute")


def test_code_of_a_model_is_not_run(tmp_path: Path, clip: Path) -> None:
    folder = shutil.copytree(clip, tmp_path / "code")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "code.Model"}, "model_type": "unheard of"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_part(AutoModel, folder, False)
    assert not (tmp_path / "ran").exists()


def test_without_transformers(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "sana.training.scoring")
    assert main(["captions", "score", "--data", str(pictures)]) == 1
    message = 'error: captions and scores need the package transformers; run pip install ".[captions]" in the folder of'
    assert capsys.readouterr().err == f"{message} this project\n"


def test_a_broken_picture_loses_no_scores(clip: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "9.png").write_bytes((pictures / "9.png").read_bytes()[:-60])
    assert main(["captions", "score", "--data", str(pictures), "--clip", str(clip)]) == 1
    assert str(pictures / "9.png") in capsys.readouterr().err
    assert (pictures / "1_prompt_clip_score.json").exists()
