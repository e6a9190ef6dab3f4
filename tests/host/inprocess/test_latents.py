"""Pictures to latents and back: every node of the host gives the pixels of our own, and sizes are what they say."""

import latent_preview
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sana.config import LATENT_SCALE
from tests.host.boot import Host
from tests.host.inprocess.small import HEIGHT, WIDTH, Small, difference, load, picture

EQUAL = 1e-5  # of pixels in [0, 1]; measured: 1e-6
LITTLE = 0.0075  # GiB: just more than the least
TILES = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}


@pytest.fixture(scope="module")
def latent(small: Small) -> Tensor:
    return small.sample(latent=small.empty(2))


def test_every_way_to_decode_gives_the_same_pixels(small: Small, latent: Tensor) -> None:
    """With older nodes for SANA tiled decoding crashed."""
    inputs = {"samples": {"samples": latent}, "vae": small.vae}
    (ours,) = small.host.call("DCAEDecode", **inputs, max_memory=0.0)
    assert ours.shape == (2, HEIGHT, WIDTH, 3) and 0 <= float(ours.min()) < float(ours.max()) <= 1
    assert torch.equal(ours, small.host.call("VAEDecode", **inputs)[0])
    assert difference(ours, small.host.call("VAEDecodeTiled", **inputs, **TILES)[0]) <= EQUAL
    assert difference(ours, small.host.call("DCAEDecode", **inputs, max_memory=LITTLE)[0]) <= EQUAL
    pictures = small.pipeline.pictures(latent * LATENT_SCALE)
    theirs = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures]) / 255
    assert difference(ours, theirs.view(ours.shape)) <= 0.5 / 255 + EQUAL


def test_every_way_to_encode_gives_the_same_latent(small: Small) -> None:
    inputs = {"pixels": torch.cat([picture(), picture().flip(1)]), "vae": small.vae}
    ours = small.host.call("DCAEEncode", **inputs, max_memory=0.0)[0]["samples"]
    assert ours.shape == (2, 32, HEIGHT // 32, WIDTH // 32)
    assert torch.equal(ours, small.host.call("VAEEncode", **inputs)[0]["samples"])
    assert difference(ours, small.host.call("VAEEncodeTiled", **inputs, **TILES)[0]["samples"]) <= EQUAL
    assert difference(ours, small.host.call("DCAEEncode", **inputs, max_memory=LITTLE)[0]["samples"]) <= EQUAL
    theirs = small.pipeline.autoencoder.encode(inputs["pixels"].movedim(-1, 1) * 2 - 1)
    assert difference(ours, theirs) <= EQUAL


@pytest.mark.newest
def test_too_little_memory_is_refused(small: Small) -> None:
    with pytest.raises(
        ValueError, match=r"^0\.001 GiB of working memory are too little for this size; it takes at least"
    ):
        small.host.call("DCAEEncode", pixels=picture(), vae=small.vae, max_memory=0.001)


def test_pictures_are_cut_to_multiples_of_32(small: Small) -> None:
    """With older nodes for SANA other sizes crashed. The middle is kept, as by every VAE of the host."""
    image = picture(HEIGHT + 20, WIDTH + 14)
    middle = image[:, 10 : 10 + HEIGHT, 7 : 7 + WIDTH]
    for node in ("VAEEncode", "VAEEncodeTiled", "DCAEEncode"):
        more = {"VAEEncodeTiled": TILES, "DCAEEncode": {"max_memory": 0.0}}.get(node, {})
        (latent,) = small.host.call(node, pixels=image, vae=small.vae, **more)
        assert difference(latent["samples"], small.vae.encode(middle)) <= EQUAL


def test_picture_with_alpha_is_encoded_by_its_colours(small: Small) -> None:
    image = torch.cat([picture(), torch.rand(1, HEIGHT, WIDTH, 1)], dim=-1)
    assert difference(small.vae.encode(image), small.vae.encode(picture())) <= EQUAL


def test_mask_for_inpainting_is_cut_with_the_picture(small: Small) -> None:
    mask = torch.zeros(1, HEIGHT + 20, WIDTH + 14)
    mask[:, :50] = 1
    inputs = {"pixels": picture(HEIGHT + 20, WIDTH + 14), "vae": small.vae, "mask": mask}
    (latent,) = small.host.call("VAEEncodeForInpaint", **inputs, grow_mask_by=6)
    assert latent["samples"].shape[-2:] == (HEIGHT // 32, WIDTH // 32)
    assert latent["noise_mask"].shape[-2:] == (HEIGHT, WIDTH)


def test_memory_that_decoding_asks_for_is_bounded(small: Small) -> None:
    """With the estimate of another VAE, as in older nodes for SANA, decoding 4K always runs out of memory."""
    working = [
        small.vae.memory_used_decode((1, 32, side // 32, side // 32), torch.float32) for side in (256, 512, 4096)
    ]
    whole = small.host.pack("sana.networks.streaming").whole_bytes
    decoder = small.vae.first_stage_model.decoder
    assert working[0] == whole(decoder, torch.Size((1, 32, 8, 8)), torch.float32)
    assert working[0] < working[1] < working[2] <= 2**30


@pytest.mark.newest
def test_empty_latent_has_a_trained_size(host: Host) -> None:
    sizes = host.pack("nodes.latent").sizes()
    assert len(sizes) == 4 * 9
    for name, (height, width) in sizes.items():
        (latent,) = host.call("EmptySanaLatentImage", size=name, width=32, height=32, batch_size=1)
        assert latent["samples"].shape == (1, 32, height // 32, width // 32)
        assert f"{width} x {height}" in name


def test_empty_latents_of_the_host_become_ours(small: Small) -> None:
    """They have 4 or 16 channels and a cell for 8 pixels; they are empty, so nothing is lost."""
    for node in ("EmptyLatentImage", "EmptySD3LatentImage"):
        (latent,) = small.host.call(node, width=WIDTH, height=HEIGHT, batch_size=1)
        assert torch.equal(small.ksampler(latent_image=latent), small.ksampler())
        assert torch.equal(small.sample(latent=latent), small.sample())


def test_model_that_is_loaded_anew_has_previews(small: Small) -> None:
    """As core makes one to compile it, or for another GPU."""
    other = load(small.host, small.path.name)[0]
    other.model.latent_format.latent_rgb_factors = None
    clone = small.model.clone(model_override=other.get_clone_model_override())
    assert clone.model is other.model
    assert (
        clone.model.latent_format.latent_rgb_factors_reshape
        is small.model.model.latent_format.latent_rgb_factors_reshape
    )


def test_preview_looks_like_the_picture(small: Small) -> None:
    """People asked for previews. They are fitted to the autoencoder at hand, and tried on other pictures."""
    latent_format = small.model.model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors,
        latent_format.latent_rgb_factors_bias,
        latent_format.latent_rgb_factors_reshape,
    )
    image = picture(128, 192)
    shown = previewer.decode_latent_to_preview(small.vae.encode(image) * LATENT_SCALE)
    assert shown.size == (192 // 8, 128 // 8)
    shown = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).view(16, 24, 3).float().flatten()
    wanted = F.avg_pool2d(image.movedim(-1, 1), 8)[0].movedim(0, -1).flatten()
    assert float(torch.corrcoef(torch.stack([shown, wanted]))[0, 1]) > 0.8


def test_core_latent_nodes_count_cells_of_8_px(small: Small) -> None:
    """As the documents tell: a quarter of the pixels is what to give them."""
    latent = {"samples": torch.arange(1.0, 1 + 32 * 16 * 16).reshape(1, 32, 16, 16)}  # 512 x 512 px
    place = {"x": 32 // 4, "y": 64 // 4}
    (crop,) = small.host.call("LatentCrop", samples=latent, width=128 // 4, height=96 // 4, **place)
    assert torch.equal(crop["samples"], latent["samples"][:, :, 2:5, 1:5])
    blank = {"samples": torch.zeros(1, 32, 16, 16)}
    (both,) = small.host.call("LatentComposite", samples_to=blank, samples_from=crop, feather=0, **place)
    inputs = {"destination": blank, "source": crop, "resize_source": False}
    (masked,) = small.host.call("LatentCompositeMasked", **inputs, **place)
    for placed in (both["samples"], masked["samples"]):
        assert torch.equal(placed[:, :, 2:5, 1:5], crop["samples"])
        assert int(placed.count_nonzero()) == crop["samples"].numel()
    size = {"width": 512 // 4, "height": 256 // 4, "upscale_method": "nearest-exact", "crop": "disabled"}
    (large,) = small.host.call("LatentUpscale", samples=latent, **size)
    assert large["samples"].shape == (1, 32, 256 // 32, 512 // 32)
