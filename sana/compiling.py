"""A transformer by torch.compile, whose failures become one sentence."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from .networks.memory import is_out_of_memory
from .networks.transformer import SanaTransformer
from .sampling.guidance import Velocity
from .sampling.solvers import SamplingError


def compiled_velocity(transformer: SanaTransformer) -> Velocity:
    """`transformer.velocity` by torch.compile. Raises SamplingError where that fails, at the first call or a later one."""
    run = torch.compile(transformer.velocity)

    def velocity(*inputs: object, **options: object) -> Tensor:
        try:
            return run(*inputs, **options)
        except Exception as error:  # a compiler fails in as many ways as it has parts
            if is_out_of_memory(error):
                raise
            raise SamplingError(_compiler_message(error)) from error

    return velocity


def _compiler_message(error: Exception) -> str:
    advice = "leave out --compile (in Python compiled=True): the picture is the same without"
    places = (str(Path(torch.__file__).parent), sysconfig.get_path("include"))
    for place in places:
        if " " in place:
            return f"torch.compile failed, since compilers do not find {place} with a space in its path; {advice}"
    cause = getattr(error, "inner_exception", error)  # of the compiler, inside what PyTorch says about it
    first = next((line for line in str(cause).splitlines() if line.strip()), "")
    return f"torch.compile failed ({type(cause).__name__}: {first}); {advice}"
