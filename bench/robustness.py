"""What damaged and hostile inputs do to the package: python -m bench.robustness. Writes results/robustness.json.

Every input is made from a seed (`inputs`), goes through the package's own entries (`readers`) in a process that is watched,
and its answer is judged (`judging`). An answer that is not clear is listed with its kind and seed, by which it is repeated alone:
python -m bench.robustness --kind KIND --seed SEED --inputs 1.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from .inputs import KINDS
from .inputs.originals import write_originals
from .judging import BYTES, PICTURE_BYTES, SECONDS, Answer, Worker
from .machine import write_result

INPUTS = 10_000
BATCH = 50  # inputs of a kind that one process reads after another


@dataclass
class Count:
    """What became of the inputs of a kind: each has several answers, one of every entry that reads it."""

    inputs: int = 0
    results: int = 0
    sentences: int = 0
    unclear: int = 0
    most_seconds: float = 0.0
    most_megabytes: float = 0.0

    def add(self, answers: Sequence[Answer]) -> None:
        self.inputs += 1
        for answer in answers:
            clear = answer.why is None
            self.results += clear and answer.sentence is None
            self.sentences += clear and answer.sentence is not None
            self.unclear += not clear
            self.most_seconds = max(self.most_seconds, round(answer.seconds, 2))
            self.most_megabytes = max(self.most_megabytes, round(answer.bytes / 1e6, 1))


def run(kinds: Sequence[str], inputs: int, first_seed: int, jobs: int) -> Iterator[tuple[str, int, list[Answer]]]:
    """Kind, seed and answers of so many inputs in all, as many of each kind, by so many processes at once."""
    each = -(-inputs // len(kinds))
    seeds = range(first_seed, first_seed + each)
    batches = [(kind, seeds[at : at + BATCH]) for at in range(0, each, BATCH) for kind in kinds]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        originals = Path(folder)
        write_originals(originals)

        def batch(given: tuple[str, range]) -> list[tuple[str, int, list[Answer]]]:
            kind, chosen = given
            with Worker(kind, originals) as worker:
                return [(kind, seed, worker.answers(seed)) for seed in chosen]

        for found in pool.map(batch, batches):
            yield from found


def main() -> int:
    options = parse()
    kinds = [options.kind] if options.kind else list(KINDS)
    counts = {kind: Count() for kind in kinds}
    unclear = []
    found = run(kinds, options.inputs, options.seed, options.jobs)
    for kind, seed, answers in tqdm(found, total=options.inputs, unit="input"):
        counts[kind].add(answers)
        for answer in answers:
            if answer.why is not None:
                unclear.append({"kind": kind, "seed": seed, "entry": answer.entry, "why": answer.why})
                tqdm.write(f"{kind} {seed}: {answer.entry} {answer.why}")
    print("| kind | inputs | results | sentences | unclear | most s | most MB |\n|---|---:|---:|---:|---:|---:|---:|")
    for kind, count in counts.items():
        print(f"| {kind} | {' | '.join(map(str, vars(count).values()))} |")
    result = {
        "first_seed": options.seed,
        "bound_seconds": SECONDS,
        "bound_bytes": BYTES,
        "bound_picture_bytes": PICTURE_BYTES,
    }
    result |= {"kinds": {kind: asdict(count) for kind, count in counts.items()}, "unclear": unclear}
    if options.out or not options.kind:
        print(write_result("robustness", result, options.out))
    return 1 if unclear else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.robustness", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=INPUTS, help=f"of all kinds together (default: {INPUTS})")
    parser.add_argument("--seed", type=int, default=0, help="of the first input of each kind (default: 0)")
    parser.add_argument("--kind", choices=tuple(KINDS), help="this kind alone; nothing is written without --out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: the one in results/)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
