"""The harness itself: the host's user interface loads in a browser, runs a workflow and shows its picture."""

from pathlib import Path

from tests.browser.frontend import Frontend

RED = (255, 0, 0)
PREVIEW = """() => {  // the place of the node that shows the picture; another shows its colour in newer user interfaces
    const {pos, size} = app.graph.getNodeById(2), {scale, offset} = app.canvas.ds
    const {x, y} = app.canvas.canvas.getBoundingClientRect()
    const corner = [x + (pos[0] + offset[0]) * scale, y + (pos[1] + offset[1]) * scale]
    return [...corner, corner[0] + size[0] * scale, corner[1] + size[1] * scale]
}"""
WORKFLOW = {
    "version": 0.4,
    "last_node_id": 2,
    "last_link_id": 1,
    "links": [[1, 1, 0, 2, 0, "IMAGE"]],
    "nodes": [
        {
            "id": 1,
            "type": "EmptyImage",
            "pos": [100, 200],
            "size": [300, 130],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
            "widgets_values": [512, 512, 1, 0xFF0000],
        },
        {
            "id": 2,
            "type": "PreviewImage",
            "pos": [500, 200],
            "size": [400, 400],
            "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
        },
    ],
}


def test_user_interface_loads(frontend: Frontend, tmp_path: Path) -> None:
    frontend.open()
    image = frontend.screenshot(tmp_path / "start.png")
    assert "KSampler" in frontend.node_types()
    assert not frontend.exceptions
    assert image.size == (1600, 1000) and len(image.getcolors(image.width * image.height) or []) > 100


def colors(frontend: Frontend) -> dict[tuple[int, int, int], int]:
    """How many pixels there are of each colour where the picture is shown."""
    image = frontend.screenshot().crop(tuple(map(round, frontend.page.evaluate(PREVIEW))))
    return {color: count for count, color in image.getcolors(2**24) or []}


def test_run_button_runs_the_workflow_and_shows_its_picture(frontend: Frontend) -> None:
    frontend.open()
    frontend.load(WORKFLOW)
    assert frontend.prompt()["1"]["inputs"] == {"width": 512, "height": 512, "batch_size": 1, "color": 0xFF0000}
    before = colors(frontend)
    assert frontend.run()["kind"] == "execution_success"
    assert before.get(RED, 0) < 1_000 and colors(frontend)[RED] > 50_000
