"""The harness itself: the host's user interface loads in a browser, runs a workflow and shows its picture."""

from pathlib import Path

from tests.browser.frontend import Frontend

RED = (255, 0, 0)
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


def test_run_button_runs_the_workflow_and_shows_its_picture(frontend: Frontend) -> None:
    frontend.open()
    frontend.load(WORKFLOW)
    assert frontend.prompt()["1"]["inputs"] == {"width": 512, "height": 512, "batch_size": 1, "color": 0xFF0000}
    before = dict((color, count) for count, color in frontend.screenshot().getcolors(2**24) or [])
    assert frontend.run()["kind"] == "execution_success"
    after = dict((color, count) for count, color in frontend.screenshot().getcolors(2**24) or [])
    assert before.get(RED, 0) < 1_000 and after[RED] > 50_000
