"""The layers of a SANA transformer block: linear self-attention, cross-attention to the text, and the Mix-FFN.

Tokens are (B, N, D) with N = H * W in row-major order, so that every 1x1 convolution of the paper is a Linear. Attribute
names are those of diffusers checkpoints. Layers with weights come from `operations`, a namespace like `torch.nn`: a host
passes its own, and may then move, cast or quantise weights unseen.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import HEAD_WIDTH
from .operations import Operations, rectified
from .parts import parts

# attention(q, k, v, mask): q (B, h, N, d), k and v (B, h, L, d), mask (B, 1, 1, L) bool or None; returns (B, h, N, d)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

FP16_MAX = 65504.0
TIME_FREQUENCIES = 256  # sines and cosines of a time or guidance embedding
FEW_SAMPLES = 4  # up to which as many products are launched instead of a copy


class Build(NamedTuple):
    """How layers are made: where they come from, and the dtype and device of their weights."""

    operations: type | ModuleType = Operations
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        return self.operations.Linear(inputs, outputs, bias=bias, dtype=self.dtype, device=self.device)

    def conv(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> nn.Module:
        return self.operations.Conv2d(
            inputs,
            outputs,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=bias,
            dtype=self.dtype,
            device=self.device,
        )

    def rms_norm(self, width: int, eps: float) -> nn.Module:
        return self.operations.RMSNorm(width, eps=eps, dtype=self.dtype, device=self.device)

    def parameter(self, *shape: int) -> nn.Parameter:
        """A bare parameter. float8 is for the matrices of a host that casts them; it has no arithmetic of its own."""
        small = self.dtype is not None and self.dtype.itemsize == 1
        return nn.Parameter(torch.empty(shape, dtype=torch.bfloat16 if small else self.dtype, device=self.device))


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention with scale 1/sqrt(d), by PyTorch. Shapes: see `Attention`."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def split_heads(x: Tensor, head_width: int) -> Tensor:
    """(B, N, h * d) to a view (B, h, N, d)."""
    return torch.unflatten(x, -1, (-1, head_width)).transpose(1, 2)


def last(layers: nn.ModuleList) -> nn.Module:
    """The only layer of a list, which is one for the names of its weights. Asking the list for it takes ten times as long."""
    return layers._modules["0"]


def merge_heads(x: Tensor) -> Tensor:
    """(B, h, N, d) to (B, N, h * d)."""
    return x.transpose(1, 2).flatten(2)


class LinearAttention(nn.Module):
    """Self-attention with a ReLU kernel (arXiv 2410.10629, equation 1): linear in the number of tokens.

    The sum over tokens, `state`, is separate from its use, `attend`, so that both can run over parts of an image.
    """

    to_q, to_k, to_v, to_out, norm_q, norm_k = parts(6)
    EPS = 1e-15  # of the denominator: diffusers models/attention_processor.py, SanaLinearAttnProcessor2_0

    def __init__(self, width: int, qk_norm: bool, build: Build) -> None:
        super().__init__()
        self.qk_norm = qk_norm
        self.to_q = build.linear(width, width, bias=False)
        self.to_k = build.linear(width, width, bias=False)
        self.to_v = build.linear(width, width, bias=False)
        self.norm_q = build.rms_norm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = build.rms_norm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([build.linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D). Returns (B, N, D)."""
        q, k = self._features(x, (self.to_q, self.norm_q), (self.to_k, self.norm_k))
        return self.project(averages(_heads(q), sums(_heads(k), self._values(x)), x.dtype))

    def state(self, x: Tensor) -> Tensor:
        """Sum over the tokens of x (B, N, D) of k^T [v, 1], per head: (B, h, 32, 33). States of parts of an image add up."""
        (k,) = self._features(x, (self.to_k, self.norm_k))
        return sums(_heads(k), self._values(x))

    def attend(self, x: Tensor, state: Tensor) -> Tensor:
        """Attention of the tokens x (B, N, D) to all tokens summed in `state`. Returns (B, N, D)."""
        (q,) = self._features(x, (self.to_q, self.norm_q))
        return self.project(averages(_heads(q), state.to(q.dtype), x.dtype))

    def _features(self, x: Tensor, *layers: tuple[nn.Module, nn.Module]) -> list[Tensor]:
        """ReLU of x (B, N, D) through each product and its norm."""
        if not self.qk_norm and may_write():
            parts = [rectified(product, x) for product, _ in layers]
            if all(part is not None for part in parts):
                return [_attention_precision(part) for part in parts]
        return _rectified(*(norm(product(x)) for product, norm in layers))

    def _values(self, x: Tensor) -> Tensor:
        return _heads(_attention_precision(self.to_v(x)))

    def identity(self, x: Tensor) -> Tensor:
        """Every token attends to itself only: the perturbed branch of perturbed-attention guidance (arXiv 2403.17377)."""
        return self.project(self.to_v(x))

    def project(self, x: Tensor) -> Tensor:
        """The output projection. Checkpoints trained in float16 had this result clamped during training and give broken
        pictures without it in any precision, because activations reach 1e6 (huggingface/diffusers issue 10336). Those with
        norms of queries and keys, SANA-1.5 and Sprint, were trained in bfloat16 and need it in float16 alone."""
        out = last(self.to_out)(x)
        if self.qk_norm and out.dtype != torch.float16:
            return out
        return out.clamp_(-FP16_MAX, FP16_MAX) if may_write() else out.clamp(-FP16_MAX, FP16_MAX)


# Linear attention between its projections. Each product and quotient is written where the next one reads it: a GPU takes as long
# to copy tokens from one layout to another as for any other operation on them.


def may_write() -> bool:
    """Whether to write into what is there. Gradients forbid it, and a compiler finds its own way."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def _attention_precision(x: Tensor) -> Tensor:
    """float16 sums over tokens overflow; bfloat16 ones are accumulated in float32 by the matrix product itself."""
    return x.float() if x.dtype == torch.float16 else x


def _rectified(*parts: Tensor) -> list[Tensor]:
    """ReLU of each."""
    if not may_write():
        return [_attention_precision(part.relu()) for part in parts]
    torch._foreach_clamp_min_(parts, 0.0)  # one launch for all
    return [_attention_precision(part) for part in parts]


def _heads(x: Tensor) -> Tensor:
    return split_heads(x, HEAD_WIDTH)


def sums(k: Tensor, v: Tensor) -> Tensor:
    """Per head k^T [v, 1], summed over the tokens of k and v (B, h, N, 32): (B, h, 32, 33)."""
    if not may_write():
        return k.transpose(2, 3) @ F.pad(v, (0, 1), value=1.0)
    state = k.new_empty(*k.shape[:2], HEAD_WIDTH, HEAD_WIDTH + 1)
    products, counts = state.split_with_sizes((HEAD_WIDTH, 1), -1)
    torch.sum(k, dim=2, out=counts.squeeze(-1))
    _multiply(k.transpose(2, 3), v, products)
    return state


def averages(q: Tensor, state: Tensor, dtype: torch.dtype) -> Tensor:
    """q (B, h, N, 32) times the numerators of `state` (B, h, 32, 33), over q times its denominators: (B, N, h * 32) in dtype."""
    if not may_write():
        parts = q @ state  # (B, h, N, 33)
        return merge_heads(parts[..., :-1] / (parts[..., -1:] + LinearAttention.EPS)).to(dtype)
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], HEAD_WIDTH, dtype=dtype, device=q.device)
    averages_into(out, q, state)
    return out.flatten(2)


def averages_into(out: Tensor, q: Tensor, state: Tensor) -> None:
    """`averages` in out (B, N, h, 32), where neither a gradient nor a compiler asks for them."""
    parts = q.new_empty(*q.shape[:3], HEAD_WIDTH + 1)
    _multiply(q, state, parts)
    numerators, denominators = parts.split_with_sizes((HEAD_WIDTH, 1), -1)
    torch.div(numerators, denominators.add_(LinearAttention.EPS), out=out.transpose(1, 2))


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a (B, h, i, j) times b (B, h, j, k) into out. Of one sample at a time, heads are read where they lie among the tokens."""
    if a.shape[0] <= FEW_SAMPLES:
        for left, right, into in zip(a.unbind(0), b.unbind(0), out.unbind(0), strict=True):
            torch.bmm(left, right, out=into)
    else:
        torch.matmul(a, b, out=out)


class CrossAttention(nn.Module):
    """Softmax attention of image tokens to text tokens. Keys and values depend on the text alone."""

    to_q, to_k, to_v, to_out, norm_q, norm_k = parts(6)

    def __init__(self, width: int, heads: int, qk_norm: bool, build: Build) -> None:
        super().__init__()
        self.head_width = width // heads
        self.qk_norm = qk_norm
        self.to_q = build.linear(width, width)
        self.to_k = build.linear(width, width)
        self.to_v = build.linear(width, width)
        # NVlabs/Sana diffusion/model/nets/sana_blocks.py: 1e-6 here, unlike the 1e-5 of self-attention
        self.norm_q = build.rms_norm(width, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = build.rms_norm(width, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([build.linear(width, width)])

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, h, L, d), of projected text (B, L, D)."""
        k = split_heads(self.norm_k(self.to_k(text)), self.head_width)
        return k, split_heads(self.to_v(text), self.head_width)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        """x: (B, N, D); k, v: (B, h, L, d); mask: (B, 1, 1, L) bool, True where a token counts. Returns (B, N, D)."""
        q = self.to_q(x)
        q = split_heads(self.norm_q(q) if self.qk_norm else q, self.head_width)
        return last(self.to_out)(merge_heads(attention(q, k, v, mask)))


class MixFFN(nn.Module):
    """Gated feed-forward layer with a 3x3 depthwise convolution, the only layer that sees neighbours (arXiv 2410.10629,
    section 3.2)."""

    conv_inverted, conv_depth, conv_point = parts(3)

    def __init__(self, width: int, inner: int, build: Build) -> None:
        super().__init__()
        self.conv_inverted = build.linear(width, 2 * inner)
        self.conv_depth = build.conv(2 * inner, 2 * inner, 3, groups=2 * inner)
        self.conv_point = build.linear(inner, width, bias=False)

    def forward(self, x: Tensor, columns: int, rows: slice = slice(None)) -> Tensor:
        """x: (B, N, D), N = H * columns. Returns the result for the given rows only: (B, rows * columns, D)."""
        inplace = may_write()
        x = F.silu(self.conv_inverted(x), inplace)
        x = torch.unflatten(x, 1, (-1, columns)).permute(0, 3, 1, 2)  # (B, 2 * inner, H, W), channels last in memory
        x = self.conv_depth(x).permute(0, 2, 3, 1)[:, rows].flatten(1, 2)
        value, gate = x.chunk(2, dim=-1)
        return self.conv_point(value * F.silu(gate, inplace))


class SinusoidEmbedding(nn.Module):
    """A number as 256 cosines and sines and two linear layers (NVlabs/Sana sana_blocks.py, TimestepEmbedder)."""

    def __init__(self, width: int, build: Build) -> None:
        super().__init__()
        self.linear_1 = build.linear(TIME_FREQUENCIES, width)
        self.linear_2 = build.linear(width, width)

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """value: (B,). Returns (B, D) in dtype; the sines are computed in float32."""
        half = TIME_FREQUENCIES // 2
        frequencies = torch.exp(
            torch.arange(half, dtype=torch.float32, device=value.device) * (-math.log(10000.0) / half)
        )
        angles = value.float()[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class TextProjection(nn.Module):
    """Text encoder states to transformer width: two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, text_width: int, width: int, build: Build) -> None:
        super().__init__()
        self.linear_1 = build.linear(text_width, width)
        self.linear_2 = build.linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        """text: (B, L, text_width). Returns (B, L, D)."""
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))
