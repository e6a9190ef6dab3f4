"""The SANA transformer as a model of the host: MODEL, sampled, offloaded, patched, quantised and saved by the host itself."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.patcher_extension
import comfy.supported_models_base
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...sana.checkpoints.files import TensorFile, unwrapped
from ...sana.checkpoints.header import header_tensor
from ...sana.checkpoints.names import HEADER_TENSOR, to_transformer_names
from ...sana.checkpoints.transformer import identify_transformer
from ...sana.config import DOWNSAMPLE, LATENT_CHANNELS, LATENT_SCALE, TransformerIdentity
from ...sana.networks.block import BlockInputs, SelfAttention
from ...sana.networks.controlnet import SanaControlNet
from ...sana.networks.layers import Attention, LinearAttention
from ...sana.networks.transformer import (
    WORKING_BYTES,
    SanaTransformer,
    TextContext,
    open_length,
)
from ...sana.sampling.guidance import GUIDANCE_EMBED_SCALE
from .entries import ForeignEntryError
from .padding import complete_mask
from .patches import output_patches, tell_uncalled
from .prefetch import fetching
from .quantised import check_quantised
from .run import GUIDANCE_EMBED, IDENTITY_BLOCKS, RUN, SamplingRun

FILE_NAME = "sana_file"  # entry of the metadata by which our loader tells the name of the file, for errors
UNNAMED = "the checkpoint"  # a file that a loader of the host has opened, which does not tell its name
IMAGE_MODEL = "sana"  # value of `image_model` in the host's model configurations

Options = Mapping[str, object]


class SanaLatentFormat(comfy.latent_formats.LatentFormat):
    """LATENT is the autoencoder's own latent; the scale is applied at the model's door."""

    latent_channels = LATENT_CHANNELS
    spacial_downscale_ratio = DOWNSAMPLE  # spelled as the host spells it
    scale_factor = LATENT_SCALE


class HostTransformer(SanaTransformer):
    """The transformer with the calling convention and the hooks of the host."""

    dtype = None  # which the host reads and writes

    def __init__(
        self,
        image_model: str,
        identity: TransformerIdentity,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations: type | ModuleType | None = None,
    ) -> None:
        super().__init__(identity.config, operations=operations, dtype=dtype, device=device)
        self.dtype = dtype
        self.in_channels = identity.config.channels  # which core's RenormCFG reads
        self.identity = identity

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        control: Mapping[str, list[Tensor]] | None = None,
        transformer_options: Options | None = None,
        keys_values: list[Tensor] | None = None,
        text_bias: Tensor | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """x: (B, 32, H, W); timestep: (B,); keys_values: of the text, two for each block, see `SanaModel`."""
        options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        # Core's EasyCache writes into the x that it is given, which in float32 is the sampler's own.
        x = x.clone() if wrappers else x
        return executor.execute(x, timestep, keys_values, text_bias, guidance_scale, control, options)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        keys_values: list[Tensor],
        text_bias: Tensor | None,
        guidance_scale: float | None,
        control: Mapping[str, list[Tensor]] | None,
        options: Options,
    ) -> Tensor:
        if len(options.get("sigmas", timestep)) == 1:  # one latent, whose conditions the host has put side by side
            timestep = timestep[:1]
        guidance_embed = (
            None if guidance_scale is None else torch.full_like(timestep, GUIDANCE_EMBED_SCALE * guidance_scale)
        )
        modulation = self.modulation(timestep, guidance_embed, x.dtype)
        context = TextContext(tuple(zip(keys_values[::2], keys_values[1::2], strict=True)), text_bias)
        corrections = [part if part is None else part.to(x) for part in (control or {}).get("output", [])]
        fetch = fetching(self.transformer_blocks, x.device, options)

        def run_block(i: int, tokens: Tensor, inputs: BlockInputs, band: int | None) -> Tensor:
            fetch(self.transformer_blocks[i])
            return self.run_patched_block(options, i, tokens, inputs, band)

        velocity = self.velocity(
            x,
            modulation,
            context,
            identity_blocks=options.get(IDENTITY_BLOCKS, ()),
            control=lambda tokens: corrections,
            max_bytes=WORKING_BYTES,
            run_block=run_block,
        )
        fetch(None)
        return velocity

    def run_patched_block(
        self, options: Options, i: int, tokens: Tensor, inputs: BlockInputs, band: int | None
    ) -> Tensor:
        """`run_block`, or what other nodes have put in its place, or in the place of its self-attention."""
        options = {**options, "block_index": i, "total_blocks": self.config.depth, "block_type": "double"}
        replacements = options.get("patches_replace", {})
        whole = replacements.get("dit", {}).get(("double_block", i))
        patched = patched_attention(replacements.get("attn1", {}), i, self.config.perturbed_block, options)
        inputs = inputs._replace(attention=host_attention(options))
        if inputs.self_attention is None and patched is not None:
            inputs, band = inputs._replace(self_attention=patched), None  # it may need all tokens at once

        def run(arguments: dict[str, object]) -> dict[str, object]:
            tokens = arguments["img"]
            if band is not None and whole is not None:
                tokens = tokens.clone()  # a band would change what a replacement may still compare with the result
            tokens = self.run_block(i, tokens, inputs._replace(modulation=arguments["vec"]), band)
            return {**arguments, "img": tokens}

        arguments = {"img": tokens, "txt": inputs.text, "vec": inputs.modulation, "transformer_options": options}
        return (run(arguments) if whole is None else whole(arguments, {"original_block": run}))["img"]


def host_attention(options: Options) -> Attention:
    """The attention that the host has chosen for this machine, with the overrides of other nodes."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        mask = None if bias is None else bias.expand(-1, -1, q.shape[2], -1)
        return optimized_attention(
            q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True, transformer_options=options
        )

    return attention


def patched_attention(
    replacements: Mapping[tuple[str, int], Callable[..., Tensor]], i: int, middle: int, options: Options
) -> SelfAttention | None:
    """Self-attention of block i with what other nodes have put in its place and behind it; None: they have not.

    middle: the block that they call so.
    """
    replaced = replacements.get(("block", i)) or (replacements.get(("middle", 0)) if i == middle else None)
    behind = output_patches(options)
    if replaced is None and not behind:
        return None

    def self_attention(layer: LinearAttention, x: Tensor) -> Tensor:
        if replaced is None:
            out = layer(x)
        else:
            out = layer.project(replaced(layer.to_q(x), layer.to_k(x), layer.to_v(x), dict(options)))
        for patch in behind:
            out = patch(out, dict(options))
        return out

    return self_attention


class SanaModel(comfy.model_base.BaseModel):
    """What the host samples: it prepares the text once a run, and calls the transformer."""

    def __init__(self, model_config: "SanaConfig", device: torch.device | None = None) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=HostTransformer)
        self.identity: TransformerIdentity = model_config.unet_config["identity"]

    def extra_conds(self, **given: object) -> dict[str, comfy.conds.CONDRegular]:
        """The text of a condition and its mask, for the host to batch. Raises ValueError for text of another encoder."""
        text, mask = given.get("cross_attn"), given.get("attention_mask")
        if text is None:
            raise ValueError("this conditioning has no text; connect one made with the CLIP of a SANA loader")
        width = self.identity.config.text_width
        if text.shape[-1] != width:
            raise ValueError(
                f"this conditioning has width {text.shape[-1]}, and this SANA model takes {width}; "
                "encode the prompt with the CLIP of the SANA loader"
            )
        # Not CONDCrossAttn, which would repeat tokens to make lengths equal.
        return {
            "c_crossattn": comfy.conds.CONDRegular(text),
            "attention_mask": comfy.conds.CONDRegular(complete_mask(text, mask)),
        }

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Mapping[str, list[Tensor]] | None = None,
        transformer_options: Options | None = None,
        **given: Tensor,
    ) -> Tensor:
        options = transformer_options or {}
        self.check_latent(x.shape)
        run: SamplingRun | None = options.get(RUN)
        if run is not None:
            tell_uncalled(options, self.identity.config.depth, run.told)
        context = self.text_context(c_crossattn, given.pop("attention_mask"), x.device, options)
        arguments = {"keys_values": [part for pair in context.keys_values for part in pair], "text_bias": context.mask}
        if self.identity.config.guidance_embed:
            arguments["guidance_scale"] = float(options.get(GUIDANCE_EMBED, self.identity.guidance_scale))
        return super()._apply_model(x, t, control=control, transformer_options=options, **arguments)

    def check_latent(self, shape: Sequence[int]) -> None:
        """Raises ValueError for a latent of another model, or of a video."""
        channels = self.identity.config.channels
        for found, expected, what in ((len(shape), 4, "dimensions"), (shape[1], channels, "channels")):
            if found != expected:
                raise ValueError(
                    f"this latent has {found} {what}, and SANA takes {expected}; use EmptySanaLatentImage, or encode the image "
                    "with a DC-AE"
                )

    def text_context(
        self,
        text: Tensor,
        mask: Tensor,
        device: torch.device,
        options: Options,
        network: SanaControlNet | None = None,
    ) -> TextContext:
        """Keys, values and an additive mask for a batch of texts on a device, from the run if it has them already.

        text, mask: wherever they are; the host leaves them on the CPU until it calls the network, which is later.
        network: whose keys and values; None: the transformer's.
        """
        run: SamplingRun | None = options.get(RUN)

        def make() -> TextContext:
            dtype = self.get_dtype_inference()
            context = (network or self.diffusion_model).text_context(text.to(device, dtype), mask.to(device) > 0)
            if context.mask is None:
                return context
            bias = torch.zeros(context.mask.shape, dtype=dtype, device=device)
            bias = bias.masked_fill(~context.mask, torch.finfo(dtype).min)
            return context._replace(mask=open_length(bias, 3))

        # The host gives every condition an id. Beside a prompt for an area it puts a negative prompt for the same area,
        # with the id of the prompt and with another text: the key needs to tell on which side a condition is.
        ids = (tuple(options.get("uuids", ())), tuple(options.get("cond_or_uncond", ())))
        key = (id(network), ids, tuple(text.shape), device)
        return make() if run is None else run.context(key, make)

    def process_timestep(self, timestep: Tensor, **given: object) -> Tensor:
        """The time that this network was trained with, also after a node that sets the sampling of other models."""
        trained = self.model_config.sampling_settings["multiplier"]
        return timestep * (trained / getattr(self.model_sampling, "multiplier", 1.0))

    def process_latent_out(self, latent: Tensor) -> Tensor:
        """Raises ValueError if sampling has broken down, which would otherwise end in a black picture."""
        if not bool(torch.isfinite(latent).all()):
            computing = self.get_dtype_inference()
            advice = f"this model was released in {self.identity.dtype}: load it with dtype auto or fp32"
            if computing == torch.float32:
                advice = "a LoRA, a ControlNet or the checkpoint is damaged: try without the first two"
            raise ValueError(
                f"sampling gave numbers that are not finite, computing in {computing}; {advice}; or the noise levels repeat "
                "or end at 1: choose another schedule"
            )
        return super().process_latent_out(latent)

    def memory_required(self, input_shape: list[int], cond_shapes: Mapping[str, list[list[int]]] | None = None) -> int:
        """Bytes of activations for a batch of latents of this shape. Raises ValueError as `check_latent`."""
        self.check_latent(input_shape)
        return self.diffusion_model.activation_bytes(torch.Size(input_shape), self.get_dtype_inference().itemsize)


class UnetConfig(dict):
    """A configuration as the host's models keep one. Nodes for UNets read entries that only these have."""

    def __missing__(self, name: str) -> NoReturn:
        raise ForeignEntryError(
            f"this MODEL is SANA, which has no {name!r}: this node is for other models, such as SDXL; leave it out"
        )


class SanaConfig(comfy.supported_models_base.BASE):
    """How the host builds, loads and saves a `SanaModel`. One for every SANA network: `unet_config` holds its identity.

    `detect` makes the `unet_config`, with the name of the file, which only this class needs.
    """

    unet_config = {"image_model": IMAGE_MODEL}
    unet_extra_config: dict[str, object] = {}
    latent_format = SanaLatentFormat
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def __init__(self, unet_config: dict[str, object]) -> None:
        super().__init__({name: value for name, value in unet_config.items() if name != FILE_NAME})
        self.unet_config = UnetConfig(self.unet_config)
        self.file_name: str = unet_config.get(FILE_NAME, UNNAMED)
        identity: TransformerIdentity = unet_config["identity"]
        multiplier = 1 if identity.config.continuous_time else 1000
        self.sampling_settings = {"multiplier": multiplier, "shift": identity.flow_shift or 1.0}
        preferred = torch.float16 if identity.dtype == "float16" else torch.bfloat16
        self.supported_inference_dtypes = [preferred, torch.bfloat16, torch.float32]

    def get_model(
        self, state_dict: Mapping[str, Tensor], prefix: str = "", device: torch.device | None = None
    ) -> SanaModel:
        return SanaModel(self, device=device)

    def clip_target(self, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """None: the text encoder of a checkpoint file is loaded by our own loader, which knows its tokenizer."""

    def process_unet_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Any dialect to our names. Raises CheckpointError as `check_quantised` does."""
        tensors = to_transformer_names(unwrapped(state_dict))
        expected = SanaTransformer(self.unet_config["identity"].config, device="meta").state_dict()
        check_quantised(expected, tensors, self.file_name)
        return tensors

    def process_vae_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """None: the autoencoder of a checkpoint file is loaded by our own loader too."""
        return {}

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """With diffusers' names, and what the tensors cannot tell.

        1x1 convolutions stay matrices: a tensor that the host still has to patch would not survive a change of shape.
        Our loaders take both shapes, and `python -m sana convert` writes that of diffusers.
        """
        saved = {**state_dict, HEADER_TENSOR: header_tensor(self.unet_config["identity"])}
        return {f"model.diffusion_model.{name}": tensor for name, tensor in saved.items()}


def detect(state_dict: Mapping[str, Tensor], prefix: str, metadata: Mapping[str, str] | None) -> dict[str, object]:
    """The host's configuration for the SANA transformer in a file."""
    found = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    tensors = unwrapped(found)
    told = dict(metadata or {})
    name = told.get(FILE_NAME, UNNAMED)
    identity = identify_transformer(TensorFile(Path(name), tensors, told))
    return {"image_model": IMAGE_MODEL, "identity": identity, FILE_NAME: name}
