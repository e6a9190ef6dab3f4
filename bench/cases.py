"""What is raced: transformer steps, decoding and encoding, prompts, and whole pictures, each against its reference."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers import SanaPipeline as DiffusersPipeline
from torch import Tensor, nn
from transformers import DynamicCache

from sana.config import AUTOENCODERS, VARIANTS, TransformerIdentity
from sana.networks.packed_layers import multiply_in_int8
from sana.networks.streaming import least_bytes, whole_bytes
from sana.networks.transformer import SanaTransformer
from sana.pipeline import SanaPipeline
from sana.plan import Settings
from sana.text.gemma import Gemma2, KeysValues
from sana.text.generation import Reader, Sampling, choose, continuation
from sana.text.prompt import INSTRUCTION
from sana.text.text_encoder import GemmaTextEncoder

from .race import Call
from .twins import PaddingTokenizer, autoencoder_pair, gemma_pair, transformer_pair, writer
from .weights import rounded_to_int8

SIDES = (512, 1024, 2048, 4096)
TRANSFORMERS = ("sana-0.6b-1024px", "sana-1.6b-1024px", "sana-1.5-4.8b-1024px", "sana-sprint-0.6b-1024px")
INT8_TRANSFORMERS = ("sana-0.6b-1024px", "sana-1.6b-1024px", "sana-sprint-0.6b-1024px")
AUTOENCODER = "dc-ae-f32c32-sana-1.1"
PARAMETERS = {"0.6b": 0.59e9, "1.6b": 1.6e9, "4.8b": 4.72e9}
TEXT_TOKENS, WORDS = 300, 20
PROMPT_WORDS = (5, 20, 200)
DECODE_FLOPS = 8.0e6  # per pixel, of the decoder; the encoder needs 5.0e6
ENCODE_FLOPS = 5.0e6
TOKEN = 1000
READ, WRITTEN = 400, 16  # tokens: of the official instruction with a text, and after it
ENHANCED = 20, 64  # words and tokens
WRITING_FLOPS = 2e11  # of a token: it takes as long as reading the weights, in which a CPU does about so many
PROMPT_FLOPS = 2 * 2.0e9 * 600  # of Gemma-2-2b: the instruction and 300 tokens
CARD_BYTES = 2**31  # of working memory on a small card
PROMPT = "a small house with a red roof stands between two old trees at the edge of a quiet lake in autumn"


@dataclass(frozen=True)
class Case:
    """One row of the table. flops, bytes: rough needs of one call, by which a machine chooses its cases."""

    name: str
    side: int  # px; 0: has none
    flops: float
    weights: float  # parameters
    build: Callable[[torch.dtype, str, bool], dict[str, Call]]  # (dtype, device, compiled) -> calls, ours first
    activations: float = 0.0  # numbers alive at once in the reference

    @property
    def title(self) -> str:
        return f"{self.name}, {self.side} px" if self.side else self.name


def all_cases(picture_steps: int) -> Iterator[Case]:
    for variant in TRANSFORMERS:
        parameters = next(count for name, count in PARAMETERS.items() if name in variant)
        batch = 1 if "sprint" in variant else 2
        for side in SIDES:
            tokens = batch * (side // 32) ** 2
            yield Case(
                f"transformer step, {variant}",
                side,
                2 * parameters * tokens,
                parameters,
                partial(transformer_calls, variant, side, batch),
                40 * tokens * 1152,
            )
    for side in SIDES:
        common = {"side": side, "weights": 0.32e9, "activations": 900 * side**2}
        yield Case("decode", flops=DECODE_FLOPS * side**2, build=partial(decode_calls, side), **common)
        yield Case("encode", flops=ENCODE_FLOPS * side**2, build=partial(encode_calls, side), **common)
    for words in PROMPT_WORDS:
        yield Case(f"prompt of {words} words, Gemma-2-2b", 0, PROMPT_FLOPS, 2.6e9, partial(prompt_calls, words))
    yield Case(
        f"writing {WRITTEN} tokens after {READ}, Gemma-2-2b",
        0,
        WRITTEN * WRITING_FLOPS,
        2.6e9,
        partial(writing_calls, READ, WRITTEN),
    )
    yield Case(
        f"enhancing a prompt of {ENHANCED[0]} words by {ENHANCED[1]} tokens, Gemma-2-2b",
        0,
        PROMPT_FLOPS + ENHANCED[1] * WRITING_FLOPS,
        2.6e9,
        partial(enhancement_calls, *ENHANCED),
    )
    for variant, side in (("sana-0.6b-1024px", 512), ("sana-0.6b-1024px", 1024), ("sana-1.6b-1024px", 1024)):
        parameters = PARAMETERS["0.6b" if "0.6b" in variant else "1.6b"]
        text_flops = 1.5 * PROMPT_FLOPS  # half as much for the negative prompt, which has no instruction
        flops = 4 * parameters * (side // 32) ** 2 * picture_steps + DECODE_FLOPS * side**2 + text_flops
        name = f"prompt to picture in {picture_steps} steps, {variant}"
        build = partial(picture_calls, variant, side, picture_steps)
        yield Case(name, side, flops, parameters + 2.9e9, build, 900 * side**2)


def int8_cases() -> Iterator[Case]:
    """What files in int8 are for on a CPU."""
    for variant in INT8_TRANSFORMERS:
        parameters = next(count for name, count in PARAMETERS.items() if name in variant)
        for side in SIDES[:2]:
            flops = 2 * parameters * (1 if "sprint" in variant else 2) * (side // 32) ** 2
            name = f"transformer step in int8, {variant}"
            yield Case(name, side, flops, 2 * parameters, partial(int8_step_calls, variant, side))
    build = partial(int8_token_calls, READ)
    yield Case(f"a written token in int8 after {READ}, Gemma-2-2b", 0, WRITING_FLOPS, 5.2e9, build)


def int8_step_calls(variant: str, side: int, dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Call]:
    """The same weights in all: in int8 multiplied in 8 bits, or unpacked, and in the dtype."""
    config = VARIANTS[variant].transformer
    ours, theirs = transformer_pair(config, dtype, device)
    packed = [SanaTransformer(config, device="meta").eval().requires_grad_(False) for _ in range(2)]
    for network in packed:  # numbers that are rounded already stay as they are
        network.load_state_dict(ours.state_dict(), assign=True)
        rounded_to_int8(ours.transformer_blocks, network.transformer_blocks)
    multiply_in_int8(packed[0])
    inputs = StepInputs(ours, side, 1 if config.guidance_embed else 2, dtype, device)
    calls = {"ours": inputs.to_ours(packed[0]), "diffusers": inputs.to_theirs(theirs)}
    return {**calls, "ours, unpacked": inputs.to_ours(packed[1]), "ours, not quantised": inputs.to_ours(ours)}


def int8_token_calls(read: int, dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Call]:
    """What a token makes of the next one, after keys and values of so many. The same weights in all."""
    ours, model = gemma_pair(dtype, device)
    theirs, network = writer(model), Gemma2(ours.model.config, device="meta").eval().requires_grad_(False)
    network.load_state_dict(ours.model.state_dict(), assign=True)
    rounded_to_int8(ours.model.layers, network.layers)
    packed = GemmaTextEncoder(network, ours.tokenizer)
    known = known_tokens(ours, read, dtype, device)

    def reference() -> Tensor:
        return theirs(torch.tensor([[TOKEN]], device=device), past_key_values=cached(known, model)).logits[0, -1]

    calls = {"ours": call(lambda: Reader(packed, known).read([TOKEN])), "transformers": call(reference)}
    return {**calls, "ours, not quantised": call(lambda: Reader(ours, known).read([TOKEN]))}


def transformer_calls(
    variant: str, side: int, batch: int, dtype: torch.dtype, device: str, compiled: bool
) -> dict[str, Call]:
    """One evaluation with guidance, as each step of a sampler makes it: text keys and modulation are there already."""
    ours, theirs = transformer_pair(VARIANTS[variant].transformer, dtype, device)
    inputs = StepInputs(ours, side, batch, dtype, device)
    calls = {"ours": inputs.to_ours(ours), "diffusers": inputs.to_theirs(theirs)}
    if compiled:
        calls["ours, compiled"] = inputs.to_ours(ours, torch.compile(ours.velocity))
        calls["diffusers, compiled"] = inputs.to_theirs(torch.compile(theirs))
    return calls


class StepInputs:
    """Random inputs of a step, with guidance where the network has an embedding of it or the batch has both prompts."""

    def __init__(self, network: SanaTransformer, side: int, batch: int, dtype: torch.dtype, device: str) -> None:
        config = network.config
        self.x = torch.randn(batch, 32, side // 32, side // 32, device=device).to(dtype)
        self.text, self.mask = random_text(network, batch, dtype, device)
        self.timestep = torch.full((batch,), 0.5 if config.continuous_time else 500.0, device=device)
        self.embed = torch.full((batch,), 0.45, device=device) if config.guidance_embed else None

    def to_ours(self, network: SanaTransformer, velocity: Callable[..., Tensor] | None = None) -> Call:
        """velocity: in the place of the network's. Text keys and modulation are there already."""
        modulation = call(network.modulation, self.timestep, self.embed)()
        context = call(network.text_context, self.text, self.mask)()
        return call(velocity or network.velocity, self.x, modulation, context)

    def to_theirs(self, network: Callable[..., tuple[Tensor, ...]]) -> Call:
        others = {"encoder_attention_mask": self.mask.to(self.x), "timestep": self.timestep, "return_dict": False}
        others |= {} if self.embed is None else {"guidance": self.embed}
        return call(lambda: network(self.x, encoder_hidden_states=self.text, **others)[0])


def random_text(network: SanaTransformer, batch: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """300 tokens of which WORDS count, as of a short prompt."""
    text = torch.randn(batch, TEXT_TOKENS, network.config.text_width, device=device).to(dtype)
    mask = torch.zeros(batch, TEXT_TOKENS, dtype=torch.bool, device=device)
    mask[:, :WORDS] = True
    return text, mask


def decode_calls(side: int, dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Call]:
    """All at once, and within the bounds that a small card asks for."""
    ours, theirs = autoencoder_pair(AUTOENCODERS[AUTOENCODER], dtype, device)
    ae_latent = torch.randn(1, 32, side // 32, side // 32, device=device).to(dtype)
    calls = {"ours": call(ours.decode, ae_latent)}
    calls["diffusers"] = call(lambda: theirs.decode(ae_latent, return_dict=False)[0])
    calls["ours, in least memory"] = call(ours.decode, ae_latent, least_bytes(ours.decoder, ae_latent.shape, dtype))
    if whole_bytes(ours.decoder, ae_latent.shape, dtype) > CARD_BYTES:
        calls["ours, in 2 GiB"] = call(ours.decode, ae_latent, CARD_BYTES)
    if compiled:
        calls["ours, compiled"] = call(torch.compile(ours.decode), ae_latent)
        decode = torch.compile(theirs.decode)
        calls["diffusers, compiled"] = call(lambda: decode(ae_latent, return_dict=False)[0])
    return calls


def encode_calls(side: int, dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Call]:
    ours, theirs = autoencoder_pair(AUTOENCODERS[AUTOENCODER], dtype, device)
    image = torch.rand(1, 3, side, side, device=device).to(dtype) * 2 - 1
    return {
        "ours": call(ours.encode, image),
        "diffusers": call(lambda: theirs.encode(image, return_dict=False)[0]),
    }


def prompt_calls(words: int, dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Call]:
    """A prompt after another one: the instruction's keys and values are there. The reference encodes all, padded."""
    ours, model = gemma_pair(dtype, device)
    prompt = " ".join(islice(cycle(PROMPT.split()), words))
    ids = ours.tokenize([prompt])[0]
    prefix = len(ours.tokenizer.encode(INSTRUCTION))
    length = prefix + TEXT_TOKENS - 2
    row = torch.tensor([ids + [0] * (length - len(ids))], device=device)
    mask = (torch.arange(length, device=device) < len(ids)).long()[None]

    def theirs() -> Tensor:
        hidden = model(input_ids=row, attention_mask=mask).last_hidden_state
        kept = [0, *range(length - TEXT_TOKENS + 1, len(ids))]
        return hidden[:, kept]

    return {"ours": call(lambda: ours([prompt])[0][:, : len(ids) - prefix + 2]), "transformers": call(theirs)}


def writing_calls(read: int, written: int, dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Call]:
    """The likeliest tokens one by one, after keys and values of so many that were read: the official instruction and a text."""
    ours, model = gemma_pair(dtype, device)
    theirs = writer(model)
    known = known_tokens(ours, read, dtype, device)
    ids = torch.full((1, read + 1), TOKEN, device=device)
    sampling, generator = Sampling(written, temperature=0), torch.Generator()

    def write() -> Tensor:
        reader, text = Reader(ours, known), ids[0].tolist()
        for _ in range(written):
            text.append(choose(reader.read(text[-1:]), text, sampling, generator))
        return torch.tensor(text)

    def generate() -> Tensor:
        options = {"past_key_values": cached(known, model), "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        return theirs.generate(ids, **options, max_new_tokens=written, do_sample=False)[0].cpu()

    return {"ours": call(write), "transformers": call(generate)}


def known_tokens(encoder: GemmaTextEncoder, count: int, dtype: torch.dtype, device: str) -> list[KeysValues]:
    """Random keys and values of so many tokens, for every layer."""
    config = encoder.model.config
    shape = (1, config.num_key_value_heads, count, config.head_dim)
    return [KeysValues(*(torch.randn(shape, device=device).to(dtype) for _ in range(2))) for _ in encoder.model.layers]


def cached(known: list[KeysValues], model: nn.Module) -> DynamicCache:
    """The same as transformers takes them."""
    cache = DynamicCache(config=model.config)
    for i, (keys, values) in enumerate(known):
        cache.update(keys, values, i)
    return cache


def enhancement_calls(words: int, written: int, dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Call]:
    """The likeliest tokens for a prompt after another one: the instruction is there. The reference reads all of it anew."""
    ours, model = gemma_pair(dtype, device)
    theirs = writer(model)
    ids = ours.tokenizer.encode(INSTRUCTION + " ".join(islice(cycle(PROMPT.split()), words)))
    row = torch.tensor([ids], device=device)
    options = {"attention_mask": torch.ones_like(row), "pad_token_id": 0, "max_new_tokens": written, "do_sample": False}
    sampling = Sampling(written, temperature=0)
    calls = {"ours": call(lambda: torch.tensor([*ids, *continuation(ours, ids, sampling, INSTRUCTION)]))}
    return {**calls, "transformers": call(lambda: theirs.generate(row, **options)[0].cpu())}


def picture_calls(
    variant: str, side: int, steps: int, dtype: torch.dtype, device: str, compiled: bool
) -> dict[str, Call]:
    """From the prompt to pixels, by both pipelines; ours also with the instruction not yet encoded, as for a first prompt."""
    transformer, their_transformer = transformer_pair(VARIANTS[variant].transformer, dtype, device)
    autoencoder, their_autoencoder = autoencoder_pair(AUTOENCODERS[AUTOENCODER], dtype, device)
    text_encoder, gemma = gemma_pair(dtype, device)
    row = VARIANTS[variant]
    identity = TransformerIdentity(row.transformer, variant, row.base_size, row.flow_shift, row.dtype, "the table")
    settings = Settings(height=side, width=side, steps=steps, reference="diffusers")

    def ours(pipeline: SanaPipeline) -> Tensor:
        for step in pipeline.sample(PROMPT, settings):
            latent = step.next_x
        return autoencoder.decode(latent / autoencoder.config.latent_scale).clamp(-1, 1)

    def first() -> Tensor:
        encoder = GemmaTextEncoder(text_encoder.model, text_encoder.tokenizer)
        return ours(SanaPipeline(transformer, autoencoder, encoder, identity))

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=row.flow_shift
    )
    options = {"height": side, "width": side, "use_resolution_binning": False, "num_inference_steps": steps}

    def theirs(pipeline: DiffusersPipeline) -> Tensor:
        generator = torch.Generator().manual_seed(settings.seed)
        return pipeline(PROMPT, **options, generator=generator, output_type="pt", return_dict=False)[0] * 2 - 1

    def their_pipeline(transformer: nn.Module) -> DiffusersPipeline:
        pipeline = DiffusersPipeline(PaddingTokenizer(), gemma, their_autoencoder, transformer, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    plain = SanaPipeline(transformer, autoencoder, text_encoder, identity)
    calls = {"ours": call(ours, plain), "diffusers": call(theirs, their_pipeline(their_transformer))}
    calls["ours, first prompt"] = call(first)
    if compiled:
        pipeline = SanaPipeline(transformer, autoencoder, text_encoder, identity, compiled=True)
        calls["ours, compiled"] = call(ours, pipeline)
        calls["diffusers, compiled"] = call(theirs, their_pipeline(torch.compile(their_transformer)))
    return calls


def call(function: Callable[..., Tensor] | nn.Module, *arguments: object) -> Call:
    """A function with its arguments, without gradients."""

    @torch.no_grad()
    def run() -> Tensor:
        return function(*arguments)

    return run
