"""Layers with weights, as networks make them without a host: those of PyTorch, most of them quicker."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as modules

from .onednn import PLAIN, is_small, onednn_linear, suits_onednn
from .parts import weights


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by oneDNN on a CPU where that is quicker."""
    if x.is_cpu and not torch.is_grad_enabled() and suits_onednn(x, weight, bias):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def rectified(layer: nn.Module, x: Tensor) -> Tensor | None:
    """ReLU of layer(x) by the kernel of its product, without gradients and a compiler. x: (..., D).

    None: there is no such kernel for them, or the layer is another's, replaced or watched, who would be passed over.
    """
    if type(layer) is not Operations.Linear or (x.is_cpu and is_small(x, layer.out_features)) or is_watched(layer):
        return None
    weight, bias = layer.weight, layer.bias
    if x.is_cpu:
        return onednn_linear(x, weight, bias, "relu") if suits_onednn(x, weight, bias) else None
    fits = type(weight) in PLAIN and weight.dtype is x.dtype and (bias is None or bias.dtype is x.dtype)
    if not fits or x.device.type not in ("cuda", "meta") or torch.is_autocast_enabled("cuda"):
        return None
    return addmm_relu(x, weight, bias)


def addmm_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """ReLU of `F.linear`, x: (..., D). On an NVIDIA GPU cuBLAS applies it; no public function of PyTorch asks for that."""
    bias = _zeros(len(weight), x.dtype, x.device) if bias is None else bias
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.T).unflatten(0, x.shape[:-1])


def is_watched(layer: nn.Module) -> bool:
    """Whether calling the layer does more, or something else, than its class says."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or "forward" in vars(layer)
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
    )


@cache
def _zeros(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The bias of layers without one: (width,). The kernel takes a bias."""
    return torch.zeros(width, dtype=dtype, device=device)


class Operations:
    """A namespace like `torch.nn`, for the argument `operations` of every network."""

    class Conv2d(nn.Conv2d):
        weight, bias = weights(2)

    class Linear(nn.Linear):
        weight, bias = weights(2)

        def forward(self, x: Tensor) -> Tensor:
            """x: (..., D). Returns (..., outputs)."""
            if x.is_cpu and not (torch.is_grad_enabled() or is_small(x, self.out_features)):
                return linear(x, self.weight, self.bias)
            return F.linear(x, self.weight, self.bias)  # at once: what is asked before takes time as well

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
