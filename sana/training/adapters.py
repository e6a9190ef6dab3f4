"""Adapters by PEFT in frozen networks: which layers get one, its weights as one module, and the file they become.

PEFT is imported when an adapter is made, as it takes seconds and fine-tuning needs none.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..checkpoints.adapters import HEADER, TEXT_COMPONENT
from ..checkpoints.lora import Part, read_lora, tell_fit
from ..checkpoints.names import POINTWISE
from ..config import GemmaConfig, TransformerConfig
from ..networks.packed_layers import PackedLinear
from ..text.gemma import Gemma2

Kind = Literal["lora", "dora", "loha", "lokr"]

NAME = "default"  # of the adapter, as PEFT calls one
ATTENTION = r"transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|attn2\.to_(q|out\.0))"
# What --targets says: the image's side of both attentions; also the text's side and the Mix-FFN.
TARGETS = {
    "attention": ATTENTION,
    "all": rf"{ATTENTION}|transformer_blocks\.\d+\.(attn2\.to_(k|v)|ff\.conv_(inverted|point))",
}
ATTENTION_OF_TEXTS = r"layers\.\d+\.self_attn\.(q|k|v|o)_proj"
PRODUCTS = ("loha", "lokr")  # kinds of LyCORIS, which diffusers' names have no room for
LAYER = re.compile(r"(.+?)\.((?:lora|hada|lokr)_.+)")  # a name of a weight: its layer, and which of the adapter's it is
COMPONENT, LYCORIS = "transformer.", "lycoris_"  # before names in diffusers, and in LyCORIS
ALPHA_PREFIX = "lora_unet_"  # of kohya: diffusers refuses names without "lora", and leaves these alone
TEXT_FLAT = "lora_te1_"  # before a layer of the text encoder, in both of the latter


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained beside the frozen weights. alpha None: the rank, so that the adapter acts with strength 1."""

    kind: Kind = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0  # share of a layer's inputs that the adapter does not see in a step
    rslora: bool = False  # strength alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)
    targets: str = "attention"  # a name in TARGETS, or a regular expression of whole paths of layers

    def __post_init__(self) -> None:
        """Raises ValueError for an adapter that cannot be."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"adapter {self.kind!r} is unknown; use one of {', '.join(get_args(Kind))}")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1, such as 16")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha}; it must be above 0, such as the rank")
        if self.rslora and self.kind in PRODUCTS:
            raise ValueError(f"rslora is for lora and dora, and this is a {self.kind}; give one or the other")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be 0, for none, or a share below 1")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"targets {self.targets!r} is no regular expression ({error}); give one, or {' or '.join(TARGETS)}"
            ) from error

    @property
    def pattern(self) -> str:
        return TARGETS.get(self.targets, self.targets)

    @property
    def full_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def strength(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.full_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __str__(self) -> str:
        told = f"{self.kind} of rank {self.rank}, alpha {self.full_alpha:g}, on {self.targets}"
        return f"{told}, rank-stabilised" if self.rslora else told


def target_layers(network: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of the linear layers that get an adapter, 1x1 convolutions among them. Raises ValueError if there are none."""
    linear = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    found = [path for path in linear if re.fullmatch(config.pattern, path)]
    if not found:
        raise ValueError(
            f"targets {config.targets!r} matches none of the {len(linear)} linear layers, such as {linear[-2]}; give a regular "
            f"expression of whole paths, or {' or '.join(TARGETS)}"
        )
    return found


def add_adapter(network: nn.Module, config: AdapterConfig, seed: int = 0) -> nn.ParameterDict:
    """Freeze a network and put an adapter into it, which changes nothing yet. Returns the adapter's weights, float32.

    seed: of its first weights. Raises ValueError without PEFT, for targets that match nothing, and for a DoRA on packed
    weights, whose lengths it would need.
    """
    paths = target_layers(network, config)
    packed = [path for path in paths if isinstance(network.get_submodule(path), PackedLinear)]
    if packed and config.kind == "dora":
        raise ValueError(
            f"a DoRA needs the lengths of weights, and {packed[0]} is quantised; train a LoRA on it, or take a model in 16 bits"
        )
    try:
        from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ValueError(
            f'training a LoRA needs the package {error.name}; run pip install ".[training]" in the folder of this project'
        ) from error
    network.requires_grad_(False)
    if config.kind in PRODUCTS:
        product = LoHaConfig if config.kind == "loha" else LoKrConfig
        made = product(r=config.rank, alpha=config.full_alpha, rank_dropout=config.dropout, target_modules=paths)
    else:
        made = LoraConfig(
            r=config.rank,
            lora_alpha=config.full_alpha,
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            use_dora=config.kind == "dora",
            target_modules=paths,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(made, network, NAME)
    found = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    for weight in found.values():
        weight.data = weight.data.float()
    return nn.ParameterDict({_key(name): weight for name, weight in found.items()})


def add_text_adapter(model: Gemma2, config: AdapterConfig, seed: int = 0) -> nn.ParameterDict:
    """The same in the attention of a text encoder, whatever the targets. Names of its weights begin with TEXT_COMPONENT."""
    weights = add_adapter(model, replace(config, targets=ATTENTION_OF_TEXTS), seed)
    return nn.ParameterDict({_key(TEXT_COMPONENT) + key: weight for key, weight in weights.items()})


def _key(name: str) -> str:
    """A name of a parameter, without that of the adapter, as a key of a `ParameterDict`, which takes no dots."""
    return name.replace(f".{NAME}", "").replace(".", "/")


def named(weights: nn.Module) -> dict[str, Tensor]:
    """Weights of an adapter by names such as transformer_blocks.0.attn1.to_q.lora_A.weight, see `add_text_adapter`."""
    return {key.replace("/", "."): weight.detach() for key, weight in weights.items()}


def begin_with(
    weights: nn.ParameterDict,
    path: Path,
    config: AdapterConfig,
    transformer: TransformerConfig,
    text_encoder: GemmaConfig | None = None,
) -> None:
    """Give a new adapter the weights of a LoRA file, in any trainer's names.

    text_encoder: where the adapter is in this, too. Raises CheckpointError for a file that is no LoRA or was made for another
    model, and ValueError for one of another kind, rank or layers than the adapter.
    """
    if config.kind in PRODUCTS:
        raise ValueError(f"to go on is for lora and dora, and this is a {config.kind}; leave --start out")
    lora = read_lora(path)
    parts = {"": Part.transformer(transformer)}
    if text_encoder is not None:
        parts[TEXT_COMPONENT] = Part.text_encoder(text_encoder)
    fitting = {before: lora.changes(part) for before, part in parts.items()}
    tell_fit(lora, set().union(*fitting.values()))
    found = {
        before + name.removesuffix(".weight"): change
        for before, layers in fitting.items()
        for changes in layers.values()
        for name, change in changes.items()
    }
    paths = _layers(weights)
    kinds = {"dora" if change.lengths is not None else change.kind.lower() for change in found.values()}
    ranks = {change.rank for change in found.values()}
    others = lora.layers.keys() - set().union(*fitting.values())  # such as those of a text encoder that is not trained
    if found.keys() != paths or others or kinds != {config.kind} or ranks != {config.rank}:
        told = f"{' and '.join(sorted(kinds))} of rank {', '.join(map(str, sorted(ranks, key=str)))}"
        raise ValueError(
            f"{path.name} is a {told} on {len(found) + len(others)} layers, and this adapter a {config.kind} of rank "
            f"{config.rank} on {len(paths)}; give the --kind, --rank, --targets and --train-text-encoder that it was trained with"
        )
    for layer, change in found.items():
        (factors,) = change.parts
        parts = {"lora_A.weight": factors.down.flatten(1)}
        parts["lora_B.weight"] = factors.up.flatten(1).float() * (change.scale / config.strength)
        if change.lengths is not None:
            parts["lora_magnitude_vector.weight"] = change.lengths.flatten()
        for end, tensor in parts.items():
            weights[_key(f"{layer}.{end}")].data.copy_(tensor)


@contextmanager
def holding(weights: nn.ParameterDict, others: nn.ParameterDict) -> Iterator[None]:
    """Let an adapter have other weights, such as averaged ones, for a while."""
    kept = {key: weight.data for key, weight in weights.items()}
    try:
        for key, weight in weights.items():
            weight.data = others[key].data.to(weight.device)
        yield
    finally:
        for key, weight in weights.items():
            weight.data = kept[key]


class Seeded(nn.Module):
    """An objective whose dropout is decided by the seed of the batch, so that a resumed training repeats it."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: object) -> Tensor:
        devices = {weight.device for weight in self.parameters() if weight.device.type != "cpu"}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(batch.seed)
            return self.objective(batch)


def lora_tensors(weights: nn.Module, config: AdapterConfig) -> dict[str, Tensor]:
    """An adapter in diffusers' names, with the axes of 1x1 convolutions, and the alpha of every layer; products as LyCORIS has them.

    An alpha stands under the name that kohya's trainers give its layer.
    """
    if config.kind in PRODUCTS:
        return _product_tensors(weights, config)
    found, alphas = {}, {}
    for name, tensor in named(weights).items():
        path, end = LAYER.fullmatch(name).groups()
        pointwise = f"{path}.weight".endswith(POINTWISE)
        if end.startswith("lora_magnitude_vector"):
            end, tensor = "lora_magnitude_vector", tensor.reshape(1, -1, 1, 1) if pointwise else tensor
        elif pointwise:
            tensor = tensor[..., None, None]
        dotted, _, flat = _names(path)
        found[f"{dotted}.{end}"] = tensor.float().cpu().clone(memory_format=torch.contiguous_format)
        alphas[f"{flat}.alpha"] = torch.tensor(config.strength * config.rank)
    return found | alphas


def _product_tensors(weights: nn.Module, config: AdapterConfig) -> dict[str, Tensor]:
    """In LyCORIS' names. Two whole factors have no rank, and no alpha acts on them, so the first one has their strength."""
    found = {}
    for name, tensor in named(weights).items():
        path, end = LAYER.fullmatch(name).groups()
        found[f"{_names(path)[1]}.{end}"] = tensor.float().cpu().clone()
    for path in _layers(weights):
        layer = _names(path)[1]
        if f"{layer}.lokr_w1" in found and f"{layer}.lokr_w2" in found:
            found[f"{layer}.lokr_w1"] *= config.strength
        found[f"{layer}.alpha"] = torch.tensor(config.full_alpha)
    return found


def _names(path: str) -> tuple[str, str, str]:
    """What diffusers, LyCORIS and kohya's trainers call a layer."""
    flat = path.removeprefix(TEXT_COMPONENT).replace(".", "_")
    if path.startswith(TEXT_COMPONENT):
        return path, TEXT_FLAT + flat, TEXT_FLAT + flat
    return COMPONENT + path, LYCORIS + flat, ALPHA_PREFIX + flat


def _layers(weights: nn.Module) -> set[str]:
    """Paths of the layers that an adapter is beside."""
    return {LAYER.fullmatch(name)[1] for name in named(weights)}


def lora_header(weights: nn.Module, config: AdapterConfig, told: Mapping[str, str]) -> dict[str, str]:
    """The entry of PEFT's settings that diffusers reads, beside what else is told."""
    if config.kind in PRODUCTS:
        return dict(told)
    settings = {
        "r": config.rank,
        "lora_alpha": config.full_alpha,
        "use_rslora": config.rslora,
        "use_dora": config.kind == "dora",
    }
    names = [_names(path)[0] for path in _layers(weights)]
    prefixed: dict[str, object] = {}
    for component in (COMPONENT, TEXT_COMPONENT):
        paths = sorted(name.removeprefix(component) for name in names if name.startswith(component))
        told_of = {**settings, "target_modules": paths} if paths else {}
        prefixed |= {f"{component}{key}": value for key, value in told_of.items()}
    return {HEADER: json.dumps(prefixed, indent=2, sort_keys=True), **told}
