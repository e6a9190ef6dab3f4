"""`sana generate --workers` as its user runs it: the demo model on a real Ray, stopped and killed on its way."""

import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
import ray
from PIL import Image
from pyarrow import parquet
from ray import cloudpickle

import sana
from sana.__main__ import main
from sana.cluster.drawing import Run
from sana.jobs import read_record
from sana.saving import lock
from tests.cluster.nodes import wait_until

ROOT = Path(sana.__file__).parents[1]
SMALL = ("--height", "64", "--width", "64", "--steps", "2")
PROMPTS = [f"{['a', 'two', 'three'][i % 3]} {['red', 'blue', 'green', 'yellow'][i % 4]} circles" for i in range(24)]


@pytest.fixture(autouse=True)
def no_ray() -> Iterator[None]:
    yield
    ray.shutdown()


def command(prompts: Path, out: Path | str, *more: str) -> list[str]:
    return ["generate", "--prompts", str(prompts), "--out", str(out), "--workers", "2", *SMALL, *more]


def write(folder: Path, prompts: list[str]) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts))
    return path


def check_all(out: Path, count: int) -> dict[int, dict]:
    """Every row is in the manifest once, with the picture that is there, and there is nothing else."""
    entries = parquet.read_table(out / "manifest").to_pylist()
    assert Counter(entry["row"] for entry in entries) == Counter(range(count))
    for entry in entries:
        assert entry["error"] is None and sha256((out / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        assert read_record(out / entry["file"])["prompt"] == entry["prompt"]
    files = {path.relative_to(out).as_posix() for path in (out / "pictures").rglob("*") if path.is_file()}
    assert files == {entry["file"] for entry in entries}
    return {entry["row"]: entry for entry in entries}


@pytest.mark.usefixtures("one_thread")
def test_pictures_are_those_of_one_process(
    tmp_path: Path,
    cluster: str,
    without_ray: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Drawn by two workers, in a folder that is told from here; then what has changed, and all in a tar."""
    prompts, out = write(tmp_path, PROMPTS[:8]), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    assert main(command(prompts, out.name, "--cluster", cluster)) == 0
    entries = check_all(out, 8)
    without_ray()
    assert main(["generate", "--prompts", str(prompts), "--out", str(tmp_path / "one.png"), *SMALL]) == 0
    expected = [(tmp_path / f"one-{row + 1:04d}.png").read_bytes() for row in range(8)]
    assert [(out / entries[row]["file"]).read_bytes() for row in range(8)] == expected

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert main(command(prompts, out)) == 0 and caplog.messages == ["Nothing is left to draw."]
    prompts.write_text("\n".join([*PROMPTS[:3], "a white star", *PROMPTS[4:9]]))
    assert main(command(prompts, out)) == 0
    changed = {path.name for path in out.rglob("*.png") if path.stat().st_mtime_ns != before.get(path)}
    assert changed == {"000000003.png", "000000008.png"}
    check_all(out, 9)
    for more in (["--seed", "1"], ["--format", "webdataset"]):
        for place in (out, out.as_uri()):
            assert main(command(prompts, place, *more)) == 1
            assert f"{place} holds another drawing" in capsys.readouterr().err

    shards = tmp_path / "shards"
    prompts.write_text("\n".join(PROMPTS[:8]))
    assert main(command(prompts, shards.as_uri(), "--format", "webdataset")) == 0
    with tarfile.open(shards / "pictures" / "000000.tar") as tar:
        assert [tar.extractfile(f"{row:09d}.png").read() for row in range(8)] == expected
    assert [path.name for path in (shards / "pictures").iterdir()] == ["000000.tar"]
    assert parquet.read_table(shards / "manifest")["file"].to_pylist() == ["pictures/000000.tar"] * 8


def start(prompts: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """In a session of its own, as a terminal would start it."""
    arguments = [sys.executable, "-m", "sana", *command(prompts, out, *more)]
    return subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)


def pictures(out: Path) -> dict[Path, int]:
    """When each was written; those that are finished."""
    found = [Path(folder, name) for folder, _, names in os.walk(out) for name in names if name.endswith(".png")]
    return {path: path.stat().st_mtime_ns for path in found}


def test_what_is_killed_goes_on(tmp_path: Path, cluster: str, without_ray: Callable[[], None]) -> None:
    """A worker, and then the driver."""
    prompts, out = write(tmp_path, PROMPTS), tmp_path / "out"
    process = start(prompts, out, "--cluster", cluster)
    wait_until(lambda: len(pictures(out)) >= 2)
    workers = [found for found in psutil.process_iter(["name"]) if found.info["name"].startswith("ray::_Actor")]
    workers[0].kill()
    seen = len(pictures(out))
    wait_until(lambda: len(pictures(out)) >= min(seen + 2, len(PROMPTS)))
    process.kill()
    process.communicate()
    kept = pictures(out)
    without_ray()
    assert main(command(prompts, out)) == 0
    assert all(path.stat().st_mtime_ns == time_of for path, time_of in kept.items())
    check_all(out, len(PROMPTS))


@pytest.mark.skipif(os.name == "nt", reason="there Ctrl-C reaches a process in other ways")
def test_an_interrupted_run_ends_after_what_is_in_flight(tmp_path: Path) -> None:
    """With a Ray of its own, whose processes are those of the terminal too."""
    prompts, out = write(tmp_path, PROMPTS * 20), tmp_path / "out"
    process = start(prompts, out)
    wait_until(lambda: len(pictures(out)) >= 3)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopping after the pictures in flight" in told and "Traceback" not in told
    entries = parquet.read_table(out / "manifest").to_pylist()
    files = {path.relative_to(out).as_posix() for path in (out / "pictures").rglob("*") if path.is_file()}
    assert {entry["file"] for entry in entries} == files and len(entries) == len(files) < 480


def test_rows_that_fail_are_told_and_tried_again(
    tmp_path: Path,
    without_ray: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    without_ray()
    prompts, out, picture = tmp_path / "prompts.csv", tmp_path / "out", tmp_path / "picture.png"
    prompts.write_text(f"prompt,image,colour\na red circle,,x\na blue circle,{picture},\n")
    assert main(command(prompts, out)) == 1
    assert f"row 1: {picture}" in capsys.readouterr().err
    assert "The column 'colour' is not known and does not count." in caplog.messages
    assert main(command(prompts, out)) == 1
    assert caplog.messages[-2:] == [
        "Nothing is left to draw.",
        "Could not be drawn, as manifest/ tells: 1; --retry-failed tries them again.",
    ]
    Image.new("RGB", (64, 64)).save(picture)
    assert main(command(prompts, out, "--retry-failed")) == 0
    check_all(out, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch-size", "0"], "--batch-size is 0; at least 1 is needed"),
        (["--out", ""], "give --prompts FILE and --out FOLDER"),
        (["--workers", "0"], "--workers is 0; at least 1 is needed"),
        (["--overwrite"], "--workers goes on in its folder and overwrites nothing"),
        (["--cluster", "127.0.0.1:1"], "the Ray cluster at 127.0.0.1:1 does not answer"),
        (["--model", "nowhere"], "nowhere"),
        (["--height", "65"], "65"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    assert main(command(write(tmp_path, PROMPTS), tmp_path / "out", *change)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


def test_a_folder_is_of_one_command_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a folder \u00fc"
    out.mkdir()
    with (out / "drawing.lock").open("wb") as file:
        assert lock(file)
        assert main(command(write(tmp_path, PROMPTS), out)) == 1
    assert f"error: another drawing is at work in {out}; wait until it ends" in capsys.readouterr().err


def test_options_of_workers_need_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--cluster", "auto"], ["--retry-failed"], ["--devices-per-worker", "1"], ["--format", "webdataset"]):
        assert main(["generate", "a red circle", "--out", str(tmp_path / "p.png"), *more]) == 1
        assert "are of --workers; give that as well" in capsys.readouterr().err
    assert main(["generate", "a red circle", "--workers", "2"]) == 1
    assert "give --prompts FILE and --out FOLDER" in capsys.readouterr().err


def test_workers_can_tell_whether_they_have_the_files_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever Ray takes it, what a run has to read is read there."""
    given: list[Run] = []
    monkeypatch.setattr("sana.cluster.command.generate", lambda prompts, run, workers, **_: given.append(run) or 0)
    picture = tmp_path / "mask.png"
    Image.new("RGB", (64, 64)).save(picture)
    assert main([*command(write(tmp_path, PROMPTS), tmp_path / "out"), "--image", str(picture)]) == 0
    run = cloudpickle.loads(cloudpickle.dumps(given[0]))
    assert run.read() == run.files
    Image.new("RGB", (64, 64), "red").save(picture)
    assert run.read() != run.files


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in [name for name in sys.modules if name.startswith("sana.cluster.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(command(write(tmp_path, PROMPTS), tmp_path / "out")) == 1
    assert capsys.readouterr().err == (
        'error: --workers needs the package ray; run pip install ".[cluster]" in the folder of this project\n'
    )
