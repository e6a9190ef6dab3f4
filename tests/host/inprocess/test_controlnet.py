"""Load SANA ControlNet with the host's Apply ControlNet, against the networks of `sana`."""

import json
import shutil
from dataclasses import replace

import comfy.samplers
import pytest
import torch
from comfy.k_diffusion.sampling import sample_euler
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import sana
from bench.weights import randomise
from sana.config import LATENT_SCALE
from sana.networks.controlnet import SanaControlNet
from sana.networks.transformer import Modulation, SanaTransformer, TextContext
from tests.host.inprocess.small import (
    EQUAL,
    OTHER_PROMPT,
    PROMPT,
    Small,
    difference,
    load,
    picture,
    pipeline_latent,
    write_variant,
)
from tests.sana.measures import mapped_bytes

NAME = "control.safetensors"
Control = object


class Controlled:
    """A transformer that always runs with a ControlNet, for `Small.reference`."""

    def __init__(self, transformer: SanaTransformer, network: SanaControlNet, image: Tensor, strength: float) -> None:
        self.transformer, self.network, self.image, self.strength = transformer, network, image, strength
        self.config, self.dtype, self.scale_shift_table = (
            transformer.config,
            transformer.dtype,
            transformer.scale_shift_table,
        )
        self.modulation = transformer.modulation

    def text_context(self, text: Tensor, text_mask: Tensor) -> tuple[TextContext, TextContext]:
        return self.transformer.text_context(text, text_mask), self.network.text_context(text, text_mask)

    def velocity(
        self, x: Tensor, modulation: Modulation, contexts: tuple[TextContext, TextContext], **options: object
    ) -> Tensor:
        image = self.image.expand(len(x), -1, -1, -1)

        def control(tokens: Tensor) -> list[Tensor]:
            return [self.strength * part for part in self.network(tokens, image, modulation, contexts[1])]

        return self.transformer.velocity(x, modulation, contexts[0], control=control, **options)


@pytest.fixture(scope="module")
def network(small: Small) -> SanaControlNet:
    """A random ControlNet of two blocks, written where the host looks for it."""
    config = replace(small.pipeline.transformer.config, control_blocks=2)
    network = randomise(SanaControlNet(config), seed=5)
    folder = small.host.base / "models" / "controlnet"
    save_file(network.state_dict(), folder / NAME)
    (folder / "config.json").write_text(json.dumps({"num_cross_attention_heads": config.cross_heads}))
    return network


@pytest.fixture(scope="module")
def control(small: Small, network: SanaControlNet) -> Control:
    return small.host.call("SanaControlNetLoader", control_net=NAME)[0]


def apply(small: Small, control: Control, strength: float, end: float = 1.0, start: float = 0.0) -> dict[str, object]:
    """The conditions of `ControlNetApplyAdvanced`."""
    conditions = {"positive": small.positive, "negative": small.negative, "control_net": control, "image": picture()}
    return dict(
        zip(
            ("positive", "negative"),
            small.host.call(
                "ControlNetApplyAdvanced",
                **conditions,
                strength=strength,
                start_percent=start,
                end_percent=end,
                vae=small.vae,
            ),
            strict=True,
        )
    )


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_control_is_that_of_the_standalone_networks(
    small: Small, network: SanaControlNet, control: Control, strength: float
) -> None:
    found = small.ksampler(**apply(small, control, strength))
    image = small.pipeline.autoencoder.encode(picture().movedim(-1, 1) * 2 - 1) * LATENT_SCALE
    sampling = small.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 3)
    transformer = Controlled(small.pipeline.transformer, network, image, strength)
    expected = small.reference(sample_euler, sigmas, small.empty(), transformer=transformer)
    assert difference(found, expected) < EQUAL
    assert difference(found, small.ksampler()) > 100 * EQUAL


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.5), (0.3, 0.8), (0.6, 1.0)])
def test_the_standalone_pipeline_draws_the_same_with_a_controlnet(
    small: Small, network: SanaControlNet, control: Control, start: float, end: float
) -> None:
    """Apply ControlNet Advanced from one share of the schedule to another."""
    steps, plain = 6, small.pipeline
    pipeline = sana.SanaPipeline(
        plain.transformer, plain.autoencoder, plain.text_encoder, plain.identity, controlnet=network
    )
    guide = Image.fromarray(picture()[0].mul(255).round().byte().numpy())
    settings = {"control_image": guide, "control_scale": 0.7, "control_from": start, "control_to": end}
    found = pipeline_latent(pipeline, PROMPT, negative=OTHER_PROMPT, steps=steps, **settings)
    assert difference(found, small.sample(steps=steps, **apply(small, control, 0.7, end, start))) < EQUAL
    assert difference(found, pipeline_latent(plain, PROMPT, negative=OTHER_PROMPT, steps=steps)) > 10 * EQUAL


def test_control_sees_the_exact_time_in_bfloat16(
    small: Small, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host rounds the time to the dtype of the weights, to multiples of 4 near 1000."""
    model = load(small.host, small.path.name, "bf16")[0]
    network, seen = model.model.diffusion_model, []
    modulation = network.modulation

    def look(time: Tensor, *arguments: object) -> Modulation:
        seen.append(float(time[0]))
        return modulation(time, *arguments)

    monkeypatch.setattr(model.model, "get_dtype_inference", lambda: torch.bfloat16)  # a CPU computes in float32
    monkeypatch.setattr(network, "modulation", look)
    small.ksampler(model=model, steps=3, **apply(small, control, 1.0))
    assert len(seen) == 6 and len(set(seen)) == 3  # the control's and the model's own, in each step


def test_sprint_is_refused(small: Small, control: Control) -> None:
    sprint = load(small.host, write_variant(small.host, "sana-sprint-0.6b-1024px").name)[0]
    with pytest.raises(ValueError, match="SANA-Sprint takes no ControlNet"):
        small.ksampler(model=sprint, cfg=1.0, **apply(small, control, 1.0))


@pytest.mark.newest
def test_another_generation_is_refused(small: Small, control: Control) -> None:
    """SANA and SANA-1.5 of the same width: the tensors fit, and the corrections do not."""
    model = load(small.host, write_variant(small.host, "sana-1.5-1.6b-1024px").name)[0]
    message = "this ControlNet was made for SANA, and the model is a SANA-1.5; use a SANA model"
    with pytest.raises(ValueError, match=message):
        small.ksampler(model=model, **apply(small, control, 1.0))


def test_no_strength_changes_nothing(small: Small, control: Control) -> None:
    assert difference(small.sample(**apply(small, control, 0.0)), small.sample()) < EQUAL


def test_two_controls_add_up(small: Small, control: Control) -> None:
    """Both branch off in the same place, so half the strength twice is the whole once."""
    half = apply(small, control, 0.5)
    twice = small.host.call(
        "ControlNetApplyAdvanced",
        **half,
        control_net=control,
        image=picture(),
        strength=0.5,
        start_percent=0.0,
        end_percent=1.0,
        vae=small.vae,
    )
    found = small.ksampler(positive=twice[0], negative=twice[1])
    assert difference(found, small.ksampler(**apply(small, control, 1.0))) < EQUAL


@pytest.mark.newest
def test_wrong_file_says_what_it_is(small: Small) -> None:
    shutil.copy(small.path, small.host.base / "models" / "controlnet" / "transformer.safetensors")
    with pytest.raises(Exception, match="give a ControlNet for SANA"):
        small.host.call("SanaControlNetLoader", control_net="transformer.safetensors")


def test_missing_vae_is_named(small: Small, control: Control) -> None:
    conditions = small.host.call(
        "ControlNetApplyAdvanced",
        positive=small.positive,
        negative=small.negative,
        control_net=control,
        image=picture(),
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    with pytest.raises(ValueError, match="needs a VAE"):
        small.ksampler(positive=conditions[0], negative=conditions[1])


@pytest.mark.cpu
def test_no_weight_stays_in_its_file(small: Small, network: SanaControlNet) -> None:
    """A file that shrinks while it is mapped ends the server."""
    control = small.host.call("SanaControlNetLoader", control_net=NAME)[0]
    path = small.host.base / "models" / "controlnet" / NAME
    assert control.control_model.dtype == network.input_block.weight.dtype
    assert mapped_bytes(control.control_model.parameters(), path.resolve()) == 0
