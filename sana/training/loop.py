"""The training loop: any objective, on one CPU, one GPU or many, stopped and resumed at will.

A step depends on nothing but the weights, the optimiser and the step number, which also seeds its batch and its noise. So a
run that was killed and resumed ends with the same weights as one that was not.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..networks.devices import computes_bfloat16
from ..saving import replacing, write_json

PATIENCE = timedelta(hours=2)  # for the process that saves or draws; NCCL alone gives up after 10 minutes

log = logging.getLogger(__name__)

Batches = Callable[[int, int], object]  # (step, process) -> what the objective's `forward` takes
Sheet = Callable[[nn.Module], Image.Image]  # objective with averaged weights -> pictures to look at


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train. Intervals are in steps."""

    steps: int
    learning_rate: float
    warmup: int = 200  # the rate rises linearly over the first, ...
    cooldown: float = 0.3  # ... and falls linearly to zero over the last share of the steps
    ema_decay: float = 0.999  # of the average, at most; see `update_average`
    clip: float = 1.0  # largest norm of the gradient
    weight_decay: float = 0.01
    save_every: int = 500
    sheet_every: int = 1000

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step."""
        falling = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return min(1.0, (step + 1) / max(1, self.warmup), falling)


def train(
    objective: nn.Module,
    batches: Batches,
    config: TrainingConfig,
    folder: Path,
    sheet: Sheet | None = None,
    matrices: Iterable[nn.Parameter] = (),
) -> nn.Module:
    """Minimise `objective(batch)`, a scalar, and return the objective with averaged weights.

    matrices: two-dimensional weights for Muon to update (see `optimizers`). folder: receives `state.pt` (resumed from if it
    is there), `log.csv` (step, loss, images per second) and sheets as PNG. A finished run is not repeated, and the log says so.
    A batch needs a length, the number of its images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if computes_bfloat16(device) else "no")
    average = AveragedModel(objective, multi_avg_fn=partial(update_average, config.ema_decay), use_buffers=True)
    average.to(accelerator.device)
    wrapped, *updates = accelerator.prepare(objective, *optimizers(objective, config, matrices))
    state = TrainingState(folder / "state.pt", accelerator.unwrap_model(wrapped), average, updates)
    first = state.resume()
    if first >= config.steps and accelerator.is_main_process:
        log.warning("%s has all of its %d steps behind it; nothing is trained.", folder, first)

    for step, meter in _progress(first, config.steps, accelerator.is_main_process):
        for group in (group for update in updates for group in update.param_groups):
            group["lr"] = config.learning_rate * config.rate(step)
        batch = batches(step, accelerator.process_index)
        loss = wrapped(batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), config.clip)
        for update in updates:
            update.step()
            update.zero_grad()
        average.update_parameters(state.objective)

        if not accelerator.is_main_process:
            continue
        meter.note(float(loss.detach()), len(batch) * accelerator.num_processes)
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            state.save(step + 1)
            meter.write(folder / "log.csv", step + 1)
        if sheet is not None and ((step + 1) % config.sheet_every == 0 or step + 1 == config.steps):
            sheet(average.module).save(folder / f"sheet-{step + 1:06d}.png")
    return average.module


def process_state() -> PartialState:
    """Which of several processes this is. The first call lets them find each other."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def check_counts(numbers: Mapping[str, int]) -> None:
    """Raises ValueError for a number, by its name, that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")


def claim(folder: Path, run: dict[str, str]) -> None:
    """Make a work folder and note what it is for. Raises ValueError if it is for something else, or no folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give another --out, a folder")
    note = folder / "run.json"
    with process_state().main_process_first():
        if not note.exists():
            write_json(note, run)
    known = json.loads(note.read_text(encoding="utf-8"))
    if known != run:
        told = ", ".join(f"{name} {value}" for name, value in known.items())
        raise ValueError(f"{folder} holds another training ({told}); give another --out")


def update_average(decay: float, average: list[Tensor], weights: list[Tensor], count: int | Tensor) -> None:
    """Move the average of the weights of `count` steps on, in place.

    The decay grows up to the one given (diffusers src/diffusers/training_utils.py, EMAModel), or a short run would end with
    an average that is mostly the weights of its start.
    """
    get_ema_multi_avg_fn(min(decay, (1 + int(count)) / (10 + int(count))))(average, weights, count)


def optimizers(
    objective: nn.Module, config: TrainingConfig, matrices: Iterable[nn.Parameter]
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon (arXiv 2502.16982) for the matrices, scaled to steps of the size AdamW takes."""
    chosen = list(matrices)
    known = {id(matrix) for matrix in chosen}
    others = [p for p in objective.parameters() if p.requires_grad and id(p) not in known]
    common = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    found = [torch.optim.AdamW(others, betas=(0.9, 0.99), **common)]
    if chosen:
        found.append(torch.optim.Muon(chosen, adjust_lr_fn="match_rms_adamw", **common))
    return found


@dataclass(frozen=True)
class TrainingState:
    """Everything that a run needs to go on, in one file that is replaced as a whole."""

    path: Path
    objective: nn.Module
    average: AveragedModel
    updates: Sequence[torch.optim.Optimizer]

    def save(self, step: int) -> None:
        parts = {"objective": self.objective, "average": self.average}
        states = {name: part.state_dict() for name, part in parts.items()}
        with replacing(self.path) as unfinished:
            torch.save(
                {"step": step, **states, "updates": [update.state_dict() for update in self.updates]}, unfinished
            )

    def resume(self) -> int:
        """Read the file if there is one. Returns the step to go on with."""
        if not self.path.exists():
            return 0
        # To GPUs values are copied, so their processes need not each read all of it into memory.
        saved = torch.load(self.path, map_location="cpu", weights_only=True, mmap=torch.cuda.is_available())
        self.objective.load_state_dict(saved["objective"])
        self.average.load_state_dict(saved["average"])
        for update, state in zip(self.updates, saved["updates"], strict=True):
            update.load_state_dict(state)
            for values in update.state.values():
                if "step" in values:  # AdamW counts on the CPU, and a file that is still mapped stays on the disk
                    values["step"] = values["step"].clone()
        return int(saved["step"])


class Meter:
    """Loss and speed, on a progress bar and in a file."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self.losses: list[float] = []
        self.images = 0
        self.since = time.monotonic()

    def note(self, loss: float, images: int) -> None:
        self.losses.append(loss)
        self.images += images
        self.bar.set_postfix(loss=f"{self.mean_loss():.4f}", images_per_s=f"{self.speed():.1f}", refresh=False)

    def mean_loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    def speed(self) -> float:
        return self.images / max(1e-9, time.monotonic() - self.since)

    def write(self, path: Path, step: int) -> None:
        """Append the means since the last call."""
        with path.open("a") as rows:
            rows.write(f"{step},{self.mean_loss():.6f},{self.speed():.2f}\n")
        self.losses, self.images, self.since = [], 0, time.monotonic()


def _progress(first: int, steps: int, visible: bool) -> Iterator[tuple[int, Meter]]:
    with tqdm(range(first, steps), initial=first, total=steps, disable=not visible) as bar:
        meter = Meter(bar)
        for step in bar:
            yield step, meter
