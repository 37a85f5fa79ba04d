"""What UCX could use on this machine, as JSON: `python -m microserve.kv.transfer.ucx_probe`.

Opens the transport as an engine does, in a process of its own: UCX reads its settings once, and tells in its log alone.

    | network    | tcp       | + tcp     | + eth0  + lo |
    | intra-node | sysv      | + sysv    | + memory     |
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING, Final

import numpy as np

from microserve.kv.transfer.base import KvMemory
from microserve.kv.transfer.nixl import NixlTransport
from microserve.runtime.errors import TransferFailed

if TYPE_CHECKING:
    from collections.abc import Iterable

_TITLE: Final = "Available Transports and Devices"
_LEGEND: Final = "Legend:"
_NAMED: Final = re.compile(r"([+-]) (\S+)")
_PAGE: Final = 4096


def read_transports(lines: Iterable[str]) -> dict[str, list[str]]:
    """Each transport that is enabled, and its devices that are, from UCX's log."""
    found: dict[str, list[str]] = {}
    within, last = False, ""
    for line in lines:
        if _TITLE in line:
            within = True
        elif _LEGEND in line:
            within = False
        cells = line.split("|")[1:-1]
        if not within or len(cells) != 4:
            continue
        if (named := _NAMED.search(cells[2])) is not None:
            last = named[2] if named[1] == "+" else ""
        # More devices than fit stand in further rows, beside an empty name.
        if last and (devices := [name for mark, name in _NAMED.findall(cells[3]) if mark == "+"]):
            known = found.setdefault(last, [])
            known += [name for name in devices if name not in known]
    return found


def main() -> int:
    """Prints {"transports": {name: devices}, "error": why there are none}."""
    log = os.memfd_create("ucx-log")
    os.environ["UCX_LOG_FILE"] = f"/proc/self/fd/{log}"
    os.environ["UCX_LOG_LEVEL"] = "debug"
    pool = np.zeros(16 * _PAGE, dtype=np.uint8)
    error = ""
    try:
        memory = KvMemory(address=pool.ctypes.data, page_bytes=_PAGE, total_pages=16)
        NixlTransport(memory, "doctor", devices="all").close()
    except TransferFailed as failed:
        error = failed.message
    with open(f"/proc/self/fd/{log}", encoding="utf-8", errors="replace") as text:
        transports = read_transports(text)
    print(json.dumps({"transports": transports, "error": error}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
