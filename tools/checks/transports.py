"""What may carry KV between engines: what UCX finds here, asked of the engine's own transport in another process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from microserve.tools.checks.finding import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from microserve.tools.checks.finding import Finding
    from microserve.tools.checks.machine import Machine

_PROBE = "microserve.kv.transfer.ucx_probe"
_RDMA = ("rc_", "dc_", "ud_", "srd", "gga_")


def check_transports(machine: Machine) -> list[Finding]:
    """Opens the transport as an engine does, and says what UCX could use."""
    ran = machine.python("-m", _PROBE)
    if ran.late:
        words = f"UCX has not started within {machine.seconds:g} s"
        return [note("transports", words, "try again with a longer --timeout when the machine is less busy")]
    lines = ran.out.strip().splitlines()
    if ran.code or not lines or not lines[-1].startswith("{"):
        return [_none(ran.last_words)]
    answer = json.loads(lines[-1])
    if answer["error"]:
        return [_none(answer["error"])]
    return judge_transports(
        answer["transports"],
        gpu=bool(machine.gpus),
        rdma=bool(machine.rdma_devices),
        ptrace_scope=machine.read("proc/sys/kernel/yama/ptrace_scope"),
    )


def _none(why: str) -> Finding:
    advice = "pip install --force-reinstall nixl-cu13; unset UCX_* variables that are not meant"
    return problem("transports", f"engines cannot send KV to each other: {why}", advice)


def judge_transports(
    transports: Mapping[str, Sequence[str]], *, gpu: bool, rdma: bool, ptrace_scope: str = ""
) -> list[Finding]:
    """By the transports that UCX has enabled, each with its devices."""
    shown = ", ".join(
        name if list(devices) == ["memory"] else f"{name} ({' '.join(devices)})"
        for name, devices in transports.items()
        if name != "self"
    )
    if not shown:
        words = "UCX finds no transport to another process"
        return [problem("transports", words, "unset UCX_TLS, or name in it what engines may use")]
    findings = [ok("transports", f"UCX finds {shown}")]
    if gpu and "cuda_ipc" not in transports:
        words = "no cuda_ipc: KV between GPUs goes through the memory of the host, slowly"
        advice = "see that UCX_TLS allows it; in containers, share the host's PID and IPC namespaces"
        findings.append(problem("transports", words, advice))
    if rdma and not any(name.startswith(_RDMA) for name in transports):
        words = "RDMA devices, and UCX can use none of them"
        advice = "see the network and limits checks; UCX_TLS must allow rc, and /dev/infiniband be ours to use"
        findings.append(problem("transports", words, advice))
    if not gpu and "cma" not in transports:
        words = "no cma: KV between engines of this host is copied twice, through shared memory"
        scope = ptrace_scope not in ("", "0")
        advice = "sysctl kernel.yama.ptrace_scope=0" if scope else "in a container, --cap-add SYS_PTRACE"
        findings.append(note("transports", words, advice))
    return findings
