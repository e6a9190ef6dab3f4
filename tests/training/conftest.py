from pathlib import Path

import pytest

from tests.training.drawn import draw_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four drawn scenes of two shapes with their captions."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    draw_pictures(folder, 4)
    return folder
