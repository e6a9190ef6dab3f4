"""Rows that come in bands, through single operations."""

import doctest
import itertools
import random

import pytest
import torch

from sana.networks import rows
from sana.networks.rows import RowCursor, RowOp, Rows, RowStream, heights, passes

OPS = {
    "3x3": RowOp(torch.nn.Conv2d(4, 4, 3, padding=1), 4, 4, 1),
    "5x5": RowOp(torch.nn.Conv2d(4, 4, 5, padding=2), 4, 4, 2),
    "1x1": RowOp(torch.nn.Conv2d(4, 4, 1), 4, 4, 0),
    "down": RowOp(torch.nn.Conv2d(4, 4, 3, padding=1, stride=2), 4, 4, 1, down=2),
    "up": RowOp(torch.nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1), 4, 4, 1, up=2),
}


def test_worked_example_is_true() -> None:
    found = doctest.testmod(rows)
    assert found.attempted >= 5 and not found.failed


@pytest.mark.parametrize("bands", [(1,) * 12, (5, 7), (2, 4, 6), (12,), (4, 4, 4)])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@torch.no_grad()
def test_rows_that_come_in_bands_give_the_rows_of_the_whole(op: RowOp, bands: tuple[int, ...]) -> None:
    x = torch.randn(1, 4, 12, 6)
    stream = RowStream(op, 12)
    parts = [stream.push(rows) for rows in x.split(bands, dim=2)]
    streamed = torch.cat([part for part in parts if part is not None], dim=2)
    torch.testing.assert_close(streamed, op.apply(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (1, 4)])
def test_rows_are_given_as_soon_and_held_as_short_as_can_be(up: int, down: int, radius: int) -> None:
    """By the definition: an output group depends on the whole groups that its own group and the radius around it touch."""
    op, draw = RowOp(torch.nn.Identity(), 1, 1, radius, up, down), random.Random(0)
    for total in (4, 8, 24):
        reach = [
            {row // down for row in range(max(0, first - radius), min(total, first + down + radius))}
            for first in range(0, total, down)
        ]
        cursor, arrived, before = RowCursor(op, total), 0, 0
        while arrived < total:
            count = draw.randint(1, total - arrived)
            step, arrived = cursor.advance(count), arrived + count
            whole = {*range(arrived // down)}
            complete = len([*itertools.takewhile(whole.issuperset, reach)])
            assert step.given == Rows(before * up, complete * up) and cursor.complete == Rows(0, complete * up)
            assert step.window.count == step.used.count + arrived % down and step.window.stop == arrived
            assert step.made.start * down == step.used.start * up and step.made.stop * down == step.used.stop * up
            assert step.held == cursor.held and step.held.stop == arrived
            if arrived < total:
                assert step.held.start == min(reach[complete]) * down
            before = complete
        assert before == total // down


def test_heights_are_those_of_the_inputs() -> None:
    assert heights([OPS[name] for name in ("3x3", "up", "up", "down", "5x5")], 12) == [12, 12, 24, 48, 24]
    assert heights([OPS["down"]], 12) == [12]


@pytest.mark.parametrize("band", [1, 2, 3, 5, 12, 24])
@pytest.mark.parametrize("names", [("3x3",), ("5x5", "up", "3x3", "up", "5x5"), ("5x5", "down", "5x5", "down", "3x3")])
@torch.no_grad()
def test_rows_pass_through_a_chain_in_bands_to_its_very_end(names: tuple[str, ...], band: int) -> None:
    """What operations give is theirs as a whole; none takes more than its share of a band, and later ones come first."""
    ops, x = [OPS[name] for name in names], torch.randn(1, 4, 24, 8)
    sizes = heights(ops, 24)
    streams, waiting = [RowStream(op, size) for op, size in zip(ops, sizes, strict=True)], [x] + [None] * len(ops)
    parts, taken = [], [0] * len(ops)
    for index, step, count, left in passes(ops, 24, band):
        assert 0 < count <= -(-band * sizes[index] // 24)
        assert count == min(-(-band * sizes[index] // 24), waiting[index].shape[2])  # as much as there is
        assert all(rows is None for rows in waiting[index + 1 :])
        rows, rest = waiting[index].split([count, left], dim=2)
        waiting[index], taken[index] = rest if left else None, taken[index] + count
        given = streams[index].push(rows)
        assert step.given.count == (0 if given is None else given.shape[2])
        if index + 1 < len(ops):
            waiting[index + 1] = given
        elif given is not None:
            parts.append(given)
    assert taken == sizes
    for op in ops:
        x = op.apply(x)
    torch.testing.assert_close(torch.cat(parts, dim=2), x, rtol=1e-5, atol=1e-5)
