"""Fine-tuning of a SANA transformer on a folder of pictures with captions, with its autoencoder and text encoder frozen."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..checkpoints.writing import write_transformer
from .ahead import reading_ahead
from .captions import TURN, Choice
from .flow import FlowObjective
from .loop import QUIET, TrainingConfig, Watch, check_counts, process_state, train
from .material import ModelFiles, gathered
from .optimizers import OptimizerName, check_optimizer, checked_rate
from .sheets import caption_sheet

USUAL_RATE = 1e-5


@dataclass(frozen=True)
class FinetuneConfig:
    """What to train and how long."""

    steps: int = 1000
    batch_size: int = 4
    learning_rate: float | None = None  # None: 1e-5, and 1 for prodigy, which multiplies its own rate
    optimizer: OptimizerName = "adamw"
    recompute: bool = False  # activations of blocks in the backward pass: less memory, a third more work
    sheet_every: int = 500  # steps from one sheet to the next, see `caption_sheet`; 0: none
    save_every: int = 500  # steps from one saved state to the next
    choice: Choice = TURN  # between the captions of a picture
    shard: bool = False  # weights and optimizer in parts, one in each process; then there are no sheets
    cache: Path | None = None  # folder of states that several trainings share; None: in the work folder

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can have."""
        check_counts({"steps": self.steps, "batch_size": self.batch_size, "save_every": self.save_every})
        check_optimizer(self.optimizer)
        checked_rate(self.learning_rate, self.optimizer, USUAL_RATE)
        if self.sheet_every < 0:
            raise ValueError(f"sheet_every is {self.sheet_every}; it must be 0, for no sheets, or more")
        if self.shard and self.optimizer != "adamw":
            raise ValueError(
                f"shard is possible with adamw alone, and optimizer is {self.optimizer}; leave one of them out"
            )


def finetune(
    folder: Path,
    data: Path,
    config: FinetuneConfig,
    *,
    model: Path | str = "demo",
    autoencoder: Path | str | None = None,
    text_encoder: Path | str | None = None,
    variant: str | None = None,
    watch: Watch = QUIET,
) -> Path:
    """Train all of a transformer. model, autoencoder, text_encoder, variant: as for `SanaPipeline.load`.

    folder: receives the states of the pictures, the state of the training, sheets, and the result, a transformer in
    diffusers layout, whose folder is returned. Stopped and started again, it goes on. Raises as `gathered` and `train` do, and
    ValueError for shards in a single process.
    """
    if config.shard and process_state().num_processes == 1:
        raise ValueError(
            "shard is for several processes, and this is one; start them by accelerate launch --num_processes, or leave it out"
        )
    files = ModelFiles(model, autoencoder, text_encoder, variant)
    with gathered(
        folder, data, files, choice=config.choice, cache=config.cache, every_weight=True, place=not config.shard
    ) as material:
        pipeline, identity, states = material.pipeline, material.identity, material.states
        transformer = pipeline.transformer.train().requires_grad_(True)
        transformer.recompute = config.recompute
        objective = FlowObjective(transformer, flow_shift=identity.flow_shift, null=states.null)
        sheet = partial(
            caption_sheet,
            states=states,
            autoencoder=pipeline.autoencoder,
            identity=identity,
        )
        schedule = TrainingConfig(
            config.steps,
            checked_rate(config.learning_rate, config.optimizer, USUAL_RATE),
            warmup=min(100, config.steps // 10),
            cooldown=0.1,
            save_every=config.save_every,
            optimizer=config.optimizer,
            sheet_every=config.sheet_every or config.steps,
        )
        with reading_ahead(partial(states.batch, size=config.batch_size)) as batches:
            objective = train(
                objective,
                batches,
                schedule,
                folder,
                sheet if config.sheet_every and not config.shard else None,
                sharded=objective.layers() if config.shard else None,
                watch=watch,
            )
        if process_state().is_main_process:
            dtype = getattr(torch, identity.dtype)
            write_transformer(folder / "transformer", objective.transformer, identity, dtype)
        return folder / "transformer"
