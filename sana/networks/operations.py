"""Layers with weights, as networks make them without a host: those of PyTorch, most of them quicker."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .onednn import onednn_linear, suits_onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by oneDNN on a CPU where that is quicker; elsewhere the two questions asked here are all it takes."""
    if x.is_cpu and not torch.is_grad_enabled() and suits_onednn(x, weight, bias):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Operations:
    """A namespace like `torch.nn`, for the argument `operations` of every network."""

    Conv2d = nn.Conv2d

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            """x: (..., D). Returns (..., outputs)."""
            return linear(x, self.weight, self.bias)

    class RMSNorm(nn.RMSNorm):
        """Under autocast too in the dtype of what comes in: for a weight of another, PyTorch warns and takes longer."""

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

    class Embedding(nn.Embedding):
        """Not filled with random numbers: on meta, PyTorch would import its compiler for them, which takes 3 s."""

        def reset_parameters(self) -> None:
            pass

        def project(self, x: Tensor) -> Tensor:
            """The product of x (..., D) with every row, (..., rows): the output of a network that writes with the embedding it
            reads with. Other namespaces give their layer a method of this name, since only the layer knows where its rows are."""
            return linear(x, self.weight.to(x.dtype), None)
