"""Tensors of which each rank holds a part: the part, the whole, and back.

Plain tensors are a part and a whole at once.
"""

import logging
import math

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

# An expert's weights are dealt twice, and gathered in two steps, which is worth no warning.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def part(tensor: Tensor) -> Tensor:
    """Return what this rank holds; written to, it is the tensor that changes."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replicas(tensor: Tensor) -> int:
    """Return how many ranks hold the same part."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def from_part(own: Tensor, like: Tensor) -> Tensor:
    """Return the tensor whose part on this rank is `own`, dealt as another is."""
    if not isinstance(like, DTensor):
        return own
    mesh, placements = like.device_mesh, like.placements
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)


def write_part(tensor: Tensor, all_of_it: Tensor) -> None:
    """Write this rank's part of what is here whole into a tensor."""
    part(tensor).copy_(part_of(all_of_it.to(tensor.device), tensor))


def part_of(all_of_it: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a tensor that is here whole, dealt as another is."""
    if not isinstance(like, DTensor):
        return all_of_it
    everywhere = [Replicate()] * like.device_mesh.ndim
    dealt = DTensor.from_local(all_of_it, like.device_mesh, everywhere, run_check=False)
    return dealt.redistribute(placements=like.placements).to_local()
