"""Gemma-2 as a CLIP of the host, which moves, patches and saves it.

`clip.tokenize(text)` is the plain text, as a negative prompt needs it; `clip.tokenize(text, instruction=...)` puts an
instruction before it, and `skip_template=False` asks Gemma to answer, for `clip.generate`.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import comfy.model_management as management
import comfy.ops
import comfy.sd
import torch
from torch import Tensor, nn

from ...sana.checkpoints.formats import COMFY_LAYER
from ...sana.checkpoints.text_encoder import (
    check_text_encoder,
    find_tokenizer,
    gemma_config,
    gemma_tensors,
    read_text_encoder,
    stored_companions,
    warn_of_base,
)
from ...sana.config import GemmaConfig, TransformerConfig
from ...sana.needs import writing_bytes
from ...sana.text.enhancement import AFTER, BEFORE
from ...sana.text.gemma import Gemma2, KeysValues, Past
from ...sana.text.generation import Sampling, check_writes, continuation
from ...sana.text.prompt import joined
from ...sana.text.text_encoder import GemmaTextEncoder
from ...sana.text.tokenizers import START_OF_TURN, Tokenizer, written
from .entries import ForeignEntryError
from .foreign import in_host_formats, unpacked
from .mapping import mapped_by_host
from .padding import mark_padding
from .quantised import check_quantised
from .writing import counted, with_output

ENCODER = "gemma2_2b"  # as the host calls it: the entry of its tokens, and its name in LoRA and checkpoint files
INSTRUCTION_ENTRY = "instruction"  # of the tokens too
UNREAD = ("image", "images", "video", "audio")  # what language models of others read


class Tokens(dict):
    """What a tokenizer makes of a text, for the host to carry. Text nodes of other models read the tokens of theirs."""

    def __missing__(self, name: str) -> NoReturn:
        raise ForeignEntryError(
            f"this CLIP is SANA's text encoder, which makes no {name!r} tokens; use SANA prompt or CLIP Text Encode, "
            "or connect the CLIP of the model that this node is for"
        )


class SanaTokenizer:
    """The host's view of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, config: GemmaConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config

    def tokenize_with_weights(
        self,
        text: str,
        return_word_ids: bool = False,
        instruction: str | None = None,
        skip_template: bool = True,
        system_prompt: str = "",
        **others: object,
    ) -> Tokens:
        """One list of (token, weight) pairs, all of weight 1.

        instruction: put before the text; None: none. skip_template: False puts both into a turn that Gemma answers, unless the
        text has turns of its own. system_prompt: the same as an instruction and a blank line, for nodes that know no other.
        others: what the host's nodes have for other models. Raises ValueError for pictures and sounds among them, and as `joined`.
        """
        unread = [name for name in UNREAD if others.get(name) is not None and len(others[name])]
        if unread:
            raise ValueError(f"this CLIP is SANA's text encoder, which reads no {unread[0]}; take the {unread[0]} away")
        before = instruction or (f"{system_prompt}\n\n" if system_prompt else None)
        whole = joined(before, text)
        if not skip_template and not text.lstrip().startswith(START_OF_TURN):
            whole, before = BEFORE + whole + AFTER, before and BEFORE + before
        ids = self.tokenizer.encode(whole)
        return Tokens({ENCODER: [[(token, 1.0) for token in ids]], INSTRUCTION_ENTRY: before})

    def decode(self, token_ids: Iterable[int], **unused: object) -> str:
        """The text of what `SanaTextModel.generate` gives."""
        return "".join(written(self.tokenizer, token_ids))

    def untokenize(self, pairs: list[tuple[int, float]]) -> list[tuple[tuple[int, float], str]]:
        return [(pair, self.tokenizer.backend.decode([pair[0]])) for pair in pairs]

    def state_dict(self) -> dict[str, Tensor]:
        """What a saved encoder needs beside the weights, named so that the host's nodes keep them together."""
        companions = stored_companions(self.tokenizer, self.config)
        return {f"{ENCODER}.{name}": tensor for name, tensor in companions.items()}


class HostGemma(GemmaTextEncoder):
    """An encoder whose weights the host moves and patches: their version is the host's.

    It computes on `execution_device`, which the host sets, wherever it has left the weights; None: where they are.
    """

    execution_device: torch.device | None = None

    @property
    def device(self) -> torch.device:
        return self.execution_device or super().device

    def read(self, ids: Sequence[int], past: Sequence[Past] = ()) -> tuple[Tensor, list[KeysValues]]:
        """The Stop button ends a text before the next part that is read, or the next token, as the host ends a node."""
        management.throw_exception_if_processing_interrupted()
        return super().read(ids, past)

    def weights_version(self) -> object:
        """A new one each time while a LoRA in bypass mode stands in for layers, which the host does not count as a patch."""
        if any("forward" in vars(module) for module in self.model.modules()):
            return object()
        return (getattr(self.owner(), "current_weight_patches_uuid", None), self.device, self.dtype)


class SanaTextModel(nn.Module):
    """The host's view of a text encoder. Its tensors are named gemma2_2b.transformer.model.*, as in the host."""

    def __init__(self, encoder: HostGemma, dtype: torch.dtype) -> None:
        super().__init__()
        self.gemma2_2b = nn.ModuleDict({"transformer": encoder})
        encoder.owner = weakref.ref(self)  # in a circle, memory would outlive its use
        self.dtypes = {dtype}

    @property
    def encoder(self) -> HostGemma:
        return self.gemma2_2b["transformer"]

    def set_clip_options(self, options: Mapping[str, object]) -> None:
        """Where to compute. There is no layer to choose: SANA reads the last one."""
        self.encoder.execution_device = options.get("execution_device", self.encoder.execution_device)

    def reset_clip_options(self) -> None:
        self.encoder.execution_device = None

    def memory_estimation_function(self, tokens: Mapping[str, Sequence[object]], device: object = None) -> int:
        """Bytes that a text takes beside the weights while it is read and gone on with. The host asks before it loads them."""
        return writing_bytes(self.encoder, max(map(len, tokens.get(ENCODER, ())), default=0), Sampling.max_tokens)

    def encode_token_weights(self, tokens: Tokens) -> tuple[Tensor, None, dict[str, Tensor]]:
        """Text (1, 300, C) and its mask (1, 300), on the host's intermediate device."""
        ids = [[token for token, _ in row] for row in tokens[ENCODER]]
        text, text_mask = self.encoder.encode(ids, tokens[INSTRUCTION_ENTRY])
        place = management.intermediate_device()
        return mark_padding(text.float(), text_mask).to(place), None, {"attention_mask": text_mask.to(place)}

    def generate(
        self,
        tokens: Tokens,
        do_sample: bool = True,
        max_length: int = Sampling.max_tokens,
        temperature: float = Sampling.temperature,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        min_p: float = Sampling.min_p,
        repetition_penalty: float = Sampling.repetition_penalty,
        seed: int | None = None,
        presence_penalty: float | None = None,
        **unused: object,
    ) -> list[int]:
        """The tokens that Gemma writes after those of a text. Called by `clip.generate`.

        Raises ValueError as `Sampling` and `continuation` do.
        """
        sampling = Sampling(
            max_tokens=max_length,
            seed=seed or 0,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty or 0.0,
            temperature=temperature if do_sample else 0.0,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        check_writes(self.encoder)
        ids = [token for token, _ in tokens[ENCODER][0]]
        return counted(continuation(self.encoder, ids, sampling, tokens[INSTRUCTION_ENTRY]), max_length)

    def load_sd(self, tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Load tensors that `load_clip` has checked, as copies unless the host streams weights from their file.

        A file that shrinks while it is mapped ends the process. Called by the host, which says by `can_assign_sd`.
        """
        if not getattr(self, "can_assign_sd", False):
            for name, tensor in tensors.items():  # one after another, so that no more than one is there twice
                tensors[name] = tensor.clone()
        self.encoder.model.load_state_dict(tensors, strict=True, assign=True)
        return [], []


def check_clip(clip: object) -> None:
    """Raises ValueError for what is no CLIP of `load_clip`."""
    if not isinstance(getattr(clip, "cond_stage_model", None), SanaTextModel):
        raise ValueError("this CLIP is not Gemma-2; connect the CLIP of Load SANA or Load SANA text encoder")


def load_clip(
    path: Path, dtype: torch.dtype | None = None, transformer: TransformerConfig | None = None
) -> comfy.sd.CLIP:
    """The Gemma-2 in a file or folder as a CLIP. dtype: of the weights; None: as in the file.

    transformer: for which its texts must have the right width; None: for any. Raises CheckpointError as
    `sana.load_text_encoder` does, and for another width.
    """
    file = in_host_formats(read_text_encoder(path, mapped=mapped_by_host()))
    tensors = gemma_tensors(file)
    config = gemma_config(tensors, file)
    if transformer is not None:
        check_text_encoder(config, transformer, file.path.name)
    tokenizer = find_tokenizer(file, config)
    check_quantised(Gemma2(config, device="meta").state_dict(), tensors, file.path.name)
    warn_of_base(file)
    tensors = unpacked(tensors, dtype, file.path.name)
    quantised = any(key.endswith(COMFY_LAYER) for key in tensors)
    if not quantised:
        tensors = {key: tensor.to(dtype) if dtype else tensor for key, tensor in tensors.items()}
    stored = tensors["norm.weight" if quantised else "layers.0.mlp.up_proj.weight"].dtype
    compute = compute_dtype(stored)
    operations, place = comfy.ops.manual_cast, "meta"
    if quantised:
        operations = comfy.ops.mixed_precision_ops({"mixed_ops": True}, compute, full_precision_mm=True)
        place = "cpu"  # such layers load to where they were built, and meta would keep nothing

    def build(dtype: torch.dtype, device: torch.device, model_options: Mapping[str, object]) -> SanaTextModel:
        model = Gemma2(config, operations=with_output(operations), dtype=stored, compute_dtype=compute, device=place)
        return SanaTextModel(HostGemma(model.eval().requires_grad_(False), tokenizer), stored)

    def wrap(embedding_directory: str | None, tokenizer_data: Mapping[str, object]) -> SanaTokenizer:
        return SanaTokenizer(tokenizer, config)

    target = SimpleNamespace(params={}, clip=build, tokenizer=wrap)
    size = sum(tensor.numel() for tensor in tensors.values())
    clip = comfy.sd.CLIP(target, parameters=size, state_dict=[tensors], model_options={"dtype": stored})
    clip.patcher.cached_patcher_init = (_load_patcher, (file.path, dtype))
    return clip


def compute_dtype(weights: torch.dtype) -> torch.dtype:
    """Of Gemma's activations: bfloat16 where the weights have 16 bits and the device computes with it, never float16."""
    device = management.text_encoder_device()
    half = weights != torch.float32 and not management.is_device_cpu(device) and management.should_use_bf16(device)
    return torch.bfloat16 if half else torch.float32


def _load_patcher(path: Path, dtype: torch.dtype | None, disable_dynamic: bool = False) -> object:
    return load_clip(path, dtype).patcher
