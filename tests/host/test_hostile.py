"""Files that are meant to do harm, on a running server: each gets one sentence, none runs code, and the next prompt draws."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sana.loading import MODELS
from tests.host.client import Run
from tests.host.graphs import Prompt, changed, node, text_to_image
from tests.host.server import Server

SECONDS = 10  # for a sentence, with room for a busy machine
BACKTRACKING = "a" * 40 + "!"  # a prompt that (a+)+$ takes exponential time for
# What stands in a tokenizer.json, and a prompt for it
TOKENIZERS = {
    "precompiled": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "a red circle"),
    "split": (
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(a+)+$"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        BACKTRACKING,
    ),
}


class Code:
    """What a pickle of it does when it is read with code allowed: it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.canary}'",)


def save_plain(found: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(found, protocol=2))


def save_old(found: object, path: Path) -> None:
    torch.save(found, path, _use_new_zipfile_serialization=False)


WRITERS = {"zip": torch.save, "before PyTorch 1.6": save_old, "plain pickle": save_plain}
# Where the file lies, and what is exchanged in the graph for its name
OURS = {
    "Load SANA": ("diffusion_models/code.pth", {"load": {"model": "code.pth"}}),
    "Load SANA, checkpoint": ("checkpoints/code.ckpt", {"load": {"model": "code.ckpt"}}),
    "Load SANA, text encoder": ("text_encoders/code.bin", {"load": {"text_encoder": "code.bin"}}),
    "Load SANA, autoencoder": ("vae/code.pt", {"load": {"vae": "code.pt"}}),
    "Load SANA text encoder": (
        "text_encoders/code.bin",
        node("SanaTextEncoderLoader", text_encoder="code.bin", dtype="auto"),
    ),
    "Load DC-AE": ("vae/code.pt", node("DCAELoader", vae="code.pt", dtype="auto")),
    "Load SANA ControlNet": ("controlnet/code.pth", node("SanaControlNetLoader", control_net="code.pth")),
}
# Loaders of the host that ask ours what a file is, or whose results ours prepares
CORE = {
    "Load Diffusion Model": (
        "diffusion_models/code.pth",
        node("UNETLoader", unet_name="code.pth", weight_dtype="default"),
    ),
    "Load Checkpoint": ("checkpoints/code.ckpt", node("CheckpointLoaderSimple", ckpt_name="code.ckpt")),
    "Load LoRA": (
        "loras/code.pt",
        node("LoraLoaderModelOnly", model=("load", 0), lora_name="code.pt", strength_model=1.0),
    ),
}


@pytest.fixture(scope="module")
def picture(server: Server) -> np.ndarray:
    return draw(server)


def draw(server: Server) -> np.ndarray:
    """The same picture each time, from models that are loaded anew."""
    server.free()
    return pixels(server, server.queue(text_to_image("FlowDPMSampler")))


def pixels(server: Server, run: Run) -> np.ndarray:
    assert run.failure is None
    return np.asarray(server.images(run, "save")[0])


def sentence(run: Run) -> str:
    """Why the prompt failed, which is one line and came in time."""
    assert run.failure is not None and run.seconds < SECONDS
    (line,) = run.failure.message.splitlines()
    return line


@pytest.fixture(params=TOKENIZERS)
def encoder(server: Server, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The name of a text encoder with a bad tokenizer, and the prompt that it is bad for."""
    changes, prompt = TOKENIZERS[request.param]
    folder = server.base / "models" / "text_encoders" / f"hostile-{request.param}"
    shutil.copytree(MODELS["demo"] / "text_encoder", folder)
    tokenizer = json.loads((MODELS["demo"] / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | changes), encoding="utf-8")
    yield folder.name, prompt
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["GemmaTextEncode", "CLIPTextEncode"])
def test_a_tokenizer_that_breaks_its_library_down(
    server: Server, picture: np.ndarray, encoder: tuple[str, str], kind: str
) -> None:
    """What the library raises there is no Exception, and ended the host's queue."""
    name, text = encoder
    prompt = changed(text_to_image("FlowDPMSampler"), load={"text_encoder": name}, positive={"text": text})
    if kind == "CLIPTextEncode":
        prompt["positive"] = node(kind, clip=("load", 1), text=text)
    run = server.queue(prompt, timeout_seconds=60)
    assert "tokenizer" in sentence(run)
    assert run.failure.node_type in ("SanaCheckpointLoader", kind)
    assert np.array_equal(draw(server), picture)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.mark.parametrize("write", WRITERS)
def test_the_code_would_run(tmp_path: Path, canary: Path, write: str) -> None:
    path = tmp_path / "code.pth"
    WRITERS[write]({"state_dict": Code(canary)}, path)
    pickle.loads(path.read_bytes()) if write == "plain pickle" else torch.load(path, weights_only=False)
    assert canary.exists()


def run_hostile(server: Server, place: str, change: dict[str, dict], canary: Path, write: str) -> Run:
    """Write the file, run the graph with it, and take it away."""
    path = server.base / "models" / place
    WRITERS[write]({"state_dict": Code(canary)}, path)
    try:
        return server.queue(with_loader(change), timeout_seconds=60)
    finally:
        path.unlink()
        assert not canary.exists()


def with_loader(change: dict[str, object]) -> Prompt:
    """The graph with other inputs, or with another loader, whose first output goes to where it fits."""
    prompt = text_to_image("FlowDPMSampler")
    if "class_type" not in change:
        return changed(prompt, **change)
    prompt["other"] = change
    places = {
        "SanaTextEncoderLoader": ("positive", "clip"),
        "DCAELoader": ("decode", "vae"),
        "SanaControlNetLoader": ("control", "control_net"),
    }
    if change["class_type"] == "SanaControlNetLoader":
        ends = {"start_percent": 0.0, "end_percent": 1.0, "strength": 1.0, "vae": ("load", 2), "image": ("blank", 0)}
        prompt["blank"] = node("EmptyImage", width=96, height=128, batch_size=1, color=0)
        prompt["control"] = node("ControlNetApplyAdvanced", positive=("positive", 0), negative=("negative", 0), **ends)
        prompt = changed(prompt, sample={"positive": ("control", 0)})
    target, name = places.get(change["class_type"], ("sample", "model"))
    return changed(prompt, **{target: {name: ("other", 0)}})


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("loader", OURS)
def test_code_in_a_checkpoint(server: Server, canary: Path, loader: str, write: str) -> None:
    place, change = OURS[loader]
    message = sentence(run_hostile(server, place, change, canary, write))
    assert message.startswith(f"{Path(place).name} needs code to be read and is refused, because opening it could run ")


@pytest.mark.parametrize("loader", CORE)
def test_code_in_a_checkpoint_of_the_hosts_loaders(server: Server, canary: Path, loader: str) -> None:
    """It is the host that refuses, in its own words."""
    place, change = CORE[loader]
    run = run_hostile(server, place, change, canary, "zip")
    assert run.failure is not None and run.seconds < SECONDS
    assert run.failure.node_id == "other" and "weights" in run.failure.message.lower()


def test_the_next_prompt_draws(server: Server, picture: np.ndarray) -> None:
    """After everything above."""
    assert np.array_equal(draw(server), picture)


def test_no_program_was_started_and_nothing_was_connected(server: Server) -> None:
    """By this server since its start, whatever it drew and opened."""
    assert server.watched() == []
