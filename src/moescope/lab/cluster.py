"""What a training of a model asks of many GPUs: bytes on the wire of each placement, and hours.

The bytes are `training.parallel.wire`'s. Hours are those that products, or the wire, would take if
they ran at the rates that the GPU's maker names and nothing else took time: limits, no forecast.
"""

from dataclasses import dataclass

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.model.decoder import without_numbers
from moescope.training.config import ParallelConfig
from moescope.training.metrics import flops_per_token
from moescope.training.parallel.wire import numbers_held, places_visited, wire

BYTES_OF_STATE = 20
"""A weight, its gradient, the step's sum of it and AdamW's two moments, all float32."""
NUMBER = 2
"""Bytes of what is computed with, bf16."""
BATCH_ROWS = 15_360
"""Rows of a step, rounded up to a multiple of the ranks (DeepSeek-V3, section 4.2)."""
SEQUENCE = 4096
"""Tokens of a row (DeepSeek-V3, section 4.2); fewer where a model cannot have so many."""
EXPERT_RANKS = (1, 8, 64, 256)
"""Ranks among which experts are dealt, where as many share them evenly."""


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of several.

    Attributes:
        name: by which it is sold.
        memory: bytes.
        flops: operations a second of bf16 products.
        link: bytes a second to others of its node, one way.
        network: bytes a second to other nodes, one way.
        per_node: GPUs of a node.
    """

    name: str
    memory: int
    flops: float
    link: float
    network: float
    per_node: int


H800 = Gpu("H800", 80 * 10**9, 989e12, 160e9, 50e9, 8)
"""DeepSeek-V3's (sections 3.1 and 3.2.2); operations by NVIDIA's data sheet, without sparsity."""


@dataclass(frozen=True)
class Placement:
    """A training dealt to GPUs one way, each of which computes a row at a time.

    Attributes:
        gpus: in all.
        data: ranks among which weights are dealt.
        expert: ranks among which experts are dealt.
        state_bytes: of weights, gradients and moments on a GPU, without activations.
        fits: whether these fit into its memory.
        ranks_per_token: that a token visits in a layer, under even choices.
        nodes_per_token: likewise.
        expert_bytes: that travel for each token on its way to experts and back, and for copies.
        data_bytes: that travel for each token to gather weights and to sum gradients.
        network_bytes: of both, what goes to other nodes.
        step_bytes: that a GPU sends in a step.
        step_tokens: of a step, in all.
        flops: operations of a token, forward and backward.
        product_hours: GPU hours of the products.
        wire_hours: GPU hours of the wire, in which links and network work side by side.
    """

    gpus: int
    data: int
    expert: int
    state_bytes: int
    fits: bool
    ranks_per_token: float
    nodes_per_token: float
    expert_bytes: float
    data_bytes: float
    network_bytes: float
    step_bytes: float
    step_tokens: int
    flops: float
    product_hours: float
    wire_hours: float

    @property
    def overlapped_hours(self) -> float:
        """GPU hours if products and wire never waited for each other."""
        return max(self.product_hours, self.wire_hours)

    @property
    def separate_hours(self) -> float:
        """GPU hours if one always waited for the other."""
        return self.product_hours + self.wire_hours


def placements(
    config: ModelConfig, gpus: int, tokens: float, gpu: Gpu = H800
) -> tuple[Placement, ...]:
    """Return the ways to deal a training of so many tokens to so many GPUs, AdamW's.

    Raises:
        UserError: there are no whole nodes of them.
    """
    if gpus < 1 or (gpus > gpu.per_node and gpus % gpu.per_node):
        raise UserError(
            f"{gpus} GPUs fill no whole number of nodes of {gpu.per_node}; name a multiple of it"
        )
    experts = config.n_routed_experts or 1
    shapes = [
        ParallelConfig(data=gpus // expert, expert=expert)
        for expert in EXPERT_RANKS
        if gpus % expert == 0 and experts % expert == 0
    ]
    return tuple(_placement(config, shape, tokens, gpu) for shape in shapes)


def _placement(config: ModelConfig, parallel: ParallelConfig, tokens: float, gpu: Gpu) -> Placement:
    gpus, sequence = parallel.ranks, min(SEQUENCE, config.max_position_embeddings)
    parts = -(-BATCH_ROWS // gpus)
    step_tokens = parts * gpus * sequence
    nodes = max(1, parallel.expert // gpu.per_node)
    visited, of_nodes = (places_of(config, places) for places in (parallel.expert, nodes))
    layers = mixtures(config)
    crossings = visited * (1 - 1 / parallel.expert)
    sent = wire(
        config,
        parallel,
        parts=parts,
        crossings=crossings * step_tokens * layers,
        number=NUMBER,
        muon=False,
    )
    # A token's own node is as likely as any other; parts of weights go around all ranks of `data`,
    # and leave a node as often as it holds some of them.
    token_share = (1 - 1 / nodes) / (1 - 1 / parallel.expert) if parallel.expert > 1 else 0.0
    neighbours = max(1, gpu.per_node // parallel.expert)
    data_share = 1 / neighbours if parallel.data > neighbours else 0.0
    copy_share = 1 / gpu.per_node if nodes > 1 else 0.0
    network = (sent.dispatch + sent.combine) * token_share
    network += sent.copies * copy_share + sent.over_data * data_share
    flops = flops_per_token(without_numbers(config), sequence)
    seconds = max(network / gpu.network, (sent.total - network) / gpu.link) / gpus
    held = numbers_held(config, parallel, muon=False) * BYTES_OF_STATE
    return Placement(
        gpus=gpus,
        data=parallel.data,
        expert=parallel.expert,
        state_bytes=held,
        fits=held <= gpu.memory,
        ranks_per_token=visited,
        nodes_per_token=of_nodes,
        expert_bytes=sent.over_expert / step_tokens,
        data_bytes=sent.over_data / step_tokens,
        network_bytes=network / step_tokens,
        step_bytes=sent.total / gpus,
        step_tokens=step_tokens,
        flops=flops,
        product_hours=tokens * flops / gpu.flops / 3600,
        wire_hours=tokens / step_tokens * seconds * gpus / 3600,
    )


def places_of(config: ModelConfig, places: int) -> float:
    """Return how many places a token visits in a layer; one where there are no experts."""
    return 1.0 if config.n_routed_experts is None else places_visited(config, places)


def mixtures(config: ModelConfig) -> int:
    """Count the mixtures that a token of a training passes, those of further tokens among them."""
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    return sum(config.is_moe_layer(layer) for layer in layers)
