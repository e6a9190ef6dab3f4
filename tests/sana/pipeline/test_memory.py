"""Bounds on memory, and what happens where there is less."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sana.networks import autoencoder
from sana.networks.devices import free_bytes
from sana.networks.streaming import least_bytes
from sana.pipeline import SanaPipeline
from tests.sana.models import PROMPTS
from tests.sana.pipeline.drawing import SIZE, STARTS, count_evaluations, drawn, picture, sample


@pytest.mark.parametrize("start", ["noise", "picture"])
def test_too_little_memory_is_refused_before_sampling(pipeline: SanaPipeline, start: str) -> None:
    evaluations = count_evaluations(pipeline)
    with pytest.raises(ValueError, match=r"^max_bytes 1000 is too little for this size; it takes at least \d+$"):
        pipeline(PROMPTS[0], max_bytes=1000, **SIZE, **STARTS[start])
    assert not evaluations


SCARCE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("Invalid buffer size: 32.00 GiB"),
]


class SmallCard:
    """Half of an autoencoder, which raises an error instead of taking more than `enough` bytes."""

    def __init__(self, run: Callable[[Tensor, int | None], Tensor], error: RuntimeError) -> None:
        self.run, self.error, self.enough = run, error, 2**23

    def __call__(self, x: Tensor, max_bytes: int | None = None) -> Tensor:
        if max_bytes is None or max_bytes > self.enough:
            raise self.error
        return self.run(x, max_bytes)


@pytest.mark.parametrize("error", SCARCE, ids=str)
def test_decoding_goes_on_within_less_memory_after_running_out(
    pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: RuntimeError
) -> None:
    latent = sample(pipeline, PROMPTS[0], steps=1)
    expected = np.asarray(pipeline.pictures(latent)[0], np.int16)
    card = SmallCard(pipeline.autoencoder.decode, error)
    monkeypatch.setattr(pipeline.autoencoder, "decode", card)
    assert np.abs(np.asarray(pipeline.pictures(latent)[0], np.int16) - expected).max() <= 1
    assert len(caplog.messages) == 1 and "Out of memory in the autoencoder; going on" in caplog.messages[0]
    card.enough = 0
    with pytest.raises(type(error)) as caught:
        pipeline.pictures(latent)
    assert caught.value is error


@pytest.mark.parametrize("error", SCARCE, ids=str)
def test_encoding_goes_on_within_less_memory_after_running_out(
    pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: RuntimeError
) -> None:
    options = {"image": picture(), "strength": 0.5, "steps": 1}
    expected = sample(pipeline, PROMPTS[0], **options)
    monkeypatch.setattr(pipeline.autoencoder, "encode", SmallCard(pipeline.autoencoder.encode, error))
    torch.testing.assert_close(sample(pipeline, PROMPTS[0], **options), expected, rtol=0, atol=1e-4)
    assert len(caplog.messages) == 1 and "Out of memory in the autoencoder; going on" in caplog.messages[0]


def test_decoding_keeps_to_what_is_free(
    pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without an error that says so: drivers that take memory of the CPU instead raise none."""
    latent = drawn(0)
    expected = np.asarray(pipeline.pictures(latent)[0], np.int16)
    card = SmallCard(pipeline.autoencoder.decode, SCARCE[0])
    card.enough = least_bytes(pipeline.autoencoder.decoder, latent.shape, latent.dtype)
    monkeypatch.setattr(pipeline.autoencoder, "decode", card)
    monkeypatch.setattr(autoencoder, "free_bytes", lambda device: card.enough)
    assert np.abs(np.asarray(pipeline.pictures(latent)[0], np.int16) - expected).max() <= 1
    assert not caplog.messages


def test_free_memory_of_a_gpu_is_what_is_free_or_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    assert free_bytes(torch.device("cuda")) == 4000
    assert free_bytes(torch.device("cpu")) is None


def test_another_error_of_the_autoencoder_is_not_tried_again(
    pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error = RuntimeError("an illegal memory access was encountered")
    monkeypatch.setattr(pipeline.autoencoder, "decode", SmallCard(pipeline.autoencoder.decode, error))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pipeline.pictures(drawn(0))
    assert not caplog.messages
