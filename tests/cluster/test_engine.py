"""Workers of a real Ray, with a stand-in that draws nothing."""

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path

import psutil
import pytest
import ray

import sana
from sana.cluster import engine
from sana.cluster.drawing import Run
from sana.cluster.engine import AHEAD, MOST_ENDS, ROWS, Workers, _Queue, connected, draw_rows
from sana.cluster.manifest import Entry
from sana.cluster.rows import Row
from tests.cluster.stand_ins import Stamp

TWO = Workers(2)


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    with connected(TWO):
        yield


def rows(*prompts: str) -> list[Row]:
    return [Row(number, prompt) for number, prompt in enumerate(prompts)]


def drawn(given: list[Row], **model: object) -> dict[int, Entry]:
    found = [entry for entries in draw_rows(given, Run("", model), TWO, drawer=Stamp) for entry in entries]
    assert len(found) == len({entry.row for entry in found})
    return {entry.row: entry for entry in found}


def test_every_row_comes_back_once_from_both_workers(here: None) -> None:
    """There are rows until each worker, of which one may start long after the other, has drawn some."""
    found: list[Entry] = []
    given: list[Row] = []
    share: Counter[str | None] = Counter()

    def endless() -> Iterator[Row]:
        while len(share) < 2 or min(share.values()) < 40:
            given.append(Row(len(given), "0.002"))
            yield given[-1]

    for entries in draw_rows(endless(), Run("", {}), TWO, drawer=Stamp):
        found += entries
        share.update(entry.worker for entry in entries)
    assert share.keys() == {"worker-1", "worker-2"}
    assert sorted((entry.row, entry.key) for entry in found) == [(row.number, row.key()) for row in given]


def test_a_row_that_ends_workers_is_told_and_the_rest_is_drawn(here: None) -> None:
    given = rows(*["0.001"] * 20, "end", *["0.001"] * 20)
    found = drawn(given)
    assert sorted(found) == list(range(41))
    errors = {row: entry.error for row, entry in found.items() if entry.error is not None}
    assert errors == {20: f"{MOST_ENDS} workers ended while they drew it; try it alone, in less memory"}


def test_an_error_that_nobody_expects_is_that_of_its_batch(here: None) -> None:
    found = drawn(rows("raise"))
    assert found[0].error == "LookupError: as it was told"


def test_workers_that_are_killed_are_replaced(here: None) -> None:
    """The process that has just drawn is killed, three times."""
    found: dict[int, Entry] = {}
    killed: set[int] = set()
    for entries in draw_rows(rows(*["0.01"] * 200), Run("", {}), TWO, drawer=Stamp):
        for entry in entries:
            assert entry.error is None and entry.row not in found
            found[entry.row] = entry
        if len(killed) < 3 and len(found) > 20 * (len(killed) + 1) and entries:
            process = int(entries[-1].settings)
            if process not in killed:
                psutil.Process(process).kill()
                killed.add(process)
    assert sorted(found) == list(range(200)) and len(killed) == 3
    assert len({entry.settings for entry in found.values()} - {str(process) for process in killed}) >= 1


def test_a_worker_without_a_model_leaves_the_rest_to_others(here: None, caplog: pytest.LogCaptureFixture) -> None:
    """There are rows until it has been told."""
    given = (Row(number, "0.002") for number in takewhile(lambda _: not caplog.messages, count()))
    run = Run("", {"broken": "worker-1"})
    found = [entry for entries in draw_rows(given, run, TWO, drawer=Stamp) for entry in entries]
    assert sorted(entry.row for entry in found) == list(range(len(found)))
    assert {entry.worker for entry in found} == {"worker-2"}
    assert caplog.messages == ["worker-1 cannot start (worker-1 has no model; copy it there)."]
    with pytest.raises(ValueError, match="^no worker can start: worker-. has no model; copy it there$"):
        drawn(rows("0"), broken="all")


def test_after_a_stop_only_what_is_in_flight_is_drawn(here: None) -> None:
    found: list[Entry] = []

    def are_enough() -> bool:
        return len(found) >= 40

    for entries in draw_rows(rows(*["0.01"] * 500), Run("", {}), TWO, drawer=Stamp, stopped=are_enough):
        found += entries
    assert 40 <= len(found) < 40 + 5 * ROWS


def test_rows_are_read_as_they_are_needed(here: None) -> None:
    read = 0

    def endless() -> Iterator[Row]:
        nonlocal read
        while True:
            yield Row(read, "0")
            read += 1

    done = 0
    for entries in draw_rows(endless(), Run("", {}), TWO, drawer=Stamp):
        done += len(entries)
        assert read <= done + (AHEAD + 4 * ROWS) * 2
        if done > 1000:
            break


def test_rows_of_one_size_go_together() -> None:
    given = [Row(i, "a", settings={"height": 64 + 32 * (i % 3)}) for i in range(60)]
    queue, batches = _Queue(given, 48), []
    while not queue.is_empty():
        batches.append(queue.next())
    assert all(len({row.settings["height"] for row in batch}) == 1 for batch in batches)
    assert sorted(row.number for batch in batches for row in batch) == list(range(60))
    assert [row.number for row in batches[0]] == list(range(0, 3 * ROWS, 3)) and batches[1][0].number == 1
    assert len(batches) == 60 // ROWS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "--workers is 0"),
        ({"count": 1, "devices": -1}, "--devices-per-worker is -1"),
        ({"count": 1, "devices": 1.5}, "--devices-per-worker is 1.5"),
        ({"count": 1, "devices": float("nan")}, "--devices-per-worker is nan"),
    ],
)
def test_workers_that_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workers(**values)


def test_gpus_that_are_not_there(here: None) -> None:
    with pytest.raises(ValueError, match="--devices-per-worker is 1000, and Ray knows . GPUs; give 0"):
        list(draw_rows(rows("0"), Run("", {}), Workers(1, devices=1000), drawer=Stamp))


@contextmanager
def node(*arguments: str) -> Iterator[psutil.Process]:
    """A node of Ray by its own command, which ends with all that it has started."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", *arguments]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path(sana.__file__).parents[1])}
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        yield process
    finally:
        kill(process)


def kill(process: psutil.Process) -> None:
    for each in (*process.children(recursive=True), process):
        with suppress(psutil.NoSuchProcess):
            each.kill()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_cluster_of_two_nodes_loses_one(free_port: int) -> None:
    """Each node has a core for a worker, and one is killed with its worker while it draws."""
    ray.shutdown()
    address = f"127.0.0.1:{free_port}"
    with node("--head", f"--port={free_port}", "--include-dashboard=false"):
        wait_until(lambda: answers(free_port))
        with node(f"--address={address}") as second, connected(Workers(2, address)):
            wait_until(lambda: ray.cluster_resources().get("CPU", 0) == 2)
            found: dict[int, Entry] = {}
            killed = False
            for entries in draw_rows(rows(*["0.02"] * 300), Run("", {}), Workers(2, address), drawer=Stamp):
                found.update((entry.row, entry) for entry in entries)
                if not killed and len({entry.worker for entry in found.values()}) == 2:
                    kill(second)
                    killed = True
    assert killed and sorted(found) == list(range(300))
    assert not [entry for entry in found.values() if entry.error is not None]


def answers(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


def test_workers_that_do_not_start_are_told_of(
    here: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "SLOW", 0.0)
    assert drawn(rows("0"))[0].error is None
    assert [message for message in caplog.messages if message.startswith("No worker has started in 0 s; Ray's logs in")]


def test_an_address_where_no_ray_answers(free_port: int) -> None:
    ray.shutdown()
    start = time.monotonic()
    with pytest.raises(ValueError, match="the Ray cluster at 127.0.0.1:.* does not answer .*start it by"):
        with connected(Workers(1, f"127.0.0.1:{free_port}")):
            pass
    assert time.monotonic() - start < 90
