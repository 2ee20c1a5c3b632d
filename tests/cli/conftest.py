from pathlib import Path

import pytest

from moescope.api import Model


@pytest.fixture(scope="session")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small model, saved."""
    folder: Path = tmp_path_factory.mktemp("small")
    model.save(folder)
    return str(folder)
