"""What paths lead to, and JSON that is too large, too deep or none."""

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from sana.checkpoints.adapters import HEADER, read_settings
from sana.checkpoints.files import CheckpointError, read_json, read_tensors, tensor_names
from sana.checkpoints.header import read_header
from sana.images import read_picture, read_size
from sana.jobs import CHUNK, read_prompts, read_record
from sana.reading import MOST_JSON_BYTES, MOST_LEVELS, check_file, parse_json, read_bytes

DEEP = "[" * 100_000 + "]" * 100_000


def nested(levels: int) -> str:
    return "[" * (levels - 1) + '{"a": 1}' + "]" * (levels - 1)


@pytest.fixture(params=["pipe", "socket", "device"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes something of a name that would wait for ever, or never end."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as listening:

        def make(name: str) -> Path:
            path = Path(short) / name
            if request.param == "pipe":
                os.mkfifo(path)
            elif request.param == "socket":
                listening.bind(str(path))
            else:
                path.symlink_to("/dev/zero")
            return path

        yield make


def test_what_is_no_file_is_told_at_once(no_file: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="^it is a pipe, a socket or a device$"):
        check_file(no_file("a"))


def test_files_and_folders_pass(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "link").symlink_to("a")
    for path in (tmp_path, tmp_path / "a", tmp_path / "link"):
        check_file(path)
    assert read_bytes(tmp_path / "a", 3) == b"123" and read_bytes(tmp_path / "a", 1) == b"12"
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "none")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model"])
def test_no_model_waits(no_file: Callable[[str], Path], name: str) -> None:
    path = no_file(name)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    message = f"{name} cannot be opened (it is a pipe, a socket or a device); give a checkpoint file"
    assert str(caught.value) == message
    assert not tensor_names(path)
    if "." in name:
        with pytest.raises(CheckpointError) as caught:
            read_tensors(path.parent)
        assert str(caught.value) == message
        assert not tensor_names(path.parent)


def test_no_configuration_waits(no_file: Callable[[str], Path]) -> None:
    assert read_json(no_file("config.json")) == {}


def test_no_picture_and_no_prompts_wait(no_file: Callable[[str], Path]) -> None:
    path = no_file("a.png")
    for read in (read_picture, read_size):
        with pytest.raises(
            ValueError, match="a.png cannot be read as a picture .it is a pipe, a socket or a device.; give"
        ):
            read(path)
    with pytest.raises(ValueError, match="a.png cannot be read .it is a pipe, a socket or a device.; give a text file"):
        read_prompts(path)
    assert read_record(path) is None


def test_prompts_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        read_prompts(tmp_path / "a.txt")
    assert str(refused.value) == f"{tmp_path / 'a.txt'} does not exist; give a text file with one prompt on each line"


# JSON


@pytest.mark.parametrize("value", [{}, [], 1, "text", None, {"a": [1, {"b": 2.5}]}, "ä"])
def test_json_as_text_and_as_bytes(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text) == parse_json(text.encode()) == parse_json(b"\xef\xbb\xbf" + text.encode()) == value


@pytest.mark.parametrize("source", ["", "{", "nul", b"\xff", b"\xff\xfe{}", b"{\x00}", "1" * 5000, "{} {}"])
def test_what_is_no_json(source: bytes | str) -> None:
    with pytest.raises(ValueError, match=".+"):
        parse_json(source)


def test_json_is_as_deep_as_it_may_be() -> None:
    assert parse_json(nested(MOST_LEVELS - 1))
    for text in (
        nested(MOST_LEVELS),
        nested(900),
        DEEP,
        '{"a":' * 100_000,
        DEEP.replace("[", '{"a":').replace("]", "}"),
    ):
        with pytest.raises(ValueError, match="^it is nested more than 100 deep$|^Expecting"):
            parse_json(text)


def test_json_is_as_large_as_it_may_be(tmp_path: Path) -> None:
    text = json.dumps("x" * (MOST_JSON_BYTES - 2))
    assert len(parse_json(text)) == MOST_JSON_BYTES - 2
    for source in (text + " ", (text + " ").encode()):
        with pytest.raises(ValueError, match="^it has more than 4,194,304 bytes$"):
            parse_json(source)
    with (path := tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(
        CheckpointError, match="config.json is not valid JSON .it has more than 4,194,304 bytes.; download"
    ):
        read_json(path)


def test_deep_json_is_told_wherever_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.lora_A.weight": torch.ones(1)}, path, {"sana": DEEP, HEADER: DEEP})
    file = read_tensors(path)
    assert read_header(file) == read_settings(file.metadata, path) == {}
    (tmp_path / "adapter_config.json").write_text(DEEP)
    assert read_settings({}, path) == {}
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(
        CheckpointError, match="config.json is not valid JSON .it is nested more than 100 deep.; download"
    ):
        read_tensors(path)
    text = PngInfo()
    text.add_text(CHUNK, DEEP)
    Image.new("RGB", (1, 1)).save(picture := tmp_path / "a.png", pnginfo=text)
    assert read_record(picture) is None
