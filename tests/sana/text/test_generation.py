"""Writing, against transformers' own `generate` and its rules for probabilities, on the same random weights."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.generation import logits_process as reference_rules

from sana.checkpoints.text_encoder import gemma_json
from sana.networks.packed import PackedWeight, scaled
from sana.networks.packed_layers import put_weight
from sana.text.gemma import Gemma2
from sana.text.generation import BLOCK, CONTEXT, PART, Reader, Sampling, choose, continuation, probabilities
from sana.text.text_encoder import GemmaTextEncoder
from sana.text.tokenizers import BOS, EOS, JsonTokenizer
from tests.sana.models import GEMMA, gemma, talking_tokenizer_json, text_encoder, writer

GREEDY = Sampling(temperature=0)
WINDOW = 7
INSTRUCTION = "Draw a red circle left of a blue square: "


def tokens(length: int, seed: int = 0) -> list[int]:
    drawn = torch.randint(260, GEMMA.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
    return [BOS, *drawn.tolist()][:length]


def reference(**changes: object) -> Gemma2ForCausalLM:
    """transformers' network with the weights of `gemma`, and an output so steep that its soft cap matters."""
    values = {**gemma_json(GEMMA), **changes}
    model = Gemma2ForCausalLM(Gemma2Config(**values, attn_implementation="eager")).eval().requires_grad_(False)
    model.model.load_state_dict(gemma(**changes).state_dict())
    model.generation_config.eos_token_id = None
    for name, weight in model.named_parameters():
        if "post_" in name:
            weight.add_(4.0)  # or the output, which is the embedding, would repeat the last token for ever
    return model


def encoder(model: Gemma2ForCausalLM) -> GemmaTextEncoder:
    config = replace(GEMMA, sliding_window=model.config.sliding_window)
    network = Gemma2(config, device="meta")
    network.load_state_dict(model.model.state_dict(), assign=True)
    return GemmaTextEncoder(network.eval().requires_grad_(False), JsonTokenizer(talking_tokenizer_json()))


def generated(model: Gemma2ForCausalLM, ids: list[int], count: int) -> list[int]:
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    row = torch.tensor([ids])
    return model.generate(row, attention_mask=torch.ones_like(row), **settings)[0, len(ids) :].tolist()


@pytest.mark.parametrize("window", [4096, WINDOW])
@pytest.mark.parametrize("length", [1, 2, WINDOW, WINDOW + 1, 40])
def test_greedy_tokens_are_those_of_transformers(length: int, window: int) -> None:
    model = reference(sliding_window=window)
    expected = generated(model, tokens(length), 60)
    assert len(set(expected)) > 20
    assert list(continuation(encoder(model), tokens(length), replace(GREEDY, max_tokens=60))) == expected


def test_greedy_tokens_are_those_of_transformers_beyond_a_block_and_a_part() -> None:
    """Memory grew, and the text was read in parts, whose attention reaches into one another."""
    model = reference(sliding_window=100)
    ids = tokens(PART + BLOCK + 5)
    expected = generated(model, ids, 20)
    assert list(continuation(encoder(model), ids, replace(GREEDY, max_tokens=20))) == expected
    ids = tokens(BLOCK - 5)
    assert list(continuation(encoder(model), ids, replace(GREEDY, max_tokens=20))) == generated(model, ids, 20)


@pytest.mark.parametrize("which", ["sequence", "turn"])
def test_writing_ends_where_the_sequence_or_the_turn_ends(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark itself is left out. Which token ends a turn is looked up, not a number."""
    model = reference()
    ours = encoder(model)
    turn = ours.tokenizer.find("<end_of_turn>")
    assert turn not in (None, 107, EOS)
    ids = tokens(9)
    free = generated(model, ids, 30)
    stop = free[12]
    place = free.index(stop)
    if which == "turn":
        monkeypatch.setattr(ours.tokenizer, "find", {"<end_of_turn>": stop}.get)
    else:
        monkeypatch.setattr("sana.text.generation.EOS", stop)
    assert list(continuation(ours, ids, replace(GREEDY, max_tokens=30))) == free[:place]


def test_the_limit_is_a_number_of_tokens() -> None:
    ours = encoder(reference())
    for count in (1, 2, 17):
        assert len(list(continuation(ours, tokens(9), replace(GREEDY, max_tokens=count)))) == count


def test_the_context_of_the_network_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = encoder(reference())
    monkeypatch.setattr("sana.text.generation.CONTEXT", 20)
    assert len(list(continuation(ours, tokens(12), GREEDY))) == 8
    assert len(list(continuation(ours, tokens(19), GREEDY))) == 1
    with pytest.raises(ValueError, match=r"^the text has 20 tokens, and Gemma-2 reads and writes 20 together; give a "):
        next(continuation(ours, tokens(20), GREEDY))
    assert CONTEXT == 8192


def test_what_stands_before_is_read_once_and_changes_nothing() -> None:
    ours = encoder(reference())
    lengths: list[int] = []
    ours.model.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    settings = replace(GREEDY, max_tokens=8)
    for prompt in ("a small cat", "a dog", ""):
        ids = ours.tokenizer.encode(INSTRUCTION + prompt)
        whole = list(continuation(encoder(reference()), ids, settings))
        lengths.clear()
        assert list(continuation(ours, ids, settings, INSTRUCTION)) == whole
        before = len(ours.tokenizer.encode(INSTRUCTION))
        known = [before - 1] if prompt == "a small cat" else []
        assert lengths[: len(known)] == known
        first, *others = lengths[len(known) :]
        assert 1 <= first <= len(ids) - before + 2 and others == [1] * (len(whole) - 1)
    ids = ours.tokenizer.encode(INSTRUCTION)[:5]  # a text that ends inside it
    assert list(continuation(ours, ids, settings, INSTRUCTION)) == list(continuation(ours, ids, settings))


def test_prompts_are_encoded_and_written_in_turn_without_another_run_of_either_instruction() -> None:
    ours = encoder(reference())
    ids = ours.tokenizer.encode(INSTRUCTION + "a cat")
    list(continuation(ours, ids, replace(GREEDY, max_tokens=2), INSTRUCTION))
    ours(["a cat"])
    lengths: list[int] = []
    ours.model.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    list(continuation(ours, ids, replace(GREEDY, max_tokens=2), INSTRUCTION))
    ours(["a cat"])
    assert sum(lengths) < 12
    ours(["a cat"], "another instruction ")
    ours(["a cat"], "a third one ")
    assert len(ours._prefixes) == 2


def test_weights_that_change_are_read_anew() -> None:
    ours = encoder(reference())
    ids = ours.tokenizer.encode(INSTRUCTION + "a cat")
    before = list(continuation(ours, ids, replace(GREEDY, max_tokens=8), INSTRUCTION))
    with torch.no_grad():
        ours.model.layers[0].self_attn.v_proj.weight.neg_()
    after = list(continuation(ours, ids, replace(GREEDY, max_tokens=8), INSTRUCTION))
    assert after != before
    assert after == list(continuation(ours, ids, replace(GREEDY, max_tokens=8)))


def test_closing_stops_at_once_and_nothing_is_computed_ahead() -> None:
    ours = encoder(reference())
    runs: list[int] = []
    ours.model.register_forward_pre_hook(lambda module, given: runs.append(1))
    writing = continuation(ours, tokens(9), GREEDY)
    assert not runs
    list(islice(writing, 3))
    assert len(runs) == 3
    writing.close()
    assert len(runs) == 3 and not list(writing)


def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers() -> None:
    ids = tokens(30)
    exact = reference()(torch.tensor([ids])).logits[0, -1]
    rounded = reference().bfloat16()(torch.tensor([ids])).logits[0, -1]
    found = Reader(encoder(reference().bfloat16())).read(ids)
    assert found.dtype == torch.float32 and found.shape == (GEMMA.vocab_size,)
    assert (found - exact).norm() < 1.25 * (rounded.float() - exact).norm()
    torch.testing.assert_close(Reader(encoder(reference())).read(ids), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("factor", [None, 1.5])
def test_a_packed_embedding_is_the_output_too(factor: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, or whole where a LoRA changes it."""
    monkeypatch.setattr("sana.networks.packed.CACHED", 250 * GEMMA.hidden_size)
    numbers = torch.randint(-127, 128, (GEMMA.vocab_size, GEMMA.hidden_size), dtype=torch.int8)
    weight = PackedWeight("int8", scaled, {"packed": numbers, "scale": torch.tensor([[0.002]])}, numbers.shape)
    if factor:
        weight.changes.append(Times(factor))
    packed, plain = encoder(reference()), encoder(reference())
    plain.model.embed_tokens.weight = nn.Parameter(numbers * 0.002 * (factor or 1), requires_grad=False)
    put_weight(packed.model, "embed_tokens.weight", weight)
    settings = replace(GREEDY, max_tokens=20)
    assert list(continuation(packed, tokens(9), settings)) == list(continuation(plain, tokens(9), settings))
    torch.testing.assert_close(Reader(packed).read(tokens(9)), Reader(plain).read(tokens(9)), rtol=0, atol=1e-5)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def test_memory_for_a_text_is_that_of_its_keys_and_values() -> None:
    reader = Reader(encoder(reference()))
    reader.read(tokens(BLOCK + 1))
    shape = (1, GEMMA.num_key_value_heads, 2 * BLOCK, GEMMA.head_dim)
    places = []
    for layer in reader.layers:
        assert layer.length == BLOCK + 1 and {part.shape for part in layer.memory} == {shape}
        places += [part.data_ptr() for part in layer.memory]
    reader.read(tokens(1))
    assert [part.data_ptr() for layer in reader.layers for part in layer.memory] == places


# Probabilities


def reference_probabilities(logits: Tensor, text: list[int], sampling: Sampling) -> Tensor:
    """Of every token, by the processors of transformers in the order of its `generate`."""
    scores = logits[None]
    rules: list[reference_rules.LogitsProcessor] = []
    if sampling.repetition_penalty != 1:
        rules.append(reference_rules.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    rules.append(reference_rules.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        rules.append(reference_rules.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        rules.append(reference_rules.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        rules.append(reference_rules.MinPLogitsWarper(sampling.min_p))
    for rule in rules:
        scores = rule(torch.tensor([text]), scores)
    return scores.softmax(-1)[0]


def every_token(logits: Tensor, text: list[int], sampling: Sampling) -> Tensor:
    found, shares = probabilities(logits, text, sampling)
    return torch.zeros_like(logits).index_add(0, found, shares)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
        {"temperature": 1.9, "top_k": 0, "top_p": 1.0},
        {"top_k": 1, "top_p": 1.0},
        {"top_k": 20, "top_p": 1.0},
        {"top_k": 10**6, "top_p": 1.0},
        {"top_k": 0, "top_p": 0.9},
        {"top_k": 0, "top_p": 0.0},
        {"top_k": 0, "top_p": 0.1},
        {"top_k": 50, "top_p": 0.5, "temperature": 1.5},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.1},
        {"top_k": 0, "top_p": 1.0, "min_p": 1.0},
        {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.7},
        {"top_k": 0, "top_p": 1.0, "repetition_penalty": 0.5},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2, "temperature": 1.3},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("ties", [False, True])
def test_probabilities_are_those_of_transformers(changes: dict[str, float], ties: bool) -> None:
    sampling = Sampling(**changes)
    for seed in range(5):
        logits = torch.randn(GEMMA.vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
        if ties and sampling.top_p == 1:  # of several equal ones top_p keeps any
            logits = (logits * 2).round() / 2
        text = tokens(40, seed)
        expected = reference_probabilities(logits, text, sampling)
        torch.testing.assert_close(every_token(logits, text, sampling), expected, rtol=1e-4, atol=1e-7)


def test_presence_is_subtracted_from_what_is_there_once() -> None:
    logits = torch.tensor([1.0, 2.0, -1.0, 0.5])
    plain = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    found = every_token(logits, [1, 1, 2], replace(plain, presence_penalty=0.75))
    torch.testing.assert_close(found, torch.tensor([1.0, 1.25, -1.75, 0.5]).softmax(0))
    both = every_token(logits, [1, 1, 2], replace(plain, presence_penalty=0.75, repetition_penalty=2.0))
    torch.testing.assert_close(both, torch.tensor([1.0, 0.25, -2.75, 0.5]).softmax(0))
    assert torch.equal(logits, torch.tensor([1.0, 2.0, -1.0, 0.5]))


def test_penalties_hold_of_the_likeliest_token_too() -> None:
    logits = torch.tensor([1.0, 2.0, 1.5])
    assert probabilities(logits, [1], GREEDY)[0].tolist() == [1]
    assert probabilities(logits, [1], replace(GREEDY, repetition_penalty=1.5))[0].tolist() == [2]
    assert probabilities(logits, [1], replace(GREEDY, presence_penalty=0.6))[0].tolist() == [2]


@pytest.mark.parametrize("temperature", [1e-45, 1e-10, 1e30])
def test_any_temperature_gives_probabilities(temperature: float) -> None:
    found = every_token(torch.tensor([1.0, 2.0, -1.0]), [], Sampling(temperature=temperature, top_k=0, top_p=1.0))
    expected = [1 / 3] * 3 if temperature > 1 else [0.0, 1.0, 0.0]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    sampling = Sampling(temperature=1.2, top_k=20, top_p=0.95)
    expected = every_token(logits, [], sampling)
    generator = torch.Generator().manual_seed(0)
    count = 4000
    found = torch.bincount(
        torch.tensor([choose(logits, [], sampling, generator) for _ in range(count)]), minlength=len(logits)
    )
    assert not found[expected == 0].any()
    likely = expected > 0
    chi_squared = ((found - expected * count)[likely] ** 2 / (expected * count)[likely]).sum()
    assert chi_squared < 2 * int(likely.sum())  # its mean is one less than the number of tokens


def sampled(seed: int, count: int = 12) -> list[int]:
    return list(continuation(encoder(reference()), tokens(9), Sampling(seed=seed, max_tokens=count, temperature=1.0)))


def test_a_seed_is_a_text() -> None:
    assert sampled(7) == sampled(7)
    assert sampled(7)[:5] == sampled(7, 5)
    assert len({tuple(sampled(seed)) for seed in (7, 8, -1, 2**64 - 2)}) == 4


# What cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; at least 1 is needed"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a number from 0 on, such as 0.7"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be a number from 0 on, such as 0.7"),
        ({"temperature": float("inf")}, "temperature is inf; it must be a number from 0 on, such as 0.7"),
        ({"top_k": -1}, "top_k is -1; it must be 0, for all tokens, or more"),
        ({"top_p": 1.1}, "top_p is 1.1; it must be a number from 0 to 1"),
        ({"top_p": float("nan")}, "top_p is nan; it must be a number from 0 to 1"),
        ({"min_p": -0.1}, "min_p is -0.1; it must be a number from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be a number above 0, and 1 is none"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan; it must be a finite number, and 0 is none"),
        ({"seed": 2**64}, "seed 18446744073709551616 does not fit into 64 bits; use a smaller one"),
        ({"seed": -(2**63) - 1}, "seed -9223372036854775809 does not fit into 64 bits; use a smaller one"),
    ],
    ids=str,
)
def test_values_that_cannot_be_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        Sampling(**changes)
    assert str(refused.value) == message


def test_an_encoder_that_was_never_trained_to_write_says_so() -> None:
    with pytest.raises(
        ValueError, match="^this text encoder, such as the demo's, was trained to read prompts and never"
    ):
        next(continuation(text_encoder(), tokens(9), GREEDY))


def test_numbers_that_are_not_finite_are_told() -> None:
    ours = writer()
    ours.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="^the text encoder gave numbers that are not finite; its file or a LoRA is"):
        next(continuation(ours, tokens(9), GREEDY))


def test_a_token_without_a_row_is_told() -> None:
    with pytest.raises(ValueError, match="^the tokenizer gives token 600, and the text encoder has 600; use the token"):
        next(continuation(writer(), [BOS, GEMMA.vocab_size], GREEDY))


def test_an_instruction_that_gemma_cannot_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its attention takes all memory: in one of 23,000 tokens every product of the 2B has 17 GB."""
    ours = writer()
    length = len(ours.tokenizer.encode(INSTRUCTION)) - 1  # its last token is read with the prompt
    monkeypatch.setattr("sana.text.text_encoder.CONTEXT", length + 1)
    ours(["a"], INSTRUCTION)
    ours.forget()
    monkeypatch.setattr("sana.text.text_encoder.CONTEXT", length)
    with pytest.raises(ValueError) as refused:
        ours(["a"], INSTRUCTION)
    assert str(refused.value) == (
        f"the instruction has {length} tokens, and Gemma-2 reads {length} with the prompt; give a shorter one"
    )
