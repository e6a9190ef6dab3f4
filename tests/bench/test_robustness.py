"""Damaged and hostile inputs of every kind, and whether their judge would notice an answer that is not clear.

Each kind has a process of its own that reads one input after another.
"""

import contextlib
import copyreg
import hashlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random

import pytest

from bench import robustness
from bench.inputs import KINDS, make
from bench.inputs.originals import Damaged, write_originals
from bench.inputs.payloads import FILES, PAYLOADS, PROTOCOLS, WILD, Ground
from bench.judging import Answer, Limits, Worker, flaw
from bench.readers import Call, Printed, entries, run_shell

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells the peak of a process's memory")
EACH = 150  # inputs of a kind
# Kinds of which an input may be harmless, and is then read.
ALSO_READ = {*KINDS} - {"hostile-pickles"}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_originals(folder := tmp_path_factory.mktemp("originals"))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_a_result_or_one_sentence(originals: Path, kind: str) -> None:
    found: Counter[str] = Counter()
    unclear = []
    with Worker(kind, originals) as worker:
        for seed in range(EACH):
            for answer in worker.answers(seed):
                found["sentence" if answer.sentence else "result"] += 1
                unclear += [(seed, answer.entry, answer.why)] if answer.why else []
    assert not unclear
    assert found["sentence"] >= EACH / 6
    assert found["result"] >= (EACH / 6 if kind in ALSO_READ else 0)


def test_every_payload_is_refused_and_touches_nothing(originals: Path) -> None:
    """In every file, at both protocols: about a hundred that harm a file, and some that end or stop the process."""
    assert len(PAYLOADS) > 100 and len(WILD) > 20
    bodies = {**PAYLOADS, **WILD}
    variants = [(name, file, protocol) for name in bodies for file in range(len(FILES)) for protocol in PROTOCOLS]
    with Worker("hostile-pickles", originals, make=write_payload, read=read_pickle) as worker:
        answers = [answer for seed in range(len(variants)) for answer in worker.answers(seed)]
    assert len(answers) == len(variants)
    assert [(variants[i], answer) for i, answer in enumerate(answers) if answer.why or not answer.sentence] == []
    assert sum("needs code to be read" in answer.sentence for answer in answers) > 0.8 * len(answers)


def write_payload(kind: str, seed: int, folder: Path, originals: Path) -> Damaged:
    bodies = {**PAYLOADS, **WILD}
    name = list(bodies)[seed // (len(FILES) * len(PROTOCOLS))]
    write, protocol = FILES[seed // len(PROTOCOLS) % len(FILES)], PROTOCOLS[seed % len(PROTOCOLS)]
    ground = Ground.prepare(folder, protocol)
    path = folder / "model.pth"
    path.write_bytes(write(ground, bodies[name](ground)))
    return Damaged(path, "transformer")


def read_pickle(damaged: Damaged, originals: Path) -> Mapping[str, Call]:
    return {"info": lambda: run_shell("info", damaged.path)}


def test_payloads_do_their_harm_where_pickles_are_opened_without_care(tmp_path: Path) -> None:
    """Without this the test above could pass with payloads that do nothing."""
    code = "import sys; from tests.bench.test_robustness import open_all; open_all(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, stdin=subprocess.DEVNULL
    )
    harmless = (tmp_path / "harmless").read_text().splitlines()
    assert len(harmless) <= 19, harmless  # those of opcodes that need a reader with more than Python's own
    assert not {f"{name} {protocol}" for name in ("os:system", "partial", "INST") for protocol in PROTOCOLS} & {
        *harmless
    }


def open_all(root: str) -> None:
    """Open every payload by Python's own reader, and write down which of them did no harm."""
    harmless = []
    for protocol in PROTOCOLS:
        for i, (name, body) in enumerate(PAYLOADS.items()):
            folder = Path(root, f"{protocol}-{i}")
            folder.mkdir()
            ground = Ground.prepare(folder, protocol)
            for table in (copyreg._extension_registry, copyreg._inverted_registry, copyreg._extension_cache):
                table.clear()
            try:
                pickle.loads(ground.written(body(ground)))
            except Exception:  # noqa: BLE001 - the harm counts, not how it ends
                pass
            with contextlib.suppress(ChildProcessError):
                while True:  # until the processes that it started have ended
                    os.wait()
            if ground.is_untouched():
                harmless.append(f"{name} {protocol}")
    Path(root, "harmless").write_text("\n".join(harmless))


# The judge


def write_nothing(kind: str, seed: int, folder: Path, originals: Path) -> Damaged:
    path = folder / "input.bin"
    path.write_bytes(b"")
    return Damaged(path, "bad" if seed else "good")


def raise_(error: BaseException) -> None:
    raise error


def eat(size: int) -> None:
    b"a" * size


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a type error": (lambda path: raise_(TypeError("it broke")), "raised TypeError: it broke"),
    "no exception": (lambda path: raise_(BaseException("it broke")), "raised BaseException: it broke"),
    "an exit": (lambda path: sys.exit(2), "raised SystemExit: 2"),
    "no name": (lambda path: raise_(ValueError("it is damaged")), "names no file: 'it is damaged'"),
    "two lines": (lambda path: raise_(ValueError(f"{path}\nis damaged")), "not one line: "),
    "no line": (lambda path: raise_(ValueError()), "not one line: ''"),
    "a long line": (lambda path: raise_(ValueError(f"{path} " + "a" * 5000)), "a sentence of 50"),
    "the program": (
        lambda path: raise_(ValueError(f"{path}: 'int' object has no attribute 'a'")),
        "tells of the progr",
    ),
    "a wait": (lambda path: time.sleep(60), "hung, after 0 s of a processor"),
    "a loop": (lambda path: spin(60), "hung, after "),
    "a while": (lambda path: spin(2.1), "took 2."),
    "memory": (lambda path: eat(300_000_000), "took 3"),
    "much memory": (lambda path: [eat(900_000_000) for _ in range(9)], "took more than 600 MB"),
    "a kill": (lambda path: os.kill(os.getpid(), 9), "ended its process with code -9"),
    "an end": (lambda path: os._exit(3), "ended its process with code 3"),
    "a program": (lambda path: subprocess.run(["true"], check=True), "started subprocess.Popen"),
    "a shell": (lambda path: os.system("true"), "started os.system"),
    "a connection": (lambda path: socket.socket().connect_ex(("127.0.0.1", 9)), "started socket.connect"),
}


def read_badly(damaged: Damaged, originals: Path) -> Mapping[str, Call]:
    """As the name of the originals says."""
    call = BAD[originals.name][0] if damaged.part == "bad" else lambda path: raise_(ValueError(f"{path} is damaged"))
    return {"read": lambda: call(damaged.path)}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_is_not_clear_is_reported(tmp_path: Path, name: str) -> None:
    """And the process that reads the next input is as good as new."""
    limits = Limits(seconds=3, wall_seconds=8 if name == "a wait" else 300, bytes=600_000_000)
    with Worker("any", tmp_path / name, limits, write_nothing, read_badly) as worker:
        answers = [answer for seed in (0, 1, 0) for answer in worker.answers(seed)]
    good, bad, after = answers
    assert bad.why.startswith(BAD[name][1])
    for answer in (good, after):
        assert answer.why is None and answer.sentence.endswith("input.bin is damaged")
        assert answer.entry == "read of good" and answer.seconds < 1 and answer.bytes < 50_000_000


def test_a_touched_canary_is_reported(tmp_path: Path) -> None:
    with Worker("any", tmp_path, make=write_canary, read=touch) as worker:
        assert [answer.why for answer in worker.answers(0)] == [None, "touched the canary"]


def write_canary(kind: str, seed: int, folder: Path, originals: Path) -> Damaged:
    return Damaged(Path(Ground.prepare(folder, 2).canary), "canary")


def touch(damaged: Damaged, originals: Path) -> Mapping[str, Call]:
    return {"read": damaged.path.read_bytes, "write": lambda: damaged.path.write_bytes(b"")}


@pytest.mark.parametrize(("part", "why"), [("pipeline", "took 3"), ("image", None), ("mask", None)])
def test_a_picture_may_take_what_its_pixels_do(tmp_path: Path, part: str, why: str | None) -> None:
    with Worker(part, tmp_path, make=write_part, read=eat_much) as worker:
        (answer,) = worker.answers(0)
    assert answer.why is None if why is None else answer.why.startswith(why)
    assert answer.bytes > 250_000_000


def write_part(kind: str, seed: int, folder: Path, originals: Path) -> Damaged:
    return Damaged(folder / "input.bin", kind)


def eat_much(damaged: Damaged, originals: Path) -> Mapping[str, Call]:
    return {"read": lambda: eat(300_000_000)}


def test_a_sentence_names_its_file() -> None:
    assert flaw("model.pth is damaged", {"model.pth"}) is None
    assert flaw("the tokenizer gives token 5", {"model.pth"}) is None
    assert flaw("model is damaged", {"model.pth"}).startswith("names no file")


def test_what_the_shell_prints_is_what_is_judged(tmp_path: Path) -> None:
    with pytest.raises(Printed, match=r"^\S+gone does not exist; .*$"):
        run_shell("info", tmp_path / "gone")
    with pytest.raises(SystemExit):
        run_shell("inform")


# The inputs


def test_originals_are_read_by_every_entry(originals: Path) -> None:
    """So that what an entry refuses is the damage."""
    weights = "diffusion_pytorch_model.safetensors"
    whole = {
        "transformer": originals / "model" / "transformer" / weights,
        "autoencoder": originals / "model" / "vae" / weights,
        "text_encoder": originals / "encoder.safetensors",
        "pipeline": originals / "model",
        "lora": originals / "lora.safetensors",
        "image": originals / "image.png",
        "mask": originals / "image.png",
    }
    for part, path in whole.items():
        for name, call in entries(Damaged(path, part), originals).items():
            if (part, name) != ("text_encoder", "convert"):  # which is not for text encoders
                call()
            (path.parent / "converted.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_the_same_input_again_and_others_make_others(originals: Path, tmp_path: Path, kind: str) -> None:
    made = []
    for seed in (1, 1, 2, 3, 4):
        (folder := tmp_path / "input").mkdir()
        damaged = make(kind, seed, folder, originals)
        made.append((damaged, [*contents(folder)]))
        shutil.rmtree(folder)
    assert made[0] == made[1]
    assert len({str(found) for found in made}) >= 3


def test_the_originals_are_the_same_every_time(originals: Path, tmp_path: Path) -> None:
    """Else a seed that is reported would damage something else when it is repeated."""
    assert len([*contents(originals)]) > 10
    for i in range(3):
        (again := tmp_path / str(i)).mkdir()
        write_originals(again)
        assert [*contents(again)] == [*contents(originals)]


def test_another_process_makes_the_same_inputs(originals: Path, tmp_path: Path) -> None:
    """In which addresses, hashes and whatever else is of chance are others."""
    code = "import sys; from tests.bench.test_robustness import digests; print(digests(*sys.argv[1:]))"
    run = [sys.executable, "-c", code, str(originals), str(tmp_path / "input")]
    found = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    assert found == digests(str(originals), str(tmp_path / "input"))


def digests(originals: str, folder: str) -> str:
    """Of ten inputs of each kind, made in the same place."""
    found = {}
    for kind in KINDS:
        digest = hashlib.sha256()
        for seed in range(10):
            Path(folder).mkdir()
            made = make(kind, seed, Path(folder), Path(originals))
            digest.update(repr((made, *contents(Path(folder)))).encode("utf-8", "surrogateescape"))
            shutil.rmtree(folder)
        found[kind] = digest.hexdigest()
    return str(found)


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()


def test_kinds_draw_from_all_their_ways() -> None:
    """A hostile pickle is any of them in time."""
    names = sorted({**PAYLOADS, **WILD})
    drawn = {Random(f"hostile-pickles {seed}").choice(names) for seed in range(3000)}
    assert drawn == {*names}


# The command


def test_the_command_counts_and_writes_what_is_not_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clear = [Answer("info", 0.5, 3_000_000, None), Answer("load", 0.1, 1_000_000, "a.pth is damaged")]
    bad = [Answer("info", 1.0, 2_000_000, "it", why="names no file")]
    asked = []

    def answers(kinds: list[str], inputs: int, first_seed: int, jobs: int) -> Iterator[tuple[str, int, list[Answer]]]:
        asked.append((kinds, inputs, first_seed))
        yield from ((kind, first_seed + i, bad if i == bad_at else clear) for kind in kinds for i in range(2))

    monkeypatch.setattr(robustness, "run", answers)
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["robustness", "--kind=loras", "--seed=5", "--inputs=2", f"--out={out}"])
    bad_at = None
    assert robustness.main() == 0
    bad_at = 1
    assert robustness.main() == 1
    written = json.loads(out.read_text())
    assert asked == [(["loras"], 2, 5)] * 2
    assert written["unclear"] == [{"kind": "loras", "seed": 6, "entry": "info", "why": "names no file"}]
    assert written["kinds"]["loras"] == {
        "inputs": 2,
        "results": 1,
        "sentences": 1,
        "unclear": 1,
        "most_seconds": 1.0,
        "most_megabytes": 3.0,
    }
    assert "| loras | 2 | 1 | 1 | 1 | 1.0 | 3.0 |" in capsys.readouterr().out


def test_a_run_reads_as_many_inputs_of_each_kind_from_the_seed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(robustness.run(["loras", "prompts"], 3, 7, 2))
    assert sorted((kind, seed) for kind, seed, _ in found) == [
        *(("loras", 7), ("loras", 8)),
        *(("prompts", 7), ("prompts", 8)),
    ]
    assert all(answers for _, _, answers in found)
