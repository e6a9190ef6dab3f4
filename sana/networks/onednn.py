"""Matrix products by oneDNN on a CPU, through private functions of PyTorch, which nothing outside this file touches.
Without the file, `torch.nn.Linear` gives the same products in the time that is told below.

In float32 PyTorch goes to MKL, which is slower on AMD processors: 150 to 187 against 163 to 207 GFLOP/s, and steps 1.14 to
1.27 instead of 1.34 to 1.62 times as fast as diffusers' at 512 px. On Intel both take equally long. In bfloat16 it copies
the bias to every row first: 21.9 ms instead of 14.4 for 2048 x 1152 by 5760 on an Intel with AMX.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
ONEDNN_HAS_BFLOAT16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)()  # processors with AVX512
PLAIN = (nn.Parameter, Tensor)  # others have a product of their own
LEAST_WORK = 2**21  # multiplications below which calling oneDNN takes longer than it gains


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """`F.linear` of what `suits_onednn`, and then an activation in the same kernel, such as "relu"."""
    return ONEDNN_LINEAR(x, weight, bias, activation, [], "")


def is_small(x: Tensor, outputs: int) -> bool:
    """Whether x (..., D) by so many outputs takes less work than calling oneDNN."""
    return x.numel() * outputs < LEAST_WORK


def suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the function is quicker for x on a CPU without gradients, takes all three, and knows all who watch.

    It checks nothing itself: it reads a bias with gaps as if it had none. The commonest reasons against it come first.
    """
    if is_small(x, weight.shape[0]):
        return False
    dtype = x.dtype
    if dtype is torch.bfloat16:
        if bias is None or not ONEDNN_HAS_BFLOAT16:
            return False
    elif dtype is not torch.float32:
        return False
    return (
        ONEDNN_LINEAR is not None
        and not is_observed()
        and _is_plain(weight, dtype)
        and (bias is None or (_is_plain(bias, dtype) and bias.is_contiguous()))
        and _is_plain(x, dtype)
        and 0 < weight.shape[1] == (x.shape[-1] if x.dim() else 0)
    )


def _is_plain(part: Tensor, dtype: torch.dtype) -> bool:
    return part.dtype is dtype and type(part) in PLAIN and part.is_cpu and part.layout is torch.strided


def is_observed() -> bool:
    """Whether the compiler, autocast, forward-mode derivatives or a tracer want to know of every operation."""
    return (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )
