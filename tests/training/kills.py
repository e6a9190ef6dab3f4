"""Trainings that are killed again and again: python -m tests.training.kills FOLDER.

A process of its own, which only imports, makes a copy of itself for each attempt, since importing PyTorch takes longer than all
that is tested here, and since a process that has trained already must not be copied.
"""

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import peft  # noqa: F401 - which adapters import, in seconds
import pyarrow.parquet as pq
import torch
import torch._dynamo  # which optimizers import
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sana.saving import lock
from sana.training.__main__ import main
from sana.training.folder import claim
from sana.training.loop import TrainingConfig, train
from tests.training.doubling import Objective, batches

STEPS = 3
# What Python tells before it changes a folder.
CHANGES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.utime", "shutil.rmtree"}
RUN = {"data": "pictures"}


def sheet(objective: nn.Module) -> Image.Image:
    """A picture of the weights."""
    return Image.fromarray((objective.hidden.weight.numpy(force=True) * 100).astype(np.int8).view(np.uint8))


def small(folder: Path) -> None:
    config = TrainingConfig(STEPS, learning_rate=0.02, warmup=2, save_every=1, sheet_every=1)
    objective = Objective()
    with claim(folder, RUN):
        train(objective, batches, config, folder, sheet, [objective.hidden.weight])


def finetuning(folder: Path) -> None:
    arguments = ["finetune", "--data", str(folder.parents[1] / "pictures"), "--out", str(folder), "--batch-size=1"]
    assert main([*arguments, "--steps=6", "--save-every=1", "--sheet-every=0", "--learning-rate=1e-3"]) == 0


def lora(folder: Path) -> None:
    arguments = ["lora", "--data", str(folder.parents[1] / "pictures"), "--out", str(folder), "--steps=6", "--rank=2"]
    assert main([*arguments, "--save-every=1", "--sheet-every=0", "--dropout=0.1", "--train-text-encoder"]) == 0


def attempt(work: Callable[[], None], seconds: float | None = None) -> bool:
    """Whether a copy of this process comes to the end of some work, unless it is killed after so many seconds."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"exit code {status}"
    return status == 0


def killed_before(change: int, folder: Path, work: Callable[[], None]) -> None:
    """Do work, and be killed before the change of a folder that has this number."""
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in CHANGES:
            return
        path = str(arguments[0])
        if path.startswith(str(folder)) or not os.path.isabs(path):  # `shutil.rmtree` goes by names alone
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)
    work()


def kill_at_every_change(folder: Path) -> None:
    """The first attempt is killed before its first change of the work folder, the next before its second, and so on."""
    assert attempt(lambda: small(folder / "whole"))
    killed, kills = folder / "killed", 0
    while not attempt(partial(killed_before, kills, killed, partial(small, killed))):
        kills += 1
        check_nothing_is_lost(killed)
    assert kills > 40, kills
    compare(folder / "whole", killed)


def kill_at_random(folder: Path, work: Callable[[Path], None] = finetuning, kills: int = 3, seed: int = 1) -> None:
    """A real training, at any moment."""
    begun = time.monotonic()
    assert attempt(lambda: work(folder / "whole"))
    seconds = time.monotonic() - begun
    draw = random.Random(seed)
    for _ in range(kills):
        attempt(lambda: work(folder / "killed"), seconds * draw.uniform(0.2, 0.9))
        check_nothing_is_lost(folder / "killed", sheets=False)
    assert attempt(lambda: work(folder / "killed"))
    compare(folder / "whole", folder / "killed")


def kill_a_lora_at_random(folder: Path) -> None:
    kill_at_random(folder, lora, kills=2)


def check_nothing_is_lost(folder: Path, sheets: bool = True) -> None:
    """What the newest state has behind it has its row in the log and its sheet, and every file is whole."""
    states = [path for name in ("state.pt", "state.previous.pt") if (path := folder / name).exists()]
    steps = [torch.load(path, weights_only=True)["step"] for path in states]
    assert steps == sorted(steps, reverse=True)
    done = range(1, max(steps, default=0) + 1)
    assert logged(folder)[: len(done)] == [*done]
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
    for step in done if sheets else ():
        assert (folder / f"sheet-{step:06d}.png").exists()


def logged(folder: Path) -> list[int]:
    log = folder / "log.csv"
    return [int(row.split(",")[0]) for row in log.read_text().splitlines()] if log.exists() else []


def compare(whole: Path, killed: Path) -> None:
    """Both folders hold the same, but for the speed in the log and for how the states of pictures are spread over shards."""
    states = [stored(folder / "states") for folder in (whole, killed)]
    assert states[0] == states[1], [len(each) for each in states]
    names = [sorted(path.relative_to(folder) for path in files(folder)) for folder in (whole, killed)]
    assert names[0] == names[1], names
    assert logged(killed) == [*range(1, len(logged(whole)) + 1)]
    for name in (name for name in names[0] if (whole / name).is_file()):
        one, two = whole / name, killed / name
        if name.suffix == ".pt":
            assert same(*(torch.load(path, weights_only=True) for path in (one, two))), name
        elif name.suffix == ".safetensors":
            assert same(load_file(one), load_file(two)), name
        elif name.suffix == ".csv":
            assert [row.split(",")[:2] for row in one.read_text().splitlines()] == [
                row.split(",")[:2] for row in two.read_text().splitlines()
            ]
        else:
            assert one.read_bytes() == two.read_bytes(), name


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.match("states-*")]


def stored(folder: Path) -> dict[bytes, tuple[object, ...]]:
    """What shards hold, each thing once."""
    rows = [row for path in folder.glob("states-*") for row in pq.read_table(path).to_pylist()]
    found = {row["key"]: (row["dtype"], row["shape"], row["data"]) for row in rows}
    assert len(found) == len(rows)
    return found


def same(one: object, two: object) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def refuse_two_processes(folder: Path) -> None:
    """Both processes of a second training are refused, and neither waits for the other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def second(rank: int) -> None:
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in launch.items()})
        try:
            with claim(folder, RUN):
                raise AssertionError("two trainings in one folder")
        except ValueError as error:
            assert str(error).startswith(f"another training is at work in {folder}; ")
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert group.options._timeout == timedelta(hours=2)  # one of them may draw or save that long

    def both() -> None:
        child = os.fork()
        code = 1
        try:
            second(rank=int(child == 0))
            code = 0
        finally:
            if not child:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    with (folder / "training.lock").open("wb") as file:
        assert lock(file)
        assert attempt(both)


if __name__ == "__main__":
    for check in (kill_at_every_change, kill_at_random, kill_a_lora_at_random, refuse_two_processes):
        sys.stderr.write(f"{check.__name__}\n")
        (folder := Path(sys.argv[1]) / check.__name__).mkdir()
        check(folder)
