"""Libraries that break down with what is no `Exception`. It would end a thread of the host, or the host itself."""

import functools
from collections.abc import Callable
from typing import TypeVar

from comfy.model_management import InterruptProcessingException
from comfy_api.latest import io

PASSED = (Exception, InterruptProcessingException, KeyboardInterrupt)  # each has its meaning for the host
Result = TypeVar("Result")


def guarded(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, which now raises RuntimeError where a library panics or tries to end the program."""

    @functools.wraps(function)
    def call(*arguments: object, **named: object) -> Result:
        try:
            return function(*arguments, **named)
        except PASSED:
            raise
        except BaseException as error:
            reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            raise RuntimeError(f"a library broke down ({reason}); a file may be damaged: download it again") from error

    return call


def contained(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node itself, whose `execute` is guarded."""
    node.execute = classmethod(guarded(node.execute.__func__))
    return node
