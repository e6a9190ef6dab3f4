"""Pictures on the stand-in for a GPU, in a process of its own, since that device is there for good once it is.

python -m tests.sana.pipeline.turns FOLDER CONTROL: prints as JSON what became of each case.
"""

import gc
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch

from sana.needs import needs
from sana.networks.streaming import least_bytes
from sana.offloading import Offload, Part
from sana.pipeline import SanaPipeline
from sana.plan import Plan, Settings
from sana.sampling.solvers import Step
from tests.host import second_device
from tests.host.second_device import MEMORY, NAME
from tests.sana.pipeline.drawing import picture

PLENTY = 1 << 30
PROMPTS = ("a cat", "a dog")
SIZE = {"height": 32, "width": 64}
PICTURES = {"image": picture(), "strength": 0.5, "control_image": picture(1)}


@dataclass
class Outcome:
    """events: moves of parts, steps and pictures, in order. peak: bytes on the device at most. embedding: where it is.

    prefixes: instructions whose keys and values are kept.
    """

    events: list[str] = field(default_factory=list)
    pixels: str = ""
    peak: int = 0
    embedding: str = ""
    prefixes: int = 0
    error: str = ""


class Case:
    """What to draw. need: bytes that the device must have, by the memory model."""

    def __init__(self, folder: Path, control: Path | None, batch_size: int, options: dict[str, object]) -> None:
        self.folder, self.control, self.batch_size = folder, control, batch_size
        pipeline = SanaPipeline.load(folder, control=control)
        autoencoder, shapes = pipeline.autoencoder, ((1, 32, 1, 2), (1, 3, 32, 64))
        halves = zip((autoencoder.decoder, autoencoder.encoder), map(torch.Size, shapes), strict=True)
        # The same bands in every case, so that pictures are the same to the bit.
        max_bytes = max(least_bytes(half, shape, torch.float32) for half, shape in halves)
        self.settings = Settings(**SIZE, steps=2, seed=3, instruction="of a cat", max_bytes=max_bytes, **options)
        (plan, _), parts = self.plans(pipeline), (pipeline.transformer, autoencoder, pipeline.text_encoder)
        phases = needs(plan, *parts, pipeline.controlnet)
        weights = self.weights(pipeline)
        self.need = max(need.least + sum(weights[name] for name in need.parts) for need in phases.values())

    def plans(self, pipeline: SanaPipeline) -> Sequence[Plan]:
        return [pipeline.plan(prompt, self.settings, batch_size=self.batch_size) for prompt in PROMPTS]

    @staticmethod
    def weights(pipeline: SanaPipeline) -> dict[str, int]:
        """Bytes by part, counted here and not by what is tested."""
        modules = {
            "text encoder": [pipeline.text_encoder.model.layers, pipeline.text_encoder.model.norm],
            "encoder": [pipeline.autoencoder.encoder],
            "transformer": [pipeline.transformer],
            "ControlNet": [pipeline.controlnet] if pipeline.controlnet else [],
            "decoder": [pipeline.autoencoder.decoder],
        }
        return {
            name: sum(4 * tensor.numel() for module in of for tensor in module.state_dict().values())
            for name, of in modules.items()
        }

    def write(self, offload: Offload, capacity: int = PLENTY) -> Outcome:
        """A better prompt. The text encoder starts away from a small device."""
        gc.collect()
        MEMORY.capacity, outcome = capacity, Outcome()
        options = {"device": NAME, "dtype": torch.float32, "offload": offload}
        pipeline = SanaPipeline.load(self.folder, **options)
        move = Part.move

        def note_move(part: Part, device: torch.device) -> None:
            (name,) = (name for name, each in pipeline.offloader.parts.items() if each is part)
            outcome.events.append(f"{name} {'leaves' if device.type == 'cpu' else 'comes'}")
            move(part, device)

        with patch.object(Part, "move", note_move):
            outcome.events.append(pipeline.enhance("a cat", instruction="of a cat", max_tokens=8, temperature=1.5))
        return outcome

    def draw(self, offload: Offload, capacity: int = PLENTY, is_watched: bool = False) -> Outcome:
        """is_watched: by who decodes every step."""
        gc.collect()
        assert not MEMORY.used
        MEMORY.capacity, outcome = capacity, Outcome()
        move, names = Part.move, {}

        def note_move(part: Part, device: torch.device) -> None:
            names.update((id(part), name) for name, part in pipeline.offloader.parts.items())
            outcome.events.append(f"{names[id(part)]} {'leaves' if device.type == 'cpu' else 'comes'}")
            move(part, device)

        def note_step(plan: Plan, step: Step) -> None:
            outcome.events.append(f"step of {plan.prompts[0]}")
            if is_watched:
                pipeline.pictures(step.denoised, plan.settings.max_bytes)

        digest, MEMORY.peak = hashlib.sha256(), 0
        try:
            options = {"device": NAME, "dtype": torch.float32, "offload": offload}
            pipeline = SanaPipeline.load(self.folder, control=self.control, **options)
            with patch.object(Part, "move", note_move):
                for plan, pictures in pipeline.draw(self.plans(pipeline), note_step):
                    outcome.events.append(f"pictures of {plan.prompts[0]}")
                    for each in pictures:
                        digest.update(each.tobytes())
        except (ValueError, torch.OutOfMemoryError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
            return outcome
        outcome.pixels, outcome.peak = digest.hexdigest(), MEMORY.peak
        outcome.embedding = next(pipeline.text_encoder.model.embed_tokens.parameters()).device.type
        outcome.prefixes = len(pipeline.text_encoder._prefixes)
        return outcome


def main() -> None:
    folder, control = map(Path, sys.argv[1:])
    text, pictures = Case(folder, None, 2, {}), Case(folder, control, 1, PICTURES)
    second_device.install()
    found = {
        "text, never": text.draw("never"),
        "text, auto": text.draw("auto"),
        "text, small": text.draw("auto", text.need),
        "text, too small": text.draw("auto", text.need - 1),
        "text, small, never": text.draw("never", text.need),
        "text, small, watched": text.draw("auto", text.need, is_watched=True),
        "writing, never": text.write("never"),
        "writing, small": text.write("auto", text.need),
        "pictures, never": pictures.draw("never"),
        "pictures, small": pictures.draw("auto", pictures.need),
    }
    needed = {"text needs": text.need, "pictures need": pictures.need}
    sys.stdout.write(json.dumps({**needed, **{name: asdict(outcome) for name, outcome in found.items()}}))


if __name__ == "__main__":
    main()
