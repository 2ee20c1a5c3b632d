"""What each document costs a model, in nats."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.not_finite import not_finite
from moescope.model.decoder import CausalLM
from moescope.scope.texts import batches, window_length, windows

LOGITS_AT_ONCE = 512
"""Tokens whose logits over the vocabulary are held at a time."""


@torch.inference_mode()
def document_losses(
    model: CausalLM, encoded: Sequence[Sequence[int]], window: int | None = None
) -> npt.NDArray[np.float64]:
    """Sum the negative log-likelihood of each document's tokens but the first, `(documents,)` nats.

    A document that is longer than a window is read window by window, each from its own start.
    `window` is in tokens; `texts.window_length` where it is left out.

    Raises:
        UserError: the model computes what is no number; the sentence says where.
    """
    length = window_length(model, window)
    losses = np.zeros(len(encoded))
    device = model.lm_head.weight.device
    model.eval()
    for batch, ids in batches(encoded, windows(encoded, length, overlap=1)):
        token_losses = _token_losses(model, ids.to(device)).cpu().double().numpy()
        if not (finite := np.isfinite(token_losses).all(axis=1)).all():
            raise not_finite(model, ids[int(finite.argmin()), :-1].tolist())
        for part, row in zip(batch, token_losses, strict=True):
            losses[part.document] += row[: part.end - part.start - 1].sum()
    return losses


def _token_losses(model: CausalLM, ids: Tensor) -> Tensor:
    """Map ids `(rows, seq + 1)` to the nats of all but the first, `(rows, seq)`."""
    hidden_states = model(ids[:, :-1])  # (rows, seq, hidden)
    targets = ids[:, 1:]
    parts = [
        F.cross_entropy(model.logits(part), target, reduction="none")
        for part, target in zip(
            hidden_states.flatten(0, 1).split(LOGITS_AT_ONCE),
            targets.flatten().split(LOGITS_AT_ONCE),
            strict=True,
        )
    ]
    return torch.cat(parts).view_as(targets)
