"""Pipelines of small networks with random weights, one of them Sprint."""

from pathlib import Path

import pytest

from sana.pipeline import SanaPipeline
from tests.sana.models import SPRINT, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def sprint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sprint"), SPRINT)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> SanaPipeline:
    return SanaPipeline.load(folder)


@pytest.fixture(scope="module")
def loaded_sprint(sprint_folder: Path) -> SanaPipeline:
    return SanaPipeline.load(sprint_folder)


def same_parts(pipeline: SanaPipeline) -> SanaPipeline:
    """Another pipeline of the same networks, whose attributes a test may change."""
    return SanaPipeline(pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder, pipeline.identity)


@pytest.fixture
def pipeline(loaded: SanaPipeline) -> SanaPipeline:
    return same_parts(loaded)


@pytest.fixture
def sprint(loaded_sprint: SanaPipeline) -> SanaPipeline:
    return same_parts(loaded_sprint)
