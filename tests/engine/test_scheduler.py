import threading
from collections.abc import Iterator
from queue import Queue

import pytest
import torch

from moescope.api import Model
from moescope.engine import scheduler as module
from moescope.engine.batch import Token
from moescope.engine.cache import Cache
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Busy, Request, Scheduler
from moescope.errors import UserError

PROMPTS = ["床前明月光", "the moon before my bed, is it frost?", "is", "the sun"]


@pytest.fixture
def scheduler(model: Model) -> Iterator[Scheduler]:
    made = Scheduler(model.engine, max_batch=3, cache_bytes=2**24)
    yield made
    made.close()


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


def test_rows_that_do_not_fit_together_go_one_after_the_other(model: Model) -> None:
    ids = model.engine.encode("the moon")
    per_slot = _bytes_per_slot(model)
    scheduler = Scheduler(model.engine, max_batch=4, cache_bytes=per_slot * 45)
    try:
        listeners = [Listener(scheduler, ids, max_tokens=30, seed=s) for s in range(4)]
        for listener in listeners:
            made = [token.id for token in listener.tokens()]
            assert made == alone(model, ids, max_tokens=30)
    finally:
        scheduler.close()


@pytest.mark.parametrize("slots", [3, 20])
def test_a_text_that_outgrows_the_memory_is_a_sentence(model: Model, slots: int) -> None:
    scheduler = Scheduler(model.engine, max_batch=2, cache_bytes=_bytes_per_slot(model) * slots)
    ids = model.engine.encode(PROMPTS[1])[:10]
    try:
        with pytest.raises(UserError, match="shorten the prompt or ask for fewer tokens"):
            Listener(scheduler, ids, max_tokens=50).tokens()
        assert len(Listener(scheduler, [65], max_tokens=2).tokens()) == 2
    finally:
        scheduler.close()


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
