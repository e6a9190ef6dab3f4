"""What a person does wrong, and what each node says about it: one sentence, with what to do."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.host.inprocess.small import (
    AUTOENCODER,
    TEXT_ENCODER,
    Small,
    load,
    picture,
    write_variant,
)

WRONG = {
    "lora": ({"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 4)}, "a LoRA"),
    "sd": ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4)}, "a Stable Diffusion model"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": torch.ones(4)}, "a Flux model"),
    "clip": ({"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(4)}, "the text encoder of another model"),
    "vae": ({"decoder.up.0.block.0.conv1.weight": torch.ones(4)}, "the VAE of another model"),
    "other": ({"something": torch.ones(4)}, "a file of unknown kind (its first tensor is something)"),
}
FOLDERS = {"model": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}


@pytest.fixture(scope="module")
def wrong(small: Small) -> Iterator[None]:
    """Files of other kinds in every folder of models."""
    paths = []
    for folder in FOLDERS.values():
        for name, (tensors, _) in WRONG.items():
            paths.append(small.host.base / "models" / folder / f"wrong-{name}.safetensors")
            save_file(tensors, paths[-1])
    yield
    for path in paths:
        path.unlink()


def one_sentence(error: BaseException) -> str:
    """The message of an error, which is for a person: one line, no path of a machine, no name of a class."""
    message = str(error)
    assert "\n" not in message and len(message) < 300 and "Traceback" not in message
    return message


@pytest.mark.newest
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("place", FOLDERS)
@pytest.mark.usefixtures("wrong")
def test_wrong_file_is_named_for_what_it_is(small: Small, place: str, kind: str) -> None:
    inputs = {"model": small.path.name, "text_encoder": TEXT_ENCODER, "vae": AUTOENCODER, "dtype": "auto"}
    name = f"wrong-{kind}.safetensors"
    with pytest.raises(ValueError) as caught:
        small.host.call("SanaCheckpointLoader", **{**inputs, place: name})
    message = one_sentence(caught.value)
    assert message.startswith(f"{name} is {WRONG[kind][1]}; give a ")
    if place != "model":
        node = {"text_encoder": "SanaTextEncoderLoader", "vae": "DCAELoader"}[place]
        with pytest.raises(ValueError) as caught:
            small.host.call(node, **{place: name}, dtype="auto")
        assert one_sentence(caught.value) == message


@pytest.mark.newest
def test_our_files_in_the_wrong_place(small: Small) -> None:
    model = small.host.base / "models" / "vae" / "transformer.safetensors"
    save_file(load_file(small.path), model)
    with pytest.raises(ValueError, match=r"^transformer.safetensors is a SANA transformer; give a DC-AE, such as"):
        small.host.call("DCAELoader", vae=model.name, dtype="auto")
    model.unlink()


@pytest.mark.newest
def test_broken_and_incomplete_files(small: Small) -> None:
    folder = small.path.parent
    whole = small.path.read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "text.safetensors").write_text("<html>not found</html>", encoding="utf-8")
    (folder / "broken.pth").write_bytes(b"not a checkpoint")
    tensors = load_file(small.path)
    del tensors["transformer_blocks.1.attn2.to_out.0.bias"]
    (folder / "config.json").write_text('{"num_cross_attention_heads": 2}', encoding="utf-8")
    save_file(tensors, folder / "partial.safetensors")
    expected = {
        "cut.safetensors": "cut.safetensors is not a readable safetensors file",
        "text.safetensors": "text.safetensors is a web page; download the file itself",
        "broken.pth": "broken.pth is not a readable PyTorch file; the download may be incomplete",
        "partial.safetensors": "partial.safetensors lacks 1 of 73 tensors, first transformer_blocks.1.attn2.to_out.0.bias;",
    }
    for name, text in expected.items():
        with pytest.raises(ValueError) as caught:
            load(small.host, name)
        assert text in one_sentence(caught.value) and name in str(caught.value)
        (folder / name).unlink()
    (folder / "config.json").unlink()


@pytest.mark.newest
def test_pickle_with_code_is_refused(small: Small) -> None:
    path = small.path.with_name("code.pth")
    torch.save({"state_dict": Path("somewhere")}, path)
    with pytest.raises(ValueError, match="needs code to be read and is refused"):
        load(small.host, path.name)
    path.unlink()


@pytest.mark.parametrize(
    ("folder", "what", "source"),
    [
        ("text_encoders", "a Gemma-2-2b-it text encoder", "Efficient-Large-Model/gemma-2-2b-it"),
        ("vae", "a DC-AE f32c32 autoencoder", "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"),
    ],
)
def test_missing_part_is_named_with_its_source_and_its_folder(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, what: str, source: str
) -> None:
    empty = ([str(tmp_path)], folder_paths.folder_names_and_paths[folder][1])
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, empty)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    with pytest.raises(ValueError) as caught:
        load(small.host, small.path.name)
    assert one_sentence(caught.value) == (
        f"{small.path.name} comes without {what}, and models/{folder} holds none; download {source} "
        f"and put it into models/{folder}, under any name"
    )


def test_entry_that_is_gone(small: Small) -> None:
    for inputs, message in (
        (
            {"name": "gone.safetensors"},
            "gone.safetensors is in none of the folders models/diffusion_models, models/checkp",
        ),
        ({"name": small.path.name, "vae": "gone"}, "gone is not in models/vae; choose another, or press R"),
        ({"name": small.path.name, "text_encoder": "gone"}, "gone is not in models/text_encoders; choose another"),
    ):
        with pytest.raises(ValueError) as caught:
            load(small.host, **inputs)
        assert one_sentence(caught.value).startswith(message)


@pytest.mark.parametrize("channels", [4, 16, 128])
def test_latent_of_another_model(small: Small, channels: int) -> None:
    """Of a picture: an empty one of the host is made into ours."""
    latent = {"samples": torch.randn(1, channels, 8, 8)}
    for run in (small.ksampler, lambda latent_image: small.sample(latent=latent_image)):
        with pytest.raises(ValueError) as caught:
            run(latent_image=latent)
        assert one_sentence(caught.value).startswith(
            f"this latent has {channels} channels, and SANA takes 32; use Empty"
        )
    for node in ("VAEDecode", "DCAEDecode"):
        more = {"max_memory": 0.0} if node == "DCAEDecode" else {}
        with pytest.raises(ValueError) as caught:
            small.host.call(node, samples=latent, vae=small.vae, **more)
        assert f"not (1, {channels}, 8, 8); it was made by another model" in one_sentence(caught.value)


def test_latent_of_a_video(small: Small) -> None:
    latent = {"samples": torch.randn(1, 32, 1, 8, 8)}
    for run in (small.ksampler, lambda latent_image: small.sample(latent=latent_image)):
        with pytest.raises(ValueError, match="^this latent has 5 dimensions, and SANA takes 4; use Empty"):
            run(latent_image=latent)
    tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    for node, more in (("VAEDecode", {}), ("DCAEDecode", {"max_memory": 0.0}), ("VAEDecodeTiled", tiles)):
        with pytest.raises(ValueError, match=r"not \(1, 32, 1, 8, 8\); it was made by another model"):
            small.host.call(node, samples=latent, vae=small.vae, **more)


def test_sizes_that_are_no_multiple_of_32(small: Small) -> None:
    with pytest.raises(ValueError, match=r"^width 100 is not a multiple of 32 px from 32 to 16384; use 96$"):
        small.empty(width=100)
    with pytest.raises(ValueError, match=r"^height 1000 is not a multiple of 32 px from 32 to 16384; use 992$"):
        small.empty(height=1000)
    for node, more in (("DCAEEncode", {"max_memory": 0.0}), ("VAEEncode", {})):
        with pytest.raises(ValueError, match=r"^the picture has 64 x 20 px; both sides must be at least 32 px$"):
            small.host.call(node, pixels=picture(20, 64), vae=small.vae, **more)


def test_conditioning_of_another_text_encoder(small: Small) -> None:
    other = [[torch.zeros(1, 77, 768), {"pooled_output": torch.zeros(1, 768)}]]
    expected = "this conditioning has width 768, and this SANA model takes 192; encode the prompt with the CLIP of the SANA loader"
    for run in (small.ksampler, small.sample):
        for inputs in ({"positive": other}, {"negative": other}):
            with pytest.raises(ValueError) as caught:
                run(**inputs)
            assert one_sentence(caught.value) == expected


def test_sampling_that_breaks_down(small: Small) -> None:
    """People got a black picture and no word why."""
    model = load(small.host, write_variant(small.host, "sana-1.6b-1024px", seed=3).name)[0]
    model.model.diffusion_model.proj_out.weight.data[0] = float("nan")
    expected = (
        "sampling gave numbers that are not finite, computing in torch.float32; a LoRA, a ControlNet or the checkpoint is "
        "damaged: try without the first two; or the noise levels repeat or end at 1: choose another schedule"
    )
    for run in (small.ksampler, small.sample):
        with pytest.raises(ValueError) as caught:
            run(model=model)
        assert one_sentence(caught.value) == expected
    model.model.manual_cast_dtype = torch.float16
    advice = "this model was released in bfloat16: load it with dtype auto or fp32; or the noise levels"
    with pytest.raises(ValueError, match=advice):
        model.model.process_latent_out(torch.full((1, 32, 1, 1), float("nan")))
    assert bool(small.ksampler().isfinite().all())


def test_an_autoencoder_that_breaks_down(small: Small) -> None:
    (vae,) = small.host.call("DCAELoader", vae=AUTOENCODER, dtype="auto")
    for run in (vae.decode, vae.decode_tiled):
        with pytest.raises(
            ValueError, match="^the autoencoder gave numbers that are not finite, computing in"
        ) as caught:
            run(torch.full((1, 32, 2, 2), float("nan")))
        one_sentence(caught.value)


def test_nodes_refuse_parts_of_other_models(small: Small) -> None:
    scm = {
        "seed": 0,
        "guidance": 4.5,
        "positive": small.positive,
        "latent": small.empty(),
        "sigmas": torch.tensor([1.0, 0]),
    }
    with pytest.raises(ValueError, match=r"^this MODEL is not SANA-Sprint; use SANA sampler \(Flow-DPM\) for it$"):
        small.host.call("SCMSampler", model=small.model, **scm)
    sprint = load(small.host, write_variant(small.host, "sana-sprint-0.6b-1024px").name)[0]
    prompts = {"positive": small.positive, "negative": small.negative}
    nodes = {
        "FlowDPMSampler": {
            **prompts,
            **{"seed": 0, "steps": 2, "cfg": 4.5, "latent": small.empty(), "denoise": 1.0, "flow_shift": 0.0},
        },
        "FlowDPMScheduler": {"steps": 2, "denoise": 1.0, "flow_shift": 0.0},
        "SanaGuider": {**prompts, "cfg": 4.5},
        "SanaPerturbedAttention": {"pag_scale": 1.0, "pag_block": -1},
    }
    for node, inputs in nodes.items():
        with pytest.raises(
            ValueError, match=r"^this MODEL is SANA-Sprint; use SANA Sprint schedule and SANA Sprint sam"
        ):
            small.host.call(node, model=sprint, **inputs)
    (other,) = small.host.call(
        "ModelSamplingContinuousEDM", model=small.model, sampling="eps", sigma_max=120.0, sigma_min=0.002
    )
    with pytest.raises(
        ValueError, match=r"^flow_dpm is for flow models, .* begin at 120; choose another sampler, such as"
    ):
        small.ksampler(model=other, sampler_name="flow_dpm")
    with pytest.raises(ValueError, match=r"^block 7 does not exist; the transformer has blocks 0 to 2$"):
        small.host.call("SanaPerturbedAttention", model=small.model, pag_scale=1.0, pag_block=7)
    with pytest.raises(ValueError, match=r"^this CLIP is not Gemma-2; connect the CLIP of Load SANA or"):
        small.host.call("GemmaTextEncode", clip=None, text="a", instruction="official")  # from CheckpointLoaderSimple
    (pixels,) = small.host.call("VAELoader", vae_name="pixel_space")
    with pytest.raises(ValueError, match=r"^this VAE is not a DC-AE"):
        small.host.call("DCAEDecode", samples=small.empty(), vae=pixels, max_memory=0.0)
    (other,) = small.host.call("ModelSamplingDiscrete", model=small.model, sampling="eps", zsnr=False)
    with pytest.raises(
        ValueError, match=r"^another node has taken the flow shift from this MODEL; set flow_shift here, "
    ):
        small.sample(model=other)
    for interval in ({"guidance_from": 0.8, "guidance_to": 0.2}, {"guidance_from": 0.5, "guidance_to": 0.5}):
        with pytest.raises(ValueError, match="guidance acts from 0"):
            small.sample(**interval)


TEXT_NODES = {
    "CLIPTextEncodeFlux": ({"clip_l": "a", "t5xxl": "a", "guidance": 3.5}, "t5xxl"),
    "CLIPTextEncodeHiDream": ({"clip_l": "a", "clip_g": "a", "t5xxl": "a", "llama": "a"}, "l"),
    "CLIPTextEncodeHunyuanDiT": ({"bert": "a", "mt5xl": "a"}, "mt5xl"),
    "CLIPTextEncodeKandinsky5": ({"clip_l": "a", "qwen25_7b": "a"}, "qwen25_7b"),
    "CLIPTextEncodeSD3": ({"clip_l": "a", "clip_g": "a", "t5xxl": "a", "empty_padding": "none"}, "l"),
    "CLIPTextEncodeSDXL": (
        {
            "width": 1024,
            "height": 1024,
            "crop_w": 0,
            "crop_h": 0,
            "target_width": 1024,
            "target_height": 1024,
            "text_g": "a",
            "text_l": "a",
        },
        "l",
    ),
}


@pytest.mark.parametrize("node", TEXT_NODES)
def test_text_node_of_another_model(small: Small, node: str) -> None:
    inputs, tokens = TEXT_NODES[node]
    with pytest.raises(KeyError) as caught:
        small.host.call(node, clip=small.clip, **inputs)
    assert one_sentence(caught.value) == (
        f"this CLIP is SANA's text encoder, which makes no {tokens!r} tokens; use SANA prompt or CLIP Text Encode, or "
        "connect the CLIP of the model that this node is for"
    )


def test_tokens_are_an_ordinary_dict(small: Small) -> None:
    """To the host and to other nodes, apart from what a missing entry says."""
    tokens = small.clip.tokenize("a ring")
    assert isinstance(tokens, dict) and tokens == {**tokens} and "l" not in tokens and tokens.get("l") is None
    for copied in ({**tokens}, copy.copy(tokens), copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens))):
        assert copied == tokens
        assert torch.equal(small.clip.encode_from_tokens(copied), small.clip.encode_from_tokens(tokens))


@pytest.mark.parametrize("node", ["FreeU", "FreeU_V2"])
def test_node_for_a_unet(small: Small, node: str) -> None:
    with pytest.raises(KeyError) as caught:
        small.host.call(node, model=small.model, b1=1.1, b2=1.2, s1=0.9, s2=0.2)
    assert one_sentence(caught.value) == (
        "this MODEL is SANA, which has no 'model_channels': this node is for other models, such as SDXL; leave it out"
    )


def test_node_for_softmax_self_attention(small: Small) -> None:
    """It would end in an AttributeError, or for small pictures in nothing."""
    (model,) = small.host.call("SelfAttentionGuidance", model=small.model, scale=0.5, blur_sigma=2.0)
    with pytest.raises(ValueError) as caught:
        small.ksampler(model=model)
    assert one_sentence(caught.value) == (
        "SelfAttentionGuidance reads softmax scores of self-attention, which SANA's linear attention does not have; use "
        "SANA perturbed attention"
    )


@pytest.mark.parametrize("number", ["30000000", "99999999999"])
def test_no_number_of_a_block_asks_for_a_giant(small: Small, number: str) -> None:
    """Nor through the host's own loader, which asks our detection what a file is."""
    path = small.path.with_name("giant.safetensors")
    save_file({**load_file(small.path), f"transformer_blocks.{number}.ff.x": torch.ones(1)}, path)
    said = f"has transformer_blocks.{number}, and no model goes beyond transformer_blocks.255; it is another model"
    try:
        for node, name, inputs in (
            ("SanaCheckpointLoader", path.name, {"model": path.name, "text_encoder": "auto", "vae": "auto"}),
            ("UNETLoader", "the checkpoint", {"unet_name": path.name, "weight_dtype": "default"}),
        ):
            more = {"dtype": "auto"} if node == "SanaCheckpointLoader" else {}
            with pytest.raises(ValueError) as caught:
                small.host.call(node, **inputs, **more)
            assert one_sentence(caught.value) == f"{name} {said}"
    finally:
        path.unlink()
