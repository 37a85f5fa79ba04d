"""What UCX says that it could use, read from its log and asked of the real one."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.cluster import daemon_environ

from microserve.kv.transfer.ucx_probe import read_transports

LOG = """
[1.0] [vm:1:0]   | Network    | before    | + not     | + this                         |
[1.0] [vm:1:0]   | Available Transports and Devices (ctx: doctor)                     |
[1.0] [vm:1:0]   | Type       | Component | Transport | Device (System device)         |
[1.0] [vm:1:0]   +------------+-----------+-----------+--------------------------------+
[1.0] [vm:1:0]   | network    | ib        | + rc_mlx5 | + mlx5_0:1 (mlx5_0)  - mlx5_1:1|
[1.0] [vm:1:0]   |            |           |           | + mlx5_2:1 (mlx5_2)            |
[1.0] [vm:1:0]   |            |           +-----------+--------------------------------+
[1.0] [vm:1:0]   |            |           | - ud_mlx5 | - mlx5_0:1 (mlx5_0)            |
[1.0] [vm:1:0]   | intra-node | cma       | + cma     | + memory                       |
[1.0] [vm:1:0]   | accelerator| cuda_ipc  | + cuda_ipc| + cuda (GPU0)                  |
[1.0] [vm:1:0]   | Legend: + = enabled, - = disabled                                  |
[1.0] [vm:1:0]   | after      | x         | + not     | + this                         |
"""


def test_the_table_in_the_log() -> None:
    assert read_transports(LOG.splitlines()) == {
        "rc_mlx5": ["mlx5_0:1", "mlx5_2:1"],
        "cma": ["memory"],
        "cuda_ipc": ["cuda"],
    }


def probed(**environ: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "microserve.kv.transfer.ucx_probe"],
        capture_output=True,
        text=True,
        timeout=60,
        env=daemon_environ() | environ,
        check=True,
    )
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_the_real_one() -> None:
    answer = probed()
    assert answer["error"] == ""
    transports = answer["transports"]
    assert isinstance(transports, dict)
    assert {"tcp", "posix", "self"} <= set(transports)
    assert "lo" in transports["tcp"]


def test_what_is_switched_off_is_not_listed() -> None:
    transports = probed(UCX_TLS="tcp,self")["transports"]
    assert isinstance(transports, dict)
    assert set(transports) == {"tcp", "self"}
