from collections.abc import Iterator

import pytest

from moescope.kernels import cpu


@pytest.fixture(params=cpu.instruction_sets() or ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    before = cpu.instruction_set()
    assert before is not None
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(before)
