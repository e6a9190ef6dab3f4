"""What adapters make of weights: the arithmetic of LoRA and its kin. It knows no file and no name of a layer.

Sources: LoRA arXiv 2106.09685; DoRA 2402.09353; LoHa 2108.06098, as Hadamard product of two; LoKr, as Kronecker product, and
cores between factors 2309.14859.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Kind = Literal["LoRA", "LoHa", "LoKr", "difference", "replacement"]
Merge = Callable[[Tensor], Tensor]  # a weight, in any dtype, to the weight that is used in its place, in float32

EPS = torch.finfo(torch.float32).eps  # beside the length of a row or column, which may be 0


class Factors(NamedTuple):
    """A matrix as the product of up (rows, rank) and down (rank, columns), or whole, which is up alone.

    Either may have axes of 1 behind these, as convolutions have, and down those of a kernel, which count as columns.
    core: (rank, rank, ...) between them, with the axes of the kernel. Raises ValueError if the ranks are not one number.
    """

    up: Tensor
    down: Tensor | None = None
    core: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """None: the matrix is whole."""
        return None if self.down is None else len(self.down)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns. Raises ValueError if the factors do not fit each other."""
        rows, columns = len(self.up), math.prod(self.up.shape[1:])
        if self.down is None:
            return rows, columns
        inner, kernel = ((self.rank, self.rank), 1) if self.core is None else self._core_shape
        if (columns, self.rank) != inner or not self.rank:
            raise ValueError(f"its factors of shapes {self._shapes} do not fit each other")
        return rows, math.prod(self.down.shape[1:]) * kernel

    def to(self, device: torch.device) -> "Factors":
        return Factors(*(part if part is None else part.to(device) for part in self))

    def matrix(self) -> Tensor:
        """(rows, columns), float32."""
        up = _flat(self.up)
        if self.down is None:
            return up
        down = _flat(self.down)
        if self.core is None:
            return up @ down
        core = self.core.float().reshape(*self.core.shape[:2], -1)
        return torch.einsum("mo,oik,in->mnk", up, core, down).flatten(1)

    @property
    def _core_shape(self) -> tuple[tuple[int, ...], int]:
        """Its ranks, and the numbers in its kernel."""
        return tuple(self.core.shape[:2]), math.prod(self.core.shape[2:])

    @property
    def _shapes(self) -> str:
        return " and ".join(str(tuple(part.shape)) for part in self if part is not None)


@dataclass(frozen=True, eq=False)
class Change:
    """A change of one weight, which is taken as a matrix of rows and all the rest.

    parts: one, or of LoHa and LoKr two. scale: of their product, alpha / rank. lengths: of DoRA, those that the rows of the
    changed weight get, as many as it has rows, or those of its columns, (1, columns, ...).
    """

    kind: Kind
    parts: tuple[Factors, ...]
    scale: float = 1.0
    lengths: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """What alpha is divided by: the first part's, of LoKr the second's, or that of the other; None: all parts are whole."""
        parts = self.parts[::-1] if self.kind == "LoKr" else self.parts
        return next((part.rank for part in parts if part.rank is not None), None)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight that it changes. Raises ValueError if its parts do not fit each other."""
        first, *others = (part.shape for part in self.parts)
        if self.kind == "LoKr":
            (second,) = others
            return first[0] * second[0], first[1] * second[1]
        if any(other != first for other in others):
            raise ValueError(f"its two products, {first} and {others[0]}, are of different shapes")
        return first

    @property
    def tensors(self) -> list[Tensor]:
        tensors = (*(tensor for part in self.parts for tensor in part), self.lengths)
        return [tensor for tensor in tensors if tensor is not None]

    def to(self, device: torch.device) -> "Change":
        lengths = None if self.lengths is None else self.lengths.to(device)
        return replace(self, parts=tuple(part.to(device) for part in self.parts), lengths=lengths)

    def matrix(self) -> Tensor:
        """What is added to the weight at strength 1, DoRA aside, or what replaces it: (rows, columns), float32."""
        first, *others = (part.matrix() for part in self.parts)
        for other in others:
            first = torch.kron(first, other) if self.kind == "LoKr" else first * other
        return first if self.scale == 1 else first * self.scale


class Changes(nn.Module):
    """What becomes of one weight by changes, each with its strength, one after another; see `changed`.

    It moves to devices with the layer that it is a part of, and keeps its dtypes.
    """

    def __init__(self, changes: Iterable[tuple[Change, float]]) -> None:
        super().__init__()
        self.changes = tuple(changes)

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(tensor.nbytes for change, _ in self.changes for tensor in change.tensors)

    def forward(self, weight: Tensor) -> Tensor:
        for change, strength in self.changes:
            weight = changed(weight, change, strength)
        return weight

    def _apply(self, move: Callable[[Tensor], Tensor], recurse: bool = True) -> "Changes":
        """Called by PyTorch for `to`."""
        self.changes = tuple((change.to(move(torch.empty(0)).device), strength) for change, strength in self.changes)
        return super()._apply(move, recurse)


def changed(weight: Tensor, change: Change, strength: float = 1.0) -> Tensor:
    """The weight, in float32 and in its own shape, with a share of a change; of a replacement there is no share.

    A strength of 0 gives the weight itself.
    """
    if strength == 0:
        return weight
    weight, matrix = weight.float(), change.matrix().to(weight.device).reshape(weight.shape)
    if change.kind == "replacement":
        return matrix
    if change.lengths is None:
        return weight + strength * matrix
    whole = _with_lengths(weight + matrix, change.lengths.to(weight))
    return torch.lerp(weight, whole, strength)


def _with_lengths(weight: Tensor, lengths: Tensor) -> Tensor:
    """A weight with its rows, or its columns, brought to these lengths."""
    axis = 0 if len(lengths) == len(weight) else 1
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    found = weight.transpose(0, axis).flatten(1).norm(dim=1)
    return weight * (lengths.flatten() / (found + EPS)).view(shape)


def as_product(change: Change) -> tuple[Tensor, Tensor]:
    """Two factors, up (rows, rank) and down (rank, columns), whose product times the scale is `change.matrix()`.

    Those of a LoRA are its own. That of LoHa or LoKr has the ranks of both parts multiplied, in float32; none of these has
    more than the matrix.
    """
    if change.kind == "LoRA":
        (factors,) = change.parts
        return _halves(factors)
    if math.prod(part.rank or min(part.shape) for part in change.parts) > min(change.shape):
        return _with_identity(replace(change, scale=1.0).matrix())
    ups, downs = zip(*(_halves(part) for part in change.parts), strict=True)
    if change.kind == "LoKr":
        up, down = torch.kron(*ups), torch.kron(*downs)
    elif change.kind == "LoHa":
        up = torch.einsum("mi,mj->mij", *ups).flatten(1)
        down = torch.einsum("in,jn->ijn", *downs).flatten(0, 1)
    else:
        (up,), (down,) = ups, downs
    return up, down


def _halves(factors: Factors) -> tuple[Tensor, Tensor]:
    """The same matrix as a product of two."""
    if factors.down is None:
        return _with_identity(factors.matrix())
    if factors.core is None:
        return factors.up.flatten(1), factors.down.flatten(1)
    return _flat(factors.up), factors._replace(up=torch.eye(len(factors.core))).matrix()


def _with_identity(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as a product with the smaller identity."""
    rows, columns = matrix.shape
    return (matrix, torch.eye(columns)) if columns <= rows else (torch.eye(rows), matrix)


def _flat(tensor: Tensor) -> Tensor:
    """Its first axis and all the rest: (rows, columns), float32."""
    return tensor.float().reshape(len(tensor), -1)
