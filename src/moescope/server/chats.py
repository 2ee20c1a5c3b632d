"""Conversations, whatever API asks for them: from messages to tokens, and from those to pieces.

All APIs' requests become a `ChatRequest`, and all their answers are told from `Step`s.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moescope.api import Model
from moescope.engine.constraint import Constraint, Kind
from moescope.engine.sequence import Token
from moescope.errors import UserError
from moescope.server.examples import ASKED, as_typed
from moescope.server.openai_schema import ChatRequest, NamedTool, Request
from moescope.server.templates import Templates
from moescope.server.texts import Arrival, Desk, Texts
from moescope.text.answers import harmony
from moescope.text.answers.grammar import calls_grammar
from moescope.text.answers.pieces import Arguments, Call, Piece
from moescope.text.answers.reader import AnswerReader, Form, form_of


class TooLong(UserError):
    """A prompt has more tokens than the model's context."""


@dataclass(frozen=True)
class Step:
    """One token, and what became certain of the answer with it.

    Attributes:
        token: that was made.
        pieces: of the answer, in order.
        finish_reason: of the last token; "tool_calls" where calls were made.
        is_end: whether it is an end token, which is part of no answer.
    """

    token: Token
    pieces: tuple[Piece, ...]
    finish_reason: str | None
    is_end: bool


class Answers:
    """The answers to one conversation, in the making.

    Attributes:
        texts: from which they are read.
        prompt: as the template wrote it.
        thought_tokens: that all their thoughts took so far.
        count: of them.
    """

    def __init__(
        self, texts: Texts, prompt: str, readers: list[AnswerReader], model: Model
    ) -> None:
        self.texts, self.prompt, self.count = texts, prompt, len(readers)
        self.thought_tokens = 0
        self._readers, self._calls = readers, [0] * len(readers)
        self._tokenizer, self._end_ids = model.tokenizer, model.engine.end_ids
        self.one_call = False

    @property
    def usage(self) -> dict[str, Any]:
        """How many tokens were read, made and thought."""
        details = {"reasoning_tokens": self.thought_tokens}
        return self.texts.usage | {"completion_tokens_details": details}

    async def __aiter__(self) -> AsyncIterator[Step]:
        """Yield steps until every answer has ended; leaving early ends them all."""
        async for token in self.texts:
            yield self._step(token)

    def end(self) -> None:
        """Make no more tokens."""
        self.texts.end()

    def _step(self, token: Token) -> Step:
        reader, row, text = self._readers[token.row], token.row, token.text
        if token.id in self._tokenizer.special_ids:
            spelling = self._tokenizer.made_bytes(token.id).decode(errors="replace")
            if spelling not in reader.marks:
                text = text.removesuffix(spelling)
        is_end = token.finish_reason == "stop" and token.id in self._end_ids
        was_thinking, pieces = reader.is_thinking, list[Piece]()
        for piece in reader.feed(text, final=token.finish_reason is not None):
            self._calls[row] += isinstance(piece, Call)
            beyond = self.one_call and self._calls[row] > 1
            if not (beyond and isinstance(piece, Call | Arguments)):
                pieces.append(piece)
        self.thought_tokens += was_thinking or reader.is_thinking
        reason: str | None = token.finish_reason
        if reason == "stop" and self._calls[row]:
            reason = "tool_calls"
        return Step(token, tuple(pieces), reason, is_end)


class Chats:
    """Begins answers with one model.

    Args:
        model: what is asked.
        desk: where its texts are asked for.
    """

    def __init__(self, model: Model, desk: Desk) -> None:
        self._model, self._desk = model, desk
        self._templates: Templates | None = None

    @property
    def templates(self) -> Templates:
        """What renders; begun when first asked."""
        if self._templates is None:
            self._templates = Templates(self._model.tokenizer)
        return self._templates

    @property
    def knows_tools(self) -> bool:
        """Whether the model's chat template teaches calls of tools."""
        return any(form_of(text).calls for text in self._model.tokenizer.chat_templates.values())

    async def question_form(self) -> str | None:
        """How a chat writes one question, for the page; None where it cannot."""
        if not self._model.tokenizer.chat_templates:
            return None
        try:
            text = await self.templates.render(ASKED, None, {"add_generation_prompt": True})
        except UserError:
            return None
        return as_typed(self._model.tokenizer, text)

    async def close(self) -> None:
        """End what renders."""
        if self._templates is not None:
            await self._templates.close()

    async def encode(self, asked: ChatRequest) -> tuple[str, list[int]]:
        """Return a conversation as its template writes it, and as ids.

        Raises:
            UserError: the template refuses it.
            TooLong: it is too long for the model's context.
        """
        messages, tools = await asyncio.to_thread(_plain, asked)
        variables = {**(asked.chat_template_kwargs or {})}
        if asked.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", asked.reasoning_effort)
            if asked.reasoning_effort == "none":
                variables.setdefault("enable_thinking", False)
        begins = asked.add_generation_prompt and not asked.continue_final_message
        variables |= {"add_generation_prompt": begins}
        if not asked.continue_final_message:
            text = await self.templates.render(messages, tools or None, variables)
            return text, await self.encode_text(text, is_chat=True)
        here = uuid.uuid4().hex  # where the text goes on, behind what was said
        last = messages[-1] | {"content": messages[-1]["content"].rstrip() + here}
        text = await self.templates.render([*messages[:-1], last], tools or None, variables)
        text, found, _ = text.partition(here)
        if not found:
            raise UserError("the chat template drops the last message; it cannot go on from it")
        return text, await self.encode_text(text, is_chat=True)

    async def encode_text(self, text: str, *, is_chat: bool = False) -> list[int]:
        """Return a prompt's ids; a chat's template has written what is set around it.

        Raises:
            TooLong: they are too many for the model's context.
        """
        tokenizer = self._model.tokenizer
        ids = await asyncio.to_thread(tokenizer.encode, text)
        begin = list(tokenizer.begin_ids)
        if not is_chat and begin and ids[: len(begin)] != begin:
            ids = [*begin, *ids, *tokenizer.end_ids]
        self.check(ids)
        return ids

    def check(self, ids: list[int]) -> None:
        """Refuse what is too long, and what the model cannot read.

        Raises:
            TooLong: more tokens than the model's context.
            UserError: none, or tokens that it does not know.
        """
        limit = self._model.config.max_position_embeddings
        if len(ids) > limit:
            raise TooLong(
                f"the prompt has {len(ids)} tokens but the model's context holds {limit}; "
                "shorten it"
            )
        self._model.engine.check(ids)

    async def constraint(
        self, asked: Request, after: str = "", instead: Iterable[int] = ()
    ) -> Constraint | None:
        """Compile what a request's texts must be.

        Args:
            asked: the request.
            after: as `Constraint` takes it.
            instead: the same.

        Raises:
            UserError: it cannot be held to.
        """
        return await self._held_to(asked.held_to, after, instead) if asked.held_to else None

    async def _held_to(
        self, rule: tuple[Kind, Any], after: str, instead: Iterable[int] = ()
    ) -> Constraint:
        engine = self._model.engine
        made = (self._model.tokenizer, self._model.config.vocab_size, engine.end_ids)
        return await asyncio.to_thread(Constraint, *made, *rule, after, instead)

    async def begin(
        self, asked: ChatRequest, arrival: Arrival, as_it_stands: str | None = None
    ) -> Answers:
        """Begin to answer a conversation.

        Args:
            asked: the conversation.
            arrival: where it came in, and when.
            as_it_stands: a prompt in the place of what the chat template would write.

        Raises:
            UserError: it cannot be answered.
        """
        if as_it_stands is None:
            prompt, ids = await self.encode(asked)
        else:
            prompt, ids = as_it_stands, await self.encode_text(as_it_stands)
        template = self._template(asked) if as_it_stands is None else ""
        form = form_of(template)
        tools = {t.function.name: t.function.parameters or {} for t in asked.tools or []}
        may_call = bool(tools) and asked.tool_choice != "none"
        if may_call and not form.calls:
            raise UserError(
                "this model's chat template teaches no calls of tools; leave tools out, or take a "
                "model that knows them"
            )
        after = _after(form, prompt)
        calls_end = self._special_id(harmony.END_OF_CALL) if may_call else None
        instead = () if calls_end is None else (calls_end,)
        constraint = await self.constraint(asked, after, instead)
        must = asked.tool_choice
        if may_call and (must == "required" or isinstance(must, NamedTool)):
            if constraint is not None:
                raise UserError("a text cannot both be held to a form and call a tool; name one")
            if isinstance(must, NamedTool):
                tools = {must.function.name: tools[must.function.name]}
            one = isinstance(must, NamedTool) or asked.parallel_tool_calls is False
            grammar = calls_grammar(form, template, tools, self._special_id, one=one)
            begun = "" if form.thought is None else after
            constraint = await self._held_to(("lark", grammar), begun)
        more: Mapping[str, Any] = {} if constraint is None else {"constraint": constraint}
        params = asked.sampling(
            asked.most or self._model.config.max_position_embeddings,
            asked.top_logprobs or 0,
            self._model.engine.defaults.sampling,
            skip_special_tokens=False,
            **more,
        )
        texts = await self._desk.begin(arrival, [ids], params)
        told = tools if may_call else None
        readers = [AnswerReader(form, prompt, told) for _ in params]
        answers = Answers(texts, prompt, readers, self._model)
        answers.one_call = asked.parallel_tool_calls is False
        return answers

    def _template(self, asked: ChatRequest) -> str:
        templates = self._model.tokenizer.chat_templates
        name = "tool_use" if asked.tools and "tool_use" in templates else "default"
        return templates.get(name, "")

    def _special_id(self, text: str) -> int | None:
        tokenizer = self._model.tokenizer
        token_id = tokenizer.token_id(text)
        return token_id if token_id in tokenizer.special_ids else None


def _plain(asked: ChatRequest) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages, and tools that may be called, as chat templates want them."""
    tools = [] if asked.tool_choice == "none" else asked.tools or []
    return [message.plain() for message in asked.messages], [tool.plain() for tool in tools]


def _after(form: Form, prompt: str) -> str:
    """What a text must have written before it can be held to a rule: the end of its thought."""
    if form.thought is None:
        return "<|channel|>final<|message|>"
    begin, end = form.thought
    return end if prompt.rstrip().endswith(begin) else ""
