"""What a file says of itself to programs that list models, in a safetensors header: the keys of modelspec.

Source: github.com/Stability-AI/ModelSpec, 1.0.0. Architectures are called as OneTrainer calls them, sana and sana/lora, and the
other parts of a model in the same way.
"""

from ..config import TransformerIdentity

IMPLEMENTATION = "https://github.com/NVlabs/Sana"
TRANSFORMER, LORA, AUTOENCODER, TEXT_ENCODER = "sana", "sana/lora", "sana/vae", "sana/text-encoder"


def modelspec(architecture: str, title: str, **more: str) -> dict[str, str]:
    """Entries for a header. more: other keys of modelspec, such as `resolution`; empty ones are left out."""
    told = {
        "sai_model_spec": "1.0.0",
        "architecture": architecture,
        "implementation": IMPLEMENTATION,
        "title": title,
        **more,
    }
    return {f"modelspec.{key}": value for key, value in told.items() if value}


def transformer_modelspec(identity: TransformerIdentity) -> dict[str, str]:
    return modelspec(TRANSFORMER, identity.variant, resolution=square(identity.base_size))


def square(side: int) -> str:
    """A resolution as modelspec writes it. side: px."""
    return f"{side}x{side}"
