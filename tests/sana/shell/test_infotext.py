"""The text of a picture that viewers and galleries read, by a reader of others where it can: sd-parsers."""

import shutil
from hashlib import sha256
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file, save_file
from sd_parsers import ParserManager
from sd_parsers.data import PromptInfo

from sana.infotext import ShownFile, shown_files
from sana.loading import MODELS
from tests.sana.shell.commands import Shell, record
from tests.sana.shell.test_lora import write_lora

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def read(path: Path) -> PromptInfo:
    found = ParserManager().parse(path)
    assert found is not None and found.generator == "AUTOMATIC1111"
    return found


def text(path: Path) -> str:
    with Image.open(path) as picture:
        return picture.text["parameters"]


def short(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:10]


def test_a_reader_of_others_finds_everything(shell: Shell, model: Path) -> None:
    paths = shell.draw(
        *("a café, 5: one", "--negative", "blur, dark", "--seed", 7, "--batch-size", 2, "--steps", 3),
        *("--guidance-scale", 2.5, "--width", 96, "--height", 64),
    )
    for seed, path in enumerate(paths, 7):
        found = read(path)
        (sampler,) = found.samplers
        assert [prompt.value for prompt in sampler.prompts] == ["a café, 5: one"]
        assert [prompt.value for prompt in sampler.negative_prompts] == ["blur, dark"]
        assert (sampler.name, sampler.model.name, sampler.model.hash) == (
            "flow_dpm",
            model.name,
            short(model / WEIGHTS),
        )
        assert sampler.parameters == {"steps": "3", "cfg_scale": "2.5", "seed": str(seed)}
        assert found.metadata == {"Size": "96x64"}
        assert record(path)["seed"] == seed  # ours is still there


def test_loras_and_a_picture_to_start_from(shell: Shell, model: Path, photo: Path, tmp_path: Path) -> None:
    loras = [write_lora(tmp_path / name, seed=k) for k, name in enumerate(("style.safetensors", "a, b.safetensors"))]
    (path,) = shell.draw("a cat", "--image", photo, "--strength", 0.7, "--lora", loras[0], "--lora", f"{loras[1]}=-0.5")
    prompt, line = text(path).split("\n")
    assert prompt == "a cat <lora:style:1> <lora:a, b:-0.5>"
    hashes = f"style: {short(loras[0])}, a, b: {short(loras[1])}"
    assert line.endswith(f"Model: {model.name}, Denoising strength: 0.7, " + f'Lora hashes: "{hashes}"')


def test_names_with_commas_are_quoted_and_weights_in_parts_have_no_hash(
    shell: Shell, model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(model, tmp_path / "one, two")
    assert text(shell.draw("a cat", "--model", other)[0]).endswith(
        f', Model hash: {short(model / WEIGHTS)}, Model: "one, two"'
    )
    tensors = load_file(other / WEIGHTS)
    (other / WEIGHTS).unlink()
    for k, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        part = (other / WEIGHTS).with_stem(f"{Path(WEIGHTS).stem}-0000{k}-of-00002")
        save_file({name: tensors[name] for name in names}, part)
    (path,) = shell.draw("a cat", "--model", other, "--overwrite")
    assert "Model hash" not in text(path) and text(path).endswith(', Model: "one, two"')


def test_the_demo_is_called_by_its_name() -> None:
    assert shown_files("demo").model == ShownFile("demo", short(MODELS["demo"] / WEIGHTS))


def test_sprint_is_told_as_such_and_has_no_negative_prompt(shell: Shell, sprint_model: Path) -> None:
    (path,) = shell.draw("a cat", "--model", sprint_model, "--steps", 2, "--guidance-scale", 4)
    line = text(path).removeprefix("a cat\n")
    assert line.startswith("Steps: 2, Sampler: scm, CFG scale: 4, Seed: 0, Size: ")
