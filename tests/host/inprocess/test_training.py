"""Training a LoRA in the graph by our node, which computes what the shell does, and saves where one stops it.

The model is the demo: its pictures are small, and a step takes a tenth of a second.
"""

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes  # noqa: F401 - it logs an error when PEFT imports it, whose traceback would keep all that was there
import comfy.model_management as management
import comfy.utils
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sana
import sana.training.sheets
from sana.__main__ import main as convert
from sana.text.prompt import INSTRUCTION
from sana.training.__main__ import main as shell
from tests.host.boot import Host
from tests.host.inprocess.small import DEMO, EQUAL, PROMPT, Small, difference, load, write_variant
from tests.sana.measures import relative_error
from tests.training.drawn import draw_pictures

pytestmark = pytest.mark.cpu  # accelerate knows no stand-in for a GPU
SETTINGS = {
    **{"steps": 3, "learning_rate": 1e-2, "schedule": "cosine", "rank": 4, "alpha": 8.0, "targets": "all"},
    **{"batch_size": 2, "seed": 3, "preview_every": 2, "recompute": False, "prompt": "a red circle\n\na blue star"},
}
IN_THE_SHELL = [
    *(
        "--model=demo",
        "--steps=3",
        "--learning-rate=1e-2",
        "--schedule=cosine",
        "--rank=4",
        "--alpha=8",
        "--targets=all",
    ),
    *(
        "--batch-size=2",
        "--seed=3",
        "--sheet-every=2",
        "--prompt=a red circle",
        "--prompt=a blue star",
        "--trigger=scene",
    ),
]
ROWS, COLUMNS, SIDE = 2, 2, 256  # of a sheet of two prompts, and px of a picture in it


@pytest.fixture(scope="module")
def demo(small: Small) -> Small:
    """The demo model as `Load SANA` gives it."""
    return Small(small.host, sana.loading.MODELS["demo"], *load(small.host, "demo"))


@pytest.fixture(scope="module", autouse=True)
def quick_sheets(host: Host) -> Iterator[None]:
    """What is drawn in two steps shows little, but nobody looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        for sheets in (sana.training.sheets, host.pack("sana.training.sheets")):
            patch.setattr(sheets, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def pictures(host: Host) -> Path:
    """Three of two sizes, in the input folder."""
    folder = host.base / "input" / "pictures"
    draw_pictures(folder, 3)
    return folder


@pytest.fixture
def as_in_the_shell(demo: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts come from the text encoder as the shell has it, in 16 bits: that of the host here is in 32, and so differs by rounding."""
    text_encoder = sana.SanaPipeline.load("demo", dtype=torch.bfloat16).text_encoder

    def encode(source: object, prompts: list[str], instruction: str | None) -> tuple[Tensor, Tensor]:
        return text_encoder(prompts, instruction)

    monkeypatch.setattr(demo.host.pack("nodes.host.training").HostSource, "encode", encode)


@pytest.fixture(scope="module")
def progress() -> Iterator[list[tuple]]:
    """What the node tells the user interface: step, steps, preview."""
    told, before = [], comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda *values, **more: told.append(values))
    yield told
    comfy.utils.set_progress_bar_global_hook(before)


def train(demo: Small, **changes: object) -> tuple:
    """Runs the node, which takes every input as a list."""
    given = {"model": demo.model, "clip": demo.clip, "vae": demo.vae, "data": "", "captions": "", **SETTINGS, **changes}
    return demo.host.call(
        "SanaTrainLora", **{name: value if isinstance(value, list) else [value] for name, value in given.items()}
    )


def refusal(demo: Small, **changes: object) -> str:
    with pytest.raises(ValueError) as caught:
        train(demo, **{"name": "refused", "data": "pictures", **changes})
    assert not (demo.host.base / "output" / "loras" / "refused.safetensors").exists()
    return str(caught.value)


def written(demo: Small, name: str) -> Path:
    return demo.host.base / "output" / "loras" / f"{name}.safetensors"


def same(one: Path, two: Path) -> bool:
    """Whether two files hold the same numbers, and tell the same of them."""
    first, second = load_file(one), load_file(two)
    with safe_open(one, "pt") as a, safe_open(two, "pt") as b:
        told = a.metadata() == b.metadata()
    return told and first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_texts_are_those_of_the_shell(demo: Small) -> None:
    source = demo.host.pack("nodes.host.training").HostSource(demo.model, demo.clip, demo.vae)
    for prompt, instruction in ((PROMPT, INSTRUCTION), ("", None)):
        with torch.inference_mode(False):
            found, mask = source.encode([prompt], instruction)
        expected, expected_mask = demo.pipeline.text_encoder([prompt], instruction)
        assert torch.equal(mask, expected_mask) and relative_error(found[mask], expected[expected_mask]) < 1e-5
        assert not found.is_inference()


def test_every_number_tells_a_model_from_another(demo: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the MODEL, and of the LoRAs that a CLIP has."""
    source = demo.host.pack("nodes.host.training").HostSource(demo.model, demo.clip, demo.vae)
    before = source.told()
    source.tensors["proj_out.weight"] = changed = source.tensors["proj_out.weight"].clone()
    assert source.told() == before
    changed.flatten()[-1] += 1
    assert source.told() != before
    texts = source.texts(None)
    for last in (1.0, 2.0):
        difference = torch.tensor([0.0] * 99 + [last])
        monkeypatch.setattr(demo.clip.patcher, "patches", {"layer": [(1.0, ("diff", (difference,)))]})
        before, texts = texts, source.texts(None)
        assert texts != before


def test_the_file_is_that_of_the_shell(
    demo: Small, pictures: Path, tmp_path: Path, as_in_the_shell: None, progress: list[tuple]
) -> None:
    """From a folder, and from images with captions, in the same numbers; and what the node shows meanwhile."""
    before = demo.sample()
    model, lora, loss, sheet = train(demo, data="pictures", name="ours", trigger="scene")
    with torch.inference_mode(False):
        assert shell(["lora", "--data", str(pictures), "--out", str(tmp_path), *IN_THE_SHELL]) == 0
    assert same(written(demo, "ours"), tmp_path / "lora.safetensors")

    gc.collect()
    trained = demo.host.pack("sana.networks.transformer").SanaTransformer

    assert [type(part) for part in gc.get_objects() if type(part) is trained] == []  # the host's are of another class
    assert not torch.is_inference_mode_enabled() or torch.zeros(1).is_inference()
    assert difference(demo.sample(), before) == 0
    (loaded,) = demo.host.call("LoraModelLoader", model=demo.model, lora=lora, strength_model=1.0)
    changed = demo.sample(model=model)
    assert difference(changed, before) > EQUAL and difference(demo.sample(model=loaded), changed) <= EQUAL

    assert {values[:2] for values in progress if values[2] is None} >= {(1, 3), (3, 3)}  # the host leaves some out
    previews = [(step, preview[1]) for step, _, preview in progress if preview is not None]
    assert [step for step, _ in previews] == [2, 3] and previews[1][1].size == (COLUMNS * SIDE, ROWS * SIDE)
    shown = np.asarray(previews[1][1], np.float32) / 255
    assert tuple(sheet.shape) == (1, *shown.shape) and np.array_equal(sheet[0].numpy(), shown)
    assert loss.shape[0] == 1 and loss.shape[-1] == 3

    images = [torch.from_numpy(np.asarray(Image.open(pictures / f"{i}.png"), np.float32) / 255)[None] for i in range(3)]
    captions = [(pictures / f"{i}.txt").read_text() for i in range(3)]
    train(demo, images=images, captions=["\n".join(captions)], name="of images", trigger="scene", preview_every=0)
    assert load_file(written(demo, "of images")).keys() == load_file(written(demo, "ours")).keys()
    for name, tensor in load_file(written(demo, "of images")).items():
        assert torch.equal(tensor, load_file(written(demo, "ours"))[name]), name


def test_stop_saves_and_the_next_run_goes_on(demo: Small, pictures: Path, progress: list[tuple]) -> None:
    name, more = "stopped", {"data": "pictures", "preview_every": 0, "schedule": "constant"}
    train(demo, **more, name="whole")

    def stop(step: int, steps: int, preview: object, **named: object) -> None:
        """The server's hook ends a node that was stopped, too."""
        management.interrupt_current_processing(step == 1)
        management.throw_exception_if_processing_interrupted()

    listening = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(stop)
    with pytest.raises(management.InterruptProcessingException):
        train(demo, **more, name=name)
    comfy.utils.set_progress_bar_global_hook(listening)
    assert not management.processing_interrupted()
    assert load_file(written(demo, name)).keys() == load_file(written(demo, "whole")).keys()
    assert not same(written(demo, name), written(demo, "whole"))
    progress.clear()
    train(demo, **more, name=name)
    assert [values[:2] for values in progress if values[2] is None] == [(2, 3), (3, 3)]
    assert same(written(demo, name), written(demo, "whole"))
    train(demo, **more, name=name)  # which finds all steps done
    assert same(written(demo, name), written(demo, "whole"))


def test_a_lora_of_the_model_is_trained_upon(demo: Small, pictures: Path) -> None:
    """Its changes are among the frozen weights, and the work folder tells them from the bare model's."""
    weights = demo.host.pack("nodes.host.training").weights
    name = "transformer_blocks.1.attn1.to_q"
    folder = demo.host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    bare = weights(demo.model)
    down, up = torch.randn(2, bare[f"{name}.weight"].shape[1]), torch.randn(bare[f"{name}.weight"].shape[0], 2)
    save_file(
        {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up},
        folder / "first.safetensors",
    )
    (changed,) = demo.host.call(
        "LoraLoaderModelOnly", model=demo.model, lora_name="first.safetensors", strength_model=0.5
    )
    found = weights(changed)
    assert relative_error(found[f"{name}.weight"], bare[f"{name}.weight"] + 0.5 * up @ down) < 1e-6
    assert all(torch.equal(found[key], bare[key]) for key in bare if key != f"{name}.weight")
    again = weights(demo.model)
    assert all(torch.equal(again[key], bare[key]) for key in bare)

    train(demo, data="pictures", name="plain", steps=1, preview_every=0)
    with pytest.raises(ValueError, match=r"plain holds another training \(weights .*\); give another name$"):
        train(demo, data="pictures", name="plain", steps=1, preview_every=0, model=changed)


@pytest.mark.newest
def test_a_quantised_layer_is_unpacked_where_a_lora_changes_it(demo: Small) -> None:
    """The others stay packed, with their scales."""
    path = demo.host.base / "models" / "diffusion_models" / "demo-int8.safetensors"
    assert convert([*("convert", str(DEMO), str(path)), "--quantize=int8"]) == 0
    layer = "transformer_blocks.1.attn1.to_q"
    packed, _, _ = load(demo.host, path.name, "auto")
    weights = demo.host.pack("nodes.host.training").weights
    bare = weights(packed)
    torch.manual_seed(0)
    down, up = torch.randn(2, bare[f"{layer}.weight"].shape[1]), torch.randn(bare[f"{layer}.weight"].shape[0], 2)
    lora = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    (changed,) = demo.host.call("LoraModelLoader", model=packed, lora=lora, strength_model=1.0)
    found = weights(changed)
    gone = bare.keys() - found.keys()
    assert gone and all(name.startswith(f"{layer}.") for name in gone) and bare[f"{layer}.weight"].dtype == torch.int8
    plain = sana.load_transformer(DEMO).state_dict()[f"{layer}.weight"]
    assert relative_error(found[f"{layer}.weight"] - up @ down, plain) < 0.02  # what 8 bits leave


@pytest.mark.newest
def test_what_cannot_be_trained_on_is_refused(demo: Small, small: Small, pictures: Path) -> None:
    bare = demo.host.base / "input" / "bare"
    bare.mkdir()
    Image.new("RGB", (64, 64)).save(bare / "one.png")
    two = torch.zeros(2, 64, 64, 3)
    sprint, clip, vae = load(demo.host, write_variant(demo.host, "sana-sprint-0.6b-1024px").name)
    other = type("ModelPatcher", (), {"model": torch.nn.Linear(1, 1)})()
    for changes, message in (
        ({"data": ""}, "data is empty and no images are connected; give either a folder of pictures or images with"),
        ({"images": [two]}, "data is 'pictures' and images are connected; give either a folder"),
        (
            {"data": "", "images": [two]},
            "there are 2 images and 0 captions; give a caption for each, a line each, or one",
        ),
        (
            {"data": "", "images": [two], "captions": "a\nb\nc"},
            "there are 2 images and 3 captions; give a caption for each, a line each, or one for all",
        ),
        ({"data": "gone"}, "gone is no folder; give one with pictures"),
        ({"data": "bare"}, "one.png"),
        ({"data": "../output"}, "data is '../output'; give a name of a folder, such as my_pictures"),
        ({"name": ""}, "name is ''; give a name of a folder"),
        ({"name": "a/../../b"}, "name is 'a/../../b'; give a name of a folder"),
        ({"rank": 0}, "rank is 0; it must be at least 1, such as 16"),
        (
            {"model": sprint, "clip": clip, "vae": vae},
            "is a Sprint model, which learns from a teacher; train a SANA or",
        ),
        ({"model": other}, "this MODEL is a Linear and no SANA; connect the MODEL of Load SANA"),
        ({"vae": other}, "this VAE is no DC-AE; connect the VAE of Load SANA or Load DC-AE"),
        ({"clip": other}, "this CLIP is not Gemma-2; connect the CLIP of"),
    ):
        assert message in refusal(demo, **changes), changes
    assert not (demo.host.base / "output" / "sana_training" / "refused").exists()


@pytest.mark.newest
def test_a_lora_of_somebody_else_is_not_replaced(demo: Small, pictures: Path) -> None:
    path = written(demo, "theirs")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"theirs")
    message = refusal(demo, name="theirs")
    assert message.startswith(f"{path} is there already, and was not trained in ") and path.read_bytes() == b"theirs"


@pytest.mark.newest
def test_without_the_extras_it_says_what_to_install(demo: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    assert refusal(demo) == (
        "training needs the package peft; run pip install peft with the Python of ComfyUI, and restart it"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    assert "needs the packages accelerate, peft and pyarrow; run pip install accelerate peft pyarrow with" in refusal(
        demo
    )
