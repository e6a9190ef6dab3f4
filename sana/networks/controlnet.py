"""The ControlNet of SANA: copies of the first blocks that see a second image and correct the tokens of the transformer.

The graph is NVlabs' (diffusion/model/nets/sana_multi_scale_controlnet.py): a transformer hands over its tokens after the first
block, with the modulation. diffusers' SanaControlNetModel has the same tensors but makes both itself, with `embed` and
`modulation`, so it branches off one block earlier, and corrects one block later, which gives other pictures.
"""

from types import ModuleType

import torch
from torch import Tensor, nn

from ..config import TransformerConfig
from .block import Block, block_modulation
from .layers import Build, TextProjection
from .operations import Operations
from .transformer import Modulation, TextContext, TimeEmbedding, compact_text


class SanaControlNet(nn.Module):
    """Corrections for the first blocks of a transformer. Attribute names are those of diffusers' SanaControlNetModel.

    config: that of the transformer, with `control_blocks` above 0.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        operations: type | ModuleType = Operations,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        build, width = Build(operations, dtype, device), config.hidden_size
        self.config = config
        self.patch_embed = nn.Module()
        self.patch_embed.proj = build.linear(config.channels, width)
        self.time_embed = TimeEmbedding(config, build)
        self.caption_projection = TextProjection(config.text_width, width, build)
        self.caption_norm = build.rms_norm(width, eps=1e-5)
        self.transformer_blocks = nn.ModuleList(Block(config, build) for _ in range(config.control_blocks))
        self.input_block = build.linear(width, width)
        self.controlnet_blocks = nn.ModuleList(build.linear(width, width) for _ in range(config.control_blocks))

    @property
    def dtype(self) -> torch.dtype:
        return self.input_block.weight.dtype

    def activation_bytes(self, shape: torch.Size, element_size: int) -> int:
        """About what `forward` takes for a latent of this shape (B, 32, H, W), beside its corrections."""
        live = 5 + 4 * self.config.ff_width / self.config.hidden_size  # tokens of the transformer, and as it has them
        return int(live * self._token_bytes(shape, element_size))

    def correction_bytes(self, shape: torch.Size, element_size: int) -> int:
        """What its corrections take, which the transformer keeps."""
        return self.config.control_blocks * self._token_bytes(shape, element_size)

    def _token_bytes(self, shape: torch.Size, element_size: int) -> int:
        batch, _, rows, columns = shape
        return batch * rows * columns * self.config.hidden_size * element_size

    def embed(self, x: Tensor) -> Tensor:
        """Latent (B, 32, H, W) to tokens (B, H * W, D)."""
        return self.patch_embed.proj(x.flatten(2).transpose(1, 2))

    def time(self, timestep: Tensor) -> Tensor:
        """As `Modulation.time`, by the ControlNet's own weights. timestep: (B,). Returns (B, 6, D)."""
        return self.time_embed(timestep if self.config.continuous_time else timestep.floor(), None, self.dtype)[0]

    def text_context(self, text: Tensor, text_mask: Tensor | None = None) -> TextContext:
        """As `SanaTransformer.text_context`, for the copied blocks."""
        text, mask = compact_text(text, text_mask)
        projected = self.caption_norm(self.caption_projection(text))
        return TextContext(tuple(block.attn2.keys_values(projected) for block in self.transformer_blocks), mask)

    def forward(self, tokens: Tensor, image: Tensor, modulation: Modulation, context: TextContext) -> list[Tensor]:
        """Corrections, each (B, N, D), for tokens (B, N, D) after the transformer's first block.

        image: latent (B, 32, H, W) of the image that guides, N = H * W; modulation: the transformer's.
        """
        x = tokens + self.input_block(self.embed(image))
        rows = block_modulation(self.transformer_blocks, modulation.time)
        corrections = []
        for i, (block, out) in enumerate(zip(self.transformer_blocks, self.controlnet_blocks, strict=True)):
            x = block(x, image.shape[-1], rows[i], context.keys_values[i], context.mask)
            corrections.append(out(x))
        return corrections
