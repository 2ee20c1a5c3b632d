"""Checkpoints that several ranks write together while their training goes on.

`torch.distributed.checkpoint` writes them: each rank its parts of the tensors, as safetensors, of
which any number of ranks, one too, reads what it holds.
"""

import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from moescope.training.parallel.ranks import Ranks
from moescope.training.state import (
    begin_checkpoint,
    cannot_write,
    check_tensors,
    damaged,
    partial_path,
    publish_checkpoint,
)


class Saver:
    """Writes one checkpoint at a time, in a thread of each rank.

    What these threads tell each other goes over a group of its own: on the training's, their
    messages would meet those of the steps.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._group: Any = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1)
        self._writing: tuple[Path, Future[None]] | None = None

    def begin(
        self,
        path: Path,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        prune: Callable[[], None],
    ) -> None:
        """Copy the tensors and begin to write them; the checkpoint appears when all have.

        Args:
            path: of the checkpoint.
            tensors: parts of which this rank holds, and tensors that are the same on all ranks.
            state: for its JSON part.
            prune: called when it is there.

        Raises:
            UserError: this one or the one before cannot be written.
        """
        self.finish()
        self._ranks.first_alone(lambda: begin_checkpoint(path))
        writer = HuggingFaceStorageWriter(str(partial_path(path)), save_distributed=True)
        written: Any = async_save(tensors, storage_writer=writer, process_group=self._group)
        self._writing = path, self._thread.submit(self._publish, written, path, state, prune)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is there.

        Raises:
            UserError: it cannot be written.
        """
        if self._writing is None:
            return
        path, writing = self._writing
        self._writing = None

        def outcome() -> None:
            try:
                writing.result()
            except CheckpointException as error:
                causes = [str(cause) for cause in error.failures.values()]
                raise cannot_write(path, causes[0]) from error

        self._ranks.first_alone(outcome)
        outcome()

    def _publish(
        self, written: "Future[Any]", path: Path, state: dict[str, Any], prune: Callable[[], None]
    ) -> None:
        written.result()
        if self._ranks.is_first:
            publish_checkpoint(path, state)
            prune()


def read_dealt(
    path: Path, blank: Callable[[Iterable[str]], dict[str, Tensor]], ranks: Ranks
) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, of each the part that this rank holds.

    Args:
        path: of the checkpoint, by however many ranks it was written.
        blank: returns tensors to read into, by name.
        ranks: that read together.

    Raises:
        UserError: a file is missing or damaged.
    """
    ranks.first_alone(lambda: check_tensors(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads what several have written
            reader = HuggingFaceStorageReader(str(path))
            tensors = blank(reader.read_metadata().state_dict_metadata)
            load(tensors, storage_reader=reader, no_dist=ranks.size == 1)
    except CheckpointException as error:
        raise damaged(path, next(iter(error.failures.values()))[0]) from error
    return tensors
