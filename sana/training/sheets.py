"""Pictures of what a transformer in training draws: below its pictures, or beside what it drew before."""

from collections.abc import Sequence

from PIL import Image, ImageOps
from torch import Tensor

from ..config import TransformerIdentity
from ..images import on_white, read_picture
from ..networks.autoencoder import DCAutoencoder
from ..pipeline import SanaPipeline
from ..plan import Settings
from ..sampling.guidance import Condition
from .flow import FlowObjective
from .states import EXAMPLES, PictureStates, pad_texts

COLUMNS, SIDE, STEPS = EXAMPLES, 256, 14


def caption_sheet(
    objective: FlowObjective,
    states: PictureStates,
    autoencoder: DCAutoencoder,
    identity: TransformerIdentity,
) -> Image.Image:
    """Up to six of the pictures above, and below what the model makes of their captions at their sizes."""
    pipeline = SanaPipeline(objective.transformer, autoencoder, None, identity)
    shown = states.examples
    drawn = [draw(pipeline, example.size, example.text, states.null, seed=i) for i, example in enumerate(shown)]
    given = [
        ImageOps.fit(on_white(read_picture(example.path)), picture.size)
        for example, picture in zip(shown, drawn, strict=True)
    ]
    return in_rows(given, drawn)


def in_rows(*rows: Sequence[Image.Image]) -> Image.Image:
    """Rows of up to six pictures, each fitted into a square."""
    sheet = Image.new("RGB", (COLUMNS * SIDE, len(rows) * SIDE))
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            sheet.paste(ImageOps.contain(picture, (SIDE, SIDE)), (column * SIDE, row * SIDE))
    return sheet


def draw(pipeline: SanaPipeline, size: tuple[int, int], text: Tensor, null: Tensor, seed: int) -> Image.Image:
    """What the weights at hand make of a text. size: (height, width) px. text, null: (tokens, C), of it and of no prompt."""
    height, width = size
    device = pipeline.device
    plan = pipeline.plan("", Settings(height=height, width=width, steps=STEPS, seed=seed))
    padded, text_mask = (part.to(device) for part in pad_texts([text]))
    null = null.to(device)[: len(text)]
    cond = Condition(padded, text_mask)
    *_, last = pipeline.follow(plan, (cond, Condition(null.expand_as(padded), text_mask)))
    return pipeline.pictures(last.next_x)[0]
