"""`moescope generate`: continue a text."""

import json
from typing import Annotated

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


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    model: ModelName = "tiny",
    backend: Backend = None,
    quantize: Quantize = None,
    device: Device = None,
    stream_experts: StreamExperts = False,
    expert_memory: ExpertMemory = None,
    max_tokens: MaxTokens = 64,
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
        bool, typer.Option("--json", help="Print the continuation as one JSON object.")
    ] = False,
) -> None:
    """Continue a text, token by token, and print what comes."""
    from moescope.api import load

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
    if as_json:
        generation = opened.generate(prompt, **sampling)
        described = {
            "text": generation.text,
            "ids": [token.id for token in generation.tokens],
            "logprobs": [token.logprob for token in generation.tokens],
            "prompt_tokens": generation.prompt_tokens,
            "finish_reason": generation.finish_reason,
        }
        print(json.dumps(described, ensure_ascii=False))
        return
    tokens = opened.stream(prompt, **sampling)
    print(prompt, end="", flush=True)
    try:
        for token in tokens:
            print(token.text, end="", flush=True)
    finally:
        print()  # what goes wrong is told on a line of its own
