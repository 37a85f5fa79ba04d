"""What UCX says of itself: which transport it chose for remote writes, and its warnings.

Asked to (UCX_PROTO_INFO), UCX writes a table into its log whenever it has chosen how to do an operation over a new kind
of connection. That is the only place where it tells. Its log is kept in memory here, and read by us alone.

    | engine-1:5f0c intra-node cfg#1                           |
    | remote memory write by ucp_put* from host memory to host |
    | Range  | Description |              Config               |
    | 0..inf | zero-copy   | cma/memory                        |
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_VARIABLES: Final = ("UCX_LOG_FILE", "UCX_PROTO_INFO")
_PREFIX: Final = re.compile(r"^\[\d+\.\d+\] \[[^\]]*\] +")
_TITLE: Final = re.compile(r"^(\S+) (self|intra-node|inter-node) cfg#\d+$")
_WRITE: Final = re.compile(r"^remote memory write by ucp_put\S* from (\S+)")
_WARNING: Final = re.compile(r"\bUCX +(WARN|ERROR|FATAL)\b *(.*)$")
_KINDS: Final = (
    ("cuda_ipc", re.compile(r"\bcuda_ipc\b")),
    ("rdma", re.compile(r"\b(rc|dc|ud|gga|srd)(_\w+)?/")),
    ("shm", re.compile(r"\b(cma|xpmem|knem|posix|sysv)\b")),
    ("tcp", re.compile(r"\btcp\b")),
    ("cuda_copy", re.compile(r"\bcuda_copy\b")),
    ("local", re.compile(r"\bself\b")),
)
"""Our word for a way, and how UCX writes it: what comes first decides where several do the work together."""

_KEPT: Final = 1 << 20
"""Bytes of the log that may stay in memory after they were read."""


@dataclass(frozen=True, slots=True)
class WriteChoice:
    """How `agent` writes to peers that are `relation` ("self", "intra-node", "inter-node") from `memory`."""

    agent: str
    relation: str
    memory: str
    """"host" or "cuda"."""
    kind: str


class TableReader:
    """Reads UCX's log line by line; a table may come in pieces."""

    def __init__(self) -> None:
        self._agent = self._relation = self._memory = ""

    def read(self, lines: Iterable[str]) -> tuple[list[WriteChoice], list[str]]:
        """The choices and the warnings among the next lines."""
        choices: list[WriteChoice] = []
        warnings: list[str] = []
        for line in lines:
            text = _PREFIX.sub("", line.strip())
            if (warning := _WARNING.search(text)) is not None:
                warnings.append(warning[2].strip())
            elif text.startswith("|") and (choice := self._row(text)) is not None:
                choices.append(choice)
        return choices, warnings

    def _row(self, text: str) -> WriteChoice | None:
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        if (title := _TITLE.match(cells[0])) is not None:
            self._agent, self._relation, self._memory = title[1], title[2], ""
        elif (write := _WRITE.match(cells[0])) is not None:
            self._memory = "cuda" if write[1].startswith("cuda") else "host"
        elif self._memory and len(cells) == 3 and cells[0].endswith("inf"):
            # The row of the largest sizes: pages are large.
            memory, self._memory = self._memory, ""
            return WriteChoice(self._agent, self._relation, memory, _kind(cells[2]))
        return None


def _kind(config: str) -> str:
    return next((kind for kind, pattern in _KINDS if pattern.search(config)), config)


class UcxJournal:
    """UCX's log of this process, in memory. Made before UCX is loaded; `settled` when it has been.

    An operator's own UCX_LOG_FILE is left alone: then nothing is known here.
    """

    def __init__(self) -> None:
        self.choices: list[WriteChoice] = []
        self._offset = self._given_back = 0
        self._reader = TableReader()
        self._rest = b""
        self._file: int | None = None
        if all(name not in os.environ for name in _VARIABLES):
            self._file = os.memfd_create("ucx-log")
            os.environ["UCX_LOG_FILE"] = f"/proc/self/fd/{self._file}"
            os.environ["UCX_PROTO_INFO"] = "y"

    def settled(self) -> None:
        """UCX has opened its log. A child process must not find these: the number means another file there."""
        if self._file is not None:
            for name in _VARIABLES:
                os.environ.pop(name, None)

    def read(self) -> list[str]:
        """Takes in what is new; the new warnings."""
        if self._file is None:
            return []
        found = b""
        while chunk := os.pread(self._file, 1 << 16, self._offset):
            found += chunk
            self._offset += len(chunk)
        if not found:
            return []
        if self._offset - self._given_back > _KEPT:
            # What was read is given back. UCX writes on where it was, behind a hole.
            os.ftruncate(self._file, 0)
            self._given_back = self._offset
        *lines, self._rest = (self._rest + found).split(b"\n")
        choices, warnings = self._reader.read(line.decode(errors="replace") for line in lines)
        self.choices += choices
        return warnings

    def kind(self, agent: str, relation: str, memory: str) -> str:
        """What carries the writes of `agent` to such a peer; empty when UCX did not say, or said several things."""
        kinds = {
            choice.kind
            for choice in self.choices
            if (choice.agent, choice.relation, choice.memory) == (agent, relation, memory)
        }
        return kinds.pop() if len(kinds) == 1 else ""
