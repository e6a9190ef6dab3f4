"""How well captions fit their pictures, by CLIP."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel

from ..images import on_white, read_picture
from ..networks.devices import checked_device
from .captions import Caption, has_score, made_from, read_captions, write_score
from .pretrained import CLIP, load_model, load_processor

TOGETHER = 16  # pictures


class Scorer:
    """A CLIP model with its processor, as a folder of `transformers` or by its name, see `load_model`."""

    def __init__(self, model: Path | str = CLIP, *, device: str = "cpu", download: bool = False) -> None:
        self.name = str(model)
        device = checked_device(device)
        self.model = load_model(CLIPModel, model, download).to(device)
        self.processor = load_processor(model, download)

    def __call__(self, paths: Sequence[Path], captions: Sequence[Sequence[str]]) -> list[Tensor]:
        """`score` for pictures in files. Raises ValueError for a file that is no picture."""
        return self.score([on_white(read_picture(path)) for path in paths], captions)

    @torch.no_grad()
    def score(self, pictures: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> list[Tensor]:
        """For each picture the scores of its captions, (n,): 100 cos of their embeddings, at least 0 (arXiv 2104.08718).

        A caption is cut behind as many tokens as CLIP reads.
        """
        inputs = self.processor(
            text=[text for texts in captions for text in texts],
            images=[*pictures],
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        found = self.model(**inputs.to(self.model.device))
        counts = [len(texts) for texts in captions]
        texts = found.text_embeds.float().split(counts)
        pairs = zip(texts, found.image_embeds.float(), strict=True)
        return [(100 * text @ image).clamp(0, 100).cpu() for text, image in pairs]


def score_captions(folder: Path, pictures: Sequence[Path], scorer: Scorer) -> int:
    """Write the scores of all captions that have none of this model, beside the pictures; how many these were.

    A score is computed anew where the picture or the caption has changed. Stopped and started again, it goes on.
    Raises ValueError for captions and pictures that cannot be read, and OSError.
    """
    return score_read([*zip(pictures, read_captions(folder, pictures), strict=True)], scorer)


def score_read(read: Sequence[tuple[Path, Sequence[Caption]]], scorer: Scorer) -> int:
    """`score_captions` of pictures whose captions have been read."""
    waiting: list[tuple[Path, str, list[Caption]]] = []
    for path, captions in read:
        of = made_from(path, scorer.name)
        missing = [caption for caption in captions if not has_score(path, caption, of)]
        if missing:
            waiting.append((path, of, missing))
    with tqdm(total=len(waiting), desc="scoring captions", unit="picture", disable=not waiting) as bar:
        for start in range(0, len(waiting), TOGETHER):
            group = waiting[start : start + TOGETHER]
            found = scorer([path for path, _, _ in group], [[caption.text for caption in each] for *_, each in group])
            for (path, of, captions), scores in zip(group, found, strict=True):
                for caption, score in zip(captions, scores.tolist(), strict=True):
                    write_score(path, caption, score, of)
                bar.update()
    return sum(len(captions) for *_, captions in waiting)


def score_each(model: Path | str, *, device: str, download: bool) -> Callable[[tuple[Path, Sequence[Caption]]], int]:
    """`score_read` of one picture, in another process. Raises ValueError as `Scorer` does."""
    scorer = Scorer(model, device=device, download=download)
    return lambda picture: score_read([picture], scorer)
