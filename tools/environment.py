"""Virtual environments of this project, in .venv/ beside the sources: made, updated and repaired by the two commands,
`python3 sana/demo` and `python3 tests`.

Standard library only, and not part of the package `sana`: it runs before anything is installed, with the Python that
the user has. Versions are written in pyproject.toml, never here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 10)
OLDEST_PIP = (22, 3)  # the first with --python, which installs into an environment that has no pip of its own
RECORD = "installed.txt"  # what an environment holds; written last


class SetupError(Exception):
    """An environment cannot be made; the message says why and what to do."""


def prepare(
    name: str,
    extras: Sequence[str],
    *,
    more: Sequence[str] = (),  # requirements that pyproject.toml cannot name
    constraints: Path | None = None,  # a file of versions, for what is needed without being named
    notice: str = "",  # said before an installation
    finish: Callable[[Path], None] | None = None,  # called with the new Python after an installation
) -> Path:
    """Returns the Python of .venv/`name`, which holds the dependencies, the `extras` of pyproject.toml and `more`.

    Installs only what the record of the environment lacks; what it has beside that stays. No record means that an
    installation was interrupted: the environment is made anew. Raises SetupError.
    """
    check_python()
    folder = ROOT / ".venv" / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    requirements = [*read_requirements(extras), *more]
    versions = constraints.read_text(encoding="utf-8").splitlines() if constraints else []
    wanted = [f"python {_dotted(sys.version_info[:2])}", *requirements, *(f"constraint {line}" for line in versions)]
    recorded = _read_record(folder) if python.exists() else []
    if {*wanted} <= {*recorded}:
        return python
    _check_pip()
    start = time.monotonic()
    if notice:
        say(notice)
    say(f"Installing {len(requirements)} requirements and what they need in {folder} (once) ...")
    if recorded[:1] != wanted[:1]:
        venv.create(folder, clear=True, symlinks=os.name != "nt")
    (folder / RECORD).unlink(missing_ok=True)
    limits = ("--constraint", constraints) if constraints else ()
    pip("--python", python, "install", "--no-compile", *requirements, *limits)  # most modules are never imported
    if finish:
        finish(python)
    (folder / RECORD).write_text("\n".join(wanted), encoding="utf-8")
    say(f"Installed in {time.monotonic() - start:.0f} s.")
    return python


def check_python(oldest: Sequence[int] = OLDEST_PYTHON) -> None:
    """Raises SetupError if the Python that runs this is too old."""
    if sys.version_info < tuple(oldest):
        raise SetupError(f"Python {_dotted(sys.version_info[:2])} is too old: use Python {_dotted(oldest)} or newer.")


def read_requirements(extras: Sequence[str]) -> list[str]:
    """The optional groups `extras` of pyproject.toml and its dependencies. Raises SetupError if nothing can read it.

    The groups come first: pip would fetch the newest torch for a plain "torch" before it sees the version of a group.
    """
    project = read_project()
    groups = [project["optional-dependencies"][extra] for extra in extras]
    return [*(requirement for group in groups for requirement in group), *project["dependencies"]]


def read_project() -> dict[str, Any]:
    """The table "project" of pyproject.toml. Raises SetupError if nothing can read it."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        _check_pip()
        from pip._vendor import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def missing(requirements: Sequence[str]) -> list[str]:
    """Those of `requirements`, each "name" or "name>=version", that the Python which runs this has not or only older."""
    return [requirement for requirement in requirements if not _is_met(requirement)]


def run(
    command: Sequence[str | Path],
    *,
    folder: Path | None = None,
    variables: dict[str, str] | None = None,
    output: IO[bytes] | None = None,
) -> int:
    """Runs `command` in `folder` (None: here) with `variables` added to the environment; returns its exit code.

    output: a file for what it prints; None: the terminal.

    Ctrl-C reaches the command through the terminal: KeyboardInterrupt is raised once it has cleaned up after itself.
    """
    interrupted = False
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **(variables or {})},
        stdout=output,
        stderr=output and subprocess.STDOUT,
    ) as process:
        while process.returncode is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode if process.returncode >= 0 else 128 - process.returncode  # a signal, as shells report it


def pip(*arguments: str | Path) -> None:
    """Runs pip of the Python that runs this; its output is the progress. Raises SetupError if it fails."""
    patience = ("--retries=10", "--timeout=60")
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", *patience]
    if run(command, variables={"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}):
        raise SetupError("pip did not finish; the lines above say why. Run the command again to start it anew.")


def say(message: str) -> None:
    """Progress goes to the error stream: the output belongs to the command that follows."""
    sys.stderr.write(f"{message}\n")


def _read_record(folder: Path) -> list[str]:
    record = folder / RECORD
    return record.read_text(encoding="utf-8").split("\n") if record.exists() else []


def _is_met(requirement: str) -> bool:
    name, _, oldest = requirement.partition(">=")
    try:
        return _numbers(metadata.version(name)) >= _numbers(oldest)
    except metadata.PackageNotFoundError:
        return False


def _check_pip() -> None:
    try:
        version = metadata.version("pip")
    except metadata.PackageNotFoundError:
        hint = "apt install python3-pip, or python3 -m ensurepip"
        raise SetupError(f"{sys.executable} has no pip: install it ({hint}) and run the command again.") from None
    if _numbers(version) < OLDEST_PIP:
        raise SetupError(f"pip {version} is too old: update it to {_dotted(OLDEST_PIP)} or newer (pip install -U pip).")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
