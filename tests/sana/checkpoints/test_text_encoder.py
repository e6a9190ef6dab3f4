"""Text encoders out of every file they come in, and one sentence for every file that is none."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from sana.checkpoints.files import CheckpointError, TensorFile
from sana.checkpoints.text_encoder import (
    TOKENIZERS,
    gemma_config,
    gemma_json,
    load_text_encoder,
    read_tokenizer,
    stored_companions,
)
from sana.config import VARIANTS, GemmaConfig
from sana.text.tokenizers import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from tests.sana.models import GEMMA, PROMPTS, gemma, tokenizer_json, tokenizer_model

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """The weights in transformers' names, without a prefix."""
    return dict(gemma().state_dict())


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """Hidden states of a prompt by transformers' own network."""
    return gemma()(torch.tensor([token_ids()])).last_hidden_state


def token_ids() -> list[int]:
    return [2, *Backend.from_str(tokenizer_json().decode()).encode(PROMPTS[0], add_special_tokens=False).ids]


def write_folder(folder: Path, tensors: Tensors, *, tokenizer: bool = True, config: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(gemma_json(GEMMA)))
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return folder


def tokenizer_source(kind: type[Tokenizer]) -> bytes:
    return tokenizer_json() if kind is JsonTokenizer else tokenizer_model()


@torch.no_grad()
@pytest.mark.parametrize(("shard_size", "several"), [("10MB", False), ("200KB", True)])
def test_hugging_face_folder(tmp_path: Path, expected: Tensor, shard_size: str, several: bool) -> None:
    gemma().save_pretrained(tmp_path, max_shard_size=shard_size)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == several
    text, text_mask = load_text_encoder(tmp_path)([PROMPTS[0]], None)
    torch.testing.assert_close(text[text_mask], expected[0], rtol=0, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize(
    ("name", "told", "template", "warned"),
    [
        ("gemma_2_2b_fp16", None, None, True),
        ("gemma-2-2b", None, None, True),
        ("Gemma2-2B", None, None, True),
        ("text_encoder", "google/gemma-2-2b", None, True),
        ("gemma_2_2b_it_elm_bf16", None, None, False),
        ("gemma-2-2b-IT", None, None, False),
        ("gemma_2_2b_fp16", None, "chat_template.jinja", False),
        ("gemma_2_2b_fp16", None, "tokenizer_config.json", False),
        ("gemma_2_2b_fp16", None, "tokenizer/tokenizer_config.json", False),
        ("gemma_2_2b_fp16", "google/gemma-2-2b-it", None, False),
        ("text_encoder", None, None, False),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_the_base_model_is_told_where_it_is_known(
    tmp_path: Path,
    tensors: Tensors,
    caplog: pytest.LogCaptureFixture,
    name: str,
    told: str | None,
    template: str | None,
    warned: bool,
    as_file: bool,
) -> None:
    folder = write_folder(tmp_path / ("model" if as_file else name), tensors)
    (folder / "config.json").write_text(json.dumps({**gemma_json(GEMMA), **({"_name_or_path": told} if told else {})}))
    if template:
        place = tmp_path / template if "/" in template else folder / template
        place.parent.mkdir(exist_ok=True)
        place.write_text('{"chat_template": "{{ bos_token }}"}')
    path = (folder / "model.safetensors").rename(folder / f"{name}.safetensors") if as_file else folder
    load_text_encoder(path)
    message = (
        f"{path.name} is named like the base Gemma-2-2b; SANA was trained with Gemma-2-2b-it, and with the base model pictures "
        "follow their prompts less, and prompts are enhanced badly; use Efficient-Large-Model/gemma-2-2b-it"
    )
    assert caplog.messages == [message] * warned


@pytest.mark.parametrize("place", ["text_encoder", "tokenizer"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("given", ["", "text_encoder", "text_encoder/model.safetensors"])
def test_pipeline_folder_with_a_tokenizer_beside_the_weights_or_in_its_own_folder(
    tmp_path: Path, tensors: Tensors, place: str, name: str, given: str
) -> None:
    write_folder(tmp_path / "text_encoder", tensors, tokenizer=False)
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / name).write_bytes(tokenizer_json() if name.endswith("json") else tokenizer_model())
    encoder = load_text_encoder(tmp_path / given)
    kind = JsonTokenizer if name.endswith("json") else SentencePieceTokenizer
    assert isinstance(encoder.tokenizer, kind)
    assert encoder.count([PROMPTS[0]])[0].used > 5


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "model.", "text_encoders.gemma2_2b.transformer.model."])
@pytest.mark.parametrize("kind", TOKENIZERS.values(), ids=TOKENIZERS)
def test_single_file_with_embedded_tokenizer(
    tmp_path: Path, tensors: Tensors, expected: Tensor, prefix: str, kind: type[Tokenizer]
) -> None:
    path, source = tmp_path / "gemma.safetensors", tokenizer_source(kind)
    outside = prefix.removesuffix("transformer.model.").removesuffix("model.")
    stored = {prefix + name: tensor for name, tensor in tensors.items()}
    stored |= {outside + name: tensor for name, tensor in stored_companions(kind(source), GEMMA).items()}
    stored[outside + "lm_head.weight"] = torch.ones(3, 3)  # dropped: SANA needs no next token
    stored[prefix + "layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # dropped: it is computed
    save_file(stored, path)
    encoder = load_text_encoder(path)
    assert isinstance(encoder.tokenizer, kind)
    assert encoder.tokenizer.source == source
    states, _ = encoder.model(torch.tensor([token_ids()]))
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", TOKENIZERS.values(), ids=TOKENIZERS)
def test_an_embedded_tokenizer_survives_what_casts_every_tensor(
    tmp_path: Path, tensors: Tensors, kind: type[Tokenizer], dtype: torch.dtype
) -> None:
    stored = {**tensors, **stored_companions(kind(tokenizer_source(kind)), GEMMA)}
    save_file({name: tensor.to(dtype) for name, tensor in stored.items()}, path := tmp_path / "gemma.safetensors")
    encoder = load_text_encoder(path)
    assert encoder.tokenizer.source == tokenizer_source(kind) and encoder.model.config == GEMMA


@torch.no_grad()
def test_the_file_of_a_host_with_a_sentencepiece_tensor_and_a_configuration_beside_it(
    tmp_path: Path, tensors: Tensors, expected: Tensor
) -> None:
    spiece = torch.from_numpy(np.frombuffer(tokenizer_model(), dtype=np.uint8).copy())
    folder = write_folder(tmp_path, {**tensors, "spiece_model": spiece}, tokenizer=False)
    encoder = load_text_encoder(folder / "model.safetensors")
    assert encoder.tokenizer.backend.serialized_model_proto() == tokenizer_model()
    states, _ = encoder.model(torch.tensor([token_ids()]))
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("setting", ["truncation", "padding", "post_processor"])
def test_settings_stored_in_a_tokenizer_do_not_cut_pad_or_mark_prompts(
    tmp_path: Path, tensors: Tensors, setting: str
) -> None:
    """transformers writes the truncation and padding of its last call into `tokenizer.json`, and sets its own when it reads."""
    folder = write_folder(tmp_path, tensors)
    plain = load_text_encoder(folder).tokenizer.encode(PROMPTS[1])
    tokenizer = Backend.from_str(tokenizer_json().decode())
    if setting == "truncation":
        tokenizer.enable_truncation(4)
    elif setting == "padding":
        tokenizer.enable_padding(length=100, pad_token="<pad>")
    else:
        tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_text_encoder(folder).tokenizer.encode(PROMPTS[1]) == plain


def test_dtype_of_the_weights(tmp_path: Path, tensors: Tensors) -> None:
    folder = write_folder(tmp_path, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert load_text_encoder(folder).dtype == torch.float32
    assert load_text_encoder(folder, torch.bfloat16).dtype == torch.bfloat16
    assert load_text_encoder(folder, None).dtype == torch.bfloat16


def test_layers_can_come_from_another_namespace(tmp_path: Path, tensors: Tensors, expected: Tensor) -> None:
    class Operations:
        class Linear(torch.nn.Linear):
            pass

        class Embedding(torch.nn.Embedding):
            pass

    model = load_text_encoder(write_folder(tmp_path, tensors), operations=Operations).model
    states, _ = model(torch.tensor([token_ids()]))
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    assert not [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    assert type(model.embed_tokens) is Operations.Embedding


def test_width_of_gemma_2_2b_needs_no_configuration() -> None:
    file = TensorFile(Path("gemma.safetensors"), {})
    assert gemma_config({"norm.weight": torch.empty(2304)}, file) == GemmaConfig()


def without_layer(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("layers.2.mlp.")}


def gemma_3(tensors: Tensors) -> Tensors:
    return {**tensors, "layers.0.self_attn.q_norm.weight": torch.ones(16)}


def lora(tensors: Tensors) -> Tensors:
    return {"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 4)}


def narrower(tensors: Tensors) -> Tensors:
    return {**tensors, "layers.1.mlp.up_proj.weight": torch.ones(64, 64)}


def in_four_bits(tensors: Tensors) -> Tensors:
    """One matrix as compressed-tensors stores it."""
    name = "layers.0.mlp.up_proj.weight"
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    return {**rest, f"{name}_packed": torch.zeros(128, 8, dtype=torch.int32), f"{name}_scale": torch.ones(128, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without_layer,
            "lacks 3 of 35 tensors, first layers.2.mlp.down_proj.weight; the download may be incomplete",
        ),
        (
            gemma_3,
            "is a Gemma of another generation; give a Gemma-2-2b-it, such as Efficient-Large-Model/gemma-2-2b-it",
        ),
        (lora, "is a LoRA; give a Gemma-2-2b-it, such as Efficient-Large-Model/gemma-2-2b-it"),
        (
            narrower,
            ": tensor layers.1.mlp.up_proj.weight has shape (64, 64) instead of (128, 64); "
            "it is another model or was made for another size",
        ),
        (
            in_four_bits,
            "is quantised, with layers.0.mlp.up_proj.weight_packed beside its weights, in a way that is not read here; "
            "take a file that is not",
        ),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, tensors: Tensors, change: Callable[[Tensors], Tensors], message: str
) -> None:
    folder = write_folder(tmp_path / "folder", change(tensors))
    with pytest.raises(CheckpointError) as caught:
        load_text_encoder(folder)
    assert str(caught.value) == f"folder{' ' * (message[0] != ':')}{message}"


@pytest.mark.parametrize(
    ("tokenizer", "config", "message"),
    [
        (
            False,
            True,
            "folder has no tokenizer; put tokenizer.json or tokenizer.model of "
            "Efficient-Large-Model/gemma-2-2b-it beside it",
        ),
        (True, False, "folder has width 64, not that of Gemma-2-2b; put its config.json beside it"),
    ],
)
def test_what_stands_beside_the_weights_is_needed(
    tmp_path: Path, tensors: Tensors, tokenizer: bool, config: bool, message: str
) -> None:
    folder = write_folder(tmp_path / "folder", tensors, tokenizer=tokenizer, config=config)
    with pytest.raises(CheckpointError) as caught:
        load_text_encoder(folder)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", b"{"), ("tokenizer.json", b"[]"), ("tokenizer.model", b"nothing"), ("tokenizer.model", b"")],
)
def test_a_broken_tokenizer_is_named(tmp_path: Path, tensors: Tensors, name: str, content: bytes) -> None:
    folder = write_folder(tmp_path, tensors, tokenizer=False)
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_text_encoder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_json"])
def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path: Path, tensors: Tensors, name: str) -> None:
    fewer = {**tensors, "embed_tokens.weight": tensors["embed_tokens.weight"][:300].clone()}
    if name == "tokenizer_json":
        fewer |= stored_companions(JsonTokenizer(tokenizer_json()), GEMMA)
        del fewer["gemma_config"]
    folder = write_folder(tmp_path, fewer, tokenizer=False)
    (folder / "config.json").write_text(json.dumps({**gemma_json(GEMMA), "vocab_size": 300}))
    if name != "tokenizer_json":
        (folder / name).write_bytes(tokenizer_json() if name == "tokenizer.json" else tokenizer_model())
    message = (
        rf"{name}.* has \d+ tokens and the text encoder only 300; use the tokenizer of Efficient-Large-Model/gemma"
    )
    with pytest.raises(CheckpointError, match=message):
        load_text_encoder(folder)


def test_tokens_that_no_prompt_uses_may_exceed_the_vocabulary(tmp_path: Path, tensors: Tensors) -> None:
    folder = write_folder(tmp_path, tensors)
    tokenizer = Backend.from_str(tokenizer_json().decode())
    tokenizer.add_special_tokens([f"<tool {i}>" for i in range(GEMMA.vocab_size)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_text_encoder(folder).count([PROMPTS[0]])[0].used > 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", None),
        ("head_dim", "a"),
        ("hidden_size", -1),
        ("num_hidden_layers", 2**40),
        ("rms_norm_eps", True),
        ("rope_theta", [1]),
        ("vocab_size", 2.5),
    ],
)
def test_a_configuration_that_no_network_has_is_named(tmp_path: Path, key: str, value: object) -> None:
    gemma().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), key: value}
    config.pop("rope_parameters", None)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"has {key} .*, which no Gemma-2 has; take its original config.json"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize("rotary", [3, [1], None])
def test_odd_rotary_parameters_are_passed_over(tmp_path: Path, rotary: object) -> None:
    gemma().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": rotary}))
    assert load_text_encoder(tmp_path).model.config.rope_theta == 10_000


def resident_bytes() -> int:
    """Of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory a process has")
def test_a_tokenizer_is_read_without_the_weights(tmp_path: Path, tensors: Tensors) -> None:
    """Beside a file of 4 GB, which is a hole on the disk."""
    folder = write_folder(tmp_path, tensors)
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, size, filler = json.loads(data[8 : 8 + length]), len(data) - 8 - length, 2**32
    header["lm_head.weight"] = {"dtype": "F32", "shape": [filler // 4], "data_offsets": [size, size + filler]}
    written = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written + data[8 + length :])
        file.truncate(8 + len(written) + size + filler)
    before = resident_bytes()
    assert read_tokenizer(folder).encode(PROMPTS[0]) == token_ids()
    assert resident_bytes() - before < 2**28


def test_a_tokenizer_is_refused_where_its_text_encoder_would_be(tmp_path: Path, tensors: Tensors) -> None:
    folder = write_folder(tmp_path / "folder", tensors)
    with pytest.raises(
        CheckpointError, match=f"^folder is a Gemma-2 of width {GEMMA.hidden_size}, and the transformer takes"
    ):
        read_tokenizer(folder, VARIANTS["sana-0.6b-1024px"].transformer)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="give a Gemma-2-2b-it"):
        read_tokenizer(tmp_path / "other.safetensors")
