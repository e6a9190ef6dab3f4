"""Programs of others that convert workflows to the format of the API, and one that checks what they make of them.

Their wheels are downloaded for tests only; nothing of them is part of this project. comfy-cli (GPL-3.0) is the official command
line of ComfyUI, comfyui-autograph and comfy-lint are under the MIT licence. None is installed, since comfy-cli brings two dozen
packages that its converter has no use for. Standard library only, but for what the functions import.
"""

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / ".venv" / "converters"
GROWING = "COMFY_AUTOGROW_V3"  # type of an input of which there may be any number, as "images.image0"
WHEELS = {  # versions and SHA-256
    "comfy-cli": ("1.23.0", "3cd4bf80dd93b759e910fa825951c154781b8b95e526da59155ab96656483b31"),
    "pathspec": ("1.1.1", "a00ce642f577bf7f473932318056212bc4f8bfdf53128c78bbd5af0b9b20b189"),  # for comfy-cli
    "comfyui-autograph": ("2.3.0", "a5f1942d480f2eef0b4d8f44df83a3e54b9aab86413ae6eeed3202bdd1f2b129"),
    "comfy-lint": ("0.1.0", "e96667dc7e2f2c69c2720f7e74737a44adb9bba3c67dd01ab56019549c31f562"),
}


def comfy_cli(workflow: dict, nodes: dict[str, dict]) -> dict[str, dict]:
    """nodes: what a server tells of its nodes, at /object_info."""
    return _module("comfy_cli.workflow_to_api").convert_ui_to_api(workflow, nodes)


def autograph(workflow: dict, nodes: dict[str, dict]) -> dict[str, dict]:
    return dict(_module("autograph").convert(workflow, node_info=nodes))


def complaints(prompt: dict[str, dict], nodes: dict[str, dict]) -> list[tuple[str, object]]:
    """What comfy-lint has to say of a prompt: its rule and the value in question. It does not know inputs of any number, which
    are left out.
    """
    known, prompt = dict(nodes), copy.deepcopy(prompt)
    for node in prompt.values():
        name, inputs = node["class_type"], node["inputs"]
        given = known[name]["input"]
        growing = {key for part in given.values() for key, kind in part.items() if kind[0] == GROWING}
        required = {key: kind for key, kind in given.get("required", {}).items() if key not in growing}
        known[name] = {**known[name], "input": {**given, "required": required}}
        node["inputs"] = {key: value for key, value in inputs.items() if key.split(".")[0] not in growing}
    schema = _module("comfy_lint.schema").normalize(known)
    found = _module("comfy_lint").lint_workflow(prompt, schema)
    return [(entry.rule, prompt[entry.node_id]["inputs"].get(entry.field)) for entry in found]


CONVERTERS = (comfy_cli, autograph)


def _module(name: str) -> ModuleType:
    with _importable():
        return importlib.import_module(name)


@contextmanager
def _importable() -> Iterator[None]:
    sys.path.append(str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
