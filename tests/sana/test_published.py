"""The tables and defaults of `sana` against what the authors of the models publish."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config

from sana.checkpoints.autoencoder import autoencoder_tensors, detect_autoencoder
from sana.checkpoints.files import TensorFile
from sana.checkpoints.text_encoder import gemma_config, gemma_json, gemma_tensors
from sana.checkpoints.transformer import identify_transformer
from sana.config import AUTOENCODERS, VARIANTS, GemmaConfig, StageConfig, TransformerConfig
from sana.networks.autoencoder_layers import ChannelNorm, MultiscaleLinearAttention, channel_norm
from sana.networks.controlnet import SanaControlNet
from sana.networks.layers import Build, CrossAttention, LinearAttention
from sana.networks.transformer import SanaTransformer
from sana.pipeline import SanaPipeline, Settings
from sana.sampling.guidance import Guidance
from sana.sampling.resolution import buckets
from sana.sampling.schedule import flow_sigmas, scm_angles
from sana.sampling.solvers import scm_solver
from sana.text.prompt import DIFFUSERS_INSTRUCTION, INSTRUCTION, window
from sana.text.tokenizers import BOS, EOS, PAD
from tests.sana import published
from tests.sana.models import SPRINT, TRANSFORMER, write_model
from tests.sana.released import names, released
from tests.sana.twins import TEXT_WIDTH, diffusers_transformer, randomise, tiny_config, transformer_pair


def test_there_is_a_row_for_every_release() -> None:
    """In this order: detection takes the first of several rows with the same network."""
    assert list(VARIANTS) == list(published.TRANSFORMERS)
    assert list(AUTOENCODERS) == list(published.AUTOENCODERS)


@pytest.mark.parametrize("name", published.TRANSFORMERS)
def test_variants_are_as_released(name: str) -> None:
    found, row = VARIANTS[name], published.TRANSFORMERS[name]
    assert (found.base_size, found.flow_shift, found.dtype, found.source) == row[-4:]
    assert asdict(found.transformer) == {
        "hidden_size": row.hidden_size,
        "depth": row.depth,
        "cross_heads": row.cross_heads,
        "text_width": published.TEXT_WIDTH,
        "channels": published.CHANNELS,
        "ff_width": row.ff_width,
        "qk_norm": row.qk_norm,
        "guidance_embed": row.sprint,
        "continuous_time": row.sprint,
        "position_base": row.position[0],
        "position_interpolation": row.position[1],
        "control_blocks": row.control_blocks,
    }
    assert found.transformer.self_heads * 32 == row.hidden_size
    assert found.transformer.perturbed_block == published.PERTURBED_BLOCKS[row.depth]
    assert replace(found.transformer, depth=5).perturbed_block == 4  # the last of a small model


@pytest.mark.parametrize("name", published.AUTOENCODERS)
def test_autoencoders_are_as_released(name: str) -> None:
    found, row = AUTOENCODERS[name], published.AUTOENCODERS[name]

    def stages(depths: tuple[int, ...], attention: int, batch_norm: int) -> tuple[StageConfig, ...]:
        deep = len(depths) - attention
        return tuple(
            StageConfig(
                width,
                depth,
                attention=i >= deep,
                scales=row.scales if i >= deep else (),
                batch_norm=i < batch_norm,
                activation="relu" if i < batch_norm else "silu",
            )
            for i, (width, depth) in enumerate(zip(row.widths, depths, strict=True))
        )

    assert found.encoder == stages(row.encoder, row.attention[0], 0)
    assert found.decoder == stages(row.decoder, row.attention[1], row.batch_norm)
    rest = (found.latent_channels, found.strided_down, found.nearest_up, found.shortcuts, found.out_activation)
    assert (*rest, found.latent_scale) == row[-6:]
    assert found.downsample == 2 ** (len(row.widths) - 1)


@pytest.mark.parametrize("name", names("autoencoders", "original"))
def test_an_autoencoder_without_a_configuration_has_the_scale_of_its_family(name: str) -> None:
    """Of two families with the same network, that of the first row."""
    row = published.AUTOENCODERS[name]
    first = next(other for other in published.AUTOENCODERS.values() if other[:-1] == row[:-1])
    file = TensorFile(Path("ae.safetensors"), released("autoencoders", "original", name).tensors)
    assert detect_autoencoder(autoencoder_tensors(file), file).latent_scale == first.latent_scale


def test_gemma_is_that_of_google() -> None:
    assert asdict(GemmaConfig()) == published.GEMMA_2_2B
    theirs = Gemma2Config()
    known = {name: value for name, value in published.GEMMA_2_2B.items() if name != "rope_theta"}
    assert {name: getattr(theirs, name) for name in known} == known
    assert gemma_json(GemmaConfig()).items() >= {**published.GEMMA_2_2B, **published.GEMMA_TOKENS}.items()
    assert {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS} == published.GEMMA_TOKENS


def test_a_single_gemma_file_has_the_numbers_of_google() -> None:
    """Without a configuration in it or beside it, and with one that says nothing but what it is."""
    mark = torch.empty(2304, device="meta")
    tensors = {f"model.layers.{i}.post_feedforward_layernorm.weight": mark for i in range(26)}
    tensors["model.norm.weight"] = mark
    for config in ({}, {"model_type": "gemma2"}):
        file = TensorFile(Path("gemma.safetensors"), tensors, config=config)
        assert asdict(gemma_config(gemma_tensors(file), file)) == published.GEMMA_2_2B


def test_a_model_that_says_nothing_has_the_common_defaults() -> None:
    tensors = diffusers_transformer(tiny_config("sana-1.6b-1024px")).to("meta").state_dict()
    config = {"num_cross_attention_heads": 2}
    identity = identify_transformer(TensorFile(Path("model.safetensors"), tensors, config=config))
    assert (identity.variant, identity.base_size) == ("custom", 1024)
    assert (identity.flow_shift, identity.guidance_scale) == (published.FLOW_SHIFT, published.GUIDANCE_SCALE)


@pytest.mark.parametrize(("length", "name"), [(64**2, "sana-1.6b-2048px"), (128**2, "sana-1.6b-4096px")])
def test_a_position_buffer_tells_the_2k_and_the_4k_model(length: int, name: str) -> None:
    tensors = released("transformers", "official", "Sana_1600M_2Kpx").tensors
    tensors = {**tensors, "pos_embed": torch.empty(1, length, 2240, device="meta")}
    found = identify_transformer(TensorFile(Path("model.pth"), tensors))
    row = published.TRANSFORMERS[name]
    assert (found.config.position_base, found.config.position_interpolation) == row.position
    assert (found.variant, found.base_size, found.flow_shift) == (name, row.base_size, row.flow_shift)


def test_norms_and_the_clamp_are_those_of_nvlabs() -> None:
    own, cross = LinearAttention(32, True, Build()), CrossAttention(32, 1, True, Build())
    assert own.norm_q.eps == own.norm_k.eps == published.NORMS["self-attention"]
    assert cross.norm_q.eps == cross.norm_k.eps == published.NORMS["cross-attention"]
    config = tiny_config("sana-0.6b-1024px-controlnet-hed")
    for network in (SanaTransformer(config, device="meta"), SanaControlNet(config, device="meta")):
        assert network.caption_norm.eps == published.NORMS["text"]
    clamped = LinearAttention(32, False, Build())
    torch.nn.init.eye_(clamped.to_out[0].weight)
    torch.nn.init.zeros_(clamped.to_out[0].bias)
    for sign in (1, -1):
        assert clamped.project(torch.full((1, 1, 32), sign * 1e6)).unique().tolist() == [sign * published.CLAMP]


@torch.no_grad()
def test_small_tokens_are_normalised_as_by_diffusers() -> None:
    """Their variance is that of the eps: with another one they would be several times as large."""
    ours, theirs = transformer_pair(tiny_config("sana-0.6b-1024px", depth=1))
    for parameter in theirs.patch_embed.parameters():
        parameter.mul_(published.NORMS["layer"] ** 0.5)  # of both networks, which share it
    x, text, time = torch.randn(1, 32, 4, 4), torch.randn(1, 5, TEXT_WIDTH), torch.tensor([500])
    expected = theirs(x, encoder_hidden_states=text, timestep=time, return_dict=False)[0]
    torch.testing.assert_close(ours(x, time, text), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_small_features_are_normalised_as_published() -> None:
    eps = published.NORMS["autoencoder"]
    x, norm = torch.randn(1, 8, 4, 4) * eps**0.5, ChannelNorm(8, Build())
    norm.weight.fill_(1.0), norm.bias.zero_()
    torch.testing.assert_close(norm(x), x / (x.square().mean(1, keepdim=True) + eps).sqrt(), rtol=1e-4, atol=1e-6)
    assert channel_norm(8, True, Build()).eps == eps


@torch.no_grad()
def test_attention_of_the_autoencoder_divides_by_all_of_its_sum() -> None:
    """The eps, 1e-15 in efficientvit models/nn/ops.py, is too small to show where queries and keys are small."""
    attention, x = (
        randomise(MultiscaleLinearAttention(StageConfig(32, 1, attention=True), Build())),
        torch.randn(1, 32, 4, 4),
    )
    expected = attention(x)
    for part in (attention.to_q, attention.to_k):  # of one head of 32 channels these are the queries and the keys
        part.weight.mul_(1e-5)
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-4)


def test_the_instruction_is_the_published_one() -> None:
    assert hashlib.sha256(INSTRUCTION.encode()).hexdigest() == published.INSTRUCTION_SHA256
    assert 'generate an "Enhanced prompt" that' in INSTRUCTION and "'" not in INSTRUCTION
    assert "generate an 'Enhanced prompt' that" in DIFFUSERS_INSTRUCTION and '"' not in DIFFUSERS_INSTRUCTION
    assert window(0).stop == published.TEXT_TOKENS


@pytest.mark.parametrize(("config", "steps"), [(TRANSFORMER, published.STEPS), (SPRINT, published.SPRINT_STEPS)])
def test_settings_are_those_of_the_demo_of_nvlabs(tmp_path: Path, config: TransformerConfig, steps: int) -> None:
    assert (Guidance().scale, Guidance().interval) == (published.GUIDANCE_SCALE, (0.0, 1.0))
    assert Guidance().perturbed_blocks == {published.PERTURBED_BLOCKS[20]}
    pipeline = SanaPipeline.load(write_model(tmp_path, config))
    record = pipeline.plan("a cat", Settings()).record()
    assert (record["steps"], record["guidance_scale"]) == (steps, published.GUIDANCE_SCALE)


def test_schedules_start_where_those_of_nvlabs_do() -> None:
    assert float(flow_sigmas(4, 1.0)[0]) == pytest.approx(published.FLOW_DPM_START, abs=1e-7)
    for steps, angles in published.SPRINT_ANGLES.items():
        assert scm_angles(steps).tolist() == pytest.approx(angles, abs=1e-7)
    for steps, angles in published.PAPER_ANGLES.items():
        assert scm_angles(steps, paper=True).tolist() == pytest.approx(angles, abs=5e-6)  # five digits are printed


def test_the_noise_of_sprint_has_the_deviation_of_the_paper() -> None:
    """After a step to a quarter turn nothing but fresh noise is left, times sigma_d."""
    x, angles = torch.zeros(1, 1, 2, 2), torch.tensor([1.5708, 1.5708])
    found = scm_solver(lambda x, angle: x, x, angles, noise=torch.ones_like)
    torch.testing.assert_close(found, torch.full_like(x, published.SCM_DEVIATION), rtol=0, atol=1e-6)


@pytest.mark.parametrize("base_size", [512, 1024, 2048, 4096])
def test_buckets_are_those_of_the_training(base_size: int) -> None:
    assert {*buckets(base_size)} == published.aspect_ratios(base_size)
    assert len(buckets(base_size)) == 40
