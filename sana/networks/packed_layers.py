"""Layers that keep their weight in few bits, and their products."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .onednn import is_observed
from .operations import linear
from .packed import PackedWeight

UNPACKING_BYTES = 8  # for each number of a weight that is unpacked: in float32, and once more on the way
FEW_ROWS = 512  # of what comes in, up to which a CPU uses a weight in parts; so many it multiplies in 8 bits at once
VERY_FEW_ROWS = 8  # up to which it takes int8 as it is
REGISTER = 32  # bytes of x, and whole numbers
INT8_MAX = 127
# Without VNNI, sums of two products can be too large for the 16 bits that x86 has for them.
HAS_INT8_PRODUCTS = getattr(torch.cpu, "_is_vnni_supported", bool)()


class PackedLinear(nn.Linear):
    """A linear layer to whoever asks, such as a library that puts adapters beside layers."""

    in_int8 = False  # see `multiply_in_int8`

    def __init__(self, layer: nn.Linear, weight: PackedWeight) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D). Returns (..., outputs)."""
        if x.is_cpu and x.numel() and not torch.is_grad_enabled() and not is_observed():
            return self._on_cpu(x)
        return linear(x, self.weight(x.dtype), self.bias)

    def _on_cpu(self, x: Tensor) -> Tensor:
        """The same without gradients. To unpack a weight whole takes far longer than to multiply few rows with it."""
        if self.in_int8 and (eight := self.weight.int8()):
            return int8_product(x, *eight, self.bias)
        if math.prod(x.shape[:-1]) <= FEW_ROWS:
            return by_parts(x, self.weight, self.bias)
        return linear(x, self.weight(x.dtype), self.bias)


def by_parts(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., D) times a weight (R, D), of which a part at a time is unpacked, without gradients: (..., R). A CPU need not
    unpack int8 for very few rows of x in bfloat16."""
    eight = weight.int8() if x.is_cpu and x.dtype is torch.bfloat16 else None
    if eight and math.prod(x.shape[:-1]) <= VERY_FEW_ROWS:
        rows, (numbers, scale) = x.reshape(-1, x.shape[-1]), eight
        if _lies_in_registers(rows) and _lies_in_registers(numbers):
            out = torch._weight_int8pack_mm(rows, numbers, scale.flatten().to(x.dtype))
            return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], -1)
    out, end = x.new_empty(*x.shape[:-1], weight.shape[0]), 0
    for rows in weight.blocks(x.dtype):
        part = slice(end, end := end + len(rows))
        out[..., part] = linear(x, rows, None if bias is None else bias[part])
    return out


def _lies_in_registers(matrix: Tensor) -> bool:
    """Whether rows begin and end where registers do, which PyTorch's kernel takes for granted: it ends the process elsewhere."""
    return matrix.is_contiguous() and matrix.shape[1] % REGISTER == 0 and matrix.data_ptr() % REGISTER == 0


def int8_product(x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., D) times int8 numbers (R, D) and the scales of their rows (R, 1): (..., R). Each row of x is rounded to 8 bits and a
    scale as well, so that the product is one of whole numbers, which is exact."""
    out = x.new_empty(*x.shape[:-1], len(numbers))
    smallest = INT8_MAX * torch.finfo(torch.float32).tiny  # of which there is a reciprocal, as a row of zeros needs it
    for rows, found in zip(
        x.reshape(-1, x.shape[-1]).split(FEW_ROWS), out.view(-1, len(numbers)).split(FEW_ROWS), strict=True
    ):
        rows = rows.float()
        largest = rows.abs().amax(dim=1, keepdim=True).clamp_(min=smallest)
        rounded = (rows * (INT8_MAX / largest)).round_().to(torch.int8)
        product = torch._int_mm(rounded, numbers.T).float().mul_(largest / INT8_MAX).mul_(scale.T)
        found.copy_(product if bias is None else product.add_(bias))
    return out


def multiply_in_int8(network: nn.Module) -> tuple[int, int]:
    """Let layers whose weights are int8 multiply in 8 bits on a CPU. Returns how many do, and how many do not since a LoRA
    changes them.

    What they are given is rounded to 255 values for each token, as ComfyUI does with such files. A layer that a LoRA changes,
    or that a gradient is wanted of, multiplies unpacked numbers as before.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, PackedLinear) and layer.weight.is_int8]
    for layer in layers:
        layer.in_int8 = True
    changed = sum(bool(layer.weight.changes) for layer in layers)
    return len(layers) - changed, changed


class PackedConv2d(nn.Module):
    def __init__(self, layer: nn.Conv2d, weight: PackedWeight) -> None:
        super().__init__()
        self.weight, self.bias = weight, layer.bias
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W)."""
        weight = self.weight(x.dtype)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PackedEmbedding(nn.Module):
    def __init__(self, layer: nn.Embedding, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: of any shape. Unpacks their rows alone."""
        return self.weight.rows(tokens)

    def project(self, x: Tensor) -> Tensor:
        """As `Operations.Embedding.project`, some rows at a time."""
        return by_parts(x, self.weight)


LAYERS = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d, nn.Embedding: PackedEmbedding}


def unpacking_bytes(network: nn.Module, itemsize: int) -> int:
    """About what unpacking a weight takes, of the largest one in a network that gives numbers of so many bytes."""
    packed = (module.numel() for module in network.modules() if isinstance(module, PackedWeight))
    return max(packed, default=0) * (UNPACKING_BYTES + itemsize)


def put_weight(network: nn.Module, name: str, weight: PackedWeight) -> None:
    """Replace a layer, which has its bias, by one with a packed weight. name: of the weight, such as "proj_out.weight".

    Raises ValueError for a layer that has no packed form.
    """
    place, _, leaf = name.rpartition(".")
    layer, (parent, _, last) = network.get_submodule(place), place.rpartition(".")
    packed = next((packed for plain, packed in LAYERS.items() if isinstance(layer, plain)), None)
    if packed is None or leaf != "weight":
        raise ValueError(f"{name} is not the weight of a layer that takes a packed one")
    setattr(network.get_submodule(parent), last, packed(layer, weight))
