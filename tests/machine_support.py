"""Made-up machines for the checks of `microserve doctor`: files below a root, programs that answer as told."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from microserve.tools.checks.machine import Machine, Ran

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from microserve.tools.checks.finding import Finding

INFINITE = resource.RLIM_INFINITY
PYTHON = sys.executable


@dataclass
class Programs:
    """Programs that answer as told, whatever they are asked; `asked` is what they were."""

    answers: dict[str, Ran | list[Ran]]

    def __post_init__(self) -> None:
        self.asked: list[list[str]] = []

    def find(self, name: str) -> str | None:
        return name if name in self.answers else None

    def run(self, command: Sequence[str], _seconds: float) -> Ran:
        self.asked.append(list(command))
        answer = self.answers[command[0]]
        return answer.pop(0) if isinstance(answer, list) else answer


def machine(root: Path, *, files: dict[str, str] | None = None, **answers: Ran | list[Ran]) -> Machine:
    """A machine of some files and programs. `python` stands for this Python, and "_" in a program's name for "-"."""
    for name, text in (files or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    named = {PYTHON if name == "python" else name.replace("_", "-"): answer for name, answer in answers.items()}
    programs = Programs(named)
    return Machine(root, environ={}, home=root / "home", find=programs.find, run=programs.run, limit=unlimited)


def unlimited(_which: int) -> tuple[int, int]:
    return INFINITE, INFINITE


def told(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    return [(finding.status, finding.message) for finding in findings]


def only(findings: Sequence[Finding]) -> Finding:
    (finding,) = findings
    return finding


GPU = {"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": ""}
