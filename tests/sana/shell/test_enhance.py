"""Better prompts in the shell: printed as they are written, and drawn with both prompts in the record."""

import builtins
from pathlib import Path

import pytest

from sana import SanaPipeline
from sana.text.enhancement import enhance
from sana.text.generation import Sampling
from sana.text.prompt import INSTRUCTION
from tests.sana.models import gemma, write_model, write_text_encoder
from tests.sana.quantisers import QUANTISERS, quantised
from tests.sana.shell.commands import Outcome, Shell, error_line, pixels, record
from tests.sana.shell.test_lora import VALUE, write_lora

EMBEDDING = "embed_tokens.weight"
ALL_THERE = Outcome(0, "Every picture exists already.\n", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("talking"), talking=True)


@pytest.fixture(scope="module")
def pipeline(model: Path) -> SanaPipeline:
    return SanaPipeline.load(model)


def write(shell: Shell, *arguments: object) -> str:
    """What was printed, without the end of its last line."""
    outcome = shell.run("enhance", "--model", shell.model, "--max-tokens", 12, *arguments)
    assert outcome.code == 0 and not outcome.err, outcome.err
    assert outcome.out.endswith("\n")
    return outcome.out[:-1]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {}),
        (("--seed", 5), {"seed": 5}),
        (("--temperature", 0), {"temperature": 0}),
        (("--temperature", 3, "--top-k", 3), {"temperature": 3, "top_k": 3}),
        (("--temperature", 3, "--top-k", 0, "--top-p", 0.2), {"temperature": 3, "top_k": 0, "top_p": 0.2}),
        (("--temperature", 3, "--min-p", 0.9), {"temperature": 3, "min_p": 0.9}),
        (("--repetition-penalty", 3), {"repetition_penalty": 3}),
        (("--presence-penalty", 9), {"presence_penalty": 9}),
        (("--max-tokens", 3), {"max_tokens": 3}),
        (("--instruction", "Draw "), {"instruction": "Draw "}),
        (("--raw",), {"turns": False}),
    ],
    ids=str,
)
def test_the_text_is_that_of_the_pipeline(
    shell: Shell, pipeline: SanaPipeline, arguments: tuple[object, ...], options: dict[str, object]
) -> None:
    text = write(shell, "a cat", *arguments)
    assert text == pipeline.enhance("a cat", **{"max_tokens": 12, **options})
    assert not arguments or text != write(shell, "a cat")


def test_a_folder_or_file_of_the_text_encoder_is_enough(shell: Shell, model: Path) -> None:
    assert write(shell, "a cat", "--model", "missing", "--text-encoder", model / "text_encoder") == write(
        shell, "a cat"
    )
    assert write(shell, "a cat", "--dtype", "bfloat16")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "words.safetensors", VALUE, 32, 64)


def test_a_lora_of_the_text_encoder_counts(shell: Shell, model: Path, lora: Path) -> None:
    text = write(shell, "a cat", "--lora", f"{lora}=0.5")
    assert text == SanaPipeline.load(model, loras=[(lora, 0.5)]).enhance("a cat", max_tokens=12)
    plain = write(shell, "a cat")
    assert text != plain == write(shell, "a cat", "--lora", f"{lora}=0")


@pytest.mark.parametrize("form", ["fp8", "int8 by rows", "bitsandbytes nf4"])
def test_a_quantised_text_encoder_writes_what_its_numbers_write(
    shell: Shell, model: Path, lora: Path, form: str
) -> None:
    """With a LoRA on a packed layer and without."""
    weights = gemma().state_dict()
    packed, unpacked = quantised(
        weights, QUANTISERS[form], [f"{VALUE.removeprefix('text_encoder.')}.weight", EMBEDDING]
    )
    folders = [write_text_encoder(shell.folder / name, t) for name, t in (("a", packed), ("b", unpacked))]
    for more in ((), ("--lora", lora)):
        text, expected = (write(shell, "a cat", "--text-encoder", folder, *more) for folder in folders)
        assert text == expected
    assert text != write(shell, "a cat", "--text-encoder", folders[0]) != write(shell, "a cat")


def test_every_line_of_a_file_becomes_a_line(shell: Shell) -> None:
    prompts = shell.folder / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n", encoding="utf-8")
    assert write(shell, "--prompts", prompts).splitlines() == [write(shell, "a cat"), write(shell, "a dog")]


def test_the_text_is_printed_as_it_is_written(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr(builtins, "print", lambda text="", **how: printed.append((text, how)))
    assert shell.run("enhance", "a cat", "--model", shell.model, "--max-tokens", 40).code == 0
    *pieces, end = printed
    assert len(pieces) > 5 and all(how == {"end": "", "flush": True} for _, how in pieces)
    assert end == ("", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a prompt or --prompts FILE"),
        (("a cat", "--max-tokens", 0), "max_tokens is 0; at least 1 is needed"),
        (("a cat", "--temperature", "nan"), "temperature is nan; it must be a number from 0 on, such as 0.7"),
        (("a cat", "--device", "nowhere"), "device nowhere cannot be used"),
        (("a red circle " * 7700,), "the text has"),
        (
            ("a cat", "--model", "demo"),
            "this text encoder, such as the demo's, was trained to read prompts and never to write; use "
            "Efficient-Large-Model/gemma-2-2b-it",
        ),
    ],
)
def test_what_cannot_be_is_one_line(shell: Shell, arguments: tuple[object, ...], message: str) -> None:
    outcome = shell.run("enhance", "--model", shell.model, *arguments)
    assert outcome.code == 1 and not outcome.out
    assert error_line(outcome).startswith(message)


def test_an_empty_prompt_says_that_it_is_empty(
    shell: Shell, pipeline: SanaPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    assert write(shell, "") == pipeline.enhance("", max_tokens=12)
    assert caplog.messages == ["The prompt is empty, so one is written from nothing."] * 2


# Drawing


def written(pipeline: SanaPipeline, prompt: str, seed: int, instruction: str = INSTRUCTION) -> str:
    return "".join(enhance(pipeline.text_encoder, prompt, instruction, Sampling(seed=seed)))


def test_a_lora_counts_in_both_the_text_and_the_picture(shell: Shell, model: Path, lora: Path) -> None:
    (path,) = shell.draw("a cat", "--enhance", "--lora", lora)
    text = written(SanaPipeline.load(model, loras=[(lora, 1.0)]), "a cat", 0)
    assert record(path)["prompt"] == text
    (plain,) = shell.draw(text, "--lora", lora, "--out", shell.folder / "plain.png")
    assert pixels(plain) == pixels(path)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 256 tokens would be long waits."""
    monkeypatch.setattr("sana.text.generation.Sampling.__init__.__defaults__", (8, *Sampling.__init__.__defaults__[1:]))


def test_a_picture_is_drawn_from_the_text_and_carries_both(shell: Shell, pipeline: SanaPipeline) -> None:
    (path,) = shell.draw("a cat", "--enhance", "--seed", 4)
    found, text = record(path), written(pipeline, "a cat", 4)
    assert (found["prompt"], found["enhanced_from"], found["seed"]) == (text, "a cat", 4)
    (plain,) = shell.draw(text, "--seed", 4, "--out", shell.folder / "plain.png")
    assert pixels(plain) == pixels(path)
    assert "enhanced_from" not in record(plain)
    assert text in shell.generate("a cat", "--enhance", "--seed", 4, "--overwrite").err


def test_every_picture_has_a_text_of_its_own_seed(shell: Shell, pipeline: SanaPipeline) -> None:
    paths = shell.draw("a cat", "--enhance", "--seed", 4, "--batch-size", 2)
    texts = [record(path)["prompt"] for path in paths]
    assert texts == [written(pipeline, "a cat", 4), written(pipeline, "a cat", 5)] and len(set(texts)) == 2
    (alone,) = shell.draw("a cat", "--enhance", "--seed", 5, "--out", shell.folder / "alone.png")
    assert record(alone) == record(paths[1])


def test_the_instruction_is_that_of_the_picture_or_the_official_one(shell: Shell, pipeline: SanaPipeline) -> None:
    for instruction, used in (("Draw ", "Draw "), ("", INSTRUCTION)):
        (path,) = shell.draw("a cat", "--enhance", "--instruction", instruction, "--overwrite")
        assert record(path)["prompt"] == written(pipeline, "a cat", 0, used)


def test_resume_knows_from_what_a_picture_was_drawn(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = shell.folder / "prompts.txt"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    arguments = ("--prompts", prompts, "--enhance", "--batch-size", 2, "--resume")
    paths = shell.draw(*arguments)
    before = [record(path) for path in paths]
    assert [found["enhanced_from"] for found in before] == ["a cat", "a cat", "a dog", "a dog"]
    with monkeypatch.context() as nothing_is_written:
        nothing_is_written.setattr(SanaPipeline, "load", None)
        assert shell.generate(*arguments) == ALL_THERE
    paths[1].unlink()
    assert shell.draw(*arguments) == [paths[1]]
    assert [record(path) for path in paths] == before
    assert len(shell.draw("--prompts", prompts, "--batch-size", 2, "--resume")) == 4  # plain ones are others
    (text,) = {found["prompt"] for found in before[:1]}
    assert len(shell.draw(text, "--resume")) == 1
    assert shell.generate(*arguments) == ALL_THERE


def test_a_demo_that_cannot_write_draws_nothing(shell: Shell) -> None:
    assert shell.fail("a cat", "--enhance", "--model", "demo").startswith("this text encoder, such as the demo's, was")
