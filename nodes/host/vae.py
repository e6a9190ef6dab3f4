"""The DC-AE as a VAE of the host. Every way of encoding and decoding gives the same pixels; only the memory differs."""

import logging
import math
from contextlib import nullcontext
from pathlib import Path

import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

from ...sana.checkpoints.autoencoder import autoencoder_tensors, check_autoencoder, detect_autoencoder
from ...sana.checkpoints.files import CheckpointError, TensorFile, read_tensors
from ...sana.checkpoints.filling import check_tensors
from ...sana.config import AUTOENCODER_SOURCE, LATENT_CHANNELS, LATENT_SCALE, TransformerConfig
from ...sana.networks.autoencoder import DCAutoencoder, check_finite
from ...sana.networks.autoencoder_layers import Decoder, Encoder
from ...sana.networks.devices import FREE_SHARE
from ...sana.networks.memory import GIB, Run, is_out_of_memory, run_within_memory
from ...sana.networks.streaming import least_bytes, suitable_bound, whole_bytes
from .mapping import mapped_by_host

SMALL_BYTES = GIB  # bound for the nodes that are called tiled; and the host is asked to free no more beforehand
WORKING_DTYPES = [torch.bfloat16, torch.float32]  # float16 overflows: black pictures


class SanaVAE(comfy.sd.VAE):
    """A DC-AE. LATENT holds its own latents, (B, 32, height / 32, width / 32); IMAGE is (B, height, width, 3) in [0, 1]."""

    def __init__(self, file: TensorFile, dtype: torch.dtype | None = None, *, disable_dynamic: bool = False) -> None:
        """dtype: of weights and activations; None: what the host prefers. Raises CheckpointError as `load_autoencoder`."""
        _set_host_attributes(self)
        tensors = autoencoder_tensors(file)
        config = detect_autoencoder(tensors, file)
        if config.latent_channels != LATENT_CHANNELS:
            raise CheckpointError(
                f"{file.path.name} has {config.latent_channels} latent channels, and SANA takes {LATENT_CHANNELS}; "
                "give a DC-AE f32c32"
            )
        check_tensors(DCAutoencoder(config, device="meta").state_dict(), tensors, file.path.name)
        self.config = config
        self.latent_channels, self.latent_dim, self.output_channels = config.latent_channels, 2, 3
        self.downscale_ratio = self.upscale_ratio = config.downsample
        self.working_dtypes = WORKING_DTYPES
        self.device = management.vae_device()
        self.vae_dtype = dtype or _preferred_dtype(self.device)
        self.output_device = management.intermediate_device()
        self.memory_used_encode = lambda shape, dtype: self.working_bytes(self.first_stage_model.encoder, shape)
        self.memory_used_decode = lambda shape, dtype: self.working_bytes(self.first_stage_model.decoder, shape)
        self.first_stage_model = DCAutoencoder(
            config, operations=comfy.ops.disable_weight_init, dtype=self.vae_dtype
        ).eval()
        management.archive_model_dtypes(self.first_stage_model)
        patchers = comfy.model_patcher
        patcher_class = patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
        self.patcher = patcher_class(self.first_stage_model, self.device, management.vae_offload_device())
        self.first_stage_model.load_state_dict(tensors, strict=True, assign=self.patcher.is_dynamic())
        if not self.patcher.is_dynamic():
            self.first_stage_model.to(self.vae_dtype)  # layers that are made late have the dtype of the file
        self.patcher.cached_patcher_init = (_load_patcher, (file.path, dtype))

    def decode(
        self, samples_in: Tensor, vae_options: dict[str, object] | None = None, max_bytes: int | None = None
    ) -> Tensor:
        """max_bytes: bound on the working memory; None: what is free. Raises ValueError for latents of another model."""
        model = self.first_stage_model
        model.check_latent(samples_in)
        images = self._run(model.decoder, model.decode, samples_in, max_bytes)
        return self.process_output(images).movedim(1, -1)

    def encode(self, pixel_samples: Tensor, max_bytes: int | None = None) -> Tensor:
        """Pictures are cut to a multiple of 32 px, as by every VAE of the host. max_bytes: as for `decode`."""
        model = self.first_stage_model
        pixels = self.process_input(self._cut(pixel_samples))
        return self._run(model.encoder, model.encode, pixels, max_bytes)

    def decode_tiled(self, samples: Tensor, *tiles: int | None, **named_tiles: int | None) -> Tensor:
        """`decode` in little memory. Tiles are not needed for that, and their sizes mean nothing here."""
        self.first_stage_model.check_latent(samples)
        return self.decode(samples, max_bytes=self._small(self.first_stage_model.decoder, samples.shape))

    def encode_tiled(self, pixel_samples: Tensor, *tiles: int | None, **named_tiles: int | None) -> Tensor:
        """`encode` in little memory."""
        shape = self._cut(pixel_samples).shape
        return self.encode(pixel_samples, max_bytes=self._small(self.first_stage_model.encoder, shape))

    def _cut(self, pictures: Tensor) -> Tensor:
        """IMAGE (B, height, width, 3) as (B, 3, height, width), cut to multiples of 32 px. Raises ValueError below 32 px."""
        cut = self.vae_encode_crop_pixels(pictures).movedim(-1, 1)
        if 0 in cut.shape[-2:]:
            height, width = pictures.shape[1:3]
            raise ValueError(
                f"the picture has {width} x {height} px; both sides must be at least {self.downscale_ratio} px"
            )
        return cut

    def working_bytes(self, network: Encoder | Decoder, shape: torch.Size) -> int:
        """What the host should free before an input of this shape: all it takes, or the small bound if that is less."""
        return min(whole_bytes(network, shape, self.vae_dtype), self._small(network, shape))

    def _small(self, network: Encoder | Decoder, shape: torch.Size) -> int:
        return max(SMALL_BYTES, least_bytes(network, shape, self.vae_dtype))

    def _run(self, network: Encoder | Decoder, run: Run, x: Tensor, max_bytes: int | None) -> Tensor:
        """Encode or decode a batch, one image at a time. After running out of memory, go on within half as much."""

        def run_one(part: Tensor, bound: int | None) -> Tensor:
            out = check_finite(run(part.to(self.device, self.vae_dtype), bound), self.vae_dtype)
            return out.to(self.output_device, self.vae_output_dtype())

        least = least_bytes(network, x.shape, self.vae_dtype)
        if max_bytes is not None and max_bytes < least:
            raise ValueError(
                f"{max_bytes / GIB:.3f} GiB of working memory are too little for this size; "
                f"it takes at least {math.ceil(1000 * least / GIB) / 1000} GiB"
            )
        needed = max_bytes or self.working_bytes(network, x.shape)
        management.load_models_gpu([self.patcher], memory_required=needed)
        bound = max_bytes or self._free_bound(network, x.shape)
        with _device_context(self.device):
            parts = run_within_memory(
                run_one,
                network,
                x.split(1),
                self.vae_dtype,
                bound,
                is_scarce=_is_out_of_memory,
                make_room=management.soft_empty_cache,
            )
            return torch.cat([*parts])

    def _free_bound(self, network: Encoder | Decoder, shape: torch.Size) -> int | None:
        """A bound that suits what is free now, or what the host would free of other models; None: all at once."""
        free = int(FREE_SHARE * self.patcher.get_free_memory(self.device))
        return suitable_bound(network, shape, self.vae_dtype, free)


def load_vae(
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    transformer: TransformerConfig | None = None,
    disable_dynamic: bool = False,
) -> SanaVAE:
    """The DC-AE in a file or folder as a VAE.

    transformer: for whose latents it must be made; None: for any. Raises CheckpointError if there is none, or for other
    latents: DC-AEs of several families have the same shapes, and the scale of their latents tells them apart.
    """
    file = read_tensors(path, "vae", mapped=mapped_by_host())
    if transformer is not None:
        config = detect_autoencoder(autoencoder_tensors(file), file)
        check_autoencoder(config, transformer, file.path.name)
        if not math.isclose(config.latent_scale, LATENT_SCALE, rel_tol=1e-3):
            raise CheckpointError(
                f"{file.path.name} is a DC-AE of another family, with latents scaled by {config.latent_scale:g} instead of "
                f"{LATENT_SCALE}; give one that SANA was trained with, such as {AUTOENCODER_SOURCE}"
            )
    return SanaVAE(file, dtype, disable_dynamic=disable_dynamic)


def _load_patcher(
    path: Path, dtype: torch.dtype | None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    return load_vae(path, dtype, disable_dynamic=disable_dynamic).patcher


def _preferred_dtype(device: torch.device) -> torch.dtype:
    """What the host prefers of WORKING_DTYPES. Told to compute every VAE in float16, it does not look at them."""
    preferred = management.vae_dtype(device, WORKING_DTYPES)
    if preferred in WORKING_DTYPES:
        return preferred
    return torch.bfloat16 if management.should_use_bf16(device) else torch.float32


def _set_host_attributes(vae: comfy.sd.VAE) -> None:
    """Everything the host gives a VAE. Its own constructor does that for a file it does not know, and says so in the log."""
    root = logging.getLogger()
    root.addFilter(_is_not_about_empty_files)
    try:
        comfy.sd.VAE.__init__(vae, sd={})
    finally:
        root.removeFilter(_is_not_about_empty_files)


def _is_not_about_empty_files(record: logging.LogRecord) -> bool:
    return "No VAE weights detected" not in record.getMessage()


def _is_out_of_memory(error: Exception) -> bool:
    """As the host says, which clears such an error away, or as a library below PyTorch does."""
    return management.is_oom(error) or is_out_of_memory(error)


def _device_context(device: torch.device) -> object:
    """The host's context for one of several devices; older hosts have none."""
    return getattr(management, "cuda_device_context", lambda device: nullcontext())(device)
