"""Files of prompts, row by row."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from sana.cluster.command import distinct, expanded
from sana.cluster.rows import MOST_ROW_BYTES, Row, read_rows

ROWS = [
    Row(0, "a red circle", "one", "style.safetensors=0.5", {"seed": 2**53 + 1, "height": 64, "guidance_scale": 4.5}),
    Row(1, 'a "blue", square', None, None, {"negative": "green\nred"}),
]
VALUES = [
    {**{"prompt": "a red circle", "name": "one", "lora": "style.safetensors=0.5"}, "seed": 2**53 + 1, "height": 64.0},
    {"prompt": 'a "blue", square', "negative": "green\nred"},
]
VALUES[0]["guidance_scale"] = 4.5
CSV = (
    "prompt,name,lora,seed,height,guidance_scale,negative\r\n"
    "a red circle,one,style.safetensors=0.5,9007199254740993,64,4.5,\r\n"
    '"a ""blue"", square",,,,,,"green\nred"\r\n'
)


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"prompts{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist([{**VALUES[0], "negative": None}, VALUES[1]]), path)
    elif suffix == ".csv":
        path.write_bytes(b"\xef\xbb\xbf" + CSV.encode())
    elif suffix == ".tsv":
        path.write_text(CSV.replace(",", "\t").replace('"blue""\t', '"blue"",'), newline="")
    else:
        path.write_text("\n\n".join(map(json.dumps, VALUES)))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
def test_rows_are_the_same_in_every_form(tmp_path: Path, suffix: str) -> None:
    assert list(read_rows(write(tmp_path, suffix))) == ROWS


def test_lines_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff a cat \r\n\n a\u2028dog".encode())
    assert list(read_rows(path)) == [Row(0, "a cat"), Row(1, "a\u2028dog")]


def test_a_column_that_nobody_knows_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,negativ\na,b\nc,d\n")
    told: list[str] = []
    assert list(read_rows(path, told.append)) == [Row(0, "a"), Row(1, "c")] and told == ["negativ"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "it has no prompt"),
        ({"prompt": ""}, "it has no prompt"),
        ({"prompt": 3}, "its prompt is 3; it must be a text"),
        ({"prompt": "a", "seed": "x"}, "its seed is 'x'; it must be a whole number"),
        ({"prompt": "a", "seed": 1.5}, "its seed is 1.5; it must be a whole number"),
        ({"prompt": "a", "steps": True}, "its steps is True; it must be a whole number"),
        ({"prompt": "a", "guidance_scale": "nan"}, "its guidance_scale is 'nan'; it must be a number"),
        ({"prompt": "a", "height": 1e400}, "its height is inf; it must be a whole number"),
        ({"prompt": "a", "name": "a/b"}, "its name is 'a/b', which cannot be that of a file"),
        ({"prompt": "a", "name": "../a"}, "its name is '../a', which cannot"),
        ({"prompt": "a", "name": "x" * 201}, "which cannot be that of a file"),
        ({"prompt": "\ud800"}, "its prompt is '\\ud800', which is no text in UTF-8; write it anew"),
        ({"prompt": "a", "negative": "\udc00"}, "its negative is '\\udc00', which is no text in UTF-8"),
    ],
)
def test_a_row_that_makes_no_sense_has_a_fault(tmp_path: Path, values: dict, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(values) + '\n{"prompt": "next"}')
    first, second = read_rows(path)
    assert message in first.fault and len(first.fault) < 200 and second == Row(1, "next")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_row_of_a_megabyte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    long, short = "x" * (MOST_ROW_BYTES + 1), "next"
    if suffix == ".jsonl":
        long, short = json.dumps({"prompt": long}), json.dumps({"prompt": short})
    path.write_text(("prompt\n" if suffix == ".csv" else "") + f"{long}\n{short}\n")
    first, second = read_rows(path)
    assert first.fault.endswith("more than 1,048,576 bytes; shorten it") and second == Row(1, "next")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".txt", b"a\ncaf\xe9\nb"),
        (".csv", b"prompt,seed\na,1\ncaf\xe9,1\nb,1\n"),
        (".jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n{"prompt": "b"}\n'),
    ],
)
def test_a_later_row_in_another_encoding(tmp_path: Path, suffix: str, content: bytes) -> None:
    (path := tmp_path / f"a{suffix}").write_bytes(content)
    first, second, third = read_rows(path)
    assert (first.prompt, third.prompt) == ("a", "b") and first.fault is third.fault is None
    assert second.fault == "its prompt is 'caf\\udce9', which is no text in UTF-8; write it anew"


def test_a_parquet_file_that_is_damaged_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path, ".parquet")
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="prompts.parquet is damaged .*; write it anew"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n\n", "a.txt holds no prompt"),
        ("a.txt", b"caf\xe9", "a.txt is not a text in UTF-8"),
        ("a.csv", b"text\na", "a.csv has no column prompt in its first line"),
        ("a.csv", b"", "a.csv has no column prompt"),
        ("a.csv", b"prompt,caf\xe9\na,b", "a.csv is not a text in UTF-8"),
        ("a.csv", b"prompt,seed,seed\na,1,2", "a.csv has the column seed twice; name each once"),
        ("a.parquet", b"PAR1", "a.parquet is no Parquet file"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".parquet"])
def test_a_file_that_is_none(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for reason in ("No such file or directory", "Is a directory"):
        with pytest.raises(ValueError) as raised:
            next(read_rows(path))
        assert str(raised.value) == f"{path} cannot be read ({reason}); give a file of prompts"
        path.mkdir(exist_ok=True)


def test_rows_of_csv_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,seed\na,1,2\nb\nc,3\n")
    first, second, third = read_rows(path)
    assert "it has not the 2 values" in first.fault and "it has not the 2 values" in second.fault
    assert third == Row(2, "c", settings={"seed": 3})


def test_a_key_is_of_what_a_row_asks_for() -> None:
    keys = {
        row.key()
        for row in (
            Row(0, "a"),
            Row(0, "b"),
            Row(0, "a", "b"),
            Row(0, "a", None, "b"),
            Row(0, "a", settings={"seed": 1}),
            Row(0, "a", settings={"steps": 1}),
        )
    }
    assert len(keys) == 6 and all(0 <= key < 2**63 for key in keys)
    one, other = {"seed": 1, "steps": 2}, {"steps": 2, "seed": 1}
    assert Row(0, "a", settings=one).key() == Row(5, "a", settings=other).key()


def test_several_pictures_of_a_row() -> None:
    rows = [Row(0, "a", "x"), Row(1, "b", settings={"seed": 7})]
    assert list(expanded(iter(rows), 2, 3)) == [
        Row(0, "a", "x-1", None, {"seed": 3}),
        Row(1, "a", "x-2", None, {"seed": 4}),
        Row(2, "b", None, None, {"seed": 7}),
        Row(3, "b", None, None, {"seed": 8}),
    ]
    assert next(expanded(iter(rows), 1, 3)) == Row(0, "a", "x", None, {"seed": 3})


def test_a_name_is_there_once_in_a_folder() -> None:
    rows = [Row(0, "a", "x"), Row(1, "b", "X"), Row(999, "c", "y"), Row(1000, "d", "x")]
    first, second, *others = distinct(iter(rows))
    assert first == rows[0] and others == rows[2:]
    assert second.fault == "its name X is that of row 0; give another"
    named, numbered = distinct(iter([Row(0, "a", "000000001"), Row(1, "a")]))
    assert named.fault is None and numbered.fault == "its name 000000001 is that of row 0; give another"
