"""A model's text side: its tokenizer and its chat template, read from the checkpoint's folder."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from tokenizers import Tokenizer

from microserve.router.chat_template import ChatTemplate
from microserve.router.detokenizer import Detokenizer, PieceDetokenizer, PieceTable, WindowDetokenizer, piece_table
from microserve.runtime.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from microserve.runtime.codec import TokenArray

INLINE_CHARACTERS = 8192
"""Longer texts are tokenised in a thread: at about 4 MB/s this many take 2 ms, the most the loop should stand still."""

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TextModel:
    """Text to token ids and back. Immutable apart from caches; safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        eos_token_ids: tuple[int, ...] = (),
        name: str = "",
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self.name = name
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        special = frozenset(token for token, entry in added.items() if entry.special)
        decoder = json.loads(tokenizer.to_str()).get("decoder")
        self._table: PieceTable | None = piece_table(tokenizer, decoder, special)
        self._full_table: PieceTable | None = piece_table(tokenizer, decoder, frozenset())
        self._token_texts: dict[int, str] = {}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json of a folder.

        Only the first is required. Raises `CheckpointError` that names the file. Takes up to seconds: not for the loop.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file}: not found; the router needs a checkpoint's tokenizer.json")
        try:
            tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # `tokenizers` raises bare Exception for anything that it cannot read
            raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
        settings = _read_json(folder / "tokenizer_config.json")
        names = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **settings})
        found = _template_source(folder, settings)
        template = ChatTemplate(found[1], names, where=str(found[0])) if found is not None else None
        return cls(tokenizer, template=template, eos_token_ids=_eos_ids(folder, tokenizer, names), name=folder.name)

    # --- text to ids

    def encode(self, text: str, add_special_tokens: bool = True) -> TokenArray:
        """Token ids of `text`, int32 [n]. `add_special_tokens` adds what the tokenizer puts around a text (BOS)."""
        # The batch call releases the interpreter lock while it works, and skips the offsets that nobody reads.
        try:
            encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest("the text holds a lone surrogate, which no tokenizer can encode") from error
        return np.array(encoding.ids, dtype=np.int32)

    async def aencode(self, text: str, add_special_tokens: bool = True) -> TokenArray:
        """`encode`, in a thread when the text is long."""
        if len(text) <= INLINE_CHARACTERS:
            return self.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: object,
    ) -> str:
        """The prompt text of a conversation; it holds its own BOS, so encode it without special tokens.

        Raises `InvalidRequest` when the model has no chat template, or when the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest(
                f"model {self.name!r} has no chat template; use completions, or a checkpoint with a template",
                param="messages",
            )
        if not messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )

    # --- ids to text

    def decode(self, ids: Sequence[int] | TokenArray, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, as the stream of a `detokenizer` over all of them would be. Unknown ids are skipped."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        tokens = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        return detokenizer.feed(tokens) + detokenizer.finish()

    def detokenizer(self, context: Sequence[int] | TokenArray = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental detokenizer. `context` are the tokens that stand before: the prompt."""
        table = self._table if skip_special_tokens else self._full_table
        if table is None:
            return WindowDetokenizer(self._tokenizer, context, skip_special_tokens=skip_special_tokens)  # type: ignore[arg-type]
        return PieceDetokenizer(table, context)  # type: ignore[arg-type]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for, special or not; for decoders that need neighbours, of it alone."""
        if self._full_table is not None:
            return self._full_table.raw(token)
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()

    def token_text(self, token: int) -> str:
        """`token` alone as text. Half characters show as "bytes:\\xe2\\x82": different tokens stay different."""
        text = self._token_texts.get(token)
        if text is None:
            data = self.token_bytes(token)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._token_texts[token] = text
        return text


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: a JSON object is expected")
    return value


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like by name; a value is a string, or an object with `content`."""
    names = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            names[name] = value
    return names


def _template_source(folder: Path, settings: Mapping[str, Any]) -> tuple[Path, str] | None:
    """The template and where it came from. chat_template.jinja wins over tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file, file.read_text(encoding="utf-8")
    where = folder / "tokenizer_config.json"
    value = settings.get("chat_template")
    if value is None:
        return None
    if isinstance(value, str):
        return where, value
    # Several named templates: {"name": …, "template": …}; "default" is the one for plain conversations.
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
                return where, entry["template"]
    raise CheckpointError(f"{where}: chat_template is neither a text nor a list with one named 'default'")


def _eos_ids(folder: Path, tokenizer: Tokenizer, names: Mapping[str, str]) -> tuple[int, ...]:
    """generation_config.json knows best, then config.json, then the tokenizer's `eos_token`."""
    for file in ("generation_config.json", "config.json"):
        value = _read_json(folder / file).get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value:
            return tuple(int(token) for token in value)
    token = tokenizer.token_to_id(names["eos_token"]) if "eos_token" in names else None
    return () if token is None else (token,)
