"""`moescope chat`: talk with a model."""

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.sampling import (
    Backend,
    Device,
    ExpertMemory,
    FrequencyPenalty,
    MaxTokens,
    MinP,
    ModelName,
    PresencePenalty,
    Quantize,
    RepetitionPenalty,
    Seed,
    Stop,
    StreamExperts,
    Temperature,
    TopK,
    TopP,
    given,
    streaming,
)
from moescope.cli.steering import (
    DisableExpert,
    ForceExpert,
    NumExpertsPerTok,
    RouterNoise,
    RouterRule,
    steer,
)

if TYPE_CHECKING:
    from moescope.engine.sequence import Token
    from moescope.engine.thinking import ThoughtSplitter


def chat(
    message: Annotated[
        str | None, typer.Argument(metavar="[MESSAGE]", help="Said first; asked for if left out.")
    ] = None,
    model: ModelName = "tiny",
    backend: Backend = None,
    quantize: Quantize = None,
    device: Device = None,
    stream_experts: StreamExperts = False,
    expert_memory: ExpertMemory = None,
    system: Annotated[str | None, typer.Option(help="What the model is told beforehand.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    presence_penalty: PresencePenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    num_experts_per_tok: NumExpertsPerTok = None,
    disable_expert: DisableExpert = None,
    force_expert: ForceExpert = None,
    router_rule: RouterRule = None,
    router_noise: RouterNoise = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer to MESSAGE as one JSON object.")
    ] = False,
) -> None:
    """Talk with a model in its own chat form; an empty line or Ctrl-D ends it.

    With a MESSAGE and no terminal on standard input, one answer is given.
    """
    from moescope.api import load
    from moescope.engine.thinking import ThoughtSplitter

    if as_json and message is None:
        raise typer.BadParameter("--json needs a MESSAGE")

    sampling = given(
        max_tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        seed,
        stop,
    )
    opened = steer(
        load(
            model,
            backend=backend,
            quantize=quantize,
            device=device,
            **streaming(stream_experts, expert_memory),
        ),
        num_experts_per_tok,
        disable_expert,
        force_expert,
        router_rule,
        router_noise,
    )
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    said = message if message is not None else _listen()
    while said:
        messages.append({"role": "user", "content": said})
        prompt_ids = opened.engine.encode_chat(messages)
        splitter = ThoughtSplitter(opened.tokenizer, prompt_ids)
        tokens = opened.stream(prompt_ids, **sampling)
        if as_json:
            print(json.dumps(_whole(tokens, splitter), ensure_ascii=False))
            return
        answer = _printed(tokens, splitter)
        messages.append({"role": "assistant", "content": answer})
        if message is not None and not sys.stdin.isatty():
            return
        said = _listen()


def _whole(tokens: "Iterable[Token]", splitter: "ThoughtSplitter") -> dict[str, str | None]:
    """Collect an answer, the thought before it, and why it ended."""
    thought, answer, reason = "", "", "length"
    for token in tokens:
        more_thought, more_answer = splitter.feed(token)
        thought, answer = thought + more_thought, answer + more_answer
        reason = token.finish_reason
    return {"reasoning_content": thought, "answer": answer, "finish_reason": reason}


def _printed(tokens: "Iterable[Token]", splitter: "ThoughtSplitter") -> str:
    """Print an answer as it is made, after what was thought, dim and apart; return it."""
    thought, answer = "", ""
    try:
        for token in tokens:
            more_thought, more_answer = splitter.feed(token)
            thought += more_thought
            if more_thought:
                typer.secho(more_thought, dim=True, nl=False)
            if thought and more_answer and not answer:
                print()
            print(more_answer, end="", flush=True)
            answer += more_answer
    finally:
        print()  # what goes wrong is told on a line of its own
    return answer


def _listen() -> str:
    """Return the next line without blanks around it; "" at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()
        return ""
