"""The optimizers, by their libraries, and what each of them remembers, which a saved state must hold to go on to the bit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Size, nn

OptimizerName = Literal["adamw", "adamw8bit", "prodigy", "came"]
Form = Size | type  # of what is remembered: a tensor of this shape, or a number

BETAS = (0.9, 0.99)
SCALAR = Size()
PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "pytorch_optimizer", "came": "pytorch_optimizer"}
SMALL = 4096  # numbers of a weight, below which bitsandbytes keeps 32 bits
BLOCK = 256  # numbers that share a scale in bitsandbytes


@dataclass(frozen=True)
class Memory:
    """weight: of a weight with this shape, by name. group: what is known of all weights together, beside rates and the like."""

    weight: Callable[[Size], dict[str, Form]]
    group: Mapping[str, Form] = field(default_factory=dict)


def _adamw8bit(shape: Size) -> dict[str, Form]:
    kept = {"step": int, "state1": shape, "state2": shape}
    if shape.numel() < SMALL:
        return kept
    scales, codes = Size([-(-shape.numel() // BLOCK)]), Size([256])
    return {**kept, "qmap1": codes, "qmap2": codes, "absmax1": scales, "absmax2": scales}


def _came(shape: Size) -> dict[str, Form]:
    kept = {"exp_avg": shape, "RMS": SCALAR}
    if len(shape) < 2:
        return {**kept, "exp_avg_sq": shape}
    factors = {"row": shape[:-1], "col": shape[:-2] + shape[-1:]}
    return kept | {f"exp_avg_{what}_{axis}": part for what in ("sq", "res") for axis, part in factors.items()}


# By the name of the class: those of other libraries are imported only where they are used.
MEMORY = {
    "AdamW": Memory(lambda shape: {"step": SCALAR, "exp_avg": shape, "exp_avg_sq": shape}),
    "Muon": Memory(lambda shape: {"momentum_buffer": shape}),
    "AdamW8bit": Memory(_adamw8bit),
    "Prodigy": Memory(
        lambda shape: dict.fromkeys(("s", "p0", "exp_avg", "exp_avg_sq"), shape),
        {"step": int, "d": float, "d_max": float, "d_numerator": Size([1])},
    ),
    "CAME": Memory(_came, {"step": int}),
}


# The class of each optimizer.
CLASSES = {"adamw": "AdamW", "adamw8bit": "AdamW8bit", "prodigy": "Prodigy", "came": "CAME"}


def memory_of(update: torch.optim.Optimizer) -> Memory:
    return MEMORY[type(update).__name__]


def remembered_bytes(name: OptimizerName, shape: Size) -> int:
    """What an optimizer remembers of a weight in float32, but for single numbers and for what all weights share."""
    forms = MEMORY[CLASSES[name]].weight(shape)
    own = {key: form for key, form in forms.items() if isinstance(form, Size) and form and not key.startswith("qmap")}
    bytes_each = {"state1": 1, "state2": 1} if "absmax1" in forms else {}
    return sum(bytes_each.get(key, torch.float32.itemsize) * form.numel() for key, form in own.items())


def check_optimizer(name: str) -> None:
    """Raises ValueError for a name that is no `OptimizerName`, and if its package is missing."""
    if name not in get_args(OptimizerName):
        raise ValueError(f"optimizer {name!r} is unknown; use one of {', '.join(get_args(OptimizerName))}")
    package = PACKAGES.get(name)
    if package and find_spec(package) is None:
        raise ValueError(
            f'the optimizer {name} needs the package {package}; run pip install ".[optimizers]" in the folder of this project'
        )


def checked_rate(given: float | None, name: OptimizerName, usual: float) -> float:
    """The learning rate: what is given, or else the usual one, which is 1 for Prodigy, as it finds the rate by itself.

    Raises ValueError for a rate that this optimizer cannot have.
    """
    if name == "prodigy":
        rate = 1.0 if given is None else given
        if not 0.1 <= rate <= 10:
            raise ValueError(
                f"learning_rate is {rate}; prodigy finds the rate by itself and multiplies it by this, so leave it out, or give a "
                "number between 0.1 and 10"
            )
        return rate
    rate = usual if given is None else given
    if not 0 < rate < 1:
        shown = f"{usual:.0e}".replace("e-0", "e-")
        raise ValueError(f"learning_rate is {rate}; it must be above 0 and below 1, such as {shown}")
    return rate


def optimizers(
    objective: nn.Module,
    learning_rate: float,
    weight_decay: float,
    matrices: Iterable[nn.Parameter] = (),
    name: OptimizerName = "adamw",
) -> list[torch.optim.Optimizer]:
    """The one of this name, and Muon (arXiv 2502.16982) for the matrices, scaled to steps of the size AdamW takes."""
    chosen = list(matrices)
    known = {id(matrix) for matrix in chosen}
    others = [p for p in objective.parameters() if p.requires_grad and id(p) not in known]
    common = {"lr": learning_rate, "weight_decay": weight_decay}
    found = [_make(name, others, common)]
    if chosen:
        found.append(torch.optim.Muon(chosen, adjust_lr_fn="match_rms_adamw", **common))
    return found


def _make(name: OptimizerName, weights: Sequence[nn.Parameter], common: Mapping[str, float]) -> torch.optim.Optimizer:
    """Prodigy (arXiv 2306.06101) as its authors advise for diffusion; CAME (arXiv 2307.02047) with its own decays."""
    check_optimizer(name)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(weights, betas=BETAS, **common)
    if name == "prodigy":
        from pytorch_optimizer import Prodigy

        return Prodigy(weights, betas=BETAS, bias_correction=True, safeguard_warmup=True, **common)
    if name == "came":
        from pytorch_optimizer import CAME

        return CAME(weights, **common)
    return torch.optim.AdamW(weights, betas=BETAS, **common)
