"""Pictures by graphs, which a CPU records as a GPU does: those without them."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.recorder import Graphs, graphs_on_cpu
from sana.capturing import CapturedVelocity
from sana.networks.controlnet import SanaControlNet
from sana.offloading import CPU, Offloader
from sana.pipeline import SanaPipeline
from tests.sana.measures import relative_error
from tests.sana.pipeline.drawing import picture, sample
from tests.sana.twins import randomise

PERTURBED = {"guidance_interval": (0.0, 0.7), "pag_scale": 1.0, "pag_blocks": [1], "negative": "blurry"}
CPU_HAS_NONE = (
    "--fast (in Python fast=True) records what a step launches on a GPU by CUDA or ROCm, and the device is cpu; leave it out: "
    "the picture is the same without"
)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    with graphs_on_cpu() as found:
        yield found


def faster(plain: SanaPipeline, controlnet: SanaControlNet | None = None) -> SanaPipeline:
    parts = plain.transformer, plain.autoencoder, plain.text_encoder, plain.identity
    return SanaPipeline(*parts, controlnet=controlnet, fast=True)


@pytest.mark.parametrize(
    ("options", "recorded"),
    [({}, 1), (PERTURBED, 3), ({"guidance_scale": 1.0, "solver": "flow_euler"}, 1)],
    ids=["guided", "perturbed", "unguided"],
)
def test_other_prompts_seeds_and_steps_need_no_new_graph(
    pipeline: SanaPipeline, graphs: Graphs, options: dict[str, object], recorded: int
) -> None:
    fast = faster(pipeline)
    for seed, prompt in enumerate(("a circle", "a very large blue star")):
        given = {"batch_size": 2, "seed": seed, "steps": 3 + seed, **options}
        assert relative_error(sample(fast, prompt, **given), sample(pipeline, prompt, **given)) < 1e-5
        assert graphs.recorded == recorded
    assert graphs.launched >= 7


def test_sprint_has_graphs_too(sprint: SanaPipeline, graphs: Graphs) -> None:
    fast = faster(sprint)
    for seed, scale in ((0, 4.5), (1, 2.0)):
        given = {"seed": seed, "guidance_scale": scale, "steps": 4}
        assert relative_error(sample(fast, "a circle", **given), sample(sprint, "a circle", **given)) < 1e-5
    assert (graphs.recorded, graphs.launched) == (1, 8)


def test_the_demo_draws_the_same_picture(graphs: Graphs) -> None:
    plain = SanaPipeline.load("demo")
    fast = SanaPipeline.load("demo", fast=True)
    expected, found = (np.array(each("a red circle", steps=4)[0]).astype(int) for each in (plain, fast))
    assert abs(found - expected).max() <= 1  # float32 sums in another order
    assert expected.std() > 10 and graphs.launched == 4


def test_steps_with_a_controlnet_have_no_graph_and_the_others_do(pipeline: SanaPipeline, graphs: Graphs) -> None:
    torch.manual_seed(0)
    controlnet = SanaControlNet(replace(pipeline.transformer.config, control_blocks=1))
    randomise(controlnet)
    fast = faster(pipeline, controlnet)
    plain = SanaPipeline(
        pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder, pipeline.identity, controlnet=controlnet
    )
    given = {"steps": 4, "control_image": picture(), "control_to": 0.5}
    found, expected = (sample(each, "a circle", **given) for each in (fast, plain))
    assert relative_error(found, expected) < 1e-5
    assert 0 < graphs.launched < 4


def test_graphs_go_with_the_transformer_and_their_memory_counts_with_it(
    pipeline: SanaPipeline, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sana.offloading.free_bytes", lambda device, share: 0)
    offloader = Offloader(torch.device("cuda"))
    offloader.add("transformer", pipeline.transformer)
    part = offloader.parts["transformer"]
    parts = pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder, pipeline.identity
    made = SanaPipeline(*parts, fast=True, offloader=offloader)
    assert isinstance(made.velocity, CapturedVelocity) and made.velocity.device == torch.device("cuda")
    made.velocity.device, offloader.is_active = CPU, False
    assert part.reserved() == 0
    sample(made, "a circle", steps=2)
    assert graphs.alive and part.reserved() == made.velocity.reserved() > 0
    part.on_leave()
    assert not graphs.alive and part.reserved() == 0


def test_a_cpu_has_no_graphs_and_that_is_said_before_anything_is_read(pipeline: SanaPipeline) -> None:
    for make in (lambda: SanaPipeline.load("not/there", fast=True), lambda: faster(pipeline)):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value) == CPU_HAS_NONE


def test_graphs_and_compiler_are_one_or_the_other(pipeline: SanaPipeline, graphs: Graphs) -> None:
    parts = pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder, pipeline.identity
    both = {"compiled": True, "fast": True}
    for make in (lambda: SanaPipeline.load("not/there", **both), lambda: SanaPipeline(*parts, **both)):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value) == (
            "--fast is given with --compile (in Python fast=True with compiled=True); give one of them"
        )
