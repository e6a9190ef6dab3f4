"""Styles: what is put around a prompt to say how a picture is made, and what a negative prompt then says.

A file may add to them or replace them: a JSON object, {"Name": {"prompt": "... {prompt} ...", "negative": "..."}}.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..reading import parse_json, read_bytes
from .tokenizers import check_text

PROMPT = "{prompt}"  # where the words of a person stand in a style
MOST_BYTES, MOST_STYLES, MOST_LETTERS = 2**20, 1000, 2000  # of a file; in it; of each text in it
NO_STYLE = "none"  # in lists
AGAINST = " (negative)"  # in lists behind the name of a style: what a negative prompt says for it
FORM = '{"Name": {"prompt": "an etching of {prompt}", "negative": "colour"}}'


@dataclass(frozen=True)
class Style:
    """How a picture is made."""

    prompt: str  # with PROMPT in it once
    negative: str  # what it is not

    def around(self, text: str) -> str:
        """A prompt in this style."""
        return self.prompt.replace(PROMPT, text.strip())

    def against(self, text: str) -> str:
        """A negative prompt that keeps to this style."""
        return ", ".join(filter(None, (text.strip(), self.negative)))


STYLES = {
    "Photograph": Style(
        "a photograph of {prompt}, natural light, true colours, fine detail, shallow depth of field",
        "drawing, painting, computer graphics, plastic skin, oversaturated",
    ),
    "Film still": Style(
        "a still from a film, {prompt}, wide shot, low warm light, soft grain, muted colours",
        "flat lighting, snapshot, cartoon, text",
    ),
    "Black and white": Style(
        "a black and white photograph of {prompt}, deep shadows, bright highlights, visible grain",
        "colour, sepia, drawing",
    ),
    "Watercolour": Style(
        "a watercolour of {prompt}, thin washes that run into each other, white paper showing through, loose edges",
        "photograph, hard outlines, glossy, dark background",
    ),
    "Oil painting": Style(
        "an oil painting of {prompt}, thick visible brush strokes, rich colours, canvas texture",
        "photograph, flat colours, smooth gradients, computer graphics",
    ),
    "Pencil drawing": Style(
        "a pencil drawing of {prompt}, fine hatching, soft grey tones, textured paper",
        "colour, photograph, thick outlines",
    ),
    "Ink": Style(
        "an ink drawing of {prompt}, bold black brush lines, much empty white paper",
        "colour, grey tones, photograph, shading",
    ),
    "Woodcut": Style(
        "a woodcut of {prompt}, carved parallel lines, two flat colours, rough print texture",
        "photograph, smooth gradients, many colours",
    ),
    "Flat illustration": Style(
        "a flat illustration of {prompt}, simple shapes, few clear colours, no outlines, plain background",
        "photograph, texture, shadows, clutter",
    ),
    "Comic": Style(
        "a comic panel of {prompt}, clear ink outlines, flat colours, halftone dots, strong poses",
        "photograph, blurred, realistic skin, speech bubbles",
    ),
    "Animation": Style(
        "a frame of an animated film, {prompt}, clean lines, painted background, bright cel shading",
        "photograph, realistic skin, sketchy lines",
    ),
    "Pixel art": Style(
        "pixel art of {prompt}, large square pixels, a palette of sixteen colours, sharp edges",
        "photograph, smooth gradients, blurred, antialiasing",
    ),
    "Clay": Style(
        "{prompt}, modelled from clay, finger prints in the surface, small studio set, soft light",
        "photograph of a real scene, drawing, flat colours",
    ),
    "Paper": Style(
        "{prompt}, cut and folded from coloured paper, layered, crisp edges, soft shadows between the layers",
        "photograph of a real scene, painting, glossy",
    ),
}


def read_styles(path: Path) -> dict[str, Style]:
    """STYLES with those of a file, in its order behind them; of equal names that of the file. No file: STYLES.

    Raises ValueError, in one sentence, for a file that is no list of styles.
    """
    if not path.exists():
        return dict(STYLES)
    try:
        source = read_bytes(path, MOST_BYTES)
        if len(source) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        return STYLES | _checked(parse_json(source))
    except (ValueError, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ValueError(f"{path} holds no styles ({reason}); write {FORM}") from error


def _checked(found: object) -> dict[str, Style]:
    if not isinstance(found, Mapping):
        raise ValueError("it is no JSON object")
    if len(found) > MOST_STYLES:
        raise ValueError(f"it has more than {MOST_STYLES:,} styles")
    return {name: _style(name, parts) for name, parts in found.items()}


def _style(name: str, parts: object) -> Style:
    shown = repr(name[:50])
    if not name.strip() or len(name) > 100:
        raise ValueError(f"{shown} is no name of 1 to 100 letters")
    if name == NO_STYLE or name.endswith(AGAINST):
        raise ValueError(f"{shown} is a name with a meaning of its own in the list of styles")
    texts = [parts.get(key, "") for key in ("prompt", "negative")] if isinstance(parts, Mapping) else [None]
    if not all(isinstance(text, str) and len(text) <= MOST_LETTERS for text in texts):
        raise ValueError(f"{shown} has no prompt and negative of {MOST_LETTERS:,} letters at most")
    if texts[0].count(PROMPT) != 1:
        raise ValueError(f"the prompt of {shown} does not have {PROMPT} in it once")
    for text in (name, *texts):
        check_text(text, f"style {shown}")
    return Style(*texts)
