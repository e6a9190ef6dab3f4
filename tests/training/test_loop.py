"""The training loop with a small network: stopping, resuming, averaging."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sana.training import loop
from sana.training.loop import TrainingConfig, TrainingState, optimizers, train
from tests.sana.measures import mapped_bytes

CONFIG = TrainingConfig(steps=9, learning_rate=0.02, warmup=2, save_every=3, sheet_every=4, ema_decay=0.5)


class Objective(nn.Module):
    """Learns to double its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, batch: Tensor) -> Tensor:
        return (self.out(torch.tanh(self.hidden(batch))) - 2 * batch).square().mean()


def batches(step: int, process: int) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


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


def test_resuming_on_a_gpu_reads_only_what_is_copied_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    objective, path = Objective(), tmp_path / "state.pt"
    updates = optimizers(objective, CONFIG, [objective.hidden.weight])
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


def test_processes_wait_two_hours_for_the_one_that_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PartialState", lambda **options: options)
    assert loop.process_state() == {"cpu": not torch.cuda.is_available(), "timeout": timedelta(hours=2)}


def test_matrices_go_to_muon_and_the_rest_to_adamw() -> None:
    objective = Objective()
    adamw, muon = optimizers(objective, CONFIG, [objective.hidden.weight])
    assert muon.param_groups[0]["params"] == [objective.hidden.weight]
    assert len(adamw.param_groups[0]["params"]) == 3
    assert len(optimizers(objective, CONFIG, [])) == 1
