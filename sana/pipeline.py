"""From a prompt to pictures: the parts of this package put together, without a host."""

import logging
import sysconfig
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .checkpoints.autoencoder import check_autoencoder, load_autoencoder
from .checkpoints.controlnet import check_controlnet, load_controlnet
from .checkpoints.files import CheckpointError, TensorFile, read_tensors
from .checkpoints.lora import read_merges
from .checkpoints.names import is_autoencoder
from .checkpoints.text_encoder import (
    build_text_encoder,
    check_text_encoder,
    find_text_encoder,
    is_gemma,
    read_text_encoder,
)
from .checkpoints.transformer import build_transformer, find_transformer
from .config import TransformerIdentity
from .images import to_cells, to_mask, to_picture, to_tensor
from .networks.autoencoder import DCAutoencoder, decode_within_memory, encode_within_memory
from .networks.controlnet import SanaControlNet
from .networks.devices import computes_bfloat16
from .networks.memory import is_out_of_memory
from .networks.streaming import check_bound
from .networks.transformer import SanaTransformer
from .plan import Plan, Settings, make_plan
from .sampling.control import ControlledTransformer, within
from .sampling.guidance import Condition, Velocity, guided_denoiser, inpainting_denoiser, scm_denoiser
from .sampling.noise import noise_source
from .sampling.solvers import SOLVERS, Denoiser, Step, scm_start, scm_steps
from .text.text_encoder import GemmaTextEncoder

MODELS = {"demo": Path(__file__).parent / "demo" / "checkpoint"}  # names that stand for a folder

log = logging.getLogger(__name__)


class SamplingError(RuntimeError):
    """Sampling went wrong. The message names the likely cause."""


class SanaPipeline:
    """A SANA transformer with its autoencoder and its text encoder.

    text_encoder: None for a caller that encodes the texts itself, see `follow`. compiled: as for `load`. controlnet: one whose
    image each plan gives; None: none.
    Raises CheckpointError for an autoencoder, a text encoder or a ControlNet that is not made for the transformer.
    """

    def __init__(
        self,
        transformer: SanaTransformer,
        autoencoder: DCAutoencoder,
        text_encoder: GemmaTextEncoder | None,
        identity: TransformerIdentity,
        *,
        compiled: bool = False,
        controlnet: SanaControlNet | None = None,
    ) -> None:
        check_autoencoder(autoencoder.config, transformer.config)
        if text_encoder is not None:
            check_text_encoder(text_encoder.model.config, transformer.config)
        if controlnet is not None:
            check_controlnet(controlnet.config, transformer.config)
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.identity = identity
        self.controlnet = controlnet
        self.velocity = compiled_velocity(transformer) if compiled else transformer.velocity

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
        loras: Sequence[tuple[Path | str, float]] = (),
        control: Path | str | None = None,
    ) -> "SanaPipeline":
        """model: "demo", a diffusers folder, or a transformer file, which needs autoencoder and text_encoder as well, each
        a file or folder, or "demo".

        variant: a name from VARIANTS, for files that cannot tell. dtype: of all parts, but float16, which overflows elsewhere,
        of the transformer only; None: float32 on a CPU, else that of the release for the transformer and bfloat16 for the
        rest, with float32 in the place of bfloat16 on GPUs that only emulate it. compiled: run the transformer through torch.compile.
        loras: files or folders, each with its strength, for the transformer, the text encoder or both; 1 is as it was trained.
        control: file or folder of a ControlNet, which then needs `Settings.control_image`.
        Raises CheckpointError for files that are something else, ValueError for a strength that is no finite number, and
        FileNotFoundError.
        """
        model = model_path(model)
        autoencoder, text_encoder = (part and model_path(part) for part in (autoencoder, text_encoder))
        file = read_tensors(model, "transformer")
        found = find_transformer(file, variant)
        check_parts(model, file, autoencoder, text_encoder)
        text = find_text_encoder(read_text_encoder(text_encoder or model))
        merges, text_merges = read_merges(loras, found.identity.config, text.config)
        own, safe = default_dtypes(found.identity.dtype, torch.device(device))
        others = safe if dtype in (None, torch.float16) else dtype
        return cls(
            build_transformer(found, dtype or own, device, merges=merges),
            load_autoencoder(autoencoder or model, others, device),
            build_text_encoder(text, others, device, merges=text_merges),
            found.identity,
            compiled=compiled,
            controlnet=None if control is None else load_controlnet(control, dtype or own, device),
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

    def sample(self, prompt: str | Sequence[str], settings: Settings, *, batch_size: int = 1) -> Iterator[Step]:
        """The steps of sampling one by one, for a caller to watch, to cancel, or to stop early.

        The last step's `next_x`, or any step's `denoised`, is a latent (B, 32, H, W) for `pictures`. Raises as `__call__`.
        """
        return self.follow(self.plan(prompt, settings, batch_size=batch_size))

    def plan(self, prompt: str | Sequence[str], settings: Settings, *, batch_size: int = 1) -> Plan:
        """What settings come to for this model. prompt, batch_size: as for `__call__`. Raises ValueError as it does."""
        check_control(settings, self.controlnet is not None)
        prompts = [prompt] * batch_size if isinstance(prompt, str) else list(prompt)
        return make_plan(prompts, settings, self.identity, self.autoencoder.config.downsample)

    @torch.no_grad()
    def follow(self, plan: Plan, texts: tuple[Condition, Condition | None] | None = None) -> Iterator[Step]:
        """The steps of a plan, as `sample` gives them.

        texts: the prompts and the negative prompt of the pictures if they are encoded already. Raises ValueError for
        too little max_bytes and for seeds of more than 64 bits, and SamplingError if the network's numbers break.
        """
        self._check_bound(plan)
        for step in self._steps(plan, texts):
            if not bool(torch.isfinite(step.next_x).all()):
                computing, advice = self.transformer.dtype, "the checkpoint is damaged"
                if computing != torch.float32:
                    advice = f"the model was released in {self.identity.dtype}, so use that or float32"
                raise SamplingError(
                    f"step {step.index + 1} gave numbers that are not finite, computing in {computing}; {advice}"
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

    def _check_bound(self, plan: Plan) -> None:
        """Raises ValueError, before anything is computed, if max_bytes is too little for pictures of this size."""
        max_bytes, autoencoder = plan.settings.max_bytes, self.autoencoder
        if max_bytes is None:
            return
        check_bound(autoencoder.decoder, torch.Size((1, *self._latent_shape(plan))), autoencoder.dtype, max_bytes)
        if plan.settings.image is not None or plan.settings.control_image is not None:
            check_bound(autoencoder.encoder, torch.Size((1, 3, *plan.size)), autoencoder.dtype, max_bytes)

    def _latent_shape(self, plan: Plan) -> tuple[int, int, int]:
        """(C, H, W) of the latent of a picture."""
        config = self.autoencoder.config
        return config.latent_channels, plan.height // config.downsample, plan.width // config.downsample

    def _steps(self, plan: Plan, texts: tuple[Condition, Condition | None] | None) -> Iterator[Step]:
        draw = noise_source(self._latent_shape(plan), plan.seeds)
        noise = draw().to(self.transformer.scale_shift_table.device)
        first = float(plan.sigmas[0])
        cond, uncond = texts or self._encode(plan)
        if self.identity.config.guidance_embed:
            denoise = scm_denoiser(self.transformer, cond, plan.guidance.scale, velocity=self.velocity)
            steps, x = partial(scm_steps, noise=lambda like: draw().to(like)), scm_start(noise, first)
            if plan.settings.image is not None and first >= 1:
                log.warning(
                    "With this strength and number of steps nothing of the image is kept; use less, or more steps."
                )
        else:
            denoise = self._guided_denoiser(plan, cond, uncond)
            steps, x = SOLVERS[plan.settings.solver].steps, noise
        if plan.settings.image is not None:
            clean = self._encode_image(plan.settings.image, plan).expand_as(noise)
            x = torch.lerp(clean, noise, first)
            if plan.settings.mask is not None:
                denoise = inpainting_denoiser(denoise, clean, noise, _latent_mask(plan, noise))
        yield from steps(denoise, x, plan.sigmas)

    def _guided_denoiser(self, plan: Plan, cond: Condition, uncond: Condition | None) -> Denoiser:
        """With the ControlNet, at the noise levels and by the scale of the plan."""
        settings = plan.settings
        plain = partial(guided_denoiser, cond=cond, uncond=uncond, guidance=plan.guidance, sigmas=plan.sigmas)
        if self.controlnet is None or settings.control_scale == 0:
            return plain(self.transformer, velocity=self.velocity)
        controlled = ControlledTransformer(
            self.transformer,
            self.controlnet,
            self._encode_image(settings.control_image, plan),
            settings.control_scale,
            own_start=settings.reference == "diffusers",
            run=self.velocity,
        )
        if plan.control_levels == (0, 1):
            return plain(controlled)
        return within(plan.control_levels, plain(controlled), plain(self.transformer, velocity=self.velocity))

    def _encode(self, plan: Plan) -> tuple[Condition, Condition | None]:
        """The prompts and the negative prompt. A prompt of several pictures is encoded once."""
        distinct = list(dict.fromkeys(plan.texts))
        text, text_mask = self.text_encoder(distinct, plan.instruction)
        rows = [distinct.index(prompt) for prompt in plan.texts]
        cond = Condition(text[rows], text_mask[rows])
        if plan.negative is None:
            return cond, None
        text, text_mask = self.text_encoder([plan.negative], None)
        return cond, Condition(text.expand_as(cond.text), text_mask.expand_as(cond.text_mask))

    def _encode_image(self, picture: Image.Image, plan: Plan) -> Tensor:
        """The latent (1, 32, H, W) of a picture at the size of the plan's."""
        image = to_tensor(picture, *plan.size).to(self.transformer.scale_shift_table.device)
        latent = encode_within_memory(self.autoencoder, image, plan.settings.max_bytes)
        return latent * self.autoencoder.config.latent_scale


def check_control(settings: Settings, given: bool) -> None:
    """Raises ValueError for a ControlNet without a picture or a picture without a ControlNet. given: whether there is one."""
    if given and settings.control_image is None:
        raise ValueError("a ControlNet needs the picture that it follows; give a control_image as well")
    if settings.control_image is not None and not given:
        raise ValueError("a control_image needs the ControlNet that follows it; give a control file as well")


def _latent_mask(plan: Plan, like: Tensor) -> Tensor:
    """The mask at the size of a latent: (1, 1, H, W) in [0, 1]. It is cut as the image is, and keeps every pixel."""
    whole = to_mask(plan.settings.mask)
    width = min(whole.width, max(1, round(whole.height * plan.width / plan.height)))
    height = min(whole.height, max(1, round(whole.width * plan.height / plan.width)))
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    cut = whole.crop((left, top, left + width, top + height))
    mask = torch.from_numpy(np.asarray(cut).copy())[None, None].float().div(255)
    return to_cells(mask, *like.shape[-2:]).to(like)


def compiled_velocity(transformer: SanaTransformer) -> Velocity:
    """`transformer.velocity` by torch.compile. Raises SamplingError where that fails, at the first call or a later one."""
    run = torch.compile(transformer.velocity)

    def velocity(*inputs: object, **options: object) -> Tensor:
        try:
            return run(*inputs, **options)
        except Exception as error:  # a compiler fails in as many ways as it has parts
            if is_out_of_memory(error):
                raise
            raise SamplingError(_compiler_message(error)) from error

    return velocity


def _compiler_message(error: Exception) -> str:
    advice = "leave out --compile (in Python compiled=True): the picture is the same without"
    places = (str(Path(torch.__file__).parent), sysconfig.get_path("include"))
    for place in places:
        if " " in place:
            return f"torch.compile failed, since compilers do not find {place} with a space in its path; {advice}"
    cause = getattr(error, "inner_exception", error)  # of the compiler, inside what PyTorch says about it
    first = next((line for line in str(cause).splitlines() if line.strip()), "")
    return f"torch.compile failed ({type(cause).__name__}: {first}); {advice}"


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
