"""What a device can do, where the answer is not the same for all: arithmetic in bfloat16, how much memory is free, and graphs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from threading import Lock
from weakref import WeakSet

import torch
from torch import Tensor

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]  # see `GraphRecorder.__call__`

FREE_SHARE = 0.8  # of the free memory of a GPU, to take at most
ONE_RECORDING = Lock()  # PyTorch allows one at a time in a process, whatever pipelines there are
WARM_UPS = 2  # runs before a graph is recorded, in which libraries load kernels and take their workspaces


def checked_device(name: str | None) -> str:
    """A device, or the best one. Raises ValueError for one that PyTorch does not know, was not built for, or does not find."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).add(1).item()
    except Exception as error:  # each kind of device fails in its own way
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"device {name} cannot be used ({reason}); give another, such as cpu") from error
    return name


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has arithmetic in bfloat16: GPUs before NVIDIA's Ampere emulate it, slowly and in more memory."""
    return device.type != "cuda" or bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def free_bytes(device: torch.device, share: float = FREE_SHARE) -> int | None:
    """What may be taken on a GPU: most of what is free there, and of what PyTorch holds unused. None: not known.

    share: of these, to take.
    """
    backend = getattr(torch, device.type, None)  # such as torch.cuda
    if not hasattr(backend, "mem_get_info"):
        return None
    try:
        free = backend.mem_get_info(device)[0]
    except RuntimeError:  # some GPUs of Intel cannot tell
        return None
    if hasattr(backend, "memory_reserved"):
        free += backend.memory_reserved(device) - backend.memory_allocated(device)
    return int(share * free)


class GraphRecorder:
    """Records what a function launches on a GPU, to launch it again in one call: `torch.cuda.CUDAGraph`.

    All graphs share their memory, which is free again when the last one is. So what one gives lasts until another one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Returns what launches the graph, and the tensor that it then writes. run: must neither read numbers of tensors nor
        copy from or to the CPU; all that it reads must stay where it is as long as the graph is used."""
        graph, alive = torch.cuda.CUDAGraph(), next(iter(self._graphs), None)
        with ONE_RECORDING, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(WARM_UPS):
                        run()
                # A pool whose graphs are all gone takes no new one. Another thread may go on allocating meanwhile.
                pool = None if alive is None else alive.pool()
                with _first_failure(
                    torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
                ):
                    out = run()
            finally:
                torch.cuda.set_stream(current)  # PyTorch stays on the other one where recording fails
            current.wait_stream(self._stream)
        self._graphs.add(graph)
        return graph.replay, out

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Not the current one, as recording needs, and one for all, so that their memory can be shared."""
        return torch.cuda.Stream(self.device)


@contextmanager
def _first_failure(context: AbstractContextManager) -> Iterator[None]:
    """A context in which what goes wrong is raised as it is, although leaving fails because of it."""
    context.__enter__()
    try:
        yield
    except Exception:
        with suppress(Exception):
            context.__exit__(None, None, None)
        raise
    context.__exit__(None, None, None)


def graph_recorder(device: torch.device) -> Record | None:
    """None: the device records no graphs."""
    return GraphRecorder(device) if device.type == "cuda" else None
