"""The checkpoint's chat template: messages in, the model's own prompt text out, in a sandbox.

The environment is the one that `transformers` gives its templates: block trimming, loop controls, `raise_exception`,
`strftime_now`, a `tojson` that leaves text unescaped, and `{% generation %}` blocks, which mark training masks and
render as their content.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from microserve.runtime.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2.parser import Parser


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`: the part that a model is trained on; here it is plain content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class ChatTemplate:
    """One compiled template. Raises `CheckpointError` when it does not compile; `where` names the file for messages."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, where: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"{where}: the chat template does not compile (line {error.lineno}): {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: object,
    ) -> str:
        """The prompt text for `messages` (each with `role` and `content`).

        `continue_final_message` ends the text right behind the last message's content, so that the model goes on
        with it. Raises `InvalidRequest` with the template's own words when it does not accept the messages.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message exclude each other", param="continue_final_message"
            )
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **{**self._special_tokens, **variables},
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            # A template is a program: whatever it trips over, it tripped over these messages.
            raise InvalidRequest(
                f"the model's chat template does not accept these messages: {error}", param="messages"
            ) from error
        if continue_final_message:
            return _end_behind(text, str(messages[-1]["content"]))
        return text


def _end_behind(text: str, content: str) -> str:
    """`text` up to the end of its last occurrence of `content`; templates often strip what they are given."""
    stripped = content.strip()
    at = text.rfind(stripped)
    if not stripped or at < 0:
        raise InvalidRequest(
            "continue_final_message: the chat template does not show the last message as it was given",
            param="continue_final_message",
        )
    kept = content.lstrip()
    return text[: at + len(kept)] if text.startswith(kept, at) else text[: at + len(stripped)]
