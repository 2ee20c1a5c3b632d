"""The folder of a training, which one at a time may have."""

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from moescope.errors import UserError
from moescope.training.parallel.ranks import Ranks

LOCK = ".training.lock"


@contextmanager
def claimed(out: Path, ranks: Ranks) -> Generator[None]:
    """Keep every other training out of `out` until this one has ended, however it ends.

    Raises:
        UserError: another is at work there, or the folder cannot be written.
    """
    lock, is_new = FileLock(out / LOCK, blocking=False), not out.exists()

    def claim() -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            with suppress(NotImplementedError):  # a file system that keeps no locks
                lock.acquire()
        except Timeout:
            raise UserError(
                f"a training is at work in {out}; wait until it has ended, stop it, or choose "
                "another folder"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {out}: {reason}; choose another folder") from error

    ranks.first_alone(claim)
    try:
        yield
    finally:
        if lock.is_locked:
            (out / LOCK).unlink(missing_ok=True)
            lock.release()
            if is_new:
                with suppress(OSError):  # it holds something
                    out.rmdir()
