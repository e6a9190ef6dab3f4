"""Ctrl-C while a command is still imported: one line and exit code 130, as later, instead of a traceback.

The package imports this first, ahead of PyTorch. In a program that is no command of this project it changes nothing.
Standard library only: the two commands that need no package run this file.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # exit code after Ctrl-C
MODULES = ("sana", "sana.training", "bench")  # commands: python -m NAME
SCRIPT = "sana"  # the installed command


def stop(signal_number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process at once: there is nothing yet to clean up, and an error would have to find its way out of an import."""
    os.write(2, b"\nStopped.\n")
    os._exit(INTERRUPTED)


def expect() -> None:
    """From now on Ctrl-C stops the process quietly. A Ctrl-C that something else handles, or that is ignored, stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


def begin() -> None:
    """The command begins: from now on Ctrl-C is a KeyboardInterrupt, as ever."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def postponed() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C is only noted, and the function given says so; the second is a KeyboardInterrupt."""
    seen = False

    def note(signal_number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)


def is_command() -> bool:
    """Whether this process was started as a command of this project. Python calls itself "-m" until it has found a module."""
    if __name__ != "sana.interruption":  # within a host, whose process it is
        return False
    program = next(iter(getattr(sys, "argv", ())), "")  # a program that embeds Python may have none
    if program == "-m":
        words = iter(sys.orig_argv)
        return "-m" in words and next(words, "") in MODULES
    return Path(program).stem == SCRIPT


if is_command():
    expect()
