"""What a LoRA is, in words: for which network, of which kind and size, and how much of it fits a model."""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..config import VARIANTS, GemmaConfig, TransformerConfig
from ..networks.adapters import Change
from .adapters import describe_lora
from .files import CheckpointError, read_tensors
from .lora import BLOCKS, Lora, Part, tell_fit
from .text_encoder import gemma_config, gemma_tensors, is_gemma
from .transformer import find_transformer

NETWORKS = ("transformer", "text encoder")  # in the order of `Part.known`
UNKNOWN = "a model of unknown kind"


def lora_lines(lora: Lora, model: Path | str | None = None) -> list[str]:
    """Lines on a LoRA. model: one that it is to fit. Raises CheckpointError if that cannot be read."""
    found = [lora.found(part) for part in Part.known()]
    layers = found[0] | found[1]
    if not layers:
        kind = describe_lora(lora.tensors)
        return ["it is of no use to SANA by itself" if kind == UNKNOWN else f"it is for {kind}, and of no use to SANA"]
    networks = " and ".join(name for name, fitting in zip(NETWORKS, found, strict=True) if fitting)
    changes = [change for by_name in layers.values() for change in by_name.values()]
    lines = [f"for SANA's {networks}: {', '.join(_kinds(changes))}"]
    lines += [_made_for(found[0])] if found[0] else []
    if len(layers) < len(lora.layers):
        lines.append(f"{len(lora.layers) - len(layers)} of its {len(lora.layers)} layers are no layer of SANA")
    lines.append("use it with --lora in the shell, or a LoRA loader in ComfyUI" if model is None else _fit(lora, model))
    return lines


def _kinds(changes: Iterable[Change]) -> list[str]:
    """Each kind, with its ranks and alphas and the number of weights that it changes."""
    groups: dict[str, list[Change]] = {}
    for change in changes:
        groups.setdefault("DoRA" if change.lengths is not None else change.kind, []).append(change)
    return [f"{_kind(kind, group)} on {len(group)} weights" for kind, group in groups.items()]


def _kind(kind: str, group: list[Change]) -> str:
    ranked = [(change, rank) for change in group if (rank := change.rank) is not None]
    if not ranked:
        return kind
    ranks, alphas = [rank for _, rank in ranked], [change.scale * rank for change, rank in ranked]
    return f"{kind} of rank {_range(ranks)}, alpha {_range(alphas)}"


def _range(numbers: list[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _made_for(found: dict[str, dict[str, Change]]) -> str:
    """The variants whose weights have the shapes of these changes: those that end at its last block, if there are any."""
    shapes = {name: change.shape for changes in found.values() for name, change in changes.items()}
    blocks = [int(name.split(".")[1]) for name in shapes if name.startswith(BLOCKS)]
    depth = max(blocks, default=-1) + 1
    fitting = [
        name
        for name, row in VARIANTS.items()
        if depth <= row.transformer.depth and _has(replace(row.transformer, depth=1), shapes)
    ]
    whole = [name for name in fitting if VARIANTS[name].transformer.depth == depth]
    size = f"up to block {max(blocks)}" if blocks else "outside of the blocks"
    if not fitting:
        name, (rows, columns) = next(iter(shapes.items()))
        return f"changes weights {size}, of shapes that no released SANA has, such as {rows} x {columns} of {name}"
    return f"changes weights {size}, with the shapes of {', '.join(whole or fitting)}"


def _has(config: TransformerConfig, shapes: dict[str, tuple[int, int]]) -> bool:
    """Whether weights have these shapes in a transformer whose only block stands for all."""
    known = {name: (shape[0], math.prod(shape[1:])) for name, shape in Part.transformer(config).shapes.items()}
    return all(
        known.get(re.sub(r"(?<=^transformer_blocks\.)\d+", "0", name)) == shape for name, shape in shapes.items()
    )


def _fit(lora: Lora, model: Path | str) -> str:
    """How much of a LoRA fits a model, or why it does not."""
    file = read_tensors(model, "transformer")
    identity = find_transformer(file).identity
    text = read_tensors(model, "text_encoder")
    config = gemma_config(gemma_tensors(text), text) if is_gemma(text.tensors) else GemmaConfig()
    own = replace(lora, sprint=identity.config.guidance_embed)
    name = Path(model).name
    try:
        fitting = {
            layer
            for part in (Part.transformer(identity.config), Part.text_encoder(config))
            for layer in own.changes(part)
        }
        return tell_fit(own, fitting) or f"all of its {len(own.layers)} layers fit {name}"
    except CheckpointError as error:
        return str(error)
