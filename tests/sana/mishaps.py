"""What befalls a process from outside: it is killed in the middle of its work, or its disk is full."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sana.saving import replacing


def kill_while(work: Callable[[], object]) -> None:
    """Do work in a copy of this process, which is killed when it has done it and before anything is tidied up."""
    with killed_later(work):
        pass


@contextmanager
def killed_later(work: Callable[[], object]) -> Iterator[None]:
    """The same, and the copy lives, with its work done, until the end of the block."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
            os.write(writing, b"done")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 4) == b"done"
        yield
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def write_half(path: Path) -> None:
    """Begin to write a file, as whatever writes files does."""
    started = replacing(path)
    KEPT.append(started)
    started.__enter__().write_bytes(b"half")


KEPT: list[object] = []  # what is written in a copy of this process, which must not be tidied up there


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A real limit of the operating system, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
