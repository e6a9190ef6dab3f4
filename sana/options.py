"""What the commands of the shell take."""

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path

from .checkpoints.quantising import PACKED_FORMATS
from .config import VARIANTS
from .sampling.solvers import SOLVERS
from .text.generation import Sampling
from .text.prompt import INSTRUCTION

PROJECT = "comfyui-sana"
DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """Of all commands; `command` is which."""
    name = "sana" if Path(sys.argv[0]).stem == "sana" else "python -m sana"
    top = argparse.ArgumentParser(prog=name, description="SANA text to image.")
    top.add_argument("--version", action="version", version=version())
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    add_generate(commands.add_parser("generate", help="draw a prompt"))
    add_enhance(commands.add_parser("enhance", help="write a better prompt, by the text encoder"))
    info = commands.add_parser("info", help="say what a checkpoint is")
    info.add_argument("path", type=Path, help="checkpoint file or folder, or a LoRA")
    info.add_argument("--model", help="for a LoRA: the SANA that it is to fit")
    conversion = commands.add_parser(
        "convert",
        help="write a transformer, autoencoder or LoRA as one safetensors file, or quantise a transformer or Gemma-2",
    )
    conversion.add_argument("source", type=Path, help="checkpoint file or folder; a LoRA gets the layout of diffusers")
    conversion.add_argument("target", type=Path, help="safetensors file to write")
    conversion.add_argument("--variant", choices=tuple(VARIANTS), help="for a file that cannot tell 1K from 2K or 4K")
    conversion.add_argument("--dtype", choices=DTYPES, help="number format of the tensors (default: as in the source)")
    conversion.add_argument(
        "--quantize",
        choices=tuple(PACKED_FORMATS),
        help="pack the matrices of the blocks into 8 or 4 bits; needs comfy-kitchen",
    )
    conversion.add_argument(
        "--quantize-all", action="store_true", help="pack the sensitive ends too, such as the caption projection"
    )
    add_lora(conversion, "a LoRA to merge into a transformer; may be given several times (strength: 1)")
    return top


def version() -> str:
    """Of the pyproject.toml beside this folder, as in a checkout or in a host, or else of the installed package."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.exists() else ""
    if found := re.search(rf'^name = "{PROJECT}".*?^version = "(.+?)"', text, re.DOTALL | re.MULTILINE):
        return found[1]
    try:
        return metadata.version(PROJECT)
    except metadata.PackageNotFoundError:  # a folder that was copied alone
        return "unknown"


def add_generate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("prompt", nargs="?", help="what to draw")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="draw every line of a text file instead; with --workers also the rows of a .csv, .jsonl or .parquet",
    )
    add(
        "--enhance",
        action="store_true",
        help="draw a better prompt that the text encoder writes first, of each picture's own seed; the PNG tells both",
    )
    add(
        "--out",
        help="PNG to write; several pictures get a number (default: sana.png, with a number if that exists). "
        "With --workers a folder, or an address such as s3://bucket/folder",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="draw --prompts in N processes of Ray, on this machine unless --cluster",
    )
    add("--cluster", metavar="ADDRESS", help="of a Ray cluster to draw on; auto: the one of this machine")
    add("--devices-per-worker", type=float, default=0, metavar="D", help="GPUs of each worker, or a share (default: 0)")
    add(
        "--format",
        choices=("png", "webdataset"),
        default="png",
        help="with --workers: each picture a file, or tars of 250 pictures with their prompts (default: %(default)s)",
    )
    add("--retry-failed", action="store_true", help="with --workers: try rows again that could not be drawn")
    existing = command.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="draw only what is not there: pictures named like --out count that were drawn from the same prompt, seed, "
        "settings and model; new ones take free numbers",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace pictures of the same name, which are else an error"
    )
    add("--model", default="demo", help='"demo", a diffusers folder, or a transformer file (default: demo)')
    add("--autoencoder", help='for a transformer alone: file or folder of its DC-AE, or "demo"')
    add("--text-encoder", help='for a transformer alone: file or folder of Gemma-2-2b-it, or "demo"')
    add("--variant", choices=tuple(VARIANTS), help="for a file that cannot tell 1K from 2K or 4K")
    add_lora(
        command,
        "a LoRA for the transformer or the text encoder, of any trainer; may be given several times (strength: 1)",
    )
    add("--negative", default="", help="what to avoid")
    size_help = (
        "pixels, a multiple of 32 (default: the model's; with --image or --control-image that one's, unless far larger)"
    )
    add("--height", type=int, help=size_help)
    add("--width", type=int, help=size_help)
    add("--steps", type=int, help="evaluations of the model (default: 20; Sprint: 2)")
    add("--guidance-scale", type=float, help="1 is off (default: the model's, which is 4.5 for every release)")
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="noise levels it acts at",
    )
    add("--pag-scale", type=float, default=0.0, help="perturbed-attention guidance; 0 is off (default: 0)")
    add("--flow-shift", type=float, help="default: the model's")
    add("--solver", choices=tuple(SOLVERS), default="flow_dpm", help="default: flow_dpm; Sprint has its own")
    add(
        "--reference",
        choices=("nvlabs", "diffusers"),
        default="nvlabs",
        help="whose rules; diffusers has prompts in lower case, single quotes in the default instruction, a mask of its own "
        "for the negative prompt, and a ControlNet that branches off one block earlier (default: nvlabs)",
    )
    add("--instruction", default=INSTRUCTION, help="text before the prompt; '' for none (default: NVIDIA's)")
    add("--seed", type=int, default=0, help="of the first picture; the k-th has seed + k (default: 0)")
    add("--batch-size", type=int, default=1, help="pictures of each prompt (default: 1)")
    add("--image", type=Path, help="picture to start from")
    add("--mask", type=Path, help="of --image: white is painted anew, black is kept")
    add(
        "--strength",
        type=float,
        help="share of the schedule to run from --image, in (0, 1] (default: 0.5; with --mask: 1)",
    )
    add("--control", type=Path, metavar="FILE", help="a ControlNet, which follows --control-image")
    add(
        "--control-image", type=Path, metavar="PNG", help="picture for the ControlNet, such as edges; cut as --image is"
    )
    add("--control-scale", type=float, default=1.0, help="how strongly the ControlNet acts (default: 1)")
    add("--control-from", type=float, default=0.0, help="share of the schedule after which it acts (default: 0)")
    add(
        "--control-to", type=float, default=1.0, help="share of the schedule after which it no longer does (default: 1)"
    )
    add(
        "--max-bytes",
        type=int,
        help="bound on the working memory of the autoencoder, as PyTorch allocates it; on a CPU with Linux the process grows "
        "by at most 1.25 times as much and 64 MB (decoding 1024 px in bfloat16 within 104 MB: by 150)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="number format of all networks; float16 is for the transformer alone (default: float32 on a CPU, else that "
        "of the release)",
    )
    add("--device", help="such as cpu or cuda:1 (default: cuda where there is one, else cpu)")
    add(
        "--offload",
        choices=("never", "auto"),
        default="auto",
        help="auto: where a GPU has no room for the whole model, its parts take turns there, and prompts are encoded 16 ahead; "
        "never: all stay there (default: auto)",
    )
    add("--compile", action="store_true", help="compile the transformer first; pays for many pictures of one size")
    add(
        "--fast",
        action="store_true",
        help="on a GPU: record each kind of step as a CUDA graph, and launch it whole; the pictures are the same",
    )
    add(
        "--in-int8",
        action="store_true",
        help="on a CPU, multiply a transformer in int8 in 8 bits: faster, and what comes into a layer is rounded as well",
    )


def add_enhance(command: argparse.ArgumentParser) -> None:
    add, usual = command.add_argument, Sampling()
    add("prompt", nargs="?", help="what the picture is to show")
    add("--prompts", type=Path, metavar="FILE", help="write one for every line of a text file instead, a line each")
    add("--model", default="demo", help="a diffusers folder with the text encoder in it")
    add("--text-encoder", help="file or folder of Gemma-2-2b-it (default: that of the model)")
    add_lora(command, "a LoRA for the text encoder; may be given several times (strength: 1)")
    add("--instruction", default=INSTRUCTION, help="text before the prompt (default: NVIDIA's)")
    add("--raw", action="store_true", help="go on in the line of the instruction, instead of asking and being answered")
    add("--seed", type=int, default=usual.seed, help="the same seed gives the same text (default: %(default)s)")
    add("--max-tokens", type=int, default=usual.max_tokens, help="to write at most (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        default=usual.temperature,
        help="how freely tokens are chosen; 0: always the likeliest (default: %(default)s)",
    )
    add("--top-k", type=int, default=usual.top_k, help="of so many likeliest tokens; 0: of all (default: %(default)s)")
    add(
        "--top-p",
        type=float,
        default=usual.top_p,
        help="of the likeliest that have this probability together (default: %(default)s)",
    )
    add(
        "--min-p",
        type=float,
        default=usual.min_p,
        help="of those with this share of the likeliest one's probability (default: %(default)s)",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=usual.repetition_penalty,
        help="above 1: what is there already becomes less likely (default: %(default)s)",
    )
    add(
        "--presence-penalty",
        type=float,
        default=usual.presence_penalty,
        help="the same by subtraction (default: %(default)s)",
    )
    add("--dtype", choices=DTYPES[:2], help="number format (default: float32 on a CPU, else bfloat16)")
    add("--device", help="such as cpu or cuda:1 (default: cuda where there is one, else cpu)")


def add_lora(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--lora", action="append", default=[], metavar="FILE[=STRENGTH]", help=what)
