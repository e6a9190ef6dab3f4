"""Training from the shell: python -m sana.training lora, finetune or demo; captions and cache, which prepare pictures."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from ..cluster import needing_packages
from ..cluster.workers import Workers
from ..config import VARIANTS
from ..interruption import INTERRUPTED, begin, postponed
from ..loading import model_path
from ..printing import print_every_letter

try:
    from accelerate import PartialState

    from .adapters import TARGETS, AdapterConfig, Kind
    from .captions import Choice, check_name, read_captions
    from .demo import DemoConfig, train_demo
    from .finetune import FinetuneConfig, finetune
    from .loop import Schedule, Stopped, Watch
    from .lora import DTYPES, LoraConfig, train_lora
    from .material import ModelFiles, fill_cache
    from .optimizers import OptimizerName
    from .pictures import picture_files
    from .pretrained import CLIP, QUESTION
except ModuleNotFoundError as error:
    if error.name not in ("accelerate", "pyarrow"):
        raise
    sys.exit(f'training needs the package {error.name}; run pip install ".[training]" in the folder of this project')

OPTIMIZER = "adamw8bit, prodigy, which finds the learning rate by itself, and came need the extra optimizers"
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
        print_every_letter()
        options = parser().parse_args(arguments)
        return options.run(options)
    except Stopped as stopped:
        print(f"\nStopped: {stopped}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from the last saved step, if one was saved.", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        advice = 'run pip install ".[captions]" in the folder of this project'
        print(f"error: captions and scores need the package {error.name}; {advice}", file=sys.stderr)
        return 1
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
    add_material(tune, "its subfolder transformer")
    tune.add_argument("--steps", type=int, default=1000, help="default: 1000")
    tune.add_argument("--batch-size", type=int, default=4, help="pictures a step and process (default: 4)")
    tune.add_argument("--optimizer", choices=get_args(OptimizerName), default="adamw", help=OPTIMIZER)
    tune.add_argument("--learning-rate", type=float, help="default: 1e-5; prodigy: 1, by which it multiplies its own")
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
    add_choice(tune)
    add_cache(tune)
    tune.add_argument(
        "--shard",
        action="store_true",
        help="with several processes: weights and optimizer in parts, one in each (FSDP), and no sheets",
    )
    tune.set_defaults(run=run_finetune)
    add_lora(commands)
    cache = commands.add_parser(
        "cache", help="encode a folder of pictures with captions, for lora and finetune to read"
    )
    add_material(cache, "it, for --cache of lora and finetune")
    add_choice(cache)
    add_workers(cache)
    cache.set_defaults(run=run_cache)
    add_captions(commands.add_parser("captions", help="write captions beside pictures, or score how well captions fit"))
    return top


def add_material(command: argparse.ArgumentParser, result: str) -> None:
    """Options for the model and the pictures. result: what the work folder will hold it as."""
    command.add_argument("--data", type=Path, required=True, help="pictures, each with a .txt file of its name")
    command.add_argument("--out", type=Path, required=True, help=f"work folder; the result appears in {result}")
    command.add_argument(
        "--model", default="demo", help='"demo", a diffusers folder, or a transformer file (default: demo)'
    )
    command.add_argument("--autoencoder", help='for a transformer alone: file or folder of its DC-AE, or "demo"')
    command.add_argument("--text-encoder", help='for a transformer alone: file or folder of Gemma-2-2b-it, or "demo"')
    command.add_argument("--variant", choices=tuple(VARIANTS), help="for a file that cannot tell 1K from 2K or 4K")


def add_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cache",
        type=Path,
        help="folder of encoded pictures, which trainings share (default: states in the work folder)",
    )


def add_lora(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    lora = commands.add_parser("lora", help="train a LoRA of a SANA transformer on a folder of pictures with captions")
    add_material(lora, "it as lora.safetensors")
    known = vars(LoraConfig()) | vars(AdapterConfig())

    def add(name: str, told: str, **more: object) -> None:
        value = known[name]
        more = more if more else {"type": type(value)}
        shown = "" if value in (None, "", ()) else f" (default: {value})"
        lora.add_argument(f"--{name.replace('_', '-')}", default=value, help=told + shown, **more)

    add("kind", "of adapter", choices=get_args(Kind))
    add("rank", "of the adapter: more learns more and makes a larger file")
    add("alpha", "its strength times the rank (default: the rank)", type=float)
    add("dropout", "share of a layer's inputs that the adapter does not see")
    add("rslora", "strength alpha / sqrt(rank) instead of alpha / rank", action="store_true")
    add("targets", f"layers that get one: {', '.join(TARGETS)}, or a regular expression of whole paths")
    add("train_text_encoder", "its attention, too, by an adapter of the same kind and rank", action="store_true")
    add("start", "a LoRA to go on from, of the same kind, rank and layers", type=Path)
    add("steps", "updates of the adapter")
    add("batch_size", "pictures of a batch and process, all of one size")
    add("accumulate", "batches of a step")
    add("optimizer", OPTIMIZER, choices=get_args(OptimizerName))
    add("learning_rate", "at its highest (default: 1e-4; prodigy: 1, by which it multiplies its own)", type=float)
    add("schedule", "of the learning rate, after the warm-up", choices=get_args(Schedule))
    add("warmup", "steps in which the rate rises (default: a tenth of all, at most 100)", type=int)
    add("clip", "largest norm of the gradient")
    add("ema", "decay of the averaged adapter, which is the result; 0: the last one")
    add("caption_dropout", "share of captions replaced by the empty prompt, for guidance")
    add("recompute", "less memory, a third more work", action="store_true")
    add(
        "dtype",
        "of the frozen weights (default: bfloat16, or float32 on a GPU that does not compute it)",
        choices=DTYPES,
    )
    lora.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        default=[],
        help="to draw on sheets, without and with the adapter; up to six times (default: six captions)",
    )
    add_choice(lora)
    add_cache(lora)
    add("prior", "a second folder, of pictures with captions that show what is to stay as it is", type=Path)
    add("prior_weight", "of their loss")
    add("trigger", "words that call up what was learnt, for the header of the file")
    add("sheet_every", "steps from one sheet to the next, 0: none")
    add("save_every", "steps from one saved state to the next")
    add("seed", "of the first weights, of batches and of noise")
    lora.set_defaults(run=run_lora)


def run_lora(options: argparse.Namespace) -> int:
    adapter = AdapterConfig(**{name: getattr(options, name) for name in vars(AdapterConfig())})
    names = vars(LoraConfig()).keys() - {"adapter", "prompts", "choice"}
    given = {name: getattr(options, name) for name in names}
    config = LoraConfig(adapter=adapter, prompts=tuple(options.prompts), choice=read_choice(options), **given)
    files = ModelFiles(options.model, options.autoencoder, options.text_encoder, options.variant)
    report(train_lora(options.out, options.data, config, files, watch=Watch(stopping=postponed)))
    return 0


def add_choice(command: argparse.ArgumentParser) -> None:
    """What decides between several captions of a picture, as `read_choice` reads it."""
    usual = Choice()
    command.add_argument(
        "--captions",
        choices=("turn", "best", "score"),
        default=usual.way,
        help="where a picture has several: each in turn, the one of the highest score, or by chance, the higher the score "
        f"the more often (default: {usual.way})",
    )
    command.add_argument(
        "--score-threshold",
        type=float,
        default=usual.threshold,
        help=f"with --captions score: what is below is not taken (default: {usual.threshold:g})",
    )
    command.add_argument(
        "--score-temperature",
        type=float,
        default=usual.temperature,
        help=f"with --captions score: the lower, the more often the best is taken (default: {usual.temperature})",
    )


def read_choice(options: argparse.Namespace) -> Choice:
    """Raises ValueError for numbers out of range."""
    return Choice(options.captions, options.score_threshold, options.score_temperature)


def add_captions(command: argparse.ArgumentParser) -> None:
    kinds = command.add_subparsers(required=True, metavar="KIND")
    score = kinds.add_parser("score", help="by CLIP, beside the pictures")
    score.add_argument(
        "--clip", default=CLIP, help=f"folder of a CLIP model of transformers, or its name (default: {CLIP})"
    )
    score.set_defaults(run=run_score)
    write = kinds.add_parser("write", help="by a model that looks at pictures, beside them")
    write.add_argument(
        "--model", required=True, help="folder of an image-text-to-text model of transformers, or its name"
    )
    write.add_argument("--name", help="what these captions are called (default: as the model)")
    write.add_argument("--question", default=QUESTION, help=f"what the model is told (default: {QUESTION!r})")
    write.set_defaults(run=run_write)
    for each in (score, write):
        each.add_argument("--data", type=Path, required=True, help="folder of pictures")
        each.add_argument("--device", default="cpu", help="of the model, such as cuda (default: cpu)")
        each.add_argument("--download", action="store_true", help="fetch the model by its name if it is not here")
        add_workers(each)


def add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=int, metavar="N", help="in N processes of Ray, see docs/scale.md")
    command.add_argument("--cluster", metavar="ADDRESS", help="of a Ray cluster to work on")
    command.add_argument("--devices-per-worker", type=float, default=0, metavar="D", help="GPUs of each (default: 0)")


def read_workers(options: argparse.Namespace) -> Workers | None:
    """None without --workers. Raises ValueError for what cannot be."""
    if options.workers is None:
        if options.cluster or options.devices_per_worker:
            raise ValueError("--cluster and --devices-per-worker are of --workers; give that as well")
        return None
    if PartialState().num_processes > 1:
        raise ValueError("--workers starts processes by itself; give the command without accelerate launch")
    return Workers(options.workers, options.cluster, options.devices_per_worker)


def run_score(options: argparse.Namespace) -> int:
    from .scoring import Scorer, score_captions, score_each

    workers = read_workers(options)
    pictures = picture_files(options.data)
    given = {"device": options.device, "download": options.download}
    if workers:
        captions = read_captions(options.data, pictures)
        things = [(path, (path.absolute(), each)) for path, each in zip(pictures, captions, strict=True)]
        make = partial(score_each, options.clip, **given)
        return on_workers(workers, things, make, "scoring captions", "scores")
    scorer = Scorer(options.clip, **given)
    print(f"{score_captions(options.data, pictures, scorer)} scores written.")
    return 0


def run_write(options: argparse.Namespace) -> int:
    from .captioning import Captioner, write_captions, write_each

    workers = read_workers(options)
    pictures = picture_files(options.data)
    name = options.name or Path(options.model).name
    check_name(name)
    given = {"question": options.question, "device": options.device, "download": options.download}
    if workers:
        make = partial(write_each, name, options.model, **given)
        return on_workers(workers, [(path, path.absolute()) for path in pictures], make, "writing captions", "captions")
    captioner = Captioner(options.model, **given)
    print(f"{write_captions(pictures, name, captioner)} captions written.")
    return 0


def run_cache(options: argparse.Namespace) -> int:
    files = ModelFiles(options.model, options.autoencoder, options.text_encoder, options.variant)
    if workers := read_workers(options):
        with needing_packages():
            from .caching import fill_on_workers
        found = fill_on_workers(options.out, options.data, files, read_choice(options), workers)
        others = found.kept - found.used
        print(f"{options.out}: {found.pictures} pictures, {found.used} states of them and {others} others")
        return 1 if found.failed else 0
    states = fill_cache(options.out, options.data, files, read_choice(options))
    if PartialState().is_main_process:
        used, kept = states.used(), len(states.shards)
        print(f"{options.out}: {len(states)} pictures, {used} states of them and {kept - used} others")
    return 0


def on_workers(
    workers: Workers,
    things: Sequence[tuple[Path, object]],
    make: Callable[[], Callable[[object], int]],
    what: str,
    results: str,
) -> int:
    """Do with each thing what `make()` gives, as `treat_all` does, and say how much it was."""
    with needing_packages():
        from ..cluster.treating import treat_all
    written, failed = treat_all(things, make, workers, what)
    print(f"{written} {results} written.")
    return 1 if failed else 0


def run_finetune(options: argparse.Namespace) -> int:
    options.choice = read_choice(options)
    config = FinetuneConfig(**{name: getattr(options, name) for name in vars(FinetuneConfig())})
    parts = {name: getattr(options, name) for name in ("model", "autoencoder", "text_encoder", "variant")}
    report(finetune(options.out, options.data, config, **parts, watch=Watch(stopping=postponed)))
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
