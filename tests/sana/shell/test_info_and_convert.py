"""What info says and convert writes."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.sana.shell.commands import Shell, error_line, pixels


@pytest.mark.parametrize(
    ("part", "first", "second"),
    [
        ("transformer", "transformer: a SANA transformer", "3 blocks of width 96"),
        ("vae", "vae: a DC-AE, the autoencoder of SANA", "32 px per latent cell, 32 channels"),
    ],
)
def test_info_says_what_a_file_is_in_five_lines(shell: Shell, model: Path, part: str, first: str, second: str) -> None:
    outcome = shell.run("info", model / part)
    lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err, len(lines)) == (0, "", 5)
    assert lines[0] == first
    assert second in lines[2]
    assert "float16" in lines[1]


def test_info_on_a_pipeline_is_about_its_transformer(shell: Shell, model: Path) -> None:
    assert shell.run("info", model) == shell.run("info", model / "transformer")


def test_info_on_a_text_encoder_says_where_it_belongs(shell: Shell, model: Path) -> None:
    lines = shell.run("info", model / "text_encoder").out.splitlines()
    assert lines[0] == "text_encoder: a Gemma text encoder"
    assert lines[-1] == "give its path as the text encoder"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"text", "a.safetensors is not a readable safetensors file"),
        ("a.pth", b"text", "a.pth is not a readable PyTorch file; the download may be incomplete"),
        ("a.txt", b"text", "a.txt is not a readable safetensors or PyTorch file; it is no checkpoint"),
    ],
)
def test_info_on_anything_else_is_one_line(shell: Shell, name: str, content: bytes, message: str) -> None:
    (shell.folder / name).write_bytes(content)
    outcome = shell.run("info", shell.folder / name)
    assert outcome.code == 1
    assert error_line(outcome).startswith(message)


def test_a_converted_model_draws_the_same_picture(shell: Shell, model: Path) -> None:
    paths = {part: shell.folder / f"{part}.safetensors" for part in ("transformer", "vae")}
    for part, path in paths.items():
        outcome = shell.run("convert", model / part, path)
        assert (outcome.code, outcome.err) == (0, "")
        assert str(path) in outcome.out
    (expected,) = shell.draw("a cat", "--seed", 5, "--steps", 2)
    drawn = pixels(expected)
    separate = ("--model", paths["transformer"], "--autoencoder", paths["vae"], "--text-encoder", model)
    assert shell.draw("a cat", "--seed", 5, "--steps", 2, *separate, "--overwrite") == [expected]
    assert pixels(expected) == drawn


@pytest.fixture
def lora(shell: Shell) -> Path:
    """In kohya's names, with alpha 1 of rank 2."""
    layer = "lora_unet_transformer_blocks_0_attn1_to_q"
    torch.manual_seed(0)
    tensors = {f"{layer}.lora_down.weight": torch.randn(2, 96), f"{layer}.lora_up.weight": torch.randn(96, 2)}
    save_file({**tensors, f"{layer}.alpha": torch.tensor(1.0)}, path := shell.folder / "style.safetensors")
    return path


def test_info_says_how_much_of_a_lora_fits(shell: Shell, model: Path, lora: Path) -> None:
    outcome = shell.run("info", lora, "--model", model)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[2::2] == [
        "for SANA's transformer: LoRA of rank 2, alpha 1 on 1 weights",
        f"all of its 1 layers fit {model.name}",
    ]
    assert shell.run("info", lora).out.splitlines()[:4] == outcome.out.splitlines()[:4]
    refused = shell.run("info", model, "--model", model)
    assert refused.code == 1 and error_line(refused).endswith("is no LoRA; leave it out")


def test_a_merged_model_and_a_converted_lora_draw_what_the_lora_draws(shell: Shell, model: Path, lora: Path) -> None:
    draw = ("a cat", "--seed", 5, "--steps", 2, "--overwrite")
    plain = pixels(shell.draw(*draw)[0])
    expected = pixels(shell.draw(*draw, "--lora", f"{lora}=0.5")[0])
    assert expected != plain
    target, other = shell.folder / "merged.safetensors", shell.folder / "other.safetensors"
    assert shell.run("convert", model, target, "--lora", f"{lora}=0.5", "--dtype", "float32").code == 0
    parts = ("--model", target, "--autoencoder", model, "--text-encoder", model)
    assert pixels(shell.draw(*draw, *parts)[0]) == expected
    outcome = shell.run("convert", lora, other)
    assert outcome == (0, f"{other}: a LoRA in diffusers' layout, of rank 2 on 1 layers\n", "")
    assert pixels(shell.draw(*draw, "--lora", f"{other}=0.5")[0]) == expected


def test_convert_can_change_the_dtype(shell: Shell, model: Path) -> None:
    target = shell.folder / "small.safetensors"
    assert shell.run("convert", model / "vae", target, "--dtype", "bfloat16").code == 0
    with safe_open(target, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("vae", "out.bin", "does not end in .safetensors; give the name of the file to write"),
        ("vae", "missing/out.safetensors", "out.safetensors"),
        ("vae", "folder.safetensors", "folder.safetensors"),
        ("text_encoder", "out.safetensors", "is a Gemma text encoder; give a SANA transformer, a DC-AE or a LoRA"),
        ("missing", "out.safetensors", "does not exist"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    shell: Shell, model: Path, source: str, target: str, message: str
) -> None:
    (shell.folder / "folder.safetensors").mkdir()
    outcome = shell.run("convert", model / source, shell.folder / target)
    assert outcome.code == 1
    assert message in error_line(outcome)
    assert [path.name for path in shell.folder.iterdir()] == ["folder.safetensors"]


def test_convert_quantises(shell: Shell, model: Path) -> None:
    """The blocks, and all of it if that is asked for; the rest is in the dtype that is."""
    counts = {}
    for options in ((), ("--quantize-all",)):
        target = shell.folder / f"{len(options)}.safetensors"
        outcome = shell.run("convert", model, target, "--quantize", "int8", "--dtype", "bfloat16", *options)
        assert (outcome.code, outcome.err) == (0, "")
        with safe_open(target, "pt") as file:
            dtypes = [file.get_tensor(name).dtype for name in file.keys()]
        counts[options] = dtypes.count(torch.int8)
        assert {*dtypes} == {torch.int8, torch.float32, torch.uint8, torch.bfloat16}  # packed, scales, marks, the rest
    assert [*counts.values()] == [30, 37]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("transformer", ("--quantize-all",), "--quantize-all is given without --quantize; say which format, such as "),
        ("vae", ("--quantize", "fp8"), "vae is a DC-AE, the autoencoder of SANA; what can be quantised are a SANA "),
        ("missing", ("--quantize", "fp8"), "missing does not exist"),
    ],
)
def test_what_cannot_be_quantised_is_one_line(
    shell: Shell, model: Path, source: str, options: tuple[str, ...], message: str
) -> None:
    outcome = shell.run("convert", model / source, shell.folder / "out.safetensors", *options)
    assert outcome.code == 1
    assert message in error_line(outcome)
    assert not [*shell.folder.iterdir()]


def test_a_format_that_does_not_exist(shell: Shell, model: Path) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        shell.run("convert", model, shell.folder / "out.safetensors", "--quantize", "int4")
    assert "invalid choice: 'int4'" in shell.capture.readouterr().err
