"""What training an adapter takes on a device, told from the network without running it: by what autograd would keep.

Not in it: encoders that have left by then, what libraries take for themselves, and gaps between allocations.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TEXT_TOKENS, GemmaConfig, TransformerConfig
from ..networks.block import BlockInputs
from ..networks.transformer import SanaTransformer
from ..text.gemma import Gemma2
from ..text.prompt import INSTRUCTION
from .adapters import AdapterConfig, add_adapter, add_text_adapter
from .optimizers import OptimizerName, remembered_bytes

INSTRUCTION_TOKENS = len(re.findall(r"\w+|[^\w\s]|\n", INSTRUCTION))  # words and marks, each about a token of Gemma's


@dataclass(frozen=True)
class TrainingNeed:
    """Bytes of a step. adapter: with its gradient, its average and what the optimizer remembers. text: of the captions, with
    what a text encoder in training keeps for the backward pass. blocks: what blocks keep for it; passing: what the last of them
    works with then.
    """

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
    optimizer: OptimizerName = "adamw",
    text_encoder: GemmaConfig | None = None,
    instruction: int = INSTRUCTION_TOKENS,
) -> TrainingNeed:
    """Of a step with latents of so many rows and columns. tokens: of the longest caption. text_encoder: one that is trained, too,
    with so many tokens of the instruction before captions. Needs PEFT, as `add_adapter`.
    """
    network = SanaTransformer(config, dtype=dtype, device="meta")
    frozen = _bytes(network.parameters())
    trained = [*add_adapter(network, adapter).values()]
    rows, columns = latent
    x = torch.empty(batch, rows * columns, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    text = torch.empty(
        batch, config.cross_heads, tokens, config.hidden_size // config.cross_heads, dtype=dtype, device="meta"
    )
    modulation = torch.empty(batch, 6, config.hidden_size, dtype=dtype, device="meta")
    mask = None if batch == 1 else torch.empty(batch, 1, 1, tokens, dtype=torch.bool, device="meta")
    inputs = BlockInputs(columns, modulation, (text, text), mask)
    kept = _kept_bytes(network, lambda: network.transformer_blocks[0](x, *inputs), (text, modulation))
    texts = 2 * config.depth * text.nbytes
    if text_encoder is not None:
        model = Gemma2(text_encoder, dtype=dtype, device="meta")
        frozen += _bytes(model.parameters())
        trained += add_text_adapter(model, adapter).values()
        texts += _kept_bytes(model, lambda: _read(model, batch, tokens, instruction))
    # The backward pass of the Mix-FFN has the gradients of its two widest activations beside what was kept.
    passing = 2 * 2 * config.ff_width * batch * rows * columns * dtype.itemsize
    return TrainingNeed(
        frozen,
        3 * _bytes(trained) + sum(remembered_bytes(optimizer, weight.shape) for weight in trained),
        texts,
        (config.depth - 1) * x.nbytes + kept if recompute else config.depth * kept,
        passing,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _read(model: Gemma2, batch: int, tokens: int, instruction: int) -> None:
    """Run the instruction, and captions after it."""
    _, past = model(torch.zeros(1, instruction, dtype=torch.long, device="meta"))
    lengths = torch.full((batch,), tokens, device="meta")
    model(torch.zeros(batch, tokens, dtype=torch.long, device="meta"), lengths, past)


def _kept_bytes(network: nn.Module, run: Callable[[], object], given: Iterable[Tensor] = ()) -> int:
    """What autograd keeps of a run, beside weights and what was given. Of a view that is all of its storage."""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    others = {_storage(tensor) for tensor in (*network.parameters(), *network.buffers(), *given)}
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in found.items() if storage not in others)


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor shows; it has no address on meta."""
    return tensor.untyped_storage()._cdata
