"""Pickles as plain objects: what torch.save writes is read, whatever stands beside it, and nothing that is named is called."""

import builtins
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from sana.checkpoints.archives import WRAPPERS
from sana.checkpoints.pickles import MOST_STEPS, UNREAD, RefusedPickle, StoredTensor, read_pickle, tensors_in


def written(value: object, protocol: int = 2) -> bytes:
    """The pickle in a file of torch.save."""
    torch.save(value, content := io.BytesIO(), pickle_protocol=protocol)
    with zipfile.ZipFile(content) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def read(data: bytes) -> object:
    return read_pickle(io.BytesIO(data)).value


# What is read


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -1, 255, 65_535, 2**31, -(2**40), 2**100, 0.5, -1e300, "", "text", "ä\n" * 200),
        *((), (1,), (1, 2), (1, 2, 3), tuple(range(9)), [], [1], [[1], [2, [3]]], {}, {"a": 1}, {1: {"b": (2,)}}),
    ],
    ids=repr,
)
def test_plain_objects(value: object, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


def test_several_pickles_follow_each_other() -> None:
    data = io.BytesIO(pickle.dumps({"a": 1}) + pickle.dumps([2]) + b"rest")
    assert [read_pickle(data).value, read_pickle(data).value] == [{"a": 1}, [2]]
    assert data.read() == b"rest"


def test_shared_and_circular_objects_stay_one() -> None:
    inside = [1]
    inside.append(inside)
    found = read(pickle.dumps({"a": inside, "b": inside}))
    assert found["a"] is found["b"] and found["a"][1] is found["a"]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_where_the_numbers_of_a_tensor_are(protocol: int) -> None:
    half = torch.arange(12).half().reshape(3, 4)
    value = OrderedDict(plain=half, part=half[1:, 2], other=torch.nn.Parameter(torch.ones(5)))
    value._metadata = {"": {"version": 1}}
    value["other"].note = "an attribute"
    found = read_pickle(io.BytesIO(written(value, protocol)))
    plain, part, other = found.value.values()
    assert (plain.dtype, plain.offset, plain.shape, plain.strides) == (torch.float16, 0, (3, 4), (4, 1))
    assert (part.storage, part.offset, part.shape, part.strides) == (plain.storage, 6, (2,), (4,))
    assert (other.dtype, other.shape, other.storage.count) == (torch.float32, (5,), 5)
    assert found.storages == {storage.key: storage for storage in (plain.storage, other.storage)}


@pytest.mark.filterwarnings("ignore:torch.quantize")  # which PyTorch means to drop
def test_what_stands_beside_tensors_is_passed_over() -> None:
    value = {
        "state": {1, 2},
        "counter": Counter("aab"),
        "bytes": b"\0\xff",
        "array": np.arange(3),
        "number": np.float64(0.5),
        "size": torch.Size([1]),
        "device": torch.device("cpu"),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "sparse": torch.eye(2).to_sparse(),
        "empty": torch.ones(2, device="meta"),
        (1, 2): "a key that is no text",
        "kept": [torch.float16, 1],
    }
    found = read(written(value))
    assert [key for key, part in found.items() if part is UNREAD] == [*value][:10]
    assert [*found] == [*[*value][:10], "kept"] and found["kept"][1] == 1


# What is not


class Payload:
    """Unpickling it would leave a trace."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.arguments


CODE = (
    "^needs code to be read and is refused, because opening it could run anything; use a file that holds tensors only"
)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (os.system, ("touch '{}'",)),
        (os.mkdir, ("{}",)),
        (open, ("{}", "w")),
        (builtins.eval, ("open(r'{}', 'w')",)),
        (builtins.exec, ("open(r'{}', 'w')",)),
        (builtins.getattr, (os, "system")),
        (subprocess.check_output, (["touch", "{}"],)),
        (np.save, ("{}", 1)),
        (torch.save, (1, "{}")),
        (torch.load, ("{}",)),
        (defaultdict, ()),
        (Path, ("{}",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_function_that_is_named_runs(
    tmp_path: Path, call: object, arguments: tuple[object, ...], protocol: int
) -> None:
    trace = tmp_path / "trace"
    filled = [part.format(trace) if isinstance(part, str) else part for part in arguments]
    with pytest.raises(RefusedPickle, match=CODE):
        read(pickle.dumps({"a": Payload(call, *filled)}, protocol) if call is not builtins.getattr else GETATTR)
    assert not trace.exists()


GETATTR = b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nX\x04\0\0\0name\x86R."


@pytest.mark.parametrize(
    "data",
    [
        b"cposix\nsystem\n(S'true'\ntR.",
        b"(S'true'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'true'\no.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02]K\x01\x85R.",
        b"\x80\x02X\x01\0\0\0aK\x01\x85R.",
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nK\x01)}tR.",
    ],
)
def test_no_other_way_to_code_is_open(data: bytes) -> None:
    with pytest.raises(RefusedPickle, match=CODE):
        read(data)


def test_nothing_of_ours_can_be_changed_from_a_pickle() -> None:
    """State that is set on what a name stands for is thrown away."""
    before = dict(vars(OrderedDict))
    assert read(b"\x80\x02ccollections\nOrderedDict\n}X\x04\0\0\0evilK\x01sb0}.") == {}
    found = read(b"\x80\x02ccollections\nOrderedDict\n)R}X\x04\0\0\0evilK\x01sb.")
    assert found == {} and type(found) is dict and dict(vars(OrderedDict)) == before


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b".", b"\x80\x02", b"]", b"\x80\x02(.", b"t.", b"0.", b"h\x05.", b"\xff.", b"s.", b"\x80\x02R.", b"2."),
        *(b"\x80\x02K\x01\x93.", b"\x80\x02K\x01K\x02\x93.", b"\x80\x02K\x01Q.", b"\x80\x02)Q.", b"I1e5\n."),
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02X\xff\xff\xff\x7fa.",
        b"\x8e" + b"\xff" * 8 + b"a.",
        b"L" + b"9" * 10_000 + b"L\n.",
    ],
)
def test_nonsense_is_told_from_code(data: bytes) -> None:
    with pytest.raises((ValueError, LookupError, TypeError)) as caught:
        read(data)
    assert not isinstance(caught.value, RefusedPickle)


# Bounds


def test_a_pickle_of_too_many_steps_is_refused() -> None:
    assert read(b"]" + b"N0" * (MOST_STEPS // 2 - 1) + b".") == []  # to the very last step
    message = "^holds a pickle of more than 1,000,000 steps, and no model needs so many; give its tensors alone$"
    with pytest.raises(RefusedPickle, match=message):
        read(b"]" + b"N0" * (MOST_STEPS // 2) + b".")


def test_the_training_state_of_the_largest_release_is_far_below() -> None:
    """60 blocks of 26 tensors, twice for an average, with two tensors and a count of steps for each in the optimizer."""
    one = torch.zeros(1)
    weights = {f"transformer_blocks.{i % 60}.part_{i}.weight": torch.zeros(1) for i in range(1600)}
    states = {i: {"step": one.clone(), "exp_avg": one.clone(), "exp_avg_sq": one.clone()} for i in range(1600)}
    data = written({"model": weights, "ema": {**weights}, "optimizer": {"state": states}})
    assert len(tensors_in(read(data), WRAPPERS)) == 1600
    with pytest.raises(RefusedPickle):
        read_pickle(io.BytesIO(data), 100_000)
    read_pickle(io.BytesIO(data), MOST_STEPS // 3)


def doubled(call: bytes, levels: int) -> bytes:
    """A tuple of two times itself, so many times, handed to a function."""
    return b"\x80\x02" + call + b")" + b"".join(b"q\x01h\x01\x86" for _ in range(levels)) + b"\x85R."


SMALL_BOMBS = {
    "bytearray": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R.",
    "set": doubled(b"cbuiltins\nset\n", 60),
    "size": doubled(b"ctorch\nSize\n", 60),
    "tensor": b"\x80\x02ctorch\nFloatTensor\n\x8a\x05" + (2**33).to_bytes(5, "little") + b"\x85R.",
    "key": b"\x80\x02})" + b"q\x01h\x01\x86" * 60 + b"K\x01s.",
    "name": b"\x80\x02)" + b"q\x01h\x01\x86" * 60 + b"h\x01\x93.",
    "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "sets": b"\x80\x02" + b"\x8f" * 400_000 + b".",
    "dictionaries": b"\x80\x02" + b"}q\x01" * 300_000 + b".",
}
MEASURE = """
import io, json, resource, sys, time
from sana.checkpoints.pickles import read_pickle
bombs = {name: bytes.fromhex(data) for name, data in json.load(sys.stdin).items()}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, data in bombs.items():
    before, spent = peak(), int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + 20, resource.RLIM_INFINITY))
    try:
        read_pickle(io.BytesIO(data))
    except ValueError:
        pass
    print(name, peak() - before, flush=True)
"""


def test_no_small_pickle_unfolds() -> None:
    """Each within 200 MB more than those before it, and within 20 seconds of a processor."""
    bombs = json.dumps({name: data.hex() for name, data in SMALL_BOMBS.items()})
    run = subprocess.run([sys.executable, "-c", MEASURE], input=bombs, capture_output=True, text=True, check=False)
    peaks = dict(line.split() for line in run.stdout.splitlines())
    assert [*peaks] == [*SMALL_BOMBS], run.stderr[-500:]
    assert max(map(int, peaks.values())) < 200_000, peaks


# Which tensors


def test_wrappers_are_searched_in_their_order_and_the_deepest_first() -> None:
    def tensor() -> StoredTensor:
        return read(written(torch.ones(1)))

    a, b, c = tensor(), tensor(), tensor()
    assert tensors_in({"ema": {"x": a}, "model": {"x": b}, "y": c}, WRAPPERS) == {"x": b}
    assert tensors_in({"model": {"epoch": 1}, "ema": {"state_dict": {"x": a}, "x": b}, "y": c}, WRAPPERS) == {"x": a}
    assert tensors_in({"model": {"epoch": 1}, "y": c, "z": 3, 0: a}, WRAPPERS) == {"y": c}
    for nothing in ({0: a}, {}, [a], a, None, {"model": [a]}):
        assert tensors_in(nothing, WRAPPERS) == {}


def test_dictionaries_that_hold_each_other_end() -> None:
    level: dict[str, object] = {}
    for _ in range(200):  # each level holds the one below under every wrapper
        level = dict.fromkeys(WRAPPERS, level)
    assert tensors_in(level, WRAPPERS) == {}
    level["model"] = level
    assert tensors_in(level, WRAPPERS) == {}
    chain: dict[str, object] = {"x": read(written(torch.ones(1)))}
    for _ in range(100_000):
        chain = {"model": chain}
    assert [*tensors_in(chain, WRAPPERS)] == ["x"]
