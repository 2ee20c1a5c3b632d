"""Keeping freed memory: a training step asks for the same large blocks again and again."""

import ctypes
import platform

M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them to the system.

    A returned block costs a page fault per 4 KB when it is asked for again: a fifth of the time
    of a training step on two cores (`docs/numbers.md`). Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_TOP_PAD, 64 * 2**20)
