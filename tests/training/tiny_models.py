"""Models of transformers with random weights, small enough for a test: they see, and what they say means nothing."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 32, "patch_size": 8},
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)


def write_clip(folder: Path) -> Path:
    names = [*BYTES, *(f"{byte}</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    start, end = len(names) - 2, len(names) - 1
    special = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    text = {**TEXT, **special, "vocab_size": len(names), "max_position_embeddings": 77}
    tokenizer = CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # pictures and captions that are told apart
    model.save_pretrained(folder)
    CLIPProcessor(_image_processor(CLIPImageProcessor), tokenizer).save_pretrained(folder)
    return folder


def write_llava(folder: Path) -> Path:
    """One that is asked in a chat."""
    tokenizer = _tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = {"model_type": "llama", **TEXT, "vocab_size": len(tokenizer), "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", **VISION}
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=image, image_seq_length=16)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        _image_processor(CLIPImageProcessor),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def write_blip(folder: Path) -> Path:
    """One that is shown the picture alone."""
    tokenizer = _tokenizer()
    special = {
        name: tokenizer.pad_token_id for name in ("bos_token_id", "pad_token_id", "sep_token_id", "eos_token_id")
    }
    text = {**TEXT, **special, "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "is_decoder": True}
    torch.manual_seed(0)
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def _image_processor(kind: type):
    return kind(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE({byte: i for i, byte in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    found.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return found
