"""What UCX writes into its log, and what is read out of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microserve.kv.transfer.ucx_journal import TableReader, UcxJournal, WriteChoice

HOST = """\
[1795413926.199353] [vm:3865 :0]   +--------+-------------+-----------------------------------+
[1795413926.199353] [vm:3865 :0]   | engine-1:5f0c intra-node cfg#1                           |
[1795413926.199353] [vm:3865 :0]   | remote memory write by ucp_put* from host memory to host |
[1795413926.199353] [vm:3865 :0]   +--------+-------------+-----------------------------------+
[1795413926.199353] [vm:3865 :0]   | Range  | Description |              Config               |
[1795413926.199353] [vm:3865 :0]   +--------+-------------+-----------------------------------+
[1795413926.199353] [vm:3865 :0]   | 0..inf | zero-copy   | cma/memory                        |
[1795413926.199353] [vm:3865 :0]   +--------+-------------+-----------------------------------+
[1795413926.201012] [vm:3865 :0]   | engine-1:5f0c intra-node cfg#1                  |
[1795413926.201012] [vm:3865 :0]   | active message by ucp_am_send* from host memory |
[1795413926.201012] [vm:3865 :0]   |   Range    |    Description     |    Config     |
[1795413926.201012] [vm:3865 :0]   | 16516..inf | multi-frag copy-in | tcp/lo        |
"""


def table(relation: str, memory: str, config: str) -> list[str]:
    rows = (f"a:1 {relation} cfg#2", f"remote memory write by ucp_put*(multi) from {memory} to somewhere")
    sizes = ("0..2047 | short | self/memory", f"2048..inf | zero-copy | {config}")
    return [f"[1.5] [h:1:0]   | {row} |" for row in (*rows, "Range | Description | Config", *sizes)]


def test_a_table_of_writes_is_a_choice_and_other_tables_are_not() -> None:
    assert TableReader().read(HOST.splitlines()) == ([WriteChoice("engine-1:5f0c", "intra-node", "host", "shm")], [])


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("cuda_ipc/cuda", "cuda_ipc"),
        ("rc_mlx5/mlx5_0:1/path0", "rdma"),
        ("50% on rc_mlx5/mlx5_0:1/path0 and 50% on rc_mlx5/mlx5_1:1/path0", "rdma"),
        ("srd/rdmap0:1", "rdma"),
        ("posix/memory", "shm"),
        ("tcp/eth0", "tcp"),
        ("cuda_copy, tcp/lo, cuda_copy, frag cuda", "tcp"),
        ("self/memory", "local"),
        ("something/new", "something/new"),
    ],
)
def test_the_row_of_the_largest_sizes_names_the_kind(config: str, kind: str) -> None:
    choices, _ = TableReader().read(table("inter-node", "cuda/GPU0", config))
    assert choices == [WriteChoice("a:1", "inter-node", "cuda", kind)]


def test_warnings_are_told() -> None:
    lines = [
        "[1.5] [h:1:0]     tcp_ep.c:1234 UCX  WARN  connection to 127.0.0.1 was closed",
        "[1.5] [h:1:0] UCX  INFO  x",
    ]
    assert TableReader().read(lines) == ([], ["connection to 127.0.0.1 was closed"])


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> tuple[UcxJournal, Path]:
    """A journal, and the file that UCX would write to."""
    monkeypatch.delenv("UCX_LOG_FILE", raising=False)
    monkeypatch.delenv("UCX_PROTO_INFO", raising=False)
    journal = UcxJournal()
    file = Path(os.environ["UCX_LOG_FILE"])
    assert os.environ["UCX_PROTO_INFO"] == "y"
    journal.settled()
    assert "UCX_LOG_FILE" not in os.environ
    assert "UCX_PROTO_INFO" not in os.environ
    return journal, file


def test_a_journal_reads_on_where_it_was(log: tuple[UcxJournal, Path]) -> None:
    journal, file = log
    with file.open("w") as out:  # as UCX does: opened once, written on
        assert journal.read() == []
        print(HOST[:500], end="", file=out, flush=True)
        assert journal.read() == []
        assert journal.kind("engine-1:5f0c", "intra-node", "host") == ""
        print(HOST[500:], end="", file=out, flush=True)
        print("x.c:1 UCX  ERROR  oh", file=out, flush=True)
        assert journal.read() == ["oh"]
    assert journal.kind("engine-1:5f0c", "intra-node", "host") == "shm"
    assert journal.kind("engine-1:5f0c", "intra-node", "cuda") == ""
    assert journal.kind("engine-2:5f0c", "intra-node", "host") == ""


def test_what_was_read_does_not_stay_in_memory(log: tuple[UcxJournal, Path]) -> None:
    journal, file = log
    with file.open("w") as out:
        for round in range(3):
            print("filler\n" * 200_000, end="", file=out, flush=True)
            print(f"x.c:1 UCX  WARN  round {round}", file=out, flush=True)
            assert journal.read() == [f"round {round}"]
            assert file.stat().st_blocks * 512 < 1 << 20


def test_two_different_answers_are_none(log: tuple[UcxJournal, Path]) -> None:
    journal, file = log
    with file.open("w") as out:
        out.write("\n".join([*table("inter-node", "host", "tcp/eth0"), *table("inter-node", "host", "tcp/eth1"), ""]))
        out.flush()
        journal.read()
        assert journal.kind("a:1", "inter-node", "host") == "tcp"
        out.write("\n".join([*table("inter-node", "host", "rc_verbs/mlx5_0:1"), ""]))
        out.flush()
        journal.read()
    assert journal.kind("a:1", "inter-node", "host") == ""


def test_an_operators_own_log_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UCX_LOG_FILE", str(tmp_path / "ucx.log"))
    journal = UcxJournal()
    journal.settled()
    assert os.environ["UCX_LOG_FILE"] == str(tmp_path / "ucx.log")
    assert journal.read() == []
    assert journal.kind("a:1", "self", "host") == ""
