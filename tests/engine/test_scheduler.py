import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue

import pytest
import torch

from moescope.api import Model
from moescope.engine import scheduler as module
from moescope.engine.batch import Batch, Row, Token
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Busy, Request, Scheduler
from moescope.errors import UserError
from moescope.model.cache import Cache

PROMPTS = ["床前明月光", "the moon before my bed, is it frost?", "is", "the sun"]


@pytest.fixture
def scheduler(model: Model) -> Iterator[Scheduler]:
    made = Scheduler(model.engine, max_batch=3, cache_bytes=2**24)
    yield made
    made.close()


@contextmanager
def scheduling(model: Model, max_batch: int, cache_bytes: int) -> Iterator[Scheduler]:
    scheduler = Scheduler(model.engine, max_batch, cache_bytes)
    try:
        yield scheduler
    finally:
        scheduler.close()


class Listener:
    """Collects what a request is given."""

    def __init__(self, scheduler: Scheduler, ids: list[int], **sampling: object) -> None:
        self._queue: Queue[Token | Exception] = Queue()
        self.request: Request = scheduler.submit(
            ids, SamplingParams(**{"max_tokens": 12, **sampling}), self._queue.put
        )

    def tokens(self) -> list[Token]:
        made: list[Token] = []
        while not made or made[-1].finish_reason is None:
            event = self._queue.get(timeout=60)
            if isinstance(event, Exception):
                raise event
            made.append(event)
        return made


def alone(model: Model, ids: list[int], **sampling: object) -> list[int]:
    params = SamplingParams(**{"max_tokens": 12, **sampling})
    return [token.id for token in model.engine.repeat([ids], params)]


@pytest.mark.parametrize("piece", [1, 3, 512])
def test_requests_that_come_at_any_time_get_what_each_gets_alone(
    model: Model, scheduler: Scheduler, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    samplings = [{"temperature": t, "seed": seed} for seed, t in enumerate((0.0, 0.7, 1.0, 1.3))]
    asked = [
        (model.engine.encode(prompt), {**sampling, "max_tokens": 5 + 4 * at})
        for at, (prompt, sampling) in enumerate(zip(PROMPTS * 2, samplings * 2, strict=True))
    ]
    listeners = [Listener(scheduler, ids, **sampling) for ids, sampling in asked]
    for listener, (ids, sampling) in zip(listeners, asked, strict=True):
        made = listener.tokens()
        assert [token.id for token in made] == alone(model, ids, **sampling)
        assert made[-1].finish_reason in ("stop", "length")


def test_a_prompt_of_one_token_is_continued(model: Model, scheduler: Scheduler) -> None:
    assert [t.id for t in Listener(scheduler, [65]).tokens()] == alone(model, [65])


def test_a_prompt_that_goes_on_from_an_earlier_text_is_read_from_where_they_part(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORTEST_REUSE", 4)
    ids = model.engine.encode(PROMPTS[1])
    first = Listener(scheduler, ids, max_tokens=6)
    made = [token.id for token in first.tokens()]
    assert first.request.reused == 0
    longer = [*ids, *made, *model.engine.encode("the")]
    read: list[int] = []
    transform = model.engine.transform
    monkeypatch.setattr(
        model.engine,
        "transform",
        lambda ids, *rest: read.append(ids.numel()) or transform(ids, *rest),
    )
    second = Listener(scheduler, longer, max_tokens=6)
    tokens = second.tokens()
    assert second.request.reused == len(ids) + len(made) - 1
    assert read[0] == len(longer) - 1 - second.request.reused
    monkeypatch.undo()
    assert [token.id for token in tokens] == alone(model, longer, max_tokens=6)


def test_a_text_that_runs_lends_its_beginning(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORTEST_REUSE", 4)
    ids = model.engine.encode(PROMPTS[1])
    twins = [Listener(scheduler, ids, max_tokens=20) for _ in range(2)]
    made = [[token.id for token in twin.tokens()] for twin in twins]
    assert made[0] == made[1] == alone(model, ids, max_tokens=20)
    assert [twin.request.reused for twin in twins] == [0, len(ids) - 1]


def test_a_cancelled_request_leaves_the_others_alone(model: Model, scheduler: Scheduler) -> None:
    ids = model.engine.encode("the moon")
    gone, stays = (Listener(scheduler, ids, max_tokens=40) for _ in range(2))
    scheduler.cancel(gone.request)
    assert [t.id for t in stays.tokens()] == alone(model, ids, max_tokens=40)
    again = Listener(scheduler, ids)
    assert [t.id for t in again.tokens()] == alone(model, ids)
    assert (scheduler.running, scheduler.waiting) in ((0, 0), (1, 0))


@pytest.mark.parametrize("piece", [2, 512])
@pytest.mark.parametrize("slots", [45, 64, 100, 1000])
def test_all_caches_together_stay_within_their_bytes(
    model: Model, slots: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    monkeypatch.setattr(module, "SHORTEST_REUSE", 2)
    cache_bytes = _bytes_per_slot(model) * slots
    held: list[int] = []
    transform = model.engine.transform

    def weighed(*given: object) -> torch.Tensor:
        states = transform(*given)
        held.append(scheduler.held_bytes if len(held) else 0)
        return states

    monkeypatch.setattr(model.engine, "transform", weighed)
    with scheduling(model, max_batch=4, cache_bytes=cache_bytes) as scheduler:
        ids = [model.engine.encode(prompt)[: 4 + 5 * at] for at, prompt in enumerate(PROMPTS * 3)]
        asked = [(of[:30], 1 + 7 * at % 15) for at, of in enumerate(ids)]
        listeners = [Listener(scheduler, of, max_tokens=most) for of, most in asked]
        made = [[token.id for token in listener.tokens()] for listener in listeners]
        monkeypatch.undo()
        assert made == [alone(model, of, max_tokens=most) for of, most in asked]
    assert max(held) <= cache_bytes
    assert slots == 1000 or max(held) > 0.8 * cache_bytes


def test_a_text_ends_where_the_memory_ends(model: Model) -> None:
    ids = model.engine.encode(PROMPTS[1])[:10]
    with scheduling(model, max_batch=2, cache_bytes=_bytes_per_slot(model) * 20) as scheduler:
        whole = alone(model, ids, max_tokens=50)
        assert len(whole) > 11
        tokens = Listener(scheduler, ids, max_tokens=50).tokens()
        assert [token.id for token in tokens] == whole[:11]
        assert tokens[-1].finish_reason == "length"
        with pytest.raises(UserError, match="has 21 tokens but there is memory for 20; shorten it"):
            Listener(scheduler, [65] * 21)
        assert len(Listener(scheduler, [65] * 20).tokens()) == 1
    for cache_bytes in (_bytes_per_slot(model) - 1, 0, -(10**9)):
        with pytest.raises(UserError, match="too few for the cache of one token"):
            Scheduler(model.engine, max_batch=2, cache_bytes=cache_bytes)


def test_a_text_that_has_to_wait_again_still_tells_what_had_been_read_before(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORTEST_REUSE", 2)
    ids = model.engine.encode("the moon")
    removed: list[Row] = []
    remove = Batch.remove
    monkeypatch.setattr(
        Batch, "remove", lambda batch, rows: removed.extend(rows) or remove(batch, rows)
    )
    with scheduling(model, max_batch=4, cache_bytes=_bytes_per_slot(model) * 45) as scheduler:
        listeners = [Listener(scheduler, ids, max_tokens=30, seed=s) for s in range(4)]
        for listener in listeners:
            made = [token.id for token in listener.tokens()]
            assert made == alone(model, ids, max_tokens=30)
            assert listener.request.reused in (0, len(ids) - 1)
    again = {number for number, listener in enumerate(listeners) if listener.request.row in removed}
    assert again and 0 not in again


def test_a_conversation_is_kept_once(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORTEST_REUSE", 2)
    ids = model.engine.encode("the moon")
    for turn in range(3):
        listener = Listener(scheduler, ids, max_tokens=4)
        ids = [*ids, *(token.id for token in listener.tokens())]
        assert (listener.request.reused > 0) == (turn > 0)
    Listener(scheduler, [66, 67, 68], max_tokens=2).tokens()
    lengths = sorted(len(kept) for kept, _ in scheduler._kept)
    assert lengths == [4, len(ids) - 1]
    scheduler.close()
    assert scheduler.held_bytes == _bytes_per_slot(model) * sum(lengths)


def test_a_conversation_that_fills_the_memory_is_kept_all_the_same(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORTEST_REUSE", 2)
    with scheduling(model, max_batch=2, cache_bytes=_bytes_per_slot(model) * 45) as scheduler:
        ids = model.engine.encode(PROMPTS[1])[:10]
        made = Listener(scheduler, ids, max_tokens=30).tokens()
        longer = [*ids, *(token.id for token in made)]
        second = Listener(scheduler, longer, max_tokens=4)
        tokens = second.tokens()
    assert second.request.reused == len(longer) - 1
    assert [token.id for token in tokens] == alone(model, longer, max_tokens=4)


def test_what_was_read_of_an_answer_that_is_broken_off_is_kept(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORTEST_REUSE", 2)
    ids = model.engine.encode(PROMPTS[1])[:10]
    broken = Listener(scheduler, ids, max_tokens=50)
    first = broken._queue.get(timeout=60)
    scheduler.cancel(broken.request)
    assert isinstance(first, Token)
    longer = [*ids, first.id, 66]
    again = Listener(scheduler, longer, max_tokens=4)
    tokens = again.tokens()
    assert again.request.reused >= len(ids)
    assert [token.id for token in tokens] == alone(model, longer, max_tokens=4)


@pytest.mark.parametrize("step", ["join", "remove"])
def test_whatever_fails_no_request_is_forgotten(
    model: Model, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no more")

    ids = model.engine.encode("the moon")
    submitted = threading.Event()
    transform = model.engine.transform
    with scheduling(model, max_batch=4, cache_bytes=_bytes_per_slot(model) * 45) as scheduler:
        with monkeypatch.context() as patch:
            patch.setattr(Batch, step, fail)
            patch.setattr(
                model.engine, "transform", lambda *of: submitted.wait(60) and transform(*of)
            )
            listeners = [Listener(scheduler, ids, max_tokens=30, seed=s) for s in range(4)]
            submitted.set()
            for listener in listeners:
                with pytest.raises(MemoryError):
                    listener.tokens()
        made = [token.id for token in Listener(scheduler, ids).tokens()]
    assert made == alone(model, ids)


def test_a_failure_ends_what_runs_and_nothing_else(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise MemoryError("no more")

    ids = model.engine.encode("the moon")
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "transform", fail)
        with pytest.raises(MemoryError):
            Listener(scheduler, ids).tokens()
    assert [t.id for t in Listener(scheduler, ids).tokens()] == alone(model, ids)


def test_what_cannot_be_read_is_refused_at_once(model: Model, scheduler: Scheduler) -> None:
    with pytest.raises(UserError, match="shorten it"):
        Listener(scheduler, [65] * 65)
    with pytest.raises(UserError, match="ask for one token"):
        Listener(scheduler, [65], max_tokens=0)


def test_too_many_that_wait_are_turned_away(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    entered, go_on = threading.Event(), threading.Event()
    transform = model.engine.transform

    def held(*given: torch.Tensor) -> torch.Tensor:
        entered.set()
        assert go_on.wait(60)
        return transform(*given)

    monkeypatch.setattr(model.engine, "transform", held)
    listeners = [Listener(scheduler, [65])]
    assert entered.wait(60)
    listeners.append(Listener(scheduler, [66]))
    with pytest.raises(Busy, match="try again later"):
        Listener(scheduler, [67])
    go_on.set()
    assert all(len(listener.tokens()) == 12 for listener in listeners)


def test_closing_tells_what_runs(model: Model) -> None:
    scheduler = Scheduler(model.engine, max_batch=1, cache_bytes=2**24)
    listeners = [Listener(scheduler, [65], max_tokens=60) for _ in range(3)]
    scheduler.close()
    with pytest.raises(Busy, match="shutting down"):
        listeners[2].tokens()
    with pytest.raises(Busy, match="shutting down"):
        Listener(scheduler, [65])


def _bytes_per_slot(model: Model) -> int:
    cache = Cache()
    with torch.inference_mode():
        model.network(torch.tensor([[65, 66]]), torch.tensor([[0, 1]]), cache)
    return cache.nbytes // 2
