"""Training from the shell: python -m sana.training demo --out FOLDER, or finetune --data FOLDER --out FOLDER."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import VARIANTS
from ..interruption import INTERRUPTED, begin
from ..loading import model_path

try:
    from accelerate import PartialState

    from .demo import DemoConfig, train_demo
    from .finetune import FinetuneConfig, finetune
except ModuleNotFoundError as error:
    if error.name != "accelerate":
        raise
    sys.exit('training needs the package accelerate; run pip install ".[training]" in the folder of this project')

DEMO_NUMBERS = {
    "autoencoder_steps": "of the autoencoder, first",
    "decoder_steps": "of its decoder alone, next",
    "transformer_steps": "of transformer and text encoder, last",
    "scenes": "pictures to train the transformer on, of each of three sizes",
    "batch_size": "latents a step and process, of the transformer",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code."""
    try:
        begin()
        options = parser().parse_args(arguments)
        return options.run(options)
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from the last saved step, if one was saved.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m sana.training", description="Train SANA models.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train the demo model from nothing")
    demo.add_argument(
        "--out", type=Path, required=True, help="work folder; the model appears in its subfolder checkpoint"
    )
    demo.add_argument(
        "--start",
        type=Path,
        help='"demo", or the folder of a demo checkpoint, to train further (default: from nothing)',
    )
    for name, value in vars(DemoConfig()).items():
        option = f"--{name.replace('_', '-')}"
        demo.add_argument(option, type=int, default=value, help=f"{DEMO_NUMBERS[name]} (default: {value})")
    demo.set_defaults(run=run_demo)
    tune = commands.add_parser("finetune", help="train a SANA transformer on a folder of pictures with captions")
    tune.add_argument("--data", type=Path, required=True, help="pictures, each with a .txt file of its name")
    tune.add_argument(
        "--out", type=Path, required=True, help="work folder; the result appears in its subfolder transformer"
    )
    tune.add_argument(
        "--model", default="demo", help='"demo", a diffusers folder, or a transformer file (default: demo)'
    )
    tune.add_argument("--autoencoder", help='for a transformer alone: file or folder of its DC-AE, or "demo"')
    tune.add_argument("--text-encoder", help='for a transformer alone: file or folder of Gemma-2-2b-it, or "demo"')
    tune.add_argument("--variant", choices=tuple(VARIANTS), help="for a file that cannot tell 1K from 2K or 4K")
    tune.add_argument("--steps", type=int, default=1000, help="default: 1000")
    tune.add_argument("--batch-size", type=int, default=4, help="pictures a step and process (default: 4)")
    tune.add_argument("--learning-rate", type=float, default=1e-5, help="default: 1e-5")
    tune.add_argument("--recompute", action="store_true", help="less memory, a third more work")
    tune.add_argument(
        "--sheet-every",
        type=int,
        default=500,
        help="steps from one sheet of pictures that the model draws to the next, 0: none (default: 500)",
    )
    tune.add_argument(
        "--save-every", type=int, default=500, help="steps from one saved state to the next (default: 500)"
    )
    tune.set_defaults(run=run_finetune)
    return top


def run_finetune(options: argparse.Namespace) -> int:
    config = FinetuneConfig(**{name: getattr(options, name) for name in vars(FinetuneConfig())})
    parts = {name: getattr(options, name) for name in ("model", "autoencoder", "text_encoder", "variant")}
    report(finetune(options.out, options.data, config, **parts))
    return 0


def run_demo(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in vars(DemoConfig())}
    start = model_path(options.start) if options.start else None
    report(train_demo(options.out, DemoConfig(**given), start))
    return 0


def report(written: Path) -> None:
    """Print where the result is, once for all processes."""
    if PartialState().is_main_process:
        print(written)


if __name__ == "__main__":
    sys.exit(main())
