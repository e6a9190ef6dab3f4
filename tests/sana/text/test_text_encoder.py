"""Prompts to hidden states, against transformers' own Gemma-2 with eager attention on the same random weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Model, PreTrainedTokenizerFast

from sana.checkpoints.text_encoder import load_text_encoder
from sana.text.prompt import INSTRUCTION
from sana.text.text_encoder import PART, GemmaTextEncoder
from tests.sana.models import (
    GEMMA,
    PROMPTS,
    gemma,
    reference_text,
    reference_tokenizer,
    tokenizer_json,
    tokenizer_model,
)

TOKENIZERS: dict[str, Callable[[], bytes]] = {"tokenizer.json": tokenizer_json, "tokenizer.model": tokenizer_model}
LONG = "a red circle " * 7700  # 100,100 characters
INSTRUCTIONS = (INSTRUCTION, "Draw: ", "Draw:", "Draw", "a red circle left of ", "🐱", "Draw \n ")
ROUNDING = {"rtol": 0, "atol": 2e-5}  # states are of size 1; sums over hundreds of tokens in another order, float32


@pytest.fixture(scope="module", params=TOKENIZERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder written by transformers, with either kind of tokenizer."""
    folder = tmp_path_factory.mktemp("gemma")
    gemma().save_pretrained(folder)
    (folder / request.param).write_bytes(TOKENIZERS[request.param]())
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return reference_tokenizer(folder)


@pytest.fixture
def encoder(folder: Path) -> GemmaTextEncoder:
    return load_text_encoder(folder)


@pytest.fixture(scope="module")
def model() -> Gemma2Model:
    return gemma()


@contextmanager
def runs(model: nn.Module) -> Iterator[list[int]]:
    """Collects how many tokens each run of the network computes."""
    lengths: list[int] = []

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        lengths.append(arguments[0].shape[1])

    handle = model.register_forward_pre_hook(record)
    yield lengths
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_rows_that_count_equal_the_full_run(
    encoder: GemmaTextEncoder, model: Gemma2Model, tokenizer: PreTrainedTokenizerFast, instruction: str
) -> None:
    prompts = [*PROMPTS, "", "  stripped \n", LONG]
    expected, expected_mask = reference_text(model, tokenizer, prompts, instruction)
    text, text_mask = encoder(prompts, instruction=instruction)
    assert text.shape == (len(prompts), 300, 64)
    assert torch.equal(text_mask, expected_mask)
    torch.testing.assert_close(text[text_mask], expected[text_mask], **ROUNDING)
    assert not text[~text_mask].any()


@torch.no_grad()
@pytest.mark.parametrize("prompts", [[*PROMPTS, "", LONG], [""], ["", ""]], ids=["mixed", "empty", "two empty"])
def test_all_300_rows_without_instruction_equal_the_full_run(
    encoder: GemmaTextEncoder, model: Gemma2Model, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> None:
    expected, expected_mask = reference_text(model, tokenizer, prompts, None)
    text, text_mask = encoder(prompts, instruction=None)
    assert torch.equal(text_mask, expected_mask)
    torch.testing.assert_close(text, expected, **ROUNDING)


@torch.no_grad()
def test_soft_capping_is_part_of_the_result(
    encoder: GemmaTextEncoder, model: Gemma2Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    uncapped = gemma(attn_logit_softcapping=None)
    assert all(torch.equal(a, b) for a, b in zip(uncapped.parameters(), model.parameters(), strict=True))
    text, text_mask = encoder(PROMPTS)
    other, _ = reference_text(uncapped, tokenizer, list(PROMPTS), INSTRUCTION)
    assert (text - other)[text_mask].abs().mean() > 0.1


@torch.no_grad()
def test_a_batch_equals_its_prompts_one_by_one(encoder: GemmaTextEncoder) -> None:
    prompts = [*PROMPTS, "", "a"]
    for instruction in (INSTRUCTION, None):
        text, text_mask = encoder(prompts, instruction)
        for i, prompt in enumerate(prompts):
            alone, alone_mask = encoder([prompt], instruction)
            assert torch.equal(alone_mask[0], text_mask[i])
            torch.testing.assert_close(text[i], alone[0], **ROUNDING)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_reference(
    folder: Path, model: Gemma2Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    exact, mask = reference_text(model, tokenizer, list(PROMPTS), INSTRUCTION)
    rounded, _ = reference_text(gemma().bfloat16(), tokenizer, list(PROMPTS), INSTRUCTION)
    encoder = load_text_encoder(folder, torch.bfloat16)
    text, _ = encoder(PROMPTS)
    assert text.dtype == encoder.dtype == torch.bfloat16
    error, of_reference = ((found.float() - exact)[mask].norm() / exact[mask].norm() for found in (text, rounded))
    assert error < 1.25 * of_reference  # the same roundings in another order


@torch.no_grad()
def test_instruction_is_computed_for_the_first_prompt_only(
    encoder: GemmaTextEncoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    length = len(tokenizer.encode(INSTRUCTION))
    prompts = ["a red circle", "", PROMPTS[0]]
    with runs(encoder.model) as lengths:
        for prompt in prompts:
            encoder([prompt])
    pairs = [len(tokenizer.encode(INSTRUCTION + prompt)) for prompt in prompts]
    assert lengths[0] == length - 1
    assert all(run <= pair - length + 2 for run, pair in zip(lengths[1:], pairs, strict=True))


@torch.no_grad()
def test_a_long_instruction_is_read_in_parts(
    encoder: GemmaTextEncoder, model: Gemma2Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The whole of it at once would take memory by the square of its length."""
    instruction = "Draw a red circle. " * 100
    length = len(tokenizer.encode(instruction)) - 1
    assert length > 2 * PART
    with runs(encoder.model) as lengths:
        text, text_mask = encoder(["a cat"], instruction)
    assert lengths[:-1] == [PART] * (length // PART) + [length % PART] * (length % PART > 0)
    expected, _ = reference_text(model, tokenizer, ["a cat"], instruction)
    torch.testing.assert_close(text[text_mask], expected[text_mask], **ROUNDING)


def test_frozen_weights_need_no_second_run_of_the_instruction_in_any_mode(encoder: GemmaTextEncoder) -> None:
    with runs(encoder.model) as lengths:
        encoder(["a"])
        encoder(["b"])
    assert len(lengths) == 3


def value_layer(model: nn.Module) -> nn.Linear:
    return model.layers[0].self_attn.v_proj


def write_in_place(model: nn.Module) -> None:
    value_layer(model).weight.copy_(value_layer(model).weight.flip(0))


def replace_weight(model: nn.Module) -> None:
    value_layer(model).weight = nn.Parameter(value_layer(model).weight.flip(0), requires_grad=False)


def replace_weight_at_its_address(model: nn.Module) -> None:
    """As a host does that frees a weight, and then fetches another one into the same memory."""
    layer = value_layer(model)
    memory = layer.weight.numpy()
    memory[:] = memory[::-1].copy()
    layer.weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)


def swap_storage(model: nn.Module) -> None:
    value_layer(model).weight.data = value_layer(model).weight.flip(0)


def load_others(model: nn.Module) -> None:
    model.load_state_dict({name: tensor.flip(0) for name, tensor in model.state_dict().items()})


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [write_in_place, replace_weight, replace_weight_at_its_address, swap_storage, load_others],
    ids=lambda change: change.__name__,
)
def test_instruction_is_computed_again_after_a_change_of_weights(
    encoder: GemmaTextEncoder, change: Callable[[nn.Module], None]
) -> None:
    before, text_mask = encoder(["a red circle"])
    change(encoder.model)
    after, _ = encoder(["a red circle"])
    expected, _ = GemmaTextEncoder(encoder.model, encoder.tokenizer)(["a red circle"])
    assert torch.equal(after, expected)
    assert (after - before)[text_mask].abs().mean() > 0.01


def test_gradients_flow_through_the_instruction(encoder: GemmaTextEncoder) -> None:
    with torch.no_grad():
        cached, _ = encoder(["a red circle"])
    table = encoder.model.embed_tokens.weight.requires_grad_()
    for _ in range(2):  # a second pass through the same graph would fail
        text, _ = encoder(["a red circle"])
        torch.testing.assert_close(text, cached, **ROUNDING)
        (gradient,) = torch.autograd.grad(text.square().sum(), table)
    in_instruction = encoder.tokenizer.encode("Evaluate the level of detail")[-1]
    assert in_instruction not in encoder.tokenizer.encode("a red circle")
    assert gradient[in_instruction].any()


def test_inference_mode_and_no_grad_share_the_instruction(folder: Path) -> None:
    with torch.inference_mode():
        encoder = load_text_encoder(folder)
        first, _ = encoder(["a red circle"])
    with torch.no_grad(), runs(encoder.model) as lengths:
        again, _ = encoder(["a red circle"])
    assert torch.equal(first, again)
    assert len(lengths) == 1


@torch.no_grad()
def test_two_instructions_do_not_mix(encoder: GemmaTextEncoder) -> None:
    first, _ = encoder(["a cat"], INSTRUCTION)
    other, _ = encoder(["a cat"], "Draw: ")
    again, _ = encoder(["a cat"], INSTRUCTION)
    assert torch.equal(again, first)
    assert not torch.equal(other, first)


@torch.no_grad()
def test_no_instruction_and_an_empty_one_are_the_same(encoder: GemmaTextEncoder) -> None:
    for found, expected in zip(encoder(["a cat"], ""), encoder(["a cat"], None), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("instruction", [*INSTRUCTIONS, None])
def test_count_tells_the_rows_used_and_the_tokens_lost(
    encoder: GemmaTextEncoder, tokenizer: PreTrainedTokenizerFast, instruction: str | None
) -> None:
    prompts = [*PROMPTS, "", LONG]
    _, text_mask = encoder(prompts, instruction)
    counts = encoder.count(prompts, instruction)
    limit = len(tokenizer.encode(instruction)) + 298 if instruction else 300
    lengths = [len(tokenizer.encode((instruction or "") + prompt.strip())) for prompt in prompts]
    assert [count.used for count in counts] == text_mask.sum(dim=1).tolist()
    assert [count.lost for count in counts] == [max(0, length - limit) for length in lengths]
    assert counts[-1].used == 300 and counts[-1].lost > 10_000
    assert not any(count.lost for count in counts[:-1])


@torch.no_grad()
def test_a_cut_prompt_is_logged_with_the_tokens_lost(
    encoder: GemmaTextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    encoder(["a cat"])
    assert not caplog.messages
    encoder(["a cat", LONG])
    lost = encoder.count([LONG])[0].lost
    assert caplog.messages == [f"The prompt is too long by {lost} tokens, which are cut off at its end."]


@pytest.mark.parametrize(
    "prompt", [*PROMPTS, "é vs e\u0301", "ＦＵＬＬ ｗｉｄｔｈ", "tab\tand\nnewline", "العربية हिन्दी", "UPPER case"]
)
def test_every_script_passes_through_untouched(
    encoder: GemmaTextEncoder, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    ids = encoder.tokenizer.encode(prompt)
    assert ids == tokenizer.encode(prompt)
    assert tokenizer.decode(ids[1:]) == prompt


@pytest.mark.parametrize(("prompts", "shown"), [("a cat", "'a cat'"), ([], r"\[\]")])
def test_prompts_must_be_a_list_of_at_least_one(encoder: GemmaTextEncoder, prompts: list[str], shown: str) -> None:
    with pytest.raises(ValueError, match=rf"^prompts are a list of at least one text, not {shown}$"):
        encoder(prompts)


@torch.no_grad()
def test_a_token_that_the_network_has_no_row_for_is_refused(encoder: GemmaTextEncoder) -> None:
    """In a prompt and in an instruction, wherever the ids come from."""
    last = GEMMA.vocab_size - 1
    text, _ = encoder.encode([[2, last]], None)
    assert bool(text.isfinite().all())
    message = (
        rf"^the tokenizer gives token {last + 1}, and the text encoder has {last + 1}; use the tokenizer of "
        "Efficient-Large-Model/gemma-2-2b-it$"
    )
    with pytest.raises(ValueError, match=message):
        encoder.encode([[2, 5], [2, last + 1, 7]], None)
    encoder.tokenizer = SimpleNamespace(encode=lambda text: [2, last + 1, 4])
    with pytest.raises(ValueError, match=message):
        encoder(["a cat"])
