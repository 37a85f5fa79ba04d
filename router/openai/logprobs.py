"""Log probabilities in the two shapes that the API has for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.router.text import TextModel
    from microserve.runtime.codec import TokenArray
    from microserve.runtime.messages import TokenLogprobs

_IMPOSSIBLE: Final = -9999.0
"""Stands for minus infinity, which JSON lacks."""


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)


class ChatLogprobs:
    """`{"content": [{token, logprob, bytes, top_logprobs}]}`. `top` alternatives are shown, none for 0."""

    def __init__(self, model: TextModel, top: int) -> None:
        self._model = model
        self._top = top

    def entry(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The tokens of one piece."""
        content = []
        for token, found in zip(tokens, logprobs, strict=True):
            shown = self._token(token, found.logprob)
            pairs = zip(found.top_ids[: self._top], found.top_logprobs[: self._top], strict=True)
            shown["top_logprobs"] = [self._token(other, logprob) for other, logprob in pairs]
            content.append(shown)
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._model.token_bytes(token)
        return {"token": self._model.token_text(token), "logprob": _finite(logprob), "bytes": list(data)}


class CompletionLogprobs:
    """`{tokens, token_logprobs, top_logprobs, text_offset}`. The chosen token is always among its alternatives.

    Offsets count characters of the choice's text, which begins at `start`: behind the echoed `prompt`.
    """

    def __init__(self, model: TextModel, top: int, start: int, prompt: TokenArray) -> None:
        self._model = model
        self._top = top
        self._offset = start
        self._detokenizer = model.detokenizer(prompt)

    def entry(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The tokens of one piece."""
        text = self._model.token_text
        names = [text(token) for token in tokens]
        alternatives = []
        for name, found in zip(names, logprobs, strict=True):
            pairs = zip(found.top_ids[: self._top], found.top_logprobs[: self._top], strict=True)
            top = {text(other): _finite(logprob) for other, logprob in pairs}
            top.setdefault(name, _finite(found.logprob))
            alternatives.append(top)
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.feed([token]))
        return {
            "tokens": names,
            "token_logprobs": [_finite(found.logprob) for found in logprobs],
            "top_logprobs": alternatives,
            "text_offset": offsets,
        }
