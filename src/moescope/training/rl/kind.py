"""Reinforcement: the model answers, a program rewards, and better answers become likelier."""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from moescope.checkpoint import load_model
from moescope.files import write_text
from moescope.model.decoder import CausalLM
from moescope.model.recorder import Recorder
from moescope.model.routing import Routing
from moescope.text.split import TrainedText
from moescope.text.tokenizer import Tokenizer
from moescope.training.config import TrainConfig
from moescope.training.kind import Say
from moescope.training.metrics import rows_up_to
from moescope.training.objective import BalanceRecorder, Losses
from moescope.training.parallel.ranks import Ranks
from moescope.training.part import Part
from moescope.training.rl.objective import divergence, group_advantages, policy_loss
from moescope.training.rl.replay import Disagreement, joined, replaying
from moescope.training.rl.sampler import Answer, draw_answers, sampling_network
from moescope.training.rl.tasks import Problem, Tasks
from moescope.training.sft import Chat, padded
from moescope.training.start import locate_start

EVALUATION_SEED = 2**31
"""Problems of an evaluation are drawn from seeds that no step reaches."""
LARGEST = "largest_probability_difference"
COUNTED = (
    *("answers", "tokens", "entropy", "clipped", "probability_difference", LARGEST),
    *("sampler_kl", "differing", "slots", "kl"),
)
"""What is summed over the answers of a step; of `LARGEST` it is the largest."""
SHOWN = 40
"""Answers of an evaluation that are kept word for word."""


@dataclass(frozen=True, kw_only=True)
class AnswerPart(Part):
    """Answers that are learned together.

    Attributes:
        made: `(rows, seq)` bool, which predicted tokens belong to the answer.
        old_logprobs: `(rows, seq)` under the network that drew them.
        advantages: `(rows,)`.
        choices: layer -> `(rows * seq, slots)`, the experts that the sampler chose.
    """

    made: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    choices: dict[int, Tensor]

    def cut(self, rows: slice) -> Self:
        length = len(self.ids)
        choices = {
            layer: chosen.unflatten(0, (length, -1))[rows].flatten(0, 1)
            for layer, chosen in self.choices.items()
        }
        return replace(super().cut(rows), choices=choices)

    def loss_share_of(self, rows: slice) -> float:
        return 1.0  # it is a sum over answers

    def filler(self) -> Self:
        first = super().filler()
        return replace(first, made=torch.zeros_like(first.made))


class Reinforcement:
    """`kind = "rl"`: GRPO (DeepSeekMath, section 4), with our own engine as the sampler."""

    evaluates_first = True

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        remembered: TrainedText | None,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.tokenizer, self.remembered, self.tokens = tokenizer, remembered, 0
        self.device, self._config, self._ranks = device, config, ranks
        self._tasks = Tasks(config.rl.tasks)
        self._reference: CausalLM | None = None
        if config.rl.kl:
            start = locate_start(config.required_start())
            self._reference = load_model(start, dtype=torch.float32, device=device)
        self._row: dict[str, Any] = {}
        self._sums: dict[str, float] = defaultdict(float)

    # --- answers ----------------------------------------------------------------------------------

    def updates(self, model: CausalLM, step: int) -> Iterator[Sequence[AnswerPart]]:
        """Draw answers, reward them, and yield those that differ in worth within their group."""
        training, rl = self._config.training, self._config.rl
        groups = training.batch_size // rl.group_size
        problems = [self._problem(training.seed, step, at) for at in range(groups)]
        asked = [problem for problem in problems for _ in range(rl.group_size)]
        answers = self._draw(model, asked, first_seed=self._first_seed(step))
        rewards = torch.tensor(
            [problem.reward(a.text) for problem, a in zip(asked, answers, strict=True)],
            dtype=torch.float32,
        )
        by_group = rewards.unflatten(0, (groups, -1))  # (groups, group_size)
        advantages = group_advantages(by_group, rl.normalisation).flatten()
        self._row = {
            "reward": float(rewards.mean()),
            "right": float((rewards >= 1).float().mean()),
            "groups_that_teach": float((by_group.amax(-1) > by_group.amin(-1)).float().mean()),
            "answer_tokens": sum(len(a.ids) for a in answers) / len(answers),
            "ended": sum(a.ended for a in answers) / len(answers),
        }
        self.tokens += sum(len(a.prompt) + len(a.ids) - 1 for a in answers)
        self._sums = defaultdict(float)
        taught = [at for at in range(len(answers)) if advantages[at] != 0]
        taught.sort(key=lambda at: len(answers[at].prompt) + len(answers[at].ids))
        rows = training.rows_at_a_time
        parts = [
            self._part(
                [answers[i] for i in taught[at : at + rows]], advantages[taught[at : at + rows]]
            )
            for at in range(0, len(taught), rows)
        ]
        for _ in range(rl.epochs if parts else 0):
            yield parts

    def _problem(self, seed: int, step: int, at: int) -> Problem:
        return self._tasks.draw(random.Random(f"{seed} {step} {at}"))

    def _first_seed(self, step: int) -> int:
        training = self._config.training
        return (training.seed * 1_000_003 + step) * training.batch_size

    def _draw(
        self,
        model: CausalLM,
        problems: Sequence[Problem],
        *,
        first_seed: int,
        temperature: float = 1.0,
    ) -> list[Answer]:
        """Answer each problem once; each rank answers its share of them."""
        rl, own = self._config.rl, self._ranks.own(len(problems))
        network = sampling_network(model, rl.sampler, self._config.training.torch_dtype)
        prompts = [self._prompt(problem) for problem in problems]
        seeds = [first_seed + at for at in range(len(prompts))]
        answers = draw_answers(
            network,
            self.tokenizer,
            prompts[own],
            seeds[own],
            max_tokens=rl.max_tokens,
            temperature=temperature,
        )
        return self._ranks.gather_objects(answers)

    def _prompt(self, problem: Problem) -> list[int]:
        messages = [{"role": "user", "content": problem.question}]
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages))

    def _part(self, answers: Sequence[Answer], advantages: Tensor) -> AnswerPart:
        chats = [
            Chat((*a.prompt, *a.ids), (*[False] * len(a.prompt), *[True] * len(a.ids)))
            for a in answers
        ]
        ids, read, made = padded(chats, self.tokenizer.pad_id or 0)
        old = torch.zeros(made.shape)
        old[made] = torch.tensor([p for a in answers for p in a.logprobs])
        choices = joined([a.choices for a in answers], made.shape[1])
        to = self.device
        return AnswerPart(
            ids=ids.to(to),
            share=1 / self._config.training.batch_size,
            read=read.to(to),
            made=made.to(to),
            old_logprobs=old.to(to),
            advantages=advantages.to(to),
            choices={layer: chosen.to(to) for layer, chosen in choices.items()},
        )

    # --- what is minimised ------------------------------------------------------------------------

    def losses(self, model: CausalLM, part: AnswerPart, recorder: BalanceRecorder) -> Losses:
        rl = self._config.rl
        assert part.read is not None
        disagreement = Disagreement(model, part.choices, part.read)
        replay = rl.replay and part.choices
        with replaying(model, part.choices) if replay else nullcontext():
            both = Both(recorder, disagreement)
            hidden_states = model(part.ids[:, :-1], recorder=both)  # (rows, seq, hidden)
        logprobs, entropy = token_logprobs(model, hidden_states, part)
        loss, held_back = policy_loss(
            logprobs,
            part.old_logprobs,
            part.advantages,
            part.made,
            normalisation=rl.normalisation,
            clip_low=rl.clip_low,
            clip_high=rl.clip_high,
            max_tokens=rl.max_tokens,
        )
        total = loss
        if self._reference is not None:
            with torch.no_grad():
                states = self._reference(part.ids[:, :-1])
                reference, _ = token_logprobs(self._reference, states, part)
            kl = divergence(logprobs, reference, part.made)
            total = total + rl.kl * kl
            self._sums["kl"] += float(kl.detach())
        self._count(part, logprobs.detach(), entropy, held_back, disagreement)
        nothing = torch.zeros_like(loss.detach())
        return Losses(total, recorder.loss, loss.detach(), nothing)

    def _count(
        self,
        part: AnswerPart,
        logprobs: Tensor,
        entropy: Tensor,
        held_back: Tensor,
        disagreement: Disagreement,
    ) -> None:
        made = part.made
        if not part.row_share:
            return
        apart = (logprobs.exp() - part.old_logprobs.exp()).abs()[made]
        sums = self._sums
        sums["answers"] += len(part.ids)
        sums["tokens"] += int(made.sum())
        sums["entropy"] += float(entropy.sum())
        sums["clipped"] += float(held_back) * int(made.sum())
        sums["probability_difference"] += float(apart.sum())
        sums[LARGEST] = max(sums[LARGEST], float(apart.max()))
        sums["sampler_kl"] += float((part.old_logprobs - logprobs)[made].sum())
        sums["differing"] += disagreement.differing
        sums["slots"] += disagreement.slots

    def row(self) -> dict[str, Any]:
        """Return rewards, and how far trainer and sampler were apart, over the last step."""
        sums, row = self._counted_by_all(), self._row
        if tokens := sums["tokens"]:
            for name in ("entropy", "clipped", "probability_difference", "sampler_kl"):
                row[name] = sums[name] / tokens
            row[LARGEST] = sums[LARGEST]
        if sums["slots"]:
            row["differing_choices"] = int(sums["differing"])
            row["differing_share"] = sums["differing"] / sums["slots"]
        if self._reference is not None and sums["answers"]:
            row["kl"] = sums["kl"] / sums["answers"]
        return row

    def _counted_by_all(self) -> dict[str, float]:
        own = {name: self._sums[name] for name in COUNTED}
        if self._ranks.size == 1:
            return own
        largest = -self._ranks.lowest(torch.tensor(-own[LARGEST], dtype=torch.float64))
        return {**self._ranks.sums(own), LARGEST: float(largest)}

    # --- how well it does -------------------------------------------------------------------------

    def evaluate(self, model: CausalLM, out: Path, step: int, say: Say) -> dict[str, Any]:
        """Ask problems that no step asks, always the same; keep some answers in `answers.jsonl`."""
        asked = [
            self._problem(EVALUATION_SEED, 0, number) for number in range(self._config.rl.asked)
        ]
        answers = self._draw(model, asked, first_seed=0, temperature=0.0)
        rewards = [p.reward(a.text) for p, a in zip(asked, answers, strict=True)]
        right: dict[str, list[bool]] = {}
        for problem, reward in zip(asked, rewards, strict=True):
            right.setdefault(f"{problem.task} {problem.level}", []).append(reward >= 1)
        shown = [
            self._shown(*one) for one in list(zip(asked, answers, rewards, strict=True))[:SHOWN]
        ]
        if self._ranks.is_first:
            series = out / "answers.jsonl"
            line = json.dumps({"step": step, "answers": shown}, ensure_ascii=False) + "\n"
            write_text(series, "".join([*rows_up_to(series, step - 1), line]))
        return {
            "accuracy": sum(reward >= 1 for reward in rewards) / len(asked),
            "accuracy_by_level": {level: sum(r) / len(r) for level, r in sorted(right.items())},
            "evaluated_tokens": sum(len(a.ids) for a in answers) / len(answers),
        }

    def _shown(self, problem: Problem, answer: Answer, reward: float) -> dict[str, Any]:
        """Return an answer as it is kept, with how often it went to each expert of each layer."""
        experts = self._config.model.n_routed_experts or 0
        return {
            "task": problem.task,
            "level": problem.level,
            "question": problem.question,
            "answer": answer.text,
            "reward": reward,
            "tokens": len(answer.ids),
            "experts": {
                str(layer): chosen[chosen >= 0].bincount(minlength=experts).tolist()
                for layer, chosen in answer.choices.items()
            },
        }

    def sentence(self, row: dict[str, Any]) -> str:
        return (
            f"{row['accuracy']:.0%} of {self._config.rl.asked} problems right at once, "
            f"{row['evaluated_tokens']:.0f} tokens an answer"
        )

    def notes(self, steps: int) -> list[str]:
        rl, size = self._config.rl, self._config.training.batch_size
        groups = size // rl.group_size
        return [f"each step asks {groups} problems {rl.group_size} times ({rl.normalisation})"]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A step's problems and draws follow from seed, step and weights."""

    def keep_reading(self, state: dict[str, Any]) -> None:
        """There is no text."""


class Both(Recorder):
    """Shows a pass to the balance's recorder and to the one that counts disagreement."""

    def __init__(self, balance: BalanceRecorder, disagreement: Disagreement) -> None:
        self._recorders = (balance, disagreement)

    def routing(self, layer_idx: int, routing: Routing) -> None:
        for recorder in self._recorders:
            recorder.routing(layer_idx, routing)


def token_logprobs(
    model: CausalLM, hidden_states: Tensor, part: AnswerPart
) -> tuple[Tensor, Tensor]:
    """Return the tokens' natural log-probabilities, zero outside answers, and their entropies.

    `(rows, seq)` float32 with gradients, and `(tokens of answers,)` without.
    """
    logits = model.logits(hidden_states[part.made])  # (tokens, vocab) float32
    distribution = logits.log_softmax(dim=-1)
    chosen = distribution.gather(1, part.ids[:, 1:][part.made][:, None])[:, 0]
    with torch.no_grad():
        entropy = -(distribution.exp() * distribution).sum(dim=-1)
    logprobs = torch.zeros(part.made.shape, device=logits.device).masked_scatter(part.made, chosen)
    return logprobs, entropy
