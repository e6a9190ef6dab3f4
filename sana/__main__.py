"""The shell: python -m sana generate PROMPT, and likewise enhance PROMPT, info PATH, convert SRC DST."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from .capturing import check_fast
from .checkpoints.files import read_tensors
from .checkpoints.inspection import describe_file
from .checkpoints.lora import lora_files, read_strength
from .checkpoints.quantising import quantise
from .checkpoints.transformer import find_transformer
from .checkpoints.writing import convert
from .cluster import needing_packages
from .config import DOWNSAMPLE
from .images import read_picture
from .infotext import infotext, shown_files
from .interruption import INTERRUPTED, begin
from .jobs import (
    ENHANCED_FROM,
    Job,
    Record,
    check_free,
    fingerprint,
    free_names,
    missing_jobs,
    names,
    read_prompts,
    write_png,
)
from .loading import load_writer, model_path
from .networks.devices import checked_device
from .options import parser
from .pipeline import SanaPipeline, check_control
from .plan import Plan, Settings, make_plan
from .printing import print_every_letter
from .sampling.solvers import Step
from .saving import remove_leftovers
from .text.enhancement import enhance
from .text.generation import Sampling
from .text.prompt import INSTRUCTION

UNNAMED = Path("sana.png")  # without --out
PICTURES = ("image", "mask", "control_image")  # options that are files of pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code."""
    try:
        begin()
        print_every_letter()
        logging.basicConfig(format="%(message)s")
        options = parser().parse_args(arguments)
        return COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("\nStopped; finished pictures are kept.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run_generate(options: argparse.Namespace) -> int:
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; at least 1 is needed")
    if options.workers is not None:
        return run_cluster(options)
    if options.cluster or options.devices_per_worker or options.retry_failed or options.format != "png":
        options_of = "--cluster, --devices-per-worker, --format and --retry-failed"
        raise ValueError(f"{options_of} are of --workers; give that as well")
    options.device = checked_device(options.device)
    out = Path(options.out) if options.out else UNNAMED
    check_output(out)
    remove_leftovers(out.parent)
    jobs = read_jobs(options)
    pictures = sum(job.batch_size for job in jobs)
    settings = read_settings(options)
    check_control(settings, options.control is not None)
    if options.out and not (options.resume or options.overwrite):
        check_free(out, pictures)
    loras = [read_strength(text) for text in options.lora]
    files: Record = {"files": fingerprint(*asked_files(options, loras))}
    if loras:
        files = {**files, "loras": [f"{path.name}={strength:g}" for path, strength in loras]}
    if options.resume:
        jobs = list(missing_jobs(jobs, out, {**common_record(options, settings), **files}, options.enhance))
    if not jobs:
        print("Every picture exists already.")
        return 0
    paths = names(out, pictures > 1) if options.overwrite else free_names(out, pictures > 1)
    pipeline = SanaPipeline.load(**read_model(options), loras=loras)
    shown = shown_files(options.model, loras)
    with tqdm(total=len(jobs) * pipeline.plan("", settings).step_count, unit="step") as bar:

        def show(plan: Plan, step: Step) -> None:
            bar.set_description(plan.prompts[0][:40], refresh=False)
            bar.update()

        plans = (plan_job(pipeline, job, settings, options.enhance, bar) for job in jobs)
        for job, (plan, pictures) in zip(jobs, pipeline.draw(plans, show), strict=True):
            given = {ENHANCED_FROM: job.prompt} if options.enhance else {}
            for k, picture in enumerate(pictures):
                path = next(paths)
                parameters = infotext(plan, k, pipeline.identity, shown)
                write_png(picture, path, {**plan.record(k), **files, **given}, parameters)
                bar.write(str(path))
    return 0


def run_cluster(options: argparse.Namespace) -> int:
    """A file of prompts on several workers."""
    with needing_packages():
        from .cluster.command import generate
        from .cluster.drawing import Run
        from .cluster.workers import Workers
    if options.prompts is None or not options.out:
        raise ValueError("--workers draws a file of prompts into a folder; give --prompts FILE and --out FOLDER")
    if options.enhance:
        raise ValueError("--workers draws prompts as they stand; write better ones to a file by `sana enhance` first")
    if options.overwrite:
        raise ValueError(
            "--workers goes on in its folder and overwrites nothing; give another --out, or delete that one"
        )
    workers = Workers(options.workers, options.cluster, options.devices_per_worker)
    options.device = options.device or ("cuda" if workers.devices else "cpu")
    settings = read_settings(options)
    check_control(settings, options.control is not None)
    common_record(options, settings)  # refuses what no row could be drawn with
    paths = {name: str(getattr(options, name)) for name in PICTURES if name in settings.changed}
    read = partial(fingerprint, *asked_files(options, [read_strength(text) for text in options.lora]))
    run = Run(
        out=options.out if "://" in options.out else os.path.abspath(options.out),
        model=read_model(options),
        lora=";".join(options.lora) or None,
        settings={**settings.changed, **paths},
        files=read(),
        read=read,
        form=options.format,
    )
    failed = generate(options.prompts, run, workers, batch_size=options.batch_size, retry=options.retry_failed)
    return 1 if failed else 0


def read_model(options: argparse.Namespace) -> dict[str, object]:
    """The arguments of `SanaPipeline.load`, but for LoRAs. Raises ValueError as `check_fast`."""
    same = ("model", "autoencoder", "text_encoder", "variant", "device", "control", "offload")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.fast:
        check_fast(torch.device(options.device), options.compile)  # here, before workers find out
    how = {"dtype": dtype, "compiled": options.compile, "fast": options.fast, "in_int8": options.in_int8}
    return {**{name: getattr(options, name) for name in same}, **how}


def plan_job(pipeline: SanaPipeline, job: Job, settings: Settings, enhanced: bool, bar: tqdm) -> Plan:
    """The plan of a job. enhanced: of better prompts, written with the seed of each picture, which are shown above a bar."""
    prompts = [job.prompt] * job.batch_size
    if enhanced:
        instruction = settings.instruction or INSTRUCTION
        prompts = [
            pipeline.enhance(prompt, instruction=instruction, seed=job.seed + k) for k, prompt in enumerate(prompts)
        ]
        for prompt in prompts:
            bar.write(prompt, file=sys.stderr)
    return pipeline.plan(prompts, replace(settings, seed=job.seed))


def run_enhance(options: argparse.Namespace) -> int:
    device = checked_device(options.device)
    prompts = read_asked(options)
    sampling = Sampling(**{field.name: getattr(options, field.name) for field in fields(Sampling)})
    encoder = load_writer(
        options.text_encoder or options.model,
        getattr(torch, options.dtype) if options.dtype else None,
        torch.device(device),
        [read_strength(text) for text in options.lora],
    )
    for prompt in prompts:
        for piece in enhance(encoder, prompt, options.instruction, sampling, turns=not options.raw):
            print(piece, end="", flush=True)
        print()
    return 0


def read_jobs(options: argparse.Namespace) -> list[Job]:
    """Everything that is asked for. Raises ValueError unless that is one prompt or one file of prompts."""
    return [Job(prompt, options.seed, options.batch_size) for prompt in read_asked(options)]


def read_asked(options: argparse.Namespace) -> list[str]:
    """The prompts. Raises ValueError unless there is either one or one file of them."""
    if (options.prompt is None) == (options.prompts is None):
        raise ValueError("give either a prompt or --prompts FILE")
    return read_prompts(options.prompts) if options.prompts else [options.prompt]


def asked_files(options: argparse.Namespace, loras: Sequence[tuple[Path, float]]) -> tuple[dict[str, Path], list[Path]]:
    """The networks, and the LoRAs and pictures that are given, for `fingerprint`."""
    models = {
        "transformer": model_path(options.model),
        "vae": model_path(options.autoencoder or options.model),
        "text_encoder": model_path(options.text_encoder or options.model),
    }
    if options.control:
        models["controlnet"] = options.control
    pictures = [path for path in (options.image, options.mask, options.control_image) if path]
    return models, [*pictures, *(file for path, _ in loras for file in lora_files(path))]


def common_record(options: argparse.Namespace, settings: Settings) -> Record:
    """What the records of all pictures share, read from the transformer's file without loading it."""
    found = find_transformer(read_tensors(model_path(options.model), "transformer"), options.variant)
    return make_plan([""], settings, found.identity, DOWNSAMPLE).record()


def read_settings(options: argparse.Namespace) -> Settings:
    """The options that are settings, by their names. Raises ValueError as `Settings` and `read_picture` do."""
    names = {field.name for field in fields(Settings)}
    given = {name: value for name, value in vars(options).items() if name in names}
    given["guidance_interval"] = tuple(options.guidance_interval)
    given["instruction"] = options.instruction or None
    given.update((name, read_picture(given[name])) for name in PICTURES if given[name])
    return Settings(**given)


def check_output(path: Path) -> None:
    """Raises ValueError for an output that could not be written, before anything is computed."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out is {path}; give the name of a PNG file, such as {path.with_suffix('.png')}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {path} cannot be written; give a file in a folder that exists and is yours to write")


def run_info(options: argparse.Namespace) -> int:
    print(describe_file(model_path(options.path), options.model and model_path(options.model)))
    return 0


def run_convert(options: argparse.Namespace) -> int:
    if options.quantize_all and not options.quantize:
        raise ValueError("--quantize-all is given without --quantize; say which format, such as --quantize fp8")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.quantize and options.lora:
        raise ValueError("--quantize is given with --lora; merge the LoRA first, and quantise the merged file")
    merge = partial(convert, loras=[read_strength(text) for text in options.lora])
    write = partial(quantise, form=options.quantize, ends=options.quantize_all) if options.quantize else merge
    print(write(model_path(options.source), options.target, dtype=dtype, variant=options.variant))
    return 0


COMMANDS = {"generate": run_generate, "enhance": run_enhance, "info": run_info, "convert": run_convert}

if __name__ == "__main__":
    sys.exit(main())
