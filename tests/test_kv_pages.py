"""Page states, counts, and runs of adjacent free pages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kv.pages import IntegrityError, PageAllocator, PageArray, PageState

FREE, OWNED, CACHED, LEASED, QUARANTINED = PageState


def counts(pages: PageAllocator) -> list[int]:
    return [pages.count(state) for state in PageState]


def taken(pages: PageAllocator, count: int, state: PageState = OWNED) -> PageArray:
    result = pages.take(count, state)
    assert result is not None
    return result


def test_a_fresh_pool_gives_adjacent_pages_until_there_are_none() -> None:
    pages = PageAllocator(8)
    assert taken(pages, 5).tolist() == [0, 1, 2, 3, 4]
    assert counts(pages) == [3, 5, 0, 0, 0]
    assert pages.take(4, OWNED) is None
    assert counts(pages) == [3, 5, 0, 0, 0]
    assert taken(pages, 3).tolist() == [5, 6, 7]
    assert taken(pages, 0).tolist() == []
    pages.check_integrity()


def test_runs_that_touch_are_merged_and_a_long_run_is_preferred() -> None:
    pages = PageAllocator(10)
    everything = taken(pages, 10)
    for page in (1, 3, 5, 6, 7, 8):
        pages.move(everything[page : page + 1], OWNED, FREE)
    pages.check_integrity()
    assert taken(pages, 3).tolist() == [5, 6, 7]
    assert sorted(taken(pages, 3).tolist()) == [1, 3, 8]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(OWNED, CACHED), (CACHED, FREE)], [8, 0, 0, 0, 0]),
        ([(OWNED, FREE)], [8, 0, 0, 0, 0]),
    ],
)
def test_owned_pages_move_along_the_drawn_arrows(steps: list[tuple[PageState, PageState]], expected: list[int]) -> None:
    pages = PageAllocator(8)
    held = taken(pages, 3)
    for origin, target in steps:
        pages.move(held, origin, target)
    assert counts(pages) == expected
    pages.check_integrity()


@pytest.mark.parametrize("target", [FREE, OWNED, CACHED, QUARANTINED])
def test_leased_pages_may_become_anything(target: PageState) -> None:
    pages = PageAllocator(4)
    held = taken(pages, 2, LEASED)
    pages.move(held, LEASED, target)
    assert pages.count(target) == (4 if target is FREE else 2)
    if target is QUARANTINED:
        pages.move(held, QUARANTINED, FREE)
        assert counts(pages) == [4, 0, 0, 0, 0]
    pages.check_integrity()


@pytest.mark.parametrize(
    ("origin", "target"), [(FREE, OWNED), (CACHED, OWNED), (OWNED, QUARANTINED), (QUARANTINED, OWNED), (OWNED, LEASED)]
)
def test_an_arrow_that_is_not_drawn_is_refused(origin: PageState, target: PageState) -> None:
    with pytest.raises(IntegrityError, match=f"{origin.name} to {target.name}"):
        PageAllocator(4).move(np.array([0], dtype=np.int32), origin, target)


def test_a_wrong_state_and_a_page_named_twice_change_nothing() -> None:
    pages = PageAllocator(4)
    held = taken(pages, 2)
    with pytest.raises(IntegrityError, match="should be OWNED"):
        pages.move(np.array([0, 3], dtype=np.int32), OWNED, FREE)
    with pytest.raises(IntegrityError, match="twice"):
        pages.move(np.array([0, 0], dtype=np.int32), OWNED, FREE)
    assert counts(pages) == [2, 2, 0, 0, 0]
    pages.move(held, OWNED, FREE)
    pages.check_integrity()


def test_check_integrity_finds_a_page_that_was_lost() -> None:
    pages = PageAllocator(4)
    taken(pages, 1)
    pages._states[0] = CACHED
    with pytest.raises(IntegrityError, match="pages by state"):
        pages.check_integrity()


def test_counts_alone_are_compared_when_it_shall_be_quick() -> None:
    pages = PageAllocator(4)
    own = taken(pages, 2)
    assert pages.astray(np.arange(4, dtype=np.int32), OWNED).tolist() == sorted({0, 1, 2, 3} - set(own.tolist()))
    pages._states[0] = CACHED
    pages.check_integrity(deep=False)
    pages._counts[OWNED] -= 1
    with pytest.raises(IntegrityError, match="states add up to"):
        pages.check_integrity(deep=False)
    pages._counts[OWNED], pages._counts[FREE] = -1, 5
    with pytest.raises(IntegrityError, match="states add up to"):
        pages.check_integrity(deep=False)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60), st.randoms(use_true_random=False))
def test_any_history_keeps_every_page_in_one_place(history: list[tuple[bool, int]], random: object) -> None:
    pages = PageAllocator(40)
    held: list[int] = []
    for take, count in history:
        if take:
            got = pages.take(count, OWNED)
            assert (got is None) == (count > 40 - len(held))
            if got is not None:
                assert not set(got.tolist()) & set(held)
                held.extend(got.tolist())
        else:
            random.shuffle(held)  # type: ignore[attr-defined]
            back, held = held[:count], held[count:]
            pages.move(np.array(back, dtype=np.int32), OWNED, FREE)
        pages.check_integrity()
    assert counts(pages)[:2] == [40 - len(held), len(held)]
