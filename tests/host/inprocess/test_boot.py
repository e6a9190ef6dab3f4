"""The harness itself: the host is the one asked for and its core nodes run in this process."""

import comfyui_version
import torch

from tests.host.boot import Host


def test_host_is_the_version_asked_for(host: Host) -> None:
    assert comfyui_version.__version__ == host.version
    assert {"KSampler", "VAEDecode", "LoraLoader"} <= host.nodes.keys()


def test_core_nodes_run(host: Host) -> None:
    (image,) = host.call("EmptyImage", width=8, height=4, batch_size=1, color=0xFF0000)
    (flipped,) = host.call("ImageInvert", image=image)
    assert image.is_inference() and flipped.shape == (1, 4, 8, 3)
    assert torch.equal(flipped[0, 0, 0], torch.tensor([0.0, 1.0, 1.0]))


def test_nodes_of_the_newer_schema_run(host: Host) -> None:
    sigmas = host.call("FlipSigmas", sigmas=torch.tensor([1.0, 0.5, 0.0]))[0]
    assert torch.equal(sigmas, torch.tensor([1e-4, 0.5, 1.0]))
