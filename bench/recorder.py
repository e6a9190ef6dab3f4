"""CUDA graphs on a CPU: the same memory again, whatever has become of it, and nothing else.

Recording refuses what CUDA refuses: reading numbers, shapes that depend on them, and copies from the host, of which all is that
names no device. Results are not there before the first launch, and a launch writes over what other graphs with the same memory
have left.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from sana import capturing
from sana.networks.devices import GraphRecorder

REFUSED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
HOST = torch.device("meta")  # which refuses to be read, copied or combined with the device
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
BROKEN = 255  # in every byte: no number, as a float of any kind


class RefusedInGraph(RuntimeError):
    """What CUDA would not record."""


class Recording(TorchDispatchMode):
    """Every operation with the very tensors that it was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., object], Sequence[object], Mapping[str, object], object]] = []
        self._made: list[Tensor] = []  # by these operations
        self.is_broken = False  # something was refused

    def __torch_dispatch__(
        self, call: object, types: Sequence[type], arguments: tuple = (), options: Mapping[str, object] | None = None
    ) -> object:
        options = options or {}
        given = tensors_in((arguments, options))
        try:
            check(call, given)
        except RefusedInGraph:
            self.is_broken = True
            raise
        result = call(*arguments, **options)
        own = {address(tensor) for tensor in given}
        self._made += [tensor for tensor in tensors_in(result) if address(tensor) not in own]
        # Aliases, which stay where they are when a weight gets other memory.
        self._calls.append((call, *tree_map(alias, (arguments, options)), tree_map(alias, result)))
        return result

    def break_results(self) -> None:
        for tensor in self._made:
            tensor.untyped_storage().fill_(BROKEN)

    def launch(self) -> None:
        for call, arguments, options, recorded in self._calls:
            results, own = tensors_in(recorded), {address(tensor) for tensor in tensors_in((arguments, options))}
            if call._schema.is_mutable:
                call(*arguments, **options)
            elif any(address(result) not in own for result in results):  # else they are views of what is there
                for old, new in zip(results, tensors_in(call(*arguments, **options)), strict=True):
                    old.copy_(new)


def check(call: object, given: Sequence[Tensor]) -> None:
    """Raises RefusedInGraph for an operation that CUDA would not record."""
    is_masked = call in INDEXING and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
    if is_masked or (call not in INDEXING and REFUSED & {*call.tags}):
        raise RefusedInGraph(f"{call} needs numbers that are not there while a graph is recorded")
    if call is torch.ops.aten.lift_fresh.default and given[0].device != HOST:
        raise RefusedInGraph("numbers of Python are copied to the device while a graph is recorded")


def tensors_in(value: object) -> list[Tensor]:
    return [part for part in tree_iter(value) if isinstance(part, Tensor)]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def alias(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


class Graphs:
    """In the place of `torch.cuda`, as far as recording and launching go. recorded, launched: how many graphs, and how often.

    alive: those that can be launched. events: what was told to streams, in order.
    """

    def __init__(self) -> None:
        self.recorded = self.launched = 0
        self.events: list[str] = []
        self.current = Stream(self, "current")
        self.alive: WeakSet[Graph] = WeakSet()
        self._pools: dict[int, WeakSet[Graph]] = {}

    def make(self) -> "Graph":
        return Graph(self)

    @contextmanager
    def record(
        self,
        graph: "Graph",
        pool: int | None = None,
        stream: "Stream | None" = None,
        capture_error_mode: str = "global",
    ) -> Iterator[None]:
        """Raises RuntimeError for a pool without a graph, as PyTorch asserts."""
        if pool is not None and not self._pools[pool]:
            raise RuntimeError("a pool of memory is not to be shared with graphs that are gone")
        self.events.append(f"recording on {stream.name}, {capture_error_mode}")
        before, self.current = self.current, stream
        with HOST, graph.recording:
            yield
        self.events.append("recording ends")
        if graph.recording.is_broken:
            raise RuntimeError("recording failed due to a previous error")  # on the other stream still, as in PyTorch
        self.current = before
        graph.recording.break_results()
        graph.number = len(self._pools) if pool is None else pool
        self._pools.setdefault(graph.number, WeakSet()).add(graph)
        self.alive.add(graph)
        self.recorded += 1

    @contextmanager
    def on(self, stream: "Stream") -> Iterator[None]:
        before, self.current = self.current, stream
        self.events.append(f"on {stream.name}")
        try:
            yield
        finally:
            self.current = before

    def set(self, stream: "Stream") -> None:
        self.current = stream


class Stream:
    def __init__(self, graphs: Graphs, name: str) -> None:
        self.graphs, self.name = graphs, name

    def wait_stream(self, other: "Stream") -> None:
        self.graphs.events.append(f"{self.name} waits for {other.name}")


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, graphs: Graphs) -> None:
        self.graphs, self.recording, self.number = graphs, Recording(), None

    def pool(self) -> int:
        return self.number

    def replay(self) -> None:
        self.graphs.launched += 1
        for other in self.graphs._pools[self.number] - {self}:
            other.recording.break_results()
        self.recording.launch()


@contextmanager
def graphs_on_cpu() -> Iterator[Graphs]:
    """Until it is left, the CPU records graphs as a GPU does."""
    graphs = Graphs()
    stand_ins = {
        "CUDAGraph": graphs.make,
        "graph": graphs.record,
        "Stream": lambda device: Stream(graphs, "side"),
        "stream": graphs.on,
        "current_stream": lambda: graphs.current,
        "set_stream": graphs.set,
        "device": lambda device: ExitStack(),
    }
    with patch.multiple(torch.cuda, **stand_ins), patch.object(capturing, "graph_recorder", GraphRecorder):
        yield graphs
