"""Pictures through the running server, with the nodes of the host around ours: what is drawn, reported, stopped and refused."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save

from sana.training.scenes import BACKGROUNDS, COLOURS
from tests.host import stand_ins
from tests.host.client import Event, Run
from tests.host.graphs import Prompt, changed, node, text_to_image
from tests.host.hosts import NEWEST, OLDEST
from tests.host.server import Server, Servers

STEPS = 4
FILES = {
    "diffusion_models/alone.pth": lambda: stand_ins.official_transformer("sana-1.6b-1024px"),
    "diffusion_models/broken.pth": lambda: broken(stand_ins.official_transformer("sana-1.6b-1024px")),
    "diffusion_models/flux.safetensors": lambda: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)},
    "diffusion_models/lora.safetensors": lambda: stand_ins.lora("sana-1.6b-1024px"),
    "text_encoders/clip.safetensors": lambda: {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(1)},
    "vae/sd.safetensors": lambda: {"decoder.up.0.block.0.conv1.weight": torch.zeros(1)},
}
ENCODER, AUTOENCODER = (
    {"text_encoders/g.safetensors": stand_ins.text_encoder},
    {"vae/dc.safetensors": stand_ins.autoencoder},
)


@pytest.fixture(scope="module", params=[NEWEST, OLDEST])
def host(servers: Servers, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of either end of the supported versions, with files that are wrong in one way or another."""
    server = servers(request.param)
    for channels in (4, 16):
        noise = {"latent_tensor": torch.randn(1, channels, 4, 4), "latent_format_version_0": torch.zeros(0)}
        server.upload(f"{channels}.latent", save(noise))
    server.upload("picture.png", picture())
    with stand_ins.placed(server, {name: make() for name, make in FILES.items()}):
        yield server


def broken(tensors: stand_ins.Tensors) -> stand_ins.Tensors:
    """With one number that is not finite."""
    tensors["final_layer.linear.bias"][0] = torch.nan
    return tensors


def picture(height: int = 100, width: int = 150) -> bytes:
    """A PNG of what the demo model knows: a circle on a plain background."""
    image, content = Image.new("RGB", (width, height), BACKGROUNDS["mint"]), io.BytesIO()
    ImageDraw.Draw(image).ellipse((41, 16, 108, 83), fill=COLOURS["red"][0])
    image.save(content, "PNG")
    return content.getvalue()


def pixels(server: Server, run: Run) -> np.ndarray:
    """The pictures of a run, (B, height, width, 3) in 0 to 255."""
    assert run.failure is None
    return np.stack([np.asarray(image.convert("RGB"), np.int16) for image in server.images(run, "save")])


@pytest.mark.parametrize("sampler", ["KSampler", "FlowDPMSampler"])
def test_every_step_has_progress_and_a_preview(host: Server, sampler: str) -> None:
    run = host.queue(text_to_image(sampler))
    assert pixels(host, run).shape == (1, 128, 96, 3)
    assert [(data["value"], data["max"]) for data in run.data("progress")] == [(i, STEPS) for i in range(1, STEPS + 1)]
    assert {data["node"] for data in run.data("progress")} == {"sample"}
    assert len(run.previews) == STEPS
    assert all(preview.width * 128 == preview.height * 96 for preview in run.previews)


def test_nodes_say_what_they_found(host: Server) -> None:
    host.free()
    run = host.queue(changed(text_to_image(), positive={"text": "a red circle " * 200}))
    assert run.texts["load"] == "custom, made for 256 px and cfg 2; its own text encoder and its own autoencoder"
    assert run.texts["negative"] == "1 of 300 tokens"
    assert run.texts["positive"].startswith("300 of 300 tokens, ") and run.texts["positive"].endswith(" cut off")


@pytest.mark.parametrize("sampler", ["KSampler", "FlowDPMSampler"])
def test_batch(host: Server, sampler: str) -> None:
    """Pictures of a batch differ. With our sampler the k-th is the one of seed + k alone, to the last bit of a pixel."""
    batch = pixels(host, host.queue(text_to_image(sampler, batch_size=3)))
    assert batch.shape == (3, 128, 96, 3)
    assert not np.array_equal(batch[0], batch[1])
    if sampler == "FlowDPMSampler":
        alone = pixels(host, host.queue(changed(text_to_image(sampler), sample={"seed": 3})))
        assert np.abs(batch[2] - alone[0]).max() <= 1


def test_core_samplers_run(host: Server) -> None:
    prompt = text_to_image()
    for name, scheduler, cfg in (("euler", "normal", 4.5), ("dpmpp_2m", "simple", 1.0)):
        settings = {"sampler_name": name, "scheduler": scheduler, "cfg": cfg}
        assert pixels(host, host.queue(changed(prompt, sample=settings))).std() > 0


def test_sampler_in_parts_equals_ours(host: Server) -> None:
    """SamplerCustomAdvanced with the guider, solver and schedule of this pack."""
    whole = text_to_image("FlowDPMSampler")
    parts = {
        **whole,
        "noise": node("RandomNoise", noise_seed=1),
        "guider": node("SanaGuider", model=("load", 0), positive=("positive", 0), negative=("negative", 0), cfg=4.5),
        "solver": node("FlowDPMSolver"),
        "schedule": node("FlowDPMScheduler", model=("load", 0), steps=STEPS, denoise=1.0, flow_shift=0.0),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=("noise", 0),
            guider=("guider", 0),
            sampler=("solver", 0),
            sigmas=("schedule", 0),
            latent_image=("latent", 0),
        ),
    }
    ours, theirs = pixels(host, host.queue(whole)), pixels(host, host.queue(parts))
    # The host scales noise by the first sigma, 0.9995; NVIDIA's pipeline, and our sampler, do not.
    assert np.abs(ours - theirs).mean() < 2


def image_to_image(denoise: float) -> Prompt:
    prompt = text_to_image()
    prompt["image"] = node("LoadImage", image="picture.png")
    prompt["latent"] = node("VAEEncode", pixels=("image", 0), vae=("load", 2))
    return changed(prompt, sample={"denoise": denoise})


def test_uploaded_picture_is_redrawn(host: Server) -> None:
    """It is cut to multiples of 32 px. The less denoising, the nearer the result is to the picture as encoded."""
    straight = pixels(host, host.queue(changed(image_to_image(1.0), decode={"samples": ("latent", 0)})))
    assert straight.shape == (1, 96, 128, 3)
    little, much = (pixels(host, host.queue(image_to_image(denoise))) for denoise in (0.1, 0.9))
    assert 0 < np.abs(little - straight).mean() < np.abs(much - straight).mean()


def test_interrupt_acts_within_a_step(host: Server) -> None:
    """And the next prompt draws what it drew before."""
    prompt = changed(text_to_image("FlowDPMSampler"), sample={"seed": 77})
    before = pixels(host, host.queue(prompt))

    def interrupt_at_second_step(name: str, data: Event) -> None:
        if name == "progress" and data["value"] == 2:
            host.interrupt()

    run = host.queue(changed(prompt, sample={"steps": 1000}), on_event=interrupt_at_second_step)
    assert run.interrupted and not run.outputs and run.failure is None
    # The message travels while the server draws: a few of these small steps may pass.
    assert max(data["value"] for data in run.data("progress")) < 30
    host.free()
    assert np.array_equal(pixels(host, host.queue(prompt)), before)


def bad_inputs() -> dict[str, tuple[Prompt, str, str]]:
    """By name: a prompt, the node that must fail, and a part of its message."""
    draw, ours = text_to_image(), text_to_image("FlowDPMSampler")
    load = {"load": {"model": "alone.pth"}}
    sprint = {
        **draw,
        "sigmas": node("SCMScheduler", steps=2, max_angle=1.57, intermediate_angle=1.3, paper_angles=False),
        "sample": node(
            "SCMSampler",
            model=("load", 0),
            seed=1,
            guidance=4.5,
            positive=("positive", 0),
            latent=("latent", 0),
            sigmas=("sigmas", 0),
        ),
    }
    other_encoder = {
        **draw,
        "encoder": node("SanaTextEncoderLoader", text_encoder="g.safetensors", dtype="auto"),
    }
    other_vae = {
        **draw,
        "vae": node("VAELoader", vae_name="pixel_space"),
        "decode": node("DCAEDecode", samples=("sample", 0), vae=("vae", 0), max_memory=0.0),
    }
    latents = {n: {**draw, "latent": node("LoadLatent", latent=f"{n}.latent")} for n in (4, 16)}
    return {
        "another model": (changed(draw, load={"model": "flux.safetensors"}), "load", "is a Flux model"),
        "LoRA as model": (changed(draw, load={"model": "lora.safetensors"}), "load", "is a LoRA"),
        "another encoder": (changed(draw, load={"text_encoder": "clip.safetensors"}), "load", "of another model"),
        "another VAE": (changed(draw, load={"vae": "sd.safetensors"}), "load", "is the VAE of another model"),
        "no encoder": (changed(draw, **load), "load", "comes without a Gemma-2-2b-it text encoder"),
        "size": (
            changed(draw, latent={"width": 100}),
            "latent",
            "width 100 is not a multiple of 32 px from 32 to 16384",
        ),
        "4 channels": (latents[4], "sample", "4 channels, and SANA takes 32"),
        "16 channels": (latents[16], "sample", "16 channels, and SANA takes 32"),
        "text of another encoder": (
            changed(other_encoder, positive={"clip": ("encoder", 0)}),
            "sample",
            "this conditioning has width 64",
        ),
        "VAE of another model": (other_vae, "decode", "this VAE is not a DC-AE"),
        "not Sprint": (sprint, "sample", "this MODEL is not SANA-Sprint"),
        "interval": (
            changed(ours, sample={"guidance_from": 0.6, "guidance_to": 0.4}),
            "sample",
            "rising numbers within 0 and 1",
        ),
        "block": (changed(ours, sample={"pag_scale": 1.0, "pag_block": 59}), "sample", "block 59 does not exist"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_is_explained(host: Server, name: str) -> None:
    prompt, node_id, message = bad_inputs()[name]
    files = ENCODER if "encoder" in prompt else {}
    with stand_ins.placed(host, {name: make() for name, make in files.items()}):
        run = host.queue(prompt)
    check_failure(run, node_id, message)


def test_missing_autoencoder_is_explained(host: Server) -> None:
    with stand_ins.placed(host, {name: make() for name, make in ENCODER.items()}):
        run = host.queue(changed(text_to_image(), load={"model": "alone.pth"}))
    source = "download mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers and put it into models/vae"
    check_failure(
        run, "load", f"alone.pth comes without a DC-AE f32c32 autoencoder, and models/vae holds none; {source}"
    )


def test_broken_weights_are_explained(host: Server) -> None:
    with stand_ins.placed(host, {name: make() for name, make in (ENCODER | AUTOENCODER).items()}):
        run = host.queue(changed(text_to_image(), load={"model": "broken.pth"}))
    check_failure(run, "sample", "sampling gave numbers that are not finite")


def check_failure(run: Run, node_id: str, message: str) -> None:
    assert run.failure is not None
    assert run.failure.node_id == node_id and message in run.failure.message
    assert len(run.failure.message.splitlines()) == 1, run.failure.message


def test_server_goes_on_after_bad_input(host: Server) -> None:
    """The last test here: nothing that failed before it has left a trace."""
    host.free()
    first = pixels(host, host.queue(text_to_image("FlowDPMSampler")))
    host.queue(changed(text_to_image(), load={"model": "flux.safetensors"}))
    host.free()
    assert np.array_equal(pixels(host, host.queue(text_to_image("FlowDPMSampler"))), first)
