"""`moescope chat`: talk with a model."""

import json
import sys
from typing import Annotated, Any

import typer

from moescope.cli.sampling import (
    Backend,
    MaxTokens,
    MinP,
    ModelName,
    Quantize,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    given,
)
from moescope.cli.steering import (
    DisableExpert,
    ForceExpert,
    NumExpertsPerTok,
    RouterNoise,
    RouterRule,
    steer,
)


def chat(
    message: Annotated[
        str | None, typer.Argument(metavar="[MESSAGE]", help="Said first; asked for if left out.")
    ] = None,
    model: ModelName = "tiny",
    backend: Backend = None,
    quantize: Quantize = None,
    system: Annotated[str | None, typer.Option(help="What the model is told beforehand.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
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

    if as_json and message is None:
        raise typer.BadParameter("--json needs a MESSAGE")

    sampling = given(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop)
    opened = steer(
        load(model, backend=backend, quantize=quantize),
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
        prompt = opened.tokenizer.apply_chat_template(messages)
        if as_json:
            generation = opened.generate(prompt, **sampling)
            reason = generation.finish_reason
            print(
                json.dumps({"answer": generation.text, "finish_reason": reason}, ensure_ascii=False)
            )
            return
        answer = ""
        for token in opened.stream(prompt, **sampling):
            print(token.text, end="", flush=True)
            answer += token.text
        print()
        messages.append({"role": "assistant", "content": answer})
        if message is not None and not sys.stdin.isatty():
            return
        said = _listen()


def _listen() -> str:
    """Return the next line without blanks around it; "" at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
