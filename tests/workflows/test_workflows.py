"""Every example workflow opens in the real user interface, is laid out tidily, and runs on the real server.

Released weights are stood in for by small random ones of the same structure under the same file names.
"""

import io
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import tomllib
import torch
from PIL import Image
from playwright.sync_api import Browser

from bench.scene_reader import read
from tests.browser.frontend import Frontend, open_page
from tests.host import stand_ins
from tests.host.base_directory import PACK
from tests.host.graphs import Prompt, changed
from tests.host.graphs import node as api_node
from tests.host.hosts import OLDEST, ROOT
from tests.host.server import Server, Servers
from tests.workflows import converters, graph, pictures

EXPECTED = {
    "sana_demo",
    "sana_1k_text_to_image",
    "sana_2k_text_to_image",
    "sana_4k_text_to_image",
    "sana_1_5_text_to_image",
    "sana_sprint_text_to_image",
    "sana_img2img",
    "sana_second_pass",
    "sana_sprint_draft_finish",
    "sana_inpainting",
    "sana_inpainting_crop",
    "sana_regions_by_area",
    "sana_regions_by_mask",
    "sana_controlnet",
    "sana_guidance",
    "sana_seed_grid",
    "sana_steps_cfg_grid",
    "sana_sprint_img2img",
    "sana_prompt_enhancer",
    "sana_low_memory",
    "sana_two_gpus",
    "sana_lora",
    "sana_lora_chain",
    "sana_train_lora",
}
OF_THE_DEMO = ("sana_demo", "sana_train_lora")  # which need no file
# The structure of each linked transformer.
VARIANTS = {
    "Sana_1600M_1024px_BF16.pth": "sana-1.6b-1024px",
    "Sana_1600M_2Kpx_BF16.pth": "sana-1.6b-2048px",
    "Sana_1600M_4Kpx_BF16.pth": "sana-1.6b-4096px",
    "SANA1.5_1.6B_1024px.pth": "sana-1.5-1.6b-1024px",
    "Sana_Sprint_1.6B_1024px.pth": "sana-sprint-1.6b-1024px",
}
# Files with a name of their own in our workflows, since that of the download is one of many models.
DOWNLOADED = {"dc-ae-f32c32-sana-1.1.safetensors": "diffusion_pytorch_model.safetensors"}
PACK_ID = "comfyui-sana"
MAKERS = {
    "text_encoders": stand_ins.text_encoder,
    "vae": stand_ins.autoencoder,
    "controlnet": lambda: stand_ins.controlnet("sana-1.6b-1024px"),
}
SIDE = 128  # px, of the pictures drawn here
LORAS_FOR = "sana-1.6b-1024px"
GAP = 8  # px between the pictures of a grid
CELL = SIDE + 20  # height of a picture in a grid, with its label
SIZES = {  # of other pictures, (width, height)
    "sana_second_pass": (2 * SIDE, 2 * SIDE),
    "sana_guidance": (3 * SIDE + 2 * GAP, CELL),
    "sana_seed_grid": (2 * SIDE + GAP, 2 * CELL + GAP),
    "sana_steps_cfg_grid": (3 * SIDE + 2 * GAP, 3 * CELL + 2 * GAP),
}
TITLE = 30  # height of a node's title, which is above its position
BOXES = """() => app.graph.nodes.map(node => ({
    id: node.id, box: [...node.pos, ...node.size], least: [...node.computeSize()], note: node.type === "MarkdownNote"
}))"""
# The wires that run below a node: those whose path meets the rim of a box a little smaller than the node, or than its middle
# where the wire begins or ends there.
BELOW = """() => {
    app.canvas.draw(true, true)
    const context = document.createElement("canvas").getContext("2d"), found = []
    context.lineWidth = 4
    for (const link of app.graph.links.values()) {
        const bends = [...app.graph.reroutes.values()].filter(bend => bend.linkIds.has(link.id))
        const paths = [link, ...bends].map(part => part.path).filter(path => path)
        if (!paths.length) throw new Error(`link ${link.id} was not drawn`)
        for (const node of app.graph.nodes) {
            const side = [link.origin_id, link.target_id].includes(node.id) ? 34 : 4
            const [left, right] = [node.pos[0] + side, node.pos[0] + node.size[0] - side]
            const [top, bottom] = [node.pos[1] - 26, node.pos[1] + node.size[1] - 4]
            const meets = (x, y) => paths.some(path => context.isPointInStroke(path, x, y))
            let met = false
            for (let x = left; x < right; x += 3) met ||= meets(x, top) || meets(x, bottom)
            for (let y = top; y < bottom; y += 3) met ||= meets(left, y) || meets(right, y)
            if (met) found.push(`${link.origin_id} to ${link.target_id} below ${node.id}`)
        }
    }
    return found
}"""


@pytest.fixture(scope="module")
def weights(server: Server) -> Iterator[Server]:
    with with_files(server):
        yield server


@pytest.fixture(scope="module")
def oldest(servers: Servers) -> Iterator[Server]:
    with with_files(servers(OLDEST)) as server:
        yield server


@contextmanager
def with_files(server: Server) -> Iterator[Server]:
    """The server with a file for every link and the LoRAs that workflows name, and with a picture to start from."""
    files = {f"loras/{name}": stand_ins.lora(LORAS_FOR, seed=seed) for seed, name in enumerate(pictures.LORAS)}
    for model in itertools.chain.from_iterable(graph.models(graph.read(name)) for name in graph.NAMES):
        make = MAKERS.get(model["directory"])
        tensors = make() if make else stand_ins.official_transformer(VARIANTS[model["name"]])
        files[f"{model['directory']}/{model['name']}"] = tensors
    server.upload("example.png", picture_with_hole())
    with stand_ins.placed(server, files):
        yield server


@pytest.fixture(scope="module")
def page(browser: Browser, weights: Server) -> Iterator[Frontend]:
    """One page for all workflows: opening one takes seconds."""
    with open_page(browser, weights) as frontend:
        frontend.open()
        yield frontend


@pytest.fixture(scope="module")
def nodes(weights: Server) -> dict[str, dict]:
    """What the server tells of its nodes, with the files of all workflows in their lists."""
    return weights.object_info()


def picture_with_hole() -> bytes:
    """A PNG whose transparent part, the left upper quarter, is the mask of LoadImage."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[: SIDE // 2, : SIDE // 2, 3] = 0
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def test_all_workflows_are_there() -> None:
    assert set(graph.NAMES) == EXPECTED
    assert set(pictures.PROMPTS) == {path.stem for path in graph.FOLDER.glob("*.jpg")}
    assert EXPECTED - set(pictures.PROMPTS) == {
        "sana_sprint_text_to_image",
        "sana_sprint_draft_finish",
        "sana_sprint_img2img",
        "sana_controlnet",
    }


@pytest.mark.parametrize("name", graph.NAMES)
def test_linked_files_can_be_offered(name: str) -> None:
    """The user interface offers files that a widget names, from hosts it knows, under the name they are downloaded with."""
    workflow = graph.read(name)
    values = [value for node in workflow["nodes"] for value in node.get("widgets_values", [])]
    notes = " ".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert "GB" in notes or name in OF_THE_DEMO
    for model in graph.models(workflow):
        url = urlparse(model["url"])
        assert (url.scheme, url.hostname) == ("https", "huggingface.co")
        assert Path(url.path).name == DOWNLOADED.get(model["name"], model["name"]) and "/resolve/main/" in url.path
        assert model["directory"] in ("diffusion_models", "text_encoders", "vae", "controlnet")
        assert model["name"] in values and model["url"] in notes
        assert model["name"] not in DOWNLOADED.values()
        if model["name"] in DOWNLOADED:
            assert f"Rename it so: a browser saves it as `{DOWNLOADED[model['name']]}`" in notes
    linked = {model["name"] for model in graph.models(workflow)} | {*pictures.LORAS}
    assert {value for value in values if re.search(r"\.(pth|safetensors)$", str(value))} <= linked


@pytest.mark.parametrize("name", graph.NAMES)
def test_runs_as_the_user_interface_converts_it(name: str, page: Frontend, weights: Server) -> None:
    """And its layout is tidy: nothing overlaps, links go from left to right and below no node, and every node is in a group."""
    workflow = graph.read(name)
    page.load(workflow)
    boxes = {int(entry["id"]): entry for entry in page.page.evaluate(BOXES)}
    check_layout(workflow, boxes)
    check_exported(workflow, page.workflow())
    assert page.page.evaluate(BELOW) == []
    prompt = graph.shrunk(page.prompt(), side=SIDE, steps=2)
    assert len(prompt) == len([node for node in workflow["nodes"] if node["type"] != "MarkdownNote"])
    run = weights.queue(prompt)
    assert run.failure is None
    (saved,) = (name for name, node in prompt.items() if node["class_type"] == "SaveImage")
    (picture,) = weights.images(run, saved)
    assert picture.size == SIZES.get(name, (SIDE, SIDE))
    assert run.previews
    assert not page.exceptions, page.report()


@pytest.mark.parametrize("name", [name for name in graph.NAMES if name != "sana_train_lora"])
def test_runs_in_the_oldest_host(name: str, oldest: Server) -> None:
    """But for the training, which runs inside each host."""
    prompt = graph.shrunk(converters.comfy_cli(graph.read(name), oldest.object_info()), side=SIDE, steps=2)
    run = oldest.queue(prompt)
    assert run.failure is None
    (picture,) = oldest.images(run, *graph.of_kind(prompt, "SaveImage"))
    assert picture.size == SIZES.get(name, (SIDE, SIDE))


def check_exported(workflow: dict, exported: dict) -> None:
    """As the user interface saves it: with all widgets among the inputs, which converters to the API's format read, and versions."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    nodes = {node["id"]: node for node in exported["nodes"]}
    for node in workflow["nodes"]:
        wanted = nodes[node["id"]]
        for part in ("name", "type", "widget", "link"):
            assert [entry.get(part) for entry in node["inputs"]] == [entry.get(part) for entry in wanted["inputs"]]
        assert node["widgets_values"] == wanted["widgets_values"] and node["size"] == wanted["size"]
        if node["type"] != "MarkdownNote":
            assert node["properties"]["ver"] == (version if node["properties"]["cnr_id"] == PACK_ID else OLDEST)


def check_layout(workflow: dict, boxes: dict[int, dict]) -> None:
    places = {}
    for name, entry in boxes.items():
        x, y, width, height = entry["box"]
        places[name] = (x, y - TITLE, x + width, y + height)
    for (first, a), (second, b) in itertools.combinations(places.items(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"nodes {first} and {second} overlap"
    for node in workflow["nodes"]:
        entry = boxes[node["id"]]
        assert node["size"] == entry["box"][2:], f"the user interface enlarges node {node['id']}"
        assert all(have >= least for have, least in zip(entry["box"][2:], entry["least"], strict=True))
    for _, source, _, target, _, _ in workflow["links"]:
        (left, top, *_), (right, below, *_) = places[source], places[target]
        assert left < right or left == right and top < below, f"the link from {source} to {target} goes back"
    groups = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in workflow["groups"])]
    for a, b in itertools.combinations(groups, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], "groups overlap"
    for name, (left, top, right, bottom) in places.items():
        around = [g for g in groups if g[0] <= left and g[1] <= top and right <= g[2] and bottom <= g[3]]
        assert len(around) == (0 if boxes[name]["note"] else 1), f"node {name} is in {len(around)} groups"


@pytest.mark.parametrize("name", graph.NAMES)
def test_is_read_alike_by_programs_of_others(name: str, page: Frontend, nodes: dict[str, dict]) -> None:
    """Two converters to the API's format make what the user interface makes, and a linter finds no fault in it. Where the
    files are missing, their names alone are lost and found at fault, so that nothing else is drawn in silence.
    """
    page.load(graph.read(name))
    wanted = graph.plain(page.prompt())
    named = [
        (key, place, value)
        for key, node in wanted.items()
        for place, value in node["inputs"].items()
        if str(value).endswith((".pth", ".safetensors"))
    ]
    bare = graph.without_options(nodes, {value for _, _, value in named})
    assert converters.complaints(wanted, nodes) == []
    assert sorted(converters.complaints(wanted, bare)) == sorted(("invalid-enum", value) for _, _, value in named)
    for convert in converters.CONVERTERS:
        assert graph.plain(convert(graph.read(name), nodes)) == wanted
        found = graph.plain(convert(graph.read(name), bare))
        for key, place, value in named:
            assert found[key]["inputs"][place] in (value, None, "auto")
            found[key]["inputs"][place] = value
        assert found == wanted


def test_inpainting_leaves_the_rest_alone(page: Frontend, weights: Server) -> None:
    page.load(graph.read("sana_inpainting"))
    run = weights.queue(graph.shrunk(page.prompt(), side=SIDE, steps=2))
    drawn = np.asarray(weights.images(run)[0].convert("RGB")).astype(int)
    given = np.asarray(Image.open(io.BytesIO(picture_with_hole())).convert("RGB")).astype(int)
    difference = np.abs(drawn - given).max(axis=-1)
    hole = np.zeros((SIDE, SIDE), bool)
    hole[: SIDE // 2, : SIDE // 2] = True
    assert difference[~hole].max() <= 1
    assert difference[hole].mean() > 10


def test_lora_has_an_effect(page: Frontend, weights: Server) -> None:
    page.load(graph.read("sana_lora"))
    prompt = graph.shrunk(page.prompt(), side=SIDE, steps=2)
    (loader,) = graph.of_kind(prompt, "LoraLoaderModelOnly")
    with_lora, without = (weights.queue(changed(prompt, **{loader: {"strength_model": s}})) for s in (1.0, 0.0))
    assert np.asarray(weights.images(with_lora)[0]).tolist() != np.asarray(weights.images(without)[0]).tolist()
    assert "lora key not loaded" not in weights.log()


def small_prompt(page: Frontend, name: str) -> Prompt:
    """A workflow for the stand-ins."""
    page.load(graph.read(name))
    return graph.shrunk(page.prompt(), side=SIDE, steps=2)


def shown(server: Server, prompt: Prompt, **latents: tuple[str, int]) -> list[np.ndarray]:
    """The picture that a prompt saves, and those that latents of it decode to, (height, width, 3) in 0 to 255."""
    (saved,) = graph.of_kind(prompt, "SaveImage")
    (loader, *_) = graph.of_kind(prompt, "SanaCheckpointLoader")
    prompt = dict(prompt)
    for name, latent in latents.items():
        prompt[f"{name}_decoded"] = api_node("VAEDecode", samples=latent, vae=(loader, 2))
        prompt[name] = api_node("PreviewImage", images=(f"{name}_decoded", 0))
    run = server.queue(prompt)
    assert run.failure is None
    return [np.asarray(server.images(run, name)[0].convert("RGB"), int) for name in (saved, *latents)]


def cell(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    """A picture of a grid with labels, SIDE px high and wide."""
    top, left = row * (CELL + GAP) + CELL - SIDE, column * (SIDE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE]


def test_controlnet_follows_the_lines_of_the_picture(page: Frontend, weights: Server) -> None:
    """As far as its strength says, by the very picture that is shown."""
    prompt = small_prompt(page, "sana_controlnet")
    (apply,), (lines,) = graph.of_kind(prompt, "ControlNetApplyAdvanced"), graph.of_kind(prompt, "Canny")
    (sampler,), (scale,) = graph.of_kind(prompt, "FlowDPMSampler"), graph.of_kind(prompt, "ImageScale")
    around = {name: tuple(prompt[apply]["inputs"][name]) for name in ("positive", "negative")}
    (plain,) = shown(weights, changed(prompt, **{sampler: around}))
    (controlled,) = shown(weights, prompt)
    (off,) = shown(weights, changed(prompt, **{apply: {"strength": 0.0}}))
    (by_picture,) = shown(weights, changed(prompt, **{apply: {"image": (scale, 0)}}))
    assert np.abs(off - plain).max() <= 1
    assert np.abs(controlled - plain).mean() > 2 and np.abs(controlled - by_picture).mean() > 0.5
    (preview,) = graph.of_kind(prompt, "PreviewImage")
    assert prompt[preview]["inputs"]["images"] == prompt[apply]["inputs"]["image"] == [lines, 0]


def test_ways_of_guidance_stand_side_by_side(page: Frontend, weights: Server) -> None:
    """In the order of their labels, all of one seed, and each is the picture of its sampler."""
    prompt = small_prompt(page, "sana_guidance")
    samplers = {node["_meta"]["title"]: name for name, node in prompt.items() if node["class_type"] == "FlowDPMSampler"}
    names = ("Plain guidance", "Guidance interval", "Perturbed attention")
    settings = {name: prompt[samplers[name]]["inputs"] for name in names}
    differing = {key for key in settings[names[0]] if len({str(settings[name][key]) for name in names}) > 1}
    assert differing == {"guidance_from", "guidance_to", "pag_scale"}
    sheet, *pictures_ = shown(weights, prompt, **{f"show{k}": (samplers[name], 0) for k, name in enumerate(names)})
    for column, picture in enumerate(pictures_):
        assert np.abs(cell(sheet, 0, column) - picture).max() <= 1
    for first, second in itertools.combinations(pictures_, 2):
        assert np.abs(first - second).mean() > 0.5


@pytest.mark.parametrize(
    ("name", "row", "column", "settings"),
    [
        ("sana_seed_grid", 1, 0, {"seed": 3, "steps": 2, "cfg": 4.5}),
        ("sana_steps_cfg_grid", 1, 2, {"seed": 1, "steps": 3, "cfg": 7.0}),
    ],
)
def test_grids_show_what_their_labels_say(
    page: Frontend, weights: Server, name: str, row: int, column: int, settings: dict[str, float]
) -> None:
    prompt = small_prompt(page, name)
    (sampler,), (compare,) = graph.of_kind(prompt, "FlowDPMSampler"), graph.of_kind(prompt, "SanaCompareSettings")
    (grid,) = graph.of_kind(prompt, "SanaPictureGrid")
    alone = changed(prompt, **{sampler: settings, grid: {"labels": "alone", "columns": 0}})
    del alone[compare]
    (sheet,), (picture,) = shown(weights, prompt), shown(weights, alone)
    assert np.abs(cell(sheet, row, column) - cell(picture, 0, 0)).max() <= 1
    assert np.abs(cell(sheet, row, column) - cell(sheet, 0, 0)).mean() > 0.5


def test_sprint_keeps_of_a_picture_what_the_angle_leaves(page: Frontend, weights: Server) -> None:
    prompt = small_prompt(page, "sana_sprint_img2img")
    (schedule,), (encoded,) = graph.of_kind(prompt, "SCMScheduler"), graph.of_kind(prompt, "VAEEncode")
    drawn, straight = shown(weights, prompt, straight=(encoded, 0))
    angles = ({"max_angle": 0.1, "intermediate_angle": 0.05}, {"max_angle": 1.5708})
    little, much = (shown(weights, changed(prompt, **{schedule: angle}))[0] for angle in angles)
    distances = [np.abs(picture - straight).mean() for picture in (little, drawn, much)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_loras_of_a_chain_add_up(page: Frontend, weights: Server) -> None:
    """To one file with both, each times its strength."""
    prompt = small_prompt(page, "sana_lora_chain")
    loaders = graph.of_kind(prompt, "LoraLoaderModelOnly")
    given = [(prompt[name]["inputs"]["lora_name"], prompt[name]["inputs"]["strength_model"]) for name in loaders]
    files = [stand_ins.lora(LORAS_FOR, seed=pictures.LORAS.index(name)) for name, _ in given]
    both = {name: torch.cat([file[name] for file in files], dim=int(name.endswith("B.weight"))) for name in files[0]}
    for name in both:
        if name.endswith("B.weight"):
            parts = [strength * file[name] for file, (_, strength) in zip(files, given, strict=True)]
            both[name] = torch.cat(parts, dim=1)
    with stand_ins.placed(weights, {"loras/both.safetensors": both}):
        one = {"lora_name": "both.safetensors", "strength_model": 1.0}, {"strength_model": 0.0}
        (together,) = shown(weights, changed(prompt, **dict(zip(loaders, one, strict=True))))
    (chain,) = shown(weights, prompt)
    (first,) = shown(weights, changed(prompt, **{loaders[1]: {"strength_model": 0.0}}))
    assert np.abs(chain - together).max() <= 2 < np.abs(chain - first).max()


def test_little_memory_draws_the_same_things(page: Frontend, server: Server) -> None:
    """In fp8, decoded within a bound."""
    caption = pictures.PROMPTS["sana_low_memory"]
    circle, square = sorted(
        read(drawn_by_the_demo(page, server, "sana_low_memory", caption)).things, key=lambda thing: thing.centre[0]
    )
    assert (circle.colour, circle.shape, square.colour, square.shape) == ("yellow", "circle", "green", "square")
    prompt = page.prompt()
    (loader,), (decoder,) = graph.of_kind(prompt, "SanaCheckpointLoader"), graph.of_kind(prompt, "DCAEDecode")
    assert prompt[loader]["inputs"]["dtype"] == "fp8" and 0 < prompt[decoder]["inputs"]["max_memory"] < 1


def test_a_second_gpu_changes_no_picture(page: Frontend, weights: Server) -> None:
    """What it does where there is one, tests/host/inprocess/test_multigpu.py says."""
    prompt = small_prompt(page, "sana_two_gpus")
    (split,), (sampler,) = graph.of_kind(prompt, "MultiGPU_WorkUnits"), graph.of_kind(prompt, "FlowDPMSampler")
    assert prompt[sampler]["inputs"]["model"] == [split, 0]
    without = changed(prompt, **{sampler: {"model": tuple(prompt[split]["inputs"]["model"])}})
    (picture,), (plain,) = shown(weights, prompt), shown(weights, without)
    assert np.array_equal(picture, plain)


def test_what_gemma_writes_is_drawn(page: Frontend, weights: Server) -> None:
    prompt = small_prompt(page, "sana_prompt_enhancer")
    (enhancer,) = graph.of_kind(prompt, "SanaPromptEnhancer")
    weights.free()
    run = weights.queue(prompt)
    assert run.failure is None
    (written,) = (data["output"]["sana_written"] for data in run.data("executed") if data["node"] == enhancer)
    assert written[0] not in ("", prompt[enhancer]["inputs"]["text"])
    (saved,) = graph.of_kind(prompt, "SaveImage")
    (edited,) = shown(weights, changed(prompt, **{enhancer: {"edited": written[0]}}))
    assert np.array_equal(np.asarray(weights.images(run, saved)[0].convert("RGB"), int), edited)


def drawn_by_the_demo(page: Frontend, server: Server, name: str, *texts: str, **changes: object) -> Image.Image:
    """The picture that a workflow saves, as its thumbnail in fewer steps; changes: other inputs of all nodes of a type."""
    page.load(graph.read(name))
    prompt = pictures.with_demo_model(graph.shrunk(page.prompt(), side=pictures.SIDE, steps=8), *texts)
    for kind, inputs in changes.items():
        prompt = changed(prompt, **dict.fromkeys(graph.of_kind(prompt, kind), inputs))
    run = server.queue(prompt)
    assert run.failure is None
    (saved,) = graph.of_kind(prompt, "SaveImage")
    return server.images(run, saved)[0].convert("RGB")


def test_a_crop_is_drawn_anew_and_goes_back_to_its_place(page: Frontend, server: Server) -> None:
    """What the mask covers becomes what the prompt says, and the rest of the large picture stays to the pixel."""
    server.upload("large.png", pictures.large_picture())
    caption = pictures.PROMPTS["sana_inpainting_crop"]
    picture = drawn_by_the_demo(page, server, "sana_inpainting_crop", caption, LoadImage={"image": "large.png"})
    given = Image.open(io.BytesIO(pictures.large_picture()))
    difference = np.abs(np.asarray(picture, int) - np.asarray(given.convert("RGB"), int)).max(axis=-1)
    outside = np.asarray(given)[..., 3] > 0
    assert picture.size == given.size and difference[outside].max() == 0
    green, red = sorted(read(picture).things, key=lambda thing: thing.colour)
    assert (green.colour, green.shape, red.colour, red.shape) == ("green", "square", "red", "circle")
    low, high = pictures.HOLE_OF_LARGE.start, pictures.HOLE_OF_LARGE.stop
    assert low <= min(green.box) and max(green.box) <= high


def test_areas_have_things_of_their_own(page: Frontend, server: Server) -> None:
    """Against a prompt for the whole picture that wants them the other way round."""
    texts = ("a blue square left of a red circle", "a red circle", "a blue square")
    things = read(drawn_by_the_demo(page, server, "sana_regions_by_area", *texts)).things
    circle, square = sorted(things, key=lambda thing: thing.centre[0])
    assert (circle.colour, circle.shape, square.colour, square.shape) == ("red", "circle", "blue", "square")
    assert circle.box[2] <= pictures.SIDE / 2 <= square.box[0]


def test_a_mask_parts_two_prompts(page: Frontend, server: Server) -> None:
    """The first holds where the mask is, in the lower half."""
    server.upload("mask.png", pictures.start_picture(hole=True))
    texts = ("a blue square on a white background", "a red circle on a white background")
    picture = drawn_by_the_demo(page, server, "sana_regions_by_mask", *texts, LoadImage={"image": "mask.png"})
    circle, square = sorted(read(picture).things, key=lambda thing: thing.centre[1])
    assert (circle.colour, circle.shape, square.colour, square.shape) == ("red", "circle", "blue", "square")
    assert circle.box[3] <= pictures.SIDE / 2 <= square.box[1]


def test_second_pass_keeps_every_thing_where_it_is(page: Frontend, server: Server) -> None:
    """At twice the size, and draws on them; with more noise the demo model, made for 256 px, draws things more than once."""
    page.load(graph.read("sana_second_pass"))
    prompt = pictures.with_demo_model(
        graph.shrunk(page.prompt(), side=256, steps=10), pictures.PROMPTS["sana_second_pass"]
    )
    (doubled,), (saved,) = graph.of_kind(prompt, "ImageScaleBy"), graph.of_kind(prompt, "SaveImage")
    prompt["show"] = api_node("PreviewImage", images=tuple(prompt[doubled]["inputs"]["image"]))
    (encoded,) = graph.of_kind(prompt, "VAEEncode")
    prompt["straight"] = api_node("VAEDecode", samples=(encoded, 0), vae=tuple(prompt[encoded]["inputs"]["vae"]))
    prompt["show_straight"] = api_node("PreviewImage", images=("straight", 0))
    run = server.queue(prompt)
    small, straight, large = (server.images(run, name)[0] for name in ("show", "show_straight", saved))
    assert large.size == (512, 512)
    before, after = read(small), read(large)
    assert (before.background, after.background) == ("white", "white")
    assert sorted((thing.colour, thing.shape) for thing in after.things) == [("blue", "square"), ("red", "circle")]
    for thing in before.things:
        (same,) = (other for other in after.things if other.colour == thing.colour)
        assert np.abs(np.array(same.box) - 2 * np.array(thing.box)).max() <= 8
    difference = np.asarray(large.convert("RGB"), float) - np.asarray(straight.convert("RGB"), float)
    assert np.abs(difference).mean() > 0.2


def test_every_workflow_is_told_of() -> None:
    told = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "workflows.md").read_text(encoding="utf-8"), re.M)
    assert sorted(told) == graph.NAMES


def test_templates_are_listed(server: Server) -> None:
    assert set(server.get("workflow_templates")[PACK]) == EXPECTED


def test_no_workflow_started_a_program_or_connected_to_anything(server: Server) -> None:
    """The last test here."""
    assert server.watched() == []
