"""The instruction that SANA puts before a prompt, and which tokens of the pair the transformer sees. Text and counting only."""

from collections.abc import Sequence
from typing import NamedTuple

from ..config import TEXT_TOKENS
from .tokenizers import check_text

# "Complex human instruction", NVlabs/Sana configs/sana_config/1024ms/Sana_1600M_img1024.yaml, chi_prompt. The double quotes
# are NVlabs'; diffusers has single quotes there, which are other tokens and give other pictures.
INSTRUCTION = "\n".join(
    [
        'Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable for image '
        "generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional commentary "
        "or evaluations:",
        "User Prompt: ",
    ]
)

# diffusers pipelines/sana/pipeline_sana.py, complex_human_instruction. It also lower-cases prompts.
DIFFUSERS_INSTRUCTION = INSTRUCTION.replace('"Enhanced prompt"', "'Enhanced prompt'")


def joined(instruction: str | None, prompt: str) -> str:
    """A prompt, without white space around it, behind an instruction.

    Raises ValueError for what is no text, by its place in the one or in the other.
    """
    check_text(instruction or "", "instruction")
    check_text(prompt)
    return (instruction or "") + prompt.strip()


class Window(NamedTuple):
    """Which positions of an instruction and its prompt, tokenised together, become rows of `text`."""

    start: int  # first position after the beginning-of-sequence token, which is always kept
    stop: int  # the pair is cut here

    def rows(self, length: int) -> int:
        """Rows of `text` that count, for a pair of `length` tokens."""
        return 1 + max(0, min(length, self.stop) - self.start)

    def lost(self, length: int) -> int:
        """Tokens of a pair of `length` tokens that no row shows."""
        return max(0, length - self.stop)


def window(instruction_tokens: int) -> Window:
    """The window of NVlabs/Sana app/sana_pipeline.py: the first token and the last 299 of a padded pair.

    instruction_tokens: length of the instruction alone, with its first token. The pair is cut to instruction_tokens + 298:
    two less than both would need, because the first token is shared and the instruction's trailing space becomes part of
    the prompt's first word. So the 299 start exactly at the prompt. 0 or 1: no instruction, the first 300 tokens.
    """
    stop = max(instruction_tokens, 2) + TEXT_TOKENS - 2
    return Window(stop - (TEXT_TOKENS - 1), stop)


def common_prefix(sequences: Sequence[Sequence[int]], prefix: Sequence[int]) -> int:
    """How many tokens of `prefix` every sequence starts with."""
    for i, token in enumerate(prefix):
        if any(len(sequence) <= i or sequence[i] != token for sequence in sequences):
            return i
    return len(prefix)
