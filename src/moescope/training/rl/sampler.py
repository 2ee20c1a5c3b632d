"""Drawing answers with our own engine, from the weights as they stand, with their routing."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moescope.checkpoint import load_model
from moescope.config import ModelConfig
from moescope.engine import sequence as engine_sequence
from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Scheduler
from moescope.engine.sequence import RoutedTokens, Token
from moescope.kernels.blocks import Blocks
from moescope.model.decoder import CausalLM
from moescope.native.network import Packer
from moescope.text.generation import GenerationDefaults
from moescope.text.tokenizer import Tokenizer
from moescope.training.parallel.placement import each_whole, is_dealt, whole_copy


@dataclass(frozen=True)
class Answer:
    """What was drawn for a problem.

    Attributes:
        prompt: its ids.
        ids: of the answer, its end token among them where it ended by itself.
        text: special tokens spelled out, without the end token.
        logprobs: natural, of each id under the network that drew it.
        choices: layer -> `(len(prompt) + len(ids) - 1, slots)`, the experts that it chose; all
            tokens but the last were read.
        ended: whether it ended by itself.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    choices: dict[int, Tensor]
    ended: bool


class LiveWeights:
    """A network in memory, dealt to ranks or not, as a source of weights (`WeightSource`)."""

    def __init__(self, model: CausalLM) -> None:
        self.config: ModelConfig = model.config
        self.dtype, self.files = torch.float32, list[Path]()
        self.has_blocks = False
        self._tensors = dict(each_whole(model))

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        return self._tensors[name].to(dtype or torch.float32, copy=True)

    def read_expert(
        self, name: str, expert: int, shape: torch.Size, dtype: torch.dtype | None
    ) -> Tensor:
        stem, _, kind = name.rpartition(".")
        if kind == "down_proj":
            matrix = self._tensors[name][expert]
        else:
            both = self._tensors[f"{stem}.gate_up_proj"][expert]  # (2 * intermediate, hidden)
            matrix = both.chunk(2)[kind == "up_proj"]
        return matrix.to(dtype or torch.float32, copy=True)

    def blocks(self, name: str, expert: int | None = None) -> Blocks | None:
        return None

    def refuse_unread(self) -> None:
        """All names are the network's own."""

    def tokenizer(self) -> Tokenizer | None:
        return None

    def generation_defaults(self) -> GenerationDefaults:
        return GenerationDefaults()


def sampling_network(
    model: CausalLM, sampler: Literal["int8", "live"], dtype: torch.dtype
) -> CausalLM:
    """Return what answers are drawn with: the network itself, or it rounded for native kernels.

    The network itself is copied whole, as `dtype`, where it is dealt to ranks.
    """
    if sampler == "live":
        device = model.lm_head.weight.device
        return whole_copy(model, dtype, device) if is_dealt(model) else model
    return load_model(LiveWeights(model), dtype=torch.float32, packer=Packer("int8"))


@torch.inference_mode()
def draw_answers(
    network: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
) -> list[Answer]:
    """Continue each prompt with its own seed; answers come in the order of the prompts.

    Raises:
        NotFinite: the network computes what is no number.
    """
    if not prompts:
        return []
    was_training = network.training
    engine = Engine(network, tokenizer)
    texts = [
        engine.sequence(
            prompt, SamplingParams(max_tokens, temperature, seed=seed, routed_experts=True), at
        )
        for at, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    made: list[list[Token]] = [[] for _ in texts]
    scheduler = Scheduler(engine.blocks, chunk=None, reuse=False)
    for text in texts:
        scheduler.add(text)
    while scheduler:
        for _, event in engine.step(scheduler):
            if not isinstance(event, Token):
                raise event
            made[event.row].append(event)
    network.train(was_training)
    return [_answer(engine, text, tokens) for text, tokens in zip(texts, made, strict=True)]


def _answer(engine: Engine, text: engine_sequence.Sequence, tokens: Sequence[Token]) -> Answer:
    ids = tuple(token.id for token in tokens)
    ended = ids[-1] in engine.end_ids
    told = list(itertools.takewhile(lambda i: i not in engine.end_ids, ids))
    return Answer(
        prompt=tuple(text.ids[: text.prompt_tokens]),
        ids=ids,
        text=engine.tokenizer.decode(told, skip_special_tokens=False),
        logprobs=tuple(token.logprob for token in tokens),
        choices=_choices([token.routed for token in tokens if token.routed is not None]),
        ended=ended,
    )


def _choices(routed: Sequence[RoutedTokens]) -> dict[int, Tensor]:
    """Return what was chosen for the tokens of a text, by layer; nothing without a router."""
    if not routed:
        return {}
    whole = RoutedTokens.join(routed)
    return {layer: whole.ids[:, at].long() for at, layer in enumerate(whole.layers)}
