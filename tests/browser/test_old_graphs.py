"""Workflows of other SANA packs are opened with our nodes, in both ways of drawing nodes: values, wires, and what is told."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Route

from tests.browser import old_graphs
from tests.browser.frontend import Frontend
from tests.host import stand_ins
from tests.host.graphs import FREE_SIZE, changed, node
from tests.workflows import graph

SEED = 763443243300024
DEMO = {"model": "demo", "text_encoder": "auto", "vae": "auto", "variant": "auto"}
TRANSLATE = """async ([workflow, entries, taken]) => {
    const {translate} = await import("/extensions/ComfyUI-Sana/translation.js")
    const changed = translate(workflow, list => entries[list] ?? [], type => !taken.includes(type))
    return [changed, workflow]
}"""
SHARED = ("SanaCheckpointLoader", "EmptySanaLatentImage", "GemmaTextEncode")


def prompt_of(number: int, text: str, instruction: str) -> dict[str, dict]:
    inputs = {"text": text, "instruction": instruction, "custom_instruction": "", "style": "none"}
    return {str(number): node("GemmaTextEncode", clip=("1", 1), **inputs)}


def loader(model: str, **inputs: str) -> dict[str, dict]:
    return {"1": node("SanaCheckpointLoader", **DEMO | {"model": model, "dtype": "auto"} | inputs)}


WHOLE = {  # what becomes of old_graphs.text_to_image
    **loader("Sana_1600M_1024px.pth", dtype="fp32"),
    "3": node("PrimitiveInt", value=608),
    "13": node("PrimitiveInt", value=416),
    "4": node("EmptySanaLatentImage", size=FREE_SIZE, width=("3", 0), height=("13", 0), batch_size=1),
    **prompt_of(5, "a red circle", "official"),
    **prompt_of(6, "blurry", "none"),
    "7": node(
        "KSampler",
        seed=SEED,
        steps=28,
        cfg=2,
        sampler_name="euler",
        scheduler="normal",
        denoise=1,
        model=("1", 0),
        positive=("5", 0),
        negative=("6", 0),
        latent_image=("4", 0),
    ),
    "9": node("VAEDecode", samples=("7", 0), vae=("1", 2)),
    "10": node("PreviewImage", images=("9", 0)),
}
SPRINT = {  # and of its form with scm, which leaves the negative prompt without a use
    **{name: found for name, found in WHOLE.items() if name != "7"},
    **loader("Sana_Sprint_1.6B_1024px.pth", dtype="fp32"),
    "7": node(
        "SCMSampler", seed=SEED, guidance=5, model=("1", 0), positive=("5", 0), latent=("4", 0), sigmas=("14", 0)
    ),
    "14": node("SCMScheduler", steps=2, max_angle=1.5708, intermediate_angle=1.3, paper_angles=False),
}
ENCLOSED = {  # the same in a subgraph, node 20
    **{name: found for name, found in WHOLE.items() if name not in "57"},
    "22": WHOLE["13"],
    "20:5": WHOLE["5"],
    "20:7": node("KSampler", **{**WHOLE["7"]["inputs"], "positive": ("20:5", 0)}),
    "9": node("VAEDecode", samples=("20:7", 0), vae=("1", 2)),
    "4": changed(WHOLE, **{"4": {"height": ("22", 0)}})["4"],
}
del ENCLOSED["13"]
LIGHTNING = {
    **loader("Sana_600M_512px.pth", dtype="fp8"),
    "4": node("EmptySanaLatentImage", size=FREE_SIZE, width=992, height=512, batch_size=2),
    **prompt_of(5, "a red circle", "none"),
    **prompt_of(6, "", "none"),
    **{name: WHOLE[name] for name in ("7", "9", "10")},
}
CASES: dict[str, tuple[Callable[[], dict], dict]] = {
    "euler": (old_graphs.text_to_image, WHOLE),
    "scm": (lambda: old_graphs.text_to_image("scm"), SPRINT),
    "subgraph": (old_graphs.in_a_subgraph, ENCLOSED),
    "lightning": (old_graphs.of_lightning, LIGHTNING),
}


def bare(prompt: dict[str, dict]) -> dict[str, dict]:
    """Without titles."""
    return {name: {key: found[key] for key in ("class_type", "inputs")} for name, found in prompt.items()}


def notes(page: Frontend) -> list[str]:
    return [found["widgets_values"][0] for found in page.workflow()["nodes"] if found["type"] == "MarkdownNote"]


def overlapping(nodes: list[dict]) -> list[tuple[str, str]]:
    """Pairs of nodes of which one lies on the other."""
    return [
        (one["type"], other["type"])
        for one, other in itertools.combinations(nodes, 2)
        if all(one["pos"][k] < other["pos"][k] + other["size"][k] for k in (0, 1))
        and all(other["pos"][k] < one["pos"][k] + one["size"][k] for k in (0, 1))
    ]


@pytest.mark.parametrize("name", CASES)
def test_old_graph_has_our_nodes_with_its_values_and_wires(opened: Frontend, name: str) -> None:
    """Saved and opened again it is the same: nothing is translated twice."""
    make, wanted = CASES[name]
    opened.load(make())
    assert bare(opened.prompt()) == wanted
    (note,) = notes(opened)
    saved = opened.workflow()
    assert not overlapping(saved["nodes"])
    assert "GEMMA" not in str({key: saved[key] for key in ("nodes", "links")}).replace(note, "").replace(
        "'name': 'GEMMA'", ""
    )
    opened.load(copy.deepcopy(saved))
    assert bare(opened.prompt()) == wanted and notes(opened) == [note]
    assert not opened.exceptions, opened.report()


def test_note_says_what_became_of_what_and_which_file_to_choose(opened: Frontend) -> None:
    """And the user interface offers the file for download, as it does for those of our own workflows."""
    opened.load(old_graphs.text_to_image("scm"))
    (note,) = notes(opened)
    for line in (
        "- `GemmaTextEncode`: *SANA prompt* without instruction",
        "- `ScmModelSampling`: *guidance* of *SANA Sprint sampler*",
        "- **choose a model in Load SANA**: none of your files is called `sana_sprint_1.6b_1024px`. Download "
        "[Sana_Sprint_1.6B_1024px.pth](https://huggingface.co/Efficient-Large-Model/Sana_Sprint_1.6B_1024px/resolve/main/"
        "checkpoints/Sana_Sprint_1.6B_1024px.pth) into `models/diffusion_models` and press R, or take `demo`, with *auto* below "
        "it, for a try.",
        "- vae: none of your files is called `dc-ae-f32c32-sana-1.1`. *auto* takes the first that fits.",
    ):
        assert line in note.splitlines()
    (loads,) = (found for found in opened.workflow()["nodes"] if found["type"] == "SanaCheckpointLoader")
    assert loads["properties"]["models"] == [
        {
            "name": "Sana_Sprint_1.6B_1024px.pth",
            "url": "https://huggingface.co/Efficient-Large-Model/Sana_Sprint_1.6B_1024px/resolve/main/checkpoints/"
            "Sana_Sprint_1.6B_1024px.pth",
            "directory": "diffusion_models",
        }
    ]


def alone(kind: str, values: list, inputs: dict | None = None, **more: object) -> dict:
    old_graphs.PLACES[99] = (0, 0)
    found = old_graphs.node(99, kind, values, inputs or {}, {}, **more)
    return old_graphs.workflow([found], [])


def translated(page: Frontend, workflow: dict, entries: dict | None = None, taken: tuple = ()) -> list[dict] | None:
    """The nodes of a workflow after its translation, without the note; None, if it stayed to the letter as it was."""
    changed, after = page.page.evaluate(TRANSLATE, [workflow, entries or {}, list(taken)])
    assert changed or after == workflow
    assert not changed or all(isinstance(link, list) for link in after["links"])
    return [found for found in after["nodes"] if found["type"] != "MarkdownNote"] if changed else None


NO_PACK, THIRD = {"properties": {}}, {"properties": {"cnr_id": "comfyui-llm-party"}}
GEMMA = {"GEMMA": ("GEMMA", None)}


@pytest.mark.parametrize(
    "workflow",
    [
        alone("GemmaLoader", ["gemma-2-9b", "cuda", "BF16"], **NO_PACK),
        alone("GemmaLoader", ["Efficient-Large-Model/gemma-2-2b-it", "cuda", "BF16"], **THIRD),
        alone("ExtraVAELoader", ["vae.safetensors", "kl-f8", "FP32"]),
        alone("KSampler", [1, "fixed", 2, 1.0, "euler", "simple", 1.0], **NO_PACK),
        alone("KSamplerAdvanced", ["enable", 1, "fixed", 2, 1.0, "lcm"], **NO_PACK),
        alone("EmptySanaLatentImage", [FREE_SIZE, 512, 512, 1]),
        alone("SanaCheckpointLoader", ["demo", "auto", "auto", "auto", "auto"]),
        alone("GemmaTextEncode", ["a cat", "official", "", "none"], {"clip": ("CLIP", None)}),
        alone("SanaTextEncode", ["a cat"], **NO_PACK),
        alone("constructor", []),
        {"nodes": [], "links": []},
        {"nodes": None},
        {},
    ],
    ids=lambda workflow: workflow["nodes"][0]["type"] if workflow.get("nodes") else str(workflow),
)
def test_other_nodes_stay_as_they_are(opened: Frontend, workflow: dict) -> None:
    assert translated(opened, workflow) is None


def test_our_own_workflows_stay_as_they_are(opened: Frontend) -> None:
    """To the letter, whatever pack is said to have written them."""
    for name in graph.NAMES:
        workflow = graph.read(name)
        assert translated(opened, workflow) is None
        for found in workflow["nodes"]:
            found["properties"]["cnr_id"] = "ComfyUI_ExtraModels"
        assert translated(opened, workflow) is None


def test_a_node_of_a_third_pack_that_is_installed_stays(opened: Frontend) -> None:
    workflow = alone("GemmaLoader", [old_graphs.TEXT_ENCODER, "cpu", "default"], **NO_PACK)
    assert translated(opened, workflow, taken=("GemmaLoader",)) is None
    assert translated(opened, workflow) is not None


ENTRIES = {
    "model": ["demo", "models--sana--sana-1600m-1024px/checkpoints/Sana_1600M_1024px.pth", "sub\\mine.safetensors"],
    "text_encoder": ["auto", "models-efficient-large-model--gemma-2-2b-it"],
    "vae": ["auto", "dc-ae-f32c32-sana-1.1-diffusers", "models--mit-han-lab--dc-ae-f32c32-sana-1.0-diffusers"],
}


@pytest.mark.parametrize(
    ("kind", "values", "inputs", "wanted"),
    [
        (
            "SanaCheckpointLoader",
            ["Efficient-Large-Model/Sana_1600M_1024px", "SanaMS_1600M_P1_D20_4K"],
            None,
            [ENTRIES["model"][1], "auto", "auto", "auto", "auto"],
        ),
        (
            "SanaCheckpointLoader",
            ["mine.pth", "SanaMS_1600M_P1_D20_2K", "BF16"],
            None,
            ["sub\\mine.safetensors", "auto", "auto", "bf16", "sana-1.6b-2048px"],
        ),
        (
            "SanaCheckpointLoader",
            ["gone.pth", "SanaMS_1600M_P1_D20_4K", "FP16", False],
            None,
            ["gone.pth", "auto", "auto", "fp16", "sana-1.6b-4096px"],
        ),
        ("GemmaLoader", [old_graphs.TEXT_ENCODER, "cuda", "FP16"], None, [ENTRIES["text_encoder"][1], "auto"]),
        ("GemmaLoader", ["google/gemma-2-2b-it", "cpu", "FP32"], None, [ENTRIES["text_encoder"][1], "fp32"]),
        (
            "ExtraVAELoader",
            [old_graphs.AUTOENCODER, "dcae-f32c32-sana-1.0-diffusers", "BF16"],
            None,
            [ENTRIES["vae"][1], "bf16"],
        ),
        (
            "ExtraVAELoader",
            ["mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", "", "auto"],
            None,
            [ENTRIES["vae"][2], "auto"],
        ),
        ("EmptySanaLatentImage", [1000, 16, 100], None, [FREE_SIZE, 992, 32, 64]),
        ("EmptyDCAELatentImage", [512, 768, 1], None, [FREE_SIZE, 512, 768, 1]),
        ("GemmaTextEncode", ["ugly"], GEMMA, ["ugly", "none", "", "none"]),
        ("KSampler", [7, "increment", 4, 1.0, "scm", "simple", 1.0], None, [7, "increment", 4.5]),
        ("KSamplerAdvanced", ["enable", 7, "fixed", 4, 1.0, "scm"], None, [7, "fixed", 4.5]),
    ],
)
def test_values_become_ours(opened: Frontend, kind: str, values: list, inputs: dict | None, wanted: list) -> None:
    """Files are found by what they are called, wherever they are; sizes are whole cells of the latent."""
    (first, *more) = translated(opened, alone(kind, values, inputs), ENTRIES) or []
    assert first["widgets_values"] == wanted
    assert [found["widgets_values"] for found in more] == (
        [[4, 1.5708, 1.3, False]] if kind.startswith("KSampler") else []
    )


@pytest.mark.parametrize("kind", ["SanaResolutionCond", "ScmModelSampling", "ApplyMBCacheAndSkipBlocksForSana"])
def test_nodes_without_a_counterpart_are_gone(opened: Frontend, kind: str) -> None:
    assert translated(opened, alone(kind, [1024, 1024])) == []


@pytest.mark.parametrize(
    ("model", "ratio", "size"),
    [
        ("1024px", "0.25", [512, 2048]),
        ("SanaMS_600M_P1_D28", "3.62", [1856, 512]),
        ("512px", "1.07", [512, 480]),
        ("2K", "0.94", [1920, 2048]),
        ("SanaMS_1600M_P1_D20_4K", "4.00", [8192, 2048]),
    ],
)
def test_ratios_become_the_sizes_that_they_stood_for(opened: Frontend, model: str, ratio: str, size: list[int]) -> None:
    made = translated(opened, alone("SanaResolutionSelect", [model, ratio])) or []
    assert [found["widgets_values"] for found in made] == [[side, "fixed"] for side in size]


def test_old_graph_draws(frontend: Frontend, tmp_path: Path) -> None:
    """With files where the old pack has put them, at once; and with the demo chosen, as the note says."""
    base = "diffusion_models/models--sana--sana-1600m-1024px/checkpoints/Sana_1600M_1024px.pth"
    files = {
        base: stand_ins.official_transformer("sana-1.6b-1024px"),
        "text_encoders/gemma-2-2b-it.safetensors": stand_ins.text_encoder(),
        "vae/dc-ae-f32c32-sana-1.1.safetensors": stand_ins.autoencoder(),
    }
    workflow = old_graphs.text_to_image()
    (sampler,) = (found for found in workflow["nodes"] if found["type"] == "KSampler")
    sampler["widgets_values"][2] = 2
    with stand_ins.placed(frontend.server, files):
        frontend.open()
        frontend.screenshot(tmp_path / "empty.png")
        frontend.load(workflow)
        inputs = frontend.prompt()["1"]["inputs"]
        assert inputs["model"] == base.removeprefix("diffusion_models/")
        assert (inputs["text_encoder"], inputs["vae"]) == (
            "gemma-2-2b-it.safetensors",
            "dc-ae-f32c32-sana-1.1.safetensors",
        )
        frontend.screenshot(tmp_path / "before.png")
        run_and_look(frontend)
        frontend.screenshot(tmp_path / "after.png")
        for name in ("text_encoder", "vae"):
            frontend.set("SanaCheckpointLoader", name, "auto")
        frontend.set("SanaCheckpointLoader", "model", "demo")
        run_and_look(frontend)
    assert not frontend.exceptions, frontend.report()


def run_and_look(page: Frontend) -> None:
    assert page.run()["kind"] == "execution_success"
    sizes = page.page.evaluate(
        "() => app.graph.getNodeById(10).imgs.map(image => [image.naturalWidth, image.naturalHeight])"
    )
    assert sizes == [[608, 416]]


def with_other_pack(page: Frontend, *, theirs: bool) -> None:
    """As if ComfyUI_ExtraModels were installed, too. theirs: with its nodes in use."""

    def answer(route: Route) -> None:
        info = route.fetch().json()
        other = {"python_module": "custom_nodes.ComfyUI_ExtraModels", "category": "ExtraModels/Sana"}
        info["GemmaLoader"] = {**info["EmptyImage"], "name": "GemmaLoader", "display_name": "Gemma Loader", **other}
        for name in SHARED if theirs else ():
            info[name] |= other
        route.fulfill(json=info)

    page.page.route("**/object_info", answer)


def test_the_pack_whose_nodes_are_in_use_is_told(frontend: Frontend) -> None:
    """Its nodes say so themselves, and its workflows stay its own."""
    with_other_pack(frontend, theirs=True)
    frontend.open()
    frontend.page.get_by_text(
        "ComfyUI_ExtraModels has taken the place of SanaCheckpointLoader, EmptySanaLatentImage, GemmaTextEncode"
    ).first.wait_for()
    frontend.load(old_graphs.text_to_image())
    assert notes(frontend) == [] and "GemmaLoader" in frontend.node_types()
    frontend.wait_until(lambda: frontend.page.locator(".sana-other-pack").count(), 3)
    assert frontend.page.locator(".sana-other-pack").first.inner_text() == (
        "This node is that of ComfyUI_ExtraModels, which has the same id as one of ComfyUI-Sana. Disable one of the two packs and "
        "restart ComfyUI."
    )
    assert not frontend.exceptions, frontend.report()


@pytest.mark.parametrize("frontend", [()], indirect=True, ids=["frontend-of-host"])
def test_where_our_nodes_are_in_use_its_workflows_are_translated(frontend: Frontend) -> None:
    with_other_pack(frontend, theirs=False)
    frontend.open()
    frontend.page.get_by_text("Those of ComfyUI-Sana are in use, not those of ComfyUI_ExtraModels").first.wait_for()
    frontend.load(old_graphs.text_to_image())
    assert len(notes(frontend)) == 1 and "GemmaLoader" not in frontend.node_types()
    assert frontend.page.locator(".sana-other-pack").count() == 0
