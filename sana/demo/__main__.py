"""Draw a prompt with the demo model: python3 sana/demo "a red circle left of a blue square" [options].

Runs `python -m sana generate` with the same arguments, in the Python at hand if that has all it needs, as ComfyUI's own
has, and else in the environment .venv/demo, which the first run makes. Standard library only.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
interruption = SimpleNamespace(**runpy.run_path(str(ROOT / "sana" / "interruption.py")))
if __name__ == "__main__":
    interruption.expect()

import environment  # noqa: E402

PROMPT = "a red circle left of a blue square"
USAGE = f'Usage: python3 sana/demo "{PROMPT}" [options of python -m sana generate, such as --seed 1 --out picture.png]'
NOTICE = """{python} lacks {missing}.
Up to about 2.8 GB are downloaded, 4.6 GB on disk: on Linux pip takes a PyTorch with CUDA, elsewhere far less.
A Python that has these packages, such as ComfyUI's own, downloads nothing: Ctrl-C, and run this command with that one."""


def main(arguments: list[str]) -> int:
    """Returns the exit code of the picture's making, or of the help."""
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not arguments:
        print(f"{USAGE}\nNo prompt given: drawing the one above.", file=sys.stderr)
    python, paths = choose_python()
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",  # nothing of the current folder is imported
    }
    return environment.run([python, "-m", "sana", "generate", *(arguments or [PROMPT])], variables=variables)


def choose_python() -> tuple[Path, list[str]]:
    """The Python to draw with, and where it looks for modules beside its own. Raises environment.SetupError."""
    environment.check_python()
    missing = environment.missing(environment.read_requirements([]))
    if not missing:
        return Path(sys.executable), [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    notice = NOTICE.format(python=sys.executable, missing=", ".join(missing))
    return environment.prepare("demo", ["demo"], notice=notice), [str(ROOT)]


if __name__ == "__main__":
    try:
        interruption.begin()
        sys.exit(main(sys.argv[1:]))
    except environment.SetupError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit(interruption.INTERRUPTED)
