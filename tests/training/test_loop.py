"""The training loop with a small network: stopping, resuming, averaging."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sana.training.loop import TrainingConfig, accumulated, check_schedule, train
from sana.training.optimizers import optimizers
from sana.training.state import TrainingState
from tests.sana.measures import mapped_bytes
from tests.sana.mishaps import no_file_above
from tests.training.doubling import Objective, batches

CONFIG = TrainingConfig(steps=9, learning_rate=0.02, warmup=2, save_every=3, sheet_every=4, ema_decay=0.5)


def run(folder: Path, config: TrainingConfig = CONFIG, source=batches, sheet=None) -> dict[str, Tensor]:
    objective = Objective()
    return train(objective, source, config, folder, sheet, [objective.hidden.weight]).state_dict()


def test_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def killed(step: int, process: int) -> Tensor:
        if step == 7:
            raise KeyboardInterrupt
        return batches(step, process)

    expected = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", source=killed)
    assert torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"] == 6
    found = run(tmp_path / "killed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_finished_run_is_not_repeated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = run(tmp_path)
    assert not caplog.messages

    def none_left(step: int, process: int) -> Tensor:
        raise AssertionError("a finished run asked for a batch")

    found = run(tmp_path, source=none_left)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert caplog.messages == [f"{tmp_path} has all of its {CONFIG.steps} steps behind it; nothing is trained."]


class Code:
    """Makes a file as a pickle that holds it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


OTHER = "is of another program"
OPTIMIZERS = "is of another training: its optimizers"
STEP = "is damaged or of another program: its step is no number of steps"
DAMAGE = "is damaged or of another program"
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), DAMAGE),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), DAMAGE),
    "text": (lambda path: path.write_bytes(b"a text"), DAMAGE),
    "code": (
        lambda path: torch.save(Code(path.parent / "canary"), path),
        "is damaged, or holds code, of which none was run",
    ),
    "list": (lambda path: torch.save([1, 2], path), OTHER),
    "tensors": (lambda path: torch.save({"weight": torch.zeros(3)}, path), OTHER),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "is no file"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is no file"),
}
PARTS: dict[str, tuple[tuple[object, ...], object, str]] = {  # where, what is there (None: nothing), what is said
    "no average": (("average",), None, OTHER),
    "no step": (("step",), None, OTHER),
    "step in words": (("step",), "six", STEP),
    "step below 0": (("step",), -1, STEP),
    "step not whole": (("step",), 6.5, STEP),
    "step true": (("step",), True, STEP),
    "objective no table": (("objective",), 1, "is of another model: the names of its objective are others"),
    "missing weight": (("objective", "out.bias"), None, "is of another model: the names of its objective are others"),
    "extra weight": (("average", "x"), torch.ones(1), "is of another model: the names of its average are others"),
    "shape": (
        ("average", "module.out.bias"),
        torch.ones(5),
        "is of another model: average: module.out.bias has shape (5,) instead of (4,)",
    ),
    "number for tensor": (
        ("objective", "out.bias"),
        3,
        "is damaged or of another program: objective: out.bias is no tensor",
    ),
    "updates no list": (("updates",), 5, "is of another training: it does not hold the states of 2 optimizers"),
    "one optimizer": (("updates",), [{}], "is of another training: it does not hold the states of 2 optimizers"),
    "no memory": (("updates", 0, "state"), None, f"{OPTIMIZERS} know other weights"),
    "weights": (("updates", 0, "state", 9), {}, f"{OPTIMIZERS} know other weights"),
    "memory lacks": (("updates", 0, "state", 1, "exp_avg_sq"), None, f"{OPTIMIZERS} are others"),
    "memory of Muon": (("updates", 1, "state", 0), 7, f"{OPTIMIZERS} are others"),
    "memory shape": (
        ("updates", 0, "state", 0, "exp_avg"),
        torch.ones(3),
        "is of another model: exp_avg of weight 0 has shape (3,) instead of (8,)",
    ),
    "count shape": (
        ("updates", 0, "state", 0, "step"),
        torch.ones(8),
        "is of another model: step of weight 0 has shape (8,) instead of ()",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder of a run, with its state after 9 steps and the one after 6, and what it gave."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


@pytest.fixture
def folder(finished: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished[0], tmp_path / "work")


@pytest.mark.parametrize(("damage", "told"), FILES.values(), ids=FILES)
def test_a_damaged_state_is_kept_and_the_last_good_one_named(
    folder: Path, finished: tuple[Path, dict[str, Tensor]], damage: Callable[[Path], object], told: str
) -> None:
    state, previous = folder / "state.pt", folder / "state.previous.pt"
    damage(state)
    before = sorted((path.name, path.stat().st_size) for path in folder.iterdir())
    with pytest.raises(ValueError) as raised:
        run(folder)
    assert str(raised.value) == (
        f"{state} {told}; move it away, and the same command goes on from {previous}, after step 6"
    )
    assert before == sorted((path.name, path.stat().st_size) for path in folder.iterdir())  # and no code was run
    state.rename(folder / "damaged")
    found = run(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in finished[1].items())
    assert (torch.load(state)["step"], torch.load(previous)["step"]) == (9, 6)


@pytest.mark.parametrize(("place", "value", "told"), PARTS.values(), ids=PARTS)
def test_a_state_of_something_else_is_told(folder: Path, place: tuple[object, ...], value: object, told: str) -> None:
    for name in ("state.pt", "state.previous.pt"):
        part = saved = torch.load(folder / name)
        *parents, key = place
        for parent in parents:
            part = part[parent]
        if value is None:
            del part[key]
        else:
            part[key] = value
        torch.save(saved, folder / name)
    with pytest.raises(ValueError) as raised:
        run(folder)
    assert str(raised.value) == f"{folder / 'state.pt'} {told}; move it away, and the same command begins anew"


def test_rates_and_the_like_are_those_of_the_run_and_not_of_a_file(
    folder: Path, finished: tuple[Path, dict[str, Tensor]]
) -> None:
    (folder / "state.pt").unlink()
    saved = torch.load(folder / "state.previous.pt")
    for update in saved["updates"]:
        update["param_groups"] = [{"betas": "no numbers"}]
    torch.save(saved, folder / "state.previous.pt")
    found = run(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in finished[1].items())


@pytest.mark.parametrize(("step", "way"), [(1, "begins anew"), (4, "goes on from {state}, after step 3")])
def test_a_full_disk_keeps_the_last_good_state_and_names_it(
    tmp_path: Path, finished: tuple[Path, dict[str, Tensor]], step: int, way: str
) -> None:
    state = tmp_path / "state.pt"
    with ExitStack() as full, pytest.raises(OSError) as raised:

        def filled(number: int, process: int) -> Tensor:
            if number == step:
                full.enter_context(no_file_above(3000))  # less than a state, more than a log
            return batches(number, process)

        run(tmp_path, source=filled)
    assert str(raised.value) == (
        f"{state} cannot be written (File too large); make room, or give a place that is yours to write; "
        f"the same command then {way.format(state=state)}"
    )
    assert not list(tmp_path.glob(".*"))
    found = run(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in finished[1].items())


def test_rows_of_a_run_that_was_stopped_before_it_saved_give_way(folder: Path) -> None:
    """And what is no row, such as half of one."""
    (folder / "state.pt").unlink()
    log = folder / "log.csv"
    rows = log.read_text().splitlines()
    log.write_bytes("\n".join([*rows[:2], "8,0.500000,12.00", "no row", "9,0.4"]).encode() + b"\xff")
    run(folder)
    again = log.read_text().splitlines()
    assert again[:2] == rows[:2] and [row.split(",")[0] for row in again] == ["3", "6", "9"]
    assert again[2].split(",")[1] == rows[2].split(",")[1]


def test_resuming_on_a_gpu_reads_only_what_is_copied_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    objective, path = Objective(), tmp_path / "state.pt"
    updates = optimizers(objective, 0.02, 0.01, [objective.hidden.weight])
    state = TrainingState(path, objective, AveragedModel(objective, use_buffers=True), updates)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert state.resume() == CONFIG.steps
    kept = list(updates[0].state.values())
    assert mapped_bytes((values["exp_avg"] for values in kept), path) > 0  # on a GPU this would be a copy
    counts = [values["step"] for values in kept]
    assert mapped_bytes([*counts, *state.objective.parameters(), *state.average.parameters()], path) == 0
    assert counts == [torch.tensor(float(CONFIG.steps))] * 3


def test_loss_falls_and_is_logged(tmp_path: Path) -> None:
    run(tmp_path, TrainingConfig(steps=300, learning_rate=0.02, warmup=10, save_every=100))
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert [int(row[0]) for row in rows] == [100, 200, 300]
    assert float(rows[-1][1]) < 0.1 * float(rows[0][1])
    assert all(float(row[2]) > 0 for row in rows)


def test_returned_weights_are_averaged(tmp_path: Path) -> None:
    averaged = run(tmp_path)
    last = torch.load(tmp_path / "state.pt", weights_only=True)["objective"]
    assert not torch.equal(averaged["out.weight"], last["out.weight"])


def test_the_average_of_a_short_run_has_forgotten_its_start(tmp_path: Path) -> None:
    start = Objective().state_dict()
    averaged = run(tmp_path, TrainingConfig(steps=100, learning_rate=0.02, warmup=2, ema_decay=0.999))
    last = torch.load(tmp_path / "state.pt", weights_only=True)["objective"]
    for name in ("hidden.weight", "out.weight"):
        assert (averaged[name] - last[name]).norm() < 0.2 * (start[name] - last[name]).norm()


def test_sheets_are_drawn_with_averaged_weights(tmp_path: Path) -> None:
    from PIL import Image

    seen = []

    def sheet(objective: nn.Module) -> Image.Image:
        seen.append(objective.out.weight.clone())
        return Image.new("RGB", (2, 2))

    averaged = run(tmp_path, sheet=sheet)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"sheet-{n:06d}.png" for n in (4, 8, 9)]
    assert torch.equal(seen[-1], averaged["out.weight"])


def test_learning_rate_rises_and_falls() -> None:
    config = TrainingConfig(steps=100, learning_rate=1.0, warmup=10, cooldown=0.5)
    assert [config.rate(step) for step in (0, 9, 50, 75, 99)] == [0.1, 1.0, 1.0, 0.5, 0.02]


def test_matrices_go_to_muon_and_the_rest_to_adamw() -> None:
    objective = Objective()
    adamw, muon = optimizers(objective, 0.02, 0.01, [objective.hidden.weight])
    assert muon.param_groups[0]["params"] == [objective.hidden.weight]
    assert len(adamw.param_groups[0]["params"]) == 3
    assert len(optimizers(objective, 0.02, 0.01)) == 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 1, 2 / 3, 1 / 3]),
        ("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),  # (1 + cos(pi k / 4)) / 2
    ],
)
def test_the_rate_rises_and_then_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    config = TrainingConfig(6, 1.0, warmup=2, cooldown=0.5, schedule=schedule)
    assert [config.rate(step) for step in range(6)] == pytest.approx(expected)


def test_several_batches_a_step_are_one_large_batch(tmp_path: Path) -> None:
    """Of the fourth step, by its gradient before clipping and by the loss in the log."""
    found = []
    for count, source in (
        (1, lambda n, process: torch.cat([batches(2 * n, process), batches(2 * n + 1, process)])),
        (2, batches),
    ):
        objective = Objective()
        loss, images = accumulated(objective, source, 3, count, Accelerator(cpu=True))
        found.append([loss, *(weight.grad for weight in objective.parameters())])
        assert images == 32
    torch.testing.assert_close(found[0], found[1])
    seen: list[int] = []
    run(
        tmp_path, replace(CONFIG, accumulate=2), lambda number, process: seen.append(number) or batches(number, process)
    )
    assert seen == [*range(18)]


def test_a_part_of_an_objective_is_trained_averaged_and_saved(tmp_path: Path) -> None:
    objective = Objective()
    objective.out.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    found = train(objective, batches, CONFIG, tmp_path, weights=objective.hidden)
    assert {*found.state_dict()} == {"weight", "bias"} and not torch.equal(found.weight, before["hidden.weight"])
    assert {*torch.load(tmp_path / "state.pt", weights_only=True)["objective"]} == {"weight", "bias"}
    assert torch.equal(objective.out.weight, before["out.weight"])
    again = train(Objective(), batches, CONFIG, tmp_path, weights=Objective().hidden)
    assert torch.equal(again.weight, found.weight)


def test_a_row_of_the_log_may_come_more_often_than_a_state(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, log_every=2))
    steps = [row.split(",")[0] for row in (tmp_path / "log.csv").read_text().splitlines()]
    assert steps == ["2", "3", "4", "6", "8", "9"]


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="schedule 'step' is unknown; use one of linear, cosine, constant"):
        check_schedule("step")
