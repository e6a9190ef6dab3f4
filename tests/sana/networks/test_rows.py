"""Rows that come in bands, through single operations."""

import doctest
import itertools
import random

import pytest
import torch

from sana.networks import rows
from sana.networks.rows import RowCursor, RowOp, Rows, RowStream

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
