"""What info says of LoRAs."""

from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from sana.checkpoints.inspection import describe_file
from tests.sana.adapted import adapted, save_as_peft
from tests.sana.models import TRANSFORMER, write_model

USE = "use it with --lora in the shell, or a LoRA loader in ComfyUI"
WHERE = "changes weights up to block"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sana"))


def write(path: Path, *layers: tuple[str, int, int], alpha: float | None = None, rank: int = 2) -> Path:
    """Layers by name, rows and columns."""
    tensors: dict[str, Tensor] = {}
    for layer, rows, columns in layers:
        tensors |= {f"{layer}.lora_down.weight": torch.ones(rank, columns)}
        tensors |= {f"{layer}.lora_up.weight": torch.ones(rows, rank)}
        tensors |= {} if alpha is None else {f"{layer}.alpha": torch.tensor(alpha)}
    save_file(tensors, path)
    return path


def lines(path: Path, model: Path | None = None) -> list[str]:
    first, second, *more = describe_file(path, model).splitlines()
    assert first == f"{path.name}: a LoRA" and "numbers in float32" in second
    return more


@pytest.mark.parametrize(
    ("width", "block", "variants"),
    [
        (1152, 27, "sana-0.6b-1024px, sana-0.6b-512px, sana-sprint-0.6b-1024px, sana-0.6b-1024px-controlnet-hed"),
        (1152, 30, None),
        (2240, 59, "sana-1.5-4.8b-1024px"),
    ],
)
def test_the_variants_whose_shapes_it_has(tmp_path: Path, width: int, block: int, variants: str | None) -> None:
    """Blocks tell models of one width apart."""
    layers = [(f"lora_unet_transformer_blocks_{i}_attn1_to_q", width, width) for i in (0, block)]
    first, second, third = lines(write(tmp_path / "a.safetensors", *layers, alpha=1.0))
    assert (first, third) == ("for SANA's transformer: LoRA of rank 2, alpha 1 on 2 weights", USE)
    none = f"of shapes that no released SANA has, such as {width} x {width} of transformer_blocks.0.attn1.to_q.weight"
    expected = none if variants is None else f"with the shapes of {variants}"
    assert second == f"{WHERE} {block}, {expected}"


def test_a_part_of_the_blocks_may_be_of_any_model_of_its_width(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", ("transformer.transformer_blocks.3.ff.conv_inverted", 11200, 2240))
    _, second, _ = lines(path)
    assert second.startswith(f"{WHERE} 3, with the shapes of sana-1.6b-1024px, ")
    assert "sana-1.5-4.8b-1024px" in second and "0.6b" not in second


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"]), "LoRA of rank 4, alpha 6 on 6 weights"),
        (
            LoraConfig(r=4, lora_alpha=6, rank_pattern={"attn1.to_q": 2}, target_modules=["to_q"]),
            "LoRA of rank 2 to 4, alpha 6 on 6 weights",
        ),
        (LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["to_q"]), "DoRA of rank 4, alpha 8 on 6 weights"),
        (LoHaConfig(r=3, alpha=6, target_modules=["to_q"]), "LoHa of rank 3, alpha 6 on 6 weights"),
        (LoKrConfig(r=64, alpha=6, target_modules=["to_q"]), "LoKr on 6 weights"),
        (LoKrConfig(r=2, alpha=6, target_modules=["to_q"]), "LoKr of rank 2, alpha 6 on 6 weights"),
    ],
    ids=["LoRA", "ranks", "DoRA", "LoHa", "whole LoKr", "LoKr"],
)
def test_kind_rank_and_alpha(tmp_path: Path, model: Path, config: object, words: str) -> None:
    """alpha is that of the adapter_config.json beside it."""
    network, _ = adapted(TRANSFORMER, config)
    first, _, third = lines(save_as_peft(network, tmp_path / "style"), model)
    assert first == f"for SANA's transformer: {words}"
    assert third == f"all of its 6 layers fit {model.name}"


def test_both_networks_and_kinds(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "a.safetensors", ("lora_te1_layers_0_self_attn_v_proj", 32, 64))
    assert lines(path, model) == [
        "for SANA's text encoder: LoRA of rank 2, alpha 2 on 1 weights",
        f"all of its 1 layers fit {model.name}",
    ]
    both = write(path, ("lora_te1_layers_0_self_attn_v_proj", 32, 64), ("transformer.proj_out", 32, 96))
    assert lines(both, model) == [
        "for SANA's transformer and text encoder: LoRA of rank 2, alpha 2 on 2 weights",
        "changes weights outside of the blocks, of shapes that no released SANA has, such as 32 x 96 of proj_out.weight",
        f"all of its 2 layers fit {model.name}",
    ]
    save_file({"proj_out.diff": torch.ones(32, 96), "proj_out.diff_b": torch.ones(32)}, path)
    assert lines(path)[0] == "for SANA's transformer: difference on 2 weights"


def test_how_much_fits_a_model(tmp_path: Path, model: Path) -> None:
    path = write(
        tmp_path / "a.safetensors",
        ("transformer_blocks.0.attn1.to_q", 96, 96),
        ("transformer_blocks.9.attn1.to_q", 96, 96),
        ("down_blocks.0", 2, 2),
    )
    assert lines(path, model)[2:] == [
        "1 of its 3 layers are no layer of SANA",
        "1 of the 3 layers of a.safetensors fit the model; the rest has no effect",
    ]
    wide = write(path, ("transformer_blocks.0.attn1.to_q", 1152, 1152))
    assert lines(wide, model)[-1] == (
        "a.safetensors was made for another model: it changes 1152 x 1152 numbers of transformer_blocks.0.attn1.to_q.weight, "
        "which has 96 x 96 here; use a LoRA made for this model"
    )
    deep = write(path, ("transformer_blocks.9.attn1.to_q", 96, 96))
    assert lines(deep, model)[-1].startswith("nothing of a.safetensors fits: its names are those of")


def test_another_model_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", ("lora_unet_single_blocks_0_linear1", 4, 4))
    assert lines(path) == ["it is for a Flux model, and of no use to SANA"]


def test_a_model_beside_something_else_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="^--model says what a LoRA is to fit, and vae is no LoRA; leave it out$"):
        describe_file(model / "vae", model)
