"""The layers, encoder and decoder of the deep-compression autoencoder (DC-AE, arXiv 2410.10733).

Attribute names are those of diffusers checkpoints. Activations are (B, C, H, W) with channels last in memory, so that a
norm over channels reads one run of memory and convolutions take their fastest layout. Modules here process an image at
once; `streaming.py` computes the same from the same modules a few rows at a time.

For that, each says right below its `forward`, in a method named `*_op`, how far its rows reach and how many numbers are
alive at its worst moment, as counted from the `forward`. Who edits the one has to count the other again; tests compare
it with measured peaks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import HEAD_WIDTH, AutoencoderConfig, StageConfig
from .layers import Build, averages, averages_into, may_write, sums
from .resampling import (
    add_averaged,
    add_shuffled,
    nearest_operations,
    pixel_shuffle,
    pixel_unshuffle,
    place_phases,
)
from .rows import RowOp

ACTIVATIONS = {"silu": F.silu, "relu": F.relu}
NORM_EPS = 1e-5
NORM_KERNEL_DEVICES = ("cuda", "meta") if hasattr(torch, "_fused_rms_norm") else ()  # PyTorch 2.9 and newer have one
EXPANSION = 4  # inner width of a GLUMBConv over its width


class ChannelNorm(nn.Module):
    """RMSNorm over the channels of each pixel, with weight and bias.

    Source: mit-han-lab/efficientvit, models/nn/norm.py, "trms2d".
    """

    def __init__(self, width: int, build: Build) -> None:
        super().__init__()
        self.weight = build.parameter(width)
        self.bias = build.parameter(width)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (B, C, H, W). Returns the normalised x, plus the residual. Statistics are at least float32."""
        return self.by_kernel(x, residual) if x.device.type in NORM_KERNEL_DEVICES else self.by_steps(x, residual)

    def by_kernel(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """By PyTorch's norm, which is one kernel on some devices. On others it computes all of x in float32."""
        normed = F.rms_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight.to(x), NORM_EPS).permute(0, 3, 1, 2)
        if residual is not None:
            normed += residual
        return normed.add_(self.bias.to(x)[:, None, None])

    def by_steps(self, x: Tensor, residual: Tensor | None) -> Tensor:
        weight, bias = self.weight.to(x)[:, None, None], self.bias.to(x)[:, None, None]
        precision = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=precision)
        inverse = torch.rsqrt(length.square() / x.shape[1] + NORM_EPS).to(x.dtype)
        if residual is None:
            return torch.addcmul(bias, x * inverse, weight)
        return torch.addcmul(residual, x * inverse, weight).add_(bias)


def channel_norm(width: int, batch_norm: bool, build: Build) -> nn.Module:
    if batch_norm:
        return nn.BatchNorm2d(width, eps=NORM_EPS, dtype=build.dtype, device=build.device)
    return ChannelNorm(width, build)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around an activation, a norm, and a shortcut."""

    def __init__(self, stage: StageConfig, build: Build) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[stage.activation]
        self.conv1 = build.conv(stage.width, stage.width, 3)
        self.conv2 = build.conv(stage.width, stage.width, 3, bias=False)
        self.norm = channel_norm(stage.width, stage.batch_norm, build)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.activation(self.conv1(x), inplace=not torch.is_grad_enabled()))
        return self.norm(out, x) if isinstance(self.norm, ChannelNorm) else self.norm(out) + x

    def row_op(self) -> RowOp:
        """Two 3x3 convolutions. Alive: what the norm takes, its product and its sum; a tenth for its statistics."""
        width = self.conv1.in_channels
        return RowOp(self, width, width, radius=2, live=3.1 * width, fixed=weight_copies(self))


class MultiscaleProjection(nn.Module):
    """One scale of the attention: neighbouring queries, keys and values mixed per channel, then within each head."""

    def __init__(self, width: int, kernel: int, build: Build) -> None:
        super().__init__()
        self.proj_in = build.conv(width, width, kernel, groups=width, bias=False)
        self.proj_out = build.conv(width, width, 1, groups=width // HEAD_WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x))


class MultiscaleLinearAttention(nn.Module):
    """ReLU linear attention over all positions and several scales (efficientvit models/nn/ops.py, LiteMLA).

    As in the transformer, the sum over positions, `state`, is separate from its use, `attend`.
    """

    def __init__(self, stage: StageConfig, build: Build) -> None:
        super().__init__()
        width, branches = stage.width, 1 + len(stage.scales)
        # Not queries, keys and values: consecutive thirds of one projection, per head 32 channels each of q, k and v
        self.to_q = build.linear(width, width, bias=False)
        self.to_k = build.linear(width, width, bias=False)
        self.to_v = build.linear(width, width, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(
            MultiscaleProjection(3 * width, kernel, build) for kernel in stage.scales
        )
        self.to_out = build.linear(branches * width, width, bias=False)
        self.norm_out = channel_norm(width, stage.batch_norm, build)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns the same shape, with its shortcut."""
        scales = self.project(x)
        return self.attend(x, scales, torch.cat([self.state(qkv) for qkv in scales], dim=1))

    def project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values of every head of x (B, C, H, W), for each scale (B, H, W, h, 96)."""
        pixels = x.permute(0, 2, 3, 1)
        fused = torch.cat([self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)], dim=-1)
        planes = fused.permute(0, 3, 1, 2)
        scales = [fused, *(scale(planes).permute(0, 2, 3, 1) for scale in self.to_qkv_multiscale)]
        return [scale.unflatten(-1, (-1, 3 * HEAD_WIDTH)) for scale in scales]

    @staticmethod
    def state(qkv: Tensor) -> Tensor:
        """Sum over positions of qkv (B, H, W, h, 96) of k^T [v, 1], float32: (B, h, 32, 33). Those of parts add up."""
        _, k, v = qkv.flatten(1, 2).transpose(1, 2).chunk(3, dim=-1)  # each (B, h, H * W, 32)
        return sums(_precise(k).relu(), _precise(v)).float()

    def attend(self, x: Tensor, scales: list[Tensor], state: Tensor) -> Tensor:
        """x: (B, C, H, W) and its projection; state: of all positions and scales. Returns the shape of x."""
        queries = (_precise(qkv[..., :HEAD_WIDTH].flatten(1, 2)).relu().transpose(1, 2) for qkv in scales)
        pairs = ((q, part.to(q)) for q, part in zip(queries, state.chunk(len(scales), dim=1), strict=True))
        if not may_write():
            out = torch.cat([averages(q, part, x.dtype) for q, part in pairs], dim=-1)
        else:
            out = x.new_empty(len(x), x.shape[2] * x.shape[3], state.shape[1], HEAD_WIDTH)
            for (q, part), place in zip(pairs, out.chunk(len(scales), dim=2), strict=True):
                averages_into(place, q, part)
        out = out.view(len(x), *x.shape[2:], -1)
        return self.norm_out(self.to_out(out).permute(0, 3, 1, 2), x)

    def projection_op(self, itemsize: int) -> RowOp:
        """`project`, with planes (1, h * 96, rows, W) as output rows, and room to form their `state`.

        itemsize: bytes of a number. Alive, in widths of a scale: the parts and their concatenation, 3 + 3; then that
        and, for the state, keys before and after their ReLU and values, all in float32, 3 + 3.
        """
        width, scales = self.to_q.in_features, 1 + len(self.to_qkv_multiscale)
        radius = max((scale.proj_in.kernel_size[0] // 2 for scale in self.to_qkv_multiscale), default=0)
        return RowOp(
            lambda rows: torch.cat(self.project(rows), dim=3).flatten(3).permute(0, 3, 1, 2),
            width,
            3 * scales * width,
            radius=radius,
            live=scales * width * max(6, 3 + 3 * 4 / itemsize),
        )

    def attention_op(self, state: Tensor | None, itemsize: int) -> RowOp:
        """`project` and `attend` with the state of all positions; None: to count memory only.

        itemsize: bytes of a number. Alive, in widths of a scale: queries, keys and values, and the result, 4; in float32,
        of one scale at a time, queries, sums and quotients, 3.1 with the denominators.
        """
        projection, width, scales = self.projection_op(itemsize), self.to_q.in_features, 1 + len(self.to_qkv_multiscale)
        live = width * (4 * scales + 3.1 * 4 / itemsize)
        return projection._replace(
            apply=lambda rows: self.attend(rows, self.project(rows), state),
            outputs=width,
            live=max(live, projection.live),
        )


def _precise(x: Tensor) -> Tensor:
    """In float32 on a CPU, which is slow in less, and from float16, which overflows; a GPU adds up bfloat16 in float32."""
    return x.float() if x.dtype == torch.float16 or (x.is_cpu and x.dtype == torch.bfloat16) else x


class GLUMBConv(nn.Module):
    """Gated feed-forward layer with a 3x3 depthwise convolution, a norm and a shortcut."""

    def __init__(self, width: int, build: Build) -> None:
        super().__init__()
        inner = EXPANSION * width
        self.conv_inverted = build.conv(width, 2 * inner, 1)
        self.conv_depth = build.conv(2 * inner, 2 * inner, 3, groups=2 * inner)
        self.conv_point = build.conv(inner, width, 1, bias=False)
        self.norm = ChannelNorm(width, build)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.conv_inverted(x), inplace=not torch.is_grad_enabled())
        inner = self.conv_depth(inner)
        value, gate = inner.chunk(2, dim=1)
        return self.norm(self.conv_point(value * F.silu(gate)), x)

    def row_op(self) -> RowOp:
        """One 3x3 convolution. Alive: value and gate before and after it, each of the inner width; a tenth more."""
        width = self.conv_inverted.in_channels
        return RowOp(self, width, width, radius=1, live=4.1 * EXPANSION * width, fixed=weight_copies(self))


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention and a GLUMBConv, each with its shortcut."""

    def __init__(self, stage: StageConfig, build: Build) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(stage, build)
        self.conv_out = GLUMBConv(stage.width, build)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class Down(nn.Module):
    """Half the size per side: a convolution, and a shortcut that averages groups of the rearranged channels."""

    def __init__(self, inputs: int, outputs: int, strided: bool, build: Build, shortcut: bool = True) -> None:
        super().__init__()
        self.strided = strided
        self.shortcut = shortcut
        self.conv = build.conv(inputs, outputs, 3, stride=2) if strided else build.conv(inputs, outputs // 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) with even H and W. Returns (B, outputs, H / 2, W / 2)."""
        out = self.conv(x) if self.strided else pixel_unshuffle(self.conv(x))
        return add_averaged(out, x) if self.shortcut else out

    def row_op(self) -> RowOp:
        """One 3x3 convolution. Alive: x rearranged; out, the shortcut and their sum, of a quarter of the pixels."""
        inputs, outputs = self.conv.in_channels, self.conv.out_channels * (1 if self.strided else 4)
        live = inputs + 0.75 * outputs
        return RowOp(self, inputs, outputs, radius=1, down=2, live=live, fixed=weight_copies(self))


class Up(nn.Module):
    """Twice the size per side: a convolution, and a shortcut that repeats and rearranges channels."""

    def __init__(self, inputs: int, outputs: int, nearest: bool, build: Build, shortcut: bool = True) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.nearest = nearest
        if nearest:
            build = build._replace(operations=nearest_operations(build.operations))
        self.conv = build.conv(inputs, outputs if nearest else 4 * outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (B, outputs, 2H, 2W)."""
        out, added = self.conv(x), x if self.shortcut else None
        if self.nearest:
            return place_phases(out, added)
        return pixel_shuffle(out) if added is None else add_shuffled(pixel_shuffle(out), added)

    def row_op(self) -> RowOp:
        """One 3x3 convolution. Alive: its result and that rearranged, of four times the pixels, and some for the rim.

        The convolution of nearest neighbours has weights of its own: four of 2x2, which are copied once.
        """
        inputs, outputs = self.conv.in_channels, self.conv.out_channels // (1 if self.nearest else 4)
        fixed = max(weight_copies(self), 2 * 16 * inputs * outputs if self.nearest else 0)
        return RowOp(self, inputs, outputs, radius=1, up=2, live=8.5 * outputs, fixed=fixed)


class Encoder(nn.Module):
    """Image to latent."""

    def __init__(self, config: AutoencoderConfig, build: Build) -> None:
        super().__init__()
        stages = config.encoder
        self.shortcut = config.shortcuts
        if stages[0].depth:
            self.conv_in = build.conv(3, stages[0].width, 3)
        else:
            self.conv_in = Down(3, stages[1].width, config.strided_down, build, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for stage, deeper in zip(stages, (*stages[1:], None), strict=True):
            blocks = [block(stage, build) for _ in range(stage.depth)]
            if blocks and deeper is not None:
                blocks.append(Down(stage.width, deeper.width, config.strided_down, build))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = build.conv(stages[-1].width, config.latent_channels, 3)

    def forward(self, image: Tensor) -> Tensor:
        """image: (B, 3, height, width). Returns (B, latent channels, H, W)."""
        x = self.conv_in(image)
        for stage in self.down_blocks:
            x = stage(x)
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        """Features of the deepest stage to a latent. The shortcut averages consecutive channels."""
        out = self.conv_out(x)
        return out + x.unflatten(1, (out.shape[1], -1)).mean(dim=2) if self.shortcut else out

    def head_op(self) -> RowOp:
        """One 3x3 convolution. Alive: the latent and its shortcut, which are narrower than x; twice x is ample."""
        width, latent = self.conv_out.in_channels, self.conv_out.out_channels
        return RowOp(self.head, width, latent, radius=1, live=2 * width, fixed=weight_copies(self.conv_out))


class Decoder(nn.Module):
    """Latent to image."""

    def __init__(self, config: AutoencoderConfig, build: Build) -> None:
        super().__init__()
        stages = config.decoder
        self.shortcut = config.shortcuts
        self.activation = ACTIVATIONS[config.out_activation]
        self.conv_in = build.conv(config.latent_channels, stages[-1].width, 3)
        self.up_blocks = nn.ModuleList()
        for stage, deeper in zip(stages, (*stages[1:], None), strict=True):
            blocks = [block(stage, build) for _ in range(stage.depth)]
            if blocks and deeper is not None:
                blocks.insert(0, Up(deeper.width, stage.width, config.nearest_up, build))
            self.up_blocks.append(nn.Sequential(*blocks))
        width = stages[0].width if stages[0].depth else stages[1].width
        self.norm_out = ChannelNorm(width, build)
        if stages[0].depth:
            self.conv_out = build.conv(width, 3, 3)
        else:
            self.conv_out = Up(width, 3, config.nearest_up, build, shortcut=False)

    def forward(self, ae_latent: Tensor) -> Tensor:
        """ae_latent: (B, latent channels, H, W). Returns (B, 3, height, width)."""
        x = self.stem(ae_latent)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.head(x)

    def stem(self, ae_latent: Tensor) -> Tensor:
        """Latent to features of the deepest stage. The shortcut repeats each channel."""
        out = self.conv_in(ae_latent)
        repeats = out.shape[1] // ae_latent.shape[1]
        return out + ae_latent.repeat_interleave(repeats, dim=1) if self.shortcut else out

    def stem_op(self) -> RowOp:
        """One 3x3 convolution. Alive: its result, the shortcut and their sum."""
        latent, width = self.conv_in.in_channels, self.conv_in.out_channels
        return RowOp(self.stem, latent, width, radius=1, live=3 * width, fixed=weight_copies(self.conv_in))

    def head(self, x: Tensor) -> Tensor:
        """Features of the shallowest stage to an image."""
        return self.conv_out(self.activation(self.norm_out(x)))

    def head_op(self) -> RowOp:
        """That of `conv_out`, a convolution or an Up. Alive beside it: the norm's result and the activation's."""
        out = row_op(self.conv_out)
        return out._replace(apply=self.head, live=2 * out.inputs + out.live)


def block(stage: StageConfig, build: Build) -> nn.Module:
    return EfficientViTBlock(stage, build) if stage.attention else ResBlock(stage, build)


def row_op(module: nn.Module) -> RowOp:
    """A module without attention as a row operation: as it says itself, or a 3x3 convolution with its result alive."""
    if not isinstance(module, nn.Conv2d):
        return module.row_op()
    inputs, outputs = module.in_channels, module.out_channels
    return RowOp(module, inputs, outputs, radius=1, live=outputs, fixed=weight_copies(module))


def weight_copies(module: nn.Module) -> int:
    """Numbers that a convolution may take to copy its weights into other layouts: two copies of a module's largest."""
    return 2 * max(parameter.numel() for parameter in module.parameters())
