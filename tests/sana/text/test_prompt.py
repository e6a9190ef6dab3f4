"""The instruction and the choice of tokens, against the texts and the index arithmetic of the references."""

import hashlib
import inspect

import pytest
from diffusers import SanaPipeline

from sana.text.prompt import DIFFUSERS_INSTRUCTION, INSTRUCTION, common_prefix, joined, window


def test_the_instruction_is_that_of_nvlabs() -> None:
    # md5 of the eight lines of chi_prompt in NVlabs/Sana configs/sana_config/1024ms/Sana_1600M_img1024.yaml
    assert hashlib.md5(INSTRUCTION.encode()).hexdigest().startswith("a387b471")
    assert INSTRUCTION.endswith("User Prompt: ")


def test_the_instruction_of_diffusers_differs_in_its_quotes() -> None:
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert "\n".join(lines) == DIFFUSERS_INSTRUCTION
    assert DIFFUSERS_INSTRUCTION.replace("'Enhanced prompt'", '"Enhanced prompt"') == INSTRUCTION


def test_a_prompt_is_stripped_behind_an_instruction_that_is_not() -> None:
    assert joined(" Draw ", "\n a cat ") == " Draw a cat"
    assert joined(None, " a cat") == joined("", "a cat") == "a cat"


@pytest.mark.parametrize(
    ("instruction", "prompt", "named"),
    [
        (INSTRUCTION, "  a \udcff", "the prompt is no text in UTF-8 from its character 5 on; type it again"),
        (None, "\ud83d", "the prompt is no text in UTF-8 from its character 1 on; type it again"),
        ("Draw \ud83d", "a cat", "the instruction is no text in UTF-8 from its character 6 on; type it again"),
    ],
    ids=range(3),
)
def test_half_of_a_character_is_told_by_its_place_in_what_was_typed(
    instruction: str | None, prompt: str, named: str
) -> None:
    with pytest.raises(ValueError) as caught:
        joined(instruction, prompt)
    assert str(caught.value) == named


@pytest.mark.parametrize("instruction_tokens", [2, 3, 240])
@pytest.mark.parametrize("prompt_tokens", [0, 1, 5, 298, 299, 300, 301, 5000])
def test_the_window_is_the_first_and_the_last_299_of_a_padded_pair(instruction_tokens: int, prompt_tokens: int) -> None:
    length = instruction_tokens + 300 - 2
    tokens = instruction_tokens + prompt_tokens
    mask = [position < tokens for position in range(length)]
    selected = [mask[i] for i in [0, *range(-299, 0)]]  # app/sana_pipeline.py, select_index

    kept = window(instruction_tokens)

    assert kept.stop == length
    assert kept.start == length - 299
    assert kept.rows(tokens) == sum(selected)
    assert kept.lost(tokens) == max(0, tokens - length)


@pytest.mark.parametrize("instruction_tokens", [0, 1])
def test_without_instruction_the_window_is_the_first_300(instruction_tokens: int) -> None:
    kept = window(instruction_tokens)
    assert (kept.start, kept.stop) == (1, 300)
    assert [kept.rows(length) for length in (1, 2, 300, 301)] == [1, 2, 300, 300]
    assert [kept.lost(length) for length in (1, 300, 301)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("sequences", "shared"),
    [
        ([[2, 7, 8, 9]], 3),
        ([[2, 7, 8, 9], [2, 7, 5]], 2),
        ([[2, 7, 8], [2]], 1),
        ([[5]], 0),
        ([[2, 7]], 2),
    ],
)
def test_common_prefix_counts_the_tokens_every_sequence_starts_with(sequences: list[list[int]], shared: int) -> None:
    assert common_prefix(sequences, [2, 7, 8]) == shared
