"""A base directory for a host: empty model folders, settings of the user interface, and this pack among the custom nodes."""

import json
import shutil
from pathlib import Path

from tests.host.hosts import ROOT

PACK = "ComfyUI-Sana"
MODELS = ("checkpoints", "controlnet", "diffusion_models", "diffusers", "loras", "text_encoders", "vae")
FOLDERS = ("custom_nodes", *(f"models/{name}" for name in MODELS), "input", "output", "temp", "user/default")
SETTINGS = {"Comfy.TutorialCompleted": True}  # no dialog of first steps over the graph


def make_base_directory(base: Path) -> None:
    """Fills `base`, which is made if need be. The pack is copied, so that it cannot use what is not shipped with it."""
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    ignored = shutil.ignore_patterns(".*", *_patterns(".comfyignore"), *_patterns(".gitignore"))
    pack = base / "custom_nodes" / PACK
    shutil.copytree(ROOT, pack, ignore=ignored)
    for path in _patterns(".comfyignore"):
        if "/" in path:
            (pack / path).unlink()


def _patterns(name: str) -> list[str]:
    """What an ignore file lists: plain names and wildcards, and paths of files."""
    return [line.rstrip("/") for line in (ROOT / name).read_text(encoding="utf-8").split() if line]
