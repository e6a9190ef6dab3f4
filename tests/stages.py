"""The stages of a run of all tests: what each runs, and what it needs that is not there yet. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from host import newest_packages
from host.hosts import HOSTS, NEWEST

IN_PROCESS = "tests/host/inprocess"
SERVERS = ("tests/host", "tests/browser", "tests/workflows")  # the first without IN_PROCESS
# One worker for each processor. Neighbours stay together, and share what a module builds, until a worker has nothing left.
WORKERS = ["--numprocesses=logical", "--dist=worksteal"]


@dataclass(frozen=True)
class Stage:
    """One command of the run."""

    name: str
    arguments: list[str]  # of the environment's Python
    folders: tuple[str, ...] = ()  # tests that it takes from the others; none: all that no other stage takes
    variables: dict[str, str] = field(default_factory=dict)
    needs_host: bool = False
    needs_browser: bool = False
    one_thread: bool = False  # so that as many such stages run at once as there are processors
    newest_packages: bool = False  # with packages that no version holds; the stage reports, and fails no run

    @property
    def runs_tests(self) -> bool:
        return "pytest" in self.arguments


def _inside(name: str, version: str, **variables: str) -> Stage:
    """The state of a host is global to its process, so each version has a stage of its own."""
    variables["SANA_TEST_HOST"] = version
    variables["OMP_NUM_THREADS"] = "1"
    return Stage(f"inside-{name}", ["-m", "pytest"], (IN_PROCESS,), variables, needs_host=True, one_thread=True)


QUICK = [
    Stage("ruff-check", ["-m", "ruff", "check", "."]),
    Stage("ruff-format", ["-m", "ruff", "format", "--check", "."]),
    Stage(
        "outside",
        ["-m", "pytest", *WORKERS, *(f"--ignore={folder}" for folder in SERVERS)],
        variables={"OMP_NUM_THREADS": "1"},  # the workers have the other processors
    ),
]
SERVER_STAGE = Stage(
    "servers",
    ["-m", "pytest"],
    SERVERS,
    {"OMP_NUM_THREADS": "1"},
    needs_host=True,
    needs_browser=True,
    one_thread=True,
)
SLOW = [  # what takes longest comes first, so that processors end at about the same time
    SERVER_STAGE,
    _inside("second-device", NEWEST, SANA_TEST_DEVICE="second"),
    *(_inside(version, version) for version in HOSTS),
]
STAGES = {stage.name: stage for stage in [*QUICK, *SLOW]}
# What the newest host is tested with, once more with the newest packages that it would bring. In no run unless asked for.
EXTRA = {
    f"newest-{stage.name}": replace(
        stage,
        name=f"newest-{stage.name}",
        variables={**stage.variables, **newest_packages.VARIABLES},
        newest_packages=True,
    )
    for stage in (SERVER_STAGE, _inside(NEWEST, NEWEST))
}


def choose(names: list[str], arguments: list[str]) -> list[Stage]:
    """The stages `names` with pytest's `arguments`: each gets the options, and of the paths of tests those that it has.

    With paths, a stage that has none of them is left out, unless it runs no tests. The folder "tests" is no path: all have it.
    """
    arguments = [argument for argument in arguments if argument.rstrip("/") != "tests"]
    paths = [argument for argument in arguments if argument.startswith("tests/")]
    options = [argument for argument in arguments if argument not in paths]
    chosen = []
    for stage in map((STAGES | EXTRA).get, names):
        if not stage.runs_tests:
            chosen.append(stage)
        elif not paths:
            chosen.append(replace(stage, arguments=[*stage.arguments, *options, *stage.folders]))
        elif own := [path for path in paths if _folders_of(path) == stage.folders]:
            chosen.append(replace(stage, arguments=[*stage.arguments, *options, *own]))
    return chosen


def _folders_of(path: str) -> tuple[str, ...]:
    """The folders of the stages that have a path of tests."""
    for folders in ((IN_PROCESS,), SERVERS):  # the narrower first
        if path.startswith(folders):
            return folders
    return ()
