"""What the OpenAI API answers with: a request's tokens as JSON, whole or piece by piece."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from moescope.engine.sequence import Token
from moescope.server.chats import Step
from moescope.text.answers.pieces import Arguments, Call, Content, Thought
from moescope.text.tokenizer import Tokenizer

Json = dict[str, Any]


def spelled(tokenizer: Tokenizer, token_id: int) -> str:
    """A token on its own; what is no character is spelled in hexadecimal, as OpenAI does."""
    spelling = tokenizer.made_bytes(token_id)
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def head(prefix: str, kind: str, name: str) -> Json:
    """What every answer begins with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": name,
    }


class CompletionForm:
    """The continuations of prompts.

    Args:
        tokenizer: the model's.
        name: the model's.
        echoes: what is told of each text before its continuation; none if nothing is.
        tells_logprobs: whether what is known of each token is told.
    """

    def __init__(
        self, tokenizer: Tokenizer, name: str, echoes: Sequence[Json], *, tells_logprobs: bool
    ) -> None:
        self._tokenizer, self._tells_logprobs = tokenizer, tells_logprobs
        self._head = head("cmpl", "text_completion", name)
        self._echoes = echoes
        self._offsets = {row: len(echo["text"]) for row, echo in enumerate(echoes)}

    def whole(self, tokens: Sequence[Token], count: int, usage: Json) -> Json:
        """Tell all of `count` texts at once."""
        made: list[list[Token]] = [[] for _ in range(count)]
        for token in tokens:
            made[token.row].append(token)
        choices = [self._choice(row, of) for row, of in enumerate(made)]
        for choice, echo in zip(choices, self._echoes, strict=False):
            choice["text"] = echo["text"] + choice["text"]
            if self._tells_logprobs and echo["logprobs"]:
                known = choice["logprobs"] or {name: [] for name in echo["logprobs"]}
                choice["logprobs"] = {
                    name: [*before, *known[name]] for name, before in echo["logprobs"].items()
                }
        return self._head | {"choices": choices, "usage": usage}

    def openings(self, count: int) -> list[Json]:
        """What is told of `count` texts before their first tokens."""
        return [
            self.chunk([{"index": row, "finish_reason": None} | echo])
            for row, echo in enumerate(self._echoes[:count])
        ]

    def chunk(self, choices: list[Json]) -> Json:
        """Tell a piece of a stream."""
        return self._head | {"choices": choices}

    def piece(self, token: Token) -> Json | None:
        """Tell one token; None if there is nothing to tell yet."""
        choice = self._choice(token.row, [token])
        if token.finish_reason is None and not (choice["text"] or choice["logprobs"]):
            return None
        return self.chunk([choice])

    def _choice(self, row: int, tokens: Sequence[Token]) -> Json:
        return {
            "index": row,
            "finish_reason": tokens[-1].finish_reason if tokens else "length",
            "text": "".join(token.text for token in tokens),
            "logprobs": self._logprobs(row, tokens) if self._tells_logprobs else None,
        }

    def _logprobs(self, row: int, tokens: Sequence[Token]) -> Json | None:
        """What is known of tokens; an end token is part of no text."""
        offset, known = self._offsets.get(row, 0), dict[str, list[Any]]()
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            known[name] = []
        for token in tokens:
            if token.finish_reason == "stop" and not token.text:
                continue
            known["tokens"].append(spelled(self._tokenizer, token.id))
            known["token_logprobs"].append(token.logprob)
            known["top_logprobs"].append(
                {spelled(self._tokenizer, i): logprob for i, logprob in token.top_logprobs}
            )
            known["text_offset"].append(offset)
            offset += len(token.text)
        self._offsets[row] = offset
        return known


class ChatForm:
    """The answers to a conversation: thoughts, content and calls apart.

    Args:
        tokenizer: the model's.
        name: the model's.
        count: of answers.
        tells_logprobs: whether what is known of each token is told.
    """

    def __init__(
        self, tokenizer: Tokenizer, name: str, count: int, *, tells_logprobs: bool
    ) -> None:
        self._tokenizer, self._name, self._tells_logprobs = tokenizer, name, tells_logprobs
        self._head = head("chatcmpl", "chat.completion.chunk", name)
        self._calls: list[list[Json]] = [[] for _ in range(count)]

    def whole(self, steps: Sequence[Step], usage: Json) -> Json:
        """Tell all answers at once."""
        choices: list[Json] = []
        for row in range(len(self._calls)):
            own = [step for step in steps if step.token.row == row]
            pieces = [piece for step in own for piece in step.pieces]
            content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
            thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
            calls = calls_of(own)
            message: Json = {"role": "assistant", "content": content or (None if calls else "")}
            if thought:
                message |= {"reasoning_content": thought, "reasoning": thought}
            if calls:
                message["tool_calls"] = calls
            known = [self._known(step.token) for step in own if not step.is_end]
            choices.append(
                {
                    "index": row,
                    "finish_reason": own[-1].finish_reason if own else "length",
                    "message": message,
                    "logprobs": {"content": known} if self._tells_logprobs else None,
                }
            )
        told = self._head | {"object": "chat.completion"}
        return told | {"choices": choices, "usage": usage}

    def openings(self) -> list[Json]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(row, delta, None, None) for row in range(len(self._calls))]

    def chunks(self, step: Step) -> list[Json]:
        """Tell one token; nothing if there is nothing to tell yet."""
        row = step.token.row
        deltas = [self._delta(row, piece) for piece in step.pieces]
        known = None
        if self._tells_logprobs:
            known = {"content": [] if step.is_end else [self._known(step.token)]}
            deltas = deltas or [{}]
        told = [
            self._chunk(row, delta, None, known if at == 0 else None)
            for at, delta in enumerate(deltas)
        ]
        if step.finish_reason is not None:
            told.append(self._chunk(row, {}, step.finish_reason, None))
        return told

    def usage(self, usage: Json) -> Json:
        """The last event of a stream that counts."""
        return self._head | {"choices": [], "usage": usage}

    def _delta(self, row: int, piece: Any) -> Json:
        if isinstance(piece, Thought):
            return {"reasoning_content": piece.text, "reasoning": piece.text}
        if isinstance(piece, Content):
            return {"content": piece.text}
        calls = self._calls[row]
        if isinstance(piece, Call):
            calls.append(call_of(piece.name, ""))
            return {"tool_calls": [{"index": len(calls) - 1} | calls[-1]]}
        return {"tool_calls": [{"index": len(calls) - 1, "function": {"arguments": piece.text}}]}

    def _chunk(self, row: int, delta: Json, reason: str | None, known: Json | None) -> Json:
        choice = {"index": row, "delta": delta, "finish_reason": reason, "logprobs": known}
        return self._head | {"choices": [choice]}

    def _known(self, token: Token) -> Json:
        likeliest = [self._one(token_id, logprob) for token_id, logprob in token.top_logprobs]
        return self._one(token.id, token.logprob) | {"top_logprobs": likeliest}

    def _one(self, token_id: int, logprob: float) -> Json:
        return {
            "token": spelled(self._tokenizer, token_id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.made_bytes(token_id)),
        }


def call_of(name: str, arguments: str) -> Json:
    """A call with an id of its own."""
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def calls_of(steps: Sequence[Step]) -> list[Json]:
    """The calls that one answer makes."""
    calls: list[Json] = []
    for piece in (piece for step in steps for piece in step.pieces):
        if isinstance(piece, Call):
            calls.append(call_of(piece.name, ""))
        elif isinstance(piece, Arguments):
            calls[-1]["function"]["arguments"] += piece.text
    return calls
