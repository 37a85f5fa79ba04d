"""The life of a daemon, in real processes: signals, drain, exit codes and what they print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PREAMBLE = """
import asyncio, sys
from microserve.runtime.errors import *
from microserve.runtime.service import run_service
async def main(lifecycle):
    print("started", flush=True)
{body}
sys.exit(run_service(main, name="service"))
"""


@contextmanager
def service(*body: str) -> Iterator[subprocess.Popen[str]]:
    code = PREAMBLE.format(body="\n".join("    " + line for line in body))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=20)
    return process.returncode, out.strip(), err.strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: signal.Signals) -> None:
    with service("await lifecycle.draining.wait()", "print('drained by', lifecycle.reason)") as process:
        assert line(process) == "started"
        process.send_signal(number)
        assert ended(process) == (0, f"drained by {number.name}", "")


def test_a_second_signal_is_immediate() -> None:
    body = ("await lifecycle.draining.wait()", "print('draining', flush=True)", "await asyncio.Event().wait()")
    with service(*body) as process:
        assert line(process) == "started"
        process.send_signal(signal.SIGINT)
        assert line(process) == "draining"
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130


def test_a_second_signal_works_while_the_loop_is_blocked() -> None:
    body = ("await lifecycle.draining.wait()", "print('blocked', flush=True)", "while True: pass")
    with service(*body) as process:
        assert line(process) == "started"
        process.send_signal(signal.SIGTERM)
        assert line(process) == "blocked"
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 143


@pytest.mark.parametrize(("last", "code"), [("return", 0), ("raise PeerLost('gone')", 1)])
def test_a_task_that_refuses_to_end_keeps_no_process(last: str, code: int) -> None:
    body = (
        "from microserve.runtime.log import setup_logging; setup_logging('error', False, 'service')",
        "async def stay():",
        "    while True:",
        "        try: await asyncio.Event().wait()",
        "        except asyncio.CancelledError: pass",
        "task = asyncio.create_task(stay(), name='a stubborn one')",
        "other = asyncio.create_task(asyncio.Event().wait(), name='one that ends')",
        "await asyncio.sleep(0)",
        last,
    )
    with service(*body) as process:
        ended_with, out, err = ended(process)
    assert (ended_with, out) == (code, "started")
    assert "tasks that refuse to end are left behind" in err
    assert 'tasks="a stubborn one"' in err
    assert "one that ends" not in err


def test_returning_is_success() -> None:
    with service("return") as process:
        assert ended(process) == (0, "started", "")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        ("ConfigError('page_size: 0')", 2, "service: error: page_size: 0"),
        ("CheckpointError('no weights')", 2, "service: error: no weights"),
        ("PeerLost('gone')", 1, "service: error: gone"),
        ("OSError(98, 'Address already in use')", 1, "service: error: [Errno 98] Address already in use"),
    ],
)
def test_an_expected_error_is_one_line_and_an_exit_code(error: str, code: int, told: str) -> None:
    with service(f"raise {error}") as process:
        assert ended(process) == (code, "started", told)


def test_a_bug_shows_its_traceback() -> None:
    with service("raise ValueError('a bug')") as process:
        code, _, err = ended(process)
        assert code == 1
        assert "Traceback" in err
        assert err.splitlines()[-1] == "service: error: internal error (the traceback above is a bug)"


@pytest.mark.parametrize("error", ["ConfigError('page_size: 0')", "ValueError('a bug')"])
def test_its_end_is_a_json_object_where_every_line_is_one(error: str) -> None:
    setup = "from microserve.runtime.log import setup_logging; setup_logging('error', True, 'engine:e', epoch=255)"
    with service(setup, f"raise {error}") as process:
        code, _, err = ended(process)
    said = json.loads(err)
    told = (said["level"], said["process"], said["epoch"], said["event"])
    assert told == ("error", "engine:e", "ff", "this process ends")
    bug = "bug" in error
    assert code == (1 if bug else 2)
    assert said["error"] == ("internal error (the traceback above is a bug)" if bug else "page_size: 0")
    assert ("ValueError: a bug" in said.get("traceback", "")) == bug


@pytest.mark.parametrize("error", ["ConfigError('page_size: 0')", "ValueError('a bug')"])
def test_its_end_is_an_error_in_the_journal(error: str, tmp_path: Path) -> None:
    code = PREAMBLE.format(body=f"    raise {error}")
    with (tmp_path / "journal").open("w+") as journal:
        status = os.fstat(journal.fileno())
        environ = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
        subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=journal, env=environ, check=False
        )
        journal.seek(0)
        lines = journal.read().splitlines()
    assert all(line.startswith("<3>") for line in lines)
    assert lines[-1].startswith("<3>service: error: ")


def test_waiting_for_work_is_bounded() -> None:
    body = (
        "print(await lifecycle.wait_drained(asyncio.sleep(0), 5))",
        "print(await lifecycle.wait_drained(asyncio.Event().wait(), 0.01))",
    )
    with service(*body) as process:
        assert ended(process) == (0, "started\nTrue\nFalse", "")
