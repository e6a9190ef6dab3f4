"""A LoRA, trained in a graph."""

import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..sana.saving import replacing
from . import inputs
from .host.report import reported
from .pixels import to_pixels

EXTRAS = ("accelerate", "peft", "pyarrow")
FOLDER = "sana_training"  # in the output folder, for work folders
LORAS = "loras"  # in the output folder, where the host looks for LoRAs, too
SHIPPED = {"demo hearts": Path(__file__).parent / "hearts"}  # names that stand for a folder of pictures with captions
SIDE = 256  # px, of the picture that stands for one that was not drawn
WORDS = {"another --out": "another name", "the same command": "the next run"}  # of the shell, and what they are here


class SanaTrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SanaTrainLora",
            display_name="SANA train LoRA",
            category="SANA/training",
            search_aliases=["train lora", "fine-tune", "dreambooth", "finetune", "teach", "style training", "peft"],
            description="Trains a LoRA of a SANA model on pictures with captions. Stop saves it, and the next run goes on. Needs "
            "the packages accelerate, peft and pyarrow.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="To train for. What LoRAs before this node change in it stays as it is."
                ),
                inputs.clip(),
                io.Vae.Input("vae", tooltip="The DC-AE of a SANA loader."),
                io.String.Input(
                    "name",
                    default="my_lora",
                    tooltip="Of the LoRA, which is written to output/loras, and of its work folder in output/sana_training. A run "
                    "with a name that is there goes on with it.",
                ),
                io.String.Input(
                    "data",
                    default="",
                    tooltip="A folder in ComfyUI's input folder, with pictures that each have a .txt file of the same name. demo "
                    "hearts: pictures that come with this pack. Empty: the images that are connected.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="What the connected images show: a line for each of them, or one line for all.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="Drawn while it trains, above without and below with the LoRA: up to six prompts, a line each. Empty: up to "
                    "six captions.",
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=100_000,
                    tooltip="Updates of the LoRA, those of earlier runs included.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=0.0,
                    max=0.1,
                    step=1e-6,
                    round=1e-7,
                    tooltip="At its highest. Too high a rate ends with a message, and keeps the last state.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=["constant", "cosine", "linear"],
                    tooltip="Of the learning rate, after it has risen over the first tenth of the steps. linear falls over the last third.",
                ),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="More learns more and makes a larger file."),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=0.5,
                    tooltip="The LoRA acts with alpha / rank. 0: the same as rank.",
                ),
                io.Combo.Input(
                    "targets",
                    options=["attention", "all"],
                    tooltip="Layers that are changed: the picture's side of both attentions, or also the text's side and the Mix-FFN.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=1024, tooltip="Pictures a step, all of one size."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Of the first weights, of the order of the pictures, and of the noise.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=100,
                    min=0,
                    max=100_000,
                    tooltip="Steps from one drawing of the prompts to the next. 0: only at the end.",
                ),
                io.Boolean.Input("recompute", default=False, tooltip="Less memory, for a third more work."),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures to learn from, as a batch or as a list of any sizes."
                ),
                io.String.Input(
                    "prior",
                    default="",
                    optional=True,
                    tooltip="A second folder in the input folder, with captions: of pictures that show what is to stay as it is.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    optional=True,
                    tooltip="Words in the captions that call up what was learnt, to be told by the file.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA."),
                io.LoraModel.Output("lora", tooltip="For the core nodes Load LoRA Model and Save LoRA Weights."),
                io.Image.Output("loss", tooltip="The loss as a curve."),
                io.Image.Output("sheet", tooltip="The prompts, above without and below with the LoRA."),
            ],
            is_input_list=True,
            is_output_node=True,
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        images: Sequence[Tensor] = (),
        captions: Sequence[str] = ("",),
        prior: Sequence[str] = ("",),
        trigger: Sequence[str] = ("",),
        **lists: Sequence[object],
    ) -> io.NodeOutput:
        check_extras()
        # They need the extras.
        from ..sana.training.adapters import AdapterConfig
        from ..sana.training.curve import read_log
        from ..sana.training.lora import LoraConfig
        from .host.training import HostSource, end, filled, train, with_lora

        one = {name: values[0] for name, values in lists.items()}
        output = Path(folder_paths.get_output_directory())
        folder = within(output / FOLDER, one["name"], "name")
        lora = within(output / LORAS, one["name"], "name").with_name(f"{folder.name}.safetensors")
        if lora.exists() and not folder.exists():
            raise ValueError(f"{lora} is there already, and was not trained in {folder}; give another name")
        settings = ("steps", "learning_rate", "schedule", "batch_size", "seed", "recompute")
        config = LoraConfig(
            adapter=AdapterConfig(rank=one["rank"], alpha=one["alpha"] or None, targets=one["targets"]),
            prompts=tuple(lines(one["prompt"])),
            prior=from_input(prior[0], "prior") if prior[0].strip() else None,
            trigger=trigger[0].strip(),
            sheet_every=one["preview_every"] or one["steps"],
            **{name: one[name] for name in settings},
        )
        source = HostSource(one["model"], one["clip"], one["vae"])
        data = material(one["data"], images, captions, folder)
        try:
            complete = train(folder, data, config, source)
        except (ValueError, OSError) as error:
            raise ValueError(in_words_of_a_node(str(error))) from error
        publish(folder / "lora.safetensors", lora)
        if not complete:
            end()
        model, tensors = with_lora(one["model"], lora)
        step, loss = [(config.steps, math.nan), *read_log(folder / "log.csv")][-1]
        told = f"{step} steps, loss {loss:.4f}. The LoRA is {LORAS}/{lora.relative_to(output / LORAS)} in the output folder."
        sheets = sorted(folder.glob("sheet-*.png"))
        return reported(
            model, tensors, image(picture([folder / "loss.png"])), image(filled(picture(sheets))), text=told
        )


def check_extras() -> None:
    """Raises ValueError for packages that ComfyUI does not install."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        *others, last = missing
        named = f"packages {', '.join(others)} and {last}" if others else f"package {last}"
        raise ValueError(
            f"training needs the {named}; run pip install "
            f"{' '.join(missing)} with the Python of ComfyUI, and restart it"
        )


def within(root: Path, name: str, what: str) -> Path:
    """A path below a folder. Raises ValueError for a name that leads out of it."""
    path = root / name.strip()
    if root.absolute() not in Path(os.path.abspath(path)).parents:
        raise ValueError(f"{what} is {name!r}; give a name of a folder, such as my_pictures, which will lie in {root}")
    return path


def from_input(name: str, what: str) -> Path:
    """A folder that lies in ComfyUI's input folder."""
    return within(Path(folder_paths.get_input_directory()), name, what)


def lines(text: str) -> list[str]:
    """Those with something in them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def material(data: str, images: Sequence[Tensor], captions: Sequence[str], folder: Path) -> Path:
    """The folder of pictures with captions to train on, which images become beside the work folder, each set in its own.

    Raises ValueError unless there are either images or a folder, and for another number of captions than one or of the images.
    """
    if bool(data.strip()) == bool(len(images)):
        found = (
            f"data is {data!r} and images are connected" if len(images) else "data is empty and no images are connected"
        )
        raise ValueError(f"{found}; give either a folder of pictures or images with captions")
    if data.strip() in SHIPPED:
        return SHIPPED[data.strip()]
    if data.strip():
        return from_input(data, "data")
    pictures = [picture for batch in images for picture in batch]
    told = [line for text in captions for line in lines(text)]
    if len(told) not in (1, len(pictures)):
        raise ValueError(
            f"there are {len(pictures)} images and {len(told)} captions; give a caption for each, a line each, or one for all"
        )
    told = told * len(pictures) if len(told) == 1 else told
    return write_pictures(folder.with_name(f"{folder.name}-pictures"), pictures, told)


def write_pictures(folder: Path, pictures: Sequence[Tensor], captions: Sequence[str]) -> Path:
    """Files of IMAGE pictures, each (height, width, 3) in [0, 1], in a folder named by what is in it, unless they are there."""
    pixels = [to_pixels(picture) for picture in pictures]
    digest = sha256(repr(captions).encode())
    for picture in pixels:
        digest.update(repr(picture.shape).encode() + picture.tobytes())
    place = folder / digest.hexdigest()[:8]
    place.mkdir(parents=True, exist_ok=True)
    for i, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        path = place / f"{i:04d}.png"
        if not path.exists():  # written anew, it would be encoded anew
            with replacing(path.with_suffix(".txt")) as unfinished:
                unfinished.write_text(caption, encoding="utf-8")
            with replacing(path) as unfinished:
                Image.fromarray(picture).save(unfinished, format="PNG")
    return place


def in_words_of_a_node(message: str) -> str:
    for word, other in WORDS.items():
        message = message.replace(word, other)
    return message


def publish(found: Path, place: Path) -> None:
    """Copy a LoRA to where the host looks for LoRAs."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as unfinished:
        shutil.copyfile(found, unfinished)


def picture(paths: Sequence[Path]) -> Image.Image:
    """The last of these that is there; a white one if none is."""
    found = [path for path in paths if path.exists()]
    return Image.open(found[-1]).convert("RGB") if found else Image.new("RGB", (SIDE, SIDE), "white")


def image(picture: Image.Image) -> Tensor:
    """A picture as IMAGE (1, height, width, 3)."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]


NODES = (SanaTrainLora,)
