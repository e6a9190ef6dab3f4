"""Fixtures of the tests of `sana`."""

import pytest
import torch
from torch import Tensor

from tests.sana.twins import diffusers_transformer, randomise, tiny_config


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def diffusers() -> dict[str, Tensor]:
    """A transformer in diffusers' names, three blocks."""
    torch.manual_seed(0)
    return dict(randomise(diffusers_transformer(tiny_config("sana-0.6b-1024px"))).state_dict())
