"""What quantising costs: python -m bench.quantised. Writes results/quantised.json.

The demo model is drawn from files that `sana convert --quantize` has written, transformer and text encoder in one format. Layers at
the widths of the released models have random weights, since no released ones are at hand.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sana.checkpoints.header import transformer_header
from sana.checkpoints.quantising import PACKED_FORMATS, quantise
from sana.checkpoints.text_encoder import load_text_encoder
from sana.checkpoints.transformer import load_transformer
from sana.config import VARIANTS, GemmaConfig, TransformerIdentity
from sana.loading import MODELS
from sana.networks.packed_layers import HAS_INT8_PRODUCTS
from sana.networks.transformer import SanaTransformer
from sana.offloading import weight_bytes
from sana.pipeline import SanaPipeline
from sana.plan import DEFAULT_STEPS, Settings
from sana.text.gemma import Gemma2
from sana.training.scenes import CaptionedScene, held_out_scenes

from .demo import judgements, latents, share_right
from .machine import write_result

WIDTHS = ("sana-0.6b-1024px", "sana-1.6b-1024px")
RELEASED = (*WIDTHS, "sana-1.5-4.8b-1024px")
# A layer of each kind, by its name in a network of one block.
KINDS = {
    "attention": "transformer_blocks.0.attn1.to_q",
    "keys of a text": "transformer_blocks.0.attn2.to_k",
    "1x1 convolution into the Mix-FFN": "transformer_blocks.0.ff.conv_inverted",
    "1x1 convolution out of it": "transformer_blocks.0.ff.conv_point",
    "caption projection": "caption_projection.linear_1",
    "modulation": "time_embed.linear",
}
# Of a number, with its part of the scales of blocks.
BITS = {"fp8": 8, "int8": 8, "mxfp8": 8 + 8 / 32, "nvfp4": 4 + 8 / 16}
TOKENS = 256


def demo_rows(
    folder: Path, items: Sequence[CaptionedScene], few: int, steps: int = DEFAULT_STEPS
) -> Iterator[dict[str, object]]:
    """The demo unquantised, in each format, in int8 multiplied in 8 bits, and in each format with its ends packed too; of the last no
    accuracy. few: captions for errors."""
    plain, whole = SanaPipeline.load("demo"), Settings(steps=steps)
    one, last = (latents(plain, items[:few], settings) for settings in (Settings(steps=1), whole))
    texts = plain.text_encoder([item.caption for item in items[:few]])[0]
    files = [MODELS["demo"] / part for part in ("transformer", "text_encoder")]
    yield {"format": "unquantised", "ends": False, **sizes(*files), **accuracy(plain, items, whole)}
    for ends in (False, True):
        for form in PACKED_FORMATS:
            files = [folder / f"{part}-{form}-{ends}.safetensors" for part in ("transformer", "text_encoder")]
            for part, target in zip(("", "text_encoder"), files, strict=True):
                quantise(MODELS["demo"] / part, target, form, ends=ends)
            for in_int8 in [False, True] if form == "int8" and not ends and HAS_INT8_PRODUCTS else [False]:
                packed = SanaPipeline.load(files[0], autoencoder="demo", text_encoder=files[1], in_int8=in_int8)
                errors = {
                    "text_error": relative(packed.text_encoder([item.caption for item in items[:few]])[0], texts),
                    "step_error": mean_error(latents(packed, items[:few], Settings(steps=1)), one),
                    "latent_error": mean_error(latents(packed, items[:few], whole), last),
                }
                right = {} if ends else accuracy(packed, items, whole)
                yield {"format": form, "ends": ends, "in_int8": in_int8, **sizes(*files), **errors, **right}


def sizes(transformer: Path, text_encoder: Path) -> dict[str, int]:
    """Bytes of the files, and of the networks in memory with what is not packed in 16 bits."""
    networks = load_transformer(transformer, torch.float16), load_text_encoder(text_encoder, torch.bfloat16).model
    paths = [
        path
        for part in (transformer, text_encoder)
        for path in ([part] if part.is_file() else part.glob("*.safetensors"))
    ]
    return {"disk": sum(path.stat().st_size for path in paths), "memory": sum(map(weight_bytes, networks))}


def accuracy(pipeline: SanaPipeline, items: Sequence[CaptionedScene], settings: Settings) -> dict[str, float]:
    return {"right": share_right(judgements(pipeline, items, latents(pipeline, items, settings)))["everything"]}


def mean_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return sum(relative(x, y) for x, y in zip(found, expected, strict=True)) / len(expected)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def layer_rows(folder: Path, variant: str) -> Iterator[dict[str, object]]:
    """Error of what each kind of layer gives, for normal weights and inputs, in a network of one block with all matrices packed."""
    row = VARIANTS[variant]
    config = replace(row.transformer, depth=1)
    plain = normal(SanaTransformer(config))
    identity = TransformerIdentity(config, "custom", row.base_size, row.flow_shift, row.dtype, "bench")
    save_file(plain.state_dict(), source := folder / f"{variant}.safetensors", transformer_header(identity))
    for form in PACKED_FORMATS:
        quantise(source, target := folder / f"{variant}-{form}.safetensors", form, ends=True, dtype=torch.float32)
        packed = load_transformer(target)
        for kind, name in KINDS.items():
            layer = plain.get_submodule(name)
            x = torch.randn(TOKENS, layer.in_features, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                error = relative(packed.get_submodule(name)(x), layer(x))
            width = f"{layer.in_features} to {layer.out_features}"
            yield {"variant": variant, "kind": kind, "width": width, "format": form, "error": error}


@torch.no_grad()
def normal(network: nn.Module) -> nn.Module:
    """Weights from a normal distribution, as trained ones mostly are, and no biases."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.zero_()
    return network.eval()


def released_rows() -> Iterator[dict[str, object]]:
    """Bytes of the released models in each format, counted and not written."""
    networks = {name: SanaTransformer(VARIANTS[name].transformer, device="meta") for name in RELEASED}
    for name, network in {**networks, "Gemma-2-2b-it": Gemma2(GemmaConfig(), device="meta")}.items():
        tensors = network.state_dict()
        in_blocks = re.compile(r"(transformer_blocks|layers)\..*\.weight")
        packed = sum(tensor.numel() for key, tensor in tensors.items() if tensor.ndim == 2 and in_blocks.fullmatch(key))
        rest = sum(tensor.numel() for tensor in tensors.values()) - packed
        counted = {form: round(packed * bits / 8 + 2 * rest) for form, bits in BITS.items()}
        yield {"model": name, "plain": 2 * (packed + rest), **counted}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quantised", description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=300, help="for the accuracy (default: %(default)s)")
    parser.add_argument("--error-captions", type=int, default=20, help="for the errors (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write (default: the one in results/ that docs/quantised.md shows)"
    )
    options = parser.parse_args()
    items = held_out_scenes(options.captions, seed=0)
    result = {"captions": len(items), "error_captions": options.error_captions, "demo": [], "layers": []}
    result["released"] = [*released_rows()]
    with TemporaryDirectory() as folder:
        for variant in WIDTHS:
            for row in layer_rows(Path(folder), variant):
                result["layers"].append(row)
                print(row, flush=True)
        for row in demo_rows(Path(folder), items, options.error_captions):
            result["demo"].append(row)
            print(row, flush=True)
    print(write_result("quantised", result, options.out), "(python -m bench.tables writes its tables)", sep="\n")


if __name__ == "__main__":
    main()
