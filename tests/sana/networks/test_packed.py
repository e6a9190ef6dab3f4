"""Weights that stay packed: what they give, what they hold, and how much memory using them takes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.networks.operations import Operations
from sana.networks.packed import (
    E2M1,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
    nibbles,
    put_weight,
    rotated,
    scaled,
)
from tests.sana.measures import peak_bytes


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


def test_a_cast_changes_what_is_given_and_not_what_is_held() -> None:
    layer = PackedLinear(nn.Linear(4, 6), packed()[0])
    before = {name: part.clone() for name, part in layer.weight.parts.items()}
    network = nn.Sequential(copy.deepcopy(layer)).to(torch.bfloat16)
    assert network[0].bias.dtype == torch.bfloat16 and network[0].weight.dtype == torch.bfloat16
    for name, part in network[0].weight.parts.items():
        assert part.dtype == before[name].dtype and torch.equal(part, before[name])


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


# Layers


def test_layers_compute_with_the_unpacked_weight() -> None:
    network = nn.Module()
    network.linear, network.plain = nn.Linear(4, 6), Operations.Linear(4, 6, bias=False)
    network.conv, network.embedding = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Embedding(6, 4)
    x, image, tokens = torch.randn(2, 3, 4), torch.randn(2, 6, 5, 4), torch.tensor([[5, 0], [1, 1]])
    expected, bias = {}, network.linear.bias
    for name, more in (("linear", (4,)), ("plain", (4,)), ("conv", (1, 3, 3)), ("embedding", (4,))):
        weight, expected[name] = packed(6, *more)
        put_weight(network, f"{name}.weight", weight)
    assert [type(layer) for layer in network.children()] == 2 * [PackedLinear] + [PackedConv2d, PackedEmbedding]
    with torch.no_grad():
        torch.testing.assert_close(network.linear(x), F.linear(x, expected["linear"], bias))
        torch.testing.assert_close(network.plain(x), F.linear(x, expected["plain"]))
        kernel = F.conv2d(image, expected["conv"], network.conv.bias, padding=1, groups=6)
        torch.testing.assert_close(network.conv(image), kernel)
        assert torch.equal(network.embedding(tokens), F.embedding(tokens, expected["embedding"]))


def test_a_layer_in_a_list_is_replaced_in_its_place() -> None:
    network = nn.ModuleDict({"to_out": nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6)])})
    put_weight(network, "to_out.0.weight", packed()[0])
    assert [type(layer) for layer in network["to_out"]] == [PackedLinear, nn.Linear]


def test_what_has_no_packed_form_is_refused() -> None:
    network = nn.ModuleDict({"norm": nn.LayerNorm(4), "linear": nn.Linear(4, 4)})
    for name in ("norm.weight", "linear.bias"):
        with pytest.raises(ValueError, match=f"^{name} is not the weight of a layer that takes a packed one$"):
            put_weight(network, name, packed()[0])


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


# Memory


def test_a_network_holds_packed_bytes_and_unpacks_one_layer_at_a_time() -> None:
    """Ten layers of 1 MiB each in bytes, 4 MiB in float32: while they run, no more than one is unpacked."""
    width, layers = 1024, 10
    network = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    for i in range(layers):
        numbers = torch.zeros(width, width, dtype=torch.int8)
        weight = PackedWeight("int8", scaled, {"packed": numbers, "scale": torch.ones(1, 1)}, numbers.shape)
        put_weight(network, f"{i}.weight", weight)
    held = sum(part.nbytes for part in [*network.parameters(), *network.buffers()])
    assert held == layers * (width * width + 4)
    x = torch.zeros(1, width)
    with torch.no_grad():
        _, peak = peak_bytes(lambda: network(x))
    assert 4 * width * width <= peak < 1.1 * 4 * width * width


def test_an_embedding_unpacks_the_rows_that_are_asked_for() -> None:
    numbers = torch.zeros(100_000, 64, dtype=torch.int8)
    layer = PackedEmbedding(nn.Embedding(1, 1), PackedWeight("int8", scaled, {"packed": numbers}, numbers.shape))
    _, peak = peak_bytes(lambda: layer(torch.zeros(1, 10, dtype=torch.long)))
    assert peak < 20_000


@pytest.mark.parametrize("rows", [1, 4, 6, 4096])
@pytest.mark.parametrize("kind", ["rows", "changed", "across rows", "padded"])
def test_an_embedding_is_an_output_some_rows_at_a_time(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.networks.packed.ROWS", rows)
    weight, expected = packed(8, 4)
    if kind == "changed":
        weight.changes.append(Doubled())
        expected = expected * 2
    if kind == "across rows":
        weight = PackedWeight("fp32", lambda parts: parts["packed"].clone(), {"packed": expected.view(2, -1)}, (8, 4))
    if kind == "padded":
        weight.multiple = 4
        weight, expected = weight.cut_to(torch.Size((6, 3))), expected[:6, :3]
    network = nn.ModuleDict({"embed": nn.Embedding(*expected.shape)})
    put_weight(network, "embed.weight", weight)
    x = torch.randn(2, 1, expected.shape[1])
    blocks = [len(block) for block in weight.blocks()]
    whole = len(expected)
    cut = kind in ("rows", "padded")
    assert blocks == ([min(rows, whole - start) for start in range(0, whole, rows)] if cut else [whole])
    torch.testing.assert_close(network["embed"].project(x), x @ expected.T)
    half = network.bfloat16()["embed"].project(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), x @ expected.T, rtol=0.1, atol=2)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_plain_embedding_is_an_output() -> None:
    layer = Operations.Embedding(5, 3)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 1, 3)
    torch.testing.assert_close(layer.project(x), x @ layer.weight.T)
    assert layer.project(x.bfloat16()).dtype == torch.bfloat16
