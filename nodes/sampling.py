"""Sampling: Flow-DPM-Solver shaped like KSampler, its parts for SamplerCustomAdvanced, guidance, and Sprint."""

import torch
from comfy_api.latest import io

from ..sana.config import DEFAULT_GUIDANCE_SCALE
from ..sana.sampling.schedule import MAX_ANGLE, PAPER_ANGLES, TWO_STEP_ANGLE, angle_sigmas, partial_sigmas, scm_angles
from .host.perturbed import perturb_attention
from .host.report import reported
from .host.sampler import (
    SanaGuidance,
    flow_dpm_sampler,
    flow_model,
    flow_shift_of,
    sample_seeded,
    sana_model,
    with_guidance_embed,
    with_mask_convention,
)

CATEGORY = "SANA/sampling"
MASK_CONVENTIONS = ("nvlabs", "diffusers")


def model_input() -> io.Model.Input:
    return io.Model.Input("model", tooltip="The MODEL of Load SANA, with or without LoRA.")


def latent_input() -> io.Latent.Input:
    return io.Latent.Input("latent", tooltip="Empty SANA latent, or that of a picture; a noise mask is followed.")


def seed_input() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="Of the first picture; the k-th of a batch has seed + k, so that a batch changes no picture.",
    )


def steps_input(default: int = 20) -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=default,
        min=1,
        max=1000,
        tooltip="Evaluations of the model. SANA needs 14 to 20, Sprint 1 to 4.",
    )


def cfg_input() -> io.Float.Input:
    return io.Float.Input(
        "cfg",
        default=DEFAULT_GUIDANCE_SCALE,
        min=0.0,
        max=30.0,
        step=0.1,
        tooltip="How closely to follow the prompt. 1: no guidance, half the work.",
    )


def denoise_input() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="Share of the noise schedule to run. Below 1, the latent is kept in part: image to image.",
    )


def flow_shift_input() -> io.Float.Input:
    return io.Float.Input(
        "flow_shift",
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="Moves the schedule towards noise, for larger pictures. 0: the checkpoint's, 3 for most models and 6 for 4K.",
    )


def interval_inputs() -> list[io.Float.Input]:
    span = {"min": 0.0, "max": 1.0, "step": 0.01, "optional": True}
    return [
        io.Float.Input(
            "guidance_from", default=0.0, tooltip="Guidance acts at noise levels above this, 0 to 1.", **span
        ),
        io.Float.Input("guidance_to", default=1.0, tooltip="Guidance acts at noise levels below this, 0 to 1.", **span),
    ]


def mask_convention_input() -> io.Combo.Input:
    return io.Combo.Input(
        "mask_convention",
        options=list(MASK_CONVENTIONS),
        optional=True,
        tooltip="How much of the negative prompt the model sees: as much as of the prompt (nvlabs, as trained), or all of its "
        "own tokens (diffusers).",
    )


def pag_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "pag_scale",
            default=0.0,
            min=0.0,
            max=30.0,
            step=0.1,
            optional=True,
            tooltip="Perturbed-attention guidance: more structure, for half as much work again. 0: off.",
        ),
        io.Int.Input(
            "pag_block",
            default=-1,
            min=-1,
            max=59,
            optional=True,
            tooltip="Block whose attention is perturbed. -1: NVIDIA's choice, 14 for the 0.6B and 8 for the others.",
        ),
    ]


def schedule(model: io.Model.Type, steps: int, denoise: float, flow_shift: float) -> torch.Tensor:
    return partial_sigmas(steps, flow_shift or flow_shift_of(model), denoise)


def perturbed(model: io.Model.Type, scale: float, block: int, low: float = 0.0, high: float = 1.0) -> io.Model.Type:
    """A copy of a MODEL with perturbed-attention guidance; the MODEL itself if scale is 0."""
    config = flow_model(model).identity.config
    if scale == 0:
        return model
    clone = model.clone()
    perturb_attention(clone, scale, [config.perturbed_block if block < 0 else block], low, high)
    return clone


class FlowDPMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowDPMSampler",
            display_name="SANA sampler (Flow-DPM)",
            category=CATEGORY,
            search_aliases=["ksampler", "sampler", "flow dpm solver", "image to image", "flow shift", "cfg"],
            description="Samples a SANA model with Flow-DPM-Solver, as NVIDIA's own pipeline does.",
            inputs=[
                model_input(),
                seed_input(),
                steps_input(),
                cfg_input(),
                io.Conditioning.Input("positive", tooltip="SANA prompt with the official instruction."),
                io.Conditioning.Input(
                    "negative", tooltip="SANA prompt without instruction, or CLIP Text Encode; may be empty."
                ),
                latent_input(),
                denoise_input(),
                flow_shift_input(),
                *interval_inputs(),
                *pag_inputs(),
                mask_convention_input(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        seed: int,
        steps: int,
        cfg: float,
        positive: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        latent: io.Latent.Type,
        denoise: float,
        flow_shift: float,
        guidance_from: float = 0.0,
        guidance_to: float = 1.0,
        pag_scale: float = 0.0,
        pag_block: int = -1,
        mask_convention: str = "nvlabs",
    ) -> io.NodeOutput:
        guided = perturbed(model, pag_scale, pag_block, guidance_from, guidance_to)
        guider = SanaGuidance(with_mask_convention(guided, mask_convention))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        guider.set_interval(guidance_from, guidance_to)
        sigmas = schedule(model, steps, denoise, flow_shift)
        return io.NodeOutput(sample_seeded(guider, flow_dpm_sampler(), sigmas, latent, seed, whole=denoise == 1))


class FlowDPMScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowDPMScheduler",
            display_name="SANA schedule (Flow-DPM)",
            category=CATEGORY,
            search_aliases=["scheduler", "sigmas", "flow shift", "noise schedule"],
            description="The noise levels of Flow-DPM-Solver, for SamplerCustomAdvanced.",
            inputs=[model_input(), steps_input(), denoise_input(), flow_shift_input()],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, steps: int, denoise: float, flow_shift: float) -> io.NodeOutput:
        flow_model(model)
        return io.NodeOutput(schedule(model, steps, denoise, flow_shift))


class FlowDPMSolver(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowDPMSolver",
            display_name="Flow-DPM-Solver",
            category=CATEGORY,
            search_aliases=["sampler", "dpm solver", "dpm++", "sampler select"],
            description="The solver as a sampler, for SamplerCustomAdvanced. KSampler lists it as flow_dpm.",
            inputs=[],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(flow_dpm_sampler())


class SanaGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SanaGuider",
            display_name="SANA guider",
            category=CATEGORY,
            search_aliases=["guider", "cfg guider", "guidance interval"],
            description="Guidance for SamplerCustomAdvanced, with an interval and a mask convention.",
            inputs=[
                model_input(),
                io.Conditioning.Input("positive", tooltip="SANA prompt with the official instruction."),
                io.Conditioning.Input(
                    "negative", tooltip="SANA prompt without instruction, or CLIP Text Encode; may be empty."
                ),
                cfg_input(),
                *interval_inputs(),
                mask_convention_input(),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        positive: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        cfg: float,
        guidance_from: float = 0.0,
        guidance_to: float = 1.0,
        mask_convention: str = "nvlabs",
    ) -> io.NodeOutput:
        flow_model(model)
        guider = SanaGuidance(with_mask_convention(model, mask_convention))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        guider.set_interval(guidance_from, guidance_to)
        return io.NodeOutput(guider)


class SanaPerturbedAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        scale, block = pag_inputs()
        scale.default, scale.optional, block.optional = 2.0, False, False
        return io.Schema(
            node_id="SanaPerturbedAttention",
            display_name="SANA perturbed attention",
            category=CATEGORY,
            search_aliases=["pag", "perturbed attention guidance", "self-attention guidance"],
            description="Perturbed-attention guidance for SANA with any sampler.",
            inputs=[model_input(), scale, block],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, pag_scale: float, pag_block: int) -> io.NodeOutput:
        return io.NodeOutput(perturbed(model, pag_scale, pag_block))


class SCMScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SCMScheduler",
            display_name="SANA Sprint schedule",
            category=CATEGORY,
            search_aliases=["sprint", "scheduler", "sigmas", "scm", "trigflow"],
            description="The noise levels of SANA-Sprint.",
            inputs=[
                steps_input(2),
                io.Float.Input(
                    "max_angle",
                    default=MAX_ANGLE,
                    min=0.1,
                    max=1.5708,
                    step=0.0001,
                    round=False,
                    tooltip="Radians; where to start. Below pi / 2, the latent of a picture is kept in part.",
                ),
                io.Float.Input(
                    "intermediate_angle",
                    default=TWO_STEP_ANGLE,
                    min=0.01,
                    max=1.57,
                    step=0.01,
                    tooltip="Radians; the second angle of a two-step schedule, below max_angle.",
                ),
                io.Boolean.Input(
                    "paper_angles",
                    default=False,
                    tooltip=f"The paper's best angles, for {', '.join(map(str, PAPER_ANGLES))} steps.",
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, steps: int, max_angle: float, intermediate_angle: float, paper_angles: bool) -> io.NodeOutput:
        angles = scm_angles(steps, max_angle=max_angle, intermediate_angle=intermediate_angle, paper=paper_angles)
        return io.NodeOutput(angle_sigmas(angles).clamp(max=1))  # 1.5708 is a little above pi / 2


class SCMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SCMSampler",
            display_name="SANA Sprint sampler",
            category=CATEGORY,
            search_aliases=["sprint", "few steps", "distilled", "ksampler", "scm"],
            description="Samples a SANA-Sprint model in a few steps.",
            inputs=[
                io.Model.Input("model", tooltip="A Sprint model from Load SANA."),
                seed_input(),
                io.Float.Input(
                    "guidance",
                    default=DEFAULT_GUIDANCE_SCALE,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="What the model is told; trained with 4 to 5.",
                ),
                io.Conditioning.Input("positive", tooltip="SANA prompt with the official instruction."),
                latent_input(),
                io.Sigmas.Input("sigmas", tooltip="From SANA Sprint schedule."),
            ],
            outputs=[io.Latent.Output()],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        seed: int,
        guidance: float,
        positive: io.Conditioning.Type,
        latent: io.Latent.Type,
        sigmas: io.Sigmas.Type,
    ) -> io.NodeOutput:
        if not sana_model(model).identity.config.guidance_embed:
            raise ValueError("this MODEL is not SANA-Sprint; use SANA sampler (Flow-DPM) for it")
        kept = latent["samples"].any() and "noise_mask" not in latent
        text = ""
        if kept and len(sigmas) and float(sigmas[0]) > 0.99:
            text = "Nothing of the picture is kept: take less max_angle in SANA Sprint schedule, such as 1.4."
        guider = SanaGuidance(with_guidance_embed(model, guidance))
        guider.set_conds(positive, positive)
        return reported(sample_seeded(guider, None, sigmas, latent, seed), text=text)


NODES = (
    FlowDPMSampler,
    FlowDPMScheduler,
    FlowDPMSolver,
    SanaGuider,
    SanaPerturbedAttention,
    SCMSampler,
    SCMScheduler,
)
