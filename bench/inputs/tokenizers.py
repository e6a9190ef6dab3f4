"""Tokenizers that are damaged, of another kind, or run away."""

import json
import struct
from pathlib import Path
from random import Random

from .damage import damaged_bytes, damaged_json, damaged_value, json_bytes, nasty
from .originals import Damaged, link_tree


def tokenizers(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A text encoder with a tokenizer that is damaged, of another kind, or runs away."""
    encoder = folder / "text_encoder"
    link_tree(originals / "model" / "text_encoder", encoder)
    source = (originals / "tokenizer.json").read_bytes()
    change = rng.randrange(8)
    if change < 2:
        (encoder / "tokenizer.json").write_bytes(damaged_json(rng, source))
    elif change < 6:
        whole = json.loads(source)
        content = dict(whole)
        for _ in range(rng.choice((1, 1, 2))):
            part = rng.choice(("normalizer", "pre_tokenizer", "decoder", "post_processor", "model", "added_tokens"))
            content[part] = _tokenizer_part(rng, part, whole[part])
        (encoder / "tokenizer.json").write_bytes(json_bytes(rng, content))
    else:
        model = _sentencepiece(rng, json.loads(source)["model"]["vocab"])
        (encoder / "tokenizer.model").write_bytes(model if rng.random() < 0.3 else damaged_bytes(rng, model))
    (encoder / "tokenizer_config.json").write_bytes(
        damaged_json(rng, (originals / "model" / "tokenizer" / "tokenizer_config.json").read_bytes())
    )
    return Damaged(encoder, "text_encoder")


def _tokenizer_part(rng: Random, part: str, old: object) -> object:
    """Another part for a `tokenizer.json`."""
    pattern = rng.choice(
        (
            *({"Regex": "(a+)+$"}, {"Regex": "(.*)*\\1"}, {"Regex": "(?:a{999}){999}"}, {"Regex": "("}),
            *({"String": " "}, {"String": ""}, {"String": "a"}, {"Regex": ""}, nasty(rng)),
        )
    )
    behavior = rng.choice(("Isolated", "Removed", "MergedWithNext", "MergedWithPrevious", "Contiguous", nasty(rng)))
    doubling = {"type": "Replace", "pattern": pattern, "content": rng.choice(("aa", "a" * 1000, ""))}
    parts = {
        "normalizer": (
            *({"type": name} for name in ("NFC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel", "a")),
            *(doubling, {"type": "Sequence", "normalizers": [doubling] * 32}, {"type": "Prepend", "prepend": "a" * 99}),
            *({"type": "Precompiled", "precompiled_charsmap": text} for text in ("AAAA", "", "//////////8=")),
            *(None, nasty(rng), {"type": "Strip", "strip_left": True, "strip_right": True}),
        ),
        "pre_tokenizer": (
            *({"type": name} for name in ("Whitespace", "BertPreTokenizer", "UnicodeScripts", "WhitespaceSplit", "a")),
            {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": rng.random() < 0.5},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            {"type": "Digits", "individual_digits": True},
            {"type": "FixedLength", "length": rng.choice((0, 1, 5))},
            *(None, nasty(rng)),
        ),
        "decoder": (
            *({"type": name} for name in ("ByteFallback", "Fuse", "a")),
            *({"type": "Replace", "pattern": pattern, "content": "a"}, {"type": "CTC", "pad_token": "", "cleanup": 1}),
            *(None, nasty(rng)),
        ),
        "post_processor": (
            {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
            {"type": "BertProcessing", "sep": ["a", 10**9], "cls": ["a", -1]},
            *(None, nasty(rng), damaged_value(rng, old)),
        ),
    }
    if part == "added_tokens":
        return rng.choice(
            (nasty(rng), damaged_value(rng, old[:5]), [{**old[0], **_added(rng)}, *old], _many(rng, old[0]))
        )
    if part in parts:
        return rng.choice(parts[part])
    return _tokenizer_model(rng, old)


def _added(rng: Random) -> dict[str, object]:
    content = rng.choice(("a", "", "red circle", " ", "\0", "x" * 10_000, "▁"))
    flags = {name: rng.random() < 0.5 for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return {"id": rng.choice((0, 5, 399, 400, 10**6, 2**32 - 1, 2**32, -1)), "content": content, **flags}


def _many(rng: Random, token: dict[str, object]) -> list[dict[str, object]]:
    return [{**token, "id": i, "content": f"{'a' * (i % 50)}{i}"} for i in range(rng.choice((400, 5000)))]


def _tokenizer_model(rng: Random, old: dict[str, object]) -> object:
    vocabulary, merges = old["vocab"], old["merges"]
    last = max(vocabulary, key=vocabulary.get)
    return rng.choice(
        (
            {
                **old,
                "vocab": {**vocabulary, last: rng.choice((400, 10**6, 2**32 - 1, 2**32, -1, 1.5, "a", None, True))},
            },
            {**old, "vocab": {**vocabulary, rng.choice(sorted(vocabulary)): rng.randrange(500)}},
            {**old, "vocab": dict(sorted(vocabulary.items())[: rng.randrange(len(vocabulary))])},
            {**old, "merges": [*merges, rng.choice((["a", "nothing"], ["a"], "a b c", [1, 2], ["", "a"], "a b"))]},
            {**old, "merges": merges[::-1] * rng.choice((1, 2))},
            {**old, "dropout": rng.choice((0.5, 1.0, 2.0, -1, "a"))},
            {**old, "unk_token": rng.choice(("nothing", "", None, 1, "a")), "fuse_unk": True},
            {**old, "byte_fallback": rng.choice((False, 1, None)), "ignore_merges": rng.random() < 0.5},
            {
                **old,
                rng.choice(("continuing_subword_prefix", "end_of_word_suffix")): rng.choice(("##", "x" * 10**5, 1)),
            },
            {"type": "Unigram", "unk_id": rng.choice((0, 9, None)), "vocab": [["a", -1.0], ["b", 0.0]]},
            {"type": "WordPiece", "vocab": vocabulary, "unk_token": "a", "max_input_chars_per_word": 9},
            {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"},
            damaged_value(rng, {**old, "vocab": dict(list(vocabulary.items())[:5]), "merges": merges[:5]}),
            nasty(rng),
        )
    )


def _sentencepiece(rng: Random, vocabulary: dict[str, int]) -> bytes:
    """A `tokenizer.model` in protobuf, with parts that Gemma's has not."""

    def field(number: int, content: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(content)) + content

    kinds = {"<unk>": 2, "<pad>": 3, "<bos>": 3, "<eos>": 3}
    pieces = b"".join(
        field(
            1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", -index) + b"\x18" + bytes([_kind(piece, kinds)])
        )
        for piece, index in sorted(vocabulary.items(), key=lambda pair: pair[1])
    )
    trainer = b"\x18" + bytes([rng.choice((1, 2, 2, 2, 3, 4, 9))]) + b"\xf8\x02" + bytes([rng.choice((1, 0, 9))])
    ids = b"\xc0\x02\x03\xc8\x02\x02\xd0\x02\x01\xd8\x02\x00"
    normalizer = field(1, b"identity") + b"\x18\x00\x20\x00"
    if rng.random() < 0.5:
        normalizer += field(2, rng.choice((b"", b"\4\0\0\0aaaa", rng.randbytes(300), b"\0" * 5000)))
    more = rng.choice((b"", field(5, normalizer), field(3, normalizer), field(9, b"a"), b"\x1b", b"\xff" * 12))
    return pieces * rng.choice((1, 1, 1, 2)) + field(2, trainer + ids) + field(3, normalizer) + more


def _kind(piece: str, kinds: dict[str, int]) -> int:
    return 6 if piece.startswith("<0x") else kinds.get(piece, 1)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
