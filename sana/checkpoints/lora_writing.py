"""A LoRA file of any trainer as one in the layout of diffusers, which PEFT merges into the same weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import VARIANTS
from ..networks.adapters import Change, as_product
from .adapters import HEADER
from .files import CheckpointError
from .lora import Lora, Part, read_lora, tell_fit
from .modelspec import LORA, modelspec
from .names import POINTWISE

COMPONENTS = ("transformer", "text_encoder")  # what names in diffusers begin with, in the order of `Part.known`
# Of a weight whose change is computed whole; the largest of a release that trainers change has 25 million.
MOST_NUMBERS = 2**26

Tensors = dict[str, Tensor]


def lora_in_diffusers_layout(
    source: Path | str, dtype: torch.dtype | None = None, variant: str | None = None
) -> tuple[Tensors, dict[str, str], str]:
    """Tensors and header of a LoRA as `SanaPipeline.load_lora_weights` of diffusers takes them, and what it is in words.

    Factors of LoRA and DoRA stay as they are; LoHa, LoKr and differences become factors of a higher rank with the same
    product. dtype: of the numbers; None: those of the factors, or float32 for new ones. variant: a name from VARIANTS, where
    official names mean other layers for Sprint. Raises CheckpointError for what diffusers has no form for, and as
    `read_lora` does.
    """
    lora = read_lora(source, sprint=VARIANTS[variant].transformer.guidance_embed if variant else None)
    parts = Part.known()
    found = [lora.found(part) for part in parts]
    told = tell_fit(lora, set().union(*found))
    if told:
        raise CheckpointError(f"{told}, so it is not converted")
    tensors: Tensors = {}
    header: dict[str, object] = {}
    ranks: set[int] = set()
    for component, part, layers in zip(COMPONENTS, parts, found, strict=True):
        changes = {name: change for by_name in layers.values() for name, change in by_name.items()}
        if not changes:
            continue
        told_of = {name.removesuffix(".weight"): _tensors(lora, name, change, part) for name, change in changes.items()}
        tensors |= {
            # each with memory of its own: parts of a fused layer share a factor
            f"{component}.{path}.{end}": tensor.to(dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)
            for path, ends in told_of.items()
            for end, tensor in ends.items()
        }
        rank_of = {path: len(ends["lora_A.weight"]) for path, ends in told_of.items()}
        alpha_of = {name.removesuffix(".weight"): change.scale for name, change in changes.items()}
        alpha_of = {path: scale * rank_of[path] for path, scale in alpha_of.items()}
        config = _config(lora, changes, rank_of, alpha_of)
        header |= {f"{component}.{key}": value for key, value in config.items()}
        ranks |= {*rank_of.values()}
    several = f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else f"{min(ranks)}"
    words = f"a LoRA in diffusers' layout, of rank {several} on {sum(map(len, found))} layers"
    settings = json.dumps(header, indent=2, sort_keys=True)
    return tensors, {HEADER: settings, **modelspec(LORA, Path(lora.name).stem)}, words


def _tensors(lora: Lora, name: str, change: Change, part: Part) -> Tensors:
    """What diffusers has for a change, by the ends of names. Raises CheckpointError if it has no form for it."""
    lengths = change.lengths
    rows, columns = change.shape
    if change.kind == "replacement" or len(part.shapes[name]) != 2 or not name.endswith(".weight"):
        what = "replaces" if change.kind == "replacement" else "changes"
        raise CheckpointError(
            f"{lora.name} {what} {name}, for which a LoRA of diffusers has no form; merge it into its model, with "
            "sana convert MODEL TARGET --lora"
        )
    if lengths is not None and len(lengths) != rows:
        raise CheckpointError(
            f"{lora.name} is a DoRA with lengths of columns, which diffusers does not know; merge it into its model, with "
            "sana convert MODEL TARGET --lora"
        )
    if change.kind != "LoRA" and rows * columns > MOST_NUMBERS:
        raise CheckpointError(
            f"{lora.name} unfolds to {rows} x {columns} numbers at {name}, and no layer of SANA has so many; "
            "use the original file"
        )
    up, down = as_product(change)
    kernel = (1, 1) if name.endswith(POINTWISE) else ()
    found = {"lora_A.weight": down.reshape(*down.shape, *kernel), "lora_B.weight": up.reshape(*up.shape, *kernel)}
    if lengths is not None:
        shape = (1, rows, *kernel) if kernel else (rows,)
        found["lora_magnitude_vector"] = lengths.reshape(shape)
    return found


def _config(
    lora: Lora, changes: Mapping[str, Change], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, object]:
    """The fields of PEFT's LoraConfig. Raises CheckpointError for layers with and without lengths, which it does not know."""
    dora = {change.lengths is not None for change in changes.values()}
    if len(dora) > 1:
        raise CheckpointError(
            f"{lora.name} is a DoRA on some of its layers only, which diffusers does not know; merge it into its model, "
            "with sana convert MODEL TARGET --lora"
        )
    rank, alpha = (max(set(values), key=list(values).count) for values in (ranks.values(), alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "use_dora": dora == {True},
    }
