"""Weights on their way before their block, by the host's queues: in which order it is asked for which layers."""

from collections.abc import Callable

import comfy.model_prefetch
import comfy.patcher_extension
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from tests.host.inprocess.small import Small

AS_NEEDED = "prefetch_dynamic_vbars"


@pytest.fixture
def events(small: Small, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """What is asked of the host, and which blocks run, each by its number."""
    found: list[tuple[str, object]] = []
    network = small.model.model.diffusion_model

    def make(blocks: list[nn.Module], device: object, options: dict[str, object]) -> list[nn.Module]:
        assert options[AS_NEEDED] and device == small.model.load_device
        found.append(("queue", blocks))
        return blocks

    def pop(queue: list[nn.Module], device: object, block: nn.Module | None) -> None:
        assert queue is found[0][1] and device == small.model.load_device
        found.append(("fetch", None if block is None else list(network.transformer_blocks).index(block)))

    monkeypatch.setattr(comfy.model_prefetch, "make_prefetch_queue", make)
    monkeypatch.setattr(comfy.model_prefetch, "prefetch_queue_pop", pop)
    for i, block in enumerate(network.transformer_blocks):
        run = block.forward
        monkeypatch.setattr(block, "forward", lambda *given, i=i, run=run: found.append(("run", i)) or run(*given))
    return found


def as_needed(small: Small) -> ModelPatcher:
    """The model on a host that brings weights as they are needed, as far as the options tell."""

    def tell(executor: Callable[..., Tensor], *given: object) -> Tensor:
        return executor(*given[:-1], {**given[-1], AS_NEEDED: True})

    model = small.model.clone()
    comfy.patcher_extension.add_wrapper(WrappersMP.DIFFUSION_MODEL, tell, model.model_options, is_model_options=True)
    return model


def test_every_block_is_fetched_before_it_runs(
    small: Small, events: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small.model.model.diffusion_model
    blocks = range(len(network.transformer_blocks))
    plain = small.ksampler(steps=1, cfg=1.0)
    assert events == [("run", i) for i in blocks]  # here all weights are where they are needed
    events.clear()
    assert torch.equal(small.ksampler(model=as_needed(small), steps=1, cfg=1.0), plain)
    (_, queue), *rest = events
    assert rest == [*((kind, i) for i in blocks for kind in ("fetch", "run")), ("fetch", None)]
    for block, layers in zip(network.transformer_blocks, queue, strict=True):
        computed_before = {block.attn2.to_k, block.attn2.to_v, block.attn2.norm_k}
        assert weighted(layers) == weighted(block) - computed_before
    events.clear()
    monkeypatch.setattr(small.host.pack("nodes.host.prefetch"), "queues", None)  # a host without them
    small.ksampler(model=as_needed(small), steps=1, cfg=1.0)
    assert events == [("run", i) for i in blocks]


def weighted(layers: nn.Module) -> set[nn.Module]:
    return {module for module in layers.modules() if getattr(module, "weight", None) is not None}
