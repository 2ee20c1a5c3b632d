"""What a training minimises: next-token loss, further tokens' loss, and terms that keep balance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moescope import kernels
from moescope.config import ModelConfig
from moescope.model.balancing import (
    device_level_loss,
    expert_level_loss,
    load_balanced_l1,
    lowest_taken,
    router_z_loss,
    sequence_wise_loss,
)
from moescope.model.decoder import CausalLM
from moescope.model.recorder import Recorder
from moescope.model.routing import Routing
from moescope.training.config import BalanceConfig
from moescope.training.parallel.ranks import Ranks
from moescope.training.part import Part


@dataclass(frozen=True)
class Losses:
    """Scalars of one micro-batch; `main` and `balance` carry the gradient."""

    main: Tensor  # what the predictions cost
    balance: Tensor  # weighted auxiliary terms, summed over layers
    next_token: Tensor  # mean nats a token
    further_tokens: Tensor  # mean nats of the multi-token-prediction depths, zero without

    @property
    def total(self) -> Tensor:
        return self.main + self.balance


class LoadRecorder(Recorder):
    """Counts the tokens that each expert of each layer receives.

    Args:
        read: `(rows, seq)` bool, which tokens count; None where all do.

    Attributes:
        counts: layer index -> `(experts,)` int64.
    """

    def __init__(self, read: Tensor | None = None) -> None:
        self.counts: dict[int, Tensor] = {}
        self._read = read

    def routing(self, layer_idx: int, routing: Routing) -> None:
        if self._read is not None:
            kept = routing.topk_ids[self._read.flatten()]
            routing = replace(routing, topk_ids=kept)
        counts = routing.expert_counts
        self.counts[layer_idx] = self.counts.get(layer_idx, torch.zeros_like(counts)) + counts


class BalanceRecorder(LoadRecorder):
    """Also sums the auxiliary losses that the balance config weighs above zero.

    The sparsity that ReMoE's L1 holds is that of the main model: multi-token-prediction depths
    get the other terms only.

    Args:
        config: of the model.
        balance: weights of the terms.
        rows: of the micro batch that are here.
        l1_weight: of ReMoE's term.
        whole: layer index -> `(experts,)` tokens that each expert receives on average in a micro
            batch of the step, where losses count over the whole step; None if this is all of it.
        read: as for `LoadRecorder`; losses count every token all the same.
        ranks: among which the micro batch is dealt.
        row_share: the rows here over those of all ranks; zero if they count for nothing.

    Attributes:
        loss: the sum, zero-dimensional.
        lowest: layer index -> `(experts,)` lowest scores that experts took (expert choice only).
    """

    def __init__(
        self,
        config: ModelConfig,
        balance: BalanceConfig,
        *,
        rows: int,
        l1_weight: float,
        whole: Mapping[int, Tensor] | None = None,
        read: Tensor | None = None,
        ranks: Ranks | None = None,
        row_share: float = 1.0,
    ) -> None:
        super().__init__(read)
        self._ranks, self._row_share = ranks or Ranks(), row_share
        self._whole = whole or {}
        self._experts_choose = config.topk_method == "expert_choice"
        self.lowest: dict[int, Tensor] = {}
        self._balance = balance
        self._rows = rows
        self._main_layers = config.num_hidden_layers
        self._top_k = config.num_experts_per_tok or 0
        moe_layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
        self._l1_weight = l1_weight / moe_layers if config.topk_method == "relu" else 0.0
        self.loss = torch.zeros(())

    def routing(self, layer_idx: int, routing: Routing) -> None:
        super().routing(layer_idx, routing)
        scores, topk_ids, weights = routing.scores, routing.topk_ids, self._balance
        seq, counts = scores.shape[0] // self._rows, self._whole_counts(layer_idx, routing)
        if self._experts_choose:
            self.lowest[layer_idx] = self._ranks.lowest(lowest_taken(scores, topk_ids))
        loss = self.loss.to(scores.device)
        if weights.expert_aux:
            loss = loss + weights.expert_aux * expert_level_loss(scores, topk_ids, counts)
        if weights.device_aux:
            groups = weights.device_groups
            loss = loss + weights.device_aux * device_level_loss(scores, topk_ids, groups, counts)
        if weights.sequence_aux:
            loss = loss + weights.sequence_aux * sequence_wise_loss(scores, topk_ids, seq)
        if weights.z_loss:
            loss = loss + weights.z_loss * router_z_loss(routing.router_logits)
        if self._l1_weight and layer_idx < self._main_layers:
            l1 = load_balanced_l1(scores, topk_ids, self._top_k, counts)
            loss = loss + self._l1_weight * l1
        self.loss = loss

    def _whole_counts(self, layer_idx: int, routing: Routing) -> Tensor | None:
        """The tokens that each expert receives in all that losses count over, scaled to those here.

        None if that is what is here.
        """
        counts = self._whole.get(layer_idx)
        if counts is None:
            if self._ranks.size == 1:
                return None
            counts = self._ranks.sum(routing.expert_counts * bool(self._row_share))
        return counts * self._row_share


def compute_losses(
    model: CausalLM, ids: Tensor, recorder: BalanceRecorder, mtp_loss_weight: float
) -> Losses:
    """Run the network over `ids` `(batch, seq + 1)`; each token but the first is predicted."""
    hidden_states = model(ids[:, :-1], recorder=recorder)  # (batch, seq, hidden)
    next_token = _cross_entropy(model, hidden_states, ids[:, 1:])
    further_tokens = torch.zeros_like(next_token)
    if model.mtp is not None and mtp_loss_weight:
        further_tokens = _further_tokens_loss(model, hidden_states, ids, recorder)
    main = next_token + mtp_loss_weight * further_tokens
    return Losses(main, recorder.loss, next_token.detach(), further_tokens.detach())


@torch.no_grad()
def count_choices(
    model: CausalLM, parts: Sequence[Part], *, with_depths: bool, ranks: Ranks
) -> dict[int, Tensor]:
    """Return layer index -> `(experts,)` tokens that each expert receives, the mean over parts."""
    sums: dict[int, Tensor] = {}
    for part in parts:
        recorder = LoadRecorder(None if part.row_share else part.read)
        hidden_states = model(part.ids[:, :-1], recorder=recorder)
        if with_depths:
            for _ in _further_states(model, hidden_states, part.ids, recorder):
                pass
        for layer, counts in recorder.counts.items():
            sums[layer] = sums.get(layer, 0) + counts
    return {layer: ranks.sum(counts) / len(parts) for layer, counts in sums.items()}


def _further_tokens_loss(
    model: CausalLM, hidden_states: Tensor, ids: Tensor, recorder: Recorder
) -> Tensor:
    """Mean loss of the multi-token-prediction depths (DeepSeek-V3, eq. 24-25)."""
    losses = [
        _cross_entropy(model, normed, ids[:, ahead + 1 :])
        for ahead, normed in _further_states(model, hidden_states, ids, recorder)
    ]
    return torch.stack(losses).mean()


def _further_states(
    model: CausalLM, hidden_states: Tensor, ids: Tensor, recorder: Recorder
) -> Iterator[tuple[int, Tensor]]:
    """Yield each depth's tokens ahead and states for the output head (DeepSeek-V3, eq. 21-23)."""
    assert model.mtp is not None
    seq = hidden_states.shape[1]
    for ahead, depth in enumerate(model.mtp.depths, start=1):
        hidden_states = hidden_states[:, : seq - ahead]
        inputs = ids[:, ahead:seq]  # (batch, seq - ahead)
        positions = torch.arange(inputs.shape[1], device=ids.device).expand_as(inputs)
        rotation = model.model.rotary_emb(positions, hidden_states.dtype)
        embedded = model.model.embed_tokens(inputs)
        hidden_states = depth(hidden_states, embedded, inputs, rotation, positions, recorder)
        yield ahead, depth.get_submodule("norm")(hidden_states)


def _cross_entropy(model: CausalLM, hidden_states: Tensor, targets: Tensor) -> Tensor:
    return kernels.linear_cross_entropy(
        hidden_states.flatten(0, 1), model.lm_head.weight, targets.flatten()
    )
