"""Gemma-2 (arXiv 2408.00118): token ids to hidden states, and from there to logits of the next token.

Attribute names are those of Hugging Face files. Layers with weights come from `operations`, as in `layers.py`. Keys and
values go in and out, so that a run can go on from where another one ended.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import GemmaConfig
from ..networks.layers import Build, merge_heads, split_heads
from ..networks.operations import Operations

FLOAT32_BYTES = 4


class KeysValues(NamedTuple):
    """Of one layer, for the tokens so far, each (B, h, L, d)."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def room(self, count: int) -> int:
        """As `Past.room`: no more than is needed."""
        return self.length + count

    def first(self, length: int) -> "KeysValues":
        """Those of the first tokens."""
        return KeysValues(*(part[:, :, :length] for part in self))

    def joined(self, keys: Tensor, values: Tensor) -> "KeysValues":
        """With those of the tokens that follow, whose batch may be larger if this one is 1."""
        pairs = zip(self, (keys, values), strict=True)
        return KeysValues(*(torch.cat([old.expand(new.shape[0], -1, -1, -1), new], dim=2) for old, new in pairs))


class Past(Protocol):
    """What a layer remembers: `KeysValues`, or what keeps them elsewhere."""

    @property
    def length(self) -> int: ...

    def room(self, count: int) -> int:
        """How many keys `joined` gives when so many tokens follow: theirs come last, but for memory that is zero yet."""

    def joined(self, keys: Tensor, values: Tensor) -> KeysValues: ...


class Gemma2(nn.Module):
    """Token ids to hidden states after the final norm; see `forward`."""

    def __init__(
        self,
        config: GemmaConfig,
        *,
        operations: type | ModuleType = Operations,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """dtype, device: of the weights. compute_dtype: of the activations, for operations that cast their weights;
        None: the dtype of the embedding."""
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embedding_device: torch.device | None = None  # where the embedding is; None: where all is
        build = Build(operations, dtype, device)
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(GemmaLayer(config, i % 2 == 0, build) for i in range(config.num_hidden_layers))
        self.norm = GemmaNorm(config, build)

    def forward(
        self, tokens: Tensor, lengths: Tensor | None = None, past: Sequence[Past] = ()
    ) -> tuple[Tensor, list[KeysValues]]:
        """Run tokens (B, L) that follow those of `past`, whose batch is B or 1.

        lengths: (B,), tokens of each row before its padding, which nothing attends to; None: all.
        Returns hidden states (B, L, C), and the keys and values of `past` and of these tokens, for each layer.
        """
        count, offset = tokens.shape[1], past[0].length if past else 0
        keys = torch.arange(past[0].room(count) if past else count, device=tokens.device)
        queries = keys[offset : offset + count]
        distance = queries[:, None] - keys
        unseen = distance < 0  # (queries, keys), or with lengths (B, queries, keys)
        if lengths is not None:
            unseen = unseen | (keys >= offset + lengths[:, None, None])
        far = unseen | (distance >= self.config.sliding_window)

        x = self.embed_tokens(tokens if self.embedding_device is None else tokens.to(self.embedding_device))
        x = x.to(tokens.device, self.compute_dtype or x.dtype)
        x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)  # the reference rounds it too
        rotation = rotary(queries, self.config, x.dtype)
        keys_values = []
        for i, layer in enumerate(self.layers):
            x, pair = layer(x, rotation, far if layer.sliding else unseen, past[i] if past else None)
            keys_values.append(pair)
        return self.norm(x), keys_values

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the token after each hidden state (..., C): (..., vocab_size) float32, soft-capped, where the embedding is."""
        cap = self.config.final_logit_softcapping
        hidden = hidden if self.embedding_device is None else hidden.to(self.embedding_device)
        return torch.tanh(self.embed_tokens.project(hidden).float() / cap) * cap

    def activation_bytes(self, batch: int, tokens: int, past: int, itemsize: int) -> int:
        """About what `forward` takes for (batch, tokens) after `past` tokens of batch 1, with its keys and values."""
        config, keys = self.config, past + tokens
        key_width = 2 * config.num_key_value_heads * config.head_dim
        kept = config.num_hidden_layers * key_width * (batch * keys + past) * itemsize
        hidden = batch * tokens * config.hidden_size * (3 * itemsize + 2 * FLOAT32_BYTES)
        logits = batch * config.num_attention_heads * tokens * keys * (itemsize + 3 * FLOAT32_BYTES)
        inner = 4 * batch * tokens * config.intermediate_size * itemsize
        return kept + hidden + max(logits, inner)


class GemmaLayer(nn.Module):
    """Attention and gated feed-forward, each between two norms. sliding: attention reaches `sliding_window` tokens back."""

    def __init__(self, config: GemmaConfig, sliding: bool, build: Build) -> None:
        super().__init__()
        self.sliding = sliding
        self.self_attn = GemmaAttention(config, build)
        self.mlp = GemmaFeedForward(config, build)
        self.input_layernorm = GemmaNorm(config, build)
        self.post_attention_layernorm = GemmaNorm(config, build)
        self.pre_feedforward_layernorm = GemmaNorm(config, build)
        self.post_feedforward_layernorm = GemmaNorm(config, build)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], unseen: Tensor, past: Past | None
    ) -> tuple[Tensor, KeysValues]:
        attended, keys_values = self.self_attn(self.input_layernorm(x), rotation, unseen, past)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), keys_values


class GemmaAttention(nn.Module):
    """Attention with rotary positions and soft-capped logits, in which groups of query heads share keys and values."""

    def __init__(self, config: GemmaConfig, build: Build) -> None:
        super().__init__()
        self.config = config
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = build.linear(config.hidden_size, queries, bias=False)
        self.k_proj = build.linear(config.hidden_size, keys, bias=False)
        self.v_proj = build.linear(config.hidden_size, keys, bias=False)
        self.o_proj = build.linear(queries, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], unseen: Tensor, past: Past | None
    ) -> tuple[Tensor, KeysValues]:
        """x: (B, L, C). unseen: (L, keys) or (B, L, keys), True where a token does not attend to."""
        width, shared_heads = self.config.head_dim, self.config.num_key_value_heads
        q = rotate(split_heads(self.q_proj(x), width), rotation)
        k = rotate(split_heads(self.k_proj(x), width), rotation)
        v = split_heads(self.v_proj(x), width)
        known = KeysValues(k, v) if past is None else past.joined(k, v)
        # The query heads of a group stand below one another, so that their keys need no copies.
        q = q.unflatten(1, (shared_heads, -1))  # (B, h, group, L, d)
        logits = q.flatten(2, 3) @ known.keys.mT * self.config.query_pre_attn_scalar**-0.5
        cap = self.config.attn_logit_softcapping
        logits = (torch.tanh(logits / cap) * cap).float().unflatten(2, q.shape[2:4])
        unseen = unseen if unseen.ndim == 2 else unseen[:, None, None]
        logits = logits.masked_fill(unseen, torch.finfo(torch.float32).min)
        weights = logits.softmax(dim=-1).to(v.dtype)
        out = (weights.flatten(2, 3) @ known.values).unflatten(2, q.shape[2:4]).flatten(1, 2)
        return self.o_proj(merge_heads(out)), known


class GemmaFeedForward(nn.Module):
    def __init__(self, config: GemmaConfig, build: Build) -> None:
        super().__init__()
        self.gate_proj = build.linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = build.linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = build.linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaNorm(nn.Module):
    """RMS norm in float32 that multiplies by one more than its weight, wherever a host has left that."""

    def __init__(self, config: GemmaConfig, build: Build) -> None:
        super().__init__()
        self.weight = build.parameter(config.hidden_size)
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        gain = 1.0 + self.weight.to(x.device, torch.float32)
        return F.rms_norm(x.float(), gain.shape, gain, self.eps).to(x.dtype)


def rotary(positions: Tensor, config: GemmaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (arXiv 2104.09864), each (L, d / 2)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    angles = positions[:, None] * config.rope_theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel k with channel d / 2 + k by the angles of each position. x: (B, h, L, d)."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
