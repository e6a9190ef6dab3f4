"""What lost workers cost, by the size of a shard: python -m bench.preemption. Prints a table and writes results/preemption.json.

A simulation, since nobody publishes how often a cluster loses a GPU: workers draw shards from one queue; a worker is lost at
random moments, with all of its shard, and a new one begins after a while. Counted is the time until the last picture is
written, against that of workers that are never lost and always busy.
"""

import argparse
import heapq
import random
from pathlib import Path

from .machine import write_result

RESTART = 120.0  # seconds until a new worker draws: another machine, and the model read from a disk
SHARDS = (1, 250, 1000, 10_000)  # pictures
HOURS = (1000.0, 24.0, 4.0)  # between two losses of a worker, on average


def overhead(pictures: int, shard: int, workers: int, seconds: float, hours: float, chance: random.Random) -> float:
    """Share of time that is lost. seconds: of a picture."""
    waiting = [shard] * (pictures // shard) + ([pictures % shard] if pictures % shard else [])
    free = [(0.0, worker) for worker in range(workers)]  # when each is
    running: list[tuple[float, int]] = []
    end = 0.0
    while waiting or running:
        while running and (not waiting or (free and running[0][0] <= free[0][0])):
            lost_at, size = heapq.heappop(running)  # it comes back only when its worker has ended
            waiting.append(size)
            free = [(max(time, lost_at), worker) for time, worker in free]
            heapq.heapify(free)
        now, worker = heapq.heappop(free)
        size = waiting.pop()
        takes = size * seconds
        lost_after = chance.expovariate(1 / (3600 * hours))
        if lost_after < takes:
            heapq.heappush(running, (now + lost_after, size))
            heapq.heappush(free, (now + lost_after + RESTART, worker))
        else:
            end = max(end, now + takes)
            heapq.heappush(free, (now + takes, worker))
    return end / (pictures * seconds / workers) - 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.preemption", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a picture (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: the one in results/)")
    options = parser.parse_args()
    chance = random.Random(0)
    rows = []
    print("| pictures a shard | " + " | ".join(f"a loss in {hours:g} h" for hours in HOURS) + " |")
    print("|---|" + "---:|" * len(HOURS))
    for shard in SHARDS:
        found = [overhead(options.pictures, shard, options.workers, options.seconds, hours, chance) for hours in HOURS]
        rows.append({"shard": shard, "overhead": dict(zip(map(str, HOURS), found, strict=True))})
        print(f"| {shard:,} | " + " | ".join(f"{100 * share:.1f} %" for share in found) + " |", flush=True)
    result = {"pictures": options.pictures, "workers": options.workers, "seconds": options.seconds, "rows": rows}
    print(write_result("preemption", result, options.out))


if __name__ == "__main__":
    main()
