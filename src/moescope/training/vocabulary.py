"""A vocabulary learned in a process of its own, which ends when it is told to.

Counting and merging happen in native code that looks at no signal: in this process, Ctrl-C would
wait for its end.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from moescope.errors import UserError
from moescope.text.tokenizer import Tokenizer

MISTAKE = 2


def learn_vocabulary(source: Path, vocab_size: int, folder: Path) -> None:
    """Learn a vocabulary from the text in `source` and save it into `folder`.

    Raises:
        UserError: as `Tokenizer.train`, or the folder cannot be written.
        KeyboardInterrupt: within a moment of Ctrl-C.
    """
    line = [sys.executable, "-m", __name__, str(source), str(vocab_size), str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stderr=pipe, text=True, encoding="utf-8") as learner:
        assert learner.stderr is not None
        try:
            told = learner.stderr.read()
        except BaseException:
            learner.kill()
            raise
    if learner.returncode == MISTAKE:
        raise UserError(told.strip())
    if learner.returncode:
        raise RuntimeError(f"the vocabulary was not learned:\n{told}")


def _learn(source: str, vocab_size: str, folder: str) -> int:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        Tokenizer.train(Path(source), int(vocab_size), progress=False).save(folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return MISTAKE
    return 0


def _end_with_the_parent() -> None:
    """Wait for the end of stdin, which only the parent's end brings about."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(_learn(*sys.argv[1:]))
