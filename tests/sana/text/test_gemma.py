"""The network against transformers' own Gemma-2 with eager attention, on the same random weights."""

from dataclasses import replace

import pytest
import torch
from transformers import Gemma2Model

from sana.text.gemma import Gemma2
from tests.sana.models import GEMMA, gemma

LENGTHS = (40, 1, 23)
TOKENS = torch.randint(3, GEMMA.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
ROUNDING = {"rtol": 0, "atol": 2e-5}  # states are of size 1


def ours(reference: Gemma2Model, **changes: object) -> Gemma2:
    network = Gemma2(replace(GEMMA, **changes), device="meta")
    network.load_state_dict(reference.state_dict(), assign=True)
    return network.requires_grad_(False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 7},
        {"rope_theta": 100.0},
        {"query_pre_attn_scalar": 5},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"rms_norm_eps": 0.1},
    ],
    ids=str,
)
def test_states_of_rows_of_several_lengths_equal_the_reference(changes: dict[str, float]) -> None:
    reference = gemma(**changes)
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    states, keys_values = ours(reference, **changes)(TOKENS, torch.tensor(LENGTHS))
    expected = reference(TOKENS, attention_mask=real.long()).last_hidden_state
    torch.testing.assert_close(states[real], expected[real], **ROUNDING)
    assert len(keys_values) == GEMMA.num_hidden_layers


@pytest.mark.parametrize("window", [4096, 7])
def test_a_run_goes_on_from_another_one(window: int) -> None:
    network = ours(gemma(), sliding_window=window)
    whole, all_keys_values = network(TOKENS)
    shared = TOKENS[:1, :30].expand(3, -1)
    together, _ = network(torch.cat([shared, TOKENS[:, :10]], dim=1))
    _, past = network(shared[:1])
    rest, _ = network(TOKENS[:, :10], past=past)
    torch.testing.assert_close(rest, together[:, 30:], **ROUNDING)
    first, past = network(TOKENS[:, :30])
    rest, keys_values = network(TOKENS[:, 30:], past=past)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, **ROUNDING)
    for pair, of_whole in zip(keys_values, all_keys_values, strict=True):
        torch.testing.assert_close(pair, of_whole, **ROUNDING)


def test_padding_reaches_nothing_and_far_padding_stays_finite() -> None:
    network = ours(gemma(), sliding_window=7)
    lengths = torch.tensor(LENGTHS)
    states, _ = network(TOKENS, lengths)
    others, _ = network(TOKENS.flip(0).roll(1, dims=1).where(torch.arange(40) >= lengths[:, None], TOKENS), lengths)
    real = torch.arange(40) < lengths[:, None]
    assert torch.equal(others[real], states[real])
    assert bool(states.isfinite().all())


def test_the_scale_of_the_embedding_is_rounded_as_the_reference_rounds_it() -> None:
    """A width of 72, whose root bfloat16 does not hold."""
    reference = gemma(hidden_size=72).bfloat16()
    exact = gemma(hidden_size=72)(TOKENS).last_hidden_state
    states, _ = ours(reference, hidden_size=72)(TOKENS)
    assert states.dtype == torch.bfloat16
    error, of_reference = ((found.float() - exact).norm() for found in (states, reference(TOKENS).last_hidden_state))
    assert error < 1.1 * of_reference
