"""States of pictures: computed once and no more often, by several processes, and what batches make of them."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from sana.loading import MODELS
from sana.saving import lock
from sana.training import states as module
from sana.training.__main__ import main
from sana.training.captions import Caption, Choice
from sana.training.digests import Digests, fingerprint
from sana.training.pictures import Picture, read_pictures
from sana.training.shards import Shards, write_shards
from sana.training.states import Encoders, PictureStates, cached, write_states
from tests.sana.mishaps import no_file_above
from tests.sana.models import autoencoder, text_encoder
from tests.training.drawn import draw_pictures
from tests.training.stored import WIDTH, stored

CAPTIONS = (Caption("prompt", "a", 30.0), Caption("VILA", "b", 15.0), Caption("x", "c", 10.0))


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    encoder = text_encoder()
    return Encoders.of(autoencoder(), encoder, fingerprint(encoder.model.state_dict()))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draw_pictures(tmp_path / "pictures", 4)
    return tmp_path / "pictures"


def taken(folder: Path, choice: Choice, steps: int, size: int) -> Counter[int]:
    """How often each of three captions, whose texts are 0, 1 and 2, is taken of the same picture."""
    texts = [torch.full((i + 1, WIDTH), float(i)) for i in range(3)]
    states = stored(folder / f"{choice.way} {steps}", [torch.zeros(32, 2, 2)], CAPTIONS, texts, choice)
    found: Counter[int] = Counter()
    for step in range(steps):
        batch = states.batch(step, 0, size=size)
        assert batch.text_mask.sum(dim=1).tolist() == (batch.text[:, 0, 0] + 1).tolist()  # each with its own length
        found.update(batch.text[:, 0, 0].int().tolist())
    return found


def test_a_batch_has_captions_as_often_as_their_scores_say(tmp_path: Path) -> None:
    """2 to 1 of those above the threshold: within four standard deviations of 1200."""
    found = taken(tmp_path, Choice("score", threshold=12, temperature=1), 30, 40)
    assert abs(found[0] - 800) < 4 * (1200 * 2 / 9) ** 0.5 and found[0] + found[1] == 1200


def test_a_step_has_the_next_caption(tmp_path: Path) -> None:
    counts = [taken(tmp_path, Choice("turn"), steps, 1) for steps in range(5)]
    assert [after - before for before, after in zip(counts, counts[1:], strict=False)] == [
        Counter([0]),
        Counter([1]),
        Counter([2]),
        Counter([0]),
    ]
    assert taken(tmp_path, Choice("best"), 5, 2) == Counter({0: 10})


def test_batches_are_the_same_wherever_a_training_begins(tmp_path: Path) -> None:
    """Of one size, and with numbers of their own for noise; several processes have different pictures."""
    sizes = [(1, 2) if i % 3 else (2, 1) for i in range(30)]
    made = [
        stored(tmp_path / "states", [torch.full((32, *size), float(i)) for i, size in enumerate(sizes)], processes=2)
    ]
    made.append(PictureStates(*_again(made[0], sizes)))
    first = [made[0].batch(step, process, size=4, seed=7) for step in range(9) for process in range(2)]
    again = [made[1].batch(step, process, size=4, seed=7) for step in reversed(range(9)) for process in (1, 0)][::-1]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.latents, two.latents) and one.seed == two.seed
    assert len({batch.seed for batch in first}) == 18
    for one, two in zip(first[::2], first[1::2], strict=True):
        assert one.latents.shape == two.latents.shape
        seen = [*one.latents[:, 0, 0, 0].tolist(), *two.latents[:, 0, 0, 0].tolist()]
        assert len({*seen}) == 8
    assert not torch.equal(first[0].latents, made[0].batch(0, 0, size=4, seed=8).latents)


def _again(states: PictureStates, sizes: list[tuple[int, int]]) -> tuple[object, ...]:
    """The same states, read anew."""
    pictures = [Picture(Path("a"), (Caption("prompt", "a"),), (32 * height, 32 * width)) for height, width in sizes]
    keys = [module.Keys(i.to_bytes(16, "big"), ((-1).to_bytes(16, "big", signed=True),), None) for i in range(30)]
    return Shards(states.shards.paths[0].parent), pictures, keys, states.null, states.choice, 2


def test_only_what_may_be_taken_is_encoded(pictures: Path, tmp_path: Path, encoders: Encoders) -> None:
    """And a caption that comes later is encoded alone."""
    for name in ("2", "3"):
        for end in ("png", "txt"):
            (pictures / f"{name}.{end}").unlink()
    (pictures / "0_VILA.json").write_text('{"0": {"VILA": "another caption"}}')
    for name, score in (("prompt", 10), ("VILA", 20)):
        (pictures / f"0_{name}_clip_score.json").write_text(f'{{"0": {{"{name}": {score}}}}}')
    best, other = read_pictures(pictures, 256, Choice("best"))
    assert best.captions == (Caption("VILA", "another caption", 20.0),) and other.captions[0].name == "prompt"
    both, _ = read_pictures(pictures, 256)
    assert [caption.name for caption in both.captions] == ["prompt", "VILA"]
    for chosen, rows in (([best, other], 4), ([both, other], 5)):
        (found,) = cached(tmp_path / "states", [chosen], encoders, Choice())
        assert len(found.shards) == rows
        for i, picture in enumerate(chosen):
            assert found.starts[i + 1] - found.starts[i] == len(picture.captions)
            for j, caption in enumerate(picture.captions):
                expected, mask = encoders.text_encoder([caption.text])
                assert torch.equal(found.text(i, j), expected[0][mask[0]].bfloat16().float())


def test_a_picture_whose_captions_have_no_scores_is_named(pictures: Path) -> None:
    (pictures / "1_VILA.json").write_text('{"1": {"VILA": "another caption"}}')
    with pytest.raises(ValueError, match="^1.png: none of the captions prompt, VILA has a score"):
        read_pictures(pictures, 256, Choice("score"))


def repaint(pictures: Path) -> None:
    """Another picture of the same length, with the time of the old one, but later by a moment."""
    path = pictures / "1.png"
    before = path.stat()
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def mask(pictures: Path) -> None:
    picture = Image.new("L", (256, 256))
    picture.paste(255, (0, 0, 32, 64))
    picture.save(pictures / "0-masklabel.png")


def move(pictures: Path) -> None:
    """Into another folder, with another time; the same bytes need no encoding."""
    (pictures / "new").mkdir()
    for name in ("3.png", "3.txt"):
        shutil.move(pictures / name, pictures / "new" / name)
    os.utime(pictures / "new" / "3.png")


def nothing(pictures: Path) -> None:
    os.utime(pictures / "2.png")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (nothing, []),
        (move, []),
        (repaint, ["latent"]),
        (lambda pictures: (pictures / "0.txt").write_text("another caption"), ["text"]),
        (lambda pictures: shutil.copy(pictures / "0.png", pictures / "1.png"), []),
        (mask, ["weight"]),
    ],
    ids=["nothing", "moved", "picture", "caption", "same picture", "mask"],
)
def test_what_has_changed_is_encoded_anew_and_nothing_else(
    pictures: Path, tmp_path: Path, encoders: Encoders, change: Callable[[Path], object], expected: list[str]
) -> None:
    """As are other sizes and other encoders; what was there stays as it is."""
    (before,) = cached(folder := tmp_path / "states", [read_pictures(pictures, 256)], encoders, Choice())
    files = {path: path.read_bytes() for path in before.shards.paths}
    change(pictures)
    (after,) = cached(folder, [found := read_pictures(pictures, 256)], encoders, Choice())
    assert {path: path.read_bytes() for path in files} == files
    new = [row["shape"] for path in after.shards.paths if path not in files for row in _rows(path)]
    kinds = {32: "latent", 1: "weight"}
    assert [kinds.get(shape[0] if len(shape) == 3 else 0, "text") for shape in new] == expected
    for i, picture in enumerate(found):
        image = module.to_tensor(module.read_picture(picture.path), *picture.size)
        latent = encoders.autoencoder.encode(image)[0] * encoders.autoencoder.config.latent_scale
        torch.testing.assert_close(after._cells(after.latents[i], i, 32), latent.half().float(), atol=2e-3, rtol=2e-3)


def _rows(path: Path) -> list[dict[str, object]]:
    return pq.read_table(path).to_pylist()


def test_masks_are_in_batches_where_a_picture_has_one(pictures: Path, tmp_path: Path, encoders: Encoders) -> None:
    (plain,) = cached(tmp_path / "states", [read_pictures(pictures, 256)], encoders, Choice())
    assert plain.weights is None and plain.batch(0, 0, size=2).weight is None
    mask(pictures)
    (states,) = cached(tmp_path / "states", [read_pictures(pictures, 256)], encoders, Choice())
    expected = torch.zeros(1, 8, 8)
    expected[0, :2, 0] = 32.0
    assert torch.equal(states._weight(0), expected) and torch.equal(states._weight(1), torch.ones(1, 6, 10))
    for step in range(4):
        batch = states.batch(step, 0, size=2)
        assert batch.weight.shape == (2, 1, *batch.latents.shape[2:])
        assert batch.weight.mean().item() == pytest.approx(1)


def test_states_of_other_encoders_and_sizes_are_not_used(pictures: Path, tmp_path: Path, encoders: Encoders) -> None:
    (states,) = cached(folder := tmp_path / "states", [read_pictures(pictures, 256)], encoders, Choice())
    assert (len(states.shards), states.used()) == (8, 8)
    other = text_encoder()
    other.model = nn.Module.float(other.model)
    weight = next(iter(other.model.parameters()))
    weight.data = weight.data.clone()
    weight.data.flatten()[0] += 1
    changed = Encoders.of(encoders.autoencoder, other, fingerprint(other.model.state_dict()))
    assert changed.latents == encoders.latents and changed.texts != encoders.texts
    (states,) = cached(folder, [read_pictures(pictures, 256)], changed, Choice())
    assert (len(states.shards), states.used()) == (12, 8)
    (states,) = cached(folder, [read_pictures(pictures, 512)], encoders, Choice())
    assert (len(states.shards), states.used()) == (16, 8)


def test_the_print_of_a_network_tells_its_numbers_and_not_its_format() -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 4)
    first = fingerprint(network.state_dict())
    network.weight.data = network.weight.data.bfloat16().float()
    assert fingerprint(network.state_dict()) == fingerprint(network.bfloat16().state_dict()) == first
    network.weight.data[3, 2] *= 1.01
    assert fingerprint(network.state_dict()) != first
    assert fingerprint(nn.Sequential(network).state_dict()) != fingerprint(network.state_dict())


def test_several_processes_encode_everything_once(pictures: Path, tmp_path: Path, encoders: Encoders) -> None:
    found = read_pictures(pictures, 256)
    digests = Digests(tmp_path / "digests")
    keys = [(picture, encoders.keys(picture, digests)) for picture in found]
    (folder := tmp_path / "states").mkdir()
    listed = Shards(folder)
    for process in range(3):  # all of them look before any has written
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "Shards", lambda _: listed)
            write_states(folder, keys, encoders, process, 3)
    shards = Shards(folder)
    assert len(shards.paths) == 3 and len(shards) == 8
    null = encoders.text_encoder([""], None)[0][0]
    states = PictureStates(shards, found, [each for _, each in keys], null, Choice())
    assert states.used() == 8


def test_a_full_disk_while_encoding_is_told_and_the_next_try_goes_on(
    pictures: Path, tmp_path: Path, encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sana.training.shards.SHARD_ROWS", 1)
    found = [read_pictures(pictures, 256)[1:]]  # the first has the smaller size
    (sample := tmp_path / "sample").mkdir()
    write_shards(sample, [(bytes(16), torch.zeros(32, 8, 8).half())])
    (path,) = sample.iterdir()
    full = no_file_above(path.stat().st_size - 1)
    with pytest.raises(OSError, match="cannot be written .*; make room, or give a place"), full:
        cached(folder := tmp_path / "states", found, encoders, Choice())
    left = sorted(path.name for path in folder.iterdir())
    kept = Shards(folder)
    assert left == ["digests.parquet", "run.json", kept.paths[0].name, "training.lock"] and len(kept) == 1
    before = {path: path.stat().st_mtime_ns for path in kept.paths}
    (states,) = cached(folder, found, encoders, Choice())
    assert states.used() == len(states.shards) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_broken_picture_is_named_before_any_is_encoded(pictures: Path, tmp_path: Path, encoders: Encoders) -> None:
    (path := pictures / "2.png").write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"2\.png cannot be read as a picture"):
        cached(folder := tmp_path / "states", [read_pictures(pictures, 256)], encoders, Choice())
    assert not [*folder.glob("*-*.parquet")]


def test_pictures_that_are_far_too_small_are_told(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, side in (("1", 10), ("2", 63), ("3", 64)):
        Image.new("RGB", (side, side)).save(pictures / f"{name}.png")
    assert [picture.size for picture in read_pictures(pictures, 256)[1:]] == [(256, 256)] * 3
    assert caplog.messages == [
        "2 of 4 pictures are scaled up by more than 4, first 1.png, and teach blur; leave them out, or give larger ones."
    ]


def test_a_huge_picture_is_refused_by_its_header(pictures: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(pictures / "1.png")
    begun = time.monotonic()
    with pytest.raises(
        ValueError, match=r"1\.png has more than 67,108,864 px, which is 8192 x 8192; make it smaller first"
    ):
        read_pictures(pictures, 256)
    assert time.monotonic() - begun < 1


def test_a_hash_is_computed_where_a_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    digests = Digests(tmp_path / "digests")
    first = digests.of(path)
    digests.save()
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Digests(digests.path).of(path) == first  # of the same size and time: it was not read
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 1))
    assert Digests(digests.path).of(path) != first
    digests.path.write_bytes(b"damaged")
    assert Digests(digests.path).known == {}


def cache(pictures: Path, folder: Path, *more: str) -> int:
    return main(["cache", "--data", str(pictures), "--out", str(folder), *more])


def test_a_cache_is_filled_once_and_trained_from(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    assert cache(pictures, folder) == 0
    assert capsys.readouterr().out == f"{folder}: 4 pictures, 8 states of them and 0 others\n"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    out = tmp_path / "out"
    train = ["--data", str(pictures), "--steps=1", "--sheet-every=0", "--batch-size=1", "--cache", str(folder)]
    assert main(["finetune", "--out", str(out), *train]) == 0
    assert main(["lora", "--out", str(tmp_path / "lora"), *train]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")} == before
    assert not (out / "states").exists() and not (tmp_path / "lora" / "states").exists()
    (pictures / "0.txt").write_text("another caption")
    capsys.readouterr()
    assert cache(pictures, folder) == 0
    assert capsys.readouterr().out == f"{folder}: 4 pictures, 8 states of them and 1 others\n"


def test_two_commands_do_not_fill_one_cache(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder := tmp_path / "cache").mkdir()
    with (folder / "training.lock").open("wb") as file:
        assert lock(file)
        assert cache(pictures, folder) == 1
    assert capsys.readouterr().err == (
        f"error: another training is at work in {folder}; wait until it ends, or give another --out\n"
    )


def test_a_folder_of_a_training_is_no_cache(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder := tmp_path / "work").mkdir()
    (folder / "run.json").write_text('{"data": "elsewhere"}')
    assert cache(pictures, folder, "--model", str(MODELS["demo"])) == 1
    assert f"{folder} holds another training (data elsewhere); give another --out" in capsys.readouterr().err
    for command in ("lora", "finetune"):
        train = ["--data", str(pictures), "--out", str(tmp_path / command), "--cache", str(folder)]
        assert main([command, *train]) == 1
        assert f"{folder} holds another training (data elsewhere); give another --cache" in capsys.readouterr().err
