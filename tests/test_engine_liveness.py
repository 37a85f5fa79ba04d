"""What proves a process dead, and what does not."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from microserve.engine.liveness import Incarnation, own_incarnation, proven_dead

if TYPE_CHECKING:
    from pathlib import Path

ME = own_incarnation()


def test_this_process_lives() -> None:
    assert ME.pid == os.getpid()
    assert ME.host
    assert not proven_dead(ME, ME.host)


@pytest.mark.parametrize("collected", [False, True])
def test_a_process_that_has_ended_is_dead(collected: bool) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    fields = _stat(child.pid)
    other = Incarnation(ME.host, child.pid, int(fields[19]))
    assert not proven_dead(other, ME.host)
    child.stdin.close()
    # Waits for the end, and leaves the process to be collected.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if collected:
        child.wait()
    assert proven_dead(other, ME.host)
    child.wait()


def test_an_id_that_another_process_has_by_now_is_proof() -> None:
    assert proven_dead(ME._replace(started=ME.started - 1), ME.host)


def test_another_host_proves_nothing() -> None:
    gone = Incarnation("elsewhere", 2**22 + 1, 5)
    assert not proven_dead(gone, ME.host)
    assert not proven_dead(gone._replace(host=""), "")
    assert proven_dead(gone._replace(host=ME.host), ME.host)


def test_a_hidden_process_is_not_taken_for_dead(tmp_path: Path) -> None:
    assert not proven_dead(ME, ME.host, tmp_path)
    assert own_incarnation(tmp_path).host == ""


def test_a_name_with_parentheses_is_read(tmp_path: Path) -> None:
    folder = tmp_path / str(ME.pid)
    folder.mkdir()
    (folder / "stat").write_text(f"{ME.pid} (a) Z (b) R " + " ".join(["0"] * 18) + f" {ME.started} 0")
    assert not proven_dead(ME, ME.host, tmp_path)


def _stat(pid: int) -> list[str]:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        text = file.read()
    return text[text.rindex(")") + 2 :].split()
