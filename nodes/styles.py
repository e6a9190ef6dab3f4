"""The list of styles of SANA prompt: those of `sana/text/styles.py`, and those that a person has in the user's folder."""

import logging
from pathlib import Path

import folder_paths

from ..sana.text.styles import AGAINST, NO_STYLE, STYLES, Style, read_styles
from ..sana.text.tokenizers import check_text

log = logging.getLogger(__name__)


def styles_file() -> Path:
    return Path(folder_paths.get_user_directory(), "default", "sana", "styles.json")


def style_names() -> list[str]:
    """What the list shows: no style, and each style twice, for the prompt and for the negative prompt.

    A file that cannot be read is told in the log, and adds nothing.
    """
    styles, error = _read()
    if error:
        log.warning(error)
    return [NO_STYLE, *styles, *(name + AGAINST for name in styles)]


def styled(text: str, choice: str) -> str:
    """A text in the style of an entry of the list.

    Raises ValueError for an entry that is gone, or that a broken file had, and for what is no text.
    """
    check_text(text)
    if choice == NO_STYLE:
        return text
    style = _find(choice)
    return style.against(text) if choice.endswith(AGAINST) else style.around(text)


def style_text(choice: str) -> str:
    """What an entry of the list does to a text, for people; "" for none. Raises as `styled` does."""
    return styled("…", choice) if choice != NO_STYLE else ""


def _find(choice: str) -> Style:
    name = choice.removesuffix(AGAINST)
    styles, error = _read()
    if name not in styles:
        raise error or ValueError(f"{name[:100]!r} is no style; choose another, add it to {styles_file()}, or press R")
    return styles[name]


def _read() -> tuple[dict[str, Style], ValueError | None]:
    """All styles; ours alone, and why, if the file of a person is broken."""
    try:
        return read_styles(styles_file()), None
    except ValueError as error:
        return STYLES, error
