"""Memory that is freed inside a bound leaves the process, and only there."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sana.networks import allocator, autoencoder
from sana.networks.autoencoder import DCAutoencoder, decode_within_memory
from sana.networks.streaming import least_bytes
from tests.sana.twins import randomise, tiny_autoencoder_config

ROOT = Path(allocator.__file__).parents[2]
PIECES, PIECE = 40, 2**21  # larger than the bounded threshold, smaller than the usual one
# Bytes that stay resident of pieces that are freed beside the one allocated last, within and outside.
FREED = f"""
import torch
from sana.networks.allocator import giving_back

def resident_bytes():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

def left_behind():
    before = resident_bytes()
    pieces = [torch.ones({PIECE}, dtype=torch.uint8) for _ in range({PIECES})]
    del pieces[:-1]
    return resident_bytes() - before - {PIECE}

with giving_back():
    within = left_behind()
print(within, left_behind())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is resident")
def test_freed_memory_goes_back_within_and_is_kept_outside() -> None:
    """In a process whose heap has no gaps, which pieces would fill."""
    found = subprocess.run([sys.executable, "-c", FREED], cwd=ROOT, check=True, capture_output=True, text=True)
    within, outside = map(int, found.stdout.split())
    assert within < PIECES * PIECE / 10 and outside > PIECES * PIECE / 2


@pytest.mark.parametrize("name", [*allocator.CHOSEN, None])
def test_what_the_environment_tells_the_allocator_is_left_alone(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator, "_set_thresholds", lambda libc, size: told.append(size))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=None, malloc_trim=lambda pad: 1))
    if name is not None:
        monkeypatch.setenv(name, "131072")
    with allocator.giving_back():
        assert told == ([] if name else [allocator.BOUNDED])
    assert told == ([] if name else [allocator.BOUNDED, allocator.USUAL])


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("platform", "darwin"), ("platform", "linux")):
        monkeypatch.setattr(sys, name, value)
        monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
        with allocator.giving_back():
            pass


@torch.no_grad()
def test_a_bound_on_a_cpu_is_one_on_resident_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomise(DCAutoencoder(tiny_autoencoder_config("dc-ae-f32c32-sana-1.1", depth=1)))
    latent, entered = torch.randn(1, network.config.latent_channels, 2, 2), []
    real = allocator.giving_back
    monkeypatch.setattr(autoencoder, "giving_back", lambda: entered.append(True) or real())
    whole = decode_within_memory(network, latent)
    assert not entered
    bound = least_bytes(network.decoder, latent.shape, torch.float32)
    torch.testing.assert_close(decode_within_memory(network, latent, bound), whole, rtol=1e-4, atol=1e-4)
    assert entered == [True]
