from collections.abc import Iterator
from pathlib import Path

import pytest
from questions import write_run
from starlette.testclient import TestClient

from moescope.api import Model
from moescope.families import config_fields, read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.scope.specialization import Specialization, TypicalToken
from moescope.server.app import create_app
from moescope.server.studio import Studio


@pytest.fixture(scope="session")
def home(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in a folder, its companions beside it, and what was measured of them."""
    shelf = tmp_path_factory.mktemp("shelf")
    home = shelf / "small"
    model.save(home)
    config = read_config(config_fields(model.config) | {"n_routed_experts": None})
    twin = CausalLM(config)
    initialise(twin, seed=1)
    Model("twin", twin, model.tokenizer).save(shelf / "small-dense")
    copy = CausalLM(model.config)
    initialise(copy, seed=2)
    Model("copy", copy, model.tokenizer).save(shelf / "small-unbalanced")
    write_run(shelf / "small-unbalanced", steps=2)
    token = TypicalToken(id=300 - 1, text="x", count=3, lift=2.5, context="axb")
    Specialization(
        model="small",
        version="0",
        domains=["poetry", "prose"],
        documents=[1, 1],
        tokens=[9, 9],
        layers=[1, 2],
        load=[[[0.125] * 8] * 2, [[0.25, 0.75, *[0.0] * 6]] * 2],
        mutual_information=[0.1, 0.2],
        mutual_information_error=[0.01, 0.01],
        token_share=[0.5, 0.5],
        typical=[[[token]] * 8] * 2,
        together=[[], []],
    ).save(home / "specialization.json")
    write_run(home, steps=3)
    return home


@pytest.fixture(scope="session")
def studio(home: Path) -> Studio:
    return Studio.open(str(home))


@pytest.fixture(scope="session")
def client(studio: Studio) -> Iterator[TestClient]:
    with TestClient(create_app(studio), base_url="http://127.0.0.1:8000") as client:
        yield client
