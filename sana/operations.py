"""Layers with weights, as networks make them without a host: those of PyTorch, two of them quicker."""

import torch
from torch import Tensor, nn

# float32 products of matrices by oneDNN. PyTorch's own go to MKL, which is slower on AMD: by 1.2 in `python -m bench`.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Operations:
    """A namespace like `torch.nn`, for the argument `operations` of every network."""

    Conv2d = nn.Conv2d
    RMSNorm = nn.RMSNorm

    class Linear(nn.Linear):
        """By oneDNN in float32 on a CPU, where that can be: it knows neither gradients nor PyTorch's compiler."""

        def forward(self, x: Tensor) -> Tensor:
            """x: (..., D). Returns (..., outputs)."""
            known = ONEDNN_LINEAR is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            fitting = x.dtype == self.weight.dtype == torch.float32 and x.shape[-1] == self.weight.shape[1]
            if known and fitting and x.is_cpu and self.weight.is_cpu:
                return ONEDNN_LINEAR(x, self.weight, self.bias, "none", [], "")
            return super().forward(x)

    class Embedding(nn.Embedding):
        """Not filled with random numbers: on meta, PyTorch would import its compiler for them, which takes 3 s."""

        def reset_parameters(self) -> None:
            pass
