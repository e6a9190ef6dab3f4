"""Files that are written whole or not at all: what stays after an error, a kill and on a full disk, and what is removed."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana import saving
from sana.saving import lock, remove_leftovers, replacing, write_json
from tests.sana.mishaps import kill_while, killed_later, no_file_above, write_half

HOUR = 60 * 60
TENSORS = {"weight": torch.arange(50_000.0)}


def hidden(folder: Path) -> list[Path]:
    """What is left of files that were being written."""
    return sorted(folder.rglob(".*"))


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "model.part"
    path.write_text("before")
    other.write_text("of somebody else")
    with pytest.raises(KeyboardInterrupt), replacing(path) as unfinished:
        unfinished.write_text("half")
        assert path.read_text() == "before"
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    with replacing(path) as unfinished:
        save_file(TENSORS, unfinished)
    assert torch.equal(load_file(path)["weight"], TENSORS["weight"])
    assert path.stat().st_mode == other.stat().st_mode  # others may read it as any file
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_what_is_being_written_is_no_picture_and_no_model(tmp_path: Path) -> None:
    """Programs look for these in all folders."""
    with replacing(tmp_path / "model.safetensors") as unfinished:
        save_file(TENSORS, unfinished)
        assert {path.suffix for path in tmp_path.rglob("*")} == {"", ".part"}


def write_tensors(path: Path) -> None:
    with replacing(path) as unfinished:
        save_file(TENSORS, unfinished)


def write_text(path: Path) -> None:
    write_json(path, {"text": "x" * 200_000})


@pytest.mark.parametrize("write", [write_tensors, write_text])
def test_a_disk_without_room_keeps_what_was_there(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with no_file_above(100_000), pytest.raises(OSError) as raised:
        write(path)
    told = str(raised.value)
    assert told.startswith(f"{path} cannot be written (") and "File too large" in told
    assert told.endswith("; make room, or give a place that is yours to write")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "model.safetensors"
    with pytest.raises(OSError) as raised, replacing(path):
        raise AssertionError("there is nothing to write to")
    assert str(raised.value).startswith(f"{path} cannot be written (No such file or directory); ")


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    (below := tmp_path / "below").mkdir()
    for folder in (tmp_path, below):
        kill_while(lambda folder=folder: write_half(folder / "model.safetensors"))
    assert [(folder / "unfinished").read_bytes() for folder in hidden(tmp_path)] == [b"half", b"half"]
    remove_leftovers(tmp_path)
    assert [path.parent for path in hidden(tmp_path)] == [below]
    remove_leftovers(tmp_path, everywhere=True)
    assert list(tmp_path.rglob("*")) == [below]


def test_what_another_process_is_writing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with killed_later(lambda: write_half(path)):
        made_older(*hidden(tmp_path), hours=1000)
        remove_leftovers(tmp_path)
        (writing,) = hidden(tmp_path)
        assert (writing / "unfinished").read_bytes() == b"half"
    remove_leftovers(tmp_path)
    assert not hidden(tmp_path)
    with replacing(path) as unfinished:  # nor does a process trip over itself
        unfinished.write_bytes(b"whole")
        remove_leftovers(tmp_path)
    assert path.read_bytes() == b"whole"


@pytest.mark.parametrize(("hours", "left"), [(0, 1), (23, 1), (25, 0)])
def test_what_another_machine_was_writing_is_removed_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int, left: int
) -> None:
    """Its locks may not be seen here."""
    monkeypatch.setattr(saving, "MACHINE", "another")
    kill_while(lambda: write_half(tmp_path / "model.safetensors"))
    monkeypatch.undo()
    made_older(*hidden(tmp_path), hours=hours)
    remove_leftovers(tmp_path)
    assert len(hidden(tmp_path)) == left


def test_a_folder_that_was_made_and_not_held_is_removed_and_its_process_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a moment in between, in which a process may be killed, or another may look."""

    def make(**options: object) -> str:
        folder = mkdtemp(**options)
        if not removed:
            removed.append(folder)
            remove_leftovers(tmp_path)
            assert not Path(folder).exists()
        return folder

    removed = []
    monkeypatch.setattr(saving, "mkdtemp", make)
    write_tensors(tmp_path / "model.safetensors")
    assert removed and [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def made_older(*folders: Path, hours: int) -> None:
    then = time.time() - hours * HOUR
    for folder in folders:
        os.utime(folder, times=(then, then))


def test_files_of_others_are_left(tmp_path: Path) -> None:
    """Browsers give this suffix to what they download."""
    (tmp_path / "model.safetensors.part").write_text("a download")
    (tmp_path / "folder.part").mkdir()
    (tmp_path / ".tmpAbC123").write_text("of another program")
    made_older(*tmp_path.iterdir(), hours=1000)
    before = sorted(tmp_path.rglob("*"))
    remove_leftovers(tmp_path, everywhere=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_locks_is_written_to_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(saving.fcntl, "flock", refuse)
    write_tensors(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    kill_while(lambda: write_half(tmp_path / "model.safetensors"))
    remove_leftovers(tmp_path)
    assert len(hidden(tmp_path)) == 1


def test_a_lock_is_held_once_until_its_file_is_closed_or_its_process_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("wb") as first, path.open("wb") as second:
        assert lock(first) and not lock(second)
        first.close()
        assert lock(second)

    def hold() -> None:
        held.append(path.open("wb"))
        assert lock(held[-1])

    held = []
    with killed_later(hold), path.open("wb") as file:
        assert not lock(file)
    with path.open("wb") as file:
        assert lock(file)
