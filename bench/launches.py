"""What a GPU would have to do, counted on any machine: python -m bench.launches. Writes results/launches.json in seconds.

Networks of the real sizes run on meta tensors, which have no content. Counted are the kernels that a network launches without a compiler,
and the bytes that they read and write. PyTorch's attention and RMS norm are one kernel each, as on a GPU; views and allocations
are none. The floor is what products and convolutions alone read and write.
`python -m tests.host.steps launches` counts steps inside ComfyUI, too, for the same table.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2Model

from sana.checkpoints.text_encoder import gemma_json
from sana.config import AUTOENCODERS, DOWNSAMPLE, LATENT_CHANNELS, TEXT_TOKENS, VARIANTS
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.transformer import SanaTransformer
from sana.text.gemma import Gemma2, KeysValues
from sana.text.prompt import INSTRUCTION

from .machine import write_result
from .twins import GEMMA_2_2B, WordTokenizer, diffusers_autoencoder, diffusers_transformer

PRODUCTS = {"mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "convolution", "scaled_dot_product_attention"}
ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "_unsafe_view",
}
FUSED = {
    F.scaled_dot_product_attention: "scaled_dot_product_attention",
    F.rms_norm: "rms_norm",
    torch.rms_norm: "rms_norm",
}
STEPS = (
    "sana-0.6b-1024px",
    "sana-1.6b-1024px",
    "sana-1.6b-2048px",
    "sana-1.6b-4096px",
    "sana-1.5-1.6b-1024px",
    "sana-1.5-4.8b-1024px",
    "sana-sprint-0.6b-1024px",
    "sana-sprint-1.6b-1024px",
)
SIDE = 1024  # px, of the DC-AE
AUTOENCODER = "dc-ae-f32c32-sana-1.1"
PROMPT = "prompt of 20 tokens, Gemma-2-2b"
PROMPT_TOKENS = 20


@dataclass
class Counted:
    """Kernels by name, and the bytes that all of them, and the products among them, read and write."""

    kernels: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    product_bytes: int = 0

    @property
    def launches(self) -> int:
        return self.kernels.total()

    def add(self, name: str, given: object, made: object) -> None:
        read, written = tensors(given), tensors(made)
        moved = sum(tensor.nbytes for tensor in read.values()) + sum(tensor.nbytes for tensor in written.values())
        self.kernels[name] += 1
        self.bytes += moved
        self.product_bytes += moved if name in PRODUCTS else 0


def tensors(tree: object) -> dict[int, Tensor]:
    return {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


class _Operations(TorchDispatchMode):
    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted, self.inside = counted, 0  # of kernels that are counted as one

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        named = named or {}
        made = operation(*given, **named)
        name = operation._schema.name.removeprefix("aten::")
        if name == "convolution" and given[0].is_contiguous(memory_format=torch.channels_last):
            made = made.contiguous(memory_format=torch.channels_last)  # as on a GPU, if not on meta
        if not (self.inside or operation.is_view or name in ALLOCATIONS):
            read = (given, {key: value for key, value in named.items() if key != "out"})
            self.counted.add(name, read, given if made is None else made)  # in place, of a list, nothing is returned
        return made


class _Functions(TorchFunctionMode):
    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, function, types, given=(), named=None):
        if function not in FUSED:
            return function(*given, **(named or {}))
        self.operations.inside += 1
        made = function(*given, **(named or {}))
        if function is F.scaled_dot_product_attention:  # heads lie side by side in what its kernels on a GPU give
            made = made.transpose(1, 2).contiguous().transpose(1, 2)
        self.operations.inside -= 1
        if not self.operations.inside:
            self.operations.counted.add(FUSED[function], (given, named), made)
        return made


@contextmanager
def counting() -> Iterator[Counted]:
    """Count what runs inside, without gradients."""
    operations = _Operations(Counted())
    with torch.no_grad(), operations, _Functions(operations):
        yield operations.counted


def meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A network of a reference without content, in bfloat16."""
    with init_empty_weights(include_buffers=True):
        return make().to(torch.bfloat16).eval()


def random(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def our_step(variant: str) -> Counted:
    """One evaluation with guidance, which Sprint has none of, after another: what steps share is there already."""
    row = VARIANTS[variant]
    ours = SanaTransformer(row.transformer, dtype=torch.bfloat16, device="meta").eval()
    x, text = step_inputs(variant)
    embed = torch.empty(1, device="meta") if row.transformer.guidance_embed else None
    with torch.no_grad():
        context, modulation = ours.text_context(text), ours.modulation(torch.empty(1, device="meta"), embed)
        ours.velocity(x, modulation, context, max_bytes=2**62)
    with counting() as counted:
        ours.velocity(x, modulation, context, max_bytes=2**62)
    return counted


def their_step(variant: str) -> Counted:
    config = VARIANTS[variant].transformer
    theirs = meta(lambda: diffusers_transformer(config))
    x, text = step_inputs(variant)
    time = torch.empty(len(x), device="meta")
    others = {"guidance": time} if config.guidance_embed else {}
    mask = random(len(x), TEXT_TOKENS)
    with counting() as counted:
        theirs(x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=time, return_dict=False, **others)
    return counted


def step_inputs(variant: str) -> tuple[Tensor, Tensor]:
    """A latent of the size that the variant was made for, twice for guidance, and a text for each."""
    row = VARIANTS[variant]
    batch, side = 1 if row.transformer.guidance_embed else 2, row.base_size // DOWNSAMPLE
    return random(batch, LATENT_CHANNELS, side, side), random(batch, TEXT_TOKENS, row.transformer.text_width)


def our_pass(what: str) -> Counted:
    """decode or encode."""
    ours = DCAutoencoder(AUTOENCODERS[AUTOENCODER], dtype=torch.bfloat16, device="meta").eval()
    with counting() as counted:
        getattr(ours, what)(pass_input(what))
    return counted


def their_pass(what: str) -> Counted:
    theirs = meta(lambda: diffusers_autoencoder(AUTOENCODERS[AUTOENCODER]))
    with counting() as counted:
        getattr(theirs, what)(pass_input(what), return_dict=False)
    return counted


def pass_input(what: str) -> Tensor:
    return (
        random(1, LATENT_CHANNELS, SIDE // DOWNSAMPLE, SIDE // DOWNSAMPLE)
        if what == "decode"
        else random(1, 3, SIDE, SIDE)
    )


def our_prompt(_: str) -> Counted:
    """A prompt after another one: the instruction's keys and values are there."""
    ours = Gemma2(GEMMA_2_2B, dtype=torch.bfloat16, device="meta").eval()
    shape = 1, GEMMA_2_2B.num_key_value_heads, instruction_tokens(), GEMMA_2_2B.head_dim
    past = [KeysValues(random(*shape), random(*shape)) for _ in ours.layers]
    with counting() as counted:
        ours(numbers(PROMPT_TOKENS), past=past)
    return counted


def their_prompt(_: str) -> Counted:
    """Instruction and prompt, padded, as diffusers' pipeline encodes them."""
    config = Gemma2Config(**gemma_json(GEMMA_2_2B))
    theirs = meta(lambda: Gemma2Model._from_config(config, attn_implementation="eager"))
    tokens = numbers(instruction_tokens() + TEXT_TOKENS - 2)
    with counting() as counted:
        theirs(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return counted


def instruction_tokens() -> int:
    return len(WordTokenizer().encode(INSTRUCTION))


def numbers(count: int) -> Tensor:
    return torch.empty(1, count, dtype=torch.long, device="meta")


def main(in_host: Callable[[str], Counted | None] | None = None) -> None:
    """in_host: counts a step of a variant inside a host, or none; None: there is no host."""
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", action="store_true", help="print how often each of ours is launched")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write (default: the one in results/ that docs/speed.md shows)"
    )
    options = parser.parse_args()
    rows = []
    for name, here, there in (
        *((variant, our_step, their_step) for variant in STEPS),
        *((what, our_pass, their_pass) for what in ("decode", "encode")),
        (PROMPT, our_prompt, their_prompt),
    ):
        ours, theirs = here(name), there(name)
        title = {our_pass: f"{name}, {SIDE} px", our_step: f"step, {name}", our_prompt: name}[here]
        row = {"title": title, "launches": [theirs.launches, ours.launches], "bytes": [theirs.bytes, ours.bytes]}
        hosted = in_host(name) if in_host and here is our_step else None
        row["host"] = None if hosted is None else {"launches": hosted.launches, "bytes": hosted.bytes}
        rows.append({**row, "product_bytes": ours.product_bytes})
        print(rows[-1], *([dict(ours.kernels.most_common())] if options.kernels else []), flush=True)
    print(write_result("launches", {"rows": rows}, options.out))
    if in_host is None:
        print(
            "Steps inside ComfyUI are left out: python -m tests.host.steps launches counts them, after python3 tests."
        )


if __name__ == "__main__":
    main()
