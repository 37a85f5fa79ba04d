from __future__ import annotations

import asyncio
import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tokenizer_zoo as zoo

from microserve.router.strategy import Chunk
from microserve.router.text import TextModel
from microserve.router.text_stream import TextPiece, TextStream
from microserve.runtime.errors import Cancelled, InternalError, MicroserveError, PeerLost
from microserve.runtime.messages import Generated, TokenLogprobs, Usage


@functools.cache
def model() -> TextModel:
    return TextModel(zoo.byte_level())


class Script:
    """A generation that says what it was told to say."""

    def __init__(self, *steps: Chunk | MicroserveError) -> None:
        self.steps = list(steps)
        self.cancelled = 0
        self.sufficed = 0

    def __aiter__(self) -> Script:
        return self

    async def __anext__(self) -> Chunk:
        if self.cancelled:
            raise Cancelled("cancelled")
        if not self.steps:
            raise StopAsyncIteration
        step = self.steps.pop(0)
        if isinstance(step, MicroserveError):
            raise step
        return step

    def cancel(self) -> None:
        self.cancelled += 1

    def suffice(self) -> None:
        self.sufficed += 1


def ids(text: str) -> list[int]:
    return [int(token) for token in model().encode(text)]


def finish(reason: str, completion: int, *, stop_token: int | None = None) -> Generated:
    return Generated(
        finish_reason=reason,
        usage=Usage(prompt_tokens=3, completion_tokens=completion, cached_tokens=2),
        stop_token=stop_token,
    )


def read(generation: Script, **options: object) -> list[TextPiece]:
    async def run() -> list[TextPiece]:
        stream = TextStream(generation, model(), model().encode("a b"), **options)  # type: ignore[arg-type]
        return [piece async for piece in stream]

    return asyncio.run(run())


def test_pieces_carry_text_tokens_and_the_end() -> None:
    first, second = ids("Hello"), ids(" world")
    generation = Script(Chunk(first), Chunk(second), Chunk([], finish=finish("stop", 4, stop_token=2)))
    pieces = read(generation)
    assert [piece.text for piece in pieces] == ["Hello", " world", ""]
    assert [piece.tokens for piece in pieces] == [first, second, []]
    assert [piece.finish_reason for piece in pieces] == [None, None, "stop"]
    assert pieces[-1].usage == Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=2)
    assert pieces[-1].stop == 2
    assert generation.cancelled == 0


def test_text_held_back_comes_with_the_end() -> None:
    planet = ids("🪐")
    pieces = read(Script(Chunk(planet[:-1]), Chunk([], finish=finish("length", 3))))
    assert [piece.text for piece in pieces] == ["", "\ufffd"]


def test_a_stop_string_cancels_and_counts_exactly() -> None:
    tokens = ids("one STOP two")
    logprobs = [TokenLogprobs(-float(at)) for at in range(len(tokens))]
    generation = Script(Chunk(tokens, logprobs), Chunk(ids("never")))
    pieces = read(generation, stop=["STOP"])
    assert len(pieces) == 1
    (piece,) = pieces
    kept = len(piece.tokens)
    assert piece.text == "one "
    assert model().decode(tokens[:kept]).startswith("one STOP")
    assert "STOP" not in model().decode(tokens[: kept - 1])
    assert piece.logprobs == logprobs[:kept]
    assert (piece.finish_reason, piece.stop) == ("stop", "STOP")
    assert piece.usage == Usage(prompt_tokens=len(ids("a b")), completion_tokens=kept)
    assert (generation.sufficed, generation.cancelled) == (1, 0)


def test_a_stop_string_can_be_included() -> None:
    pieces = read(Script(Chunk(ids("one STOP two"))), stop=["STOP"], include_stop=True)
    assert [piece.text for piece in pieces] == ["one STOP"]


def test_a_stop_string_in_the_last_chunk_wins_over_its_reason() -> None:
    tokens = ids("xSTOPy")
    pieces = read(Script(Chunk(tokens, finish=finish("length", len(tokens)))), stop=["STOP"])
    assert [(piece.text, piece.finish_reason) for piece in pieces] == [("x", "stop")]
    assert pieces[0].usage is not None
    assert pieces[0].usage.cached_tokens == 2


def test_half_a_stop_string_comes_out_at_the_end() -> None:
    pieces = read(Script(Chunk(ids("xST")), Chunk([], finish=finish("length", 3))), stop=["STOP"])
    assert [piece.text for piece in pieces] == ["x", "ST"]


def test_stop_strings_wait_for_min_tokens() -> None:
    tokens = ids("aSTOPbSTOPc")
    first = next(at for at in range(len(tokens) + 1) if "STOP" in model().decode(tokens[:at]))
    early = read(Script(Chunk(tokens)), stop=["STOP"], min_tokens=first)
    late = read(Script(Chunk(tokens)), stop=["STOP"], min_tokens=first + 1)
    assert [piece.text for piece in early] == ["a"]
    assert [piece.text for piece in late] == ["aSTOPb"]


@settings(deadline=None)
@given(
    text=st.text(alphabet="abé🪐 ", max_size=30),
    stop=st.text(alphabet="abé🪐 ", min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 5), max_size=30),
)
def test_however_tokens_are_grouped_the_outcome_is_the_same(text: str, stop: str, sizes: list[int]) -> None:
    tokens = ids(text)
    chunks, at = [], 0
    for size in [*sizes, len(tokens) + 1]:
        chunks.append(Chunk(tokens[at : at + size]))
        at += size
    chunks[-1].finish = finish("length", len(tokens))
    pieces = read(Script(*chunks), stop=[stop])
    shown = "".join(piece.text for piece in pieces)
    before, found, _ = text.partition(stop)
    assert shown == before
    assert pieces[-1].finish_reason == ("stop" if found else "length")
    count = sum(len(piece.tokens) for piece in pieces)
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == count
    assert count == len(tokens) if not found else stop in model().decode(tokens[:count])


def test_errors_pass_through_once() -> None:
    async def run() -> None:
        stream = TextStream(Script(Chunk(ids("x")), PeerLost("gone")), model(), model().encode("a"))
        assert (await stream.__anext__()).text == "x"
        with pytest.raises(PeerLost, match="gone"):
            await stream.__anext__()
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()

    asyncio.run(run())


def test_a_generation_that_just_ends_is_a_bug() -> None:
    with pytest.raises(InternalError, match="without saying why"):
        read(Script(Chunk(ids("x"))))
