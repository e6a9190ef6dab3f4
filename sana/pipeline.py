"""From a prompt to pictures: the parts of this package put together, without a host."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .checkpoints.autoencoder import check_autoencoder, load_autoencoder
from .checkpoints.files import CheckpointError, TensorFile, read_tensors
from .checkpoints.names import is_autoencoder
from .checkpoints.text_encoder import check_text_encoder, is_gemma, load_text_encoder
from .checkpoints.transformer import build_transformer, find_transformer
from .config import TransformerIdentity
from .images import to_cells, to_picture, to_tensor
from .networks.autoencoder import DCAutoencoder, decode_within_memory, encode_within_memory
from .networks.devices import computes_bfloat16
from .networks.streaming import check_bound
from .networks.transformer import SanaTransformer
from .sampling.guidance import Condition, Guidance, Reference, guided_denoiser, inpainting_denoiser, scm_denoiser
from .sampling.noise import noise_source
from .sampling.resolution import check_size, nearest_bucket
from .sampling.schedule import angle_sigmas, partial_sigmas, scm_angles
from .sampling.solvers import SOLVERS, Step, scm_start, scm_steps
from .text.prompt import DIFFUSERS_INSTRUCTION, INSTRUCTION
from .text.text_encoder import GemmaTextEncoder

MODELS = {"demo": Path(__file__).parent / "demo" / "checkpoint"}  # names that stand for a folder
DEFAULT_STEPS, SPRINT_STEPS = 20, 2
DEFAULT_STRENGTH = 0.5  # of an image to start from, without a mask
# Settings that Sprint, which has no guidance by a second evaluation and another schedule, has no use for.
NOT_OF_SPRINT = ("negative", "mask", "pag_scale", "pag_blocks", "guidance_interval", "solver", "flow_shift")
LARGE = 2  # times the pixels of the model's square, from which on an image does not suggest its own size

log = logging.getLogger(__name__)


class SamplingError(RuntimeError):
    """Sampling went wrong. The message names the likely cause."""


@dataclass(frozen=True)
class Settings:
    """What decides a batch of pictures, beside the model and the prompts. None: what the model or the rest suggest.

    Raises ValueError for an unknown solver, a strength outside (0, 1], and a mask or a strength below 1 without an image;
    sizes, steps and scales are checked when used.
    """

    negative: str = ""
    height: int | None = None  # pixels
    width: int | None = None
    steps: int | None = None
    seed: int = 0  # of the first picture; the k-th has seed + k, so that the size of a batch changes no picture
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    pag_scale: float = 0.0
    pag_blocks: Sequence[int] | None = None
    reference: Reference = "nvlabs"
    solver: str = "flow_dpm"
    flow_shift: float | None = None
    instruction: str | None = INSTRUCTION  # None: none
    image: Image.Image | None = None  # to start from; cut to the size of the picture
    mask: Image.Image | None = None  # of `image`: white is painted anew, black is kept
    strength: float | None = (
        None  # share of the noise schedule to run, in (0, 1]; None: 0.5 for an image without a mask, else 1
    )
    max_bytes: int | None = None  # bound on the working memory of the autoencoder

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r} is unknown; use one of {', '.join(SOLVERS)}")
        if self.mask is not None and self.image is None:
            raise ValueError("a mask needs the image that it is a mask of; give both")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; it must be above 0 and at most 1")
        if self.strength not in (None, 1) and self.image is None:
            raise ValueError(f"strength {self.strength} needs an image to start from; give both")

    @property
    def changed(self) -> dict[str, object]:
        """What differs from the defaults, by name."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {field.name: given[field.name] for field in fields(self) if given[field.name] != field.default}

    @property
    def noise_share(self) -> float:
        """The strength, or what the rest suggests: half of the schedule for an image without a mask, else all of it."""
        suggested = DEFAULT_STRENGTH if self.image is not None and self.mask is None else 1.0
        return suggested if self.strength is None else self.strength


class SanaPipeline:
    """A SANA transformer with its autoencoder and its text encoder.

    Raises CheckpointError for an autoencoder or a text encoder that is not made for the transformer.
    """

    def __init__(
        self,
        transformer: SanaTransformer,
        autoencoder: DCAutoencoder,
        text_encoder: GemmaTextEncoder,
        identity: TransformerIdentity,
        *,
        compiled: bool = False,
    ) -> None:
        check_autoencoder(autoencoder.config, transformer.config)
        check_text_encoder(text_encoder.model.config, transformer.config)
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.identity = identity
        self.velocity = torch.compile(transformer.velocity) if compiled else transformer.velocity

    @classmethod
    def load(
        cls,
        model: Path | str = "demo",
        *,
        autoencoder: Path | str | None = None,
        text_encoder: Path | str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> "SanaPipeline":
        """model: "demo", a diffusers folder, or a transformer file, which needs autoencoder and text_encoder as well, each
        a file or folder, or "demo".

        variant: a name from VARIANTS, for files that cannot tell. dtype: of all parts, but float16, which overflows elsewhere,
        of the transformer only; None: float32 on a CPU, else that of the release for the transformer and bfloat16 for the
        rest, with float32 in the place of bfloat16 on GPUs that only emulate it. compiled: run the transformer through torch.compile.
        Raises CheckpointError for files that are something else, and FileNotFoundError.
        """
        model = model_path(model)
        autoencoder, text_encoder = (part and model_path(part) for part in (autoencoder, text_encoder))
        file = read_tensors(model, "transformer")
        found = find_transformer(file, variant)
        check_parts(model, file, autoencoder, text_encoder)
        own, safe = default_dtypes(found.identity.dtype, torch.device(device))
        others = safe if dtype in (None, torch.float16) else dtype
        return cls(
            build_transformer(found, dtype or own, device),
            load_autoencoder(autoencoder or model, others, device),
            load_text_encoder(text_encoder or model, others, device),
            found.identity,
            compiled=compiled,
        )

    def __call__(self, prompt: str | Sequence[str], *, batch_size: int = 1, **options: object) -> list[Image.Image]:
        """Pictures of a prompt: batch_size of them, or one for each of several prompts.

        options: fields of `Settings`, as in `pipeline("a cat", height=512, width=512, seed=1)`.
        Raises ValueError for values out of range, and SamplingError if the network's numbers break.
        """
        settings = Settings(**options)
        for step in self.sample(prompt, settings, batch_size=batch_size):
            latent = step.next_x
        return self.pictures(latent, settings.max_bytes)

    @torch.no_grad()
    def sample(self, prompt: str | Sequence[str], settings: Settings, *, batch_size: int = 1) -> Iterator[Step]:
        """The steps of sampling one by one, for a caller to watch, to cancel, or to stop early.

        The last step's `next_x`, or any step's `denoised`, is a latent (B, 32, H, W) for `pictures`. Raises as `__call__`.
        """
        prompts = [prompt] * batch_size if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("there is no picture to draw; ask for at least one")
        self._check_bound(settings)
        sprint = self.identity.config.guidance_embed
        for step in self._sprint_steps(prompts, settings) if sprint else self._flow_steps(prompts, settings):
            if not bool(torch.isfinite(step.next_x).all()):
                computing, released = self.transformer.dtype, self.identity.dtype
                exact = computing == torch.float32
                raise SamplingError(
                    f"step {step.index + 1} gave numbers that are not finite, computing in {computing}; "
                    + (
                        "the checkpoint is damaged"
                        if exact
                        else f"the model was released in {released}, so use that or float32"
                    )
                )
            yield step

    @torch.no_grad()
    def pictures(self, latent: Tensor, max_bytes: int | None = None) -> list[Image.Image]:
        """Decode a latent (B, 32, H, W), one picture at a time.

        Where that runs out of memory, it goes on within less: the pictures are the same.
        """
        scale = self.autoencoder.config.latent_scale
        return [
            to_picture(decode_within_memory(self.autoencoder, part / scale, max_bytes)[0]) for part in latent.split(1)
        ]

    def step_count(self, settings: Settings) -> int:
        """How many steps `sample` takes. Raises ValueError for a schedule that cannot be."""
        return len(self._sprint_sigmas(settings) if self.identity.config.guidance_embed else self._sigmas(settings)) - 1

    def record(self, prompt: str, settings: Settings) -> dict[str, object]:
        """Everything needed to draw a picture again with the same model, as JSON values.

        Its seed, steps, guidance and size, and what else differs from the defaults of `Settings`.
        """
        height, width = self.size(settings)
        left_out = ("image", "mask", "max_bytes")
        plain = {name: value for name, value in settings.changed.items() if name not in left_out}
        started = {"image": "given"} if settings.image is not None else {}
        model = {"model": self.identity.variant, "steps": self.step_count(settings)}
        resolved = {"guidance_scale": self._guidance_scale(settings), "height": height, "width": width}
        return {"prompt": prompt, "seed": settings.seed, **model, **plain, **started, **resolved}

    def size(self, settings: Settings) -> tuple[int, int]:
        """Height and width of the pictures, px. Raises ValueError for sizes no model takes.

        An image suggests its own, or if it is large the size nearest in shape among those the model was trained on.
        """
        factor, base_size = self.autoencoder.config.downsample, self.identity.base_size
        suggested = (base_size, base_size)
        if settings.image is not None:
            width, height = settings.image.size
            suggested = tuple(max(factor, side // factor * factor) for side in (height, width))
            if height * width > LARGE * base_size**2:
                suggested = nearest_bucket(height, width, base_size)
        height = suggested[0] if settings.height is None else settings.height
        width = suggested[1] if settings.width is None else settings.width
        check_size(height, width, factor)
        return height, width

    def _check_bound(self, settings: Settings) -> None:
        """Raises ValueError, before anything is computed, if max_bytes is too little for pictures of this size."""
        if settings.max_bytes is None:
            return
        height, width = self.size(settings)
        autoencoder, config = self.autoencoder, self.autoencoder.config
        cells = (height // config.downsample, width // config.downsample)
        latent = torch.Size((1, config.latent_channels, *cells))
        check_bound(autoencoder.decoder, latent, autoencoder.dtype, settings.max_bytes)
        if settings.image is not None:
            image = torch.Size((1, 3, height, width))
            check_bound(autoencoder.encoder, image, autoencoder.dtype, settings.max_bytes)

    def _guidance_scale(self, settings: Settings) -> float:
        return self.identity.guidance_scale if settings.guidance_scale is None else settings.guidance_scale

    def _guidance(self, settings: Settings) -> Guidance:
        blocks = (self.transformer.config.perturbed_block,) if settings.pag_blocks is None else settings.pag_blocks
        return Guidance(
            self._guidance_scale(settings),
            settings.guidance_interval,
            settings.pag_scale,
            frozenset(blocks),
            settings.reference,
        )

    def _flow_steps(self, prompts: list[str], settings: Settings) -> Iterator[Step]:
        guidance = self._guidance(settings)
        noise = self._noise_source(len(prompts), settings)()
        sigmas = self._sigmas(settings)
        cond, uncond = self._encode(prompts, settings)
        denoise = guided_denoiser(self.transformer, cond, uncond, guidance, sigmas=sigmas, velocity=self.velocity)
        x = noise
        if settings.image is not None:
            clean = self._encode_image(settings).expand_as(noise)
            x = torch.lerp(clean, noise, float(sigmas[0]))
            if settings.mask is not None:
                denoise = inpainting_denoiser(denoise, clean, noise, self._latent_mask(settings, noise))
        yield from SOLVERS[settings.solver].steps(denoise, x, sigmas)

    def _sprint_steps(self, prompts: list[str], settings: Settings) -> Iterator[Step]:
        unused = [name for name in NOT_OF_SPRINT if name in settings.changed]
        if unused:
            raise ValueError(
                f"Sprint models do not take {' and '.join(unused)}; leave that out, or use another SANA model"
            )
        sigmas = self._sprint_sigmas(settings)
        first = float(sigmas[0])
        draw = self._noise_source(len(prompts), settings)
        noise = draw()
        x = scm_start(noise, first)
        if settings.image is not None:
            if first >= 1:
                log.warning(
                    "With this strength and number of steps nothing of the image is kept; use less, or more steps."
                )
            x = torch.lerp(self._encode_image(settings).expand_as(noise), noise, first)
        cond = self._encode_prompts(prompts, settings)
        denoise = scm_denoiser(self.transformer, cond, self._guidance(settings).scale, velocity=self.velocity)
        yield from scm_steps(denoise, x, sigmas, lambda like: draw())

    def _sprint_sigmas(self, settings: Settings) -> Tensor:
        """The grid of Sprint. With an image, the first levels are left out: pipeline_sana_sprint_img2img.py of diffusers."""
        angles = scm_angles(SPRINT_STEPS if settings.steps is None else settings.steps)
        steps = len(angles) - 1
        return angle_sigmas(angles[int(max(steps - steps * settings.noise_share, 0)) :])

    def _sigmas(self, settings: Settings) -> Tensor:
        steps = DEFAULT_STEPS if settings.steps is None else settings.steps
        flow_shift = self.identity.flow_shift if settings.flow_shift is None else settings.flow_shift
        if settings.noise_share == 1:
            return SOLVERS[settings.solver].sigmas(steps, flow_shift)
        return partial_sigmas(steps, flow_shift, settings.noise_share)

    def _encode(self, prompts: list[str], settings: Settings) -> tuple[Condition, Condition | None]:
        cond = self._encode_prompts(prompts, settings)
        if self._guidance_scale(settings) == 1:
            return cond, None
        negative = settings.negative.lower() if settings.reference == "diffusers" else settings.negative
        text, text_mask = self.text_encoder([negative], None)
        return cond, Condition(text.expand_as(cond.text), text_mask.expand_as(cond.text_mask))

    def _encode_prompts(self, prompts: list[str], settings: Settings) -> Condition:
        """A prompt of several pictures is encoded once."""
        instruction = settings.instruction
        if settings.reference == "diffusers":
            prompts = [prompt.lower() for prompt in prompts]
            instruction = DIFFUSERS_INSTRUCTION if instruction == INSTRUCTION else instruction
        distinct = list(dict.fromkeys(prompts))
        text, text_mask = self.text_encoder(distinct, instruction)
        rows = [distinct.index(prompt) for prompt in prompts]
        return Condition(text[rows], text_mask[rows])

    def _noise_source(self, count: int, settings: Settings) -> Callable[[], Tensor]:
        """Noise for so many pictures, on the device of the transformer."""
        height, width = self.size(settings)
        factor, device = self.autoencoder.config.downsample, self.transformer.scale_shift_table.device
        shape = (self.transformer.config.channels, height // factor, width // factor)
        draw = noise_source(shape, range(settings.seed, settings.seed + count))
        return lambda: draw().to(device)

    def _encode_image(self, settings: Settings) -> Tensor:
        """The latent (1, 32, H, W) of the image to start from."""
        height, width = self.size(settings)
        image = to_tensor(settings.image, height, width).to(self.transformer.scale_shift_table.device)
        return encode_within_memory(self.autoencoder, image, settings.max_bytes) * self.autoencoder.config.latent_scale

    def _latent_mask(self, settings: Settings, like: Tensor) -> Tensor:
        """The mask at the size of a latent: (1, 1, H, W) in [0, 1]."""
        height, width = self.size(settings)
        pixels = np.asarray(ImageOps.fit(settings.mask.convert("L"), (width, height), Image.Resampling.NEAREST))
        mask = torch.from_numpy(pixels.copy())[None, None].float().div(255)
        return to_cells(mask, *like.shape[-2:]).to(like)


def default_dtypes(released: str, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Of a transformer released in such a dtype, and of the other parts, which float16 breaks; see `SanaPipeline.load`."""
    if device.type == "cpu":
        return torch.float32, torch.float32
    own, others = getattr(torch, released), torch.bfloat16
    if computes_bfloat16(device):
        return own, others
    return (torch.float32 if own == torch.bfloat16 else own), torch.float32


def model_path(model: Path | str) -> Path:
    """Where a model is that is given by a name of MODELS or by its path."""
    return MODELS.get(str(model), Path(model))


def check_parts(model: Path, file: TensorFile, autoencoder: Path | str | None, text_encoder: Path | str | None) -> None:
    """Raises CheckpointError if a part is neither given nor comes with the transformer, at `model`."""
    parts = {
        "an autoencoder": autoencoder or (model / "vae").is_dir() or is_autoencoder(file.tensors),
        "a text encoder": text_encoder or (model / "text_encoder").is_dir() or is_gemma(file.tensors),
    }
    missing = " and ".join(name for name, there in parts.items() if not there)
    if missing:
        raise CheckpointError(f"{model} is the transformer alone; give {missing} as well")
