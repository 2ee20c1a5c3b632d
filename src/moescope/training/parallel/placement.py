"""A network dealt to ranks: FSDP2 over `data`, and the experts of each layer over `expert`.

A rank's place in the mesh is `(data, expert)`. All ranks read rows of their own. Experts are dealt
to the ranks of `expert`, in order, and over `data` as everything else is; what is no expert is the
same on all ranks of `expert`. So a group of experts lies on neighbouring ranks, and a router that
limits a token's groups limits its ranks. Gradients are sums over ranks, since each rank's loss is
its share of the step's.

A network is dealt before it holds numbers, so that no rank ever has room for all of them.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from moescope.checkpoint import load_weights
from moescope.model.decoder import CausalLM, without_numbers
from moescope.model.moe import GroupedExperts, MoE
from moescope.model.routing import CompetingRouter, Router
from moescope.training.config import ParallelConfig
from moescope.training.parallel.dispatch import ExpertParallel, Traffic
from moescope.training.parallel.ranks import Ranks
from moescope.training.parallel.shards import whole


def place(
    model: CausalLM,
    parallel: ParallelConfig,
    ranks: Ranks,
    dtype: torch.dtype,
    device: torch.device,
    *,
    muon: bool,
) -> Traffic | None:
    """Deal a network of shapes alone, and give each rank memory for its part, float32.

    Returns what counts the tokens that travel to experts, where these are dealt.

    Weights, which are yet to be written, stay float32 and are rounded to `dtype` as they are
    gathered; gradients are summed in float32.
    """
    mesh = init_device_mesh(
        device.type, (parallel.data, parallel.expert), mesh_dim_names=("data", "expert")
    )
    turned = DeviceMesh(device.type, mesh.mesh.mT.contiguous(), mesh_dim_names=("expert", "data"))
    rounding = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    traffic = Traffic()
    for module in model.modules():
        if isinstance(module, MoE):
            if isinstance(module.gate, CompetingRouter):
                module.gate.peers = ranks
            if parallel.expert > 1:
                _deal_experts(module.experts, mesh["expert"], traffic, ranks)
            fully_shard(
                module.experts,
                mesh=mesh["data"],
                mp_policy=rounding,
                shard_placement_fn=lambda parameter: Shard(
                    expert_dimension(parameter.shape, parallel, muon=muon)
                ),
            )
    depths = [] if model.mtp is None else [depth.layer for depth in model.mtp.depths]
    for layer in [*model.model.layers, *cast("list[nn.Module]", depths)]:
        fully_shard(layer, mesh=turned, mp_policy=rounding)
    fully_shard(model, mesh=turned, mp_policy=rounding)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _make_room(model, device)
    return traffic if parallel.expert > 1 else None


def expert_dimension(shape: torch.Size, parallel: ParallelConfig, *, muon: bool) -> int:
    """Return the dimension in which experts' weights are dealt over `data`.

    Args:
        shape: of the weights of all experts of a layer, `(experts, rows, ...)`.
        parallel: how the network is dealt.
        muon: whether Muon moves them.

    Returns:
        0, so that experts stay whole, as Muon needs them; but where that leaves ranks without any,
        what is gathered would mostly be what fills it up, and others' rows are dealt: 1.
    """
    here = shape[0] // parallel.expert
    return int(not muon and here % parallel.data != 0 and shape[1] % parallel.data == 0)


def _deal_experts(
    experts: GroupedExperts, mesh: DeviceMesh, traffic: Traffic, ranks: Ranks
) -> None:
    number = len(experts.gate_up_proj)
    for name, parameter in list(experts.named_parameters()):
        dealt = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(dealt, parameter.requires_grad))
    experts.dispatcher = ExpertParallel(mesh, number, traffic, ranks.per_node)


def _make_room(model: CausalLM, device: torch.device) -> None:
    """Give the parts of parameters memory, and buffers, which are small, their first numbers."""
    numbers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    for name, module in model.named_modules():
        if isinstance(module, Router):
            made = type(module)(model.config)
            numbers |= {f"{name}.{own}": buffer for own, buffer in made.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(numbers[name])


def let_go(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def is_dealt(model: nn.Module) -> bool:
    """Whether a network's tensors are dealt to ranks."""
    return isinstance(model, FSDPModule)


def each_whole(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a network, whole, one after another; all ranks have to take all."""
    let_go(model)
    for name, tensor in model.state_dict().items():
        yield name, whole(tensor)


def whole_copy(model: CausalLM, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """Return a network that holds all of a dealt one, its parameters as `dtype`, on `device`."""
    parameters, held = dict(model.named_parameters()), dict[str, Tensor]()
    for name, tensor in each_whole(model):
        kept = dtype if name in parameters else tensor.dtype
        held[name] = tensor.to(device, kept, copy=True)
    copy = without_numbers(model.config)
    load_weights(copy, held, device)
    return copy
