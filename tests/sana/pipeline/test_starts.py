"""Pictures and masks to start from."""

import pytest
import torch
from PIL import Image

from sana.pipeline import SanaPipeline
from sana.plan import Settings
from sana.sampling.schedule import flow_sigmas, partial_sigmas
from tests.sana.models import PROMPTS
from tests.sana.pipeline.drawing import HEIGHT, SIZE, WIDTH, drawn, encoded, half_mask, picture, sample


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_a_picture_to_start_from_is_put_at_the_noise_level_of_the_strength(
    pipeline: SanaPipeline, strength: float
) -> None:
    options = {"image": picture(), "strength": strength, "steps": 6, **SIZE}
    first, *_, last = pipeline.sample(PROMPTS[0], Settings(**options))
    clean = encoded(pipeline, picture())
    sigmas = partial_sigmas(6, pipeline.identity.flow_shift, strength)
    assert last.index == 5
    torch.testing.assert_close(first.x, (1 - sigmas[0]) * clean + sigmas[0] * drawn(0), rtol=0, atol=1e-4)
    if strength == 1:
        assert sigmas[0] == flow_sigmas(6, pipeline.identity.flow_shift)[0] > 0.999


def test_less_strength_keeps_more_of_the_picture(pipeline: SanaPipeline) -> None:
    clean = encoded(pipeline, picture())
    changes = [
        float((sample(pipeline, "", image=picture(), strength=strength, steps=6) - clean).norm())
        for strength in (0.05, 0.3, 0.6, 1.0)
    ]
    assert changes == sorted(changes)
    assert changes[0] < 0.5 * changes[-1]


@pytest.mark.parametrize("solver", ["flow_dpm", "flow_euler"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_keeps_the_latent_outside_the_mask(pipeline: SanaPipeline, strength: float, solver: str) -> None:
    options = {"image": picture(), "mask": half_mask(), "strength": strength, "steps": 5, "solver": solver}
    latent = sample(pipeline, PROMPTS[0], batch_size=2, **options)
    clean = encoded(pipeline, picture()).expand_as(latent)
    torch.testing.assert_close(latent[..., :1], clean[..., :1], rtol=0, atol=1e-5)
    assert (latent - clean)[..., 1:].abs().mean() > 0.5
    other = sample(pipeline, PROMPTS[1], batch_size=2, **options)
    assert (latent - other)[..., 1:].abs().mean() > 0.1


def test_a_picture_suggests_its_own_size_and_is_cut_to_the_one_asked_for(pipeline: SanaPipeline) -> None:
    wide = picture().resize((120, 65))
    assert pipeline.plan("", Settings(image=wide)).size == (64, 96)
    assert pipeline.plan("", Settings(image=wide, height=32)).size == (32, 96)
    assert pipeline.plan("", Settings(image=picture().resize((5, 5)))).size == (32, 32)
    grey = wide.convert("LA")
    assert pipeline("", image=grey, mask=half_mask(), steps=1)[0].size == (96, 64)


def test_a_photo_far_larger_than_the_model_suggests_a_size_of_the_model(pipeline: SanaPipeline) -> None:
    assert pipeline.plan("", Settings(image=Image.new("RGB", (4000, 3000)))).size == (64, 64)
    assert pipeline.plan("", Settings(image=Image.new("RGB", (1000, 4000)))).size == (128, 32)


def test_a_picture_without_a_mask_is_kept_in_part(pipeline: SanaPipeline) -> None:
    half = sample(pipeline, "", image=picture(), strength=0.5, steps=4)
    assert torch.equal(sample(pipeline, "", image=picture(), steps=4), half)
    whole = sample(pipeline, "", image=picture(), mask=half_mask(), strength=1.0, steps=4)
    assert torch.equal(sample(pipeline, "", image=picture(), mask=half_mask(), steps=4), whole)


def test_sprint_says_when_it_keeps_nothing_of_a_picture(sprint: SanaPipeline, caplog: pytest.LogCaptureFixture) -> None:
    sample(sprint, "", image=picture())
    assert not caplog.messages
    sample(sprint, "", image=picture(), strength=0.6)
    assert [message for message in caplog.messages if "nothing of the image is kept" in message]


def test_a_thin_stroke_of_a_mask_is_painted(pipeline: SanaPipeline) -> None:
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (0, 20, WIDTH, 22))  # between the pixels that a bilinear sample would read
    clean = encoded(pipeline, picture())
    latent = sample(pipeline, PROMPTS[0], image=picture(), mask=mask, steps=3)
    assert (latent - clean)[:, :, 0].abs().mean() > 0.5
    torch.testing.assert_close(latent[:, :, 1], clean[:, :, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", [0, 15 * 10 + 1, 15 * 10 + 3, 639])
def test_a_stroke_of_a_pixel_in_a_large_mask_is_painted(pipeline: SanaPipeline, row: int) -> None:
    """The mask is ten times as large as the picture, and no pixel of it is lost on the way to cells."""
    mask = Image.new("L", (10 * WIDTH, 10 * HEIGHT))
    mask.paste(255, (0, row, 10 * WIDTH, row + 1))
    clean = encoded(pipeline, picture())
    latent = sample(pipeline, PROMPTS[0], image=picture(), mask=mask, steps=3)
    painted = (latent - clean).abs().amax(dim=(0, 1, 3)) > 1e-3
    assert painted.tolist() == [row // 320 == cell for cell in range(HEIGHT // 32)]


@pytest.mark.parametrize(("beside", "above"), [(64, 0), (0, 64)])
@pytest.mark.parametrize(("place", "painted"), [(31, False), (32, True)])
def test_a_mask_of_another_shape_is_cut_at_its_middle(
    pipeline: SanaPipeline, beside: int, above: int, place: int, painted: bool
) -> None:
    """As the image is: of 64 px more, 32 go on either side."""
    mask = Image.new("L", (WIDTH + beside, HEIGHT + above))
    x, y = (place, 0) if beside else (0, place)
    mask.putpixel((x, y), 255)
    clean = encoded(pipeline, picture())
    latent = sample(pipeline, PROMPTS[0], image=picture(), mask=mask, steps=3)
    changed = (latent - clean).abs().amax(dim=(0, 1)) > 1e-3
    expected = torch.zeros_like(changed)
    expected[0, 0] = painted
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(("height", "width", "expected"), [(64, 128, (64, 128)), (96, 96, (64, 64))])
def test_a_picture_of_more_than_twice_the_pixels_is_drawn_in_a_trained_size(
    pipeline: SanaPipeline, height: int, width: int, expected: tuple[int, int]
) -> None:
    """The model is one of 64 px."""
    record = pipeline.plan(PROMPTS[0], Settings(image=Image.new("RGB", (width, height)))).record()
    assert (record["height"], record["width"]) == expected
