"""Rows of a feature map that come a few at a time, through operations whose output rows depend on nearby input rows.

This module knows rows only. The layers in `autoencoder_layers.py` say which operations they are, and `streaming.py`
makes a network of them and of attention, which looks at all rows.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class RowOp(NamedTuple):
    """A part of a network whose output rows depend on nearby input rows only. Tensors are (1, C, rows, W).

    Every group of `down` input rows becomes a group of `up` output rows; at least one of the two numbers is 1.
    """

    apply: Callable[[Tensor], Tensor]
    inputs: int  # channels
    outputs: int
    radius: int  # input rows that an output group needs on either side of its own group
    up: int = 1
    down: int = 1
    live: float = 0.0  # numbers alive at the peak inside apply, beside its input, per input pixel
    fixed: int = 0  # numbers alive then, whatever the input


class Rows(NamedTuple):
    """The rows of a map from `start` to the one before `stop`, counted from the top of the map."""

    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    def within(self, others: "Rows") -> slice:
        """Where these rows are in a tensor of `others`."""
        return slice(self.start - others.start, self.stop - others.start)


class Advance(NamedTuple):
    """What a RowOp has to do when rows of its input arrive."""

    window: Rows  # input rows at hand: the held ones and the new ones
    used: Rows  # the whole groups among them, to which the operation is applied
    made: Rows  # output rows that it makes of these; those at the ends may be wrong
    given: Rows  # output rows among them that are right and were not given before
    held: Rows  # input rows at hand to keep


class RowCursor:
    """Where a RowOp is in an input of `rows` rows, in two intervals.

    `held` are the input rows that arrived and are still needed; they start with a group.
    `complete` are the output rows that were given. All input rows they depend on have arrived, in whole groups.

    Example: a convolution of stride 2 (groups of 2 input rows become 1 output row, radius 1) over 12 rows.

    >>> op = RowOp(torch.nn.Conv2d(1, 1, 3, stride=2, padding=1), inputs=1, outputs=1, radius=1, down=2)
    >>> cursor = RowCursor(op, rows=12)

    Of rows 0 to 4, groups 0 and 1 are whole. Output row 0 is complete. Output row 1 is not: it may depend on row 4,
    whose group is not whole. It may depend on row 1 too, so group 0 is still held.

    >>> cursor.advance(5).given, cursor.complete, cursor.held
    (Rows(start=0, stop=1), Rows(start=0, stop=1), Rows(start=0, stop=5))

    With rows 5 to 8, groups 0 to 3 are whole. Output row 3 has to wait for row 8 and its group. It may depend on row 5,
    so what is held starts with group 2.

    >>> cursor.advance(4)  # doctest: +NORMALIZE_WHITESPACE
    Advance(window=Rows(start=0, stop=9), used=Rows(start=0, stop=8), made=Rows(start=0, stop=4),
            given=Rows(start=1, stop=3), held=Rows(start=4, stop=9))

    Rows 9 to 11 are the last. The padding below them is that of the whole image, so that all output rows are complete.

    >>> cursor.advance(3)  # doctest: +NORMALIZE_WHITESPACE
    Advance(window=Rows(start=4, stop=12), used=Rows(start=4, stop=12), made=Rows(start=2, stop=6),
            given=Rows(start=3, stop=6), held=Rows(start=10, stop=12))
    """

    def __init__(self, op: RowOp, rows: int) -> None:
        self.op = op
        self.rows = rows
        self.held = self.complete = Rows(0, 0)

    def advance(self, count: int) -> Advance:
        """The next `count` rows of the input arrive."""
        down, up, radius = self.op.down, self.op.up, self.op.radius
        window, before = Rows(self.held.start, self.held.stop + count), self.complete
        whole = window.stop // down  # groups that are whole, of all that have arrived
        if window.stop == self.rows:
            complete = whole
        else:  # the groups that lie `radius` rows or more above the end of the last whole one
            complete = max(0, whole * down - radius) // down
        needed = max(0, complete * down - radius) // down  # the first group that the next output rows depend on
        self.held, self.complete = Rows(needed * down, window.stop), Rows(0, complete * up)
        used, made = Rows(window.start, whole * down), Rows(window.start // down * up, whole * up)
        return Advance(window, used, made, Rows(before.stop, self.complete.stop), self.held)


class RowStream:
    """Takes the rows of an input as they come, and gives the rows of a RowOp's output that they complete."""

    def __init__(self, op: RowOp, rows: int) -> None:
        self.cursor = RowCursor(op, rows)
        self.held: Tensor | None = None

    def push(self, rows: Tensor) -> Tensor | None:
        """The next input rows. Returns the next output rows, or None if none is complete yet."""
        step = self.cursor.advance(rows.shape[2])
        x = rows if self.held is None else torch.cat([self.held, rows], dim=2)
        self.held = x[:, :, step.held.within(step.window)].clone()
        if not step.given.count:
            return None
        return self.cursor.op.apply(x[:, :, step.used.within(step.window)])[:, :, step.given.within(step.made)]


def heights(ops: Sequence[RowOp], rows: int) -> list[int]:
    """Rows of the input of each operation of a chain, the first of which has an input of `rows` rows."""
    return [*accumulate(ops[:-1], lambda size, op: size * op.up // op.down, initial=rows)]


class Pass(NamedTuple):
    """An operation of a chain takes rows."""

    index: int  # of the operation
    step: Advance
    count: int  # rows taken
    waiting: int  # rows that the operation before it has given, beside those


def passes(ops: Sequence[RowOp], rows: int, band: int) -> Iterator[Pass]:
    """In which order an input of `rows` rows passes through a chain of operations, `band` input rows at a time.

    Rows that an operation gives go on to the end of the chain before any come after them. What it gives at the end of the
    input, when nothing more has to be waited for, may be many bands: they go on one by one, too.
    """
    sizes = heights(ops, rows)
    cursors = [RowCursor(op, size) for op, size in zip(ops, sizes, strict=True)]
    waiting = [rows] + [0] * len(ops)
    while any(waiting[: len(ops)]):
        index = max(k for k in range(len(ops)) if waiting[k])
        count = min(waiting[index], -(-band * sizes[index] // rows))
        waiting[index] -= count
        step = cursors[index].advance(count)
        waiting[index + 1] = step.given.count
        yield Pass(index, step, count, waiting[index])
