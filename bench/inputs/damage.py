"""Damage to bytes, to JSON and to tensors."""

import json
from random import Random

import torch
from torch import Tensor

HUGE = "@huge@"  # stands in JSON for what no writer of JSON writes
DEEP = "@deep@"


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


def index(rng: Random) -> str:
    return rng.choice(
        ("-1", "2", "5", "99", "00", "1.0", "٣", "", "30000000", str(10**9), str(10**30), "9" * 5000, "x")
    )


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
