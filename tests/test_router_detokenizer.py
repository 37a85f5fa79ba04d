from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests import tokenizer_zoo as zoo

from microserve.router.detokenizer import PieceDetokenizer, WindowDetokenizer
from microserve.router.text import TextModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokenizers import Tokenizer

KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": zoo.byte_level,
    "byte-fallback": zoo.byte_fallback,
    "metaspace": zoo.metaspace,
    "metaspace-first": functools.partial(zoo.metaspace, "first"),
    "metaspace-never": functools.partial(zoo.metaspace, "never"),
}
CUTS = st.lists(st.integers(1, 4), max_size=60)
quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()


@functools.cache
def model_of(kind: str) -> TextModel:
    return TextModel(tokenizer_of(kind))


def stream(model: TextModel, ids: Sequence[int], cuts: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    """The texts that come out when `ids` arrive in portions of `cuts` tokens (then one at a time)."""
    detokenizer = model.detokenizer(context)
    texts = []
    at = 0
    for size in [*cuts, *[1] * len(ids)]:
        if at >= len(ids):
            break
        texts.append(detokenizer.feed(ids[at : at + size]))
        at += size
    texts.append(detokenizer.finish())
    return texts


def token_id(kind: str, name: str) -> int:
    found = tokenizer_of(kind).token_to_id(name)
    assert found is not None
    return found


def reference(kind: str, ids: Sequence[int]) -> str:
    return tokenizer_of(kind).decode(list(ids), skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(data=st.data(), cuts=CUTS)
def test_random_tokens_stream_as_the_tokenizer_decodes_them(kind: str, data: st.DataObject, cuts: list[int]) -> None:
    size = tokenizer_of(kind).get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 3), max_size=40))
    whole = reference(kind, ids)
    got = "".join(stream(model_of(kind), ids, cuts))
    if kind == "byte-fallback" and "\ufffd" in whole:
        # The tokenizer gives up a whole run of bytes when one of them is wrong; we lose only the wrong ones.
        assert len(got.encode()) > 0
        assert [part for part in whole.split("\ufffd") if part] == [
            part for part in whole.split("\ufffd") if part and part in got
        ]
    else:
        assert got == whole


@pytest.mark.parametrize("kind", KINDS)
@quick
@example(text="日本😀é", cuts=[])
@given(text=st.text(max_size=60), cuts=CUTS)
def test_any_text_streams_without_a_broken_character(kind: str, text: str, cuts: list[int]) -> None:
    ids = tokenizer_of(kind).encode(text, add_special_tokens=False).ids
    texts = stream(model_of(kind), ids, cuts)
    assert "".join(texts) == reference(kind, ids)
    if kind == "byte-level":
        assert "".join(texts) == text
        # A broken character would show as U+FFFD, and the text's own ones are as many as it has.
        assert sum(piece.count("\ufffd") for piece in texts) == text.count("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(text=st.text(max_size=40), at=st.integers(0, 40))
def test_a_stream_continues_its_prompt(kind: str, text: str, at: int) -> None:
    ids = tokenizer_of(kind).encode("the fox " + text, add_special_tokens=False).ids
    at = min(at + 1, len(ids))
    before, after = ids[:at], ids[at:]
    whole = reference(kind, ids)
    got = "".join(stream(model_of(kind), after, [], context=before))
    head = model_of(kind).decode(before)
    # A prompt that ends within a character: the stream shows that character whole.
    assert whole == head.rstrip("\ufffd") + got or whole == head + got


def test_a_character_comes_with_its_last_byte() -> None:
    model = model_of("byte-level")
    alphabet = {model.token_bytes(token): token for token in range(tokenizer_of("byte-level").get_vocab_size())}
    ids = [alphabet[bytes([byte])] for byte in "🦊".encode()]
    detokenizer = model.detokenizer()
    assert [detokenizer.feed([token]) for token in ids] == ["", "", "", "🦊"]
    assert detokenizer.finish() == ""


def test_an_unfinished_character_shows_only_at_the_end() -> None:
    model = model_of("byte-fallback")
    start = token_id("byte-fallback", "<0xF0>")
    detokenizer = model.detokenizer()
    assert detokenizer.feed([start]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_wrong_bytes_cost_only_themselves() -> None:
    ids = [token_id("byte-fallback", f"<0x{byte:02X}>") for byte in [0xFF, *"é".encode(), 0x80]]
    assert stream(model_of("byte-fallback"), ids, []) == ["\ufffd", "", "é", "\ufffd", ""]


def test_the_prefix_space_goes_only_at_the_beginning_of_a_text() -> None:
    model = model_of("byte-fallback")
    word = token_id("byte-fallback", "▁the")
    bos = token_id("byte-fallback", "<s>")
    assert stream(model, [word, word], []) == ["the", " the", ""]
    assert stream(model, [word], [], context=[bos]) == ["the", ""]
    assert stream(model, [word], [], context=[bos, word]) == [" the", ""]
    assert stream(model, [word], [], context=[word, *[bos] * 20]) == [" the", ""]


def test_special_tokens_can_be_shown() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = [token_id("byte-level", "<s>"), *tokenizer.encode("hi", add_special_tokens=False).ids]
    assert model_of("byte-level").decode(ids) == "hi"
    assert model_of("byte-level").decode(ids, skip_special_tokens=False) == "<s>hi"


@quick
@given(text=st.sampled_from(zoo.CORPUS), cuts=CUTS)
def test_a_decoder_that_looks_at_neighbours_goes_through_the_window(text: str, cuts: list[int]) -> None:
    tokenizer = zoo_wordpiece()
    model = TextModel(tokenizer)
    assert isinstance(model.detokenizer(), WindowDetokenizer)
    ids = tokenizer.encode(text).ids
    assert "".join(stream(model, ids, cuts)) == tokenizer.decode(ids)


@functools.cache
def zoo_wordpiece() -> Tokenizer:
    return zoo.wordpiece()


def test_a_window_waits_for_no_character_that_never_comes() -> None:
    tokenizer = tokenizer_of("byte-level")
    lone = tokenizer.encode("é", add_special_tokens=False).ids[-1:]
    assert model_of("byte-level").token_bytes(lone[0]) != b""
    continuation = next(token for token in range(600) if model_of("byte-level").token_bytes(token) == b"\xa9")
    detokenizer = WindowDetokenizer(tokenizer)
    texts = [detokenizer.feed([continuation]) for _ in range(100)]
    assert "".join(texts).count("\ufffd") >= 96
    assert "".join(texts) + detokenizer.finish() == "\ufffd" * 100


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "metaspace"])
def test_a_token_costs_the_same_however_long_the_text_is(kind: str) -> None:
    detokenizer = model_of(kind).detokenizer()
    assert isinstance(detokenizer, PieceDetokenizer)
    ids = tokenizer_of(kind).encode("the quick fox " * 20, add_special_tokens=False).ids

    def seconds(rounds: int) -> float:
        began = time.process_time()
        for _ in range(rounds):
            for token in ids:
                detokenizer.feed((token,))
        return time.process_time() - began

    seconds(5)
    early = min(seconds(5) for _ in range(5))
    seconds(200)
    late = min(seconds(5) for _ in range(5))
    assert late < 5 * early
