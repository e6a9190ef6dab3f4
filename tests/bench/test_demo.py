"""What the accuracy of the demo model counts. How good it is, `python -m bench.demo` measures."""

import re
from dataclasses import replace

import pytest

from bench.demo import CHANGES, by_kind, changed, measure_briefly, share_right
from bench.scene_reader import Judgement, judge
from sana.pipeline import SanaPipeline
from sana.training.scenes import draw, held_out_scenes

RIGHT = Judgement(background=True, count=True, colour=True, shape=True, size=True, texture=True, relation=None)


def test_a_respect_counts_where_a_caption_speaks_of_it() -> None:
    found = share_right([RIGHT, replace(RIGHT, shape=False, relation=True), replace(RIGHT, relation=False), RIGHT])
    assert (found["colour"], found["shape"], found["relation"], found["everything"]) == (100, 75, 50, 50)


def test_relations_are_counted_apart() -> None:
    items = held_out_scenes(40, seed=0)
    found = by_kind(items, [RIGHT] * len(items))
    assert set(found) == {"single", "count", "pair", "inside", "left of", "above"}
    assert sum(map(len, found.values())) == len(items)


@pytest.mark.parametrize("word", CHANGES)
def test_a_changed_caption_asks_for_another_picture(word: str) -> None:
    found = 0
    for old in held_out_scenes(100, seed=0):
        new = changed(old, word)
        if new is None:
            continue
        found += 1
        before, after = (re.findall(r"\w+", item.caption) for item in (old, new))
        assert len([pair for pair in zip(before, after, strict=True) if set(pair) not in ({"a", "an"}, {pair[0]})]) == 1
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", new.caption)
        assert not getattr(judge(new.scene, draw(old.scene)), word)
        if word != "relation":
            assert judge(new.scene, draw(new.scene)).right
    assert found >= 10


def test_only_a_caption_with_such_a_word_is_changed() -> None:
    for item in held_out_scenes(100, seed=0):
        assert (changed(item, "relation") is None) == (item.scene.kind != "relation")
        assert (changed(item, "shape") is None) == (item.scene.kind not in ("single", "count"))


def test_a_brief_measurement_is_of_the_autoencoder_and_of_pictures() -> None:
    found = measure_briefly(SanaPipeline.load("demo"), 3)
    assert found["captions"] == 3 and found["autoencoder_psnr_db"] > 30
    assert set(found["accuracy"]) >= {"colour", "shape", "count", "everything"}
