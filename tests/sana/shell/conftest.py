"""A shell, a model and a picture for it."""

from pathlib import Path

import pytest
from PIL import Image

from tests.sana.models import SPRINT, write_model
from tests.sana.shell.commands import Shell


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def sprint_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sprint"), SPRINT)


@pytest.fixture
def shell(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(model, tmp_path, capsys)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(path)
    return path
