"""The tables of the documents are those of the results."""

import pytest

from bench import tables
from bench.tables import DOCUMENTS, with_tables


def test_documents_show_what_was_measured() -> None:
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    assert sum(text.count("<!-- bench: ") for text in texts) == sum(text.count("<!-- end -->") for text in texts) >= 5
    for document, text in zip(DOCUMENTS, texts, strict=True):
        assert with_tables(text) == text, f"{document.name} is out of date: run python -m bench.tables"


def test_a_place_gets_its_table_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.KINDS, "captions", lambda result: iter([f"{result['captions']} captions"]))
    text = "before\n<!-- bench: captions demo -->\nold\n<!-- end -->\nafter\n"
    assert with_tables(text) == "before\n<!-- bench: captions demo -->\n300 captions\n<!-- end -->\nafter\n"
