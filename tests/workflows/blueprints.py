"""Makes subgraphs/<name>.json, the blueprints that the user interface lists among its nodes: python -m tests.workflows.blueprints

Each is a workflow without what loads and saves pictures, made into one node by the user interface itself, with the widgets that
people change most outside. Needs the environment of `python3 tests`: .venv/tests/bin/python.
"""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tomllib

from tests.browser.frontend import Frontend, launch, open_page
from tests.host.hosts import ROOT
from tests.host.server import Servers
from tests.workflows import graph

FOLDER = ROOT / "subgraphs"
OUTSIDE = ("LoadImage", "SaveImage", "MarkdownNote")  # nodes of a workflow that stay out of its blueprint
FILES = (
    ("SanaCheckpointLoader", 0, "model"),
    ("SanaCheckpointLoader", 0, "text_encoder"),
    ("SanaCheckpointLoader", 0, "vae"),
)
SIZE = tuple(("EmptySanaLatentImage", 0, name) for name in ("size", "width", "height", "batch_size"))
SAMPLER = tuple(("FlowDPMSampler", 0, name) for name in ("seed", "steps", "cfg"))
PROMPT, NEGATIVE = ("GemmaTextEncode", 0, "text"), ("GemmaTextEncode", 1, "text")
NAMES = {PROMPT: "prompt", NEGATIVE: "negative_prompt"}  # outside, of widgets with another name inside


@dataclass(frozen=True)
class Blueprint:
    workflow: str
    description: str
    aliases: tuple[str, ...]  # words that people search for
    widgets: tuple[tuple[str, int, str], ...]  # type of a node, which of that type, and the widget


BLUEPRINTS = {
    "Text to image (SANA)": Blueprint(
        "sana_1k_text_to_image",
        "Draws a picture after a prompt with a SANA or SANA-1.5 model.",
        ("sana", "text to image", "txt2img"),
        (PROMPT, NEGATIVE, *SIZE, *SAMPLER, *FILES),
    ),
    "Text to image (SANA-Sprint)": Blueprint(
        "sana_sprint_text_to_image",
        "Draws a picture after a prompt in 1 to 4 steps with a SANA-Sprint model.",
        ("sana", "sprint", "few steps", "text to image", "txt2img"),
        (PROMPT, *SIZE, ("SCMSampler", 0, "seed"), ("SCMScheduler", 0, "steps"), ("SCMSampler", 0, "guidance"), *FILES),
    ),
    "Image to image (SANA)": Blueprint(
        "sana_img2img",
        "Draws a picture anew after a prompt; denoise says how much of it may change.",
        ("sana", "image to image", "img2img", "restyle"),
        (PROMPT, NEGATIVE, ("FlowDPMSampler", 0, "denoise"), *SAMPLER, *FILES),
    ),
    "Image edit (SANA)": Blueprint(
        "sana_inpainting",
        "Draws the masked part of a picture anew after a prompt and leaves the rest as it is.",
        ("sana", "image edit", "inpaint", "inpainting"),
        (PROMPT, NEGATIVE, ("FlowDPMSampler", 0, "denoise"), *SAMPLER, *FILES),
    ),
}
# Encloses all nodes and groups but those of OUTSIDE, and gives widgets an input. Returns the new node and the graph inside, as
# they are saved. The user interface adds an input for a seed by itself, which nothing reads once ours is connected.
ENCLOSE = """([outside, widgets]) => {
    const kept = app.graph.nodes.filter(node => !outside.includes(node.type))
    const left = app.graph.nodes.filter(node => outside.includes(node.type))
    for (const group of app.graph.groups) group.recomputeInsideNodes()
    const groups = app.graph.groups.filter(group => !left.some(node => group.children.has(node)))
    const {node, subgraph} = app.graph.convertToSubgraph(new Set([...kept, ...groups]))
    for (const [type, index, name, label] of widgets) {
        const inner = subgraph.nodes.filter(other => other.type === type).sort((a, b) => a.id - b.id)[index]
        const slot = inner.getSlotFromWidget(inner.widgets.find(widget => widget.name === name))
        subgraph.addInput(label, slot.type).connect(slot, inner)
    }
    for (const input of [...subgraph.inputs]) if (!input.linkIds.length) subgraph.removeInput(input)
    subgraph.inputNode.arrange()
    subgraph.outputNode.arrange()
    node.setSize([400, node.computeSize()[1] + 160])  // with room for prompts
    const saved = JSON.parse(JSON.stringify(app.rootGraph.serialize()))
    return {node: saved.nodes.find(other => other.type === subgraph.id), subgraph: saved.definitions.subgraphs[0]}
}"""


def make(page: Frontend, name: str) -> dict:
    """The content of a file, the same every time."""
    blueprint = BLUEPRINTS[name]
    page.load(graph.read(blueprint.workflow))
    widgets = [(*place, NAMES.get(place, place[-1])) for place in blueprint.widgets]
    found = page.page.evaluate(ENCLOSE, [OUTSIDE, widgets])
    node, subgraph = found["node"], found["subgraph"]
    own = {subgraph["id"]: str(uuid.uuid5(uuid.NAMESPACE_URL, name))}
    for slot in (*subgraph["inputs"], *subgraph["outputs"]):
        own[slot["id"]] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{name}/{slot['name']}"))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    node |= {"id": 1, "pos": [0, 0], "order": 0, "title": name}
    node["properties"] |= {"cnr_id": "comfyui-sana", "ver": version}
    for slot in node["inputs"]:
        slot["link"] = None
    for slot in node["outputs"]:
        slot["links"] = []
    subgraph |= {"name": name, "category": "SANA", "description": blueprint.description}
    content = {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {
            "BlueprintDescription": blueprint.description,
            "BlueprintSearchAliases": list(blueprint.aliases),
        },
    }
    text = json.dumps(content)
    for random, fixed in own.items():
        text = text.replace(random, fixed)
    return json.loads(text)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder, launch() as browser:
        servers = Servers(Path(folder))
        try:
            with open_page(browser, servers()) as page:
                page.open()
                for name in BLUEPRINTS:
                    content = json.dumps(make(page, name), indent=1, ensure_ascii=False) + "\n"
                    (FOLDER / f"{name}.json").write_text(content, encoding="utf-8")
        finally:
            servers.close()


if __name__ == "__main__":
    main()
