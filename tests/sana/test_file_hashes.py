"""SHA-256 of files, and when they are read again."""

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest

from sana import file_hashes
from sana.file_hashes import file_hash


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the list is kept, of files of any size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "KEPT_FROM", 3)
    return tmp_path / "cache" / "sana" / "hashes.json"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read."""
    found: list[str] = []
    read = file_hashes.digest

    def noted(file: object) -> bytes:
        found.append(Path(file.name).name)
        return read(file)

    monkeypatch.setattr(file_hashes, "digest", noted)
    return found


def write(path: Path, content: bytes, seconds: int = 1) -> Path:
    path.write_bytes(content)
    os.utime(path, (seconds, seconds))
    return path


def digits(content: bytes) -> str:
    return sha256(content).hexdigest()


def test_a_file_is_read_once_until_its_size_or_its_time_changes(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    path = write(tmp_path / "a", b"abc" * 10**6)
    assert file_hash(path) == file_hash(path) == digits(b"abc" * 10**6)
    assert reads == ["a"]
    for content, seconds in ((b"abcd", 1), (b"abce", 2)):
        assert file_hash(write(path, content, seconds)) == digits(content)
    assert file_hash(path) == digits(b"abce") and reads == ["a", "a", "a"]
    other = write(tmp_path / "b", b"abce", 2)
    assert file_hash(other) == digits(b"abce") and reads[3:] == ["b"]
    assert [*json.loads(cache.read_text())] == [str(path), str(other)]


def test_small_files_are_not_kept(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    path = write(tmp_path / "a", b"ab")
    assert file_hash(path) == file_hash(path) == digits(b"ab")
    assert len(reads) == 2 and not cache.exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"PATH": 5}', '{"PATH": [4, 1000000000, 7]}', '{"PATH": [4]}'])
def test_a_damaged_list_is_as_none(tmp_path: Path, cache: Path, content: str) -> None:
    path = write(tmp_path / "a", b"abcd")
    cache.parent.mkdir(parents=True)
    cache.write_text(content.replace("PATH", str(path)))
    assert file_hash(path) == digits(b"abcd")
    assert json.loads(cache.read_text()) == {str(path): [4, 10**9, digits(b"abcd")]}


def test_what_cannot_be_kept_is_read_again(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    cache.parent.parent.write_text("a file in the place of the folder")
    path = write(tmp_path / "a", b"abcd")
    assert file_hash(path) == file_hash(path) == digits(b"abcd")
    assert len(reads) == 2


def test_the_list_has_an_end(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "MOST", 2)
    paths = [write(tmp_path / name, name.encode() * 4) for name in "abc"]
    for path in paths:
        file_hash(path)
    assert [*json.loads(cache.read_text())] == [str(path) for path in paths[1:]]


def test_the_folder_is_that_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for system, folder in (("linux", ".cache/sana"), ("darwin", "Library/Caches/sana")):
        monkeypatch.setattr("sys.platform", system)
        assert file_hashes.cache_folder() == tmp_path / folder
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert file_hashes.cache_folder() == tmp_path / "local" / "sana" / "Cache"
