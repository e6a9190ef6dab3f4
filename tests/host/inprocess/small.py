"""Small random models as the graphs of these tests use them, and what `sana` says of the same weights.

Text encoder and autoencoder are those of the demo, in the host's own folders. The transformers are random: every weight and
every word has an effect, which an untrained network would not show.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import sana
from bench.weights import randomise
from sana.checkpoints.header import transformer_header
from sana.checkpoints.names import with_convolutions
from sana.config import LATENT_SCALE, VARIANTS, TransformerIdentity
from sana.loading import MODELS
from sana.networks.transformer import SanaTransformer
from sana.sampling.guidance import Condition, Guidance, guided_denoiser
from tests.host.boot import Host

PROMPT = "a red circle left of a blue square on a white background"
OTHER_PROMPT = "a large green triangle"
HEIGHT, WIDTH = 96, 128  # pixels
STEPS, SEED = 3, 7
EQUAL = 1e-4  # of latents, whose standard deviation is near 2
TEXT_WIDTH = 192  # of the demo's text encoder
VARIANT = "sana-1.6b-1024px"  # of the model that most tests use
DEMO = MODELS["demo"]
TEXT_ENCODER, AUTOENCODER = "gemma-2-small", "dc-ae-small"

Conditioning = list[list[object]]
Latent = dict[str, object]


@dataclass(frozen=True)
class Small:
    """What `SanaCheckpointLoader` gives for a small model, and the nodes that most tests need."""

    host: Host
    path: Path  # of the transformer
    model: ModelPatcher
    clip: CLIP
    vae: VAE

    @cached_property
    def positive(self) -> Conditioning:
        return self.encode(PROMPT)

    @cached_property
    def negative(self) -> Conditioning:
        return self.encode(OTHER_PROMPT, "none")

    @cached_property
    def pipeline(self) -> sana.SanaPipeline:
        return load_pipeline(self.path)

    def encode(self, text: str, instruction: str = "official", custom_instruction: str = "") -> Conditioning:
        return self.host.call(
            "GemmaTextEncode",
            clip=self.clip,
            text=text,
            instruction=instruction,
            custom_instruction=custom_instruction,
        )[0]

    def empty(self, batch_size: int = 1, height: int = HEIGHT, width: int = WIDTH) -> Latent:
        size = self.host.pack("nodes.latent").FREE
        inputs = {"size": size, "width": width, "height": height, "batch_size": batch_size}
        return self.host.call("EmptySanaLatentImage", **inputs)[0]

    def sample(self, **changes: object) -> Tensor:
        """The latents (B, 32, H, W) of `FlowDPMSampler`."""
        defaults = {"model": self.model, "positive": self.positive, "negative": self.negative, "latent": self.empty()}
        settings = {"seed": SEED, "steps": STEPS, "cfg": 4.5, "denoise": 1.0, "flow_shift": 0.0}
        return self.host.call("FlowDPMSampler", **{**defaults, **settings, **changes})[0]["samples"]

    def ksampler(self, **changes: object) -> Tensor:
        """The latents of the host's `KSampler`."""
        defaults = {"model": self.model, "positive": self.positive, "negative": self.negative}
        settings = {"seed": SEED, "steps": STEPS, "cfg": 4.5, "denoise": 1.0, "sampler_name": "euler"}
        more = {"scheduler": "simple", "latent_image": self.empty()}
        return self.host.call("KSampler", **{**defaults, **settings, **more, **changes})[0]["samples"]

    def reference(
        self,
        sampler: Callable[..., Tensor],  # a sampler function of the host, or one called in the same way
        sigmas: Tensor,
        latent: Latent,
        *,
        cfg: float = 4.5,
        positive: Conditioning | None = None,
        negative: Conditioning | None = None,
        transformer: SanaTransformer | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """What a KSampler should give: the same sampler with the network and the guidance of `sana`, without the host's."""
        samples = latent["samples"]
        noise = comfy.sample.prepare_noise(samples, SEED) if noise is None else noise
        prompts = (condition(part, len(samples)) for part in (positive or self.positive, negative or self.negative))
        denoise = guided_denoiser(transformer or self.pipeline.transformer, *prompts, Guidance(cfg))

        def model(x: Tensor, sigma: Tensor, **unused: object) -> Tensor:
            return denoise(x, sigma[0])

        x = torch.lerp(samples * LATENT_SCALE, noise, float(sigmas[0]))
        return sampler(model, x, sigmas, disable=True) / LATENT_SCALE


def condition(conditioning: Conditioning, batch_size: int = 1) -> Condition:
    """A CONDITIONING of one entry as `sana` takes it."""
    ((text, options),) = conditioning
    return Condition(text.expand(batch_size, -1, -1), options["attention_mask"].bool().expand(batch_size, -1))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference at any place; infinite if a number is not finite."""
    assert ours.shape == theirs.shape
    found = (ours.cpu().float() - theirs.cpu().float()).abs().max()
    return float(found) if bool(found.isfinite()) else float("inf")


def load_small(host: Host) -> Small:
    """Puts the parts into the folders of the host and loads them."""
    models = host.base / "models"
    shutil.copytree(DEMO / "vae", models / "vae" / AUTOENCODER)
    shutil.copytree(DEMO / "text_encoder", models / "text_encoders" / TEXT_ENCODER)
    shutil.copy(DEMO / "tokenizer" / "tokenizer.json", models / "text_encoders" / TEXT_ENCODER)
    path = write_variant(host, VARIANT)
    return Small(host, path, *load(host, path.name))


def load(host: Host, name: str, dtype: str = "fp32", **more: str) -> tuple[ModelPatcher, CLIP, VAE]:
    """`SanaCheckpointLoader`."""
    return host.call(
        "SanaCheckpointLoader", **{"model": name, "text_encoder": "auto", "vae": "auto", "dtype": dtype, **more}
    )


def limit(model: ModelPatcher, budget: int) -> ModelPatcher:
    """A copy that may keep `budget` bytes on its device, however much is free: what a small GPU makes of it."""
    clone = model.clone()
    load_part = clone.partially_load

    def partially_load(device: torch.device, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        return load_part(device, budget - clone.loaded_size(), force_patch_weights=force_patch_weights)

    clone.partially_load = partially_load
    return clone


def load_pipeline(transformer: Path) -> sana.SanaPipeline:
    """The pipeline of `sana` with the same parts."""
    return sana.SanaPipeline.load(transformer, autoencoder=DEMO, text_encoder=DEMO)


def picture(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """An IMAGE (1, height, width, 3) of soft colours, in steps of 1/255 as a file has them."""
    small = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(small, size=(height, width), mode="bicubic")
    return image.clamp(0, 1).mul(255).round().div(255).movedim(1, -1)


def write_variant(host: Host, variant: str, *, depth: int = 3, seed: int = 0) -> Path:
    """A file among the diffusion models: a transformer of the structure of a variant, small and random.

    The same arguments give the same file, which is written once.
    """
    path = host.base / "models" / "diffusion_models" / f"{variant}-{depth}-{seed}.safetensors"
    if not path.exists():
        row = VARIANTS[variant]
        config = replace(
            row.transformer, hidden_size=96, depth=depth, cross_heads=2, text_width=TEXT_WIDTH, ff_width=240
        )
        network = randomise(SanaTransformer(config), seed)
        identity = TransformerIdentity(config, variant, row.base_size, row.flow_shift, row.dtype, "its header")
        save_file(with_convolutions(network.state_dict()), path, transformer_header(identity))
    return path


def pipeline_latent(pipeline: sana.SanaPipeline, prompt: str, batch_size: int = 1, **options: object) -> Tensor:
    """The last latent of a pipeline, with the scale that a LATENT has."""
    settings = sana.Settings(**{"height": HEIGHT, "width": WIDTH, "steps": STEPS, "seed": SEED, **options})
    *_, last = pipeline.sample(prompt, settings, batch_size=batch_size)
    return last.next_x / LATENT_SCALE
