"""The example workflows: their files, and prompts made small enough for a test."""

import copy
import json

from tests.host.graphs import FREE_SIZE, Prompt
from tests.host.hosts import ROOT

FOLDER = ROOT / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def read(name: str) -> dict:
    """A workflow in UI format."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def models(workflow: dict) -> list[dict[str, str]]:
    """The files that the nodes of a workflow link to: name, url and directory."""
    return [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]


def shrunk(prompt: Prompt, *, side: int, steps: int | None = None) -> Prompt:
    """The same graph for small square pictures, `side` px; steps None: as in the workflow."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "EmptySanaLatentImage":
            inputs |= {"size": FREE_SIZE, "width": side, "height": side}
        elif node["class_type"] == "ImageScale" and isinstance(inputs["width"], int):
            inputs |= {"width": side, "height": side}
        elif node["class_type"] == "ImageScaleToTotalPixels":
            inputs["megapixels"] = (side / 1024) ** 2
        if steps is not None and node["class_type"] == "SanaCompareSettings":
            inputs["steps"] = ", ".join(str(steps + place) for place, _ in enumerate(inputs["steps"].split(",")))
        elif steps is not None and isinstance(inputs.get("steps"), int):
            inputs["steps"] = steps
        if steps is not None and node["class_type"] == "SanaPromptEnhancer":
            inputs["max_tokens"] = 8
        if steps is not None and node["class_type"] == "SanaTrainLora":
            inputs["prompt"] = inputs["prompt"].splitlines()[0]  # the others are drawn as this one is
    return prompt


def of_kind(prompt: Prompt, kind: str) -> list[str]:
    """The ids of the nodes of one type."""
    return [name for name, node in prompt.items() if node["class_type"] == kind]


def plain(prompt: Prompt) -> Prompt:
    """What of a prompt decides what is drawn."""
    return {name: {part: node[part] for part in ("class_type", "inputs")} for name, node in prompt.items()}


def without_options(nodes: dict[str, dict], names: set[str]) -> dict[str, dict]:
    """What a server tells of its nodes if these are in none of its lists."""

    def rest(value: object) -> object:
        if isinstance(value, dict):
            return {key: rest(part) for key, part in value.items()}
        return [rest(part) for part in value if str(part) not in names] if isinstance(value, list) else value

    return {name: {**node, "input": rest(node["input"])} for name, node in nodes.items()}
