"""Parts and weights that a class names: what is set, replaced, hidden or deleted is found as in any module."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sana.networks.block import Block
from sana.networks.layers import Build, CrossAttention, LinearAttention, MixFFN
from sana.networks.operations import Operations
from sana.networks.parts import parts, weights
from tests.sana.twins import tiny_config


class Pair(nn.Module):
    first, second = parts(2)
    scale, shift = weights(2)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Identity()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_parameter("shift", None)


def test_what_is_set_is_found_in_its_table() -> None:
    pair = Pair()
    assert pair.first is pair._modules["first"] and isinstance(pair.second, nn.Identity)
    assert pair.scale is pair._parameters["scale"] and pair.shift is None
    assert [name for name, _ in pair.named_children()] == ["first", "second"]
    assert [*pair.state_dict()] == ["scale", "first.weight", "first.bias"]
    for copied in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert copied.first is copied._modules["first"] is not pair.first


def test_what_is_put_in_its_place_is_found() -> None:
    pair, other = Pair(), nn.Linear(2, 3)
    pair.first = other
    assert pair.first is other
    pair._modules["first"] = last = nn.Identity()  # as quantisers do
    assert pair.first is last
    pair.shift = nn.Parameter(torch.ones(2))
    assert pair.shift is pair._parameters["shift"]
    scale = torch.zeros(3)
    found = torch.func.functional_call(Scaled(pair), {"pair.scale": scale}, (torch.ones(3),))
    assert torch.equal(found, scale)


class Scaled(nn.Module):
    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.pair.scale


def test_what_hides_it_goes_first() -> None:
    pair, tensor = Pair(), torch.zeros(3)
    del pair.scale
    pair.scale = tensor  # no parameter, as wrappers that flatten weights leave it
    assert pair.scale is tensor
    layer = Operations.Linear(2, 3, bias=False)
    weight = layer.weight
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert torch.equal(layer.weight, 2 * weight) and torch.equal(layer(torch.eye(2)), 2 * weight.T)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_what_is_not_there_is_named_by_pytorch() -> None:
    pair = Pair()
    del pair.first, pair.scale
    for name in ("first", "scale"):
        assert not hasattr(pair, name)
        with pytest.raises(AttributeError, match=f"'Pair' object has no attribute '{name}'"):
            getattr(pair, name)


@pytest.mark.parametrize("kind", [Block, LinearAttention, CrossAttention, MixFFN])
def test_every_part_of_a_block_is_found_at_once(kind: type) -> None:
    block = Block(tiny_config("sana-1.6b-1024px"), Build())
    module = next(module for module in block.modules() if type(module) is kind)
    assert all(name in vars(kind) for name, _ in module.named_children())
    for layer in (Operations.Linear(2, 3), Operations.Conv2d(2, 3, 1)):
        assert {"weight", "bias"} <= vars(type(layer)).keys()
