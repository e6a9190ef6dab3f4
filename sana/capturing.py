"""Evaluations of a transformer as graphs: what one launches is recorded, and launched again in one call.

A graph asks nothing again, neither Python nor where anything lies. So latent, modulation and texts are copied into buffers
that it reads, its result is copied out, and weights are looked for before every launch where it found them.
"""

import logging
import math
from collections.abc import Collection
from functools import partial
from itertools import chain
from threading import Lock
from weakref import ref

import torch
from torch import Tensor, nn

from .networks.adapters import Changes
from .networks.devices import Record, graph_recorder
from .networks.memory import is_out_of_memory
from .networks.onednn import PLAIN
from .networks.operations import is_watched
from .networks.packed_layers import unpacking_bytes
from .networks.transformer import WORKING_BYTES, Modulation, SanaTransformer, TextContext
from .sampling.solvers import SamplingError

BUCKET = 64  # tokens: texts are as long as the next multiple, so that prompts share graphs
MOST_GRAPHS = 6  # kept at once, those last used: a picture takes up to three, and texts of SANA have five lengths
OWN = ("torch.nn.modules.", f"{__package__}.")  # whose layers compute the same as long as their weights are the same

log = logging.getLogger(__name__)


class CapturedVelocity:
    """`SanaTransformer.velocity` by graphs, one for each size, batch, length of texts and set of identity blocks.

    It computes without them what they cannot: with gradients, autocast, a ControlNet or another option of `velocity`, in
    bands of rows, on another device, with layers that are watched or that it does not know, and where memory is short.
    Threads that call it take turns, and must share the current stream, on which a graph runs: it orders what they copy.
    """

    def __init__(self, transformer: SanaTransformer, device: torch.device) -> None:
        """device: where graphs run. Raises ValueError as `check_fast`."""
        check_fast(device)
        self.transformer, self.device = transformer, device
        self._record: Record = graph_recorder(device)
        self._graphs: dict[object, Graph] = {}  # the last used at the end
        self._too_large: set[object] = set()  # what there is no memory to record
        self._weights: list[object] = []  # that the graphs read
        self._reason = ""  # why these are not recorded
        self._lock = Lock()  # a buffer serves one evaluation at a time
        self._told: set[str] = set()

    def __call__(
        self,
        x: Tensor,
        modulation: Modulation,
        context: TextContext,
        *,
        identity_blocks: Collection[int] = (),
        **options: object,
    ) -> Tensor:
        """As `SanaTransformer.velocity`. Raises SamplingError if recording fails for another reason than memory."""
        if not options and self._suits(x):
            with self._lock:
                graph = self._graph(x, modulation, context, frozenset(identity_blocks))
                if graph is not None:
                    return graph(x, modulation, context)
        return self.transformer.velocity(x, modulation, context, identity_blocks=identity_blocks, **options)

    def release(self) -> None:
        """Give back the memory of all graphs, and hold on to no weight. They are recorded anew when they are needed."""
        self._graphs.clear()
        self._too_large.clear()
        self._weights = []

    def reserved(self) -> int:
        """Bytes that PyTorch keeps for the graphs between their launches, about: what the largest works in."""
        return max((graph.working for graph in self._graphs.values()), default=0)

    def _suits(self, x: Tensor) -> bool:
        return (
            x.device.type == self.device.type
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and self.transformer.band_rows(x.shape, x.element_size(), WORKING_BYTES) is None
        )

    def _graph(self, *inputs: object) -> "Graph | None":
        """That of such inputs; None: there is none."""
        weights = weights_read(self.transformer)
        if weights != self._weights:
            self.release()
            self._weights, self._reason = weights, reason_against(self.transformer)
        if self._reason:
            self._tell(f"Steps run as without --fast (in Python fast=True), since {self._reason}.")
            return None
        x, modulation, context, identity_blocks = inputs
        length = math.ceil(text_length(context) / BUCKET) * BUCKET
        key = (*((tensor.shape, tensor.dtype) for tensor in (x, *modulation)), x.device, length, identity_blocks)
        if key in self._too_large:
            return None
        graph = self._graphs.pop(key, None)
        if graph is None:
            while len(self._graphs) >= MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            try:
                graph = Graph(self.transformer, self._record, *inputs, length)
            except Exception as error:  # CUDA fails in as many ways as it has parts
                if not is_out_of_memory(error):
                    raise SamplingError(_recording_message(error)) from error
                self._graphs.clear()  # the step needs their memory
                self._too_large.add(key)
                self._tell("There is too little memory to record a step of this size, which runs as without --fast.")
                return None
        self._graphs[key] = graph
        return graph

    def _tell(self, message: str) -> None:
        """Once."""
        if message not in self._told:
            self._told.add(message)
            log.warning("%s", message)


class Graph:
    """One evaluation, recorded, with the buffers that it reads. length: of its texts, at least that of the context."""

    def __init__(
        self,
        transformer: SanaTransformer,
        record: Record,
        x: Tensor,
        modulation: Modulation,
        context: TextContext,
        identity_blocks: frozenset[int],
        length: int,
    ) -> None:
        batch, heads, _, width = context.keys_values[0][0].shape
        blocks = len(context.keys_values)
        with torch.inference_mode(False), torch.no_grad():  # buffers of inference mode could not be written elsewhere
            self.inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *modulation)]
            self.texts = x.new_zeros(2 * blocks, batch, length, heads, width).transpose(2, 3)
            self.mask = x.new_zeros(batch, 1, 1, length)  # to be added: 0, or -inf where no token counts
            self.positions = transformer.positions(x)  # computed on the CPU, which no graph does
            self.text: list[ref[Tensor]] = []  # the tensors that texts and mask were copied from
            self._take(x, modulation, context)
            texts = TextContext(tuple(zip(self.texts[::2], self.texts[1::2], strict=True)), self.mask)
            own_x, *rows = self.inputs
            options = {"identity_blocks": identity_blocks, "positions": self.positions}
            self.launch, self.out = record(partial(transformer.velocity, own_x, Modulation(*rows), texts, **options))
        self.working = transformer.activation_bytes(x.shape, x.element_size())
        self.working += unpacking_bytes(transformer, x.element_size())

    def __call__(self, x: Tensor, modulation: Modulation, context: TextContext) -> Tensor:
        self._take(x, modulation, context)
        self.launch()
        return self.out.clone()  # the next graph may write over it

    def _take(self, x: Tensor, modulation: Modulation, context: TextContext) -> None:
        """Copy the inputs into the buffers; the texts only if they are others than before."""
        torch._foreach_copy_(self.inputs, [x, *modulation])
        texts = [*chain.from_iterable(context.keys_values)]
        given = texts if context.mask is None else [*texts, context.mask]
        if len(given) == len(self.text) and all(known() is each for known, each in zip(self.text, given, strict=True)):
            return
        length = text_length(context)
        self.texts.zero_()  # what follows counts 0 times, which not every number takes
        torch._foreach_copy_([*self.texts[..., :length, :].unbind(0)], texts)
        self.mask.fill_(-math.inf)[..., :length].zero_()
        if context.mask is not None:
            self.mask[..., :length].masked_fill_(~context.mask, -math.inf)
        self.text = [ref(each) for each in given]


def check_fast(device: torch.device, compiled: bool = False) -> None:
    """Raises ValueError for a device that records no graphs, and beside torch.compile."""
    if graph_recorder(device) is None:
        raise ValueError(
            f"--fast (in Python fast=True) records what a step launches on a GPU by CUDA or ROCm, and the device is {device}; "
            "leave it out: the picture is the same without"
        )
    if compiled:
        raise ValueError("--fast is given with --compile (in Python fast=True with compiled=True); give one of them")


def text_length(context: TextContext) -> int:
    return context.keys_values[0][0].shape[2]


def weights_read(network: nn.Module) -> list[object]:
    """Where the weights of a network lie, with all else that decides what its layers compute: a graph of it is right as long as
    this stays the same. Asked at every step, which takes about a millisecond for 60 blocks."""
    found: list[object] = [is_watched(network)]  # by hooks of all modules there are, too
    modules = [network]
    for module in modules:
        state = vars(module)
        found += (type(module), len(state), len(state["_forward_hooks"]), len(state["_forward_pre_hooks"]))
        for tensors in (state["_parameters"], state["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None:
                    found += (tensor.data_ptr(), tensor.dtype)
        if type(module) is Changes:
            found.append(module.changes)
        modules += filter(lambda part: part is not None, state["_modules"].values())
    return found


def reason_against(network: nn.Module) -> str:
    """Why a network is not recorded: it has a layer of which `weights_read` does not tell all. Empty: it is."""
    for module in network.modules():
        kind = type(module)
        if not f"{kind.__module__}.".startswith(OWN):
            return f"layers of the class {kind.__name__} are of another package, which may change them unseen"
        if is_watched(module):
            return f"a layer of the class {kind.__name__} has a hook, which no graph calls"
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
            if type(tensor) not in PLAIN:
                return f"weights of the class {type(tensor).__name__} do not tell where they lie"
    return ""


def _recording_message(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    advice = "leave out --fast (in Python fast=True): the picture is the same without"
    return f"recording a step as a graph failed ({type(error).__name__}: {first}); {advice}"
