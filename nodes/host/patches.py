"""What other nodes have put into a MODEL and SANA's blocks never call."""

import logging
from collections.abc import Callable, Iterator, Mapping

log = logging.getLogger(__name__)

OUTPUT = "attn1_output_patch"  # is given the result of self-attention
SCORES = "SelfAttentionGuidance"  # core's node that reads the scores of a softmax in the middle of a UNet

Options = Mapping[str, object]


def output_patches(options: Options) -> list[Callable[..., object]]:
    """Functions to call with the result of self-attention, and with the options.

    None beside a patch of the inputs, which SANA has no place for: there the one undoes what the other has done.
    """
    patches = options.get("patches", {})
    return [] if "attn1_patch" in patches else patches.get(OUTPUT, [])


def uncalled_patches(options: Options, depth: int) -> dict[str, list[str]]:
    """For each node the places that a transformer of `depth` blocks never calls, as they were set."""
    found: dict[str, list[str]] = {}
    for node, place in _uncalled(options, depth):
        places = found.setdefault(node, [])
        if place not in places:
            places.append(place)
    return found


def _uncalled(options: Options, depth: int) -> Iterator[tuple[str, str]]:
    called = {("attn1", "middle", 0)}
    called |= {(kind, block, i) for kind, block in (("attn1", "block"), ("dit", "double_block")) for i in range(depth)}
    outputs = output_patches(options)
    for name, patches in options.get("patches", {}).items():
        if not (name == OUTPUT and outputs):
            yield from ((owner(patch), name) for patch in patches)
    for name, replacements in options.get("patches_replace", {}).items():
        for place, patch in replacements.items():
            if (name, *place) not in called:
                yield owner(patch), " ".join(map(str, (name, *place)))
    if "rope_options" in options:
        yield "ScaleROPE", "rope_options"  # numbers without a function, and core has one node that sets them


def owner(patch: object) -> str:
    """The class or function that a patch was written in: in core mostly the id of the node."""
    return getattr(patch, "__qualname__", type(patch).__qualname__).split(".")[0]


def tell_uncalled(options: Options, depth: int, told: set[str]) -> None:
    """Warn of patches without effect, of each once; `told` remembers. Raises ValueError for `SCORES`."""
    for node, places in uncalled_patches(options, depth).items():
        if node == SCORES:
            raise ValueError(
                f"{SCORES} reads softmax scores of self-attention, which SANA's linear attention does not have; use "
                "SANA perturbed attention"
            )
        message = f"{node} sets {', '.join(places)}, which SANA's blocks never call: that has no effect"
        if message not in told:
            told.add(message)
            log.warning(message)
