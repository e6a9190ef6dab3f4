"""Products in 8 bits, which are asked for: what they change, and where they cannot be."""

from pathlib import Path

import pytest
import torch
from torch import nn

from sana import loading
from sana.checkpoints.quantising import quantise
from sana.networks.adapters import Changes
from sana.networks.packed_layers import put_weight
from sana.pipeline import SanaPipeline
from sana.plan import Settings
from tests.sana.measures import relative_error
from tests.sana.networks.test_packed import packed
from tests.sana.shell.commands import Shell, pixels

OPTION = "in_int8 (in the shell --in-int8)"


@pytest.fixture(autouse=True)
def capable_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "HAS_INT8_PRODUCTS", True)


@pytest.fixture(scope="module")
def in_int8(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quantise(model, target := tmp_path_factory.mktemp("int8") / "model.safetensors", "int8", dtype=torch.float32)
    return target


def test_a_step_differs_by_what_rounding_takes(model: Path, in_int8: Path) -> None:
    parts = {"autoencoder": model, "text_encoder": model}
    latents = [
        list(SanaPipeline.load(file, **parts, in_int8=rounded).sample("a cat", Settings(steps=1)))[-1].next_x
        for file, rounded in ((model, False), (in_int8, False), (in_int8, True))
    ]
    unpacked, rounded = (relative_error(latent, latents[0]) for latent in latents[1:])
    assert 0 < unpacked < rounded < 0.1


def test_a_picture_is_drawn_in_8_bits(shell: Shell, model: Path, in_int8: Path) -> None:
    files = ("--model", in_int8, "--autoencoder", model, "--text-encoder", model)
    outs = [shell.folder / f"{name}.png" for name in ("unpacked", "rounded", "again")]
    shell.draw("a cat", *files, "--out", outs[0])
    for out in outs[1:]:
        assert shell.draw("a cat", *files, "--in-int8", "--out", out) == [out]
    unpacked, rounded, again = map(pixels, outs)
    assert rounded == again and rounded != unpacked


def test_where_it_cannot_be_one_sentence_says_so(
    shell: Shell, model: Path, in_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--model", in_int8, "--autoencoder", model, "--text-encoder", model)
    assert shell.fail("a cat", "--in-int8") == (
        f"{OPTION} needs a transformer in int8, and {model} is none; write one with sana convert --quantize int8"
    )
    assert shell.fail("a cat", *files, "--in-int8", "--compile") == (
        f"{OPTION} and compiled (--compile) exclude each other; leave one out"
    )
    monkeypatch.setattr(loading, "HAS_INT8_PRODUCTS", False)
    assert shell.fail("a cat", *files, "--in-int8") == (
        f"{OPTION} needs a processor that multiplies 8 bits (AVX512 VNNI), which this one does not; leave it out"
    )
    with pytest.raises(ValueError, match=r"^in_int8 \(in the shell --in-int8\) is for a CPU, and the device is cuda; "):
        loading.check_in_int8(torch.device("cuda"))


def test_what_cannot_be_is_told_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match=r"^in_int8 .* exclude each other"):
        SanaPipeline.load("no such file", in_int8=True, compiled=True)


def test_layers_that_a_lora_changes_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(*(nn.Linear(4, 6) for _ in range(4)))
    for i in range(3):
        put_weight(network, f"{i}.weight", packed()[0])
    for changed in range(3):
        loading.multiply_in_8_bits(network, "model.safetensors")
        assert [layer.in_int8 for layer in list(network)[:3]] == [True] * 3
        network[changed].weight.changes.append(Changes([]))
    assert caplog.messages == [
        f"LoRAs change {changed} of the 3 layers in int8; these are unpacked, and only the others multiplied in 8 bits."
        for changed in (1, 2)
    ]
    with pytest.raises(ValueError) as caught:
        loading.multiply_in_8_bits(network, "model.safetensors")
    assert str(caught.value) == (
        f"{OPTION} changes nothing here, since LoRAs change all 3 layers of model.safetensors that are in int8, and what is "
        "changed is multiplied unpacked; leave it out, or merge the LoRAs (sana convert --lora) and quantise the merged file"
    )
