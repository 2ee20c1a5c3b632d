"""What the OpenAI API answers with: a request's tokens as JSON, whole or piece by piece."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from moescope.api import Model
from moescope.engine.sequence import Token
from moescope.engine.thinking import ThoughtSplitter

Json = dict[str, Any]


class Form:
    """How the tokens of some texts are told; one is made for each answer."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: Model, name: str, *, tells_logprobs: bool) -> None:
        self._tokenizer = model.tokenizer
        self._tells_logprobs = tells_logprobs
        self._head: Json = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, tokens: Sequence[Token], count: int, usage: Json) -> Json:
        """Tell all of `count` texts at once."""
        made: list[list[Token]] = [[] for _ in range(count)]
        for token in tokens:
            made[token.row].append(token)
        choices = [
            {"index": row, "finish_reason": of[-1].finish_reason} | self.text(of)
            for row, of in enumerate(made)
        ]
        told = {"object": self.whole_object, "choices": choices, "usage": self.usage(usage)}
        return self._head | told

    def usage(self, usage: Json) -> Json:
        """What is told of how many tokens were read and made."""
        return usage

    def chunk(self, choices: list[Json]) -> Json:
        """Tell a piece of a stream."""
        return self._head | {"object": self.chunk_object, "choices": choices}

    def piece(self, token: Token) -> Json | None:
        """Tell one token; None if there is nothing to tell yet."""
        told = self.text([token], streamed=True)
        if token.finish_reason is None and not any(told.values()):
            return None
        return {"index": token.row, "finish_reason": token.finish_reason} | told

    def openings(self, count: int) -> list[Json]:
        """What is told of `count` texts before their first tokens."""
        raise NotImplementedError

    def text(self, tokens: Sequence[Token], *, streamed: bool = False) -> Json:
        """Tell successive tokens of one text."""
        raise NotImplementedError

    def spelled(self, token_id: int) -> str:
        """A token on its own; what is no character is spelled in hexadecimal, as OpenAI does."""
        spelling = self._tokenizer.made_bytes(token_id)
        try:
            return spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


class CompletionForm(Form):
    """The continuations of prompts."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, model: Model, name: str, *, tells_logprobs: bool) -> None:
        super().__init__(model, name, tells_logprobs=tells_logprobs)
        self._offsets: dict[int, int] = {}  # of texts so far, in characters

    def openings(self, count: int) -> list[Json]:
        """Nothing."""
        return []

    def text(self, tokens: Sequence[Token], *, streamed: bool = False) -> Json:
        """The text, and what is known of each token."""
        text = "".join(token.text for token in tokens)
        return {"text": text, "logprobs": self._logprobs(tokens) if self._tells_logprobs else None}

    def _logprobs(self, tokens: Sequence[Token]) -> Json:
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offsets.get(token.row, 0))
            self._offsets[token.row] = offsets[-1] + len(token.text)
        return {
            "tokens": [self.spelled(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self.spelled(token_id): logprob for token_id, logprob in token.top_logprobs}
                for token in tokens
            ],
            "text_offset": offsets,
        }


class ChatForm(Form):
    """The answers to a conversation, their thoughts apart."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, model: Model, name: str, prompt_ids: list[int], count: int, *, tells_logprobs: bool
    ) -> None:
        super().__init__(model, name, tells_logprobs=tells_logprobs)
        self._splitters = [ThoughtSplitter(model.tokenizer, prompt_ids) for _ in range(count)]

    def usage(self, usage: Json) -> Json:
        """Tell, besides, how many tokens were thought."""
        thought = sum(splitter.thought_tokens for splitter in self._splitters)
        return usage | {"completion_tokens_details": {"reasoning_tokens": thought}}

    def openings(self, count: int) -> list[Json]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": row, "finish_reason": None, "logprobs": None, "delta": delta}
            for row in range(count)
        ]

    def text(self, tokens: Sequence[Token], *, streamed: bool = False) -> Json:
        """The message or a piece of it, thought apart, and what is known of each token."""
        parts = [self._splitters[token.row].feed(token) for token in tokens]
        thought, content = ("".join(part) for part in zip(*parts, strict=True))
        logprobs = {"content": [self._known(t) for t in tokens]} if self._tells_logprobs else None
        told = {"reasoning_content": thought} if thought else {}
        if streamed:
            told |= {"content": content} if content else {}
            return {"delta": told, "logprobs": logprobs}
        message = {"role": "assistant", "content": content} | told
        return {"message": message, "logprobs": logprobs}

    def _known(self, token: Token) -> Json:
        likeliest = [self._one(token_id, logprob) for token_id, logprob in token.top_logprobs]
        return self._one(token.id, token.logprob) | {"top_logprobs": likeliest}

    def _one(self, token_id: int, logprob: float) -> Json:
        return {
            "token": self.spelled(token_id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.made_bytes(token_id)),
        }
