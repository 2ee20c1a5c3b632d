"""A tokenizer as the vocabulary that a GGUF file holds.

llama.cpp cuts text by rules that a file names. Which ones are a tokenizer's is found as its own
converter finds it: by a text with all that rules differ in, which must be cut into the same tokens.
"""

import json
from collections.abc import Mapping, Sequence

from gguf import TokenType
from tokenizers import Tokenizer as BackendTokenizer, decoders, models

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.formats.gguf.pre_tokenizers import PRE_TOKENIZERS
from moescope.formats.gguf.vocabulary import cutting
from moescope.formats.gguf.writer import Vocabulary
from moescope.text.generation import GenerationDefaults
from moescope.text.tokenizer import Tokenizer

PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (one) 😶‍🌫️ (several) ✅ "
    "🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple"
    "工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've "
    "been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve "
    "a'lL HTTPServer iPhone XMLHttpRequest naïve e\u0301 ひらがなカタカナ 한국어 العربية ١٢٣ ²³ ½ "
    "x=1;y+=2\r\n\tfoo(bar)\r\n\r\n#include <a.h>\n//…—«»„“ $100 50% a_b-c/d\\e |f| ~g^h"
)
"""Letters, marks, digits, scripts, contractions, signs and spaces that rules treat differently."""


def vocabulary_of(
    tokenizer: Tokenizer, config: ModelConfig, defaults: GenerationDefaults
) -> Vocabulary:
    """Return what a GGUF file says of a tokenizer.

    Args:
        tokenizer: byte-level.
        config: of the model, whose unused ids are filled up.
        defaults: which tokens end a text; the first beside the tokenizer's own ends a turn.

    Raises:
        UserError: the tokenizer is of another kind, or cuts text by rules that llama.cpp lacks.
    """
    state = json.loads(tokenizer.to_json())
    if not tokenizer.is_byte_level or state["model"]["type"] != "BPE":
        raise UserError(
            "GGUF is written for byte-level vocabularies (GPT-2's kind), which this model's is "
            "not; quantize it into a folder (--to int8) instead"
        )
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    spelled: dict[int, str] = {number: token for token, number in state["model"]["vocab"].items()}
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]
    ]
    pre = _rules(tokenizer, state["model"]["vocab"], merges)
    tokens: list[str] = []
    types: list[int] = []
    for number in range(max(config.vocab_size, tokenizer.vocab_size)):
        if number in added:
            tokens.append(added[number]["content"])
            special = added[number]["special"]
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        elif number in spelled:
            tokens.append(spelled[number])
            types.append(TokenType.NORMAL)
        else:
            tokens.append(f"[unused{number}]")
            types.append(TokenType.UNUSED)
    ends = sorted(defaults.end_ids - {tokenizer.eos_id})
    return Vocabulary(
        tokens=tokens,
        merges=merges,
        types=types,
        pre=pre,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        eot_token_id=ends[0] if ends else None,
        add_bos_token=bool(tokenizer.begin_ids),
        add_eos_token=bool(tokenizer.end_ids),
        chat_templates=tokenizer.chat_templates,
    )


def _rules(tokenizer: Tokenizer, vocab: Mapping[str, int], merges: Sequence[str]) -> str:
    """Return the name of the rules by which text is cut as the tokenizer cuts it."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    wanted = tokenizer.encode(PROBE)
    for name, rules in PRE_TOKENIZERS.items():
        backend = BackendTokenizer(
            models.BPE(vocab=dict(vocab), merges=pairs, ignore_merges=rules.takes_whole_words)
        )
        backend.pre_tokenizer = cutting(rules)
        backend.decoder = decoders.ByteLevel()
        if backend.encode(PROBE, add_special_tokens=False).ids == wanted:
            return name
    raise UserError(
        "the tokenizer cuts text by rules that llama.cpp's GGUF has no name for; quantize into a "
        "folder (--to int8) instead"
    )
