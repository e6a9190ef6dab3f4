"""Tensors on the disk: whole or not at all, and never taken for others."""

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from sana.training import shards as module
from sana.training.shards import Shards, write_shards
from tests.sana.mishaps import kill_while, no_file_above
from tests.training.stored import number

TENSORS = [
    torch.randn(32, 2, 3).half(),
    torch.randn(7, 5).bfloat16(),
    torch.rand(1, 2, 3),
    torch.tensor(range(6)).float().view(2, 3).T,  # not in row-major order
]


def rows(tensors: list[Tensor] = TENSORS) -> Iterator[tuple[bytes, Tensor]]:
    return ((number(i), tensor) for i, tensor in enumerate(tensors))


@pytest.mark.parametrize("most", [1, 3, 100])
def test_tensors_come_back_from_any_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", most)
    monkeypatch.setattr(module, "OPEN", 2)
    write_shards(tmp_path, rows())
    assert len([*tmp_path.iterdir()]) == -(-len(TENSORS) // most)
    found = Shards(tmp_path)
    assert len(found) == len(TENSORS)
    places = found.find([number(3), number(77), number(0), number(1), number(2)])
    assert places[1] == -1 and sorted(places[[0, 2, 3, 4]]) == [0, 1, 2, 3]
    for i, place in ((3, 0), (0, 2), (1, 3), (2, 4), (3, 0)):
        tensor = found.read(places[place], (None,) * TENSORS[i].ndim)
        assert tensor.dtype == TENSORS[i].dtype and torch.equal(tensor, TENSORS[i])
    assert len(found._open) <= 2


def test_a_shard_ends_at_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 2000)
    write_shards(tmp_path, rows([torch.zeros(250)] * 7))  # of 1,000 bytes
    assert sorted(pq.ParquetFile(path).metadata.num_rows for path in tmp_path.iterdir()) == [1, 2, 2, 2]


def test_nothing_makes_no_file(tmp_path: Path) -> None:
    write_shards(tmp_path, [])
    assert not [*tmp_path.iterdir()] and len(Shards(tmp_path)) == 0
    assert Shards(tmp_path).find([number(0)]).tolist() == [-1]


def test_what_came_before_an_error_is_kept(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[bytes, Tensor]]:
        yield from rows()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, broken())
    assert len(Shards(tmp_path)) == len(TENSORS)


def test_a_full_disk_leaves_whole_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second shard, which does not fit, leaves nothing."""
    monkeypatch.setattr(module, "SHARD_ROWS", 2)
    with pytest.raises(OSError) as raised, no_file_above(200_000):
        write_shards(tmp_path, rows([torch.zeros(100), torch.zeros(100), torch.zeros(100), torch.zeros(100_000)]))
    assert "cannot be written (" in str(raised.value) and "; make room, or give a place" in str(raised.value)
    (path,) = tmp_path.iterdir()
    assert Shards(tmp_path).find([number(i) for i in range(4)]).tolist() == [0, 1, -1, -1]


def test_a_kill_leaves_no_shard_that_could_be_read(tmp_path: Path) -> None:
    def work() -> None:
        source = ((number(i), torch.zeros(10)) for i in count())
        KEPT.append(source)
        writer = module._new_shard(tmp_path)
        KEPT.append(writer)
        writer.__enter__().write_batch(module._batch(*next(source)))

    kill_while(work)
    assert len(Shards(tmp_path)) == 0 and not [*tmp_path.glob("*.parquet")]


KEPT: list[object] = []


def flipped(path: Path) -> None:
    """One bit, in the middle of the numbers."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_program(path: Path) -> None:
    pq.write_table(pa.table({"key": [b"x" * 16], "caption": ["a"]}), path)


def in_one_group(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table, path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_text("a text"),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.mkdir()),
        of_another_program,
        in_one_group,
    ],
    ids=["empty", "cut", "text", "pipe", "folder", "program", "group"],
)
def test_a_file_that_is_no_shard_is_named(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    write_shards(tmp_path, rows())
    (path,) = tmp_path.iterdir()
    spoil(path)
    with pytest.raises(ValueError) as raised:
        Shards(tmp_path)
    assert str(raised.value) == (
        f"{path} is damaged or of another program; delete it, and the same command computes it again"
    )


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        (None, (200_000,)),
        (("float16", [3], bytes(7)), (3,)),
        (("float16", [-1], b""), (None,)),
        (("int8", [1], b"a"), (1,)),
    ]
    + [(("float32", [2, 3], bytes(24)), shape) for shape in ((2, 4), (6,), (None, None, None))],
    ids=["bit", "bytes", "sides", "dtype", "size", "axes", "more axes"],
)
def test_a_row_that_is_damaged_is_not_used(tmp_path: Path, row: tuple | None, shape: tuple[int | None, ...]) -> None:
    if row is None:
        write_shards(tmp_path, [(number(0), torch.zeros(200_000))])
        flipped(next(tmp_path.iterdir()))
    else:
        with module._new_shard(tmp_path) as writer:
            columns = [[number(0)], *([each] for each in row)]
            writer.write_batch(pa.record_batch(columns, schema=module.SCHEMA))
    with pytest.raises(ValueError, match="is damaged or of another program; delete it"):
        Shards(tmp_path).read(0, shape)
    if row is not None and row[1] == [2, 3]:
        assert torch.equal(Shards(tmp_path).read(0, (None, 3)), torch.zeros(2, 3))
