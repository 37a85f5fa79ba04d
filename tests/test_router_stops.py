from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.router.stops import MAX_STOP_LENGTH, MAX_STOPS, StopScanner, checked_stops
from microserve.runtime.errors import InvalidRequest

LETTERS = st.text(alphabet="abc\n", max_size=30)
STOPS = st.lists(st.text(alphabet="abc\n", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop that is complete first (of those that end together, the longest), and that stop."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def pieces(text: str, cuts: list[int]) -> list[str]:
    found, at = [], 0
    for cut in cuts:
        found.append(text[at : at + cut])
        at += cut
    return [*found, text[at:]]


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 4), max_size=20))
def test_the_outcome_is_that_of_a_naive_search_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    scanner = StopScanner(stops)
    shown = ""
    expected, stop = naive(text, stops)
    for piece in pieces(text, cuts):
        shown += scanner.feed(piece)
        assert expected.startswith(shown)
    assert scanner.matched == stop
    assert shown + scanner.flush() == expected


@given(text=LETTERS, stops=STOPS)
def test_nothing_is_held_back_longer_than_needed(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    seen, shown = "", ""
    for character in text:
        seen += character
        shown += scanner.feed(character)
        if scanner.matched is not None:
            return
        held = seen[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_across_pieces() -> None:
    scanner = StopScanner(["<end>"])
    assert [scanner.feed(piece) for piece in ["one <", "e", "x <en", "d> two"]] == ["one ", "", "<ex ", ""]
    assert scanner.matched == "<end>"
    assert scanner.feed("more") == ""
    assert scanner.flush() == ""


def test_an_ignored_stop_does_not_count_later_but_one_that_it_began_does() -> None:
    scanner = StopScanner(["ab", "xaby", "by"])
    assert scanner.feed("xab", ignore=True) == ""
    assert scanner.feed("q") == "xabq"
    assert scanner.feed("xab", ignore=True) == ""
    assert scanner.feed("y") == ""
    assert scanner.matched == "xaby"


def test_what_looked_like_a_stop_comes_out_at_the_end() -> None:
    scanner = StopScanner(["stop"])
    assert scanner.feed("do not sto") == "do not "
    assert scanner.flush() == "sto"


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ([""], "must not be empty"),
        (["x" * (MAX_STOP_LENGTH + 1)], "at most 1000 characters"),
        ([str(number) for number in range(MAX_STOPS + 1)], "at most 16 stop strings, not 17"),
    ],
)
def test_stops_are_bounded(stops: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        checked_stops(stops)
    assert caught.value.param == "stop"


def test_repeated_stops_count_once() -> None:
    assert checked_stops(["a"] * 20 + ["b"]) == ("a", "b")
