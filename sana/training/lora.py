"""A LoRA of a SANA on a folder of pictures with captions: an adapter is trained, and all other weights are frozen.

It is in the transformer, and in the text encoder if that is wanted.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ..checkpoints.modelspec import LORA, modelspec, square
from ..networks.devices import computes_bfloat16
from ..saving import replacing
from .adapters import (
    AdapterConfig,
    Seeded,
    add_adapter,
    add_text_adapter,
    begin_with,
    holding,
    lora_header,
    lora_tensors,
)
from .ahead import reading_ahead
from .captions import TURN, Choice
from .curve import event_writer, write_curve
from .flow import FlowBatch, FlowObjective
from .loop import (
    QUIET,
    Batches,
    Report,
    Schedule,
    Stopped,
    TrainingConfig,
    Watch,
    check_counts,
    check_schedule,
    process_state,
    train,
)
from .material import Material, ModelFiles, Source, gathered
from .optimizers import OptimizerName, check_optimizer, checked_rate
from .sheets import COLUMNS, draw, in_rows
from .states import empty_text, encoded

USUAL_RATE = 1e-4
DTYPES = ("float32", "bfloat16")  # of the frozen weights; float16 would need its gradients scaled
TOLD = "sana_training"  # entry of the header: JSON of how it was trained


@dataclass(frozen=True)
class LoraConfig:
    """What to train, on what, and how long. Intervals are in steps."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)  # of the transformer
    train_text_encoder: bool = False  # its attention, by an adapter of the same kind and rank
    start: Path | None = None  # a LoRA to go on from, of the same kind, rank and layers
    steps: int = 1000
    batch_size: int = 1  # pictures of one size
    accumulate: int = 1  # batches of a step
    optimizer: OptimizerName = "adamw"
    learning_rate: float | None = None  # at its highest; None: 1e-4, and 1 for prodigy, which multiplies its own rate
    schedule: Schedule = "constant"
    warmup: int | None = None  # steps in which the rate rises; None: a tenth, at most 100
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.99  # decay of the averaged adapter, which is the result; 0: the last one
    prior: Path | None = None  # a second folder, of pictures that show what is to stay as it is
    prior_weight: float = 1.0  # of their loss; every other batch is of them, beside the batches of `accumulate`
    caption_dropout: float = 0.1  # share of captions replaced by the empty prompt, for guidance
    recompute: bool = False  # activations of blocks in the backward pass: less memory, a third more work
    cache: Path | None = None  # folder of states that several trainings share; None: in the work folder
    dtype: str | None = None  # of the frozen weights; None: bfloat16, or float32 on a GPU that does not compute it
    prompts: tuple[str, ...] = ()  # drawn on sheets, without and with the adapter; none: up to six captions
    choice: Choice = TURN  # between several captions of a picture
    trigger: str = ""  # words that call the result up, for its header
    sheet_every: int = 250  # 0: none
    save_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can have."""
        names = ("steps", "batch_size", "accumulate", "save_every")
        check_counts({name: getattr(self, name) for name in names})
        check_schedule(self.schedule)
        check_optimizer(self.optimizer)
        checked_rate(self.learning_rate, self.optimizer, USUAL_RATE)
        for name in ("clip", "prior_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0, such as 1")
        for name, shown in (("ema", "no average"), ("caption_dropout", "none")):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0, for {shown}, or a share below 1")
        for name in ("sheet_every", "warmup"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0, for none, or more")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be a whole number from 0 to 2^64 - 1")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype {self.dtype!r} is not trained in; use one of {', '.join(DTYPES)}")

    @property
    def training(self) -> TrainingConfig:
        warmup = min(100, self.steps // 10) if self.warmup is None else self.warmup
        return TrainingConfig(
            self.steps,
            checked_rate(self.learning_rate, self.optimizer, USUAL_RATE),
            warmup=warmup,
            schedule=self.schedule,
            accumulate=self.accumulate * (2 if self.prior else 1),
            ema_decay=self.ema,
            clip=self.clip,
            optimizer=self.optimizer,
            save_every=self.save_every,
            sheet_every=self.sheet_every or self.steps,
            log_every=min(10, self.save_every),
        )


def train_lora(
    folder: Path, data: Path, config: LoraConfig, source: Source | None = None, *, watch: Watch = QUIET
) -> Path:
    """Train an adapter beside the frozen weights of a transformer, which may be quantised. Returns the file of the LoRA.

    folder: receives the states of the pictures, the state of the training, sheets, and `lora.safetensors`, which is written
    too where the watch stops the training. Stopped and started again, it goes on. source: the model; None: the demo. Raises
    as `gathered`, `add_adapter` and `train` do.
    """
    if config.start is not None and not config.start.is_file():
        raise ValueError(f"{config.start} is no file; give the LoRA to go on from, or leave it out")
    machine = process_state()
    dtype = _dtype(config.dtype, machine.device)
    watch = _with_events(watch, folder / "events")
    trained = f"{config.adapter}, and on the text encoder" if config.train_text_encoder else str(config.adapter)
    run = {"adapter": trained, "seed": str(config.seed)}
    run |= {name: str(path.resolve()) for name in ("start", "prior") if (path := getattr(config, name))}
    more = {"choice": config.choice, "prompts": config.prompts, "prior": config.prior, "trigger": config.trigger}
    more |= {"cache": config.cache, "trains_texts": config.train_text_encoder, "run": run}
    with gathered(folder, data, source or ModelFiles(), dtype=dtype, **more) as material:
        transformer, text_encoder = material.pipeline.transformer, material.pipeline.text_encoder
        before = _drawn(material) if config.sheet_every and machine.is_main_process else []
        weights = add_adapter(transformer, config.adapter, config.seed)
        if text_encoder is not None:
            weights.update(add_text_adapter(text_encoder.model, config.adapter, config.seed))
        if config.start:
            networks = transformer.config, text_encoder and text_encoder.model.config
            begin_with(weights, config.start, config.adapter, *networks)
        transformer.recompute = config.recompute
        objective: nn.Module = FlowObjective(
            transformer,
            text_encoder,
            flow_shift=material.identity.flow_shift,
            dropout=config.caption_dropout,
            null=material.states.null,
        )
        if config.adapter.dropout:
            objective = Seeded(objective)
        objective.train()

        def sheet(averaged: nn.ParameterDict) -> Image.Image:
            objective.eval()
            with holding(weights, averaged):
                after = _drawn(material)
            objective.train()
            write_curve(folder / "log.csv", folder / "loss.png")
            return in_rows(before, after)

        def write(averaged: nn.Module, steps: int) -> Path:
            path = folder / "lora.safetensors"
            if machine.is_main_process:
                write_curve(folder / "log.csv", folder / "loss.png")
                header = lora_header(averaged, config.adapter, describe(config, material, steps, path.stem))
                with replacing(path) as unfinished:
                    save_file(lora_tensors(averaged, config.adapter), unfinished, {"format": "pt", **header})
            return path

        try:
            with reading_ahead(training_batches(material, config)) as batches:
                averaged = train(
                    objective,
                    batches,
                    config.training,
                    folder,
                    sheet if config.sheet_every else None,
                    weights=weights,
                    watch=watch,
                )
        except Stopped as stopped:
            write(stopped.weights, stopped.step)
            raise
        return write(averaged, config.steps)


def training_batches(material: Material, config: LoraConfig) -> Batches:
    """Of the pictures, and every other one of those of the prior if there are any."""
    given = {"size": config.batch_size, "seed": config.seed}
    own, prior = material.states, material.prior
    if prior is None:
        return partial(own.batch, **given)

    def alternating(number: int, process: int) -> FlowBatch:
        if number % 2 == 0:
            return own.batch(number // 2, process, **given)
        batch = prior.batch(number // 2, process, **given)
        return replace(batch, weight=torch.full((len(batch), 1, 1, 1), config.prior_weight))

    return alternating


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is None:
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    return getattr(torch, name)


def _with_events(watch: Watch, folder: Path) -> Watch:
    """The same, and events for TensorBoard where that is installed."""
    write = event_writer(folder)
    if write is None:
        return watch

    def both(report: Report) -> None:
        write(report)
        watch.step(report)

    return replace(watch, step=both)


def _drawn(material: Material) -> list[Image.Image]:
    """What the weights at hand make of the prompts, as squares, or of up to six captions, at the sizes of their pictures."""
    states, side, text_encoder = material.states, material.identity.base_size, material.pipeline.text_encoder
    if material.prompts:
        chosen = [((side, side), text) for text in material.prompts[:COLUMNS]]
    else:
        chosen = [(example.size, example.text) for example in states.examples]
    null = states.null
    if text_encoder is not None:  # what is trained makes other texts of the same prompts
        text_encoder.forget()
        chosen = [(size, encoded(text_encoder, prompt)) for size, prompt in chosen]
        null = empty_text(text_encoder)
    return [draw(material.pipeline, size, text, null, seed=i) for i, (size, text) in enumerate(chosen)]


def describe(config: LoraConfig, material: Material, steps: int, title: str) -> dict[str, str]:
    """What the header of a LoRA tells: the keys of modelspec, and how it was trained."""
    identity = material.identity
    settings = {
        name: value for name, value in asdict(config).items() if name not in ("prompts", "prior", "start", "cache")
    }
    told = {
        **settings,
        "learning_rate": config.training.learning_rate,
        "steps": steps,
        "pictures": len(material.states),
        "variant": identity.variant,
    }
    spec = modelspec(LORA, title, resolution=square(identity.base_size), trigger_phrase=config.trigger)
    return {**spec, TOLD: json.dumps(told)}
