"""Which rows are done, as a run keeps it from one start to the next."""

from pathlib import Path

import fsspec
import pytest
from pyarrow import parquet

from sana.cluster import manifest as module
from sana.cluster.manifest import FOLDER, Entry, Manifest
from sana.cluster.places import Folder, Place, open_place


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    fsspec.filesystem("memory").store.clear()
    return Folder(tmp_path) if request.param == "folder" else open_place("memory://bucket/run")


def test_entries_are_found_again(place: Place) -> None:
    first = Manifest(place)
    entries = [
        Entry(3, 30, "x", "a cat", 2**62, '{"steps": 2}', "f.png", "00", 1.5, "w"),
        Entry(0, 7, error="it is broken"),
    ]
    for entry in entries:
        first.add(entry)
    assert place.names(FOLDER) == [] and first.count == 2
    first.flush()
    first.flush()
    assert place.names(FOLDER) == ["part-000000.parquet"]
    second = Manifest(place)
    assert second.count == 2 and [Entry(**found) for found in second.entries()] == entries
    assert second.has(3, 30) and not second.has(3, 31)
    assert second.has(0, 7) and not second.has(1, 7) and not second.has(4, 0)
    second.add(Entry(1, 5))
    second.flush()
    assert place.names(FOLDER) == ["part-000000.parquet", "part-000001.parquet"] and Manifest(place).count == 3


def test_a_part_is_written_when_it_is_large_or_old(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 2)
    found = Manifest(place)
    found.add(Entry(0, 1))
    assert place.names(FOLDER) == []
    found.add(Entry(1, 1))
    assert place.names(FOLDER) == ["part-000000.parquet"]
    monkeypatch.setattr(module, "SECONDS", 0.0)
    found.add(Entry(2, 1))
    assert len(place.names(FOLDER)) == 2


def test_rows_that_failed_are_forgotten_to_be_tried_again(place: Place) -> None:
    first = Manifest(place)
    for entry in (Entry(0, 1, file="a.png"), Entry(1, 1, error="it is broken")):
        first.add(entry)
    first.flush()
    assert Manifest(place).has(1, 1)
    second = Manifest(place, retry=True)
    assert second.has(0, 1) and not second.has(1, 1) and second.count == 1
    assert [entry["row"] for entry in Manifest(place).entries()] == [0]


def test_a_row_has_one_entry(place: Place) -> None:
    """The last one, also where a process was killed before the earlier one was taken out."""
    first = Manifest(place)
    for entry in (Entry(0, 1, prompt="a"), Entry(1, 1, error="it is broken")):
        first.add(entry)
    first.flush()
    part = place.read(f"{FOLDER}/part-000000.parquet")
    second = Manifest(place)
    assert second.failed == {1}
    second.add(Entry(1, 2, prompt="b"))
    second.flush()
    found = [(entry["row"], entry["prompt"], entry["error"]) for entry in second.entries()]
    assert found == [(0, "a", None), (1, "b", None)] and second.count == 2 and second.failed == set()
    place.write(f"{FOLDER}/part-000000.parquet", part)
    third = Manifest(place)
    assert list(third.entries()) == list(second.entries()) and third.count == 2 and third.failed == set()


def picture(name: str) -> str:
    return f"pictures/000000/{name}.png"


def drawn(place: Place, rows: dict[int, str | None], key: int) -> Manifest:
    """Rows drawn into files of these names, or that could not be drawn."""
    found = Manifest(place)
    for row, name in rows.items():
        if name is not None:
            place.write(picture(name), str(row).encode())
        found.add(Entry(row, key, file=name and picture(name), error=None if name else "it is broken"))
    return found


def test_a_picture_goes_with_the_entry_that_nothing_holds_any_more(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that have other names now, or cannot be drawn any more; not while others are drawn, and not where a name is taken."""
    monkeypatch.setattr(module, "ROWS", 2)
    drawn(place, {0: "a", 1: "b", 2: "c", 3: "d", 4: "e", 1000: "f"}, 1).flush()
    second = drawn(place, {0: "b", 1: "a", 2: "x", 3: None}, 2)
    assert place.names("pictures/000000") == [f"{name}.png" for name in "abcdefx"]
    second.flush()
    assert place.names("pictures/000000") == [f"{name}.png" for name in "abefx"]
    assert place.read(picture("a")) == b"1"
    files = {entry["row"]: entry["file"] for entry in Manifest(place).entries()}
    named = {0: "b", 1: "a", 2: "x", 4: "e", 1000: "f"}
    assert files == {3: None, **{row: picture(name) for row, name in named.items()}}


def test_a_picture_goes_at_the_next_start_after_a_kill(place: Place) -> None:
    drawn(place, {0: "a", 1: "b"}, 1).flush()
    drawn(place, {0: "x"}, 2)._write()
    assert place.names("pictures/000000") == ["a.png", "b.png", "x.png"]
    found = Manifest(place)
    assert place.names("pictures/000000") == ["b.png", "x.png"]
    assert [(entry["row"], entry["key"]) for entry in found.entries()] == [(1, 1), (0, 2)]


@pytest.mark.parametrize("name", ["run.json", "pictures/../run.json", "../run.json", "pictures", "pictures/a/b/c.png"])
def test_only_pictures_go(tmp_path: Path, name: str) -> None:
    """Whatever a manifest says, which may come from anybody."""
    root = tmp_path / "out"
    for path in (tmp_path / "run.json", root / "run.json", root / "pictures" / "a" / "b" / "c.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    for key in (1, 2):
        found = Manifest(Folder(root))
        found.add(Entry(0, key, file=name if key == 1 else None))
        found.flush()
    assert before <= {*tmp_path.rglob("*")}


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "part-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="manifest/part-000000.parquet is damaged .*delete it"):
        Manifest(Folder(tmp_path))


def test_it_is_plain_parquet(tmp_path: Path) -> None:
    found = Manifest(Folder(tmp_path))
    found.add(Entry(0, 1, prompt="a cat", file="a.png"))
    found.flush()
    assert parquet.read_table(tmp_path / FOLDER)["prompt"].to_pylist() == ["a cat"]


def test_addresses_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="nowhere://x cannot be opened .*give a folder"):
        open_place("nowhere://x")
