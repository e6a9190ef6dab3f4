"""Which rows of a text are padding, told by the rows themselves: nodes that join or rebuild texts pass on no more.

Rows of zeros would be the simpler mark, but SANA reads a negative prompt as far as the prompt counts, with the states of
its padding. Kept beside the text, these would be lost in Conditioning (Concat), Conditioning (Average) and a scheduled
CLIP, and the model would read zeros. With the demo model, guidance 4.5 and 10 steps, zeros there change latents of
deviation 0.84 by up to 3.3, and marks by at most 1.2e-5.
"""

import torch
from torch import Tensor


def mark_padding(text: Tensor, mask: Tensor) -> Tensor:
    """Float32 text (B, L, C) whose rows of padding, outside of mask (B, L), have the last bit of all their numbers set.

    That changes them by less than rounding does, and other rows have it with a chance of 2**-C. Rows of zeros stay zeros.
    Another dtype has no marks: what casts a text has to keep its mask.
    """
    kept = mask.bool() | (text == 0).all(dim=-1)
    return torch.where(kept.unsqueeze(-1), text, (text.contiguous().view(torch.int32) | 1).view(torch.float32))


def complete_mask(text: Tensor, mask: Tensor | None) -> Tensor:
    """A mask (B, L) for text (B, L, C): rows beyond the mask at hand count unless they are zero or marked as padding.

    Core's ConditioningConcat joins texts but not masks, and a scheduled CLIP gives none.
    """
    known = torch.zeros(len(text), 0, device=text.device) if mask is None else mask.reshape(-1, mask.shape[-1]).float()
    rest = text[:, known.shape[-1] :]
    counts = (rest != 0).any(dim=-1)
    if text.dtype == torch.float32:
        counts &= (rest.contiguous().view(torch.int32) & 1 == 0).any(dim=-1)
    return torch.cat([known, counts.to(known)], dim=1)
