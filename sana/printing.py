"""What commands print arrives whole, whichever letters the locale has."""

import io
import sys


def print_every_letter() -> None:
    """From now on standard output takes every text.

    Into a file or a pipe it goes in UTF-8, as `--prompts` reads it. A terminal, which knows its own encoding alone, gets \\u1234
    for what that lacks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a program without a window has none, and a notebook one of its own
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="backslashreplace")
