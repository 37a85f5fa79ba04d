"""The terminal chat: turns, commands, interruption, errors; and through a pipe, against a live router."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import TYPE_CHECKING, Any, cast

import pytest
from tests.cluster import Cluster, daemon_environ
from tests.tokenizer_zoo import write_checkpoint

from microserve.runtime.client import Client, Delta
from microserve.runtime.errors import Busy, ContextLengthExceeded, MicroserveError, PeerLost
from microserve.tools.chat import Conversation, piped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from microserve.runtime.messages import ChatMessage


class FakeStream:
    def __init__(self, items: Sequence[str | BaseException]) -> None:
        self._items = iter(items)
        self.closed = False

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def __iter__(self) -> Iterator[Delta]:
        for item in self._items:
            if isinstance(item, BaseException):
                raise item
            yield Delta(item, ())


class FakeClient:
    """Gives the scripted answers in turn; keeps what it was asked."""

    def __init__(self, *answers: Sequence[str | BaseException]) -> None:
        self._answers = iter(answers)
        self.asked: list[list[tuple[str, str]]] = []
        self.streams: list[FakeStream] = []

    def stream_chat(self, messages: list[ChatMessage], **options: Any) -> FakeStream:
        assert options == {"max_tokens": 9}
        self.asked.append([(message.role, message.content) for message in messages])
        self.streams.append(FakeStream(next(self._answers)))
        return self.streams[-1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def talk(client: FakeClient, *, system: str = "", out: io.StringIO | None = None) -> tuple[Conversation, io.StringIO]:
    out = out if out is not None else io.StringIO()
    return Conversation(cast("Client", client), "tcp://r:1", {"max_tokens": 9}, system, out), out


def test_turns_are_remembered() -> None:
    client = FakeClient(["Hel", "lo"], ["Fine"])
    conversation, out = talk(client, system="Be kind")
    assert conversation.handle("Hi")
    assert conversation.handle("  How are you? ")
    assert conversation.handle("   ")
    assert out.getvalue() == "Hello\nFine\n"
    assert client.asked == [
        [("system", "Be kind"), ("user", "Hi")],
        [("system", "Be kind"), ("user", "Hi"), ("assistant", "Hello"), ("user", "How are you?")],
    ]
    assert all(stream.closed for stream in client.streams)


def test_commands() -> None:
    client = FakeClient(["a"], ["b"], ["c"])
    conversation, out = talk(client)
    assert conversation.handle("/help")
    assert "/reset" in out.getvalue()
    assert conversation.handle("one")
    assert conversation.handle("/reset")
    assert conversation.handle("two")
    assert conversation.handle("/system Talk like a pirate")
    assert conversation.handle("three")
    assert client.asked == [
        [("user", "one")],
        [("user", "two")],
        [("system", "Talk like a pirate"), ("user", "three")],
    ]
    assert conversation.handle("/system")
    assert conversation.messages == []


def test_an_unknown_command_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    conversation, _ = talk(FakeClient())
    assert not conversation.handle("/quti now")
    assert capsys.readouterr().err == "unknown command /quti; /help lists them\n"


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    client = FakeClient(["Once upon", KeyboardInterrupt()], ["ok"])
    conversation, out = talk(client)
    assert conversation.handle("A story")
    assert client.streams[0].closed
    assert conversation.handle("Go on")
    assert out.getvalue() == "Once upon\n(stopped)\nok\n"
    assert client.asked[1] == [("user", "A story"), ("assistant", "Once upon"), ("user", "Go on")]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Busy("too many requests"), "error: too many requests\n"),
        (PeerLost("no router answers at x"), "error: no router answers at tcp://r:1; start one with `microserve up`\n"),
    ],
)
def test_an_error_takes_the_question_back(
    error: MicroserveError, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient(["fine"], ["par", error], ["ok"])
    conversation, out = talk(client)
    assert conversation.handle("one")
    assert not conversation.handle("two")
    assert capsys.readouterr().err == told
    assert conversation.handle("three")
    assert out.getvalue() == "fine\npar\nok\n"
    assert client.asked[2] == [("user", "one"), ("assistant", "fine"), ("user", "three")]


def test_a_conversation_that_is_too_long_forgets_its_oldest_messages(capsys: pytest.CaptureFixture[str]) -> None:
    too_long = ContextLengthExceeded("too long")
    client = FakeClient(["1"], ["2"], [too_long], [too_long], ["3"], [too_long], [too_long])
    conversation, out = talk(client)
    for question in ("a", "b", "c"):
        assert conversation.handle(question)
    assert out.getvalue() == "1\n2\n3\n"
    assert client.asked[4] == [("user", "c")]
    capsys.readouterr()
    assert not conversation.handle("far too long by itself")
    assert capsys.readouterr().err.splitlines()[-1] == "error: too long"
    assert conversation.turns == []


def test_control_characters_do_not_reach_a_terminal() -> None:
    answer = ["\x1b[31mred\x07\x9b", "\tok\nline"]
    conversation, out = talk(FakeClient(answer), out=Terminal())
    conversation.handle("x")
    assert out.getvalue() == "[31mred\tok\nline\n"
    conversation, out = talk(FakeClient(answer))
    conversation.handle("x")
    assert out.getvalue() == "\x1b[31mred\x07\x9b\tok\nline\n"


def test_a_pipe_answers_each_line_and_fails_when_one_failed() -> None:
    conversation, out = talk(FakeClient(["1"], [Busy("full")], ["3"]))
    assert piped(conversation, io.StringIO("a\nb\nc\n/quit\nnever\n")) == 1
    assert out.getvalue() == "1\n3\n"
    conversation, _ = talk(FakeClient(["1"]))
    assert piped(conversation, io.StringIO("a")) == 0


def test_through_a_pipe_against_a_live_router(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    args = ("--executor", "fake", "--model", str(folder), "--model-name", "m")
    with Cluster(engines=1, engine_args=args) as cluster:
        command = [
            sys.executable,
            "-P",
            "-m",
            "microserve.tools",
            "chat",
            "--router",
            cluster.router,
            "--max-tokens",
            "5",
        ]
        spoken = subprocess.run(
            command,
            input="hello\nagain\n",
            capture_output=True,
            text=True,
            timeout=60,
            env=daemon_environ(),
            check=False,
        )
        assert (spoken.returncode, spoken.stderr) == (0, "")
        assert len(spoken.stdout.splitlines()) >= 2
        wrong = subprocess.run(
            [*command, "--model", "other"],
            input="hello\n",
            capture_output=True,
            text=True,
            timeout=60,
            env=daemon_environ(),
            check=False,
        )
        assert wrong.returncode == 1
        assert "model 'other' is not served here" in wrong.stderr
