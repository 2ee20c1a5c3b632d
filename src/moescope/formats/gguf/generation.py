"""What a GGUF file says of the texts that its model makes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moescope.formats.gguf.metadata import Fields
from moescope.formats.gguf.vocabulary import CONTROL, USER_DEFINED
from moescope.text.generation import GenerationDefaults

END_KEYS = ("eos", "eot", "eom")
END_TOKENS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "</s>",
        "<eos>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "[e~[",
        "<｜end▁of▁sentence｜>",
    }
)
"""Special tokens that end a text or a turn by their spelling, as llama.cpp takes them to do."""
WITHIN_AN_ANSWER = {"<|end|>": ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})}
"""What ends nothing but a part of an answer where tokens are found that end all of it."""
SAMPLING_KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def generation_defaults(path: Path, metadata: Mapping[str, Any]) -> GenerationDefaults:
    """Return when texts end, and how they are drawn, as metadata tell.

    Files seldom name all tokens that end a text: those count, too, that are spelled so.

    Raises:
        UserError: a value has no meaning.
    """
    fields = Fields(path, metadata)
    named = [fields.find(f"tokenizer.ggml.{key}_token_id", int) for key in END_KEYS]
    tokens = fields.find_items("tokenizer.ggml.tokens", str)
    types = fields.find_items("tokenizer.ggml.token_type", int)
    spelled = {
        token: token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (CONTROL, USER_DEFINED) and token in END_TOKENS
    }
    for token, alternatives in WITHIN_AN_ANSWER.items():
        if any(spelled.keys() >= enders for enders in alternatives):
            spelled.pop(token, None)
    sampling = {
        name: metadata.get(f"general.sampling.{key}") for name, key in SAMPLING_KEYS.items()
    }
    ends = sorted({*(i for i in named if i is not None), *spelled.values()})
    return GenerationDefaults.of(path, ends, sampling)
