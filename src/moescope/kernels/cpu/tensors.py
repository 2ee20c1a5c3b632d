"""Tensors as the extension takes them."""

from torch import Tensor
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage]


def memory_of(tensor: Tensor) -> object:
    """Return a tensor's memory, which stays where it is."""
    return to_dlpack(tensor)


def memory_or_none(tensor: Tensor | None) -> object:
    """Return the memory of a tensor that may be missing, without gradient and without gaps."""
    return None if tensor is None else memory_of(tensor.detach().contiguous())


def as_rows(x: Tensor) -> Tensor:
    """Return `(..., width)` as float32 `(rows, width)`."""
    return x.float().reshape(-1, x.shape[-1]).contiguous()
