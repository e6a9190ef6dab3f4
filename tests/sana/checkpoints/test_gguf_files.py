"""Gemma-2 out of GGUF files: the numbers of the gguf package, the tokens of transformers, and a sentence for other files."""

import builtins
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from sana import CheckpointError, load_text_encoder, load_transformer
from sana.checkpoints.gguf_container import is_gguf, read_container
from sana.checkpoints.gguf_files import read_gguf
from sana.checkpoints.inspection import describe_file
from sana.jobs import fingerprint
from sana.networks.packed_layers import PackedEmbedding, PackedLinear
from sana.text.enhancement import enhance
from sana.text.gemma import Gemma2
from sana.text.generation import Sampling
from sana.text.text_encoder import GemmaTextEncoder
from sana.text.tokenizers import END_OF_TURN, START_OF_TURN, SentencePieceTokenizer
from tests.sana.gguf_writer import packed, write_gguf
from tests.sana.measures import mapped_bytes, relative_error
from tests.sana.models import GEMMA, PROMPTS, gemma, reference_tokenizer, tokenizer_model, write_model
from tests.sana.shell.commands import Shell

Tensors = dict[str, Tensor]
WIDE = replace(GEMMA, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=16)


def states(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_text_encoder(folder)([PROMPTS[0]], None)[0]


def as_unpacked(tensors: Tensors, kind: Callable[[str], Kind]) -> Tensors:
    """What the package makes of what it has packed."""
    return {
        name: torch.from_numpy(gguf.quants.dequantize(packed(tensor, kind(name)), kind(name)).copy())
        if tensor.ndim > 1
        else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0], ids=lambda k: k.name)
def test_it_writes_what_the_unpacked_numbers_write(tmp_path: Path, kind: Kind) -> None:
    """Marks for turns, which such files call control tokens, are read as marks."""
    marks, tensors = (START_OF_TURN, END_OF_TURN), dict(gemma().state_dict())
    encoder = load_text_encoder(write_gguf(tmp_path / "gemma.gguf", tensors, lambda name: kind, marks=marks))
    plain = Gemma2(encoder.model.config, device="meta")
    plain.load_state_dict(as_unpacked(tensors, lambda name: kind), assign=True)
    unpacked = GemmaTextEncoder(plain.requires_grad_(False), SentencePieceTokenizer(tokenizer_model(*marks)))
    sampling = Sampling(12, temperature=1.5)
    text, expected = ("".join(enhance(each, "a cat", sampling=sampling)) for each in (encoder, unpacked))
    assert text == expected and len(text) > 10


def run(model: Gemma2, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)[0]


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_0, Kind.Q5_1, Kind.Q4_0, Kind.Q4_1], ids=lambda k: k.name
)
def test_a_text_encoder_computes_what_the_package_unpacks(tmp_path: Path, kind: Kind) -> None:
    tensors = dict(gemma().state_dict())
    encoder = load_text_encoder(write_gguf(tmp_path / "gemma.gguf", tensors, lambda name: kind))
    assert replace(encoder.model.config, rms_norm_eps=1e-6) == GEMMA
    assert encoder.model.config.rms_norm_eps == pytest.approx(1e-6)
    unpacked = as_unpacked(tensors, lambda name: kind)
    reference = gemma()
    reference.load_state_dict(unpacked)
    ids = torch.tensor([encoder.tokenizer.encode(PROMPTS[0])])
    with torch.no_grad():
        expected = reference(ids).last_hidden_state
    assert relative_error(run(encoder.model, ids), expected) < 1e-5
    plain = kind in (Kind.F32, Kind.F16, Kind.BF16)
    assert isinstance(encoder.model.layers[1].mlp.up_proj, PackedLinear) != plain
    assert isinstance(encoder.model.embed_tokens, PackedEmbedding) != plain


@pytest.mark.parametrize(
    "kind", [Kind.Q6_K, Kind.Q5_K, Kind.Q4_K, Kind.Q3_K, Kind.Q2_K, Kind.IQ4_NL, Kind.IQ4_XS], ids=lambda k: k.name
)
def test_blocks_of_256_numbers(tmp_path: Path, kind: Kind) -> None:
    """As in a file in Q4_K_M: most matrices in one kind, the embedding in another."""

    def kinds(name: str) -> Kind:
        return Kind.Q6_K if name == "embed_tokens.weight" else kind

    torch.manual_seed(0)
    plain = Gemma2(WIDE)
    tensors = {name: torch.randn_like(tensor) * 0.05 for name, tensor in plain.state_dict().items()}
    encoder = load_text_encoder(write_gguf(tmp_path / "gemma.gguf", tensors, kinds, WIDE))
    plain.load_state_dict(as_unpacked(tensors, kinds))
    ids = torch.tensor([encoder.tokenizer.encode(PROMPTS[0])])
    assert relative_error(run(encoder.model, ids), run(plain, ids)) < 1e-5
    layer = encoder.model.layers[0].mlp.down_proj.weight
    assert (
        layer.kind == kind.name
        and layer.nbytes == 256 * 256 * gguf.GGML_QUANT_SIZES[kind][1] // (gguf.GGML_QUANT_SIZES[kind][0])
    )


def test_packed_weights_stay_in_the_file_or_leave_it_as_other_tensors_do(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "gemma.gguf", dict(gemma().state_dict()), lambda name: Kind.Q8_0)
    for dtype, mapped in ((None, True), (torch.float32, False)):
        model = load_text_encoder(path, dtype).model
        packed = [part for name, part in model.named_parameters() if name.endswith(".packed")]
        assert len(packed) == 3 * 7 + 1
        assert mapped_bytes(packed, path) == mapped * sum(part.nbytes for part in packed)


@pytest.mark.parametrize(
    "text",
    [
        *PROMPTS,
        "two  spaces\n\nand lines\n",
        "<start_of_turn> <unused1> </s>",
        "a <eos> b<bos>",
        "\u2581 already",
        "ab\u0000c \ufffd",
    ],
)
def test_the_tokens_are_those_of_transformers(tmp_path: Path, text: str) -> None:
    path = write_gguf(tmp_path / "gemma.gguf", dict(gemma().state_dict()), lambda name: Kind.F16)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model())
    theirs = reference_tokenizer(tmp_path)
    assert load_text_encoder(path).tokenizer.encode(text) == theirs.encode(text)


def test_pictures_with_a_gguf_text_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path)
    path = write_gguf(tmp_path / "gemma.gguf", dict(gemma().state_dict()), lambda name: Kind.Q8_0)
    shell = Shell(model, tmp_path, capsys)
    options = ("a red circle", "--height", 64, "--width", 64, "--text-encoder", path)
    assert len(shell.draw(*options)) == 1
    assert shell.generate(*options, "--resume").out == "Every picture exists already.\n"
    before = fingerprint({"text_encoder": path}, [])
    content = bytearray(path.read_bytes())
    content[-200:] = bytes(200)
    path.write_bytes(content)
    assert fingerprint({"text_encoder": path}, []) != before


def test_info(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "gemma.gguf", dict(gemma().state_dict()), lambda name: Kind.Q8_0)
    lines = describe_file(path).splitlines()
    assert lines[0] == "gemma.gguf: a Gemma text encoder"
    assert "numbers in Q8_0, float32, uint8" in lines[1]
    matrices = sum(tensor.ndim == 2 for tensor in gemma().state_dict().values())
    assert lines[2:] == [f"quantised matrices: {matrices} in Q8_0", "give its path as the text encoder"]


# Bad input


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


def test_without_the_package_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gemma.gguf").write_bytes(b"GGUF")
    original = builtins.__import__

    def missing(name: str, *others: object) -> object:
        if name.split(".")[0] == "gguf":
            raise ImportError(name)
        return original(name, *others)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert refusal(lambda: load_text_encoder(tmp_path / "gemma.gguf")) == (
        "gemma.gguf is GGUF, which needs the package gguf; install it by `pip install gguf`, or take a safetensors file"
    )


@pytest.mark.parametrize("cut", [4, 30, 200, 5_000])
def test_a_file_that_is_cut_in_its_fields_is_named(tmp_path: Path, cut: int) -> None:
    path = write_gguf(tmp_path / "gemma.gguf", dict(gemma().state_dict()), lambda name: Kind.Q8_0)
    path.write_bytes(path.read_bytes()[:cut])
    message = refusal(lambda: load_text_encoder(path))
    assert message.startswith("gemma.gguf is not a readable GGUF file (") and message.endswith("); download it again")


def test_a_file_that_is_cut_in_its_tensors_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "gemma.gguf", dict(gemma().state_dict()), lambda name: Kind.Q8_0)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - 100])
    message = refusal(lambda: load_text_encoder(path))
    assert message.startswith(
        f"gemma.gguf has {size - 100} bytes, and output_norm.weight of shape (64,) in F32 ends at "
    )
    assert message.endswith("; the download may be incomplete")


def test_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "gemma.gguf").write_bytes(b"GGUF" + bytes([1, 0, 0, 0]) + bytes(100))
    expected = "gemma.gguf is GGUF of version 1; take one of version 3"
    assert refusal(lambda: load_text_encoder(tmp_path / "gemma.gguf")) == expected


def test_the_container_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    def of_every_type(writer: gguf.GGUFWriter) -> None:
        for i, kind in enumerate(("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")):
            getattr(writer, f"add_{kind}")(f"test.{kind}", 100 + i)
        writer.add_float32("test.float", 0.5)
        writer.add_float64("test.double", -2.5)
        writer.add_bool("test.bool", True)
        writer.add_array("test.bools", [True, False])
        writer.add_array("test.numbers", [-1, 2])
        writer.add_custom_alignment(64)

    tensors = dict(gemma().state_dict())
    path = write_gguf(tmp_path / "gemma.gguf", tensors, lambda name: Kind.Q4_0, change=of_every_type)
    theirs, ours = gguf.GGUFReader(path), read_container(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.fields == fields
    assert [(t.name, t.shape, t.kind, t.start) for t in ours.tensors] == [
        (t.name, tuple(map(int, reversed(t.shape))), t.tensor_type, t.data_offset) for t in theirs.tensors
    ]


def test_another_model_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", dict(gemma().state_dict()), lambda name: Kind.F16, architecture="gemma3")
    expected = "x.gguf is a GGUF of gemma3; give one of gemma-2-2b-it, or a safetensors file"
    assert refusal(lambda: load_text_encoder(path)) == expected
    assert refusal(lambda: describe_file(path)) == expected
    assert refusal(lambda: load_transformer(path)) == "x.gguf is GGUF, which SANA is not read from; use safetensors"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    def fewer(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["gemma2.block_count"]

    tensors = dict(gemma().state_dict())
    path = write_gguf(tmp_path / "a.gguf", tensors, lambda name: Kind.F16, change=fewer)
    assert refusal(lambda: load_text_encoder(path)) == "a.gguf lacks gemma2.block_count; download it again"
    del tensors["layers.1.mlp.up_proj.weight"]
    path = write_gguf(tmp_path / "b.gguf", tensors, lambda name: Kind.F16)
    expected = "b.gguf lacks 1 of 35 tensors, first layers.1.mlp.up_proj.weight; the download may be incomplete"
    assert refusal(lambda: load_text_encoder(path)) == expected


def test_another_tokenizer_is_named(tmp_path: Path) -> None:
    def of_bytes(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["tokenizer.ggml.model"]
        writer.add_tokenizer_model("gpt2")

    def fewer(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["tokenizer.ggml.scores"]
        writer.add_token_scores([0.0, 1.0])

    tensors = dict(gemma().state_dict())
    path = write_gguf(tmp_path / "a.gguf", tensors, lambda name: Kind.F16, change=of_bytes)
    expected = "a.gguf has a tokenizer that is not of sentencepiece, as Gemma's is; take another file"
    assert refusal(lambda: load_text_encoder(path)) == expected
    path = write_gguf(tmp_path / "b.gguf", tensors, lambda name: Kind.F16, change=fewer)
    assert refusal(lambda: load_text_encoder(path)) == "b.gguf has 600 tokens with 2 scores; download it again"


def test_blocks_that_the_package_does_not_unpack_are_named(tmp_path: Path) -> None:
    def odd(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("odd.weight", np.zeros((1, 40), dtype=np.uint8), raw_dtype=Kind.Q8_1)

    path = write_gguf(tmp_path / "a.gguf", dict(gemma().state_dict()), lambda name: Kind.F16, change=odd)
    assert refusal(lambda: read_gguf(path)) == (
        "a.gguf has odd.weight in Q8_1, which the package gguf does not unpack; take a file in Q8_0 or Q4_K_M"
    )
    content = path.read_bytes()
    place = content.index(b"odd.weight") + len(b"odd.weight") + 4 + 2 * 8
    path.write_bytes(content[:place] + bytes([99, 0, 0, 0]) + content[place + 4 :])
    assert refusal(lambda: read_gguf(path)) == (
        "a.gguf has odd.weight in 99, which the package gguf does not unpack; take a file in Q8_0 or Q4_K_M"
    )


def test_a_file_is_told_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"GGUF\3\0")
    (tmp_path / "b.gguf").write_bytes(b"GGU")
    found = [is_gguf(tmp_path / name) for name in ("a.safetensors", "b.gguf", "c.gguf")] + [is_gguf(tmp_path)]
    assert found == [True, False, False, False]
