"""PyTorch's own files: where the numbers are, in a zip or behind each other, and what is no place for them."""

import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sana.checkpoints.archives import DAMAGE, read_archive
from sana.checkpoints.pickles import RefusedPickle
from tests.sana.measures import mapped_bytes

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool, torch.complex64),
)


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of PyTorch zipped anew, with other parts; None: left out."""
    target = path.with_name("changed.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = change(name.split("/", 1)[1], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_every_dtype_and_every_view(tmp_path: Path, zipped: bool) -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {str(dtype): (torch.arange(6) % 2).to(dtype) for dtype in DTYPES}
    tensors |= {"whole": whole, "turned": whole.permute(2, 0, 1), "cut": whole[1, :, 1:3], "one": whole[0, 0, 0]}
    tensors |= {"empty": torch.ones(0, 3), "scalar": torch.tensor(5), "row": torch.ones(1, 4).expand(2, 4)}
    torch.save(tensors, path := tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read_archive(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].to(torch.complex64), tensor.to(torch.complex64)), name
    assert found["whole"].untyped_storage().data_ptr() == found["cut"].untyped_storage().data_ptr()


def test_numbers_that_do_not_lie_as_a_processor_wants_them_are_copied(tmp_path: Path) -> None:
    tensors = {name: torch.randn(1000) for name in "abcd"}
    torch.save(tensors, path := tmp_path / "a.pth")
    assert mapped_bytes(read_archive(path).values(), path) == 16_000
    path = rewritten(path, lambda name, content: content)  # Python's zip aligns nothing
    found = read_archive(path)
    assert all(torch.equal(found[name], tensors[name]) and found[name].data_ptr() % 4 == 0 for name in tensors)
    assert mapped_bytes(found.values(), path) < 16_000


def test_tied_weights_count_twice_and_no_more(tmp_path: Path) -> None:
    weight = torch.randn(10_000)
    torch.save({"a": weight, "b": weight}, path := tmp_path / "a.pth")
    assert {*read_archive(path)} == {"a", "b"}
    torch.save({"a": weight, "b": weight, "c": weight}, path)
    size = path.stat().st_size
    message = f"^has {size:,} bytes and unfolds to more than twice as many; take the original file$"
    with pytest.raises(RefusedPickle, match=message):
        read_archive(path)
    torch.save({"a": torch.ones(1).expand(1000, 1000)}, path)
    with pytest.raises(RefusedPickle, match="unfolds to more than twice as many"):
        read_archive(path)
    torch.save({"model": {"a": weight}, "ema": {"a": weight}, "best": {"a": weight}}, path)  # only one of which is read
    assert {*read_archive(path)} == {"a"}


def test_a_compressed_file_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2**20)}, path := tmp_path / "a.pth")
    with pytest.raises(
        RefusedPickle, match="^is compressed, which PyTorch's own files are not; take the original file$"
    ):
        read_archive(rewritten(path, lambda name, content: content, zipfile.ZIP_DEFLATED))


def test_a_pickle_as_large_as_no_model_has_it_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "note": "x" * 2**26}, path := tmp_path / "a.pth")
    with pytest.raises(RefusedPickle, match="has a pickle of more than 67,108,864 bytes beside its tensors"):
        read_archive(path)
    torch.save({"a": torch.ones(1), "note": "x" * (2**26 - 2**12)}, path)
    assert read_archive(path)["a"] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda name, content: None if name == "data/0" else content,
        lambda name, content: content[:-1] if name == "data/0" else content,
        lambda name, content: None if name == "data.pkl" else content,
        lambda name, content: b"big" if name == "byteorder" else content,
        lambda name, content: content.replace(b"K\x04", b"K\x05") if name == "data.pkl" else content,
        lambda name, content: content.replace(b"K\x04\x85", b"K\x05\x85") if name == "data.pkl" else content,
        lambda name, content: content.replace(b"K\x01\x85", b"K\x02\x85") if name == "data.pkl" else content,
        lambda name, content: content.replace(b"QK\x00", b"QK\x01") if name == "data.pkl" else content,
        lambda name, content: (
            content.replace(b"K\x04\x85", b"J\xff\xff\xff\xff\x85") if name == "data.pkl" else content
        ),
        lambda name, content: content.replace(b"FloatStorage", b"DeepStorage") if name == "data.pkl" else content,
    ],
)
def test_a_tensor_never_reaches_beyond_its_numbers(
    tmp_path: Path, change: Callable[[str, bytes], bytes | None]
) -> None:
    torch.save({"a": torch.ones(4)}, path := tmp_path / "a.pth")
    assert sys.byteorder == "little" and torch.equal(
        read_archive(rewritten(path, lambda name, content: content))["a"], torch.ones(4)
    )
    with pytest.raises((*DAMAGE, RefusedPickle)):
        read_archive(rewritten(path, change))


def test_a_storage_of_another_size_in_the_old_format_is_damage(tmp_path: Path) -> None:
    torch.save(
        OrderedDict(a=torch.ones(4), b=torch.ones(5)), path := tmp_path / "a.pth", _use_new_zipfile_serialization=False
    )
    whole = path.read_bytes()
    for count in (4, 5):
        at = whole.index(struct.pack("<q", count) + struct.pack("<f", 1))
        path.write_bytes(whole[:at] + struct.pack("<q", count + 1) + whole[at + 8 :])
        with pytest.raises(ValueError, match="a storage of another size"):
            read_archive(path)


def test_a_file_of_another_program_is_damage(tmp_path: Path) -> None:
    with zipfile.ZipFile(path := tmp_path / "a.zip", "w") as archive:
        archive.writestr("text.txt", "text")
    with pytest.raises(LookupError):
        read_archive(path)
    path.write_bytes(b"\x80\x02K\x01.")
    with pytest.raises(DAMAGE):
        read_archive(path)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_as_pytorch_reads_it(tmp_path: Path) -> None:
    """A network with buffers, saved and read again by both."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(2, 5)).half()
    for protocol in (2, 3, 4):
        torch.save(network.state_dict(), path := tmp_path / f"{protocol}.pth", pickle_protocol=protocol)
        assert same(read_archive(path), torch.load(path, weights_only=protocol == 2))
