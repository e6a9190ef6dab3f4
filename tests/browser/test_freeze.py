"""A click keeps the text that SANA prompt enhancer wrote, and another has it written anew."""

import shutil
from collections.abc import Iterator

import pytest

from tests.browser.frontend import Frontend
from tests.sana.models import gemma, write_text_encoder

ENHANCER, KEEP, ANEW = "SanaPromptEnhancer", "keep this text", "write anew"
FOLDER = "writer"  # of a text encoder that writes, among those of the server
WORKFLOW = {
    "version": 0.4,
    "last_node_id": 3,
    "last_link_id": 2,
    "links": [[1, 1, 0, 2, 0, "CLIP"], [2, 2, 0, 3, 0, "STRING"]],
    "nodes": [
        {
            "id": 1,
            "type": "SanaTextEncoderLoader",
            "pos": [60, 200],
            "size": [300, 90],
            "outputs": [{"name": "CLIP", "type": "CLIP", "links": [1]}],
            "widgets_values": [FOLDER, "auto"],
        },
        {
            "id": 2,
            "type": ENHANCER,
            "pos": [400, 160],
            "size": [400, 420],
            "inputs": [{"name": "clip", "type": "CLIP", "link": 1}],
            "outputs": [{"name": "STRING", "type": "STRING", "links": [2]}],
            "widgets_values": ["a cat", "official", 3, "fixed", 1.5, 12, "", ""],
        },
        {
            "id": 3,
            "type": "PreviewAny",
            "pos": [860, 200],
            "size": [300, 200],
            "inputs": [{"name": "source", "type": "*", "link": 2}],
        },
    ],
}
# Of the button: what it says, and where it is on the page; null: it is out of sight.
BUTTON = """() => {
    const node = app.canvas.graph.nodes.find(node => node.type === "SanaPromptEnhancer")
    const widget = node.widgets.find(widget => widget.name === "sana_freeze")
    if (LiteGraph.vueNodesMode) {
        const found = [...document.querySelectorAll("button")].find(button => button.innerText.trim() === widget.label)
        const box = found?.getBoundingClientRect()
        return box?.height ? [widget.label, box.x + box.width / 2, box.y + box.height / 2] : null
    }
    if (widget.visibility ? widget.options.hidden : widget.hidden) return null
    const {scale, offset} = app.canvas.ds, {x, y} = app.canvas.canvas.getBoundingClientRect()
    const [left, top] = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10]
    return [widget.label, x + (left + offset[0]) * scale, y + (top + offset[1]) * scale]
}"""
TEXTS = "() => app.canvas.graph.nodes.map(node => node.widgets?.find(({name}) => name === 'edited')?.value ?? null)"
TELL = "output => app.canvas.graph.nodes.find(node => node.type === 'SanaPromptEnhancer').onExecuted(output)"
COPY = """() => {
    app.canvas.selectItems([app.graph.getNodeById(2)])
    app.canvas.copyToClipboard()
    app.canvas.pasteFromClipboard({connectInputs: true})
}"""


@pytest.fixture
def page(opened: Frontend) -> Iterator[Frontend]:
    """With a text encoder that writes, for whose server other tests find none afterwards."""
    folder = opened.server.base / "models" / "text_encoders" / FOLDER
    write_text_encoder(folder, {name: t + 4 if "post_" in name else t for name, t in gemma().state_dict().items()})
    opened.load(WORKFLOW)
    yield opened
    shutil.rmtree(folder)


def label(page: Frontend) -> str | None:
    found = page.page.evaluate(BUTTON)
    return found and found[0]


def press(page: Frontend, name: str) -> None:
    page.wait_until(lambda: label(page), name)
    _, x, y = page.page.evaluate(BUTTON)
    page.page.mouse.click(x, y)


def edited(page: Frontend) -> str:
    return page.prompt()["2"]["inputs"]["edited"]


def reports(page: Frontend) -> list[str]:
    return page.page.locator(".sana-report:visible").all_inner_texts()


def test_a_written_text_is_kept_and_then_written_anew(page: Frontend) -> None:
    """By clicks, with runs of the server between them, an undo, and nothing of it in what is saved."""
    assert label(page) is None
    before = page.workflow()
    assert page.run()["kind"] == "execution_success"
    page.wait_until(lambda: label(page), KEEP)
    (text,) = {text for text in reports(page) if "text encoder" not in text and "Gemma" not in text}
    assert len(text) > 5 and edited(page) == ""
    press(page, KEEP)
    page.wait_until(lambda: edited(page), text)
    page.wait_until(lambda: label(page), ANEW)
    assert page.run()["kind"] == "execution_success"
    assert "the edited text, as it stands" in reports(page)
    assert page.page.evaluate("() => app.nodeOutputs[3].text") == [text]
    assert "sana_freeze" not in str((page.workflow(), page.prompt()))

    press(page, ANEW)
    page.wait_until(lambda: edited(page), "")
    press(page, KEEP)  # what was taken out is not lost
    page.wait_until(lambda: edited(page), text)
    page.undo()
    page.wait_until(lambda: edited(page), "")
    assert [node["widgets_values"] for node in page.workflow()["nodes"]] == [
        node["widgets_values"] for node in before["nodes"]
    ]
    assert not page.exceptions, page.report()


def test_the_button_is_there_where_it_can_do_something(page: Frontend) -> None:
    for output, name in (
        ({"sana_report": ["the edited text, as it stands"]}, None),
        ({"sana_report": ["note:\na cat"], "sana_written": ["a cat"]}, KEEP),
        ({"sana_report": ["the edited text, as it stands"]}, KEEP),
        ({"sana_report": ["Nothing was written"], "sana_written": []}, None),
        ({"sana_report": ["a dog"], "sana_written": ["a dog"]}, KEEP),
    ):
        page.page.evaluate(TELL, output)
        page.wait_until(lambda: label(page), name)
    page.set(ENHANCER, "edited", " \n")
    press(page, KEEP)
    page.wait_until(lambda: edited(page), "a dog")
    page.set(ENHANCER, "edited", "a dog and a cat")
    press(page, ANEW)
    page.wait_until(lambda: edited(page), "")
    press(page, KEEP)
    page.wait_until(lambda: edited(page), "a dog and a cat")
    page.load(page.workflow())
    page.wait_until(lambda: label(page), ANEW)
