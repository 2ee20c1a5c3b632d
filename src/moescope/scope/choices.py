"""Which experts each token of labelled text was sent to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moescope.engine.not_finite import not_finite
from moescope.errors import UserError
from moescope.model.decoder import CausalLM
from moescope.model.recorder import Recorder
from moescope.model.routing import UNUSED, Routing
from moescope.scope.texts import batches, encode, window_length, windows
from moescope.text.documents import Document
from moescope.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]  # (done, in all)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Choices:
    """Every token of a text, in the text's order, without special tokens.

    Attributes:
        domains: their names.
        layers: indices of the mixture-of-experts layers.
        n_routed_experts: of each layer.
        token_ids: `(tokens,)`.
        document: which document each token is of, `(tokens,)`, ascending.
        domain: which domain each token is of, `(tokens,)`, ascending.
        topk_ids: per layer `(tokens, slots)`, -1 where a token has fewer experts.
    """

    domains: list[str]
    layers: list[int]
    n_routed_experts: int
    token_ids: Ints
    document: Ints
    domain: Ints
    topk_ids: list[npt.NDArray[np.int32]]


@torch.inference_mode()
def observe(
    model: CausalLM,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    progress: Progress | None = None,
    window: int | None = None,
) -> Choices:
    """Run documents, sorted by domain, through a model and keep what its routers chose.

    `window` is how many tokens are read at once; `texts.window_length` where it is left out.

    Raises:
        UserError: the model has no routed experts, or computes what is no number.
    """
    config = model.config
    layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
    if not layers:
        raise UserError(
            "the model has no routed experts, so nothing can specialise; give a mixture of experts"
        )
    encoded = encode(tokenizer, documents)
    first = np.cumsum([0, *map(len, encoded)])  # a document's first token among all
    recorder = _ChoiceRecorder()
    length = window_length(model, window)
    model.eval()
    for batch, ids in batches(encoded, windows(encoded, length, overlap=0)):
        recorder.rows = [
            (int(first[part.document]) + part.start, part.end - part.start) for part in batch
        ]
        states = model.model(ids.to(model.lm_head.weight.device), recorder=recorder)
        if not states.isfinite().all():
            raise not_finite(model, ids[~states.isfinite().all(dim=(1, 2)).cpu()][0].tolist())
        if progress is not None:
            progress(recorder.tokens // len(layers), int(first[-1]))
    domains = sorted({document.domain for document in documents})
    token_ids = np.array([token_id for ids in encoded for token_id in ids], dtype=np.int64)
    document = np.repeat(np.arange(len(encoded)), np.diff(first))
    domain_of = np.array([domains.index(document.domain) for document in documents])
    spelled = ~np.isin(token_ids, list(tokenizer.special_ids))
    return Choices(
        domains=domains,
        layers=layers,
        n_routed_experts=config.required("n_routed_experts"),
        token_ids=token_ids[spelled],
        document=document[spelled],
        domain=domain_of[document][spelled],
        topk_ids=[recorder.assemble(layer, len(token_ids))[spelled] for layer in layers],
    )


class _ChoiceRecorder(Recorder):
    """Keeps the choices of each row's own tokens; padding behind them is dropped.

    Attributes:
        rows: the place of each row's first token in the text, and how many it has.
        tokens: seen so far, each once a layer.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []
        self.tokens = 0
        self._seen: dict[int, list[tuple[int, npt.NDArray[np.int32]]]] = {}

    def routing(self, layer_idx: int, routing: Routing) -> None:
        topk_ids = routing.topk_ids.to(torch.int32).cpu().unflatten(0, (len(self.rows), -1))
        for (start, length), row in zip(self.rows, topk_ids.numpy(), strict=True):
            self._seen.setdefault(layer_idx, []).append((start, row[:length]))  # (length, slots)
            self.tokens += length

    def assemble(self, layer_idx: int, tokens: int) -> npt.NDArray[np.int32]:
        """Return a layer's choices in the text's order, `(tokens, slots)`."""
        seen = self._seen.pop(layer_idx)
        slots = max(row.shape[1] for _, row in seen)
        topk_ids = np.full((tokens, slots), UNUSED, dtype=np.int32)
        for start, row in seen:
            topk_ids[start : start + len(row), : row.shape[1]] = row
        return topk_ids
