"""Who is read when, on texts that nobody computes."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st

from moescope.engine.blocks import Blocks
from moescope.engine.sampling import Choice, SamplingParams
from moescope.engine.scheduler import CHUNK_OF_MANY, TURN, Chunk, Scheduler
from moescope.engine.sequence import Sequence


class Echo:
    """Writes nothing and never stops."""

    found = None

    def write(self, token_id: int, *, final: bool) -> tuple[str, bool]:
        return "", False


def text(ids: int | list[int], room: int = 4, request: object = None) -> Sequence:
    ids = list(range(ids)) if isinstance(ids, int) else ids
    params = SamplingParams(max_tokens=room)
    return Sequence(list(ids), params, room, request=request or object(), writer=Echo())  # type: ignore[arg-type]


def advance(scheduler: Scheduler, chunks: list[Chunk]) -> list[Sequence]:
    """Do what the engine does with chunks, but for the computing; return who was given a token."""
    given = [chunk.sequence for chunk in chunks if chunk.is_last]
    for chunk in chunks:
        assert chunk.count > 0 and chunk.start == chunk.sequence.read
        scheduler.advance(chunk)
    for sequence in given:
        sequence.append(Choice(7, 0.0))
        if sequence.ended:
            scheduler.remove(sequence)
    scheduler.blocks.moves.clear()
    return given


def run(scheduler: Scheduler, until: Callable[[], bool] = lambda: False) -> int:
    """Step until everything has ended; return how many steps that took."""
    steps = 0
    while scheduler and not until():
        advance(scheduler, scheduler.schedule())
        steps += 1
        assert steps < 10_000
    return steps


def test_a_prompt_is_read_in_chunks_beside_what_runs() -> None:
    scheduler = Scheduler(Blocks(4), chunk=10)
    short, long = text(3, room=50), text([9] * 35)
    scheduler.add(short)
    advance(scheduler, scheduler.schedule())
    scheduler.add(long)
    counts: list[list[tuple[Sequence, int, bool]]] = []
    while long.is_new:
        chunks = scheduler.schedule()
        counts.append([(chunk.sequence, chunk.count, chunk.is_single) for chunk in chunks])
        advance(scheduler, chunks)
    assert counts == [[(short, 1, True), (long, count, False)] for count in (10, 10, 10, 5)]


def test_a_chunk_is_smaller_beside_texts_that_are_continued() -> None:
    scheduler = Scheduler(Blocks(4), chunk=10, chunk_beside=4)
    first, second = text([1] * 25, room=50), text([2] * 9, room=50)
    scheduler.add(first)
    scheduler.add(second)
    counts: list[list[tuple[Sequence, int]]] = []
    for _ in range(6):
        chunks = scheduler.schedule()
        counts.append([(chunk.sequence, chunk.count) for chunk in chunks])
        advance(scheduler, chunks)
    beside = [[(second, 1), (first, count)] for count in (4, 4, 4, 2)]
    assert counts == [[(first, 10)], [(second, 9), (first, 1)], *beside]


def test_a_cancelled_text_is_read_no_further_and_its_blocks_come_back() -> None:
    scheduler = Scheduler(Blocks(4), max_running=1, chunk=8)
    running, waiting, stays = text(20, room=9), text(5), text([3] * 6)
    for each in (running, waiting, stays):
        scheduler.add(each)
    advance(scheduler, scheduler.schedule())
    assert running.blocks and scheduler.running == [running]
    running.cancelled = waiting.cancelled = True
    chunks = scheduler.schedule()
    assert [chunk.sequence for chunk in chunks] == [stays]
    assert not running.blocks and not scheduler.waiting
    run(scheduler)
    assert stays.ended and not running.ended and not waiting.ended
    assert scheduler.blocks.held == 0 and not scheduler


def test_a_request_of_many_texts_takes_no_more_than_its_share() -> None:
    scheduler = Scheduler(Blocks(4), max_running=8, chunk=64)
    crowd = [text([at, 1, 2], room=300, request="crowd") for at in range(128)]
    for each in crowd:
        scheduler.add(each)
    for _ in range(20):
        advance(scheduler, scheduler.schedule())
    assert len(scheduler.running) == 8
    alone = text(10, room=20, request="alone")
    scheduler.add(alone)
    waited = run(scheduler, until=lambda: not alone.is_new)
    assert waited == 1
    assert run(scheduler, until=lambda: alone.ended) == 19
    run(scheduler)
    assert all(each.ended and len(each.ids) == 303 for each in crowd)
    assert scheduler.blocks.held == 0


def test_a_prompt_is_read_without_those_of_a_crowd() -> None:
    scheduler = Scheduler(Blocks(4), max_running=8, chunk=512, chunk_beside=100)
    for at in range(20):
        scheduler.add(text([at] * 200, room=3, request="crowd"))
    first = scheduler.schedule()
    assert sum(chunk.count for chunk in first) == CHUNK_OF_MANY
    advance(scheduler, first)
    alone = text([99] * 30, room=3, request="alone")
    scheduler.add(alone)
    chunks = scheduler.schedule()
    assert [chunk.sequence for chunk in chunks if not chunk.is_single] == [alone]
    advance(scheduler, chunks)
    assert len(alone.ids) == 31
    assert {chunk.sequence.request for chunk in scheduler.schedule()} == {"crowd", "alone"}


@pytest.mark.parametrize("steps", [3, 40])
@pytest.mark.parametrize("places", [8, 50])
def test_a_crowd_that_fills_the_cache_makes_room_for_another(steps: int, places: int) -> None:
    scheduler = Scheduler(Blocks(4, limit=60), max_running=places, chunk=64)
    crowd = [text([at, 1, 2], room=60, request="crowd") for at in range(40)]
    for each in crowd:
        scheduler.add(each)
    for _ in range(steps):
        advance(scheduler, scheduler.schedule())
    alone = text([99] * 80, room=8, request="alone")
    scheduler.add(alone)
    assert run(scheduler, until=lambda: not alone.is_new) <= 2
    assert run(scheduler, until=lambda: alone.ended) == 7
    run(scheduler)
    assert all(each.ended and len(each.ids) == 63 for each in crowd)
    assert scheduler.blocks.held == 0


def test_requests_of_equal_right_take_turns_where_places_are_few() -> None:
    scheduler = Scheduler(Blocks(4), max_running=2, chunk=64)
    texts = [text([at], room=200, request=at) for at in range(5)]
    for each in texts:
        scheduler.add(each)
    for _ in range(250):
        advance(scheduler, scheduler.schedule())
    lengths = [len(each.ids) for each in texts]
    assert max(lengths) - min(lengths) <= 2 * TURN
    run(scheduler)
    assert {len(each.ids) for each in texts} == {201}


def test_a_short_prompt_is_read_before_the_rest_of_a_long_one() -> None:
    scheduler = Scheduler(Blocks(16), max_running=4, chunk=32)
    long = text(10_000, room=1)
    scheduler.add(long)
    for _ in range(3):
        advance(scheduler, scheduler.schedule())
    short = text([5] * 20, room=1)
    scheduler.add(short)
    advance(scheduler, scheduler.schedule())
    assert short.ended and not long.ended
    run(scheduler)
    assert long.ended


def test_texts_that_begin_alike_share_blocks() -> None:
    scheduler = Scheduler(Blocks(4, least_copied=2), chunk=64)
    first = text(11, room=8)
    scheduler.add(first)
    run(scheduler, until=lambda: len(first.ids) == 14)
    twin = text(11, room=2)
    scheduler.add(twin)
    scheduler.schedule()
    assert twin.blocks[:2] == first.blocks[:2] and twin.blocks[2] != first.blocks[2]
    assert (twin.reused, twin.read) == (10, 10)
    move = next(move for move in scheduler.blocks.moves if move.tokens)
    assert (move.block, move.source, move.tokens) == (twin.blocks[2], first.blocks[2], 2)


def test_a_conversation_is_read_from_where_it_went_on() -> None:
    scheduler = Scheduler(Blocks(4, least_copied=1), chunk=64)
    ids = [1, 2, 3, 4, 5]
    for turn in range(4):
        each = text(ids, room=3)
        scheduler.add(each)
        run(scheduler)
        assert each.reused == (0 if not turn else len(ids) - 2)
        ids = [*each.ids, 40 + turn]


@pytest.mark.parametrize(("new", "is_made", "singly"), [(5, True, 5), (6, True, 0), (5, False, 0)])
def test_a_short_turn_of_a_conversation_is_read_one_by_one(
    new: int, is_made: bool, singly: int
) -> None:
    scheduler = Scheduler(Blocks(4, least_copied=1), chunk=64, short_turn=5)
    first = text(9, room=4 if is_made else 1)
    scheduler.add(first)
    run(scheduler)
    told = first.ids[:-1]  # the last that was made was never read
    turn = text([*told, *([99] * new)], room=3)
    scheduler.add(turn)
    chunks = scheduler.schedule()
    assert [chunk.count for chunk in chunks if chunk.is_single] == [1] * singly
    assert sum(chunk.count for chunk in chunks) == new
    assert turn.reused == len(told)
    advance(scheduler, chunks)
    scheduler._evict(turn)  # what was read one by one is read so again
    read: Counter[bool] = Counter()
    while turn.unread > 1:
        chunks = scheduler.schedule()
        read.update({chunk.is_single: chunk.count for chunk in chunks})
        assert all(c.is_single == (c.start >= turn.given) for c in chunks)
        advance(scheduler, chunks)
    assert turn.given == (len(told) if singly else turn.prompt_tokens)
    run(scheduler)
    assert turn.ended and scheduler.blocks.held == 0


def test_what_a_text_has_made_so_far_is_not_what_a_conversation_goes_on_from() -> None:
    scheduler = Scheduler(Blocks(16), short_turn=5)
    first = text(9, room=5)
    scheduler.add(first)
    for made in range(1, 4):
        advance(scheduler, scheduler.schedule())
        begun = text([*first.ids[: first.read], 1])
        scheduler.blocks.begin(begun)
        assert (begun.read, first.read) == (9, 8 + made) and not scheduler.blocks.goes_on(begun)
        scheduler.blocks.release(begun)
    scheduler._evict(first)
    scheduler.blocks.begin(begun)
    assert begun.read == 9
    scheduler.blocks.release(begun)
    run(scheduler)
    begun = text([*first.ids[:-1], 1])
    scheduler.blocks.begin(begun)
    assert begun.read == 13 and scheduler.blocks.goes_on(begun)


def test_texts_of_other_salt_share_nothing() -> None:
    scheduler = Scheduler(Blocks(4, least_copied=1), chunk=64)
    for salt in (b"", b"steered", b"", b"steered"):
        each = text(9, room=1)
        each.salt = salt
        scheduler.add(each)
        run(scheduler)
    assert each.reused == 8
    other = text(9, room=1)
    other.salt = b"otherwise"
    scheduler.add(other)
    run(scheduler)
    assert other.reused == 0


def test_what_was_longest_unused_makes_room() -> None:
    scheduler = Scheduler(Blocks(4, limit=6, least_copied=1), chunk=64)
    for start in (10, 20, 30):  # two blocks each
        scheduler.add(text([start] * 8, room=1))
        run(scheduler)
    scheduler.add(text([40] * 8, room=1))
    run(scheduler)
    found: list[int] = []
    for start in (30, 10):
        each = text([start] * 8, room=1)
        scheduler.blocks.begin(each)
        found.append(each.read)
        scheduler.blocks.release(each)
    assert found == [7, 0]


def test_more_than_there_is_room_for_is_read_again_later() -> None:
    scheduler = Scheduler(Blocks(4, limit=8), max_running=4, chunk=16)
    texts = [text([at] * 10, room=15, request=at) for at in range(4)]
    for each in texts:
        scheduler.add(each)
    read: Counter[Sequence] = Counter()
    while scheduler:
        chunks = scheduler.schedule()
        assert chunks
        read.update({chunk.sequence: chunk.count for chunk in chunks})
        advance(scheduler, chunks)
    assert all(each.ended and len(each.ids) == 25 for each in texts)
    assert max(read.values()) > 24  # somebody was read twice


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_block_is_lost_or_lent_twice(data: st.DataObject) -> None:
    size, limit = data.draw(st.integers(1, 5)), data.draw(st.integers(3, 12))
    blocks = Blocks(size, limit, least_copied=data.draw(st.integers(1, 4)))
    chunk, beside = (data.draw(st.none() | st.integers(1, 20)) for _ in range(2))
    running = data.draw(st.integers(1, 5))
    scheduler = Scheduler(blocks, max_running=running, chunk=chunk, chunk_beside=beside)
    added: list[Sequence] = []
    for _ in range(data.draw(st.integers(1, 60))):
        if data.draw(st.booleans()):
            ids = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=limit * size))
            room = data.draw(st.integers(1, limit * size + 1 - len(ids)))
            added.append(text(ids, room, request=data.draw(st.integers(0, 3))))
            scheduler.add(added[-1])
        if added and data.draw(st.integers(0, 9)) == 0:
            data.draw(st.sampled_from(added)).cancelled = True
        chunks = scheduler.schedule()
        check(scheduler, chunks)
        advance(scheduler, chunks)
    run(scheduler)
    assert all(each.ended or each.cancelled for each in added)
    assert blocks.held == 0 and blocks.count - 1 <= limit


def check(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    blocks = scheduler.blocks
    holders = Counter(b for each in [*scheduler.running, *scheduler.waiting] for b in each.blocks)
    assert blocks.held == len(holders) and 0 not in holders
    assert all(blocks._blocks[block].holders == count for block, count in holders.items())
    for one in chunks:  # what is written is nobody else's, and there is a block for it
        sequence, end = one.sequence, one.start + one.count
        assert end <= len(sequence.blocks) * blocks.size
        written = sequence.blocks[one.start // blocks.size : -(-end // blocks.size)]
        assert all(holders[block] == 1 for block in written)
    assert [one.is_single for one in chunks] == sorted((o.is_single for o in chunks), reverse=True)
    assert bool(chunks) == bool(scheduler)


@pytest.mark.parametrize("size", [3, 4])
def test_known_beginnings_hold_what_the_text_says(size: int) -> None:
    """Carry ids through moves, as the cache carries keys."""
    blocks = Blocks(size, limit=9, least_copied=1)
    scheduler, content = Scheduler(blocks, max_running=3, chunk=5), {0: [None] * size}
    texts = [text([1, 2, 1, 1, 2, 2, at % 3, at], room=5, request=at % 4) for at in range(30)]
    for each in texts:
        scheduler.add(each)
    while scheduler:
        chunks = scheduler.schedule()
        for move in blocks.moves:
            content[move.block] = [*content[move.source][: move.tokens]]
            content[move.block] += [None] * (size - move.tokens)
        for one in chunks:
            for place in range(one.start, one.start + one.count):
                block = one.sequence.blocks[place // size]
                content[block][place % size] = one.sequence.ids[place]
        for one in chunks:
            held = [c for block in one.sequence.blocks for c in content[block]]
            assert held[: one.start + one.count] == one.sequence.ids[: one.start + one.count]
        advance(scheduler, chunks)
    assert sum(each.reused for each in texts) > 60
