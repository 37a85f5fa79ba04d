"""What `microserve doctor` finds of software, GPUs and transports on made-up machines: each well, and broken."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.machine_support import GPU, machine, only, told

from microserve.tools.checks.gpu import check_gpu, check_kernels, check_torch
from microserve.tools.checks.machine import Machine, Ran
from microserve.tools.checks.running import Check, run_checks
from microserve.tools.checks.software import PACKAGES, check_packages, check_python
from microserve.tools.checks.transports import check_transports, judge_transports

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.tools.checks.finding import Finding

# --- software ------------------------------------------------------------------------------------------------------


def test_the_packages_are_those_that_the_project_declares() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    declared = {
        line.partition(";")[0].strip() for line in [*project["dependencies"], *optional["cuda"], *optional["tui"]]
    }
    assert {f"{package.name}>={package.oldest}" for package in PACKAGES} == declared


def test_python() -> None:
    assert told(check_python((3, 11, 2), "linux", "x86_64")) == [("ok", "Python 3.11.2 on linux, x86_64")]
    old = only(check_python((3, 10, 9), "linux", "x86_64"))
    assert (old.status, old.advice) == ("problem", "install microserve with Python 3.11")
    assert only(check_python((3, 12, 0), "darwin", "arm64")).status == "note"


def imported(*broken: str) -> Ran:
    modules = [package.imported for package in PACKAGES if package.name not in ("torch", "flashinfer-python")]
    lines = [json.dumps([name, "ImportError: no" if name in broken else ""]) for name in modules]
    return Ran(0, "a module that talks\n" + "\n".join(lines) + "\n")


def versions(**changes: str | None) -> Callable[[str], str | None]:
    known: dict[str, str | None] = {package.name: package.oldest + ".9" for package in PACKAGES}
    known |= {name.replace("_", "-"): version for name, version in changes.items()}
    return lambda name: known[name]


def test_packages_that_are_there(tmp_path: Path) -> None:
    found = only(check_packages(machine(tmp_path, python=imported()), installed=versions(), curve=lambda: True))
    assert found.status == "ok"
    assert "torch 2.6.9" in found.message


@pytest.mark.parametrize(
    ("changes", "broken", "status", "message", "advice"),
    [
        ({"msgspec": None}, "", "problem", "msgspec is not installed", "'microserve'"),
        ({"torch": "2.5.1+cpu"}, "", "problem", "torch 2.5.1+cpu is older than 2.6", "--upgrade 'torch>=2.6'"),
        ({}, "zmq", "problem", "pyzmq cannot be imported: ImportError: no", "--force-reinstall 'pyzmq>=26'"),
        ({"textual": None}, "", "note", "textual is not installed: `microserve top` needs it", "'microserve[tui]'"),
    ],
)
def test_packages_that_are_not_as_needed(
    changes: dict[str, str | None], broken: str, status: str, message: str, advice: str, tmp_path: Path
) -> None:
    asked = machine(tmp_path, python=imported(broken))
    found = check_packages(asked, installed=versions(**changes), curve=lambda: True)
    told = next(each for each in found if each.status == status)
    assert (told.message, told.advice) == (message, f"pip install {advice}")


def test_flashinfer_is_not_missed_without_a_gpu(tmp_path: Path) -> None:
    found = check_packages(machine(tmp_path, python=imported()), installed=versions(flashinfer_python=None))
    assert [each.status for each in found] == ["ok"]


def test_flashinfer_is_needed_where_a_gpu_is(tmp_path: Path) -> None:
    asked = machine(tmp_path, files=GPU, python=imported())
    found = only(check_packages(asked, installed=versions(flashinfer_python=None)))
    assert (found.status, found.advice) == ("problem", "pip install 'microserve[cuda]'")


def test_imports_that_crash_or_take_too_long_and_a_zmq_without_keys(tmp_path: Path) -> None:
    crashed = imported()
    lines = crashed.out.splitlines()
    half = Ran(-11, "\n".join(lines[:3]))
    found = only(check_packages(machine(tmp_path, python=half), installed=versions()))
    assert found.message == "msgpack cannot be imported: the process ended with code -11"
    late = check_packages(machine(tmp_path, python=replace(half, late=True)), installed=versions())
    assert [each.status for each in late] == ["ok", "note"]
    keyless = only(check_packages(machine(tmp_path, python=imported()), installed=versions(), curve=lambda: False))
    assert (keyless.status, "without CURVE" in keyless.message) == ("problem", True)


# --- GPUs ----------------------------------------------------------------------------------------------------------

SMI = "0, NVIDIA H200, 580.1, 143771, 2048\n1, NVIDIA H200, 580.1, 143771, [N/A]\n"


def test_a_machine_without_a_gpu(tmp_path: Path) -> None:
    assert told(check_gpu(machine(tmp_path))) == [("note", "no NVIDIA GPU: engines compute on the CPU")]
    assert check_kernels(machine(tmp_path)) == []


def test_gpus_and_their_driver(tmp_path: Path) -> None:
    assert told(check_gpu(machine(tmp_path, files=GPU, nvidia_smi=Ran(0, SMI)))) == [
        ("ok", "GPU 0: NVIDIA H200, driver 580.1, 2 of 140 GiB in use"),
        ("ok", "GPU 1: NVIDIA H200, driver 580.1, ? of 140 GiB in use"),
    ]
    broken = only(check_gpu(machine(tmp_path, nvidia_smi=Ran(9, "Failed: Driver/library version mismatch\n"))))
    assert (broken.status, broken.message) == ("problem", "nvidia-smi fails: Failed: Driver/library version mismatch")
    assert "install the driver again" in broken.advice
    hung = only(check_gpu(machine(tmp_path, nvidia_smi=Ran(-1, late=True))))
    assert (hung.status, hung.message) == ("problem", "nvidia-smi does not answer within 5 s")
    version = {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun\n"}
    blind = only(check_gpu(machine(tmp_path, files=version)))
    assert (blind.status, blind.message.split(";")[0]) == ("note", "2 NVIDIA GPUs, driver 580.65.06")


def torch_says(**changes: object) -> Ran:
    gpus = [["NVIDIA H200", 9, 0], ["NVIDIA H200", 9, 0]]
    answer = {"version": "2.13.0", "cuda": "13.0", "available": True, "gpus": gpus, "error": ""}
    return Ran(0, json.dumps(answer | changes) + "\n")


def test_torch_on_a_cpu_and_on_gpus(tmp_path: Path) -> None:
    assert told(check_torch(machine(tmp_path, python=torch_says(cuda=None)))) == [("ok", "torch 2.13.0, on the CPU")]
    asked = machine(tmp_path, files=GPU, python=torch_says())
    assert told(check_torch(asked)) == [("ok", "torch 2.13.0, CUDA 13.0, sees 2 of 2 GPUs")]


@pytest.mark.parametrize(
    ("ran", "status", "message"),
    [
        (torch_says(cuda=None), "problem", "torch 2.13.0 was built without CUDA, and there are GPUs"),
        (torch_says(available=False, error="RuntimeError: too old"), "problem", "sees no GPU: RuntimeError: too old"),
        (torch_says(gpus=[["NVIDIA H200", 9, 0]]), "note", "sees 1 of 2 GPUs: the driver shows it no more"),
        (torch_says(gpus=[["T4", 7, 5], ["H200", 9, 0]]), "note", "GPU 0, T4, has compute capability 7.5"),
        (Ran(1, "", "Traceback\nOSError: libcudart.so.13: cannot open\n"), "problem", "OSError: libcudart.so.13"),
        (Ran(-1, late=True), "note", "importing torch took longer than 5 s"),
    ],
)
def test_torch_that_does_not_fit(ran: Ran, status: str, message: str, tmp_path: Path) -> None:
    found = next(each for each in check_torch(machine(tmp_path, files=GPU, python=ran)) if each.status != "ok")
    assert found.status == status
    assert message in found.message
    assert found.advice


def test_kernels_that_are_compiled_or_not(tmp_path: Path) -> None:
    asked = machine(tmp_path, files=GPU | {"var/cache/microserve/nothing": ""}, nvcc=Ran(0))
    assert [each.status for each in check_kernels(asked)] == ["note", "note", "note"]
    compiled = {
        "home/.cache/flashinfer/0.6.12/90a/cached_ops/batch_decode/batch_decode.so": "",
        "home/.triton/cache/abc/rope.cubin": "",
        "var/cache/microserve/.cache/flashinfer/0.6.12/90a/cached_ops/a/a.so": "",
    }
    found = check_kernels(machine(tmp_path, files=compiled, nvcc=Ran(0)))
    assert [each.status for each in found] == ["ok", "ok", "ok"]
    assert found[0].message == f"compiled modules of FlashInfer: 1, in {tmp_path}/home/.cache/flashinfer"


def test_kernels_that_nothing_can_compile(tmp_path: Path) -> None:
    flashinfer, _triton = check_kernels(machine(tmp_path, files=GPU))
    assert flashinfer.message.endswith("and there is no nvcc to do it")
    assert "flashinfer-jit-cache" in flashinfer.advice
    shipped = check_kernels(machine(tmp_path, files=GPU), installed=lambda _name: "0.6.12+cu130")[0]
    assert (shipped.status, shipped.message.split(" come ")[1]) == (
        "ok",
        "compiled with flashinfer-jit-cache 0.6.12+cu130",
    )


# --- transports ----------------------------------------------------------------------------------------------------


def test_transports(tmp_path: Path) -> None:
    answer = {"transports": {"tcp": ["eth0", "lo"], "cma": ["memory"], "self": ["memory"]}, "error": ""}
    asked = machine(tmp_path, python=Ran(0, f"a library that talks\n{json.dumps(answer)}\n"))
    assert told(check_transports(asked)) == [("ok", "UCX finds tcp (eth0 lo), cma")]


@pytest.mark.parametrize(
    ("ran", "status", "message"),
    [
        (Ran(0, '{"transports": {}, "error": "NIXL is not installed"}'), "problem", "NIXL is not installed"),
        (Ran(1, "", "Traceback\nModuleNotFoundError: nixl_cu13"), "problem", "ModuleNotFoundError: nixl_cu13"),
        (Ran(-6, ""), "problem", "exit code -6"),
        (Ran(0, '{"transports": {"self": ["memory"]}, "error": ""}'), "problem", "no transport to another process"),
        (Ran(-1, late=True), "note", "UCX has not started within 5 s"),
    ],
)
def test_transports_that_are_not_there(ran: Ran, status: str, message: str, tmp_path: Path) -> None:
    found = only(check_transports(machine(tmp_path, python=ran)))
    assert (found.status, message in found.message, bool(found.advice)) == (status, True, True)


def test_transports_that_a_machine_should_have() -> None:
    near = {"tcp": ["lo"], "posix": ["memory"]}
    whole = near | {"cma": ["memory"], "cuda_ipc": ["cuda"], "rc_mlx5": ["mlx5_0:1"]}
    assert [each.status for each in judge_transports(whole, gpu=True, rdma=True)] == ["ok"]
    assert told(judge_transports(near, gpu=True, rdma=True))[1:] == [
        ("problem", "no cuda_ipc: KV between GPUs goes through the memory of the host, slowly"),
        ("problem", "RDMA devices, and UCX can use none of them"),
    ]
    advice = [judge_transports(near, gpu=False, rdma=False, ptrace_scope=scope)[1].advice for scope in ("1", "0")]
    assert advice == ["sysctl kernel.yama.ptrace_scope=0", "in a container, --cap-add SYS_PTRACE"]


# --- running -------------------------------------------------------------------------------------------------------


def test_a_check_that_fails_or_hangs_is_a_finding_and_the_others_go_on() -> None:
    def fails() -> list[Finding]:
        raise ValueError("bad luck")

    read, write = os.pipe()

    def hangs() -> list[Finding]:
        os.read(read, 1)
        os.close(read)
        return []

    checks = [Check("a", fails), Check("b", hangs), Check("python", lambda: check_python((3, 12, 1), "linux", "x"))]
    found = [only(some) for some in run_checks(checks, 0.1)]
    os.close(write)
    assert [(each.check, each.status) for each in found] == [("a", "problem"), ("b", "problem"), ("python", "ok")]
    assert found[0].message == "this check has failed itself: ValueError: bad luck"
    assert found[1].message == "this check does not end within 0.1 s"


def test_programs_are_run_for_so_long_and_no_longer() -> None:
    asked = Machine(seconds=30.0)
    assert asked.python("-c", "print(1)") == Ran(0, "1\n")
    assert asked.program("no such program") is None
    late = replace(asked, seconds=0.5).python("-u", "-c", "import time; print('begun'); time.sleep(60)")
    assert late.late
