"""Run all tests: python3 tests [pytest arguments].

Makes the environment .venv/tests, fetches the hosts and a Chromium, then runs ruff, the tests, and the in-process tests once
for each version of the host, whose state is global to a process. Standard library only.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import downloads  # noqa: E402
import environment  # noqa: E402
from host.hosts import HOSTS, NEWEST  # noqa: E402

OLDEST_PYTHON = (3, 11)  # of the packages that the tests compare with
IN_PROCESS = "tests/host/inprocess"
NO_TESTS = 5  # the exit code of pytest that found none


@dataclass(frozen=True)
class Stage:
    """One command of the whole run."""

    title: str
    arguments: list[str]  # of the environment's Python
    variables: dict[str, str] = field(default_factory=dict)


def main(arguments: list[str]) -> int:
    """Returns the exit code of the first stage that failed, after running all."""
    python = prepare()
    codes: dict[str, int] = {}
    for stage in list_stages(arguments):
        environment.say(f"\n== {stage.title}")
        start = time.monotonic()
        codes[stage.title] = environment.run([python, *stage.arguments], folder=ROOT, variables=stage.variables)
        environment.say(f"== {stage.title}: exit code {codes[stage.title]} after {time.monotonic() - start:.0f} s")
    return summarise(codes)


def prepare() -> Path:
    """Makes everything the tests need and returns the Python to run them with. Raises SetupError."""
    environment.check_python(OLDEST_PYTHON)
    downloads.fetch_hosts()
    more = [*downloads.read_requirements(ROOT / "tests" / "versions.txt"), *downloads.host_requirements()]
    python = environment.prepare("tests", ["test"], more=more, finish=downloads.repair_torchvision)
    downloads.fetch_chromium()
    return python


def list_stages(arguments: list[str]) -> list[Stage]:
    """Every stage gets the options among `arguments`; paths of tests choose the stages that have them."""
    paths = [argument for argument in arguments if argument == "tests" or argument.startswith("tests/")]
    options = [argument for argument in arguments if argument not in paths]
    inside = [path for path in paths if path.startswith(IN_PROCESS)]
    outside = [path for path in paths if path not in inside]
    stages = [
        Stage("ruff check", ["-m", "ruff", "check", "."]),
        Stage("ruff format", ["-m", "ruff", "format", "--check", "."]),
    ]
    if outside or not paths:
        stages.append(Stage("tests", ["-m", "pytest", f"--ignore={IN_PROCESS}", *options, *outside]))
    if inside or not paths:
        command = ["-m", "pytest", *options, *(inside or [IN_PROCESS])]
        stages += [Stage(f"tests inside ComfyUI {version}", command, {"SANA_TEST_HOST": version}) for version in HOSTS]
        second = {"SANA_TEST_HOST": NEWEST, "SANA_TEST_DEVICE": "second"}
        stages.append(Stage(f"tests inside ComfyUI {NEWEST} on a second device", command, second))
    return stages


def summarise(codes: dict[str, int]) -> int:
    """A stage without a test that matches is not a failure, unless none matched anywhere."""
    tests = [code for title, code in codes.items() if title.startswith("tests")]
    if tests and all(code == NO_TESTS for code in tests):
        environment.say("No test matches these arguments.")
        return NO_TESTS
    failed = {title: code for title, code in codes.items() if code not in (0, NO_TESTS)}
    environment.say(f"\nFailed: {', '.join(failed)}." if failed else "\nEverything passed.")
    return next(iter(failed.values()), 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except environment.SetupError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit(130)
