"""A network in training and all that moves it: its weights, its optimizer, its routers' balance."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moescope.model.balancing import AdaptiveL1
from moescope.model.decoder import CausalLM, without_numbers
from moescope.training.config import TrainConfig
from moescope.training.kind import Kind
from moescope.training.objective import BalanceRecorder, count_choices
from moescope.training.optimizer import Optimizer
from moescope.training.parallel import shards
from moescope.training.parallel.placement import place
from moescope.training.parallel.ranks import Ranks
from moescope.training.part import Part
from moescope.training.recompute import checkpoint_activations
from moescope.training.start import draw_start, load_start
from moescope.training.step_load import StepLoad

LOAD_EVERY = 10
"""Steps between two whose load per expert is logged."""


class Learner:
    """Moves the weights of a network, alone or as one of several ranks that hold parts of it.

    Attributes:
        model: in training.
        optimizer: holds the float32 masters of its weights.
        l1: the weight of ReMoE's term.
        traffic: counts tokens on their way to experts of other ranks; None where all lie here.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, ranks: Ranks, *, begins: bool
    ) -> None:
        """With `begins`, the weights are drawn, or taken from `[start]`; else `take` follows."""
        self._config, self._ranks = config, ranks
        training = config.training
        length = config.data.sequence_length
        if config.kind != "pretrain":  # chats and answers are as long as they are
            length = config.model.trained_length
        shape = config.model.model_copy(update={"trained_length": length})
        self.traffic = None
        if ranks.size == 1:
            self.model = CausalLM(shape).to(device)
        else:
            self.model = without_numbers(shape)
        if training.checkpoint_activations:
            checkpoint_activations(self.model)
        if ranks.size > 1:
            self.traffic = place(
                self.model,
                config.parallel,
                ranks,
                training.torch_dtype,
                device,
                muon=training.optimizer == "muon",
            )
        if begins and config.start.model is None:
            draw_start(self.model, training.seed)
        elif begins:
            load_start(self.model, config.required_start())
        self.optimizer = Optimizer(
            self.model, training.optimizer, weight_decay=training.weight_decay, ranks=ranks
        )
        if ranks.size == 1:  # else they are rounded when they are gathered
            _round_parameters(self.model, training.torch_dtype)
        self.l1 = AdaptiveL1(config.balance.l1_start, config.balance.l1_factor)

    @property
    def counts_first(self) -> bool:
        """Whether a balance loss depends on the load of micro batches that are yet to come."""
        config, balance = self._config, self._config.balance
        if config.training.rows_at_a_time == config.training.batch_size:
            return False
        if config.model.n_routed_experts is None:
            return False
        return bool(balance.expert_aux or balance.device_aux or config.model.topk_method == "relu")

    def move(
        self, kind: Kind[Any], parts: Sequence[Part], step: int, factor: float
    ) -> dict[str, Any]:
        """Move the weights once; return what it showed, or the problem for which it was not.

        Args:
            kind: of the training, which says what is minimised.
            parts: what is learned from, all rows of it.
            step: that this is, counted from one.
            factor: of the learning rates.
        """
        config, training = self._config, self._config.training
        parts, whole = [part.own(self._ranks) for part in parts], None
        if self.traffic is not None:
            self.traffic.begin()
        if self.counts_first:
            depths = self.model.mtp is not None and training.mtp_loss_weight > 0
            whole = count_choices(self.model, parts, with_depths=depths, ranks=self._ranks)
        load = StepLoad(config.model)
        sums = {"loss": 0.0, "further_tokens_loss": 0.0, "balance_loss": 0.0}
        for part in parts:
            recorder = BalanceRecorder(
                config.model,
                config.balance,
                rows=len(part.ids),
                l1_weight=self.l1.weight,
                whole=whole,
                read=part.read,
                ranks=self._ranks,
                row_share=part.row_share,
            )
            losses = kind.losses(self.model, part, recorder)
            main, balance = part.share * part.loss_share, part.share * part.row_share
            (losses.main * main + losses.balance * balance).backward()
            self.optimizer.accumulate()
            sums["loss"] += float(losses.next_token) * main
            sums["further_tokens_loss"] += float(losses.further_tokens) * main
            sums["balance_loss"] += float(losses.balance.detach()) * balance
            load.add(recorder, part)
        sums = self._ranks.sums(sums)
        load.over(self._ranks)
        try:
            norm = self.optimizer.step(
                training.muon_learning_rate * factor,
                training.adamw_learning_rate * factor,
                training.clip,
            )
        except FloatingPointError as error:
            problem = f"{error} and the loss {sums['loss']}"
            return {"loss": None, "learning_rate_factor": factor, "problem": problem}
        load.move(self.model, self.l1, config.balance.bias_update_speed)
        row: dict[str, Any] = {**sums, "gradient_norm": norm, "learning_rate_factor": factor}
        row |= load.row(with_loads=step % LOAD_EVERY == 0)
        if config.model.topk_method == "relu":
            row["l1_weight"] = self.l1.weight
        if self.traffic is not None:
            row["traffic"] = self.traffic.over(self._ranks)
        return row

    # --- what continues it bit for bit ------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return all that moves, by name; of what is dealt to ranks the parts here."""
        tensors = {**self.optimizer.state_tensors(), **self._untrained()}
        return {**tensors, "rng": torch.get_rng_state()}

    def blank_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors to read a checkpoint into, by those of its names that are ours."""
        blank = self.optimizer.blank_tensors(names)
        blank |= {n: torch.zeros_like(t) for n, t in self._untrained().items()}
        return {**blank, "rng": torch.zeros_like(torch.get_rng_state())}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` returned."""
        self.optimizer.load_state_tensors(tensors)
        with torch.no_grad():
            for name, tensor in self._untrained().items():
                shards.part(tensor).copy_(shards.part(tensors[name]))
        torch.set_rng_state(tensors["rng"])

    def _untrained(self) -> dict[str, Tensor]:
        """What the network holds beside trained weights: routers' biases and frozen weights."""
        trained = {parameter for parameter in self.model.parameters() if parameter.requires_grad}
        tensors = self.model.state_dict(keep_vars=True)
        return {f"model.{n}": t.detach() for n, t in tensors.items() if t not in trained}


def _round_parameters(model: CausalLM, dtype: torch.dtype) -> None:
    """Convert the parameters only: biases of routers and rotary frequencies stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
