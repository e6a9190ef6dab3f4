"""What one worker does, without others."""

import json
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from sana.cluster.drawing import Drawer, Run
from sana.cluster.places import PlaceError
from sana.cluster.rows import Row
from sana.jobs import png_record
from sana.pipeline import SanaPipeline

SMALL = {"height": 64, "width": 64, "steps": 2}


@pytest.fixture(scope="module")
def pipeline() -> SanaPipeline:
    return SanaPipeline.load("demo")


@pytest.fixture
def drawer(tmp_path: Path, pipeline: SanaPipeline) -> Drawer:
    run = Run(str(tmp_path), {"model": "demo"}, settings={**SMALL, "negative": "red"}, files="0123")
    found = Drawer.__new__(Drawer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SanaPipeline, "load", lambda **_: pipeline)
        found.__init__(run, "worker-1")
    return found


def test_a_row_is_drawn_as_by_the_pipeline(drawer: Drawer, pipeline: SanaPipeline, tmp_path: Path) -> None:
    row = Row(1234, "a red circle", settings={"seed": 5, "height": 96})
    (entry,) = drawer.draw([row])
    content = (tmp_path / "pictures" / "000001" / "000001234.png").read_bytes()
    expected = pipeline("a red circle", **{**SMALL, "height": 96}, seed=5, negative="red")[0]
    assert np.array_equal(np.asarray(Image.open(BytesIO(content))), np.asarray(expected))
    assert entry.sha256 == sha256(content).hexdigest() and entry.file == "pictures/000001/000001234.png"
    assert (entry.row, entry.key, entry.seed, entry.worker) == (1234, row.key(), 5, "worker-1")
    assert entry.error is None and entry.seconds > 0
    record = png_record(BytesIO(content))
    assert json.loads(entry.settings) == record
    text = Image.open(BytesIO(content)).text["parameters"]
    assert text.startswith("a red circle\nNegative prompt: red\nSteps: ") and text.endswith(", Model: demo")
    assert record["files"] == "0123" and record["prompt"] == "a red circle" and record["height"] == 96


def test_a_picture_that_is_there_is_not_drawn_again(drawer: Drawer, tmp_path: Path) -> None:
    row = Row(0, "a red circle", "x", settings={"seed": 1})
    (first,) = drawer.draw([row])
    before = (tmp_path / first.file).stat().st_mtime_ns
    assert list(drawer.draw([row])) == [replace(first, seconds=None)]
    assert (tmp_path / first.file).stat().st_mtime_ns == before
    (other,) = drawer.draw([Row(0, "a blue circle", "x", settings={"seed": 1})])
    assert other.seconds is not None and other.sha256 != first.sha256
    drawer.run = replace(drawer.run, files="4567")
    assert next(drawer.draw([Row(0, "a blue circle", "x", settings={"seed": 1})])).seconds is not None
    (tmp_path / first.file).write_bytes(b"broken")
    assert next(drawer.draw([row])).seconds is not None


def test_rows_that_cannot_be_drawn_stop_nothing(drawer: Drawer, tmp_path: Path) -> None:
    rows = [
        Row(0, fault="it has no prompt"),
        Row(1, "a", settings={"height": 65}),
        Row(2, "a", settings={"solver": "x"}),
        Row(3, "a", settings={"image": str(tmp_path / "none.png")}),
        Row(4, "a", settings={"mask": "x"}),
        Row(5, "a", lora="none.safetensors"),
        Row(6, "a", lora="x=strong"),
        Row(7, "a red circle"),
    ]
    found = {entry.row: entry for entry in drawer.draw(rows)}
    messages = {
        0: "it has no prompt",
        1: "65",
        2: "solver 'x' is unknown",
        3: "none.png",
        4: "x",
        5: "none.safetensors",
        6: "'strong' is no strength",
    }
    for number, message in messages.items():
        assert message in found[number].error and "\n" not in found[number].error and found[number].file is None
    assert found[7].error is None and (tmp_path / found[7].file).exists()


def test_a_worker_knows_the_place_of_the_command(tmp_path: Path) -> None:
    """By its note; in memory, as on the disk of one machine alone, each process has a place of its own."""
    for out in (str(tmp_path), "memory://elsewhere"):
        told = f"^{out} is another place for worker-1; give a folder or an address that all share$"
        with pytest.raises(ValueError, match=told):
            Drawer(Run(out, {"model": "demo"}, is_noted=True), "worker-1")
    (tmp_path / "run.json").touch()
    assert Drawer(Run(str(tmp_path), {"model": "demo"}, is_noted=True), "worker-1").name == "worker-1"


def test_a_worker_with_other_files_than_the_command_is_of_no_use(tmp_path: Path) -> None:
    run = Run(str(tmp_path), {"model": "demo"}, files="0123", read=lambda: "4567")
    told = "^a model, a LoRA or a picture is another one for worker-1; copy the same files to all machines$"
    with pytest.raises(ValueError, match=told):
        Drawer(run, "worker-1")
    assert Drawer(replace(run, read=lambda: "0123"), "worker-1").name == "worker-1"


def test_a_network_that_breaks_is_the_fault_of_its_row(drawer: Drawer, pipeline: SanaPipeline) -> None:
    weight = pipeline.transformer.proj_out.bias
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
        (entry,) = drawer.draw([Row(0, "a")])
        weight.copy_(before)
    assert "not finite" in entry.error
    assert next(drawer.draw([Row(0, "a")])).error is None


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="an older PyTorch does not tell")
def test_a_worker_ends_where_its_gpu_breaks_down(drawer: Drawer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed afterwards would fail row by row."""

    def broken(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def end(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(SanaPipeline, "draw", broken)
    monkeypatch.setattr("os._exit", end)
    with pytest.raises(SystemExit):
        list(drawer.draw([Row(0, "a"), Row(1, "a")]))


def test_a_disk_that_is_full_is_no_fault_of_a_row(drawer: Drawer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(PlaceError, match="No space left on device"):
        list(drawer.draw([Row(0, "a")]))


def test_a_model_is_loaded_again_for_other_loras(
    drawer: Drawer, pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(SanaPipeline, "load", lambda **given: loaded.append(given["loras"]) or pipeline)
    rows = [Row(i, "a", lora="a=0.5;b" if i % 2 else None) for i in range(6)]
    assert [entry.row for entry in drawer.draw(rows)] == [0, 2, 4, 1, 3, 5]
    assert loaded == [[(Path("a"), 0.5), (Path("b"), 1.0)]]


def test_equal_prompts_are_encoded_once(
    drawer: Drawer, pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    encode = pipeline.text_encoder.__class__.__call__
    monkeypatch.setattr(
        pipeline.text_encoder.__class__, "__call__", lambda *given: seen.append(tuple(given[1])) or encode(*given)
    )
    monkeypatch.setattr(pipeline, "texts_kept", 2)
    monkeypatch.setattr(pipeline, "_texts", {})
    prompts = ["a cat", "a dog", "a cat", "a dog", "a hen", "a cat"]
    entries = list(drawer.draw([Row(i, prompt, settings={"seed": i}) for i, prompt in enumerate(prompts)]))
    assert [texts for texts in seen if texts != ("red",)] == [("a cat",), ("a dog",), ("a hen",), ("a cat",)]
    assert all(entry.error is None for entry in entries)
