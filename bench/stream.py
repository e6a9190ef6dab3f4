"""What streaming states from the disk costs: python -m bench.stream --work FOLDER. Writes results/stream.json.

The demo model is trained on folders of more and more pictures, whose states are random numbers of the right sizes, each in a
process of its own: resident memory after the first steps and after all, and for how long the steps wait for their batches. Then
how fast batches of the released models' sizes are read, without training.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from PIL import Image
from torch import Tensor

from sana.config import DOWNSAMPLE, LATENT_CHANNELS
from sana.pipeline import SanaPipeline
from sana.training.ahead import reading_ahead
from sana.training.captions import TURN, Caption
from sana.training.digests import Digests, fingerprint
from sana.training.flow import FlowObjective
from sana.training.loop import Report, TrainingConfig, Watch, train
from sana.training.material import ModelFiles, gathered
from sana.training.pictures import Picture, read_pictures
from sana.training.shards import Shards, write_shards
from sana.training.states import DIGESTS, Encoders, Keys, PictureStates

from .machine import write_result

COUNTS = (1_000, 10_000, 50_000)
STEPS, BATCH = 120, 4
FIRST = 20  # steps, after which everything is in memory that a step needs
SIDES = ((128, 128), (96, 160))  # of pictures, px; trained at 256 x 256 and 192 x 320
TOKENS = 40
LARGE = {"1024 px, 300 tokens": (1024, 300), "4096 px, 300 tokens": (4096, 300)}
WIDTH = 2304  # of texts


def draw_pictures(folder: Path, count: int) -> None:
    """So many pictures, no two alike, with captions of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        if not (caption := folder / f"{i:06d}.txt").exists():
            Image.new("RGB", SIDES[i % 2][::-1], (i % 251, i // 251 % 251, i // 251**2)).save(
                caption.with_suffix(".png")
            )
            caption.write_text(f"picture number {i}, " + "of one colour and nothing else, " * 6)


def write_random_states(
    folder: Path, pictures: Sequence[Picture], keys: Sequence[Keys], width: int, tokens: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def rows() -> Iterator[tuple[bytes, Tensor]]:
        for picture, each in zip(pictures, keys, strict=True):
            sides = (side // DOWNSAMPLE for side in picture.size)
            yield each.latent, torch.randn(LATENT_CHANNELS, *sides, generator=generator).half()
            for key in each.texts:
                yield key, torch.randn(tokens, width, generator=generator).bfloat16()

    write_shards(folder, rows())


def trained(work: Path, count: int) -> dict[str, object]:
    """Memory, in bytes, and share of waiting of a training on so many pictures."""
    data, out = work / f"pictures-{count}", work / f"training-{count}"
    process = psutil.Process()
    waited: list[float] = []
    resident: list[int] = []
    moments: list[float] = []
    begun = time.monotonic()
    with gathered(out, data, ModelFiles(), cache=work / f"states-{count}", every_weight=True) as material:
        opened = time.monotonic() - begun
        objective = FlowObjective(material.pipeline.transformer.train().requires_grad_(True), null=material.states.null)

        def batch(number: int, rank: int) -> object:
            moment = time.monotonic()
            found = ready(number, rank)
            waited.append(time.monotonic() - moment)
            return found

        def note(report: Report) -> None:
            resident.append(process.memory_info().rss)
            moments.append(time.monotonic())

        def source(number: int, rank: int) -> object:
            return material.states.batch(number, rank, size=BATCH)

        with reading_ahead(source) as ready:
            config = TrainingConfig(STEPS, 1e-5, save_every=STEPS, sheet_every=STEPS)
            train(objective, batch, config, out, watch=Watch(bar=False, step=note))
    return {
        "pictures": count,
        "disk": sum(path.stat().st_size for path in (work / f"states-{count}").glob("*.parquet")),
        "seconds_to_open": opened,
        "resident_first": resident[FIRST],
        "resident_last": resident[-1],
        "waited_share": sum(waited[FIRST + 1 :]) / (moments[-1] - moments[FIRST]),
        "pictures_per_second": BATCH * (STEPS - FIRST - 1) / (moments[-1] - moments[FIRST]),
    }


def prepare(work: Path, count: int) -> None:
    data, folder = work / f"pictures-{count}", work / f"states-{count}"
    draw_pictures(data, count)
    if not folder.exists():
        pipeline = SanaPipeline.load("demo")
        source = pipeline.text_encoder
        encoders = Encoders.of(pipeline.autoencoder, source, fingerprint(source.model.state_dict()))
        pictures = read_pictures(data, pipeline.identity.base_size)
        folder.mkdir()
        digests = Digests(folder / DIGESTS)
        keys = [encoders.keys(picture, digests) for picture in pictures]
        digests.save()
        write_random_states(folder, pictures, keys, pipeline.transformer.config.text_width, TOKENS)


def reading_speed(work: Path, side: int, tokens: int, count: int = 256, batches: int = 64) -> float:
    """Pictures a second, of batches as training reads them, from files that the system has in memory."""
    folder = work / f"large-{side}"
    numbers = range(count)
    keys = [Keys(i.to_bytes(16, "big"), ((count + i).to_bytes(16, "big"),), None) for i in numbers]
    pictures = [Picture(Path(f"{i}.png"), (Caption("prompt", ""),), (side, side)) for i in numbers]
    if not folder.exists():
        write_random_states(folder, pictures, keys, WIDTH, tokens)

    states = PictureStates(Shards(folder), pictures, keys, torch.zeros(300, WIDTH), TURN)
    begun = time.monotonic()
    for number in range(batches):
        states.batch(number, 0, size=BATCH)
    return batches * BATCH / (time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stream", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and states; takes 2 GB")
    parser.add_argument("--count", type=int, help="measure this number of pictures alone, and print it")
    options = parser.parse_args()
    if options.count:
        print(json.dumps(trained(options.work, options.count)))
        return
    rows = []
    for count in COUNTS:
        prepare(options.work, count)
        command = [sys.executable, "-m", "bench.stream", "--work", str(options.work), "--count", str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    speeds = {name: reading_speed(options.work, *size) for name, size in LARGE.items()}
    print(write_result("stream", {"steps": STEPS, "batch": BATCH, "rows": rows, "pictures_read_per_second": speeds}))


if __name__ == "__main__":
    main()
