"""The machine that is looked at: its files below a root, its programs and its limits. Tests give a made-up one."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ended; `late`: it did not, and was killed."""

    code: int
    out: str = ""
    err: str = ""
    late: bool = False

    @property
    def last_words(self) -> str:
        """The last line of what it complained."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1].strip() if lines else f"exit code {self.code}"


def run_program(command: Sequence[str], seconds: float) -> Ran:
    """Runs a program for at most so long. Raises `OSError` when it cannot be started."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired as late:
        return Ran(-1, _text(late.stdout), _text(late.stderr), late=True)
    return Ran(done.returncode, done.stdout, done.stderr)


def _text(stream: str | bytes | None) -> str:
    # What a program that was killed had written is bytes, whatever was asked for.
    return stream.decode(errors="replace") if isinstance(stream, bytes) else stream or ""


@dataclass(frozen=True)
class Machine:
    """`root` is "/" but in tests. `seconds`: how long a program that is asked may take."""

    root: Path = Path("/")
    seconds: float = 5.0
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    home: Path = field(default_factory=Path.home)
    user: int = field(default_factory=os.geteuid)
    find: Callable[[str], str | None] = shutil.which
    run: Callable[[Sequence[str], float], Ran] = run_program
    limit: Callable[[int], tuple[int, int]] = resource.getrlimit

    def program(self, *command: str) -> Ran | None:
        """Runs a program if it is installed."""
        if (found := self.find(command[0])) is None:
            return None
        return self.run([found, *command[1:]], self.seconds)

    def python(self, *arguments: str) -> Ran:
        """Runs this Python in a process of its own: what breaks or hangs there is told, and nothing else."""
        # -P: what lies in the current directory is not imported.
        return self.run([sys.executable, "-P", *arguments], self.seconds)

    def read(self, path: str) -> str:
        """The text of a file, without space around it; "" where there is none."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return ""

    @property
    def config_home(self) -> Path:
        """Where our own configuration is, and our own units."""
        # Imported here: what is said of broken packages must not need them.
        from microserve.tools.common import config_home

        return config_home(self.home, self.environ.get("XDG_CONFIG_HOME", ""))

    @property
    def gpus(self) -> list[Path]:
        """NVIDIA's devices."""
        return sorted(self.root.glob("dev/nvidia[0-9]*"))

    @property
    def rdma_devices(self) -> list[Path]:
        return sorted(self.root.glob("sys/class/infiniband/*"))
