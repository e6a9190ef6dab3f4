"""The demo model from nothing: tokenizer, autoencoder, latents, then transformer and text encoder together, and its folder.

Every stage keeps its state in the work folder, so that the command can be stopped and repeated. Nothing is downloaded: the
pictures are drawn by `scenes.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..checkpoints.writing import write_pipeline
from ..config import DOWNSAMPLE, AutoencoderConfig, GemmaConfig, StageConfig, TransformerConfig, TransformerIdentity
from ..networks.autoencoder import DCAutoencoder
from ..networks.transformer import SanaTransformer
from ..pipeline import SanaPipeline
from ..text.gemma import Gemma2
from ..text.prompt import INSTRUCTION
from ..text.text_encoder import GemmaTextEncoder
from ..text.tokenizers import JsonTokenizer
from .autoencoder import ReconstructionObjective, initialise, reconstruction_sheet, scene_crops, whole_scenes
from .flow import FlowBatch, FlowObjective, initialise_transformer
from .folder import claim
from .latents import SceneLatents
from .loop import TrainingConfig, check_counts, process_state, train
from .scenes import KIND_SHARE, Kind, caption, held_out_scenes, sample_scene
from .tokenizer import train_tokenizer

SIDE = 256  # pixels of the square among the sizes
SEED = 1

WIDTHS, DEPTHS = (16, 32, 64, 64, 128, 128), (0, 1, 1, 1, 1, 1)
STAGES = tuple(
    StageConfig(width, depth, attention=i >= 3, scales=(5,) if i >= 3 else ())
    for i, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True))
)
AUTOENCODER = AutoencoderConfig(STAGES, STAGES, strided_down=False, nearest_up=False)
TRANSFORMER = TransformerConfig(
    hidden_size=192,
    depth=8,
    cross_heads=3,
    text_width=192,
    ff_width=480,
    qk_norm=True,
    position_base=SIDE // DOWNSAMPLE,
)
# With a guidance scale of 2 this model draws most of the held-out captions right (bench/results/demo.json).
IDENTITY = TransformerIdentity(TRANSFORMER, "custom", SIDE, 3.0, "float32", "training", guidance_scale=2.0)
GEMMA = GemmaConfig(
    vocab_size=768,
    hidden_size=192,
    intermediate_size=576,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=64,
    query_pre_attn_scalar=64,
)


@dataclass(frozen=True)
class Lesson:
    """What batches of one part of the training hold."""

    until: float  # share of all steps
    shares: dict[Kind, float]
    layout_share: float  # of the samples at noise levels where it is decided what goes where


LESSONS = (
    Lesson(0.4, KIND_SHARE, 0.5),
    # What goes where is learnt within a few hundred of these steps, and not in 1500 of the others.
    Lesson(0.55, {"single": 0.04, "count": 0.06, "relation": 0.8, "inside": 0.05, "pair": 0.05}, 0.8),
    # Small things inside of others take longest.
    Lesson(1.0, {"single": 0.09, "count": 0.2, "relation": 0.18, "inside": 0.37, "pair": 0.16}, 0.3),
)


@dataclass(frozen=True)
class DemoConfig:
    """How much work to put into the demo model."""

    autoencoder_steps: int = 5000
    decoder_steps: int = 8000
    transformer_steps: int = 10000
    scenes: int = 8000  # of each resolution
    batch_size: int = 48

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can have."""
        check_counts(vars(self))


def train_demo(folder: Path, config: DemoConfig, start: Path | None = None) -> Path:
    """Train the demo model in a work folder. Returns the folder of the finished checkpoint.

    start: a demo checkpoint to train further: the decoder, the transformer and the text encoder, not the encoder.
    Raises ValueError for a folder of another start or number of scenes and for a start that is another model, and
    FileNotFoundError for one that is not there.
    """
    started = load_start(start) if start else None
    with claim(folder, {"start": str(start.resolve()) if start else "nothing", "scenes": str(config.scenes)}):
        machine = process_state()
        if started is None:
            with machine.main_process_first():
                tokenizer = make_tokenizer(folder / "tokenizer.json")
            autoencoder = train_autoencoder(folder / "autoencoder", config.autoencoder_steps)
            transformer, text_encoder = new_transformer(), new_text_encoder(tokenizer)
        else:
            tokenizer = start / "tokenizer" / "tokenizer.json"
            autoencoder = started.autoencoder.requires_grad_(False)
            transformer = started.transformer.train().requires_grad_(True)
            text_encoder = started.text_encoder.train().requires_grad_(True)
        autoencoder = refine_decoder(folder / "decoder", autoencoder, config.decoder_steps)
        device = next(autoencoder.parameters()).device
        with machine.main_process_first():
            latents = SceneLatents.prepare(
                autoencoder, folder / "latents.safetensors", count=config.scenes, seed=SEED, device=device
            )

        def batches(step: int, process: int) -> FlowBatch:
            lesson = next(lesson for lesson in LESSONS if step < lesson.until * config.transformer_steps)
            return latents.batch(
                step, process, size=config.batch_size, shares=lesson.shares, layout_share=lesson.layout_share
            )

        objective = FlowObjective(transformer, text_encoder, flow_shift=IDENTITY.flow_shift)
        objective = train(
            objective,
            batches,
            TrainingConfig(config.transformer_steps, learning_rate=1.5e-3, warmup=200, cooldown=0.4, ema_decay=0.999),
            folder / "transformer",
            partial(prompt_sheet, autoencoder=autoencoder),
            objective.matrices(),
        )
        if machine.is_main_process:
            write_pipeline(
                folder / "checkpoint",
                objective.transformer,
                autoencoder,
                objective.text_encoder,
                tokenizer=tokenizer,
                identity=IDENTITY,
            )
        return folder / "checkpoint"


def load_start(start: Path) -> SanaPipeline:
    """The parts of a demo checkpoint. Raises ValueError for another model, and FileNotFoundError."""
    if not start.exists():
        raise FileNotFoundError(f"--start {start} does not exist; give the folder of a demo checkpoint, or demo")
    started = SanaPipeline.load(start)
    if started.transformer.config != TRANSFORMER:
        raise ValueError(f"--start {start} is another model; give the folder of a demo checkpoint, or demo")
    return started


def make_tokenizer(path: Path) -> Path:
    """A tokenizer that has seen the instruction and captions of training scenes."""
    if not path.exists():
        train_tokenizer(_texts(), GEMMA.vocab_size, path)
    return path


def _texts() -> Iterator[str]:
    rng = np.random.default_rng(SEED)
    yield from [INSTRUCTION] * 40
    for _ in range(4000):
        yield caption(sample_scene(rng, "train", SIDE, SIDE), rng)


def train_autoencoder(folder: Path, steps: int) -> DCAutoencoder:
    """Encoder and decoder together."""
    autoencoder = DCAutoencoder(AUTOENCODER)
    initialise(autoencoder, seed=0)
    return _reconstruct(folder, autoencoder, TrainingConfig(steps, learning_rate=2e-3, cooldown=0.4))


def refine_decoder(folder: Path, autoencoder: DCAutoencoder, steps: int) -> DCAutoencoder:
    """The decoder alone, for sharper edges. Latents stay what they were."""
    autoencoder.decoder.train().requires_grad_(True)
    return _reconstruct(folder, autoencoder, TrainingConfig(steps, learning_rate=1e-3, cooldown=0.5))


def _reconstruct(folder: Path, autoencoder: DCAutoencoder, config: TrainingConfig) -> DCAutoencoder:
    """Crops around things first, which carry all the detail; whole scenes for the last eighth."""
    examples = whole_scenes(10**7, 0, size=6)

    def batches(step: int, process: int) -> object:
        if step < 0.875 * config.steps:
            return scene_crops(step, process, size=8, side=96)
        return whole_scenes(step, process, size=2)

    sheet = partial(reconstruction_sheet, batch=examples)
    objective = train(ReconstructionObjective(autoencoder), batches, config, folder, sheet)
    return objective.autoencoder.eval().requires_grad_(False)


def new_transformer() -> SanaTransformer:
    transformer = SanaTransformer(TRANSFORMER)
    initialise_transformer(transformer, seed=0)
    return transformer


def new_text_encoder(tokenizer: Path) -> GemmaTextEncoder:
    """A Gemma-2 of the demo's size with random weights; norms add one to theirs, so zeros are the identity."""
    model = Gemma2(GEMMA, device="meta")
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in model.named_parameters():
        spread = 0.0 if "norm" in name else parameter.shape[-1] ** -0.5
        weights[name] = torch.randn(parameter.shape, generator=generator) * spread
    model.load_state_dict(weights, assign=True)
    return GemmaTextEncoder(model.train().requires_grad_(True), JsonTokenizer(tokenizer.read_bytes()))


def prompt_sheet(objective: FlowObjective, autoencoder: DCAutoencoder) -> Image.Image:
    """Held-out captions drawn by the weights at hand, six in a row."""
    pipeline = SanaPipeline(objective.transformer, autoencoder, objective.text_encoder, IDENTITY)
    prompts = [item.caption for item in held_out_scenes(18, seed=0)]
    pictures = pipeline(prompts, seed=0, steps=14)
    sheet = Image.new("RGB", (6 * SIDE, 3 * SIDE))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % 6 * SIDE, i // 6 * SIDE))
    return sheet
