"""The pack as a new user meets it in the user interface, with no weights but those it comes with."""

from pathlib import Path

import torch

from tests.browser.frontend import Frontend
from tests.host import stand_ins
from tests.host.server import Server
from tests.workflows import graph


def test_missing_files_are_offered_for_download(frontend: Frontend, server: Server) -> None:
    """Of a server without any weights but those of another model, under the name that a browser saves the DC-AE with."""
    other = {"decoder.up_blocks.0.resnets.0.conv1.weight": torch.ones(4)}
    with stand_ins.placed(server, {"vae/diffusion_pytorch_model.safetensors": other}):
        frontend.open("sana_1k_text_to_image")
        frontend.page.get_by_role("button", name="View details").click()
        for model in graph.models(graph.read("sana_1k_text_to_image")):
            frontend.page.get_by_text(model["name"]).first.wait_for()


def test_demo_draws_a_picture_at_a_click(frontend: Frontend, tmp_path: Path) -> None:
    """What a new user does. The picture is shown on its node, and every node of ours says what it found."""
    frontend.open("sana_demo")
    before = frontend.screenshot(tmp_path / "before.png")
    assert frontend.run()["kind"] == "execution_success"
    after = frontend.screenshot(tmp_path / "after.png")
    assert len(after.getcolors(2**24) or []) > len(before.getcolors(2**24) or []) + 100
    for text in ("made for 256 px and cfg 2; its own text encoder and its own autoencoder", " of 299 tokens"):
        frontend.page.get_by_text(text).first.wait_for()
    assert not frontend.exceptions, frontend.report()
