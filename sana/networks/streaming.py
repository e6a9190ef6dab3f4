"""A DC-AE in bounded memory: the same image or latent, a few rows at a time.

Everything in the networks of `autoencoder_layers.py` either looks at nearby rows (convolutions, norms) or, in linear
attention, at a sum over all positions. So a network is a series of sweeps over the rows of a feature map. Each sweep
applies one attention, whose sum the sweep before has formed, then everything up to the next one, whose sum it forms.
Only the maps between sweeps are whole, and they are small, because only the deepest stages have attention. No tile is
blended, nothing is approximated.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import HEAD_WIDTH
from . import autoencoder_layers as layers
from .rows import RowOp, RowStream, heights, passes

LIBRARY_BYTES = 2**21  # left for what libraries take inside an operation
# Kernels of some libraries end at tensors of 2^31 numbers. Within this many in all, beside each there is another one.
MOST_NUMBERS = 2**32
# Rows at a time, at least. One would take hardly less memory than two, but weights are read, and some copied, for each band;
# and what bands share is computed for each, most of it in a long stretch of operations, of more than LONG.
LEAST_ROWS, LEAST_ROWS_OF_LONG, LONG = 2, 6, 5
WHOLE_MAPS_FROM = 3  # decoder stages from this index on are shallow enough in pixels to keep their map between sweeps


@dataclass(frozen=True)
class Sweep:
    """One pass over the rows of a map: an attention to apply, row operations, and an attention whose sum to form."""

    applied: layers.MultiscaleLinearAttention | None
    ops: tuple[RowOp, ...]
    summed: layers.MultiscaleLinearAttention | None = None

    def chain(self, state: Tensor | None, itemsize: int) -> tuple[RowOp, ...]:
        """All row operations; state: of the applied attention."""
        return self.ops if self.applied is None else (self.applied.attention_op(state, itemsize), *self.ops)

    @property
    def in_place(self) -> bool:
        """Whether the result can replace the input, which it never overtakes."""
        same_size = all(op.up == op.down for op in self.ops)
        return self.applied is not None and same_size and self.ops[-1].outputs == self.applied.to_q.in_features


class Map(NamedTuple):
    """Sizes of a feature map."""

    rows: int
    columns: int

    def after(self, ops: tuple[RowOp, ...]) -> "Map":
        rows, columns = self
        for op in ops:
            rows, columns = rows * op.up // op.down, columns * op.up // op.down
        return Map(rows, columns)


class Stretch(NamedTuple):
    """A sweep with the map it starts from."""

    sweep: Sweep
    size: Map
    maps: int  # numbers in the whole maps it needs

    @property
    def least_rows(self) -> int:
        """The fewest rows that are processed at a time."""
        return min(LEAST_ROWS_OF_LONG if len(self.sweep.ops) > LONG else LEAST_ROWS, self.size.rows)

    def bytes_with(self, band: int, itemsize: int) -> int:
        """Working memory of the sweep, `band` rows at a time."""
        return LIBRARY_BYTES + itemsize * (self.maps + working_numbers(self.sweep, self.size, band, itemsize))


def stream(network: layers.Encoder | layers.Decoder, x: Tensor, dtype: torch.dtype, max_bytes: int) -> Tensor:
    """`network(x)` in dtype, for x (B, C, H, W), with max_bytes of memory beyond x, the result and the weights.

    Images of a batch are processed one by one. The result has the dtype of x.
    Raises ValueError if max_bytes is less than processing a few rows at a time takes.
    """
    check_bound(network, x.shape, dtype, max_bytes)
    route = stretches(network, x.shape, dtype)
    bound = min(max_bytes, dtype.itemsize * MOST_NUMBERS)
    bands = [fitting_band(stretch, dtype.itemsize, bound) for stretch in route]
    last = route[-1]
    out = x.new_empty(len(x), last.sweep.ops[-1].outputs, *last.size.after(last.sweep.ops))
    for i in range(len(x)):
        part, state = x[i : i + 1], None
        for stretch, band in zip(route, bands, strict=True):
            target = out[i : i + 1] if stretch is last else None
            part, state = run(stretch.sweep, part, state, band, dtype, target)
    return out


def least_bytes(network: layers.Encoder | layers.Decoder, shape: torch.Size, dtype: torch.dtype) -> int:
    """The smallest max_bytes that works for an input of this shape (B, C, H, W)."""
    return max(each.bytes_with(each.least_rows, dtype.itemsize) for each in stretches(network, shape, dtype))


def check_bound(
    network: layers.Encoder | layers.Decoder, shape: torch.Size, dtype: torch.dtype, max_bytes: int
) -> None:
    """Raises ValueError if max_bytes is too little for an input of this shape (B, C, H, W)."""
    needed = least_bytes(network, shape, dtype)
    if needed > max_bytes:
        raise ValueError(f"max_bytes {max_bytes} is too little for this size; it takes at least {needed}")


def suitable_bound(
    network: layers.Encoder | layers.Decoder, shape: torch.Size, dtype: torch.dtype, free: int | None = None
) -> int | None:
    """max_bytes for an input of this shape (B, C, H, W); None: all at once.

    free: bytes that may be taken; None: not known. An input with tensors of 2^31 numbers is never processed at once.
    """
    most = dtype.itemsize * MOST_NUMBERS
    bound = most if free is None else min(free, most)
    if whole_bytes(network, shape, dtype) <= bound:
        return None
    return max(bound, least_bytes(network, shape, dtype))


def smaller_bound(
    network: layers.Encoder | layers.Decoder, shape: torch.Size, dtype: torch.dtype, max_bytes: int | None
) -> int | None:
    """Half of max_bytes, or of what it all takes, to try again after running out of memory; None: there is no less."""
    taken, least = max_bytes or whole_bytes(network, shape, dtype), least_bytes(network, shape, dtype)
    return max(least, taken // 2) if taken > least else None


def whole_bytes(network: layers.Encoder | layers.Decoder, shape: torch.Size, dtype: torch.dtype) -> int:
    """About what one image of a batch of this shape (B, C, H, W) takes at once, without bands."""
    return max(stretch.bytes_with(stretch.size.rows, dtype.itemsize) for stretch in stretches(network, shape, dtype))


def run(
    sweep: Sweep, x: Tensor, state: Tensor | None, band: int, dtype: torch.dtype, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """One sweep over x (1, C, H, W), `band` rows at a time, with the state of its applied attention.

    out: where the result goes; None: into x if that is possible, else into a new map.
    Returns the result, and the state of the summed attention.
    """
    ops, rows, total = sweep.chain(state, dtype.itemsize), x.shape[2], None
    size, last = Map(*x.shape[2:]).after(ops), len(ops) - 1
    if sweep.summed is not None:
        ops = (*ops, sweep.summed.projection_op(dtype.itemsize))
    streams = [RowStream(op, rows) for op, rows in zip(ops, heights(ops, rows), strict=True)]
    waiting: list[Tensor | None] = [x, *(None for _ in ops[1:])]  # rows for each operation
    filled = 0
    for index, _, count, left in passes(ops, rows, band):
        part = waiting[index][:, :, :count]
        waiting[index] = waiting[index][:, :, count:] if left else None
        if index == 0:
            part = part.to(dtype, memory_format=torch.channels_last)
        part = streams[index].push(part)
        if part is None:
            continue
        if index > last:
            more = sweep.summed.state(part.permute(0, 2, 3, 1).unflatten(-1, (-1, 3 * HEAD_WIDTH)))
            total = more if total is None else total + more
            continue
        if index + 1 < len(ops):
            waiting[index + 1] = part
        if index == last:
            if out is None:
                out = x if sweep.in_place else part.new_empty(1, *size, part.shape[1]).permute(0, 3, 1, 2)
            out[:, :, filled : filled + part.shape[2]] = part
            filled += part.shape[2]
    return out, total


def stretches(network: layers.Encoder | layers.Decoder, shape: torch.Size, dtype: torch.dtype) -> list[Stretch]:
    """The sweeps over an input of this shape (B, C, H, W)."""
    sweeps, size = plan(network, dtype.itemsize), Map(*shape[2:])
    route = []
    for i, sweep in enumerate(sweeps):
        after = size.after(sweep.ops)
        maps = 0 if i == 0 else sweep.chain(None, dtype.itemsize)[0].inputs * size.rows * size.columns
        if i < len(sweeps) - 1 and not sweep.in_place:
            maps += sweep.ops[-1].outputs * after.rows * after.columns
        route.append(Stretch(sweep, size, maps))
        size = after
    return route


def fitting_band(stretch: Stretch, itemsize: int, max_bytes: int) -> int:
    """The most rows at a time that keep a sweep within max_bytes, or the fewest."""
    bands = even_bands(stretch.size.rows)
    return next((band for band in bands if stretch.bytes_with(band, itemsize) <= max_bytes), stretch.least_rows)


def even_bands(rows: int) -> list[int]:
    """Sizes of 1, 2, 3, ... bands that cover the rows evenly, largest first."""
    return sorted({-(-rows // count) for count in range(1, rows + 1)}, reverse=True)


def working_numbers(sweep: Sweep, size: Map, band: int, itemsize: int) -> int:
    """Numbers alive at the peak of a sweep over a map of this size, `band` rows at a time, beside its whole maps."""
    ops = sweep.chain(None, itemsize)
    if sweep.summed is not None:
        ops = (*ops, sweep.summed.projection_op(itemsize))
    sizes = [size]
    for op in ops:
        sizes.append(sizes[-1].after((op,)))
    held, made, waiting, peak = [0] * len(ops), [0] * (len(ops) + 1), [0] * len(ops), 0.0
    for index, step, count, left in passes(ops, size.rows, band):
        op, columns = ops[index], sizes[index].columns
        arriving = made[index] if index else op.inputs * count * columns
        held[index] = op.inputs * columns * step.held.count
        waiting[index] = made[index] if left else 0
        here = (op.inputs * step.window.count + op.live * step.used.count) * columns + op.fixed
        peak = max(peak, sum(held) + sum(waiting[:index]) + arriving + here)
        made[index + 1] = op.outputs * sizes[index + 1].columns * step.made.count
    return int(peak)


def plan(network: layers.Encoder | layers.Decoder, itemsize: int) -> list[Sweep]:
    """The sweeps of a network; itemsize: bytes of its numbers."""
    sweeps = [Sweep(None, ())]
    for part in _encoder_parts(network) if isinstance(network, layers.Encoder) else _decoder_parts(network):
        if isinstance(part, layers.EfficientViTBlock):
            sweeps[-1] = replace(sweeps[-1], summed=part.attn)
            sweeps.append(Sweep(part.attn, (part.conv_out.row_op(),)))
        elif part is None:
            sweeps.append(Sweep(None, ()))
        else:
            op = part if isinstance(part, RowOp) else layers.row_op(part)
            sweeps[-1] = replace(sweeps[-1], ops=(*sweeps[-1].ops, op))
    return [sweep for sweep in sweeps if sweep.ops]


def _encoder_parts(network: layers.Encoder) -> Iterator[nn.Module | RowOp]:
    yield network.conv_in
    for stage in network.down_blocks:
        yield from stage
    yield network.head_op()


def _decoder_parts(network: layers.Decoder) -> Iterator[nn.Module | RowOp | None]:
    """None: a place to keep the whole map, which spares later bands the rows that deep convolutions share."""
    yield network.stem_op()
    for i, stage in reversed(list(enumerate(network.up_blocks))):
        yield from stage
        if i >= WHOLE_MAPS_FROM and not any(isinstance(block, layers.EfficientViTBlock) for block in stage):
            yield None
    yield network.head_op()
