"""Who reads which rows, against dealing them out one by one."""

from hypothesis import given
from hypothesis import strategies as st

from embtab.datasets.dealing import Deal, cut, size, within

DEALS = st.builds(
    Deal,
    rows=st.integers(0, 200),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 20),
    workers=st.integers(1, 4),
    drop_last=st.booleans(),
)


def one_by_one(deal: Deal) -> list[list[list[int]]]:
    """By batch and rank: positions, taken from a pile of cards."""
    pile, dealt = list(range(deal.rows)), []
    while len(pile) >= deal.world_size * (deal.batch_size if deal.drop_last else 1):
        each = min(deal.batch_size, len(pile) // deal.world_size)
        dealt.append([[pile.pop(0) for _ in range(each)] for _ in range(deal.world_size)])
        if each < deal.batch_size:
            break
    return dealt


@given(DEALS)
def test_batches_and_ranks(deal):
    dealt = one_by_one(deal)
    assert len(deal) == len(dealt)
    for batch, hands in enumerate(dealt):
        start, stop = deal.positions(batch, batch + 1)
        assert list(range(start, stop)) == [position for hand in hands for position in hand]
        ranks = deal.ranks(start, stop).tolist()
        assert ranks == [rank for rank, hand in enumerate(hands) for _ in hand]


@given(DEALS, st.integers(0, 60))
def test_what_is_left_is_what_no_worker_was_asked_for(deal, done):
    done = min(done, len(deal))
    shares = [iter(range(*deal.share(worker))) for worker in range(deal.workers)]
    taken = [next(shares[i % deal.workers]) for i in range(done)]  # a DataLoader asks its workers in turn
    assert sorted(set(taken)) == sorted(taken)
    for worker, rest in enumerate(shares):
        assert list(range(*deal.rest(worker, done))) == list(rest)
    dealt = one_by_one(deal)
    gone = {position for batch in taken for hand in dealt[batch] for position in hand}
    left = [position for low, high in deal.left(done) for position in range(low, high)]
    assert left == [position for position in range(deal.rows) if position not in gone]


RANGES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5).map(
    lambda steps: [(sum(map(sum, steps[:i])) + gap, sum(map(sum, steps[: i + 1]))) for i, (gap, _) in enumerate(steps)]
)


@given(RANGES, st.integers(0, 60), st.integers(0, 60))
def test_ranges_laid_end_to_end(ranges, start, stop):
    laid = [position for low, high in ranges for position in range(low, high)]
    assert size(ranges) == len(laid)
    assert [p for low, high in cut(ranges, start, stop) for p in range(low, high)] == laid[start:stop]
    found = [(row + i, first + i) for row, first, end in within(ranges, start, stop) for i in range(end - first)]
    assert found == [(row, at) for at, row in enumerate(laid) if start <= row < stop]
