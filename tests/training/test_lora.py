"""Training a LoRA as its user runs it, against PEFT and PyTorch alone."""

import gc
import json
import os
import signal
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sana.checkpoints.quantising import quantise
from sana.checkpoints.transformer import load_transformer
from sana.loading import MODELS
from sana.networks.packed_layers import PackedLinear
from sana.networks.transformer import SanaTransformer
from sana.pipeline import SanaPipeline
from sana.training.adapters import (
    AdapterConfig,
    Seeded,
    add_adapter,
    named,
    target_layers,
)
from sana.training.demo import TRANSFORMER
from sana.training.flow import FlowBatch, FlowObjective
from sana.training.loop import Meter, Report, Stopped, TrainingConfig, Watch, train
from sana.training.lora import LoraConfig, train_lora, training_batches
from sana.training.material import Material, ModelFiles, gathered
from sana.training.pictures import mask_path, read_pictures, read_weight
from sana.training.shards import Shards
from tests.sana.measures import relative_error
from tests.sana.twins import diffusers_transformer, randomise
from tests.training.drawn import draw_pictures
from tests.training.lora_runs import SMALL, as_convolutions, lora, random_batches, same
from tests.training.stored import stored

# What a step computes


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_training_equals_one_by_peft_and_pytorch_alone(tmp_path: Path, kind: str) -> None:
    """Four steps of AdamW with warm-up, cosine, clipping and two batches a step, on diffusers' network."""
    torch.manual_seed(0)
    ours = randomise(SanaTransformer(SMALL))
    theirs = diffusers_transformer(SMALL)
    theirs.load_state_dict(as_convolutions(ours.state_dict(), theirs))
    adapter = AdapterConfig("dora" if kind == "dora" else "lora", 3, 6.0, rslora=kind == "rslora", targets="all")
    weights = add_adapter(ours, adapter, seed=1)
    for weight in weights.values():
        weight.data += torch.randn_like(weight) / 20  # where B is 0, A's first gradient is 0, and AdamW divides by it
    ours.double(), theirs.double()  # AdamW makes as much of a gradient that is but rounding as of any other
    start = {name: tensor.clone() for name, tensor in named(weights).items()}
    config = TrainingConfig(
        4, 1e-2, warmup=2, schedule="cosine", accumulate=2, ema_decay=0.0, clip=0.5, save_every=4, weight_decay=0.01
    )
    objective = FlowObjective(ours, flow_shift=3.0, dropout=0.0, null=torch.zeros(5, SMALL.text_width))
    batches = random_batches(SMALL)
    found = named(train(objective, batches, config, tmp_path, weights=weights))

    paths = sorted({name.partition(".lora_")[0] for name in start})
    theirs.requires_grad_(False)
    theirs.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=6.0, use_rslora=kind == "rslora", use_dora=kind == "dora", target_modules=paths)
    )
    parameters = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert parameters.keys() == start.keys()
    for name, parameter in parameters.items():
        parameter.data = start[name].clone().view(parameter.shape)
    update = torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)
    for step, rate in enumerate((0.5, 1.0, 1.0, 0.5)):  # cosine: (1 + cos(pi * (3 - 2) / (4 - 2))) / 2
        update.param_groups[0]["lr"] = 1e-2 * rate
        for number in (2 * step, 2 * step + 1):
            (reference_loss(theirs, batches(number, 0), objective) / 2).backward()
        nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        update.step()
        update.zero_grad()
    for name, parameter in parameters.items():
        assert relative_error(found[name].view(parameter.shape), parameter.detach()) < 1e-4, name
        assert not torch.equal(found[name], start[name]), name


def reference_loss(network: nn.Module, batch: FlowBatch, objective: FlowObjective) -> Tensor:
    """Flow matching as the paper has it: noise - clean at x = (1 - sigma) clean + sigma noise."""
    generator = torch.Generator().manual_seed(batch.seed)
    noise = torch.randn(batch.latents.shape, generator=generator)
    sigma = objective.noise_levels(len(batch), 0.0, generator, torch.device("cpu"))
    x = (1 - sigma)[:, None, None, None] * batch.latents + sigma[:, None, None, None] * noise
    inputs = (x.double(), batch.text.double(), (1000 * sigma).floor())
    out = network(*inputs, encoder_attention_mask=batch.text_mask.double()).sample
    return (out.float() - (noise - batch.latents)).square().mean()


def test_only_the_adapter_is_trained_and_it_begins_as_nothing(pictures: Path) -> None:
    network = load_transformer(MODELS["demo"])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x, time, text = torch.randn(1, 32, 8, 8), torch.tensor([500.0]), torch.randn(1, 4, 192)
    with torch.no_grad():
        expected = network(x, time, text)
    weights = add_adapter(network, AdapterConfig())
    with torch.no_grad():
        assert torch.equal(network(x, time, text), expected)
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(weights) == 2 * 6 * TRANSFORMER.depth and all(".lora_" in name for name in trainable)
    frozen = {name.replace("base_layer.", ""): tensor for name, tensor in network.state_dict().items()}
    assert all(torch.equal(frozen[name], tensor) for name, tensor in before.items())


def test_the_text_encoder_is_gone_before_the_first_step(pictures: Path, tmp_path: Path) -> None:
    """It is the largest part of a model, and nothing reads it any more."""
    source, seen = ModelFiles(), []

    class Watched(ModelFiles):
        def load(self, dtype: torch.dtype) -> SanaPipeline:
            pipeline = source.load(dtype)
            seen.append(weakref.ref(pipeline.text_encoder))
            return pipeline

    with gathered(tmp_path, pictures, Watched()):
        gc.collect()
        assert [reference() for reference in seen] == [None]


def test_gradients_of_recomputed_blocks_and_of_dropped_inputs_are_the_same(tmp_path: Path) -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = randomise(SanaTransformer(SMALL))
        network.recompute = recompute
        weights = add_adapter(network, AdapterConfig(rank=2, dropout=0.5, targets="all"), seed=1)
        for weight in weights.values():
            nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(2))
        objective = Seeded(FlowObjective(network, null=torch.zeros(5, SMALL.text_width)))
        for _ in range(2):  # the numbers of the process do not count
            torch.rand(1)
            loss = objective(random_batches(SMALL)(0, 0))
            for weight in weights.values():
                weight.grad = None
            loss.backward()
            found.append([loss.detach(), *(weight.grad.clone() for weight in weights.values())])
    for others in found[1:]:
        for one, two in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


# Which layers


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"}),
        (
            "all",
            {
                *(f"attn{i}.to_{e}" for i in (1, 2) for e in ("q", "k", "v", "out.0")),
                "ff.conv_inverted",
                "ff.conv_point",
            },
        ),
        (r".*blocks\.1\.attn1\.to_(q|k)", {"attn1.to_q", "attn1.to_k"}),
    ],
)
def test_targets(targets: str, expected: set[str]) -> None:
    found = target_layers(SanaTransformer(SMALL, device="meta"), AdapterConfig(targets=targets))
    assert {path.split(".", 2)[2] for path in found} == expected
    blocks = {"1"} if "1" in targets else {"0", "1"}
    assert {path.split(".")[1] for path in found} == blocks


def test_layers_outside_of_blocks_can_be_named() -> None:
    network = SanaTransformer(SMALL, device="meta")
    found = target_layers(network, AdapterConfig(targets=r"patch_embed\.proj|caption_projection\.linear_[12]"))
    assert found == ["patch_embed.proj", "caption_projection.linear_1", "caption_projection.linear_2"]


# Stopping and going on


def test_a_stopped_training_saves_and_goes_on_to_the_same_numbers(pictures: Path, tmp_path: Path) -> None:
    """With dropout, which draws random numbers, and stopped between two saved states."""
    config = LoraConfig(
        AdapterConfig(rank=2, dropout=0.3), steps=4, learning_rate=1e-2, accumulate=2, sheet_every=0, save_every=4
    )
    whole = train_lora(tmp_path / "whole", pictures, config)
    reports: list[Report] = []
    watch = Watch(bar=False, step=reports.append, stopping=lambda: nullcontext(lambda: len(reports) == 2))
    with pytest.raises(Stopped, match="stopped after step 2 of 4, which is saved"):
        train_lora(tmp_path / "stopped", pictures, config, watch=watch)
    assert [(report.step, report.steps) for report in reports] == [(1, 4), (2, 4)]
    assert torch.load(tmp_path / "stopped" / "state.pt", weights_only=True)["step"] == 2
    part = tmp_path / "stopped" / "lora.safetensors"
    with safe_open(part, framework="pt") as file:
        assert json.loads(file.metadata()["sana_training"])["steps"] == 2
    assert not same(whole, part)
    train_lora(tmp_path / "stopped", pictures, config)
    assert same(whole, part)
    rows = [
        [row.split(",")[:2] for row in (tmp_path / name / "log.csv").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    assert rows[0][-1][0] == rows[1][-1][0] == "4"


def test_ctrl_c_saves_and_the_same_command_goes_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = Meter.note

    def interrupted(meter: Meter, *more: object) -> None:
        note(meter, *more)
        if meter.seen == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Meter, "note", interrupted)
    assert lora(pictures, tmp_path, "--steps=4") == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "Stopped: stopped after step 2 of 4, which is saved; the same command goes on from there"
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2
    assert (tmp_path / "lora.safetensors").exists() and signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert lora(pictures, tmp_path, "--steps=4") == 0
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 4


# On what


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's transformer in 8 bits."""
    path = tmp_path_factory.mktemp("quantised") / "int8.safetensors"
    quantise(MODELS["demo"], path, "int8")
    return path


def test_a_quantised_base_stays_packed_and_gets_a_lora(pictures: Path, quantised: Path, tmp_path: Path) -> None:
    model = ["--model", str(quantised), "--autoencoder=demo", "--text-encoder=demo", "--targets=all"]
    assert lora(pictures, tmp_path, *model) == 0
    found = load_file(tmp_path / "lora.safetensors")
    ups = [tensor for name, tensor in found.items() if "lora_B" in name]
    assert len(ups) == 10 * TRANSFORMER.depth and all(bool(tensor.any()) for tensor in ups)
    network = load_transformer(quantised)
    weights = add_adapter(network, AdapterConfig(targets="all"))
    assert sum(isinstance(layer, PackedLinear) for layer in network.modules()) == 10 * TRANSFORMER.depth
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_a_dora_on_a_quantised_base_is_refused(
    pictures: Path, quantised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(quantised), "--autoencoder=demo", "--text-encoder=demo"]
    assert lora(pictures, tmp_path, *model, "--kind=dora") == 1
    assert "a DoRA needs the lengths of weights, and transformer_blocks.0.attn1.to_q is quantised;" in (
        capsys.readouterr().err
    )


def test_16_bits_are_trained_in_with_an_adapter_in_32(pictures: Path, tmp_path: Path) -> None:
    assert lora(pictures, tmp_path, "--dtype=bfloat16") == 0
    found = load_file(tmp_path / "lora.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    ups = torch.cat([tensor.flatten() for name, tensor in found.items() if "lora_B" in name])
    assert bool((ups != ups.bfloat16().float()).any())


def test_a_mask_tells_which_cells_count(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "data", 2)
    mask = Image.new("L", (256, 256))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "data" / "0-masklabel.png")
    found = read_pictures(tmp_path / "data", 256)
    assert [picture.path.name for picture in found] == ["0.png", "1.png"]
    first, second = (read_weight(mask_path(picture), picture.size) for picture in found)
    expected = torch.zeros(1, 8, 8)
    expected[0, :2, 0] = 32.0  # 64 cells share what two have
    torch.testing.assert_close(first, expected)
    assert torch.equal(second, torch.ones(1, *(side // 32 for side in found[1].size)))
    Image.new("L", (256, 256)).save(tmp_path / "data" / "0-masklabel.png")
    with pytest.raises(ValueError, match="0-masklabel.png is black, so that nothing of its picture would be learnt"):
        read_weight(mask_path(found[0]), found[0].size)


def test_weights_scale_the_errors_of_their_cells() -> None:
    objective = FlowObjective(randomise(SanaTransformer(SMALL)), dropout=0.0, null=torch.zeros(5, SMALL.text_width))
    plain = random_batches(SMALL)(0, 0)
    left, right = torch.zeros(2, 2, 1, 4, 6)
    left[..., :1], right[..., 1:] = 1, 1
    losses = [float(objective(replace(plain, weight=weight))) for weight in (None, left, right, 3 * left)]
    assert losses[0] == pytest.approx(losses[1] + losses[2]) and losses[3] == pytest.approx(3 * losses[1])


def test_every_other_batch_is_of_the_prior(tmp_path: Path) -> None:
    own, prior = (stored(tmp_path / str(value), [torch.full((32, 1, 1), value)]) for value in (1.0, 2.0))
    material = Material(None, own, [], prior)
    batches = training_batches(material, LoraConfig(batch_size=3, prior=Path("prior"), prior_weight=0.5))
    seen = [batches(number, 0) for number in range(4)]
    assert [float(batch.latents[0, 0, 0, 0]) for batch in seen] == [1, 2, 1, 2]
    assert [batch.weight is None or float(batch.weight.mean()) for batch in seen] == [True, 0.5, True, 0.5]
    assert LoraConfig(prior=Path("prior"), accumulate=3).training.accumulate == 6
    assert training_batches(replace(material, prior=None), LoraConfig(batch_size=3))(1, 0).weight is None


def test_a_prior_is_trained_on(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "prior").mkdir()
    for name in ("0.png", "0.txt"):
        (tmp_path / "prior" / name).write_bytes((pictures / name).read_bytes())
    for name, more in (("without", []), ("with", ["--prior", str(tmp_path / "prior")])):
        assert lora(pictures, tmp_path / name, *more) == 0
    assert not same(tmp_path / "without" / "lora.safetensors", tmp_path / "with" / "lora.safetensors")
    assert len(Shards(tmp_path / "with" / "states")) == 8  # a picture that is in both is encoded once


# Sheets


def test_a_sheet_shows_the_base_above_the_adapter(pictures: Path, tmp_path: Path) -> None:
    """With the prompts given and their fixed seeds; the training does not notice the averaged weights that were drawn with."""
    prompts = ["--prompt=a red circle", "--prompt=two blue stars"]
    assert lora(pictures, tmp_path, "--sheet-every=1", "--ema=0", "--warmup=0", *prompts) == 0
    sheets = []
    for step in (1, 2):
        with Image.open(tmp_path / f"sheet-00000{step}.png") as sheet:
            assert sheet.size == (6 * 256, 2 * 256)
            sheets.append(torch.tensor(list(sheet.convert("RGB").tobytes())).view(2, 256, 6, 256, 3).float())
    first, second = sheets
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    assert first[0, :, 1].std() > 1 and not first[0, :, 2].any()  # two prompts
    for column, prompt in enumerate(("a red circle", "two blue stars")):
        expected = SanaPipeline.load("demo")(prompt, steps=14, seed=column)[0]
        drawn = first[0, :, column]
        difference = (torch.tensor(list(expected.tobytes())).view(256, 256, 3).float() - drawn).abs()
        assert difference.mean() < 1
    plain = tmp_path / "plain"
    assert lora(pictures, plain, "--ema=0", "--warmup=0") == 0
    assert same(plain / "lora.safetensors", tmp_path / "lora.safetensors")
