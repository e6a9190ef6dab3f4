"""ComfyUI's frontend in a real browser: opens workflows, runs them with the Run button, and keeps what went wrong."""

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from PIL import Image
from playwright.sync_api import Browser, Page, Route, sync_playwright

from tests.browser import chromium
from tests.host.base_directory import PACK
from tests.host.client import Client

SIZE = {"width": 1600, "height": 1000}
TIMEOUT_MS, RUN_MS, POLL_MS = 60_000, 180_000, 50
LOADED = """name => {  // the frontend first opens a default workflow, then the one asked for
    const workflow = window.app?.extensionManager?.workflow?.activeWorkflow
    return workflow?.filename.startsWith(name) && app.graph.nodes.length > 0
}"""
WATCH = """limit => {
    window.lastRun = new Promise((resolve, reject) => {
        setTimeout(() => reject(new Error("the prompt has not ended")), limit)
        for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
            app.api.addEventListener(kind, event => resolve({kind, ...event.detail}), {once: true})
    })
    window.lastRun.catch(() => {})  // whoever waits for it reports it
}"""
DRAWN = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
PICTURES = """() => Object.entries(app.nodeOutputs).every(([id, output]) => {
    const node = app.graph.getNodeById(id)
    return !node || !output?.images?.length || node.imgs?.every(picture => picture.complete)
})"""
SET = """([type, name, value]) => {
    app.canvas.graph.nodes.find(node => node.type === type).widgets.find(widget => widget.name === name).value = value
}"""
TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"
REMEMBER = f"() => {{ const tracker = {TRACKER}; tracker.captureCanvasState ? tracker.captureCanvasState() : tracker.checkState() }}"
ENCLOSE = """type => {
    app.graph.convertToSubgraph(new Set(app.graph.nodes.filter(node => node.type === type)))
}"""
ENTER = "() => { app.canvas.setGraph([...app.rootGraph.subgraphs.values()][0]) }"


@contextmanager
def launch() -> Iterator[Browser]:
    """A Chromium without a window. Raises FileNotFoundError if there is none."""
    found = chromium.find_chromium()
    if not found:
        raise FileNotFoundError(chromium.MISSING)
    with patch.dict(os.environ, found.variables):  # for Playwright's driver, which hands them on, and for nothing else
        playwright = sync_playwright().start()
    try:
        browser = playwright.chromium.launch(executable_path=found.executable, args=chromium.FLAGS)
        yield browser
        browser.close()
    finally:
        playwright.stop()


@contextmanager
def open_page(browser: Browser, server: Client) -> "Iterator[Frontend]":
    """A page with a profile of its own, not opened yet: call open()."""
    context = browser.new_context(viewport=SIZE)
    context.set_default_timeout(TIMEOUT_MS)
    yield Frontend(context.new_page(), server)
    context.close()


@dataclass
class Frontend:
    """A page of a server's user interface. `page` is Playwright's, for anything that has no method here."""

    page: Page
    server: Client
    messages: list[str] = field(default_factory=list)  # warnings and errors of the page's console
    exceptions: list[str] = field(default_factory=list)  # uncaught ones

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.exceptions.append(str(error)))
        self.page.on("console", lambda entry: entry.type in ("error", "warning") and self.messages.append(entry.text))

    def choose(self, **settings: object) -> None:
        """Settings of the user interface that this page alone finds, with "_" for ".": Comfy_VueNodes_Enabled=True."""
        chosen = {name.replace("_", "."): value for name, value in settings.items()}

        def answer(route: Route) -> None:
            if route.request.method != "GET":
                return route.continue_()
            return route.fulfill(json={**route.fetch().json(), **chosen})

        self.page.route("**/api/settings", answer)

    def open(self, template: str | None = None, source: str = PACK) -> None:
        """Opens the user interface with the workflow `template` of the pack `source` (None: what a new user sees)."""
        self.page.goto(self.server.url + (f"/?template={template}&source={source}" if template else "/"))
        self.page.wait_for_function(LOADED, arg=template or "Unsaved Workflow")

    def load(self, workflow: dict) -> None:
        """Loads a workflow in UI format into the open page."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)

    def node_types(self) -> list[str]:
        """The types of the nodes on the canvas."""
        return self.page.evaluate("() => app.graph.nodes.map(node => node.type)")

    def prompt(self) -> dict[str, dict]:
        """The workflow on the canvas in API format, as the frontend converts it."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def run(self) -> dict:
        """Presses Run and waits for the end: {"kind": "execution_success" or _error or _interrupted, ...}.

        The pictures are drawn on their nodes when it returns. Raises playwright's Error if the prompt does not end in time.
        """
        self.page.evaluate(WATCH, RUN_MS)
        self.page.get_by_test_id("queue-button").click()
        result = self.page.evaluate("() => window.lastRun")
        self.page.wait_for_function(PICTURES)
        self.page.evaluate(DRAWN)
        return result

    def workflow(self) -> dict:
        """The workflow on the canvas as the frontend saves it."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.rootGraph.serialize()))")

    def add(self, node_type: str) -> None:
        """Adds a node to the graph in view."""
        self.page.evaluate("type => { app.canvas.graph.add(LiteGraph.createNode(type)) }", node_type)

    def set(self, node_type: str, name: str, value: object) -> None:
        """Gives a value to a widget of the first node of a type in view."""
        self.page.evaluate(SET, [node_type, name, value])

    def remember(self) -> None:
        """Has the user interface notice a change, to which `undo` returns."""
        self.page.evaluate(REMEMBER)

    def undo(self) -> None:
        self.page.evaluate(f"() => {TRACKER}.undo()")

    def enclose(self, node_type: str) -> None:
        """Puts all nodes of a type into a subgraph."""
        self.page.evaluate(ENCLOSE, node_type)

    def enter_subgraph(self) -> None:
        """Shows the inside of the only subgraph."""
        self.page.evaluate(ENTER)

    def open_previous(self) -> None:
        """Goes back to the workflow that was in view before."""
        self.page.evaluate("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")

    def wait_until(self, read: Callable[[], object], wanted: object) -> None:
        """Waits until `read` returns what is wanted. Raises AssertionError if it does not."""
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while (found := read()) != wanted:
            assert time.monotonic() < deadline, f"{found} instead of {wanted}"
            self.page.wait_for_timeout(POLL_MS)

    def screenshot(self, path: Path | None = None) -> Image.Image:
        """What the page shows, also written to `path` if given."""
        return Image.open(io.BytesIO(self.page.screenshot(path=path))).convert("RGB")

    def report(self) -> str:
        """What the page complained about."""
        return "\n".join(self.exceptions + self.messages)
