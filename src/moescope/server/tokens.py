"""Texts into ids and back, as vLLM's `/tokenize`, `/detokenize` and `/tokenizer_info`."""

import asyncio
from typing import Annotated, Any

from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moescope.errors import UserError
from moescope.server.fields import First, Id, Lenient, List
from moescope.server.openai_answers import spelled
from moescope.server.openai_schema import ChatMessage, ChatRequest, Tool
from moescope.server.requests import read_json
from moescope.server.service import MAX_BYTES, Endpoint, Service


class TokenizeRequest(Lenient):
    """A text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], First(), Field(min_length=1)] | None = None
    tools: List[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Lenient):
    """Ids."""

    model: str | None = None
    tokens: List[Id]


class Tokens:
    """The endpoints, over a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        """All of them."""
        return [
            Endpoint("/tokenize", self.tokenize, TokenizeRequest),
            Endpoint("/detokenize", self.detokenize, DetokenizeRequest),
            Endpoint("/tokenizer_info", self.info),
            Endpoint("/v1/embeddings", self.embeddings, Lenient),
        ]

    async def tokenize(self, request: Request) -> Response:
        """The ids of a text or a conversation."""
        asked = await read_json(request, TokenizeRequest, MAX_BYTES)
        self._service.check_name(asked.model)
        tokenizer = self._service.model.tokenizer
        if (asked.prompt is None) == (asked.messages is None):
            raise UserError("give a prompt or messages, one of them")
        if asked.messages is not None:
            told = {name: getattr(asked, name) for name in ("messages", "tools")}
            switches = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
            told |= {name: getattr(asked, name) for name in switches}
            _, ids = await self._service.chats.encode(ChatRequest.model_construct(**told))
        else:
            special = asked.add_special_tokens
            ids = await asyncio.to_thread(
                tokenizer.encode, asked.prompt or "", add_special_tokens=special
            )
        strings = [spelled(tokenizer, i) for i in ids] if asked.return_token_strs else None
        limit = self._service.model.config.max_position_embeddings
        counted = {"count": len(ids), "max_model_len": limit}
        return JSONResponse(counted | {"tokens": ids, "token_strs": strings})

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        asked = await read_json(request, DetokenizeRequest, MAX_BYTES)
        self._service.check_name(asked.model)
        vocab = self._service.model.config.vocab_size
        if any(not 0 <= token_id < vocab for token_id in asked.tokens):
            raise UserError(f"a token is beyond the vocabulary; ids run from 0 to {vocab - 1}")
        tokenizer = self._service.model.tokenizer
        text = await asyncio.to_thread(tokenizer.decode, asked.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    async def info(self, _request: Request) -> Response:
        """The named special tokens and the chat template, as a tokenizer's files have them."""
        tokenizer = self._service.model.tokenizer
        told: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"))
        told |= tokenizer.chat_variables({})
        told["chat_template"] = tokenizer.chat_templates.get("default")
        told["model_max_length"] = self._service.model.config.max_position_embeddings
        return JSONResponse(told)

    async def embeddings(self, _request: Request) -> Response:
        """Refused: the model continues text."""
        raise HTTPException(
            400,
            f"{self._service.name} continues text and makes no embeddings; ask a model made for "
            "them",
        )
