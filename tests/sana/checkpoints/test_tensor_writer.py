"""Files that are written tensor by tensor, as the library of safetensors reads them."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sana.checkpoints.tensor_writer import DTYPES, TensorWriter

TENSORS = {
    "double": torch.tensor(2.0, dtype=torch.float64),
    "wide": torch.randn(3, 5),
    "bfloat16": torch.randn(7, 1, 1, 1).bfloat16(),
    "half": torch.randn(4).half(),
    "e4m3": torch.randn(3, 3).to(torch.float8_e4m3fn),
    "e5m2": torch.randn(1, 9).to(torch.float8_e5m2),
    "int8": torch.arange(-3, 4, dtype=torch.int8),
    'a "name" of 文字': torch.arange(200, dtype=torch.uint8),
    "none": torch.empty(0, 3),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, order = tmp_path / "a.safetensors", ["none", *(name for name in TENSORS if name != "none")]
    with TensorWriter(path, [*TENSORS, "another name"], {"format": "pt", "told": '{"a": "ü"}'}) as out:
        for name in order:
            out.write(name, TENSORS[name].t() if name == "e4m3" else TENSORS[name])
        size = out.position
    assert {tensor.dtype for tensor in TENSORS.values()} == DTYPES.keys()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "told": '{"a": "ü"}'}
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        expected = tensor.t() if name == "e4m3" else tensor
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert torch.equal(found[name].float(), expected.float())
    start = path.stat().st_size - size
    assert size == sum(tensor.nbytes for tensor in TENSORS.values()) and start % 8 == 0


def test_numbers_lie_at_multiples_of_their_size(tmp_path: Path) -> None:
    """Where readers can take them from the mapped file."""
    with TensorWriter(tmp_path / "a.safetensors", ["bytes", "wide"], {}) as out:
        out.write("bytes", torch.zeros(6, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"^wide would begin at byte 6, which is no multiple of 4$"):
            out.write("wide", torch.zeros(1))
        out.write("wide", torch.zeros(1, dtype=torch.float16))


def test_more_names_than_were_told_are_noticed(tmp_path: Path) -> None:
    """Their part of the header would overwrite tensors."""
    with (
        pytest.raises(AssertionError, match="more names than were told"),
        TensorWriter(tmp_path / "a.safetensors", ["a"], {}) as out,
    ):
        for index in range(100):
            out.write(f"another {index}", torch.zeros(1))


def test_the_longest_entry_has_its_place(tmp_path: Path) -> None:
    """Of a tensor of four axes, each with the numbers of a vocabulary, near the end of a file of terabytes."""
    path = tmp_path / "a.safetensors"
    with TensorWriter(path, ["a"], {}) as out:
        out.write("a", torch.empty(256000, 0, 256000, 256000, dtype=torch.float8_e4m3fn))
        out._header["a"]["data_offsets"] = [9 * 10**12, 9 * 10**12]
    assert path.read_bytes()[8:].rstrip().endswith(b"}}")
