"""The newest user interface, which may be newer than the one that a host brings. Standard library only.

The wheel `comfyui-frontend-package` (GPL-3.0) is downloaded for tests only; nothing of it is part of this project.
"""

from pathlib import Path

VERSION = "1.58.1"
SHA256 = "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9"
FOLDER = Path(__file__).resolve().parents[2] / ".venv" / "frontends" / VERSION
FLAGS = ("--front-end-root", str(FOLDER / "comfyui_frontend_package" / "static"))  # of a host that is to show it
