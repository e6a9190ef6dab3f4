"""SANA prompt counts its tokens while one types, and asks the server one question at a time."""

import json

from playwright.sync_api import Route

from sana.text.styles import STYLES
from tests.browser.frontend import Frontend

ROUTE = "**/sana/tokens"
WORDS = [f"word{k}" for k in range(400)]
WORKFLOW = {
    "version": 0.4,
    "last_node_id": 2,
    "last_link_id": 1,
    "links": [[1, 1, 1, 2, 0, "CLIP"]],
    "nodes": [
        {
            "id": 1,
            "type": "SanaCheckpointLoader",
            "pos": [100, 200],
            "size": [300, 200],
            "outputs": [
                {"name": "MODEL", "type": "MODEL", "links": []},
                {"name": "CLIP", "type": "CLIP", "links": [1]},
                {"name": "VAE", "type": "VAE", "links": []},
            ],
            "widgets_values": ["demo", "auto", "auto", "auto", "auto"],
        },
        {
            "id": 2,
            "type": "GemmaTextEncode",
            "pos": [500, 200],
            "size": [400, 300],
            "inputs": [{"name": "clip", "type": "CLIP", "link": 1}],
            "outputs": [{"name": "CONDITIONING", "type": "CONDITIONING", "links": []}],
            "widgets_values": ["a red circle", "none", ""],
        },
    ],
}
CUT = "() => app.canvas.graph.nodes.find(node => node.type === 'GemmaTextEncode').disconnectInput(0)"
COPY = """() => {
    app.canvas.selectItems([app.graph.getNodeById(2)])
    app.canvas.copyToClipboard()
    app.canvas.pasteFromClipboard({connectInputs: true})
}"""
LINK = """([type, name]) => {
    const text = LiteGraph.createNode("PrimitiveString")
    app.graph.add(text)
    const node = app.graph.nodes.find(node => node.type === type), slot = node.inputs.findIndex(input => input.name === name)
    node.inputs[slot].type = "STRING"  // lists take no texts, but other nodes give lists
    text.connect(0, node, slot)
}"""
# Connects a new node to the prompt, and the loader to that if it takes CLIP.
BETWEEN = """type => {
    const [loader, prompt] = [1, 2].map(id => app.graph.getNodeById(id)), node = LiteGraph.createNode(type)
    app.graph.add(node)
    const input = node.inputs?.findIndex(input => input.type === "CLIP") ?? -1
    if (input >= 0) loader.connect(1, node, input)
    node.connect(node.outputs.findIndex(output => output.type === "CLIP"), prompt, 0)
}"""
NOTICED_MS = (
    500  # in which changes of nodes have been noticed, unless the machine is very busy; no test fails if they have not
)


def meters(page: Frontend, *texts: str) -> None:
    """Waits until these are the visible texts of all meters, in any order."""
    page.wait_until(lambda: sorted(page.page.locator(".sana-meter:visible").all_inner_texts()), sorted(texts))


def count(page: Frontend, text: str, instruction: str = "none") -> dict:
    """What the server says of a text."""
    body = {"loader": "SanaCheckpointLoader", "model": "demo", "text_encoder": "auto"}
    response = page.page.request.post(
        f"{page.server.url}/sana/tokens", data={**body, "text": text, "instruction": instruction}
    )
    return response.json()


def line(page: Frontend, text: str, instruction: str = "none") -> str:
    answer = count(page, text, instruction)
    lost = f", {answer['lost']} cut off: {answer['cut']}" if answer["lost"] else ""
    return f"{answer['used']} of 299 tokens{lost}"


def color(page: Frontend) -> str:
    return page.page.locator(".sana-meter").evaluate("element => getComputedStyle(element).color")


def test_meter_follows_the_text(opened: Frontend) -> None:
    """What is typed, what is chosen, an undo, a copy, another workflow and the way back, and after saving."""
    opened.load(WORKFLOW)
    meters(opened, line(opened, "a red circle"))
    calm = color(opened)
    box = opened.page.locator("textarea").first
    box.click()
    opened.page.keyboard.press("Control+End")
    opened.page.keyboard.type(" and a star")
    meters(opened, line(opened, "a red circle and a star"))
    inputs = opened.prompt()["2"]["inputs"]
    assert inputs["text"] == "a red circle and a star"
    assert inputs["style"] == "none"  # which workflows saved before there were styles do not have

    text = " ".join(WORDS)
    box.fill(text)
    meters(opened, line(opened, text))
    assert " cut off: " in opened.page.locator(".sana-meter").inner_text()
    red, green, blue = map(int, color(opened)[4:-1].split(", "))
    assert color(opened) != calm and red > 150 > max(green, blue)

    box.fill("a red circle")
    meters(opened, line(opened, "a red circle"))
    assert color(opened) == calm
    opened.remember()
    opened.set("GemmaTextEncode", "text", "a star")
    meters(opened, line(opened, "a star"))
    opened.remember()
    opened.undo()
    meters(opened, line(opened, "a red circle"))
    opened.set("GemmaTextEncode", "instruction", "official")
    opened.set("GemmaTextEncode", "text", text)
    meters(opened, line(opened, text, "official"))
    assert line(opened, text, "official") != line(opened, text)
    opened.set("GemmaTextEncode", "text", "a star")
    opened.page.evaluate(COPY)
    meters(opened, *[line(opened, "a star")] * 2)
    clay = STYLES["Clay"]
    opened.set("GemmaTextEncode", "style", "Clay")
    told = [line(opened, "a star"), line(opened, clay.around("a star"), "official")]
    meters(opened, *told)
    opened.wait_until(lambda: opened.page.locator(".sana-style:visible").all_inner_texts(), [clay.around("…")])
    opened.load({**WORKFLOW, "nodes": [], "links": []})
    meters(opened)
    opened.open_previous()
    meters(opened, *told)
    opened.load(opened.workflow())
    meters(opened, *told)
    assert not opened.exceptions, opened.report()


def test_meter_needs_a_text_encoder(opened: Frontend) -> None:
    """It goes with the connection, and comes back with what brings that back. No saved workflow and no prompt has it."""
    opened.load(WORKFLOW)
    told = line(opened, "a red circle")
    meters(opened, told)
    node = next(node for node in opened.workflow()["nodes"] if node["id"] == 2)
    assert [value for value in node["widgets_values"] if value is not None][:2] == ["a red circle", "none"]
    assert not any("sana_meter" in str(part) for part in (opened.workflow(), opened.prompt()))
    opened.page.evaluate(CUT)
    meters(opened)
    opened.load(opened.workflow())
    opened.page.wait_for_timeout(NOTICED_MS)
    meters(opened)
    opened.load(WORKFLOW)
    meters(opened, told)
    opened.set("SanaCheckpointLoader", "text_encoder", "gone")
    meters(opened)
    opened.set("SanaCheckpointLoader", "text_encoder", "auto")
    meters(opened, told)
    for node, name in (("SanaCheckpointLoader", "model"), ("GemmaTextEncode", "text")):  # what comes, nobody knows yet
        opened.page.evaluate(LINK, [node, name])
        meters(opened)
        opened.load(WORKFLOW)
        meters(opened, told)


def test_meter_finds_the_encoder_across_subgraphs(opened: Frontend) -> None:
    told = line(opened, "a red circle")
    opened.load(WORKFLOW)
    opened.enclose("SanaCheckpointLoader")
    meters(opened, told)
    opened.load(WORKFLOW)
    opened.enclose("GemmaTextEncode")
    opened.enter_subgraph()
    meters(opened, told)


def test_meter_finds_the_encoder_through_nodes_that_hand_it_on(opened: Frontend) -> None:
    """And shows nothing for a text encoder of another loader, whose CLIP the node refuses."""
    opened.load(WORKFLOW)
    told = line(opened, "a red circle")
    opened.page.evaluate(BETWEEN, "LoraLoader")
    assert "LoraLoader" in [node["class_type"] for node in opened.prompt().values()]
    opened.set("SanaCheckpointLoader", "text_encoder", "gone")
    meters(opened)
    opened.set("SanaCheckpointLoader", "text_encoder", "auto")
    meters(opened, told)
    opened.page.evaluate(BETWEEN, "CLIPLoader")
    meters(opened)
    assert not opened.exceptions, opened.report()


def test_a_refresh_shows_what_has_become_of_a_style(opened: Frontend) -> None:
    """Whose name is the same, so nothing changes on the node; and long texts of rare characters are counted as others are."""
    path = opened.server.base / "user" / "default" / "sana" / "styles.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    opened.load(WORKFLOW)
    opened.set("GemmaTextEncode", "style", "Clay")
    for words in (STYLES["Clay"].around("…"), "… in clay", "… in mud"):
        path.write_text(json.dumps({"Clay": {"prompt": words.replace("…", "{prompt}")}}), encoding="utf-8")
        opened.page.evaluate("() => app.refreshComboInNodes()")
        opened.wait_until(lambda: opened.page.locator(".sana-style:visible").all_inner_texts(), [words])
    path.unlink()
    opened.set("GemmaTextEncode", "style", "none")
    text = "👩‍👩‍👧 🦊" * 14_000
    opened.set("GemmaTextEncode", "text", text)
    meters(opened, line(opened, text))
    assert not opened.exceptions, opened.report()


def test_keys_do_not_pile_up(opened: Frontend) -> None:
    """While an answer is awaited no other question is asked. Then one is, of all that was typed."""
    questions: list[str] = []
    held: list[Route] = []

    def hold(route: Route) -> None:
        questions.append(route.request.post_data_json["text"])
        held.append(route) if len(questions) == 1 else route.continue_()

    opened.load(WORKFLOW)
    meters(opened, line(opened, "a red circle"))
    opened.page.route(ROUTE, hold)
    box = opened.page.locator("textarea").first
    box.fill(WORDS[0])
    opened.wait_until(lambda: questions, [WORDS[0]])
    for count in range(2, 12):
        text = " ".join(WORDS[:count])
        box.fill(text)
    opened.page.wait_for_timeout(NOTICED_MS)
    assert questions == [WORDS[0]]
    held[0].continue_()
    meters(opened, line(opened, text))
    assert questions[-1] == text and len(questions) <= 3  # three if not all was noticed while the first was held
    opened.page.unroute(ROUTE)


def test_without_an_answer_nothing_is_shown(opened: Frontend) -> None:
    asked: list[str] = []
    opened.load(WORKFLOW)
    meters(opened, line(opened, "a red circle"))
    opened.page.route(ROUTE, lambda route: (asked.append(route.request.url), route.abort()))
    opened.set("GemmaTextEncode", "text", "a star")
    meters(opened)
    assert asked and opened.prompt()["2"]["inputs"]["text"] == "a star"
    opened.page.unroute(ROUTE)
    opened.set("GemmaTextEncode", "text", "a circle")
    meters(opened, line(opened, "a circle"))
    assert not opened.exceptions, opened.report()
