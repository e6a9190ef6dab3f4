"""What the user interface says about our nodes: tooltips, help pages, and translations that fit the nodes."""

import json
import re
from collections.abc import Collection
from pathlib import Path

import pytest
import requests

from tests.host.base_directory import PACK
from tests.host.hosts import NEWEST, OLDEST, ROOT
from tests.host.server import Server, Servers

UNITS = {"width": "px", "height": "px", "batch_size": "pictures", "max_memory": "GiB", "max_angle": "radians"}
PUBLIC = (
    "SanaCheckpointLoader SanaTextEncoderLoader DCAELoader GemmaTextEncode DCAEEncode DCAEDecode EmptySanaLatentImage "
    "FlowDPMSampler FlowDPMScheduler FlowDPMSolver SanaGuider SanaPerturbedAttention SCMSampler SCMScheduler SanaControlNetLoader "
    "SanaPromptEnhancer SanaTrainLora SanaPreviewLatent SanaBestPictures SanaCompareSettings SanaPictureGrid SanaCropToMask"
).split()
DOCS = ROOT / "js" / "docs"
LANGUAGES = sorted(path.name for path in (ROOT / "locales").iterdir())


@pytest.fixture(scope="module")
def ours(server: Server) -> dict[str, dict]:
    return described(server)


def described(server: Server) -> dict[str, dict]:
    """Our nodes as a server describes them, by id."""
    return {name: node for name, node in server.object_info().items() if node["python_module"].endswith(PACK)}


def inputs(node: dict) -> dict[str, list]:
    """The inputs of a node by name: type, and options."""
    groups = (node["input"].get(group, {}) for group in ("required", "optional"))
    return {name: spec for group in groups for name, spec in group.items()}


def test_public_names_are_there(ours: dict[str, dict]) -> None:
    assert set(PUBLIC) <= set(ours)


def test_every_input_has_a_tooltip(ours: dict[str, dict]) -> None:
    for node_id, node in ours.items():
        assert node["description"] and node["category"].startswith("SANA")
        for name, (_, options, *_) in ((name, [*spec, {}]) for name, spec in inputs(node).items()):
            assert options.get("tooltip", "").endswith("."), f"{node_id}.{name}"


@pytest.mark.parametrize("version", [NEWEST, OLDEST])
def test_nodes_are_found_by_other_words(servers: Servers, version: str) -> None:
    """Which the name of a node does not have in it."""
    info = described(servers(version))
    for node_id, node in info.items():
        words, name = node["search_aliases"], node["display_name"].lower()
        assert len(words) >= 3 and len({*words}) == len(words)
        assert sum(word not in name for word in words) >= 2 and all(word == word.lower() for word in words), node_id
    for word, node_id in (
        ("text encode", "GemmaTextEncode"),
        ("chi", "GemmaTextEncode"),
        ("dc-ae", "DCAELoader"),
        ("resolution", "EmptySanaLatentImage"),
        ("pag", "SanaPerturbedAttention"),
    ):
        assert word in info[node_id]["search_aliases"]


def test_every_node_has_a_help_page(ours: dict[str, dict], server: Server) -> None:
    """Where the user interface looks for it in any language, with every input, its range and every output."""
    for node_id, node in ours.items():
        response = requests.get(f"{server.url}/extensions/{PACK}/docs/{node_id}.md", timeout=60)
        assert response.ok, node_id
        response.encoding = "utf-8"
        check_page(response.text, node)


def check_page(page: str, node: dict) -> None:
    """A page in English."""
    assert page.startswith(f"# {node['display_name']}\n")
    assert re.findall("^## (.*)$", page, re.M) == ["Inputs", "Outputs", "Example"]
    for name, unit in check_inputs(page, node).items():
        assert UNITS.get(name, "") in unit, name


def check_inputs(page: str, node: dict) -> dict[str, str]:
    """A page in any language: every input with its range, and every output. Returns what stands behind each input."""
    rows = {}
    for names, unit in re.findall(r"^\| ([\w, ]+) \| ([^|]+) \|", page, re.M):
        rows |= dict.fromkeys(names.split(", "), unit)
    rows.pop(next(iter(rows), ""), None)  # the head of the table
    assert rows.keys() == inputs(node).keys()
    for name, (kind, options, *_) in ((name, [*spec, {}]) for name, spec in inputs(node).items()):
        if kind in ("INT", "FLOAT") and name != "seed":
            for end in (options["min"], options["max"]):
                assert re.search(rf"(?<![\d.]){end:g}(?![\d.]*\d)", rows[name]), f"{name} {end:g}: {rows[name]}"
    for output in node["output"]:
        assert f"**{output}**" in page
    return rows


def strays(folder: Path, nodes: Collection[str]) -> list[str]:
    """Files that the user interface never asks for. It takes Node.md, for a language Node/zh.md, and what these show."""
    asked = re.compile(rf"({'|'.join(nodes)})(/[a-z]{{2}}(-[A-Z]{{2}})?)?\.md|images/({'|'.join(nodes)})\.png")
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if not asked.fullmatch(name))


def test_no_page_without_a_node(ours: dict[str, dict]) -> None:
    assert not strays(DOCS, ours)


def test_a_translated_page_has_its_place(tmp_path: Path) -> None:
    wrong = [
        "DCAEDecode/image.png",
        "DCAEDecode/zh.txt",
        "DCAEDecode/zh/page.md",
        "DCAEDecode_zh.md",
        "Gone.md",
        "Gone/ja.md",
        "images/Gone.png",
    ]
    for name in ("DCAEDecode.md", "DCAEDecode/ja.md", "DCAEDecode/zh-TW.md", "images/DCAEDecode.png", *wrong):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert strays(tmp_path, ["DCAEDecode", "DCAEEncode"]) == wrong


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages_are_there_in_every_language_of_the_labels(language: str, ours: dict[str, dict], server: Server) -> None:
    """Where the user interface looks for them, with the name of the node, every input and output, and who translated them."""
    names = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for node_id, node in ours.items():
        response = requests.get(f"{server.url}/extensions/{PACK}/docs/{node_id}/{language}.md", timeout=60)
        assert response.ok, node_id
        page = response.content.decode()
        assert page.startswith(f"# {names[node_id]['display_name']}\n")
        assert re.search(r"\n\*[^*\n]+\*\n$", page)
        check_inputs(page, node)


def test_every_page_shows_its_node(ours: dict[str, dict], server: Server) -> None:
    """In a picture of that node, which is small; the user interface looks for it from the folder of all pages."""
    for node_id in ours:
        image = requests.get(f"{server.url}/extensions/{PACK}/docs/images/{node_id}.png", timeout=60).content
        assert image.startswith(b"\x89PNG") and len(image) < 30_000
        for page in (DOCS / f"{node_id}.md", *(DOCS / node_id / f"{language}.md" for language in LANGUAGES)):
            assert re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8")) == [f"images/{node_id}.png"]
    assert sum(path.stat().st_size for path in (DOCS / "images").iterdir()) < 300_000


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_fit_the_nodes(language: str, ours: dict[str, dict], server: Server) -> None:
    """Every node and every input has a translation, nothing else has one, and the server hands them out."""
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert texts.keys() == ours.keys()
    for node_id, text in texts.items():
        assert text["display_name"] and text["description"]
        assert text.get("inputs", {}).keys() == inputs(ours[node_id]).keys(), node_id
        assert all(entry["name"] and entry["tooltip"] for entry in text.get("inputs", {}).values())
    served = server.get("i18n")[language]["nodeDefs"]
    assert {node_id: served[node_id] for node_id in texts} == texts
