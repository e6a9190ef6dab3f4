"""What is counted and compared of quantised files."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench import quantised
from bench.quantised import BITS, KINDS, demo_rows, layer_rows, released_rows
from sana import loading
from sana.checkpoints.quantising import PACKED_FORMATS, quantise
from sana.checkpoints.transformer import load_transformer
from sana.config import VARIANTS
from sana.loading import MODELS
from sana.training.scenes import held_out_scenes
from tests.sana.twins import tiny_config

FORMS = tuple(PACKED_FORMATS)


@pytest.mark.parametrize("form", FORMS)
def test_counted_bits_are_those_of_a_file(tmp_path: Path, form: str) -> None:
    """But for scales of whole rows and matrices, and for rows that the scales of blocks are rounded up to, in the toy a third."""
    quantise(MODELS["demo"], path := tmp_path / "packed.safetensors", form)
    packed = load_transformer(path).state_dict()
    held = sum(tensor.nbytes for name, tensor in packed.items() if "attn1.to_q.weight." in name)
    numbers = 8 * 192 * 192
    assert 0 <= 8 * held / numbers - BITS[form] < 0.35


def test_sizes_of_released_models() -> None:
    """The numbers of weights are those of the releases."""
    rows = {row["model"]: row for row in released_rows()}
    assert rows["sana-1.6b-1024px"]["plain"] / 2 == pytest.approx(1.604e9, rel=0.001)
    for row in rows.values():
        packed = 2 * (row["plain"] - row["fp8"]) / 2  # in fp8 a packed number saves one byte of two
        assert row["plain"] - row["nvfp4"] == pytest.approx(packed * (2 - 4.5 / 8), rel=1e-6)
    share = {name: (row["plain"] - row["fp8"]) / (row["plain"] / 2) for name, row in rows.items()}
    assert all(0.96 < share[name] < 1 for name in share if name != "Gemma-2-2b-it")
    embedding = 256000 * 2304
    assert (1 - share["Gemma-2-2b-it"]) * rows["Gemma-2-2b-it"]["plain"] / 2 == pytest.approx(embedding, rel=0.001)


def test_a_layer_of_each_kind_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sana-1.6b-1024px"
    monkeypatch.setitem(VARIANTS, name, replace(VARIANTS[name], transformer=tiny_config(name)))
    rows = [*layer_rows(tmp_path, name)]
    assert [(row["format"], row["kind"]) for row in rows] == [(form, kind) for form in FORMS for kind in KINDS]
    bounds = {"fp8": (0.02, 0.035), "int8": (0.002, 0.01), "mxfp8": (0.02, 0.035), "nvfp4": (0.06, 0.12)}
    assert all(bounds[row["format"]][0] < row["error"] < bounds[row["format"]][1] for row in rows)


def test_the_demo_is_compared_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = ("int8", "nvfp4")
    for module in (quantised, loading):  # whatever the processor
        monkeypatch.setattr(module, "HAS_INT8_PRODUCTS", True)
    monkeypatch.setattr(quantised, "PACKED_FORMATS", {form: PACKED_FORMATS[form] for form in forms})
    plain, *packed = rows = [*demo_rows(tmp_path, held_out_scenes(1, seed=0), 1, steps=2)]
    ways = [(row["format"], row["ends"], row["in_int8"]) for row in packed]
    assert ways == [
        ("int8", False, False),
        ("int8", False, True),
        ("nvfp4", False, False),
        ("int8", True, False),
        ("nvfp4", True, False),
    ]
    assert all(row["disk"] < plain["disk"] / 2 and row["memory"] < 0.6 * plain["memory"] for row in packed)
    errors = dict(zip(ways, ((row["step_error"], row["latent_error"]) for row in packed), strict=True))
    for k in range(2):
        assert 0 < errors[ways[0]][k] < errors[ways[1]][k] < errors[ways[2]][k] < errors[ways[4]][k] < 0.5
    texts = {row["format"]: row["text_error"] for row in packed if not row["ends"]}
    assert 0 < texts["int8"] < texts["nvfp4"] < 0.1
    assert ["right" in row for row in rows] == [True, True, True, True, False, False]
