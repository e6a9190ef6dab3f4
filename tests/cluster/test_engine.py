"""Workers of a real Ray, with a stand-in that draws nothing."""

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, takewhile
from threading import Thread

import psutil
import pytest
import ray
from ray._private.worker import print_to_stdstream

from sana.cluster import engine
from sana.cluster.drawing import Run
from sana.cluster.engine import AHEAD, MOST_ENDS, ROWS, Workers, _Queue, connected, draw_rows
from sana.cluster.manifest import Entry
from sana.cluster.rows import Row
from sana.cluster.stores import SHARD_SIZE
from tests.cluster.nodes import free_port, kill, node, wait_until
from tests.cluster.stand_ins import Stamp

TWO = Workers(2)


@pytest.fixture(scope="module")
def joined(cluster: str) -> Iterator[str]:
    with connected(Workers(2, cluster)):
        yield cluster


def rows(*prompts: str) -> list[Row]:
    return [Row(number, prompt) for number, prompt in enumerate(prompts)]


def test_rows_are_read_as_they_are_needed_and_drawn_once_by_both_workers_until_a_stop(
    joined: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There are rows until each worker, of which one may start long after the other, has drawn some."""
    monkeypatch.setattr(engine, "SLOW", 0.0)
    found: list[Entry] = []
    given: list[Row] = []
    share: Counter[str | None] = Counter()
    at_stop: int | None = None

    def endless() -> Iterator[Row]:
        for number in count():
            given.append(Row(number, "0.002"))
            yield given[-1]

    def are_enough() -> bool:
        nonlocal at_stop
        if at_stop is None and len(share) == 2 and min(share.values()) >= 40:
            at_stop = len(found)
        return at_stop is not None

    for entries in draw_rows(endless(), Run("", {}), TWO, drawer=Stamp, stopped=are_enough):
        found += entries
        share.update(entry.worker for entry in entries)
        assert len(given) <= len(found) + (AHEAD + 4 * ROWS) * 2
    assert share.keys() == {"worker-1", "worker-2"} and at_stop <= len(found) <= at_stop + 4 * ROWS
    keys = {row.number: row.key() for row in given}
    assert len({entry.row for entry in found}) == len(found) and all(entry.key == keys[entry.row] for entry in found)
    assert [text for text in caplog.messages if text.startswith("No worker has started in 0 s; Ray's logs in")]


def test_killed_workers_are_replaced_and_a_row_that_ends_them_is_told(joined: str) -> None:
    """The process that has just drawn is killed from without, once; one row ends its process, and one raises."""
    given = [*rows(*["0.005"] * 60, "end", *["0.005"] * 60), Row(121, "raise", settings={"height": 64})]
    found: dict[int, Entry] = {}
    killed = None
    for entries in draw_rows(given, Run("", {}), TWO, drawer=Stamp):
        for entry in entries:
            assert entry.row not in found
            found[entry.row] = entry
        if killed is None and len(found) > 20 and entries:
            killed = int(entries[-1].settings)
            psutil.Process(killed).kill()
    assert sorted(found) == list(range(122)) and killed is not None
    errors = {row: entry.error for row, entry in found.items() if entry.error is not None}
    assert errors.pop(60) == f"{MOST_ENDS} workers ended while they drew it; try it alone, in less memory"
    assert errors.pop(121) == "LookupError: as it was told"
    assert not errors


def test_workers_that_are_of_no_use_leave_the_rest_to_others(joined: str, caplog: pytest.LogCaptureFixture) -> None:
    """One without the model, and one that cannot write what it has drawn. There are rows until it has been told."""
    model = {"broken": "worker-1", "full": "worker-2"}
    given = (Row(number, "0.002") for number in takewhile(lambda _: len(caplog.messages) < 2, count()))
    found = [entry for entries in draw_rows(given, Run("", model), Workers(3), drawer=Stamp) for entry in entries]
    assert sorted(entry.row for entry in found) == list(range(len(found)))
    assert {(entry.worker, entry.error) for entry in found} == {("worker-3", None)}
    assert sorted(caplog.messages) == [
        "worker-1 is of no use (worker-1 has no model; copy it there); its rows are given to others.",
        "worker-2 is of no use (No space left on device); its rows are given to others.",
    ]
    with pytest.raises(ValueError, match="^no worker can draw: worker-1 has no model; copy it there$"):
        list(draw_rows(rows("0"), Run("", {"broken": "all"}), Workers(1), drawer=Stamp))


def test_rows_of_one_size_go_together() -> None:
    given = [Row(i, "a", settings={"height": 64 + 32 * (i % 3)}) for i in range(60)]
    queue, batches = _Queue(given, 1), []
    while not queue.is_empty():
        batches.append(queue.next().rows)
    assert all(len({row.settings["height"] for row in batch}) == 1 for batch in batches)
    assert sorted(row.number for batch in batches for row in batch) == list(range(60))
    assert [row.number for row in batches[0]] == list(range(0, 3 * ROWS, 3)) and batches[1][0].number == 1
    assert len(batches) == 60 // ROWS


def test_a_shard_is_one_batch() -> None:
    numbers = [number for number in range(3 * SHARD_SIZE) if number % 7]
    queue, batches = _Queue((Row(number, "a", settings={"height": number}) for number in numbers), 1, shards=True), []
    while not queue.is_empty():
        batches.append([row.number for row in queue.next().rows])
    assert batches == [[number for number in numbers if number // SHARD_SIZE == shard] for shard in range(3)]


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


def test_gpus_that_are_not_there(joined: str) -> None:
    with pytest.raises(ValueError, match="--devices-per-worker is 1000, and Ray knows . GPUs; give 0"):
        list(draw_rows(rows("0"), Run("", {}), Workers(1, devices=1000), drawer=Stamp))


def test_a_node_is_lost(joined: str) -> None:
    """One of three cores, with its worker, while it draws."""
    with node(f"--address={joined}", "--num-cpus=1") as second:
        wait_until(lambda: ray.cluster_resources().get("CPU", 0) == 3)
        found: dict[int, Entry] = {}
        killed = False
        given = rows(*["0.02"] * 300)
        for entries in draw_rows(given, Run("", {}), Workers(3, joined), drawer=Stamp):
            found.update((entry.row, entry) for entry in entries)
            if not killed and len({entry.worker for entry in found.values()}) == 3:
                kill(second)
                killed = True
    assert killed and sorted(found) == list(range(300))
    assert not [entry for entry in found.values() if entry.error is not None]


def test_what_ray_prints_goes_to_stderr(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    ray.shutdown()
    capsys.readouterr()  # of workers that tests before this have ended
    with connected(Workers(1, cluster)):
        print_to_stdstream({"lines": ["a node is lost"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    found = capsys.readouterr()
    assert found.out == "" and "a node is lost" in found.err


def refusal(address: str | None) -> str:
    with pytest.raises(ValueError) as refused, connected(Workers(1, address)):
        pass
    return str(refused.value)


def test_an_address_where_no_ray_answers() -> None:
    ray.shutdown()
    address = f"127.0.0.1:{free_port()}"
    told = refusal(address)
    assert told.startswith(f"the Ray cluster at {address} does not answer (") and told.endswith("`ray start --head`")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "of another kind"])
def test_a_port_where_something_else_listens(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    monkeypatch.setattr(engine, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def listen() -> None:
            with suppress(OSError), server.accept()[0] as found:
                found.recv(100)
                found.sendall(answer)
                found.recv(100)  # until the other side has gone

        (thread := Thread(target=listen)).start()
        told = refusal(address)
        thread.join()
    reason = "what answers there is no Ray" if answer else "timed out"
    assert told == f"the Ray cluster at {address} does not answer ({reason}); start it by `ray start --head`"


def test_an_address_of_another_kind() -> None:
    assert "(an address is HOST:PORT, such as 10.0.0.1:6379)" in refusal("ray://127.0.0.1:10001")


def test_ray_that_does_not_start_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine that is too busy it tells by a bare Exception."""

    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    assert refusal(None) == (
        "Ray does not start on this machine (Exception: The current node timed out during startup.); give the same "
        "command again, or see by `ray start --head` what is wrong"
    )


def test_another_version_of_ray(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.setattr(ray, "__version__", "2.9.0")
    told = refusal(cluster)
    assert told.startswith(f"the Ray cluster at {cluster} is of another version (") and "2.9.0" in told
    assert told.endswith("; install the same on all machines") and "\n" not in told
