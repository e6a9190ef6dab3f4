"""Damaged and hostile inputs of every kind that the package reads, each made from its seed alone.

A kind is a function of random numbers, an empty folder and the originals: it writes an input into the folder and returns what is
handed to the readers.
"""

import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana.checkpoints.text_encoder import stored_companions
from sana.checkpoints.writing import write_pipeline
from sana.config import AUTOENCODERS, VARIANTS, AutoencoderConfig, GemmaConfig, StageConfig, TransformerIdentity
from sana.jobs import CHUNK
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.transformer import SanaTransformer
from sana.text.gemma import Gemma2
from sana.text.text_encoder import GemmaTextEncoder
from sana.text.tokenizers import JsonTokenizer
from sana.training.tokenizer import train_tokenizer

from .payloads import FILES, PAYLOADS, PROTOCOLS, WILD, Ground
from .weights import randomise

TEXT_WIDTH = 32
WORDS = "a red circle left of blue square Enhanced prompt User: astronaut in the style"
GEMMA = GemmaConfig(
    vocab_size=400,
    hidden_size=TEXT_WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    query_pre_attn_scalar=16,
)
LORA = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "lokr_w1", "hada_w1_a", "diff")
HUGE = "@huge@"  # stands in JSON for what no writer of JSON writes
DEEP = "@deep@"


class Damaged(NamedTuple):
    path: Path
    part: str  # what it is read as; a key of `readers.READERS`


Kind = Callable[[Random, Path, Path], Damaged]


def write_originals(folder: Path) -> None:
    """A whole model of a few channels in the layout of diffusers, a LoRA for it, a ControlNet, and single files of its parts."""
    row = replace(VARIANTS["sana-0.6b-1024px"].transformer, hidden_size=64, depth=2, cross_heads=2, ff_width=96)
    config = replace(row, text_width=TEXT_WIDTH, position_base=2)
    transformer = randomise(SanaTransformer(config), seed=0)
    autoencoder = randomise(DCAutoencoder(_autoencoder()), seed=1)
    train_tokenizer([WORDS], GEMMA.vocab_size, folder / "tokenizer.json")
    tokenizer = JsonTokenizer((folder / "tokenizer.json").read_bytes())
    encoder = GemmaTextEncoder(randomise(Gemma2(GEMMA), seed=2), tokenizer)
    identity = TransformerIdentity(config, "custom", 64, 3.0, "float32", "training")
    write_pipeline(
        folder / "model", transformer, autoencoder, encoder, tokenizer=folder / "tokenizer.json", identity=identity
    )
    save_file({**encoder.model.state_dict(), **stored_companions(tokenizer, GEMMA)}, folder / "encoder.safetensors")
    generator = torch.Generator().manual_seed(3)
    layers = [f"transformer.transformer_blocks.{i}.attn1.{name}" for i in range(2) for name in ("to_q", "to_k", "to_v")]
    lora = {f"{layer}.{end}": torch.randn(64, 4, generator=generator) for layer in layers for end in LORA[:2]}
    save_file(lora, folder / "lora.safetensors")
    Image.new("RGB", (40, 40), "red").save(folder / "image.png")


def _autoencoder() -> AutoencoderConfig:
    """The structure of SANA's at the smallest widths that its shortcuts and heads allow."""
    row, widths = AUTOENCODERS["dc-ae-f32c32-sana-1.1"], (32, 64, 64, 64, 128, 128)

    def shrunk(stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        return tuple(replace(s, width=w, depth=1) for s, w in zip(stages, widths, strict=True))

    return replace(row, encoder=shrunk(row.encoder), decoder=shrunk(row.decoder))


# Bytes


def damaged_bytes(rng: Random, content: bytes) -> bytes:
    """A few bytes changed, cut, doubled or put in, more often at the beginning and at the end, where formats keep what they need."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        reach = min(len(found), rng.choice((16, 200, 4000, len(found) or 1)))
        at = rng.randrange(reach) if reach else 0
        at = len(found) - 1 - at if rng.random() < 0.3 and found else at
        change = rng.randrange(6)
        if change == 0:
            del found[at : at + rng.choice((1, 8, 1000))]
        elif change == 1:
            found[at:at] = found[at : at + rng.choice((1, 8, 1000))]
        elif change == 2:
            found[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif change == 3 and rng.random() < 0.2:
            del found[at:]
        elif found:
            found[min(at, len(found) - 1)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(found)


# JSON


def nasty(rng: Random) -> object:
    """A value of JSON that a reader may not expect."""
    return rng.choice(
        (
            *(0, -1, 1, 2, 3, 7, 0.5, True, False, None, "", "a", "64", "1e9", [], {}, [[]], [None], {"a": {}}),
            *(2**31, 2**31 - 1, 2**32, 2**63, 2**63 - 1, 2**64, -(2**63), 10**8, 10**9, 10**12, 10**400),
            *(1e30, -1e30, 1e308, 1e-320, float("nan"), float("inf"), float("-inf"), HUGE, DEEP),
            *("\ud800", "\0", "\n", "a\nb", "../..", "/dev/zero", "x" * 100_000, [0] * 1000, [10**9] * 6, ["a"] * 6),
            rng.randrange(1, 4096),
            rng.uniform(-10, 10),
            -rng.randrange(1, 4096),
        )
    )


def damaged_value(rng: Random, value: object, changes: int = 1) -> object:
    """A JSON value with some of its parts replaced, removed, doubled or renamed."""
    found = json.loads(json.dumps(value))
    for _ in range(changes):
        places = [(parent, key) for parent in _containers(found) for key in _keys(parent)]
        if not places or rng.random() < 0.02:
            return nasty(rng)
        parent, key = rng.choice(places)
        change = rng.randrange(10)
        if change == 0:
            del parent[key]
        elif change == 1 and isinstance(parent, dict):
            parent[rng.choice((str(key) + "x", "", "a", str(nasty(rng))))] = parent.pop(key)
        elif change == 2:
            parent[key] = [parent[key]] * rng.choice((1, 2, 6))
        elif change == 3 and isinstance(parent[key], int):
            parent[key] = rng.choice((-1, 2, 10, 1000, 10**9)) * parent[key] + rng.choice((-1, 0, 1))
        elif change == 4 and isinstance(parent, dict):
            parent[key] = parent[rng.choice(list(parent))]
        else:
            parent[key] = nasty(rng)
    return found


def _containers(value: object) -> list[dict | list]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ([value] if isinstance(value, dict | list) else []) + [
        found for part in inner for found in _containers(part)
    ]


def _keys(parent: dict | list) -> list[object]:
    return list(parent) if isinstance(parent, dict) else list(range(len(parent)))


def json_bytes(rng: Random, value: object) -> bytes:
    """A JSON text, with what stands for the unwritable written out, and now and then in another encoding."""
    text = json.dumps(value)
    depth = rng.choice((100, 5000, 100_000))
    text = text.replace(f'"{HUGE}"', "1e999").replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    text = text.replace(DEEP, "deep")
    return text.encode(rng.choice(("utf-8",) * 20 + ("utf-16", "utf-8-sig", "utf-32")))


def damaged_json(rng: Random, content: bytes) -> bytes:
    """A JSON file with other values, or one that is none."""
    if rng.random() < 0.15:
        return damaged_bytes(rng, content)
    if rng.random() < 0.1:
        return rng.choice((b"", b"null", b"[]", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"1" * 10_000, b'"a"'))
    return json_bytes(rng, damaged_value(rng, json.loads(content), rng.choice((1, 1, 2, 4))))


# Tensors


def safetensors_bytes(header: bytes, numbers: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + numbers


def split_safetensors(content: bytes) -> tuple[dict[str, object], bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def safetensors(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A file of a part: its header, its names, its numbers."""
    source, part = rng.choice(_weights(originals))
    path = folder / source.name
    content = source.read_bytes()
    header, numbers = split_safetensors(content)
    _copy_beside(rng, source, folder)
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


def _weights(originals: Path) -> list[tuple[Path, str]]:
    name = "diffusion_pytorch_model.safetensors"
    return [
        (originals / "model" / "transformer" / name, "transformer"),
        (originals / "model" / "vae" / name, "autoencoder"),
        (originals / "model" / "text_encoder" / "model.safetensors", "text_encoder"),
        (originals / "encoder.safetensors", "text_encoder"),
        (originals / "model" / "transformer" / name, "controlnet"),
    ]


def _copy_beside(rng: Random, source: Path, folder: Path) -> None:
    """The configuration and tokenizer of a file, or not."""
    for beside in (source.parent / "config.json", source.parents[1] / "tokenizer" / "tokenizer.json"):
        if beside.is_file() and rng.random() < 0.8:
            shutil.copy(beside, folder)


def _index(rng: Random) -> str:
    return rng.choice(
        ("-1", "2", "5", "99", "00", "1.0", "٣", "", "30000000", str(10**9), str(10**30), "9" * 5000, "x")
    )


def _renamed(rng: Random, header: dict[str, object]) -> dict[str, object]:
    """Numbers in names, which tell how many blocks and stages there are, are others."""
    found = {}
    chosen = rng.sample(sorted(header), min(len(header), rng.choice((1, 1, 3, 1000))))
    for name, value in header.items():
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if name in chosen and numbers and rng.random() < 0.8:
            parts[rng.choice(numbers)] = _index(rng)
        elif name in chosen:
            parts[rng.randrange(len(parts))] = rng.choice(("", "weight", "a" * 10_000, "\0", "é", "_orig_mod"))
        found[".".join(parts)] = value
    if rng.random() < 0.3:
        root = rng.choice(("encoder.down_blocks", "decoder.up_blocks", "transformer_blocks", "layers", "blocks"))
        found[f"{root}.{_index(rng)}.{_index(rng)}.conv1.weight"] = next(iter(header.values()))
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


def damaged_tensors(rng: Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which some are missing, misshapen, misnamed, of another dtype or not finite."""
    found = dict(tensors)
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice(sorted(found))
        tensor = found[name]
        change = rng.randrange(8)
        if change == 0 and len(found) > 1:
            del found[name]
        elif change == 1:
            found[name] = torch.zeros([rng.choice((0, 1, 2, 3, 64)) for _ in range(rng.randrange(4))])
        elif change == 2:
            found[name] = tensor.flatten()[: rng.randrange(tensor.numel() + 1)].clone()
        elif change == 3:
            dtypes = (torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn, torch.uint8, torch.complex64)
            found[name] = tensor.to(rng.choice(dtypes))
        elif change == 4:
            found[name] = torch.full(tensor.shape, rng.choice((0, 1, 255))).to(tensor.dtype)
        elif change == 5 and tensor.is_floating_point():
            found[name] = torch.full(tensor.shape, rng.choice((float("nan"), float("inf"), 1e30)))
        elif change == 6:
            found = {key: value[..., :1].clone() if value.ndim else value for key, value in found.items()}
        else:
            found = {rng.choice(("", "model.", "a.", "module.")) + key: value for key, value in found.items()}
    return found


# Pickles


def pickles(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A PyTorch file of either format: damaged, strange, or one that unfolds."""
    source, part = rng.choice(_weights(originals))
    path = folder / f"model{rng.choice(('.pth', '.pt', '.bin', '.ckpt', '', '.safetensors'))}"
    _copy_beside(rng, source, folder)
    tensors = load_file(source)
    change = rng.randrange(8)
    if change < 3:
        path.write_bytes(damaged_bytes(rng, _saved(rng, {"state_dict": tensors} if rng.random() < 0.5 else tensors)))
    elif change == 3:
        path.write_bytes(_saved(rng, damaged_tensors(rng, tensors)))
    elif change == 4:
        path.write_bytes(_saved(rng, _strange(rng, tensors)))
    elif change == 5:
        ground = Ground(folder, rng.choice(PROTOCOLS))
        path.write_bytes(rng.choice(FILES)(ground, _unfolding(rng, ground)))
    elif change == 6:
        path.write_bytes(_damaged_archive(rng, _zip_saved(tensors)))
    else:
        path.write_bytes(_unfolding_archive(rng))
    return Damaged(path, part)


def _zip_saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _saved(rng: Random, content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.6)
    return file.getvalue()


def _strange(rng: Random, tensors: dict[str, Tensor]) -> object:
    """What training code does not save."""
    itself: dict[str, object] = dict(tensors)
    itself["model"] = itself
    rings: dict[str, object] = {"state_dict": {"model": {}}}
    rings["state_dict"]["model"]["module"] = rings
    deep: object = tensors
    for _ in range(rng.choice((10, 100, 300))):
        deep = {"model": deep}
    one = next(iter(tensors.values()))
    return rng.choice(
        (
            *({0: one}, {None: one}, {(1, 2): one}, {b"a": one}, {"": one}, {"model": {0: one}}, {1.5: one, "a": one}),
            *(itself, rings, deep, [tensors], (tensors, tensors), one, 1, None, "text", {}, {"a"}),
            *({"model": list(tensors.items())}, {"state_dict": 1, **tensors}, {"state_dict": tensors, "model": 1}),
            {name: tensor.expand(1000, *tensor.shape) for name, tensor in tensors.items()},
            {name: tensor.to_sparse() for name, tensor in tensors.items() if tensor.ndim},
            {name: tensor.mT if tensor.ndim > 1 else tensor for name, tensor in tensors.items()},
            {name: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8) for name, tensor in tensors.items()},
            {name: torch.nn.Parameter(tensor.float()) for name, tensor in tensors.items()},
            {name: tensor.to("meta") for name, tensor in tensors.items()},
            {name: tensor.numpy() for name, tensor in tensors.items()},
            {**tensors, "rng": np.random.RandomState(0).get_state(), "loss": np.float64(0.5)},
            {f"{_index(rng)}.{name}": tensor for name, tensor in tensors.items()},
            {name.replace(".0.", f".{_index(rng)}."): tensor for name, tensor in tensors.items()},
        )
    )


def _unfolding(rng: Random, ground: Ground) -> bytes:
    """Opcodes of a small pickle that becomes large, or that goes on for long."""
    size = rng.choice((2**20, 2**31, 2**40, 2**62, 10**30, -1))
    levels, width = rng.choice(((6, 2), (12, 10), (40, 2), (200, 2)))
    storage = ground.tuple("storage", ground.name("torch:FloatStorage"), "0", "cpu", size) + b"Q"
    order = ground.call("collections:OrderedDict")
    tensor = ground.call("torch._utils:_rebuild_tensor_v2", storage, 0, (size,), (1,), False, order)
    return rng.choice(
        (
            ground.call("builtins:bytearray", size),
            ground.call("builtins:list", ground.call("builtins:range", size)),
            ground.call("torch:Size", [size] * 5),
            ground.call("torch:zeros", size),
            ground.call(
                "torch._utils:_rebuild_meta_tensor_no_storage", ground.name("torch:float32"), (size,), (1,), False
            ),
            ground.call("collections:Counter", "a" * 1000),
            tensor,
            _shared(levels, width),
            _shared(levels, width, tuples=True),
            _shared_dictionaries(ground, levels, width),
            b"(" * rng.choice((1000, 10**6)) + b"t",
            b"]" * rng.choice((1000, 10**5)),
            b"]" + b"]a" * 1000,
            b"]" * 3000 + b"a" * 2999,
            b"\x8b" + struct.pack("<i", rng.choice((-1, 2**31 - 1, 100))) + b"\1" * 100,
            b"X" + struct.pack("<I", rng.choice((2**32 - 1, 2**31, 10))) + b"a" * 10,
            b"\x8e" + struct.pack("<Q", rng.choice((2**63, 2**64 - 1, 10))) + b"a" * 10,
            b"\x96" + struct.pack("<Q", rng.choice((2**63, 2**40, 10))) + b"a" * 10,
            b"\x95" + struct.pack("<Q", rng.choice((2**63, 2**40, 0))) + b"N",
            b"I" + b"9" * rng.choice((100, 10**5)) + b"\n",
            b"Nr" + struct.pack("<I", rng.choice((2**32 - 1, 10**8))),
            b"j" + struct.pack("<I", 7),
            *(b"0", b"a", b"R", b"b", b"s", b"u", b"t", b"\x81", b"\x93", b"Q", b"2", b"1", b"", b"\xff", b"."),
        )
    )


def _shared(levels: int, width: int, tuples: bool = False) -> bytes:
    """Lists, or tuples, each of which holds the one before several times."""
    found = b"Nq\0"
    for level in range(min(levels, 250)):
        inner = b"h" + bytes([level])
        found += b"0" + (b"(" + inner * width + b"t" if tuples else b"]" + (inner + b"a") * width)
        found += b"q" + bytes([level + 1])
    return found


def _shared_dictionaries(ground: Ground, levels: int, width: int) -> bytes:
    """Dictionaries under the keys that training code files its tensors under, each of which holds the one before several times."""
    keys = ("state_dict", "model", "module", "params", "net", "ema", "generator", "student", "weights", "model_ema")
    found = b"}q\0"
    for level in range(min(levels, 250)):
        found += b"0}" + b"".join(ground.value(key) + b"h" + bytes([level]) + b"s" for key in keys[:width])
        found += b"q" + bytes([level + 1])
    return found


def _damaged_archive(rng: Random, content: bytes) -> bytes:
    """A zip file whose members are missing, doubled, renamed, or other than they say."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w") as target:
        for member in source.infolist():
            inner, name = source.read(member), member.filename
            change = rng.randrange(12)
            if change == 0:
                continue
            if change == 1:
                name = rng.choice(
                    ("archive/../../evil", "/etc/evil", "archive/data.pkl", name.upper(), "a", "a" * 60_000)
                )
            elif change == 2:
                inner = damaged_bytes(rng, inner)
            elif change == 3:
                inner = inner[: rng.randrange(len(inner) + 1)]
            target.writestr(
                zipfile.ZipInfo(name), inner, rng.choice((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED,))
            )
    return file.getvalue()


def _unfolding_archive(rng: Random) -> bytes:
    """A zip file of some kilobytes with a member of some hundred megabytes."""
    file = io.BytesIO()
    size = rng.choice((10**6, 10**6, 10**6, 3 * 10**8))
    name = rng.choice(("data.pkl", "data/0", "version", "byteorder", ".format_version", "a"))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        members = {"data.pkl": _pickle_of_one(), "version": b"3\n", "byteorder": b"little", "data/0": b"\0" * 400}
        for other, content in members.items():
            if other != name:
                archive.writestr(zipfile.ZipInfo(f"archive/{other}"), content)
        with archive.open(_compressed(f"archive/{name}"), "w", force_zip64=True) as member:
            for _ in range(size // 10**6):
                member.write(b"\0" * 10**6)
    return file.getvalue()


def _compressed(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)  # without the time of today
    member.compress_type = zipfile.ZIP_DEFLATED
    return member


def _pickle_of_one() -> bytes:
    """The pickle of a file with one tensor of a hundred numbers."""
    with zipfile.ZipFile(io.BytesIO(_zip_saved({"a": torch.zeros(100)}))) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def hostile_pickles(rng: Random, folder: Path, originals: Path) -> Damaged:
    """Every payload in turn, in every file and protocol."""
    bodies = {**PAYLOADS, **WILD}
    ground = Ground.prepare(folder, rng.choice(PROTOCOLS))
    path = folder / f"model{rng.choice(('.pth', '.ckpt', '.bin', '.pt', '', '.safetensors'))}"
    path.write_bytes(rng.choice(FILES)(ground, bodies[rng.choice(sorted(bodies))](ground)))
    return Damaged(path, rng.choice(("transformer", "autoencoder", "text_encoder", "lora")))


# Configurations


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


def link_tree(source: Path, target: Path) -> None:
    """A folder whose files are those of another one, without a copy of their bytes."""
    shutil.copytree(source, target, copy_function=os.link)


def without_header(path: Path) -> None:
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path)


# Tokenizers


def tokenizers(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A text encoder with a tokenizer that is damaged, of another kind, or runs away."""
    encoder = folder / "text_encoder"
    link_tree(originals / "model" / "text_encoder", encoder)
    source = (originals / "tokenizer.json").read_bytes()
    change = rng.randrange(8)
    if change < 2:
        (encoder / "tokenizer.json").write_bytes(damaged_json(rng, source))
    elif change < 6:
        whole = json.loads(source)
        content = dict(whole)
        for _ in range(rng.choice((1, 1, 2))):
            part = rng.choice(("normalizer", "pre_tokenizer", "decoder", "post_processor", "model", "added_tokens"))
            content[part] = _tokenizer_part(rng, part, whole[part])
        (encoder / "tokenizer.json").write_bytes(json_bytes(rng, content))
    else:
        model = _sentencepiece(rng, json.loads(source)["model"]["vocab"])
        (encoder / "tokenizer.model").write_bytes(model if rng.random() < 0.3 else damaged_bytes(rng, model))
    (encoder / "tokenizer_config.json").write_bytes(
        damaged_json(rng, (originals / "model" / "tokenizer" / "tokenizer_config.json").read_bytes())
    )
    return Damaged(encoder, "text_encoder")


def _tokenizer_part(rng: Random, part: str, old: object) -> object:
    """Another part for a `tokenizer.json`."""
    pattern = rng.choice(
        (
            *({"Regex": "(a+)+$"}, {"Regex": "(.*)*\\1"}, {"Regex": "(?:a{999}){999}"}, {"Regex": "("}),
            *({"String": " "}, {"String": ""}, {"String": "a"}, {"Regex": ""}, nasty(rng)),
        )
    )
    behavior = rng.choice(("Isolated", "Removed", "MergedWithNext", "MergedWithPrevious", "Contiguous", nasty(rng)))
    doubling = {"type": "Replace", "pattern": pattern, "content": rng.choice(("aa", "a" * 1000, ""))}
    parts = {
        "normalizer": (
            *({"type": name} for name in ("NFC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel", "a")),
            *(doubling, {"type": "Sequence", "normalizers": [doubling] * 32}, {"type": "Prepend", "prepend": "a" * 99}),
            *({"type": "Precompiled", "precompiled_charsmap": text} for text in ("AAAA", "", "//////////8=")),
            *(None, nasty(rng), {"type": "Strip", "strip_left": True, "strip_right": True}),
        ),
        "pre_tokenizer": (
            *({"type": name} for name in ("Whitespace", "BertPreTokenizer", "UnicodeScripts", "WhitespaceSplit", "a")),
            {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": rng.random() < 0.5},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            {"type": "Digits", "individual_digits": True},
            {"type": "FixedLength", "length": rng.choice((0, 1, 5))},
            *(None, nasty(rng)),
        ),
        "decoder": (
            *({"type": name} for name in ("ByteFallback", "Fuse", "a")),
            *({"type": "Replace", "pattern": pattern, "content": "a"}, {"type": "CTC", "pad_token": "", "cleanup": 1}),
            *(None, nasty(rng)),
        ),
        "post_processor": (
            {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
            {"type": "BertProcessing", "sep": ["a", 10**9], "cls": ["a", -1]},
            *(None, nasty(rng), damaged_value(rng, old)),
        ),
    }
    if part == "added_tokens":
        return rng.choice(
            (nasty(rng), damaged_value(rng, old[:5]), [{**old[0], **_added(rng)}, *old], _many(rng, old[0]))
        )
    if part in parts:
        return rng.choice(parts[part])
    return _tokenizer_model(rng, old)


def _added(rng: Random) -> dict[str, object]:
    content = rng.choice(("a", "", "red circle", " ", "\0", "x" * 10_000, "▁"))
    flags = {name: rng.random() < 0.5 for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return {"id": rng.choice((0, 5, 399, 400, 10**6, 2**32 - 1, 2**32, -1)), "content": content, **flags}


def _many(rng: Random, token: dict[str, object]) -> list[dict[str, object]]:
    return [{**token, "id": i, "content": f"{'a' * (i % 50)}{i}"} for i in range(rng.choice((400, 5000)))]


def _tokenizer_model(rng: Random, old: dict[str, object]) -> object:
    vocabulary, merges = old["vocab"], old["merges"]
    last = max(vocabulary, key=vocabulary.get)
    return rng.choice(
        (
            {
                **old,
                "vocab": {**vocabulary, last: rng.choice((400, 10**6, 2**32 - 1, 2**32, -1, 1.5, "a", None, True))},
            },
            {**old, "vocab": {**vocabulary, rng.choice(sorted(vocabulary)): rng.randrange(500)}},
            {**old, "vocab": dict(sorted(vocabulary.items())[: rng.randrange(len(vocabulary))])},
            {**old, "merges": [*merges, rng.choice((["a", "nothing"], ["a"], "a b c", [1, 2], ["", "a"], "a b"))]},
            {**old, "merges": merges[::-1] * rng.choice((1, 2))},
            {**old, "dropout": rng.choice((0.5, 1.0, 2.0, -1, "a"))},
            {**old, "unk_token": rng.choice(("nothing", "", None, 1, "a")), "fuse_unk": True},
            {**old, "byte_fallback": rng.choice((False, 1, None)), "ignore_merges": rng.random() < 0.5},
            {
                **old,
                rng.choice(("continuing_subword_prefix", "end_of_word_suffix")): rng.choice(("##", "x" * 10**5, 1)),
            },
            {"type": "Unigram", "unk_id": rng.choice((0, 9, None)), "vocab": [["a", -1.0], ["b", 0.0]]},
            {"type": "WordPiece", "vocab": vocabulary, "unk_token": "a", "max_input_chars_per_word": 9},
            {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"},
            damaged_value(rng, {**old, "vocab": dict(list(vocabulary.items())[:5]), "merges": merges[:5]}),
            nasty(rng),
        )
    )


def _sentencepiece(rng: Random, vocabulary: dict[str, int]) -> bytes:
    """A `tokenizer.model` in protobuf, with parts that Gemma's has not."""

    def field(number: int, content: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(content)) + content

    kinds = {"<unk>": 2, "<pad>": 3, "<bos>": 3, "<eos>": 3}
    pieces = b"".join(
        field(
            1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", -index) + b"\x18" + bytes([_kind(piece, kinds)])
        )
        for piece, index in sorted(vocabulary.items(), key=lambda pair: pair[1])
    )
    trainer = b"\x18" + bytes([rng.choice((1, 2, 2, 2, 3, 4, 9))]) + b"\xf8\x02" + bytes([rng.choice((1, 0, 9))])
    ids = b"\xc0\x02\x03\xc8\x02\x02\xd0\x02\x01\xd8\x02\x00"
    normalizer = field(1, b"identity") + b"\x18\x00\x20\x00"
    if rng.random() < 0.5:
        normalizer += field(2, rng.choice((b"", b"\4\0\0\0aaaa", rng.randbytes(300), b"\0" * 5000)))
    more = rng.choice((b"", field(5, normalizer), field(3, normalizer), field(9, b"a"), b"\x1b", b"\xff" * 12))
    return pieces * rng.choice((1, 1, 1, 2)) + field(2, trainer + ids) + field(3, normalizer) + more


def _kind(piece: str, kinds: dict[str, int]) -> int:
    return 6 if piece.startswith("<0x") else kinds.get(piece, 1)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


# Folders


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


# LoRA files


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
    inner = rng.choice((layer, layer.replace(".", "_"), f"blocks.{_index(rng)}.attn.qkv", "", "x" * 5000))
    return f"{prefix}{inner}.{rng.choice((*LORA, 'dora_scale', 'lokr_w2', 'lora_mid.weight', 'lora_magnitude_vector'))}"


# Pictures


def pictures(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A picture or mask to start from, or one that is there already, under a name that ends in .png."""
    part = rng.choice(("image", "mask", "record"))
    path = folder / "p.png"
    name = rng.choice(("PNG", "PNG", "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "ICO"))
    modes = {"JPEG": ("RGB", "L"), "ICO": ("RGBA",), "BMP": ("RGB", "1"), "PPM": ("RGB",), "WEBP": ("RGB", "RGBA")}
    mode = rng.choice(modes.get(name, ("RGB", "RGBA", "L", "P", "LA", "1", "I;16" if name in ("PNG", "TIFF") else "L")))
    sides = [rng.choice((1, 2, 31, 32, 64, 65, 200)) for _ in range(2)]
    sides = rng.choice((sides, sides, sides, [rng.choice((1, 1500)), 1500], [20_000, 1]))
    picture = Image.new(mode, sides)
    extra = {"pnginfo": _record(rng)} if name == "PNG" else {}
    file = io.BytesIO()
    try:
        picture.save(file, format=name, **extra)
    except ValueError:  # too large for this format
        picture.resize((2, 2)).save(file, format=name, **extra)
    content = file.getvalue()
    change = rng.randrange(6)
    if change < 2:
        content = damaged_bytes(rng, content)
    elif change == 2 and name == "PNG":
        content = _giant_png(rng)
    elif change == 3:
        content = rng.choice(
            (_eps(folder), b"", b"P6 99999 99999 255\n", b"<svg/>", b"#FIG", b"\x89PNG\r\n\x1a\n", b"GIF89a")
        )
    elif change == 4 and name == "PNG":
        content = _damaged_chunk(rng, content)
    path.write_bytes(content)
    return Damaged(path, part)


def _record(rng: Random) -> PngInfo:
    record = {"prompt": "a", "seed": 0, "steps": 1, "files": "0" * 16, "height": 32, "width": 32}
    text = json_bytes(rng, damaged_value(rng, record, rng.choice((0, 1, 3)))).decode("utf-8", "replace")
    info = PngInfo()
    if rng.random() < 0.5:
        info.add_text(CHUNK, text.encode("latin-1", "replace").decode("latin-1"), zip=rng.random() < 0.3)
    else:
        info.add_itxt(CHUNK, text.encode("utf-8", "replace").decode(), zip=rng.random() < 0.3)
    return info


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _giant_png(rng: Random) -> bytes:
    """A small file of a large picture."""
    side = rng.choice((1, 8000, 13_300, 20_000, 2**31 - 1))
    height = rng.choice((side, 1, 13_300))
    depth, colour = rng.choice(((8, 2), (8, 6), (16, 6), (1, 0), (8, 3)))
    header = struct.pack(">IIBBBBB", side, height, depth, colour, 0, 0, 0)
    squeezed = zlib.compress(b"\0" * min(10**6, side * 4 + 1), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", squeezed) + _chunk(b"IEND", b"")


def _damaged_chunk(rng: Random, content: bytes) -> bytes:
    """Another chunk behind the header: text that unfolds, profiles, animation, or a name that nobody knows."""
    text = zlib.compress(b"a" * rng.choice((10, 10**6, 10**6, 3 * 10**7)), 9)
    more = rng.choice(
        (
            _chunk(b"zTXt", b"sana\0\0" + text),
            _chunk(b"iTXt", b"sana\0\1\0\0\0" + text),
            _chunk(b"tEXt", b"sana\0" + b"[" * 100_000),
            _chunk(b"tEXt", b'sana\0{"prompt": ' + b"9" * 10_000 + b"}"),
            _chunk(b"iCCP", b"a\0\0" + text),
            _chunk(b"eXIf", rng.randbytes(40)),
            _chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0" + bytes([rng.randrange(256)]) + b"\0\0\0\0\0\0\0"),
            _chunk(b"acTL", struct.pack(">II", rng.choice((0, 1, 2**31)), 0)),
            _chunk(b"tRNS", rng.randbytes(3)),
            _chunk(b"PLTE", rng.randbytes(4)),
            _chunk(rng.randbytes(4), rng.randbytes(9)),
        )
    )
    return content[:33] + more + content[33:]


def _eps(folder: Path) -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n" + str(folder).encode()


# Prompts


def prompts(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A file of prompts in some encoding, of some length, with some characters."""
    path = folder / "prompts.txt"
    line = rng.choice(
        (
            *(
                "a red circle",
                "",
                " ",
                "\0",
                "a\0b",
                "é",
                "一只猫",
                "🐱👩‍🚀",
                "e\u0301" * 50,
                "\u202e abc",
                "<bos><eos><pad>",
            ),
            *(
                "a" * 40 + "!",
                "a" * 20_000,
                "▁" * 500,
                "<0x00>" * 100,
                "\r",
                "\v\f\x1c\x85\u2028",
                "{",
                "%s",
                "\\n",
                "-x",
            ),
        )
    )
    end = rng.choice(("\n", "\r\n", "\r", "\n\n", "\u2028", ""))
    text = (line + end) * rng.choice((1, 1, 2, 3))
    encoding = rng.choice(
        ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252", "shift-jis")
    )
    content = text.encode(encoding, "replace")
    path.write_bytes(damaged_bytes(rng, content) if rng.random() < 0.3 else content)
    if rng.random() < 0.05:
        path.unlink()
        rng.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path), lambda: None))()
    return Damaged(path, "prompts")


KINDS: dict[str, Kind] = {
    "safetensors": safetensors,
    "pickles": pickles,
    "hostile-pickles": hostile_pickles,
    "configurations": configurations,
    "tokenizers": tokenizers,
    "folders": folders,
    "loras": loras,
    "pictures": pictures,
    "prompts": prompts,
}


def make(kind: str, seed: int, folder: Path, originals: Path) -> Damaged:
    """The input of a kind with a seed, always the same one."""
    return KINDS[kind](Random(f"{kind} {seed}"), folder, originals)
