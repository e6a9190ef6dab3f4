"""Tokenizers: the ids of the libraries for what a Gemma-2 has, one sentence for what it has not."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import GemmaTokenizer

from sana.text.tokenizers import (
    BOS,
    DECODER,
    END_OF_TURN,
    EOS,
    NORMALIZER,
    PAD,
    START_OF_TURN,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    written,
)
from tests.sana.models import (
    GEMMA,
    PROMPTS,
    reference_tokenizer,
    talking_tokenizer_json,
    tokenizer_json,
    tokenizer_model,
)

GEMMA_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
RUNAWAY = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
PANIC = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


def content(**parts: object) -> dict[str, object]:
    """The parts of a `tokenizer.json`, with some replaced."""
    return {**json.loads(tokenizer_json()), **parts}


def with_model(**settings: object) -> dict[str, object]:
    return content(model={**content()["model"], **settings})


def encoded(parts: object) -> bytes:
    return json.dumps(parts).encode()


def library_ids(source: bytes, text: str) -> list[int]:
    return tokenizers.Tokenizer.from_buffer(source).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "parts",
    [
        content(),
        content(pre_tokenizer=GEMMA_SPLIT),
        content(pre_tokenizer=None),
        content(post_processor=None, decoder=None),
        with_model(merges=[" ".join(pair) for pair in content()["model"]["merges"]]),
        with_model(fuse_unk=True, ignore_merges=True, dropout=0.0, continuing_subword_prefix="", end_of_word_suffix=""),
    ],
    ids=["trained here", "split of Gemma", "no split", "no decoder", "older merges", "empty settings"],
)
def test_ids_are_those_of_the_library(parts: dict[str, object]) -> None:
    source = encoded(parts)
    tokenizer = JsonTokenizer(source)
    assert tokenizer.source == source and tokenizer.size == GEMMA.vocab_size
    for prompt in PROMPTS:
        assert tokenizer.encode(prompt) == [2, *library_ids(source, prompt)]
        assert tokenizer.backend.decode(tokenizer.encode(prompt)[1:]) == prompt


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_what_transformers_saves_is_read(tmp_path: Path, name: str) -> None:
    """Of its general class, and of that of Gemma, which it makes of a sentencepiece file."""
    (tmp_path / name).write_bytes(tokenizer_json() if name == "tokenizer.json" else tokenizer_model())
    reference = reference_tokenizer(tmp_path)
    assert isinstance(reference, GemmaTokenizer) == (name == "tokenizer.model")
    reference(PROMPTS[0], padding="max_length", max_length=50, truncation=True)  # which it stores
    reference.save_pretrained(tmp_path / "saved")
    tokenizer = JsonTokenizer((tmp_path / "saved" / "tokenizer.json").read_bytes())
    for prompt in PROMPTS:
        assert tokenizer.encode(prompt) == reference.encode(prompt)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "it has no vocabulary"),
        (content(model=None), "it has no vocabulary"),
        (with_model(vocab={}), "it has no vocabulary"),
        (with_model(vocab=["a"]), "it has no vocabulary"),
        (with_model(vocab={"a": "0"}), "it has no vocabulary"),
        (with_model(vocab={"a": True}), "it has no vocabulary"),
        (with_model(type="WordPiece"), "its model is not the plain BPE of a Gemma-2"),
        (with_model(dropout=0.1), "its model is not the plain BPE of a Gemma-2"),
        (with_model(continuing_subword_prefix="x" * 100_000), "its model is not the plain BPE of a Gemma-2"),
        (with_model(end_of_word_suffix="</w>"), "its model is not the plain BPE of a Gemma-2"),
        (content(pre_tokenizer=RUNAWAY), "its pre_tokenizer does more than a Gemma-2's, which splits at a fixed text"),
        (content(pre_tokenizer={"type": "Sequence", "pretokenizers": [RUNAWAY]}), "its pre_tokenizer does more"),
        (content(pre_tokenizer={**GEMMA_SPLIT, "type": "ByteLevel"}), "its pre_tokenizer does more"),
        (content(pre_tokenizer={**GEMMA_SPLIT, "pattern": "a"}), "its pre_tokenizer does more"),
        (content(pre_tokenizer={**GEMMA_SPLIT, "pattern": {"String": " ", "Regex": "(a+)+$"}}), "its pre_tokenizer"),
        (content(normalizer=None), "its normalizer is not a Gemma-2's, which puts ▁ for spaces"),
        (content(normalizer=DOUBLING), "its normalizer is not"),
        (content(normalizer={"type": "Sequence", "normalizers": [DOUBLING] * 32}), "its normalizer is not"),
        (content(normalizer={**NORMALIZER, "pattern": {"Regex": "(a+)+$"}}), "its normalizer is not"),
        (content(normalizer={"type": "Lowercase"}), "its normalizer is not"),
        (content(normalizer=PANIC), "its normalizer is not"),
    ],
)
def test_parts_that_no_gemma_has_are_refused(parts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JsonTokenizer(encoded(parts))


def test_a_part_that_is_not_used_does_no_harm() -> None:
    """Nor does the same part given twice, of which two readers may take two."""
    unused = content(post_processor=PANIC, decoder={"type": "Sequence", "decoders": [PANIC]}, padding="a", truncation=1)
    twice = encoded(content()).replace(b'"normalizer":', b'"normalizer": ' + encoded(PANIC) + b', "normalizer":', 1)
    for source in (encoded(unused), twice):
        with pytest.raises(BaseException, match="."):  # the library by itself reads neither
            tokenizers.Tokenizer.from_buffer(source)
        tokenizer = JsonTokenizer(source)
        assert tokenizer.encode(PROMPTS[0]) == JsonTokenizer(tokenizer_json()).encode(PROMPTS[0])
        assert json.loads(tokenizer.backend.to_str())["decoder"]["decoders"][0]["content"] == " "
    assert content()["decoder"] == DECODER


def test_the_size_counts_from_the_largest_id() -> None:
    vocabulary = content()["model"]["vocab"]
    rarest = max(vocabulary, key=vocabulary.get)
    assert JsonTokenizer(encoded(with_model(vocab={**vocabulary, rarest: 10**6}))).size == 10**6 + 1


def test_a_library_that_breaks_down_raises_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """It panics, and what it raises is no Exception: it ended the thread of a host that waited for it."""
    library = tokenizers.Tokenizer
    tokenizer = JsonTokenizer(tokenizer_json())
    tokenizer.backend = library.from_buffer(encoded(content(pre_tokenizer=RUNAWAY)))
    with pytest.raises(ValueError, match="the tokenizers library broke down .*; use the tokenizer.json of the origin"):
        tokenizer.encode("a" * 40 + "!")
    panicking = SimpleNamespace(from_str=lambda checked: library.from_buffer(encoded(content(normalizer=PANIC))))
    monkeypatch.setattr(tokenizers, "Tokenizer", panicking)
    with pytest.raises(ValueError, match="the tokenizers library broke down .*; use the tokenizer.json of the origin"):
        JsonTokenizer(tokenizer_json())


@pytest.mark.parametrize(
    "parts",
    [
        content(added_tokens=[{"id": 5}]),
        with_model(merges=[["a", "nothing that is a piece"]]),
        with_model(vocab={**content()["model"]["vocab"], "a": 2**32}),
    ],
    ids=["added token", "merge", "id"],
)
def test_what_the_library_refuses_is_a_value_error(parts: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="the tokenizers library broke down .*; use the tokenizer.json of the origin"):
        JsonTokenizer(encoded(parts))


def test_an_interrupt_while_a_text_is_encoded_stays_one() -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    tokenizer = JsonTokenizer(tokenizer_json())
    tokenizer.backend = SimpleNamespace(encode=stop)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


def test_tokens_begin_where_their_text_stands() -> None:
    """The first has no text. A letter that takes several tokens, one for each of its bytes, is the text of all of them."""
    tokenizer = JsonTokenizer(tokenizer_json())
    for prompt in PROMPTS:
        starts = tokenizer.starts(prompt)
        assert len(starts) == len(tokenizer.encode(prompt)) and starts[0] == 0 and starts == sorted(starts)
        for k, start in enumerate(starts[1:], 1):
            before = tokenizer.backend.decode(tokenizer.encode(prompt)[1:k])
            assert before.rstrip("�") == prompt[:start]


# sentencepiece


def sentencepiece_model(rule: Path | None, **settings: object) -> bytes:
    """A model that replaces characters by a rule; None: by none. settings: of its training."""
    model = io.BytesIO()
    rules = {"normalization_rule_tsv": str(rule)} if rule else {"normalization_rule_name": "identity"}
    lines = iter(["red circle left of a blue square", "hello world"] * 20)
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 60, **rules, **settings},
    )
    return model.getvalue()


def test_ids_are_those_of_sentencepiece() -> None:
    for source in (tokenizer_model(), sentencepiece_model(None)):
        library = SentencePieceProcessor(model_proto=source)
        tokenizer = SentencePieceTokenizer(source)
        assert tokenizer.size == library.GetPieceSize() > 20 and tokenizer.source == source
        for prompt in PROMPTS:
            assert tokenizer.encode(prompt) == [2, *library.encode(prompt)]


def test_tokens_of_sentencepiece_begin_where_their_text_stands() -> None:
    """With bytes for letters that have no piece, as Gemma has them, and without."""
    bytewise = sentencepiece_model(
        None, byte_fallback=True, vocab_size=320, add_dummy_prefix=False, remove_extra_whitespaces=False
    )
    for source in (tokenizer_model(), bytewise):
        tokenizer = SentencePieceTokenizer(source)
        for prompt in [*PROMPTS, "aé月🐱b", "🐱🐱"]:
            starts = tokenizer.starts(prompt)
            assert len(starts) == len(tokenizer.encode(prompt)) and starts[0] == 0
            for k, start in enumerate(starts[1:], 1):
                before = tokenizer.backend.decode(tokenizer.encode(prompt)[1:k])
                assert before.rstrip("�") == prompt[:start]
    assert SentencePieceTokenizer(bytewise).starts("月é🐱 ")[1:] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]


def test_a_sentencepiece_model_that_makes_texts_longer_is_refused(tmp_path: Path) -> None:
    """Also in the part that turns ids to text, which has the same fields under another number."""
    (tmp_path / "rule.tsv").write_text("61\t" + " ".join(["62"] * 2000))
    source = sentencepiece_model(tmp_path / "rule.tsv")
    assert len(SentencePieceProcessor(model_proto=source).encode("a" * 10)) > 1000 and len(source) < 5000
    assert len(SentencePieceProcessor(model_proto=sentencepiece_model(None)).encode("a" * 10)) < 20
    backward = tokenizer_model() + bytes([5 << 3 | 2, 3, 2 << 3 | 2, 1, 0])
    for found in (source, backward):
        with pytest.raises(ValueError, match=r"^it replaces characters, which a Gemma-2's does not$"):
            SentencePieceTokenizer(found)


@pytest.mark.parametrize("end", [b"\x80", b"\x1a", b"\xff" * 10 + b"\x01", b"\x0b", b"\x1a\xff\xff\x03"])
def test_damaged_fields_are_refused(end: bytes) -> None:
    """Half a number, half a field, a number of more than ten bytes, a group, and a size beyond the end."""
    with pytest.raises((ValueError, RuntimeError)):
        SentencePieceTokenizer(tokenizer_model() + end)


def test_fields_that_are_not_known_are_skipped() -> None:
    """As sentencepiece itself skips them: numbers in three sizes, and bytes."""
    others = bytes([15 << 3 | 0, 1, 15 << 3 | 1, *range(8), 15 << 3 | 5, *range(4), 15 << 3 | 2, 2, 0, 0])
    tokenizer = SentencePieceTokenizer(tokenizer_model() + others)
    assert tokenizer.encode(PROMPTS[0]) == SentencePieceTokenizer(tokenizer_model()).encode(PROMPTS[0])


@pytest.mark.parametrize(
    ("kind", "source"), [(JsonTokenizer, tokenizer_json), (SentencePieceTokenizer, tokenizer_model)]
)
def test_half_of_a_character_is_no_text(kind: type, source: Callable[[], bytes]) -> None:
    """As Python reads a byte of another encoding from a terminal, and "\\ud800" from JSON."""
    with pytest.raises(ValueError) as caught:
        kind(source()).encode("a cat \udcff")
    assert str(caught.value) == "the prompt is no text in UTF-8 from its character 7 on; type it again"


# From tokens to texts

MARKS = (START_OF_TURN, END_OF_TURN)
RARE = "ħ🦊 ü → 𓀀"  # of characters that no text of the vocabulary had: a token for each byte
BOTH = pytest.mark.parametrize(
    "tokenizer",
    [JsonTokenizer(talking_tokenizer_json()), SentencePieceTokenizer(tokenizer_model(*MARKS))],
    ids=["tokenizers", "sentencepiece"],
)


@BOTH
@pytest.mark.parametrize("text", [*PROMPTS, RARE, " two  spaces \n and\n\nlines ", "▁", ""])
def test_the_text_of_tokens_is_the_text_that_they_were_made_of(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(written(tokenizer, ids)) == text.replace("▁", " ")
    assert tokenizer.backend.decode(ids[1:]) == "".join(written(tokenizer, ids)) or isinstance(tokenizer, JsonTokenizer)


@BOTH
def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(RARE)
    pieces = list(written(tokenizer, ids))
    assert len(ids) > len(RARE) + 5  # bytes
    assert len(pieces) >= len(RARE) - 2 and "".join(pieces) == RARE
    assert list(written(tokenizer, tokenizer.encode("𓀀")[:-1])) == ["\ufffd"]  # cut in the middle
    assert "".join(written(tokenizer, [*tokenizer.encode("𓀀")[:-1], *tokenizer.encode("a")])) == "\ufffda"


@BOTH
def test_marks_are_no_text(tokenizer: Tokenizer) -> None:
    start, end = map(tokenizer.find, MARKS)
    assert start is not None and end is not None and start != end
    ids = tokenizer.encode(f"{START_OF_TURN}user\na cat{END_OF_TURN}")
    assert [token for token in ids if token in (start, end)] == [start, end]
    assert "".join(written(tokenizer, [PAD, *ids, EOS, BOS, 3])) == "user\na cat"
    assert list(written(tokenizer, [GEMMA.vocab_size + 5])) == []  # a row of the network without a token


@BOTH
def test_a_piece_is_found_or_not(tokenizer: Tokenizer) -> None:
    assert tokenizer.find("<eos>") == EOS and tokenizer.find("<bos>") == BOS
    assert tokenizer.find("<start_of_image>") is None
    plain = type(tokenizer)(tokenizer_json() if isinstance(tokenizer, JsonTokenizer) else tokenizer_model())
    assert plain.find(END_OF_TURN) is None
