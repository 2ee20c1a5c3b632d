"""The weights that a training starts from, where it does not start from nothing."""

import json
from pathlib import Path
from typing import Any

import torch

from moescope.catalog import BOX
from moescope.checkpoint import open_checkpoint, read_weights
from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.formats.gguf.model import is_gguf
from moescope.model.decoder import CausalLM, first_weights
from moescope.training.parallel.shards import write_part

READING = "reading.json"
"""Beside a finished model: how far it had read its text."""
MAY_DIFFER = {
    *("max_position_embeddings", "trained_length", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
"""What a model may say otherwise than the one it starts from: none of it shapes a weight."""


def locate_start(name: str) -> Path:
    """Return the folder or GGUF file of a model: a path, or the name of one in the box.

    Raises:
        UserError: there is no such model.
    """
    for path in (Path(name), BOX / name):
        if (path / "config.json").is_file() or is_gguf(path):
            return path
    raise UserError(
        f"[start] names the model {name!r}, but there is no such folder; give a folder with "
        'config.json and safetensors, a .gguf file, or "tiny"'
    )


def start_config(name: str) -> ModelConfig:
    """Return the config of the model that a training starts from."""
    return open_checkpoint(locate_start(name)).config


@torch.no_grad()
def draw_start(model: CausalLM, seed: int) -> None:
    """Draw the first weights of `model`, which may be dealt to ranks: the same on all of them."""
    for parameter, weight in first_weights(model, seed):
        write_part(parameter, weight)


@torch.no_grad()
def load_start(model: CausalLM, name: str) -> None:
    """Give `model`, whose weights are float32, the weights of another of the same shape.

    They are read tensor by tensor; of a model that is dealt to ranks each keeps its parts.

    Raises:
        UserError: the models differ in shape or in how they compute.
    """
    source = open_checkpoint(locate_start(name))
    ours, theirs = _shaping(model.config), _shaping(source.config)
    for field in ours:
        if ours[field] != theirs[field]:
            raise UserError(
                f"[model] says {field} = {ours[field]!r}, but {name}, which [start] names, has "
                f"{theirs[field]!r}; leave [model] out to take its own"
            )
    tensors = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name, weight in read_weights(source, shapes, torch.float32):
        write_part(tensors[name], weight)
    source.refuse_unread()


def reading_of(name: str) -> dict[str, Any] | None:
    """Return how far a model had read its text when its training ended, where that is known."""
    path = locate_start(name) / READING
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _shaping(config: ModelConfig) -> dict[str, Any]:
    fields = config.model_dump(mode="json")
    return {field: value for field, value in fields.items() if field not in MAY_DIFFER}
