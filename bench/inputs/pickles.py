"""Damaged, strange and hostile files of PyTorch, and small ones that become large."""

import io
import pickle
import struct
import zipfile
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from .damage import damaged_bytes, damaged_tensors, index
from .originals import Damaged, copy_beside, weights
from .payloads import FILES, PAYLOADS, PROTOCOLS, WILD, Ground, legacy_start


def pickles(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A PyTorch file of either format: damaged, strange, or one that unfolds."""
    source, part = rng.choice(weights(originals))
    path = folder / f"model{rng.choice(('.pth', '.pt', '.bin', '.ckpt', '', '.safetensors'))}"
    copy_beside(rng, source, folder)
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
    return _zip_saved(content) if rng.random() < 0.6 else _legacy_saved(content)


class _LegacyWriter(pickle.Pickler):
    """The object in a file of the format before PyTorch 1.6. PyTorch's own calls storages by their addresses, which chance gives."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, 2)
        self.storages: dict[int, torch.UntypedStorage] = {}  # by address
        self.counts: list[int] = []  # of their numbers

    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        if not isinstance(value, torch.storage.TypedStorage | torch.UntypedStorage):
            return None
        typed = isinstance(value, torch.storage.TypedStorage)
        storage = value._untyped_storage if typed else value
        kind = getattr(torch, value._pickle_storage_type()) if typed else torch.UntypedStorage
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage
            self.counts.append(value._size() if typed else value.nbytes())
        key = list(self.storages).index(storage._cdata)
        return "storage", kind, str(key), "cpu", self.counts[key], None


def _legacy_saved(content: object) -> bytes:
    file = io.BytesIO(legacy_start())
    file.seek(0, io.SEEK_END)
    writer = _LegacyWriter(file)
    writer.dump(content)
    file.write(pickle.dumps([str(key) for key in range(len(writer.counts))], 2))
    for count, storage in zip(writer.counts, writer.storages.values(), strict=True):
        file.write(struct.pack("<q", count) + bytes(storage))
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
            {f"{index(rng)}.{name}": tensor for name, tensor in tensors.items()},
            {name.replace(".0.", f".{index(rng)}."): tensor for name, tensor in tensors.items()},
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
