"""Training of a SANA transformer by flow matching: from a noisy latent and a caption, predict noise minus latent."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..networks.transformer import SanaTransformer
from ..sampling.schedule import shift_sigma
from ..text.prompt import INSTRUCTION
from ..text.text_encoder import GemmaTextEncoder

LAYOUT_SHIFT = 20.0  # most noise levels lie above 0.9, where a latent of 8 x 8 cells shows little more than places


@dataclass(frozen=True)
class FlowBatch:
    """Latents of one size with what they show: captions to encode, or encoded ones."""

    latents: Tensor  # (B, 32, H, W), scaled
    captions: Sequence[str] = ()
    text: Tensor | None = None  # (B, L, C)
    text_mask: Tensor | None = None  # (B, L) bool
    seed: int = 0  # of noise, noise levels and dropped captions
    weight: Tensor | None = (
        None  # (B, 1, H, W) or (B, 1, 1, 1), of the errors of each picture or cell; None: all count alike
    )
    layout_share: float = 0.0  # of samples at noise levels shifted by LAYOUT_SHIFT, where it is decided what goes where

    def __len__(self) -> int:
        return len(self.latents)


class FlowObjective(nn.Module):
    """Mean squared error of the velocity (arXiv 2410.10629 section 4.1; NVlabs/Sana diffusion/model/respace.py).

    text_encoder: trained together with the transformer; None: batches bring encoded captions. flow_shift: moves the noise
    levels trained on, as in sampling. dropout: share of captions replaced by the empty prompt, for guidance.
    null: text (L, C) of the empty prompt, needed without a text encoder.
    """

    def __init__(
        self,
        transformer: SanaTransformer,
        text_encoder: GemmaTextEncoder | None = None,
        *,
        flow_shift: float = 3.0,
        dropout: float = 0.1,
        null: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.flow_shift = flow_shift
        self.dropout = dropout
        self.register_buffer("null", null, persistent=False)

    def forward(self, batch: FlowBatch) -> Tensor:
        device = self.transformer.scale_shift_table.device
        clean = batch.latents.to(device, torch.float32)
        generator = torch.Generator(device).manual_seed(batch.seed)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        sigma = self.noise_levels(len(clean), batch.layout_share, generator, device)
        dropped = torch.rand(len(clean), generator=generator, device=device) < self.dropout
        text, text_mask = self.encode(batch, dropped)
        x = torch.lerp(clean, noise, sigma[:, None, None, None])
        timestep = sigma if self.transformer.config.continuous_time else 1000 * sigma
        # On a CPU, fused attention has a slow backward pass where keys are few. Recomputation would not see the choice.
        plain = device.type == "cpu" and not self.transformer.recompute
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            velocity = self.transformer(x, timestep, text, text_mask)
        errors = (velocity.float() - (noise - clean)).square()
        return (errors if batch.weight is None else errors * batch.weight.to(device)).mean()

    def matrices(self) -> list[nn.Parameter]:
        """The weights of the linear layers within blocks, where Muon needs far fewer steps than AdamW."""
        blocks = [self.transformer.transformer_blocks]
        if self.text_encoder is not None:
            blocks.append(self.text_encoder.model.layers)
        layers = (module for part in blocks for module in part.modules() if isinstance(module, nn.Linear))
        return [layer.weight for layer in layers if layer.weight.requires_grad]

    def layers(self) -> list[str]:
        """Paths of the layers that use their weights in one call each, for `shard`: what is in another one comes first.

        Keys and values of the text are computed for all blocks before the first of them runs, so they are layers of their own;
        so are the tables of all blocks, which therefore belong to no layer.
        """
        found = []
        for i, block in enumerate(self.transformer.transformer_blocks):
            path = f"transformer.transformer_blocks.{i}"
            texts = ((name, getattr(block.attn2, name)) for name in ("to_k", "to_v", "norm_k"))
            found += [f"{path}.attn2.{name}" for name, layer in texts if any(True for _ in layer.parameters())]
            found += [f"{path}.{name}" for name in ("attn1", "attn2", "ff")]
        return found

    def noise_levels(self, count: int, layout_share: float, generator: torch.Generator, device: torch.device) -> Tensor:
        """Logit-normal noise levels (arXiv 2403.03206, section 3.1) on NVlabs' grid of thousandths, shifted: (count,)."""
        uniform = (1000 * torch.sigmoid(torch.randn(count, generator=generator, device=device))).floor() / 1000
        sigmas = shift_sigma(uniform, self.flow_shift)
        if not layout_share:
            return sigmas
        chosen = torch.rand(count, generator=generator, device=device) < layout_share
        return torch.where(chosen, shift_sigma(uniform, LAYOUT_SHIFT), sigmas)

    def encode(self, batch: FlowBatch, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Text and mask; a dropped caption keeps its mask, as guidance will use it."""
        if self.text_encoder is None:
            text, text_mask, null = batch.text.to(dropped.device), batch.text_mask.to(dropped.device), self.null
        else:
            text, text_mask = self.text_encoder(batch.captions, INSTRUCTION)
            longest = int(text_mask.sum(dim=1).max())  # what is behind it counts for no caption
            text, text_mask = text[:, :longest], text_mask[:, :longest]
            null = self.text_encoder([""], None)[0][0]
        return torch.where(dropped[:, None, None], null[: text.shape[1]].to(text), text), text_mask


def initialise_transformer(transformer: SanaTransformer, seed: int) -> None:
    """Weights to start from, as NVlabs/Sana diffusion/model/nets/sana.py sets them, but unit weight for the caption norm."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
        elif parameter.ndim == 1:
            nn.init.constant_(parameter, 1.0 if "norm" in name else 0.0)
        elif "time_embed" in name or "caption_projection" in name:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1), generator=generator)
    nn.init.zeros_(transformer.proj_out.weight)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
