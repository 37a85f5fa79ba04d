from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tokenizer_zoo as zoo

from microserve.router.chat_template import ChatTemplate
from microserve.router.text import INLINE_CHARACTERS, TextModel
from microserve.runtime.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def model(tmp_path: Path) -> TextModel:
    return TextModel.load(zoo.write_checkpoint(tmp_path))


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>"}, where="here")


BYTE_LEVEL = TextModel(zoo.byte_level())


@settings(deadline=None)
@given(st.text())
def test_text_survives_a_round_trip(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


def test_ids_are_int32_and_special_tokens_are_optional() -> None:
    model = TextModel(zoo.byte_fallback())
    with_bos, without = model.encode("the"), model.encode("the", add_special_tokens=False)
    assert with_bos.dtype.name == "int32"
    assert with_bos.tolist() == [1, *without.tolist()]


def test_truncation_in_the_file_is_not_applied(tmp_path: Path) -> None:
    tokenizer = zoo.byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    model = TextModel.load(zoo.write_checkpoint(tmp_path, tokenizer))
    assert model.decode(model.encode("The quick brown fox")) == "The quick brown fox"


def test_long_texts_are_encoded_off_the_loop(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    plain = model.encode

    def encode(text: str, add_special_tokens: bool = True) -> object:
        threads.append(threading.current_thread() is threading.main_thread())
        return plain(text, add_special_tokens)

    monkeypatch.setattr(model, "encode", encode)
    long = "x" * (INLINE_CHARACTERS + 1)

    async def run() -> None:
        short = await model.aencode("hello")
        assert short.tolist() == plain("hello").tolist()
        assert (await model.aencode(long)).tolist() == plain(long).tolist()

    asyncio.run(run())
    assert threads == [True, False]


def test_the_lock_is_free_while_a_long_text_is_encoded() -> None:
    """Otherwise a thread would be no better than the loop."""
    text = " ".join(zoo.CORPUS) * 3000

    async def run() -> tuple[int, int]:
        turns = 0
        encoding = asyncio.ensure_future(BYTE_LEVEL.aencode(text))
        while not encoding.done():
            await asyncio.sleep(0)
            turns += 1
        return turns, len(encoding.result())

    turns, tokens = asyncio.run(run())
    assert tokens > 100_000
    assert turns > 20


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        BYTE_LEVEL.encode("a\ud800")


def test_token_texts_tell_half_characters_apart() -> None:
    half = [token for token in range(5, 300) if BYTE_LEVEL.token_text(token).startswith("bytes:")]
    assert len({BYTE_LEVEL.token_text(token) for token in half}) == len(half) >= 128
    assert BYTE_LEVEL.token_text(1) == "<s>"
    assert BYTE_LEVEL.token_bytes(1) == b"<s>"


# --- files


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not found"):
        TextModel.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        TextModel.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_configuration_is_named(tmp_path: Path, content: str) -> None:
    zoo.write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: "):
        TextModel.load(tmp_path)


def test_end_of_sequence_ids_come_from_who_knows_best(tmp_path: Path) -> None:
    zoo.write_checkpoint(tmp_path)
    assert TextModel.load(tmp_path).eos_token_ids == (2,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert TextModel.load(tmp_path).eos_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 2]}))
    assert TextModel.load(tmp_path).eos_token_ids == (4, 2)


# --- chat


def test_chat_is_rendered_with_the_checkpoints_template(model: TextModel) -> None:
    assert model.render_chat(USER) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert model.render_chat(USER, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_special_tokens_of_a_rendered_chat_are_single_ids(model: TextModel) -> None:
    ids = model.encode(model.render_chat(USER), add_special_tokens=False).tolist()
    assert ids[0] == 3
    assert ids.count(3) == 2
    assert ids.count(4) == 1


def test_a_final_message_can_be_continued(model: TextModel) -> None:
    messages = [*USER, {"role": "assistant", "content": " I think "}]
    text = model.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\n I think ")
    with pytest.raises(InvalidRequest, match="exclude each other"):
        model.render_chat(messages, continue_final_message=True)


def test_the_jinja_file_wins_and_named_templates_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}default"}]
    zoo.write_checkpoint(tmp_path, chat_template=named)
    assert TextModel.load(tmp_path).render_chat(USER) == "<s>default"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}file")
    assert TextModel.load(tmp_path).render_chat(USER) == "</s>file"


@pytest.mark.parametrize("value", [3, [], [{"name": "other", "template": "x"}]])
def test_an_unusable_template_setting_is_named(tmp_path: Path, value: object) -> None:
    zoo.write_checkpoint(tmp_path, chat_template=value)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is neither"):
        TextModel.load(tmp_path)


def test_a_template_that_does_not_compile_is_named_with_its_line(tmp_path: Path) -> None:
    zoo.write_checkpoint(tmp_path, chat_template="a\n{% if %}")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: .* does not compile \(line 2\)"):
        TextModel.load(tmp_path)


def test_a_model_without_a_template_says_so_when_chat_is_asked(tmp_path: Path) -> None:
    model = TextModel.load(zoo.write_checkpoint(tmp_path, chat_template=None))
    assert not model.has_chat_template
    with pytest.raises(InvalidRequest, match="has no chat template") as caught:
        model.render_chat(USER)
    assert caught.value.param == "messages"


def test_template_helpers() -> None:
    assert re.fullmatch(r"\d{4}", template("{{ strftime_now('%Y') }}").render(USER))
    assert template("{{ {'a': '<é>'} | tojson }}").render(USER) == '{"a": "<é>"}'
    assert template("{% for m in messages %}{% break %}{% endfor %}x").render(USER) == "x"
    assert template("{% if true %}\n  {% if true %}\nx\n{% endif %}\n{% endif %}\n").render(USER) == "x\n"
    assert template("{% generation %}{{ messages[0].content }}{% endgeneration %}").render(USER) == "hi"
    assert template("{{ tools is none }}{{ flag }}").render(USER, flag=1) == "True1"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 + 'x' }}", "unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
    ],
)
def test_what_a_template_refuses_is_the_callers_error(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        template(source).render(USER)
    assert caught.value.param == "messages"


def test_no_messages_are_refused(model: TextModel) -> None:
    with pytest.raises(InvalidRequest, match="must not be empty"):
        model.render_chat([])
