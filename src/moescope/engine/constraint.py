"""Texts that can only be what a schema, an expression or a grammar allows.

llguidance (https://github.com/guidance-ai/llguidance) tells which tokens may come next; the rest is
ruled out before a token is chosen.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from moescope.errors import UserError
from moescope.text.answers.grammar import BLANKS
from moescope.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["json", "regex", "choice", "grammar", "lark"]
"""`grammar` is GBNF or Lark, `lark` llguidance's Lark alone."""
LONGEST = 200_000
"""Characters of a rule: to compile one takes time in proportion, which nobody can break off."""


class Constraint:
    """What a text must be; compiled once, used by any number of texts.

    Args:
        tokenizer: the model's.
        vocab_size: logits that the model gives.
        end_ids: tokens that end a text; they are allowed where the text is complete.
        kind: of `rule`.
        rule: a JSON schema (True for any object), an expression, several texts, or a grammar.
        after: what must have been written before the rule holds, as the end of a thought; "" for
            nothing.
        instead: tokens of `end_ids` that may end the text before the rule holds, as the end of a
            call does.

    Raises:
        UserError: the rule is none, is not supported, or takes too much to be held to.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_ids: Iterable[int],
        kind: Kind,
        rule: Any,
        after: str = "",
        instead: Iterable[int] = (),
    ) -> None:
        from llguidance import LLMatcher

        self.tokenizer, self.vocab_size, self.after = tokenizer, vocab_size, after.encode()
        self.too_soon = frozenset(end_ids).difference(instead)
        try:
            if len(rule if isinstance(rule, str) else json.dumps(rule)) > LONGEST:
                raise ValueError(f"it has more than {LONGEST:,} characters")
            grammar = _grammar(kind, rule)
        except (ValueError, TypeError, RecursionError, LookupError) as error:
            raise _refused(kind, str(error)) from error
        table = _table(tokenizer, vocab_size, tuple(sorted(set(end_ids))))
        failed, told = LLMatcher.validate_grammar_with_warnings(grammar, table)
        if failed or told:
            raise _refused(kind, told[0])
        self._matcher = LLMatcher(table, grammar, log_level=0)
        if self._matcher.is_error():
            raise _refused(kind, self._matcher.get_error())

    def start(self) -> "State":
        """Begin a text."""
        return State(self, self._matcher.deep_copy())


class State:
    """How far a text is in its constraint.

    Attributes:
        ended: whether nothing can follow.
    """

    def __init__(self, constraint: Constraint, matcher: "LLMatcher") -> None:
        self._constraint, self._matcher = constraint, matcher
        self._awaits = constraint.after
        self._written = b""
        self.ended = False

    @property
    def too_soon(self) -> frozenset[int]:
        """Tokens that would end the text before the rule holds: nothing would have been held."""
        return self._constraint.too_soon if self._awaits else frozenset()

    def mask(self) -> Tensor | None:
        """Which tokens may come next, `(vocab,)` booleans; None where all may.

        Raises:
            UserError: the rule takes too much.
        """
        if self._awaits:
            return None
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise _refused("", self._matcher.get_error())
        bits = np.unpackbits(packed, bitorder="little")[: self._constraint.vocab_size]
        return torch.from_numpy(bits.astype(bool))

    def accept(self, token_id: int) -> None:
        """Take the token that came.

        Raises:
            UserError: it may not come here.
        """
        if self._awaits:
            written = self._written + self._constraint.tokenizer.made_bytes(token_id)
            self._written = written[-len(self._awaits) :]
            if self._awaits in written:
                self._awaits = b""
            return
        if not self._matcher.consume_token(token_id):
            raise _refused("", self._matcher.get_error())
        self.ended = self._matcher.is_stopped()


def _grammar(kind: Kind, rule: Any) -> str:
    from llguidance import LLMatcher, grammar_from

    if kind == "json":
        schema = {"type": "object"} if rule is True else rule
        if isinstance(schema, str):
            schema = json.loads(schema)
        if not isinstance(schema, Mapping):
            raise ValueError("a JSON schema is an object")
        return LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_pattern": BLANKS}
        )
    if kind == "choice":
        choices: Sequence[Any] = rule
        if not choices or not all(isinstance(text, str) and text for text in choices):
            raise ValueError("a choice is among texts that are not empty")
        return grammar_from("choice", json.dumps(list(choices)))
    if not isinstance(rule, str) or not rule.strip():
        raise ValueError(f"it is {type(rule).__name__}, no text")
    return grammar_from(kind, rule)


@lru_cache(maxsize=4)
def _table(tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...]) -> "LLTokenizer":
    """All tokens by their bytes, as llguidance looks them up."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Words:
        """What TokenizerWrapper asks of a tokenizer."""

        eos_token_id = end_ids[0] if end_ids else 0
        bos_token_id = tokenizer.bos_id
        tokens = [tokenizer.made_bytes(token_id) for token_id in range(vocab_size)]  # noqa: RUF012
        special_token_ids = sorted(tokenizer.special_ids)

        def __call__(self, text: bytes) -> list[int]:
            return tokenizer.encode(text.decode())

    return LLTokenizer(TokenizerWrapper(Words()), eos_token=list(end_ids) or None)


def _refused(kind: str, why: str) -> UserError:
    named = {"json": "the JSON schema", "regex": "the expression", "choice": "the choice"}
    reason = " ".join(why.split())[:200]
    return UserError(f"{named.get(kind, 'the grammar')} cannot be held to ({reason}); change it")
