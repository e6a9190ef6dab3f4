"""Captions by a model that looks at pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, BatchFeature

from ..images import on_white, read_picture
from ..networks.devices import checked_device
from .captions import caption_path, write_caption
from .pretrained import QUESTION, load_model, load_processor

MOST_TOKENS = 200  # of 300 that SANA reads


class Captioner:
    """Any image-text-to-text model of `transformers`, as a folder or by its name, see `load_model`.

    question: what it is told beside the picture; a model without a chat template is shown the picture alone.
    """

    def __init__(
        self, model: Path | str, *, question: str = QUESTION, device: str = "cpu", download: bool = False
    ) -> None:
        device = checked_device(device)
        self.model = load_model(AutoModelForImageTextToText, model, download).to(device)
        self.processor = load_processor(model, download)
        self.question = question

    @torch.no_grad()
    def __call__(self, picture: Image.Image) -> str:
        """The likeliest caption of a picture, of at most MOST_TOKENS tokens."""
        inputs = self._inputs(picture).to(self.model.device, self.model.dtype)
        told = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        tokens = self.model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)[0]
        if not self.model.config.is_encoder_decoder:
            tokens = tokens[told:]
        return self.processor.decode(tokens, skip_special_tokens=True).strip()

    def _inputs(self, picture: Image.Image) -> BatchFeature:
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image", "image": picture}, {"type": "text", "text": self.question}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        return self.processor(images=picture, return_tensors="pt")


def write_captions(pictures: Sequence[Path], name: str, captioner: Captioner) -> int:
    """Write a caption beside each picture that has none by this name; how many these were.

    name: one that `check_name` allows. Stopped and started again, it goes on. Raises ValueError for a file that is no picture,
    and OSError.
    """
    missing = [path for path in pictures if not caption_path(path, name).exists()]
    for path in tqdm(missing, desc="writing captions", unit="picture", disable=not missing):
        write_caption(path, name, captioner(on_white(read_picture(path))))
    return len(missing)


def write_each(name: str, model: Path | str, *, question: str, device: str, download: bool) -> Callable[[Path], int]:
    """`write_captions` of one picture, in another process. Raises ValueError as `Captioner` does."""
    captioner = Captioner(model, question=question, device=device, download=download)
    return lambda picture: write_captions([picture], name, captioner)
