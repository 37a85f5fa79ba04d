"""`microserve chat`: a conversation with a served model, in a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, TextIO

from microserve.runtime.client import Client
from microserve.runtime.errors import ContextLengthExceeded, MicroserveError
from microserve.runtime.messages import ChatMessage
from microserve.tools.common import (
    CONNECT_TIMEOUT,
    CommandFailed,
    add_key_option,
    add_router_option,
    command_parser,
    errors_told,
    explain,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.runtime.client import Options

HELP = """\
/help           show this
/system TEXT    set the system prompt (without TEXT: remove it) and start over
/reset          forget the conversation
/quit           leave (as Ctrl-D does)
Ctrl-C stops an answer."""

# A model's text may hold control characters, and a terminal obeys them.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 0, or 1 when no router answers or (through a pipe) an answer failed."""
    parser = command_parser("chat", "Chat with a served model. Through a pipe: a message a line, an answer each.")
    add_router_option(parser)
    add_key_option(parser)
    parser.add_argument("--model", default="", metavar="NAME", help="the model (default: the router's first)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest (default: 0)")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="makes a temperature's choices repeatable")
    options = parser.parse_args(argv)
    sampling: Options = {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    try:
        with (
            errors_told("chat", options.router),
            Client(options.router, connect_timeout=CONNECT_TIMEOUT, key_file=options.key_file) as client,
        ):
            conversation = Conversation(client, options.router, sampling, options.system, sys.stdout)
            return interactive(conversation) if sys.stdin.isatty() else piped(conversation, sys.stdin)
    except CommandFailed as failed:
        return failed.code


def interactive(conversation: Conversation) -> int:
    """Read messages from the terminal until Ctrl-D or /quit."""
    with contextlib.suppress(ImportError):
        # Importing it gives `input` a history and editing; some Pythons are built without.
        import readline  # noqa: F401
    print("Type a message; /help lists commands, Ctrl-D leaves.")
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return 0
        if line.strip() == "/quit":
            return 0
        conversation.handle(line)


def piped(conversation: Conversation, lines: TextIO) -> int:
    """Answer each line; 1 when one of them failed."""
    failed = False
    for line in lines:
        if line.strip() == "/quit":
            break
        failed |= not conversation.handle(line.rstrip("\n"))
    return int(failed)


class Conversation:
    """The messages so far, and what a typed line does to them."""

    def __init__(self, client: Client, endpoint: str, options: Options, system: str, out: TextIO) -> None:
        self._client = client
        self._endpoint = endpoint
        self._options = options
        self._out = out
        self._system = system
        self.turns: list[ChatMessage] = []

    @property
    def messages(self) -> list[ChatMessage]:
        """What the model is sent."""
        return [ChatMessage("system", self._system), *self.turns] if self._system else list(self.turns)

    def handle(self, line: str) -> bool:
        """Answer a message, or obey a command. Whether it went well."""
        text = line.strip()
        if not text:
            return True
        if text.startswith("/"):
            return self._command(*text.split(maxsplit=1))
        return self._answer(text)

    def _command(self, command: str, argument: str = "") -> bool:
        if command == "/help":
            print(HELP, file=self._out)
        elif command == "/reset":
            self.turns.clear()
            print("(forgotten)", file=self._out)
        elif command == "/system":
            self._system = argument
            self.turns.clear()
            print("(the conversation starts over)", file=self._out)
        else:
            print(f"unknown command {command}; /help lists them", file=sys.stderr)
            return False
        return True

    def _answer(self, text: str) -> bool:
        before = len(self.turns)
        self.turns.append(ChatMessage("user", text))
        while True:
            said: list[str] = []
            try:
                self._stream(said)
            except ContextLengthExceeded as error:
                if len(self.turns) < 3:
                    return self._failed(error, said, before)
                # The oldest exchange goes: a question and its answer.
                del self.turns[:2]
                before -= 2
                print("(too long: the oldest messages are forgotten)", file=sys.stderr)
            except MicroserveError as error:
                return self._failed(error, said, before)
            except KeyboardInterrupt:
                print("\n(stopped)", file=self._out)
                break
            else:
                print(file=self._out)
                break
        self.turns.append(ChatMessage("assistant", "".join(said)))
        return True

    def _stream(self, said: list[str]) -> None:
        terminal = self._out.isatty()
        with self._client.stream_chat(self.messages, **self._options) as stream:
            for delta in stream:
                said.append(delta.text)
                self._out.write(delta.text.translate(_CONTROLS) if terminal else delta.text)
                self._out.flush()

    def _failed(self, error: MicroserveError, said: list[str], before: int) -> bool:
        if said:
            print(file=self._out)
        print(f"error: {explain(error, self._endpoint)}", file=sys.stderr)
        # The question is taken back: the conversation is what it was, and can go on.
        del self.turns[before:]
        return False
