"""The ControlNet of SANA as a CONTROL_NET, for the host's own ControlNetApply nodes."""

from pathlib import Path

import comfy.controlnet
import comfy.model_management as management
import comfy.ops
import torch
from torch import Tensor

from ...sana.checkpoints.controlnet import check_controlnet, load_controlnet
from ...sana.networks.block import BlockInputs
from ...sana.networks.controlnet import SanaControlNet
from .model import SanaLatentFormat, SanaModel


class HostControlNet(SanaControlNet):
    """The ControlNet with the calling convention of the host."""

    def forward(
        self,
        x: Tensor,
        hint: Tensor,
        timesteps: Tensor,
        context: Tensor,
        attention_mask: Tensor,
        time: Tensor,
        model: SanaModel,
        options: dict[str, object],
    ) -> dict[str, list[Tensor]]:
        """Corrections for the blocks of `model`. x, hint: (B, 32, H, W); time: (B,) float32; context: (B, L, C).

        timesteps: the host's, which has rounded them to the dtype of the weights; `time` is exact.
        """
        transformer = model.diffusion_model
        text = model.text_context(context, attention_mask, x.device, options)
        modulation = transformer.modulation(time, None, x.dtype)
        # The ControlNet branches off after the first block of the model. The host asks for corrections before it calls
        # the model, to scale them and add up those of several, so this block is computed twice: 1 of 20 or 28.
        inputs = BlockInputs(x.shape[-1], modulation.blocks[0], text.keys_values[0], text.mask)
        tokens = transformer.run_block(0, transformer.embed(x), inputs)
        own = model.text_context(context, attention_mask, x.device, options, self)
        return {"output": super().forward(tokens, hint, modulation, own)}


class SanaControl(comfy.controlnet.ControlNet):
    """A CONTROL_NET. The image goes through the VAE of the ControlNetApply node."""

    def __init__(self, network: HostControlNet | None, dtype: torch.dtype | None) -> None:
        device = management.get_torch_device()
        super().__init__(
            network,
            compression_ratio=1,
            latent_format=SanaLatentFormat(),
            load_device=device,
            manual_cast_dtype=dtype,
            extra_conds=["attention_mask"],
        )
        self.model: SanaModel | None = None

    def pre_run(self, model: SanaModel, *arguments: object) -> None:
        """Raises ValueError for a model that the ControlNet cannot correct."""
        if not isinstance(model, SanaModel):
            raise ValueError("this ControlNet is for SANA, and the model is another one; use a ControlNet made for it")
        check_controlnet(self.control_model.config, model.identity.config)
        super().pre_run(model, *arguments)
        self.model = model

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: dict[str, Tensor], batched_number: int, options: dict[str, object]
    ) -> dict[str, list[Tensor]] | None:
        time = self.model.process_timestep(self.model_sampling_current.timestep(t).float())
        self.extra_args = {"time": time, "model": self.model, "options": options}
        self.manual_cast_dtype = self.model.get_dtype_inference()
        return super().get_control(x_noisy, t, cond, batched_number, options)

    def cleanup(self) -> None:
        self.model, self.extra_args = None, {}
        super().cleanup()

    def copy(self) -> "SanaControl":
        twin = SanaControl(None, self.manual_cast_dtype)
        twin.control_model, twin.control_model_wrapped = self.control_model, self.control_model_wrapped
        self.copy_to(twin)
        return twin


def load_control(path: Path) -> SanaControl:
    """The ControlNet in a file, as a CONTROL_NET. Raises CheckpointError if there is none."""
    plain = load_controlnet(path, dtype=None)
    network = HostControlNet(plain.config, operations=comfy.ops.manual_cast, device="meta")
    # Copies, as the host makes of a model: a file that shrinks while it is mapped ends the process.
    copies = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    network.load_state_dict(copies, strict=True, assign=True)
    return SanaControl(network.eval(), None)
