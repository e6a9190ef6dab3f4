"""Packs whose nodes have ids of ours: which are in use, and prompts that were made for theirs.

ComfyUI_ExtraModels, the first home of SANA, has three: SanaCheckpointLoader, EmptySanaLatentImage and GemmaTextEncode. The
host has one node of each id, that of the pack which it loads last. `js/old_graphs.js` translates workflows of such packs. A
prompt in API format is for programs, which shall not get another picture than they asked for: it is refused in one sentence.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

import execution
from aiohttp import web
from server import PromptServer

import nodes

from .extension import extend

log = logging.getLogger(__name__)

OURS = "ComfyUI-Sana"
CATEGORY = "SANA/"  # the beginning of that of every node of ours
OLD_INPUTS = {"SanaCheckpointLoader": ("ckpt_name", "model"), "GemmaTextEncode": ("GEMMA", "clip")}  # theirs, and ours

Verdict = tuple[bool, dict[str, object] | None, list[str], dict[str, object]]


def tell_of_other_packs(ids: Sequence[str]) -> None:
    """Say in the log which other packs have nodes with these ids of ours, and whose are in use: of packs that are loaded already
    at once, of others when the server starts."""
    _tell(ids, ours_win=True)  # the host registers ours next
    app = getattr(getattr(PromptServer, "instance", None), "app", None)
    if app is None or app.frozen:
        return

    async def tell_at_start(app: web.Application) -> None:
        _tell(ids, ours_win=False)

    app.on_startup.append(tell_at_start)


def _tell(ids: Sequence[str], *, ours_win: bool) -> None:
    shared: dict[str, list[str]] = {}
    for name in sorted(ids):
        node = nodes.NODE_CLASS_MAPPINGS.get(name)
        if node is not None and not _is_ours(node):
            shared.setdefault(getattr(node, "RELATIVE_PYTHON_MODULE", node.__module__), []).append(name)
    for pack, names in shared.items():
        log.warning(
            f"{pack} and {OURS} both have nodes called {', '.join(names)}, and those of {OURS if ours_win else pack} are in use: "
            "disable one of the two packs, or workflows of the other do not run"
        )


def _is_ours(node: type) -> bool:
    return str(getattr(node, "CATEGORY", "")).startswith(CATEGORY)


def refuse_old_prompts() -> None:
    """Have the host refuse prompts in API format that were made for ComfyUI_ExtraModels, where our nodes are in use."""
    extend(execution, "validate_prompt", _validate_prompt)


async def _validate_prompt(
    original: Callable[..., Awaitable[Verdict]], prompt_id: str, prompt: Mapping[str, object], *more: object
) -> Verdict:
    sentence = _old_prompt(prompt)
    if sentence is None:
        return await original(prompt_id, prompt, *more)
    log.error(sentence)
    return False, {"type": "prompt_of_another_pack", "message": sentence, "details": "", "extra_info": {}}, [], {}


def _old_prompt(prompt: Mapping[str, object]) -> str | None:
    """What to say about a prompt with an input of the other pack; None if it has none."""
    for name, node in prompt.items():
        kind = node.get("class_type") if isinstance(node, Mapping) else None
        theirs, ours = OLD_INPUTS.get(kind, (None, None)) if isinstance(kind, str) else (None, None)
        inputs = node.get("inputs") if theirs else None
        if isinstance(inputs, Mapping) and theirs in inputs and _is_ours(nodes.NODE_CLASS_MAPPINGS.get(kind, object)):
            return (
                f"node {name}, {kind}, has the input {theirs} of ComfyUI_ExtraModels, where that of ComfyUI-Sana has {ours}: open the "
                "workflow in ComfyUI, which translates it, and export it for the API again"
            )
    return None
