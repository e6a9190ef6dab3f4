"""Other packs with ids of ours: what the log says about them, and what is said to prompts that were made for them."""

import asyncio
import copy
import logging
import shutil

import execution
import folder_paths
import pytest
from aiohttp import web
from server import PromptServer

import nodes
from tests.host.boot import Host
from tests.host.graphs import Prompt, node, text_to_image

OLD = {
    "4": node("SanaCheckpointLoader", ckpt_name="Sana_1600M_1024px.pth", model="SanaMS_1600M_P1_D20", dtype="BF16"),
    "5": node("GemmaLoader", model_name="Efficient-Large-Model/gemma-2-2b-it", device="cpu", dtype="default"),
    "6": node("GemmaTextEncode", text="a cat", GEMMA=("5", 0)),
}


class Theirs:
    """A node of the other pack."""

    CATEGORY = "ExtraModels/Sana"
    RELATIVE_PYTHON_MODULE = "custom_nodes.ComfyUI_ExtraModels"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"ckpt_name": ("STRING",)}}


def verdict(prompt: Prompt) -> tuple:
    return asyncio.run(execution.validate_prompt("test", copy.deepcopy(prompt), None))


@pytest.mark.parametrize(
    ("left_out", "sentence"),
    [
        (
            (),
            "node 4, SanaCheckpointLoader, has the input ckpt_name of ComfyUI_ExtraModels, where that of ComfyUI-Sana has model",
        ),
        (
            ("4",),
            "node 6, GemmaTextEncode, has the input GEMMA of ComfyUI_ExtraModels, where that of ComfyUI-Sana has clip",
        ),
    ],
)
@pytest.mark.usefixtures("host")
def test_prompts_of_the_other_pack_are_refused_in_one_sentence(left_out: tuple[str, ...], sentence: str) -> None:
    """Before anything that the host would say about each of their nodes."""
    valid, error, outputs, node_errors = verdict({name: found for name, found in OLD.items() if name not in left_out})
    assert not valid and not outputs and not node_errors
    assert error["message"] == (
        f"{sentence}: open the workflow in ComfyUI, which translates it, and export it for the API again"
    )


@pytest.mark.usefixtures("host")
def test_all_other_prompts_are_judged_by_the_host() -> None:
    assert verdict(text_to_image())[0] is True
    for prompt in ({"5": OLD["5"]}, {"1": {"inputs": {}}}, {"1": {"class_type": "KSampler", "inputs": {}}}):
        valid, error, *_ = verdict(prompt)
        assert not valid and "ExtraModels" not in error["message"]


def test_where_their_nodes_are_in_use_the_host_judges(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(host.nodes, "SanaCheckpointLoader", Theirs)
    (_, error, *_) = verdict({"4": OLD["4"]})
    assert error["type"] == "prompt_no_outputs"


def test_log_tells_whose_nodes_are_in_use(
    host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours, if the other pack was loaded before; its own, if it came after."""
    app = web.Application()
    monkeypatch.setattr(PromptServer.instance, "app", app)
    tell = host.pack("nodes.host.other_packs").tell_of_other_packs
    ids = ["SanaCheckpointLoader", "GemmaTextEncode"]
    ours = {name: host.nodes[name] for name in ids}
    sentence = (
        "custom_nodes.ComfyUI_ExtraModels and ComfyUI-Sana both have nodes called GemmaTextEncode, SanaCheckpointLoader, and those "
        "of {} are in use: disable one of the two packs, or workflows of the other do not run"
    )

    def messages() -> list[str]:
        found = [text for text in caplog.messages if "both have" in text]
        caplog.clear()
        return found

    with caplog.at_level(logging.WARNING):
        for before, at_load, after, at_start in (
            (ours, [], ours, []),
            (dict.fromkeys(ids, Theirs), [sentence.format("ComfyUI-Sana")], ours, []),
            (ours, [], dict.fromkeys(ids, Theirs), [sentence.format("custom_nodes.ComfyUI_ExtraModels")]),
        ):
            for name in ids:
                monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, before[name])
            tell(ids)
            assert messages() == at_load
            for name in ids:
                monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, after[name])
            asyncio.run(app.on_startup[-1](app))
            assert messages() == at_start


def test_models_that_the_other_pack_downloaded_are_in_the_list(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, behind the host's own folders, and only where there are any."""
    files = host.pack("nodes.model_files")
    paths, suffixes = folder_paths.folder_names_and_paths["diffusion_models"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", (paths[:], suffixes))
    files.adopt_downloads()
    assert folder_paths.get_folder_paths("diffusion_models") == paths
    name = "models--sana--sana-1600m-1024px/checkpoints/Sana_1600M_1024px.pth"
    path = host.base / "models" / "sana" / name
    path.parent.mkdir(parents=True)
    path.touch()
    try:
        for _ in range(2):
            files.adopt_downloads()
            assert folder_paths.get_folder_paths("diffusion_models") == [*paths, str(host.base / "models" / "sana")]
        assert name in files.model_names() and files.model_path(name) == path
    finally:
        shutil.rmtree(host.base / "models" / "sana")
