"""What the host needs so that a Gemma-2 in its layers writes: the output of the embedding, and progress."""

from collections.abc import Iterable

import comfy.ops
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.nn import functional as F

ROWS = 4096  # that are cast at once


def with_output(operations: type) -> type:
    """A namespace of layers of the host whose embedding is an output, too (`Operations.Embedding.project` in `sana/`)."""

    class Embedding(operations.Embedding):
        def project(self, x: Tensor) -> Tensor:
            """With the weight as the host moves and patches it for a lookup, wherever it keeps it in between."""
            weight, _, stream = comfy.ops.cast_bias_weight(
                self, dtype=self.weight.dtype, device=x.device, offloadable=True
            )
            plain = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            parts = [plain] if plain.dtype == x.dtype else plain.split(ROWS)
            out = torch.cat([F.linear(x, part.to(x.dtype)) for part in parts], dim=-1)
            comfy.ops.uncast_bias_weight(self, weight, None, stream)
            return out

    return type(operations.__name__, (operations,), {"Embedding": Embedding})


def counted(tokens: Iterable[int], most: int) -> list[int]:
    """The tokens, of `most` at most, counted by the progress bar of the node that runs."""
    progress = comfy.utils.ProgressBar(most)
    found = []
    for token in tokens:
        found.append(token)
        progress.update(1)
    return found
