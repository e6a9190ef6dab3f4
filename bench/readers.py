"""The package's own entries, by what a file is read as, for inputs that may be anything.

What an entry prints or raises is what a person would see: commands run as the shell runs them, in this process.
"""

import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import sentencepiece  # noqa: F401 - the package imports both late, which the first input should not be charged with
import tokenizers  # noqa: F401

from sana.__main__ import main as shell
from sana.checkpoints.adapters import prepare, read_settings
from sana.checkpoints.autoencoder import load_autoencoder
from sana.checkpoints.controlnet import load_controlnet
from sana.checkpoints.files import read_tensors, tensor_names
from sana.checkpoints.text_encoder import load_text_encoder
from sana.checkpoints.transformer import load_transformer
from sana.images import on_white, read_picture, read_size
from sana.jobs import read_record

from .inputs.originals import Damaged

PROMPT = "a red circle " + "a" * 40 + "!"
INSTRUCTION = "Draw: "  # the official one takes a third of the time
SMALL = (
    *("--height", 32, "--width", 32, "--steps", 1, "--guidance-scale", 1, "--device", "cpu"),
    *("--instruction", INSTRUCTION),
)

Call = Callable[[], object]
Reader = Callable[[Path, Path], Mapping[str, Call]]  # of a path, with the originals: its entries by name


class Printed(Exception):
    """What the shell printed as an error."""


def run_shell(*arguments: object) -> None:
    """The command in this process. Raises Printed with what it prints as an error."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = shell([str(argument) for argument in arguments])
    if code:
        raise Printed(errors.getvalue().rpartition("error: ")[2].removesuffix("\n"))


def _checkpoint(load: Callable[[Path], object]) -> Reader:
    return lambda path, originals: {
        "info": lambda: run_shell("info", path),
        "load": lambda: load(path),
        "convert": lambda: run_shell("convert", path, path.parent / "converted.safetensors"),
        "names": lambda: tensor_names(path),
    }


def _text_encoder(path: Path) -> object:
    encoder = load_text_encoder(path)
    return encoder([PROMPT], INSTRUCTION), encoder([PROMPT], None), encoder.count([PROMPT], None)


def _pipeline(path: Path, originals: Path) -> Mapping[str, Call]:
    return {"info": lambda: run_shell("info", path), "generate": lambda: _generate(path, PROMPT)}


def _generate(model: Path, *arguments: object) -> object:
    out = Path(tempfile.mkdtemp()) / "out.png"
    try:
        return run_shell("generate", *arguments, "--out", out, "--model", model, *SMALL)
    finally:
        shutil.rmtree(out.parent)


def _image(path: Path, originals: Path) -> Mapping[str, Call]:
    return {
        "read": lambda: on_white(read_picture(path)),
        "size": lambda: read_size(path),
        "generate": lambda: _generate(originals / "model", "a", "--image", path),
    }


def _mask(path: Path, originals: Path) -> Mapping[str, Call]:
    image = originals / "image.png"
    return {"generate": lambda: _generate(originals / "model", "a", "--image", image, "--mask", path)}


def _record(path: Path, originals: Path) -> Mapping[str, Call]:
    arguments = ("generate", "a", "--out", path, "--resume", "--model", originals / "model", *SMALL)
    return {"record": lambda: read_record(path), "resume": lambda: run_shell(*arguments)}


def _prompts(path: Path, originals: Path) -> Mapping[str, Call]:
    return {"generate": lambda: _generate(originals / "model", "--prompts", path)}


def _lora(path: Path, originals: Path) -> Mapping[str, Call]:
    def load() -> object:
        file = read_tensors(path)
        return prepare(file.tensors, read_settings(file.metadata, path))

    return {"info": lambda: run_shell("info", path), "load": load}


READERS: dict[str, Reader] = {
    "transformer": _checkpoint(load_transformer),
    "autoencoder": _checkpoint(load_autoencoder),
    "controlnet": _checkpoint(load_controlnet),
    "text_encoder": _checkpoint(_text_encoder),
    "pipeline": _pipeline,
    "lora": _lora,
    "image": _image,
    "mask": _mask,
    "record": _record,
    "prompts": _prompts,
}


def entries(damaged: Damaged, originals: Path) -> Mapping[str, Call]:
    """What reads an input, by name."""
    return READERS[damaged.part](damaged.path, originals)
