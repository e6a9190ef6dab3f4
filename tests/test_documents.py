"""What documents promise: README stays short, links lead somewhere, the map of the files is whole, quoted messages are real."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").glob("*.md")])
MOST_LINES = 130  # of README
MOST_BYTES = 250_000  # of a picture in docs/, which travels with the pack
LINK = re.compile(r"\]\(([^)\s]+)\)")
QUOTE = re.compile(r"^```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)  # messages of ours; those of others are in ```log
FEWEST_LETTERS = 20  # by which a message is told from another


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_pictures_are_small() -> None:
    pictures = [*(ROOT / "docs").glob("*.jpg"), *(ROOT / "docs").glob("*.png")]
    assert pictures and all(path.stat().st_size <= MOST_BYTES for path in pictures)


@pytest.mark.parametrize("document", DOCUMENTS, ids=label)
def test_links_lead_to_files(document: Path) -> None:
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (document.parent / t.split("#")[0]).exists()]
    assert not missing


def test_every_module_is_in_the_map() -> None:
    """And every module in the map is there."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for folder in ("sana", "nodes"):
        section = re.search(rf"^### {folder}/\n(.*?)(?=^##)", text, re.DOTALL | re.MULTILINE)[1]
        listed = re.findall(r"^\| `([\w/]+\.py)` \| \S", section, re.MULTILINE)
        modules = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}
        told = {name for name in modules if folder == "nodes" and name == "__init__.py" or "__init__" not in name}
        assert sorted(listed) == sorted(told)


@cache
def messages() -> list[re.Pattern[str]]:
    """What the code can say: its strings, with anything in the places of their values."""
    found = []
    for path in (path for folder in ("sana", "nodes", "tools") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if all(isinstance(text, str | None) for text in texts):
                letters = sum(len(text) for text in texts if text)
                if letters >= FEWEST_LETTERS:
                    found.append(re.compile("".join(".+?" if text is None else _pattern(text) for text in texts)))
    return found


def _pattern(text: str) -> str:
    """A literal part of a message, in which a log has places for values, too."""
    return re.sub(r"%(?:\\\.\d)?[a-z]", ".+?", re.escape(text))


def quotes() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return [line for block in QUOTE.findall(text) for line in block.splitlines()]


@pytest.mark.parametrize("quote", quotes())
def test_quoted_messages_are_those_of_the_code(quote: str) -> None:
    assert any(message.search(quote) for message in messages())


def test_a_message_that_nobody_says_is_noticed() -> None:
    quote = "width 1000 is not a multiple of 32 px from 32 to 16384; use 992"
    assert any(message.search(quote) for message in messages())
    assert not any(message.search(quote.replace("not a multiple", "no multiple")) for message in messages())
