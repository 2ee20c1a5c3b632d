"""A chain of thought, told from the answer that it leads to."""

from collections.abc import Sequence
from typing import Literal

from moescope.engine.sequence import Token
from moescope.text.answers.pieces import held_back
from moescope.text.tokenizer import Tokenizer

BEGIN, END = "<think>", "</think>"


class ThoughtSplitter:
    """Split a text, as its tokens come, into what stands between BEGIN and END and the rest.

    A thought comes first or not at all; some chat forms have begun it already. The BEGIN and END
    around it are part of neither.

    Attributes:
        thought_tokens: tokens that the thought took so far, BEGIN and END included.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        last = tokenizer.decode(prompt_ids[-len(BEGIN) - 1 :], skip_special_tokens=False)
        self._part: Literal["begin", "thought", "answer"] = "begin"
        if last.rstrip().endswith(BEGIN):
            self._part = "thought"
        tags = {tokenizer.token_id(tag): tag for tag in (BEGIN, END)}
        self._untold = {i: tag for i, tag in tags.items() if i in tokenizer.special_ids}
        self._held, self._held_tokens = "", 0
        self.thought_tokens = 0

    def feed(self, token: Token) -> tuple[str, str]:
        """Take the next token; return what became certain of the thought and of the answer."""
        text = self._held + token.text
        awaited = {"begin": BEGIN, "thought": END}.get(self._part)
        if awaited is not None and self._untold.get(token.id) == awaited:
            text += awaited
        self._held = ""
        final = token.finish_reason is not None
        if self._part == "begin":
            begun = text.lstrip()
            if begun.startswith(BEGIN):
                self._part, text = "thought", begun.removeprefix(BEGIN)
                self.thought_tokens = self._held_tokens
            elif not final and BEGIN.startswith(begun):
                self._held, self._held_tokens = text, self._held_tokens + 1
                return "", ""
            else:
                self._part = "answer"
        if self._part == "answer":
            return "", text
        self.thought_tokens += 1
        thought, end, answer = text.partition(END)
        if end:
            self._part = "answer"
        elif not final:
            kept = held_back(thought, [END])
            thought, self._held = thought[: len(thought) - kept], thought[len(thought) - kept :]
        return thought, answer
