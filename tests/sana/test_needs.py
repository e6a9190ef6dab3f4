"""The memory model: at real sizes without a number in memory, and beside what small networks take when they run."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from bench.twins import WordTokenizer
from bench.weights import in_8_bits
from sana.config import AUTOENCODERS, VARIANTS, GemmaConfig, TransformerIdentity
from sana.inputs import encode_texts
from sana.needs import decoding_need, needs, writing_need
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.controlnet import SanaControlNet
from sana.networks.memory import GIB
from sana.networks.transformer import SanaTransformer
from sana.offloading import weight_bytes
from sana.pipeline import SanaPipeline
from sana.plan import Plan, Settings, make_plan
from sana.text.enhancement import enhance
from sana.text.gemma import Gemma2
from sana.text.generation import Sampling
from sana.text.text_encoder import GemmaTextEncoder
from tests.sana import models
from tests.sana.measures import peak_bytes
from tests.sana.pipeline.drawing import picture

LONG_PROMPT = "a cat on a mat " * 100
BFLOAT16 = {"dtype": torch.bfloat16, "device": "meta"}


def plan(variant: str, side: int, prompts: int = 1, **options: object) -> Plan:
    row = VARIANTS[variant]
    identity = TransformerIdentity(row.transformer, variant, row.base_size, row.flow_shift, row.dtype, "the table")
    return make_plan([f"a cat {k}" for k in range(prompts)], Settings(height=side, width=side, **options), identity, 32)


class Real:
    """Networks at real sizes in bfloat16, on meta."""

    def __init__(self, variant: str, pack: Callable[[nn.Module], nn.Module] = lambda network: network) -> None:
        config = VARIANTS[variant].transformer
        self.variant = variant
        self.transformer = pack(SanaTransformer(config, **BFLOAT16))
        self.autoencoder = DCAutoencoder(AUTOENCODERS["dc-ae-f32c32-sana-1.1"], **BFLOAT16)
        self.text_encoder = GemmaTextEncoder(pack(Gemma2(GemmaConfig(), **BFLOAT16)), WordTokenizer())
        self.controlnet = SanaControlNet(replace(config, control_blocks=7), **BFLOAT16)

    @property
    def weights(self) -> dict[str, int]:
        gemma = self.text_encoder.model
        parts = {"text encoder": [gemma.layers, gemma.norm], "encoder": [self.autoencoder.encoder]}
        parts |= {"transformer": [self.transformer], "decoder": [self.autoencoder.decoder]}
        parts |= {"ControlNet": [self.controlnet]}
        return {name: sum(map(weight_bytes, modules)) for name, modules in parts.items()}

    def taken(self, side: int, controlled: bool = False, **options: object) -> dict[str, float]:
        """GiB by phase, weights included."""
        networks = self.transformer, self.autoencoder, self.text_encoder
        found = needs(plan(self.variant, side, **options), *networks, self.controlnet if controlled else None)
        weights = self.weights
        return {phase: (need.least + sum(weights[name] for name in need.parts)) / GIB for phase, need in found.items()}


@pytest.mark.parametrize("side", [1024, 4096])
def test_the_largest_usual_model_fits_on_a_card_of_8_gib_part_by_part(side: int) -> None:
    """Which has 7 to give, and keeps a fifth of it free."""
    real = Real("sana-1.6b-1024px")
    taken = real.taken(side)
    assert list(taken) == ["encoding the prompt", "sampling", "decoding"]
    assert 3.7 < max(taken.values()) < 0.8 * 7
    everything = (
        sum(real.weights.values()) - real.weights["ControlNet"] + real.text_encoder.model.embed_tokens.weight.nbytes
    )
    assert everything / GIB > 8


def test_in_8_bits_the_small_model_fits_in_3_gib_only_without_the_embedding_on_the_device() -> None:
    real = Real("sana-0.6b-1024px", partial(in_8_bits, dtype=torch.bfloat16))
    taken = real.taken(1024)
    assert max(taken.values()) < 0.8 * 3
    embedding = weight_bytes(real.text_encoder.model.embed_tokens) / GIB
    assert taken["encoding the prompt"] + embedding > 0.8 * 3
    assert Real("sana-0.6b-1024px").taken(1024)["encoding the prompt"] > 3


def test_what_more_is_asked_for_is_counted() -> None:
    real = Real("sana-0.6b-1024px")
    plain = real.taken(1024)
    pictures = real.taken(1024, image=picture(), strength=0.5)
    assert list(pictures) == ["encoding the prompt", "encoding the picture", "sampling", "decoding"]
    assert pictures["encoding the picture"] > weight_bytes(real.autoencoder.encoder) / GIB
    controlled = real.taken(1024, controlled=True, control_image=picture())
    assert controlled["sampling"] - plain["sampling"] > weight_bytes(real.controlnet) / GIB
    assert real.taken(1024, prompts=8)["encoding the prompt"] > plain["encoding the prompt"]
    assert real.taken(1024, prompts=8)["sampling"] > plain["sampling"]
    assert real.taken(1024, prompts=8)["decoding"] == plain["decoding"]  # one after another
    assert real.taken(1024, guidance_scale=1.0)["sampling"] < plain["sampling"]
    assert real.taken(1024, max_bytes=2**31)["decoding"] > plain["decoding"]


@pytest.fixture(scope="module")
def small() -> SanaPipeline:
    identity = TransformerIdentity(models.TRANSFORMER, "custom", 64, 2.0, "float32", "training")
    controlnet = SanaControlNet(replace(models.TRANSFORMER, control_blocks=2))
    controlnet = models.randomise(controlnet)
    parts = models.transformer(), models.autoencoder(), models.text_encoder()
    return SanaPipeline(*parts, identity, controlnet=controlnet)


def measured(small: SanaPipeline, drawn: Plan) -> dict[str, int]:
    """Bytes that PyTorch allocates in each phase."""
    with torch.no_grad():
        small.text_encoder.forget()
        taken = {"encoding the prompt": peak_bytes(lambda: encode_texts(small.text_encoder, drawn)[0].text)[1]}
        (inputs,) = small.prepare([drawn])
        steps, sampled = peak_bytes(lambda: list(small.follow(drawn, inputs))[-1].next_x)
        taken |= {
            "sampling": sampled,
            "decoding": peak_bytes(lambda: small.pictures(steps, drawn.settings.max_bytes))[1],
        }
    return taken


@pytest.mark.parametrize(("side", "prompts", "controlled"), [(256, 1, False), (512, 1, False), (256, 3, True)])
def test_the_model_is_what_runs_take(small: SanaPipeline, side: int, prompts: int, controlled: bool) -> None:
    """Never less, and at most a third more, with prompts as long as they can be."""
    settings = Settings(height=side, width=side, steps=1, control_image=picture(), control_scale=float(controlled))
    drawn = small.plan([f"{k} {LONG_PROMPT}" for k in range(prompts)], settings)
    networks = small.transformer, small.autoencoder, small.text_encoder
    modelled = needs(drawn, *networks, small.controlnet if controlled else None)
    for phase, found in measured(small, drawn).items():
        assert found <= modelled[phase].working <= 1.33 * found, phase


@pytest.mark.parametrize(
    ("instruction", "text", "count"),
    [
        ("Draw ", "a cat", 300),
        ("Draw ", LONG_PROMPT, 40),
        ("Draw ", 10 * LONG_PROMPT, 3),
        (10 * LONG_PROMPT, "a cat", 3),
    ],
    ids=range(4),
)
def test_writing_is_modelled_by_what_is_read_and_what_is_written(instruction: str, text: str, count: int) -> None:
    """Never less, and at most half more. Logits of 600 tokens are next to nothing."""
    encoder, sampling = models.writer(), Sampling(count)
    found = peak_bytes(lambda: torch.tensor(len("".join(enhance(encoder, text, instruction, sampling)))))[1]
    assert found <= writing_need(encoder, instruction + text, count).working <= 1.5 * found


def test_a_long_instruction_is_modelled_before_a_prompt_as_well(small: SanaPipeline) -> None:
    plain = SanaPipeline(small.transformer, small.autoencoder, small.text_encoder, small.identity)
    drawn = plain.plan("a cat", Settings(height=256, width=256, steps=1, instruction=10 * LONG_PROMPT))
    need = needs(drawn, small.transformer, small.autoencoder, small.text_encoder)["encoding the prompt"].working
    small.text_encoder.forget()
    found = peak_bytes(lambda: encode_texts(small.text_encoder, drawn)[0].text)[1]
    assert found <= need <= 1.5 * found


def test_decoding_in_as_little_as_it_takes_is_modelled_too(small: SanaPipeline) -> None:
    latent = torch.randn(1, 32, 16, 16)
    need = decoding_need(small.autoencoder, latent.shape, None)
    bound = need.least - 3 * 512 * 512 * 4
    found = peak_bytes(lambda: small.pictures(latent, bound))[1]
    assert found <= need.least < need.working / 2
    assert decoding_need(small.autoencoder, latent.shape, bound).working == need.least
