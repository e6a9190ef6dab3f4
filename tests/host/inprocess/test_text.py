"""Prompts on the host: the same texts and masks as `sana` makes, and what the host's conditioning nodes do with them."""

import logging
import socket

import pytest
import torch
from torch import Tensor

from sana.text.prompt import INSTRUCTION
from sana.text.styles import STYLES
from tests.host.inprocess.small import (
    EQUAL,
    HEIGHT,
    OTHER_PROMPT,
    PROMPT,
    SEED,
    TEXT_ENCODER,
    VARIANT,
    WIDTH,
    Conditioning,
    Small,
    difference,
    load,
    write_variant,
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


def test_a_style_is_part_of_the_text(small: Small) -> None:
    """Each in its words, for the prompt and for the negative prompt; a changed one is encoded anew."""
    for style, text in (("Clay", STYLES["Clay"].around(PROMPT)), ("Clay (negative)", STYLES["Clay"].against(PROMPT))):
        (found,) = small.host.call("GemmaTextEncode", clip=small.clip, text=PROMPT, instruction="none", style=style)
        for ours, wanted in zip(parts(found), parts(small.encode(text, "none")), strict=True):
            assert torch.equal(ours, wanted)
    node = small.host.nodes["GemmaTextEncode"]
    before = tuple(node.fingerprint_inputs(style=style) for style in ("Clay", "gone", None))
    path = small.host.base / "user" / "default" / "sana" / "styles.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"Clay": {"prompt": "a clay model of {prompt}", "negative": ""}}')
    try:
        assert (node.fingerprint_inputs(style="Clay"), *before) == (
            "a clay model of …",
            STYLES["Clay"].around("…"),
            "",
            "",
        )
    finally:
        path.unlink()
    with pytest.raises(ValueError, match=r"^'gone' is no style; choose another, add it to .*styles\.json, or press R$"):
        small.host.call("GemmaTextEncode", clip=small.clip, text=PROMPT, instruction="none", style="gone")


def test_core_text_encode_gives_the_plain_text(small: Small) -> None:
    (conditioning,) = small.host.call("CLIPTextEncode", clip=small.clip, text=OTHER_PROMPT)
    for ours, theirs in zip(parts(conditioning), parts(small.encode(OTHER_PROMPT, "none")), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("instruction", ["official", "none"])
@pytest.mark.parametrize("cfg", [1.0, 4.5])
def test_text_without_its_mask_does_not_count_padding(small: Small, cfg: float, instruction: str) -> None:
    """A CLIP with schedules gives none. The negative prompt has the mask of the prompt all the same."""
    whole = small.encode(PROMPT, instruction)
    ((text, _),) = whole
    assert difference(small.sample(positive=[[text, {}]], cfg=cfg), small.sample(positive=whole, cfg=cfg)) <= EQUAL


def test_tokens_are_reported_and_the_prompt_is_not(
    small: Small, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others print the prompt into the log, which people show when they ask for help."""
    with caplog.at_level(logging.INFO):
        small.encode(PROMPT)
        small.encode(LONG)
    count, long = small.pipeline.text_encoder.count([PROMPT, LONG])
    assert f"encoded {count.used - 1} of 299 tokens" in caplog.messages
    assert f"encoded 299 of 299 tokens, {long.lost} cut off" in caplog.messages
    assert "cat and" not in caplog.text and "circle" not in caplog.text
    assert not capsys.readouterr().out


def test_nothing_is_downloaded(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other nodes the text encoder was downloaded again, and the network was used in every run."""

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


@pytest.mark.parametrize("instruction", ["official", "none"])
def test_joined_prompts(small: Small, instruction: str) -> None:
    """ConditioningConcat joins texts but no masks; the second half counts where it is no padding."""
    other = small.encode(OTHER_PROMPT, instruction)
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


@pytest.mark.parametrize("variant", [VARIANT, "sana-sprint-0.6b-1024px"])
def test_prompts_for_areas(small: Small, variant: str) -> None:
    """ConditioningSetArea counts pixels, the other shares. One step of the left half is that of the common prompt alone."""
    model = load(small.host, write_variant(small.host, variant).name)[0]
    one_step = {"model": model, "steps": 1, "cfg": 1.0}

    def sample(node: str, width: float, x: float, height: float) -> Tensor:
        place = {"width": width, "height": height, "x": x, "y": 0, "strength": 1.0}
        (part,) = small.host.call(node, conditioning=small.encode(OTHER_PROMPT), **place)
        (both,) = small.host.call("ConditioningCombine", conditioning_1=small.positive, conditioning_2=part)
        return small.ksampler(positive=both, **one_step)

    ours = sample("ConditioningSetArea", WIDTH // 2, WIDTH // 2, HEIGHT)
    assert difference(ours, sample("ConditioningSetAreaPercentage", 0.5, 0.5, 1.0)) == 0
    alone = small.ksampler(**one_step)
    assert difference(ours[..., :2], alone[..., :2]) <= EQUAL
    assert difference(ours[..., 2:], alone[..., 2:]) > CHANGED
    edge = sample("ConditioningSetAreaPercentage", 0.01, 0.99, 1.0)
    for latent in (edge, sample("ConditioningSetArea", 64, WIDTH, HEIGHT)):  # the last cells
        assert difference(latent[..., :3], alone[..., :3]) <= EQUAL
        assert difference(latent[..., 3:], alone[..., 3:]) > CHANGED


def test_prompts_for_areas_on_a_device_with_little_memory(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host evaluates conditions one by one, and gives the negative side of an area the id of the positive one."""
    area = {"width": 0.5, "height": 1.0, "x": 0.0, "y": 0.0, "strength": 1.0}
    (left,) = small.host.call("ConditioningSetAreaPercentage", conditioning=small.encode(OTHER_PROMPT), **area)
    (both,) = small.host.call("ConditioningCombine", conditioning_1=left, conditioning_2=small.positive)
    together = small.ksampler(positive=both)
    monkeypatch.setattr(small.model.model, "memory_required", lambda *unused, **named: 2**60)
    assert difference(small.ksampler(positive=both), together) <= EQUAL


def test_text_goes_to_the_device_of_the_latent(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host leaves conditions on the CPU until it calls the network."""

    class Seen(Exception):
        """Ends the evaluation, whose weights are not on that device."""

    def look(text: Tensor, mask: Tensor) -> None:
        raise Seen(text.device.type, mask.device.type)

    monkeypatch.setattr(small.model.model.diffusion_model, "text_context", look)
    ((text, options),) = small.positive
    with pytest.raises(Seen) as seen:
        small.model.model.apply_model(
            torch.empty(1, 32, 3, 4, device="meta"),
            torch.ones(1),
            c_crossattn=text,
            attention_mask=options["attention_mask"],
        )
    assert seen.value.args == ("meta", "meta")


def test_encoder_computes_where_the_host_says(small: Small) -> None:
    """Its own weights may be elsewhere: the host loads as many as fit."""
    model = small.clip.cond_stage_model
    model.set_clip_options({"execution_device": torch.device("meta")})
    assert model.encoder.device.type == "meta"
    norm = model.encoder.model.layers[0].input_layernorm
    assert norm(torch.empty(1, 2, 192, device="meta")).device.type == "meta"
    model.reset_clip_options()
    assert model.encoder.device.type == "cpu"
    assert difference(small.encode("a red circle")[0][0], small.encode("a red circle")[0][0]) == 0


def sample_guided(small: Small, node: str, **inputs: object) -> Tensor:
    """The latents (B, 32, H, W) of SamplerCustomAdvanced with a guider."""
    (guider,) = small.host.call(node, model=small.model, **inputs)
    noise = small.host.call("RandomNoise", noise_seed=SEED)[0]
    sampler = small.host.call("KSamplerSelect", sampler_name="euler")[0]
    (sigmas,) = small.host.call("FlowDPMScheduler", model=small.model, steps=2, denoise=1.0, flow_shift=0.0)
    parts = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": small.empty()}
    return small.host.call("SamplerCustomAdvanced", **parts)[0]["samples"]


def test_second_prompt_of_the_dual_guider_keeps_its_own_mask(small: Small) -> None:
    """It has the number that a negative prompt has elsewhere. Without guidance between the two, it is the first alone."""
    other = small.encode("a large green triangle and a small yellow star on a light blue background")
    prompts = {"cond1": small.encode("a ring"), "cond2": other, "negative": small.negative}
    scales = {"cfg_conds": 0.0, "cfg_cond2_negative": 1.0, "style": "regular"}
    alone = sample_guided(small, "BasicGuider", conditioning=other)
    assert difference(sample_guided(small, "DualCFGGuider", **prompts, **scales), alone) <= EQUAL


def test_every_guider_gives_the_negative_prompt_the_mask_of_the_prompt(small: Small) -> None:
    """They evaluate it by itself, last or first. Where two prompts are one, or there is nothing to avoid, they are CFGGuider."""
    both = {"positive": small.positive, "negative": small.negative}
    usual = sample_guided(small, "CFGGuider", **both, cfg=4.5)
    two_models = {"model_negative": small.model, "cfg": 4.5}
    assert difference(sample_guided(small, "DualModelGuider", **both, **two_models), usual) <= EQUAL
    avoided = {"positive": small.positive, "negative": small.positive, "empty_conditioning": small.negative}
    scales = {"cfg": 4.5, "neg_scale": 0.0}
    assert difference(sample_guided(small, "PerpNegGuider", **avoided, **scales), usual) <= EQUAL
    one_prompt = {"cond1": small.positive, "cond2": small.positive, "negative": small.negative, "style": "nested"}
    scales = {"cfg_conds": 1.0, "cfg_cond2_negative": 4.5}
    assert difference(sample_guided(small, "DualCFGGuider", **one_prompt, **scales), usual) <= EQUAL


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
