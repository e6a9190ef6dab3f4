"""Text encoders and autoencoders beside a model: what the lists offer, and how auto passes over what does not fit."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana.config import GemmaConfig
from sana.text.gemma import Gemma2
from tests.host.inprocess.small import AUTOENCODER, DEMO, TEXT_ENCODER, Small, load
from tests.sana.twins import diffusers_autoencoder, randomise, tiny_autoencoder_config

Roots = Callable[..., list[Path]]
SHARDS = "model-0000{}-of-00002.safetensors"


@pytest.fixture
def roots(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    """Call it with a kind of model: empty folders that are all of its roots, until the test ends."""

    def make(kind: str, count: int = 1) -> list[Path]:
        found = [tmp_path / f"{kind}-{k}" for k in range(count)]
        for root in found:
            root.mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(root) for root in found], extensions))
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        return found

    return make


def demo_gemma(folder: Path, shards: bool = False) -> Path:
    """The demo's text encoder as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("text_encoder/config.json", "tokenizer/tokenizer.json"):
        shutil.copy(DEMO / file, folder)
    tensors = load_file(DEMO / "text_encoder" / "model.safetensors")
    names = sorted(tensors)
    parts = [names[::2], names[1::2]] if shards else [names]
    for k, part in enumerate(parts, 1):
        save_file(
            {name: tensors[name] for name in part}, folder / (SHARDS.format(k) if shards else "model.safetensors")
        )
    return folder


def other_gemma(folder: Path) -> Path:
    """A Gemma-2 with texts of another width."""
    demo_gemma(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    fields = {name: value for name, value in config.items() if name in GemmaConfig.__dataclass_fields__}
    save_file(randomise(Gemma2(GemmaConfig(**fields))).state_dict(), folder / "model.safetensors")
    return folder


def autoencoder(path: Path, family: str) -> Path:
    """A small DC-AE, with the latent scale of its family beside it."""
    network = diffusers_autoencoder(tiny_autoencoder_config(family))
    tensors: dict[str, Tensor] = dict(randomise(network).state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    (path.parent / "config.json").write_text(json.dumps({"scaling_factor": network.config.scaling_factor}))
    return path


def options(small: Small, name: str) -> list[str]:
    return small.host.nodes["SanaCheckpointLoader"].INPUT_TYPES()["required"][name][1]["options"]


def chosen(small: Small) -> tuple[str, str]:
    """Text encoder and autoencoder that auto has taken."""
    _, clip, vae = load(small.host, small.path.name)
    return tuple(str(part.patcher.cached_patcher_init[1][0]) for part in (clip, vae))


def test_a_folder_of_shards_is_one_entry_at_any_depth(small: Small, roots: Roots) -> None:
    (root,) = roots("text_encoders")
    folder = demo_gemma(root / "google" / "gemma-2-2b-it", shards=True)
    shutil.copy(DEMO / "text_encoder" / "model.safetensors", root / "single.safetensors")
    assert options(small, "text_encoder") == ["auto", "google/gemma-2-2b-it", "single.safetensors"]
    assert chosen(small)[0] == str(folder)
    for part in ("google/gemma-2-2b-it", "auto"):
        load(small.host, small.path.name, text_encoder=part)


def test_the_base_model_is_told(small: Small, roots: Roots, caplog: pytest.LogCaptureFixture) -> None:
    (root,) = roots("text_encoders")
    demo_gemma(root / "gemma-2-2b-it")
    demo_gemma(root / "gemma-2-2b")
    for name, told in (("auto", 0), ("gemma-2-2b", 1)):
        caplog.clear()
        load(small.host, small.path.name, text_encoder=name)
        assert sum(message.startswith("gemma-2-2b is named like the base") for message in caplog.messages) == told


def test_auto_looks_on_after_what_cannot_be_loaded(small: Small, roots: Roots) -> None:
    """An incomplete download, a Gemma of another width and another text encoder stand before the one that fits."""
    (root,) = roots("text_encoders")
    (demo_gemma(root / "a-it", shards=True) / SHARDS.format(2)).unlink()
    other_gemma(root / "b-it")
    save_file({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(1)}, root / "c-it.safetensors")
    (root / "d-it.safetensors").write_bytes(b"no such thing")
    good = demo_gemma(root / "z")
    assert chosen(small)[0] == str(good)
    shutil.rmtree(good)
    found = f"{small.path.name} comes without a Gemma-2-2b-it text encoder, and nothing in models/text_encoders fits ("
    with pytest.raises(ValueError) as error:
        load(small.host, small.path.name)
    message = str(error.value)
    assert message.startswith(found) and message.count(";") == 1
    for reason in (
        "a-it holds 1 of 2 shards",
        "b-it is a Gemma-2 of width 64, and the transformer takes texts of width 192",
        "c-it.safetensors is the text encoder of another model",
        "d-it.safetensors is not a readable safetensors file",
    ):
        assert reason in message


def test_a_chosen_text_encoder_of_another_width_is_refused_when_it_is_loaded(small: Small, roots: Roots) -> None:
    (root,) = roots("text_encoders")
    other_gemma(root / "other")
    with pytest.raises(
        ValueError, match="other is a Gemma-2 of width 64, and the transformer takes texts of width 192"
    ):
        load(small.host, small.path.name, text_encoder="other")


def test_auto_takes_no_autoencoder_of_another_family(small: Small, roots: Roots) -> None:
    """Those trained on ImageNet have the same shapes and other latents."""
    (root,) = roots("vae")
    autoencoder(root / "a" / "diffusion_pytorch_model.safetensors", "dc-ae-f32c32-in-1.0")
    autoencoder(root / "b" / "model.safetensors", "dc-ae-f64c128-in-1.0")
    shutil.copytree(DEMO / "vae", root / "z")
    assert chosen(small)[1] == str(root / "z")
    message = "a is a DC-AE of another family, with latents scaled by 0.3189 instead of 0.41407; give one that SANA"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(small.host, small.path.name, vae="a")
    shutil.rmtree(root / "z")
    with pytest.raises(ValueError, match="b is a DC-AE f64c32, and the transformer takes latents of an f32c32"):
        load(small.host, small.path.name)


def test_the_vae_of_another_model_under_the_name_of_a_download_is_told_apart(small: Small, roots: Roots) -> None:
    """Many repositories call their VAE so."""
    (root,) = roots("vae")
    other = root / "diffusion_pytorch_model.safetensors"
    save_file({"decoder.up_blocks.0.resnets.0.conv1.weight": torch.ones(4)}, other)
    message = f"{other.name} is the VAE of another model"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(small.host, small.path.name, vae=other.name)
    missing = f"nothing in models/vae fits ({message}); download mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers and put it"
    with pytest.raises(ValueError, match=re.escape(missing)):
        load(small.host, small.path.name)
    ours = shutil.copy(
        DEMO / "vae" / other.name, root / "sana.safetensors"
    )  # which stands behind the other in the list
    assert chosen(small)[1] == str(ours)


@pytest.mark.parametrize("suffix", [".sft", ".ckpt", ".pth", ".safetensors"])
def test_auto_reads_every_suffix(small: Small, roots: Roots, suffix: str) -> None:
    (root,) = roots("vae")
    tensors = load_file(DEMO / "vae" / "diffusion_pytorch_model.safetensors")
    path = root / f"autoencoder{suffix}"
    save_file(tensors, path) if suffix in (".sft", ".safetensors") else torch.save(tensors, path)
    assert chosen(small)[1] == str(path)


def test_of_two_folders_with_one_name_the_first_root_wins_and_the_second_is_there(small: Small, roots: Roots) -> None:
    first, second = roots("vae", 2)
    for root in (first, second):
        shutil.copytree(DEMO / "vae", root / "dc-ae")
    models = small.host.pack("nodes.model_files")
    names = models.part_names("vae")
    assert names[:2] == ["dc-ae", f"dc-ae [{second}]"]
    assert [models.part_path("vae", name) for name in names[:2]] == [first / "dc-ae", second / "dc-ae"]


def test_links_to_a_folder_above_them_end(small: Small, roots: Roots) -> None:
    """Two of them in models/diffusers once made a list that never ended."""
    (root,) = roots("diffusers")
    shutil.copytree(DEMO, root / "author" / "model")
    for name in ("loop", "again"):
        (root / "author" / name).symlink_to(root, target_is_directory=True)
    entries = [name for name in small.host.pack("nodes.model_files").model_names() if "model" in name.split("/")]
    assert entries == ["author/model"]


def test_a_folder_among_the_diffusion_models_is_offered(small: Small, roots: Roots) -> None:
    (root,) = roots("diffusion_models")
    shutil.copytree(DEMO / "transformer", root / "mine" / "transformer")
    assert "mine/transformer" in options(small, "model")
    assert load(small.host, "mine/transformer")[0].model.identity.config.depth == 8


def test_auto_looks_on_where_a_part_of_the_model_has_no_weights(small: Small, roots: Roots) -> None:
    """A download that left the text encoder of a pipeline out."""
    (pipelines,), (encoders,) = roots("diffusers"), roots("text_encoders")
    shutil.copytree(DEMO, pipelines / "pipe")
    (pipelines / "pipe" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="text_encoder holds no .safetensors or .pth file"):
        load(small.host, "pipe")
    good = demo_gemma(encoders / "gemma")
    assert str(load(small.host, "pipe")[1].patcher.cached_patcher_init[1][0]) == str(good)


def test_shards_in_the_root_itself_are_one_entry(small: Small, roots: Roots) -> None:
    (root,) = roots("text_encoders")
    root.rmdir()
    demo_gemma(root, shards=True)
    assert options(small, "text_encoder") == ["auto", "."]
    assert chosen(small)[0] == str(root)


def test_every_link_to_a_folder_is_offered_and_models_inside_of_models_too(small: Small, roots: Roots) -> None:
    (root,) = roots("vae")
    shutil.copytree(DEMO / "vae", root / "author" / "dc-ae")
    (root / "author" / "config.json").write_text("{}")
    (root / "author" / "other.safetensors").touch()
    for name in ("a link", "zwei-ü"):
        (root / name).symlink_to(root / "author" / "dc-ae", target_is_directory=True)
    names = small.host.pack("nodes.model_files").part_names("vae")
    assert names[:4] == ["a link", "author", "author/dc-ae", "zwei-ü"]
    load(small.host, small.path.name, vae="zwei-ü")


def test_nothing_there_says_what_to_download(small: Small, roots: Roots) -> None:
    roots("vae")
    message = (
        f"{small.path.name} comes without a DC-AE f32c32 autoencoder, and models/vae holds none; download "
        "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers and put it into models/vae, under any name"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load(small.host, small.path.name)


def test_auto_passes_over_a_link_that_leads_nowhere(small: Small) -> None:
    link = small.host.base / "models" / "vae" / "it.safetensors"  # which is looked at first
    link.symlink_to("nowhere")
    try:
        assert link.name in small.host.pack("nodes.model_files").part_names("vae")
        assert [Path(part).name for part in chosen(small)] == [TEXT_ENCODER, AUTOENCODER]
    finally:
        link.unlink()


def test_auto_takes_the_gemma_that_knows_instructions(small: Small, roots: Roots) -> None:
    """The host has the other one too, for Lumina, and its name comes first. Their tensors are alike."""
    (root,) = roots("text_encoders")
    demo_gemma(root / "gemma_2_2b_fp16")
    demo_gemma(root / "gemma_2_2b_it_elm_bf16")
    assert Path(chosen(small)[0]).name == "gemma_2_2b_it_elm_bf16"
