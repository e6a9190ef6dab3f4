"""Draws workflows/<name>.jpg, the picture that the list of templates shows: python -m tests.workflows.pictures [NAME ...]

Every workflow runs as the user interface converts it, on a real server, with the demo model in the place of the files it
links to: with a prompt and a size that this model knows, a drawn scene as the picture to start from, and a LoRA of small
random weights. The demo model cannot stand for a Sprint model or a ControlNet, so their workflows have no picture. Needs the
environment of `python3 tests`: .venv/tests/bin/python.
"""

import io
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from sana.checkpoints.transformer import load_transformer
from sana.loading import MODELS
from sana.training.scenes import Look, Scene, Thing, draw
from tests.browser.frontend import launch, open_page
from tests.host import stand_ins
from tests.host.graphs import DEMO, Prompt, changed
from tests.host.server import Server, Servers
from tests.workflows import graph

SIDE = 256  # px
SEED = 1
START = Scene(
    kind="relation",
    things=(Thing(Look("red", "circle"), 94, 30, 68), Thing(Look("blue", "square"), 94, 158, 68)),
    relation="above",
    background="white",
    height=SIDE,
    width=SIDE,
)
LARGE = replace(
    START,
    things=(Thing(START.things[0].look, 48, 60, 68), Thing(START.things[1].look, 318, 318, 68)),
    height=512,
    width=512,
)
HOLE_OF_LARGE = slice(208, 496)  # px, of rows and of columns: around its square
PROMPTS: dict[str, str | tuple[str, ...]] = {  # of several nodes, in their order
    "sana_demo": "a red circle left of a blue square on a white background",
    "sana_1k_text_to_image": "a large green star on a light blue background",
    "sana_2k_text_to_image": "three blue squares on a cream background",
    "sana_4k_text_to_image": "a yellow star inside a purple circle on a grey background",
    "sana_1_5_text_to_image": "a large pink triangle on a mint background",
    "sana_img2img": "a green circle above a yellow square on a white background",
    "sana_second_pass": "a red circle left of a blue square on a white background",
    "sana_inpainting": "a red circle above a green square on a white background",
    "sana_inpainting_crop": "a green square on a white background",
    "sana_regions_by_area": (
        "a red circle left of a blue square on a white background",
        "a red circle on a white background",
        "a blue square on a white background",
    ),
    "sana_regions_by_mask": ("a blue square on a white background", "a red circle on a white background"),
    "sana_guidance": "a green star above a purple square on a white background",
    "sana_seed_grid": "two orange triangles on a white background",
    "sana_steps_cfg_grid": "a blue circle inside a red ring on a mint background",
    "sana_lora_chain": "two green crosses on a cream background",
    "sana_low_memory": "a yellow circle left of a green square on a light blue background",
    "sana_two_gpus": "a large red star on a grey background",
    "sana_prompt_enhancer": "a purple circle above an orange square on a white background",
    "sana_train_lora": "a large pierced red heart on a white background",
    "sana_lora": "two purple crosses on a white background",
}
LORAS = ("pytorch_lora_weights.safetensors", "style_lora.safetensors", "subject_lora.safetensors")
WITH_HOLE = ("sana_inpainting", "sana_regions_by_mask")


def main(names: list[str]) -> None:
    """Draws the workflows of these names, or all. Raises RuntimeError if one does not run."""
    with TemporaryDirectory() as folder, launch() as browser:
        servers = Servers(Path(folder))
        try:
            server = servers()
            for seed, lora in enumerate(LORAS, start=SEED):
                stand_ins.write(server.base / "models" / "loras" / lora, demo_lora(seed))
            with open_page(browser, server) as page:
                page.open()
                for name in names or PROMPTS:
                    page.load(graph.read(name))
                    picture = draw_workflow(server, name, page.prompt())
                    picture.save(graph.FOLDER / f"{name}.jpg", quality=92)
        finally:
            servers.close()


def draw_workflow(server: Server, name: str, prompt: Prompt) -> Image.Image:
    """What the workflow draws with the demo model."""
    large = name == "sana_inpainting_crop"
    server.upload("example.png", large_picture() if large else start_picture(hole=name in WITH_HOLE))
    texts = (PROMPTS[name],) if isinstance(PROMPTS[name], str) else PROMPTS[name]
    run = server.queue(with_demo_model(graph.shrunk(prompt, side=SIDE), *texts))
    if run.failure is not None:
        raise RuntimeError(f"{name} failed at {run.failure.node_type}: {run.failure.message}")
    (saved,) = graph.of_kind(prompt, "SaveImage")
    return server.images(run, saved)[0].convert("RGB")


def with_demo_model(prompt: Prompt, *texts: str) -> Prompt:
    """The same graph with the demo model, its own guidance scale, and other prompts, in the order of their nodes."""
    own_parts = {"model": DEMO, "text_encoder": "auto", "vae": "auto"}
    loaders = {name: own_parts for name in graph.of_kind(prompt, "SanaCheckpointLoader")}
    encoders = graph.of_kind(prompt, "GemmaTextEncode")
    positive = [name for name in encoders if prompt[name]["inputs"]["instruction"] == "official"]
    if written := graph.of_kind(prompt, "SanaPromptEnhancer"):  # the demo's text encoder cannot write
        prompts = {name: {"edited": text} for name, text in zip(written, texts, strict=True)}
    else:
        prompts = {name: {"text": text} for name, text in zip(positive, texts, strict=True)}
    scales = {name: {"cfg": 2.0} for name in graph.of_kind(prompt, "FlowDPMSampler")}
    return changed(prompt, **loaders, **prompts, **scales)


def start_picture(*, hole: bool) -> bytes:
    """The scene to start from as PNG; with a hole where its lower half is, which LoadImage gives as a mask."""
    alpha = np.full((SIDE, SIDE, 1), 255, np.uint8)
    if hole:
        alpha[SIDE // 2 :] = 0
    return _png(draw(START), alpha)


def large_picture() -> bytes:
    """A scene that is larger than what the demo model draws, with a hole around one thing."""
    alpha = np.full((LARGE.height, LARGE.width, 1), 255, np.uint8)
    alpha[HOLE_OF_LARGE, HOLE_OF_LARGE] = 0
    return _png(draw(LARGE), alpha)


def _png(pixels: np.ndarray, alpha: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.concatenate([pixels, alpha], axis=-1)).save(content, "PNG")
    return content.getvalue()


def demo_lora(seed: int = SEED, rank: int = 4, scale: float = 0.05) -> stand_ins.Tensors:
    """For the queries and keys of the demo model's self-attention; scale: of its size, against the weights'."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in load_transformer(MODELS[DEMO]).state_dict().items():
        if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
            layer, (rows, columns) = f"transformer.{name.removesuffix('.weight')}", weight.shape
            found[f"{layer}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / rank**0.5
            found[f"{layer}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * weight.std() * scale
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
