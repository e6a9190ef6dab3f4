"""Draw a prompt with the demo model: python3 sana/demo "a red circle left of a blue square" [options].

Makes the environment .venv/demo on the first run, then runs `python -m sana generate` in it with the same arguments.
Standard library only.
"""

from __future__ import annotations

import sys

import environment

PROMPT = "a red circle left of a blue square"
USAGE = f'Usage: python3 sana/demo "{PROMPT}" [options of python -m sana generate, such as --seed 1 --out picture.png]'


def main(arguments: list[str]) -> int:
    """Returns the exit code of the picture's making, or of the help."""
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not arguments:
        print(f"{USAGE}\nNo prompt given: drawing the one above.", file=sys.stderr)
    python = environment.prepare("demo", ["demo"])
    variables = {
        "PYTHONPATH": str(environment.ROOT),
        "PYTHONSAFEPATH": "1",
    }  # nothing of the current folder is imported
    return environment.run([python, "-m", "sana", "generate", *(arguments or [PROMPT])], variables=variables)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except environment.SetupError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit(130)
