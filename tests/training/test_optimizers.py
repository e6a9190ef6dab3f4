"""Each optimizer against its library driven by PyTorch alone, and its state in a file."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sana.training import optimizers as module
from sana.training.loop import TrainingConfig, train
from sana.training.lora import LoraConfig
from sana.training.optimizers import check_optimizer, checked_rate, remembered_bytes

NAMES = ("adamw", "adamw8bit", "prodigy", "came")
STEPS = 6


class Wide(nn.Module):
    """Learns to double its input; its matrix has the 4096 numbers from which bitsandbytes takes 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64)

    def forward(self, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return (self.layer(batch) - 2 * batch).square().mean()


def batches(step: int, process: int) -> Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(step))


def config(name: str) -> TrainingConfig:
    rate = checked_rate(None, name, 1e-2)
    return TrainingConfig(
        STEPS, rate, warmup=3, schedule="constant", ema_decay=0.0, clip=0.5, save_every=2, optimizer=name
    )


def plain(name: str, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(weights, 1e-2, (0.9, 0.99), weight_decay=0.01)
    if name == "adamw8bit":
        library = pytest.importorskip("bitsandbytes")
        return library.optim.AdamW8bit(weights, 1e-2, (0.9, 0.99), weight_decay=0.01)
    library = pytest.importorskip("pytorch_optimizer")
    if name == "came":
        return library.CAME(weights, 1e-2, (0.9, 0.999, 0.9999), weight_decay=0.01)
    return library.Prodigy(weights, 1.0, (0.9, 0.99), weight_decay=0.01, bias_correction=True, safeguard_warmup=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_equals_one_by_the_library_alone(tmp_path: Path, name: str) -> None:
    objective = Wide()
    update = plain(name, [*objective.parameters()])
    highest = update.param_groups[0]["lr"]
    for step in range(STEPS):
        update.param_groups[0]["lr"] = highest * min(1, (step + 1) / 3)
        objective(batches(step, 0)).backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 0.5)
        update.step()
        update.zero_grad()
    found = train(Wide(), batches, config(name), tmp_path).state_dict()
    start = Wide().state_dict()
    for key, tensor in objective.state_dict().items():
        assert torch.equal(found[key], tensor) and not torch.equal(tensor, start[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_what_is_remembered_of_a_weight_is_counted(name: str) -> None:
    """Of one that bitsandbytes keeps in 8 bits, of one that is too small for that, and of one that CAME has no factors of."""
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((65, 64), (64, 63), (100,))]
    update = plain(name, weights)
    sum(weight.square().sum() for weight in weights).backward()
    update.step()
    for weight in weights:
        memory = update.state[weight].items()
        own = [
            value for key, value in memory if isinstance(value, Tensor) and value.ndim and not key.startswith("qmap")
        ]
        assert sum(tensor.nbytes for tensor in own) == remembered_bytes(name, weight.shape) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_training_goes_on_to_the_bit(tmp_path: Path, name: str) -> None:
    plain(name, [nn.Parameter(torch.zeros(1))])  # skips where the library is missing

    def killed(step: int, process: int) -> Tensor:
        if step == 5:
            raise KeyboardInterrupt
        return batches(step, process)

    expected = train(Wide(), batches, config(name), tmp_path / "whole").state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(Wide(), killed, config(name), tmp_path / "killed")
    found = train(Wide(), batches, config(name), tmp_path / "killed").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    states = [torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("whole", "killed")]
    groups = [[update["param_groups"] for update in state["updates"]] for state in states]
    assert groups[0] == groups[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda group: group.pop("d"), "is of another training: its optimizers are others"),
        (lambda group: group.update(d="much"), "is damaged or of another program: d is no number"),
        (lambda group: group.update(d_numerator=1.0), "is damaged or of another program: d_numerator is no tensor"),
    ],
)
def test_what_prodigy_knows_of_all_weights_is_checked(
    tmp_path: Path, change: Callable[[dict[str, object]], object], told: str
) -> None:
    pytest.importorskip("pytorch_optimizer")
    train(Wide(), batches, config("prodigy"), tmp_path)
    saved = torch.load(path := tmp_path / "state.pt", weights_only=True)
    change(saved["updates"][0]["param_groups"][0])
    torch.save(saved, path)
    with pytest.raises(ValueError) as raised:
        train(Wide(), batches, config("prodigy"), tmp_path)
    assert str(raised.value).startswith(f"{path} {told}; move it away, and the same command goes on from ")


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    train(Wide(), batches, config("adamw"), tmp_path)
    with pytest.raises(ValueError, match="state.pt is of another training: its optimizers are others; move it away"):
        train(Wide(), batches, config("adamw8bit"), tmp_path)


def test_prodigy_has_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    assert LoraConfig(optimizer="prodigy").training.learning_rate == 1
    assert LoraConfig(optimizer="prodigy", learning_rate=0.5).training.learning_rate == 0.5
    assert LoraConfig(optimizer="came").training.learning_rate == LoraConfig().training.learning_rate == 1e-4
    for rate in (1e-4, 0.09, 10.5, float("nan")):
        with pytest.raises(ValueError) as raised:
            LoraConfig(optimizer="prodigy", learning_rate=rate)
        assert str(raised.value) == (
            f"learning_rate is {rate}; prodigy finds the rate by itself and multiplies it by this, so leave it out, or give a "
            "number between 0.1 and 10"
        )


def test_an_optimizer_that_is_unknown_or_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="optimizer 'lion' is unknown; use one of adamw, adamw8bit, prodigy, came"):
        check_optimizer("lion")
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as raised:
        LoraConfig(optimizer="came")
    assert str(raised.value) == (
        'the optimizer came needs the package pytorch_optimizer; run pip install ".[optimizers]" in the folder of this project'
    )
    check_optimizer("adamw")
