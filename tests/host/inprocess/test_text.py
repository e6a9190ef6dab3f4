"""Prompts on the host: the same texts and masks as `sana` makes, and what the host's conditioning nodes do with them."""

import logging
import socket

import pytest
import torch
from torch import Tensor

from sana.prompt import INSTRUCTION
from tests.host.inprocess.small import (
    EQUAL,
    HEIGHT,
    OTHER_PROMPT,
    PROMPT,
    TEXT_ENCODER,
    WIDTH,
    Conditioning,
    Small,
    difference,
    load,
)

CHANGED = 1e-2
CUSTOM = "Describe the picture. "
LONG = "a cat and " * 400


def parts(conditioning: Conditioning) -> tuple[Tensor, Tensor]:
    ((text, options),) = conditioning
    return text, options["attention_mask"].bool()


@pytest.mark.parametrize("prompt", [PROMPT, "", 'a "neon (sign:1.5)" \\(x\\) 月 🐱', LONG])
@pytest.mark.parametrize("instruction", [INSTRUCTION, None, CUSTOM], ids=["official", "none", "custom"])
def test_text_and_mask_are_those_of_our_encoder(small: Small, prompt: str, instruction: str | None) -> None:
    """Weights in brackets are part of the text: SANA knows none."""
    name = {INSTRUCTION: "official", None: "none"}.get(instruction, "custom")
    text, mask = parts(small.encode(prompt, name, CUSTOM))
    wanted, wanted_mask = small.pipeline.text_encoder([prompt], instruction)
    assert text.shape[:2] == mask.shape == (1, 300)
    assert torch.equal(mask, wanted_mask)
    assert difference(text, wanted) <= EQUAL


def test_core_text_encode_gives_the_plain_text(small: Small) -> None:
    (conditioning,) = small.host.call("CLIPTextEncode", clip=small.clip, text=OTHER_PROMPT)
    for ours, theirs in zip(parts(conditioning), parts(small.encode(OTHER_PROMPT, "none")), strict=True):
        assert torch.equal(ours, theirs)


def test_tokens_are_reported_and_the_prompt_is_not(
    small: Small, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defect 16 of the official nodes: the prompt was printed."""
    with caplog.at_level(logging.INFO):
        small.encode(PROMPT)
        small.encode(LONG)
    count, long = small.pipeline.text_encoder.count([PROMPT, LONG])
    assert f"{count.used} of 300 tokens" in caplog.messages
    assert f"300 of 300 tokens, {long.lost} cut off" in caplog.messages
    assert "cat and" not in caplog.text and "circle" not in caplog.text
    assert not capsys.readouterr().out


def test_nothing_is_downloaded(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect 11 of the official nodes: the text encoder was downloaded again, and the network used in every run."""

    def refuse(*unused: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (clip,) = small.host.call("SanaTextEncoderLoader", text_encoder=TEXT_ENCODER, dtype="auto")
    load(small.host, small.path.name)
    assert difference(clip.encode_from_tokens(clip.tokenize(PROMPT)), small.encode(PROMPT, "none")[0][0]) == 0


def test_combined_prompts_are_averaged(small: Small) -> None:
    """ConditioningCombine: each is evaluated with its own mask; at one step the mean of the two results."""
    other = small.encode(OTHER_PROMPT)
    (both,) = small.host.call("ConditioningCombine", conditioning_1=small.positive, conditioning_2=other)
    one_step = {"steps": 1, "cfg": 1.0}
    mean = (small.ksampler(**one_step) + small.ksampler(positive=other, **one_step)) / 2
    assert difference(small.ksampler(positive=both, **one_step), mean) <= EQUAL
    assert difference(mean, small.ksampler(**one_step)) > CHANGED
    assert bool(small.sample(positive=both, latent=small.empty(2)).isfinite().all())


def test_averaged_prompts(small: Small) -> None:
    """ConditioningAverage: the mean of the texts, with the mask of the one it goes to."""
    target, origin = small.positive, small.encode(OTHER_PROMPT)
    inputs = {"conditioning_to": target, "conditioning_from": origin}
    (whole,) = small.host.call("ConditioningAverage", **inputs, conditioning_to_strength=1.0)
    assert difference(small.sample(positive=whole), small.sample()) <= EQUAL
    (half,) = small.host.call("ConditioningAverage", **inputs, conditioning_to_strength=0.5)
    text, mask = parts(half)
    assert difference(text, (target[0][0] + origin[0][0]) / 2) <= EQUAL
    assert torch.equal(mask, parts(target)[1])
    assert difference(small.sample(positive=half), small.sample()) > CHANGED


def test_joined_prompts(small: Small) -> None:
    """ConditioningConcat joins texts but no masks; the second half counts where it is not empty."""
    other = small.encode(OTHER_PROMPT)
    (both,) = small.host.call("ConditioningConcat", conditioning_to=small.positive, conditioning_from=other)
    (first, first_mask), (second, second_mask) = parts(small.positive), parts(other)
    ours = small.ksampler(positive=both, cfg=1.0)
    joined = [[torch.cat([first, second], 1), {"attention_mask": torch.cat([first_mask, second_mask], 1)}]]
    assert difference(ours, small.ksampler(positive=joined, cfg=1.0)) <= EQUAL
    assert difference(ours, small.ksampler(cfg=1.0)) > CHANGED
    assert bool(small.ksampler(positive=both).isfinite().all())  # beside a negative prompt half as long


def test_prompts_for_parts_of_the_picture(small: Small) -> None:
    """ConditioningSetMask: with a cell's worth of mask, each half of a single step follows its own prompt."""
    left = torch.zeros(1, HEIGHT, WIDTH)
    left[..., : WIDTH // 2] = 1
    other, common = small.encode(OTHER_PROMPT), {"strength": 1.0, "set_cond_area": "default"}
    (one,) = small.host.call("ConditioningSetMask", conditioning=small.positive, mask=left, **common)
    (two,) = small.host.call("ConditioningSetMask", conditioning=other, mask=1 - left, **common)
    (both,) = small.host.call("ConditioningCombine", conditioning_1=one, conditioning_2=two)
    one_step = {"steps": 1, "cfg": 1.0}
    ours = small.ksampler(positive=both, **one_step)
    assert difference(ours[..., :2], small.ksampler(**one_step)[..., :2]) <= EQUAL
    assert difference(ours[..., 2:], small.ksampler(positive=other, **one_step)[..., 2:]) <= EQUAL


def test_prompts_for_parts_of_the_schedule(small: Small) -> None:
    """ConditioningSetTimestepRange: keys and values of a prompt are made when it is first needed."""
    other = small.encode(OTHER_PROMPT)
    (early,) = small.host.call("ConditioningSetTimestepRange", conditioning=small.positive, start=0.0, end=0.3)
    (late,) = small.host.call("ConditioningSetTimestepRange", conditioning=other, start=0.3, end=1.0)
    (both,) = small.host.call("ConditioningCombine", conditioning_1=early, conditioning_2=late)
    latent = small.ksampler(positive=both)
    assert difference(latent, small.ksampler()) > CHANGED
    assert difference(latent, small.ksampler(positive=other)) > CHANGED


def test_zeroed_prompt_is_taken(small: Small) -> None:
    """ConditioningZeroOut as a negative prompt."""
    (zero,) = small.host.call("ConditioningZeroOut", conditioning=small.positive)
    assert bool(small.ksampler(negative=zero).isfinite().all())
