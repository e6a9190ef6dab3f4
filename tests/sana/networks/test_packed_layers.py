"""Layers with packed weights: what they give, in parts and in 8 bits, and how much memory they take."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.networks import packed_layers
from sana.networks.operations import Operations
from sana.networks.packed import PackedWeight, scaled
from sana.networks.packed_layers import (
    FEW_ROWS,
    VERY_FEW_ROWS,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    int8_product,
    multiply_in_int8,
    put_weight,
)
from tests.sana.measures import peak_bytes, relative_error
from tests.sana.networks.test_packed import packed


def test_a_cast_changes_what_is_given_and_not_what_is_held() -> None:
    layer = PackedLinear(nn.Linear(4, 6), packed()[0])
    before = {name: part.clone() for name, part in layer.weight.parts.items()}
    network = nn.Sequential(copy.deepcopy(layer)).to(torch.bfloat16)
    assert network[0].bias.dtype == torch.bfloat16 and network[0].weight.dtype == torch.bfloat16
    for name, part in network[0].weight.parts.items():
        assert part.dtype == before[name].dtype and torch.equal(part, before[name])


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


# Products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_a_few_rows_are_multiplied_with_a_part_of_the_weight_at_a_time(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sana.networks.packed.CACHED", 4 * rows)
    weight, expected = packed(6, 4)
    sizes = []
    weight.unpack = lambda parts: sizes.append(len(parts["packed"])) or scaled(parts)
    layer = PackedLinear(nn.Linear(4, 6), weight).to(dtype)
    x = torch.randn(2, 5, 4).to(dtype)
    with torch.no_grad():
        found = layer(x)
    assert sizes == [rows] * (6 // rows) and found.dtype == dtype
    torch.testing.assert_close(
        found, F.linear(x, expected.to(dtype), layer.bias), rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5
    )


def test_many_rows_are_multiplied_with_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.networks.packed.CACHED", 4)
    weight, expected = packed(6, 4)
    sizes = []
    weight.unpack = lambda parts: sizes.append(len(parts["packed"])) or scaled(parts)
    layer = PackedLinear(nn.Linear(4, 6, bias=False), weight)
    for count, parts in ((FEW_ROWS, [1] * 6), (FEW_ROWS + 1, [6])):
        x = torch.randn(count, 4)
        sizes.clear()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ expected.T)
        assert sizes == parts
    sizes.clear()
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert sizes == [6]
    torch.testing.assert_close(x.grad, expected.sum(0).expand(2, 4))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scales", [1, 64])
def test_a_token_is_multiplied_with_int8_as_it_is(scales: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not so many tokens, nor numbers that do not begin and end where registers of a CPU do."""
    unpacked, blocks = [], PackedWeight.blocks
    monkeypatch.setattr(PackedWeight, "blocks", lambda self, dtype: unpacked.append(dtype) or blocks(self, dtype))
    for width, count, shift, as_it_is in (
        (96, 1, 0, True),
        (96, VERY_FEW_ROWS, 0, True),
        (96, VERY_FEW_ROWS + 1, 0, False),
        (72, 1, 0, False),
        (96, 1, 1, False),
    ):
        numbers, scale = torch.randint(-127, 128, (64, width), dtype=torch.int8), torch.rand(scales, 1) + 0.5
        weight = PackedWeight("int8", scaled, {"packed": numbers, "scale": scale}, numbers.shape)
        layer = PackedLinear(nn.Linear(width, 64, bias=bias), weight).to(torch.bfloat16)
        x = torch.randn(count * width + shift).bfloat16()[shift:].view(1, count, width)
        unpacked.clear()
        with torch.no_grad():
            found = layer(x)
        assert unpacked == ([] if as_it_is else [torch.bfloat16])
        exact = F.linear(x.double(), numbers * scale.double(), layer.bias.double() if bias else None)
        assert found.shape == (1, count, 64) and relative_error(found, exact) < 4e-3


@pytest.mark.parametrize(("start", "transposed"), [(8, False), (0, True)])
def test_int8_is_unpacked_where_it_or_x_lies_across_registers(
    start: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a file that is mapped into memory, or as columns of something else."""
    monkeypatch.setattr(torch, "_weight_int8pack_mm", None)  # which may end the process then
    numbers = torch.randint(-127, 128, (start + 64 * 96,), dtype=torch.int8)[start:].view(64, 96)
    weight = PackedWeight("int8", scaled, {"packed": numbers, "scale": torch.ones(1, 1)}, numbers.shape)
    layer = PackedLinear(nn.Linear(96, 64, bias=False), weight).to(torch.bfloat16)
    x = torch.randn(96, 3).bfloat16().T if transposed else torch.randn(3, 96).bfloat16()
    with torch.no_grad():
        assert relative_error(layer(x), x.double() @ numbers.T.double()) < 4e-3


@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_nothing_in_gives_nothing(shape: tuple[int, ...], in_int8: bool) -> None:
    layer = PackedLinear(nn.Linear(96, 6), packed(6, 96)[0]).to(torch.bfloat16)
    layer.in_int8 = in_int8
    with torch.no_grad():
        assert layer(torch.randn(*shape, 96).bfloat16()).shape == (*shape, 6)


def test_a_part_has_a_row_at_least_and_the_dtype_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.networks.packed.CACHED", 3)
    weight, expected = packed(6, 4)
    for dtype in (torch.float32, torch.bfloat16):
        blocks = list(weight.to(dtype).blocks())
        assert [block.shape for block in blocks] == [(1, 4)] * 6 and torch.equal(torch.cat(blocks), expected.to(dtype))


def test_only_plain_int8_is_taken_as_it_is() -> None:
    numbers, scale = torch.ones(4, 4, dtype=torch.int8), torch.full((4, 1), 0.5, dtype=torch.float16)
    plain = PackedWeight("int8", scaled, {"packed": numbers, "scale": scale}, (4, 4))
    found, scales = plain.int8()
    assert (
        torch.equal(found, numbers) and torch.equal(scales, torch.full((4, 1), 0.5)) and scales.dtype == torch.float32
    )
    others = [
        PackedWeight("float8", scaled, {"packed": numbers.to(torch.float8_e4m3fn), "scale": scale}, (4, 4)),
        PackedWeight("no scale", scaled, {"packed": numbers}, (4, 4)),
        PackedWeight("rotated", partial(scaled, group=4), {"packed": numbers, "scale": scale}, (4, 4)),
        PackedWeight("convolution", scaled, {"packed": numbers, "scale": scale}, (4, 4, 1, 1)),
        PackedWeight("padded", scaled, {"packed": numbers, "scale": scale}, (4, 4), 4).cut_to(torch.Size((3, 4))),
        plain.copied(),
    ]
    others[-1].changes.append(Doubled())
    assert [weight.int8() for weight in others] == [None] * len(others)


@pytest.mark.parametrize("at_once", [1, 4, 512])
def test_a_product_in_8_bits_is_that_of_rounded_rows(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against whole numbers counted in float64, with rows of very different sizes, one of them zero."""
    monkeypatch.setattr(packed_layers, "FEW_ROWS", at_once)
    numbers, scale = torch.randint(-127, 128, (48, 80), dtype=torch.int8), torch.rand(48, 1) + 0.5
    x = torch.randn(2, 3, 80) * torch.tensor([1e-30, 1.0, 1e30])[:, None]
    x[0, 1] = 0
    bias = torch.randn(48)
    step = x.double().abs().amax(-1, keepdim=True) / 127
    rounded = (x / step.clamp(min=1e-300)).round()
    found = int8_product(x, numbers, scale, None)
    torch.testing.assert_close(found.double(), rounded @ numbers.T.double() * step * scale.T, rtol=1e-5, atol=0)
    assert torch.equal(int8_product(x[0, 1], numbers, scale, bias), bias)
    with_bias = int8_product(x[:, 1].bfloat16(), numbers, scale, bias.bfloat16())
    assert with_bias.dtype == torch.bfloat16 and with_bias.shape == (2, 48)
    exact = F.linear(x[:, 1].double(), numbers * scale.double(), bias.double())
    assert 1e-3 < relative_error(with_bias[1], exact[1]) < 2e-2
    half = x.bfloat16()  # is rounded in float32
    assert torch.equal(
        int8_product(half, numbers, scale, None), int8_product(half.float(), numbers, scale, None).bfloat16()
    )


def test_layers_in_int8_multiply_in_8_bits_when_told() -> None:
    """A layer that is changed, or in another format, or that a gradient is wanted of multiplies as before."""
    plain, changed, other = (PackedLinear(nn.Linear(4, 6), packed()[0]) for _ in range(3))
    other.weight = PackedWeight("int8", scaled, {"packed": other.weight.parts["packed"]}, (6, 4))
    network, x = nn.Sequential(plain, nn.Linear(6, 4), changed, nn.Linear(6, 4), other), torch.randn(700, 4)
    with torch.no_grad():
        exact = [layer(x) for layer in (plain, changed, other)]
        assert multiply_in_int8(network) == (2, 0)
        assert torch.equal(plain(x), int8_product(x, *plain.weight.int8(), plain.bias)) and not torch.equal(
            plain(x), exact[0]
        )
        assert torch.equal(other(x), exact[2])
        changed.weight.changes.append(Doubled())
        torch.testing.assert_close(changed(x), 2 * exact[1] - changed.bias)
        assert multiply_in_int8(network) == (1, 1)
    x.requires_grad = True
    assert torch.equal(plain(x), exact[0])


def test_rows_of_the_smallest_numbers_are_not_lost() -> None:
    """The reciprocal of what is that small is no number any more."""
    numbers, scale = torch.randint(-127, 128, (8, 80), dtype=torch.int8), torch.full((8, 1), 100.0)
    x = torch.randn(3, 80) * 1e-37
    exact = F.linear(x.double(), numbers * scale.double())
    assert relative_error(int8_product(x, numbers, scale, None), exact) < 0.1


@pytest.mark.parametrize("in_int8", [False, True])
def test_autocast_gives_its_own_dtype_however_many_rows_there_are(in_int8: bool) -> None:
    layer = PackedLinear(nn.Linear(4, 6), packed()[0])
    layer.in_int8 = in_int8
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for count in (1, FEW_ROWS, FEW_ROWS + 1):
            x = torch.randn(count, 4)
            assert torch.equal(layer(x), F.linear(x, layer.weight(), layer.bias)) and layer(x).dtype == torch.bfloat16


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


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
    monkeypatch.setattr("sana.networks.packed.CACHED", rows * 4)
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


def test_a_plain_embedding_is_an_output() -> None:
    layer = Operations.Embedding(5, 3)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 1, 3)
    torch.testing.assert_close(layer.project(x), x @ layer.weight.T)
    assert layer.project(x.bfloat16()).dtype == torch.bfloat16
