"""The garbage collector rests while PyTorch is imported, and only then."""

import gc
import runpy
import sys
from pathlib import Path

import pytest

from sana import importing

SOURCE = str(Path(importing.__file__))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    for name in ("enable", "disable", "freeze"):
        monkeypatch.setattr(gc, name, lambda name=name: found.append(name))
    return found


def import_anew(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """With a PyTorch that consists of this text."""
    (folder / "torch.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "torch")
    runpy.run_path(SOURCE)


@pytest.mark.parametrize("enabled", [True, False])
def test_collector_rests_and_is_as_before(
    enabled: bool, told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gc, "isenabled", lambda: enabled)
    monkeypatch.setattr(gc, "imported", lambda: told.append("torch"), raising=False)
    import_anew(monkeypatch, tmp_path, "import gc\ngc.imported()\n")
    assert told == ["disable", "torch", "freeze"] + ["enable"] * enabled


def test_collector_works_again_after_an_import_that_fails(
    told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gc, "isenabled", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        import_anew(monkeypatch, tmp_path, "raise KeyboardInterrupt\n")
    assert told == ["disable", "enable"]


def test_nothing_happens_where_pytorch_is_there(told: list[str]) -> None:
    runpy.run_path(SOURCE)
    assert told == []
