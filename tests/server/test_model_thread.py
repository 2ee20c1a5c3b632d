"""Requests that come at any time to the one thread that steps."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import pytest
import torch

from moescope.api import Model
from moescope.engine import runner as runner_module
from moescope.engine.engine import Engine
from moescope.engine.runner import bytes_per_block
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Busy
from moescope.engine.sequence import Sequence, Token
from moescope.errors import UserError
from moescope.model.recorder import Recorder
from moescope.server.model_thread import MAX_ASIDE, ModelThread

PROMPTS = ["床前明月光", "the moon before my bed, is it frost?", "is", "the sun"]
BLOCK = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "BLOCK_TOKENS", BLOCK)


@contextmanager
def threaded(
    model: Model, max_running: int = 3, blocks: int = 1000, max_waiting: int = 10_000
) -> Iterator[ModelThread]:
    cache_bytes = blocks * bytes_per_block(model.network, BLOCK)
    made = ModelThread(
        Engine(model.network, model.tokenizer), max_running, cache_bytes, max_waiting
    )
    made.engine.blocks.least_copied = 1
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def thread(model: Model) -> Iterator[ModelThread]:
    with threaded(model) as made:
        yield made


class Listener:
    """Collects what a text is given."""

    def __init__(self, thread: ModelThread, ids: list[int], **sampling: object) -> None:
        self._queue: Queue[Token | Exception] = Queue()
        params = SamplingParams(**{"max_tokens": 12, **sampling})
        self.sequence: Sequence = thread.submit(ids, params, self._queue.put)

    def tokens(self) -> list[Token]:
        made: list[Token] = []
        while not made or made[-1].finish_reason is None:
            made.append(self.next())
        return made

    def next(self) -> Token:
        event = self._queue.get(timeout=60)
        if isinstance(event, Exception):
            raise event
        return event


def alone(model: Model, ids: list[int], **sampling: object) -> list[int]:
    params = SamplingParams(**{"max_tokens": 12, **sampling})
    return [token.id for token in model.engine.repeat([ids], params)]


def idle(thread: ModelThread) -> bool:
    """Wait until nothing runs any more; whether all blocks have come back."""
    for _ in range(200):
        if not (thread.running or thread.waiting or thread.engine.blocks.held):
            return True
        threading.Event().wait(0.01)
    return False


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_requests_that_come_at_any_time_get_what_each_gets_alone(model: Model, chunk: int) -> None:
    samplings = [{"temperature": t, "seed": seed} for seed, t in enumerate((0.0, 0.7, 1.0, 1.3))]
    asked = [
        (model.engine.encode(prompt), {**sampling, "max_tokens": 5 + 4 * at})
        for at, (prompt, sampling) in enumerate(zip(PROMPTS * 2, samplings * 2, strict=True))
    ]
    with threaded(model) as thread:
        thread._scheduler.chunk = chunk
        listeners = [Listener(thread, ids, **sampling) for ids, sampling in asked]
        for listener, (ids, sampling) in zip(listeners, asked, strict=True):
            made = listener.tokens()
            assert [token.id for token in made] == alone(model, ids, **sampling)
            assert made[-1].finish_reason in ("stop", "length")
        assert idle(thread)


def test_a_loop_is_woken_once_a_step_for_all_that_was_made(
    model: Model, thread: ModelThread
) -> None:
    ids = [model.engine.encode(prompt) for prompt in PROMPTS[:3]]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    made: list[list[Token]] = [[] for _ in ids]
    threads: set[int] = set()
    woken = 0

    async def listen() -> None:
        nonlocal woken
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        wake = loop.call_soon_threadsafe

        def counted(*arguments: Any) -> Any:
            nonlocal woken
            woken += 1
            return wake(*arguments)

        def receive(event: Token | Exception) -> None:
            assert isinstance(event, Token)
            threads.add(threading.get_ident())
            made[event.row].append(event)
            if sum(map(len, made)) == 36:
                ended.set()

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        with thread._news:  # all join in one step
            for row, prompt in enumerate(ids):
                thread.submit(prompt, params, receive, row, loop=loop)
        await asyncio.wait_for(ended.wait(), 60)

    asyncio.run(listen())
    assert threads == {threading.get_ident()}
    assert woken == 12
    for prompt, tokens in zip(ids, made, strict=True):
        assert [t.id for t in tokens] == alone(model, prompt, ignore_eos=True)


def test_a_prompt_of_one_token_is_continued(model: Model, thread: ModelThread) -> None:
    assert [t.id for t in Listener(thread, [65]).tokens()] == alone(model, [65])


def test_a_prompt_that_goes_on_from_an_earlier_text_is_read_from_where_they_part(
    model: Model, thread: ModelThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = model.engine.encode(PROMPTS[1])
    first = Listener(thread, ids, max_tokens=6)
    made = [token.id for token in first.tokens()]
    assert first.sequence.reused == 0
    longer = [*ids, *made, *model.engine.encode("the")]
    read: list[int] = []
    run = thread.engine.runner.run
    monkeypatch.setattr(
        thread.engine.runner,
        "run",
        lambda chunks, *rest: read.append(sum(c.count for c in chunks)) or run(chunks, *rest),
    )
    second = Listener(thread, longer, max_tokens=6)
    tokens = second.tokens()
    assert second.sequence.reused == len(ids) + len(made) - 1
    assert read[0] == len(longer) - second.sequence.reused
    assert [token.id for token in tokens] == alone(model, longer, max_tokens=6)


def test_a_text_that_runs_lends_its_beginning(model: Model, thread: ModelThread) -> None:
    ids = model.engine.encode(PROMPTS[1])
    first = Listener(thread, ids, max_tokens=20)
    first.next()
    second = Listener(thread, ids, max_tokens=20)
    made = [token.id for token in second.tokens()]
    assert made == alone(model, ids, max_tokens=20)
    assert second.sequence.reused == len(ids) - 1


def test_a_cancelled_request_ends_and_leaves_the_others_alone(
    model: Model, thread: ModelThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = model.engine.encode("the moon")
    monkeypatch.setattr(thread.engine, "end_ids", set())
    gone, stays = (Listener(thread, ids, max_tokens=40) for _ in range(2))
    gone.next()
    thread.cancel(gone.sequence)
    stays.tokens()
    assert idle(thread)
    assert len(gone.sequence.ids) < len(ids) + 40
    assert (thread.running, thread.waiting) == (0, 0) and not thread._receivers


@pytest.mark.parametrize("chunk", [2, 512])
@pytest.mark.parametrize("blocks", [6, 8, 12, 100])
def test_texts_that_do_not_fit_together_are_what_each_is_alone(
    model: Model, blocks: int, chunk: int
) -> None:
    with threaded(model, max_running=4, blocks=blocks) as thread:
        thread._scheduler.chunk = chunk
        ids = [model.engine.encode(prompt)[: 4 + 5 * at] for at, prompt in enumerate(PROMPTS * 3)]
        asked = [(of[:30], 1 + 7 * at % 15) for at, of in enumerate(ids)]
        listeners = [Listener(thread, of, max_tokens=most) for of, most in asked]
        made = [[token.id for token in listener.tokens()] for listener in listeners]
        assert made == [alone(model, of, max_tokens=most) for of, most in asked]
        assert idle(thread)
        assert thread.engine.blocks.count <= blocks + 1
        pool = thread.engine.runner.pool
        assert sum(len(held) for held, _ in pool._slots.values()) <= 3 * (blocks + 1)


def test_a_text_ends_where_the_memory_ends(model: Model) -> None:
    ids = model.engine.encode(PROMPTS[1])[:10]
    with threaded(model, max_running=2, blocks=3) as thread:
        whole = alone(model, ids, max_tokens=50)
        assert len(whole) > 15
        tokens = Listener(thread, ids, max_tokens=50).tokens()
        assert [token.id for token in tokens] == whole[:15]
        assert tokens[-1].finish_reason == "length"
        with pytest.raises(UserError, match="has 25 tokens but there is memory for 24; shorten it"):
            Listener(thread, [65] * 25)
        assert len(Listener(thread, [65] * 24).tokens()) == 1
    for cache_bytes in (bytes_per_block(model.network, BLOCK) - 1, 0, -(10**9)):
        with pytest.raises(UserError, match="too few for the cache of 8 tokens"):
            ModelThread(Engine(model.network, model.tokenizer), 2, cache_bytes)


def test_what_was_read_of_an_answer_that_is_broken_off_is_kept(
    model: Model, thread: ModelThread
) -> None:
    ids = model.engine.encode(PROMPTS[1])[:10]
    broken = Listener(thread, ids, max_tokens=50)
    first = broken.next()
    thread.cancel(broken.sequence)
    longer = [*ids, first.id, 66]
    again = Listener(thread, longer, max_tokens=4)
    tokens = again.tokens()
    assert again.sequence.reused >= len(ids)
    assert [token.id for token in tokens] == alone(model, longer, max_tokens=4)


@pytest.mark.parametrize("step", ["run", "pick"])
def test_a_failure_ends_what_runs_and_nothing_else(
    model: Model, thread: ModelThread, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise MemoryError("no more")

    ids = model.engine.encode("the moon")
    with monkeypatch.context() as patch:
        patch.setattr(thread.engine.runner if step == "run" else thread.engine, step, fail)
        listeners = [Listener(thread, ids, seed=seed) for seed in range(4)]
        for listener in listeners:
            with pytest.raises(MemoryError):
                listener.tokens()
    assert [t.id for t in Listener(thread, ids).tokens()] == alone(model, ids)
    assert idle(thread)


@pytest.mark.parametrize(
    ("owner", "name", "place"), [(Engine, "_choose", -1), (Sequence, "append", 0)]
)
def test_a_text_that_fails_ends_alone(
    model: Model,
    thread: ModelThread,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    place: int,
) -> None:
    works = getattr(owner, name)

    def fails_for_one(*given: Any) -> object:
        if given[place].params.max_tokens == 13:
            raise ArithmeticError("no token is left")
        return works(*given)

    monkeypatch.setattr(owner, name, fails_for_one)
    ids = model.engine.encode("the moon")
    fine, bad = Listener(thread, ids), Listener(thread, ids, max_tokens=13)
    with pytest.raises(ArithmeticError):
        bad.tokens()
    assert [t.id for t in fine.tokens()] == alone(model, ids)
    assert idle(thread)


def test_ids_beyond_the_vocabulary_end_nothing(model: Model, thread: ModelThread) -> None:
    ids = model.engine.encode(PROMPTS[0])
    for beyond in (-1, model.config.vocab_size, 2**70):
        sampling = {"min_tokens": 2, "stop_token_ids": (beyond,)}
        tokens = Listener(thread, ids, **sampling).tokens()
        assert [token.id for token in tokens] == alone(model, ids, min_tokens=2)


def test_what_cannot_be_read_is_refused_at_once(model: Model, thread: ModelThread) -> None:
    with pytest.raises(UserError, match="shorten it"):
        Listener(thread, [65] * 65)
    with pytest.raises(UserError, match="ask for one token"):
        Listener(thread, [65], max_tokens=0)


def test_more_work_than_may_wait_is_turned_away(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with threaded(model, max_waiting=40) as thread:
        entered, go_on = threading.Event(), threading.Event()
        run = thread.engine.runner.run

        def held(*given: object) -> torch.Tensor:
            entered.set()
            assert go_on.wait(60)
            return run(*given)

        monkeypatch.setattr(thread.engine.runner, "run", held)
        listeners = [Listener(thread, [65])]
        assert entered.wait(60)
        listeners += [Listener(thread, [66]), Listener(thread, [67])]
        with pytest.raises(Busy, match="39 tokens wait to be read or made already; try again"):
            Listener(thread, [67])
        go_on.set()
        assert all(len(listener.tokens()) == 12 for listener in listeners)
        assert idle(thread)
        Listener(thread, [65] * 40).tokens()  # however much it is, where nothing waits


def test_closing_tells_what_runs(model: Model) -> None:
    with threaded(model, max_running=1) as thread:
        listeners = [Listener(thread, [65], max_tokens=60) for _ in range(3)]
        thread.close()
        with pytest.raises(Busy, match="shutting down"):
            listeners[2].tokens()
        with pytest.raises(Busy, match="shutting down"):
            Listener(thread, [65])


# --- what is computed aside -----------------------------------------------------------------------


def test_what_is_computed_aside_lets_texts_go_on(thread: ModelThread, model: Model) -> None:
    """Each part is followed by as long a time for the texts; a text that comes in is not kept."""
    begun, told = threading.Event(), list[str]()

    def long() -> str:
        begun.set()
        for _ in range(40):
            time.sleep(0.02)
            thread.pause()
        told.append("aside")
        return "made"

    future = thread.aside(long)
    assert begun.wait(10)
    ids = model.engine.encode(PROMPTS[0])
    tokens = Listener(thread, ids, max_tokens=12).tokens()
    told.append("text")
    assert future.result(30) == "made" and told == ["text", "aside"]
    alone = model.engine.repeat([ids], SamplingParams(max_tokens=12))
    assert [t.id for t in tokens] == [t.id for t in alone]


def test_texts_wait_for_memory_that_a_question_holds(model: Model) -> None:
    ids = model.engine.encode(PROMPTS[1])[:10]  # two blocks, and more as it is continued
    with threaded(model, max_running=2, blocks=4) as thread:
        asked: list[Listener] = []
        begun = threading.Event()

        def look_on() -> list[int]:
            made: list[int] = []
            params = SamplingParams(max_tokens=10)
            for _, token in thread.engine.watch([65] * 10, params, Recorder()):
                made += [token.id] if token else []  # none where it waits
                if not asked:
                    asked.extend(Listener(thread, ids, max_tokens=20) for _ in range(2))
                    begun.set()
                thread.pause()
            return made

        question = thread.aside(look_on)
        assert begun.wait(60)
        for listener in asked:
            told = [token.id for token in listener.tokens()]
            assert told == alone(model, ids, max_tokens=20)
        try:
            assert question.result(30) == alone(model, [65] * 10, max_tokens=10)
        except Busy as error:  # texts hold what the question would have gone on to
            assert "others hold all memory" in str(error)


def test_a_question_that_fails_is_its_askers_alone(thread: ModelThread, model: Model) -> None:
    def fail() -> None:
        raise UserError("no such token")

    listener = Listener(thread, model.engine.encode(PROMPTS[1]))
    with pytest.raises(UserError, match="no such token"):
        thread.aside(fail).result(10)
    assert len(listener.tokens()) == 12


def test_questions_are_bounded_and_end_with_the_thread(model: Model) -> None:
    go = threading.Event()

    def wait() -> None:
        go.wait(10)
        thread.pause()

    with threaded(model) as thread:
        running = thread.aside(wait)
        while not running.running():
            time.sleep(0.01)
        waiting = [thread.aside(wait) for _ in range(MAX_ASIDE)]
        with pytest.raises(Busy, match="wait already"):
            thread.aside(wait)
        given_up = waiting.pop()
        assert given_up.cancel()
        closing = threading.Thread(target=thread.close)
        closing.start()
        time.sleep(0.1)
        go.set()
        closing.join()
        for future in (running, *waiting):
            with pytest.raises(Busy, match="shutting down"):
                future.result(10)
        with pytest.raises(Busy, match="shutting down"):
            thread.aside(wait)
