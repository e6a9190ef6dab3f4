"""The state of a training in a file: saved as a whole, and read without trust in what is there."""

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..saving import replacing
from .optimizers import Form, memory_of
from .sharding import part_like, whole


@dataclass(frozen=True)
class TrainingState:
    """Everything that a run needs to go on, in one file that is replaced as a whole. The file before is kept beside it."""

    path: Path
    objective: nn.Module
    average: AveragedModel
    updates: Sequence[torch.optim.Optimizer]

    @property
    def previous(self) -> Path:
        return self.path.with_stem(f"{self.path.stem}.previous")

    def content(self, step: int, keep: bool = True) -> dict[str, object]:
        """What `save` writes. keep: as for `whole`."""
        parts = {"objective": self.objective, "average": self.average}
        states = {name: part.state_dict() for name, part in parts.items()}
        return whole({"step": step, **states, "updates": [*map(_plain, self.updates)]}, keep)

    def save(self, state: Mapping[str, object]) -> None:
        """Raises OSError, which names the last good state, if there is no room."""
        try:
            with replacing(self.path) as unfinished:
                _write_state(state, unfinished)
                if self.path.exists():
                    os.replace(self.path, self.previous)
        except OSError as error:
            raise OSError(f"{error}; the same command then {self._way_on(self.path, self.previous)}") from error

    def saved_step(self) -> int | None:
        """After which step the newest file was saved; None: there is none that can be read."""
        try:
            return self._read(self.path, mapped=True)["step"]
        except ValueError:
            return None

    def resume(self) -> int:
        """Read the newest file if there is one. Returns the step to go on with.

        Raises ValueError, which names the last good state, if it is no state of this training.
        """
        newest, *older = [path for path in (self.path, self.previous) if os.path.lexists(path)] or [None]
        if newest is None:
            return 0
        try:
            # To GPUs values are copied, so their processes need not each read all of it into memory.
            return self._fill(self._read(newest, mapped=torch.cuda.is_available()))
        except ValueError as error:
            raise ValueError(f"{newest} {error}; move it away, and the same command {self._way_on(*older)}") from error

    def _fill(self, saved: Mapping[str, object]) -> int:
        for name, part in (("objective", self.objective), ("average", self.average)):
            part.load_state_dict({key: part_like(saved[name][key], own) for key, own in part.state_dict().items()})
        for update, state in zip(self.updates, saved["updates"], strict=True):
            # Rates and the like are those of this run, and not of the file.
            known = memory_of(update).group
            groups = _plain(update)["param_groups"]
            if known:
                groups = [
                    {**own, **{name: found[name] for name in known}}
                    for own, found in zip(groups, state["param_groups"], strict=True)
                ]
            weights = [weight for group in update.param_groups for weight in group["params"]]
            memories = {number: _part(memory, weights[number]) for number, memory in state["state"].items()}
            update.load_state_dict({"state": memories, "param_groups": groups})
            for values in update.state.values():
                # AdamW counts on the CPU, and a file that is still mapped stays on the disk
                if isinstance(values.get("step"), Tensor):
                    values["step"] = values["step"].clone()
        return saved["step"]

    def _read(self, path: Path, mapped: bool) -> Mapping[str, object]:
        """What `save` has written. Raises ValueError with what is wrong with the file, for a sentence that names it."""
        if not path.is_file():  # a named pipe has no end
            raise ValueError("is no file")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except PermissionError as error:
            raise ValueError(f"cannot be opened ({error.strerror})") from error
        except pickle.UnpicklingError as error:
            raise ValueError("is damaged, or holds code, of which none was run") from error
        except Exception as error:  # each kind of damage fails in its own way
            raise ValueError("is damaged or of another program") from error
        if not isinstance(saved, Mapping) or not {"step", "objective", "average", "updates"} <= saved.keys():
            raise ValueError("is of another program")
        if type(saved["step"]) is not int or saved["step"] < 0:
            raise ValueError("is damaged or of another program: its step is no number of steps")
        _check_network("objective", saved["objective"], self.objective)
        _check_network("average", saved["average"], self.average)
        _check_memories(saved["updates"], self.updates)
        return saved

    def _way_on(self, *paths: Path) -> str:
        """What a command does with the first of these files that is a good state."""
        for path in paths:
            try:
                return f"goes on from {path}, after step {self._read(path, mapped=True)['step']}"
            except ValueError:
                continue
        return "begins anew"


def _part(memory: Mapping[str, object], weight: Tensor) -> dict[str, object]:
    """Of what an optimizer remembers of a weight, what this process needs."""
    return {name: part_like(value, weight) if name != "step" else value for name, value in memory.items()}


def _plain(update: torch.optim.Optimizer) -> dict[str, object]:
    """As PyTorch has it: bitsandbytes would put its numbers into a table within a table."""
    return torch.optim.Optimizer.state_dict(update)


def _write_state(state: Mapping[str, object], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a write that failed, over which PyTorch stumbles
            raise error.__context__ from None
        raise


def _check_network(name: str, found: object, network: nn.Module) -> None:
    """Raises ValueError unless a file holds what the network takes."""
    expected = network.state_dict()
    if not isinstance(found, Mapping) or found.keys() != expected.keys():
        raise ValueError(f"is of another model: the names of its {name} are others")
    for key, tensor in expected.items():
        _check_shape(f"{name}: {key}", found[key], tensor.shape)


def _check_memories(found: object, updates: Sequence[torch.optim.Optimizer]) -> None:
    """Raises ValueError unless a file holds what the optimizers remember of their weights."""
    if not isinstance(found, Sequence) or len(found) != len(updates):
        raise ValueError(f"is of another training: it does not hold the states of {len(updates)} optimizers")
    for state, update in zip(found, updates, strict=True):
        weights = dict(enumerate(weight for group in update.param_groups for weight in group["params"]))
        memories = state.get("state") if isinstance(state, Mapping) else None
        if not isinstance(memories, Mapping) or not memories.keys() <= weights.keys():
            raise ValueError("is of another training: its optimizers know other weights")
        for number, memory in memories.items():
            expected = memory_of(update).weight(weights[number].shape)
            if not isinstance(memory, Mapping) or memory.keys() != expected.keys():
                raise ValueError("is of another training: its optimizers are others")
            for name, form in expected.items():
                _check_form(f"{name} of weight {number}", memory[name], form)
        if known := memory_of(update).group:
            _check_groups(state.get("param_groups"), len(update.param_groups), known)


def _check_groups(found: object, count: int, known: Mapping[str, Form]) -> None:
    """Raises ValueError unless a file holds what an optimizer knows of all weights together."""
    if not isinstance(found, Sequence) or len(found) != count:
        raise ValueError("is of another training: its optimizers are others")
    for group in found:
        if not isinstance(group, Mapping) or not known.keys() <= group.keys():
            raise ValueError("is of another training: its optimizers are others")
        for name, form in known.items():
            _check_form(name, group[name], form)


def _check_form(name: str, found: object, form: Form) -> None:
    if isinstance(form, torch.Size):
        _check_shape(name, found, form)
    elif type(found) is not form:
        raise ValueError(f"is damaged or of another program: {name} is no number")


def _check_shape(name: str, found: object, shape: torch.Size) -> None:
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_meta:
        raise ValueError(f"is damaged or of another program: {name} is no tensor")
    if found.shape != shape:
        raise ValueError(f"is of another model: {name} has shape {tuple(found.shape)} instead of {tuple(shape)}")
