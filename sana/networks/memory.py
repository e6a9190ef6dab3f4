"""Going on where memory runs out: what the autoencoder could not do in as much as it took, it does in half of that."""

import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .autoencoder_layers import Decoder, Encoder
from .streaming import smaller_bound

GIB = 2**30  # bytes
# What PyTorch, cuDNN, cuBLAS and Metal say for want of memory, some of them in a plain RuntimeError.
MEMORY_MESSAGES = (
    "out of memory",
    "unable to find an engine",
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "invalid buffer size",
)

log = logging.getLogger(__name__)

Run = Callable[[Tensor, int | None], Tensor]  # (input, max_bytes) -> output


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch or a library below it says that there is no memory left."""
    return any(message in str(error).lower() for message in MEMORY_MESSAGES)


def run_within_memory(
    run: Run,
    network: Encoder | Decoder,
    parts: Iterable[Tensor],
    dtype: torch.dtype,
    max_bytes: int | None,
    *,
    is_scarce: Callable[[Exception], bool] = is_out_of_memory,
    make_room: Callable[[], object] = lambda: None,
) -> Iterator[Tensor]:
    """`run(part, max_bytes)` of each part, which `network` processes in dtype; max_bytes None: all at once.

    After running out of memory, the same part again and all others within half as much.
    is_scarce: whether an error tells of that. make_room: called before another try.
    Raises what `run` raises for another reason, or where there is no less.
    """
    for part in parts:
        while True:
            try:
                result = run(part, max_bytes)
                break
            except Exception as error:  # of several kinds, where a host has its own
                less = smaller_bound(network, part.shape, dtype, max_bytes) if is_scarce(error) else None
                if less is None:
                    raise
            max_bytes = less
            log.warning("Out of memory in the autoencoder; going on within %.1f GiB.", max_bytes / GIB)
            make_room()  # here, where no error holds on to what was computed
        yield result
