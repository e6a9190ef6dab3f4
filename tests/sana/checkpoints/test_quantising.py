"""Quantised files: which matrices are packed and how near they stay, what is told of them, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import get_layout_class
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana.checkpoints import quantising
from sana.checkpoints.files import read_tensors
from sana.checkpoints.header import transformer_header
from sana.checkpoints.names import POINTWISE, with_convolutions
from sana.checkpoints.quantising import PACKED_FORMATS, quantise
from sana.checkpoints.tensor_writer import TensorWriter
from sana.checkpoints.text_encoder import find_tokenizer, gemma_config, gemma_tensors, load_text_encoder
from sana.checkpoints.transformer import find_transformer, load_transformer
from sana.config import TransformerIdentity
from sana.networks.packed import PackedWeight
from sana.networks.transformer import SanaTransformer
from tests.sana.dialects import official_transformer
from tests.sana.models import GEMMA, TRANSFORMER, gemma, transformer, write_model

ROOT = Path(__file__).parents[3]
FORMS = tuple(PACKED_FORMATS)
# Relative error of packed normal or uniform numbers: a format's own, with a margin.
ERRORS = {"fp8": (0.02, 0.035), "int8": (0.002, 0.01), "mxfp8": (0.02, 0.035), "nvfp4": (0.06, 0.12)}
IN_BLOCK = (
    *(f"attn{k}.{part}" for k in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.conv_inverted", "ff.conv_point"),
)
ENDS = (
    *(
        "patch_embed.proj",
        "proj_out",
        "time_embed.linear",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
    ),
    *(f"time_embed.emb.timestep_embedder.linear_{k}" for k in (1, 2)),
)
IN_LAYER = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)

PACKED = ("time_embed.linear", "layers.2.mlp.down_proj")  # layers of a transformer and of Gemma-2

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def layers_of(path: Path) -> dict[str, str]:
    """The format of every packed layer: by the marks beside them, which must say what the header says."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["_quantization_metadata"])
        names = [name for name in file.keys() if name.endswith(".comfy_quant")]
        marks = {name.removesuffix(".comfy_quant"): json.loads(bytes(file.get_tensor(name).tolist())) for name in names}
    assert header == {"format_version": "1.0", "layers": marks}
    assert all(mark.keys() == {"format"} for mark in marks.values())
    return {layer: mark["format"] for layer, mark in marks.items()}


def unpacked(tensors: Tensors, layer: str, form: str, shape: torch.Size) -> Tensor:
    """A matrix as the host reads it."""
    row = PACKED_FORMATS[form]
    layout = get_layout_class(row.layout)
    scale = tensors[f"{layer}.weight_scale"]
    parts = {"scale": scale}
    if form == "mxfp8":
        parts = {"scale": scale.view(torch.float8_e8m0fnu)}
    if form == "nvfp4":
        parts = {"scale": tensors[f"{layer}.weight_scale_2"], "block_scale": scale}
    params = layout.Params(**parts, orig_dtype=torch.float32, orig_shape=shape)
    return layout.dequantize(tensors[f"{layer}.weight"], params)[: shape[0], : shape[1]]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ends", [False, True])
def test_matrices_of_a_transformer_are_packed(model: Path, tmp_path: Path, form: str, ends: bool) -> None:
    target = tmp_path / "packed.safetensors"
    told = quantise(model, target, form, ends=ends)
    expected = [f"transformer_blocks.{k}.{part}" for k in range(TRANSFORMER.depth) for part in IN_BLOCK]
    expected += ENDS if ends else ()
    found, original = load_file(target), transformer().state_dict()
    layers = layers_of(target)
    assert layers == dict.fromkeys(expected, PACKED_FORMATS[form].name)
    scales = [f"{layer}.weight_scale{end}" for layer in expected for end in (("", "_2") if form == "nvfp4" else ("",))]
    assert found.keys() == original.keys() | {f"{layer}.comfy_quant" for layer in expected} | {*scales}
    assert (
        told
        == f"{target}: custom, {len(expected)} matrices in {form}, {len(original) - len(expected)} tensors in float16"
    )
    for name, tensor in original.items():
        layer = name.removesuffix(".weight")
        if layer in layers and name != layer:
            least, most = ERRORS[form]
            assert least < relative(unpacked(found, layer, form, tensor.shape), tensor) < most, name
            assert found[name].dtype.itemsize == 1
        else:
            assert torch.equal(found[name], tensor.half()), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ends", [False, True])
def test_matrices_of_gemma_are_packed(model: Path, tmp_path: Path, form: str, ends: bool) -> None:
    """Its embedding is only looked up. The host takes rows out of it in fp8 and int8, and nowhere unless it is asked for."""
    target = tmp_path / "packed.safetensors"
    quantise(model / "text_encoder", target, form, ends=ends)
    expected = [f"model.layers.{k}.{part}" for k in range(GEMMA.num_hidden_layers) for part in IN_LAYER]
    expected += ["model.embed_tokens"] if ends and form in ("fp8", "int8") else []
    assert layers_of(target) == dict.fromkeys(expected, PACKED_FORMATS[form].name)
    found = load_file(target)
    for name, tensor in gemma().state_dict().items():
        layer = "model." + name.removesuffix(".weight")
        if layer in expected:
            least, most = ERRORS[form]
            assert least < relative(unpacked(found, layer, form, tensor.shape), tensor) < most, name
        else:
            assert torch.equal(found[f"model.{name}"], tensor.bfloat16()), name


@pytest.mark.parametrize("form", FORMS)
def test_the_shell_reads_what_is_written(model: Path, tmp_path: Path, form: str) -> None:
    """As the host reads it: transformer and text encoder, and the ends of both."""
    networks = []
    for part, prefix, load in (("", "", load_transformer), ("text_encoder", "model.", load_text_encoder)):
        quantise(model / part, target := tmp_path / f"{prefix}safetensors.safetensors", form, ends=True)
        network, tensors = load(target), load_file(target)
        network = network if part == "" else network.model
        for layer in layers_of(target):
            weight = network.get_submodule(layer.removeprefix(prefix)).weight
            torch.testing.assert_close(weight(), unpacked(tensors, layer, form, weight.shape), rtol=1e-6, atol=0)
        networks.append(network)
    assert all(
        isinstance(network.get_submodule(name).weight, PackedWeight)
        for network, name in zip(networks, PACKED, strict=True)
    )


def test_a_quantised_text_encoder_is_whole(model: Path, tmp_path: Path) -> None:
    """Configuration and tokenizer are in the file."""
    quantise(model / "text_encoder", target := tmp_path / "packed.safetensors", "fp8")
    file = read_tensors(target)
    assert gemma_config(gemma_tensors(file), file) == GEMMA
    assert find_tokenizer(file, GEMMA).source == (model / "tokenizer" / "tokenizer.json").read_bytes()


def test_a_quantised_transformer_knows_itself(model: Path, tmp_path: Path) -> None:
    """By its header, also where padding of blocks has enlarged what the tensors tell."""
    quantise(model, target := tmp_path / "packed.safetensors", "mxfp8", ends=True)
    expected = find_transformer(read_tensors(model, "transformer")).identity
    with safe_open(target, "pt") as file:
        told = file.metadata()
    expected_header = transformer_header(expected)
    assert told.keys() == {"format", "_quantization_metadata", *expected_header}
    assert {key: told[key] for key in expected_header} == expected_header


def test_a_file_is_the_same_from_every_dialect_and_every_time(model: Path, tmp_path: Path) -> None:
    """Official files have q, k and v in one tensor; here each part is packed alone."""
    tensors = with_convolutions(transformer().state_dict())
    identity = find_transformer(read_tensors(model, "transformer")).identity
    sources = {"ours": tensors, "official": official_transformer(tensors)}
    for name, source in sources.items():
        stored = {key: tensor.clone() for key, tensor in source.items()}
        save_file(stored, tmp_path / f"{name}.safetensors", transformer_header(identity))
        quantise(tmp_path / f"{name}.safetensors", tmp_path / f"{name}-packed.safetensors", "int8")
    quantise(tmp_path / "ours.safetensors", tmp_path / "again.safetensors", "int8")
    first, other = (load_file(tmp_path / f"{name}-packed.safetensors") for name in sources)
    assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "ours-packed.safetensors").read_bytes()


def test_convolutions_that_are_not_packed_are_matrices_too(model: Path, tmp_path: Path) -> None:
    quantise(model, target := tmp_path / "packed.safetensors", "fp8")
    shapes = {name: tensor.ndim for name, tensor in load_file(target).items() if name.endswith(POINTWISE)}
    assert len(shapes) == 2 * TRANSFORMER.depth + 1 and {*shapes.values()} == {2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_tensors_are_in_the_dtype_that_is_asked_for(model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    quantise(model, target := tmp_path / "packed.safetensors", "nvfp4", dtype=dtype)
    found = load_file(target)
    assert {found[name].dtype for name in transformer().state_dict() if f"{name}_scale" not in found} == {dtype}
    assert found["transformer_blocks.0.attn1.to_q.weight_scale_2"].dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_packed_one_part_after_another_are_those_of_the_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    quantise(model, whole := tmp_path / "whole.safetensors", form)
    monkeypatch.setattr(quantising, "ROWS", 128)  # of up to 480
    quantise(model, parts := tmp_path / "parts.safetensors", form)
    assert whole.read_bytes() == parts.read_bytes()


def stored(folder: Path, changes: Tensors) -> Path:
    """The transformer in a file, with some tensors changed."""
    path = folder / "changed.safetensors"
    identity = TransformerIdentity(TRANSFORMER, "custom", 64, 2.0, "bfloat16", "training")
    save_file({**transformer().state_dict(), **changes}, path, transformer_header(identity))
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_matrices_of_one_number_are_packed(tmp_path: Path, form: str, value: float) -> None:
    """Zeros among them, whose scale would divide by nothing."""
    layer = "transformer_blocks.1.attn1.to_v"
    matrix = torch.full((96, 96), value)
    quantise(stored(tmp_path, {f"{layer}.weight": matrix}), target := tmp_path / "packed.safetensors", form)
    found = unpacked(load_file(target), layer, form, matrix.shape)
    torch.testing.assert_close(found, matrix, rtol=0.07, atol=0.0)


# What is refused


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing may be left."""
    (folder := tmp_path / "empty").mkdir()
    yield folder
    assert not [*folder.iterdir()]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, empty: Path, value: float) -> None:
    name = "transformer_blocks.1.ff.conv_point.weight"
    matrix = transformer().state_dict()[name].clone()
    matrix[5, 7] = value
    message = rf"^changed.safetensors: tensor {name} has numbers that are not finite, which no format holds; take another file$"
    with pytest.raises(ValueError, match=message):
        quantise(stored(tmp_path, {name: matrix}), empty / "packed.safetensors", "mxfp8")


@pytest.mark.parametrize("part", ["", "text_encoder"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_quantised_already(model: Path, tmp_path: Path, empty: Path, form: str, part: str) -> None:
    quantise(model / part, source := tmp_path / "packed.safetensors", form)
    message = r"^packed.safetensors is quantised already, with \S+ in (uint8|int8|float8_e4m3fn); give the file that it was made "
    with pytest.raises(ValueError, match=message):
        quantise(source, empty / "again.safetensors", "int8")


def test_a_cast_to_eight_bits_is_quantised_already(tmp_path: Path, empty: Path) -> None:
    name = "transformer_blocks.0.attn1.to_k.weight"
    path = stored(tmp_path, {name: transformer().state_dict()[name].to(torch.float8_e5m2)})
    with pytest.raises(ValueError, match=rf"^{path.name} is quantised already, with {name} in float8_e5m2; "):
        quantise(path, empty / "packed.safetensors", "fp8")


KINDS = "; what can be quantised are a SANA transformer and a Gemma-2 text encoder$"


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 2)}, "a LoRA"),
        ({"encoder.down_blocks.1.0.conv1.weight": torch.ones(2, 2)}, "a DC-AE, the autoencoder of SANA"),
        ({"anything": torch.ones(2, 2)}, r"a file of unknown kind \(its first tensor is anything\)"),
    ],
)
def test_other_files(tmp_path: Path, empty: Path, tensors: Tensors, kind: str) -> None:
    save_file(tensors, path := tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"^other.safetensors is {kind}{KINDS}"):
        quantise(path, empty / "packed.safetensors", "fp8")


def test_a_transformer_with_a_controlnet(tmp_path: Path, empty: Path) -> None:
    tensors = official_transformer(with_convolutions(transformer().state_dict()))
    copied = {f"controlnet.0.copied_block.{k[9:]}": t.clone() for k, t in tensors.items() if k.startswith("blocks.0.")}
    save_file({**tensors, **copied, "x": torch.ones(1)}, path := tmp_path / "both.safetensors", {})
    with pytest.raises(ValueError, match=r"^both.safetensors "):
        quantise(path, empty / "packed.safetensors", "fp8")


def test_incomplete_files(tmp_path: Path, empty: Path) -> None:
    path = stored(tmp_path, {})
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    with safe_open(path, "pt") as file:
        save_file(tensors, path.with_name("less.safetensors"), file.metadata())
    with pytest.raises(ValueError, match=r"^less.safetensors lacks 1 of \d+ tensors, first proj_out.bias; "):
        quantise(path.with_name("less.safetensors"), empty / "packed.safetensors", "fp8")


def test_a_text_encoder_without_its_tokenizer(tmp_path: Path, empty: Path) -> None:
    save_file(gemma().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(gemma().config.to_json_string(), encoding="utf-8")
    with pytest.raises(ValueError, match=r" has no tokenizer; put tokenizer.json or tokenizer.model of "):
        quantise(tmp_path / "model.safetensors", empty / "packed.safetensors", "fp8")


def test_unknown_formats_and_targets(model: Path, empty: Path) -> None:
    with pytest.raises(ValueError, match=r"^quantised format 'int4' is unknown; use one of fp8, int8, mxfp8, nvfp4$"):
        quantise(model, empty / "packed.safetensors", "int4")
    with pytest.raises(
        ValueError, match=r"packed.pth does not end in .safetensors; give the name of the file to write$"
    ):
        quantise(model, empty / "packed.pth", "fp8")


def test_a_target_that_exists_stays(model: Path, tmp_path: Path) -> None:
    (target := tmp_path / "packed.safetensors").write_bytes(b"something")
    with pytest.raises(ValueError, match=r"packed.safetensors exists already; give another name, or remove it first$"):
        quantise(model, target, "fp8")
    assert target.read_bytes() == b"something"


@pytest.mark.parametrize(("form", "known"), [("fp8", False), ("int8", True)])
def test_without_the_package_that_packs(
    model: Path, empty: Path, monkeypatch: pytest.MonkeyPatch, form: str, known: bool
) -> None:
    """Or with one that is too old to know the format."""
    if known:
        monkeypatch.setitem(PACKED_FORMATS, form, PACKED_FORMATS[form]._replace(layout="NotYetThere"))
    else:
        monkeypatch.setitem(sys.modules, "comfy_kitchen.tensor", None)
    message = (
        rf"^quantising to {PACKED_FORMATS[form].name} needs the package comfy-kitchen, 0.2.26 or newer, which recent versions of "
        r'ComfyUI bring; install it with: pip install "comfy-kitchen>=0.2.26"$'
    )
    with pytest.raises(RuntimeError, match=message):
        quantise(model, empty / "packed.safetensors", form)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_a_disk_that_is_full_keeps_nothing(
    model: Path, empty: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write = quantising.TensorWriter.write

    def write_some(self: quantising.TensorWriter, name: str, tensor: Tensor) -> None:
        if ".1.attn2." in name:
            assert [*empty.iterdir()]
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(quantising.TensorWriter, "write", write_some)
    with pytest.raises(type(error)) as caught:
        quantise(model, target := empty / "packed.safetensors", "fp8")
    if isinstance(error, OSError):
        assert (
            str(caught.value)
            == f"{target} cannot be written (No space left on device); make room, or give a place that is yours to write"
        )


# Memory

LARGE = replace(TRANSFORMER, hidden_size=512, ff_width=1280, depth=8)
MEASURED = """
import sys, threading
from pathlib import Path
from sana.checkpoints.quantising import quantise
from tests.sana.measures import peak_bytes

def resident():
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("RssAnon")))

def watch():
    while not done.wait(0.001):
        found.append(resident())

first, source, target = sys.argv[1:]
quantise(first, target + "0.safetensors", "int8")  # so that libraries have what they keep
done, found = threading.Event(), [resident()]
watcher = threading.Thread(target=watch)
watcher.start()
quantise(source, target + "1.safetensors", "int8")
done.set()
watcher.join()
_, allocated = peak_bytes(lambda: quantise(source, target + "2.safetensors", "int8"))
print(max(found) - found[0], allocated)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what memory is the process's own")
def test_memory_holds_one_layer(model: Path, tmp_path: Path) -> None:
    """In a process of its own: what is resident without mapped files, and what PyTorch allocates."""
    identity = TransformerIdentity(LARGE, "custom", 64, 2.0, "bfloat16", "training")
    network = SanaTransformer(LARGE, device="meta").state_dict()
    numbers = torch.randn(3072, 512, generator=torch.Generator().manual_seed(0)).bfloat16().flatten()
    source = tmp_path / "large.safetensors"
    with TensorWriter(source, network, transformer_header(identity)) as out:
        for name, tensor in network.items():
            out.write(name, numbers[: tensor.numel()].view(tensor.shape))
    largest = 4 * max(tensor.numel() for tensor in network.values())
    run = [sys.executable, "-c", MEASURED, model, source, tmp_path / "packed"]
    returning = {"MALLOC_MMAP_THRESHOLD_": "100000"}  # what is freed goes back at once
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **returning}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    resident, allocated = map(int, done.stdout.split())
    assert 5 * largest < (tmp_path / "packed1.safetensors").stat().st_size
    assert resident < 3 * largest
    assert allocated - source.stat().st_size < 2 * largest  # PyTorch counts the mapped source too
