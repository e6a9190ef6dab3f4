"""LoRAs on weights that stay packed: they give what they give on the unpacked numbers, move with them, and are merged from them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana import SanaPipeline
from sana.checkpoints.files import read_tensors
from sana.checkpoints.lora import read_merges
from sana.checkpoints.transformer import build_transformer, find_transformer
from sana.networks.packed_layers import PackedEmbedding, PackedLinear
from sana.networks.transformer import SanaTransformer
from tests.sana.measures import relative_error
from tests.sana.models import PROMPTS, TRANSFORMER, gemma, transformer, write_model
from tests.sana.quantisers import QUANTISERS, quantised
from tests.sana.shell.commands import Shell, error_line

Tensors = dict[str, Tensor]
EXACT = 1e-5  # relative
FORMS = ["fp8", "int8", "nvfp4", "bitsandbytes int8", "bitsandbytes nf4"]
# 6 layers of 3 blocks: both attentions, and the 1x1 convolutions.
LAYERS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_v", "ff.conv_inverted", "ff.conv_point", "attn1.to_k")
CHANGED = LAYERS[:5]  # by LoRAs
MATRICES = [f"transformer_blocks.{i}.{layer}.weight" for i in range(3) for layer in LAYERS]
Q = "transformer_blocks.0.attn1.to_q.weight"


def write(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"num_cross_attention_heads": 2}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path := folder / "model.safetensors")
    return path


def write_lora(
    path: Path, tensors: Tensors, names: list[str], prefix: str = "transformer.", dora: bool = False
) -> Path:
    """Random factors of rank 4 for these weights, whose effect is about as large as the weights."""
    found = {}
    for name in names:
        layer, rows, columns = name.removesuffix(".weight"), len(tensors[name]), tensors[name][0].numel()
        found[f"{prefix}{layer}.lora_A.weight"] = torch.randn(4, columns) / columns**0.5
        found[f"{prefix}{layer}.lora_B.weight"] = torch.randn(rows, 4) / 2
        if dora:
            found[f"{prefix}{layer}.dora_scale"] = torch.rand(rows, 1) + 0.5
    save_file(found, path)
    return path


def load(path: Path, *loras: tuple[Path, float], dtype: torch.dtype | None = torch.float32) -> SanaTransformer:
    found = find_transformer(read_tensors(path))
    merges, _ = read_merges(loras, found.identity.config, None)
    return build_transformer(found, dtype, merges=merges)


def velocity(network: SanaTransformer) -> Tensor:
    torch.manual_seed(1)
    x, text = torch.randn(2, 32, 3, 5), torch.randn(2, 7, network.config.text_width)
    with torch.no_grad():
        return network(x.to(network.dtype), torch.tensor([999.0, 20.0]), text.to(network.dtype))


@pytest.fixture
def loras(tmp_path: Path, diffusers: Tensors) -> list[tuple[Path, float]]:
    """A LoRA, and after it a DoRA on some of its layers, each with a strength."""
    names = [f"transformer_blocks.{i}.{layer}.weight" for i in range(3) for layer in CHANGED]
    plain = write_lora(tmp_path / "plain.safetensors", diffusers, names)
    dora = write_lora(tmp_path / "dora.safetensors", diffusers, names[:4], dora=True)
    return [(plain, 0.75), (dora, 0.5)]


@pytest.mark.parametrize("form", FORMS)
def test_loras_on_packed_weights_are_those_on_their_numbers(
    tmp_path: Path, diffusers: Tensors, loras: list[tuple[Path, float]], form: str
) -> None:
    stored, unpacked = quantised(diffusers, QUANTISERS[form], MATRICES)
    path, numbers = write(tmp_path / "packed", stored), write(tmp_path / "unpacked", unpacked)
    network, expected = load(path, *loras), load(numbers, *loras)
    for name in MATRICES:
        layer = network.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, PackedLinear)
        assert len(layer.weight.changes) == any(part in name for part in CHANGED)
        assert relative_error(layer.weight(), expected.get_parameter(name)) < EXACT, name
    assert relative_error(velocity(network), velocity(expected)) < EXACT
    assert relative_error(velocity(load(path)), velocity(expected)) > 0.1
    assert relative_error(velocity(load(path, *loras[::-1])), velocity(expected)) > 10 * EXACT  # the order counts


def test_a_lora_of_strength_0_leaves_packed_weights_alone(tmp_path: Path, diffusers: Tensors) -> None:
    stored, _ = quantised(diffusers, QUANTISERS["nvfp4"], MATRICES)
    path, lora = write(tmp_path / "packed", stored), write_lora(tmp_path / "a.safetensors", diffusers, [Q])
    network = load(path, (lora, 0.0))
    assert not [layer for layer in network.modules() if isinstance(layer, PackedLinear) and len(layer.weight.changes)]
    assert torch.equal(velocity(network), velocity(load(path)))


@pytest.mark.parametrize("form", FORMS)
def test_packed_weights_and_their_loras_move_together_and_keep_their_bits(
    tmp_path: Path, diffusers: Tensors, loras: list[tuple[Path, float]], form: str
) -> None:
    stored, _ = quantised(diffusers, QUANTISERS[form], MATRICES)
    network = load(write(tmp_path / "packed", stored), *loras)
    before = velocity(network)
    weight = network.get_submodule(Q.removesuffix(".weight")).weight
    held = {name: part.dtype for name, part in weight.parts.items()}
    exact = weight()
    network.to(torch.bfloat16)
    assert (weight.dtype, weight().dtype) == (torch.bfloat16, torch.bfloat16)
    assert {name: part.dtype for name, part in weight.parts.items()} == held
    assert torch.equal(weight(torch.float32), exact)
    assert relative_error(velocity(network).float(), before) < 0.05
    network.to(torch.float32)
    assert torch.equal(weight(), exact)
    network.to("meta")
    changes = [change for change, _ in weight.changes[0].changes]
    tensors = [part for change in changes for factors in change.parts for part in factors if part is not None]
    tensors += [change.lengths for change in changes if change.lengths is not None]
    assert len(tensors) == 5
    assert {tensor.device.type for tensor in (*tensors, *weight.parts.values(), weight())} == {"meta"}


# A whole model, and the shell


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with its transformer in nvfp4 and its text encoder in nf4, and the same unpacked."""
    folders = [write_model(tmp_path_factory.mktemp(name)) for name in ("packed", "unpacked")]
    for part, form in (("transformer", "nvfp4"), ("text_encoder", "bitsandbytes nf4")):
        file = next((folders[0] / part).glob("*.safetensors"))
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
        names = [name for name in tensors if name in MATRICES or name.endswith(("_proj.weight", "embed_tokens.weight"))]
        header = read_tensors(file).metadata
        for folder, content in zip(folders, quantised(tensors, QUANTISERS[form], names), strict=True):
            content = {name: tensor.contiguous() for name, tensor in content.items()}
            save_file(content, folder / part / file.name, header)
    return folders[0], folders[1]


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A LoRA for the transformer and the text encoder, also on its embedding."""
    torch.manual_seed(4)
    weights, text = dict(transformer().state_dict()), dict(gemma().state_dict())
    names = [name for name in text if name.endswith(("q_proj.weight", "down_proj.weight", "embed_tokens.weight"))]
    first = load_file(write_lora(tmp_path / "both.safetensors", weights, MATRICES))
    second = load_file(write_lora(tmp_path / "both.safetensors", text, names, "text_encoder."))
    save_file(first | second, tmp_path / "both.safetensors")
    return tmp_path / "both.safetensors"


def test_a_pipeline_with_a_lora_on_packed_weights(model: tuple[Path, Path], both: Path) -> None:
    packed, unpacked = (SanaPipeline.load(folder, loras=[(both, 0.75)]) for folder in model)
    embedding = packed.text_encoder.model.embed_tokens
    assert isinstance(embedding, PackedEmbedding) and len(embedding.weight.changes)
    texts = [pipeline.text_encoder([PROMPTS[0]], None)[0] for pipeline in (packed, unpacked)]
    assert relative_error(*texts) < EXACT
    assert relative_error(velocity(packed.transformer), velocity(unpacked.transformer)) < EXACT
    plain = SanaPipeline.load(model[0])
    assert relative_error(plain.text_encoder([PROMPTS[0]], None)[0], texts[1]) > 0.1
    assert relative_error(velocity(plain.transformer), velocity(unpacked.transformer)) > 0.1


@pytest.fixture
def shell(model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(model[0], tmp_path, capsys)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_lora_is_merged_into_a_quantised_model(
    shell: Shell, model: tuple[Path, Path], both: Path, dtype: str
) -> None:
    """As into its numbers, in 32 bits until it is written."""
    written = []
    for name, folder in zip(("packed", "unpacked"), model, strict=True):
        target = shell.folder / f"{name}.safetensors"
        outcome = shell.run("convert", folder, target, "--lora", f"{both}=0.5", "--dtype", dtype)
        assert outcome.code == 0, outcome.err
        written.append(load_file(target))
    assert written[0].keys() == written[1].keys() >= {*MATRICES}
    for name, tensor in written[1].items():
        assert tensor.dtype == written[0][name].dtype == getattr(torch, dtype)
        assert relative_error(written[0][name].float(), tensor.float()) < (EXACT if dtype == "float32" else 1e-3), name


@pytest.mark.parametrize("loras", [[], ["both"]])
def test_without_a_dtype_quantised_weights_cannot_be_converted(shell: Shell, both: Path, loras: list[str]) -> None:
    options = ["--lora", both] if loras else []
    outcome = shell.run("convert", shell.model, shell.folder / "out.safetensors", *options)
    assert outcome.code == 1 and not (shell.folder / "out.safetensors").exists()
    assert error_line(outcome) == "transformer has weights in nvfp4; unpack them by --dtype bfloat16"


def test_a_lora_is_merged_into_plain_fp8_with_a_dtype_alone(shell: Shell, diffusers: Tensors) -> None:
    """Or if it changes other weights than those."""
    other = Q.replace("to_q", "to_v")
    source = write(shell.folder / "plain", {**diffusers, Q: diffusers[Q].to(torch.float8_e4m3fn)})
    first = write_lora(shell.folder / "q.safetensors", diffusers, [Q])
    second = write_lora(shell.folder / "v.safetensors", diffusers, [other])
    target = shell.folder / "out.safetensors"
    outcome = shell.run("convert", source, target, "--lora", first)
    assert outcome.code == 1 and not target.exists()
    assert error_line(outcome) == "model.safetensors has weights in float8_e4m3fn; unpack them by --dtype bfloat16"
    for lora, changed, options in ((second, other, ()), (first, Q, ("--dtype", "float32"))):
        outcome = shell.run("convert", source, target, "--lora", lora, *options)
        assert outcome.code == 0, outcome.err
        factors, found = load_file(lora), load_file(target)
        layer = f"transformer.{changed.removesuffix('.weight')}"
        before = diffusers[changed].to(torch.float8_e4m3fn).float() if changed == Q else diffusers[changed]
        product = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
        assert relative_error(found[changed], before + product) < EXACT
        assert found[Q].dtype == (torch.float32 if options else torch.float8_e4m3fn)
        assert torch.equal(
            found[other if changed == Q else Q].float(), load_file(source)[other if changed == Q else Q].float()
        )
        target.unlink()


def test_info_on_a_quantised_model_and_a_lora_for_it(shell: Shell, both: Path) -> None:
    lines = shell.run("info", shell.model).out.splitlines()
    assert lines[0] == "transformer: a SANA transformer"
    assert lines[2] == f"quantised matrices: {len(MATRICES)} in nvfp4"
    assert f"{TRANSFORMER.depth} blocks of width {TRANSFORMER.hidden_size}" in lines[3]
    layers = len(load_file(both)) // 2
    fits = shell.run("info", both, "--model", shell.model).out.splitlines()
    assert fits[-1] == f"all of its {layers} layers fit {shell.model.name}"
    wrong = {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(96, 48)}  # as wide as its bytes
    lora = write_lora(shell.folder / "wrong.safetensors", wrong, [*wrong])
    assert shell.run("info", lora, "--model", shell.model).out.splitlines()[-1] == (
        "wrong.safetensors was made for another model: it changes 96 x 48 numbers of transformer_blocks.0.attn1.to_q.weight, "
        "which has 96 x 96 here; use a LoRA made for this model"
    )
