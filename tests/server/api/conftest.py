from collections.abc import Iterator

import pytest
from small_server import TEMPLATE, served
from starlette.testclient import TestClient

from moescope.api import Model
from moescope.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def talker(model: Model) -> Model:
    """The small model with a chat template."""
    config = {**model.tokenizer._config, "chat_template": TEMPLATE}
    return Model("small", model.network, Tokenizer(model.tokenizer._backend, config))


@pytest.fixture(scope="module")
def client(talker: Model) -> Iterator[TestClient]:
    with served(talker) as (client, _):
        yield client
