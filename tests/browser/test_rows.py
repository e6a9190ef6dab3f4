"""Inputs are in sight where they count, and keep their values where they are not."""

from tests.browser.frontend import Frontend
from tests.browser.test_meter import WORKFLOW

PROMPT, LATENT, LOADER = "GemmaTextEncode", "EmptySanaLatentImage", "SanaCheckpointLoader"
FREE, WIDE = "width x height below", "1024 px, 16:9 (1344 x 768)"
NODE = {
    "id": 3,
    "type": LATENT,
    "pos": [100, 500],
    "size": [300, 150],
    "outputs": [{"name": "LATENT", "type": "LATENT", "links": []}],
    "widgets_values": [WIDE, 640, 512, 2],
}
GRAPH = {**WORKFLOW, "last_node_id": 3, "nodes": [*WORKFLOW["nodes"], NODE]}
IN_SIGHT = """type => {
    const node = app.canvas.graph.nodes.find(node => node.type === type)
    const hidden = widget => widget.visibility ? widget.options.hidden : widget.hidden  // newer ones count connections as well
    if (!LiteGraph.vueNodesMode) return node.widgets.filter(widget => !hidden(widget)).map(widget => widget.name)
    const text = document.querySelector(`[data-node-id="${node.id}"]`)?.innerText.split("\\n") ?? []
    return node.widgets.filter(({name}) => name.startsWith("sana_") || text.includes(name)).map(widget => widget.name)
}"""
SHAPE = """() => {
    const box = document.querySelector(".sana-shape > div")
    return box && [parseInt(box.style.width), parseInt(box.style.height)]
}"""
HEIGHTS = """() => {
    const node = app.graph.nodes.find(node => node.type === "EmptySanaLatentImage")
    return [node.size[1], node.computeSize()[1]]
}"""
RESIZE = """height => {
    const node = app.graph.nodes.find(node => node.type === "EmptySanaLatentImage")
    node.setSize([node.size[0], height])
}"""
HIDDEN = """() => app.graph.nodes.map(node => node.widgets.find(({name}) => name === "variant").hidden)"""
NEW_HIDDEN = """([type, name]) => LiteGraph.createNode(type).widgets.find(widget => widget.name === name).hidden"""
LINK = """() => {
    const text = LiteGraph.createNode("PrimitiveStringMultiline")
    app.graph.add(text)
    const node = app.graph.getNodeById(2)
    text.connect(0, node, node.inputs.findIndex(input => input.name === "custom_instruction"))
}"""


def in_sight(page: Frontend, node_type: str, **wanted: bool) -> None:
    """Waits until these inputs of a node are in sight, or are not."""

    def read() -> dict[str, bool]:
        shown = page.page.evaluate(IN_SIGHT, node_type)
        return {name: name in shown for name in wanted}

    page.wait_until(read, wanted)


def test_inputs_are_in_sight_where_they_count(opened: Frontend) -> None:
    """When a workflow is opened, after a choice, an undo, and in a subgraph; and the prompt has them all."""
    opened.load(GRAPH)
    in_sight(opened, PROMPT, text=True, instruction=True, custom_instruction=False)
    in_sight(opened, LATENT, size=True, width=False, height=False, batch_size=True)
    in_sight(opened, LOADER, model=True, variant=False)  # the demo is no released model
    inputs = {key: node["inputs"] for key, node in opened.prompt().items()}
    assert inputs["1"]["variant"] == "auto" and inputs["2"]["custom_instruction"] == ""
    assert inputs["3"] == {"size": WIDE, "width": 640, "height": 512, "batch_size": 2}

    opened.remember()
    opened.set(PROMPT, "instruction", "custom")
    opened.set(LATENT, "size", FREE)
    in_sight(opened, PROMPT, custom_instruction=True)
    in_sight(opened, LATENT, width=True, height=True, sana_shape=False)
    opened.remember()
    opened.undo()
    in_sight(opened, PROMPT, custom_instruction=False)
    in_sight(opened, LATENT, width=False, height=False, sana_shape=True)

    opened.set(LOADER, "variant", "sana-1.6b-1024px")
    in_sight(opened, LOADER, variant=True)  # what was chosen is never out of sight
    saved = {node["id"]: node for node in opened.workflow()["nodes"]}
    assert saved[3]["widgets_values"][:4] == [WIDE, 640, 512, 2] and "sana_shape" not in str(saved)
    opened.enclose(PROMPT)
    opened.enter_subgraph()
    opened.set(PROMPT, "instruction", "custom")
    in_sight(opened, PROMPT, custom_instruction=True)
    assert not opened.exceptions, opened.report()


def test_the_drawing_has_the_proportions_of_the_size(opened: Frontend) -> None:
    opened.load(GRAPH)
    for size, shape in (
        (WIDE, [48, 27]),  # 1344 x 768
        ("512 px, 9:16 (352 x 672)", [25, 48]),
        ("4096 px, 1:1 (4096 x 4096)", [48, 48]),
        (FREE, None),
    ):
        opened.set(LATENT, "size", size)
        opened.wait_until(lambda: opened.page.evaluate(SHAPE), shape)


def test_nodes_keep_the_height_that_they_were_given(opened: Frontend) -> None:
    """A node that was as low as it can be stays so. Elements have the height that they need."""
    if opened.page.evaluate("() => LiteGraph.vueNodesMode"):
        return
    opened.load({**GRAPH, "nodes": [], "links": []})
    opened.add(LATENT)
    low, least = opened.page.evaluate(HEIGHTS)
    assert low == least
    for size, given, wanted in ((WIDE, None, None), (FREE, None, low), (FREE, 400, 400), (WIDE, None, 400)):
        if given:
            opened.page.evaluate(RESIZE, given)
        opened.set(LATENT, "size", size)
        in_sight(opened, LATENT, width=size == FREE, sana_shape=size != FREE)
        height, least = opened.page.evaluate(HEIGHTS)
        assert height == (wanted or least) and (wanted or height != low)


def test_every_loader_of_a_model_hides_what_its_file_tells(frontend: Frontend) -> None:
    """Several of them await one answer of the server, and no step on the way fails, which the user interface only logs."""
    first = WORKFLOW["nodes"][0]
    loaders = [{**first, "id": number, "outputs": []} for number in (1, 2, 3)]
    frontend.open()
    frontend.load({**WORKFLOW, "nodes": loaders, "links": []})
    frontend.wait_until(lambda: frontend.page.evaluate(HIDDEN), [True] * 3)
    assert not [message for message in frontend.messages if "comfyui-sana" in message], frontend.report()


def test_a_new_node_is_arranged_before_it_is_seen(opened: Frontend) -> None:
    """At once, when it is made: not when it is looked at for the first time."""
    for node_type, name in ((PROMPT, "custom_instruction"), ("SanaPromptEnhancer", "custom_instruction")):
        assert opened.page.evaluate(NEW_HIDDEN, [node_type, name]) is True


def test_an_input_with_a_connection_stays_in_sight(opened: Frontend) -> None:
    opened.load(GRAPH)
    in_sight(opened, PROMPT, custom_instruction=False)
    opened.page.evaluate(LINK)
    in_sight(opened, PROMPT, custom_instruction=True)
