"""Errors of rows: what is raised for one becomes a sentence in its entry, and stops nothing."""

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from .manifest import Entry, as_json
from .places import PlaceError
from .rows import Row

# After it nothing can be computed on that device in the same process. Older versions of PyTorch do not tell it from others.
BREAKDOWN: type[Exception] | tuple[()] = getattr(torch, "AcceleratorError", ())
SPOKEN = (ValueError, OSError, RuntimeError)  # what is raised with a sentence
P, T = ParamSpec("P"), TypeVar("T")


def tried(do: Callable[P, T], *given: P.args, **named: P.kwargs) -> T | Exception:
    """What `do` gives, or the error that it raises. Raises PlaceError alone, which is no fault of a row.

    Where a GPU has broken down, the process ends, since every other row would fail there; it is started anew.
    """
    try:
        return do(*given, **named)
    except PlaceError:
        raise
    except BREAKDOWN:
        os._exit(1)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a row, the others are drawn
        return error


def sentence(error: Exception) -> str:
    """The first line of an error, after its kind where that does not speak for itself."""
    text = str(error).strip().split("\n")[0]
    if text and isinstance(error, SPOKEN):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def fault(row: Row, error: Exception | str, worker: str | None = None) -> Entry:
    """The entry of a row that cannot be drawn."""
    told = error if isinstance(error, str) else sentence(error)
    return Entry(row.number, row.key(), row.name, row.prompt, settings=as_json(row.settings), worker=worker, error=told)
