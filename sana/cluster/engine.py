"""Rows to workers on Ray, and their entries back: nothing is lost when a worker ends, and nothing waits for one."""

import logging
import os
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import RayError, RayTaskError

from .drawing import Drawer, Run
from .faults import fault, sentence
from .manifest import Entry
from .places import PlaceError
from .rows import Row
from .stores import SHARD_SIZE
from .workers import Workers

AHEAD = 64  # rows a worker, among which those that go together are looked for
ROWS = 4  # of a batch, unless it is a shard
IN_FLIGHT = 2  # batches of a worker, so that it need not wait for the next
SLOW = 120.0  # seconds after which it is told that no worker has started
MOST_ENDS = 3  # of workers at one row, after which it counts as the cause; or failures of one worker
PATIENCE = 10.0  # seconds for a cluster to answer
# Ray speaks gRPC, that is HTTP/2 (RFC 9113): both sides begin with a frame of this type, here with none of its settings.
SETTINGS = b"\x04"
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5)

LOGS = "/tmp/ray/session_latest/logs"

log = logging.getLogger(__name__)


def _check_answer(address: str) -> None:
    """Raises OSError where nothing answers that speaks as Ray does, for which Ray itself would wait for minutes."""
    host, sign, port = address.rpartition(":")
    if "://" in address:
        raise ConnectionError("an address is HOST:PORT, such as 10.0.0.1:6379")
    if sign and port.isdecimal():
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as found:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                found.sendall(GREETING)
                if found.recv(4)[3:] != SETTINGS:
                    raise ConnectionError("what answers there is no Ray")


@contextmanager
def _environment() -> Iterator[None]:
    """Of what Ray starts on this machine. Its own way to set it, a runtime_env, fails where a path has a space."""
    package = str(Path(__file__).parents[2])  # which a worker imports too
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (package, path) if part)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of what nobody waits for any more
    try:
        yield
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


@contextmanager
def connected(workers: Workers) -> Iterator[None]:
    """Start Ray on this machine, or join a cluster. Raises ValueError where there is none, where it does not start, or
    for one of another version.

    What Ray prints of lost nodes at its own time goes to stderr: stdout is for what a command gives.
    """
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        if workers.cluster:
            _check_answer(workers.cluster)
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as `ray start` does
            ray.init(address=workers.cluster, **options)
        else:
            with _environment():
                ray.init(address="local", include_dashboard=False, **options)
    except Exception as error:
        if not workers.cluster:  # of a machine that is too busy Ray tells by a bare Exception
            again = "give the same command again, or see by `ray start --head` what is wrong"
            raise ValueError(f"Ray does not start on this machine ({sentence(error)}); {again}") from error
        where = f"the Ray cluster at {workers.cluster}"
        if "Version mismatch" in str(error):
            versions = " ".join(str(error).split())
            raise ValueError(f"{where} is of another version ({versions}); install the same on all machines") from error
        raise ValueError(f"{where} does not answer ({sentence(error)}); start it by `ray start --head`") from error
    with redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            ray.shutdown()  # during which it may still print


def draw_rows(
    rows: Iterable[Row],
    run: Run,
    workers: Workers,
    *,
    drawer: type = Drawer,
    shards: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[list[Entry]]:
    """The entries of all rows, in the order in which they come. Ray is to be connected.

    A batch whose worker ends is given to others; the worker starts again where there is room for it. drawer: what draws, made
    as a `Drawer` is. shards: a batch has all rows of a shard. stopped: asked between batches; once it says so, only what is in
    flight is waited for.
    Raises ValueError if no worker can load the model, or has the GPUs that it needs.
    """
    pool = [_Worker(f"worker-{k + 1}", options, drawer, run) for k, options in enumerate(_shares(workers))]
    try:
        yield from _draw(pool, _Queue(rows, workers.count, shards=shards), stopped)
    finally:
        for worker in pool:
            worker.end()


def _draw(pool: "list[_Worker]", queue: "_Queue", stopped: Callable[[], bool]) -> Iterator[list[Entry]]:
    ends: Counter[int] = Counter()  # by row, of workers that ended at it
    start: float | None = time.monotonic()  # None: a worker has started, or it has been told that none does
    while True:
        for worker in () if stopped() else pool * IN_FLIGHT:
            if worker.is_free and (batch := queue.next(suspected=not worker.batches)):
                worker.draw(batch)
        drawing = {ref: worker for worker in pool for ref in worker.batches}
        if not drawing and (stopped() or queue.is_empty()):
            return
        loading = {worker.loading: worker for worker in pool if worker.loading is not None}
        done, _ = ray.wait([*drawing, *loading], num_returns=1, timeout=1.0)
        if start is not None and (drawing or time.monotonic() - start > SLOW):
            if not drawing:
                log.warning("No worker has started in %.0f s; Ray's logs in %s may say why.", SLOW, LOGS)
            start = None
        for ref in done:
            worker = (loading | drawing)[ref]
            try:
                if ref in loading:
                    worker.check_loaded()
                    continue
                entries, lost = worker.collect(ref)
            except _UselessError as error:
                pool.remove(worker)
                worker.end()
                queue.give_back(worker.batches.values())
                log.warning("%s is of no use (%s); its rows are given to others.", worker.name, str(error))
                if not pool:
                    raise ValueError(f"no worker can draw: {error}") from error
                break  # what it has in flight is not waited for
            yield entries
            if lost:
                log.warning("%s ended; its rows are given to others.", worker.name)
                suspect, *others = lost
                queue.give_back(others)
                ends.update(row.number for row in suspect.rows)
                number = max(ends[row.number] for row in suspect.rows)
                if len(suspect.rows) > 1 and number > 1:
                    queue.give_back(Batch([row], alone=True, suspected=True) for row in suspect.rows)
                    for row in suspect.rows:  # one is the cause, and the others are to be cleared of it
                        del ends[row.number]
                elif len(suspect.rows) > 1 or number < MOST_ENDS:
                    queue.give_back([suspect._replace(suspected=True)])
                else:
                    message = f"{MOST_ENDS} workers ended while they drew it; try it alone, in less memory"
                    yield [fault(suspect.rows[0], message, worker.name)]


class Batch(NamedTuple):
    """Rows for one worker. alone: it is one row, at which workers have ended, out of a batch.

    suspected: a worker ended at it, or just after, before its answer was sent. It is given to a worker that has nothing else to
    do, and nothing else until it is done, so that there is no doubt about another end.
    """

    rows: list[Row]
    alone: bool = False
    suspected: bool = False


class _UselessError(Exception):
    """A worker cannot do anything, in a sentence."""


class _Worker:
    """An actor and what it has to do."""

    def __init__(self, name: str, options: Mapping[str, object], drawer: type, run: Run) -> None:
        self.name = name
        self.make = partial(ray.remote(_Actor).options(**options).remote, drawer, run, name, os.getcwd())
        self.batches: dict[ray.ObjectRef, Batch] = {}  # the oldest first
        self.loading: ray.ObjectRef | None = None  # None: it has loaded
        self.failures = 0  # to load or to write, one after the other
        self.start()

    def start(self) -> None:
        """A process of its own, anew after it has ended: where and when there is room for it."""
        self.actor = self.make()
        self.loading = self.actor.load.remote()

    def end(self) -> None:
        ray.kill(self.actor)

    @property
    def is_free(self) -> bool:
        suspected = any(batch.suspected for batch in self.batches.values())
        return self.loading is None and len(self.batches) < IN_FLIGHT and not suspected

    def draw(self, batch: Batch) -> None:
        self.batches[self.actor.draw.remote(batch)] = batch

    def check_loaded(self) -> None:
        """To be called once `loading` is done; if the process has ended, it starts again. Raises _UselessError."""
        try:
            ray.get(self.loading)
        except RayTaskError as error:
            raise _UselessError(sentence(error.cause)) from error
        except RayError as error:
            self._fail(error)
            self.start()
        else:
            self.loading, self.failures = None, 0

    def collect(self, ref: ray.ObjectRef) -> tuple[list[Entry], list[Batch]]:
        """What a batch that is done has given; or if the process has ended, of all its batches, and those that are lost.

        The first that is lost was being drawn. Raises _UselessError if the output can repeatedly not be written.
        """
        try:
            return self._entries(ref), []
        except PlaceError as error:
            self._fail(error)
            self.draw(self.batches.pop(ref))
            return [], []
        except RayError:
            found, lost = [], []
            for each in list(self.batches):
                try:
                    found += self._entries(each)
                except (RayError, PlaceError):
                    lost.append(self.batches.pop(each))
            self.start()
            return found, lost

    def _entries(self, ref: ray.ObjectRef) -> list[Entry]:
        """Raises RayError if the process has ended before it, and PlaceError as `Drawer.draw` does."""
        try:
            entries = ray.get(ref)
            self.failures = 0
        except RayTaskError as error:
            if isinstance(error.cause, PlaceError):
                raise error.cause from error
            entries = [fault(row, error.cause, self.name) for row in self.batches[ref].rows]
        del self.batches[ref]
        return entries

    def _fail(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == MOST_ENDS:
            raise _UselessError(sentence(error)) from error


class _Actor:
    """What Ray runs in a process of its own. folder: of the command, from which relative paths begin."""

    def __init__(self, drawer: type, run: Run, name: str, folder: str) -> None:
        with suppress(OSError):  # another machine may not have it
            os.chdir(folder)
        self.make = partial(drawer, run, name)
        self.drawer: Drawer | None = None

    def load(self) -> None:
        """Answers once the model is loaded."""
        self.drawer = self.drawer or self.make()

    def draw(self, batch: Batch) -> list[Entry]:
        self.load()
        return list(self.drawer.draw(batch.rows, alone=batch.alone))


def _shares(workers: Workers) -> list[dict[str, object]]:
    """What each worker has of the machines. Raises ValueError where there are not enough GPUs for one."""
    found = ray.cluster_resources()
    cores, gpus = found.get("CPU", 1), found.get("GPU", 0)
    if workers.devices > gpus:
        raise ValueError(
            f"--devices-per-worker is {workers.devices:g}, and Ray knows {gpus:g} GPUs; give 0 to draw on processors"
        )
    share = cores / workers.count
    share = 1 if workers.devices else int(share) if share >= 1 else share
    return [{"num_cpus": share, "num_gpus": workers.devices}] * workers.count


class _Queue:
    """Batches of rows of one size and LoRA, found among the next rows; or of one shard.

    count: of workers. Shards: enough is read ahead that the oldest has all its rows.
    """

    def __init__(self, rows: Iterable[Row], count: int, *, shards: bool = False) -> None:
        self.rows = iter(rows)
        self.size, self.ahead = (SHARD_SIZE, SHARD_SIZE) if shards else (ROWS, AHEAD * count)
        self.key = (lambda row: row.number // SHARD_SIZE) if shards else _group
        self.groups: dict[object, deque[Row]] = {}
        self.count = 0  # rows in the groups
        self.returned: deque[Batch] = deque()

    def next(self, *, suspected: bool = True) -> Batch | None:
        """The next batch: the oldest row with others like it. None at the end. suspected: it may be one that is."""
        for batch in self.returned:
            if suspected or not batch.suspected:
                self.returned.remove(batch)
                return batch
        for row in islice(self.rows, self.ahead - self.count):
            self.groups.setdefault(self.key(row), deque()).append(row)
            self.count += 1
        if not self.groups:
            return None
        oldest = min(self.groups, key=lambda group: self.groups[group][0].number)
        group = self.groups[oldest]
        rows = [group.popleft() for _ in range(min(self.size, len(group)))]
        if not group:
            del self.groups[oldest]
        self.count -= len(rows)
        return Batch(rows)

    def give_back(self, batches: Iterable[Batch]) -> None:
        self.returned.extend(batches)

    def is_empty(self) -> bool:
        batch = self.next()
        if batch:
            self.returned.appendleft(batch)
        return not batch


def _group(row: Row) -> object:
    return row.lora, row.settings.get("height"), row.settings.get("width"), row.settings.get("steps")
