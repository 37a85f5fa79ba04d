"""Token ids to text, one token at a time, without ever showing half a character.

Most tokenizers decode to a string of bytes, token by token: byte-level BPE maps each token to its bytes, and
SentencePiece-like ones (prefix space, byte fallback) do so too, apart from what they do to the very first token. Those
get a `PieceTable`, and a step costs one look-up and one UTF-8 decode. Whatever else a tokenizer's decoder does
(WordPiece, CTC, regular expressions) goes through the tokenizer itself, over a short window of tokens.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_MAX_WINDOW: Final = 24
"""Tokens that a window may hold back. A character has at most 4 bytes: a longer wait is for one that never comes."""
_PRIMING_TOKENS: Final = 8


class Decodes(Protocol):
    """The part of a tokenizer that detokenisation needs."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def id_to_token(self, id: int) -> str | None: ...


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, the rest is moved to U+0100 upward."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    moved = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + offset): byte for offset, byte in enumerate(moved)})
    return alphabet


class PieceTable:
    """The bytes behind each token id, worked out once per id.

    `special` ids are the ones that `skip_special_tokens` leaves out.
    `drop_leading` is what a decoder does to the first token of a text: "" nothing, "one" removes one leading space,
    "all" removes every space that the first token's markers stand for.
    """

    __slots__ = ("_convert", "_tokenizer", "drop_leading", "marker", "pieces", "special")

    def __init__(
        self,
        tokenizer: Decodes,
        convert: Callable[[str], bytes],
        *,
        special: frozenset[int],
        drop_leading: str = "",
        marker: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        self._convert = convert
        self.special = special
        self.drop_leading = drop_leading
        self.marker = marker
        self.pieces: dict[int, bytes] = {}
        """What text is made of: special tokens are empty here, and so are ids that the vocabulary lacks."""

    def fill(self, token: int) -> bytes:
        """Adds and returns `pieces[token]`."""
        piece = b"" if token in self.special else self.raw(token)
        self.pieces[token] = piece
        return piece

    def raw(self, token: int) -> bytes:
        """The bytes of `token`, special or not."""
        name = self._tokenizer.id_to_token(token)
        return b"" if name is None else self._convert(name)

    def first(self, token: int) -> bytes:
        """The bytes of `token` (not special) where it opens a text."""
        if self.drop_leading == "all":
            name = self._tokenizer.id_to_token(token)
            return b"" if name is None else self._convert(name.replace(self.marker, ""))
        piece = self.raw(token)
        return piece[1:] if self.drop_leading == "one" and piece.startswith(b" ") else piece

    def opens_text(self, token: int) -> bool:
        """Whether `token` counts as a text's first token."""
        return token not in self.special and self._tokenizer.id_to_token(token) is not None


def piece_table(tokenizer: Decodes, decoder: Mapping[str, Any] | None, special: frozenset[int]) -> PieceTable | None:
    """The table for a `decoder` as tokenizer.json describes it, or None when it does not decode token by token."""
    steps = _steps(decoder)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        alphabet = _byte_level_alphabet()

        def from_byte_level(name: str) -> bytes:
            # A token with a character outside the alphabet is an added one, and stands for itself.
            try:
                return bytes([alphabet[character] for character in name])
            except KeyError:
                return name.encode()

        return PieceTable(tokenizer, from_byte_level, special=special)
    replaced: list[tuple[str, str]] = []
    fallback, fused, drop, marker = False, False, "", ""
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                not fallback and not fused
            ):
                replaced.append((old, new))
            case {"type": "ByteFallback"} if not fused:
                fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if fused and not drop:
                drop = "one"
            case {"type": "Metaspace", "replacement": str(old)} if not fallback and not fused and not replaced:
                marker = old
                replaced.append((old, " "))
                drop = "" if step.get("prepend_scheme", "always") == "never" else "all"
            case _:
                return None
    if not steps or (not replaced and not fallback):
        return None

    def from_marked(name: str) -> bytes:
        if fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            try:
                return bytes([int(name[3:5], 16)])
            except ValueError:
                pass
        for old, new in replaced:
            name = name.replace(old, new)
        return name.encode()

    return PieceTable(tokenizer, from_marked, special=special, drop_leading=drop, marker=marker)


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if not decoder:
        return []
    if decoder.get("type") == "Sequence":
        return [inner for step in decoder.get("decoders", ()) for inner in _steps(step)]
    return [decoder]


class Detokenizer(Protocol):
    """Text of a growing list of tokens. The joined results are the whole text; none ends within a character."""

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete."""
        ...

    def finish(self) -> str:
        """What was held back: bytes that never became a character, as U+FFFD."""
        ...


class PieceDetokenizer:
    """By table: O(1) a token. `context` are the tokens before, whose text is not repeated.

    Where bytes are not UTF-8 each maximal wrong part becomes one U+FFFD, and the characters around it survive.
    """

    __slots__ = ("_fill", "_opening", "_pending", "_pieces", "_table")

    def __init__(self, table: PieceTable, context: Sequence[int] = ()) -> None:
        self._table = table
        self._pieces = table.pieces
        self._fill = table.fill
        self._pending = b""
        self._opening = bool(table.drop_leading)
        if len(context):
            # A character that the context began is shown whole once it is complete. Only the last bytes matter.
            self.feed([int(token) for token in context[-_PRIMING_TOKENS:]])
            if self._opening:
                self._opening = not any(table.opens_text(int(token)) for token in context)

    def feed(self, tokens: Sequence[int]) -> str:
        data = self._open(tokens) if self._opening else self._join(tokens)
        if self._pending:
            data = self._pending + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def _join(self, tokens: Sequence[int]) -> bytes:
        pieces = self._pieces
        try:
            return pieces[tokens[0]] if len(tokens) == 1 else b"".join([pieces[token] for token in tokens])
        except KeyError:
            for token in tokens:
                if token not in pieces:
                    self._fill(token)
            return b"".join([pieces[token] for token in tokens])

    def _open(self, tokens: Sequence[int]) -> bytes:
        """Bytes of tokens among which the text's first one may be."""
        for at, token in enumerate(tokens):
            if self._table.opens_text(token):
                self._opening = False
                return self._table.first(token) + self._join(tokens[at + 1 :])
        return b""

    def finish(self) -> str:
        text, _ = codecs.utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class WindowDetokenizer:
    """Through the tokenizer's own `decode`, over the tokens since the last text was given out and a few before them.

    What a token adds is the difference that it makes to the window's text, so decoders that look at neighbours work.
    """

    __slots__ = ("_decode", "_read", "_skip", "_window")

    def __init__(self, tokenizer: Decodes, context: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._decode = tokenizer.decode
        self._skip = skip_special_tokens
        self._window = [int(token) for token in context[-_PRIMING_TOKENS:]]
        self._read = len(self._window)

    def feed(self, tokens: Sequence[int]) -> str:
        parts = []
        for token in tokens:
            self._window.append(token)
            parts.append(self._advance(final=False))
        return "".join(parts)

    def finish(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._window[: self._read], skip_special_tokens=self._skip)
        after = self._decode(self._window, skip_special_tokens=self._skip)
        waiting = len(self._window) - self._read
        if not final and after.endswith(REPLACEMENT) and waiting < _MAX_WINDOW:
            return ""
        if not final and len(after) <= len(before):
            return ""
        del self._window[: max(0, self._read - _PRIMING_TOKENS)]
        self._read = len(self._window)
        return after[len(before) :]
