"""A training in the place of a run of the host: on what it has loaded, with its progress bar, its previews and its Stop.

The room for training in `sana/` needs packages that the host does not install, so this module is imported by the node that
trains, when it runs.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

import comfy.lora
import comfy.model_management as management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from PIL import Image
from torch import Tensor

from ...sana.checkpoints.files import TensorFile
from ...sana.checkpoints.filling import fill
from ...sana.checkpoints.formats import COMFY_LAYER
from ...sana.checkpoints.header import transformer_header
from ...sana.checkpoints.text_encoder import check_text_encoder
from ...sana.checkpoints.transformer import FoundTransformer, build_transformer, find_transformer
from ...sana.networks.autoencoder import DCAutoencoder
from ...sana.pipeline import SanaPipeline
from ...sana.training.digests import fingerprint
from ...sana.training.loop import Stopped, Watch
from ...sana.training.lora import LoraConfig, train_lora
from ...sana.training.pictures import TextEncoder
from ...sana.training.sheets import SIDE
from .clip import check_clip
from .model import SanaModel
from .vae import SanaVAE

PREFIX = "diffusion_model."  # of the transformer among the tensors of a MODEL
SHOWN = 16  # digits of what tells a MODEL, which a message may show


class HostSource:
    """A MODEL, a CLIP and a VAE of ours as `gathered` takes a model. See `sana.training.material.Source`.

    The weights are copied, with the LoRAs that the MODEL has: what the host holds is of no use to autograd, since it was
    loaded in inference mode, and stays as it is. Raises ValueError for parts of other models, and CheckpointError for a CLIP
    whose texts are not as wide as the MODEL takes them.
    """

    def __init__(self, model: ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> None:
        if not isinstance(model.model, SanaModel):
            kind = type(model.model).__name__
            raise ValueError(
                f"this MODEL is a {kind} and no SANA; connect the MODEL of Load SANA, or use core Train LoRA"
            )
        check_clip(clip)
        if not isinstance(vae, SanaVAE):
            raise ValueError("this VAE is no DC-AE; connect the VAE of Load SANA or Load DC-AE")
        check_text_encoder(clip.cond_stage_model.encoder.model.config, model.model.identity.config, "the CLIP")
        self.model, self.clip, self.vae = model, clip, vae
        management.unload_all_models()  # the weights as they were loaded, and room for the training
        self.tensors = weights(model)

    def find(self) -> FoundTransformer:
        name = Path(self.model.model.model_config.file_name)
        return find_transformer(TensorFile(name, self.tensors, transformer_header(self.model.model.identity)))

    def told(self) -> dict[str, str]:
        return {"weights": fingerprint(self.tensors).hex()[:SHOWN]}

    def load(self, dtype: torch.dtype) -> SanaPipeline:
        config, tensors = self.vae.config, self.vae.first_stage_model.state_dict()
        autoencoder = fill(DCAutoencoder(config, dtype=dtype, device="meta"), tensors, "the VAE", dtype, "cpu")
        found = self.find()
        return SanaPipeline(build_transformer(found, dtype), autoencoder, None, found.identity)

    def texts(self, pipeline: SanaPipeline) -> bytes:
        clip = self.clip.patcher
        return fingerprint(clip.model_state_dict()) + fingerprint(changes(clip))

    @contextmanager
    def reading(self, pipeline: SanaPipeline, device: torch.device) -> Iterator[TextEncoder]:
        """The host moves its text encoder as for every CLIP."""
        yield self.encode
        management.unload_all_models()
        management.soft_empty_cache()

    def encode(self, prompts: Sequence[str], instruction: str | None) -> tuple[Tensor, Tensor]:
        """As `GemmaTextEncoder`. The Stop button ends it before the next text."""
        management.throw_exception_if_processing_interrupted()
        with torch.inference_mode():
            tokens = [self.clip.tokenize(prompt, instruction=instruction) for prompt in prompts]
            found = [self.clip.encode_from_tokens(each, return_dict=True) for each in tokens]
        texts, masks = ([part[name].clone() for part in found] for name in ("cond", "attention_mask"))
        return torch.cat(texts), torch.cat(masks) > 0


def weights(model: ModelPatcher) -> dict[str, Tensor]:
    """The tensors of the transformer of a MODEL that is on no device, in our names, with what its LoRAs make of them.

    Quantised ones stay so, with their scales, but for those that a LoRA changes.
    """
    found = model.model_state_dict(PREFIX)
    for key in [key for key in model.patches if key in found]:
        weight = comfy.utils.get_attr(model.model, key)
        plain = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        layer = key.removesuffix(".weight")
        if f"{layer}{COMFY_LAYER}" in found:
            for name in [name for name in found if name.startswith(f"{layer}.") and not name.endswith(".bias")]:
                del found[name]
        plain = plain.to("cpu", torch.float32, copy=True)
        found[key] = comfy.lora.calculate_weight(model.patches[key], plain, key)
    return {key.removeprefix(PREFIX): tensor for key, tensor in found.items()}


def changes(patcher: ModelPatcher) -> dict[str, Tensor]:
    """The tensors of the LoRAs that a MODEL or CLIP has, under names that tell their strengths."""
    found = {}
    for key, patches in patcher.patches.items():
        for i, (strength, change, *_) in enumerate(patches):
            parts = getattr(change, "weights", change)
            tensors = [part for part in (parts[1] if isinstance(parts[0], str) else parts) if isinstance(part, Tensor)]
            found |= {f"{key} {i} {strength} {k}": tensor for k, tensor in enumerate(tensors)}
    return found


def filled(sheet: Image.Image) -> Image.Image:
    """The columns of a sheet that have pictures in them."""
    _, _, right, _ = sheet.getbbox() or (0, 0, *sheet.size)
    return sheet.crop((0, 0, math.ceil(right / SIDE) * SIDE, sheet.height))


class Onlooker:
    """The node that trains: its progress bar with the drawings, and the Stop button, which these would else act on at once."""

    def __init__(self, steps: int) -> None:
        self.bar = comfy.utils.ProgressBar(steps)
        self.steps, self.stopped = steps, False

    def show(self, step: int, sheet: Image.Image | None = None) -> None:
        """The host raises what ends a node from its progress bar, in the middle of a step, which would then be lost."""
        try:
            self.bar.update_absolute(step, self.steps, sheet and ("JPEG", filled(sheet), None))
        except management.InterruptProcessingException:
            self.stopped = True

    def watch(self) -> Watch:
        stopping = nullcontext(lambda: self.stopped or management.processing_interrupted())
        return Watch(step=lambda report: self.show(report.step), sheet=self.show, stopping=lambda: stopping)


def train(folder: Path, data: Path, config: LoraConfig, source: HostSource) -> bool:
    """`train_lora` as a node runs it: outside of inference mode, seen on the node, and stopped by the host's Stop.

    Returns whether it was left alone; if not, what it has learnt is saved, and the node is to `end`. Raises as `train_lora`.
    """
    onlooker = Onlooker(config.steps)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            train_lora(folder, data, config, source, watch=onlooker.watch())
        return not onlooker.stopped
    except Stopped:
        return False
    finally:
        gc.collect()  # an adapter and its layers know each other
        management.soft_empty_cache()


def end() -> NoReturn:
    """Ends a node as the Stop button does."""
    management.interrupt_current_processing(False)
    raise management.InterruptProcessingException


def with_lora(model: ModelPatcher, path: Path) -> tuple[ModelPatcher, dict[str, Tensor]]:
    """The MODEL with a LoRA file at full strength, by the host's own loader, and the LoRA as a LORA_MODEL."""
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    changed, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    return changed, tensors
