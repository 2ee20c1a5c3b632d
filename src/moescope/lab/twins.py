"""Recipes that are trained to be compared: on the same tokens in the same order, seed by seed."""

import json
from collections.abc import Sequence
from pathlib import Path

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.lab.routers import BASE, Fields
from moescope.lab.trainings import Training, run_all, steps_done, train_quietly
from moescope.model.costs import count_parameters
from moescope.scope.choices import Progress
from moescope.training.config import TrainConfig
from moescope.training.text import prepare_text, with_special_ids

MULTIPLE = 8
"""What the width of a twin's feed-forward part is rounded to."""


def is_recipe(name: str) -> bool:
    """Whether `moescope compare` trains what is called so: `moe`, `dense`, or a TOML file."""
    return name in ("moe", "dense") or name.endswith(".toml")


def recipe(name: str, overrides: dict[str, Fields]) -> TrainConfig:
    """Read a recipe: `moe` is the one that studies vary, `dense` its twin.

    Args:
        name: `moe`, `dense`, or a TOML file as `moescope train` takes it.
        overrides: table -> field -> value; they win, None excepted.

    Raises:
        UserError: as `TrainConfig.from_file`.
    """
    if name not in ("moe", "dense"):
        return TrainConfig.from_file(Path(name), overrides)
    config = TrainConfig.from_file(BASE, overrides)
    if name == "moe":
        return config
    return config.model_copy(update={"model": dense_twin(config.model)})


def dense_twin(model: ModelConfig) -> ModelConfig:
    """Return the dense model in which as many weights work on a token, of the same width and depth.

    All its layers are alike: what a token meets in feed-forward parts and routers is shared out.
    """
    parameters = count_parameters(model)
    apart = parameters.attention + parameters.norm + parameters.lm_head
    feed_forward = parameters.active_without_embedding - apart
    width = feed_forward / (3 * model.hidden_size * model.num_hidden_layers)
    changes: Fields = {
        "intermediate_size": max(1, round(width / MULTIPLE)) * MULTIPLE,
        "first_k_dense_replace": model.num_hidden_layers,
        "n_routed_experts": None,
        "n_shared_experts": 0,
        "num_experts_per_tok": None,
        "moe_intermediate_size": None,
    }
    return model.model_copy(update=changes)


def train_recipes(
    names: Sequence[str],
    overrides: dict[str, Fields],
    out: Path,
    *,
    seeds: int,
    workers: int,
    progress: Progress,
) -> dict[str, list[Path]]:
    """Train every recipe with every seed, but for what is trained already.

    Args:
        names: of the recipes.
        overrides: of their fields, as `recipe` takes them; `data.source` among them.
        out: receives `NAME/seed-N` for each training, and the token files.
        seeds: from 0.
        workers: trainings at a time.
        progress: called with (optimizer steps done, steps in all).

    Returns:
        The trained models' folders, one for each seed.

    Raises:
        UserError: two recipes have the same name or do not read the same tokens, one cannot be
            trained, or `out` holds another training.
    """
    configs = {Path(name).stem: recipe(name, overrides) for name in names}
    if len(configs) < len(names):
        raise UserError("two recipes have the same name; rename one, their folders are called so")
    _check_same_tokens(configs)
    trainings: dict[str, list[Training]] = {}
    for name, config in configs.items():
        text = prepare_text(config.data, config.model, out, lambda _: None)
        model = with_special_ids(config.model, text.tokenizer)
        trainings[name] = [
            Training(
                config=config.model_copy(
                    update={
                        "model": model,
                        "training": config.training.model_copy(update={"seed": seed}),
                    }
                ),
                folder=out / name / f"seed-{seed}",
                shared_folder=out,
            )
            for seed in range(seeds)
        ]
    every = [
        training for of_seeds in zip(*trainings.values(), strict=True) for training in of_seeds
    ]
    waiting = [training for training in every if not _is_done(training)]
    run_all(train_one, waiting, workers, lambda: progress(*steps_done(every)))
    return {name: [training.folder for training in made] for name, made in trainings.items()}


def train_one(training: Training) -> bool:
    """Do one training; False if it was interrupted."""
    return train_quietly(training) is not None


def _check_same_tokens(configs: dict[str, TrainConfig]) -> None:
    """Refuse recipes that would not read the same text in the same order."""
    first = next(iter(configs))
    for name, config in configs.items():
        for table, field in (
            ("training", "steps"),
            ("training", "batch_size"),
            ("data", "sequence_length"),
            ("data", "domain_weights"),
            ("model", "vocab_size"),
        ):
            ours, theirs = (getattr(getattr(one, table), field) for one in (config, configs[first]))
            if ours != theirs:
                raise UserError(
                    f"{name} has {field} {ours}, {first} has {theirs}; recipes that are compared "
                    "must read the same tokens"
                )


def _is_done(training: Training) -> bool:
    """Whether a training is finished already.

    Raises:
        UserError: it was made with another config.
    """
    file = training.folder / "training.json"
    if not file.exists():
        return False
    if json.loads(file.read_text(encoding="utf-8"))["config"] != training.config.model_dump(
        mode="json"
    ):
        raise UserError(
            f"{training.folder} holds a training of another config; choose another --out, or give "
            "the options that it began with"
        )
    return True
