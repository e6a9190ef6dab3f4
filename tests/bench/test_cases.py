"""The calls of the benchmark with small networks: both sides of every case give the same result."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import cases, memory, offload, resident, twins
from bench.race import Call, relative_error
from sana.config import VARIANTS
from tests.sana.models import GEMMA
from tests.sana.twins import tiny_autoencoder_config, tiny_config

Build = Callable[[torch.dtype, str, bool], dict[str, Call]]
BUILDS = {
    "step": partial(cases.transformer_calls, "sana-0.6b-1024px", 64, 2),
    "step of Sprint": partial(cases.transformer_calls, "sana-sprint-0.6b-1024px", 64, 1),
    "decode": partial(cases.decode_calls, 64),
    "encode": partial(cases.encode_calls, 64),
    "short prompt": partial(cases.prompt_calls, 5),
    "long prompt": partial(cases.prompt_calls, 200),
    "writing": partial(cases.writing_calls, 20, 6),
    "enhancing": partial(cases.enhancement_calls, 5, 6),
    "picture": partial(cases.picture_calls, "sana-0.6b-1024px", 64, 2),
}


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {name: replace(tiny_config(name), text_width=GEMMA.hidden_size) for name in VARIANTS}
    variants = {name: replace(row, transformer=configs[name]) for name, row in VARIANTS.items()}
    autoencoders = {cases.AUTOENCODER: tiny_autoencoder_config(cases.AUTOENCODER)}
    for module in (cases, memory, offload):
        monkeypatch.setattr(module, "VARIANTS", variants)
    for module in (cases, memory, offload, resident):
        monkeypatch.setattr(module, "AUTOENCODERS", autoencoders)
    monkeypatch.setattr(twins, "GEMMA_2_2B", replace(GEMMA, vocab_size=256_000))
    monkeypatch.setattr(memory, "SIDES", (64, 128))


@pytest.mark.parametrize("variant", ["sana-0.6b-1024px", "sana-sprint-0.6b-1024px"])
def test_candidates_in_int8_have_the_same_weights(variant: str) -> None:
    """Only where the inputs of layers are rounded too the result differs, by little."""
    torch.manual_seed(0)
    calls = cases.int8_step_calls(variant, 64, torch.float32, "cpu", False)
    assert [*calls] == ["ours", "diffusers", "ours, unpacked", "ours, not quantised"]
    rounded, expected, *others = (run() for run in calls.values())
    assert 1e-3 < relative_error(rounded, expected) < 5e-2
    assert all(relative_error(found, expected) < 1e-5 for found in others)


def test_a_token_in_int8_is_the_same() -> None:
    torch.manual_seed(0)
    calls = cases.int8_token_calls(20, torch.float32, "cpu", False)
    expected, *others = (run() for run in calls.values())
    assert len(others) == 2 and all(relative_error(found, expected) < 1e-4 for found in others)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_all_candidates_agree(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network: network)
    torch.manual_seed(0)
    calls = BUILDS[name](torch.float32, "cpu", compiled)
    expected, *others = (run() for run in calls.values())
    assert len(others) >= 1
    for found in others:
        assert relative_error(found, expected) < 1e-4


def test_memory_is_modelled_for_every_size_and_measured_up_to_one() -> None:
    phases = [memory.prompt_phase("cpu"), *memory.step_phases("sana-1.6b-1024px", "cpu", 64)]
    phases += memory.decode_phases("cpu", 64)
    assert [(phase.side, phase.measured is not None) for phase in phases[1:]] == [(64, True), (128, False)] * 2
    for phase in phases:
        assert phase.total >= phase.weights > 0


def test_what_parts_take_one_after_another_is_modelled_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 8 bits, with the embedding counted apart."""
    monkeypatch.setattr(offload, "GemmaConfig", lambda: replace(GEMMA, vocab_size=256_000))
    networks = offload.Networks("sana-0.6b-1024px", 8)
    before = offload.reset_resident()
    rows = [offload.measure(phase, part, run, before) for phase, part, run in networks.phases(64)]
    assert [row.phase for row in rows] == ["encoding the prompt", "sampling", "decoding"]
    assert [row.elsewhere for row in rows] == [256_000 * (GEMMA.hidden_size + 4), 0, 0]
    for row in rows:
        assert 0 < row.measured and 0 < row.resident and 0 < row.weights
        assert row.measured <= row.model
    assert all(parameter.is_meta for parameter in networks.text_encoder.parameters())


@pytest.mark.parametrize("run", resident.RUNS)
def test_what_is_allocated_and_resident_in_least_memory(run: str) -> None:
    """The result, in float32, included."""
    bounds, (allocated, grown) = zip(
        *(resident.taken(run, 64, "bfloat16", each) for each in resident.MEASURES), strict=True
    )
    result = 4 * (3 * 64**2 if run == "decode" else 32 * 2**2)
    assert bounds[0] == bounds[1] and result < allocated <= bounds[0] + 2 * result and grown >= 0


def test_more_resident_than_allowed_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, asked = tmp_path / "resident.json", []
    monkeypatch.setattr(sys, "argv", ["bench.resident", "--measure=512", f"--out={out}"])
    for over in (0, 1):

        def measure(run: str, side: int, dtype: str, over: int = over) -> resident.Row:
            asked.append((run, side, dtype))
            return resident.Row(run, side, dtype, 100, 90, 64_000_125 + over)

        monkeypatch.setattr(resident, "measure", measure)
        assert resident.main() == over
    expected = [("decode", 512, "bfloat16"), ("encode", 512, "bfloat16")]
    assert asked == 2 * [*expected, ("decode", 512, "float32"), ("encode", 512, "float32")]
    assert [(row["run"], row["resident"]) for row in json.loads(out.read_text())["rows"]][0] == ("decode", 64_000_126)
