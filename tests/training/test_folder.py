"""Work folders: which training they are of, one training at a time, and files that were damaged."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sana import saving
from sana.training.folder import claim, read_computed
from sana.work_folder import LONGEST_NOTE
from tests.sana.mishaps import kill_while, killed_later, write_half

RUN = {"data": "pictures", "model": "demo"}
DEEP = 100_000
NOTES = {
    "empty": b"",
    "cut": b'{"data": "pict',
    "list": b'["data"]',
    "null": b"null",
    "number": b'{"data": 1, "model": "demo"}',
    "not UTF-8": b'{"data": "\xff"}',
    "deep list": b"[" * DEEP,
    "deep object": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "large": b'{"data": "%s"}' % (b"x" * LONGEST_NOTE),
}


def enter(folder: Path, run: dict[str, str] = RUN) -> None:
    with claim(folder, run):
        pass


@pytest.mark.parametrize("content", NOTES.values(), ids=NOTES)
def test_a_damaged_note_is_named_and_kept(tmp_path: Path, content: bytes) -> None:
    (note := tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        enter(tmp_path)
    assert str(raised.value) == (
        f"{note} does not tell what {tmp_path} is for; if it is for this training, move that file away and give the "
        "same command again, or else give another --out"
    )
    assert note.read_bytes() == content
    note.rename(tmp_path / "elsewhere.json")
    enter(tmp_path)
    enter(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_note_that_is_no_file_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "run.json")
    with pytest.raises(ValueError, match="run.json does not tell what"):
        enter(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "work" / "training.lock").mkdir(parents=True)
    for folder, reason in ((tmp_path / "file" / "work", "Not a directory"), (tmp_path / "work", "Is a directory")):
        with pytest.raises(ValueError) as raised:
            enter(folder)
        advice = "give another --out, a folder that is yours to write to"
        assert str(raised.value) == f"{folder} cannot be written to ({reason}); {advice}"


def test_a_folder_is_of_one_training(tmp_path: Path) -> None:
    enter(tmp_path / "work")
    with pytest.raises(ValueError) as raised:
        enter(tmp_path / "work", {**RUN, "model": "another"})
    assert str(raised.value) == (
        f"{tmp_path / 'work'} holds another training (data pictures, model demo); give another --out"
    )


def test_a_second_training_is_refused_until_the_first_ends_or_is_killed(tmp_path: Path) -> None:
    expected = f"another training is at work in {tmp_path}; wait until it ends, or give another --out"
    with claim(tmp_path, RUN), pytest.raises(ValueError) as raised:
        enter(tmp_path)
    assert str(raised.value) == expected
    held = []

    def hold() -> None:
        held.append(claim(tmp_path, RUN))
        held[0].__enter__()

    with killed_later(hold), pytest.raises(ValueError) as raised:
        enter(tmp_path)
    assert str(raised.value) == expected
    enter(tmp_path)


def test_a_refused_training_removes_nothing_of_the_first(tmp_path: Path) -> None:
    kill_while(lambda: write_half(tmp_path / "first.pt"))
    before = sorted(tmp_path.rglob("*"))
    with (tmp_path / "training.lock").open("wb") as file:
        assert saving.lock(file)
        with pytest.raises(ValueError):
            enter(tmp_path)
        assert sorted({*tmp_path.rglob("*")} - {tmp_path / "training.lock"}) == before


def test_what_killed_trainings_were_writing_is_removed_from_all_folders(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "states"):
        folder.mkdir(exist_ok=True)
        kill_while(lambda folder=folder: write_half(folder / "file"))
    enter(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run.json", "states", "training.lock"]


def test_on_a_disk_without_locks_training_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(saving.fcntl, "flock", refuse)
    enter(tmp_path)
    assert caplog.messages == [f"{tmp_path} is on a disk without locks; do not start a second training in it."]


GOOD = {"latent": torch.zeros(32, 2, 3), "text": torch.zeros(7, 5)}
SHAPES = {"latent": (32, 2, 3), "text": (None, 5)}


def test_what_was_computed_is_read(tmp_path: Path) -> None:
    save_file({**GOOD, "more": torch.zeros(1)}, path := tmp_path / "states.safetensors")
    found = read_computed(path, SHAPES)
    assert found.keys() == GOOD.keys() and all(torch.equal(found[name], GOOD[name]) for name in GOOD)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a text",
        -1,
        20,
        {"latent": GOOD["latent"]},
        {**GOOD, "latent": torch.zeros(32, 2, 4)},
        {**GOOD, "text": torch.zeros(7, 6)},
        {**GOOD, "text": torch.zeros(5)},
        os.mkfifo,
        os.mkdir,
        None,
    ],
    ids=["empty", "text", "cut", "header", "lacking", "size", "width", "axes", "pipe", "folder", "missing"],
)
def test_what_was_computed_and_is_damaged_is_named(tmp_path: Path, content: object) -> None:
    path = tmp_path / "states.safetensors"
    if isinstance(content, int):
        save_file(GOOD, path)
        path.write_bytes(path.read_bytes()[:content])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        save_file(content, path)
    elif content is not None:
        content(path)
    with pytest.raises(ValueError) as raised:
        read_computed(path, SHAPES)
    assert str(raised.value) == (
        f"{path} is damaged or of another program; delete it, and the same command computes it again"
    )
