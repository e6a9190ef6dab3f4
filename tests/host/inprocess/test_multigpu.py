"""Core's MultiGPU CFG Split with our MODEL: the halves of guidance on the stand-in for a GPU and on the CPU, which takes the
place of a second one. The stand-in refuses operands that lie on two devices.
"""

import json
import threading
from dataclasses import replace

import comfy.model_management as management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.weights import randomise
from sana.networks.controlnet import SanaControlNet
from tests.host.inprocess.small import EQUAL, Small, difference, picture
from tests.host.second_device import NAME

Seen = set[tuple[str, str, int]]


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [torch.device(NAME, 0), torch.device("cpu")]
    monkeypatch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: devices)


@pytest.fixture
def seen(small: Small, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Thread, device and batch of every call of a transformer."""
    found: Seen = set()
    kind = small.host.pack("sana.networks.transformer").SanaTransformer
    velocity = kind.velocity

    def look(self: object, x: Tensor, *arguments: object, **options: object) -> Tensor:
        found.add((threading.current_thread().name, x.device.type, len(x)))
        return velocity(self, x, *arguments, **options)

    monkeypatch.setattr(kind, "velocity", look)
    return found


def split(small: Small, model: ModelPatcher) -> ModelPatcher:
    return small.host.call("MultiGPU_WorkUnits", model=model, max_gpus=2)[0]


def check_split(seen: Seen) -> None:
    """One half on each device, each in a thread of its own."""
    assert {(device, size) for _, device, size in seen} == {(NAME, 1), ("cpu", 1)}
    assert len({thread for thread, _, _ in seen}) == len(seen)


@pytest.mark.usefixtures("two_devices")
def test_both_halves_of_guidance_give_the_picture_of_one_device(small: Small, seen: Seen) -> None:
    alone = small.sample(), small.ksampler()
    assert {(device, size) for _, device, size in seen} == {(NAME, 2)}
    seen.clear()
    model = split(small, small.model)
    both = small.sample(model=model), small.ksampler(model=model)
    check_split(seen)
    assert all(difference(a, b) < EQUAL for a, b in zip(alone, both, strict=True))
    assert difference(small.sample(), alone[0]) == 0  # the MODEL before the node is as it was


@pytest.mark.usefixtures("two_devices")
def test_a_lora_is_on_both_devices(small: Small, seen: Seen) -> None:
    name = "transformer_blocks.0.attn1.to_q"
    out, inside = load_file(small.path)[f"{name}.weight"].shape
    generator = torch.Generator().manual_seed(3)
    down, up = (torch.randn(shape, generator=generator) for shape in ((4, inside), (out, 4)))
    folder = small.host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file(
        {f"transformer.{name}.lora_A.weight": down / inside**0.5, f"transformer.{name}.lora_B.weight": up},
        folder / "two.safetensors",
    )
    model = small.host.call("LoraLoaderModelOnly", model=small.model, lora_name="two.safetensors", strength_model=1.0)[
        0
    ]
    alone = small.sample(model=model)
    assert difference(alone, small.sample()) > 100 * EQUAL
    seen.clear()
    assert difference(small.sample(model=split(small, model)), alone) < EQUAL
    check_split(seen)


@pytest.mark.usefixtures("two_devices")
def test_a_controlnet_is_on_both_devices(small: Small, seen: Seen) -> None:
    config = replace(small.pipeline.transformer.config, control_blocks=2)
    folder = small.host.base / "models" / "controlnet"
    save_file(randomise(SanaControlNet(config), seed=5).state_dict(), folder / "two.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_cross_attention_heads": config.cross_heads}))
    control = small.host.call("SanaControlNetLoader", control_net="two.safetensors")[0]
    positive, negative = small.host.call(
        "ControlNetApplyAdvanced",
        **{"positive": small.positive, "negative": small.negative, "control_net": control, "image": picture()},
        **{"strength": 0.7, "start_percent": 0.0, "end_percent": 1.0, "vae": small.vae},
    )
    alone = small.sample(positive=positive, negative=negative)
    assert difference(alone, small.sample()) > 100 * EQUAL
    seen.clear()
    found = small.sample(model=split(small, small.model), positive=positive, negative=negative)
    assert difference(found, alone) < EQUAL
    check_split(seen)
