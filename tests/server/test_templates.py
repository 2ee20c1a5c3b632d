"""Templates that never end, or take all memory, end alone."""

import asyncio
import time
from typing import Any

import pytest

from moescope.errors import UserError
from moescope.server.templates import Templates
from moescope.text.tokenizer import Tokenizer

ENDLESS = (
    "{% if messages[0]['content'] == 'loop' %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if messages[0]['content'] == 'fill' %}{{ 'x' * 9000000000 }}{% endif %}"
    "{{ bos_token }}{{ messages[0]['content'] }}{{ mood }}"
)


def templates(tokenizer: Tokenizer, **options: Any) -> Templates:
    config = {**tokenizer._config, "chat_template": ENDLESS}
    return Templates(Tokenizer(tokenizer._backend, config), **options)


async def rendered(of: Templates, content: str) -> str:
    return await of.render(
        [{"role": "user", "content": content}], None, {"mood": " 月", "self": 1, "messages": 2}
    )


def test_a_template_that_never_ends_is_ended(model: Any) -> None:
    async def ask() -> None:
        of = templates(model.tokenizer, seconds=0.3)
        expected = model.tokenizer.decode([model.tokenizer.bos_id], skip_special_tokens=False)
        assert await rendered(of, "hello") == f"{expected}hello 月"
        begun, ticks = time.monotonic(), 0
        asking = [asyncio.ensure_future(rendered(of, kind)) for kind in ("loop", "loop", "hello")]
        while not all(one.done() for one in asking):
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks > 20  # the loop lived on
        assert time.monotonic() - begun < 60
        for looped in asking[:2]:
            with pytest.raises(UserError, match=r"took longer than 0.3 s"):
                looped.result()
        assert asking[2].result().endswith("hello 月")
        with pytest.raises(UserError, match="memory"):
            await rendered(of, "fill")
        assert (await rendered(of, "again")).endswith("again 月")
        await of.close()

    asyncio.run(ask())


def test_who_leaves_takes_no_answer_from_the_next(model: Any) -> None:
    async def ask() -> None:
        of = templates(model.tokenizer, seconds=5)
        for _ in range(3):
            asking = asyncio.ensure_future(rendered(of, "loop"))
            await asyncio.sleep(0.3)
            asking.cancel()
        told = await asyncio.gather(*(rendered(of, str(n)) for n in range(6)))
        assert [text[-3] for text in told] == list("012345")
        await of.close()

    asyncio.run(ask())
