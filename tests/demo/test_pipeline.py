"""The demo model in diffusers and transformers: its folder is a pipeline of theirs as it is, and draws the same."""

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers import SanaPipeline as DiffusersPipeline
from transformers import AutoTokenizer

import sana
from sana.checkpoints.text_encoder import load_text_encoder
from sana.loading import MODELS
from sana.text.prompt import DIFFUSERS_INSTRUCTION

DEMO = MODELS["demo"]
PROMPT = "a red circle left of a blue square"
SIZE = {"height": 128, "width": 128}


def test_diffusers_opens_the_demo_and_draws_the_same_picture() -> None:
    theirs = DiffusionPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)
    assert type(theirs) is DiffusersPipeline
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 6, "guidance_scale": 2.0, "use_resolution_binning": False, **SIZE}
    (expected,) = theirs(PROMPT, latents=noise, output_type="np", **options).images
    ours = sana.SanaPipeline.load("demo")
    more = {
        "reference": "diffusers",
        "instruction": DIFFUSERS_INSTRUCTION,
        "seed": 3,
        "steps": 6,
        "guidance_scale": 2.0,
    }
    (found,) = ours(PROMPT, **SIZE, **more)
    assert np.abs(np.asarray(found) / 255 - expected).max() < 3 / 255
    (other,) = ours("two green stars", **SIZE, **more)
    assert np.abs(np.asarray(other) / 255 - expected).mean() > 0.02


def test_transformers_tokenizes_as_we_do() -> None:
    theirs, ours = AutoTokenizer.from_pretrained(DEMO / "tokenizer"), load_text_encoder(DEMO).tokenizer
    for text in (PROMPT, "", "Zwei Bäume 🌲", sana.INSTRUCTION):
        assert theirs(text).input_ids == ours.encode(text)
    padded = theirs(PROMPT, padding="max_length", max_length=20, truncation=True)
    used = len(ours.encode(PROMPT))
    assert padded.input_ids == ours.encode(PROMPT) + [0] * (20 - used)
    assert padded.attention_mask == [1] * used + [0] * (20 - used)
