"""Several captions of a picture: where they are read from, and which one is taken how often."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana.training.captions import (
    Caption,
    Choice,
    caption_path,
    check_name,
    has_score,
    made_from,
    read_captions,
    write_caption,
    write_score,
)

CAPTIONS = (Caption("prompt", "a", 26.7), Caption("VILA", "b", 27.2), Caption("InternVL", "c", 24.9), Caption("x", "d"))


def drawn(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return paths


def test_captions_and_scores_in_the_layout_of_nvlabs(tmp_path: Path) -> None:
    """The files of its asset/example_data, and a second picture whose name begins with that of the first."""
    one, two = drawn(tmp_path, "00.png", "00_b.png")
    (tmp_path / "00.txt").write_text("a cat\n")
    (tmp_path / "00_b.txt").write_text("\ufeffa dog", encoding="utf-8")
    (tmp_path / "00_InternVL2-26B.json").write_text('{"00": {"InternVL2-26B": "The image shows a cat."}}')
    (tmp_path / "00_InternVL2-26B_clip_score.json").write_text('{"00": {"InternVL2-26B": "27.1037"}}')
    (tmp_path / "00_prompt_clip_score.json").write_text('{"00": {"prompt": 26}}')
    (tmp_path / "00_b_VILA.json").write_text('{"00_b": {"VILA": "A dog.", "VILA-13B": null}}')
    (tmp_path / "00_meta.json").write_text('{"width": 8}')
    (tmp_path / "00_boxes.json").write_text("[1, 2]")
    (tmp_path / "notes_of.json").write_text("no JSON")
    assert read_captions(tmp_path, [one, two]) == [
        (Caption("prompt", "a cat", 26.0), Caption("InternVL2-26B", "The image shows a cat.", 27.1037)),
        (Caption("prompt", "a dog"), Caption("VILA", "A dog."), Caption("VILA-13B", "")),
    ]


def test_captions_of_a_list(tmp_path: Path) -> None:
    one, two = drawn(tmp_path, "a.png", "b/c.png")
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "a_prompt_clip_score.json").write_text('{"a": {"prompt": 20}}')
    lines = [
        {"picture": "a.png", "text": "new"},
        {"picture": "b/c.png", "text": "one", "name": "VILA", "score": 12.5},
        {"picture": "b/c.png", "text": "two"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert read_captions(tmp_path, [one, two]) == [
        (Caption("prompt", "new", 20.0),),
        (Caption("VILA", "one", 12.5), Caption("prompt", "two")),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a_x.json", b"{", "a_x.json cannot be read"),
        ("a_x.json", b'{"a": "a cat"}', "'a' has no captions by name"),
        ("a_x.json", b'{"a": {"x": 1}}', "a caption is 1"),
        ("a_x.json", b'{"a": {"x": "x\\ud800"}}', "a caption is 'x\\ud800', which is no text in UTF-8"),
        ("a_x_clip_score.json", b'{"a": {"x": "high"}}', "a score is 'high'"),
        ("a_x_clip_score.json", b'{"a": {"x": -1}}', "a score is -1"),
        ("a_x_clip_score.json", b'{"a": {"x": 101}}', "a score is 101"),
        ("a_x_clip_score.json", b'{"a": {"x": "nan"}}', "a score is 'nan'"),
        ("a_x_clip_score.json", b'{"a": {"x": true}}', "a score is True"),
        ("captions.jsonl", b'{"picture": "a.png", "text": "x"}\n{', "line 2 of"),
        ("captions.jsonl", b'{"picture": "z.png", "text": "x"}', "its \"picture\" is 'z.png', and there is none"),
        ("captions.jsonl", b'{"picture": "a.png"}', 'it has no "text"'),
        ("captions.jsonl", b'{"picture": "a.png", "text": "x\\ud800"}', "a caption is 'x\\ud800', which is no text in"),
        ("captions.jsonl", b'{"picture": "a.png", "text": "x", "name": ""}', "a caption is called ''"),
        ("captions.jsonl", b'{"picture": "a.png", "text": "x", "score": "nan"}', "a score is 'nan'"),
        ("a.txt", b"caf\xe9", "a.txt is not a text in UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    pictures = drawn(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_captions(tmp_path, pictures)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_picture_without_captions_is_named(tmp_path: Path) -> None:
    one, two = drawn(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="1 of 2 pictures have no caption, first b.png; write a .txt"):
        read_captions(tmp_path, [one, two])


def test_one_caption_is_always_taken() -> None:
    for way in ("turn", "best", "score"):
        assert Choice(way).weights([Caption("x", "d")], turn=3).tolist() == [1]


def test_captions_are_taken_in_turn() -> None:
    taken = [Choice("turn").weights(CAPTIONS, turn).argmax() for turn in range(6)]
    assert taken == [0, 1, 2, 3, 0, 1]
    assert Choice("turn").possible(CAPTIONS) == CAPTIONS


def test_the_best_caption_is_that_of_the_highest_score() -> None:
    assert Choice("best").weights(CAPTIONS).tolist() == [0, 1, 0, 0]
    assert Choice("best").possible(CAPTIONS) == CAPTIONS[1:2]


@pytest.mark.parametrize(
    ("threshold", "temperature", "powers"),
    [
        (25.0, 0.1, (26.7**10, 27.2**10, 0, 0)),
        (26.7, 1.0, (26.7, 27.2, 0, 0)),
        (26.8, 1.0, (0, 1, 0, 0)),
        (0.0, 0.5, (26.7**2, 27.2**2, 24.9**2, 0)),
        (30.0, 0.1, (0, 1, 0, 0)),  # none is high enough
        (25.0, 1e-6, (0, 1, 0, 0)),
    ],
)
def test_by_score_captions_are_taken_as_often_as_nvlabs_takes_them(
    threshold: float, temperature: float, powers: tuple[float, ...]
) -> None:
    weights = Choice("score", threshold, temperature).weights(CAPTIONS)
    assert np.allclose(weights, np.array(powers) / sum(powers), rtol=1e-12, atol=0)


def test_captions_below_the_threshold_are_not_possible() -> None:
    assert Choice("score").possible(CAPTIONS) == CAPTIONS[:2]


def test_scores_of_nothing_leave_the_first() -> None:
    captions = [Caption("a", "x", 0.0), Caption("b", "y", 0.0)]
    assert Choice("score", threshold=0).weights(captions).tolist() == [1, 0]


@pytest.mark.parametrize("way", ["best", "score"])
def test_captions_without_scores_cannot_be_chosen_by_them(way: str) -> None:
    with pytest.raises(ValueError, match="none of the captions a, b has a score; compute them by"):
        Choice(way).weights([Caption("a", "x"), Caption("b", "y")])


@pytest.mark.parametrize(
    "values", [("worst",), ("score", -1), ("score", 101), ("score", np.nan), ("score", 25, 0), ("score", 25, np.nan)]
)
def test_choices_out_of_range(values: tuple) -> None:
    with pytest.raises(ValueError, match="; (use|it must be)"):
        Choice(*values)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (path,) = drawn(tmp_path, "a.png")
    write_caption(path, "VILA-13B", "A cat.\nIt sleeps.")
    (caption,) = read_captions(tmp_path, [path])[0]
    assert caption == Caption("VILA-13B", "A cat.\nIt sleeps.")
    write_score(path, caption, 27.10374, "clip")
    assert json.loads((tmp_path / "a_VILA-13B_clip_score.json").read_text())["a"] == {"VILA-13B": "27.1037"}
    assert read_captions(tmp_path, [path]) == [(caption._replace(score=27.1037),)]


def test_a_picture_called_like_a_word_keeps_its_scores(tmp_path: Path) -> None:
    (path,) = drawn(tmp_path, "of.png")
    (tmp_path / "of.txt").write_text("a cat")
    write_score(path, Caption("prompt", "a cat"), 20.0, "clip")
    assert read_captions(tmp_path, [path]) == [(Caption("prompt", "a cat", 20.0),)]


def test_a_score_is_of_a_picture_a_text_and_a_model(tmp_path: Path) -> None:
    (path,) = drawn(tmp_path, "a.png")
    caption = Caption("prompt", "a cat")
    of = made_from(path, "clip")
    assert not has_score(path, caption, of)
    write_score(path, caption, 20.0, of)
    assert has_score(path, caption, of) and has_score(path, caption._replace(score=3.0), made_from(path, "clip"))
    assert not has_score(path, caption._replace(text="a dog"), of)
    assert not has_score(path, caption, made_from(path, "other"))
    Image.new("RGB", (8, 8), "red").save(path)
    assert not has_score(path, caption, made_from(path, "clip"))


@pytest.mark.parametrize("name", ["", "a/b", "prompt", "x_clip_score", "a" * 101])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be called"):
        check_name(name)
    if name not in ("prompt", "x_clip_score"):
        with pytest.raises(ValueError, match="a caption of a.png is called"):
            write_score(tmp_path / "a.png", Caption(name, "x"), 1.0, "clip")


def test_names_of_models() -> None:
    check_name("InternVL2-26B")
    assert caption_path(Path("f/a.png"), "InternVL2-26B") == Path("f/a_InternVL2-26B.json")
