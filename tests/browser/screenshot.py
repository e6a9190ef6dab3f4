"""The picture of a graph in README: python -m tests.browser.screenshot. Writes docs/graph.jpg.

The workflow sana_demo in the real user interface, after a click on Run. Needs the environment of `python3 tests`:
.venv/tests/bin/python.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from tests.browser.frontend import DRAWN, TIMEOUT_MS, Frontend, launch
from tests.host.hosts import ROOT
from tests.host.server import Servers

WORKFLOW = "sana_demo"
TARGET = ROOT / "docs" / "graph.jpg"
WINDOW = {"width": 1900, "height": 1100}  # px
LEFT, TOP, MARGIN = 90, 110, 12  # px: free of the menus of the user interface, and around the groups
SCALE = 0.95  # at which the graph ends before what the user interface shows on the right
SETTLED_MS = 1500  # until the user interface has drawn what was moved
# Puts the left upper corner of the groups at (left, top), and gives their width and height.
PLACE = """([left, top, scale]) => {
    const boxes = app.graph.groups.map(group => [...group.pos, group.pos[0] + group.size[0], group.pos[1] + group.size[1]])
    const least = k => Math.min(...boxes.map(box => box[k])), most = k => Math.max(...boxes.map(box => box[k]))
    app.canvas.ds.scale = scale
    app.canvas.ds.offset[0] = left / scale - least(0)
    app.canvas.ds.offset[1] = top / scale - least(1)
    app.canvas.setDirty(true, true)
    return [(most(2) - least(0)) * scale, (most(3) - least(1)) * scale]
}"""


def main() -> None:
    """Raises RuntimeError if the workflow does not run."""
    with TemporaryDirectory() as folder, launch() as browser:
        servers = Servers(Path(folder))
        context = browser.new_context(viewport=WINDOW)
        context.set_default_timeout(TIMEOUT_MS)
        try:
            frontend = Frontend(context.new_page(), servers())
            frontend.open(WORKFLOW)
            if (kind := frontend.run()["kind"]) != "execution_success":
                raise RuntimeError(f"{WORKFLOW} ended with {kind}")
            width, height = frontend.page.evaluate(PLACE, [LEFT, TOP, SCALE])
            frontend.page.wait_for_timeout(SETTLED_MS)
            frontend.page.evaluate(DRAWN)
            box = (LEFT - MARGIN, TOP - MARGIN, LEFT + width + MARGIN, TOP + height + MARGIN)
            frontend.screenshot().crop(tuple(map(round, box))).save(TARGET, quality=85, optimize=True)
        finally:
            context.close()
            servers.close()


if __name__ == "__main__":
    main()
