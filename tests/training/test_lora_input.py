"""What a training of a LoRA refuses, and what breaks it on its way."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sana.checkpoints.writing import write_transformer
from sana.networks.transformer import SanaTransformer
from sana.training.adapters import (
    AdapterConfig,
    add_adapter,
)
from sana.training.demo import IDENTITY, TRANSFORMER
from sana.training.flow import FlowBatch, FlowObjective
from sana.training.loop import DivergedError, TrainingConfig, train
from sana.training.shards import Shards
from tests.sana.mishaps import no_file_above
from tests.sana.twins import randomise
from tests.training.drawn import draw_pictures
from tests.training.lora_runs import SMALL, lora, random_batches


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--rank=0", "rank is 0; it must be at least 1, such as 16"),
        ("--alpha=nan", "alpha is nan; it must be above 0, such as the rank"),
        ("--alpha=0", "alpha is 0.0; it must be above 0, such as the rank"),
        ("--dropout=1", "dropout is 1.0; it must be 0, for none, or a share below 1"),
        ("--learning-rate=nan", "learning_rate is nan; it must be above 0 and below 1, such as 1e-4"),
        ("--learning-rate=1", "learning_rate is 1.0; it must be above 0 and below 1, such as 1e-4"),
        ("--clip=0", "clip is 0.0; it must be above 0, such as 1"),
        ("--prior-weight=inf", "prior_weight is inf; it must be above 0, such as 1"),
        ("--ema=1", "ema is 1.0; it must be 0, for no average, or a share below 1"),
        ("--caption-dropout=-1", "caption_dropout is -1.0; it must be 0, for none, or a share below 1"),
        ("--accumulate=0", "accumulate is 0; it must be at least 1"),
        ("--warmup=-1", "warmup is -1; it must be 0, for none, or more"),
        ("--seed=-1", "seed is -1; it must be a whole number from 0 to 2^64 - 1\n"),
        ("--seed=18446744073709551616", "seed is 18446744073709551616; it must be a whole number from 0 to 2^64 - 1\n"),
        ("--targets=(", "targets '(' is no regular expression (missing ), unterminated subpattern at position 0); "),
        ("--start=nowhere", "nowhere is no file; give the LoRA to go on from, or leave it out"),
        ("--data=nowhere", "nowhere is no folder; give one with pictures, each with a .txt file of its name"),
        ("--prior=nowhere", "nowhere is no folder; give one with pictures, each with a .txt file of its name"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert lora(pictures, tmp_path / "out", option) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_pictures_in_the_work_folder_are_told_to_be_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not learnt, since sheets lie there, too."""
    draw_pictures(data := tmp_path / "pictures", 1)
    assert lora(data, tmp_path) == 1
    assert capsys.readouterr().err == (
        f"error: the pictures in {data} lie in the work folder {tmp_path}; give them a folder outside of it\n"
    )


def test_targets_that_match_nothing_name_a_layer(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora(pictures, tmp_path, "--targets=to_q") == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("error: targets 'to_q' matches none of the 87 linear layers, such")
    )


def test_sprint_is_refused(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(TRANSFORMER, guidance_embed=True, continuous_time=True)
    write_transformer(tmp_path / "sprint", SanaTransformer(config), IDENTITY, torch.float16)
    assert lora(pictures, tmp_path / "out", "--model", str(tmp_path / "sprint")) == 1
    assert "is a Sprint model, which learns from a teacher; train a SANA or SANA-1.5 model" in capsys.readouterr().err


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError) as raised:
        add_adapter(SanaTransformer(SMALL), AdapterConfig())
    assert str(raised.value) == (
        'training a LoRA needs the package peft; run pip install ".[training]" in the folder of this project'
    )


def test_numbers_that_break_stop_the_training_with_the_last_good_state(tmp_path: Path) -> None:
    """A rate that is far too high breaks the weights within some steps."""
    network = randomise(SanaTransformer(SMALL))
    weights = add_adapter(network, AdapterConfig(rank=2, targets="all"))
    objective = FlowObjective(network, null=torch.zeros(5, SMALL.text_width))

    def batches(number: int, process: int) -> FlowBatch:
        batch = random_batches(SMALL)(number, process)
        return replace(batch, latents=batch.latents * (torch.inf if number == 4 else 1))

    config = TrainingConfig(9, 0.5, warmup=1, schedule="constant", save_every=3)
    with pytest.raises(DivergedError) as raised:
        train(objective, batches, config, tmp_path, weights=weights)
    assert str(raised.value) == (
        "the gradient of step 5 is not finite, most likely since the learning rate, 5.0e-01 there, is too high; the state after "
        f"step 3, in {tmp_path / 'state.pt'}, is kept; begin anew in another --out with a tenth of the rate"
    )
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved["step"] == 3 and all(bool(tensor.isfinite().all()) for tensor in saved["objective"].values())


def test_one_picture_of_any_size_is_enough(tmp_path: Path) -> None:
    (data := tmp_path / "data").mkdir()
    Image.new("RGB", (10, 10), "red").save(data / "tiny.png")
    (data / "tiny.txt").write_text("a red square")
    assert lora(data, tmp_path / "out", "--batch-size=2") == 0


def test_a_picture_that_is_too_large_or_broken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data := tmp_path / "data").mkdir()
    Image.new("L", (20000, 4000)).save(data / "giant.png")
    (data / "giant.txt").write_text("a black wall")
    assert lora(data, tmp_path / "out") == 1
    assert (
        "giant.png has more than 67,108,864 px, which is 8192 x 8192; make it smaller first" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    (data / "giant.png").unlink()
    draw_pictures(tmp_path / "more", 1)
    broken = (tmp_path / "more" / "0.png").read_bytes()
    (data / "giant.png").write_bytes(broken[: len(broken) // 2])
    assert lora(data, tmp_path / "out") == 1
    assert "giant.png cannot be read as a picture" in capsys.readouterr().err


def test_a_full_disk_while_encoding_keeps_what_is_encoded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each state is a shard here; the latents, which come first, have room, and the texts, which are larger, do not."""
    monkeypatch.setattr("sana.training.shards.SHARD_ROWS", 1)
    with no_file_above(5150):
        assert lora(pictures, tmp_path) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"error: {tmp_path}/states/states-\w+\.parquet cannot be written \(.+\); make room, or give a place that is yours to "
        "write; the same command then goes on with what is not encoded yet",
        told,
    )
    kept = {path: path.read_bytes() for path in (tmp_path / "states").glob("*.parquet")}
    assert len(Shards(tmp_path / "states")) == 4 and not (tmp_path / "lora.safetensors").exists()
    assert lora(pictures, tmp_path) == 0
    assert len(Shards(tmp_path / "states")) == 8
    assert all(path.read_bytes() == before for path, before in kept.items() if path.name != "digests.parquet")


def test_a_full_disk_at_the_end_keeps_the_training(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state, which comes first, found room; the same command then writes the file without a step."""
    assert lora(pictures, tmp_path) == 0
    result = tmp_path / "lora.safetensors"
    before, state = load_file(result), (tmp_path / "state.pt").read_bytes()
    result.unlink()
    with no_file_above(10_000):
        assert lora(pictures, tmp_path) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {result} cannot be written (")
    assert told.endswith("); make room, or give a place that is yours to write")
    assert not result.exists() and (tmp_path / "state.pt").read_bytes() == state
    assert lora(pictures, tmp_path) == 0
    after = load_file(result)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_full_disk_keeps_the_last_state(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--save-every=1", "--targets=all"]
    assert lora(pictures, tmp_path, *more, "--steps=1") == 0
    before = (tmp_path / "state.pt").read_bytes()
    with no_file_above(len(before) // 2):
        assert lora(pictures, tmp_path, *more, "--steps=3") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {tmp_path / 'state.pt'} cannot be written (")
    assert told.endswith(f"; the same command then goes on from {tmp_path / 'state.pt'}, after step 1")
    assert (tmp_path / "state.pt").read_bytes() == before
    assert lora(pictures, tmp_path, *more, "--steps=3") == 0
