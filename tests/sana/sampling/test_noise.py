"""Noise: what a seed means."""

import pytest
import torch

from sana.sampling.noise import noise_source

SHAPE = (4, 3, 5)


def test_picture_k_of_a_batch_gets_what_its_seed_alone_gives() -> None:
    """At every draw: Sprint draws once a step."""
    draw, alone = noise_source(SHAPE, range(7, 10)), [noise_source(SHAPE, [seed]) for seed in (7, 8, 9)]
    for _ in range(3):
        batch = draw()
        assert batch.shape == (3, *SHAPE) and batch.dtype == torch.float32
        assert torch.equal(batch, torch.cat([source() for source in alone]))


def test_noise_is_that_of_a_generator_of_pytorch_and_goes_on() -> None:
    draw, generator = noise_source(SHAPE, [5]), torch.Generator().manual_seed(5)
    first, second = draw(), draw()
    assert torch.equal(first, torch.randn((1, *SHAPE), generator=generator))
    assert torch.equal(second, torch.randn((1, *SHAPE), generator=generator))
    assert not torch.equal(first, second)


def test_the_seed_of_the_caller_is_left_alone() -> None:
    state = torch.get_rng_state()
    noise_source(SHAPE, [0, 1])()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_seeds_of_64_bits_are_taken(seed: int) -> None:
    assert bool(noise_source(SHAPE, [seed])().isfinite().all())


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"^seed {seed} does not fit into 64 bits; use a smaller one$"):
        noise_source(SHAPE, [0, seed])
