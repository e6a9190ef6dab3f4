"""Libraries that break down with what is no `Exception`. It would end the thread that runs the host's queue."""

import functools

from comfy.model_management import InterruptProcessingException
from comfy_api.latest import io

PASSED = (Exception, InterruptProcessingException, KeyboardInterrupt)  # each has its meaning for the host


def contained(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node itself, whose `execute` now raises RuntimeError where a library panics or tries to end the program."""
    execute = node.execute.__func__

    @functools.wraps(execute)
    def execute_contained(cls: type[io.ComfyNode], **inputs: object) -> io.NodeOutput:
        try:
            return execute(cls, **inputs)
        except PASSED:
            raise
        except BaseException as error:
            reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            raise RuntimeError(f"a library broke down ({reason}); a file may be damaged: download it again") from error

    node.execute = classmethod(execute_contained)
    return node
