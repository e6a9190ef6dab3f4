"""What a file holds, from its tensors, and what they cannot tell, from what stands beside them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sana.checkpoints.autoencoder import detect_autoencoder
from sana.checkpoints.files import CheckpointError, TensorFile
from sana.checkpoints.header import header_tensor, transformer_header
from sana.checkpoints.names import HEADER_TENSOR
from sana.checkpoints.transformer import identify_transformer, possible_sizes
from sana.config import AUTOENCODERS, VARIANTS, TransformerIdentity
from sana.networks.transformer import SanaTransformer
from tests.sana.dialects import padded
from tests.sana.released import released
from tests.sana.twins import tiny_config

Tensors = dict[str, Tensor]
HEADS = {"num_cross_attention_heads": 2}  # what a config.json beside so small a network has to say
FILE = Path("model.safetensors")


def identity_of(
    name: str, dialect: str = "official", dtype: torch.dtype = torch.float32, **companions: dict | frozenset
) -> TransformerIdentity:
    tensors = released("transformers", dialect, name).tensors
    return identify_transformer(
        TensorFile(FILE, {key: tensor.to(dtype) for key, tensor in tensors.items()}, **companions)
    )


@pytest.mark.parametrize(
    ("name", "dtype", "variant", "released_dtype"),
    [
        ("Sana_1600M_1024px", torch.float32, "sana-1.6b-1024px", "bfloat16"),
        ("Sana_1600M_1024px", torch.bfloat16, "sana-1.6b-1024px", "bfloat16"),
        ("Sana_1600M_1024px", torch.float16, "sana-1.6b-1024px-fp16", "float16"),
        ("Sana_600M_1024px", torch.float32, "sana-0.6b-1024px", "float16"),
        ("Sana_600M_1024px", torch.bfloat16, "sana-0.6b-1024px", "bfloat16"),
        ("Sprint_1.6B", torch.float16, "sana-sprint-1.6b-1024px", "float16"),
        ("Sana_1600M_1024px", torch.float8_e4m3fn, "sana-1.6b-1024px", "bfloat16"),
        ("Sana_600M_1024px", torch.float8_e5m2, "sana-0.6b-1024px", "float16"),
    ],
)
def test_the_dtype_is_that_of_the_file_if_it_has_16_bits(
    name: str, dtype: torch.dtype, variant: str, released_dtype: str
) -> None:
    identity = identity_of(name, dtype=dtype)
    assert (identity.variant, identity.dtype) == (variant, released_dtype)


@pytest.mark.parametrize(
    ("stored", "suffixes", "variant", "released_dtype"),
    [
        (torch.float32, ["fp16"], "sana-1.6b-1024px-fp16", "float16"),
        (torch.float32, ["bf16"], "sana-1.6b-1024px", "bfloat16"),
        (torch.float32, ["ema"], "sana-1.6b-1024px", "bfloat16"),
        (torch.float32, ["bf16", "fp16"], "sana-1.6b-1024px", "bfloat16"),
        (torch.bfloat16, ["fp16"], "sana-1.6b-1024px", "bfloat16"),
    ],
)
def test_a_copy_in_16_bits_tells_the_dtype_of_a_float32_file(
    stored: torch.dtype, suffixes: list[str], variant: str, released_dtype: str
) -> None:
    identity = identity_of("Sana_1600M_1024px", dtype=stored, siblings=frozenset(suffixes))
    assert (identity.variant, identity.dtype) == (variant, released_dtype)


@pytest.mark.parametrize(
    ("variant", "told", "released_dtype"),
    [
        ("sana-0.6b-1024px", "float8_e4m3fn", "float16"),
        ("sana-1.6b-1024px", "float32", "bfloat16"),
        ("custom", "float8_e4m3fn", "bfloat16"),
        ("custom", "float16", "float16"),
    ],
)
def test_a_header_tells_the_dtype_if_it_has_16_bits(
    diffusers: Tensors, variant: str, told: str, released_dtype: str
) -> None:
    identity = TransformerIdentity(tiny_config("sana-0.6b-1024px"), variant, 1024, 3.0, told, "its header")
    assert identify_transformer(TensorFile(FILE, diffusers, transformer_header(identity))).dtype == released_dtype


def test_other_networks_in_the_file_do_not_decide_the_dtype() -> None:
    transformer = released("transformers", "official", "Sana_1600M_1024px").tensors
    tensors = {f"model.diffusion_model.{name}": tensor.half() for name, tensor in transformer.items()}
    gemma = torch.empty(256_000, 23_040, dtype=torch.bfloat16, device="meta")
    tensors["text_encoders.gemma2_2b.model.embed_tokens.weight"] = gemma
    assert identify_transformer(TensorFile(FILE, tensors)).dtype == "float16"


def test_without_anything_beside_them_tensors_are_those_of_the_first_row() -> None:
    for name, variant in (("Sana_1600M_4Kpx", "sana-1.6b-1024px"), ("Sana_600M_512px", "sana-0.6b-1024px")):
        tensors = released("transformers", "official", name).tensors
        del tensors["pos_embed"]
        identity = identify_transformer(TensorFile(FILE, tensors))
        assert identity.variant == variant
        assert identity.origin == "the table, since the file does not say"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Sana_1600M_1024px", [512, 1024, 2048, 4096]),
        ("Sana_600M_1024px", [512, 1024]),
        ("SANA1.5_1.6B", [1024]),
        ("Sprint_1.6B", [1024]),
    ],
)
def test_sizes_that_the_tensors_leave_open(name: str, sizes: list[int]) -> None:
    tensors = released("transformers", "official", name).tensors
    tensors.pop("pos_embed", None)
    assert possible_sizes(TensorFile(FILE, tensors)) == sizes


def test_sizes_that_are_told_are_the_only_ones(diffusers: Tensors) -> None:
    """By a buffer, by the configuration, or by our header. A network that was never released has none."""
    for name, size in (("Sana_1600M_4Kpx", 4096), ("Sana_1600M_2Kpx", 2048)):
        assert possible_sizes(TensorFile(FILE, released("transformers", "official", name).tensors)) == [size]
    tensors = released("transformers", "diffusers", "Sana_1600M_1024px").tensors
    assert possible_sizes(TensorFile(FILE, tensors, config={"sample_size": 16})) == [512]
    assert possible_sizes(TensorFile(FILE, tensors, config={"sample_size": 24})) == []
    assert possible_sizes(TensorFile(FILE, diffusers, config=HEADS)) == []
    told = TransformerIdentity(tiny_config("sana-0.6b-1024px"), "custom", 768, 3.0, "float16", "its header", 2.5)
    assert possible_sizes(TensorFile(FILE, diffusers, transformer_header(told))) == [768]


def test_a_given_variant_must_have_the_network_of_the_file() -> None:
    tensors = released("transformers", "official", "Sana_1600M_4Kpx").tensors
    del tensors["pos_embed"]
    row = VARIANTS["sana-1.6b-4096px"]
    given = identify_transformer(TensorFile(FILE, tensors), "sana-1.6b-4096px")
    assert (given.config, given.base_size, given.flow_shift) == (row.transformer, row.base_size, row.flow_shift)
    assert given.origin == "the given variant"
    for variant in ("sana-0.6b-1024px", "sana-1.5-1.6b-1024px", "sana-1.5-4.8b-1024px", "sana-sprint-1.6b-1024px"):
        with pytest.raises(
            CheckpointError, match=f"^.* has 20 blocks of width 2240 and is no {variant}; give the variant"
        ):
            identify_transformer(TensorFile(FILE, tensors), variant)


@pytest.mark.parametrize(
    ("sample_size", "interpolation", "variant", "base_size"),
    [
        (16, None, "sana-1.6b-512px", 512),
        (32, None, "sana-1.6b-1024px", 1024),
        (64, 1.0, "sana-1.6b-2048px", 2048),
        (128, 2.0, "sana-1.6b-4096px", 4096),
        (24, None, "custom", 768),
    ],
)
def test_a_sibling_configuration_tells_the_size(
    sample_size: int, interpolation: float | None, variant: str, base_size: int
) -> None:
    config = {"sample_size": sample_size, "interpolation_scale": interpolation}
    identity = identity_of("Sana_1600M_1024px", "diffusers", config=config)
    assert (identity.variant, identity.base_size, identity.origin) == (variant, base_size, "config.json")


@pytest.mark.parametrize("name", ["Sana_1600M_1024px", "Sprint_1.6B"])
def test_a_sibling_configuration_may_tell_the_guidance(name: str) -> None:
    for config, guidance_scale in (
        ({}, 4.5),
        ({"guidance_scale": 2}, 2),
        ({"sample_size": 24, "guidance_scale": 3.0}, 3),
    ):
        assert identity_of(name, config=config).guidance_scale == guidance_scale


@pytest.mark.parametrize("key", ["flow_shift", "shift"])
@pytest.mark.parametrize(
    ("variant", "stored", "flow_shift"),
    [
        ("sana-0.6b-1024px", 3.0, 4.0),  # what converters wrote everywhere; it was trained with the table's
        ("sana-0.6b-1024px", 2.5, 2.5),
        ("sana-1.6b-4096px", 6.0, 6.0),
        ("sana-sprint-0.6b-1024px", 3.0, None),
    ],
)
def test_the_scheduler_of_a_pipeline_tells_the_flow_shift(
    tmp_path: Path, key: str, variant: str, stored: float, flow_shift: float | None
) -> None:
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text(json.dumps({key: stored}))
    row = VARIANTS[variant]
    network = SanaTransformer(row.transformer, device="meta")
    config = {
        "sample_size": row.base_size // 32,
        "interpolation_scale": row.transformer.position_interpolation if row.transformer.position_base else None,
    }
    (tmp_path / "transformer").mkdir()
    for path in (tmp_path / "transformer", tmp_path / "transformer" / "model.safetensors"):
        identity = identify_transformer(TensorFile(path, dict(network.state_dict()), config=config))
        assert (identity.variant, identity.flow_shift) == (variant, flow_shift)


@pytest.mark.parametrize(
    ("name", "inner", "known"),
    [
        ("Sana_1600M_1024px", 5632, True),
        ("Sana_1600M_4Kpx", 5632, True),
        ("Sprint_1.6B", 5632, True),
        ("Sana_1600M_1024px", 5664, False),
        ("Sana_1600M_1024px", 5696, False),  # a multiple of 64, but not the next one
        ("Sana_600M_1024px", 2944, False),  # 2880 is a multiple of 64 already
    ],
)
def test_zeros_that_a_converter_adds_do_not_hide_the_variant(name: str, inner: int, known: bool) -> None:
    file = released("transformers", "diffusers", name)
    plain = identify_transformer(TensorFile(FILE, file.tensors, config=file.config))
    wider = TensorFile(FILE, padded(file.tensors, inner), config=file.config)
    found = identify_transformer(wider)
    assert found.config == replace(plain.config, ff_width=inner)
    assert (replace(found, config=plain.config) == plain) == known and (found.variant == "custom") != known
    if known:
        given = identify_transformer(wider, plain.variant)
        assert (given.config, given.variant, given.base_size) == (found.config, plain.variant, plain.base_size)
    else:
        with pytest.raises(CheckpointError, match=f"^model.safetensors has .* and is no {plain.variant}; give"):
            identify_transformer(wider, plain.variant)


@pytest.mark.parametrize("points", [False, True], ids=["linear", "with 1x1 convolutions"])
@pytest.mark.parametrize(
    ("form", "dtype", "columns"),
    [
        ("float8_e4m3fn", torch.float8_e4m3fn, 1),
        ("int8_tensorwise", torch.int8, 1),
        ("nvfp4", torch.uint8, 2),
        (None, torch.uint8, 2),  # the header tells the format, not a tensor
        ("convrot_w4a4", torch.int8, 2),
        ("asym_w4a8_int8", torch.int8, 2),
    ],
)
def test_sizes_are_those_of_the_numbers_and_not_of_the_bytes(
    diffusers: Tensors, form: str | None, dtype: torch.dtype, columns: int, points: bool
) -> None:
    """A format of 4 bits halves the second axis of a matrix."""
    told = torch.frombuffer(bytearray(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    packed = dict(diffusers)
    for name, tensor in diffusers.items():
        point = tensor.shape[2:] == (1, 1)
        if tensor.ndim == 2 and name.endswith(".weight") or (point and points):
            rows, numbers = tensor.shape[:2]
            packed[name] = torch.empty(rows, numbers // columns, dtype=dtype)
            packed |= {f"{name.removesuffix('weight')}comfy_quant": told} if form else {}
    assert (packed["patch_embed.proj.weight"].dtype == dtype) == points
    found = identify_transformer(TensorFile(FILE, packed, config=HEADS))
    assert found == identify_transformer(TensorFile(FILE, diffusers, config=HEADS))


def test_a_format_that_is_no_json_tells_nothing(diffusers: Tensors) -> None:
    broken = {"caption_projection.linear_1.comfy_quant": torch.zeros(9, dtype=torch.uint8)}
    broken["patch_embed.proj.comfy_quant"] = torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8)
    found = identify_transformer(TensorFile(FILE, {**diffusers, **broken}, config=HEADS))
    assert found == identify_transformer(TensorFile(FILE, diffusers, config=HEADS))


def test_a_network_that_was_never_released_is_custom(diffusers: Tensors) -> None:
    identity = identify_transformer(TensorFile(FILE, diffusers, config=HEADS))
    assert identity.config == tiny_config("sana-0.6b-1024px")
    assert (identity.variant, identity.base_size, identity.flow_shift) == ("custom", 1024, 3.0)
    assert identity.dtype == "bfloat16"


@pytest.mark.parametrize("where", ["header", "tensor", "prefixed tensor"])
@pytest.mark.parametrize("variant", ["sana-1.6b-4096px", "sana-sprint-1.6b-1024px", "custom"])
def test_a_header_tells_everything(diffusers: Tensors, where: str, variant: str) -> None:
    row = VARIANTS.get(variant)
    config = row.transformer if row else tiny_config("sana-0.6b-1024px")
    identity = TransformerIdentity(config, variant, 2048, row and row.flow_shift, "float16", "its header", 2.5)
    tensors, metadata = dict(diffusers), {}
    if where == "header":
        metadata = transformer_header(identity)
    else:
        prefix = "model.diffusion_model." if where == "prefixed tensor" else ""
        tensors = {
            prefix + name: tensor for name, tensor in {**tensors, HEADER_TENSOR: header_tensor(identity)}.items()
        }
    assert identify_transformer(TensorFile(FILE, tensors, metadata)) == identity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_header_survives_what_casts_every_tensor(diffusers: Tensors, dtype: torch.dtype) -> None:
    identity = TransformerIdentity(tiny_config("sana-0.6b-1024px"), "custom", 2048, 2.5, "float16", "its header")
    tensors = {**diffusers, HEADER_TENSOR: header_tensor(identity)}
    cast = {f"model.diffusion_model.{name}": tensor.to(dtype) for name, tensor in tensors.items()}
    assert identify_transformer(TensorFile(FILE, cast)) == identity


def test_a_header_in_8_bits_is_refused(diffusers: Tensors) -> None:
    tensors = {**diffusers, HEADER_TENSOR: torch.ones(3).to(torch.float8_e4m3fn)}
    with pytest.raises(
        CheckpointError,
        match="^model.safetensors holds sana_header, a tensor of bytes, in float8_e4m3fn, which rounds them; cast only the",
    ):
        identify_transformer(TensorFile(FILE, tensors))


def test_a_header_of_another_version_is_read_as_far_as_it_is_known(diffusers: Tensors) -> None:
    identity = TransformerIdentity(tiny_config("sana-0.6b-1024px"), "custom", 2048, 3.0, "float16", "its header")
    told = json.loads(transformer_header(identity)["sana"])
    del told["guidance_scale"]
    later = {"of a later version": 1}
    header = {"sana": json.dumps({**told, **later, "config": {**told["config"], **later}})}
    assert identify_transformer(TensorFile(FILE, diffusers, header)) == identity


@pytest.mark.parametrize(
    "content",
    [
        "",
        "0.1",
        "made with SANA",
        '{"base_size": 1024}',
        '{"base_size": 1024, "config": [1]}',
        '{"base_size": 1024, "config": {}}',
        '{"base_size": 1024, "config": "x", "variant": "x", "flow_shift": 3, "dtype": "bfloat16"}',
        '{"base_size": "x", "config": {"depth": 3}, "variant": "x", "flow_shift": 3, "dtype": "bfloat16"}',
        '{"base_size": 1024, "config": {"depth": "3"}, "variant": "x", "flow_shift": 3, "dtype": "bfloat16"}',
        '{"base_size": 1024, "config": {"depth": 3}, "variant": "x", "flow_shift": 3, "dtype": null}',
    ],
)
def test_a_header_of_somebody_else_tells_nothing(diffusers: Tensors, content: str) -> None:
    found = identify_transformer(TensorFile(FILE, diffusers, {"sana": content}, HEADS))
    assert found == identify_transformer(TensorFile(FILE, diffusers, config=HEADS))


def test_a_given_variant_leaves_the_guidance_to_the_file() -> None:
    tensors = released("transformers", "official", "Sana_1600M_1024px").tensors
    header = {"sana": json.dumps({"guidance_scale": 3})}
    for file in (TensorFile(FILE, tensors, config={"guidance_scale": 3}), TensorFile(FILE, tensors, header)):
        assert identify_transformer(file, "sana-1.6b-2048px").guidance_scale == 3


def test_an_unknown_variant_is_refused_with_the_known_ones(diffusers: Tensors) -> None:
    with pytest.raises(
        ValueError, match="^variant 'sana-9b' is unknown; use one of sana-0.6b-1024px, sana-0.6b-512px, "
    ):
        identify_transformer(TensorFile(FILE, diffusers, config=HEADS), "sana-9b")


@pytest.mark.parametrize("content", ['{"latent_scale": "x"}', '{"latent_scale": [1]}'])
def test_a_latent_scale_that_is_no_number_is_not_read(content: str) -> None:
    tensors = released("autoencoders", "diffusers", "dc-ae-f32c32-sana-1.1").tensors
    assert detect_autoencoder(tensors, TensorFile(FILE, tensors, {"sana": content})).latent_scale == 0.41407


@pytest.mark.parametrize(
    ("config", "scale"), [({}, 0.41407), ({"scaling_factor": 0.5}, 0.5), ({"_class_name": "AutoencoderDC"}, 0.41407)]
)
def test_latent_scale_of_an_autoencoder(config: dict[str, object], scale: float) -> None:
    tensors = released("autoencoders", "diffusers", "dc-ae-f32c32-sana-1.1").tensors
    assert detect_autoencoder(tensors, TensorFile(FILE, tensors, config=config)).latent_scale == scale


def test_latent_scale_of_the_first_autoencoder_of_equal_structure() -> None:
    tensors = released("autoencoders", "diffusers", "dc-ae-f32c32-mix-1.0").tensors
    found = detect_autoencoder(tensors, TensorFile(FILE, tensors))
    assert found == AUTOENCODERS["dc-ae-f32c32-in-1.0"]


def test_heads_of_an_unknown_width_need_a_configuration(diffusers: Tensors) -> None:
    message = (
        "model.safetensors has width 96, whose number of cross-attention heads is unknown; put the model's config.json"
    )
    with pytest.raises(CheckpointError, match=f"^{message} beside the file$"):
        identify_transformer(TensorFile(FILE, diffusers))
