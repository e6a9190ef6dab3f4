"""The linear diffusion transformer of SANA: a noisy latent, a time and a text go in, a velocity comes out.

It knows no schedule, no guidance and no file. What depends on the text alone (`TextContext`) or on the time alone
(`Modulation`) can be computed once and handed to `velocity`; `forward` computes everything.
"""

import sys
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config import TransformerConfig
from .block import Block, BlockInputs, block_modulation, modulated_norm, sample_rows
from .layers import Build, LinearAttention, SinusoidEmbedding, TextProjection
from .operations import Operations

WORKING_BYTES = 2**30  # default bound on the memory of activations; larger images are processed in bands of rows

Control = Callable[[Tensor], Sequence[Tensor | None]]  # tokens (B, N, D) -> corrections, each (B, N, D) or none


class TextContext(NamedTuple):
    """What the transformer needs of a text: keys and values for every block, of the tokens that count."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]  # per block, each (B, h, L, d)
    mask: Tensor | None  # (B, 1, 1, L) bool, True where a token counts; None: all of them do


class Modulation(NamedTuple):
    """What the transformer needs of a time. One of batch 1 holds for every sample."""

    time: Tensor  # (B, 6, D), to which every block adds its table; a ControlNet starts from it
    blocks: Tensor  # (depth, B, 6, D), see `block_modulation`
    out: Tensor  # (B, 2, D): shift and 1 + scale before the output

    def at(self, i: int) -> "Modulation":
        """That of sample i alone, in memory of its own, whose strides do not depend on the others: a compiler looks at them."""
        return Modulation(self.time[i : i + 1], self.blocks[:, i : i + 1].clone(), self.out[i : i + 1])


RunBlock = Callable[[int, Tensor, BlockInputs, int | None], Tensor]  # as `SanaTransformer.run_block`


class TimeEmbedding(nn.Module):
    """Time, and for Sprint the guidance scale, to the modulation of all blocks."""

    def __init__(self, config: TransformerConfig, build: Build) -> None:
        super().__init__()
        if config.guidance_embed:
            self.timestep_embedder = SinusoidEmbedding(config.hidden_size, build)
            self.guidance_embedder = SinusoidEmbedding(config.hidden_size, build)
        else:
            self.emb = nn.Module()
            self.emb.timestep_embedder = SinusoidEmbedding(config.hidden_size, build)
        self.linear = build.linear(config.hidden_size, 6 * config.hidden_size)

    def forward(self, timestep: Tensor, guidance_embed: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """timestep and guidance_embed: (B,). Returns what blocks add to their tables, (B, 6, D), and the output, (B, D)."""
        if guidance_embed is None:
            time = self.emb.timestep_embedder(timestep, dtype)
        else:
            time = self.timestep_embedder(timestep, dtype) + self.guidance_embedder(guidance_embed, dtype)
        return self.linear(F.silu(time)).unflatten(-1, (6, -1)), time


class SanaTransformer(nn.Module):
    """The network that SANA samples from (NVlabs/Sana diffusion/model/nets/sana_multi_scale.py, SanaMS and SanaMSCM)."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        operations: type | ModuleType = Operations,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        build = Build(operations, dtype, device)
        self.config = config
        self.recompute = False  # in training: activations of blocks in the backward pass, instead of keeping them
        self.patch_embed = nn.Module()
        self.patch_embed.proj = build.linear(config.channels, config.hidden_size)
        self.time_embed = TimeEmbedding(config, build)
        self.caption_projection = TextProjection(config.text_width, config.hidden_size, build)
        self.caption_norm = build.rms_norm(config.hidden_size, eps=1e-5)
        self.transformer_blocks = nn.ModuleList(Block(config, build) for _ in range(config.depth))
        self.scale_shift_table = build.parameter(2, config.hidden_size)
        self.proj_out = build.linear(config.hidden_size, config.channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.scale_shift_table.dtype

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        guidance_embed: Tensor | None = None,
        *,
        max_bytes: int = WORKING_BYTES,
    ) -> Tensor:
        """Velocity, noise - clean, at x.

        x: (B, 32, H, W). timestep: (B,), 1000 * sigma in [0, 1000]; Sprint: sigma in [0, 1]. text: (B, L, text_width).
        text_mask: (B, L) bool, True where a token counts; None: all do. guidance_embed: (B,), for Sprint only and
        required there, 0.1 times the guidance scale. max_bytes: bound on the memory of activations, see `velocity`.
        Returns (B, 32, H, W) in the dtype of x. Raises ValueError if guidance_embed does not fit the network.
        """
        modulation = self.modulation(timestep, guidance_embed)
        context = self.text_context(text.to(self.dtype), text_mask)
        return self.velocity(x.to(self.dtype), modulation, context, max_bytes=max_bytes).to(x.dtype)

    def modulation(
        self, timestep: Tensor, guidance_embed: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Modulation:
        """timestep and guidance_embed: (B,), as for `forward`. dtype: of the activations; None: that of the weights."""
        if (guidance_embed is None) == self.config.guidance_embed:
            expected = "needs a guidance_embed" if self.config.guidance_embed else "takes no guidance_embed"
            raise ValueError(f"this SANA transformer {expected}; only Sprint checkpoints have a guidance embedding")
        if not self.config.continuous_time:
            # Trained on integers (NVlabs/Sana sana_multi_scale.py, `timestep.long()`): without this, pictures drift.
            timestep = timestep.floor()
        time, last = self.time_embed(timestep, guidance_embed, dtype or self.dtype)
        out = self.scale_shift_table.to(last) + last.unsqueeze(1)
        out[:, 1].add_(1)
        return Modulation(time, block_modulation(self.transformer_blocks, time), out)

    def text_context(self, text: Tensor, text_mask: Tensor | None = None) -> TextContext:
        """text: (B, L, text_width) in the dtype of the activations; text_mask: (B, L) bool. Masked tokens are dropped."""
        text, mask = compact_text(text, text_mask)
        projected = self.caption_norm(self.caption_projection(text))
        pairs = (block.attn2.keys_values(projected) for block in self.transformer_blocks)
        keys_values = tuple((open_length(keys, 2), open_length(values, 2)) for keys, values in pairs)
        return TextContext(keys_values, None if mask is None else open_length(mask, 3))

    def velocity(
        self,
        x: Tensor,
        modulation: Modulation,
        context: TextContext,
        *,
        identity_blocks: Collection[int] = (),
        control: Control | None = None,
        max_bytes: int = WORKING_BYTES,
        run_block: RunBlock | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """x: (B, 32, H, W) in the dtype of the activations. Returns (B, 32, H, W).

        identity_blocks: blocks whose self-attention is the identity (perturbed-attention guidance).
        control: is given the tokens (B, N, D) after the first block; the i-th tensor that it returns is added to those
        after block i.
        max_bytes: activations larger than this are processed in bands of rows, when no gradient is wanted. The result is
        the same; one row at a time is the smallest band.
        run_block: is called for every block in the place of `self.run_block`, which it may call in turn.
        positions: what `self.positions` gives for x, if it is there already.
        """
        run_block = run_block or self.run_block
        band = None if torch.is_grad_enabled() else self.band_rows(x.shape, x.element_size(), max_bytes)
        tokens = self.embed(x, positions)
        corrections: Sequence[Tensor | None] = ()
        for i, (rows, text) in enumerate(zip(modulation.blocks.unbind(0), context.keys_values, strict=True)):
            self_attention = LinearAttention.identity if i in identity_blocks else None
            inputs = BlockInputs(x.shape[-1], rows, text, context.mask, self_attention=self_attention)
            tokens = run_block(i, tokens, inputs, band)
            if control is not None and i == 0:
                corrections = control(tokens)
            if i < len(corrections) and corrections[i] is not None:
                tokens = tokens + corrections[i]
        return self.unembed(tokens, modulation, x.shape)

    def run_block(self, i: int, tokens: Tensor, inputs: BlockInputs, band: int | None = None) -> Tensor:
        """Tokens (B, N, D) after block i, of those before it. The only place that calls a block of the transformer.

        band: rows to process at a time, within the given tokens, which then hold the result; None: all at once, and the
        given tokens stay as they are.
        """
        block = self.transformer_blocks[i]
        if band is not None:
            block.forward_banded(tokens, *inputs, band=band)
            return tokens
        if torch.is_grad_enabled() and self.recompute:
            return checkpoint(block, tokens, *inputs, use_reentrant=False)
        return block(tokens, *inputs)

    def embed(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Latent (B, 32, H, W) to tokens (B, H * W, D). positions: as for `velocity`."""
        tokens = self.patch_embed.proj(x.flatten(2).transpose(1, 2).contiguous())
        positions = self.positions(x) if positions is None else positions
        return tokens if positions is None else tokens + positions.to(tokens)

    def positions(self, x: Tensor) -> Tensor | None:
        """What is added to the tokens of a latent x (B, 32, H, W) in the dtype of the activations: (H * W, D); None: nothing."""
        if self.config.position_base is None:
            return None
        return position_table(x.shape[-2], x.shape[-1], self.config, x.dtype, x.device)

    def unembed(self, tokens: Tensor, modulation: Modulation, shape: torch.Size) -> Tensor:
        """Tokens (B, H * W, D) to a velocity of the given shape (B, 32, H, W)."""
        out = self.proj_out(modulated_norm(tokens, *sample_rows(modulation.out)))
        return out.transpose(1, 2).reshape(shape)

    def band_rows(self, shape: torch.Size, element_size: int, max_bytes: int) -> int | None:
        """Rows of a latent of this shape to process at a time; None: all at once fit into max_bytes."""
        batch, _, rows, columns = shape
        row_bytes = batch * columns * self.config.hidden_size * element_size
        if self._live_widths * rows * row_bytes <= max_bytes:
            return None
        # Beside the bands, all tokens exist once and are copied once; a band needs a row more on either side.
        return max(1, int((max_bytes / row_bytes - 2 * rows) / self._live_widths) - 2)

    def activation_bytes(self, shape: torch.Size, element_size: int, max_bytes: int = WORKING_BYTES) -> int:
        """Memory of activations for a latent of this shape, within max_bytes as far as bands allow."""
        batch, _, rows, columns = shape
        row_bytes = batch * columns * self.config.hidden_size * element_size
        band = self.band_rows(shape, element_size, max_bytes)
        return int(
            row_bytes * (self._live_widths * rows if band is None else 2 * rows + self._live_widths * (band + 2))
        )

    @property
    def _live_widths(self) -> float:
        """Activations alive at the peak, in the Mix-FFN, in multiples of the tokens."""
        return 4 + 4 * self.config.ff_width / self.config.hidden_size


def open_length(tensor: Tensor, dim: int) -> Tensor:
    """Tell torch.compile that this length varies, so that another prompt is no reason to compile again."""
    # The compiler's import takes a second, and who compiles has imported it. It refuses marks within what it compiles.
    compiler = None if torch.compiler.is_compiling() else sys.modules.get("torch._dynamo")
    if compiler is not None:
        compiler.maybe_mark_dynamic(tensor, dim)
    return tensor


def compact_text(text: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Drop the tokens that count for no prompt, which changes nothing: cross-attention knows no positions.

    text: (B, L, C); text_mask: (B, L) bool. Returns text (B, L', C), tokens that count first, and a mask (B, 1, 1, L'),
    None if all count. A prompt without any counting token attends to all, as with the additive mask of the references.
    """
    if text_mask is None:
        return text, None
    text_mask = text_mask.bool() | ~text_mask.bool().any(dim=1, keepdim=True)
    counts = text_mask.sum(dim=1)
    longest, shortest = int(counts.max()), int(counts.min())
    order = text_mask.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    text = text.gather(1, order.unsqueeze(-1).expand(-1, -1, text.shape[-1]))
    if longest == shortest:
        return text, None
    return text, text_mask.gather(1, order)[:, None, None, :]


def position_table(
    rows: int,
    columns: int,
    config: TransformerConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sines and cosines of the column (first half of the channels) and of the row (second half): (H * W, D) in dtype.

    The grid is stretched to position_base, whatever the size (NVlabs/Sana sana.py, get_2d_sincos_pos_embed). Waves are cast
    and moved before they are spread over the grid, which is as large as the tokens.
    """
    quarter = config.hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def waves(count: int) -> Tensor:
        scale = torch.tensor(count / config.position_base, dtype=torch.float32)
        coordinates = torch.arange(count, dtype=torch.float32) / scale / config.position_interpolation
        angles = coordinates.double()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1).float().to(device, dtype)  # (count, D / 2)

    across, down = waves(columns), waves(rows)
    across, down = across[None].expand(rows, -1, -1), down[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)
