"""Gemma-2 as SANA uses it: prompts to hidden states after the final norm, with an instruction before them or without.

Only what is read is computed: attention is causal, so the keys and values of the instruction serve every prompt, and
padding on the right reaches no prompt.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from ..config import TEXT_ENCODER_SOURCE, TEXT_TOKENS
from .gemma import Gemma2, KeysValues, Past
from .prompt import INSTRUCTION, Window, common_prefix, joined, window
from .tokenizers import PAD, Tokenizer

CONTEXT = 8192  # tokens of a text that Gemma-2 was trained with (arXiv 2408.00118, section 3)
PART = 512  # tokens of a long text that are read at once, which bounds the memory for their attention

log = logging.getLogger(__name__)


class TokenCount(NamedTuple):
    used: int  # rows of `text` that count, the beginning-of-sequence token included
    lost: int  # tokens cut off at the end


class Prefix(NamedTuple):
    """What an instruction leaves to the prompts after it."""

    ids: list[int]  # without the last token, which may merge with the prompt's first word
    keys_values: Sequence[KeysValues]  # of each layer, and batch 1
    first: Tensor  # hidden state of the beginning-of-sequence token, (1, 1, C)


class GemmaTextEncoder(nn.Module):
    """Prompts to `text` and `text_mask`; see `forward`."""

    def __init__(self, model: Gemma2, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self._prefixes: dict[str, tuple[object, Prefix]] = {}  # by instruction, with the version of the weights

    @property
    def dtype(self) -> torch.dtype:
        return self.model.compute_dtype or self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def forward(self, prompts: Sequence[str], instruction: str | None = INSTRUCTION) -> tuple[Tensor, Tensor]:
        """Encode prompts as NVlabs/Sana app/sana_pipeline.py does.

        instruction: put before every prompt; the rows of `text` are then the beginning-of-sequence token and the 299 tokens
        from where the prompt begins. None: the first 300 tokens of the prompt alone, which is what a negative prompt needs.
        Returns text (B, 300, C), and text_mask (B, 300) bool, True for tokens that are not padding. Rows of padding are zero
        after an instruction, where no reference reads them. Without one they are the states of padding tokens, which
        guidance with NVlabs' mask convention reads. A longer prompt is cut, and the log says by how much.
        """
        return self.encode(self.tokenize(prompts, instruction), instruction)

    def tokenize(self, prompts: Sequence[str], instruction: str | None = INSTRUCTION) -> list[list[int]]:
        """Token ids of prompts, uncut, each with the instruction before it. Raises ValueError for no prompts, and as `joined`."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts are a list of at least one text, not {prompts!r}")
        return [self.tokenizer.encode(joined(instruction, prompt)) for prompt in prompts]

    def encode(self, ids: list[list[int]], instruction: str | None = INSTRUCTION) -> tuple[Tensor, Tensor]:
        """The same as `forward`, from what `tokenize` returned."""
        kept = self._window(instruction)
        for row in ids:
            if kept.lost(len(row)):
                log.warning("The prompt is too long by %d tokens, which are cut off at its end.", kept.lost(len(row)))
        mask = torch.arange(TEXT_TOKENS) < torch.tensor([[kept.rows(len(row))] for row in ids])
        ids = [row[: kept.stop] for row in ids]
        text = self._after_instruction(ids, instruction, kept) if instruction else self._padded(ids)
        return text, mask.to(self.device)

    def count(self, prompts: Sequence[str], instruction: str | None = INSTRUCTION) -> list[TokenCount]:
        """Tokens used and lost of each prompt. Same arguments as `forward`."""
        ids, kept = self.tokenize(prompts, instruction), self._window(instruction)
        return [TokenCount(kept.rows(len(row)), kept.lost(len(row))) for row in ids]

    def _window(self, instruction: str | None) -> Window:
        return window(len(self.tokenizer.encode(instruction)) if instruction else 0)

    def _after_instruction(self, ids: list[list[int]], instruction: str, kept: Window) -> Tensor:
        prefix = self.prefix(instruction)
        shared = common_prefix(ids, prefix.ids)
        past = [layer.first(shared) for layer in prefix.keys_values]
        hidden, _ = self._run([row[shared:] for row in ids], past)
        rows = hidden[:, kept.start - shared :]
        text = hidden.new_zeros(len(ids), TEXT_TOKENS, hidden.shape[-1])
        text[:, :1] = prefix.first
        lengths = torch.tensor([[len(row) - kept.start] for row in ids], device=hidden.device)
        real = torch.arange(rows.shape[1], device=hidden.device) < lengths
        text[:, 1 : 1 + rows.shape[1]] = rows * real.unsqueeze(-1)
        return text

    def _padded(self, ids: list[list[int]]) -> Tensor:
        """All 300 rows. After the first token alone every padding row is the same, since there is one key to attend to."""
        rows = 2 if max(map(len, ids)) == 1 else TEXT_TOKENS
        hidden, _ = self._run(ids, length=rows)
        return torch.cat([hidden, hidden[:, -1:].expand(-1, TEXT_TOKENS - rows, -1)], dim=1)

    def prefix(self, instruction: str) -> Prefix:
        """The prefix of an instruction. It is kept for as long as the weights do not change, and never while they are trained.

        Raises ValueError for one that is longer than Gemma-2 reads.
        Two are kept, so that prompts can be written and drawn in turn: each begins with an instruction of its own.
        """
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            return self._compute_prefix(instruction)
        version, prefix = self._prefixes.pop(instruction, (None, None))
        if version != self.weights_version():
            prefix = self._compute_prefix(instruction)
            version = self.weights_version()
        others = [(text, kept) for text, kept in self._prefixes.items() if kept[0] == version]
        self._prefixes = {**dict(others[-1:]), instruction: (version, prefix)}  # the last one used stands last
        return prefix

    def _compute_prefix(self, instruction: str) -> Prefix:
        ids = self.tokenizer.encode(instruction)[:-1]
        if len(ids) >= CONTEXT:
            raise ValueError(
                f"the instruction has {len(ids)} tokens, and Gemma-2 reads {CONTEXT} with the prompt; give a shorter one"
            )
        hidden, keys_values = self.read(ids[:PART])
        for start in range(PART, len(ids), PART):
            _, keys_values = self.read(ids[start : start + PART], keys_values)
        return Prefix(ids, keys_values, hidden[:, :1])

    def forget(self) -> None:
        """Drop what is kept of an instruction."""
        self._prefixes = {}

    def weights_version(self) -> object:
        """Changes when a weight is replaced, even by one at its address, moved or written to."""
        return [(WeakIdRef(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.model.parameters()]

    def read(self, ids: Sequence[int], past: Sequence[Past] = ()) -> tuple[Tensor, list[KeysValues]]:
        """Run the token ids of one text after those of `past`, PART of them at most.

        Returns hidden states (1, L, C), and all keys and values. Raises ValueError as `_check`.
        """
        self._check([ids])
        return self.model(torch.tensor([ids], device=self.device), past=past)

    def _check(self, ids: Sequence[Sequence[int]]) -> None:
        """Raises ValueError for an id that the network has no row for, where a GPU would break down for good."""
        largest, rows = max(map(max, ids)), self.model.config.vocab_size
        if largest >= rows:
            raise ValueError(
                f"the tokenizer gives token {largest}, and the text encoder has {rows}; use the tokenizer of "
                f"{TEXT_ENCODER_SOURCE}"
            )

    def _run(self, ids: list[list[int]], past: Sequence[Past] = (), length: int = 0) -> tuple[Tensor, list[KeysValues]]:
        """Run token ids, padded on the right to the longest or to `length`, after those of `past`, whose batch is 1.

        Returns hidden states (B, L, C), and all keys and values. Raises ValueError as `_check`.
        """
        self._check(ids)
        length = max([length, *map(len, ids)])
        tokens = torch.tensor([row + [PAD] * (length - len(row)) for row in ids], device=self.device)
        return self.model(tokens, torch.tensor([len(row) for row in ids], device=self.device), past)
