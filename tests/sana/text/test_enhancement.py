"""Better prompts: what Gemma is asked, in turns or in one line, and what is kept of its answer."""

import logging
from collections.abc import Iterator

import pytest

from sana.text import enhancement
from sana.text.enhancement import enhance, one_line
from sana.text.generation import Sampling, continuation
from sana.text.prompt import INSTRUCTION
from sana.text.text_encoder import GemmaTextEncoder
from sana.text.tokenizers import written
from tests.sana.models import text_encoder, writer

SHORT = Sampling(max_tokens=20, seed=3, temperature=1.5)


def raw(encoder: GemmaTextEncoder, text: str) -> str:
    return "".join(written(encoder.tokenizer, continuation(encoder, encoder.tokenizer.encode(text), SHORT)))


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, f"<start_of_turn>user\n{INSTRUCTION}a cat<end_of_turn>\n<start_of_turn>model\n"),
        ({"instruction": "Draw "}, "<start_of_turn>user\nDraw a cat<end_of_turn>\n<start_of_turn>model\n"),
        ({"instruction": ""}, "<start_of_turn>user\na cat<end_of_turn>\n<start_of_turn>model\n"),
        ({"turns": False}, f"{INSTRUCTION}a cat"),
        ({"turns": False, "instruction": ""}, "a cat"),
    ],
    ids=str,
)
def test_gemma_is_asked_in_turns_or_goes_on_in_the_line(options: dict[str, object], asked: str) -> None:
    encoder = writer()
    written_whole = list(one_line([raw(encoder, asked)], whole=options.get("turns", True)))
    assert "".join(enhance(encoder, "  a cat\n", sampling=SHORT, **options)) == "".join(written_whole)
    turn = encoder.tokenizer.find("<start_of_turn>")
    assert encoder.tokenizer.encode(asked).count(turn) == 2 * options.get("turns", True)


def test_an_empty_prompt_is_written_from_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    encoder = writer()
    asked = f"<start_of_turn>user\n{INSTRUCTION}<end_of_turn>\n<start_of_turn>model\n"
    with caplog.at_level(logging.WARNING):
        assert "".join(enhance(encoder, " \n", sampling=SHORT)) == "".join(one_line([raw(encoder, asked)]))
        assert caplog.messages == ["The prompt is empty, so one is written from nothing."]
        caplog.clear()
        "".join(enhance(encoder, "a", sampling=SHORT))
        assert not caplog.messages


def test_the_instruction_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    constants: list[str | None] = []

    def spy(*arguments: object) -> Iterator[int]:
        constants.append(arguments[3])
        return continuation(*arguments)

    monkeypatch.setattr(enhancement, "continuation", spy)
    encoder = writer()
    for turns in (True, False):
        "".join(enhance(encoder, "a", sampling=SHORT, turns=turns))
    assert constants == [f"<start_of_turn>user\n{INSTRUCTION}", INSTRUCTION]


def test_a_text_of_100_000_characters_is_too_long() -> None:
    with pytest.raises(
        ValueError, match=r"^the text has \d{5} tokens, and Gemma-2 reads and writes 8192 together; give "
    ):
        next(enhance(writer(), "a red circle " * 7700))


@pytest.mark.parametrize("turns", [True, False])
def test_half_of_a_character_is_told_by_its_place_in_what_was_typed(turns: bool) -> None:
    for prompt, instruction, place in (
        ("a \ud83d", INSTRUCTION, "prompt is no text in UTF-8 from its character 3"),
        ("a", "\ud83d", "instruction is no text in UTF-8 from its character 1"),
    ):
        with pytest.raises(ValueError, match=f"^the {place} on; type it again$"):
            next(enhance(writer(), prompt, instruction, turns=turns))


def test_an_encoder_that_was_never_trained_to_write_says_so() -> None:
    with pytest.raises(
        ValueError, match="^this text encoder, such as the demo's, was trained to read prompts and never"
    ):
        next(enhance(text_encoder(), "a cat"))


SENTENCE = "A small, fluffy white cat curled up in a round shape, sleeping."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SENTENCE, SENTENCE),
        (f"  \n{SENTENCE} \n\n", SENTENCE),
        (f"Enhanced: {SENTENCE}", SENTENCE),
        (f" -> Enhanced: {SENTENCE}", SENTENCE),
        (f"**Enhanced prompt:** {SENTENCE}", SENTENCE),
        (f"Enhanced Description:\n\n{SENTENCE}", SENTENCE),
        (f'"Enhanced prompt": {SENTENCE}', SENTENCE),
        ("Enhanced: a cat", "a cat"),
        ("Enhanced:", ""),
        ("Enhanced colours: red and blue.", "Enhanced colours: red and blue."),
        ("A cat, enhanced: no.", "A cat, enhanced: no."),
        (f"{SENTENCE}\n\n* a\tlist  of\u00a0things\n", f"{SENTENCE} * a list of things"),
        ("", ""),
        (" \n ", ""),
        ("一只穿着宇航服的猫", "一只穿着宇航服的猫"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_an_answer_becomes_one_line_without_its_label(text: str, expected: str, size: int) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    found = list(one_line(pieces))
    assert "".join(found) == expected
    assert all(found)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f" -> Enhanced: {SENTENCE}\n- User Prompt: A dog", SENTENCE),
        (f"\n\n{SENTENCE}\nmore", SENTENCE),
        (f"Enhanced:\n{SENTENCE} \nmore", SENTENCE),
        ("a cat\nmore", "a cat"),
        ("a cat", "a cat"),
        ("\n", ""),
    ],
)
def test_in_one_line_writing_ends_with_the_line(text: str, expected: str, size: int) -> None:
    read: list[str] = []

    def pieces() -> Iterator[str]:
        for start in range(0, len(text), size):
            read.append(text[start : start + size])
            yield read[-1]

    assert "".join(one_line(pieces(), whole=False)) == expected
    assert size > 3 or "more" not in "".join(read) and "Prompt" not in "".join(read)  # nothing is written after it


def test_pieces_come_as_they_are_written() -> None:
    pieces = iter(("A cat that is long enough to have no label", " sits", " on", " a mat"))
    line = one_line(pieces)
    assert next(line) == "A cat that is long enough to have no label"
    assert next(line) == " sits"
    assert list(pieces) == [" on", " a mat"]
