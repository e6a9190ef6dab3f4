"""The harness itself: a bare server starts, runs core nodes, and reports results, errors and interrupts."""

import io

import pytest
from PIL import Image

from tests.host.client import Event
from tests.host.hosts import NEWEST, OLDEST
from tests.host.server import Server, Servers

RED = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": 0xFF0000}}


def save(source: str) -> dict[str, object]:
    """A node that saves the picture of node `source`."""
    return {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": "test"}}


@pytest.mark.parametrize("version", [NEWEST, OLDEST])
def test_server_runs_core_nodes(servers: Servers, version: str) -> None:
    server = servers(version)
    assert {"KSampler", "VAEDecode", "LoraLoader"} <= server.object_info().keys()
    run = server.queue({"1": RED, "2": save("1")})
    (image,) = server.images(run, "2")
    assert run.failure is None
    assert [data["node"] for data in run.data("executed")] == ["2"]
    assert image.size == (64, 32) and image.getpixel((0, 0)) == (255, 0, 0)


def test_uploaded_image_comes_back(server: Server) -> None:
    content = io.BytesIO()
    Image.new("RGB", (48, 16), (0, 0, 255)).save(content, "PNG")
    load = {"class_type": "LoadImage", "inputs": {"image": server.upload("blue.png", content.getvalue())}}
    (image,) = server.images(server.queue({"1": load, "2": save("1")}))
    assert image.size == (48, 16) and image.getpixel((0, 0)) == (0, 0, 255)


def test_error_of_a_node_is_reported(server: Server) -> None:
    load = {"class_type": "LoadImage", "inputs": {"image": server.upload("broken.png", b"not a picture")}}
    run = server.queue({"1": load, "2": save("1")})
    assert run.failure and run.failure.node_type == "LoadImage"
    assert "cannot identify image file" in run.failure.message
    assert "load_image" in run.failure.traceback


def test_refused_prompt_is_reported(server: Server) -> None:
    run = server.queue({"1": {**RED, "inputs": {**RED["inputs"], "width": -1}}, "2": save("1")})
    assert run.failure and (run.failure.node_id, run.failure.node_type) == ("1", "EmptyImage")
    assert run.failure.message.startswith("Value -1 smaller than min of 1: width")


def test_interrupt_stops_the_prompt_and_the_next_one_runs(server: Server) -> None:
    large = {"class_type": "EmptyImage", "inputs": {"width": 2048, "height": 2048, "batch_size": 1, "color": 0}}
    prompt = {"0": large}
    for index in range(1, 50):  # about a second each: the interrupt cannot come too late
        blur = {"image": [str(index - 1), 0], "blur_radius": 10, "sigma": 1.0}
        prompt[str(index)] = {"class_type": "ImageBlur", "inputs": blur}
    prompt["50"] = save("49")

    def interrupt_when_executing(name: str, data: Event) -> None:
        if name == "executing" and data["node"] == "1":
            server.interrupt()

    run = server.queue(prompt, on_event=interrupt_when_executing)
    assert run.interrupted and not run.outputs
    assert server.images(server.queue({"1": RED, "2": save("1")}))[0].size == (64, 32)


def test_server_that_cannot_start_says_why(servers: Servers) -> None:
    with pytest.raises(
        RuntimeError, match="(?s)--no-such-flag did not start; .*unrecognized arguments: --no-such-flag"
    ):
        servers(NEWEST, "--no-such-flag")
