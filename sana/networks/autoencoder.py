"""The deep-compression autoencoder (DC-AE, arXiv 2410.10733): images to latents 32 times smaller per side, and back."""

from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor, nn

from ..config import AutoencoderConfig
from .allocator import giving_back
from .autoencoder_layers import Decoder, Encoder
from .devices import free_bytes
from .layers import Build
from .memory import Run, run_within_memory
from .operations import Operations
from .streaming import stream, suitable_bound

LARGE_PIXELS = 2**23  # pictures with fewer have no tensor of 2^31 numbers


class DCAutoencoder(nn.Module):
    """DC-AE: encoder and decoder. Deterministic, without a scale: multiply by `config.latent_scale` for the transformer."""

    def __init__(
        self,
        config: AutoencoderConfig,
        *,
        operations: type | ModuleType = Operations,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        build = Build(operations, dtype, device)
        self.encoder = Encoder(config, build)
        self.decoder = Decoder(config, build)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm_out.weight.dtype

    def encode(self, image: Tensor, max_bytes: int | None = None) -> Tensor:
        """image: (B, 3, height, width) in [-1, 1], sides divisible by config.downsample. Returns ae_latent (B, C, H, W).

        max_bytes: bound on the working memory beyond input, output and weights; None: as much as it takes. The result is
        the same. Raises ValueError for a wrong shape, or for a bound below the smallest that works.
        """
        factor = self.config.downsample
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"an image batch has shape (B, 3, height, width), not {tuple(image.shape)}")
        height, width = image.shape[-2:]
        if not height or not width or height % factor or width % factor:
            raise ValueError(
                f"image of {height}x{width} px: both sides must be positive multiples of {factor}; crop or resize it"
            )
        return self._run(self.encoder, image, max_bytes)

    def decode(self, ae_latent: Tensor, max_bytes: int | None = None) -> Tensor:
        """ae_latent: (B, C, H, W). Returns the image (B, 3, height, width), near [-1, 1] but not clamped.

        max_bytes: as for `encode`. Raises ValueError likewise.
        """
        self.check_latent(ae_latent)
        return self._run(self.decoder, ae_latent, max_bytes)

    def check_latent(self, ae_latent: Tensor) -> None:
        """Raises ValueError for a latent of another shape than `decode` takes."""
        channels = self.config.latent_channels
        if ae_latent.ndim != 4 or ae_latent.shape[1] != channels or not ae_latent.numel():
            raise ValueError(
                f"a latent of this autoencoder has shape (B, {channels}, H, W), not {tuple(ae_latent.shape)}; "
                "it was made by another model"
            )

    def _run(self, network: Encoder | Decoder, x: Tensor, max_bytes: int | None) -> Tensor:
        pixels = x.shape[-2] * x.shape[-1] * (self.config.downsample**2 if network is self.decoder else 1)
        if max_bytes is None and pixels >= LARGE_PIXELS:
            max_bytes = suitable_bound(network, x.shape, self.dtype)
        if max_bytes is not None:
            return stream(network, x, self.dtype, max_bytes)
        out = network(x.to(self.dtype, memory_format=torch.channels_last))
        return out.to(x.dtype, memory_format=torch.contiguous_format)


def encode_within_memory(autoencoder: DCAutoencoder, image: Tensor, max_bytes: int | None = None) -> Tensor:
    """`autoencoder.encode` within what is free. After running out of memory, again within half as much.

    Raises ValueError as it does, and for numbers that are not finite.
    """
    return _within_memory(autoencoder.encode, autoencoder.encoder, image, autoencoder.dtype, max_bytes)


def decode_within_memory(autoencoder: DCAutoencoder, ae_latent: Tensor, max_bytes: int | None = None) -> Tensor:
    """`autoencoder.decode` within what is free. After running out of memory, again within half as much.

    Raises ValueError as it does, and for numbers that are not finite.
    """
    return _within_memory(autoencoder.decode, autoencoder.decoder, ae_latent, autoencoder.dtype, max_bytes)


def _within_memory(
    run: Run, network: Encoder | Decoder, x: Tensor, dtype: torch.dtype, max_bytes: int | None
) -> Tensor:
    device = next(network.parameters()).device
    residence = nullcontext() if max_bytes is None or device.type != "cpu" else giving_back()
    if max_bytes is None:  # not left to an error: drivers may take memory of the CPU instead, which is far slower
        max_bytes = suitable_bound(network, x.shape, dtype, free_bytes(device))
    with residence:
        return check_finite(next(run_within_memory(run, network, [x], dtype, max_bytes)), dtype)


def check_finite(result: Tensor, dtype: torch.dtype) -> Tensor:
    """An image or a latent as it is. Raises ValueError if its numbers have broken down, which would be a black picture."""
    if not bool(torch.isfinite(result).all()):
        raise ValueError(
            f"the autoencoder gave numbers that are not finite, computing in {dtype}; its file is damaged, or what it was "
            "given: try another file or picture"
        )
    return result
