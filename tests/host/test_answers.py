"""What the user interface may ask while a graph is edited: the count of tokens, for models that the loaders list and no other."""

import shutil
import time
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from safetensors.torch import save_file

import sana
from sana.loading import MODELS
from sana.text.styles import STYLES
from sana.text.text_encoder import GemmaTextEncoder
from tests.host.client import Client
from tests.host.hosts import NEWEST, OLDEST
from tests.host.server import Server, Servers

DEMO = {"loader": "SanaCheckpointLoader", "model": "demo", "text_encoder": "auto"}
TEXT = "a red circle left of a blue square"
CUSTOM = "Describe the picture. "
PLACE = "small gemma"  # in models/text_encoders


@pytest.fixture(scope="module")
def encoder() -> GemmaTextEncoder:
    return sana.load_text_encoder(MODELS["demo"])


@pytest.fixture(scope="module")
def parts(server: Server) -> Path:
    """models/text_encoders with the demo's encoder in it."""
    folder = server.base / "models" / "text_encoders"
    if not (folder / PLACE).exists():
        shutil.copytree(MODELS["demo"] / "text_encoder", folder / PLACE)
        shutil.copytree(MODELS["demo"] / "tokenizer", folder / PLACE, dirs_exist_ok=True)
    return folder


def ask(server: Client, **question: object) -> requests.Response:
    return requests.post(f"{server.url}/sana/tokens", json={"instruction": "official", **question}, timeout=60)


def count(server: Client, **question: object) -> dict[str, object]:
    response = ask(server, **{**DEMO, **question})
    assert response.ok, response.text
    return response.json()


def refusal(server: Client, **question: object) -> str:
    response = ask(server, **{**DEMO, **question})
    assert response.status_code == 400
    return response.json()["error"]


@pytest.mark.parametrize(
    ("instruction", "before"), [("official", sana.INSTRUCTION), ("none", None), ("custom", CUSTOM), ("custom", "")]
)
def test_counts_are_those_of_the_encoder(
    server: Server, encoder: GemmaTextEncoder, instruction: str, before: str | None
) -> None:
    words = " ".join(f"word{k}" for k in range(400))
    for text in ("", TEXT, f"  {TEXT}\n", "月 🐱", words):
        ((used, lost),) = encoder.count([text], before or None)
        answer = count(server, text=text, instruction=instruction, custom_instruction=before or "")
        assert answer.pop("cut") == "" or lost
        assert answer == {"used": used - 1, "limit": 299, "lost": lost, "style": ""}


@pytest.mark.parametrize("instruction", ["official", "none"])
def test_what_is_cut_is_what_the_encoder_does_not_see(
    server: Server, encoder: GemmaTextEncoder, instruction: str
) -> None:
    """The rest of the text alone fits without a loss."""
    words = [f"word{k}" for k in range(200)]
    before = sana.INSTRUCTION if instruction == "official" else None
    fitting = bisect(range(200), 0, key=lambda k: encoder.count([" ".join(words[:k])], before)[0].lost) - 1
    text = " ".join(words[: fitting + 3])
    answer = count(server, text=text, instruction=instruction)
    assert answer["used"] == 299 and answer["lost"] > 0
    assert (
        text.endswith(answer["cut"]) and words[fitting + 2] in answer["cut"] and words[fitting - 1] not in answer["cut"]
    )
    assert not count(server, text=text.removesuffix(answer["cut"]), instruction=instruction)["lost"]


def test_long_texts_are_counted_and_shown_in_part(server: Server) -> None:
    answer = count(server, text="a cat and " * 10_000)
    assert answer["used"] == 299 and answer["lost"] > 10_000
    assert answer["cut"].endswith(" …") and len(answer["cut"]) == 122
    response = ask(server, **DEMO, text="a" * 2**23)
    assert response.status_code == 413 and "8,388,608 bytes at most" in response.json()["error"]


def test_answers_take_no_time_once_a_model_is_known(server: Server) -> None:
    """Less than a person notices. One of many, since the machine has other work."""

    def seconds(k: int) -> float:
        start = time.perf_counter()
        count(server, text=(f"a small cat {k} " * 200)[:2000])
        return time.perf_counter() - start

    assert any(seconds(k) < 0.02 for k in range(100))


def test_many_questions_at_once_have_an_answer_each(server: Server) -> None:
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda k: count(server, text="cat " * k)["used"], range(1, 11)))
    assert answers == sorted(answers) and len({*answers}) == 10


def test_encoders_are_found_as_the_loaders_find_them(
    server: Server, parts: Path, encoder: GemmaTextEncoder, tmp_path: Path
) -> None:
    wanted = encoder.count([TEXT])[0].used - 1
    named = {"loader": "SanaTextEncoderLoader", "model": "", "text_encoder": PLACE}
    assert count(server, text=TEXT, **named)["used"] == wanted
    assert count(server, text=TEXT, text_encoder=PLACE)["used"] == wanted
    shutil.copytree(MODELS["demo"] / "transformer", parts.parent / "diffusion_models" / "alone")
    assert count(server, text=TEXT, model="alone")["used"] == wanted  # auto: the one in models/text_encoders
    shutil.rmtree(parts.parent / "diffusion_models" / "alone")


def test_a_file_that_is_no_text_encoder_is_refused_as_by_the_loader(server: Server, parts: Path) -> None:
    save_file({"x": torch.zeros(1)}, parts / "other.safetensors")
    requests.get(f"{server.url}/object_info", timeout=60)  # as the key R does
    assert refusal(server, text=TEXT, text_encoder="other.safetensors").startswith("other.safetensors is ")
    (parts / "other.safetensors").unlink()


@pytest.mark.parametrize(
    "name", ["../../../etc", "..", "/etc/passwd", f"../text_encoders/{PLACE}", f"./{PLACE}", "gone", ""]
)
def test_names_that_no_list_has_are_refused(server: Server, parts: Path, name: str) -> None:
    """Also those that lead to a model."""
    for question in (
        {"text_encoder": name},
        {"loader": "SanaTextEncoderLoader", "text_encoder": name},
        {"model": name, "text_encoder": PLACE},
    ):
        assert refusal(server, text=TEXT, **question) == (
            f"{name!r} is in no list of the loaders; choose another, or press R"
        )


def test_absolute_paths_of_models_are_refused(server: Server, parts: Path) -> None:
    assert "is in no list of the loaders" in refusal(server, text=TEXT, text_encoder=str(parts / PLACE))
    assert "is in no list of the loaders" in refusal(server, text=TEXT, model=str(MODELS["demo"]))


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ({"loader": "CheckpointLoaderSimple"}, "'CheckpointLoaderSimple' is no loader of SANA's text encoder"),
        ({"text": 7}, "text is a text, not int"),
        (
            {"text": "\ud83d", "instruction": "none"},
            "the prompt is no text in UTF-8 from its character 1 on; type it again",
        ),
        (
            {"text": "a \ud83d", "instruction": "official", "style": "Clay (negative)"},
            "the prompt is no text in UTF-8 from its character 3 on; type it again",
        ),
        (
            {"text": "a", "instruction": "custom", "custom_instruction": "Draw \ud83d"},
            "the instruction is no text in UTF-8 from its character 6 on; type it again",
        ),
        ({"text": None}, "text is a text, not NoneType"),
        ({"model": ["demo"]}, "model is a text, not list"),
        ({"instruction": "other"}, "instruction is official, none or custom, not 'other'"),
    ],
)
def test_questions_that_no_node_asks_are_refused(server: Server, question: dict[str, object], sentence: str) -> None:
    assert refusal(server, **question) == sentence


@pytest.mark.parametrize(
    ("body", "sentence"), [("[1]", "/sana/tokens takes a JSON object, not list"), ("{", "Expecting")]
)
def test_a_question_is_a_json_object(server: Server, body: str, sentence: str) -> None:
    response = requests.post(f"{server.url}/sana/tokens", data=body, timeout=60)
    assert response.status_code == 400 and response.json()["error"].startswith(sentence)


@pytest.mark.parametrize("version", [NEWEST, OLDEST])
def test_the_route_is_there_under_both_of_its_names(servers: Servers, version: str) -> None:
    """The user interface puts /api before every path."""
    for path in ("sana/tokens", "api/sana/tokens"):
        body = {**DEMO, "text": TEXT, "instruction": "none"}
        assert requests.post(f"{servers(version).url}/{path}", json=body, timeout=60).json()["limit"] == 299


def test_sizes_that_a_model_may_have_been_released_for(server: Server) -> None:
    """None for the demo; the names are those of the list, as for tokens."""
    url = f"{server.url}/sana/sizes"
    assert requests.post(url, json={"model": "demo"}, timeout=60).json() == {"sizes": []}
    for name in ("..", "../demo", "gone"):
        response = requests.post(url, json={"model": name}, timeout=60)
        assert response.status_code == 400
        assert response.json()["error"] == f"{name!r} is in no list of the loaders; choose another, or press R"


def styles(server: Client) -> list[str]:
    """The list of styles as the server tells it when it is asked anew, as by the key R."""
    return requests.get(f"{server.url}/object_info/GemmaTextEncode", timeout=60).json()["GemmaTextEncode"]["input"][
        "optional"
    ]["style"][1]["options"]


def test_styles_of_a_person_are_read_anew(server: Server) -> None:
    """And counted with. A broken file, and one of 10 MB, add nothing, and the log says why in one sentence."""
    path = server.base / "user" / "default" / "sana" / "styles.json"
    ours = styles(server)
    assert ours[:2] == ["none", "Photograph"] and ours[-1] == "Paper (negative)" and len(ours) == 1 + 2 * len(STYLES)
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"Etching": {"prompt": "an etching of {prompt}", "negative": "colour"}}')
    try:
        assert [name for name in styles(server) if name not in ours] == ["Etching", "Etching (negative)"]
        for style, text, shown in (
            ("none", TEXT, ""),
            ("Etching", f"an etching of {TEXT}", "an etching of …"),
            ("Etching (negative)", f"{TEXT}, colour", "…, colour"),
        ):
            answer = count(server, text=TEXT, style=style)
            assert answer == {**count(server, text=text), "style": shown}
        for content in ("{", "[]" + " " * 10_000_000):
            path.write_text(content)
            assert styles(server) == ours
            sentence = f"{path} holds no styles ("
            assert sentence in server.log()
            assert refusal(server, text=TEXT, style="Etching").startswith(sentence)
            for style in ("none", "Clay"):
                assert count(server, text=TEXT, style=style)["used"] > 0
    finally:
        path.unlink()
    assert refusal(server, text=TEXT, style="Etching").startswith("'Etching' is no style; choose another, add it to ")
