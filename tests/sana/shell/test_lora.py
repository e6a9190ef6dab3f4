"""generate with LoRAs: the pictures, their records, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sana.checkpoints.lora import read_strength
from tests.sana.shell.commands import Outcome, Shell, pixels, record

ALL_THERE = Outcome(0, "Every picture exists already.\n", "")
QUERY = "transformer.transformer_blocks.0.attn1.to_q"
VALUE = "text_encoder.layers.0.self_attn.v_proj"


def write_lora(path: Path, layer: str = QUERY, rows: int = 96, columns: int = 96, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_file({f"{layer}.lora_A.weight": torch.randn(2, columns), f"{layer}.lora_B.weight": torch.randn(rows, 2)}, path)
    return path


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "style.safetensors")


@pytest.fixture
def text_lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "words.safetensors", VALUE, 32, 64)


def test_a_lora_changes_the_picture_by_its_strength(shell: Shell, lora: Path, text_lora: Path) -> None:
    plain = pixels(shell.draw("a cat")[0])
    drawn = {plain}
    for given in ((lora,), (f"{lora}=0.3",), (f"{lora}=-1",), (text_lora,), (lora, text_lora)):
        options = [word for one in given for word in ("--lora", one)]
        (path,) = shell.draw("a cat", *options, "--overwrite")
        drawn.add(pixels(path))
    assert len(drawn) == 6
    assert record(path)["loras"] == ["style.safetensors=1", "words.safetensors=1"]
    assert pixels(shell.draw("a cat", "--lora", f"{lora}=0", "--overwrite")[0]) == plain
    assert "loras" not in record(shell.draw("a cat", "--overwrite")[0])


def test_a_changed_lora_draws_what_is_new(shell: Shell, lora: Path, text_lora: Path) -> None:
    """Its strength, its numbers, its rank and alpha beside it, another one more: each is another picture."""
    shell.draw("a cat")
    given = ("a cat", "--lora", lora, "--resume")
    beside = lora.parent / "adapter_config.json"

    def drawn(*arguments: object) -> str:
        (path,) = shell.draw(*arguments)
        assert shell.generate(*arguments) == ALL_THERE
        return path.name

    assert drawn(*given) == "out-0001.png"
    assert drawn("a cat", "--lora", f"{lora}=0.5", "--resume") == "out-0002.png"
    assert drawn(*given, "--lora", text_lora) == "out-0003.png"
    write_lora(lora, seed=1)
    assert drawn(*given) == "out-0004.png"
    beside.write_text('{"r": 2, "lora_alpha": 8}')  # which counts for a file that is alone or called adapter_model
    assert shell.generate(*given) == ALL_THERE
    text_lora.unlink()
    assert drawn(*given) == "out-0005.png"
    beside.write_text('{"r": 2, "lora_alpha": 6}')
    assert drawn(*given) == "out-0006.png"
    assert shell.generate("a cat", "--resume") == ALL_THERE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "missing.safetensors",
            "missing.safetensors does not exist; give the file of a LoRA, or the folder that holds one",
        ),
        (
            "style.safetensors=x",
            "--lora is {folder}/style.safetensors=x, and 'x' is no strength; give FILE or FILE=0.8",
        ),
        ("style.safetensors=", "--lora is {folder}/style.safetensors=, and '' is no strength; give FILE or FILE=0.8"),
        ("style.safetensors=nan", "style.safetensors is nan; it must be a finite number, such as 1"),
        (
            "wide.safetensors",
            "wide.safetensors was made for another model: it changes 1152 x 1152 numbers of "
            "transformer_blocks.0.attn1.to_q.weight, which has 96 x 96 here; use a LoRA made for this model",
        ),
        (
            "other.safetensors",
            "nothing of other.safetensors fits: its names are those of a Flux model, first "
            "transformer.single_transformer_blocks.0.lora_A.weight; use a LoRA made for this model",
        ),
    ],
)
def test_a_lora_that_cannot_be_used_is_refused(shell: Shell, lora: Path, given: str, message: str) -> None:
    write_lora(lora.with_stem("wide"), rows=1152, columns=1152)
    write_lora(lora.with_stem("other"), "transformer.single_transformer_blocks.0")
    assert shell.fail("a cat", "--lora", lora.parent / given).endswith(message.format(folder=lora.parent))


@pytest.mark.parametrize("given", ["", "=0.5"])
def test_a_strength_without_a_file_is_refused(shell: Shell, given: str) -> None:
    assert shell.fail("a cat", "--lora", given) == f"--lora is {given!r}, which names no file; give FILE or FILE=0.8"


def test_a_name_with_an_equals_sign_is_a_name_where_there_is_such_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r=4"
    assert read_strength(f"{path}") == (tmp_path / "r", 4.0)
    path.touch()
    assert read_strength(f"{path}") == (path, 1.0)
    assert read_strength(f"{path}=0.5") == (path, 0.5)
    assert read_strength("style.safetensors=-0.25") == (Path("style.safetensors"), -0.25)
