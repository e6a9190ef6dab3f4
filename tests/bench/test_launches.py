"""Kernels and bytes of our networks, which docs/speed.md shows, are what they were; the counting itself on what can be told by hand."""

import json

import pytest
import torch
from torch.nn import functional as F

from bench.launches import PROMPT, STEPS, counting, our_pass, our_prompt, our_step, random
from bench.machine import RESULTS

KEPT = {row["title"]: row for row in json.loads((RESULTS / "launches.json").read_text())["rows"]}


def test_kernels_and_bytes_are_counted() -> None:
    """A product, an activation in place, views and an allocation, and what PyTorch has as one kernel."""
    x, weight = random(2, 8, 16), random(4, 16)
    with counting() as counted:
        out = F.linear(x, weight).relu_().transpose(1, 2)[:, :2]
        torch.add(out, 1.0, out=torch.empty_like(out))
        q = random(1, 2, 8, 4)
        attended = F.scaled_dot_product_attention(q, q, q)
        F.rms_norm(x, (16,), weight[0])
    assert counted.kernels == {"mm": 1, "relu_": 1, "add": 1, "scaled_dot_product_attention": 1, "rms_norm": 1}
    product, attention = 2 * (2 * 8 * 16 + 4 * 16 + 2 * 8 * 4), 2 * 2 * q.numel()  # q is read once
    others = 2 * (2 * 2 * 8 * 4 + 2 * out.numel() + 2 * x.numel() + 16)
    assert counted.product_bytes == product + attention and counted.bytes == product + attention + others
    assert attended.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("variant", [variant for variant in STEPS if "4.8b" not in variant])
def test_a_step_launches_as_many_kernels_as_is_told(variant: str) -> None:
    counted, kept = our_step(variant), KEPT[f"step, {variant}"]
    assert counted.launches == kept["launches"][1]
    assert (counted.bytes, counted.product_bytes) == (kept["bytes"][1], kept["product_bytes"])


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_a_pass_of_the_autoencoder_launches_as_many_kernels_as_is_told(what: str) -> None:
    counted, kept = our_pass(what), KEPT[f"{what}, 1024 px"]
    assert counted.launches == kept["launches"][1] and counted.bytes == kept["bytes"][1]


def test_a_prompt_launches_as_many_kernels_as_is_told() -> None:
    counted, kept = our_prompt(PROMPT), KEPT[PROMPT]
    assert counted.launches == kept["launches"][1] and counted.bytes == kept["bytes"][1]
