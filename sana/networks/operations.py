"""Layers with weights, as networks make them without a host: those of PyTorch, most of them quicker."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

# Products of matrices by oneDNN. PyTorch's own go to MKL in float32, which takes up to a quarter longer on AMD processors;
# in bfloat16 they go to oneDNN too, but after a copy of the bias to every row.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
ONEDNN_HAS_BFLOAT16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)()  # processors with AVX512


class Operations:
    """A namespace like `torch.nn`, for the argument `operations` of every network."""

    Conv2d = nn.Conv2d

    class RMSNorm(nn.RMSNorm):
        """Under autocast too in the dtype of what comes in: for a weight of another, PyTorch warns and takes longer."""

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

    class Linear(nn.Linear):
        """By oneDNN on a CPU where that is quicker, unless something watches that its function does not know."""

        def forward(self, x: Tensor) -> Tensor:
            """x: (..., D). Returns (..., outputs)."""
            if _is_watched() or not _suits_onednn(x, self.weight, self.bias):
                return super().forward(x)
            return ONEDNN_LINEAR(x, self.weight, self.bias, "none", [], "")

    class Embedding(nn.Embedding):
        """Not filled with random numbers: on meta, PyTorch would import its compiler for them, which takes 3 s."""

        def reset_parameters(self) -> None:
            pass


def _is_watched() -> bool:
    """Whether gradients, the compiler, a tracer or autocast want to know of every operation."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
    )


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are what oneDNN's function takes without a check: it reads a bias with gaps as if it had none."""
    parts = (x, weight) if bias is None else (x, weight, bias)
    quicker = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and ONEDNN_HAS_BFLOAT16 and bias is not None)
    return (
        ONEDNN_LINEAR is not None
        and quicker
        and all(part.is_cpu and part.dtype == x.dtype and part.layout == torch.strided for part in parts)
        and all(type(part) in (Tensor, nn.Parameter) for part in parts)  # others have a product of their own
        and 0 < weight.shape[1] == (x.shape[-1] if x.dim() else 0)
        and (bias is None or bias.is_contiguous())
    )
