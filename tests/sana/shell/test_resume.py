"""What is drawn and what is kept where pictures exist already: the records in the PNGs decide, not the names."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from sana import jobs
from tests.sana.models import write_model
from tests.sana.shell.commands import Outcome, Shell, pixels, record

ALL_THERE = Outcome(0, "Every picture exists already.\n", "")


def write_lines(shell: Shell, *lines: str) -> Path:
    path = shell.folder / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def contents(paths: list[Path]) -> dict[str, tuple[bytes, int]]:
    """What may not change of pictures that are there."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def told(paths: list[Path]) -> list[tuple[str, str, int]]:
    return [(path.name, record(path)["prompt"], record(path)["seed"]) for path in paths]


def test_resume_fills_the_gaps_with_the_right_seeds(shell: Shell) -> None:
    prompts = write_lines(shell, "a cat", "a dog")
    arguments = ("--prompts", prompts, "--batch-size", 3, "--seed", 7, "--resume")
    paths = shell.draw(*arguments)
    drawn = [path.read_bytes() for path in paths]
    kept = [path.stat().st_mtime_ns for path in paths]
    for gone in (1, 3, 4, 5):
        paths[gone].unlink()
    assert shell.draw(*arguments) == [paths[i] for i in (1, 3, 4, 5)]
    assert [path.read_bytes() for path in paths] == drawn
    assert [paths[i].stat().st_mtime_ns for i in (0, 2)] == [kept[i] for i in (0, 2)]
    assert shell.generate(*arguments) == ALL_THERE


def test_a_line_put_in_front_is_drawn_and_nothing_else(shell: Shell) -> None:
    before = contents(paths := shell.draw("--prompts", write_lines(shell, "a cat", "a dog"), "--resume"))
    arguments = ("--prompts", write_lines(shell, "a bird", "a cat", "a dog"), "--resume")
    assert told(shell.draw(*arguments)) == [("out-0003.png", "a bird", 0)]
    assert contents(paths) == before
    assert shell.generate(*arguments) == ALL_THERE


def test_lines_that_moved_or_went_are_not_drawn_again(shell: Shell) -> None:
    shell.draw("--prompts", write_lines(shell, "a cat", "a dog", "a bird"))
    assert shell.generate("--prompts", write_lines(shell, "a bird", "a cat"), "--resume") == ALL_THERE
    assert shell.generate("a dog", "--resume") == ALL_THERE


def test_a_free_number_in_between_is_taken_first(shell: Shell) -> None:
    _, second, _ = shell.draw("--prompts", write_lines(shell, "a cat", "a dog", "a bird"))
    second.unlink()
    found = shell.draw("--prompts", write_lines(shell, "a cat", "a bird", "a fish", "a cow"), "--resume")
    assert told(found) == [("out-0002.png", "a fish", 0), ("out-0004.png", "a cow", 0)]


def test_a_line_that_stands_there_twice_has_two_pictures(shell: Shell) -> None:
    """So that numbers are those of the lines, whether a run was resumed or not."""
    arguments = ("--prompts", write_lines(shell, "a cat", "a cat", "a dog"), "--resume")
    paths = shell.draw(*arguments)
    assert len(paths) == 3
    paths[0].unlink()
    assert shell.draw(*arguments) == paths[:1]
    assert shell.generate(*arguments) == ALL_THERE


@pytest.mark.parametrize("several", [False, True])
def test_a_changed_seed_draws_the_new_pictures_alone(shell: Shell, several: bool) -> None:
    batch = ("--batch-size", 3 if several else 1)
    before = contents(paths := shell.draw("a cat", "--seed", 7, *batch, "--resume"))
    found = told(shell.draw("a cat", "--seed", 8, *batch, "--resume"))
    assert found == ([("out-0004.png", "a cat", 10)] if several else [("out-0001.png", "a cat", 8)])
    assert contents(paths) == before
    assert shell.generate("a cat", "--seed", 7, "--batch-size", 4 if several else 2, "--resume") == ALL_THERE


def test_a_larger_batch_keeps_the_picture_that_was_alone(shell: Shell) -> None:
    assert shell.draw("a cat") == [shell.folder / "out.png"]
    found = shell.draw("a cat", "--batch-size", 3, "--resume")
    assert told(found) == [("out-0001.png", "a cat", 1), ("out-0002.png", "a cat", 2)]


@pytest.mark.parametrize(
    "changed",
    [
        ("--negative", "blurry"),
        ("--height", 96),
        ("--steps", 2),
        ("--guidance-scale", 3),
        ("--guidance-interval", 0.1, 0.9),
        ("--pag-scale", 2),
        ("--flow-shift", 5),
        ("--solver", "flow_euler"),
        ("--reference", "diffusers"),
        ("--instruction", ""),
    ],
    ids=lambda options: options[0].strip("-"),
)
def test_a_changed_setting_draws_what_is_new(shell: Shell, changed: tuple[object, ...]) -> None:
    size = ("--height", 64, "--width", 64, "--resume")
    before = contents(paths := shell.draw("a cat", *size))
    assert shell.draw("a cat", *size, *changed) == [shell.folder / "out-0001.png"]
    assert contents(paths) == before
    assert shell.generate("a cat", *size, *changed) == ALL_THERE
    assert shell.generate("a cat", *size) == ALL_THERE


def test_a_setting_that_is_the_default_is_no_change(shell: Shell, model: Path) -> None:
    shell.draw("a cat")
    told_all = (
        "--guidance-scale",
        4.5,
        "--seed",
        0,
        "--max-bytes",
        10**9,
        "--dtype",
        "float32",
        "--solver",
        "flow_dpm",
    )
    assert shell.generate("a cat", *told_all, "--resume") == ALL_THERE


def test_another_picture_or_mask_to_start_from_draws_what_is_new(shell: Shell, photo: Path) -> None:
    other, mask = shell.folder / "other.png", shell.folder / "mask.png"
    Image.new("RGB", (96, 64), "red").save(other)
    Image.new("L", (96, 64), 128).save(mask)
    for start in (("--image", photo), ("--image", other), ("--image", photo, "--mask", mask)):
        arguments = ("a cat", *start, "--strength", 0.5, "--steps", 2, "--resume")
        assert len(shell.draw(*arguments)) == 1
        assert shell.generate(*arguments) == ALL_THERE
    Image.new("L", (96, 64), 255).save(mask)
    assert shell.draw(*arguments) == [shell.folder / "out-0003.png"]


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_other_weights_draw_what_is_new(shell: Shell, part: str) -> None:
    """Of a model with the same shapes, as fine-tuning gives one. What wrote the same weights does not matter."""
    before = contents(paths := shell.draw("a cat"))
    (shell.folder / "model").mkdir()
    model = write_model(shell.folder / "model")
    assert shell.generate("a cat", "--model", model, "--resume") == ALL_THERE
    (file,) = (model / part).glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors)
    save_file({**tensors, name: tensors[name] + 0.25}, file, metadata={"format": "pt"})
    assert shell.draw("a cat", "--model", model, "--resume") == [shell.folder / "out-0001.png"]
    assert contents(paths) == before


def test_pictures_of_others_are_kept_and_count_for_nothing(shell: Shell) -> None:
    (drawn,) = shell.draw("a cat")
    bare = Image.open(drawn)
    drawn.unlink()
    bare.save(shell.folder / "out.png")  # without its record
    text = PngInfo()
    text.add_text("sana", "[]")
    bare.save(shell.folder / "out-0001.png", pnginfo=text)
    (shell.folder / "out-0002.png").write_bytes(b"no picture")
    (shell.folder / "out-0003.png").mkdir()
    (shell.folder / "out-0004.png").symlink_to("nowhere")
    (shell.folder / "out-old.png").write_bytes(b"no output")
    before = {path.name: path.read_bytes() for path in shell.folder.iterdir() if path.is_file()}
    assert shell.draw("a cat", "--resume") == [shell.folder / "out-0005.png"]
    assert {name: (shell.folder / name).read_bytes() for name in before} == before
    assert (shell.folder / "out-0004.png").is_symlink()


def test_names_with_signs_of_patterns_are_names(shell: Shell) -> None:
    out = ("--out", shell.folder / "a[1]*.png", "--resume")
    paths = shell.draw("a cat", "--batch-size", 2, *out)
    assert shell.generate("a cat", "--batch-size", 2, *out) == ALL_THERE
    assert [path.name for path in paths] == ["a[1]*-0001.png", "a[1]*-0002.png"]


def test_all_there_is_said_without_loading_the_model(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.draw("a cat")
    monkeypatch.setattr("sana.pipeline.SanaPipeline.load", None)
    assert shell.generate("a cat", "--resume") == ALL_THERE


def test_a_record_is_read_without_the_picture(tmp_path: Path) -> None:
    """Of the largest as well, which Pillow takes for an attack."""
    text = PngInfo()
    text.add_text("sana", json.dumps({"prompt": "ö" * 100_000}))
    Image.new("L", (16384, 16384)).save(path := tmp_path / "large.png", pnginfo=text, compress_level=1)
    assert jobs.read_record(path) == {"prompt": "ö" * 100_000}


def test_existing_pictures_are_refused_in_one_sentence(shell: Shell) -> None:
    advice = "give --resume to draw only what is missing, --overwrite to replace it, or another --out"
    (path,) = shell.draw("a cat")
    before = contents([path])
    assert shell.fail("a dog", "--model", "missing") == f"{path} exists already; {advice}"
    assert len(shell.draw("a cat", "--batch-size", 2)) == 2  # of other names
    last = shell.folder / "out-0003.png"
    last.write_bytes(b"")
    (shell.folder / "out-0001.png").unlink()
    (shell.folder / "out-0002.png").unlink()
    assert shell.fail("a dog", "--batch-size", 3) == f"{last} exists already; {advice}"
    assert contents([path]) == before


def test_overwrite_replaces_what_has_the_name(shell: Shell) -> None:
    paths = shell.draw("--prompts", write_lines(shell, "a cat", "a dog", "a cow"))
    arguments = ("--prompts", write_lines(shell, "a bird", "a fish"), "--overwrite")
    assert shell.draw(*arguments) == paths[:2]
    assert [record(path)["prompt"] for path in paths] == ["a bird", "a fish", "a cow"]


def test_resume_and_overwrite_exclude_each_other(shell: Shell) -> None:
    with pytest.raises(SystemExit) as caught:
        shell.generate("a cat", "--resume", "--overwrite")
    assert caught.value.code == 2


def test_without_a_name_a_picture_takes_a_free_one(shell: Shell, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shell.folder)
    for prompt, name in (("a cat", "sana.png"), ("a dog", "sana-0001.png"), ("a cat", "sana-0002.png")):
        assert shell.run("generate", prompt, "--model", model, "--steps", 1).out == f"{name}\n"
        assert record(Path(name))["prompt"] == prompt


def test_what_appears_while_pictures_are_drawn_is_kept(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another run with the same output."""
    write = jobs.write_png

    def write_and_be_overtaken(picture: Image.Image, path: Path, found: jobs.Record, parameters: str) -> None:
        write(picture, path, found, parameters)
        path.with_stem("out-0002").write_bytes(b"of another")

    monkeypatch.setattr("sana.__main__.write_png", write_and_be_overtaken)
    assert [path.name for path in shell.draw("a cat", "--batch-size", 2)] == ["out-0001.png", "out-0003.png"]
    assert pixels(shell.folder / "out-0003.png")


def test_a_fingerprint_takes_numbers_of_any_kind(tmp_path: Path) -> None:
    tensors = {
        "eight": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "flag": torch.tensor(True),
        "none": torch.zeros(0),
        "half": torch.zeros(500, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    first = jobs.fingerprint({"vae": tmp_path / "model.safetensors"}, [])
    assert first != jobs.fingerprint({"transformer": tmp_path / "model.safetensors"}, [])
    save_file({**tensors, "flag": torch.tensor(False)}, tmp_path / "model.safetensors")
    assert first != jobs.fingerprint({"vae": tmp_path / "model.safetensors"}, [])
