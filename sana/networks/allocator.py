"""The allocator of the C library, so that a bound on what is allocated is one on what is resident, too.

glibc keeps what is freed for what comes next. Where pieces of many sizes come and go, as bands of rows do, a process grows to
several times of what it has allocated at any time.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
BOUNDED = 2**20  # larger pieces are pages of their own, which go back when they are freed
USUAL = 2**25  # the most to which glibc itself raises that, once a piece of this size was freed

CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")  # by the person, in the environment


@contextmanager
def giving_back() -> Iterator[None]:
    """Inside, memory goes back to the system when it is freed, which takes time: pages come anew, filled with zeros.

    For all threads of the process. Where there is no glibc, or the environment tells it what to do, nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" and not any(name in os.environ for name in CHOSEN) else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    _set_thresholds(libc, BOUNDED)
    libc.malloc_trim(0)  # what was freed before
    try:
        yield
    finally:
        _set_thresholds(libc, USUAL)


def _set_thresholds(libc: ctypes.CDLL, size: int) -> None:
    libc.mallopt(M_MMAP_THRESHOLD, size)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * size)  # of the rest, as in glibc
