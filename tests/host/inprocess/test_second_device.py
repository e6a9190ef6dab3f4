"""What a CPU does not show: where tensors lie, what the host moves, and what becomes of it where memory runs out."""

import gc
import logging
from collections.abc import Callable, Iterator

import comfy.model_management as management
import numpy as np
import pytest
import torch
from torch import Tensor

import sana
from tests.host.boot import Host
from tests.host.card import Card, draw
from tests.host.inprocess.small import AUTOENCODER, EQUAL, PROMPT, TEXT_ENCODER, Small, difference, load, picture
from tests.host.second_device import MEMORY, NAME

BFLOAT16 = 0.005  # of pixels in [0, 1], on average; measured: 0.0005


@pytest.fixture
def room() -> Iterator[None]:
    """Gives the device its capacity back."""
    capacity = MEMORY.capacity
    yield
    MEMORY.capacity = capacity


def parameters(small: Small) -> list[Tensor]:
    parts = (small.model.model, small.clip.cond_stage_model, small.vae.first_stage_model)
    return [parameter for part in parts for parameter in part.parameters()]


@pytest.mark.usefixtures("room")
def test_stand_in_refuses_operands_on_two_devices_and_counts_its_memory() -> None:
    gc.collect()
    before = MEMORY.used
    ours = torch.ones(256, 1024, device=NAME)
    assert MEMORY.used - before == 1 << 20
    view = ours[:, ::2].mul_(3)
    assert view.device.type == NAME and float(ours.sum()) == 2 * 256 * 1024
    assert MEMORY.used - before == 1 << 20
    with pytest.raises(RuntimeError, match="on the CPU"):
        ours + torch.ones(1024)
    MEMORY.capacity = MEMORY.used + 1000
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1001, dtype=torch.uint8, device=NAME)
    del ours
    assert MEMORY.used - before == 1 << 20  # the view is left
    del view
    assert MEMORY.used == before


def test_all_parts_compute_there_and_what_comes_out_is_on_the_cpu(small: Small) -> None:
    assert management.get_torch_device().type == NAME
    latent = small.sample()
    image = small.vae.decode(latent)
    ((text, options),) = small.encode(PROMPT)
    again = small.vae.encode(image)
    assert {part.device.type for part in (latent, image, text, options["attention_mask"], again)} == {"cpu"}
    assert {parameter.device.type for parameter in parameters(small)} == {NAME}
    management.unload_all_models()
    assert {parameter.device.type for parameter in parameters(small)} == {"cpu"}


def test_pictures_of_the_standalone_pipeline_are_those_of_the_cpu() -> None:
    settings = {"steps": 4, "seed": 1, "pag_scale": 1.0}
    start = sana.SanaPipeline.load("demo")("two blue stars", **settings)[0]
    on_device = sana.SanaPipeline.load("demo", dtype=torch.float32, device=NAME)
    (theirs,) = sana.SanaPipeline.load("demo")("a red circle", image=start, strength=0.7, **settings)
    (ours,) = on_device("a red circle", image=start, strength=0.7, **settings)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_picture_in_bfloat16_is_nearly_that_in_float32(small: Small) -> None:
    """The precision that the host chooses on a GPU, for all three parts."""
    images = []
    for dtype in ("fp32", "bf16"):
        model, _, _ = load(small.host, "demo", dtype)
        (clip,) = small.host.call("SanaTextEncoderLoader", text_encoder=TEXT_ENCODER, dtype=dtype)
        (vae,) = small.host.call("DCAELoader", vae=AUTOENCODER, dtype=dtype)
        own = Small(small.host, small.path, model, clip, vae)
        latent = own.sample(latent=own.empty(height=256, width=256), steps=20)
        images.append(vae.decode(latent))
        assert vae.vae_dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    assert 0 < float((images[0] - images[1]).abs().mean()) < BFLOAT16


def cudnn_error(message: str) -> Exception:
    """What cuDNN says when its workspace does not fit."""
    return RuntimeError("GET was unable to find an engine to execute this computation")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError, cudnn_error])  # CUDA has all of them
@pytest.mark.usefixtures("room")
def test_autoencoder_that_runs_out_of_memory_goes_on_in_less(
    small: Small, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Callable[[str], Exception]
) -> None:
    """The host takes what another program holds for free."""
    image = picture(512, 384)
    latent = small.vae.encode(image)
    whole = small.vae.decode(latent)
    monkeypatch.setattr(torch.npu, "mem_get_info", lambda device=None: (8 << 30, 8 << 30))
    monkeypatch.setattr(MEMORY, "error", error)
    MEMORY.capacity = MEMORY.used + (20 << 20)  # the whole takes three times as much
    with caplog.at_level(logging.WARNING):
        assert difference(small.vae.decode(latent), whole) <= EQUAL
        assert difference(small.vae.encode(image), latent) <= EQUAL
    assert any("Out of memory in the autoencoder; going on within" in message for message in caplog.messages)


@pytest.mark.usefixtures("room")
def test_decoding_keeps_to_what_is_free(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    latent = small.vae.encode(picture(512, 384))
    whole = small.vae.decode(latent)
    management.soft_empty_cache()
    MEMORY.capacity, MEMORY.peak = MEMORY.used + (20 << 20), MEMORY.used
    with caplog.at_level(logging.WARNING):
        assert difference(small.vae.decode(latent), whole) <= EQUAL
    assert not caplog.messages and MEMORY.peak <= MEMORY.capacity


@pytest.mark.usefixtures("room")
def test_model_that_does_not_fit_is_left_outside_in_part(small: Small) -> None:
    whole = small.ksampler()
    management.unload_all_models()
    MEMORY.capacity = int(MEMORY.used + management.minimum_inference_memory() + small.model.model_size() / 2)
    assert difference(small.ksampler(), whole) <= EQUAL
    assert small.model.model.model_lowvram
    assert {parameter.device.type for parameter in small.model.model.parameters()} == {"cpu", NAME}
    management.unload_all_models()


def test_memory_of_a_picture_is_measured_part_by_part(small: Small, host: Host) -> None:
    management.unload_all_models()
    files = {"model": small.path.name, "text_encoder": TEXT_ENCODER, "vae": AUTOENCODER, "dtype": "bf16"}
    prompt, negative, steps, decoding = draw(host, Card(real=False), files, side=256, steps=2)
    assert prompt.peak - prompt.before > sum(p.nbytes for p in small.clip.cond_stage_model.parameters())
    assert min(part.peak - part.before for part in (negative, steps, decoding)) > 0
