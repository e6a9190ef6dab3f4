"""Styles: what they make of prompts, and one sentence for every file that holds none."""

import json
from pathlib import Path

import pytest

from sana.text.styles import MOST_BYTES, PROMPT, STYLES, Style, read_styles

ETCHING = {"prompt": "an etching of {prompt}, fine lines", "negative": "colour"}


def write(folder: Path, content: object) -> Path:
    path = folder / "styles.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_style_stands_around_a_prompt_and_against_another() -> None:
    style = Style("an etching of {prompt}, fine lines", "colour, photograph")
    assert style.around("  a {red} cat\n") == "an etching of a {red} cat, fine lines"
    assert style.against("a dog ") == "a dog, colour, photograph"
    assert style.against(" ") == "colour, photograph"
    assert Style("{prompt}", "").against("a dog") == "a dog"


def test_our_styles_have_both_texts() -> None:
    assert 12 <= len(STYLES) <= 20
    for name, style in STYLES.items():
        assert style.prompt.count(PROMPT) == 1 and style.negative and not name.endswith(")"), name
    assert len({style.prompt for style in STYLES.values()}) == len(STYLES)


def test_a_file_adds_to_our_styles_and_replaces_them(tmp_path: Path) -> None:
    assert read_styles(tmp_path / "styles.json") == STYLES
    path = write(tmp_path, {"Etching": ETCHING, "Clay": {"prompt": "{prompt} in clay"}})
    found = read_styles(path)
    assert found["Etching"] == Style(**ETCHING) and found["Clay"] == Style("{prompt} in clay", "")
    assert list(found) == [*STYLES, "Etching"] and found["Ink"] == STYLES["Ink"]
    assert read_styles(write(tmp_path, "\ufeff" + json.dumps({"Etching": ETCHING})))["Etching"] == Style(**ETCHING)
    assert read_styles(write(tmp_path, {})) == STYLES
    assert len(read_styles(write(tmp_path, {f"{k}": ETCHING for k in range(1000)}))) == len(STYLES) + 1000
    assert read_styles(write(tmp_path, {"a" * 100: {"prompt": "{prompt}" + "a" * 1992}}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("[" * 5000, "it is nested more than 100 deep"),
        ([ETCHING], "it is no JSON object"),
        ({f"{k}": ETCHING for k in range(1001)}, "it has more than 1,000 styles"),
        ({" ": ETCHING}, "' ' is no name of 1 to 100 letters"),
        ({"a" * 101: ETCHING}, f"'{'a' * 50}' is no name of 1 to 100 letters"),
        ({"none": ETCHING}, "'none' is a name with a meaning of its own in the list of styles"),
        ({"Ink (negative)": ETCHING}, "'Ink (negative)' is a name with a meaning of its own in the list of styles"),
        ({"Etching": "an etching of {prompt}"}, "'Etching' has no prompt and negative of 2,000 letters at most"),
        ({"Etching": {**ETCHING, "negative": 1}}, "'Etching' has no prompt and negative of 2,000 letters at most"),
        (
            {"Etching": {"prompt": "{prompt}" + "a" * 1993}},
            "'Etching' has no prompt and negative of 2,000 letters at most",
        ),
        ({"Etching": {"prompt": "an etching"}}, "the prompt of 'Etching' does not have {prompt} in it once"),
        ({"Etching": {"prompt": "{prompt}{prompt}"}}, "the prompt of 'Etching' does not have {prompt} in it once"),
        ({"Etching": {"negative": "colour"}}, "the prompt of 'Etching' does not have {prompt} in it once"),
        (
            {"Etching": {"prompt": "{prompt} \ud83d"}},
            "the style 'Etching' is no text in UTF-8 from its character 10 on; type it again",
        ),
        ({"A\ud83d": ETCHING}, "the style 'A\\ud83d' is no text in UTF-8 from its character 2 on; type it again"),
    ],
    ids=range(17),
)
def test_a_file_that_holds_no_styles_is_told_in_one_sentence(tmp_path: Path, content: object, reason: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        read_styles(path)
    form = '{"Name": {"prompt": "an etching of {prompt}", "negative": "colour"}}'
    assert str(caught.value) == f"{path} holds no styles ({reason}); write {form}"


def test_what_is_no_small_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"Etching": ETCHING}) + " " * 10_000_000)
    with pytest.raises(ValueError, match=r"\(it has more than 1,048,576 bytes\)"):
        read_styles(path)
    text = json.dumps({"Etching": ETCHING})
    assert "Etching" in read_styles(write(tmp_path, text + " " * (MOST_BYTES - len(text))))
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"holds no styles \(Is a directory\); write"):
        read_styles(path)
