"""What the studies of routing vary: one list of cases a study, each a change to one base shape."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.families import read_config
from moescope.training.config import TrainConfig

Fields = dict[str, Any]

BASE = Path(__file__).with_name("study.toml")
"""The training that is varied where no other is named."""

SOFTMAX: Fields = {"topk_method": "greedy", "scoring_func": "softmax"}
AUXILIARY: Fields = {"expert_aux": 0.01, "bias_update_speed": 0.0}
NOTHING: Fields = {"bias_update_speed": 0.0}


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        name: what charts call it.
        model, balance: fields of the config's tables that differ from the base.
        note: what a reader of its numbers must know; mostly nothing.
    """

    name: str
    model: Fields = field(default_factory=dict[str, Any])
    balance: Fields = field(default_factory=dict[str, Any])
    note: str = ""

    def config(self, base: TrainConfig, seed: int) -> TrainConfig:
        """The base with this case's changes and a seed.

        Raises:
            UserError: the changes do not fit the base.
        """
        model = {**base.model.model_dump(), **self.model}
        training = base.training.model_copy(update={"seed": seed})
        changed = base.model_copy(
            update={
                "model": read_config(model, f"case {self.name!r}"),
                "training": training,
                "balance": base.balance.model_copy(update=self.balance),
            }
        )
        changed.check(Path(f"case {self.name!r}"))
        return changed


def routers(model: ModelConfig) -> list[Case]:
    """Every router, each with the balancing that its paper pairs it with; two learn nothing."""
    experts = model.required("n_routed_experts")
    groups = {"n_group": 4, "topk_group": 2} if experts % 4 == 0 else {}
    return [
        Case("sigmoid, bias", {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
        Case("softmax, auxiliary loss", SOFTMAX, AUXILIARY),
        Case(
            "softmax in groups",
            {"topk_method": "group_limited_greedy", "scoring_func": "softmax", **groups},
            AUXILIARY,
        ),
        Case("ReLU", {"topk_method": "relu"}, NOTHING, "experts per token are learned"),
        Case(
            "expert choice",
            {"topk_method": "expert_choice", "scoring_func": "softmax"},
            NOTHING,
            "trained with choices that see later tokens, judged with thresholds that do not",
        ),
        Case("Sinkhorn", {"topk_method": "sinkhorn", "scoring_func": "softmax"}, NOTHING),
        Case("hash of the token", {"topk_method": "hash"}, NOTHING, "control: nothing is learned"),
        Case(
            "random map",
            {"topk_method": "random", "scoring_func": "softmax"},
            NOTHING,
            "control: nothing is learned",
        ),
    ]


def granularity(model: ModelConfig) -> list[Case]:
    """Few large experts to many small ones, at the same total and active size.

    As in DeepSeekMoE (section 4.5): softmax scores that are not normalised, an auxiliary loss,
    no shared expert. Scores shrink as experts grow in number, so that finer cases begin with less
    from their experts (docs/numbers.md, correction).
    """
    experts, chosen = model.required("n_routed_experts"), model.required("num_experts_per_tok")
    width = model.required("moe_intermediate_size")
    cases: list[Case] = []
    for number in (1, 2, 4, 8, 16):  # experts chosen for a token
        if experts * number % chosen or width * chosen % number or number > 2 * chosen:
            continue
        shape = {
            "n_routed_experts": experts * number // chosen,
            "num_experts_per_tok": number,
            "moe_intermediate_size": width * chosen // number,
            "n_shared_experts": 0,
            "norm_topk_prob": False,
        }
        name = f"{number} of {shape['n_routed_experts']}"
        cases.append(Case(name, {**SOFTMAX, **shape}, AUXILIARY))
    return cases


def shared(model: ModelConfig) -> list[Case]:
    """0, 1 or 2 experts that see every token, taken from those that are chosen and from all.

    As in DeepSeekMoE (section 4.5), total and active size stay the same.
    """
    chosen = model.required("num_experts_per_tok") + model.n_shared_experts
    experts = model.required("n_routed_experts") + model.n_shared_experts
    return [
        Case(
            f"{number} shared, {chosen - number} of {experts - number}",
            {
                **SOFTMAX,
                "n_shared_experts": number,
                "num_experts_per_tok": chosen - number,
                "n_routed_experts": experts - number,
                "norm_topk_prob": False,
            },
            AUXILIARY,
        )
        for number in range(min(3, chosen))
    ]


def balance(model: ModelConfig) -> list[Case]:
    """Sigmoid scores with the loss-free bias, with auxiliary losses, with both, with nothing."""
    router: Fields = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    return [
        Case("nothing", router, NOTHING),
        Case("bias", router),
        Case("bias and sequence loss", router, {"sequence_aux": 1e-4}),
        Case("auxiliary loss 0.001", router, {**NOTHING, "expert_aux": 0.001}),
        Case("auxiliary loss 0.01", router, AUXILIARY),
    ]


STUDIES: dict[str, Callable[[ModelConfig], list[Case]]] = {
    "routers": routers,
    "granularity": granularity,
    "shared": shared,
    "balance": balance,
}


def base_config(path: Path, overrides: dict[str, Fields]) -> TrainConfig:
    """Read the training config to vary; `overrides` win over it, None excepted.

    Raises:
        UserError: as `TrainConfig.from_file`, or the config has no routed experts.
    """
    config = TrainConfig.from_file(path, overrides)
    if config.model.n_routed_experts is None:
        raise UserError(f"{path} describes a dense model; give a mixture of experts to study")
    return config
