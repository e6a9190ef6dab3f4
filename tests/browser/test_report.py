"""What a node found out stays on it, in both ways of drawing nodes, and in no saved workflow; without our modules all draws."""

from pathlib import Path

import pytest

from tests.browser import newest
from tests.browser.frontend import DRAWN, Frontend
from tests.browser.test_rows import in_sight
from tests.host.base_directory import PACK
from tests.workflows import graph

WORKFLOW = "sana_demo"
LOADED = "custom, made for 256 px and cfg 2; its own text encoder and its own autoencoder"
SPRINT = "SCMSampler"
NOTE_CACHED = """() => {
    window.cached = []
    app.api.addEventListener("execution_cached", event => window.cached.push(...event.detail.nodes))
}"""
EXECUTED = "output => app.graph.nodes.at(-1).onExecuted(output)"


def run(page: Frontend) -> None:
    assert page.run()["kind"] == "execution_success"


def shown(page: Frontend) -> list[str]:
    """The visible texts of all nodes."""
    page.page.wait_for_timeout(500)  # until elements are in their places
    page.page.evaluate(DRAWN)
    return sorted(text.inner_text() for text in page.page.locator(".sana-report").all() if text.is_visible())


def saved(workflow: dict) -> dict[int, tuple]:
    """What is saved of each node that a person could have changed."""
    return {node["id"]: (node.get("widgets_values"), node.get("inputs")) for node in workflow["nodes"]}


def sizes(workflow: dict) -> list[list[float]]:
    return [node["size"] for node in workflow["nodes"]]


def test_text_stays(page: Frontend, tmp_path: Path) -> None:
    """After the job, after an undo, and after a reload of the page, when the results come from the cache."""
    page.open(WORKFLOW)
    assert shown(page) == []
    workflow, prompt = page.workflow(), page.prompt()
    run(page)
    texts = shown(page)
    page.screenshot(tmp_path / "after.png")
    assert len(texts) == 3 and LOADED in texts and sum(" of 299 tokens" in text for text in texts) == 2
    page.page.evaluate("() => { app.graph.nodes[0].title = 'renamed' }")
    page.remember()
    page.undo()
    assert shown(page) == texts

    page.open(WORKFLOW)
    assert shown(page) == []
    page.page.evaluate(NOTE_CACHED)
    run(page)
    assert {"1", "3", "4"} <= set(page.page.evaluate("() => window.cached"))
    assert shown(page) == texts
    page.screenshot(tmp_path / "reloaded.png")
    assert saved(page.workflow()) == saved(workflow)
    if not page.page.evaluate("() => LiteGraph.vueNodesMode"):  # there is room; the elements of nodes leave none
        assert sizes(page.workflow()) == sizes(workflow)
    assert page.prompt() == prompt
    assert not page.exceptions, page.report()


def test_text_is_that_of_the_workflow_in_view(frontend: Frontend) -> None:
    """Another workflow has nodes with the same ids. One of the nodes is in a subgraph."""
    frontend.open(WORKFLOW)
    frontend.enclose("SanaCheckpointLoader")
    run(frontend)
    texts = shown(frontend)
    assert len(texts) == 2
    frontend.load(graph.read("sana_1k_text_to_image"))
    assert shown(frontend) == []
    frontend.open_previous()
    frontend.page.wait_for_function("() => document.querySelector('.sana-report')")
    assert shown(frontend) == texts
    frontend.enter_subgraph()
    assert shown(frontend) == [LOADED]


def test_empty_text_takes_the_older_one_away(opened: Frontend) -> None:
    """And an output without a text, or none at all, leaves it."""
    opened.load({"version": 0.4, "nodes": [], "links": []})
    opened.add(SPRINT)
    for output, texts in (
        ({"sana_report": ["one", "two"]}, ["one\ntwo"]),
        ({"images": []}, ["one\ntwo"]),
        (None, ["one\ntwo"]),
        ({"sana_report": ["three"]}, ["three"]),
        ({"sana_report": []}, []),
    ):
        opened.page.evaluate(EXECUTED, output)
        assert shown(opened) == texts


@pytest.mark.parametrize("frontend", [newest.FLAGS], indirect=True, ids=["newest"])
def test_workflows_load_as_they_were_saved(frontend: Frontend) -> None:
    frontend.open()
    for name in graph.NAMES:
        frontend.load(graph.read(name))
        values, kept = (
            {node["id"]: node.get("widgets_values") or [] for node in workflow["nodes"]}
            for workflow in (graph.read(name), frontend.workflow())
        )
        assert kept == values
    assert not frontend.exceptions, frontend.report()


def test_page_without_our_modules_draws(frontend: Frontend, tmp_path: Path) -> None:
    frontend.page.route(f"**/extensions/{PACK}/*.js", lambda route: route.abort())
    frontend.open(WORKFLOW)
    in_sight(frontend, "GemmaTextEncode", text=True, custom_instruction=True)
    run(frontend)
    assert shown(frontend) == []
    frontend.screenshot(tmp_path / "blocked.png")
    assert not frontend.exceptions, frontend.report()
