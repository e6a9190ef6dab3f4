"""The optimizers, and what each of them remembers of the weights."""

from collections.abc import Iterable

import torch
from torch import nn

# What each optimizer remembers of a weight: "step" is a count, the others have the weight's shape.
MEMORY = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}


def optimizers(
    objective: nn.Module, learning_rate: float, weight_decay: float, matrices: Iterable[nn.Parameter] = ()
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon (arXiv 2502.16982) for the matrices, scaled to steps of the size AdamW takes."""
    chosen = list(matrices)
    known = {id(matrix) for matrix in chosen}
    others = [p for p in objective.parameters() if p.requires_grad and id(p) not in known]
    common = {"lr": learning_rate, "weight_decay": weight_decay}
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, betas=(0.9, 0.99), **common)]
    if chosen:
        found.append(torch.optim.Muon(chosen, adjust_lr_fn="match_rms_adamw", **common))
    return found
