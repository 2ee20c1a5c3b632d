"""How much of prompts is read beside texts that are continued."""

import pytest
from packing import packed_copy

import moescope
from moescope.api import Model
from moescope.engine.engine import Engine
from moescope.engine.runner import tokens_beside
from moescope.kernels import cpu
from moescope.server.model_thread import ModelThread


@pytest.fixture(scope="module")
def packed() -> Model:
    if not cpu.available():
        pytest.skip("tests/kernels/test_cpu.py says why this is fine")
    return moescope.load("tiny", backend="cpu", quantize="int8")


def test_an_expert_gets_a_dozen_rows(packed: Model) -> None:
    config = packed.network.config
    assert tokens_beside(packed.network) == 12 * config.n_routed_experts // 6 == 128


def test_nothing_is_said_where_prompts_have_a_pass_of_their_own(packed: Model) -> None:
    assert tokens_beside(moescope.load("tiny", backend="torch").network) is None
    dense = packed_copy(moescope.load("tiny-dense", dtype="float32").network, "int8")
    assert tokens_beside(dense) is None


def test_a_server_reads_a_long_prompt_in_such_chunks_beside_a_text(packed: Model) -> None:
    engine = Engine(packed.network, packed.tokenizer)
    thread = ModelThread(engine, 2, 2**24)
    try:
        scheduler = thread._scheduler
        assert scheduler._chunk_beside == 128 < scheduler.chunk
    finally:
        thread.close()
