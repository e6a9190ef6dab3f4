"""--fast in the shell."""

import pytest
from PIL import Image, ImageChops

from bench.recorder import graphs_on_cpu
from tests.sana.pipeline.test_fast import CPU_HAS_NONE
from tests.sana.shell.commands import Shell


def test_fast_draws_the_same_picture_with_graphs(shell: Shell) -> None:
    (plain,) = shell.draw("a cat", "--steps", 2)
    with graphs_on_cpu() as graphs:
        (fast,) = shell.draw("a cat", "--steps", 2, "--fast", "--out", shell.folder / "fast.png")
    assert graphs.launched == 2
    with Image.open(plain) as one, Image.open(fast) as two:
        assert max(high for _, high in ImageChops.difference(one, two).getextrema()) <= 1


@pytest.mark.parametrize("more", [(), ("--prompts", "{folder}/p.txt", "--workers", 1, "--out", "{folder}/drawn")])
def test_a_cpu_has_none(shell: Shell, more: tuple[object, ...]) -> None:
    (shell.folder / "p.txt").write_text("a cat\n")
    arguments = [str(each).format(folder=shell.folder) for each in more] or ["a cat"]
    assert shell.fail(*arguments, "--fast", "--device", "cpu") == CPU_HAS_NONE
