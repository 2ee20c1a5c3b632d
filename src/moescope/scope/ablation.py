"""What each domain loses when an expert is taken away: specialisation by cause."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import ClassVar

import numpy as np

from moescope.errors import UserError
from moescope.model.decoder import CausalLM
from moescope.model.steering import Steering, moe_layers, steered
from moescope.scope.choices import Progress
from moescope.scope.losses import document_losses
from moescope.scope.resampling import rate_intervals
from moescope.scope.saved import Saved, rounded
from moescope.scope.texts import check_resampling, encode
from moescope.text.documents import Document
from moescope.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Ablation(Saved):
    """What it costs to switch single experts off, or to send every token to one.

    A switched-off expert's tokens go to the next best one, so its cost is what it does better
    than its replacement. Costs are differences between the same documents with and without it.

    Attributes:
        model: what it was loaded as.
        version: of moescope.
        forced: whether experts were forced on every token instead of switched off.
        domains: their names.
        documents: of each domain.
        tokens: predicted tokens of each domain.
        loss: of the untouched model, nats a token, by domain.
        layers: indices of the layers whose experts were tried.
        cost: `[domain][layer position][expert]`: by how many nats a token the loss rises.
        low, high: the ends of its 95 % interval over documents, same shape. Of a hundred experts
            without effect, five have an interval that leaves zero out.
        command: that measured it, if one did.
        held_out: domain -> whether no model was trained on its text, as far as models remember;
            empty where nobody asked.
    """

    noun: ClassVar[str] = "an ablation"

    model: str
    version: str
    forced: bool
    domains: list[str]
    documents: list[int]
    tokens: list[int]
    loss: list[float]
    layers: list[int]
    cost: list[list[list[float]]]
    low: list[list[list[float]]]
    high: list[list[list[float]]]
    command: str = ""
    held_out: dict[str, bool] = field(default_factory=dict[str, bool])


def ablate(
    name: str,
    model: CausalLM,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    layers: Sequence[int] | None = None,
    force: bool = False,
    window: int | None = None,
    progress: Progress | None = None,
) -> Ablation:
    """Measure every document's loss once for each expert, that expert being switched off.

    The text is read as many times as there are experts. Numbers are kept at four significant
    digits.

    Args:
        name: what the model was loaded as.
        model: has routed experts.
        tokenizer: the model's.
        documents: as `texts.labelled_text` returns them.
        layers: whose experts are tried; all if left out.
        force: send every token to the expert instead.
        window: tokens read at once; `texts.window_length` where it is left out.
        progress: called with (experts tried, experts to try).

    Raises:
        UserError: the model has no routed experts, a layer has none, or a domain has a single
            document.
    """
    check_resampling(documents)
    mixtures = list(moe_layers(model))
    for layer in layers or ():
        if layer not in mixtures:
            there = ", ".join(map(str, mixtures)) or "none"
            raise UserError(f"layer {layer} has no routed experts; layers that have: {there}")
    tried = list(layers or mixtures)
    if not tried:
        raise UserError("the model has no routed experts to switch off; give a mixture of experts")
    experts = model.config.required("n_routed_experts")
    encoded = encode(tokenizer, documents)
    whole = document_losses(model, encoded, window)  # (documents,)
    rise = np.empty((len(documents), len(tried), experts))  # nats a document
    for position, layer in enumerate(tried):
        for expert in range(experts):
            changed = [(layer, expert)]
            steering = Steering(forced=changed) if force else Steering(disabled=changed)
            changed_losses = document_losses(steered(model, steering), encoded, window)
            rise[:, position, expert] = changed_losses - whole
            if progress is not None:
                progress(position * experts + expert + 1, len(tried) * experts)
    domains = sorted({document.domain for document in documents})
    domain = np.array([domains.index(document.domain) for document in documents])
    sizes = np.array([len(ids) - 1 for ids in encoded])
    intervals = [rate_intervals(rise[domain == d], sizes[domain == d]) for d in range(len(domains))]
    cost, low, high = (
        [[[rounded(x) for x in row] for row in by_layer[part].tolist()] for by_layer in intervals]
        for part in range(3)
    )
    tokens = [int(sizes[domain == d].sum()) for d in range(len(domains))]
    return Ablation(
        model=name,
        version=version("moescope"),
        forced=force,
        domains=domains,
        documents=np.bincount(domain).tolist(),
        tokens=tokens,
        loss=[rounded(float(whole[domain == d].sum() / tokens[d])) for d in range(len(domains))],
        layers=tried,
        cost=cost,
        low=low,
        high=high,
    )
