"""Gemma writes inside the host: by our node and by its own Generate Text, the text that `sana` writes with the same weights."""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import comfy.model_management as management
import comfy.utils
import pytest
import torch
from comfy.sd import CLIP
from torch import Tensor

import sana
from sana.needs import writing_bytes, writing_need
from sana.text.enhancement import AFTER, BEFORE, enhance
from sana.text.generation import Sampling, continuation
from sana.text.prompt import INSTRUCTION
from sana.text.text_encoder import GemmaTextEncoder
from sana.text.tokenizers import written
from tests.host.inprocess.small import Small, limit
from tests.sana.models import gemma, write_text_encoder

ON = {"sampling_mode": "on", "temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
ON |= {"repetition_penalty": 1.2, "seed": 2**64 - 5, "presence_penalty": 0.3}
OFF = {"sampling_mode": "off"}
MOST = 12
PART = "gemma2_2b.transformer.model."
FP8 = "float8_e4m3fn"


def tensors() -> dict[str, Tensor]:
    """Of a small Gemma whose text does not repeat one token for ever."""
    found = gemma().state_dict()
    return {name: tensor + 4 if "post_" in name else tensor for name, tensor in found.items()}


@pytest.fixture
def loaded(small: Small) -> Iterator[Callable[..., CLIP]]:
    """A function from tensors to the CLIP of `SanaTextEncoderLoader`. Their folders are gone afterwards, so that `auto` finds
    them in no other test."""
    folder = small.host.base / "models" / "text_encoders" / "writer"

    def load(weights: dict[str, Tensor], dtype: str = "fp32") -> CLIP:
        shutil.rmtree(folder, ignore_errors=True)
        write_text_encoder(folder, weights)
        return small.host.call("SanaTextEncoderLoader", text_encoder=folder.name, dtype=dtype)[0]

    yield load
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def clip(loaded: Callable[..., CLIP]) -> CLIP:
    return loaded(tensors())


@pytest.fixture
def standalone(tmp_path: Path) -> Callable[[dict[str, Tensor]], GemmaTextEncoder]:
    """Tensors as the encoder of `sana`."""
    return lambda weights: sana.load_text_encoder(
        write_text_encoder(tmp_path / str(len(list(tmp_path.iterdir()))), weights)
    )


@pytest.fixture
def encoder(standalone: Callable[..., GemmaTextEncoder]) -> GemmaTextEncoder:
    return standalone(tensors())


def generate(small: Small, clip: CLIP, prompt: str = "a cat", mode: dict[str, object] = OFF, **more: object) -> str:
    """The host's own node."""
    return small.host.call("TextGenerate", clip=clip, prompt=prompt, max_length=MOST, sampling_mode=mode, **more)[0]


def expected(encoder: GemmaTextEncoder, text: str = f"{BEFORE}a cat{AFTER}", **changes: object) -> str:
    sampling = Sampling(**{"max_tokens": MOST, "temperature": 0, **changes})
    return "".join(written(encoder.tokenizer, continuation(encoder, encoder.tokenizer.encode(text), sampling)))


def better(small: Small, clip: CLIP, text: str = "a cat", instruction: str = "official", **changes: object) -> str:
    """Our node."""
    inputs = {"clip": clip, "text": text, "instruction": instruction, "seed": 3, "temperature": 1.5, "max_tokens": MOST}
    return small.host.call("SanaPromptEnhancer", **{**inputs, **changes})[0]


# The host's own node


def test_generate_text_writes_what_sana_writes(small: Small, clip: CLIP, encoder: GemmaTextEncoder) -> None:
    text = generate(small, clip)
    assert text == expected(encoder) and len(text) > 5
    assert generate(small, clip, use_default_template=False) == expected(encoder, "a cat")
    sampling = {name: value for name, value in ON.items() if name != "sampling_mode"}
    assert generate(small, clip, mode=ON) == expected(encoder, **sampling)
    for name, value in {"temperature": 0.1, "seed": 1, "repetition_penalty": 4.0, "presence_penalty": 5.0}.items():
        other = generate(small, clip, mode={**ON, name: value})
        assert other == expected(encoder, **{**sampling, name: value}) != expected(encoder, **sampling)


def test_a_text_with_turns_of_its_own_gets_no_others(small: Small, clip: CLIP, encoder: GemmaTextEncoder) -> None:
    own = (
        "<start_of_turn>system\nBe brief.<end_of_turn>\n<start_of_turn>user\na cat<end_of_turn>\n<start_of_turn>model\n"
    )
    assert generate(small, clip, own) == expected(encoder, own.strip())


def test_what_newer_hosts_give_is_taken(small: Small, clip: CLIP, encoder: GemmaTextEncoder) -> None:
    more = {"images": [], "audio": None, "thinking": True, "min_length": 1, "of a later version": object()}
    tokens = clip.tokenize("a cat", skip_template=False, system_prompt="Be brief.", **more)
    ids = clip.cond_stage_model.generate(tokens, do_sample=False, max_length=MOST, mtp=None)
    assert clip.decode(ids) == expected(encoder, f"{BEFORE}Be brief.\n\na cat{AFTER}")


@pytest.mark.parametrize("kind", ["image", "video"])
def test_pictures_are_refused(small: Small, clip: CLIP, kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^this CLIP is SANA's text encoder, which reads no {kind}; take the {kind} "
    ):
        generate(small, clip, **{kind: torch.zeros(1, 8, 8, 3)})


# Our node


@pytest.mark.parametrize(("instruction", "used"), [("official", INSTRUCTION), ("none", ""), ("custom", "Draw ")])
def test_the_enhancer_writes_what_sana_writes(
    small: Small, clip: CLIP, encoder: GemmaTextEncoder, instruction: str, used: str
) -> None:
    text = better(small, clip, instruction=instruction, custom_instruction="Draw ")
    sampling = Sampling(max_tokens=MOST, seed=3, temperature=1.5)
    assert text == "".join(enhance(encoder, "a cat", used, sampling)) and len(text) > 5
    cold = better(small, clip, instruction=instruction, custom_instruction="Draw ", temperature=0.0)
    assert cold == "".join(enhance(encoder, "a cat", used, replace(sampling, temperature=0))) != text


def test_an_edited_text_wins_unless_it_is_empty(small: Small, clip: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = better(small, clip)
    assert better(small, clip, edited=" \n") == plain
    monkeypatch.setattr(clip, "generate", None)
    assert better(small, clip, edited="  a dog\n ") == "  a dog\n "


def test_the_text_is_on_the_node_and_not_in_the_log(
    small: Small, clip: CLIP, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in an entry of its own, without what is said of it, for who wants to keep it."""
    node = small.host.nodes["SanaPromptEnhancer"]
    inputs = {"clip": clip, "instruction": "official", "seed": 3, "temperature": 1.5, "max_tokens": MOST}
    with caplog.at_level(logging.INFO):
        found = node.execute(text="a cat", **inputs)
        assert found.ui == {"sana_report": [found.args[0]], "sana_written": [found.args[0]]}
        empty = node.execute(text=" ", **inputs)
        report = f"Written from nothing, since the text is empty:\n{empty.args[0]}"
        assert empty.ui == {"sana_report": [report], "sana_written": [empty.args[0]]}
        edited = node.execute(text="a cat", edited="a dog", **inputs)
        assert edited.ui == {"sana_report": ["the edited text, as it stands"]}
        monkeypatch.setattr(clip, "decode", lambda ids: " \n")
        silent = node.execute(text="a cat", **inputs)
        report = "Nothing was written, so the text stays as it is:\na cat"
        assert silent.ui == {"sana_report": [report], "sana_written": []}
    assert not [message for message in caplog.messages if found.args[0] in message or empty.args[0] in message]


def test_prompts_are_drawn_and_written_in_turn(small: Small, clip: CLIP) -> None:
    text, states = better(small, clip), clip.encode_from_tokens(clip.tokenize("a cat", instruction=INSTRUCTION))
    for _ in range(2):
        assert better(small, clip) == text
        assert torch.equal(clip.encode_from_tokens(clip.tokenize("a cat", instruction=INSTRUCTION)), states)


# Weights as the host keeps them


def test_a_text_encoder_that_does_not_fit_writes_the_same(small: Small, clip: CLIP, encoder: GemmaTextEncoder) -> None:
    management.unload_all_models()
    clip.patcher = limit(clip.patcher, 0)
    assert generate(small, clip) == expected(encoder)
    assert clip.cond_stage_model.model_lowvram


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("layer", ["embed_tokens", "layers.1.mlp.up_proj"])
def test_patched_weights_write_as_merged_ones(
    small: Small, clip: CLIP, standalone: Callable[..., GemmaTextEncoder], layer: str, fits: bool
) -> None:
    """The embedding is the output as well, with what a LoRA adds to it.

    The host leaves patches out of a CLIP that was whole on the device and is then there in parts, so it was in parts before.
    """
    weights = tensors()
    name = f"{layer}.weight"
    change = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0)) / 8
    clip.patcher = clip.patcher.clone() if fits else limit(clip.patcher, 0)
    before = generate(small, clip)
    management.unload_all_models()
    assert clip.patcher.add_patches({f"{PART}{name}": (change,)}) == [f"{PART}{name}"]
    merged = standalone({**weights, name: weights[name] + change})
    assert generate(small, clip) == expected(merged) != before
    assert clip.cond_stage_model.model_lowvram != fits
    assert better(small, clip) == "".join(enhance(merged, "a cat", sampling=Sampling(MOST, 3, temperature=1.5)))


def test_stored_in_half_the_bits_it_writes_as_the_same_numbers(
    small: Small,
    loaded: Callable[..., CLIP],
    standalone: Callable[..., GemmaTextEncoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU the host computes in float32, and the output is cast some rows at a time."""
    monkeypatch.setattr(small.host.pack("nodes.host.writing"), "ROWS", 250)
    half = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    clip = loaded(half, "auto")
    assert clip.cond_stage_model.encoder.model.embed_tokens.weight.dtype == torch.bfloat16
    if clip.cond_stage_model.encoder.dtype == torch.float32:
        assert generate(small, clip) == expected(standalone({name: t.float() for name, t in half.items()}))
    assert len(generate(small, clip)) > 5


@pytest.mark.parametrize("layer", ["embed_tokens", "layers.1.mlp.up_proj"])
def test_quantised_weights_write_as_the_unpacked_numbers(
    small: Small, loaded: Callable[..., CLIP], standalone: Callable[..., GemmaTextEncoder], layer: str
) -> None:
    weights, name = tensors(), f"{layer}.weight"
    scale = weights[name].abs().max() / 400
    packed = (weights[name] / scale).to(torch.float8_e4m3fn)
    told = torch.frombuffer(bytearray(f'{{"format": "{FP8}"}}'.encode()), dtype=torch.uint8)
    beside = {name: packed, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": told}
    unpacked = standalone({**weights, name: packed.float() * scale})
    assert generate(small, loaded({**weights, **beside}, "auto")) == expected(unpacked)


# Progress, and what cannot be


def test_progress_counts_tokens_and_stop_ends_at_the_next_one(
    small: Small, clip: CLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, int]] = []

    def hook(value: int, total: int, preview: object = None, **unused: object) -> None:
        counted.append((value, total))
        if stop and value >= stop:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_PERCENT", 0, raising=False)
    stop = 0
    better(small, clip)
    assert counted[0] == (1, MOST) and counted[-1][0] == len(counted) <= MOST
    counted.clear()
    stop = 3
    runs: list[int] = []
    network = clip.cond_stage_model.encoder.model
    handle = network.register_forward_pre_hook(lambda module, given: runs.append(1))
    try:
        with pytest.raises(management.InterruptProcessingException):
            better(small, clip)
    finally:
        handle.remove()
        management.interrupt_current_processing(False)
    assert counted == [(1, MOST), (2, MOST), (3, MOST)] and len(runs) == 3
    stop = 0
    assert better(small, clip)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; at least 1 is needed"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a number from 0 on, such as 0.7"),
        ({"text": " a \ud83d"}, "the prompt is no text in UTF-8 from its character 4 on; type it again"),
        (
            {"instruction": "custom", "custom_instruction": "Draw \ud83d"},
            "the instruction is no text in UTF-8 from its character 6 on; type it again",
        ),
        ({"clip": object()}, "this CLIP is not Gemma-2; connect the CLIP of Load SANA or Load SANA text encoder"),
        ({"clip": None}, "this CLIP is not Gemma-2; connect the CLIP of Load SANA or Load SANA text encoder"),
    ],
    ids=str,
)
def test_inputs_that_cannot_be_are_refused(small: Small, clip: CLIP, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        better(small, **{"clip": clip, **changes})
    assert str(refused.value) == message


def test_a_text_of_100_000_characters_is_too_long(small: Small, clip: CLIP) -> None:
    with pytest.raises(
        ValueError, match=r"^the text has \d{5} tokens, and Gemma-2 reads and writes 8192 together; give"
    ):
        better(small, clip, "a red circle " * 7700)


def test_the_host_is_told_what_a_long_text_takes(
    small: Small, clip: CLIP, encoder: GemmaTextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it loads the weights, and as much as `sana` counts. Without a text it is told of no token."""
    told: list[int] = []
    load = management.load_models_gpu

    def spy(models: list[object], memory_required: int = 0, **more: object) -> None:
        told.append(memory_required)
        load(models, memory_required=memory_required, **more)

    monkeypatch.setattr(management, "load_models_gpu", spy)
    long = "Draw a red circle. " * 50
    for instruction in ("", long):
        better(small, clip, instruction="custom", custom_instruction=instruction)
    clip.load_model()
    texts = [f"{BEFORE}{instruction}a cat{AFTER}" for instruction in ("", long)]
    assert told[:2] == [writing_need(encoder, text, Sampling.max_tokens).working for text in texts]
    assert told[2] == writing_bytes(encoder, 0, Sampling.max_tokens) < told[0] < told[1]


def test_the_demo_was_never_trained_to_write_and_says_so(small: Small) -> None:
    for write in (better, generate):
        with pytest.raises(ValueError) as refused:
            write(small, small.clip)
        assert str(refused.value) == (
            "this text encoder, such as the demo's, was trained to read prompts and never to write; use "
            "Efficient-Large-Model/gemma-2-2b-it"
        )
