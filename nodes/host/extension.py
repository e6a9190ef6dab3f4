"""Functions of the host that are taught about SANA."""

import functools
from collections.abc import Callable
from types import ModuleType


def extend(module: ModuleType, name: str, extension: Callable[..., object]) -> bool:
    """Have `extension` called in the place of a function of a module, with that function ahead of its arguments.

    Returns False, and changes nothing, if the function has its extension already: the host may load the pack again.
    """
    original = getattr(module, name)
    if getattr(original, "knows_sana", False):
        return False

    @functools.wraps(original)
    def extended(*arguments: object, **named: object) -> object:
        return extension(original, *arguments, **named)

    extended.knows_sana = True
    setattr(module, name, extended)
    return True
