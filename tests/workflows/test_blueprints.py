"""The blueprints in subgraphs/: how the user interface offers them, and what they draw."""

import json

import pytest
from playwright.sync_api import Browser

from bench.scene_reader import read
from tests.browser.frontend import Frontend, open_page
from tests.host.graphs import DEMO, FREE_SIZE, Prompt
from tests.host.server import Server
from tests.workflows import blueprints, graph

TEXT_TO_IMAGE = "Text to image (SANA)"
# Beside the one node on the canvas: what saves its picture, and what gives it one if it takes any.
ATTACH = """() => {
    const [node] = app.graph.nodes
    const add = type => { const made = LiteGraph.createNode(type); app.graph.add(made); return made }
    node.connect(0, add("SaveImage"), 0)
    const image = node.inputs.findIndex(input => input.name === "image")
    if (image < 0) return
    const load = add("LoadImage")
    load.widgets[0].value = "example.png"
    load.connect(0, node, image)
    const mask = node.inputs.findIndex(input => input.name === "mask")
    if (mask >= 0) load.connect(1, node, mask)
}"""
SET = """values => {
    const node = app.graph.nodes.find(node => node.isSubgraphNode?.())
    for (const [name, value] of Object.entries(values)) node.widgets.find(widget => widget.name === name).value = value
}"""


def drawn(prompt: Prompt) -> tuple:
    """What the picture that is saved comes from, without the names of the nodes."""

    def whole(name: str) -> tuple:
        inputs = prompt[name]["inputs"].items()
        parts = {key: (whole(value[0]), value[1]) if isinstance(value, list) else value for key, value in inputs}
        return prompt[name]["class_type"], parts

    (saved,) = graph.of_kind(prompt, "SaveImage")
    source, output = prompt[saved]["inputs"]["images"]
    return whole(source), output


def add_by_search(page: Frontend, name: str) -> None:
    """As a person does: a double click beside all nodes, the name, and Enter."""
    page.page.evaluate("() => app.graph.clear()")
    page.page.mouse.dblclick(900, 650)
    page.page.keyboard.type(name)
    page.page.get_by_text(name, exact=True).first.wait_for()
    page.page.keyboard.press("Enter")
    page.page.wait_for_function("name => app.graph.nodes.some(node => node.title === name)", arg=name)


def test_each_draws_as_its_workflow_and_is_found_by_its_name(browser: Browser, server: Server) -> None:
    assert {path.stem for path in blueprints.FOLDER.glob("*.json")} == {*blueprints.BLUEPRINTS}
    with open_page(browser, server) as page:
        page.open()
        for name, blueprint in blueprints.BLUEPRINTS.items():
            page.load(graph.read(blueprint.workflow))
            wanted = drawn(page.prompt())
            page.load(json.loads((blueprints.FOLDER / f"{name}.json").read_text(encoding="utf-8")))
            page.page.evaluate(ATTACH)
            assert drawn(page.prompt()) == wanted, name
        add_by_search(page, TEXT_TO_IMAGE)
        page.page.evaluate(ATTACH)
        files = {"model": DEMO, "text_encoder": "auto", "vae": "auto", "cfg": 2.0}
        size = {"size": FREE_SIZE, "width": 256, "height": 256}
        text = "a red circle left of a blue square on a white background"
        page.page.evaluate(SET, {**files, **size, "prompt": text, "steps": 12})
        run = server.queue(page.prompt())
        assert run.failure is None and not page.exceptions
    scene = read(server.images(run)[0])
    left, right = sorted(scene.things, key=lambda thing: thing.box[0])
    assert (left.colour, left.shape, right.colour, right.shape) == ("red", "circle", "blue", "square")


@pytest.mark.parametrize("name", blueprints.BLUEPRINTS)
def test_each_tells_what_it_is_for(name: str) -> None:
    """In the list of nodes and in its search; and inside it names its files with their addresses, which are then offered."""
    content = json.loads((blueprints.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    (node,), (subgraph,) = content["nodes"], content["definitions"]["subgraphs"]
    blueprint = blueprints.BLUEPRINTS[name]
    assert node["title"] == subgraph["name"] == name and node["type"] == subgraph["id"]
    assert subgraph["category"] == "SANA" and content["extra"] == {
        "BlueprintDescription": blueprint.description,
        "BlueprintSearchAliases": list(blueprint.aliases),
    }
    files = graph.models(subgraph)
    assert files == graph.models(graph.read(blueprint.workflow)) and len(files) == 3
    assert [value for value in node["widgets_values"] if value in {file["name"] for file in files}] == [
        file["name"] for file in files
    ]
