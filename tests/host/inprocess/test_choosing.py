"""The best of several pictures, by a CLIP model of transformers with random weights."""

from collections.abc import Iterator
from pathlib import Path

import folder_paths
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from tests.host.boot import Host
from tests.training.tiny_models import write_clip

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def clip() -> Path:
    folder = Path(folder_paths.get_folder_paths("clip_vision")[0]) / "small-clip"
    folder.mkdir(parents=True, exist_ok=True)
    return write_clip(folder)


@pytest.fixture(scope="module")
def images() -> Iterator[torch.Tensor]:
    """More than are scored at a time, with transparency."""
    colours = torch.rand(18, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    yield colours + 0.2 * torch.rand(18, 40, 24, 4, generator=torch.Generator().manual_seed(1)) * (1 - colours)


def test_best_first_with_their_scores(host: Host, clip: Path, images: torch.Tensor) -> None:
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    pixels = (images[..., :3] * 255).round().byte().numpy()
    inputs = processor(text=[PROMPT], images=[*pixels], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = 100 * model(**inputs).logits_per_text[0] / model.logit_scale.exp()
    order = expected.argsort(descending=True)
    kept, scores = host.call("SanaBestPictures", images=images, prompt=PROMPT, clip="small-clip", keep=3)
    assert torch.equal(kept, images[order[:3]])
    assert torch.allclose(torch.tensor(scores), expected[order[:3]], atol=1e-3) and scores[0] > scores[2] > 0
    everything, scores = host.call("SanaBestPictures", images=images, prompt=PROMPT, clip="small-clip", keep=50)
    assert torch.equal(everything, images[order]) and len(scores) == 18


def test_grey_pictures_are_scored_as_in_three_channels(host: Host, clip: Path, images: torch.Tensor) -> None:
    grey = images[:3, ..., :1]
    inputs = {"prompt": PROMPT, "clip": "small-clip", "keep": 3}
    kept, scores = host.call("SanaBestPictures", images=grey, **inputs)
    coloured, expected = host.call("SanaBestPictures", images=grey.expand(-1, -1, -1, 3), **inputs)
    assert scores == expected and kept.shape == grey.shape and torch.equal(kept.expand(-1, -1, -1, 3), coloured)


def test_wrong_inputs(host: Host, clip: Path, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="the prompt is empty; write what"):
        host.call("SanaBestPictures", images=images, prompt=" ", clip="small-clip", keep=1)
    with pytest.raises(ValueError, match="^there are no pictures to choose from; connect at least one$"):
        host.call("SanaBestPictures", images=images[:0], prompt=PROMPT, clip="small-clip", keep=1)
    with pytest.raises(ValueError, match="gone is not in models/clip_vision; choose another, or press R"):
        host.call("SanaBestPictures", images=images, prompt=PROMPT, clip="gone", keep=1)
