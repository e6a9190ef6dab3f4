"""Pictures from files and to tensors, and back."""

import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from sana.images import BAND, FORMATS, SUFFIXES, on_white, read_picture, read_size, to_mask, to_picture, to_tensor


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    photo = Image.new("RGB", (4, 2), "white")
    photo.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was held upright, its left side down
    photo.save(tmp_path / "photo.png", exif=exif)
    upright = read_picture(tmp_path / "photo.png")
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", [1, 2, 3, 5, 6, 8, 9, 32768])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff", ".webp", ".avif"])
def test_the_size_is_that_of_the_upright_picture(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (60, 40)).save(path := tmp_path / f"photo{suffix}", exif=exif)
    assert read_size(path) == read_picture(path).size[::-1]


@pytest.mark.parametrize("suffix", [".avif", ".jpg", ".webp", ".gif", ".tiff", ".bmp"])
def test_damage_of_any_kind_is_named(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.effect_noise((64, 48), 80).convert("RGB").save(path := tmp_path / f"p{suffix}", exif=exif)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=4):
            damaged[place] = rng.integers(256)
        path.write_bytes(bytes(damaged[: rng.integers(20, len(whole) + 1)]))
        for read in (read_size, read_picture):
            try:
                read(path)
            except ValueError as error:
                assert str(path) in str(error)


def test_fractions_are_refused(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(path := tmp_path / "f.tiff")
    with pytest.raises(ValueError, match="f.tiff cannot be read as a picture .its numbers are fractions"):
        read_picture(path)


def test_grey_of_16_bits_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 128 * 257, 65535]], np.uint16)).save(tmp_path / "grey.png")
    assert [read_picture(tmp_path / "grey.png").convert("L").getpixel((x, 0)) for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("content", [b"no picture", None])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "file.png"
    if content is None:
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="file.png .*picture.*give "):
        read_picture(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    Image.new("RGB", (8, 6), (255, 0, 0)).save(path, format="JPEG" if suffix in (".jfif", ".jpe") else None)
    found = read_picture(path).convert("RGB")
    assert found.size == (8, 6) and np.abs(np.array(found.getpixel((4, 3))) - (255, 0, 0)).max() <= 4


def test_no_format_is_opened_that_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads EPS by Ghostscript, whatever its suffix."""
    started: list[object] = []
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **more: started.append(command))
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **more: started.append(command))
    path = tmp_path / "p.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as picture:  # so Pillow would take it
        assert picture.format == "EPS"
    with pytest.raises(ValueError, match="p.png is not a picture; give a PNG or JPEG file"):
        read_picture(path)
    assert not started and not {*FORMATS} & {"EPS", "PDF", "WMF", "FPX", "MIC"}


HIDDEN = (0, 200, 0)  # colours below what is transparent


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_what_is_transparent_is_white_in_a_picture_and_black_in_a_mask(mode: str) -> None:
    layer = Image.new("RGBA", (4, 4), (*HIDDEN, 0))
    layer.paste((255, 255, 255, 255), (0, 0, 2, 4))
    if mode == "P":
        picture = layer.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
        picture.info["transparency"] = picture.getpixel((3, 0))
    else:
        picture = layer.convert(mode)
    assert [on_white(picture).getpixel((x, 0)) for x in (0, 3)] == [(255, 255, 255)] * 2
    assert [to_mask(picture).getpixel((x, 0)) for x in (0, 3)] == [255, 0]


def test_half_transparent_colours_are_mixed_with_white() -> None:
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 128))
    assert on_white(picture).getpixel((0, 0)) == (255, 127, 127)
    found = to_tensor(picture, 32, 32)[0, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor([255.0, 127.0, 127.0]) / 127.5 - 1)


def test_a_picture_is_cut_at_the_middle_and_scaled() -> None:
    picture = Image.new("L", (300, 100), 255)
    picture.paste(0, (100, 0, 200, 100))
    tensor = to_tensor(picture, 50, 50)
    assert tensor.shape == (1, 3, 50, 50) and tensor.dtype == torch.float32
    assert (tensor[..., 4:-4] == -1).all()


def test_pixels_survive_the_way_to_a_tensor_and_back() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(32, 64, 3), dtype=np.uint8)
    assert (np.asarray(to_picture(to_tensor(Image.fromarray(pixels), 32, 64)[0])) == pixels).all()


def test_a_decoded_image_is_rounded_to_the_nearest_of_256_values() -> None:
    image = torch.tensor([-1.5, -1.0, 0.0, 0.499 / 127.5, 0.501 / 127.5, 1.0, 1.5]).expand(3, 1, -1)
    assert np.asarray(to_picture(image))[0, :, 0].tolist() == [0, 0, 128, 128, 128, 255, 255]


def blank_png(path: Path, width: int, height: int) -> Path:
    """A grey picture of one colour, by its rows: a small file of any size."""
    packed = zlib.compressobj(9)
    data = b"".join(packed.compress(bytes(1 + width)) for _ in range(height)) + packed.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    body = (
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return path


@pytest.mark.parametrize("size", [(8193, 8192), (13_300, 13_300), (20_000, 20_000), (2**31 - 1, 1)])
def test_a_picture_that_unfolds_is_refused_before_it_does(
    tmp_path: Path, size: tuple[int, int], recwarn: pytest.WarningsRecorder
) -> None:
    path = blank_png(tmp_path / "p.png", 1, 1)
    whole = path.read_bytes()
    header = whole[12:16] + struct.pack(">II", *size) + whole[24:29]
    path.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    for read in (read_size, read_picture):
        with pytest.raises(ValueError) as caught:
            read(path)
        assert str(caught.value) == f"{path} has more than 67,108,864 px, which is 8192 x 8192; make it smaller first"
    assert not recwarn.list


def test_the_largest_picture_is_read(tmp_path: Path) -> None:
    path = blank_png(tmp_path / "p.png", 8192, 8192)
    assert read_size(path) == (8192, 8192)
    assert read_picture(path).getextrema() == (0, 0)


@pytest.mark.parametrize("height", [BAND - 1, BAND, 2 * BAND + 1])
def test_a_transparent_picture_in_bands_is_the_same_as_whole(height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, 5, 4), dtype=np.uint8)
    layer = Image.fromarray(pixels)
    for found, ground, mode in ((on_white, "white", "RGB"), (to_mask, "black", "L")):
        whole = Image.alpha_composite(Image.new("RGBA", layer.size, ground), layer).convert(mode)
        assert found(layer).mode == mode and np.array_equal(np.asarray(found(layer)), np.asarray(whole))
