"""Ctrl-C while a command is imported: one line and exit code 130. In programs of others nothing changes."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import sana.__main__
import sana.training.__main__
from sana import interruption

ROOT = Path(sana.__file__).parents[1]
# Halts where a module is about to be imported, and says so
HALT = """
import os, sys, time
class Halt:
    def find_spec(self, name, *more):
        if name == os.environ["HALT_AT"]:
            sys.meta_path.remove(self)
            print("halted", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Halt())
"""
INSTALLED = "import sys\nfrom sana.__main__ import main\nsys.exit(main())\n"  # as pip writes it
COMMANDS = {
    "sana": (["-m", "sana", "info", "demo"], ["torch", "torch.nn"]),
    "sana with options of Python": (["-B", "-X", "utf8", "-m", "sana", "info", "demo"], ["torch"]),
    "training": (["-m", "sana.training", "demo"], ["torch", "accelerate"]),
    "bench": (["-m", "bench"], ["torch", "diffusers"]),
    "demo": (["sana/demo"], ["environment", "torch"]),  # PyTorch is imported by the command that this one starts
    "tests": (["tests"], ["downloads", "stages"]),
    "installed": (["SCRIPT", "info", "demo"], ["torch", "tqdm"]),
}


@pytest.mark.parametrize(("name", "moment"), [(name, moment) for name in COMMANDS for moment in COMMANDS[name][1]])
def test_ctrl_c_while_a_command_is_imported(tmp_path: Path, name: str, moment: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(HALT, encoding="utf-8")
    script = tmp_path / "sana"
    script.write_text(INSTALLED, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, *(str(script) if part == "SCRIPT" else part for part in COMMANDS[name][0])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "HALT_AT": moment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells let background jobs ignore it
    )
    assert process.stdout.readline() == "halted\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    err = process.communicate(timeout=60)[1]
    lines = [line for line in err.splitlines() if line and not line.startswith(("Usage:", "No prompt given:"))]
    assert (process.returncode, lines) == (130, ["Stopped."])


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["-m"], ["python", "-m", "sana", "generate"], True),
        (["-m"], ["python", "-u", "-m", "sana.training"], True),
        (["-m"], ["python", "-m", "bench"], True),
        (["-m"], ["python", "-m", "another"], False),  # whose package imports this one
        (["-m"], ["python", "-m", "sana.other"], False),
        (["-c"], ["python", "-c", "import sana"], False),
        (["/usr/bin/sana", "generate"], ["python", "/usr/bin/sana", "generate"], True),
        (["main.py", "-m", "sana"], ["python", "main.py", "-m", "sana"], False),
        (["-m"], ["python", "-msana"], False),  # which shows a traceback
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_what_is_a_command(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], orig_argv: list[str], expected: bool
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert interruption.is_command() is expected


def test_a_program_that_imports_the_package_keeps_its_ctrl_c() -> None:
    code = "import signal, sana; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    start = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=start)
    assert run.stdout == "True\n"


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.default_int_handler, print])
def test_only_what_python_does_by_itself_is_replaced_and_given_back(before: object) -> None:
    kept = signal.signal(signal.SIGINT, before)
    try:
        interruption.expect()
        usual = before is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is (interruption.stop if usual else before)
        interruption.begin()
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, kept)


@pytest.mark.parametrize("module", [sana.__main__, sana.training.__main__])
def test_ctrl_c_while_the_arguments_are_read(
    module: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asking for a GPU takes its time."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "parser", interrupted)
    assert module.main([]) == interruption.INTERRUPTED
    (line,) = capsys.readouterr().err.split("\n")[1:-1]
    assert line.startswith("Stopped; ")


def test_the_first_ctrl_c_can_wait_and_the_second_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruption.postponed() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
