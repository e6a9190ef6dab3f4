"""What a picture was drawn with in the words of AUTOMATIC1111's web UI, as viewers and galleries read it.

It is the text `parameters` of a PNG: the prompt, the negative prompt, and one line of names and values. How values are quoted
is told by `quote` in modules/infotext_utils.py there. Our own record, which has all, stands beside it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .checkpoints.files import CheckpointError, weight_files
from .config import TransformerIdentity
from .file_hashes import file_hash
from .loading import model_path
from .plan import Plan

DIGITS = 10  # of a SHA-256: by so many, services that collect models look files up
SPRINT_SAMPLER = "scm"


@dataclass(frozen=True)
class ShownFile:
    """A file as the line tells it."""

    name: str  # without folder and suffix
    hash: str | None = None  # the first DIGITS of its SHA-256; None: the weights are several files


@dataclass(frozen=True)
class ShownFiles:
    """What all pictures of a model share."""

    model: ShownFile
    loras: tuple[tuple[ShownFile, float], ...] = ()  # with their strengths


def shown_files(model: Path | str, loras: Sequence[tuple[Path, float]] = ()) -> ShownFiles:
    """A model as `SanaPipeline.load` takes it. Reads all of a file that was not read so before. Raises OSError."""
    path = model_path(model)
    shown = ShownFile(str(model), _short(path)) if path != Path(model) else _shown(path)
    return ShownFiles(shown, tuple((_shown(Path(lora)), strength) for lora, strength in loras))


def infotext(plan: Plan, k: int, identity: TransformerIdentity, files: ShownFiles) -> str:
    """The text of the k-th picture of a plan, which was made for a model of this identity."""
    tags = "".join(f" <lora:{lora.name}:{strength:g}>" for lora, strength in files.loras)
    lines = [plan.prompts[k] + tags]
    if plan.negative:
        lines.append(f"Negative prompt: {plan.negative}")
    told: dict[str, object] = {
        "Steps": plan.steps,
        "Sampler": SPRINT_SAMPLER if identity.config.guidance_embed else plan.settings.solver,
        "CFG scale": f"{plan.guidance.scale:g}",
        "Seed": plan.seeds[k],
        "Size": f"{plan.width}x{plan.height}",
        "Model hash": files.model.hash,
        "Model": files.model.name,
        "Denoising strength": f"{plan.settings.schedule_share:g}" if plan.settings.image is not None else None,
        "Lora hashes": ", ".join(f"{lora.name}: {lora.hash}" for lora, _ in files.loras if lora.hash),
    }
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in told.items() if value not in (None, "")))
    return "\n".join(lines)


def _shown(path: Path) -> ShownFile:
    path = path if path.name else path.resolve()  # "." has no name
    return ShownFile(path.name if path.is_dir() else path.stem, _short(path))


def _short(path: Path) -> str | None:
    try:
        files = weight_files(path, "transformer")
    except CheckpointError:
        return None
    return file_hash(files[0])[:DIGITS] if len(files) == 1 else None


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(letter in value for letter in ",:\n") else value
