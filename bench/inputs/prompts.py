"""Files of prompts in some encoding, of some length, with some characters."""

import os
from pathlib import Path
from random import Random

from .damage import damaged_bytes
from .originals import Damaged


def prompts(rng: Random, folder: Path, originals: Path) -> Damaged:
    """A file of prompts in some encoding, of some length, with some characters."""
    path = folder / "prompts.txt"
    line = rng.choice(
        (
            *(
                "a red circle",
                "",
                " ",
                "\0",
                "a\0b",
                "é",
                "一只猫",
                "🐱👩‍🚀",
                "e\u0301" * 50,
                "\u202e abc",
                "<bos><eos><pad>",
            ),
            *(
                "a" * 40 + "!",
                "a" * 20_000,
                "▁" * 500,
                "<0x00>" * 100,
                "\r",
                "\v\f\x1c\x85\u2028",
                "{",
                "%s",
                "\\n",
                "-x",
            ),
        )
    )
    end = rng.choice(("\n", "\r\n", "\r", "\n\n", "\u2028", ""))
    text = (line + end) * rng.choice((1, 1, 2, 3))
    encoding = rng.choice(
        ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252", "shift-jis")
    )
    content = text.encode(encoding, "replace")
    path.write_bytes(damaged_bytes(rng, content) if rng.random() < 0.3 else content)
    if rng.random() < 0.05:
        path.unlink()
        rng.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path), lambda: None))()
    return Damaged(path, "prompts")
