"""Numbers that a file tells of a network, held to what a network can have before anything is built of them."""

from collections.abc import Iterable, Mapping
from dataclasses import fields

from ..config import HEAD_WIDTH, TransformerConfig
from .files import CheckpointError

LARGEST = 2**20  # of sizes; three of them multiplied still count bytes in 64 bits. The largest of a release is 256,000
MOST_PARTS = 256  # of blocks or stages; the largest release has 60


def whole(values: Mapping[str, object], key: str, place: str, largest: int = LARGEST) -> int | None:
    """A whole number from 1 to largest; None: there is none. place: where it stands, for errors.

    Raises CheckpointError for anything else, also for `true`, which Python counts as 1.
    """
    value = values.get(key)
    if value is None or (type(value) is int and 0 < value <= largest):
        return value
    raise _impossible(key, value, place)


def number(values: Mapping[str, object], key: str, place: str) -> float | None:
    """A finite number above 0; None: there is none. As `whole`."""
    value = values.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value <= LARGEST:
        raise _impossible(key, value, place)
    return float(value)


def _impossible(key: str, value: object, place: str) -> CheckpointError:
    text = repr(value)
    shown = text if len(text) < 50 else f"{text[:50]}..."
    return CheckpointError(f"{place} has {key} {shown}, which no network has; take the original file")


def beside(name: str) -> str:
    """What errors call the configuration beside a file of this name."""
    return f"the config.json of {name}"


def count_parts(names: Iterable[str], root: str, name: str, most: int = MOST_PARTS) -> int:
    """How many parts of a network stand below a root, as root.0, root.1 and so on. name: of the file, for errors.

    Gaps count: what is missing there is for `check_tensors` to say. Raises CheckpointError for more than `most`.
    """
    start = f"{root}."
    found = {part.removeprefix(start).split(".")[0] for part in names if part.startswith(start)}
    known = {str(i): i for i in range(most)}
    wrong = next((part for part in sorted(found) if part not in known), None)
    if wrong is not None:
        raise CheckpointError(
            f"{name} has {start}{wrong[:30]}, and no model goes beyond {start}{most - 1}; it is another model"
        )
    return 1 + max((known[part] for part in found), default=-1)


def check_transformer(config: TransformerConfig, name: str) -> None:
    """Raises CheckpointError for sizes that no SANA transformer has. name: of the file."""
    for row in fields(config):
        value = getattr(config, row.name)
        least = 0 if row.name == "control_blocks" else 1
        largest = MOST_PARTS if row.name in ("control_blocks", "depth") else LARGEST
        if (type(value) is int and not least <= value <= largest) or (
            type(value) is float and not 0 < value <= LARGEST
        ):
            raise _impossible(row.name, value, name)
    if config.hidden_size % HEAD_WIDTH:
        raise CheckpointError(
            f"{name} has width {config.hidden_size}, which heads of {HEAD_WIDTH} do not divide; it is another model"
        )


def check_heads(width: int, heads: int, name: str) -> None:
    """Raises CheckpointError unless so many heads divide a width. name: of the file."""
    if width % heads:
        raise CheckpointError(f"{name} has width {width}, which {heads} heads do not divide; take the original file")
