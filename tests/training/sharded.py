"""A small transformer whose weights lie in parts in two processes: python -m tests.training.sharded FOLDER.

A process of its own, which only imports and makes copies of itself, as that of `kills`.
"""

import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # which optimizers import
import torch.distributed.fsdp
from torch.distributed.tensor import DTensor

from sana import load_transformer
from sana.loading import MODELS
from sana.networks.transformer import SanaTransformer
from sana.training.__main__ import main
from sana.training.flow import FlowBatch, FlowObjective
from sana.training.loop import TrainingConfig, train
from tests.sana.models import randomise
from tests.training.drawn import draw_pictures
from tests.training.lora_runs import SMALL, random_batches

STEPS = 4
BATCH = random_batches(SMALL)


class Broken(Exception):
    """What befalls a process in the middle."""


def in_processes(count: int, work: Callable[[int], None]) -> None:
    """Do work in so many processes that know each other, with the number of each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                if count > 1:
                    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
                    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
                    os.environ.update({name: str(value) for name, value in launch.items()})
                work(rank)
                code = 0
            except Broken:
                code = 0
            except Exception:  # noqa: BLE001 - told here, since the copy ends at once
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * count, codes


def small(folder: Path, rank: int, *, sharded: bool, processes: int, until: int = STEPS) -> None:
    """A step sees the same two batches: both in one process, or one in each of two."""
    torch.manual_seed(0)
    objective = FlowObjective(randomise(SanaTransformer(SMALL)), null=torch.zeros(5, SMALL.text_width))
    objective.requires_grad_(True)
    accumulate = 2 // processes

    def batch(number: int, process: int) -> FlowBatch:
        if number == until * accumulate:
            raise Broken
        return BATCH(number * processes + process, 0)

    config = TrainingConfig(STEPS, 1e-3, warmup=1, accumulate=accumulate, save_every=2, log_every=1, ema_decay=0.5)
    found = train(objective, batch, config, folder, sharded=objective.layers() if sharded else None)
    if rank == 0:
        torch.save({name: tensor.clone() for name, tensor in found.state_dict().items()}, folder / "result.pt")
    if sharded:
        parts = [weight for weight in objective.parameters() if isinstance(weight, DTensor)]
        assert len(parts) == len([*objective.parameters()])
        own = sum(weight.to_local().numel() for weight in parts)
        assert own < 0.6 * sum(weight.numel() for weight in parts)


def losses(folder: Path) -> list[float]:
    return [float(row.split(",")[1]) for row in (folder / "log.csv").read_text().splitlines()]


def check(folder: Path) -> None:
    """The same losses and weights as in one process; a break changes nothing, and a state is of any number of processes."""
    run = {
        "one": [(1, False, STEPS)],
        "two": [(2, False, STEPS)],
        "sharded": [(2, True, STEPS)],
        "resumed": [(2, True, 3), (2, True, STEPS)],
        "to one": [(1, False, STEPS)],
    }
    for name, parts in run.items():
        if name == "to one":  # from where the other one was broken
            shutil.copytree(folder / "broken", folder / name)
        for count, sharded, until in parts:
            work = partial(small, folder / name, sharded=sharded, processes=count, until=until)
            in_processes(count, work)
            if until < STEPS:
                shutil.copytree(folder / name, folder / "broken")
    found = {name: torch.load(folder / name / "result.pt") for name in run}
    expected = losses(folder / "one")
    assert len({*expected}) == STEPS
    for name in run:
        for one, two in zip(expected, losses(folder / name), strict=True):
            assert abs(one - two) <= 2e-6, (name, expected, losses(folder / name))
        for key, tensor in found["one"].items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-5, atol=1e-6, msg=f"{name} {key}")
    assert all(torch.equal(found["resumed"][key], tensor) for key, tensor in found["sharded"].items())
    states = [torch.load(folder / name / "state.pt", weights_only=True) for name in ("one", "sharded")]
    assert states[0].keys() == states[1].keys() and states[0]["objective"].keys() == states[1]["objective"].keys()


def finetune(folder: Path, rank: int) -> None:
    """From the shell, with pictures that both processes encode."""
    arguments = ["finetune", "--data", str(folder / "pictures"), "--out", str(folder / "out"), "--shard"]
    assert main([*arguments, "--steps=1", "--batch-size=1"]) == 0


def check_finetuning(folder: Path) -> None:
    draw_pictures(folder / "pictures", 4)
    in_processes(2, partial(finetune, folder))
    assert len([*(folder / "out" / "states").glob("states-*")]) == 2
    assert not [*(folder / "out").glob("sheet-*")]
    before, after = (
        load_transformer(path) for path in (MODELS["demo"] / "transformer", folder / "out" / "transformer")
    )
    pairs = [*zip(before.state_dict().values(), after.state_dict().values(), strict=True)]
    assert all(one.shape == two.shape for one, two in pairs) and any(not torch.equal(one, two) for one, two in pairs)


if __name__ == "__main__":
    check(Path(sys.argv[1]))
    (inner := Path(sys.argv[1]) / "finetune").mkdir()
    check_finetuning(inner)
