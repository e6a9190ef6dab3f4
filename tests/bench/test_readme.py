"""The tables of README are those of the results."""

import pytest

from bench import readme
from bench.readme import README, with_tables


def test_readme_shows_what_was_measured() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("<!-- bench: ") == text.count("<!-- end -->") >= 5
    assert with_tables(text) == text, "run python -m bench.readme"


def test_a_place_gets_its_table_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(readme.KINDS, "captions", lambda result: iter([f"{result['captions']} captions"]))
    text = "before\n<!-- bench: captions demo -->\nold\n<!-- end -->\nafter\n"
    assert with_tables(text) == "before\n<!-- bench: captions demo -->\n300 captions\n<!-- end -->\nafter\n"
