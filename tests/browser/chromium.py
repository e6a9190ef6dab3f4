"""Where Chromium is, and how it is started. Standard library only."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".venv" / "chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = f"The browser tests need one of {', '.join(NAMES)} on PATH, and no Debian package of Chromium could be had."
FLAGS = [
    "--no-sandbox",  # as root, and in containers, there is no other way; only pages of this machine are opened
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass(frozen=True)
class Chromium:
    """An executable and the variables it needs beside those of this process."""

    executable: Path
    variables: dict[str, str]


def find_chromium() -> Chromium | None:
    """The system's Chromium if there is one on PATH, else the one unpacked in .venv/chromium, else None."""
    for name in NAMES:
        if found := shutil.which(name):
            return Chromium(Path(found), {})
    executable = FOLDER / "usr" / "lib" / "chromium" / "chromium"
    if not executable.exists():
        return None
    libraries = {str(library.parent) for library in FOLDER.rglob("*.so*") if library.parent != executable.parent}
    return Chromium(
        executable,
        {"LD_LIBRARY_PATH": os.pathsep.join(sorted(libraries)), "FONTCONFIG_FILE": str(FOLDER / "fonts.conf")},
    )
