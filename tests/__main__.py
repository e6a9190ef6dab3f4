"""Run the tests: python3 tests [--quick | --stage NAME ...] [--newest] [paths and options of pytest].

Makes the environment .venv/tests, and fetches hosts, a user interface and a Chromium if a chosen stage needs them. Then runs
the stages of stages.py: all of them, the quick ones, those that are named, or those that have the given paths. Standard
library only.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
interruption = SimpleNamespace(**runpy.run_path(str(ROOT / "sana" / "interruption.py")))
if __name__ == "__main__":
    interruption.expect()

import downloads  # noqa: E402
import environment  # noqa: E402
from host import newest_packages  # noqa: E402
from stages import EXTRA, QUICK, STAGES, Stage, choose  # noqa: E402

OLDEST_PYTHON = (3, 11)  # of the packages that the tests compare with
NO_TESTS = 5  # the exit code of pytest that found none


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code of the first stage that failed, after running all."""
    stages = parse(arguments)
    python = prepare(stages)
    codes = {stage.name: run(python, stage) for stage in stages if not stage.one_thread}
    codes |= run_at_once(python, [stage for stage in stages if stage.one_thread])
    return summarise(stages, codes)


def run(python: Path, stage: Stage, output: IO[bytes] | None = None) -> int:
    """Returns the exit code of a stage. output: a file for what it prints; None: the terminal."""
    environment.say(f"\n== {stage.name}")
    start = time.monotonic()
    code = environment.run([python, *stage.arguments], folder=ROOT, variables=stage.variables, output=output)
    environment.say(f"== {stage.name}: exit code {code} after {time.monotonic() - start:.0f} s")
    return code


def run_at_once(python: Path, stages: Sequence[Stage]) -> dict[str, int]:
    """As many stages at once as there are processors. What each prints comes in one piece when all have ended."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = {stage.name: Path(folder, stage.name) for stage in stages}

        def logged(stage: Stage) -> int:
            with logs[stage.name].open("wb") as output:
                return run(python, stage, output)

        try:
            codes = dict(zip(logs, pool.map(logged, stages), strict=True))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
        for name, log in logs.items():
            print(f"\n== {name}\n{log.read_text(encoding='utf-8', errors='replace')}", flush=True)
    return codes


def parse(arguments: Sequence[str]) -> list[Stage]:
    """The stages to run."""
    parser = argparse.ArgumentParser(
        prog="python3 tests",
        description="Run the tests. Without options all of them.",
        epilog="All other arguments are pytest's: paths of tests, and options such as -k NAME.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--newest",
        action="store_true",
        help=f"besides, with the newest packages that a host would bring: {', '.join(EXTRA)}. Reports, and fails nothing",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--quick", action="store_true", help="style, and all tests that need neither ComfyUI nor a browser"
    )
    which.add_argument(
        "--stage",
        action="append",
        choices=[*STAGES, *EXTRA],
        metavar="NAME",
        help=f"one of {', '.join([*STAGES, *EXTRA])}; may be repeated",
    )
    options, others = parser.parse_known_args(arguments)
    names = [stage.name for stage in QUICK] if options.quick else options.stage or list(STAGES)
    names += [name for name in EXTRA if options.newest and name not in names]
    return choose(names, others)


def prepare(stages: Sequence[Stage]) -> Path:
    """Makes everything that the stages need and returns the Python to run them with. Raises SetupError.

    There is one environment. Stages that need a host add their packages to it, and the others leave them there.
    """
    environment.check_python(OLDEST_PYTHON)
    versions = ROOT / "tests" / "versions.txt"
    if any(stage.needs_browser for stage in stages):
        downloads.fetch_chromium()
        downloads.fetch_frontend()
        downloads.fetch_converters()
    if not any(stage.needs_host for stage in stages):
        return environment.prepare("tests", ["test"], constraints=versions)
    downloads.fetch_hosts()
    if any(stage.newest_packages for stage in stages):
        downloads.fetch_newest_packages()
    return environment.prepare(
        "tests",
        ["test", "test-host"],
        more=downloads.host_requirements(),
        constraints=versions,
        finish=downloads.repair_torchvision,
    )


def summarise(stages: Sequence[Stage], codes: dict[str, int]) -> int:
    """A stage without a test that matches is not a failure, unless none matched anywhere."""
    tests = [codes[stage.name] for stage in stages if stage.runs_tests]
    failed = {name: code for name, code in codes.items() if code not in (0, NO_TESTS)}
    with_newest = [stage.name for stage in stages if stage.newest_packages and failed.pop(stage.name, 0)]
    if with_newest:
        packages = ", ".join(newest_packages.found())
        environment.say(f"\nWith the newest packages ({packages}) failed: {', '.join(with_newest)}. This fails no run.")
    if failed:
        environment.say(f"\nFailed: {', '.join(failed)}.")
        return next(iter(failed.values()))
    if all(code == NO_TESTS for code in tests) and tests:
        environment.say("No test matches these arguments.")
        return NO_TESTS
    environment.say("\nEverything else passed." if with_newest else "\nEverything passed.")
    return 0


if __name__ == "__main__":
    try:
        interruption.begin()
        sys.exit(main(sys.argv[1:]))
    except environment.SetupError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit(interruption.INTERRUPTED)
