"""The extension that `csrc/` is built into: whether it is there, and what it runs with."""

from __future__ import annotations

import statistics
import time
from functools import cache
from typing import TYPE_CHECKING

from moescope.errors import UserError

if TYPE_CHECKING:
    from moescope.kernels import _native as native
    from moescope.kernels._native import ReadProbe
else:
    try:
        from moescope.kernels import _native as native
    except ImportError:
        native = None


def available() -> bool:
    """Whether the extension was built for this Python."""
    return bool(native)


def instruction_set() -> str | None:
    """The instruction set that the kernels use here; None without the extension.

    Raises:
        UserError: `MOESCOPE_ISA` names one that this processor lacks.
    """
    if not available():
        return None
    try:
        return native.instruction_set()
    except ValueError as error:
        raise UserError(str(error)) from error


def instruction_sets() -> list[str]:
    """The instruction sets that this processor runs, the best first; none without the extension."""
    return native.instruction_sets() if available() else []


def use_instruction_set(name: str) -> None:
    """Use another of `instruction_sets()` from now on; weights need not be packed again.

    Raises:
        UserError: the processor lacks it.
    """
    try:
        native.use_instruction_set(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def threads() -> int:
    """Return how many threads share the work, the caller's included."""
    return native.threads()


def set_threads(count: int) -> None:
    """Share the work among `count` threads from now on."""
    native.set_threads(count)


def measure_read_bandwidth(
    seconds: float = 1.0, huge_pages: bool = True, working_set: int = 2**29
) -> float:
    """Measure the bytes/s at which all threads together read memory, as products read weights.

    Args:
        seconds: time to spend, about; the median pass counts, of at least three.
        huge_pages: whether 2 MiB pages are asked for, as weights have them, or 4 KiB ones.
        working_set: bytes that are read over and over; what the caches hold is read faster.
    """
    probe = _read_probe(working_set, huge_pages)
    probe.read()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        probe.read()
        times.append(time.perf_counter() - start)
    return working_set / statistics.median(times)


@cache
def _read_probe(size: int, huge_pages: bool) -> ReadProbe:
    return native.ReadProbe(size, huge_pages)


def weight_bytes_read() -> int:
    """Bytes of weights that the kernels have read since the process began."""
    return native.weight_bytes_read()
