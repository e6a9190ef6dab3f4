"""A better prompt, written by the text encoder that reads it: Gemma-2, told what the instruction of SANA tells it."""

import logging
import re
from collections.abc import Iterable, Iterator

from .generation import Sampling, continuation
from .prompt import INSTRUCTION, joined
from .text_encoder import GemmaTextEncoder
from .tokenizers import END_OF_TURN, START_OF_TURN, written

# How Gemma-2-2b-it was trained to talk (its chat template; ai.google.dev/gemma/docs/formatting).
BEFORE, AFTER = f"{START_OF_TURN}user\n", f"{END_OF_TURN}\n{START_OF_TURN}model\n"
# What may stand before the prompt that was asked for: "-> Enhanced: " of the instruction's own examples, and the like.
LABEL = re.compile(r"[\s*\"'>-]*\benhanced(?: prompt| description)?[\s*\"']*:[\s*]*", re.IGNORECASE)
LABEL_LENGTH = 40  # characters

log = logging.getLogger(__name__)


def enhance(
    encoder: GemmaTextEncoder,
    prompt: str,
    instruction: str = INSTRUCTION,
    sampling: Sampling | None = None,
    *,
    turns: bool = True,
) -> Iterator[str]:
    """A longer prompt in pieces, as they are written; together they are one line.

    instruction: put before the prompt. sampling: None: as `Sampling` has it. turns: ask in the chat template of Gemma-2, and
    take the answer; otherwise go on in the same line, as the instruction itself shows it.
    If Gemma writes nothing, the prompt stays as it is. Raises ValueError as `joined`, and it and RuntimeError as `continuation`.
    """
    if not prompt.strip():
        log.warning("The prompt is empty, so one is written from nothing.")
    before, after = (BEFORE, AFTER) if turns else ("", "")
    ids = encoder.tokenizer.encode(before + joined(instruction, prompt) + after)
    tokens = continuation(encoder, ids, sampling or Sampling(), before + instruction)
    nothing = True
    for piece in one_line(written(encoder.tokenizer, tokens), whole=turns):
        nothing = False
        yield piece
    if nothing:
        log.warning("The text encoder wrote nothing, so the prompt stays as it is.")
        yield prompt


def one_line(pieces: Iterable[str], whole: bool = True) -> Iterator[str]:
    """A text without the label before it, with single spaces for all white space. whole: otherwise its first line alone."""
    held, begun = "", False  # held: what is not handed on yet
    for piece in pieces:
        held += piece
        if not begun:
            held = held.lstrip()
            if len(held) < LABEL_LENGTH and "\n" not in held:
                continue  # a label may still become whole
            held = _unlabelled(held)
        line, ending, _ = (held, "", "") if whole else held.partition("\n")
        spaced = re.sub(r"\s+", " ", line)
        ready = spaced.rstrip()  # a space waits for what follows it
        if ready:
            yield ready
            begun = True
        if ending and begun:
            return
        held = spaced[len(ready) :]
    if not begun and (rest := _unlabelled(held.lstrip()).strip()):
        yield re.sub(r"\s+", " ", rest)


def _unlabelled(text: str) -> str:
    label = LABEL.match(text)
    return text[label.end() :] if label else text
