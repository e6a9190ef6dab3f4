"""Prompts in API format: text to image with the demo model, in parts that tests exchange."""

import copy

DEMO = "demo"
FREE_SIZE = "width x height below"
Prompt = dict[str, dict]


def node(kind: str, **inputs: object) -> dict[str, object]:
    """One node. An input that is a pair (node id, output) is a link."""
    links = {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()}
    return {"class_type": kind, "inputs": links}


def text_to_image(sampler: str = "KSampler", *, size: tuple[int, int] = (128, 96), batch_size: int = 1) -> Prompt:
    """KSampler or FlowDPMSampler between a loader, two prompts and a picture. size: (height, width), px."""
    parts = {"model": ("load", 0), "positive": ("positive", 0), "negative": ("negative", 0)}
    settings = {"seed": 1, "steps": 4, "cfg": 4.5, "denoise": 1.0}
    if sampler == "KSampler":
        settings |= {"sampler_name": "flow_dpm", "scheduler": "simple", "latent_image": ("latent", 0)}
    else:
        settings |= {"flow_shift": 0.0, "latent": ("latent", 0)}
    return {
        "load": node("SanaCheckpointLoader", model=DEMO, text_encoder="auto", vae="auto", dtype="auto"),
        "positive": node(
            "GemmaTextEncode", clip=("load", 1), text="a red circle left of a blue square", instruction="official"
        ),
        "negative": node("GemmaTextEncode", clip=("load", 1), text="", instruction="none"),
        "latent": node("EmptySanaLatentImage", size=FREE_SIZE, height=size[0], width=size[1], batch_size=batch_size),
        "sample": node(sampler, **settings, **parts),
        "decode": node("VAEDecode", samples=("sample", 0), vae=("load", 2)),
        "save": node("SaveImage", images=("decode", 0), filename_prefix="test"),
    }


def changed(prompt: Prompt, **changes: dict[str, object]) -> Prompt:
    """A copy of a prompt with other inputs: changed(prompt, sample={"steps": 2}). Unknown nodes raise KeyError."""
    prompt = copy.deepcopy(prompt)
    for name, inputs in changes.items():
        prompt[name]["inputs"] |= node("", **inputs)["inputs"]
    return prompt
