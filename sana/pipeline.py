"""From a prompt to pictures: the parts of this package put together, without a host."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from .capturing import CapturedVelocity, check_fast
from .checkpoints.autoencoder import check_autoencoder
from .checkpoints.controlnet import check_controlnet
from .checkpoints.text_encoder import check_text_encoder
from .compiling import compiled_velocity
from .config import TransformerIdentity
from .images import to_picture
from .inputs import Inputs, encode_picture, encode_texts, latent_mask
from .loading import check_in_int8, load_parts, multiply_in_8_bits
from .needs import TRANSFORMER, check_bounds, decoding_need, latent_shape, needs, writing_need
from .networks.autoencoder import DCAutoencoder, decode_within_memory
from .networks.controlnet import SanaControlNet
from .networks.transformer import SanaTransformer
from .offloading import CPU, Need, Offload, Offloader
from .plan import Plan, Settings, make_plan
from .sampling.control import ControlledTransformer, within
from .sampling.guidance import Condition, guided_denoiser, inpainting_denoiser, scm_denoiser
from .sampling.noise import noise_source
from .sampling.solvers import SOLVERS, Denoiser, SamplingError, Step, scm_start, scm_steps
from .text.enhancement import enhance
from .text.generation import Sampling
from .text.prompt import INSTRUCTION, joined
from .text.text_encoder import GemmaTextEncoder

PLANS_AHEAD = 16  # whose texts, 1.4 MB each, are encoded together where parts take turns

log = logging.getLogger(__name__)


class SanaPipeline:
    """A SANA transformer with its autoencoder and its text encoder.

    text_encoder: None for a caller that encodes the texts itself, see `follow`. compiled, fast: as for `load`. controlnet: one
    whose image each plan gives; None: none. offloader: has the parts where they take turns on a device; None: they stay.
    Raises CheckpointError for an autoencoder, a text encoder or a ControlNet that is not made for the transformer, and
    ValueError as `load` for fast.
    """

    def __init__(
        self,
        transformer: SanaTransformer,
        autoencoder: DCAutoencoder,
        text_encoder: GemmaTextEncoder | None,
        identity: TransformerIdentity,
        *,
        compiled: bool = False,
        fast: bool = False,
        controlnet: SanaControlNet | None = None,
        offloader: Offloader | None = None,
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
        self.offloader = offloader or Offloader(CPU, "never")
        self._counted: WeakKeyDictionary[Plan, dict[str, Need]] = WeakKeyDictionary()
        self.velocity = compiled_velocity(transformer) if compiled else transformer.velocity
        if fast:
            check_fast(self.device, compiled)
            self.velocity = graphs = CapturedVelocity(transformer, self.device)
            self.offloader.attach(TRANSFORMER, graphs.reserved, graphs.release)
        self.texts_kept = 0  # encoded prompts that are kept, the last ones, for who draws the same again; 1.4 MB each
        self._texts: dict[object, Inputs] = {}

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
        fast: bool = False,
        in_int8: bool = False,
        loras: Sequence[tuple[Path | str, float]] = (),
        control: Path | str | None = None,
        offload: Offload = "auto",
    ) -> "SanaPipeline":
        """model: "demo", a diffusers folder, or a transformer file, which needs autoencoder and text_encoder as well, each
        a file or folder, or "demo".

        variant: a name from VARIANTS, for files that cannot tell. dtype: of all parts, but float16, which overflows elsewhere,
        of the transformer only; None: float32 on a CPU, else that of the release for the transformer and bfloat16 for the
        rest, with float32 in the place of bfloat16 on GPUs that only emulate it. compiled: run the transformer through torch.compile.
        fast: record its steps as CUDA graphs, each kind once, and launch them whole, which takes no less arithmetic but less of
        the CPU: on GPUs that wait for it.
        in_int8: on a CPU, multiply weights of the transformer that are stored in int8 in 8 bits, for which what comes into a layer is
        rounded as well, as in ComfyUI; False: unpack them.
        loras: files or folders, each with its strength, for the transformer, the text encoder or both; 1 is as it was trained.
        control: file or folder of a ControlNet, which then needs `Settings.control_image`.
        offload: "auto" lets parts leave a GPU for one another where it has no room for all, with Gemma's embedding on the
        CPU in any case; "never" keeps everything on the device.
        Raises CheckpointError for files that are something else, ValueError for a LoRA without a strength or with one that is
        no finite number, for an unknown offload, for in_int8 where that cannot be, and for fast on a device without graphs or
        with compiled, and FileNotFoundError.
        """
        if fast:
            check_fast(torch.device(device), compiled)
        if in_int8:
            check_in_int8(torch.device(device), compiled)
        offloader = Offloader(torch.device(device), offload)
        *parts, controlnet = load_parts(
            model,
            offloader,
            autoencoder=autoencoder,
            text_encoder=text_encoder,
            variant=variant,
            dtype=dtype,
            loras=loras,
            control=control,
        )
        if in_int8:
            multiply_in_8_bits(parts[0], model)
        return cls(*parts, compiled=compiled, fast=fast, controlnet=controlnet, offloader=offloader)

    def __call__(self, prompt: str | Sequence[str], *, batch_size: int = 1, **options: object) -> list[Image.Image]:
        """Pictures of a prompt: batch_size of them, or one for each of several prompts.

        options: fields of `Settings`, as in `pipeline("a cat", height=512, width=512, seed=1)`.
        Raises ValueError for values out of range, and SamplingError if the network's numbers break.
        """
        settings = Settings(**options)
        for step in self.sample(prompt, settings, batch_size=batch_size):
            latent = step.next_x
        return self.pictures(latent, settings.max_bytes)

    def enhance(self, prompt: str, *, instruction: str = INSTRUCTION, turns: bool = True, **options: object) -> str:
        """A longer prompt, written by the text encoder, for a picture with more to see.

        instruction, turns: as for `enhance` in `text/enhancement.py`, which gives the same in pieces, as they are written.
        options: fields of `Sampling`, as in `pipeline.enhance("a cat", seed=1, temperature=0.5)`.
        Raises ValueError for values out of range, for a text encoder that was never trained to write, and without one.
        """
        sampling, encoder = Sampling(**options), self._given_encoder()
        if self.offloader.is_active:
            self.offloader.bring(writing_need(encoder, joined(instruction, prompt), sampling.max_tokens))
        return "".join(enhance(encoder, prompt, instruction, sampling, turns=turns))

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

    def draw(
        self, plans: Iterable[Plan], on_step: Callable[[Plan, Step], object] = lambda plan, step: None
    ) -> Iterator[tuple[Plan, list[Image.Image]]]:
        """The pictures of each plan, in order. on_step: called after each step.

        Where parts take turns on a device, the texts of several plans are encoded together, then these are sampled, and the
        pictures come last, so that each part goes there once for all of them. Raises as `follow` does.
        """
        plans = iter(plans)
        for plan in plans:
            group, waiting = [plan], []
            if not self._has_room(plan):
                group += islice(plans, PLANS_AHEAD - 1)
            given = self.prepare(group) if len(group) > 1 else [None]
            for each, inputs in zip(group, given, strict=True):
                for step in self.follow(each, inputs):
                    on_step(each, step)
                if self._has_room(each, "sampling", "decoding"):
                    yield each, self.pictures(step.next_x, each.settings.max_bytes)
                else:
                    waiting.append((each, step.next_x.cpu()))
            for each, latent in waiting:
                yield each, self.pictures(latent, each.settings.max_bytes)

    @torch.no_grad()
    def prepare(self, plans: Sequence[Plan]) -> list[Inputs]:
        """Texts and pictures of plans, encoded, on the CPU: for `follow`, at any time. Raises ValueError as it does."""
        for plan in plans:
            self._check(plan)
        inputs = [self._encode_texts(plan).to(CPU) for plan in plans]  # all of them before the first picture
        return [self._encode_pictures(plan, each).to(CPU) for plan, each in zip(plans, inputs, strict=True)]

    @torch.no_grad()
    def follow(self, plan: Plan, inputs: Inputs | tuple[Condition, Condition | None] | None = None) -> Iterator[Step]:
        """The steps of a plan, as `sample` gives them.

        inputs: from `prepare`, or the prompts and the negative prompt of the pictures if they are encoded already. Raises
        ValueError for too little max_bytes, for a device with too little memory and for seeds of more than 64 bits, and
        SamplingError if the network's numbers break.
        """
        self._check(plan)
        for step in self._steps(plan, inputs and Inputs(*inputs)):
            if not bool(torch.isfinite(step.next_x).all()):
                computing = self.transformer.dtype
                advice = "a LoRA, a ControlNet or the checkpoint is damaged: try without the first two"
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
        if self.offloader.is_active:
            self.offloader.bring(decoding_need(self.autoencoder, latent.shape, max_bytes))
            latent = latent.to(self.device)
        return [
            to_picture(decode_within_memory(self.autoencoder, part / scale, max_bytes)[0]) for part in latent.split(1)
        ]

    @property
    def device(self) -> torch.device:
        """Where the parts compute."""
        return self.offloader.device if self.offloader.is_active else self.transformer.scale_shift_table.device

    def _needs(self, plan: Plan) -> dict[str, Need]:
        """Counted once, which takes a tenth of a second for the largest pictures."""
        if plan not in self._counted:
            networks = self.transformer, self.autoencoder, self.text_encoder, self.controlnet
            self._counted[plan] = needs(plan, *networks)
        return self._counted[plan]

    def _bring(self, plan: Plan, phase: str) -> None:
        if self.offloader.is_active:
            self.offloader.bring(self._needs(plan)[phase])

    def _has_room(self, plan: Plan, *phases: str) -> bool:
        """Whether the parts of these phases, or without any those of all, can be on the device at the same time."""
        if not self.offloader.is_active:
            return True
        found = self._needs(plan)
        return self.offloader.has_room(*(found[phase] for phase in phases or found))

    def _check(self, plan: Plan) -> None:
        """Raises ValueError, before anything is computed, if there is too little memory for pictures of this size."""
        check_bounds(plan, self.autoencoder)
        if self.offloader.is_active:
            self.offloader.check(self._needs(plan))

    def _steps(self, plan: Plan, inputs: Inputs | None) -> Iterator[Step]:
        draw = noise_source(latent_shape(plan, self.autoencoder)[1:], plan.seeds)
        noise = draw().to(self.device)
        first = float(plan.sigmas[0])
        inputs = self._encode_pictures(plan, inputs or self._encode_texts(plan)).to(self.device)
        self._bring(plan, "sampling")  # before what is computed from the texts
        if self.identity.config.guidance_embed:
            denoise = scm_denoiser(self.transformer, inputs.cond, plan.guidance.scale, velocity=self.velocity)
            steps, x = partial(scm_steps, noise=lambda like: draw().to(like)), scm_start(noise, first)
            if plan.settings.image is not None and first >= 1:
                log.warning(
                    "With this strength and number of steps nothing of the image is kept; use less, or more steps."
                )
        else:
            denoise = self._guided_denoiser(plan, inputs)
            steps, x = SOLVERS[plan.settings.solver].steps, noise
        if inputs.image is not None:
            clean = inputs.image.expand_as(noise)
            x = torch.lerp(clean, noise, first)
            if plan.settings.mask is not None:
                denoise = inpainting_denoiser(denoise, clean, noise, latent_mask(plan, noise))

        def denoise_there(x: Tensor, sigma: Tensor) -> Tensor:
            self._bring(plan, "sampling")  # again, for who decodes a step and goes on
            return denoise(x, sigma)

        yield from steps(denoise_there if self.offloader.is_active else denoise, x, plan.sigmas)

    def _given_encoder(self) -> GemmaTextEncoder:
        """Raises ValueError where there is none."""
        if self.text_encoder is None:
            raise ValueError(
                "this pipeline has no text encoder; make it with one, or encode the texts elsewhere and give them to follow()"
            )
        return self.text_encoder

    def _encode_texts(self, plan: Plan) -> Inputs:
        key = plan.texts, plan.instruction, plan.negative
        if key not in self._texts:
            encoder = self._given_encoder()
            self._bring(plan, "encoding the prompt")
            self._texts[key] = Inputs(*encode_texts(encoder, plan))
        found = self._texts[key]
        for old in list(self._texts)[: len(self._texts) - self.texts_kept]:
            del self._texts[old]
        return found

    def _encode_pictures(self, plan: Plan, inputs: Inputs) -> Inputs:
        """The inputs of a plan with what is missing of its pictures."""
        pictures = {"image": plan.settings.image, "control": plan.settings.control_image if self._acts(plan) else None}
        for name, picture in pictures.items():
            if picture is not None and getattr(inputs, name) is None:
                self._bring(plan, "encoding the picture")
                inputs = inputs._replace(**{name: encode_picture(self.autoencoder, picture, plan, self.device)})
        return inputs

    def _acts(self, plan: Plan) -> bool:
        """Whether a ControlNet does."""
        return self.controlnet is not None and plan.settings.control_scale != 0

    def _guided_denoiser(self, plan: Plan, inputs: Inputs) -> Denoiser:
        """With the ControlNet, at the noise levels and by the scale of the plan."""
        settings, (cond, uncond, *_) = plan.settings, inputs
        plain = partial(guided_denoiser, cond=cond, uncond=uncond, guidance=plan.guidance, sigmas=plan.sigmas)
        if not self._acts(plan):
            return plain(self.transformer, velocity=self.velocity)
        controlled = ControlledTransformer(
            self.transformer,
            self.controlnet,
            inputs.control,
            settings.control_scale,
            own_start=settings.reference == "diffusers",
            run=self.velocity,
        )
        if plan.control_levels == (0, 1):
            return plain(controlled)
        return within(plan.control_levels, plain(controlled), plain(self.transformer, velocity=self.velocity))


def check_control(settings: Settings, given: bool) -> None:
    """Raises ValueError for a ControlNet without a picture or a picture without a ControlNet. given: whether there is one."""
    if given and settings.control_image is None:
        raise ValueError("a ControlNet needs the picture that it follows; give a control_image as well")
    if settings.control_image is not None and not given:
        raise ValueError("a control_image needs the ControlNet that follows it; give a control file as well")
