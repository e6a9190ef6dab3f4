"""What the comparison of choices between captions trains on: captions that are right or wrong, and scores that tell it or not."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import captions as measured
from bench.captions import (
    CONFIG,
    NAMES,
    TRIALS,
    Numbers,
    captions_of,
    held_out,
    in_new_words,
    misdescribed,
    pictures_to_learn,
    run,
    share_taken,
)
from bench.scene_reader import judge
from bench.tables import CHOICES, choices
from sana.training.captions import Choice
from sana.training.scenes import COLOURS, Scene, draw, sample_scene, split_of

TRIAL = {trial.name: trial for trial in TRIALS}


def scene(kind: str, seed: int) -> Scene:
    return sample_scene(np.random.default_rng(seed), "train", 256, 256, kind)


@pytest.mark.parametrize("kind", measured.KINDS)
def test_a_wrong_caption_is_wrong_in_one_respect(kind: str) -> None:
    found = Counter()
    for seed in range(24):
        shown = scene(kind, seed)
        verdict = vars(judge(misdescribed(np.random.default_rng(seed), shown), draw(shown)))
        (respect,) = {name for name, right in verdict.items() if right is False} - {"size"}
        found[respect] += 1
    more = {"count": {"count"}, "relation": {"relation"}}.get(kind, set())
    assert {*found} == {"colour", "shape"} | more and min(found.values()) >= 3


def test_new_words_are_the_old_ones_of_other_colours() -> None:
    pairs = set()
    for seed in range(100):
        shown = scene("relation", seed)
        renamed = in_new_words(shown)
        assert replace(renamed, things=shown.things) == shown
        for old, new in zip(shown.things, renamed.things, strict=True):
            assert replace(new, look=replace(new.look, colour=old.look.colour)) == old
            pairs.add((old.look.colour, new.look.colour))
    assert {("red", "orange"), ("black", "red")} < pairs
    assert len(pairs) == len(COLOURS) == len({new for _, new in pairs})


def test_half_of_the_captions_of_each_picture_are_right() -> None:
    told = pictures_to_learn(90, seed=0)
    assert {sum(each.right) for each in told} == {2} and {len(each.texts) for each in told} == {len(NAMES)} == {4}
    assert len({each.right for each in told}) == 6  # all orders
    assert Counter(each.scene.kind for each in told) == dict.fromkeys(measured.KINDS, 30)
    assert len({(each.scene.height, each.scene.width, each.scene.kind) for each in told}) == 9
    assert pictures_to_learn(3, seed=0) == told[:3] and pictures_to_learn(3, seed=1) != told[:3]
    for each in told:
        looks = [thing.look for thing in in_new_words(each.scene).things]
        right = [text for text, right in zip(each.texts, each.right, strict=True) if right]
        assert all(look.colour in text and look.shape in text for look in looks for text in right)


def test_held_out_captions_are_in_new_words_too() -> None:
    items = held_out(30)
    assert len(items) == 30 and {item.scene.kind for item in items} == {*measured.KINDS}
    for item in items:
        looks = tuple(thing.look for thing in item.scene.things)
        assert split_of(item.scene.kind, looks, item.scene.relation) == "test"
        assert all(thing.look.colour in item.caption for thing in in_new_words(item.scene).things)


def test_scores_tell_what_is_right_as_well_as_they_should() -> None:
    told = pictures_to_learn(300, seed=0)
    right = np.array([each.right for each in told])
    found = {}
    for name in ("best-clear", "best-noisy", "best-useless"):
        captions = captions_of(TRIAL[name], told, seed=0)
        assert captions == captions_of(TRIAL[name.replace("best", "score")], told, seed=0)
        assert [tuple(caption.text for caption in each) for each in captions] == [each.texts for each in told]
        scores = np.array([[caption.score for caption in each] for each in captions])
        found[name] = scores[right].mean() - scores[~right].mean(), scores[right].std()
    assert found["best-clear"] == (pytest.approx(3, abs=0.2), pytest.approx(1, abs=0.1))
    assert found["best-noisy"] == (pytest.approx(3, abs=0.5), pytest.approx(3, abs=0.3))
    assert found["best-useless"] == (pytest.approx(0, abs=0.25), pytest.approx((1 + 1.5**2) ** 0.5, abs=0.1))


def test_share_of_right_captions_that_are_taken() -> None:
    told = pictures_to_learn(300, seed=0)
    found = {name: share_taken(trial, told, captions_of(trial, told, 0)) for name, trial in TRIAL.items()}
    assert found["right"] == 100 and found["turn"] == 50
    for name in ("first", "best-useless", "score-useless"):
        assert found[name] == pytest.approx(50, abs=6)
    assert 97 < found["best-clear"] < 100 and 60 < found["score-noisy"] < found["best-noisy"] < 90
    assert found["score-noisy"] + 15 < found["score-clear"] < found["best-clear"]


def test_a_single_caption_is_the_first_or_a_right_one() -> None:
    told = pictures_to_learn(30, seed=0)
    first, right = (captions_of(TRIAL[name], told, 0) for name in ("first", "right"))
    for each, (one,), (other,) in zip(told, first, right, strict=True):
        assert one.text == each.texts[0] and each.right[NAMES.index(other.name)]


def test_a_training_is_judged_on_its_way_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SETTINGS", replace(measured.SETTINGS, steps=1))
    monkeypatch.setattr(measured, "CONFIG", replace(CONFIG, batch_size=1))
    numbers = Numbers(pictures=2, captions=2, steps=(1, 2))
    found = run(tmp_path, TRIAL["score-noisy"], 1, numbers)
    assert set(found["accuracy"]) == {"1", "2"} and set(found["accuracy"]["2"]) >= {"colour", "everything"}
    assert found["trial"] == "score-noisy" and found["seed"] == 1
    folder = tmp_path / "1-score-noisy"
    assert (folder / "log.csv").read_text().splitlines()[-1].startswith("2,")
    (told, *_), lines = (
        pictures_to_learn(2, 1),
        (tmp_path / "data" / "1-score-noisy" / "captions.jsonl").read_text().splitlines(),
    )
    assert [json.loads(each)["text"] for each in lines[:4]] == [*told.texts] and len(lines) == 8
    monkeypatch.setattr(measured, "train_lora", None)
    assert run(tmp_path, TRIAL["score-noisy"], 1, numbers) == found


def test_the_table_has_all_trials_with_their_spread() -> None:
    def table(*shares: float) -> list[str]:
        rows = [
            {"trial": name, "taken": 50.0, "accuracy": {"10": {"everything": share}}}
            for name in TRIAL
            for share in shares
        ]
        return [
            *choices({"steps": [10], "captions": 40, "seeds": [*range(len(shares))], "date": "today", "rows": rows})
        ]

    told, title, _, *lines = table(20.0, 30.0, 70.0)
    assert "of 3 seeds: the mean, from the lowest to the highest, today" in told
    assert title == "| a step takes | scores | right ones | after 10 steps |"
    assert {*CHOICES} == {*TRIAL} and len(lines) == len(TRIAL)
    assert lines[2] == "| all in turn | | 50 % | 40, 20 to 70 |"
    told, _, _, *lines = table(20.0)
    assert "of one seed, today" in told and lines[2] == "| all in turn | | 50 % | 20 |"


def test_trials_are_of_the_usual_choices() -> None:
    assert {trial.choice for trial in TRIALS} == {Choice("turn"), Choice("best"), Choice("score")}
