"""The weights of a block on their way before it runs: the host's queues, where it has them.

They act only where the host brings weights to the device as they are needed, which it says in the options of a run. What is
left of them after an error is let go by the host when the prompt ends.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from ...sana.networks.block import Block

try:
    import comfy.model_prefetch as queues
except ImportError:
    queues = None  # a host without them

AS_NEEDED = "prefetch_dynamic_vbars"  # of the options: true where weights come as they are needed


def fetching(
    blocks: Iterable[Block], device: torch.device, options: Mapping[str, object]
) -> Callable[[Block | None], None]:
    """Returns what is to be called before each block in turn, with it, and with None after the last."""
    if queues is None or not options.get(AS_NEEDED):  # asked first, for compilers, which cannot follow the rest
        return _nothing
    queue = queues.make_prefetch_queue([_called(block) for block in blocks], device, options)
    return lambda block: queues.prefetch_queue_pop(queue, device, block)


def _called(block: Block) -> nn.Module:
    """The layers that a step calls: keys and values of the text are computed once a run, before all blocks."""
    once = {block.attn2.to_k, block.attn2.to_v, block.attn2.norm_k}
    return nn.ModuleList(module for module in block.modules() if module not in once and not any(module.children()))


def _nothing(block: Block | None) -> None:
    pass
