"""Many workers on this machine: python -m bench.cluster. Prints what it finds and writes results/cluster.json.

Measured are two workers against one, with a thread each; one worker against a bare loop; the start of a worker; how soon and
in how much memory a million rows begin, with a stand-in that draws nothing; and workers and drivers killed at random moments,
after which every row must be there once. --only measures a part, and keeps the others that are in the file.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import psutil
import torch
from pyarrow import parquet

from sana.cluster.command import distinct, expanded
from sana.cluster.drawing import Run
from sana.cluster.engine import Workers, connected, draw_rows
from sana.cluster.manifest import Entry, Manifest
from sana.cluster.places import Folder
from sana.cluster.rows import Row, read_rows
from sana.jobs import save_png
from sana.pipeline import SanaPipeline
from sana.plan import Settings

from .machine import RESULTS, write_result

ROOT = Path(__file__).parents[1]
SIDE, STEPS = 256, 20  # of the demo's pictures
GIVEN_UP = "workers ended while they drew it"  # of a row, whose fault it then seems
SMALL = ("--height", "64", "--width", "64", "--steps", "2")  # where only what is there counts
COLOURS, SHAPES = ("red", "blue", "green", "yellow", "purple", "orange"), ("circles", "squares", "stars", "triangles")


class Blank:
    """A stand-in that draws nothing."""

    def __init__(self, run: Run, name: str) -> None:
        self.name = name

    def draw(self, rows: Sequence[Row], *, alone: bool = False) -> list[Entry]:
        return [Entry(row.number, row.key(), prompt=row.prompt, worker=self.name) for row in rows]


def prompt(number: int) -> str:
    return f"{2 + number % 3} {COLOURS[number % 6]} {SHAPES[number // 6 % 4]}"


def drawn(workers: int, pictures: int, folder: Path) -> dict[str, float]:
    """Seconds until Ray is there, and until the first pictures; pictures a second after each worker has given some."""
    run = Run(str(folder), {"model": "demo"}, settings={"height": SIDE, "width": SIDE, "steps": STEPS})
    rows = (Row(number, prompt(number), settings={"seed": number}) for number in range(pictures))
    start = time.perf_counter()
    with connected(Workers(workers)):
        ready = time.perf_counter()
        times: list[tuple[float, int]] = []
        share: Counter[str | None] = Counter()
        manifest = Manifest(Folder(folder))
        for entries in draw_rows(rows, run, Workers(workers)):
            for entry in entries:
                if entry.error is not None:
                    raise RuntimeError(entry.error)
                manifest.add(entry)
            share.update(entry.worker for entry in entries)
            if len(share) == workers:
                times.append((time.perf_counter(), len(entries)))
        manifest.flush()
    (first, _), *others = times
    rate = sum(count for _, count in others) / (times[-1][0] - first)
    return {"ray": ready - start, "first": first - ready, "rate": rate}


def bare(pictures: int) -> float:
    """Pictures a second of a loop in a process without Ray."""
    pipeline = SanaPipeline.load("demo", device="cpu")
    start = time.perf_counter()
    for number in range(pictures + 1):
        if number == 1:
            start = time.perf_counter()
        plan = pipeline.plan(prompt(number), Settings(height=SIDE, width=SIDE, steps=STEPS, seed=number))
        ((_, (picture,)),) = pipeline.draw([plan])
        save_png(picture, BytesIO(), plan.record())
    return pictures / (time.perf_counter() - start)


def measure_scaling(options: argparse.Namespace) -> dict[str, object]:
    """Rounds of a bare loop, one worker and two, one after the other, so that all meet the same machine."""
    rounds = []
    for _ in range(options.rounds):
        loop = float(call("bare", options.prompts // 4))
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            rounds.append({"loop": loop, "one": drawn(1, options.prompts // 2, Path(one))})
            rounds[-1]["two"] = drawn(2, options.prompts, Path(two))
        print(rounds[-1], flush=True)
    return {"prompts": options.prompts, "rounds": rounds}


def call(what: str, *arguments: object) -> str:
    """What a function here prints in a process of its own."""
    command = [sys.executable, "-m", "bench.cluster", "--print", what, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1]


def measure_stream(options: argparse.Namespace) -> dict[str, object]:
    """Seconds from opening the file to the first entry, rows a second, and memory after a tenth and at the end."""
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder, connected(Workers(2)):
        path = Path(folder, "prompts.csv")
        with path.open("w") as file:
            file.write("prompt,seed\n")
            file.writelines(f"{prompt(number)},{number}\n" for number in range(options.rows))
        start, first, done, early = time.perf_counter(), 0.0, 0, 0
        manifest = Manifest(Folder(Path(folder)))
        rows = distinct(expanded(read_rows(path), 1, 0))
        for entries in draw_rows(rows, Run("", {}), Workers(2), drawer=Blank):
            first = first or time.perf_counter() - start
            for entry in entries:
                manifest.add(entry)
            done += len(entries)
            if not early and done >= options.rows / 10:
                early = process.memory_info().rss
        manifest.flush()
        seconds = time.perf_counter() - start
        return {
            **{"rows": options.rows, "first": first, "rows_per_second": done / seconds},
            **{
                "memory_after_a_tenth": early,
                "memory_at_the_end": process.memory_info().rss,
                "once": done == options.rows,
            },
        }


def measure_kills(options: argparse.Namespace) -> dict[str, object]:
    """Runs with two workers, each killed at several moments until it is done: a worker, or one time in four the driver."""
    chance = random.Random(options.seed)
    kills: Counter[str] = Counter()
    runs = rows = 0
    while kills.total() < options.kills:
        with tempfile.TemporaryDirectory() as folder:
            path, out = Path(folder, "prompts.txt"), Path(folder, "out")
            path.write_text("\n".join(prompt(number) for number in range(options.rows_of_run)))
            while run_and_kill(path, out, chance, kills, options.kills):
                pass
            check(out, options.rows_of_run)
            runs, rows = runs + 1, rows + options.rows_of_run
            print(f"{dict(kills)} killed in {runs} runs: every row is there once", flush=True)
    return {"kills": dict(kills), "runs": runs, "rows": rows}


def run_and_kill(path: Path, out: Path, chance: random.Random, kills: Counter[str], most: int) -> bool:
    """Whether there is more to draw: the driver was killed, or so many workers at one row that it was given up.

    Raises RuntimeError if the command ends for another reason.
    """
    arguments = ["generate", "--prompts", str(path), "--out", str(out), "--workers", "2", "--retry-failed", *SMALL]
    with tempfile.TemporaryFile() as told:
        driver = psutil.Popen([sys.executable, "-m", "sana", *arguments], cwd=ROOT, stderr=told)
        while True:
            await_moment(driver, out / "pictures", chance)
            try:
                code = driver.wait(None if kills.total() >= most else 0)
            except psutil.TimeoutExpired:
                workers = [each for each in driver.children(recursive=True) if each.name().startswith("ray::_Actor")]
            else:
                told.seek(0)
                words = told.read().decode(errors="replace")
                if code and GIVEN_UP not in words:
                    raise RuntimeError(f"a run that was killed ended with code {code}: {words[-2000:]}")
                return bool(code)
            if workers and chance.random() < 0.75:  # a command takes three times as long to start as a worker
                chance.choice(workers).kill()
                kills["worker"] += 1
            else:
                others = driver.children(recursive=True)
                driver.kill()
                driver.wait()
                if chance.random() < 0.75:  # with all that it has started; else these end by themselves
                    for other in others:
                        with suppress(psutil.NoSuchProcess):
                            other.kill()
                psutil.wait_procs(others, timeout=30)
                kills["driver"] += 1
                return True


def await_moment(driver: psutil.Popen, pictures: Path, chance: random.Random) -> None:
    """Until the command has drawn something more and then for up to 2 s; or now and then for up to 12 s, whatever it does."""
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, 12))
        return
    before = count(pictures)
    while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE and count(pictures) == before:
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 2))


def count(pictures: Path) -> int:
    return sum(1 for _ in pictures.rglob("*.png"))


def check(out: Path, rows: int) -> None:
    """Raises RuntimeError unless every row is in the manifest once, with its picture, and there is no other."""
    entries = parquet.read_table(out / "manifest").to_pylist()
    counted = Counter(entry["row"] for entry in entries)
    files = {path.relative_to(out).as_posix() for path in (out / "pictures").rglob("*") if path.is_file()}
    right = all(entry["sha256"] == sha256((out / entry["file"]).read_bytes()).hexdigest() for entry in entries)
    if counted != Counter(range(rows)) or files != {entry["file"] for entry in entries} or not right:
        raise RuntimeError(f"{len(entries)} entries and {len(files)} pictures of {rows} rows")


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, object]]] = {
    "scaling": measure_scaling,
    "stream": measure_stream,
    "kills": measure_kills,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", choices=tuple(PARTS), help="measure this part")
    add("--prompts", type=int, default=2000, help="of the run with two workers (default: %(default)s)")
    add("--rounds", type=int, default=3, help="of which medians are taken (default: %(default)s)")
    add("--rows", type=int, default=1_000_000, help="of the stream (default: %(default)s)")
    add("--kills", type=int, default=200, help="default: %(default)s")
    add("--rows-of-run", type=int, default=400, help="of a run that is killed (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    add("--out", type=Path, help="JSON file to write (default: the one in results/ that docs/scale.md shows)")
    return parser.parse_args()


def kept(path: Path) -> Iterator[tuple[str, object]]:
    """The parts in a file of results."""
    if path.exists():
        yield from ((name, part) for name, part in json.loads(path.read_text()).items() if name in PARTS)


def main() -> None:
    if sys.argv[1:3] == ["--print", "bare"]:
        print(bare(int(sys.argv[3])))
        return
    options = parse()
    os.environ["OMP_NUM_THREADS"] = "1"  # of each worker, and of the loop
    torch.set_num_threads(1)
    result = dict(kept(options.out or RESULTS / "cluster.json"))
    for name in [options.only] if options.only else PARTS:
        result[name] = PARTS[name](options)
        print(f"{name}: {result[name]}", flush=True)
        path = write_result("cluster", result, options.out)
    print(path)


if __name__ == "__main__":
    main()
