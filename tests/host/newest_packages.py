"""The newest packages that a host would bring, beside the versions that it asks for: `python3 tests --newest`. Standard library only."""

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".venv" / "newest"
# Without what they require: the packages of templates require hundreds of MB of pictures.
NAMES = (
    "comfyui-frontend-package",
    "comfyui-workflow-templates",
    "comfyui-workflow-templates-core",
    "comfyui-workflow-templates-json",
    "comfyui-embedded-docs",
    "comfy-kitchen",
    "comfy-aimdo",
)
CHOSEN = "SANA_TEST_NEWEST"  # in a stage with these packages, where they are, for the servers that its tests start
VARIABLES = {
    "PYTHONPATH": str(FOLDER),
    CHOSEN: str(FOLDER),
}  # of such a stage: they are found before those of the environment


def for_servers() -> dict[str, str]:
    """Variables of a server that is started now."""
    return {"PYTHONPATH": os.environ[CHOSEN]} if CHOSEN in os.environ else {}


def found() -> list[str]:
    """Names and versions, as "comfy-aimdo 0.6.0"."""
    folders = FOLDER.glob("*.dist-info")
    return sorted(" ".join(folder.stem.replace("_", "-").rsplit("-", 1)) for folder in folders)
