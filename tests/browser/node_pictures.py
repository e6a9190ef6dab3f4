"""The pictures of the nodes on their help pages: python -m tests.browser.node_pictures [NODE ...]. Writes js/docs/images.

Each is the node as a new one is drawn. Needs the environment of `python3 tests`: .venv/tests/bin/python.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from tests.browser.frontend import DRAWN, Frontend, launch, open_page
from tests.host.hosts import ROOT
from tests.host.server import Servers

TARGET = ROOT / "js" / "docs" / "images"
NODES = sorted(path.stem for path in (ROOT / "js" / "docs").glob("*.md"))
COLORS = 96  # of a picture, which keeps it small
PLAIN = {  # without what the user interface draws over the graph and beside nodes
    "Comfy_Graph_CanvasInfo": False,
    "Comfy_Minimap_Visible": False,
    "Comfy_NodeBadge_NodeSourceBadgeMode": "None",
}
FILES = (  # for lists that would be empty, in models/
    "text_encoders/gemma-2-2b-it.safetensors",
    "vae/dc-ae-f32c32-sana-1.1.safetensors",
    "controlnet/sana-controlnet-hed.safetensors",
    "clip_vision/clip-vit-large-patch14/config.json",
    "clip_vision/clip-vit-large-patch14/model.safetensors",
)
SETTLED_MS = 700  # until our modules have done what they do with a new node
# Puts a new node of a type alone on the canvas. Its id is its own, since user interfaces keep values by it.
PLACE = """([type, id]) => {
    app.graph.clear()
    app.graph.last_node_id = id
    app.canvas.ds.scale = 1
    app.canvas.ds.offset = [300, 200]
    const node = LiteGraph.createNode(type)
    node.pos = [0, 0]
    node.setSize([Math.max(node.size[0], 340), node.size[1]])  // whole names
    app.graph.add(node)
    app.canvas.setDirty(true, true)
}"""
# The box of that node on the page, in px.
BOX = """() => {
    const [node] = app.graph.nodes, {x, y} = app.canvas.canvas.getBoundingClientRect()
    const title = LiteGraph.NODE_TITLE_HEIGHT, margin = 8
    return [x + 300 - margin, y + 200 - title - margin, x + 300 + node.size[0] + margin, y + 200 + node.size[1] + margin]
}"""


def picture(frontend: Frontend, node: str, number: int) -> Image.Image:
    """A new node on the dark ground of the canvas. number: another for each."""
    frontend.page.evaluate(PLACE, [node, number])
    frontend.page.wait_for_timeout(SETTLED_MS)
    frontend.page.evaluate(DRAWN)
    box = frontend.page.evaluate(BOX)
    return frontend.screenshot().crop(tuple(map(round, box))).quantize(COLORS, Image.Quantize.MAXCOVERAGE)


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder, launch() as browser:
        servers = Servers(Path(folder))
        try:
            server = servers()
            for name in FILES:
                path = server.base / "models" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            with open_page(browser, server) as frontend:
                frontend.choose(**PLAIN)
                frontend.open()
                for number, node in enumerate(sys.argv[1:] or NODES, 100):
                    picture(frontend, node, number).save(TARGET / f"{node}.png", optimize=True)
        finally:
            servers.close()


if __name__ == "__main__":
    main()
