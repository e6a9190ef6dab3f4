"""Files with matrices quantised as the host does it: packed numbers, and beside them their scales and the name of their format."""

from collections.abc import Mapping
from dataclasses import replace

import comfy.utils
from torch import Tensor

from ...sana.checkpoints.files import CheckpointError, TensorFile
from ...sana.checkpoints.loading import BITSANDBYTES, check_tensors

FORMAT = ".comfy_quant"  # behind the name of a layer: JSON as bytes
SCALES = (".weight_scale", ".weight_scale_2", ".input_scale")
OLD_MARK = "scaled_fp8"  # of files for older hosts, which say the format once for all matrices


def with_formats(file: TensorFile) -> TensorFile:
    """The file with a format beside every quantised matrix, also if it tells them in its header or as files for older hosts do."""
    tensors = dict(file.tensors)  # a copy for the host to take apart
    marks = [name for name in tensors if name.endswith("." + OLD_MARK)]
    for prefix in ("", *(name.removesuffix(OLD_MARK) for name in marks)):
        tensors, _ = comfy.utils.convert_old_quants(tensors, prefix, metadata={} if prefix else file.metadata)
    return replace(file, tensors=tensors)


def check_quantised(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> None:
    """`check_tensors` for tensors with quantised matrices or without: the shapes of packed ones are the host's to know.

    Raises CheckpointError also for scales of an unknown format, which the host would leave out.
    """
    layers = [key.removesuffix(FORMAT) for key in tensors if key.endswith(FORMAT)]
    beside = {layer + suffix for layer in layers for suffix in (FORMAT, *SCALES)}
    plain = {key: tensor for key, tensor in tensors.items() if key not in beside}
    unknown = next((key for key in sorted(plain) if key.endswith((*SCALES, *BITSANDBYTES))), None)
    if unknown is not None:
        raise CheckpointError(
            f"{name} has the scale {unknown}, and nothing in it says in which format; use a file with the formats of ComfyUI, or "
            "one that is not quantised"
        )
    matrices = {f"{layer}.weight" for layer in layers} & expected.keys() & plain.keys()
    check_tensors({**expected, **{key: plain[key] for key in matrices}}, plain, name)
