"""Tries strategy files in a process of their own: one that never ends, or takes its process down, costs the router
nothing.

The router calls `try_files`. The process that it starts runs this module: it forks once for each file, and kills
everything that is left when all are done.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

from microserve.router.strategies.files import LOAD_LIMIT, Problem, endless, run_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

START_LIMIT = 5.0
"""Seconds that the process may take until it has begun, on a machine that has a lot to do."""
_AT_ONCE = 16
_SLACK = 1.0
_LONGEST = 10_000
"""Characters of a message that are told."""


class NoTrial(Exception):
    """No process could be had to try files in."""


def try_files(files: Sequence[tuple[Path, str]], *, limit: float = LOAD_LIMIT) -> list[Problem | None]:
    """Runs each file (a path and its text) for at most `limit` seconds: what is wrong with each, or None.

    Waits for all of them, and leaves no process. Raises `NoTrial`.
    """
    if not files:
        return []
    asked = json.dumps({"limit": limit, "files": [(str(path), text) for path, text in files]})
    # What the router can import, the files can; and nothing that lies in the working directory by chance.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path)}
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise NoTrial(f"{sys.executable or 'python'}: {error.strerror}") from error
    patience = START_LIMIT + _SLACK + limit * -(-len(files) // _AT_ONCE)
    try:
        said, complained = process.communicate(asked.encode(), timeout=patience)
    except subprocess.TimeoutExpired:
        # Not waited for yet, so the group is still its own.
        os.killpg(process.pid, signal.SIGKILL)
        said, complained = process.communicate()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    lines = said.decode().splitlines()
    if not lines:
        last = complained.decode(errors="replace").strip().rpartition("\n")[2]
        raise NoTrial(last or f"it did not begin within {START_LIMIT:g} s")
    found = {index: (line, message) for index, line, message in map(json.loads, lines[1:])}
    return [_told(path, found.get(index), limit) for index, (path, _) in enumerate(files)]


def _told(path: Path, found: tuple[int, str] | None, limit: float) -> Problem | None:
    if found is None:
        return endless(path, limit, 0)
    line, message = found
    return Problem(str(path), line, message) if message else None


# --- the process -----------------------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Reads what is to be tried, writes a line when it begins, and one for each file: [index, line, message]."""
    asked = json.load(sys.stdin)
    _say("begun")
    _try(asked["files"], asked["limit"])
    sys.stdout.flush()
    # Whatever the files started and left behind is of this group, and so is this process.
    os.killpg(0, signal.SIGKILL)
    raise AssertionError


def _try(files: Iterable[tuple[str, str]], limit: float) -> None:
    waiting = list(enumerate(files))[::-1]
    running: dict[int, tuple[int, str, IO[bytes]]] = {}
    with contextlib.ExitStack() as reports:
        while waiting or running:
            while waiting and len(running) < _AT_ONCE:
                index, (path, text) = waiting.pop()
                # A file, not a pipe: what is written must never wait for somebody to read it.
                report = reports.enter_context(tempfile.TemporaryFile())
                child = os.fork()
                if not child:
                    _run(Path(path), text, limit, report)
                running[child] = index, path, report
            child, status = os.wait()
            index, path, written = running.pop(child)
            written.seek(0)
            _say([index, *_read(written.read().decode(errors="replace"), path, status, limit)])


def _run(path: Path, text: str, limit: float, report: IO[bytes]) -> NoReturn:
    """One file, in its own process."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(null, standard)
        # By a thread that needs no lock of the interpreter's: it tells where the file stands whatever it is doing.
        faulthandler.dump_traceback_later(limit, exit=True, file=report)
        found = run_file(path, text)
        faulthandler.cancel_dump_traceback_later()
        problem = (found.line, _plain(found.message)) if isinstance(found, Problem) else (0, "")
        report.write(json.dumps(problem).encode())
        report.flush()
    finally:
        os._exit(0)


def _read(report: str, path: str, status: int, limit: float) -> tuple[int, str]:
    """The line and the message of what a file's process left: ours, the dump of one that was stopped, or nothing."""
    if report.startswith("["):
        line, message = json.loads(report)
        return line, message
    if report.startswith("Timeout"):
        return _where(report, path), endless(Path(path), limit, 0).message
    code = os.waitstatus_to_exitcode(status)
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return 0, f"it ends its process ({how})"


def _where(dump: str, path: str) -> int:
    """The line of the file at which it was stopped. Other threads that it started may run its code, too."""
    frame = re.escape(f'File "{path.encode("ascii", "backslashreplace").decode()}", line ') + r"(\d+)"
    threads = [each for each in dump.split("\n\n") if re.search(frame, each)]
    for thread in sorted(threads, key=lambda each: not re.search(frame + " in <module>", each)):
        if found := re.search(frame, thread):
            return int(found[1])
    return 0


def _plain(message: str) -> str:
    """What every codec can write."""
    return message[:_LONGEST].encode(errors="replace").decode()


def _say(line: object) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
