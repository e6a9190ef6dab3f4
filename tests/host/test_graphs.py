"""Pictures through the running server, with the nodes of the host around ours: what is drawn, reported, stopped and refused."""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sana.checkpoints.writing import write_transformer
from sana.config import TransformerIdentity
from sana.loading import MODELS
from sana.networks.controlnet import SanaControlNet
from sana.networks.transformer import SanaTransformer
from sana.training.scenes import BACKGROUNDS, COLOURS
from tests.host import stand_ins
from tests.host.client import Event, Run
from tests.host.graphs import Prompt, changed, node, text_to_image
from tests.host.hosts import NEWEST, OLDEST
from tests.host.server import Server, Servers
from tests.sana.models import tiny_decoder
from tests.sana.twins import randomise

STEPS = 4
FLUX = "flux.safetensors"
SMALL, SPRINT, CONTROL = "small", "sprint", "control.safetensors"
TEXT_WIDTH = 192  # of the demo's text encoder


@pytest.fixture(scope="module", params=[NEWEST, OLDEST])
def host(servers: Servers, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of either end of the supported versions, with a picture to start from and a file of another model."""
    server = servers(request.param)
    server.upload("picture.png", picture())
    other = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}
    with stand_ins.placed(server, {f"diffusion_models/{FLUX}": other}), small_networks(server):
        yield server


@contextmanager
def small_networks(server: Server) -> Iterator[None]:
    """A SANA and a Sprint with the demo's texts and autoencoder, a ControlNet for the first, and TAESANA, all random."""
    decoder = tiny_decoder()
    decoder[-1].bias[0] += 10  # all its pictures are as red as can be
    tensors = {"vae_approx/taesana_decoder.pth": decoder.state_dict()}
    folders = [server.base / "models" / "diffusers" / name for name in (SMALL, SPRINT)]
    for folder, variant in zip(folders, ("sana-0.6b-1024px", "sana-sprint-0.6b-1024px"), strict=True):
        config = replace(stand_ins.transformer_config(variant), text_width=TEXT_WIDTH)
        shutil.copytree(MODELS["demo"], folder, ignore=shutil.ignore_patterns("transformer"))
        identity = TransformerIdentity(config, variant, 1024, 3.0, "float16", "its header")
        write_transformer(folder / "transformer", randomise(SanaTransformer(config), seed=6), identity, torch.float16)
        if folder.name == SMALL:
            control = SanaControlNet(replace(config, control_blocks=2))
            tensors[f"controlnet/{CONTROL}"] = randomise(control, seed=5).state_dict()
    with stand_ins.placed(server, tensors):
        yield
    for folder in folders:
        shutil.rmtree(folder)


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


def loader(model: str) -> dict[str, object]:
    """With the demo's text encoder and autoencoder."""
    return node("SanaCheckpointLoader", model=model, text_encoder="auto", vae="auto", dtype="auto")


def inpainting() -> Prompt:
    prompt = image_to_image(0.8)
    prompt["mask"] = node("SolidMask", value=1.0, width=128, height=96)
    prompt["masked"] = node("SetLatentNoiseMask", samples=("latent", 0), mask=("mask", 0))
    return changed(prompt, sample={"latent_image": ("masked", 0)})


def controlled() -> Prompt:
    prompt = text_to_image("FlowDPMSampler", size=(96, 128))
    prompt["drawer"] = loader(SMALL)
    prompt["image"] = node("LoadImage", image="picture.png")
    prompt["net"] = node("SanaControlNetLoader", control_net=CONTROL)
    ends = {"positive": ("positive", 0), "negative": ("negative", 0), "image": ("image", 0), "vae": ("load", 2)}
    settings = {"start_percent": 0.0, "end_percent": 1.0, "strength": 1.0}
    prompt["control"] = node("ControlNetApplyAdvanced", control_net=("net", 0), **ends, **settings)
    return changed(prompt, sample={"model": ("drawer", 0), "positive": ("control", 0), "negative": ("control", 1)})


def sprint() -> Prompt:
    """Another model with the demo's texts and autoencoder."""
    prompt = text_to_image(size=(96, 128))
    prompt["drawer"] = loader(SPRINT)
    prompt["schedule"] = node("SCMScheduler", steps=STEPS, max_angle=1.57, intermediate_angle=1.3, paper_angles=False)
    links = {"model": ("drawer", 0), "positive": ("positive", 0), "sigmas": ("schedule", 0), "latent": ("latent", 0)}
    prompt["sample"] = node("SCMSampler", seed=1, guidance=4.5, **links)
    return prompt


@pytest.mark.parametrize("kind", [inpainting, controlled, sprint], ids=lambda kind: kind.__name__)
def test_other_runs_have_previews_by_either_method(host: Server, kind: Callable[[], Prompt]) -> None:
    """That of the host's choice: TAESANA, whose pictures are red here, or the linear map."""
    for method, seed in (("latent2rgb", 1), ("taesd", 2)):
        run = host.queue(changed(kind(), sample={"seed": seed}), preview_method=method)
        assert run.failure is None and len(run.previews) == len(run.data("progress")) > 0
        for preview in run.previews:
            assert preview.width * 96 == preview.height * 128
            assert (np.asarray(preview.convert("RGB"))[..., 0].mean() > 235) == (method == "taesd")


def test_nodes_say_what_they_found(host: Server) -> None:
    """And say it again when the result comes from the cache."""
    host.free()
    prompt = changed(text_to_image(), positive={"text": "a red circle " * 200})
    first, second = host.queue(prompt), host.queue(prompt)
    texts = first.texts()
    assert texts["load"] == "custom, made for 256 px and cfg 2; its own text encoder and its own autoencoder"
    assert texts["negative"] == "encoded 0 of 299 tokens"
    assert texts["positive"].startswith("encoded 299 of 299 tokens, ") and texts["positive"].endswith(" cut off")
    assert {"load", "negative", "positive"} <= {*second.data("execution_cached")[0]["nodes"]}
    assert second.texts() == texts


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


def test_prompt_of_another_pack_is_refused_in_one_sentence(host: Server) -> None:
    """Before the host speaks of the nodes that it does not have."""
    theirs = {"ckpt_name": "Sana_1600M_1024px.pth", "model": "SanaMS_1600M_P1_D20", "dtype": "BF16"}
    run = host.queue({**text_to_image(), "load": node("SanaCheckpointLoader", **theirs), "gemma": node("GemmaLoader")})
    assert run.failure is not None
    assert run.failure.message == (
        "node load, SanaCheckpointLoader, has the input ckpt_name of ComfyUI_ExtraModels, where that of ComfyUI-Sana has model: "
        "open the workflow in ComfyUI, which translates it, and export it for the API again"
    )


def test_server_goes_on_after_bad_input(host: Server) -> None:
    """The last test here. What else is refused, and with what words, the tests inside the host say."""
    host.free()
    ours = text_to_image("FlowDPMSampler")
    first = pixels(host, host.queue(ours))
    check_failure(host.queue(changed(ours, load={"model": FLUX})), "load", "is a Flux model")
    block = {"pag_scale": 1.0, "pag_block": 59}
    check_failure(host.queue(changed(ours, sample=block)), "sample", "block 59 does not exist")
    host.free()
    assert np.array_equal(pixels(host, host.queue(ours)), first)


def check_failure(run: Run, node_id: str, message: str) -> None:
    assert run.failure is not None
    assert run.failure.node_id == node_id and message in run.failure.message
    assert len(run.failure.message.splitlines()) == 1, run.failure.message
