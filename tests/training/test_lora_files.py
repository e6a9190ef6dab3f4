"""The file that the training of a LoRA leaves, in every reader, and going on from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline as DiffusersPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sana.__main__ import main as shell
from sana.checkpoints.files import CheckpointError
from sana.checkpoints.lora import Part, read_lora, read_merges
from sana.checkpoints.writing import convert
from sana.networks.transformer import SanaTransformer
from sana.training.adapters import (
    PRODUCTS,
    AdapterConfig,
    add_adapter,
    begin_with,
    lora_header,
    lora_tensors,
)
from sana.training.demo import TRANSFORMER
from tests.sana.measures import relative_error
from tests.sana.twins import diffusers_transformer, randomise
from tests.training.lora_runs import SMALL, as_convolutions, lora

Q = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the demo model on all kinds of layers, strong enough to be seen."""
    folder = tmp_path_factory.mktemp("trained")
    more = ["--targets=all", "--alpha=8", "--trigger=a scene", "--ema=0", "--warmup=0", "--batch-size=2"]
    assert lora(pictures, folder, *more) == 0
    return folder / "lora.safetensors"


# The file


def test_the_file_tells_what_it_is(trained: Path) -> None:
    with safe_open(trained, framework="pt") as file:
        header, names = file.metadata(), set(file.keys())
    assert f"transformer.{Q}.lora_A.weight" in names
    assert all("lora" in name for name in names)  # or diffusers refuses the file
    settings = json.loads(header["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 8.0)
    assert len(settings["transformer.target_modules"]) == 10 * TRANSFORMER.depth
    spec = {key: header[f"modelspec.{key}"] for key in ("architecture", "trigger_phrase", "resolution", "title")}
    assert spec == {
        "architecture": "sana/lora",
        "trigger_phrase": "a scene",
        "resolution": "256x256",
        "title": "lora",
    }
    told = json.loads(header["sana_training"])
    assert (told["steps"], told["pictures"], told["learning_rate"], told["adapter"]["targets"]) == (2, 4, 1e-2, "all")
    tensors = load_file(trained)
    assert tensors["transformer.transformer_blocks.0.ff.conv_point.lora_A.weight"].shape == (4, 480, 1, 1)
    assert float(tensors[f"lora_unet_{Q.replace('.', '_')}.alpha"]) == 8


@pytest.mark.parametrize("rslora", [False, True])
def test_its_strength_is_known_from_the_header_and_from_the_tensors_alone(tmp_path: Path, rslora: bool) -> None:
    network = randomise(SanaTransformer(SMALL))
    config = AdapterConfig(rank=4, alpha=6.0, rslora=rslora, targets="all")
    weights = add_adapter(network, config)
    tensors = lora_tensors(weights, config)
    factors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    save_file(tensors, tmp_path / "tensors.safetensors")
    save_file(factors, tmp_path / "header.safetensors", lora_header(weights, config, {}))
    for name in ("tensors", "header"):
        read = read_lora(tmp_path / f"{name}.safetensors")
        changes = read.found(Part.transformer(SMALL))
        assert len(changes) == len(read.layers) == 10 * SMALL.depth
        scales = {change.scale for by_name in changes.values() for change in by_name.values()}
        assert [*scales] == [pytest.approx(6 / 2 if rslora else 6 / 4)]


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "whole lokr"])
def test_a_file_acts_as_its_training_did(tmp_path: Path, kind: str) -> None:
    """In the reader of `generate --lora`, and in diffusers', for which products are converted."""
    torch.manual_seed(0)
    network = randomise(SanaTransformer(SMALL))
    base = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    config = AdapterConfig(kind.split()[-1], 8 if kind.startswith("whole") else 3, 6.0, targets="all")
    weights = add_adapter(network, config)
    for weight in weights.values():
        nn.init.normal_(weight, std=0.2)
        weight.data = weight.abs() + 0.5 if weight.ndim == 1 else weight.data
    path = tmp_path / "lora.safetensors"
    tensors = lora_tensors(weights, config)
    assert any(".lokr_w2_a" in name for name in tensors) == (kind == "lokr")
    save_file(tensors, path, lora_header(weights, config, {"format": "pt"}))
    inputs = torch.randn(1, 32, 2, 3), torch.tensor([500.0]), torch.randn(1, 4, SMALL.text_width)
    with torch.no_grad():
        expected = network(*inputs)
        merges, _ = read_merges([(path, 1.0)], SMALL, None)
        assert len(merges) == 10 * SMALL.depth
        merged = SanaTransformer(SMALL)
        merged.load_state_dict(
            {name: merges[name](tensor) if name in merges else tensor for name, tensor in base.items()}
        )
        assert relative_error(merged(*inputs), expected) < 1e-5
        if config.kind in PRODUCTS:
            convert(path, path := tmp_path / "converted.safetensors")
        theirs = diffusers_transformer(SMALL)
        theirs.load_state_dict(as_convolutions(base, theirs))
        before = theirs(inputs[0], inputs[2], inputs[1]).sample
        pipeline = DiffusersPipeline(None, None, None, theirs, None)
        pipeline.load_lora_weights(path)
        found = theirs(inputs[0], inputs[2], inputs[1]).sample
    assert relative_error(found, expected) < 1e-5
    assert relative_error(before, expected) > 0.03


def test_what_products_do_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rslora is for lora and dora, and this is a lokr; give one or the other"):
        AdapterConfig("lokr", rslora=True)
    config = AdapterConfig("loha", 2)
    with pytest.raises(ValueError, match="to go on is for lora and dora, and this is a loha; leave --start out"):
        begin_with(add_adapter(SanaTransformer(SMALL), config), tmp_path, config, SMALL)


def test_diffusers_loads_it_without_a_word(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = diffusers_transformer(TRANSFORMER)
    DiffusersPipeline(None, None, None, theirs, None).load_lora_weights(trained)
    assert not caplog.messages
    layers = [layer for layer in theirs.modules() if hasattr(layer, "lora_A")]
    assert len(layers) == 10 * TRANSFORMER.depth and all(next(iter(layer.scaling.values())) == 2 for layer in layers)


def test_the_shell_draws_with_it(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for name, more in (("plain", []), ("with", ["--lora", str(trained)])):
        path = tmp_path / f"{name}.png"
        assert shell(["generate", "a red circle", "--steps=2", "--out", str(path), *more]) == 0
        found.append(torch.tensor(list(Image.open(path).convert("RGB").tobytes())).float())
    assert (found[0] - found[1]).abs().mean() > 0.05
    assert shell(["info", str(trained)]) == 0
    assert f"LoRA of rank 4, alpha 8 on {10 * TRANSFORMER.depth} weights" in capsys.readouterr().out


# The folder


def test_the_state_is_that_of_the_adapter_alone(trained: Path) -> None:
    state = torch.load(trained.parent / "state.pt", weights_only=True)
    assert len(state["objective"]) == 2 * 10 * TRANSFORMER.depth
    assert (trained.parent / "state.pt").stat().st_size < 5 * trained.stat().st_size


def test_a_folder_of_another_adapter_is_refused(
    pictures: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora(pictures, trained.parent, "--targets=all", "--alpha=4") == 1
    told = capsys.readouterr().err
    assert f"{trained.parent} holds another training (" in told and "adapter lora of rank 4, alpha 8, on all" in told


# Going on from a LoRA


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_begins_as_the_lora_that_it_goes_on_from(tmp_path: Path, kind: str) -> None:
    """Also with another alpha: its factors are scaled then."""
    torch.manual_seed(0)
    network = randomise(SanaTransformer(SMALL))
    base = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    config = AdapterConfig(kind, 2, 4.0, targets="all")
    weights = add_adapter(network, config)
    for weight in weights.values():
        weight.data += torch.rand_like(weight) / 10
    path = tmp_path / "first.safetensors"
    save_file(lora_tensors(weights, config), path, lora_header(weights, config, {}))
    again = SanaTransformer(SMALL)
    again.load_state_dict(base)
    other = replace(config, alpha=1.0)
    begin_with(add_adapter(again, other), path, other, SMALL)
    inputs = torch.randn(1, 32, 2, 3), torch.tensor([500.0]), torch.randn(1, 4, SMALL.text_width)
    with torch.no_grad():
        assert relative_error(again(*inputs), network(*inputs)) < 1e-5
    for changed, told in (
        (
            replace(config, rank=3),
            f"first.safetensors is a {kind} of rank 2 on 20 layers, and this adapter a {kind} of rank 3 on 20",
        ),
        (replace(config, targets="attention"), "rank 2 on 20 layers, and this adapter"),
    ):
        fresh = SanaTransformer(SMALL)
        with pytest.raises(ValueError, match=told):
            begin_with(add_adapter(fresh, changed), path, changed, SMALL)
    wider = replace(SMALL, hidden_size=96, cross_heads=3)
    with pytest.raises(CheckpointError, match="first.safetensors was made for another model: it changes"):
        begin_with(add_adapter(SanaTransformer(wider), config), path, config, wider)


def test_the_shell_goes_on_from_a_lora(
    pictures: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--targets=all", "--alpha=8", "--learning-rate=1e-9", "--start", str(trained)]
    assert lora(pictures, tmp_path / "out", *more) == 0
    first, second = load_file(trained), load_file(tmp_path / "out" / "lora.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-6)
    assert lora(pictures, tmp_path / "other", "--start", str(trained)) == 1
    assert "lora.safetensors is a lora of rank 4 on 80 layers, and this adapter a lora of rank 4 on 48; give" in (
        capsys.readouterr().err
    )
