"""The training loop: any objective, on one CPU, one GPU or many, stopped and resumed at will.

A step depends on nothing but the weights, the optimiser and the step number, which also seeds its batch and its noise. So a
run that was killed and resumed ends with the same weights as one that was not.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from accelerate import Accelerator, PartialState
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..networks.devices import computes_bfloat16
from ..saving import replacing
from .optimizers import OptimizerName, optimizers
from .sharding import filled, own_part, shard, whole, without_numbers
from .state import TrainingState

PATIENCE = timedelta(hours=2)  # for the process that saves or draws; NCCL alone gives up after 10 minutes
ROW = re.compile(r"(\d{1,12}),[^,]+,[^,]+")  # of the log
SMOOTHING = 0.98  # of the smoothed loss: what a step leaves of the value before, once there have been many

log = logging.getLogger(__name__)

Batches = Callable[[int, int], object]  # (number, process) -> what the objective's `forward` takes
Sheet = Callable[[nn.Module], Image.Image]  # averaged weights, see `train` -> pictures to look at
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train. Intervals are in steps."""

    steps: int
    learning_rate: float
    warmup: int = 200  # the rate rises linearly over the first, ...
    cooldown: float = 0.3  # ... and, if the schedule is linear, falls to zero over the last share of the steps
    schedule: Schedule = "linear"  # cosine: falls to zero from the warm-up to the end; constant: stays
    accumulate: int = 1  # batches of a step, whose gradients are averaged
    ema_decay: float = 0.999  # of the average, at most; see `update_average`
    clip: float = 1.0  # largest norm of the gradient
    weight_decay: float = 0.01
    optimizer: OptimizerName = "adamw"  # but for matrices
    save_every: int = 500
    sheet_every: int = 1000
    log_every: int | None = None  # None: a row of the log with every saved state

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step."""
        rising = (step + 1) / max(1, self.warmup)
        if self.schedule == "constant":
            return min(1.0, rising)
        if self.schedule == "cosine":
            passed = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
            return min(rising, (1 + math.cos(math.pi * passed)) / 2)
        falling = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return min(1.0, rising, falling)


@dataclass(frozen=True)
class Report:
    """What a caller learns of a step."""

    step: int  # done so far, from 1
    steps: int
    loss: float  # of this step
    smoothed: float  # of the steps up to it
    images_per_second: float


@dataclass(frozen=True)
class Watch:
    """Who looks on: the shell by its defaults, a node of a host with its own progress, previews and button to stop.

    step, sheet: called after each step and with each sheet and its step, in the main process.
    stopping: entered around the steps; gives a function that says after each of them whether to stop there.
    """

    bar: bool = True
    step: Callable[[Report], object] = lambda report: None
    sheet: Callable[[int, Image.Image], object] = lambda step, picture: None
    stopping: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: nullcontext(lambda: False)


QUIET = Watch()


class Stopped(Exception):
    """A training that was asked to stop did so after a step, and saved it. weights: averaged, as `train` gives them."""

    def __init__(self, step: int, steps: int, weights: nn.Module) -> None:
        super().__init__(f"stopped after step {step} of {steps}, which is saved; the same command goes on from there")
        self.step, self.weights = step, weights


class DivergedError(ValueError):
    """The numbers of a training broke."""


def train(
    objective: nn.Module,
    batches: Batches,
    config: TrainingConfig,
    folder: Path,
    sheet: Sheet | None = None,
    matrices: Iterable[nn.Parameter] = (),
    *,
    weights: nn.Module | None = None,
    sharded: Sequence[str] | None = None,
    watch: Watch = QUIET,
) -> nn.Module:
    """Minimise `objective(batch)`, a scalar, and return the weights, averaged.

    weights: the part of the objective that is trained, averaged and saved, where the rest is frozen; None: all of it.
    sharded: paths of layers in the objective, all of whose weights then lie in parts in the processes (see `shard`); None: each
    process has all. The weights that are returned are whole in the main process alone, and no sheets can be drawn.
    matrices: two-dimensional weights for Muon to update (see `optimizers`). folder: receives `state.pt` and the one before
    (resumed from if they are there), `log.csv` (step, loss, images per second) and sheets as PNG. A finished run is not
    repeated, and the log says so. A batch needs a length, the number of its images. Raises ValueError for a state that
    cannot be resumed from, OSError for a file that cannot be written, `DivergedError` before a step would spoil the weights,
    and `Stopped` if the watch asks for that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if computes_bfloat16(device) else "no")
    trained = objective if weights is None else weights
    average = AveragedModel(trained, multi_avg_fn=partial(update_average, config.ema_decay), use_buffers=True)
    if sharded is None:
        average.to(accelerator.device)
    else:
        result = without_numbers(objective)
        shard([objective, average.module], sharded, accelerator.device)
    plain = optimizers(objective, config.learning_rate, config.weight_decay, matrices, config.optimizer)
    # Without gradients of its own to exchange, a sharded model is to accelerate as one that is only evaluated.
    wrapped = accelerator.prepare_model(objective, evaluation_mode=sharded is not None)
    updates = [accelerator.prepare_optimizer(update) for update in plain]
    state = TrainingState(folder / "state.pt", trained, average, plain)
    first = state.resume()
    if first >= config.steps and accelerator.is_main_process:
        log.warning("%s has all of its %d steps behind it; nothing is trained.", folder, first)

    with watch.stopping() as asked:
        for step, meter in _progress(first, config.steps, accelerator.is_main_process, watch.bar):
            for group in (group for update in updates for group in update.param_groups):
                group["lr"] = config.learning_rate * config.rate(step)
            loss, images = accumulated(wrapped, batches, step, config.accumulate, accelerator)
            norm = whole(accelerator.clip_grad_norm_(wrapped.parameters(), config.clip))
            if not bool(torch.as_tensor(norm).isfinite()):
                raise DivergedError(_tell_divergence(step + 1, config, state))
            for update in updates:
                update.step()
                update.zero_grad()
            average.update_parameters(trained)
            loss = accelerator.reduce(loss, "mean")
            if accelerator.is_main_process:
                meter.note(float(loss), images * accelerator.num_processes)
                watch.step(meter.report(step + 1, config.steps))
            is_last = step + 1 == config.steps
            stops = _any(asked(), accelerator) and not is_last

            saves = is_last or stops or (step + 1) % config.save_every == 0
            content = state.content(step + 1, accelerator.is_main_process) if saves else None
            if accelerator.is_main_process:
                # The state comes last: whenever the run is stopped, what the state has behind it has its sheet and its row.
                if sheet is not None and ((step + 1) % config.sheet_every == 0 or is_last):
                    picture = sheet(average.module)
                    with replacing(folder / f"sheet-{step + 1:06d}.png") as unfinished:
                        picture.save(unfinished, format="PNG")
                    watch.sheet(step + 1, picture)
                if saves or (step + 1) % (config.log_every or config.save_every) == 0:
                    meter.write(folder / "log.csv", step + 1)
                if saves:
                    state.save(content)
            if stops:
                accelerator.wait_for_everyone()
                raise Stopped(step + 1, config.steps, average.module)
    if sharded is None:
        return average.module
    numbers = whole(average.module.state_dict(), accelerator.is_main_process)
    return filled(result, numbers) if accelerator.is_main_process else average.module


def accumulated(
    wrapped: nn.Module, batches: Batches, step: int, count: int, accelerator: Accelerator
) -> tuple[Tensor, int]:
    """Gradients of a step, the mean over its batches; the mean loss, and how many images it saw."""
    losses, images = [], 0
    for number in range(step * count, (step + 1) * count):
        batch = batches(number, accelerator.process_index)
        with nullcontext() if number + 1 == (step + 1) * count else accelerator.no_sync(wrapped):
            loss = wrapped(batch)
            accelerator.backward(loss / count)
        losses.append(loss.detach())
        images += len(batch)
    return torch.stack(losses).mean(), images


def _any(asked: bool, accelerator: Accelerator) -> bool:
    """Whether one of the processes is asked: all of them must stop after the same step."""
    if accelerator.num_processes == 1:
        return asked
    return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device)) > 0)


def _tell_divergence(step: int, config: TrainingConfig, state: TrainingState) -> str:
    rate = config.learning_rate * config.rate(step - 1)
    kept = state.saved_step()
    way = f"the state after step {kept}, in {state.path}, is kept" if kept else "no state was saved before"
    return (
        f"the gradient of step {step} is not finite, most likely since the learning rate, {rate:.1e} there, is too high; "
        f"{way}; begin anew in another --out with a tenth of the rate"
    )


def process_state() -> PartialState:
    """Which of several processes this is. The first call lets them find each other."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def check_schedule(name: str) -> None:
    """Raises ValueError for a name that is no `Schedule`."""
    if name not in get_args(Schedule):
        raise ValueError(f"schedule {name!r} is unknown; use one of {', '.join(get_args(Schedule))}")


def check_counts(numbers: Mapping[str, int]) -> None:
    """Raises ValueError for a number, by its name, that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")


def update_average(decay: float, average: list[Tensor], weights: list[Tensor], count: int | Tensor) -> None:
    """Move the average of the weights of `count` steps on, in place.

    The decay grows up to the one given (diffusers src/diffusers/training_utils.py, EMAModel), or a short run would end with
    an average that is mostly the weights of its start.
    """
    step = get_ema_multi_avg_fn(min(decay, (1 + int(count)) / (10 + int(count))))
    step([*map(own_part, average)], [*map(own_part, weights)], count)


class Meter:
    """Loss and speed, on a progress bar and in a file. step: how many steps the run has behind it."""

    def __init__(self, bar: tqdm, step: int) -> None:
        self.bar = bar
        self.step = step  # of the last row of the log
        self.losses: list[float] = []
        self.images = 0
        self.since = time.monotonic()
        self.seen, self.smoothed = 0, 0.0

    def note(self, loss: float, images: int) -> None:
        self.losses.append(loss)
        self.images += images
        self.seen += 1
        self.smoothed += (loss - self.smoothed) / min(self.seen, 1 / (1 - SMOOTHING))
        told = {"loss": f"{loss:.4f}", "smoothed": f"{self.smoothed:.4f}", "images_per_s": f"{self.speed():.1f}"}
        self.bar.set_postfix(told, refresh=False)

    def report(self, step: int, steps: int) -> Report:
        return Report(step, steps, self.losses[-1], self.smoothed, self.speed())

    def mean_loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    def speed(self) -> float:
        return self.images / max(1e-9, time.monotonic() - self.since)

    def write(self, path: Path, step: int) -> None:
        """Add a row of the means since the last one. Rows of a run that was stopped before it saved give way to it."""
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        rows = [row for row in text.splitlines() if (found := ROW.fullmatch(row)) and int(found[1]) <= self.step]
        with replacing(path) as unfinished:
            unfinished.write_text("\n".join([*rows, f"{step},{self.mean_loss():.6f},{self.speed():.2f}", ""]))
        self.step, self.losses, self.images, self.since = step, [], 0, time.monotonic()


def _progress(first: int, steps: int, is_main: bool, visible: bool) -> Iterator[tuple[int, Meter]]:
    with tqdm(range(first, steps), initial=first, total=steps, disable=not (is_main and visible)) as bar:
        meter = Meter(bar, first)
        for step in bar:
            yield step, meter
