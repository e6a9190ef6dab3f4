"""Training as its user runs it: the demo model from nothing and a fine-tuning, both cut short, and the files they leave."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import sana
from sana import load_transformer
from sana.checkpoints.files import read_tensors
from sana.checkpoints.transformer import identify_transformer
from sana.checkpoints.writing import write_transformer
from sana.config import VARIANTS
from sana.loading import MODELS
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.transformer import SanaTransformer
from sana.pipeline import SanaPipeline
from sana.saving import lock
from sana.training.__main__ import main
from sana.training.demo import AUTOENCODER, IDENTITY, TRANSFORMER, new_transformer
from sana.training.flow import FlowBatch, FlowObjective
from sana.training.latents import SceneLatents
from sana.training.pictures import read_pictures
from sana.training.scenes import KIND_SHARE, RESOLUTIONS
from sana.training.shards import Shards
from tests.training.drawn import draw_pictures

ROOT = Path(sana.__file__).parents[1]
MOST_BYTES = 25_000_000
SMALL = ("--autoencoder-steps=1", "--decoder-steps=1", "--transformer-steps=1", "--scenes=4", "--batch-size=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a demo model after one step of everything."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(folder), *SMALL]) == 0
    return folder / "checkpoint"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six drawn scenes of two shapes with their captions."""
    folder = tmp_path / "pictures"
    draw_pictures(folder, 6)
    return folder


def test_demo_is_an_ordinary_checkpoint(trained: Path) -> None:
    pipeline = SanaPipeline.load(trained)
    assert pipeline.transformer.config == TRANSFORMER
    assert pipeline("a red circle", steps=1)[0].size == (256, 256)
    assert sum(path.stat().st_size for path in trained.rglob("*") if path.is_file()) < MOST_BYTES


def test_finished_demo_can_be_trained_further(trained: Path, tmp_path: Path) -> None:
    assert main(["demo", "--out", str(tmp_path), *SMALL, "--start", str(trained)]) == 0
    before, after = (SanaPipeline.load(folder) for folder in (trained, tmp_path / "checkpoint"))
    for part in ("autoencoder.encoder", "autoencoder.decoder", "transformer", "text_encoder"):
        pairs = zip(*(attrgetter(part)(pipeline).parameters() for pipeline in (before, after)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == (part == "autoencoder.encoder")


def test_a_start_that_is_no_demo_leaves_the_work_folder_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(MODELS["demo"], tmp_path / "other")
    wider = SanaTransformer(replace(TRANSFORMER, ff_width=512))
    write_transformer(tmp_path / "other" / "transformer", wider, IDENTITY, torch.float16)
    advice = "give the folder of a demo checkpoint, or demo"
    said = {
        "gone": f"does not exist; {advice}",
        "empty": "holds no .safetensors",
        "other": f"is another model; {advice}",
    }
    for name, message in said.items():
        assert main(["demo", "--out", str(tmp_path / "work"), *SMALL, "--start", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert f"{tmp_path / name} " in error and message in error
        assert not (tmp_path / "work").exists()


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """On CPUs; the checkpoint is written once, by one of them."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = ["--nproc_per_node=2", "-m", "sana.training", "demo", "--out", str(tmp_path), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(str(tmp_path / "checkpoint")) == 1
    assert SanaPipeline.load(tmp_path / "checkpoint")("a red circle", steps=1)[0].size == (256, 256)


def test_a_work_folder_is_of_one_training(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(trained.parent), "--scenes=5"]) == 1
    assert "holds another training (start nothing, scenes 4); give another --out" in capsys.readouterr().err


def test_shipped_demo_has_the_files_that_training_writes(trained: Path) -> None:
    def files(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}

    assert files(trained) == files(MODELS["demo"])
    for name in files(trained):
        if name.suffix == ".json" and name.name != "tokenizer.json":
            assert json.loads((trained / name).read_text()) == json.loads((MODELS["demo"] / name).read_text())


def test_training_leaves_sheets_and_logs(trained: Path) -> None:
    for part in ("autoencoder", "decoder", "transformer"):
        assert (trained.parent / part / "log.csv").read_text().startswith("1,")
        with Image.open(trained.parent / part / "sheet-000001.png") as sheet:
            assert sheet.width >= 6 * 256


def test_finetuning_writes_a_transformer_that_loads(pictures: Path, tmp_path: Path) -> None:
    command = ["finetune", "--data", str(pictures), "--out", str(tmp_path / "out"), "--steps", "3", "--batch-size", "2"]
    assert main([*command, "--learning-rate", "1e-3", "--recompute", "--sheet-every", "0"]) == 0
    before = SanaPipeline.load("demo")
    after = SanaPipeline.load(tmp_path / "out" / "transformer", autoencoder=MODELS["demo"], text_encoder=MODELS["demo"])
    trained = after.transformer.state_dict()
    assert any(not torch.equal(trained[name], tensor) for name, tensor in before.transformer.state_dict().items())
    assert replace(after.identity, origin=before.identity.origin) == before.identity


def test_a_finetuned_transformer_alone_knows_its_flow_shift_and_guidance(pictures: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODELS["demo"], model)
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("3.0", "2.5"))
    assert finetune(pictures, tmp_path / "out", "--model", str(model)) == 0
    (path,) = (tmp_path / "out" / "transformer").glob("*.safetensors")
    identity = identify_transformer(read_tensors(path.rename(tmp_path / "alone.safetensors")))
    assert (identity.flow_shift, identity.guidance_scale, identity.base_size) == (2.5, 2.0, 256)
    assert identity.dtype == "float16" and identity.config == TRANSFORMER
    assert json.loads((tmp_path / "out" / "run.json").read_text()).keys() == {"model", "data"}


def test_the_variant_of_a_finetuned_transformer_can_be_given(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = "sana-1.6b-4096px", tmp_path / "out"
    assert finetune(pictures, out, "--variant", name) == 1
    assert (
        f"has 8 blocks of width 192 and is no {name}; give the variant that it is, or none" in capsys.readouterr().err
    )
    row = replace(VARIANTS[name], transformer=TRANSFORMER, base_size=192)
    monkeypatch.setitem(VARIANTS, name, row)
    assert finetune(pictures, out, "--variant", name) == 0
    identity = identify_transformer(read_tensors(out / "transformer"))
    assert (identity.variant, identity.base_size, identity.flow_shift) == (name, 192, row.flow_shift)
    assert finetune(pictures, out) == 1
    told = f"holds another training (model {MODELS['demo'].resolve()}, variant {name}, data {pictures})"
    assert told in capsys.readouterr().err


def test_finetuning_without_captions_says_what_is_missing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "3.txt").unlink()
    assert main(["finetune", "--data", str(pictures), "--out", str(tmp_path / "out")]) == 1
    assert "1 of 6 pictures have no caption, first 3.png" in capsys.readouterr().err


def finetune(pictures: Path, folder: Path, *more: str) -> int:
    command = ["finetune", "--data", str(pictures), "--out", str(folder), "--steps", "1", "--batch-size", "1"]
    return main([*command, "--sheet-every", "0", *more])


def test_finetuning_asks_for_the_parts_of_a_transformer(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = MODELS["demo"] / "transformer"
    arguments = ["finetune", "--data", str(pictures), "--out", str(tmp_path / "out"), "--model", str(alone)]
    assert main(arguments) == 1
    expected = f"error: {alone} is the transformer alone; give an autoencoder and a text encoder as well\n"
    assert capsys.readouterr().err == expected
    assert main([*arguments, "--steps=1", "--batch-size=1", "--autoencoder=demo", "--text-encoder=demo"]) == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=0", "steps is 0; it must be at least 1"),
        ("--batch-size=-1", "batch_size is -1; it must be at least 1"),
        ("--save-every=0", "save_every is 0; it must be at least 1"),
        ("--learning-rate=-1", "learning_rate is -1.0; it must be above 0 and below 1, such as 1e-5"),
        ("--sheet-every=-1", "sheet_every is -1; it must be 0, for no sheets, or more"),
        ("--data=nowhere", "nowhere is no folder; give one with pictures, each with a .txt file of its name"),
        (f"--out={__file__}", f"{__file__} is a file; give another --out, a folder"),
    ],
)
def test_finetuning_refuses_what_cannot_be(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert main(["finetune", "--data", str(pictures), "--out", str(tmp_path / "out"), option]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_a_demo_without_steps_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "out"), "--transformer-steps=0"]) == 1
    assert capsys.readouterr().err == "error: transformer_steps is 0; it must be at least 1\n"
    assert not (tmp_path / "out").exists()


def test_sheets_are_no_pictures_to_train_on(pictures: Path) -> None:
    arguments = ["finetune", "--data", str(pictures), "--out", str(pictures / "out"), "--batch-size=1"]
    for steps in (1, 2):
        assert main([*arguments, f"--steps={steps}"]) == 0
    assert list((pictures / "out").rglob("*.png"))


def test_finetuning_draws_captions_below_their_pictures(pictures: Path, tmp_path: Path) -> None:
    """The demo model knows these scenes, so after a step at a small rate a drawing has the colours of its picture."""
    assert finetune(pictures, tmp_path / "out", "--sheet-every", "1") == 0
    (path,) = (tmp_path / "out").glob("sheet-*.png")
    with Image.open(path) as sheet:
        assert sheet.size == (6 * 256, 2 * 256)
        given, drawn = np.split(np.asarray(sheet).reshape(2, 256, 6, 256, 3).mean(axis=(1, 3)), 2)
    assert np.abs(given - drawn).max() < 20


def test_finetuning_encodes_a_picture_once(pictures: Path, tmp_path: Path) -> None:
    """Also when it was stopped in between, or when pictures come and go."""
    out = tmp_path / "out"
    assert finetune(pictures, out) == 0
    first = {path.name: path.stat().st_mtime_ns for path in (out / "states").glob("states-*")}
    assert len(Shards(out / "states")) == 12
    (pictures / "0.txt").write_text("another caption")
    assert finetune(pictures, out) == 0
    second = {path.name: path.stat().st_mtime_ns for path in (out / "states").glob("states-*")}
    assert len(Shards(out / "states")) == 13 and first.items() < second.items()


def test_finetuning_goes_on_when_a_damaged_shard_is_deleted(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut, or broken in the middle, which is noticed when the numbers there are read."""
    assert main(["cache", "--data", str(pictures), "--out", str((out := tmp_path / "out") / "states")]) == 0
    for broken in (True, False):
        (path,) = (out / "states").glob("states-*")
        latent = next(row["data"] for row in pq.read_table(path).to_pylist() if len(row["shape"]) == 3)
        whole = path.read_bytes()
        path.write_bytes(whole.replace(latent, bytes(len(latent))) if broken else whole[:-1])
        capsys.readouterr()
        assert finetune(pictures, out, "--steps=6") == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert (
            told == f"error: {path} is damaged or of another program; delete it, and the same command computes it again"
        )
        path.unlink()
        assert finetune(pictures, out) == 0


def test_a_second_finetuning_in_a_folder_is_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out := tmp_path / "out").mkdir()
    with (out / "training.lock").open("wb") as file:
        assert lock(file)
        assert finetune(pictures, out) == 1
    assert capsys.readouterr().err == (
        f"error: another training is at work in {out}; wait until it ends, or give another --out\n"
    )
    assert [path.name for path in out.iterdir()] == ["training.lock"]


def test_a_transparent_picture_is_trained_on_white_and_in_any_format(pictures: Path, tmp_path: Path) -> None:
    """The colours below what is transparent are not those that anybody saw."""
    with Image.open(pictures / "0.png") as opened:
        picture = opened.convert("RGBA")
    layer = Image.new("RGBA", picture.size, (0, 200, 0, 0))
    layer.paste(picture.crop((0, 0, 128, 256)), (0, 0))
    (plain := tmp_path / "plain").mkdir()
    Image.alpha_composite(Image.new("RGBA", picture.size, "white"), layer).convert("RGB").save(plain / "a.bmp")
    (seen := tmp_path / "seen").mkdir()
    layer.save(seen / "a.tiff")
    latents = []
    for folder in (plain, seen):
        (folder / "a.txt").write_text("a scene")
        assert finetune(folder, folder / "out") == 0
        (path,) = (folder / "out" / "states").glob("states-*")
        latents += [row["data"] for row in pq.read_table(path).to_pylist() if len(row["shape"]) == 3]
    assert len(latents) == 2 and latents[0] == latents[1]


def test_a_truncated_picture_is_found_before_any_is_encoded(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (pictures / "5.png").read_bytes()
    (pictures / "5.png").write_bytes(whole[: len(whole) // 2])
    assert finetune(pictures, out := tmp_path / "out") == 1
    assert "5.png cannot be read as a picture" in capsys.readouterr().err
    assert not [*(out / "states").glob("states-*")]


def test_finetuning_goes_on_after_running_out_of_memory(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the autoencoder, which a large picture takes most for."""
    for name in ("encode", "decode"):
        monkeypatch.setattr(DCAutoencoder, name, bounded(getattr(DCAutoencoder, name)))
    assert finetune(pictures, tmp_path / "out", "--sheet-every", "1") == 0
    assert [message.split(";")[0] for message in caplog.messages] == ["Out of memory in the autoencoder"] * 12


def bounded(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method of the autoencoder that needs a bound on its memory."""

    def method(autoencoder: DCAutoencoder, x: Tensor, max_bytes: int | None = None) -> Tensor:
        if max_bytes is None:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return run(autoencoder, x, max_bytes)

    return method


def test_finetuning_refuses_the_folder_of_another_run(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(pictures, tmp_path / "out") == 0
    pictures = pictures.rename(tmp_path / "others")
    assert finetune(pictures, tmp_path / "out") == 1
    assert "holds another training (model " in capsys.readouterr().err


def test_finetuning_refuses_sprint_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(TRANSFORMER, guidance_embed=True, continuous_time=True)
    write_transformer(tmp_path / "sprint", SanaTransformer(config), IDENTITY, torch.float16)
    assert finetune(tmp_path, tmp_path / "out", "--model", str(tmp_path / "sprint")) == 1
    assert "is a Sprint model, which learns from a teacher" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["float8", "truncated", "autoencoder"])
def test_finetuning_refuses_other_networks_before_any_work(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODELS["demo"], model)
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    if damage == "float8":
        tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
        message = "is quantised, and here every weight is trained; unpack it by `python -m sana convert"
    elif damage == "truncated":
        del tensors["proj_out.bias"]
        message = "lacks 1 of "
    else:
        config = replace(AUTOENCODER, encoder=AUTOENCODER.encoder[:5], decoder=AUTOENCODER.decoder[:5])
        save_file(DCAutoencoder(config).state_dict(), model / "vae" / path.name)
        message = "the autoencoder is a DC-AE f16c32, and the transformer takes latents of an f32c32; give one of these"
    save_file(tensors, path)
    assert finetune(pictures, tmp_path / "out", "--model", str(model)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_transformer_of_continuous_time_is_written_as_one(tmp_path: Path) -> None:
    """The teacher of Sprint: SANA-1.5 with times from 0 to 1."""
    config = replace(TRANSFORMER, continuous_time=True)
    write_transformer(tmp_path, SanaTransformer(config), IDENTITY, torch.float16)
    assert load_transformer(tmp_path).config == config


def test_files_that_cannot_be_trained_on_are_named(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, caption = (pictures / "2.png").read_bytes(), (pictures / "2.txt").read_bytes()
    for name, content in (("2.png", b"no picture"), ("2.png", whole[:-60]), ("2.txt", b"caf\xe9")):
        (pictures / "2.png").write_bytes(whole)
        (pictures / "2.txt").write_bytes(caption)
        (pictures / name).write_bytes(content)
        assert finetune(pictures, tmp_path / "out") == 1
        assert str(pictures / name) in capsys.readouterr().err


def test_a_photo_taken_upright_is_trained_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "photo.png", exif=exif)
    (tmp_path / "photo.txt").write_text("a wall")
    (picture,) = read_pictures(tmp_path, 1024)
    assert picture.size == (1408, 704)


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        transformer = new_transformer()
        torch.nn.init.normal_(transformer.proj_out.weight, generator=torch.Generator().manual_seed(1))
        transformer.recompute = recompute
        generator = torch.Generator().manual_seed(2)
        latents, text = torch.randn(2, 32, 2, 3, generator=generator), torch.randn(2, 4, 192, generator=generator)
        batch = FlowBatch(latents, text=text, text_mask=torch.ones(2, 4, dtype=torch.bool), seed=3)
        FlowObjective(transformer, null=torch.zeros(4, 192))(batch).backward()
        gradients.append([parameter.grad for parameter in transformer.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_no_padding_is_computed(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    demo = SanaPipeline.load(trained)
    captions = ["a red circle", "three yellow stars on a white background"]
    seen, forward = [], demo.transformer.forward
    monkeypatch.setattr(
        demo.transformer, "forward", lambda *arguments: seen.append(arguments[2:]) or forward(*arguments)
    )
    FlowObjective(demo.transformer, demo.text_encoder)(FlowBatch(torch.randn(2, 32, 3, 2), captions))
    counts = [count.used for count in demo.text_encoder.count(captions)]
    text, mask = seen[0]
    assert text.shape[1] == max(counts) and mask.sum(dim=1).tolist() == counts


def test_noise_levels_are_shifted_logit_normal() -> None:
    objective = FlowObjective(new_transformer(), flow_shift=3.0)
    levels = objective.noise_levels(20000, 0.0, torch.Generator().manual_seed(0), torch.device("cpu"))
    unshifted = levels / (3.0 - 2.0 * levels)
    logits = torch.logit(unshifted[(unshifted > 0) & (unshifted < 1)])
    assert abs(float(logits.mean())) < 0.03
    assert abs(float(logits.std()) - 1) < 0.03


def test_layout_share_trains_more_on_high_noise_levels() -> None:
    objective = FlowObjective(new_transformer())
    levels = [
        objective.noise_levels(20000, share, torch.Generator().manual_seed(0), torch.device("cpu"))
        for share in (0.0, 0.5, 1.0)
    ]
    shares = [float((part > 0.9).float().mean()) for part in levels]
    # sigma > 0.9 where the logit exceeds log(3), or, shifted by 20, log(9 / 20): 0.136 and 0.788 of a normal distribution
    assert shares == pytest.approx([0.136, 0.462, 0.788], abs=0.01)


def test_batches_have_the_kinds_of_scenes_asked_for() -> None:
    latents = SceneLatents({size: torch.zeros(200, 32, 1, 1) for size in RESOLUTIONS}, seed=1)
    for shares in ({**dict.fromkeys(KIND_SHARE, 0.0), "pair": 1.0}, KIND_SHARE):
        captions = latents.batch(0, 0, size=1000, shares=shares).captions
        share = sum(" and " in caption for caption in captions) / len(captions)
        assert share == pytest.approx(shares["pair"], abs=0.05)


def test_without_accelerate_training_says_what_to_install() -> None:
    code = "import sys, runpy; sys.modules['accelerate'] = None; runpy.run_module('sana.training', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    message = 'training needs the package accelerate; run pip install ".[training]" in the folder of this project'
    assert done.stderr.strip() == message
