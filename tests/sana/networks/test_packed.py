"""Weights that stay packed: what they give, and what adds to them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.networks.packed import (
    E2M1,
    PackedWeight,
    nibbles,
    rotated,
    scaled,
)


def packed(rows: int = 6, columns: int = 4, *more: int) -> tuple[PackedWeight, Tensor]:
    """int8 with a scale for each row, and the same unpacked."""
    numbers = torch.randint(-127, 128, (rows, columns, *more), dtype=torch.int8)
    scale = torch.rand(rows, 1) + 0.5
    weight = PackedWeight("int8", scaled, {"packed": numbers.flatten(1), "scale": scale}, numbers.shape)
    return weight, numbers * scale.reshape(rows, *(1 for _ in numbers.shape[1:]))


def test_a_packed_weight_has_the_shape_and_the_numbers_of_its_tensor() -> None:
    weight, expected = packed(6, 4, 3, 3)
    assert (weight.shape, weight.ndim, weight.numel()) == (expected.shape, 4, expected.numel())
    assert torch.equal(weight(), expected)
    assert torch.equal(weight.flatten(1)(), expected.flatten(1))
    assert weight(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(weight(torch.bfloat16), expected.bfloat16())


def test_rows_are_cut_with_their_scales() -> None:
    weight, expected = packed(6, 4)
    parts = weight.tensor_split(3)
    assert [part.shape for part in parts] == [(2, 4)] * 3 and all(isinstance(part, PackedWeight) for part in parts)
    assert torch.equal(torch.cat([part() for part in parts]), expected)


def test_one_scale_belongs_to_every_part() -> None:
    numbers = torch.randint(-127, 128, (4, 3), dtype=torch.int8)
    weight = PackedWeight("int8", scaled, {"packed": numbers, "scale": torch.full((1, 1), 0.5)}, numbers.shape)
    assert torch.equal(weight.tensor_split(2)[1](), numbers[2:] * 0.5)
    assert torch.equal(weight.rows(torch.tensor([3, 0])), numbers[[3, 0]] * 0.5)


@pytest.mark.parametrize("index", [torch.tensor(3), torch.tensor([5, 0, 5]), torch.tensor([[1, 2], [0, 1]])])
def test_rows_are_looked_up_as_in_an_embedding(index: Tensor) -> None:
    weight, expected = packed()
    assert torch.equal(weight.rows(index), F.embedding(index, expected))
    assert weight.half().rows(index).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_cut_and_looked_up(dtype: torch.dtype) -> None:
    numbers = torch.randn(4, 3).to(dtype)
    weight = PackedWeight("float8", scaled, {"packed": numbers}, numbers.shape)
    assert torch.equal(weight.rows(torch.tensor([2])), numbers[2:3].float())
    assert torch.equal(weight.tensor_split(2)[0](), numbers[:2].float())


def test_padding_is_cut_away() -> None:
    numbers = torch.arange(16, dtype=torch.int8).view(4, 4)
    weight = PackedWeight("int8", scaled, {"packed": numbers}, numbers.shape, multiple=4)
    assert [weight.fits(torch.Size(shape)) for shape in [(4, 4), (3, 1), (5, 4), (4, 5), (4,)]] == [True, True] + 3 * [
        False
    ]
    assert torch.equal(weight.cut_to(torch.Size([3, 2]))(), numbers[:3, :2].float())
    assert torch.equal(weight.rows(torch.tensor([2, 0])), numbers[[2, 0], :2].float())


def test_without_padding_only_the_own_shape_fits() -> None:
    weight, _ = packed()
    assert weight.fits(torch.Size([6, 4])) and not weight.fits(torch.Size([6, 3]))


def test_of_two_numbers_in_a_byte_the_higher_half_comes_first_unless_told() -> None:
    byte = torch.tensor([[0x1F, 0x72]], dtype=torch.uint8)
    assert nibbles(byte, E2M1).tolist() == [[0.5, -6.0, 6.0, 1.0]]
    assert nibbles(byte, E2M1, low_first=True).tolist() == [[-6.0, 0.5, 1.0, 6.0]]


@pytest.mark.parametrize("group", [4, 16, 64])
def test_a_rotation_undoes_itself_and_keeps_lengths(group: int) -> None:
    weight = torch.randn(3, 2 * group, dtype=torch.float32)
    turned = rotated(weight, group)
    torch.testing.assert_close(rotated(turned, group), weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned.norm(), weight.norm())
    assert (turned - weight).abs().max() > 0.1


def test_changes_are_added_at_every_unpacking_and_leave_what_is_held() -> None:
    weight, expected = packed()

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))

        def forward(self, numbers: Tensor) -> Tensor:
            return numbers + (self.up @ self.down).to(numbers)

    change = LowRank()
    weight.changes.append(change)
    with torch.no_grad():
        changed = expected + change.up @ change.down
        for _ in range(2):
            torch.testing.assert_close(weight(), changed)
        torch.testing.assert_close(weight.rows(torch.tensor([4])), changed[4:5])
    change.up.grad = None
    weight().sum().backward()
    assert change.up.grad is not None
