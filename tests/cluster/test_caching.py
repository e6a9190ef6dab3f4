"""Pictures and captions for training, encoded by workers of a real Ray."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from sana.cluster import engine
from sana.cluster.places import PlaceError
from sana.training import caching
from sana.training.__main__ import main
from sana.training.material import ModelFiles
from sana.training.shards import Shards
from tests.training.drawn import draw_pictures

CPU = torch.device("cpu")


def states(folder: Path) -> dict[bytes, tuple[object, ...]]:
    """What the shards hold, each key once."""
    rows = [row for path in Shards(folder).paths for row in pq.read_table(path).to_pylist()]
    found = {row["key"]: (row["dtype"], row["shape"], row["data"]) for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.usefixtures("one_thread")
def test_states_are_those_of_one_process(
    tmp_path: Path,
    cluster: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a mask, a picture that is there twice, one whose end is missing, whose caption is also another's, and one that is
    none; then these are mended.
    """
    monkeypatch.setattr(engine, "SHARD_SIZE", 2)
    draw_pictures(data := tmp_path / "pictures", 7)
    Image.new("L", (256, 256), 255).save(data / "2-masklabel.png")
    (data / "5.png").write_bytes((data / "3.png").read_bytes())
    (data / "4.txt").write_bytes((data / "0.txt").read_bytes())
    Image.open(data / "0.png").save(data / "0.jpg")
    (data / "0.png").unlink()
    whole = {name: (data / name).read_bytes() for name in ("0.jpg", "6.png")}
    one, many = tmp_path / "one", tmp_path / "many"
    command = ["cache", "--data", str(data), "--out"]
    assert main([*command, str(one)]) == 0
    (data / "0.jpg").write_bytes(whole["0.jpg"][:-60])  # of which the size can still be read
    (data / "6.png").write_bytes(b"none")
    expected = states(one)
    capsys.readouterr()
    try:
        assert main([*command, str(many), "--workers", "2", "--cluster", cluster]) == 1
    finally:
        ray.shutdown()
    found = capsys.readouterr()
    assert f"{data / '0.jpg'}: {data / '0.jpg'} cannot be read as a picture" in found.err
    assert caplog.messages == [f"{data / '6.png'} is not a picture; give a PNG or JPEG file"]
    assert found.out.splitlines()[-1] == f"{many}: 5 pictures, 10 states of them and 0 others"
    kept = states(many)
    assert len(expected) == 13 and len(kept) == 10 and kept.items() <= expected.items()
    before = {path: path.stat().st_mtime_ns for path in Shards(many).paths}
    assert len(before) > 1
    for name, content in whole.items():
        (data / name).write_bytes(content)
    assert main([*command, str(many)]) == 0
    assert states(many) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_what_a_worker_finds_done_is_not_done_again(tmp_path: Path) -> None:
    """As it may where another has ended after it had written a shard. Other networks than those of the keys are refused."""
    draw_pictures(data := tmp_path / "pictures", 2)
    (folder := tmp_path / "states").mkdir()
    files = ModelFiles()
    given: list[object] = []

    def no_workers(missing: list[tuple[Path, object]], make: object, *_: object, **__: object) -> tuple[int, int]:
        given.extend([make, *(thing for _, thing in missing)])
        return 0, 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "treat_all", no_workers)
        found = caching.fill_on_workers(folder, data, files, caching.Choice(), caching.Workers(1))
    assert found == (2, 0, 0, 0)
    make, *things = given
    first, second = make(), make()
    assert first(things[:1]) == [1]
    assert second(things) == first(things) == [1, 1]
    assert len(states(folder)) == 4
    assert caching.fill_on_workers(folder, data, files, caching.Choice(), caching.Workers(1)) == (2, 4, 4, 0)
    encoders = caching.load_encoders(files, CPU)
    with pytest.raises(ValueError, match="^the autoencoder or the text encoder is another one here; copy the same"):
        caching.encode_together(folder, files, CPU, encoders.latents, b"another")


def test_a_disk_that_is_full_is_no_fault_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, rows: object) -> None:
        raise OSError("it cannot be written (No space left on device)")

    encoders = caching.load_encoders(ModelFiles(), CPU)
    treat = caching.encode_together(tmp_path, ModelFiles(), CPU, encoders.latents, encoders.texts)
    monkeypatch.setattr(caching, "write_shards", full)
    with pytest.raises(PlaceError, match="No space left on device"):
        treat([])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cluster", "auto"], "--cluster and --devices-per-worker are of --workers; give that as well"),
        (["--devices-per-worker", "1"], "--cluster and --devices-per-worker are of --workers; give that as well"),
        (["--workers", "0"], "--workers is 0; at least 1 is needed"),
    ],
)
def test_workers_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    for command in (["cache", "--out", str(tmp_path / "out")], ["captions", "score"]):
        assert main([*command, "--data", str(tmp_path), *more]) == 1
        assert capsys.readouterr().err == f"error: {message}\n"
