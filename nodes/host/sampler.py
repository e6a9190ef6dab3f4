"""Our solvers as samplers of the host, its noise from seeds, and guidance within an interval."""

from collections.abc import Callable, Iterator
from functools import partial

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sana.sampling.guidance import Guidance
from ...sana.sampling.noise import noise_source
from ...sana.sampling.solvers import SOLVERS, Denoiser, Step, scm_start, scm_steps
from .model import SanaModel
from .run import GUIDANCE_EMBED, MASK_CONVENTION, follow_runs

IN_CORE = {"flow_euler": "euler"}  # solvers of ours that the host has already, and what it calls them

HostModel = Callable[..., Tensor]  # (x, sigma (B,), **extra_args) -> denoised
SamplerFunction = Callable[..., Tensor]
Latent = dict[str, object]


def host_sampler(steps: Callable[[Denoiser, Tensor, Tensor], Iterator[Step]]) -> SamplerFunction:
    """A solver as a sampler function of the host."""

    def sample(
        model: HostModel,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, object] | None = None,
        callback: Callable[[dict[str, object]], None] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return model(x, sigma.to(x).expand(len(x)), **(extra_args or {}))

        for step in steps(denoise, x, sigmas.cpu()):
            if callback is not None:
                sigma = sigmas[step.index]
                callback({"i": step.index, "x": step.x, "sigma": sigma, "sigma_hat": sigma, "denoised": step.denoised})
            x = step.next_x
        return x

    return sample


def _of_flows(name: str, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """The steps of a solver. Raises ValueError for noise levels of other models, to which the host offers it too."""
    if float(sigmas[0]) > 1:
        raise ValueError(
            f"{name} is for flow models, whose noise levels are at most 1, and these begin at {float(sigmas[0]):.3g}; "
            "choose another sampler, such as dpmpp_2m"
        )
    return SOLVERS[name].steps(denoise, x, sigmas)


# What we add to the list of the host's KSampler.
SAMPLER_FUNCTIONS = {name: host_sampler(partial(_of_flows, name)) for name in SOLVERS if name not in IN_CORE}


def flow_dpm_sampler() -> comfy.samplers.KSAMPLER:
    """Flow-DPM-Solver as a SAMPLER."""
    return comfy.samplers.KSAMPLER(SAMPLER_FUNCTIONS["flow_dpm"])


def scm_sampler(draw: Callable[[], Tensor]) -> comfy.samplers.KSAMPLER:
    """The consistency sampler of Sprint as a SAMPLER, which draws the noise of each step."""
    return comfy.samplers.KSAMPLER(host_sampler(partial(scm_steps, noise=lambda like: draw().to(like))))


class SanaGuidance(comfy.samplers.CFGGuider):
    """Classifier-free guidance within an interval of noise levels; elsewhere the prompt alone."""

    interval = Guidance()

    def set_interval(self, low: float, high: float) -> None:
        """Raises ValueError unless 0 <= low < high <= 1."""
        self.interval = Guidance(interval=(low, high))

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, object] | None = None, seed: int | None = None
    ) -> Tensor:
        positive, negative = self.conds.get("positive"), self.conds.get("negative")
        scale = self.cfg if self.interval.acts_at(float(timestep.max())) else 1.0
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, positive, scale, model_options=model_options or {}, seed=seed
        )


def sana_model(patcher: ModelPatcher) -> SanaModel:
    """The model behind a MODEL. Raises ValueError if it is of another family."""
    if not isinstance(patcher.model, SanaModel):
        raise ValueError("this MODEL is not SANA; connect the MODEL of Load SANA, or use KSampler for other models")
    return patcher.model


def flow_model(patcher: ModelPatcher) -> SanaModel:
    """The same for what samples flows. Raises ValueError for Sprint, too."""
    model = sana_model(patcher)
    if model.identity.config.guidance_embed:
        raise ValueError("this MODEL is SANA-Sprint; use SANA Sprint schedule and SANA Sprint sampler for it")
    return model


def with_mask_convention(patcher: ModelPatcher, convention: str) -> ModelPatcher:
    """A MODEL that follows a mask convention, see `sana.sampling.guidance.Guidance`: this one if it does, else a copy."""
    if patcher.model_options["transformer_options"].get(MASK_CONVENTION) == convention:
        return patcher
    clone = patcher.clone()
    follow_runs(clone, convention)
    return clone


def with_guidance_embed(patcher: ModelPatcher, scale: float) -> ModelPatcher:
    """A copy of a Sprint MODEL that is told a guidance scale."""
    clone = patcher.clone()
    clone.model_options["transformer_options"][GUIDANCE_EMBED] = scale
    return clone


def flow_shift_of(patcher: ModelPatcher) -> float:
    """The flow shift of a MODEL: its checkpoint's, or what another node has set. Raises ValueError if that has none."""
    sampling = patcher.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow):
        raise ValueError(
            "another node has taken the flow shift from this MODEL; set flow_shift here, or remove that node"
        )
    return float(sampling.shift)


def sample_seeded(
    guider: comfy.samplers.CFGGuider,
    sampler: comfy.samplers.KSAMPLER | None,
    sigmas: Tensor,
    latent: Latent,
    seed: int,
    *,
    whole: bool = True,
) -> Latent:
    """Sample a LATENT with noise of seed + k for its k-th image, counted in the batch it was taken from, if it was.

    sampler: None: that of Sprint. whole: the sigmas are those of a whole schedule, which starts from noise.
    """
    samples = comfy.sample.fix_empty_latent_channels(
        guider.model_patcher, latent["samples"], latent.get("downscale_ratio_spacial")
    )
    places = latent.get("batch_index") or []
    numbers = places if len(places) == len(samples) else range(len(samples))
    seeds = [(seed + k) % 2**64 for k in numbers]
    draw = noise_source(samples.shape[1:], seeds)
    noise = draw()
    first = float(sigmas[0]) if len(sigmas) else 0.0
    if whole and first and not samples.any():
        # The host multiplies by the first sigma. SANA starts from noise as it is, Sprint from `scm_start`.
        noise = (noise if sampler else scm_start(noise, first)) / first
    steps = len(sigmas) - 1
    out = guider.sample(
        noise,
        samples,
        sampler or scm_sampler(draw),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(guider.model_patcher, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**kept, "samples": out.to(comfy.model_management.intermediate_device())}
