"""What must hold on a server that runs for long: interrupts leave no trace, and nothing grows from prompt to prompt."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import requests
from scipy.stats import theilslopes

from tests.host.client import Event, Run
from tests.host.graphs import Prompt, changed, node, text_to_image
from tests.host.hosts import NEWEST
from tests.host.server import Server, Servers
from tests.host.test_graphs import picture

SIDE = 256  # px
LITTLE = 0.007  # GiB, in which a latent of this size is decoded in several parts
STEPS = 4
WARM_UP, PROMPTS = 50, 200
# Without these glibc keeps what it was given back, and how much of it is chance
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
ORDER = {"PYTHONHASHSEED": "0"}  # the host runs outputs in the order of a set of strings: here always the same
# Each with its place, as `interrupt_at` takes it. The encoder of the picture comes before the decoders.
PHASES = {
    "loading the transformer": {"file": "transformer/diffusion_pytorch_model.safetensors"},
    "loading the text encoder": {"file": "text_encoder/model.safetensors"},
    "loading the tokenizer": {"file": "tokenizer/tokenizer.json"},
    "loading the autoencoder": {"file": "vae/diffusion_pytorch_model.safetensors"},
    "encoding the instruction": {"part": "GemmaLayer", "call": 2},
    "encoding the prompt": {"part": "GemmaLayer", "call": 5},
    "encoding the negative prompt": {"part": "GemmaLayer", "call": 9},
    "encoding the picture": {"part": "Down", "call": 3},
    "at the first step": {"part": "TimeEmbedding", "call": 1},
    "in the first step": {"part": "Block", "call": 3},
    "in a middle step": {"part": "Block", "call": 12},
    "in the last step": {"part": "Block", "call": 32},
    "decoding": {"part": "EfficientViTBlock", "call": 5},
    "decoding within a bound": {"part": "Up", "call": 8},
    "saving": {"file": "_.png"},
}


class Pictures(NamedTuple):
    whole: np.ndarray
    bounded: np.ndarray


class Sample(NamedTuple):
    """Of the server, after a prompt."""

    bytes: int  # resident
    files: int
    threads: int
    seconds: float  # of processors, since its start


def every_phase() -> Prompt:
    """From a picture to two: decoded at once, and within a bound."""
    prompt = text_to_image()
    prompt["image"] = node("LoadImage", image="picture.png")
    prompt["latent"] = node("DCAEEncode", pixels=("image", 0), vae=("load", 2), max_memory=0.0)
    prompt["bounded"] = node("DCAEDecode", samples=("sample", 0), vae=("load", 2), max_memory=LITTLE)
    prompt["save_bounded"] = node("SaveImage", images=("bounded", 0), filename_prefix="bounded")
    return changed(prompt, sample={"steps": STEPS, "denoise": 0.8})


@pytest.fixture(scope="module")
def long_lived(servers: Servers) -> Iterator[Server]:
    server = servers(NEWEST, **ALLOCATOR, **ORDER)
    server.upload("picture.png", picture(SIDE, SIDE))
    yield server


@pytest.fixture(scope="module")
def first(long_lived: Server) -> Pictures:
    """What a fresh server draws."""
    assert long_lived.get("history") == {}
    return pictures(long_lived, long_lived.queue(every_phase()))


def pictures(server: Server, run: Run) -> Pictures:
    assert run.failure is None and not run.interrupted
    return Pictures(*(np.asarray(server.images(run, name)[0]) for name in ("save", "save_bounded")))


def check_next(server: Server, first: Pictures) -> None:
    """The prompt after an interrupt, which goes on with what the interrupted one has left."""
    for expected, found in zip(first, pictures(server, server.queue(every_phase())), strict=True):
        assert expected.shape == (SIDE, SIDE, 3) and np.array_equal(expected, found)


@pytest.mark.parametrize("phase", PHASES)
def test_the_prompt_after_an_interrupt_is_that_of_a_fresh_server(
    long_lived: Server, first: Pictures, phase: str
) -> None:
    long_lived.free()
    run = long_lived.interrupt_at(every_phase(), **PHASES[phase])
    assert run.failure is None
    saved = {"save", "save_bounded"} & run.outputs.keys()
    assert run.interrupted and len(saved) == (phase == "saving")  # the other picture is not saved any more
    check_next(long_lived, first)


def test_an_interrupt_between_two_steps(long_lived: Server, first: Pictures) -> None:
    def interrupt(name: str, data: Event) -> None:
        if name == "progress" and data["value"] == 2:
            long_lived.interrupt()

    long_lived.free()
    run = long_lived.queue(changed(every_phase(), sample={"steps": 1000}), on_event=interrupt)
    assert run.interrupted and run.failure is None and not {"save", "save_bounded"} & run.outputs.keys()
    check_next(long_lived, first)


@pytest.fixture(scope="module")
def samples(long_lived: Server) -> list[Sample]:
    """Of small prompts that differ in seed and text, after a warm-up. The history, which the host keeps, is cleared."""
    process = psutil.Process(long_lived.process.pid)
    prompt = changed(text_to_image("FlowDPMSampler", size=(64, 64)), sample={"steps": 1})
    found = []
    for index in range(WARM_UP + PROMPTS):
        if index % 20 == 0:
            requests.post(f"{long_lived.url}/history", json={"clear": True}, timeout=60).raise_for_status()
        new = {"positive": {"text": f"{index} red circles"}, "sample": {"seed": index}}
        run = long_lived.queue(changed(prompt, **new))
        assert run.failure is None
        seconds = sum(process.cpu_times()[:2])
        found.append(Sample(process.memory_info().rss, process.num_fds(), process.num_threads(), seconds))
    return found[WARM_UP:]


def growth(values: Sequence[float]) -> float:
    """From the first value to the last, by the median of the slopes between all pairs, which single values do not move."""
    return theilslopes(values).slope * (len(values) - 1)


def test_memory_does_not_grow(samples: list[Sample]) -> None:
    assert growth([sample.bytes for sample in samples]) < 1e6


@pytest.mark.parametrize("what", ["files", "threads"])
def test_files_and_threads_do_not_grow(samples: list[Sample], what: str) -> None:
    values = [getattr(sample, what) for sample in samples]
    assert growth(values) < 1 and max(values[-50:]) <= max(values[:50]) + 1


def test_prompts_do_not_become_slower(samples: list[Sample]) -> None:
    """By the work of the processors: what else runs on the machine does not count."""
    quarter = PROMPTS // 4
    first, last = (part[-1].seconds - part[0].seconds for part in (samples[:quarter], samples[-quarter:]))
    assert 0 < last < 1.5 * first


@pytest.mark.parametrize("leak", [0, 1e4])
def test_a_trend_is_told_from_noise(leak: float) -> None:
    """Bytes a prompt, among outliers of megabytes."""
    noise = np.random.default_rng(0)
    values = 6e8 + noise.normal(0, 1e5, PROMPTS) + 5e6 * (noise.random(PROMPTS) < 0.1)
    assert abs(growth(values + leak * np.arange(PROMPTS)) - leak * PROMPTS) < 1e5


def test_programs_and_connections_would_be_noted(long_lived: Server) -> None:
    """The last test here: until now there was none, in everything above."""
    assert long_lived.watched() == []
    requests.post(f"{long_lived.url}/sana_test/misbehave", timeout=60).raise_for_status()
    kinds = [line.split()[0] for line in long_lived.watched()]
    assert "subprocess.Popen" in kinds and "socket.getaddrinfo" in kinds
