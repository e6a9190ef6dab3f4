"""What training an adapter takes on a device, told from the network without running it: by what autograd would keep.

Not in it: the encoders, which have left by then, what libraries take for themselves, and gaps between allocations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TEXT_TOKENS, TransformerConfig
from ..networks.transformer import BlockInputs, SanaTransformer
from .adapters import AdapterConfig, add_adapter

STATES = 5 * torch.float32.itemsize  # of a number of the adapter: itself, its gradient, two moments, its average


@dataclass(frozen=True)
class TrainingNeed:
    """Bytes of a step. blocks: what blocks keep for the backward pass; passing: what the last of them works with then."""

    weights: int
    adapter: int
    text: int
    blocks: int
    passing: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.text + self.blocks + self.passing


def training_need(
    config: TransformerConfig,
    adapter: AdapterConfig,
    latent: tuple[int, int],
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    recompute: bool = True,
    tokens: int = TEXT_TOKENS,
) -> TrainingNeed:
    """Of a step with latents of so many rows and columns. tokens: of the longest caption. Needs PEFT, as `add_adapter`."""
    network = SanaTransformer(config, dtype=dtype, device="meta")
    frozen = sum(weight.nbytes for weight in network.parameters())
    numbers = sum(weight.numel() for weight in add_adapter(network, adapter).values())
    rows, columns = latent
    x = torch.empty(batch, rows * columns, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    text = torch.empty(
        batch, config.cross_heads, tokens, config.hidden_size // config.cross_heads, dtype=dtype, device="meta"
    )
    modulation = torch.empty(batch, 6, config.hidden_size, dtype=dtype, device="meta")
    mask = None if batch == 1 else torch.empty(batch, 1, 1, tokens, dtype=torch.bool, device="meta")
    kept = _kept_bytes(network, x, BlockInputs(columns, modulation, (text, text), mask))
    # The backward pass of the Mix-FFN has the gradients of its two widest activations beside what was kept.
    passing = 2 * 2 * config.ff_width * batch * rows * columns * dtype.itemsize
    return TrainingNeed(
        frozen,
        STATES * numbers,
        2 * config.depth * text.nbytes,
        (config.depth - 1) * x.nbytes + kept if recompute else config.depth * kept,
        passing,
    )


def _kept_bytes(network: SanaTransformer, x: Tensor, inputs: BlockInputs) -> int:
    """What autograd keeps of a block, beside weights and what the block was given. Of a view that is all of its storage."""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network.transformer_blocks[0](x, *inputs)
    given = {
        _storage(tensor) for tensor in (*network.parameters(), *network.buffers(), *inputs.text, inputs.modulation)
    }
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in found.items() if storage not in given)


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor shows; it has no address on meta."""
    return tensor.untyped_storage()._cdata
