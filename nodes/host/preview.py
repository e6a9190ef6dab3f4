"""Previews: TAESANA where the person chose TAESD and has its file, else a linear map fitted to the autoencoder at hand."""

import logging
from collections.abc import Callable
from pathlib import Path

import comfy.model_management as management
import comfy.patcher_extension
import folder_paths
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ...sana.checkpoints.files import CheckpointError
from ...sana.checkpoints.tiny_decoder import SOURCE, load_tiny_decoder
from ...sana.networks.previews import LinearPreview, fit_preview
from ...sana.networks.tiny_decoder import TinyDecoder
from .extension import extend
from .model import SanaLatentFormat
from .sampler import sana_model
from .vae import SanaVAE

log = logging.getLogger(__name__)

FOLDER, DECODER = "vae_approx", "taesana_decoder"
MOST_CELLS = 64 * 64  # of a latent that TAESANA draws, 2048 x 2048 px: some 2 GB of working memory in 16 bits


def fitted_preview(vae: SanaVAE) -> LinearPreview:
    return fit_preview(lambda image: vae.encode((image.movedim(1, -1) + 1) / 2) * vae.config.latent_scale)


def show_previews(patcher: ModelPatcher, preview: LinearPreview) -> None:
    """Let the host draw previews of latents of a MODEL with this map, also where it loads it anew to compile it."""
    _set_factors(patcher.model.latent_format, preview)
    on_clone = comfy.patcher_extension.CallbacksMP.ON_CLONE
    patcher.add_callback(on_clone, lambda original, clone: _set_factors(clone.model.latent_format, preview))


def _set_factors(latent_format: LatentFormat, preview: LinearPreview) -> None:
    latent_format.latent_rgb_factors = torch.eye(3).tolist()
    latent_format.latent_rgb_factors_bias = [0.0, 0.0, 0.0]
    latent_format.latent_rgb_factors_reshape = preview


def extend_previews() -> None:
    """The host's own network for TAESD previews gives 8x8 px a cell; TAESANA is another, with 32x32."""
    extend(latent_preview, "get_previewer", _get_previewer)


class TinyPreviewer(latent_preview.LatentPreviewer):
    """The first latent of a batch by TAESANA. linear: the previewer for latents beyond MOST_CELLS, if there is one."""

    def __init__(self, decoder: TinyDecoder, linear: latent_preview.LatentPreviewer | None) -> None:
        self.decoder, self.linear = decoder, linear

    def decode_latent_to_preview(self, x0: Tensor) -> Image.Image:
        return latent_preview.preview_to_image(_drawn(self.decoder, x0[:1])[0].movedim(0, -1))

    def decode_latent_to_preview_image(self, preview_format: str, x0: Tensor) -> tuple[str, Image.Image, int] | None:
        if not _is_large(x0):
            return super().decode_latent_to_preview_image(preview_format, x0)
        return self.linear and self.linear.decode_latent_to_preview_image(preview_format, x0)


def _get_previewer(
    original: Callable[..., latent_preview.LatentPreviewer | None],
    device: torch.device,
    latent_format: LatentFormat,
    *others: object,
    **named: object,
) -> latent_preview.LatentPreviewer | None:
    chosen = latent_preview.args.preview_method == LatentPreviewMethod.TAESD
    if not chosen or not isinstance(latent_format, SanaLatentFormat):
        return original(device, latent_format, *others, **named)
    linear = _linear(latent_format)
    decoder = _decoder(device)
    return linear if decoder is None else TinyPreviewer(decoder, linear)


def _linear(latent_format: SanaLatentFormat) -> latent_preview.LatentPreviewer | None:
    """None for a transformer that was loaded without its autoencoder."""
    if latent_format.latent_rgb_factors is None:
        return None
    return latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors,
        latent_format.latent_rgb_factors_bias,
        latent_format.latent_rgb_factors_reshape,
    )


def _decoder(device: torch.device) -> TinyDecoder | None:
    """None without a file that holds it, and the log says why: no run should end for its previews."""
    names = folder_paths.get_filename_list(FOLDER)
    path = next(filter(None, (folder_paths.get_full_path(FOLDER, n) for n in names if n.startswith(DECODER))), None)
    if path is None:
        log.info(f"models/{FOLDER} holds no {DECODER}, so previews of SANA are linear ones; put {SOURCE} there")
        return None
    dtype = torch.float16 if management.should_use_fp16(device) else torch.float32
    try:
        return load_tiny_decoder(Path(path), dtype, device)
    except CheckpointError as error:
        log.warning(f"previews of SANA are linear ones: {error}")
        return None


def _is_large(latent: Tensor) -> bool:
    return latent.shape[-2] * latent.shape[-1] > MOST_CELLS


def preview_pictures(patcher: ModelPatcher, latent: Tensor) -> Tensor:
    """IMAGE (B, h, w, 3) of a LATENT (B, 32, H, W): 32 px a cell by TAESANA if its file is there, else 4 by the linear map.

    Raises ValueError for latents of another model, and where neither is there.
    """
    latent_format = sana_model(patcher).latent_format
    sana_model(patcher).check_latent(latent.shape)
    x = latent_format.process_in(latent.float())
    decoder = None if _is_large(x) else _decoder(patcher.load_device)
    if decoder is not None:
        pictures = torch.cat([_drawn(decoder, each.to(patcher.load_device)).cpu() for each in x.split(1)])
    elif latent_format.latent_rgb_factors is not None:
        pictures = latent_format.latent_rgb_factors_reshape(x)
    else:
        raise ValueError(
            f"this MODEL came without an autoencoder, and models/{FOLDER} holds no {DECODER}; connect the MODEL of Load SANA, "
            f"or put {SOURCE} there"
        )
    return ((pictures + 1) / 2).movedim(1, -1).to(management.intermediate_device())


@torch.no_grad()
def _drawn(decoder: TinyDecoder, latent: Tensor) -> Tensor:
    """Pictures (B, 3, height, width) in [-1, 1], of the dtype of the latents."""
    return decoder(latent.to(decoder[1].weight)).to(latent.dtype)
