"""Whether the answer to an input is clear: a result or one sentence, soon, in little memory, from a process that survives it.

Needs Linux, which tells the peak of a process's memory.
"""

import gc
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from sana.images import MOST_PIXELS

from .inputs import make
from .inputs.originals import Damaged
from .inputs.payloads import CANARY, Ground
from .readers import Call, Printed, entries

SECONDS = 2.0  # of a processor
BYTES = 200_000_000  # beyond what the process had
# The same where a picture is read: a small file may be one of many pixels, and four copies of it are made on the way.
PICTURES, PICTURE_BYTES = ("image", "mask"), 16 * MOST_PIXELS
# What ends a worker: far more than what is judged, since machines are busy.
LAST_SECONDS, LAST_WALL_SECONDS, LAST_BYTES = 15.0, 60.0, 2_000_000_000
SENTENCE = 2100  # characters
# What the shell prints as an error; anything else ends it with a traceback.
PRINTED = (Printed, ValueError, OSError, RuntimeError)
# In a sentence, what tells of the program and not of the file.
INSIDE = re.compile(
    r"object has no attribute|NoneType|Traceback|keyword argument|<class |not subscriptable|not iterable"
)
# What stands for a file where it is clear which is meant.
PLACES = ("the autoencoder", "the text encoder", "the tokenizer", "the transformer", "the checkpoint")
# Events of Python's audit that no reader has a reason for.
PROGRAMS = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|fork)|subprocess\.|pty\.|socket\.(connect|getadd)|webbrowser"
)

Make = Callable[[str, int, Path, Path], Damaged]
Read = Callable[[Damaged, Path], Mapping[str, Call]]


@dataclass(frozen=True)
class Limits:
    """What ends a worker."""

    seconds: float = LAST_SECONDS  # of a processor
    wall_seconds: float = LAST_WALL_SECONDS
    bytes: int = LAST_BYTES  # beyond what it had


@dataclass(frozen=True)
class Answer:
    """What one entry did with one input."""

    entry: str
    seconds: float = 0.0  # of a processor
    bytes: int = 0  # at most, beyond what the process had
    sentence: str | None = None  # None: a result
    why: str | None = None  # it is not clear; None: it is


def judged(entry: str, call: Call, names: Iterable[str], most_bytes: int = BYTES) -> Answer:
    """Run an entry and judge its answer. names: what a sentence may call the file."""
    _reset_peak()
    before, start = _memory("VmRSS"), time.process_time()
    sentence = why = None
    try:
        call()
    except PRINTED as error:
        sentence = str(error)
    except BaseException as error:  # noqa: BLE001 - the question is what it raises
        why = f"raised {type(error).__name__}: {str(error)[:200]}"
    seconds, used = time.process_time() - start, _memory("VmHWM") - before
    if sentence is not None:
        why = flaw(sentence, names)
    if why is None and seconds > SECONDS:
        why = f"took {seconds:.1f} s of a processor"
    if why is None and used > most_bytes:
        why = f"took {used / 1e6:.0f} MB"
    return Answer(entry, seconds, used, sentence, why)


def flaw(sentence: str, names: Iterable[str]) -> str | None:
    """Why a sentence is not clear; None: it is."""
    shown = repr(sentence[:300])
    if len(sentence.splitlines()) != 1:
        return f"not one line: {shown}"
    if len(sentence) > SENTENCE:
        return f"a sentence of {len(sentence)} characters: {shown}"
    if INSIDE.search(sentence):
        return f"tells of the program: {shown}"
    if not any(name in sentence for name in (*names, *PLACES)):
        return f"names no file: {shown}"
    return None


def names_of(damaged: Damaged, folder: Path) -> set[str]:
    """What a sentence may call an input: its path, and the files that it consists of."""
    inside = {" ".join(path.name.splitlines()) for path in folder.rglob("*")} if folder.is_dir() else set()
    return {name for name in {damaged.path.name, *inside} if len(name) > 2}


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(key: str) -> int:
    """Bytes of this process: VmRSS, those that it has, or VmHWM, the most since `_reset_peak`."""
    found = re.search(rf"^{key}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


def work(connection: Connection, kind: str, originals: Path, root: Path, make: Make, read: Read) -> None:
    """The loop of a worker. For every seed it tells which entry comes, its answer, and at the end None."""
    torch.set_num_threads(1)
    started: list[str] = []
    sys.addaudithook(lambda event, details: started.append(event) if PROGRAMS.match(event) else None)
    null = os.open(os.devnull, os.O_RDWR)  # libraries print where Python does not see it
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    gc.collect()
    gc.freeze()
    connection.send("ready")
    while (seed := connection.recv()) is not None:
        folder = root / str(seed)
        folder.mkdir()
        connection.send("making the input")
        damaged = make(kind, seed, folder, originals)
        names, most_bytes = names_of(damaged, folder), PICTURE_BYTES if damaged.part in PICTURES else BYTES
        ground = Ground(folder, 0) if (folder / CANARY).exists() else None
        for entry, call in read(damaged, originals).items():
            entry = f"{entry} of {damaged.part}"
            connection.send(entry)
            started.clear()
            answer = judged(entry, call, names, most_bytes)
            if started:
                answer = Answer(entry, why=f"started {started[0]}")
            elif ground and not ground.is_untouched():
                answer = Answer(entry, why="touched the canary")
            connection.send(answer)
        connection.send(None)
        shutil.rmtree(folder, ignore_errors=True)


class Worker:
    """A process that reads inputs of a kind, and is replaced where it ends, hangs, or takes far too much."""

    def __init__(
        self,
        kind: str,
        originals: Path,
        limits: Limits = Limits(),
        make: Make = make,
        read: Read = entries,
    ) -> None:
        self.kind, self.originals, self.limits, self.make, self.read = kind, originals, limits, make, read
        self.process: multiprocessing.Process | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.connection.send(None)
            self.process.join(1)
            self._end()

    def answers(self, seed: int) -> list[Answer]:
        """Of all entries to one input; the last is not clear if the process did not survive it."""
        if self.process is None:
            self._start()
        self.connection.send(seed)
        found: list[Answer] = []
        entry, why = "start", None
        while why is None:
            why = self._waited()
            try:
                told = None if why else self.connection.recv()
            except EOFError:
                self.process.join()
                why = f"ended its process with code {self.process.exitcode}"
            if why:
                break
            if told is None:
                return found
            if isinstance(told, Answer):
                found.append(told)
            else:
                entry = told
        self._end()
        return [*found, Answer(entry, why=why)]

    def _waited(self) -> str | None:
        """Wait until the process tells something. A text: why it is not worth waiting."""
        process = psutil.Process(self.process.pid)
        with process.oneshot():
            bytes_before, seconds_before = process.memory_info().rss, sum(process.cpu_times()[:2])
        end = time.monotonic() + self.limits.wall_seconds
        while not self.connection.poll(0.05):
            with process.oneshot():
                seconds, used = sum(process.cpu_times()[:2]) - seconds_before, process.memory_info().rss - bytes_before
            if seconds > self.limits.seconds or time.monotonic() > end:
                return f"hung, after {seconds:.0f} s of a processor"
            if used > self.limits.bytes:
                return f"took more than {self.limits.bytes / 1e6:.0f} MB"
        return None

    def _start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="robustness-"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bench.judging"])
        self.connection, other = context.Pipe()
        given = (other, self.kind, self.originals, self.root, self.make, self.read)
        process = context.Process(target=work, args=given, daemon=True)
        process.start()
        self.process = process
        other.close()
        self.connection.recv()  # however long a busy machine takes to start it

    def _end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.root, ignore_errors=True)
        self.process = None
