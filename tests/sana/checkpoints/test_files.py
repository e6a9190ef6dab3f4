"""Tensors out of files: what is read, what is mapped and not read, and one sentence for everything that cannot be."""

import json
import os
import pickle
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sana.checkpoints.files import CheckpointError, TensorFile, read_json, read_tensors, tensor_names
from tests.sana.measures import mapped_bytes

Tensors = dict[str, Tensor]
PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
CODE = "needs code to be read and is refused, because opening it could run anything"


@pytest.fixture
def tensors() -> Tensors:
    return {"a.weight": torch.randn(64, 32), "b.bias": torch.arange(7).bfloat16(), "c": torch.tensor(3)}


def assert_holds(file: TensorFile, tensors: Tensors) -> None:
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.tensors[name].dtype == tensor.dtype and torch.equal(file.tensors[name], tensor)


def refusal(path: Path) -> str:
    """The message about a file: one sentence in one line."""
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What can be read


def test_safetensors_with_what_stands_in_its_header_and_beside_it(tmp_path: Path, tensors: Tensors) -> None:
    save_file(tensors, path := tmp_path / "model.safetensors", {"format": "pt", "note": "kept"})
    (tmp_path / "config.json").write_text('{"sample_size": 32}')
    for place in (path, tmp_path, str(path)):
        file = read_tensors(place)
        assert_holds(file, tensors)
        assert file.metadata == {"format": "pt", "note": "kept"}
        assert file.config == {"sample_size": 32}
    assert list(tensor_names(path)) == list(tensor_names(tmp_path)) == sorted(tensors)


def test_tensors_of_a_sound_file_may_come_in_another_way(tmp_path: Path, tensors: Tensors) -> None:
    """For each file of a model; one that is damaged is refused before."""
    others = {name: tensor + 1 for name, tensor in tensors.items()}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"variant": "x"})
    found = read_tensors(path, mapped=lambda given: others if given == path else None)
    assert found.tensors.keys() == others.keys() and found.metadata == {"variant": "x"}
    assert all(torch.equal(found.tensors[name], other) for name, other in others.items())
    assert all(
        torch.equal(read_tensors(tmp_path, mapped=lambda _: others).tensors[name], others[name]) for name in others
    )
    own = read_tensors(path, mapped=lambda _: None).tensors
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_tensors(path, mapped=lambda _: others)


@pytest.mark.parametrize(
    ("name", "counts"), [("SanaTransformer2DModel", True), ("AutoencoderDC", True), ("AutoencoderKL", False)]
)
def test_the_configuration_of_another_model_does_not_count(
    tmp_path: Path, tensors: Tensors, name: str, counts: bool
) -> None:
    save_file(tensors, path := tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name, "scaling_factor": 0.3611}))
    for place in (path, tmp_path):
        assert read_tensors(place).config.get("scaling_factor") == (0.3611 if counts else None)


@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_pytorch_files(tmp_path: Path, tensors: Tensors, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    (tmp_path / "config.json").write_text('{"sample_size": 32}')
    for place in (path, tmp_path):
        file = read_tensors(place)
        assert_holds(file, tensors)
        assert file.config == {"sample_size": 32}
    assert not tensor_names(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {"state_dict_ema": tensors},
        lambda tensors: {"model": tensors},
        lambda tensors: {"module": tensors},
        lambda tensors: {"ema": tensors},
        lambda tensors: {"model_state_dict": tensors},
        lambda tensors: {"params_ema": tensors},
        lambda tensors: {"state_dict": {"model": tensors}},
        lambda tensors: {"ema": {"state_dict": tensors}},
        lambda tensors: {"model": {"depth": 20}, "net": tensors},
        lambda tensors: {"state_dict": tensors, "state_dict_ema": {"a.weight": torch.zeros(1)}},
        lambda tensors: {"optimizer": {"state": {0: torch.ones(2)}}, "model": OrderedDict(tensors), "steps": 5},
        lambda tensors: {**tensors, "epoch": 3, "note": "text", "shape": [1, 2]},
        lambda tensors: {
            name: nn.Parameter(tensor) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
        },
    ],
)
def test_what_training_code_wraps_around_tensors_is_taken_off(
    tmp_path: Path, tensors: Tensors, wrap: Callable[[Tensors], object]
) -> None:
    torch.save(wrap(tensors), path := tmp_path / "model.pth")
    assert_holds(read_tensors(path), tensors)


@pytest.mark.parametrize("core", ["core", "_core"], ids=["NumPy 1", "NumPy 2"])
def test_numbers_of_numpy_beside_tensors_are_passed_over(tmp_path: Path, tensors: Tensors, core: str) -> None:
    """As NVlabs' training code writes them: diffusion/utils/checkpoint.py, save_checkpoint_ddp."""
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    content = {"state_dict": tensors, "rng_state": state, "loss": np.float64(0.3), "step": np.int64(5)}
    torch.save(content, path := tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    assert b"numpy._core.multiarray" in written
    path.write_bytes(written.replace(b"numpy._core.", f"numpy.{core}.".encode()))
    assert_holds(read_tensors(path), tensors)


@pytest.mark.parametrize(
    "pattern", ["model-0000{}-of-00003", "model.fp16-0000{}-of-00003", "model-0000{}-of-00003.fp16"]
)
def test_shards_are_one_model(tmp_path: Path, tensors: Tensors, pattern: str) -> None:
    for i, (name, tensor) in enumerate(tensors.items(), 1):
        save_file({name: tensor}, tmp_path / f"{pattern.format(i)}.safetensors", {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert_holds(read_tensors(tmp_path), tensors)
    assert set(tensor_names(tmp_path)) == set(tensors)


def test_shards_of_a_pytorch_model(tmp_path: Path, tensors: Tensors) -> None:
    for i, (name, tensor) in enumerate(tensors.items(), 1):
        torch.save({name: tensor}, tmp_path / f"model-0000{i}-of-00003.bin")
    assert_holds(read_tensors(tmp_path), tensors)


def test_a_folder_with_the_same_model_twice_gives_the_plainest(tmp_path: Path, tensors: Tensors) -> None:
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    torch.save(half, tmp_path / "diffusion_pytorch_model.bin")
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_holds(read_tensors(tmp_path), tensors)


@pytest.mark.parametrize("other", ["adapter_model.safetensors", "ema.fp16.safetensors", "a-00001-of-00001.safetensors"])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "model.fp16", "pytorch_model-00001-of-00001"])
def test_a_folder_with_something_else_gives_the_model(tmp_path: Path, tensors: Tensors, name: str, other: str) -> None:
    save_file({"other": torch.ones(1)}, tmp_path / other)
    save_file(tensors, tmp_path / f"{name}.safetensors")
    assert_holds(read_tensors(tmp_path), tensors)


@pytest.mark.parametrize("name", ["model", "model-00001-of-00001"])
def test_a_file_knows_the_suffixes_of_its_copies(tmp_path: Path, tensors: Tensors, name: str) -> None:
    for other in ("model.fp16", "model.bf16-00001-of-00002", "model-00001-of-00002.fp32", "another.ema"):
        save_file(tensors, tmp_path / f"{other}.safetensors")
    (tmp_path / "model.json.txt").touch()
    save_file(tensors, path := tmp_path / f"{name}.safetensors")
    assert read_tensors(path).siblings == read_tensors(tmp_path).siblings == {"fp16", "bf16", "fp32"}
    assert read_tensors(tmp_path / "model.fp16.safetensors").siblings == frozenset()


@pytest.mark.parametrize("there", [(1, 2), (2,)])
def test_a_whole_file_beside_shards_of_its_name_is_the_model(
    tmp_path: Path, tensors: Tensors, there: tuple[int, ...]
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    for i in there:
        save_file({"other": torch.ones(1)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    assert_holds(read_tensors(tmp_path), tensors)


def test_shards_in_another_number_beside_a_complete_set_do_not_count(tmp_path: Path, tensors: Tensors) -> None:
    save_file({"other": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    for i, (name, tensor) in enumerate(tensors.items(), 1):
        save_file({name: tensor}, tmp_path / f"model-0000{i}-of-00003.safetensors")
    assert_holds(read_tensors(tmp_path), tensors)


def test_the_folder_at_hand_is_told_by_its_name(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    for path in (".", Path()):
        file = read_tensors(path)
        assert_holds(file, tensors)
        assert file.path.name == tmp_path.name


def test_a_component_of_a_pipeline_folder(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "vae").mkdir()
    save_file(tensors, tmp_path / "vae" / "model.safetensors")
    for place, component in ((tmp_path, "vae"), (tmp_path / "vae", "vae"), (tmp_path / "vae", None)):
        file = read_tensors(place, component)
        assert_holds(file, tensors)
        assert file.path == tmp_path / "vae"


# Memory


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_are_mapped_and_not_read(tmp_path: Path, suffix: str) -> None:
    tensors = {name: torch.randn(1000, 100) for name in "abc"}
    path = tmp_path / f"model{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"state_dict": tensors}, path)
    found = read_tensors(path).tensors
    assert mapped_bytes(found.values(), path) == 3 * 1000 * 100 * 4


def test_changing_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    for name, save in (("a.safetensors", save_file), ("a.pth", torch.save)):
        save({"x": torch.ones(100)}, path := tmp_path / name)
        before = path.read_bytes()
        read_tensors(path).tensors["x"].zero_()
        assert path.read_bytes() == before
        assert read_tensors(path).tensors["x"].sum() == 100


# What cannot


class Code:
    """Unpickling it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return os.system, (f"echo run > '{self.trace}'",)


@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
@pytest.mark.parametrize("write", ["zip", "before PyTorch 1.6", "plain pickle"])
def test_a_pickle_with_code_is_refused_and_never_run(tmp_path: Path, tensors: Tensors, suffix: str, write: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"model{suffix}"
    content = {"state_dict": tensors, "note": Code(trace)}
    if write == "plain pickle":
        path.write_bytes(pickle.dumps(Code(trace), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "zip")
    assert refusal(path).startswith(f"{path.name} {CODE}")
    assert refusal(tmp_path).startswith(f"{path.name} {CODE}")
    assert not trace.exists()
    torch.load(path, weights_only=False) if write != "plain pickle" else pickle.loads(path.read_bytes())
    assert trace.exists()  # the code was there to be run


def test_a_whole_module_is_refused_too(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), path := tmp_path / "model.pt")
    assert refusal(path) == f"model.pt {CODE}; use a file that holds tensors only, such as .safetensors"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
def test_a_truncated_file_is_named(tmp_path: Path, tensors: Tensors, suffix: str, share: float) -> None:
    path = tmp_path / f"model{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = refusal(path)
    assert message.startswith(path.name) and message.endswith("the download may be incomplete")
    assert not tensor_names(path)


@pytest.mark.parametrize("content", [b"text", b"\x80\x02]", b"\0" * 100], ids=["text", "bytes", "zeros"])
@pytest.mark.parametrize("name", ["a.pth", "a.ckpt", "a.txt", "a"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert message.startswith(f"{name} is not a readable ")
    assert message.endswith("it is no checkpoint" if "." not in name or "txt" in name else "may be incomplete")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("\n<!DOCTYPE html><html>not found</html>", "a web page; download the file itself"),
        (
            "version https://git-lfs.github.com/spec/v1\n",
            "a Git LFS pointer; run git lfs pull, or download the file itself",
        ),
        ('{"weight_map": {}}', "JSON without tensors; give the file or folder that holds them"),
        ("GGUF\3\0\0\0", "GGUF, which SANA is not read from; use safetensors"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.gguf", "a"])
def test_what_lies_in_the_place_of_a_checkpoint_is_named(tmp_path: Path, name: str, content: str, what: str) -> None:
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / name) == f"{name} is {what}"


@pytest.mark.parametrize("save", [save_file, torch.save])
@pytest.mark.parametrize("name", ["a.pth", "a.PTH", "a.pth.tar", "a.zip", "a"])
def test_the_content_tells_what_a_file_is(
    tmp_path: Path, tensors: Tensors, name: str, save: Callable[[Tensors, Path], None]
) -> None:
    save(tensors, path := tmp_path / name)
    assert_holds(read_tensors(path), tensors)


def test_a_pytorch_file_with_the_other_name_is_told_its_own(tmp_path: Path, tensors: Tensors) -> None:
    torch.save(tensors, path := tmp_path / "a.safetensors")
    assert refusal(path) == "a.safetensors is a PyTorch file; rename it to a.pth"


@pytest.mark.parametrize("length", [0x80, 0x4B50])  # which begin as PyTorch's files do
def test_a_header_of_any_length_is_one_of_safetensors(tmp_path: Path, length: int) -> None:
    save_file({"x": torch.ones(2)}, path := tmp_path / "a.safetensors")
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header, numbers = path.read_bytes()[8 : 8 + size], path.read_bytes()[8 + size :]
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + numbers)
    assert_holds(read_tensors(path), {"x": torch.ones(2)})


def header_only(path: Path, length: int) -> Path:
    """A file of safetensors with a header of so many bytes and no numbers."""
    entries = ",".join(f'"{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(length // 60))
    path.write_bytes(length.to_bytes(8, "little") + f"{{{entries}}}".encode().ljust(length))
    return path


def test_a_header_is_as_long_as_it_may_be(tmp_path: Path) -> None:
    """Of 70,000 names; the largest release has 1,600. A million took 13 seconds and 1.4 GB."""
    path = header_only(tmp_path / "a.safetensors", 2**22)
    assert len(read_tensors(path).tensors) == len(tensor_names(path)) == 2**22 // 60
    header_only(path, 2**22 + 1)
    message = (
        "a.safetensors has a header of 4,194,305 bytes, and no model needs more than 4,194,304; take the original file"
    )
    assert refusal(path) == message
    assert not tensor_names(path)


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: root may read everything."""
    save_file(tensors, path := tmp_path / "a.safetensors")

    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        assert refusal(path) == "a.safetensors cannot be opened (Permission denied); check who may read it"
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)
        assert_holds(read_tensors(path), tensors)  # from a folder that may not be listed


def test_damage_anywhere_gives_a_sentence_or_tensors(tmp_path: Path, tensors: Tensors) -> None:
    """One byte in a hundred places of a file is changed: of the header, of the pickle, of the numbers."""
    save_file(tensors, first := tmp_path / "model.safetensors")
    torch.save(tensors, second := tmp_path / "model.pth")
    torch.save(tensors, third := tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    for path in (first, second, third):
        whole = path.read_bytes()
        for place in range(0, len(whole), len(whole) // 100):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
            try:
                read_tensors(path)
            except CheckpointError as error:
                assert str(error).startswith(path.name)


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, [torch.ones(1)], "text", torch.ones(3), {"state_dict": {}}])
def test_a_pytorch_file_without_named_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, path := tmp_path / "model.pth")
    assert refusal(path) == "model.pth holds no tensors; give a checkpoint of a SANA model"


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    message = f"{tmp_path / 'none'} does not exist; give a checkpoint file or a folder of a diffusers model"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        read_tensors(tmp_path / "none")
    assert not tensor_names(tmp_path / "none")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("text")
    message = (
        "holds no .safetensors or .pth file; give the folder of one model, or of a pipeline with a transformer/ in it"
    )
    assert refusal(tmp_path) == f"{tmp_path} {message}"
    assert not tensor_names(tmp_path)


def test_missing_shards_are_counted(tmp_path: Path, tensors: Tensors) -> None:
    for i in (1, 3):
        save_file(tensors, tmp_path / f"model-0000{i}-of-00003.safetensors")
    assert refusal(tmp_path) == f"{tmp_path} holds 2 of 3 shards; download the missing ones"


def test_one_shard_alone_is_no_model(tmp_path: Path, tensors: Tensors) -> None:
    save_file(tensors, path := tmp_path / "model-00002-of-00003.safetensors")
    assert refusal(path) == f"{path.name} is one of 3 shards; give the folder that holds all of them"
    save_file(tensors, path := tmp_path / "whole-00001-of-00001.safetensors")
    assert_holds(read_tensors(path), tensors)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}"])
def test_a_broken_configuration_is_named(tmp_path: Path, tensors: Tensors, content: bytes) -> None:
    save_file(tensors, path := tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{tmp_path / 'config.json'} is not valid JSON (")
    assert message.endswith("); download it again")


def test_only_an_object_is_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert read_json(path) == {}
    for value, expected in (([1], {}), (None, {}), ({"a": [1]}, {"a": [1]})):
        path.write_text(json.dumps(value))
        assert read_json(path) == expected


def test_numbers_of_numpy_are_passed_over_where_others_have_marked_the_real_ones(
    tmp_path: Path, tensors: Tensors
) -> None:
    """As ComfyUI does. Of two things with one name PyTorch took either by chance, so each is tried under many."""
    torch.save({**tensors, "loss": np.float64(0.5), "state": np.arange(3)}, path := tmp_path / "model.pth")
    real = [
        np.dtype,
        np.ndarray,
        np.dtypes.Float64DType,
        (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    ]
    before = torch.serialization.get_safe_globals()
    for count in range(1, 40):  # the order in a set depends on what else is in it
        fillers = [type(f"Filler{k}", (), {}) for k in range(count)]
        with torch.serialization.safe_globals([*real, *fillers]):
            inside = torch.serialization.get_safe_globals()
            assert read_tensors(path).tensors.keys() == tensors.keys()
            assert {*torch.serialization.get_safe_globals()} == {*inside}
    assert {*torch.serialization.get_safe_globals()} == {*before}


@pytest.mark.parametrize("part", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_names_are_without_what_pytorch_writes_into_them(tmp_path: Path, part: str) -> None:
    """Inside of names, as compiled, sharded and recomputed networks are saved. Before them it is a prefix."""
    written = {f"{part}.blocks.0.{part}.attn.weight": torch.ones(1), f"norm.{part}.{part}.weight": torch.zeros(1)}
    save_file(written, path := tmp_path / "model.safetensors")
    torch.save(written, pickled := tmp_path / "model.pth")
    for found in (read_tensors(path).tensors, read_tensors(pickled).tensors, tensor_names(path)):
        assert {*found} == {f"{part}.blocks.0.attn.weight", "norm.weight"}
    assert read_tensors(path).tensors[f"{part}.blocks.0.attn.weight"] == 1


def test_a_message_is_one_line_that_can_be_read() -> None:
    """Whatever a file calls its tensors; a whole list of model files that do not fit is shorter than the bound."""
    assert str(CheckpointError("a  b\nc.pth\r\nis\u2028damaged")) == "a  b c.pth is damaged"
    fits, longer = "ab " * 666 + "ab", "ab " * 334 + "x" + " cd" * 333
    assert str(CheckpointError(fits)) == fits and len(fits) == 2000
    assert str(CheckpointError(longer)) == longer[:1000] + " ... " + longer[-1000:]


def test_names_in_a_file_neither_fill_a_terminal_nor_command_it() -> None:
    assert str(CheckpointError("first " + "x" * 501 + " it is")) == "first " + "x" * 500 + "... it is"
    assert str(CheckpointError("first " + "x" * 500 + " it is")) == "first " + "x" * 500 + " it is"
    assert str(CheckpointError("first a\n\x1b[31mb\udcff é; it is")) == r"first a \x1b[31mb\udcff é; it is"
