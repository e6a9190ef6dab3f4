"""Captions by models of transformers with random weights, which say what nobody can read."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from sana.images import read_picture
from sana.training.__main__ import main
from sana.training.captioning import MOST_TOKENS, Captioner
from sana.training.pretrained import QUESTION
from sana.training.shards import Shards
from tests.training.drawn import draw_pictures
from tests.training.tiny_models import CHAT, write_blip, write_clip, write_llava


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"llava": write_llava(folder / "llava"), "blip": write_blip(folder / "blip")}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    draw_pictures(folder, 3)
    return folder


def test_a_chat_is_that_of_transformers(models: dict[str, Path], pictures: Path) -> None:
    picture = read_picture(pictures / "1.png")
    model = AutoModelForImageTextToText.from_pretrained(models["llava"])
    processor = AutoProcessor.from_pretrained(models["llava"])
    assert CHAT.endswith("ASSISTANT:")
    inputs = processor(images=picture, text=f"USER: <image> {QUESTION} ASSISTANT:", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
    told = inputs["input_ids"].shape[1]
    expected = processor.decode(tokens[0, told:], skip_special_tokens=True).strip()
    assert Captioner(models["llava"])(picture) == expected and expected


def test_a_model_without_a_chat_sees_the_picture_alone(models: dict[str, Path], pictures: Path) -> None:
    picture = read_picture(pictures / "1.png")
    model = AutoModelForImageTextToText.from_pretrained(models["blip"])
    processor = AutoProcessor.from_pretrained(models["blip"])
    inputs = processor(images=picture, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
    assert Captioner(models["blip"])(picture) == processor.decode(tokens[0], skip_special_tokens=True).strip()


def test_the_question_and_the_picture_count(models: dict[str, Path]) -> None:
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    ask = Captioner(models["llava"])
    assert ask(red) == ask(red) != ask(blue)
    assert ask(red) != Captioner(models["llava"], question="What is it?")(red)


def test_the_shell_writes_captions_and_goes_on(
    models: dict[str, Path], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["captions", "write", "--data", str(pictures), "--model", str(models["llava"])]
    assert main(command) == 0 and capsys.readouterr().out == "3 captions written.\n"
    first = pictures / "1_llava.json"
    found = json.loads(first.read_text())["1"]["llava"]
    assert found == Captioner(models["llava"])(read_picture(pictures / "1.png"))
    before = first.stat().st_mtime_ns
    (pictures / "2_llava.json").unlink()
    assert main(command) == 0 and capsys.readouterr().out == "1 captions written.\n"
    assert first.stat().st_mtime_ns == before
    assert main([*command, "--name", "other", "--question", "What is it?"]) == 0
    assert json.loads((pictures / "1_other.json").read_text())["1"]["other"] != found


@pytest.mark.parametrize("training", ["finetune", "lora"])
def test_captions_that_were_written_and_scored_are_trained_on(
    models: dict[str, Path], pictures: Path, tmp_path: Path, training: str
) -> None:
    clip = write_clip(tmp_path / "clip")
    assert main(["captions", "write", "--data", str(pictures), "--model", str(models["llava"])]) == 0
    assert main(["captions", "score", "--data", str(pictures), "--clip", str(clip)]) == 0
    train = [training, "--data", str(pictures), "--out", str(tmp_path / "out"), "--steps", "1", "--sheet-every", "0"]
    assert main([*train, "--captions", "score", "--score-threshold", "0", "--score-temperature", "1"]) == 0
    assert len(Shards(tmp_path / "out" / "states")) == 9  # a latent and two texts of each picture
    assert main([*train[:3], "--out", str(tmp_path / "best"), *train[5:], "--captions", "best"]) == 0
    assert len(Shards(tmp_path / "best" / "states")) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--name", "a/b"), "captions of a model cannot be called 'a/b'"),
        (("--model", "nobody/model"), "nobody/model cannot be loaded"),
        (("--data", "nowhere"), "nowhere is no folder"),
    ],
)
def test_what_cannot_be_done_is_said_before(
    models: dict[str, Path], pictures: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
) -> None:
    command = ["captions", "write", "--data", str(pictures), "--model", str(models["llava"]), *change]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not list(pictures.glob("*.json"))


def test_half_precision(models: dict[str, Path], pictures: Path) -> None:
    ask = Captioner(models["llava"])
    ask.model = ask.model.to(torch.bfloat16)
    assert isinstance(ask(read_picture(pictures / "1.png")), str)
