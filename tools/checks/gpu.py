"""GPUs: the driver, torch, and kernels that are compiled already."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microserve.tools.checks.finding import note, ok, problem
from microserve.tools.checks.software import installed_version

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.tools.checks.finding import Finding
    from microserve.tools.checks.machine import Machine

SERVICE_CACHE = Path("var/cache/microserve")
"""The home of engines under systemd, below the root."""

_FIELDS = "index,name,driver_version,memory.total,memory.used"
_OLDEST_CAPABILITY = (8, 0)
"""Of the GPUs that FlashInfer has the kernels for that engines use."""

_ASK_TORCH = """
import json, torch
answer = {"version": torch.__version__, "cuda": torch.version.cuda, "available": False, "gpus": [], "error": ""}
if torch.version.cuda:
    try:
        torch.cuda.init()
        answer["available"] = torch.cuda.is_available()
        for index in range(torch.cuda.device_count()):
            known = torch.cuda.get_device_properties(index)
            answer["gpus"].append([known.name, known.major, known.minor])
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(answer))
"""


def check_gpu(machine: Machine) -> list[Finding]:
    """What NVIDIA's driver says."""
    driver = re.search(r"Kernel Module\D*([\d.]+)", machine.read("proc/driver/nvidia/version"))
    ran = machine.program("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
    if not machine.gpus and driver is None and ran is None:
        return [note("gpu", "no NVIDIA GPU: engines compute on the CPU", "for one, install NVIDIA's driver")]
    if ran is None:
        shown = (
            f"{len(machine.gpus)} NVIDIA GPUs, driver {driver[1] if driver else 'unknown'}; no nvidia-smi to ask more"
        )
        return [note("gpu", shown, "install nvidia-utils (in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)")]
    if ran.late:
        words = f"nvidia-smi does not answer within {machine.seconds:g} s"
        return [
            problem("gpu", words, "see `dmesg | grep -i -e nvrm -e xid`; restart the machine when the driver hangs")
        ]
    rows = [[cell.strip() for cell in line.split(",")] for line in ran.out.splitlines() if line.count(",") == 4]
    if ran.code or not rows:
        advice = "install the driver again so that its kernel module and its libraries agree, then restart the machine"
        return [problem("gpu", f"nvidia-smi fails: {ran.last_words}", advice)]
    return [
        ok("gpu", f"GPU {index}: {name}, driver {version}, {_gib(used)} of {_gib(total)} GiB in use")
        for index, name, version, total, used in rows
    ]


def _gib(mib: str) -> str:
    # A GPU that is shared out (MIG) does not say.
    return f"{int(mib) / 1024:.0f}" if mib.isdigit() else "?"


def check_torch(machine: Machine) -> list[Finding]:
    """Whether torch can be imported, and sees the GPUs that there are."""
    ran = machine.python("-c", _ASK_TORCH)
    if ran.late:
        words = f"importing torch took longer than {machine.seconds:g} s"
        return [note("torch", words, "try again with a longer --timeout; on a cold disk the first import takes long")]
    lines = ran.out.strip().splitlines()
    if ran.code or not lines:
        advice = "pip install --force-reinstall torch"
        return [problem("torch", f"torch cannot be imported: {ran.last_words}", advice)]
    answer: dict[str, Any] = json.loads(lines[-1])
    shown = f"torch {answer['version']}"
    if not machine.gpus:
        return [ok("torch", f"{shown}, on the CPU")]
    if answer["cuda"] is None:
        advice = "install a CUDA build of torch: pip install --force-reinstall torch"
        return [problem("torch", f"{shown} was built without CUDA, and there are GPUs", advice)]
    shown = f"{shown}, CUDA {answer['cuda']}"
    if not answer["available"]:
        why = answer["error"] or "torch.cuda.is_available() says no"
        advice = f"install a driver for CUDA {answer['cuda']}, or a torch for the driver's CUDA (see `nvidia-smi`)"
        return [problem("torch", f"{shown}, sees no GPU: {why}", advice)]
    findings = [ok("torch", f"{shown}, sees {len(answer['gpus'])} of {len(machine.gpus)} GPUs")]
    if len(answer["gpus"]) < len(machine.gpus):
        limited = machine.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES is {limited!r}" if limited is not None else "the driver shows it no more"
        findings = [note("torch", f"{findings[0].message}: {why}", "unset CUDA_VISIBLE_DEVICES to use all of them")]
    for index, (name, major, minor) in enumerate(answer["gpus"]):
        if (major, minor) < _OLDEST_CAPABILITY:
            words = (
                f"GPU {index}, {name}, has compute capability {major}.{minor}: FlashInfer may have no kernels for it"
            )
            findings.append(note("torch", words, 'set executor = "torch" for engines on it'))
    return findings


def check_kernels(machine: Machine, *, installed: Callable[[str], str | None] = installed_version) -> list[Finding]:
    """Whether the first start of an engine has compiled its kernels: ours, and the services'."""
    if not machine.gpus:
        return []
    environ = machine.environ
    flashinfer = Path(environ.get("FLASHINFER_WORKSPACE_BASE") or machine.home) / ".cache/flashinfer"
    triton_home = Path(environ.get("TRITON_HOME") or machine.home)
    triton = Path(environ.get("TRITON_CACHE_DIR") or triton_home / ".triton/cache")
    findings = [_kernels("FlashInfer", _modules(flashinfer), flashinfer, machine)]
    if (version := installed("flashinfer-jit-cache")) is not None:
        findings = [ok("kernels", f"FlashInfer's kernels come compiled with flashinfer-jit-cache {version}")]
    findings.append(_kernels("Triton", [*triton.glob("*/*.cubin")], triton, machine))
    service = machine.root / SERVICE_CACHE
    if service.is_dir():
        findings.append(_kernels("the services' FlashInfer", _modules(service / ".cache/flashinfer"), service, machine))
    return findings


def _modules(folder: Path) -> list[Path]:
    """FlashInfer's compiled modules: by version and architecture, or by architecture alone."""
    return [*folder.glob("*/*/cached_ops/*/*.so"), *folder.glob("*/cached_ops/*/*.so")]


def _kernels(whose: str, compiled: list[Path], folder: Path, machine: Machine) -> Finding:
    if compiled:
        return ok("kernels", f"compiled modules of {whose}: {len(compiled):,}, in {folder}")
    words = f"no kernel of {whose} is compiled in {folder}"
    if machine.find("nvcc") is None and not (machine.root / "usr/local/cuda/bin/nvcc").exists() and whose != "Triton":
        advice = "install the CUDA toolkit (nvcc), which compiles them, or the package flashinfer-jit-cache"
        return note("kernels", f"{words}, and there is no nvcc to do it", advice)
    return note("kernels", words, "nothing to do: the first start of an engine does it, and takes minutes")
