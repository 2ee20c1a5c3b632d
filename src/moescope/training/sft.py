"""Fine-tuning on chats: of each, the tokens of the answers are learned, not those of the questions.

A chat is a row by itself, so that none sees another; rows of about one length make a step, and
what fills the shorter ones up is neither read nor scored.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moescope import kernels
from moescope.errors import UserError
from moescope.model.decoder import CausalLM
from moescope.text.split import TrainedText
from moescope.text.tokenizer import Tokenizer
from moescope.training.config import TrainConfig
from moescope.training.kind import Say
from moescope.training.objective import BalanceRecorder, Losses
from moescope.training.parallel.ranks import Ranks
from moescope.training.part import Part
from moescope.training.pretraining import loss_sentence

PROBE = "x"
SORTED_AT_ONCE = 16
"""Steps whose rows are put in order of length together, so that little is filled up."""


@dataclass(frozen=True)
class Chat:
    """A chat as ids, and which of them are answered: `(tokens,)` each, of equal length."""

    ids: tuple[int, ...]
    answered: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class ChatPart(Part):
    """Rows with `scored` `(rows, seq)` bool: which of the predicted tokens are learned."""

    scored: Tensor

    def loss_share_of(self, rows: slice) -> float:
        return int(self.scored[rows].sum()) / int(self.scored.sum())


def read_chats(source: Path, tokenizer: Tokenizer, longest: int) -> dict[str, list[Chat]]:
    """Read chat records, `{"messages": [{"role": …, "content": …}, …]}` a line, by domain.

    A file's domain is its folder under `source`, else its name.

    Raises:
        UserError: there is no record, one is none, or the model's chat form refuses it.
    """
    files = [source] if source.is_file() else sorted(source.rglob("*.jsonl"))
    chats: dict[str, list[Chat]] = {}
    for file in files:
        domain = file.stem if file.parent == source or file == source else file.parent.name
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                made = encode_chat(json.loads(line)["messages"], tokenizer)
            except UserError as error:
                raise UserError(f"{file}, line {number}: {error}") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{file}, line {number} is no chat record; give one "
                    '{"messages": [{"role": "user", "content": …}, …]} a line'
                ) from error
            chats.setdefault(domain, []).extend(c for c in made if len(c.ids) <= longest)
    if not any(chats.values()):
        raise UserError(f"there is no chat of at most {longest} tokens in {source} (*.jsonl)")
    return chats


def encode_chat(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> list[Chat]:
    """Turn a chat into ids, as the model will meet it; answers keep their thoughts.

    Where the chat form leaves the thoughts of earlier answers out, each answer is a row of its
    own, behind the questions and answers as the form writes them.
    """
    rows: list[list[tuple[str, bool]]] = []  # pieces of text, and whether they are answered
    text = ""
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = list(messages[:at])
        prompt = tokenizer.apply_chat_template(before)
        probe = [*before, {"role": "assistant", "content": PROBE}]
        whole = tokenizer.apply_chat_template(probe, add_generation_prompt=False)
        if not whole.startswith(prompt + PROBE):
            raise UserError("the model's chat form does not begin an answer as it asks for one")
        answer = message["content"] + whole[len(prompt + PROBE) :]
        if not (rows and prompt.startswith(text)):
            rows.append([])
            text = ""
        rows[-1] += [(prompt[len(text) :], False), (answer, True)]
        text = prompt + answer
    chats: list[Chat] = []
    for pieces in rows:
        encoded = [(tokenizer.encode(piece), answered) for piece, answered in pieces]
        ids = tuple(i for piece, _ in encoded for i in piece)
        chats.append(Chat(ids, tuple(a for piece, a in encoded for _ in piece)))
    return chats


def padded(chats: Sequence[Chat], filler: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids `(rows, seq + 1)`, which tokens are read and which predicted ones are learned.

    The last two are `(rows, seq)` bool.
    """
    longest = max(len(chat.ids) for chat in chats)
    ids = torch.full((len(chats), longest), filler)
    answered = torch.zeros(len(chats), longest, dtype=torch.bool)
    read = torch.zeros(len(chats), longest - 1, dtype=torch.bool)
    for row, chat in enumerate(chats):
        ids[row, : len(chat.ids)] = torch.tensor(chat.ids)
        answered[row, : len(chat.ids)] = torch.tensor(chat.answered)
        read[row, : len(chat.ids) - 1] = True
    return ids, read, answered[:, 1:]


def answer_loss(model: CausalLM, hidden_states: Tensor, part: ChatPart) -> Tensor:
    """Mean cross-entropy of the answers' tokens; `hidden_states` is `(rows, seq, hidden)`."""
    return kernels.linear_cross_entropy(
        hidden_states[part.scored], model.lm_head.weight, part.ids[:, 1:][part.scored]
    )


class FineTuning:
    """`kind = "sft"`."""

    evaluates_first = False

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        remembered: TrainedText | None,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.tokenizer, self.remembered, self.tokens = tokenizer, remembered, 0
        self._config, self.device, self._ranks = config, device, ranks
        self._filler = tokenizer.pad_id or 0
        source, longest = config.data.source, config.data.sequence_length + 1
        if source is None:
            raise UserError("the config names no chats; give --data FOLDER or `source` in [data]")
        apart = (source / "train").is_dir()
        by_domain = read_chats(source / "train" if apart else source, tokenizer, longest)
        self._chats = [chat for chats in by_domain.values() for chat in chats]
        self._held_out: dict[str, list[Chat]] = {}
        if (source / "held_out").is_dir():
            self._held_out = read_chats(source / "held_out", tokenizer, longest)
        self._step = 0

    def updates(self, model: CausalLM, step: int) -> Iterator[Sequence[ChatPart]]:
        training = self._config.training
        chats = self._of_step(self._step)
        self._step += 1
        self.tokens += sum(len(chat.ids) - 1 for chat in chats)
        parts = [
            chats[at : at + training.rows_at_a_time]
            for at in range(0, len(chats), training.rows_at_a_time)
        ]
        learned = sum(sum(chat.answered) for chat in chats)
        yield [self._part(part, sum(sum(c.answered) for c in part) / learned) for part in parts]

    def losses(self, model: CausalLM, part: ChatPart, recorder: BalanceRecorder) -> Losses:
        loss = answer_loss(model, model(part.ids[:, :-1], recorder=recorder), part)
        nothing = torch.zeros_like(loss)
        return Losses(loss, recorder.loss, loss.detach(), nothing.detach())

    def row(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def evaluate(self, model: CausalLM, out: Path, step: int, say: Say) -> dict[str, Any]:
        """Return nats a token of the held-out answers, by domain."""
        model.eval()
        losses: dict[str, float] = {}
        rows = self._config.training.rows_at_a_time
        for domain, chats in self._held_out.items():
            total = tokens = 0.0
            for at in range(0, len(chats), rows):
                if tokens >= self._config.evaluation.tokens:
                    break
                part = self._part(chats[at : at + rows], 1.0)
                own, learned = part.own(self._ranks), int(part.scored.sum())
                mean = float(answer_loss(model, model(own.ids[:, :-1]), own))
                total += mean * own.loss_share * learned
                tokens += learned
            total = self._ranks.sums({"loss": total})["loss"]
            losses[domain] = total / tokens if tokens else math.nan
        model.train()
        return {"held_out_loss": losses}

    def sentence(self, row: dict[str, Any]) -> str:
        return loss_sentence(row)

    def notes(self, steps: int) -> list[str]:
        times = steps * self._config.training.batch_size / len(self._chats)
        return [f"{steps:,} steps read {len(self._chats):,} chats {times:.2g} times"]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "chats": len(self._chats)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["chats"] != len(self._chats):
            raise UserError(
                f"the checkpoint was made with {state['chats']} chats, the data now has "
                f"{len(self._chats)}; resume with the same chats or start a new training"
            )
        self._step = state["step"]

    def keep_reading(self, state: dict[str, Any]) -> None:
        """Chats are few and read in an order of their own."""

    def _part(self, chats: Sequence[Chat], share: float) -> ChatPart:
        ids, read, scored = (t.to(self.device) for t in padded(chats, self._filler))
        return ChatPart(ids=ids, share=share, read=read, scored=scored)

    def _of_step(self, step: int) -> list[Chat]:
        """Return a step's chats: a function of seed and step alone."""
        size = self._config.training.batch_size
        block, at = divmod(step, SORTED_AT_ONCE)
        first = block * SORTED_AT_ONCE * size
        places = [self._place(n) for n in range(first, first + SORTED_AT_ONCE * size)]
        places.sort(key=lambda place: len(self._chats[place].ids))
        order = np.random.default_rng([self._config.training.seed, 1, block])
        turn = int(order.permutation(SORTED_AT_ONCE)[at])
        return [self._chats[place] for place in places[turn * size : (turn + 1) * size]]

    def _place(self, number: int) -> int:
        """Return which chat is read as the so-many-th, each once an epoch."""
        epoch, at = divmod(number, len(self._chats))
        if epoch != self._epoch:
            rng = np.random.default_rng([self._config.training.seed, 0, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self._chats))
        return int(self._order[at])

    _epoch = -1
    _order = np.empty(0, dtype=np.int64)
