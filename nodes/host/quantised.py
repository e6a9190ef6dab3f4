"""Files with matrices quantised as the host does it: packed numbers, and beside them their scales and the name of their format."""

from collections.abc import Mapping
from dataclasses import replace

import comfy.utils
from torch import Tensor

from ...sana.checkpoints.files import CheckpointError, TensorFile
from ...sana.checkpoints.filling import check_tensors
from ...sana.checkpoints.formats import BITSANDBYTES, COMFY, COMFY_LAYER, COMFY_MODEL


def with_formats(file: TensorFile) -> TensorFile:
    """The file with a format beside every quantised matrix, also if it tells them in its header or as files for older hosts do."""
    tensors = dict(file.tensors)  # a copy for the host to take apart
    marks = [name for name in tensors if name.endswith("." + COMFY_MODEL)]
    for prefix in ("", *(name.removesuffix(COMFY_MODEL) for name in marks)):
        tensors, _ = comfy.utils.convert_old_quants(tensors, prefix, metadata={} if prefix else file.metadata)
    return replace(file, tensors=tensors)


def check_quantised(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> None:
    """`check_tensors` for tensors with quantised matrices or without: the shapes of packed ones are the host's to know.

    Raises CheckpointError also for scales of an unknown format, which the host would leave out.
    """
    layers = [key.removesuffix(COMFY_LAYER) for key in tensors if key.endswith(COMFY_LAYER)]
    beside = {layer + suffix for layer in layers for suffix in (COMFY_LAYER, *COMFY.companions)}
    plain = {key: tensor for key, tensor in tensors.items() if key not in beside}
    unknown = next((key for key in sorted(plain) if key.endswith((*COMFY.companions, *BITSANDBYTES.marks))), None)
    if unknown is not None:
        raise CheckpointError(
            f"{name} has the scale {unknown}, and nothing in it says in which format; use a file with the formats of ComfyUI, or "
            "one that is not quantised"
        )
    matrices = {f"{layer}.weight" for layer in layers} & expected.keys() & plain.keys()
    check_tensors({**expected, **{key: plain[key] for key in matrices}}, plain, name)
