"""Files of weights that the host maps itself: its own storages reach the networks, and nothing writes into them."""

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import comfy.sd
import pytest
import torch
from comfy.utils import _TYPES
from torch import Tensor

from tests.host.boot import Host
from tests.host.inprocess.small import PROMPT, Small, load

PLACE = "_comfy_tensor_file_slice"  # the attribute by which the host knows a storage


def mapped(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `comfy.utils.load_safetensors` does, by a part that comes with a GPU: read-only memory, so that a write ends the test."""
    with open(path, "rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        low, high = entry["data_offsets"]
        tensor = torch.frombuffer(content[start + low : start + high], dtype=_TYPES[entry["dtype"]]).view(
            entry["shape"]
        )
        setattr(tensor.untyped_storage(), PLACE, high - low)
        tensors[name] = tensor
    return tensors, metadata


def comes_from_disk(tensor: Tensor) -> bool:
    """What the host asks before it reads the tensor from its file, see its `read_tensor_file_slice_into`."""
    size = getattr(tensor.untyped_storage(), PLACE, None)
    return size == tensor.nbytes and tensor.storage_offset() == 0 and tensor.is_contiguous()


@pytest.fixture
def opened(small: Small, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that the host has opened."""
    found: list[str] = []
    utils = SimpleNamespace(load_safetensors=lambda path: found.append(Path(path).name) or mapped(path))
    module = small.host.pack("nodes.host.mapping")
    monkeypatch.setattr(module, "memory_management", SimpleNamespace(aimdo_enabled=True))
    monkeypatch.setattr(module, "utils", utils)
    return found


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_weights_lie_in_the_storages_of_the_host(
    host: Host, small: Small, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    build = comfy.sd.load_diffusion_model_state_dict
    monkeypatch.setattr(
        comfy.sd,
        "load_diffusion_model_state_dict",
        lambda tensors, **named: given.extend(tensors.values()) or build(tensors, **named),
    )
    expected = small.sample()
    model, clip, vae = load(host, small.path.name)
    assert opened == [small.path.name, "model.safetensors", "diffusion_pytorch_model.safetensors"]
    assert len(given) > 50 and all(map(comes_from_disk, given))
    call = {"text": PROMPT, "instruction": "official", "custom_instruction": ""}
    ((text, _),) = host.call("GemmaTextEncode", clip=clip, **call)[0]
    assert torch.equal(text, small.positive[0][0])
    assert torch.equal(small.sample(model=model), expected)
    pictures = [host.call("VAEDecode", vae=each, samples={"samples": expected})[0] for each in (vae, small.vae)]
    assert torch.equal(*pictures)


def test_a_file_that_the_host_cannot_map_is_opened_as_by_anybody(
    host: Host, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = host.pack("nodes.host.mapping")
    assert module.mapped_by_host() is None  # here weights come from memory
    monkeypatch.setattr(module, "memory_management", SimpleNamespace(aimdo_enabled=True))
    for error in (KeyError("F8_E8M0"), RuntimeError("ModelMMAP allocation failed")):
        monkeypatch.setattr(module, "utils", SimpleNamespace(load_safetensors=raising(error)))
        assert module.mapped_by_host()(small.path) is None
        assert torch.equal(small.sample(model=load(host, small.path.name)[0]), small.sample())
    monkeypatch.setattr(module, "utils", SimpleNamespace())  # a host that maps files in another way
    assert module.mapped_by_host() is None


def raising(error: Exception) -> Callable[[str], NoReturn]:
    def load_safetensors(path: str) -> NoReturn:
        raise error

    return load_safetensors
