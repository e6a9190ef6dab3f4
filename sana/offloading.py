"""Parts of a model that take turns on a device which has no room for all of them.

A part goes to the device when a phase needs it, and another leaves only where there is no room for both: where all fits,
each part goes there once and stays. What phases need, `needs.py` tells.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import nn

from .networks.adapters import Changes
from .networks.devices import FREE_SHARE, free_bytes
from .networks.memory import GIB

Offload = Literal["never", "auto"]
CPU = torch.device("cpu")

log = logging.getLogger(__name__)


class Need(NamedTuple):
    """What a phase of drawing takes on a device, in bytes beside the weights of its parts."""

    parts: tuple[str, ...]  # which must be there
    working: int  # as it runs where there is room
    least: int  # as it can run


class Part:
    """Modules that move together. on_leave: called when they have left, for what was computed with them.

    reserved: tells the bytes that nothing but them may take on the device, and that count as free there.
    """

    def __init__(self, modules: Iterable[nn.Module], on_leave: Callable[[], None], is_there: bool) -> None:
        self.modules = tuple(modules)
        self.nbytes = sum(map(weight_bytes, self.modules))
        self.on_leave = on_leave
        self.is_there = is_there  # on the device
        self.reserved: Callable[[], int] = lambda: 0

    def move(self, device: torch.device) -> None:
        for module in self.modules:
            module.to(device)


class Offloader:
    """The parts of a model, by name, and which of them are on the device.

    offload: "auto", or "never" for parts that are on the device anyway and stay there. It is never on a CPU, where there
    is nothing to gain, and on a device that does not tell its free memory, which is warned of.
    Raises ValueError for another word.
    """

    def __init__(self, device: torch.device, offload: Offload = "auto") -> None:
        if offload not in ("never", "auto"):
            raise ValueError(f"offload is {offload!r}; use 'never' or 'auto'")
        self.device = device
        self.parts: dict[str, Part] = {}
        self.is_active = offload == "auto" and device.type != "cpu"
        self.free_at_first = free_bytes(device, 1.0) if self.is_active else None
        if self.is_active and self.free_at_first is None:
            self.is_active = False
            log.warning(
                "How much memory %s has free cannot be asked, so all parts of the model stay on it; "
                "--offload never (in Python offload='never') says that this is meant.",
                device,
            )
        self.home = CPU if self.is_active else device  # where parts are loaded to

    def choose_home(self, nbytes: int) -> None:
        """On the device if there is room for parts of so many bytes in all."""
        if self.is_active and self._capacity(FREE_SHARE) >= nbytes:
            self.home = self.device

    def add(self, name: str, *modules: nn.Module, on_leave: Callable[[], None] = lambda: None) -> None:
        """Take over a part that was loaded to `home`; not one that stays."""
        if self.is_active:
            self.parts[name] = Part(modules, on_leave, is_there=self.home == self.device)

    def attach(self, name: str, reserved: Callable[[], int], on_leave: Callable[[], None]) -> None:
        """Tell what is reserved for a part, as `Part` has it, and what gives that back."""
        if name in self.parts:
            self.parts[name].reserved, self.parts[name].on_leave = reserved, on_leave

    def bring(self, need: Need) -> None:
        """Put the parts of a phase on the device. Others leave, the largest first, as far as there is no room beside them."""
        if not self.is_active:
            return
        needed = [self.parts[name] for name in need.parts]
        others = sorted((part for part in self._there() if part not in needed), key=lambda part: part.nbytes)
        while others and not self._fits([*needed, *others], need.working):
            part = others.pop()
            part.move(CPU)
            part.is_there = False
            part.on_leave()
        for part in needed:
            if not part.is_there:
                part.move(self.device)
                part.is_there = True

    def has_room(self, *needs: Need) -> bool:
        """Whether all parts of these phases can be on the device at the same time."""
        needed = {name for need in needs for name in need.parts}
        return not self.is_active or self._fits([self.parts[name] for name in needed], max(n.working for n in needs))

    def check(self, needs: Mapping[str, Need]) -> None:
        """Raises ValueError, before anything is computed, for a phase that the device cannot hold with nothing beside it."""
        for phase, need in needs.items() if self.is_active else ():
            taken = sum(self.parts[name].nbytes for name in need.parts) + need.least
            whole = max(self.free_at_first, self._capacity(1.0))  # now it may be less by what was computed with parts
            if taken > whole:
                raise ValueError(
                    f"{phase} takes {taken / GIB:.2f} GiB on {self.device}, even alone, and {whole / GIB:.2f} GiB are free "
                    "there; use files quantised to 8 bits, a smaller size or batch, or the device cpu"
                )

    def _there(self) -> list[Part]:
        return [part for part in self.parts.values() if part.is_there]

    def _fits(self, parts: Iterable[Part], working: int) -> bool:
        return sum(part.nbytes + part.reserved() for part in parts) + working <= self._capacity(FREE_SHARE)

    def _capacity(self, share: float) -> int:
        """Bytes on the device for parts and all that they do: a share of what is free, or would be without the parts."""
        return int(share * (free_bytes(self.device, 1.0) + sum(part.nbytes for part in self._there())))


def weight_bytes(network: nn.Module) -> int:
    """What the weights of a network take as they are stored: packed ones packed, with what changes them when unpacked."""
    changes = (module.nbytes for module in network.modules() if isinstance(module, Changes))
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers())) + sum(changes)
