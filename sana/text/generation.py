"""Gemma-2 writes: a text goes on token by token, from the logits of the network's own embedding.

Keys and values of what was read are kept and written in place, so a token costs one run over the weights and little else. The
text before, such as an instruction, is read once for all texts that begin with it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TEXT_ENCODER_SOURCE
from .gemma import KeysValues
from .prompt import common_prefix
from .text_encoder import CONTEXT, PART, GemmaTextEncoder
from .tokenizers import END_OF_TURN, EOS

BLOCK = 256  # tokens by which the memory for keys and values grows


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many at most. What takes tokens away acts in the order of these fields.

    Raises ValueError for values out of range.
    """

    max_tokens: int = 256
    seed: int = 0
    repetition_penalty: float = (
        1.0  # divides logits of tokens that are in the text already, or multiplies negative ones
    )
    presence_penalty: float = 0.0  # subtracted from the same logits
    temperature: float = 0.7  # divides logits; 0: always the likeliest token
    top_k: int = 64  # so many of the likeliest tokens; 0: all
    top_p: float = 0.95  # of these the likeliest that have this probability together
    min_p: float = 0.0  # of these the ones with this share of the likeliest one's probability

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; at least 1 is needed")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed} does not fit into 64 bits; use a smaller one")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be a number above 0, and 1 is none"
            )
        if not math.isfinite(self.presence_penalty):
            raise ValueError(f"presence_penalty is {self.presence_penalty}; it must be a finite number, and 0 is none")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be a number from 0 on, such as 0.7")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0, for all tokens, or more")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number from 0 to 1")


def check_writes(encoder: GemmaTextEncoder) -> None:
    """Raises ValueError for a text encoder that was never trained to write.

    Its vocabulary tells: that of a text encoder that was trained for pictures alone has no marks for the turns of a talk.
    """
    if encoder.tokenizer.find(END_OF_TURN) is None:
        raise ValueError(
            "this text encoder, such as the demo's, was trained to read prompts and never to write; use "
            f"{TEXT_ENCODER_SOURCE}"
        )


@torch.no_grad()
def continuation(
    encoder: GemmaTextEncoder, ids: Sequence[int], sampling: Sampling, constant: str | None = None
) -> Iterator[int]:
    """The tokens that follow those of a text, one by one, up to the end of the sequence or of the turn, which is left out.

    constant: what the text begins with, and others after it; it is read once for all of them. Closing the iterator stops the
    writing at once. The same seed gives the same tokens on the same device. Raises ValueError as `check_writes`, for a text
    that leaves no room to write, and for a token that the network does not have; RuntimeError if its numbers break.
    """
    check_writes(encoder)
    if len(ids) >= CONTEXT:
        raise ValueError(
            f"the text has {len(ids)} tokens, and Gemma-2 reads and writes {CONTEXT} together; give a shorter one"
        )
    stops = (EOS, encoder.tokenizer.find(END_OF_TURN))
    generator = torch.Generator().manual_seed(sampling.seed)
    reader, known = _reader(encoder, ids, constant)
    text, unread = list(ids), ids[known:]
    for _ in range(min(sampling.max_tokens, CONTEXT - len(ids))):
        token = choose(reader.read(unread), text, sampling, generator)
        if token in stops:
            return
        yield token
        text.append(token)
        unread = [token]


def choose(logits: Tensor, text: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    """The next token, by one random number of a generator on the CPU. Arguments as for `probabilities`.

    Raises RuntimeError for logits that are not finite.
    """
    if not bool(logits.isfinite().all()):
        raise RuntimeError(
            "the text encoder gave numbers that are not finite; its file or a LoRA is damaged: try without the LoRA first"
        )
    tokens, shares = (part.cpu() for part in probabilities(logits, text, sampling))
    sums = shares.double().cumsum(0)
    place = torch.rand((), dtype=torch.float64, generator=generator) * sums[-1]
    return int(tokens[torch.searchsorted(sums, place, right=True).clamp(max=len(sums) - 1)])


def probabilities(logits: Tensor, text: Sequence[int], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may come next, and how likely each is.

    logits: (vocabulary,) float32. text: the tokens so far. Source of the rules: transformers generation/logits_process.py.
    """
    if sampling.repetition_penalty != 1 or sampling.presence_penalty:
        there = torch.tensor(sorted(set(text)), device=logits.device)
        found = logits[there]
        found = torch.where(found < 0, found * sampling.repetition_penalty, found / sampling.repetition_penalty)
        logits = logits.scatter(0, there, found - sampling.presence_penalty)
    if sampling.temperature == 0:
        return logits.argmax().view(1), logits.new_ones(1)
    logits = (logits - logits.max()) / sampling.temperature
    tokens = torch.arange(logits.shape[0], device=logits.device)
    if 0 < sampling.top_k < logits.shape[0]:
        least = logits.topk(sampling.top_k).values[-1]
        tokens = (logits >= least).nonzero().flatten()
    logits = logits[tokens]
    if sampling.top_p < 1:
        order = logits.argsort()  # the likeliest stands last, and stays
        kept = logits[order].softmax(0).cumsum(0) > 1 - sampling.top_p
        kept[-1] = True
        tokens, logits = tokens[order[kept]], logits[order[kept]]
    shares = logits.softmax(0)
    if sampling.min_p > 0:
        kept = shares >= sampling.min_p * shares.max()
        tokens, shares = tokens[kept], logits[kept].softmax(0)
    return tokens, shares


class Reader:
    """An encoder that remembers what it has read of one text.

    past: keys and values of the beginning of the text, of each layer; they are copied.
    """

    def __init__(self, encoder: GemmaTextEncoder, past: Sequence[KeysValues] = ()) -> None:
        self.encoder = encoder
        self.layers = [GrowingKeysValues() for _ in encoder.model.layers]
        for layer, known in zip(self.layers, past, strict=bool(past)):
            layer.joined(*known)

    def read(self, ids: Sequence[int]) -> Tensor:
        """Logits (vocabulary,) float32 of the token after these, which follow what was read before."""
        for start in range(0, len(ids), PART):
            hidden, _ = self.encoder.read(ids[start : start + PART], self.layers)
        return self.encoder.model.logits(hidden[0, -1])


class GrowingKeysValues:
    """Keys and values of one layer, written in place into memory that grows by blocks of tokens.

    It is handed out whole, since oneDNN would copy a part of it for every product.
    """

    def __init__(self) -> None:
        self.length = 0
        self.memory: KeysValues | None = None

    def room(self, count: int) -> int:
        """As `Past.room`."""
        return math.ceil((self.length + count) / BLOCK) * BLOCK

    def joined(self, keys: Tensor, values: Tensor) -> KeysValues:
        """All of them, after those of the tokens that follow were put behind the others, and zeros up to `room`."""
        room, start = self.room(keys.shape[2]), self.length
        self.length += keys.shape[2]
        memory = self.memory or (None, None)
        self.memory = KeysValues(*(_grown(old, new, room) for old, new in zip(memory, (keys, values), strict=True)))
        for whole, new in zip(self.memory, (keys, values), strict=True):
            whole[:, :, start : self.length] = new
        return self.memory


def _grown(memory: Tensor | None, like: Tensor, room: int) -> Tensor:
    """Memory (B, h, room, d) with what is in it so far; the same as before if it is as large."""
    if memory is not None and memory.shape[2] == room:
        return memory
    batch, heads, _, width = like.shape
    larger = like.new_zeros(batch, heads, room, width)
    if memory is not None:
        larger[:, :, : memory.shape[2]] = memory
    return larger


def _reader(encoder: GemmaTextEncoder, ids: Sequence[int], constant: str | None) -> tuple[Reader, int]:
    """A reader that knows the beginning of a text, and how many of its tokens; the last one is left to be read."""
    if not constant:
        return Reader(encoder), 0
    prefix = encoder.prefix(constant)
    known = min(common_prefix([ids], prefix.ids), len(ids) - 1)
    return Reader(encoder, [layer.first(known) for layer in prefix.keys_values]), known
