"""What `microserve doctor` finds of limits, devices, clock, ports and units on made-up machines: well, and broken."""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.machine_support import GPU, INFINITE, machine, only, told

from microserve.tools.checks.host import (
    check_clock,
    check_limits,
    check_network,
    check_shared_memory,
    clock_state,
    judge_shared_memory,
)
from microserve.tools.checks.machine import Machine, Ran
from microserve.tools.checks.ports import Wanted, check_ports, who_listens
from microserve.tools.checks.units import check_units
from microserve.tools.install_units import UNITS, Places, Work, install

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# --- the host ------------------------------------------------------------------------------------------------------

RDMA = {
    "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
    "sys/class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
    "sys/class/infiniband/mlx5_0/ports/1/link_layer": "InfiniBand\n",
    "dev/infiniband/uverbs0": "",
}


def limited(asked: Machine, memlock: tuple[int, int], files: tuple[int, int] = (65536, 65536)) -> Machine:
    limits = {resource.RLIMIT_MEMLOCK: memlock, resource.RLIMIT_NOFILE: files}
    return replace(asked, limit=lambda which: limits[which])


def test_limits(tmp_path: Path) -> None:
    plain, small = machine(tmp_path / "a"), (8 << 20, 8 << 20)
    assert [each.status for each in check_limits(plain)] == ["ok", "ok"]
    assert [each.status for each in check_limits(limited(plain, small))] == ["ok", "ok"]
    rdma = machine(tmp_path / "b", files=RDMA)
    locked, _ = check_limits(limited(rdma, small))
    assert (locked.status, locked.message) == (
        "problem",
        "locked memory is limited to 8 MiB: RDMA cannot register a pool",
    )
    assert "LimitMEMLOCK=infinity" in locked.advice
    raisable, _ = check_limits(limited(rdma, (8 << 20, INFINITE)))
    assert raisable.advice.startswith("ulimit -l unlimited")
    few = [check_limits(limited(plain, small, files))[1] for files in ((256, 65536), (1024, 1024))]
    assert [(each.status, each.advice.split(" in ")[0]) for each in few] == [
        ("problem", "ulimit -n 8192"),
        ("note", "'* - nofile 65536'"),
    ]


def test_shared_memory(tmp_path: Path) -> None:
    gib = 1 << 30
    assert judge_shared_memory(16 * gib, 8 * gib).status == "ok"
    assert judge_shared_memory(gib, gib // 2).status == "note"
    docker = judge_shared_memory(64 << 20, 64 << 20)
    assert (docker.status, "--shm-size" in docker.advice) == ("problem", True)
    assert judge_shared_memory(16 * gib, 1 << 20).status == "problem"
    assert only(check_shared_memory(machine(tmp_path))).status == "problem"
    assert "/dev/shm" in only(check_shared_memory(Machine())).message


def test_network_devices(tmp_path: Path) -> None:
    assert told(check_network(machine(tmp_path / "a"))) == [
        ("ok", "no RDMA device: KV between machines would go over TCP")
    ]
    there = machine(tmp_path / "b", files=RDMA | {"sys/class/net/eth0/mtu": "1500"})
    assert told(check_network(there, wanted=[("e.toml", "mlx5_0:1,eth0"), ("f.toml", "all")])) == [
        ("ok", "RDMA device mlx5_0:1: InfiniBand, 400 Gb/sec (4X NDR)")
    ]
    missing = check_network(there, wanted=[("e.toml", "mlx5_1:1")])[1]
    assert (missing.status, missing.message) == (
        "problem",
        "e.toml: ucx_devices names mlx5_1:1, and there is no such device",
    )
    assert missing.advice == "choose among: eth0, mlx5_0"
    unused = check_network(there, wanted=[("e.toml", "lo")])[1]
    assert (unused.status, unused.advice.split(" in ")[0]) == ("note", 'ucx_devices = "mlx5_0:1"')


def test_network_devices_that_cannot_be_used(tmp_path: Path) -> None:
    down = machine(tmp_path / "a", files=RDMA | {"sys/class/infiniband/mlx5_0/ports/1/state": "1: DOWN\n"})
    assert told(check_network(down)) == [("note", "RDMA device mlx5_0:1 is not active: DOWN")]
    hidden = machine(tmp_path / "b", files={name: text for name, text in RDMA.items() if "uverbs" not in name})
    found = check_network(hidden, wanted=[("e.toml", "mlx5_0:1")])[1]
    assert (found.status, "--device /dev/infiniband" in found.advice) == ("problem", True)
    apart = machine(tmp_path / "c", files=RDMA | GPU)
    assert check_network(apart, wanted=[("e.toml", "mlx5_0:1")])[1].advice == "modprobe nvidia_peermem"


@pytest.mark.parametrize(("answer", "status"), [(0, "ok"), (5, "note"), (-1, "note"), (None, "note")])
def test_the_clock(answer: int | None, status: str) -> None:
    assert only(check_clock(lambda: answer)).status == status


def test_the_kernel_is_asked_of_its_clock() -> None:
    assert clock_state() in (0, 1, 2, 3, 4, 5, -1)


# --- ports ---------------------------------------------------------------------------------------------------------

HTTP = Wanted("HTTP", "127.0.0.1", 8000, "http_port")
TITLE = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def listening(address: str, inode: int = 77, state: str = "0A") -> str:
    rest = "00000000:00000000 00:00000000 00000000     0        0"
    return f"{TITLE}   0: {address}:1F40 00000000:0000 {state} {rest} {inode} 1\n"


def process(root: Path, pid: int, inode: int, *command: str) -> None:
    (root / f"proc/{pid}/fd").mkdir(parents=True)
    (root / f"proc/{pid}/fd/5").symlink_to(f"socket:[{inode}]")
    (root / f"proc/{pid}/cmdline").write_text("\0".join(command) + "\0")


@pytest.mark.parametrize(
    ("table", "free"),
    [
        (TITLE, True),
        (listening("0100007F"), False),
        (listening("00000000"), False),
        (listening("0100007F", state="01"), True),
        (listening("0501A8C0"), True),
    ],
)
def test_whether_a_port_is_free(table: str, free: bool, tmp_path: Path) -> None:
    asked = machine(tmp_path, files={"proc/net/tcp": table})
    process(tmp_path, 41, 77, "/usr/bin/nginx", "--password=hush")
    found = only(check_ports(asked, [HTTP]))
    if free:
        assert (found.status, found.message) == ("ok", "HTTP port 8000 of 127.0.0.1 is free")
    else:
        words = "HTTP port 8000 of 127.0.0.1 is in use by another program: nginx (process 41)"
        assert (found.status, found.message) == ("problem", words)
        assert "http_port" in found.advice
        assert only(check_ports(asked, [replace(HTTP, needed=False)])).status == "note"


def test_a_port_that_our_router_has_and_one_whose_owner_is_hidden(tmp_path: Path) -> None:
    six = listening("00000000000000000000000000000000")
    asked = machine(tmp_path, files={"proc/net/tcp": TITLE, "proc/net/tcp6": six})
    hidden = only(check_ports(asked, [HTTP]))
    assert (hidden.status, hidden.advice.split(",")[0]) == ("note", "run this as root")
    process(tmp_path, 42, 77, "/usr/bin/python3", "-P", "-m", "microserve.router")
    ours = only(check_ports(asked, [HTTP]))
    assert (ours.status, ours.message) == ("ok", "HTTP port 8000 of 127.0.0.1 is a microserve router's (process 42)")
    assert who_listens("127.0.0.1", 8000, tmp_path) == "a microserve router (process 42)"
    assert only(check_ports(machine(tmp_path / "mac"), [HTTP])).status == "note"
    assert who_listens("127.0.0.1", 8000, tmp_path / "mac") == "another program"


# --- units ---------------------------------------------------------------------------------------------------------


def shown(**changes: str) -> str:
    values = {"Id": "microserve-router.service", "ActiveState": "active", "SubState": "running"}
    values |= {"UnitFileState": "enabled", "Result": "success", "NRestarts": "0"}
    return "\n".join(f"{key}={value}" for key, value in (values | changes).items()) + "\n"


def with_systemd(root: Path, *answers: Ran, units: Sequence[str] = UNITS) -> Machine:
    install(Places.of_system(root), Work(dry=False, say=lambda _text: None), make_user=False)
    for name in set(UNITS) - set(units):
        (root / "etc/systemd/system" / name).unlink()
    (root / "run/systemd/system").mkdir(parents=True)
    return machine(root, systemctl=list(answers))


LISTED = Ran(0, "microserve-router.service loaded active running microserve router\n")


def test_units_that_run(tmp_path: Path) -> None:
    asked = with_systemd(tmp_path, LISTED, Ran(0, shown()))
    assert told(check_units(asked)) == [("ok", "microserve-router is active (running), enabled")]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"ActiveState": "failed", "Result": "exit-code"}, "problem", "microserve-router has failed: exit-code"),
        ({"ActiveState": "inactive", "SubState": "dead"}, "note", "microserve-router is inactive (dead), enabled"),
        ({"NRestarts": "7"}, "note", "microserve-router is active (running), enabled, restarted 7 times"),
    ],
)
def test_units_that_do_not_run_well(changes: dict[str, str], status: str, message: str, tmp_path: Path) -> None:
    found = only(check_units(with_systemd(tmp_path, LISTED, Ran(0, shown(**changes)))))
    assert (found.status, found.message, bool(found.advice)) == (status, message, True)


def test_units_that_are_missing_or_of_another_version_or_not_to_be_asked(tmp_path: Path) -> None:
    assert only(check_units(machine(tmp_path / "a", systemctl=Ran(0)))).message.startswith("no systemd here to restart")
    bare = machine(tmp_path / "b", files={"run/systemd/system/x": ""}, systemctl=Ran(0))
    assert only(check_units(bare)).advice.startswith("`microserve install-units`")
    half = with_systemd(tmp_path / "c", Ran(0, ""), units=UNITS[:2])
    assert [(each.status, each.advice.split(" ")[0]) for each in check_units(half)] == [
        ("problem", "`microserve"),
        ("note", "`systemctl"),
    ]
    other = with_systemd(tmp_path / "d", Ran(1, "", "Failed to connect to bus\n"))
    unit = tmp_path / "d/etc/systemd/system" / UNITS[0]
    unit.write_text(unit.read_text() + "# edited\n")
    assert [each.status for each in check_units(other)] == ["note", "note"]
