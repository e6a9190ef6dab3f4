"""The ControlNet against a plain version of NVlabs' graph, written from the official tensors of one file."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.controlnets.controlnet_sana import SanaControlNetModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sana import CheckpointError, load_transformer
from sana.checkpoints.controlnet import load_controlnet
from sana.config import TransformerConfig
from sana.networks.controlnet import SanaControlNet
from sana.networks.transformer import SanaTransformer
from tests.sana.dialects import official_controlnet
from tests.sana.measures import relative_error
from tests.sana.twins import TEXT_WIDTH, diffusers_transformer, randomise, tiny_config

CONFIG = replace(tiny_config("sana-0.6b-1024px-controlnet-hed", depth=4), control_blocks=3)
HEADS = '{"num_cross_attention_heads": 2}'  # what a config.json beside so small a network has to say


def diffusers_controlnet(config: TransformerConfig) -> SanaControlNetModel:
    return SanaControlNetModel(
        num_attention_heads=config.self_heads,
        num_layers=config.control_blocks,
        num_cross_attention_heads=config.cross_heads,
        cross_attention_head_dim=config.hidden_size // config.cross_heads,
        cross_attention_dim=config.hidden_size,
        caption_channels=config.text_width,
    )


class Official(Mapping[str, Tensor]):
    """Tensors of an official file, which remember that they were used. `part` looks below a prefix."""

    def __init__(self, tensors: dict[str, Tensor], used: set[str] | None = None, prefix: str = "") -> None:
        self.tensors, self.prefix = tensors, prefix
        self.used: set[str] = set() if used is None else used

    def part(self, prefix: str) -> "Official":
        return Official(self.tensors, self.used, f"{self.prefix}{prefix}.")

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(self.prefix + name)
        return self.tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight = self[f"{name}.weight"].flatten(1)
        return F.linear(x, weight, self[f"{name}.bias"] if f"{self.prefix}{name}.bias" in self.tensors else None)


def plain_block(block: Official, x: Tensor, text: Tensor, modulation: Tensor, rows: int) -> Tensor:
    """SanaMSBlock: x (B, N, D), text (B, L, D), modulation (B, 6, D)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (block["scale_shift_table"] + modulation).unsqueeze(2).unbind(1)
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
    q, k, v = (part.unflatten(-1, (-1, 32)) for part in block.linear("attn.qkv", normed).chunk(3, dim=-1))
    similarity = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu())
    out = torch.einsum("bhij,bjhd->bihd", similarity / similarity.sum(-1, keepdim=True), v).flatten(2)
    x = x + gate1 * block.linear("attn.proj", out)

    q = block.linear("cross_attn.q_linear", x).unflatten(-1, (CONFIG.cross_heads, -1))
    k, v = block.linear("cross_attn.kv_linear", text).chunk(2, dim=-1)
    k, v = (part.unflatten(-1, (CONFIG.cross_heads, -1)) for part in (k, v))
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    x = x + block.linear("cross_attn.proj", torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))

    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
    wide = F.silu(block.linear("mlp.inverted_conv.conv", normed)).transpose(1, 2).unflatten(-1, (rows, -1))
    depth = block["mlp.depth_conv.conv.weight"], block["mlp.depth_conv.conv.bias"]
    value, gate = F.conv2d(wide, *depth, padding=1, groups=wide.shape[1]).flatten(2).transpose(1, 2).chunk(2, dim=-1)
    return x + gate2 * block.linear("mlp.point_conv.conv", value * F.silu(gate))


def plain_model(file: Official, x: Tensor, timestep: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """NVlabs/Sana diffusion/model/nets/sana_multi_scale_controlnet.py: x and image (B, 32, H, W), text without padding."""
    rows = x.shape[-2]
    angles = timestep[:, None] * torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
    time = F.silu(file.linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1)))
    time = file.linear("t_embedder.mlp.2", time)
    modulation = file.linear("t_block.1", F.silu(time)).unflatten(-1, (6, -1))
    text = F.gelu(file.linear("y_embedder.y_proj.fc1", text), approximate="tanh")
    text = file.linear("y_embedder.y_proj.fc2", text)
    text = text * (text.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * file["attention_y_norm.weight"]

    def block(name: str, tokens: Tensor) -> Tensor:
        return plain_block(file.part(name), tokens, text, modulation, rows)

    tokens, guide = (file.linear("x_embedder.proj", latent.flatten(2).transpose(1, 2)) for latent in (x, image))
    tokens = block("blocks.0", tokens)
    control = tokens + file.linear("controlnet.0.before_proj", guide)
    for i in range(1, CONFIG.depth):
        if i <= CONFIG.control_blocks:
            control = block(f"controlnet.{i - 1}.copied_block", control)
            tokens = tokens + file.linear(f"controlnet.{i - 1}.after_proj", control)
        tokens = block(f"blocks.{i}", tokens)
    shift, scale = (file["final_layer.scale_shift_table"] + time[:, None]).unsqueeze(2).unbind(1)
    out = file.linear("final_layer.linear", F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift)
    return out.transpose(1, 2).unflatten(-1, (rows, -1))


def controlled(transformer: SanaTransformer, control: SanaControlNet, x: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """The velocity at timestep 777 of a transformer with a ControlNet."""
    modulation = transformer.modulation(torch.full((len(x),), 777.0))
    contexts = [network.text_context(text) for network in (transformer, control)]
    return transformer.velocity(
        x, modulation, contexts[0], control=lambda tokens: control(tokens, image, modulation, contexts[1])
    )


@pytest.fixture
def networks() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a transformer and of its ControlNet in diffusers' names, with the embeddings they share."""
    trunk = randomise(diffusers_transformer(CONFIG)).state_dict()
    control = randomise(diffusers_controlnet(CONFIG)).state_dict()
    shared = ("patch_embed.", "time_embed.", "caption_")
    return trunk, {name: trunk[name] if name.startswith(shared) else tensor for name, tensor in control.items()}


@pytest.fixture
def official_file(networks: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path) -> Path:
    path = tmp_path / "controlnet.pth"
    torch.save({"state_dict": official_controlnet(*networks)}, path)
    (tmp_path / "config.json").write_text(HEADS)
    return path


def test_equals_the_graph_of_nvlabs(official_file: Path) -> None:
    transformer, control = load_transformer(official_file), load_controlnet(official_file)
    assert transformer.config == CONFIG and control.config.control_blocks == 3
    file = Official(torch.load(official_file)["state_dict"])
    x, image, text = torch.randn(2, 32, 3, 5), torch.randn(2, 32, 3, 5), torch.randn(2, 6, TEXT_WIDTH)
    expected = plain_model(file, x, torch.tensor([777.0, 777.0]), text, image)
    assert file.used == file.tensors.keys() - {"pos_embed", "y_embedder.y_embedding"}
    found = controlled(transformer, control, x, image, text)
    assert relative_error(found, expected) < 1e-5  # another order of sums; measured 5e-7
    without = transformer(x, torch.tensor([777.0, 777.0]), text)
    assert relative_error(without, expected) > 0.01


def test_masked_text_is_ignored(official_file: Path) -> None:
    control = load_controlnet(official_file)
    tokens, image, text = torch.randn(1, 15, 96), torch.randn(1, 32, 3, 5), torch.randn(1, 6, TEXT_WIDTH)
    modulation = load_transformer(official_file).modulation(torch.tensor([500.0]))
    mask = torch.tensor([[True, True, False, True, False, False]])
    expected = control(tokens, image, modulation, control.text_context(text[mask][None]))
    for found, correction in zip(
        control(tokens, image, modulation, control.text_context(text, mask)), expected, strict=True
    ):
        torch.testing.assert_close(found, correction, rtol=1e-5, atol=1e-5)


def test_diffusers_folder_holds_the_same(
    networks: tuple[dict[str, Tensor], dict[str, Tensor]], official_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pipeline"
    diffusers_controlnet(CONFIG).save_pretrained(folder / "controlnet")
    save_file(networks[1], folder / "controlnet" / "diffusion_pytorch_model.safetensors")
    expected = load_controlnet(official_file).state_dict()
    for path in (folder, folder / "controlnet"):
        control = load_controlnet(path)
        assert control.config.control_blocks == 3
        for name, tensor in control.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.diffusion_model.", "controlnet."])
def test_names_may_have_a_prefix(
    networks: tuple[dict[str, Tensor], dict[str, Tensor]], official_file: Path, tmp_path: Path, prefix: str
) -> None:
    """In either dialect, and beside a transformer with another one."""
    trunk, control = networks
    beside = {"transformer." + name: tensor for name, tensor in trunk.items()}
    expected = load_controlnet(official_file)
    for i, (tensors, others) in enumerate(
        [(official_controlnet(trunk, control), {}), (control, {}), (control, beside)]
    ):
        prefixed = {prefix + name: tensor.clone() for name, tensor in tensors.items()}
        save_file({**prefixed, **others}, path := tmp_path / f"{i}.safetensors")
        found = load_controlnet(path)
        assert found.config == expected.config
        for name, tensor in found.state_dict().items():
            torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=0)
        if tensors is not control or others:
            assert load_transformer(path).config == CONFIG
        else:
            with pytest.raises(CheckpointError, match="is a ControlNet for SANA; give a SANA transformer"):
                load_transformer(path)


def test_a_transformer_is_no_controlnet(networks: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path) -> None:
    save_file(networks[0], path := tmp_path / "transformer.safetensors")
    with pytest.raises(
        CheckpointError, match="transformer.safetensors is a SANA transformer; give a ControlNet for SANA"
    ):
        load_controlnet(path)


@pytest.mark.parametrize(
    "other", ["transformer_blocks.0.ff.net.0.proj.weight", "controlnet.0.copied_block.mlp.fc1.weight"]
)
def test_a_controlnet_for_another_model_is_named(tmp_path: Path, other: str) -> None:
    """That of SD3 or Qwen-Image, and that of PixArt."""
    tensors = {"controlnet_blocks.0.weight": torch.zeros(2, 2), other: torch.zeros(2, 2)}
    save_file(tensors, path := tmp_path / "control.safetensors")
    with pytest.raises(
        CheckpointError, match="control.safetensors is a ControlNet for another model; give a ControlNet for SANA"
    ):
        load_controlnet(path)


def test_a_controlnet_is_no_transformer(networks: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path) -> None:
    save_file(networks[1], path := tmp_path / "control.safetensors")
    (tmp_path / "config.json").write_text(HEADS)
    with pytest.raises(CheckpointError, match="control.safetensors is a ControlNet for SANA; give a SANA transformer"):
        load_transformer(path)


def test_a_controlnet_without_a_tensor_is_refused(
    networks: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    del networks[1]["controlnet_blocks.1.bias"]
    save_file(networks[1], path := tmp_path / "control.safetensors")
    (tmp_path / "config.json").write_text(HEADS)
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ tensors, first controlnet_blocks.1.bias;"):
        load_controlnet(path)
