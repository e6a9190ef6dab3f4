"""A block of the transformer, and how a time modulates it (AdaLN-single)."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import TransformerConfig
from .layers import Attention, Build, CrossAttention, LinearAttention, MixFFN, scaled_dot_product
from .parts import parts

NORM_EPS = 1e-6

SelfAttention = Callable[[LinearAttention, Tensor], Tensor]  # (layer, x (B, N, D)) -> (B, N, D)


class AdaLN(NamedTuple):
    """Shift, 1 + scale, and gate of one residual branch, each (D,) for all samples or (B, 1, D)."""

    shift: Tensor
    factor: Tensor
    gate: Tensor

    def norm(self, x: Tensor) -> Tensor:
        return modulated_norm(x, self.shift, self.factor)

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return torch.addcmul(x, self.gate, update)


class BlockInputs(NamedTuple):
    """What a block is given beside its tokens, in the order in which it takes them."""

    columns: int  # W of the latent; the tokens are rows of so many
    modulation: Tensor  # (B, 6, D), or (1, 6, D) for all samples: rows of this block, see `block_modulation`
    text: tuple[Tensor, Tensor]  # keys and values, each (B, h, L, d)
    mask: Tensor | None  # as in `TextContext`
    attention: Attention = scaled_dot_product  # to the text
    self_attention: SelfAttention | None = None  # in the place of the block's own; None: that one


def branches(modulation: Tensor) -> tuple[AdaLN, AdaLN]:
    """AdaLN of self-attention and of the Mix-FFN of a block, from its rows (B, 6, D)."""
    rows = sample_rows(modulation)
    return AdaLN(*rows[:3]), AdaLN(*rows[3:])


def sample_rows(rows: Tensor) -> tuple[Tensor, ...]:
    """The n rows of (B, n, D), each as (B, 1, D); as (D,) if they are for all samples."""
    return rows.squeeze(0).unbind(0) if rows.shape[0] == 1 else rows.unsqueeze(2).unbind(1)


class Block(nn.Module):
    """Linear self-attention and Mix-FFN, modulated by time, around an unmodulated cross-attention (AdaLN-single)."""

    attn1, attn2, ff = parts(3)

    def __init__(self, config: TransformerConfig, build: Build) -> None:
        super().__init__()
        self.scale_shift_table = build.parameter(6, config.hidden_size)
        self.attn1 = LinearAttention(config.hidden_size, config.qk_norm, build)
        self.attn2 = CrossAttention(config.hidden_size, config.cross_heads, config.qk_norm, build)
        self.ff = MixFFN(config.hidden_size, config.ff_width, build)

    def forward(
        self,
        x: Tensor,
        columns: int,
        modulation: Tensor,
        text: tuple[Tensor, Tensor],
        mask: Tensor | None,
        attention: Attention = scaled_dot_product,
        self_attention: SelfAttention | None = None,
    ) -> Tensor:
        """x: (B, N, D), N = H * columns. The others: see `BlockInputs`. Returns (B, N, D)."""
        attn, ff = branches(modulation)
        attend = self.attn1 if self_attention is None else partial(self_attention, self.attn1)
        x = attn.add(x, attend(attn.norm(x)))
        x = x + self.attn2(x, *text, mask, attention)
        return ff.add(x, self.ff(ff.norm(x), columns))

    def forward_banded(
        self,
        x: Tensor,
        columns: int,
        modulation: Tensor,
        text: tuple[Tensor, Tensor],
        mask: Tensor | None,
        attention: Attention = scaled_dot_product,
        self_attention: SelfAttention | None = None,
        *,
        band: int,
    ) -> None:
        """The same as `forward`, without gradients, in x itself, `band` rows of the image at a time.

        Linear attention is a sum over tokens, so its bands add up; the convolution of the Mix-FFN needs one row more on
        either side, which is computed twice. self_attention: must treat every token by itself, as it sees single bands.
        """
        attn, ff = branches(modulation)
        bands = x.split(band * columns, dim=1)
        if self_attention is not None:
            attend = partial(self_attention, self.attn1)
        else:
            precision = torch.promote_types(x.dtype, torch.float32)  # many bands added up in 16 bits would drift
            state = sum(self.attn1.state(attn.norm(part)).to(precision) for part in bands)
            attend = partial(self.attn1.attend, state=state)
        for part in bands:
            part.copy_(attn.add(part, attend(attn.norm(part))))
            part.add_(self.attn2(part, *text, mask, attention))

        grid = x.unflatten(1, (-1, columns))  # (B, H, W, D)
        above = grid[:, :0]  # the row above the band, as it was before the band above was overwritten
        for start in range(0, grid.shape[1], band):
            own = grid[:, start : start + band]
            rows = torch.cat([above, grid[:, start : start + band + 1]], dim=1)
            kept = slice(above.shape[1], above.shape[1] + own.shape[1])
            above = own[:, -1:].clone()
            update = self.ff(ff.norm(rows.flatten(1, 2)), columns, kept)
            own.copy_(ff.add(own.flatten(1, 2), update).view_as(own))


def block_modulation(blocks: Iterable[Block], time: Tensor) -> Tensor:
    """Of every block the rows for a time (B, 6, D): shift, 1 + scale, and gate, of self-attention and of the Mix-FFN.

    Returns (blocks, B, 6, D).
    """
    rows = torch.stack([block.scale_shift_table.to(time) for block in blocks]).unsqueeze(1) + time
    rows[:, :, 1::3].add_(1)  # `+=` would copy the sums to where they are
    return rows


def modulated_norm(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """Layer norm of x (B, N, D) without weights of its own, then times factor, plus shift: each (D,) or (B, 1, D)."""
    if shift.dim() == 1:
        return torch.layer_norm(x, shift.shape, factor, shift, NORM_EPS)
    return torch.addcmul(shift, torch.layer_norm(x, x.shape[-1:], eps=NORM_EPS), factor)
