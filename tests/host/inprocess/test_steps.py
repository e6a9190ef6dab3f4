"""Kernels and bytes of a step inside the host, which docs/speed.md shows beside the shell's, are what they were."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import program
from bench.launches import our_step
from bench.machine import RESULTS
from tests.host.boot import Host
from tests.host.inprocess.small import EQUAL, Small
from tests.host.steps import counted_step, host_step, timed_step

KEPT = {row["title"]: row for row in json.loads((RESULTS / "launches.json").read_text())["rows"]}
TIME = 28  # launches at most by which time becomes modulation, once a step; the shell does it once a run
GUIDANCE = 12  # more, for that of Sprint

pytestmark = pytest.mark.newest


@pytest.mark.parametrize(
    "variant", ["sana-0.6b-1024px", "sana-1.6b-1024px", "sana-1.5-1.6b-1024px", "sana-sprint-0.6b-1024px"]
)
def test_a_step_launches_as_many_kernels_as_is_told(host: Host, variant: str) -> None:
    counted, kept = counted_step(host, variant), KEPT[f"step, {variant}"]["host"]
    assert (counted.launches, counted.bytes) == (kept["launches"], kept["bytes"])
    shell = our_step(variant)
    blocks = shell.kernels["scaled_dot_product_attention"]
    apart = blocks if shell.kernels["_addmm_activation"] else 0  # the host's layers know no product with ReLU
    assert counted.launches <= shell.launches + apart + TIME + (GUIDANCE if "sprint" in variant else 0)


def test_the_step_is_that_of_the_sampler(small: Small, host: Host) -> None:
    """It denoises as the host's model does where a sampler calls it."""
    model = small.model.model
    (text, told), *_ = small.positive
    x, sigma = torch.randn(1, 32, 3, 4), torch.full((1,), 0.5)
    given = {"c_crossattn": text, "attention_mask": told["attention_mask"]}
    expected = model.apply_model(x, sigma, transformer_options={"sigmas": sigma}, **given)
    counts = text[:, told["attention_mask"][0] > 0]
    torch.testing.assert_close(host_step(host, model, x, counts)(), expected, rtol=0, atol=EQUAL)


@torch.inference_mode(False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_that_is_timed_is_that_of_the_others(host: Host, dtype: torch.dtype) -> None:
    config = replace(program.CONFIG, depth=2)
    calls = program.candidates(dtype, config, partial(timed_step, host))
    assert program.measured(calls, 1, program.TOLERANCE[dtype])[-1]["candidate"] == program.HOST
