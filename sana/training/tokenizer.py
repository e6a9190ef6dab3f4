"""A small tokenizer of the same kind as Gemma's: byte-pair pieces of words, with bytes for anything else."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ..saving import replacing
from ..text.tokenizers import BOS, PAD

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def train_tokenizer(texts: Iterable[str], size: int, path: Path) -> int:
    """Learn a vocabulary of at most `size` pieces from texts and write it as a `tokenizer.json`. Returns its real size."""
    assert SPECIAL[PAD] == "<pad>" and SPECIAL[BOS] == "<bos>"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    reserved = [*SPECIAL, *BYTES]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[AddedToken(token, special=True) for token in reserved]
    )
    tokenizer.train_from_iterator(texts, trainer)
    # For transformers and diffusers; our own encoder puts this token first by itself.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    with replacing(path) as unfinished:
        unfinished.write_text(tokenizer.to_str(pretty=True), encoding="utf-8", newline="\n")
    return tokenizer.get_vocab_size()
