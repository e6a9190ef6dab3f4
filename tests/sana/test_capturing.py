"""Steps as graphs, on a CPU that records and launches them as a GPU does: `bench/recorder.py`."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from threading import Event, Thread
from typing import NamedTuple
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from bench.recorder import Graphs, graphs_on_cpu
from sana import capturing
from sana.capturing import MOST_GRAPHS, CapturedVelocity, weights_read
from sana.networks.adapters import Change, Changes, Factors
from sana.networks.devices import GraphRecorder
from sana.networks.packed import PackedWeight, nv_blocks, scaled
from sana.networks.packed_layers import put_weight, unpacking_bytes
from sana.networks.transformer import Modulation, SanaTransformer, TextContext
from sana.sampling.solvers import SamplingError
from tests.sana.measures import relative_error
from tests.sana.twins import STRUCTURES, TEXT_WIDTH, randomise, tiny_config

CPU = torch.device("cpu")
ROUNDING = 1e-6
PACKED = "transformer_blocks.0.attn1.to_out.0.weight"


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    with graphs_on_cpu() as found:
        yield found


class Inputs(NamedTuple):
    x: Tensor
    modulation: Modulation
    context: TextContext


def network(variant: str = STRUCTURES[0]) -> SanaTransformer:
    torch.manual_seed(0)
    made = SanaTransformer(tiny_config(variant, depth=2))
    randomise(made)
    return made.eval().requires_grad_(False)


@torch.no_grad()
def inputs(made: SanaTransformer, tokens: int = 20, seed: int = 0, rows: int = 2, times: int = 1) -> Inputs:
    """Of two samples, whose texts have so many tokens and five less. times: 1 for both, or 2."""
    torch.manual_seed(seed)
    x = torch.randn(2, 32, rows, 3).to(made.dtype)
    embed = torch.rand(times) if made.config.guidance_embed else None
    modulation = made.modulation(torch.rand(times) * (1 if made.config.continuous_time else 1000), embed)
    mask = torch.arange(tokens + 3) < torch.tensor([[tokens], [max(1, tokens - 5)]])
    context = made.text_context(torch.randn(2, tokens + 3, TEXT_WIDTH).to(made.dtype), mask)
    return Inputs(x, modulation, context)


@torch.no_grad()
def check(fast: CapturedVelocity, given: Inputs, **options: object) -> Tensor:
    """The velocity, which must be that of the transformer."""
    found, expected = fast(*given, **options), fast.transformer.velocity(*given, **options)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert relative_error(found, expected) < ROUNDING
    return found


@pytest.mark.parametrize("variant", STRUCTURES)
def test_a_graph_serves_all_latents_times_and_texts_of_a_length(graphs: Graphs, variant: str) -> None:
    made = network(variant)
    fast = CapturedVelocity(made, CPU)
    for launched, (tokens, recorded) in enumerate([(20, 1), (64, 1), (65, 2), (1, 2), (128, 2), (129, 3), (20, 3)]):
        check(fast, inputs(made, tokens, seed=launched))
        assert (graphs.recorded, graphs.launched) == (recorded, launched + 1)
    assert {graph.mask.shape[-1] for graph in fast._graphs.values()} == {64, 128, 192}
    check(fast, inputs(made, times=2))  # other arithmetic than one time for both
    check(fast, inputs(made, rows=4))
    assert graphs.recorded == 5


def test_results_are_the_caller_s_and_outlast_other_launches(graphs: Graphs) -> None:
    made = network()
    fast = CapturedVelocity(made, CPU)
    first = check(fast, inputs(made))
    kept = first.clone()
    check(fast, inputs(made, seed=1))
    check(fast, inputs(made, 100))
    assert torch.equal(first, kept)


def test_identity_blocks_are_graphs_of_their_own(graphs: Graphs) -> None:
    made = network()
    fast, given = CapturedVelocity(made, CPU), inputs(made)
    plain, *perturbed = (check(fast, given, identity_blocks=blocks) for blocks in ((), {0}, {1}, [1]))
    assert graphs.recorded == 3
    assert all(relative_error(each, plain) > 0.01 for each in perturbed)


def test_texts_are_copied_once_for_all_steps(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    fast, first, second = CapturedVelocity(made, CPU), inputs(made), inputs(made, seed=1)
    check(fast, first)
    copies: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: copies.append(len(to)) or copy(to, of))
    latent = [4]  # and the three tensors of a modulation
    texts = [4, 4]  # keys and values of two blocks
    for given, expected in ((first._replace(x=second.x), latent), (second, texts), (second, latent), (first, texts)):
        copies.clear()
        check(fast, given)
        assert copies == expected
    text, mask = first.context, first.context.mask
    mixed = text._replace(keys_values=(text.keys_values[0], second.context.keys_values[1]))
    for context in (mixed, text._replace(mask=None), text._replace(mask=mask.roll(1, -1))):
        check(fast, first)
        check(fast, first._replace(context=context))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_numbers_of_a_longer_text_leave_no_trace(graphs: Graphs, broken: float) -> None:
    made = network()
    fast, longer = CapturedVelocity(made, CPU), inputs(made, 60)
    for keys, values in longer.context.keys_values:
        keys[:, :, 40:], values[:, :, 40:] = broken, broken
    with torch.no_grad():
        assert not fast(*longer).isfinite().all()
    assert check(fast, inputs(made, 30)).isfinite().all()
    assert graphs.recorded == 1


def packed(made: SanaTransformer, strength: float = 1.0) -> PackedWeight:
    """In int8, with a LoRA."""
    width = made.config.hidden_size
    numbers = torch.randint(-127, 128, (width, width), dtype=torch.int8)
    weight = PackedWeight("int8", scaled, {"packed": numbers, "scale": torch.full((width, 1), 0.002)}, numbers.shape)
    change = Change("LoRA", (Factors(torch.randn(width, 2), torch.randn(2, width)),))
    weight.changes.append(Changes([(change, strength)]))
    return weight


def in_place(made: SanaTransformer) -> None:
    made.proj_out.weight.mul_(2)


def moved(made: SanaTransformer) -> None:
    """As by an offloader: the same numbers elsewhere, and others where they were."""
    old = made.proj_out.weight.data
    made.proj_out.weight.data = old.clone()
    old.fill_(torch.nan)


def assigned(made: SanaTransformer) -> None:
    made.load_state_dict({name: 2 * tensor for name, tensor in made.state_dict().items()}, assign=True)


def replaced(made: SanaTransformer) -> None:
    made.transformer_blocks[1].ff = network(STRUCTURES[1]).transformer_blocks[0].ff


def cast(made: SanaTransformer) -> None:
    made.proj_out.float().half().bfloat16().float()


def stronger(made: SanaTransformer) -> None:
    (changes,) = made.get_submodule(PACKED).changes
    changes.changes = tuple((change, 0.3) for change, _ in changes.changes)


def another_lora(made: SanaTransformer) -> None:
    made.get_submodule(PACKED).changes[0] = packed(made).changes[0]


def one_more_lora(made: SanaTransformer) -> None:
    made.get_submodule(PACKED).changes.append(packed(made).changes[0])


@pytest.mark.parametrize(
    ("change", "recorded"),
    [
        (in_place, 1),
        (moved, 2),
        (assigned, 2),
        (replaced, 2),
        (cast, 2),
        (stronger, 2),
        (another_lora, 2),
        (one_more_lora, 2),
    ],
)
def test_weights_are_those_of_today(graphs: Graphs, change: Callable[[SanaTransformer], None], recorded: int) -> None:
    made = network()
    put_weight(made, PACKED, packed(made))
    fast, given = CapturedVelocity(made, CPU), inputs(made)
    before = check(fast, given)
    with torch.no_grad():
        change(made)
    after = check(fast, given)
    check(fast, given)
    assert graphs.recorded == recorded
    assert (relative_error(after, before) > 0.01) == (change not in (moved, cast))


def test_the_same_memory_as_another_dtype_is_another_weight() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    before = weights_read(layer)
    assert weights_read(layer) == before
    layer.weight.data = layer.weight.data.view(torch.int32)
    assert weights_read(layer) != before


def test_four_bits_are_unpacked_in_a_graph(graphs: Graphs) -> None:
    made = network()
    width = made.config.hidden_size
    parts = {
        "packed": torch.randint(0, 256, (width, width // 2), dtype=torch.uint8),
        "scale": torch.rand(width, width // 16).to(torch.float8_e4m3fn),
        "scale_2": torch.full((1, 1), 0.02),
    }
    put_weight(made, PACKED, PackedWeight("nvfp4", nv_blocks, parts, (width, width)))
    fast = CapturedVelocity(made, CPU)
    for seed in range(2):
        check(fast, inputs(made, seed=seed))
    assert graphs.recorded == 1


class OtherLinear(nn.Linear):
    """As of a library that puts adapters beside layers."""


def other_layer(made: SanaTransformer) -> None:
    layer = OtherLinear(96, 32).requires_grad_(False)
    layer.load_state_dict(made.proj_out.state_dict())
    made.proj_out = layer


def hooked(made: SanaTransformer) -> None:
    made.transformer_blocks[1].attn2.register_forward_hook(lambda layer, given, found: None)


def patched(made: SanaTransformer) -> None:
    made.proj_out.forward = lambda x: 2 * nn.Linear.forward(made.proj_out, x)


def wrapped(made: SanaTransformer) -> None:
    class Wrapped(nn.Parameter):
        pass

    weight = made.proj_out.weight.data
    del made.proj_out.weight
    made.proj_out.register_parameter("weight", nn.Parameter.__new__(Wrapped, weight, requires_grad=False))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_layer, "layers of the class OtherLinear are of another package, which may change them unseen"),
        (hooked, "a layer of the class CrossAttention has a hook, which no graph calls"),
        (patched, "a layer of the class Linear has a hook, which no graph calls"),
        (wrapped, "weights of the class Wrapped do not tell where they lie"),
    ],
)
def test_layers_that_a_graph_would_pass_over_run_without_and_that_is_said_once(
    graphs: Graphs, caplog: pytest.LogCaptureFixture, change: Callable[[SanaTransformer], None], reason: str
) -> None:
    made = network()
    fast, given = CapturedVelocity(made, CPU), inputs(made)
    check(fast, given)
    assert (graphs.recorded, graphs.launched) == (1, 1)
    change(made)
    for _ in range(2):
        check(fast, given)
    assert (graphs.recorded, graphs.launched) == (1, 1)
    assert caplog.messages == [f"Steps run as without --fast (in Python fast=True), since {reason}."]


def test_who_stops_watching_gets_graphs_again(graphs: Graphs) -> None:
    made = network()
    fast, given = CapturedVelocity(made, CPU), inputs(made)
    handles = [
        made.proj_out.register_forward_pre_hook(lambda layer, given: None),
        nn.modules.module.register_module_forward_hook(lambda layer, given, found: None),
    ]
    for handle in handles:
        check(fast, given)
        assert not graphs.recorded
        handle.remove()
    check(fast, given)
    assert graphs.recorded == 1


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"control": lambda tokens: [tokens]}, nullcontext()),
        ({"max_bytes": 1}, nullcontext()),
        ({}, torch.enable_grad()),
        ({}, torch.autocast("cpu", torch.bfloat16)),
    ],
    ids=["control", "bound", "gradients", "autocast"],
)
def test_other_ways_to_compute_have_no_graphs(
    graphs: Graphs, options: dict[str, object], mode: torch.enable_grad
) -> None:
    made = network()
    fast, given = CapturedVelocity(made, CPU), inputs(made)
    with torch.no_grad(), mode:
        found, expected = fast(*given, **options), made.velocity(*given, **options)
    assert torch.equal(found, expected) and not graphs.recorded


def test_bands_and_other_devices_have_no_graphs(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    fast, given = CapturedVelocity(made, CPU), inputs(made)
    whole = made.activation_bytes(given.x.shape, 4)
    monkeypatch.setattr(capturing, "WORKING_BYTES", whole - 1)
    check(fast, given)
    assert not graphs.recorded
    monkeypatch.setattr(capturing, "WORKING_BYTES", whole)
    check(fast, given)
    assert graphs.recorded == 1 and fast.reserved() == whole
    fast.device = torch.device("cuda")
    check(fast, given)
    assert graphs.launched == 1


def test_the_last_used_graphs_are_kept(graphs: Graphs) -> None:
    made = network()
    fast = CapturedVelocity(made, CPU)
    sizes = [inputs(made, rows=rows) for rows in range(1, MOST_GRAPHS + 2)]
    *kept, last = sizes
    for given in (*kept, kept[0], last):
        check(fast, given)
    assert graphs.recorded == MOST_GRAPHS + 1
    check(fast, kept[0])
    assert graphs.recorded == MOST_GRAPHS + 1
    check(fast, kept[1])
    assert graphs.recorded == MOST_GRAPHS + 2
    assert len(graphs.alive) == MOST_GRAPHS


def test_what_is_released_is_gone_and_recorded_anew_in_memory_of_its_own(graphs: Graphs) -> None:
    made = network()
    put_weight(made, PACKED, packed(made))
    fast, given = CapturedVelocity(made, CPU), inputs(made)
    check(fast, given)
    check(fast, inputs(made, 100))
    assert len(graphs.alive) == 2
    assert fast.reserved() == made.activation_bytes(given.x.shape, 4) + unpacking_bytes(made, 4)
    fast.release()
    assert not graphs.alive and not fast.reserved()
    change = ref(made.get_submodule(PACKED).changes[0].changes[0][0])
    stronger(made)
    assert change() is not None
    another_lora(made)
    assert change() is None
    check(fast, given)
    assert graphs.recorded == 3


def test_a_graph_of_inference_mode_serves_outside_of_it(graphs: Graphs) -> None:
    made = network()
    fast = CapturedVelocity(made, CPU)
    with torch.inference_mode():
        check(fast, inputs(made))
    check(fast, inputs(made, seed=1))
    assert graphs.recorded == 1


def failing(fast: CapturedVelocity, error: Exception, rows: int) -> list[int]:
    """Let recording fail for latents of so many rows. Notes the rows of all that are tried."""
    record, tried = fast._record, []

    def fail(run: Callable[[], Tensor]) -> object:
        tried.append(run.args[0].shape[2])
        if tried[-1] == rows:
            raise error
        return record(run)

    fast._record = fail
    return tried


def test_a_size_without_memory_for_its_graph_runs_without(graphs: Graphs, caplog: pytest.LogCaptureFixture) -> None:
    made = network()
    fast = CapturedVelocity(made, CPU)
    tried = failing(fast, torch.OutOfMemoryError("CUDA out of memory."), rows=4)
    small, large = inputs(made), inputs(made, rows=4)
    check(fast, small)
    check(fast, large)
    assert not graphs.alive  # so that the step has their memory
    check(fast, large)
    check(fast, small)
    check(fast, large)
    assert tried == [2, 4, 2] and (graphs.recorded, graphs.launched) == (2, 2)
    in_place(made)
    check(fast, large)
    assert tried == [2, 4, 2]
    moved(made)
    check(fast, large)
    assert tried == [2, 4, 2, 4]
    assert caplog.messages == [
        "There is too little memory to record a step of this size, which runs as without --fast."
    ]


def test_another_failure_is_one_sentence(graphs: Graphs) -> None:
    made = network()
    fast = CapturedVelocity(made, CPU)
    failing(fast, RuntimeError("\nCUDA error: operation not permitted\nwhen stream is capturing"), rows=2)
    with pytest.raises(SamplingError) as caught, torch.no_grad():
        fast(*inputs(made))
    assert str(caught.value) == (
        "recording a step as a graph failed (RuntimeError: CUDA error: operation not permitted); leave out --fast "
        "(in Python fast=True): the picture is the same without"
    )


# The recorder of a GPU


def test_what_is_recorded_has_run_before_on_the_same_stream_and_waits_for_the_other(graphs: Graphs) -> None:
    runs: list[str] = []
    x = torch.ones(2)
    launch, out = GraphRecorder(CPU)(lambda: runs.append(graphs.current.name) or 2 * x)
    assert graphs.events == [
        "side waits for current",
        "on side",
        "recording on side, thread_local",
        "recording ends",
        "current waits for side",
    ]
    assert runs == ["side"] * 3 and graphs.current.name == "current"
    x.fill_(3)
    launch()
    assert len(runs) == 3 and out.tolist() == [6, 6]


def test_one_graph_is_recorded_at_a_time_whatever_recorders_there_are(graphs: Graphs) -> None:
    """Warm-ups wait, too: while PyTorch records, nothing is to synchronise the device."""
    x, runs, started = torch.ones(2), [], Event()

    def second() -> None:
        GraphRecorder(CPU)(lambda: started.set() or x + 1)

    other = Thread(target=second)

    def first() -> Tensor:
        runs.append(1)
        if len(runs) == 3:
            other.start()
            assert not started.wait(0.1)
        return 2 * x

    GraphRecorder(CPU)(first)
    other.join(10)
    assert started.is_set() and graphs.recorded == 2


def test_a_failure_while_recording_leaves_the_stream_that_was_current(graphs: Graphs) -> None:
    recorder, x = GraphRecorder(CPU), torch.ones(2)
    with pytest.raises(RuntimeError, match="needs numbers that are not there while a graph is recorded"):
        recorder(lambda: x * float(x.sum()))
    assert graphs.current.name == "current" and not graphs.recorded
    assert graphs.events[-1] == "recording ends"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: x[x > 0], "aten.index.Tensor needs numbers that are not there"),
        (lambda x: x.nonzero(), "aten.nonzero.default needs numbers that are not there"),
        (lambda x: x + torch.arange(2), "meta"),
        (lambda x: x + torch.arange(2).float().to(x.device), "meta"),
        (lambda x: x.copy_(torch.tensor(1.0)), "meta"),
        (lambda x: x + torch.tensor([1.0, 2.0], device=CPU), "numbers of Python are copied to the device"),
    ],
    ids=["mask", "nonzero", "host", "table", "number", "numbers"],
)
def test_the_stand_in_refuses_what_cuda_refuses(graphs: Graphs, run: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        GraphRecorder(CPU)(lambda: run(torch.ones(2, device=CPU)))


def test_the_stand_in_computes_when_it_is_launched_and_where_it_was_recorded(graphs: Graphs) -> None:
    recorder, weight = GraphRecorder(CPU), nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=False)
    first, one = recorder(lambda: torch.arange(2, device=CPU).add_(weight.add(1).mul_(2).long()).float())
    assert one.isnan().all()
    second, two = recorder(lambda: weight.view(2, 1).sum(0))
    first()
    assert one.tolist() == [4, 7] and two.isnan().all()
    weight.data = torch.zeros(2)
    second()
    assert two.tolist() == [3] and one.isnan().all()
