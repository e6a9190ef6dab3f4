"""The memory model: what each phase of drawing a plan takes on a device, told from the networks without running them.

Working memory comes from the networks' own functions, which tests and `python -m bench.memory` compare with measured peaks.
Not in it: what libraries take for themselves, and gaps between allocations.
"""

import torch

from .config import TEXT_TOKENS
from .networks.autoencoder import DCAutoencoder
from .networks.autoencoder_layers import Decoder, Encoder
from .networks.controlnet import SanaControlNet
from .networks.packed_layers import unpacking_bytes
from .networks.streaming import check_bound, least_bytes, whole_bytes
from .networks.transformer import WORKING_BYTES, SanaTransformer
from .offloading import Need
from .plan import Plan
from .text.text_encoder import CONTEXT, PART, GemmaTextEncoder

TEXT_ENCODER, ENCODER, TRANSFORMER = "text encoder", "encoder", "transformer"  # names of parts
CONTROLNET, DECODER = "ControlNet", "decoder"
LATENTS = 8  # in float32, that guidance and a solver hold at once at most
PIXEL_BYTES = 3 * torch.float32.itemsize  # of a picture that is decoded or to be encoded


def needs(
    plan: Plan,
    transformer: SanaTransformer,
    autoencoder: DCAutoencoder,
    text_encoder: GemmaTextEncoder | None,
    controlnet: SanaControlNet | None = None,
) -> dict[str, Need]:
    """What drawing a plan takes, by phase, in their order. text_encoder: None where texts are encoded already."""
    found = {}
    if text_encoder is not None:
        found["encoding the prompt"] = prompt_need(plan, text_encoder)
    if plan.settings.image is not None or plan.settings.control_image is not None:
        found["encoding the picture"] = encoding_need(autoencoder, plan.size, plan.settings.max_bytes)
    latent = latent_shape(plan, autoencoder)
    found["sampling"] = sampling_need(plan, latent, transformer, controlnet)
    found["decoding"] = decoding_need(autoencoder, latent, plan.settings.max_bytes)
    return found


def check_bounds(plan: Plan, autoencoder: DCAutoencoder) -> None:
    """Raises ValueError if max_bytes is too little for pictures of this size."""
    max_bytes, dtype = plan.settings.max_bytes, autoencoder.dtype
    if max_bytes is None:
        return
    check_bound(autoencoder.decoder, torch.Size((1, *latent_shape(plan, autoencoder)[1:])), dtype, max_bytes)
    if plan.settings.image is not None or plan.settings.control_image is not None:
        check_bound(autoencoder.encoder, torch.Size((1, 3, *plan.size)), dtype, max_bytes)


def latent_shape(plan: Plan, autoencoder: DCAutoencoder) -> torch.Size:
    """(B, C, H, W)."""
    config = autoencoder.config
    return torch.Size((len(plan.seeds), config.latent_channels, *(side // config.downsample for side in plan.size)))


def prompt_need(plan: Plan, text_encoder: GemmaTextEncoder) -> Need:
    """Of the instruction alone, of all prompts after it, and of the negative prompt: the largest."""
    model, itemsize = text_encoder.model, text_encoder.dtype.itemsize
    prefix = len(text_encoder.tokenizer.encode(plan.instruction)) if plan.instruction else 0
    batch = len(set(plan.texts))
    runs = [_last_part(prefix), (batch, TEXT_TOKENS, prefix), (1, TEXT_TOKENS, 0)]
    kept = 2 * (batch + 1) * TEXT_TOKENS * model.config.hidden_size * itemsize  # states, before and after they are cut
    working = max(model.activation_bytes(*run, itemsize) for run in runs) + kept
    working += unpacking_bytes(model.layers, itemsize)  # of the embedding a few rows are
    return Need((TEXT_ENCODER,), working, working)


def writing_need(text_encoder: GemmaTextEncoder, text: str, max_tokens: int) -> Need:
    """Of writing so many tokens at most after a text. Logits are where the embedding is, which stays on the CPU."""
    working = writing_bytes(text_encoder, len(text_encoder.tokenizer.encode(text)), max_tokens)
    return Need((TEXT_ENCODER,), working, working)


def writing_bytes(text_encoder: GemmaTextEncoder, read: int, max_tokens: int) -> int:
    """What writing so many tokens at most after so many that are read takes beside the weights."""
    model, itemsize = text_encoder.model, text_encoder.dtype.itemsize
    runs = [_last_part(read), (1, 1, min(CONTEXT, read + max_tokens))]  # and the last token
    return max(model.activation_bytes(*run, itemsize) for run in runs) + unpacking_bytes(model.layers, itemsize)


def _last_part(tokens: int) -> tuple[int, int, int]:
    """Of so many tokens that are read in parts the last one, which takes the most, as `Gemma2.activation_bytes` has it."""
    part = min(PART, tokens)
    return 1, part, tokens - part


def sampling_need(
    plan: Plan, latent: torch.Size, transformer: SanaTransformer, controlnet: SanaControlNet | None = None
) -> Need:
    """Of a step with the texts and the latents that are there meanwhile. latent: (B, C, H, W)."""
    config, itemsize, batch = transformer.config, transformer.dtype.itemsize, latent[0]
    evaluated = batch if config.guidance_embed or plan.guidance.scale == 1 else 2 * batch  # at once
    shape = torch.Size((evaluated, *latent[1:]))
    activations = transformer.activation_bytes(shape, itemsize, WORKING_BYTES)
    unpacking, blocks = unpacking_bytes(transformer, itemsize), config.depth
    if controlnet is not None:
        activations = max(activations, controlnet.activation_bytes(shape, itemsize))
        activations += controlnet.correction_bytes(shape, itemsize)
        unpacking = max(unpacking, unpacking_bytes(controlnet, itemsize))
        blocks += len(controlnet.controlnet_blocks)
    # With the negative prompt, and without it where it does not act.
    texts = (evaluated + batch) * TEXT_TOKENS * itemsize
    texts *= 2 * blocks * config.hidden_size + 2 * config.text_width  # keys and values of every block, and the states
    latents = LATENTS * shape.numel() * torch.float32.itemsize
    working = activations + texts + latents + unpacking
    return Need((TRANSFORMER,) if controlnet is None else (TRANSFORMER, CONTROLNET), working, working)


def encoding_need(autoencoder: DCAutoencoder, size: tuple[int, int], max_bytes: int | None) -> Need:
    """Of encoding a picture of this height and width, px."""
    return _pixel_need(ENCODER, autoencoder.encoder, torch.Size((1, 3, *size)), size, autoencoder.dtype, max_bytes)


def decoding_need(autoencoder: DCAutoencoder, latent: torch.Size, max_bytes: int | None) -> Need:
    """Of decoding latents of this shape (B, C, H, W), one after another."""
    shape, factor = torch.Size((1, *latent[1:])), autoencoder.config.downsample
    size = (factor * latent[-2], factor * latent[-1])
    return _pixel_need(DECODER, autoencoder.decoder, shape, size, autoencoder.dtype, max_bytes)


def _pixel_need(
    part: str,
    network: Encoder | Decoder,
    shape: torch.Size,
    size: tuple[int, int],
    dtype: torch.dtype,
    max_bytes: int | None,
) -> Need:
    """Of one half of the autoencoder for an input of this shape. More memory than this would be quicker, but hardly."""
    least, whole = least_bytes(network, shape, dtype), whole_bytes(network, shape, dtype)
    if max_bytes is not None:
        least = working = min(whole, max_bytes)
    else:
        working = min(whole, max(least, WORKING_BYTES))
    picture = size[0] * size[1] * PIXEL_BYTES
    return Need((part,), *(max(taken + picture, 3 * picture) for taken in (working, least)))
