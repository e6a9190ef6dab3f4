"""Steps inside the real ComfyUI beside the shell's: .venv/tests/bin/python -m tests.host.steps BENCHMARK, after python3 tests.

Runs a benchmark, which without a host leaves them out, with the newest host in its process: launches or program.
A step begins where the host's sampler calls the model, and ends with what the model gives the sampler; attention is PyTorch's,
as ComfyUI chooses on an NVIDIA GPU.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from bench import launches, program
from bench.cases import call
from bench.race import Call
from sana.config import TransformerConfig
from tests.host.boot import ON_CPU, Host, boot
from tests.host.hosts import NEWEST, host_folder

IN_BANDS = ("sana-1.6b-4096px",)  # larger than the memory that the host's path takes, and so more and smaller kernels


def host_model(host: Host, config: TransformerConfig, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The model that the host samples, as it builds one from a file, its weights not filled."""
    module = host.pack("nodes.host.model")
    identity = host.pack("sana.config").TransformerIdentity(
        config, "custom", 1024, None if config.guidance_embed else 3.0, str(dtype).removeprefix("torch."), "a benchmark"
    )
    configured = module.SanaConfig({"image_model": module.IMAGE_MODEL, "identity": identity})
    configured.set_inference_dtype(dtype, None)
    return configured.get_model({}, device=torch.device(device))


def host_step(host: Host, model: torch.nn.Module, x: Tensor, text: Tensor) -> Callable[[], Tensor]:
    """One call of the model as each step of the host's samplers makes it, with guidance if x (B, 32, H, W) is of two samples.

    text: (B, L, text_width), of which all tokens count. Its keys and values are there after the first call.
    """
    run = host.pack("nodes.host.run")
    x, sides = x.float(), list(range(len(x)))
    sigma = torch.full((1,), program.SIGMA, device=x.device)
    options = {run.RUN: run.SamplingRun({}), "sigmas": sigma, "cond_or_uncond": sides, "uuids": sides}
    attention = importlib.import_module("comfy.ldm.modules.attention").attention_pytorch
    options["optimized_attention_override"] = lambda chosen, *given, **named: attention(*given, **named)
    context = model.diffusion_model.text_context(text)
    options[run.RUN].context = lambda key, make: context  # of meta tensors no mask can be read
    given = {"c_crossattn": text, "attention_mask": torch.ones(text.shape[:2], device=text.device)}
    return lambda: model.apply_model(x, sigma.expand(len(x)), transformer_options=options, **given)


@torch.inference_mode(False)  # in which a layer is one operation and not the kernels that it is made of
def counted_step(host: Host, variant: str) -> launches.Counted | None:
    """As `launches.our_step`, by the host; None: in bands, see `IN_BANDS`."""
    if variant in IN_BANDS:
        return None
    config = host.pack("sana.config").VARIANTS[variant].transformer
    step = host_step(host, host_model(host, config, torch.bfloat16, "meta"), *launches.step_inputs(variant))
    with launches.counting() as counted:
        step()
    return counted


def timed_step(host: Host, step: program.Step) -> Call:
    """As `program.candidates`, by the host. What its model gives is turned into a velocity, by two operations more."""
    model = host_model(host, step.network.config, step.x.dtype, "cpu")
    model.diffusion_model.load_state_dict(step.network.state_dict(), strict=True, assign=True)
    x, run = step.x.float(), call(host_step(host, model, step.x, step.text))
    run()  # the keys and values of the text
    return lambda: (x - run()) / program.SIGMA


def main() -> int:
    if sys.argv[1:2] not in (["launches"], ["program"]):
        print("python -m tests.host.steps needs the name of a benchmark: launches or program", file=sys.stderr)
        return 2
    name = sys.argv.pop(1)
    if not host_folder(NEWEST).is_dir():
        print(f"ComfyUI {NEWEST} is not there; python3 tests fetches it", file=sys.stderr)
        return 2
    with TemporaryDirectory() as folder:
        host = boot(NEWEST, Path(folder, "host"), *ON_CPU)
        if name == "launches":
            launches.main(partial(counted_step, host))
        else:
            program.main(partial(timed_step, host))
    return 0


if __name__ == "__main__":
    sys.exit(main())
