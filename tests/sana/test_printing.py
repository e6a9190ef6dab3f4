"""What commands print arrives whole, in a file, in a pipe and on a terminal, whichever letters the locale has."""

import io
import sys
from types import ModuleType
from typing import NoReturn

import pytest

from sana import __main__ as shell
from sana.printing import print_every_letter
from sana.training import __main__ as training

TEXT = "一只猫, ü"


class Out(io.TextIOWrapper):
    """A standard output of a Windows in the west."""

    def __init__(self, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="cp1252")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def written(self) -> bytes:
        self.flush()
        return self.buffer.getvalue()


@pytest.mark.parametrize(
    ("terminal", "expected"),
    [(False, TEXT.encode()), (True, rb"\u4e00\u53ea\u732b, " + "ü".encode("cp1252"))],
    ids=["file", "terminal"],
)
def test_nothing_is_lost(terminal: bool, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Out(terminal)
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(UnicodeEncodeError):
        sys.stdout.write(TEXT)
    print_every_letter()
    sys.stdout.write(TEXT)
    assert out.written() == expected


def test_half_of_a_character_in_the_name_of_a_file_is_printed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Out(terminal=False)
    monkeypatch.setattr(sys, "stdout", out)
    print_every_letter()
    sys.stdout.write("a\udcff.png")
    assert out.written() == rb"a\udcff.png"


@pytest.mark.parametrize("out", [None, io.StringIO()], ids=["nothing", "memory"])
def test_an_output_of_another_kind_stays_as_it_is(out: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out)
    print_every_letter()
    assert sys.stdout is out


@pytest.mark.parametrize("command", [shell, training], ids=["sana", "sana.training"])
def test_every_command_prints_so(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise ValueError("no command")

    out = Out(terminal=False)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(command, "parser", refuse)
    assert command.main([]) == 1
    sys.stdout.write(TEXT)
    assert out.written() == TEXT.encode()


def test_written_prompts_can_be_read_from_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Out(terminal=False)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(shell, "load_writer", lambda *arguments: None)
    monkeypatch.setattr(shell, "enhance", lambda *arguments, **how: iter([TEXT, "!"]))
    assert shell.main(["enhance", "a cat"]) == 0
    assert out.written().decode().splitlines() == [f"{TEXT}!"]
