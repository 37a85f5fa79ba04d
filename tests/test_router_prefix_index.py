"""The router's guess of what engines hold, against a model that is nothing but sets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.router.prefix_index import PrefixIndex, page_names
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import InternalError

PAGE = 4


def names(*tokens: int, model: str = "m") -> list[int]:
    return page_names(model, pack_tokens(tokens), PAGE)


def test_whole_pages_have_names_that_depend_on_all_before() -> None:
    assert names(1, 2, 3) == []
    assert len(names(*range(11))) == 2
    assert names(*range(11)) == names(*range(8))
    first, other = names(1, 2, 3, 4, 9, 9, 9, 9), names(1, 2, 3, 5, 9, 9, 9, 9)
    assert len({*first, *other}) == 4
    assert names(1, 2, 3, 4, model="m") != names(1, 2, 3, 4, model="n")
    assert page_names("m", pack_tokens([1, 2, 3, 4]), 2)[:1] != names(1, 2, 3, 4)


def test_each_engine_has_its_own_longest_prefix() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    prompt = names(*range(16))
    index.record("a", prompt)
    index.record("b", prompt[:2])
    index.record("c", names(*range(100, 116)))
    assert index.match(prompt) == {"a": 4, "b": 2}
    assert index.match(names(*range(8), 99, 99, 99, 99)) == {"a": 2, "b": 2}
    assert index.match(names(7, 7, 7, 7)) == {}
    assert index.match([]) == {}
    assert [index.depth(engine, prompt) for engine in "abcd"] == [4, 2, 0, 0]


def test_the_last_page_of_the_oldest_prompt_is_forgotten_first() -> None:
    index: PrefixIndex[str] = PrefixIndex(capacity=6)
    old, new = names(*range(16)), names(*range(50, 62))
    index.record("a", old)
    index.record("a", new)
    assert (index.depth("a", old), index.depth("a", new)) == (3, 3)
    index.record("a", old[:1])
    index.record("b", names(*range(90, 98)))
    assert (len(index), index.depth("a", old), index.depth("a", new)) == (6, 1, 3)
    index.check_integrity()


def test_what_an_incarnation_held_is_gone_with_it() -> None:
    index: PrefixIndex[tuple[str, int]] = PrefixIndex()
    prompt = names(*range(16))
    index.record(("a", 1), prompt)
    index.record(("b", 1), prompt[:1])
    index.forget(("a", 1))
    index.forget(("a", 1))
    assert index.match(prompt) == {("b", 1): 1}
    index.record(("a", 2), prompt[:2])
    assert index.match(prompt) == {("a", 2): 2, ("b", 1): 1}
    index.check_integrity()


def test_many_incarnations_leave_nothing_behind() -> None:
    index: PrefixIndex[int] = PrefixIndex()
    lasting, passing = names(1, 2, 3, 4), names(5, 6, 7, 8)
    index.record(-1, lasting)
    for epoch in range(1000):
        index.record(epoch, passing)
        assert index.match(passing) == {epoch: 1}
        index.forget(epoch)
        index.check_integrity()
    assert index.match(passing) == {}
    assert index.match(lasting) == {-1: 1}
    assert max(index._pages.values()) < 1 << 80


def test_a_page_can_be_dropped() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    prompt = names(*range(16))
    index.record("a", prompt)
    index.record("b", prompt[:2])
    for engine in "aabc":
        index.drop(engine, prompt[1])
        index.check_integrity()
    index.drop("a", 1)
    assert index.match(prompt) == {"a": 1, "b": 1}
    index.record("a", prompt[:2])
    # What stood behind is found again.
    assert index.match(prompt) == {"a": 4, "b": 1}


def test_an_index_that_is_wrong_is_found_out() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    index.record("a", names(1, 2, 3, 4))
    index._pages[5] = 2
    with pytest.raises(InternalError, match="held by 10, of 1"):
        index.check_integrity()
    with pytest.raises(InternalError):
        PrefixIndex(0)


Prompts = st.lists(st.integers(0, 1), max_size=6)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.one_of(st.none(), Prompts)), max_size=30), Prompts)
def test_it_agrees_with_sets(steps: list[tuple[str, list[int] | None]], asked: list[int]) -> None:
    """Without a limit in reach: each engine holds every prefix of what was recorded since it was last forgotten."""
    index: PrefixIndex[str] = PrefixIndex()
    held: dict[str, set[tuple[int, ...]]] = {engine: set() for engine in "abc"}

    def pages(prompt: list[int]) -> list[int]:
        return page_names("m", pack_tokens(prompt), 1)

    for engine, prompt in steps:
        if prompt is None:
            index.forget(engine)
            held[engine].clear()
        else:
            index.record(engine, pages(prompt))
            held[engine].update(tuple(prompt[:length]) for length in range(1, len(prompt) + 1))
        index.check_integrity()
    expected = {
        engine: max(length for length in range(len(asked) + 1) if length == 0 or tuple(asked[:length]) in prefixes)
        for engine, prefixes in held.items()
    }
    assert index.match(pages(asked)) == {engine: depth for engine, depth in expected.items() if depth}
    assert {engine: index.depth(engine, pages(asked)) for engine in "abc"} == expected
