"""A network dealt to ranks: FSDP2 over `data`, and the experts of each layer over `expert`.

A rank's place in the mesh is `(data, expert)`. All ranks read rows of their own. Experts are dealt
to the ranks of `expert`, in order, and over `data` as everything else is; what is no expert is the
same on all ranks of `expert`. So a group of experts lies on neighbouring ranks, and a router that
limits a token's groups limits its ranks. Gradients are sums over ranks, since each rank's loss is
its share of the step's.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from moescope.model.decoder import CausalLM
from moescope.model.moe import GroupedExperts, MoE
from moescope.model.routing import CompetingRouter
from moescope.training.config import ParallelConfig
from moescope.training.parallel.dispatch import ExpertParallel, Traffic
from moescope.training.parallel.ranks import Ranks
from moescope.training.parallel.shards import whole


def place(
    model: CausalLM, parallel: ParallelConfig, ranks: Ranks, dtype: torch.dtype
) -> Traffic | None:
    """Deal a network that each rank holds whole, float32.

    Returns what counts the tokens that travel to experts, where these are dealt.

    Weights stay float32 and are rounded to `dtype` as they are gathered; gradients are summed in
    float32.
    """
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(
        device, (parallel.data, parallel.expert), mesh_dim_names=("data", "expert")
    )
    turned = DeviceMesh(device, mesh.mesh.mT.contiguous(), mesh_dim_names=("expert", "data"))
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
                _deal_experts(module.experts, mesh["expert"], traffic)
            fully_shard(module.experts, mesh=mesh["data"], mp_policy=rounding)
    depths = [] if model.mtp is None else [depth.layer for depth in model.mtp.depths]
    for layer in [*model.model.layers, *cast("list[nn.Module]", depths)]:
        fully_shard(layer, mesh=turned, mp_policy=rounding)
    fully_shard(model, mesh=turned, mp_policy=rounding)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return traffic if parallel.expert > 1 else None


def _deal_experts(experts: GroupedExperts, mesh: DeviceMesh, traffic: Traffic) -> None:
    number = len(experts.gate_up_proj)
    for name, parameter in list(experts.named_parameters()):
        dealt = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(dealt, parameter.requires_grad))
    experts.dispatcher = ExpertParallel(mesh, number, traffic)


def let_go(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def is_dealt(model: nn.Module) -> bool:
    """Whether a network's tensors are dealt to ranks."""
    return isinstance(model, FSDPModule)


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a network, on every rank if it is dealt to several."""
    let_go(model)
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def whole_copy(model: CausalLM, dtype: torch.dtype) -> CausalLM:
    """Return a network on every rank that holds all of a dealt one, its parameters as `dtype`."""
    copy = CausalLM(model.config)
    copy.load_state_dict(whole_tensors(model))
    for parameter in copy.parameters():
        parameter.data = parameter.data.to(dtype)
    return copy.to(model.lm_head.weight.device)
