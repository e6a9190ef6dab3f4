"""Fine-tuning of a SANA transformer on a folder of pictures with captions, with its autoencoder and text encoder frozen."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import build_transformer, load_autoencoder
from ..detection import identify_transformer
from ..files import read_tensors
from ..pipeline import MODELS
from ..text_checkpoint import load_text_encoder
from .export import write_transformer
from .flow import FlowObjective
from .loop import TrainingConfig, train
from .pictures import PictureStates, read_pictures


@dataclass(frozen=True)
class FinetuneConfig:
    """What to train and how long."""

    steps: int = 1000
    batch_size: int = 4
    learning_rate: float = 1e-5
    recompute: bool = False  # activations of blocks in the backward pass: less memory, a third more work


def finetune(
    folder: Path,
    data: Path,
    config: FinetuneConfig,
    *,
    model: Path | str = "demo",
    autoencoder: Path | str | None = None,
    text_encoder: Path | str | None = None,
) -> Path:
    """Train all of a transformer. model, autoencoder, text_encoder: as for `SanaPipeline.load`.

    folder: receives the states of the pictures, the state of the training, and the result, a transformer in diffusers layout,
    whose folder is returned. Stopped and started again, it goes on. Raises ValueError for pictures without captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = MODELS.get(str(model), model)
    file = read_tensors(model, "transformer")
    identity = identify_transformer(file)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    states = PictureStates.prepare(
        folder / "states.safetensors",
        read_pictures(data, identity.base_size),
        load_autoencoder(autoencoder or model, device=device),
        load_text_encoder(text_encoder or model, device=device),
    )
    transformer = build_transformer(file, identity.config).train().requires_grad_(True)
    transformer.recompute = config.recompute
    objective = FlowObjective(transformer, flow_shift=identity.flow_shift or 1.0, null=states.null.float())
    objective = train(
        objective,
        partial(states.batch, size=config.batch_size),
        TrainingConfig(config.steps, config.learning_rate, warmup=min(100, config.steps // 10), cooldown=0.1),
        folder,
    )
    dtype = getattr(torch, identity.dtype)
    write_transformer(folder / "transformer", objective.transformer, identity.base_size, dtype)
    return folder / "transformer"
