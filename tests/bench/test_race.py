"""The timing of the benchmark: alternating calls, compared results, honest numbers."""

import pytest
import torch

from bench.cases import all_cases
from bench.race import Floor, count_flops, peak_memory, race, spread
from sana.networks.operations import Operations
from sana.networks.packed import PackedWeight, scaled
from sana.networks.packed_layers import by_parts, int8_product


def test_calls_alternate_and_are_counted() -> None:
    order = []

    def call(name: str):
        def run() -> torch.Tensor:
            order.append(name)
            return torch.ones(3)

        return run

    found = race({"a": call("a"), "b": call("b")}, repeats=3, tolerance=1e-5)
    assert order == ["a", "b"] * 4
    assert found["b"].error == 0 and found["b"].seconds > 0


def test_wrong_answer_is_an_error() -> None:
    calls = {"right": lambda: torch.ones(3), "wrong": lambda: torch.ones(3) * 1.01}
    with pytest.raises(ArithmeticError, match="wrong differs by"):
        race(calls, repeats=1, tolerance=1e-3)


def test_nan_is_an_error() -> None:
    with pytest.raises(ArithmeticError):
        race({"right": lambda: torch.ones(3), "nan": lambda: torch.full((3,), float("nan"))}, 1, 1e-3)


def test_peak_counts_what_is_held_at_once() -> None:
    _, held = peak_memory(lambda: torch.ones(1000, 1000) + torch.ones(1000, 1000))
    assert 12e6 <= held < 12.1e6


def test_spread_is_the_middle_half() -> None:
    assert spread([1.0]) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx(2 / 3)


def test_flops_of_a_product() -> None:
    assert count_flops(lambda: torch.ones(4, 5) @ torch.ones(5, 6)) == 2 * 4 * 5 * 6
    with torch.no_grad():
        assert count_flops(lambda: Operations.Linear(5, 6)(torch.ones(2, 4, 5))) == 2 * 8 * 5 * 6
    numbers, x = torch.ones(64, 32, dtype=torch.int8), torch.ones(2, 4, 32)
    assert count_flops(lambda: int8_product(x, numbers, torch.ones(64, 1), None)) == 2 * 8 * 32 * 64
    weight = PackedWeight("int8", scaled, {"packed": numbers, "scale": torch.ones(64, 1)}, (64, 32))
    assert count_flops(lambda: by_parts(x.bfloat16(), weight)) == 2 * 8 * 32 * 64


def test_floor_is_positive() -> None:
    floor = Floor.measure(torch.float32, "cpu")
    assert floor.flops_per_second > 1e9 and floor.bytes_per_second > 1e8


def test_cases_have_titles_of_their_own() -> None:
    titles = [case.title for case in all_cases(2)]
    assert len(titles) == len(set(titles))
    assert all(case.flops > 0 and case.weights > 0 for case in all_cases(2))
