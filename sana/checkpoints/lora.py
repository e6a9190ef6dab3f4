"""LoRA files for networks: which weights they change and into what, how much of a file fits, and what fits nothing.

`adapters.py` has the names; `networks/adapters.py` has the arithmetic.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import VARIANTS, GemmaConfig, TransformerConfig
from ..networks.adapters import Change, Changes, Factors
from ..networks.transformer import SanaTransformer
from ..reading import check_file
from ..text.gemma import Gemma2
from .adapters import (
    DOWNS,
    UPS,
    Settings,
    describe_lora,
    is_lora,
    layer_names,
    prepare,
    read_settings,
    settings_beside,
    split_name,
    text_layer_names,
)
from .files import CheckpointError, read_tensors
from .kinds import describe

Shapes = Mapping[str, torch.Size]  # of the parameters of a network, by name
Merges = Mapping[str, Changes]  # by the name of a weight
Parts = dict[str, Tensor]  # of a layer in a file, by the ends of their names

# Ends of names of what may have one axis; all others have two or more.
LISTS = (".dora_scale", ".diff", ".diff_b", ".set_weight")
WHOLE = {".set_weight": "replacement", ".diff": "difference"}
BLOCKS = "transformer_blocks."  # before the number of a block in our names
FIRST_BLOCK = f"{BLOCKS}0."
ADVICE = "use a LoRA made for this model"

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A network that LoRAs are for: what files call its layers, and the shapes of its parameters."""

    names: Callable[[str], Iterator[str]]
    shapes: Shapes

    @classmethod
    def transformer(cls, config: TransformerConfig) -> "Part":
        return cls(layer_names, _shapes(SanaTransformer(config, device="meta")))

    @classmethod
    def text_encoder(cls, config: GemmaConfig) -> "Part":
        return cls(text_layer_names, _shapes(Gemma2(config, device="meta")))

    @classmethod
    def known(cls) -> tuple["Part", "Part"]:
        """A transformer with every layer that one of VARIANTS has, and Gemma-2-2b, whatever their shapes."""
        deepest = max((row.transformer for row in VARIANTS.values()), key=lambda config: config.depth)
        shapes = {
            name.replace(FIRST_BLOCK, f"{BLOCKS}{i}."): shape
            for sprint in (False, True)
            for name, shape in cls.transformer(replace(deepest, depth=1, guidance_embed=sprint)).shapes.items()
            for i in range(deepest.depth if name.startswith(FIRST_BLOCK) else 1)
        }
        return cls(layer_names, shapes), cls.text_encoder(GemmaConfig())

    def weights(self) -> dict[str, str]:
        """Its weights, by every name that files have for their layers. Biases belong to the layers of their weights."""
        paths = {name.removesuffix(".weight"): name for name in self.shapes if not name.endswith(".bias")}
        return {layer: name for path, name in paths.items() for layer in self.names(path)}


def _shapes(network: nn.Module) -> Shapes:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


@dataclass(frozen=True, eq=False)
class Lora:
    """An opened LoRA file. name: of the file, for errors."""

    name: str
    tensors: dict[str, Tensor]
    settings: Settings
    sprint: bool | None = None  # None: as the names in the file are

    @cached_property
    def layers(self) -> dict[str, Parts]:
        """The parts of each layer, by what the file calls it, or by our name for an official one."""
        sprint = any("cfg_embedder" in name for name in self.tensors) if self.sprint is None else self.sprint
        found: dict[str, Parts] = {}
        for name, tensor in prepare(self.tensors, self.settings, sprint=sprint).items():
            layer, end = split_name(name)
            if layer:
                found.setdefault(layer, {})[end] = tensor
        return found

    def changes(self, part: Part) -> dict[str, dict[str, Change]]:
        """The changes of weights and biases of a network, by layer of the file and by parameter.

        Raises CheckpointError as `found` does, and for a layer of another shape.
        """
        found = self.found(part)
        for changes in found.values():
            for name, change in changes.items():
                self._check_shape(name, change, part.shapes)
        return found

    def found(self, part: Part) -> dict[str, dict[str, Change]]:
        """As `changes`, for a network whose shapes do not count.

        Raises CheckpointError for factors that are missing, not finite, or do not fit each other.
        """
        weights = part.weights()
        return {layer: self._changes(layer, weights[layer]) for layer in self.layers if layer in weights}

    def _changes(self, layer: str, weight: str) -> dict[str, Change]:
        """By parameter: of the weight, and of the bias beside it."""
        parts = self.layers[layer]
        for end, tensor in parts.items():
            self._check_axes(layer, end, tensor)
        bias = parts.get(".diff_b")
        found = {} if bias is None else {f"{weight.removesuffix('.weight')}.bias": _whole("difference", bias)}
        try:
            change = _change(parts)
        except KeyError as error:
            raise CheckpointError(
                f"{self.name} lacks {layer}{error.args[0]}; the download may be incomplete"
            ) from error
        found = found if change is None else {weight: change, **found}
        for change in found.values():
            self._check_parts(layer, change)
        return found

    def _check_axes(self, layer: str, end: str, tensor: Tensor) -> None:
        """Raises CheckpointError for a factor that is no matrix, and for a strength that is no number."""
        if tensor.numel() != 1 if end == ".alpha" else tensor.ndim < (1 if end in LISTS else 2):
            raise CheckpointError(
                f"{self.name} is damaged at {layer}: its {end[1:]} has shape {tuple(tensor.shape)}; download it again"
            )

    def _check_parts(self, layer: str, change: Change) -> None:
        """Raises CheckpointError for numbers that are not finite, and for parts that do not fit each other."""
        finite = all(bool(tensor.float().isfinite().all()) for tensor in change.tensors)
        if not finite or not math.isfinite(change.scale):
            raise CheckpointError(
                f"{self.name} holds numbers at {layer} that are not finite; it is damaged, or its training failed"
            )
        try:
            shape = change.shape
            if change.lengths is not None and change.lengths.numel() not in shape:
                raise ValueError(f"its {change.lengths.numel()} lengths are of no axis of {shape}")
        except ValueError as error:
            raise CheckpointError(f"{self.name} is damaged at {layer}: {error}; download it again") from error

    def _check_shape(self, name: str, change: Change, shapes: Shapes) -> None:
        rows, columns = change.shape
        if name not in shapes:
            raise CheckpointError(f"{self.name} changes {name}, which this model does not have; {ADVICE}")
        height, *rest = shapes[name]
        if (rows, columns) != (height, math.prod(rest)):
            raise CheckpointError(
                f"{self.name} was made for another model: it changes {rows} x {columns} numbers of {name}, which has "
                f"{height} x {math.prod(rest)} here; {ADVICE}"
            )


def read_lora(path: Path | str, *, sprint: bool | None = None) -> Lora:
    """A LoRA in a file, or in the folder that PEFT or a trainer wrote.

    Raises CheckpointError if it is something else, and FileNotFoundError.
    sprint: whether the model is Sprint, whose official names mean other layers; None: as the names tell.
    """
    path = _existing(path)
    file = read_tensors(path)
    if not is_lora(file.tensors):
        raise CheckpointError(f"{file.path.name} is {describe(file.tensors)}; give a LoRA")
    inside = path / "adapter_model.safetensors" if path.is_dir() else path
    return Lora(file.path.name, file.tensors, read_settings(file.metadata, inside), sprint)


def read_strength(text: str) -> tuple[Path, float]:
    """A file and its strength, from FILE or FILE=STRENGTH. Raises ValueError for no file and a strength that is no number."""
    name, sign, strength = text.rpartition("=")
    if not sign or Path(text).exists():
        name, strength = text, "1"
    if not name:
        raise ValueError(f"--lora is {text!r}, which names no file; give FILE or FILE=0.8")
    try:
        return Path(name), float(strength)
    except ValueError as error:
        raise ValueError(f"--lora is {text}, and {strength!r} is no strength; give FILE or FILE=0.8") from error


def lora_files(path: Path | str) -> list[Path]:
    """The files that decide what a LoRA does: its own, or all of a folder, and the settings beside it.

    Raises FileNotFoundError, and CheckpointError for a pipe, a socket or a device.
    """
    path = _existing(path)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    return [path, *settings_beside(path)]


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the file of a LoRA, or the folder that holds one")
    try:
        check_file(path)
    except ValueError as error:
        raise CheckpointError(f"{path.name} cannot be opened ({error}); give the file of a LoRA") from error
    return path


def read_merges(
    loras: Sequence[tuple[Path | str, float]], transformer: TransformerConfig | None, text_encoder: GemmaConfig | None
) -> tuple[Merges, Merges]:
    """What LoRA files, each with a strength, make of the weights of a transformer and of a text encoder.

    None: it does not count. Warns of a file of which a part fits. Raises CheckpointError for one of which
    nothing does, as `Lora.changes` does, and ValueError for a strength that is no finite number and for what is no pair.
    """
    if not loras:
        return {}, {}
    parts = [transformer and Part.transformer(transformer), text_encoder and Part.text_encoder(text_encoder)]
    sprint = transformer.guidance_embed if transformer else None
    found: list[dict[str, list[tuple[Change, float]]]] = [{}, {}]
    for path, strength in map(_pair, loras):
        if not math.isfinite(strength):
            raise ValueError(f"the strength of {path} is {strength}; it must be a finite number, such as 1")
        lora = read_lora(path, sprint=sprint)
        fitting = [lora.changes(part) if part else {} for part in parts]
        told = tell_fit(lora, set().union(*fitting))
        if told:
            log.warning(told)
        for known, layers in zip(found, fitting, strict=True):
            for changes in layers.values() if strength else ():
                for name, change in changes.items():
                    known.setdefault(name, []).append((change, strength))
    first, second = ({name: Changes(changes) for name, changes in known.items()} for known in found)
    return first, second


def _pair(given: object) -> tuple[Path, float]:
    """A file and its strength. Raises ValueError for anything else."""
    try:
        path, strength = given
        return Path(path), float(strength)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a LoRA is given as {given!r:.100}; give its file and a strength, such as ('style.safetensors', 1.0)"
        ) from error


def tell_fit(lora: Lora, fitting: set[str]) -> str:
    """A warning where a part of a LoRA fits, else "". Raises CheckpointError if nothing does. fitting: layers that do."""
    total = len(lora.layers)
    if not fitting:
        raise CheckpointError(
            f"nothing of {lora.name} fits: its names are those of {describe_lora(lora.tensors)}, first "
            f"{next(iter(lora.tensors))}; {ADVICE}"
        )
    if len(fitting) == total:
        return ""
    return f"{len(fitting)} of the {total} layers of {lora.name} fit the model; the rest has no effect"


def _change(parts: Parts) -> Change | None:
    """What becomes of a weight; None: nothing, there are other parts alone. Raises KeyError for the end that is missing."""
    for end, kind in WHOLE.items():
        if end in parts:
            return _whole(kind, parts[end])
    lengths = parts.get(".dora_scale")
    if any(end.startswith(".hada_") for end in parts):
        factors = tuple(_factors(parts, f".hada_w{k}_a", f".hada_w{k}_b", f".hada_t{k}") for k in (1, 2))
        return _scaled(parts, Change("LoHa", factors, lengths=lengths))
    if any(end.startswith(".lokr_") for end in parts):
        factors = tuple(
            Factors(parts[f".lokr_w{k}"])
            if f".lokr_w{k}" in parts
            else _factors(parts, f".lokr_w{k}_a", f".lokr_w{k}_b", f".lokr_t{k}")
            for k in (1, 2)
        )
        return _scaled(parts, Change("LoKr", factors, lengths=lengths))
    up, down = (next((end for end in ends if end in parts), None) for ends in (UPS, DOWNS))
    if up is None and down is None:
        return None
    up = up or UPS[DOWNS.index(down)]
    factors = (Factors(parts[up], parts[down or DOWNS[UPS.index(up)]], parts.get(".lora_mid.weight")),)
    return _scaled(parts, Change("LoRA", factors, lengths=lengths))


def _whole(kind: str, tensor: Tensor) -> Change:
    return Change(kind, (Factors(tensor),))


def _factors(parts: Parts, up: str, down: str, core: str) -> Factors:
    """Of LoHa or LoKr, where a core makes the first factor stand on its side."""
    if core not in parts:
        return Factors(parts[up], parts[down])
    return Factors(parts[up].mT, parts[down], parts[core])


def _scaled(parts: Parts, change: Change) -> Change:
    """By alpha / rank; by 1 without an alpha or a rank."""
    alpha, rank = parts.get(".alpha"), change.rank
    return replace(change, scale=float(alpha.flatten()[0]) / rank) if alpha is not None and rank else change
