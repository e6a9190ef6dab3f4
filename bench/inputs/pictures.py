"""Damaged and giant pictures, and records of the package in them."""

import io
import struct
import zlib
from pathlib import Path
from random import Random

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sana.jobs import CHUNK

from .damage import damaged_bytes, damaged_value, json_bytes
from .originals import Damaged


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
