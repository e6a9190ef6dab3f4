"""Fine-tuning of a SANA transformer on a folder of pictures with captions, with its autoencoder and text encoder frozen."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from ..checkpoint import build_transformer, load_autoencoder
from ..detection import identify_transformer
from ..files import read_tensors
from ..pipeline import model_path
from ..text_checkpoint import load_text_encoder
from .export import write_transformer
from .flow import FlowObjective
from .loop import TrainingConfig, claim, train
from .pictures import Picture, PictureStates, read_pictures, write_states


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
    whose folder is returned. Stopped and started again, it goes on. Raises ValueError for Sprint, for pictures that cannot be
    read or have no caption, and for a folder of another model or other data.
    """
    model = model_path(model)
    file = read_tensors(model, "transformer")
    identity = identify_transformer(file)
    if identity.config.guidance_embed:
        raise ValueError(
            f"{file.path.name} is a Sprint model, which learns from a teacher; fine-tune a SANA or SANA-1.5 model"
        )
    pictures = read_pictures(data, identity.base_size)
    claim(folder, {"model": str(model.resolve()), "data": str(data.resolve())})
    states = _encode(folder / "states", pictures, str(autoencoder or model), str(text_encoder or model))
    transformer = build_transformer(file, identity.config).train().requires_grad_(True)
    transformer.recompute = config.recompute
    objective = FlowObjective(transformer, flow_shift=identity.flow_shift, null=states.null)
    objective = train(
        objective,
        partial(states.batch, size=config.batch_size),
        TrainingConfig(config.steps, config.learning_rate, warmup=min(100, config.steps // 10), cooldown=0.1),
        folder,
    )
    if PartialState().is_main_process:
        dtype = getattr(torch, identity.dtype)
        write_transformer(folder / "transformer", objective.transformer, identity, dtype)
    return folder / "transformer"


def _encode(folder: Path, pictures: list[Picture], autoencoder: str, text_encoder: str) -> PictureStates:
    """The states of the pictures; of several processes each encodes its part."""
    machine = PartialState(cpu=not torch.cuda.is_available())
    encoders = f"{autoencoder}, {text_encoder}"
    gemma = load_text_encoder(text_encoder, device=machine.device)
    own = pictures[machine.process_index :: machine.num_processes]
    write_states(folder, own, encoders, load_autoencoder(autoencoder, device=machine.device), gemma)
    machine.wait_for_everyone()
    with torch.no_grad():
        null = gemma([""], None)[0][0].float().cpu()
    return PictureStates.read(folder, pictures, encoders, null)
