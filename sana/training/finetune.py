"""Fine-tuning of a SANA transformer on a folder of pictures with captions, with its autoencoder and text encoder frozen."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..checkpoints.files import TensorFile, read_tensors
from ..checkpoints.transformer import find_transformer
from ..checkpoints.writing import write_transformer
from ..config import TransformerIdentity
from ..images import on_white, read_picture
from ..loading import model_path
from ..networks.autoencoder import DCAutoencoder
from ..networks.packed import PackedWeight
from ..pipeline import SanaPipeline
from ..plan import Settings
from ..sampling.guidance import Condition
from ..text.text_encoder import GemmaTextEncoder
from .flow import FlowObjective
from .folder import claim
from .loop import TrainingConfig, check_counts, process_state, train
from .pictures import Picture, PictureStates, pad_texts, read_pictures, write_states

SHEET_COLUMNS, SHEET_SIDE, SHEET_STEPS = 6, 256, 14


@dataclass(frozen=True)
class FinetuneConfig:
    """What to train and how long."""

    steps: int = 1000
    batch_size: int = 4
    learning_rate: float = 1e-5
    recompute: bool = False  # activations of blocks in the backward pass: less memory, a third more work
    sheet_every: int = 500  # steps from one sheet to the next, see `caption_sheet`; 0: none
    save_every: int = 500  # steps from one saved state to the next

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can have."""
        check_counts({"steps": self.steps, "batch_size": self.batch_size, "save_every": self.save_every})
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0 and below 1, such as 1e-5")
        if self.sheet_every < 0:
            raise ValueError(f"sheet_every is {self.sheet_every}; it must be 0, for no sheets, or more")


def finetune(
    folder: Path,
    data: Path,
    config: FinetuneConfig,
    *,
    model: Path | str = "demo",
    autoencoder: Path | str | None = None,
    text_encoder: Path | str | None = None,
    variant: str | None = None,
) -> Path:
    """Train all of a transformer. model, autoencoder, text_encoder, variant: as for `SanaPipeline.load`.

    folder: receives the states of the pictures, the state of the training, sheets, and the result, a transformer in
    diffusers layout, whose folder is returned. Stopped and started again, it goes on. Raises ValueError for Sprint, for
    pictures that cannot be read or have no caption, and for a folder of another model or other data, and CheckpointError
    for parts that cannot be trained with, before any picture is encoded.
    """
    model = model_path(model)
    autoencoder, text_encoder = (part and model_path(part) for part in (autoencoder, text_encoder))
    identity = _trainable(read_tensors(model, "transformer"), variant)
    pictures = read_pictures(data, identity.base_size, besides=folder)
    machine = process_state()
    pipeline = SanaPipeline.load(
        model,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        variant=variant,
        dtype=torch.float32,
        device=machine.device,
        offload="never",
    )
    given = {"variant": variant} if variant else {}
    with claim(folder, {"model": str(model.resolve()), "data": str(data.resolve()), **given}):
        encoders = f"{autoencoder or model}, {text_encoder or model}"
        states = _encode(folder / "states", pictures, encoders, pipeline.autoencoder, pipeline.text_encoder)
        pipeline.text_encoder = None  # it is the largest part, and no longer needed
        transformer = pipeline.transformer.train().requires_grad_(True)
        transformer.recompute = config.recompute
        objective = FlowObjective(transformer, flow_shift=identity.flow_shift, null=states.null)
        sheet = partial(
            caption_sheet, pictures=pictures, states=states, autoencoder=pipeline.autoencoder, identity=identity
        )
        schedule = TrainingConfig(
            config.steps,
            config.learning_rate,
            warmup=min(100, config.steps // 10),
            cooldown=0.1,
            save_every=config.save_every,
            sheet_every=config.sheet_every or config.steps,
        )
        objective = train(
            objective,
            partial(states.batch, size=config.batch_size),
            schedule,
            folder,
            sheet if config.sheet_every else None,
        )
        if machine.is_main_process:
            dtype = getattr(torch, identity.dtype)
            write_transformer(folder / "transformer", objective.transformer, identity, dtype)
        return folder / "transformer"


def _trainable(file: TensorFile, variant: str | None) -> TransformerIdentity:
    """What a transformer is. Raises ValueError for one of a kind that cannot be trained."""
    identity, tensors, _ = find_transformer(file, variant)
    if any(isinstance(tensor, PackedWeight) for tensor in tensors.values()):
        raise ValueError(
            f"{file.path.name} is quantised, and here every weight is trained; unpack it by `python -m sana convert --dtype bfloat16`"
        )
    if identity.config.guidance_embed:
        raise ValueError(
            f"{file.path.name} is a Sprint model, which learns from a teacher; fine-tune a SANA or SANA-1.5 model"
        )
    return identity


def _encode(
    folder: Path, pictures: Sequence[Picture], encoders: str, autoencoder: DCAutoencoder, gemma: GemmaTextEncoder
) -> PictureStates:
    """The states of the pictures; of several processes each encodes its part."""
    machine = process_state()
    own = pictures[machine.process_index :: machine.num_processes]
    write_states(folder, own, encoders, autoencoder, gemma)
    machine.wait_for_everyone()
    with torch.no_grad():
        null = gemma([""], None)[0][0].float().cpu()
    return PictureStates.read(folder, pictures, encoders, null)


def caption_sheet(
    objective: FlowObjective,
    pictures: Sequence[Picture],
    states: PictureStates,
    autoencoder: DCAutoencoder,
    identity: TransformerIdentity,
) -> Image.Image:
    """Up to six of the pictures above, and below what the model makes of their captions at their sizes."""
    pipeline = SanaPipeline(objective.transformer, autoencoder, None, identity)
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_SIDE, 2 * SHEET_SIDE))
    chosen = range(0, len(pictures), -(-len(pictures) // SHEET_COLUMNS))
    for column, i in enumerate(chosen):
        drawn = _draw(pipeline, pictures[i], states.texts[i].float(), objective.null, seed=i)
        given = ImageOps.fit(on_white(read_picture(pictures[i].path)), drawn.size)
        for row, picture in enumerate((given, drawn)):
            fitted = ImageOps.contain(picture, (SHEET_SIDE, SHEET_SIDE))
            sheet.paste(fitted, (column * SHEET_SIDE, row * SHEET_SIDE))
    return sheet


def _draw(pipeline: SanaPipeline, picture: Picture, text: Tensor, null: Tensor, seed: int) -> Image.Image:
    """What the weights at hand make of a caption. text, null: (tokens, C), of the caption and of the empty prompt."""
    height, width = picture.size
    plan = pipeline.plan(picture.caption, Settings(height=height, width=width, steps=SHEET_STEPS, seed=seed))
    padded, text_mask = (part.to(null.device) for part in pad_texts([text]))
    cond = Condition(padded, text_mask)
    *_, last = pipeline.follow(plan, (cond, Condition(null[: len(text)].expand_as(padded), text_mask)))
    return pipeline.pictures(last.next_x)[0]
