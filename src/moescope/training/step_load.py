"""Who was chosen in one optimizer step: what is logged of it, and what it moves."""

from typing import Any

import torch
from torch import Tensor

from moescope.config import ModelConfig
from moescope.model.balancing import AdaptiveL1, max_violation, update_bias, update_threshold
from moescope.model.decoder import CausalLM
from moescope.model.moe import MoE
from moescope.model.routing import ExpertChoice, NoAuxTopK
from moescope.training.objective import BalanceRecorder
from moescope.training.parallel.ranks import Ranks
from moescope.training.part import Part

THRESHOLD_RATE = 0.1
"""Share of the way that expert choice's thresholds move in a step."""


class StepLoad:
    """The choices of a step, summed over its micro batches.

    Attributes:
        counts: layer index -> `(experts,)` tokens that each expert received.
        lowest: layer index -> `(experts,)` lowest scores that experts took, the mean over micro
            batches (expert choice only).
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._rows = self._tokens = 0
        self.counts: dict[int, Tensor] = {}
        self.lowest: dict[int, Tensor] = {}

    def add(self, recorder: BalanceRecorder, part: Part) -> None:
        """Add what was chosen in a part."""
        self._rows += part.rows
        self._tokens += part.tokens
        for layer, received in recorder.counts.items():
            self.counts[layer] = self.counts.get(layer, 0) + received
        for layer, scores in recorder.lowest.items():
            self.lowest[layer] = self.lowest.get(layer, 0) + scores * part.share

    def over(self, ranks: Ranks) -> None:
        """Count what all ranks have added."""
        if ranks.size == 1:
            return
        self._rows, self._tokens = ranks.sum(torch.tensor([self._rows, self._tokens])).tolist()
        if self.counts:
            summed = ranks.sum(torch.stack(list(self.counts.values())))  # (layers, experts)
            self.counts = dict(zip(self.counts, summed, strict=True))

    def move(self, model: CausalLM, l1: AdaptiveL1, bias_update_speed: float) -> None:
        """Move what follows the load: loss-free biases, thresholds and ReMoE's L1 weight."""
        for module in model.modules():
            if not isinstance(module, MoE) or module.layer_idx not in self.counts:
                continue
            gate, layer = module.gate, module.layer_idx
            if isinstance(gate, NoAuxTopK):
                update_bias(gate.e_score_correction_bias, self.counts[layer], bias_update_speed)
            elif isinstance(gate, ExpertChoice):
                update_threshold(gate.score_threshold, self.lowest[layer], THRESHOLD_RATE)
        main = [layer for layer in self.counts if layer < self._config.num_hidden_layers]
        if main:
            chosen = sum(self.experts_per_token(layer) for layer in main) / len(main)
            l1.update(chosen, self._config.required("num_experts_per_tok"))

    def experts_per_token(self, layer: int) -> float:
        """The mean over the tokens that a layer saw; a depth of MTP sees fewer of each row."""
        ahead = max(0, layer - self._config.num_hidden_layers + 1)
        return int(self.counts[layer].sum()) / (self._tokens - self._rows * ahead)

    def row(self, *, with_loads: bool) -> dict[str, Any]:
        """Return what is logged, by layer: MaxVio, experts a token, each expert's share of it."""
        if not self.counts:
            return {}
        row: dict[str, Any] = {
            "max_violation": {str(i): float(max_violation(c)) for i, c in self.counts.items()},
            "experts_per_token": {str(i): self.experts_per_token(i) for i in self.counts},
        }
        if with_loads:
            row["load"] = {
                str(layer): [round(x, 6) for x in (received / received.sum().clamp(min=1)).tolist()]
                for layer, received in self.counts.items()
            }
        return row
