"""Names and shapes in LoRA files, as data: what trainers call the layers of a SANA transformer. A dialect is an entry here."""

from collections.abc import Iterator

from torch import Tensor

# What stands before the path of a layer: PEFT in diffusers, PEFT alone, and nothing.
DOTTED = ("transformer.", "base_model.model.", "")
# The same where _ stands for every dot: LyCORIS, OneTrainer and kohya.
UNDERSCORED = ("lycoris_", "lora_transformer_", "lora_unet_")
# Ends of the names of what stands between two factors in a Tucker decomposition, which keeps all of its axes.
CORES = (".lora_mid.weight", ".hada_t1", ".hada_t2", ".lokr_t2")


def layer_names(path: str) -> Iterator[str]:
    """What LoRA files call the layer at a path such as "transformer_blocks.0.attn1.to_q", in every dialect."""
    yield from (prefix + path for prefix in DOTTED)
    yield from (prefix + path.replace(".", "_") for prefix in UNDERSCORED)


def with_matrices(lora: dict[str, Tensor], layers: tuple[str, ...]) -> dict[str, Tensor]:
    """A LoRA file in which what changes a 1x1 convolution has two axes, as our weight of it has.

    layers: what the file calls the 1x1 convolutions.
    """
    matrices = {
        name: tensor.flatten(1)
        for name, tensor in lora.items()
        if name.startswith(layers) and not name.endswith(CORES) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
    }
    return {**lora, **matrices}
