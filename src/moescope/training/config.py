"""What a training is made of: the TOML file that `moescope train` reads.

Every table refuses fields that it does not know. `[model]` takes the fields of `ModelConfig`.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moescope.config import ModelConfig, one_sentence
from moescope.errors import UserError
from moescope.families import read_config
from moescope.training.start import start_config


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StartConfig(Table):
    """`[start]`: the weights that the training starts from; drawn by the seed if left out.

    Attributes:
        model: folder or GGUF file of a model, or the name of one in the box; it brings its
            tokenizer, and its sizes where the table `model` is left out. Optimizer and schedule
            are new.
        keep_reading: whether to read the text from where that model's training had come to;
            with other text, or where that is not known, from the beginning.
    """

    model: str | None = None
    keep_reading: bool = True


class DataConfig(Table):
    """`[data]`: what is read.

    Attributes:
        source: file or folder of text, one subfolder a domain.
        tokenizer: folder of a tokenizer; one is trained on the text where it is left out.
        sequence_length: tokens of a row.
        domain_weights: how often a row comes from each domain; all alike where left out.
    """

    source: Path | None = None
    tokenizer: Path | None = None
    sequence_length: int = Field(default=512, gt=0)
    domain_weights: dict[str, float] | None = None


class TrainingConfig(Table):
    """`[training]`: how the weights move.

    Attributes:
        steps: optimizer steps in all.
        batch_size: rows of one step.
        micro_batch_size: rows computed at a time; gradients are summed over a step, and balance
            losses count over the whole step, at the cost of one more forward pass. With
            `expert_choice` and `sinkhorn` it is part of the recipe: tokens compete for experts
            within a micro batch, so another size is another training. With all other routers it
            changes nothing but rounding.
        optimizer: `muon` (matrices by Muon, the rest by AdamW) or `adamw` (all by AdamW).
        muon_learning_rate: peak rate of what Muon moves, scaled to AdamW's size.
        adamw_learning_rate: peak rate of what AdamW moves.
        weight_decay: decoupled, of matrices.
        warmup_fraction: share of the steps in which the rate rises; it is constant thereafter.
        decay_fraction: share of the steps at the end in which the rate falls to zero.
        decay: form of the decay to zero.
        clip: largest norm of the whole gradient.
        seed: of the weights' start and the order of the text.
        dtype: type that the network computes in; masters and optimizer state are float32.
        mtp_loss_weight: of the multi-token-prediction loss (DeepSeek-V3, section 4.2: 0.3).
        fuse: compile chains of elementwise operations, which costs half a minute at the start.
        checkpoint_activations: keep of attention, experts and dense parts their inputs alone and
            compute the rest again in the backward pass: less memory, a third more work.
        device: `cpu`, `cuda` (the GPU of the process's number on its node) or `cuda:N`; a GPU where
            there is one if left out.
    """

    steps: int = Field(gt=0)
    batch_size: int = Field(default=32, gt=0)
    micro_batch_size: int | None = Field(default=None, gt=0)
    optimizer: Literal["muon", "adamw"] = "muon"
    muon_learning_rate: float = Field(default=3e-3, gt=0)
    adamw_learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_fraction: float = Field(default=0.02, ge=0, le=1)
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    decay: Literal["linear", "sqrt"] = "sqrt"
    clip: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    mtp_loss_weight: float = Field(default=0.3, ge=0)
    fuse: bool = False
    checkpoint_activations: bool = False
    device: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def rows_at_a_time(self) -> int:
        return self.micro_batch_size or self.batch_size


class BalanceConfig(Table):
    """`[balance]`: how experts are kept busy; a weight of zero leaves a term out.

    Attributes:
        bias_update_speed: of the loss-free bias (`noaux_tc` routers).
        expert_aux: weight of the auxiliary loss over experts (DeepSeekMoE, eq. 12-14).
        device_aux: weight of the one over groups of experts (DeepSeekMoE, eq. 15-17).
        sequence_aux: weight of the one inside each sequence (DeepSeek-V3, eq. 17-20).
        device_groups: equal groups of experts that `device_aux` balances.
        z_loss: weight of the router z-loss.
        l1_start: first weight of ReMoE's L1 term (`relu` routers).
        l1_factor: by which that weight is adapted each step.
    """

    bias_update_speed: float = Field(default=0.001, ge=0)
    expert_aux: float = Field(default=0.0, ge=0)
    device_aux: float = Field(default=0.0, ge=0)
    device_groups: int = Field(default=1, gt=0)
    sequence_aux: float = Field(default=0.0, ge=0)
    z_loss: float = Field(default=0.0, ge=0)
    l1_start: float = Field(default=1e-8, gt=0)
    l1_factor: float = Field(default=1.2, gt=1)


class EvaluationConfig(Table):
    """`[evaluation]`: how well the model does on held-out text.

    Attributes:
        every: steps between two evaluations; 0 for one at the end only.
        tokens: of each domain's held-out text, at most.
    """

    every: int = Field(default=0, ge=0)
    tokens: int = Field(default=16384, gt=0)


class CheckpointsConfig(Table):
    """`[checkpoints]`: from what a training is continued.

    Attributes:
        every: steps between two; 0 for one when interrupted only.
        keep: the last so many are kept, beside the one from before the learning rate decays.
    """

    every: int = Field(default=0, ge=0)
    keep: int = Field(default=2, gt=0)


class ParallelConfig(Table):
    """`[parallel]`: over how many processes the training is dealt, which torchrun starts.

    Each process reads its share of every micro batch.

    Attributes:
        data: ranks among which weights and optimizer state are dealt (FSDP).
        expert: ranks among which the experts of each layer are dealt; tokens travel to them.
    """

    data: int = Field(default=1, gt=0)
    expert: int = Field(default=1, gt=0)

    @property
    def ranks(self) -> int:
        return self.data * self.expert


class RlConfig(Table):
    """`[rl]`: reinforcement on answers that a program can check (`kind = "rl"`).

    A step reads `batch_size` answers, `group_size` to each problem.

    Attributes:
        tasks: Python files that set problems: `sample(rng)` returns a
            `moescope.training.rl.tasks.Problem`. They are run.
        group_size: answers to a problem, which are held against each other.
        max_tokens: of an answer.
        normalisation: `grpo` (DeepSeekMath, eq. 3: rewards over their spread, the mean of each
            answer's tokens), `dr_grpo` (Liu et al. 2025: rewards less their mean, sums over
            `max_tokens`), `gspo` (Zheng et al. 2025, eq. 5-7: one ratio an answer).
        clip_low: by how much a ratio may fall below one.
        clip_high: by how much it may rise above one.
        kl: weight of the divergence from the model started from; 0 leaves it out.
        epochs: moves of the weights by the same answers.
        sampler: what the answers are drawn with: `int8` (the native kernels, packed anew each
            step) or `live` (the network in training).
        replay: whether the training pass takes the experts that the sampler chose (R3, Ma et al.
            2025).
        asked: held-out problems an evaluation asks, the same ones each time.
    """

    tasks: list[Path] = []
    group_size: int = Field(default=8, gt=1)
    max_tokens: int = Field(default=128, gt=0)
    normalisation: Literal["grpo", "dr_grpo", "gspo"] = "grpo"
    clip_low: float = Field(default=0.2, gt=0, le=1)
    clip_high: float = Field(default=0.2, gt=0)
    kl: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=1, gt=0)
    sampler: Literal["int8", "live"] = "int8"
    replay: bool = True
    asked: int = Field(default=64, gt=0)


class TrainConfig(Table):
    """A whole training.

    Attributes:
        kind: `pretrain` (all of a text), `sft` (the answers in chats) or `rl` (answers of its
            own, rewarded by a program); the last two start from a model.
    """

    kind: Literal["pretrain", "sft", "rl"] = "pretrain"
    model: ModelConfig
    start: StartConfig = StartConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig
    balance: BalanceConfig = BalanceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    parallel: ParallelConfig = ParallelConfig()
    rl: RlConfig = RlConfig()

    def required_start(self) -> str:
        """Return the model to start from; `check` has made sure that there is one."""
        assert self.start.model is not None
        return self.start.model

    @classmethod
    def from_file(cls, path: Path, overrides: dict[str, dict[str, Any]]) -> "TrainConfig":
        """Read a TOML file; `overrides` (table -> field -> value) win over it, None excepted.

        Raises:
            UserError: the file is missing or no TOML, or a field is unknown, missing or wrong.
        """
        try:
            tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"there is no {path}; name a training config (TOML)") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UserError(f"cannot read {path} as TOML: {error}") from error
        for table, fields in overrides.items():
            given = {name: value for name, value in fields.items() if value is not None}
            if given:
                tables[table] = {**tables.get(table, {}), **given}
        kind = tables.pop("kind", "pretrain")
        _refuse_unknown(tables, path)
        try:
            model = _model_of(tables, path)
            config = cls.model_validate({**tables, "kind": kind, "model": model})
        except ValidationError as error:
            raise UserError(f"{path}: {one_sentence(error)}") from error
        config.check(path)
        return config

    def check(self, path: Path) -> None:
        """Refuse values that do not fit each other."""
        training, model = self.training, self.model
        if training.batch_size % training.rows_at_a_time:
            raise UserError(
                f"{path}: batch_size {training.batch_size} is no multiple of micro_batch_size "
                f"{training.rows_at_a_time}"
            )
        if training.warmup_fraction + training.decay_fraction > 1:
            raise UserError(
                f"{path}: warmup_fraction {training.warmup_fraction} and decay_fraction "
                f"{training.decay_fraction} together exceed 1"
            )
        if self.kind != "rl" and self.data.sequence_length > model.max_position_embeddings:
            raise UserError(
                f"{path}: sequence_length {self.data.sequence_length} exceeds "
                f"max_position_embeddings {model.max_position_embeddings}"
            )
        if self.kind != "pretrain" and self.start.model is None:
            raise UserError(
                f'{path}: kind = "{self.kind}" goes on from a model; name one as `model` in '
                "[start], or with --start-from"
            )
        if self.kind == "rl" and not self.rl.tasks:
            raise UserError(f"{path}: [rl] names no tasks; give `tasks`, a list of Python files")
        if self.kind == "rl" and training.batch_size % self.rl.group_size:
            raise UserError(
                f"{path}: batch_size {training.batch_size} is no multiple of group_size "
                f"{self.rl.group_size}"
            )
        experts = model.n_routed_experts
        if experts is not None and experts % self.balance.device_groups:
            raise UserError(
                f"{path}: n_routed_experts {experts} is no multiple of device_groups "
                f"{self.balance.device_groups}"
            )
        self._check_parallel(path)

    def _check_parallel(self, path: Path) -> None:
        parallel, rows = self.parallel, self.training.rows_at_a_time
        experts = self.model.n_routed_experts
        if parallel.expert > 1 and experts is None:
            raise UserError(
                f"{path}: [parallel] deals experts to {parallel.expert} ranks, but the model has "
                "none; leave `expert` out and raise `data`"
            )
        if experts is not None and experts % parallel.expert:
            raise UserError(
                f"{path}: n_routed_experts {experts} cannot be dealt evenly to the "
                f"{parallel.expert} ranks of `expert` in [parallel]"
            )
        if rows % parallel.ranks:
            name = "micro_batch_size" if self.training.micro_batch_size else "batch_size"
            raise UserError(
                f"{path}: {name} {rows} cannot be dealt evenly to {parallel.ranks} ranks (data "
                f"{parallel.data} x expert {parallel.expert}); make it a multiple of that"
            )
        method = self.model.topk_method
        if self.kind == "rl" and parallel.ranks > 1 and method in ("expert_choice", "sinkhorn"):
            raise UserError(
                f"{path}: the tokens of a micro batch compete for experts with {method}, and "
                'those of kind = "rl" differ in number between ranks; train in one process'
            )


def _model_of(tables: dict[str, Any], path: Path) -> ModelConfig:
    if "model" in tables:
        return read_config(tables["model"], f"{path}, [model]")
    start = StartConfig.model_validate(tables.get("start", {}))
    if start.model is None:
        raise UserError(
            f"{path} lacks the table [model], which gives the network's sizes; or name a model to "
            "start from as `model` in [start]"
        )
    return start_config(start.model)


FIELDS: dict[str, set[str]] = {
    "model": {*ModelConfig.model_fields, "rope_parameters"},
    "start": set(StartConfig.model_fields),
    "data": set(DataConfig.model_fields),
    "training": set(TrainingConfig.model_fields),
    "balance": set(BalanceConfig.model_fields),
    "evaluation": set(EvaluationConfig.model_fields),
    "checkpoints": set(CheckpointsConfig.model_fields),
    "parallel": set(ParallelConfig.model_fields),
    "rl": set(RlConfig.model_fields),
}
"""What each table may hold; a model's rotary settings may come as `transformers` writes them."""


def _refuse_unknown(tables: dict[str, Any], path: Path) -> None:
    for table, fields in tables.items():
        _refuse_unknown_name(table, set(FIELDS), f"{path}: there is no table")
        if not isinstance(fields, dict):
            raise UserError(f"{path}: `{table}` is {fields!r}; make it a table, [{table}]")
        names: list[str] = list(fields)
        for name in names:
            _refuse_unknown_name(name, FIELDS[table], f"{path}: [{table}] has no field")


def _refuse_unknown_name(name: str, known: set[str], sentence: str) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean `{close[0]}`?" if close else f"it knows {', '.join(sorted(known))}"
    raise UserError(f"{sentence} `{name}`; {advice}")
