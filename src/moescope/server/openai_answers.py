"""What the OpenAI API answers with: a request's tokens as JSON, whole or piece by piece."""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moescope.engine.sequence import PromptLogprob, Token
from moescope.server.chats import Step
from moescope.server.experts import experts_told, prompt_experts
from moescope.server.openai_schema import ChatRequest, CompletionRequest
from moescope.text.answers.pieces import Arguments, Call, Content, Thought
from moescope.text.tokenizer import StreamDecoder, Tokenizer

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


def prompt_logprobs(
    tokenizer: Tokenizer, known: Sequence[PromptLogprob | None], top: int
) -> list[Json | None]:
    """What is known of a prompt's tokens, by vLLM's names: the token itself, then the likeliest."""
    told: list[Json | None] = []
    for one in known:
        if one is None:
            told.append(None)
            continue
        entries = [(one.id, one.logprob, one.rank)]
        likeliest = enumerate(one.top_logprobs[:top], start=1)
        entries += [(i, logprob, rank) for rank, (i, logprob) in likeliest if i != one.id]
        told.append(
            {
                str(token_id): {
                    "logprob": logprob,
                    "rank": rank,
                    "decoded_token": spelled(tokenizer, token_id),
                }
                for token_id, logprob, rank in entries
            }
        )
    return told


class CompletionForm:
    """The continuations of prompts.

    Args:
        tokenizer: the model's.
        name: the model's.
        asked: the request.
        prompts: as ids, each continued in as many ways as the request says.
        end_ids: tokens that end a text and are part of none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str,
        asked: CompletionRequest,
        prompts: Sequence[Sequence[int]],
        end_ids: Iterable[int],
    ) -> None:
        self._tokenizer, self._asked, self._prompts = tokenizer, asked, prompts
        self._end_ids = {*(() if asked.ignore_eos else end_ids), *(asked.stop_token_ids or ())}
        self._head = head("cmpl", "text_completion", name)
        self._offsets: dict[int, int] = {}  # of the text told of each row
        self._count = len(prompts) * asked.choices

    def whole(self, tokens: Sequence[Token], usage: Json) -> Json:
        """Tell all texts at once."""
        made: list[list[Token]] = [[] for _ in range(self._count)]
        for token in tokens:
            made[token.row].append(token)
        choices = [self._choice(row, of, first=True) for row, of in enumerate(made)]
        told = self._head | {"choices": choices, "usage": self._counted(usage)}
        return told | self._prompt_experts(tokens)

    def piece(self, token: Token) -> Json | None:
        """Tell one token, and before a text's first the prompt; None if there is nothing yet."""
        first = token.row not in self._offsets
        choice = self._choice(token.row, [token], first=first)
        told = choice["text"] or choice["logprobs"] or token.routed is not None
        if choice["finish_reason"] is None and not told:
            return None
        return self._head | {"choices": [choice]} | self._prompt_experts([token])

    def usage(self, usage: Json) -> Json:
        """The last event of a stream that counts."""
        return self._head | {"choices": [], "usage": self._counted(usage)}

    def _prompt_experts(self, tokens: Sequence[Token]) -> Json:
        """The experts of the prompt, told once; those of several stand with their choices."""
        if len(self._prompts) > 1:
            return {}
        return prompt_experts(self._asked, [token for token in tokens if token.row == 0])

    def _counted(self, usage: Json) -> Json:
        if self._asked.max_tokens != 0:
            return usage
        return usage | {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}

    def _choice(self, row: int, tokens: Sequence[Token], *, first: bool) -> Json:
        """Tell tokens of a text; where no more than the prompt is asked for, none that was made."""
        asked, known = self._asked, tokens[0].prompt_logprobs if tokens else None
        reason = tokens[-1].finish_reason if tokens else "length"
        told = _Told() if asked.logprobs is not None else None
        text, made = "", tokens
        if asked.max_tokens == 0:
            reason, made = "length", ()
        offset = self._offsets.get(row, 0)
        if first and asked.echo:
            text = self._echo(row, known, told)
        if told is not None:
            self._tell(told, made, offset + len(text))
        text += "".join(token.text for token in made)
        self._offsets[row] = offset + len(text)
        choice: Json = {"index": row, "finish_reason": reason, "text": text}
        choice["logprobs"] = None if told is None else vars(told)
        if asked.prompt_logprobs is not None and known is not None:
            top = asked.prompt_logprobs
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, known, top)
        if len(self._prompts) > 1:
            choice |= prompt_experts(asked, tokens)
        return choice | experts_told(asked, tokens)

    def _echo(
        self, row: int, known: Sequence[PromptLogprob | None] | None, told: "_Told | None"
    ) -> str:
        """The text of a prompt; `told` gets what is known of its tokens."""
        ids, decoder = self._prompts[row // self._asked.choices], StreamDecoder(self._tokenizer)
        text = ""
        for at, token_id in enumerate(ids):
            one = known[at] if known else None
            if told is not None:
                told.tokens.append(spelled(self._tokenizer, token_id))
                told.text_offset.append(len(text))
                told.token_logprobs.append(None if one is None else one.logprob)
                told.top_logprobs.append(None if one is None else self._likeliest(one))
            text += decoder.feed(token_id)
        return text + decoder.flush()

    def _tell(self, told: "_Told", tokens: Sequence[Token], offset: int) -> None:
        """Add what is known of tokens.

        An end token is part of no text, but of an echo: who scores texts by it counts tokens.
        """
        for token in tokens:
            if token.id in self._end_ids and not self._asked.echo:
                continue
            told.tokens.append(spelled(self._tokenizer, token.id))
            told.token_logprobs.append(token.logprob)
            told.top_logprobs.append(self._likeliest(token))
            told.text_offset.append(offset)
            offset += len(token.text)

    def _likeliest(self, one: Token | PromptLogprob) -> dict[str, float]:
        """The likeliest tokens, and this one; of two that are spelled alike the likelier."""
        entries = [*one.top_logprobs[: self._asked.logprobs], (one.id, one.logprob)]
        told: dict[str, float] = {}
        for token_id, logprob in entries:
            told.setdefault(spelled(self._tokenizer, token_id), logprob)
        return told


@dataclass
class _Told:
    """What is known of tokens, by OpenAI's names."""

    tokens: list[str] = field(default_factory=list[str])
    token_logprobs: list[float | None] = field(default_factory=list[float | None])
    top_logprobs: list[dict[str, float] | None] = field(
        default_factory=list[dict[str, float] | None]
    )
    text_offset: list[int] = field(default_factory=list[int])


class ChatForm:
    """The answers to a conversation: thoughts, content and calls apart.

    Args:
        tokenizer: the model's.
        name: the model's.
        asked: the request.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, asked: ChatRequest) -> None:
        self._tokenizer, self._name, self._asked = tokenizer, name, asked
        self._tells_logprobs = bool(asked.logprobs)
        self._head = head("chatcmpl", "chat.completion.chunk", name)
        self._calls: list[list[Json]] = [[] for _ in range(asked.choices)]

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
                    **experts_told(self._asked, [step.token for step in own]),
                }
            )
        told = self._head | {"object": "chat.completion", "choices": choices, "usage": usage}
        known = next((s.token.prompt_logprobs for s in steps if s.token.prompt_logprobs), None)
        if known and self._asked.prompt_logprobs is not None:
            top = self._asked.prompt_logprobs
            told["prompt_logprobs"] = prompt_logprobs(self._tokenizer, known, top)
        return told | self._prompt_experts([step.token for step in steps])

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
        experts = experts_told(self._asked, [step.token])
        if known or experts:
            deltas = deltas or [{}]
        told = [
            self._chunk(row, delta, None, known if at == 0 else None)
            for at, delta in enumerate(deltas)
        ]
        if experts:
            told[0]["choices"][0] |= experts
            told[0] |= self._prompt_experts([step.token])
        if step.finish_reason is not None:
            told.append(self._chunk(row, {}, step.finish_reason, None))
        return told

    def usage(self, usage: Json) -> Json:
        """The last event of a stream that counts."""
        return self._head | {"choices": [], "usage": usage}

    def _prompt_experts(self, tokens: Sequence[Token]) -> Json:
        """The experts of the conversation, told once."""
        return prompt_experts(self._asked, [token for token in tokens if token.row == 0])

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
