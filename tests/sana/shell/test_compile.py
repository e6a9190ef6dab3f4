"""Where --compile cannot work: one sentence, whatever the compiler says."""

from pathlib import Path

import pytest
import torch
from torch._inductor.exc import CppCompileError

from tests.sana.shell.commands import Shell

ADVICE = "leave out --compile (in Python compiled=True): the picture is the same without"


def fail(error: Exception, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """Let the backend of torch.compile raise, or all that torch.compile gives, as kernels do that are built late."""
    compiler = torch.compile

    def raise_error(*args: object, **options: object) -> object:
        raise error

    def failing(function: object) -> object:
        return raise_error if whole else compiler(function, backend=raise_error)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", failing)


@pytest.mark.parametrize("whole", [False, True], ids=["backend", "late"])
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (CppCompileError(["g++", "main.cpp"], "cannot find -ltorch\n" * 15), "CppCompileError: C++ compile error"),
        (AssertionError("\n\nno\nlines"), "AssertionError: no"),
        (OSError(8, "Exec format error"), "OSError: [Errno 8] Exec format error"),
        (KeyError(), "KeyError: "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_failure_of_the_compiler_is_one_sentence(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, error: Exception, cause: str, whole: bool
) -> None:
    fail(error, monkeypatch, whole)
    monkeypatch.setattr(torch, "__file__", "/usr/lib/torch/__init__.py")  # wherever these tests are
    assert shell.fail("a cat", "--compile") == f"torch.compile failed ({cause}); {ADVICE}"


def test_a_space_in_the_path_of_pytorch_is_named(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(CppCompileError(["g++"], "cannot find -ltorch\n" * 15), monkeypatch, whole=False)
    monkeypatch.setattr(torch, "__file__", "/home/me/my pictures/torch/__init__.py")
    place = Path("/home/me/my pictures/torch")
    expected = f"torch.compile failed, since compilers do not find {place} with a space in its path; {ADVICE}"
    assert shell.fail("a cat", "--compile") == expected


def test_out_of_memory_is_no_failure_of_the_compiler(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(torch.OutOfMemoryError("CUDA out of memory."), monkeypatch, whole=True)
    assert shell.fail("a cat", "--compile") == "CUDA out of memory."
