"""Pictures with several captions on their way into batches."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from sana.training.captions import Caption, Choice
from sana.training.pictures import PictureStates, read_pictures, write_states
from tests.sana.models import autoencoder, text_encoder
from tests.training.drawn import draw_pictures

CAPTIONS = (Caption("prompt", "a", 30.0), Caption("VILA", "b", 15.0), Caption("x", "c", 10.0))


def states(choice: Choice) -> PictureStates:
    """Of one picture with three captions, whose texts are 0, 1 and 2."""
    texts = [torch.full((i + 1, 4), float(i)) for i in range(3)]
    return PictureStates([torch.zeros(32, 2, 2)], [texts], torch.zeros(300, 4), [CAPTIONS], choice)


def taken(choice: Choice, steps: int, size: int) -> Counter[int]:
    found: Counter[int] = Counter()
    for step in range(steps):
        batch = states(choice).batch(step, 0, size=size)
        assert batch.text_mask.sum(dim=1).tolist() == (batch.text[:, 0, 0] + 1).tolist()  # each with its own length
        found.update(batch.text[:, 0, 0].int().tolist())
    return found


def test_a_batch_has_captions_as_often_as_their_scores_say() -> None:
    """2 to 1 of those above the threshold: within four standard deviations of 1200."""
    found = taken(Choice("score", threshold=12, temperature=1), 30, 40)
    assert abs(found[0] - 800) < 4 * (1200 * 2 / 9) ** 0.5 and found[0] + found[1] == 1200


def test_a_step_has_the_next_caption() -> None:
    assert [taken(Choice("turn"), step + 1, 1) - taken(Choice("turn"), step, 1) for step in range(4)] == [
        Counter([0]),
        Counter([1]),
        Counter([2]),
        Counter([0]),
    ]
    assert taken(Choice("best"), 5, 2) == Counter({0: 10})


def test_only_what_may_be_taken_is_encoded(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", 2)
    (tmp_path / "pictures" / "0_VILA.json").write_text('{"0": {"VILA": "another caption"}}')
    for name, score in (("prompt", 10), ("VILA", 20)):
        (tmp_path / "pictures" / f"0_{name}_clip_score.json").write_text(f'{{"0": {{"{name}": {score}}}}}')
    best, other = read_pictures(tmp_path / "pictures", 256, Choice("best"))
    assert best.captions == (Caption("VILA", "another caption", 20.0),) and other.captions[0].name == "prompt"
    both, _ = read_pictures(tmp_path / "pictures", 256)
    assert [caption.name for caption in both.captions] == ["prompt", "VILA"]
    encoder = text_encoder()
    null = encoder([""], None)[0][0]
    for pictures, counts in (([best, other], [1, 1]), ([both, other], [2, 1])):
        write_states(tmp_path / "states", pictures, "x", autoencoder(), encoder)
        found = PictureStates.read(tmp_path / "states", pictures, "x", null)
        assert [len(texts) for texts in found.texts] == counts
        for picture, texts in zip(pictures, found.texts, strict=True):
            for caption, text in zip(picture.captions, texts, strict=True):
                expected, mask = encoder([caption.text])
                assert torch.equal(text, expected[0][mask[0]].bfloat16())


def test_a_picture_whose_captions_have_no_scores_is_named(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", 2)
    (tmp_path / "pictures" / "1_VILA.json").write_text('{"1": {"VILA": "another caption"}}')
    with pytest.raises(ValueError, match="^1.png: none of the captions prompt, VILA has a score"):
        read_pictures(tmp_path / "pictures", 256, Choice("score"))
