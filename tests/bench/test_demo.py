"""What the accuracy of the demo model counts. The model itself is measured by `python -m bench.demo` alone."""

from dataclasses import replace

from bench.demo import by_kind, recoloured, share_right
from bench.scene_reader import Judgement, judge
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


def test_a_recoloured_caption_differs_by_the_colour_that_its_scene_now_shows() -> None:
    items = [item for item in held_out_scenes(100, seed=0) if item.scene.kind in ("single", "count")]
    for old, new in zip(items, recoloured(items), strict=True):
        before, after = old.scene.things[0].look.colour, new.scene.things[0].look.colour
        assert before != after
        assert new.caption == old.caption.replace(before, after, 1)
        assert not judge(new.scene, draw(old.scene)).colour
        assert judge(new.scene, draw(new.scene)).right
