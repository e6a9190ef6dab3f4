"""Pictures with a ControlNet, against diffusers' pipeline, and where and how strongly it acts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaTransformer2DModel,
)
from PIL import Image
from torch import Tensor
from transformers import Gemma2Model

from sana import CheckpointError
from sana.checkpoints.controlnet import load_controlnet
from sana.config import TransformerConfig
from sana.networks.controlnet import SanaControlNet
from sana.pipeline import SanaPipeline
from sana.plan import Settings
from sana.sampling.schedule import flow_sigmas, shift_sigma
from tests.sana.models import PROMPTS, TEXT_WIDTH, TRANSFORMER, reference_tokenizer, transformer
from tests.sana.pipeline.drawing import HEIGHT, SIZE, WIDTH, drawn, half_mask, picture, sample
from tests.sana.twins import randomise

BLOCKS = 2
EQUAL = 1e-4  # of pixels in [0, 1]; measured: 4e-6
DIFFERENT = 0.01  # mean over the pixels


def diffusers_controlnet(config: TransformerConfig) -> SanaControlNetModel:
    return SanaControlNetModel(
        num_attention_heads=config.self_heads,
        num_layers=BLOCKS,
        num_cross_attention_heads=config.cross_heads,
        cross_attention_head_dim=config.hidden_size // config.cross_heads,
        cross_attention_dim=config.hidden_size,
        caption_channels=config.text_width,
    )


@pytest.fixture(scope="module")
def control_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ControlNet as diffusers writes it, whose embeddings are its own."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("control")
    randomise(diffusers_controlnet(TRANSFORMER), seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def controlled(folder: Path, control_folder: Path) -> SanaPipeline:
    return SanaPipeline.load(folder, control=control_folder)


@pytest.fixture(scope="module")
def theirs(folder: Path, control_folder: Path) -> SanaControlNetPipeline:
    parts = {
        "tokenizer": reference_tokenizer(folder / "tokenizer"),
        "text_encoder": Gemma2Model.from_pretrained(
            folder / "text_encoder", dtype=torch.float32, attn_implementation="eager"
        ),
        "vae": AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        "transformer": SanaTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
        "scheduler": DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler"),
        "controlnet": SanaControlNetModel.from_pretrained(control_folder),
    }
    found = SanaControlNetPipeline(**parts)
    found.set_progress_bar_config(disable=True)
    return found


@torch.no_grad()
def images(pipeline: SanaPipeline, prompts: list[str], **options: object) -> Tensor:
    """Images in [0, 1] before they are rounded to 8 bits."""
    latent = sample(pipeline, prompts, **options) / pipeline.autoencoder.config.latent_scale
    return pipeline.autoencoder.decode(latent).add(1).div(2).clamp(0, 1)


@pytest.mark.parametrize(("guidance_scale", "scale"), [(1.0, 1.0), (4.5, 1.0), (4.5, 0.4)])
def test_pictures_are_those_of_diffusers(
    controlled: SanaPipeline, theirs: SanaControlNetPipeline, guidance_scale: float, scale: float
) -> None:
    prompts = [PROMPTS[0], PROMPTS[3]]
    expected = theirs(
        prompts,
        num_inference_steps=4,
        use_resolution_binning=False,
        output_type="pt",
        **SIZE,
        control_image=picture(),
        controlnet_conditioning_scale=scale,
        guidance_scale=guidance_scale,
        negative_prompt=["Blurry"] * 2,
        latents=drawn(5, 6),
    ).images
    options = {"steps": 4, "guidance_scale": guidance_scale, "seed": 5, "reference": "diffusers", "negative": "Blurry"}
    found = images(controlled, prompts, control_image=picture(), control_scale=scale, **options)
    assert float((found - expected).abs().max()) < EQUAL
    other = images(controlled, prompts, control_image=picture(1), control_scale=scale, **options)
    assert (other - found).abs().mean() > DIFFERENT
    by_nvlabs = images(
        controlled, prompts, control_image=picture(), control_scale=scale, **options | {"reference": "nvlabs"}
    )
    assert (by_nvlabs - found).abs().mean() > DIFFERENT


def test_a_scale_of_0_is_no_control(controlled: SanaPipeline, pipeline: SanaPipeline) -> None:
    found = sample(controlled, "a", steps=2, control_image=picture(), control_scale=0.0)
    assert torch.equal(found, sample(pipeline, "a", steps=2))


def acting(pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[bool]:
    """Whether the ControlNet acted, by step."""
    calls: list[int] = []
    forward = SanaControlNet.forward

    def counted(self: SanaControlNet, *arguments: object) -> list[Tensor]:
        calls.append(1)
        return forward(self, *arguments)

    monkeypatch.setattr(SanaControlNet, "forward", counted)
    found = []
    for _ in pipeline.follow(pipeline.plan("a", Settings(**{**SIZE, "control_image": picture(), **options}))):
        found.append(bool(calls))
        calls.clear()
    return found


def test_it_acts_between_two_shares_of_the_schedule(controlled: SanaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an evenly falling schedule, both ends included, so after the flow shift of the model or a given one."""
    shift = controlled.identity.flow_shift
    for options in ({}, {"flow_shift": 5.0}):
        levels = flow_sigmas(8, options.get("flow_shift", shift))[:-1].double()
        low, high = (
            float(shift_sigma(torch.tensor(1 - share), options.get("flow_shift", shift))) for share in (0.6, 0.2)
        )
        expected = [low <= float(level) <= high for level in levels]
        assert 0 < sum(expected) < 8 and not expected[0] and not expected[-1]
        found = acting(controlled, monkeypatch, steps=8, control_from=0.2, control_to=0.6, **options)
        assert found == expected
    assert acting(controlled, monkeypatch, steps=3) == [True] * 3
    # Flow-Euler begins at pure noise, which is the very end of the range
    assert acting(controlled, monkeypatch, steps=3, control_to=0.1, solver="flow_euler") == [True, False, False]
    assert acting(controlled, monkeypatch, steps=3, control_from=0.5) == [False, False, True]


@pytest.mark.parametrize(
    "options", [{"pag_scale": 2.0}, {"image": picture(2), "mask": half_mask()}, {"solver": "flow_euler"}]
)
def test_it_goes_with_everything_else(
    controlled: SanaPipeline, pipeline: SanaPipeline, options: dict[str, object]
) -> None:
    found = sample(controlled, "a", steps=3, control_image=picture(), **options)
    assert found.isfinite().all() and (found - sample(pipeline, "a", steps=3, **options)).abs().mean() > DIFFERENT
    assert torch.equal(sample(controlled, "a", steps=3, control_image=picture(), **options), found)


def test_a_picture_of_a_batch_is_the_picture_alone(controlled: SanaPipeline) -> None:
    together = sample(controlled, "a", batch_size=2, steps=2, control_image=picture(), seed=3)
    alone = sample(controlled, "a", steps=2, control_image=picture(), seed=4)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_the_picture_for_control_suggests_the_size(controlled: SanaPipeline) -> None:
    assert controlled.plan("a", Settings(control_image=picture())).size == (HEIGHT, WIDTH)
    wide = Settings(control_image=picture(), image=Image.new("RGB", (64, 96)))
    assert controlled.plan("a", wide).size == (96, 64)
    assert controlled.plan("a", Settings(control_image=picture(), height=32)).size == (32, WIDTH)


def test_one_without_the_other_is_refused(controlled: SanaPipeline, pipeline: SanaPipeline) -> None:
    with pytest.raises(
        ValueError, match="^a ControlNet needs the picture that it follows; give a control_image as well$"
    ):
        controlled("a", **SIZE)
    message = "^a control_image needs the ControlNet that follows it; give a control file as well$"
    with pytest.raises(ValueError, match=message):
        pipeline("a", **SIZE, control_image=picture())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 192}, "this ControlNet is 96 wide and the SANA model 192; use the one of its size"),
        (
            {"text_width": 40},
            f"this ControlNet takes texts of width {TEXT_WIDTH} and the SANA model of width 40; use the one of its size",
        ),
        ({"qk_norm": True}, "this ControlNet was made for SANA, and the model is a SANA-1.5; use a SANA model"),
        ({"guidance_embed": True}, "SANA-Sprint takes no ControlNet; use the SANA model that this one was made for"),
    ],
)
def test_a_controlnet_for_another_model_is_refused(
    loaded: SanaPipeline, control_folder: Path, changes: dict[str, object], message: str
) -> None:
    other = transformer(replace(TRANSFORMER, **changes))
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        SanaPipeline(other, loaded.autoencoder, None, loaded.identity, controlnet=load_controlnet(control_folder))
