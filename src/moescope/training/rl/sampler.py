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
from moescope.engine.batch import Batch, Row, Token
from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.kernels.blocks import Blocks
from moescope.model.decoder import CausalLM
from moescope.native.network import Packer
from moescope.text.generation import GenerationDefaults
from moescope.text.tokenizer import Tokenizer
from moescope.training.rl.replay import ChoiceRecorder


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
    """A network in memory as a source of weights for another (`WeightSource`)."""

    def __init__(self, model: CausalLM) -> None:
        self.config: ModelConfig = model.config
        self.dtype, self.files = torch.float32, list[Path]()
        self.has_blocks = False
        self._tensors = model.state_dict()

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


def sampling_network(model: CausalLM, sampler: Literal["int8", "live"]) -> CausalLM:
    """Return what answers are drawn with: the network itself, or it rounded for native kernels."""
    if sampler == "live":
        return model
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
    was_training = network.training
    engine = Engine(network, tokenizer)
    rows = [
        Row(engine, at, prompt, SamplingParams(max_tokens, temperature, seed=seed))
        for at, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    made: list[list[Token]] = [[] for _ in rows]
    chosen: list[dict[int, list[Tensor]]] = [{} for _ in rows]
    recorder, batch = ChoiceRecorder(), Batch(engine)
    places, longest = list(range(len(rows))), max(len(prompt) for prompt in prompts)
    events = batch.start(rows, recorder)
    while places:
        for event in events:
            if not isinstance(event, Token):
                raise event
            made[event.row].append(event)
        for layer, topk_ids in recorder.passes.pop().items():
            by_row = topk_ids.unflatten(0, (len(places), -1))  # (rows, tokens, slots)
            for place, ids in zip(places, by_row, strict=True):
                read = ids[: len(prompts[place])] if ids.shape[0] == longest else ids
                chosen[place].setdefault(layer, []).append(read.clone())
        places, longest = [row.number for row in batch.rows], -1
        events = batch.step(recorder) if places else iter(())
    network.train(was_training)
    return [
        _answer(engine, row, tokens, {layer: torch.cat(c) for layer, c in choices.items()})
        for row, tokens, choices in zip(rows, made, chosen, strict=True)
    ]


def _answer(
    engine: Engine, row: Row, tokens: Sequence[Token], choices: dict[int, Tensor]
) -> Answer:
    ids = tuple(token.id for token in tokens)
    ended = ids[-1] in engine.end_ids
    told = list(itertools.takewhile(lambda i: i not in engine.end_ids, ids))
    return Answer(
        prompt=tuple(row.ids[: row.prompt_tokens]),
        ids=ids,
        text=engine.tokenizer.decode(told, skip_special_tokens=False),
        logprobs=tuple(token.logprob for token in tokens),
        choices=choices,
        ended=ended,
    )
