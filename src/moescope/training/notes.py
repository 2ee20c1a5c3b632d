"""What a user should know before the first step of a training."""

from pathlib import Path

from moescope.families import others_route_alike
from moescope.training.config import TrainConfig
from moescope.training.rescue import lacking_room

SLOWER = 1.5
"""Times that bf16 products are slower than float32 ones, above which it is said."""
BYTES_OF_STATE = 12
"""Of a checkpoint a parameter: a float32 master and one or two moments."""


def notes_before(
    config: TrainConfig, out: Path, *, parameters: int, float32_times: float, counts_first: bool
) -> list[str]:
    """Return what is told of a training.

    Args:
        config: of the training.
        out: its folder.
        parameters: of the network.
        float32_times: how many times as fast as products of the network's type float32 ones are.
        counts_first: whether each micro batch is run forward twice.
    """
    training, model, notes = config.training, config.model, list[str]()
    if config.start.model is not None:
        notes.append(f"starting from the weights of {config.start.model}")
    if config.parallel.ranks > 1:
        data, expert = config.parallel.data, config.parallel.expert
        notes.append(f"{config.parallel.ranks} processes, data {data} x expert {expert}")
    if model.topk_method in ("expert_choice", "sinkhorn"):
        tokens = training.rows_at_a_time * config.data.sequence_length
        notes.append(
            f"{model.topk_method}: the {tokens:,} tokens of a micro batch compete for "
            f"experts, so micro_batch_size {training.rows_at_a_time} is part of this recipe"
        )
    if not others_route_alike(model):
        notes.append(
            f"only moescope computes a {model.model_type} with the router "
            f"{model.topk_method} and {model.scoring_func} scores: the model is written "
            "so that others refuse it"
        )
    if counts_first:
        notes.append(
            "balance losses count over the whole step, so each micro batch is run forward "
            "twice; a larger micro_batch_size is faster and gives the same"
        )
    if float32_times > SLOWER:
        notes.append(
            f"this processor multiplies float32 {float32_times:.0f} times as fast as bfloat16; "
            'dtype = "float32" in [training] makes the training faster'
        )
    kept = config.checkpoints.keep + 2 if config.checkpoints.every else 1
    if (warning := lacking_room(out, parameters * BYTES_OF_STATE * kept)) is not None:
        notes.append(warning)
    return notes
