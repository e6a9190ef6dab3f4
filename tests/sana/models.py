"""Whole tiny models with random weights, large enough that the text shows in a picture, and the files they come in."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, PreTrainedTokenizerFast

from sana.checkpoints.text_encoder import gemma_json
from sana.checkpoints.writing import scheduler_json, write_pipeline
from sana.config import GemmaConfig, TransformerConfig, TransformerIdentity
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.tiny_decoder import TinyDecoder
from sana.networks.transformer import SanaTransformer
from sana.saving import write_json
from sana.text.gemma import Gemma2
from sana.text.prompt import INSTRUCTION
from sana.text.text_encoder import GemmaTextEncoder
from sana.text.tokenizers import BOS, END_OF_TURN, START_OF_TURN, JsonTokenizer
from sana.training.tokenizer import train_tokenizer
from tests.sana.twins import randomise, tiny_autoencoder_config, tiny_config

TEXT_WIDTH = 64
PROMPTS = (
    "A red circle left of a blue square.",
    'a "neon sign" above the door, two  spaces',
    "一只穿着宇航服的猫在月球上",
    "🐱👩‍🚀 a cat with an astronaut",
    "ein Mädchen, 夕阳, sunset 🌅, déjà vu",
)
GEMMA = GemmaConfig(
    vocab_size=600,
    hidden_size=TEXT_WIDTH,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=16,
    attn_logit_softcapping=10.0,
    final_logit_softcapping=3.0,
)
TRANSFORMER = replace(tiny_config("sana-0.6b-1024px"), text_width=TEXT_WIDTH)
SPRINT = replace(tiny_config("sana-sprint-0.6b-1024px"), text_width=TEXT_WIDTH)


def gemma(**changes: object) -> Gemma2Model:
    """transformers' own network, with attention logits so large that soft-capping matters."""
    torch.manual_seed(0)
    model = Gemma2Model(Gemma2Config(**{**gemma_json(GEMMA), **changes}, attn_implementation="eager"))
    for name, parameter in model.named_parameters():
        gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
        # Gemma's norms multiply by 1 + weight
        nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else gain / parameter.shape[1] ** 0.5)
    return model.eval().requires_grad_(False)


def text_encoder() -> GemmaTextEncoder:
    """Ours, with the weights of `gemma`."""
    model = Gemma2(GEMMA, device="meta")
    model.load_state_dict(gemma().state_dict(), assign=True)
    return GemmaTextEncoder(model.eval().requires_grad_(False), JsonTokenizer(tokenizer_json()))


def writer() -> GemmaTextEncoder:
    """The same with a vocabulary that has marks for turns, as of an encoder that was trained to write."""
    return GemmaTextEncoder(text_encoder().model, JsonTokenizer(talking_tokenizer_json()))


def transformer(config: TransformerConfig = TRANSFORMER) -> SanaTransformer:
    torch.manual_seed(0)
    return randomise(SanaTransformer(config))


def autoencoder() -> DCAutoencoder:
    torch.manual_seed(0)
    return randomise(DCAutoencoder(tiny_autoencoder_config("dc-ae-f32c32-sana-1.1", depth=1)))


def write_model(folder: Path, config: TransformerConfig = TRANSFORMER, *, talking: bool = False) -> Path:
    """A whole model in the layout of a diffusers pipeline. A Sprint one has the scheduler of another, which is not read.

    talking: its vocabulary has marks for turns, as of a text encoder that writes.
    """
    tokenizer = folder / "trained.json"
    tokenizer.write_bytes(talking_tokenizer_json() if talking else tokenizer_json())
    flow_shift = None if config.guidance_embed else 2.0
    write_pipeline(
        folder,
        transformer(config),
        autoencoder(),
        text_encoder(),
        tokenizer=tokenizer,
        identity=TransformerIdentity(config, "custom", 64, flow_shift, "float32", "training"),
    )
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json(2.0))
    return folder


def write_text_encoder(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A Gemma that writes in the layout of Hugging Face."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", gemma_json(GEMMA))
    (folder / "tokenizer.json").write_bytes(talking_tokenizer_json())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@cache
def tokenizer_json() -> bytes:
    """A `tokenizer.json` of the tokenizers library."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        train_tokenizer(_corpus(), GEMMA.vocab_size, path)
        return path.read_bytes()


@cache
def talking_tokenizer_json() -> bytes:
    """The same with marks for turns, in the place of its last two pieces."""
    content = json.loads(tokenizer_json())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    for i, mark in enumerate((START_OF_TURN, END_OF_TURN), start=GEMMA.vocab_size - 2):
        (piece,) = (piece for piece, token in vocabulary.items() if token == i)
        del vocabulary[piece]
        merges[:] = [pair for pair in merges if "".join(pair) != piece and piece not in pair]
        vocabulary[mark] = i
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": i, "content": mark, "special": True, **flags})
    return json.dumps(content).encode()


@cache
def tokenizer_model(*pieces: str) -> bytes:
    """A `tokenizer.model` of sentencepiece, trained with the settings of Gemma's. pieces: in it whatever the texts hold."""
    model, specials = io.BytesIO(), ("pad", "eos", "bos", "unk")
    SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=GEMMA.vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n", *pieces],
        minloglevel=2,
        **{f"{name}_id": i for i, name in enumerate(specials)},
        **{f"{name}_piece": f"<{name}>" for name in specials},
    )
    return model.getvalue()


def reference_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of a folder with a `tokenizer.json` or a `tokenizer.model`, set as Gemma's configuration sets it."""
    if (folder / "tokenizer.json").exists():
        specials = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **specials)
    else:
        tokenizer = GemmaTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.padding_side = "right"
    return tokenizer


def reference_text(
    model: Gemma2Model, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], instruction: str | None
) -> tuple[Tensor, Tensor]:
    """NVlabs/Sana app/sana_pipeline.py: pairs padded to n + 298 and run in full; the first row and the last 299 are kept.

    Without instruction, prompts are padded to 300. Returns text (B, 300, C) and text_mask (B, 300).
    """
    length = len(tokenizer.encode(instruction)) + 300 - 2 if instruction else 300
    pairs = [(instruction or "") + prompt.strip() for prompt in prompts]
    tokens = tokenizer(pairs, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    rows = [0, *range(-299, 0)]
    mask = tokens.attention_mask
    return model(tokens.input_ids, attention_mask=mask)[0][:, rows], mask[:, rows].bool()


def _corpus() -> list[str]:
    return [line for text in (INSTRUCTION, *PROMPTS) for line in text.splitlines()] * 2


def tiny_decoder() -> TinyDecoder:
    """A random TAESANA, most of whose pixels are neither black nor white."""
    network = randomise(TinyDecoder(), seed=0).eval().requires_grad_(False)
    raw = nn.Sequential.forward(network, 2 * torch.randn(1, 32, 3, 3, generator=torch.Generator().manual_seed(0)))
    last = network[-1]
    last.weight /= 4 * raw.std()
    last.bias.copy_((last.bias - raw.mean()) / (4 * raw.std()) + 0.5)
    return network
