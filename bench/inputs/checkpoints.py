"""Damaged files of tensors, and folders of them."""

import json
import os
import shutil
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from .damage import damaged_bytes, damaged_json, damaged_tensors, damaged_value, index, json_bytes
from .originals import Damaged, copy_beside, link_tree, safetensors_bytes, split_safetensors, weights

LORA = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "lokr_w1", "hada_w1_a", "diff")


def safetensors(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A file of a part: its header, its names, its numbers."""
    source, part = rng.choice(weights(originals))
    path = folder / source.name
    content = source.read_bytes()
    header, numbers = split_safetensors(content)
    copy_beside(rng, source, folder)
    change = rng.randrange(8)
    if change == 0:
        path.write_bytes(damaged_bytes(rng, content))
    elif change == 1:
        size = rng.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(content), len(content) - 8, 10**8))
        path.write_bytes(safetensors_bytes(json.dumps(header).encode(), numbers, size))
    elif change == 2:
        path.write_bytes(safetensors_bytes(json_bytes(rng, damaged_value(rng, header, rng.choice((1, 2, 5)))), numbers))
    elif change == 3:
        path.write_bytes(safetensors_bytes(json.dumps(_renamed(rng, header)).encode(), numbers))
    elif change == 4:
        path.write_bytes(safetensors_bytes(json.dumps(_many_names(rng, header)).encode(), numbers))
    elif change == 5:
        header["__metadata__"] = {**header.get("__metadata__", {}), "sana": _damaged_entry(rng, header)}
        path.write_bytes(safetensors_bytes(json.dumps(header).encode(), numbers))
    else:
        save_file(damaged_tensors(rng, load_file(source)), path)
    return Damaged(path, part)


def _renamed(rng: Random, header: dict[str, object]) -> dict[str, object]:
    """Numbers in names, which tell how many blocks and stages there are, are others."""
    found = {}
    chosen = rng.sample(sorted(header), min(len(header), rng.choice((1, 1, 3, 1000))))
    for name, value in header.items():
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if name in chosen and numbers and rng.random() < 0.8:
            parts[rng.choice(numbers)] = index(rng)
        elif name in chosen:
            parts[rng.randrange(len(parts))] = rng.choice(("", "weight", "a" * 10_000, "\0", "é", "_orig_mod"))
        found[".".join(parts)] = value
    if rng.random() < 0.3:
        root = rng.choice(("encoder.down_blocks", "decoder.up_blocks", "transformer_blocks", "layers", "blocks"))
        found[f"{root}.{index(rng)}.{index(rng)}.conv1.weight"] = next(iter(header.values()))
    return found


def _many_names(rng: Random, header: dict[str, object]) -> dict[str, object]:
    count, length = rng.choice(((1000, 10), (20_000, 10), (5000, 500)))
    root = rng.choice(("a", "transformer_blocks", "encoder.down_blocks", "layers"))
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return {**header, **{f"{root}.{i}.{'x' * length}.weight": empty for i in range(count)}}


def _damaged_entry(rng: Random, header: dict[str, object]) -> str:
    """The entry in a header that tells what a network is."""
    stored = json.loads(header.get("__metadata__", {}).get("sana", '{"latent_scale": 0.4}'))
    return json_bytes(rng, damaged_value(rng, stored, rng.choice((1, 2)))).decode("utf-8", "replace")


def configurations(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A whole model with something else in one of its JSON files."""
    model = folder / "model"
    link_tree(originals / "model", model)
    chosen = rng.choice(
        [path for path in sorted(model.rglob("*.json")) if not path.name.startswith("tokenizer")]
        + [model / "transformer" / "config.json", model / "text_encoder" / "config.json", model / "vae" / "config.json"]
    )
    content = chosen.read_bytes()
    chosen.unlink()
    chosen.write_bytes(damaged_json(rng, content))
    if rng.random() < 0.7:  # else the header of the transformer has the last word
        without_header(model / "transformer" / "diffusion_pytorch_model.safetensors")
    return Damaged(model, "pipeline")


def without_header(path: Path) -> None:
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path)


def folders(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A model whose files are missing, in shards, links, pipes, folders, or of another part."""
    model = folder / "model"
    link_tree(originals / "model", model)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = sorted(model.rglob("*"))
        if not places:
            break
        chosen = rng.choice(places)
        change = rng.randrange(10)
        if change == 9:
            source = rng.choice(sorted((originals / "model").rglob("*.safetensors")))
            _in_shards(rng, source, model / source.relative_to(originals / "model"))
            continue
        if chosen.is_symlink() or not chosen.is_dir():
            chosen.unlink()
        else:
            shutil.rmtree(chosen)
        if change == 1:
            chosen.symlink_to(rng.choice((chosen, chosen.parent, folder, folder / "gone", "/dev/null", model)))
        elif change == 2:
            os.mkfifo(chosen)
        elif change == 3:
            chosen.mkdir()
        elif change == 4:
            chosen.write_bytes(b"")
        elif change == 5:
            other = rng.choice([path for path in sorted((originals / "model").rglob("*")) if path.is_file()])
            os.link(other, chosen)
        elif change == 6:
            name = rng.choice(("é", "a b", "a\nb", "-x", "a" * 200, "\udcff", "..."))
            chosen.with_name(name + chosen.suffix).write_bytes(b"{}")
        elif change == 7:
            shutil.copytree(originals / "model" / "vae", chosen)
    given = rng.choice((model, model, model, model / "transformer", *sorted(model.glob("*/*"))[:3]))
    return Damaged(given, "pipeline")


def _in_shards(rng: Random, source: Path, path: Path) -> None:
    """A file as several, of which some are missing, doubled or empty."""
    if not path.is_file():
        return
    tensors = load_file(source)
    names = sorted(tensors)
    count = rng.choice((1, 2, 3, 5))
    said = rng.choice((count, count, count + 1, 0, 99_999))
    for shard in range(count):
        held = {name: tensors[name] for name in names[shard :: rng.choice((count, count, 1))]}
        place = path.with_name(f"{path.stem}-{shard + rng.choice((1, 1, 1, 0)):05d}-of-{said:05d}.safetensors")
        if rng.random() < 0.85:
            save_file(held, place)
    if rng.random() < 0.8:
        path.unlink()
    index = {"weight_map": damaged_value(rng, dict.fromkeys(names, path.name))}
    path.with_name(f"{path.name}.index.json").write_bytes(json_bytes(rng, index))


def loras(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A LoRA with other names, shapes and settings."""
    tensors = load_file(originals / "lora.safetensors")
    path = folder / rng.choice(("lora.safetensors", "adapter_model.safetensors", "lora.pth"))
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 2}}
    if rng.random() < 0.3:
        pattern = rng.choice(
            (
                "(a+)+$",
                "(",
                "(.*)*",
                "[",
                "to_(q|k)",
                "((.*)*)*b",
                "x" * 10_000,
                "(?P<a",
                "\\",
                ".*" * 12 + "x",
                ".?" * 40 + "x",
            )
        )
        settings["alpha_pattern"] = {pattern: rng.choice((2, 0, -1, "a"))}
    settings = damaged_value(rng, settings, rng.choice((0, 1, 2)))
    found = damaged_tensors(rng, tensors) if rng.random() < 0.6 else tensors
    if rng.random() < 0.5:
        found = {_lora_name(rng, name): tensor for name, tensor in found.items()}
    header = {}
    if rng.random() < 0.5:
        header = {"lora_adapter_metadata": json_bytes(rng, settings).decode("utf-8", "replace")}
    else:
        (folder / "adapter_config.json").write_bytes(json_bytes(rng, settings))
    if path.suffix == ".pth":
        torch.save(found, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path, header)
    if rng.random() < 0.2:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    return Damaged(path, "lora")


def _lora_name(rng: Random, name: str) -> str:
    layer = name.rsplit(".lora", 1)[0]
    prefix = rng.choice(("", "lora_unet_", "lycoris_", "diffusion_model.", "base_model.model.", "module.", "a"))
    inner = rng.choice((layer, layer.replace(".", "_"), f"blocks.{index(rng)}.attn.qkv", "", "x" * 5000))
    return f"{prefix}{inner}.{rng.choice((*LORA, 'dora_scale', 'lokr_w2', 'lora_mid.weight', 'lora_magnitude_vector'))}"
