"""GGUF files that are damaged or made to do harm: one sentence, within 2 s and 200 MB."""

import random
import re
import resource
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import pytest
from gguf import GGMLQuantizationType as Kind

from sana import CheckpointError, load_text_encoder
from sana.checkpoints.gguf_container import read_container
from tests.sana.gguf_writer import write_gguf
from tests.sana.models import gemma

SECONDS, BYTES = 2, 200e6
LONGEST = 400  # letters of a sentence
MUTATIONS = 300
UINT8, INT32, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 5, 4, 6, 7, 8, 9, 10  # types of values


@contextmanager
def bounded() -> Iterator[None]:
    """Fails for what takes longer, or more memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert time.monotonic() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def refusal(path: Path, read: Callable[[Path], object] = load_text_encoder) -> str:
    with bounded(), pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < LONGEST
    return message


# Containers, written byte by byte


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str, *shape: int, kind: int = 0, start: int = 0, axes: int | None = None) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return (
        text(name) + struct.pack("<I", len(shape) if axes is None else axes) + sizes + struct.pack("<IQ", kind, start)
    )


def container(*parts: bytes, fields: int = 0, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(parts) + bytes(4096)


def aligned(kind: int, value: bytes) -> bytes:
    return container(field("general.alignment", kind, value), tensor("a", 8), fields=1, tensors=1)


UNREADABLE = {
    "2^60 fields": (container(fields=2**60), f"it has 0 tensors and {2**60} fields, and no model has more than 16384"),
    "2^60 tensors": (
        container(tensors=2**60),
        f"it has {2**60} tensors and 0 fields, and no model has more than 16384",
    ),
    "one field more": (container(fields=16385), "it has 0 tensors and 16385 fields, and no model has more than 16384"),
    "array of 2^60 numbers": (
        container(field("a", ARRAY, array(FLOAT32, 2**60)), fields=1),
        f"{2**62} bytes are asked for at 49 of 4145",
    ),
    "array of 2^60 texts": (
        container(field("a", ARRAY, array(STRING, 2**60, struct.pack("<Q", 2**40))), fields=1),
        f"{2**40} bytes are asked for at 57 of 4153",
    ),
    "array in an array": (
        container(field("a", ARRAY, array(ARRAY, 1, array(UINT8, 1, b"1"))), fields=1),
        "there is a value of type 9 at 49",
    ),
    "arrays without end": (
        container(field("a", ARRAY, array(ARRAY, 1) * 100_000), fields=1),
        "there is a value of type 9 at 49",
    ),
    "name of a gigabyte": (
        container(struct.pack("<Q", 2**30), fields=1),
        f"{2**30} bytes are asked for at 32 of 4128",
    ),
    "name that is no text": (
        container(struct.pack("<Q", 2), b"\xff\xfe", fields=1),
        "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ),
    "unknown type": (container(field("a", 77, b""), fields=1), "there is a value of type 77 at 37"),
    "array of an unknown type": (
        container(field("a", ARRAY, array(13, 1)), fields=1),
        "there is a value of type 13 at 49",
    ),
    "a field twice": (container(*2 * [field("a", UINT8, b"1")], fields=2), "it has 'a' twice"),
    "a tensor twice": (container(*2 * [tensor("a", 8)], tensors=2), "it has 'a' twice"),
    "alignment 0": (aligned(UINT32, struct.pack("<I", 0)), "its tensors are aligned to '0' bytes"),
    "alignment 4": (aligned(UINT32, struct.pack("<I", 4)), "its tensors are aligned to '4' bytes"),
    "alignment 2^40": (aligned(UINT64, struct.pack("<Q", 2**40)), f"its tensors are aligned to '{2**40}' bytes"),
    "negative alignment": (aligned(INT32, struct.pack("<i", -32)), "its tensors are aligned to '-32' bytes"),
    "broken alignment": (aligned(FLOAT32, struct.pack("<f", 32)), "its tensors are aligned to '32.0' bytes"),
    "alignment in words": (aligned(STRING, text("32")), "its tensors are aligned to '32' bytes"),
    "alignment true": (aligned(BOOL, b"\1"), "its tensors are aligned to 'True' bytes"),
    "tensor between": (container(tensor("a", 8, start=16), tensors=1), "'a' does not begin at a multiple of 32 bytes"),
    "no axes": (container(tensor("a"), tensors=1), "'a' has 0 axes, of ()"),
    "2^32 axes": (
        container(tensor("a", 8, 8, 8, 8, axes=2**32 - 1), tensors=1),
        f"'a' has {2**32 - 1} axes, of (8, 8, 8, 8)",
    ),
    "nothing in a tensor": (container(tensor("a", 8, 0), tensors=1), "'a' has 2 axes, of (8, 0)"),
    "cut in a name": (container(fields=1)[:30], "unpack_from requires a buffer of at least 32 bytes for unpacking 8 "),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_container_that_cannot_be_is_named(tmp_path: Path, case: str) -> None:
    content, message = UNREADABLE[case]
    path = tmp_path / "gemma.gguf"
    path.write_bytes(content)
    found = refusal(path)
    assert found.startswith(f"gemma.gguf is not a readable GGUF file ({message}")
    assert found.endswith("); download it again")


def test_containers_at_the_bounds_are_read(tmp_path: Path) -> None:
    """Four axes, an alignment of 8, and as many fields as there may be."""
    path = tmp_path / "a.gguf"
    fields = [
        field("general.alignment", UINT32, struct.pack("<I", 8)),
        *(field(str(i), UINT8, b"1") for i in range(16383)),
    ]
    path.write_bytes(container(*fields, tensor("a", 1, 2, 3, 4, start=24), fields=16384, tensors=1))
    found = read_container(path)
    assert len(found.fields) == 16384
    place = len(path.read_bytes()) - 4096
    assert found.tensors == [("a", (4, 3, 2, 1), 0, -(-place // 8) * 8 + 24)]


# Files of a Gemma-2, with one thing wrong


@cache
def small() -> bytes:
    """A file of a Gemma-2."""
    with TemporaryDirectory() as folder:
        path = write_gguf(Path(folder, "a.gguf"), dict(gemma().state_dict()), lambda name: Kind.Q8_0)
        return path.read_bytes()


def with_field(key: str, value: object, kind: gguf.GGUFValueType, sub: gguf.GGUFValueType | None = None) -> bytes:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind, sub)

    with TemporaryDirectory() as folder:
        path = Path(folder, "a.gguf")
        return write_gguf(path, dict(gemma().state_dict()), lambda name: Kind.Q8_0, change=change).read_bytes()


TYPES = gguf.GGUFValueType
CONFIG = "; take its original config.json"
FIELDS = {
    "10^8 blocks": (
        ("gemma2.block_count", 10**8, TYPES.UINT32),
        f"num_hidden_layers '100000000', which no Gemma-2 has{CONFIG}",
    ),
    "a block more": (
        ("gemma2.block_count", 4, TYPES.UINT32),
        f"3 layers, and its configuration tells of 4{CONFIG}",
    ),
    "blocks in words": (
        ("gemma2.block_count", "3", TYPES.STRING),
        f"num_hidden_layers '3', which no Gemma-2 has{CONFIG}",
    ),
    "blocks that are true": (
        ("gemma2.block_count", True, TYPES.BOOL),
        f"num_hidden_layers 'True', which no Gemma-2 has{CONFIG}",
    ),
    "heads in a list": (
        ("gemma2.attention.head_count", [4], TYPES.ARRAY, TYPES.UINT32),
        f"num_attention_heads '[4]', which no Gemma-2 has{CONFIG}",
    ),
    "no heads": (
        ("gemma2.attention.head_count", 0, TYPES.UINT32),
        f"num_attention_heads '0', which no Gemma-2 has{CONFIG}",
    ),
    "a width of 2^63": (
        ("gemma2.embedding_length", 2**63, TYPES.UINT64),
        f"hidden_size '{2**63}', which no Gemma-2 has{CONFIG}",
    ),
    "an epsilon that is no number": (
        ("gemma2.attention.layer_norm_rms_epsilon", float("nan"), TYPES.FLOAT32),
        f"rms_norm_eps 'nan', which no Gemma-2 has{CONFIG}",
    ),
    "tokens that are numbers": (
        ("tokenizer.ggml.tokens", [1] * 600, TYPES.ARRAY, TYPES.INT32),
        "tokenizer.ggml.tokens that are no list of at most 1048576 str; download it again",
    ),
    "one token": (
        ("tokenizer.ggml.tokens", "a", TYPES.STRING),
        "tokenizer.ggml.tokens that are no list of at most 1048576 str; download it again",
    ),
    "scores in words": (
        ("tokenizer.ggml.scores", ["a"] * 600, TYPES.ARRAY, TYPES.STRING),
        "tokenizer.ggml.scores that are no list of at most 1048576 float; download it again",
    ),
    "types with a fraction": (
        ("tokenizer.ggml.token_type", [1.0] * 600, TYPES.ARRAY, TYPES.FLOAT32),
        "tokenizer.ggml.token_type that are no list of at most 1048576 int; download it again",
    ),
    "a token of no type": (
        ("tokenizer.ggml.token_type", [1] * 599 + [7], TYPES.ARRAY, TYPES.INT32),
        "a token of type 7, which sentencepiece has not; download it again",
    ),
    "a token below all types": (
        ("tokenizer.ggml.token_type", [0] * 600, TYPES.ARRAY, TYPES.INT32),
        "a token of type 0, which sentencepiece has not; download it again",
    ),
    "a role of no token": (
        ("tokenizer.ggml.bos_token_id", 600, TYPES.UINT32),
        "tokenizer.ggml.bos_token_id '600' of 600 tokens; download it again",
    ),
    "a role below all tokens": (
        ("tokenizer.ggml.eos_token_id", -1, TYPES.INT32),
        "tokenizer.ggml.eos_token_id '-1' of 600 tokens; download it again",
    ),
    "a role in words": (
        ("tokenizer.ggml.unknown_token_id", "3", TYPES.STRING),
        "tokenizer.ggml.unknown_token_id '3' of 600 tokens; download it again",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_of_a_wrong_type_or_size_is_named(tmp_path: Path, case: str) -> None:
    change, message = FIELDS[case]
    path = tmp_path / "gemma.gguf"
    path.write_bytes(with_field(*change))
    assert refusal(path) == f"gemma.gguf has {message}"


def test_an_architecture_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "gemma.gguf"
    path.write_bytes(container(field("general.architecture", ARRAY, array(UINT8, 4000, bytes(4000))), fields=1))
    assert refusal(path).startswith("gemma.gguf is a GGUF of [0, 0, ")


def of_tensor(name: str, place: str, value: bytes) -> bytes:
    """The small file with some bytes of what it tells of a matrix changed."""
    content = bytearray(small())
    start = content.index(text(name))
    start += {"name": 8, "shape": 8 + len(name) + 4, "kind": 8 + len(name) + 4 + 16, "start": 8 + len(name) + 4 + 20}[
        place
    ]
    content[start : start + len(value)] = value
    return bytes(content)


Q = "blk.0.attn_q.weight"
TENSORS = {
    "an offset beyond the file": (
        of_tensor(Q, "start", struct.pack("<Q", 2**60)),
        rf"has \d+ bytes, and {Q} of shape \(64, 64\) in Q8_0 ends at {2**60 // 10**6}\d+; the download may be incomplete",
    ),
    "2^60 columns": (
        of_tensor(Q, "shape", struct.pack("<Q", 2**60)),
        rf"has \d+ bytes, and {Q} of shape \(64, {2**60}\) in Q8_0 ends at \d+; the download may be incomplete",
    ),
    "columns that no block divides": (
        of_tensor(Q, "shape", struct.pack("<Q", 63)),
        rf"has \d+ bytes, and {Q} of shape \(64, 63\) in Q8_0 ends at \d+; the download may be incomplete",
    ),
    "fewer rows": (
        of_tensor(Q, "shape", struct.pack("<QQ", 64, 32)),
        r": tensor layers.0.self_attn.q_proj.weight has shape \(32, 64\) instead of \(64, 64\); it is another model or .*",
    ),
    "2^31 of kinds": (
        of_tensor(Q, "kind", struct.pack("<I", 2**31)),
        f"has {Q} in {2**31}, which the package gguf does not unpack; take a file in Q8_0 or Q4_K_M",
    ),
    "whole numbers": (
        of_tensor(Q, "kind", struct.pack("<I", Kind.I8)),
        f"has {Q} in I8, which the package gguf does not unpack; take a file in Q8_0 or Q4_K_M",
    ),
    "a block without a number": (
        of_tensor(Q, "name", b"blk.attn_q.0.weight"),
        r"lacks 1 of 35 tensors, first layers.0.self_attn.q_proj.weight; the download may be incomplete",
    ),
    "a block with digits of another script": (
        of_tensor(Q, "name", "blk.\u0663.attnq.weight".encode()),
        r"lacks 1 of 35 tensors, first layers.0.self_attn.q_proj.weight; the download may be incomplete",
    ),
    "a block of 99,999": (
        of_tensor(Q, "name", b"blk.99999.attn_q.up"),
        "has layers.99999, and no model goes beyond layers.255; it is another model",
    ),
    "a name without a dot": (
        of_tensor("token_embd.weight", "name", b"token_embd_weight"),
        r"has vocab_size '0', which no Gemma-2 has; take its original config.json",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_cannot_be_is_named(tmp_path: Path, case: str) -> None:
    content, message = TENSORS[case]
    path = tmp_path / "gemma.gguf"
    path.write_bytes(content)
    found = refusal(path).removeprefix("gemma.gguf").strip()
    assert re.fullmatch(message, found), found


# Chance


def mutated(number: int) -> bytes:
    """The small file with one to three changes, mostly before its numbers."""
    chance, content = random.Random(number), bytearray(small())
    end = content.index(b"token_embd.weight") + 3000
    for _ in range(chance.choice((1, 1, 2, 3))):
        place = chance.randrange(4, min(end, len(content)) if chance.random() < 0.9 else len(content))
        size = chance.choice((1, 2, 4, 8, 40))
        kind = chance.randrange(6)
        if kind == 0:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[place : place + size] = chance.randbytes(size)
        elif kind == 2:
            extreme = chance.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1))
            content[place : place + 8] = struct.pack("<Q", extreme)
        elif kind == 3:
            del content[place : place + size]
        elif kind == 4:
            content[place:place] = content[place : place + size]
        elif number % 2:
            del content[max(place, 100) :]
    return bytes(content)


def test_a_file_changed_by_chance_is_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    path, refused = tmp_path / "gemma.gguf", 0
    small()
    for number in range(MUTATIONS):
        path.write_bytes(mutated(number))
        try:
            with bounded():
                load_text_encoder(path)
        except CheckpointError as error:
            refused += 1
            assert "gemma.gguf" in str(error) and "; " in str(error) and "\n" not in str(error), (number, str(error))
        except BaseException as error:
            raise AssertionError(f"mutation {number}: {error!r}") from error
    assert MUTATIONS / 2 < refused < MUTATIONS
