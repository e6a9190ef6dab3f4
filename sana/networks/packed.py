"""Weights that stay in few bits, and the arithmetic of their formats. `packed_layers.py` has the layers that use them.

The parts of a packed weight are matrices with a row for each of its rows, or one row for all of them, so that a weight can
be cut and looked up by rows without being unpacked whole. Here is no file and no name of one.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Parts = Mapping[str, Tensor]
Unpack = Callable[[Parts], Tensor]  # some rows of all parts -> these rows of the weight, in float32, of any shape

# What the four bits of E2M1 mean, a sign and two powers of 2 with one digit (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
INT4 = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0)  # two's complement
MOST_AT_ONCE = 2**24  # numbers; the largest matrix of a block has 2**25
MX_BLOCK, NV_BLOCK = 32, 16  # numbers of a row that share a scale
CACHED = 2**20  # numbers that are unpacked at once on a CPU where a weight is used in parts


def scaled(parts: Parts, group: int = 0) -> Tensor:
    """Numbers of 8 bits, times the scale of their row or of all, if there is one. group: as in `rotated`; 0: not rotated."""
    weight = parts["packed"].float()
    if "scale" in parts:
        weight = weight.mul_(parts["scale"].float())
    return rotated(weight, group) if group else weight


def signed_fours(parts: Parts, group: int) -> Tensor:
    """Integers of 4 bits, the first of two in the lower half of their byte, times the scale of their row, and rotated."""
    weight = nibbles(parts["packed"], INT4, low_first=True)
    return rotated(weight.mul_(parts["scale"].float()), group)


def mx_blocks(parts: Parts) -> Tensor:
    """float8 times powers of 2, one for each 32 numbers; their exponents are those of float32."""
    weight, exponents = parts["packed"].float(), parts["scale"].int()
    scales = torch.bitwise_left_shift(exponents, 23).view(torch.float32)
    return weight.view(len(weight), -1, MX_BLOCK).mul_(scales[..., None])


def nv_blocks(parts: Parts) -> Tensor:
    """E2M1 times a float8 for each 16 numbers and one scale for all, and if need be times a factor for each column."""
    weight = nibbles(parts["packed"], E2M1)
    scales = parts["scale"].float() * parts["scale_2"].float()
    weight.view(len(weight), -1, NV_BLOCK).mul_(scales[..., None])
    return weight.mul_(parts["columns"].float()) if "columns" in parts else weight


def code_blocks(parts: Parts, block: int) -> Tensor:
    """Places in a list of 16 numbers, times a scale for each so many of them, whose last block may be short."""
    weight, scales = nibbles(parts["packed"], parts["codes"].flatten()).flatten(), parts["scale"].flatten()
    whole = len(weight) // block * block
    weight[:whole].view(-1, block).mul_(scales[: whole // block, None])
    weight[whole:].mul_(scales[whole // block :])
    return weight


def nibbles(packed: Tensor, values: tuple[float, ...] | Tensor, low_first: bool = False) -> Tensor:
    """The value of each half of every byte: (R, n) to (R, 2 n), in float32. The higher half comes first unless told."""
    known = (
        isinstance(values, Tensor) or torch.compiler.is_compiling()
    )  # a compiler looks through caches, and warns of them
    table = torch.as_tensor(values, device=packed.device) if known else _table(values, packed.device)
    byte = torch.arange(256, device=packed.device)
    halves = [byte & 15, byte >> 4] if low_first else [byte >> 4, byte & 15]
    pairs = table.float()[torch.stack(halves, dim=1)]
    return F.embedding(packed.int(), pairs).flatten(1)


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied to the device once: a GPU would wait for the copy, and graphs of it allow none."""
    return torch.tensor(values, device=device)


def rotated(weight: Tensor, group: int) -> Tensor:
    """Each `group` numbers of a row times the regular Hadamard matrix of that size, a power of 4, which undoes itself
    (ConvRot, arXiv 2512.03673)."""
    four = torch.ones(4, 4, device=weight.device) - 2 * torch.eye(4, device=weight.device).flip(0)
    matrix = torch.ones(1, 1, device=weight.device)
    while len(matrix) < group:
        matrix = torch.kron(matrix, four / 2)
    return (weight.view(len(weight), -1, group) @ matrix).flatten(1)


class PackedWeight(nn.Module):
    """A weight in few bits. Called, it gives the numbers; between that it holds its parts alone, whatever dtype is asked for.

    While a file is read it stands in the place of a tensor: it has the shape of the weight, and is cut and flattened.
    kind: what it is, for people. parts: (R, n) or (1, n), with as many rows as the weight or with one for all.
    multiple: to which rows and columns of a smaller weight were padded.
    changes: called one after another with the numbers after each unpacking, for what adds to them, such as a LoRA.
    """

    def __init__(self, kind: str, unpack: Unpack, parts: Parts, shape: Iterable[int], multiple: int = 1) -> None:
        super().__init__()
        self.kind, self.unpack, self.multiple = kind, unpack, multiple
        self.shape = self.packed_shape = torch.Size(shape)
        self.dtypes = {name: part.dtype for name, part in parts.items()}
        for name, part in parts.items():  # as bytes, which no cast of a network touches
            self.register_parameter(name, nn.Parameter(part.contiguous().view(torch.uint8), requires_grad=False))
        self.register_buffer("like", torch.empty(0), persistent=False)  # of the dtype that is given
        self.changes = nn.ModuleList()

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def parts(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).view(dtype) for name, dtype in self.dtypes.items()}

    @property
    def nbytes(self) -> int:
        """Of what is held."""
        return sum(part.nbytes for part in self.parts.values())

    def numel(self) -> int:
        return math.prod(self.shape)

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight. dtype: of the result; None: the own one."""
        weight = self.unpack(self.parts).view(self.packed_shape)
        if self.shape != self.packed_shape:
            weight = weight[tuple(map(slice, self.shape))]
        for change in self.changes:
            weight = change(weight)
        return weight.to(dtype or self.dtype)

    def numbers(self, dtype: torch.dtype, most: int = MOST_AT_ONCE) -> Tensor:
        """The whole weight, unpacked by rows where that is possible, so that little more than the result is held.

        most: numbers to unpack at once, if a row has no more.
        """
        if self.changes or not self._has_rows:
            return self(dtype)
        found = torch.empty(self.shape, dtype=dtype, device=self.like.device)
        count = max(1, most // math.prod(self.packed_shape[1:]))
        for start in range(0, len(found), count):
            part = found[start : start + count]
            rows = self.unpack(_rows(self.parts, slice(start, start + len(part)))).view(-1, *self.packed_shape[1:])
            part.copy_(rows[tuple(map(slice, part.shape))])
        return found

    def rows(self, index: Tensor) -> Tensor:
        """The rows at an index of any shape, as `F.embedding` gives them, unpacked alone where that is possible."""
        if self.changes or not self._has_rows:
            return F.embedding(index, self())
        rows = self.unpack(_rows(self.parts, index.flatten())).view(index.numel(), -1)
        return rows[:, : self.shape[1]].to(self.dtype).reshape(*index.shape, -1)

    def blocks(self, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """A matrix in parts of some rows each, unpacked one at a time; whole where that is impossible. On a CPU a part stays
        in the cache until it is used. dtype: of the result; None: the own one."""
        if self.changes or not self._has_rows:
            yield self(dtype)
            return
        most = CACHED if self.device.type == "cpu" else MOST_AT_ONCE
        count = max(1, most // self.packed_shape[1])
        for start in range(0, self.shape[0], count):
            part = slice(start, min(start + count, self.shape[0]))
            rows = self.unpack(_rows(self.parts, part)).view(part.stop - start, -1)
            yield rows[:, : self.shape[1]].to(dtype or self.dtype)

    @property
    def is_int8(self) -> bool:
        """Whether whole numbers of 8 bits, with a scale for each row or for all, are all that a matrix is; changes aside."""
        plain = self.unpack is scaled and self.dtypes["packed"] is torch.int8 and "scale" in self.dtypes
        return plain and self.ndim == 2 and self.shape == self.packed_shape

    def int8(self) -> tuple[Tensor, Tensor] | None:
        """Whole numbers of 8 bits, (R, n), and what each row of them is to be multiplied by, (R, 1) in float32, where these
        are all that a matrix is, and nothing changes it; else None."""
        if self.changes or not self.is_int8:
            return None
        parts = self.parts
        return parts["packed"], parts["scale"].float().expand(self.shape[0], 1)

    def tensor_split(self, count: int) -> tuple["PackedWeight | Tensor", ...]:
        """Equal parts of the rows; unpacked ones where blocks of numbers reach across rows."""
        if not self._has_rows:
            return self().tensor_split(count)
        size = (self.shape[0] // count, *self.shape[1:])
        starts = range(0, count * size[0], size[0])
        return tuple(self._with(_rows(self.parts, slice(start, start + size[0])), size) for start in starts)

    def flatten(self, start_dim: int) -> "PackedWeight":
        """As a matrix. start_dim: 1, as callers of `Tensor.flatten` have it."""
        return self._with(self.parts, (self.shape[0], math.prod(self.shape[start_dim:])))

    def fits(self, shape: torch.Size) -> bool:
        """Whether it is a weight of this shape, which may have been padded."""
        return [math.ceil(size / self.multiple) * self.multiple for size in shape] == [*self.packed_shape]

    def cut_to(self, shape: torch.Size) -> "PackedWeight":
        """Without the padding around a weight of a shape that `fits`."""
        self.shape = shape
        return self

    def copied(self) -> "PackedWeight":
        """The same with bytes of its own, and without changes."""
        parts = {name: part.clone() for name, part in self.parts.items()}
        return self._with(parts, self.packed_shape).cut_to(self.shape)

    @property
    def _has_rows(self) -> bool:
        return len(getattr(self, next(iter(self.dtypes)))) == self.packed_shape[0]

    def _with(self, parts: Parts, shape: Iterable[int]) -> "PackedWeight":
        return PackedWeight(self.kind, self.unpack, parts, shape, self.multiple)


def _rows(parts: Parts, index: Tensor | slice) -> dict[str, Tensor]:
    """Rows of the parts that have more than one. As bytes, since not every dtype of 8 bits can be looked up."""
    return {
        name: part if len(part) == 1 else part.view(torch.uint8)[index].view(part.dtype) for name, part in parts.items()
    }
