"""LoRA files: whose layers their names mean, which of ours these are, and how strong each change is.

A dialect is an entry in the tables here. The strength of a change stands in a tensor `alpha` beside its factors, or PEFT tells
it outside the tensors: in the header of the file (diffusers' trainers), or in an `adapter_config.json` beside it
(`PeftModel.save_pretrained`).
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..reading import parse_json
from .files import NAME_PARTS, CheckpointError, read_json
from .names import IN_BLOCK, OUTSIDE, OUTSIDE_SPRINT, UNMERGED_MARK

Settings = Mapping[str, object]  # what PEFT tells of an adapter, such as {"r": 4, "lora_alpha": 16}
Lora = dict[str, Tensor]

log = logging.getLogger(__name__)

# What stands before the path of a layer of the transformer: PEFT in diffusers, PEFT alone, both, ComfyUI, and nothing.
DOTTED = ("transformer.base_model.model.", "transformer.", "base_model.model.", "diffusion_model.", "")
# The same where _ stands for every dot: LyCORIS, OneTrainer and kohya.
UNDERSCORED = ("lycoris_", "lora_transformer_", "lora_unet_")
TEXT_COMPONENT = "text_encoder."  # what diffusers puts before the path of a layer of the text encoder
# Before the path of a layer of the text encoder, such as layers.0.mlp.up_proj. The last two are the host's.
TEXT_DOTTED = (
    *(
        whole + part
        for whole in (TEXT_COMPONENT, f"{TEXT_COMPONENT}base_model.model.", "base_model.model.", "")
        for part in ("", "model.")
    ),
    *("text_encoders.gemma2_2b.transformer.model.", "text_encoders.transformer.model."),
)
TEXT_UNDERSCORED = ("lora_te1_", "lora_te1_model_", "lora_te_", "lora_te_model_")
# Of a text encoder without a network named encoder in it, as CLIP and T5 have one.
TEXT_LAYER = re.compile(r"(?:^|[._])(?:(?<!encoder[._])|(?<=text_encoder[._]))layers[._]\d+[._](?:self_attn|mlp)[._]")
# In our names and those of models like ours.
BLOCK_LAYER = re.compile(r"(?:^|[._])transformer_blocks[._]\d+[._](?:attn[12][._]to_|ff[._]conv_)")
# What training code leaves in names: a parallel or compiled network before them, and the name of an adapter inside.
LEFTOVERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
ADAPTER_NAME = re.compile(r"(?<=\.lora_)(A|B|magnitude_vector)\.(?!weight$)[^.]+(?=\.weight$)")

# Ends of names behind the path of a layer: of the two factors of a LoRA,
UPS = (".lora_B.weight", ".lora_B", ".lora_up.weight")
DOWNS = (".lora_A.weight", ".lora_A", ".lora_down.weight")
# and of all kinds. For one of our layers that is a part of theirs, the first group is the same,
DOWN = (*DOWNS, ".hada_w1_b")
SHARED = (*DOWN, ".hada_w2_b", ".alpha")
# and the second has rows of its own.
MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
ROWS = (
    *(*UPS, ".hada_w1_a", ".hada_w2_a"),
    *(".dora_scale", *MAGNITUDES, ".diff", ".diff_b", ".set_weight"),
)
# Of a Kronecker product, which has no rows of its own for a part of a layer.
KRONECKER = (".lokr_w1_a", ".lokr_w1_b", ".lokr_w1", ".lokr_w2_a", ".lokr_w2_b", ".lokr_w2")
# What stands between two factors in a Tucker decomposition, which keeps all of its axes.
CORES = (".lora_mid.weight", ".hada_t1", ".hada_t2", ".lokr_t2")
ENDS = tuple(sorted((*SHARED, *ROWS, *KRONECKER, *CORES), key=len, reverse=True))

HEADER = "lora_adapter_metadata"  # entry of diffusers in a safetensors header: JSON of "transformer.r" and the like
BESIDE = "adapter_config.json"
# Of patterns in settings. A repeated group may take for ever to match.
RISKY = re.compile(r"\)[*+{]")
REPEATS, CHOICES = re.compile(r"[*+{]"), re.compile(r"[?|]")  # each may be tried at every place, and in two ways
MOST_TRIES = 3_000_000  # of a pattern on a path, at worst: some milliseconds
MOST_PATTERNS = 2**12  # of a LoRA
LONGEST_PATTERN, LONGEST_PATH = 200, 64  # characters; ours have at most 55

# Parts of names by which LoRAs for other models are known.
OTHERS = (
    (("single_blocks", "single_transformer_blocks", "double_blocks"), "a Flux model"),
    (("joint_blocks", ".attn.add_k_proj", "_attn_add_k_proj"), "a Stable Diffusion 3 model"),
    (("down_blocks", "input_blocks", "mid_block", "up_blocks"), "a Stable Diffusion model"),
    (("text_model", "lora_te2_"), "the text encoder of another model"),
    (("self_attn.", "self_attn_", "ffn.0", "cross_attn.k", "attention.to_"), "a model of another family"),
)


def layer_names(path: str) -> Iterator[str]:
    """What LoRA files call the layer of the transformer at a path such as "transformer_blocks.0.attn1.to_q"."""
    yield from (prefix + path for prefix in DOTTED)
    yield from (prefix + path.replace(".", "_") for prefix in UNDERSCORED)


def text_layer_names(path: str) -> Iterator[str]:
    """What they call the layer of the text encoder at a path such as "layers.0.self_attn.q_proj"."""
    yield from (prefix + path for prefix in TEXT_DOTTED)
    yield from (prefix + path.replace(".", "_") for prefix in TEXT_UNDERSCORED)


def layers_of(names: Iterable[str]) -> set[str]:
    """What a file calls the layers that it changes: its names without their ends."""
    return {layer for name in names if (layer := split_name(name)[0])}


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are changes of weights, without the weights."""
    found = list(names)
    changes = any(split_name(_plain(name))[1] not in ("", ".alpha") for name in found)
    return changes and not any(UNMERGED_MARK in name for name in found)


def describe_lora(names: Iterable[str]) -> str:
    """Which model a LoRA is for, in words for an error message."""
    found = list(names)
    if any(TEXT_LAYER.search(name) for name in found):
        return "SANA's text encoder, which Load LoRA (Model and CLIP) takes"
    if any(_our_layers(split_name(name)[0], sprint=False) for name in found):
        return "several layers of SANA in one, as a product that cannot be cut apart"
    for marks, model in OTHERS:
        if any(mark in name for mark in marks for name in found):
            return model
    if any(BLOCK_LAYER.search(name) for name in found):
        return "a transformer with other blocks"
    return "a model of unknown kind"


def read_settings(metadata: Mapping[str, str] | None, path: Path) -> Settings:
    """What PEFT tells of the adapter in a file: in its header, else beside it. {}: nothing.

    An `adapter_config.json` counts for `adapter_model.*`, and for a file that lies alone with it.
    """
    told = _told(metadata)
    return told or next(filter(None, (_read_beside(file, path.name) for file in settings_beside(path))), {})


def settings_beside(path: Path) -> list[Path]:
    """The files beside a LoRA that may tell of it: an `adapter_config.json`, where the LoRA is or where a link to it leads."""
    return [place.parent / BESIDE for place in dict.fromkeys([path, path.resolve()]) if _counts_beside(place)]


def _told(metadata: Mapping[str, str] | None) -> Settings:
    try:
        found = parse_json((metadata or {}).get(HEADER, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _counts_beside(path: Path) -> bool:
    if not (path.parent / BESIDE).is_file():
        return False
    return path.stem == "adapter_model" or sum(other.suffix == path.suffix for other in path.parent.iterdir()) == 1


def _read_beside(beside: Path, name: str) -> Settings:
    try:
        return read_json(beside)
    except CheckpointError as error:
        log.warning("The strength of %s is not known: %s", name, error)
        return {}


def prepare(lora: Lora, settings: Settings, *, sprint: bool = False) -> Lora:
    """A LoRA file with plain names, ours for layers that have official ones, strengths as tensors, and DoRA as scales.

    settings: as `read_settings` finds them. sprint: whether the model is Sprint, two layers of which are called otherwise.
    """
    plain = _with_alphas({_plain(name): tensor for name, tensor in lora.items()})
    return _with_scales(_with_our_names(_with_strengths(plain, settings), sprint))


def _plain(name: str) -> str:
    return ADAPTER_NAME.sub(r"\1", NAME_PARTS.sub("", LEFTOVERS.sub("", name)))


def with_matrices(lora: Lora, layers: tuple[str, ...]) -> Lora:
    """A LoRA file in which what changes a 1x1 convolution has two axes, as our weight of it has.

    layers: what the file calls the 1x1 convolutions.
    """
    matrices = {
        name: tensor.flatten(1)
        for name, tensor in lora.items()
        if name.startswith(layers) and not name.endswith(CORES) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
    }
    return {**lora, **matrices}


def strength_of(settings: Settings, layer: str) -> float | None:
    """The factor of a change as PEFT has it: alpha / r, with rsLoRA alpha / sqrt(r). None: the settings do not tell.

    layer: what the file calls it. Sources: PEFT, tuners/lora/layer.py `update_layer` and utils/other.py `get_pattern_key`.
    """
    component = TEXT_COMPONENT if layer.startswith(TEXT_COMPONENT) else "transformer."
    own = {key.removeprefix(component): value for key, value in settings.items() if key.startswith(component)}
    fields = own or settings
    path = _path(layer)
    rank = _by_pattern(fields.get("rank_pattern"), path, fields.get("r"))
    alpha = _by_pattern(fields.get("alpha_pattern"), path, fields.get("lora_alpha", fields.get("alpha")))
    rank, alpha = _number(rank), _number(alpha)
    if rank is None or alpha is None or rank <= 0:
        return None
    return alpha / math.sqrt(rank) if fields.get("use_rslora") is True else alpha / rank


def split_name(name: str) -> tuple[str, str]:
    """Layer and end of a name; two empty strings for one that changes no layer."""
    if not name.endswith(ENDS):
        return "", ""
    end = next(end for end in ENDS if name.endswith(end))
    return name.removesuffix(end), end


def _path(layer: str) -> str:
    """A dotted layer without what stands before its path."""
    return layer.removeprefix(max((p for p in (*TEXT_DOTTED, *DOTTED) if layer.startswith(p)), key=len))


def _number(value: object) -> float | None:
    """A finite number, or a text that is one."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _by_pattern(patterns: object, path: str, default: object) -> object:
    """The value of the first pattern that fits the end of a path."""
    if not isinstance(patterns, dict) or len(path) > LONGEST_PATH:
        return default
    for pattern, value in islice(patterns.items(), MOST_PATTERNS):
        compiled = _compiled(pattern)
        if compiled and compiled.match(path):
            return value
    return default


@lru_cache(MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    """None: it is no pattern, or one that is left out."""
    if RISKY.search(pattern) or len(pattern) > LONGEST_PATTERN or _tries(pattern) > MOST_TRIES:
        log.warning("The pattern %.50r of a LoRA may take for ever to match, and is left out.", pattern)
        return None
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        return None


def _tries(pattern: str) -> int:
    """How many ways there are at most to lay a pattern without repeated groups over a path."""
    repeats, choices = (len(found.findall(pattern)) for found in (REPEATS, CHOICES))
    return LONGEST_PATH ** (1 + repeats) << choices


def _with_alphas(lora: Lora) -> Lora:
    """Alphas that stand under another name of a layer moved to it, as in our own files, since diffusers refuses them there."""
    flat = {}
    for layer in layers_of(lora):
        if layer.startswith((*DOTTED[:-1], TEXT_COMPONENT)):
            prefixes = TEXT_UNDERSCORED if layer.startswith(TEXT_COMPONENT) else UNDERSCORED
            flat |= {prefix + _path(layer).replace(".", "_"): layer for prefix in prefixes}
    renamed = {f"{name}.alpha": f"{layer}.alpha" for name, layer in flat.items()}
    return {renamed.get(name, name): tensor for name, tensor in lora.items()}


def _with_strengths(lora: Lora, settings: Settings) -> Lora:
    """With a tensor alpha for every layer that has none, if the settings tell one: alpha / rank is the strength."""
    found = dict(lora)
    for layer in layers_of(lora):
        strength = None if f"{layer}.alpha" in lora else strength_of(settings, layer)
        if strength is None:
            continue
        found_parts = (lora.get(layer + end) for end in (*DOWN, ".lokr_w1_b", ".lokr_w2_b"))
        factors = [part for part in found_parts if part is not None and part.ndim]
        if factors:
            found[f"{layer}.alpha"] = torch.tensor(strength * len(factors[-1]))
        elif f"{layer}.lokr_w1" in lora:  # two whole factors, which have no rank
            found[f"{layer}.lokr_w1"] = lora[f"{layer}.lokr_w1"].float() * strength
    return found


def _with_our_names(lora: Lora, sprint: bool) -> Lora:
    """Layers with official names under ours. One of theirs that is several of ours is cut as its weight would be."""
    found = {}
    for name, tensor in lora.items():
        layer, end = split_name(name)
        targets = _our_layers(layer, sprint) if end else ()
        if not targets or (len(targets) > 1 and end in KRONECKER):
            found[name] = tensor
            continue
        own_rows = end in ROWS and tensor.ndim > 0 and len(tensor) > 1  # a scale for columns has one row for all
        parts = tensor.tensor_split(len(targets)) if own_rows else (tensor,) * len(targets)
        found.update({target + end: part for target, part in zip(targets, parts, strict=True)})
    return found


def _our_layers(layer: str, sprint: bool) -> tuple[str, ...]:
    """Our layers that an official one is; (): its name is not official."""
    outside = OUTSIDE_SPRINT if sprint else OUTSIDE
    for prefixes, dot in ((UNDERSCORED, "_"), (DOTTED, ".")):
        prefix = next((prefix for prefix in prefixes if layer.startswith(prefix)), None)
        if prefix is None:
            continue
        path = layer.removeprefix(prefix)
        block = re.fullmatch(rf"blocks{re.escape(dot)}(\d+){re.escape(dot)}(.+)", path)
        table = IN_BLOCK if block else outside
        rest = block[2] if block else path
        targets = next((new for old, new in table.items() if old.removesuffix(".*").replace(".", dot) == rest), ())
        targets = (targets,) if isinstance(targets, str) else targets
        stem = f"transformer_blocks.{block[1]}." if block else ""
        return tuple(stem + target.removesuffix(".*") for target in targets)
    return ()


def _with_scales(lora: Lora) -> Lora:
    """PEFT's magnitudes of DoRA, one a row, as the scales that LyCORIS and the host know."""
    found = {}
    for name, tensor in lora.items():
        layer, end = split_name(name)
        scale = end in MAGNITUDES
        found[f"{layer}.dora_scale" if scale else name] = tensor.reshape(-1, 1) if scale else tensor
    return found
