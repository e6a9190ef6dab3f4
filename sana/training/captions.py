"""The captions of pictures: several of each with their scores, and which of them a step of training takes.

They lie beside the pictures in the layout of NVlabs/Sana (diffusion/data/datasets/sana_data.py), or in one list.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..reading import MOST_JSON_BYTES, check_file, parse_json, read_bytes
from ..saving import write_json

OWN = "prompt"  # the caption in KEY.txt
SCORES = "_clip_score"  # at the end of the name of a file of scores
LIST = "captions.jsonl"  # in the folder of the pictures
OF = "made/from"  # in a file of scores: for each caption, what its score was computed from; no picture has that name
HIGHEST = 100.0
NAME = re.compile(r"[\w.-]{1,100}")


class Caption(NamedTuple):
    name: str  # who wrote it: OWN, or a model
    text: str
    score: float | None = None  # how well it fits its picture, 0 to 100; None: nobody has computed that


@dataclass(frozen=True)
class Choice:
    """Which of the captions of a picture is taken when it comes up.

    way: "turn", all of them, one after the other; "best", always that of the highest score; "score", by chance, the higher
    the score the more often. threshold, temperature: of "score", see `weights`. Raises ValueError for values out of range.
    """

    way: Literal["turn", "best", "score"] = "turn"
    threshold: float = 25.0
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.way not in ("turn", "best", "score"):
            raise ValueError(f"captions are chosen by {self.way!r}; use 'turn', 'best' or 'score'")
        if not 0 <= self.threshold <= HIGHEST:
            raise ValueError(f"the threshold of scores is {self.threshold}; it must be between 0 and 100, such as 25")
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"the temperature is {self.temperature}; it must be a number above 0, such as 0.1")

    def weights(self, captions: Sequence[Caption], turn: int = 0) -> np.ndarray:
        """How likely each of n captions is to be taken, (n,), 1 in all. turn: how often a choice was made before.

        By score s it is s^(1 / temperature) over the sum, among the captions with at least the threshold, and the best where
        none has that; a caption without a score is never taken. So does NVlabs/Sana's loader, while the paper
        (arXiv 2410.10629, section 3.2) has exp(s / temperature). Raises ValueError if several have no score at all.
        """
        if len(captions) == 1:
            return np.ones(1)
        if self.way == "turn":
            return np.eye(len(captions))[turn % len(captions)]
        scores = np.array([-1.0 if caption.score is None else caption.score for caption in captions])
        best = scores.max()
        if best < 0:
            raise ValueError(
                f"none of the captions {', '.join(caption.name for caption in captions)} has a score; "
                "compute them by `python -m sana.training captions score`, or take captions in turn"
            )
        if self.way == "best" or best < self.threshold or best == 0:
            return np.eye(len(captions))[scores.argmax()]
        with np.errstate(under="ignore"):
            powers = np.where(scores >= self.threshold, scores.clip(min=0) / best, 0) ** (1 / self.temperature)
        return powers / powers.sum()

    def possible(self, captions: Sequence[Caption]) -> tuple[Caption, ...]:
        """Those that are ever taken. Raises as `weights`."""
        if self.way == "turn":
            return tuple(captions)
        return tuple(caption for caption, weight in zip(captions, self.weights(captions), strict=True) if weight)


TURN = Choice()


def read_captions(folder: Path, pictures: Sequence[Path]) -> list[tuple[Caption, ...]]:
    """The captions of each picture, with their scores. folder: of all pictures, at any depth; LIST may lie in it.

    For a picture KEY.png these are KEY.txt, by the name OWN, and of each KEY_NAME.json what {KEY: {NAME: text}} says; a
    score is found in KEY_*_clip_score.json as {KEY: {NAME: score}}. A line of LIST is
    {"picture": path in the folder, "text": ..., "name": ..., "score": ...}, the last two as far as there are any; of the
    same name it counts instead of what lies beside the picture.
    Raises ValueError, with the file, for what cannot be read or has another form, and if a picture has no caption.
    """
    texts: dict[Path, dict[str, str]] = {path: {} for path in pictures}
    scores: dict[Path, dict[str, float]] = {path: {} for path in pictures}
    for path in pictures:
        own = path.with_suffix(".txt")
        if own.is_file():
            texts[path][OWN] = _read_text(own)
    for file, candidates in _files_beside(pictures):
        found, values = _read_object(file), (scores if file.stem.endswith(SCORES) else texts)
        for path in candidates:
            values[path].update(_entries(file, found, path.stem))
    for path, caption in _listed(folder, texts):
        texts[path][caption.name] = caption.text
        if caption.score is not None:
            scores[path][caption.name] = caption.score
    silent = [path for path in pictures if not texts[path]]
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(pictures)} pictures have no caption, first {silent[0].name}; write a .txt for each"
        )
    return [
        tuple(Caption(name, text, scores[path].get(name)) for name, text in texts[path].items()) for path in pictures
    ]


def check_name(name: str) -> None:
    """Raises ValueError for a name that the captions of a model cannot have."""
    if name == OWN or name.endswith(SCORES) or not NAME.fullmatch(name):
        raise ValueError(
            f"captions of a model cannot be called {name!r}; give a name of letters, digits, dots and hyphens"
        )


def caption_path(picture: Path, name: str) -> Path:
    """Where the caption that a model has written lies."""
    return picture.with_name(f"{picture.stem}_{name}.json")


def write_caption(picture: Path, name: str, text: str) -> None:
    """Keep what a model, whose name `check_name` allows, has written about a picture. Raises OSError."""
    write_json(caption_path(picture, name), {picture.stem: {name: text}})


def made_from(picture: Path, model: str) -> str:
    """A picture and the model that scores its captions, in 16 digits: what all of their scores depend on."""
    return sha256(sha256(picture.read_bytes()).digest() + model.encode()).hexdigest()[:16]


def has_score(picture: Path, caption: Caption, of: str) -> bool:
    """Whether `write_score` has written one for this text and for what `made_from` has told as `of`."""
    path = _score_path(picture, caption.name)
    made = _read_object(path).get(OF) if path.exists() else None
    return isinstance(made, dict) and made.get(caption.name) == _origin(caption, of)


def write_score(picture: Path, caption: Caption, score: float, of: str) -> None:
    """Keep how well a caption fits its picture, 0 to 100. of: as for `has_score`.

    Raises ValueError for the name of a caption that no file can have, and OSError.
    """
    path = _score_path(picture, caption.name)
    found = {caption.name: f"{score:.4f}"}  # a text, as NVlabs writes it
    write_json(path, {picture.stem: found, OF: {caption.name: _origin(caption, of)}})


def _origin(caption: Caption, of: str) -> str:
    """What a score depends on, in 16 digits."""
    return sha256(json.dumps([caption.text, of]).encode()).hexdigest()[:16]


def _score_path(picture: Path, name: str) -> Path:
    """Raises ValueError for a name, read from some file, that no file can have."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"a caption of {picture.name} is called {name!r}; only letters, digits, dots and hyphens can be scored"
        )
    return picture.with_name(f"{picture.stem}_{name}{SCORES}.json")


def _files_beside(pictures: Sequence[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """The JSON files whose names begin with that of a picture, each with all pictures of which that is so, in order."""
    folders: dict[Path, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in pictures:
        folders[path.parent][path.stem].append(path)
    for folder, stems in folders.items():
        for file in sorted(folder.glob("*_*.json")):
            ends = [match.start() for match in re.finditer("_", file.stem)]
            candidates = [path for end in ends for path in stems.get(file.stem[:end], ())]
            if candidates:
                yield file, candidates


def _listed(folder: Path, pictures: Mapping[Path, object]) -> Iterator[tuple[Path, Caption]]:
    """What LIST says, if there is one."""
    path = folder / LIST
    if not path.exists():
        return
    check_file(path)
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_JSON_BYTES + 1), b""), 1):
            if not line.strip():
                continue
            try:
                found = parse_json(line)
                if not isinstance(found, dict) or not isinstance(found.get("text"), str):
                    raise ValueError('it has no "text"')
                _check_utf8(found["text"])
                picture = folder / str(found.get("picture"))
                if picture not in pictures:
                    raise ValueError(f'its "picture" is {found.get("picture")!r}, and there is none of that name')
                score = found.get("score")
                yield (
                    picture,
                    Caption(_name(found.get("name", OWN)), found["text"], None if score is None else _score(score)),
                )
            except ValueError as error:
                raise ValueError(
                    f"line {number} of {path} is no caption ({error}); "
                    'write {"picture": "a.png", "text": "a caption"} in each line'
                ) from error


def _entries(file: Path, found: Mapping[str, object], key: str) -> dict[str, object]:
    """What a file beside a picture tells of it: texts or scores by the names of captions."""
    values = found.get(key, {})
    read = _score if file.stem.endswith(SCORES) else _text
    try:
        if not isinstance(values, dict):
            raise ValueError(f"{key!r} has no captions by name")
        return {_name(name): read(value) for name, value in values.items()}
    except ValueError as error:
        raise ValueError(
            f"{file} has another form than captions or their scores ({error}); delete it, or write it anew"
        ) from error


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"a caption is called {value!r}")
    return value


def _text(value: object) -> str:
    """Of NVlabs' loader: no caption is an empty one."""
    if not isinstance(value, str | None):
        raise ValueError(f"a caption is {value!r}")
    _check_utf8(value or "")
    return (value or "").strip()


def _check_utf8(text: str) -> None:
    """Raises ValueError for half a pair of surrogates, which JSON can name and no text encoder reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a caption is {text!r}, which is no text in UTF-8") from error


def _score(value: object) -> float:
    """From a number or its text."""
    try:
        score = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else np.nan
    except ValueError:
        score = np.nan
    if not 0 <= score <= HIGHEST:
        raise ValueError(f"a score is {value!r}, and must be between 0 and 100")
    return score


def _read_object(path: Path) -> dict[str, object]:
    """A JSON file; what is no object is of somebody else."""
    try:
        found = parse_json(read_bytes(path, MOST_JSON_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, or write it anew") from error
    return found if isinstance(found, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8; write the caption anew") from error
