"""The processes of one training: who they are, and what they tell each other.

Processes, their restarts and the store between them are torchrun's; what is computed together goes
over `torch.distributed`.
"""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moescope.errors import UserError
from moescope.machine import CPU
from moescope.training.config import ParallelConfig

PATIENCE = timedelta(days=7)
"""For what one rank does while the others wait: text into token files, a vocabulary."""
MOMENT = timedelta(seconds=5)

T = TypeVar("T")


class Ranks:
    """The process among those that train together; by itself unless said otherwise.

    Attributes:
        number: of this process, from zero.
        size: how many there are.
        per_node: how many of them are on one node; neighbours in order.
    """

    def __init__(self, number: int = 0, size: int = 1, per_node: int = 1) -> None:
        self.number, self.size, self.per_node = number, size, per_node
        self._turns = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that talks and writes files."""
        return self.number == 0

    def own(self, rows: int) -> slice:
        """Return which of `rows` are this rank's; neighbours in order, as even as can be."""
        return slice(rows * self.number // self.size, rows * (self.number + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def lowest(self, tensor: Tensor) -> Tensor:
        """Return the lowest of all ranks, number by number."""
        return self._reduced(tensor, dist.ReduceOp.MIN)

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """Return named numbers, each summed over all ranks."""
        if self.size == 1:
            return values
        summed = self.sum(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, summed.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks in order; each has as many."""
        if self.size == 1:
            return rows
        everyone = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        dist.all_gather_single(everyone, rows.contiguous())
        return everyone

    def gather_objects(self, own: Sequence[T]) -> list[T]:
        """Return what each rank has, in order."""
        if self.size == 1:
            return list(own)
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, own)
        return [one for each in everyone for one in each]

    def first_alone(self, do: Callable[[], T]) -> T | None:
        """Let the first rank do something while the others wait; they get None.

        Raises:
            UserError: the first rank's, on every rank.
        """
        if self.size == 1:
            return do()
        self._turns += 1
        key = f"turn/{self._turns}"
        if not self.is_first:
            _store().wait([key], PATIENCE)
            error = json.loads(_store().get(key))
            if error is not None:
                raise UserError(error)
            return None
        try:
            result = do()
        except UserError as error:
            _store().set(key, json.dumps(str(error)))
            raise
        _store().set(key, json.dumps(None))
        return result

    def first_then_others(self, make: Callable[[], T]) -> T:
        """Let the first rank make something, then the others, who find its files made.

        Raises:
            UserError: as `make`; the first rank's on every rank.
        """
        made = self.first_alone(make)
        if made is None:
            made = make()
        return made

    def _reduced(self, tensor: Tensor, op: Any) -> Tensor:
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, op=op)
        return tensor


def is_first_process() -> bool:
    """Whether this process talks; all but one of torchrun's do not."""
    return int(os.environ.get("RANK", "0")) == 0 or not dist.is_torchelastic_launched()


def was_restarted() -> bool:
    """Whether torchrun started this process after one of the training's was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined(parallel: ParallelConfig, device: torch.device = CPU) -> Generator[Ranks]:
    """Meet the other processes that torchrun started; while entered, they compute together.

    Args:
        parallel: how many there have to be.
        device: that this one computes on; its tensors travel by NCCL where it is a GPU.

    Raises:
        UserError: there are other than `parallel` says, or one was lost meanwhile.
    """
    size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    shape = f"data {parallel.data} x expert {parallel.expert}"
    if parallel.ranks > 1 and not dist.is_torchelastic_launched():
        raise UserError(
            f"[parallel] asks for {parallel.ranks} processes ({shape}) and this is one; start them "
            f"with torchrun --nproc-per-node {parallel.ranks} -m moescope train ..."
        )
    if parallel.ranks != size:
        raise UserError(
            f"torchrun started {size} processes, but [parallel] deals the training to "
            f"{parallel.ranks} ({shape}); say otherwise with --parallel data={size} or with "
            "--nproc-per-node"
        )
    if size == 1:
        yield Ranks()
        return
    number = int(os.environ["RANK"])
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=_store(), rank=number, world_size=size)
    try:
        yield Ranks(number, size, int(os.environ["LOCAL_WORLD_SIZE"]))
    except RuntimeError as error:
        if not _tells_of_a_lost_rank(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, who ends all: this one says why
        raise UserError(
            "another process of this training was lost; torchrun --max-restarts N starts all of "
            "them again from the last checkpoint, --resume does by hand"
        ) from error
    dist.destroy_process_group()


@contextmanager
def one_of_all_says() -> Generator[None]:
    """Let one of the ranks say what a user can mend, if several have met it; the others end alike.

    Raises:
        UserError: what was met, if this is the rank to say it.
        SystemExit: another rank has said it.
    """
    try:
        yield
    except UserError as error:
        if not dist.is_torchelastic_launched():
            raise
        # A rank that ends makes torchrun end the others, so who is silent waits for who speaks.
        with suppress(RuntimeError):  # without a store there is nobody to ask
            if _store().add(f"said/{error}", 1) > 1:
                with suppress(RuntimeError):
                    _store().wait([f"done/{error}"], MOMENT)
                raise SystemExit(2) from None
            print(f"moescope: {error}", file=sys.stderr, flush=True)
            _store().set(f"done/{error}", "")
            raise SystemExit(2) from None
        raise


@functools.cache
def _store() -> Store:
    """Return the store in which torchrun's processes meet; each restart has one of its own."""
    store, _, _ = next(rendezvous("env://"))
    return PrefixStore(f"start/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _tells_of_a_lost_rank(error: RuntimeError) -> bool:
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
