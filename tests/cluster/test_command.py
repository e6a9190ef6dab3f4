"""`sana generate --workers` as its user runs it: the demo model on a real Ray, stopped and killed on its way."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
import ray
from pyarrow import parquet

import sana
from sana.__main__ import main
from sana.jobs import read_record

ROOT = Path(sana.__file__).parents[1]
SMALL = ("--height", "64", "--width", "64", "--steps", "2")
PROMPTS = [f"{['a', 'two', 'three'][i % 3]} {['red', 'blue', 'green', 'yellow'][i % 4]} circles" for i in range(24)]


@pytest.fixture(autouse=True)
def no_ray() -> Iterator[None]:
    yield
    ray.shutdown()


def command(prompts: Path, out: Path, *more: str) -> list[str]:
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


def test_pictures_are_those_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = write(tmp_path, PROMPTS[:12]), tmp_path / "out"
    assert main(command(prompts, out)) == 0
    entries = check_all(out, 12)
    alone = ["generate", "--prompts", str(prompts), "--out", str(tmp_path / "one.png"), *SMALL]
    subprocess.run(
        [sys.executable, "-m", "sana", *alone], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for row, entry in entries.items():
        assert (out / entry["file"]).read_bytes() == (tmp_path / f"one-{row + 1:04d}.png").read_bytes()

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    prompts.write_text("\n".join([*PROMPTS[:3], "a white star", *PROMPTS[4:13]]))
    assert main(command(prompts, out)) == 0
    changed = {path.name for path in out.rglob("*.png") if path.stat().st_mtime_ns != before.get(path)}
    assert changed == {"000000003.png", "000000012.png"}

    assert main(command(prompts, out, "--seed", "1")) == 1
    assert "holds another drawing" in capsys.readouterr().err


def start(prompts: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """In a session of its own, as a terminal would start it."""
    arguments = [sys.executable, "-m", "sana", *command(prompts, out, *more)]
    return subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)


def wait_for_pictures(out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(out.rglob("*.png"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_what_is_killed_goes_on(tmp_path: Path, victim: str) -> None:
    prompts, out = write(tmp_path, PROMPTS), tmp_path / "out"
    process = start(prompts, out)
    wait_for_pictures(out, 3)
    if victim == "worker":
        workers = [
            child for child in psutil.Process(process.pid).children(recursive=True) if "ray::_Actor" in child.name()
        ]
        workers[0].kill()
        assert process.wait(timeout=180) == 0
    else:
        process.kill()
        process.wait()
        kept = {path: path.stat().st_mtime_ns for path in out.rglob("[0-9]*.png")}
        time.sleep(3)  # Ray ends its processes
        assert main(command(prompts, out)) == 0
        assert all(path.stat().st_mtime_ns == time_of for path, time_of in kept.items())
    process.stderr.close()
    check_all(out, len(PROMPTS))


def test_an_interrupted_run_ends_after_what_is_in_flight(tmp_path: Path) -> None:
    prompts, out = write(tmp_path, PROMPTS * 20), tmp_path / "out"
    process = start(prompts, out)
    wait_for_pictures(out, 3)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopping after the pictures in flight" in told and "Traceback" not in told
    entries = parquet.read_table(out / "manifest").to_pylist()
    files = {path.relative_to(out).as_posix() for path in (out / "pictures").rglob("*") if path.is_file()}
    assert {entry["file"] for entry in entries} == files and len(entries) == len(files) < 400


def test_rows_that_fail_are_told_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    prompts, out = tmp_path / "prompts.csv", tmp_path / "out"
    prompts.write_text("prompt,image,colour\na red circle,,x\na blue circle,picture.png,\n")
    assert main(command(prompts, out)) == 1
    assert "row 1: picture.png" in capsys.readouterr().err
    assert "The column 'colour' is not known and does not count." in caplog.messages
    assert main(command(prompts, out)) == 0
    prompts.write_text("prompt,image\na red circle,\na blue circle,\n")
    assert main(command(prompts, out, "--retry-failed")) == 0
    check_all(out, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
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


def test_options_of_workers_need_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--cluster", "auto"], ["--retry-failed"], ["--devices-per-worker", "1"]):
        assert main(["generate", "a red circle", "--out", str(tmp_path / "p.png"), *more]) == 1
        assert "are of --workers; give that as well" in capsys.readouterr().err
    assert main(["generate", "a red circle", "--workers", "2"]) == 1
    assert "give --prompts FILE and --out FOLDER" in capsys.readouterr().err


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in [name for name in sys.modules if name.startswith("sana.cluster.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(command(write(tmp_path, PROMPTS), tmp_path / "out")) == 1
    assert capsys.readouterr().err == (
        'error: --workers needs the package ray; run pip install ".[cluster]" in the folder of this project\n'
    )
