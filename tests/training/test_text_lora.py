"""A LoRA that is in the text encoder, too: against PEFT and transformers, from the shell, and its file in every reader."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from diffusers import SanaPipeline as DiffusersPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sana.__main__ import main as shell
from sana.checkpoints.lora import Part, read_lora
from sana.checkpoints.quantising import quantise
from sana.loading import MODELS
from sana.networks.packed_layers import PackedLinear
from sana.networks.transformer import SanaTransformer
from sana.pipeline import SanaPipeline
from sana.text.prompt import INSTRUCTION
from sana.training import lora as module
from sana.training.adapters import (
    AdapterConfig,
    add_adapter,
    add_text_adapter,
    begin_with,
    lora_header,
    lora_tensors,
    named,
)
from sana.training.demo import GEMMA, TRANSFORMER
from sana.training.flow import FlowBatch, FlowObjective
from sana.training.loop import Stopped, TrainingConfig, Watch, train
from sana.training.lora import LoraConfig, train_lora
from sana.training.material import ModelFiles
from sana.training.shards import Shards
from tests.sana.measures import relative_error
from tests.sana.models import gemma, reference_text, reference_tokenizer, text_encoder, tokenizer_json
from tests.sana.twins import diffusers_transformer, randomise
from tests.training.lora_runs import SMALL, as_convolutions, lora, same

TEXTS = "--train-text-encoder"
STRONG = ("--alpha=8", "--learning-rate=0.1", "--ema=0", "--warmup=0", "--dtype=float32")
PROMPT = "a red circle left of a blue square"
CAPTIONS = ("A red circle left of a blue square.", "two stars")
NETWORK = replace(SMALL, text_width=64)  # as wide as the texts of `text_encoder`
LAYERS = 4 * GEMMA.num_hidden_layers


def adapted(config: AdapterConfig) -> tuple[FlowObjective, nn.ParameterDict]:
    """Small random networks with an adapter in both, all of whose weights act."""
    torch.manual_seed(0)
    transformer, encoder = randomise(SanaTransformer(NETWORK)), text_encoder()
    weights = add_adapter(transformer, config, seed=1)
    weights.update(add_text_adapter(encoder.model, config, seed=1))
    for weight in weights.values():
        weight.data += torch.randn_like(weight) / 20
    return FlowObjective(transformer, encoder, dropout=0.5), weights


def batch(seed: int = 4) -> FlowBatch:
    """Of two captions, the first of which is dropped with the seed 4."""
    latents = torch.randn(2, 32, 4, 6, generator=torch.Generator().manual_seed(seed))
    return FlowBatch(latents, captions=CAPTIONS, seed=seed)


def part(weights: nn.Module, of_texts: bool) -> dict[str, Tensor]:
    return {name: weight for name, weight in named(weights).items() if name.startswith("text_encoder.") == of_texts}


# What a step computes


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_those_of_peft_in_the_networks_of_others(tmp_path: Path, recompute: bool) -> None:
    """Of a caption and of the empty prompt: there each runs in full, with the instruction and all padding."""
    config = AdapterConfig(rank=3, alpha=6.0)
    objective, weights = adapted(config)
    objective.transformer.recompute = recompute
    objective(batch()).backward()

    theirs, reference = diffusers_transformer(NETWORK), gemma()
    plain = {name.replace("base_layer.", ""): tensor for name, tensor in objective.transformer.state_dict().items()}
    theirs.load_state_dict(
        as_convolutions({name: tensor for name, tensor in plain.items() if ".lora_" not in name}, theirs)
    )
    known = named(weights)
    gradients = {name: weights[name.replace(".", "/")].grad for name in known}
    trained = {}
    for before, network in (("", theirs), ("text_encoder.", reference)):
        own = [name.removeprefix(before) for name in part(weights, bool(before))]
        paths = sorted({name.partition(".lora_")[0] for name in own})
        network.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=paths), network)
        found = {name.replace(".default", ""): p for name, p in network.named_parameters() if p.requires_grad}
        assert sorted(found) == sorted(own)
        for name, parameter in found.items():
            parameter.data = known[before + name].clone().view(parameter.shape)
            trained[before + name] = parameter
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    tokenizer = reference_tokenizer(tmp_path)
    text, mask = reference_text(reference, tokenizer, CAPTIONS, INSTRUCTION)
    null, _ = reference_text(reference, tokenizer, [""], None)
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(2, 32, 4, 6, generator=generator)
    sigma = objective.noise_levels(2, 0.0, generator, torch.device("cpu"))
    dropped = torch.rand(2, generator=generator) < 0.5
    assert dropped.tolist() == [True, False]
    text = torch.where(dropped[:, None, None], null, text)
    clean = batch().latents
    x = torch.lerp(clean, noise, sigma[:, None, None, None])
    out = theirs(x, text, (1000 * sigma).floor(), encoder_attention_mask=mask.float()).sample
    (out - (noise - clean)).square().mean().backward()
    assert len(trained) == 2 * (6 * NETWORK.depth + 4 * 3)
    for name, parameter in trained.items():
        assert relative_error(gradients[name].view(parameter.shape), parameter.grad) < 1e-3, name


def test_a_step_reaches_both_networks_and_the_loss_falls(tmp_path: Path) -> None:
    """On one batch, and less so without what the text encoder has learnt."""
    objective, weights = adapted(AdapterConfig(rank=2))
    start = {name: tensor.clone() for name, tensor in named(weights).items()}
    config = TrainingConfig(12, 2e-2, warmup=1, schedule="constant", ema_decay=0.0, save_every=12)
    with torch.no_grad():
        before = float(objective(batch()))
    averaged = train(objective, lambda number, process: batch(), config, tmp_path, weights=weights)
    assert named(averaged).keys() == start.keys() and all(
        not torch.equal(tensor, start[name]) for name, tensor in named(averaged).items()
    )
    with torch.no_grad():
        after = float(objective(batch()))
        for key, weight in weights.items():
            if key.startswith("text_encoder/"):
                weight.data = start[key.replace("/", ".")]
        objective.text_encoder.forget()
        with_old_texts = float(objective(batch()))
    assert after < with_old_texts < before and after < 0.9 * before


# From the shell


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of both networks of the demo model in float32, with a sheet."""
    folder = tmp_path_factory.mktemp("trained")
    assert lora(pictures, folder, TEXTS, *STRONG, "--sheet-every=2", f"--prompt={PROMPT}") == 0
    return folder / "lora.safetensors"


def test_the_file_holds_both(trained: Path) -> None:
    with safe_open(trained, framework="pt") as file:
        header, names = file.metadata(), set(file.keys())
    assert all("lora" in name for name in names)  # or diffusers refuses the file
    settings = json.loads(header["lora_adapter_metadata"])
    counts = {"transformer": 6 * TRANSFORMER.depth, "text_encoder": LAYERS}
    for component, count in counts.items():
        assert (settings[f"{component}.r"], settings[f"{component}.lora_alpha"]) == (4, 8.0)
        assert len(settings[f"{component}.target_modules"]) == count
        assert sum(name.startswith(f"{component}.") for name in names) == 2 * count
    assert settings["text_encoder.target_modules"][0] == "layers.0.self_attn.k_proj"
    assert json.loads(header["sana_training"])["train_text_encoder"] is True
    tensors = load_file(trained)
    assert float(tensors["lora_te1_layers_0_self_attn_q_proj.alpha"]) == 8
    ups = [tensor for name, tensor in tensors.items() if name.startswith("text_encoder.") and "lora_B" in name]
    assert len(ups) == LAYERS and all(bool(tensor.any()) for tensor in ups)


def test_the_sheet_is_what_the_file_draws(trained: Path, tmp_path: Path) -> None:
    """Above what the model drew before, below what the file makes of it, which without its text encoder is something else."""
    half = {name: tensor for name, tensor in load_file(trained).items() if not name.startswith("text_encoder.")}
    save_file(half, tmp_path / "half.safetensors")
    with Image.open(trained.parent / "sheet-000002.png") as sheet:
        rows = [sheet.convert("RGB").crop((0, 256 * i, 256, 256 * (i + 1))) for i in range(2)]
    drawn = [
        SanaPipeline.load("demo", loras=[(path, 1.0)] if path else [])(PROMPT, steps=14, seed=0)[0]
        for path in (None, trained, tmp_path / "half.safetensors")
    ]
    assert difference(drawn[0], rows[0]) < 0.1 and difference(drawn[1], rows[1]) < 0.1
    assert difference(*rows) > 1 and difference(drawn[2], rows[1]) > 1


def difference(one: Image.Image, two: Image.Image) -> float:
    first, second = (torch.tensor(list(picture.tobytes())).float() for picture in (one, two))
    return float((first - second).abs().mean())


def test_pictures_alone_are_encoded(pictures: Path, trained: Path, tmp_path: Path) -> None:
    """What the text encoder makes of captions changes with every step. A folder that has their states, too, is as good."""
    assert len(Shards(trained.parent / "states")) == 4
    assert lora(pictures, tmp_path / "first", "--dtype=float32", f"--cache={tmp_path / 'cache'}") == 0
    assert len(Shards(tmp_path / "cache")) == 8
    assert lora(pictures, tmp_path / "out", TEXTS, *STRONG, f"--cache={tmp_path / 'cache'}") == 0
    assert len(Shards(tmp_path / "cache")) == 8
    assert same(tmp_path / "out" / "lora.safetensors", trained)


def test_sheets_show_texts_of_the_weights_at_hand(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of an optimizer that PyTorch does not notice writing, as bitsandbytes writes on a GPU."""
    seen: list[tuple[Tensor, Tensor]] = []

    class AdamW(torch.optim.Optimizer):
        def step(self, closure: None = None) -> None:
            for weight in self.param_groups[0]["params"]:
                weight.data.sub_(weight.grad.sign(), alpha=0.05)

    def draw(pipeline: SanaPipeline, size: tuple[int, int], text: Tensor, null: Tensor, seed: int) -> Image.Image:
        seen.append((text, null))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("sana.training.optimizers._make", lambda name, weights, common: AdamW(weights, dict(common)))
    monkeypatch.setattr(module, "draw", draw)
    config = LoraConfig(
        AdapterConfig(rank=2),
        train_text_encoder=True,
        steps=2,
        sheet_every=1,
        ema=0.0,
        dtype="float32",
        prompts=(PROMPT,),
    )
    path = train_lora(tmp_path, pictures, config)
    before, first, last = seen
    for (text, null), loras in ((before, []), (last, [(path, 1.0)])):
        encoder = SanaPipeline.load("demo", loras=loras).text_encoder
        expected, mask = encoder([PROMPT], INSTRUCTION)
        torch.testing.assert_close(text, expected[mask], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(null, encoder([""], None)[0][0], rtol=1e-4, atol=1e-4)
    assert min((first[0] - before[0]).abs().max(), (last[0] - first[0]).abs().max()) > 0.02


def test_a_stopped_training_goes_on_to_the_same_numbers(pictures: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        AdapterConfig(rank=2, dropout=0.3),
        train_text_encoder=True,
        steps=4,
        learning_rate=1e-2,
        sheet_every=0,
        save_every=4,
    )
    whole = train_lora(tmp_path / "whole", pictures, config)
    reports: list[object] = []
    watch = Watch(bar=False, step=reports.append, stopping=lambda: nullcontext(lambda: len(reports) == 2))
    with pytest.raises(Stopped):
        train_lora(tmp_path / "stopped", pictures, config, watch=watch)
    stopped = tmp_path / "stopped" / "lora.safetensors"
    assert not same(whole, stopped)
    train_lora(tmp_path / "stopped", pictures, config)
    assert same(whole, stopped)
    state = torch.load(tmp_path / "stopped" / "state.pt", weights_only=True)
    assert len(state["objective"]) == 2 * (6 * TRANSFORMER.depth + LAYERS)


def test_a_quantised_text_encoder_gets_one_too(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "int8.safetensors"
    quantise(MODELS["demo"] / "text_encoder", path, "int8")
    loaded = SanaPipeline.load("demo", text_encoder=path).text_encoder.model.layers[0].self_attn.q_proj
    assert isinstance(loaded, PackedLinear)
    assert lora(pictures, tmp_path / "out", TEXTS, f"--text-encoder={path}") == 0
    found = load_file(tmp_path / "out" / "lora.safetensors")
    ups = [tensor for name, tensor in found.items() if name.startswith("text_encoder.") and "lora_B" in name]
    assert len(ups) == LAYERS and all(bool(tensor.any()) for tensor in ups)


def test_the_shell_says_what_it_is_for(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(["info", str(trained)]) == 0
    told = capsys.readouterr().out
    weights = 6 * TRANSFORMER.depth + LAYERS
    assert f"for SANA's transformer and text encoder: LoRA of rank 4, alpha 8 on {weights} weights" in told


# The file


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr"])
def test_a_file_acts_as_its_training_did(tmp_path: Path, kind: str) -> None:
    """In the text encoder of our pipeline, by the strengths in the header or in the tensors alone."""
    config = AdapterConfig("lora" if kind == "rslora" else kind, 2, 6.0, rslora=kind == "rslora")
    pipeline = SanaPipeline.load("demo")
    torch.manual_seed(0)
    weights = add_text_adapter(pipeline.text_encoder.model, config)
    for weight in weights.values():
        weight.data += torch.rand_like(weight) / 10
    with torch.no_grad():
        expected, _ = pipeline.text_encoder([PROMPT])
    tensors, header = lora_tensors(weights, config), lora_header(weights, config, {})
    factors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    save_file(tensors, tmp_path / "tensors.safetensors")
    save_file(factors, tmp_path / "header.safetensors", header)
    for name in ("tensors", "header")[: 1 if kind in ("loha", "lokr") else 2]:
        path = tmp_path / f"{name}.safetensors"
        assert len(read_lora(path).found(Part.text_encoder(GEMMA))) == LAYERS
        found, _ = SanaPipeline.load("demo", loras=[(path, 1.0)]).text_encoder([PROMPT])
        assert relative_error(found, expected) < 1e-4
    plain, _ = SanaPipeline.load("demo").text_encoder([PROMPT])
    assert relative_error(plain, expected) > 0.01


def test_diffusers_loads_what_is_for_the_transformer(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = diffusers_transformer(TRANSFORMER)
    DiffusersPipeline(None, None, None, theirs, None).load_lora_weights(trained)
    assert not caplog.messages
    layers = [layer for layer in theirs.modules() if hasattr(layer, "lora_A")]
    assert len(layers) == 6 * TRANSFORMER.depth and all(next(iter(layer.scaling.values())) == 2 for layer in layers)


def test_an_adapter_begins_as_the_lora_that_it_goes_on_from(tmp_path: Path) -> None:
    """Where that is in the text encoder, too, both must be given, or a half of it would be lost."""
    config = AdapterConfig(rank=2, alpha=4.0)
    objective, weights = adapted(config)
    gemma_config = objective.text_encoder.model.config
    save_file(lora_tensors(weights, config), path := tmp_path / "first.safetensors", lora_header(weights, config, {}))
    other = replace(config, alpha=1.0)
    again = randomise(SanaTransformer(NETWORK)), text_encoder()
    fresh = add_adapter(again[0], other)
    with pytest.raises(ValueError) as raised:
        begin_with(fresh, path, other, NETWORK)
    assert str(raised.value) == (
        "first.safetensors is a lora of rank 2 on 24 layers, and this adapter a lora of rank 2 on 12; give the --kind, --rank, "
        "--targets and --train-text-encoder that it was trained with"
    )
    fresh.update(add_text_adapter(again[1].model, other))
    begin_with(fresh, path, other, NETWORK, gemma_config)
    for name, tensor in named(fresh).items():
        scale = 4.0 if "lora_B" in name else 1.0
        torch.testing.assert_close(tensor, scale * named(weights)[name])
    half = {
        name: tensor for name, tensor in load_file(path).items() if "text_encoder" not in name and "te1" not in name
    }
    save_file(half, half_path := tmp_path / "half.safetensors")
    with pytest.raises(
        ValueError, match="half.safetensors is a lora of rank 2 on 12 layers, and this adapter a lora of rank 2 on 24"
    ):
        begin_with(fresh, half_path, other, NETWORK, gemma_config)


# What is refused


def test_a_folder_of_a_lora_without_it_is_refused(
    pictures: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora(pictures, trained.parent, "--alpha=8") == 1
    told = capsys.readouterr().err
    assert f"{trained.parent} holds another training (" in told
    assert "adapter lora of rank 4, alpha 8, on attention, and on the text encoder" in told


def test_a_text_encoder_of_a_host_is_refused(pictures: Path, tmp_path: Path) -> None:
    class Hosted(ModelFiles):
        def load(self, dtype: torch.dtype) -> SanaPipeline:
            pipeline = super().load(dtype)
            pipeline.text_encoder = None
            return pipeline

    with pytest.raises(
        ValueError, match="this model has its text encoder in a host, where it cannot be trained; leave"
    ):
        train_lora(tmp_path / "out", pictures, LoraConfig(train_text_encoder=True), Hosted())
    assert not (tmp_path / "out").exists()
