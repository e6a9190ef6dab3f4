"""Which parts are on a device, by the bytes that it has: moves are noted and not made."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sana import offloading
from sana.checkpoints.filling import fill, placed_bytes
from sana.networks.adapters import Change, Changes, Factors
from sana.networks.devices import FREE_SHARE, free_bytes
from sana.networks.packed import PackedWeight, scaled
from sana.networks.packed_layers import put_weight
from sana.offloading import Need, Offloader, Part, weight_bytes

GPU = torch.device("cuda")
SIZES = {"large": 500, "middle": 300, "small": 100}


class Card:
    """A device of so many bytes, of which a share may be taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
        self.size, self.used, self.moves = round(budget / FREE_SHARE), 0, []
        monkeypatch.setattr(offloading, "free_bytes", self.free_bytes)
        monkeypatch.setattr(Part, "move", lambda part, device: self.move(part, device))

    def free_bytes(self, device: torch.device, share: float) -> int:
        assert device == GPU
        return int(share * (self.size - self.used))

    def move(self, part: Part, device: torch.device) -> None:
        leaves = device.type == "cpu"
        name = next(name for name, size in SIZES.items() if size == part.nbytes)
        self.moves.append(f"-{name}" if leaves else f"+{name}")
        self.used += -part.nbytes if leaves else part.nbytes


@pytest.fixture
def offloader(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[Offloader, Card]]:
    def make(budget: int) -> tuple[Offloader, Card]:
        card = Card(monkeypatch, budget)
        made = Offloader(GPU)
        for name, size in SIZES.items():
            made.add(name, Bytes(size))
        return made, card

    return make


class Bytes(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(("nbytes", "home"), [(900, GPU), (901, torch.device("cpu"))])
def test_parts_are_loaded_to_the_device_where_all_fit(
    offloader: Callable[[int], tuple[Offloader, Card]], nbytes: int, home: torch.device
) -> None:
    made, card = offloader(900)
    assert made.home == torch.device("cpu")
    made.choose_home(nbytes)
    assert made.home == home
    made.add("small", Bytes(SIZES["small"]))
    made.bring(Need(("small",), 0, 0))
    assert card.moves == ([] if home == GPU else ["+small"])


@pytest.mark.parametrize(
    ("budget", "left"),
    [(1000, []), (996, ["-large"]), (500, ["-large"]), (496, ["-large", "-small"]), (100, ["-large", "-small"])],
)
def test_as_much_leaves_as_a_phase_needs_and_the_largest_first(
    offloader: Callable[[int], tuple[Offloader, Card]], budget: int, left: list[str]
) -> None:
    made, card = offloader(1000)
    made.bring(Need(("small", "large"), 0, 0))
    assert card.moves == ["+small", "+large"]
    card.size = budget / FREE_SHARE
    for _ in range(2):  # what is there already does not move
        made.bring(Need(("middle",), 100, 100))
        assert card.moves == ["+small", "+large", *left, "+middle"]


def test_phases_have_room_together_up_to_the_budget(offloader: Callable[[int], tuple[Offloader, Card]]) -> None:
    made, _ = offloader(800)
    first, second = Need(("large",), 50, 0), Need(("middle",), 0, 0)
    assert made.has_room(first) and made.has_room(second)
    assert not made.has_room(first, second)
    assert made.has_room(Need(("large",), 0, 0), second)
    assert made.has_room(Need(("large",), 300, 0), Need(("large",), 200, 0))  # one after another, with one part


def test_what_was_computed_with_a_part_goes_when_it_leaves(offloader: Callable[[int], tuple[Offloader, Card]]) -> None:
    made, card = offloader(500)
    gone: list[str] = []
    made.parts["large"].on_leave = lambda: gone.append("large")
    made.bring(Need(("large",), 0, 0))
    assert not gone
    made.bring(Need(("middle",), 0, 0))
    assert gone == ["large"]


def test_what_is_reserved_for_a_part_counts_until_it_leaves(offloader: Callable[[int], tuple[Offloader, Card]]) -> None:
    made, card = offloader(900)
    reserved = [0]
    made.attach("large", lambda: sum(reserved), reserved.clear)
    made.attach("no part", lambda: 1000, reserved.clear)
    every = Need(tuple(SIZES), 0, 0)
    made.bring(every)
    assert made.has_room(every) and sorted(card.moves) == ["+large", "+middle", "+small"]
    reserved[0] = 1
    assert not made.has_room(every)
    made.bring(Need(("small", "middle"), 0, 0))
    assert card.moves[-1] == "-large" and not reserved and made.has_room(every)


@pytest.mark.parametrize(("budget", "fits"), [(800, True), (790, False)])
def test_a_phase_that_never_fits_is_refused_by_all_of_the_memory(
    offloader: Callable[[int], tuple[Offloader, Card]], budget: int, fits: bool
) -> None:
    """And not by the share of it that is planned with: the device has 1000 bytes, or a few less."""
    made, card = offloader(budget)
    needs = {"resting": Need(("small",), 0, 0), "drawing": Need(("large",), 9000, 500)}
    made.check({"resting": needs["resting"]})
    if fits:
        made.check(needs)
        made.bring(needs["drawing"])
        card.used += 300  # of what is computed meanwhile
        made.check(needs)
    else:
        with pytest.raises(
            ValueError, match=r"^drawing takes 0\.00 GiB on cuda, even alone, and 0\.00 GiB are free there"
        ):
            made.check(needs)


@pytest.mark.parametrize(("device", "offload"), [("cuda", "never"), ("cpu", "auto"), ("cpu", "never")])
def test_parts_stay_where_they_are_never_to_leave(
    device: str, offload: offloading.Offload, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(offloading, "free_bytes", lambda device, share=1.0: 0)
    made = Offloader(torch.device(device), offload)
    made.add("part", nn.Linear(2, 2))
    assert not made.is_active and not made.parts and made.home == torch.device(device)
    made.choose_home(0)
    assert made.home == torch.device(device)
    made.bring(Need(("part",), 0, 0))
    made.check({"phase": Need(("part",), 0, 1)})
    assert made.has_room(Need(("part",), 1, 1))
    assert not caplog.messages


def test_a_device_that_does_not_tell_its_memory_keeps_all_parts_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made = Offloader(torch.device("mps"))
    assert not made.is_active and made.home == torch.device("mps")
    assert caplog.messages == [
        "How much memory mps has free cannot be asked, so all parts of the model stay on it; --offload never (in Python "
        "offload='never') says that this is meant."
    ]
    assert caplog.records[0].levelno == logging.WARNING
    Offloader(torch.device("mps"), "never")
    assert len(caplog.messages) == 1


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="^offload is 'always'; use 'never' or 'auto'$"):
        Offloader(GPU, "always")


def test_weights_count_as_they_are_stored() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    assert weight_bytes(network) == 2 * (12 + 3) + 2 * 4 * 3 + 8  # of the norm also how many batches it saw
    parts = {"packed": torch.zeros(3, 4, dtype=torch.int8), "scale": torch.ones(3, 1)}
    weight = PackedWeight("int8", scaled, parts, (3, 4))
    change = Change("LoRA", (Factors(torch.ones(3, 1), torch.ones(1, 4)),), lengths=torch.ones(3))
    weight.changes.append(Changes([(change, 1.0)]))
    put_weight(network, "0.weight", weight)
    assert weight_bytes(network) == (12 + 12 + 4 * (3 + 4 + 3)) + 6 + 2 * 4 * 3 + 8


def test_free_memory_of_any_device_that_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("The device doesn't support querying the available free memory")

    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.xpu, name, lambda device: 0)
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda device: (3000, 9000))
    assert free_bytes(torch.device("xpu")) == 2400
    assert free_bytes(torch.device("xpu"), 1.0) == 3000
    monkeypatch.setattr(torch.xpu, "mem_get_info", refuse)
    assert free_bytes(torch.device("xpu")) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_what_parts_will_take_is_told_before_they_are_loaded(dtype: torch.dtype | None) -> None:
    parts = {"packed": torch.zeros(3, 4, dtype=torch.int8), "scale": torch.ones(3, 1)}
    network = nn.Sequential(nn.Linear(4, 3, device="meta"), nn.BatchNorm1d(3, device="meta"))
    tensors = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in network.state_dict().items()}
    told = [placed_bytes(tensors, dtype)]
    packed = {**tensors, "0.weight": PackedWeight("int8", scaled, parts, (3, 4))}
    told.append(placed_bytes(packed, dtype))
    assert told == [
        weight_bytes(fill(copy.deepcopy(network), each, "file", dtype, "cpu")) for each in (tensors, packed)
    ]
    assert told[0] - told[1] == 12 * (dtype or torch.float32).itemsize - 24
